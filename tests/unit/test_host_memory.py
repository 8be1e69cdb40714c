"""Memory that is somebody's own buffer: what works as on a file, and what cannot."""

import errno
import mmap

import numpy as np
import pytest
from rig import Log, plain_kernel, small_machine, updated

from luo.device import LiveUpdateOps
from luo.kernel import KernelImage
from luo.machine import DeviceTree, Machine
from luo.memory import PhysicalMemory

SIZE = 64 << 20


def buffer(nbytes=SIZE):
    """Anonymous memory that begins on a page."""
    return mmap.mmap(-1, nbytes)


def test_memory_on_a_buffer_is_the_buffer_s_bytes():
    """What is written on one side is read on the other, without a copy, and no file is there."""
    host = buffer()
    memory = PhysicalMemory(SIZE, base=1 << 30, host=host)
    memory.view((1 << 30) + 4096, 5)[:] = b"hello"
    ours = np.frombuffer(memory.view(1 << 30, SIZE), np.uint8)

    assert host[4096:4101] == b"hello"
    assert np.shares_memory(ours, np.frombuffer(host, np.uint8))
    assert memory.fd == -1
    assert memory.is_populated(1 << 30, SIZE)


def test_memory_on_a_buffer_keeps_it():
    """Nobody else needs to hold the buffer; views of it keep it too."""
    memory = PhysicalMemory(SIZE, host=buffer())
    view = memory.view(4096, 4)
    view[:] = b"kept"
    del memory

    assert bytes(view) == b"kept"


def test_clone_of_a_buffer_is_a_copy_with_a_file():
    """Bytes are equal and then their own."""
    memory = PhysicalMemory(SIZE, host=buffer())
    memory.view(8192, 4)[:] = b"once"
    copy = memory.clone()
    memory.view(8192, 4)[:] = b"more"

    assert bytes(copy.view(8192, 4)) == b"once"
    assert copy.fd >= 0


def test_read_into_from_a_buffer_copies():
    """As from a file."""
    memory = PhysicalMemory(SIZE, host=buffer())
    memory.view(4096, 4)[:] = b"read"
    found = bytearray(4)
    memory.read_into(4096, found)

    assert found == b"read"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"host": buffer(4096)}, "are needed"),
        ({"host": memoryview(buffer(SIZE + 4096))[8:]}, "does not begin on a page"),
        ({"host": buffer(), "fd": 0}, "neither fd nor offset"),
        ({"host": buffer(), "offset": 4096}, "neither fd nor offset"),
    ],
    ids=["short", "misaligned", "fd", "offset"],
)
def test_memory_on_a_wrong_buffer_is_value_error(more, reason):
    """Too short, not on a page, or with what only a file has."""
    with pytest.raises(ValueError, match=reason):
        PhysicalMemory(SIZE, **more)


def test_memory_on_read_only_bytes_is_refused():
    """Memory is written."""
    with pytest.raises((BufferError, ValueError, TypeError)):
        PhysicalMemory(SIZE, host=bytes(SIZE))


def bytes_after_update(*, on_buffer):
    """All of memory after a live update of two devices."""
    machine = small_machine()
    ranges = machine.memory.ranges
    host = buffer(machine.memory.size) if on_buffer else None
    memory = PhysicalMemory(ranges=ranges, host=host)
    machine = Machine(memory, machine.devices)
    log, none = Log(), LiveUpdateOps()
    drivers = {"nic": log.ops("driver", "nic", size=8), "nvme": none, "portdrv": none}
    old, new = (plain_kernel(machine, drivers, {"pci": none}) for _ in range(2))
    old.boot().devices.request([2, 3])
    kernel = updated(old, new)
    assert kernel.devices.reclaimed.sum() == 4
    kernel.luo.finish()
    return bytes(memory.view(memory.base, memory.size))


def test_live_update_in_a_buffer_leaves_the_bytes_of_one_in_a_file():
    """The successor in this process finds everything; both memories are equal at the end."""
    assert bytes_after_update(on_buffer=True) == bytes_after_update(on_buffer=False)


def test_successor_in_another_process_on_a_buffer_is_eopnotsupp():
    """It could not map the memory."""
    machine = Machine(PhysicalMemory(SIZE, host=buffer()), DeviceTree())
    kernel = plain_kernel(machine, {}, {}).boot()
    with pytest.raises(OSError, match="has no file") as error:
        kernel.kexec_load(KernelImage("rig:nobody"))

    assert error.value.errno == errno.EOPNOTSUPP


def test_dma_into_a_buffer_is_eopnotsupp():
    """A device's writes go through a mapping of the file."""
    machine = Machine(PhysicalMemory(SIZE, host=buffer()), DeviceTree())
    machine.devices.add("nic")
    with pytest.raises(OSError, match="has no file") as error:
        machine.dma("nic", 4096, 4096)

    assert error.value.errno == errno.EOPNOTSUPP
