"""The boot of Linux 7.3 on an image: what it reads, in its order, trusting what it trusts.

For each step: what the kernel checks, what it follows unseen, and what becomes of that; facts are
those of :mod:`luo.image.rules`. All bytes are hostile: every chain is bounded, every page of
records is read once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from luo import abi as _abi
from luo.errors import FdtError, HandoverError
from luo.fdt import Fdt, Node
from luo.image.formats import STRUCTS
from luo.image.rules import RULES
from luo.image.store import Image
from luo.image.survey import Survey
from luo.image.verdict import Problem, Target
from luo.kho import Handover

__all__ = ["BootPath"]

_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
_FIXMAP_PAGES: Final = 65  # of 4 KiB: NR_FIX_BTMAPS of arm64
_REGIONS: Final = 128  # INIT_MEMBLOCK_MEMORY_REGIONS
_SECTION_BITS: Final = {4096: 27, 16384: 27, 65536: 29}  # arm64
_STRUCT_PAGE: Final = 64
_EARLY_ROOM: Final = 96 << 10  # what else is allocated before the memmap, and after it: measured
_LATE_ROOM: Final = 128 << 10
_TIGHT: Final = 2 * _MIB
_MEMORY_MIN: Final = 4 * _MIB
_LISTED_MAX: Final = 20  # of one rule; those beyond are counted
_MAX_SEALS: Final = 0x3F
_SEAL_EXEC: Final = 0x20
_SEAL_EXEC_BRINGS: Final = 0x1E
_SIGNED: Final = 1 << 63
_READ_MIN: Final = 64 * _MIB
_TREE_MAX: Final = 1 * _MIB
_DIRTY: Final = 1
_UPTODATE: Final = 2
_SHIFT_MAX: Final = 20  # orders of vmalloc beyond are shifted out of an int


class _AsRead:
    """An image with the root tree as the kernel reads it: to be surveyed as kho-v4."""

    def __init__(self, image: Image, root: bytes) -> None:
        page = image.page_size
        four = image.handover
        self.ram, self.abi, self.bugs = image.ram, "kho-v4", frozenset[str]()
        self.nbytes = image.nbytes
        self.handover = Handover(
            four.fdt_phys // page * page, len(root), four.scratch_phys, four.scratch_len
        )
        self._image = image
        self._root = root

    def written(self, phys: int, nbytes: int) -> bool:
        """Whether there is something to read."""
        return phys == self.handover.fdt_phys or self._image.kept(phys, nbytes)

    def read(self, phys: int, nbytes: int) -> bytes:
        """Return the bytes."""
        if phys == self.handover.fdt_phys and nbytes <= len(self._root):
            return self._root[:nbytes]
        return self._image.read(phys, nbytes)


def _contains(value: bytes, text: bytes) -> bool:
    """Whether a list of strings has one, as ``fdt_stringlist_contains()`` looks.

    It compares one byte more than the list may have; in a tree that is padding.
    """
    padded = value + b"\0"
    at = 0
    while len(value) - at >= len(text):
        if padded[at : at + len(text) + 1] == text + b"\0":
            return True
        nul = value.find(b"\0", at)
        if nul < 0:
            return False
        at = nul + 1
    return False


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="backslashreplace")


class BootPath:
    """One boot of *target* on *image*.

    Attributes:
        ram: the target's memory.
        scratch: areas that have a byte.
        survey: what the map holds.
        exact: address and order of each block as one number, sorted.
        walked: pages of blocks that a chain has.
        used: page of records to what it holds; each can be restored once.
        taken: starts and ends of folios by file, for the same reason.
    """

    def __init__(self, image: Image, target: Target) -> None:
        self.image = image
        self.target = target
        self.page = image.page_size
        self._found: list[Problem] = []
        self._counts: dict[str, int] = {}
        self.scratch: list[tuple[int, int]] = []
        self.used: dict[int, str] = {}
        self.walked: set[int] = set()
        self.taken: list[tuple[str, NDArray[np.uint64], NDArray[np.uint64]]] = []
        # Honest records are read about once; what overlaps itself must not cost its square.
        self._budget = _READ_MIN + 4 * image.nbytes

    def strike(self, rule: str, what: str, phys: int | None = None, count: int = 1) -> None:
        """Note that a rule strikes."""
        listed = self._counts.get(rule, 0)
        self._counts[rule] = listed + count
        if listed < _LISTED_MAX:
            self._found.append(Problem(RULES[rule], what, phys, count))

    def problems(self) -> list[Problem]:
        """Return what was found, in the order of the boot."""
        rows = sorted(self._found, key=lambda problem: problem.rule.stage)
        for rule, count in self._counts.items():
            mine = [i for i, problem in enumerate(rows) if problem.rule.id == rule]
            more = count - sum(rows[i].count for i in mine)
            if more:
                rows[mine[-1]] = replace(rows[mine[-1]], count=rows[mine[-1]].count + more)
        return rows

    def walk(self) -> None:
        """Go through the boot, as far as there is something to read."""
        if self.target.page_size != self.page:
            self.strike(
                "target.page-size",
                f"pages of {self.page} bytes for a kernel with {self.target.page_size}",
            )
            return
        self.ram = self.target.ram(self.image)
        root = self._chosen() and self._root()
        if not root:
            return
        self._scratch()
        self.survey = Survey(_AsRead(self.image, root), formats=False)
        fdt = self.survey.fdt
        if fdt is None or not self.survey.map_phys:
            self.strike("root.structure", "root tree cannot be read", self.image.handover.fdt_phys)
            return
        self.exact = np.sort(self.survey.phys | self.survey.orders)
        if not self._nodes():
            return
        self._keys()
        self._scratch_against_map()
        self._loaded()
        self._reserve_mem(fdt.root)
        self._luo(fdt.root)
        self._others(fdt.root)
        self._shared()

    # ---- memory ----

    def read(self, phys: int, nbytes: int, what: str) -> bytes | None:
        """Return bytes that are in memory, or None if the image has them not."""
        if nbytes > self._budget:
            self.strike("image.page", f"{what} is not read: it names the same many times", phys)
            return None
        self._budget -= nbytes
        try:
            return self.image.read(phys, nbytes)
        except HandoverError as error:
            self.strike("image.page", f"{what}: {error.rule}", error.phys)
            return None

    def record_page(self, part: str, phys: int, what: str) -> bool:
        """Take the page of a record, which is restored and freed once.

        Returns:
            bool: whether what stands in it can be relied on.
        """
        page = phys // self.page * self.page
        if page in self.used:
            self.strike("page.shared", f"{what} lies in the page of {self.used[page]}", phys)
            return False
        self.used[page] = what
        if self.order_at(page) is not None:
            return True
        if self.survey.covered(page, self.page):
            self.strike(f"{part}.key", f"{what} has no key of its own", phys)
            return True
        self.strike(f"{part}.preserved", f"{what} is not preserved", phys)
        return True

    def order_at(self, phys: int) -> int | None:
        """Order that the kernel finds at a page: that of the smallest block; None without one."""
        at = int(np.searchsorted(self.exact, np.uint64(phys)))
        if at == len(self.exact) or int(self.exact[at]) & ~63 != phys:
            return None
        return int(self.exact[at]) & 63

    def orders_at(self, phys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The same for many, -1 for none."""
        if not len(self.exact):
            return np.full(len(phys), -1, np.int64)
        at = np.minimum(np.searchsorted(self.exact, phys), len(self.exact) - 1)
        found = self.exact[at]
        same = (found & ~np.uint64(63)) == phys
        return np.where(same, (found & np.uint64(63)).astype(np.int64), -1)

    # ---- device tree, root tree ----

    def _chosen(self) -> bool:
        if self.target.device_tree is None:
            return True
        try:
            tree = Fdt(self.target.device_tree)
            chosen = tree.node("/chosen").properties if "/chosen" in tree else {}
            cells = [
                int.from_bytes(bytes(tree.root.get(name) or default), "big")
                for name, default in (
                    ("#address-cells", b"\x02"), ("#size-cells", b"\x01"),
                )
            ]  # fmt: skip
        except FdtError as error:
            self.strike("chosen.missing", f"device tree: {error}")
            return False
        four: list[int] = []
        for name in (_abi.CHOSEN_FDT, _abi.CHOSEN_SCRATCH):
            if name not in chosen:
                self.strike("chosen.missing", f"/chosen has no {name}")
                return False
            raw = bytes(chosen[name])
            if len(raw) != 4 * sum(cells):
                self.strike("chosen.size", f"/chosen/{name} has {len(raw)} bytes")
                return False
            split = 4 * cells[0]
            four += [int.from_bytes(raw[:split], "big"), int.from_bytes(raw[split:], "big")]
        if tuple(four) != self.image.handover.numbers:
            self.strike("chosen.other", "/chosen names other addresses than the image")
            return False
        return True

    def _window(self, rule: str, what: str, phys: int, nbytes: int) -> int:
        """End of what an early mapping shows; 0 if there can be none."""
        page = self.page
        end = -(-(phys + nbytes) // page) * page
        if not nbytes or end >> 64 or (end - phys // page * page) // page > _FIXMAP_PAGES:
            self.strike(rule, f"{what} of {nbytes:#x} bytes cannot be mapped", phys)
            return 0
        return end

    def _root(self) -> bytes | None:
        """Bytes of the root tree as far as they are mapped, with a total size to match."""
        phys, nbytes = self.image.handover.fdt_phys, self.image.handover.fdt_len
        end = self._window("root.window", "root tree", phys, nbytes)
        if not end:
            return None
        if not self.ram.contains(phys, 40):
            self.strike("root.memory", "root tree is not in RAM", phys)
            return None
        while not self.ram.contains(phys, end - phys):
            end -= self.page
        head = self.read(phys, 40, "root tree")
        if head is None:
            return None
        magic, total, at, strings, reserve, version, last, _, strings_len, nbytes = struct.unpack(
            ">10I", head
        )
        if version < 17:  # it has no size of its own there
            nbytes = 0

        def outside(start: int, size: int) -> bool:
            return not 40 <= start <= start + size <= total

        rule = (
            "is not 8-byte aligned" if phys % 8
            else f"has magic {magic:#x}" if magic != 0xD00DFEED
            else f"is of version {version}, compatible with {last}"
            if version < 2 or last > 17 or version < last
            else f"says it has {total:#x} bytes" if not 40 <= total < 1 << 31
            else "has a block outside itself or misaligned"
            if reserve % 8 or at % 4
            or outside(reserve, 0) or outside(at, nbytes) or outside(strings, strings_len)
            else ""
        )  # fmt: skip
        if rule:
            self.strike("root.header", f"root tree {rule}", phys)
            return None
        need = max(at + nbytes, strings + strings_len)
        if phys + need > end:
            self.strike("root.beyond", f"root tree has {need:#x} bytes, of {end - phys:#x}", phys)
            return None
        data = self.read(phys, end - phys, "root tree")
        if data is None:
            return None
        root = data[:4] + struct.pack(">I", len(data)) + data[8:]
        try:
            tree = Fdt(root).root
        except FdtError as error:
            self.strike("root.structure", f"root tree: {error}", phys + (error.offset or 0))
            return None
        return root if self._root_properties(tree) else None

    def _root_properties(self, tree: Node) -> bool:
        phys = self.image.handover.fdt_phys
        raw = bytes(tree.get("compatible") or b"")
        if not _contains(raw, b"kho-v4"):
            self.strike("root.compatible", f"root tree is compatible with {_text(raw)!r}", phys)
        value = tree.get("preserved-memory-map")
        if value is None or value.nbytes != 8:
            found = "is missing" if value is None else f"has {value.nbytes} bytes"
            self.strike("map.property", f"preserved-memory-map {found}", phys)
            return False
        if not any(bytes(value)):
            self.strike("map.property", "preserved-memory-map is 0", phys)
            return False
        return True

    # ---- scratch ----

    def _scratch(self) -> None:
        phys, nbytes = self.image.handover.scratch_phys, self.image.handover.scratch_len
        if not self._window("scratch.window", "scratch array", phys, nbytes):
            return
        if not self.ram.contains(phys, nbytes):
            self.strike("scratch.array-memory", "scratch array is not in RAM", phys)
            return
        entry = _abi.KHO_SCRATCH_SER
        raw = self.read(phys, nbytes // entry.size * entry.size, "scratch array")
        if raw is None:
            return
        areas = [area for area in entry.iter_unpack(raw) if area[1]]
        self.scratch = [(s, min(n, (1 << 64) - s)) for s, n in areas]
        if not self.scratch:
            self.strike("scratch.none", f"none of {nbytes // entry.size} areas has a byte", phys)
            return
        self._scratch_regions(phys)
        top = max(start + size for start, size in self.scratch)
        block = self.page << _abi.MAX_PAGE_ORDER[self.page]
        for start, size in self.scratch:
            if not self.ram.contains(start, size):
                rule = "memory" if start + size == top else "hole"
                self.strike(f"scratch.{rule}", f"area of {size:#x} bytes is not in RAM", start)
            elif (start + size) % self.page:
                self.strike("scratch.page", f"area of {size:#x} bytes ends within a page", start)
            elif start % block or size % block:
                self.strike("scratch.aligned", f"area of {size:#x} bytes: not of {block:#x}", start)

    def _scratch_regions(self, phys: int) -> None:
        """Count the pieces of the kernel's table of memory while areas are marked in it."""
        marks: list[tuple[int, int]] = []
        for i, (start, size) in enumerate(self.scratch):
            low, high = start, start + size
            apart = []
            for a, b in marks:
                if a <= high and low <= b:
                    low, high = min(a, low), max(b, high)
                else:
                    apart.append((a, b))
            marks = [*apart, (low, high)]
            if _pieces(self.ram.runs, marks) + 2 > _REGIONS:
                self.strike("scratch.areas", f"area {i} of {len(self.scratch)} has no place", phys)
                del self.scratch[i:]
                return

    def _scratch_against_map(self) -> None:
        """Size of scratch, and what lies in it that should not."""
        survey, page = self.survey, self.page
        usable = 0
        loaded = [
            span for span in (self.target.kernel, self.target.initrd, self.target.device_tree_at)
            if span is not None
        ]  # fmt: skip
        for start, size in self.scratch:
            if self.ram.contains(start, size):
                usable += size - sum(_common(start, size, *span) for span in loaded)
            if survey.overlaps_preserved(start, size):
                self.strike(
                    "scratch.preserved", f"area of {size:#x} bytes has preserved pages", start
                )
        inside = [
            each.phys for each in survey.map_pages
            if any(_common(start, size, each.phys, page) for start, size in self.scratch)
        ]  # fmt: skip
        if inside:
            self.strike("scratch.tree", "page of the map lies in scratch", inside[0], len(inside))
        phys, nbytes = self.image.handover.scratch_phys, self.image.handover.scratch_len
        if survey.overlaps_preserved(phys, nbytes):
            self.strike("scratch.array", "scratch array lies in a preserved page", phys)
        if not usable:
            return
        tables = 8 * self.ram.nr_pages
        memmap = _STRUCT_PAGE * (self._sections_bytes() // page)
        left = max(0, memmap - self._extension())
        need = max(tables + _EARLY_ROOM, left and tables + left + _EARLY_ROOM + _LATE_ROOM)
        if usable < need:
            self.strike("scratch.small", f"scratch has {usable:#x} bytes, of {need:#x}", phys)
        elif usable < need + _TIGHT:
            self.strike("scratch.tight", f"scratch has {usable:#x} bytes, above {need:#x}", phys)

    def _sections(self) -> list[tuple[int, int]]:
        """[first, last] numbers of sections that have RAM."""
        bits = _SECTION_BITS[self.page]
        runs: list[tuple[int, int]] = []
        for start, end in self.ram.runs:
            first, last = start >> bits, (end - 1) >> bits
            if runs and first <= runs[-1][1] + 1:
                runs[-1] = (runs[-1][0], last)
            else:
                runs.append((first, last))
        return runs

    def _sections_bytes(self) -> int:
        bits = _SECTION_BITS[self.page]
        return sum(last - first + 1 for first, last in self._sections()) << bits

    def _extension(self) -> int:
        """Bytes of RAM in blocks of 1 GiB without preserved pages and pages of the map."""
        busy = {each.phys // _GIB for each in self.survey.map_pages}
        for start, end in self.survey.preserved_runs():
            for run_start, run_end in self.ram.runs:
                low, high = max(start, run_start), min(end, run_end)
                if low < high:
                    busy.update(range(low // _GIB, (high - 1) // _GIB + 1))
        return sum(
            nbytes
            for start, end in self.ram.runs
            for block, nbytes in _by_block(start, end)
            if block not in busy
        )

    # ---- the map ----

    def _nodes(self) -> bool:
        """Whether every page of the map can be followed."""
        survey, page = self.survey, self.page
        if survey.map_phys % page:
            self.strike("map.misaligned", "the map begins within a page", survey.map_phys)
            return False
        if not self.ram.contains(survey.map_phys, page):
            self.strike("map.node", "the map does not begin in RAM", survey.map_phys)
            return False
        reached = [survey.map_phys]
        fine = True
        for each in survey.map_pages:
            if not self.image.kept(each.phys, page):
                self.read(each.phys, page, "page of the map")
                fine = False
                continue
            if each.kind != "node" or each.level == 0:
                continue
            slots = np.frombuffer(self.image.read(each.phys, page), np.uint64)
            for slot in np.flatnonzero(slots).tolist():
                below = int(slots[slot])
                at = each.phys + 8 * slot
                if not self.ram.contains(below, page):
                    self.strike("map.node", f"slot names {below:#x}, which is not in RAM", at)
                    fine = False
                elif below % page:
                    self.strike("map.misaligned", f"slot names {below:#x}", at)
                    fine = False
                else:
                    reached.append(below)
        once: set[int] = set()
        for below in reached:
            if below in once:
                self.strike("map.twice", "page of the map is reached twice", below)
                fine = False
            once.add(below)
        listed = sum(each.keys for each in survey.map_pages if each.kind == "leaf")
        if listed != len(survey.phys) + len(survey.illegal_keys):
            self.strike("map.unread", f"{listed:,} keys", survey.map_phys)
            fine = False
        return fine

    def _keys(self) -> None:
        survey = self.survey
        for key, leaf in survey.illegal_keys:
            phys = self._as_decoded(key)
            rule = "map.key-inside" if self._has_memmap(phys) else "map.key"
            self.strike(rule, f"key {key:#x} is decoded as {phys:#x}", leaf)
        bits = _SECTION_BITS[self.page]
        runs = self._sections()
        firsts = np.array([first for first, _ in runs], np.uint64)
        lasts = np.array([last for _, last in runs], np.uint64)

        def present(phys: NDArray[np.uint64]) -> NDArray[np.bool_]:
            section = phys >> np.uint64(bits)
            at = np.searchsorted(firsts, section, "right").astype(np.intp) - 1
            inside: NDArray[np.bool_] = (at >= 0) & (section <= lasts[np.maximum(at, 0)])
            return inside

        where = survey.phys
        last = where + (survey.sizes - np.uint64(1))
        mapped = present(where)
        self._blocks_strike(np.flatnonzero(~mapped), "map.block", "has no memmap")
        starts = np.array([start for start, _ in self.ram.runs], np.uint64)
        ends = np.array([end for _, end in self.ram.runs], np.uint64)
        run = np.searchsorted(starts, where, "right").astype(np.intp) - 1
        inside = (run >= 0) & (last < ends[np.maximum(run, 0)]) & (last >= where)
        self._blocks_strike(np.flatnonzero(mapped & ~inside), "map.beyond", "is not all in RAM")
        # Sorted by start, larger first: a block that begins before an earlier one ends.
        order = np.lexsort((np.uint64(64) - survey.orders, where))
        reach = np.maximum.accumulate(last[order]) if len(order) else last
        clash = np.flatnonzero(where[order][1:] <= reach[:-1]) + 1
        same = where[order][clash] == where[order][clash - 1]
        self._blocks_strike(order[clash[same]], "map.two-orders", "begins a larger one")
        self._blocks_strike(order[clash[~same]], "map.overlap", "overlaps another")
        held = sum(
            max(0, min(end, high) - max(start, low))
            for start, end in survey.preserved_runs()
            for low, high in self.ram.runs
        )
        free = self.ram.nr_pages * self.page - held
        if free < _MEMORY_MIN:
            self.strike("map.all", f"{free:#x} bytes of memory are left")
        fdt = self.image.handover.fdt_phys
        if not survey.covered(fdt, 40):
            self.strike("root.preserved", "root tree is not preserved", fdt)

    def _blocks_strike(self, where: NDArray[np.intp], rule: str, text: str) -> None:
        for n, at in enumerate(where[: _LISTED_MAX + 1].tolist()):
            phys, order = int(self.survey.phys[at]), int(self.survey.orders[at])
            more = len(where) - n if n == _LISTED_MAX else 1
            self.strike(rule, f"block of order {order} {text}", phys, more)

    def _as_decoded(self, key: int) -> int:
        """Address of a key as the kernel computes it, with shifts that wrap."""
        shift = (64 - (key.bit_length() - 1)) % 64  # PAGE_SHIFT and the order
        return (key << shift) % (1 << 64)

    def _has_memmap(self, phys: int) -> bool:
        section = phys >> _SECTION_BITS[self.page]
        return any(first <= section <= last for first, last in self._sections())

    def _loaded(self) -> None:
        """Whether what the loader puts into memory meets what was preserved."""
        for rule, span in (
            ("boot.kernel", self.target.kernel),
            ("boot.initrd", self.target.initrd),
            ("boot.device-tree", self.target.device_tree_at),
        ):
            if span is None:
                continue
            own = [each.phys for each in self.survey.map_pages]
            hit = [phys for phys in own if _common(*span, phys, self.page)]
            if self.survey.overlaps_preserved(*span) or hit:
                what = "page of the map" if hit else "preserved page"
                at = f"{span[0]:#x}+{span[1]:#x}"
                self.strike(rule, f"{what} in {at}", hit[0] if hit else None)

    # ---- subtrees ----

    def _subtree(self, root: Node, name: str) -> tuple[int, int] | str | None:
        """Address and bytes of a subtree's blob; what is wrong; or None: it is not there."""
        node = next(
            (n for n in root.children if n.name == name or n.name.startswith(f"{name}@")), None
        )
        if node is None:
            return None
        numbers = []
        for prop in ("preserved-data", "blob-size"):
            raw = node.get(prop)
            if raw is None or raw.nbytes != 8:
                found = "is missing" if raw is None else f"has {raw.nbytes} bytes"
                return f"{prop} of subtree {name} {found}"
            numbers.append(int.from_bytes(bytes(raw), "little"))
        return numbers[0], numbers[1]

    def _others(self, root: Node) -> None:
        found = self._subtree(root, _abi.KHO_SUBTREE_METADATA)
        layout, _ = STRUCTS["kexec-metadata"]
        if not self.target.kho:
            return
        if isinstance(found, str):
            self.strike("metadata.size", found)
        elif found is not None:
            phys, nbytes = found
            if nbytes >= 4 and not self.ram.contains(phys, 4):
                self.strike("metadata.memory", "kexec-metadata is not in RAM", phys)
            elif nbytes < 4:
                self.strike("metadata.size", f"kexec-metadata of {nbytes} bytes", phys)
            elif (raw := self.read(phys, 4, "kexec-metadata")) is not None:
                version = int.from_bytes(raw, "little")
                if version != 1:
                    self.strike("metadata.version", f"kexec-metadata of version {version}", phys)
                elif nbytes < layout.size:
                    self.strike("metadata.size", f"kexec-metadata of {nbytes} bytes", phys)
        asked = {"LUO", _abi.KHO_SUBTREE_METADATA}
        if self.target.reserve_mem:
            asked.add("memblock")
        for node in root.children:
            if node.name.split("@")[0] not in asked:
                self.strike("subtree.unread", f"subtree {node.name[:64]}")

    def _reserve_mem(self, root: Node) -> None:
        for name, nbytes, align in self.target.reserve_mem:
            wrong = self._region(root, name, nbytes, align)
            if wrong:
                self.strike("memblock.region", f"region {name}: {wrong}")

    def _region(self, root: Node, name: str, nbytes: int, align: int) -> str:
        found = self._subtree(root, "memblock")
        if not isinstance(found, tuple):
            return found or "there is no subtree memblock"
        phys, _ = found
        if not self.ram.contains(phys, 40):
            self.strike("memblock.memory", "memblock's blob is not in RAM", phys)
            return ""
        blob = self.read(phys, 40, "memblock's blob")
        if blob is not None:
            total = min(int.from_bytes(blob[4:8], "big"), _TREE_MAX)
            blob = self.read(phys, max(40, total), "memblock's blob")
        if blob is None:
            return ""
        try:
            tree = Fdt(blob).root
        except FdtError as error:
            return f"blob is no tree: {error}"
        node = next((n for n in tree.children if n.name == name), None)
        if not _contains(bytes(tree.get("compatible") or b""), b"memblock-v1"):
            return "blob is not compatible with memblock-v1"
        if node is None:
            return "the blob has it not"
        if not _contains(bytes(node.get("compatible") or b""), b"reserve-mem-v1"):
            return "is not compatible with reserve-mem-v1"
        values = [bytes(node.get(prop) or b"") for prop in ("start", "size")]
        if any(len(value) != 8 for value in values):
            return "start or size has not 8 bytes"
        start, has = (int.from_bytes(value, "little") for value in values)
        if start & (align - 1):
            return f"begins at {start:#x}, not aligned to {align:#x}"
        return "" if has == nbytes else f"has {has:#x} bytes, not {nbytes:#x}"

    # ---- LUO ----

    def _luo(self, root: Node) -> None:
        if not self.target.kho:
            self.strike("target.kho", "the kernel is to run with kho=off")
            return
        found = self._subtree(root, "LUO")
        if found is None:
            self.strike("luo.missing", "there is no subtree LUO")
            return
        if isinstance(found, str):
            self.strike("luo.property", found)
            return
        phys, nbytes = found
        layout, _ = STRUCTS["luo"]
        if nbytes < layout.size:
            self.strike("luo.size", f"LUO's blob has {nbytes} bytes, of {layout.size}", phys)
            return
        if not self.ram.contains(phys, layout.size):
            self.strike("luo.memory", "LUO's blob is not in RAM", phys)
            return
        raw = self.read(phys, layout.size, "LUO's blob")
        if raw is None or not self.record_page("luo", phys, "LUO's blob"):
            return
        compatible, _, sessions_pa, flbs_pa = layout.unpack(raw)
        if compatible[:7] != b"luo-v5\0":
            self.strike("luo.compatible", f"LUO's blob is {_text(compatible)!r}", phys)
            return
        blocks = self._chain("sessions", sessions_pa, 80, "sessions")
        if not self.target.liveupdate:
            self.strike("target.liveupdate", "the kernel is to run with liveupdate=off")
            return
        files = None if blocks is None else self._sessions(blocks)
        self._flbs(flbs_pa, files)

    def _blocks(self, part: str, head: int, what: str) -> list[tuple[int, int]] | None:
        """Follow a chain of blocks: (phys, count) of each; None if that cannot be done."""
        blocks: list[tuple[int, int]] = []
        pages: set[int] = set()
        phys = head
        try:
            while phys and len(blocks) <= 2 * _abi.KHO_BLOCKS_MAX:
                page = phys // self.page
                if not self.ram.contains(phys, self.page):
                    self.strike(f"{part}.memory", f"block of {what} is not in RAM", phys)
                    return None
                if page in pages:
                    self.strike(f"{part}.cycle", f"chain of {what} runs in a circle", phys)
                    return None
                if page in self.walked:  # or sessions that share a chain would cost their product
                    self.strike("page.shared", f"block of {what} is one of another chain", phys)
                    return None
                pages.add(page)
                raw = self.read(phys, _abi.KHO_BLOCK_SER.size, f"block of {what}")
                if raw is None:
                    return None
                following, count = _abi.KHO_BLOCK_SER.unpack(raw)
                blocks.append((phys, count))
                phys = following
        finally:
            self.walked |= pages
        return blocks

    def _chain(self, part: str, head: int, entry: int, what: str) -> list[tuple[int, bytes]] | None:
        """Return (phys, records) of each block of a chain; None if the kernel refuses it."""
        capacity = _abi.block_capacity(entry, self.page)
        blocks = self._blocks(part, head, what)
        if blocks is None:
            return None
        for i, (phys, count) in enumerate(blocks):
            if not 1 <= count <= capacity:
                text = f"block {i} of {what} has {count} entries, not 1..{capacity}"
                self.strike(f"{part}.count", text, phys)
                return None
            if i == _abi.KHO_BLOCKS_MAX:
                self.strike(f"{part}.many", f"chain of {what} has more than {i:,} blocks", head)
                return None
        result = []
        for phys, count in blocks:
            if not self.record_page(part, phys, f"block of {what}"):
                return None
            raw = self.read(phys + _abi.KHO_BLOCK_SER.size, count * entry, f"block of {what}")
            if raw is None:
                return None
            result.append((phys + _abi.KHO_BLOCK_SER.size, raw))
        return result

    def _sessions(self, blocks: list[tuple[int, bytes]]) -> int | None:
        """Judge each session; the number of files, None if opening the device fails."""
        layout, _ = STRUCTS["session"]
        names: set[bytes] = set()
        nr_files: int | None = 0
        for at, raw in blocks:
            for i, (name, files_pa, count) in enumerate(layout.iter_unpack(raw)):
                phys = at + layout.size * i
                if b"\0" not in name:
                    self.strike("session.name", f"session {_text(name)!r}: no NUL", phys)
                name = name[:63].split(b"\0", 1)[0]
                if name in names:
                    self.strike("session.duplicate", f"session {_text(name)!r} stands twice", phys)
                    nr_files = None
                names.add(name)
                files = self._files(_text(name), phys, files_pa, count)
                nr_files = None if files is None or nr_files is None else nr_files + files
        return nr_files

    def _files(self, session: str, phys: int, files_pa: int, count: int) -> int | None:
        if not files_pa:
            if count:
                text = f"session {session!r} says {count} files and has no blocks"
                self.strike("session.no-files", text, phys)
            return 0
        blocks = self._chain("files", files_pa, 64, f"files of {session!r}")
        if blocks is None:
            return None
        layout, _ = STRUCTS["file"]
        tokens: set[int] = set()
        found, fine = 0, True
        for at, raw in blocks:
            for i, (compatible, data, token) in enumerate(layout.iter_unpack(raw)):
                where = at + layout.size * i
                what = f"file {session}/{token:#x}"
                found += 1
                handler = compatible.split(b"\0", 1)[0]
                known = [h for h in self.target.handlers if h.encode() == handler]
                if not known or b"\0" not in compatible:
                    text = f"{what}: no handler for {_text(compatible)!r}"
                    self.strike("file.compatible", text, where)
                    fine = False
                    continue
                if token in tokens:
                    self.strike("file.token", f"{what}: its token stands twice", where)
                tokens.add(token)
                if known[0] == "memfd-v2":
                    self._memfd(data, what)
        if found != count:
            text = f"session {session!r} says {count} files, and has {found}"
            self.strike("session.count", text, phys)
            fine = False
        return found if fine else None

    def _flbs(self, phys: int, files: int | None) -> None:
        wanted = {name.encode(): name for name in self.target.flbs}
        if not phys:
            if files:
                for name in wanted.values():
                    self.strike("flb.missing", f"FLB {name}: there is no page of FLBs")
            return
        head, _ = STRUCTS["flbs"]
        layout, _ = STRUCTS["flb"]
        if not self.ram.contains(phys, self.page):
            if wanted:
                self.strike("flb.memory", "page of FLBs is not in RAM", phys)
            return
        raw = self.read(phys, self.page, "page of FLBs")
        if raw is None:
            return
        if not self.survey.covered(phys, self.page):
            self.strike("flb.preserved", "page of FLBs is not preserved", phys)
        _, count = head.unpack_from(raw)
        room = (self.page - head.size) // layout.size
        entries: dict[bytes, int] = {}
        for i in range(min(count, room)):
            name, _, uses = layout.unpack_from(raw, head.size + i * layout.size)
            name = name.split(b"\0", 1)[0]
            if name in entries:
                continue
            entries[name] = uses
            at = phys + head.size + i * layout.size
            text = f"FLB {_text(name)} has count {uses}"
            if name not in wanted:
                self.strike("flb.unread", f"FLB {_text(name)}", at)
            elif not uses:
                self.strike("flb.zero", text, at)
            elif files is not None and uses < files:
                self.strike("flb.count", f"{text}, for {files} files", at)
            elif files is not None and uses > files:
                self.strike("flb.left", f"{text}, for {files} files", at)
        for key, name in wanted.items():
            if key in entries:
                continue
            if count > room:
                self.strike("flb.many", f"FLB {name}: not among {room}, of {count}", phys)
            elif files:
                self.strike("flb.missing", f"FLB {name} is not there", phys)

    # ---- memfds ----

    def _memfd(self, phys: int, what: str) -> None:
        layout, _ = STRUCTS["memfd"]
        if not self.ram.contains(phys, layout.size):
            self.strike("memfd.memory", f"{what}: its record is not in RAM", phys)
            return
        raw = self.read(phys, layout.size, f"{what}: its record")
        if raw is None or not self.record_page("memfd", phys, f"{what}: its record"):
            return
        pos, size, seals, _, count, first, pages, _, order = layout.unpack(raw)
        if seals & ~_MAX_SEALS:
            self.strike("memfd.seals", f"{what}: seals {seals:#x}", phys)
            return
        entries = self._vmalloc(phys, first, pages, order, what) if count else []
        if entries is None:
            return
        if count:
            self._folios(phys, entries, self.page << order, count, size, what)
        elif size:
            self.strike("memfd.hole", f"{what}: {size:,} bytes read as zero", phys)
        if seals & _SEAL_EXEC and seals & _SEAL_EXEC_BRINGS != _SEAL_EXEC_BRINGS:
            brought = seals | _SEAL_EXEC_BRINGS
            self.strike("memfd.seal-exec", f"{what}: seals {seals:#x} become {brought:#x}", phys)
        if pos >= _SIGNED:
            self.strike("memfd.position", f"{what}: position {pos:#x} becomes 0", phys)
        if size >= _SIGNED:
            self.strike("memfd.size", f"{what}: size {size:#x} becomes {size - (1 << 64):#x}", phys)

    def _vmalloc(self, at: int, first: int, total: int, order: int, what: str) -> list[int] | None:
        """Entries of a vmalloc area; None if the kernel cannot restore it."""
        page, per_entry = self.page, 1 << min(order, _SHIFT_MAX)
        if order >= _SHIFT_MAX:
            self.strike("vmalloc.order", f"{what}: vmalloc of order {order}", at)
            return None
        entries: list[int] = []
        phys = first
        while phys:
            if not self.ram.contains(phys, page):
                self.strike("vmalloc.chunk-memory", f"{what}: chunk is not in RAM", phys)
                return None
            holder = phys // page * page
            if not self.survey.covered(holder, page):
                text = f"{what}: chunk is not preserved"
                self.strike("vmalloc.chunk-preserved", text, phys)
                return None
            raw = self.read(phys, page, f"{what}: chunk")
            if raw is None:
                return None
            words = np.frombuffer(raw, np.uint64)
            empty = np.flatnonzero(words[1:] == 0)
            here = words[1 : 1 + int(empty[0])] if len(empty) else words[1:]
            for entry in here.tolist():
                if (len(entries) + 1) * per_entry > total:
                    text = f"{what}: more entries than {total} pages of order {order}"
                    self.strike("vmalloc.pages", text, phys)
                    return None
                entries.append(entry // page * page)
                if not self._entry(entries[-1], per_entry, what):
                    return None
            if not self._once(holder, f"{what}: chunk"):
                self.strike("vmalloc.chunk-key", f"{what}: chunk has no key of its own", phys)
                return None
            phys = int(words[0])
        if len(entries) * per_entry != total or not total:
            text = f"{what}: {len(entries) * per_entry} pages in its chunks, not {total}"
            self.strike("vmalloc.pages", text, at)
            return None
        return entries

    def _entry(self, start: int, nr_pages: int, what: str) -> bool:
        """Restore the pages of an entry, in the steps that the kernel takes."""
        at, end = start, start + nr_pages * self.page
        while at < end:
            if not self._once(at, f"{what}: array"):
                self.strike("vmalloc.page-key", f"{what}: page of its array has no key", at)
                return False
            step = min((end - at) // self.page, (at // self.page & -(at // self.page)) or 1 << 52)
            at += self.page << (step.bit_length() - 1)
        return True

    def _once(self, page: int, what: str) -> bool:
        """Whether a page can be restored; then it is."""
        if page in self.used or self.order_at(page) is None or not self._has_memmap(page):
            return False
        self.used[page] = what
        return True

    def _folios(
        self, phys: int, entries: list[int], nbytes: int, count: int, size: int, what: str
    ) -> None:
        page = self.page
        room = len(entries) * nbytes // 16
        parts = []
        for at in entries:
            raw = self.read(at, nbytes, f"{what}: array") if self.ram.contains(at, nbytes) else None
            if raw is None:
                return
            parts.append(raw)
        rows = np.frombuffer(b"".join(parts), np.uint64).reshape(-1, 2)
        rest = rows[min(count, room) :]
        rows = rows[: min(count, room)]
        shift = np.uint64(page.bit_length() - 1)
        pfn_mask = np.uint64((1 << 52) - 1)
        here = np.flatnonzero(rows[:, 0] & pfn_mask)
        heads = (rows[here, 0] & pfn_mask) << shift
        flags = rows[here, 0] >> np.uint64(52)
        orders = self.orders_at(heads)
        nr_pages = np.uint64(1) << np.maximum(orders, 0).astype(np.uint64)
        index = rows[here, 1] & ~(nr_pages - np.uint64(1))

        def text(i: int, rule: str) -> str:
            return f"{what}: folio {int(here[i])} {rule}"

        if not self.target.huge_pages and (orders > 0).any():
            i = int(np.flatnonzero(orders > 0)[0])
            self.strike("folio.huge-pages", text(i, f"has order {orders[i]}"), int(heads[i]))
        bad: dict[int, tuple[str, str]] = {}
        for i in _meeting(index, nr_pages):
            bad[i] = ("folio.overlap", f"at index {int(index[i])} meets another")
        lost = np.flatnonzero(index != rows[here, 1])
        if self.target.debug_vm:
            for i in lost[:_LISTED_MAX].tolist():
                rule = f"of order {orders[i]} at index {int(rows[here[i], 1])}"
                bad[i] = ("folio.index-debug", rule)
        for i in _meeting(heads, nr_pages << shift):
            bad[i] = ("folio.key", "is memory of another of this file")
        for i in np.flatnonzero(orders < 0)[: _LISTED_MAX + 1].tolist():
            bad[i] = ("folio.key", "has no key that begins there")
        for i in sorted(bad)[:_LISTED_MAX]:
            self.strike(bad[i][0], text(i, bad[i][1]), int(heads[i]))
        if count > room:
            rule = f"{what}: {count:,} folios in an array of {room:,}"
            self.strike("memfd.array-short", rule, phys)
        if bad:
            return
        self.taken.append((what, heads, heads + (nr_pages << shift)))
        for i in lost[:_LISTED_MAX].tolist():
            rule = f"of order {orders[i]} at index {int(rows[here[i], 1])}"
            self.strike("folio.index", text(i, rule), int(heads[i]))
        for i in np.flatnonzero(~flags & np.uint64(_UPTODATE))[:_LISTED_MAX].tolist():
            self.strike("folio.stale", text(i, "is not up to date"), int(heads[i]))
        clean = np.flatnonzero(~flags & np.uint64(_DIRTY))
        if len(clean):
            i = int(clean[0])
            self.strike("folio.clean", text(i, "is not dirty"), int(heads[i]))
        if (orders > _abi.MAX_PAGE_ORDER[page]).any():
            i = int(np.argmax(orders))
            debug = "-debug" if self.target.debug_vm else ""
            self.strike(f"folio.order{debug}", text(i, f"has order {orders[i]}"), int(heads[i]))
        more = np.flatnonzero(rest[:, 0] & pfn_mask)
        if len(more) and (self.orders_at((rest[more, 0] & pfn_mask) << shift) >= 0).any():
            rule = f"{what}: {len(more)} folios behind the {count:,} of its record"
            self.strike("memfd.unused", rule, phys)
        last = np.uint64(-(-size // page))
        if (index >= last).any():
            i = int(np.argmax(index))
            self.strike("memfd.behind", text(i, "begins behind the file's end"), int(heads[i]))
        inside = np.minimum(nr_pages, last - np.minimum(index, last))
        holes = int(last) - int(inside.sum(dtype=np.uint64))
        if holes:
            self.strike("memfd.hole", f"{what}: {holes:,} pages read as zero", phys)

    def _shared(self) -> None:
        """What is memory of two files, or of a file and of records."""
        if not self.taken:
            return
        whose = np.concatenate([np.full(len(h), i) for i, (_, h, _) in enumerate(self.taken)])
        start = np.concatenate([h for _, h, _ in self.taken])
        end = np.concatenate([e for _, _, e in self.taken])
        for i in _meeting(start, end - start):
            what = self.taken[int(whose[i])][0]
            self.strike("folio.key", f"{what}: a folio is memory of another file", int(start[i]))
        by_start = np.argsort(start)
        used = np.array(sorted(self.used), np.uint64)
        at = np.searchsorted(start[by_start], used, "right").astype(np.intp) - 1
        hit = (at >= 0) & (used < end[by_start][np.maximum(at, 0)])
        for i in np.flatnonzero(hit)[:_LISTED_MAX].tolist():
            what = self.taken[int(whose[by_start[at[i]]])][0]
            page = int(used[i])
            text = f"{what}: a folio is the page of {self.used[page]}"
            self.strike("page.shared", text, page)


def _meeting(start: NDArray[np.uint64], size: NDArray[np.uint64]) -> Iterator[int]:
    """Yield places of spans that meet one that stands before them, some of them."""
    by_start = np.lexsort((np.arange(len(start)), start))
    low = start[by_start]
    last = low + (size[by_start] - np.uint64(1))
    reach = np.maximum.accumulate(last) if len(last) else last
    for at in np.flatnonzero(low[1:] <= reach[:-1])[: _LISTED_MAX + 1].tolist():
        # Of the two that meet, the later one in the file is the one that fails.
        yield int(max(by_start[at], by_start[at + 1]))


def _common(start: int, size: int, other: int, nbytes: int) -> int:
    """Bytes that two spans have in common."""
    return max(0, min(start + size, other + nbytes) - max(start, other))


def _pieces(runs: list[tuple[int, int]], marks: list[tuple[int, int]]) -> int:
    """Into how many pieces disjoint marks cut disjoint runs, marks outside of them included."""
    count = 0
    outside = set(marks)
    for start, end in runs:
        inside = [(low, high) for low, high in marks if low < end and high > start]
        outside.difference_update(inside)
        count += 1 + 2 * len(inside)
        count -= sum(low <= start for low, _ in inside) + sum(high >= end for _, high in inside)
    return count + len(outside)


def _by_block(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut [start, end) into blocks of 1 GiB: (number, bytes)."""
    while start < end:
        stop = min(end, (start // _GIB + 1) * _GIB)
        yield start // _GIB, stop - start
        start = stop
