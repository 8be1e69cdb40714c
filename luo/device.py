"""A kernel's view of its devices, and what drivers and buses register.

Mirrors the per-device part of RFC v1's ``include/linux/dev_liveupdate.h``; the walk over the
devices is in :mod:`luo.dev_liveupdate`. Nothing here exists once per device: flags and slots
are columns, and a :class:`Device` is made when somebody asks for one.
"""

from __future__ import annotations

import ctypes
import errno
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luo._kho import (
    DeviceRef,
    NativeCallback,
    both_pass,
    capsule_address,
    first_unset,
    set_flags,
)
from luo.errors import KernelPanic, KhoNotFoundError, StateError, from_errno
from luo.kho_tree import KhoNode
from luo.notifier import Mortal, State

if TYPE_CHECKING:
    from luo._kho import DeviceTable
    from luo.kho import Kho
    from luo.memory import PhysicalMemory

__all__ = [
    "Batch",
    "Bus",
    "Device",
    "DeviceBatch",
    "Devices",
    "Driver",
    "LiveUpdateOps",
    "batch",
    "native",
]

Outcome: TypeAlias = int | None


class Batch:
    """A callback that is called once for a run of devices; made by :func:`batch`."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[DeviceBatch], Any]) -> None:
        if not callable(function):
            raise TypeError(f"batch: {function!r} is not callable")
        self.function = function

    def __call__(self, devices: DeviceBatch) -> Any:
        """Call the function, as the engine does."""
        return self.function(devices)


def batch(function: Callable[[DeviceBatch], Any]) -> Batch:
    """Mark *function* as a batch callback: once a run instead of once a device.

    A run is a stretch of consecutive devices of one depth, driver, bus and slot size; devices of
    one depth are brought together by driver for it.

    Args:
        function: takes a :class:`DeviceBatch`; returns None or 0, a negative errno for the
            whole run, or ``int32[n]`` with one result a device.
    """
    return Batch(function)


#: What a capsule that holds a native callback is called.
NATIVE_SIGNATURE: Final = "int (struct luo_device *, void *)"


def native(pointer: Any, ctx: Any = None, keepalive: object = None) -> NativeCallback:
    """Make a callback of a C function, which is called without the GIL.

    Args:
        pointer: ``int (*)(struct luo_device *, void *)``: of cffi or ctypes, an address, or a
            capsule called ``"int (struct luo_device *, void *)"``, whose context is *ctx* unless
            that is given. ``luo.h`` in :func:`luo.get_include` says what the function may do.
        ctx: its second argument: an address, or a pointer of cffi or ctypes.
        keepalive: what must live as long as the callback; *pointer* and *ctx* do anyway.

    Returns:
        a callback for :class:`LiveUpdateOps`. 0 is success, a negative number an errno.

    Raises:
        TypeError, ValueError: this is no pointer to a function, or it is NULL.
    """
    if type(pointer).__name__ == "PyCapsule":
        address, context = capsule_address(pointer, NATIVE_SIGNATURE)
        context = context if ctx is None else _address(ctx)
    else:
        address, context = _address(pointer), 0 if ctx is None else _address(ctx)
    return NativeCallback(address, context, (pointer, ctx, keepalive))


def _address(pointer: Any) -> int:
    """Return the address that *pointer* holds."""
    if type(pointer).__module__ == "_cffi_backend":
        import cffi

        return int(cffi.FFI().cast("uintptr_t", pointer))
    try:
        return operator.index(pointer)
    except TypeError:
        pass
    try:
        if pointer is None or isinstance(pointer, str | bytes):  # ctypes takes these for strings
            raise TypeError
        return ctypes.cast(pointer, ctypes.c_void_p).value or 0
    except (TypeError, ctypes.ArgumentError):
        raise TypeError(f"native: {pointer!r} is no pointer") from None


Callback: TypeAlias = "Callable[[Device], Outcome] | Batch | NativeCallback"
StateSize: TypeAlias = "int | Callable[[Device], int] | Batch"


@dataclass(frozen=True, slots=True)
class LiveUpdateOps:
    """The callback table of a driver or a bus (``struct dev_liveupdate_ops``).

    Every callback is optional; a device takes part only if the table itself exists.

    Args:
        prepare: save state into ``dev.slot`` (``dev.bus_slot`` for a bus); may fail.
        reboot: the last word before the jump, patches the slot; may fail.
        finish: in the new kernel, when the update is over.
        cancel: undoes prepare and reboot.
        restore: in the new kernel, parents first; ``dev.reclaim()`` when the device runs again.
        thread_safe: whether native callbacks may be called for several devices at once.
        state_size: bytes of the slot: a number, ``f(dev) -> int``, or ``batch(f)`` that returns a
            number or an array of n.
    """

    prepare: Callback | None = None
    reboot: Callback | None = None
    finish: Callback | None = None
    cancel: Callback | None = None
    restore: Callback | None = None
    state_size: StateSize = 0
    thread_safe: bool = False

    def __post_init__(self) -> None:
        for name in ("prepare", "reboot", "finish", "cancel", "restore"):
            value = getattr(self, name)
            known = value is None or isinstance(value, NativeCallback) or callable(value)
            if not known:
                raise TypeError(f"LiveUpdateOps.{name}: {value!r} is not callable")
        if callable(self.state_size):
            return
        try:
            nbytes = operator.index(self.state_size)
        except TypeError:
            raise TypeError(
                f"LiveUpdateOps.state_size: {self.state_size!r}: int or callable"
            ) from None
        if nbytes < 0:
            raise ValueError(f"LiveUpdateOps.state_size: {nbytes} is negative")
        object.__setattr__(self, "state_size", nbytes)


@dataclass(frozen=True, slots=True)
class Driver:
    """A driver, bound to every device whose hardware names it.

    Args:
        name: as in ``/sys``, e.g. ``"virtio-pci"``.
        ops: None if the driver does not support live update.
        probe: ``f(dev)``, called when a kernel boots, unless the device is preserved.
        shutdown: ``f(dev)``, called before the jump and at ``Kernel.shutdown()``, unless the
            device is preserved.
    """

    name: str
    ops: LiveUpdateOps | None = None
    probe: Callable[[Device], object] | None = field(default=None, kw_only=True)
    shutdown: Callable[[Device], object] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_owner("driver", self.name, self.ops)
        for name in ("probe", "shutdown"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"driver {self.name}: {name} is not callable")


@dataclass(frozen=True, slots=True)
class Bus:
    """A bus type.

    Args:
        name: as in ``/sys/bus``, e.g. ``"pci"``.
        ops: None if the bus does not support live update.
    """

    name: str
    ops: LiveUpdateOps | None = None

    def __post_init__(self) -> None:
        _check_owner("bus", self.name, self.ops)


def _check_owner(kind: str, name: object, ops: object) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"{kind} name {name!r}: not a str")
    if ops is not None and not isinstance(ops, LiveUpdateOps):
        raise TypeError(f"{kind} {name}: {ops!r} is no LiveUpdateOps")


Mask: TypeAlias = NDArray[np.bool_]
Index: TypeAlias = NDArray[np.int32]
Ragged: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.uint64]]


class Tree(Protocol):
    """What the layers of a kernel read of a :class:`luo.machine.DeviceTree`."""

    @property
    def parents(self) -> Index: ...
    @property
    def depths(self) -> Index: ...
    @property
    def bus_ids(self) -> Index: ...
    @property
    def driver_ids(self) -> Index: ...
    @property
    def alive(self) -> Mask: ...
    @property
    def bus_names(self) -> list[str]: ...
    @property
    def driver_names(self) -> list[str]: ...
    @property
    def column_names(self) -> list[str]: ...
    @property
    def table(self) -> DeviceTable: ...

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[int]: ...
    def __getitem__(self, path: str, /) -> int: ...
    def path(self, index: int, /) -> str: ...
    def paths(self, indices: Index, /) -> Ragged: ...
    def find_paths(self, data: Any, offsets: Any, hints: Any = None, /) -> Index: ...
    def match(self, pattern: str, /) -> Mask: ...
    def gather(
        self, name: str, indices: Index, /, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]: ...
    def sizes(self, name: str, indices: Index, /) -> NDArray[np.uint64]: ...
    def preserve_order(self, requested: Mask, /) -> Index: ...


class _Row(Mapping[str, bytes]):
    """The columns of one device; each is read when it is asked for."""

    __slots__ = ("_index", "_tree")

    def __init__(self, tree: Tree, index: int) -> None:
        self._tree = tree
        self._index = index

    def __getitem__(self, name: str) -> bytes:
        return self._tree.table.row(name, self._index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tree.column_names)

    def __len__(self) -> int:
        return len(self._tree.column_names)

    def __repr__(self) -> str:
        return repr(dict(self))


class Device(DeviceRef):
    """A kernel's view of one device: two fields, everything else is looked up.

    Two views of the same device in the same kernel are equal. A view of a kernel that is gone
    raises ``StateError(ESHUTDOWN)``.
    """

    __slots__ = ()
    devices: Devices

    @property
    def name(self) -> str:
        """Last component of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def path(self) -> str:
        """Path in the device tree, as below ``/sys/devices``."""
        return self.devices.tree.path(self.index)

    @property
    def parent(self) -> Device | None:
        """The device above, or None at the root."""
        parent = int(self.devices.tree.parents[self.index])
        return None if parent < 0 else Device(self.devices, parent)

    @property
    def bus(self) -> Bus | None:
        """The kernel's bus of this device, None if it has none or the kernel does not know it."""
        return self.devices.bus_of(self.index)

    @property
    def driver(self) -> Driver | None:
        """The driver that is bound, None if there is none."""
        return self.devices.driver_of(self.index)

    @property
    def columns(self) -> Mapping[str, bytes]:
        """What the hardware is, by column name, as bytes."""
        return _Row(self.devices.tree, self.index)

    @property
    def kernel(self) -> Any:
        """The kernel whose view this is."""
        return self.devices.kernel

    @property
    def kho(self) -> Kho:
        """The kernel's Kexec HandOver."""
        kho: Kho = self.devices.kernel.kho
        return kho

    @property
    def memory(self) -> PhysicalMemory:
        """The machine's memory."""
        memory: PhysicalMemory = self.devices.kernel.memory
        return memory

    @property
    def requested(self) -> bool:
        """Whether user space asked to keep this device; writable in NORMAL (RFC v1 1.9)."""
        return bool(self.devices.requested[self.index])

    @requested.setter
    def requested(self, on: bool) -> None:
        if on not in (0, 1):
            raise ValueError(f"requested of {self.path}: {on!r} is neither True nor False")
        self.devices.request_one(self.index, bool(on))

    @property
    def preserved(self) -> bool:
        """Whether its state is kept across the jump."""
        return bool(self.devices.preserved[self.index])

    @property
    def reclaimed(self) -> bool:
        """Whether it runs again in the new kernel."""
        return bool(self.devices.reclaimed[self.index])

    @property
    def slot(self) -> memoryview:
        """The driver's state of this device, in preserved memory: a writable view of its bytes."""
        return self.devices.slot(self.index, "driver")

    @property
    def bus_slot(self) -> memoryview:
        """The bus's state of this device, in preserved memory."""
        return self.devices.slot(self.index, "bus")

    @property
    def kho_node(self) -> KhoNode:
        """The device's own node in what is handed over: ``.properties`` maps names to bytes.

        For what is too small or too rare for a slot. Made on first use from PREPARE on; REBOOT may
        change values but not their lengths; read from RESTORE to FINISH in the next kernel, where
        it is empty if there was none.

        Raises:
            StateError: EINVAL outside an update, or if the device takes no part in it.
        """
        return self.devices.kho_node(self)

    def reclaim(self) -> None:
        """Say that the device runs again in this kernel.

        Raises:
            StateError: EINVAL if the device was not preserved by the previous kernel.
        """
        self.devices.reclaim_one(self.index)

    def bind(self, driver: str | Driver) -> None:
        """Bind *driver*, as writing to ``/sys/bus/…/drivers/…/bind`` does, and probe.

        In NORMAL only; but a device that came over and that nobody has reclaimed may be bound in
        UPDATED, and is restored instead of probed.

        Raises:
            StateError: EBUSY while the device is preserved or an update is under way.
            KhoError: ENODEV if the kernel has no such driver, EBUSY if one is bound already; what
                the driver's probe raised, which leaves the device unbound.
            CallbackError: restore failed; the device stays bound, and unreclaimed.
        """
        self.devices.bind(self.index, driver if isinstance(driver, str) else driver.name)

    def unbind(self) -> None:
        """Unbind the driver; NORMAL only.

        Raises:
            StateError: EBUSY while the device is preserved or an update is under way.
        """
        self.devices.unbind(self.index)

    def __repr__(self) -> str:
        return f"<Device {self.path}>"


class DeviceBatch:
    """A run of devices, as a batch callback gets it.

    Attributes:
        index: device numbers, ``int32 (n,)``, in the order of the walk.
        slots: their state in preserved memory, ``uint8 (n, size)``, writable; for a bus
            callback the bus's slots.
    """

    __slots__ = ("_devices", "index", "slots")

    def __init__(
        self, devices: Devices, index: NDArray[np.int32], slots: NDArray[np.uint8]
    ) -> None:
        self._devices = devices
        self.index = index
        self.slots = slots

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[Device]:
        return (Device(self._devices, int(i)) for i in self.index)

    def column(self, name: str, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return the hardware column *name* of these devices, ``uint8 (n, k)``.

        Args:
            name: the column.
            out: where to put it, without a copy in between: mostly ``slots``.

        Raises:
            ValueError: the rows differ in length.
            KeyError: there is no such column.
        """
        if out is None or out.flags.c_contiguous:
            return self._devices.tree.gather(name, self.index, out)
        out[:] = self._devices.tree.gather(name, self.index)
        return out

    def sizes(self, name: str) -> NDArray[np.uint64]:
        """Return the length in bytes of each row of the hardware column *name*."""
        return self._devices.tree.sizes(name, self.index)

    @property
    def kernel(self) -> Any:
        """The kernel whose devices these are."""
        return self._devices.kernel

    def reclaim(self, ok: NDArray[np.bool_] | None = None) -> None:
        """Say that these devices run again, or those where *ok* is true."""
        self._devices.reclaim(self.index if ok is None else self.index[ok])


def chosen_mask(which: ArrayLike, n: int, tree: Tree) -> Mask:
    """Return the mask over *n* devices that a mask, device numbers or paths stand for.

    Raises:
        KhoError: ENOENT if a number or path is of no device.
        TypeError, ValueError: numbers are no integers, a mask has another length.
    """
    chosen = np.asarray(which)
    if chosen.dtype == np.bool_:
        if chosen.shape != (n,):
            raise ValueError(f"request: mask of shape {chosen.shape}, {n} devices")
        return chosen
    if chosen.size and chosen.dtype.kind == "U":
        try:
            chosen = np.array([tree[str(path)] for path in chosen], np.int32)
        except KeyError as error:
            raise from_errno(errno.ENOENT, f"request: {error.args[0]}") from None
    if chosen.size and chosen.dtype.kind not in "iu":
        raise TypeError(f"request: {chosen.dtype} instead of device numbers")
    if chosen.size and (int(chosen.min()) < 0 or int(chosen.max()) >= n):
        raise from_errno(errno.ENOENT, f"request: device number not in 0..{n - 1}")
    mask = np.zeros(n, np.bool_)
    mask[chosen.astype(np.intp)] = True
    return mask


#: Driver before bus for everything but the way back.
SIDES: Final = ("driver", "bus")

_EMPTY: Final = memoryview(bytearray())


def _longer(column: NDArray[Any], more: NDArray[Any]) -> NDArray[Any]:
    """Return *column* with *more* behind it, made in one piece."""
    known = column.shape[-1]
    result = np.empty((*column.shape[:-1], known + len(more)), column.dtype)
    result[..., :known] = column
    result[..., known:] = more
    return result


class Devices(Mortal):
    """All devices as one kernel sees them: bound drivers, flags, slots.

    Attributes:
        kernel: the kernel.
        tree: the machine's device tree.
        driver_ids: number of the bound driver in :attr:`drivers`, -1 for none; ``int32``.
        bus_ids: number in :attr:`buses`, -1 for none; ``int32``.
        requested, preserved, reclaimed: flag columns, ``bool``.
        grouped: which have a ``liveupdate`` directory in ``/sys``; ``bool``.
        references: how many references live update holds on each; ``int32``.
        nr_linked: links in the list of requested devices.
        owners: (uid, gid) of the directory, of those whose owner was changed.
        slot_phys, slot_bytes: where each one's slots are, ``uint64 (2, n)``: the driver's, the
            bus's; no bytes for a device that takes no part.
        slotted: whether there are slots: from PREPARE to FINISH or CANCEL.
        by_file: whether files of sessions have brought devices over (:mod:`luo.device_files`).
    """

    def __init__(
        self,
        kernel: Any,
        tree: Tree,
        drivers: Mapping[str, Driver],
        buses: Mapping[str, Bus],
    ) -> None:
        self.kernel = kernel
        self.tree = tree
        self.drivers: list[Driver] = list(drivers.values())
        self.buses: list[Bus] = []
        self._known_buses = dict(buses)
        self._driver_number = {driver.name: i for i, driver in enumerate(self.drivers)}
        self.driver_ids: NDArray[np.int32] = np.zeros(0, np.int32)
        self.bus_ids: NDArray[np.int32] = np.zeros(0, np.int32)
        self.requested = np.zeros(0, np.bool_)
        self.preserved = np.zeros(0, np.bool_)
        self.reclaimed = np.zeros(0, np.bool_)
        self.references: NDArray[np.int32] = np.zeros(0, np.int32)
        self.nr_linked = 0
        self.owners: dict[int, tuple[int, int]] = {}
        self._writing = threading.Lock()  # readers of the state write flags beside each other
        self._moved: dict[int, tuple[int, int]] = {}  # bound anew: behind whom, and when
        self._orphans: set[int] = set()  # lost their driver while they were requested
        self._nr_early = 0  # enumerated before it was known whether KHO is on
        self.slot_phys: NDArray[np.uint64] = np.zeros((2, 0), np.uint64)
        self.slot_bytes: NDArray[np.uint64] = np.zeros((2, 0), np.uint64)
        self.slotted = False
        self.by_file = False
        self._room: NDArray[np.int32] = np.zeros(0, np.int32)
        self.rescan()

    def rescan(self) -> None:
        """Enumerate, and bind drivers to, the devices that were added to the tree since.

        What is known keeps its driver and its flags. Requests and PREPARE do this by themselves.
        """
        tree, known = self.tree, len(self.requested)
        count = len(tree.parents) - known
        if not count:
            return
        # A driver that the hardware names and this kernel lacks stays unbound; a bus that it has
        # no object for still is a bus, one without a table.
        numbers = [self._driver_number.get(name, -1) for name in tree.driver_names]
        bound = np.array([*numbers, -1], np.int32)[tree.driver_ids[known:]]
        self.driver_ids = _longer(self.driver_ids, bound)
        self.bus_ids = _longer(self.bus_ids, tree.bus_ids[known:])
        for name in tree.bus_names[len(self.buses) :]:
            self.buses.append(self._known_buses.get(name) or Bus(name))
        zeros = np.broadcast_to(np.uint8(0), count)
        for column in ("requested", "preserved", "reclaimed", "references"):
            setattr(self, column, _longer(getattr(self, column), zeros))
        # Written now, so that PREPARE does not touch them first.
        self.slot_phys = _longer(self.slot_phys, zeros)
        self.slot_bytes = _longer(self.slot_bytes, zeros)
        self.kernel.note_devices(len(self.requested))
        if not self.kernel.booted:
            self._nr_early = len(self.requested)

    # ---- looking ----

    def __len__(self) -> int:
        return len(self.tree)

    def __iter__(self) -> Iterator[Device]:
        return (Device(self, index) for index in self.tree)

    def __getitem__(self, path: str | int) -> Device:
        """Return the device at *path* (or with that number)."""
        self.rescan()
        if isinstance(path, str):
            return Device(self, self.tree[path])
        if not 0 <= path < len(self.tree.parents) or not self.tree.alive[path]:
            raise KhoNotFoundError(errno.ENOENT, f"device number {path}: no such device")
        return Device(self, path)

    def driver_of(self, index: int) -> Driver | None:
        """Return the driver bound to device number *index*."""
        number = int(self.driver_ids[index])
        return None if number < 0 else self.drivers[number]

    def bus_of(self, index: int) -> Bus | None:
        """Return the bus of device number *index*."""
        number = int(self.bus_ids[index])
        return None if number < 0 else self.buses[number]

    def ids(self, side: str) -> NDArray[np.int32]:
        """Return the number of each device's driver or bus in :meth:`parties`, by *side*."""
        return self.driver_ids if side == "driver" else self.bus_ids

    def parties(self, side: str) -> list[Any]:
        """Return the drivers or the buses, by *side* (``"driver"``, ``"bus"``)."""
        return self.drivers if side == "driver" else self.buses

    @property
    def thread_safe(self) -> frozenset[tuple[str, str, str]]:
        """(event, kind, name) of the native callbacks that several threads may call."""
        return frozenset(
            (event.upper(), side, owner.name)
            for side in SIDES
            for owner in self.parties(side)
            if owner.ops is not None and owner.ops.thread_safe
            for event in ("prepare", "reboot", "finish", "cancel", "restore")
            if isinstance(getattr(owner.ops, event), NativeCallback)
        )

    @property
    def grouped(self) -> NDArray[np.bool_]:
        """Which devices have a ``liveupdate`` directory in ``/sys``; ``bool``."""
        mask = np.full(len(self.requested), self.kernel.luo.enabled)
        if "groups-stay" in self.kernel.quirks and self.kernel.parameters.liveupdate:
            mask[: self._nr_early] = True
        return mask

    def change_owner(self, index: int, uid: int, gid: int) -> None:
        """Change who owns a device's directory in ``/sys`` (``device_change_owner()``).

        Raises:
            KhoNotFoundError: ENOENT with live update off, under the quirk change-owner-fails.
        """
        if "change-owner-fails" in self.kernel.quirks and not self.grouped[index]:
            raise from_errno(
                errno.ENOENT, f"change owner of {self.tree.path(index)}: no liveupdate directory"
            )
        self.owners[index] = (uid, gid)

    def supported(self) -> NDArray[np.bool_]:
        """Return which devices support live update themselves.

        One with a driver does if the driver has a table, one with a bus if the bus has one, one
        with neither does. What is bound now counts, not what the hardware names.
        """
        self.rescan()
        drivers = np.array([driver.ops is not None for driver in self.drivers], np.uint8)
        buses = np.array([bus.ops is not None for bus in self.buses], np.uint8)
        return both_pass(self.driver_ids, self.bus_ids, drivers, buses)

    def eligible(self) -> NDArray[np.bool_]:
        """Return which devices may be requested: those that support live update.

        Under the quirk all-ancestors, everything above them must support it too (RFC v1 1.9);
        else ancestors that do not are left alone.
        """
        ok = self.supported()
        if "all-ancestors" in self.kernel.quirks:
            ok = self._from_root(ok)
        return ok & self.tree.alive

    def _from_root(self, ok: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return where *ok* holds on the device and on everything above it."""
        parents = self.tree.parents
        result = ok.copy()
        above = parents.copy()
        while (rest := above >= 0).any():
            result[rest] &= ok[above[rest]]
            above[rest] = parents[above[rest]]
        return result

    def why_not_eligible(self, index: int) -> str:
        """Return in words what keeps device number *index* from being requested; "" if nothing."""
        at = index
        while at >= 0:
            driver, bus = self.driver_of(at), self.bus_of(at)
            where = self.tree.path(at)
            if driver is not None and driver.ops is None:
                return f"driver {driver.name} of {where} does not support live update"
            if bus is not None and bus.ops is None:
                return f"bus {bus.name} of {where} does not support live update"
            at = int(self.tree.parents[at]) if "all-ancestors" in self.kernel.quirks else -1
        return ""

    # ---- what user space writes ----

    def request_one(self, index: int, on: bool) -> None:
        """Write ``requested`` of one device, with RFC v1's order of checks (1.9).

        Raises:
            StateError: EINVAL outside NORMAL, EAGAIN if killed while it waited for an event to
                end, EDEADLK from a callback, EOPNOTSUPP if live update is off.
            KhoError: EINVAL if the device is not eligible, ENODEV if it is gone.
        """
        self._require_groups()
        if bool(self.requested[index]) == on:
            return
        what = f"requested of {self.tree.path(index)}"
        self.kernel.observe("write", self.tree.path(index))
        with self.kernel.luo.writing_attribute(what), self._writing:
            self.kernel.luo.require_normal(what)
            if bool(self.requested[index]) == on and "requested-races" not in self.kernel.quirks:
                return  # somebody else was quicker
            if not self.tree.alive[index]:
                raise from_errno(errno.ENODEV, f"{what}: the device is gone")
            if on and (why := self.why_not_eligible(index)):
                raise from_errno(errno.EINVAL, f"{what}: {why}")
            self.requested[index] = on
            self.nr_linked += 1 if on else -1
            self._orphans.discard(index)

    def _require_groups(self) -> None:
        if not (self.kernel.luo.enabled or self.grouped.any()):
            raise StateError(
                errno.EOPNOTSUPP, "requested: live update is off (liveupdate= or kho=)"
            )

    def request(self, which: str | ArrayLike, on: bool = True) -> int:
        """Write ``requested`` of many devices, all or nothing.

        Args:
            which: a glob over paths, which takes of the devices that it matches those that
                support live update; a bool mask over all devices; device numbers; or paths.
            on: what to write.

        Returns:
            Number of devices that changed.

        Raises:
            StateError: EINVAL outside NORMAL, EOPNOTSUPP if live update is off.
            KhoError: EINVAL if a mask or number names a device that is not eligible, ENOENT if
                it names no device.
            TypeError, ValueError: numbers are no integers, a mask has another length.
        """
        self._require_groups()
        with self.kernel.luo.writing_attribute("requested"), self._writing:
            self.kernel.luo.require_normal("requested")
            self.rescan()
            n = len(self.requested)
            if isinstance(which, str):
                mask = self.tree.match(which)
                if on:
                    mask = mask & self.eligible()
            else:
                mask = chosen_mask(which, n, self.tree)
                if on and (wrong := np.flatnonzero(mask & ~self.eligible())).size:
                    first = int(wrong[0])
                    why = self.why_not_eligible(first) or "no such device"
                    raise from_errno(errno.EINVAL, f"requested of {self.tree.path(first)}: {why}")
            changed = mask & (self.requested != on)
            self.requested[changed] = on
            self._orphans -= {index for index in self._orphans if changed[index]}
            count = int(changed.sum())
            self.nr_linked += count if on else -count
            return count

    def bind(self, index: int, name: str) -> None:
        """Bind the driver called *name* to device number *index*; see :meth:`Device.bind`."""
        what = f"bind {self.tree.path(index)}"
        with self.kernel.luo.writing_attribute(what), self._writing:
            waits = self._waits_for_driver(index)
            if not waits:
                self._require_unbindable(index, what)
            if name not in self._driver_number:
                raise from_errno(errno.ENODEV, f"{what}: this kernel has no driver {name}")
            if self.driver_ids[index] >= 0:
                bound = self.drivers[self.driver_ids[index]].name
                raise from_errno(errno.EBUSY, f"{what}: {bound} is bound")
            self.driver_ids[index] = self._driver_number[name]
            # Probing moves a device behind all others in the kernel's list of devices.
            self._moved.pop(index, None)
            last = max(self._moved.values(), default=(0, 0))
            self._moved[index] = len(self.requested) - 1, last[1] + 1
            self.kernel.note_binding(index)
        if waits:
            self.kernel.restore_device(index)
            return
        probe = self.drivers[self._driver_number[name]].probe
        if probe is not None:
            try:
                probe(Device(self, index))
            except BaseException:
                self.driver_ids[index] = -1
                raise

    def _waits_for_driver(self, index: int) -> bool:
        """Whether the device came over, and is held back until a driver restores it."""
        return bool(
            self.kernel.luo.state is State.UPDATED
            and self.preserved[index]
            and not self.reclaimed[index]
            and self.driver_ids[index] < 0
        )

    def unbind(self, index: int) -> None:
        """Unbind the driver of device number *index*."""
        what = f"unbind {self.tree.path(index)}"
        with self.kernel.luo.writing_attribute(what), self._writing:
            self._require_unbindable(index, what)
            if self.requested[index] and self.driver_ids[index] >= 0:
                self._orphans.add(index)
            self.driver_ids[index] = -1

    def _require_unbindable(self, index: int, what: str) -> None:
        # A driver that goes while the device is preserved leaves nothing saved.
        if "eligibility-checked-once" in self.kernel.quirks:
            return
        if self.preserved[index]:
            raise StateError(errno.EBUSY, f"{what}: the device is preserved")
        state = self.kernel.luo.state
        if state is not State.NORMAL:
            raise StateError(errno.EBUSY, f"{what}: needs NORMAL, the state is {state.name}")

    # ---- what the device layer keeps ----

    def scan(self) -> NDArray[np.bool_]:
        """Return which devices PREPARE starts from: those that are requested, and there.

        Raises:
            KernelPanic: one went while this looked at it, under the quirk scan-cursor-freed.
        """
        self.rescan()
        before = self.requested & self.tree.alive
        self.kernel.observe("scan", "devices")
        found: NDArray[np.bool_] = self.requested & self.tree.alive
        lost = np.flatnonzero(before & ~found)
        if lost.size and "scan-cursor-freed" in self.kernel.quirks:
            raise KernelPanic(f"PREPARE: use after free of {self.tree.path(int(lost[0]))}")
        return found

    def orphans(self) -> NDArray[np.bool_]:
        """Return which devices have lost their driver since they were requested."""
        mask = np.zeros(len(self.requested), np.bool_)
        mask[[index for index in self._orphans if self.driver_ids[index] < 0]] = True
        return mask

    def leaked(self, requested: NDArray[np.bool_]) -> list[int]:
        """Return the requested devices that have a requested one below and before them.

        The list of an update holds a second reference on these (quirk reference-leak). Only who
        was bound anew can stand behind its children in the kernel's list of devices.
        """
        found = []
        for above, place in self._moved.items():
            if not requested[above]:
                continue
            below = np.flatnonzero(requested & self.below(above))
            if any(self._moved.get(index, (index, 0)) < place for index in below.tolist()):
                found.append(above)
        return found

    def below(self, index: int) -> NDArray[np.bool_]:
        """Return which devices are descendants of device number *index*."""
        mask = np.zeros(len(self.requested), np.bool_)
        mask[index] = True
        parents = self.tree.parents
        for depth in range(int(self.tree.depths[index]) + 1, int(self.tree.depths.max()) + 1):
            here = np.flatnonzero(self.tree.depths == depth)
            mask[here] = mask[parents[here]]
        mask[index] = False
        return mask

    def kho_node(self, owner: Device | Driver | Bus) -> KhoNode:
        """Return the KHO node of a device, a driver or a bus; see :attr:`Device.kho_node`."""
        node: KhoNode = self.kernel.kho_node(owner)
        return node

    def expect_records(self) -> None:
        """Make room, now, for the records of the previous kernel."""
        self._room = np.full(3 * len(self.requested), -1, np.int32)
        self.kernel.recorder.touch()

    def room_for_records(self, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return two columns by record, to be filled: ``int32 (count,)`` and ``(2, count)``."""
        room, self._room = self._room, np.zeros(0, np.int32)
        if len(room) < 3 * count:
            room = np.empty(3 * count, np.int32)
        return room[:count], room[count : 3 * count].reshape(2, count)

    def clear_slots(self) -> None:
        """Forget where slots are: they have been freed."""
        self.slot_bytes.fill(0)
        self.slotted = False

    def slot(self, index: int, side: str) -> memoryview:
        """Return the view of one slot, empty if the device has none on this side."""
        if not self.slotted:
            state = self.kernel.luo.state
            raise StateError(
                errno.EINVAL,
                f"slot of {self.tree.path(index)}: devices have slots from PREPARE to FINISH,"
                f" the state is {state.name}",
            )
        row = SIDES.index(side)
        nbytes = int(self.slot_bytes[row, index])
        if not nbytes:
            return _EMPTY
        view: memoryview = self.kernel.memory.view(int(self.slot_phys[row, index]), nbytes)
        return view

    def reclaim(self, indices: NDArray[np.int32]) -> None:
        """Mark devices as running again in this kernel.

        Raises:
            StateError: EINVAL if one of them was not preserved by the previous kernel.
        """
        lost = first_unset(self.preserved.view(np.uint8), indices)
        if lost >= 0 or not self._came_over:
            self._refuse_reclaim(int(indices[max(lost, 0)]) if len(indices) else -1)
        set_flags(self.reclaimed.view(np.uint8), indices, True)
        self.kernel.luo.note_reclaim()

    def reclaim_one(self, index: int) -> None:
        """:meth:`reclaim` of one device."""
        if not self.preserved[index] or not self._came_over:
            self._refuse_reclaim(index)
        self.reclaimed[index] = True
        self.kernel.luo.note_reclaim()

    @property
    def _came_over(self) -> bool:
        """Whether what is preserved was so by the kernel before this one."""
        return self.by_file or self.kernel.luo.state is State.UPDATED

    def _refuse_reclaim(self, index: int) -> NoReturn:
        name = self.tree.path(index) if index >= 0 else "nothing"
        raise StateError(
            errno.EINVAL, f"reclaim {name}: not preserved by the kernel before this one"
        )
