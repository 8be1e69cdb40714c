"""``luo mount`` as its users meet it: a script, several processes, other users, and its end."""

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from rig import errno_of

from luo.mountpoint import is_dead

from .test_cli import COMMAND, ENVIRONMENT

SCRIPT = Path(__file__).parents[2] / "examples" / "update.sh"
NOBODY = {"user": 65534, "group": 65534, "extra_groups": []}
SECONDS = 60


def why_not():
    """Return what keeps this machine from mounting; "" if nothing does."""
    if not os.path.exists("/dev/fuse"):
        return "this machine has no /dev/fuse"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is not for this user"
    try:
        import luo.fuse  # noqa: F401
    except (ImportError, OSError) as error:
        return str(error)
    return ""


MISSING = why_not()
PLACES = pytest.mark.parametrize("where", [("--in-process",), ()], ids=["here", "process"])
mounts = pytest.mark.skipif(bool(MISSING), reason=MISSING or "is there")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

#: A subsystem whose PREPARE waits for a file, and which writes down what it is told.
WAITS = """
    import os, pathlib, time, luo

    base = pathlib.Path({base!r})

    def prepare(context):
        (base / "begun").touch()
        while not (base / "go").exists():
            time.sleep(0.01)

    def cancel(context):
        (base / "cancelled").touch()

    first = luo.Subsystem("first", prepare=lambda context: 0, cancel=cancel)
    waits = luo.Subsystem("waits", prepare=prepare)
"""


@pytest.fixture
def base():
    """A directory that every user can reach, with a host, drivers that wait, and a mount point."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o755)
        (base / "sys").mkdir()
        (base / "host.toml").write_text(
            'memory = "256MiB"\n[devices]\nsource = "synthetic"\ncount = 60\n'
        )
        lines = WAITS.format(base=name).splitlines()
        (base / "waits.py").write_text("\n".join(line.removeprefix("    ") for line in lines))
        yield base


@contextlib.contextmanager
def started(base, *options, **environment):
    """``luo mount`` on *base*/sys; yields the process, of which nothing is left at the end."""
    with (base / "log").open("w") as log:
        process = subprocess.Popen(
            [*COMMAND, "mount", "--host", str(base / "host.toml"), *options, str(base / "sys")],
            cwd=base,
            env={**ENVIRONMENT, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    try:
        for line in process.stdout:
            if line.startswith("mounted on"):
                break
        else:
            pytest.fail((base / "log").read_text())
        yield process
    finally:
        with process:
            process.terminate()
            process.wait(SECONDS)


@contextlib.contextmanager
def mounted(base, *options):
    """The directory that ``luo mount`` has mounted; it ends well, and leaves nothing."""
    with started(base, *options) as process:
        yield base / "sys"
    assert process.returncode == 0
    assert not os.path.ismount(base / "sys")
    assert os.listdir(base / "sys") == []


def shell(base, text, **kwargs):
    """Run a line of shell in the mount; return what it said, errors last."""
    done = subprocess.run(
        ["sh", "-c", text], cwd=base / "sys", text=True, capture_output=True, timeout=SECONDS,
        env={**os.environ, "LC_ALL": "C"}, **kwargs,
    )  # fmt: skip
    return (done.stdout + done.stderr).strip()


def eventually(condition):
    """Wait until *condition*."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state(base):
    return (base / "sys/kernel/liveupdate/state").read_text()


@mounts
@PLACES
def test_script_for_the_rfcs_files_updates_twice(base, where):
    """A script of echo and cat keeps devices over two jumps, from the first kernel to the third."""
    with mounted(base, *where):
        for _ in range(2):
            done = subprocess.run(
                [SCRIPT, base / "sys", "pci0000:00/*/*"], text=True, capture_output=True
            )
            assert done.stderr == ""
            assert done.stdout.split("\n", 2)[0] == "normal"
            assert done.stdout.endswith(" devices requested\nprepared\nupdated\nnormal\n")
            assert shell(base, "ls kernel/debug/kho/in/sub_fdts") == (
                "LUO\nkexec-metadata\nliveupdate_orchestrator"
            )


@mounts
def test_files_say_what_sysfs_would(base):
    """Sizes, truncation, refusals and new files are what a script meets on /sys."""
    device = "devices/pci0000:00/liveupdate"
    with mounted(base, "--in-process"):
        assert shell(base, "ls") == "dev\ndevices\nkernel"
        assert shell(base, "stat -c '%a %u %s' kernel/liveupdate/*") == "\n".join(
            f"{mode} {os.geteuid()} 4096" for mode in ("200", "200", "444")
        )
        assert shell(base, f"cat {device}/*") == "0\n0\n0"
        for path, text, code in (
            ("kernel/liveupdate/prepare", "2\n", errno.EINVAL),
            ("kernel/liveupdate/finish", "1\n", errno.EINVAL),
            ("kernel/liveupdate/cancel", "1\n", errno.EACCES),  # there is none, and none is made
            ("kernel/liveupdate", "1\n", errno.EISDIR),
            ("kernel/liveupdate/state", "1\n", errno.EACCES),
        ):
            assert errno_of((base / "sys" / path).write_text, text) == code
        assert "No such file" in shell(base, "cat kernel/liveupdate/cancel")
        assert shell(base, f"chmod 600 {device}/requested; stat -c %a {device}/requested") == "600"
        for flag in (os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
            fd = os.open(base / "sys/kernel/liveupdate/prepare", flag)
            assert os.write(fd, b"1\n") == 2
            assert state(base) == "prepared\n"
            assert os.pwrite(fd, b"0\n", 7) == 2  # the offset does not matter
            assert state(base) == "normal\n"
            os.close(fd)
    assert "finish: FINISH: needs UPDATED, the state is NORMAL" in (base / "log").read_text()


@mounts
def test_names_are_the_kernels_alone(base):
    """Nothing can be made, moved or removed: EPERM, as on /sys."""
    with mounted(base, "--in-process") as sys_:
        state, new = sys_ / "kernel/liveupdate/state", sys_ / "kernel/liveupdate/new"
        for call in (
            new.mkdir,
            new.parent.rmdir,
            state.unlink,
            lambda: state.rename(new),
            lambda: new.symlink_to(state),
            lambda: new.hardlink_to(state),
            lambda: os.mkfifo(new),
        ):
            assert errno_of(call) == errno.EPERM
        assert sorted(os.listdir(new.parent)) == ["finish", "prepare", "state"]


@mounts
def test_state_is_refused_to_writers_when_it_is_opened(base):
    """Root too gets EACCES, unless it has changed the mode: then the write is EIO."""
    with mounted(base, "--in-process") as sys_:
        path = sys_ / "kernel/liveupdate/state"
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
            assert errno_of(os.open, path, flags) == errno.EACCES
        path.chmod(0o644)
        fd = os.open(path, os.O_WRONLY)
        assert errno_of(os.write, fd, b"1") == errno.EIO
        os.close(fd)


@mounts
def test_errno_that_no_process_may_see_is_eio(base):
    """A driver's -EPROBE_DEFER ends the write, and the next one is done."""
    (base / "defers.py").write_text(
        "import luo\n\nanswers = [-524, -517, -512, -511]\n"
        "late = luo.Subsystem('late', prepare=lambda context: answers.pop() if answers else 0)\n"
    )
    with mounted(base, "--in-process", "--drivers", str(base / "defers.py")) as sys_:
        prepare = os.open(sys_ / "kernel/liveupdate/prepare", os.O_WRONLY)
        for code in (511, errno.EIO, errno.EIO, errno.EIO, None):
            assert errno_of(os.write, prepare, b"1") == code
        os.close(prepare)
        assert state(base) == "prepared\n"
    assert "517" in (base / "log").read_text()


@mounts
@as_root
def test_another_user_reads_what_is_for_all_and_writes_nothing(base):
    """Modes and owners count: a user gets EACCES, root EIO from a file that nobody reads."""
    device = "devices/pci0000:00/liveupdate"
    with mounted(base, "--in-process"):
        assert shell(base, "cat kernel/liveupdate/state", **NOBODY) == "normal"
        assert shell(base, f"cat {device}/requested", **NOBODY) == "0"
        for command in (
            "cat kernel/liveupdate/prepare",
            "ls kernel/debug",
            "echo 1 > kernel/liveupdate/prepare",
            "echo 1 > kernel/debug/liveupdate/kexec",
            f"echo 1 > {device}/requested",
        ):
            assert "Permission denied" in shell(base, command, **NOBODY), command
        assert "Input/output error" in shell(base, "cat kernel/liveupdate/prepare")
        shell(base, "chown 65534 devices/pci0000:00")
        assert shell(base, f"echo 1 > {device}/requested; cat {device}/requested", **NOBODY) == "1"


@mounts
@PLACES
def test_slow_callback_keeps_no_reader_waiting_and_writers_can_be_killed(base, where):
    """While PREPARE runs: everybody reads, who writes waits, and who is killed has not written."""
    with mounted(base, *where, "--drivers", str(base / "waits.py")) as sys_:
        shell(base, "echo 1 > kernel/debug/liveupdate/kexec")  # an ordinary one
        prepare = subprocess.Popen(["sh", "-c", f"echo 1 > {sys_}/kernel/liveupdate/prepare"])
        eventually((base / "begun").exists)
        requests = sorted(sys_.glob("devices/**/requested"))[:15]
        writers = [subprocess.Popen(["sh", "-c", f"echo 1 > '{path}'"]) for path in requests]
        finish = subprocess.Popen(["sh", "-c", f"echo 1 > {sys_}/kernel/liveupdate/finish"])

        assert shell(base, "cat kernel/liveupdate/state") == "normal"
        assert requests[0].read_text() == "0\n"
        for victim in (writers.pop(), finish):
            time.sleep(0.1)  # it may wait already, or not yet: it ends in any case
            victim.kill()
            assert victim.wait(SECONDS) == -signal.SIGKILL
        assert prepare.poll() is None
        (base / "go").touch()
        assert prepare.wait(SECONDS) == 0
        assert {writer.wait(SECONDS) for writer in writers} == {1}  # EINVAL: it is PREPARED
        assert state(base) == "prepared\n"


@mounts
@pytest.mark.parametrize("waiter", [select.poll, select.epoll])
def test_poll_on_state_wakes_another_process(base, waiter):
    """POLLERR and POLLPRI before the first read and after each change of state."""
    wanted = select.POLLPRI | select.POLLERR
    with (
        mounted(base, "--in-process") as sys_,
        (sys_ / "kernel/liveupdate/state").open("rb") as file,
    ):
        poller = waiter()
        poller.register(file, select.POLLPRI)
        assert poller.poll(0) == [(file.fileno(), wanted)]
        for value, name in ((1, b"prepared\n"), (0, b"normal\n")):
            file.seek(0)
            file.read()
            assert poller.poll(0) == []
            write = f"sleep 0.2; echo {value} > kernel/liveupdate/prepare"
            with subprocess.Popen(["sh", "-c", write], cwd=sys_):
                assert poller.poll(SECONDS * (1 if waiter is select.epoll else 1000)) == [
                    (file.fileno(), wanted)
                ]
                file.seek(0)
                assert file.read() == name


@mounts
@pytest.mark.parametrize(
    ("number", "where"),
    [
        (signal.SIGINT, ("--in-process",)),
        (signal.SIGTERM, ()),
        (signal.SIGHUP, ("--in-process",)),
    ],
)
def test_signal_during_prepare_rolls_back_and_unmounts(base, number, where):
    """^C reaches the callback that runs: who was prepared is cancelled, and the mount goes."""
    with started(base, *where, "--drivers", str(base / "waits.py")) as process:
        shell(base, "echo 1 > kernel/debug/liveupdate/kexec")
        prepare = subprocess.Popen(["sh", "-c", f"echo 1 > {base}/sys/kernel/liveupdate/prepare"])
        eventually((base / "begun").exists)
        process.send_signal(number)

        assert process.wait(SECONDS) == 0
        assert prepare.wait(SECONDS) != 0
    assert (base / "cancelled").exists()
    assert not os.path.ismount(base / "sys")


@mounts
def test_end_with_an_update_prepared_cancels_it(base):
    """A host that is switched off in PREPARED tells everybody so."""
    (base / "go").touch()
    with mounted(base, "--in-process", "--drivers", str(base / "waits.py")):
        shell(base, "echo 1 > kernel/liveupdate/prepare")
        assert state(base) == "prepared\n"
    assert (base / "cancelled").exists()


@mounts
def test_umount_by_hand_ends_it(base):
    """``umount DIR`` is a way to end it."""
    with started(base, "--in-process") as process:
        by_hand = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
        subprocess.run([*by_hand, base / "sys"], check=True)

        assert process.wait(SECONDS) == 0


@mounts
def test_kill_leaves_no_stuck_directory(base):
    """A small process stays behind for that."""
    with started(base) as process:
        process.kill()
        process.wait(SECONDS)
        eventually(lambda: not is_dead(base / "sys") and not os.path.ismount(base / "sys"))


@mounts
@pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists(),
    reason="this machine's /proc does not list children",
)
def test_mount_over_a_dead_one_clears_it(base):
    """If that process is killed first, the directory stays dead until the next mount."""
    with started(base, "--in-process") as process:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        process.kill()
        process.wait(SECONDS)
        eventually(lambda: is_dead(base / "sys"))
    with mounted(base, "--in-process"):
        assert state(base) == "normal\n"


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("raise ModuleNotFoundError('no mfusepy')", "pip install 'luo-kho[fuse]'"),
        ("raise OSError('Unable to find libfuse')", "install libfuse"),
    ],
)
def test_mount_without_what_it_needs_is_one_line(base, module, says):
    """What is missing is said, with what to do; exit status 2."""
    (base / "mfusepy.py").write_text(module)
    done = mount(base, base / "sys", PYTHONPATH=f"{base}:{ENVIRONMENT['PYTHONPATH']}")

    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@mounts
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none"], "is no directory"),
        (["host.toml"], "is no directory"),
        (["/"], "something is mounted there"),
        (["sys", "--drivers", "no_such_module"], "no_such_module"),
        (["sys", "--quirk", "no-such-quirk"], "no-such-quirk"),
        (["sys", "--preset", "no-such-preset"], "no-such-preset"),
    ],
)
def test_mount_of_wrong_input_is_one_line(base, arguments, says):
    """Wrong input is one line, exit status 2, and nothing is mounted."""
    done = mount(base, *arguments)

    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert says in done.stderr
    assert not os.path.ismount(base / "sys")


def mount(base, *arguments, **environment):
    """Run ``luo mount`` with something that it cannot do."""
    return subprocess.run(
        [sys.executable, *COMMAND[1:], "mount", *map(str, arguments)],
        cwd=base,
        env={**ENVIRONMENT, **environment},
        text=True,
        capture_output=True,
        timeout=SECONDS,
    )
