"""A guest's whole memory, as QEMU writes it, and the handover that lies somewhere in it.

Two forms: the raw file of the monitor's ``pmemsave``, one run of memory whose first address the
file does not have; and the ELF64 core of ``dump-guest-memory``, whose PT_LOAD segments name the
physical address of each part. The file is mapped and nothing of it is copied: an image of it holds
views of the pages that its handover names.

Where the handover is, the memory says itself: a device tree whose ``/chosen`` names it (kho-abi
9.2), or an x86 setup_data node (9.1), as left for the next kernel; or, before the jump, only the
root tree, with scratch unknown. Memory has stale copies of all of these, so each is followed, and
those that lead to a broken root tree, scratch array or map do not count.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

from luo import abi as _abi
from luo.errors import FdtError, HandoverError
from luo.fdt import Fdt
from luo.image.dump import guess_abi, read_device_tree
from luo.image.store import Extent, Image, Ram, clip_spans, merge_spans
from luo.image.survey import Survey
from luo.kho import Handover

__all__ = ["load_guest_memory", "search_pages"]

_PAGE_MIN: Final = 4096
_CHUNK: Final = 1 << 20  # of a scan: stays in the cache
_FDT_MAGIC: Final = b"\xd0\x0d\xfe\xed"
_FDT_HEAD: Final = struct.Struct(">10I")
_TREE_MAX: Final = 16 << 20
_STRINGS_MAX: Final = 1 << 20
_HITS_MAX: Final = 1 << 16
_PARSED_MAX: Final = 256 << 20  # bytes of trees that are read in search of the handover
_CANDIDATES_MAX: Final = 256
_PHYS_MAX: Final = 1 << 63
_BASES: Final = (0x4000_0000, 0, 0x8000_0000)  # arm64 virt, x86, riscv64 virt
_STRUCTURE: Final = frozenset(("handover", "root", "scratch", "map"))
_COMPATIBLE: Final = frozenset(g.compatible for g in _abi.GENERATIONS.values())
_MAP_PROPERTIES: Final = frozenset(
    (g.map_node, g.map_property) for g in _abi.GENERATIONS.values()
)  # of the root tree

# ELF64, little-endian
_EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_ET_CORE: Final = 4
_PT_LOAD: Final = 1
_PN_XNUM: Final = 0xFFFF
_PHNUM_MAX: Final = 1 << 17
_SH_INFO: Final = 44


@dataclass(frozen=True, slots=True)
class _Segment:
    """Adjoining memory: *nbytes* from *phys* on stand in the file at *offset*."""

    phys: int
    nbytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A handover that memory tells of.

    Attributes:
        kind: what tells it.
        phys: where that lies, as the dump counts; None: the user told it.
        handover: the four numbers.
        page_size: 0: not told either.
        ranges: of memory; empty: all that the dump has.
        base: what the dump's addresses lack.
    """

    kind: str
    phys: int | None
    handover: Handover
    page_size: int
    ranges: tuple[tuple[int, int, int], ...] = ()
    base: int = 0

    def __str__(self) -> str:
        numbers = ",".join(hex(number) for number in self.handover.numbers)
        where = "" if self.phys is None else f" at {self.phys + self.base:#x}"
        return f"handover {numbers} ({self.kind}{where})"


@dataclass(frozen=True, slots=True)
class _Tree:
    """A tree found in memory: *phys* as the dump counts it, which for a raw one is from 0."""

    phys: int
    told: Handover | None
    ranges: tuple[tuple[int, int, int], ...] = ()


def load_guest_memory(
    place: Path,
    abi: str | None = None,
    *,
    base: int | None = None,
    handover: Handover | None = None,
) -> Image:
    """Open a guest's memory; see :meth:`luo.image.Image.load`.

    Args:
        place: the file, which stays mapped.
        abi: name of the generation; None: by the root tree.
        base: physical address of a raw file's first byte; None: to be found out.
        handover: None: to be looked for.

    Raises:
        HandoverError: the ELF headers break a rule (it names the offset), or memory holds no
            handover, or several.
        ValueError: *base* for an ELF core, or a file that is no memory at all.
        OSError: it cannot be read.
    """
    with place.open("rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError(f"{place}: not a regular file")
        if info.st_size < _PAGE_MIN:
            raise HandoverError(
                f"{place}: {info.st_size} bytes are no image and no memory", info.st_size
            )
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        head = bytes(view[:8])
        if head[:4] == b"\x7fELF":
            if base is not None:
                raise ValueError("--base: an ELF core says itself where its memory is")
            segments, ram = _read_elf(view, str(place))
            bases: list[int] | None = [0]
        elif head in (b"KDUMP   ", b"makedump"):
            raise ValueError(f"{place}: compressed kdump format; dump it as ELF or with pmemsave")
        else:
            nbytes = info.st_size // _PAGE_MIN * _PAGE_MIN
            segments, ram = [_Segment(0, nbytes, 0)], [(0, nbytes)]
            bases = None if base is None else [base]
            if base is not None and (base % _PAGE_MIN or not 0 <= base < _PHYS_MAX - nbytes):
                raise ValueError(f"--base {base:#x}: not the address of a page")
        return _Search(file, view, place, segments, ram, bases, abi).image(handover)


def search_pages(
    place: Path,
    pages: Iterable[tuple[int, int]],
    page: int,
    abi: str | None = None,
    handover: Handover | None = None,
) -> Image:
    """Find the handover in a file of single pages; errors as :func:`load_guest_memory`.

    Args:
        place: the file, which stays mapped.
        pages: ``[(phys, offset in the file), ...]``.
        page: bytes of each.
        abi: name of the generation, or None.
        handover: None: to be looked for.
    """
    segments: list[_Segment] = []
    for phys, offset in sorted(pages):
        last = segments[-1] if segments else _Segment(0, 0, 0)
        end = last.phys + last.nbytes
        if segments and phys == end and offset - last.offset == last.nbytes:
            segments[-1] = replace(last, nbytes=last.nbytes + page)
        elif phys < end:
            raise HandoverError(f"{place}: page stands twice", phys)
        else:
            segments.append(_Segment(phys, page, offset))
    ram = merge_spans((each.phys, each.phys + each.nbytes) for each in segments)
    with place.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return _Search(file, view, place, segments, ram, [0], abi).image(handover)


# ---- ELF ----


def _read_elf(view: memoryview, source: str) -> tuple[list[_Segment], list[tuple[int, int]]]:
    """Return the segments of an ELF core, sorted and disjoint, and all [start, end) of memory."""

    def wrong(rule: str, offset: int) -> HandoverError:
        return HandoverError(f"{source}: ELF: {rule} (offset in the file)", offset)

    (
        ident, kind, _, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, _,
    ) = _EHDR.unpack_from(view)  # fmt: skip
    if ident[4:7] != b"\2\1\1":
        raise wrong(f"class, byte order and version {ident[4:7].hex()}: not 64-bit, little", 4)
    if kind != _ET_CORE:
        raise wrong(f"type {kind}: not a core", 16)
    if phentsize != _PHDR.size:
        raise wrong(f"program headers of {phentsize} bytes, not {_PHDR.size}", 54)
    if phnum == _PN_XNUM:  # the number stands in the first section header
        if shentsize != 64 or not shnum or shoff + 64 > len(view):
            raise wrong("number of program headers is in a section header that is not there", 40)
        phnum = struct.unpack_from("<I", view, shoff + _SH_INFO)[0]
    if not 1 <= phnum <= _PHNUM_MAX or phoff + phnum * _PHDR.size > len(view):
        raise wrong(f"{phnum} program headers at {phoff:#x} leave the file", 32)
    found: list[tuple[int, int, int, int]] = []
    ram: list[tuple[int, int]] = []
    for i in range(phnum):
        at = phoff + i * _PHDR.size
        kind, _, offset, _, phys, filesz, memsz, _ = _PHDR.unpack_from(view, at)
        if kind != _PT_LOAD or not memsz:
            continue
        if phys + memsz > _PHYS_MAX:
            raise wrong(f"segment {phys:#x}+{memsz:#x} is too high", at + 24)
        if filesz > memsz:
            raise wrong(f"segment {phys:#x}: {filesz:#x} bytes in the file, {memsz:#x} in all", at)
        ram.append((phys, phys + memsz))
        if not filesz:  # memory that was not dumped
            continue
        if offset + filesz > len(view):
            raise wrong(f"segment {phys:#x}: {offset:#x}+{filesz:#x} leaves the file", at + 8)
        found.append((phys, filesz, offset, at))
    if not found:
        raise wrong("no segment has memory", phoff)
    segments: list[_Segment] = []
    # With paging the same memory stands there for each place it is mapped at.
    for phys, nbytes, offset, at in sorted(found):
        last = segments[-1] if segments else None
        if last is not None and phys <= last.phys + last.nbytes:
            same = offset - last.offset == phys - last.phys
            if not same and phys < last.phys + last.nbytes:
                raise wrong(f"segment {phys:#x} overlaps {last.phys:#x}+{last.nbytes:#x}", at + 24)
            if same:
                end = max(last.phys + last.nbytes, phys + nbytes)
                segments[-1] = _Segment(last.phys, end - last.phys, last.offset)
                continue
        segments.append(_Segment(phys, nbytes, offset))
    return segments, merge_spans(ram)


# ---- search ----


class _Search:
    """Looks for the handover in a dump's memory.

    Args:
        file: the dump, open.
        view: all of its bytes.
        place: its name.
        segments: where its memory is, disjoint and sorted; of a raw file from address 0 on.
        ram: [start, end) of all memory, in the same addresses.
        bases: what may have to be added to those addresses; None: nobody said.
        abi: name of the generation, or None.
    """

    def __init__(
        self,
        file: IO[bytes],
        view: memoryview,
        place: Path,
        segments: list[_Segment],
        ram: list[tuple[int, int]],
        bases: list[int] | None,
        abi: str | None,
    ) -> None:
        self.file = file
        self.view = view
        self.place = place
        self.segments = segments
        self.starts = [segment.phys for segment in segments]
        self.ram = ram
        self.bases = bases
        self.abi = abi
        self.parsed = 0

    def image(self, handover: Handover | None) -> Image:
        """Return the image of the handover that is given, or found."""
        if handover is not None:
            candidates = self._given(handover)
        else:
            candidates = self._candidates()
        chosen, notes = self._choose(candidates, given=handover is not None)
        whole = self._whole(chosen)
        survey = Survey(whole, formats=False)
        image = Image(
            whole.ram.ranges,
            chosen.handover,
            (part for span in survey.spans() for part in whole.pieces(*span)),
            abi=whole.abi,
            page_size=whole.page_size,
            source=str(self.place),
        )
        image.notes += notes
        return image

    # ---- bytes ----

    def peek(self, phys: int, nbytes: int) -> bytes:
        """Return up to *nbytes* bytes at an address of the dump; fewer where its memory ends."""
        parts: list[bytes] = []
        at = max(bisect.bisect_right(self.starts, phys) - 1, 0)
        for segment in self.segments[at:]:  # adjoining ones may lie anywhere in the file
            skip = phys - segment.phys
            size = min(nbytes, segment.nbytes - skip)
            if skip < 0 or size <= 0:
                break
            parts.append(bytes(self.view[segment.offset + skip :][:size]))
            phys, nbytes = phys + size, nbytes - size
        return b"".join(parts)

    def _chunks(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Yield (phys, words) of all memory that the file has, without its holes."""
        fd = self.file.fileno()
        buffer = bytearray(_CHUNK)
        into, words = memoryview(buffer), np.frombuffer(buffer, np.uint64)
        for segment in self.segments:
            at, end = segment.offset, segment.offset + segment.nbytes
            while at < end:
                try:
                    data = os.lseek(fd, at, os.SEEK_DATA)
                    hole = os.lseek(fd, data, os.SEEK_HOLE)
                except OSError:  # ENXIO: a hole up to the end of the file
                    break
                at = max(at, data - (data - segment.offset) % 8)
                while at < min(end, hole):
                    count = os.preadv(fd, [into[: min(_CHUNK, end - at)]], at) // 8
                    if not count:
                        return
                    yield segment.phys + at - segment.offset, words[:count]
                    at += 8 * count

    def _scan(self) -> tuple[list[int], list[int]]:
        """Return where device trees may begin, and where setup_data nodes of KHO may."""
        magic = np.uint32(int.from_bytes(_FDT_MAGIC, "little"))
        kind = np.uint64(_abi.SETUP_KEXEC_KHO | 32 << 32)
        trees: list[int] = []
        nodes: list[int] = []
        for phys, words in self._chunks():
            hits = np.flatnonzero(words.view(np.uint32)[::2] == magic)
            trees += [phys + 8 * hit for hit in hits.tolist()]
            hits = np.flatnonzero(words == kind)
            nodes += [phys + 8 * hit - 8 for hit in hits.tolist()]
            if len(trees) + len(nodes) > _HITS_MAX:
                raise HandoverError(
                    f"{self.place}: over {_HITS_MAX} places look like a device tree; "
                    "say where the handover is (--handover)",
                    phys,
                )
        return trees, nodes

    def _tree(self, phys: int) -> _Tree | None:
        """Read the tree at *phys* if it is one that matters."""
        head = self.peek(phys, _FDT_HEAD.size)
        if len(head) < _FDT_HEAD.size:
            return None
        _, total, _, strings, _, _, _, _, strings_size, _ = _FDT_HEAD.unpack(head)
        if not _FDT_HEAD.size < total <= _TREE_MAX:
            return None
        if strings + strings_size > total or not strings_size <= _STRINGS_MAX:
            return None
        names = self._parse(phys + strings, strings_size)
        if _abi.CHOSEN_FDT.encode() not in names and not any(
            name.encode() in names for _, name in _MAP_PROPERTIES
        ):
            return None
        try:
            tree = Fdt(self._parse(phys, total))
            chosen = tree.node("/chosen").properties if "/chosen" in tree else {}
            if _abi.CHOSEN_FDT in chosen:
                told, ranges = read_device_tree(tree)
                return _Tree(phys, told, tuple(ranges))
            root = tree.root
            strings_of = bytes(root.get("compatible") or b"").split(b"\0")[:-1]
            if not _COMPATIBLE.intersection(s.decode("ascii", "replace") for s in strings_of):
                return None
            for node, name in _MAP_PROPERTIES:
                path = f"/{node or ''}"
                if path in tree and name in tree.node(path):
                    return _Tree(phys, None)
        except (FdtError, HandoverError, ValueError):
            pass  # a stale copy, half overwritten
        return None

    def _parse(self, phys: int, nbytes: int) -> bytes:
        self.parsed += nbytes
        if self.parsed > _PARSED_MAX:
            raise HandoverError(
                f"{self.place}: too many device trees; say where the handover is (--handover)", phys
            )
        return self.peek(phys, nbytes)

    # ---- candidates ----

    def _given(self, handover: Handover) -> list[_Candidate]:
        bases = self.bases
        if bases is None:
            bases = [
                base for base in _BASES if self.peek(handover.fdt_phys - base, 4) == _FDT_MAGIC
            ]
        if not bases:
            trees, _ = self._scan()
            roots = [t.phys for at in trees if (t := self._tree(at)) and t.told is None]
            bases = self._solved([handover], roots)
        if not bases:
            raise HandoverError(
                f"{self.place}: no root tree leads to a first address; give --base",
                handover.fdt_phys,
            )
        page = _page_size(handover)
        return [_Candidate("as given", None, handover, page, base=base) for base in bases]

    def _solved(self, told: Iterable[Handover], roots: Iterable[int]) -> list[int]:
        """Return the first addresses at which a root tree lies where a handover says."""
        roots = list(roots)[:_CANDIDATES_MAX]
        bases = {h.fdt_phys - at for h in told for at in roots}
        return sorted(
            base for base in bases if base >= 0 and not base % _PAGE_MIN and base < _PHYS_MAX
        )

    def _candidates(self) -> list[_Candidate]:
        """Return what memory tells: handovers first, then root trees that none of them names."""
        at_trees, at_nodes = self._scan()
        trees = [tree for at in at_trees if (tree := self._tree(at)) is not None]
        roots = [tree.phys for tree in trees if tree.told is None]
        known = set(roots)
        told = [
            _Candidate("device tree", tree.phys, tree.told, _page_size(tree.told), tree.ranges)
            for tree in trees
            if tree.told is not None
        ]
        told += self._setup_data(at_nodes)
        bases = self.bases
        if bases is None:
            bases = self._solved((c.handover for c in told), roots)
            begins = {start for each in told for start, _, _ in each.ranges}
            # Of stale trees' many answers, those by which the file begins where RAM does.
            bases = [base for base in bases if base in begins] or bases or list(_BASES)
        found: dict[tuple[int, tuple[int, ...]], _Candidate] = {}
        for base in bases:
            for each in told:
                if self.bases is not None or each.handover.fdt_phys - base in known:
                    found.setdefault((base, each.handover.numbers), replace(each, base=base))
            named = {each.handover.fdt_phys for each in told}
            for at in roots:
                if at + base not in named:
                    alone = Handover(at + base, _PAGE_MIN, 0, 0)
                    kind = "root tree, scratch unknown,"
                    found[base, alone.numbers] = _Candidate(kind, at, alone, 0, base=base)
        return list(found.values())

    def _setup_data(self, places: list[int]) -> Iterator[_Candidate]:
        for at in places:
            try:
                told = Handover.from_setup_data(self.peek(at, _abi.SETUP_DATA_SER.size))
            except HandoverError:
                continue
            if told.fdt_phys and told.fdt_len in _abi.MAX_PAGE_ORDER:
                yield _Candidate("setup_data node", at, told, told.fdt_len)

    # ---- choice ----

    def _whole(self, candidate: _Candidate) -> Image:
        """Return all of memory as an image with that handover."""
        page, base = candidate.page_size, candidate.base
        spans = [(start + base, end + base) for start, end in self.ram]
        own = [(start, end - start, 0) for start, end in _whole_pages(spans, page)]
        ram = Ram(own, page)
        if candidate.ranges:
            with contextlib.suppress(ValueError):
                ram = Ram(candidate.ranges, page)
            if not ram.contains(candidate.handover.fdt_phys, page):
                ram = Ram(own, page)
        extents: list[Extent] = []
        for segment in self.segments:
            start = segment.phys + base
            for low, high in _whole_pages([(start, start + segment.nbytes)], page):
                for first, end in clip_spans([(low, high)], ram):
                    data = self.view[segment.offset + first - start :][: end - first]
                    extents.append(Extent(first, end - first, data))
        whole = Image(
            ram.ranges,
            candidate.handover,
            extents,
            abi=self.abi or "kho-v4",
            page_size=page,
            source=str(self.place),
        )
        if self.abi is None:
            whole.abi = guess_abi(whole)
        return whole

    def _judge(self, candidate: _Candidate) -> tuple[_Candidate, str | None, int]:
        """Return a candidate, what keeps it from being a handover, and how often it was one."""
        if not candidate.page_size:  # a root tree alone: what the map fits to
            first = None
            for page in _abi.MAX_PAGE_ORDER:
                told = replace(candidate.handover, fdt_len=page)
                judged = self._judge(replace(candidate, handover=told, page_size=page))
                if judged[1] is None:
                    return judged
                first = first or judged
            assert first is not None
            return first
        try:
            survey = Survey(self._whole(candidate), formats=False)
        except (HandoverError, ValueError) as error:
            return candidate, str(error), 0
        problem = next((str(v) for v in survey.violations if v.part in _STRUCTURE), None)
        return candidate, problem, _kexec_count(survey)

    def _choose(self, candidates: list[_Candidate], *, given: bool) -> tuple[_Candidate, list[str]]:
        if not candidates:
            raise HandoverError(
                f"{self.place}: not an image, and no handover was found in it as memory: no device "
                "tree with linux,kho-fdt, no setup_data node, no root tree"
            )
        if len(candidates) > _CANDIDATES_MAX:
            raise HandoverError(
                f"{self.place}: {len(candidates)} handovers were found; say which (--handover)",
                candidates[0].handover.fdt_phys,
            )
        only = candidates[0] if len(candidates) == 1 else None
        if only is not None and only.page_size and (given or self.bases is not None):
            return only, [str(only)]  # whole or not: there is no other
        judged = [self._judge(candidate) for candidate in candidates]
        valid = [(c, count) for c, problem, count in judged if problem is None]
        notes = [f"not taken: {c}: {problem}" for c, problem, _ in judged if problem]
        told = [(c, count) for c, count in valid if c.handover.scratch_phys]
        if told and len(told) < len(valid):
            alone = (c for c, _ in valid if not c.handover.scratch_phys)
            notes += [f"not taken: {c}: whole, but nothing names it" for c in alone]
            valid = told
        if not valid:
            listed = "; ".join(f"{c}: {problem}" for c, problem, _ in judged[:4])
            raise HandoverError(
                f"{self.place}: no handover was found whose root tree, scratch and map are whole: "
                f"{listed}; say which (--handover), and where memory begins (--base)"
            )
        newest = max(count for _, count in valid)
        last = [c for c, count in valid if count == newest]
        if len(last) > 1:
            listed = "; ".join(str(c) for c in last[:8])
            raise HandoverError(
                f"{self.place}: {len(last)} handovers were found; say which (--handover): {listed}",
                last[1].handover.fdt_phys,
            )
        notes += [f"not taken: {c}: an older one" for c, count in valid if count < newest]
        where = "" if self.bases is not None else f", memory from {last[0].base:#x} on"
        return last[0], [f"{last[0]}{where}", *notes]


def _page_size(handover: Handover) -> int:
    """The root tree of most generations is told as a page."""
    return handover.fdt_len if handover.fdt_len in _abi.MAX_PAGE_ORDER else _PAGE_MIN


def _whole_pages(spans: Iterable[tuple[int, int]], page: int) -> Iterator[tuple[int, int]]:
    for start, end in spans:
        low, high = -(-start // page) * page, end // page * page
        if low < high:
            yield low, high


def _kexec_count(survey: Survey) -> int:
    for subtree in survey.subtrees:
        if subtree.name == _abi.KHO_SUBTREE_METADATA and subtree.phys and subtree.nbytes:
            try:
                blob = survey.pages.read(subtree.phys, min(subtree.nbytes, _PAGE_MIN))
            except HandoverError:
                return 0
            metadata = _abi.KexecMetadata.unpack(blob)
            return metadata.kexec_count if metadata else 0
    return 0
