"""Writes handovers page by page, from the specification alone; the walker's counterpart.

Tests use it to give luo what another kernel might have written, right or wrong.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from kho_walker import SHAPES, bitmap_place, encode_key, split_key


@dataclass
class Builder:
    """Pages of a handover that is being written.

    Attributes:
        spare: where the next page is taken from; ascending.
        page_shift: log2 of the page's bytes.
        pages: address to content of every page written so far.
        root: page of the radix root.
        fdt: page of the root tree.
        abi: generation. With a list of chunks the map is written by :meth:`finish`, and *root* is
            its first chunk then.
        blocks: what was preserved, where there is a list.
    """

    spare: int
    page_shift: int = 12
    pages: dict[int, bytearray] = field(default_factory=dict)
    root: int = 0
    fdt: int = 0
    abi: str = "kho-v4"
    blocks: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        if SHAPES[self.abi].bitmap is None:
            self.root = self.root or self.page()
        self.fdt = self.fdt or self.page()
        if SHAPES[self.abi].data:
            self.preserve(self.fdt, 0)

    def page(self) -> int:
        """Take a zeroed page."""
        phys = self.spare
        self.spare += 1 << self.page_shift
        self.pages[phys] = bytearray(1 << self.page_shift)
        return phys

    def add_key(self, key: int) -> None:
        """Set *key* in the tree (§5.2)."""
        *slots, bit = split_key(key, self.page_shift)
        node = self.root
        for slot in slots:
            (below,) = struct.unpack_from("<Q", self.pages[node], 8 * slot)
            if not below:
                below = self.page()
                struct.pack_into("<Q", self.pages[node], 8 * slot, below)
            node = below
        self.pages[node][bit // 8] |= 1 << bit % 8

    def preserve(self, phys: int, order: int) -> None:
        """Record a block."""
        if SHAPES[self.abi].bitmap is not None:
            self.blocks.add((phys, order))
            return
        self.add_key(encode_key(phys, order, self.page_shift))

    def blob(self, content: bytes) -> int:
        """A preserved page with *content*."""
        phys = self.page()
        self.pages[phys][: len(content)] = content
        self.preserve(phys, 0)
        return phys

    def chunks(self) -> None:
        """Write bitmaps and the list of chunks (§3.2)."""
        size = SHAPES[self.abi].bitmap or 1 << self.page_shift
        bitmaps: dict[tuple[int, int], bytearray] = {}
        for phys, order in self.blocks:
            _, start, bit = bitmap_place(phys, order, 8 * size, self.page_shift)
            bits = bitmaps.setdefault((order, start), bytearray(size))
            bits[bit // 8] |= 1 << bit % 8
        entries: dict[int, list[tuple[int, int]]] = {}
        here = self.spare
        for (order, start), bits in sorted(bitmaps.items()):
            if here == self.spare or here % (1 << self.page_shift) == 0:
                here = self.page()
            at = here % (1 << self.page_shift)
            self.pages[here - at][at : at + size] = bits
            entries.setdefault(order, []).append((start, here))
            here += size
        capacity = ((1 << self.page_shift) - 16) // 16
        pieces = [
            (order, listed[i : i + capacity])
            for order, listed in sorted(entries.items())
            for i in range(0, len(listed), capacity)
        ]
        pages = [self.page() for _ in pieces]
        for page, after, (order, listed) in zip(pages, [*pages[1:], 0], pieces, strict=True):
            chunk = struct.pack("<QII", after, order, len(listed))
            chunk += b"".join(struct.pack("<QQ", *entry) for entry in listed)
            self.pages[page][: len(chunk)] = chunk
        self.root = pages[0] if pages else 0

    def finish(self, subtrees: dict[str, tuple[int, int]], compatible: bytes | None = None) -> None:
        """Write the root tree with *subtrees*: name to (phys, bytes) (§2.1, §3.1, §5.1)."""
        shape = SHAPES[self.abi]
        if shape.bitmap is not None:
            self.chunks()
        memory_map = struct.pack("<Q", self.root)
        if compatible is None:
            compatible = (shape.compatible or "kho-v1").encode() + b"\0"
        root = {"compatible": compatible}
        if shape.data is None:
            children = {"preserved-memory": {"metadata": memory_map}}
        else:
            root["preserved-memory-map"] = memory_map
            children = {name: {shape.data: struct.pack("<Q", at)} for name, (at, _) in
                        subtrees.items()}  # fmt: skip
        if shape.size:
            for name, (_, size) in subtrees.items():
                children[name][shape.size] = struct.pack("<Q", size)
        tree = flatten(root, children)
        self.pages[self.fdt][: len(tree)] = tree

    def scratch(self, phys: int, areas: Iterable[tuple[int, int]]) -> int:
        """Write the scratch array at *phys*, not preserved; return its bytes (§8)."""
        array = b"".join(struct.pack("<QQ", *area) for area in areas)
        self.pages[phys] = bytearray(array.ljust(1 << self.page_shift, b"\0"))
        return len(array)


def flatten(root: dict[str, bytes], children: dict[str, dict[str, bytes]]) -> bytes:
    """A flattened tree of one level, as a sequential writer leaves it (§1)."""
    strings = bytearray()

    def node(name: str, properties: dict[str, bytes]) -> bytes:
        out = struct.pack(">I", 1) + padded(name.encode() + b"\0")
        for key, value in properties.items():
            if key.encode() + b"\0" not in strings:
                strings.extend(key.encode() + b"\0")
            at = strings.index(key.encode() + b"\0")
            out += struct.pack(">III", 3, len(value), at) + padded(value)
        return out

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    end = struct.pack(">I", 2)
    body = node("", root) + b"".join(node(*child) + end for child in children.items()) + end
    body += struct.pack(">I", 9)
    total = 56 + len(body) + len(strings)
    words = (0xD00DFEED, total, 56, 56 + len(body), 40, 17, 16, 0, len(strings), len(body))
    return struct.pack(">10I", *words) + bytes(16) + body + bytes(strings)
