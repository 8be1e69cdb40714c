"""Exports of any document, and traces of any spans: a file or one line, and nothing lost."""

import contextlib
import copy
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.test_export import a_document, a_row
from unit.test_trace import as_chrome, as_perfetto, one_kernel

from luo.cli.errors import Wrong
from luo.cli.export import export
from luo.profile import trace

WHOLE = a_document(
    a_row("PREPARE", 8_000, devices=4, max_device="pci0/a", histogram=[[1, 2, 3], [9, 10, 1]]),
    timeline={
        "begin_ns": 5,
        "kernels": [{"name": "old kernel", "phases": [["prepare", 0, 9], ["reboot", 9, 12]]}],
        "blackout": [9, 12],
    },
    worst_devices=[{"path": "a", "driver": "b", "bus": None, "total_ns": 3, "blackout_ns": 1}],
    subtrees=[{"path": "", "parent": None, "total_ns": 3, "blackout_ns": 1}],
    failures=[],
)


def places(value, path=()):
    """Yield where there is something in *value*."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.just("\udcff"), st.just([]), st.just({}), st.just([[]]), st.just({"a": 1}),
)  # fmt: skip


@given(where=st.sampled_from(list(places(WHOLE))[1:]), value=VALUES)
def test_any_document_is_exported_or_refused(tmp_path_factory, where, value):
    """Whatever stands anywhere in it: never a traceback, and no half file."""
    document = copy.deepcopy(WHOLE)
    inner = document
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    here = tmp_path_factory.mktemp("export")
    (here / "run.json").write_text(json.dumps(document))
    files = {
        "--trace": "a.pftrace", "--folded": "folded", "--folded-tree": "tree", "--prometheus": "p",
    }  # fmt: skip
    options = [word for option, name in files.items() for word in (option, str(here / name))]
    with contextlib.suppress(Wrong):
        export.main([str(here / "run.json"), *options], standalone_mode=False)

    assert {path.name for path in here.iterdir()} <= {"run.json", *files.values()}


SPANS = st.lists(
    st.tuples(
        st.integers(1_000_000_000, 1_000_000_100), st.integers(0, 30), st.integers(0, 3),
        st.integers(-1, 3), st.integers(0, 3), st.integers(0, 2),
    ),
    max_size=30,
)  # fmt: skip


@given(spans=SPANS, most=st.integers(0, 30))
def test_any_spans_are_drawn_alike_and_without_overlap(spans, most):
    """The longest of them, in both formats, none partly over another."""
    pytest.importorskip("luo.profile.perfetto", reason="needs the package perfetto")
    drawn = trace.from_report(one_kernel(spans), most)
    lanes, _ = as_perfetto(drawn)

    assert as_chrome(drawn)[0] == lanes
    for counter in drawn.processes[1].counters:
        times = [ns for ns, _ in counter.points]
        assert times == sorted(set(times))
        assert counter.points[-1][1] == 0
    shown = []
    for (_, lane), slices in lanes.items():
        if lane.startswith(("subsystems", "devices")):
            shown += [end - begin for _, begin, end, _ in slices]
            slices = sorted(slices, key=lambda one: one[1:3])
            assert all(a[2] <= b[1] for a, b in pairwise(slices))
    assert sorted(shown) == sorted(ns for _, ns, *_ in spans)[max(0, len(spans) - most) :]
