"""``luo run --budget``: limits as text, names known beforehand, verdicts, exit statuses."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import luo
from luo import workloads
from luo.report import PHASES, Report, budget_names, parse_budgets

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    "PYTHONPATH": str(Path(luo.__file__).parents[1]),
    "COLUMNS": "100",
}


def luo_run(*arguments, cwd):
    """Run ``python -m luo run`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "luo", "run", *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture
def host(tmp_path):
    """A small host, quick to boot."""
    path = tmp_path / "small.toml"
    path.write_text('memory = "256MiB"\n[devices]\nsource = "synthetic"\ncount = 60\n')
    return path


# ---- text ----


def test_parse_budgets_takes_names_and_times():
    """As the issue has it, with spaces, and with an equals sign in a driver's name."""
    text = "blackout=50ms, devices/virtio-pci/REBOOT = 2ms,devices/a=b/REBOOT=7ns"

    assert parse_budgets(text) == {
        "blackout": 50_000_000,
        "devices/virtio-pci/REBOOT": 2_000_000,
        "devices/a=b/REBOOT": 7,
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "NAME=TIME"),
        ("blackout", "NAME=TIME"),
        ("=50ms", "NAME=TIME"),
        ("blackout=50ms,", "NAME=TIME"),
        ("blackout=", "duration ''"),
        ("blackout=50", "duration '50'"),
        ("blackout=-1ms", "duration '-1ms'"),
        ("blackout=1ms,boot=1s,blackout=2ms", "'blackout' is there twice"),
    ],
)
def test_parse_budgets_of_anything_else_is_value_error(text, said):
    """Nothing is left out in silence."""
    with pytest.raises(ValueError, match=said):
        parse_budgets(text)


# ---- names ----


@pytest.mark.parametrize("preset", ["cloud", "stress"])
def test_budget_names_are_those_that_the_update_has(preset):
    """Of every callback of subsystems, drivers and buses that is called in the update."""
    with workloads.load(preset, devices=500) as kernel:
        known = budget_names(kernel)
        report = luo.live_update(kernel)
        report.kernel.close()
    (run,) = report.runs

    assert known[: len(PHASES)] == list(PHASES)
    assert {*run["callbacks_ns"]} <= {*known}
    report.check(dict.fromkeys((name for name in known if name.count("/") != 2), "1000s"))


def test_budget_names_leave_out_drivers_of_devices_that_stay_behind(tmp_path):
    """Those of the requested devices and their ancestors are known, and no others."""
    called = luo.LiveUpdateOps(prepare=lambda device: None)
    names = ["above", "kept", "beside"]
    tree = luo.DeviceTree()
    tree.add("bridge", driver="above")
    tree.add("nic", parent="bridge", driver="kept")
    tree.add("disk", driver="beside")
    machine = luo.Machine(luo.PhysicalMemory("64MiB"), tree)
    drivers = [luo.Driver(name, called) for name in names]
    with luo.Kernel(machine, drivers=drivers).boot() as kernel:
        kernel.devices.request("bridge/nic")
        known = budget_names(kernel)

    assert known == [
        *PHASES, "devices/PREPARE", "devices/above/PREPARE", "devices/kept/PREPARE",
    ]  # fmt: skip


# ---- the command ----

SLOW = """
    def prepare(device):
        pass

    def reboot(device):
        if device.path.endswith("01:00.1"):
            until = time.monotonic_ns() + 2_000_000
            while time.monotonic_ns() < until:
                pass

    def restore(device):
        device.reclaim()

    mlx5_core = luo.Driver("mlx5_core", luo.LiveUpdateOps(prepare, reboot, restore=restore))
"""


def test_run_within_budget_is_status_0_after_20_updates(host, tmp_path):
    """--repeat is 20 with a budget; the verdict is on the screen and in the document."""
    out = tmp_path / "out.json"
    done = luo_run("--host", host, "--in-process", "--json", out, "--budget",
                   "blackout=60s, devices/RESTORE=60s", cwd=tmp_path)  # fmt: skip
    document = json.loads(out.read_text())

    assert (done.returncode, done.stderr) == (0, "")
    assert len(document["runs"]) == document["settings"]["repeat"] == 20
    assert document["budgets"]["met"] is True
    assert [one["met"] for one in document["budgets"]["budgets"]] == [True, True]
    assert "budgets, by the 95th percentile of 20 updates" in done.stdout


def test_run_over_budget_is_status_3_with_driver_and_device(host, tmp_path):
    """The callback that takes 2 ms, and the one device for which it does, are named."""
    mine = tmp_path / "mine.py"
    mine.write_text("import time, luo\n" + textwrap.dedent(SLOW))
    budgets = "blackout=1us,devices/mlx5_core/REBOOT=1ms,prepare=60s"
    done = luo_run("--host", host, "--drivers", mine, "--repeat", 3, "--json", "-",
                   "--budget", budgets, cwd=tmp_path)  # fmt: skip
    document = json.loads(done.stdout)

    assert done.returncode == 3
    verdict = document["budgets"]
    assert (verdict["met"], verdict["runs"]) == (False, 3)
    assert [one["name"] for one in verdict["budgets"]] == [
        "blackout", "devices/mlx5_core/REBOOT", "prepare",
    ]  # fmt: skip
    over = verdict["budgets"][1]
    assert over["limit_ns"] == 1_000_000
    assert over["p95_ns"] >= 2_000_000
    (worst,) = over["worst"]
    assert worst["name"] == "devices/mlx5_core/REBOOT"
    device = worst["devices"][0]
    assert device["path"].endswith("01:00.1")
    assert device["ns"] >= 2_000_000
    for text in (
        "over blackout",
        "over devices/mlx5_core/REBOOT",
        device["path"],
        "met  prepare",
        "dearest devices",
    ):
        assert text in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "blackouts=1s"], "none of prepare, reboot, jump, boot, restore, finish, "),
        (["--budget", "devices/nvme/REBOOT=1s"], "devices/mlx5_core/PREPARE"),
        (["--budget", "blackout"], "NAME=TIME"),
        (["--budget", "blackout=fast"], "duration 'fast'"),
        (["--budget", "blackout=1s", "--dry-reboot"], "--dry-reboot"),
    ],
)
def test_run_wrong_budget_is_status_2_before_any_update(arguments, said, host, tmp_path):
    """One line that has the names there are; nothing is written."""
    out = tmp_path / "out.json"
    done = luo_run("--host", host, "--json", out, *arguments, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_run_failed_update_with_a_budget_is_status_1(host, tmp_path):
    """What has not come to its end is held to nothing."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import luo\n"
        'mlx5_core = luo.Driver("mlx5_core", luo.LiveUpdateOps(prepare=lambda device: -5))\n'
    )
    done = luo_run("--host", host, "--drivers", mine, "--budget", "blackout=1ns", "--json", "-",
                   cwd=tmp_path)  # fmt: skip

    assert done.returncode == 1
    assert json.loads(done.stdout)["budgets"] is None


def test_check_again_forgets_the_verdict_before():
    """The document has the last one."""
    report = Report()
    assert report.verdict is None
    with workloads.load("cloud", devices=100) as kernel:
        luo.live_update(kernel, report=report)
    report.kernel.close()
    with pytest.raises(luo.BudgetError):
        report.check({"blackout": "1ns"})
    assert report.to_dict()["budgets"]["met"] is False
    report.check({"blackout": "1000s"})

    assert report.to_dict()["budgets"]["met"] is True
