"""Sets of serialization blocks that grow and shrink with what they hold (kho-abi 10.1).

Mirrors ``kernel/liveupdate/kho_block.c`` of Linux 7.3. A set of known entries is written in one go
by :meth:`luo.kho.Kho.write_blocks`; this one makes room when an entry is announced, so that writing
it in the last moment cannot fail.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from luo import abi
from luo.errors import from_errno

if TYPE_CHECKING:
    from luo.kho import Kho

__all__ = ["BlockSet"]


class BlockSet:
    """Room for entries of one size, a page at a time; for what is handed over.

    Args:
        kho: of the kernel that hands over.
        entry_size: bytes of an entry.
        what: whose entries, for messages.
    """

    __slots__ = ("_kho", "_pages", "_what", "capacity", "entry_size")

    def __init__(self, kho: Kho, entry_size: int, what: str) -> None:
        self._kho = kho
        self._what = what
        self._pages: list[int] = []
        self.entry_size = entry_size
        self.capacity = abi.block_capacity(entry_size, kho.memory.page_size)

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def head(self) -> int:
        """Physical address of the first block; 0 without one."""
        return self._pages[0] if self._pages else 0

    def grow(self, count: int) -> None:
        """Make room for *count* entries.

        Raises:
            KhoError: ENOSPC above 10,000 blocks, ENOMEM; the set is as before.
        """
        before = len(self._pages)
        try:
            while count > len(self._pages) * self.capacity:
                self._add()
        except BaseException:
            while len(self._pages) > before:
                self._drop()
            raise

    def _add(self) -> None:
        if len(self._pages) >= abi.KHO_BLOCKS_MAX:
            raise from_errno(
                errno.ENOSPC, f"{self._what}: above {abi.KHO_BLOCKS_MAX} blocks of metadata"
            )
        phys = self._kho.alloc_preserve(self._kho.memory.page_size)
        if self._pages:
            self._link(self._pages[-1], phys)
        self._pages.append(phys)

    def _drop(self) -> None:
        self._kho.unpreserve_free(self._pages.pop())
        if self._pages:
            self._link(self._pages[-1], 0)

    def _link(self, block: int, following: int) -> None:
        self._kho.memory.view(block, 8)[:] = following.to_bytes(8, "little")

    def shrink(self, count: int) -> None:
        """Free the blocks that *count* entries do not need."""
        while self._pages and count <= (len(self._pages) - 1) * self.capacity:
            self._drop()

    def write(self, entries: bytes | bytearray) -> None:
        """Write *entries*, all there are, for which there is room."""
        page = self._kho.memory.page_size
        room = self.capacity * self.entry_size
        for number, phys in enumerate(self._pages):
            part = entries[number * room : (number + 1) * room]
            view = self._kho.memory.view(phys, page)
            view[8:16] = (len(part) // self.entry_size).to_bytes(8, "little")
            view[16 : 16 + len(part)] = part
            view[16 + len(part) :] = bytes(page - 16 - len(part))

    def put(self, number: int, entry: bytes) -> None:
        """Write the entry *number*, the last of all so far or one before it."""
        block, place = divmod(number, self.capacity)
        phys = self._pages[block]
        at = abi.KHO_BLOCK_SER.size + place * self.entry_size
        self._kho.memory.view(phys + at, self.entry_size)[:] = entry
        count = self._kho.memory.view(phys + 8, 8)
        if int.from_bytes(count, "little") <= place:
            count[:] = (place + 1).to_bytes(8, "little")

    def clear(self) -> None:
        """Forget the entries; the blocks stay."""
        for phys in self._pages:
            view = self._kho.memory.view(phys, self._kho.memory.page_size)
            view[8:] = bytes(len(view) - 8)
