"""What the built-in subsystems share: entries in a chain of blocks, and runs of folios.

``context.data`` is the head of the chain; an entry is four native u64, whose meaning is each
subsystem's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from luo.notifier import Context, Priority, Subsystem

__all__ = ["ChainSubsystem", "Run", "runs_of"]

ENTRY_BYTES = 32


class Run(NamedTuple):
    """Adjacent folios of one order.

    Attributes:
        phys: byte address of the first.
        nr_folios: how many.
        order: of each.
    """

    phys: int
    nr_folios: int
    order: int

    def folios(self, page_size: int) -> NDArray[np.uint64]:
        """Return the addresses, ``uint64``."""
        step = np.uint64(page_size << self.order)
        return np.uint64(self.phys) + np.arange(self.nr_folios, dtype=np.uint64) * step

    def pieces(self, context: Context) -> Run:
        """Return the same memory in blocks that the next kernel can restore.

        Before kho-v3 a kernel restored no block above its allocator's largest order.
        """
        cap = context.memory.max_order
        if self.order <= cap or not context.kho.generation.restore_order_cap:
            return self
        return Run(self.phys, self.nr_folios << (self.order - cap), cap)


def runs_of(folios: NDArray[np.uint64], order: int, page_size: int) -> list[Run]:
    """Return ascending *folios* as runs."""
    if not len(folios):
        return []
    cuts = np.flatnonzero(np.diff(folios) != np.uint64(page_size << order)) + 1
    starts = np.concatenate(([0], cuts))
    counts = np.diff(np.append(starts, len(folios)))
    pairs = zip(starts.tolist(), counts.tolist(), strict=True)
    return [Run(int(folios[start]), count, order) for start, count in pairs]


class ChainSubsystem:
    """A subsystem whose state is in the entries of one chain.

    Subclasses say what is in them: :meth:`start` for a cold boot, :meth:`save` in PREPARE,
    :meth:`patch` in REBOOT, :meth:`revive` in the next kernel, :meth:`settle` when the update is
    over. CANCEL runs what :meth:`save` put on its stack.
    """

    name: ClassVar[str]
    priority: ClassVar[Priority] = Priority.WITH_DEVICES

    def __init__(self) -> None:
        self._started = False
        self._undo = ExitStack()
        self.subsystem = Subsystem(
            self.name,
            priority=self.priority,
            prepare=self._prepare,
            reboot=self.patch,
            cancel=self._cancel,
            restore=self._restore,
            finish=self._finish,
        )

    def start(self, context: Context) -> None:
        """Allocate what a kernel that booted cold has."""

    def save(self, context: Context, undo: ExitStack) -> list[tuple[int, int, int, int]]:
        """Preserve what must stay, put the reverse of each step on *undo*, return the entries."""
        raise AssertionError(f"{self.name} saves nothing")

    def patch(self, context: Context) -> None:
        """Write what is final only in REBOOT."""

    def revive(self, context: Context, entries: list[list[int]]) -> None:
        """Take over what *entries* say."""

    def settle(self, context: Context) -> None:
        """Free what only the update needed."""

    def _prepare(self, context: Context) -> None:
        if not self._started:
            self.start(context)
            self._started = True
        # Who fails in PREPARE gets no CANCEL, so a failure undoes what it did itself.
        with ExitStack() as undo:
            entries = self.save(context, undo)
            if entries:
                context.data = context.kho.write_blocks(
                    np.array(entries, np.uint64).tobytes(), ENTRY_BYTES
                )
                undo.callback(context.kho.free_blocks, context.data)
            self._undo = undo.pop_all()

    def _cancel(self, context: Context) -> None:
        self._undo.close()

    def _restore(self, context: Context) -> None:
        self._started = True
        incoming = context.kho.incoming
        if context.data and incoming is not None:
            raw = np.ascontiguousarray(incoming.read_blocks(context.data, ENTRY_BYTES))
            self.revive(context, raw.view(np.uint64).tolist())

    def _finish(self, context: Context) -> None:
        self.settle(context)
        incoming = context.kho.incoming
        if context.data and incoming is not None:
            incoming.restore_free_blocks(context.data)


def preserve(context: Context, runs: Iterable[Run], undo: ExitStack) -> None:
    """Preserve every folio of *runs*."""
    for run in (whole.pieces(context) for whole in runs):
        context.kho.preserve_folios(run.folios(context.memory.page_size), run.order)
        undo.callback(_unpreserve, context, run)


def _unpreserve(context: Context, run: Run) -> None:
    context.kho.unpreserve_folios(run.folios(context.memory.page_size), run.order)


def restore(context: Context, runs: Iterable[Run]) -> None:
    """Take every folio of *runs* over from the previous kernel."""
    incoming: Any = context.kho.incoming
    for run in (whole.pieces(context) for whole in runs):
        incoming.restore_folios(run.folios(context.memory.page_size))
