"""Files that a session keeps: handlers, and the order in which they are called.

Mirrors ``kernel/liveupdate/luo_file.c`` of Linux 7.3 (luo-mainline 4.2 to 4.4). A file is whatever
a handler knows: an ``int`` is a descriptor, of which LUO keeps a duplicate of its own as Linux
keeps a reference to the ``struct file``; any other object is kept as it is.

Happy path, a file: preserve, freeze in the jump; the next kernel: retrieve, finish. Unhappy paths:
a preserve that fails leaves nothing; closing the session before the jump unpreserves its files, the
last one first; a freeze that fails unfreezes those before it, the first one first. Callbacks that
return nothing in Linux cannot fail: what they raise is logged, and is in
:attr:`Callbacks.problems`. ^C waits for the end of such an operation.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from luo import abi
from luo.block_set import BlockSet
from luo.errors import CallbackError, HandoverError, KhoError, LuoError, from_errno
from luo.notifier import Carrier, callback_error, failed

if TYPE_CHECKING:
    from luo._kho import CallRecorder
    from luo.flb import Flb, FlbTable
    from luo.incoming import Incoming

__all__ = [
    "Callbacks",
    "FileArgs",
    "FileHandler",
    "FileSet",
    "PreservedFile",
    "Registry",
    "ToTheEnd",
    "name_field",
]

_log = logging.getLogger(__name__)

_REQUIRED: Final = ("can_preserve", "preserve", "unpreserve", "retrieve", "finish")
_OPTIONAL: Final = ("freeze", "unfreeze", "can_finish", "get_id")


def name_field(name: str | bytes, nbytes: int, what: str) -> bytes:
    """Return *name* as bytes for a field of *nbytes*, without the NULs behind it.

    Raises:
        KhoError: EINVAL if it is empty, has a NUL, or leaves no room for one.
    """
    raw = name.encode(errors="surrogateescape") if isinstance(name, str) else bytes(name)
    if not 0 < len(raw) < nbytes or b"\0" in raw:
        raise from_errno(errno.EINVAL, f"{what} {name!r}: 1 to {nbytes - 1} bytes without NUL")
    return raw


@dataclass(frozen=True, eq=False)
class FileHandler:
    """Keeps one kind of files: ``struct liveupdate_file_handler`` and its operations.

    Callbacks that may fail return None or 0, or a negative errno; or raise ``OSError``.

    Args:
        compatible: names handler and format of its data, 1 to 47 bytes.
        can_preserve: called with the file; whether it is of this kind. The first handler that says
            yes, in the order of registration, gets the file.
        preserve: saves what the file is, and sets ``args.data``, the one number that is handed
            over, and ``args.private``.
        unpreserve: undoes it.
        retrieve: in the next kernel: makes the file from ``args.data`` and sets ``args.file``. If
            that is a descriptor it is LUO's from then on; who retrieves gets a duplicate.
        finish: frees what was handed over; called whether or not the file was retrieved.
        freeze: called in the jump, and may change ``args.data``.
        unfreeze: undoes it, if there is no jump after all.
        can_finish: whether FINISH may free it already.
        get_id: called with the file; what two descriptors of one file have in common. None: for
            descriptors device and inode, else the object itself.
        flbs: what it depends on, in this order (:class:`luo.flb.Flb`).
    """

    compatible: str
    can_preserve: Callable[[Any], Any]
    preserve: Callable[[FileArgs], int | None]
    unpreserve: Callable[[FileArgs], int | None]
    retrieve: Callable[[FileArgs], int | None]
    finish: Callable[[FileArgs], int | None]
    freeze: Callable[[FileArgs], int | None] | None = None
    unfreeze: Callable[[FileArgs], int | None] | None = None
    can_finish: Callable[[FileArgs], Any] | None = None
    get_id: Callable[[Any], Hashable] | None = None
    flbs: tuple[Flb, ...] = ()

    def __post_init__(self) -> None:
        name_field(self.compatible, 48, "file handler")
        for names, required in ((_REQUIRED, True), (_OPTIONAL, False)):
            for name in names:
                callback = getattr(self, name)
                if not callable(callback) and (required or callback is not None):
                    raise from_errno(
                        errno.EINVAL, f"file handler {self.compatible}: {name} is {callback!r}"
                    )


class FileArgs(Carrier):
    """What a handler's callback is given.

    Attributes:
        handler: whose callback it is.
        session: name of the session.
        token: of the file in it.
        file: the file; None in the next kernel until it has been retrieved.
        private: the handler's own, in this kernel only.
        retrieve_status: 0: nobody asked for it yet; 1: retrieved; below 0: the errno with which
            that failed.
    """

    __slots__ = ("file", "handler", "private", "retrieve_status", "session", "token")

    def __init__(
        self, kernel: Any, handler: FileHandler, session: str, token: int, file: Any, data: int = 0
    ) -> None:
        super().__init__(kernel)
        self._data = data
        self.handler = handler
        self.session = session
        self.token = token
        self.file = file
        self.private: Any = None
        self.retrieve_status = 0

    def __str__(self) -> str:
        return f"{self.session}/{self.token:#x}"


class PreservedFile:
    """A file of a session; for looking at.

    Attributes:
        token: by which the session knows it.
        handler: who keeps it.
    """

    __slots__ = ("_args", "flbs", "handler", "identity", "token")

    def __init__(self, args: FileArgs) -> None:
        self._args = args
        self.token = args.token
        self.handler = args.handler
        self.identity: Hashable = None  # under which it is known to be preserved; None: it is not
        self.flbs: tuple[Flb, ...] = ()  # that were counted for it when it was preserved

    @property
    def args(self) -> FileArgs:
        """What its handler's callbacks are given."""
        return self._args

    @property
    def data(self) -> int:
        """The u64 that is handed over."""
        return self._args.data

    @property
    def file(self) -> Any:
        """LUO's own reference to it; None in the next kernel until it has been retrieved."""
        return self._args.file

    @property
    def retrieve_status(self) -> int:
        """0: nobody asked for it yet; 1: retrieved; below 0: the errno with which that failed."""
        return self._args.retrieve_status

    def record(self) -> bytes:
        """Return its ``struct luo_file_ser``."""
        compatible = self.handler.compatible.encode()
        return abi.LUO_FILE_SER.pack(compatible, self._args.data, self.token)

    def __repr__(self) -> str:
        return f"<PreservedFile {self._args} {self.handler.compatible}>"


# ---- calling ----


class Callbacks:
    """Calls what handlers and FLBs of one kernel have, and keeps the time.

    Attributes:
        problems: what callbacks raised or returned that cannot fail in Linux.
    """

    def __init__(self, kernel: Any, recorder: CallRecorder) -> None:
        self.kernel = kernel
        self.problems: list[CallbackError] = []
        self._recorder = recorder

    def ask(
        self, event: str, kind: str, name: str, callback: Callable[[Any], Any], of: Any, where: str
    ) -> Any:
        """Return what *callback* says; what it raises is a CallbackError."""
        key = self._recorder.key("files", event, kind, name)
        begin = self._recorder.begin()
        try:
            answer = callback(of)
        except Exception as raised:
            self._recorder.lap(key, begin)
            raise self._error(raised, event, kind, name, callback, where) from raised
        self._recorder.lap(key, begin)
        return answer

    def call(
        self, event: str, kind: str, name: str, callback: Callable[[Any], Any], of: Any, where: str
    ) -> None:
        """Call *callback*, whose return value is an errno."""
        outcome = self.ask(event, kind, name, callback, of, where)
        if failed(outcome):
            raise self._error(outcome, event, kind, name, callback, where)

    @staticmethod
    def _error(
        outcome: object, event: str, kind: str, name: str, callback: object, where: str
    ) -> CallbackError:
        return callback_error(
            outcome, event=event, kind=kind, name=name, callback=callback, device=where
        )


class ToTheEnd:
    """Runs calls that cannot be stopped: each has its turn, and then ^C is raised again."""

    def __init__(self, callbacks: Callbacks) -> None:
        self._callbacks = callbacks
        self._interrupt: BaseException | None = None

    def __enter__(self) -> ToTheEnd:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._interrupt is not None and error is None:
            raise self._interrupt

    def call(
        self, event: str, kind: str, name: str, callback: Callable[[Any], Any], of: Any, where: str
    ) -> None:
        """Call *callback*; a failure is logged and noted."""
        self.run(lambda: self._callbacks.call(event, kind, name, callback, of, where))

    def run(self, step: Callable[[], object]) -> None:
        """Run *step*; a failure is logged and noted."""
        try:
            step()
        except CallbackError as error:
            _log.warning("%s", error)
            self._callbacks.problems.append(error)
        except (HandoverError, KhoError) as error:  # somebody wrote over what was to be freed
            _log.warning("live update: %s", error)
        except BaseException as error:
            if isinstance(error, Exception):
                raise
            self._interrupt = self._interrupt or error


# ---- references to files ----


def _get(file: Any, what: str) -> Any:
    """Return one more reference, as ``fget()``; EBADF if it is no open file, EMFILE."""
    if not isinstance(file, int):
        return file
    try:
        return os.dup(file)
    except OSError as error:
        raise from_errno(
            error.errno or errno.EBADF, f"{what}: descriptor {file}: {error.strerror}"
        ) from error


def _put(file: Any) -> None:
    """Drop LUO's reference, as ``fput()``."""
    if isinstance(file, int):
        os.close(file)


def _identity(handler: FileHandler, file: Any, where: str) -> Hashable:
    """Return what no two preserved files share; CallbackError if the handler cannot say."""
    if handler.get_id is not None:
        try:
            identity = handler.get_id(file)
            hash(identity)
        except Exception as raised:
            raise callback_error(
                raised,
                event="GET_ID",
                kind="file",
                name=handler.compatible,
                callback=handler.get_id,
                device=where,
            ) from raised
        return identity
    if isinstance(file, int):
        found = os.fstat(file)
        return found.st_dev, found.st_ino
    return id(file)


# ---- the files of a session ----


class Registry:
    """What the file sets of one kernel share.

    Attributes:
        kernel: it.
        callbacks: who calls.
        flbs: its FLBs.
        handlers: registered, in order.
        held: files that LUO has a reference to, by what identifies them.
        users: how many files, preserved or being so, each handler keeps: it stays that long.
    """

    def __init__(self, callbacks: Callbacks, flbs: FlbTable) -> None:
        self.kernel = callbacks.kernel
        self.callbacks = callbacks
        self.flbs = flbs
        self.handlers: list[FileHandler] = []
        self.held: dict[Hashable, PreservedFile] = {}
        self.users: Counter[FileHandler] = Counter()
        self._pinning = threading.Lock()

    def handler_of(self, file: Any, where: str) -> FileHandler | None:
        """Return the first handler that takes *file*, pinned; None if there is none."""
        for handler in tuple(self.handlers):
            if self.callbacks.ask(
                "CAN_PRESERVE", "file", handler.compatible, handler.can_preserve, file, where
            ):
                return handler if self.pin(handler) else None
        return None

    def pin(self, handler: FileHandler) -> bool:
        """Keep *handler* from being unregistered (``try_module_get()``); False if it was."""
        with self._pinning:
            there = handler in self.handlers
            self.users[handler] += there
            return there

    def unpin(self, handler: FileHandler) -> None:
        """Undo :meth:`pin`."""
        with self._pinning:
            self.users[handler] -= 1

    def remove(self, handler: FileHandler) -> bool:
        """Take *handler* out, unless it is pinned."""
        with self._pinning:
            if self.users[handler]:
                return False
            self.handlers.remove(handler)
            return True


class FileSet:
    """The files of one session, in the order in which they were preserved.

    Args:
        registry: of the kernel.
        session: name of the session.
    """

    def __init__(self, registry: Registry, session: str) -> None:
        self._registry = registry
        self._callbacks = registry.callbacks
        self._session = session
        self._files: dict[int, PreservedFile] = {}  # by token
        self._blocks: BlockSet | None = None  # of a session that is handed over
        self._incoming_head = 0  # of one that came over
        self._dirty = False  # whether the blocks lack records that were written once

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[PreservedFile]:
        return iter(tuple(self._files.values()))

    # ---- before the jump ----

    def preserve(self, file: Any, token: int) -> None:
        """Preserve *file*; see :meth:`luo.session.Session.preserve`."""
        where = f"{self._session}/{token:#x}"
        if token in self._files:
            raise from_errno(errno.EEXIST, f"preserve {where}: the session has this token")
        if self._blocks is None:
            self._blocks = BlockSet(
                self._registry.kernel.kho, abi.LUO_FILE_SER.size, f"session {self._session}"
            )
        self._blocks.grow(len(self._files) + 1)
        try:
            self._add(file, token, where)
        except BaseException as error:
            self._blocks.shrink(len(self._files))
            if isinstance(error, CallbackError):
                error.rolled_back = True
            raise

    def _add(self, given: Any, token: int, where: str) -> None:
        registry = self._registry
        assert self._blocks is not None
        file = _get(given, f"preserve {where}")
        try:
            handler = registry.handler_of(file, where)
            if handler is None:
                raise from_errno(errno.ENOENT, f"preserve {where}: no handler for such a file")
            entry = PreservedFile(FileArgs(registry.kernel, handler, self._session, token, file))
            try:
                self._claim(entry, where)
            except BaseException:
                registry.unpin(handler)
                raise
        except BaseException:
            _put(file)
            raise
        if not self._dirty:
            self._blocks.put(len(self._files), entry.record())
        self._files[token] = entry

    def _claim(self, entry: PreservedFile, where: str) -> None:
        """Save a file that nobody else has preserved."""
        held = self._registry.held
        entry.identity = _identity(entry.handler, entry.file, where)
        holder = held.setdefault(entry.identity, entry)
        if holder is not entry:
            raise from_errno(
                errno.EBUSY, f"preserve {where}: the file is preserved as {holder.args}"
            )
        try:
            self._save(entry, where)
        except BaseException:
            del held[entry.identity]
            raise

    def _save(self, entry: PreservedFile, where: str) -> None:
        handler, flbs = entry.handler, self._registry.flbs
        entry.flbs = flbs.preserve_for(handler, where)
        try:
            self._callbacks.call(
                "PRESERVE", "file", handler.compatible, handler.preserve, entry.args, where
            )
        except BaseException:
            with ToTheEnd(self._callbacks) as rest:
                flbs.unpreserve_for(entry.flbs, where, rest)
            raise

    def unpreserve(self) -> None:
        """Undo every preserve, the last first; nothing stops it."""
        flbs = self._registry.flbs
        with ToTheEnd(self._callbacks) as rest:
            for entry in reversed(tuple(self._files.values())):
                handler, where = entry.handler, str(entry.args)
                rest.call(
                    "UNPRESERVE", "file", handler.compatible, handler.unpreserve, entry.args, where
                )
                flbs.unpreserve_for(entry.flbs, where, rest)
                self._forget(entry)
                assert self._blocks is not None
                self._blocks.shrink(len(self._files))

    def _forget(self, entry: PreservedFile) -> None:
        """Drop LUO's reference to a file, and the entry itself."""
        if entry.identity is not None:
            del self._registry.held[entry.identity]
            _put(entry.file)
        del self._files[entry.token]
        self._registry.unpin(entry.handler)

    def let_go(self) -> None:
        """Drop LUO's references to all files: the kernel is gone, and nobody is called."""
        for entry in self._files.values():
            if entry.identity is not None:
                _put(entry.file)
        self._files.clear()

    # ---- the jump ----

    def freeze(self) -> None:
        """Call freeze of each file, in order, and have the blocks hold their records.

        Raises:
            CallbackError: of the first that failed; those before it have been unfrozen.
        """
        frozen: list[PreservedFile] = []
        try:
            for number, entry in enumerate(self._files.values()):
                handler = entry.handler
                if handler.freeze is not None:
                    self._freeze_one(entry, number)
                frozen.append(entry)
        except BaseException:
            self._unfreeze(frozen)
            raise
        if self._dirty and self._blocks is not None:
            self._blocks.write(b"".join(entry.record() for entry in self._files.values()))
            self._dirty = False

    def _freeze_one(self, entry: PreservedFile, number: int) -> None:
        handler, before = entry.handler, entry.data
        assert handler.freeze is not None
        try:
            self._callbacks.call(
                "FREEZE", "file", handler.compatible, handler.freeze, entry.args, str(entry.args)
            )
        except BaseException:
            entry.args.data = before
            raise
        if entry.data != before and not self._dirty:
            assert self._blocks is not None
            self._blocks.put(number, entry.record())

    def unfreeze(self) -> None:
        """Undo :meth:`freeze`, for all files."""
        self._unfreeze(self._files.values())

    def _unfreeze(self, entries: Iterable[PreservedFile]) -> None:
        with ToTheEnd(self._callbacks) as rest:
            for entry in entries:  # the first one first, as Linux does
                handler = entry.handler
                if handler.unfreeze is not None:
                    rest.call(
                        "UNFREEZE",
                        "file",
                        handler.compatible,
                        handler.unfreeze,
                        entry.args,
                        str(entry.args),
                    )
            if self._blocks is not None:
                self._blocks.clear()
                self._dirty = bool(self._files)

    @property
    def head(self) -> int:
        """Physical address of the first block of records; 0 without files."""
        return self._blocks.head if self._blocks is not None and self._files else 0

    # ---- the next kernel ----

    def load(self, head: int, count: int, incoming: Incoming) -> None:
        """Know the files that came over.

        Raises:
            HandoverError: a block breaks a rule, or there are not *count* files.
            KhoError: ENOENT if nobody here handles one of them.
        """
        self._incoming_head = head
        handlers = {handler.compatible.encode(): handler for handler in self._registry.handlers}
        if not head:
            if count:  # Linux warns, too, and goes on
                _log.warning("session %s: %d files, and no blocks", self._session, count)
            return
        records = incoming.read_blocks(head, abi.LUO_FILE_SER.size)
        try:
            self._load_records(records.tobytes(), count, handlers)
        except BaseException as error:
            for entry in self._files.values():
                self._registry.unpin(entry.handler)
            self._files.clear()
            if isinstance(error, LuoError):  # its blocks are freed, as in Linux
                self._incoming_head = 0
                incoming.restore_free_blocks(head)
            raise

    def _load_records(
        self, records: bytes, count: int, handlers: Mapping[bytes, FileHandler]
    ) -> None:
        for compatible, data, token in abi.LUO_FILE_SER.iter_unpack(records):
            # Linux lists a token that stands twice, and finds the first: the other is never asked
            # for. No kernel writes that, so it is a wrong handover here.
            if token in self._files:
                raise HandoverError(f"session {self._session}: token {token:#x} stands twice")
            name = compatible.split(b"\0", 1)[0]
            handler = handlers.get(name)
            if handler is None or not self._registry.pin(handler):
                raise from_errno(
                    errno.ENOENT,
                    f"session {self._session}: no handler {name.decode(errors='replace')!r}"
                    f" for file {token:#x}",
                )
            args = FileArgs(self._registry.kernel, handler, self._session, token, None, data)
            self._files[token] = PreservedFile(args)
        if len(self._files) != count:
            raise HandoverError(f"session {self._session}: {len(self._files)} files, not {count}")

    def retrieve(self, token: int) -> Any:
        """Return the file; see :meth:`luo.session.Session.retrieve`."""
        where = f"{self._session}/{token:#x}"
        entry = self._files.get(token)
        if entry is None:
            raise from_errno(errno.ENOENT, f"retrieve {where}: the session has no such token")
        if entry.retrieve_status < 0:
            code = -entry.retrieve_status
            raise from_errno(code, f"retrieve {where}: failed before, and is not tried again")
        if entry.retrieve_status == 0:
            self._retrieve(entry, where)
        return _get(entry.file, f"retrieve {where}")

    def _retrieve(self, entry: PreservedFile, where: str) -> None:
        handler, args = entry.handler, entry.args
        try:
            self._callbacks.call(
                "RETRIEVE", "file", handler.compatible, handler.retrieve, args, where
            )
            identity = self._retrieved_identity(handler, args, where)
        except BaseException as error:
            args.file = None  # whatever it has set
            if isinstance(error, KhoError):
                args.retrieve_status = -(error.errno or errno.EIO)
            raise
        if self._registry.held.setdefault(identity, entry) is not entry:
            _log.warning("retrieve %s: this very file is preserved already", where)
            identity = entry  # unlike any other's
            self._registry.held[identity] = entry
        entry.identity = identity
        args.retrieve_status = 1

    @staticmethod
    def _retrieved_identity(handler: FileHandler, args: FileArgs, where: str) -> Hashable:
        what = f"retrieve {where}: {handler.compatible}"
        if args.file is None:
            raise from_errno(errno.EIO, f"{what} has set no file")
        try:
            return _identity(handler, args.file, where)
        except OSError as error:
            if isinstance(error, KhoError):
                raise
            raise from_errno(
                error.errno or errno.EBADF, f"{what} has set descriptor {args.file}: {error}"
            ) from error

    def finish(self) -> None:
        """Free what came over; see :meth:`luo.session.Session.finish`."""
        for entry in self:
            handler = entry.handler
            if handler.can_finish is not None and not self._callbacks.ask(
                "CAN_FINISH",
                "file",
                handler.compatible,
                handler.can_finish,
                entry.args,
                str(entry.args),
            ):
                raise from_errno(
                    errno.EBUSY, f"finish {entry.args}: {handler.compatible} is not ready"
                )
        flbs = self._registry.flbs
        with ToTheEnd(self._callbacks) as rest:
            for entry in reversed(tuple(self._files.values())):
                handler, where = entry.handler, str(entry.args)
                rest.call("FINISH", "file", handler.compatible, handler.finish, entry.args, where)
                flbs.finish_for(handler, where, rest)
                self._forget(entry)
            if self._incoming_head:
                head, self._incoming_head = self._incoming_head, 0
                rest.run(lambda: self._registry.kernel.kho.incoming.restore_free_blocks(head))
