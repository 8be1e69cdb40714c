"""Kho against the plain model: any calls in any order, with holes, NUMA nodes and scratch."""

import errno
import os

import kho_walker
import model
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from luo import abi
from luo.kho import Kho
from luo.memory import PhysicalMemory

MIB = 1 << 20
MACHINES = [
    {"ranges": [(0, 32 * MIB, 0)]},
    {"ranges": [(0x40000000, 16 * MIB + 12288, 0), (0x41003000, 20 * MIB, 1)]},
    {"ranges": [(MIB, 15 * MIB, 0), (1 << 32, 16 * MIB, 1), (1 << 36, 16 * MIB, 0)]},
    {"ranges": [(0, 128 * MIB, 0), (1 << 33, 128 * MIB, 1)], "page_size": 16384},
]


def errno_of(call, *arguments) -> int:
    """0, or the errno of what the call raised."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return 0


class KhoMachine(RuleBasedStateMachine):
    """One kernel's Kho, its model, and the kernels that follow."""

    blocks = Bundle("blocks")
    runs = Bundle("runs")
    names = Bundle("names")

    @initialize(
        which=st.sampled_from(range(len(MACHINES))), name=st.sampled_from(sorted(abi.GENERATIONS))
    )
    def cold_boot(self, which, name):
        self.abi = name
        self.memory = PhysicalMemory(**MACHINES[which])
        page = self.page = self.memory.page_size
        start, nbytes, _ = self.memory.ranges[0]
        area = page << self.memory.max_order
        first = -(-start // area) * area
        scratch = [(first, area)] if first + area <= start + nbytes else []
        self.kho = Kho(self.memory, scratch=scratch, abi=name)
        self.model = model.KhoModel(self.memory.ranges, list(self.kho.scratch), page, abi=name)
        self.model.preserved = set(self.listed())
        if name in model.NUMA:
            self.model.subtrees = {"kexec-metadata": self.image().subtrees["kexec-metadata"]}

    def listed(self) -> list[model.Block]:
        phys, orders = self.kho.preserved()
        return list(zip(phys.tolist(), orders.tolist(), strict=True))

    def image(self) -> kho_walker.Image:
        """What the walker reads through the memory's file."""
        handover, memory = self.kho.handover(), self.memory

        def read(phys: int, nbytes: int) -> bytes:
            return os.pread(memory.fd, nbytes, memory.offset + phys - memory.base)

        return kho_walker.read_handover(
            read,
            handover.fdt_phys,
            handover.fdt_len,
            handover.scratch_phys,
            handover.scratch_len,
            self.page.bit_length() - 1,
            self.abi,
        )

    addresses = st.tuples(
        st.integers(0, 2), st.integers(0, 1 << 13), st.sampled_from([0, 0, 0, 1, 512])
    )

    def address(self, place) -> int:
        """An address in or just outside one of the ranges, rarely unaligned."""
        index, pages, odd = place
        ranges = self.memory.ranges
        start, nbytes, _ = ranges[index % len(ranges)]
        return start + pages % (nbytes // self.page + 2) * self.page + odd

    @rule(target=blocks, order=st.integers(0, 6), n=st.integers(1, 5), by=st.booleans())
    def preserve_allocated(self, order, n, by):
        if self.model.closed or errno_of(self.memory.alloc_folio, 8):  # leaves room for the tree
            return multiple()
        folios = self.memory.alloc_folios(n, order)
        if by:
            self.kho.preserve_folios(folios, order)
        else:
            for phys in folios.tolist():
                self.kho.preserve_folio(phys, order)
        blocks = [(phys, order) for phys in folios.tolist()]

        assert self.model.preserve_folios(blocks) == 0
        return multiple(*blocks)

    @rule(target=blocks, place=addresses, order=st.integers(0, 8))
    def preserve_anywhere(self, place, order):
        phys = self.address(place)
        expected = self.model.preserve_folio(phys, order)

        assert expected == errno_of(self.kho.preserve_folio, phys, order)
        return phys, order

    @rule(places=st.lists(addresses, max_size=6), order=st.integers(0, 3))
    def preserve_many(self, places, order):
        phys = [self.address(place) for place in places]
        expected = self.model.preserve_folios([(at, order) for at in phys])
        array = np.array(phys, np.uint64)

        assert expected == errno_of(self.kho.preserve_folios, array, order)

    @rule(block=blocks)
    def unpreserve(self, block):
        expected = self.model.unpreserve_folio(*block)

        assert expected == errno_of(self.kho.unpreserve_folio, *block)

    @rule(target=runs, place=addresses, nr_pages=st.integers(0, 3000))
    def preserve_run(self, place, nr_pages):
        phys = self.address(place)
        expected = self.model.preserve_pages(phys, nr_pages)

        assert expected == errno_of(self.kho.preserve_pages, phys, nr_pages)
        return multiple() if expected else (phys, nr_pages)

    @rule(run=runs)
    def unpreserve_run(self, run):
        expected = self.model.unpreserve_pages(*run)

        assert expected == errno_of(self.kho.unpreserve_pages, *run)

    @rule(target=names, name=st.text("abc", min_size=1, max_size=2), content=st.binary(min_size=1))
    def save_subtree(self, name, content):
        before = set(self.listed())
        refused = (
            errno.EOPNOTSUPP
            if self.model.inline
            else errno.EBUSY
            if self.model.closed
            else errno.EEXIST
            if name in self.model.subtrees
            else 0
        )
        if refused:
            assert refused == errno_of(self.kho.save_subtree, name, content)
            return name
        phys = self.kho.save_subtree(name, content)
        assert self.model.add_subtree(name, phys, len(content)) == 0
        self.model.preserved |= set(self.listed()) - before  # the blob's own block
        return name

    @rule(name=names)
    def remove_subtree(self, name):
        phys, _ = self.model.subtrees.get(name, (self.page, 0))
        expected = self.model.remove_subtree(phys)

        assert expected == errno_of(self.kho.remove_subtree, phys)

    @rule()
    def finalize(self):
        expected = self.model.finalize()

        assert expected == errno_of(self.kho.finalize)
        if not expected and self.model.closes and not self.model.inline:
            self.model.preserved.add((self.kho.fdt_phys, 0))

    @rule()
    def abort(self):
        expected = self.model.abort()

        assert expected == errno_of(self.kho.abort)

    @rule()
    def unfreeze(self):
        expected = self.model.unfreeze()

        assert expected == errno_of(self.kho.unfreeze)

    @rule(block=blocks)
    def is_preserved(self, block):
        assert (block in self.model.preserved) == self.kho.is_preserved(*block)

    @invariant()
    def same_blocks_in_the_same_order(self):
        listed = self.listed()

        assert self.model.walk() == listed
        assert len(listed) == self.kho.nr_preserved

    @invariant()
    def the_walker_reads_the_same(self):
        if self.model.closes and not self.model.finalized:
            return  # there is nothing to read yet
        if self.abi == "kho-v1":
            self.kho.finalize()  # as often as one likes
        image = self.image()
        expected = list(self.model.subtrees.items())
        if not self.model.closes:  # edited in: newest first
            expected.reverse()
        if self.abi not in model.NUMA:  # no size is handed over
            expected = [(name, (phys, 0)) for name, (phys, _) in expected]
            image.subtrees = {name: (phys, 0) for name, (phys, _) in image.subtrees.items()}

        assert self.model.walk() == image.preserved
        assert expected == list(image.subtrees.items())
        assert self.model.scratch == [area for area in image.scratch if area[1]]


TestKhoMachine = pytest.mark.filterwarnings("default")(KhoMachine.TestCase)
KhoMachine.TestCase.settings = settings(stateful_step_count=20)
