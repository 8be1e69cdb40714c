"""Budgets: what is judged, which names there are, and what is said of what is over."""

import pickle

import pytest

import luo
from luo.report import PHASES, Report

MS = 1_000_000


def report(*runs):
    """Return the report of updates with these figures in ms: blackout, then callbacks by name."""
    made = Report()
    for blackout, callbacks in runs:
        phases = dict.fromkeys(PHASES, 0) | {"blackout": blackout * MS}
        made.runs.append(
            {
                "phases_ns": phases,
                "devices": {},
                "callbacks_ns": {name: ns * MS for name, ns in callbacks.items()},
            }
        )
    return made


CALLBACKS = {
    "kvm/kvm/RESTORE": 30,
    "devices/nvme/RESTORE": 5,
    "devices/virtio/RESTORE": 2,
    "devices/nvme/REBOOT": 1,
    "devices/nvme/PREPARE": 90,
}


def test_check_within_budget_says_nothing():
    """A figure may be as large as its budget, as text or in nanoseconds."""
    report((40, CALLBACKS)).check(
        {
            "blackout": "40ms",
            "devices/nvme/REBOOT": 1 * MS,
            "devices/RESTORE": "7ms",
            "finish": "0ns",
        }
    )


def test_check_over_budget_names_the_worst_first_and_its_dearest_callbacks():
    """Each figure beside its budget, and what it is made of, without callbacks of other phases."""
    with pytest.raises(AssertionError) as over:
        report((40, CALLBACKS)).check(
            {"blackout": "30ms", "devices/RESTORE": "1ms", "devices/nvme/REBOOT": "1ms"}
        )

    assert isinstance(over.value, luo.BudgetError)
    assert over.value.over == {
        "devices/RESTORE": (7 * MS, 1 * MS),
        "blackout": (40 * MS, 30 * MS),
    }
    assert str(over.value).splitlines() == [
        "over budget, by the 95th percentile of 1:",
        "devices/RESTORE: 7.000 ms, the budget is 1.000 ms",
        "    devices/nvme/RESTORE: 5.000 ms",
        "    devices/virtio/RESTORE: 2.000 ms",
        "blackout: 40.000 ms, the budget is 30.000 ms",
        "    kvm/kvm/RESTORE: 30.000 ms",
        "    devices/nvme/RESTORE: 5.000 ms",
        "    devices/virtio/RESTORE: 2.000 ms",
    ]


def test_budget_error_can_be_pickled():
    """Suites that run in several processes send what failed to one of them."""
    with pytest.raises(luo.BudgetError) as over:
        report((40, {})).check({"blackout": "1ms"})
    copy = pickle.loads(pickle.dumps(over.value))

    assert (str(copy), copy.over) == (str(over.value), over.value.over)


@pytest.mark.parametrize(
    ("slow", "updates", "judged"), [(1, 19, 50), (1, 20, 10), (2, 20, 50), (1, 1, 50)]
)
def test_check_judges_the_95th_percentile(slow, updates, judged):
    """One slow update of 20 is forgiven, the slowest of fewer counts, and so does the second."""
    made = report(*[(50, {})] * slow, *[(10, {})] * (updates - slow))

    made.check({"blackout": judged * MS})
    with pytest.raises(luo.BudgetError, match=f"blackout: {judged}"):
        made.check({"blackout": judged * MS - 1})


def test_check_callback_that_only_some_updates_had_counts_nothing_in_the_others():
    """19 updates without it, and one with it: the 95th percentile is nothing."""
    report(*[(1, {})] * 19, (1, {"devices/nvme/REBOOT": 7})).check({"devices/nvme/REBOOT": 0})


@pytest.mark.parametrize(
    "name", ["", "blackouts", "devices", "devices/nvme", "devices/nvme/CANCEL", "nvme/RESTORE"]
)
def test_check_unknown_name_is_value_error_that_has_the_known_ones(name):
    """A budget that holds nothing to anything is a mistake."""
    with pytest.raises(ValueError, match=r"none of prepare, .*blackout.*devices/nvme/REBOOT"):
        report((40, CALLBACKS)).check({name: "1s"})


@pytest.mark.parametrize("limit", ["fast", "40", "-1ms", -1])
def test_check_limit_that_is_no_duration_is_value_error(limit):
    """Text has its unit, and nothing takes less than no time."""
    with pytest.raises(ValueError, match="duration"):
        report((40, CALLBACKS)).check({"boot": limit})


def test_check_without_an_update_is_value_error():
    """Nothing has been measured, so nothing is within a budget."""
    with pytest.raises(ValueError, match="no update"):
        Report().check({"blackout": "1s"})
