"""``luo run --benchmark-json``: pytest-benchmark's own figures, read by its own command."""

import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import luo
from luo.profile.benchmark import stats
from luo.report import PHASES

from .test_cli import ENVIRONMENT, drivers, host, luo_run  # noqa: F401

DURATIONS = st.lists(
    st.one_of(st.integers(0, 20), st.integers(0, 10**11)).map(lambda ns: ns / 1e9),
    min_size=1,
    max_size=60,
)


@given(DURATIONS)
def test_stats_are_those_of_pytest_benchmark(seconds):
    """Every field, to the last bit; before 5.3 its hd15iqr was the lowest outlier."""
    theirs = pytest.importorskip("pytest_benchmark.stats").Stats()
    for one in seconds:
        theirs.update(one)

    fence = theirs.q3 + 1.5 * theirs.iqr
    mended = {"hd15iqr": max(one for one in seconds if one <= fence)}

    assert stats(seconds) == theirs.as_dict() | mended | {"data": seconds, "iterations": 1}


@pytest.fixture
def saved(host, tmp_path):  # noqa: F811
    """Two files of three updates each, and the documents of the same runs."""
    made = []
    for name in ("before", "after"):
        files = (tmp_path / f"{name}.json", tmp_path / f"{name}-run.json")
        done = luo_run(
            "--host", host, "--in-process", "--repeat", 3,
            "--benchmark-json", files[0], "--json", files[1], cwd=tmp_path,
        )  # fmt: skip

        assert done.returncode == 0, done.stderr
        made.append((files[0], json.loads(files[1].read_text())))
    return made


def test_benchmarks_are_the_phases_of_all_updates(saved):
    """A benchmark a phase, a round an update, in seconds; what was updated is beside it."""
    for path, run in saved:
        document = json.loads(path.read_text())
        found = {one["group"]: one for one in document["benchmarks"]}

        assert set(found) == {f"liveupdate.{phase}" for phase in PHASES}
        for phase in PHASES:
            one = found[f"liveupdate.{phase}"]
            spent = [each["phases_ns"][phase] for each in run["runs"]]
            assert one["stats"]["rounds"] == 3
            assert [round(seconds * 1e9) for seconds in one["stats"]["data"]] == spent
            info = one["extra_info"]
            assert info["devices"] == run["devices"]["total"] == 60
            assert info["state_bytes"] == run["devices"]["state_bytes"] > 0
            assert (info["abi"], info["behaviour"]) == ("kho-v4", "intended")
            assert info["versions"]["luo"] == luo.__version__


def test_pytest_benchmark_compares_two_files(saved, tmp_path):
    """The command shows each phase once for each file, and warns of nothing."""
    pytest.importorskip("pytest_benchmark")
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", "--columns=min,median,rounds",
         "--csv=compared.csv", *(str(path) for path, _ in saved)],
        cwd=tmp_path, text=True, capture_output=True, timeout=60,
    )  # fmt: skip

    assert (done.returncode, done.stderr.strip()) == (0, "Generated csv: compared.csv")
    for phase in PHASES:
        assert f"benchmark 'liveupdate.{phase}': 2 tests" in done.stdout
    rows = (tmp_path / "compared.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(PHASES)


def test_document_has_the_keys_of_pytest_benchmark(saved, tmp_path):
    """Of the document, of the machine and of a benchmark, but for the CPU, which is its own."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "test_one.py").write_text("def test_one(benchmark):\n    benchmark(int)\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider",
         "--benchmark-json=theirs.json", "--benchmark-max-time=0.01", "test_one.py"],
        cwd=tmp_path, text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    ours = json.loads(saved[0][0].read_text())

    assert set(ours) == set(theirs)
    assert set(ours["machine_info"]) == set(theirs["machine_info"])
    assert set(ours["commit_info"]) == set(theirs["commit_info"])
    one, other = ours["benchmarks"][0], theirs["benchmarks"][0]
    assert set(one) == set(other)
    assert set(one["stats"]) == {*other["stats"], "data"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_that_of_the_directory(host, tmp_path):  # noqa: F811
    """The user's own repository, with changes that are in no commit; outside one, no commit."""
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b"]
    for command in (["init", "-qb", "trunk"], ["add", "."], ["commit", "-qm", "drivers"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    found = []
    for change in ("", "# changed\n"):
        host.write_text(host.read_text() + change)
        done = luo_run("--host", host, "--in-process", "--benchmark-json", "-", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout)["commit_info"])
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True)

    assert [one["dirty"] for one in found] == [False, True]
    for one in found:
        assert (one["id"], one["branch"]) == (commit.strip(), "trunk")
        assert one["project"] == tmp_path.name
        assert one["time"]


def test_failed_update_has_no_benchmarks(host, tmp_path):  # noqa: F811
    """What failed is no figure; the exit status is 1 and the file valid."""
    mine = drivers(
        tmp_path,
        """
        def busy(context):
            raise OSError(errno.EBUSY, "on purpose")
        late = luo.Subsystem("late", reboot=busy)
        """,
    )
    done = luo_run(
        "--host", host, "--drivers", mine, "--in-process", "--benchmark-json", "-", cwd=tmp_path
    )

    assert done.returncode == 1
    assert json.loads(done.stdout)["benchmarks"] == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--json", "-", "--benchmark-json", "-"], "standard output"),
        (["--dry-reboot", "--benchmark-json", "-"], "--dry-reboot"),
        (["--benchmark-json", "no/such/file"], "--benchmark-json no/such/file"),
    ],
)
def test_wrong_usage_is_one_line(arguments, named, host, tmp_path):  # noqa: F811
    """Before anything has run."""
    done = luo_run("--host", host, *arguments, cwd=tmp_path)

    assert done.returncode == 2
    assert named in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
