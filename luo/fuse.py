"""The attribute tree as a file system: :class:`luo.sysfs.Tree` mounted with FUSE.

Needs mfusepy (``pip install 'luo-kho[fuse]'``) and libfuse 3; importing this raises
``ImportError`` or ``OSError`` without them.

Who does what: a request is answered by a thread of :class:`_Workers`, of which one is always free,
so that many processes are served at once. A write is a job: writes below ``kernel/``, which are
events, are done one after the other by the thread that called :meth:`Mount.run`, the main one, so
that ^C reaches the callback that runs, which rolls back; any other is done by a thread made for it.
The thread of the request waits for the job and looks on the way whether its process was killed:
then a job that waits for its turn or for the lock ends with EAGAIN (RFC v1 1.4).

Who mounts is root of the simulated machine: the owner 0 of a file is shown as that user. Whether
another user may open a file is decided by Linux, from the modes and owners that are shown
(``default_permissions``).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import logging
import os
import queue
import select
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")  # mfusepy would rather have libfuse 2
import mfusepy

from luo.errors import LuoError, from_errno
from luo.mountpoint import clear, guarded
from luo.sysfs import OpenFile, Tree

__all__ = ["Mount"]

_log = logging.getLogger(__name__)

_KILLED_SECONDS: Final = 0.05  # how often a waiting request looks whether its process was killed
_SIGNAL_SECONDS: Final = 0.2  # how late ^C may be noticed when nothing is going on
_MAX_THREADS: Final = 1000  # requests at once; a write keeps one until it is done
_JOIN_SECONDS: Final = 2.0
_READY_SECONDS: Final = 30.0
_ERRNO_LIMIT: Final = 512  # from here on they are the kernel's own, and no process sees them

_LIBFUSE: Final = mfusepy._libfuse
if mfusepy.fuse_version_major != 3:
    raise OSError("libfuse 3 is needed, mfusepy has loaded another")
for _name, _result, *_arguments in (
    ("fuse_new", "p", "p", "p", "n", "p"),
    ("fuse_mount", "i", "p", "p"),
    ("fuse_unmount", "", "p"),
    ("fuse_destroy", "", "p"),
    ("fuse_opt_free_args", "", "p"),
    ("fuse_get_session", "p", "p"),
    ("fuse_session_exited", "i", "p"),
    ("fuse_session_receive_buf", "i", "p", "p"),
    ("fuse_session_process_buf", "", "p", "p"),
    ("fuse_interrupted", "i"),
    ("fuse_notify_poll", "i", "p"),
    ("fuse_pollhandle_destroy", "", "p"),
):
    _types = {"p": ctypes.c_void_p, "n": ctypes.c_size_t, "i": ctypes.c_int, "": None}
    getattr(_LIBFUSE, _name).restype = _types[_result]
    getattr(_LIBFUSE, _name).argtypes = [_types[letter] for letter in _arguments]

_READY: Final = select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM
_NOTIFIED: Final = select.POLLERR | select.POLLPRI


# ---- libfuse's loop, in threads of ours ----


class _Arguments(ctypes.Structure):
    """``struct fuse_args``."""

    _fields_ = (
        ("argc", ctypes.c_int),
        ("argv", ctypes.c_void_p),
        ("allocated", ctypes.c_int),
    )


class _Workers:
    """Threads that take requests and answer them: always one more than are busy."""

    def __init__(self, session: int) -> None:
        self.ended = threading.Event()  # the mount is gone
        self.threads: list[threading.Thread] = []
        self._session = session
        self._idle = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        """Start one."""
        self._idle += 1
        thread = threading.Thread(target=self._work, name="luo-fuse-worker", daemon=True)
        self.threads.append(thread)
        thread.start()

    def _work(self) -> None:
        buffer = (ctypes.c_uint64 * 32)()  # struct fuse_buf, which has grown with versions
        while not _LIBFUSE.fuse_session_exited(self._session):
            nbytes = _LIBFUSE.fuse_session_receive_buf(self._session, buffer)
            if nbytes in (-errno.EINTR, -errno.EAGAIN):
                continue
            if nbytes <= 0:
                break
            with self._lock:
                self._idle -= 1
                if not self._idle and len(self.threads) < _MAX_THREADS:
                    self.add()
            _LIBFUSE.fuse_session_process_buf(self._session, buffer)
            with self._lock:
                self._idle += 1
        self.ended.set()


def _main(count: int, words: Any, operations: Any, size: int, data: None) -> int:
    """Mount and serve until the mount is gone: in place of libfuse's own main function.

    That one changes to ``/``, takes signals away from Python, and in libfuse 3.12 to 3.14.0 has at
    most 10 threads, so that ten writers that wait would keep everybody else from reading.
    """
    arguments = _Arguments(count - 1, ctypes.cast(words, ctypes.c_void_p), 0)
    fuse = _LIBFUSE.fuse_new(ctypes.byref(arguments), operations, size, data)
    _LIBFUSE.fuse_opt_free_args(ctypes.byref(arguments))
    if not fuse:
        return 1
    if _LIBFUSE.fuse_mount(fuse, words[count - 1]) != 0:
        _LIBFUSE.fuse_destroy(fuse)
        return 2
    workers = _Workers(_LIBFUSE.fuse_get_session(fuse))
    workers.add()
    workers.ended.wait()
    _LIBFUSE.fuse_unmount(fuse)
    deadline = time.monotonic() + _JOIN_SECONDS
    for thread in workers.threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if not any(thread.is_alive() for thread in workers.threads):  # else one is in there yet
        _LIBFUSE.fuse_destroy(fuse)
    return 0


mfusepy.fuse_main_real = _main  # what mfusepy.FUSE() calls


class _Fuse(mfusepy.FUSE):  # type: ignore[misc]
    """mfusepy's callbacks, with answers that Linux takes."""

    def _wrapper(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> int:
        """Call *function*; a driver's errno of 512 and more, as EPROBE_DEFER is, becomes EIO.

        FUSE refuses such an answer, and who asked would wait for good.
        """
        answer: int = super()._wrapper(function, *arguments, **named)
        return answer if answer > -_ERRNO_LIMIT else -errno.EIO


# ---- writes ----


class _Job:
    """A write on its way: done by one thread, waited for by another."""

    def __init__(self, call: Callable[[], int]) -> None:
        self.done = threading.Event()
        self.thread: int | None = None  # who does it, from when it begins
        self._call = call
        self._turn = threading.Lock()
        self._revoked = False
        self._outcome: int | BaseException = 0

    def run(self) -> None:
        """Do it, unless it was revoked; an interrupt of this thread is raised after it is noted."""
        with self._turn:
            if self._revoked:
                return
            self.thread = threading.get_ident()
        try:
            self._outcome = self._call()
        except BaseException as error:
            self._outcome = error
            if not isinstance(error, Exception):
                raise
        finally:
            self.done.set()

    def revoke(self) -> bool:
        """Have it never begin; return False if it has."""
        with self._turn:
            self._revoked = self.thread is None
            return self._revoked

    def result(self) -> int:
        """Return what the write returned.

        Raises:
            OSError: with an errno for the process that wrote.
        """
        outcome = self._outcome
        if isinstance(outcome, int):
            return outcome
        if isinstance(outcome, OSError) and outcome.errno:
            raise outcome
        code = errno.EHOSTDOWN if isinstance(outcome, LuoError) else errno.EIO
        if not isinstance(outcome, Exception):
            code = errno.EINTR
        raise OSError(code, f"{type(outcome).__name__}: {outcome}") from outcome


class _Handle:
    """An open file, and the pollers that wait for it."""

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        self.poller: int | None = None  # libfuse's struct fuse_pollhandle

    def take_poller(self) -> int | None:
        """Return the poller and forget it."""
        poller, self.poller = self.poller, None
        return poller


class Mount:
    """A tree mounted on a directory.

    :meth:`mounted` and :meth:`run` are for whoever mounts, the others are FUSE's callbacks.

    Args:
        tree: what is shown.
        directory: where; it must exist.
    """

    use_ns = True  # times in nanoseconds; mfusepy asks

    def __init__(self, tree: Tree, directory: str) -> None:
        self.tree = tree
        self.directory = os.path.abspath(directory)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._handles: dict[int, _Handle] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of the handles' pollers
        self._mounter = os.geteuid(), os.getegid()
        self._born_ns = time.time_ns()

    # ---- life ----

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        """Keep it mounted while the block runs; if the process is killed in it, it is cleared.

        Raises:
            OSError: EIO if libfuse could not mount; it has said why on standard error.
        """
        loop = threading.Thread(target=self._loop, name="luo-fuse", daemon=True)
        self.tree.watchers.append(self._wake)
        try:
            with guarded(self.directory):
                try:
                    loop.start()
                    self._ready.wait(_READY_SECONDS)
                    if self._failure is not None or not self._ready.is_set():
                        why = self._failure or "libfuse did not get ready"
                        raise OSError(errno.EIO, f"mount {self.directory}: {why}")
                    yield
                finally:
                    self._closing.set()
                    if loop.is_alive():
                        clear(self.directory)
                        loop.join(_JOIN_SECONDS)  # else a process keeps a file open
        finally:
            self.tree.watchers.remove(self._wake)

    def run(self) -> None:
        """Do the events that processes write, until somebody unmounts the directory.

        Raises:
            KeyboardInterrupt: ^C, or a signal whose handler raises it; a running PREPARE has been
                rolled back.
        """
        while True:
            try:
                job = self._jobs.get(timeout=_SIGNAL_SECONDS)
            except queue.Empty:
                continue  # a signal that came when it was about to wait is handled now
            if job is None:
                return
            job.run()

    def _loop(self) -> None:
        options: dict[str, Any] = {
            "default_permissions": True,
            "direct_io": True,  # nothing is cached, and sizes do not matter
            "attr_timeout": 0,
            "entry_timeout": 0,
            "negative_timeout": 0,
            "fsname": "luo-sys",
            "subtype": "luo",
        }
        if self._mounter[0] == 0:
            options["allow_other"] = True
        try:
            _Fuse(self, self.directory, **options)
        except RuntimeError as error:
            self._failure = OSError(f"libfuse ended with status {error}")
        except BaseException as error:
            self._failure = error
        finally:
            self._closing.set()
            self._ready.set()
            self._jobs.put(None)

    def init(self, path: str) -> None:
        """Note that the mount works: the first request of all."""
        self._ready.set()

    def destroy(self, path: str) -> None:
        """Forget who polls: libfuse's session is about to be freed."""
        for number in list(self._handles):
            self.release("", number)

    # ---- writing ----

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """Have the write done, wait for it, and return how many bytes it took."""
        job = _Job(partial(self.tree.write, path, data))
        if path.startswith("/kernel/"):
            self._jobs.put(job)
        else:
            threading.Thread(target=job.run, daemon=True).start()
        while not job.done.wait(_KILLED_SECONDS):
            if _LIBFUSE.fuse_interrupted():
                if job.revoke():
                    raise from_errno(errno.EAGAIN, f"{path}: killed before its turn")
                if job.thread is not None:
                    self.tree.kill(job.thread)
            if self._closing.is_set() and job.revoke():
                raise from_errno(errno.ENODEV, f"{path}: is being unmounted")
        try:
            return job.result()
        except OSError as error:
            # The process sees a number only; this is the kernel's log.
            said = str(error)
            _log.warning("%s", said if path[1:] in said else f"{path[1:]}: {said}")
            raise

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Do nothing, as sysfs: ``echo 1 >`` asks for it before it writes."""
        return 0

    # ---- reading and looking ----

    def open(self, path: str, flags: int) -> int:
        """Return the number of a new open file.

        Raises:
            OSError: EACCES to write a file of sysfs that nobody may write, for root too.
        """
        reads = flags & os.O_ACCMODE == os.O_RDONLY
        if not (reads or path.startswith("/kernel/debug/") or self.tree.stat(path).mode & 0o222):
            raise OSError(errno.EACCES, f"{path}: is not for writing")
        handle = _Handle(self.tree.open(path))
        number = next(self._numbers)
        self._handles[number] = handle
        return number

    def release(self, path: str, fh: int) -> int:
        """Forget an open file: its last descriptor is closed."""
        handle = self._handles.pop(fh)
        with self._lock:
            poller = handle.take_poller()
        if poller is not None:
            _LIBFUSE.fuse_pollhandle_destroy(poller)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Return a part of the content."""
        return self._handles[fh].file.read(size, offset)

    def readdir(self, path: str, fh: int) -> list[str]:
        """Return the names in a directory."""
        return [".", "..", *self.tree.list(path)]

    def readlink(self, path: str) -> str:
        """Return where a symbolic link leads."""
        return self.tree.readlink(path)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        """Return what ``stat()`` says."""
        found = self.tree.stat(path)
        return {
            "st_mode": found.mode,
            "st_nlink": 2 if stat.S_ISDIR(found.mode) else 1,
            "st_uid": found.uid or self._mounter[0],
            "st_gid": found.gid or self._mounter[1],
            "st_size": found.size,
            **dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), self._born_ns),
        }

    def chown(self, path: str, uid: int, gid: int) -> int:
        """Change the owner; -1 leaves it."""
        shown = zip((uid, gid), self._mounter, strict=True)
        self.tree.chown(path, *(0 if number == mine else number for number, mine in shown))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        """Change the permissions."""
        self.tree.chmod(path, mode)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        """Do nothing, so that ``touch`` is no error: nobody asks an attribute how old it is."""
        return 0

    def create(self, path: str, mode: int, flags: int) -> int:
        """Refuse a new file."""
        raise OSError(errno.EACCES, "files come with the kernel")

    def _refuse(self, *arguments: object) -> int:
        """Refuse to make, move or remove anything else."""
        raise OSError(errno.EPERM, "files come with the kernel")

    link = mkdir = mknod = rename = rmdir = symlink = unlink = _refuse

    # ---- polling ----

    def poll(self, path: str, fh: int, poller: int | None, events: Any) -> int:
        """Say what is ready, and remember who wants to be woken."""
        handle = self._handles[fh]
        with self._lock:
            old = handle.take_poller() if poller else None
            handle.poller = poller or handle.poller
        if old is not None:
            _LIBFUSE.fuse_pollhandle_destroy(old)
        # Only now: what is notified from here on finds the poller.
        events[0] = _READY | (_NOTIFIED if handle.file.changed else 0)
        return 0

    def _wake(self) -> None:
        """Wake the pollers of files that were notified."""
        with self._lock:
            pollers = [
                handle.take_poller()
                for handle in self._handles.copy().values()
                if handle.poller is not None and handle.file.changed
            ]
        for poller in pollers:
            _LIBFUSE.fuse_notify_poll(poller)
            _LIBFUSE.fuse_pollhandle_destroy(poller)
