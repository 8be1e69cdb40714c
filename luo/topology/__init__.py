"""Where devices come from: this host, another host's files, or a generator.

``host`` reads ``/sys/devices``, ``hwloc`` reads what ``lstopo --of xml`` wrote, ``synthetic``
makes device sets of any size from a seed. Each gives a :class:`Host`, or the tree for one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from luo.machine import DeviceTree, Machine

__all__ = ["VM", "Host"]

PAGE_SHIFT = 12


@dataclass(slots=True, eq=False)
class VM:
    """A virtual machine whose RAM, virtual CPUs and devices stay alive across the live update.

    Attributes:
        name: unique on its host.
        node: NUMA node that its RAM comes from.
        ram: ``(order, nr_folios)`` pairs; a folio of order ``k`` has ``4096 << k`` bytes.
        vcpus: number of virtual CPUs.
        devices: indices into the host's tree of the devices assigned to it, int32.
    """

    name: str
    node: int
    ram: list[tuple[int, int]]
    vcpus: int
    devices: NDArray[np.int32]

    @property
    def ram_bytes(self) -> int:
        """Bytes of RAM."""
        return sum(nr_folios << (PAGE_SHIFT + order) for order, nr_folios in self.ram)


@dataclass(slots=True, eq=False)
class Host:
    """A host as it was read or generated: hardware, and the virtual machines on it.

    Attributes:
        devices: the device tree; each device's state is its column ``state``.
        ranges: memory as ``(start, nbytes, node)``, bytes, ascending and disjoint.
        source: ``kind`` (``"sysfs"``, ``"hwloc"`` or ``"synthetic"``), ``path`` and the number of
            ``devices``, as the command's JSON shows them.
        vms: its virtual machines.
        skipped: attributes and directories that are not in any device's state because they
            could not, or must not, be read.
        kho_scratch: value of the kernel parameter ``kho_scratch=`` that the host is booted
            with, or None for the kernel's own sizing.
    """

    devices: DeviceTree
    ranges: list[tuple[int, int, int]]
    source: dict[str, str | int]
    vms: list[VM] = field(default_factory=list)
    skipped: int = 0
    kho_scratch: str | None = None

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory in all ranges."""
        return sum(nbytes for _, nbytes, _ in self.ranges)

    def machine(self) -> Machine:
        """Build a machine: new memory of these ranges, and this very device tree."""
        from luo.machine import Machine
        from luo.memory import PhysicalMemory

        return Machine(PhysicalMemory(ranges=self.ranges), self.devices)
