"""Handovers by their shape: which sessions and files, how they lie in memory, what must come back.

A shape says nothing of who writes it: ``plain.py`` does from the specification, ``by_luo.py`` with
luo. :func:`script` has a guest retrieve everything, and :func:`problems` compares what it said.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from machine import Run, Stage

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30
RAM = 0x40000000
FLB_MAGIC = 0xFEEDF00DCAFEBEE0
FLBS = tuple((f"liveupdate-test-flb-v{n}", FLB_MAGIC + n) for n in range(3))
F_SEAL_EXEC = 0x20
EXEC_SEALS = 0x3E  # what F_SEAL_EXEC brings with it for a file that may be executed


@dataclass(frozen=True)
class File:
    """A memfd.

    Attributes:
        token: of the file in its session; its contents follow from it.
        size: bytes.
        pos, seals: position and seals.
        order: of its folios; the last ones may go past the end, or be smaller.
        holes: pages that were never written.
        records: so many folio records at least, those behind the last folio empty.
        nothing: every page is a hole, and there are no records.
        large: too large for the guest to take a SHA-256 of it, which is slow there.
    """

    token: int
    size: int
    pos: int = 0
    seals: int = 0
    order: int = 0
    holes: frozenset[int] = frozenset()
    records: int = 0
    nothing: bool = False
    large: bool = False

    @property
    def nr_pages(self) -> int:
        """Pages of it."""
        return -(-self.size // PAGE)

    @cached_property
    def content(self) -> bytes:
        """Its bytes: the guest's pattern, zeros where nothing was written."""
        if self.nothing:
            return bytes(self.size)
        words = np.arange(-(-self.size // 8), dtype=np.uint64)
        words |= np.uint64((self.token << 32) & 0xFFFFFFFFFFFFFFFF)
        data = bytearray(words.tobytes()[: self.size])
        for page in self.holes:
            part = data[page * PAGE : (page + 1) * PAGE]
            data[page * PAGE : page * PAGE + len(part)] = bytes(len(part))
        return bytes(data)

    @cached_property
    def expected(self) -> dict[str, str]:
        """What the guest must say of it."""
        seals = self.seals | EXEC_SEALS if self.seals & F_SEAL_EXEC else self.seals
        return {
            "token": f"{self.token:#x}" if self.token else "0",
            "size": str(self.size),
            "pos": str(self.pos),
            "seals": f"{seals:#x}" if seals else "0",
            "crc32": f"{zlib.crc32(self.content):08x}",
            "sha256": "" if self.large else hashlib.sha256(self.content).hexdigest(),
        }


@dataclass(frozen=True)
class Shape:
    """A handover.

    Attributes:
        name: of the shape.
        sessions: files by the session's name; names are bytes of UTF-8 or not.
        ranges: RAM.
        scratch: areas; None: what the writer likes.
        array: where the scratch array lies; None: what the writer likes.
        flbs: whether FLBs came along.
        number: of the live update.
        data: where the plain writer puts file contents; structures: where everything else.
        metadata: whether the plain writer writes kexec-metadata.
        only: ``"plain"`` or ``"engine"`` for a shape that only that one writes.
    """

    name: str
    sessions: dict[bytes, tuple[File, ...]]
    ranges: tuple[tuple[int, int, int], ...] = ((RAM, 512 * MIB, 0),)
    scratch: tuple[tuple[int, int], ...] | None = None
    array: int | None = None
    flbs: bool = True
    number: int = 1
    data: int = 0x5A000000
    structures: int = 0x58000000
    metadata: bool = True
    only: str = ""

    @property
    def nr_files(self) -> int:
        """Files in all sessions."""
        return sum(len(files) for files in self.sessions.values())


def one(name: str, *files: File, **how: object) -> Shape:
    """A shape of a single session."""
    return Shape(name, {b"only": tuple(files)}, **how)  # type: ignore[arg-type]


def word(name: bytes) -> str:
    """A session's name as a word of a guest's script."""
    return "".join(chr(c) if chr(c).isalnum() and c < 128 else f"%{c:02x}" for c in name)


def script(sessions: dict[bytes, tuple[File, ...]]) -> str:
    """Lines that retrieve everything, the files of a session backwards, and finish it."""
    lines = ["open"]
    for name, files in sessions.items():
        lines.append(f"retrieve-session {word(name)}")
        lines += [
            f"retrieve {word(name)} {file.token:#x}{' crc' * file.large}"
            for file in reversed(files)
        ]
        lines.append(f"finish {word(name)}")
    return "\n".join(lines) + "\n"


def stage_problems(sessions: dict[bytes, tuple[File, ...]], stage: Stage) -> list[str]:
    """What a kernel did not get back as it should."""
    wrong = [f"line {r.line} {r.command}: {r.text}" for r in stage.errors]
    answers = iter(stage.of("retrieve"))
    for name, files in sessions.items():
        for file in reversed(files):
            answer = next(answers, None)
            if answer is None:
                wrong.append(f"{name!r} {file.token:#x}: no answer")
                continue
            said = answer.values
            wrong += [
                f"{name!r} {file.token:#x}: {key} is {said.get(key)}, not {value}"
                for key, value in file.expected.items()
                if said.get(key) != value
            ]
    if not stage.finished:
        wrong.append("its script did not come to the end")
    return wrong


def problems(shape: Shape, run: Run) -> list[str]:
    """What a guest did not get back as it should; the last lines of its console if anything."""
    wrong = [] if run.outcome == "done" else [run.outcome]
    stage = run.stages[-1]
    wrong += stage_problems(shape.sessions, stage)
    text = "\n".join(stage.console)
    if "KHO: found kexec handover data" not in text:
        wrong.append("it found no handover")
    if f"liveupdate number: {shape.number}" not in text:
        wrong.append("it found no live update of that number")
    if shape.flbs and shape.nr_files:
        for name, _ in FLBS:
            if f"{name}: found flb data from the previous boot" not in text:
                wrong.append(f"FLB {name} was not retrieved")
            if f"{name}: finish was triggered" not in text:
                wrong.append(f"FLB {name} was not finished")
    warned = stage.warnings
    if not shape.flbs:  # known: 7.3 counts down what nobody counted up
        warned = [line for line in warned if "refcount" not in line]
    wrong += warned
    return wrong + (run.console[-60:] if wrong else [])


# ---- the shapes ----


def _orders() -> list[Shape]:
    shapes = []
    for order in range(11):
        size = PAGE << order
        files = (
            File(1, 3 * size, order=order),
            File(2, size + 1, pos=5, order=order),
            File(3, max(size // 2, 1), order=order),
        )
        shapes.append(one(f"order-{order}", *files))
    mixed = tuple(File(10 + order, (PAGE << order) + 77, order=order) for order in range(8))
    return [*shapes, one("orders-mixed", *mixed, only="plain")]


def _sizes() -> list[Shape]:
    sizes = (1, 7, 4095, 4096, 4097, 8191, 8192, 12289, 65536, 1_000_003)
    holes = frozenset({0, 3, 4, 5, 9, 31, 62})
    return [
        one("sizes", *(File(0x100 + i, size) for i, size in enumerate(sizes))),
        one("empty-file", File(0, 0), File(0xFFFFFFFFFFFFFFFF, 0, pos=9)),
        one(
            "holes", File(5, 64 * PAGE, holes=holes), File(6, 10 * PAGE + 1, holes=frozenset({10}))
        ),
        one("nothing-but-holes", File(5, 3 * MIB, nothing=True)),
        one(
            "holes-in-large-folios",
            File(5, 64 * PAGE, order=3, holes=frozenset(range(8, 24)) | frozenset(range(56, 64))),
            only="plain",
        ),
        one("16-mib", File(5, 16 * MIB + 5, pos=16 * MIB)),
        one("tokens", *(File(t, 5000) for t in (0, 1, 1 << 31, 1 << 63, (1 << 64) - 1))),
    ]


def _attributes() -> list[Shape]:
    seals = (0x1, 0x2, 0x4, 0x8, 0x10, 0x6, 0xE, 0xF, 0x1F)
    positions = (0, 1, 4095, 20480, 20481, 1 << 20, (1 << 40) + 3, (1 << 63) - 1)
    return [
        one("seals", *(File(0x20 + i, 9000, seals=bits) for i, bits in enumerate(seals))),
        one("seal-exec", File(1, 9000, seals=0x20), File(2, 9000, seals=0x3F)),
        one("positions", *(File(0x30 + i, 20480, pos=pos) for i, pos in enumerate(positions))),
        one("without-flbs", File(1, 9000), File(2, 0), flbs=False),
        one("number-41", File(1, 9000), number=41, only="plain"),
        one("without-metadata", File(1, 9000), metadata=False, only="plain"),
    ]


def _counts() -> list[Shape]:
    def many(sessions: int, files: int) -> dict[bytes, tuple[File, ...]]:
        share = [files // sessions + (i < files % sessions) for i in range(sessions)]
        return {
            b"session-%d" % i: tuple(File(i << 8 | k, 100 + 37 * k) for k in range(n))
            for i, n in enumerate(share)
        }

    names = (b"a", b"x" * 63, "Größe".encode(), b"\xff\xfe", b"with space", b"%", b"\x01")
    return [
        Shape("no-session", {}),
        Shape("empty-sessions", {b"one": (), b"two": (), b"three": ()}),
        Shape("names", {name: (File(1, 4097),) for name in names}),
        Shape("60-sessions-200-files", many(60, 200)),
        *(Shape(f"{n}-sessions", many(n, n // 10)) for n in (51, 52, 102, 103)),
        *(Shape(f"{n}-files", many(1, n)) for n in (63, 64, 126, 127)),
    ]


def _arrays() -> list[Shape]:
    per_page = PAGE // 16

    def listed(pages: int) -> Shape:
        """An array of so many pages, most of whose records are empty."""
        files = (File(1, 5 * PAGE, records=pages * per_page), File(2, 77))
        return one(f"array-of-{pages}-pages", *files, only="plain")

    return [
        *(listed(pages) for pages in (510, 511, 512, 1021, 1022, 1023)),
        one("130816-folios", File(1, 511 * 256 * PAGE - 1, pos=1, large=True), File(2, 77),
            ranges=((RAM, GIB, 0),), only="engine"),
        one("1023-folios", File(1, 1023 * PAGE, pos=3), File(2, 77)),
    ]  # fmt: skip


def _places() -> list[Shape]:
    files = (File(1, 40 * PAGE + 3, order=2), File(2, 9000, pos=4))
    low, two = 0x50000000, 2 * MIB
    beside = {"only": "plain"}
    return [
        one("ram-256-mib", *files, ranges=((RAM, 256 * MIB, 0),), data=0x4C200000,
            structures=0x4C000000, scratch=((0x44000000, 32 * MIB),)),
        one("ram-1-gib", *files, ranges=((RAM, GIB, 0),)),
        one("ram-5-gib", *files, ranges=((RAM, 5 * GIB, 0),)),
        one("above-4-gib", *files, ranges=((RAM, 5 * GIB, 0),), data=0x150200000,
            structures=0x150000000, scratch=((low, 256 * MIB),), **beside),
        one("ram-with-a-hole", *files, **beside, data=0x100200000, structures=0x100000000,
            ranges=((RAM, 512 * MIB, 0), (0x100000000, GIB, 0)), scratch=((low, 64 * MIB),)),
        one("two-nodes", *files, ranges=((RAM, 512 * MIB, 0), (0x60000000, 512 * MIB, 1))),
        one("scratch-12-mib", *files, scratch=((low, 12 * MIB),), **beside),
        one("scratch-in-pieces", *files, **beside,
            scratch=((0x44000000, 16 * MIB), (low, 32 * MIB), (0x5E000000, 16 * MIB))),
        one("scratch-of-size-0", *files, **beside,
            scratch=((0, 0), (low, 32 * MIB), (0x5F400000, 0))),
        one("array-outside", *files, array=0x57FF0000, scratch=((low, 64 * MIB),), **beside),
        one("lowest-pages", *files, structures=RAM + 2 * PAGE, data=RAM + two - 8 * PAGE, **beside),
        one("over-kernel-and-initrd", *files, structures=0x48000000, data=0x40200000, **beside),
        one("highest-pages", *files, structures=0x5FE00000, data=0x5FF00000, **beside),
    ]  # fmt: skip


def all_shapes() -> list[Shape]:
    """Every shape, by name."""
    shapes = [*_orders(), *_sizes(), *_attributes(), *_counts(), *_arrays(), *_places()]
    assert len({shape.name for shape in shapes}) == len(shapes)
    return shapes
