"""A reader of handovers of every generation, written from the specification alone.

It shares no code with luo, so that what luo writes is judged by somebody who knows only
``kho-abi.md`` (sections are cited as §n). Memory is reached through one callable,
``read(phys, nbytes) -> bytes``. Whatever breaks a rule raises :class:`Broken`.
"""

import itertools
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

Read = Callable[[int, int], bytes]
Block = tuple[int, int]  # (phys, order)


class Broken(ValueError):
    """The handover breaks a rule; *phys* is where, or None."""

    def __init__(self, rule: str, phys: int | None = None) -> None:
        super().__init__(rule if phys is None else f"{phys:#x}: {rule}")
        self.rule, self.phys = rule, phys


def u64(data: bytes, offset: int = 0) -> int:
    """A native (little-endian) 64-bit integer at any alignment (§1)."""
    return struct.unpack_from("<Q", data, offset)[0]


# ---- flattened device tree (§1; DT spec chapter 5) ----


@dataclass
class FdtNode:
    """A node of a flattened tree; properties and children in file order."""

    name: str
    properties: dict[str, bytes] = field(default_factory=dict)
    children: dict[str, "FdtNode"] = field(default_factory=dict)


def fdt_string(blob: bytes, start: int, end: int) -> str:
    """The NUL-terminated string at *start*, which must end before *end*."""
    nul = blob.find(b"\0", start, end)
    if not 0 <= start < end or nul < 0:
        raise Broken("string of the tree is not terminated inside its block", start)
    return blob[start:nul].decode("utf-8", "surrogateescape")  # any bytes are a name


def parse_fdt(buffer: bytes) -> FdtNode:
    """The tree in *buffer*; offsets in errors are bytes of the buffer."""
    if len(buffer) < 40:
        raise Broken("shorter than a tree's header", 0)
    magic, total, struct_at, strings_at, _, version, last, _, strings_len, struct_len = (
        struct.unpack_from(">10I", buffer)
    )
    if magic != 0xD00DFEED or version < 17 or last > 17:
        raise Broken("not a version 17 tree", 0)
    if total > len(buffer) or struct_at % 4 or struct_at + struct_len > total:
        raise Broken("structure block outside the tree", 8)
    if strings_at + strings_len > total:
        raise Broken("strings block outside the tree", 12)
    blob, at, end = buffer[:total], struct_at, struct_at + struct_len
    holder = FdtNode("")  # stands above the root, so that the root is a child like any other
    stack = [holder]
    while at + 4 <= end:
        token = int.from_bytes(blob[at : at + 4], "big")
        if token == 1:  # FDT_BEGIN_NODE: name, padded to 4
            name = fdt_string(blob, at + 4, end)
            if name in stack[-1].children or (stack[-1] is holder) != (name == ""):
                raise Broken(f"node name {name!r} is empty, or used twice", at)
            node = stack[-1].children[name] = FdtNode(name)
            stack.append(node)
            at += 4 + len(name) // 4 * 4 + 4
        elif token == 3 and at + 12 <= end and len(stack) > 1:  # FDT_PROP: length, name, value
            length, name_at = struct.unpack_from(">2I", blob, at + 4)
            if at + 12 + length > end or stack[-1].children:
                raise Broken("property outside the structure block, or after a child", at)
            name = fdt_string(blob, strings_at + name_at, strings_at + strings_len)
            if name in stack[-1].properties:
                raise Broken(f"property {name!r} stands twice", at)
            stack[-1].properties[name] = blob[at + 12 : at + 12 + length]
            at += 12 + (length + 3) // 4 * 4
        elif token == 2 and len(stack) > 1:  # FDT_END_NODE
            stack.pop()
            at += 4
        elif token == 4:  # FDT_NOP
            at += 4
        elif token == 9 and len(stack) == 1 and "" in holder.children:  # FDT_END
            return holder.children[""]
        else:
            raise Broken(f"token {token} does not belong here", at)
    raise Broken("structure block ends without an end token", at)


# ---- how the next kernel finds the data (§9.1, §9.2) ----


def from_setup_data(data: bytes) -> tuple[int, int, int, int]:
    """(fdt phys, fdt bytes, scratch phys, scratch bytes) of an x86 setup_data node (§9.1)."""
    if len(data) != 48:
        raise Broken(f"setup_data node has {len(data)} bytes, not 48", 0)
    _, kind, length, *four = struct.unpack("<QIIQQQQ", data)
    if (kind, length) != (10, 32):
        raise Broken("setup_data node is not of type 10 with 32 bytes", 8)
    return tuple(four)


def from_chosen(device_tree: bytes) -> tuple[int, int, int, int]:
    """The same four numbers from /chosen of a device tree: big-endian cells (§9.2)."""
    root = parse_fdt(device_tree)
    cells = [int.from_bytes(root.properties[f"#{n}-cells"], "big") * 4 for n in ("address", "size")]
    four: list[int] = []
    for name in ("linux,kho-fdt", "linux,kho-scratch"):
        value = root.children["chosen"].properties[name]
        if len(value) != sum(cells):
            raise Broken(f"{name} is not one (address, size)")
        four += int.from_bytes(value[: cells[0]], "big"), int.from_bytes(value[cells[0] :], "big")
    return four[0], four[1], four[2], four[3]


# ---- preserved map: keys and radix tree (§4, §5.2) ----


def geometry(page_shift: int, abi: str = "kho-v4") -> tuple[int, int, int]:
    """(slot bits, leaf bits, inner levels); kho-v2 counted one key bit too few (§4)."""
    slot_bits, leaf_bits = page_shift - 3, page_shift + 3
    key_bits = 64 - page_shift + (abi != "kho-v2")
    return slot_bits, leaf_bits, -((leaf_bits - key_bits) // slot_bits)


def encode_key(phys: int, order: int, page_shift: int = 12) -> int:
    """The key of a block: one marker bit above the widest address of its order (§5.2)."""
    return (1 << (64 - page_shift - order)) + (phys >> (page_shift + order))


def decode_key(key: int, page_shift: int = 12) -> Block:
    """(phys, order) of *key*; the marker is its highest bit, 1..64-PAGE_SHIFT (§5.2)."""
    marker = key.bit_length() - 1
    if not 1 <= marker <= 64 - page_shift:
        raise Broken(f"key {key:#x}: marker bit {marker} is not in 1..{64 - page_shift}")
    order = 64 - page_shift - marker
    return (key - (1 << marker)) << (page_shift + order), order


def split_key(key: int, page_shift: int = 12, abi: str = "kho-v4") -> list[int]:
    """The key as indices: root slot first, leaf bit last (§5.2)."""
    slot_bits, leaf_bits, inner = geometry(page_shift, abi)
    slots = [(key >> (leaf_bits + n * slot_bits)) % (1 << slot_bits) for n in range(inner)]
    return [*reversed(slots), key % (1 << leaf_bits)]


@dataclass(frozen=True)
class TreeNode:
    """A page of the radix tree; *level* 0 is a leaf, *prefix* the key bits known there."""

    level: int
    phys: int
    prefix: int


def walk_keys(
    read: Read,
    root: int,
    page_shift: int,
    nodes: list[TreeNode],
    shape: tuple[int, int, int] | None = None,
) -> Iterator[int]:
    """All keys in ascending order, depth first; node pages are appended to *nodes* (§5.2).

    *shape* is a :func:`geometry`, None the right one.
    """
    slot_bits, leaf_bits, inner = shape or geometry(page_shift)
    seen: set[int] = set()

    def visit(phys: int, level: int, prefix: int) -> Iterator[int]:
        if phys == 0 or phys % (1 << page_shift):
            raise Broken("tree node is not a page", phys)
        if phys in seen:
            raise Broken("tree node is reached twice", phys)
        seen.add(phys)
        nodes.append(TreeNode(level, phys, prefix))
        words = struct.unpack(f"<{1 << slot_bits}Q", read(phys, 1 << page_shift))
        for index, word in enumerate(words):
            if level and word:
                shift = leaf_bits + (level - 1) * slot_bits
                yield from visit(word, level - 1, prefix | index << shift)
            while not level and word:
                yield prefix | index * 64 + (word & -word).bit_length() - 1
                word &= word - 1

    yield from visit(root, inner, 0)


# ---- preserved map: chunks and bitmaps (§2.3, §3.2) ----


def bitmap_place(phys: int, order: int, bits: int, page_shift: int = 12) -> tuple[int, int, int]:
    """(index of the bitmap, its phys_start, bit) of a block; *bits* is PRESERVE_BITS (§3.2)."""
    high = phys >> (page_shift + order)
    return high // bits, (high // bits * bits) << (order + page_shift), high % bits


def walk_chunks(
    read: Read, head: int, page_shift: int, bitmap_bytes: int, nodes: list[TreeNode]
) -> Iterator[Block]:
    """All blocks in the order of the list; pages of chunks and bitmaps go to *nodes* (§3.2)."""
    page = 1 << page_shift
    seen: set[int] = set()

    def take(phys: int, level: int, prefix: int) -> None:
        seen.add(phys)
        nodes.append(TreeNode(level, phys, prefix))

    while head:
        if head % page or head in seen:
            raise Broken("chunk is no page, or is listed twice", head)
        take(head, 1, 0)
        chunk = read(head, page)
        following, order, count = struct.unpack_from("<QII", chunk)
        if count > (page - 16) // 16:
            raise Broken(f"chunk lists {count} bitmaps", head)
        for start, bitmap in struct.iter_unpack("<QQ", chunk[16 : 16 + 16 * count]):
            if bitmap % bitmap_bytes or start % (8 * bitmap_bytes << (order + page_shift)):
                raise Broken("bitmap is misaligned, or starts where none does", bitmap)
            if bitmap_bytes == page and bitmap in seen:
                raise Broken("bitmap is listed twice", bitmap)
            if bitmap // page * page not in seen:
                take(bitmap // page * page, 0, start)
            bits = int.from_bytes(read(bitmap, bitmap_bytes), "little")
            while bits:
                low = bits & -bits
                yield start + ((low.bit_length() - 1) << (order + page_shift)), order
                bits ^= low
        head = following


# ---- sub-formats (§6, §8, §10) ----


def read_scratch(read: Read, phys: int, nbytes: int) -> list[tuple[int, int]]:
    """(start, bytes) of each scratch area: floor(nbytes / 16) entries (§8)."""
    data = read(phys, nbytes // 16 * 16)
    return [(start, size) for start, size in struct.iter_unpack("<QQ", data)]


def read_metadata(blob: bytes) -> tuple[int, str, int]:
    """(version, previous release, kexec count) of the kexec-metadata blob (§10.3)."""
    if len(blob) < 73:
        raise Broken("kexec-metadata is shorter than 73 bytes")
    version, release, count = struct.unpack_from("<I65sI", blob)
    if version != 1 or b"\0" not in release:
        raise Broken("kexec-metadata: version is not 1, or release not terminated")
    return version, release.split(b"\0")[0].decode("ascii"), count


def block_capacity(entry_bytes: int, page_bytes: int = 4096) -> int:
    """Entries of a serialization block, behind its 16-byte header (§10.1)."""
    return (page_bytes - 16) // entry_bytes


def read_blocks(
    read: Read, head: int, entry_bytes: int, page_bytes: int = 4096
) -> tuple[list[int], list[bytes]]:
    """(block pages, entries) of a chain of serialization blocks; head 0 is empty (§10.1)."""
    pages: list[int] = []
    entries: list[bytes] = []
    while head:
        if head % page_bytes or head in pages or len(pages) == 10000:
            raise Broken("chain of blocks is no page, turns round, or has over 10000 blocks", head)
        pages.append(head)
        page = read(head, page_bytes)
        count = u64(page, 8)
        if not 1 <= count <= block_capacity(entry_bytes, page_bytes):
            raise Broken(f"block holds {count} entries", head)
        entries += (page[16 + i * entry_bytes :][:entry_bytes] for i in range(count))
        head = u64(page)
    return pages, entries


def read_vmalloc(
    read: Read, descriptor: bytes, page_bytes: int = 4096
) -> tuple[list[int], list[int]]:
    """(chunk pages, entries) of a preserved vmalloc area (§6)."""
    chunk, total, _, order = struct.unpack("<QIHH", descriptor)
    chunks: list[int] = []
    entries: list[int] = []
    while chunk:
        if chunk in chunks:
            raise Broken("chain of vmalloc chunks turns round", chunk)
        chunks.append(chunk)
        chunk, *slots = struct.unpack(f"<{page_bytes // 8}Q", read(chunk, page_bytes))
        entries += slots[: slots.index(0)] if 0 in slots else slots
        if len(entries) << order > total:
            raise Broken(f"vmalloc area has more than its {total} pages", chunks[-1])
    if len(entries) << order != total:
        raise Broken(f"vmalloc area has {len(entries) << order} pages, not {total}")
    return chunks, entries


# ---- the whole handover (§5.1, §9.3) ----


@dataclass
class Image:
    """What a handover says. ``preserved`` and ``nodes`` are in walk order.

    In kho-v5-series users' data is in ``tree``, and there are no subtrees.
    """

    fdt_phys: int
    page_bytes: int
    subtrees: dict[str, tuple[int, int]]
    scratch: list[tuple[int, int]]
    preserved: list[Block]
    nodes: list[TreeNode]
    abi: str = "kho-v4"
    tree: FdtNode | None = None


@dataclass(frozen=True)
class Shape:
    """A column of the table in §14, as far as a reader must know it."""

    compatible: str | None  # None: not checked
    data: str | None  # property with the blob's address; None: data is inline
    size: str | None  # property with its bytes
    bitmap: int | None  # bytes of a bitmap, 0: a page; None: radix tree
    null_map: bool = False  # whether 0 means that nothing is preserved


SHAPES = {
    "kho-v5-series": Shape(None, None, None, 512, True),
    "kho-v1-512": Shape("kho-v1", "fdt", None, 512, True),
    "kho-v1-notifier": Shape("kho-v1", "fdt", None, 0, True),
    "kho-v1": Shape("kho-v1", "fdt", None, 0),
    "kho-v2": Shape("kho-v2", "preserved-data", None, None),
    "kho-v3": Shape("kho-v3", "preserved-data", "blob-size", None),
    "kho-v4": Shape("kho-v4", "preserved-data", "blob-size", None),
}


def root_tree(read: Read, phys: int, nbytes: int, abi: str) -> FdtNode:
    """The root tree; that of kho-v5-series is as long as its own header says (§2.6)."""
    if SHAPES[abi].data is None:
        nbytes = int.from_bytes(read(phys, 40)[4:8], "big")
    return parse_fdt(read(phys, nbytes))


def read_root(
    read: Read, phys: int, nbytes: int, abi: str = "kho-v4"
) -> tuple[int, dict[str, tuple[int, int]]]:
    """(map, {name: (phys, bytes)}) of the root tree; its *compatible* is checked (§2.1, §3.1,
    §4, §5.1). A blob without a noted size is a tree, or has one page.
    """
    shape, root = SHAPES[abi], root_tree(read, phys, nbytes, abi)
    strings = root.properties.get("compatible", b"").split(b"\0")[:-1]
    if shape.compatible and shape.compatible.encode() not in strings:
        raise Broken(f"root tree is not compatible with {shape.compatible}", phys)

    def number(node: FdtNode, name: str) -> int:
        value = node.properties.get(name, b"")
        if len(value) != 8:
            raise Broken(f"{name} of the root tree is missing, or not of 8 bytes", phys)
        return u64(value)

    if shape.data is None:
        if "preserved-memory" not in root.children:
            raise Broken("root tree has no preserved-memory", phys)
        return number(root.children["preserved-memory"], "metadata"), {}
    memory_map = number(root, "preserved-memory-map")
    if memory_map == 0 and not shape.null_map:
        raise Broken("map of the root tree is null", phys)
    subtrees = {}
    for name, child in root.children.items():
        at = number(child, shape.data)
        if shape.size:
            size = number(child, shape.size)
        else:
            head = read(at, 8)
            known = head[:4] == bytes.fromhex("d00dfeed")
            size = int.from_bytes(head[4:], "big") if known else 1
        subtrees[name] = (at, size)
    return memory_map, subtrees


def read_handover(
    read: Read,
    fdt: int,
    fdt_bytes: int,
    scratch: int,
    scratch_bytes: int,
    page_shift: int = 12,
    abi: str = "kho-v4",
) -> Image:
    """Read everything that the four numbers of a handover lead to (§9.3)."""
    memory_map, subtrees = read_root(read, fdt, fdt_bytes, abi)
    nodes: list[TreeNode] = []
    bitmap = SHAPES[abi].bitmap
    if bitmap is None:
        keys = walk_keys(read, memory_map, page_shift, nodes)
        preserved = [decode_key(key, page_shift) for key in keys]
    else:
        size = bitmap or 1 << page_shift
        preserved = list(walk_chunks(read, memory_map, page_shift, size, nodes))
    areas = read_scratch(read, scratch, scratch_bytes)
    tree = root_tree(read, fdt, fdt_bytes, abi)
    return Image(fdt, 1 << page_shift, subtrees, areas, preserved, nodes, abi, tree)


def overlaps(start: int, nbytes: int, areas: Iterable[tuple[int, int]]) -> bool:
    """Whether [start, start + nbytes) meets one of the (start, bytes) *areas* (§8)."""
    return any(start < at + size and at < start + nbytes for at, size in areas if size)


def check_image(image: Image, ram: Iterable[tuple[int, int]]) -> None:
    """Check what the format takes for granted (§7, §8, §12 items 16 and 18).

    Args:
        image: the handover.
        ram: (start, bytes) of the machine's memory, ascending.
    """
    spans: list[tuple[int, int]] = []
    for start, size in ram:
        if spans and sum(spans[-1]) == start:  # a block may cross the border of touching ranges
            start, size = spans[-1][0], spans.pop()[1] + size
        spans.append((start, size))
    pages = [(node.phys, image.page_bytes) for node in image.nodes]
    blocks = sorted((phys, image.page_bytes << order) for phys, order in image.preserved)
    for start, size in [*blocks, *pages]:
        if not any(at <= start and start + size <= at + length for at, length in spans):
            raise Broken(f"preserved block or tree node of {size:#x} bytes outside RAM", start)
        if overlaps(start, size, image.scratch):
            raise Broken("preserved block or tree node in scratch", start)
    everything = sorted(blocks + pages)
    for (start, size), (after, _) in itertools.pairwise(everything):
        if after < start + size:
            raise Broken("two preserved blocks, or a block and a tree node, overlap", after)
    if SHAPES[image.abi].data and (image.fdt_phys, 0) not in image.preserved:
        raise Broken("page of the root tree is not preserved", image.fdt_phys)
    for name, (phys, nbytes) in image.subtrees.items():
        covered = phys
        for start, size in blocks:  # ascending, so one pass joins neighbours
            covered = start + size if start <= covered < start + size else covered
        if covered < phys + max(nbytes, 1):
            raise Broken(f"blob of subtree {name} is not preserved", covered)


def main(arguments: list[str]) -> None:
    """Print, as JSON, the image that an inherited memfd holds: FD and the handover's numbers."""
    fd, *four = map(int, arguments)
    size = os.fstat(fd).st_size  # RAM starts at 0: the file is the memory

    def read(phys: int, nbytes: int) -> bytes:
        if phys + nbytes > size:
            raise Broken("read outside memory", phys)
        return os.pread(fd, nbytes, phys)

    image = read_handover(read, *four)
    check_image(image, [(0, size)])
    metadata = read_metadata(read(*image.subtrees["kexec-metadata"]))
    out = {
        "preserved": image.preserved,
        "subtrees": image.subtrees,
        "scratch": image.scratch,
        "nodes": [node.phys for node in image.nodes],
        "metadata": metadata,
        "modules": sorted(sys.modules),
    }
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
