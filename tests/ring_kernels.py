"""Kernels whose drivers have rings that devices fill by DMA; a second process imports them."""

import struct
import time

from rig import forest

from luo.device import Bus, Driver, LiveUpdateOps
from luo.kernel import Kernel
from luo.machine import Machine
from luo.memory import PhysicalMemory

PAGES = 4
NBYTES = PAGES * 4096
FIRST = 0x3000000  # in the second node
NIC = "pci0/nic"
DISK = "pci0/disk"


def machine(memory=None):
    """Return a machine with a network interface and a disk, each of which needs a ring.

    Kernels allocate from its first node, so that a ring in the second breaks nothing if it is
    forgotten.
    """
    if memory is None:
        memory = PhysicalMemory("64MiB", nodes=2)
    devices = {"pci0": (None, None), NIC: ("pci", "nic"), DISK: ("pci", "nvme")}
    return Machine(memory, forest(devices))


class Ring:
    """A driver that has a ring of :data:`PAGES` pages for each of its devices.

    Args:
        kept: pages from the start that it preserves.
        claims: take the memory of the ring for something else in the next kernel.
        watches: in the next kernel, wait until the device has written into the ring.
    """

    def __init__(self, kept=PAGES, claims=False, watches=False):
        self.kept = kept
        self.claims = claims
        self.watches = watches
        self.at = {}

    def ops(self):
        """Return the callbacks."""
        return LiveUpdateOps(self.prepare, cancel=self.cancel, restore=self.restore, state_size=8)

    def probe(self, device):
        """Make the ring, in the first kernel."""
        phys = FIRST + device.index * NBYTES
        device.memory.claim(phys, PAGES.bit_length() - 1)
        self.at[device.path] = phys

    def prepare(self, device):
        """Say where the ring is, and keep it."""
        phys = self.at[device.path]
        device.slot[:] = struct.pack("=Q", phys)
        if self.kept:
            device.kho.preserve_pages(phys, self.kept)

    def cancel(self, device):
        """Undo that."""
        if self.kept:
            device.kho.unpreserve_pages(self.at[device.path], self.kept)

    def restore(self, device):
        """Go on with the ring."""
        (phys,) = struct.unpack("=Q", device.slot)
        if self.kept:
            device.kho.incoming.restore_pages(phys, self.kept)
        if self.claims:
            device.memory.claim(phys, PAGES.bit_length() - 1)
        self.at[device.path] = phys
        if self.watches:
            word = device.memory.view(phys, 8)
            before, deadline = bytes(word), time.monotonic() + 30
            while bytes(word) == before:
                if time.monotonic() > deadline:
                    raise TimeoutError("the device has stopped")
                time.sleep(0.001)
        device.reclaim()


def kernel(machine, nic=None, disk=None, **kwargs):
    """Return a kernel whose drivers are :class:`Ring` with these arguments."""
    rings = {"nic": Ring(**(nic or {})), "nvme": Ring(**(disk or {}))}
    made = Kernel(
        machine,
        drivers=[Driver(name, ring.ops(), probe=ring.probe) for name, ring in rings.items()],
        buses=[Bus("pci", LiveUpdateOps())],
        **kwargs,
    )
    made.rings = {NIC: rings["nic"].at, DISK: rings["nvme"].at}
    return made


def starts_dma(machine):
    """Have a process of a kernel play the hardware, which it does not have."""
    machine.dma(NIC, 0x200000, NBYTES)
    return kernel(machine)
