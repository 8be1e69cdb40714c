"""Strays and owners against sets of pages."""

from hypothesis import given
from hypothesis import strategies as st
from rig import hand_over
from ring_kernels import FIRST, NIC, machine

from luo import dma
from luo.kernel import Kernel

PAGE = 4096
PAGES = 32

#: Blocks of a ring of 32 pages: (first page, order), aligned.
blocks = st.integers(0, 3).flatmap(
    lambda order: st.tuples(
        st.integers(0, (PAGES >> order) - 1).map(lambda number: number << order), st.just(order)
    )
)
ranges = st.tuples(st.integers(0, PAGES * PAGE // 64 - 1), st.integers(1, PAGES * PAGE // 64)).map(
    lambda pair: (FIRST + pair[0] * 64, min(pair[1], PAGES * PAGE // 64 - pair[0]) * 64)
)


def lines(extents):
    """Return the cache lines of (phys, bytes, …) each."""
    return [line for phys, nbytes, *_ in extents for line in range(phys, phys + nbytes, 64)]


@given(kept=st.lists(blocks, max_size=8), written=st.lists(ranges, min_size=1, max_size=3))
def test_strays_are_exactly_the_bytes_that_were_not_preserved(kept, written):
    """Whatever part of a range was preserved, by whatever blocks, and wherever it begins."""
    hardware = machine()
    old = Kernel(hardware).boot()
    pages = set()
    for first, order in kept:
        block = set(range(first, first + (1 << order)))
        if not block & pages:
            old.kho.preserve_folio(FIRST + first * PAGE, order)
            pages |= block
    streams = [hardware.dma(NIC, *range_, interval=1) for range_ in written]
    handover = hand_over(old.kho)
    old.close()

    with Kernel(hardware).boot(handover) as new:
        strays = new.strays

    for stream in streams:
        stream.stop()
    expected = [
        line for range_ in written for line in lines([range_])
        if (line - FIRST) // PAGE not in pages
    ]  # fmt: skip
    assert [line for stray in strays for line in lines([stray[1:]])] == expected
    assert {stray.owner for stray in strays} <= {"free"}


@given(held=st.lists(st.tuples(blocks, st.booleans()), max_size=12), asked=ranges)
def test_owners_are_those_who_hold_the_pages(held, asked):
    """Free, allocated and preserved blocks side by side, from any byte to any other."""
    with Kernel(machine()).boot() as kernel:
        owner = dict.fromkeys(range(PAGES), "free")
        for (first, order), preserved in held:
            block = range(first, first + (1 << order))
            if all(owner[page] == "free" for page in block):
                phys = FIRST + first * PAGE
                kernel.memory.claim(phys, order)
                if preserved:
                    kernel.kho.preserve_folio(phys, order)
                what = "preserved" if preserved else "allocated"
                owner |= dict.fromkeys(block, f"{what} {phys:#x}/order {order}")
        extents = dma.whose(kernel, *asked)

    assert lines(extents) == lines([asked])
    for phys, nbytes, name in extents:
        assert {owner[(line - FIRST) // PAGE] for line in lines([(phys, nbytes)])} == {name}
