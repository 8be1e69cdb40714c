"""The state tree of kho-v5-series: nodes by reference until they are flattened into one tree.

Mirrors ``struct kho_node`` of the KHO v5 patch series (kho-abi 2): values are not copied when they
are added but when KHO finalizes, and stand in the handed-over tree themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from luo.fdt import FdtWriter, Node

__all__ = ["KhoInNode", "KhoNode", "flatten", "shape_of", "to_fdt", "to_node"]


_DEPTH_MAX = 32  # of nodes below a node that somebody fills


class KhoNode:
    """A node that may hang in the state tree; :meth:`luo.kho.Kho.add_node` hangs it there.

    Attributes:
        properties: name to value, any buffer; read when KHO finalizes.
        children: name to node.
    """

    __slots__ = ("attached", "children", "properties", "rows")

    def __init__(self) -> None:
        self.properties: dict[str, Any] = {}
        self.children: dict[str, KhoNode] = {}
        self.rows: list[tuple[Any, dict[str, Any]]] = []  # many children at once, as of add_nodes()
        self.attached = False

    def walk(self) -> Iterator[KhoNode]:
        """Yield this node and all below it."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()


@dataclass(frozen=True, slots=True)
class KhoInNode:
    """A node of the tree that the previous kernel left.

    Attributes:
        path: its full path; ``"/"`` is the root.
    """

    path: str


def same_value(one: Any, other: Any) -> bool:
    """Whether two values are the same bytes in memory, not only equal ones."""
    if one is other:
        return True
    a, b = (np.frombuffer(value, np.uint8) for value in (one, other))
    return bool(a.ctypes.data == b.ctypes.data and a.size == b.size)


def flatten(root: KhoNode, compatible: str, map_node: str, map_property: str, phys: int) -> bytes:
    """Return the whole tree as one FDT.

    Args:
        root: the users' nodes hang below it.
        compatible: of the root.
        map_node: name of the node that gets the address of the map.
        map_property: name of its property.
        phys: that address.
    """
    writer = FdtWriter()
    with writer.node(""):
        writer.property_string("compatible", compatible)
        _properties(writer, root)
        with writer.node(map_node):
            writer.property_native_u64(map_property, phys)
        _children(writer, root)
    return bytes(writer.finish())


def to_fdt(root: KhoNode, compatible: str) -> bytes:
    """Return *root* and all below it as one FDT of its own."""
    writer = FdtWriter()
    with writer.node(""):
        writer.property_string("compatible", compatible)
        _properties(writer, root)
        _children(writer, root)
    return bytes(writer.finish())


def to_node(found: Node) -> KhoNode:
    """Return a copy of *found* and all below it; values are bytes."""
    root = KhoNode()
    waiting = [(found, root)]
    while waiting:
        source, node = waiting.pop()
        node.properties = {name: bytes(value) for name, value in source.properties.items()}
        for child in source.children:
            below = node.children[child.name] = KhoNode()
            waiting.append((child, below))
    return root


def shape_of(root: KhoNode) -> list[tuple[str, str, int]]:
    """Return (path, property, bytes) of everything in *root*, checked to be a tree.

    Raises:
        ValueError: a name is none, a value has no bytes, a node stands twice or too deep; the
            message says where.
    """
    shape: list[tuple[str, str, int]] = []
    seen: set[int] = set()
    waiting = [("", root)]
    while waiting:
        path, node = waiting.pop()
        if not isinstance(node, KhoNode):
            raise ValueError(f"{path or '/'}: {node!r} is no KhoNode")
        if id(node) in seen or path.count("/") > _DEPTH_MAX:
            raise ValueError(f"{path[:80]}: stands in the tree already, or too deep")
        seen.add(id(node))
        shape.append((path, "", 0))
        for name, value in node.properties.items():
            _check_name(path, name)
            try:
                shape.append((path, name, memoryview(value).nbytes))
            except TypeError:
                raise ValueError(f"{path or '/'}: {name} is {value!r}, not bytes") from None
        for name, child in node.children.items():
            _check_name(path, name)
            waiting.append((f"{path}/{name}", child))
    return shape


def _check_name(path: str, name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name.encode()) < 256 or set(name) & {"\0", "/"}:
        raise ValueError(
            f"{path or '/'}: {name!r} is no name of 1 to 255 bytes without '/' and NUL"
        )


def _properties(writer: FdtWriter, node: KhoNode) -> None:
    for name, value in node.properties.items():
        writer.property(name, value)
    for names, properties in node.rows:
        writer.add_nodes(names, properties)


def _children(writer: FdtWriter, root: KhoNode) -> None:
    # A stack of iterators: users may nest as deep as they like.
    stack = [iter(root.children.items())]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            if stack:
                writer.end_node()
            continue
        name, node = entry
        writer.begin_node(name)
        _properties(writer, node)
        stack.append(iter(node.children.items()))
