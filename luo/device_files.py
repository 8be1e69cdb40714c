"""Devices as files of sessions: mainline's front-end for what RFC v1 does with notifiers.

Nothing of this is in Linux 7.3, which has no file of a device that can be preserved; it is what
VFIO's and iommufd's posted series do, carried over to every driver. The drivers are RFC v1's, with
the same callbacks (:class:`luo.device.LiveUpdateOps`), so that both designs run on the same host:

    ============ ==================================================================================
    file         device
    ============ ==================================================================================
    PRESERVE     allocate and write its record, with room for the slots; prepare of driver, then bus
    FREEZE       reboot of driver, then bus; of a handler that has neither nobody is called
    UNFREEZE     nothing: RFC v1's table has nothing that undoes reboot alone
    UNPRESERVE   cancel of bus, then driver, which undoes both; free the record
    RETRIEVE     ask for the FLBs; find the device; restore of bus, then driver, which reclaim it; a
                 device without such a callback runs at once
    FINISH       finish of driver, then bus, if the file was retrieved; free the record
    ============ ==================================================================================

There is a handler for each driver that supports live update, as ``vfio-pci`` has one, called
``luo-DRIVER-v1``, and ``luo-device-v1`` for devices without a driver. Subsystems of the
orchestrator become an FLB if nothing of them changes in REBOOT (page tables of the IOMMU, the table
of interrupts), since an FLB is not frozen; else a file (a virtual machine).

A file's number is the address of a block of its own, as memfd's handler allocates one for each
file: 24 bytes of :data:`RECORD` and then path, bus, the driver's slot and the bus's, each from a
multiple of 8.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from luo._kho import CallRecorder, CallTable, NativeCallback, NativeScope, call_devices
from luo.device import SIDES, Batch, Bus, Device, DeviceBatch, Devices, Driver
from luo.errors import from_errno
from luo.files import FileArgs, FileHandler
from luo.flb import Flb, FlbArgs
from luo.notifier import RESTORE, Context, Event, Subsystem, callback_error, failed

if TYPE_CHECKING:
    from luo.files import PreservedFile

__all__ = [
    "RECORD",
    "DeviceFile",
    "DeviceFiles",
    "DeviceRecord",
    "SubsystemFile",
    "compatible_of",
    "flb_of",
    "subsystem_handler",
]

RECORD: Final = struct.Struct("=HHIQQ")
"""0: u16 bytes of the path. 2: u16 bytes of the bus's name. 4: u32 number of the device. 8: u64
bytes of the driver's slot. 16: u64 bytes of the bus's slot."""

GENERIC: Final = "luo-device-v1"
_COMPATIBLE_BYTES: Final = 47
#: Names of events; a member of an enumeration takes longer to tell its own.
_PREPARE, _REBOOT = Event.PREPARE.name, Event.REBOOT.name
_FINISH, _CANCEL = Event.FINISH.name, Event.CANCEL.name
_BACKWARDS: Final = (_CANCEL, RESTORE)
_TO_THE_END: Final = (_CANCEL, _FINISH)
_MODES: Final = {_PREPARE: "set", _REBOOT: "need", _CANCEL: "clear"}
_BIT: Final = {"driver": 1, "bus": 2}


def compatible_of(driver: str) -> str:
    """Return the compatible string of the handler of *driver*; a long name is cut, and told apart.

    A ``""`` stands for devices without a driver.
    """
    if not driver:
        return GENERIC
    whole = f"luo-{driver}-v1"
    if len(whole.encode()) <= _COMPATIBLE_BYTES:
        return whole
    mark = f"~{zlib.crc32(driver.encode()):08x}-v1"
    kept = f"luo-{driver}".encode()[: _COMPATIBLE_BYTES - len(mark)].decode(errors="ignore")
    return kept + mark


class DeviceFile:
    """An open file of a device: what a session is given, and gives back.

    Attributes:
        index: number of the device.
        driver: the driver that was bound when it was opened; ``""`` for none.
    """

    __slots__ = ("devices", "driver", "index")

    def __init__(self, devices: Devices, index: int) -> None:
        self.devices = devices
        self.index = index
        driver = devices.driver_of(index)
        self.driver = "" if driver is None else driver.name

    @property
    def device(self) -> Device:
        """The device."""
        return self.devices[self.index]

    def __repr__(self) -> str:
        return f"<DeviceFile {self.devices.tree.path(self.index)}>"


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """What was handed over of one device.

    Attributes:
        path, bus: as in ``/sys``; no bus is ``""``.
        index: its number in the kernel before.
        slots: address and bytes of the driver's slot and of the bus's.
        nbytes: of the record, without the slots.
    """

    path: str
    bus: str
    index: int
    slots: tuple[tuple[int, int], tuple[int, int]]
    nbytes: int

    @classmethod
    def read(cls, memory: Any, phys: int, room: int) -> DeviceRecord:
        """Read the record at *phys*, which has *room* bytes.

        Raises:
            KhoError: EINVAL if it says more than there is room for, or is no text.
        """
        if room < RECORD.size or not memory.is_populated(phys, RECORD.size):
            raise from_errno(errno.EINVAL, f"device record {phys:#x}: nothing is there")
        path, bus, index, *sizes = RECORD.unpack(memory.view(phys, RECORD.size))
        text, first, second, end = _layout(path, bus, *sizes)
        if end > room:
            raise from_errno(
                errno.EINVAL, f"device record {phys:#x}: {end} bytes, there is room for {room}"
            )
        words = bytes(memory.view(phys + RECORD.size, path + bus))
        try:
            names = words[:path].decode(), words[path:].decode()
        except UnicodeDecodeError as error:
            raise from_errno(errno.EINVAL, f"device record {phys:#x}: {error}") from None
        slots = (phys + first, sizes[0]), (phys + second, sizes[1])
        return cls(*names, index, slots, text)


def _layout(path: int, bus: int, driver_slot: int, bus_slot: int) -> tuple[int, int, int, int]:
    """Return the bytes of a record, where its slots begin, and where everything ends."""
    text = RECORD.size + path + bus
    first = -(-text // 8) * 8
    second = first + -(-driver_slot // 8) * 8
    return text, first, second, second + bus_slot


class DeviceFiles:
    """Keeps devices of one kernel as files; its :attr:`handlers` are for that kernel alone.

    Args:
        drivers: of the kernel; those without a table of callbacks get no handler.
        buses: of the kernel.
        flbs: what all devices with a driver depend on.
        flbs_of: what those of one driver depend on besides, by its name.

    Attributes:
        handlers: a file handler for each driver, and one for devices without a driver.
        nr_open: files that are preserved, or retrieved and not finished.
    """

    def __init__(
        self,
        drivers: Iterable[Driver],
        buses: Iterable[Bus],
        flbs: Iterable[Flb] = (),
        flbs_of: Mapping[str, tuple[Flb, ...]] | None = None,
    ) -> None:
        common, own = tuple(flbs), flbs_of or {}
        with_bus = any(bus.ops is not None and bus.ops.reboot is not None for bus in buses)
        able = {driver.name: driver.ops for driver in drivers if driver.ops is not None}
        self.handlers = (
            *(
                self._handler(name, with_bus or ops.reboot is not None, common + own.get(name, ()))
                for name, ops in able.items()
            ),
            self._handler("", with_bus, ()),
        )
        self.nr_open = 0
        self._revived: set[Flb] = set()  # that somebody here has asked for
        self._devices: Devices | None = None
        # Of the calls that happen within a file's: the session times these already.
        self._silent = CallRecorder()
        self._silent.timing = False
        self._done = np.zeros(0, np.uint8)
        self._numbers = np.zeros(0, np.int32)
        self._calls: dict[tuple[str, int, int], list[tuple[tuple[str, ...], Any]]] = {}
        self._scopes: dict[str, NativeScope | None] = {}
        self._sizes: dict[tuple[int, int], tuple[Any, Any]] = {}

    def _handler(self, driver: str, freezes: bool, flbs: tuple[Flb, ...]) -> FileHandler:
        def can_preserve(file: Any) -> bool:
            return type(file) is DeviceFile and file.driver == driver

        return FileHandler(
            compatible_of(driver),
            can_preserve=can_preserve,
            preserve=self._preserve,
            unpreserve=self._unpreserve,
            freeze=self._freeze if freezes else None,
            retrieve=self._retrieve,
            finish=self._finish,
            get_id=_identity,
            flbs=flbs,
        )

    def open(self, devices: Devices, index: int) -> DeviceFile:
        """Open device number *index*.

        Raises:
            KhoNotFoundError: ENOENT if there is none.
        """
        devices[index]  # which checks
        return DeviceFile(devices, index)

    # ---- the callbacks of a file ----

    def _preserve(self, args: FileArgs) -> None:
        devices, index = self._of(args), args.file.index
        if devices.preserved[index]:
            raise from_errno(
                errno.EBUSY, f"{devices.tree.path(index)}: the orchestrator has preserved it"
            )
        phys = self._write_record(args, devices, index)
        try:
            self._call(devices, _PREPARE, index)
        except BaseException as error:
            try:
                self._call(devices, _CANCEL, index)  # reaches those that are done
            except Exception as problem:
                error.add_note(f"while undoing it: {problem}")
            self._forget_slots(devices, index)
            args.kho.unpreserve_free(phys)
            raise
        devices.preserved[index] = True
        self.nr_open += 1
        args.data = phys

    def _write_record(self, args: FileArgs, devices: Devices, index: int) -> int:
        path = devices.tree.path(index).encode()
        number = int(devices.bus_ids[index])
        bus = devices.buses[number].name.encode() if number >= 0 else b""
        sizes = self._slot_sizes(devices, index)
        if max(len(path), len(bus)) >> 16:
            raise from_errno(errno.ENAMETOOLONG, f"{path.decode()}: more than 65,535 bytes")
        text, first, second, end = _layout(len(path), len(bus), *sizes)
        phys = args.kho.alloc_preserve(end)
        head = RECORD.pack(len(path), len(bus), index, *sizes)
        args.memory.view(phys, text)[:] = head + path + bus
        self._place_slots(devices, index, ((phys + first, sizes[0]), (phys + second, sizes[1])))
        return phys

    def _unpreserve(self, args: FileArgs) -> None:
        devices, index = self._of(args), args.file.index
        try:
            self._call(devices, _CANCEL, index)
        finally:
            devices.preserved[index] = False
            self.nr_open -= 1
            self._forget_slots(devices, index)
            args.kho.unpreserve_free(args.data)

    def _freeze(self, args: FileArgs) -> None:
        self._call(self._of(args), _REBOOT, args.file.index)

    def _retrieve(self, args: FileArgs) -> None:
        devices = self._of(args)
        for flb in args.handler.flbs:
            if flb not in self._revived:  # no device runs without them
                args.kernel.liveupdate.flb_get_incoming(flb)
                args.kernel.liveupdate.flb_put_incoming(flb)
                self._revived.add(flb)
        record = self.record(args.incoming, args.data)
        index = self._find(devices, record)
        devices = self._of(args)  # there may be more than there were
        if devices.preserved[index]:
            raise from_errno(errno.EBUSY, f"{record.path}: another file has brought it")
        self._place_slots(devices, index, record.slots)
        devices.preserved[index] = True
        devices.by_file = True
        self.nr_open += 1
        args.private = index
        file = DeviceFile(devices, index)
        self._done[index] = _BIT["driver"] | _BIT["bus"]
        self._call(devices, RESTORE, index)
        if not self._has_callback(devices, RESTORE, index):
            devices.reclaim_one(index)
        args.file = file

    @staticmethod
    def _find(devices: Devices, record: DeviceRecord) -> int:
        """Return the number of the device of *record* in this kernel."""
        tree, index = devices.tree, record.index
        known = index < len(devices.requested) and tree.alive[index]
        if not known or tree.path(index) != record.path:
            devices.rescan()
            try:
                index = tree[record.path]
            except KeyError:
                raise from_errno(errno.ENODEV, f"{record.path}: no such device here") from None
        bus = devices.bus_of(index)
        if (bus.name if bus is not None else "") != record.bus:
            raise from_errno(errno.ENODEV, f"{record.path}: is not on the bus {record.bus!r} here")
        return index

    def _finish(self, args: FileArgs) -> None:
        devices = self._of(args)
        try:
            if args.retrieve_status > 0:
                self._call(devices, _FINISH, args.private)
        finally:
            if args.private is not None:
                index = args.private
                devices.preserved[index] = devices.reclaimed[index] = False
                self.nr_open -= 1
                devices.by_file = self.nr_open > 0
                self._forget_slots(devices, index)
            args.incoming.restore_free(args.data)

    # ---- slots and records ----

    @staticmethod
    def record(incoming: Any, phys: int) -> DeviceRecord:
        """Read a record of the kernel before.

        Raises:
            KhoError: EINVAL if it is none.
        """
        order = incoming.order_of(phys)
        room = 0 if order is None else incoming.memory.page_size << order
        return DeviceRecord.read(incoming.memory, phys, room)

    @staticmethod
    def _place_slots(
        devices: Devices, index: int, slots: tuple[tuple[int, int], tuple[int, int]]
    ) -> None:
        for row, (phys, nbytes) in enumerate(slots):
            if nbytes:  # none is what stands there
                devices.slot_phys[row, index] = phys
                devices.slot_bytes[row, index] = nbytes
        devices.slotted = True

    def _forget_slots(self, devices: Devices, index: int) -> None:
        devices.slot_bytes[:, index] = 0
        self._done[index] = 0
        devices.slotted = self.nr_open > 0

    def nbytes(self, devices: Devices, index: int) -> int:
        """Return what one device will take; a size that a callback in Python says counts as 0."""
        sizes = [0, 0]
        for row, ask in enumerate(self._asks(devices, index)):
            if isinstance(ask, int):
                sizes[row] = ask
            elif isinstance(ask, Batch):
                sizes[row] = self._ask(devices, SIDES[row], ask, index)
        bus = devices.bus_of(index)
        path = len(devices.tree.path(index).encode())
        return _layout(path, len(bus.name.encode()) if bus is not None else 0, *sizes)[3]

    def _slot_sizes(self, devices: Devices, index: int) -> tuple[int, int]:
        """Return how many bytes driver and bus want for one device."""
        driver, bus = self._asks(devices, index)
        return (
            driver if isinstance(driver, int) else self._ask(devices, "driver", driver, index),
            bus if isinstance(bus, int) else self._ask(devices, "bus", bus, index),
        )

    def _asks(self, devices: Devices, index: int) -> tuple[Any, Any]:
        owners = int(devices.driver_ids[index]), int(devices.bus_ids[index])
        asks = self._sizes.get(owners)
        if asks is None:
            found = (_ops(devices, side, owners[row]) for row, side in enumerate(SIDES))
            driver, bus = (0 if ops is None else ops.state_size for ops in found)
            asks = self._sizes[owners] = driver, bus
        return asks

    def _ask(self, devices: Devices, side: str, ask: Any, index: int) -> int:
        """Call a ``state_size``."""
        outcome: Any
        try:
            if isinstance(ask, Batch):
                outcome = ask(_one(devices, index, np.empty((1, 0), np.uint8)))
            else:
                outcome = ask(Device(devices, index))
            array = np.asarray(outcome)
            if array.dtype.kind not in "iub" or array.size != 1 or int(array.min()) < 0:
                raise TypeError(f"state_size returned {outcome!r}, not a number of bytes")
            return int(array.reshape(-1)[0])
        except Exception as error:
            raise self._error(devices, _PREPARE, side, ask, index, error) from error

    # ---- calling what a device's driver and bus have ----

    def _of(self, args: FileArgs) -> Devices:
        """Return the devices of the kernel, ready for being called."""
        devices: Devices = args.kernel.devices
        if devices is not self._devices or len(self._done) != len(devices.requested):
            done = np.zeros(len(devices.requested), np.uint8)
            done[: len(self._done)] = self._done
            self._done = done
            self._numbers = np.arange(len(done), dtype=np.int32)
            self._devices = devices
            self._calls, self._scopes, self._sizes = {}, {}, {}
        return devices

    def _call(self, devices: Devices, event: str, index: int) -> None:
        """Call the callbacks of one device for *event*.

        PREPARE, REBOOT and RESTORE end at the first that fails; CANCEL and FINISH go on.

        Raises:
            CallbackError: the first that failed.
        """
        owners = event, int(devices.driver_ids[index]), int(devices.bus_ids[index])
        steps = self._calls.get(owners)
        if steps is None:
            steps = self._calls[owners] = self._arrange(devices, *owners)
        if not steps:
            return
        first: BaseException | None = None
        for sides, what in steps:
            if isinstance(what, Batch):
                problem = self._call_batch(devices, event, sides[0], what, index)
            else:
                problem = self._call_one(devices, event, sides, what, index)
            if problem is not None:
                first = first or problem
                if event not in _TO_THE_END:
                    break
        if first is not None:
            raise first from first.__cause__
        if event == RESTORE and devices.reclaimed[index] and self._scope(devices, event):
            devices.kernel.luo.note_reclaim()  # native code reclaims without a word

    def _arrange(
        self, devices: Devices, event: str, driver: int, bus: int
    ) -> list[tuple[tuple[str, ...], Any]]:
        """Return what to call: sides, and either their call tables or one batch callback."""
        sides = SIDES[::-1] if event in _BACKWARDS else SIDES
        numbers = {"driver": driver, "bus": bus}
        calls = {
            side: getattr(_ops(devices, side, numbers[side]), event.lower(), None) for side in sides
        }
        # PREPARE passes by whoever has no callback too: CANCEL and REBOOT are for whom it passed.
        called = [
            side
            for side in sides
            if numbers[side] >= 0 and (calls[side] is not None or event == _PREPARE)
        ]
        if not called:
            return []
        if not any(isinstance(calls[side], Batch) for side in called):
            return [(tuple(called), [self._table(devices, side, event) for side in called])]
        return [
            (
                (side,),
                calls[side]
                if isinstance(calls[side], Batch)
                else [self._table(devices, side, event)],
            )
            for side in called
        ]

    def _table(self, devices: Devices, side: str, event: str) -> CallTable:
        calls: list[Any] = []
        for number in range(len(devices.parties(side))):
            callback = getattr(_ops(devices, side, number), event.lower(), None)
            calls.append(None if isinstance(callback, Batch) else callback)
        key = self._silent.key("devices", event, side, "")
        keys = np.full(len(calls), key, np.int32)
        return CallTable(devices.ids(side), calls, keys, _BIT[side], _MODES.get(event, "plain"))

    def _call_one(
        self,
        devices: Devices,
        event: str,
        sides: tuple[str, ...],
        tables: list[CallTable],
        index: int,
    ) -> BaseException | None:
        failures: list[Any] | None = [] if event in _TO_THE_END else None
        found = call_devices(
            self._silent,
            devices,
            Device,
            self._numbers,
            index,
            index + 1,
            False,
            tables,
            self._done,
            failures,
            self._scope(devices, event),
        )
        if found is None and not failures:
            return None
        _, table, outcome = found or failures[0]  # type: ignore[index]
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            return outcome
        side = sides[table]
        number = int(devices.ids(side)[index])
        callback = getattr(_ops(devices, side, number), event.lower())
        return self._error(devices, event, side, callback, index, outcome)

    def _call_batch(
        self, devices: Devices, event: str, side: str, callback: Batch, index: int
    ) -> BaseException | None:
        bit = np.uint8(_BIT[side])
        if event in (_REBOOT, _CANCEL) and not self._done[index] & bit:
            return None
        if event == _CANCEL:
            self._done[index] &= ~bit
        row = SIDES.index(side)
        nbytes = int(devices.slot_bytes[row, index])
        slots = np.empty((1, 0), np.uint8)
        if nbytes:
            view = devices.kernel.memory.view(int(devices.slot_phys[row, index]), nbytes)
            slots = np.frombuffer(view, np.uint8).reshape(1, nbytes)
        outcome: Any
        try:
            outcome = callback(_one(devices, index, slots))
        except Exception as error:
            outcome = error
        if isinstance(outcome, np.ndarray) and outcome.shape == (1,):
            outcome = outcome[0]
        if isinstance(outcome, BaseException) or failed(outcome):
            return self._error(devices, event, side, callback, index, outcome)
        if event == _PREPARE:
            self._done[index] |= bit
        return None

    def _scope(self, devices: Devices, event: str) -> NativeScope | None:
        """Return what native callbacks of *event* reach; None if there are none."""
        if event not in self._scopes:
            callbacks = (
                getattr(owner.ops, event.lower(), None)
                for side in SIDES
                for owner in devices.parties(side)
            )
            scope = None
            if any(isinstance(callback, NativeCallback) for callback in callbacks):
                restoring = event in (RESTORE, _FINISH)
                flags = (devices.preserved, devices.reclaimed) if restoring else (None, None)
                scope = NativeScope(
                    devices.kernel.memory,
                    devices.tree.table,
                    event,
                    devices.slot_phys,
                    devices.slot_bytes,
                    *flags,
                )
            self._scopes[event] = scope
        return self._scopes[event]

    @staticmethod
    def _has_callback(devices: Devices, event: str, index: int) -> bool:
        return any(
            getattr(_ops(devices, side, int(devices.ids(side)[index])), event.lower(), None)
            for side in SIDES
        )

    @staticmethod
    def _error(
        devices: Devices, event: str, side: str, callback: Any, index: int, outcome: Any
    ) -> BaseException:
        number = int(devices.ids(side)[index])
        return callback_error(
            outcome,
            event=event,
            kind=side,
            name=devices.parties(side)[number].name,
            callback=callback,
            device=devices.tree.path(index),
        )

    # ---- for looking ----

    def records(self, files: Iterable[PreservedFile], incoming: Any) -> Iterator[DeviceRecord]:
        """Yield the records of those of *files* that are devices; broken ones are left out.

        Args:
            files: of the sessions of one side.
            incoming: what came over, if it is that side; None: what is preserved here, where a
                record has no other bounds than its own.
        """
        mine = set(self.handlers)
        for file in files:
            if file.handler not in mine:
                continue
            with contextlib.suppress(OSError):  # who retrieves it says what is wrong
                if incoming is not None:
                    yield self.record(incoming, file.data)
                else:
                    memory = file.args.memory
                    yield DeviceRecord.read(memory, file.data, memory.page_size << memory.max_order)

    def digests(
        self, files: Iterable[PreservedFile], memory: Any, incoming: Any = None
    ) -> dict[tuple[str, str], tuple[int, int]]:
        """Return (bytes, digest) of what is in the slots, by (side, driver or bus name).

        Args:
            files: in the order in which they were preserved.
            memory: where the slots are.
            incoming: as of :meth:`records`.
        """
        sums: dict[tuple[str, str], Any] = {}
        totals: dict[tuple[str, str], int] = {}
        files = list(files)
        for file in files:
            for record in self.records((file,), incoming):
                names = {"driver": file.handler.compatible, "bus": record.bus}
                for side, (phys, nbytes) in zip(SIDES, record.slots, strict=True):
                    if not nbytes:
                        continue
                    owner = side, names[side]
                    if owner not in sums:
                        sums[owner], totals[owner] = hashlib.blake2b(digest_size=8), 0
                    sums[owner].update(memory.view(phys, nbytes))
                    totals[owner] += nbytes
        return {
            owner: (totals[owner], int.from_bytes(digest.digest(), "little"))
            for owner, digest in sums.items()
        }


def _identity(file: DeviceFile) -> tuple[str, int]:
    """Return what two open files of one device have in common."""
    return "device", file.index


def _ops(devices: Devices, side: str, number: int) -> Any:
    return None if number < 0 else devices.parties(side)[number].ops


def _one(devices: Devices, index: int, slots: NDArray[np.uint8]) -> DeviceBatch:
    """Return the run of one device: a session knows no longer ones."""
    return DeviceBatch(devices, np.array([index], np.int32), slots)


# ---- subsystems ----


class SubsystemFile:
    """A file that stands for a part of a subsystem, as a virtual machine's stands for the machine.

    Attributes:
        subsystem: whose callbacks are called.
        context: what they are given.
    """

    __slots__ = ("context", "subsystem")

    def __init__(self, subsystem: Subsystem, kernel: Any) -> None:
        self.subsystem = subsystem
        self.context = Context(kernel)

    def __repr__(self) -> str:
        return f"<SubsystemFile {self.subsystem.name}>"


def _run(subsystem: Subsystem, event: str, context: Context) -> None:
    """Call a subsystem's callback, if it has one; a negative number is an errno."""
    callback = getattr(subsystem, event.lower())
    if callback is None:
        return
    context.event = event
    outcome = callback(context)
    if failed(outcome):
        raise callback_error(
            outcome, event=event, kind="subsystem", name=subsystem.name, callback=callback
        )


def subsystem_handler(name: str, make: Callable[[], Subsystem]) -> FileHandler:
    """Return the handler of files that stand for parts of the subsystem *name*.

    Args:
        name: of the subsystem.
        make: returns the subsystem for one file, in the kernel that retrieves it.
    """

    def can_preserve(file: Any) -> bool:
        return type(file) is SubsystemFile and file.subsystem.name == name

    def preserve(args: FileArgs) -> None:
        _run(args.file.subsystem, _PREPARE, args.file.context)
        args.data = args.file.context.data

    def freeze(args: FileArgs) -> None:
        _run(args.file.subsystem, _REBOOT, args.file.context)
        args.data = args.file.context.data

    def unpreserve(args: FileArgs) -> None:
        try:
            _run(args.file.subsystem, _CANCEL, args.file.context)
        finally:
            args.file.context.data = 0

    def retrieve(args: FileArgs) -> None:
        file = SubsystemFile(make(), args.kernel)
        file.context.data = args.data
        _run(file.subsystem, RESTORE, file.context)
        args.file = file

    def finish(args: FileArgs) -> None:
        if args.retrieve_status == 0:
            retrieve(args)  # only its subsystem knows what it has to free
        if args.file is not None:
            _run(args.file.subsystem, _FINISH, args.file.context)
            args.file.context.data = 0

    return FileHandler(
        compatible_of(name),
        can_preserve=can_preserve,
        preserve=preserve,
        unpreserve=unpreserve,
        freeze=freeze,
        retrieve=retrieve,
        finish=finish,
    )


def flb_of(subsystem: Subsystem) -> Flb:
    """Return *subsystem* as an FLB: kept while a file that depends on it is.

    An FLB has no part in the jump: a ``reboot`` callback would not be called.
    """

    def preserve(args: FlbArgs) -> None:
        context = Context(args.kernel)
        _run(subsystem, _PREPARE, context)
        args.obj, args.data = context, context.data

    def unpreserve(args: FlbArgs) -> None:
        _run(subsystem, _CANCEL, args.obj)

    def retrieve(args: FlbArgs) -> None:
        context = Context(args.kernel)
        context.data = args.data
        _run(subsystem, RESTORE, context)
        args.obj = context

    def finish(args: FlbArgs) -> None:
        _run(subsystem, _FINISH, args.obj)

    return Flb(subsystem.name, preserve, unpreserve, retrieve, finish)
