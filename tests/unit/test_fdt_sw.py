"""Writing flattened device trees from first byte to last: bytes, bulk calls and misuse."""

import sys

import numpy as np
import pytest

from luo.fdt import Column, Fdt, FdtError, FdtWriter

# kho-abi 5.1; test_fdt_ro.py has it word by word.
KHO_V4_ROOT = bytes.fromhex(
    "d00dfeed00000098000000400000007800000030000000110000001000000000000000200000003800000000"
    "00000000000000000000000000000000000000000000000100000000000000030000000700000015"
    "6b686f2d76340000000000030000000800000000006045230100000000000002000000097072657365727665"
    "642d6d656d6f72792d6d617000636f6d70617469626c6500"
)


def write_kho_root(writer: FdtWriter) -> memoryview:
    with writer.node("") as root:
        root.property_string("compatible", "kho-v4")
        root.property_native_u64("preserved-memory-map", 0x123456000)
    return writer.finish()


@pytest.mark.skipif(sys.byteorder == "big", reason="the vector is little-endian")
def test_finish_of_the_kho_root_gives_the_kernels_bytes():
    """The annotated vector, byte for byte, in a block of its own and in a given buffer."""
    page = bytearray(b"\xaa" * 4096)

    assert write_kho_root(FdtWriter()) == KHO_V4_ROOT
    assert write_kho_root(FdtWriter(into=page)) == KHO_V4_ROOT
    assert page == KHO_V4_ROOT + b"\xaa" * (4096 - 152)


def test_finish_into_a_buffer_returns_a_view_of_it():
    """What is patched in the result is patched in the buffer."""
    page = bytearray(4096)
    blob = write_kho_root(FdtWriter(into=memoryview(page)[8:]))
    blob[0] = 0

    assert page[8] == 0


def test_finish_result_is_writable_and_outlives_the_writer():
    """The bytes have an owner of their own."""
    blob = write_kho_root(FdtWriter())
    Fdt(blob).set_property_inplace("/", "compatible", b"kho-v9\0")

    assert Fdt(blob).root["compatible"] == b"kho-v9\0"


def test_finish_of_the_least_tree_is_80_bytes():
    """A root without anything: header, reserve map, three tokens, no strings."""
    writer = FdtWriter()
    with writer.node(""):
        pass
    blob = writer.finish()

    assert 80 == len(blob) == Fdt(blob).totalsize


def test_property_kinds_have_their_byte_orders():
    """DT numbers are big-endian, KHO's native; strings end in NUL."""
    writer = FdtWriter()
    with writer.node("") as root:
        root.property_u32("u32", 0x01020304)
        root.property_u64("u64", 0x0102030405060708)
        root.property_native_u64("native", 0x0102030405060708)
        root.property_cells("cells", [1, np.uint32(2)])
        root.property_cells("none", [])
        root.property_string("string", "é")
        root.property_strings("strings", ["a", "", b"c"])
        root.property("array", np.array([1, 2], "<u2"))
    root = Fdt(writer.finish()).root

    assert root["u32"] == b"\x01\x02\x03\x04"
    assert bytes(range(1, 9)) == root["u64"]
    assert (0x0102030405060708).to_bytes(8, sys.byteorder) == root["native"]
    assert root["cells"] == b"\0\0\0\x01\0\0\0\x02"
    assert root["none"] == b""
    assert "é\0".encode() == root["string"]
    assert root["strings"] == b"a\0\0c\0"
    assert root["array"] == b"\x01\0\x02\0"


def test_property_numbers_out_of_range_are_refused():
    """Too large is OverflowError, a float TypeError, NUL inside a string ValueError."""
    writer = FdtWriter()
    writer.begin_node("")
    for call in (
        lambda: writer.property_u32("p", 1 << 32),
        lambda: writer.property_u32("p", -1),
        lambda: writer.property_u64("p", 1 << 64),
        lambda: writer.property_cells("p", [1 << 32]),
    ):
        with pytest.raises(OverflowError):
            call()
    with pytest.raises(TypeError):
        writer.property_u32("p", 1.0)
    with pytest.raises(TypeError):
        writer.property("p", "text")
    with pytest.raises(TypeError):
        writer.property_strings("p", "text")
    with pytest.raises(TypeError):
        writer.property(1, b"")
    with pytest.raises(ValueError):
        writer.property_string("p", "a\0b")
    writer.end_node()

    assert len(writer.finish()) == 80


def test_property_of_more_names_than_are_kept_gives_each_its_own():
    """Hundreds of names, in turn and again: none is taken for another."""
    names = [f"name-{i}" for i in range(300)]
    writer = FdtWriter()
    with writer.node(""):
        for _ in range(3):
            writer.add_node("n", dict.fromkeys(names, b"v"))
    tree = Fdt(writer.finish())

    assert [names] * 3 == [list(node.properties) for node in tree.root.children]


def test_property_name_that_answers_differently_is_asked_each_time():
    """Only what cannot change is remembered: exact str objects."""

    class Name(bytes):
        answers = iter([b"one", b"two"])

        def __bytes__(self):
            return next(self.answers)

    name = Name(b"zero")
    writer = FdtWriter()
    with writer.node("") as root:
        root.property(name, b"")
        root.property(name, b"")

    assert list(Fdt(writer.finish()).root.properties) == ["one", "two"]


def test_property_name_that_finishes_the_tree_is_refused():
    """What a caller's object does in the middle of a call is seen before anything is written."""
    writer = FdtWriter()

    class Name(bytes):
        def __bytes__(self):
            writer.end_node()
            writer.finish()
            return b"name"

    writer.begin_node("")
    with pytest.raises(ValueError, match="finished"):
        writer.property(Name(b"x"), b"value")


def test_string_table_shares_tails_newest_first():
    """A name that ends a newer one is found there, an older one stays where it was."""
    writer = FdtWriter()
    with writer.node("") as root:
        root.property("bar", b"")
        root.property("foobar", b"")
        root.property("bar", b"")
        root.property("ar", b"")
    blob = bytes(writer.finish())
    offsets = [int.from_bytes(blob[at + 8 : at + 12], "big") for at in range(72, 120, 12)]

    assert blob[-11:] == b"foobar\0bar\0"
    assert offsets == [7, 0, 3, 4]


@pytest.mark.parametrize("names", [["n/a"], ["n\0a"], [""], ["ok", "n/a"], [b"/"]])
def test_node_names_outside_the_rules_are_refused(names):
    """No "/", no NUL, and only the root has no name; nothing is written."""
    writer = FdtWriter()
    writer.begin_node("")
    with pytest.raises(ValueError):
        writer.begin_node(names[-1])
    with pytest.raises(ValueError):
        writer.add_nodes(names, {})
    data = b"".join(name if isinstance(name, bytes) else name.encode() for name in names)
    offsets = np.cumsum([0] + [len(name) for name in names]).astype(np.uint64)
    with pytest.raises(ValueError):
        writer.add_nodes(Column(data, offsets), {})
    writer.end_node()

    assert len(writer.finish()) == 80


@pytest.mark.parametrize("name", ["", "n\0", "x" * 256])
def test_property_names_outside_the_rules_are_refused(name):
    """1 to 255 bytes without NUL, in single and bulk calls."""
    writer = FdtWriter()
    writer.begin_node("")
    with pytest.raises(ValueError):
        writer.property(name, b"")
    with pytest.raises(ValueError):
        writer.add_nodes(["a"], {name: b""})


def test_writer_out_of_order_calls_name_the_rule():
    """Every call at the wrong place is ValueError and leaves the tree as it was."""
    writer = FdtWriter()
    for call, rule in (
        (lambda: writer.property("p", b""), "no node is open"),
        (lambda: writer.end_node(), "no node is open"),
        (lambda: writer.finish(), "no root"),
        (lambda: writer.add_nodes(["a"], {}), "no node is open"),
        (lambda: writer.begin_node("name"), "has no name"),
    ):
        with pytest.raises(ValueError, match=rule):
            call()
    outer = writer.begin_node("")
    inner = writer.begin_node("a")
    with pytest.raises(ValueError, match="not the node that was begun last"):
        writer.end_node(outer)
    writer.end_node(inner)
    with pytest.raises(ValueError, match="before a node's children"):
        writer.property("p", b"")
    with pytest.raises(ValueError, match="1 nodes are open"):
        writer.finish()
    writer.end_node(outer)
    with pytest.raises(ValueError, match="only one"):
        writer.begin_node("")
    with pytest.raises(ValueError, match="no node is open"):
        writer.end_node()
    blob = writer.finish()
    for call in (
        writer.finish,
        writer.end_node,
        lambda: writer.begin_node("b"),
        lambda: writer.add_nodes(["b"], {}),
        lambda: writer.property("p", b""),
    ):
        with pytest.raises(ValueError, match="finished"):
            call()

    assert [node.name for node in Fdt(blob).root.children] == ["a"]


def test_node_context_left_with_an_open_child_is_a_value_error():
    """The context checks that its own node is the innermost."""
    writer = FdtWriter()
    with pytest.raises(ValueError, match="not the node that was begun last"), writer.node(""):
        writer.begin_node("a")
    writer.end_node()
    writer.end_node()
    context = FdtWriter().node("")
    with context, pytest.raises(ValueError, match="begun already"):
        context.__enter__()

    assert len(Fdt(writer.finish()).root.children) == 1


def test_node_context_lets_exceptions_pass():
    """An exception inside is not replaced by one about nesting."""
    writer = FdtWriter()
    with pytest.raises(KeyError), writer.node(""):
        {}[writer.begin_node("a")]


def test_add_node_that_fails_leaves_nothing():
    """A bad property takes the whole node back, also when it had grown the string table."""
    writer = FdtWriter()
    writer.begin_node("")
    writer.add_node("first", {"p": b"1"})
    with pytest.raises(TypeError):
        writer.add_node("second", {"qq": b"1", "rr": "text"})
    writer.add_node("third", {"p": b"3", "rr": b"3"})
    writer.end_node()
    tree = Fdt(writer.finish())

    assert [node.name for node in tree.root.children] == ["first", "third"]
    assert tree.node("/third").properties == {"p": b"3", "rr": b"3"}
    assert tree.node("/first").properties == {"p": b"1"}


def test_into_a_full_buffer_is_nospace():
    """Whatever the size: exactly what fits is written, else FDT_ERR_NOSPACE."""
    for nbytes in range(152):
        with pytest.raises(FdtError) as caught:
            write_kho_root(FdtWriter(into=bytearray(nbytes)))

        assert caught.value.code == "FDT_ERR_NOSPACE"
    assert len(write_kho_root(FdtWriter(into=bytearray(152)))) == 152


def test_into_a_full_buffer_leaves_what_was_there():
    """A property that does not fit adds not even its name."""
    writer = FdtWriter(into=bytearray(100))
    with writer.node(""):
        with pytest.raises(FdtError):
            writer.property("a-name", b"0123456789")
        with pytest.raises(FdtError):
            writer.add_nodes(("dev", 0, 10), {})
        writer.property("p", b"")

    assert len(writer.finish()) == 94


def test_tree_above_2_gib_is_nospace():
    """libfdt's offsets are int; what cannot fit is refused before any memory is taken."""
    half = memoryview(np.zeros(1 << 30, np.uint8))
    writer = FdtWriter()
    codes = []
    with writer.node(""):
        for call in (
            lambda: writer.property("p", np.zeros(1 << 31, np.uint8)),
            lambda: writer.add_nodes(("dev", 0, 2), {"p": half}),
            lambda: writer.add_nodes(("dev", 0, 10**8), {"p": b"123456789"}),
        ):
            with pytest.raises(FdtError) as caught:
                call()
            codes.append(caught.value.code)

    assert codes == ["FDT_ERR_NOSPACE"] * 3
    assert len(writer.finish()) == 80


def test_into_a_read_only_buffer_is_refused():
    """Writable buffers only."""
    with pytest.raises((BufferError, TypeError)):
        FdtWriter(into=bytes(4096))


def per_node(names, properties, start=0, stop=None) -> bytes:
    """The same as add_nodes, one call per node and property; values are lists."""
    writer = FdtWriter()
    with writer.node(""):
        for row in range(*slice(start, stop).indices(len(names))):
            with writer.node(names[row]):
                for key, values in properties.items():
                    if values[row] is not None:
                        writer.property(key, values[row])
    return bytes(writer.finish())


def bulk(names, properties, *slices, **options) -> bytes:
    writer = FdtWriter(**options)
    with writer.node(""):
        for start, stop in slices or [(0, None)]:
            writer.add_nodes(names, properties, start, stop)
    return bytes(writer.finish())


VALUES = [b"a", None, b"", b"12345678", b"x" * 17]
NAMES = ["dev8", "dev9", "dev10", "dev11", "dev12"]


def test_add_nodes_of_every_kind_of_value_equals_single_calls():
    """Bytes, arrays of one and two dimensions, lists and columns."""
    numbers = np.arange(5, dtype=np.uint64)
    table = np.arange(35, dtype=np.uint8).reshape(5, 7)
    data, offsets = b"".join(v or b"" for v in VALUES), [0, 1, 1, 1, 9, 26]
    column = Column(data, offsets, [v is not None for v in VALUES])
    given = {
        "same": b"kho\0",
        "array": numbers,
        "table": table,
        "strided": table[:, ::2],
        "list": VALUES,
        "column": column,
        "empty": np.empty((5, 0), np.uint8),
        "view": memoryview(b"abc"),
        "short": b"s" * 256,
        "long": b"l" * 257,
    }
    single = {
        "same": [b"kho\0"] * 5,
        "array": [n.tobytes() for n in numbers],
        "table": [row.tobytes() for row in table],
        "strided": [row[::2].tobytes() for row in table],
        "list": VALUES,
        "column": VALUES,
        "empty": [b""] * 5,
        "view": [b"abc"] * 5,
        "short": [b"s" * 256] * 5,
        "long": [b"l" * 257] * 5,
    }
    expected = per_node(NAMES, single)

    assert expected == bulk(NAMES, given)
    assert expected == bulk(tuple(NAMES), given)
    assert expected == bulk([name.encode() for name in NAMES], given)
    assert expected == bulk(("dev", 8, 5), given)
    assert expected == bulk(Column(b"dev8dev9dev10dev11dev12", [0, 4, 8, 13, 18, 23]), given)
    assert expected == bulk(NAMES, given, (0, 2), (2, 2), (2, 3), (3, None))
    assert expected == bulk(NAMES, given, into=bytearray(len(expected)))
    assert per_node(NAMES, single, 1, 4) == bulk(("dev", 8, 5), given, (1, 4))
    assert per_node(NAMES, single, -2) == bulk(NAMES, given, (-2, None))


def test_add_nodes_when_names_grow_late_equals_single_calls():
    """Names first needed in a later row move all offsets written before."""
    n = 300
    values = {
        f"{'x' * (i % 3)}name{i % 11}": [b"v" if row >= 20 * i else None for row in range(n)]
        for i in range(14)
    }

    assert per_node([f"n{i}" for i in range(n)], values) == bulk(("n", 0, n), values)


@pytest.mark.parametrize("first", [0, 7, 95, 999, 10**9 - 3, 10**17 - 2, 10**18 - 1])
def test_add_nodes_counts_over_powers_of_ten(first):
    """Numbered names carry over, at any length, and sizes know it."""
    names = [f"dev{first + i}" for i in range(12)]

    assert per_node(names, {}) == bulk(("dev", first, 12), {})
    assert (
        FdtWriter.nodes_size(names, {}).tolist()
        == FdtWriter.nodes_size(("dev", first, 12), {}).tolist()
    )


def test_add_nodes_of_no_rows_writes_nothing():
    """Empty input of every kind."""
    properties = {"p": b"x", "q": np.empty((0, 4)), "r": [], "s": Column(b"", [0])}
    for names in ([], (), ("dev", 3, 0), Column(b"", [0])):
        assert len(bulk(names, properties)) == 80
        assert len(FdtWriter.nodes_size(names, properties)) == 0


def test_nodes_size_is_what_add_nodes_writes():
    """The sum of sizes is the growth of the structure, row by row."""
    properties = {"list": VALUES, "same": b"123"}
    sizes = FdtWriter.nodes_size(NAMES, properties)
    grown = [
        len(bulk(NAMES, properties, (row, row + 1))) - len("list\0same\0") - 80
        + (VALUES[row] is None) * len("list\0")
        for row in range(5)
    ]  # fmt: skip

    assert grown == sizes.tolist()
    assert np.uint64 == sizes.dtype


@pytest.mark.parametrize(
    ("names", "properties", "error"),
    [
        ("abc", {}, TypeError),
        (["a", 1], {}, TypeError),
        ([1], {}, TypeError),
        (("dev", 0, -1), {}, ValueError),
        (("dev", -1, 1), {}, OverflowError),
        (("dev", 10**18 + 1, 1), {}, OverflowError),
        (("dev", 0, 1.5), {}, TypeError),
        (("d/v", 0, 1), {}, ValueError),
        (("dev", 0, 1 << 40), {}, FdtError),
        (["a"], {"p": []}, ValueError),
        (["a"], {"p": np.zeros(2)}, ValueError),
        (["a"], {"p": np.zeros(())}, ValueError),
        (["a"], {"p": np.array([None])}, TypeError),
        (["a"], {"p": Column(b"", [0])}, ValueError),
        (["a"], {"p": ["text"]}, TypeError),
        (["a"], {"p": 7}, TypeError),
        (Column(b"ab", [0, 1, 2], [True, False]), {}, ValueError),
        (Column(b"ab", [0, 2, 2]), {}, ValueError),
    ],
)
def test_add_nodes_of_bad_arguments_writes_nothing(names, properties, error):
    """The caller's mistakes are found before the first byte."""
    writer = FdtWriter()
    with writer.node(""):
        with pytest.raises(error):
            writer.add_nodes(names, properties)
        with pytest.raises(error):
            FdtWriter.nodes_size(names, properties)

    assert len(writer.finish()) == 80


def test_add_nodes_of_a_spoiled_column_is_a_value_error():
    """Offsets are checked again when they are used: arrays can change after the fact."""
    column = Column(b"abcdef", np.array([0, 2, 4, 6], np.uint64))
    writer = FdtWriter()
    with writer.node(""):
        for spoiled in ([0, 2, 1 << 60, 6], [0, 5, 4, 6], [0, 2, 4, 7]):
            column.offsets[:] = spoiled
            with pytest.raises(ValueError):
                writer.add_nodes(["a", "b", "c"], {"p": column})

    assert len(writer.finish()) == 80


def test_add_nodes_that_fails_half_way_takes_its_rows_back():
    """When the string table meets the end of the buffer, no row of the call stays."""
    writer = FdtWriter(into=bytearray(115))
    with writer.node(""):
        with pytest.raises(FdtError) as caught:
            writer.add_nodes(["a", "b"], {"a-long-name": [None, b""]})
        writer.add_nodes(["c", "d"], {})
    blob = writer.finish()

    assert caught.value.code == "FDT_ERR_NOSPACE"
    assert [node.name for node in Fdt(blob).root.children] == ["c", "d"]


def test_add_nodes_ends_the_properties_of_the_open_node():
    """Bulk children are children: no property may follow."""
    writer = FdtWriter()
    writer.begin_node("")
    writer.add_nodes(["a"], {})
    with pytest.raises(ValueError):
        writer.property("p", b"")


def test_read_nodes_columns_write_back_equal():
    """What read_nodes gives, add_nodes takes: the tree comes out the same."""
    blob = per_node(NAMES, {"p": VALUES, "q": [b"1"] * 5})
    columns = Fdt(blob).read_nodes("/")
    names = columns.pop("name")

    assert blob == bulk(names, columns)


def test_size_hint_may_be_anything():
    """The hint changes nothing but the number of reallocations."""
    for hint in (0, 1, 1 << 20):
        assert write_kho_root(FdtWriter(hint)) == KHO_V4_ROOT
    with pytest.raises(OverflowError):
        FdtWriter(-1)
    with pytest.raises(TypeError):
        FdtWriter("64KiB")


def test_reserve_map_is_what_libfdt_writes():
    """Entries in order, ended by zeros, the structure right behind."""
    libfdt = pytest.importorskip("libfdt")
    entries = [(0x1000, 0x2000), (1 << 63, (1 << 64) - 1)]
    theirs = libfdt.FdtSw()
    for address, nbytes in entries:
        theirs.add_reservemap_entry(address, nbytes)
    theirs.finish_reservemap()
    with theirs.add_node(""):
        theirs.property("p", b"value")
    writer = FdtWriter(reserve_map=entries)
    with writer.node(""):
        writer.property("p", b"value")
    blob = bytes(writer.finish())

    assert bytes(theirs.as_fdt().as_bytearray()[: len(blob)]) == blob
    assert Fdt(blob).reserve_map == entries


@pytest.mark.parametrize("entry", [(0, 0), (0x1000, 0)])
def test_reserve_map_entry_of_no_bytes_is_value_error(entry):
    """It would end the map."""
    with pytest.raises(ValueError):
        FdtWriter(reserve_map=[entry])


def test_reserve_map_into_a_small_buffer_is_nospace():
    """Header and map must fit before anything is written."""
    room = bytearray(48 + 16 + 15)
    with pytest.raises(FdtError) as caught:
        FdtWriter(into=room, reserve_map=[(0, 1)])

    assert caught.value.code == "FDT_ERR_NOSPACE"
    assert not any(room)
