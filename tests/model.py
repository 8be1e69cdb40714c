"""What KHO's preserving means, in dictionaries and sets; an oracle, never shipped.

Rules are those of ``kho-abi.md`` §7 with the scratch check always on. Each call returns 0 or
the errno that the real one must raise, and changes nothing unless it returns 0.
"""

import errno
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Range = tuple[int, int, int]  # (start, bytes, NUMA node)
Block = tuple[int, int]  # (phys, order)


CHUNKS = ("kho-v5-series", "kho-v1-512", "kho-v1-notifier", "kho-v1")
NUMA = ("kho-v3", "kho-v4")


def split_v5(pfn: int, nr_pages: int) -> list[Block]:
    """The cut of the v5 series, blind to alignment: what it recorded, as (pfn, order) (§2.4)."""
    blocks: list[Block] = []
    while nr_pages:
        order = nr_pages.bit_length() - 1
        blocks.append((pfn >> order << order, order))
        pfn += 1 << order
        nr_pages -= 1 << order
    return blocks


def split_pages(pfn: int, nr_pages: int, node_of: Sequence[int] | None = None) -> list[Block]:
    """Cut a run of pages into blocks, given as (pfn, order) (§7, "Range split").

    Args:
        pfn: first page.
        nr_pages: pages in the run.
        node_of: ascending first pages of the NUMA nodes after the first; None: one node.
    """

    def node(page: int) -> int:
        return sum(page >= border for border in node_of or ())

    blocks: list[Block] = []
    end = pfn + nr_pages
    while pfn < end:
        order = (end - pfn).bit_length() - 1
        while pfn % (1 << order):
            order -= 1
        while node(pfn) != node(pfn + (1 << order) - 1):
            order -= 1
        blocks.append((pfn, order))
        pfn += 1 << order
    return blocks


def parse_scratch(text: str) -> dict[str, int] | None:
    """The meaning of ``kho_scratch=`` (§8, grammar of 7.3); None if it is refused."""
    scale = re.fullmatch(r"([0-9]{1,10})%", text)
    if scale:
        percent = int(scale[1])
        return {"percent": percent} if percent < 1 << 32 else None
    number = r"(0[xX][0-9a-fA-F]+|[0-9]+)([KMGTPEkmgtpe]?)"
    fixed = re.fullmatch(",".join([number] * 3), text)
    if not fixed:
        return None
    sizes = []
    for digits, unit in zip(fixed.groups()[::2], fixed.groups()[1::2], strict=True):
        base = 16 if digits[:2].lower() == "0x" else 8 if digits[0] == "0" else 10
        sizes.append(int(digits, base) << 10 * (" KMGTPE".index(unit.upper() or " ")))
    return dict(zip(("lowmem", "global_", "pernode"), sizes, strict=True)) if any(sizes) else None


def walk_order(blocks: Iterable[Block], abi: str = "kho-v4") -> list[Block]:
    """Blocks as a walk of the map gives them, by address within an order.

    The radix tree has larger orders first (§5.2), the list of chunks smaller ones (§3.2).
    """
    sign = 1 if abi in CHUNKS else -1
    return sorted(blocks, key=lambda block: (sign * block[1], block[0]))


@dataclass
class KhoModel:
    """The preserved blocks and subtrees of one kernel.

    Attributes:
        ranges: RAM, ascending.
        scratch: (start, bytes) of each area.
        page_bytes: bytes of a page.
        preserved: the blocks.
        subtrees: name to (phys, bytes), oldest first.
        abi: generation.
        finalized: whether the map was written, where finalizing does that.
        forgot: whether an abort forgot what was preserved, so that giving it up is no error.
    """

    ranges: list[Range]
    scratch: list[tuple[int, int]]
    page_bytes: int = 4096
    preserved: set[Block] = field(default_factory=set)
    subtrees: dict[str, tuple[int, int]] = field(default_factory=dict)
    abi: str = "kho-v4"
    finalized: bool = False
    forgot: bool = False

    @property
    def closes(self) -> bool:
        """Whether finalizing closes the map until it is undone (§2.2, §3.3)."""
        return self.abi in ("kho-v5-series", "kho-v1-512", "kho-v1-notifier")

    @property
    def inline(self) -> bool:
        """Whether users' data stands in the root tree (§2.1)."""
        return self.abi == "kho-v5-series"

    def finalize(self) -> int:
        """Write the map (§2.2, §3.3)."""
        if self.abi not in CHUNKS:
            return errno.EOPNOTSUPP
        if self.closes and self.finalized:
            return errno.EEXIST
        self.finalized, self.forgot = True, False
        return 0

    def abort(self) -> int:
        """Forget every preservation and subtree (§3.3)."""
        if self.abi not in ("kho-v1-512", "kho-v1-notifier"):
            return errno.EOPNOTSUPP
        if not self.finalized:
            return errno.ENOENT
        self.preserved.clear()
        self.subtrees.clear()
        self.finalized, self.forgot = False, True
        return 0

    def unfreeze(self) -> int:
        """Open the map again; preservations stay (§2.2)."""
        if self.abi != "kho-v5-series":
            return errno.EOPNOTSUPP
        if not self.finalized:
            return errno.ENOENT
        self.finalized = False
        return 0

    @property
    def closed(self) -> bool:
        """Whether nothing may be preserved or given up now."""
        return self.closes and self.finalized

    def _in_ram(self, phys: int, nr_pages: int) -> bool:
        """Whether every page of the span is RAM."""
        pages = range(phys, phys + nr_pages * self.page_bytes, self.page_bytes)
        return all(any(s <= page < s + n for s, n, _ in self.ranges) for page in pages)

    def _refused(self, phys: int, nr_pages: int) -> bool:
        """Whether a page of the span is not RAM, or in scratch."""
        end = phys + nr_pages * self.page_bytes
        in_scratch = any(phys < s + n and s < end for s, n in self.scratch if n)
        return in_scratch or not self._in_ram(phys, nr_pages)

    def preserve_folio(self, phys: int, order: int) -> int:
        """Twice is as once (§12, item 15)."""
        if self.closed:
            return errno.EBUSY
        if phys % (self.page_bytes << order) or self._refused(phys, 1 << order):
            return errno.EINVAL
        self.preserved.add((phys, order))
        return 0

    def preserve_folios(self, blocks: Iterable[Block]) -> int:
        """All or nothing."""
        if self.closed:
            return errno.EBUSY
        before = set(self.preserved)
        for phys, order in blocks:
            code = self.preserve_folio(phys, order)
            if code:
                self.preserved = before
                return code
        return 0

    def unpreserve_folio(self, phys: int, order: int) -> int:
        """Undo all earlier preserves of exactly this block; an abort may have done so."""
        if self.closed:
            return errno.EBUSY
        if (phys, order) not in self.preserved and not self._forgiven(phys, order):
            return errno.ENOENT
        self.preserved.discard((phys, order))
        return 0

    def _forgiven(self, phys: int, order: int) -> bool:
        return self.forgot and phys % (self.page_bytes << order) == 0

    def blocks_of(self, phys: int, nr_pages: int) -> list[Block]:
        """The blocks, as (phys, order), that stand for a run of pages."""
        borders: list[int] = []
        last = self.ranges[0][2]
        for start, _, node in self.ranges if self.abi in NUMA else ():
            if node != last:
                borders.append(start // self.page_bytes)
            last = node
        pairs = split_pages(phys // self.page_bytes, nr_pages, borders)
        return [(pfn * self.page_bytes, order) for pfn, order in pairs]

    def preserve_pages(self, phys: int, nr_pages: int) -> int:
        """All blocks of the run, or none."""
        if self.closed:
            return errno.EBUSY
        if not nr_pages:
            return 0  # Linux's loop does not run
        if phys % self.page_bytes or self._refused(phys, nr_pages):
            return errno.EINVAL
        self.preserved.update(self.blocks_of(phys, nr_pages))
        return 0

    def unpreserve_pages(self, phys: int, nr_pages: int) -> int:
        """Only a run that was preserved as it stands."""
        if self.closed:
            return errno.EBUSY
        blocks = self.blocks_of(phys, nr_pages)
        if self.forgot and blocks and phys % self.page_bytes == 0:
            inside = self._in_ram(phys, nr_pages)
            self.preserved.difference_update(blocks if inside else ())
            return 0 if inside else errno.ENOENT
        if (blocks and phys % self.page_bytes) or not self.preserved.issuperset(blocks):
            return errno.ENOENT
        self.preserved.difference_update(blocks)
        return 0

    def add_subtree(self, name: str, phys: int, nbytes: int) -> int:
        """A name stands once (§5.1)."""
        if self.closed:
            return errno.EBUSY
        if name in self.subtrees:
            return errno.EEXIST
        self.subtrees[name] = (phys, nbytes)
        return 0

    def remove_subtree(self, phys: int) -> int:
        """The newest child whose blob is at *phys*: it stands first in the file (§5.1)."""
        if self.inline:
            return errno.EOPNOTSUPP
        if self.closed:
            return errno.EBUSY
        for name in reversed(self.subtrees):
            if self.subtrees[name][0] == phys:
                del self.subtrees[name]
                return 0
        return errno.ENOENT

    def walk(self) -> list[Block]:
        """The preserved blocks in the ABI's walk order."""
        return walk_order(self.preserved, self.abi)
