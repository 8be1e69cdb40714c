"""Kernel to us and back: what a real kernel preserved, read, changed, and retrieved by it again.

The guest makes its sessions as its script says, and says what is in each file; it kexecs into the
stub, where memory stands still as it crossed. That memory is read in both forms QEMU has.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from pathlib import Path

import machine
import pytest
from machine import Build

from luo.image import Image
from luo.image.edit import NewFile, edit
from luo.image.retrieve import file_bound_data, read_file, retrieve, sessions

SCRIPT = """\
open
create a
file a 0x11 20480 pos=123 seals=0x6
file a 0x12 1 pos=77
file a 0xffffffffffffffff 3145729 order=9
file a 0x14 0
create b%20c
file b%20c 0x11 262144 at=0,9,31,63 pos=4096
file b%20c 0x15 409600 fill=zero
create empty
create many
""" + "".join(f"file many {i} {i * 100}\n" for i in range(1, 131))
STUB = "kexec-load /stub initrd=none\nkexec"
NAMES = {"b%20c": "b c"}


def pattern(token: int, size: int) -> bytes:
    """What the guest writes into a file."""
    words = -(-size // 8)
    return b"".join(struct.pack("<Q", (token << 32 | i) & (1 << 64) - 1) for i in range(words))[
        :size
    ]


def told() -> dict[tuple[str, int], tuple[int, int, bytes]]:
    """(position, seals, contents) of each file, from the script alone."""
    files = {}
    for line in SCRIPT.splitlines():
        command, *words = line.split()
        if command != "file":
            continue
        options = dict(word.split("=") for word in words[3:])
        token, size = int(words[1], 0), int(words[2])
        data = pattern(token, size)
        if options.get("fill") == "zero":
            data = bytes(size)
        if "at" in options:
            sparse = bytearray(size)
            for page in options["at"].split(","):
                part = slice(int(page) * 4096, int(page) * 4096 + 4096)
                sparse[part] = data[part]
            data = bytes(sparse)
        key = (NAMES.get(words[0], words[0]), token)
        files[key] = (int(options.get("pos", "0"), 0), int(options.get("seals", "0"), 0), data)
    return files


def found(image: Image) -> dict[tuple[str, int], tuple[int | None, int | None, bytes]]:
    return {
        (s.name, f.token): (f.pos, f.seals, read_file(image, f))
        for s in sessions(image)
        for f in s.files
    }


def script_for(image: Image) -> str:
    """What retrieves all of an image's sessions."""
    lines = ["open"]
    for session in sessions(image):
        name = session.name.replace("%", "%25").replace(" ", "%20")
        lines.append(f"retrieve-session {name}")
        lines += [f"retrieve {name} {file.token:#x}" for file in session.files]
        lines.append(f"finish {name}")
    return "\n".join([*lines, "poweroff"])


def check_retrieved(build: Build, image: Image, wanted) -> None:
    """A real kernel takes *image* and gives back what is *wanted*, without a complaint."""
    run = machine.boot(build, script_for(image), image=image)

    assert run.outcome == "done", run.console[-30:]
    (stage,) = run.stages
    assert [] == stage.errors
    assert [] == stage.warnings
    answers = stage.of("retrieve")
    assert len(wanted) == len(answers)
    for (pos, seals, data), answer in zip(wanted.values(), answers, strict=True):
        values = answer.values
        assert (len(data), pos) == (int(values["size"], 0), int(values["pos"], 0)), answer
        assert seals == int(values["seals"], 0), answer
        assert hashlib.sha256(data).hexdigest() == values["sha256"], answer
        assert zlib.crc32(data) == int(values["crc32"], 16), answer


@pytest.fixture(scope="module")
def crossed(build: Build, tmp_path_factory) -> dict[str, Path]:
    """Memory as it crossed, as both files that QEMU writes."""
    place = tmp_path_factory.mktemp("crossed")
    paths = {"raw": place / "memory.raw", "elf": place / "memory.elf"}
    with machine.start(build, SCRIPT + STUB) as guest:
        guest.wait_for_stub()
        assert [] == [e for stage in guest.run().stages for e in stage.errors]
        guest.dump_raw(paths["raw"])
        guest.dump_elf(paths["elf"])
    return paths


@pytest.fixture(scope="module")
def image(crossed) -> Image:
    return Image.load(crossed["elf"])


@pytest.mark.parametrize("form", ["raw", "elf"])
def test_memory_of_a_real_kernel_is_read(crossed, form, tmp_path) -> None:
    """The handover is found, breaks no rule, and holds what the guest was told to preserve."""
    image, wanted = Image.load(crossed[form]), told()

    assert [] == image.verify()
    assert [] == image.survey.warnings
    assert wanted == found(image)
    assert ["a", "b c", "empty", "many"] == [s.name for s in sessions(image)]
    assert [(f"liveupdate-test-flb-v{n}", 0xFEEDF00DCAFEBEE0 + n, 136) for n in range(3)] == [
        (flb.name, flb.data, flb.count) for flb in file_bound_data(image)
    ]
    results = retrieve(image, tmp_path / "out")
    for result in results:
        _, _, data = wanted[result.file.session, result.file.token]
        assert result.path is not None
        assert data == (tmp_path / "out" / result.path).read_bytes()


def test_both_forms_are_the_same_image(crossed) -> None:
    """Raw or ELF: the same pages with the same bytes."""
    raw, elf = (Image.load(path) for path in crossed.values())

    assert raw.handover == elf.handover
    assert sorted(raw.survey.iter_blocks()) == sorted(elf.survey.iter_blocks())
    assert all(elf.read(p.phys, p.nbytes) == bytes(p.data or b"") for p in raw.extents)


def test_image_goes_back_as_it_is(build, image, tmp_path) -> None:
    """Saved, loaded, booted: the kernel retrieves what it had preserved."""
    image.save(tmp_path / "image")

    check_retrieved(build, Image.load(tmp_path / "image"), told())


CHANGES = {
    "nothing": {},
    "moved": {"move": True},
    "dropped": {"drop": ["many", "a/0x12", "b c/0x11"]},
    "renamed": {"rename": {"empty": "x" * 63, "a": "A"}},
    "added": {
        "add": [
            NewFile("empty", 5, b"from outside" * 1000, pos=9, seals=0x0F),
            NewFile("new", (1 << 64) - 2, pattern(3, 5 << 20), order=9),
            NewFile("new", 1, b""),
        ]
    },
    "all": {
        "drop": ["a/0x11", "many"],
        "rename": {"a": "first"},
        "add": [NewFile("first", 1, b"x" * 4097, pos=4097), NewFile("z", 2, pattern(2, 9 << 12))],
        "move": True,
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_image_is_retrieved_by_the_kernel(build, image, name, tmp_path) -> None:
    """Sessions dropped, renamed, files added, pages moved: it gives back the new state."""
    change = CHANGES[name]
    result = edit(image, **change)
    result.save(tmp_path / "image")
    again = Image.load(tmp_path / "image")

    wanted = told()
    whole = [text for text in change.get("drop", ()) if "/" not in text]
    parts = [text.split("/") for text in change.get("drop", ()) if "/" in text]
    for session, token in list(wanted):
        if session in whole or [session, hex(token)] in parts:
            del wanted[session, token]
    names = change.get("rename", {})
    wanted = {(names.get(s, s), token): value for (s, token), value in wanted.items()}
    for new in change.get("add", ()):
        wanted[new.session, new.token] = (new.pos, new.seals, new.contents)
    order = [(s.name, f.token) for s in sessions(again) for f in s.files]
    assert [] == again.verify()
    assert set(order) == set(wanted)
    check_retrieved(build, again, {key: wanted[key] for key in order})


def test_there_and_back_twice(build, image, tmp_path) -> None:
    """Our image retrieved by a kernel that preserves anew, read again, and so on."""
    changed = edit(image, drop=["many", "b c"], add=[NewFile("us", 1, b"ours" * 5000)], move=True)
    script = "open\ncreate again\nfile again 0x21 100000 pos=1\n" + STUB
    with machine.start(build, script, image=changed) as guest:
        guest.wait_for_stub()
        guest.dump_raw(tmp_path / "memory")
    image = Image.load(tmp_path / "memory")

    assert [] == image.verify()
    assert {("again", 0x21): (1, 0, pattern(0x21, 100_000))} == found(image)
    assert 2 == next(
        s.decoded["kexec_count"] for s in image.survey.subtrees if s.name == "kexec-metadata"
    )
    more = edit(image, add=[NewFile("again", 1, b"more")])
    check_retrieved(build, more, found(more))


def test_memory_before_the_jump_shows_the_outgoing_tree(build, tmp_path) -> None:
    """A running kernel: no scratch known, and no sessions before they are frozen."""
    script = "open\ncreate a\nfile a 1 4096\n" + "sleep 100\necho here\n" * 100
    with machine.start(build, script) as guest:
        assert guest.wait(re.compile(r"@ 5 echo ")) is not None, guest.lines[-20:]
        guest.dump_elf(tmp_path / "running")
    image = Image.load(tmp_path / "running")

    assert [] == sessions(image)
    assert "scratch unknown" in image.notes[0]
    assert (0, 0) == (image.handover.scratch_phys, image.handover.scratch_len)
    assert "kho-v4" == image.abi


def test_after_a_chain_of_kernels_the_last_handover_is_found(build, tmp_path) -> None:
    """Device trees and root trees of the kernels before are still in memory, and do not count."""
    first = "open\ncreate a\nfile a 1 4096\n" + machine.next_kernel(2)
    second = "open\nretrieve-session a\nretrieve a 1\ncreate c\nfile c 7 5000\n" + STUB
    with machine.start(build, [first, second]) as guest:
        guest.wait_for_stub()
        guest.dump_raw(tmp_path / "raw")
        guest.dump_elf(tmp_path / "elf")

    for name in ("raw", "elf"):
        image = Image.load(tmp_path / name)
        assert [] == image.verify()
        assert {("c", 7): (0, 0, pattern(7, 5000))} == found(image)
        assert any(note.startswith("not taken") for note in image.notes)
