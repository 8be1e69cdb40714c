"""Preserving memory that is contiguous only in a kernel's view of it (kho-abi 6).

Mirrors ``kho_preserve_vmalloc()`` and its fellows of ``kexec_handover.c``; :class:`luo.kho.Kho` has
them as methods. What crosses is a descriptor of 16 bytes, which its owner carries over, and a chain
of chunks, one page each, with the addresses of the pages.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luo.abi import VMALLOC_SER
from luo.errors import HandoverError, from_errno

if TYPE_CHECKING:
    from luo.kho import Incoming, Kho
    from luo.memory import PhysicalMemory

__all__ = [
    "VM_ALLOC",
    "VM_ALLOW_HUGE_VMAP",
    "VmallocDescriptor",
    "preserve",
    "read",
    "restore",
    "unpreserve",
]

VM_ALLOC: Final = 1
VM_ALLOW_HUGE_VMAP: Final = 2

#: More chunks than 2^32 pages need, at the smallest page size: a longer chain is a circle.
_CHUNKS_MAX: Final = (1 << 32) // 511 + 1


@dataclass(frozen=True, slots=True)
class VmallocDescriptor:
    """``struct kho_vmalloc``.

    Attributes:
        first: physical address of the first chunk.
        total_pages: pages in the area.
        flags: :data:`VM_ALLOC`, and :data:`VM_ALLOW_HUGE_VMAP` for an area of larger blocks.
        order: an entry stands for 2**order pages.
    """

    first: int
    total_pages: int
    flags: int
    order: int

    def pack(self) -> bytes:
        """Return the 16 bytes."""
        return VMALLOC_SER.pack(self.first, self.total_pages, self.flags, self.order)

    @classmethod
    def unpack(cls, descriptor: bytes) -> Self:
        """Read the 16 bytes.

        Raises:
            HandoverError: there are not 16, or a number is none that a kernel writes.
        """
        if len(descriptor) != VMALLOC_SER.size:
            raise HandoverError(f"vmalloc descriptor of {len(descriptor)} bytes, not 16")
        found = cls(*VMALLOC_SER.unpack(descriptor))
        if found.order > 32 or found.total_pages & ((1 << found.order) - 1):
            raise HandoverError(
                f"vmalloc descriptor: {found.total_pages} pages, no blocks of order {found.order}"
            )
        return found


def preserve(kho: Kho, pages: ArrayLike, order: int = 0) -> bytes:
    """Preserve the blocks of an area and the chunks that list them.

    Args:
        kho: the outgoing side.
        pages: physical address of each block, in the area's order; ``uint64``.
        order: of each block.

    Returns:
        the descriptor, 16 bytes.

    Raises:
        KhoError: EINVAL without pages, with 2**32 or more, or as ``preserve_pages``; ENOMEM.
            Nothing is left preserved then.
    """
    memory = kho.memory
    blocks = np.ascontiguousarray(pages, np.uint64).ravel()
    total = len(blocks) << order
    if not 0 < total < 1 << 32:
        raise from_errno(errno.EINVAL, f"preserve_vmalloc: {total} pages, not 1 to 2^32 - 1")
    per_chunk = memory.page_size // 8 - 1
    with ExitStack() as undo:
        whole, straddling = _by_node(memory, blocks, order)
        kho.preserve_folios(whole, order)
        undo.callback(kho.unpreserve_folios, whole, order)
        for phys in straddling:  # which a border of nodes cuts, where the generation has that rule
            kho.preserve_pages(phys, 1 << order)
            undo.callback(kho.unpreserve_pages, phys, 1 << order)
        # A chunk that is full is followed by another, so a multiple of 511 ends in an empty one.
        chunks = []
        for _ in range(len(blocks) // per_chunk + 1):
            chunks.append(kho.alloc_preserve(memory.page_size))
            undo.callback(kho.unpreserve_free, chunks[-1])
        for number, phys in enumerate(chunks):
            words = np.frombuffer(memory.view(phys, memory.page_size), np.uint64)
            listed = blocks[number * per_chunk : (number + 1) * per_chunk]
            words[0] = chunks[number + 1] if number + 1 < len(chunks) else 0
            words[1 : 1 + len(listed)] = listed
        undo.pop_all()
    flags = VM_ALLOC | (VM_ALLOW_HUGE_VMAP if order else 0)
    return VmallocDescriptor(chunks[0], total, flags, order).pack()


def unpreserve(kho: Kho, descriptor: bytes) -> None:
    """Undo :func:`preserve`, in the reverse order; the blocks stay allocated.

    Raises:
        HandoverError: somebody wrote over the chunks.
        KhoError: ENOENT if a block is not preserved; nothing changes then.
    """
    found = VmallocDescriptor.unpack(descriptor)
    chunks, blocks = _read(kho.memory, found)
    whole, straddling = _by_node(kho.memory, blocks, found.order)
    kho.unpreserve_folios(whole, found.order)
    for phys in straddling:
        kho.unpreserve_pages(phys, 1 << found.order)
    for phys in reversed(chunks):
        kho.unpreserve_free(phys)


def restore(incoming: Incoming, descriptor: bytes) -> NDArray[np.uint64]:
    """Take an area over: its blocks are the caller's, the chunks are freed.

    Returns:
        ndarray: physical address of each block, ``uint64``.

    Raises:
        HandoverError: descriptor or chunks break a rule, or a block is not preserved; nothing has
            been restored then.
    """
    found, chunks, blocks = _checked(incoming, descriptor)
    for phys in blocks.tolist():
        incoming.restore_pages(phys, 1 << found.order)
    for phys in chunks:
        incoming.restore_free(phys)
    return blocks


def read(incoming: Incoming, descriptor: bytes) -> tuple[NDArray[np.uint64], int]:
    """Return what :func:`restore` would take over, without doing so.

    Returns:
        tuple: physical address of each block, ``uint64``; their order.

    Raises:
        HandoverError: as :func:`restore`.
    """
    found, _, blocks = _checked(incoming, descriptor)
    return blocks, found.order


def _checked(
    incoming: Incoming, descriptor: bytes
) -> tuple[VmallocDescriptor, list[int], NDArray[np.uint64]]:
    """Return descriptor, chunks and blocks of an area that can be restored."""
    found = VmallocDescriptor.unpack(descriptor)
    chunks, blocks = _read(incoming.memory, found, incoming)
    _check_blocks(incoming, blocks.tolist(), incoming.memory.page_size << found.order, chunks)
    return found, chunks, blocks


def _check_blocks(incoming: Incoming, blocks: list[int], nbytes: int, chunks: list[int]) -> None:
    """Raise unless all blocks can be restored: each listed once, and preserved as just these pages.

    A part of a larger preserved block cannot be taken over, nor can a page be block and chunk.
    """
    taken = {phys // nbytes for phys in chunks}
    for phys in blocks:
        if phys // nbytes in taken:
            raise HandoverError("vmalloc block is listed twice, or is a chunk", phys)
        taken.add(phys // nbytes)
        at = phys
        while at < phys + nbytes:
            order = incoming.order_of(at)
            if order is None:
                raise HandoverError("vmalloc block is not preserved", phys)
            at += incoming.memory.page_size << order
        if at != phys + nbytes:
            raise HandoverError("vmalloc block is part of a larger preserved one", phys)


def _by_node(
    memory: PhysicalMemory, blocks: NDArray[np.uint64], order: int
) -> tuple[NDArray[np.uint64], list[int]]:
    """Return the blocks that lie on one node, and those that a border of nodes cuts."""
    starts = np.array([start for start, _, _ in memory.ranges], np.uint64)
    nodes = np.array([node for _, _, node in memory.ranges], np.int64)
    last = blocks + np.uint64((memory.page_size << order) - 1)
    first_node, last_node = (
        nodes[np.maximum(np.searchsorted(starts, at, "right") - 1, 0)] for at in (blocks, last)
    )
    return blocks[first_node == last_node], blocks[first_node != last_node].tolist()


def _chunks(
    memory: PhysicalMemory, first: int, incoming: Incoming | None
) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    seen: set[int] = set()
    phys = first
    while phys:
        page = memory.page_size
        if phys in seen or len(seen) > _CHUNKS_MAX:
            raise HandoverError("vmalloc chunks run in a circle", phys)
        if phys % page or not memory.contains(phys, page):
            raise HandoverError("vmalloc chunk is misaligned or not in RAM", phys)
        if incoming is not None and incoming.order_of(phys) != 0:
            raise HandoverError("vmalloc chunk is not a preserved page", phys)
        if not memory.is_populated(phys, page):
            raise HandoverError("vmalloc chunk was never written", phys)
        seen.add(phys)
        words = np.frombuffer(memory.view(phys, page), np.uint64).copy()
        yield phys, words[1:]
        phys = int(words[0])


def _read(
    memory: PhysicalMemory, found: VmallocDescriptor, incoming: Incoming | None = None
) -> tuple[list[int], NDArray[np.uint64]]:
    wanted = found.total_pages >> found.order
    chunks: list[int] = []
    parts = [np.zeros(0, np.uint64)]
    count = 0
    for phys, words in _chunks(memory, found.first, incoming):
        chunks.append(phys)
        ends = np.flatnonzero(words == 0)
        listed = words[: int(ends[0])] if ends.size else words
        count += len(listed)
        if count > wanted:
            raise HandoverError(f"vmalloc chunks list more than {wanted} blocks", phys)
        parts.append(listed)
    if count != wanted:
        raise HandoverError(f"vmalloc chunks list {count} blocks, not {wanted}", found.first)
    blocks = np.concatenate(parts)
    misaligned = blocks & np.uint64((memory.page_size << found.order) - 1)
    if misaligned.any():
        wrong = int(blocks[int(np.flatnonzero(misaligned)[0])])
        raise HandoverError(f"vmalloc block is not aligned to order {found.order}", wrong)
    return chunks, blocks
