"""Editing flattened device trees in place."""

import struct

import pytest

from luo.fdt import Fdt, FdtEditor, FdtError, FdtWriter

BEGIN, END, PROP, FINISH = 1, 2, 3, 9


def page(nbytes: int = 4096) -> bytearray:
    buffer = bytearray(nbytes)
    writer = FdtWriter(into=buffer)
    with writer.node(""):
        pass
    writer.finish()
    return buffer


def code(call) -> str:
    with pytest.raises(FdtError) as caught:
        call()
    return caught.value.code


def test_editor_puts_the_newest_first():
    """New children and new properties stand before the older ones."""
    buffer = page()
    editor = FdtEditor(buffer)
    for name in ("a", "b"):
        editor.add_node("/", name)
        editor.set_property(f"/{name}", "p", b"1")
        editor.set_property(f"/{name}", "q", b"2")
    root = Fdt(buffer).root

    assert [node.name for node in root.children] == ["b", "a"]
    assert list(root.children[0].properties) == ["q", "p"]


def test_editor_changes_a_value_where_it_stands():
    """A property keeps its place when its value grows or shrinks."""
    buffer = page()
    editor = FdtEditor(buffer)
    for name, value in (("p", b"1"), ("q", b"2"), ("p", b"123456789"), ("q", b""), ("p", b"xyz")):
        editor.set_property("/", name, value)

    assert list(Fdt(buffer).root.properties.items()) == [("q", b""), ("p", b"xyz")]


def test_editor_pack_moves_the_blocks_together():
    """Reserve map at 40, structure at 56, totalsize not rounded; later edits open it again."""
    buffer = page()
    editor = FdtEditor(buffer)

    assert (editor.capacity, editor.totalsize, editor.data_size) == (4096, 4096, 80)
    editor.add_node("/", "LUO")
    editor.set_property("/LUO", "blob-size", bytes(8))
    assert 114 == editor.pack() == editor.totalsize == editor.data_size
    assert struct.unpack(">8xI4xI", buffer[:20]) == (56, 40)
    editor.set_property("/", "p", b"")
    assert 4096 == editor.totalsize == Fdt(buffer).totalsize
    assert editor.pack() == 114 + 12 + 2


def test_editor_holds_as_many_children_as_the_kernels_page():
    """A page takes 70 subtrees with names of 7 letters (kho-abi 5.1), then FDT_ERR_NOSPACE."""
    for length, expected in ((1, 75), (7, 70), (13, 61), (31, 49)):
        buffer = bytearray(4096)
        writer = FdtWriter(into=buffer)
        with writer.node("") as root:
            root.property_string("compatible", "kho-v4")
            root.property_native_u64("preserved-memory-map", 1)
        writer.finish()
        editor = FdtEditor(buffer)
        for count in range(expected + 1):
            name = f"{chr(48 + count):x<{length}}"
            try:
                editor.add_node("/", name)
                editor.set_property(f"/{name}", "preserved-data", bytes(8))
                editor.set_property(f"/{name}", "blob-size", bytes(8))
                editor.pack()
            except FdtError as error:
                failure = count, error.code

        assert failure == (expected, "FDT_ERR_NOSPACE")


def test_editor_deletes_nodes_and_properties():
    """All below a deleted node goes too; names stay in the string table."""
    buffer = page()
    editor = FdtEditor(buffer)
    editor.add_node("/", "a")
    editor.add_node("/a", "b")
    editor.set_property("/a/b", "p", b"1")
    editor.set_property("/", "q", b"2")
    editor.del_node("/a")
    editor.del_property("/", "q")

    assert (len(Fdt(buffer).root.children), Fdt(buffer).root.properties) == (0, {})
    assert 80 + len("p\0q\0") - 8 == editor.pack()


def test_editor_refuses_with_libfdts_codes_and_changes_nothing():
    """Not found, exists (also by the unit-address shortcut), bad path."""
    buffer = page()
    editor = FdtEditor(buffer)
    editor.add_node("/", "cpu@1")
    before = bytes(buffer)

    assert code(lambda: editor.add_node("/", "cpu@1")) == "FDT_ERR_EXISTS"
    assert code(lambda: editor.add_node("/", "cpu")) == "FDT_ERR_EXISTS"
    assert code(lambda: editor.add_node("/x", "y")) == "FDT_ERR_NOTFOUND"
    assert code(lambda: editor.set_property("/x", "y", b"")) == "FDT_ERR_NOTFOUND"
    assert code(lambda: editor.del_node("/x")) == "FDT_ERR_NOTFOUND"
    assert code(lambda: editor.del_property("/", "y")) == "FDT_ERR_NOTFOUND"
    assert code(lambda: editor.del_node("x")) == "FDT_ERR_BADPATH"
    for call in (
        lambda: editor.del_node("/"),
        lambda: editor.add_node("/", ""),
        lambda: editor.add_node("/", "a/b"),
        lambda: editor.add_node("/", "a\0b"),
        lambda: editor.set_property("/", "", b""),
        lambda: editor.set_property("/", "x" * 256, b""),
    ):
        with pytest.raises(ValueError):
            call()
    assert before == buffer


def test_editor_without_room_changes_nothing():
    """An edit that does not fit leaves the tree, its string table included."""
    buffer = page(101)
    editor = FdtEditor(buffer)
    assert code(lambda: editor.add_node("/", "a-very-long-name")) == "FDT_ERR_NOSPACE"
    assert code(lambda: editor.set_property("/", "name", b"12345")) == "FDT_ERR_NOSPACE"
    assert code(lambda: editor.set_property("/", "name", bytes(1000))) == "FDT_ERR_NOSPACE"
    editor.set_property("/", "name", b"1234")

    assert Fdt(buffer).root["name"] == b"1234"
    assert code(lambda: editor.set_property("/", "name", b"12345")) == "FDT_ERR_NOSPACE"


def test_editor_sorts_blocks_that_are_out_of_order():
    """Strings before the structure are legal to read; to edit, blocks are put in order."""
    structure = struct.pack(">7I", BEGIN, 0, PROP, 4, 0, 7, END) + struct.pack(">I", FINISH)
    header = struct.pack(">10I", 0xD00DFEED, 92, 60, 56, 40, 17, 17, 3, 2, 32)
    buffer = bytearray(header + bytes(16) + b"p\0\0\0" + structure + bytes(164))
    FdtEditor(buffer).set_property("/", "q", b"1")
    tree = Fdt(buffer)

    assert tree.root.properties == {"q": b"1", "p": b"\0\0\0\x07"}
    assert struct.unpack(">8xI4x4I", buffer[:32]) == (56, 40, 17, 16, 3)


def test_editor_without_room_to_sort_is_nospace():
    """Blocks may overlap, so apart they may need more than the buffer has."""
    structure = struct.pack(">4I", BEGIN, 0, END, FINISH)
    header = struct.pack(">10I", 0xD00DFEED, 72, 56, 40, 40, 17, 16, 0, 32, 16)

    assert code(lambda: FdtEditor(bytearray(header + bytes(16) + structure))) == "FDT_ERR_NOSPACE"


def test_editor_brings_version_16_up_to_date():
    """A tree of version 16 is one of version 17 after opening."""
    structure = struct.pack(">8I", BEGIN, 0, PROP, 4, 0, 7, END, FINISH)
    header = struct.pack(">10I", 0xD00DFEED, 90, 56, 88, 40, 16, 16, 0, 2, 0)
    buffer = bytearray(header + bytes(16) + structure + b"p\0" + bytes(100))
    editor = FdtEditor(buffer)
    editor.add_node("/", "a")

    assert Fdt(buffer).version == 17
    assert "/a" in Fdt(buffer)


def test_editor_refuses_bad_trees_and_read_only_buffers():
    """The whole tree is checked once, when it is opened."""
    unbalanced = page()
    unbalanced[72:76] = struct.pack(">I", FINISH)
    assert code(lambda: FdtEditor(unbalanced)) == "FDT_ERR_BADSTRUCTURE"
    assert code(lambda: FdtEditor(bytearray(4096))) == "FDT_ERR_BADMAGIC"
    with pytest.raises((BufferError, TypeError)):
        FdtEditor(bytes(page()))


def test_editor_of_bytes_that_turn_bad_is_an_error():
    """Memory that somebody spoils under the editor gives FdtError, not worse."""
    buffer = page()
    editor = FdtEditor(buffer)
    editor.add_node("/", "a")
    buffer[0] ^= 1
    assert code(lambda: editor.add_node("/", "b")) == "FDT_ERR_BADMAGIC"
    buffer[0] ^= 1
    buffer[20:24] = bytes([0, 0, 0, 16])
    assert code(lambda: editor.add_node("/", "b")) == "FDT_ERR_BADVERSION"
    buffer[20:24] = bytes([0, 0, 0, 17])
    buffer[8:12] = b"\0\0\x0f\0"

    assert "FDT_ERR_" in code(lambda: editor.add_node("/", "b"))


def test_editor_value_from_its_own_buffer_is_taken_before_the_move():
    """Copying one property to another works though everything moves."""
    buffer = page()
    editor = FdtEditor(buffer)
    editor.set_property("/", "p", b"12345678")
    editor.set_property("/", "q", Fdt(buffer).root["p"])

    assert Fdt(buffer).root.properties == {"q": b"12345678", "p": b"12345678"}
