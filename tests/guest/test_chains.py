"""Chains of kernels: real ones and ours hand on to each other, in either direction."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import by_luo
import plain
import pytest
from machine import Build, Run, boot, next_kernel, start
from shapes import FLBS, PAGE, File, Shape, one, problems, script, stage_problems, word

from luo import Kernel
from luo.image import Image
from luo.image.edit import NewFile, edit
from luo.image.retrieve import read_file, sessions
from luo.machine import Machine

Sessions = dict[bytes, tuple[File, ...]]

FIRST: Sessions = {
    b"alpha": (
        File(0x11, 4096),
        File(0x12, 20480, pos=123),
        File(0x13, (2 << 20) + 5, order=9),
        File(0x14, 0),
    ),
    b"beta": (
        File(0x11, 4095, pos=7, seals=0x6),
        File(0xFFFFFFFF00000001, 12293, seals=0x8),
        File(0x22, 64 * PAGE, order=4),
    ),
    b"empty": (),
}
TO_STUB = "kexec-load /stub initrd=none\nkexec\n"


def creating(wanted: Sessions) -> str:
    """Lines that have a guest create and preserve it all."""
    lines = ["open"]
    for name, files in wanted.items():
        lines.append(f"create {word(name)}")
        lines += [
            f"file {word(name)} {f.token:#x} {f.size} pos={f.pos} seals={f.seals:#x}"
            f" order={f.order}"
            for f in files
        ]
    return "\n".join(lines) + "\n"


def went_well(run: Run, wanted: Sessions | None = None, stages: int = 1) -> list[str]:
    """What went wrong in any kernel of a run, the last of which was to retrieve *wanted*."""
    wrong = [] if run.outcome == "done" else [run.outcome]
    if len(run.stages) != stages:
        wrong.append(f"{len(run.stages)} kernels, not {stages}")
    for stage in run.stages:
        wrong += [f"line {r.line} {r.command}: {r.text}" for r in stage.errors]
        wrong += stage.warnings
    if wanted is not None:
        wrong += stage_problems(wanted, run.stages[-1])
    return wrong + (run.console[-60:] if wrong else [])


def crossed(build: Build, text: str, **options: object) -> Image:
    """What a real kernel hands over when its script has run."""
    with start(build, text + TO_STUB, **options) as guest:  # type: ignore[arg-type]
        guest.wait_for_stub()
        image = guest.handover()
        wrong = went_well(guest.run(), stages=1)
    assert wrong == []
    return image


@contextlib.contextmanager
def ours(image: Image, max_order: int = 0) -> Iterator[Kernel]:
    """Our kernel, booted with a handover."""
    kernel = Kernel(
        Machine(image.memory()),
        arch="arm64",
        kho_abi="kho-v4",
        release="luo",
        cmdline="kho=on liveupdate=on",
        file_handlers=[by_luo.handler_of(max_order, flbs=True)],
    )
    kernel.boot(image.handover)
    try:
        yield kernel
    finally:
        kernel.shutdown()


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.fixture(scope="module")
def theirs(build: Build) -> Image:
    """What a real kernel handed over: FIRST."""
    return crossed(build, creating(FIRST))


# ---- we resume from a real kernel ----


def test_our_kernel_resumes_from_a_real_one(theirs: Image) -> None:
    """Sessions, files, positions and FLBs that Linux preserved come up in our kernel."""
    with ours(theirs) as kernel, kernel.liveupdate.open() as node:
        got = {}
        for name, files in FIRST.items():
            session = node.retrieve_session(name)
            for file in files:
                fd = session.retrieve(file.token)
                got[name, file.token] = content(fd), os.lseek(fd, 0, os.SEEK_CUR)
                os.close(fd)
            session.finish()
            session.close()

    want = {(n, f.token): (f.content, f.pos) for n, files in FIRST.items() for f in files}
    assert got == want


def test_what_a_real_kernel_handed_over_breaks_no_rule(theirs: Image) -> None:
    """Our survey of what Linux wrote finds nothing wrong, and the FLBs of its test."""
    found = {
        flb["name"]: flb["data"]
        for subtree in theirs.survey.subtrees
        if subtree.name == "LUO" and subtree.decoded is not None
        for flb in subtree.decoded["flbs"]["flbs"]
    }

    assert theirs.verify() == []
    assert found == dict(FLBS)


@pytest.mark.parametrize("form", ["raw", "elf"])
def test_memory_of_a_guest_is_an_image(build: Build, tmp_path: Path, form: str) -> None:
    """From a dump by QEMU's monitor, every file comes out byte for byte."""
    dump = tmp_path / form
    with start(build, creating(FIRST) + TO_STUB) as guest:
        guest.wait_for_stub()
        (guest.dump_raw if form == "raw" else guest.dump_elf)(dump)
        handover = guest.handover().handover
    image = Image.load(dump)
    got = {
        (session.name, file.token): read_file(image, file)
        for session in sessions(image)
        for file in session.files
    }

    assert image.handover == handover
    assert got == {(n.decode(), f.token): f.content for n, files in FIRST.items() for f in files}


@pytest.mark.parametrize("order", [2, 3, 5, 8, 9])
def test_folios_of_a_real_kernel_of_each_order(build: Build, order: int) -> None:
    """Linux's own large folios are read by us and taken back by it."""
    wanted = {b"large": (File(3, 5 * (PAGE << order) + 99, pos=1, order=order),)}
    image = crossed(build, creating(wanted))
    run = boot(build, script(wanted) + "poweroff", image=image)

    (file,) = wanted[b"large"]
    assert [read_file(image, f) for s in sessions(image) for f in s.files] == [file.content]
    assert list(image.survey.orders).count(order) == 5
    assert went_well(run, wanted) == []


def test_write_after_preserve_crosses(build: Build) -> None:
    """What is written in place between PRESERVE and the jump is what we retrieve."""
    image = crossed(build, "open\ncreate a\nfile a 1 9000\nwrite a 1 4090 68616c6c6f2077656c74\n")
    (file,) = (f for s in sessions(image) for f in s.files)

    assert read_file(image, file)[4090:4100] == b"hallo welt"


# ---- three kernels and more ----


def test_ours_then_real_then_real(build: Build) -> None:
    """What a real kernel got from us it hands on to the next one, under other names."""
    shape = Shape("chain", FIRST)
    again = [
        "create onward",
        *(
            f"again onward {100 + i} {word(name)} {file.token:#x}"
            for i, (name, file) in enumerate((n, f) for n, files in FIRST.items() for f in files)
        ),
        "file onward 0x55 5000 pos=77",
    ]
    first = script(FIRST) + "\n".join(again) + "\n" + next_kernel(2)
    tokens = [100 + i for i in range(sum(map(len, FIRST.values())))]
    second = "open\nretrieve-session onward\n"
    second += "".join(f"retrieve onward {token}\n" for token in [*tokens, 0x55])
    second += "finish onward\npoweroff"
    with by_luo.kernel_of(shape) as kernel:
        run = boot(build, [first, second], image=kernel)
    want = [f.expected["sha256"] for files in FIRST.values() for f in files]
    want.append(File(0x55, 5000).expected["sha256"])

    assert went_well(run, stages=2) == []
    assert stage_problems(FIRST, run.stages[0]) == []
    assert [r.values["sha256"] for r in run.stages[1].of("retrieve")] == want
    assert run.stages[1].of("retrieve")[-1].values["pos"] == "77"
    assert "liveupdate number: 2" in "\n".join(run.stages[1].console)


def test_real_then_ours_then_real(build: Build, theirs: Image) -> None:
    """Our kernel retrieves what Linux preserved and preserves it again, with a file of its own."""
    more = File(0x77, 300_001, pos=9, seals=0x2)
    after: Sessions = {b"alpha": (*FIRST[b"alpha"], more), b"gamma": (File(1, 5),)}
    with ours(theirs, max_order=9) as kernel:
        live = kernel.liveupdate
        with live.open() as node:
            old = node.retrieve_session("alpha")
            held = {file.token: old.retrieve(file.token) for file in FIRST[b"alpha"]}
            old.finish()
            old.close()
            for name in after:
                node.create_session(name)
        outgoing = {session.name: session for session in live.outgoing}
        for token, fd in held.items():
            outgoing["alpha"].preserve(fd, token)
            os.close(fd)
        for name, file in ((b"alpha", more), (b"gamma", after[b"gamma"][0])):
            fd = by_luo.memfd(file)
            outgoing[name.decode()].preserve(fd, file.token)
            os.close(fd)
        run = boot(build, script(after) + "poweroff", image=kernel)

    assert went_well(run, after) == []
    assert "liveupdate number: 2" in "\n".join(run.console)


def test_edited_handover_of_a_real_kernel_is_retrieved(build: Build, theirs: Image) -> None:
    """A file added, a session dropped, another renamed, all pages moved: Linux takes it."""
    added = File(0x99, 70_001, pos=4, seals=0x4, order=2)
    image = edit(
        theirs,
        drop=["empty"],
        rename={"beta": "delta"},
        add=[
            NewFile("alpha", added.token, added.content, pos=added.pos, seals=added.seals, order=2)
        ],
        move=True,
    )
    after: Sessions = {b"alpha": (*FIRST[b"alpha"], added), b"delta": FIRST[b"beta"]}
    run = boot(
        build, script(after) + "retrieve-session beta\nretrieve-session empty\n", image=image
    )
    wrong = [r.error for r in run.stages[-1].errors]

    assert wrong == ["ENOENT", "ENOENT"]
    assert [w for w in stage_problems(after, run.stages[-1]) if "retrieve-session" not in w] == []
    assert run.stages[-1].warnings == []


def test_three_real_kernels_and_ours_between(build: Build) -> None:
    """Real, real, ours, real: the number of the live update goes up with each."""
    wanted: Sessions = {b"keep": (File(1, 100_000, pos=3),)}
    first = creating(wanted) + next_kernel(2)
    second = script(wanted) + "create keep\nagain keep 1 keep 1\n" + TO_STUB
    with start(build, [first, second]) as guest:
        guest.wait_for_stub()
        image = guest.handover()
        both = guest.run()
    with ours(image) as kernel, kernel.liveupdate.open() as node:
        session = node.retrieve_session("keep")
        fd = session.retrieve(1)
        got = content(fd)
        session.finish()
        session.close()
        node.create_session("keep").preserve(fd, 1)
        os.close(fd)
        last = boot(build, script(wanted) + "poweroff", image=kernel)

    assert went_well(both, stages=2) == []
    assert got == wanted[b"keep"][0].content
    assert went_well(last, wanted) == []
    assert "liveupdate number: 3" in "\n".join(last.console)


# ---- what a kernel checks itself ----


def test_golden_dump_boots(build: Build) -> None:
    """The golden handover, of another build of Linux 7.3, with its kernel test."""
    golden = Path(os.environ.get("LUO_SHARED", "../shared")) / "golden/kho_v4_arm64"
    if not golden.exists():
        pytest.skip(f"no {golden}")
    text = "open\nretrieve-session golden-alpha\nretrieve golden-alpha 0x12\npoweroff"
    run = boot(build, text, image=Image.load(golden))
    (answer,) = run.stages[0].of("retrieve")

    assert went_well(run) == []
    assert "test_kho: KHO restore succeeded" in "\n".join(run.console)
    assert (answer.values["crc32"], answer.values["pos"]) == ("3bbcd490", "123")


def test_flipped_byte_is_seen(build: Build) -> None:
    """One wrong byte of a file is one wrong checksum: what compares here can tell."""
    shape = one("flipped", File(1, 9000), File(2, 9000))
    image = plain.write(shape)
    at = next(extent for extent in image.extents if extent.phys == shape.data)
    assert isinstance(at.data, bytes)
    broken = bytearray(at.data)
    broken[77] ^= 1
    image.extents[image.extents.index(at)] = type(at)(at.phys, at.nbytes, bytes(broken))
    run = boot(build, script(shape.sessions) + "poweroff", image=image)
    wrong = [line for line in problems(shape, run) if line.startswith("b'only'")]

    assert [line.split(": ")[1].split(" is")[0] for line in wrong] == ["crc32", "sha256"]
    assert all("0x1:" in line for line in wrong)
