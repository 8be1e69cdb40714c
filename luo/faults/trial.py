"""One live update with faults in it, and whether anything is half preserved afterwards.

A :class:`Rig` is a machine that is updated again and again; a :class:`Case` says what happens in
one update, a :class:`Trial` does it and checks. Which cases there are, and what becomes of a
violation, is in :mod:`luo.faults`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luo import abi
from luo.device import Devices
from luo.errors import (
    CallbackError,
    HandoverError,
    HostCrashError,
    KernelPanic,
    KhoBusyError,
    LuoError,
    StateError,
    SuccessorError,
)
from luo.faults.injection import (
    CODE,
    Allocations,
    Call,
    Clock,
    Fault,
    Watch,
    mortal_image,
    outside_scratch,
    rebuild,
)
from luo.kernel import Kernel, KernelImage, RemoteKernel
from luo.liveupdate import CancelResult, FinishResult
from luo.machine import Machine
from luo.notifier import Priority, State

__all__ = [
    "BEYOND",
    "CANCEL",
    "ENGINE",
    "UNLOADED",
    "UPDATE",
    "Build",
    "Case",
    "Rig",
    "Subject",
    "Trial",
]

Build: TypeAlias = Callable[[Machine], Kernel]

ROLLED_BACK: Final = "rolled back"
COMPLETED: Final = "completed"
CRASHED: Final = "crashed host, as it must"

#: What a user does: an update; one that is cancelled; one that lacks the image to jump into; one
#: of a device whose driver goes, or goes and comes back; one that a subsystem wants to leave.
UPDATE: Final = ("load", "prepare", "kexec", "finish")
CANCEL: Final = ("load", "prepare", "cancel")
UNLOADED: Final = ("prepare", "kexec", "cancel")
UNBOUND: Final = ("load", "unbind", "prepare", "kexec", "finish")
REBOUND: Final = ("load", "unbind", "bind", "prepare", "cancel")
LEAVING: Final = ("load", "prepare", "unregister", "cancel")

#: Events in the successor: who dies there takes the host with it.
BEYOND: Final = frozenset({"BOOT", "RESTORE", "PROBE", "FINISH"})

#: Kind and name of faults of the engine's own.
ENGINE: Final = ("kernel", "memory")

#: Events of the old kernel that a failing callback ends.
_STOPS: Final = frozenset({"STATE_SIZE", "PREPARE", "REBOOT"})

_DEVICES: Final = int(Priority.WITH_DEVICES)


# ---- what is put through it ----


@dataclass(frozen=True, slots=True)
class Subject:
    """What is put through it.

    Attributes:
        machine: makes a machine.
        first: makes the kernel that boots cold.
        successor: makes the next one.
        image: the same for a second process; None if there can be none.
    """

    machine: Callable[[], Machine]
    first: Build
    successor: Build
    image: KernelImage | None


@dataclass(frozen=True, slots=True)
class Case:
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
    script: tuple[str, ...] = UPDATE
    after: str = ""
    history: tuple[Case, ...] = ()
    room: int = 0
    requested: bool = False


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
    phys, orders = outside_scratch(kernel.memory)
    return hash((phys.tobytes(), orders.tobytes()))


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
            pages = sum(1 << order for _, order in found - was)
            yield (
                check,
                (
                    f"{len(found - was)} blocks ({pages} pages) more and {len(was - found)} less"
                    " than before"
                ),
            )
        elif isinstance(was, tuple):
            added, gone = sorted(set(found) - set(was)), sorted(set(was) - set(found))
            words = [f"{_few(added)}, not before"] * bool(added)
            words += [f"no longer {_few(gone)}"] * bool(gone)
            yield check, "; ".join(words)
        else:
            yield check, f"{found}, before {was}"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


class Rig:
    """A machine, and the kernel that runs on it: NORMAL, and its state noted.

    Attributes:
        kernel, watch: that kernel, and what sees its calls.
        devices: numbers of those that are requested.
        before: what :func:`look` saw.
        history: cases that ran since the machine was new.
    """

    def __init__(self, subject: Subject, quirks: frozenset[str], devices: tuple[int, ...]) -> None:
        self.subject = subject
        self.quirks = quirks
        self.devices = devices
        self.clock = Clock()
        self.machine = subject.machine()
        self.history: list[Case] = []
        self.kernel: Kernel
        self.watch: Watch
        self.before: dict[str, Any] = {}
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Switch the machine on."""
        self.kernel, self.watch = self.build(self.subject.first)
        self.kernel.boot()
        self.settle()

    def build(self, build: Build) -> tuple[Kernel, Watch]:
        """Build a kernel whose callbacks are watched."""
        watch = Watch(self.clock)
        return rebuild(build(self.machine), watch, self.quirks), watch

    def settle(self) -> None:
        """Request the devices, and prepare and cancel once.

        What a first update allocates for good is there from then on: what subsystems start with,
        and the pages of the map.
        """
        kernel = self.kernel
        kernel.devices.request(np.array(self.devices, np.int32))
        kernel.kexec_load(self.build(self.subject.successor)[0])
        kernel.luo.prepare()
        kernel.luo.cancel()
        kernel.kexec_unload()
        self.before = look(kernel)
        self.watch.arm(())

    def run(self, case: Case) -> Trial:
        """Run *case* after its history, and move on to the kernel that it leaves."""
        before: list[str] = []
        requested = False
        for earlier in case.history:
            trial = self.run(replace(earlier, requested=requested))
            before += trial.steps
            requested = trial.outcome == ROLLED_BACK
        trial = Trial(self, replace(case, requested=requested or case.requested))
        trial.run()
        trial.steps[:0] = before
        self.history.append(replace(case, history=()))
        return trial

    def close(self) -> None:
        """Switch the machine off."""
        if self.machine.running is not None:
            self.machine.running.close()


def choose(kernel: Kernel, among: NDArray[np.bool_] | None = None) -> tuple[int, ...]:
    """Return devices that lead to every callback: three of each driver and of each bus."""
    devices = kernel.devices
    able = devices.eligible()
    if among is not None:
        able &= among
    chosen: set[int] = set()
    for _, ids, owners in _owners(devices):
        for number, owner in enumerate(owners):
            found = np.flatnonzero(able & (ids == number))
            if owner.ops is not None and found.size:
                chosen |= {int(found[place]) for place in (0, found.size // 2, -1)}
    return tuple(sorted(chosen))


def unused(kernel: Kernel) -> Iterator[str]:
    """Yield the drivers and buses that no device has."""
    devices = kernel.devices
    for kind, ids, owners in _owners(devices):
        for number, owner in enumerate(owners):
            if not (ids[devices.tree.alive] == number).any():
                yield f"{kind} {owner.name}"


def _owners(devices: Devices) -> Iterator[tuple[str, NDArray[np.int32], list[Any]]]:
    yield "driver", devices.driver_ids, devices.drivers
    yield "bus", devices.bus_ids, devices.buses


# ---- one live update, and what is checked ----


class Trial:
    """One case on one rig.

    Attributes:
        calls: what the old kernel called, then its successor.
        outcome: what became of the update.
        checks: names of the checks made.
        wrong: what they found, as (check, text).
        steps: what was done, as a user would write it.
    """

    def __init__(self, rig: Rig, case: Case) -> None:
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
        self.unbound = ""
        self.due: set[int] = set()
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
                if self.case.script != UNLOADED:
                    break
        self._judge()

    def _room(self) -> None:
        if self.case.room:
            self.old.kho.fdt_max = self.case.room
            self.steps.append(f"kernel.kho.fdt_max = {self.case.room}")

    def _say(self, call: str, *events: str) -> None:
        faults = [fault for fault in self.case.faults if fault.event in events]
        if faults and "cancel" not in self.case.script:  # it comes with the rollback of these
            faults += [fault for fault in self.case.faults if fault.event == "CANCEL"]
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
        where = f" of {self._path(fault.device)}" if fault.device is not None else ""
        return f"{fault.kind} {fault.name} {fault.event}{where} {fault.words}"

    def _death(self) -> Fault | None:
        return next((fault for fault in self.case.faults if fault.what == "death"), None)

    def _load(self) -> None:
        death = self._death()
        self._say("kernel.kexec_load(image)", "LOAD")
        if death is None:
            self.new, self.new_watch = self.rig.build(self.rig.subject.successor)
            self.new_watch.arm(fault for fault in self.case.faults if fault.event in BEYOND)
            if any(fault.kind == "image" for fault in self.case.faults):
                self.new.validate = _refuse
            self.old.kexec_load(self.new)
            return
        image = self.rig.subject.image
        assert image is not None
        self.old.kexec_load(mortal_image(image, self.rig.quirks, death))
        assert isinstance(self.old._next, RemoteKernel)
        self.process = self.old._next.pid

    def _unbind(self) -> None:
        device = self.old.devices[self._subject_device]
        assert device.driver is not None
        self.unbound = device.driver.name
        self.steps.append(f'kernel.devices["{device.path}"].unbind()')
        device.unbind()

    def _bind(self) -> None:
        device = self.old.devices[self._subject_device]
        self.steps.append(f'kernel.devices["{device.path}"].bind("{self.unbound}")')
        device.bind(self.unbound)
        self.unbound = ""

    @property
    def _subject_device(self) -> int:
        number = self.case.faults[0].device
        assert number is not None
        return number

    def _unregister(self) -> None:
        name = min(self.old_watch.priorities)
        self.steps.append(f'kernel.luo.unregister("{name}")')
        with contextlib.suppress(KhoBusyError):
            self.old.luo.unregister(name)

    def _prepare(self) -> None:
        self._say("kernel.luo.prepare()", "STATE_SIZE", "PREPARE")
        self.old_watch.arm(fault for fault in self.case.faults if fault.event not in BEYOND)
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
        events = ("REBOOT", "VALIDATE", "SHUTDOWN", "BOOT", "RESTORE", "PROBE")
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
        places = [fault.place for fault in self.case.faults if fault.key == (*ENGINE, event)]
        with Allocations(self.rig.machine, *places) as counted:
            try:
                yield
            finally:
                self.allocations[event] = counted.count

    def _note_kept(self, handover: object) -> None:
        self.kept = self.old.devices.preserved.copy()
        self.own_page = self.old.kho.fdt_phys
        devices = self.old.devices
        ends = np.array([*(driver.shutdown is not None for driver in devices.drivers), False])
        due = ends[devices.driver_ids] & ~self.kept & devices.tree.alive
        self.due = set(np.flatnonzero(due).tolist())

    def _kill_successor(self) -> None:
        assert self.process
        os.kill(self.process, signal.SIGKILL)

    # ---- judging ----

    def _check(self, name: str, *wrong: str) -> None:
        """Note that *name* was checked, and what it found wrong; "" is nothing."""
        if name not in self.checks:
            self.checks.append(name)
        self.wrong += [(name, text) for text in wrong if text]

    def _judge(self) -> None:
        self.calls = [*self.old_watch.calls, *self.new_watch.calls]
        self._judge_callbacks()
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

    def _judge_callbacks(self) -> None:
        """Who is not made to fail does not; who failed RESTORE may have nothing to FINISH."""
        asked = {fault.key[:2] for fault in self.case.faults}
        found = [
            f"{self._who(call)} failed {call.event}, and no fault was put there"
            for call in self.calls
            if not call.ok and call.key[:2] not in asked and ENGINE not in asked
        ]
        self._check("no fault", *found[:2])

    def _expected(self) -> str:
        death = self._death()
        if death is not None:
            return CRASHED if death.event in BEYOND else ROLLED_BACK
        if self.case.script != UPDATE or self.case.room or self._stopping():
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
        missed = [
            f"{self._in_words(fault)}: was not called"
            for fault in self.case.faults
            if single and fault.kind not in ("kernel", "image") and fault not in fired
        ]
        self._check("reached", *missed)

    def _judge_old(self) -> None:
        self._judge_outcome()
        self._judge_error()
        for check in self.rig.before:
            self._check(check)
        if self.case.room:
            self._judge_no_reboot("room", "KHO's tree does not fit")
            with contextlib.suppress(LuoError):  # frozen: the look finds that
                self.old.kho.fdt_max = abi.KHO_FDT_MAX
        if self.unbound:
            self._bind()
            self.steps.pop()  # it is for the next case
        self.wrong += _differences(self.rig.before, look(self.old))
        self._judge_cancels()
        self._judge_order("CANCEL", self.old_watch)
        self._judge_named("CANCEL", self.old_watch, self._cancel_failures())
        down = [call for call in self.old_watch.calls if call.event == "SHUTDOWN"]
        self._check("shutdown", *(f"{self._who(call)} was shut down" for call in down[:2]))
        self.old.kexec_unload()
        if self.wrong:
            return
        self.old_watch.arm(())
        if self.case.after == "update":
            self._after_update()
        elif self.case.after == "kexec":
            self._after_kexec()

    def _after_update(self) -> None:
        again = Trial(self.rig, Case(requested=True))
        again.run()
        self.steps += again.steps
        self._check("second update", *(f"{check}: {text}" for check, text in again.wrong))

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
            self._move_to(successor, watch)

    def _judge_error(self) -> None:
        """The error says whose fault it was."""
        error, fault = self.error, self._stopping()
        if self.case.script == UNLOADED:
            right = isinstance(error, StateError) and error.errno == errno.EINVAL
            self._check("error", "" if right else f"{error!r}, EINVAL was expected")
            self._judge_no_reboot("no image", "no image is loaded")
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

    def _judge_no_reboot(self, check: str, why: str) -> None:
        """What is known beforehand must not be found out after devices were told to stop."""
        ran = [call for call in self.old_watch.calls if call.event == "REBOOT"]
        self._check(check, *(f"{self._who(call)} ran REBOOT although {why}" for call in ran[:1]))

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
        self._check("callbacks", *found[:3])

    def _with(self, event: str) -> set[tuple[str, str]]:
        """Return the (kind, name) that have a callback for *event*."""
        return {key[:2] for key in self.old_watch.keys if key[2] == event}

    def _judge_order(self, event: str, watch: Watch) -> None:
        """PREPARE goes by priority and has children before parents; *event* goes against it."""
        prepared, undone = _chain(self.old_watch.calls, "PREPARE"), _chain(watch.calls, event)
        both = [name for name in prepared if name in undone]
        text = f"{event} calls {', '.join(undone)}; PREPARE called {', '.join(prepared)}"
        right = [name for name in undone if name in both] == both[::-1]
        self._check("order", "" if right else text)
        priorities = self.old_watch.priorities
        by_priority = sorted(prepared, key=lambda name: priorities.get(name, _DEVICES))
        text = f"PREPARE calls {', '.join(prepared)}, against their priorities"
        self._check("priorities", text if by_priority != prepared else "")
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
        self._check("children first", *found[:1])

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
            if call.event != event or call.ok:
                continue
            paths = map(self._path, call.failed) if call.devices else (None,)
            if named.isdisjoint((call.kind, call.name, path) for path in paths):
                found.append(f"{self._who(call)} failed {event}, and the result does not name it")
        self._check("result", *found[:2])

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
        if not self.wrong:
            self._start_again()

    def _start_again(self) -> None:
        try:
            self.rig.start()
        except LuoError as error:
            self._check("cold boot", f"{type(error).__name__}: {error}")
        else:
            self._check("cold boot")

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
        self._judge_reclaimed(kernel)
        self._judge_named("RESTORE", self.new_watch, kernel.restore_failures)
        self._judge_named("FINISH", self.new_watch, self.finished.failures)
        self._judge_order("FINISH", self.new_watch)
        self._judge_shutdown()
        self._judge_finishes()
        for name in ("preserved", "reclaimed"):
            self._check(name, _still(_paths(kernel.devices, getattr(kernel.devices, name))))
        self._check("slots", "still there after FINISH" if _has_slots(kernel) else "")
        self._judge_unrestored(kernel)
        if self.wrong:
            return
        # Who failed to take over what it had has less than before, and who was probed afresh
        # perhaps something else: no kernel to go on with.
        failed = any(call.event == "RESTORE" and not call.ok for call in self.new_watch.calls)
        failed |= any(fault.event == "PROBE" for fault in self.new_watch.fired)
        self._move_to(kernel, self.new_watch, same=not failed)
        if failed and not self.wrong:
            kernel.shutdown()
            self._start_again()

    def _judge_reclaimed(self, kernel: Kernel) -> None:
        assert self.kept is not None
        assert self.reclaimed is not None
        assert self.finished is not None
        named = set(self.finished.unreclaimed)
        lost = [
            path
            for path in _paths(kernel.devices, self.kept & ~self.reclaimed)
            if path not in named
        ]
        text = f"{_few(lost)} neither reclaimed nor named in the result" if lost else ""
        self._check("reclaimed", text)

    def _judge_shutdown(self) -> None:
        """Shutdown goes to every device that is not preserved; probe to none that is."""
        assert self.kept is not None
        assert self.reclaimed is not None
        down = Counter(call.devices[0] for call in self.calls if call.event == "SHUTDOWN")
        found = [
            f"{self._path(device)} was shut down {down[device]} times, {due} were expected"
            for device, due in ((d, int(d in self.due)) for d in sorted({*down, *self.due}))
            if down[device] != due
        ]
        self._check("shutdown", *found[:2])
        probed = {call.devices[0] for call in self.calls if call.event == "PROBE"}
        held = np.flatnonzero(self.kept & self.reclaimed).tolist()
        found = [f"{self._path(d)} is restored and was probed" for d in held if d in probed]
        self._check("probe", *found[:2])

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
        self._check("callbacks", *found[:3])

    def _judge_unrestored(self, kernel: Kernel) -> None:
        """Nothing that PREPARE added may be left, but what a failed callback had to take over."""
        incoming = kernel.kho.incoming
        if incoming is None:
            self._check("unrestored", "the next kernel found nothing")
            return
        phys, orders = incoming.unrestored()
        left = set(zip(phys.tolist(), orders.tolist(), strict=True))
        left -= self.rig.before["preserved set"]
        left = {block for block in left if block[0] != self.own_page}  # nobody restores that
        wrong = {
            call.key[:2]
            for call in self.new_watch.calls
            if call.event in ("RESTORE", "FINISH") and not call.ok
        }
        allowed = sum(self.old_watch.preserved.get(owner, 0) for owner in wrong)
        at = ", ".join(f"{where:#x}" for where, _ in sorted(left)[:2])
        text = f"{len(left)} blocks after FINISH, at {at}; {allowed} are of callbacks that failed"
        self._check("unrestored", text if len(left) > allowed else "")

    def _move_to(self, kernel: Kernel, watch: Watch, *, same: bool | None = None) -> None:
        """Go on with *kernel*, which must be ready for the next update.

        Args:
            kernel: it runs now.
            watch: what sees its calls.
            same: whether it has as much free memory as the one before, or at least as much; None
                if it is another kernel and nothing can be said.
        """
        rig, before = self.rig, self.rig.before
        rig.kernel, rig.watch = kernel, watch
        try:
            rig.settle()
        except LuoError as error:
            self._check("second update", f"{type(error).__name__}: {error}")
            return
        was, found = before["free pages"], rig.before["free pages"]
        if same is not None:
            wrong = found != was if same else found < was
            self._check("free pages", f"{found}, before {was}" if wrong else "")

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
