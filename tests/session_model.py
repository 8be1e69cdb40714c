"""Mainline's sessions said plainly: lists, dicts and numbers, and no engine code.

Written from ``spec/luo-mainline.md`` section 4 (numbers in comments) and the sources of Linux 7.3,
as an oracle for the engine. A :class:`Kernel` is told what happens and says what comes of it:
success or errno, every callback in order with its arguments, which pages LUO has, and their bytes.
Where the kernel cannot fail, as in a callback that returns nothing, it says what this engine
promises, and marks it "ours".
"""

from __future__ import annotations

import errno
import functools
import struct
import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# ---- sizes (4.5) ----

PAGE = 4096
HEAD = 16
SESSIONS_A_BLOCK = (PAGE - HEAD) // 80
FILES_A_BLOCK = (PAGE - HEAD) // 64
FLBS_MAX = (PAGE - HEAD) // 64
BLOCKS_MAX = 10_000
NAME_BYTES = 64
U64 = (1 << 64) - 1


# ---- what there is ----


class Immutable:
    """What a copy of a kernel shares with it."""

    def __deepcopy__(self, memo: dict) -> Immutable:
        return self


@dataclass(frozen=True)
class Thing(Immutable):
    """A file: its kind says who preserves it, its identity is what get_id says of it."""

    kind: str
    identity: Hashable
    number: int = 0  # two files of one identity are two things


@dataclass(frozen=True)
class Handler(Immutable):
    """A file handler: the kinds that it preserves, and which optional callbacks it has."""

    compatible: str
    kinds: frozenset[str]
    optional: frozenset[str] = frozenset()  # of freeze unfreeze can_finish get_id


class Call(NamedTuple):
    """A callback of a file handler and what it was given."""

    event: str
    compatible: str
    session: str | None
    token: int | None
    file: Any
    data: int
    private: Any
    status: int


class FlbCall(NamedTuple):
    """A callback of an FLB and what it was given."""

    event: str
    name: str
    data: int
    obj: Any


# ---- what goes wrong ----


@dataclass(frozen=True)
class Raises:
    """A callback raises: OSError of that errno, ValueError (None) or KeyboardInterrupt (^C)."""

    errno: int | None


INTERRUPT = Raises(-1)


@dataclass(frozen=True)
class Failure:
    """A callback that failed, and the errno that stands for it; :data:`INTERRUPT` has -1."""

    call: Call | FlbCall
    errno: int


class Refused(Exception):
    """An operation failed.

    Attributes:
        errno: as the kernel's, positive; -1 for ^C.
        failure: the callback, or None if LUO itself refused.
    """

    def __init__(self, code: int, failure: Failure | None = None) -> None:
        super().__init__(errno.errorcode.get(code, str(code)))
        self.errno = code
        self.failure = failure


class Panic(Exception):
    """The next kernel may not go on (4.1)."""


# ---- blocks (4.5) ----


@dataclass
class Blocks:
    """A chain of pages of records: what is in their heads, page by page."""

    capacity: int
    heads: list[int] = field(default_factory=list)

    def grow(self, records: int, most: int) -> None:
        """Have room for so many; all or nothing."""
        before = len(self.heads)
        while records > len(self.heads) * self.capacity:
            if len(self.heads) >= most:
                del self.heads[before:]
                raise Refused(errno.ENOSPC)
            self.heads.append(0)

    def shrink(self, records: int) -> None:
        """Give back the last pages that so many do not need."""
        while self.heads and records <= (len(self.heads) - 1) * self.capacity:
            self.heads.pop()

    def fill(self, records: int) -> None:
        """Count records in the heads, front to back; what is behind stays as it was."""
        for place in range(-(-records // self.capacity)):
            self.heads[place] = min(self.capacity, records - place * self.capacity)

    def clear(self) -> None:
        """Empty every page."""
        self.heads = [0] * len(self.heads)

    def pages(self, records: list[bytes], address: Callable[[int], int]) -> list[bytes]:
        """Return the bytes of each page; *address* says where the page of that number is."""
        made = []
        for place, count in enumerate(self.heads):
            following = address(place + 1) if place + 1 < len(self.heads) else 0
            body = b"".join(records[place * self.capacity : (place + 1) * self.capacity])
            made.append((struct.pack("<QQ", following, count) + body).ljust(PAGE, b"\0"))
        return made


# ---- sessions and files ----


@dataclass
class File:
    """A preserved file."""

    handler: Handler
    session: Session
    token: int
    file: Thing | None
    data: int = 0
    private: Any = None
    status: int = 0
    flbs: list[str] = field(default_factory=list)  # that it has a reference of

    def call(self, event: str) -> Call:
        """Return the call of *event*: what the kernel fills in of the arguments."""
        status = self.status if event in ("CAN_FINISH", "FINISH") else 0
        private = self.private if event in ("UNPRESERVE", "FREEZE", "UNFREEZE") else None
        return Call(
            event,
            self.handler.compatible,
            self.session.name,
            self.token,
            self.file,
            self.data,
            private,
            status,
        )


@dataclass(eq=False)
class Session:
    """A session, outgoing or incoming."""

    name: str
    incoming: bool = False
    retrieved: bool = False
    files: list[File] = field(default_factory=list)
    blocks: Blocks = field(default_factory=lambda: Blocks(FILES_A_BLOCK))


@dataclass
class Flb:
    """State of one FLB in one kernel."""

    count: int = 0  # outgoing
    data: int = 0
    obj: Any = None
    incoming_count: int = 0
    incoming_data: int = 0
    incoming_obj: Any = None
    status: int = 0
    finished: bool = False
    loaded: bool = False


@dataclass(frozen=True)
class Handed(Immutable):
    """What the next kernel finds.

    Attributes:
        number: of the live update.
        sessions: name and files of each, a file being (compatible, token, data).
        flbs: (name, data, count).
        session_pages, file_pages: blocks of the sessions, and of the files of each session.
        empty_block: a block without records is among those of the sessions (4.5).
    """

    number: int
    sessions: tuple[tuple[str, tuple[tuple[str, int, int], ...]], ...]
    flbs: tuple[tuple[str, int, int], ...]
    session_pages: int
    file_pages: tuple[int, ...]
    empty_block: bool = False


class Kernel:
    """LUO of one kernel.

    Attributes:
        faults: what the callbacks of the present operation do, by the number of the call: a number
            that they return, False of a question, or :class:`Raises`.
        calls: every call of the present operation.
        lost: callbacks of it that failed where the kernel cannot fail.
        descriptors: sessions that somebody has open, in order of opening.
    """

    def __init__(
        self,
        handed: Handed | None = None,
        *,
        enabled: bool = True,
        quirks: frozenset[str] = frozenset(),
        blocks_max: int = BLOCKS_MAX,
    ) -> None:
        if handed is not None and handed.empty_block:
            raise Panic("a block without records")  # 4.1, whether it is enabled or not
        self.enabled = enabled
        self.quirks = quirks
        self.blocks_max = blocks_max
        self.handed = handed
        self.number = handed.number if handed is not None else 0
        self.handlers: list[Handler] = []
        self.links: dict[str, list[str]] = {}  # FLBs of a handler, in order of registration
        self.registered: list[str] = []  # FLBs, in order of their first registration
        self.flbs: dict[str, Flb] = {}
        self.outgoing: list[Session] = []
        self.incoming: list[Session] = []
        self.blocks = Blocks(SESSIONS_A_BLOCK)
        self.identities: set[Hashable] = set()
        self.opened = False
        self.deserialised = False
        self.broken = False
        self.frozen = False
        self.calls: list[Call | FlbCall] = []
        self.faults: dict[int, Any] = {}
        self.lost: list[Failure] = []
        self.unread = [] if handed is None else [handed.session_pages, *handed.file_pages]
        if handed is not None and not enabled:
            self.unread.append(2)  # head and FLBs; ours: 7.3 frees the head
        self.descriptors: list[Session] = []

    # ---- calling ----

    def begin(self, faults: dict[int, Any] | None = None) -> None:
        """Begin an operation, whose n-th callback does ``faults[n]``."""
        self.calls, self.lost = [], []
        self.faults = faults or {}

    def _call(self, call: Call | FlbCall) -> Failure | None:
        """Make a call, and say whether it failed."""
        outcome = self.faults.get(len(self.calls))
        self.calls.append(call)
        if isinstance(outcome, Raises):
            return Failure(call, errno.EIO if outcome.errno is None else outcome.errno)
        if outcome and not isinstance(outcome, bool):
            return Failure(call, -outcome if outcome < 0 else errno.EINVAL)
        return None

    def _must(self, call: Call | FlbCall) -> None:
        """Make a call whose failure ends the operation."""
        failure = self._call(call)
        if failure is not None:
            raise Refused(failure.errno, failure)

    def _ask(self, call: Call) -> bool:
        """Ask a question; a failure is one of the operation."""
        outcome = self.faults.get(len(self.calls))
        self.calls.append(call)
        if isinstance(outcome, Raises):
            code = errno.EIO if outcome.errno is None else outcome.errno
            raise Refused(code, Failure(call, code))
        return outcome is not False

    def _tell(self, call: Call | FlbCall) -> None:
        """Make a call that returns nothing: the rest goes on whatever it does (ours)."""
        failure = self._call(call)
        if failure is not None:
            self.lost.append(failure)

    # ---- registration (4.4) ----

    def register_handler(self, handler: Handler) -> None:
        """Let *handler* preserve files."""
        if not self.enabled:
            raise Refused(errno.EOPNOTSUPP)
        if any(other.compatible == handler.compatible for other in self.handlers):
            raise Refused(errno.EEXIST)
        self.handlers.append(handler)
        self.links[handler.compatible] = []

    def unregister_handler(self, handler: Handler) -> None:
        """Take it and its links to FLBs out, unless it keeps a file: its module is pinned."""
        if handler not in self.handlers:
            raise Refused(errno.ENOENT)  # ours: the kernel has no such question
        sessions = (*self.outgoing, *self.incoming)
        if any(file.handler == handler for session in sessions for file in session.files):
            raise Refused(errno.EBUSY)
        for name in self.links.pop(handler.compatible):
            self._unlink(name)
        self.handlers.remove(handler)

    def register_flb(self, handler: Handler, name: str) -> None:
        """Let files of *handler* depend on an FLB."""
        if not self.enabled:
            raise Refused(errno.EOPNOTSUPP)
        if handler not in self.handlers:
            raise Refused(errno.EINVAL)
        if name in self.links[handler.compatible]:
            raise Refused(errno.EEXIST)
        if name not in self.registered:
            if len(self.registered) == FLBS_MAX:
                raise Refused(errno.ENOSPC)
            self.registered.append(name)
            self.flbs.setdefault(name, Flb())
        self.links[handler.compatible].append(name)

    def unregister_flb(self, handler: Handler, name: str) -> None:
        """Take the link out; the last one takes the FLB out. None is only logged."""
        if name in self.links.get(handler.compatible, ()):
            self.links[handler.compatible].remove(name)
            self._unlink(name)

    def _unlink(self, name: str) -> None:
        if not any(name in names for names in self.links.values()):
            self.registered.remove(name)

    # ---- the node (4.1, 4.2) ----

    def open(self) -> None:
        """Open the node, exclusively; the first time reads what came over."""
        if not self.enabled:
            raise Refused(errno.ENODEV)  # there is no node
        if self.opened:
            raise Refused(errno.EBUSY)
        if not self.deserialised:
            self.deserialised = True
            if self.handed is not None:
                self.broken = not self._deserialise(self.handed)
        if self.broken:
            raise Refused(errno.EIO)
        self.opened = True

    def close_node(self) -> None:
        """Let the next one open it."""
        self.opened = False

    def _deserialise(self, handed: Handed) -> bool:
        """Make the incoming sessions; what was made before a failure stays, and is lost."""
        self.unread[0] = 0
        for number, (name, files) in enumerate(handed.sessions):
            if any(session.name == name for session in self.incoming):
                return False
            session = Session(name, incoming=True)
            self.incoming.append(session)
            for compatible, token, data in files:
                handler = next((h for h in self.handlers if h.compatible == compatible), None)
                if handler is None:
                    session.files = []
                    self.unread[1 + number] = 0
                    return False
                session.files.append(File(handler, session, token, None, data))
            session.blocks.heads = [0] * self.unread[1 + number]
            self.unread[1 + number] = 0
        return True

    def create_session(self, name: str) -> Session:
        """CREATE_SESSION."""
        if not 1 <= len(name.encode()) < NAME_BYTES:
            raise Refused(errno.EINVAL)
        self.blocks.grow(len(self.outgoing) + 1, self.blocks_max)
        if any(session.name == name for session in self.outgoing):
            if "sessions-empty-block" not in self.quirks:
                self.blocks.shrink(len(self.outgoing))
            raise Refused(errno.EEXIST)
        session = Session(name)
        self.outgoing.append(session)
        self.descriptors.append(session)
        return session

    def retrieve_session(self, name: str) -> Session:
        """RETRIEVE_SESSION."""
        session = next((session for session in self.incoming if session.name == name), None)
        if session is None:
            raise Refused(errno.ENOENT)
        if session.retrieved:
            raise Refused(errno.EINVAL)
        session.retrieved = True
        self.descriptors.append(session)
        return session

    # ---- outgoing sessions (4.2) ----

    def preserve(self, session: Session, file: Thing, token: int) -> None:
        """PRESERVE_FD."""
        if session.incoming:
            raise Refused(errno.EINVAL)
        if any(other.token == token for other in session.files):
            raise Refused(errno.EEXIST)
        session.blocks.grow(len(session.files) + 1, self.blocks_max)
        undo: list[Callable[[], None]] = [lambda: session.blocks.shrink(len(session.files))]
        try:
            handler = self._handler_of(file)
            identity = self.identity(handler, file)
            if identity in self.identities:
                raise Refused(errno.EBUSY)
            self.identities.add(identity)
            undo.append(lambda: self.identities.remove(identity))
            names = tuple(self.links[handler.compatible])
            self._preserve_flbs(names)
            undo.append(lambda: self._unpreserve_flbs(names))
            new = File(handler, session, token, file, flbs=[*names])
            call = new.call("PRESERVE")
            self._must(call)
            new.data, new.private = answer_data(call), answer_private(call)
            session.files.append(new)
        except Refused:
            for step in reversed(undo):
                step()
            raise

    def _handler_of(self, file: Thing) -> Handler:
        """The first handler in order of registration that says yes."""
        for handler in self.handlers:
            call = Call("CAN_PRESERVE", handler.compatible, None, None, file, 0, None, 0)
            if self._ask(call) and file.kind in handler.kinds:
                return handler
        raise Refused(errno.ENOENT)

    def identity(self, handler: Handler, file: Thing) -> Hashable:
        """What two files must not share."""
        return file.identity if "get_id" in handler.optional else file

    def _unpreserve(self, session: Session) -> None:
        """Close an outgoing session: all of it backwards."""
        while session.files:
            file = session.files[-1]
            self._tell(file.call("UNPRESERVE"))
            self._unpreserve_flbs(file.flbs)
            self.identities.discard(self.identity(file.handler, file.file))
            session.files.pop()
            session.blocks.shrink(len(session.files))
        session.blocks.heads = []

    # ---- incoming sessions (4.2) ----

    def retrieve(self, session: Session, token: int) -> Thing:
        """RETRIEVE_FD."""
        if not session.incoming:
            raise Refused(errno.EINVAL)
        file = next((file for file in session.files if file.token == token), None)
        if file is None:
            raise Refused(errno.ENOENT)
        if file.status < 0:
            raise Refused(-file.status)
        if file.status == 0:
            call = file.call("RETRIEVE")
            failure = self._call(call)
            if failure is not None:
                file.status = -failure.errno if failure.errno > 0 else 0
                raise Refused(failure.errno, failure)
            file.file, file.status = answer_file(call), 1
            self.identities.add(self.identity(file.handler, file.file))
        return file.file

    def finish(self, session: Session) -> None:
        """FINISH: all agree, then backwards."""
        if not session.incoming:
            raise Refused(errno.EINVAL)
        for file in session.files:
            if "can_finish" in file.handler.optional and not self._ask(file.call("CAN_FINISH")):
                raise Refused(errno.EBUSY)
        while session.files:
            file = session.files[-1]
            self._tell(file.call("FINISH"))
            for name in reversed(self.links.get(file.handler.compatible, [])):
                self.put_incoming(name)
            if file.file is not None:
                self.identities.discard(self.identity(file.handler, file.file))
            session.files.pop()
            session.blocks.shrink(len(session.files))
        session.blocks.heads = []

    def close(self, session: Session) -> None:
        """Close the descriptor: unpreserves, or finishes; a refusal leaves it stuck."""
        if session.incoming:
            try:
                self.finish(session)
            except Refused as refused:
                if refused.errno > 0:  # ours: after ^C it may be closed again
                    self.descriptors.remove(session)
                raise
            self.descriptors.remove(session)
            self.incoming.remove(session)
        else:
            self.descriptors.remove(session)
            self._unpreserve(session)
            self.outgoing.remove(session)
            self.blocks.shrink(len(self.outgoing))

    # ---- FLBs (4.4) ----

    def _preserve_flbs(self, names: tuple[str, ...]) -> None:
        for place, name in enumerate(names):
            flb = self.flbs[name]
            if not flb.count:
                call = FlbCall("PRESERVE", name, 0, None)
                failure = self._call(call)
                if failure is not None:
                    self._unpreserve_flbs(names[:place])
                    raise Refused(failure.errno, failure)
                flb.data, flb.obj = answer_data(call), answer_private(call)
            flb.count += 1

    def _unpreserve_flbs(self, names: tuple[str, ...] | list[str]) -> None:
        for name in reversed(names):
            self.put_outgoing(name)

    def get_outgoing(self, name: str) -> Any:
        """A reference of the live object, which is there once a file depends on it."""
        if not self.enabled:
            raise Refused(errno.EOPNOTSUPP)
        flb = self.flbs.get(name)
        if flb is None or flb.obj is None:
            raise Refused(errno.ENOENT)
        flb.count += 1
        return flb.obj

    def put_outgoing(self, name: str) -> None:
        """Drop a reference; the last one unpreserves."""
        flb = self.flbs[name]
        flb.count -= 1
        if not flb.count:
            self._tell(FlbCall("UNPRESERVE", name, flb.data, flb.obj))
            flb.data, flb.obj = 0, None

    def _load(self, name: str, flb: Flb) -> int:
        """Read count and data of what came over; returns 0 or an errno."""
        if self.handed is None:
            return errno.ENODATA
        found = [(data, count) for other, data, count in self.handed.flbs if other == name]
        if not found:
            return errno.ENOENT
        flb.incoming_data, flb.incoming_count = found[0]
        flb.loaded = True
        return 0

    def _retrieve_flb(self, name: str, flb: Flb) -> None:
        """Have the live object, or raise why not."""
        if flb.finished:
            raise Refused(errno.ENODATA)
        if flb.status < 0:
            raise Refused(-flb.status)
        if flb.status:
            return
        if not flb.loaded or "flb-finish-uncounted" in self.quirks:
            code = self._load(name, flb)
            if code:
                raise Refused(code)
        call = FlbCall("RETRIEVE", name, flb.incoming_data, None)
        failure = self._call(call)
        if failure is not None:
            flb.status = -failure.errno if failure.errno > 0 else 0  # ^C is not remembered: ours
            raise Refused(failure.errno, failure)
        flb.incoming_obj, flb.status = answer_private(call), 1

    def get_incoming(self, name: str) -> Any:
        """A reference of the object that came over, which is retrieved the first time."""
        if not self.enabled:
            raise Refused(errno.EOPNOTSUPP)
        flb = self.flbs.setdefault(name, Flb())
        if flb.incoming_obj is None:
            self._retrieve_flb(name, flb)
        flb.incoming_count += 1
        return flb.incoming_obj

    def put_incoming(self, name: str) -> None:
        """Drop a reference; the last one retrieves, if nobody did, and finishes."""
        flb = self.flbs[name]
        if "flb-finish-uncounted" in self.quirks:
            if flb.incoming_count != 1:  # 0 warns, and saturates far below
                flb.incoming_count = (
                    flb.incoming_count - 1 if flb.incoming_count > 0 else -(1 << 30)
                )
                return
            flb.incoming_count = 0
        else:  # ours: what the code means
            if flb.finished or (not flb.loaded and self._load(name, flb)):
                return
            if not flb.incoming_count:
                return
            flb.incoming_count -= 1
            if flb.incoming_count:
                return
        if flb.status <= 0:
            try:
                self._retrieve_flb(name, flb)
            except Refused as refused:
                if refused.failure is not None:
                    self.lost.append(refused.failure)
                return
        # ours: 7.3 gives it the object alone
        self._tell(FlbCall("FINISH", name, flb.incoming_data, flb.incoming_obj))
        flb.incoming_data, flb.incoming_obj, flb.finished = 0, None, True

    # ---- reboot (4.3) ----

    def freeze(self) -> None:
        """The part of kernel_kexec() that is LUO's."""
        if not self.enabled:
            return
        for place, session in enumerate(self.outgoing):
            try:
                self._freeze(session)
            except Refused:
                self._unfreeze(self.outgoing[:place])
                raise
            self.blocks.fill(place + 1)
        self.frozen = True

    def _freeze(self, session: Session) -> None:
        for place, file in enumerate(session.files):
            if "freeze" in file.handler.optional:
                call = file.call("FREEZE")
                try:
                    self._must(call)
                except Refused:
                    self._unfreeze_files(session.files[:place])
                    session.blocks.clear()
                    raise
                file.data = answer_data(call)
        session.blocks.fill(len(session.files))

    def _unfreeze_files(self, files: list[File]) -> None:
        for file in files:
            if "unfreeze" in file.handler.optional:
                self._tell(file.call("UNFREEZE"))

    def _unfreeze(self, sessions: list[Session]) -> None:
        for session in reversed(sessions):
            self._unfreeze_files(session.files)
            session.blocks.clear()

    def unfreeze(self) -> None:
        """All was frozen, and there was no jump: as if one more session had failed (ours)."""
        self._unfreeze(self.outgoing)
        self.frozen = False

    def hand_over(self) -> Handed:
        """What the next kernel finds of a frozen one."""
        heads = self.blocks.heads
        return Handed(
            self.number + 1,
            tuple(
                (s.name, tuple((f.handler.compatible, f.token, f.data) for f in s.files))
                for s in self.outgoing
            ),
            tuple(self._flb_records()),
            len(heads) if self.outgoing else 0,
            tuple(len(session.blocks.heads) for session in self.outgoing),
            bool(self.outgoing) and 0 in heads,
        )

    def _flb_records(self) -> list[tuple[str, int, int]]:
        flbs = [(name, self.flbs[name]) for name in self.registered]
        return [(name, flb.data, flb.count) for name, flb in flbs if flb.count > 0]

    # ---- memory (4.5) ----

    @property
    def outgoing_pages(self) -> int:
        """Pages that LUO has preserved: its head, the FLBs', and blocks."""
        if not self.enabled:
            return 0
        blocks = [self.blocks, *(session.blocks for session in self.outgoing)]
        return 2 + sum(len(each.heads) for each in blocks)

    @property
    def incoming_pages(self) -> int:
        """Blocks that came over and are not free yet."""
        return sum(self.unread) + sum(len(session.blocks.heads) for session in self.incoming)

    def serialise(self, address: Callable[[tuple], int]) -> dict[tuple, bytes]:
        """Return the bytes of each page of a frozen kernel, by name.

        Args:
            address: says where the page called ("head",), ("flbs",), ("session", number) or
                ("file", name of the session, number) is.
        """
        first = address(("session", 0)) if self.outgoing else 0
        head = struct.pack("<8sQQQ", b"luo-v5", self.number + 1, first, address(("flbs",)))
        flbs = self._flb_records()
        page = struct.pack("<QQ", 1, len(flbs))
        page += b"".join(struct.pack("<48sQQ", n.encode(), *rest) for n, *rest in flbs)
        made = {("head",): head, ("flbs",): page.ljust(PAGE, b"\0")}
        records = []
        for session in self.outgoing:
            files = session.files
            start = address(("file", session.name, 0)) if files else 0
            records.append(struct.pack("<64sQQ", session.name.encode(), start, len(files)))
            pages = session.blocks.pages(
                [
                    struct.pack("<48sQQ", file.handler.compatible.encode(), file.data, file.token)
                    for file in files
                ],
                lambda place, name=session.name: address(("file", name, place)),
            )
            made |= {("file", session.name, place): page for place, page in enumerate(pages)}
        pages = self.blocks.pages(records, lambda place: address(("session", place)))
        return made | {("session", place): page for place, page in enumerate(pages)}


# ---- what callbacks answer, in the model and in the engine ----


def answer_data(call: Call | FlbCall) -> int:
    """The u64 that PRESERVE and FREEZE leave; FREEZE keeps every other as it was."""
    if call.event == "FREEZE" and call.data % 2:
        return call.data
    seed = zlib.crc32(repr([part for part in call if not isinstance(part, Thing)]).encode())
    return (seed * 0x9E3779B97F4A7C15) & U64


def answer_private(call: Call | FlbCall) -> Any:
    """What PRESERVE and an FLB's RETRIEVE keep beside it; some FLBs have no object."""
    if isinstance(call, FlbCall):
        return None if call.name.endswith("none") else (call.event, call.name, call.data)
    return call.session, call.token


@functools.cache
def answer_file(call: Call) -> Thing:
    """The file that RETRIEVE makes."""
    return Thing(call.compatible.partition("-")[0], ("back", call.session, call.token, call.data))
