"""Faults on purpose: one live update for every callback, event and kind of fault.

After each, either everything is as before or the update is complete; a violation comes with the
shortest sequence that shows it, and in a kernel with quirks with the names of those behind it.

Happy path of :func:`run`: a kernel boots cold and is updated and cancelled once without a fault,
which tells who is called for what. Then each fault in turn happens in an update of that same
machine: after a rollback the kernel is as before, after an update its successor is the next one's
kernel.

Unhappy path: a violation is repeated on a fresh machine with fewer faults, devices and steps as
long as it shows. If the kernel has quirks, those whose removal cures it are taken out for the rest
of the campaign, so that one does not hide another.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luo import abi
from luo.errors import (
    CallbackError,
    HandoverError,
    HostCrashError,
    KernelPanic,
    LuoError,
    StateError,
    SuccessorError,
)
from luo.injection import (
    CODE,
    Allocations,
    Call,
    Clock,
    Fault,
    Watch,
    mortal_image,
    rebuild,
)
from luo.kernel import Kernel, KernelImage, RemoteKernel
from luo.liveupdate import CancelResult, FinishResult
from luo.machine import Machine
from luo.notifier import Priority, State
from luo.report import version

__all__ = ["KINDS", "Fault", "FaultReport", "FaultRow", "Violation", "run"]

#: Every kind of fault, in the order of the table.
KINDS: Final = ("errno", "positive", "exception", "delay", "memory", "death")

#: The events of a table, in the order in which they happen.
EVENTS: Final = (
    "LOAD",
    "STATE_SIZE",
    "PREPARE",
    "WAIT",
    "REBOOT",
    "VALIDATE",
    "SHUTDOWN",
    "BOOT",
    "RESTORE",
    "PROBE",
    "FINISH",
    "CANCEL",
)

Build: TypeAlias = Callable[[Machine], Kernel]
Progress: TypeAlias = Callable[[int, int, str], None]

ROLLED_BACK: Final = "rolled back"
COMPLETED: Final = "completed"
CRASHED: Final = "crashed host, as it must"

_UPDATE: Final = ("load", "prepare", "kexec", "finish")
_CANCEL: Final = ("load", "prepare", "cancel")
_UNLOADED: Final = ("prepare", "kexec", "cancel")

#: In the old kernel: one of these that fails ends the update.
_STOPS: Final = frozenset({"STATE_SIZE", "PREPARE", "REBOOT"})

#: In the successor, and with it the end of the host if it dies.
_BEYOND: Final = frozenset({"BOOT", "RESTORE", "PROBE", "FINISH"})

#: Whose faults are those of the engine itself.
_ENGINE: Final = ("kernel", "memory")

_DEVICES: Final = int(Priority.WITH_DEVICES)

#: Kinds of faults that an event cannot have: nobody looks at the result, or times it.
_LEFT_OUT: Final = {
    "STATE_SIZE": ("delay",),
    "PROBE": ("positive", "delay", "death"),
    "SHUTDOWN": ("positive", "delay", "death"),
}

#: Bytes of KHO's tree that no tree has room in.
_NO_ROOM: Final = 64

#: What a violation is put down to that no quirk explains.
_UNKNOWN: Final = ("unknown",)

_MANY: Final = 24  # allocations of one event that are all tried; of more, so many spread evenly
_TRIES: Final = 40  # fresh machines that one violation is worth


# ---- what comes out ----


@dataclass(frozen=True, slots=True)
class Violation:
    """Something half preserved.

    Attributes:
        checks: which checks failed, and what they found, as (check, text).
        sequence: the shortest sequence of steps that shows it.
        quirks: the quirks whose removal cures it; ``("unknown",)`` if none does.
    """

    checks: tuple[tuple[str, str], ...]
    sequence: tuple[str, ...]
    quirks: tuple[str, ...] = ()

    def __str__(self) -> str:
        why = f" [{', '.join(self.quirks)}]" if self.quirks else ""
        steps = [f"  {number}. {step}" for number, step in enumerate(self.sequence, 1)]
        found = [f"  {check}: {text}" for check, text in self.checks]
        return "\n".join((f"{len(steps)} steps{why}:", *steps, "then:", *found))


@dataclass(frozen=True, slots=True)
class FaultRow:
    """One live update, and what became of it.

    Attributes:
        faults: what was done to it; none for the update and the cancel without.
        where: path of the device, "" for none.
        outcome: ``"rolled back"``, ``"completed"`` or ``"crashed host, as it must"``.
        checks: names of the checks that were made.
        violations: what they found, in the order in which it was found.
    """

    faults: tuple[Fault, ...]
    where: str
    outcome: str
    checks: tuple[str, ...]
    violations: tuple[Violation, ...] = ()

    @property
    def kind(self) -> str:
        """Kind of the callback: subsystem, driver, bus, image or kernel."""
        return self.faults[0].kind if self.faults else "kernel"

    @property
    def name(self) -> str:
        """Name of whose callback it is."""
        return self.faults[0].name if self.faults else "no fault"

    @property
    def event(self) -> str:
        """Event, or the two events of a pair."""
        return " + ".join(fault.event for fault in self.faults)

    @property
    def fault(self) -> str:
        """Kind of the fault; "" without."""
        return self.faults[0].what if self.faults else ""


@dataclass(slots=True)
class FaultReport:
    """What a campaign found.

    Attributes:
        rows: one a live update.
        violations: each once, in the order in which they were found.
        quirks: names of the quirks that violate, each with what shows it.
        uncovered: callbacks, in words, that an update of this machine does not call.
        unused: drivers and buses, in words, that no device of this machine has.
        settings: the caller's.
    """

    rows: list[FaultRow] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    quirks: dict[str, Violation] = field(default_factory=dict)
    uncovered: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was ever half preserved."""
        return not self.violations

    @property
    def callbacks(self) -> set[tuple[str, str, str]]:
        """Every (kind, name, event) in which a fault happened."""
        return {fault.key for row in self.rows for fault in row.faults}

    def to_dict(self) -> dict[str, Any]:
        """Return the ``luo-faults/1`` document."""
        numbers = {id(violation): n for n, violation in enumerate(self.violations)}
        return {
            "schema": "luo-faults/1",
            "luo_version": version(),
            "settings": self.settings,
            "ok": self.ok,
            "updates": len(self.rows),
            "uncovered": self.uncovered,
            "unused": self.unused,
            "quirks": {name: numbers[id(shown)] for name, shown in self.quirks.items()},
            "violations": [asdict(violation) for violation in self.violations],
            "rows": [
                {
                    "kind": row.kind,
                    "name": row.name,
                    "event": row.event,
                    "fault": row.fault,
                    "device": row.where or None,
                    "faults": [asdict(fault) for fault in row.faults],
                    "outcome": row.outcome,
                    "checks": list(row.checks),
                    "violations": [numbers[id(violation)] for violation in row.violations],
                }
                for row in self.rows
            ],
        }


# ---- what is put through it ----


@dataclass(frozen=True, slots=True)
class _Subject:
    machine: Callable[[], Machine]
    first: Build
    successor: Build
    image: KernelImage | None


@dataclass(frozen=True, slots=True)
class _Case:
    """One live update.

    Attributes:
        faults: that happen in it.
        script: steps of the user.
        after: what must work after a rollback: ``"update"``, ``"kexec"`` (an ordinary one) or "".
        history: cases before it on the same machine.
        room: bytes of KHO's tree, where there is a limit; 0 leaves it.
        requested: whether the devices are requested already.
    """

    faults: tuple[Fault, ...] = ()
    script: tuple[str, ...] = _UPDATE
    after: str = ""
    history: tuple[_Case, ...] = ()
    room: int = 0
    requested: bool = False


class _Shown(NamedTuple):
    """A case that violates *check*, on which devices, and what was seen."""

    case: _Case
    devices: tuple[int, ...]
    trial: _Trial
    check: str


def look(kernel: Kernel) -> dict[str, Any]:
    """Return by name of the check all that a rollback must leave as it was.

    Pages of KHO's map may stay, as in Linux, and so does what the previous kernel's KHO had for
    itself: both count as free.
    """
    devices, kho = kernel.devices, kernel.kho
    phys, orders = kho.preserved()
    nr_free = kernel.memory.nr_free_pages() + kho.tree_pages
    if kho.incoming is not None:
        nr_free += sum(1 << order for order in kho.incoming.unrestored()[1].tolist())
    return {
        "state": kernel.luo.state.name,
        "requested": _paths(devices, devices.requested),
        "preserved": _paths(devices, devices.preserved),
        "reclaimed": _paths(devices, devices.reclaimed),
        "slots": _has_slots(kernel),
        "references": {
            devices.tree.path(int(index)): int(devices.references[index])
            for index in np.flatnonzero(devices.references)
        },
        "nr_linked": devices.nr_linked,
        "free pages": nr_free,
        "free blocks": (kho.tree_pages, _free_blocks(kernel)),
        "preserved set": frozenset(zip(phys.tolist(), orders.tolist(), strict=True)),
        "KHO's tree": _nodes(kernel),
    }


def _free_blocks(kernel: Kernel) -> int:
    """Return a number that stands for which memory is free, outside scratch."""
    phys, orders = kernel.memory.free_blocks()
    outside = np.ones(len(phys), np.bool_)
    for start, nbytes in kernel.memory.scratch:
        outside &= (phys < start) | (phys >= start + nbytes)
    return hash((phys[outside].tobytes(), orders[outside].tobytes()))


def _paths(devices: Any, mask: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(devices.tree.path(int(index)) for index in np.flatnonzero(mask))


def _has_slots(kernel: Kernel) -> bool:
    if not len(kernel.devices):
        return False
    try:
        kernel.devices.slot(next(iter(kernel.devices.tree)), "driver")
    except StateError:
        return False
    return True


def _nodes(kernel: Kernel) -> tuple[str, ...]:
    """Return the names in KHO's tree, and of what waits to join it."""
    kho = kernel.kho
    if kho.generation.inline:
        return tuple(sorted(kho._tree.children))
    names = set(kho.snapshot().subtrees)
    if kho.root_bytes:  # else it is written by finalizing
        names |= {node.name for node in kho.root.root.children}
    return tuple(sorted(names))


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for check, was in before.items():
        found = after[check]
        if found == was:
            continue
        if check == "free blocks":
            if found[0] == was[0]:  # else it is the map that has grown
                yield check, "other memory is free than before"
        elif check == "preserved set":
            more, less = len(found - was), len(was - found)
            pages = sum(1 << order for _, order in found - was)
            yield check, f"{more} blocks ({pages} pages) more and {less} less than before"
        elif isinstance(was, tuple):
            more = sorted(set(found) - set(was))
            less = sorted(set(was) - set(found))
            words = [f"{_few(more)}, not before"] * bool(more)
            words += [f"no longer {_few(less)}"] * bool(less)
            yield check, "; ".join(words)
        else:
            yield check, f"{found}, before {was}"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


class _Rig:
    """A machine, and the kernel that runs on it: NORMAL, and its state noted.

    Attributes:
        kernel, watch: that kernel, and what sees its calls.
        before: what :func:`look` saw.
        history: cases that ran since the machine was new.
    """

    def __init__(
        self, subject: _Subject, quirks: frozenset[str], devices: tuple[int, ...] | None
    ) -> None:
        self.subject = subject
        self.quirks = quirks
        self.clock = Clock()
        self.machine = subject.machine()
        self.history: list[_Case] = []
        self.kernel: Kernel
        self.watch: Watch
        self.before: dict[str, Any] = {}
        self.start(devices)

    def start(self, devices: tuple[int, ...] | None = None) -> None:
        """Switch the machine on."""
        self.kernel, self.watch = self.build(self.subject.first)
        self.kernel.boot()
        chosen = choose(self.kernel) if devices is None else devices
        self.settle(chosen)

    def build(self, build: Build) -> tuple[Kernel, Watch]:
        """Build a kernel whose callbacks are watched."""
        watch = Watch(self.clock)
        return rebuild(build(self.machine), watch, self.quirks), watch

    def settle(self, devices: tuple[int, ...]) -> None:
        """Request *devices*, and prepare and cancel once.

        What a first update allocates for good is there from then on: what subsystems start with,
        and the pages of the map.
        """
        self.devices = devices
        kernel = self.kernel
        kernel.devices.request(np.array(devices, np.int32))
        kernel.kexec_load(self.build(self.subject.successor)[0])
        kernel.luo.prepare()
        kernel.luo.cancel()
        kernel.kexec_unload()
        self.before = look(kernel)
        self.watch.arm(())

    def run(self, case: _Case) -> _Trial:
        """Run *case* after its history, and move on to the kernel that it leaves."""
        before: list[str] = []
        requested = False
        for earlier in case.history:
            trial = self.run(replace(earlier, requested=requested))
            before += trial.steps
            requested = trial.outcome == ROLLED_BACK
        trial = _Trial(self, replace(case, requested=requested or case.requested))
        trial.run()
        trial.steps[:0] = before
        self.history.append(replace(case, history=()))
        return trial

    def close(self) -> None:
        """Switch the machine off."""
        running = self.machine.running
        if running is not None:
            running.close()
        self.kernel.close()


def choose(kernel: Kernel, among: NDArray[np.bool_] | None = None) -> tuple[int, ...]:
    """Return devices that lead to every callback: three of each driver and of each bus."""
    devices = kernel.devices
    able = devices.eligible()
    if among is not None:
        able &= among
    chosen: set[int] = set()
    for ids, owners in ((devices.driver_ids, devices.drivers), (devices.bus_ids, devices.buses)):
        for number, owner in enumerate(owners):
            found = np.flatnonzero(able & (ids == number))
            if owner.ops is not None and found.size:
                chosen |= {int(found[place]) for place in (0, found.size // 2, -1)}
    return tuple(sorted(chosen))


def _unused(kernel: Kernel) -> Iterator[str]:
    """Yield the drivers and buses that no device has."""
    devices = kernel.devices
    for kind, ids, owners in (
        ("driver", devices.driver_ids, devices.drivers),
        ("bus", devices.bus_ids, devices.buses),
    ):
        for number, owner in enumerate(owners):
            if not (ids[devices.tree.alive] == number).any():
                yield f"{kind} {owner.name}"


# ---- one live update, and what is checked ----


class _Trial:
    """One case on one rig.

    Attributes:
        calls: what the old kernel called, then its successor.
        outcome: what became of the update.
        checks: names of the checks made.
        wrong: what they found, as (check, text).
        steps: what was done, as a user would write it.
    """

    def __init__(self, rig: _Rig, case: _Case) -> None:
        self.rig = rig
        self.case = case
        self.old, self.old_watch = rig.kernel, rig.watch
        self.new: Any = None
        self.new_watch = Watch(rig.clock)
        self.error: Exception | None = None
        self.cancelled: CancelResult | None = None
        self.finished: FinishResult | None = None
        self.kept: NDArray[np.bool_] | None = None
        self.own_page = 0
        self.process = 0
        self.reclaimed: NDArray[np.bool_] | None = None
        self.allocations: dict[str, int] = {}
        self.calls: list[Call] = []
        self.outcome = ""
        self.checks: list[str] = []
        self.wrong: list[tuple[str, str]] = []
        self.steps: list[str] = []

    # ---- doing ----

    def run(self) -> None:
        """Do the steps, and check."""
        names = [self.rig.machine.devices.path(index) for index in self.rig.devices]
        if names and not self.case.requested:
            self.steps.append(f"kernel.devices.request({_listed(names)})")
        self._room()
        for step in self.case.script:
            try:
                getattr(self, f"_{step}")()
            except Exception as error:
                self.error = error
                words = str(error) if isinstance(error, LuoError) else repr(error)
                self.steps[-1] += f"  -> {words}"
                if self.case.script != _UNLOADED:
                    break
        self._judge()

    def _room(self) -> None:
        if self.case.room:
            self.old.kho.fdt_max = self.case.room
            self.steps.append(f"kernel.kho.fdt_max = {self.case.room}")

    def _say(self, call: str, *events: str) -> None:
        faults = [fault for fault in self.case.faults if fault.event in events]
        words = "; ".join(filter(None, map(self._in_words, faults)))
        self.steps.append(f"{call}  # {words}" if words else call)

    def _in_words(self, fault: Fault) -> str:
        if fault.kind == "kernel":
            return f"no memory from allocation {fault.place} on" if fault.place else ""
        if fault.kind == "image" and fault.what == "errno":
            return "the next kernel refuses"
        if fault.kind == "image":
            when = {"LOAD": "while it is built", "WAIT": "", "VALIDATE": "while it validates"}
            return f"the next kernel dies {when.get(fault.event, 'while it boots')}".rstrip()
        where = "" if fault.device is None else f" of {self.rig.machine.devices.path(fault.device)}"
        who = "subsystem" if fault.kind == "subsystem" else fault.kind
        return f"{who} {fault.name} {fault.event}{where} {fault.words}"

    def _death(self) -> Fault | None:
        return next((fault for fault in self.case.faults if fault.what == "death"), None)

    def _load(self) -> None:
        death = self._death()
        self._say("kernel.kexec_load(image)", "LOAD")
        if death is None:
            self.new, self.new_watch = self.rig.build(self.rig.subject.successor)
            self.new_watch.arm(fault for fault in self.case.faults if fault.event in _BEYOND)
            if any(fault.kind == "image" for fault in self.case.faults):
                self.new.validate = _refuse
            self.old.kexec_load(self.new)
            return
        image = self.rig.subject.image
        assert image is not None
        self.old.kexec_load(mortal_image(image, self.rig.quirks, death))
        assert isinstance(self.old._next, RemoteKernel)
        self.process = self.old._next.pid

    def _prepare(self) -> None:
        self._say("kernel.luo.prepare()", "STATE_SIZE", "PREPARE")
        self.old_watch.arm(fault for fault in self.case.faults if fault.event not in _BEYOND)
        self.old_watch.die = self._kill_successor
        with self._allocations("PREPARE"):
            self.old.luo.prepare()

    def _cancel(self) -> None:
        self._say("kernel.luo.cancel()", "CANCEL")
        self.cancelled = self.old.luo.cancel()

    def _kexec(self) -> None:
        death = self._death()
        if death is not None and death.event == "WAIT":
            self._kill_successor()
            self.steps.append(f"# {self._in_words(death)}")
        events = ["REBOOT", "VALIDATE", "SHUTDOWN", "BOOT", "RESTORE", "PROBE"]
        events += ["CANCEL"] * any(fault.event == "REBOOT" for fault in self.case.faults)
        self._say("kernel = kernel.kexec()", *events)
        self.old.on_handover = self._note_kept
        try:
            with self._allocations("BOOT"):
                self.new = self.old.kexec()
        finally:
            self.old.on_handover = None

    def _finish(self) -> None:
        self._say("kernel.luo.finish()", "FINISH")
        if isinstance(self.new, Kernel):
            self.reclaimed = self.new.devices.reclaimed.copy()
        self.finished = self.new.luo.finish()

    @contextlib.contextmanager
    def _allocations(self, event: str) -> Iterator[None]:
        """Let memory end at the allocation that a fault of the kernel names."""
        places = [fault.place for fault in self.case.faults if fault.key == (*_ENGINE, event)]
        with Allocations(self.rig.machine, *places) as counted:
            try:
                yield
            finally:
                self.allocations[event] = counted.count

    def _note_kept(self, handover: object) -> None:
        self.kept = self.old.devices.preserved.copy()
        self.own_page = self.old.kho.fdt_phys

    def _kill_successor(self) -> None:
        assert self.process
        os.kill(self.process, signal.SIGKILL)

    # ---- judging ----

    def _check(self, name: str, wrong: str | Iterable[str] | bool | None = None) -> None:
        if name not in self.checks:
            self.checks.append(name)
        if isinstance(wrong, str):
            wrong = [wrong] if wrong else []
        self.wrong += [(name, text) for text in wrong or ()]

    def _judge(self) -> None:
        self.calls = [*self.old_watch.calls, *self.new_watch.calls]
        running = self.rig.machine.running
        if running is self.old:
            self.outcome = ROLLED_BACK
            self._judge_old()
        elif running is None or isinstance(self.error, HostCrashError | KernelPanic):
            self.outcome = CRASHED
            self._judge_crash()
        else:
            self.outcome = COMPLETED
            self._judge_new()

    def _expected(self) -> str:
        death = self._death()
        if death is not None:
            return CRASHED if death.event in _BEYOND else ROLLED_BACK
        if self.case.script != _UPDATE or self.case.room or self._stopping():
            return ROLLED_BACK
        if any(fault.kind == "image" for fault in self.case.faults):
            return ROLLED_BACK
        if any(fault.kind == "kernel" for fault in self.case.faults):
            return self.outcome  # it may do without: the other checks say whether it is whole
        return COMPLETED

    def _stopping(self) -> Fault | None:
        """Return the fault that must end the update: the first that is one."""
        for fault in self.old_watch.fired:
            if fault.event in _STOPS and (
                fault.what in ("errno", "positive", "exception", "delay")
                or (fault.what == "memory" and self._failed(fault))
            ):
                return fault
        return None

    def _failed(self, fault: Fault) -> bool:
        return any(not call.ok for call in self.calls if call.key == fault.key)

    def _judge_outcome(self) -> None:
        expected = self._expected()
        text = f"{self.outcome}, where {expected} was expected" if self.outcome != expected else ""
        if text and self.error is not None:
            text += f": {type(self.error).__name__}: {self.error}"
        self._check("outcome", text)
        fired = {*self.old_watch.fired, *self.new_watch.fired}
        single = len(self.case.faults) == 1 and self._death() is None
        missed = [f for f in self.case.faults if f.kind not in ("kernel", "image") and f not in fired]
        self._check(
            "reached", [f"{self._in_words(f)}: was not called" for f in missed] if single else ()
        )

    def _judge_old(self) -> None:
        self._judge_outcome()
        self._judge_error()
        for check in self.rig.before:
            self._check(check)
        if self.case.room:
            ran = [self._who(call) for call in self.old_watch.calls if call.event == "REBOOT"]
            self._check("room", [f"{who} REBOOT ran although the tree does not fit" for who in ran[:1]])
            with contextlib.suppress(LuoError):  # frozen: the look finds that
                self.old.kho.fdt_max = abi.KHO_FDT_MAX
        self.wrong += _differences(self.rig.before, look(self.old))
        self._judge_cancels()
        self._judge_order("CANCEL", self.old_watch)
        self._judge_named("CANCEL", self.old_watch, self._cancel_failures())
        self._check("shutdown", [self._who(c) for c in self.old_watch.calls if c.event == "SHUTDOWN"])
        self.old.kexec_unload()
        if self.wrong:
            return
        self.old_watch.arm(())
        if self.case.after == "update":
            self._after_update()
        elif self.case.after == "kexec":
            self._after_kexec()

    def _after_update(self) -> None:
        again = _Trial(self.rig, _Case(requested=True))
        again.run()
        self.steps += again.steps
        self._check("second update", [f"{check}: {text}" for check, text in again.wrong])

    def _after_kexec(self) -> None:
        """An ordinary kexec must boot NORMAL: nothing of the update is handed over."""
        rig = self.rig
        successor, watch = rig.build(rig.subject.first)
        self.steps += ["kernel.kexec_load(image)", "kernel = kernel.kexec()"]
        try:
            self.old.kexec_load(successor)
            kernel = self.old.kexec()
        except Exception as error:
            self._check("ordinary kexec", f"{type(error).__name__}: {error}")
            return
        state = kernel.luo.state
        self._check("ordinary kexec", f"boots {state.name}" if state is not State.NORMAL else "")
        if not self.wrong:
            self._move_to(successor, watch, same=False)

    def _judge_error(self) -> None:
        """The error says whose fault it was."""
        error, fault = self.error, self._stopping()
        if self.case.script == _UNLOADED:
            right = isinstance(error, StateError) and error.errno == errno.EINVAL
            ran = [self._who(call) for call in self.old_watch.calls if call.event == "REBOOT"]
            self._check("error", "" if right else f"{error!r}, EINVAL was expected")
            self._check("no image", [f"{who} ran although no image is loaded" for who in ran[:1]])
            return
        if error is None:
            return
        if not isinstance(error, LuoError):
            self._check("error", f"{type(error).__name__}: {error}, which no caller expects")
            return
        if fault is None and any(f.kind == "image" or f.what == "death" for f in self.case.faults):
            right = isinstance(error, SuccessorError)
            self._check("error", "" if right else f"{error!r}, not of the successor")
            return
        if fault is None:
            return
        code = {"errno": CODE, "positive": errno.EINVAL, "exception": errno.EIO}.get(fault.what)
        if fault.what == "delay":
            code = errno.ETIMEDOUT
        if fault.event == "STATE_SIZE" and fault.what == "positive":
            code = errno.E2BIG
        text = ""
        if code is not None and getattr(error, "errno", None) != code:
            text = f"{error!r}, {os.strerror(code)} was expected"
        elif code != errno.E2BIG and isinstance(error, CallbackError):
            if (error.kind, error.name) != (fault.kind, fault.name):
                text = f"names {error.kind} {error.name}, not {fault.kind} {fault.name}"
            elif fault.device is not None and error.device != self._path(fault.device):
                text = f"names {error.device}, not {self._path(fault.device)}"
        self._check("error", text)

    def _judge_cancels(self) -> None:
        """Who got through PREPARE gets one CANCEL, and nobody else gets any."""
        wanted: dict[tuple[str, str, int | None], int] = {}
        got: dict[tuple[str, str, int | None], int] = {}
        prepares, cancels = self._with("PREPARE"), self._with("CANCEL")
        for call in self.old_watch.calls:
            if call.event == "PREPARE":
                for who in call.done:
                    wanted[who] = 1
            elif call.event == "CANCEL":
                for device in call.devices or (None,):
                    who = (call.kind, call.name, device)
                    got[who] = got.get(who, 0) + 1
        found = []
        for who in sorted({*wanted, *got}, key=str):
            owner = who[:2]
            if owner not in cancels or (owner not in prepares and got[who] <= 1):
                continue
            due, times = wanted.get(who, 0), got.get(who, 0)
            if due != times:
                ran = "ran" if due else "did not run"
                found.append(f"{self._named(*who)} {ran} PREPARE and got {times} CANCEL")
        self._check("callbacks", found)

    def _with(self, event: str) -> set[tuple[str, str]]:
        """Return the (kind, name) that have a callback for *event*."""
        return {key[:2] for key in self.old_watch.keys if key[2] == event}

    def _judge_order(self, event: str, watch: Watch) -> None:
        """*event* goes against the order of PREPARE, which has children before parents."""
        prepared, undone = _chain(self.old_watch.calls, "PREPARE"), _chain(watch.calls, event)
        both = [name for name in prepared if name in undone]
        found = []
        if [name for name in undone if name in both] != both[::-1]:
            found.append(f"{event} calls {', '.join(undone)}; PREPARE called {', '.join(prepared)}")
        priorities = self.old_watch.priorities
        by_priority = sorted(prepared, key=lambda name: priorities.get(name, _DEVICES))
        if by_priority != prepared:
            text = f"PREPARE calls {', '.join(prepared)}, against their priorities"
            self._check("priorities", text)
        self._check("order", found)
        self._judge_depths()

    def _judge_depths(self) -> None:
        found = []
        parents = self.rig.machine.devices.parents
        seen: set[int] = set()
        for call in self.old_watch.calls:
            if call.event != "PREPARE":
                continue
            for device in call.devices:
                above = int(parents[device])
                while above >= 0:
                    if above in seen:
                        found.append(f"PREPARE calls {self._path(above)} before what is below it")
                        break
                    above = int(parents[above])
            seen.update(call.devices)
        self._check("children first", found[:1])

    def _cancel_failures(self) -> list[Any]:
        if self.cancelled is not None:
            return list(self.cancelled.failures)
        return list(getattr(self.error, "undo_errors", ()))

    def _judge_named(self, event: str, watch: Watch, failures: Iterable[Any]) -> None:
        """Every callback that failed is named in the result."""
        named = {
            (error.kind, error.name, error.device)
            for error in failures
            if isinstance(error, CallbackError) and error.event == event
        }
        owners = {key[:2] for key in named}
        found = [
            f"{self._in_words(fault)}, and the result does not name it"
            for fault in watch.fired
            if fault.event == event and fault.what == "delay" and fault.key[:2] not in owners
        ]
        for call in watch.calls:
            paths = [self._path(device) for device in call.failed] or [None]
            if call.event != event or call.ok:
                continue
            if not any((call.kind, call.name, path) in named for path in paths):
                found.append(f"{self._who(call)} failed {event}, and the result does not name it")
        self._check("result", found[:2])

    def _judge_crash(self) -> None:
        self._judge_outcome()
        running = self.rig.machine.running
        if running is not None:
            running.close()
        if isinstance(self.new, Kernel):
            self.new.close()
        gone = False
        try:
            _ = self.old.kho
        except StateError as error:
            gone = error.errno == errno.ESHUTDOWN
        self._check("old kernel gone", "" if gone else "it is still there")
        if self.wrong:
            return
        self.rig.start(self.rig.devices)
        self._check("cold boot", "")

    def _judge_new(self) -> None:
        self._judge_outcome()
        kernel = self.new
        if not isinstance(kernel, Kernel):
            return  # of another process, and it should have died: that is said
        state = kernel.luo.state
        self._check("state", f"{state.name} after FINISH" if state is not State.NORMAL else "")
        if self.error is not None:
            self._check("error", f"{type(self.error).__name__}: {self.error}")
            return
        assert self.finished is not None
        assert self.kept is not None
        restore_failures = list(kernel.restore_failures)
        self._judge_reclaimed(kernel)
        self._judge_named("RESTORE", self.new_watch, restore_failures)
        self._judge_named("FINISH", self.new_watch, self.finished.failures)
        self._judge_order("FINISH", self.new_watch)
        self._judge_shutdown()
        self._judge_finishes()
        for name in ("preserved", "reclaimed"):
            self._check(name, _still(_paths(kernel.devices, getattr(kernel.devices, name))))
        self._check("slots", "still there after FINISH" if _has_slots(kernel) else "")
        lost = self._judge_unrestored(kernel)
        if not self.wrong:
            self._move_to(kernel, self.new_watch, same=not lost)

    def _judge_reclaimed(self, kernel: Kernel) -> None:
        assert self.kept is not None
        assert self.reclaimed is not None
        assert self.finished is not None
        named = set(self.finished.unreclaimed)
        lost = [
            path for path in _paths(kernel.devices, self.kept & ~self.reclaimed) if path not in named
        ]
        text = f"{_few(lost)} neither reclaimed nor named in the result" if lost else ""
        self._check("reclaimed", text)

    def _judge_shutdown(self) -> None:
        """Shutdown goes to every device that is not preserved, and to no other."""
        assert self.kept is not None
        times: dict[int, int] = {}
        for call in self.old_watch.calls:
            if call.event == "SHUTDOWN":
                times[call.devices[0]] = times.get(call.devices[0], 0) + 1
        found = [f"{self._path(d)} is preserved and was shut down" for d in times if self.kept[d]]
        found += [f"{self._path(d)} was shut down {n} times" for d, n in times.items() if n != 1]
        self._check("shutdown", found[:2])

    def _judge_finishes(self) -> None:
        """Every callback that ran PREPARE gets one RESTORE and one FINISH, none CANCEL."""
        found = []
        prepared = {who for c in self.old_watch.calls if c.event == "PREPARE" for who in c.done}
        for event in ("RESTORE", "FINISH"):
            having = self._with(event)
            times: dict[tuple[str, str, int | None], int] = {}
            for call in self.new_watch.calls:
                if call.event == event:
                    for device in call.devices or (None,):
                        who = (call.kind, call.name, device)
                        times[who] = times.get(who, 0) + 1
            for who in sorted(prepared, key=str):
                if who[:2] in having and times.get(who, 0) != 1:
                    found.append(f"{self._named(*who)} got {times.get(who, 0)} {event}")
        found += [f"{self._who(c)} got CANCEL" for c in self.old_watch.calls if c.event == "CANCEL"]
        self._check("callbacks", found[:3])

    def _judge_unrestored(self, kernel: Kernel) -> bool:
        """Nothing that PREPARE added may be left, but what a failed callback had to take over.

        Returns:
            whether a callback that failed left something.
        """
        incoming = kernel.kho.incoming
        if incoming is None:
            self._check("unrestored", "the next kernel found nothing")
            return False
        phys, orders = incoming.unrestored()
        left = set(zip(phys.tolist(), orders.tolist(), strict=True))
        left -= self.rig.before["preserved set"]
        left = {block for block in left if block[0] != self.own_page}  # nobody restores that
        failed_owners = {
            (call.kind, call.name)
            for call in self.new_watch.calls
            if call.event in ("RESTORE", "FINISH") and not call.ok
        }
        if left and not failed_owners:
            at = ", ".join(f"{where:#x}" for where, _ in sorted(left)[:2])
            self._check("unrestored", f"{len(left)} blocks after FINISH, at {at}")
        else:
            self._check("unrestored", "")
        return bool(left)

    def _move_to(self, kernel: Kernel, watch: Watch, *, same: bool) -> None:
        """Go on with *kernel*, whose memory must be as that of the one before."""
        rig, before = self.rig, self.rig.before
        rig.kernel, rig.watch = kernel, watch
        try:
            rig.settle(rig.devices)
        except LuoError as error:
            self._check("second update", f"{type(error).__name__}: {error}")
            return
        was, found = before["free pages"], rig.before["free pages"]
        if same:
            self._check("free pages", f"{found}, before {was}" if found != was else "")

    # ---- words ----

    def path_of(self, device: int | None) -> str:
        """Return the path of a device, "" for none."""
        return "" if device is None else self._path(device)

    def _path(self, device: int) -> str:
        return str(self.rig.machine.devices.path(device))

    def _named(self, kind: str, name: str, device: int | None) -> str:
        return f"{kind} {name}" + ("" if device is None else f" of {self._path(device)}")

    def _who(self, call: Call) -> str:
        return self._named(call.kind, call.name, call.devices[0] if call.devices else None)


def _refuse(handover: object) -> None:
    raise HandoverError("refused on purpose")


def _listed(names: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def _still(paths: Sequence[str]) -> str:
    return f"{_few(paths)} still 1 after FINISH" if paths else ""


def _chain(calls: Iterable[Call], event: str) -> list[str]:
    """Return who was called for *event*, in order: subsystems, and the devices as one."""
    names = [
        call.name if call.kind == "subsystem" else "devices"
        for call in calls
        if call.event == event
    ]
    return list(dict.fromkeys(names))


# ---- the campaign ----


def run(
    kernel: KernelImage | Build,
    machine: Callable[[], Machine],
    *,
    first: Build | None = None,
    requests: Iterable[str] = (),
    kinds: Iterable[str] = KINDS,
    pairs: bool = False,
    progress: Progress | None = None,
) -> FaultReport:
    """Update a machine again and again, with every fault at every callback.

    Args:
        kernel: the image of the kernels, or their factory, for which there is no second process:
            the faults of kind ``"death"`` are left out then.
        machine: makes a machine; always the same one.
        first: factory of the kernel that boots cold, if it is another.
        requests: globs of the devices that may be requested; all if there is none. Of these it
            takes three of each driver and each bus.
        kinds: of :data:`KINDS`.
        pairs: also two faults in one update: PREPARE or REBOOT and the CANCEL that follows,
            RESTORE and FINISH.
        progress: called before each update as ``progress(done, total, what)``; what it raises ends
            the campaign.

    Returns:
        what was found; it is not :attr:`~FaultReport.ok` if anything was half preserved.

    Raises:
        ValueError: there is no such kind, or no device that a request matches.
        LuoError: the kernel does not get as far as a first update.
    """
    image = kernel if isinstance(kernel, KernelImage) else None
    build = kernel.build if isinstance(kernel, KernelImage) else kernel
    wanted = tuple(kinds)
    for kind in wanted:
        if kind not in KINDS:
            raise ValueError(f"fault {kind!r}: {', '.join(KINDS)}")
    subject = _Subject(machine, first or build, build, image)
    campaign = _Campaign(subject, tuple(requests), wanted, progress)
    try:
        campaign.run(pairs)
    finally:
        campaign.close()
    return campaign.report


class _Campaign:
    def __init__(
        self,
        subject: _Subject,
        requests: tuple[str, ...],
        kinds: tuple[str, ...],
        progress: Progress | None,
    ) -> None:
        self.subject = subject
        self.kinds = kinds if subject.image else tuple(k for k in kinds if k != "death")
        self.report = FaultReport()
        self._progress = progress
        self._done = self._total = 0
        with subject.first(subject.machine()) as kernel:
            self.quirks = frozenset(kernel.quirks)
            self.devices = self._chosen(kernel, requests)
            self.report.unused += _unused(kernel)
        self._rig: _Rig | None = None
        self._explained: dict[Any, Violation] = {}
        self._light = False

    def close(self) -> None:
        """Switch the machine off."""
        if self._rig is not None:
            self._rig.close()
            self._rig = None

    @staticmethod
    def _chosen(kernel: Kernel, requests: tuple[str, ...]) -> tuple[int, ...]:
        if not requests:
            return choose(kernel)
        among = np.zeros(len(kernel.devices.requested), np.bool_)
        for glob in requests:
            found = kernel.devices.tree.match(glob)
            if not found.any():
                raise ValueError(f"request {glob}: no device matches")
            among |= found
        return choose(kernel, among)

    # ---- all cases ----

    def run(self, pairs: bool) -> None:
        """Run every case."""
        sites = self._learn()
        cases = [*self._callback_cases(sites), *self._engine_cases()]
        if pairs:
            cases += self._pairs(sites)
        self._total = len(cases)
        for case in cases:
            self._case(case)

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, what)

    def _learn(self) -> dict[tuple[str, str, str], list[Call]]:
        """Update and cancel once without a fault, and return who was called, by key."""
        calls: list[Call] = []
        watch = None
        for case in (_Case(script=_CANCEL, after="kexec"), _Case()):
            trial = self._case(case)
            wanted = ("CANCEL",) if case.script == _CANCEL else tuple(set(EVENTS) - {"CANCEL"})
            calls += [call for call in trial.calls if call.event in wanted]
            watch = trial.old_watch
            self._allocations = trial.allocations
        sites: dict[tuple[str, str, str], list[Call]] = {}
        for call in calls:
            sites.setdefault(call.key, []).append(call)
        assert watch is not None
        self._batched = set(watch.batched)
        for kind, name, event in sorted(watch.keys - set(sites)):
            if f"{kind} {name}" not in self.report.unused:
                self.report.uncovered.append(f"{kind} {name} {event}")
        return sites

    def _case(self, case: _Case) -> _Trial:
        """Run *case*, and find out about each violation; as often as a quirk is found behind it."""
        self._tell(_title(case))
        violations: list[Violation] = []
        while True:
            rig = self._rig = self._rig or self._new_rig(self.subject, self.devices)
            history = tuple(rig.history)
            trial = rig.run(case)
            if not trial.wrong:
                break
            self.close()
            found = self._explain(replace(case, history=history), trial)
            violations += found
            taken = {quirk for one in found for quirk in one.quirks}
            if not taken & self.quirks:
                break
            self.quirks -= taken
        self._done += 1
        where = trial.path_of(case.faults[0].device) if case.faults else ""
        row = FaultRow(case.faults, where, trial.outcome, tuple(trial.checks), tuple(violations))
        self.report.rows.append(row)
        return trial

    def _new_rig(self, subject: _Subject, devices: tuple[int, ...]) -> _Rig:
        return _Rig(subject, self.quirks, devices)

    def _callback_cases(self, sites: dict[tuple[str, str, str], list[Call]]) -> Iterator[_Case]:
        for key in sorted(sites, key=lambda key: (EVENTS.index(key[2]), key)):
            for what in self.kinds:
                for number, fault in enumerate(self._variants(key, what, sites[key])):
                    script = _CANCEL if fault.event == "CANCEL" else _UPDATE
                    # What must work afterwards is tried once a callback and kind: in turn.
                    after = ("update", "kexec")[KINDS.index(what) % 2] if not number else ""
                    yield _Case((fault,), script, after)

    def _variants(
        self, key: tuple[str, str, str], what: str, calls: list[Call]
    ) -> Iterator[Fault]:
        """Yield a fault at the first, a middle and the last device, or of a whole batch."""
        event = key[2]
        if what in _LEFT_OUT.get(event, ()):
            return
        devices = [device for call in calls for device in call.devices]
        batched = key in self._batched
        if batched or not devices:
            yield Fault(*key, what)
        one = what in ("errno", "positive") and event != "STATE_SIZE" if batched else bool(devices)
        if one:
            count = 1 if what == "death" else 3
            places = dict.fromkeys((0, len(devices) // 2, len(devices) - 1))
            for place in list(places)[:count]:
                yield Fault(*key, what, devices[place])

    def _engine_cases(self) -> Iterator[_Case]:
        """Yield the faults that are no callback's."""
        if "death" in self.kinds:
            for event in ("LOAD", "WAIT", "VALIDATE", "BOOT"):
                yield _Case((Fault("image", "next kernel", event, "death"),), after="update")
        if "errno" in self.kinds:
            for after in ("update", "kexec"):
                yield _Case((Fault("image", "next kernel", "VALIDATE", "errno"),), after=after)
            yield _Case((Fault("kernel", "no image", "REBOOT", "errno"),), script=_UNLOADED)
        if "memory" in self.kinds:
            for event, count in self._allocations.items():
                step = max(1.0, count / _MANY)
                places = sorted({1 + int(n * step) for n in range(min(count, _MANY))} | {count})
                for place in places if count else ():
                    yield _Case((Fault(*_ENGINE, event, "memory", None, place),))
            if self._inline:
                yield _Case((Fault(*_ENGINE, "PREPARE", "memory"),), room=_NO_ROOM)

    def _pairs(self, sites: dict[tuple[str, str, str], list[Call]]) -> Iterator[_Case]:
        """Yield two faults in one update, of one kind."""
        for firsts, second in ((("PREPARE", "REBOOT"), "CANCEL"), (("RESTORE",), "FINISH")):
            for what in (kind for kind in ("errno", "exception") if kind in self.kinds):
                lasts = {
                    key: list(self._variants(key, what, calls))[-1] for key, calls in sites.items()
                    if key[2] in (*firsts, second)
                }
                for one in (fault for key, fault in lasts.items() if key[2] in firsts):
                    for two in (fault for key, fault in lasts.items() if key[2] == second):
                        yield _Case((one, two))

    # ---- a violation ----

    def _explain(self, case: _Case, trial: _Trial) -> list[Violation]:
        """Find the shortest sequence that shows what *trial* found, and the quirks behind it.

        Returns:
            a violation; several if the sequence shows the work of several quirks.
        """
        key = (tuple(fault.key for fault in case.faults), trial.wrong[0][0])
        if not self.quirks and key in self._explained:
            return self._explained[key]
        shown = self._shorten(case, trial)
        found: list[Violation] = []
        for guilty, checks in self._guilty(shown).items():
            violation = Violation(tuple(checks), tuple(shown.trial.steps), guilty)
            known = [
                other
                for other in self.report.violations
                if (other.sequence, other.quirks) == (violation.sequence, violation.quirks)
            ]
            found += known or [violation]
            if known:
                continue
            self.report.violations.append(violation)
            if guilty != _UNKNOWN:
                for quirk in guilty:
                    self.report.quirks.setdefault(quirk, violation)
        self._explained[key] = found
        return found

    def _shows(
        self, case: _Case, devices: tuple[int, ...], check: str, quirks: frozenset[str]
    ) -> _Shown | None:
        """Try *case* on a fresh machine; None if *check* does not fail."""
        self._tell(f"shortening: {_title(case)}")
        try:
            # Without what only the first kernel has it is faster, and as good if it shows there.
            subject = self.subject
            if self._light:
                subject = replace(subject, first=subject.successor)
            rig = _Rig(subject, quirks, devices)
        except LuoError:
            return None
        try:
            trial = rig.run(case)
        finally:
            rig.close()
        if check not in dict(trial.wrong):
            return None
        return _Shown(case, devices, trial, check)

    def _shorten(self, case: _Case, trial: _Trial) -> _Shown:
        check = trial.wrong[0][0]
        best = _Shown(case, self.devices, trial, check)
        tries = iter(range(_TRIES))

        def attempt(case: _Case, devices: tuple[int, ...]) -> bool:
            nonlocal best
            if next(tries, None) is None:
                return False
            shown = self._shows(case, devices, check, self.quirks)
            if shown is not None:
                best = shown
            return shown is not None

        alone = replace(case, history=())
        self._light = self.subject.first is not self.subject.successor
        if self._light and not attempt(alone, self.devices):
            self._light = False
        if not self._light and not attempt(alone, self.devices):
            for earlier in reversed(case.history):
                if attempt(replace(case, history=(earlier,)), self.devices):
                    break
        for fewer in _simpler(best.case):
            if attempt(fewer, best.devices):
                break
        involved = {fault.device for fault in best.case.faults if fault.device is not None}
        for few in ((), tuple(sorted(involved)), *((one,) for one in self.devices[:8])):
            if len(few) < len(best.devices) and attempt(best.case, few):
                break
        # Half of them at a time, as long as that helps.
        size = len(best.devices) // 2
        while size and len(best.devices) > 1:
            for start in range(0, len(best.devices), size):
                if attempt(best.case, best.devices[:start] + best.devices[start + size :]):
                    break
            else:
                size //= 2
        return best

    def _guilty(self, shown: _Shown) -> dict[tuple[str, ...], list[tuple[str, str]]]:
        """Return what was found, by the quirks whose removal cures it."""
        found: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        by_check: dict[str, tuple[str, ...]] = {}
        for check, text in shown.trial.wrong:
            if check not in by_check:
                known = list(by_check.values())
                by_check[check] = self._behind(shown, check, known) if self.quirks else ()
            found.setdefault(by_check[check], []).append((check, text))
        return found

    def _behind(
        self, shown: _Shown, check: str, candidates: Iterable[tuple[str, ...]]
    ) -> tuple[str, ...]:
        """Return the quirks whose removal cures *check*: one if one does, else the fewest."""

        def cured(without: Iterable[str]) -> bool:
            left = self.quirks - set(without)
            return self._shows(shown.case, shown.devices, check, left) is None

        for quirks in (*candidates, *((quirk,) for quirk in sorted(self.quirks))):
            if cured(quirks):
                return quirks
        guilty = sorted(self.quirks)
        if not cured(guilty):
            return _UNKNOWN
        for quirk in list(guilty):
            rest = [other for other in guilty if other != quirk]
            if cured(rest):
                guilty = rest
        return tuple(guilty)

    @property
    def _inline(self) -> bool:
        assert self._rig is not None
        return self._rig.kernel.kho.generation.inline


def _simpler(case: _Case) -> Iterator[_Case]:
    """Yield cases that are shorter than *case*, the shortest first."""
    yield _Case(script=("prepare", "cancel"))
    if case.script != ("prepare", "cancel"):
        yield _Case(script=_CANCEL)
        yield _Case()
    for after in ("", case.after):
        for fault in case.faults:
            if len(case.faults) > 1:
                yield replace(case, faults=(fault,), after=after, history=())
    if case.history:
        yield replace(case, history=())
    if case.script == _UPDATE and all(f.event in ("STATE_SIZE", "PREPARE") for f in case.faults):
        yield replace(case, script=("prepare",), after="", history=())
    if case.after:
        yield replace(case, after="")


def _title(case: _Case) -> str:
    if not case.faults:
        return "no fault"
    return " and ".join(f"{f.name} {f.event}: {f.what}" for f in case.faults)
