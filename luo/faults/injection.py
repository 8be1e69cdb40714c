"""Kernels whose callbacks are written down, and fail where they are told to.

:func:`rebuild` puts the parts of a kernel that has not booted into one whose callbacks go through
a :class:`Watch`; :func:`mortal` is a kernel image that kills itself. What is done with them is in
:mod:`luo.faults`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from luo._kho import CallRecorder, CallTable, NativeCallback, NativeScope, call_devices
from luo.device import Batch, Bus, Device, DeviceBatch, Driver, LiveUpdateOps, batch
from luo.errors import errno_name
from luo.kernel import Kernel, KernelImage
from luo.kho import Kho
from luo.machine import Machine
from luo.memory import PhysicalMemory
from luo.notifier import Subsystem, SubsystemParticipant, failed

__all__ = ["Call", "Clock", "Fault", "Watch", "exhausted", "mortal", "rebuild"]

#: What a callback returns that fails with an errno: one that nothing else here ends with.
CODE: Final = errno.EREMOTEIO

#: What a callback returns that forgot the minus sign.
POSITIVE: Final = 1

#: Seconds that a callback may take, on a clock that a delayed callback puts forward.
LIMIT: Final = 3600.0

#: A size that no kernel allocates in one piece.
_HUGE: Final = 1 << 40

_EVENTS: Final = ("prepare", "reboot", "finish", "cancel", "restore")

#: Where a failing callback has done nothing: who fails PREPARE gets no CANCEL, and who fails
#: RESTORE has not restored. Elsewhere it does its work first, since nobody else would.
_INSTEAD: Final = frozenset({"PREPARE", "STATE_SIZE", "RESTORE"})

#: What they return is no outcome.
_UNHEARD: Final = frozenset({"STATE_SIZE", "PROBE", "SHUTDOWN"})


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, and where it happens; once.

    Attributes:
        kind: ``"subsystem"``, ``"driver"`` or ``"bus"``; ``"image"`` for the successor,
            ``"kernel"`` for the engine itself.
        name: of the subsystem, driver or bus.
        event: ``"PREPARE"``, ``"REBOOT"``, ``"RESTORE"``, ``"FINISH"``, ``"CANCEL"``; also
            ``"STATE_SIZE"``, ``"PROBE"`` and ``"SHUTDOWN"``, which are callbacks as well.
        what: ``"errno"``, ``"positive"``, ``"exception"``, ``"delay"``, ``"memory"``, ``"death"``.
        device: number of the device; None for a subsystem, or all devices of a batch.
        place: which of the event's allocations finds no memory, and all after it; 0 for none.
    """

    kind: str
    name: str
    event: str
    what: str
    device: int | None = None
    place: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """Whose callback it is: (kind, name, event)."""
        return self.kind, self.name, self.event

    @property
    def words(self) -> str:
        """What happens, in words."""
        return {
            "errno": f"returns -{errno_name(CODE)}",
            "positive": f"returns {POSITIVE}",
            "exception": "raises RuntimeError",
            "delay": "takes longer than callback_limit",
            "memory": "finds no memory",
            "death": "sees the next kernel die",
        }[self.what]


class Call(NamedTuple):
    """A call that was made: one, of one device or of a batch.

    Attributes:
        kind, name, event: as of :class:`Fault`.
        devices: numbers; empty for a subsystem.
        failed: those of *devices* that failed.
        ok: whether the call did not fail as a whole.
    """

    kind: str
    name: str
    event: str
    devices: tuple[int, ...]
    failed: tuple[int, ...]
    ok: bool

    @property
    def key(self) -> tuple[str, str, str]:
        """Whose callback it was."""
        return self.kind, self.name, self.event

    @property
    def done(self) -> list[tuple[str, str, int | None]]:
        """Who got through: (kind, name, device)."""
        if not self.devices:
            return [(self.kind, self.name, None)] if self.ok else []
        return [(self.kind, self.name, d) for d in self.devices if d not in self.failed]


class Clock:
    """The system's monotonic clock, which can be put forward.

    Attributes:
        ahead: nanoseconds by which it is.
    """

    def __init__(self) -> None:
        self.ahead = 0

    def __call__(self) -> int:
        """Return the time in nanoseconds."""
        return time.monotonic_ns() + self.ahead


class Watch:
    """What stands between one kernel and its callbacks.

    Attributes:
        kernel: the kernel, once it is built.
        clock: its clock.
        calls: what was called, in order.
        fired: the faults that happened.
        keys: (kind, name, event) of every callback.
        batched: those that serve many devices at once.
        priorities: place in the chain of each subsystem by name.
        preserved: blocks that the callbacks of each (kind, name) have preserved.
        die: called by a fault that kills the successor.
    """

    def __init__(self, clock: Clock) -> None:
        self.kernel: Any = None
        self.clock = clock
        self.calls: list[Call] = []
        self.fired: list[Fault] = []
        self.keys: set[tuple[str, str, str]] = set()
        self.batched: set[tuple[str, str, str]] = set()
        self.priorities: dict[str, int] = {}
        self.preserved: Counter[tuple[str, str]] = Counter()
        self.die: Callable[[], object] = _kill_myself
        self._faults: dict[tuple[str, str, str], Fault] = {}

    def arm(self, faults: Iterable[Fault]) -> None:
        """Begin a new list of calls, in which *faults* happen."""
        self.calls = []
        self.fired = []
        self.preserved.clear()
        self._faults = {fault.key: fault for fault in faults}

    # ---- the parts of a kernel ----

    def subsystem(self, part: Subsystem) -> Subsystem:
        """Return *part* with its callbacks watched."""
        self.priorities[part.name] = int(part.priority)
        return replace(part, **self._callbacks("subsystem", part.name, part))

    def driver(self, part: Driver) -> Driver:
        """Return *part* with its callbacks watched."""
        key = ("driver", part.name)
        return replace(
            part,
            ops=self._ops(*key, part.ops),
            probe=self._watched((*key, "PROBE"), part.probe),
            shutdown=self._watched((*key, "SHUTDOWN"), part.shutdown),
        )

    def bus(self, part: Bus) -> Bus:
        """Return *part* with its callbacks watched."""
        return replace(part, ops=self._ops("bus", part.name, part.ops))

    def _ops(self, kind: str, name: str, ops: LiveUpdateOps | None) -> LiveUpdateOps | None:
        if ops is None:
            return None
        changed = self._callbacks(kind, name, ops)
        if not isinstance(ops.state_size, int):
            changed["state_size"] = self._watched((kind, name, "STATE_SIZE"), ops.state_size)
        return replace(ops, **changed)

    def _callbacks(self, kind: str, name: str, table: object) -> dict[str, Any]:
        return {
            event: self._watched((kind, name, event.upper()), getattr(table, event))
            for event in _EVENTS
        }

    def _watched(self, key: tuple[str, str, str], callback: Any) -> Any:
        if callback is None:
            return None
        self.keys.add(key)
        if isinstance(callback, Batch):
            self.batched.add(key)
            return batch(partial(self._batch, key, callback))
        if isinstance(callback, NativeCallback):
            callback = partial(_call_native, key, callback)
        return partial(self._single, key, callback)

    # ---- a call ----

    def _single(self, key: tuple[str, str, str], callback: Any, subject: Any) -> Any:
        number = getattr(subject, "index", None)
        devices = () if number is None else (int(number),)
        fault = self._fault(key, devices)
        return self._note(key, devices, lambda: self._act(fault, lambda: callback(subject)))

    def _batch(self, key: tuple[str, str, str], callback: Batch, run: DeviceBatch) -> Any:
        devices = tuple(run.index.tolist())
        fault = self._fault(key, devices)
        if fault is None or fault.device is None:
            return self._note(key, devices, lambda: self._act(fault, lambda: callback(run)))
        return self._note(key, devices, lambda: self._one_of(fault, callback, run))

    def _fault(self, key: tuple[str, str, str], devices: tuple[int, ...]) -> Fault | None:
        fault = self._faults.get(key)
        if fault is None or fault in self.fired:
            return None
        if fault.device is not None and fault.device not in devices:
            return None
        self.fired.append(fault)
        return fault

    def _note(
        self, key: tuple[str, str, str], devices: tuple[int, ...], work: Callable[[], Any]
    ) -> Any:
        ok, wrong = False, devices
        before = self._nr_preserved(key[2])
        try:
            outcome = work()
            if isinstance(outcome, np.ndarray) and key[2] != "STATE_SIZE":
                ok = not outcome.any()
                wrong = tuple(np.array(devices)[np.flatnonzero(outcome)].tolist())
            elif key[2] in _UNHEARD or not failed(outcome):
                ok, wrong = True, ()
            return outcome
        finally:
            self.calls.append(Call(*key, devices, wrong, ok))
            self.preserved[key[:2]] += self._nr_preserved(key[2]) - before

    def _nr_preserved(self, event: str) -> int:
        return self.kernel.kho.nr_preserved if event in ("PREPARE", "REBOOT") else 0

    # ---- a fault ----

    def _act(self, fault: Fault | None, work: Callable[[], Any]) -> Any:
        if fault is None:
            return work()
        if fault.what == "delay":
            outcome = work()
            self.clock.ahead += round(2 * LIMIT * 1e9)
            return outcome
        if fault.what == "memory":
            with exhausted(self.kernel.memory):
                return work()
        if fault.what == "death":
            self.die()
            return work()
        if fault.event not in _INSTEAD:
            work()
        if fault.what == "exception":
            raise RuntimeError("a fault on purpose")
        if fault.event != "STATE_SIZE":
            return _number(fault)
        if fault.what == "errno":
            raise OSError(CODE, os.strerror(CODE))
        return _HUGE

    def _one_of(self, fault: Fault, callback: Batch, run: DeviceBatch) -> Any:
        """Let one device of a batch fail, through the array of results."""
        place = run.index.tolist().index(fault.device)
        result = np.zeros(len(run), np.int32)
        cuts = [(0, len(run))]
        if fault.event in _INSTEAD:
            cuts = [(0, place), (place + 1, len(run))]
        for start, stop in cuts:
            if start < stop:
                part = DeviceBatch(run._devices, run.index[start:stop], run.slots[start:stop])
                outcome = callback(part)
                result[start:stop] = 0 if outcome is None else outcome
        result[place] = _number(fault)
        return result


def _call_native(key: tuple[str, str, str], callback: NativeCallback, device: Device) -> Any:
    """Call a C function for one device, as the engine does for many."""
    kind, name, event = key
    devices = device.devices
    count = len(devices.requested)
    beyond = event in ("RESTORE", "FINISH")
    flags = (devices.preserved, devices.reclaimed) if beyond else (None, None)
    slots = devices.slot_phys, devices.slot_bytes
    scope = NativeScope(devices.kernel.memory, devices.tree.table, event, *slots, *flags)
    recorder = CallRecorder()
    row = np.array([recorder.key("devices", event, kind, name)], np.int32)
    bit = 1 if kind == "driver" else 2  # says which slot it is given
    table = CallTable(np.zeros(count, np.int32), [callback], row, bit, "plain")
    here, done = np.array([device.index], np.int32), np.zeros(count, np.uint8)
    failure = call_devices(recorder, devices, Device, here, 0, 1, False, [table], done, None, scope)
    return None if failure is None else failure[2]


def _number(fault: Fault) -> int:
    return -CODE if fault.what == "errno" else POSITIVE


def _kill_myself() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived SIGKILL")


def rebuild(kernel: Kernel, watch: Watch, quirks: Iterable[str]) -> Kernel:
    """Return a kernel of the parts of *kernel*, which has not booted, watched by *watch*."""
    watch.kernel = Kernel(
        kernel.machine,
        drivers=[watch.driver(driver) for driver in kernel.devices.drivers],
        buses=[watch.bus(bus) for bus in kernel.devices.buses],
        subsystems=[
            watch.subsystem(link.subsystem)
            for link in kernel.luo._chain
            if isinstance(link, SubsystemParticipant)
        ],
        kho_abi=kernel.kho_abi,
        kho_bugs=kernel.kho_bugs,
        release=kernel.release,
        cmdline=kernel.cmdline,
        arch=kernel.arch,
        quirks=sorted(quirks),
        callback_limit=LIMIT,
        clock=watch.clock,
    )
    built: Kernel = watch.kernel
    return built


def mortal(
    machine: Machine,
    name: str,
    cmdline: str | None,
    args: Mapping[str, Any],
    quirks: Iterable[str],
    fault: Mapping[str, Any],
) -> Kernel:
    """Build the image *name* as a kernel that kills its process: a factory for a KernelImage.

    Args:
        machine: the machine.
        name: of the image.
        cmdline: likewise.
        args: likewise.
        quirks: that it has.
        fault: fields of a :class:`Fault` by name; its event may also be ``"LOAD"``,
            ``"VALIDATE"`` or ``"BOOT"``.
    """
    wanted = Fault(**fault)
    if wanted.event == "LOAD":
        _kill_myself()
    watch = Watch(Clock())
    kernel = rebuild(KernelImage(name, cmdline, args).build(machine), watch, quirks)
    step = {"VALIDATE": "validate", "BOOT": "take_over"}.get(wanted.event)
    if step is not None:
        setattr(kernel, step, lambda *args, **kwargs: _kill_myself())
    watch.arm([wanted])
    return kernel


def mortal_image(image: KernelImage, quirks: Iterable[str], fault: Fault) -> KernelImage:
    """Return an image of the same kernel in which *fault* kills the process."""
    arguments = {
        "name": image.name,
        "cmdline": image.cmdline,
        "args": dict(image.args),
        "quirks": sorted(quirks),
        "fault": asdict(fault),
    }
    return KernelImage(f"{__name__}:mortal", args=arguments)


# ---- memory that ends ----


@contextlib.contextmanager
def exhausted(memory: PhysicalMemory) -> Iterator[None]:
    """Have no page free outside scratch while the block runs."""
    hoard = _take_all(memory)
    try:
        yield
    finally:
        for folios in hoard:
            memory.free_folios(folios)


def outside_scratch(memory: PhysicalMemory) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Return the free blocks outside scratch, as :meth:`PhysicalMemory.free_blocks` does."""
    phys, orders = memory.free_blocks()
    outside = np.ones(len(phys), np.bool_)
    for start, nbytes in memory.scratch:
        outside &= (phys < start) | (phys >= start + nbytes)
    return phys[outside], orders[outside]


def _take_all(memory: PhysicalMemory) -> list[Any]:
    counts = np.bincount(outside_scratch(memory)[1]).tolist()
    # Largest first: what is asked for is there as it stands, and nothing is cut up.
    return [
        memory.alloc_folios(count, order)
        for order, count in reversed([*enumerate(counts)])
        if count
    ]


class Allocations:
    """Counts the calls by which a kernel gets memory for its KHO, and lets it end at one of them.

    Args:
        machine: the machine.
        place: at which of them memory ends, and for all after it; 0 for none.

    Attributes:
        count: calls so far.
    """

    _CALLS: Final = ("alloc_preserve", "preserve_folio", "preserve_folios", "preserve_pages")

    def __init__(self, machine: Machine, place: int = 0) -> None:
        self.count = 0
        self._machine = machine
        self._place = place
        self._hoard: list[Any] = []
        self._taker: Any = None

    def __enter__(self) -> Allocations:
        for name in self._CALLS:
            setattr(Kho, name, self._counted(getattr(Kho, name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self._CALLS:
            delattr(Kho, name)  # the compiled base class has them
        if self._machine.running is self._taker:  # else nobody knows any more whose it was
            for folios in self._hoard:
                self._machine.memory.free_folios(folios)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(kho: Kho, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self._place:
                self._taker = self._machine.running
                self._hoard = _take_all(self._machine.memory)
            return call(kho, *args, **kwargs)

        return counted
