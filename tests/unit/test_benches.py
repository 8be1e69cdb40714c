"""What benches/ says: the page is made of the run that is kept, ratios and skips are as written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHES = ROOT / "benches"


@pytest.fixture(autouse=True)
def benches_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHES)


def entry(role, seconds, row="map.call", size=("ordered", 10), **info):
    """Return an entry as report.condense() leaves it."""
    return {
        "row": row, "size": list(size), "role": role, "items": 10, "bytes": 1,
        "min": seconds, "median": 2 * seconds, "iqr": 0.0, "rounds": 5, "shape": "ordered",
    } | info  # fmt: skip


def run_of(*entries):
    return {
        "date": "2026-01-01", "command": "make bench", "commit": "0123456789ab",
        "machine": {"cpu": "a CPU", "cores": 2, "memory": 1 << 30, "system": "Linux 6"},
        "versions": {}, "entries": list(entries),
    }  # fmt: skip


def saved_json(path, **seconds):
    """Write a run as pytest-benchmark saves it, one row of two contenders."""
    path.parent.mkdir(exist_ok=True)
    stats = [
        {
            "params": {"size": ["ordered", 10]},
            "stats": {"min": took, "median": took, "iqr": 0.0, "rounds": 5},
            "extra_info": {"row": "map.call", "role": role.replace("_", " "), "items": 10,
                           "bytes": 1, "shape": "ordered"},
        }
        for role, took in seconds.items()
    ]  # fmt: skip
    machine = {
        "processor": "x86_64", "system": "Linux", "release": "6.1-a", "cpu": {"count": 2},
        "luo": {"memory": 1 << 30, "versions": {}},
    }  # fmt: skip
    path.write_text(
        json.dumps(
            {"datetime": "2026-01-01T00:00:00", "machine_info": machine, "benchmarks": stats,
             "commit_info": {"id": "0" * 40, "dirty": False}}
        )
    )  # fmt: skip


def test_page_and_readme_have_the_figures_of_the_kept_run():
    """Nobody writes a figure by hand: both are what report.py makes of docs/benchmarks/run.json."""
    import report

    run = json.loads((report.BESIDE / "run.json").read_text())
    readme = report.README.read_text()

    assert report.PAGE.read_text() == report.page(run)
    assert report.quoted(readme, report.block(run)) == readme
    for name in ("cost-per-device", "phase-shares", "map-by-density", "map-by-generation"):
        assert f"benchmarks/{name}.svg" in report.page(run)
        assert (report.BESIDE / f"{name}.svg").is_file()


def test_report_of_the_same_run_twice_writes_the_same_bytes(tmp_path):
    """Plots have no date and no random names in them."""
    pytest.importorskip("matplotlib")
    for name in ("one", "other"):
        (tmp_path / name / "benchmarks").mkdir(parents=True)
        kept = tmp_path / name / "benchmarks" / "run.json"
        kept.write_text((ROOT / "docs" / "benchmarks" / "run.json").read_text())
        subprocess.run(
            [sys.executable, BENCHES / "report.py", "--into", tmp_path / name],
            check=True, capture_output=True, cwd=tmp_path,
            env={"PYTHONPATH": str(BENCHES), "HOME": str(tmp_path)},
        )  # fmt: skip

    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("one", "other")
    )

    assert one == other
    assert sorted(one) == [
        "benchmarks.md", "cost-per-device.svg", "map-by-density.svg", "map-by-generation.svg",
        "phase-shares.svg", "run.json", "two-apis.md",
    ]  # fmt: skip


def test_ratio_with_a_bare_loop_subtracts_it_from_both():
    """5 less 1 over 3 less 1: the loop is nobody's work."""
    import report

    run = run_of(
        entry("luo", 5.0, less="bare loop"),
        entry("empty call", 3.0, less="bare loop"),
        entry("bare loop", 1.0, less="bare loop"),
    )

    (verdict,) = report.verdicts(run)

    assert (verdict.by_min, verdict.by_median) == (2.0, 2.0)
    assert verdict.cells()[-2:] == ("2.00 times its time", "reached")


def test_verdict_of_a_loss_is_kept_and_marked():
    """What misses its limit stays in the tables of page and README."""
    import report

    run = run_of(entry("luo", 5.0), entry("empty call", 1.0))

    (verdict,) = report.verdicts(run)

    assert verdict.told == report.MISSED
    assert "5.00 times its time | **missed**" in report.block(run)
    assert "0 of 1 are reached, 1 are missed" in report.page(run)


def test_scaling_compares_cost_per_device_with_a_tenth_of_the_size():
    """10 devices in 1 s, 100 in 20 s: twice the cost per device, which is more than allowed."""
    import report

    row = "liveupdate.prepare"
    run = run_of(
        entry("luo batch", 1.0, row, [10], shape="", items=10, phases={}),
        entry("luo batch", 20.0, row, [100], shape="", items=100, phases={}),
    )

    (verdict,) = report.verdicts(run)

    assert verdict.cells()[-2:] == ("2.00 times", report.MISSED)


@pytest.mark.parametrize(
    ("ratio", "most", "words"),
    [
        (0.1, 1 / 8, "10.0 times faster"),
        (2.0, 1 / 8, "2.00 times slower"),
        (1.234, 1.5, "1.23 times its time"),
    ],
)
def test_ratio_is_said_in_the_way_of_its_limit(ratio, most, words):
    """Faster or slower where it must be faster; a multiple where it may be slower."""
    import report
    from table import Limit

    assert report.said(Limit("luo", "peer", most), ratio) == words


def test_absent_peer_gives_its_line_of_the_readme(monkeypatch):
    """Each peer has its line there, and that is why its contenders are skipped."""
    import peers

    readme = (BENCHES / "README.md").read_text()
    missing = peers.Peer("nobody", "a package (PyPI: package)", lambda: __import__("no_such"), str)
    monkeypatch.setitem(peers.PEERS, "nobody", missing)

    assert peers.adapter("nobody") == (None, "nobody: a package (PyPI: package)")
    with pytest.raises(peers.AbsentError, match="PyPI: package"):
        peers.find("nobody")
    for peer in peers.PEERS.values():
        assert peer is missing or f"- {peer.line}\n" in readme


def test_race_checks_everybody_before_anybody_is_timed():
    """A wrong result ends the race before the first round."""
    import race

    turns = []

    def refuse(_):
        raise AssertionError("wrong")

    one = race.Contender("luo", lambda: turns.append("luo"))
    other = race.Contender("peer", lambda: turns.append("peer"), check=refuse)

    with pytest.raises(AssertionError, match="wrong"):
        race.race([one, other], range(3))

    assert turns == ["luo", "peer"]


def test_race_takes_turns_and_leaves_out_who_is_absent():
    """One untimed turn each, then round by round; who is absent has no durations, but a reason."""
    import race

    turns = []
    results = race.race(
        [
            race.Contender("luo", turns.append, lambda: "l"),
            race.Contender("peer", turns.append, lambda: "p"),
            race.Contender("gone", turns.append, lambda: "g", absent="not there"),
        ],
        range(2),
        items=3,
    )

    assert "".join(turns) == "lplplp"
    assert {name: len(took) for name, took in results.durations.items()} == {"luo": 2, "peer": 2}
    assert results.absent == {"gone": "not there"}
    assert results.info == {"items": 3}


@pytest.mark.parametrize(
    ("arguments", "status"), [((), 0), (("--fail", "50"), 1), (("--fail", "200"), 0)]
)
def test_compare_fails_only_if_asked_and_a_ratio_grew_by_more(
    tmp_path, monkeypatch, capsys, arguments, status
):
    """The ratio doubles although luo takes as long as before: the peer got faster."""
    import compare
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    saved_json(tmp_path / "machine" / "0001_quick.json", luo=4.0, empty_call=4.0)
    saved_json(tmp_path / "machine" / "0002_quick.json", luo=4.0, empty_call=2.0)
    monkeypatch.setattr(sys, "argv", ["compare.py", "quick", *arguments])

    try:
        compare.main()
        code = 0
    except SystemExit as end:
        code = end.code

    out = capsys.readouterr().out
    assert code == status
    assert "| map.call: luo / empty call, 10 calls (ordered) | 1.00 | 2.00 | +100 % |" in out
    assert "| map.call: luo, 10 calls (ordered) | 4.00 s | 4.00 s | +0 % |" in out


def test_compare_with_one_saved_run_says_so(tmp_path, monkeypatch, capsys):
    """Nothing to compare with is no failure."""
    import compare
    import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    saved_json(tmp_path / "machine" / "0001_quick.json", luo=4.0)
    monkeypatch.setattr(sys, "argv", ["compare.py", "quick"])

    compare.main()

    assert capsys.readouterr().out.startswith("1 saved run called quick: nothing to compare")


def api_entry(role, seconds, n, shape="generated"):
    """Return an entry of a row on the two designs, each phase of *seconds*."""
    phases = ("prepare", "reboot", "jump", "boot", "restore", "finish", "blackout")
    return entry(
        role, seconds, "api.prepare", [n, shape], items=n, shape=shape, sessions=2,
        phases=dict.fromkeys(phases, seconds), records=100 * n, map=4096, pages=2 * n,
    )  # fmt: skip


def test_two_designs_are_told_in_tables_and_sentences():
    """Ratios are of the same race; the page between its marks is what the run says."""
    import report
    import two_apis

    roles = {"notifiers native": 1, "notifiers python": 2, "notifiers steps": 4}
    roles |= {"files native": 8, "files python": 16}
    entries = [
        api_entry(f"luo {role}", factor * n * 1e-6, n)
        for n in (100, 1000)
        for role, factor in roles.items()
    ]
    run = run_of(*entries, *(api_entry(f"luo {role}", 1e-3, 50, "cloud") for role in roles))
    text = two_apis.block(run)

    cells = "| 1.00 µs | 2.00 µs | 4.00 µs | 16.0 µs | 2.00 times | 4.00 times | 16.0 times |"
    assert f"| PREPARE, or PRESERVE {cells}" in text
    assert "2.00 times by notifiers and 2.00 times by files as fast" in text
    assert "100 µs to 1.00 ms (10.0 times) by notifiers" in text
    assert "50 devices of the preset cloud, with guests" in text
    assert "## By notifiers and by files" in report.page(run)
    assert two_apis.block(run_of()) == ""
    assert "## By notifiers and by files" not in report.page(run_of())


def test_page_on_the_two_designs_has_the_figures_of_a_run(tmp_path):
    """Between the marks, and only if the run has them."""
    import report

    run = run_of(*(api_entry(f"luo {d} native", 1e-3, 50) for d in ("notifiers", "files")))
    report.write_two_apis(run_of(), tmp_path / "none.md")
    report.write_two_apis(run, tmp_path / "some.md")

    assert not (tmp_path / "none.md").exists()
    page = (tmp_path / "some.md").read_text()
    assert (
        page.partition(report.MARKS[0])[0]
        == report.TWO_APIS.read_text().partition(report.MARKS[0])[0]
    )
    assert "50 devices of a generated host" in page.partition(report.MARKS[0])[2]
