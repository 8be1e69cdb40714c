"""What PREPARE saves of the devices, for the next kernel: slots, records and KHO nodes.

The format is in :mod:`luo.abi`; :mod:`luo.device_records` reads it. Slots lie in slabs, records in
shards of at most what a kernel allocates in one piece, both listed in chains of blocks; in
kho-v5-series the records are nodes of the inline tree. Everything that can fail for memory is here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luo import abi
from luo._kho import DeviceList, RecordWriter, spread_strings
from luo.device import Devices
from luo.device_records import Index
from luo.errors import from_errno
from luo.fdt import Column, FdtWriter
from luo.kho_tree import KhoNode, to_fdt

if TYPE_CHECKING:
    from luo.kho import Kho

__all__ = ["SavedDevices"]


class SavedDevices:
    """What one update has allocated for the devices, for whoever must free it.

    Attributes:
        slabs, shards: addresses of the blocks.
        chains: first block of the chain of each, by ``"slabs"`` and ``"records"``.
        slab_entries: ``uint64 (n, 4)``: phys, bytes, first record, count.
        node: the ``devices`` node of an inline tree, instead of shards and chains.
        nodes, nodes_bytes: where the tree of KHO nodes is; 0 if there is none.
        nr_records, record_bytes: of all records.
    """

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self.slabs: list[int] = []
        self.shards: list[int] = []
        self.chains: dict[str, int] = {}
        self.slab_entries: NDArray[np.uint64] = np.zeros((0, 4), np.uint64)
        self.node: KhoNode | None = None
        self.nodes = 0
        self.nodes_bytes = 0
        self.nr_records = 0
        self.record_bytes = 0

    def _has(self, quirk: str) -> bool:
        return quirk in self._devices.kernel.quirks

    def allocate_slots(self, listed: DeviceList) -> None:
        """Lay the slots of the devices out in slabs, and tell the devices where they are.

        Raises:
            KhoError: E2BIG if a device asks for more than a kernel allocates in one piece.
            KhoNoMemoryError: no room.
        """
        devices = self._devices
        kho: Kho = devices.kernel.kho
        limit = devices.kernel.memory.page_size << devices.kernel.memory.max_order
        entries, too_large = listed.cut_slabs(devices.slot_bytes, limit)
        if too_large >= 0:
            device = int(listed.numbers[too_large])
            asked = " and ".join(str(int(nbytes)) for nbytes in devices.slot_bytes[:, device])
            raise from_errno(
                errno.E2BIG,
                f"PREPARE {devices.tree.path(device)}: slots of {asked} bytes,"
                f" a kernel allocates {limit} in one piece",
            )
        for entry in entries:
            self.slabs.append(kho.alloc_preserve(int(entry[1])))
            entry[0] = self.slabs[-1]
        self.slab_entries = entries
        if not kho.generation.inline and len(entries) and not self._has("flags-not-restored"):
            self.chains["slabs"] = kho.write_blocks(entries.tobytes(), abi.LUO_EXTENT_BYTES)
        listed.place_slots(entries, devices.slot_bytes, devices.slot_phys)
        devices.slotted = True

    def write_records(self, listed: DeviceList) -> None:
        """Write one FDT node a device into shards that a kernel can allocate in one piece.

        Raises:
            KhoError: E2BIG if a record is larger, or an inline tree than ``fdt_max``.
            KhoNoMemoryError: no room.
        """
        kernel = self._devices.kernel
        kho: Kho = kernel.kho
        if self._has("flags-not-restored"):
            return
        self.nr_records = count = len(listed)
        if kho.generation.inline:
            self._write_inline(listed.numbers)
            return
        if not count:
            return
        writer = self._writer(listed)
        entries = []
        for start, fitting, nbytes in self._cut_shards(writer, listed):
            shard = kho.alloc_preserve(nbytes)
            self.shards.append(shard)
            into = kernel.memory.view(shard, nbytes)
            writer.write(start, fitting, into, abi.LUO_DEVICES_COMPATIBLE)
            self.record_bytes += nbytes
            entries.append((shard, nbytes, start, fitting))
        self.chains["records"] = kho.write_blocks(
            np.array(entries, np.uint64).tobytes(), abi.LUO_EXTENT_BYTES
        )

    def _writer(self, listed: DeviceList) -> RecordWriter:
        devices = self._devices
        return RecordWriter(
            devices.tree.table,
            listed,
            (devices.driver_ids, self._names("driver")),
            (devices.bus_ids, self._names("bus")),
            devices.slot_phys,
            devices.slot_bytes,
        )

    def _cut_shards(
        self, writer: RecordWriter, listed: DeviceList
    ) -> Iterator[tuple[int, int, int]]:
        """Yield first record, count and bytes of each shard."""
        memory = self._devices.kernel.memory
        start, limit = 0, memory.page_size << memory.max_order
        while start < len(listed):
            fitting, nbytes = writer.fit(start, limit)
            if not fitting:
                path = self._devices.tree.path(int(listed.numbers[start]))
                raise from_errno(errno.E2BIG, f"PREPARE {path}: record above {limit} bytes")
            yield start, fitting, nbytes
            start += fitting

    def shard_sizes(self, listed: DeviceList) -> list[int]:
        """Return the bytes of the shards that the devices would take."""
        if self._devices.kernel.kho.generation.inline or self._has("flags-not-restored"):
            return []
        return [nbytes for _, _, nbytes in self._cut_shards(self._writer(listed), listed)]

    def _write_inline(self, order: Index) -> None:
        """Make the ``devices`` node of an inline tree."""
        devices = self._devices
        fdt_max = devices.kernel.kho.fdt_max
        self.node = KhoNode()
        self.node.properties["count"] = np.uint64(len(order)).tobytes()
        self.node.properties["slabs"] = self.slab_entries.tobytes()
        if not len(order):
            return
        names = ("device", 0, len(order))
        state = np.stack((devices.slot_phys[:, order], devices.slot_bytes[:, order]))
        properties: dict[str, Any] = {
            "path": Column(*devices.tree.table.paths(order, terminated=True)),
            "bus": self._strings("bus", order),
            "driver": self._strings("driver", order),
            "state": np.ascontiguousarray(state.transpose(2, 1, 0)).view(np.uint8).reshape(-1, 32),
            "index": order.astype(np.uint64).view(np.uint8).reshape(-1, 8),
        }
        self.record_bytes = int(FdtWriter.nodes_size(names, properties).sum())
        if self.record_bytes > fdt_max and not self._has("written-in-reboot"):
            raise from_errno(
                errno.E2BIG, f"PREPARE: records of {self.record_bytes} bytes, fdt_max is {fdt_max}"
            )
        self.node.rows.append((names, properties))

    def _strings(self, side: str, order: Index) -> Column:
        """Return the name of each device's driver or bus; none has no row."""
        ids = self._devices.ids(side)[order]
        return Column(*spread_strings(ids, self._names(side)), ids >= 0)

    def _names(self, side: str) -> list[bytes]:
        return [owner.name.encode() for owner in self._devices.parties(side)]

    # ---- KHO nodes ----

    def write_nodes(self, root: KhoNode) -> None:
        """Allocate room for the tree of KHO nodes, and write it."""
        blob = to_fdt(root, abi.LUO_NODES_COMPATIBLE)
        self.nodes = self._devices.kernel.kho.alloc_preserve(len(blob))
        self.nodes_bytes = len(blob)
        self._devices.kernel.memory.view(self.nodes, len(blob))[:] = blob

    def patch_nodes(self, root: KhoNode) -> None:
        """Write the tree again, of the same shape: nothing can be allocated any more."""
        blob = to_fdt(root, abi.LUO_NODES_COMPATIBLE)
        self._devices.kernel.memory.view(self.nodes, self.nodes_bytes)[:] = blob

    # ---- what LUO's node says ----

    def luo_properties(self) -> dict[str, int]:
        """Return the values of the ``devices`` node."""
        return {
            "count": self.nr_records,
            "records": self.chains.get("records", 0),
            "slabs": self.chains.get("slabs", 0),
            "nodes": self.nodes,
        }

    def luo_node(self) -> KhoNode:
        """Return the ``devices`` node of an inline tree: the records themselves."""
        if self.node is not None:
            return self.node
        node = KhoNode()  # PREPARE found no device
        node.properties["count"] = bytes(8)
        node.properties["slabs"] = b""
        return node

    def free(self) -> None:
        """Free everything, in the reverse order (CANCEL)."""
        kho: Kho = self._devices.kernel.kho
        if self.nodes:
            kho.unpreserve_free(self.nodes)
        for head in self.chains.values():
            if head:
                kho.free_blocks(head)
        for phys in (*reversed(self.shards), *reversed(self.slabs)):
            kho.unpreserve_free(phys)
