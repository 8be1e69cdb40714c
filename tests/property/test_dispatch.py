"""Bulk arithmetic of records, slots and runs, against plain loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luo._kho import (
    cut_runs,
    find_stray_slot,
    group_rows,
    match_strings,
    spread_strings,
)

BATCH, THREADS = 2, 4


@given(
    st.lists(st.text("abc/", max_size=5).map(str.encode), unique=True, min_size=1, max_size=5),
    st.data(),
)
def test_spread_strings_is_undone_by_match_strings(names, data):
    """Every row has its name and a NUL; a row without number is empty."""
    ids = data.draw(st.lists(st.integers(-1, len(names) - 1), max_size=30))
    text, offsets = spread_strings(np.array(ids, np.int32), names)
    rows = [bytes(text[a:b]) for a, b in itertools.pairwise(offsets)]

    assert rows == [b"" if i < 0 else names[i] + b"\0" for i in ids]
    assert match_strings(text, offsets, names).tolist() == ids


def test_spread_strings_number_outside_is_index_error():
    """A number that no name has is refused."""
    for wrong in (1, -2):
        with pytest.raises(IndexError, match="row 1"):
            spread_strings(np.array([0, wrong], np.int32), [b"a"])


@given(
    st.lists(
        st.tuples(
            st.integers(-1, 2),
            st.integers(-1, 2),
            st.sampled_from([0, 1, 2**63]),
            st.sampled_from([0, 8, 2**64 - 1]),
        ),
        max_size=80,
    )
)
def test_group_rows_numbers_equal_rows_alike(rows):
    """Numbers are those of the first occurrence."""
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    types = (np.int32, np.int32, np.uint64, np.uint64)
    given = [np.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    first = {row: number for number, row in enumerate(dict.fromkeys(rows))}

    assert group_rows(*given).tolist() == [first[row] for row in rows]


@given(st.data())
def test_cut_runs_cuts_where_the_rules_say(data):
    """One way a run; a batch has one depth, owner and stride; threads have one depth."""
    n = data.draw(st.integers(0, 12))
    pick = lambda *values: np.array(  # noqa: E731
        data.draw(st.lists(st.sampled_from(values), min_size=n, max_size=n)), np.int64
    )
    order = np.array(data.draw(st.permutations(range(n))), np.int32)
    ways = pick(1, BATCH, THREADS).astype(np.int8)
    depths, drivers, buses = (pick(0, 1).astype(np.int32) for _ in range(3))
    sizes = [pick(0, 8, 12).astype(np.uint64) for _ in range(2)]
    phys = [np.cumsum(pick(8, 16, 24)).astype(np.uint64) for _ in range(2)]
    places = np.array(sorted(data.draw(st.sets(st.integers(0, max(n - 1, 0)), max_size=n))) or
                      list(range(n)), np.int64)  # fmt: skip
    ways = ways[: len(places)]

    def together(one, two, way):
        a, b = int(order[one]), int(order[two])
        if way == THREADS:
            return depths[a] == depths[b]
        if way != BATCH:
            return True
        stride = sum((int(size[one]) + 7) // 8 * 8 for size in sizes)
        return all(column[a] == column[b] for column in (depths, drivers, buses)) and all(
            size[one] == size[two] and (not size[two] or int(at[two]) == int(at[one]) + stride)
            for size, at in zip(sizes, phys, strict=True)
        )

    expected = [0] if len(places) else []
    for i in range(1, len(places)):
        same = ways[i] == ways[i - 1] and together(places[i - 1], places[i], ways[i])
        expected += [] if same else [i]
    cuts = cut_runs(
        ways, places, order, depths, drivers, buses,
        phys[0], sizes[0], phys[1], sizes[1], BATCH, THREADS,
    )  # fmt: skip

    assert cuts.tolist() == [*expected, len(places)]


def test_cut_runs_place_outside_is_index_error():
    """Numbers are checked, not followed."""
    one, none = np.zeros(1, np.int32), np.zeros(1, np.uint64)
    for place, device in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        order = np.array([device], np.int32)
        with pytest.raises(IndexError, match="no device"):
            cut_runs(
                np.ones(1, np.int8), np.array([place]), order, one, one, one,
                none, none, none, none, BATCH, THREADS,
            )  # fmt: skip


@given(st.data())
def test_find_stray_slot_names_the_first_that_leaves_its_slab(data):
    """A slot must lie in the slab that lists its record, one of no bytes may be anywhere."""
    n = data.draw(st.integers(0, 8))
    number = st.sampled_from([0, 8, 100, 108, 116, 200, 2**64 - 1])
    draw = lambda: data.draw(st.lists(number, min_size=n, max_size=n))  # noqa: E731
    phys, nbytes = draw(), draw()
    cut = data.draw(st.integers(0, n))
    slabs = [(100, 16, 0, cut), (200, 8, cut, n - cut)]
    slabs = slabs[: data.draw(st.integers(0, 2))]

    def wrong(i):
        for start, size, first, count in slabs:
            if first <= i < first + count:
                return not (start <= phys[i] and phys[i] + nbytes[i] <= start + size)
        return True

    strays = [i for i in range(n) if nbytes[i] and wrong(i)]
    found = find_stray_slot(
        np.array(slabs, np.uint64).reshape(-1, 4),
        np.array(phys, np.uint64),
        np.array(nbytes, np.uint64),
    )

    assert found == (strays[0] if strays else -1)
