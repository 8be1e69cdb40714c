"""A chain of kernels: whatever they preserve, restore and drop, each gets exactly what was left."""

import errno

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from luo.kho import Kho
from luo.memory import PhysicalMemory

MIB = 1 << 20


def errno_of(call, *arguments) -> int:
    """0, or the errno of what the call raised."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return 0


def pairs(columns) -> dict[int, int]:
    """{phys: order} of two columns."""
    return dict(zip(*(column.tolist() for column in columns), strict=True))


class ChainMachine(RuleBasedStateMachine):
    """Kernels on one memory. Each page that is kept begins with its own address, written once."""

    @initialize(nodes=st.integers(1, 3), page_size=st.sampled_from([4096, 4096, 16384]))
    def cold_boot(self, nodes, page_size):
        self.memory = PhysicalMemory(nodes * 256 * MIB, nodes=nodes, page_size=page_size)
        area = (page_size << self.memory.max_order) * 1
        scratch = [(self.memory.size - area, area)]
        self.kho = Kho(self.memory, scratch=scratch)
        self.page = page_size
        self.allocated: dict[int, int] = {}  # this kernel's own blocks
        self.preserved: dict[int, int] = {}  # of those, the ones in the map
        self.incoming: dict[int, int] = {}  # not restored yet
        self.subtrees: dict[str, int] = {}
        self.stamped: set[int] = set()  # blocks that begin with their own address
        self.count = 1

    def stamp(self, phys: int) -> None:
        self.memory.view(phys, 8)[:] = phys.to_bytes(8, "little")
        self.stamped.add(phys)

    def check_stamp(self, phys: int) -> None:
        assert phys.to_bytes(8, "little") == self.memory.view(phys, 8)

    @rule(order=st.integers(0, 5), n=st.integers(1, 20))
    def alloc(self, order, n):
        if self.memory.nr_free_pages() < 4096:
            return
        for phys in self.memory.alloc_folios(n, order).tolist():
            assert phys not in self.incoming
            assert phys not in self.allocated
            self.allocated[phys] = order
            self.stamp(phys)

    @precondition(lambda self: self.allocated)
    @rule(data=st.data())
    def preserve(self, data):
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.allocated)), max_size=40))
        phys = np.array(chosen, np.uint64)
        orders = np.array([self.allocated[p] for p in chosen], np.uint8)
        fresh = {p for p in chosen if p not in self.preserved}

        assert len(fresh) == self.kho.preserve_folios(phys, orders)
        self.preserved |= {p: self.allocated[p] for p in chosen}

    @precondition(lambda self: set(self.preserved) - set(self.subtrees.values()))
    @rule(data=st.data())
    def unpreserve(self, data):
        phys = data.draw(st.sampled_from(sorted(set(self.preserved) - set(self.subtrees.values()))))
        self.kho.unpreserve_folio(phys, self.preserved.pop(phys))
        assert errno_of(self.kho.unpreserve_folio, phys, self.allocated[phys]) == errno.ENOENT

    @precondition(lambda self: set(self.allocated) - set(self.preserved))
    @rule(data=st.data())
    def free(self, data):
        loose = sorted(set(self.allocated) - set(self.preserved))
        chosen = data.draw(st.lists(st.sampled_from(loose), unique=True, max_size=40))
        self.memory.free_folios(np.array(chosen, np.uint64))
        for phys in chosen:
            del self.allocated[phys]
            self.stamped.discard(phys)

    @rule(name=st.sampled_from("abcdef"))
    def save(self, name):
        code = errno_of(self.kho.save_subtree, name, name.encode() * 10)
        assert code == (errno.EEXIST if name in self.subtrees else 0)
        if code == 0:
            node = self.kho.root.node("/" + name)
            phys = int.from_bytes(node["preserved-data"], "little")
            self.subtrees[name] = phys
            self.allocated[phys] = self.preserved[phys] = 0
            self.stamp_subtree(name)

    def stamp_subtree(self, name: str) -> None:
        phys = self.subtrees[name]
        assert name.encode() * 10 == self.memory.view(phys, 10)
        self.stamp(phys)

    @precondition(lambda self: self.incoming)
    @rule(data=st.data(), and_free=st.booleans())
    def restore(self, data, and_free):
        chosen = data.draw(
            st.lists(st.sampled_from(sorted(self.incoming)), unique=True, max_size=60)
        )
        if and_free:
            for phys in chosen:
                self.kho.incoming.restore_free(phys)
                del self.incoming[phys]
                self.stamped.discard(phys)
            return
        orders = self.kho.incoming.restore_folios(np.array(chosen, np.uint64)).tolist()
        assert [self.incoming[phys] for phys in chosen] == orders
        for phys in chosen:
            self.allocated[phys] = self.incoming.pop(phys)

    @rule(preflight=st.booleans())
    def jump(self, preflight):
        self.preserved |= {p: 0 for p in self.own_blocks()}
        left = pairs(self.kho.preserved())
        assert self.preserved == left
        four = self.kho.handover()
        incoming = Kho.validate(self.memory, four) if preflight else None
        self.memory.cut_off()
        self.kho.close()
        self.kho = Kho.boot(self.memory, incoming or four)
        self.count += 1

        assert self.count - 1 == self.kho.incoming.metadata.kexec_count
        assert {*self.subtrees, "kexec-metadata"} == set(self.kho.incoming.subtrees())
        self.incoming, self.allocated, self.preserved, self.subtrees = left, {}, {}, {}
        self.stamped &= set(left)

    def own_blocks(self) -> list[int]:
        """The root tree's page and the metadata's."""
        node = self.kho.root.node("/kexec-metadata")
        return [self.kho.fdt_phys, int.from_bytes(node["preserved-data"], "little")]

    @invariant()
    def books_balance(self):
        if not hasattr(self, "kho"):
            return
        own = dict.fromkeys(self.own_blocks(), 0)
        assert self.preserved | own == pairs(self.kho.preserved())
        if self.kho.incoming is not None:
            assert self.incoming == pairs(self.kho.incoming.unrestored())
        for phys in {*self.allocated, *self.incoming} & self.stamped:
            self.check_stamp(phys)
        pages = sum(1 << o for part in (self.allocated, self.incoming) for o in part.values())
        spare = self.memory.nr_free_pages() + self.memory.nr_free_scratch_pages
        held = self.kho.tree_pages + len(own)
        arrays = self.memory.nr_pages - 1 - pages - spare - held
        assert 0 <= arrays <= 2  # the array of scratch that came, and the one that goes


TestChain = ChainMachine.TestCase
