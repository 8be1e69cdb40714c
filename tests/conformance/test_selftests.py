"""What the selftests of Linux 7.3 ask of ``/dev/liveupdate``, asked of ours through its socket.

Written from the list of scenarios in luo-mainline 4.6, in the order of that list: 15 of the calls,
4 of a reboot, and the in-kernel one. Each is done with a kernel in this process and with one in a
second process, which jumps into a third.
"""

import errno
import os

import pytest
from rig import errno_of
from session_kernels import MAGIC, MEMFDS, content, copies, host, magic_flbs, memfd

from luo import uapi
from luo.client import Session
from luo.kernel import Kernel, KernelImage
from luo.machine import Machine

MANY_SESSIONS = 2000
MANY_FILES = 500

PLACES = pytest.mark.parametrize("in_process", [True, False], ids=["here", "process"])


@pytest.fixture(params=[True, False], ids=["here", "process"])
def machine(request, tmp_path):
    """A machine whose kernels keep memfds."""
    with host(tmp_path / "liveupdate", MEMFDS, request.param) as running:
        yield running


@pytest.fixture
def node(machine):
    """Its open node; nothing is left when it is closed."""
    with machine.open() as opened:
        yield opened
    assert machine.listed() == [{}, {}]


def kept(session, token, text):
    """Preserve a new memfd that holds *text* under *token*, and return it."""
    fd = memfd(text)
    session.preserve_fd(fd, token)
    return fd


def closing(*fds):
    for fd in fds:
        os.close(fd)


# ---- the calls ----


def test_01_open_and_close(machine):
    """The node can be opened, closed, and opened again."""
    for _ in range(2):
        with machine.open() as node:
            assert node.fileno() >= 0


def test_02_open_is_exclusive(machine):
    """A second opener is EBUSY as long as the first has it open, and no longer."""
    with machine.open():
        assert errno_of(machine.open) == errno.EBUSY
    machine.open().close()


def test_03_session_twice(node):
    """A second session of a name is EEXIST; once the first is closed there can be one."""
    with node.create_session("twice"):
        assert errno_of(node.create_session, "twice") == errno.EEXIST
    node.create_session("twice").close()


def test_04_distinct_sessions(node):
    """Two sessions of different names."""
    with node.create_session("one") as one, node.create_session("other") as other:
        assert (one.get_name(), other.get_name()) == ("one", "other")


def test_05_memfd_is_as_it_was_when_its_session_is_closed(node):
    """Preserve, close, reread: the content is untouched, and it can be written again."""
    with node.create_session("memfd") as session:
        fd = kept(session, 0x1234, b"hello liveupdate")

    assert content(fd) == b"hello liveupdate"
    os.ftruncate(fd, 0)
    closing(fd)


def test_06_several_memfds_in_a_session(node):
    """Each keeps its own content."""
    with node.create_session("several") as session:
        fds = [kept(session, token, b"data of %d" % token) for token in (0xAAAA, 0xBBBB)]

        assert [content(fd) for fd in fds] == [b"data of 43690", b"data of 48059"]
    closing(*fds)


def test_07_two_sessions_with_a_full_and_an_empty_memfd_each(node):
    """Full and empty, in two sessions."""
    with node.create_session("first") as first, node.create_session("second") as second:
        fds = [kept(first, 0x1111, b"data 1"), kept(first, 0x2222, b"")]
        fds += [kept(second, 0x3333, b"data 2"), kept(second, 0x4444, b"")]

        assert [content(fd) for fd in fds] == [b"data 1", b"", b"data 2", b""]
    closing(*fds)


def test_08_file_that_nobody_preserves(node):
    """/dev/null is ENOENT."""
    with node.create_session("unsupported") as session, open(os.devnull, "rb") as null:
        assert errno_of(session.preserve_fd, null.fileno(), 0xDEAD) == errno.ENOENT


def test_09_file_twice(node):
    """A file that is preserved is EBUSY, in another session and in its own."""
    with node.create_session("double-1") as one, node.create_session("double-2") as other:
        fd = kept(one, 0x1111, b"")
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)

        assert errno_of(other.preserve_fd, fd, 0x2222) == errno.EBUSY
        assert errno_of(one.preserve_fd, fd, 0x3333) == errno.EBUSY
        assert errno_of(other.preserve_fd, again, 0x4444) == errno.EBUSY
    closing(fd, again)


def test_10_name_without_its_nul(node):
    """64 bytes of name are EINVAL."""
    argument = uapi.NAMED.pack(uapi.NAMED.size, 0, b"X" * uapi.NAME_LENGTH)

    assert errno_of(node.ioctl, uapi.CREATE_SESSION, argument) == errno.EINVAL


def test_11_empty_name(node):
    """No name is EINVAL."""
    assert errno_of(node.create_session, "") == errno.EINVAL


def test_12_name_of_a_session(node):
    """The descriptor alone tells it."""
    with (
        node.create_session("get-name") as session,
        Session.from_fd(os.dup(session.fileno())) as same,
    ):
        assert same.get_name() == "get-name"


def test_13_longest_name_of_a_session(node):
    """63 bytes come back whole."""
    with node.create_session("A" * 63) as session:
        assert session.get_name() == "A" * 63


def test_14_many_sessions(node, machine):
    """2,000 at a time."""
    sessions = [node.create_session(f"many-{number}") for number in range(MANY_SESSIONS)]

    assert list(machine.listed()[0]) == [f"many-{number}" for number in range(MANY_SESSIONS)]
    for session in sessions:
        session.close()


def test_15_many_files_in_a_session(node, machine):
    """500 memfds."""
    with node.create_session("many-files") as session:
        fds = [kept(session, token, b"") for token in range(MANY_FILES)]

        assert machine.listed()[0] == {"many-files": list(range(MANY_FILES))}
        closing(*fds)


# ---- the reboots: what is done before, what is found after ----


class Simple:
    """One session, one file."""

    token = 999

    def stage_1(self, node):
        session = node.create_session("test-session")
        closing(kept(session, 0x1A, b"hello kexec world"))
        return [session]

    def stage_2(self, node):
        found_and_finished(node, "test-session", {0x1A: b"hello kexec world"})


MULTI = {
    "empty-1": {},
    "empty-2": {},
    "files-1": {0x1001: b"data of files-1"},
    "files-2": {0x2002: b"first of files-2", 0x3003: b"second of files-2"},
}


class Multi:
    """Two empty sessions, one with a file, one with two."""

    token = 998

    def stage_1(self, node):
        held = []
        for name, files in MULTI.items():
            held.append(node.create_session(name))
            closing(*(kept(held[-1], token, text) for token, text in files.items()))
        return held

    def stage_2(self, node):
        for name, files in MULTI.items():
            found_and_finished(node, name, files)


class ManyFiles:
    """500 files in a session."""

    token = 9999

    def stage_1(self, node):
        session = node.create_session("many_files_session")
        closing(*(kept(session, token, b"data %d" % token) for token in range(MANY_FILES)))
        return [session]

    def stage_2(self, node):
        files = {token: b"data %d" % token for token in range(MANY_FILES)}
        found_and_finished(node, "many_files_session", files)


class ManySessions:
    """2,000 empty sessions."""

    token = 999

    def stage_1(self, node):
        return [node.create_session(f"many-test-{number}") for number in range(MANY_SESSIONS)]

    def stage_2(self, node):
        for number in range(MANY_SESSIONS):
            found_and_finished(node, f"many-test-{number}", {})


def found_and_finished(node, name, files):
    """Retrieve a session, compare its files, finish it."""
    with node.retrieve_session(name) as session:
        for token, text in files.items():
            fd = session.retrieve_fd(token)

            assert content(fd) == text
            assert not os.get_inheritable(fd)
            closing(fd)
        session.finish()


@pytest.mark.parametrize("scenario", [Simple(), Multi(), ManyFiles(), ManySessions()], ids=type)
def test_reboot(machine, scenario):
    """Two stages; a session of its own holds a memfd with the number of the next one."""
    with machine.open() as node:
        assert errno_of(node.retrieve_session, "state") == errno.ENOENT  # so this is stage 1
        state = node.create_session("state")
        closing(kept(state, scenario.token, b"2"))
        held = [state, *scenario.stage_1(node)]

    machine.kexec()

    with machine.open() as node:
        assert errno_of(held[-1].get_name) == errno.ESHUTDOWN  # its kernel has gone
        state = node.retrieve_session("state")
        fd = state.retrieve_fd(scenario.token)
        assert content(fd) == b"2"
        scenario.stage_2(node)
        state.finish()
        state.close()
    closing(fd)
    assert machine.listed() == [{}, {}]
    for session in held:
        session.close()


# ---- in the kernel ----


@PLACES
def test_flbs_with_magic_data(tmp_path, in_process):
    """Three objects of the memfds come over with their numbers, and are finished with the last."""
    log = tmp_path / "log"
    image = KernelImage("session_kernels:with_flbs", args={"log": str(log)})
    with host(tmp_path / "node", image, in_process) as machine:
        with machine.open() as node:
            session = node.create_session("flbs")
            closing(kept(session, 1, b"one"), kept(session, 2, b"two"))
        machine.kexec()
        with machine.open() as node:
            found_and_finished(node, "flbs", {2: b"two", 1: b"one"})

    lines = [line.split() for line in log.read_text().splitlines()]
    assert [line[:3] for line in lines[:3]] == [
        ["preserve", str(place), f"{MAGIC + place:x}"] for place in range(3)
    ]
    after = {(event, int(place)): int(obj) for event, place, _, obj in lines[3:]}
    assert after == {
        (event, place): MAGIC + place for event in ("retrieve", "finish") for place in range(3)
    }
    assert len(lines) == 9
    session.close()


def test_flb_registered_twice():
    """A second time for the same handler is EEXIST, and so is another of its name."""
    first, second, third = magic_flbs(os.devnull)
    (impostor, *_) = magic_flbs(os.devnull)
    handler = copies()
    with Kernel(Machine("64MiB"), file_handlers=[handler]).boot() as kernel:
        for flb in (first, second, third):
            kernel.liveupdate.register_flb(handler, flb)

        assert errno_of(kernel.liveupdate.register_flb, handler, first) == errno.EEXIST
        assert errno_of(kernel.liveupdate.register_flb, handler, impostor) == errno.EEXIST
