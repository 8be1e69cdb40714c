"""IOMMU: the page table of each assigned device stays, so that its DMA goes on.

An entry, native u64 at 0, 8, 16 and 24: phys of the first page · pages · order (0) · number of
the device. A table has a root page and one page for each GiB that it maps in 2 MiB leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from luo.drivers.chain import ChainSubsystem, Run, preserve, restore, runs_of
from luo.errors import HandoverError
from luo.notifier import Context, Priority

if TYPE_CHECKING:
    from luo.topology import VM

__all__ = ["Iommu"]


class Iommu(ChainSubsystem):
    """Keeps a page table for each device that is assigned to a VM."""

    name = "iommu"
    priority = Priority.AFTER_DEVICES

    def __init__(self, vms: Sequence[VM] = ()) -> None:
        super().__init__()
        self._vms = vms
        self._tables: list[tuple[int, list[Run]]] = []

    def start(self, context: Context) -> None:
        """Build the tables: the root of each says whose it is."""
        memory = context.memory
        for vm in self._vms:
            pages = 1 + -(-vm.ram_bytes // (1 << 30))
            for device in vm.devices.tolist():
                folios = memory.alloc_folios(pages, 0, vm.node)
                np.frombuffer(memory.view(int(folios[0]), 8), np.uint64)[0] = device
                self._tables.append((device, runs_of(folios, 0, memory.page_size)))

    def save(self, context: Context, undo: ExitStack) -> list[tuple[int, int, int, int]]:
        """Preserve the tables."""
        for _, runs in self._tables:
            preserve(context, runs, undo)
        return [(*run, device) for device, runs in self._tables for run in runs]

    def revive(self, context: Context, entries: list[list[int]]) -> None:
        """Take the tables over; entries of one device stand together, its root first."""
        for *run, device in entries:
            if not self._tables or self._tables[-1][0] != device:
                root = int(np.frombuffer(context.memory.view(run[0], 8), np.uint64)[0])
                if root != device:
                    raise HandoverError(f"iommu: table of device {root}, not {device}", run[0])
                self._tables.append((device, []))
            self._tables[-1][1].append(Run(*run))
        for _, runs in self._tables:
            restore(context, runs)
