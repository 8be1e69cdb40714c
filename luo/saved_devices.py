"""What PREPARE saves of the devices, for the next kernel: slots, records and KHO nodes.

The format is in :mod:`luo.abi`; :mod:`luo.device_records` reads it. Slots lie in slabs, records in
shards of at most what a kernel allocates in one piece, both listed in chains of blocks; in
kho-v5-series the records are nodes of the inline tree. Everything that can fail for memory is here.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luo import abi
from luo._kho import pack_slots, spread_strings
from luo.device import Devices
from luo.device_records import SIDES, Address, Index
from luo.errors import from_errno
from luo.fdt import Column, FdtWriter
from luo.kho_tree import KhoNode, to_fdt

if TYPE_CHECKING:
    from luo.kho import Kho

__all__ = ["SavedDevices", "aligned"]


def aligned(nbytes: Address) -> Address:
    """Return the room that slots of *nbytes* take."""
    return (nbytes + np.uint64(7)) & ~np.uint64(7)


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

    def allocate_slots(self, order: Index, nbytes: dict[str, Address]) -> dict[str, Address]:
        """Lay the slots of the devices in *order* out in slabs; returns their addresses, by side.

        Raises:
            KhoError: E2BIG if a device asks for more than a kernel allocates in one piece.
            KhoNoMemoryError: no room.
        """
        kho: Kho = self._devices.kernel.kho
        limit = self._devices.kernel.memory.page_size << self._devices.kernel.memory.max_order
        # Capped before they are added: a callback may say anything.
        capped = {side: np.minimum(nbytes[side], np.uint64(limit + 1)) for side in SIDES}
        sizes = aligned(capped["driver"]) + aligned(capped["bus"])
        too_large = np.flatnonzero(sizes > limit)
        if too_large.size:
            place = int(too_large[0])
            asked = " and ".join(str(int(nbytes[side][place])) for side in SIDES)
            raise from_errno(
                errno.E2BIG,
                f"PREPARE {self._devices.tree.path(int(order[place]))}: slots of {asked} bytes,"
                f" a kernel allocates {limit} in one piece",
            )
        slab, offset, used = pack_slots(sizes, limit)
        entries = np.zeros((len(used), 4), np.uint64)
        for number, nbytes_used in enumerate(used.tolist()):
            self.slabs.append(kho.alloc_preserve(nbytes_used))
            entries[number, 1] = nbytes_used
        entries[:, 0] = np.array(self.slabs, np.uint64)
        entries[:, 2] = np.searchsorted(slab, np.arange(len(used)))
        entries[:, 3] = np.bincount(slab[slab < len(used)], minlength=len(used))[: len(used)]
        self.slab_entries = entries
        if not kho.generation.inline and len(used) and not self._has("flags-not-restored"):
            self.chains["slabs"] = kho.write_blocks(entries.tobytes(), abi.LUO_EXTENT_BYTES)
        # A slot of no bytes after the last full slab has no slab; its address is never used.
        start = np.array([*self.slabs, 0], np.uint64)[np.minimum(slab, len(used))] + offset
        return {
            "driver": np.where(nbytes["driver"] > 0, start, np.uint64(0)),
            "bus": np.where(nbytes["bus"] > 0, start + aligned(nbytes["driver"]), np.uint64(0)),
        }

    def write_records(
        self, order: Index, phys: dict[str, Address], nbytes: dict[str, Address]
    ) -> None:
        """Write one FDT node a device into shards that a kernel can allocate in one piece.

        Raises:
            KhoError: E2BIG if a record is larger, or an inline tree than ``fdt_max``.
            KhoNoMemoryError: no room.
        """
        kernel, tree = self._devices.kernel, self._devices.tree
        kho: Kho = kernel.kho
        if self._has("flags-not-restored"):
            return
        self.nr_records = len(order)
        if kho.generation.inline:
            self.node = KhoNode()
            self.node.properties["count"] = np.uint64(len(order)).tobytes()
            self.node.properties["slabs"] = self.slab_entries.tobytes()
        if not len(order):
            return
        if self.node is not None:
            names, properties = self._columns(order, phys, nbytes, 0, len(order))
            self.record_bytes = int(FdtWriter.nodes_size(names, properties).sum())
            if self.record_bytes > kho.fdt_max and not self._has("written-in-reboot"):
                raise from_errno(
                    errno.E2BIG,
                    f"PREPARE: records of {self.record_bytes} bytes, fdt_max is {kho.fdt_max}",
                )
            self.node.rows.append((names, properties))
            return
        room = (kernel.memory.page_size << kernel.memory.max_order) - abi.LUO_SHARD_OVERHEAD
        entries = []
        start, guess = 0, room // abi.LUO_RECORD_BYTES
        while start < len(order):
            # A shard at a time: what is made for one is warm, and used again for the next.
            stop = min(start + guess, len(order))
            names, properties = self._columns(order, phys, nbytes, start, stop)
            ends = np.cumsum(FdtWriter.nodes_size(names, properties))
            count = int(np.searchsorted(ends, room, side="right"))
            if start + count == stop < len(order):
                guess *= 2  # there is room for more
                continue
            if not count:
                raise from_errno(
                    errno.E2BIG,
                    f"PREPARE {tree.path(int(order[start]))}: record above {room} bytes",
                )
            guess = count + count // 16 + 16
            size = int(ends[count - 1]) + abi.LUO_SHARD_OVERHEAD
            shard = kho.alloc_preserve(size)
            self.shards.append(shard)
            writer = FdtWriter(into=kernel.memory.view(shard, size))
            with writer.node(""):
                writer.property_string("compatible", abi.LUO_DEVICES_COMPATIBLE)
                writer.add_nodes(names, properties, stop=count)
            written = len(writer.finish())
            self.record_bytes += written
            entries.append((shard, written, start, count))
            start += count
        self.chains["records"] = kho.write_blocks(
            np.array(entries, np.uint64).tobytes(), abi.LUO_EXTENT_BYTES
        )

    def _columns(
        self,
        order: Index,
        phys: dict[str, Address],
        nbytes: dict[str, Address],
        start: int,
        stop: int,
    ) -> tuple[tuple[str, int, int], dict[str, Any]]:
        """Return names and columns of the records *start* to *stop*, for ``add_nodes()``."""
        here = slice(start, stop)
        devices = order[here]
        state = np.empty((len(devices), 4), np.uint64)
        for place, column in enumerate(
            (phys["driver"], nbytes["driver"], phys["bus"], nbytes["bus"])
        ):
            state[:, place] = column[here]
        return ("device", start, len(devices)), {
            "path": Column(*self._devices.tree.table.paths(devices, terminated=True)),
            "bus": self._names("bus", devices),
            "driver": self._names("driver", devices),
            "state": state.view(np.uint8),
            "index": devices.astype(np.uint64).view(np.uint8).reshape(len(devices), 8),
        }

    def _names(self, side: str, devices: Index) -> Column:
        """Return the bus or driver name of each device as a string column; none has no row."""
        ids = self._devices.ids(side)[devices]
        names = [owner.name.encode() for owner in self._devices.parties(side)]
        return Column(*spread_strings(ids, names), ids >= 0)

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
