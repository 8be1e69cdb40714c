"""What crosses the reboot: every name, struct and number, by generation.

A leaf that imports nothing of ours. KHO stores integers in the CPU's own byte order (little-endian
on x86-64 and arm64) without padding; only the FDT container itself is big-endian. Mirrors
``include/linux/kho/abi/kexec_handover.h`` and ``include/linux/kho_block.h`` of Linux 7.3; the facts
are in the project's KHO ABI specification, whose sections are cited as "kho-abi".
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

__all__ = [
    "BUG_V2_DEPTH",
    "BUG_V5_SPLIT",
    "CHOSEN_FDT",
    "CHOSEN_SCRATCH",
    "GENERATIONS",
    "KHO_BLOCKS_MAX",
    "KHO_BLOCK_SER",
    "KHO_CHUNK_ENTRY_SER",
    "KHO_CHUNK_SER",
    "KHO_FDT_MAX",
    "KHO_SCRATCH_SER",
    "KHO_SUBTREE_METADATA",
    "LUO_DEVICES_COMPATIBLE",
    "LUO_DEVICES_PROPERTIES",
    "LUO_EXTENT_BYTES",
    "LUO_NODE",
    "LUO_NODES_COMPATIBLE",
    "LUO_SHARD_OVERHEAD",
    "LUO_VERSION",
    "MAX_PAGE_ORDER",
    "PAGEBLOCK_ORDER",
    "SETUP_DATA_SER",
    "SETUP_KEXEC_KHO",
    "VMALLOC_SER",
    "Generation",
    "KexecMetadata",
    "RadixGeometry",
    "block_capacity",
    "chunk_capacity",
    "generation",
]

MAX_PAGE_ORDER: Final = {4096: 10, 16384: 11, 65536: 13}
"""Largest order that Linux's allocator serves, by page size (arm64; x86 for 4 KiB)."""

PAGEBLOCK_ORDER: Final = {4096: 9, 16384: 11, 65536: 13}
"""Order of a page block, by page size: what a huge page of the second level has."""


# ---- radix tree (kho-abi 4, 5.2) ----


@dataclass(frozen=True, slots=True)
class RadixGeometry:
    """Shape of the preserved map's tree for one page size.

    Attributes:
        slot_bits: bits of a key that one inner level consumes.
        leaf_bits: bits of a key that a leaf's bitmap consumes.
        levels: inner levels and the leaf.
        marker_bit: bit of a key that marks order 0; order n is marked n bits below.
    """

    slot_bits: int
    leaf_bits: int
    levels: int
    marker_bit: int


# ---- generations ----


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of the format (kho-abi 14).

    Attributes:
        name: as users give it (``abi="kho-v4"``).
        compatible: string of the root tree.
        check_compatible: whether a reader compares it.
        map_node: child of the root that has the map property; None: the root itself.
        map_property: property that names the preserved map.
        map_may_be_null: whether 0 there means "nothing preserved" instead of an error.
        data_property: property of a child that names the user's blob; None: data is inline.
        size_property: property of a child with the blob's size in bytes; None: blobs are trees,
            which know their size.
        bitmap_bytes: the map is a list of chunks with bitmaps of this size; 0: of one page each;
            None: the map is a radix tree.
        finalize: when LUO has KHO write its map: None: never, it is live; ``"prepare"``: at the end
            of PREPARE, and the map is closed from then on; ``"reboot"``: in REBOOT, any number of
            times; ``"jump"``: after REBOOT.
        undo: what takes finalizing back: None, ``"abort"`` (every preservation is forgotten) or
            ``"unfreeze"`` (they stay).
        notifiers: whether subsystems can register for finalizing and its undoing.
        phys_calls: whether ranges are preserved by address and bytes (``kho_preserve_phys()``).
        numa_split: whether a range is cut where NUMA nodes meet.
        pageblock_scratch: whether areas of scratch are aligned to page blocks, and the global one
            is sized by what the rounded low one leaves; else to the allocator's largest order.
        restore_order_cap: whether blocks above the allocator's largest order cannot be restored.
        vmalloc: whether it has vmalloc preservation.
        scratch_grammar: of ``kho_scratch=``: ``"v5"``, ``"6.16"`` or ``"7.3"``.
        metadata: whether a kernel leaves the ``kexec-metadata`` blob.
        bugs: mistakes of its kernels that change bytes, by the name that asks for them.
    """

    name: str
    compatible: str
    check_compatible: bool = True
    map_node: str | None = None
    map_property: str = "preserved-memory-map"
    map_may_be_null: bool = False
    data_property: str | None = "preserved-data"
    size_property: str | None = None
    bitmap_bytes: int | None = None
    finalize: str | None = None
    undo: str | None = None
    notifiers: bool = False
    phys_calls: bool = False
    numa_split: bool = False
    pageblock_scratch: bool = True
    restore_order_cap: bool = False
    vmalloc: bool = True
    scratch_grammar: str = "7.3"
    metadata: bool = False
    bugs: tuple[str, ...] = ()

    @property
    def inline(self) -> bool:
        """Whether users' data stands in the root tree itself, as nodes and properties."""
        return self.data_property is None

    def check_bugs(self, bugs: Iterable[str]) -> frozenset[str]:
        """Return *bugs* as a set; ValueError if a kernel of this generation had not all of them."""
        wanted = frozenset((bugs,) if isinstance(bugs, str) else bugs)
        for bug in sorted(wanted - set(self.bugs)):
            known = ", ".join(self.bugs) or "none"
            raise ValueError(f"bug {bug!r}: {self.name} has {known}")
        return wanted

    def radix_geometry(self, page_size: int, bugs: Iterable[str] = ()) -> RadixGeometry:
        """Return the shape of the map's tree for pages of *page_size* bytes (kho-abi 4)."""
        if page_size not in MAX_PAGE_ORDER:
            raise ValueError(f"page_size {page_size}: not 4096, 16384 or 65536")
        shift = page_size.bit_length() - 1
        slot_bits, leaf_bits = shift - 3, shift + 3
        key_bits = 64 - shift + (BUG_V2_DEPTH not in self.check_bugs(bugs))
        return RadixGeometry(
            slot_bits, leaf_bits, 1 + -(-(key_bits - leaf_bits) // slot_bits), 64 - shift
        )

    def bitmap_size(self, page_size: int) -> int:
        """Return the bytes of a bitmap of the map's chunks; 0: it has none."""
        return 0 if self.bitmap_bytes is None else self.bitmap_bytes or page_size


BUG_V5_SPLIT: Final = "kho-v5-split"
"""The series cut a range into blocks without a look at its alignment, so that an unaligned range
was recorded as other pages than its own (kho-abi 2.4)."""

BUG_V2_DEPTH: Final = "kho-v2-depth"
"""The tree had a level too few for the marker bit of order 0 on pages of 16 KiB (kho-abi 4)."""

GENERATIONS: Final = {
    g.name: g
    for g in (
        Generation(
            name="kho-v5-series",  # the patches of March 2025 that LUO RFC v1 stands on
            compatible="kho-v1",
            check_compatible=False,
            map_node="preserved-memory",
            map_property="metadata",
            map_may_be_null=True,
            data_property=None,
            bitmap_bytes=512,
            finalize="jump",
            undo="unfreeze",
            notifiers=True,
            phys_calls=True,
            vmalloc=False,
            scratch_grammar="v5",
            bugs=(BUG_V5_SPLIT,),
        ),
        Generation(
            name="kho-v1-512",  # Linux 6.16, 6.17 up to 6.17.8
            compatible="kho-v1",
            map_may_be_null=True,
            data_property="fdt",
            bitmap_bytes=512,
            finalize="prepare",
            undo="abort",
            notifiers=True,
            phys_calls=True,
            restore_order_cap=True,
            vmalloc=False,
            scratch_grammar="6.16",
        ),
        Generation(
            name="kho-v1-notifier",  # Linux 6.17.9, 6.18
            compatible="kho-v1",
            map_may_be_null=True,
            data_property="fdt",
            bitmap_bytes=0,
            finalize="prepare",
            undo="abort",
            notifiers=True,
            restore_order_cap=True,
        ),
        Generation(
            name="kho-v1",  # Linux 6.19, 7.0
            compatible="kho-v1",
            data_property="fdt",
            bitmap_bytes=0,
            finalize="reboot",
            restore_order_cap=True,
        ),
        Generation(
            name="kho-v2",  # on the way to 7.1
            compatible="kho-v2",
            restore_order_cap=True,
            bugs=(BUG_V2_DEPTH,),
        ),
        Generation(
            name="kho-v3",  # Linux 7.1
            compatible="kho-v3",
            size_property="blob-size",
            numa_split=True,
            pageblock_scratch=False,
            metadata=True,
        ),
        Generation(
            name="kho-v4",  # Linux 7.2, 7.3
            compatible="kho-v4",
            size_property="blob-size",
            numa_split=True,
            pageblock_scratch=False,
            metadata=True,
        ),
    )
}


def generation(name: str) -> Generation:
    """Return the generation called *name*; ValueError lists those there are."""
    try:
        return GENERATIONS[name]
    except KeyError:
        raise ValueError(f'abi "{name}": not one of {", ".join(GENERATIONS)}') from None


# ---- chunks of the map (kho-abi 3.2) ----

KHO_CHUNK_SER: Final = struct.Struct("=QII")
"""Head of a chunk, which is one page. 0: u64 phys of the next chunk, 0 for none. 8: u32 order of
its blocks. 12: u32 number of bitmaps. 16: the bitmaps."""

KHO_CHUNK_ENTRY_SER: Final = struct.Struct("=QQ")
"""A bitmap in a chunk. 0: u64 phys of the first block that it can name. 8: u64 phys of the
bitmap."""


def chunk_capacity(page_size: int = 4096) -> int:
    """Return how many bitmaps a chunk lists."""
    return (page_size - KHO_CHUNK_SER.size) // KHO_CHUNK_ENTRY_SER.size


KHO_FDT_MAX: Final = 10 << 20
"""Bytes that the inline tree of kho-v5-series may have, unless told otherwise."""


# ---- how the next kernel finds the data (kho-abi 8, 9) ----

KHO_SCRATCH_SER: Final = struct.Struct("=QQ")
"""An area of scratch. 0: u64 phys. 8: u64 bytes."""

SETUP_KEXEC_KHO: Final = 10
SETUP_DATA_SER: Final = struct.Struct("=QIIQQQQ")
"""x86 setup_data node. 0: u64 next. 8: u32 type. 12: u32 length of the rest, 32. 16: u64 phys of
the root tree. 24: u64 its bytes. 32: u64 phys of the scratch array. 40: u64 its bytes."""

CHOSEN_FDT: Final = "linux,kho-fdt"
CHOSEN_SCRATCH: Final = "linux,kho-scratch"


# ---- kexec-metadata (kho-abi 10.3) ----

KHO_SUBTREE_METADATA: Final = "kexec-metadata"


@dataclass(frozen=True, slots=True)
class KexecMetadata:
    """The blob of the subtree ``kexec-metadata``, 73 bytes.

    Layout: 0: u32 version, 1. 4: char[65] previous_release, NUL-terminated. 69: u32 kexec_count.

    Attributes:
        previous_release: release of the kernel that wrote it.
        kexec_count: handovers so far, the one that it is written for included.
    """

    previous_release: str
    kexec_count: int

    def pack(self) -> bytes:
        """Return the 73 bytes.

        Raises:
            ValueError: the release is longer than 64 bytes or holds a NUL.
        """
        release = self.previous_release.encode()
        if len(release) > 64 or b"\0" in release:
            raise ValueError(f"release {self.previous_release!r}: over 64 bytes or with a NUL")
        return _METADATA_SER.pack(1, release, self.kexec_count & 0xFFFFFFFF)

    @classmethod
    def unpack(cls, blob: bytes) -> "KexecMetadata | None":
        """Read the blob as Linux does: None if it is too short or of another version."""
        if len(blob) < _METADATA_SER.size:
            return None
        version, release, count = _METADATA_SER.unpack_from(blob)
        if version != 1:
            return None
        return cls(release.split(b"\0", 1)[0].decode(errors="replace"), count)


_METADATA_SER: Final = struct.Struct("=I65sI")


# ---- vmalloc (kho-abi 6) ----

VMALLOC_SER: Final = struct.Struct("=QIHH")
"""Descriptor of an area. 0: u64 phys of the first chunk. 8: u32 pages. 12: u16 flags. 14: u16 order
of each entry. A chunk is a page: u64 phys of the next, 0 for none; then u64 phys of each block; 0
ends the list early. A full chunk is always followed by another, which may be empty."""


# ---- linked blocks (kho-abi 10.1) ----

KHO_BLOCK_SER: Final = struct.Struct("=QQ")
"""Head of a block, which is one page. 0: u64 phys of the next block, 0 for none. 8: u64 entries in
this one. 16: the entries."""

KHO_BLOCKS_MAX: Final = 10000
"""Blocks in a set."""


def block_capacity(entry_size: int, page_size: int = 4096) -> int:
    """Return how many entries of *entry_size* bytes a block holds.

    Raises:
        ValueError: not even one fits, or the size is not positive.
    """
    if not 0 < entry_size <= page_size - KHO_BLOCK_SER.size:
        raise ValueError(f"entry_size {entry_size}: not in 1..{page_size - KHO_BLOCK_SER.size}")
    return (page_size - KHO_BLOCK_SER.size) // entry_size


# ---- LUO of Linux 7.3: sessions and files (luo-mainline 4.5) ----

LUO_MAINLINE: Final = "LUO"
"""Name of mainline's subtree. Its blob is LUO_SER."""

LUO_COMPATIBLE: Final = b"luo-v5\0\0"

LUO_SER: Final = struct.Struct("=8sQQQ")
"""0: LUO_COMPATIBLE. 8: u64 number of this live update. 16: u64 phys of a chain of blocks with
LUO_SESSION_SER, 0 for no sessions. 24: u64 phys of the page of FLBs, 0 for none."""

LUO_SESSION_SER: Final = struct.Struct("=64sQQ")
"""0: name, NUL-padded. 64: u64 phys of a chain of blocks with LUO_FILE_SER, 0 for no files. 72: u64
files."""

LUO_FILE_SER: Final = struct.Struct("=48sQQ")
"""0: compatible of its handler, NUL-padded. 48: u64 of the handler's own. 56: u64 token."""

LUO_FLBS_SER: Final = struct.Struct("=QQ")
"""Head of the page of FLBs. 0: u64 pages, 1. 8: u64 FLBs. 16: so many LUO_FLB_SER."""

LUO_FLB_SER: Final = struct.Struct("=48sQQ")
"""0: name, NUL-padded. 48: u64 of the FLB's own. 56: u64 files that depend on it."""

LUO_MEMFD_COMPATIBLE: Final = "memfd-v2"

LUO_MEMFD_SER: Final = struct.Struct("=QQIIQ")
"""0: u64 position. 8: u64 bytes. 16: u32 seals. 20: u32 flags, 0. 24: u64 folios. 32: VMALLOC_SER
of an array of LUO_FOLIO_SER, all 0 without folios."""

LUO_FOLIO_SER: Final = struct.Struct("=QQ")
"""0: 52 bits of pfn, and from bit 52 on flags: 1 dirty, 2 up to date. 8: u64 index of its first
page in the file."""

LUO_FLBS_MAX: Final = 63
"""FLBs that one page holds."""


# ---- LUO RFC v1 (luo-rfc-v1 1.1, 1.13), and what its list left to do ----

LUO_NODE: Final = "liveupdate_orchestrator"
"""Name of LUO's subtree. Its blob is a tree:

    /                   version       u32 major, u32 minor
    /devices            count         u64 devices that were preserved
                        records       u64 phys of a chain of LUO_EXTENT entries: shards of records
                        slabs         u64 phys of another: slabs of slots
                        nodes         u64 phys of the tree of KHO nodes; 0 or absent: none
    /subsystems/<name>  data          u64 of the subsystem's own

``LUO`` is mainline's name, with another format under it.
"""

LUO_VERSION: Final = (1, 0)
LUO_DEVICES_PROPERTIES: Final = ("count", "records", "slabs", "nodes")

LUO_EXTENT_BYTES: Final = 32
"""An entry of the two chains. 0: u64 phys. 8: u64 bytes. 16: u64 first record. 24: u64 records."""

LUO_DEVICES_COMPATIBLE: Final = "luo-devices-v1"
"""Root of a shard, a tree with one node a device:

    path    string, as below /sys/devices
    bus     string; absent without a bus
    driver  string; absent without a driver
    state   u64 phys and u64 bytes of the driver's slot, then of the bus's; 0 bytes: none
    index   u64 number of the device in the kernel before, a hint
"""

LUO_NODES_COMPATIBLE: Final = "luo-nodes-v1"
"""Root of the tree of KHO nodes, which drivers fill with properties of their own:

    /devices/device<record>   of a device, by the number of its record
    /drivers/<name>           of a driver, for all of its devices
    /buses/<name>             of a bus; a ``/`` in a name is written ``!``

In kho-v5-series this tree is the child ``nodes`` of LUO's node.
"""

LUO_SHARD_OVERHEAD: Final = 256
"""Room in a shard for what is not records: header, root, names of properties."""
