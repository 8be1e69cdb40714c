"""Root trees made by libfdt itself, through pylibfdt; import it with ``pytest.importorskip``."""

import struct
from typing import Any

import libfdt

PAGE = 4096


def write(root: dict[str, bytes], children: dict[str, dict[str, bytes]]) -> Any:
    """A tree of one level from libfdt's sequential writer."""
    writer = libfdt.FdtSw()
    writer.finish_reservemap()
    with writer.add_node(""):
        for name, value in root.items():
            writer.property(name, value)
        for name, properties in children.items():
            with writer.add_node(name):
                for key, value in properties.items():
                    writer.property(key, value)
    return writer.as_fdt()


def add(tree: Any, name: str, properties: dict[str, bytes]) -> None:
    """Add a child as the kernel adds a subtree: open in a page, edit, pack (§5.1)."""
    tree.resize(PAGE)
    node = tree.add_subnode(0, name)
    for key, value in properties.items():
        tree.setprop(node, key, value)
    tree.pack()


def remove(tree: Any, name: str) -> None:
    """Remove a child as the kernel removes a subtree."""
    tree.resize(PAGE)
    tree.del_node(tree.subnode_offset(0, name))
    tree.pack()


def add_subtree(tree: Any, name: str, phys: int, nbytes: int) -> None:
    """Add a kho-v4 subtree."""
    values = {"preserved-data": struct.pack("<Q", phys), "blob-size": struct.pack("<Q", nbytes)}
    add(tree, name, values)


def to_bytes(tree: Any) -> bytes:
    """The blob, as long as its header says."""
    return bytes(tree.as_bytearray()[: tree.totalsize()])
