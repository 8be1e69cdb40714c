"""No allocation that fails leaks anything or changes what is preserved.

A checked build (LUO_DEBUG=1) can let the n-th allocation fail, of the host's memory and of
simulated pages alike. Each operation is tried with n = 1, 2, 3, … until it succeeds.
"""

import numpy as np
import pytest
import rig

from luo import _kho
from luo.abi import GENERATIONS, generation
from luo.fdt import Fdt, FdtWriter
from luo.kho import Kho
from luo.machine import DeviceTree
from luo.memory import PhysicalMemory

pytestmark = pytest.mark.skipif(
    not hasattr(_kho, "_fail_allocation"),
    reason="only a checked build (LUO_DEBUG=1, make debug) can fail an allocation",
)

MIB = 1 << 20


def machine(abi: str = "kho-v4") -> tuple[PhysicalMemory, Kho]:
    """Memory on two nodes, and a kernel's KHO."""
    memory = PhysicalMemory("64MiB", nodes=2)
    return memory, Kho(memory, abi=abi, scratch=[(8 * MIB, 4 * MIB)])


def state(memory: PhysicalMemory, kho: Kho | None = None) -> dict:
    """All that a failed call must leave as it was."""
    found = {
        "free": [array.tolist() for array in memory.free_blocks()],
        "allocated": [array.tolist() for array in memory.allocated_blocks()],
    }
    if kho is not None:
        found["preserved"] = [array.tolist() for array in kho.preserved()]
        found["pages"] = (kho.nr_preserved, kho.preserved_pages, kho.tree_pages)
        if not kho.generation.inline:
            found["subtrees"] = rig.subtrees(kho)
    return found


def arrays(kho: Kho) -> int:
    """Arrays that the map of *kho* keeps: two, and one an order, where it is made of chunks."""
    return 0 if kho.generation.bitmap_size(4096) == 0 else 2 + 37


def fail_each(operation, look, *, least: int = 1, spare: bool = False, kept: int = 0):
    """Run *operation* with each of its allocations failing in turn, then with none.

    Args:
        operation: what may fail.
        look: returns what a failure must not change.
        least: allocations that it makes at least, or the test shows nothing.
        spare: whether it may do without one of them.
        kept: blocks of the host's memory that may stay with the map for the next try.

    Returns:
        what the operation returned when it succeeded.
    """
    before, blocks = look(), _kho._allocations()
    n = 0
    while True:
        n += 1
        _kho._fail_allocation(n)
        error = result = None
        try:
            result = operation()
        except (MemoryError, OSError) as raised:
            error = raised.with_traceback(None)
        finally:
            left = _kho._fail_allocation(0)
        if left:  # it made fewer than n
            assert error is None
            assert n > least
            return result
        if spare and error is None:
            continue
        assert error is not None, f"allocation {n} failed, and nobody noticed"
        assert before == look(), f"allocation {n} failed"
        assert blocks <= _kho._allocations() <= blocks + kept, f"allocation {n} failed"


@pytest.mark.parametrize("order", [0, 3, 10])
def test_preserve_folio_whose_allocation_fails_changes_nothing(order):
    """Every page of the tree on the way to the leaf can be the one that is missing."""
    memory, kho = machine()
    phys = memory.alloc_folio(order)

    fail_each(lambda: kho.preserve_folio(phys, order), lambda: state(memory, kho), least=order > 0)

    assert kho.is_preserved(phys, order)


@pytest.mark.parametrize("abi", GENERATIONS)
def test_preserve_folios_whose_allocation_fails_changes_nothing(abi):
    """Keys, marks and pages of the map: what the call had set and made is taken back."""
    memory, kho = machine(abi)
    phys = np.concatenate([memory.alloc_folios(200, order) for order in (0, 1, 2)])
    orders = np.repeat(np.array([0, 1, 2], np.uint8), 200)
    kho.preserve_folios(phys[:50], 0)

    fail_each(
        lambda: kho.preserve_folios(phys, orders),
        lambda: state(memory, kho),
        least=4,
        kept=arrays(kho),
    )

    assert kho.nr_preserved >= 600


@pytest.mark.parametrize("abi", GENERATIONS)
def test_preserve_pages_whose_allocation_fails_changes_nothing(abi):
    """A run is recorded as blocks of several orders, each with a leaf or bitmap of its own."""
    memory, kho = machine(abi)
    phys = memory.alloc_pages(1001)

    fail_each(
        lambda: kho.preserve_pages(phys, 1001),
        lambda: state(memory, kho),
        least=5,
        kept=arrays(kho),
    )


def test_alloc_preserve_whose_allocation_fails_changes_nothing():
    """The block is free again if the tree has no page for it."""
    memory, kho = machine()

    fail_each(lambda: kho.alloc_preserve(5 * 4096), lambda: state(memory, kho), least=2)


def test_save_subtree_whose_allocation_fails_changes_nothing():
    """Neither blob nor half a child of the root tree is left."""
    memory, kho = machine()

    fail_each(lambda: kho.save_subtree("a", bytes(20000)), lambda: state(memory, kho), least=2)

    assert "a" in rig.subtrees(kho)


def test_add_subtree_whose_allocation_fails_changes_nothing():
    """The root tree's bytes are the same."""
    memory, kho = machine()
    phys = kho.alloc_preserve(100)
    root = memory.view(kho.fdt_phys, 4096)

    fail_each(
        lambda: kho.add_subtree("a", phys, 100), lambda: (bytes(root), state(memory, kho)), least=0
    )


def test_write_blocks_whose_allocation_fails_changes_nothing():
    """A chain is whole or not there."""
    memory, kho = machine()

    fail_each(lambda: kho.write_blocks(bytes(20000), 16), lambda: state(memory, kho), least=5)


def test_unpreserving_allocates_nothing():
    """What takes back must work when memory is short; its array of keys apart."""
    memory, kho = machine()
    phys = memory.alloc_folio(2)
    kho.preserve_folio(phys, 2)
    blob = kho.alloc_preserve(4096)

    _kho._fail_allocation(1)
    try:
        kho.unpreserve_folio(phys, 2)
        kho.unpreserve_free(blob)
        memory.free(phys)
    finally:
        left = _kho._fail_allocation(0)

    assert left == 1


def test_cold_boot_whose_allocation_fails_leaks_nothing():
    """KHO that cannot start leaves memory as it found it, scratch apart."""
    memory = PhysicalMemory("64MiB")
    memory.reserve_scratch([])

    kho = fail_each(lambda: Kho(memory, scratch=[]), lambda: state(memory), least=3)

    assert kho.nr_preserved == 2


@pytest.mark.parametrize("abi", [name for name in GENERATIONS if generation(name).undo != "abort"])
def test_handover_whose_allocation_fails_changes_nothing(abi):
    """Finalizing, where there is such a thing, and the copies in scratch: done or undone.

    Where failing is an abort, an abort forgets everything, as the generation has it.
    """
    memory, kho = machine(abi)
    kho.preserve_folios(memory.alloc_folios(100, 2), 2)

    def hand_over():
        if kho.generation.finalize is None:
            kho.handover()
        else:
            kho.finalize()
        if kho.generation.undo == "unfreeze":
            kho.unfreeze()

    fail_each(hand_over, lambda: state(memory, kho), least=0, spare=True, kept=arrays(kho))


@pytest.mark.parametrize("abi", GENERATIONS)
def test_validate_whose_allocation_fails_leaks_nothing(abi):
    """The page state in the making and the list of the map's pages go."""
    memory, kho = machine(abi)
    kho.preserve_folios(memory.alloc_folios(100, 2), 2)
    if kho.generation.finalize is not None:
        kho.finalize()
    handover = kho.handover()

    incoming = fail_each(
        lambda: Kho.validate(memory, handover, abi=abi), lambda: state(memory, kho), least=3
    )

    assert incoming.nr_preserved == kho.nr_preserved


def test_boot_whose_allocation_fails_keeps_what_was_preserved():
    """The outgoing side of the new kernel is taken back; the incoming one is there, and whole."""
    content = b"content" * 100
    n, error = 0, True
    while error:
        n += 1
        memory, old = machine()
        phys = memory.alloc_folios(50, 1)
        old.preserve_folios(phys, 1)
        old.save_subtree("a", content)
        incoming = Kho.validate(memory, old.handover())
        old.close()
        reserved = 1  # the copy of the scratch array
        _kho._fail_allocation(n)
        try:
            error, booted = None, Kho.boot(memory, incoming)
        except (MemoryError, OSError) as raised:
            error = raised.with_traceback(None)
        finally:
            left = _kho._fail_allocation(0)
        if error:
            assert reserved == len(memory.allocated_blocks()[0]), f"allocation {n} failed"
        assert incoming.nr_preserved == incoming.nr_unrestored
        assert content == bytes(incoming.load_subtree("a"))
        assert [1] * 50 == incoming.restore_folios(phys).tolist()

    assert left
    assert n > 5
    assert booted.incoming is incoming


def test_alloc_folios_whose_allocation_fails_changes_nothing():
    """All of them or none."""
    memory = PhysicalMemory("64MiB", nodes=2)
    memory.alloc_folio(0)

    fail_each(lambda: memory.alloc_folios(5000, 1), lambda: state(memory), least=1)


def test_fdt_writer_whose_allocation_fails_leaks_nothing():
    """A tree with many names, rows and reserved places."""

    def write():
        writer = FdtWriter(reserve_map=[(0, 1)])
        with writer.node(""):
            for i in range(100):
                writer.property(f"property-{i}", bytes(i))
            writer.add_nodes(("dev", 0, 500), {"a": np.arange(500, dtype=np.uint64), "b": b"x"})
        return bytes(writer.finish())

    blob = fail_each(write, lambda: None, least=3, spare=True)  # trimming the buffer

    assert len(Fdt(blob).root.children) == 500


def test_fdt_reader_whose_allocation_fails_leaks_nothing():
    """Columns and the index of names."""
    writer = FdtWriter()
    with writer.node(""):
        writer.add_nodes(("dev", 0, 300), {"a": np.arange(300, dtype=np.uint64), "b": b"x"})
    blob = bytes(writer.finish())

    def read():
        tree = Fdt(blob)
        columns = tree.read_nodes("/")
        return len(columns["a"]), tree.root.children[299].path, "/dev299" in tree

    assert (300, "/dev299", True) == fail_each(read, lambda: None, least=2)


def test_device_tree_whose_allocation_fails_is_unchanged():
    """A table either takes all rows with all columns, or none."""
    tree = DeviceTree()
    tree.add("root", state=b"x")

    def look():
        return len(tree), tree.column_names, [tree.path(i) for i in tree]

    def add():
        return tree.add_many(
            ("dev", 0, 2000), [0] * 2000, "pci", "nic", state=[b"y" * (i % 9) for i in range(2000)]
        )

    before = look()
    n, done = 0, None
    while done is None:
        n += 1
        _kho._fail_allocation(n)
        try:
            done = add()
        except MemoryError:
            pass
        finally:
            _kho._fail_allocation(0)
        assert done is not None or before == look(), f"allocation {n} failed"

    assert len(done) == 2000
    assert n > 5
