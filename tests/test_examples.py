"""The examples run as a user runs them: as programs, from another directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import luo

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
README = EXAMPLES.parent / "README.md"


def program(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with *arguments*, from *cwd*."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    )


def luo_run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``luo run`` with *arguments*, from *cwd*."""
    return program("-P", "-m", "luo", "run", *arguments, cwd=cwd)


FIRST_DRIVER_PRINTS = """\
normal → prepared → updated → normal in a second process
1005 devices preserved, 1005 reclaimed
256256 bytes saved, 256256 found there again
PREPARE  nvme     calls 4
PREPARE  vfio-pci calls 1
RESTORE  nvme     calls 4
RESTORE  vfio-pci calls 1
"""


def test_first_driver_as_a_program_updates_into_a_second_process(tmp_path):
    """Per-device and batch callbacks: 4 calls and 1, all bytes there again."""
    done = program(EXAMPLES / "first_driver.py", cwd=tmp_path)

    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == FIRST_DRIVER_PRINTS


def test_first_session_as_a_program_keeps_a_guest_s_memory(tmp_path):
    """A memfd goes into a session, a second process, and comes back with its last bytes."""
    done = program(EXAMPLES / "first_session.py", cwd=tmp_path)

    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "64 MiB came back: written later!\n"


def test_first_driver_given_to_luo_run_replaces_built_in_drivers(tmp_path):
    """In both kernels: the 16 disks of the host are saved and restored one by one."""
    driver = EXAMPLES / "first_driver.py"

    done = luo_run("--preset", "cloud", "--drivers", driver, "--json", "-", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    calls = {(row["event"], row["name"]): row["calls"] for row in document["callbacks"]}
    assert calls["PREPARE", "nvme"] == calls["RESTORE", "nvme"] == 16
    assert calls["PREPARE", "vfio-pci"] == 1
    devices = document["devices"]
    assert devices["preserved"] == devices["reclaimed"] >= devices["requested"] > 0
    assert devices["verified_bytes"] == devices["state_bytes"] > 0
    assert document["successor"] == "process"


VMM_SIMPY_PRINTS = """\
50 guests, 1 worker
  states: normal → prepared → updated → normal
  blackout of the host: 176.0 ms
  seen by guests: 22.4 ms at least, 102.2 ms in the middle, 176.0 ms at most
50 guests, 2 workers
  states: normal → prepared → updated → normal
  blackout of the host: 98.9 ms
  seen by guests: 22.5 ms at least, 62.7 ms in the middle, 98.9 ms at most
REBOOT of vm31 fails, 2 workers
  REBOOT of pci0000:00/vm31 failed: EIO
  rolled back: True; the old kernel is NORMAL
  seen by guests: 0.0 ms at least, 29.3 ms in the middle, 42.8 ms at most
"""


def test_vmm_simpy_as_a_program_prints_the_blackout_of_its_guests(tmp_path):
    """Half the blackout with two workers; a failure costs the guests its rolling back."""
    done = program(EXAMPLES / "vmm_simpy.py", cwd=tmp_path)

    assert (done.stderr, done.returncode, done.stdout) == ("", 0, VMM_SIMPY_PRINTS)


NIC_DRIVER_PRINTS = """\
sent before, while prepared, and after a dry reboot: 0xa 0xb 0xc
in the ring in the next kernel: 0xa 0xb 0xc
and it sends on: descriptor 4
"""


def test_nic_driver_as_a_program_keeps_its_rings(tmp_path):
    """What was sent until REBOOT is in the rings of the next kernel, which go on."""
    done = program(EXAMPLES / "nic_driver.py", cwd=tmp_path)

    assert (done.stderr, done.returncode, done.stdout) == ("", 0, NIC_DRIVER_PRINTS)


def test_nic_driver_given_to_luo_run_serves_both_cards(tmp_path):
    """Driver, bus and subsystem are called in both kernels, and every byte is found again."""
    done = luo_run(
        "--host", EXAMPLES / "nic_host.toml", "--drivers", EXAMPLES / "nic_driver.py",
        "--json", "-", cwd=tmp_path,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    calls = {(row["event"], row["name"]): row["calls"] for row in document["callbacks"]}
    assert [calls[event, "mlx5_core"] for event in ("PREPARE", "REBOOT", "RESTORE", "FINISH")] == [
        2, 2, 2, 2,
    ]  # fmt: skip
    assert calls["PREPARE", "pci"] > 2
    assert calls["FINISH", "nic-totals"] == 1
    assert document["devices"]["verified_bytes"] == document["devices"]["state_bytes"]


def test_nic_driver_passes_luo_faults(tmp_path):
    """Whichever of its callbacks fails, or lacks memory, nothing is half preserved."""
    done = program(
        "-P", "-m", "luo", "faults", "--kind", "errno", "--kind", "memory",
        "--host", EXAMPLES / "nic_host.toml", "--drivers", EXAMPLES / "nic_driver.py",
        cwd=tmp_path,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was ever half preserved" in done.stdout


def test_failing_driver_as_a_program_shows_error_and_rollback(tmp_path):
    """Event, driver, device, errno, file and line are in the error; nothing is left behind."""
    driver = EXAMPLES / "failing_driver.py"
    line = 1 + driver.read_text().splitlines().index(
        '        raise OSError(errno.EBUSY, "a command is in flight")'
    )

    done = program(driver, cwd=tmp_path)

    assert (done.stderr, done.returncode) == ("", 0)
    told = dict((text[:11].rstrip(), text[12:]) for text in done.stdout.splitlines()[1:])
    assert told == {
        "event": "PREPARE",
        "callback of": "driver nvme",
        "device": "disk2",
        "errno": "16 EBUSY",
        "at": f"{driver}:{line}",
        "rolled back": "True",
        "state": "NORMAL",
        "preserved": "0",
        "free pages": "0 less than before",
    }


def test_failing_driver_given_to_luo_run_is_status_1_with_the_culprit(tmp_path):
    """The error names driver, device, errno, file and line; the state is normal again."""
    driver = EXAMPLES / "failing_driver.py"

    done = luo_run("--preset", "cloud", "--drivers", driver, "--json", "-", cwd=tmp_path)

    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    error = document["error"]
    assert (error["event"], error["kind"], error["name"]) == ("PREPARE", "driver", "nvme")
    assert (error["errno_name"], error["rolled_back"]) == ("EBUSY", True)
    assert (error["file"], type(error["line"])) == (str(driver), int)
    assert error["device"].startswith("pci0005:00/")
    assert document["states"] == ["normal", "normal"]
    assert "Traceback" not in done.stderr


FORGOTTEN_RING_PRINTS = """\
the driver that forgets:
   DMA of nic0 into 0x40000+0x40000, which was not preserved: allocated 0x40000/order 6
   the update has an error
the mended driver:
   the update has no error
   every write is there: True
"""


def test_forgotten_ring_as_a_program_catches_the_driver_and_not_the_mended_one(tmp_path):
    """Device, address, length and owner; the new kernel says the same on standard error."""
    done = program(EXAMPLES / "forgotten_ring.py", cwd=tmp_path)

    assert (done.stdout, done.returncode) == (FORGOTTEN_RING_PRINTS, 0)
    assert done.stderr.strip() == FORGOTTEN_RING_PRINTS.splitlines()[1].strip()


GATED = """\
import time, luo

def reboot(device):
    {reboot}

mlx5_core = luo.Driver("mlx5_core", luo.LiveUpdateOps(
    lambda device: None, reboot, restore=lambda device: device.reclaim()))
"""


def gate(cwd, reboot="pass", *options, **environment):
    """Run the gate over a driver whose REBOOT does *reboot*, with generous limits."""
    (cwd / "mine.py").write_text(GATED.format(reboot=reboot))
    limits = {"BUDGET": "blackout=60s", "LIMIT": "10000%", "REPEAT": "8"}
    return subprocess.run(
        ["sh", EXAMPLES / "ci_gate.sh", "base.json", "--preset", "cloud", "--devices", "100",
         "--drivers", "mine.py", *options],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        | {"LUO": f"{sys.executable} -P -m luo", "PYTHONPATH": str(Path(luo.__file__).parents[1])}
        | limits | environment,
    )  # fmt: skip


def test_ci_gate_stores_a_baseline_and_stops_what_is_slower(tmp_path):
    """Status 0 twice, then 3 for a callback that takes much longer, and 0 when that is gone."""
    first, second = gate(tmp_path), gate(tmp_path)
    slower = gate(tmp_path, "time.sleep(0.005)")
    again = gate(tmp_path)

    statuses = [one.returncode for one in (first, second, slower, again)]
    assert statuses == [0, 0, 3, 0], slower.stdout + slower.stderr
    assert "stored as base.json" in first.stdout
    assert "nothing is more than 10000 % slower" in second.stdout
    assert "devices/mlx5_core/REBOOT: x" in slower.stdout.partition("10000 % slower:")[2]


def test_ci_gate_with_a_virtual_clock_needs_one_update(tmp_path):
    """No noise: 5 % slower passes a limit of 10 %, 12 % slower does not; budgets are exact."""

    def virtual(us, budget_us):
        (tmp_path / "cost.toml").write_text(f'rules."devices/mlx5_core/REBOOT" = "{us}us"\n')
        options = ("--clock", "virtual", "--cost", "cost.toml")
        budget = f"devices/mlx5_core/REBOOT={budget_us}us"
        return gate(tmp_path, "pass", *options, REPEAT="1", LIMIT="10%", BUDGET=budget).returncode

    assert virtual(100, 10**6) == 0
    calls = next(
        row["calls"]
        for row in json.loads((tmp_path / "base.json").read_text())["callbacks"]
        if (row["name"], row["event"]) == ("mlx5_core", "REBOOT")
    )
    assert virtual(105, 105 * calls) == 0
    assert virtual(105, 105 * calls - 1) == 3
    assert virtual(112, 10**6) == 3


def test_ci_gate_over_budget_is_status_3_with_and_without_a_baseline(tmp_path):
    """A run over its budget is not stored."""
    over = gate(tmp_path, BUDGET="devices/mlx5_core/REBOOT=1ns")
    assert (over.returncode, (tmp_path / "base.json").exists()) == (3, False)
    gate(tmp_path)
    later = gate(tmp_path, BUDGET="blackout=1ns")

    assert later.returncode == 3
    assert "over blackout" in later.stdout
    assert "nothing is more than" in later.stdout


@pytest.mark.parametrize(
    ("reboot", "environment", "status"),
    [
        ("return -5", {}, 1),
        ("pass", {"BUDGET": "blackouts=1s"}, 2),
        ("pass", {"BUDGET": "blackout"}, 2),
    ],
)
def test_ci_gate_passes_other_statuses_on(reboot, environment, status, tmp_path):
    """A live update that fails, and wrong usage; nothing is stored."""
    done = gate(tmp_path, reboot, **environment)

    assert done.returncode == status, done.stdout + done.stderr
    assert not (tmp_path / "base.json").exists()


@pytest.mark.parametrize(
    ("suite", "arguments"),
    [
        (EXAMPLES / "bench_suite.py", ("-c", os.devnull)),
        (
            EXAMPLES.parent / "benches",
            ("-c", EXAMPLES.parent / "benches" / "pytest.ini", "--scale=smoke"),
        ),
    ],
    ids=["example", "benches"],
)
def test_bench_suite_without_timing_passes_its_checks(suite, arguments, tmp_path):
    """Each benchmark runs once, and what it checks afterwards holds."""
    pytest.importorskip("pytest_benchmark")

    done = program(
        "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable",
        *arguments, suite, cwd=tmp_path,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_shows_the_first_driver_and_what_it_prints():
    """What the README opens with is in the example, and its output is the real one."""
    text = README.read_text()
    code = text.split("```python\n", 1)[1].split("```", 1)[0]

    assert code.strip() in (EXAMPLES / "first_driver.py").read_text()
    assert FIRST_DRIVER_PRINTS in text
