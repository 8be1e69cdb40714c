"""RFC v1's orchestrator and device layer said plainly: lists, dicts and sets, and no engine code.

Written from ``spec/luo-rfc-v1.md`` (numbers in comments are its sections, "quirk" its list 1.14),
as an oracle for the engine. A :class:`Kernel` is told what happens and says what comes of it:
success or errno, every callback in order, flags, references and state. Where the specification is
silent it says what this engine promises in its docstrings, and marks it "ours".
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

NORMAL, PREPARED, UPDATED = "NORMAL", "PREPARED", "UPDATED"
PREPARE, REBOOT, FINISH, CANCEL, RESTORE = "PREPARE", "REBOOT", "FINISH", "CANCEL", "RESTORE"

#: (event, kind, name, path of the device or None); probe and shutdown are events of a driver.
Call = tuple[str, str, str, "str | None"]


# ---- what there is ----


@dataclass(frozen=True)
class Owner:
    """A driver or bus: the callbacks of its table, or None without one."""

    name: str
    table: frozenset[str] | None
    reclaims: bool = True  # whether its restore callback reclaims the device


@dataclass(frozen=True)
class Subsystem:
    """A subsystem: its place in the chain and the events that it has callbacks for."""

    name: str
    priority: int
    events: frozenset[str]


@dataclass(frozen=True)
class Software:
    """What a kernel image has."""

    drivers: tuple[Owner, ...] = ()
    buses: tuple[Owner, ...] = ()
    subsystems: tuple[Subsystem, ...] = ()
    enabled: bool = True  # liveupdate=


@dataclass
class Hardware:
    """One device: where it is and what it names."""

    path: str
    parent: int | None
    bus: str | None
    driver: str | None
    alive: bool = True


@dataclass
class Machine:
    """The devices, by number, in the order of registration."""

    devices: list[Hardware] = field(default_factory=list)

    def add(self, name: str, parent: int | None, bus: str | None, driver: str | None) -> int:
        """Plug a device in; returns its number."""
        path = name if parent is None else f"{self.devices[parent].path}/{name}"
        self.devices.append(Hardware(path, parent, bus, driver))
        return len(self.devices) - 1

    def remove(self, number: int) -> None:
        """Unplug a device and all below it."""
        for other, device in enumerate(self.devices):
            if number in (other, *self.above(other)):
                device.alive = False

    def above(self, number: int) -> list[int]:
        """Ancestors, nearest first."""
        parent = self.devices[number].parent
        return [] if parent is None else [parent, *self.above(parent)]

    def alive(self) -> list[int]:
        """Numbers of the devices that are there."""
        return [number for number, device in enumerate(self.devices) if device.alive]


@dataclass(frozen=True)
class Record:
    """What is handed over of a device."""

    path: str
    bus: str | None
    has_driver: bool


# ---- what goes wrong ----


@dataclass(frozen=True)
class Raises:
    """What a callback is told to do: raise OSError with an errno, or without one ValueError."""

    errno: int | None


@dataclass(frozen=True)
class Failure:
    """A callback that failed: errno 0 is quirk 9, a positive return that counts as success."""

    call: Call
    errno: int
    returned: int | None


class Refused(Exception):
    """An operation failed with an errno.

    Attributes:
        failure: the callback, if it was one and not the device layer itself.
        undone: callbacks that failed on the way back.
    """

    def __init__(self, code: int, failure: Failure | None = None, undone: list = ()) -> None:
        super().__init__(errno.errorcode.get(code, str(code)))
        self.errno = code
        self.failure = failure if failure is None or failure.call[2] else None
        self.undone = list(undone)


class Panic(Exception):
    """The next kernel may not go on (1.3)."""


#: The devices' own place in the chain: registered late in boot, after what is built in (1.2).
DEVICES = Subsystem("devices", 1, frozenset())


@dataclass
class Handover:
    """What the next kernel finds: LUO's node, and records in PREPARE's order."""

    node: bool = False
    records: list[Record] = field(default_factory=list)


class Kernel:
    """LUO of one kernel and its device layer.

    Attributes:
        faults: what a callback does at a call: it :class:`Raises`, or returns a number.
        calls: every call so far.
    """

    def __init__(self, machine: Machine, software: Software, quirks: frozenset[str]) -> None:
        self.machine = machine
        self.quirks = quirks
        self.enabled = software.enabled
        self.drivers = {driver.name: driver for driver in software.drivers}
        self.buses = {bus.name: bus for bus in software.buses}
        self.chain = [*software.subsystems, DEVICES]
        self.state = NORMAL
        self.faults: dict[Call, object] = {}
        self.calls: list[Call] = []
        self.bound: dict[int, str | None] = {}
        self.orphans: set[int] = set()  # lost their driver while they were requested (quirk 12)
        self.requested: set[int] = set()
        self.preserved: set[int] = set()
        self.reclaimed: set[int] = set()
        self.list: list[int] | None = None  # of PREPARE
        self.held: list[int] = []  # of the next kernel, until FINISH
        self.scanned: list[int] = []  # the kernel's list of devices: who is bound moves to its end
        self.leaked: list[int] = []  # references that nobody drops (quirk 16)
        self.records: list[Record] = []
        self.waiting: set[int] = set()  # came over with a driver that is not here
        self.node = False  # LUO's node is in KHO
        self.warned: set[tuple[str, str]] = set()  # (participant, event)
        self.next: Kernel | None = None
        self.restore_failures: list[Failure] = []
        self._collected: list[Failure] = []  # of callbacks that stop nothing
        self.rescan()

    def rescan(self) -> None:
        """Bind the devices that are new to what their hardware names."""
        for number in range(len(self.bound), len(self.machine.devices)):
            name = self.machine.devices[number].driver
            self.bound[number] = name if name in self.drivers else None
            self.scanned.append(number)

    # ---- calling ----

    def _call(self, event: str, kind: str, name: str, device: int | None) -> Failure | None:
        path = None if device is None else self.machine.devices[device].path
        call = (event, kind, name, path)
        self.calls.append(call)
        outcome = self.faults.get(call)
        if not outcome:
            return None
        if isinstance(outcome, Raises):
            return Failure(call, outcome.errno or errno.EIO, None)
        if outcome < 0:
            return Failure(call, -outcome, outcome)
        stops = "positive-return-stops" in self.quirks and event != RESTORE
        return Failure(call, 0 if stops else errno.EINVAL, outcome)

    def _on_device(self, event: str, kind: str, device: int) -> Failure | None:
        """Call what driver or bus has for *event*; a missing table counts as success (1.10)."""
        if kind == "driver":
            owner = self.drivers.get(self.bound[device])
        else:
            owner = self.buses.get(self.machine.devices[device].bus)
        if owner is None or owner.table is None or event.lower() not in owner.table:
            return None
        failure = self._call(event, kind, owner.name, device)
        if event == RESTORE and failure is None and owner.reclaims:
            self.reclaimed.add(device)
        return failure

    # ---- the chain (1.6) ----

    def order(self, event: str) -> list[Subsystem]:
        """The chain in the order of *event*: by priority, then by registration."""
        downwards = "priorities-inverted" in self.quirks
        chain = sorted(self.chain, key=lambda part: part.priority, reverse=downwards)
        backwards = event == RESTORE or (
            event in (FINISH, CANCEL) and "cancel-not-reversed" not in self.quirks
        )
        return chain[::-1] if backwards else chain

    def _notify(self, part: Subsystem, event: str) -> Failure | None:
        if part == DEVICES:
            return getattr(self, f"_devices_{event.lower()}")()
        if event.lower() in part.events:
            return self._call(event, "subsystem", part.name, None)
        return None

    def _send(self, event: str, parts: list[Subsystem]) -> list[Failure]:
        """Send an event whose failures stop nothing, or with quirk 13 those behind them."""
        heard: list[Failure] = []
        for part in self.order(event):
            if part not in parts:
                continue
            failure = self._notify(part, event)
            failures = self._collect() if failure is None or not failure.errno else [failure]
            heard += self._heard(event, part, failures)
            stops = "failure-stops-the-rest" in self.quirks and event != RESTORE
            if failure is not None and stops:  # also a positive return, of which nobody hears
                break
        return heard

    def _collect(self) -> list[Failure]:
        collected, self._collected = self._collected, []
        return collected

    def _heard(self, event: str, part: Subsystem, failures: list[Failure]) -> list[Failure]:
        """What anybody hears of the failures of one participant: quirk 23, the first per boot."""
        if "warn-once" not in self.quirks or event == RESTORE or not failures:
            return failures
        told = [] if (part.name, event) in self.warned else failures[:1]
        self.warned.add((part.name, event))
        return told

    # ---- events (1.4) ----

    def _need(self, state: str) -> None:
        if not self.enabled:
            raise Refused(errno.EOPNOTSUPP)  # ours: the RFC has no files to write to then
        if self.state != state:
            raise Refused(errno.EINVAL)

    def prepare(self) -> None:
        """Write 1 to ``prepare``: a robust chain, the failing one gets no CANCEL."""
        self._need(NORMAL)
        self.list, self.records = None, []  # quirk 13 may have kept CANCEL from it: ours
        done: list[Subsystem] = []
        for part in self.order(PREPARE):
            failure = self._notify(part, PREPARE)
            if failure is not None:
                undone = self._heard(CANCEL, DEVICES, self._collect()) + self._send(CANCEL, done)
                if failure.errno:
                    raise Refused(failure.errno, failure, undone)
                break  # 1.7: those before were cancelled, and yet it counts as success
            done.append(part)
        self.state = PREPARED

    def cancel(self) -> list[Failure]:
        """Write 0 to ``prepare``: always NORMAL; returns what failed."""
        self._need(PREPARED)
        return self._cancel()

    def _cancel(self) -> list[Failure]:
        failures = self._send(CANCEL, self.chain)
        if "node-left-behind" not in self.quirks:
            self.node = False
        self.state = NORMAL
        return failures

    def reboot(self) -> bool:
        """The hook of the reboot system call: False, and nothing happens, unless PREPARED."""
        if self.state != PREPARED:
            return False
        for part in self.order(REBOOT):
            failure = self._notify(part, REBOOT)
            if failure is not None:
                undone = self._heard(CANCEL, DEVICES, self._collect())
                if failure.errno:
                    raise Refused(failure.errno, failure, undone + self._cancel())
                break  # 1.7: the kexec goes ahead
        if self.node:  # only quirk 5 leaves it: kho_add_node() returns 1
            self._cancel()
            raise Refused(1)
        self.node = True
        return True

    def dry_reboot(self) -> list[Failure]:
        """REBOOT without a reboot (2, number 4): REBOOT, then CANCEL."""
        self._need(PREPARED)
        self.reboot()
        return self.cancel()

    def finish(self) -> tuple[list[str], list[Failure]]:
        """Write 1 to ``finish``: always NORMAL; returns who was not reclaimed and what failed."""
        self._need(UPDATED)
        lost = self._unreclaimed()
        failures = self._send(FINISH, self.chain)
        self.state = NORMAL
        self._probe(lost)  # ours: what nobody restored is a new device
        return [self.machine.devices[number].path for number in lost], failures

    def _unreclaimed(self) -> list[int]:
        return [
            number for number in self.machine.alive() if number in self.preserved - self.reclaimed
        ]

    # ---- who takes part (1.6) ----

    def register(self, subsystem: Subsystem) -> None:
        """Join the chain."""
        self._unprepared()
        if any(part.name == subsystem.name for part in self.chain):
            raise Refused(errno.EEXIST)
        self.chain.append(subsystem)

    def unregister(self, name: str) -> None:
        """Leave the chain."""
        self._unprepared()
        for part in self.chain:
            if part.name == name and part != DEVICES:
                self.chain.remove(part)
                return
        raise Refused(errno.ENOENT)

    def _unprepared(self) -> None:
        if self.state == PREPARED and "register-when-prepared" not in self.quirks:
            raise Refused(errno.EBUSY)

    # ---- requested (1.9) ----

    def request(self, device: int, on: bool) -> None:
        """Write ``requested``."""
        if on == (device in self.requested):
            return  # no lock, no state, no eligibility
        if self.state != NORMAL:
            raise Refused(errno.EINVAL)
        if not on:
            self.requested.remove(device)
        elif self.eligible(device):
            self.requested.add(device)
        else:
            raise Refused(errno.EINVAL)
        self.orphans.discard(device)

    def supports(self, device: int) -> bool:
        """Whether driver and bus, where there are any, have a table."""
        driver, bus = self.bound[device], self.machine.devices[device].bus
        driver_ok = driver is None or self.drivers[driver].table is not None
        bus_ok = bus is None or (bus in self.buses and self.buses[bus].table is not None)
        return driver_ok and bus_ok

    def eligible(self, device: int) -> bool:
        """Whether it may be requested; quirk 27 asks all ancestors as well."""
        asked = [device]
        if "all-ancestors" in self.quirks:
            asked += self.machine.above(device)
        return all(self.supports(number) for number in asked)

    # ---- devices in an update (1.10 to 1.12) ----

    def preserve_list(self) -> list[int]:
        """Requested devices as registered, each with ancestors; then by depth, stable."""
        chosen: list[int] = []
        for device in self.machine.alive():
            if device in self.requested:
                for number in (device, *self.machine.above(device)):
                    strange = "all-ancestors" not in self.quirks and number != device
                    if strange and not self.supports(number):
                        continue  # left alone
                    if number not in chosen:
                        chosen.append(number)
        return sorted(chosen, key=lambda number: -len(self.machine.above(number)))

    def _devices_prepare(self) -> Failure | None:
        self.rescan()
        if "eligibility-checked-once" not in self.quirks:
            for device in self.machine.alive():
                lost = device in self.orphans or not self.eligible(device)
                if device in self.requested and lost:
                    return Failure((PREPARE, "devices", "", None), errno.EINVAL, None)
        self.list = self.preserve_list()
        self.held = []  # quirk 13 may have kept FINISH from it: ours
        if "reference-leak" in self.quirks:
            self._leak()
        for place, device in enumerate(self.list):
            failure = self._on_device(PREPARE, "driver", device)
            if failure is None:
                failure = self._on_device(PREPARE, "bus", device)
                if failure is not None:
                    self._void(CANCEL, "driver", device)
            if failure is not None:
                self.preserved.difference_update(self.list)  # also what quirk 7 had left: ours
                self._cancel_devices(place)
                return failure
            self.preserved.add(device)
        found = [(number, self.machine.devices[number]) for number in self.list]
        self.records = [
            Record(device.path, device.bus, self.bound[number] is not None)
            for number, device in found
        ]
        return None

    def _leak(self) -> None:
        """Keep a reference on requested devices that a requested child has brought in already."""
        brought: set[int] = set()
        for device in self.scanned:
            if device in self.requested and self.machine.devices[device].alive:
                if device in brought:
                    self.leaked.append(device)
                brought.update(self.machine.above(device))

    def _void(self, event: str, kind: str, device: int) -> None:
        """Call FINISH, CANCEL or RESTORE, which cannot stop the walk (1.8)."""
        failure = self._on_device(event, kind, device)
        if failure is not None and failure.errno:
            self._collected.append(failure)

    def _cancel_devices(self, count: int) -> None:
        """Cancel the first *count* of the list in reverse, bus before driver; free the list."""
        for device in reversed((self.list or [])[:count]):
            self._void(CANCEL, "bus", device)
            self._void(CANCEL, "driver", device)
            self.preserved.discard(device)
        self.list = None
        self.records = []

    def _devices_cancel(self) -> None:
        self._cancel_devices(len(self.list or []))

    def _devices_reboot(self) -> Failure | None:
        for place, device in enumerate(self.list or []):
            failure = self._on_device(REBOOT, "driver", device)
            side = "driver"
            if failure is None:
                failure, side = self._on_device(REBOOT, "bus", device), "bus"
            if failure is None:
                continue
            if "reboot-half-cancelled" in self.quirks:
                if side == "bus":
                    self._void(CANCEL, "driver", device)
                self._cancel_devices(place)
            return failure
        if "list-freed-at-reboot" in self.quirks:
            self.list = None
        return None

    def _devices_finish(self) -> None:
        for device in sorted(
            (number for number in self.machine.alive() if number in self.preserved),
            key=lambda number: -len(self.machine.above(number)),
        ):
            self._void(FINISH, "driver", device)
            self._void(FINISH, "bus", device)
        self.preserved.clear()
        self.reclaimed.clear()
        self.held = []

    # ---- binding ----

    def bind(self, device: int, name: str) -> None:
        """Write to a driver's ``bind``."""
        comes_over = (
            self.state == UPDATED
            and device in self.preserved - self.reclaimed
            and self.bound[device] is None
        )
        if not comes_over:
            self._unbindable(device)
        if name not in self.drivers:
            raise Refused(errno.ENODEV)
        if self.bound[device] is not None:
            raise Refused(errno.EBUSY)
        self.bound[device] = name
        self.scanned.remove(device)
        self.scanned.append(device)
        if comes_over:
            self.waiting.discard(device)
            failure = self._on_device(RESTORE, "driver", device)
            self._reclaim_silent(device)
            if failure is not None:
                raise Refused(failure.errno, failure)
            return
        failure = self._call("PROBE", "driver", name, device)
        if failure is not None:
            self.bound[device] = None
            raise Refused(failure.errno)
        self.orphans.discard(device)

    def unbind(self, device: int) -> None:
        """Write to a driver's ``unbind``."""
        self._unbindable(device)
        if device in self.requested and self.bound[device] is not None:
            self.orphans.add(device)
        self.bound[device] = None

    def _unbindable(self, device: int) -> None:
        if "eligibility-checked-once" in self.quirks:
            return
        if device in self.preserved or self.state != NORMAL:
            raise Refused(errno.EBUSY)

    def references(self, device: int) -> int:
        """How often live update holds the device."""
        return [*(self.list or []), *self.held, *self.leaked].count(device)

    # ---- from kernel to kernel ----

    def load(self, successor: Kernel) -> None:
        """Load the next kernel."""
        self.next = successor

    def kexec(self) -> Kernel:
        """The reboot system call with KEXEC: a live update if one is prepared."""
        successor, checks = self.next, "no-image-check" not in self.quirks
        if successor is None and checks:
            raise Refused(errno.EINVAL)
        self.next = None  # ours: an image is used up by the attempt
        live = self.reboot()
        handover = Handover(self.node, self.records if live else [])
        refused = errno.EINVAL if successor is None else 0
        if successor is not None and handover.node and not successor.enabled:
            refused = errno.EPROTO  # ours: it panics before the point of no return, so we go on
        if refused:
            if live:
                self._cancel()
            raise Refused(refused)
        self.shutdown_devices()
        successor.calls, successor.faults = self.calls, self.faults
        successor.boot(handover)
        return successor

    def shutdown(self) -> None:
        """Power off, halt or restart: nothing of LUO's hooks in (1.4)."""
        self.shutdown_devices()

    def shutdown_devices(self) -> None:
        """Shut down every device with a driver that is not preserved, last one first (1.11)."""
        for device in reversed(self.machine.alive()):
            if device not in self.preserved and self.bound.get(device) is not None:
                self._call("SHUTDOWN", "driver", self.bound[device], device)

    def boot(self, handover: Handover | None = None) -> None:
        """Start to run (1.3)."""
        self.rescan()
        handover = handover or Handover()
        if handover.node:
            if not self.enabled:
                raise Panic
            self.state = UPDATED
            if "flags-not-restored" not in self.quirks:
                self._adopt(handover.records)
            self.restore_failures = self._send(RESTORE, self.chain)  # ours
        self._probe(self.machine.alive())

    def _adopt(self, records: list[Record]) -> None:
        """Find the devices that came over (2, number 6)."""
        devices = self.machine.devices
        here = {
            (devices[number].path, devices[number].bus): number for number in self.machine.alive()
        }
        for record in records:
            number = here.get((record.path, record.bus))
            if number is not None:
                self.held.append(number)
                self.preserved.add(number)
                if record.has_driver and self.bound[number] is None:
                    self.waiting.add(number)

    def _devices_restore(self) -> None:
        """Have the devices that came over restored, parents first: ours."""
        for device in reversed(self.held):
            self._void(RESTORE, "bus", device)
            self._void(RESTORE, "driver", device)
        for device in self.held:
            self._reclaim_silent(device)

    def _reclaim_silent(self, device: int) -> None:
        """Reclaim a device that nobody else would: it has no restore callback."""
        if device not in self.waiting and not self._has(RESTORE, device):
            self.reclaimed.add(device)

    def _has(self, event: str, device: int) -> bool:
        owners = (
            self.drivers.get(self.bound[device]),
            self.buses.get(self.machine.devices[device].bus),
        )
        return any(owner and owner.table and event.lower() in owner.table for owner in owners)

    def _probe(self, devices: list[int]) -> None:
        """Probe those of *devices* that have a driver and did not come over."""
        for device in devices:
            name = self.bound[device]
            if device in self.preserved or name is None:
                continue
            if self._call("PROBE", "driver", name, device) is not None:
                self.bound[device] = None
