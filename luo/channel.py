"""The channel between the processes of a machine: messages, errors, flags; JSON on a socket."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luo.errors import (
    CallbackError,
    FdtError,
    HandoverError,
    KernelPanic,
    KhoError,
    StateError,
    from_errno,
)

__all__ = ["Closed", "Line", "decode_error", "encode_error", "pack_mask", "unpack_mask"]

_FRAME_LIMIT: Final = 256 << 20  # bytes of one message; a peer that asks for more is broken

Message: TypeAlias = dict[str, Any]


class Closed(Exception):
    """The other end of the channel is gone, or this one was closed."""


class Line:
    """One end of the channel: length-prefixed JSON, both ways at once.

    A thread of its own does all reading and writing. So an interrupt of whoever posts a message
    leaves none half sent, and two ends that both write never wait for each other.

    Args:
        peer: the socket, which is the line's from here on.
        receive: called in the line's thread with each message, and with None at the end.

    Context:
        :meth:`post` and :meth:`close` from any thread.
    """

    def __init__(self, peer: socket.socket, receive: Callable[[Message | None], None]) -> None:
        peer.setblocking(False)
        self._peer = peer
        self._receive = receive
        self._wake = os.eventfd(0)
        self._lock = threading.Lock()  # of the three below: after the end, no use of _wake
        self._open = True
        self._posted: deque[bytes] = deque()
        self._thread = threading.Thread(target=self._run, name="luo line", daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        """Whether both ends are there, as far as this one knows."""
        return self._open

    @property
    def here(self) -> bool:
        """Whether the caller is in the line's own thread, which must not wait for an answer."""
        return threading.current_thread() is self._thread

    def post(self, message: Message) -> None:
        """Have *message* sent, after all that were posted before it.

        Raises:
            Closed: nobody is there.
        """
        body = json.dumps(message).encode()
        with self._lock:
            if not self._open:
                raise Closed
            self._posted.append(struct.pack("=I", len(body)) + body)
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close this end; what was posted and not sent is lost."""
        with self._lock:
            if self._open:
                self._open = False
                with contextlib.suppress(OSError):  # the other end was quicker
                    self._peer.shutdown(socket.SHUT_RDWR)
        if not self.here:
            self._thread.join(2)  # seconds: a receiver may wait for whoever closes

    def _run(self) -> None:
        out, data = bytearray(), bytearray()
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        try:
            while self._open:
                poll.register(self._peer, select.POLLIN | (select.POLLOUT if out else 0))
                ready = dict(poll.poll())
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                    while self._posted:
                        out += self._posted.popleft()
                if out:
                    with contextlib.suppress(BlockingIOError):
                        del out[: self._peer.send(out)]
                if ready.get(self._peer.fileno(), 0) & ~select.POLLOUT:
                    part = self._peer.recv(1 << 20)
                    if not part:
                        return
                    data += part
                    for message in _take_messages(data):
                        if self._open:
                            self._receive(message)
        except (ConnectionError, ValueError):
            pass  # it is gone, or talks nonsense: the same to us
        finally:
            with self._lock:
                self._open = False
                os.close(self._wake)
            self._peer.close()
            self._receive(None)


def _take_messages(data: bytearray) -> Iterator[Message]:
    """Take the complete messages out of *data*; ValueError if it holds none and never will."""
    while len(data) >= 4:
        (length,) = struct.unpack_from("=I", data)
        if length > _FRAME_LIMIT:
            raise ValueError(f"message of {length} bytes")
        if len(data) < 4 + length:
            return
        message: Message = json.loads(data[4 : 4 + length])
        del data[: 4 + length]
        yield message


# ---- errors ----

_CALLBACK_FIELDS: Final = (
    "event",
    "kind",
    "name",
    "device",
    "returned",
    "file",
    "line",
)
_PLAIN_ERRORS: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind
    for kind in (
        FdtError,
        HandoverError,
        KernelPanic,
        StateError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    )
}


def encode_error(error: BaseException) -> Message:
    """Return *error* in JSON values: type, errno and words, for :func:`decode_error`."""
    kind = type(error).__name__
    if isinstance(error, CallbackError):
        return {
            "type": "CallbackError",
            "args": [error.errno, error.strerror],
            "fields": {name: getattr(error, name) for name in _CALLBACK_FIELDS},
            "rolled_back": error.rolled_back,
            "undo": [encode_error(problem) for problem in error.undo_errors],
            "notes": getattr(error, "__notes__", []),
        }
    if isinstance(error, FdtError):
        return {"type": kind, "args": [error.code, error.offset, error.message]}
    if isinstance(error, HandoverError):
        return {"type": kind, "args": [error.rule, error.phys]}
    if isinstance(error, StateError):
        return {"type": "StateError", "args": [error.errno, error.strerror]}
    if isinstance(error, OSError) and error.errno:
        return {"type": kind, "args": [error.errno, error.strerror]}
    if kind in _PLAIN_ERRORS:
        return {"type": kind, "args": [str(part) for part in error.args]}
    return {"type": kind, "args": [errno.EIO, f"{kind}: {error}"]}


def decode_error(told: Message) -> Exception:
    """Return the error that *told* describes; a type that only that side has is a KhoError."""
    kind, args = told["type"], told["args"]
    if kind == "CallbackError":
        error = CallbackError(*args, **told["fields"])
        error.rolled_back = told["rolled_back"]
        error.undo_errors = [decode_error(problem) for problem in told["undo"]]
        for note in told["notes"]:
            error.add_note(note)
        return error
    if kind in _PLAIN_ERRORS:
        return _PLAIN_ERRORS[kind](*args)
    if kind == "KhoError":
        return KhoError(*args)
    return from_errno(*args)


# ---- columns ----


def pack_mask(mask: NDArray[np.bool_]) -> str:
    """Return a flag column as text."""
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def unpack_mask(text: str, n: int) -> NDArray[np.bool_]:
    """Return the flag column of *n* devices that *text* holds."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=n).astype(np.bool_)
