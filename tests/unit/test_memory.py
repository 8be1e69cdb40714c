"""Physical memory: ranges, bytes, the page allocator, and what one kernel leaves the next."""

import errno
import fcntl
import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from luo.errors import KhoError, KhoNoMemoryError, StateError
from luo.memory import PhysicalMemory, parse_size

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
PAGE = 4096


def errno_of(call, *args, **kwargs) -> int:
    """The errno that a call raises, 0 if it returns."""
    try:
        call(*args, **kwargs)
    except KhoError as error:
        return error.errno
    return 0


def state_of(memory: PhysicalMemory) -> tuple[list, list]:
    """All page state: free and allocated blocks."""
    free, allocated = memory.free_blocks(), memory.allocated_blocks()
    return (
        list(zip(*(column.tolist() for column in free), strict=True)),
        list(zip(*(column.tolist() for column in allocated), strict=True)),
    )


# ---- sizes ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((0, 0), (4096, 4096), (np.int64(7), 7), ("0", 0), ("4096", 4096), ("17B", 17)),
        *(("4KiB", 4 * KIB), ("64GiB", 64 * GIB), (" 512 MiB ", 512 * MIB), ("2M", 2 * MIB)),
        *(("16T", 16 * TIB), ("1P", 1 << 50), ("1E", 1 << 60)),
    ],
)
def test_parse_size_of_a_size_gives_bytes(text, expected):
    """Integers are bytes; units are powers of 1024."""
    assert expected == parse_size(text)


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1.5G", "1GB", "1 Gi B", "0x10", "GiB", "1KK", "\u0661"]
)
def test_parse_size_of_anything_else_is_valueerror(text):
    """Nothing is guessed: decimal units, fractions and signs are refused."""
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_parse_size_of_a_wrong_type_is_typeerror():
    """A float is not a size, nor is None; a negative integer is out of range."""
    for wrong in (1.0, None, b"1G"):
        with pytest.raises(TypeError):
            parse_size(wrong)
    with pytest.raises(ValueError, match="negative"):
        parse_size(-1)


# ---- making memory ----


def test_memory_of_a_size_is_one_sealed_sparse_file():
    """The file has the size of the span, no blocks, and cannot be resized."""
    memory = PhysicalMemory("64MiB")

    assert os.fstat(memory.fd).st_size == 64 * MIB
    assert os.fstat(memory.fd).st_blocks == 0
    assert memory.ranges == [(0, 64 * MIB, 0)]
    assert (*(memory.base, memory.size, memory.nr_pages, memory.nr_nodes, memory.max_order),) == (
        0,
        64 * MIB,
        64 * MIB // PAGE,
        1,
        10,
    )
    seals = fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, PAGE)


def test_memory_of_nodes_divides_by_blocks_of_the_largest_order():
    """Each node gets the same whole number of 4 MiB blocks; the last takes the rest."""
    memory = PhysicalMemory("34MiB", nodes=3, base="1GiB")

    assert memory.ranges == [
        (GIB, 8 * MIB, 0),
        (GIB + 8 * MIB, 8 * MIB, 1),
        (GIB + 16 * MIB, 18 * MIB, 2),
    ]
    assert [memory.node_of(GIB + n * 8 * MIB) for n in range(3)] == [0, 1, 2]


def test_memory_of_ranges_has_holes():
    """What lies between the ranges is no RAM: no view, no claim, no node."""
    memory = PhysicalMemory(
        ranges=[(4 * GIB, 2 * MIB, 1), (GIB, 2 * MIB, 0), (GIB + 2 * MIB, MIB, 1)]
    )

    assert memory.ranges == [(GIB, 2 * MIB, 0), (GIB + 2 * MIB, MIB, 1), (4 * GIB, 2 * MIB, 1)]
    assert (memory.base, memory.size, memory.nr_pages) == (GIB, 3 * GIB + 2 * MIB, 5 * MIB // PAGE)
    assert memory.contains(GIB, 3 * MIB)
    assert memory.contains(4 * GIB + 2 * MIB - 1)
    for phys, nbytes in [(GIB, 3 * MIB + 1), (4 * GIB - 1, 2), (0, 1), (4 * GIB, 2 * MIB + 1)]:
        assert not memory.contains(phys, nbytes)
        assert errno_of(memory.view, phys, nbytes) == errno.EINVAL
    assert errno_of(memory.claim, 2 * GIB, 0) == errno.EINVAL
    with pytest.raises(ValueError, match="not RAM"):
        memory.node_of(2 * GIB)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"size": 0}, {"size": 4097}, {"size": MIB, "nodes": 0}, {"size": MIB, "page_size": 8192}),
        *({"size": MIB, "base": 1}, {"size": 8 * KIB, "nodes": 3}, {"size": 65 * TIB}),
        *({"size": "1GB"}, {"size": MIB, "offset": PAGE}, {"ranges": []}),
        *({"ranges": [(0, MIB, 0), (MIB - PAGE, MIB, 0)]}, {"ranges": [(0, 0, 0)]}),
        *({"ranges": [(0, MIB, -1)]}, {"ranges": [(100, MIB, 0)]}, {"ranges": [(-PAGE, MIB, 0)]}),
        {"size": 2 * MIB, "ranges": [(0, MIB, 0)]},
        {"base": PAGE, "ranges": [(0, MIB, 0)]},
        {"ranges": [(0, MIB, 0), (1 << 60, MIB, 0)]},
    ],
    ids=str,
)
def test_memory_of_wrong_arguments_is_valueerror(arguments):
    """Ranges are whole pages, disjoint, and span at most 64 TiB."""
    with pytest.raises(ValueError, match=r"."):
        PhysicalMemory(**arguments)


def test_memory_of_wrong_types_is_typeerror():
    """Neither a float nor nothing at all is a size."""
    for arguments in ({}, {"size": 1e9}, {"size": MIB, "nodes": 1.0}, {"size": MIB, "base": 0.0}):
        with pytest.raises(TypeError):
            PhysicalMemory(**arguments)


def test_memory_of_a_given_file_maps_it_from_its_offset(tmp_path):
    """The byte at phys is the file's at offset + (phys - base); the file is not resized."""
    with open(tmp_path / "ram", "w+b") as file:
        file.truncate(MIB + 16 * KIB)
        file.seek(16 * KIB + 0x123)
        file.write(b"hello")
        file.flush()
        memory = PhysicalMemory(MIB, base=GIB, fd=file.fileno(), offset=16 * KIB)

        assert memory.view(GIB + 0x123, 5) == b"hello"
        memory.view(GIB, 2)[:] = b"ab"
        file.seek(16 * KIB)
        assert file.read(2) == b"ab"
        assert file.fileno() != memory.fd
        for offset in (20 * KIB, 1):
            with pytest.raises(ValueError, match=r"fd|offset"):
                PhysicalMemory(MIB, fd=file.fileno(), offset=offset)


@pytest.mark.parametrize(("page_size", "max_order"), [(4096, 10), (16384, 11), (65536, 13)])
def test_memory_of_a_page_size_allocates_such_pages(page_size, max_order):
    """Orders count pages of that size."""
    memory = PhysicalMemory(2 * GIB, page_size=page_size)

    assert max_order == memory.max_order
    assert [page_size, 2 * page_size] == [memory.alloc_folio(0) for _ in range(2)]
    phys = memory.alloc_folio(max_order)
    assert phys % (page_size << max_order) == 0


def test_memory_of_16_tib_costs_next_to_nothing():
    """2**32 pages: page state is touched where pages are used, and blocks of 2 TiB are served."""
    memory = PhysicalMemory("16TiB", nodes=8)

    assert memory.nr_free_pages() == 2**32 - 1
    assert memory.alloc_folio(29, node=1) == 2 * TIB
    folios = memory.alloc_folios(1_000_000, 9, node=5)
    assert folios[-1] == 10 * TIB + 999_999 * 2 * MIB
    memory.view(16 * TIB - 8, 8)[:] = b"the last"
    memory.free_folios(folios)
    memory.free(2 * TIB)
    assert memory.nr_free_pages() == 2**32 - 1
    assert os.fstat(memory.fd).st_blocks * 512 <= 2 * MIB


# ---- bytes ----


def test_view_of_memory_is_the_memory():
    """Views are writable and share the bytes."""
    memory = PhysicalMemory(MIB)
    view = memory.view(PAGE, 16)
    view[:] = bytes(range(16))

    assert (view.format, view.nbytes, view.readonly) == ("B", 16, False)
    assert bytes(range(8, 16)) == memory.view(PAGE + 8, 8)
    assert memory.view(PAGE, 0) == b""
    assert bytes(range(16)) == os.pread(memory.fd, 16, PAGE)


def test_view_outlives_its_memory():
    """A view keeps the mapping, not the memory object."""
    view = PhysicalMemory(MIB).view(0, 4)
    gc.collect()
    view[:] = b"abcd"

    assert view == b"abcd"


def test_is_populated_looks_without_touching():
    """A hole of the file stays one."""
    memory = PhysicalMemory(MIB)
    memory.view(2 * PAGE, 1)[0] = 1
    blocks = os.fstat(memory.fd).st_blocks

    assert memory.is_populated(2 * PAGE, PAGE)
    assert not memory.is_populated(PAGE, PAGE)
    assert not memory.is_populated(2 * PAGE, 2 * PAGE)
    assert blocks == os.fstat(memory.fd).st_blocks
    assert errno_of(memory.is_populated, MIB, 1) == errno.EINVAL


def test_prefault_touches_and_keeps_contents():
    """Every page of the bytes is in the file afterwards; what was there stays."""
    memory = PhysicalMemory(MIB)
    memory.view(3 * PAGE, 3)[:] = b"abc"
    memory.prefault(PAGE + 1, 4 * PAGE)

    assert memory.is_populated(PAGE, 5 * PAGE)
    assert not memory.is_populated(6 * PAGE, 1)
    assert memory.view(3 * PAGE, 3) == b"abc"
    memory.prefault(0, 0)
    assert errno_of(memory.prefault, MIB - PAGE, 2 * PAGE) == errno.EINVAL


def test_prefault_free_touches_what_the_next_allocations_get():
    """The blocks of the next allocations, and no page state is changed."""
    memory = PhysicalMemory("64MiB", nodes=2)
    memory.alloc_folio(3)
    for phys in memory.alloc_folios(8, 2)[::2]:
        memory.free(int(phys))
    before = state_of(memory)

    assert memory.prefault_free(605 * KIB, 2) == 608 * KIB
    assert before == state_of(memory)
    for phys in memory.alloc_folios(608 // 16, 2).tolist():
        assert memory.is_populated(phys, 16 * KIB)
    assert memory.prefault_free(0, 2) == 0
    assert memory.prefault_free("1GiB", 12, node=1) == 32 * MIB


# ---- pages: one by one ----


def test_alloc_folio_is_the_lowest_address_of_the_smallest_order():
    """First fit: the smallest block that does, there the lowest; address 0 is never given."""
    memory = PhysicalMemory("16MiB")

    assert [memory.alloc_folio(0) for _ in range(4)] == [PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE]
    assert memory.alloc_folio(3) == 8 * PAGE
    assert memory.alloc_folio(1) == 6 * PAGE
    assert memory.alloc_folio(0) == 5 * PAGE
    memory.free(3 * PAGE)
    assert memory.alloc_folio(0) == 3 * PAGE


def test_alloc_folio_on_a_node_stays_there():
    """A node's request is strict; an unknown node is the caller's fault."""
    memory = PhysicalMemory("16MiB", nodes=2)

    assert memory.alloc_folio(10, node=1) == 8 * MIB
    assert memory.alloc_folio(10, node=1) == 12 * MIB
    assert errno_of(memory.alloc_folio, 0, node=1) == errno.ENOMEM
    assert memory.alloc_folio(0) == PAGE
    assert memory.nr_free_pages() + 1 == 2047
    assert (memory.nr_free_pages(1), memory.nr_free_pages(0)) == (0, 2046)
    for node in (2, -1):
        with pytest.raises(ValueError, match="node"):
            memory.alloc_folio(0, node=node)


def test_alloc_folio_without_room_is_enomem():
    """It is both a KhoError and a MemoryError."""
    memory = PhysicalMemory("1MiB")

    with pytest.raises(KhoNoMemoryError, match="alloc_folio order 8"):
        memory.alloc_folio(8)
    for order in (40, 63):
        assert errno_of(memory.alloc_folio, order) == errno.ENOMEM
    for order in (64, -1):
        with pytest.raises(ValueError, match="order"):
            memory.alloc_folio(order)
    assert memory.nr_free_pages() == 2 * 128 - 1


def test_free_merges_to_what_was_before():
    """Free blocks are a function of the set of free pages, in whatever order they came back."""
    memory = PhysicalMemory("16MiB")
    before = state_of(memory)
    folios = [memory.alloc_folio(order) for order in (0, 3, 1, 0, 5, 9, 2)]
    for phys in (folios[i] for i in (3, 0, 6, 2, 5, 1, 4)):
        memory.free(phys)

    assert before == state_of(memory)


def test_free_of_what_is_no_head_is_einval():
    """The middle of a block, a free page, twice, misaligned, outside RAM: nothing happens."""
    memory = PhysicalMemory("1MiB", base=GIB)
    phys = memory.alloc_folio(2)
    free = memory.nr_free_pages()
    for wrong in (phys + PAGE, phys + 1, phys + 4 * PAGE, 0, 1 << 63, GIB + MIB):
        assert errno_of(memory.free, wrong) == errno.EINVAL
    memory.free(phys)

    assert errno_of(memory.free, phys) == errno.EINVAL
    assert free + 4 == memory.nr_free_pages()


def test_free_blocks_never_cross_a_border():
    """Neither of a range, nor of a node, nor of scratch."""
    memory = PhysicalMemory(ranges=[(0, 3 * MIB, 0), (3 * MIB, 5 * MIB, 0), (8 * MIB, 8 * MIB, 1)])
    memory.reserve_scratch([(9 * MIB, 64 * KIB)])
    borders = [0, PAGE, 3 * MIB, 8 * MIB, 9 * MIB, 9 * MIB + 64 * KIB]
    free, _ = state_of(memory)
    for phys, order in free:
        assert not [b for b in borders if phys < b < phys + (PAGE << order)]

    assert sum(1 << order for _, order in free) == 16 * MIB // PAGE - 1
    assert len({phys >> (12 + order) for phys, order in free}) > 1


def test_claim_takes_the_block_at_its_address():
    """A claimed block is an allocated one; what overlaps it is EBUSY and named."""
    memory = PhysicalMemory("16MiB")
    memory.claim(4 * MIB, 10)

    assert memory.order_of(4 * MIB) == 10
    assert memory.is_allocated(4 * MIB, 4 * MIB)
    for phys, order in [(4 * MIB, 10), (4 * MIB, 0), (0, 12), (5 * MIB, 3)]:
        with pytest.raises(KhoError, match="allocated 0x400000/order 10") as error:
            memory.claim(phys, order)
        assert error.value.errno == errno.EBUSY
    for phys, order in [(PAGE, 1), (16 * MIB, 0), (0, 13), (0, 50), (1, 0)]:
        assert errno_of(memory.claim, phys, order) == errno.EINVAL
    memory.free(4 * MIB)
    assert memory.nr_free_pages() == 4095


def test_claim_of_page_0_is_possible_and_never_frees_it():
    """Page 0 is RAM that somebody may own, and nobody is given."""
    memory = PhysicalMemory("16MiB")
    before = state_of(memory)
    memory.claim(0, 4)

    assert errno_of(memory.claim, 0, 0) == errno.EBUSY
    memory.free(0)
    assert before == state_of(memory)


# ---- pages: in bulk ----


def test_alloc_folios_gives_what_single_calls_give():
    """The same addresses in the same order, from fragmented memory too."""
    one, many = (PhysicalMemory("64MiB", nodes=2) for _ in range(2))
    for memory in (one, many):
        for phys in memory.alloc_folios(100, 1)[::3].tolist():
            memory.free(phys)
    for order, n in [(0, 40), (1, 3), (4, 77), (0, 1000), (9, 5), (0, 0)]:
        expected = [one.alloc_folio(order) for _ in range(n)]

        assert expected == many.alloc_folios(n, order).tolist()
    assert state_of(one) == state_of(many)


def test_alloc_folios_without_room_takes_nothing():
    """All or none."""
    memory = PhysicalMemory("16MiB")
    memory.alloc_folio(0)
    before = state_of(memory)

    for n, order in [(4095, 0), (5, 10), (1, 12), (1 << 62, 0), (1, 60)]:
        assert errno_of(memory.alloc_folios, n, order) == errno.ENOMEM
    assert before == state_of(memory)
    with pytest.raises(OverflowError):
        memory.alloc_folios(-1, 0)


def test_free_folios_takes_blocks_of_any_orders_in_any_order():
    """Adjoining or not, ascending or not."""
    memory = PhysicalMemory("64MiB")
    before = state_of(memory)
    folios = np.concatenate([memory.alloc_folios(n, o) for o, n in [(0, 99), (3, 20), (0, 5)]])
    memory.free_folios(np.random.default_rng(1).permutation(folios))

    assert before == state_of(memory)
    memory.free_folios(np.empty(0, np.uint64))


def test_free_folios_with_a_wrong_one_frees_nothing():
    """Twice, misaligned or not allocated: EINVAL names it, and all blocks are back."""
    memory = PhysicalMemory("64MiB")
    folios = memory.alloc_folios(50, 2)
    single = memory.alloc_folio(7)
    before = state_of(memory)
    for wrong in (int(folios[10]), int(folios[3]) + PAGE, 40 * MIB, 1):
        array = np.array([single, *folios[:20].tolist(), wrong, *folios[30:].tolist()], np.uint64)
        with pytest.raises(KhoError, match=f"free_folios {wrong:#x}") as error:
            memory.free_folios(array)

        assert error.value.errno == errno.EINVAL
        assert before == state_of(memory)


def test_alloc_pages_is_a_run_that_goes_back_as_one():
    """Not a power of two: the tail of the block stays free."""
    memory = PhysicalMemory("16MiB")
    before = state_of(memory)
    phys = memory.alloc_pages(11)

    assert phys == 16 * PAGE
    assert memory.nr_free_pages() == 4095 - 11
    assert memory.is_allocated(phys, 11 * PAGE)
    assert not memory.is_allocated(phys, 12 * PAGE)
    for wrong in (9, 12, 0x7FFFFFFFFFFFFFFF):
        assert errno_of(memory.free_pages, phys, wrong) == errno.EINVAL
    memory.free_pages(phys, 11)
    assert before == state_of(memory)
    assert errno_of(memory.alloc_pages, 4096) == errno.ENOMEM
    with pytest.raises(ValueError, match="0"):
        memory.alloc_pages(0)


# ---- scratch ----


def test_reserve_scratch_is_never_handed_out():
    """Not even when all else is gone; claiming an address in it is possible."""
    memory = PhysicalMemory("16MiB")
    kept = memory.alloc_folio(0)
    memory.reserve_scratch([(12 * MIB, 2 * MIB), (8 * MIB, PAGE), (0, 0)])

    assert memory.scratch == [(8 * MIB, PAGE), (12 * MIB, 2 * MIB)]
    assert (memory.nr_scratch_pages, memory.nr_free_scratch_pages) == (513, 513)
    assert memory.nr_free_pages() == 4095 - 1 - 513
    got = memory.alloc_folios(memory.nr_free_pages(), 0).tolist()
    assert not [p for p in [kept, *got] if 12 * MIB <= p < 14 * MIB or p == 8 * MIB]
    assert errno_of(memory.alloc_folio, 0) == errno.ENOMEM
    memory.claim(8 * MIB, 0)
    assert memory.nr_free_scratch_pages == 512


def test_reserve_scratch_again_replaces_it():
    """The old areas are ordinary memory again and merge with what is around them."""
    memory = PhysicalMemory("16MiB")
    before = state_of(memory)
    memory.reserve_scratch([(8 * MIB, PAGE)])
    memory.reserve_scratch([(4 * MIB, MIB)])
    memory.reserve_scratch([])

    assert before == state_of(memory)


def test_reserve_scratch_over_an_allocation_is_ebusy():
    """Also if a block only crosses the border; nothing changes."""
    memory = PhysicalMemory("16MiB")
    memory.claim(8 * MIB, 4)
    before = state_of(memory)
    for area in [(8 * MIB, MIB), (8 * MIB - PAGE, 2 * PAGE), (4 * MIB, 12 * MIB)]:
        assert errno_of(memory.reserve_scratch, [area]) == errno.EBUSY
    assert ([], before) == (memory.scratch, state_of(memory))


@pytest.mark.parametrize(
    "areas",
    [
        *([(1, PAGE)], [(PAGE, 1)], [(16 * MIB, PAGE)], [(15 * MIB, 2 * MIB)], [(-PAGE, PAGE)]),
        *([(MIB, MIB), (MIB + PAGE, PAGE)], [(PAGE, -PAGE)]),
    ],
    ids=str,
)
def test_reserve_scratch_of_wrong_areas_is_valueerror(areas):
    """Areas are whole pages of RAM and do not overlap."""
    with pytest.raises(ValueError, match="scratch"):
        PhysicalMemory("16MiB").reserve_scratch(areas)


def test_restrict_hands_out_scratch_only_until_release():
    """As a kernel boots; what it claims meanwhile is not free afterwards."""
    memory = PhysicalMemory("16MiB")
    memory.alloc_folios(100, 0)
    memory.restrict([(8 * MIB, MIB), (2 * MIB, 64 * KIB)])

    assert memory.restricted
    assert [memory.alloc_folio(0) for _ in range(2)] == [2 * MIB, 2 * MIB + PAGE]
    assert memory.alloc_folio(5) == 8 * MIB
    assert errno_of(memory.alloc_folio, 10) == errno.ENOMEM
    memory.claim(4 * MIB, 3)
    memory.release()
    assert not memory.restricted
    assert memory.alloc_folio(0) == PAGE
    assert errno_of(memory.claim, 4 * MIB, 3) == errno.EBUSY


# ---- one kernel after the other ----


def test_forget_drops_page_state_and_keeps_bytes():
    """Everything is free again."""
    memory = PhysicalMemory("16MiB")
    before = state_of(memory)
    memory.reserve_scratch([(8 * MIB, MIB)])
    phys = memory.alloc_folio(3)
    memory.view(phys, 4)[:] = b"kept"
    memory.forget()

    assert (before, []) == (state_of(memory), memory.scratch)
    assert memory.view(phys, 4) == b"kept"
    assert errno_of(memory.free, phys) == errno.EINVAL


def test_detach_leaves_page_state_to_another_process():
    """Views work, pages are ESHUTDOWN."""
    memory = PhysicalMemory("1MiB")
    phys = memory.alloc_folio(0)
    memory.detach()

    assert memory.detached
    memory.view(phys, 1)[0] = 7
    for call, *args in [
        *((memory.alloc_folio, 0), (memory.alloc_folios, 1, 0), (memory.alloc_pages, 1)),
        *((memory.claim, PAGE, 0), (memory.free, phys), (memory.nr_free_pages,)),
        *((memory.reserve_scratch, []), (memory.restrict, []), (memory.free_pages, phys, 1)),
    ]:
        with pytest.raises(StateError) as error:
            call(*args)
        assert error.value.errno == errno.ESHUTDOWN


def test_cut_off_kills_the_views_made_before():
    """They see zeros for ever and reach nothing; views made afterwards work."""
    memory = PhysicalMemory("16MiB")
    phys = memory.alloc_folio(0)
    old = memory.view(phys, 8)
    old[:] = b"original"
    memory.cut_off()
    new = memory.view(phys, 8)

    assert (bytes(8), b"original") == (bytes(old), bytes(new))
    old[:] = b"too late"
    assert new == b"original"
    new[:] = b"new here"
    assert old == b"too late"
    memory.free(phys)


def test_cut_off_a_thousand_times_leaks_nothing():
    """Mappings die with their last view; a view of the first cut is still harmless at the end."""

    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return sum(1 for _ in file)

    memory = PhysicalMemory("16TiB")
    view = memory.view(PAGE, 8)
    view[:] = b"original"
    memory.cut_off()
    before = mappings()
    for _ in range(1000):
        memory.cut_off()

    assert mappings() <= before + 8
    assert (bytes(8), b"original") == (bytes(view), bytes(memory.view(PAGE, 8)))


def test_clone_is_independent_and_populated():
    """Same ranges and bytes, holes included; no page state."""
    memory = PhysicalMemory(ranges=[(GIB, 4 * MIB, 0), (2 * GIB, 4 * MIB, 1)], page_size=16384)
    phys = memory.alloc_folio(2)
    memory.view(phys, 5)[:] = b"first"
    memory.view(2 * GIB + MIB, 3)[:] = b"far"
    copy = memory.clone()

    assert (memory.ranges, memory.page_size) == (copy.ranges, copy.page_size)
    assert (copy.view(phys, 5), copy.view(2 * GIB + MIB, 3)) == (b"first", b"far")
    assert copy.nr_free_pages() == 512
    assert copy.is_populated(phys, 5)
    assert os.fstat(memory.fd).st_blocks == os.fstat(copy.fd).st_blocks
    copy.view(phys, 5)[:] = b"other"
    assert memory.view(phys, 5) == b"first"


def test_attach_is_read_only_until_writable():
    """Not even a prefault writes; views made before stay read-only."""
    memory = PhysicalMemory("1MiB", nodes=2)
    memory.view(PAGE, 2)[:] = b"ab"
    other = PhysicalMemory.attach(memory.fd, memory.ranges)
    view = other.view(PAGE, 2)

    assert (bytes(view), view.readonly, other.readonly) == (b"ab", True, True)
    assert memory.ranges == other.ranges
    assert errno_of(other.prefault, 0, PAGE) == errno.EROFS
    assert errno_of(other.prefault_free, PAGE) == errno.EROFS
    other.writable()
    other.view(PAGE, 2)[:] = b"cd"
    assert (bytes(memory.view(PAGE, 2)), view.readonly) == (b"cd", True)
    other.cut_off()
    assert bytes(2) == bytes(view)
    assert not PhysicalMemory.attach(memory.fd, memory.ranges, readonly=False).readonly


def test_attach_in_another_process_sees_the_bytes():
    """The file is all that it needs."""
    memory = PhysicalMemory("1MiB", base=GIB)
    memory.view(GIB + 5, 5)[:] = b"hello"
    code = (
        "import sys; from luo.memory import PhysicalMemory;"
        f"m = PhysicalMemory.attach({memory.fd}, {memory.ranges}); m.writable();"
        f"v = m.view({GIB + 5}, 5); v[:] = bytes(v).upper()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, pass_fds=[memory.fd])

    assert memory.view(GIB + 5, 5) == b"HELLO"


def test_calls_from_many_threads_keep_the_books():
    """Bulk calls run without the GIL; the lock keeps pages apart."""
    memory = PhysicalMemory("256MiB")
    before = state_of(memory)
    failures = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(60):
            folios = memory.alloc_folios(int(random.integers(1, 2000)), int(random.integers(0, 3)))
            single = memory.alloc_folio(1)
            memory.view(single, 8)[:] = seed.to_bytes(8, "little")
            memory.free_folios(random.permutation(folios))
            if seed.to_bytes(8, "little") != bytes(memory.view(single, 8)):
                failures.append(seed)
            memory.free(single)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert ([], before) == (failures, state_of(memory))


def test_memory_mapping_is_not_for_making():
    """Only memory makes one."""
    from luo._kho import MemoryMapping

    with pytest.raises(TypeError):
        MemoryMapping()
