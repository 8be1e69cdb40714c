"""What outlives every kernel: physical memory and the tree of devices.

A :class:`DeviceTree` says which hardware there is: names, parents, buses, drivers, NUMA nodes, and
bytes that whoever made the tree keeps beside a device. It knows no states and no flags: those are
a kernel's view of it. Linux keeps a ``struct device`` each; here they are rows of columns in the
compiled core, and no Python object per device exists unless somebody asks for one.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from luo._kho import DeviceTable

if TYPE_CHECKING:
    from luo.device_node import ControlSocket
    from luo.dma import Dma, Target
    from luo.memory import PhysicalMemory

__all__ = ["DeviceTree", "Machine"]

_Row = bytes | bytearray | memoryview | None
_Bytes: TypeAlias = bytes | bytearray | memoryview
_Ragged: TypeAlias = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]
_Names: TypeAlias = Sequence[str] | tuple[str, int, int] | tuple[Any, Any]
_Codes: TypeAlias = str | Sequence[str | None] | tuple[Any, Sequence[str]] | None
_Shape: TypeAlias = "int | npt.NDArray[np.uint64] | None"


class DeviceTree:
    """Devices in the order in which they were added; a parent comes before its children.

    A device is known by its index, which stays its own for ever, or by its path: the names from
    the root down, joined by ``/``, without one in front (``"pci0000:00/0000:00:1f.2"``). A path has
    at most 65,535 bytes. Names that are not UTF-8 come and go as ``os.fsdecode()`` has them.

    ``len()`` counts, and iteration yields the indices of, devices that are not removed. Arrays
    have a row for each device ever added; they are read-only views, to be taken anew after adding.

    Context:
        Any thread; bulk work runs without the GIL.
    """

    __slots__ = ("_table",)

    def __init__(self) -> None:
        self._table = DeviceTable()

    @property
    def table(self) -> DeviceTable:
        """The core's table, for code of this library that works on columns."""
        return self._table

    def __repr__(self) -> str:
        return f"<DeviceTree of {len(self)} devices, columns {self.column_names}>"

    # ---- adding and removing -----------------------------------------------------------------

    def add(
        self,
        name: str,
        parent: SupportsIndex | str | None = None,
        bus: str | None = None,
        driver: str | None = None,
        node: int = 0,
        **columns: _Bytes,
    ) -> int:
        """Add one device.

        Args:
            name: not empty, without ``/`` and NUL, and not that of a sibling.
            parent: its index or path; None for a root.
            bus: name of its bus, or None.
            driver: name of the driver that its kernels bind to it, or None.
            node: NUMA node, -1 for none.
            columns: bytes to keep beside it, by column; a column that is new is empty for others.

        Returns:
            Its index.

        Raises:
            ValueError: the name may not be, the path is too long, the parent is no device.
            KeyError: no device has the parent's path.
            KhoError: EROFS if the tree came from a memfd.
        """
        if parent is None:
            above = -1
        elif isinstance(parent, str):
            above = self[parent]
        else:
            above = parent.__index__()
            if above < 0:
                raise ValueError(f"add {name!r}: parent {above}")
        return self._table.add(name, above, bus, driver, node, columns or None)

    def add_many(
        self,
        names: _Names,
        parents: npt.ArrayLike | None = None,
        buses: _Codes = None,
        drivers: _Codes = None,
        nodes: npt.ArrayLike | None = None,
        **columns: Any,
    ) -> range:
        """Add devices in bulk: all of them, or none if one is refused.

        Args:
            names: str each; ``("dev", start, count)`` for dev<start>, dev<start+1>, …;
                or (data, offsets) arrays, uint8 and uint64.
            parents: index of each parent, -1 for a root, lower than the device's own; it may be
                of this call. None: all are roots.
            buses: one name for all; a name or None each; or (codes, names): an index into names
                each, -1 for none. None: no device has a bus.
            drivers: as buses.
            nodes: NUMA node each, or one for all; None for 0.
            columns: bytes beside them, by column: one value for all; a (n, k) array, whose rows
                are taken as bytes; bytes or None each; or rows of any size as (data, offsets),
                or an object with these attributes.

        Returns:
            Their indices.

        Raises:
            TypeError: an argument has no such form.
            ValueError: lengths differ, or as :meth:`add`.
            KhoError: EROFS if the tree came from a memfd; ENOMEM.

        Example:
            >>> tree = DeviceTree()
            >>> tree.add_many(["pci0000:00", "0000:00:1f.2"], [-1, 0], ["pci", "pci"])
            range(0, 2)
            >>> tree.path(1)
            'pci0000:00/0000:00:1f.2'
        """
        data, offsets = _names(names)
        count = max(len(offsets) - 1, 0)
        return self._table.add_many(
            data,
            offsets,
            None if parents is None else _int32(parents, "parents"),
            _codes(buses, "buses"),
            _codes(drivers, "drivers"),
            _nodes(nodes),
            {name: _column(name, value, count) for name, value in columns.items()},
        )

    def remove(self, device: SupportsIndex | str) -> int:
        """Remove the device *device* (a path or an index) with its descendants.

        Indices of others do not change, and no index is used again.

        Returns:
            How many devices went.

        Raises:
            KeyError: no device has the path.
            IndexError: no device has the index.
            KhoError: EROFS if the tree came from a memfd.
        """
        row = self[device] if isinstance(device, str) else device.__index__()
        return self._table.remove(row)

    # ---- looking up --------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[int]:
        return map(int, np.flatnonzero(self._table.alive))

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self._table.find(path) >= 0

    def __getitem__(self, path: str) -> int:
        row = self._table.find(path)
        if row < 0:
            raise KeyError(f"{path!r}: no such device")
        return row

    def path(self, index: SupportsIndex) -> str:
        """Return the path of the device *index*, also of a removed one; IndexError if none."""
        return self._table.path(index)

    def paths(self, indices: npt.ArrayLike) -> _Ragged:
        """Return the paths of the devices *indices*: data (uint8) and offsets (uint64, n + 1).

        Raises:
            IndexError: an index is of no device.
        """
        return self._table.paths(_int32(indices, "indices"))

    def find_paths(
        self,
        data: Any,
        offsets: npt.ArrayLike,
        hints: npt.ArrayLike | None = None,
    ) -> npt.NDArray[np.int32]:
        """Return the index of the device with each path, -1 where there is none.

        Args:
            data: all paths, one behind the other.
            offsets: where they begin and end, (n + 1,).
            hints: an index to try first for each; it is compared in full, so any may be wrong.

        Raises:
            ValueError: offsets decrease or exceed the data, or hints are not n.
        """
        return self._table.find_paths(
            _uint8(data), _uint64(offsets), None if hints is None else _int32(hints, "hints")
        )

    def index(self) -> None:
        """Build the path index now; otherwise the first search that needs it does."""
        self._table.index()

    def match(self, glob: str) -> npt.NDArray[np.bool_]:
        """Return which devices' paths match *glob*, as ``fnmatch`` does: ``*`` crosses ``/``."""
        return self._table.match(glob)

    # ---- columns -----------------------------------------------------------------------------

    @property
    def nr_rows(self) -> int:
        """How many devices were ever added: the length of the arrays."""
        return self._table.nr_rows

    @property
    def readonly(self) -> bool:
        """Whether the tree came from a memfd."""
        return self._table.readonly

    @property
    def parents(self) -> npt.NDArray[np.int32]:
        """Index of each parent, -1 for a root."""
        return self._table.parents

    @property
    def depths(self) -> npt.NDArray[np.int32]:
        """Depth of each device; a root has 1."""
        return self._table.depths

    @property
    def bus_ids(self) -> npt.NDArray[np.int32]:
        """Index into :attr:`bus_names`, -1 for none."""
        return self._table.bus_ids

    @property
    def driver_ids(self) -> npt.NDArray[np.int32]:
        """Index into :attr:`driver_names`, -1 for none."""
        return self._table.driver_ids

    @property
    def nodes(self) -> npt.NDArray[np.int32]:
        """NUMA node of each device, -1 for none."""
        return self._table.nodes

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """False where a device was removed."""
        return self._table.alive

    @property
    def names(self) -> _Ragged:
        """Own names of the devices: data and offsets."""
        return self._table.names

    @property
    def bus_names(self) -> list[str]:
        """Names of the buses by id."""
        return self._table.bus_names

    @property
    def driver_names(self) -> list[str]:
        """Names of the drivers by id."""
        return self._table.driver_names

    @property
    def column_names(self) -> list[str]:
        """Names of the columns that devices were given, in the order in which they came up."""
        return self._table.column_names

    def column(self, name: str) -> _Ragged:
        """Return data and offsets of the column *name*; KeyError if no device was given it."""
        return self._table.column(name)

    def sizes(self, name: str, indices: npt.ArrayLike) -> npt.NDArray[np.uint64]:
        """Return how many bytes each of *indices* has in the column *name*."""
        return self._table.sizes(name, _int32(indices, "indices"))

    def gather(
        self, name: str, indices: npt.ArrayLike, out: npt.NDArray[np.uint8] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Copy the column *name* of *indices*, all of k bytes, into an array of shape (n, k).

        Args:
            name: of the column.
            indices: of n devices.
            out: array to copy into, uint8, C-contiguous; None for a new one.

        Raises:
            KeyError: no such column.
            IndexError: no such device.
            ValueError: sizes differ, or *out* has another shape.
        """
        return self._table.gather(name, _int32(indices, "indices"), out)

    # ---- what a live update asks -------------------------------------------------------------

    def preserve_order(
        self, requested: npt.ArrayLike, group: npt.ArrayLike | None = None
    ) -> npt.NDArray[np.int32]:
        """Return the devices that a live update preserves, children before parents.

        Requested devices in the order of adding, each followed by those of its ancestors that
        are not in yet; then sorted by depth, deepest first, stable.

        Args:
            requested: bool or uint8 per device.
            group: a number per device, -1 for none: within a depth, devices of one group are
                brought together at the place of the group's first, keeping their order.

        Raises:
            ValueError: a length is not :attr:`nr_rows`, or a group is below -1.

        Source:
            RFC v1, ``dev_liveupdate``: the preserve list.
        """
        order = self._table.preserve_order(_mask(requested, "requested"))
        return order if group is None else self._table.group_order(order, _int32(group, "group"))

    def eligible(self, driver_ok: npt.ArrayLike, bus_ok: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which devices may be requested.

        Those where the device and every ancestor pass; one passes if its driver does, or it has
        none, and its bus does, or it has none.

        Args:
            driver_ok: bool or uint8 per driver, by id.
            bus_ok: the same per bus.

        Raises:
            ValueError: fewer flags than ids.

        Source:
            RFC v1, ``dev_liveupdate``: the check behind ``requested``.
        """
        return self._table.eligible(_mask(driver_ok, "driver_ok"), _mask(bus_ok, "bus_ok"))

    # ---- to another process ------------------------------------------------------------------

    def to_memfd(self) -> int:
        """Write the tree into a new memfd, seal it against change, and return its descriptor."""
        return self._table.to_memfd()

    @classmethod
    def from_memfd(cls, fd: int) -> DeviceTree:
        """Map a tree that :meth:`to_memfd` wrote; nothing is copied, and it stays as it is.

        Args:
            fd: the descriptor; it may be closed afterwards.

        Raises:
            HandoverError: the descriptor is no sealed memfd, or the bytes break the format.
            OSError: it cannot be mapped.
        """
        tree = cls.__new__(cls)
        tree._table = DeviceTable.from_memfd(fd)
        return tree


class Machine:
    """Hardware: what a kernel finds when it boots, and leaves behind when it goes.

    Args:
        memory: physical memory, or a size in bytes or as ``"64GiB"``.
        devices: the tree of devices; None for a machine without.

    Attributes:
        memory: the :class:`luo.memory.PhysicalMemory`.
        devices: the :class:`DeviceTree`.
        running: the kernel that runs on it, here or in another process; None if it is off.
        control: where its kernels offer ``/dev/liveupdate``; None if they do not.
        elsewhere: in a process that has a kernel of the machine and not its hardware: what devices
            write, as the process that has it said when the kernel started. Otherwise None.
        watchers: each is called with the path below ``/sys`` of an attribute whose value has
            changed, as who polls it is woken (``sysfs_notify()``).
    """

    __slots__ = ("_streams", "control", "devices", "elsewhere", "memory", "running", "watchers")

    def __init__(
        self, memory: PhysicalMemory | SupportsIndex | str, devices: DeviceTree | None = None
    ) -> None:
        if isinstance(memory, str) or hasattr(memory, "__index__"):
            from luo.memory import PhysicalMemory

            memory = PhysicalMemory(memory)
        self.memory = memory
        self.devices = DeviceTree() if devices is None else devices
        self.running: Any = None
        self.control: ControlSocket | None = None
        self.elsewhere: list[Target] | None = None
        self._streams: list[weakref.ref[Dma]] = []
        self.watchers: list[Callable[[str], None]] = []

    def notify(self, path: str) -> None:
        """Wake who watches the attribute at *path* below ``/sys``."""
        for watcher in tuple(self.watchers):
            watcher(path)

    def __repr__(self) -> str:
        return f"<Machine of {self.memory.size:#x} bytes and {len(self.devices)} devices>"

    def clone(self) -> Machine:
        """Return a machine with the same bytes in memory and the same devices.

        A kernel boots on it as on one just switched on: page state is not copied. Its device
        tree is a read-only copy.
        """
        fd = self.devices.to_memfd()
        try:
            devices = DeviceTree.from_memfd(fd)
        finally:
            os.close(fd)
        return Machine(self.memory.clone(), devices)

    def dma(
        self,
        device: SupportsIndex | str,
        phys: SupportsIndex,
        nbytes: SupportsIndex,
        pattern: bytes | Callable[[int], bytes] | None = None,
        *,
        interval: float = 0.001,
    ) -> Dma:
        """Let *device* write into memory, on and on, until it is stopped; see :mod:`luo.dma`.

        It writes from a thread of its own, whichever kernel runs, also while the kernel is changed.
        A kernel that boots and was not told to keep the range reports it.

        Args:
            device: path or index.
            phys: first byte of a ring of entries.
            nbytes: of the ring, whole entries.
            pattern: what write *n*, from 0 on, leaves in entry ``n`` modulo their number:
                ``pattern(n)``, of the same length for every *n*, or the same bytes each time. None
                is :func:`luo.dma.stamp`: 64 bytes that say *n*.
            interval: seconds of pause after at most 64 writes.

        Returns:
            its handle; it stops with it.

        Raises:
            KeyError, IndexError: no such device.
            ValueError: the interval is not above 0.
            KhoError: EINVAL if the range is empty, not RAM or not whole entries; EOPNOTSUPP in a
                process that has a kernel of this machine and not its hardware; EROFS.
        """
        from luo.dma import Dma, stamp  # it knows kernels, which this module does not

        stream = Dma(self, device, phys, nbytes, stamp if pattern is None else pattern, interval)
        self._streams = [weakref.ref(other) for other in self.streams] + [weakref.ref(stream)]
        return stream

    @property
    def streams(self) -> list[Dma]:
        """The devices that write at present, in the order in which they began."""
        found = [stream() for stream in self._streams]
        return [stream for stream in found if stream is not None and stream.running]


# ---- forms of arguments ----------------------------------------------------------------------


def _int32(values: npt.ArrayLike, what: str) -> npt.NDArray[np.int32]:
    array = np.asarray(values)
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.int32)  # what an empty list becomes
    if array.dtype.kind not in "iu":
        raise TypeError(f"{what}: {array.dtype} instead of integers")
    if array.ndim != 1:
        raise ValueError(f"{what}: {array.ndim} dimensions instead of one")
    if array.dtype != np.int32 and array.size:
        low, high = int(array.min()), int(array.max())
        if low < -(1 << 31) or high >= 1 << 31:
            raise ValueError(f"{what}: {low if low < 0 else high}: not an int32")
    return np.ascontiguousarray(array, dtype=np.int32)


def _mask(values: npt.ArrayLike, what: str) -> npt.NDArray[np.uint8]:
    array = np.asarray(values)
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.bool_)
    if array.dtype not in (np.dtype(np.bool_), np.dtype(np.uint8)):
        raise TypeError(f"{what}: {array.dtype} instead of bool or uint8")
    if array.ndim != 1:
        raise ValueError(f"{what}: {array.ndim} dimensions instead of one")
    return np.ascontiguousarray(array).view(np.uint8)


def _uint64(values: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError(f"offsets: {array.ndim}-dimensional {array.dtype}")
    if array.dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise ValueError("offsets: below 0")
    return np.ascontiguousarray(array, dtype=np.uint64)


def _uint8(data: Any) -> npt.NDArray[np.uint8]:
    """The bytes of any buffer."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    view = memoryview(data)
    if view.nbytes == 0:
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer(view.cast("B") if view.c_contiguous else view.tobytes(), dtype=np.uint8)


def _joined(rows: Sequence[bytes]) -> _Ragged:
    offsets = np.zeros(len(rows) + 1, dtype=np.uint64)
    np.cumsum(np.fromiter(map(len, rows), np.uint64, len(rows)), out=offsets[1:])
    return _uint8(b"".join(rows)), offsets


def _names(names: _Names) -> _Ragged:
    if isinstance(names, str | bytes):
        raise TypeError(f"names: {names!r} instead of several")
    if isinstance(names, tuple):
        if len(names) == 3 and isinstance(names[0], str) and not isinstance(names[1], str):
            return DeviceTable.numbered(names[0], names[1], names[2])
        if len(names) == 2 and not isinstance(names[0], str):
            return _uint8(names[0]), _uint64(names[1])
    encoded = [cast("str", name).encode("utf-8", "surrogateescape") for name in names]
    return _joined(encoded)


def _codes(given: _Codes, what: str) -> tuple[npt.NDArray[np.int32] | None, Sequence[str]] | None:
    if given is None:
        return None
    if isinstance(given, str):
        return None, [given]
    if (
        isinstance(given, tuple)
        and len(given) == 2
        and given[0] is not None
        and not isinstance(given[0], str)
    ):
        codes, known = cast("tuple[Any, Sequence[str]]", given)
        return _int32(codes, what), list(known)
    ids: dict[str | None, int] = {None: -1}
    numbers = np.fromiter(
        (ids.setdefault(name, len(ids) - 1) for name in cast("Sequence[str | None]", given)),
        np.int32,
        len(given),
    )
    return numbers, [name for name in ids if name is not None]


def _nodes(nodes: npt.ArrayLike | None) -> npt.NDArray[np.int32] | int:
    if nodes is None:
        return 0
    if hasattr(nodes, "__index__") and np.ndim(nodes) == 0:
        return int(cast("Any", nodes).__index__())
    return _int32(nodes, "nodes")


def _column(name: str, value: Any, count: int) -> tuple[npt.NDArray[np.uint8], _Shape]:
    if isinstance(value, bytes | bytearray | memoryview):
        return _uint8(value), None
    if isinstance(value, np.ndarray):
        if len(value) != count:
            raise ValueError(f"column {name!r}: {len(value)} rows for {count} devices")
        return _uint8(value), value.nbytes // count if count else 0
    if isinstance(value, tuple) and len(value) == 2 and not isinstance(value[1], _Row):
        return _uint8(value[0]), _uint64(value[1])
    if hasattr(value, "offsets") and hasattr(value, "data"):
        return _uint8(value.data), _uint64(value.offsets)
    rows = [b"" if row is None else bytes(memoryview(row)) for row in value]
    if len(rows) != count:
        raise ValueError(f"column {name!r}: {len(rows)} rows for {count} devices")
    return _joined(rows)
