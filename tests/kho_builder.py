"""Writes kho-v4 handovers page by page, from the specification alone; the walker's counterpart.

Tests use it to give luo what another kernel might have written, right or wrong.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from kho_walker import encode_key, split_key


@dataclass
class Builder:
    """Pages of a handover that is being written.

    Attributes:
        spare: where the next page is taken from; ascending.
        page_shift: log2 of the page's bytes.
        pages: address to content of every page written so far.
        root: page of the radix root.
        fdt: page of the root tree.
    """

    spare: int
    page_shift: int = 12
    pages: dict[int, bytearray] = field(default_factory=dict)
    root: int = 0
    fdt: int = 0

    def __post_init__(self) -> None:
        self.root = self.root or self.page()
        self.fdt = self.fdt or self.page()
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
        self.add_key(encode_key(phys, order, self.page_shift))

    def blob(self, content: bytes) -> int:
        """A preserved page with *content*."""
        phys = self.page()
        self.pages[phys][: len(content)] = content
        self.preserve(phys, 0)
        return phys

    def finish(self, subtrees: dict[str, tuple[int, int]], compatible: bytes = b"kho-v4\0") -> None:
        """Write the root tree with *subtrees*: name to (phys, bytes) (§5.1)."""
        memory_map = struct.pack("<Q", self.root)
        children = {
            name: {"preserved-data": struct.pack("<Q", at), "blob-size": struct.pack("<Q", size)}
            for name, (at, size) in subtrees.items()
        }
        root = {"compatible": compatible, "preserved-memory-map": memory_map}
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
