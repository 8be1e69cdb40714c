"""The device records of the previous kernel: read, checked, matched to devices, and freed.

Their format is in :mod:`luo.abi`; :mod:`luo.dev_liveupdate` writes them. Reading is done before the
commit point and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luo import abi
from luo._kho import RecordReader, digest_slots
from luo.device import SIDES, Devices
from luo.errors import FdtError, HandoverError
from luo.fdt import Fdt, Node
from luo.kho_tree import KhoNode, to_node

if TYPE_CHECKING:
    from luo.kho import Incoming
    from luo.liveupdate import LuoIncoming

__all__ = ["DeviceRecords", "Index", "slot_digests"]

Index: TypeAlias = NDArray[np.int32]
Slots: TypeAlias = NDArray[np.uint64]

#: Bytes that no record is below: its node, path, state and index.
_LEAST_RECORD = 92


def slot_digests(
    memory: Any,
    slabs: NDArray[np.uint64],
    slots_of: Callable[[slice], tuple[Slots, Slots]],
    owners_of: Callable[[str, slice], Index],
    names: dict[str, list[str]],
) -> dict[tuple[str, str], tuple[int, int]]:
    """Return (bytes, digest) of all slots, by (side, driver or bus name).

    Args:
        memory: where they lie.
        slabs: ``uint64 (n, 4)``: phys, bytes, first record, count.
        slots_of: returns addresses and sizes of a slice of records, ``uint64 (2, k)`` each.
        owners_of: returns the drivers or buses of a slice of records: numbers in *names*.
        names: of drivers and buses, by side.
    """
    sums = {side: np.zeros(len(names[side]), np.uint64) for side in SIDES}
    totals = {side: np.zeros(len(names[side]), np.uint64) for side in SIDES}
    for slab, size, first, count in slabs.tolist():
        part = slice(first, first + count)
        phys, nbytes = slots_of(part)
        offsets = np.where(nbytes > 0, phys - np.uint64(slab), np.uint64(0))
        for row, side in enumerate(SIDES):
            digest_slots(
                memory.view(slab, size),
                offsets[row],
                nbytes[row],
                owners_of(side, part),
                first,
                sums[side],
                totals[side],
            )
    return {
        (side, name): (int(totals[side][number]), int(sums[side][number]))
        for side in SIDES
        for number, name in enumerate(names[side])
        if totals[side][number]
    }


@dataclass(slots=True)
class DeviceRecords:
    """The device records of the previous kernel, read and checked.

    Where the slots of the devices that are here lie is with the devices (``Devices.slot_phys``).

    Attributes:
        devices: number of the matching device in this kernel, -1 if it is gone; ``int32``, in
            record order.
        owners: driver and bus of each record, as number in names; ``int32 (2, n)``.
        names: of drivers and buses, by side.
        lost: of each record whose device is not here: its number, its path, the four words of
            its state.
        heads: first block of the two chains.
        shards, slabs: ``uint64 (n, 4)``: phys, bytes, first record, count.
        expected: how many devices the previous kernel says that it preserved.
        nodes: tree of the KHO nodes, None if there is none.
        nodes_phys: its address, 0 if it is inline.
    """

    devices: Index
    owners: NDArray[np.int32]
    names: dict[str, list[str]]
    lost: list[tuple[int, str, list[int]]]
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

    @property
    def found(self) -> Index:
        """The devices that have a record, in record order."""
        return self.devices[self.devices >= 0] if self.lost else self.devices

    @classmethod
    def read(cls, incoming: Incoming, found: LuoIncoming, devices: Devices) -> DeviceRecords:
        """Read the records, match them to *devices* by path and bus, and say where slots are.

        Reads memory only: this runs before the old kernel is let go.

        Raises:
            HandoverError: a chain, a shard or a record breaks a rule.
        """
        heads = {name: found.devices.get(name, 0) for name in ("records", "slabs")}
        nodes_phys = found.devices.get("nodes", 0)
        taken: set[int] = set()
        if incoming.generation.inline:
            shards, slabs = np.zeros((0, 4), np.uint64), _read_inline_slabs(incoming, found)
            rooms = [(found.phys, incoming.root.totalsize, found.devices.get("count", 0))]
        else:
            shards, slabs = (_read_chain(incoming, heads[name], name, taken) for name in heads)
            rooms = shards[:, [0, 1, 3]].tolist()
        for phys, room, nr in rooms:  # before anything of that size is made
            if nr > room // _LEAST_RECORD:
                raise HandoverError(f"device records: no room for {nr} in {room} bytes", phys)
        count = sum(nr for _phys, _room, nr in rooms)
        slabs = _in_order(slabs, count)
        tree = devices.tree
        drivers = dict.fromkeys([*tree.driver_names, *(driver.name for driver in devices.drivers)])
        names = {"driver": list(drivers), "bus": list(tree.bus_names)}
        numbers, owners = devices.room_for_records(count)
        devices.clear_slots()
        reader = RecordReader(
            tree.table,
            [name.encode() for name in names["driver"]],
            [name.encode() for name in names["bus"]],
            slabs,
            numbers,
            owners,
            devices.slot_phys,
            devices.slot_bytes,
        )
        if not incoming.generation.inline:
            for phys, nbytes, _first, nr in shards.tolist():
                if incoming.memory.is_resident(phys, nbytes):
                    shard = incoming.memory.view(phys, nbytes)
                else:  # a copy fills no hole
                    shard = memoryview(bytearray(nbytes))
                    incoming.memory.read_into(phys, shard)
                _read_records(reader, phys, partial(_shard_root, shard), nr)
        elif count:
            _read_records(reader, found.phys, partial(_inline_node, incoming), count)
        return cls(
            numbers,
            owners,
            names,
            reader.lost,
            heads,
            shards,
            slabs,
            found.devices.get("count", 0),
            _read_nodes(incoming, nodes_phys, taken),
            nodes_phys,
        )

    @property
    def without_device(self) -> list[str]:
        """Paths of the records whose device is not there any more."""
        return [path for _number, path, _state in self.lost]

    @property
    def devices_without_record(self) -> int:
        """How many devices the previous kernel preserved and left no record of."""
        return max(0, self.expected - len(self.devices))

    def digests(self, memory: Any, devices: Devices) -> dict[tuple[str, str], tuple[int, int]]:
        """Return (bytes, digest) of the slots, by (side, driver or bus name)."""

        def slots_of(part: slice) -> tuple[Slots, Slots]:
            here = self.devices[part]
            phys, nbytes = np.zeros((2, 2, len(here)), np.uint64)
            phys[:, here >= 0] = devices.slot_phys[:, here[here >= 0]]
            nbytes[:, here >= 0] = devices.slot_bytes[:, here[here >= 0]]
            for number, _path, state in self.lost:
                if part.start <= number < part.stop:
                    place = number - part.start
                    phys[:, place], nbytes[:, place] = state[::2], state[1::2]
            return phys, nbytes

        def owners_of(side: str, part: slice) -> Index:
            owners: Index = self.owners[SIDES.index(side), part]
            return owners

        return slot_digests(memory, self.slabs, slots_of, owners_of, self.names)

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


def _in_order(slabs: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """Return the slabs by their first records, of which there are *count*, each in one slab."""
    listed = sorted(slabs.tolist(), key=lambda entry: int(entry[2]))
    end = 0
    for phys, _nbytes, first, nr in listed:
        if first + nr > count or first < end:
            raise HandoverError(f"slab lists records {first}…{first + nr} of {count}", phys)
        end = first + nr
    return np.array(listed, np.uint64).reshape(-1, 4)


def _inline_node(incoming: Incoming) -> Node:
    return incoming.root.node(f"/{abi.LUO_NODE}/devices")


def _read_inline_slabs(incoming: Incoming, found: LuoIncoming) -> NDArray[np.uint64]:
    """Return the slabs that an inline tree lists."""
    if not found.devices.get("count", 0):
        return np.zeros((0, 4), np.uint64)
    try:
        raw = bytes(_inline_node(incoming).get("slabs") or b"")
    except (FdtError, KeyError) as error:
        raise HandoverError(f"device records: {error}", found.phys) from error
    if len(raw) % abi.LUO_EXTENT_BYTES:
        raise HandoverError(f"slabs of {len(raw)} bytes are not whole entries", found.phys)
    slabs = np.frombuffer(raw, np.uint64).reshape(-1, 4)
    _check_extents(incoming, slabs, "slabs", set())
    return slabs


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


def _shard_root(shard: memoryview) -> Node:
    root = Fdt(shard, check=False).root
    compatible = bytes(root["compatible"]) if "compatible" in root else b""
    if compatible != abi.LUO_DEVICES_COMPATIBLE.encode() + b"\0":
        raise ValueError(f"compatible is {compatible!r}")
    return root


def _read_records(reader: RecordReader, phys: int, node: Callable[[], Node], count: int) -> None:
    try:
        reader.read(node(), count)
    except (FdtError, ValueError, KeyError) as error:
        if isinstance(error, HandoverError):
            raise
        raise HandoverError(f"device records: {error}", phys) from error
