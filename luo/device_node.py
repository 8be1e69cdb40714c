"""The device node ``/dev/liveupdate`` of the kernel that runs, as a socket that processes use.

The socket is the machine's (:class:`ControlSocket`): it listens over every jump. The kernel that
runs serves it, in a thread of its own, in whichever process it is: :mod:`luo.uapi` says how calls
look on it. A connection on which the node was opened is an open file of the node. A session is one
end of a socket pair, and lives until the last descriptor of it is closed, in any process.

When a kernel goes, its connections and sessions end, as processes end with their kernel; who
connects meanwhile waits for the next one.

Nothing that a client does keeps others waiting, but for the time that a handler's callback takes.
Whoever may connect is root of that host (the socket's mode is 0600), and is trusted as that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import resource
import select
import socket
import stat
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from luo import uapi
from luo.errors import KhoError, LuoError, StateError, errno_name, from_errno
from luo.kernel import Kernel

if TYPE_CHECKING:
    from luo.machine import Machine
    from luo.session import DeviceNode, LiveUpdate, Session

__all__ = ["ControlSocket"]

_log = logging.getLogger(__name__)

_STRANGERS: Final = 64  # connections that have not opened the node; then the oldest is dropped
_ROOM: Final = 64  # descriptors kept for answers, and for what handlers need
_PAUSE_SECONDS: Final = 0.1  # until another connection is taken, when descriptors were short
_JOIN_SECONDS: Final = 5.0
_TEXT_LIMIT: Final = 1024  # bytes of a message
_ENDS: Final = select.EPOLLHUP | select.EPOLLRDHUP | select.EPOLLERR
_U32: Final = struct.Struct("=I")
_STATUS: Final = struct.Struct("=i")


# ---- the socket ----


class ControlSocket:
    """Where a machine's kernels offer their device node.

    ``machine.control``, once :meth:`offer` was called: in the process of the hardware the one that
    was bound, in that of another kernel the same, inherited.

    Args:
        path: where it is made, with mode 0600; one that a killed process left there is replaced.

    Raises:
        KhoError: EADDRINUSE if somebody serves there; EEXIST if something else is there; whatever
            making a socket fails with.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: str | None = os.path.abspath(path)
        self._listener = _bound(self.path)
        self._inode = _inode(self.path)
        self._machine: Machine | None = None
        self._server: _Server | None = None

    @classmethod
    def inherited(cls, fd: int) -> ControlSocket:
        """Return the socket that another process has bound; *fd* is its from here on."""
        control = cls.__new__(cls)
        control.path = control._inode = control._machine = None
        control._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
        control._server = None
        return control

    def offer(self, machine: Machine) -> None:
        """Make it *machine*'s: the kernel that runs here serves it, and so does every later one.

        Raises:
            StateError: EBUSY if the machine has one, if its kernel runs in another process, or if
                the next one has been loaded.
        """
        kernel = machine.running
        if machine.control is not None:
            raise StateError(errno.EBUSY, f"{self}: the machine has {machine.control}")
        if kernel is not None and not isinstance(kernel, Kernel):
            raise StateError(errno.EBUSY, f"{self}: {kernel} runs without it")
        if kernel is not None and kernel.kexec_loaded:
            raise StateError(errno.EBUSY, f"{self}: a next kernel has been loaded without it")
        self._machine = machine
        machine.control = self
        if kernel is not None:
            self.start(kernel)

    def start(self, kernel: Kernel) -> None:
        """Let *kernel* serve; called by a kernel when it has booted."""
        self._server = _Server(self._listener, kernel.liveupdate, kernel.release)

    def stop(self) -> None:
        """Let nobody serve; called by a kernel when it goes. Waits for nothing."""
        if self._server is not None:
            self._server.stop(release=False)

    def settle(self) -> None:
        """Wait until closed descriptors are known to be; called before files are frozen."""
        if self._server is not None:
            self._server.settle()

    def fileno(self) -> int:
        """Return the descriptor of the listening socket."""
        return self._listener.fileno()

    def close(self) -> None:
        """Serve no more, and remove the socket.

        Sessions of a kernel that still runs are closed, as if all processes had ended.
        """
        if self._machine is not None:
            self._machine.control = None
            self._machine = None
        if self._server is not None:
            self._server.stop(release=True)
            self._server.join()
            self._server = None
        self._listener.close()
        if self.path is not None and _inode(self.path) == self._inode:
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def __str__(self) -> str:
        return f"control socket {self.path or 'of another process'}"

    def __enter__(self) -> ControlSocket:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _bound(path: str) -> socket.socket:
    """Return a socket that listens at *path*."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        os.fchmod(listener.fileno(), 0o600)  # bind() gives the file the socket's own mode
        listener.setblocking(False)
        with uapi.address(path) as name:
            try:
                listener.bind(name)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _remove_dead(path, name)
                listener.bind(name)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if isinstance(error, KhoError):
            raise
        raise from_errno(error.errno or errno.EIO, f"{path}: {error.strerror}") from error
    return listener


def _remove_dead(path: str, name: str) -> None:
    """Remove a socket that nobody listens on any more."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise from_errno(errno.EEXIST, f"{path}: is there, and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(name)
    if code != errno.ECONNREFUSED:
        raise from_errno(errno.EADDRINUSE, f"{path}: another process serves there")
    os.unlink(path)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


# ---- who serves ----


class _Call(NamedTuple):
    """A call that the node or a session takes.

    Attributes:
        command: its number, whole.
        layout: of its structure.
        does: is given whose call it is, the unpacked structure and the file's descriptor; returns
            the values of the structure to copy back, and a descriptor to send.
        retrieved: whether it is for sessions of the kernel before (True), of this one (False), or
            either.
    """

    command: int
    layout: struct.Struct
    does: Callable[[_Server, _Peer, tuple[Any, ...], int | None], _Answer]
    retrieved: bool | None = None


class _Answer(NamedTuple):
    """What a call comes to.

    Attributes:
        values: of the structure to copy back.
        fd: to send with it, and to close then.
    """

    values: tuple[Any, ...]
    fd: int | None = None


class _Peer:
    """A socket that a client has the other end of.

    Attributes:
        socket: this end.
        node: the open device node, on a connection where it was opened.
        session: what it stands for, None for a connection.
    """

    __slots__ = ("node", "session", "socket")

    def __init__(self, end: socket.socket, session: Session | None = None) -> None:
        end.setblocking(False)
        self.socket = end
        self.session = session
        self.node: DeviceNode | None = None


class _Server:
    """The thread of one kernel that answers on a control socket."""

    def __init__(self, listener: socket.socket, liveupdate: LiveUpdate, release: str) -> None:
        _raise_limit()
        self._listener = listener
        self._liveupdate = liveupdate
        self._release = release
        self._peers: dict[int, _Peer] = {}  # by descriptor
        self._strangers: dict[int, _Peer] = {}  # those without an open node, oldest first
        self._paused = False
        self._stopping = self._releasing = False
        self._settling: list[threading.Event] = []
        self._lock = threading.Lock()  # of _settling, and of _wake, which is -1 at the end
        self._wake = os.eventfd(0)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._epoll.register(listener, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="luo node", daemon=True)
        self._thread.start()

    def stop(self, release: bool) -> None:
        """Have it end soon: with *release* it closes the sessions, else the kernel is gone."""
        with self._lock:
            self._stopping, self._releasing = True, release
            self._rouse()

    def settle(self) -> None:
        """Wait until every descriptor that was closed before this call is known to be."""
        if threading.current_thread() is self._thread:
            return
        settled = threading.Event()
        with self._lock:
            if self._wake < 0:
                return
            self._settling.append(settled)
            self._rouse()
        settled.wait(_JOIN_SECONDS)

    def join(self) -> None:
        """Wait until it has ended."""
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_SECONDS)  # it may be in a callback

    def _rouse(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            _log.exception("device node: the thread that serves it failed")
        finally:
            with self._lock:
                os.close(self._wake)
                self._wake = -1
            for peer in list(self._peers.values()):
                self._drop(peer, self._releasing)
            for settled in self._settling:
                settled.set()
            self._epoll.close()

    def _poll(self, timeout: float | None) -> dict[int, int]:
        return dict(self._epoll.poll(timeout, len(self._peers) + 8))

    def _turn(self) -> bool:
        """Do what there is to do, one packet of each client; return False at the end.

        Ends come first: who closes a session and then makes a call finds it closed, as with a real
        kernel, where close() returns when all is done.
        """
        ready = self._poll(_PAUSE_SECONDS if self._paused else None)
        if self._paused:
            self._paused = False
            self._epoll.register(self._listener, select.EPOLLIN)
        if self._wake in ready and not self._roused():
            return False
        self._end(ready)
        for fd, events in ready.items():
            if fd == self._listener.fileno():
                self._accept()
            elif events & _ENDS or fd not in self._peers:
                pass  # it ended, and the number may be somebody else's by now
            elif not self._serve(self._peers[fd], events):
                self._drop(self._peers[fd])
        return True

    def _roused(self) -> bool:
        """See why: return False if it shall end."""
        with self._lock:
            os.eventfd_read(self._wake)
            settling, self._settling = self._settling, []
        if self._stopping:
            self._settling = settling
            return False
        self._end(self._poll(0))
        for settled in settling:
            settled.set()
        return True

    def _end(self, ready: dict[int, int]) -> None:
        """Answer what clients that are gone have left, and drop them."""
        for fd, events in ready.items():
            if events & _ENDS and fd in self._peers:
                while self._serve(self._peers[fd], events):
                    pass
                self._drop(self._peers[fd])

    # ---- clients that come and go ----

    def _accept(self) -> None:
        try:
            end, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _log.warning("device node: %s", error)
            self._paused = True
            self._epoll.unregister(self._listener)
            return
        peer = self._add(_Peer(end))
        self._strangers[end.fileno()] = peer
        if len(self._strangers) > _STRANGERS:
            self._drop(next(iter(self._strangers.values())))

    def _add(self, peer: _Peer) -> _Peer:
        self._peers[peer.socket.fileno()] = peer
        self._epoll.register(peer.socket, select.EPOLLIN | select.EPOLLRDHUP)
        return peer

    def _drop(self, peer: _Peer, release: bool = True) -> None:
        """Forget a client: its last descriptor is closed, or it is not wanted."""
        fd = peer.socket.fileno()
        self._strangers.pop(fd, None)
        del self._peers[fd]
        self._epoll.unregister(fd)
        peer.socket.close()
        held = peer.session or peer.node
        if release and held is not None:
            try:
                held.close()
            except Exception as error:
                if getattr(error, "errno", None) != errno.ESHUTDOWN:  # else it went with its kernel
                    _log.warning("%s", error)

    # ---- calls ----

    def _serve(self, peer: _Peer, events: int) -> bool:
        """Answer one packet of *peer*; return False if there will be none any more."""
        try:
            return self._serve_packet(peer, events)
        except Exception:
            _log.exception("device node: a client is dropped")
            return False

    def _serve_packet(self, peer: _Peer, events: int) -> bool:
        try:
            packet, fds, flags = uapi.receive(peer.socket, _U32.size + uapi.MAX_STRUCTURE, 2)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not (packet or fds):
            return not events & _ENDS
        try:
            reply = _reply_socket(fds)
            if reply is not None:
                with reply:
                    return self._reply(peer, reply, packet, fds, flags)
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _reply(
        self, peer: _Peer, reply: socket.socket, packet: bytes, fds: list[int], flags: int
    ) -> bool:
        """Do a call and answer; return False, without an answer, if the kernel has gone."""
        answer = None
        try:
            if flags & socket.MSG_CTRUNC:
                code = errno.EINVAL if fds else errno.EMFILE
                raise from_errno(code, f"device node: {errno_name(code)} for its descriptors")
            answer, body = self._call(peer, packet, fds[0] if fds else None, flags)
        except Exception as error:
            if isinstance(error, StateError) and error.errno == errno.ESHUTDOWN:
                return False
            if not isinstance(error, LuoError):
                _log.exception("device node: a call failed")
            body = _refusal(error)
        fds_made = () if answer is None or answer.fd is None else (answer.fd,)
        try:
            # There is room for it, unless the client has filled that itself.
            uapi.send(reply, body, fds_made, socket.MSG_DONTWAIT)
        except OSError as error:
            _log.info("device node: an answer was not taken: %s", error)
        finally:
            for fd in fds_made:
                os.close(fd)
        return True

    def _call(
        self, peer: _Peer, packet: bytes, file: int | None, flags: int
    ) -> tuple[_Answer, bytes]:
        """Check a call as the kernel's dispatcher does, and do it (luo-mainline 4.2)."""
        if len(packet) < _U32.size:
            raise from_errno(errno.EFAULT, f"device node: a packet of {len(packet)} bytes")
        (command,) = _U32.unpack_from(packet)
        if peer.session is None:
            if command == uapi.OPEN:
                return self._open(peer), _STATUS.pack(0)
            if command == uapi.LIST:
                return self._list(), _STATUS.pack(0)
            if peer.node is None:
                raise from_errno(errno.EBADF, f"device node: {command:#x} before it was opened")
        call = (_NODE_CALLS if peer.session is None else _SESSION_CALLS).get(command & 0xFF)
        whose = "device node" if peer.session is None else f"session {peer.session.name}"
        what = f"{whose}: call {command:#x}"
        if call is None:
            raise from_errno(errno.EINVAL, f"{what}: no such call")
        structure = packet[_U32.size :]
        if len(structure) < _U32.size:
            raise from_errno(errno.EFAULT, f"{what}: a structure of {len(structure)} bytes")
        (size,) = _U32.unpack_from(structure)
        if call.command != command:
            raise from_errno(errno.ENOTTY, f"{what}: {call.command:#x} is meant")
        if peer.session is not None and call.retrieved not in (None, peer.session.retrieved):
            why = "for one that came over" if call.retrieved else "not for one that came over"
            raise from_errno(errno.EINVAL, f"{what}: {why}")
        layout = call.layout
        if size < layout.size:
            raise from_errno(errno.EINVAL, f"{what}: size {size}, {layout.size} is needed")
        if any(structure[layout.size : size]) or (
            size > len(structure) and flags & socket.MSG_TRUNC
        ):
            raise from_errno(
                errno.E2BIG, f"{what}: more than the {layout.size} bytes that it knows"
            )
        if len(structure) < size:
            raise from_errno(errno.EFAULT, f"{what}: size {size}, {len(structure)} were sent")
        answer = call.does(self, peer, layout.unpack_from(structure), file)
        return answer, _STATUS.pack(0) + layout.pack(*answer.values)

    # ---- of the node ----

    def _open(self, peer: _Peer) -> _Answer:
        if peer.node is not None:
            raise from_errno(errno.EBUSY, "device node: is open on this connection")
        peer.node = self._liveupdate.open()
        self._strangers.pop(peer.socket.fileno(), None)
        return _Answer(())

    def _list(self) -> _Answer:
        """Tell of every session, in a memfd."""
        fd = os.memfd_create("luo-sessions")
        try:
            told = json.dumps(described(self._liveupdate, self._release)).encode()
            with open(fd, "wb", closefd=False) as file:
                file.write(told)
        except BaseException:
            os.close(fd)
            raise
        return _Answer((), fd)

    def _create(self, peer: _Peer, values: tuple[Any, ...], file: int | None) -> _Answer:
        assert peer.node is not None
        return self._with_session(peer.node.create_session, values)

    def _retrieve(self, peer: _Peer, values: tuple[Any, ...], file: int | None) -> _Answer:
        assert peer.node is not None
        return self._with_session(peer.node.retrieve_session, values)

    def _with_session(self, make: Callable[[bytes], Session], values: tuple[Any, ...]) -> _Answer:
        """Send one end of a socket pair for the session that *make* makes.

        Should nobody take it, the other end says so, and the session is closed.
        """
        size, _, name = values
        _require_room()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._add(_Peer(ours, make(name.partition(b"\0")[0])))
        except BaseException:
            ours.close()
            theirs.close()
            raise
        return _Answer((size, -1, name), theirs.detach())

    # ---- of a session ----

    def _preserve(self, peer: _Peer, values: tuple[Any, ...], file: int | None) -> _Answer:
        assert peer.session is not None
        _require_room()
        open_file = file is not None and not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_PATH
        peer.session.preserve(file if open_file else -1, values[2])
        return _Answer(values)

    def _retrieve_fd(self, peer: _Peer, values: tuple[Any, ...], file: int | None) -> _Answer:
        assert peer.session is not None
        _require_room()
        size, _, token = values
        found = peer.session.retrieve(token)
        if not isinstance(found, int):
            why = f"retrieve {peer.session.name}/{token:#x}: no descriptor, which could be passed"
            raise from_errno(errno.EOPNOTSUPP, why)
        return _Answer((size, -1, token), found)

    def _finish(self, peer: _Peer, values: tuple[Any, ...], file: int | None) -> _Answer:
        assert peer.session is not None
        _require_zero(peer.session, values[1])
        peer.session.finish()
        return _Answer(values)

    def _get_name(self, peer: _Peer, values: tuple[Any, ...], file: int | None) -> _Answer:
        assert peer.session is not None
        _require_zero(peer.session, values[1])
        return _Answer((*values[:2], peer.session.raw_name))


#: By the low byte of their number.
_NODE_CALLS: Final = {
    0x00: _Call(uapi.CREATE_SESSION, uapi.NAMED, _Server._create),
    0x01: _Call(uapi.RETRIEVE_SESSION, uapi.NAMED, _Server._retrieve),
}
_SESSION_CALLS: Final = {
    0x40: _Call(uapi.PRESERVE_FD, uapi.FILE, _Server._preserve, False),
    0x41: _Call(uapi.RETRIEVE_FD, uapi.FILE, _Server._retrieve_fd, True),
    0x42: _Call(uapi.FINISH, uapi.PLAIN, _Server._finish, True),
    0x43: _Call(uapi.GET_NAME, uapi.NAMED, _Server._get_name),
}


def _require_zero(session: Session, reserved: int) -> None:
    if reserved:
        raise from_errno(errno.EINVAL, f"session {session.name}: reserved is {reserved}, not 0")


def _raise_limit() -> None:
    """Have as many descriptors as this process may: a session takes one, a file another."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _require_room() -> None:
    """Raise KhoError (EMFILE) unless there are descriptors enough.

    Linux gives the lowest number that is free, so a high one means that few are left.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        lowest = os.open("/dev/null", os.O_PATH)
    except OSError:
        lowest = limit
    else:
        os.close(lowest)
    if 0 <= limit <= lowest + _ROOM:
        why = f"device node: {lowest} descriptors are open in the kernel's process, of {limit}"
        raise from_errno(errno.EMFILE, why)


def _refusal(error: Exception) -> bytes:
    """Return the answer that tells of *error*: its errno, and words."""
    code = getattr(error, "errno", None) or errno.EIO
    text = getattr(error, "strerror", None) or str(error)
    return _STATUS.pack(-code) + text.encode("utf-8", "replace")[:_TEXT_LIMIT]


def _reply_socket(fds: list[int]) -> socket.socket | None:
    """Take the first of *fds* as the socket for the answer; None if it is none to write to."""
    if not fds:
        return None
    if not stat.S_ISSOCK(os.fstat(fds[0]).st_mode):
        return None
    reply = socket.socket(fileno=fds[0])
    del fds[0]
    if (reply.family, reply.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        reply.close()
        return None
    return reply


def described(liveupdate: LiveUpdate, release: str) -> dict[str, Any]:
    """Return which sessions and files there are, in JSON values.

    What came in is read first, as whoever opens the node first has it read.

    Raises:
        KhoError: EIO if it cannot be; ENODEV without sessions.
    """
    try:
        liveupdate.open().close()
    except KhoError as error:
        if error.errno != errno.EBUSY:  # then it has been read
            raise
    return {
        "schema": "luo-sessions/1",
        "release": release,
        "liveupdate_num": liveupdate.liveupdate_num,
        "outgoing": [_session(session) for session in liveupdate.outgoing],
        "incoming": [
            _session(session) | {"retrieved": session.retrieved} for session in liveupdate.incoming
        ],
    }


def _session(session: Session) -> dict[str, Any]:
    return {
        "name": session.name,
        "files": [
            {
                "token": kept.token,
                "handler": kept.handler.compatible,
                "data": kept.data,
                "retrieve_status": kept.retrieve_status,
            }
            for kept in session.files
        ],
    }
