"""Virtual machines: their RAM stays where it is, their virtual CPUs' state is saved.

Entries, native u64 at 0, 8, 16 and 24:

    a VM           phys of the vCPU states · vCPUs · runs of RAM behind it · NUMA node
    a run of RAM   phys of the first folio · folios · order · 0
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from luo.drivers.chain import ChainSubsystem, Run, preserve, restore, runs_of
from luo.errors import HandoverError
from luo.notifier import Context, Priority

if TYPE_CHECKING:
    from luo.topology import VM

__all__ = ["Kvm"]

VCPU_BYTES = 4096  # registers and extended state of one virtual CPU, rounded to a page


@dataclass(slots=True)
class _Guest:
    node: int
    vcpus: int
    vcpu_phys: int = 0
    runs: list[Run] = field(default_factory=list)


class Kvm(ChainSubsystem):
    """Keeps every VM of the machine."""

    name = "kvm"
    priority = Priority.BEFORE_DEVICES

    def __init__(self, vms: Sequence[VM] = ()) -> None:
        super().__init__()
        self._vms = vms
        self._guests: list[_Guest] = []

    def start(self, context: Context) -> None:
        """Start the VMs: allocate their RAM, which nobody touches."""
        for vm in self._vms:
            guest = _Guest(vm.node, vm.vcpus)
            for order, count in vm.ram:
                folios = context.memory.alloc_folios(count, order, vm.node)
                guest.runs += runs_of(folios, order, context.memory.page_size)
            self._guests.append(guest)

    def save(self, context: Context, undo: ExitStack) -> list[tuple[int, int, int, int]]:
        """Preserve RAM in bulk, and make room for the state of the virtual CPUs."""
        entries: list[tuple[int, int, int, int]] = []
        for guest in self._guests:
            if guest.vcpus:
                guest.vcpu_phys = context.kho.alloc_preserve(guest.vcpus * VCPU_BYTES)
                undo.callback(context.kho.unpreserve_free, guest.vcpu_phys)
            preserve(context, guest.runs, undo)
            entries.append((guest.vcpu_phys, guest.vcpus, len(guest.runs), guest.node))
            entries += [(*run, 0) for run in guest.runs]
        return entries

    def patch(self, context: Context) -> None:
        """Stop the virtual CPUs: what their registers hold now is what goes over."""
        for number, guest in enumerate(self._guests):
            if guest.vcpus:
                words = _registers(context, guest)
                words[:, 0] = number
                words[:, 1] = np.arange(guest.vcpus)

    def revive(self, context: Context, entries: list[list[int]]) -> None:
        """Take the VMs over and let their virtual CPUs run."""
        rows = iter(entries)
        for vcpu_phys, vcpus, runs, node in rows:
            guest = _Guest(node, vcpus, vcpu_phys)
            for _ in range(runs):
                row = next(rows, None)
                if row is None:
                    raise HandoverError("kvm: fewer runs of RAM than a VM says", context.data)
                guest.runs.append(Run(*row[:3]))
            restore(context, guest.runs)
            if vcpus:
                words = _registers(context, guest)
                here = words[:, 0] == len(self._guests)
                if not here.all() or (words[:, 1] != np.arange(vcpus)).any():
                    raise HandoverError("kvm: virtual CPUs of another VM", vcpu_phys)
            self._guests.append(guest)

    def settle(self, context: Context) -> None:
        """Free the state of the virtual CPUs: they run."""
        incoming = context.kho.incoming
        for guest in self._guests:
            if guest.vcpus and incoming is not None:
                incoming.restore_free(guest.vcpu_phys)


def _registers(context: Context, guest: _Guest) -> NDArray[np.uint64]:
    """Return the words of each virtual CPU's state, writable."""
    state = context.memory.view(guest.vcpu_phys, guest.vcpus * VCPU_BYTES)
    return np.frombuffer(state, np.uint64).reshape(guest.vcpus, -1)
