"""What the core allocates it frees: the same again and again holds no more blocks than once.

A checked build (LUO_DEBUG=1, LUO_SANITIZE=1) counts them. Wrong input is part of each round, since
that is where one forgets.
"""

import contextlib
import gc
import os
import struct

import numpy as np
import pytest
import rig

from luo import _kho
from luo.abi import GENERATIONS
from luo.errors import FdtError, HandoverError, KhoError
from luo.fdt import Fdt, FdtEditor, FdtWriter
from luo.kho import Handover, Kho
from luo.machine import DeviceTree
from luo.memory import PhysicalMemory

pytestmark = pytest.mark.skipif(
    not hasattr(_kho, "_allocations"),
    reason="only a checked build (LUO_DEBUG=1, make debug) counts allocations",
)

PAGE = 4096


def grown(work, rounds=10):
    """Blocks that the core holds more after *rounds* rounds than after the first."""
    work()
    gc.collect()
    before = _kho._allocations()
    for _ in range(rounds):
        work()
    gc.collect()
    return _kho._allocations() - before


def refused(error, call, *args, **arguments):
    """Call what must raise *error*."""
    with contextlib.suppress(error):
        call(*args, **arguments)
        raise AssertionError("it was not refused")


def use_trees():
    """Write, read, edit; with each error that has something to free."""
    writer = FdtWriter(reserve_map=[(1, 2)])
    with writer.node(""):
        refused(ValueError, writer.property, "", b"")
        writer.add_nodes(("dev", 0, 100), {"a": np.arange(100), "b": [b"x", None] * 50})
        refused(ValueError, writer.add_nodes, ["a", "b"], {"a": [b"only one"]})
    blob = bytes(writer.finish())
    refused(FdtError, FdtWriter, into=bytearray(10))
    tree = Fdt(blob)
    tree.read_nodes("/")
    tree.read_nodes("/", ["b", "absent"])
    assert "/dev99" in tree
    assert tree.root.children[50].path == "/dev50"
    for cut in range(0, len(blob), 97):
        refused(FdtError, Fdt, blob[:cut])
    room = bytearray(blob + bytes(64))
    editor = FdtEditor(room)
    editor.add_node("/", "new")
    refused(FdtError, editor.set_property, "/new", "big", bytes(1000))
    editor.pack()
    refused(FdtError, FdtEditor, bytearray(b"no tree at all" * 10))


def test_trees_leak_nothing():
    """Writer, reader, columns, index, editor."""
    assert grown(use_trees) == 0


@pytest.mark.parametrize("abi", list(GENERATIONS))
def test_handovers_leak_nothing(abi):
    """Preserve, hand over, validate right and wrong bytes, boot, restore, preserve again."""

    def work():
        memory = PhysicalMemory("64MiB")
        kho = Kho(memory, abi=abi, scratch=[(8 << 20, 4 << 20)])
        blocks = memory.alloc_folios(100, 1)
        kho.preserve_folios(blocks, 1)
        kho.unpreserve_folios(blocks[:50], 1)
        refused(KhoError, kho.unpreserve_folios, blocks[:60], 1)
        refused(KhoError, kho.preserve_folio, 8 << 20, 0)
        refused(KhoError, memory.alloc_folios, 1 << 13, 2)
        run = memory.alloc_pages(77)
        kho.preserve_pages(run, 77)
        kho.write_blocks(bytes(9600), 16)
        if kho.generation.finalize is not None:
            kho.finalize()
        handover = kho.handover()
        kho.close()
        wrong = Handover(handover.fdt_phys + PAGE, *handover.numbers[1:])
        refused((HandoverError, FdtError), Kho.validate, memory, wrong, abi=abi)
        new = Kho.boot(memory, handover, abi=abi)
        new.incoming.restore_folios(blocks[50:])
        new.preserve_folios(blocks[50:], 1)
        memory.cut_off()
        new.close()

    assert grown(work) == 0


def test_walks_that_fail_leak_nothing():
    """A map whose every slot leads somewhere wrong, one after the other."""
    memory = PhysicalMemory("64MiB")
    kho = Kho(memory, scratch=[])
    kho.preserve_folios(memory.alloc_folios(40, 0), 0)
    handover, root = kho.handover(), kho.root_phys
    slots = memory.view(root, PAGE).cast("Q")
    right = bytes(slots)

    def work():
        for value in (1, root, PAGE * 3000, 63 << 20, 1 << 63, handover.fdt_phys):
            slots[1] = value
            refused(HandoverError, Kho.validate, memory, handover)
        memory.view(root, PAGE)[:] = right
        Kho.validate(memory, handover)

    assert grown(work) == 0


def test_device_tables_leak_nothing():
    """Rows, columns, look-ups, patterns, removal, and a table from another process."""

    def work():
        tree = DeviceTree()
        tree.add("root")
        tree.add_many(
            ("dev", 0, 300), [0] * 300, "pci", "nic", state=[b"s" * i for i in range(300)]
        )
        refused(ValueError, tree.add_many, ("dev", 0, 300), [0] * 300)
        tree.index()
        tree.match("*/dev1?")
        tree.preserve_order(np.ones(len(tree.alive), np.uint8))
        tree.find_paths(*tree.paths(np.arange(10, dtype=np.int32)))
        tree.remove("root/dev7")
        fd = tree.to_memfd()
        DeviceTree.from_memfd(fd).path(5)
        os.close(fd)

    assert grown(work) == 0


def test_live_updates_leak_nothing():
    """Devices with slots, callbacks that fail, records of an odd kind, and the update itself."""

    def work():
        machine, log = rig.small_machine(), rig.Log()
        kernel = rig.small_kernel(machine, log).boot()
        for device in kernel.devices:
            device.requested = True
        log.faults[("PREPARE", "driver", "nvme", "pci0/disk")] = -5
        refused(OSError, kernel.luo.prepare)
        log.clear()
        kernel.luo.prepare()
        kernel.luo.cancel()
        kernel = rig.updated(kernel, rig.small_kernel(machine, log))
        kernel.luo.finish()
        kernel.close()

    assert grown(work, rounds=5) == 0


def test_words_that_are_no_handover_leak_nothing():
    """Memory full of anything."""
    memory = PhysicalMemory("1MiB")
    for at in range(0, 1 << 20, PAGE):
        memory.view(at, PAGE)[:] = struct.pack("<Q", at * 2654435761 % (1 << 64)) * 512

    def work():
        for at in range(0, 1 << 20, PAGE):
            refused((HandoverError, FdtError), Kho.validate, memory, Handover(at, PAGE, 0, 0))

    assert grown(work, rounds=3) == 0
