"""Mainline's front-end: sessions of files that outlive the kernel, behind ``/dev/liveupdate``.

Mirrors ``kernel/liveupdate/luo_core.c`` and ``luo_session.c`` of Linux 7.3 (luo-mainline 4). There
is no global state machine here: whoever holds a session's descriptor says what is kept.

Happy path: open the node, create a session, preserve files; the jump freezes all sessions and
writes what the next kernel reads; there, open the node, retrieve the session, its files, finish,
close. Unhappy paths: closing a session before the jump undoes everything in it; a freeze that fails
leaves all as before; what came over and cannot be read is EIO at every opening of the node, and a
subtree that is not for this kernel a panic.

Each kernel has a :class:`LiveUpdate`. Bytes are ``luo-v5`` in ``kho-v4``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

from luo import abi
from luo.block_set import BlockSet
from luo.errors import (
    CallbackError,
    HandoverError,
    KernelPanic,
    KhoError,
    LuoError,
    StateError,
    from_errno,
)
from luo.files import (
    Callbacks,
    FileArgs,
    FileHandler,
    FileSet,
    PreservedFile,
    Registry,
    ToTheEnd,
    name_field,
)
from luo.flb import UNCOUNTED, Flb, FlbArgs, FlbRecord, FlbTable
from luo.notifier import Mortal
from luo.state_lock import StateLock

if TYPE_CHECKING:
    from luo._kho import CallRecorder
    from luo.incoming import Incoming

__all__ = [
    "DeviceNode",
    "FileArgs",
    "FileHandler",
    "Flb",
    "FlbArgs",
    "LiveUpdate",
    "PreservedFile",
    "Session",
]

_log = logging.getLogger(__name__)

_NAME_BYTES = 64

#: Linux 7.3 makes room for a session before it looks at the name, and leaves it if that is taken.
#: After a full block an empty one follows then, over which the next kernel panics.
EMPTY_BLOCK = "sessions-empty-block"


# ---- what came over ----


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session as it came over: ``struct luo_session_ser``."""

    name: bytes
    files_pa: int
    count: int


@dataclass(frozen=True, slots=True)
class MainlineIncoming:
    """The subtree ``LUO`` that the kernel before left.

    Attributes:
        phys: where it lies.
        liveupdate_num: number of that live update.
        sessions_pa: first block of the sessions' records; 0 for none.
        sessions: the records.
        flbs_pa: page of FLBs; 0 for none.
        flbs: what stands in it, None without.
    """

    phys: int
    liveupdate_num: int
    sessions_pa: int
    sessions: tuple[SessionRecord, ...]
    flbs_pa: int
    flbs: tuple[FlbRecord, ...] | None

    @classmethod
    def read(cls, incoming: Incoming) -> MainlineIncoming | None:
        """Read it without a write; None if there is none.

        Raises:
            KernelPanic: it is not for this kernel, or its chain of sessions is broken; as Linux
                panics, whether live update is on or not.
        """
        if abi.LUO_MAINLINE not in incoming.subtrees():
            return None
        phys, nbytes = incoming.retrieve_subtree(abi.LUO_MAINLINE)
        if nbytes < abi.LUO_SER.size:
            raise KernelPanic(f"{abi.LUO_MAINLINE}: {nbytes} bytes, {abi.LUO_SER.size} are needed")
        compatible, number, sessions_pa, flbs_pa = abi.LUO_SER.unpack(
            _preserved_bytes(incoming, phys, abi.LUO_SER.size)
        )
        if compatible.split(b"\0", 1)[0] != abi.LUO_COMPATIBLE.rstrip(b"\0"):
            raise KernelPanic(
                f"{abi.LUO_MAINLINE}: compatible {compatible!r}, not {abi.LUO_COMPATIBLE!r}"
            )
        try:
            records = incoming.read_blocks(sessions_pa, abi.LUO_SESSION_SER.size)
            flbs = None if not flbs_pa else _read_flbs(incoming, flbs_pa)
        except HandoverError as error:
            raise KernelPanic(f"{abi.LUO_MAINLINE}: {error}") from error
        sessions = tuple(
            SessionRecord(name.split(b"\0", 1)[0][: _NAME_BYTES - 1], files_pa, count)
            for name, files_pa, count in abi.LUO_SESSION_SER.iter_unpack(records.tobytes())
        )
        return cls(phys, number, sessions_pa, sessions, flbs_pa, flbs)


def _preserved_bytes(incoming: Incoming, phys: int, nbytes: int) -> bytes:
    if not incoming.memory.is_populated(phys, nbytes):
        raise KernelPanic(f"{abi.LUO_MAINLINE}: {phys:#x} was never written")
    return bytes(incoming.memory.view(phys, nbytes))


def _read_flbs(incoming: Incoming, phys: int) -> tuple[FlbRecord, ...]:
    """Read the page of FLBs; Linux trusts its address and its count."""
    page = incoming.memory.page_size
    if phys % page or incoming.order_of(phys) != 0:
        raise HandoverError("page of FLBs is not a preserved page", phys)
    raw = _preserved_bytes(incoming, phys, page)
    _, count = abi.LUO_FLBS_SER.unpack_from(raw)
    if count > (page - abi.LUO_FLBS_SER.size) // abi.LUO_FLB_SER.size:
        raise HandoverError(f"page of FLBs with {count} of them", phys)
    entries = raw[abi.LUO_FLBS_SER.size :][: count * abi.LUO_FLB_SER.size]
    return tuple(
        FlbRecord(name.split(b"\0", 1)[0], data, files)
        for name, data, files in abi.LUO_FLB_SER.iter_unpack(entries)
    )


# ---- one kernel's LUO ----


class LiveUpdate(Mortal):
    """LUO of one kernel, as Linux 7.3 has it.

    Args:
        kernel: the kernel; callbacks see it as ``args.kernel``.
        recorder: where every callback's time goes.
        handlers: registered at boot; None: this kernel has no sessions at all.
        phase: context manager that times a phase by name.

    Attributes:
        liveupdate_num: number of the live update by which this kernel came to run; 0: by none.
        freeze_began_ns: when the last freeze began, on the recorder's clock.
        last_retrieve_ns: when a file was last retrieved.

    Context:
        Any thread. Calls wait while sessions are frozen, from then on until the jump has failed, or
        this kernel is gone: then they end with ESHUTDOWN.
    """

    def __init__(
        self,
        kernel: Any,
        recorder: CallRecorder,
        handlers: Iterable[FileHandler] | None,
        *,
        phase: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self.kernel = kernel
        self.present = handlers is not None
        self.liveupdate_num = 0
        self.freeze_began_ns = 0
        self.last_retrieve_ns = 0
        self._builtin = tuple(handlers or ())
        _check_builtin(self._builtin)
        self._recorder = recorder
        self._phase = phase
        self._callbacks = Callbacks(kernel, recorder)
        self._flbs = FlbTable(self._callbacks, UNCOUNTED in kernel.quirks)
        self._registry = Registry(self._callbacks, self._flbs)
        self._lock = StateLock()
        self._lists = threading.Lock()  # of the next three
        self._outgoing: dict[bytes, Session] = {}
        self._incoming: dict[bytes, Session] = {}
        self._opened = False
        self._found: MainlineIncoming | None = None  # what nobody has looked at yet
        self._broken: LuoError | None = None
        self._blocks: BlockSet | None = None
        self._phys = 0  # of the blob that is handed over
        self._flbs_phys = 0
        self._frozen: ExitStack | None = None  # what is held until there is a jump or none

    # ---- boot ----

    @property
    def enabled(self) -> bool:
        """Whether this kernel has sessions, and ``liveupdate=`` and ``kho=`` are on."""
        kernel = self.kernel
        return bool(self.present and kernel.kho_enabled and kernel.parameters.liveupdate)

    @property
    def problems(self) -> tuple[CallbackError, ...]:
        """What callbacks raised or returned that cannot fail in Linux; also in the log."""
        return tuple(self._callbacks.problems)

    def startup(self, found: MainlineIncoming | None) -> None:
        """Take what came over, and make what is handed over (``luo_early_startup()`` and on)."""
        if not self.enabled:
            return  # what came over stays preserved, and nobody can ask for it
        kho = self.kernel.kho
        if found is not None:
            self.liveupdate_num = found.liveupdate_num
            _log.info("live update number %d", found.liveupdate_num)
            self._found = found
            self._flbs.load(found.flbs)
            for phys in {found.phys, found.flbs_pa} - {0}:  # both have been read
                kho.incoming.restore_free(phys)
        self._blocks = BlockSet(kho, abi.LUO_SESSION_SER.size, "sessions")
        self._phys = kho.alloc_preserve(abi.LUO_SER.size)
        self._flbs_phys = kho.alloc_preserve(kho.memory.page_size)
        self._write(0)
        self._write_flbs(self._no_flbs)
        kho.add_subtree(abi.LUO_MAINLINE, self._phys, abi.LUO_SER.size)
        for handler in self._builtin:
            self.register_handler(handler)

    def _write(self, sessions_pa: int) -> None:
        self.kernel.memory.view(self._phys, abi.LUO_SER.size)[:] = abi.LUO_SER.pack(
            abi.LUO_COMPATIBLE, self.liveupdate_num + 1, sessions_pa, self._flbs_phys
        )

    @property
    def _no_flbs(self) -> bytes:
        return abi.LUO_FLBS_SER.pack(1, 0).ljust(self.kernel.memory.page_size, b"\0")

    def _write_flbs(self, page: bytes) -> None:
        self.kernel.memory.view(self._flbs_phys, len(page))[:] = page

    def reading(self, what: str) -> AbstractContextManager[None]:
        """Hold off freezing; wait while there is one."""
        lock: StateLock = self._lock
        return lock.reading(what)

    # ---- who keeps files ----

    def _require_enabled(self, what: str) -> None:
        if not self.enabled:
            raise from_errno(errno.EOPNOTSUPP, f"{what}: live update is off in this kernel")

    @property
    def handlers(self) -> tuple[FileHandler, ...]:
        """Who is registered, in order."""
        return tuple(self._registry.handlers)

    def register_handler(self, handler: FileHandler) -> None:
        """Have *handler* keep files from now on (``liveupdate_register_file_handler()``).

        Raises:
            KhoError: EOPNOTSUPP if live update is off; EEXIST if its compatible is taken; of its
                FLBs, as :meth:`register_flb`, and nothing is registered then.
        """
        what = f"register {handler.compatible}"
        self._require_enabled(what)
        with self.reading(what), self._flbs.lock:
            if any(known.compatible == handler.compatible for known in self._registry.handlers):
                raise from_errno(errno.EEXIST, f"{what}: there is a handler of that name")
            try:
                for flb in handler.flbs:
                    self._flbs.register(handler, flb)
            except BaseException:
                self._flbs.unregister_all(handler)
                raise
            self._registry.handlers.append(handler)

    def unregister_handler(self, handler: FileHandler) -> None:
        """Undo :meth:`register_handler`, with its FLBs.

        Raises:
            KhoError: ENOENT if it is not registered; EBUSY while it keeps a file, as its module
                could not be unloaded.
        """
        what = f"unregister {handler.compatible}"
        with self.reading(what), self._flbs.lock:
            if handler not in self._registry.handlers:
                raise from_errno(errno.ENOENT, f"{what}: is not registered")
            if not self._registry.remove(handler):
                raise from_errno(errno.EBUSY, f"{what}: keeps files")
            self._flbs.unregister_all(handler)

    def register_flb(self, handler: FileHandler, flb: Flb) -> None:
        """Have files of *handler* depend on *flb* (``liveupdate_register_flb()``).

        Raises:
            KhoError: EOPNOTSUPP if live update is off; EINVAL if *handler* is not registered;
                EEXIST if that is so already, or another FLB has the name; ENOSPC above 63 FLBs.
        """
        what = f"register FLB {flb.name}"
        self._require_enabled(what)
        with self.reading(what), self._flbs.lock:
            if handler not in self._registry.handlers:
                raise from_errno(errno.EINVAL, f"{what}: {handler.compatible} is not registered")
            self._flbs.register(handler, flb)

    def unregister_flb(self, handler: FileHandler, flb: Flb) -> None:
        """Undo :meth:`register_flb`; a link that is not there is logged."""
        with self.reading(f"unregister FLB {flb.name}"), self._flbs.lock:
            self._flbs.unregister(handler, flb)

    def flb_get_outgoing(self, flb: Flb) -> Any:
        """Return the live object of *flb* and hold it (``liveupdate_flb_get_outgoing()``).

        Raises:
            KhoError: ENOENT if nothing that depends on it is preserved; EOPNOTSUPP.
        """
        self._require_enabled(f"FLB {flb.name}")
        return self._flbs.get_outgoing(flb)

    def flb_put_outgoing(self, flb: Flb) -> None:
        """Undo :meth:`flb_get_outgoing`; the last one unpreserves it."""
        with ToTheEnd(self._callbacks) as rest:
            self._flbs.put_outgoing(flb, flb.name, rest)

    def flb_get_incoming(self, flb: Flb) -> Any:
        """Return the object of *flb* that came over, and hold it (``…_get_incoming()``).

        The first call has it retrieved.

        Raises:
            KhoError: ENODATA if nothing came over, or it has been finished; ENOENT if *flb* did not
                come over; EOPNOTSUPP.
            CallbackError: its retrieve failed; that is remembered.
        """
        self._require_enabled(f"FLB {flb.name}")
        return self._flbs.get_incoming(flb)

    def flb_put_incoming(self, flb: Flb) -> None:
        """Undo :meth:`flb_get_incoming`; the last one finishes it."""
        with ToTheEnd(self._callbacks) as rest:
            self._flbs.put_incoming(flb, flb.name, rest)

    # ---- the device node ----

    @property
    def outgoing(self) -> tuple[Session, ...]:
        """Sessions that would be handed over now, in the order in which they were created."""
        with self._lists:
            return tuple(self._outgoing.values())

    @property
    def incoming(self) -> tuple[Session, ...]:
        """Sessions that came over and are not closed; none before the node was first opened."""
        with self._lists:
            return tuple(self._incoming.values())

    def open(self) -> DeviceNode:
        """Open ``/dev/liveupdate``, as one process at a time may; the first looks what came over.

        Raises:
            KhoError: ENODEV if live update is off; EBUSY if it is open; EIO if what came over is
                wrong, now and ever after.
        """
        what = "open /dev/liveupdate"
        with self.reading(what):
            if not self.enabled or not self._phys:
                raise from_errno(errno.ENODEV, f"{what}: live update is off in this kernel")
            with self._lists:
                if self._opened:
                    raise from_errno(errno.EBUSY, f"{what}: somebody has it open")
                self._opened = True
            try:
                self._load()
            except BaseException:
                self._opened = False
                raise
        return DeviceNode(self)

    def release(self) -> None:
        """Note that the node has been closed."""
        self._opened = False

    def _load(self) -> None:
        """Know the sessions that came over."""
        found = self._found
        if found is not None:
            incoming = self.kernel.kho.incoming
            try:
                for record in found.sessions:
                    self._load_one(record, incoming)
            except (HandoverError, KhoError) as error:  # what was made so far is left, as in Linux
                _log.warning("live update: sessions: %s", error)
                self._broken = error
            except BaseException:  # ^C: nothing was freed yet, and the next opener begins again
                self._incoming.clear()
                raise
            self._found = None
            try:
                incoming.restore_free_blocks(found.sessions_pa)
            except (HandoverError, KhoError) as error:  # it shares a block with something else
                _log.warning("live update: sessions: %s", error)
                self._broken = self._broken or error
        if self._broken is not None:
            raise from_errno(
                errno.EIO, f"open /dev/liveupdate: what came over is wrong: {self._broken}"
            ) from self._broken

    def _load_one(self, record: SessionRecord, incoming: Incoming) -> None:
        session = Session(self, record.name)
        if record.name in self._incoming:
            raise from_errno(errno.EEXIST, f"session {session.name}: stands twice")
        with self._lists:
            self._incoming[record.name] = session
        session.file_set.load(record.files_pa, record.count, incoming)

    def create(self, name: str | bytes) -> Session:
        """Make a session; see :meth:`DeviceNode.create_session`."""
        raw = name_field(name, _NAME_BYTES, "session")
        what = f"create session {_shown(raw)}"
        with self.reading(what):
            self._require_enabled(what)
            session = Session(self, raw)
            with self._lists:
                assert self._blocks is not None
                self._blocks.grow(len(self._outgoing) + 1)
                if raw in self._outgoing:
                    if EMPTY_BLOCK not in self.kernel.quirks:
                        self._blocks.shrink(len(self._outgoing))
                    raise from_errno(errno.EEXIST, f"{what}: there is one of that name")
                self._outgoing[raw] = session
            return session

    def take(self, name: str | bytes) -> Session:
        """Hand out a session that came over; see :meth:`DeviceNode.retrieve_session`."""
        raw = name.encode(errors="surrogateescape") if isinstance(name, str) else bytes(name)
        what = f"retrieve session {_shown(raw)}"
        with self.reading(what), self._lists:
            session = self._incoming.get(raw)
            if session is None:
                raise from_errno(errno.ENOENT, f"{what}: none of that name came over")
            if session.retrieved:
                raise from_errno(errno.EINVAL, f"{what}: has been retrieved")
            session.retrieved = True
            return session

    def drop(self, session: Session) -> None:
        """Forget a session that is closed."""
        with self._lists:
            if session.retrieved:
                del self._incoming[session.raw_name]
            else:
                del self._outgoing[session.raw_name]
                assert self._blocks is not None
                self._blocks.shrink(len(self._outgoing))

    # ---- the jump ----

    def freeze(self) -> bool:
        """Freeze all files and write what the next kernel reads (``liveupdate_reboot()``).

        From here on other callers wait, until :meth:`unfreeze` or the end of this kernel.

        Returns:
            whether anything is handed over; False as well if live update is off.

        Raises:
            CallbackError: a freeze failed; everything is as before.
            StateError: EDEADLK from a callback.
        """
        if not self.enabled or not self._phys:
            return False
        with ExitStack() as held:
            held.enter_context(self._lock.writing("freeze"))
            self.freeze_began_ns = self._recorder.read_clock()
            with self._phase("freeze"):
                self._freeze_all()
            self._frozen = held.pop_all()
        return bool(self._outgoing)

    def _freeze_all(self) -> None:
        sessions = self.outgoing
        frozen: list[Session] = []
        try:
            for session in sessions:
                session.file_set.freeze()
                frozen.append(session)
        except BaseException as error:
            self._unfreeze_all(frozen)
            if isinstance(error, CallbackError):
                error.rolled_back = True
            raise
        assert self._blocks is not None
        self._blocks.write(b"".join(session.record() for session in sessions))
        if sessions:
            self._write(self._blocks.head)
        self._write_flbs(self._flbs.page(self.kernel.memory.page_size))

    def _unfreeze_all(self, sessions: Iterable[Session]) -> None:
        assert self._blocks is not None
        with ToTheEnd(self._callbacks) as rest:
            for session in reversed(tuple(sessions)):
                rest.run(session.file_set.unfreeze)
            self._blocks.clear()
            self._write(0)
            self._write_flbs(self._no_flbs)

    @property
    def is_frozen(self) -> bool:
        """Whether all is ready for the jump."""
        return self._frozen is not None

    def refuse_callback(self, what: str) -> None:
        """Raise StateError (EDEADLK) in a callback of a file or FLB."""
        self._lock.refuse_holder(what)

    def unfreeze(self) -> None:
        """Take :meth:`freeze` back: there is no jump. Linux has nothing after it that may fail."""
        if self._frozen is None:
            return
        held, self._frozen = self._frozen, None
        try:
            self._unfreeze_all(self.outgoing)
        finally:
            held.close()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have memory hold what would be handed over while the block runs: to look at, to save."""
        self.freeze()
        try:
            yield
        finally:
            self.unfreeze()

    def note_retrieve(self) -> None:
        """Note the time: a file has been retrieved."""
        self.last_retrieve_ns = self._recorder.read_clock()

    def close(self) -> None:
        """Drop everything: the kernel is gone. Files are let go, and nobody is called."""
        if self.gone:
            return
        for session in (*self._outgoing.values(), *self._incoming.values()):
            session.file_set.let_go()
        lock, held = self._lock, self._frozen
        super().close()
        lock.end()
        if held is not None:
            held.close()


def _check_builtin(handlers: Iterable[FileHandler]) -> None:
    """Refuse handlers that cannot all be registered: at boot it is too late."""
    names: set[str] = set()
    flbs: dict[str, Flb] = {}
    for handler in handlers:
        if not isinstance(handler, FileHandler):
            raise TypeError(f"file handlers: {handler!r} is no FileHandler")
        if handler.compatible in names:
            raise ValueError(f"two file handlers are called {handler.compatible}")
        names.add(handler.compatible)
        if len({*handler.flbs}) < len(handler.flbs):
            raise ValueError(f"file handler {handler.compatible}: has an FLB twice")
        for flb in handler.flbs:
            if flbs.setdefault(flb.name, flb) is not flb:
                raise ValueError(f"two FLBs are called {flb.name}")
    if len(flbs) > abi.LUO_FLBS_MAX:
        raise ValueError(f"{len(flbs)} FLBs: {abi.LUO_FLBS_MAX} at most")


def _shown(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


# ---- what user space holds ----


class DeviceNode:
    """``/dev/liveupdate``, opened by :meth:`LiveUpdate.open`."""

    def __init__(self, live: LiveUpdate) -> None:
        self._live: LiveUpdate | None = live

    def _get(self, what: str) -> LiveUpdate:
        if self._live is None:
            raise from_errno(errno.EBADF, f"{what}: the node has been closed")
        return self._live

    def create_session(self, name: str | bytes) -> Session:
        """Create a session that will be handed over.

        Args:
            name: 1 to 63 bytes; sessions that came over do not count.

        Raises:
            KhoError: EINVAL for the name; EEXIST if there is one; ENOSPC above 10,000 blocks of 51
                sessions; ENOMEM; EBADF.
        """
        return self._get("create session").create(name)

    def retrieve_session(self, name: str | bytes) -> Session:
        """Take over a session that came over.

        Raises:
            KhoError: ENOENT if there is none; EINVAL if it has been retrieved already; EBADF.
        """
        return self._get("retrieve session").take(name)

    def close(self) -> None:
        """Close it; sessions stay open."""
        if self._live is not None:
            live, self._live = self._live, None
            if not live.gone:
                live.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Session:
    """Files that are kept together, by somebody who has the session open.

    Attributes:
        name: of it; bytes that are no UTF-8 as ``os.fsdecode()`` has them.
        retrieved: whether it came over, and was retrieved.
        closed: whether it has been closed.
        live: the kernel's LUO.

    Context:
        Any thread, one at a time. A callback of one of its files that uses it gets EDEADLK.
    """

    def __init__(self, live: LiveUpdate, name: bytes) -> None:
        self.raw_name = name
        self.name = _shown(name)
        self.retrieved = False
        self.live = live
        self.closed = False
        self.mutex = threading.Lock()
        self.user: int | None = None  # the thread that uses it
        self.file_set = FileSet(live._registry, self.name)

    def __repr__(self) -> str:
        return f"<Session {self.name}{' (closed)' if self.closed else ''}>"

    @property
    def files(self) -> tuple[PreservedFile, ...]:
        """Its files, in the order in which they were preserved."""
        return tuple(self.file_set)

    def record(self) -> bytes:
        """Return its ``struct luo_session_ser``."""
        return abi.LUO_SESSION_SER.pack(self.raw_name, self.file_set.head, len(self.file_set))

    def _using(self, what: str) -> _Using:
        return _Using(self, what)

    def preserve(self, file: Any, token: SupportsIndex) -> None:
        """Keep *file* across the next live update, under *token*.

        Args:
            file: a descriptor, or whatever else a handler takes.
            token: u64, of the caller's choice, unique in the session.

        Raises:
            KhoError: EINVAL in a session that came over; EEXIST if the token is taken; EBADF if it
                is no open file; ENOENT if no handler takes it; EBUSY if it is preserved already,
                anywhere; ENOSPC above 10,000 blocks of 63 files; ENOMEM.
            CallbackError: the handler, or an FLB that it depends on, failed. Nothing is left then.
        """
        number = _token(token)
        what = f"preserve {self.name}/{number:#x}"
        with self._using(what):
            if self.retrieved:
                raise from_errno(errno.EINVAL, f"{what}: the session came over")
            self.file_set.preserve(file, number)

    def retrieve(self, token: SupportsIndex) -> Any:
        """Return the file that came over under *token*; again and again, if asked for.

        Returns:
            a new descriptor, which is the caller's to close; or the object.

        Raises:
            KhoError: EINVAL in a session that did not come over; ENOENT if there is no such token;
                what the first attempt failed with, for ever.
            CallbackError: the handler failed.
        """
        number = _token(token)
        what = f"retrieve {self.name}/{number:#x}"
        with self._using(what):
            if not self.retrieved:
                raise from_errno(errno.EINVAL, f"{what}: the session did not come over")
            try:
                return self.file_set.retrieve(number)
            finally:
                self.live.note_retrieve()

    def finish(self) -> None:
        """Free what came over, of all files, retrieved or not.

        Raises:
            KhoError: EINVAL in a session that did not come over; EBUSY if a handler is not ready,
                and then nothing has been finished.
        """
        what = f"finish {self.name}"
        with self._using(what):
            if not self.retrieved:
                raise from_errno(errno.EINVAL, f"{what}: the session did not come over")
            self.file_set.finish()

    def close(self) -> None:
        """Close it. One that came over is finished; of any other every file is unpreserved.

        Raises:
            KhoError: EBUSY if a handler is not ready. As in Linux the session is stuck then: it
                is closed, cannot be retrieved again, and stays in the list.
        """
        if self.closed:
            return
        try:
            with self._using(f"close {self.name}"):
                self._close()
        except StateError:
            if not self.live.gone:
                raise
            self.closed = True  # with the kernel, that is

    def _close(self) -> None:
        self.closed = True
        try:
            if self.retrieved:
                self.file_set.finish()
            else:
                self.file_set.unpreserve()
        except BaseException as error:
            if not len(self.file_set):
                self.live.drop(self)
            elif not isinstance(error, Exception):
                self.closed = False  # ^C before anything was done
            raise
        self.live.drop(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Using:
    """A session, used by one thread; a class, as it is entered for each file."""

    __slots__ = ("_reading", "_session", "_what")

    def __init__(self, session: Session, what: str) -> None:
        self._session = session
        self._what = what

    def __enter__(self) -> None:
        session, me = self._session, threading.get_ident()
        if session.user == me:
            raise StateError(
                errno.EDEADLK, f"{self._what}: called from a callback of its own files"
            )
        self._reading = session.live.reading(self._what)
        self._reading.__enter__()
        try:
            session.mutex.acquire()
            if session.closed:
                session.mutex.release()
                raise from_errno(errno.EBADF, f"{self._what}: the session has been closed")
            session.user = me
        except BaseException:
            self._reading.__exit__(None, None, None)
            raise

    def __exit__(self, *exc: object) -> None:
        self._session.user = None
        self._session.mutex.release()
        self._reading.__exit__(None, None, None)


def _token(token: SupportsIndex) -> int:
    number = operator.index(token)
    if not 0 <= number < 1 << 64:
        raise OverflowError(f"token {number}: not an unsigned 64-bit number")
    return number
