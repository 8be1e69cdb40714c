"""The lock on LUO's state: readers, one writer, and waits that can be killed (RFC v1 1.4)."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from luo.errors import StateError

__all__ = ["StateLock"]


class StateLock:
    """Many readers or one writer, and who waits can be killed.

    A writer that waits keeps new readers out, as in an rwsem. A thread that would wait for itself
    is refused; with *deadlocks* it waits until it is killed.
    """

    def __init__(self, deadlocks: bool = False) -> None:
        self._changed = threading.Condition()
        self._deadlocks = deadlocks
        self._writer: int | None = None
        self._readers: dict[int, int] = {}
        self._waiting: dict[int, bool] = {}  # thread: whether to write
        self._killed: set[int] = set()
        self._ended = False

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Hold the lock alone.

        Raises:
            StateError: EDEADLK if this thread holds it already: *what* was called by a callback;
                EAGAIN if it was killed while it waited.
        """
        me = threading.get_ident()
        with self._changed:
            self.refuse_holder(what)
            self._wait(what, errno.EAGAIN, True, lambda: self._writer is None and not self._readers)
            self._writer = me
        try:
            yield
        finally:
            with self._changed:
                self._writer = None
                self._changed.notify_all()

    def reading(self, what: str, killed: int = errno.EAGAIN) -> AbstractContextManager[None]:
        """Hold the lock together with other readers.

        Raises:
            StateError: EDEADLK if this thread holds it for writing; *killed* if it was killed
                while it waited.
        """
        return _Reading(self, what, killed)

    def enter(self, what: str, killed: int) -> None:
        """Begin :meth:`reading`."""
        me = threading.get_ident()
        with self._changed:
            self.refuse_deadlock(what)
            if self._ended or not self._may_read(me):
                self._wait(what, killed, False, lambda: self._may_read(me))
            self._readers[me] = self._readers.get(me, 0) + 1

    def leave(self) -> None:
        """End :meth:`reading`."""
        me = threading.get_ident()
        with self._changed:
            self._readers[me] -= 1
            if not self._readers[me]:
                del self._readers[me]
            if self._waiting:
                self._changed.notify_all()

    def end(self) -> None:
        """Have everybody who waits, or comes later, get ``StateError(ESHUTDOWN)``."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _may_read(self, me: int) -> bool:
        return self._writer is None and (me in self._readers or not any(self._waiting.values()))

    def _wait(self, what: str, killed: int, write: bool, free: Callable[[], bool]) -> None:
        me = threading.get_ident()
        try:
            while self._ended or not free():
                if self._ended:
                    raise StateError(errno.ESHUTDOWN, f"{what}: this kernel is gone")
                self._waiting[me] = write
                self._changed.wait()
                if me in self._killed:
                    raise StateError(killed, f"{what}: killed while it waited for the state")
        finally:
            if self._waiting.pop(me, False):
                self._changed.notify_all()  # a writer that gives up has kept readers out
            self._killed.discard(me)

    def kill(self, thread: int) -> bool:
        """Have *thread* (as of ``threading.get_ident()``) give up waiting.

        Returns:
            whether it waits; if not, nothing is done.
        """
        with self._changed:
            if thread not in self._waiting:
                return False
            self._killed.add(thread)
            self._changed.notify_all()
            return True

    def refuse_holder(self, what: str) -> None:
        """Raise ``StateError(EDEADLK)`` if this thread holds the lock, for whatever."""
        self.refuse_deadlock(what)
        if threading.get_ident() in self._readers and not self._deadlocks:
            raise StateError(errno.EDEADLK, f"{what}: this thread is reading the state")

    def refuse_deadlock(self, what: str) -> None:
        """Raise ``StateError(EDEADLK)`` if this thread holds the lock for writing."""
        if self._writer == threading.get_ident() and not self._deadlocks:
            raise StateError(errno.EDEADLK, f"{what}: called from a callback of a running event")


class _Reading:
    """What :meth:`StateLock.reading` returns: a class, as it is entered once a file or more."""

    __slots__ = ("_killed", "_lock", "_what")

    def __init__(self, lock: StateLock, what: str, killed: int) -> None:
        self._lock = lock
        self._what = what
        self._killed = killed

    def __enter__(self) -> None:
        self._lock.enter(self._what, self._killed)

    def __exit__(self, *exc: object) -> None:
        self._lock.leave()
