"""Handovers that are wrong in one way each, and what Linux 7.3 does with them.

:class:`Handmade` writes a right one page by page, from the specification alone; each function in
``CASES`` spoils one. The unit tests judge them, and ``test_verdicts.py`` has a real kernel boot
with them and compares what it does with the verdict.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from kho_builder import Builder, flatten
from kho_walker import encode_key, split_key

from luo.fdt import FdtEditor
from luo.image import Extent, Image, boot
from luo.image.verdict import Target, Verdict, judge
from luo.kho import Handover

PAGE = 4096
MIB = 1 << 20
RAM = 0x40000000
KERNEL = 0x40200000  # where QEMU puts it
INITRD = 0x48000000  # with 512 MiB
DEVICE_TREE = 0x48200000  # behind the initrd, which has under 2 MiB
SCRATCH = 0x50000000
META = 0x58000000
DATA = 0x58200000
FLBS = [f"liveupdate-test-flb-v{i}" for i in range(3)]
FLB_DATA = 0xFEEDF00DCAFEBEE0


@dataclass
class Memfd:
    """A file: *orders* of its folios, one behind the other from index 0 on, each aligned."""

    token: int
    size: int
    orders: tuple[int, ...] = ()
    pos: int = 0
    seals: int = 0

    def __post_init__(self) -> None:
        if not self.orders:
            self.orders = (0,) * -(-self.size // PAGE)

    @property
    def contents(self) -> bytes:
        """What PID 1 of the guest would write into it, too."""
        words = range(-(-self.size // 8))
        return b"".join(struct.pack("<Q", self.token << 32 | i) for i in words)[: self.size]


@dataclass
class Expected:
    """What of a file PID 1 should find."""

    contents: bytes
    size: int
    pos: int
    seals: int


def small() -> dict[str, list[Memfd]]:
    """Three sessions: of two files, of one, of none."""
    return {
        "alpha": [Memfd(1, 3 * PAGE - 100, pos=77), Memfd(2, 2 * PAGE)],
        "beta": [Memfd(3, 5000)],
        "empty": [],
    }


@dataclass
class Handmade:
    """A handover that is being written.

    Attributes:
        sessions: what it holds.
        nbytes: of memory.
        scratch: areas.
        at: addresses by name: ``luo``, ``flbs``, ``metadata``, ``sessions 0`` (blocks),
            ``session alpha`` (record), ``alpha/files 0`` (blocks), ``alpha/1`` (file's record),
            ``alpha/1 memfd``, ``… chunk 0``, ``… array 0``, ``… folio 0`` (its record),
            ``… data 0`` (its memory).
        keys: of the map, as (phys, order).
        expect: what PID 1 finds, by session and token; filled by :meth:`write`.
        names: what PID 1 calls the sessions, where that is not their own.
        handover: what the device tree says.
        target: what the kernel that is to boot is like, as ``luo.image.verdict.Target`` has it.
        parameters: of the kernel, for its command line.
        chosen: properties of the device tree's /chosen, instead of the handover.
    """

    sessions: dict[str, list[Memfd]] = field(default_factory=small)
    nbytes: int = 512 * MIB
    scratch: list[tuple[int, int]] = field(default_factory=lambda: [(SCRATCH, 64 * MIB)])
    flbs: bool = True
    per_block: int = 0
    at: dict[str, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    chosen: dict[str, bytes] | None = None

    def __post_init__(self) -> None:
        self.builder = Builder(META)
        self.pages = self.builder.pages
        self.expect: dict[tuple[str, int], Expected] = {}
        self.data = DATA
        self.write()

    # ---- writing ----

    def write(self) -> None:
        """Lay everything down."""
        files = sum(len(files) for files in self.sessions.values())
        self.at["flbs"] = self.flb_page(files) if self.flbs else 0
        for name, listed in self.sessions.items():
            records = []
            for file in listed:
                where = self.memfd(f"{name}/{file.token}", file)
                records.append(struct.pack("<48sQQ", b"memfd-v2", where, file.token))
                self.expect[name, file.token] = Expected(
                    file.contents, file.size, file.pos, file.seals
                )
            self.chain(f"{name}/files", 64, records)
            for i, file in enumerate(listed):
                self.at[f"{name}/{file.token}"] = self.entry(f"{name}/files", i, 64)
        records = [
            struct.pack("<64sQQ", name.encode(), self.at.get(f"{name}/files 0", 0), len(listed))
            for name, listed in self.sessions.items()
        ]
        self.chain("sessions", 80, records)
        for i, name in enumerate(self.sessions):
            self.at[f"session {name}"] = self.entry("sessions", i, 80)
        head = self.at.get("sessions 0", 0)
        self.at["luo"] = self.builder.blob(
            struct.pack("<8sQQQ", b"luo-v5", 7, head, self.at["flbs"])
        )
        self.at["metadata"] = self.builder.blob(struct.pack("<I65sI", 1, b"7.3.4-by-hand", 3))
        self.finish()

    def finish(self, subtrees: dict[str, tuple[int, int]] | None = None, **extra: Any) -> None:
        """Write the root tree and the scratch array."""
        if subtrees is None:
            subtrees = self.subtrees
        self.pages[self.builder.fdt][:] = bytes(PAGE)
        self.builder.finish(subtrees, **extra)
        self.lay_scratch(SCRATCH)

    @property
    def subtrees(self) -> dict[str, tuple[int, int]]:
        """Children of the root tree."""
        return {"LUO": (self.at["luo"], 32), "kexec-metadata": (self.at["metadata"], 73)}

    def lay_scratch(self, where: int) -> None:
        """Write the scratch array at *where*."""
        array = b"".join(struct.pack("<QQ", *area) for area in self.scratch)
        for at in range(0, len(array), PAGE):
            self.poke(where + at, array[at : at + PAGE])
        self.handover = Handover(self.builder.fdt, PAGE, where, len(array))

    def flb_page(self, files: int) -> int:
        """The page of FLBs."""
        names = FLBS if files else []  # what no file holds is not written
        raw = struct.pack("<QQ", 1, len(names))
        for i, name in enumerate(names):
            raw += struct.pack("<48sQQ", name.encode(), FLB_DATA + i, files)
        return self.builder.blob(raw)

    def chain(self, name: str, entry: int, records: list[bytes]) -> None:
        """Blocks of records (§10.1)."""
        room = self.per_block or (PAGE - 16) // entry
        parts = [records[i : i + room] for i in range(0, len(records), room)]
        pages = [self.builder.blob(b"") for _ in parts]
        for i, (page, after) in enumerate(pairwise([*pages, 0])):
            self.at[f"{name} {i}"] = page
            self.poke(page, struct.pack("<QQ", after, len(parts[i])) + b"".join(parts[i]))

    def entry(self, name: str, i: int, size: int) -> int:
        """Where a record of a chain stands."""
        room = self.per_block or (PAGE - 16) // size
        return self.at[f"{name} {i // room}"] + 16 + i % room * size

    def memfd(self, name: str, file: Memfd) -> int:
        """A memfd's record, its array of folios, and its folios (§10.4)."""
        record = self.at[f"{name} memfd"] = self.builder.blob(b"")
        index, rows, contents = 0, [], file.contents
        for i, order in enumerate(file.orders):
            nbytes = PAGE << order
            self.data = -(-self.data // nbytes) * nbytes
            phys, self.data = self.data, self.data + nbytes
            self.at[f"{name} data {i}"] = phys
            self.builder.preserve(phys, order)
            index = -(-index // (1 << order)) << order
            piece = contents[index * PAGE : index * PAGE + nbytes].ljust(nbytes, b"\0")
            for off in range(0, nbytes, PAGE):
                self.pages[phys + off] = bytearray(piece[off : off + PAGE])
            rows.append(struct.pack("<QQ", phys // PAGE | 3 << 52, index))
            index += 1 << order
        first, pages = self.vmalloc(name, b"".join(rows), len(rows))
        self.poke(
            record,
            struct.pack("<QQIIQ", file.pos, file.size, file.seals, 0, len(rows))
            + struct.pack("<QIHH", first, pages, 1 if rows else 0, 0),
        )
        return record

    def vmalloc(self, name: str, array: bytes, rows: int) -> tuple[int, int]:
        """Chunks and pages of an array (§6)."""
        if not rows:
            return 0, 0
        pages = []
        for i in range(0, len(array), PAGE):
            pages.append(self.builder.blob(array[i : i + PAGE]))
            self.at[f"{name} array {i // PAGE}"] = pages[-1]
        for i in range(rows):
            self.at[f"{name} folio {i}"] = pages[i // 256] + i % 256 * 16
        chunks = [self.builder.blob(b"") for _ in range(len(pages) // 511 + 1)]
        for i, (chunk, after) in enumerate(pairwise([*chunks, 0])):
            self.at[f"{name} chunk {i}"] = chunk
            here = pages[511 * i : 511 * (i + 1)]
            self.poke(chunk, struct.pack(f"<Q{len(here)}Q", after, *here))
        return chunks[0], len(pages)

    # ---- changing ----

    def poke(self, phys: int, data: bytes) -> None:
        """Overwrite bytes of one page."""
        page = self.pages.setdefault(phys - phys % PAGE, bytearray(PAGE))
        page[phys % PAGE : phys % PAGE + len(data)] = data

    def u64(self, phys: int, value: int) -> None:
        """Overwrite a number."""
        self.poke(phys, struct.pack("<Q", value))

    def get(self, phys: int) -> int:
        """Read a number."""
        return struct.unpack_from("<Q", self.pages[phys - phys % PAGE], phys % PAGE)[0]

    def leaf(self, phys: int, order: int) -> tuple[list[int], int]:
        """Pages of the tree on the way to a block's bit, leaf last, and the bit."""
        *slots, bit = split_key(encode_key(phys, order))
        path = [self.builder.root]
        for slot in slots:
            path.append(self.get(path[-1] + 8 * slot))
        return path, bit

    def drop(self, phys: int, order: int = 0) -> None:
        """Take a block out of the map."""
        path, bit = self.leaf(phys, order)
        page = self.pages[path[-1]]
        assert page[bit // 8] & 1 << bit % 8
        page[bit // 8] &= ~(1 << bit % 8)

    def reorder(self, phys: int, order: int, old: int = 0) -> None:
        """Record a block with another order."""
        self.drop(phys, old)
        self.builder.preserve(phys, order)

    def move(self, phys: int, to: int) -> None:
        """Move a page; nothing else changes."""
        self.pages[to] = self.pages.pop(phys)

    # ---- the image ----

    def image(self, nbytes: int = 0) -> Image:
        """What was written; pages outside memory are left out."""
        extents = []
        end = RAM + (nbytes or self.nbytes)
        for phys in sorted(self.pages):
            if RAM <= phys < end:
                extents.append(Extent(phys, PAGE, bytes(self.pages[phys])))
        return Image([(RAM, nbytes or self.nbytes, 0)], self.handover, extents)

    def device_tree(self) -> bytes:
        """What the kernel is booted with; QEMU fills in memory, command line and initrd."""
        buffer = bytearray(boot.virt_tree(self.memory).ljust(1 << 14, b"\0"))
        tree = FdtEditor(buffer)
        four = struct.pack(">4Q", *self.handover.numbers)
        chosen = {"linux,kho-fdt": four[:16], "linux,kho-scratch": four[16:]}
        for name, value in (chosen if self.chosen is None else self.chosen).items():
            tree.set_property("/chosen", name, value)
        return bytes(buffer)

    @property
    def memory(self) -> int:
        """Bytes of it that the kernel finds."""
        return self.target.get("memory") or self.nbytes

    def judged(self) -> Verdict:
        """What luo says of it, for the kernel that ``make kernel`` builds, as QEMU loads it."""
        known = {
            "flbs": tuple(FLBS),
            "debug_vm": True,
            "kernel": (KERNEL, 6 * MIB),
            "initrd": (INITRD, MIB),
            "device_tree_at": (DEVICE_TREE, 64 << 10),
            "device_tree": self.device_tree(),
        }
        return judge(self.image(), Target(**known | self.target))

    def script(self) -> Iterator[str]:
        """What PID 1 does: takes everything, finishes, and makes a new session."""
        yield "open"
        for name, files in self.sessions.items():
            called = self.names.get(name, name)
            yield f"retrieve-session {called}"
            for file in files:
                yield f"retrieve {called} {file.token}"
            yield f"finish {called}"
            yield f"close {called}"
        yield "create new"
        yield "file new 9 8192"


# ---- the cases ----


@dataclass(frozen=True)
class Case:
    """A handover that is wrong in one way.

    Attributes:
        name: of it.
        rule: id of the rule that strikes first; None: it is taken.
        make: writes it.
        also: ids of other rules that it breaks.
    """

    name: str
    rule: str | None
    make: Callable[[], Handmade]
    also: tuple[str, ...] = ()


CASES: dict[str, Case] = {}


def case(
    rule: str | None = None, *also: str, **extra: Any
) -> Callable[[Callable[[Handmade], None]], Callable[[Handmade], None]]:
    """Take a function that spoils a handover as a case; *extra* is for :class:`Handmade`."""

    def take(spoil: Callable[[Handmade], None]) -> Callable[[Handmade], None]:
        def make() -> Handmade:
            handmade = Handmade(**extra)
            spoil(handmade)
            return handmade

        name = spoil.__name__.replace("_", "-").strip("-")
        assert name not in CASES, name
        CASES[name] = Case(name, rule, make, also)
        return spoil

    return take


def orders(*each: int) -> dict[str, list[Memfd]]:
    """One session with one file with folios of these orders."""
    return {"alpha": [Memfd(1, sum(PAGE << order for order in each), each)]}


@case()
def good(h):
    """Nothing is wrong."""


# -- the device tree


def chosen(h: Handmade) -> dict[str, bytes]:
    """Properties of /chosen as they should be."""
    four = struct.pack(">4Q", *h.handover.numbers)
    return {"linux,kho-fdt": four[:16], "linux,kho-scratch": four[16:]}


@case("chosen.missing")
def no_kho_fdt(h):
    h.chosen = chosen(h)
    del h.chosen["linux,kho-fdt"]


@case("chosen.missing")
def no_kho_scratch(h):
    h.chosen = chosen(h)
    del h.chosen["linux,kho-scratch"]


@case("chosen.size")
def kho_fdt_of_two_entries(h):
    h.chosen = chosen(h)
    h.chosen["linux,kho-fdt"] *= 2


@case("chosen.size")
def kho_scratch_of_one_cell_each(h):
    h.chosen = chosen(h)
    h.chosen["linux,kho-scratch"] = struct.pack(">II", SCRATCH, 16)


@case("chosen.other")
def another_root_tree_in_the_device_tree(h):
    h.chosen = chosen(h)
    h.chosen["linux,kho-fdt"] = struct.pack(">QQ", DATA, PAGE)


# -- the root tree


def expected(h: Handmade, token: int = 1, name: str = "alpha") -> Expected:
    """What PID 1 is to find of a file."""
    return h.expect[name, token]


def zeros(found: Expected, first: int, pages: int = 1) -> None:
    """Say that pages of a file read as zero."""
    start, end = first * PAGE, min((first + pages) * PAGE, found.size)
    found.contents = found.contents[:start] + bytes(end - start) + found.contents[end:]


def resize(found: Expected, size: int) -> None:
    """Say that a file has another size; what it did not have reads as zero."""
    found.contents, found.size = found.contents[:size].ljust(size, b"\0"), size


def handover(h: Handmade, **numbers: int) -> None:
    """Change numbers of the handover."""
    h.handover = replace(h.handover, **numbers)


@case("root.window")
def root_tree_of_no_bytes(h):
    handover(h, fdt_len=0)


@case("root.window")
def root_tree_of_a_mib(h):
    handover(h, fdt_len=MIB)


@case("root.header")
def root_tree_without_magic(h):
    h.poke(h.builder.fdt, b"\xd0\x0d\xfe\xee")


@case("root.header")
def root_tree_of_version_1(h):
    h.poke(h.builder.fdt + 20, struct.pack(">II", 1, 1))


@case("root.header")
def root_tree_misaligned(h):
    handover(h, fdt_phys=h.builder.fdt + 4)


@case("root.header")
def root_tree_without_structure(h):
    h.poke(h.builder.fdt + 8, struct.pack(">I", 0x100000))


@case()
def root_tree_says_it_is_larger(h):
    h.poke(h.builder.fdt + 4, struct.pack(">I", 2 * PAGE))


@case("root.beyond")
def root_tree_with_strings_beyond_its_page(h):
    tree = h.pages[h.builder.fdt]
    (strings, length) = struct.unpack_from(">I", tree, 12)[0], struct.unpack_from(">I", tree, 32)[0]
    h.poke(h.builder.fdt + PAGE, bytes(tree[strings : strings + length]))
    h.poke(h.builder.fdt + 4, struct.pack(">I", 3 * PAGE))
    h.poke(h.builder.fdt + 12, struct.pack(">I", PAGE))


@case("root.structure")
def root_tree_with_an_unknown_token(h):
    (at,) = struct.unpack_from(">I", h.pages[h.builder.fdt], 8)
    h.poke(h.builder.fdt + at, struct.pack(">I", 7))


@case("root.compatible")
def kho_v3(h):
    h.finish(compatible=b"kho-v3\0")


@case("root.compatible")
def kho_v40(h):
    h.finish(compatible=b"kho-v40\0")


@case()
def kho_v5_then_v4(h):
    h.finish(compatible=b"kho-v5\0kho-v4\0")


@case()
def kho_v4_without_nul(h):
    h.finish(compatible=b"kho-v4")


@case("map.property")
def map_is_0(h):
    h.builder.root, root = 0, h.builder.root
    h.finish()
    h.builder.root = root


def patch_tree(h: Handmade, old: bytes, new: bytes) -> None:
    """Replace bytes of the root tree."""
    page = h.pages[h.builder.fdt]
    assert page.count(old) == 1, (old, page.count(old))
    at = page.index(old)
    page[at : at + len(new)] = new


def property_at(h: Handmade, name: bytes, behind: bytes = b"") -> int:
    """Where a property of 8 bytes begins, the first behind some bytes: its token."""
    page = h.pages[h.builder.fdt]
    (strings,) = struct.unpack_from(">I", page, 12)
    where = page.index(name + b"\0", strings) - strings
    return h.builder.fdt + page.index(struct.pack(">III", 3, 8, where), page.index(behind))


def shorten(h: Handmade, name: bytes, behind: bytes = b"") -> None:
    """Have a property of 8 bytes say that it has 4; a token that means nothing fills the rest."""
    at = property_at(h, name, behind)
    h.poke(at + 4, struct.pack(">I", 4))
    h.poke(at + 16, struct.pack(">I", 4))


@case("map.property")
def map_property_missing(h):
    patch_tree(h, b"preserved-memory-map\0", b"preserved-memory-mop\0")


@case("map.property")
def map_property_of_4_bytes(h):
    shorten(h, b"preserved-memory-map")


@case("root.preserved")
def root_tree_not_in_the_map(h):
    h.drop(h.builder.fdt)


@case("root.memory")
def root_tree_outside_memory(h):
    handover(h, fdt_phys=RAM + h.nbytes + 16 * MIB)


# -- scratch


@case("scratch.window")
def scratch_array_of_no_bytes(h):
    handover(h, scratch_len=0)


@case("scratch.window")
def scratch_array_of_a_mib(h):
    handover(h, scratch_len=MIB)


@case("scratch.none")
def scratch_array_of_8_bytes(h):
    handover(h, scratch_len=8)


@case("scratch.array-memory")
def scratch_array_outside_memory(h):
    handover(h, scratch_phys=RAM + h.nbytes + 16 * MIB)


@case("scratch.none")
def scratch_of_size_0(h):
    h.scratch = [(SCRATCH, 0)]
    h.finish()


@case()
def scratch_with_an_empty_area(h):
    h.scratch = [(SCRATCH, 64 * MIB), (0, 0)]
    h.finish()


def many_areas(h: Handmade, more: int) -> None:
    """One area and so many small ones, apart from one another."""
    h.scratch = [(SCRATCH, 64 * MIB)]
    h.scratch += [(0x54010000 + i * 0x10000, 0x1000) for i in range(more)]
    h.finish()


@case("scratch.aligned")
def scratch_of_62_areas(h):
    many_areas(h, 61)


@case("scratch.areas")
def scratch_of_63_areas(h):
    many_areas(h, 62)


@case("scratch.areas")
def scratch_of_1000_areas(h):
    many_areas(h, 999)


@case("scratch.memory")
def scratch_outside_memory(h):
    h.scratch = [(SCRATCH, 64 * MIB), (0x80000000, 64 * MIB)]
    h.finish()


@case("scratch.memory")
def scratch_past_the_end_of_memory(h):
    h.scratch = [(SCRATCH, 64 * MIB), (0x5E000000, 64 * MIB)]
    h.finish()


@case("scratch.hole")
def scratch_below_memory(h):
    h.scratch = [(SCRATCH, 64 * MIB), (0x10000000, 16 * MIB)]
    h.finish()


@case("scratch.small")
def scratch_of_2_mib(h):
    h.scratch = [(SCRATCH, 2 * MIB)]
    h.finish()


@case("scratch.small")
def scratch_of_8_mib(h):
    h.scratch = [(SCRATCH, 8 * MIB)]
    h.finish()


@case("scratch.tight")
def scratch_of_10_mib(h):
    h.scratch = [(SCRATCH, 10 * MIB)]
    h.finish()


@case()
def scratch_of_12_mib(h):
    h.scratch = [(SCRATCH, 12 * MIB)]
    h.finish()


@case()
def scratch_of_three_areas(h):
    h.scratch = [(SCRATCH, 4 * MIB), (SCRATCH + 8 * MIB, 8 * MIB), (SCRATCH + 32 * MIB, 4 * MIB)]
    h.finish()


@case("scratch.aligned")
def scratch_off_by_a_page(h):
    h.scratch = [(SCRATCH + PAGE, 64 * MIB - 3 * PAGE)]
    h.finish()


@case("scratch.page")
def scratch_off_by_100_bytes(h):
    h.scratch = [(SCRATCH + 100, 64 * MIB - 1000)]
    h.finish()


@case("scratch.tree", "scratch.preserved")
def scratch_over_data(h):
    h.scratch = [(SCRATCH, 192 * MIB)]
    h.finish()


@case("scratch.preserved", sessions=orders(0, 0, 0))
def a_page_in_scratch(h):
    old = h.at["alpha/1 data 1"]
    h.drop(old)
    h.move(old, SCRATCH + 2 * MIB)
    h.builder.preserve(SCRATCH + 2 * MIB, 0)
    h.u64(h.at["alpha/1 folio 1"], (SCRATCH + 2 * MIB) // PAGE | 3 << 52)


@case("scratch.preserved", sessions=orders(0, 0, 0))
def a_page_at_the_top_of_scratch(h):
    old, new = h.at["alpha/1 data 1"], SCRATCH + 63 * MIB
    h.drop(old)
    h.move(old, new)
    h.builder.preserve(new, 0)
    h.u64(h.at["alpha/1 folio 1"], new // PAGE | 3 << 52)


def move_tree(h: Handmade, to: int) -> None:
    """Move the whole tree of the map."""
    where = {}
    stack = [(h.builder.root, 5)]
    while stack:
        phys, level = stack.pop()
        where[phys] = to + PAGE * len(where)
        if level:
            for at in range(0, PAGE, 8):
                if below := h.get(phys + at):
                    stack.append((below, level - 1))
    inner = {phys: [at for at in range(0, PAGE, 8) if h.get(phys + at) in where] for phys in where}
    for phys, slots in inner.items():
        for at in slots:
            h.u64(phys + at, where[h.get(phys + at)])
    for phys, new in where.items():
        h.move(phys, new)
    h.builder.root = where[h.builder.root]
    h.finish()


@case()
def tree_elsewhere(h):
    move_tree(h, 0x5A000000)


@case("scratch.tree")
def tree_low_in_scratch(h):
    move_tree(h, SCRATCH + MIB)


@case("scratch.tree")
def tree_at_the_top_of_scratch(h):
    move_tree(h, SCRATCH + 63 * MIB)


@case()
def scratch_array_outside_scratch(h):
    h.lay_scratch(0x5B000000)


@case("scratch.array")
def scratch_array_in_a_preserved_page(h):
    h.builder.preserve(0x5B000000, 0)
    h.lay_scratch(0x5B000000)


# -- the map


@case("map.node")
def node_outside_memory(h):
    path, _ = h.leaf(h.builder.fdt, 0)
    for at in range(0, PAGE, 8):
        if h.get(path[-2] + at):
            h.u64(path[-2] + at, RAM + h.nbytes + MIB)


@case("map.node")
def map_outside_memory(h):
    h.builder.root, root = RAM + h.nbytes, h.builder.root
    h.finish()
    h.builder.root = root


@case("map.block")
def key_above_memory(h):
    h.builder.preserve(RAM + h.nbytes + 0x8000000, 0)


@case("map.block")
def key_below_memory(h):
    h.builder.preserve(0x1000, 0)


@case("map.block")
def key_of_order_10_above_memory(h):
    h.builder.preserve(0x80000000, 10)


@case("map.beyond", nbytes=500 * MIB)
def key_of_order_12_across_the_end_of_memory(h):
    h.builder.preserve(RAM + 496 * MIB, 12)


@case("map.beyond", nbytes=450 * MIB)
def key_above_memory_in_its_last_section(h):
    h.builder.preserve(RAM + 460 * MIB, 0)


@case("map.key")
def key_0(h):
    h.builder.add_key(0)


@case("map.key")
def key_1(h):
    h.builder.add_key(1)


@case("map.key")
def key_with_two_markers(h):
    h.builder.add_key(1 << 53 | DATA // PAGE)


@case("map.key-inside")
def key_with_a_high_marker_inside_memory(h):
    h.builder.add_key(1 << 53 | 0x5C000000 >> 11)


@case("map.block", "map.all")
def key_of_order_40(h):
    h.builder.preserve(0, 40)


@case("map.all")
def key_of_order_18_over_all(h):
    h.builder.preserve(RAM, 18)


@case("map.two-orders")
def page_in_two_orders(h):
    h.builder.preserve(h.at["alpha/1 data 0"] & ~0x3FFF, 2)


@case("map.two-orders")
def unused_block_over_unused_block(h):
    h.builder.preserve(0x5C000000, 0)
    h.builder.preserve(0x5C000000, 3)


@case("boot.kernel")
def key_over_the_kernel(h):
    h.builder.preserve(KERNEL + MIB, 0)


@case("boot.initrd")
def key_over_the_initrd(h):
    h.builder.preserve(INITRD, 0)


@case("boot.device-tree")
def key_over_the_device_tree(h):
    h.builder.preserve(DEVICE_TREE, 0)


@case("map.twice")
def leaf_reached_twice(h):
    path, _ = h.leaf(h.builder.fdt, 0)
    slot = next(at for at in range(0, PAGE, 8) if h.get(path[-2] + at))
    h.u64(path[-2] + slot + 8, path[-1])


@case("map.misaligned")
def node_misaligned(h):
    path, _ = h.leaf(h.builder.fdt, 0)
    slot = next(at for at in range(0, PAGE, 8) if h.get(path[-2] + at))
    new = 0x5A000000 + 8
    page = h.pages.pop(path[-1])
    h.pages[0x5A000000] = bytearray(8) + page[:-8]
    h.pages[0x5A001000] = page[-8:] + bytearray(PAGE - 8)
    h.u64(path[-2] + slot, new)


# -- LUO's blob


@case("luo.size")
def luo_of_31_bytes(h):
    h.finish({**h.subtrees, "LUO": (h.at["luo"], 31)})


@case()
def luo_of_4096_bytes(h):
    h.finish({**h.subtrees, "LUO": (h.at["luo"], 4096)})


@case("luo.compatible")
def luo_v4(h):
    h.poke(h.at["luo"], b"luo-v4\0\0")


@case("luo.compatible")
def luo_v4_with_liveupdate_off(h):
    h.poke(h.at["luo"], b"luo-v4\0\0")
    h.parameters = ["liveupdate=off"]
    h.target = {"liveupdate": False}


@case()
def luo_v5_with_a_byte_behind(h):
    h.poke(h.at["luo"], b"luo-v5\0x")


@case("luo.compatible")
def luo_v5x(h):
    h.poke(h.at["luo"], b"luo-v5x\0")


@case("luo.missing")
def no_luo(h):
    h.finish({"kexec-metadata": (h.at["metadata"], 73)})
    h.sessions = {}


@case("luo.property")
def luo_without_blob_size(h):
    at = property_at(h, b"blob-size", b"LUO\0")
    h.poke(at, struct.pack(">I", 4) * 5)


@case("luo.property")
def luo_with_data_of_4_bytes(h):
    shorten(h, b"preserved-data", b"LUO\0")


@case("luo.memory")
def luo_outside_memory(h):
    h.finish({**h.subtrees, "LUO": (RAM + h.nbytes, 32)})


@case("luo.preserved")
def luo_not_in_the_map(h):
    h.drop(h.at["luo"])


@case("luo.key")
def luo_covered_by_a_larger_key(h):
    """As the second page of a block of order 1."""
    old, new = h.at["luo"], 0x5A001000
    h.drop(old)
    h.move(old, new)
    h.builder.preserve(new - PAGE, 1)
    h.at["luo"] = new
    h.finish()


@case()
def luo_in_a_block_of_order_1(h):
    old, new = h.at["luo"], 0x5A000000
    h.drop(old)
    h.move(old, new)
    h.builder.preserve(new, 1)
    h.at["luo"] = new
    h.finish()


@case("target.liveupdate")
def liveupdate_off(h):
    h.parameters = ["liveupdate=off"]
    h.target = {"liveupdate": False}


@case("target.kho")
def kho_off(h):
    h.parameters = ["kho=off"]
    h.target = {"kho": False}


@case("target.kho")
def luo_v4_with_kho_off(h):
    h.poke(h.at["luo"], b"luo-v4\0\0")
    h.parameters = ["kho=off"]
    h.target = {"kho": False}


# -- other subtrees


@case("metadata.version")
def metadata_of_version_2(h):
    h.poke(h.at["metadata"], struct.pack("<I", 2))


@case("metadata.size")
def metadata_of_3_bytes(h):
    h.finish({**h.subtrees, "kexec-metadata": (h.at["metadata"], 3)})


@case("metadata.size")
def metadata_of_72_bytes(h):
    h.finish({**h.subtrees, "kexec-metadata": (h.at["metadata"], 72)})


@case()
def no_metadata(h):
    h.finish({"LUO": (h.at["luo"], 32)})


@case("metadata.memory")
def metadata_outside_memory(h):
    h.finish({**h.subtrees, "kexec-metadata": (RAM + h.nbytes, 73)})


@case("subtree.unread")
def an_unknown_subtree(h):
    h.finish({**h.subtrees, "mystery": (0x5D000000, 100)})


def region(h: Handmade, name: str = "trace", start: int = 0x5D000000, size: int = MIB) -> None:
    """Reserve a region, and have the kernel ask for it as 1 MiB, aligned to 4096: "trace"."""
    node = {
        "compatible": b"reserve-mem-v1\0",
        "start": struct.pack("<Q", start),
        "size": struct.pack("<Q", size),
    }
    tree = flatten({"compatible": b"memblock-v1\0"}, {name: node})
    h.at["memblock"] = h.builder.blob(tree)
    for i in range(size // PAGE):
        h.builder.preserve(start + i * PAGE, 0)
    h.finish({**h.subtrees, "memblock": (h.at["memblock"], len(tree))})
    h.parameters = ["reserve_mem=1M:4096:trace"]
    h.target = {"reserve_mem": (("trace", MIB, 4096),)}


@case()
def region_as_asked_for(h):
    region(h)


@case("memblock.region")
def region_of_another_size(h):
    region(h, size=2 * MIB)


@case("memblock.region")
def region_of_another_name(h):
    region(h, name="traces")


@case("memblock.region")
def region_asked_for_and_not_there(h):
    region(h)
    h.finish()


@case("memblock.region")
def region_not_aligned(h):
    region(h, start=0x5D000000 + 2048)


@case("memblock.memory")
def region_with_its_tree_outside_memory(h):
    region(h)
    h.finish({**h.subtrees, "memblock": (RAM + h.nbytes, 300)})


# -- session blocks


@case("sessions.cycle")
def session_blocks_in_a_circle(h):
    h.u64(h.at["sessions 0"], h.at["sessions 0"])


@case("sessions.cycle", per_block=1)
def session_blocks_back_to_the_first(h):
    h.u64(h.at["sessions 2"], h.at["sessions 0"])


@case("sessions.count")
def session_block_of_0(h):
    h.u64(h.at["sessions 0"] + 8, 0)


@case("sessions.count")
def session_block_of_52(h):
    h.u64(h.at["sessions 0"] + 8, 52)


@case("sessions.count", per_block=1)
def last_session_block_of_0(h):
    h.u64(h.at["sessions 2"] + 8, 0)


@case(per_block=1)
def session_blocks_not_full(h):
    pass


@case("sessions.many", sessions={f"s{i}": [] for i in range(10001)}, per_block=1)
def session_blocks_10001(h):
    pass


@case(sessions={f"s{i}": [] for i in range(10000)}, per_block=1)
def session_blocks_10000(h):
    h.sessions = {"s0": [], "s9999": []}


@case("sessions.memory")
def session_block_outside_memory(h):
    h.u64(h.at["luo"] + 16, RAM + h.nbytes)


@case("sessions.memory")
def next_session_block_outside_memory(h):
    h.u64(h.at["sessions 0"], RAM + h.nbytes)


@case("sessions.preserved")
def session_block_not_in_the_map(h):
    h.drop(h.at["sessions 0"])


@case("flb.left")
def no_sessions(h):
    h.u64(h.at["luo"] + 16, 0)
    h.sessions = {}


@case("sessions.key")
def session_block_covered_by_a_larger_key(h):
    old, new = h.at["sessions 0"], 0x5A001000
    h.drop(old)
    h.move(old, new)
    h.builder.preserve(new - PAGE, 1)
    h.u64(h.at["luo"] + 16, new)


# -- sessions


@case("session.duplicate")
def two_sessions_of_one_name(h):
    h.poke(h.at["session beta"], b"alpha\0")


@case("session.duplicate")
def two_names_that_differ_behind_63_bytes(h):
    h.poke(h.at["session alpha"], b"n" * 63 + b"a")
    h.poke(h.at["session beta"], b"n" * 63 + b"b")


@case("session.name")
def session_name_without_nul(h):
    h.poke(h.at["session alpha"], b"n" * 64)
    h.names["alpha"] = "n" * 63


@case()
def session_without_name(h):
    h.poke(h.at["session alpha"], bytes(64))
    h.names["alpha"] = "%00"


@case("session.count")
def session_says_3_files(h):
    h.u64(h.at["session alpha"] + 72, 3)


@case("session.count")
def session_says_1_file(h):
    h.u64(h.at["session alpha"] + 72, 1)


@case("session.no-files")
def session_of_2_files_without_blocks(h):
    h.u64(h.at["session alpha"] + 64, 0)
    h.sessions["alpha"] = []


@case("session.count")
def empty_session_with_blocks(h):
    h.u64(h.at["session alpha"] + 72, 0)


# -- file blocks


@case("files.cycle")
def file_blocks_in_a_circle(h):
    h.u64(h.at["alpha/files 0"], h.at["alpha/files 0"])


@case("files.count")
def file_block_of_0(h):
    h.u64(h.at["alpha/files 0"] + 8, 0)


@case("files.count")
def file_block_of_64(h):
    h.u64(h.at["alpha/files 0"] + 8, 64)


@case("files.many")
def file_blocks_10001(h):
    """The same file in each, as far as the records go; nobody comes to look at them."""
    pages = [h.at["alpha/files 0"], *(h.builder.blob(b"") for _ in range(10000))]
    record = bytes(h.pages[pages[0]][16:80])
    for page, after in pairwise([*pages, 0]):
        h.poke(page, struct.pack("<QQ", after, 1) + record)
    h.u64(h.at["session alpha"] + 72, 10001)


@case("files.memory")
def file_block_outside_memory(h):
    h.u64(h.at["session alpha"] + 64, RAM + h.nbytes)


@case("files.preserved")
def file_block_not_in_the_map(h):
    h.drop(h.at["alpha/files 0"])


@case("files.key")
def file_block_covered_by_a_larger_key(h):
    old, new = h.at["alpha/files 0"], 0x5A001000
    h.drop(old)
    h.move(old, new)
    h.builder.preserve(new - PAGE, 1)
    h.u64(h.at["session alpha"] + 64, new)


@case("page.shared")
def two_sessions_with_one_file_block(h):
    h.u64(h.at["session beta"] + 64, h.at["alpha/files 0"])
    h.u64(h.at["session beta"] + 72, 2)
    h.sessions = {"alpha": h.sessions["alpha"], "beta": [], "empty": []}


@case("file.compatible")
def file_of_memfd_v1(h):
    h.poke(h.at["alpha/2"], b"memfd-v1")


@case("file.compatible")
def file_without_compatible(h):
    h.poke(h.at["alpha/1"], bytes(48))


@case("file.compatible")
def file_compatible_without_nul(h):
    h.poke(h.at["alpha/1"], b"memfd-v2".ljust(48, b"x"))


@case()
def file_compatible_with_bytes_behind(h):
    h.poke(h.at["alpha/1"], b"memfd-v2\0xyz")


@case("file.token")
def two_files_of_one_token(h):
    h.u64(h.at["alpha/2"] + 56, 1)
    expected(h).contents = h.expect["alpha", 2].contents  # who wants the second


# -- memfds


@case("memfd.memory")
def memfd_record_at_0(h):
    h.u64(h.at["alpha/1"] + 48, 0)


@case("memfd.memory")
def memfd_record_outside_memory(h):
    h.u64(h.at["alpha/1"] + 48, RAM + h.nbytes)


@case("memfd.preserved")
def memfd_record_not_in_the_map(h):
    h.drop(h.at["alpha/1 memfd"])


@case("memfd.key")
def memfd_record_covered_by_a_larger_key(h):
    old, new = h.at["alpha/1 memfd"], 0x5A001000
    h.drop(old)
    h.move(old, new)
    h.builder.preserve(new - PAGE, 1)
    h.u64(h.at["alpha/1"] + 48, new)


@case("page.shared")
def two_files_of_one_memfd_record(h):
    h.u64(h.at["alpha/2"] + 48, h.at["alpha/1 memfd"])


@case("memfd.seals")
def memfd_of_unknown_seals(h):
    h.poke(h.at["alpha/1 memfd"] + 16, struct.pack("<I", 0x40))


@case("memfd.seal-exec")
def memfd_of_seal_exec(h):
    h.poke(h.at["alpha/1 memfd"] + 16, struct.pack("<I", 0x20))
    expected(h).seals = 0x20


@case()
def memfd_of_seals(h):
    h.poke(h.at["alpha/1 memfd"] + 16, struct.pack("<I", 0x1F))
    expected(h).seals = 0x1F


@case()
def memfd_of_flags(h):
    h.poke(h.at["alpha/1 memfd"] + 20, struct.pack("<I", 0xFFFFFFFF))


@case("memfd.position")
def memfd_of_negative_position(h):
    h.u64(h.at["alpha/1 memfd"], 1 << 63)
    expected(h).pos = 1 << 63


@case()
def memfd_position_behind_its_end(h):
    h.u64(h.at["alpha/1 memfd"], 1 << 40)
    expected(h).pos = 1 << 40


@case("memfd.size")
def memfd_of_negative_size(h):
    h.u64(h.at["alpha/1 memfd"] + 8, 1 << 63)
    expected(h).size = 1 << 63


@case("memfd.hole")
def memfd_larger_than_its_folios(h):
    h.u64(h.at["alpha/1 memfd"] + 8, 8 * PAGE)
    resize(expected(h), 8 * PAGE)


@case("memfd.behind")
def memfd_smaller_than_its_folios(h):
    h.u64(h.at["alpha/1 memfd"] + 8, PAGE)
    resize(expected(h), PAGE)


@case("memfd.hole")
def memfd_without_folios(h):
    h.poke(h.at["alpha/1 memfd"] + 24, bytes(24))
    zeros(expected(h), 0, 3)


@case("memfd.unused")
def memfd_of_one_folio_less(h):
    h.u64(h.at["alpha/1 memfd"] + 24, 2)


@case()
def memfd_of_one_folio_more(h):
    h.u64(h.at["alpha/1 memfd"] + 24, 4)


@case("memfd.array-short")
def memfd_of_more_folios_than_its_array(h):
    h.u64(h.at["alpha/1 memfd"] + 24, 257)


@case("memfd.array-short")
def memfd_of_2_60_folios(h):
    h.u64(h.at["alpha/1 memfd"] + 24, 1 << 60)


# -- vmalloc


@case("vmalloc.chunk-preserved")
def chunk_not_in_the_map(h):
    h.drop(h.at["alpha/1 chunk 0"])


@case("vmalloc.chunk-key")
def chunk_covered_by_a_larger_key(h):
    old, new = h.at["alpha/1 chunk 0"], 0x5A001000
    h.drop(old)
    h.move(old, new)
    h.builder.preserve(new - PAGE, 1)
    h.u64(h.at["alpha/1 memfd"] + 32, new)


@case("vmalloc.chunk-memory")
def chunk_outside_memory(h):
    h.u64(h.at["alpha/1 memfd"] + 32, RAM + h.nbytes)


@case("vmalloc.pages")
def no_chunk(h):
    h.u64(h.at["alpha/1 memfd"] + 32, 0)


@case("vmalloc.pages")
def chunks_in_a_circle(h):
    h.u64(h.at["alpha/1 chunk 0"], h.at["alpha/1 chunk 0"])


@case("vmalloc.page-key")
def array_not_in_the_map(h):
    h.drop(h.at["alpha/1 array 0"])


@case("vmalloc.page-key")
def array_outside_memory(h):
    h.u64(h.at["alpha/1 chunk 0"] + 8, RAM + h.nbytes)


@case("vmalloc.page-key")
def array_covered_by_a_larger_key(h):
    old, new = h.at["alpha/1 array 0"], 0x5A001000
    h.drop(old)
    h.move(old, new)
    h.builder.preserve(new - PAGE, 1)
    h.u64(h.at["alpha/1 chunk 0"] + 8, new)


@case()
def array_first_in_a_larger_key(h):
    old, new = h.at["alpha/1 array 0"], 0x5A000000
    h.drop(old)
    h.move(old, new)
    h.builder.preserve(new, 1)
    h.u64(h.at["alpha/1 chunk 0"] + 8, new)


@case("vmalloc.pages")
def total_pages_of_0(h):
    h.poke(h.at["alpha/1 memfd"] + 40, struct.pack("<I", 0))


@case("vmalloc.pages")
def total_pages_of_2(h):
    h.poke(h.at["alpha/1 memfd"] + 40, struct.pack("<I", 2))


@case("vmalloc.pages")
def total_pages_of_2_32(h):
    h.poke(h.at["alpha/1 memfd"] + 40, struct.pack("<I", 0xFFFFFFFF))


@case()
def vmalloc_of_unknown_flags(h):
    h.poke(h.at["alpha/1 memfd"] + 44, struct.pack("<H", 0xFFFF))


@case("vmalloc.pages")
def vmalloc_of_order_1(h):
    h.poke(h.at["alpha/1 memfd"] + 46, struct.pack("<H", 1))


@case("vmalloc.order")
def vmalloc_of_order_32(h):
    h.poke(h.at["alpha/1 memfd"] + 46, struct.pack("<H", 32))


@case()
def an_empty_chunk_at_the_end(h):
    h.u64(h.at["alpha/1 chunk 0"], h.builder.blob(b""))


# -- folios


@case("folio.key")
def folio_not_in_the_map(h):
    h.drop(h.at["alpha/1 data 1"])


@case("folio.key")
def folio_outside_memory(h):
    h.u64(h.at["alpha/1 folio 1"], (RAM + h.nbytes + 0x8000000) // PAGE | 3 << 52)


@case("folio.key", sessions=orders(0, 0, 0, 0))
def folio_of_order_1_instead_of_0(h):
    h.reorder(h.at["alpha/1 data 0"], 1)


@case("folio.index-debug", sessions=orders(0, 0, 0, 0))
def second_folio_of_order_1_instead_of_0(h):
    h.drop(h.at["alpha/1 data 1"])
    h.move(h.at["alpha/1 data 1"], 0x5A000000)
    h.u64(h.at["alpha/1 folio 1"], 0x5A000000 // PAGE | 3 << 52)
    h.builder.preserve(0x5A000000, 1)


@case("folio.overlap", sessions=orders(0, 0, 0, 0))
def third_folio_of_order_1_instead_of_0(h):
    h.drop(h.at["alpha/1 data 2"])
    h.move(h.at["alpha/1 data 2"], 0x5A000000)
    h.u64(h.at["alpha/1 folio 2"], 0x5A000000 // PAGE | 3 << 52)
    h.builder.preserve(0x5A000000, 1)


@case("folio.key", sessions=orders(0, 0, 0, 0))
def folios_covered_by_one_key(h):
    for i in range(4):
        h.drop(h.at[f"alpha/1 data {i}"])
    h.builder.preserve(h.at["alpha/1 data 0"], 2)


@case("memfd.hole", sessions=orders(2))
def folio_of_order_1_instead_of_2(h):
    h.reorder(h.at["alpha/1 data 0"], 1, 2)
    zeros(expected(h), 2, 2)


@case("memfd.hole", "map.two-orders", sessions=orders(2))
def folio_of_order_0_and_2(h):
    h.builder.preserve(h.at["alpha/1 data 0"], 0)
    zeros(expected(h), 1, 3)


@case(sessions=orders(9, 3, 2, 1, 0, 0))
def folios_of_many_orders(h):
    pass


@case(sessions=orders(10))
def folio_of_order_10(h):
    pass


@case("folio.order-debug", sessions=orders(11))
def folio_of_order_11(h):
    pass


@case("folio.order-debug", sessions=orders(12))
def folio_of_order_12(h):
    pass


@case("folio.index-debug", sessions=orders(1, 1))
def folio_with_a_misaligned_index(h):
    h.u64(h.at["alpha/1 folio 1"] + 8, 3)
    found = expected(h)
    found.contents = found.contents[: 2 * PAGE] + bytes(PAGE) + found.contents[2 * PAGE :][:PAGE]


@case("folio.overlap")
def two_folios_of_one_index(h):
    h.u64(h.at["alpha/1 folio 1"] + 8, 0)


@case("folio.overlap", sessions=orders(2, 0))
def folio_inside_another(h):
    h.u64(h.at["alpha/1 folio 1"] + 8, 2)


@case("folio.key")
def one_folio_twice(h):
    h.u64(h.at["alpha/1 folio 1"], h.at["alpha/1 data 0"] // PAGE | 3 << 52)


@case("folio.key")
def one_folio_in_two_files(h):
    h.u64(h.at["alpha/2 folio 1"], h.at["alpha/1 data 0"] // PAGE | 3 << 52)


@case("folio.stale")
def folio_not_uptodate(h):
    h.u64(h.at["alpha/1 folio 1"], h.at["alpha/1 data 1"] // PAGE | 1 << 52)


@case("folio.clean")
def folio_not_dirty(h):
    h.u64(h.at["alpha/1 folio 1"], h.at["alpha/1 data 1"] // PAGE | 2 << 52)


@case()
def folio_of_unknown_flags(h):
    h.u64(h.at["alpha/1 folio 1"], h.at["alpha/1 data 1"] // PAGE | 0xFFF << 52)


@case("memfd.hole")
def folio_at_0(h):
    h.u64(h.at["alpha/1 folio 1"], 0)
    zeros(expected(h), 1)


@case("memfd.behind")
def folio_far_behind_the_end(h):
    h.u64(h.at["alpha/1 folio 2"] + 8, 1 << 50)
    zeros(expected(h), 2)


# -- FLBs


@case("flb.missing")
def no_flb_page(h):
    h.u64(h.at["luo"] + 24, 0)


@case("flb.missing")
def flb_of_another_name(h):
    h.poke(h.at["flbs"] + 16, b"liveupdate-test-flb-v9")


@case("flb.count")
def flb_count_of_1(h):
    h.u64(h.at["flbs"] + 16 + 56, 1)


@case("flb.zero")
def flb_count_of_0(h):
    h.u64(h.at["flbs"] + 16 + 56, 0)


@case("flb.left")
def flb_count_of_9(h):
    h.u64(h.at["flbs"] + 16 + 56, 9)


@case("flb.unread")
def flb_that_the_kernel_has_not(h):
    h.u64(h.at["flbs"] + 8, 4)
    h.poke(h.at["flbs"] + 16 + 3 * 64, struct.pack("<48sQQ", b"pci-luo", 1, 3))


@case("flb.memory")
def flb_page_outside_memory(h):
    h.u64(h.at["luo"] + 24, RAM + h.nbytes)


@case("flb.preserved")
def flb_page_not_in_the_map(h):
    h.drop(h.at["flbs"])


@case("flb.missing")
def flb_page_of_2(h):
    h.u64(h.at["flbs"] + 8, 2)


@case("flb.many")
def flb_page_of_2_40(h):
    h.poke(h.at["flbs"] + 16, b"liveupdate-test-flb-v9")
    h.u64(h.at["flbs"] + 8, 1 << 40)


# -- the target


@case("root.memory")
def memory_of_256_mib(h):
    h.target = {"memory": 256 * MIB}


@case()
def data_flipped(h):
    """Nobody notices: neither the kernel nor the verdict."""
    h.poke(h.at["alpha/1 data 0"] + 100, b"\xff")
    found = expected(h)
    found.contents = found.contents[:100] + b"\xff" + found.contents[101:]


@case("image.page")
def a_page_that_the_image_has_not(h):
    del h.pages[h.at["sessions 0"]]
