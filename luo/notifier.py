"""Subsystems and the chain that calls them: states, events, priorities, steps.

Mirrors the notifier chain of RFC v1's ``kernel/liveupdate.c`` in its intended order: lower
priority first for PREPARE and REBOOT, the exact reverse for CANCEL, FINISH and RESTORE.
"""

from __future__ import annotations

import errno
import operator
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from luo.errors import CallbackError, StateError, errno_name, from_errno

if TYPE_CHECKING:
    from luo._kho import CallRecorder
    from luo.incoming import Incoming
    from luo.kho import Kho
    from luo.memory import PhysicalMemory

__all__ = [
    "Carrier",
    "Context",
    "Event",
    "NotifierChain",
    "Participant",
    "Priority",
    "State",
    "Step",
    "Subsystem",
    "callback_error",
]


class State(IntEnum):
    """Where a kernel is in a live update (RFC v1 1.1)."""

    NORMAL = 0
    PREPARED = 1
    UPDATED = 2


class Event(IntEnum):
    """What the chain is called for (RFC v1 1.1)."""

    PREPARE = 0
    REBOOT = 1
    FINISH = 2
    CANCEL = 3


#: The name under which restore callbacks are timed and reported; the chain has no such event,
#: RFC v1 left the new kernel's side to its list of things to do.
RESTORE: Final = "RESTORE"

#: Events in which the chain runs against the order of PREPARE, and failures are collected.
BACKWARDS: Final = frozenset({Event.FINISH.name, Event.CANCEL.name, RESTORE})


class Priority(IntEnum):
    """Place in the chain relative to the devices."""

    BEFORE_DEVICES = 0
    WITH_DEVICES = 1
    AFTER_DEVICES = 2


class Mortal:
    """An object of one kernel; once that is gone, any use is ``StateError(ESHUTDOWN)``."""

    def close(self) -> None:
        """Drop everything this object holds: its kernel is gone."""
        self.__dict__.clear()
        self.__dict__["gone"] = True

    def __getattr__(self, name: str) -> Any:
        # Only reached when the instance has no such attribute.
        if name == "gone":
            return False
        if not self.gone or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise StateError(errno.ESHUTDOWN, f"{type(self).__name__}.{name}: this kernel is gone")


# ---- what a subsystem is and is given ----


SubsystemCallback = Callable[["Context"], "int | None"]


@dataclass(frozen=True, slots=True)
class Subsystem:
    """A part of the kernel that takes part in live updates.

    Args:
        name: unique in a kernel; a node of LUO's tree carries it over, so no ``/`` or NUL and
            at most 63 bytes.
        priority: place in the chain; equal priorities run in the order of registration.
        prepare, reboot, finish, cancel, restore: each takes a :class:`Context`, and returns
            None or 0, or a negative errno; or raises.
    """

    name: str
    priority: Priority = field(default=Priority.WITH_DEVICES, kw_only=True)
    prepare: SubsystemCallback | None = field(default=None, kw_only=True)
    reboot: SubsystemCallback | None = field(default=None, kw_only=True)
    finish: SubsystemCallback | None = field(default=None, kw_only=True)
    cancel: SubsystemCallback | None = field(default=None, kw_only=True)
    restore: SubsystemCallback | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"subsystem name {self.name!r}: not a str")
        encoded = self.name.encode()
        if not encoded or len(encoded) > 63 or b"/" in encoded or b"\0" in encoded:
            raise ValueError(f"subsystem name {self.name!r}: 1 to 63 bytes without '/' and NUL")
        for event in ("prepare", "reboot", "finish", "cancel", "restore"):
            callback = getattr(self, event)
            if callback is not None and not callable(callback):
                raise TypeError(f"subsystem {self.name}: {event} {callback!r} is not callable")
        object.__setattr__(self, "priority", Priority(self.priority))


class Carrier:
    """What a callback is given that has a number to hand over.

    Attributes:
        kernel: the kernel that calls.
    """

    __slots__ = ("_data", "kernel")

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._data = 0

    @property
    def kho(self) -> Kho:
        """The kernel's Kexec HandOver."""
        kho: Kho = self.kernel.kho
        return kho

    @property
    def incoming(self) -> Incoming:
        """What the kernel before handed over, in one that came to run by kexec."""
        incoming: Incoming = self.kernel.kho.incoming
        return incoming

    @property
    def memory(self) -> PhysicalMemory:
        """The machine's memory."""
        memory: PhysicalMemory = self.kernel.memory
        return memory

    @property
    def data(self) -> int:
        """One u64 of the callee's own that LUO carries over: mostly a physical address.

        Set before the jump, read in the new kernel.
        """
        return self._data

    @data.setter
    def data(self, value: int) -> None:
        number = operator.index(value)
        if not 0 <= number < 1 << 64:
            raise OverflowError(f"data {number}: not an unsigned 64-bit number")
        self._data = number


class Context(Carrier):
    """What a subsystem's callback is given.

    Attributes:
        event: name of the event: ``"PREPARE"`` … ``"CANCEL"``, or ``"RESTORE"``.
    """

    __slots__ = ("event",)

    def __init__(self, kernel: Any) -> None:
        super().__init__(kernel)
        self.event = ""


# ---- one callback ----


class Step:
    """One callback of an event, about to be called.

    Attributes:
        kind: ``"subsystem"``, ``"driver"`` or ``"bus"``; ``"devices"`` for work on many devices
            at once, which only the bulk form has; ``"barrier"`` for none, between steps that may
            overlap and those that wait for them.
        name: of the subsystem, driver or bus.
        device: the device, or None.
        devices: how many devices it serves.
    """

    __slots__ = ("_call", "_fail", "device", "devices", "done", "kind", "name")

    def __init__(
        self,
        kind: str,
        name: str,
        call: Callable[[], None],
        device: Any = None,
        devices: int = 0,
    ) -> None:
        self.kind = kind
        self.name = name
        self.device = device
        self.devices = devices
        self.done = False
        self._call = call
        self._fail: Callable[[BaseException], bool] | None = None  # True: no failure after all

    def run(self) -> None:
        """Call it.

        Raises:
            CallbackError: it failed; by then everything has been rolled back.
            StateError: EALREADY if it was called before, or the event has ended.
        """
        if self.done:
            raise StateError(errno.EALREADY, f"step {self!r}: has been run")
        self.done = True
        try:
            self._call()
        except BaseException as error:
            if self._fail is None or not self._fail(error):
                raise

    def __repr__(self) -> str:
        where = f" {self.device.path}" if self.device is not None else ""
        return f"<Step {self.kind} {self.name}{where}>"

    @classmethod
    def barrier(cls) -> Step:
        """Return a step that calls nobody: those before it are over before those behind begin."""
        return cls("barrier", "", lambda: None)


_HERE: Final = str(Path(__file__).parent)
_STDLIB: Final = sysconfig.get_path("stdlib")


def _is_users(filename: str) -> bool:
    """Whether code in *filename* is neither ours nor Python's own."""
    if filename.startswith((_HERE, "<")):
        return False
    return not filename.startswith(_STDLIB) or "site-packages" in filename


def _location(callback: object, error: BaseException | None) -> tuple[str | None, int | None]:
    """Return file and line of the user's code that failed: where it raised, else where it is."""
    if error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if _is_users(frame.filename):
                return frame.filename, frame.lineno
    function = getattr(callback, "function", callback)
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return (None, None) if code is None else (code.co_filename, code.co_firstlineno)


def callback_error(
    outcome: object,
    *,
    event: str,
    kind: str,
    name: str,
    callback: object,
    device: str | None = None,
) -> CallbackError:
    """Build the error of a callback from its outcome: what it raised, or what it returned.

    ``OSError`` keeps its errno, any other exception is EIO with the exception as cause, a
    negative number is an errno, and everything else is EINVAL.
    """
    returned = None
    cause = outcome if isinstance(outcome, BaseException) else None
    if isinstance(outcome, OSError) and outcome.errno:
        code, why = outcome.errno, f"{type(outcome).__name__}: {outcome}"
    elif cause is not None:
        code, why = errno.EIO, f"{type(cause).__name__}: {cause}"
    else:
        try:
            returned = operator.index(outcome)  # type: ignore[arg-type]
        except TypeError:
            code, why = errno.EINVAL, f"returned {outcome!r}, neither None nor a number"
        else:
            code = -returned if returned < 0 else errno.EINVAL
            why = f"returned {returned}"
            if returned > 0:
                why += f", positive: did you mean -{errno_name(returned)}?"
    file, line = _location(callback, cause)
    where = f" of {device}" if device is not None else ""
    at = f" ({file}:{line})" if file else ""
    error = CallbackError(
        code,
        f"{event} {kind} {name}{where}: {why}{at}",
        event=event,
        kind=kind,
        name=name,
        device=device,
        returned=returned,
        file=file,
        line=line,
    )
    error.__cause__ = cause
    return error


def failed(outcome: object) -> bool:
    """Return whether a callback's return value *outcome* is a failure."""
    if outcome is None:
        return False
    try:
        return operator.index(outcome) != 0  # type: ignore[arg-type]
    except TypeError:
        return True


# ---- the chain ----


class Participant(Protocol):
    """Somebody in the chain: a subsystem, or all devices together."""

    @property
    def name(self) -> str:
        """Name in reports and in LUO's tree."""
        ...

    @property
    def priority(self) -> Priority:
        """Place in the chain."""
        ...

    @property
    def context(self) -> Context:
        """Its context, which carries its u64 over."""
        ...

    @property
    def prepared(self) -> bool:
        """Whether CANCEL has something to undo."""
        ...

    def steps(self, event: str, bulk: bool) -> Iterator[Step]:
        """Yield the steps of *event* in order; *bulk* takes many devices in one step."""
        ...

    def start(self) -> None:
        """Begin an update: what a CANCEL that was stopped half-way left is forgotten."""
        ...

    def collect(self) -> list[CallbackError]:
        """Return, and forget, the failures of steps that do not stop their event."""
        ...


class SubsystemParticipant:
    """A :class:`Subsystem` in the chain of one kernel."""

    def __init__(self, subsystem: Subsystem, kernel: Any, recorder: CallRecorder) -> None:
        self.subsystem = subsystem
        self.name = subsystem.name
        self.priority = subsystem.priority
        self.context = Context(kernel)
        self.prepared = False
        self._recorder = recorder
        self._failures: list[CallbackError] = []

    def steps(self, event: str, bulk: bool) -> Iterator[Step]:
        """Yield the one step of *event*, if there is a callback for it."""
        cancel = event == Event.CANCEL.name
        if cancel and not self.prepared:
            self.context.data = 0  # a PREPARE that failed may have set it
            return
        callback = getattr(self.subsystem, event.lower())
        if callback is not None:
            yield Step("subsystem", self.name, lambda: self._call(event, callback))
        if event == Event.PREPARE.name:
            self.prepared = True
        elif cancel or event == Event.FINISH.name:
            self.prepared = False
            self.context.data = 0

    def _call(self, event: str, callback: SubsystemCallback) -> None:
        key = self._recorder.key(self.name, event, "subsystem", self.name)
        self.context.event = event
        begin = self._recorder.begin()
        outcome: object
        try:
            outcome = callback(self.context)
        except Exception as raised:
            outcome = raised
        elapsed = self._recorder.lap(key, begin)
        if not failed(outcome):
            # Here and not only in steps(): who is interrupted now must get its CANCEL, and so must
            # who was done too late.
            self.prepared |= event == Event.PREPARE.name
            outcome = self._recorder.overdue(elapsed)
            if outcome is None:
                return
        error = callback_error(
            outcome, event=event, kind="subsystem", name=self.name, callback=callback
        )
        if event in BACKWARDS:
            self._failures.append(error)  # nothing stops for these; the result names them
        else:
            raise error from error.__cause__

    def start(self) -> None:
        """Begin an update."""
        self.prepared = False

    def collect(self) -> list[CallbackError]:
        """Return, and forget, the failures so far."""
        failures, self._failures = self._failures, []
        return failures


class NotifierChain:
    """Participants in order of priority, then of registration.

    Args:
        quirks: of these, ``priorities-inverted`` and ``cancel-not-reversed`` change the order.
    """

    def __init__(self, quirks: Set[str] = frozenset()) -> None:
        self._links: list[Participant] = []
        self._sign = -1 if "priorities-inverted" in quirks else 1
        self._backwards = {RESTORE} if "cancel-not-reversed" in quirks else BACKWARDS

    def __iter__(self) -> Iterator[Participant]:
        return iter(self._links)

    def register(self, participant: Participant) -> None:
        """Add *participant*.

        Raises:
            KhoExistsError: one of that name is registered.
        """
        if any(link.name == participant.name for link in self._links):
            raise from_errno(errno.EEXIST, f"register {participant.name}: is registered")
        self._links.append(participant)
        self._links.sort(
            key=lambda link: self._sign * link.priority
        )  # stable: equal ones stay in order

    def unregister(self, name: str) -> None:
        """Remove the participant called *name*.

        Raises:
            KhoNotFoundError: there is none.
        """
        for link in self._links:
            if link.name == name:
                self._links.remove(link)
                return
        raise from_errno(errno.ENOENT, f"unregister {name}: is not registered")

    def order(self, event: str) -> list[Participant]:
        """Return the participants in the order of *event*."""
        return self._links[::-1] if event in self._backwards else list(self._links)
