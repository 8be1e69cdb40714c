"""Kernels, the images they are built from, boot, and a whole live update."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luo import abi, dma
from luo import quirks as rfc1
from luo._kho import CallRecorder
from luo.agent import Agent, Guest
from luo.clock import CostHook
from luo.dev_liveupdate import DeviceParticipant
from luo.device import Bus, Device, Devices, Driver
from luo.device_files import DeviceFiles
from luo.device_records import DeviceRecords
from luo.errors import (
    CallbackError,
    HandoverError,
    KernelPanic,
    KhoError,
    StateError,
    from_errno,
)
from luo.kexec import (
    ARCHES,
    Arrival,
    Departure,
    LocalSuccessor,
    drained,
    handover_of,
    jump,
    record_of,
)
from luo.kho import Handover, Incoming, Kho, KhoNode
from luo.liveupdate import LuoIncoming, Orchestrator
from luo.machine import Machine
from luo.memory import PhysicalMemory
from luo.notifier import RESTORE, Event, State, Step, Subsystem
from luo.profile.tables import Profile
from luo.remote import RemoteKernel
from luo.report import Report, describe
from luo.reserve_mem import ReservedMemory, ReserveMem
from luo.session import FileHandler, LiveUpdate, MainlineIncoming

__all__ = ["Kernel", "KernelImage", "RemoteKernel", "Report", "dry_run", "live_update"]

_log = logging.getLogger(__name__)

_RELEASE: Final = "7.3.0"
#: Room for the spans of one update: PREPARE, REBOOT, RESTORE and FINISH of driver and bus are
#: eight a device at most, in two kernels.
_SPANS_PER_DEVICE: Final = 4
_SPANS_BESIDES: Final = 4096
Digests: TypeAlias = dict[tuple[str, str], tuple[int, int]]


def _kstrtobool(text: str) -> bool | None:
    """Return what the kernel reads in *text*, None for a value that it refuses (RFC v1 1.2)."""
    if text[:1] in tuple("yYtT1eE"):
        return True
    if text[:1] in tuple("nNfF0dD"):
        return False
    if text[:1] in tuple("oO"):
        return {"n": True, "f": False}.get(text[1:2].lower())
    return None


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The parameters of a kernel's command line that this engine reads.

    Attributes:
        kho: ``kho=``; off unless given, as in the kernel.
        liveupdate: ``liveupdate=``; off unless given.
        kho_scratch: ``kho_scratch=`` as written, or None.
        reserve_mem: every ``reserve_mem=``, in order.
    """

    kho: bool = False
    liveupdate: bool = False
    kho_scratch: str | None = None
    reserve_mem: tuple[ReserveMem, ...] = ()

    @classmethod
    def parse(cls, text: str) -> CommandLine:
        """Read *text*; a malformed value leaves its parameter as it was, with a warning."""
        values: dict[str, Any] = {}
        for word in text.split():
            name, _, value = word.partition("=")
            if name in ("kho", "liveupdate"):
                on = _kstrtobool(value)
                if on is None:
                    _log.warning("malformed early option %r", name)
                else:
                    values[name] = on
            elif name == "kho_scratch":
                values[name] = value
            elif name == "reserve_mem":
                try:
                    values[name] = (*values.get(name, ()), ReserveMem.parse(value))
                except KhoError as error:
                    _log.warning("malformed early option: %s", error)
        return cls(**values)


@dataclass(frozen=True)
class KernelImage:
    """What a kernel in another process is started from.

    Args:
        name: ``"package.module:factory"``; ``factory(machine, **args)`` returns a
            :class:`Kernel` that has not booted. The module must be importable there.
        cmdline: replaces the command line that the factory gave its kernel.
        args: keyword arguments of the factory; JSON values.
    """

    name: str
    cmdline: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.args, Mapping):
            raise TypeError(f"kernel image {self.name!r}: a name, and args by name, are expected")
        module, colon, factory = self.name.partition(":")
        if not (module and colon and factory):
            raise ValueError(f"kernel image {self.name!r}: 'package.module:factory' is expected")

    def build(self, machine: Machine) -> Kernel:
        """Build the kernel on *machine* in this process.

        Raises:
            KhoError: ENOEXEC if there is no such factory, or what it returns is no new kernel.
        """
        module, _, path = self.name.partition(":")
        try:
            factory: Any = importlib.import_module(module)
            for part in path.split("."):
                factory = getattr(factory, part)
        except (ImportError, AttributeError) as error:
            raise from_errno(errno.ENOEXEC, f"kernel image {self.name}: {error}") from error
        if not callable(factory):
            raise from_errno(errno.ENOEXEC, f"kernel image {self.name}: {factory!r} is no factory")
        kernel = factory(machine, **self.args)
        if not isinstance(kernel, Kernel) or kernel.booted:
            raise from_errno(
                errno.ENOEXEC, f"kernel image {self.name}: made {kernel!r}, not a new Kernel"
            )
        if self.cmdline is not None:
            kernel.set_cmdline(self.cmdline)
        kernel.builder = self.build
        return kernel


@dataclass(slots=True)
class _Plan:
    """A handover that has been read and found good, or why it is none."""

    incoming: Incoming | None = None
    luo: LuoIncoming | None = None
    records: DeviceRecords | None = None
    mainline: MainlineIncoming | None = None


def _by_name(kind: str, things: Iterable[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for thing in things:
        if not isinstance(thing, Driver | Bus):
            raise TypeError(f"{kind}: {thing!r} is none")
        if thing.name in named:
            raise ValueError(f"two {kind} are called {thing.name}")
        named[thing.name] = thing
    return named


class Kernel:
    """The software of a machine: one at a time.

    Building one enumerates the machine's devices and binds drivers, as a loaded image does that
    waits; :meth:`boot` makes it run.

    Args:
        machine: the machine.
        drivers, buses, subsystems: what this kernel has.
        file_handlers: what keeps files in sessions, the live update of mainline
            (:mod:`luo.session`); None: a kernel without it. Needs ``kho-v4``.
        kho_abi: generation of the handover, a name in :data:`luo.abi.GENERATIONS`; None is
            ``"kho-v4"``, and RFC v1's own ``"kho-v5-series"`` for its behaviour.
        kho_bugs: mistakes of that generation's kernels to reproduce, as of
            :class:`~luo.kho.Kho`.
        release: what ``uname -r`` would say; handed over in the metadata.
        cmdline: ``kho=``, ``liveupdate=``, ``kho_scratch=`` and ``reserve_mem=`` are read.
        arch: ``"x86_64"`` or ``"arm64"``, which hand over each in its own way; any other has no
            KHO and no live update.
        behaviour: ``"intended"``, what RFC v1 meant, or ``"rfc1"``, what its code does.
        quirks: names in :data:`luo.quirks.QUIRKS` that it has besides; with a ``-`` in front, has
            not.
        workers: threads that call native callbacks which are thread-safe, for devices of one depth
            at a time; all others are called one after the other.
        callback_limit: seconds that a callback may take, None for as long as it likes. A later one
            is ETIMEDOUT when it returns, and in PREPARE and REBOOT everything is rolled back.
        clock: returns nanoseconds; None is the system's monotonic clock.
        cost: what callbacks and phases shall have taken, as of
            :attr:`luo._kho.CallRecorder.cost`; a phase is ("engine", "JUMP", "phase", "jump").
            None: what they took.
        by_device: keep what the callbacks of each device cost, 8 bytes a device.
        spans: keep every single call, in a buffer for so many; True has room for one update. The
            costs by device are kept then, too.
        timing: False times no callback and records nothing of it; phases are timed still.
        observer: called as ``observer(what, name)``, ``what`` being ``"phase"`` when a phase
            begins or ``"state"`` when a state has been reached; also ``"scan"`` when PREPARE
            begins to look for requested devices, and ``"write"`` before the path of a device whose
            ``requested`` is about to change.

    Attributes:
        machine: its machine.
        behaviour: as given.
        quirks: names of all quirks that it has.
        sysfs: directories in ``/sys/kernel`` that somebody else has made.
        luo: its :class:`~luo.liveupdate.Orchestrator`.
        liveupdate: its :class:`~luo.session.LiveUpdate`.
        devices: its :class:`~luo.device.Devices`.
        recorder: what callbacks cost; :attr:`profile` reads it.
        marks: when each phase that it has passed began and ended, on the recorder's clock.
        reserved: the named regions of ``reserve_mem=``.
        arrival: how it came to run, if by :meth:`kexec`.
        agent: the user space that keeps its devices by sessions, None if the orchestrator does.
        strays: where devices may write that it was not told to keep, as of :mod:`luo.dma`.
        on_handover: called with the four numbers in :meth:`kexec` when memory holds what is handed
            over, before the successor looks at it. Its time counts in no phase; what it raises
            cancels the update.
        builder: builds one like it on another machine, for :meth:`clone`; None if nobody can.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        drivers: Iterable[Driver] = (),
        buses: Iterable[Bus] = (),
        subsystems: Iterable[Subsystem] = (),
        file_handlers: Iterable[FileHandler] | None = None,
        kho_abi: str | None = None,
        kho_bugs: Iterable[str] = (),
        release: str = _RELEASE,
        cmdline: str = "kho=on liveupdate=on",
        arch: str = "x86_64",
        behaviour: str = "intended",
        quirks: Iterable[str] = (),
        workers: int = 1,
        callback_limit: float | None = None,
        clock: Callable[[], int] | None = None,
        cost: CostHook | None = None,
        by_device: bool = False,
        spans: bool | int = False,
        timing: bool = True,
        observer: Callable[[str, str], None] | None = None,
    ) -> None:
        if not 1 <= workers <= 1024:
            raise ValueError(f"workers {workers!r}: 1 to 1024 threads")
        if callback_limit is not None and not 0 < callback_limit < 1e9:
            raise ValueError(f"callback_limit {callback_limit!r}: seconds, more than 0")
        if callback_limit is not None and not timing:
            raise ValueError("callback_limit: nobody knows what a callback takes without timing")
        if not isinstance(machine, Machine):
            raise TypeError(f"Kernel: {machine!r} is no Machine")
        kho_abi = rfc1.generation_of(behaviour, kho_abi)
        self.behaviour = behaviour
        self.quirks = rfc1.resolve(behaviour, quirks, kho_abi)
        if "stubs-do-not-compile" in self.quirks and arch != "x86_64":
            raise from_errno(
                errno.ENOEXEC, f"kernel for {arch}: its CONFIG_LIVEUPDATE=n stubs do not compile"
            )
        self.machine = machine
        self.kho_abi = kho_abi
        if file_handlers is not None and kho_abi != "kho-v4":
            raise ValueError(f"file handlers: sessions are handed over in kho-v4, not {kho_abi}")
        self.kho_bugs = abi.generation(kho_abi).check_bugs(kho_bugs)
        self.release = release
        self.arch = arch
        nr_devices = len(machine.devices.parents)
        if spans is True:
            spans = _SPANS_PER_DEVICE * nr_devices + _SPANS_BESIDES
        self._by_device = by_device or bool(spans)
        self.recorder = CallRecorder(clock, spans=int(spans))
        self.recorder.cost = cost if cost is None else self.charging(cost)
        self.recorder.timing = timing
        self.recorder.cost, self.recorder.timing = cost, timing
        self._keeps_spans = bool(spans)
        if callback_limit is not None and "no-callback-limit" not in self.quirks:
            self.recorder.limit_ns = max(1, round(callback_limit * 1e9))
        self.marks: dict[str, tuple[int, int]] = {}
        self.sysfs: set[str] = set()
        self._status = "built"  # then "running", then "gone"
        self.devices = Devices(
            self, machine.devices, _by_name("drivers", drivers), _by_name("buses", buses)
        )
        self.luo = Orchestrator(
            self,
            self.recorder,
            quirks=self.quirks,
            phase=self._phase,
            observer=self.observe,
            notify=machine.notify,
        )
        for subsystem in subsystems:
            self.luo.register(subsystem)
        self._layer = DeviceParticipant(self.devices, self.recorder, workers)
        self.luo.join_devices(self._layer)
        self.liveupdate = LiveUpdate(self, self.recorder, file_handlers, phase=self._phase)
        self.agent: Agent | None = None
        self.observer = observer
        self.on_handover: Callable[[Handover], None] | None = None
        self.builder: Callable[[Machine], Kernel] | None = None
        self._kho: Kho | None = None
        self._plan = _Plan()
        self.arrival: Arrival | None = None
        self._next: LocalSuccessor | RemoteKernel | None = None
        self._restore_failures: tuple[CallbackError, ...] = ()
        self.strays: list[dma.Stray] = []
        self._digests: Digests = {}
        self._digest_ns = 0
        self._finalized_here = False
        self.boot_began_ns = 0
        self.set_cmdline(cmdline)

    def use_sessions(
        self,
        files: DeviceFiles,
        guests: Sequence[Guest] = (),
        subsystems: Iterable[Subsystem] = (),
    ) -> None:
        """Have user space keep devices by sessions, instead of the orchestrator.

        Args:
            files: keeps the devices; its handlers are among those that this kernel was given.
            guests: as of :class:`luo.agent.Agent`.
            subsystems: likewise.
        """
        self.agent = Agent(self, files, guests, subsystems, phase=self._phase)

    def set_cmdline(self, text: str) -> None:
        """Replace the command line, before boot."""
        if self._status != "built":
            raise StateError(errno.EBUSY, "command line: the kernel has booted")
        if not isinstance(text, str):
            raise TypeError(f"command line {text!r}: not a str")
        self.cmdline = text
        self.parameters = CommandLine.parse(text)
        self.reserved = ReservedMemory(self.parameters.reserve_mem)
        self.luo.enabled = self.kho_enabled and self.parameters.liveupdate

    # ---- what it is ----

    @property
    def booted(self) -> bool:
        """Whether it runs, or has run."""
        return self._status != "built"

    @property
    def kho_enabled(self) -> bool:
        """Whether ``kho=`` is on and the architecture hands over at all."""
        return self.parameters.kho and self.arch in ARCHES

    @property
    def memory(self) -> PhysicalMemory:
        """The machine's memory.

        Raises:
            StateError: ESHUTDOWN once this kernel is gone.
        """
        self._require("memory", "built", "running")
        return self.machine.memory

    @property
    def kho(self) -> Kho:
        """Its Kexec HandOver.

        Raises:
            StateError: ESHUTDOWN once it is gone, EOPNOTSUPP before boot and with ``kho=off``.
        """
        self._require("kho", "built", "running")
        if self._kho is None:
            raise StateError(errno.EOPNOTSUPP, "kho: off in this kernel, or it has not booted")
        return self._kho

    @property
    def profile(self) -> Profile:
        """What its callbacks cost; stays readable after the kernel is gone."""
        return Profile.of(self.recorder, self.machine.devices, self.arrival)

    @property
    def phases(self) -> dict[str, int]:
        """Nanoseconds of each phase that it has passed."""
        return {name: end - begin for name, (begin, end) in self.marks.items()}

    @property
    def restore_failures(self) -> tuple[CallbackError, ...]:
        """Every restore callback that failed at boot."""
        return self._restore_failures

    def _require(self, what: str, *statuses: str) -> None:
        if self._status in statuses:
            return
        if self._status == "gone":
            raise StateError(errno.ESHUTDOWN, f"{what}: this kernel is gone")
        raise StateError(errno.EBUSY, f"{what}: the kernel is {self._status}")

    def __repr__(self) -> str:
        return f"<Kernel {self.release} {self._status}>"

    def observe(self, what: str, name: str) -> None:
        """Tell the observer, if there is one."""
        if self.observer is not None:
            self.observer(what, name)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Time a phase, and tell the observer that it begins."""
        self.observe("phase", name)
        if name == "prepare":
            self.recorder.clear_spans()  # those are of the update before
        start = self.recorder.read_clock()
        if name == "restore":  # what comes over is adopted before the first callback
            self._charge(name)
        try:
            yield
        finally:
            if name != "restore":
                self._charge(name)
            self.marks[name] = start, self.recorder.read_clock()

    def _charge(self, phase: str) -> None:
        """Let the time pass that a phase takes beside its callbacks."""
        if self.recorder.cost is not None:
            self.recorder.cost(("engine", phase.upper(), "phase", phase), -1, 0)

    def charging(self, cost: CostHook) -> CostHook:
        """Return *cost*, which moves the clock, so that what a callback reclaims runs after it."""

        def charge(label: tuple[str, str, str, str], device: int, devices: int) -> int:
            ns = cost(label, device, devices)
            if label[1] == RESTORE and self.luo.reclaiming:
                self.luo.note_reclaim()
                self.luo.reclaiming = False
            return ns

        return charge

    # ---- boot ----

    def boot(self, handover: Handover | None = None) -> Kernel:
        """Make it the machine's running kernel.

        Args:
            handover: what the previous kernel left; None is a cold boot, which forgets
                everything. A root that cannot be read is a cold boot as well, with the reason
                logged, as in Linux.

        Returns:
            itself.

        Raises:
            StateError: EBUSY if it has booted, or another kernel runs on the machine.
            KernelPanic: LUO's node is there and not for this kernel.
        """
        self._require("boot", "built")
        running = self.machine.running
        if running is not None:
            raise StateError(errno.EBUSY, f"boot: {running!r} runs on this machine")
        plan = _Plan()
        self.machine.memory.forget()
        if handover is not None:
            try:
                plan = self.validate(handover)
            except HandoverError as error:
                _log.warning("disabling KHO revival: %s", error)
                self.machine.memory.forget()
        return self.take_over(plan)

    def boot_from(self, record: str | None) -> Kernel:
        """Boot from what the kernel before left as this architecture does it.

        A record that cannot be read is a cold boot with the reason logged.
        """
        try:
            handover = handover_of(self.arch, record)
        except HandoverError as error:
            _log.warning("no KHO data: %s", error)
            handover = None
        return self.boot(handover)

    def validate(self, handover: Handover | None) -> _Plan:
        """Read what the previous kernel left, without a write to the memory.

        Raises:
            HandoverError: it breaks a rule of the format.
            KernelPanic: LUO's node, or mainline's, is there and not for this kernel.
        """
        if handover is None:
            return _Plan()
        plan = _Plan(
            Kho.validate(self.machine.memory, handover, abi=self.kho_abi, bugs=self.kho_bugs)
        )
        assert plan.incoming is not None
        plan.luo = LuoIncoming.read(plan.incoming)
        if plan.luo is not None:
            if not self.luo.enabled:
                raise KernelPanic(f"{abi.LUO_NODE}: found, but live update is off in this kernel")
            self.devices.rescan()  # what was plugged in after this kernel was loaded
            plan.records = DeviceRecords.read(plan.incoming, plan.luo, self.devices)
        if self.liveupdate.present and self.kho_enabled:
            plan.mainline = MainlineIncoming.read(plan.incoming)
        return plan

    def take_over(self, plan: _Plan, verify: bool = False) -> Kernel:
        """Run from a handover that :meth:`validate` found good; the first write is in here."""
        return drained(self.taking_over(plan, verify, bulk=True))

    def taking_over(
        self, plan: _Plan, verify: bool, *, bulk: bool = False
    ) -> Generator[Step, None, Kernel]:
        """Run :meth:`take_over`, and yield the restore callbacks as steps unless *bulk*."""
        self.boot_began_ns = self.recorder.read_clock()
        with self._phase("boot"):
            self._plan = plan
            self._status = "running"
            self.machine.running = self
            if plan.incoming is not None:
                self._kho = Kho.boot(
                    self.machine.memory, plan.incoming, abi=self.kho_abi, release=self.release
                )
            elif self.kho_enabled:
                self._kho = Kho(
                    self.machine.memory,
                    abi=self.kho_abi,
                    bugs=self.kho_bugs,
                    scratch=self.parameters.kho_scratch,
                    release=self.release,
                )
            self.reserved.reserve(self.machine.memory, self._kho if self.kho_enabled else None)
            self._initialise()
            self.luo.startup(plan.luo)
            self.liveupdate.startup(plan.mainline)
        escaped = dma.escaping(self.machine, plan.incoming)  # before anybody restores
        if plan.luo is not None and plan.records is not None:
            if verify:  # outside both phases: an instrument, not a part of the update
                began = self.recorder.read_clock()
                self._digests = plan.records.digests(self.machine.memory, self.devices)
                self._digest_ns = self.recorder.read_clock() - began
            with self._phase("restore"):
                if "flags-not-restored" not in self.quirks:
                    self._layer.adopt(plan.records)
                else:
                    self.devices.clear_slots()
                if bulk:
                    self._restore_failures = self.luo.restore()
                else:
                    self._restore_failures = yield from self.luo.restoring()
        self._probe(self._each("probe"))
        self.strays = dma.catch(self, escaped)
        if self.machine.control is not None:
            self.machine.control.start(self)
        return self

    def _initialise(self) -> None:
        """Make LUO's directory in ``/sys/kernel``, unless live update is off (RFC v1 1.2)."""
        if not self.luo.enabled:
            if self.parameters.liveupdate and "disabled-by-user" not in self.quirks:
                _log.info("live update: disabled, KHO is off")
            else:
                _log.info("live update: disabled by user")
            return
        made = "liveupdate" not in self.sysfs
        if not made:
            _log.error("live update: /sys/kernel/liveupdate: %s", os.strerror(errno.EEXIST))
        self.luo.initialised = made or "initialised-despite-failure" in self.quirks

    def note_devices(self, count: int) -> None:
        """Be ready for the callbacks of so many devices."""
        if self._by_device:
            self.recorder.cover(count)

    def probe(self, indices: NDArray[np.int32]) -> None:
        """Probe the devices with these numbers, those whose driver has a probe."""
        wanted = set(indices.tolist())
        self._probe([device for device in self._each("probe") if device.index in wanted])

    def restore_device(self, index: int) -> None:
        """Restore a device that came over and was bound to a driver after boot."""
        self._layer.restore_device(index)

    def note_binding(self, index: int) -> None:
        """Let an update that is prepared know that a device has another driver."""
        self._layer.note_binding(index)

    def kho_node(self, owner: Device | Driver | Bus) -> KhoNode:
        """Return the KHO node of *owner*; see :attr:`luo.device.Device.kho_node`."""
        return self._layer.kho_node(owner)

    def _probe(self, devices: Iterable[Device]) -> None:
        """Probe bound devices; who fails stays unbound."""
        for device in devices:
            driver = device.driver
            assert driver is not None
            assert driver.probe is not None
            try:
                driver.probe(device)
            except Exception:
                _log.warning(
                    "probe of %s with driver %s failed", device.path, driver.name, exc_info=True
                )
                self.devices.driver_ids[device.index] = -1

    def _each(self, callback: str) -> list[Device]:
        """Return the devices, not preserved, whose driver has *callback*."""
        self.devices.rescan()
        wanted = [getattr(driver, callback) is not None for driver in self.devices.drivers]
        if not any(wanted):
            return []
        mask = np.array([*wanted, False], np.bool_)[self.devices.driver_ids]
        mask &= ~self.devices.preserved & self.devices.tree.alive
        return [Device(self.devices, int(index)) for index in np.flatnonzero(mask)]

    def boot_result(self) -> dict[str, Any]:
        """Return what boot and restore came to, in JSON values, for :class:`Arrival`."""
        records = self._plan.records
        told = {
            "boot_began_ns": self.boot_began_ns,
            "phases": {name: self.phases.get(name, 0) for name in ("boot", "restore")},
            "digest_ns": self._digest_ns,
            "last_reclaim_ns": self.luo.last_reclaim_ns,
            "restored_late": self.luo.restored_late if self.luo.last_reclaim_ns else [],
            "reclaimed": int(self.devices.reclaimed.sum()),
            "digests": [[*key, *value] for key, value in self._digests.items()],
            "records_without_device": [] if records is None else records.without_device,
            "devices_without_record": 0 if records is None else records.devices_without_record,
            "failures": [describe(error) for error in self._restore_failures],
            "dma": [stray._asdict() for stray in self.strays],
        }
        return told if self.agent is None else told | self.agent.result()

    def clone(self) -> Kernel:
        """Return a kernel like this one on a clone of its machine: for one more measurement.

        It has booted cold, and has the same requests, and the same next kernel loaded if one is.
        Only what knows how it was built can be built again: :func:`luo.workloads.load` and
        :class:`KernelImage` make such kernels.

        Raises:
            StateError: EOPNOTSUPP if this kernel, or the next one, was built by hand.
        """
        self._require("clone", "running")
        local = self._next.kernel if isinstance(self._next, LocalSuccessor) else None
        for kernel in (self, local):
            if kernel is not None and kernel.builder is None:
                raise StateError(errno.EOPNOTSUPP, f"clone: nobody knows how {kernel!r} was built")
        assert self.builder is not None
        made = self.builder(self.machine.clone()).boot()
        made.devices.request(self.devices.requested)
        if isinstance(self._next, RemoteKernel):
            made.kexec_load(self._next.image)
        elif local is not None:
            assert local.builder is not None
            made.kexec_load(local.builder(made.machine))
        return made

    # ---- kexec ----

    @property
    def kexec_loaded(self) -> bool:
        """Whether a next kernel is loaded, as ``/sys/kernel/kexec_loaded`` says."""
        return self._next is not None

    def kexec_load(self, next: Kernel | KernelImage, *, timeout: float = 60.0) -> None:
        """Load the next kernel, which waits until the jump.

        What PREPARE will write is touched here, so that no timed phase meets memory for the
        first time.

        Args:
            next: a :class:`KernelImage` starts another process; a :class:`Kernel` of the same
                machine that has not booted takes over in this one.
            timeout: seconds in which the other process must be ready.

        Raises:
            SuccessorError: ENOEXEC, ECHILD or ETIMEDOUT; nothing has changed.
            ValueError: the kernel is of another machine, or has booted.
        """
        self._require("kexec_load", "running")
        if isinstance(next, Kernel):
            if next.machine is not self.machine or next.booted:
                raise ValueError("kexec_load: not a new kernel of this machine")
            successor: LocalSuccessor | RemoteKernel = LocalSuccessor(next)
        elif isinstance(next, KernelImage):
            successor = RemoteKernel(self.machine, next, timeout)
        else:
            raise TypeError(f"kexec_load: {next!r} is neither Kernel nor KernelImage")
        self.kexec_unload()
        self._next = successor
        self.prefault()

    def kexec_unload(self) -> None:
        """Drop the loaded kernel, if there is one."""
        if self._next is not None:
            self._next.close()
            self._next = None

    def prefault(self) -> None:
        """Touch the memory that PREPARE will allocate for slots and records."""
        self.recorder.touch()
        if self._kho is not None and self.luo.enabled:
            self._kho.place_segments()
            (self._layer if self.agent is None else self.agent).prefault()

    def kexec(
        self, *, preflight: bool = True, timeout: float = 60.0, verify: bool = False
    ) -> Kernel | RemoteKernel:
        """Jump into the loaded kernel; a live update if one is prepared.

        Args:
            preflight: let the successor check first, and cancel if it refuses. False does what
                a real kernel does: what cannot be read is a cold boot, a LUO that does not fit
                a :class:`KernelPanic`.
            timeout: seconds for the successor's answer.
            verify: digest the slots before and after; not part of any phase.

        Returns:
            the kernel that runs now. This one is gone.

        Raises:
            StateError: EINVAL if no kernel is loaded, EDEADLK from a callback.
            CallbackError: a REBOOT callback failed; the state is NORMAL.
            SuccessorError: the successor did not take over; the state is NORMAL.
            HostCrashError: it died after the commit point.
        """
        return drained(self._kexec(True, preflight, timeout, verify))

    def kexec_steps(self, *, verify: bool = False) -> Generator[Step, None, Kernel]:
        """Jump as :meth:`kexec` does, one REBOOT or restore callback at a time.

        The steps are as of :meth:`luo.liveupdate.Orchestrator.steps` with *ahead*. Closing the
        generator, or an exception thrown into it, cancels while this kernel runs; after that what
        is left is completed.

        Yields:
            the steps, in order.

        Raises:
            StateError: EINVAL if no kernel is loaded in this process.
        """
        if not isinstance(self._next, LocalSuccessor):
            raise StateError(errno.EINVAL, "kexec by steps: no kernel is loaded in this process")
        kernel = yield from self._kexec(False, True, 0.0, verify)
        assert isinstance(kernel, Kernel)
        return kernel

    def _kexec(
        self, bulk: bool, preflight: bool, timeout: float, verify: bool
    ) -> Generator[Step, None, Kernel | RemoteKernel]:
        self._require("kexec", "running")
        self.luo.refuse_callback("kexec")
        self.liveupdate.refuse_callback("kexec")
        if self._next is None:
            if "no-image-check" in self.quirks and self.luo.reboot():
                self.luo.cancel()
            raise StateError(errno.EINVAL, "kexec: no kernel image is loaded")
        successor, self._next = self._next, None
        return (
            yield from jump(
                self,
                successor,
                clock=self.recorder.read_clock,
                cost=self.recorder.cost,
                preflight=preflight,
                timeout=timeout,
                verify=verify,
                rebooting=None if bulk else self._rebooting(verify),
            )
        )

    def reboot(self, verify: bool) -> Departure:
        """Run REBOOT and say what is handed over: the first part of :func:`luo.kexec.jump`.

        REBOOT may have run, one callback at a time.
        """
        frozen = self._freeze()
        return self._departure(self.luo.published or self.luo.reboot(), verify, frozen)

    def _rebooting(self, verify: bool) -> Generator[Step, None, Departure]:
        """Run :meth:`reboot` one callback at a time."""
        frozen = self._freeze()
        live = self.luo.state is State.PREPARED
        if live and not self.luo.published:
            yield from self.luo.steps(Event.REBOOT, ahead=True)
        return self._departure(live, verify, frozen)

    def _freeze(self) -> bool:
        if self.machine.control is not None:
            self.machine.control.settle()
        return self.liveupdate.freeze()

    def _departure(self, live: bool, verify: bool, frozen: bool) -> Departure:
        handover = self._hand_over(live)
        ended = self.recorder.read_clock()
        if handover is not None and self.on_handover is not None:
            self.on_handover(handover)
        digests: Digests = {}
        if verify and self.agent is not None:
            digests = self.agent.digests()
        elif verify and live:
            digests = self._layer.digests()
        began = [ended]
        if frozen:
            began.append(self.liveupdate.freeze_began_ns)
        if live:
            began.append(self.luo.reboot_began_ns)
        return Departure(
            live=live or frozen,
            pid=os.getpid(),
            handover=None if handover is None else record_of(self.arch, handover),
            reboot_began_ns=min(began),
            reboot_ended_ns=ended,
            digests=[[*key, *value] for key, value in digests.items()],
            image={**self.image_sizes(), **self._folios()},
            preserved=int(self.devices.preserved.sum()),
            requested=int(self.devices.requested.sum()),
            marks={name: list(mark) for name, mark in self.marks.items()},
        )

    def _hand_over(self, live: bool) -> Handover | None:
        kho = self._kho
        if kho is None or not self.kho_enabled:
            return None  # with kho=off what came in can be read, nothing goes out (kho-abi 9.3)
        if not live and not kho.finalized and kho.generation.finalize != "jump":
            return None  # Linux fills the image's KHO fields only when it is finalized
        self._finalized_here = not kho.finalized
        return kho.handover()

    def take_back(self) -> None:
        """Undo what :meth:`reboot` did, but for REBOOT itself: the kexec did not happen."""
        if self._kho is not None and self._finalized_here:
            self._kho.unfinalize()
        self._finalized_here = False
        self.luo.take_back()
        self.liveupdate.unfreeze()

    def image_sizes(self) -> dict[str, int]:
        """Return the ``image`` object of ``luo run --json``: bytes and pages handed over."""
        if self._kho is None:
            return dict.fromkeys(
                ("root_fdt_bytes", "device_tree_bytes", "map_bytes", "preserved_pages"), 0
            )
        return {
            "root_fdt_bytes": self._kho.root_bytes,
            "device_tree_bytes": (self._layer if self.agent is None else self.agent).record_bytes,
            "map_bytes": self._kho.tree_pages * self.machine.memory.page_size,
            "preserved_pages": self._kho.preserved_pages,
        }

    def _folios(self) -> dict[str, dict[int, int]]:
        """Return how many folios of each order are handed over, if spans are kept: it is a walk."""
        if self._kho is None or not self._keeps_spans:
            return {}
        counts = np.zeros(256, np.int64)
        for _, orders in self._kho.preserved_chunks(1 << 16):
            counts += np.bincount(orders, minlength=256)
        return {"folios": {int(order): int(counts[order]) for order in np.flatnonzero(counts)}}

    def depart(self) -> None:
        """Be gone: the commit point is passed."""
        self._shutdown_devices()
        self._end()

    def _end(self) -> None:
        self.kexec_unload()
        self._status = "gone"
        if self._kho is not None:
            self._kho.close()
        self.luo.close()
        self.liveupdate.close()
        self.devices.close()
        if self.machine.running is self:
            self.machine.running = None
            if self.machine.control is not None:
                self.machine.control.stop()

    def _shutdown_devices(self) -> None:
        """Call shutdown of every device that is not preserved (RFC v1 1.11)."""
        for device in reversed(self._each("shutdown")):
            driver = device.driver
            assert driver is not None
            assert driver.shutdown is not None
            try:
                driver.shutdown(device)
            except Exception:
                _log.warning("shutdown of %s failed", device.path, exc_info=True)

    def shutdown(self) -> None:
        """Switch the machine off; the kernel is gone.

        LUO has no part in it: a prepared update is not cancelled, and its devices are not shut down
        (RFC v1 1.4, 1.11).

        Raises:
            StateError: ESHUTDOWN if it is gone already, EDEADLK from a callback.
        """
        self._require("shutdown", "built", "running")
        self.luo.refuse_callback("shutdown")
        self.depart()

    def close(self) -> None:
        """Be gone, if not gone already, as by a power cut: what ``with`` and tests call.

        From a callback too: its event then ends with ``StateError(ESHUTDOWN)``.
        """
        if self._status != "gone":
            self._end()

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _front(kernel: Kernel | RemoteKernel) -> Any:
    """Return who runs an update: user space with its sessions, or else the orchestrator."""
    return kernel.luo if kernel.agent is None else kernel.agent


def dry_run(kernel: Kernel | RemoteKernel, *, report: Report | None = None) -> Report:
    """Run PREPARE and REBOOT of *kernel*, and cancel instead of the jump.

    Args:
        kernel: the running kernel, with devices requested.
        report: where to write; filled as far as it went when an exception is raised.

    Returns:
        the report; the kernel is NORMAL as before.

    Raises:
        CallbackError: a callback failed; the update was cancelled.
    """
    report = report if report is not None else Report()
    report.begin(kernel)
    front = _front(kernel)
    with report.watch(kernel):
        front.prepare()
        report.note_state(kernel)
        report.note_dry(kernel, front.dry_reboot())
    return report


def live_update(
    kernel: Kernel | RemoteKernel,
    next: Kernel | KernelImage | None = None,
    *,
    repeat: int = 1,
    in_process: bool = False,
    timeout: float = 60.0,
    report: Report | None = None,
) -> Report:
    """Update *kernel* to *next*, and finish: load, PREPARE, REBOOT, jump, restore, FINISH.

    Args:
        kernel: the running kernel, with devices requested.
        next: an image starts a second process (or, *in_process*, is built here); a kernel of
            the same machine takes over in this process; None is the one that is loaded.
        repeat: how many updates in a row; each new kernel gets the same requests. More than
            one needs an image.
        in_process: build the image's kernel in this process.
        timeout: seconds for the successor's answers.
        report: where to write; filled as far as it went when an exception is raised.

    Returns:
        the report; its ``kernel`` runs now, and is the caller's to close.

    Raises:
        CallbackError, SuccessorError: the update was cancelled, *kernel* is NORMAL.
        HostCrashError, KernelPanic: the new kernel did not survive; there is none.
    """
    if repeat < 1:
        raise ValueError(f"repeat {repeat}: at least 1")
    if repeat > 1 and not isinstance(next, KernelImage):
        raise ValueError("repeat: a kernel boots once; give an image")
    report = report if report is not None else Report()
    report.begin(kernel)
    for _ in range(repeat):
        requested = kernel.devices.requested.copy()
        here = isinstance(next, KernelImage) and in_process
        successor = next.build(kernel.machine) if here else next  # type: ignore[union-attr]
        with report.watch(kernel):
            if successor is None:
                pass  # loaded already
            elif isinstance(kernel, RemoteKernel):
                assert isinstance(successor, KernelImage)
                kernel.kexec_load(successor, timeout=timeout)
            else:
                kernel.kexec_load(successor, timeout=timeout)
            agent = kernel.agent
            _front(kernel).prepare()
            report.note_state(kernel)
            kernel = (kernel if agent is None else agent).kexec(timeout=timeout, verify=True)
            if kernel.agent is not None:
                kernel.agent.retrieve(verify=True)
            report.note_state(kernel)
            report.note_finish(kernel, _front(kernel).finish())
        if repeat > 1:
            kernel.devices.request(requested)
    return report
