"""Trees written out by hand, for the tests of readers and writers."""

import struct

# Root tree of kho-v4 as the kernel writes it first (kho-abi 5.1); all words big-endian but the map.
KHO_V4_ROOT = bytes.fromhex(
    "d00dfeed"  # 00 magic
    "00000098"  # 04 totalsize 152
    "00000040"  # 08 off_dt_struct
    "00000078"  # 0c off_dt_strings
    "00000030"  # 10 off_mem_rsvmap
    "00000011"  # 14 version 17
    "00000010"  # 18 last_comp_version 16
    "00000000"  # 1c boot_cpuid_phys
    "00000020"  # 20 size_dt_strings
    "00000038"  # 24 size_dt_struct
    "0000000000000000"  # 28 gap
    "00000000000000000000000000000000"  # 30 the empty reserve map
    "00000001" "00000000"  # 40 FDT_BEGIN_NODE, no name
    "00000003" "00000007" "00000015"  # 48 FDT_PROP, 7 bytes, name at 0x15
    "6b686f2d76340000"  # 54 "kho-v4", NUL, padding
    "00000003" "00000008" "00000000"  # 5c FDT_PROP, 8 bytes, name at 0
    "0060452301000000"  # 68 0x123456000, native
    "00000002"  # 70 FDT_END_NODE
    "00000009"  # 74 FDT_END
    "7072657365727665642d6d656d6f72792d6d617000"  # 78 preserved-memory-map
    "636f6d70617469626c6500"  # 8d compatible
)  # fmt: skip

BEGIN, END, PROP, NOP, FINISH = 1, 2, 3, 4, 9


def blob(*words: int | bytes, strings: bytes = b"p\0", version: int = 17, **header: int) -> bytes:
    """A tree of these tokens; *header* overrides fields by name."""
    structure = b"".join(w if isinstance(w, bytes) else struct.pack(">I", w) for w in words)
    fields = {
        "magic": 0xD00DFEED,
        "totalsize": 56 + len(structure) + len(strings),
        "off_dt_struct": 56,
        "off_dt_strings": 56 + len(structure),
        "off_mem_rsvmap": 40,
        "version": version,
        "last_comp_version": 16,
        "boot_cpuid_phys": 0,
        "size_dt_strings": len(strings),
        "size_dt_struct": len(structure),
    } | header
    return struct.pack(">10I", *fields.values()) + bytes(16) + structure + strings
