"""Memory management: regions that were reserved by name at boot stay where they are.

An entry, native u64: phys · pages · 0 · 0.
"""

from __future__ import annotations

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
            context.kho.preserve_pages(phys, nr_pages)
            undo.callback(context.kho.unpreserve_pages, phys, nr_pages)
        return [(phys, nr_pages, 0, 0) for phys, nr_pages in self._regions]

    def revive(self, context: Context, entries: list[list[int]]) -> None:
        """Take the regions over."""
        incoming = context.kho.incoming
        assert incoming is not None
        for phys, nr_pages, *_ in entries:
            incoming.restore_pages(phys, nr_pages)
            self._regions.append((phys, nr_pages))
