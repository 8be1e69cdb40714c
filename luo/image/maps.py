"""Writing a preserved map by hand: right or wrong, with its pages where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from luo import abi as _abi
from luo.errors import HandoverError

__all__ = ["write_chunks", "write_radix"]

Block = tuple[int, int]
Page = tuple[str, int, int, int]


def radix_key(phys: int, order: int, page_size: int) -> int:
    """Return the key of a block (kho-abi 5.2); ValueError if there is none."""
    shift = page_size.bit_length() - 1
    top = 64 - shift - order
    if top < 1 or phys % (page_size << order):
        raise ValueError(f"block {phys:#x} of order {order}: misaligned, or has no key")
    return (1 << top) + (phys >> (shift + order))


def write_radix(
    write: Callable[[int, bytes], None],
    geometry: _abi.RadixGeometry,
    page_size: int,
    root: int,
    blocks: Sequence[Block],
    keys: Sequence[int],
    pages: Sequence[Page],
    spare: Iterator[int],
) -> None:
    """Write a radix tree.

    Args:
        write: puts bytes at a physical address.
        geometry: of the tree.
        page_size: in bytes.
        root: its root page.
        blocks: to be recorded.
        keys: beside them, as they are.
        pages: where nodes are to lie, ``(kind, phys, level, prefix)``; for others *spare* is asked.
        spare: free pages.

    Raises:
        ValueError: a block has no key, or a key is wider than the tree.
        HandoverError: no page is free, or one is not in RAM.
    """
    top = geometry.levels - 1
    wanted = {(level, prefix): phys for kind, phys, level, prefix in pages}
    wanted[top, 0] = root
    inner: dict[tuple[int, int], dict[int, int]] = {(top, 0): {}}
    leaves: dict[int, list[int]] = {}

    def width(level: int) -> int:
        """Bits of a key below a slot of that level; of a leaf: its own."""
        return geometry.leaf_bits + (level - 1) * geometry.slot_bits if level else 0

    def place(level: int, prefix: int) -> int:
        if (level, prefix) not in wanted:
            phys = next(spare, None)
            if phys is None:
                raise HandoverError("no free page for the map", root)
            wanted[level, prefix] = phys
        return wanted[level, prefix]

    def path(leaf: int) -> None:
        """Make the nodes from the root to the leaf with that prefix."""
        for level in range(top, 0, -1):
            node = (
                leaf >> (width(level) + geometry.slot_bits) << (width(level) + geometry.slot_bits)
            )
            slot = leaf >> width(level) & ((1 << geometry.slot_bits) - 1)
            child = leaf >> width(level) << width(level)
            slots = inner.setdefault((level, node), {})
            if slot not in slots:
                slots[slot] = place(level - 1, child)

    for key in (*(radix_key(*block, page_size) for block in blocks), *keys):
        if key >> (width(top) + geometry.slot_bits):
            raise ValueError(f"key {key:#x}: wider than the tree")
        leaf = key >> geometry.leaf_bits << geometry.leaf_bits
        if leaf not in leaves:
            leaves[leaf] = []
            path(leaf)
        leaves[leaf].append(key - leaf)
    for kind, _, level, prefix in pages:  # nodes that hold nothing stay linked
        if (
            kind == "leaf"
            and prefix not in leaves
            and not prefix >> (width(top) + geometry.slot_bits)
        ):
            leaves[prefix] = []
            path(prefix)
        del level
    for (level, prefix), slots in inner.items():
        words = np.zeros(page_size // 8, np.uint64)
        words[list(slots)] = list(slots.values())
        write(place(level, prefix), words.tobytes())
    for prefix, bits in leaves.items():
        write(place(0, prefix), _bitmap(bits, page_size))


def _bitmap(bits: Sequence[int], nbytes: int) -> bytes:
    flags = np.zeros(8 * nbytes, np.uint8)
    flags[list(bits)] = 1
    return np.packbits(flags, bitorder="little").tobytes()


def write_chunks(
    write: Callable[[int, bytes], None],
    generation: _abi.Generation,
    page_size: int,
    head: int,
    blocks: Sequence[Block],
    pages: Sequence[Page],
    spare: Iterator[int],
) -> None:
    """Write a list of chunks and bitmaps (kho-abi 3.2); arguments as :func:`write_radix`.

    Raises:
        ValueError: a block is not aligned to its size.
        HandoverError: no page is free, or one is not in RAM.
    """
    size = generation.bitmap_size(page_size)
    capacity = _abi.chunk_capacity(page_size)
    shift = page_size.bit_length() - 1
    bitmaps: dict[Block, list[int]] = {}
    for phys, order in blocks:
        if order > 63 - shift or phys % (page_size << order):
            raise ValueError(f"block {phys:#x} of order {order}: misaligned, or no such order")
        bit = phys >> (shift + order)
        start = bit // (8 * size) * (8 * size) << (shift + order)
        bitmaps.setdefault((order, start), []).append(bit % (8 * size))
    where = {(level, prefix): phys for kind, phys, level, prefix in pages if kind == "bitmap"}
    for order, start in where:
        bitmaps.setdefault((order, start), [])
    chunks: list[tuple[int, list[Block]]] = []
    for order, start in sorted(bitmaps):
        if not chunks or chunks[-1][0] != order or len(chunks[-1][1]) == capacity:
            chunks.append((order, []))
        chunks[-1][1].append((order, start))

    free: list[int] = []

    def take(nbytes: int) -> int:
        if nbytes == page_size or not free:
            page = next(spare, None)
            if page is None:
                raise HandoverError("no free page for the map", head)
            if nbytes == page_size:
                return page
            free.extend(range(page + page_size - nbytes, page - 1, -nbytes))
        return free.pop()

    places = [phys for kind, phys, _, _ in pages if kind == "chunk"][: len(chunks)]
    if chunks:
        places = [head, *(phys for phys in places if phys != head)][: len(chunks)]
    places += [take(page_size) for _ in range(len(chunks) - len(places))]
    for i, (order, names) in enumerate(chunks):
        following = places[i + 1] if i + 1 < len(chunks) else 0
        raw = bytearray(_abi.KHO_CHUNK_SER.pack(following, order, len(names)))
        for name in names:
            if name not in where:
                where[name] = take(size)
            raw += _abi.KHO_CHUNK_ENTRY_SER.pack(name[1], where[name])
            write(where[name], _bitmap(bitmaps[name], size))
        write(places[i], bytes(raw).ljust(page_size, b"\0"))
