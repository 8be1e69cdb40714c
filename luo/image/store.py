"""The image: what one kernel hands to the next, as pages that can be kept, sent and looked into.

Format of an image file, little-endian. The head, 128 bytes:

    0   char[8]   magic
    8   u32       version of this format, 1
    12  u32       CRC-32 of head (this field 0) and both tables
    16  char[32]  name of the generation, NUL-padded
    48  u64       page size
    56  u64[4]    the handover: root tree and its bytes, scratch array and its bytes
    88  u64       number of ranges of memory
    96  u64       number of extents
    104 u64       bytes of the file
    112 u64       bugs of the generation that its bytes show: bit 0: kho-v2-depth
    120 u64       0

then 24 bytes a range (start, bytes, NUMA node), then 24 bytes an extent (phys, bytes, offset of its
pages in the file), both ascending and disjoint; then the pages, from the next multiple of the page
size on, in the order of the table without gaps. An extent with offset 0 has no pages: it was
preserved but never written, and reads as zero. Memory that no extent names did not matter, and was
not kept.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Protocol

from luo import abi as _abi
from luo.errors import HandoverError
from luo.kho import Handover, Incoming, Kho
from luo.memory import PhysicalMemory

if TYPE_CHECKING:
    from luo.image.survey import Survey, Violation
    from luo.kernel import Kernel

__all__ = ["Extent", "Image", "LiveMemory", "Ram"]

MAGIC: Final = b"\x89KHOIMG\n"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sII32s9Q")
_HEAD_BYTES: Final = 128
_ENTRY: Final = struct.Struct("<QQQ")
_RANGES_MAX: Final = 1 << 16
_NODES_MAX: Final = 1024
_CRC_AT: Final = 12
_BUGS: Final = {1: _abi.BUG_V2_DEPTH}
_COPY_BYTES: Final = 16 << 20


class Ram:
    """Where there is memory, and on which NUMA node.

    Args:
        ranges: ``[(start, nbytes, node), ...]``, disjoint.
        page_size: in bytes.

    Raises:
        ValueError: ranges that overlap, are not whole pages, or are none at all.
    """

    def __init__(self, ranges: Iterable[tuple[int, int, int]], page_size: int) -> None:
        if page_size not in _abi.MAX_PAGE_ORDER:
            raise ValueError(f"page size {page_size}: not 4096, 16384 or 65536")
        self.page_size = page_size
        self.ranges = sorted((int(s), int(n), int(node)) for s, n, node in ranges)
        if not self.ranges:
            raise ValueError("memory: no ranges")
        end = 0
        self.runs: list[tuple[int, int]] = []  # adjoining ranges as one: (start, end)
        for start, nbytes, node in self.ranges:
            if start % page_size or nbytes % page_size or nbytes <= 0 or start < 0:
                raise ValueError(f"memory range {start:#x}+{nbytes:#x}: not whole pages")
            if start < end or start + nbytes > 1 << 63:
                raise ValueError(f"memory range {start:#x}+{nbytes:#x}: overlaps, or too high")
            if not 0 <= node < _NODES_MAX:
                raise ValueError(f"memory range {start:#x}: node {node}, not 0..{_NODES_MAX - 1}")
            if self.runs and self.runs[-1][1] == start:
                self.runs[-1] = (self.runs[-1][0], start + nbytes)
            else:
                self.runs.append((start, start + nbytes))
            end = start + nbytes
        self._starts = [start for start, _, _ in self.ranges]
        self.run_starts = [start for start, _ in self.runs]

    @property
    def nr_pages(self) -> int:
        """Pages of RAM."""
        return sum(nbytes for _, nbytes, _ in self.ranges) // self.page_size

    def contains(self, phys: int, nbytes: int = 1) -> bool:
        """Whether all these bytes are RAM."""
        at = bisect.bisect_right(self.run_starts, phys) - 1
        return at >= 0 and nbytes >= 0 and phys + nbytes <= self.runs[at][1]

    def node_of(self, phys: int) -> int | None:
        """NUMA node of an address; None outside RAM."""
        at = bisect.bisect_right(self._starts, phys) - 1
        if at < 0 or phys >= self.ranges[at][0] + self.ranges[at][1]:
            return None
        return self.ranges[at][2]


class Pages(Protocol):
    """What a survey reads: an image, or memory that is still in use."""

    ram: Ram
    handover: Handover
    abi: str
    bugs: frozenset[str]

    def written(self, phys: int, nbytes: int) -> bool:
        """Whether all pages of these bytes are kept, with contents."""

    def read(self, phys: int, nbytes: int) -> bytes:
        """Return the bytes, or raise HandoverError with the address that cannot be read."""


class LiveMemory:
    """A machine's memory as it is now, read like an image.

    Args:
        memory: of the machine.
        handover: the four numbers.
        abi: name of the generation.
        bugs: of that generation's kernels, as its bytes show them.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        handover: Handover,
        abi: str,
        bugs: Iterable[str] = (),
    ) -> None:
        self.bugs = _abi.generation(abi).check_bugs(bugs)
        self.memory = memory
        self.ram = Ram(memory.ranges, memory.page_size)
        self.handover = handover
        self.abi = abi

    def written(self, phys: int, nbytes: int) -> bool:
        """Whether all pages of these bytes were ever written."""
        if not self.ram.contains(phys, nbytes):
            return False
        page = self.ram.page_size
        start = phys - phys % page
        return self.memory.is_populated(start, -(-(phys + nbytes) // page) * page - start)

    def read(self, phys: int, nbytes: int) -> bytes:
        """Return a copy of the bytes; HandoverError if they are no RAM or were never written."""
        if not self.ram.contains(phys, nbytes):
            raise HandoverError(f"{nbytes:#x} bytes are not in RAM", phys)
        if nbytes and not self.written(phys, nbytes):  # reading a hole would fill it
            raise HandoverError("memory was never written", phys)
        return bytes(self.memory.view(phys, nbytes))

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """Cut [start, end) of one run of RAM into what was written and what was not."""
        shift = self.memory.offset - self.memory.base
        fd, page = self.memory.file("image"), self.ram.page_size
        at = start
        while at < end:
            try:
                data = os.lseek(fd, at + shift, os.SEEK_DATA) - shift
            except OSError:  # ENXIO: nothing up to the end of the file
                data = end
            data = min(max(data // page * page, at), end)
            if data > at:
                yield Extent(at, data - at, None)
            if data >= end:
                return
            hole = os.lseek(fd, data + shift, os.SEEK_HOLE) - shift
            hole = min(-(-hole // page) * page, end)
            yield Extent(data, hole - data, self.memory.view(data, hole - data))
            at = hole


@dataclass(frozen=True, slots=True)
class Extent:
    """Adjoining pages.

    Attributes:
        phys: physical address of the first.
        nbytes: of all.
        data: their contents, or None: never written, read as zero.
    """

    phys: int
    nbytes: int
    data: memoryview | bytes | bytearray | None

    @property
    def end(self) -> int:
        """First address behind."""
        return self.phys + self.nbytes


class Image:
    """What crosses the change of kernel: the pages that matter, and the four numbers.

    Args:
        ranges: the machine's memory, ``[(start, nbytes, node), ...]``.
        handover: the four numbers.
        extents: the pages, in any order, disjoint and in RAM.
        abi: name of the generation.
        bugs: of that generation's kernels, as its bytes show them (``luo.abi.BUG_V2_DEPTH``).
        page_size: in bytes.
        source: where it came from, for people.

    Attributes:
        ram: ranges and page size (:class:`Ram`).
        handover, abi, bugs, source: as given.
        extents: sorted.
        notes: how its handover was found where it had to be looked for, for people.

    Raises:
        HandoverError: an extent is not whole pages in RAM, or two overlap.
        ValueError: ranges or page size are wrong, or there is no such generation.
    """

    def __init__(
        self,
        ranges: Iterable[tuple[int, int, int]],
        handover: Handover,
        extents: Iterable[Extent] = (),
        *,
        abi: str = "kho-v4",
        bugs: Iterable[str] = (),
        page_size: int = 4096,
        source: str = "",
    ) -> None:
        self.bugs = _abi.generation(abi).check_bugs(bugs)
        self.ram = Ram(ranges, page_size)
        self.handover = handover
        self.abi = abi
        self.source = source
        self.notes: list[str] = []
        self.extents: list[Extent] = sorted(extents, key=lambda extent: extent.phys)
        end = 0
        for extent in self.extents:
            if extent.phys % page_size or extent.nbytes % page_size or extent.nbytes <= 0:
                raise HandoverError(f"extent of {extent.nbytes:#x} bytes: no pages", extent.phys)
            if not self.ram.contains(extent.phys, extent.nbytes):
                raise HandoverError(
                    f"extent of {extent.nbytes:#x} bytes is not in RAM", extent.phys
                )
            if extent.phys < end:
                raise HandoverError("extent overlaps the one before", extent.phys)
            if extent.data is not None and len(extent.data) != extent.nbytes:
                raise HandoverError(f"extent has {len(extent.data):#x} bytes", extent.phys)
            end = extent.end
        self._starts = [extent.phys for extent in self.extents]

    def __repr__(self) -> str:
        return (
            f"<Image {self.abi} of {self.nbytes:,} bytes{' ' if self.source else ''}{self.source}>"
        )

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return self.ram.page_size

    @property
    def nbytes(self) -> int:
        """Bytes of pages that have contents."""
        return sum(extent.nbytes for extent in self.extents if extent.data is not None)

    # ---- reading ----

    def _parts(self, phys: int, nbytes: int) -> Iterator[tuple[int, int, Extent]]:
        """Yield (phys, bytes, extent) of each part; HandoverError if a part is in none."""
        if not self.ram.contains(phys, nbytes):
            raise HandoverError(f"{nbytes:#x} bytes are not in RAM", phys)
        end = phys + nbytes
        at = bisect.bisect_right(self._starts, phys) - 1
        while phys < end:
            extent = self.extents[at] if 0 <= at < len(self.extents) else None
            if extent is None or not extent.phys <= phys < extent.end:
                raise HandoverError("page was not kept in the image", phys - phys % self.page_size)
            size = min(end, extent.end) - phys
            yield phys, size, extent
            phys += size
            at += 1

    def written(self, phys: int, nbytes: int) -> bool:
        """Whether all pages of these bytes are kept, with contents."""
        try:
            return all(extent.data is not None for _, _, extent in self._parts(phys, nbytes))
        except HandoverError:
            return False

    def kept(self, phys: int, nbytes: int) -> bool:
        """Whether all pages of these bytes are kept, holes included."""
        try:
            return all(True for _ in self._parts(phys, nbytes))
        except HandoverError:
            return False

    def read(self, phys: int, nbytes: int) -> bytes:
        """Return the bytes at a physical address.

        Raises:
            HandoverError: they are not in RAM, or a page was not kept: it names that address.
        """
        parts = []
        for at, size, extent in self._parts(phys, nbytes):
            start = at - extent.phys
            parts.append(bytes(size) if extent.data is None else bytes(extent.data[start:][:size]))
        return b"".join(parts)

    def pieces(self, start: int, end: int) -> Iterator[Extent]:
        """Yield what is kept of [start, end), page-aligned, as extents."""
        at = max(bisect.bisect_right(self._starts, start) - 1, 0)
        for i in range(at, len(self.extents)):
            extent = self.extents[i]
            if extent.phys >= end:
                return
            low, high = max(extent.phys, start), min(extent.end, end)
            if low < high:
                data = extent.data
                part = None if data is None else memoryview(data)[low - extent.phys :][: high - low]
                yield Extent(low, high - low, part)

    @cached_property
    def survey(self) -> Survey:
        """What is in it, and which rules it breaks."""
        from luo.image.survey import Survey

        return Survey(self)

    def verify(self) -> list[Violation]:
        """Return every rule that it breaks, each with its address.

        That includes whatever else makes the next kernel refuse it.
        """
        from luo.image.survey import Violation

        found = list(self.survey.violations)
        if not found:
            own = (part for span in self.survey.own_spans() for part in self.pieces(*span))
            try:
                Kho.validate(self._memory(own), self.handover, abi=self.abi, bugs=self.bugs)
            except HandoverError as error:
                found.append(Violation("handover", error.phys, error.rule))
        return found

    # ---- to and from memory ----

    def memory(self) -> PhysicalMemory:
        """Return a memory that holds these pages; everything else in it was never written."""
        return self._memory(self.extents)

    def _memory(self, extents: Iterable[Extent]) -> PhysicalMemory:
        memory = PhysicalMemory(ranges=self.ram.ranges, page_size=self.page_size)
        for extent in extents:
            if extent.data is not None:
                memory.view(extent.phys, extent.nbytes)[:] = extent.data
        return memory

    def incoming(self) -> Incoming:
        """Validate it as the next kernel would, in a memory of its own.

        Raises:
            HandoverError: the next kernel would not take it over.
        """
        return Kho.validate(self.memory(), self.handover, abi=self.abi, bugs=self.bugs)

    @classmethod
    def from_memory(
        cls,
        memory: PhysicalMemory,
        handover: Handover,
        *,
        abi: str = "kho-v4",
        bugs: Iterable[str] = (),
        source: str = "",
    ) -> Image:
        """Take what *handover* names: root tree, map, scratch array, blobs, preserved pages.

        Nothing is copied: the image reads the memory, so save it before that changes. A handover
        that breaks rules is taken as far as it can be followed.
        """
        from luo.image.survey import Survey

        live = LiveMemory(memory, handover, abi, bugs)
        extents: list[Extent] = []
        for start, end in Survey(live, formats=False).spans():
            extents += live.extents(start, end)
        return cls(
            memory.ranges,
            handover,
            extents,
            abi=abi,
            bugs=live.bugs,
            page_size=memory.page_size,
            source=source,
        )

    @classmethod
    def from_kernel(cls, kernel: Kernel, *, source: str = "") -> Image:
        """Take what *kernel* would hand over if it jumped now.

        Raises:
            ValueError: it runs with KHO off.
            KhoError: EADDRNOTAVAIL if scratch has no room for its array.
        """
        if kernel.kho is None:
            raise ValueError(f"{kernel!r}: KHO is off, it hands over nothing")
        return cls.from_memory(
            kernel.machine.memory,
            kernel.kho.handover(),
            abi=kernel.kho.abi,
            bugs=kernel.kho.bugs,
            source=source,
        )

    # ---- files ----

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write an image file: under another name, renamed when whole; mode 0600.

        Returns:
            int: its bytes.

        Raises:
            OSError: it cannot be written; a file that was there before is untouched.
        """
        target = Path(path)
        page = self.page_size
        name = self.abi.encode()
        tables = bytearray()
        for entry in self.ram.ranges:
            tables += _ENTRY.pack(*entry)
        first = -(-(_HEAD_BYTES + len(tables) + 24 * len(self.extents)) // page) * page
        offset = first
        for extent in self.extents:
            here = 0 if extent.data is None else offset
            tables += _ENTRY.pack(extent.phys, extent.nbytes, here)
            offset += 0 if extent.data is None else extent.nbytes
        head = bytearray(_HEAD_BYTES)
        _HEAD.pack_into(
            head, 0, MAGIC, VERSION, 0, name, page, *self.handover.numbers,
            len(self.ram.ranges), len(self.extents), offset,
            sum(bit for bit, bug in _BUGS.items() if bug in self.bugs),
        )  # fmt: skip
        struct.pack_into("<I", head, _CRC_AT, zlib.crc32(tables, zlib.crc32(head)))
        with _replacing(target) as file:
            file.write(head)
            file.write(tables)
            file.write(bytes(first - _HEAD_BYTES - len(tables)))
            for extent in self.extents:
                if extent.data is not None:
                    view = memoryview(extent.data)
                    for at in range(0, extent.nbytes, _COPY_BYTES):
                        file.write(view[at : at + _COPY_BYTES])
        return offset

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        abi: str | None = None,
        base: int | None = None,
        handover: Handover | None = None,
    ) -> Image:
        """Open an image file, a guest's memory, or a directory with a dump of a machine's memory.

        Args:
            path: of the file, which stays mapped: an image, an ELF core of a guest's memory, or
                that memory as it is; or of a directory with ``pages.json`` and ``pages.bin``, and
                with ``kexec.dtb`` or ``manifest.json`` for the rest.
            abi: name of the generation, where the dump does not say; a file always does, and
                another name is taken instead of its own.
            base: of raw memory, the physical address of its first byte; None: it is found out.
            handover: of a guest's memory; None: it is looked for there.

        Raises:
            HandoverError: the file breaks a rule of the format: it names the offset; or memory
                holds no handover, or several.
            ValueError: a dump directory is not complete or not understood; *base* or *handover* of
                what has its own.
            OSError: it cannot be read.
        """
        place = Path(path)
        memory = place.is_file() and _first(place, len(MAGIC)) != MAGIC
        if base is not None and not memory:
            raise ValueError(f"{place}: --base is for raw memory")
        if place.is_dir():
            from luo.image.dump import load_dump

            return load_dump(place, abi, handover)
        if memory:
            from luo.image.guest_memory import load_guest_memory

            return load_guest_memory(place, abi, base=base, handover=handover)
        if handover is not None:
            raise ValueError(f"{place}: --handover is for a guest's memory")
        with place.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _HEAD_BYTES:
                raise HandoverError(f"{place}: {size} bytes are no image: its head has 128", size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls._parse(memoryview(mapped), str(place), abi)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, abi: str | None = None) -> Image:
        """Read an image file that is in memory; errors as :meth:`load`."""
        return cls._parse(memoryview(data), "", abi)

    @classmethod
    def _parse(cls, file: memoryview, source: str, abi: str | None) -> Image:
        def wrong(rule: str, offset: int) -> HandoverError:
            return HandoverError(f"{source or 'image'}: {rule} (offset in the file)", offset)

        size = len(file)
        if size < _HEAD_BYTES:
            raise wrong("shorter than its head of 128 bytes", size)
        magic, version, crc, raw_name, *numbers = _HEAD.unpack_from(file)
        page, four, (nr_ranges, nr_extents, total, flags) = numbers[0], numbers[1:5], numbers[5:]
        if magic != MAGIC:
            raise wrong(f"not an image: it begins with {magic!r}", 0)
        if version != VERSION:
            raise wrong(f"format version {version}: only {VERSION} is known", 8)
        name = raw_name.rstrip(b"\0")
        if name.decode("ascii", "replace") not in _abi.GENERATIONS:
            raise wrong(f"generation {name.decode('ascii', 'replace')!r} is not known", 16)
        if page not in _abi.MAX_PAGE_ORDER:
            raise wrong(f"page size {page}", 48)
        if not 1 <= nr_ranges <= _RANGES_MAX:
            raise wrong(f"{nr_ranges} ranges of memory", 88)
        if nr_extents > size // _ENTRY.size:
            raise wrong(f"{nr_extents} extents do not fit into the file", 96)
        if total != size:
            raise wrong(f"says that it has {total} bytes, and has {size}", 104)
        bugs = [bug for bit, bug in _BUGS.items() if flags & bit]
        if flags & ~sum(_BUGS) or not set(bugs) <= set(_abi.GENERATIONS[name.decode()].bugs):
            raise wrong(f"flags {flags:#x} do not go with {name.decode()}", 112)
        if any(file[120:_HEAD_BYTES]):
            raise wrong("the end of its head is not 0", 120)
        at = _HEAD_BYTES + _ENTRY.size * nr_ranges
        end = at + _ENTRY.size * nr_extents
        if end > size:
            raise wrong(f"{nr_ranges} ranges and {nr_extents} extents do not fit", 88)
        ranges = list(_ENTRY.iter_unpack(file[_HEAD_BYTES:at]))
        try:
            ram = Ram(ranges, page)
        except ValueError as error:
            raise wrong(str(error), _HEAD_BYTES) from None
        if ram.ranges != ranges:
            raise wrong("ranges of memory are not ascending", _HEAD_BYTES)
        extents = []
        offset, below = -(-end // page) * page, 0
        for i, (phys, nbytes, where) in enumerate(_ENTRY.iter_unpack(file[at:end])):
            here = at + _ENTRY.size * i
            if phys % page or nbytes % page or not nbytes:
                raise wrong(f"extent {phys:#x}+{nbytes:#x} is not whole pages", here)
            if phys < below:
                raise wrong(f"extent {phys:#x} overlaps the one before, or is out of order", here)
            if not ram.contains(phys, nbytes):
                raise wrong(f"extent {phys:#x}+{nbytes:#x} is not in RAM", here)
            if where not in (0, offset):
                raise wrong(f"extent {phys:#x} has its pages at {where:#x}, not {offset:#x}", here)
            if where and nbytes > size - offset:
                raise wrong(f"extent {phys:#x}+{nbytes:#x} leaves the file", here)
            extents.append(Extent(phys, nbytes, file[offset:][:nbytes] if where else None))
            offset += nbytes if where else 0
            below = phys + nbytes
        if offset != size:
            raise wrong("bytes behind the last page", offset)
        head = bytearray(file[:_HEAD_BYTES])
        head[_CRC_AT : _CRC_AT + 4] = bytes(4)
        if zlib.crc32(file[_HEAD_BYTES:end], zlib.crc32(head)) != crc:
            raise wrong("checksum of head and tables is wrong", _CRC_AT)
        known = abi is None or abi == name.decode()
        return cls(
            ranges,
            Handover(*four),
            extents,
            abi=abi or name.decode(),
            bugs=bugs if known else (),
            page_size=page,
            source=source,
        )


def _first(place: Path, nbytes: int) -> bytes:
    with place.open("rb") as file:
        return file.read(nbytes)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """Write a file that takes *target*'s place when it is whole; mode 0600."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def merge_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the union of [start, end) spans, sorted and disjoint."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        elif start < end:
            merged.append((start, end))
    return merged


def clip_spans(spans: Sequence[tuple[int, int]], ram: Ram) -> Iterator[tuple[int, int]]:
    """Yield what of sorted spans lies in RAM."""
    for start, end in spans:
        at = max(bisect.bisect_right(ram.run_starts, start) - 1, 0)
        for i in range(at, len(ram.runs)):
            low, high = ram.runs[i]
            if low >= end:
                break
            if max(low, start) < min(high, end):
                yield max(low, start), min(high, end)
