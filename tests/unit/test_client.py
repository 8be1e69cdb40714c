"""The node's socket and its client: bytes, refusals, hostile clients, descriptors, ends."""

import array
import contextlib
import errno
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig import errno_of
from session_kernels import COPIES, content, copies, host, memfd

import luo
from luo import client as client_module
from luo import uapi
from luo.client import LiveUpdate, Session
from luo.device_node import ControlSocket
from luo.errors import StateError
from luo.kernel import Kernel, KernelImage
from luo.machine import Machine
from luo.sysfs import Tree

TESTS = Path(__file__).parents[1]


@pytest.fixture
def machine(tmp_path):
    """A machine with a node in this process."""
    with host(tmp_path / "node", COPIES) as running:
        yield running


@pytest.fixture
def node(machine):
    """Its open node."""
    with machine.open() as opened:
        yield opened


def descriptors(machine=None):
    """Return how many descriptors this process has, but for machines' memory, freed whenever.

    Those of calls that *machine* has answered are closed.
    """
    if machine is not None:
        machine.control.settle()
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:luo-memory")
    return count


def eventually(condition):
    """Wait until *condition*."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def connected(path):
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.connect(str(path))
    return peer


def told(peer, packet, *fds):
    """Send a packet with a socket for the answer and *fds*; return the answer, b"" for none."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(30)
    with ours:
        with theirs:
            socket.send_fds(peer, [packet], [theirs.fileno(), *fds])
        answer, made, _, _ = socket.recv_fds(ours, 8192, 2)
    for fd in made:
        os.close(fd)
    return answer


def status(answer):
    """Return the errno in an answer, 0 for success."""
    return -struct.unpack_from("=i", answer)[0]


# ---- bytes ----


def test_bytes_of_a_call_and_its_answer(machine):
    """Number and structure go, 0 and the structure come: spelled out for other languages."""
    with connected(machine.path) as peer:
        assert told(peer, bytes.fromhex("004c0000")) == bytes(4)  # OPEN
        name = b"vm".ljust(64, b"\0")
        create = bytes.fromhex("00ba000048000000ffffffff") + name
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            socket.send_fds(peer, [create], [theirs.fileno()])
            answer, (session,), _, _ = socket.recv_fds(ours, 4096, 1)
        assert answer == bytes.fromhex("0000000048000000ffffffff") + name
        with socket.socket(fileno=session) as end:
            get_name = bytes.fromhex("43ba00004800000000000000") + bytes(64)
            assert told(end, get_name) == bytes.fromhex("000000004800000000000000") + name
            assert told(end, bytes.fromhex("41ba000010000000") + bytes(12))[:4] == (
                struct.pack("=i", -errno.EINVAL)
            )


def named(name=b"x", size=72, tail=b""):
    return struct.pack("=Ii64s", size, 0, name) + tail


REFUSED = {
    "number that there is not": ("node", 0xBA02, named(), errno.EINVAL),
    "number of a session": ("node", 0xBA40, named(), errno.EINVAL),
    "number of the node": ("session", 0xBA00, named(), errno.EINVAL),
    "number that there is not, size or no": ("node", 0xBA7F, b"", errno.EINVAL),
    "no structure": ("node", 0xBA00, b"", errno.EFAULT),
    "half a size": ("node", 0xBA00, b"\x48\0\0", errno.EFAULT),
    "size in the number": ("node", 0xC048BA00, named(), errno.ENOTTY),
    "another type": ("node", 0xBB00, named(), errno.ENOTTY),
    "another type, size too small": ("node", 0xBB00, named(size=1), errno.ENOTTY),
    "size in the number of a session's": ("session", 0xC010BA41, bytes(16), errno.ENOTTY),
    "incoming only": ("session", 0xBA41, struct.pack("=IiQ", 16, 0, 1), errno.EINVAL),
    "incoming only, size too small": ("session", 0xBA41, bytes(16), errno.EINVAL),
    "size too small": ("node", 0xBA00, named(size=71), errno.EINVAL),
    "size 0": ("session", 0xBA43, bytes(72), errno.EINVAL),
    "size beyond the packet": ("node", 0xBA00, named(size=80), errno.EFAULT),
    "size beyond the packet by far": ("node", 0xBA00, named(size=0xFFFFFFFF), errno.EFAULT),
    "tail that is not zero": ("node", 0xBA00, named(size=76, tail=b"\0\0\1\0"), errno.E2BIG),
    "tail that is not zero and short": ("node", 0xBA00, named(size=99, tail=b"\1"), errno.E2BIG),
    "packet larger than any": ("node", 0xBA00, named(size=9000, tail=bytes(8928)), errno.E2BIG),
    "reserved": ("session", 0xBA43, struct.pack("=II64s", 72, 1, b""), errno.EINVAL),
    "tail of zeros": ("node", 0xBA00, named(size=4000, tail=bytes(3928)), 0),
    "packet longer than its size": ("node", 0xBA00, named(tail=b"\xff" * 64), 0),
    "name without its NUL, retrieved": ("node", 0xBA01, named(b"X" * 64), errno.ENOENT),
    "name behind a NUL": ("node", 0xBA01, named(b"\0abc"), errno.ENOENT),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dispatch_has_the_kernels_errno(machine, case):
    """In the kernel's order: number, first word, encoding, kind, size, tail, rest."""
    kind, command, structure, code = REFUSED[case]
    with machine.open() as node, node.create_session("a session") as session:
        peer = (node if kind == "node" else session)._socket

        assert status(told(peer, struct.pack("=I", command) + structure)) == code


def refusal(session, packet):
    """Return the errno with which Linux's dispatcher refuses a call, None if it does not."""
    sizes = {0x40: 16, 0x41: 16, 0x42: 8, 0x43: 72} if session else {0x00: 72, 0x01: 72}
    command = int.from_bytes(packet[:4], "little")
    nr, memory = command & 0xFF, packet[4:]
    if nr not in sizes:
        return errno.EINVAL
    if len(memory) < 4:
        return errno.EFAULT  # get_user()
    if command != 0xBA00 | nr:
        return errno.ENOTTY
    if nr in (0x41, 0x42):
        return errno.EINVAL  # the session did not come over
    size, known = int.from_bytes(memory[:4], "little"), sizes[nr]
    if size < known:
        return errno.EINVAL
    for byte in range(known, size):  # copy_struct_from_user(): the tail first
        if byte >= len(memory):
            return errno.EFAULT
        if memory[byte]:
            return errno.E2BIG
    return errno.EFAULT if len(memory) < size else None


calls = st.sampled_from([0xBA00, 0xBA01, 0xBA40, 0xBA41, 0xBA42, 0xBA43, 0xC048BA00, 0x4C02])
numbers = st.one_of(calls, st.integers(0, (1 << 32) - 1), st.integers(0xBA00, 0xBAFF))
lengths = st.one_of(st.sampled_from([0, 8, 16, 71, 72, 73, 80, 200]), st.integers(0, (1 << 32) - 1))
bodies = st.one_of(st.binary(max_size=100), st.integers(0, 300).map(bytes))


def test_any_packet_has_the_dispatchers_errno(tmp_path):
    """Random numbers, sizes and bytes, against the dispatcher written down once more."""
    with host(tmp_path / "node", COPIES) as machine, machine.open() as node:
        with node.create_session("there") as session:

            @given(st.booleans(), numbers, lengths, bodies)
            def same(of_session, command, length, body):
                packet = struct.pack("=II", command, length) + body
                expected = refusal(of_session, packet)
                code = status(told((session if of_session else node)._socket, packet))

                assert code == expected if expected else code in OWN[command & 0xFF]

            same()
        assert machine.listed() == [{}, {}]


#: What the calls themselves are refused with, or succeed.
OWN = {
    0x00: (0, errno.EINVAL, errno.EEXIST),
    0x01: (errno.ENOENT,),
    0x40: (errno.EBADF,),
    0x43: (0, errno.EINVAL),
}


def test_call_before_the_node_is_open(machine):
    """EBADF; and opening twice on a connection is EBUSY."""
    with connected(machine.path) as peer:
        assert status(told(peer, struct.pack("=I", 0xBA00) + named())) == errno.EBADF
        assert status(told(peer, struct.pack("=I", uapi.OPEN))) == 0
        assert status(told(peer, struct.pack("=I", uapi.OPEN))) == errno.EBUSY


def test_preserve_checks_the_token_before_the_descriptor(node):
    """EEXIST, then EBADF, then ENOENT; a descriptor without a file (O_PATH) is none."""
    session, fd = node.create_session("order"), memfd(b"x")
    session.preserve_fd(fd, 1)
    path = os.open("/", os.O_PATH)
    gone = os.dup(fd)
    os.close(gone)
    for bad in (-1, gone, path):
        assert errno_of(session.preserve_fd, bad, 1) == errno.EEXIST
        assert errno_of(session.preserve_fd, bad, 2) == errno.EBADF
    assert errno_of(session.preserve_fd, session.fileno(), 2) == errno.ENOENT
    session.close()
    os.close(path)
    os.close(fd)


def test_refusals_name_session_token_and_rule(machine, node):
    """In words that tell what to change."""
    session, fd = node.create_session("vm"), memfd()
    session.preserve_fd(fd, 0x1A)
    for call, words in (
        (lambda: session.preserve_fd(fd, 0x1A), ("vm/0x1a", "EEXIST")),
        (lambda: session.preserve_fd(fd, 2), ("vm/0x2", "vm/0x1a", "EBUSY")),
        (lambda: session.retrieve_fd(1), ("vm", "EINVAL")),
        (session.finish, ("vm", "EINVAL")),
        (lambda: node.create_session("vm"), ("vm", "EEXIST")),
        (lambda: node.create_session("a\0b"), ("1 to 63 bytes", "EINVAL")),
        (lambda: node.create_session("y" * 70), ("y" * 70, "1 to 63 bytes", "EINVAL")),
        (lambda: node.retrieve_session("lost"), ("lost", "ENOENT")),
        (machine.open, ("open", "EBUSY")),
    ):
        with pytest.raises(OSError) as refused:
            call()
        for word in words:
            assert word in str(refused.value)
    with pytest.raises(OverflowError):
        session.preserve_fd(fd, 1 << 64)
    session.close()
    os.close(fd)


# ---- files over a jump ----


def test_retrieved_files_are_new_descriptors_each_time(machine):
    """Close-on-exec, of one file; a token that is not there is ENOENT; after FINISH all are."""
    with machine.open() as node:
        held, fd = node.create_session("vm"), memfd(b"text")
        held.preserve_fd(fd, 7)
        os.close(fd)
    machine.kexec()
    with machine.open() as node, node.retrieve_session("vm") as session:
        assert errno_of(node.retrieve_session, "vm") == errno.EINVAL
        assert errno_of(session.preserve_fd, 0, 1) == errno.EINVAL
        assert errno_of(session.retrieve_fd, 8) == errno.ENOENT
        one, two = session.retrieve_fd(7), session.retrieve_fd(7)
        assert one != two
        assert os.path.sameopenfile(one, two)
        assert not os.get_inheritable(one)
        assert content(one) == b"text"
        session.finish()
        assert errno_of(session.retrieve_fd, 7) == errno.ENOENT
        assert content(two) == b"text"
        os.close(one)
        os.close(two)
    held.close()


def test_file_that_is_no_descriptor_cannot_be_passed(tmp_path):
    """EOPNOTSUPP, and the session goes on."""

    def retrieve(args):
        args.file = object()

    image = KernelImage("session_kernels:with_copies")
    with host(tmp_path / "node", image) as machine:
        with machine.open() as node:
            held, fd = node.create_session("vm"), memfd(b"text")
            held.preserve_fd(fd, 7)
        os.close(fd)
        machine.kernel.kexec_load(
            Kernel(machine.machine, file_handlers=[copies(retrieve=retrieve)])
        )
        machine.kernel = machine.kernel.kexec()
        with machine.open() as node, node.retrieve_session("vm") as session:
            assert errno_of(session.retrieve_fd, 7) == errno.EOPNOTSUPP
            session.finish()
    held.close()


def test_kernel_of_another_process_says_where_its_sessions_are(tmp_path):
    """EOPNOTSUPP with the way to them; and that way works."""
    with host(tmp_path / "node", COPIES) as machine:
        machine.kernel.kexec_load(COPIES)
        machine.kernel = machine.kernel.kexec()
        with pytest.raises(StateError, match=r"ControlSocket.*luo.client.*\[EOPNOTSUPP\]"):
            _ = machine.kernel.liveupdate
        with machine.open() as node:
            node.create_session("there").close()


def test_handler_that_fails_is_told_of(tmp_path):
    """Its errno, its words; and a failed retrieve is the same ever after."""

    def fails(args):
        raise OSError(errno.ENOSPC, "no room for it")

    with host(tmp_path / "node", COPIES) as machine:
        with machine.open() as node:
            held, fd = node.create_session("vm"), memfd(b"text")
            held.preserve_fd(fd, 7)
        os.close(fd)
        machine.kernel.kexec_load(Kernel(machine.machine, file_handlers=[copies(retrieve=fails)]))
        machine.kernel = machine.kernel.kexec()
        with machine.open() as node, node.retrieve_session("vm") as session:
            for _ in range(2):
                assert errno_of(session.retrieve_fd, 7) == errno.ENOSPC
            with pytest.raises(OSError, match="vm/0x7"):
                session.retrieve_fd(7)
    held.close()


# ---- how long a session lives ----


def test_session_lives_until_its_last_descriptor_is_closed(machine, node):
    """Of two, either order."""
    for first in (0, 1):
        session = node.create_session("vm")
        both = [session, Session.from_fd(os.dup(session.fileno()))]
        both.pop(first).close()
        assert machine.listed()[0] == {"vm": []}
        assert both[0].get_name() == "vm"
        both[0].close()
        assert machine.listed() == [{}, {}]


def test_sessions_stay_when_the_node_is_closed(machine):
    """And another opener cannot make one of the name."""
    with machine.open() as node:
        session = node.create_session("vm")
    with machine.open() as node:
        assert errno_of(node.create_session, "vm") == errno.EEXIST
    session.close()
    assert machine.listed() == [{}, {}]


KEEPER = """
    import os, socket, sys
    from luo.client import LiveUpdate, Session

    with LiveUpdate.open(sys.argv[1]) as node:
        session = node.create_session("passed")
        fd = os.memfd_create("x")
        os.write(fd, b"of another process")
        session.preserve_fd(fd, 5)
        if len(sys.argv) > 2:
            with socket.socket(fileno=int(sys.argv[2])) as to:
                socket.send_fds(to, [b"x"], [session.fileno()])
        print("there", flush=True)
        sys.stdin.read()
"""


#: Where the process finds the helpers of the tests, and luo as it is found here.
PATHS = (TESTS, Path(luo.__file__).parents[1])


@contextlib.contextmanager
def process(code, *args, fds=(), **kwargs):
    """Run Python *code* in a process, until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=fds,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in PATHS)},
        **kwargs,
    ) as running:  # fmt: skip
        yield running


def test_session_passed_on_outlives_the_process_that_made_it(machine):
    """Its creator is killed: the node is free, the session stays with who has its descriptor."""
    ours, theirs = socket.socketpair()
    with process(KEEPER, machine.path, theirs.fileno(), fds=[theirs.fileno()]) as keeper:
        assert keeper.stdout.readline() == "there\n"
        assert errno_of(machine.open) == errno.EBUSY
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        keeper.kill()
        keeper.wait()
    ours.close()
    theirs.close()

    with machine.open() as node, Session.from_fd(fd) as session:
        assert session.get_name() == "passed"
        assert errno_of(session.preserve_fd, fd, 5) == errno.EEXIST
        assert errno_of(node.create_session, "passed") == errno.EEXIST
    assert machine.listed() == [{}, {}]


def test_process_that_is_killed_takes_its_session_along(machine):
    """As descriptors are closed at its end."""
    with process(KEEPER, machine.path) as keeper:
        assert keeper.stdout.readline() == "there\n"
        assert machine.listed()[0] == {"passed": [5]}
        keeper.kill()
        keeper.wait()

    assert machine.listed() == [{}, {}]


CALLER = """
    import sys
    from luo.client import Session

    session = Session.from_fd(int(sys.argv[1]))
    print("there", flush=True)
    assert all(session.get_name() == "shared" for _ in range(500))
    sys.stdin.read()
"""


def test_processes_that_share_a_session_get_their_own_answers(node):
    """Two call at once on one descriptor; one asks for the name, one is refused."""
    with node.create_session("shared") as session:
        os.set_inheritable(session.fileno(), True)
        with process(CALLER, session.fileno(), fds=[session.fileno()]) as caller:
            assert caller.stdout.readline() == "there\n"
            for _ in range(500):
                assert errno_of(session.finish) == errno.EINVAL
            caller.communicate("")

            assert caller.returncode == 0


def test_session_that_was_closed_is_not_handed_over(machine):
    """Closed right before the jump: it is known to be."""
    with machine.open() as node:
        held = [node.create_session(f"s{number}") for number in range(50)]
    for session in held[1:]:
        session.close()
    machine.kexec()

    assert list(machine.listed()[1]) == ["s0"]
    held[0].close()


# ---- hostile clients ----


def full(reply):
    """Fill the room for the answer."""
    reply.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            reply.send(bytes(1000))


def hostile_packets(peer):
    """Send what no client sends."""
    null = os.open(os.devnull, os.O_RDWR)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stream, other = socket.socketpair()
    inet = socket.socket()
    with ours, theirs, stream, other, inet:
        create = struct.pack("=I", uapi.CREATE_SESSION) + named(b"hostile")
        peer.send(b"")
        peer.send(b"\0")
        peer.send(create)  # no socket for the answer: nothing is done
        for fds in ([null], [stream.fileno()], [inet.fileno()], [null] * 2, [null] * 100):
            socket.send_fds(peer, [create], fds)
        socket.send_fds(peer, [b""], [theirs.fileno()])
        socket.send_fds(peer, [bytes(60000)], [theirs.fileno(), null])
        socket.send_fds(peer, [create], [theirs.fileno(), *[null] * 200])
        socket.send_fds(peer, [create], [peer.fileno()])  # to itself
        socket.send_fds(peer, [b"\xff" * 999], [theirs.fileno(), theirs.fileno()])
        full(theirs)
        socket.send_fds(peer, [create], [theirs.fileno()])  # made, not taken: closed
    os.close(null)


def test_hostile_packets_change_nothing(machine):
    """No session, no descriptor and no thread of them is left, and others are served."""
    machine.listed()
    before = descriptors(machine)
    with machine.open() as node:
        hostile_packets(node._socket)
        eventually(lambda: machine.listed() == [{}, {}])  # what it told itself takes a while
        with node.create_session("hostile") as session:
            hostile_packets(session._socket)
            assert session.get_name() == "hostile"
    with connected(machine.path) as peer:
        hostile_packets(peer)
    eventually(lambda: machine.listed() == [{}, {}])

    assert descriptors(machine) == before
    with machine.open() as node, node.create_session("others") as session:
        assert session.get_name() == "others"


def test_too_many_descriptors_are_refused(machine, node):
    """EINVAL for a third; descriptors with calls that take none are closed."""
    before = descriptors(machine)
    create = struct.pack("=I", uapi.CREATE_SESSION) + named(b"x")
    with open(os.devnull) as null:
        assert status(told(node._socket, create, null.fileno(), null.fileno())) == errno.EINVAL
        assert status(told(node._socket, create, null.fileno())) == 0
    assert errno_of(node.retrieve_session, "x") == errno.ENOENT  # and the one made is closed
    assert descriptors(machine) == before


def test_connections_that_say_nothing_keep_nobody_out(machine):
    """However many; the oldest are dropped."""
    before = descriptors(machine)
    idle = [connected(machine.path) for _ in range(200)]
    with machine.open() as node, node.create_session("vm") as session:
        assert session.get_name() == "vm"
        assert machine.listed()[0] == {"vm": []}
    assert idle[0].recv(1) == b""  # dropped
    for peer in idle:
        peer.close()
    machine.listed()

    assert descriptors(machine) == before


def test_client_that_never_reads_holds_up_nobody(machine):
    """A flood of calls whose answers nobody takes; others are served meanwhile."""
    with connected(machine.path) as flooding:
        flooding.setblocking(False)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            stop = threading.Event()

            def flood():
                while not stop.is_set():
                    with contextlib.suppress(BlockingIOError, OSError):
                        socket.send_fds(flooding, [struct.pack("=I", uapi.LIST)], [theirs.fileno()])

            thread = threading.Thread(target=flood)
            thread.start()
            try:
                with machine.open() as node:
                    for number in range(20):
                        with node.create_session(f"s{number}") as session:
                            assert session.get_name() == f"s{number}"
            finally:
                stop.set()
                thread.join()
    assert machine.listed() == [{}, {}]


def test_half_closed_session_is_closed(machine, node):
    """shutdown(): it will not ask any more."""
    session = node.create_session("half")
    session._socket.shutdown(socket.SHUT_WR)

    assert machine.listed() == [{}, {}]
    assert errno_of(session.get_name) == errno.ESHUTDOWN
    session.close()


def test_descriptors_are_all_closed_at_the_end(tmp_path):
    """Of sessions, files, connections, two kernels and the socket."""
    before = descriptors()
    with host(tmp_path / "node", COPIES) as machine:
        with machine.open() as node:
            held = [node.create_session(f"s{number}") for number in range(20)]
            for session in held:
                fd = memfd(b"x")
                session.preserve_fd(fd, 1)
                os.close(fd)
        machine.kexec()
        with machine.open() as node:
            for number in range(10):
                with node.retrieve_session(f"s{number}") as session:
                    os.close(session.retrieve_fd(1))
        for session in held:
            session.close()

    eventually(lambda: descriptors() == before)


LIMITED = """
    import errno, os, resource, sys
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
    from rig import errno_of
    from session_kernels import COPIES, host
    from luo.client import LiveUpdate

    with host(sys.argv[1], COPIES) as machine, machine.open() as node:
        held, code = [], None
        while code is None:
            try:
                held.append(node.create_session(f"s{len(held)}"))
            except OSError as error:
                code = error.errno
        assert code == errno.EMFILE, code
        assert 90 < len(held) < 150, len(held)  # two descriptors each in this process, of 300
        spare = [os.dup(0) for _ in range(8)]  # those of a call come and go
        assert errno_of(node.create_session, "more") == errno.EMFILE
        assert held[0].get_name() == "s0"
        fd = os.memfd_create("x")
        assert errno_of(held[0].preserve_fd, fd, 1) == errno.EMFILE
        for session in held[:40]:
            session.close()
        held.append(node.create_session("more"))
        held[-1].preserve_fd(fd, 1)
        print("done")
"""


def test_no_descriptors_left_is_emfile_and_passes(tmp_path):
    """The limit is raised as far as it goes; then EMFILE, until sessions are closed."""
    with process(LIMITED, tmp_path / "node") as limited:
        out, _ = limited.communicate("")

    assert out == "done\n"


# ---- jumps, and ends ----


def test_call_during_the_jump_waits_and_does_not_hold_it_up(tmp_path):
    """The freeze takes its time; who calls meanwhile is told that the kernel has gone."""
    began, gate = tmp_path / "began", tmp_path / "gate"
    image = KernelImage("session_kernels:slow", args={"began": str(began), "gate": str(gate)})
    with host(tmp_path / "node", image) as machine:
        with machine.open() as node:
            session, fd = node.create_session("vm"), memfd(b"x")
            session.preserve_fd(fd, 1)
            outcomes = []

            def call():
                eventually(began.exists)
                threading.Timer(0.2, gate.touch).start()
                outcomes.append(errno_of(session.preserve_fd, fd, 2))

            caller = threading.Thread(target=call)
            caller.start()
            machine.kexec()
            caller.join(30)

            assert outcomes == [errno.ESHUTDOWN]
            assert errno_of(node.create_session, "late") == errno.ESHUTDOWN
        with machine.open() as node, node.retrieve_session("vm") as again:
            new = again.retrieve_fd(1)
            assert content(new) == b"x"
            os.close(new)
    os.close(fd)
    session.close()


def test_call_during_a_jump_that_fails_is_answered(tmp_path):
    """A freeze fails: all goes on, on the same descriptors."""
    began, gate = threading.Event(), threading.Event()

    def freeze(args):
        began.set()
        assert gate.wait(30)
        raise OSError(errno.EBUSY, "not now")

    with host(tmp_path / "node", COPIES) as machine, machine.open() as node:
        machine.kernel.liveupdate.register_handler(copies(compatible="slow-v1", freeze=freeze))
        machine.kernel.liveupdate.unregister_handler(
            machine.kernel.liveupdate._registry.handlers[0]
        )
        session, fd, other = node.create_session("vm"), memfd(b"x"), memfd(b"y")
        session.preserve_fd(fd, 1)
        outcomes = []

        def call():
            assert began.wait(30)
            threading.Timer(0.2, gate.set).start()
            outcomes.append(errno_of(session.preserve_fd, other, 2))

        caller = threading.Thread(target=call)
        caller.start()
        assert errno_of(machine.kexec) == errno.EBUSY
        caller.join(30)

        assert outcomes == [None]
        assert machine.listed()[0] == {"vm": [1, 2]}
        session.close()
        os.close(fd)
        os.close(other)


@pytest.mark.parametrize("in_process", [True, False], ids=["here", "process"])
def test_opener_between_two_kernels_waits_for_the_next(tmp_path, in_process):
    """It comes while nobody serves, and gets the new kernel."""
    with host(tmp_path / "node", COPIES, in_process) as machine:
        with machine.open() as node:
            held = node.create_session("vm")
        opened = []

        def keep_opening():
            while not opened:
                # EBUSY: a process that is being started has all our descriptors for a moment.
                with contextlib.suppress(OSError), machine.open() as node:
                    node.retrieve_session("vm").close()
                    opened.append("vm")

        opener = threading.Thread(target=keep_opening)
        opener.start()
        machine.kexec()
        opener.join(30)

        assert opened == ["vm"]
        held.close()


def test_kernel_that_is_switched_off_ends_connections(tmp_path):
    """ESHUTDOWN for who is connected; who comes finds nobody, in time."""
    with host(tmp_path / "node", COPIES) as machine:
        with machine.open() as node:
            session = node.create_session("vm")
            machine.kernel.close()
            eventually(lambda: errno_of(session.get_name) == errno.ESHUTDOWN)
            with pytest.raises(StateError):
                node.create_session("more")
        assert errno_of(LiveUpdate.open, machine.path, timeout=0.1) == errno.ETIMEDOUT
        machine.control.close()
        assert errno_of(LiveUpdate.open, machine.path) == errno.ENOENT
        session.close()


def test_second_process_that_is_killed_ends_connections(tmp_path):
    """ESHUTDOWN likewise."""
    with host(tmp_path / "node", COPIES, False) as machine, machine.open() as node:
        with node.create_session("vm") as session:
            os.kill(machine.kernel.pid, signal.SIGKILL)
            eventually(lambda: errno_of(session.get_name) == errno.ESHUTDOWN)
        assert errno_of(node.create_session, "more") == errno.ESHUTDOWN


def test_kernel_without_sessions_has_no_node(tmp_path):
    """ENODEV, with live update off or without handlers."""
    with ControlSocket(str(tmp_path / "node")) as control:
        machine = Machine("64MiB")
        control.offer(machine)
        for kernel in (
            Kernel(machine),
            Kernel(machine, file_handlers=[copies()], cmdline="kho=on"),
        ):
            with kernel.boot():
                assert errno_of(LiveUpdate.open, control.path) == errno.ENODEV
                assert errno_of(LiveUpdate.list_sessions, control.path) == errno.ENODEV


# ---- the socket ----


def test_socket_is_private_and_is_removed(tmp_path):
    """Mode 0600, whatever the umask; nothing is left of it."""
    path = tmp_path / "node"
    old = os.umask(0)
    try:
        with ControlSocket(str(path)):
            assert stat.filemode(path.stat().st_mode) == "srw-------"
    finally:
        os.umask(old)
    assert not path.exists()


def test_socket_of_a_killed_process_is_replaced(tmp_path):
    """Nobody listens there: it is in nobody's use."""
    path = tmp_path / "node"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    with ControlSocket(str(path)) as control, host_of(control):
        LiveUpdate.open(control.path).close()
    assert not path.exists()


@contextlib.contextmanager
def host_of(control):
    """Have a kernel run on a machine with *control* while the block does."""
    machine = Machine("64MiB")
    with COPIES.build(machine).boot():
        control.offer(machine)
        yield


def test_socket_in_use_is_left_alone(tmp_path):
    """EADDRINUSE; what is no socket is EEXIST; and both are there afterwards."""
    path, file = tmp_path / "node", tmp_path / "file"
    file.write_text("mine")
    with ControlSocket(str(path)):
        assert errno_of(ControlSocket, str(path)) == errno.EADDRINUSE
        assert path.exists()
    assert errno_of(ControlSocket, str(file)) == errno.EEXIST
    assert file.read_text() == "mine"
    assert errno_of(ControlSocket, str(tmp_path / "none" / "node")) == errno.ENOENT


def test_socket_with_a_long_path(tmp_path):
    """Longer than an address may be."""
    below = tmp_path / ("d" * 120)
    below.mkdir()
    with ControlSocket(str(below / "node")) as control, host_of(control):
        LiveUpdate.open(control.path).close()
    assert list(below.iterdir()) == []


def test_socket_that_is_closed_is_nobodys(tmp_path):
    """Sessions are dropped, and the machine goes on without: the next kernel serves nothing."""
    machine = Machine("64MiB")
    control = ControlSocket(str(tmp_path / "node"))
    control.offer(machine)
    kernel = COPIES.build(machine).boot()
    with LiveUpdate.open(control.path) as node:
        session, fd = node.create_session("vm"), memfd(b"x")
        session.preserve_fd(fd, 1)
    control.close()
    assert kernel.liveupdate.outgoing == ()
    assert errno_of(session.get_name) == errno.ESHUTDOWN
    kernel.kexec_load(COPIES.build(machine))
    with ControlSocket(str(tmp_path / "node")) as again:
        assert errno_of(again.offer, machine) == errno.EBUSY  # the next one does not know of it
    with kernel.kexec() as kernel:
        assert machine.control is None
    session.close()
    os.close(fd)


def test_machine_has_one_socket(tmp_path):
    """A second is EBUSY, and so is one for a kernel that runs elsewhere."""
    with (
        host(tmp_path / "node", COPIES, False) as machine,
        ControlSocket(str(tmp_path / "other")) as other,
    ):
        assert errno_of(other.offer, machine.machine) == errno.EBUSY
        machine.machine.control = None
        assert errno_of(other.offer, machine.machine) == errno.EBUSY
        machine.machine.control = machine.control


def test_tree_has_a_link_to_it(machine):
    """``dev/liveupdate`` below ``/sys``, also in the next kernel; nothing else is a link."""
    tree = Tree(machine.machine)
    for _ in range(2):
        assert tree.list() == ["dev", "devices", "kernel"]
        assert tree.list("dev") == ["liveupdate"]
        assert stat.S_ISLNK(tree.stat("dev/liveupdate").mode)
        assert tree.readlink("dev/liveupdate") == machine.path
        assert errno_of(tree.readlink, "dev") == errno.EINVAL
        assert errno_of(tree.readlink, "dev/none") == errno.ENOENT
        machine.kexec()
    machine.control.close()
    assert tree.list() == ["devices", "kernel"]
    assert errno_of(tree.stat, "dev") == errno.ENOENT
    tree.close()


# ---- a real node ----


def test_device_is_asked_by_ioctl(monkeypatch):
    """The same structures, and the descriptor that the kernel puts into them."""
    calls = []

    def ioctl(fd, command, argument, mutate):
        calls.append((command, bytes(argument)))
        argument[4:8] = array.array("i", [os.dup(fd)]).tobytes()
        return 0

    with LiveUpdate.open(os.devnull) as node:
        monkeypatch.setattr(client_module.fcntl, "ioctl", ioctl)
        with node.create_session("vm") as session:
            session.preserve_fd(1, 0x1A)
            os.close(session.retrieve_fd(0x1A))
    assert [(command, len(argument)) for command, argument in calls] == [
        (0xBA00, 72), (0xBA40, 16), (0xBA41, 16),
    ]  # fmt: skip
    assert calls[1][1] == struct.pack("=IiQ", 16, 1, 0x1A)


def test_device_that_is_another_refuses():
    """A character device without these calls is ENOTTY; what is no device ENODEV."""
    with LiveUpdate.open(os.devnull) as node:
        assert errno_of(node.create_session, "vm") == errno.ENOTTY
    words = r"session of descriptor \d+: preserve 0x1a: "
    with (
        Session.from_fd(os.open(os.devnull, os.O_RDONLY)) as session,
        pytest.raises(OSError, match=words),
    ):
        session.preserve_fd(1, 0x1A)
    assert errno_of(LiveUpdate.list_sessions, os.devnull) == errno.ENOTTY
    assert errno_of(LiveUpdate.open, __file__) == errno.ENODEV
    assert errno_of(LiveUpdate.open, "/nowhere") == errno.ENOENT


def test_closed_is_ebadf(node):
    """As of a descriptor; closing twice is nothing."""
    session = node.create_session("vm")
    fd = session.detach()
    assert errno_of(session.get_name) == errno.EBADF
    with Session.from_fd(fd) as again:
        assert again.get_name() == "vm"
    again.close()
    assert again.fileno() == -1
    assert errno_of(Session.from_fd, fd) == errno.EBADF
