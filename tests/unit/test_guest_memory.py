"""A guest's memory as QEMU writes it: the handover is found in it, or the reason why not."""

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from guest_memory import MIB, PAGE, Guest, write_elf, write_raw
from kho_builder import Builder, flatten

from luo.cli import main
from luo.errors import HandoverError
from luo.image import Image
from luo.image.retrieve import (
    file_bound_data,
    file_name,
    name_of,
    read_file,
    retrieve,
    select,
    sessions,
)
from luo.kho import Handover

DATA = bytes(range(256)) * 33  # 8,448 bytes: two pages and a bit


def guest(**settings) -> Guest:
    """One session with one memfd of three pages."""
    made = Guest(**settings)
    made.add(b"session", 0x11, DATA, pos=5, seals=6)
    return made


def with_tree(made: Guest, at: int | None = None) -> dict[int, bytes]:
    """All pages, and the device tree in the second scratch area."""
    pages = made.finish()
    pages[made.scratch[2][0] + 2 * MIB if at is None else at] = made.device_tree()
    return pages


def the_file(image: Image) -> bytes:
    (session,) = sessions(image)
    (file,) = session.files
    return read_file(image, file)


# ---- finding the handover ----


@pytest.mark.parametrize("base", [0, 0x4000_0000, 0x8000_0000, 0x1_8000_0000, 0x1234_5000 + MIB])
def test_raw_memory_is_found_with_its_first_address(tmp_path, base):
    """The root tree's place in the file and its address in the device tree give the base."""
    base = base // (2 * MIB) * 2 * MIB
    made = guest(base=base)
    path = write_raw(tmp_path / "raw", with_tree(made), base, made.size)

    image = Image.load(path)

    assert made.numbers == image.handover.numbers
    assert [] == image.verify()
    assert DATA == the_file(image)
    assert made.ranges == [(start, nbytes) for start, nbytes, _ in image.ram.ranges]


def test_device_tree_at_any_multiple_of_8_is_found(tmp_path):
    """A boot loader puts it where it likes."""
    made = guest()
    path = write_raw(tmp_path / "raw", with_tree(made, 0x4200_0C38), made.base, made.size)

    assert made.numbers == Image.load(path).handover.numbers


def test_elf_core_with_memory_in_parts_is_found(tmp_path):
    """RAM above and below 4 GiB, a part that was not dumped, adjoining segments."""
    made = guest(base=0x1_0000_0000)
    made.ranges = [(0x8000_0000, 8 * MIB), (made.base, made.size)]
    segments = [
        (made.base + 48 * MIB, 16 * MIB, 16 * MIB),
        (made.base, 48 * MIB, 48 * MIB),
        (0x8000_0000, 0, 8 * MIB),
    ]
    path = write_elf(tmp_path / "core", with_tree(made), segments)

    image = Image.load(path)

    assert [] == image.verify()
    assert DATA == the_file(image)
    assert made.ranges == [(start, nbytes) for start, nbytes, _ in image.ram.ranges]
    with pytest.raises(ValueError, match="--base"):
        Image.load(path, base=0)


def test_elf_core_with_paging_names_memory_more_than_once(tmp_path):
    """The same pages mapped at two addresses are the same bytes of the file."""
    made = guest()
    segments = [(made.base, made.size, made.size), (made.base + MIB, 4 * MIB, 4 * MIB)]
    path = write_elf(tmp_path / "core", with_tree(made), segments)

    assert DATA == the_file(Image.load(path))


def test_elf_core_with_very_many_segments_says_so_in_a_section(tmp_path):
    """PN_XNUM: the number stands in the first section header."""
    made = guest()
    path = write_elf(tmp_path / "core", with_tree(made), [(made.base, *2 * [made.size])], xnum=True)

    assert DATA == the_file(Image.load(path))


def test_x86_setup_data_is_found(tmp_path):
    """Without a device tree, the boot parameters' node tells the four numbers."""
    made = guest(base=0)
    pages = made.finish()
    pages[0x9_0018] = struct.pack("<QIIQQQQ", 0, 10, 32, *made.numbers)
    path = write_raw(tmp_path / "raw", pages, 0, made.size)

    image = Image.load(path)

    assert made.numbers == image.handover.numbers
    assert "setup_data" in image.notes[0]
    assert DATA == the_file(image)


def test_before_the_jump_the_root_tree_is_enough(tmp_path):
    """A running kernel's outgoing tree: sessions can be read, scratch is not known."""
    made = guest()
    path = write_raw(tmp_path / "raw", made.finish(), made.base, made.size)

    image = Image.load(path)

    assert (made.builder.fdt, PAGE, 0, 0) == image.handover.numbers
    assert "scratch unknown" in image.notes[0]
    assert DATA == the_file(image)


@pytest.mark.parametrize("shift", [14, 16])
def test_page_size_is_that_of_the_root_tree(tmp_path, shift):
    """arm64 has pages of 16 and 64 KiB; told, and alone."""
    made = guest(page_shift=shift)
    told = write_raw(tmp_path / "told", with_tree(made), made.base, made.size)
    alone = write_raw(tmp_path / "alone", made.finish(), made.base, made.size)

    for path in (told, alone):
        image = Image.load(path)
        assert 1 << shift == image.page_size
        assert DATA == the_file(image)


def test_stale_copies_do_not_count(tmp_path):
    """Trees of kernels before, whose root tree or map has been overwritten."""
    made, old = guest(), guest()
    old.finish()
    old.builder.fdt = made.base + 40 * MIB
    pages = with_tree(made)
    pages[made.base + 8 * MIB] = old.device_tree()
    root = bytes(made.builder.pages[made.builder.fdt])
    pages[made.base + 9 * MIB] = root  # a copy elsewhere is not preserved there
    path = write_raw(tmp_path / "raw", pages, made.base, made.size)

    for base, others in ((None, 1), (made.base, 2)):  # told where it begins, more is looked at
        image = Image.load(path, base=base)
        assert made.numbers == image.handover.numbers
        assert DATA == the_file(image)
        assert others == len([note for note in image.notes if note.startswith("not taken: ")])


def two_handovers(first: int, second: int) -> tuple[Guest, dict[int, bytes]]:
    """Memory in which two handovers are whole, with these counts of kexec-metadata."""
    older = guest()
    older.kexec_count = first
    pages = with_tree(older)
    newer = Guest()
    newer.builder = Builder(older.builder.spare + PAGE)
    newer.folios = older.folios
    newer.kexec_count = second
    newer.add(b"session", 0x11, DATA[::-1])
    more = newer.finish()
    more[newer.array + PAGE] = more.pop(newer.array)
    newer.array += PAGE
    pages |= more
    pages[older.scratch[2][0] + 3 * MIB] = newer.device_tree()
    return newer, pages


def test_of_two_whole_handovers_the_newer_is_taken(tmp_path):
    """A chain of kernels: kexec-metadata counts."""
    newer, pages = two_handovers(1, 2)
    path = write_raw(tmp_path / "raw", pages, newer.base, newer.size)

    image = Image.load(path)

    assert newer.numbers == image.handover.numbers
    assert DATA[::-1] == the_file(image)
    assert any("an older one" in note for note in image.notes)


def test_two_handovers_of_the_same_count_are_refused(tmp_path):
    """Nobody can say which; both are named, and either can be asked for."""
    newer, pages = two_handovers(1, 1)
    path = write_raw(tmp_path / "raw", pages, newer.base, newer.size)

    with pytest.raises(HandoverError, match="2 handovers were found") as caught:
        Image.load(path)

    given = ",".join(hex(number) for number in newer.numbers)
    assert given in str(caught.value)
    image = Image.load(path, handover=Handover(*newer.numbers))
    assert DATA[::-1] == the_file(image)


def test_handover_that_is_given_is_not_looked_for(tmp_path):
    """Whole or not: what the user says is taken; the first address is found out if need be."""
    made = guest()
    path = write_raw(tmp_path / "raw", made.finish(), made.base, made.size)
    handover = Handover(*made.numbers)

    for base in (made.base, None):
        image = Image.load(path, handover=handover, base=base)
        assert handover == image.handover
        assert DATA == the_file(image)
    wrong = Image.load(path, handover=Handover(0x4100_0000, PAGE, 0, 0), base=made.base)
    assert any(v.part == "root" for v in wrong.verify())


def test_memory_without_a_handover_says_so(tmp_path):
    """No tree at all; random bytes; a device tree without the properties."""
    for name, content in (
        ("zeros", bytes(MIB)),
        ("random", os.urandom(MIB)),
        ("magic", b"\xd0\x0d\xfe\xed\0\0\0\0" * 4096),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(HandoverError, match="no handover was found"):
            Image.load(path)


def test_memory_full_of_magic_numbers_is_refused(tmp_path):
    """The search gives up with a word on what to do."""
    path = tmp_path / "raw"
    path.write_bytes(b"\xd0\x0d\xfe\xed\0\0\0\0" * (MIB // 4))

    with pytest.raises(HandoverError, match="--handover"):
        Image.load(path)


def test_what_is_no_memory_is_refused(tmp_path):
    """A compressed dump, a few bytes, a FIFO, an image with --base."""
    (tmp_path / "kdump").write_bytes(b"KDUMP   " + bytes(8192))
    with pytest.raises(ValueError, match="compressed"):
        Image.load(tmp_path / "kdump")
    (tmp_path / "small").write_bytes(b"\xd0\x0d\xfe\xed")
    with pytest.raises(HandoverError, match="4 bytes"):
        Image.load(tmp_path / "small")
    made = guest()
    path = write_raw(tmp_path / "raw", with_tree(made), made.base, made.size)
    Image.load(path).save(tmp_path / "image")
    with pytest.raises(ValueError, match="--base"):
        Image.load(tmp_path / "image", base=0)
    with pytest.raises(ValueError, match="--base 0x123"):
        Image.load(path, base=0x123)


def test_saved_it_is_an_image_of_what_matters(tmp_path):
    """From memory to an image file: the same handover, sessions and verdict."""
    made = guest()
    path = write_raw(tmp_path / "raw", with_tree(made), made.base, made.size)

    image = Image.load(path)
    nbytes = image.save(tmp_path / "image")
    again = Image.load(tmp_path / "image")

    assert nbytes < made.size / 8
    assert image.handover == again.handover
    assert [] == again.verify()
    assert DATA == the_file(again)


def test_16_gib_open_at_once_and_are_not_copied(tmp_path):
    """A large sparse file: no time, no memory."""
    made = guest(size=16 << 30)
    made.folios = made.base + (15 << 30)
    made.add(b"high", 1, DATA)
    path = write_raw(tmp_path / "raw", with_tree(made), made.base, made.size)
    text = (
        "import resource, sys, time; from luo.image import Image\n"
        "from luo.image.retrieve import sessions\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; at = time.perf_counter()\n"
        f"image = Image.load({str(path)!r}); found = len(sessions(image))\n"
        "print(time.perf_counter() - at, "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, found)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True
    )

    seconds, kib, found = done.stdout.split()
    assert float(seconds) < 5
    assert int(kib) < 100_000
    assert "2" == found


# ---- ELF headers from outside ----


def put(fmt: str, offset: int, *values: int):
    return lambda headers: struct.pack_into(fmt, headers, offset, *values)


HOSTILE = {
    "32 bit": (put("<B", 4, 1), 4, "class"),
    "big-endian": (put("<B", 5, 2), 4, "byte order"),
    "executable": (put("<H", 16, 2), 16, "not a core"),
    "entry size": (put("<H", 54, 32), 54, "program headers of 32 bytes"),
    "no headers": (put("<H", 56, 0), 32, "leave the file"),
    "headers far away": (put("<Q", 32, 1 << 60), 32, "leave the file"),
    "xnum without sections": (put("<H", 56, 0xFFFF), 40, "section header"),
    "address too high": (put("<Q", 64 + 24, (1 << 64) - PAGE), 88, "too high"),
    "more in the file": (put("<Q", 64 + 40, 1), 64, "in the file"),
    "offset far away": (put("<Q", 64 + 8, 1 << 62), 72, "leaves the file"),
    "size far away": (put("<QQ", 64 + 32, 1 << 62, 1 << 62), 72, "leaves the file"),
    "no segment": (put("<I", 64, 4), 64, "no segment"),
    "overlap": (put("<Q", 64 + 56 + 24, 0x4000_1000), 144, "overlaps"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_elf_header_that_is_wrong_is_refused_with_its_offset(tmp_path, case):
    """The rule in words, and where in the file."""
    edit, offset, words = HOSTILE[case]
    made = guest()
    half = made.size // 2
    segments = [(made.base, half, half), (made.base + half, half, half)]
    if case == "no segment":
        segments = segments[:1]
    path = write_elf(tmp_path / "core", {}, segments, edit=edit)

    with pytest.raises(HandoverError, match=words) as caught:
        Image.load(path)

    assert offset == caught.value.phys
    assert "offset in the file" in caught.value.rule


# ---- sessions ----


def load(made: Guest, tmp_path: Path) -> Image:
    return Image.load(write_raw(tmp_path / "raw", with_tree(made), made.base, made.size))


def test_sessions_of_every_shape(tmp_path):
    """Without files, with hundreds over several blocks, large folios, holes, positions beyond."""
    made = Guest(size=128 * MIB)
    made.sessions[b"none"] = []
    for i in range(130):
        made.add(b"many", i, bytes([i]) * i, pos=i * 1000)
    made.add(b"large", 1, DATA * 100, order=5)
    made.add(b"large", (1 << 64) - 1, DATA * 300, order=9)
    hole = made.memfd([(made.folio(b"x" * PAGE), 3, 2), (made.folio(b"y" * PAGE), 1, 0)], 5 * PAGE)
    made.sessions[b"holes"] = [(1, b"memfd-v2", hole), (2, b"memfd-v2", made.memfd([], 0, 9))]
    for i in range(60):
        made.sessions[b"session %d" % i] = []
    made.flbs = [(b"flb-a", 1 << 63, 136), (b"flb-b", 0, 1)]
    image = load(made, tmp_path)
    found = {session.name: session for session in sessions(image)}

    assert [] == image.verify()
    assert 64 == len(found)
    assert () == found["none"].files
    for file in found["many"].files:
        assert bytes([file.token]) * file.token == read_file(image, file)
        assert file.token * 1000 == file.pos
    assert [DATA * 100, DATA * 300] == [read_file(image, f) for f in found["large"].files]
    holes, empty = found["holes"].files
    assert bytes(2 * PAGE) + b"x" * PAGE + bytes(2 * PAGE) == read_file(image, holes)
    assert b"" == read_file(image, empty)
    assert [("flb-a", 1 << 63, 136), ("flb-b", 0, 1)] == [
        (f.name, f.data, f.count) for f in file_bound_data(image)
    ]
    retrieve(image, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["sessions"]
    row = next(s for s in rows if s["name"] == "holes")["files"][0]
    assert [[0, 2 * PAGE], [3 * PAGE, 2 * PAGE]] == row["holes"]
    assert hashlib.sha256(read_file(image, holes)).hexdigest() == row["sha256"]


@pytest.mark.parametrize(
    "name",
    [
        b"..", b".", b"/etc/passwd", b"a/../b", b"manifest.json", b"%2e%2e", b"\xff\xfe", b"-rf",
        b"\x1b[2J", "größe".encode(), b"x" * 63, b".hidden", b" ", b"a\nb", b"~",
    ],
)  # fmt: skip
def test_names_from_outside_are_safe_and_reversible(tmp_path, name):
    """A session's directory is one component below the output, and decodes to the name."""
    made = Guest()
    made.add(name, 7, DATA)
    image = load(made, tmp_path)
    out = tmp_path / "out"

    (result,) = retrieve(image, out)

    (place,) = [p for p in out.iterdir() if p.is_dir()]
    assert out == place.parent
    assert DATA == (out / result.path).read_bytes()
    assert name == name_of(place.name).encode(errors="surrogateescape")
    assert place.name.isascii()
    assert place.name.isprintable()
    assert json.loads((out / "manifest.json").read_text())["sessions"][0]["files"][0]["path"]
    (session,) = sessions(image)
    for text in (session.name, file_name(session.name), f"{file_name(session.name)}/7"):
        assert [7] == [f.token for s in select([session], [text]) for f in s.files]


def test_names_and_tokens_that_stand_twice_are_kept_apart(tmp_path):
    """No kernel writes them; each still gets a place of its own."""
    made = Guest()
    for i in range(3):
        made.add(b"s%d" % i, 5, bytes([i + 1]) * 10)
    made.sessions[b"s1"] += made.sessions.pop(b"s2")
    made.sessions[b"s0\0more"] = []  # the name ends at the NUL
    image = load(made, tmp_path)

    results = retrieve(image, tmp_path / "out")

    assert {"session 's0' stands twice"} <= {v.rule for v in image.verify()}
    assert ["s0/0x5", "s1/0x5", "s1/0x5%001"] == [r.path for r in results]
    assert {"s0", "s0%001", "s1"} == {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()}
    assert "s0" == name_of("s0%001")


def test_what_cannot_be_retrieved_does_not_stop_the_rest(tmp_path):
    """A folio that is not preserved, one of another file, an unknown handler, endless holes."""
    made = Guest()
    made.add(b"s", 1, b"good")
    shared = made.folio(b"shared")
    gone = made.base + 50 * MIB
    made.sessions[b"s"] += [
        (2, b"memfd-v2", made.memfd([(gone, 3, 0)], 10)),
        (3, b"memfd-v2", made.memfd([(shared, 3, 0)], 6)),
        (4, b"memfd-v2", made.memfd([(shared, 3, 0)], 6)),
        (5, b"vfio-v1", 0xFEEDF00D),
        (6, b"memfd-v2", made.memfd([(made.folio(b"end"), 3, 0)], 1 << 62)),
        (7, b"memfd-v2", 0),
        (8, b"memfd-v2", made.memfd([(made.folio(b"a"), 3, 0), (made.folio(b"b"), 3, 0)], 2)),
    ]
    made.add(b"s", 9, b"last")
    image = load(made, tmp_path)

    results = {r.file.token: r for r in retrieve(image, tmp_path / "out")}

    assert [1, 3, 9] == [token for token, r in results.items() if r.path]
    assert f"{gone:#x}: file s/0x2: folio is not preserved" == results[2].error
    assert f"{shared:#x}: file s/0x4: folio is also that of s/0x3" == results[4].error
    assert (None, 0xFEEDF00D) == (results[5].error, results[5].file.data)
    assert "more than a file here can have" in results[6].error
    assert "record is misaligned or not in RAM" in results[7].error
    assert "covers what another does" in results[8].error
    assert b"shared" == (tmp_path / "out" / results[3].path).read_bytes()
    rules = [v.rule for v in image.verify()]
    assert any("folio is also that of s/0x3" in rule for rule in rules)


def test_endless_holes_are_written_sparse_and_not_hashed(tmp_path):
    """A size that no data backs costs neither time nor disk."""
    made = Guest()
    made.sessions[b"s"] = [(1, b"memfd-v2", made.memfd([(made.folio(b"x"), 3, 0)], 8 << 40))]
    image = load(made, tmp_path)

    began = time.perf_counter()
    (result,) = retrieve(image, tmp_path / "out")

    assert time.perf_counter() - began < 5
    if result.path is not None:  # some file systems have smaller files
        assert result.sha256 is None
        assert (tmp_path / "out" / result.path).stat().st_blocks < 1000
    ((file,),) = [s.files for s in sessions(image)]
    with pytest.raises(HandoverError, match="most of them holes"):
        read_file(image, file)


def test_retrieve_into_a_directory_that_is_not_empty_is_refused(tmp_path):
    """Nothing is overwritten."""
    image = load(guest(), tmp_path)

    with pytest.raises(OSError) as caught:
        retrieve(image, tmp_path)

    assert errno.ENOTEMPTY == caught.value.errno


@pytest.mark.parametrize("compatible", [b"luo-v1", b"luo-v2", b"luo-v3", b"luo-v4", b"luo-v9"])
@pytest.mark.parametrize("abi", ["kho-v3", "kho-v4"])
def test_other_formats_of_luo_are_named(tmp_path, abi, compatible):
    """Only luo-v5 is decoded; a kernel with kho-v4 would panic over any other."""
    made = Guest(abi=abi)
    made.luo = compatible
    image = load(made, tmp_path)

    with pytest.raises(HandoverError, match=f"{compatible.decode()}.*only luo-v5 is supported"):
        sessions(image)

    assert abi == image.abi
    older = abi == "kho-v3" and compatible != b"luo-v9"
    assert older == (image.verify() == [])
    assert older == any("luo-v5" in w.rule for w in image.survey.warnings)


def test_luo_v1_was_a_tree_and_none_is_none(tmp_path):
    """Linux 6.19: a device tree; a kernel without LUO: no subtree."""
    made = Guest(abi="kho-v3")
    pages = with_tree(made)
    tree = flatten({"compatible": b"luo-v1\0", "liveupdate-number": bytes(8)}, {})
    pages[made.head][: len(tree)] = tree
    made.builder.finish({"LUO": (made.head, len(tree))})
    path = write_raw(tmp_path / "raw", pages, made.base, made.size)
    with pytest.raises(HandoverError, match=r"luo-v1.*only luo-v5 is supported"):
        sessions(Image.load(path))

    made.builder.finish({})
    path = write_raw(tmp_path / "raw", pages, made.base, made.size)
    with pytest.raises(HandoverError, match="no sessions"):
        sessions(Image.load(path))


def test_devices_of_this_library_are_files_too(tmp_path):
    """Of a kernel that kept its devices in sessions: each record, with the slots."""
    from luo.device_files import RECORD
    from luo.image.formats import STRUCTS

    host = tmp_path / "host.toml"
    host.write_text('memory = "1GiB"\n[devices]\nsource = "synthetic"\ncount = 10\n')
    arguments = ["run", "--host", str(host), "--in-process", "--api", "sessions", "--save"]
    done = CliRunner().invoke(main, [*arguments, str(tmp_path / "image")])
    assert 0 == done.exit_code, done.output
    image = Image.load(tmp_path / "image")

    files = [file for session in sessions(image) for file in session.files if file.device]

    assert RECORD.size == STRUCTS["device"][0].size
    assert len(files) == len({file.device["path"] for file in files}) >= 5
    for file in files:
        contents = read_file(image, file)
        path, bus, index, slot, _ = RECORD.unpack_from(contents)
        assert file.device["path"].encode() == contents[24 : 24 + path]
        assert file.device["bus"].encode() == contents[24 + path : 24 + path + bus]
        assert (index, slot) == (file.device["index"], file.device["slot_bytes"])
        assert file.size == len(contents)
    results = retrieve(image, tmp_path / "out")
    assert {f.name for f in files} == {r.file.name for r in results if r.path}
    assert all(r.error is None for r in results)


def test_pages_of_a_directory_are_searched_without_a_device_tree_beside_them(tmp_path):
    """Neither kexec.dtb nor manifest.json: the pages themselves, or the user, tell."""
    made = guest()
    made.ranges += [(made.base + (i + 1) * (1 << 30), MIB) for i in range(80)]
    pages = with_tree(made)
    tree = made.device_tree()  # over two pages
    assert len(tree) > PAGE
    at = made.scratch[2][0] + 2 * MIB
    pages |= {at: tree[:PAGE], at + PAGE: tree[PAGE:]}
    place = tmp_path / "dump"
    place.mkdir()
    listed = sorted(pages, reverse=True)
    (place / "pages.json").write_text(json.dumps({"pages": [hex(at) for at in listed]}))
    (place / "pages.bin").write_bytes(
        b"".join(bytes(pages[at]).ljust(PAGE, b"\0") for at in listed)
    )

    for handover in (None, Handover(*made.numbers)):
        image = Image.load(place, handover=handover)
        assert made.numbers == image.handover.numbers
        assert DATA == the_file(image)
    with pytest.raises(ValueError, match="--base"):
        Image.load(place, base=0)


def test_records_that_are_missing_are_a_failure(tmp_path):
    """A second block of sessions that the dump has not: what there is, and exit status 1."""
    made = Guest()
    for i in range(60):
        made.add(b"s%d" % i, 1, b"x")
    image = load(made, tmp_path)
    blocks = next(s for s in image.survey.subtrees if s.name == "LUO").decoded["blocks"]
    lost = blocks[1]["phys"]
    parts = [p for span in ((0, lost), (lost + PAGE, 1 << 62)) for p in image.pieces(*span)]
    Image(image.ram.ranges, image.handover, parts).save(tmp_path / "image")

    done = CliRunner().invoke(
        main, ["image", "retrieve", str(tmp_path / "image"), "-o", str(tmp_path / "out")]
    )

    assert 1 == done.exit_code
    assert f"luo: {lost:#x}: block of sessions: page was not kept" in done.output
    assert 51 == len(list((tmp_path / "out").glob("s*/0x1")))
