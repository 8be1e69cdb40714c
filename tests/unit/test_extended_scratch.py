"""Where a booting kernel may allocate beside scratch."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luo.kho import Incoming, Kho
from luo.memory import PhysicalMemory

GIB = 1 << 30


def incoming(blocks: list[tuple[int, int]], **memory: object) -> Incoming:
    """What a kernel that preserved *blocks* left, validated and not booted."""
    machine = PhysicalMemory(**memory)
    kho = Kho(machine, scratch="16M,0,0")
    for phys, order in blocks:
        kho.preserve_folio(phys, order)
    return Kho.validate(machine, kho.handover())


def test_extended_scratch_leaves_out_each_gib_with_something_in_it():
    """A block above 1 GiB takes all that it lies in; the map and the root tree lie in the first."""
    found = incoming([(9 * GIB, 0), (16 * GIB, 20)], size="32GiB").extended_scratch()

    assert [(GIB, 8 * GIB), (10 * GIB, 6 * GIB), (20 * GIB, 12 * GIB)] == found


def test_extended_scratch_stays_within_ranges():
    """A range that begins or ends within a GiB gives what it has of it, holes give nothing."""
    ranges = [(0, GIB, 0), (5 * GIB + (1 << 20), 2 * GIB, 0), (8 * GIB, GIB // 2, 1)]
    found = incoming([(6 * GIB, 0)], ranges=ranges).extended_scratch()

    assert [
        (5 * GIB + (1 << 20), GIB - (1 << 20)),
        (7 * GIB, 1 << 20),
        (8 * GIB, GIB // 2),
    ] == found


# The low scratch area lies below 4 GiB: nothing of that size can be preserved around it.
PLACES = sorted({*range(1, 64)} - {3})


@given(st.sets(st.sampled_from(PLACES), max_size=20), st.integers(0, 18))
def test_extended_scratch_equals_the_plain_definition(numbers, order):
    """Whatever is preserved: all other blocks of 1 GiB, and only they."""
    found = incoming([(number * GIB, order) for number in sorted(numbers)], size="64GiB")
    covered = np.zeros(64, bool)
    for phys, nbytes in found.extended_scratch():
        covered[phys // GIB : (phys + nbytes) // GIB] = True

    assert covered.tolist() == [number != 0 and number not in numbers for number in range(64)]
