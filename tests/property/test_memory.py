"""The page allocator against a plain set of pages: any calls in any order."""

import errno
import itertools

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from luo.memory import PhysicalMemory

MIB = 1 << 20
MACHINES = [
    ([(0, 4 * MIB, 0)], 4096),
    ([(0x40000000, 2 * MIB + 12288, 0), (0x40203000, 3 * MIB, 1)], 4096),
    ([(MIB, MIB, 0), (2 * MIB, MIB, 0), (1 << 40, 2 * MIB, 1)], 4096),
    ([(0, 8 * MIB, 0), (1 << 33, 8 * MIB, 1)], 16384),
]


def errno_of(call, *arguments) -> int:
    """0, or the errno of what the call raised."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return 0


class PagesMachine(RuleBasedStateMachine):
    """One memory; the model knows each segment's free pages and each allocated block."""

    @initialize(which=st.sampled_from(range(len(MACHINES))))
    def make(self, which):
        self.ranges, self.page = MACHINES[which]
        self.memory = PhysicalMemory(ranges=self.ranges, page_size=self.page)
        self.blocks: dict[int, int] = {}  # pfn: order
        self.scratch: list[tuple[int, int]] = []
        self.restricted = False

    # ---- the model ----

    def taken(self) -> set[int]:
        return {
            page for pfn, order in self.blocks.items() for page in range(pfn, pfn + (1 << order))
        } | {0}

    def segments(self) -> list[tuple[int, int, int, bool]]:
        """(first, end, node, whether scratch) in pages."""
        borders = {b for p, n in self.scratch for b in (p // self.page, (p + n) // self.page)}
        found = []
        for start, nbytes, node in sorted(self.ranges):
            first, end = start // self.page, (start + nbytes) // self.page
            cuts = sorted({first, end, *(b for b in borders if first < b < end)})
            for low, high in itertools.pairwise(cuts):
                inside = any(p <= low * self.page < p + n for p, n in self.scratch)
                found.append((low, high, node, inside))
        return found

    def free_blocks(self) -> list[tuple[int, int, int]]:
        """(segment, order, pfn): maximal aligned free blocks inside each segment."""
        taken = self.taken()
        found = []
        for index, (low, high, _, _) in enumerate(self.segments()):
            pfn = low
            while pfn < high:
                if pfn in taken:
                    pfn += 1
                    continue
                order = 0
                while (
                    pfn % (2 << order) == 0
                    and pfn + (2 << order) <= high
                    and not any(p in taken for p in range(pfn, pfn + (2 << order)))
                ):
                    order += 1
                found.append((index, order, pfn))
                pfn += 1 << order
        return found

    def next_block(self, order: int, node: int | None) -> int | None:
        """Where the next allocation goes: segment, then smallest order, then address."""
        segments = self.segments()
        fits = [
            (index, size, pfn)
            for index, size, pfn in self.free_blocks()
            if size >= order
            and segments[index][3] == self.restricted
            and node in (None, segments[index][2])
        ]
        return min(fits)[2] if fits else None

    # ---- the calls ----

    @rule(order=st.integers(0, 6), node=st.sampled_from([None, None, 0, 1]))
    def alloc(self, order, node):
        if node is not None and node >= self.memory.nr_nodes:
            node = None
        expected = self.next_block(order, node)
        if expected is None:
            assert errno_of(self.memory.alloc_folio, order, node) == errno.ENOMEM
            return
        assert expected * self.page == self.memory.alloc_folio(order, node)
        self.blocks[expected] = order

    @rule(order=st.integers(0, 4), n=st.integers(0, 60))
    def alloc_many(self, order, n):
        before = dict(self.blocks)
        expected = []
        for _ in range(n):
            pfn = self.next_block(order, None)
            if pfn is None:
                self.blocks = before
                assert errno_of(self.memory.alloc_folios, n, order) == errno.ENOMEM
                return
            self.blocks[pfn] = order
            expected.append(pfn * self.page)
        assert expected == self.memory.alloc_folios(n, order).tolist()

    @rule(nr_pages=st.integers(1, 200))
    def alloc_run(self, nr_pages):
        pfn = self.next_block((nr_pages - 1).bit_length(), None)
        if pfn is None:
            assert errno_of(self.memory.alloc_pages, nr_pages) == errno.ENOMEM
            return
        assert pfn * self.page == self.memory.alloc_pages(nr_pages)
        end = pfn + nr_pages
        while pfn < end:
            order = 0
            while pfn % (2 << order) == 0 and pfn + (2 << order) <= end:
                order += 1
            self.blocks[pfn] = order
            pfn += 1 << order

    @rule(place=st.integers(0, 1 << 12), order=st.integers(0, 8), which=st.integers(0, 2))
    def claim(self, place, order, which):
        start, nbytes, _ = self.ranges[which % len(self.ranges)]
        pfn = (start + place * self.page % nbytes) // self.page >> order << order
        pages = range(pfn, pfn + (1 << order))
        segments = self.segments()
        homes = {
            index
            for page in (pages[0], pages[-1])
            for index, (low, high, _, _) in enumerate(segments)
            if low <= page < high
        }
        code = errno_of(self.memory.claim, pfn * self.page, order)
        if len(homes) == 1:
            assert code == (errno.EBUSY if (self.taken() - {0}) & set(pages) else 0) or pfn == 0
        if code == 0:
            assert not (self.taken() - {0}) & set(pages)
            self.blocks[pfn] = order

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free(self, data):
        pfn = data.draw(st.sampled_from(sorted(self.blocks)))
        order = self.blocks.pop(pfn)
        if order:
            assert errno_of(self.memory.free, (pfn + 1) * self.page) == errno.EINVAL
        self.memory.free(pfn * self.page)
        assert errno_of(self.memory.free, pfn * self.page) == errno.EINVAL

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def free_many(self, data):
        pfns = data.draw(st.lists(st.sampled_from(sorted(self.blocks)), max_size=30))
        array = np.array(pfns, np.uint64) * np.uint64(self.page)
        if len(set(pfns)) < len(pfns):
            assert errno_of(self.memory.free_folios, array) == errno.EINVAL
            return
        self.memory.free_folios(array)
        for pfn in pfns:
            del self.blocks[pfn]

    @rule(n=st.integers(0, 100), order=st.integers(0, 3))
    def prefault_free(self, n, order):
        self.memory.prefault_free(n * self.page, order)

    @rule(first=st.integers(0, 1 << 11), pages=st.integers(1, 300))
    def reserve(self, first, pages):
        start, nbytes, _ = self.ranges[-1]
        phys = start + first * self.page % nbytes
        area = (phys, min(pages * self.page, start + nbytes - phys))
        taken = self.taken() - {0}
        low, high = area[0] // self.page, (area[0] + area[1]) // self.page
        crossed = taken & set(range(low, high))
        code = errno_of(self.memory.reserve_scratch, [area])

        assert code == (errno.EBUSY if crossed else 0)
        if code == 0:
            self.scratch = [area]
            self.restricted = False

    @rule()
    def forget(self):
        self.memory.forget()
        self.blocks, self.scratch, self.restricted = {}, [], False

    @rule()
    def restrict(self):
        if self.scratch:
            self.memory.restrict(self.scratch)
            self.blocks, self.restricted = {}, True

    @rule()
    def release(self):
        self.memory.release()
        self.restricted = False

    @invariant()
    def same_state(self):
        if not hasattr(self, "memory"):
            return
        free = sorted(
            (int(p) // self.page, int(o)) for p, o in zip(*self.memory.free_blocks(), strict=True)
        )
        held = {
            int(p) // self.page: int(o)
            for p, o in zip(*self.memory.allocated_blocks(), strict=True)
        }

        assert sorted((pfn, order) for _, order, pfn in self.free_blocks()) == free
        assert self.blocks == held
        segments = self.segments()
        counts = {True: 0, False: 0}
        for index, order, _ in self.free_blocks():
            counts[segments[index][3]] += 1 << order
        assert counts[False] == self.memory.nr_free_pages()
        assert counts[True] == self.memory.nr_free_scratch_pages


TestPages = PagesMachine.TestCase
