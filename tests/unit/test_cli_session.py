"""``luo session``: what a person or a script types, what it prints, and how it ends."""

import contextlib
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from rig import errno_of
from session_kernels import MEMFDS, content, host, memfd

from luo import client
from luo.cli import main
from luo.device_node import ControlSocket

from .test_cli import COMMAND, ENVIRONMENT
from .test_docs import ROOT, blocks
from .test_mount import base, mounted, mounts, shell, started  # noqa: F401

SECONDS = 60


@pytest.fixture
def machine(tmp_path):
    """A machine that keeps memfds, and whose node is where the commands look."""
    (tmp_path / "a").write_text("text of a\n")
    (tmp_path / "b").write_bytes(bytes(range(256)) * 100)
    with host(tmp_path / "node", MEMFDS) as running:
        yield running


def environment(machine, **more):
    return {**ENVIRONMENT, "LUO_CONTROL": machine.path, **more}


def luo(machine, *words, status=0, **kwargs):
    """Run ``luo session``; return what it says, errors last."""
    done = subprocess.run(
        [*COMMAND, "session", *words],
        cwd=os.path.dirname(machine.path), env=environment(machine), text=True,
        capture_output=True, timeout=SECONDS, **kwargs,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def running(machine, *words):
    """Have ``luo session`` run until the block ends; yields it when it has said something."""
    with subprocess.Popen(
        [*COMMAND, "session", *words],
        cwd=os.path.dirname(machine.path), env=environment(machine), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            process.said = process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_session_is_kept_over_a_jump_and_its_files_are_written(machine, tmp_path):
    """create, the jump, list, retrieve: the files are equal, and nothing is left."""
    with running(machine, "create", "vm", "1=a", "0x2=b", "3=-") as process:
        assert process.said == "session vm: 3 files; ^C drops it\n"
        assert machine.listed()[0] == {"vm": [1, 2, 3]}
        machine.kexec()
        assert process.stdout.read() == "session vm: the kernel has gone\n"
        assert process.wait(SECONDS) == 0

    assert "kernel before" in luo(machine, "list")
    assert luo(machine, "retrieve", "vm", "1=c", "2=d", "3=/dev/null") == ""
    assert (tmp_path / "c").read_text() == "text of a\n"
    assert (tmp_path / "d").read_bytes() == (tmp_path / "b").read_bytes()
    assert luo(machine, "list") == "no sessions\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_session_goes_with_the_command(machine, number):
    """^C and SIGTERM: 130, and the session is dropped."""
    with running(machine, "create", "vm", "1=a") as process:
        process.send_signal(number)

        assert process.wait(SECONDS) == 130
    assert machine.listed() == [{}, {}]


def test_two_sessions_are_created_at_a_time(machine):
    """The node is only open for a moment; who meets another waits."""
    with machine.open() as node:
        process = subprocess.Popen(
            [*COMMAND, "session", "create", "one", "--", "true"], env=environment(machine)
        )
        time.sleep(0.5)
        other = node.create_session("other")
    assert process.wait(SECONDS) == 0
    other.close()


AGENT = """
import os, socket, sys
from luo.client import Session

assert os.environ["LISTEN_PID"] == str(os.getpid())
assert os.environ["LUO_SESSION_FD"] == "3"
print(os.environ["LISTEN_FDNAMES"], os.environ["LISTEN_FDS"])
session = Session.from_fd(3)
print(session.get_name())
for fd in range(4, 3 + int(os.environ["LISTEN_FDS"])):
    print(os.pread(fd, 100, 0))
"""


def test_command_has_the_session_as_descriptor_3(machine, tmp_path):
    """As systemd passes descriptors; its own end is that of the session, its status the status."""
    (tmp_path / "agent.py").write_text(AGENT)
    said = luo(machine, "create", "vm:1", "5=a", "--", sys.executable, "agent.py", "--list")
    assert said == "vm_1 1\nvm:1\n"
    luo(machine, "create", "vm", "--", "sh", "-c", "exit 7", status=7)
    assert machine.listed() == [{}, {}]


def test_command_gets_retrieved_files(machine, tmp_path):
    """A token without a file is a descriptor of the command, in order."""
    (tmp_path / "agent.py").write_text(AGENT)
    with machine.open() as node:
        held = node.create_session("vm")
        for token in (1, 2, 3):
            fd = memfd(b"text %d" % token)
            held.preserve_fd(fd, token)
            os.close(fd)
    machine.kexec()
    said = luo(machine, "retrieve", "vm", "2", "1", "--", sys.executable, "agent.py")

    assert said == "vm:0x2:0x1 3\nvm\nb'text 2'\nb'text 1'\n"
    assert machine.listed() == [{}, {}]  # its end finished the session
    held.close()


def test_preserve_adds_to_the_session_that_was_inherited(machine):
    """Below create -- COMMAND; a descriptor is preserved itself, not its content."""
    script = f"{shlex.join(COMMAND)} session preserve 2=a 3=b && echo done && exec sleep 60"
    with running(machine, "create", "vm", "1=a", "--", "sh", "-c", script) as process:
        assert process.said == "done\n"
        assert machine.listed()[0] == {"vm": [1, 2, 3]}
    with machine.open() as node, node.create_session("vm") as session:
        fd = memfd(b"itself")
        os.set_inheritable(fd, True)
        inherited = [session.fileno(), fd]
        os.set_inheritable(session.fileno(), True)
        luo(machine, "preserve", "--fd", str(session.fileno()), f"9=fd:{fd}", pass_fds=inherited)
        assert errno_of(session.preserve_fd, fd, 10) == errno.EBUSY
        assert content(fd) == b"itself"
        os.close(fd)


@pytest.fixture
def wrong(machine, monkeypatch, capsys):
    """Run ``luo session`` in this process; return the line that it says, and its status."""
    monkeypatch.setenv("LUO_CONTROL", machine.path)
    monkeypatch.chdir(os.path.dirname(machine.path))
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(*words):
        with pytest.raises(SystemExit) as end:
            main.main(["session", *words])
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        return said.err.removeprefix("luo: ").rstrip("\n"), end.value.code

    yield run
    for number, handler in handlers:
        signal.signal(number, handler)


def test_finish_gives_up_what_came_over(machine):
    """And it is gone: a second time there is none."""
    with machine.open() as node:
        held = node.create_session("vm")
    machine.kexec()
    assert luo(machine, "finish", "vm") == ""
    assert luo(machine, "finish", "vm", status=1) == (
        "luo: retrieve session vm: none of that name came over [ENOENT]\n"
    )
    held.close()


def test_retrieve_loses_nothing_by_mistake(machine, tmp_path, wrong):
    """Tokens that are missing, or not named, and files that cannot be written: nothing is done."""
    with machine.open() as node:
        held = node.create_session("vm")
        for token in (1, 2):
            fd = memfd(b"x")
            held.preserve_fd(fd, token)
            os.close(fd)
    machine.kexec()
    for words, why in (
        (["1=c"], "session vm: 0x2 would be lost: name them too, or --drop-rest"),
        (["1=c", "2=d", "7=e"], "session vm: no file has token 0x7; it has 0x1 0x2"),
        (["1=c", "2=none/d"], "retrieve none/d: No such file or directory"),
        (["1=c", "1=d"], "0x1: the token stands twice"),
        (["1=c", "2"], "0x2: TOKEN=FILE is expected"),
        (["1=c", "two=d"], "two=d: TOKEN=FILE is expected, TOKEN a number of 64 bits"),
    ):
        assert wrong("retrieve", "vm", *words) == (why, 2)
        assert machine.listed()[1] == {"vm": [1, 2]}
    assert not (tmp_path / "c").exists()
    assert luo(machine, "retrieve", "vm", "1=c", "--drop-rest") == ""
    assert (tmp_path / "c").read_text() == "x"
    held.close()


def test_refusals_are_a_line_and_their_status(machine, wrong):
    """1 where the kernel says no, 2 where the input is wrong."""
    with machine.open() as node, node.create_session("vm"):
        assert wrong("create", "more") == (
            "open /dev/liveupdate: somebody has it open [EBUSY]", 1,
        )  # fmt: skip
    with machine.open() as node:
        session = node.create_session("vm")
    assert wrong("create", "vm") == ("create session vm: there is one of that name [EEXIST]", 1)
    session.close()
    for words, why in (
        (["create", "vm", "1=none"], "none: No such file or directory"),
        (["create", "vm", "1"], "0x1: TOKEN=FILE is expected"),
        (["create", "vm", "1=fd:99"], "fd:99: is no open descriptor"),
        (["create", "vm", "--"], "--: a command is expected behind it"),
        (["create", "vm", "--", "no-such-command"], "no-such-command: no such command"),
        (["list", "none"], "session none: there is none"),
        (["list", "--control", "/none"], "/none: list: No such file or directory [ENOENT]"),
        (["list", "--control", __file__], f"{__file__}: list: is no device node and no socket "),
        (["preserve", "1=a"], "preserve: no session: run it below 'luo session create NAME -- "),
        (["preserve", "1=a", "--fd", "99"], "preserve: --fd 99: Bad file descriptor"),
    ):
        said, status = wrong(*words)
        assert (said[: len(why)], status) == (why, 2)
    assert machine.listed() == [{}, {}]


def test_list_fits_the_screen_and_is_json(machine):
    """Sessions of both kernels, their files, and the document that programs read."""
    with machine.open() as node:
        held = [node.create_session(f"vm{number}") for number in range(3)]
        fds = [memfd(b"%d" % token) for token in range(20)]
        for token, fd in enumerate(fds):
            held[0].preserve_fd(fd, token << 56)
        machine.kexec()
    with machine.open() as node, node.retrieve_session("vm0") as session, node.create_session("n"):
        os.close(session.retrieve_fd(0))
        said = luo(machine, "list")
        assert "and 12 more" in said
        assert max(map(len, said.splitlines())) <= 100  # COLUMNS
        assert [line.split()[:2] for line in said.splitlines()[2:] if line[0] != " "] == [
            ["n", "this"], ["vm0", "retrieved"], ["vm1", "kernel"], ["vm2", "kernel"],
        ]  # fmt: skip
        rows = luo(machine, "list", "vm0").splitlines()
        assert len(rows) == 22
        assert rows[2].split()[-1] == "retrieved"
        told = json.loads(luo(machine, "list", "--json"))
        assert told["schema"] == "luo-sessions/1"
        assert [one["name"] for one in told["incoming"]] == ["vm0", "vm1", "vm2"]
        assert len(told["incoming"][0]["files"]) == 20
    for session in held:
        session.close()
    for fd in fds:
        os.close(fd)


def test_names_of_any_bytes_do_a_terminal_no_harm(machine):
    """Not UTF-8, or with control characters: escaped, and one line."""
    with machine.open() as node, node.create_session(b"\xff\x1b[2J\n"):
        lines = luo(machine, "list").splitlines()
        assert len(lines) == 3
        assert lines[2].startswith(r"\xff\x1b[2J\n ")
        said = luo(machine, "create", b"\xff\x1b[2J\n", status=1)
        assert said.count("\n") == 1
        assert "\x1b" not in said
        json.loads(luo(machine, "list", "--json"))


# ---- with a mounted host ----


@mounts
@pytest.mark.parametrize("where", [("--in-process",), ()], ids=["here", "process"])
def test_mounted_host_has_the_node(base, where):  # noqa: F811
    """A link in the tree; sessions go over a jump that a shell asks for, prepared or not."""
    with mounted(base, *where) as sys_:
        link = sys_ / "dev/liveupdate"
        assert os.readlink(link) == f"{base}/sys.liveupdate"
        assert shell(base, "stat -L -c %a dev/liveupdate") == "600"
        for prepared in (False, True):
            with client.LiveUpdate.open(str(link)) as node:
                held, fd = node.create_session("vm"), memfd(b"over")
                held.preserve_fd(fd, 1)
                os.close(fd)
            if prepared:
                (sys_ / "kernel/liveupdate/prepare").write_text("1")
            (sys_ / "kernel/debug/liveupdate/kexec").write_text("1")
            with client.LiveUpdate.open(str(link)) as node, node.retrieve_session("vm") as session:
                fd = session.retrieve_fd(1)
                assert content(fd) == b"over"
                os.close(fd)
            held.close()
        (sys_ / "kernel/liveupdate/finish").write_text("1")
    assert sorted(os.listdir(base)) == ["host.toml", "log", "sys", "waits.py"]


@mounts
def test_shell_of_the_guide_keeps_a_file(base):  # noqa: F811
    """Typed into a shell beside a mounted host, the file is equal at the end."""
    script = next(b for b in blocks(ROOT / "docs/sessions.md", "sh") if "LUO_CONTROL" in b)
    (base / "host").symlink_to("sys")
    with mounted(base, "--in-process"):
        done = subprocess.run(
            ["bash", "-e"],
            input=f'luo() {{ {shlex.join(COMMAND)} "$@"; }}\n{script}',
            cwd=base, env=ENVIRONMENT, text=True, capture_output=True, timeout=SECONDS,
        )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert (base / "vm.restored").read_text() == "state of a machine\n"


@mounts
def test_socket_of_a_mount_that_was_killed_is_replaced(base):  # noqa: F811
    """The next one there takes its place; one that is in use is left alone."""
    with started(base, "--in-process") as process:
        process.kill()
        process.wait()
    assert (base / "sys.liveupdate").is_socket()
    control = base / "control"
    with ControlSocket(str(control)), mounted(base, "--in-process") as sys_:
        with client.LiveUpdate.open(str(sys_ / "dev/liveupdate")) as node:
            node.create_session("vm").close()
        (base / "sys2").mkdir()
        done = subprocess.run(
            [*COMMAND, "mount", "--host", base / "host.toml", "--control", control, base / "sys2"],
            env=ENVIRONMENT, text=True, capture_output=True, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == (
            f"luo: --control {control}: another process serves there [EADDRINUSE]\n"
        )


@mounts
def test_mount_without_sessions_has_no_node(base):  # noqa: F811
    """RFC v1's own generation: no link, no socket, and --control is refused."""
    with mounted(base, "--in-process", "--behaviour", "rfc1") as sys_:
        assert sorted(os.listdir(sys_)) == ["devices", "kernel"]
        assert not (base / "sys.liveupdate").exists()
    done = subprocess.run(
        [*COMMAND, "mount", "--behaviour", "rfc1", "--control", "x", base / "sys"],
        env=ENVIRONMENT, text=True, capture_output=True, timeout=SECONDS,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2, "luo: mount: --control: sessions are handed over in kho-v4 only\n",
    )  # fmt: skip
