"""Every large thing is reachable without a copy: one address, and what is written is seen."""

import mmap

import numpy as np
import pytest

from luo.device import Bus, Driver, LiveUpdateOps, batch
from luo.fdt import Fdt
from luo.kernel import Kernel
from luo.machine import DeviceTree, Machine
from luo.memory import PhysicalMemory

COUNT = 1000


def address(buffer):
    """Where a buffer lies."""
    return np.frombuffer(buffer, np.uint8).ctypes.data


@pytest.fixture
def machine():
    """A machine of a thousand devices with registers."""
    tree = DeviceTree()
    regs = np.arange(COUNT * 16, dtype=np.uint32).astype(np.uint8).reshape(COUNT, 16)
    tree.add_many(("dev", 0, COUNT), None, "pci", "nic", regs=regs)
    return Machine("64MiB", tree)


def prepared(machine, seen, **more):
    """A kernel in PREPARED, whose batch callback has noted its slots."""
    save = batch(lambda devices: seen.append(devices.column("regs", devices.slots)) and None)
    ops = LiveUpdateOps(prepare=save, state_size=16)
    kernel = Kernel(machine, drivers=[Driver("nic", ops)], buses=[Bus("pci", LiveUpdateOps())],
                    **more)  # fmt: skip
    kernel.boot().devices.request("*")
    kernel.luo.prepare()
    return kernel


def test_memory_is_one_buffer_at_one_address(machine):
    """Views of simulated memory, numpy's of them, and another mapping of the file."""
    memory = machine.memory
    whole = np.frombuffer(memory.view(0, memory.size), np.uint8)
    part = np.frombuffer(memory.view(8192, 4096), np.uint64)
    part[:] = 0x1122334455667788

    assert np.shares_memory(whole, part)
    assert address(memory.view(8192, 1)) == whole.ctypes.data + 8192
    with mmap.mmap(memory.fd, memory.size) as other:
        assert other[8192] == 0x88


def test_memory_of_the_host_is_the_host_s_buffer():
    """An array of somebody else's is the machine's memory, both ways."""
    host = np.frombuffer(mmap.mmap(-1, 4 << 20), np.uint8)
    memory = PhysicalMemory("4MiB", host=host)
    host[4096] = 7

    assert address(memory.view(0, 4 << 20)) == host.ctypes.data
    assert memory.view(4096, 1)[0] == 7


def test_columns_of_the_device_tree_are_its_own_memory(machine):
    """Each time one asks: the same address; also the users' columns and the names."""
    tree = machine.devices
    for name in ("parents", "depths", "bus_ids", "driver_ids", "nodes", "alive"):
        assert np.shares_memory(getattr(tree, name), getattr(tree, name)), name
    for ask in (lambda: tree.names, lambda: tree.column("regs")):
        for one, other in zip(ask(), ask(), strict=True):
            assert np.shares_memory(one, other)


def test_device_tree_of_a_memfd_is_the_memfd(machine):
    """A tree from another process is its mapping: no column is copied."""
    fd = machine.devices.to_memfd()
    tree = DeviceTree.from_memfd(fd)
    data, _offsets = tree.column("regs")
    base = data.base
    while getattr(base, "base", None) is not None:
        base = base.base

    assert tree.readonly
    assert not data.flags.owndata
    assert np.shares_memory(data, tree.column("regs")[0])


def test_slots_and_flags_of_devices_are_columns(machine):
    """A slot is memory of the machine, alone and in a batch; flags are arrays that stay."""
    seen = []
    kernel = prepared(machine, seen)
    devices, memory = kernel.devices, machine.memory
    whole = np.frombuffer(memory.view(0, memory.size), np.uint8)
    slot = devices[5].slot

    assert np.shares_memory(seen[0], whole)
    assert address(slot) == whole.ctypes.data + int(devices.slot_phys[0, 5])
    assert bytes(slot) == machine.devices.table.row("regs", 5)
    assert devices.preserved is devices.preserved
    assert devices.preserved.all()


def test_maps_and_trees_are_read_where_they_lie(machine):
    """What is handed over is memory of the machine; the map fills the caller's arrays."""
    kernel = prepared(machine, [])
    kernel.luo.reboot()
    kho, memory = kernel.kho, machine.memory
    handover = kho.handover()
    blob = memory.view(handover.fdt_phys, handover.fdt_len)
    value = Fdt(blob).root["compatible"]
    out = np.empty(kho.nr_preserved, np.uint64), np.empty(kho.nr_preserved, np.uint8)
    phys, orders = kho.preserved(out)

    assert address(blob) < address(value) < address(blob) + handover.fdt_len
    assert np.shares_memory(phys, out[0])
    assert np.shares_memory(orders, out[1])
    assert len(phys) == kho.nr_preserved > 0


def test_spans_and_costs_are_the_recorder_s_memory(machine):
    """Every call of a live update, and the sum of each device, without a copy."""
    recorder = prepared(machine, [], spans=True).recorder
    spans, costs = recorder.spans, recorder.costs

    assert len(spans) > 0
    assert np.shares_memory(spans, recorder.spans)
    assert np.shares_memory(costs, recorder.costs)
    assert (costs.shape, costs.dtype) == ((2, COUNT), np.float32)
    assert address(spans) == address(recorder.spans)
