"""Device trees of real boards: read as libfdt reads them, and the same after being written again.

``make boards`` fetches what Debian ships with its arm64 kernel, some 570 trees, into build/boards;
LUO_DTB_DIR names another directory of .dtb files.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from luo.fdt import Fdt, FdtEditor, FdtWriter

HERE = Path(os.environ.get("LUO_DTB_DIR") or Path(__file__).parents[2] / "build" / "boards")
BOARDS = sorted(HERE.rglob("*.dtb"))
MISSING = pytest.mark.skip(reason=f"no .dtb files in {HERE}: make boards, or set LUO_DTB_DIR")


def boards(step=1):
    """Run the test for every step-th board."""
    paths = BOARDS[::step] or [pytest.param(None, marks=MISSING)]
    return pytest.mark.parametrize("board", paths, ids=lambda path: path and path.stem)


#: (depth, name, [(property, value), …]) of every node, in file order.
Nodes = list[tuple[int, str, list[tuple[str, bytes]]]]


def theirs(blob: bytes) -> tuple[Nodes, list[tuple[int, int]]]:
    """What libfdt reads."""
    libfdt = pytest.importorskip("libfdt")
    tree = libfdt.FdtRo(blob)
    nodes: Nodes = []
    offset = depth = 0
    while offset >= 0 and depth >= 0:
        values = []
        at = tree.first_property_offset(offset, [libfdt.NOTFOUND])
        while at >= 0:
            found = tree.get_property_by_offset(at)
            values.append((found.name, bytes(found)))
            at = tree.next_property_offset(at, [libfdt.NOTFOUND])
        nodes.append((depth, tree.get_name(offset), values))
        offset, depth = tree.next_node(offset, depth, [libfdt.NOTFOUND])
    return nodes, [tuple(tree.get_mem_rsv(i)) for i in range(tree.num_mem_rsv())]


def ours(blob: Any) -> tuple[Nodes, list[tuple[int, int]]]:
    """What we read."""
    tree = Fdt(blob)
    nodes = [
        (depth, node.name, [(name, bytes(value)) for name, value in node.properties.items()])
        for depth, node in tree.walk()
    ]
    return nodes, tree.reserve_map


def written(nodes: Nodes, reserve_map: list[tuple[int, int]]) -> bytes:
    """The same tree from our writer."""
    writer = FdtWriter(reserve_map=reserve_map)
    open_nodes = 0
    for depth, name, values in nodes:
        while open_nodes > depth:
            writer.end_node()
            open_nodes -= 1
        writer.begin_node(name)
        open_nodes += 1
        for key, value in values:
            writer.property(key, value)
    for _ in range(open_nodes):
        writer.end_node()
    return bytes(writer.finish())


@boards()
def test_tree_of_a_board_is_what_libfdt_reads_and_survives_writing(board):
    """All nodes, names, properties, their order, and the reserve map; also after an edit in it."""
    blob = board.read_bytes()
    expected = theirs(blob)

    assert expected == ours(blob)

    again = written(*expected)

    assert expected == ours(again)
    assert expected == theirs(again)

    room = bytearray(blob.ljust(len(blob) + 4096, b"\0"))
    editor = FdtEditor(room)
    editor.add_node("/", "luo")
    editor.set_property("/luo", "compatible", b"x\0")
    editor.del_node("/luo")
    editor.pack()

    assert expected == ours(room)


@boards(step=20)
def test_bulk_reading_of_a_board_is_reading_node_by_node(board):
    """Columns, paths and source text hold what the nodes hold."""
    tree = Fdt(board.read_bytes())
    nodes = [node for _, node in tree.walk()]

    assert len(nodes) == tree.to_dts().count("{\n")
    for node in nodes:
        assert node == tree.node(node.path)
        columns = tree.read_nodes(node.path)
        children = node.children
        assert [child.name for child in children] == columns.pop("name").strings()
        for name, column in columns.items():
            values = [child.get(name) for child in children]
            rows = [
                bytes(column.data[column.offsets[i] : column.offsets[i + 1]])
                if column.present[i]
                else None
                for i in range(len(column))
            ]
            assert [None if value is None else bytes(value) for value in values] == rows
