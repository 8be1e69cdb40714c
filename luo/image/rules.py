"""What Linux 7.3 checks of a handover, what it does not, and what happens: one table.

Each rule says where in the boot it strikes, what the kernel does, and which function shows it.
Facts are from the source of 7.3.4 and from boots with images that break one rule each
(``tests/guest/verdicts.py``); sections are those of the project's specifications ``kho-abi``,
``luo-mainline`` and ``real-kernel``. :mod:`luo.image.verdict` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

__all__ = ["RULES", "Outcome", "Rule", "Stage"]


class Outcome(Enum):
    """What becomes of a boot, best first."""

    TAKES = "takes it"
    COLD = "boots cold"
    LATER = "fails later"
    UNDEFINED = "undefined"
    PANICS = "panics"


class Stage(IntEnum):
    """Where in the boot a rule strikes, in the order of time; the text is :attr:`label`."""

    DEVICE_TREE = 1
    POPULATE = 2
    PAGE_TABLES = 3
    FIRST_WALK = 4
    MEMMAP = 5
    SECOND_WALK = 6
    RESERVE_MEM = 7
    EARLY_INITCALL = 8
    FS_INITCALL = 9
    LATE_INITCALL = 10
    OPEN = 11
    RETRIEVE_FD = 12
    FINISH = 13

    @property
    def label(self) -> str:
        """What people read."""
        return _LABELS[self]


_LABELS: Final = {
    Stage.DEVICE_TREE: "device tree",
    Stage.POPULATE: "kho_populate",
    Stage.PAGE_TABLES: "page tables",
    Stage.FIRST_WALK: "first walk of the map",
    Stage.MEMMAP: "memmap",
    Stage.SECOND_WALK: "second walk of the map",
    Stage.RESERVE_MEM: "reserve_mem=",
    Stage.EARLY_INITCALL: "early_initcall",
    Stage.FS_INITCALL: "fs_initcall",
    Stage.LATE_INITCALL: "late_initcall",
    Stage.OPEN: "open",
    Stage.RETRIEVE_FD: "RETRIEVE_FD",
    Stage.FINISH: "FINISH",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule.

    Attributes:
        id: of it, ``part.what``.
        stage: where it strikes.
        outcome: what the kernel does; ``TAKES``: nothing, but people should know.
        why: in words.
        kernel: file and function of Linux 7.3.4 that shows it.
        spec: section of the specification.
        effect: what is seen: of ``LATER`` one, such as ``EIO at open``; of ``UNDEFINED`` all that
            are possible, as far as is known.
    """

    id: str
    stage: Stage
    outcome: Outcome
    why: str
    kernel: str
    spec: str
    effect: tuple[str, ...] = ()

    @property
    def seen(self) -> tuple[str, ...]:
        """Everything that may be seen if this rule strikes first."""
        return tuple(dict.fromkeys(self.effect)) or (self.outcome.value,)


_TAKES, _COLD, _LATER, _UNDEFINED, _PANICS = (
    Outcome.TAKES, Outcome.COLD, Outcome.LATER, Outcome.UNDEFINED, Outcome.PANICS,
)  # fmt: skip
_KHO: Final = "kernel/liveupdate/kexec_handover.c"
_BLOCK: Final = "kernel/liveupdate/kho_block.c"
_CORE: Final = "kernel/liveupdate/luo_core.c"
_SESSION: Final = "kernel/liveupdate/luo_session.c"
_FILE: Final = "kernel/liveupdate/luo_file.c"
_FLB: Final = "kernel/liveupdate/luo_flb.c"
_MEMFD: Final = "mm/memfd_luo.c"
_OK: Final = _TAKES.value
_PANIC: Final = _PANICS.value
_WARNING: Final = "warning"
_DATA: Final = "wrong data"
_AT_OPEN: Final = ("EIO at open", "oops at open", "warning", "panics")
_AT_RETRIEVE: Final = (
    _OK, _WARNING, _DATA, "wrong attributes", "EINVAL at RETRIEVE_FD", "EIO at RETRIEVE_FD",
    "EEXIST at RETRIEVE_FD", "EOPNOTSUPP at RETRIEVE_FD", "oops at RETRIEVE_FD", "oops at FINISH",
)  # fmt: skip
_ANYTHING: Final = (_OK, _COLD.value, _PANIC, *_AT_OPEN[:2], *_AT_RETRIEVE[1:])

RULES: Final[dict[str, Rule]] = {
    rule.id: rule
    for rule in (
        # ---- what the target is ----
        Rule("target.page-size", Stage.POPULATE, _UNDEFINED,
             "the page size is nowhere in the handover: a kernel with another one reads the map and"
             " every page of records wrongly",
             f"{_KHO}: kho_radix_walk_leaf", "kho-abi 1", _ANYTHING),
        Rule("target.kho", Stage.EARLY_INITCALL, _LATER,
             "with kho=off the map is still honoured, but LUO does not look at its blob, and there"
             " is no device: what is preserved stays so, unused",
             f"{_CORE}: luo_early_startup", "kho-abi 9.3; luo-mainline 4.1", ("ENOENT at open",)),
        Rule("target.liveupdate", Stage.OPEN, _LATER,
             "with liveupdate=off the sessions are checked, and then there is no device to retrieve"
             " them from: what is preserved stays so, unused",
             f"{_CORE}: liveupdate_ioctl_init", "luo-mainline 4.1", ("ENOENT at open",)),
        # ---- the device tree ----
        Rule("chosen.missing", Stage.DEVICE_TREE, _COLD,
             "without both properties in /chosen it is no KHO boot; nothing is said about it",
             "drivers/of/fdt.c: early_init_dt_check_kho", "kho-abi 9.2"),
        Rule("chosen.size", Stage.DEVICE_TREE, _COLD,
             "a property that is not exactly one address and size, in the root's cells, is as if it"
             " were missing; nothing is said about it",
             "drivers/of/fdt.c: of_flat_dt_get_addr_size", "kho-abi 9.2"),
        Rule("chosen.other", Stage.DEVICE_TREE, _UNDEFINED,
             "the device tree sends the kernel to other addresses than the image's",
             "drivers/of/fdt.c: early_init_dt_check_kho", "kho-abi 9.2", _ANYTHING),
        # ---- kho_populate: the root tree ----
        Rule("root.window", Stage.POPULATE, _COLD,
             "the length handed over is mapped early: 0 and more than 65 pages cannot be",
             f"mm/early_ioremap.c: __early_ioremap; {_KHO}: kho_populate", "kho-abi 9.3"),
        Rule("root.memory", Stage.POPULATE, _PANICS,
             "the root tree is read before anything is known about memory: outside RAM that is an"
             " external abort, before there is a console",
             f"{_KHO}: kho_populate", "kho-abi 9.3"),
        Rule("root.header", Stage.POPULATE, _COLD,
             "the header must be that of a tree: 8-byte aligned, magic, version 2 to 17, blocks"
             " inside its total size",
             "scripts/dtc/libfdt/fdt.c: fdt_check_header", "kho-abi 9.3"),
        Rule("root.beyond", Stage.POPULATE, _PANICS,
             "the tree's own total size is not compared with the length that was mapped: blocks"
             " behind it fault, before there is a console",
             f"{_KHO}: kho_populate", "kho-abi 9.3"),
        Rule("root.structure", Stage.POPULATE, _UNDEFINED,
             "the tree has a right header and is broken inside; the kernel looks only at what it"
             " looks for",
             f"{_KHO}: kho_populate", "kho-abi 9.3", _ANYTHING),
        Rule("root.compatible", Stage.POPULATE, _COLD,
             "the root's compatible must contain kho-v4",
             f"{_KHO}: kho_populate", "kho-abi 9.3"),
        Rule("map.property", Stage.POPULATE, _COLD,
             "preserved-memory-map must be there, have 8 bytes, and not be 0",
             f"{_KHO}: kho_get_mem_map_phys", "kho-abi 9.3"),
        # ---- kho_populate: scratch ----
        Rule("scratch.window", Stage.POPULATE, _COLD,
             "the scratch array is mapped early: of 0 bytes and more than 65 pages it cannot be",
             f"mm/early_ioremap.c: __early_ioremap; {_KHO}: kho_populate", "kho-abi 9.3"),
        Rule("scratch.array-memory", Stage.POPULATE, _PANICS,
             "the scratch array is read before anything is known about memory: outside RAM that is"
             " an external abort, before there is a console",
             f"{_KHO}: kho_populate", "kho-abi 9.3"),
        Rule("scratch.areas", Stage.POPULATE, _PANICS,
             "the table of memory has 128 places this early, and an area inside RAM takes two: 62"
             " areas apart from one another; the panic may be before there is a console",
             "mm/memblock.c: memblock_double_array", "kho-abi 8"),
        Rule("scratch.none", Stage.PAGE_TABLES, _PANICS,
             "early memory comes from scratch only: without any there is not even a page table",
             f"{_KHO}: kho_populate; mm/memblock.c: choose_memblock_flags",
             "kho-abi 8; real-kernel rules"),
        Rule("scratch.memory", Stage.PAGE_TABLES, _PANICS,
             "areas are added to memory as they are listed: the topmost is used first, and what is"
             " not there faults",
             f"{_KHO}: kho_populate", "kho-abi 9.3; real-kernel rules"),
        Rule("scratch.hole", Stage.PAGE_TABLES, _UNDEFINED,
             "areas are added to memory as they are listed; one that is not there and not the"
             " topmost is used when the rest is full",
             f"{_KHO}: kho_populate",
             "kho-abi 9.3; real-kernel rules", (_OK, _PANIC, *_AT_RETRIEVE[1:])),
        Rule("scratch.page", Stage.PAGE_TABLES, _UNDEFINED,
             "an area that does not end with a page is handed out to its last byte, which is not"
             " mapped",
             "mm/memblock.c: memblock_find_in_range_node", "kho-abi 8", (_OK, _PANIC)),
        Rule("scratch.aligned", Stage.MEMMAP, _TAKES,
             "a kernel's own areas are multiples of 2^MAX_PAGE_ORDER pages in address and size;"
             " others work, and the page blocks at their ends become movable only",
             "include/linux/kexec_handover.h: kho_scratch_migratetype",
             "kho-abi 8; real-kernel rules"),
        Rule("scratch.small", Stage.MEMMAP, _PANICS,
             "scratch must hold the page tables (8 bytes a page), the memmap (64 bytes a page of"
             " every section with RAM), and some 256 KiB; memory in blocks of 1 GiB without"
             " preserved pages counts for the memmap",
             f"mm/sparse.c: sparse_init_nid; {_KHO}: kho_extend_scratch",
             "real-kernel rules; kho-abi 8"),
        Rule("scratch.tight", Stage.MEMMAP, _UNDEFINED,
             "within 2 MiB of what is needed it depends on what else the kernel allocates early",
             "mm/sparse.c: sparse_init_nid", "real-kernel rules", (_OK, _PANIC)),
        Rule("scratch.preserved", Stage.SECOND_WALK, _UNDEFINED,
             "nothing checks that preserved pages lie outside scratch: early memory goes top-down,"
             " so what is near the top of an area is overwritten, the rest survives by luck",
             f"{_KHO}: kho_preserved_memory_reserve",
             "kho-abi 12.16; real-kernel rules", _ANYTHING),
        Rule("scratch.tree", Stage.FIRST_WALK, _UNDEFINED,
             "nothing checks that the map lies outside scratch: near the top of an area it is"
             " overwritten before it is walked, near the bottom it survives by luck",
             f"{_KHO}: kho_radix_walk_tree", "kho-abi 12.16; real-kernel rules", _ANYTHING),
        Rule("scratch.array", Stage.SECOND_WALK, _UNDEFINED,
             "the kernel keeps using the scratch array where it lies: in a preserved page it is"
             " overwritten when that page is used",
             f"{_KHO}: kho_memory_init_early", "kho-abi 8", (_OK, _DATA, _PANIC)),
        # ---- the map ----
        Rule("map.node", Stage.FIRST_WALK, _PANICS,
             "slots of the tree are followed unseen: outside RAM nothing is mapped",
             f"{_KHO}: __kho_radix_walk_tree", "kho-abi 12.18"),
        Rule("map.misaligned", Stage.FIRST_WALK, _UNDEFINED,
             "slots of the tree are followed unseen: the kernel reads a page from there on",
             f"{_KHO}: __kho_radix_walk_tree", "kho-abi 12.18", _ANYTHING),
        Rule("map.twice", Stage.FIRST_WALK, _UNDEFINED,
             "a page of the tree that is reached twice stands for keys of two places; those of the"
             " second were not judged",
             f"{_KHO}: __kho_radix_walk_tree", "kho-abi 12.18", _ANYTHING),
        Rule("map.unread", Stage.FIRST_WALK, _UNDEFINED,
             "the map has more keys than memory has pages; those beyond were not judged",
             f"{_KHO}: __kho_radix_walk_tree", "kho-abi 12.18", _ANYTHING),
        Rule("map.block", Stage.SECOND_WALK, _PANICS,
             "addresses of keys are not compared with memory: the kernel marks the page's entry in"
             " the memmap, which a section without RAM has not",
             f"{_KHO}: kho_preserved_memory_reserve", "kho-abi 12.18; real-kernel wrong image"),
        Rule("map.beyond", Stage.SECOND_WALK, _TAKES,
             "a block that is not all in RAM, but begins in a section that has some, is reserved"
             " like any other; whoever restores it gets what is not there",
             f"{_KHO}: kho_preserved_memory_reserve", "kho-abi 12.18"),
        Rule("map.key", Stage.SECOND_WALK, _PANICS,
             "a key that stands for no block is decoded with shifts that are too wide, and the"
             " memmap of what comes out is not there",
             f"{_KHO}: kho_decode_radix_key", "kho-abi 5.2, 12.18"),
        Rule("map.key-inside", Stage.SECOND_WALK, _UNDEFINED,
             "a key that stands for no block happens to decode to a page of RAM, which is reserved"
             " and marked",
             f"{_KHO}: kho_decode_radix_key", "kho-abi 5.2, 12.18", (_OK, *_AT_RETRIEVE[1:])),
        Rule("map.all", Stage.SECOND_WALK, _PANICS,
             "what is preserved leaves the kernel no memory: under 4 MiB",
             f"{_KHO}: kho_preserved_memory_reserve", "kho-abi 7"),
        Rule("map.two-orders", Stage.SECOND_WALK, _TAKES,
             "of two blocks that begin at the same page the smaller one wins, as keys are walked"
             " from large orders to small",
             f"{_KHO}: kho_preserved_memory_reserve", "kho-abi 7; real-kernel wrong image"),
        Rule("map.overlap", Stage.SECOND_WALK, _TAKES,
             "blocks that overlap are reserved together, and can be restored one by one until the"
             " first makes the pages of the other its own",
             f"{_KHO}: kho_restore_page", "kho-abi 12.15; real-kernel wrong image"),
        Rule("root.preserved", Stage.SECOND_WALK, _UNDEFINED,
             "the root tree is used until late in the boot; a page that is not in the map is free"
             " memory by then",
             f"{_KHO}: kho_retrieve_subtree", "kho-abi 9.3; real-kernel rules", _ANYTHING),
        Rule("boot.kernel", Stage.SECOND_WALK, _UNDEFINED,
             "preserved pages or the map lie where the kernel is loaded: it overwrites them, and"
             " whoever retrieves them gets pieces of the kernel",
             f"{_KHO}: kho_preserved_memory_reserve", "real-kernel rules", _ANYTHING),
        Rule("boot.initrd", Stage.SECOND_WALK, _UNDEFINED,
             "preserved pages or the map lie where the initrd is loaded: it overwrites them",
             f"{_KHO}: kho_preserved_memory_reserve", "real-kernel rules", _ANYTHING),
        Rule("boot.device-tree", Stage.SECOND_WALK, _UNDEFINED,
             "preserved pages or the map lie where the device tree is loaded: it overwrites them",
             f"{_KHO}: kho_preserved_memory_reserve", "real-kernel rules", _ANYTHING),
        Rule("image.page", Stage.SECOND_WALK, _UNDEFINED,
             "the image has not the page: what the kernel finds there was not judged",
             "", "", _ANYTHING),
        # ---- reserve_mem= ----
        Rule("memblock.memory", Stage.RESERVE_MEM, _PANICS,
             "the blob's address is followed unseen: outside RAM nothing is mapped",
             "mm/memblock.c: reserve_mem_kho_retrieve_fdt", "kho-abi 10.2"),
        Rule("memblock.region", Stage.RESERVE_MEM, _LATER,
             "a region is taken over only if tree and node are compatible, start and size have 8"
             " bytes, the start is aligned and the size is the one asked for; else a new one is"
             " allocated",
             "mm/memblock.c: reserve_mem_kho_revive", "kho-abi 10.2", ("new region",)),
        # ---- LUO: boot ----
        Rule("luo.missing", Stage.EARLY_INITCALL, _TAKES,
             "without LUO's subtree there are no sessions: a fresh start, with the rest of the"
             " handover taken over",
             f"{_CORE}: luo_early_startup", "luo-mainline 4.1"),
        Rule("luo.property", Stage.EARLY_INITCALL, _PANICS,
             "preserved-data and blob-size must be there, of 8 bytes each; what is graceful for"
             " other subtrees is a panic for LUO's, with liveupdate=off too",
             f"{_KHO}: kho_retrieve_subtree; {_CORE}: liveupdate_early_init",
             "kho-abi 7; luo-mainline 4.1"),
        Rule("luo.size", Stage.EARLY_INITCALL, _PANICS,
             "the blob must have 32 bytes at least, with liveupdate=off too",
             f"{_CORE}: luo_early_startup", "luo-mainline 4.1"),
        Rule("luo.memory", Stage.EARLY_INITCALL, _PANICS,
             "the blob's address is followed unseen: outside RAM nothing is mapped",
             f"{_CORE}: luo_early_startup", "kho-abi 12.18"),
        Rule("luo.compatible", Stage.EARLY_INITCALL, _PANICS,
             "the blob must be luo-v5, with liveupdate=off too; the byte behind the NUL does not"
             " count",
             f"{_CORE}: luo_early_startup",
             "kho-abi 12.22; luo-mainline 4.1; real-kernel wrong image"),
        Rule("luo.preserved", Stage.EARLY_INITCALL, _UNDEFINED,
             "a blob that is not preserved lies in free memory: it may be overwritten before it is"
             " read, and warns when it is freed",
             f"{_KHO}: kho_restore_free", "luo-mainline 4.5", (_WARNING, _PANIC, *_AT_OPEN, _OK)),
        Rule("luo.key", Stage.EARLY_INITCALL, _LATER,
             "the blob's page lies in a larger block and does not begin it: it is read, and warns"
             " when it is freed",
             f"{_KHO}: kho_restore_page", "real-kernel rules", (_WARNING,)),
        Rule("sessions.memory", Stage.EARLY_INITCALL, _PANICS,
             "the chain of blocks is followed unseen: outside RAM nothing is mapped",
             f"{_BLOCK}: kho_block_set_restore", "kho-abi 10.1"),
        Rule("sessions.cycle", Stage.EARLY_INITCALL, _PANICS,
             "the chain of session blocks must end",
             f"{_BLOCK}: kho_block_set_is_cyclic", "kho-abi 10.1; luo-mainline 4.1"),
        Rule("sessions.many", Stage.EARLY_INITCALL, _PANICS,
             "a chain has 10,000 blocks at most",
             f"{_BLOCK}: kho_block_add", "kho-abi 10.1"),
        Rule("sessions.count", Stage.EARLY_INITCALL, _PANICS,
             "a block holds 1 to 51 sessions: an empty one makes the chain invalid",
             f"{_BLOCK}: kho_block_set_restore", "kho-abi 10.1; luo-mainline 4.5"),
        # ---- kexec-metadata, other subtrees ----
        Rule("metadata.memory", Stage.FS_INITCALL, _PANICS,
             "the blob's address is followed unseen: outside RAM nothing is mapped",
             f"{_KHO}: kho_in_kexec_metadata", "kho-abi 10.3"),
        Rule("metadata.version", Stage.FS_INITCALL, _TAKES,
             "metadata of another version than 1 is ignored with a line in the log: the count of"
             " handovers starts again",
             f"{_KHO}: kho_in_kexec_metadata", "kho-abi 10.3"),
        Rule("metadata.size", Stage.FS_INITCALL, _TAKES,
             "metadata under 73 bytes, or without its properties, is ignored with a line in the"
             " log: the count of handovers starts again",
             f"{_KHO}: kho_in_kexec_metadata", "kho-abi 10.3"),
        Rule("subtree.unread", Stage.FS_INITCALL, _TAKES,
             "nobody in this kernel asks for the subtree: what it keeps stays reserved, unused",
             f"{_KHO}: kho_retrieve_subtree", "kho-abi 5.1"),
        # ---- FLBs ----
        Rule("flb.memory", Stage.LATE_INITCALL, _PANICS,
             "the page's address is followed unseen when the first FLB is asked for",
             f"{_FLB}: luo_flb_retrieve_one", "luo-mainline 4.5"),
        Rule("flb.preserved", Stage.LATE_INITCALL, _UNDEFINED,
             "a page that is not preserved is free memory by then",
             f"{_FLB}: luo_flb_retrieve_one", "luo-mainline 4.5", (_OK, _WARNING, _PANIC)),
        Rule("flb.many", Stage.LATE_INITCALL, _UNDEFINED,
             "the count is not compared with the 63 records of the page: for a name that is not"
             " among them the kernel reads on into what lies behind",
             f"{_FLB}: luo_flb_retrieve_one", "luo-mainline 4.5", (_OK, _WARNING, _PANIC)),
        Rule("flb.zero", Stage.LATE_INITCALL, _LATER,
             "an entry with count 0 is a reference count that cannot be raised",
             f"{_FLB}: luo_flb_retrieve_one", "real-kernel rules", (_WARNING,)),
        Rule("flb.missing", Stage.FINISH, _LATER,
             "an FLB that the target's handler has and the handover has not warns when the first"
             " file finishes: its count is 0",
             f"{_FLB}: liveupdate_flb_put_incoming",
             "luo-mainline 4.4; real-kernel rules", (_WARNING,)),
        Rule("flb.count", Stage.FINISH, _LATER,
             "every file that finishes takes a reference: a count below the number of files"
             " underflows",
             f"{_FLB}: liveupdate_flb_put_incoming", "real-kernel rules", (_WARNING,)),
        Rule("flb.left", Stage.FINISH, _TAKES,
             "a count above the number of files is never used up: the FLB does not finish",
             f"{_FLB}: liveupdate_flb_put_incoming", "real-kernel rules"),
        Rule("flb.unread", Stage.LATE_INITCALL, _TAKES,
             "the target has no FLB of that name: nobody reads the entry",
             f"{_FLB}: luo_flb_retrieve_one", "luo-mainline 4.4"),
        # ---- sessions ----
        Rule("sessions.preserved", Stage.OPEN, _UNDEFINED,
             "a block that is not preserved lies in free memory: it may be overwritten before it is"
             " read, and warns when it is freed",
             f"{_BLOCK}: kho_block_set_destroy", "kho-abi 10.1",
             (_WARNING, *_AT_OPEN, "ENOENT at RETRIEVE_SESSION")),
        Rule("sessions.key", Stage.OPEN, _LATER,
             "a block's page lies in a larger preserved block and does not begin it: it is read,"
             " and warns when it is freed",
             f"{_KHO}: kho_restore_page", "real-kernel rules", (_WARNING,)),
        Rule("session.duplicate", Stage.OPEN, _LATER,
             "names are unique; 63 bytes of them count",
             f"{_SESSION}: luo_session_insert", "luo-mainline 4.1", ("EIO at open",)),
        Rule("session.name", Stage.OPEN, _TAKES,
             "a name without a NUL loses its last byte",
             f"{_SESSION}: luo_session_alloc", "luo-mainline 4.5"),
        Rule("session.no-files", Stage.OPEN, _LATER,
             "a session that counts files and has no blocks warns, and has none",
             f"{_FILE}: luo_file_deserialize", "luo-mainline 4.5", (_WARNING,)),
        Rule("session.count", Stage.OPEN, _LATER,
             "a session's count must be the number of its file records",
             f"{_FILE}: luo_file_deserialize",
             "luo-mainline 4.5; real-kernel wrong image", ("EIO at open",)),
        Rule("files.memory", Stage.OPEN, _LATER,
             "the chain of blocks is followed unseen: outside RAM nothing is mapped",
             f"{_BLOCK}: kho_block_set_restore", "kho-abi 10.1", ("oops at open",)),
        Rule("files.cycle", Stage.OPEN, _LATER,
             "the chain of file blocks must end",
             f"{_BLOCK}: kho_block_set_is_cyclic",
             "kho-abi 10.1; luo-mainline 4.1", ("EIO at open",)),
        Rule("files.many", Stage.OPEN, _LATER,
             "a chain has 10,000 blocks at most",
             f"{_BLOCK}: kho_block_add", "kho-abi 10.1", ("EIO at open",)),
        Rule("files.count", Stage.OPEN, _LATER,
             "a block holds 1 to 63 files: an empty one makes the chain invalid",
             f"{_BLOCK}: kho_block_set_restore",
             "kho-abi 10.1; luo-mainline 4.5", ("EIO at open",)),
        Rule("files.preserved", Stage.OPEN, _UNDEFINED,
             "a block that is not preserved lies in free memory: it may be overwritten before it is"
             " read, and warns when it is freed",
             f"{_BLOCK}: kho_block_set_destroy", "kho-abi 10.1", (*_AT_OPEN, *_AT_RETRIEVE[1:])),
        Rule("files.key", Stage.FINISH, _LATER,
             "a block's page lies in a larger preserved block and does not begin it: it is read,"
             " and warns when it is freed",
             f"{_KHO}: kho_restore_page", "real-kernel rules", (_WARNING,)),
        Rule("file.compatible", Stage.OPEN, _LATER,
             "every file needs a handler of its name: one without breaks all sessions",
             f"{_FILE}: luo_file_deserialize_one", "luo-mainline 4.4", ("EIO at open",)),
        Rule("file.token", Stage.RETRIEVE_FD, _LATER,
             "tokens are not compared: of two files with one token the first is given, always",
             f"{_FILE}: luo_retrieve_file", "luo-mainline 4.2", (_DATA,)),
        Rule("page.shared", Stage.RETRIEVE_FD, _UNDEFINED,
             "a page of records is freed by the first who is done with it: the others read what"
             " has taken its place, and warn",
             f"{_KHO}: kho_restore_free", "kho-abi 7", (*_AT_OPEN, *_AT_RETRIEVE)),
        # ---- memfds ----
        Rule("memfd.memory", Stage.RETRIEVE_FD, _LATER,
             "the record's address is followed unseen: outside RAM, 0 included, nothing is mapped",
             f"{_MEMFD}: memfd_luo_retrieve", "luo-mainline 4.5", ("oops at RETRIEVE_FD",)),
        Rule("memfd.preserved", Stage.RETRIEVE_FD, _UNDEFINED,
             "a record that is not preserved lies in free memory: it may be overwritten before it"
             " is read, and warns when it is freed",
             f"{_MEMFD}: memfd_luo_retrieve", "luo-mainline 4.5", _AT_RETRIEVE),
        Rule("memfd.key", Stage.RETRIEVE_FD, _LATER,
             "the record's page lies in a larger block and does not begin it: it is read, and"
             " warns when it is freed",
             f"{_KHO}: kho_restore_page", "real-kernel rules", (_WARNING,)),
        Rule("memfd.seals", Stage.RETRIEVE_FD, _LATER,
             "seals are 0x1 to 0x20 (F_SEAL_SEAL to F_SEAL_EXEC)",
             f"{_MEMFD}: memfd_luo_retrieve", "luo-mainline 4.4", ("EOPNOTSUPP at RETRIEVE_FD",)),
        Rule("memfd.seal-exec", Stage.RETRIEVE_FD, _LATER,
             "F_SEAL_EXEC is set on a file that is executable, which seals it against writing,"
             " growing and shrinking, too",
             "mm/memfd.c: memfd_add_seals", "real-kernel rules", ("wrong attributes",)),
        Rule("memfd.position", Stage.RETRIEVE_FD, _LATER,
             "a position of 2^63 and above is refused, and that is not looked at: it is 0",
             f"{_MEMFD}: memfd_luo_retrieve", "luo-mainline 4.5", ("wrong attributes",)),
        Rule("memfd.size", Stage.RETRIEVE_FD, _LATER,
             "the size is not checked: of 2^63 and above it is negative",
             f"{_MEMFD}: memfd_luo_retrieve", "luo-mainline 4.5", ("wrong attributes",)),
        Rule("memfd.hole", Stage.RETRIEVE_FD, _TAKES,
             "pages that no folio holds read as zero; a kernel fills them before it hands over",
             f"{_MEMFD}: memfd_luo_retrieve_folios", "real-kernel rules"),
        Rule("memfd.behind", Stage.RETRIEVE_FD, _TAKES,
             "folios behind the file's end are added all the same",
             f"{_MEMFD}: memfd_luo_retrieve_folios", "real-kernel rules"),
        Rule("memfd.unused", Stage.RETRIEVE_FD, _LATER,
             "the array has folios behind nr_folios: the file is without them, and their memory"
             " stays reserved",
             f"{_MEMFD}: memfd_luo_retrieve", "luo-mainline 4.5", (_DATA,)),
        Rule("memfd.array-short", Stage.RETRIEVE_FD, _LATER,
             "nr_folios is not compared with the array: the kernel reads on into the guard page",
             f"{_MEMFD}: memfd_luo_retrieve_folios", "luo-mainline 4.5", ("oops at RETRIEVE_FD",)),
        Rule("vmalloc.chunk-memory", Stage.RETRIEVE_FD, _LATER,
             "the chain of chunks is followed unseen: outside RAM nothing is mapped",
             f"{_KHO}: kho_restore_vmalloc", "kho-abi 6", ("oops at RETRIEVE_FD",)),
        Rule("vmalloc.chunk-preserved", Stage.RETRIEVE_FD, _UNDEFINED,
             "a chunk that is not preserved lies in free memory: if it was overwritten, what it"
             " says is followed; if not, it cannot be restored",
             f"{_KHO}: kho_restore_vmalloc", "real-kernel wrong image",
             ("EINVAL at RETRIEVE_FD", "oops at RETRIEVE_FD")),
        Rule("vmalloc.chunk-key", Stage.RETRIEVE_FD, _LATER,
             "a chunk needs a key of its own; a larger one that covers it does not do",
             f"{_KHO}: kho_restore_page", "real-kernel rules", ("EINVAL at RETRIEVE_FD",)),
        Rule("vmalloc.page-key", Stage.RETRIEVE_FD, _LATER,
             "each page of the array needs a key that begins there",
             f"{_KHO}: kho_restore_page", "real-kernel rules", ("EINVAL at RETRIEVE_FD",)),
        Rule("vmalloc.pages", Stage.RETRIEVE_FD, _LATER,
             "entries of 2^order pages must make exactly total_pages, which is not 0",
             f"{_KHO}: kho_restore_vmalloc", "kho-abi 7", ("EINVAL at RETRIEVE_FD",)),
        Rule("vmalloc.order", Stage.RETRIEVE_FD, _UNDEFINED,
             "the order is not checked: shifts by it are too wide",
             f"{_KHO}: kho_restore_vmalloc", "kho-abi 6",
             ("EINVAL at RETRIEVE_FD", "oops at RETRIEVE_FD", _WARNING)),
        # ---- folios ----
        Rule("folio.key", Stage.RETRIEVE_FD, _LATER,
             "a folio needs a key that begins at its page, not used before; pages of a larger"
             " folio that was restored are none",
             f"{_KHO}: kho_restore_page; {_MEMFD}: memfd_luo_retrieve_folios",
             "real-kernel rules, wrong image", ("EIO at RETRIEVE_FD",)),
        Rule("folio.overlap", Stage.RETRIEVE_FD, _LATER,
             "folios of one file must not overlap; the order is that of the key, and the index is"
             " rounded down to it",
             "mm/shmem.c: shmem_add_to_page_cache",
             "real-kernel wrong image", ("EEXIST at RETRIEVE_FD",)),
        Rule("folio.index", Stage.RETRIEVE_FD, _LATER,
             "an index is a multiple of the folio's pages: the kernel rounds it down",
             "mm/shmem.c: shmem_add_to_page_cache", "real-kernel rules", (_DATA,)),
        Rule("folio.index-debug", Stage.RETRIEVE_FD, _LATER,
             "an index is a multiple of the folio's pages: with CONFIG_DEBUG_VM the kernel stops",
             "mm/shmem.c: shmem_add_to_page_cache", "real-kernel rules", ("oops at RETRIEVE_FD",)),
        Rule("folio.huge-pages", Stage.RETRIEVE_FD, _UNDEFINED,
             "folios of order 1 and above need CONFIG_TRANSPARENT_HUGEPAGE in the target, which"
             " nothing checks",
             "mm/shmem.c: shmem_add_to_page_cache", "real-kernel rules, wrong image", _AT_RETRIEVE),
        Rule("folio.order", Stage.RETRIEVE_FD, _TAKES,
             "a folio above MAX_PAGE_ORDER is restored like any other; no allocator of that kernel"
             " gives one",
             f"{_KHO}: kho_restore_page", "kho-abi 7, 12.8"),
        Rule("folio.order-debug", Stage.RETRIEVE_FD, _LATER,
             "a folio above MAX_PAGE_ORDER is restored like any other; with CONFIG_DEBUG_VM the"
             " kernel warns",
             "mm/internal.h: folio_set_order", "kho-abi 7, 12.8", (_WARNING,)),
        Rule("folio.stale", Stage.RETRIEVE_FD, _LATER,
             "a folio whose flag says that it is not up to date reads as zero",
             f"{_MEMFD}: memfd_luo_retrieve_folios", "kho-abi 10.4", (_DATA,)),
        Rule("folio.clean", Stage.RETRIEVE_FD, _TAKES,
             "a folio without the flag dirty may be dropped when memory gets short",
             f"{_MEMFD}: memfd_luo_retrieve_folios", "kho-abi 10.4"),
    )
}  # fmt: skip
"""Every rule, by its id, in about the order of the boot."""
