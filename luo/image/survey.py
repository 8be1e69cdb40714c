"""What an image holds, read without trusting any of it, and every rule that it breaks.

:class:`luo.kho.Incoming` stops at the first violation, as it must before a new kernel boots on the
memory. A survey goes on: it notes each violation with its address, and follows what still makes
sense. Rules: kho-abi 9.3, 12.16 to 12.18, and those of the formats in the subtrees.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from luo import abi as _abi
from luo.errors import FdtError, HandoverError
from luo.fdt import Fdt, Node
from luo.image.store import clip_spans, merge_spans

if TYPE_CHECKING:
    from luo.image.store import Pages, Ram

__all__ = ["MapPage", "Subtree", "Survey", "Violation"]

_LISTED_MAX: Final = 1000  # of one rule; those beyond are counted
_BLOCKS_MAX: Final = 1 << 26
_ROOT_TREE_MAX: Final = 64 << 20
_SCRATCH_AREAS_MAX: Final = 1026
_FDT_HEAD: Final = 40
_READ_MIN: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that the image breaks.

    Attributes:
        part: ``"handover"``, ``"root"``, ``"scratch"``, ``"map"``, or the name of a subtree.
        phys: physical address where, or None.
        rule: in words.
        count: how many this stands for; more than one only for the last of its kind.
    """

    part: str
    phys: int | None
    rule: str
    count: int = 1

    def __str__(self) -> str:
        where = "" if self.phys is None else f"{self.phys:#x}: "
        more = "" if self.count == 1 else f" ({self.count:,} in all)"
        return f"{self.part}: {where}{self.rule}{more}"


@dataclass(frozen=True, slots=True)
class MapPage:
    """Memory of the preserved map itself.

    Attributes:
        kind: ``"node"`` or ``"leaf"`` of a radix tree; ``"chunk"`` or ``"bitmap"``.
        phys, nbytes: where it lies.
        level: of a radix tree, 0 for a leaf; the order for chunks and bitmaps.
        prefix: smallest key below it; for a bitmap the address of its first block.
        keys: keys or blocks in it; 0 for those that hold none themselves.
    """

    kind: str
    phys: int
    nbytes: int
    level: int
    prefix: int
    keys: int = 0


@dataclass(slots=True)
class Subtree:
    """A child of the root tree.

    Attributes:
        name: of it.
        phys, nbytes: of its blob; None if the root tree does not say so, or the data is inline.
        format: name of the format, None if it is not known.
        decoded: its contents as JSON values, None without a format.
        rows: inline data: (depth, node) of it and all below it.
    """

    name: str
    phys: int | None = None
    nbytes: int | None = None
    format: str | None = None
    decoded: dict[str, Any] | None = None
    rows: list[tuple[int, Node]] = field(default_factory=list, compare=False, repr=False)


@dataclass(slots=True)
class _Found:
    phys: list[NDArray[np.uint64]] = field(default_factory=list)
    orders: list[NDArray[np.uint8]] = field(default_factory=list)
    count: int = 0
    full: bool = False

    def add(self, phys: NDArray[np.uint64], order: int | NDArray[np.uint8]) -> None:
        self.phys.append(phys)
        if isinstance(order, int):
            self.orders.append(np.full(len(phys), order, np.uint8))
        else:
            self.orders.append(order)
        self.count += len(phys)


class Survey:
    """What *pages* hold.

    Args:
        pages: an image, or a live memory.
        formats: whether to decode the subtrees' blobs.

    Attributes:
        pages: as given.
        violations: what is wrong, in the order found; of one rule the first 1,000 are listed.
        warnings: what works, but no kernel would write.
        fdt: the root tree, None if it cannot be read.
        compatible: its strings.
        map_phys: where the map begins, 0 if nobody says so.
        scratch: ``[(phys, nbytes), ...]`` as listed, areas of size 0 included.
        phys, orders: preserved blocks in the order of the walk; ``uint64``, ``uint8``.
        illegal_keys: ``[(key, phys of its leaf), ...]``.
        map_pages: pages of the map, in the order of the walk.
        subtrees: children of the root tree with users' data.
        touched: [start, end) of what was read: the format's own data, not what it preserves.
    """

    def __init__(self, pages: Pages, *, formats: bool = True) -> None:
        self.pages = pages
        self.ram: Ram = pages.ram
        self.generation = _abi.generation(pages.abi)
        self.violations: list[Violation] = []
        self.warnings: list[Violation] = []
        self._counts: dict[tuple[str, str], int] = {}
        self.fdt: Fdt | None = None
        self.compatible: list[str] = []
        self.map_phys = 0
        self.scratch: list[tuple[int, int]] = []
        self.illegal_keys: list[tuple[int, int]] = []
        self.map_pages: list[MapPage] = []
        self.subtrees: list[Subtree] = []
        self.touched: list[tuple[int, int]] = []
        # Honest data is read about once; what overlaps itself must not cost its square.
        self._budget = _READ_MIN + 4 * getattr(pages, "nbytes", 1 << 60)
        self._found = _Found()
        self._read_root()
        self._read_scratch()
        if self.map_phys:
            if self.generation.bitmap_bytes is None:
                self._read_radix()
            else:
                self._read_chunks()
        none: list[Any] = []
        self.phys: NDArray[np.uint64] = np.concatenate([np.zeros(0, np.uint64), *self._found.phys])
        self.orders: NDArray[np.uint8] = np.concatenate(
            [np.zeros(0, np.uint8), *self._found.orders]
        )
        self._found = _Found(none, none)
        self._check_blocks()
        self._check_map_pages()
        self._check_root_page()
        self._read_subtrees()
        if formats:
            from luo.image.formats import decode

            for subtree in self.subtrees:
                decode(self, subtree)

    # ---- notes ----

    def wrong(
        self, part: str, phys: int | None, rule: str, *, kind: str = "", count: int = 1
    ) -> None:
        """Note a violation; *kind* is what to count it under if the rule's text varies."""
        key = (part, kind or rule)
        seen = self._counts.get(key, 0)
        self._counts[key] = seen + count
        if seen < _LISTED_MAX:
            self.violations.append(Violation(part, phys, rule, count))

    def wrong_blocks(self, where: NDArray[np.intp], rule: str) -> None:
        """Note a violation of each block at these places of the walk."""
        for at in where[:_LISTED_MAX].tolist():
            phys, order = int(self.phys[at]), int(self.orders[at])
            self.wrong("map", phys, f"preserved block of order {order} {rule}", kind=rule)
        if len(where) > _LISTED_MAX:
            at = int(where[_LISTED_MAX])
            more = len(where) - _LISTED_MAX
            self.violations.append(
                Violation("map", int(self.phys[at]), f"preserved blocks {rule}", more)
            )

    # ---- reading ----

    def spend(self, part: str, phys: int, nbytes: int) -> bool:
        """Whether so much more may be read."""
        if nbytes > self._budget:
            self.wrong(part, phys, "is not read: the image's data overlaps itself many times")
            return False
        self._budget -= nbytes
        return True

    def read(self, part: str, phys: int, nbytes: int, what: str) -> bytes | None:
        """Return bytes that were written, or note why there are none."""
        if not self.spend(part, phys, nbytes):
            return None
        try:
            if self.pages.written(phys, nbytes):
                self.touched.append((phys, phys + nbytes))
                return self.pages.read(phys, nbytes)
            self.pages.read(phys, nbytes)
            self.wrong(part, phys, f"{what} was never written")
        except HandoverError as error:
            at = phys if error.phys is None else error.phys
            self.wrong(part, at, f"{what}: {error.rule}")
        return None

    def in_scratch(self, phys: int, nbytes: int) -> bool:
        """Whether any of these bytes is in a scratch area."""
        return any(phys < start + size and phys + nbytes > start for start, size in self.scratch)

    # ---- root tree ----

    def _read_root(self) -> None:
        handover, page = self.pages.handover, self.ram.page_size
        phys, room = handover.fdt_phys, handover.fdt_len
        if phys == 0 or phys % page or not self.ram.contains(phys, _FDT_HEAD):
            self.wrong("handover", phys, "root tree is misaligned or not in RAM")
            return
        if self.generation.inline:
            room = _ROOT_TREE_MAX  # its reader takes the tree's own word
        elif not self.ram.contains(phys, room):
            self.wrong("handover", phys, f"root tree's {room:#x} bytes are not all in RAM")
        elif room != page:
            self.wrong("handover", phys, f"root tree has {room:#x} bytes, not a page")
        head = self.read("root", phys, _FDT_HEAD, "root tree")
        if head is None:
            return
        magic, total = struct.unpack_from(">II", head)
        limit = min(room, _ROOT_TREE_MAX)
        if magic == 0xD00DFEED and total > room:
            self.wrong("root", phys, f"root tree says it has {total:#x} bytes, of {room:#x}")
        size = min(max(total, _FDT_HEAD), limit) if magic == 0xD00DFEED else min(page, limit)
        if size < _FDT_HEAD:
            return
        data = self.read("root", phys, size, "root tree")
        if data is None:
            return
        try:
            self.fdt = Fdt(data)
        except FdtError as error:
            at = phys + (error.offset or 0)
            self.wrong("root", at, f"root tree: {error}")
            return
        self._read_root_properties(self.fdt.root)

    def _read_root_properties(self, root: Node) -> None:
        where, generation = self.pages.handover.fdt_phys, self.generation
        if root.name:
            self.wrong("root", where, f"root node is called {root.name!r}, not ''")
        raw = bytes(root.get("compatible") or b"")
        self.compatible = [s.decode(errors="replace") for s in raw.split(b"\0")[:-1]]
        if generation.compatible not in self.compatible:
            found = raw.decode(errors="replace").rstrip("\0")
            rule = f"root tree is compatible with {found!r}, not with {generation.compatible}"
            if generation.check_compatible:
                self.wrong("root", where, rule)
            else:
                self.warnings.append(Violation("root", where, rule))
        holder: Node | None = root
        if generation.map_node is not None:
            holder = next((n for n in root.children if n.name == generation.map_node), None)
        value = None if holder is None else holder.get(generation.map_property)
        name = f"{generation.map_node or ''}/{generation.map_property}"
        if value is None:
            self.wrong("root", where, f"{name} is missing")
        elif value.nbytes != 8:
            self.wrong("root", where, f"{name} has {value.nbytes} bytes, not 8")
        else:
            self.map_phys = int.from_bytes(bytes(value), "little")
            if not self.map_phys and not generation.map_may_be_null:
                self.wrong("root", where, f"{name} is 0")

    def _check_root_page(self) -> None:
        handover, page = self.pages.handover, self.ram.page_size
        phys = handover.fdt_phys
        if self.fdt is None or self.generation.inline:
            return
        if not self.has_block(phys, 0):
            self.wrong("root", phys, "root tree is not preserved as a page")
        if self.in_scratch(phys, page):
            self.wrong("root", phys, "root tree lies in scratch")

    def _read_subtrees(self) -> None:
        if self.fdt is None:
            return
        where, generation = self.pages.handover.fdt_phys, self.generation
        names: set[str] = set()
        in_map = False
        for depth, node in self.fdt.walk():
            if depth != 1:
                if depth > 1 and generation.inline and self.subtrees and not in_map:
                    self.subtrees[-1].rows.append((depth - 1, node))
                continue
            in_map = node.name == generation.map_node
            if in_map:
                if node.name in names:
                    self.wrong("root", where, f"node {node.name} stands twice")
                names.add(node.name)
                continue
            if not node.name:
                self.wrong("root", where, "subtree has no name")
            elif node.name in names:
                self.wrong("root", where, f"subtree {node.name!r} stands twice", kind="twice")
            names.add(node.name)
            subtree = Subtree(node.name, rows=[(0, node)])
            self.subtrees.append(subtree)
            if generation.data_property is None:
                continue
            subtree.phys = self._number(node, generation.data_property)
            if generation.size_property is not None:
                subtree.nbytes = self._number(node, generation.size_property)
            elif subtree.phys is not None:
                subtree.nbytes = self._tree_size(node.name, subtree.phys)
            self._check_blob(subtree)

    def _number(self, node: Node, name: str) -> int | None:
        raw = node.get(name)
        if raw is not None and raw.nbytes == 8:
            return int.from_bytes(bytes(raw), "little")
        found = "is missing" if raw is None else f"has {raw.nbytes} bytes, not 8"
        self.wrong(node.name, self.pages.handover.fdt_phys, f"{name} {found}")
        return None

    def _tree_size(self, name: str, phys: int) -> int | None:
        """Size of a blob of which the root tree says none: it is a tree, which knows."""
        if not self.ram.contains(phys, 8):
            self.wrong(name, phys, "blob is not in RAM")
            return None
        head = self.read(name, phys, 8, "blob")
        if head is None:
            return None
        magic, total = struct.unpack(">II", head)
        if magic == 0xD00DFEED:
            return int(total)
        # Not a tree: nobody says how long it is. It ends with its block.
        order = self.order_at(phys)
        page = self.ram.page_size
        return page - phys % page if order is None else page << order

    def _check_blob(self, subtree: Subtree) -> None:
        phys, nbytes = subtree.phys, subtree.nbytes
        if phys is None or nbytes is None:
            return
        if not self.ram.contains(phys, nbytes or 1):
            self.wrong(subtree.name, phys, f"blob of {nbytes:#x} bytes is not in RAM")
            return
        if not self.covered(phys, nbytes or 1):
            self.wrong(subtree.name, phys, f"blob of {nbytes:#x} bytes is not preserved")
        if self.in_scratch(phys, nbytes or 1):
            self.wrong(subtree.name, phys, "blob lies in scratch")

    # ---- scratch ----

    def _read_scratch(self) -> None:
        handover, page = self.pages.handover, self.ram.page_size
        phys, nbytes = handover.scratch_phys, handover.scratch_len
        entry = _abi.KHO_SCRATCH_SER.size
        if phys == 0 and nbytes == 0:
            self.warnings.append(Violation("handover", None, "no scratch: a kernel could not boot"))
            return
        if nbytes % entry:
            self.wrong("handover", phys, f"scratch array of {nbytes} bytes, not 16 an area")
        count = nbytes // entry
        if not 1 <= count <= _SCRATCH_AREAS_MAX:
            self.wrong("handover", phys, f"scratch array of {count} areas")
            return
        if phys == 0 or phys % 8 or not self.ram.contains(phys, nbytes):
            self.wrong("handover", phys, "scratch array is misaligned or not in RAM")
            return
        raw = self.read("scratch", phys, count * entry, "scratch array")
        if raw is None:
            return
        block = page << _abi.MAX_PAGE_ORDER[page]
        for start, size in _abi.KHO_SCRATCH_SER.iter_unpack(raw):
            if size:
                if start % page or size % page:
                    self.wrong("scratch", start, f"area of {size:#x} bytes: not whole pages")
                elif not self.ram.contains(start, size):
                    self.wrong("scratch", start, f"area of {size:#x} bytes is not in RAM")
                elif start % block or size % block:
                    self.warnings.append(
                        Violation("scratch", start, f"area of {size:#x} bytes: not of {block:#x}")
                    )
                for other, length in self.scratch:
                    if length and start < other + length and start + size > other:
                        self.wrong("scratch", start, f"area overlaps the one at {other:#x}")
            self.scratch.append((start, size))
        if not any(size for _, size in self.scratch):
            self.wrong("scratch", phys, "every area is empty: a kernel could not boot")

    # ---- radix tree (kho-abi 5.2) ----

    def _read_radix(self) -> None:
        page = self.ram.page_size
        geometry = self.generation.radix_geometry(page, self.pages.bugs)
        shift = page.bit_length() - 1
        seen: set[int] = set()
        stack = [(self.map_phys, geometry.levels - 1, 0, 0)]
        while stack:
            phys, level, prefix, above = stack.pop()
            what = f"node of level {level}"
            if phys % page or not self.ram.contains(phys, page):
                rule = f"slot points at {phys:#x}, which is misaligned or not in RAM"
                at = above or self.pages.handover.fdt_phys
                self.wrong("map", at, rule, kind="outside")
                continue
            if phys in seen:
                self.wrong("map", phys, f"{what} is reached twice", kind="twice")
                continue
            seen.add(phys)
            raw = self.read("map", phys, page, what)
            if raw is None:
                self.map_pages.append(MapPage("node", phys, page, level, prefix))
                continue
            if level:
                self.map_pages.append(MapPage("node", phys, page, level, prefix))
                slots = np.frombuffer(raw, np.uint64)
                width = geometry.leaf_bits + (level - 1) * geometry.slot_bits
                for slot in np.flatnonzero(slots)[::-1].tolist():
                    stack.append((int(slots[slot]), level - 1, prefix + (slot << width), phys))
            else:
                bits = np.flatnonzero(
                    np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
                )
                self.map_pages.append(MapPage("leaf", phys, page, 0, prefix, len(bits)))
                self._take_keys(phys, prefix, bits.astype(np.uint64), shift)

    def _take_keys(self, leaf: int, prefix: int, bits: NDArray[np.uint64], shift: int) -> None:
        if not len(bits) or self._too_many(len(bits), leaf):
            return
        if prefix:
            tops = np.full(len(bits), prefix.bit_length() - 1, np.int64)
        else:  # exact: a leaf's own bits are below 2**19
            tops = np.frexp(bits.astype(np.float64))[1].astype(np.int64) - 1
        legal = (tops >= 1) & (tops <= 64 - shift)
        for bit in bits[~legal].tolist():
            key = prefix + bit
            self.illegal_keys.append((key, leaf))
            self.wrong("map", leaf, f"key {key:#x} stands for no block", kind="key")
        bits, tops = bits[legal], tops[legal].astype(np.uint64)
        for top in np.unique(tops).tolist():
            mine = bits[tops == top]
            order = 64 - shift - int(top)
            # Wraps nowhere: without the marker a key has no bit above its own top.
            pfn = (mine + np.uint64(prefix)) ^ np.uint64(1 << int(top))
            self._found.add(pfn << np.uint64(shift + order), order)

    def _too_many(self, count: int, where: int) -> bool:
        if self._found.count + count <= min(_BLOCKS_MAX, self.ram.nr_pages):
            return False
        if not self._found.full:
            self._found.full = True
            self.wrong("map", where, "more blocks than memory has pages; the rest was not read")
        return True

    # ---- chunks and bitmaps (kho-abi 3.2) ----

    def _read_chunks(self) -> None:
        page = self.ram.page_size
        shift = page.bit_length() - 1
        size = self.generation.bitmap_size(page)
        capacity = _abi.chunk_capacity(page)
        seen: set[int] = set()
        listed: set[tuple[int, int]] = set()
        last = (-1, -1)
        phys, above = self.map_phys, self.pages.handover.fdt_phys
        while phys:
            if phys % page or not self.ram.contains(phys, page):
                rule = f"names the chunk {phys:#x}, which is misaligned or not in RAM"
                self.wrong("map", above, rule, kind="outside")
                return
            if phys in seen:
                self.wrong("map", phys, "chain of chunks runs in a circle, or into a bitmap")
                return
            seen.add(phys)
            raw = self.read("map", phys, page, "chunk")
            if raw is None:
                self.map_pages.append(MapPage("chunk", phys, page, 0, 0))
                return
            following, order, count = _abi.KHO_CHUNK_SER.unpack_from(raw)
            self.map_pages.append(MapPage("chunk", phys, page, order, 0))
            if count > capacity:
                self.wrong("map", phys, f"chunk of {count} bitmaps, above {capacity}")
                count = capacity
            legal = order <= 64 - shift - 1
            if not legal:
                self.wrong("map", phys, f"chunk of order {order}")
            for i in range(count if legal else 0):
                at = _abi.KHO_CHUNK_SER.size + i * _abi.KHO_CHUNK_ENTRY_SER.size
                start, bitmap = _abi.KHO_CHUNK_ENTRY_SER.unpack_from(raw, at)
                if (order, start) in listed:
                    self.wrong(
                        "map", phys + at, f"bitmap for {start:#x} stands twice", kind="twice"
                    )
                    continue
                listed.add((order, start))
                if (order, start) < last:
                    self.wrong(
                        "map", phys + at, f"bitmap for {start:#x} is out of order", kind="order"
                    )
                last = max(last, (order, start))
                self._read_bitmap(phys + at, order, start, bitmap, size, seen)
            phys, above = following, phys

    def _read_bitmap(
        self, entry: int, order: int, start: int, phys: int, size: int, seen: set[int]
    ) -> None:
        page = self.ram.page_size
        shift = page.bit_length() - 1 + order
        if phys == 0 or phys % size or not self.ram.contains(phys, size):
            rule = f"names the bitmap {phys:#x}, which is misaligned or not in RAM"
            self.wrong("map", entry, rule, kind="outside")
            return
        if phys in seen:
            self.wrong("map", phys, "bitmap is used twice", kind="twice")
            return
        seen.add(phys)
        if start % (8 * size << shift):
            rule = f"bitmap of order {order} starts at {start:#x}, not a multiple of its span"
            self.wrong("map", entry, rule, kind="start")
        raw = self.read("map", phys, size, "bitmap")
        bits: NDArray[np.intp] = np.zeros(0, np.intp)
        if raw is not None:
            bits = np.flatnonzero(np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little"))
        self.map_pages.append(MapPage("bitmap", phys, size, order, start, len(bits)))
        if not len(bits) or self._too_many(len(bits), phys):
            return
        fits = int(bits[-1]) << shift < (1 << 64) - start
        if not fits:
            self.wrong("map", entry, f"bitmap for {start:#x} names blocks above 2**64")
            bits = bits[[int(bit) << shift < (1 << 64) - start for bit in bits]]
        self._found.add(np.uint64(start) + (bits.astype(np.uint64) << np.uint64(shift)), order)

    # ---- blocks ----

    @cached_property
    def sizes(self) -> NDArray[np.uint64]:
        """Bytes of each block."""
        shift = self.ram.page_size.bit_length() - 1
        result: NDArray[np.uint64] = np.uint64(1) << (
            self.orders.astype(np.uint64) + np.uint64(shift)
        )
        return result

    @cached_property
    def _exact(self) -> NDArray[np.uint64]:
        """Address and order of each block as one number, sorted."""
        return np.sort(self.phys | self.orders)  # an order fits below the page's bits

    @cached_property
    def _coverage(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Start and last byte of each run of preserved memory."""
        by_start = np.argsort(self.phys, kind="stable")
        start = self.phys[by_start]
        if not len(start):
            return start, start
        last = np.maximum.accumulate(start + (self.sizes[by_start] - np.uint64(1)))
        fresh = np.ones(len(start), np.bool_)
        fresh[1:] = start[1:] - np.uint64(1) > last[:-1]
        ends = np.append(np.flatnonzero(fresh)[1:] - 1, len(start) - 1)
        return start[fresh], last[ends]

    def has_block(self, phys: int, order: int) -> bool:
        """Whether exactly this block is preserved."""
        if not 0 <= phys < 1 << 64 or phys % self.ram.page_size:
            return False
        key = np.uint64(phys | order)
        at = int(np.searchsorted(self._exact, key))
        return at < len(self._exact) and self._exact[at] == key

    def order_at(self, phys: int) -> int | None:
        """Order of the (smallest) preserved block that starts at *phys*, or None."""
        if not 0 <= phys < 1 << 64 or phys % self.ram.page_size:
            return None
        at = int(np.searchsorted(self._exact, np.uint64(phys)))
        if at == len(self._exact) or int(self._exact[at]) & ~63 != phys:
            return None
        return int(self._exact[at]) & 63

    def orders_at(self, phys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Order of the (smallest) preserved block that starts at each address, -1 for none."""
        exact = self._exact
        if not len(exact):
            return np.full(len(phys), -1, np.int64)
        at = np.minimum(np.searchsorted(exact, phys), len(exact) - 1)
        same = (exact[at] & ~np.uint64(63)) == phys
        return np.where(same, (exact[at] & np.uint64(63)).astype(np.int64), -1)

    def covered(self, phys: int, nbytes: int) -> bool:
        """Whether preserved blocks hold all these bytes."""
        if not 0 <= phys <= phys + nbytes < 1 << 64:
            return False
        start, last = self._coverage
        at = int(np.searchsorted(start, np.uint64(phys), "right")) - 1
        return at >= 0 and phys + max(nbytes, 1) - 1 <= int(last[at])

    def _check_blocks(self) -> None:
        if not len(self.phys):
            return
        last = self.phys + (self.sizes - np.uint64(1))  # of 64 bits: the end may be 2**64
        starts = np.array([start for start, _ in self.ram.runs], np.uint64)
        ends = np.array([end for _, end in self.ram.runs], np.uint64)
        run = np.searchsorted(starts, self.phys, "right").astype(np.intp) - 1
        inside = (run >= 0) & (last < ends[np.maximum(run, 0)]) & (last >= self.phys)
        self.wrong_blocks(np.flatnonzero(~inside), "is not in RAM")
        cap = _abi.MAX_PAGE_ORDER[self.ram.page_size]
        above = np.flatnonzero(self.orders > cap)
        if self.generation.restore_order_cap and len(above):
            rule = f"preserved block of an order above {cap}: its kernel cannot restore it"
            phys = int(self.phys[above[0]])
            self.warnings.append(Violation("map", phys, rule, len(above)))
        in_scratch = np.zeros(len(self.phys), np.bool_)
        for area, nbytes in self.scratch:
            if nbytes and area + nbytes <= 1 << 63:
                in_scratch |= (self.phys < np.uint64(area + nbytes)) & (last >= np.uint64(area))
        self.wrong_blocks(np.flatnonzero(in_scratch), "overlaps scratch")
        # Overlap: sorted by start (larger first), a block that begins before an earlier one ends.
        order = np.lexsort((np.uint64(64) - self.orders, self.phys))
        reach = np.maximum.accumulate(last[order])
        clash = np.flatnonzero(self.phys[order][1:] <= reach[:-1]) + 1
        self.wrong_blocks(np.sort(order[clash]), "overlaps another preserved block")

    def _check_map_pages(self) -> None:
        """Pages of the map lie outside scratch, preserved blocks and each other."""
        handover = self.pages.handover
        taken = {handover.fdt_phys: "the root tree"}
        page = self.ram.page_size
        array = (handover.scratch_phys, handover.scratch_phys + handover.scratch_len)
        starts, last = self._coverage
        for each in self.map_pages:
            if self.in_scratch(each.phys, each.nbytes):
                self.wrong("map", each.phys, f"{each.kind} lies in scratch")
            at = int(np.searchsorted(starts, np.uint64(each.phys + each.nbytes - 1), "right")) - 1
            if at >= 0 and int(last[at]) >= each.phys:
                self.wrong("map", each.phys, f"{each.kind} overlaps a preserved block")
            holder = each.phys - each.phys % page
            if holder in taken:
                self.wrong("map", each.phys, f"{each.kind} is {taken[holder]}")
            if each.phys < array[1] and each.phys + each.nbytes > array[0]:
                self.wrong("map", each.phys, f"{each.kind} overlaps the scratch array")
        chunks = {p.phys for p in self.map_pages if p.kind == "chunk"}
        for each in self.map_pages:
            if each.kind == "bitmap" and each.phys - each.phys % page in chunks:
                self.wrong("map", each.phys, "bitmap overlaps a chunk")
        phys, nbytes = array[0], array[1] - array[0]
        if nbytes and self.overlaps_preserved(phys, nbytes):
            self.wrong("scratch", phys, "scratch array overlaps a preserved block")

    def overlaps_preserved(self, phys: int, nbytes: int) -> bool:
        """Whether a preserved block holds any of these bytes."""
        if not 0 <= phys <= phys + nbytes < 1 << 64:
            return False
        starts, last = self._coverage
        at = int(np.searchsorted(starts, np.uint64(phys + max(nbytes, 1) - 1), "right")) - 1
        return at >= 0 and int(last[at]) >= phys

    # ---- what matters ----

    def spans(self, *, preserved: bool = True) -> list[tuple[int, int]]:
        """Return [start, end) of all pages that matter, in RAM, sorted and disjoint.

        Args:
            preserved: False: only the format's own: root tree, map, scratch array.
        """
        handover, page = self.pages.handover, self.ram.page_size

        def pages(phys: int, nbytes: int) -> tuple[int, int]:
            return phys // page * page, -(-(phys + nbytes) // page) * page

        spans = [pages(p.phys, p.nbytes) for p in self.map_pages]
        total = page if self.fdt is None else self.fdt.totalsize
        spans.append(pages(handover.fdt_phys, total))
        spans.append(pages(handover.scratch_phys, min(handover.scratch_len, 1 << 20)))
        if preserved:
            spans += self.preserved_runs()
            for subtree in self.subtrees:
                if subtree.phys is not None and subtree.nbytes is not None:
                    spans.append(pages(subtree.phys, subtree.nbytes))
        return list(clip_spans(merge_spans(spans), self.ram))

    def preserved_runs(self) -> list[tuple[int, int]]:
        """Return [start, end) of preserved memory, sorted and disjoint."""
        starts, last = self._coverage
        return list(zip(starts.tolist(), [end + 1 for end in last.tolist()], strict=True))

    def own_spans(self) -> list[tuple[int, int]]:
        """Return [start, end) of the pages that were read to learn all this."""
        page = self.ram.page_size
        spans = [(start // page * page, -(-end // page) * page) for start, end in self.touched]
        return list(clip_spans(merge_spans([*spans, *self.spans(preserved=False)]), self.ram))

    def iter_blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (phys, order) of each block in the order of the walk."""
        yield from zip(self.phys.tolist(), self.orders.tolist(), strict=True)
