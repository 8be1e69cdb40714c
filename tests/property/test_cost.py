"""Cost models: any model comes back from its file, and no file does more than be refused."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luo.profile.cost import EVENTS, PHASES, CostModel, Distribution, Rule

times = st.one_of(st.integers(0, 10**15), st.floats(0, 1e15))
small = st.floats(0, 20)
distributions = st.one_of(
    st.builds(lambda a, b: Distribution("uniform", (min(a, b), max(a, b))), times, times),
    st.builds(lambda mean: Distribution("exponential", (mean,)), times),
    st.builds(lambda *values: Distribution("normal", values), times, times),
    st.builds(lambda *values: Distribution("lognormal", values), times, small),
    st.lists(st.tuples(times, st.integers(1, 1000)), min_size=1, max_size=8).map(
        lambda points: Distribution(
            "histogram", tuple((at, at, count) for at, count in sorted(points))
        )
    ),
)
rules = st.one_of(
    st.builds(Rule, times, times),
    st.builds(Rule, times, times, distributions, st.integers(0, 1 << 20)),
)
words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0\r\n"), min_size=1, max_size=8
).filter(lambda word: word != "engine")
names = st.one_of(
    st.sampled_from(EVENTS),
    st.builds("engine/{}".format, st.sampled_from(sorted(PHASES))),
    st.builds("{}/{}".format, words, st.sampled_from(EVENTS)),
    st.builds("{}/{}/{}".format, words, words, st.sampled_from(EVENTS)),
)


@given(
    rules=st.dictionaries(names, rules, max_size=6),
    default=rules,
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    devices=st.integers(0, 1 << 24),
)
def test_any_model_comes_back_from_its_file(tmp_path_factory, rules, default, seed, devices):
    """The same rules, and the same draws, which fit a recorder's 64 bits."""
    model = CostModel(rules, default=default, seed=seed)
    path = tmp_path_factory.mktemp("cost") / "cost.toml"
    model.save(path)
    again = CostModel.load(path)

    assert again == model
    label = ("devices", "REBOOT", "driver", "nic")
    drawn = [model.draw(label, devices) for _ in range(3)]
    assert drawn == [again.draw(label, devices) for _ in range(3)]
    assert all(0 <= ns <= 10**15 for ns in drawn)


LETTERS = 'name,us;\t|\n\r"#0123456789.REBOT/ e-+µs\x00devicount'
csvish = st.text(st.sampled_from(LETTERS), max_size=80)


@given(text=st.one_of(st.text(max_size=60), csvish, csvish.map("name,ns\n".__add__)))
def test_any_csv_is_read_or_refused(text):
    """With the line, and nothing but ValueError."""
    why = "csv: "
    try:
        CostModel.from_csv(io.StringIO(text))
    except ValueError as error:
        why = str(error)

    assert why.startswith("csv: ")


jsonish = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.sampled_from(["REBOOT", "devices", "luo-run/1"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([
        "subsystem", "event", "kind", "name", "calls", "devices", "total_ns", "histogram",
        "phases_ns", "callbacks_ns", "min_ns", "max_ns", "jump"]), inner, max_size=8),
    max_leaves=12,
)  # fmt: skip


@given(callbacks=st.lists(jsonish, max_size=3), runs=jsonish, good=st.booleans())
def test_any_document_is_read_or_refused(callbacks, runs, good):
    """With the key, and nothing but ValueError."""
    row = {"subsystem": "a", "event": "REBOOT", "name": "b", "calls": 1, "total_ns": 5}
    rows = [row | one if good and isinstance(one, dict) else one for one in callbacks]
    document = json.loads(json.dumps({"schema": "luo-run/1", "callbacks": rows, "runs": runs}))
    why = "run: "
    try:
        CostModel.from_run(document)
    except ValueError as error:
        why = str(error)

    assert why.startswith("run: ")


def test_distribution_functions_are_monotone():
    """More of the calls, no less of the time: what an inverse is."""
    for kind, values in (
        ("uniform", (1, 5)),
        ("exponential", (9,)),
        ("normal", (3, 1)),
        ("lognormal", (3, 2)),
        ("histogram", ((1, 2, 5), (2, 9, 1), (9, 9, 3))),
    ):
        find = Distribution(kind, values).inverse()
        drawn = [find(step / 1000) for step in range(1, 1000)]

        assert drawn == sorted(drawn), kind
    with pytest.raises(KeyError):
        Distribution.parameters("pareto")
