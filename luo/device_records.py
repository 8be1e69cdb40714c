"""The device records of the previous kernel: read, checked, matched to devices, and freed.

Their format is in :mod:`luo.abi`; :mod:`luo.dev_liveupdate` writes them. Reading is done before the
commit point and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from luo import abi
from luo._kho import digest_slots, find_stray_slot, match_strings
from luo.device import Devices
from luo.errors import FdtError, HandoverError
from luo.fdt import Column, Fdt
from luo.kho_tree import KhoNode, to_node

if TYPE_CHECKING:
    from luo.kho import Incoming
    from luo.liveupdate import LuoIncoming

__all__ = ["SIDES", "Address", "DeviceRecords", "Index", "slot_digests"]

Index = NDArray[np.int32]
Address = NDArray[np.uint64]

#: Driver before bus for everything but the way back.
SIDES: Final = ("driver", "bus")

#: Records that stand together: where, the number of the first, their columns.
_Source = tuple[int, int, dict[str, Column]]
_COLUMNS: Final = ["path", "bus", "driver", "state", "index"]


def slot_digests(
    memory: Any,
    slabs: NDArray[np.uint64],
    phys: dict[str, Address],
    nbytes: dict[str, Address],
    owners: dict[str, Index],
    names: dict[str, list[str]],
) -> dict[tuple[str, str], tuple[int, int]]:
    """Return (bytes, digest) of all slots, by (side, driver or bus name).

    Args:
        memory: where they lie.
        slabs: ``uint64 (n, 4)``: phys, bytes, first record, count.
        phys: of each record's slot, by side.
        nbytes: likewise.
        owners: of each record, by side: a number in *names*.
        names: of drivers and buses, by side.
    """
    result = {}
    for side in SIDES:
        sums = np.zeros(len(names[side]), np.uint64)
        totals = np.zeros(len(names[side]), np.uint64)
        for slab, size, first, count in slabs.tolist():
            part = slice(first, first + count)
            digest_slots(
                memory.view(slab, size),
                np.where(nbytes[side][part] > 0, phys[side][part] - np.uint64(slab), np.uint64(0)),
                nbytes[side][part],
                owners[side][part],
                first,
                sums,
                totals,
            )
        for number, name in enumerate(names[side]):
            if totals[number]:
                result[side, name] = (int(totals[number]), int(sums[number]))
    return result


@dataclass(slots=True)
class DeviceRecords:
    """The device records of the previous kernel, read and checked; arrays in record order.

    Attributes:
        devices: number of the matching device in this kernel, -1 if it is gone; ``int32``.
        paths: path of each device, as a string column.
        phys, nbytes: of each slot, by side; ``uint64``.
        owners, names: driver and bus of each record, as number in names.
        heads: first block of the two chains.
        shards, slabs: ``uint64 (n, 4)``: phys, bytes, first record, count.
        expected: how many devices the previous kernel says that it preserved.
        nodes: tree of the KHO nodes, None if there is none.
        nodes_phys: its address, 0 if it is inline.
        numbers: numbers of the records whose device is here; ``int64``.
    """

    devices: Index
    paths: list[Column]
    phys: dict[str, Address]
    nbytes: dict[str, Address]
    owners: dict[str, Index]
    names: dict[str, list[str]]
    heads: dict[str, int]
    shards: NDArray[np.uint64]
    slabs: NDArray[np.uint64]
    expected: int
    nodes: KhoNode | None = None
    nodes_phys: int = 0

    @property
    def numbers(self) -> NDArray[np.intp]:
        """Numbers of the records whose device is here."""
        return np.flatnonzero(self.devices >= 0)

    @classmethod
    def read(cls, incoming: Incoming, found: LuoIncoming, devices: Devices) -> DeviceRecords:
        """Read the records and match them to *devices* by path and bus.

        Reads memory only: this runs before the old kernel is let go.

        Raises:
            HandoverError: a chain, a shard or a record breaks a rule.
        """
        heads = {name: found.devices.get(name, 0) for name in ("records", "slabs")}
        nodes_phys = found.devices.get("nodes", 0)
        taken: set[int] = set()
        if incoming.generation.inline:
            shards, slabs, sources = _read_inline(incoming, found)
        else:
            shards, slabs = (_read_chain(incoming, heads[name], name, taken) for name in heads)
            sources = (
                (phys, first, _read_shard(incoming, phys, nbytes, count))
                for phys, nbytes, first, count in shards.tolist()
            )
        parts: dict[str, list[Any]] = {name: [] for name in ("path", "bus", "driver")}
        state: list[list[Address]] = [[np.zeros(0, np.uint64)] for _ in range(4)]
        matched = [np.zeros(0, np.int32)]
        tree = devices.tree
        drivers = dict.fromkeys([*tree.driver_names, *(driver.name for driver in devices.drivers)])
        names = {"driver": list(drivers), "bus": list(tree.bus_names)}
        known = {side: [name.encode() for name in names[side]] for side in SIDES}
        for phys, first, columns in sources:
            path = columns["path"]
            hints = np.ascontiguousarray(columns["index"].fixed()).view(np.uint64).ravel()
            ends = path.offsets[1:] - np.uint64(1)
            if not path.present.all() or (len(path) and path.data[ends.astype(np.intp)].any()):
                raise HandoverError(f"record {first}…: a path is missing or has no end", phys)
            index = tree.find_paths(
                *_unterminated(path), np.minimum(hints, 2**31 - 1).astype(np.int32)
            )
            for side in SIDES:
                codes = match_strings(columns[side].data, columns[side].offsets, known[side])
                parts[side].append(codes)
            here = np.append(tree.bus_ids, np.int32(-3))[index]  # -1 finds the last
            # A device of that path on another bus is another device.
            matched.append(np.where(parts["bus"][-1] == here, index, -1).astype(np.int32))
            parts["path"].append(path)
            raw = np.ascontiguousarray(columns["state"].fixed()).view(np.uint64)
            for number, column in enumerate(state):
                column.append(raw[:, number].copy())
        driver_phys, driver_bytes, bus_phys, bus_bytes = map(np.concatenate, state)
        records = cls(
            np.concatenate(matched),
            parts["path"],
            {"driver": driver_phys, "bus": bus_phys},
            {"driver": driver_bytes, "bus": bus_bytes},
            {side: np.concatenate([np.zeros(0, np.int32), *parts[side]]) for side in SIDES},
            names,
            heads,
            shards,
            slabs,
            found.devices.get("count", 0),
            _read_nodes(incoming, nodes_phys, taken),
            nodes_phys,
        )
        records._check_slots()
        return records

    def _check_slots(self) -> None:
        """Raise unless every slot lies in the slab that lists its record."""
        n = len(self.devices)
        listed = np.zeros(n, np.bool_)
        for phys, _nbytes, first, count in self.slabs.tolist():
            if first + count > n or listed[first : first + count].any():
                raise HandoverError(f"slab lists records {first}…{first + count} of {n}", phys)
            listed[first : first + count] = True
        for side in SIDES:
            wrong = find_stray_slot(self.slabs, self.phys[side], self.nbytes[side])
            if wrong >= 0:
                raise HandoverError(
                    f"record {wrong}: {side} slot of {int(self.nbytes[side][wrong])} bytes"
                    " leaves its slab",
                    int(self.phys[side][wrong]),
                )
        live = self.devices[self.devices >= 0]
        if live.size and int(np.bincount(live).max()) > 1:
            raise HandoverError("two records name the same device")

    @property
    def without_device(self) -> list[str]:
        """Paths of the records whose device is not there any more."""
        gone = set(np.flatnonzero(self.devices < 0).tolist())
        paths, first = [], 0
        for column in self.paths:
            here = [place - first for place in gone if first <= place < first + len(column)]
            if here:
                strings = column.strings()
                paths += [strings[place] for place in sorted(here)]
            first += len(column)
        return paths

    @property
    def devices_without_record(self) -> int:
        """How many devices the previous kernel preserved and left no record of."""
        return max(0, self.expected - len(self.devices))

    def digests(self, memory: Any) -> dict[tuple[str, str], tuple[int, int]]:
        """Return (bytes, digest) of the slots, by (side, driver or bus name)."""
        return slot_digests(memory, self.slabs, self.phys, self.nbytes, self.owners, self.names)

    def free(self, incoming: Incoming) -> None:
        """Free shards, slabs, nodes and both chains in the new kernel."""
        if self.nodes_phys:
            incoming.restore_free(self.nodes_phys)
        for head in self.heads.values():
            if head:
                incoming.restore_free_blocks(head)
        for phys in (*self.shards[:, 0].tolist(), *self.slabs[:, 0].tolist()):
            incoming.restore_free(phys)


def _read_chain(incoming: Incoming, head: int, name: str, taken: set[int]) -> NDArray[np.uint64]:
    if not head:
        return np.zeros((0, 4), np.uint64)
    entries = np.ascontiguousarray(incoming.read_blocks(head, abi.LUO_EXTENT_BYTES)).view(np.uint64)
    _check_extents(incoming, entries, name, taken)
    return entries


def _check_extents(
    incoming: Incoming, entries: NDArray[np.uint64], name: str, taken: set[int]
) -> None:
    """Raise unless each is in a preserved block of its own; *taken* has those listed so far.

    One listed many times would be read as often, and freed twice.
    """
    for phys, nbytes, _first, _count in entries.tolist():
        order = incoming.order_of(phys)
        if order is None or nbytes > incoming.memory.page_size << order:
            raise HandoverError(f"{name}: {nbytes} bytes are not a preserved block", phys)
        if phys in taken:
            raise HandoverError(f"{name}: the block is listed twice", phys)
        taken.add(phys)


def _read_inline(
    incoming: Incoming, found: LuoIncoming
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], Iterable[_Source]]:
    """Return no shards, the slabs, and the one source of records: LUO's node in the root tree."""
    none = np.zeros((0, 4), np.uint64)
    where, count = found.phys, found.devices.get("count", 0)
    if not count:
        return none, none, []
    path = f"/{abi.LUO_NODE}/devices"
    try:
        raw = bytes(incoming.root.node(path).get("slabs") or b"")
        if len(raw) % abi.LUO_EXTENT_BYTES:
            raise HandoverError(f"{path}: slabs of {len(raw)} bytes are not whole entries", where)
        columns = _checked(incoming.root.read_nodes(path, _COLUMNS), count, where)
    except (FdtError, ValueError, KeyError) as error:
        if isinstance(error, HandoverError):
            raise
        raise HandoverError(f"device records: {error}", where) from error
    slabs = np.frombuffer(raw, np.uint64).reshape(-1, 4)
    _check_extents(incoming, slabs, "slabs", set())
    return none, slabs, [(where, 0, columns)]


def _read_nodes(incoming: Incoming, phys: int, taken: set[int]) -> KhoNode | None:
    """Return the tree of KHO nodes, None if there is none."""
    try:
        if incoming.generation.inline:
            top = incoming.root.node(f"/{abi.LUO_NODE}")
            return next((to_node(node) for node in top.children if node.name == "nodes"), None)
        if not phys:
            return None
        nbytes = incoming.memory.page_size << (incoming.order_of(phys) or 0)
        _check_extents(incoming, np.array([[phys, nbytes, 0, 0]], np.uint64), "nodes", taken)
        if not incoming.memory.is_populated(phys, 1):
            raise HandoverError("nodes: never written", phys)
        size = Fdt(incoming.memory.view(phys, nbytes), check=False).totalsize
        tree = Fdt(incoming.memory.view(phys, min(size, nbytes)))
        if bytes(tree.root.get("compatible") or b"") != abi.LUO_NODES_COMPATIBLE.encode() + b"\0":
            raise HandoverError(f"nodes: not compatible with {abi.LUO_NODES_COMPATIBLE}", phys)
        return to_node(tree.root)
    except FdtError as error:
        raise HandoverError(f"nodes: {error}", phys) from error


def _checked(columns: dict[str, Column], count: int, phys: int) -> dict[str, Column]:
    for name, size in (("state", 32), ("index", 8)):
        if columns[name].fixed().shape != (count, size):
            raise HandoverError(f"device records: {name} is not {count} times {size}", phys)
    return columns


def _read_shard(incoming: Incoming, phys: int, nbytes: int, count: int) -> dict[str, Column]:
    if not incoming.memory.is_populated(phys, max(nbytes, 1)):  # reading a hole would fill it
        raise HandoverError("device records: never written", phys)
    try:
        tree = Fdt(incoming.memory.view(phys, nbytes))
        compatible = bytes(tree.root["compatible"]) if "compatible" in tree.root else b""
        if compatible != abi.LUO_DEVICES_COMPATIBLE.encode() + b"\0":
            raise HandoverError(f"device records: compatible is {compatible!r}", phys)
        columns = _checked(tree.read_nodes("/", _COLUMNS), count, phys)
    except (FdtError, ValueError) as error:
        if isinstance(error, HandoverError):
            raise
        raise HandoverError(f"device records: {error}", phys) from error
    return columns


def _unterminated(column: Column) -> tuple[NDArray[np.uint8], Address]:
    """Return (data, offsets) of a string column without the NULs."""
    keep = np.ones(len(column.data), np.bool_)
    keep[(column.offsets[1:] - np.uint64(1)).astype(np.intp)] = False
    offsets: Address = column.offsets - np.arange(len(column.offsets)).astype(np.uint64)
    return column.data[keep], offsets
