"""``luo run`` as its users meet it: documents, screens, exit statuses, ^C."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import luo
from luo.cli import main

REAL = pytest.mark.skipif(
    not Path("/sys/devices/virtual").is_dir(), reason="this machine shows no /sys/devices"
)

#: Where the package under test is, and nothing else of our path.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    "PYTHONPATH": str(Path(luo.__file__).parents[1]),
    "COLUMNS": "100",
}
COMMAND = [sys.executable, "-P", "-m", "luo"]


def luo_run(*arguments, cwd, **kwargs):
    """Run ``python -m luo run`` in a process of its own."""
    return subprocess.run(
        [*COMMAND, "run", *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=120,
        **kwargs,
    )


@pytest.fixture
def host(tmp_path):
    """A small host, quick to boot."""
    path = tmp_path / "small.toml"
    path.write_text(
        'memory = "256MiB"\n[devices]\nsource = "synthetic"\ncount = 60\n'
        '[[vms]]\nname = "vm"\ncount = 2\nvcpus = 2\nram = { 4KiB = "64KiB" }\n'
    )
    return path


def drivers(tmp_path, text, name="mine.py"):
    """Write a file of a user's drivers."""
    path = tmp_path / name
    path.write_text("import errno, os, time, luo\n" + textwrap.dedent(text))
    return path


def check_equations(document):
    """What every successful run says of itself."""
    devices = document["devices"]

    assert document["schema"] == "luo-run/1"
    assert document["error"] is None
    assert devices["preserved"] == devices["reclaimed"] >= devices["requested"] > 0
    assert devices["verified_bytes"] == devices["state_bytes"] > 0
    assert devices["records_without_device"] == devices["devices_without_record"] == 0
    assert all(ns > 0 for ns in document["phases_ns"].values())
    assert document["callbacks"]
    assert all(row["calls"] > 0 for row in document["callbacks"])
    assert document["image"]["preserved_pages"] > 0


# ---- it works ----


@REAL
def test_run_json_on_the_real_host_is_judged_good(tmp_path):
    """The host's own devices: kept, reclaimed and verified, in a second process."""
    done = luo_run("--json", "-", cwd=tmp_path)
    document = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    check_equations(document)
    assert document["states"] == ["normal", "prepared", "updated", "normal"]
    assert document["successor"] == "process"
    assert document["source"]["kind"] == "sysfs"


@REAL
def test_run_without_options_shows_the_update(tmp_path):
    """The screen has states, timeline with blackout, table of callbacks, and sizes."""
    done = luo_run(cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    for text in ("normal → prepared → updated → normal", "PREPARE", "LUO blackout",
                 "kernel boot not included", "handed over", "devices from /sys"):  # fmt: skip
        assert text in done.stdout
    assert not list(tmp_path.iterdir())


def test_run_in_process(host, tmp_path):
    """--in-process: the next kernel runs here."""
    done = luo_run("--host", host, "--in-process", "--json", "-", cwd=tmp_path)
    document = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    check_equations(document)
    assert document["successor"] == "in-process"
    assert document["settings"]["in_process"] is True


@pytest.mark.parametrize("where", [[], ["--in-process"]], ids=["process", "in-process"])
def test_run_repeat(where, host, tmp_path):
    """--repeat N: N updates in a row, each in the document."""
    done = luo_run("--host", host, "--repeat", 3, *where, "--json", "-", cwd=tmp_path)
    document = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    check_equations(document)
    assert len(document["runs"]) == 3
    assert document["states"] == ["normal", *["prepared", "updated", "normal"] * 3]
    assert len({run["devices"]["preserved"] for run in document["runs"]}) == 1


def test_run_preset_cloud(tmp_path):
    """A preset: its memory, virtual machines and devices."""
    done = luo_run("--preset", "cloud", "--json", "-", cwd=tmp_path)
    document = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    check_equations(document)
    assert document["devices"]["total"] == 3000
    assert {"kvm", "iommu", "interrupts", "mm", "devices"} <= {
        row["subsystem"] for row in document["callbacks"]
    }
    assert document["image"]["preserved_pages"] * 4096 > 1 << 40


def test_run_request_keeps_what_matches(host, tmp_path):
    """--request GLOB: these devices and their ancestors; repeatable."""
    everything = json.loads(luo_run("--host", host, "--json", "-", cwd=tmp_path).stdout)
    done = luo_run("--host", host, "--request", "*/0000:01:00.?", "--json", "-", cwd=tmp_path)
    document = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    check_equations(document)
    assert 0 < document["devices"]["requested"] < everything["devices"]["requested"]


def test_run_kernel_boot_draws_a_bar_of_its_own(host, tmp_path):
    """--kernel-boot T: modelled, drawn, and no part of the blackout."""
    done = luo_run("--host", host, "--kernel-boot", "1.5s", cwd=tmp_path)
    plain = luo_run("--host", host, cwd=tmp_path)

    assert done.returncode == plain.returncode == 0
    assert "1.5 s" in done.stdout
    assert "1.5 s" not in plain.stdout
    assert "kernel boot not included" in plain.stdout


def test_run_json_file_and_screen(host, tmp_path):
    """--json FILE writes the document and still shows the screen."""
    out = tmp_path / "out.json"
    done = luo_run("--host", host, "--json", out, cwd=tmp_path)

    assert done.returncode == 0
    check_equations(json.loads(out.read_text()))
    assert "updated" in done.stdout


# ---- the user's drivers ----

SAVES = """
    def prepare(device):
        device.slot[:] = device.path.encode()[:8].ljust(8)

    def restore(device):
        if bytes(device.slot) == device.path.encode()[:8].ljust(8):
            device.reclaim()

    mlx5_core = luo.Driver("mlx5_core", luo.LiveUpdateOps(prepare, restore=restore, state_size=8))
"""


def test_run_drivers_of_the_user_are_in_both_kernels(host, tmp_path):
    """--drivers FILE.py: saved by the user's callback, restored by it in the second process."""
    mine = drivers(tmp_path, SAVES)
    done = luo_run("--host", host, "--drivers", mine.name, "--json", "-", cwd=tmp_path)
    document = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    check_equations(document)
    rows = {(row["name"], row["event"]): row for row in document["callbacks"]}
    assert rows["mlx5_core", "PREPARE"]["calls"] == rows["mlx5_core", "RESTORE"]["calls"] > 0


def test_run_drivers_of_a_module_on_the_path(host, tmp_path):
    """--drivers MODULE:ATTR: an importable module, and one thing of it."""
    drivers(tmp_path, SAVES, "my_module.py")
    done = subprocess.run(
        [*COMMAND, "run", "--host", host, "--drivers", "my_module:mlx5_core", "--json", "-"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{tmp_path}"},
        text=True,
        capture_output=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    check_equations(json.loads(done.stdout))


FAILURES = [
    ("prepare", "return -errno.EBUSY", "EBUSY", "PREPARE", 0),
    ("prepare", "raise ValueError('odd')", "EIO", "PREPARE", 1),
    ("reboot", "raise OSError(errno.ENOSPC, 'full')", "ENOSPC", "REBOOT", 1),
    ("restore", "return -errno.ENODEV", "ENODEV", "RESTORE", 0),
    ("finish", "raise RuntimeError('late')", "EIO", "FINISH", 1),
]


@pytest.mark.parametrize(("callback", "body", "code", "event", "ahead"), FAILURES)
def test_run_failing_driver_is_named(callback, body, code, event, ahead, host, tmp_path):
    """Exit status 1; driver, device, errno, file and line are on the screen and in the document."""
    mine = drivers(
        tmp_path,
        f"""
        def fails(device):
            {body}

        mlx5_core = luo.Driver("mlx5_core", luo.LiveUpdateOps({callback}=fails))
        """,
    )
    out = tmp_path / "out.json"
    done = luo_run("--host", host, "--drivers", mine, "--json", out, cwd=tmp_path)
    error = json.loads(out.read_text())["error"]

    assert done.returncode == 1
    assert (error["event"], error["kind"], error["name"]) == (event, "driver", "mlx5_core")
    assert error["errno_name"] == code
    assert (error["file"], error["line"]) == (str(mine), 3 + ahead)
    assert error["device"]
    screen = "".join(done.stdout.split())
    for text in ("mlx5_core", error["device"], code, f"{mine}:{3 + ahead}"):
        assert text in screen
    assert "Traceback" not in done.stdout + done.stderr
    if event in ("PREPARE", "REBOOT"):
        assert error["rolled_back"] is True
        assert json.loads(out.read_text())["states"][-1] == "normal"


def test_run_whose_rollback_fails_says_what_failed(host, tmp_path):
    """The first few failures of CANCEL on the screen, all of them in the document."""
    mine = drivers(
        tmp_path,
        """
        def fails(context):
            return -errno.EIO

        def broken(context):
            return -errno.ENODEV

        for number in range(5):
            globals()[f"s{number}"] = luo.Subsystem(
                f"part{number}", prepare=lambda context: None, cancel=broken
            )
        last = luo.Subsystem("last", priority=luo.Priority.AFTER_DEVICES, prepare=fails)
        """,
    )
    out = tmp_path / "out.json"
    done = luo_run("--host", host, "--drivers", mine, "--json", out, cwd=tmp_path)
    error = json.loads(out.read_text())["error"]

    assert done.returncode == 1
    assert error["rolled_back"] is False
    assert len(error["undo_errors"]) == 5
    assert all(text.startswith("CANCEL subsystem part") for text in error["undo_errors"])
    told = " ".join(done.stdout.partition("rolling back failed in part:")[2].split())
    assert told.startswith("CANCEL subsystem part")
    assert told.count("CANCEL subsystem part") == 3
    assert told.endswith("and 2 more")


@pytest.mark.parametrize(("in_process", "kind"), [(False, "HostCrashError"), (True, None)])
def test_run_driver_that_kills_the_next_kernel(in_process, kind, host, tmp_path):
    """A second kernel that dies after the commit point: a crashed host, exit status 1."""
    mine = drivers(
        tmp_path,
        """
        def dies(device):
            os.kill(os.getpid(), 9)

        mlx5_core = luo.Driver("mlx5_core", luo.LiveUpdateOps(restore=dies))
        """,
    )
    where = ["--in-process"] if in_process else []
    done = luo_run("--host", host, "--drivers", mine, *where, "--json", "-", cwd=tmp_path)

    if in_process:
        assert done.returncode == -signal.SIGKILL
    else:
        assert done.returncode == 1
        assert json.loads(done.stdout)["error"]["type"] == kind


def test_run_driver_that_does_not_reclaim_is_a_failure(host, tmp_path):
    """A device that does not run again fails the run, and is named."""
    mine = drivers(
        tmp_path,
        'mlx5_core = luo.Driver("mlx5_core", luo.LiveUpdateOps(restore=lambda device: None))\n',
    )
    done = luo_run("--host", host, "--drivers", mine, "--json", "-", cwd=tmp_path)
    document = json.loads(done.stdout)

    assert done.returncode == 1
    assert document["error"]["device"]
    assert document["devices"]["reclaimed"] < document["devices"]["preserved"]


def test_run_successor_too_slow_is_cancelled(host, tmp_path):
    """--timeout: a next kernel that is not ready in time fails the run, nothing is lost."""
    done = luo_run("--host", host, "--timeout", "1ms", "--json", "-", cwd=tmp_path)
    document = json.loads(done.stdout)

    assert done.returncode == 1
    assert document["error"]["type"] == "SuccessorError"
    assert document["error"]["errno_name"] == "ETIMEDOUT"
    assert document["states"][-1] == "normal"


# ---- ^C ----


@contextlib.contextmanager
def running(*arguments, cwd):
    """``luo run`` in a process group of its own, as a terminal has it."""
    process = subprocess.Popen(
        [*COMMAND, "run", *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(path, process):
    """Return when *path* is there."""
    for _ in range(3000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pytest.fail(f"{path} never came")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
@pytest.mark.parametrize("event", ["prepare", "reboot"])
def test_run_interrupted_rolls_back(event, number, host, tmp_path):
    """^C in a slow callback: everything is cancelled, exit status 130."""
    mine = drivers(
        tmp_path,
        f"""
        def slow(device):
            open({str(tmp_path / "slow")!r}, "w").close()
            time.sleep(60)

        def cancel(context):
            with open({str(tmp_path / "cancelled")!r}, "a") as file:
                file.write("x")

        mlx5_core = luo.Driver("mlx5_core", luo.LiveUpdateOps({event}=slow))
        mine = luo.Subsystem(
            "mine", priority=luo.Priority.BEFORE_DEVICES, prepare=lambda c: None, cancel=cancel
        )
        """,
    )
    out = tmp_path / "out.json"
    with running("--host", host, "--drivers", mine, "--json", out, cwd=tmp_path) as process:
        wait_for(tmp_path / "slow", process)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate(timeout=60)
    error = json.loads(out.read_text())["error"]

    assert process.returncode == 130
    assert "Traceback" not in stdout + stderr
    assert (tmp_path / "cancelled").read_text() == "x"
    assert (error["message"], error["rolled_back"]) == ("interrupted", True)
    assert json.loads(out.read_text())["states"][-1] == "normal"


def test_run_interrupted_in_the_second_process_rolls_back(host, tmp_path):
    """^C in the second update, whose callbacks run in another process: the same."""
    mine = drivers(
        tmp_path,
        f"""
        def slow(device):
            if os.path.exists({str(tmp_path / "second")!r}):
                open({str(tmp_path / "slow")!r}, "w").close()
                time.sleep(60)

        def restore(device):
            open({str(tmp_path / "second")!r}, "w").close()
            device.reclaim()

        mlx5 = luo.Driver("mlx5_core", luo.LiveUpdateOps(prepare=slow, restore=restore))
        """,
    )
    out = tmp_path / "out.json"
    arguments = ["--host", host, "--drivers", mine, "--repeat", 2, "--json", out]
    with running(*arguments, cwd=tmp_path) as process:
        wait_for(tmp_path / "slow", process)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
    document = json.loads(out.read_text())

    assert process.returncode == 130
    assert document["states"] == ["normal", "prepared", "updated", "normal", "normal"]
    assert document["error"]["rolled_back"] is True


def test_run_interrupted_while_drivers_load(host, tmp_path):
    """^C before there is a kernel: exit status 130 and no traceback."""
    mine = drivers(tmp_path, f'open({str(tmp_path / "loading")!r}, "w").close()\ntime.sleep(60)\n')
    with running("--host", host, "--drivers", mine, cwd=tmp_path) as process:
        wait_for(tmp_path / "loading", process)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert (stdout, "Traceback" in stderr) == ("", False)


@pytest.mark.parametrize("module", ["click", "luo.cli.host", "luo.report"])
def test_command_interrupted_while_it_is_imported_is_status_130(module, tmp_path):
    """^C while the command's own modules load: nothing is printed."""
    code = f"""
        import os, runpy, signal, sys

        import luo

        class Interrupt:
            def find_spec(name, path=None, target=None):
                if name == {module!r}:
                    os.kill(os.getpid(), signal.SIGINT)

        sys.modules.pop({module!r}, None)
        sys.meta_path.insert(0, Interrupt)
        runpy.run_module("luo", run_name="__main__")
        """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        timeout=120,
    )

    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# ---- wrong usage and input ----


@pytest.fixture
def luo_here(capfd, tmp_path, monkeypatch):
    """Run the command in this process; return status, output and error lines."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main.main(list(map(str, arguments)), prog_name="luo")
        done = capfd.readouterr()
        return ended.value.code, done.out, done.err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def put(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


WRONG = {
    "unknown-option": (["--nothing"], "--nothing"),
    "unknown-preset": (["--preset", "nothing"], "nothing"),
    "argument-missing": (["--preset"], "--preset"),
    "too-many-arguments": (["extra"], "extra"),
    "devices-0": (["--preset", "cloud", "--devices", "0"], "--devices"),
    "devices-text": (["--preset", "cloud", "--devices", "many"], "many"),
    "devices-of-a-sysfs": (["--sysfs", "/sys", "--devices", "3"], "--devices"),
    "repeat-0": (["--repeat", "0"], "--repeat"),
    "repeat-text": (["--repeat", "x"], "--repeat"),
    "kernel-boot-text": (["--kernel-boot", "fast"], "fast"),
    "kernel-boot-unit": (["--kernel-boot", "12"], "12"),
    "timeout-text": (["--timeout", "soon"], "soon"),
    "kho-abi-unknown": (["--kho-abi", "kho-v99"], "kho-v99"),
    "seed-text": (["--seed", "x"], "--seed"),
    "two-hosts": (["--preset", "cloud", "--sysfs", "/sys"], "--sysfs"),
    "sysfs-missing": (["--sysfs", "missing"], "missing"),
    "sysfs-file": (["--sysfs", "plain-file"], "plain-file"),
    "sysfs-empty": (["--sysfs", "empty"], "empty"),
    "hwloc-missing": (["--hwloc", "missing.xml"], "missing.xml"),
    "hwloc-directory": (["--hwloc", "empty"], "empty"),
    "hwloc-garbage": (["--hwloc", "plain-file"], "plain-file"),
    "hwloc-truncated": (["--hwloc", "half.xml"], "half.xml"),
    "host-missing": (["--host", "missing.toml"], "missing.toml"),
    "host-directory": (["--host", "empty"], "empty"),
    "host-garbage": (["--host", "bad.toml"], "bad.toml"),
    "host-unknown-key": (["--host", "key.toml"], "colour"),
    "host-too-little-memory": (["--host", "tiny.toml"], ""),
    "host-vms-too-large": (["--host", "vms.toml"], ""),
    "request-nothing": (["--host", "good.toml", "--request", "no/such/*"], "no/such/*"),
    "drivers-missing": (["--host", "good.toml", "--drivers", "missing.py"], "missing.py"),
    "drivers-module-missing": (["--host", "good.toml", "--drivers", "no_such_mod"], "no_such_mod"),
    "drivers-syntax": (["--host", "good.toml", "--drivers", "syntax.py"], "syntax.py"),
    "drivers-raises": (["--host", "good.toml", "--drivers", "raises.py"], "raises.py"),
    "drivers-empty": (["--host", "good.toml", "--drivers", "empty.py"], "empty.py"),
    "drivers-attribute": (["--host", "good.toml", "--drivers", "empty.py:nothing"], "nothing"),
    "drivers-wrong-thing": (["--host", "good.toml", "--drivers", "empty.py:THREE"], "THREE"),
    "drivers-oserror": (["--host", "good.toml", "--drivers", "opens.py"], ""),
    "drivers-exit": (["--host", "good.toml", "--drivers", "exits.py"], "exits.py"),
    "drivers-empty-name": (["--host", "good.toml", "--drivers", ""], ""),
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """The files and directories that :data:`WRONG` names."""
    (tmp_path / "empty").mkdir()
    devices = '[devices]\nsource = "synthetic"\ncount = 40\n'
    put(tmp_path, "plain-file", "nothing that anybody reads\n")
    put(tmp_path, "half.xml", '<?xml version="1.0"?>\n<topology version="2.0"><object type="Mach')
    put(tmp_path, "bad.toml", "memory = = 3\n")
    put(tmp_path, "key.toml", f'memory = "64MiB"\ncolour = "red"\n{devices}')
    put(tmp_path, "good.toml", f'memory = "64MiB"\n{devices}')
    put(tmp_path, "tiny.toml", f'memory = "8KiB"\n{devices}')
    put(
        tmp_path,
        "vms.toml",
        f'memory = "64MiB"\n{devices}[[vms]]\nname = "v"\nram = {{ 2MiB = "128MiB" }}\n',
    )
    put(tmp_path, "syntax.py", "def (:\n")
    put(tmp_path, "raises.py", "raise ValueError('on purpose')\n")
    put(tmp_path, "empty.py", "THREE = 3\n")
    put(tmp_path, "opens.py", "open('/no/such/file')\n")
    put(tmp_path, "exits.py", "import sys\nsys.exit('on purpose')\n")
    return tmp_path


@pytest.mark.parametrize("case", WRONG)
def test_run_wrong_usage_is_one_line_and_status_2(case, luo_here, files):
    """A wrong option or input: exit status 2 and one line that names it."""
    arguments, named = WRONG[case]
    status, out, err = luo_here("run", *arguments)

    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("luo: ")
    assert named in err


@pytest.mark.parametrize("target", ["no/such/directory/out.json", "."])
def test_run_json_file_that_cannot_be_written_is_status_2(target, luo_here, files):
    """It is said before anything is run, in one line."""
    put(files, "mine.py", "open('loaded', 'w').close()\nimport luo\nd = luo.Driver('d')\n")
    status, out, err = luo_here(
        "run", "--host", "good.toml", "--drivers", "mine.py", "--json", target
    )

    assert status == 2
    assert not (files / "loaded").exists()
    assert len(err.splitlines()) == 1, err
    assert target in err
    assert out == ""


def test_run_unknown_command_is_status_2(luo_here):
    """So is a command that there is not."""
    status, _, err = luo_here("update")

    assert status == 2
    assert len(err.splitlines()) == 1


def test_run_wrong_option_as_a_process(tmp_path):
    """The same as a process: nothing on standard output, one line on standard error."""
    done = luo_run("--preset", "nothing", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["run", "-h"]])
def test_help_and_version_are_status_0(arguments, luo_here):
    """Who asks is answered on standard output."""
    status, out, err = luo_here(*arguments)

    assert (status, err) == (0, "")
    assert out
