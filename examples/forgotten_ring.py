"""A device goes on writing into its ring while the kernel is changed, and a driver forgets that.

As a program; the next kernel is in a second process and says on standard error what it found::

    python examples/forgotten_ring.py
"""

import struct

import luo

ORDER = 6  # of the ring: 64 pages
NBYTES = 4096 << ORDER
rings: dict[str, int] = {}  # where this kernel's driver has them


def probe(dev: luo.Device) -> None:
    rings[dev.path] = dev.memory.alloc_folio(ORDER)


# The driver that forgets: it says where the ring is, and the next kernel has other uses for it.
def note(dev: luo.Device) -> None:
    dev.slot[:] = struct.pack("=Q", rings[dev.path])


def start_afresh(dev: luo.Device) -> None:
    dev.memory.alloc_folio(ORDER)  # a table of descriptors
    dev.reclaim()


# The mended one: the ring is preserved in PREPARE, and taken over where it is.
def keep(dev: luo.Device) -> None:
    note(dev)
    dev.kho.preserve_folio(rings[dev.path], ORDER)


def let_go(dev: luo.Device) -> None:
    dev.kho.unpreserve_folio(rings[dev.path], ORDER)


def take_over(dev: luo.Device) -> None:
    (rings[dev.path],) = struct.unpack("=Q", dev.slot)
    dev.kho.incoming.restore_folio(rings[dev.path])
    dev.reclaim()


FORGETFUL = luo.LiveUpdateOps(note, restore=start_afresh, state_size=8)
MENDED = luo.LiveUpdateOps(keep, cancel=let_go, restore=take_over, state_size=8)


def kernel(machine: luo.Machine, forgets: bool) -> luo.Kernel:
    """Build the software; a successor in another process is started from this function's name."""
    driver = luo.Driver("nic", FORGETFUL if forgets else MENDED, probe=probe)
    return luo.Kernel(machine, drivers=[driver])


def update(forgets: bool) -> None:
    hardware = luo.DeviceTree()
    hardware.add("nic0", driver="nic")
    machine = luo.Machine("256MiB", hardware)
    old = kernel(machine, forgets).boot()
    old.devices.request("nic0")

    with machine.dma("nic0", rings["nic0"], NBYTES) as device:
        report = luo.live_update(
            old, luo.KernelImage("forgotten_ring:kernel", args={"forgets": forgets})
        )
        device.lap()  # once more around the ring
        done = device.stop()

    print("the driver that forgets:" if forgets else "the mended driver:")
    for stray in done.strays:
        print("  ", stray)
    print("   the update has", "an error" if report.error else "no error")
    if not done.strays:
        there = machine.memory.view(done.phys, done.nbytes) == done.expected()
        print("   every write is there:", there)
    report.kernel.close()


if __name__ == "__main__":
    update(forgets=True)
    update(forgets=False)
