"""What a live update works out about its devices, against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luo._kho import DeviceList, add_counts, set_flags, spread_strings

BATCH, PYTHON, NATIVE, THREADS = 1, 2, 3, 4
NR_OWNERS = 3


def ints(values, dtype=np.int32):
    return np.array(values, dtype)


class Host:
    """Columns of some devices, drawn at random, and a list of some of them."""

    def __init__(self, data, kinds=(0, BATCH, PYTHON, NATIVE, THREADS)):
        n = data.draw(st.integers(0, 14))

        def pick(values, count=n):
            return data.draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))

        self.order = data.draw(st.permutations(range(n)))[: data.draw(st.integers(0, n))]
        self.drivers, self.buses = pick([-1, 0, 1, 2]), pick([-1, 0, 1, 2])
        self.depths = pick([1, 2])
        self.sizes = [pick([0, 8, 12]), pick([0, 8])]
        self.driver_kinds, self.bus_kinds = pick(kinds, NR_OWNERS), pick(kinds, NR_OWNERS)

    @property
    def ids(self):
        return ints(self.drivers), ints(self.buses)

    @property
    def kinds(self):
        return ints(self.driver_kinds, np.int8), ints(self.bus_kinds, np.int8)

    @property
    def slot_bytes(self):
        return ints(self.sizes, np.uint64).reshape(2, -1)

    def kinds_of(self, device):
        """How the callbacks of a device's driver and bus are called."""
        owners = (self.drivers[device], self.driver_kinds), (self.buses[device], self.bus_kinds)
        return [kinds[owner] if owner >= 0 else 0 for owner, kinds in owners]


def room(nbytes):
    return (nbytes + 7) // 8 * 8


@given(st.lists(st.integers(0, 9), max_size=20), st.booleans(), st.integers(-2, 2))
def test_set_flags_and_add_counts_reach_whom_they_are_given(which, value, change):
    """One who is there twice is counted twice."""
    flags, counts = np.full(10, not value), np.zeros(10, np.int32)
    set_flags(flags.view(np.uint8), ints(which), value)
    add_counts(counts, ints(which), change)

    assert [bool(flag) is value for flag in flags] == [i in which for i in range(10)]
    assert counts.tolist() == [change * which.count(i) for i in range(10)]


@pytest.mark.parametrize("wrong", [-1, 2])
def test_device_outside_a_column_is_index_error(wrong):
    """Numbers are checked, not followed."""
    which, flags, words = ints([0, wrong]), np.zeros(2, np.uint8), np.zeros((2, 2), np.uint64)
    with pytest.raises(IndexError):
        set_flags(flags, which, True)
    with pytest.raises(IndexError):
        add_counts(np.zeros(2, np.int32), which, 1)
    if wrong < 0:
        with pytest.raises(IndexError):
            DeviceList(which)
        return
    listed, ids, kinds = DeviceList(which), np.zeros(2, np.int32), np.zeros(1, np.int8)
    for call in (
        lambda: listed.size_slots(ids, words[0], words[0]),
        lambda: listed.cut_slabs(words, 64),
        lambda: listed.place_slots(words[:0].reshape(0, 4), words, words),
        lambda: listed.groups(ids, ids, flags, flags, words),
        lambda: listed.choose(ids, ids, kinds, kinds),
        lambda: listed.places_without(ids, ids, kinds, kinds),
        lambda: listed.cut_runs(ids, ids, ids, kinds, kinds, words, words, 2, 1, 4),
    ):
        with pytest.raises(IndexError):
            call()


def test_owner_outside_a_table_is_index_error():
    """A number that no driver has is refused."""
    listed, ids, kinds = DeviceList(ints([0])), ints([1]), np.ones(1, np.int8)
    words = np.zeros((2, 1), np.uint64)
    for call in (
        lambda: listed.size_slots(ids, words[0], words[0]),
        lambda: listed.groups(ids, ids, kinds.view(np.uint8), kinds.view(np.uint8), words),
        lambda: listed.choose(ids, ids, kinds, kinds),
        lambda: listed.places_without(ids, ids, kinds, kinds),
        lambda: listed.cut_runs(ids, ids, ids, kinds, kinds, words, words, 2, 1, 4),
    ):
        with pytest.raises(IndexError):
            call()


@given(st.data())
def test_slots_are_laid_out_in_the_order_of_the_list(data):
    """Drivers' before buses', none across the end of a slab, a slab only where bytes are."""
    host = Host(data)
    limit = data.draw(st.sampled_from([24, 32, 64]))
    driver_sizes = data.draw(st.lists(st.sampled_from([0, 8, 12]), min_size=3, max_size=3))
    slot_bytes = host.slot_bytes
    listed = DeviceList(ints(host.order))
    listed.size_slots(host.ids[0], ints(driver_sizes, np.uint64), slot_bytes[0])
    sizes = [
        (driver_sizes[host.drivers[i]] if host.drivers[i] >= 0 else 0, host.sizes[1][i])
        for i in host.order
    ]
    expected, used, first = [], 0, 0
    for place, (driver, bus) in enumerate(sizes):
        if used + room(driver) + room(bus) > limit:
            expected.append((used, first, place - first))
            used, first = 0, place
        used += room(driver) + room(bus)
    if used:
        expected.append((used, first, len(sizes) - first))

    slabs, too_large = listed.cut_slabs(slot_bytes, limit)
    assert too_large == -1
    assert slabs[:, 1:].tolist() == [list(entry) for entry in expected]

    slabs[:, 0] = [4096 * (number + 1) for number in range(len(slabs))]
    slot_phys = np.full_like(slot_bytes, 99)
    listed.place_slots(slabs, slot_bytes, slot_phys)
    for number, (_used, first, count) in enumerate(expected):
        at = 4096 * (number + 1)
        for device, both in zip(host.order[first:][:count], sizes[first:], strict=False):
            for side, nbytes in enumerate(both):
                assert slot_phys[side, device] == (at if nbytes else 0)
                at += room(nbytes)
    others = [i for i in range(len(host.drivers)) if i not in host.order]
    assert (slot_phys[:, others] == 99).all()


@pytest.mark.parametrize("sizes", [(65, 0), (40, 32), (2**64 - 1, 0), (2**64 - 1, 2**64 - 1)])
def test_cut_slabs_names_the_first_that_fits_into_none(sizes):
    """Sizes are compared before they are added."""
    slot_bytes = ints([[8, sizes[0]], [0, sizes[1]]], np.uint64)

    assert DeviceList(ints([0, 1])).cut_slabs(slot_bytes, 64)[1] == 1


@given(st.data())
def test_groups_are_those_of_one_driver_bus_and_size(data):
    """Whose driver or bus is called in batches; the others are in none."""
    host = Host(data)
    batched = [[kind == BATCH for kind in kinds] for kinds in (host.driver_kinds, host.bus_kinds)]
    group = DeviceList(ints(host.order)).groups(
        *host.ids, *(ints(flags, np.uint8) for flags in batched), host.slot_bytes
    )
    wanted = [i for i in host.order if BATCH in host.kinds_of(i)]
    if not wanted:
        assert group is None
        return
    key = [(host.drivers[i], host.buses[i], host.sizes[0][i], host.sizes[1][i])
           for i in range(len(host.drivers))]  # fmt: skip
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(key[i] for i in wanted))}

    assert group.tolist() == [numbers[key[i]] if i in wanted else -1 for i in range(len(key))]


@given(st.data())
def test_choose_leaves_out_who_has_no_callback(data):
    """The list itself if that is nobody."""
    host = Host(data)
    listed = DeviceList(ints(host.order))
    chosen = listed.choose(*host.ids, *host.kinds)
    expected = [i for i in host.order if any(host.kinds_of(i))]

    assert chosen.numbers.tolist() == expected
    assert (chosen is listed) == (expected == host.order)
    left = listed.places_without(*host.ids, *host.kinds).tolist()
    assert left == [place for place, i in enumerate(host.order) if i not in expected]


@given(st.data())
def test_cut_runs_cuts_where_the_rules_say(data):
    """One way a run; a batch has one depth, owner and stride; threads have one depth."""
    host = Host(data)
    n = len(host.drivers)
    steps = data.draw(st.lists(st.sampled_from([8, 16, 24]), min_size=2 * n, max_size=2 * n))
    phys = np.cumsum([0, *steps])[1:]
    slot_phys = ints(phys, np.uint64).reshape(2, -1)
    slot_bytes = host.slot_bytes

    ways, before = [], 0
    for device in host.order:
        said = [kind for kind in host.kinds_of(device) if kind]
        before = min(said) if said else before
        ways.append(before if said or before not in (0, BATCH) else PYTHON)

    def together(one, two, way):
        if way == THREADS:
            return host.depths[one] == host.depths[two]
        if way != BATCH:
            return True
        stride = sum(room(int(size)) for size in slot_bytes[:, one])
        return all(
            column[one] == column[two]
            for column in (host.depths, host.drivers, host.buses, *host.sizes)
        ) and all(
            not slot_bytes[side, two]
            or int(slot_phys[side, two]) == int(slot_phys[side, one]) + stride
            for side in range(2)
        )

    expected = [0] if ways else []
    for place in range(1, len(ways)):
        one, two = host.order[place - 1], host.order[place]
        if ways[place] != ways[place - 1] or not together(one, two, ways[place]):
            expected.append(place)
    cuts, kept = DeviceList(ints(host.order)).cut_runs(
        ints(host.depths), *host.ids, *host.kinds, slot_phys, slot_bytes, PYTHON, BATCH, THREADS
    )

    assert cuts.tolist() == [*expected, len(ways)]
    assert kept.tolist() == [ways[place] for place in expected]


# ---- names as columns ----


@given(
    st.lists(st.text("abc/", max_size=5).map(str.encode), unique=True, min_size=1, max_size=5),
    st.data(),
)
def test_spread_strings_gives_each_row_its_name(names, data):
    """Every row has its name and a NUL; a row without number is empty."""
    which = data.draw(st.lists(st.integers(-1, len(names) - 1), max_size=30))
    text, offsets = spread_strings(ints(which), names)
    rows = [bytes(text[int(offsets[i]) : int(offsets[i + 1])]) for i in range(len(which))]

    assert rows == [b"" if i < 0 else names[i] + b"\0" for i in which]


def test_spread_strings_number_outside_is_index_error():
    """A number that no name has is refused."""
    for wrong in (1, -2):
        with pytest.raises(IndexError, match="row 1"):
            spread_strings(ints([0, wrong]), [b"a"])
