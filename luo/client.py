"""The client of ``/dev/liveupdate``: a session agent's calls, with the kernel's names and errno.

Works on the node of a Linux 7.3 kernel, and on the control socket of a simulated machine
(:class:`luo.device_node.ControlSocket`, ``luo mount``): the structures are the same.

Example:
    >>> with LiveUpdate.open("host/dev/liveupdate") as node:    # doctest: +SKIP
    ...     session = node.create_session("vm")
    >>> session.preserve_fd(memfd, 1)                           # doctest: +SKIP
"""

from __future__ import annotations

import array
import errno
import fcntl
import json
import os
import select
import socket
import stat
import struct
import time
from typing import Any, Final, Self

from luo import uapi
from luo.errors import StateError, from_errno

__all__ = ["LiveUpdate", "Session"]

_ANSWER_LIMIT: Final = 8192  # bytes
_RETRY_SECONDS: Final = 0.01
_STATUS: Final = struct.Struct("=i")

#: What an errno means where the node itself says no more than the number (luo-mainline 4.2).
_RULES: Final = {
    (uapi.OPEN, errno.EBUSY): "the node is open already",
    (uapi.OPEN, errno.EIO): "what the kernel before handed over cannot be read",
    (uapi.CREATE_SESSION, errno.EINVAL): "a name has 1 to 63 bytes",
    (uapi.CREATE_SESSION, errno.EEXIST): "a session of this name is there",
    (uapi.RETRIEVE_SESSION, errno.ENOENT): "the kernel before handed over no such session",
    (uapi.RETRIEVE_SESSION, errno.EINVAL): "it has been retrieved",
    (uapi.PRESERVE_FD, errno.EEXIST): "the token is taken",
    (uapi.PRESERVE_FD, errno.EBADF): "no open file",
    (uapi.PRESERVE_FD, errno.ENOENT): "no handler takes this kind of file",
    (uapi.PRESERVE_FD, errno.EBUSY): "the file is preserved already",
    (uapi.PRESERVE_FD, errno.EINVAL): "the session is of the kernel before",
    (uapi.RETRIEVE_FD, errno.ENOENT): "no file has this token",
    (uapi.RETRIEVE_FD, errno.EINVAL): "the session is not of the kernel before",
    (uapi.FINISH, errno.EBUSY): "a file cannot be finished yet",
    (uapi.FINISH, errno.EINVAL): "the session is not of the kernel before",
    (uapi.LIST, errno.ENOTTY): "a real kernel does not tell its sessions",
}


class _Open:
    """A descriptor that takes calls: of the node, or of a session."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._socket: socket.socket | None = None
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)

    def ioctl(self, command: int, structure: bytes, fd: int = -1) -> bytes:
        """Make a call.

        Args:
            command: its number.
            structure: its structure, size first.
            fd: the same file as in the structure's ``fd``, if it has one.

        Returns:
            the structure as the kernel leaves it. If the call makes a descriptor, ``fd`` in it is
            that, and the caller's to close.

        Raises:
            OSError: with the kernel's errno; ESHUTDOWN if the kernel has gone.
        """
        return self._call(f"ioctl {command:#x}", command, structure, fd)

    def _call(self, what: str, command: int, structure: bytes, fd: int = -1) -> bytes:
        if self._fd < 0:
            raise from_errno(errno.EBADF, f"{what}: is closed")
        if self._socket is not None:
            return _call_on_socket(self._socket, what, command, structure, fd)
        argument = bytearray(structure)
        try:
            fcntl.ioctl(self._fd, command, argument, True)
        except OSError as error:
            raise _error(what, command, error.errno or errno.EIO) from None
        return bytes(argument)

    def fileno(self) -> int:
        """Return the descriptor; -1 when it is closed."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if self._socket is not None:
            self._socket.close()
        elif fd >= 0:
            os.close(fd)

    def detach(self) -> int:
        """Return the descriptor, which is the caller's from here on."""
        fd, self._fd = self._fd, -1
        if self._socket is not None:
            self._socket.detach()
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LiveUpdate(_Open):
    """The open node: whoever has it makes sessions, one process at a time."""

    @classmethod
    def open(cls, path: str | os.PathLike[str] = uapi.NODE, *, timeout: float = 60.0) -> LiveUpdate:
        """Open the node at *path*.

        Args:
            path: of the device node, or of a control socket.
            timeout: seconds in which the next kernel must answer, should one just go.

        Raises:
            OSError: EBUSY if somebody else has it open; EIO if what the kernel before handed over
                cannot be read; ENODEV with live update off; ENOENT, EACCES, ECONNREFUSED if nobody
                offers one there; ETIMEDOUT.
        """
        return cls._connected(os.fspath(path), uapi.OPEN, timeout)

    @classmethod
    def list_sessions(
        cls, path: str | os.PathLike[str] = uapi.NODE, *, timeout: float = 60.0
    ) -> dict[str, Any]:
        """Return which sessions and files there are, whether the node is open or not.

        Ours: no real kernel tells. The document is ``luo-sessions/1``.

        Raises:
            OSError: as of :meth:`open`; ENOTTY from a real kernel.
        """
        with cls._connected(os.fspath(path), uapi.LIST, timeout) as node:
            return node._listed

    _listed: dict[str, Any]

    @classmethod
    def _connected(cls, path: str, command: int, timeout: float) -> LiveUpdate:
        what = f"{path}: {'open' if command == uapi.OPEN else 'list'}"
        try:
            mode = os.stat(path).st_mode
            if not stat.S_ISSOCK(mode):
                if not stat.S_ISCHR(mode):
                    raise from_errno(errno.ENODEV, f"{what}: is no device node and no socket")
                if command == uapi.LIST:
                    raise _error(what, command, errno.ENOTTY)
                return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.filename is None:
                raise
            raise _error(what, command, error.errno or errno.EIO) from None
        deadline = time.monotonic() + timeout
        while True:
            node = cls(_connect(path, what, deadline))
            try:
                node._greet(what, command, deadline)
                return node
            except StateError:  # it went before it answered: the next kernel listens there
                node.close()
                time.sleep(_RETRY_SECONDS)
            except BaseException:
                node.close()
                raise

    def _greet(self, what: str, command: int, deadline: float) -> None:
        assert self._socket is not None
        _, made = _exchange(self._socket, what, command, b"", -1, deadline)
        if made is not None:
            with open(made, "rb") as file:
                file.seek(0)
                self._listed = json.load(file)

    def create_session(self, name: str | bytes) -> Session:
        """Make a session of this kernel, to be handed over to the next.

        Raises:
            OSError: EINVAL unless the name has 1 to 63 bytes and no NUL; EEXIST; EMFILE; ENOSPC,
                ENOMEM.
        """
        return self._session(uapi.CREATE_SESSION, "create", name)

    def retrieve_session(self, name: str | bytes) -> Session:
        """Take over a session of the kernel before.

        Raises:
            OSError: ENOENT if there is none; EINVAL if it has been retrieved; EMFILE.
        """
        return self._session(uapi.RETRIEVE_SESSION, "retrieve", name)

    def _session(self, command: int, verb: str, name: str | bytes) -> Session:
        raw = os.fsencode(name)
        what = f"session {os.fsdecode(raw)}: {verb}"
        if len(raw) > uapi.NAME_LENGTH or b"\0" in raw:  # the structure cannot say it
            raise _error(what, uapi.CREATE_SESSION, errno.EINVAL)
        argument = uapi.NAMED.pack(uapi.NAMED.size, -1, raw)
        _, fd, _ = uapi.NAMED.unpack(self._call(what, command, argument))
        session = Session.from_fd(fd)
        session._name = os.fsdecode(raw)
        return session


class Session(_Open):
    """A session: lives until the last descriptor of it is closed, in whichever process.

    Closing one of this kernel forgets it and its files; closing one of the kernel before finishes
    it. It may be passed on to another process, or be inherited.
    """

    _name: str | None = None  # as far as this process knows it

    @classmethod
    def from_fd(cls, fd: int) -> Session:
        """Return the session whose descriptor *fd* is, as somebody has passed it on; it owns *fd*.

        Raises:
            OSError: EBADF.
        """
        return cls(fd)

    def preserve_fd(self, fd: int, token: int) -> None:
        """Have the file *fd* handed over to the next kernel, under *token*, any 64-bit number.

        Raises:
            OSError: EEXIST if the token is taken in this session; EBADF; ENOENT if no handler takes
                such a file; EBUSY if the file is preserved already, in any session; EINVAL if the
                session is of the kernel before; what the handler fails with.
        """
        what = f"{self._called()}: preserve {token:#x}"
        self._call(what, uapi.PRESERVE_FD, _file(what, fd, token), fd)

    def retrieve_fd(self, token: int) -> int:
        """Return a new descriptor of the file that the kernel before handed over under *token*.

        Raises:
            OSError: ENOENT if there is none; what the handler failed with, the first time and ever
                after; EINVAL if the session is of this kernel; EMFILE.
        """
        what = f"{self._called()}: retrieve {token:#x}"
        answer = self._call(what, uapi.RETRIEVE_FD, _file(what, -1, token))
        fd: int = uapi.FILE.unpack(answer)[1]
        return fd

    def finish(self) -> None:
        """Be done with it: files that were not retrieved are given up.

        Raises:
            OSError: EBUSY if a handler refuses, then nothing is finished; EINVAL if the session is
                of this kernel.
        """
        self._call(f"{self._called()}: finish", uapi.FINISH, uapi.PLAIN.pack(uapi.PLAIN.size, 0))

    def get_name(self) -> str:
        """Return its name."""
        argument = uapi.NAMED.pack(uapi.NAMED.size, 0, b"")
        answer = self._call("session: get its name", uapi.GET_NAME, argument)
        _, _, name = uapi.NAMED.unpack(answer)
        return os.fsdecode(name.partition(b"\0")[0])

    def _called(self) -> str:
        """Return what it is in messages."""
        return f"session {self._name}" if self._name else f"session of descriptor {self._fd}"


def _file(what: str, fd: int, token: int) -> bytes:
    if not 0 <= token < 1 << 64:
        raise OverflowError(f"{what}: a token has 64 bits")
    return uapi.FILE.pack(uapi.FILE.size, fd, token)


def _error(what: str, command: int, code: int, said: str = "") -> OSError:
    """Return the error of a call that was refused, in the node's own words if it has any."""
    if code == errno.ESHUTDOWN:
        return StateError(code, f"{what}: {said or 'the kernel has gone'}")
    return from_errno(code, said or f"{what}: {_RULES.get((command, code)) or os.strerror(code)}")


# ---- calls on a socket ----


def _connect(path: str, what: str, deadline: float) -> int:
    """Return the descriptor of a new connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(max(0.0, deadline - time.monotonic()) or _RETRY_SECONDS)
        try:
            with uapi.address(path) as name:
                peer.connect(name)
        except TimeoutError:
            raise from_errno(errno.ETIMEDOUT, f"{what}: nobody answers") from None
        except OSError as error:
            raise _error(what, uapi.OPEN, error.errno or errno.EIO) from None
        peer.settimeout(None)
        return peer.detach()


def _call_on_socket(
    peer: socket.socket, what: str, command: int, structure: bytes, fd: int
) -> bytes:
    """Make a call on a control socket; see :meth:`_Open.ioctl`."""
    answer, made = _exchange(peer, what, command, structure, fd)
    if made is not None:  # in the place of the number that means nothing here
        at = _STATUS.size
        answer = answer[:at] + array.array("i", [made]).tobytes() + answer[at + _STATUS.size :]
    return answer


def _exchange(
    peer: socket.socket,
    what: str,
    command: int,
    structure: bytes,
    fd: int,
    deadline: float | None = None,
) -> tuple[bytes, int | None]:
    """Send a call and receive its answer, on a socket pair that is made for it."""
    packet = struct.pack("=I", command) + structure
    fds = [fd] if _is_open(fd) else []  # else the call is refused in its turn, for want of a file
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            try:
                uapi.send(peer, packet, [theirs.fileno(), *fds])
            except (BrokenPipeError, ConnectionResetError):
                raise _error(what, command, errno.ESHUTDOWN) from None
        if deadline is not None:
            ours.settimeout(max(0.0, deadline - time.monotonic()) or _RETRY_SECONDS)
        try:
            answer, made, _ = uapi.receive(ours, _ANSWER_LIMIT, 1)
        except TimeoutError:
            raise from_errno(errno.ETIMEDOUT, f"{what}: the kernel does not answer") from None
        except ConnectionResetError:
            answer, made = b"", []
    if len(answer) < _STATUS.size:
        # A process without descriptors cannot take the socket for the answer either.
        gone = _hung_up(peer)
        why = "the kernel has gone" if gone else "the kernel's process has no descriptors left"
        raise _error(what, command, errno.ESHUTDOWN if gone else errno.EMFILE, why)
    (status,) = _STATUS.unpack_from(answer)
    if status:
        said = answer[_STATUS.size :].decode("utf-8", "replace")
        raise _error(what, command, -status, said)
    return answer[_STATUS.size :], made[0] if made else None


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _hung_up(peer: socket.socket) -> bool:
    poller = select.poll()
    poller.register(peer, select.POLLHUP)
    return bool(poller.poll(_RETRY_SECONDS * 1000))
