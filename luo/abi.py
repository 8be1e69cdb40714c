"""What crosses the reboot: every name, struct and number, by generation.

A leaf that imports nothing of ours. KHO stores integers in the CPU's own byte order (little-endian
on x86-64 and arm64) without padding; only the FDT container itself is big-endian. Mirrors
``include/linux/kho/abi/kexec_handover.h`` and ``include/linux/kho_block.h`` of Linux 7.3; the facts
are in the project's KHO ABI specification, whose sections are cited as "kho-abi".
"""

import struct
from dataclasses import dataclass
from typing import Final

__all__ = [
    "CHOSEN_FDT",
    "CHOSEN_SCRATCH",
    "GENERATIONS",
    "KHO_BLOCKS_MAX",
    "KHO_BLOCK_SER",
    "KHO_SCRATCH_SER",
    "KHO_SUBTREE_METADATA",
    "LUO_DEVICES_COMPATIBLE",
    "LUO_DEVICES_PROPERTIES",
    "LUO_EXTENT_BYTES",
    "LUO_NODE",
    "LUO_RECORD_BYTES",
    "LUO_SHARD_OVERHEAD",
    "LUO_VERSION",
    "MAX_PAGE_ORDER",
    "SETUP_DATA_SER",
    "SETUP_KEXEC_KHO",
    "Generation",
    "KexecMetadata",
    "RadixGeometry",
    "block_capacity",
    "generation",
]

MAX_PAGE_ORDER: Final = {4096: 10, 16384: 11, 65536: 13}
"""Largest order that Linux's allocator serves, by page size (arm64; x86 for 4 KiB)."""


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
    """One generation of the format.

    Attributes:
        name: as users give it (``abi="kho-v4"``).
        compatible: string of the root tree.
        map_property: property of the root that names the preserved map.
        data_property: property of a child that names the user's blob.
        size_property: property of a child with the blob's size in bytes, or None.
        marker_in_depth: whether the tree's depth leaves room for the marker bit of order 0.
        metadata: whether a kernel leaves the ``kexec-metadata`` blob.
    """

    name: str
    compatible: str
    map_property: str
    data_property: str
    size_property: str | None
    marker_in_depth: bool
    metadata: bool

    def radix_geometry(self, page_size: int) -> RadixGeometry:
        """Return the shape of the map's tree for pages of *page_size* bytes (kho-abi 4)."""
        if page_size not in MAX_PAGE_ORDER:
            raise ValueError(f"page_size {page_size}: not 4096, 16384 or 65536")
        shift = page_size.bit_length() - 1
        slot_bits, leaf_bits = shift - 3, shift + 3
        key_bits = 64 - shift + self.marker_in_depth
        return RadixGeometry(
            slot_bits, leaf_bits, 1 + -(-(key_bits - leaf_bits) // slot_bits), 64 - shift
        )


GENERATIONS: Final = {
    g.name: g
    for g in (
        Generation(
            name="kho-v4",  # Linux 7.2, 7.3
            compatible="kho-v4",
            map_property="preserved-memory-map",
            data_property="preserved-data",
            size_property="blob-size",
            marker_in_depth=True,
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


# ---- LUO RFC v1 (luo-rfc-v1 1.1, 1.13), and what its list left to do ----

LUO_NODE: Final = "liveupdate_orchestrator"
"""Name of LUO's subtree. Its blob is a tree:

    /                   version       u32 major, u32 minor
    /devices            count         u64 devices that were preserved
                        records       u64 phys of a chain of LUO_EXTENT entries: shards of records
                        slabs         u64 phys of another: slabs of slots
    /subsystems/<name>  data          u64 of the subsystem's own

``LUO`` is mainline's name, with another format under it.
"""

LUO_VERSION: Final = (1, 0)
LUO_DEVICES_PROPERTIES: Final = ("count", "records", "slabs")

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

LUO_SHARD_OVERHEAD: Final = 256
"""Room in a shard for what is not records: header, root, names of properties."""

LUO_RECORD_BYTES: Final = 256
"""What a record takes, about; for making room, not for reading."""
