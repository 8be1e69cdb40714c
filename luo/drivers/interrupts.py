"""Interrupts: the table of vectors, so that no interrupt is lost or goes to the wrong place.

The table has 16 bytes a vector, one vector for each device with a driver: message address and
message data, native u64. An entry: phys · bytes · 0 · 0; a piece has at most one folio of the
largest order.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from luo.drivers.chain import ChainSubsystem
from luo.errors import HandoverError
from luo.notifier import Context, Priority

__all__ = ["Interrupts"]

_MSI_BASE = 0xFEE00000  # x86: where message-signalled interrupts are written to
_VECTOR_BYTES = 16


class Interrupts(ChainSubsystem):
    """Keeps the table of vectors."""

    name = "interrupts"
    priority = Priority.AFTER_DEVICES

    def __init__(self) -> None:
        super().__init__()
        self._pieces: list[int] = []  # of the kernel before, until the update is over

    def save(self, context: Context, undo: ExitStack) -> list[tuple[int, int, int, int]]:
        """Write the table into preserved memory."""
        vectors = np.flatnonzero(context.kernel.devices.driver_ids >= 0)
        table = np.empty((len(vectors), 2), np.uint64)
        table[:, 0] = _MSI_BASE
        table[:, 1] = vectors
        memory = context.memory
        limit = (memory.page_size << memory.max_order) // _VECTOR_BYTES
        entries = []
        for first in range(0, len(table), limit):
            part = table[first : first + limit]
            phys = context.kho.alloc_preserve(part.nbytes)
            undo.callback(context.kho.unpreserve_free, phys)
            memory.view(phys, part.nbytes)[:] = part.tobytes()
            entries.append((phys, part.nbytes, 0, 0))
        return entries

    def revive(self, context: Context, entries: list[list[int]]) -> None:
        """Point the vectors at this kernel's handlers."""
        for phys, nbytes, *_ in entries:
            table = np.frombuffer(context.memory.view(phys, nbytes), np.uint64).reshape(-1, 2)
            if (table[:, 0] != _MSI_BASE).any():
                raise HandoverError("interrupts: no message address", phys)
            self._pieces.append(phys)

    def settle(self, context: Context) -> None:
        """Free the table: the vectors are this kernel's."""
        incoming = context.kho.incoming
        for phys in self._pieces:
            if incoming is not None:
                incoming.restore_free(phys)
        self._pieces = []
