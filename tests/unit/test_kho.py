"""Kho call by call: scratch, preserving, the root tree, blocks, and what the next kernel gets."""

import errno
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from facts import vectors

from luo import abi
from luo.errors import HandoverError, KhoError, KhoExistsError, KhoNotFoundError, StateError
from luo.fdt import Fdt, FdtEditor, FdtWriter
from luo.kho import (
    Handover,
    Incoming,
    Kho,
    RadixTree,
    ScratchParam,
    parse_kho_scratch,
    scratch_layout,
)
from luo.memory import PhysicalMemory

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PAGE = 4096


def errno_of(call, *args, **kwargs) -> int:
    """The errno that a call raises, 0 if it returns."""
    try:
        call(*args, **kwargs)
    except KhoError as error:
        return error.errno
    return 0


def pairs(columns) -> list[tuple[int, int]]:
    """(phys, order) of two columns."""
    return list(zip(*(column.tolist() for column in columns), strict=True))


def state_of(memory: PhysicalMemory) -> tuple[list, list]:
    """All page state: free and allocated blocks."""
    return pairs(memory.free_blocks()), pairs(memory.allocated_blocks())


def jump(kho: Kho, **kwargs) -> Kho:
    """The next kernel, in this process."""
    memory = kho.memory
    incoming = Kho.validate(memory, kho.handover())
    memory.cut_off()
    kho.close()
    return Kho.boot(memory, incoming, **kwargs)


@pytest.fixture
def memory() -> PhysicalMemory:
    return PhysicalMemory("64MiB")


@pytest.fixture
def kho(memory) -> Kho:
    return Kho(memory, scratch=[(0x70000, 0x10000), (32 * MIB, 4 * MIB)])


# ---- the four numbers ----

FOUR = Handover(0x10AAA000, 4096, 0x3FFF0000, 64)
SETUP_DATA = bytes.fromhex(
    "0000000000000000"  # 00 next
    "0a000000"  # 08 type 10
    "20000000"  # 0c length 32
    "00a0aa1000000000"  # 10 root tree
    "0010000000000000"  # 18 its bytes
    "0000ff3f00000000"  # 20 scratch array
    "4000000000000000"  # 28 its bytes
)


def test_handover_as_setup_data_is_the_x86_node():
    """Kho-abi 9.1, both ways."""
    assert FOUR.to_setup_data() == SETUP_DATA
    assert Handover.from_setup_data(SETUP_DATA) == FOUR
    assert SETUP_DATA[8:] == FOUR.to_setup_data(next_phys=0x1234)[8:]
    assert FOUR.numbers == (0x10AAA000, 4096, 0x3FFF0000, 64)


@pytest.mark.parametrize("change", [(8, 9), (12, 40)], ids=["type", "length"])
def test_handover_from_another_setup_data_is_refused(change):
    """Another type or length is not KHO's; nor is half a node."""
    node = bytearray(SETUP_DATA)
    struct.pack_into("=I", node, *change)
    for wrong in (node, SETUP_DATA[:47]):
        with pytest.raises(HandoverError, match="setup_data"):
            Handover.from_setup_data(wrong)


@pytest.mark.parametrize("cells", [(2, 2), (2, 1), (1, 1)])
def test_handover_as_chosen_is_one_address_and_size_each(cells):
    """Kho-abi 9.2: big-endian cells, both ways."""
    chosen = FOUR.to_chosen(*cells)

    assert Handover.from_chosen(chosen, *cells) == FOUR
    assert list(chosen) == ["linux,kho-fdt", "linux,kho-scratch"]
    assert FOUR.fdt_phys == int.from_bytes(chosen["linux,kho-fdt"][: 4 * cells[0]], "big")
    for wrong in ({}, chosen | {"linux,kho-fdt": bytes(20)}, {"linux,kho-fdt": bytes(16)}):
        with pytest.raises(HandoverError, match="chosen"):
            Handover.from_chosen(wrong, *cells)


def test_handover_as_chosen_that_does_not_fit_is_overflowerror():
    """One cell holds 32 bits."""
    with pytest.raises(OverflowError):
        Handover(1 << 32, 4096, 0, 0).to_chosen(1, 1)


# ---- scratch ----


@vectors("scratch_array")
def test_handover_copies_the_scratch_array_as_a_vector_has_it(vector):
    """16 bytes an area, in the order low, global, nodes, at a 64 KiB border inside scratch."""
    expected = bytes.fromhex(vector["hex"])
    areas = list(struct.iter_unpack("<QQ", expected))
    kho = Kho(PhysicalMemory("16GiB"), scratch=areas)
    four = kho.handover()

    assert expected == kho.memory.view(four.scratch_phys, four.scratch_len)
    assert areas == kho.scratch
    assert four.scratch_phys % 65536 == 0
    assert any(p <= four.scratch_phys < p + n for p, n in areas)


def test_scratch_by_default_is_the_kernels_sizing():
    """Twice what a kernel reserves: memmap 64 bytes a page, image 32 MiB, in blocks of 4 MiB."""
    memory = PhysicalMemory("64GiB", nodes=2)

    assert scratch_layout(memory) == [
        (4 * GIB - 64 * MIB, 64 * MIB),  # low: the image
        (64 * GIB - 2 * GIB, 2 * GIB),  # global: both memmaps
        (32 * GIB - GIB - 64 * MIB, GIB + 64 * MIB),  # node 0: its memmap and the image
        (64 * GIB - 3 * GIB, GIB),  # node 1
    ]
    kho = Kho(memory)
    assert scratch_layout(memory) == kho.scratch
    assert sorted(kho.scratch) == memory.scratch


def test_scratch_on_a_small_machine_fits():
    """64 MiB: 4 MiB low, nothing global, 4 MiB for the node."""
    assert Kho(PhysicalMemory("64MiB")).scratch == [
        (60 * MIB, 4 * MIB),
        (0, 0),
        (56 * MIB, 4 * MIB),
    ]


def test_scratch_skips_holes_and_nodes_without_memory():
    """Areas lie in one range each; node 1 has no memory."""
    memory = PhysicalMemory(ranges=[(0, 128 * MIB, 0), (8 * GIB, 256 * MIB, 2)])
    areas = scratch_layout(memory, parse_kho_scratch("16M,200M,32M"))

    assert areas == [
        (112 * MIB, 16 * MIB),
        (8 * GIB + 56 * MIB, 200 * MIB),
        (80 * MIB, 32 * MIB),
        (8 * GIB + 24 * MIB, 32 * MIB),
    ]


def test_scratch_without_room_is_enomem():
    """The kernel would disable KHO; here an error says what found no place."""
    memory = PhysicalMemory("64MiB")
    before = state_of(memory)
    with pytest.raises(KhoError, match=r"scratch: no place .* on node 0") as error:
        Kho(memory, scratch="0,40M,40M")

    assert error.value.errno == errno.ENOMEM
    assert before == state_of(memory)
    high = PhysicalMemory("64MiB", base="4GiB")
    assert errno_of(Kho, high, scratch="4M,0,0") == errno.ENOMEM
    assert Kho(high).scratch[:2] == [(0, 0), (4 * GIB + 60 * MIB, 4 * MIB)]


def test_scratch_over_an_allocation_is_ebusy():
    """Scratch must be free when KHO starts."""
    memory = PhysicalMemory("64MiB")
    memory.claim(60 * MIB, 0)

    assert errno_of(Kho, memory) == errno.EBUSY


@vectors("kho_scratch_param_7_3", "input")
def test_parse_kho_scratch_of_a_vector(vector):
    """The grammar of 7.3."""
    if vector["result"] == "scale":
        assert vector["percent"] == parse_kho_scratch(vector["input"]).scale
    elif vector["result"] == "fixed":
        found = parse_kho_scratch(vector["input"])

        assert [vector[k] for k in ("lowmem", "global_", "pernode")] == [
            *(found.lowmem, found.global_, found.pernode),
        ]
    else:
        assert errno_of(parse_kho_scratch, vector["input"]) == errno.EINVAL


@pytest.mark.parametrize(
    ("abi", "text", "expected"),
    [
        ("kho-v5-series", "0x64%", ScratchParam(scale=100)),
        ("kho-v5-series", "200%junk", ScratchParam(scale=200)),
        ("kho-v5-series", "%", None),
        ("kho-v5-series", "16M,1M,1M,junk", ScratchParam(None, 16 << 20, 1 << 20, 1 << 20)),
        ("kho-v1-512", "16M,1M,1Mx", ScratchParam(None, 16 << 20, 1 << 20, 1 << 20)),
        ("kho-v1-512", "200%", ScratchParam(scale=200)),
        ("kho-v1-512", "0,512M,0", None),
        ("kho-v1-512", "16M,1M", None),
        ("kho-v1-notifier", "16M,1M,1Mx", None),
        ("kho-v1-notifier", "0,512M,0", ScratchParam(None, 0, 512 << 20, 0)),
        ("kho-v4", "0x64%", None),
    ],
)
def test_parse_kho_scratch_of_a_generation(abi, text, expected):
    """6.16 wanted every size and stopped reading behind the third, the v5 series took any base."""
    if expected is None:
        assert errno_of(lambda: parse_kho_scratch(text, abi)) == errno.EINVAL
    else:
        assert expected == parse_kho_scratch(text, abi)


def test_parse_kho_scratch_takes_octal_hex_and_all_suffixes():
    """As memparse() does."""
    found = parse_kho_scratch("010k,0xAm,1e")

    assert (found.lowmem, found.global_, found.pernode) == (8 * KIB, 10 * MIB, 1 << 60)
    for wrong in ("08,1,1", "0x,1,1", "16E,1,1", "1,1", "+1,1,1", "00000000050%", "٣%", "1 %"):
        assert errno_of(parse_kho_scratch, wrong) == errno.EINVAL


# ---- cold boot ----


def test_cold_boot_writes_the_root_tree_and_the_metadata(kho):
    """The tree as the kernel packs it, its page and the metadata's preserved, count 1."""
    root = kho.root.root

    assert root["compatible"] == b"kho-v4\0"
    assert struct.pack("=Q", kho.root_phys) == root["preserved-memory-map"]
    assert [node.name for node in root.children] == ["kexec-metadata"]
    (node,) = root.children
    assert list(node.properties) == ["blob-size", "preserved-data"]
    (phys,), (size,) = (struct.unpack("=Q", node[n]) for n in ("preserved-data", "blob-size"))
    assert abi.KexecMetadata("luo", 1).pack() == kho.memory.view(phys, size)
    assert sorted([(kho.fdt_phys, 0), (phys, 0)]) == pairs(kho.preserved())
    assert (233, kho.root.totalsize) == (kho.root_bytes, 233)
    assert kho.incoming is None


@vectors("kexec_metadata")
def test_metadata_of_a_vector(vector):
    """73 packed bytes."""
    metadata = abi.KexecMetadata(vector["release"], vector["count"])

    assert bytes.fromhex(vector["hex"]) == metadata.pack()
    assert metadata == abi.KexecMetadata.unpack(metadata.pack() + b"more")


def test_metadata_of_another_version_or_length_is_ignored():
    """As Linux does; a release over 64 bytes cannot be written."""
    blob = abi.KexecMetadata("7.3", 5).pack()

    assert abi.KexecMetadata.unpack(blob[:72]) is None
    assert abi.KexecMetadata.unpack(b"\2" + blob[1:]) is None
    for release in ("x" * 65, "a\0b"):
        with pytest.raises(ValueError, match="release"):
            abi.KexecMetadata(release, 1).pack()


@vectors("fdt_blobs", "name")
def test_root_tree_of_a_vector_is_equal_byte_by_byte(vector):
    """First written, with one child, with two; addresses patched to the vector's."""
    if vector["generation"] != "kho-v4":
        pytest.skip("of another generation")
    expected = Fdt(bytes.fromhex(vector["hex"]))
    names = [node.name for node in expected.root.children]
    memory = PhysicalMemory("512MiB", base=0x10000000)
    kho = Kho(memory, scratch=[])
    for node in kho.root.root.children:
        kho.remove_subtree(*struct.unpack("=Q", node["preserved-data"]))
    view = memory.view(kho.fdt_phys, PAGE)
    if not names:  # as the sequential writer left it, before the first edit
        view = memoryview(bytearray(PAGE))
        writer = FdtWriter(into=view)
        with writer.node(""):
            writer.property_string("compatible", "kho-v4")
            writer.property_native_u64("preserved-memory-map", kho.root_phys)
        writer.finish()
    for name in reversed(names):
        node = expected.node("/" + name)
        address, size = (struct.unpack("=Q", node[n])[0] for n in ("preserved-data", "blob-size"))
        kho.add_subtree(name, address, size)
    Fdt(view).set_property_inplace(
        "/", "preserved-memory-map", bytes(expected.root["preserved-memory-map"])
    )

    assert bytes.fromhex(vector["hex"]) == view[: vector["length"]]


def test_cold_boot_without_memory_leaves_nothing():
    """ENOMEM at each of the first pages: all are free again."""
    for pages in range(9):
        memory = PhysicalMemory("1MiB")
        memory.alloc_folios(memory.nr_free_pages() - pages, 0)
        before = state_of(memory)
        code = errno_of(Kho, memory, scratch=[])

        assert (errno.ENOMEM if pages < 8 else 0) == code
        if code:
            assert before == state_of(memory)


def test_cold_boot_of_wrong_arguments():
    """Generations are known by name; scratch is text, areas or nothing."""
    memory = PhysicalMemory("64MiB")
    with pytest.raises(ValueError, match=r'abi "kho-v9": not one of .*, kho-v4'):
        Kho(memory, abi="kho-v9")
    with pytest.raises(ValueError, match="scratch"):
        Kho(memory, scratch=[(1, PAGE)])
    with pytest.raises(ValueError, match="release"):
        Kho(memory, scratch=[], release="x" * 65)
    assert errno_of(Kho, memory, scratch="lots") == errno.EINVAL
    readonly = PhysicalMemory.attach(memory.fd, memory.ranges)
    assert errno_of(Kho, readonly, scratch=[]) == errno.EROFS


# ---- preserving ----


@pytest.mark.parametrize(
    ("phys", "order", "rule"),
    [
        (0x78000, 3, r"preserve_folio 0x78000/order 3: overlaps scratch 0x70000\+0x10000"),
        (0x60000, 5, r"overlaps scratch 0x70000\+0x10000"),
        (32 * MIB, 13, r"overlaps scratch 0x2000000\+0x400000"),
        (0x1000, 1, "misaligned"),
        (0x800, 0, "misaligned"),
        (64 * MIB, 0, "not in RAM"),
        (0, 15, "not in RAM"),
        (0, 63, "not in RAM"),
        ((1 << 64) - PAGE, 0, "not in RAM"),
    ],
)
def test_preserve_folio_of_a_wrong_block_is_einval(kho, phys, order, rule):
    """The message names operation, block and rule, in bulk too; nothing is preserved."""
    before = pairs(kho.preserved())
    with pytest.raises(KhoError, match=rule) as error:
        kho.preserve_folio(phys, order)
    assert error.value.errno == errno.EINVAL
    array = np.array([PAGE, phys], np.uint64)
    with pytest.raises(KhoError, match=rule.replace("preserve_folio", "preserve_folios")):
        kho.preserve_folios(array, np.array([0, order], np.uint8))
    assert before == pairs(kho.preserved())
    assert not kho.is_preserved(phys, order)


def test_preserve_folio_twice_is_once(kho):
    """No count is kept: one unpreserve takes it out."""
    nr, pages = kho.nr_preserved, kho.preserved_pages
    for _ in range(2):
        kho.preserve_folio(MIB, 2)
    assert (nr + 1, pages + 4) == (kho.nr_preserved, kho.preserved_pages)
    assert kho.is_preserved(MIB, 2)
    assert not kho.is_preserved(MIB, 1)
    kho.unpreserve_folio(MIB, 2)
    assert (nr, pages) == (kho.nr_preserved, kho.preserved_pages)
    with pytest.raises(KhoNotFoundError, match="unpreserve_folio 0x100000/order 2"):
        kho.unpreserve_folio(MIB, 2)


def test_preserve_folio_of_page_0_and_of_everything():
    """Page 0 may be preserved, and a block as large as memory; both boot."""
    memory = PhysicalMemory("16MiB")
    kho = Kho(memory, scratch=[])
    kho.preserve_folio(0, 0)
    restored = jump(kho).incoming
    assert restored.restore_folio(0) == 0
    memory.free(0)
    assert errno_of(memory.claim, 0, 0) != errno.EBUSY


def test_preserve_folios_is_all_or_nothing(kho):
    """A wrong one among many, and no memory for the tree half-way."""
    memory = kho.memory
    before, free = pairs(kho.preserved()), memory.nr_free_pages()
    good = memory.alloc_folios(10, 0)
    kho.preserve_folio(int(good[3]), 0)
    kept = pairs(kho.preserved())
    assert kho.preserve_folios(good, 0) == 9
    assert kho.preserve_folios(good, 0) == 0
    kho.unpreserve_folios(good, np.zeros(10, np.uint8))
    assert before == pairs(kho.preserved())
    kho.preserve_folio(int(good[3]), 0)
    spare = memory.alloc_folios(memory.nr_free_pages() - 3, 0)
    nodes = kho.tree_pages
    mixed = np.concatenate([good, np.array([16 * MIB, 48 * MIB], np.uint64)])
    orders = np.array([0] * 10 + [12, 11], np.uint8)
    assert errno_of(kho.preserve_folios, mixed, orders) == errno.ENOMEM
    assert (kept, nodes, 3) == (pairs(kho.preserved()), kho.tree_pages, memory.nr_free_pages())
    memory.free_folios(spare)
    memory.free_folios(good)
    assert free == memory.nr_free_pages()
    for phys, order in [(good, [0] * 9), (good, np.zeros(11, np.uint8))]:
        with pytest.raises(ValueError, match="10 addresses"):
            kho.preserve_folios(phys, order)
    assert kho.preserve_folios(np.empty(0, np.uint64), 0) == 0


def test_unpreserve_folios_with_a_wrong_one_changes_nothing(kho):
    """All are looked up before any is taken out; naming one twice is no error."""
    array = np.arange(4 * MIB, 5 * MIB, PAGE, np.uint64)
    kho.preserve_folios(array, 0)
    nr = kho.nr_preserved
    wrong = array.copy()
    wrong[100] = 6 * MIB
    with pytest.raises(KhoNotFoundError, match="0x600000"):
        kho.unpreserve_folios(wrong, 0)
    assert nr == kho.nr_preserved
    kho.unpreserve_folios(np.concatenate([array, array[:5]]), 0)
    assert nr - 256 == kho.nr_preserved
    kho.unpreserve_folios(array[:0], 0)


@vectors("range_split", "pfn")
def test_preserve_pages_of_a_vector_is_split_as_mainline_does(vector):
    """Alignment and length decide, without a largest order."""
    pfn, nr_pages = int(vector["pfn"], 16), vector["nr_pages"]
    kho = Kho(PhysicalMemory("8GiB"), scratch=[])
    before = set(pairs(kho.preserved()))
    kho.preserve_pages(pfn * PAGE, nr_pages)

    blocks = sorted(set(pairs(kho.preserved())) - before)
    assert [(int(b, 16) * PAGE, order) for b, order in vector["mainline_blocks"]] == blocks
    kho.unpreserve_pages(pfn * PAGE, nr_pages)
    assert before == set(pairs(kho.preserved()))


@vectors("range_split_numa")
def test_preserve_pages_of_a_vector_is_cut_between_nodes(vector):
    """Unpreserve cuts alike, and restoring steps by what is stored, unlike 7.3 itself."""
    pfn, nr_pages = int(vector["pfn"], 16), vector["nr_pages"]
    border = int(vector["first_pfn_of_node1"], 16) * PAGE
    memory = PhysicalMemory(ranges=[(0, border, 0), (border, 2 * GIB - border, 1)])
    kho = Kho(memory, scratch=[])
    expected = [(int(b, 16) * PAGE, order) for b, order in vector["blocks_with_numa_rule"]]
    before = set(pairs(kho.preserved()))
    kho.preserve_pages(pfn * PAGE, nr_pages)

    assert expected == sorted(set(pairs(kho.preserved())) - before)
    kho.unpreserve_pages(pfn * PAGE, nr_pages)
    assert before == set(pairs(kho.preserved()))
    kho.preserve_pages(pfn * PAGE, nr_pages)
    incoming = jump(kho).incoming
    assert len(expected) == incoming.restore_pages(pfn * PAGE, nr_pages)
    assert memory.is_allocated(pfn * PAGE, nr_pages * PAGE)


def test_preserve_pages_of_a_wrong_run_is_einval(kho):
    """Half in scratch, misaligned, outside RAM, longer than memory; an empty run is fine."""
    before = pairs(kho.preserved())
    for phys, nr_pages in [(0x6F000, 2), (0x800, 1), (64 * MIB - PAGE, 2), (0, 1 << 60)]:
        assert errno_of(kho.preserve_pages, phys, nr_pages) == errno.EINVAL
        assert errno_of(kho.unpreserve_pages, phys, nr_pages) != 0
    kho.preserve_pages(PAGE, 0)
    kho.unpreserve_pages(PAGE, 0)
    assert before == pairs(kho.preserved())


def test_preserve_pages_across_ranges_of_one_node_is_one_block():
    """Only the nodes of a block's two ends count: it crosses, boots, is restored and freed."""
    low, high = [(0, 16 * MIB, 0), (16 * MIB, 8 * MIB, 0)], [(24 * MIB, 8 * MIB, 0)]
    memory = PhysicalMemory(ranges=[*low, *high, (32 * MIB, MIB, 1)])
    kho = Kho(memory, scratch=[])
    kho.preserve_pages(16 * MIB, 4096)

    assert kho.is_preserved(16 * MIB, 12)
    incoming = jump(kho).incoming
    free = memory.nr_free_pages()
    assert incoming.restore_pages(16 * MIB, 4096) == 1
    memory.free(16 * MIB)
    assert free + 4096 == memory.nr_free_pages()
    assert max(order for _, order in state_of(memory)[0]) == 11


def test_debug_refuses_what_is_not_allocated(memory):
    """The caller's job is checked: folios, runs, bulk."""
    kho = Kho(memory, scratch=[], debug=True)
    phys = memory.alloc_folio(3)
    kho.preserve_folio(phys, 3)
    kho.preserve_folio(phys + PAGE, 0)
    kho.preserve_pages(phys, 8)
    for call, *args in [
        (kho.preserve_folio, phys, 4),
        (kho.preserve_folio, 32 * MIB, 0),
        (kho.preserve_pages, phys + PAGE, 8),
        (kho.preserve_folios, np.array([phys, 32 * MIB], np.uint64), 0),
    ]:
        with pytest.raises(KhoError, match=r"not allocated|misaligned") as error:
            call(*args)
        assert error.value.errno == errno.EINVAL


def test_preserved_is_in_walk_order_and_in_chunks(kho):
    """Larger orders first, then by address; chunks of any size give the same."""
    for phys, order in [(8 * MIB, 0), (4 * MIB, 3), (MIB, 0), (16 * MIB, 12), (9 * MIB, 3)]:
        kho.preserve_folio(phys, order)
    blocks = pairs(kho.preserved())

    assert sorted(blocks, key=lambda b: (-b[1], b[0])) == blocks
    for n in (1, 2, 3, 7, 100):
        chunks = [pairs(chunk) for chunk in kho.preserved_chunks(n)]
        assert blocks == [block for chunk in chunks for block in chunk]
        assert all(len(chunk) == n for chunk in chunks[:-1])
    out = np.zeros(20, np.uint64), np.zeros(20, np.uint8)
    phys, _ = kho.preserved(out)
    assert phys.base is out[0]
    assert blocks == pairs(kho.preserved(out))
    with pytest.raises(ValueError, match="room"):
        kho.preserved((np.zeros(2, np.uint64), np.zeros(2, np.uint8)))
    with pytest.raises(ValueError, match="0"):
        list(kho.preserved_chunks(0))


def test_preserving_cycles_cost_no_page(kho):
    """Once the path is there, preserving and unpreserving take nothing."""
    free = None
    for _ in range(50):
        folios = kho.memory.alloc_folios(300, 1)
        kho.preserve_folios(folios, 1)
        kho.unpreserve_folios(folios, 1)
        kho.memory.free_folios(folios)
        free = free or kho.memory.nr_free_pages()
        assert free == kho.memory.nr_free_pages()


# ---- allocating and preserving in one ----


@pytest.mark.parametrize(("nbytes", "order"), [(1, 0), (PAGE, 0), (PAGE + 1, 1), (4 * MIB, 10)])
def test_alloc_preserve_is_zeroed_and_preserved(kho, nbytes, order):
    """A power of two of pages, whatever was there before."""
    for phys in kho.memory.alloc_folios(4, 10).tolist():
        kho.memory.view(phys, 4 * MIB)[:] = b"\xff" * (4 * MIB)
        kho.memory.free(phys)
    free, nr = kho.memory.nr_free_pages(), kho.nr_preserved
    phys = kho.alloc_preserve(nbytes)

    assert kho.is_preserved(phys, order)
    assert order == kho.memory.order_of(phys)
    assert not any(kho.memory.view(phys, PAGE << order))
    nodes = kho.tree_pages
    kho.unpreserve_free(phys)
    assert nr == kho.nr_preserved
    assert free - kho.memory.nr_free_pages() == kho.tree_pages - nodes or free
    assert errno_of(kho.unpreserve_free, phys) == errno.EINVAL


def test_alloc_preserve_of_a_wrong_size(kho):
    """Nothing is EINVAL, more than one block of the largest order E2BIG."""
    assert errno_of(kho.alloc_preserve, 0) == errno.EINVAL
    assert errno_of(kho.alloc_preserve, 4 * MIB + 1) == errno.E2BIG
    phys = kho.memory.alloc_folio(2)
    assert errno_of(kho.unpreserve_free, phys) == errno.ENOENT
    assert kho.memory.order_of(phys) == 2


def test_alloc_preserve_without_memory_leaves_nothing(kho):
    """Neither for the block nor for the tree."""
    memory = kho.memory
    memory.alloc_folios(memory.nr_free_pages() - 2, 0)
    before, nr = state_of(memory), kho.nr_preserved
    assert errno_of(kho.alloc_preserve, 2 * PAGE) == errno.ENOMEM
    assert errno_of(kho.alloc_preserve, MIB) == errno.ENOMEM
    assert (before, nr) == (state_of(memory), kho.nr_preserved)


# ---- subtrees ----


def test_add_subtree_puts_the_newest_first(kho):
    """Children are found by name; the same name again is EEXIST and changes nothing."""
    kho.add_subtree("one", MIB, 100)
    kho.add_subtree("two", 2 * MIB, 0)
    image = bytes(kho.memory.view(kho.fdt_phys, kho.root_bytes))

    assert [n.name for n in kho.root.root.children] == ["two", "one", "kexec-metadata"]
    with pytest.raises(KhoExistsError, match="add_subtree one: the name is taken"):
        kho.add_subtree("one", 3 * MIB, 1)
    assert image == kho.memory.view(kho.fdt_phys, kho.root_bytes)


def test_add_subtree_of_wrong_arguments(kho):
    """Names are node names; blobs are in RAM."""
    for name in ("", "a/b", "a\0b"):
        with pytest.raises(ValueError, match="not a node name"):
            kho.add_subtree(name, MIB, 1)
    for phys, nbytes in [(64 * MIB, 1), (64 * MIB - 1, 2), (MIB, -1)]:
        assert errno_of(kho.add_subtree, "name", phys, nbytes) == errno.EINVAL


@pytest.mark.parametrize(
    ("length", "capacity"), [(1, 75), (7, 70), (13, 61), (19, 57), (25, 51), (31, 49)]
)
def test_add_subtree_to_a_full_page_is_enomem(length, capacity):
    """As many children as libfdt puts into 4096 bytes (kho-abi 5.1), and the tree stays good."""
    kho = Kho(PhysicalMemory("64MiB"), scratch=[])
    for node in kho.root.root.children:
        kho.remove_subtree(*struct.unpack("=Q", node["preserved-data"]))
    names = ["".join(c) for c in (f"{i:x}".rjust(length, "_") for i in range(capacity + 1))]
    if length == 1:
        names = [chr(33 + i) for i in range(94) if chr(33 + i) != "/"][: capacity + 1]
    for i, name in enumerate(names[:-1]):
        kho.add_subtree(name, (i + 1) * PAGE, i)
    image = bytes(kho.memory.view(kho.fdt_phys, kho.root_bytes))

    assert errno_of(kho.add_subtree, names[-1], MIB, 1) == errno.ENOMEM
    assert image == kho.memory.view(kho.fdt_phys, kho.root_bytes)
    assert names[-2::-1] == [node.name for node in kho.root.root.children]


def test_remove_subtree_takes_the_first_that_names_the_blob(kho):
    """By address; of two, the one added last."""
    for name in ("a", "b", "c"):
        kho.add_subtree(name, MIB if name != "c" else 2 * MIB, 1)
    kho.remove_subtree(MIB)
    assert [n.name for n in kho.root.root.children] == ["c", "a", "kexec-metadata"]
    kho.remove_subtree(MIB)
    with pytest.raises(KhoNotFoundError, match="remove_subtree 0x100000"):
        kho.remove_subtree(MIB)


def test_save_subtree_copies_preserves_and_names(kho):
    """Any buffer; a failure leaves nothing."""
    phys = kho.save_subtree("blob", np.arange(1000, dtype=np.uint32))
    free, nr = kho.memory.nr_free_pages(), kho.nr_preserved

    assert np.arange(1000, dtype=np.uint32).tobytes() == kho.memory.view(phys, 4000)
    assert kho.is_preserved(phys, 0)
    assert errno_of(kho.save_subtree, "blob", b"x") == errno.EEXIST
    assert errno_of(kho.save_subtree, "empty", b"") == errno.EINVAL
    assert errno_of(kho.save_subtree, "big", bytes(4 * MIB + 1)) == errno.E2BIG
    with pytest.raises(ValueError, match="node name"):
        kho.save_subtree("a/b", b"x")
    assert (free, nr) == (kho.memory.nr_free_pages(), kho.nr_preserved)


# ---- linked blocks ----


@vectors("kho_block_capacity", "entry_size")
def test_block_capacity_of_a_vector(vector):
    """16 bytes of head, the rest entries."""
    assert vector["capacity"] == abi.block_capacity(vector["entry_size"])


@pytest.mark.parametrize("entry_size", [0, -1, 4081])
def test_block_capacity_of_an_entry_that_does_not_fit_is_valueerror(entry_size):
    """At least one entry fits a page."""
    with pytest.raises(ValueError, match="entry_size"):
        abi.block_capacity(entry_size)


@pytest.mark.parametrize("n", [0, 1, 126, 127, 128, 1000])
def test_write_blocks_is_what_the_next_kernel_reads(kho, n):
    """All blocks but the last are full; none for no entries; all pages go back."""
    entries = np.random.default_rng(n).integers(0, 256, (n, 32), np.uint8)
    free = kho.memory.nr_free_pages()
    head = kho.write_blocks(entries, 32)
    again = kho.write_blocks(entries.tobytes(), 32)
    kho.free_blocks(again)

    assert (head == 0) == (n == 0)
    assert free - -(-n // 127) == kho.memory.nr_free_pages()
    new = jump(kho)
    found = new.incoming.read_blocks(head, 32)
    assert (n, 32) == found.shape
    assert entries.tobytes() == found.tobytes()
    free, unrestored = new.memory.nr_free_pages(), new.incoming.nr_unrestored
    new.incoming.restore_free_blocks(head)
    assert free + -(-n // 127) == new.memory.nr_free_pages()
    assert unrestored - -(-n // 127) == new.incoming.nr_unrestored
    if n:
        with pytest.raises(HandoverError, match="not a preserved page"):
            new.incoming.read_blocks(head, 32)


def test_write_blocks_of_broken_entries_is_valueerror(kho):
    """Whole entries only."""
    with pytest.raises(ValueError, match="not entries of 16"):
        kho.write_blocks(bytes(20), 16)


def test_write_blocks_without_memory_leaves_nothing(kho):
    """Neither with memory run out nor above 10,000 blocks."""
    memory = kho.memory
    before = state_of(memory)
    assert errno_of(kho.write_blocks, bytes(4080 * 10001), 4080) == errno.ENOSPC
    memory.alloc_folios(memory.nr_free_pages() - 4, 0)
    left, nr = state_of(memory), kho.nr_preserved
    assert errno_of(kho.write_blocks, bytes(4080 * 5), 4080) == errno.ENOMEM
    assert (left, nr) == (state_of(memory), kho.nr_preserved)
    assert before != left


@pytest.mark.parametrize(
    ("offset", "value", "rule"),
    [
        (8, 0, "0 entries, not 1..255"),
        (8, 256, "256 entries"),
        (0, "head", "circle"),
        (0, 5, "misaligned"),
        (0, 1 << 40, "not in RAM"),
        (0, 48 * MIB, "not a preserved page"),
    ],
)
def test_read_blocks_of_a_broken_chain_is_refused(kho, offset, value, rule):
    """An empty block, a full one over-full, a circle, a link to nowhere."""
    head = kho.write_blocks(bytes(16 * 300), 16)
    view = kho.memory.view(head, PAGE)
    struct.pack_into("=Q", view, offset, head if value == "head" else value)
    incoming = Kho.validate(kho.memory, kho.handover())
    with pytest.raises(HandoverError, match=rule):
        incoming.read_blocks(head, 16)


# ---- the next kernel ----


def test_boot_reserves_what_was_preserved_and_frees_the_rest(kho):
    """Whatever was not preserved is free; preserved blocks are nobody's until restored."""
    memory = kho.memory
    kept, _lost = memory.alloc_folios(20, 2), memory.alloc_folios(50, 1)
    kho.preserve_folios(kept, 2)
    run = memory.alloc_pages(13)
    kho.preserve_pages(run, 13)
    blob = kho.save_subtree("blob", b"content")
    memory.view(int(kept[7]), 4)[:] = b"kept"
    preserved = pairs(kho.preserved())
    new = jump(kho, release="7.3.4")
    incoming = new.incoming

    assert (len(preserved), preserved) == (incoming.nr_preserved, pairs(incoming.unrestored()))
    assert sum(1 << order for _, order in preserved) == incoming.preserved_pages
    assert (incoming.metadata.previous_release, incoming.metadata.kexec_count) == ("luo", 1)
    # the new map, its root tree and metadata; the array of scratch that it was given
    assert new.tree_pages + 2 + 1 == memory.nr_allocated
    pages = memory.nr_free_pages() + memory.nr_free_scratch_pages + memory.nr_allocated
    assert memory.nr_pages - 1 == pages + incoming.preserved_pages
    for phys, _ in preserved:
        assert errno_of(memory.claim, phys, 0) == errno.EBUSY
    assert {"blob": (blob, 7)}.items() <= incoming.subtrees().items()
    assert incoming.load_subtree("blob") == b"content"
    assert memory.view(int(kept[7]), 4) == b"kept"
    assert incoming.restore_folios(kept).tolist() == [2] * 20
    assert incoming.restore_pages(run, 13) == 3
    incoming.restore_free(blob)
    assert incoming.nr_unrestored == 2  # the root tree's page and the metadata's
    assert len(preserved) - 2 == incoming.nr_restored
    memory.free_folios(kept)
    memory.free_pages(run, 13)
    assert kho.scratch == new.scratch
    assert sorted(a for a in new.scratch if a[1]) == memory.scratch


def test_boot_leaves_nothing_of_the_old_kernel_over_a_chain():
    """A hundred kernels, each restoring and handing over again: free pages are constant."""
    memory = PhysicalMemory("64MiB")
    kho = Kho(memory)
    phys = memory.alloc_folio(4)
    kho.preserve_folio(phys, 4)
    memory.view(phys, 4)[:] = b"kept"
    free = set()
    for count in range(1, 101):
        kho = jump(kho)
        assert count == kho.incoming.metadata.kexec_count
        assert kho.incoming.restore_folio(phys) == 4
        kho.preserve_folio(phys, 4)
        free.add(memory.nr_free_pages())
        assert memory.view(phys, 4) == b"kept"

    assert len(free) == 1


def test_validate_changes_nothing(kho):
    """The running kernel keeps its page state, and memory its bytes."""
    memory = kho.memory
    phys = memory.alloc_folio(2)
    kho.preserve_folio(phys, 2)
    four = kho.handover()
    before = state_of(memory), os.pread(memory.fd, 8 * MIB, 0)
    blocks = os.fstat(memory.fd).st_blocks
    readonly = PhysicalMemory.attach(memory.fd, memory.ranges)
    for where in (memory, readonly):
        incoming = Kho.validate(where, four)
        assert incoming.nr_preserved == kho.nr_preserved
        assert errno_of(incoming.restore_folio, phys) == errno.EINVAL
        assert incoming.order_of(phys) == 2
    assert before == (state_of(memory), os.pread(memory.fd, 8 * MIB, 0))
    assert blocks == os.fstat(memory.fd).st_blocks
    assert errno_of(Kho.boot, readonly, four) == errno.EROFS
    readonly.writable()
    assert Kho.boot(readonly, incoming).incoming is incoming
    assert errno_of(Kho.boot, readonly, incoming) == errno.EINVAL
    with pytest.raises(ValueError, match="another memory"):
        Kho.boot(memory, incoming)


def test_boot_in_another_process_gives_equal_page_state(kho):
    """A successor on a fresh mapping knows no less and no more than one in this process."""
    memory = kho.memory
    rng = np.random.default_rng(3)
    for order in (0, 0, 1, 3, 9):
        folios = memory.alloc_folios(int(rng.integers(1, 40)) if order < 9 else 2, order)
        kho.preserve_folios(rng.permutation(folios)[::2].copy(), order)
    kho.save_subtree("blob", b"content")
    four = kho.handover()
    copy = memory.clone()
    code = (
        "import json; from luo.kho import Handover, Kho; from luo.memory import PhysicalMemory;"
        f"m = PhysicalMemory.attach({copy.fd}, {copy.ranges});"
        f"i = Kho.validate(m, {four!r}); m.writable(); k = Kho.boot(m, i);"
        "u = k.incoming.unrestored();"
        "print(json.dumps([[c.tolist() for c in x] for x in"
        " (m.free_blocks(), m.allocated_blocks(), u, k.preserved())]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], check=True, pass_fds=[copy.fd], capture_output=True
    ).stdout
    new = jump(kho)
    mine = [
        [column.tolist() for column in columns]
        for columns in (
            *(memory.free_blocks(), memory.allocated_blocks()),
            *(new.incoming.unrestored(), new.preserved()),
        )
    ]

    assert mine == json.loads(other)
    assert os.pread(memory.fd, 64 * MIB, 0) == os.pread(copy.fd, 64 * MIB, 0)


def test_restore_of_what_is_not_preserved_is_einval(kho):
    """Twice, the middle of a block, free memory; bulk and runs change nothing then."""
    memory = kho.memory
    folios = memory.alloc_folios(8, 2)
    kho.preserve_folios(folios, 2)
    new = jump(kho)
    incoming = new.incoming
    before = pairs(incoming.unrestored())
    for wrong in (int(folios[0]) + PAGE, 48 * MIB, 1, 1 << 50):
        for call in (incoming.restore_folio, incoming.restore_free):
            assert errno_of(call, wrong) == errno.EINVAL
        array = np.array([*folios[:3].tolist(), wrong], np.uint64)
        with pytest.raises(KhoError, match=f"restore_folios {wrong:#x}"):
            incoming.restore_folios(array)
    twice = np.array([*folios[:3].tolist(), int(folios[1])], np.uint64)
    assert errno_of(incoming.restore_folios, twice) == errno.EINVAL
    for phys, nr_pages in [(int(folios[0]), 33), (int(folios[0]), 3), (int(folios[0]) + PAGE, 3)]:
        assert errno_of(incoming.restore_pages, phys, nr_pages) == errno.EINVAL
    assert before == pairs(incoming.unrestored())
    assert len(incoming.restore_folios(folios[:0])) == 0
    assert incoming.restore_folio(int(folios[0])) == 2
    assert errno_of(incoming.restore_folio, int(folios[0])) == errno.EINVAL
    assert errno_of(incoming.retrieve_subtree, "none") == errno.ENOENT


def test_close_ends_both_sides(kho):
    """After the commit point every call is ESHUTDOWN."""
    new = jump(kho)
    incoming = new.incoming
    four = new.handover()
    new.close()
    calls = [
        *((k.preserve_folio, MIB, 0) for k in (kho, new)),
        *((kho.preserve_folios, np.zeros(1, np.uint64), 0), (kho.alloc_preserve, 1)),
        *((kho.preserve_pages, MIB, 1), (kho.handover,), (kho.add_subtree, "x", MIB, 1)),
        *((kho.save_subtree, "x", b"x"), (kho.remove_subtree, 0), (kho.write_blocks, b"", 16)),
        *((kho.preserved,), (kho.is_preserved, MIB, 0), (kho.free_blocks, 0)),
        *((incoming.restore_folio, MIB), (incoming.subtrees,), (incoming.retrieve_subtree, "x")),
        *((incoming.restore_pages, MIB, 1), (incoming.restore_free, MIB), (incoming.unrestored,)),
        *((incoming.read_blocks, 0, 16), (getattr, incoming, "root"), (getattr, kho, "root")),
    ]
    for call, *args in calls:
        with pytest.raises(StateError) as error:
            call(*args)
        assert error.value.errno == errno.ESHUTDOWN
    assert (kho.closed, incoming.closed) == (True, True)
    assert Kho.boot(kho.memory, four).incoming.nr_preserved == 2


# ---- handovers that are wrong ----


def wrong_handover(kho: Kho, offset: int, value: int, page: str) -> Handover:
    four = kho.handover()
    pages = {"fdt": kho.fdt_phys, "root": kho.root_phys, "scratch": four.scratch_phys}
    struct.pack_into("=Q", kho.memory.view(pages[page], PAGE), offset, value)
    return four


@pytest.mark.parametrize(
    ("page", "offset", "value", "rule"),
    [
        ("root", 8, 5, "node of the preserved map is misaligned"),
        ("root", 8, 1 << 40, "node .* not in RAM"),
        ("root", 8, 0x70000, "node .* lies in scratch"),
        ("root", 8, 48 * MIB, "node .* was never written"),
        ("root", 8, "root_phys", "node .* overlaps tree node"),
        ("root", 8, "fdt_phys", "node .* is the root tree"),
        ("root", 8 * 511, "root_phys", "stands for no block"),
        ("scratch", 0, 12345, "scratch .* not whole pages"),
        ("scratch", 0, 1 << 40, "scratch .* not in RAM"),
        ("scratch", 16, 0x70000, "scratch .* overlaps"),
        ("scratch", 8, 0x700000000000, "scratch .* not in RAM"),
        ("fdt", 0, 0, "root tree: FDT_ERR_BADMAGIC"),
    ],
)
def test_validate_of_a_broken_page_names_the_rule(kho, page, offset, value, rule):
    """Node, scratch and root tree, word by word."""
    value = getattr(kho, value) if isinstance(value, str) else value
    four = wrong_handover(kho, offset, value, page)
    for call in (Kho.validate, Kho.boot):
        with pytest.raises(HandoverError, match=rule):
            call(kho.memory, four)


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ((1 << 52) + 0x70, "0x70000: preserved block of order 0 overlaps scratch"),
        ((1 << 52) + 0x10000, "0x10000000: preserved block of order 0 is not in RAM"),
        ((1 << 38) + 0, "0x0: preserved block of order 14 overlaps"),
        ((1 << 37) + 0, "0x0: preserved block of order 15 is not in RAM"),
        (2, "preserved block of order 51 is not in RAM"),
        (1, "key 0x1 stands for no block"),
        (0, "key 0x0 stands for no block"),
    ],
)
def test_validate_of_a_bad_block_names_it(kho, key, rule):
    """Blocks outside RAM, in scratch, over others, and keys of nothing."""
    tree = RadixTree(kho.memory)
    tree.add_key((1 << 52) + kho.fdt_phys // PAGE)
    tree.add_key(key)
    Fdt(kho.memory.view(kho.fdt_phys, PAGE)).set_property_inplace(
        "/", "preserved-memory-map", struct.pack("=Q", tree.root)
    )
    with pytest.raises(HandoverError, match=rule):
        Kho.validate(kho.memory, kho.handover())


def test_validate_of_overlapping_blocks_names_both(kho):
    """A page in two orders, or a tree's page preserved."""
    kho.preserve_folio(4 * MIB, 3)
    kho.preserve_folio(4 * MIB + 2 * PAGE, 0)
    with pytest.raises(
        HandoverError,
        match="0x402000: preserved block of order 0 overlaps preserved 0x400000/order 3",
    ):
        Kho.validate(kho.memory, kho.handover())
    kho.unpreserve_folio(4 * MIB, 3)
    kho.preserve_folio(kho.root_phys, 0)
    with pytest.raises(HandoverError, match="overlaps tree node or reserved page"):
        Kho.validate(kho.memory, kho.handover())


def test_validate_of_wrong_numbers_is_refused(kho):
    """Each of the four."""
    good = kho.handover()
    for change in (
        *({"fdt_phys": 0}, {"fdt_phys": good.fdt_phys + 8}, {"fdt_phys": 1 << 40}),
        *({"fdt_phys": 48 * MIB}, {"fdt_phys": kho.root_phys}, {"fdt_len": 0}),
        *({"fdt_len": 100}, {"fdt_len": 1 << 50}, {"fdt_phys": -PAGE}, {"scratch_phys": 0}),
        *({"scratch_len": 0}, {"scratch_len": 8}, {"scratch_len": 1 << 40}),
        *({"scratch_phys": 1 << 50}, {"scratch_phys": good.scratch_phys + 4}),
        {"scratch_phys": 48 * MIB},
    ):
        four = Handover(**(dict(zip(good.__slots__, good.numbers, strict=True)) | change))
        with pytest.raises(HandoverError):
            Kho.validate(kho.memory, four)
    with pytest.raises(ValueError, match="abi"):
        Kho.validate(kho.memory, good, abi="kho-v9")


@pytest.mark.parametrize(
    ("path", "name", "value", "rule"),
    [
        ("/", "compatible", b"kho-v3\0", "compatible with 'kho-v3 ?'"),
        ("/", "compatible", b"xxkho-v4", "compatible"),
        ("/", "preserved-memory-map", None, "preserved-memory-map"),
        ("/", "preserved-memory-map", bytes(8), "preserved-memory-map"),
        ("/", "preserved-memory-map", bytes(4), "preserved-memory-map"),
        ("/blob", "preserved-data", None, "subtree blob: its address"),
        ("/blob", "preserved-data", bytes(12), "subtree blob: its address"),
        ("/blob", "blob-size", None, "subtree blob: its size"),
        ("/blob", "blob-size", struct.pack("=Q", PAGE + 1), "subtree blob: .* not preserved"),
        ("/blob", "preserved-data", struct.pack("=Q", 48 * MIB), "subtree blob: .* not preserved"),
        ("/blob", "preserved-data", struct.pack("=Q", 1 << 63), "subtree blob: .* not preserved"),
    ],
)
def test_validate_of_a_wrong_root_tree_names_the_rule(kho, path, name, value, rule):
    """Strings, map, and each subtree's two properties."""
    kho.save_subtree("blob", b"content")
    editor = FdtEditor(kho.memory.view(kho.fdt_phys, PAGE))
    if value is None:
        editor.del_property(path, name)
    else:
        editor.set_property(path, name, value)
    with pytest.raises(HandoverError, match=rule):
        Kho.validate(kho.memory, kho.handover())


def test_validate_accepts_what_linux_accepts(kho):
    """A root that is compatible with more, no metadata, metadata of another version."""
    editor = FdtEditor(kho.memory.view(kho.fdt_phys, PAGE))
    editor.set_property("/", "compatible", b"kho-v5\0kho-v4\0")
    (phys,) = struct.unpack("=Q", kho.root.node("/kexec-metadata")["preserved-data"])
    kho.memory.view(phys, 1)[0] = 2
    incoming = Kho.validate(kho.memory, kho.handover())

    assert isinstance(incoming, Incoming)
    assert incoming.metadata is None
    kho.remove_subtree(phys)
    assert Kho.validate(kho.memory, kho.handover()).metadata is None
    assert jump(kho).incoming.metadata is None


def test_handover_without_scratch_names_none():
    """``scratch=[]``: the next kernel may still boot here, which Linux would not."""
    kho = Kho(PhysicalMemory("16MiB"), scratch=[])
    four = kho.handover()

    assert (four.scratch_phys, four.scratch_len) == (0, 0)
    assert jump(kho).scratch == []


def test_handover_without_room_for_the_array_is_eaddrnotavail():
    """Scratch that is all taken, or of no size."""
    memory = PhysicalMemory("16MiB")
    kho = Kho(memory, scratch=[(8 * MIB, 2 * PAGE)])
    assert kho.handover() == kho.handover()
    memory.forget()
    kho = Kho(memory, scratch=[(8 * MIB, PAGE), (0, 0)])
    memory.claim(8 * MIB, 0)
    assert errno_of(kho.handover) == errno.EADDRNOTAVAIL


@pytest.mark.parametrize("page_size", [16 * KIB, 64 * KIB])
def test_a_jump_with_larger_pages(page_size):
    """Everything is counted in that page size."""
    memory = PhysicalMemory("4GiB", page_size=page_size)
    kho = Kho(memory)
    folios = memory.alloc_folios(5, 3)
    kho.preserve_folios(folios, 3)
    kho.save_subtree("blob", b"x" * 70000)
    head = kho.write_blocks(bytes(48 * 5000), 48)
    new = jump(kho)

    assert page_size == new.incoming.handover.fdt_len
    assert new.incoming.restore_folios(folios).tolist() == [3] * 5
    assert new.incoming.load_subtree("blob") == b"x" * 70000
    assert new.incoming.read_blocks(head, 48).shape == (5000, 48)


def test_a_jump_over_16_tib_touches_little():
    """Blocks of 1 GiB and 2 MiB on eight nodes, with scratch by the kernel's rules."""
    memory = PhysicalMemory("16TiB", nodes=8)
    kho = Kho(memory)
    for node in range(8):
        folios = memory.alloc_folios(300, 18, node)
        kho.preserve_folios(folios, 18)
        kho.preserve_folios(memory.alloc_folios(1000, 9, node), 9)
    four = kho.handover()
    new = jump(kho)

    assert new.incoming.nr_preserved == 8 * 1300 + 2
    assert new.incoming.restore_folios(folios).tolist() == [18] * 300
    assert four == new.incoming.handover
    assert os.fstat(memory.fd).st_blocks * 512 < MIB
