"""``liveupdate_orchestrator`` from its two shapes into each other.

In kho-v5-series the device records stand in the root tree itself; in the other generations in
shards, which chains of blocks list (see :data:`luo.abi.LUO_NODE`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luo import abi as _abi
from luo import kho_tree
from luo.fdt import Fdt, FdtWriter, Node
from luo.image.formats import DEVICE_COLUMNS
from luo.image.store import Image
from luo.image.survey import Subtree
from luo.kho import Kho
from luo.kho_tree import KhoNode

__all__ = ["made_places", "to_blob", "to_node"]


def _rows(devices: dict[str, Any]) -> Iterator[tuple[int, int, int, int]]:
    slabs = devices["slot_slabs"]
    for slab in slabs["extents"] if isinstance(slabs, dict) else slabs:
        yield slab["phys"], slab["nbytes"], slab["first"], slab["count"]


def to_node(image: Image, subtree: Subtree, node: KhoNode) -> None:
    """Put the records of a blob into *node*, which has what else the blob has."""
    found = (subtree.decoded or {}).get("devices")
    if found is None:
        return
    devices = node.children["devices"]
    devices.properties = {
        "count": np.uint64(found["count"]).tobytes(),
        "slabs": np.array(list(_rows(found)), np.uint64).tobytes(),
    }
    for shard in found["record_shards"]["extents"]:
        tree = Fdt(image.read(shard["phys"], shard["nbytes"]))
        columns = tree.read_nodes("/", list(DEVICE_COLUMNS))
        names = ("device", shard["first"], shard["count"])
        devices.rows.append((names, {name: columns[name] for name in DEVICE_COLUMNS}))
    nodes = (subtree.decoded or {}).get("nodes")
    if nodes is not None:
        root = kho_tree.to_node(Fdt(image.read(nodes["phys"], nodes["nbytes"])).root)
        root.properties.clear()  # what says which blob it is
        node.children["nodes"] = root


def to_blob(kho: Kho, image: Image, subtree: Subtree) -> None:
    """Write blob, shards and chains for an inline node, and name the blob in the root tree."""
    found = subtree.decoded or {}
    tree = image.survey.fdt
    assert tree is not None
    numbers = dict.fromkeys(_abi.LUO_DEVICES_PROPERTIES, 0)
    devices = found.get("devices")
    if devices is not None:
        numbers["count"] = devices["count"]
        numbers["slabs"] = _chain(kho, np.array(list(_rows(devices)), np.uint64))
        if devices["count"]:
            numbers["records"] = _chain(kho, _write_shards(kho, tree))
    for node in subtree.rows[0][1].children:
        if node.name == "nodes":
            blob = kho_tree.to_fdt(kho_tree.to_node(node), _abi.LUO_NODES_COMPATIBLE)
            numbers["nodes"] = phys = kho.alloc_preserve(len(blob))
            kho.memory.view(phys, len(blob))[:] = blob
    writer = FdtWriter()
    with writer.node(""):
        for name, value in subtree.rows[0][1].properties.items():
            writer.property(name, value)
        for node in subtree.rows[0][1].children:
            if node.name == "nodes":
                continue
            with writer.node(node.name):
                if node.name == "devices":
                    for name in _abi.LUO_DEVICES_PROPERTIES:
                        writer.property_native_u64(name, numbers[name])
                else:
                    _copy(writer, node)
    kho.save_subtree(subtree.name, writer.finish())


def _copy(writer: FdtWriter, node: Node) -> None:
    for name, value in node.properties.items():
        writer.property(name, value)
    for child in node.children:  # two levels, no more: /subsystems/<name>
        writer.add_node(child.name, dict(child.properties.items()))


def _chain(kho: Kho, entries: NDArray[np.uint64]) -> int:
    return kho.write_blocks(entries.tobytes(), _abi.LUO_EXTENT_BYTES) if entries.size else 0


def _write_shards(kho: Kho, tree: Fdt) -> NDArray[np.uint64]:
    columns = tree.read_nodes(f"/{_abi.LUO_NODE}/devices", list(DEVICE_COLUMNS))
    properties = {name: columns[name] for name in DEVICE_COLUMNS}
    count = len(columns["path"])
    names = ("device", 0, count)
    limit = (kho.memory.page_size << kho.memory.max_order) - _abi.LUO_SHARD_OVERHEAD
    ends = np.cumsum(FdtWriter.nodes_size(names, properties))
    entries: list[tuple[int, int, int, int]] = []
    start = 0
    while start < count:
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, np.uint64(before + limit), "right")))
        room = int(ends[stop - 1]) - before + _abi.LUO_SHARD_OVERHEAD
        phys = kho.alloc_preserve(room)
        writer = FdtWriter(into=kho.memory.view(phys, room))
        with writer.node(""):
            writer.property_string("compatible", _abi.LUO_DEVICES_COMPATIBLE)
            writer.add_nodes(names, properties, start=start, stop=stop)
        entries.append((phys, len(writer.finish()), start, stop - start))
        start = stop
    return np.array(entries, np.uint64)


def made_places(subtree: Subtree) -> Iterator[int]:
    """Yield the addresses of shards, blocks and nodes that :func:`to_blob` has made."""
    nodes = (subtree.decoded or {}).get("nodes")
    if nodes is not None:
        yield nodes["phys"]
    devices = (subtree.decoded or {}).get("devices")
    if devices is None:
        return
    for shard in devices["record_shards"]["extents"]:
        yield shard["phys"]
    for name in ("record_shards", "slot_slabs"):
        for block in devices[name]["blocks"]:
            yield block["phys"]
