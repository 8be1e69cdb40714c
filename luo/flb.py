"""File-lifecycle-bound objects: state of many files together, kept while one of them is.

Mirrors ``kernel/liveupdate/luo_flb.c`` of Linux 7.3 (luo-mainline 4.4). An FLB belongs to one file
handler or several. It is preserved before the first dependent file and unpreserved after the last;
in the next kernel it is retrieved when somebody first asks for it, and finished after the last.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luo import abi
from luo.errors import CallbackError, from_errno
from luo.files import Callbacks, FileHandler, ToTheEnd, name_field
from luo.notifier import Carrier

if TYPE_CHECKING:
    pass

__all__ = ["Flb", "FlbArgs", "FlbRecord", "FlbTable"]

_log = logging.getLogger(__name__)

#: Linux 7.3 counts the files that depend on an FLB down before it has read how many there are.
UNCOUNTED = "flb-finish-uncounted"


@dataclass(frozen=True, eq=False)
class Flb:
    """A file-lifecycle-bound object: ``struct liveupdate_flb`` and its operations.

    Callbacks take :class:`FlbArgs`; those that may fail return None or 0, or a negative errno; or
    raise ``OSError``.

    Args:
        name: unique in a kernel, 1 to 47 bytes; what the next kernel knows it by.
        preserve: makes ``args.obj``, and sets ``args.data``, the number that is handed over.
        unpreserve: undoes it.
        retrieve: in the next kernel: makes ``args.obj`` from ``args.data``.
        finish: frees what was handed over.
    """

    name: str
    preserve: Callable[[FlbArgs], int | None]
    unpreserve: Callable[[FlbArgs], int | None]
    retrieve: Callable[[FlbArgs], int | None]
    finish: Callable[[FlbArgs], int | None]

    def __post_init__(self) -> None:
        name_field(self.name, 48, "FLB")
        for name in ("preserve", "unpreserve", "retrieve", "finish"):
            if not callable(getattr(self, name)):
                raise from_errno(
                    errno.EINVAL, f"FLB {self.name}: {name} is {getattr(self, name)!r}"
                )


class FlbArgs(Carrier):
    """What a callback of an FLB is given.

    Attributes:
        flb: whose callback it is.
        obj: the live object.
    """

    __slots__ = ("flb", "obj")

    def __init__(self, kernel: Any, flb: Flb) -> None:
        super().__init__(kernel)
        self.flb = flb
        self.obj: Any = None


@dataclass(frozen=True, slots=True)
class FlbRecord:
    """An FLB as it came over: ``struct luo_flb_ser``."""

    name: bytes
    data: int
    count: int


class _Side:
    """One direction of an FLB: how many hold it, and what its callbacks are given."""

    __slots__ = ("args", "count", "finished", "status")

    def __init__(self, kernel: Any, flb: Flb) -> None:
        self.args = FlbArgs(kernel, flb)
        self.count: int | None = None  # incoming: None until the record has been read
        self.status = 0  # incoming: as FileArgs.retrieve_status
        self.finished = False


class FlbTable:
    """The FLBs of one kernel.

    Args:
        callbacks: who calls.
        uncounted: whether it does as Linux 7.3, see :data:`UNCOUNTED`.

    Attributes:
        records: what came over, by name; None: nothing did.
        lock: on all of it, and on who is registered (``luo_register_rwlock``); held while a
            callback of an FLB runs, which may come back.
    """

    def __init__(self, callbacks: Callbacks, uncounted: bool = False) -> None:
        self._callbacks = callbacks
        self._uncounted = uncounted
        self._links: dict[FileHandler, list[Flb]] = {}
        self._users: dict[Flb, int] = {}  # registered: by how many handlers, in order
        self._out: dict[Flb, _Side] = {}
        self._in: dict[Flb, _Side] = {}
        self.records: dict[bytes, FlbRecord] | None = None  # None: nothing came over
        # Sessions are used by several threads; a handler's callback may ask for an FLB.
        self.lock = threading.RLock()

    # ---- who depends on whom ----

    def register(self, handler: FileHandler, flb: Flb) -> None:
        """Have files of *handler* depend on *flb*; see ``LiveUpdate.register_flb``."""
        links = self._links.setdefault(handler, [])
        what = f"FLB {flb.name} for {handler.compatible}"
        if flb in links:
            raise from_errno(errno.EEXIST, f"{what}: is registered")
        if flb not in self._users:
            if len(self._users) >= abi.LUO_FLBS_MAX:
                raise from_errno(errno.ENOSPC, f"{what}: there are {abi.LUO_FLBS_MAX} already")
            if any(known.name == flb.name for known in self._users):
                raise from_errno(errno.EEXIST, f"{what}: another has the name")
        self._users[flb] = self._users.get(flb, 0) + 1
        links.append(flb)

    def unregister(self, handler: FileHandler, flb: Flb) -> None:
        """Undo :meth:`register`; a link that is not there is logged."""
        links = self._links.get(handler, [])
        if flb not in links:
            _log.warning("FLB %s: is not registered for %s", flb.name, handler.compatible)
            return
        links.remove(flb)
        self._users[flb] -= 1
        if not self._users[flb]:
            del self._users[flb]

    def unregister_all(self, handler: FileHandler) -> None:
        """Undo every :meth:`register` of *handler*."""
        for flb in tuple(self._links.get(handler, ())):
            self.unregister(handler, flb)

    # ---- before the jump ----

    def preserve_for(self, handler: FileHandler, where: str) -> tuple[Flb, ...]:
        """Count a file of *handler*; what it depends on first is preserved.

        Returns:
            what it depends on, for :meth:`unpreserve_for`: Linux 7.3 asks again then, and is wrong
            if something was registered in between.

        Raises:
            CallbackError: one failed; those before it are counted down again.
        """
        with self.lock:
            done: list[Flb] = []
            try:
                for flb in tuple(self._links.get(handler, ())):
                    self._preserve(flb, where)
                    done.append(flb)
            except BaseException:
                with ToTheEnd(self._callbacks) as rest:
                    for flb in reversed(done):
                        self.put_outgoing(flb, where, rest)
                raise
            return tuple(done)

    def _preserve(self, flb: Flb, where: str) -> None:
        side = self._out.get(flb)
        if side is None:
            side = _Side(self._callbacks.kernel, flb)
            self._callbacks.call("PRESERVE", "flb", flb.name, flb.preserve, side.args, where)
            side.count = 0
            self._out[flb] = side
        side.count = (side.count or 0) + 1

    def unpreserve_for(self, flbs: tuple[Flb, ...], where: str, rest: ToTheEnd) -> None:
        """Count a file down that depends on *flbs*; what nobody needs any more is unpreserved."""
        with self.lock:
            for flb in reversed(flbs):
                self.put_outgoing(flb, where, rest)

    def get_outgoing(self, flb: Flb) -> Any:
        """Return the live object of *flb* and hold it; see ``LiveUpdate.flb_get_outgoing``."""
        with self.lock:
            side = self._out.get(flb)
            if side is None or side.args.obj is None:
                raise from_errno(errno.ENOENT, f"FLB {flb.name}: no file depends on it")
            side.count = (side.count or 0) + 1
            return side.args.obj

    def put_outgoing(self, flb: Flb, where: str, rest: ToTheEnd) -> None:
        """Count *flb* down; the last one unpreserves it."""
        with self.lock:
            side = self._out.get(flb)
            if side is None or side.count is None:
                _log.warning("FLB %s: put, and nobody holds it", flb.name)
                return
            side.count -= 1
            if not side.count:
                del self._out[flb]
                rest.call("UNPRESERVE", "flb", flb.name, flb.unpreserve, side.args, where)

    def page(self, nbytes: int) -> bytes:
        """Return the page of FLBs that is handed over."""
        held = [(flb, self._out[flb]) for flb in self._users if flb in self._out]
        parts = [abi.LUO_FLBS_SER.pack(1, len(held))]
        parts += [
            abi.LUO_FLB_SER.pack(flb.name.encode(), side.args.data, side.count or 0)
            for flb, side in held
        ]
        return b"".join(parts).ljust(nbytes, b"\0")

    # ---- the next kernel ----

    def load(self, records: Iterable[FlbRecord] | None) -> None:
        """Know the FLBs that came over; None: there is no page of them."""
        if records is not None:
            self.records = {}
            for record in records:
                self.records.setdefault(record.name, record)

    def get_incoming(self, flb: Flb) -> Any:
        """Return the object that came over and hold it; see ``LiveUpdate.flb_get_incoming``."""
        with self.lock:
            side = self._in.setdefault(flb, _Side(self._callbacks.kernel, flb))
            if side.args.obj is None:
                self._retrieve(flb, side)
            side.count = (side.count or 0) + 1
            return side.args.obj

    def _retrieve(self, flb: Flb, side: _Side) -> None:
        what = f"FLB {flb.name}"
        if side.finished:
            raise from_errno(errno.ENODATA, f"{what}: has been finished")
        if side.status < 0:
            raise from_errno(-side.status, f"{what}: failed before, and is not tried again")
        if side.status > 0:
            return
        self._count(flb, side)
        try:
            self._callbacks.call("RETRIEVE", "flb", flb.name, flb.retrieve, side.args, flb.name)
        except BaseException as error:
            side.args.obj = None  # whatever it has set
            if isinstance(error, CallbackError):
                side.status = -(error.errno or errno.EIO)
            raise
        side.status = 1

    def _count(self, flb: Flb, side: _Side) -> None:
        """Read how many files depend on *flb*, unless that has been done."""
        if self.records is None:
            raise from_errno(errno.ENODATA, f"FLB {flb.name}: none came over")
        record = self.records.get(flb.name.encode())
        if record is None:
            raise from_errno(errno.ENOENT, f"FLB {flb.name}: did not come over")
        if side.count is None:
            side.args.data = record.data
            side.count = record.count

    def finish_for(self, handler: FileHandler, where: str, rest: ToTheEnd) -> None:
        """Count a file of *handler* down; what nobody depends on any more is finished."""
        with self.lock:
            for flb in reversed(tuple(self._links.get(handler, ()))):
                self.put_incoming(flb, where, rest)

    def put_incoming(self, flb: Flb, where: str, rest: ToTheEnd) -> None:
        """Count *flb* down; the last one finishes it."""
        with self.lock:
            side = self._in.setdefault(flb, _Side(self._callbacks.kernel, flb))
            if side.count is None and not self._uncounted:
                rest.run(lambda: self._count(flb, side))
            if not side.count:
                _log.warning("FLB %s: counted below 0 by %s, it is not finished", flb.name, where)
                return
            side.count -= 1
            if side.count:
                return
            if not side.status:
                rest.run(lambda: self._retrieve(flb, side))
            if side.status <= 0:
                return
            rest.call("FINISH", "flb", flb.name, flb.finish, side.args, where)
            side.args.data, side.args.obj, side.finished = 0, None, True
