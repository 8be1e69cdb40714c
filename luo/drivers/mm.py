"""Memory management: regions that were reserved by name at boot stay where they are.

An entry, native u64: phys · pages · 0 · 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from luo.drivers.chain import ChainSubsystem
from luo.notifier import Context, Priority

__all__ = ["Regions"]

#: Of the machine's memory, one 1/4096 is reserved, in at most eight regions as Linux has.
_SHARE = 4096
_MAX_REGIONS = 8


class Regions(ChainSubsystem):
    """Keeps one reserved region a NUMA node."""

    name = "mm"
    priority = Priority.BEFORE_DEVICES

    def __init__(self) -> None:
        super().__init__()
        self._regions: list[tuple[int, int]] = []

    def start(self, context: Context) -> None:
        """Reserve the regions."""
        memory = context.memory
        nr_pages = max(1, memory.size // memory.page_size // _SHARE)
        count = min(_MAX_REGIONS, memory.nr_nodes)
        for _ in range(count):
            pages = max(1, nr_pages // count)
            self._regions.append((memory.alloc_pages(pages), pages))

    def save(self, context: Context, undo: ExitStack) -> list[tuple[int, int, int, int]]:
        """Preserve the regions as ranges of pages."""
        for phys, nr_pages in self._regions:
            for piece in _pieces(context, phys, nr_pages):
                context.kho.preserve_pages(*piece)
                undo.callback(context.kho.unpreserve_pages, *piece)
        return [(phys, nr_pages, 0, 0) for phys, nr_pages in self._regions]

    def revive(self, context: Context, entries: list[list[int]]) -> None:
        """Take the regions over."""
        incoming = context.kho.incoming
        assert incoming is not None
        for phys, nr_pages, *_ in entries:
            incoming.restore_pages(phys, nr_pages)
            self._regions.append((phys, nr_pages))


def _pieces(context: Context, phys: int, nr_pages: int) -> Iterator[tuple[int, int]]:
    """Cut a region so that it is recorded in blocks that the next kernel can restore.

    Before kho-v3 a kernel restored no block above its allocator's largest order.
    """
    memory = context.memory
    step = memory.page_size << memory.max_order
    end = phys + nr_pages * memory.page_size
    while phys < end:
        stop = end
        if context.kho.generation.restore_order_cap:
            stop = min(end, (phys // step + 1) * step)
        yield phys, (stop - phys) // memory.page_size
        phys = stop
