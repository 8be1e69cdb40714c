"""How often a comparison is wrong, and how often it sees what is there, with made-up runs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luo.profile.compare import compare, interval
from luo.report import PHASES

TRIALS = 400

#: How runs scatter: evenly, with a long tail, or with one in ten five times as long.
SCATTER = {
    "lognormal": lambda rng, n: rng.lognormal(0, 0.1, n),
    "gamma": lambda rng, n: rng.gamma(4, 0.25, n),
    "spikes": lambda rng, n: rng.lognormal(0, 0.05, n) * np.where(rng.random(n) < 0.1, 5, 1),
}


def run(rng, scatter, runs, slower=1.0, callbacks=30):
    """Return a document of *runs* updates, all of it *slower* by this factor."""
    names = [f"devices/driver{number}/REBOOT" for number in range(callbacks)]
    times = scatter(rng, (len(PHASES) + callbacks) * runs).reshape(runs, -1) * 1e6 * slower
    return {
        "schema": "luo-run/1",
        "runs": [
            {
                "phases_ns": dict(zip(PHASES, one, strict=False)),
                "callbacks_ns": dict(zip(names, one[len(PHASES) :], strict=True)),
            }
            for one in times.tolist()
        ],
    }


@pytest.mark.parametrize("scatter", SCATTER.values(), ids=list(SCATTER))
@pytest.mark.parametrize("runs", [(5, 5), (20, 20), (8, 30), (100, 100)])
def test_interval_misses_the_true_ratio_as_rarely_as_it_says(runs, scatter):
    """In 5 % of trials at the most; 4 standard deviations of the binomial are chance."""
    rng = np.random.default_rng(6)
    misses = 0
    for _ in range(TRIALS):
        _, low, high = interval(1e6 * scatter(rng, runs[0]), 1.3e6 * scatter(rng, runs[1]))
        misses += not low <= 1.3 <= high

    assert misses <= TRIALS * 0.05 + 4 * (TRIALS * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("scatter", SCATTER.values(), ids=list(SCATTER))
@pytest.mark.parametrize("runs", [8, 20])
def test_compare_equal_runs_rarely_differ_in_any_row_and_do_not_fail(runs, scatter):
    """In 5 % of comparisons a family; with a limit of 10 % next to none."""
    rng = np.random.default_rng(7)
    differ, fail, trials = {"blackout": 0, "phase": 0, "callback": 0}, 0, 100
    for _ in range(trials):
        compared = compare(run(rng, scatter, runs), run(rng, scatter, runs), fail_slower=0.1)
        different = {
            "blackout" if row["name"] == "blackout" else row["kind"]
            for row in compared["rows"]
            if row["verdict"] != "no difference"
        }
        for family in different:
            differ[family] += 1
        fail += bool(compared["failed"])

    assert max(differ.values()) <= trials * 0.05 + 4 * (trials * 0.05 * 0.95) ** 0.5
    assert fail <= 5


@pytest.mark.parametrize(
    ("scatter", "runs", "slower", "power"),
    [
        ("lognormal", 5, 2.0, 0.95),
        ("lognormal", 8, 1.5, 0.95),
        ("lognormal", 20, 1.3, 0.95),
        ("lognormal", 100, 1.2, 0.95),
        ("spikes", 20, 1.3, 0.95),
        ("gamma", 20, 3.0, 0.95),
    ],
)
def test_compare_sees_a_slower_blackout(scatter, runs, slower, power):
    """With 10 % of scatter, 20 runs show 30 % to be more than 10 %."""
    rng = np.random.default_rng(8)
    trials, seen = 60, 0
    for _ in range(trials):
        a = run(rng, SCATTER[scatter], runs, callbacks=0)
        b = run(rng, SCATTER[scatter], runs, slower, callbacks=0)
        seen += "blackout" in compare(a, b, fail_slower=0.1)["failed"]

    assert seen >= trials * power


@given(
    a=st.lists(st.integers(0, 10**12), min_size=1, max_size=30),
    b=st.lists(st.integers(0, 10**12), min_size=1, max_size=30),
    factor=st.integers(1, 1000),
)
def test_interval_of_any_runs_is_around_its_ratio_and_turns_round(a, b, factor):
    """B to A is one over A to B, and B n times as long has n times the ratio."""
    ratio, low, high = interval(a, b)
    other, other_low, other_high = interval(b, a)

    assert other == pytest.approx(1 / ratio)
    assert (low is None) == (high is None) == (other_low is None)
    if low is not None:
        assert low <= ratio * (1 + 1e-12)
        assert ratio <= high * (1 + 1e-12)
        assert (other_low, other_high) == (pytest.approx(1 / high), pytest.approx(1 / low))
    longer = interval(np.maximum(a, 1), factor * np.maximum(b, 1))
    assert longer[0] == pytest.approx(factor * ratio)
