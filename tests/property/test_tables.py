"""Histograms against exact percentiles; the tree by cost against a walk of it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import luo
from luo._kho import CallRecorder
from luo.profile.tables import Profile, subtrees

QUANTILES = (0, 0.25, 0.5, 0.9, 0.95, 0.99, 0.999, 1)
#: 10 ns to 100 s, evenly on a scale of logarithms.
DURATIONS = st.floats(1, 11).map(lambda exponent: round(10**exponent))


@given(st.lists(DURATIONS, min_size=1, max_size=400))
def test_percentiles_of_any_durations_are_good_to_1_percent(durations):
    """Those of the histogram against those of the sorted durations; count, sum and ends exact."""
    recorder = CallRecorder()
    key = recorder.key("devices", "REBOOT", "driver", "nvme")
    for ns in durations:
        recorder.add(key, ns)
    profile, ordered = Profile(recorder), sorted(durations)
    (row,) = profile.rows(quantiles=QUANTILES)

    for q in QUANTILES:
        exact = ordered[min(int(q * len(ordered)), len(ordered) - 1)]
        assert row[f"p{100 * q:g}_ns"] == pytest.approx(exact, rel=0.01)
    assert (row["calls"], row["total_ns"]) == (len(ordered), sum(ordered))
    assert (row["min_ns"], row["max_ns"]) == (ordered[0], ordered[-1])


@given(st.lists(DURATIONS, min_size=1, max_size=100))
def test_buckets_hold_every_duration_once(durations):
    """Each is in the bucket that has it, no wider than 1/64 of it, or a nanosecond."""
    recorder = CallRecorder()
    key = recorder.key("devices", "REBOOT", "driver", "nvme")
    for ns in durations:
        recorder.add(key, ns)
    buckets = Profile(recorder).histogram(("devices", "REBOOT", "driver", "nvme"))

    assert [sum(low <= ns < high for ns in durations) for low, high, _ in buckets] == [
        calls for _, _, calls in buckets
    ]
    assert sum(calls for _, _, calls in buckets) == len(durations)
    assert all(high - low <= max(1, low / 64) for low, high, _ in buckets)


@pytest.mark.parametrize("ns", [10, 127, 128, 129, 10**9, 10**11 - 1, 10**11])
def test_one_duration_is_its_own_percentile(ns):
    """At both ends of the range, and where buckets get wider than a nanosecond."""
    recorder = CallRecorder()
    recorder.add(recorder.key("a", "REBOOT", "subsystem", "a"), ns)
    (row,) = Profile(recorder).rows()

    assert row["p50_ns"] == row["p99_ns"] == ns


@given(st.data())
def test_groups_and_merged_profiles_add_up(data):
    """By subsystem, driver, bus and event: every call is in one row, and every nanosecond."""
    labels = st.tuples(
        st.sampled_from(["devices", "kvm"]),
        st.sampled_from(["PREPARE", "REBOOT", "RESTORE"]),
        st.sampled_from(["driver", "bus", "subsystem"]),
        st.sampled_from(["nvme", "pci", "kvm"]),
    )
    calls = data.draw(st.lists(st.tuples(labels, st.integers(0, 10**9)), max_size=60))
    parts = [CallRecorder(spans=100) for _ in range(3)]
    for label, ns in calls:
        recorder = data.draw(st.sampled_from(parts))
        recorder.add(recorder.key(*label), ns)
    profile = Profile.merged([Profile(recorder, None, 1000) for recorder in parts])

    assert profile.blackout_ns == 3000
    assert sorted((profile.labels[span["key"]], span["ns"]) for span in profile.spans) == sorted(
        calls
    )
    total = sum(ns for _, ns in calls)
    dark = sum(ns for label, ns in calls if label[1] != "PREPARE")
    for by in ("callback", "subsystem", "event"):
        table = profile.table(by)
        assert (table["calls"].sum(), table["total_ns"].sum()) == (len(calls), total)
        assert table["blackout_ns"].sum() == dark
        assert math.isclose(table["blackout_share"].sum(), dark / 3000)
    for by in ("driver", "bus"):
        mine = [(label, ns) for label, ns in calls if label[2] == by]
        table = profile.table(by)
        assert {tuple(row) for row in table[["subsystem", "name"]].tolist()} == {
            (label[0], label[3]) for label, _ in mine
        }
        assert table["total_ns"].sum() == sum(ns for _, ns in mine)
        assert (np.diff(table["total_ns"]) <= 0).all()


@given(
    above=st.lists(st.integers(-1, 100), min_size=1, max_size=100),
    most=st.integers(1, 80),
    seed=st.integers(0, 1000),
)
def test_subtrees_add_up_to_what_a_walk_finds(above, most, seed):
    """Each row has its device and everything below; what has no row is in its siblings'."""
    tree = luo.DeviceTree()
    for number, parent in enumerate(above):
        tree.add(f"d{number}", parent=None if parent < 0 or not number else parent % number)
    costs = np.random.default_rng(seed).integers(0, 5, (2, len(above))).astype(np.float32)
    parents = tree.parents.tolist()

    def below(number):
        return [number, *(i for child in kids(number) for i in below(child))]

    def kids(number):
        return [i for i, parent in enumerate(parents) if parent == number]

    rows = subtrees(tree, costs, most)

    assert len(rows) <= max(most, 2)
    assert rows[0]["path"] == ""
    assert rows[0]["parent"] is None
    assert [rows[0][name] for name in ("devices", "total_ns", "blackout_ns")] == [
        len(above), costs.sum(), costs[1].sum(),
    ]  # fmt: skip
    for row in rows[1:]:
        parent = -1 if row["parent"] == "" else tree[row["parent"]]
        assert row["parent"] in {one["path"] for one in rows}
        if row["path"].endswith("/…"):
            shown = {one["path"] for one in rows if one["parent"] == row["parent"]}
            members = [i for kid in kids(parent) if tree.path(kid) not in shown for i in below(kid)]
        else:
            assert parents[tree[row["path"]]] == parent
            members = below(tree[row["path"]])
        assert row["devices"] == len(members) > 0
        assert row["total_ns"] == costs[:, members].sum()
        assert row["blackout_ns"] == costs[1, members].sum()
    for parent in {row["parent"] for row in rows[1:]}:
        whole = sum(row["devices"] for row in rows[1:] if row["parent"] == parent)
        (row,) = [row for row in rows if row["path"] == parent]
        assert whole == row["devices"] - (parent != "")
