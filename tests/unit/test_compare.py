"""Comparison of two runs: intervals, verdicts, documents that are none, the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import luo
from luo.profile.compare import BadDocument, compare, interval, read
from luo.report import PHASES

MS = 1_000_000


def document(blackout, callbacks=None, **more):
    """Return a document with these milliseconds, one of each list an update."""
    runs = [
        {
            "phases_ns": dict.fromkeys(PHASES, 5 * MS) | {"blackout": round(ms * MS)},
            "callbacks_ns": {
                name: round(figures[place] * MS) for name, figures in (callbacks or {}).items()
            },
        }
        for place, ms in enumerate(blackout)
    ]
    return {"schema": "luo-run/1", "error": None, "runs": runs} | more


def rows(compared):
    """Return the rows by name."""
    return {row["name"]: row for row in compared["rows"]}


EIGHT = [10, 11, 12, 10.5, 11.5, 10.2, 11.2, 10.7]

# ---- intervals ----


@pytest.mark.parametrize(
    ("runs", "outside"), [(4, 0), (5, 2), (6, 5), (7, 8), (8, 13), (9, 17), (10, 23), (20, 127)]
)
def test_interval_ends_where_the_published_table_says(runs, outside):
    """Critical values of U, two-sided at 5 %, as in tables of Mann and Whitney's test."""
    before = np.arange(1, runs + 1) * 1000.0
    after = before * np.exp(np.linspace(0, 0.01, runs))
    ratios = np.sort(np.divide.outer(after, before).ravel())

    assert interval(before, after)[1:] == (ratios[outside], ratios[-1 - outside])


def test_interval_counted_out_and_approximated_agree():
    """101 runs a side are approximated by the normal distribution, 100 are not."""
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(10, 0.2, (2, 101))
    ends = np.array([interval(a[:n], b[:n])[1:] for n in (100, 101)])

    assert np.abs(np.diff(ends, axis=0)).max() < 0.01


def test_interval_of_too_few_runs_has_no_ends():
    """Of 3 and 3 runs every order is too likely for 95 %."""
    assert interval([1, 2, 3], [100, 200, 300]) == (100, None, None)


def test_interval_of_more_runs_than_can_be_paired_takes_some():
    """100,000 runs a side, within reasonable memory."""
    ratio, low, high = interval(np.full(100_000, 10), np.full(100_000, 20))

    assert (ratio, low, high) == (2, 2, 2)


def test_interval_counts_no_time_as_a_nanosecond():
    """A ratio of nothing to nothing is 1."""
    assert interval([0] * 5, [0] * 5) == (1, 1, 1)


# ---- verdicts ----


def test_compare_run_with_itself_is_no_difference():
    """Every row; the blackout comes first, and then the phases as they pass."""
    run = document(EIGHT, {"a/a/REBOOT": EIGHT, "b/b/REBOOT": [20] * 8})
    compared = compare(run, run, fail_slower=0.5)

    assert {row["verdict"] for row in compared["rows"]} == {"no difference"}
    assert [row["name"] for row in compared["rows"]] == [
        "blackout", *[name for name in PHASES if name != "blackout"], "b/b/REBOOT", "a/a/REBOOT",
    ]  # fmt: skip
    assert compared["warnings"] == compared["failed"] == compared["differences"] == []


def test_compare_slower_beyond_the_limit_fails_worst_first():
    """Faster ones and those within the limit do not; the same the other way round is faster."""
    a = document(EIGHT, {"a/a/REBOOT": EIGHT, "b/b/REBOOT": EIGHT})
    b = document(
        [ms * 2 for ms in EIGHT],
        {"a/a/REBOOT": [ms * 3 for ms in EIGHT], "b/b/REBOOT": [ms / 2 for ms in EIGHT]},
    )
    there, back = compare(a, b, fail_slower=0.5), compare(b, a, fail_slower=0.5)

    assert there["failed"] == ["a/a/REBOOT", "blackout"]
    assert rows(there)["blackout"]["ratio"] == pytest.approx(2, rel=0.01)
    assert rows(there)["blackout"]["low"] > 1.5
    assert rows(there)["b/b/REBOOT"]["verdict"] == rows(back)["blackout"]["verdict"] == "faster"
    assert back["failed"] == ["b/b/REBOOT"]


def test_compare_slower_than_the_limit_by_chance_warns_and_does_not_fail():
    """The interval goes beyond the limit, and does not begin there."""
    a, b = document(EIGHT), document([ms * 1.1 for ms in EIGHT])
    compared = compare(a, b, only=["blackout"], fail_slower=0.1)

    assert compared["failed"] == []
    assert compared["warnings"] == [
        "more than 10 % slower is not ruled out for blackout: more runs would tell"
    ]


def test_compare_callback_that_one_side_has_is_said_so():
    """New and lost callbacks have no ratio."""
    compared = rows(
        compare(document(EIGHT, {"a/a/REBOOT": EIGHT}), document(EIGHT, {"a/b/REBOOT": EIGHT}))
    )

    assert compared["a/a/REBOOT"]["verdict"] == "only in A"
    assert compared["a/b/REBOOT"]["verdict"] == "only in B"
    assert compared["a/b/REBOOT"]["ratio"] is compared["a/b/REBOOT"]["a_ns"] is None


def test_compare_too_few_runs_says_how_many_it_takes():
    """4 runs tell about one row, 5 about six phases, and 6 about 10 callbacks."""
    callbacks = {f"a/{number}/REBOOT": EIGHT for number in range(10)}
    compared = compare(document(EIGHT[:4], callbacks), document(EIGHT[:4], callbacks))

    assert rows(compared)["blackout"]["verdict"] == "no difference"
    assert compared["warnings"] == [
        "too few runs to tell about 6 phases: take 5 or more on both sides",
        "too few runs to tell about 10 callbacks: take 6 or more on both sides",
    ]
    five = compare(document(EIGHT[:5], callbacks), document(EIGHT[:5], callbacks))
    assert five["warnings"] == compared["warnings"][1:]
    six = compare(document(EIGHT[:6], callbacks), document(EIGHT[:6], callbacks))
    assert six["warnings"] == []


def test_compare_virtual_clock_without_noise_needs_one_run():
    """Equal figures in every run of both are exact."""
    a, b = (document([ms], clock="virtual") for ms in (10, 10.2))
    compared = compare(a, b, fail_slower=0.01)

    assert rows(compared)["blackout"]["low"] == pytest.approx(1.02)
    assert compared["failed"] == ["blackout"]
    assert compared["warnings"] == []


def test_compare_several_documents_takes_each_as_one_figure():
    """Its median; what differs between documents is then no difference between A and B."""
    rng = np.random.default_rng(3)

    def one(middle):
        return document((middle * rng.lognormal(0, 0.02, 20)).tolist())

    level = [10, 14, 9, 12, 8, 13]
    alone = compare(one(10), one(14))
    before, after = [one(ms) for ms in level], [one(ms) for ms in reversed(level)]
    several = compare(before, after)
    slower = compare(before, [one(2 * ms) for ms in level], fail_slower=0.1)

    assert rows(alone)["blackout"]["verdict"] == "slower"
    assert rows(several)["blackout"]["verdict"] == "no difference"
    assert slower["failed"] == ["blackout"]
    assert several["documents"] == {"a": 6, "b": 6}
    assert several["runs"] == {"a": 120, "b": 120}


def test_compare_document_that_drifts_is_warned_of():
    """Its first half is not like its second; a steady one is."""
    steady, drifting = document(EIGHT * 2), document([*EIGHT, *(2 * ms for ms in EIGHT)])

    (warning,) = compare(steady, drifting)["warnings"]
    assert warning.startswith("B is unsteady")
    assert compare(steady, steady)["warnings"] == []


def test_compare_only_takes_patterns_and_refuses_one_that_matches_nothing():
    """The names that there are are in the error."""
    run = document(EIGHT, {"a/a/REBOOT": EIGHT, "b/b/REBOOT": EIGHT})

    assert list(rows(compare(run, run, only=["b*/*", "boot"]))) == ["boot", "b/b/REBOOT"]
    with pytest.raises(ValueError, match=r"'c\*': none of blackout, .*b/b/REBOOT"):
        compare(run, run, only=["c*"])


def test_compare_names_what_differs_in_the_circumstances():
    """Host, devices, ABI, machine, clock, drivers; what one does not say is not judged."""
    a = document(
        EIGHT, source={"path": "cloud"}, devices={"total": 3000}, kho_abi="kho-v4", quirks=[],
        machine={"cpu": "A", "cores": 2}, settings={"modules": ["mine.py"]},
    )  # fmt: skip
    b = document(
        EIGHT, source={"path": "dense"}, devices={"total": 3000}, kho_abi="kho-v3",
        machine={"cpu": "A", "cores": 4}, clock="virtual",
    )  # fmt: skip

    assert compare(a, b)["differences"] == [
        {"what": "host", "a": "cloud", "b": "dense"},
        {"what": "KHO ABI", "a": "kho-v4", "b": "kho-v3"},
        {"what": "drivers", "a": ["mine.py"], "b": "built in"},
        {"what": "clock", "a": "wall", "b": "virtual"},
        {"what": "cores", "a": 2, "b": 4},
    ]


# ---- documents ----


BAD = {
    "empty": b"",
    "binary": b"\xff\xfe\0",
    "deep": b"[" * 100_000,
    "list": b"[]",
    "number": b"7",
    "no schema": b"{}",
    "other schema": b'{"schema": "luo-faults/1"}',
    "no runs": b'{"schema": "luo-run/1"}',
    "empty runs": b'{"schema": "luo-run/1", "runs": []}',
    "runs no list": b'{"schema": "luo-run/1", "runs": {"a": 1}}',
    "run no object": b'{"schema": "luo-run/1", "runs": [1]}',
    "no callbacks": b'{"schema": "luo-run/1", "runs": [{"phases_ns": {}}]}',
    **{
        f"time {value}": b'{"schema": "luo-run/1", "runs": [{"callbacks_ns": {}, "phases_ns": '
        b'{"boot": %b}}]}' % value.encode()
        for value in ("null", '"1"', "true", "-1", "NaN", "Infinity", "1e30", "[1]")
    },
    "failed": b'{"schema": "luo-run/1", "error": {"message": "mlx5 failed"}, "runs": []}',
    "failed oddly": b'{"schema": "luo-run/1", "error": 7, "runs": []}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=list(BAD))
def test_read_of_what_is_no_document_is_bad_document(content, tmp_path):
    """One line with the file's name."""
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(BadDocument) as error:
        read(path)

    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


# ---- the command ----


def luo_compare(*arguments, cwd, columns=100):
    """Run ``python -m luo compare`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "luo", "compare", *map(str, arguments)],
        cwd=cwd,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            "PYTHONPATH": str(Path(luo.__file__).parents[1]),
            "COLUMNS": str(columns),
        },
        text=True,
        capture_output=True,
        timeout=60,
    )


@pytest.fixture
def files(tmp_path):
    """Two documents: B has twice the blackout, and of 30 callbacks one is slower."""
    callbacks = {f"devices/driver{number}/REBOOT": EIGHT for number in range(30)}
    slower = callbacks | {"devices/driver7/REBOOT": [ms * 2 for ms in EIGHT]}
    a = document(EIGHT, callbacks, source={"path": "cloud"})
    b = document([ms * 2 for ms in EIGHT], slower, source={"path": "dense"})
    for name, content in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_compare_command_without_limit_is_status_0(files):
    """Slower is said, and nothing fails; callbacks without difference are one line."""
    done = luo_compare("a.json", "b.json", cwd=files)

    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[0]: line.rstrip() for line in done.stdout.splitlines() if line.strip()}
    assert lines["blackout"].endswith("slower")
    assert "+100.0 %" in lines["blackout"]
    assert lines["devices/driver7/REBOOT"].endswith("slower")
    assert "devices/driver8/REBOOT" not in lines
    assert "callbacks left out: no difference (29)" in done.stdout
    assert "not the same host: A cloud, B dense" in done.stdout


def test_compare_command_over_the_limit_is_status_3_with_the_culprits(files):
    """The other way round B is faster, and the status 0."""
    there = luo_compare("a.json", "b.json", "--fail-slower", "10%", cwd=files)
    back = luo_compare("b.json", "a.json", "--fail-slower", "10%", cwd=files)
    only = luo_compare("a.json", "b.json", "--fail-slower", "10 %", "--only", "boot", cwd=files)

    assert there.returncode == 3
    told = there.stdout.partition("more than 10 % slower:")[2].split()
    assert set(told[::3]) == {"blackout:", "devices/driver7/REBOOT:"}
    assert (back.returncode, only.returncode) == (0, 0)
    assert "nothing is more than 10 % slower with confidence" in back.stdout


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_compare_command_cuts_no_figure_on_any_screen(columns, files):
    """Every line fits, verdicts and changes are whole."""
    done = luo_compare("a.json", "b.json", "--all", cwd=files, columns=columns)
    lines = [line for line in done.stdout.splitlines() if line.rstrip().endswith("slower")]

    assert max(map(len, done.stdout.splitlines())) <= columns
    assert len(lines) == 2
    assert all("+100.0 %" in line for line in lines)


def test_compare_command_json_has_standard_output_for_itself(files):
    """``luo-compare/1`` there, the screen on standard error; as a file beside the screen."""
    done = luo_compare("a.json", "b.json", "--fail-slower=5%", "--json", "-", cwd=files)
    filed = luo_compare("a.json", "b.json", "--json", "out.json", cwd=files)
    compared = json.loads(done.stdout)

    assert done.returncode == 3
    assert compared["schema"] == "luo-compare/1"
    assert compared["failed"] == [row["name"] for row in compared["rows"] if row["low"] > 1.05]
    assert "slower" in done.stderr
    assert filed.returncode == 0
    assert json.loads((files / "out.json").read_text())["rows"] == compared["rows"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.json", "none.json"], "does not exist"),
        (["a.json", "."], "directory"),
        ([], "A.json B.json"),
        (["a.json"], "A.json B.json"),
        (["a.json", "b.json", "a.json"], "A.json B.json"),
        (["a.json", "bad.json"], "bad.json: not a luo-run/1 document"),
        (["a.json", "b.json", "--fail-slower", "fast"], "'fast': a percentage"),
        (["a.json", "b.json", "--fail-slower", "0.1"], "a percentage"),
        (["a.json", "b.json", "--fail-slower", "-1%"], "a percentage"),
        (["a.json", "b.json", "--only", "c/*"], "none of blackout"),
        (["a.json", "b.json", "--json", "none/out.json"], "No such file"),
    ],
)
def test_compare_command_given_wrong_input_is_one_line_and_status_2(arguments, said, files):
    """Which file or option, and what is wrong with it."""
    (files / "bad.json").write_text("[1, 2]")
    done = luo_compare(*arguments, cwd=files)

    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.startswith("luo: ")
    assert done.stderr.count("\n") == 1
