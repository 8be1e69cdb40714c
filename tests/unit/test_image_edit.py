"""Handovers whose sessions were changed: what a kernel would read, and what stays as it was."""

import struct

import kho_walker
import pytest
from click.testing import CliRunner
from guest_memory import MIB, PAGE, Guest, write_raw

from luo.cli import main
from luo.errors import HandoverError, KhoError
from luo.image import Image
from luo.image.edit import NewFile, edit
from luo.image.retrieve import file_bound_data, read_file, sessions

DATA = bytes(range(251)) * 50  # 12,550 bytes: four pages


@pytest.fixture
def made() -> Guest:
    guest = Guest()
    guest.add(b"one", 1, DATA, pos=7, seals=6)
    guest.add(b"one", 2, DATA * 20, order=6)
    guest.add(b"two", 1, b"", pos=3)
    guest.sessions[b"two"].append((9, b"other-v1", 0xFEED))
    guest.sessions[b"empty"] = []
    guest.flbs = [(b"all", 5, 4), (b"memfds", 6, 3), (b"others", 7, 1)]
    secret = guest.folio(b"nobody knows", 3)
    guest.subtrees["mystery"] = (guest.builder.blob(struct.pack("<Q", secret)), 8)
    return guest


@pytest.fixture
def image(made, tmp_path) -> Image:
    pages = made.finish()
    pages[made.scratch[2][0]] = made.device_tree()
    return Image.load(write_raw(tmp_path / "raw", pages, made.base, made.size))


def contents(image: Image) -> dict[str, tuple]:
    return {
        f.name: (f.pos, f.seals, read_file(image, f)) if f.known else (f.handler, f.data)
        for s in sessions(image)
        for f in s.files
    }


def walked(image: Image) -> kho_walker.Image:
    """What the independent reader makes of it; it checks the image's rules too."""
    found = kho_walker.read_handover(image.read, *image.handover.numbers)
    kho_walker.check_image(found, [(start, nbytes) for start, nbytes, _ in image.ram.ranges])
    return found


def records(image: Image) -> list[tuple[bytes, list[tuple[bytes, int, int]]]]:
    """Sessions and files as the independent reader finds them."""
    at, _ = walked(image).subtrees["LUO"]
    compatible, _, sessions_at, _ = struct.unpack("<8sQQQ", image.read(at, 32))
    assert b"luo-v5\0\0" == compatible
    result = []
    _, rows = kho_walker.read_blocks(image.read, sessions_at, 80) if sessions_at else (0, [])
    for row in rows:
        name, files_at, count = struct.unpack("<64sQQ", row)
        _, files = kho_walker.read_blocks(image.read, files_at, 64) if files_at else (0, [])
        assert count == len(files)
        result.append((name.rstrip(b"\0"), [struct.unpack("<48sQQ", file) for file in files]))
    return result


def same_but_luo(image: Image, other: Image) -> None:
    """RAM, scratch, other subtrees and their blocks are as they were."""
    assert image.ram.ranges == other.ram.ranges
    assert image.survey.scratch == other.survey.scratch
    assert image.abi == other.abi
    before, after = walked(image).subtrees, walked(other).subtrees
    assert list(before) == list(after)
    assert before["mystery"] == after["mystery"]
    assert before["kexec-metadata"] == after["kexec-metadata"]
    for name in ("mystery", "kexec-metadata"):
        assert image.read(*before[name]) == other.read(*after[name])
    (secret,) = struct.unpack("<Q", other.read(before["mystery"][0], 8))
    assert other.survey.has_block(secret, 3)
    assert b"nobody knows" == other.read(secret, 12)
    assert [] == other.verify()
    assert [] == other.survey.warnings


def test_edit_of_nothing_is_the_same_sessions(image):
    """Files keep their pages; only LUO's blocks are written anew."""
    result = edit(image)

    same_but_luo(image, result)
    assert contents(image) == contents(result)
    assert [f.data for s in sessions(image) for f in s.files] == [
        f.data for s in sessions(result) for f in s.files
    ]
    assert len(image.survey.phys) == len(result.survey.phys)
    assert [("all", 5, 4), ("memfds", 6, 3), ("others", 7, 1)] == [
        (f.name, f.data, f.count) for f in file_bound_data(result)
    ]


def test_drop_of_session_and_file_frees_what_they_had(image):
    """Their keys go, others' stay; FLBs count what is left, and go when nobody holds them."""
    result = edit(image, drop=["one/0x2", "two"])

    same_but_luo(image, result)
    assert {"one/0x1": (7, 6, DATA)} == contents(result)
    assert [b"one", b"empty"] == [name for name, _ in records(result)]
    # one/2: a folio, the array, its chunk and the record; two/1: its record; the block of two
    assert len(image.survey.phys) - 4 - 1 - 1 == len(result.survey.phys)
    assert [("all", 1), ("memfds", 1)] == [(f.name, f.count) for f in file_bound_data(result)]


def test_add_and_rename(image, tmp_path):
    """A file in a session that there was, one in a new one; from bytes and from a file."""
    (tmp_path / "file").write_bytes(DATA * 3)

    result = edit(
        image,
        rename={"empty": "full", "two": "zwei"},
        add=[
            NewFile("full", 5, DATA, pos=1 << 40, seals=0xF),
            NewFile("new", (1 << 64) - 1, tmp_path / "file", order=2),
            NewFile("new", 0, b""),
        ],
    )

    same_but_luo(image, result)
    found = contents(result)
    assert (1 << 40, 0xF, DATA) == found["full/0x5"]
    assert (0, 0, DATA * 3) == found["new/0xffffffffffffffff"]
    assert (0, 0, b"") == found["new/0x0"]
    assert ("other-v1", 0xFEED) == found["zwei/0x9"]
    assert [b"one", b"zwei", b"full", b"new"] == [name for name, _ in records(result)]
    assert [("all", 7), ("memfds", 6), ("others", 1)] == [
        (f.name, f.count) for f in file_bound_data(result)
    ]


def test_move_gives_every_memfd_other_pages(image):
    """Same contents and orders, no page where it was; everything else stays."""
    result = edit(image, move=True)

    same_but_luo(image, result)
    assert contents(image) == contents(result)
    for old, new in zip(sessions(image), sessions(result), strict=True):
        for before, after in zip(old.files, new.files, strict=True):
            if before.memfd is None:
                assert before.data == after.data
                continue
            rows = [(pfn, *rest) for pfn, *rest in before.memfd["folios"]]
            moved = [(pfn, *rest) for pfn, *rest in after.memfd["folios"]]
            assert [row[1:] for row in rows] == [row[1:] for row in moved]
            assert not {row[0] for row in rows} & {row[0] for row in moved}
            assert before.data != after.data
    assert len(image.survey.phys) == len(result.survey.phys)


def test_edit_twice_and_back(image):
    """A file added and dropped again leaves as much preserved as there was."""
    more = edit(image, add=[NewFile("x", 1, DATA)])
    less = edit(more, drop=["x"])

    same_but_luo(image, less)
    assert contents(image) == contents(less)
    assert len(image.survey.phys) == len(less.survey.phys)


def test_edit_of_everything_away_leaves_a_handover_without_sessions(image):
    """No sessions: no blocks of them; FLBs of none."""
    result = edit(image, drop=["one", "two", "empty"])

    same_but_luo(image, result)
    assert [] == sessions(result)
    assert [] == records(result)
    assert [] == file_bound_data(result)


def test_many_sessions_and_files_fill_blocks(image):
    """52 sessions and 64 files need a second block each."""
    add = [NewFile(f"s{i}", 1, b"x") for i in range(60)]
    add += [NewFile("s0", 2 + i, b"y") for i in range(70)]

    result = edit(image, add=add, drop=["two"])

    assert [] == result.verify()
    assert 62 == len(records(result))
    assert 71 == len(dict(records(result))[b"s0"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drop": ["nobody"]}, "no such session"),
        ({"drop": ["one/0x77"]}, "no such token"),
        ({"rename": {"nobody": "x"}}, "no such session"),
        ({"rename": {"one": "two"}}, "same name"),
        ({"rename": {"one": "x" * 64}}, "63 bytes"),
        ({"rename": {"one": ""}}, "63 bytes"),
        ({"add": [NewFile("one", 1, b"")]}, "is taken"),
        ({"add": [NewFile("x", 1 << 64, b"")]}, "no u64"),
        ({"add": [NewFile("x", 1, b"", pos=-1)]}, "no u64"),
        ({"add": [NewFile("x", 1, b"", seals=0x40)]}, "seals"),
        ({"add": [NewFile("a\0b", 1, b"")]}, "NUL"),
    ],
)
def test_what_no_kernel_could_have_is_refused(image, change, words):
    """Names, tokens, seals: before anything is written."""
    with pytest.raises(ValueError, match=words):
        edit(image, **change)


def test_flb_of_files_that_nobody_knows_is_refused(made, tmp_path):
    """Two of four files hold it: which, if one goes?"""
    made.flbs.append((b"some", 1, 2))
    pages = made.finish()
    image = Image.load(write_raw(tmp_path / "raw", pages, made.base, made.size))

    with pytest.raises(ValueError, match="nobody knows which"):
        edit(image, drop=["two"])
    assert [] == edit(image, rename={"two": "zwei"}).verify()


def test_memory_that_is_full_is_enomem(image):
    """What does not fit is refused."""
    with pytest.raises(KhoError):
        edit(image, add=[NewFile("x", 1, bytes(60 * MIB))])


def test_image_that_breaks_a_rule_is_refused(made, tmp_path):
    """Nothing is built on what a kernel would not take."""
    made.sessions[b"one"].append((3, b"memfd-v2", made.memfd([(made.base + 50 * MIB, 3, 0)], 9)))
    image = Image.load(write_raw(tmp_path / "raw", made.finish(), made.base, made.size))

    with pytest.raises(HandoverError, match="folio 0 is not preserved"):
        edit(image)


def test_page_that_is_not_in_the_dump_is_named_when_it_has_to_move(image):
    """Left where it is, nobody has to read it."""
    file = sessions(image)[0].files[0]
    lost = file.memfd["folios"][2][0] * PAGE
    kept = [part for start, end in ((0, lost), (lost + PAGE, 1 << 62))
            for part in image.pieces(start, end)]  # fmt: skip
    partly = Image(image.ram.ranges, image.handover, kept)

    assert [] == edit(partly, drop=["two"]).verify()
    with pytest.raises(HandoverError, match="not kept") as caught:
        edit(partly, move=True)
    assert lost == caught.value.phys


def test_command_edits_and_says_what_is_left(image, tmp_path):
    """Names with any bytes, settings behind the file's name, one line at the end."""
    (tmp_path / "a=b,c").write_bytes(DATA)
    image.save(tmp_path / "in.img")
    arguments = [
        "image", "edit", str(tmp_path / "in.img"), "-o", str(tmp_path / "out.img"),
        "--drop", "one/1", "--drop", "two", "--rename", "empty=%FF%2F",
        "--add", f"%FF%2F/0x10={tmp_path}/a=b,c,pos=0x20,seals=3",
    ]  # fmt: skip

    done = CliRunner().invoke(main, arguments)

    assert 0 == done.exit_code, done.output
    assert "2 sessions, 2 files" in done.output
    result = Image.load(tmp_path / "out.img")
    assert [b"one", b"\xff/"] == [name for name, _ in records(result)]
    assert (0x20, 3, DATA) == list(contents(result).values())[-1]
    assert 2 == CliRunner().invoke(main, [*arguments, "--add", "no"]).exit_code
