"""Reading flattened device trees: what is there, and what is refused."""

import gc
import struct

import numpy as np
import pytest

from luo.fdt import Column, Fdt, FdtEditor, FdtError, FdtWriter, Node

# Root tree of kho-v4 as the kernel writes it first (kho-abi 5.1); all words big-endian but the map.
KHO_V4_ROOT = bytes.fromhex(
    "d00dfeed"  # 00 magic
    "00000098"  # 04 totalsize 152
    "00000040"  # 08 off_dt_struct
    "00000078"  # 0c off_dt_strings
    "00000030"  # 10 off_mem_rsvmap
    "00000011"  # 14 version 17
    "00000010"  # 18 last_comp_version 16
    "00000000"  # 1c boot_cpuid_phys
    "00000020"  # 20 size_dt_strings
    "00000038"  # 24 size_dt_struct
    "0000000000000000"  # 28 gap
    "00000000000000000000000000000000"  # 30 the empty reserve map
    "00000001" "00000000"  # 40 FDT_BEGIN_NODE, no name
    "00000003" "00000007" "00000015"  # 48 FDT_PROP, 7 bytes, name at 0x15
    "6b686f2d76340000"  # 54 "kho-v4", NUL, padding
    "00000003" "00000008" "00000000"  # 5c FDT_PROP, 8 bytes, name at 0
    "0060452301000000"  # 68 0x123456000, native
    "00000002"  # 70 FDT_END_NODE
    "00000009"  # 74 FDT_END
    "7072657365727665642d6d656d6f72792d6d617000"  # 78 preserved-memory-map
    "636f6d70617469626c6500"  # 8d compatible
)  # fmt: skip

BEGIN, END, PROP, NOP, FINISH = 1, 2, 3, 4, 9


def blob(*words: int | bytes, strings: bytes = b"p\0", version: int = 17, **header: int) -> bytes:
    """A tree of these tokens; *header* overrides fields by name."""
    structure = b"".join(w if isinstance(w, bytes) else struct.pack(">I", w) for w in words)
    fields = {
        "magic": 0xD00DFEED,
        "totalsize": 56 + len(structure) + len(strings),
        "off_dt_struct": 56,
        "off_dt_strings": 56 + len(structure),
        "off_mem_rsvmap": 40,
        "version": version,
        "last_comp_version": 16,
        "boot_cpuid_phys": 0,
        "size_dt_strings": len(strings),
        "size_dt_struct": len(structure),
    } | header
    return struct.pack(">10I", *fields.values()) + bytes(16) + structure + strings


EMPTY_ROOT = (BEGIN, 0, END, FINISH)


def write(children: dict[str, dict[str, bytes]]) -> memoryview:
    writer = FdtWriter()
    with writer.node(""):
        for name, properties in children.items():
            writer.add_node(name, properties)
    return writer.finish()


def fault(data: bytes, **options: bool) -> tuple[str, int | None]:
    with pytest.raises(FdtError) as caught:
        Fdt(data, **options)
    return caught.value.code, caught.value.offset


def rule(value: object) -> str:
    """Name of a case: the error, not the blob."""
    return f"{value[0]}-{value[1]}" if isinstance(value, tuple) else "blob"


def test_fdt_of_the_kho_root_gives_its_values():
    """The kernel's own root tree reads back, from an unaligned buffer as well."""
    for data in (KHO_V4_ROOT, memoryview(b"x" + KHO_V4_ROOT)[1:], bytearray(KHO_V4_ROOT + b"zz")):
        tree = Fdt(data)

        assert tree.totalsize == 152
        assert tree.version == 17
        assert tree.root["compatible"] == b"kho-v4\0"
        assert (0x123456000).to_bytes(8, "little") == tree.root["preserved-memory-map"]
        assert list(tree.root.properties) == ["compatible", "preserved-memory-map"]
        assert tree.root.children == []


def test_fdt_values_are_read_only_views_of_the_buffer():
    """Nothing is copied: a value follows the buffer, and cannot be written through."""
    data = bytearray(KHO_V4_ROOT)
    value = Fdt(data).root["compatible"]
    data[0x54:0x57] = b"KHO"

    assert value == b"KHO-v4\0"
    assert value.readonly


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", ("FDT_ERR_TRUNCATED", 0)),
        (b"\xd0\x0d\xfe\xec" + bytes(60), ("FDT_ERR_BADMAGIC", 0)),
        (KHO_V4_ROOT[:35], ("FDT_ERR_TRUNCATED", 0)),
        (KHO_V4_ROOT[:-1], ("FDT_ERR_TRUNCATED", 4)),
        (blob(*EMPTY_ROOT, version=15), ("FDT_ERR_BADVERSION", 20)),
        (blob(*EMPTY_ROOT, version=18, last_comp_version=18), ("FDT_ERR_BADVERSION", 20)),
        (blob(*EMPTY_ROOT, version=16, last_comp_version=17), ("FDT_ERR_BADVERSION", 24)),
        (blob(*EMPTY_ROOT, totalsize=39), ("FDT_ERR_TRUNCATED", 4)),
        (blob(*EMPTY_ROOT, totalsize=1 << 31), ("FDT_ERR_TRUNCATED", 4)),
        (blob(*EMPTY_ROOT, off_mem_rsvmap=8), ("FDT_ERR_TRUNCATED", 16)),
        (blob(*EMPTY_ROOT, off_mem_rsvmap=0xFFFFFFF8), ("FDT_ERR_TRUNCATED", 16)),
        (blob(*EMPTY_ROOT, off_dt_struct=58), ("FDT_ERR_ALIGNMENT", 8)),
        (blob(*EMPTY_ROOT, off_dt_struct=0xFFFFFFFC), ("FDT_ERR_TRUNCATED", 8)),
        (blob(*EMPTY_ROOT, size_dt_struct=0xFFFFFFFF), ("FDT_ERR_TRUNCATED", 36)),
        (blob(*EMPTY_ROOT, off_dt_strings=0xFFFFFFFF), ("FDT_ERR_TRUNCATED", 12)),
        (blob(*EMPTY_ROOT, size_dt_strings=0xFFFFFFFF), ("FDT_ERR_TRUNCATED", 32)),
    ],
    ids=rule,
)
def test_fdt_of_a_bad_header_is_refused_even_unchecked(data, expected):
    """Every header field is checked before use; the error names the field's place."""
    assert expected == fault(data)
    assert expected == fault(data, check=False)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (blob(), ("FDT_ERR_TRUNCATED", 56)),
        (blob(FINISH), ("FDT_ERR_BADSTRUCTURE", 56)),
        (blob(NOP, NOP, FINISH), ("FDT_ERR_BADSTRUCTURE", 64)),
        (blob(PROP, 0, 0, BEGIN, 0, END, FINISH), ("FDT_ERR_BADSTRUCTURE", 56)),
        (blob(END, FINISH), ("FDT_ERR_BADSTRUCTURE", 56)),
        (blob(BEGIN, b"name", 0, END, FINISH), ("FDT_ERR_BADLAYOUT", 56)),
        (blob(BEGIN, 0, FINISH), ("FDT_ERR_BADSTRUCTURE", 64)),
        (blob(BEGIN, 0, END), ("FDT_ERR_TRUNCATED", 68)),
        (blob(BEGIN, 0, END, END, FINISH), ("FDT_ERR_BADSTRUCTURE", 68)),
        (blob(BEGIN, 0, END, BEGIN, 0, END, FINISH), ("FDT_ERR_BADLAYOUT", 68)),
        (blob(BEGIN, 0, 5, END, FINISH), ("FDT_ERR_BADSTRUCTURE", 64)),
        (blob(BEGIN, 0, BEGIN, b"abcd", strings=b""), ("FDT_ERR_TRUNCATED", 64)),
        (blob(BEGIN, 0, BEGIN, b"ab\0", strings=b""), ("FDT_ERR_TRUNCATED", 64)),
        (blob(BEGIN, 0, PROP, 0), ("FDT_ERR_TRUNCATED", 64)),
        (blob(BEGIN, 0, PROP, 5, 0, b"1234", END, FINISH, size_dt_struct=24),
         ("FDT_ERR_TRUNCATED", 64)),
        (blob(BEGIN, 0, PROP, 0xFFFFFFFF, 0, END, FINISH), ("FDT_ERR_TRUNCATED", 64)),
        (blob(BEGIN, 0, PROP, 0, 2, END, FINISH), ("FDT_ERR_BADOFFSET", 64)),
        (blob(BEGIN, 0, PROP, 0, 0xFFFFFFFF, END, FINISH), ("FDT_ERR_BADOFFSET", 64)),
        (blob(BEGIN, 0, PROP, 0, 0, END, FINISH, strings=b"p"), ("FDT_ERR_TRUNCATED", 64)),
        (blob(BEGIN, 0, PROP, 0, 0, END, FINISH, strings=b"p" * 256 + b"\0"),
         ("FDT_ERR_BADVALUE", 64)),
        (blob(BEGIN, 0, BEGIN, b"a\0\0\0", END, PROP, 0, 0, END, FINISH),
         ("FDT_ERR_BADSTRUCTURE", 76)),
        (blob(*EMPTY_ROOT, off_mem_rsvmap=72), ("FDT_ERR_TRUNCATED", 72)),
    ],
    ids=rule,
)  # fmt: skip
def test_fdt_of_a_bad_structure_is_refused(data, expected):
    """Every rule of the structure has its error, at the offset of the token."""
    assert expected == fault(data)


def test_fdt_unchecked_finds_the_fault_when_it_is_met():
    """check=False reads what is in order up to the fault, and raises there."""
    data = blob(BEGIN, 0, BEGIN, b"a\0\0\0", END, BEGIN, b"b\0\0\0", PROP, 0, 9, END, END, FINISH)
    tree = Fdt(data, check=False)

    assert [node.name for node in tree.root.children] == ["a", "b"]
    assert tree.node("/a").properties == {}
    for use in (
        lambda: tree.node("/b").properties,
        lambda: tree.node("/b").get("p"),
        lambda: tree.read_nodes("/"),
        tree.to_dts,
    ):
        with pytest.raises(FdtError) as caught:
            use()
        assert caught.value.code == "FDT_ERR_BADOFFSET"


def test_fdt_of_version_16_ends_at_its_end_token():
    """Version 16 has no size_dt_struct and a header of 36 bytes."""
    data = blob(BEGIN, 0, PROP, 4, 0, 7, END, FINISH, version=16, size_dt_struct=0xFFFFFFFF)
    tree = Fdt(data)

    assert tree.version == 16
    assert tree.root["p"] == b"\0\0\0\x07"


def test_fdt_skips_nop_tokens_everywhere():
    """NOPs may stand before, between and after everything but FDT_END."""
    child = (BEGIN, b"a\0\0\0", NOP, PROP, 0, 0, NOP, END)
    data = blob(NOP, BEGIN, 0, NOP, PROP, 4, 0, 1, NOP, *child, NOP, END, NOP, FINISH)
    tree = Fdt(data)

    assert [node.name for _, node in tree.walk()] == ["", "a"]
    assert list(tree.node("/a").properties.values()) == [b""]
    assert tree.read_nodes("/")["name"].strings() == ["a"]


def test_node_of_two_properties_with_one_name_gives_the_first():
    """As in libfdt the first of duplicates counts, in single and in bulk reads."""
    child = (BEGIN, b"a\0\0\0", PROP, 4, 0, b"old.", PROP, 4, 2, b"new.", END)
    tree = Fdt(blob(BEGIN, 0, *child, END, FINISH, strings=b"p\0p\0"))

    assert tree.node("/a")["p"] == b"old."
    assert tree.node("/a").properties == {"p": b"old."}
    assert tree.read_nodes("/")["p"].data.tobytes() == b"old."


def test_node_path_finds_nodes_as_libfdt_does():
    """Slashes may repeat; a name without "@" also means the first with a unit address."""
    tree = Fdt(write({"memory@1": {}, "memory@2": {}, "cpu": {}, "cpu@9": {}, "a@1@2": {}}))

    assert tree.node("/memory").name == "memory@1"
    assert tree.node("//memory@2/").name == "memory@2"
    assert tree.node("/cpu").name == "cpu"
    assert tree.node("/a").name == "a@1@2"
    assert tree.root == tree.node("/")
    assert "/mem" not in tree
    assert "/a@1" not in tree
    assert "/memory/x" not in tree


def test_node_path_missing_or_relative_is_an_error():
    """FDT_ERR_NOTFOUND and FDT_ERR_BADPATH are told apart."""
    tree = Fdt(KHO_V4_ROOT)
    with pytest.raises(FdtError) as missing:
        tree.node("/LUO")
    with pytest.raises(FdtError) as relative:
        tree.node("LUO")
    with pytest.raises(FdtError):
        tree.node("")

    assert (missing.value.code, relative.value.code) == ("FDT_ERR_NOTFOUND", "FDT_ERR_BADPATH")


def test_node_path_with_an_index_finds_the_same():
    """Look-ups that use the index agree with the scan, duplicates and shortcuts included."""
    names = [f"dev{i}@{i % 7}" for i in range(3000)] + ["x@1", "x", "y", "y@1"]
    data = write({name: {} for name in names})
    scanned, indexed = Fdt(data), Fdt(data)
    indexed.node("/dev2999@3")

    for name in ("dev0", "dev5", "dev17@3", "x", "y", "x@1", "y@1"):
        assert scanned.node(f"/{name}").offset == indexed.node(f"/{name}").offset
    assert indexed.node("/x").name == "x@1"
    assert indexed.node("/y").name == "y"
    assert "/dev1@2" not in indexed
    assert all(f"/{name}" in indexed for name in names)
    assert indexed.node("/dev2998@2").path == "/dev2998@2"


def test_node_path_and_parent_follow_the_tree():
    """Each node knows its path and parent, the root none."""
    writer = FdtWriter()
    with writer.node(""), writer.node("a"):
        writer.add_node("b")
        with writer.node("c"):
            writer.add_node("d")
    tree = Fdt(writer.finish())

    assert [(depth, node.path) for depth, node in tree.walk()] == [
        (0, "/"),
        (1, "/a"),
        (2, "/a/b"),
        (2, "/a/c"),
        (3, "/a/c/d"),
    ]
    assert tree.node("/a/c") == tree.node("/a/c/d").parent
    assert hash(tree.node("/a")) == hash(tree.node("/a"))
    assert tree.root.parent is None
    assert Node(tree, tree.node("/a/b").offset).name == "b"


@pytest.mark.parametrize("offset", [0, 1, 60, 151, 152, 1 << 40, (1 << 64) - 1])
def test_node_at_a_wrong_offset_is_refused(offset):
    """A node made from a bad offset is an error and no access outside the blob."""
    with pytest.raises(FdtError):
        Node(Fdt(KHO_V4_ROOT), offset)


def test_node_without_a_property_says_so():
    """Missing properties are KeyError, None or False, as for any mapping."""
    root = Fdt(KHO_V4_ROOT).root

    assert root.get("reg") is None
    assert "reg" not in root
    assert "compatible" in root
    with pytest.raises(KeyError):
        root["reg"]
    with pytest.raises(KeyError):
        root["ompatible"[:3]]


def test_read_nodes_gives_columns():
    """Rows are the children in file order; absent and empty values are told apart."""
    tree = Fdt(write({"a": {"id": b"1234", "e": b""}, "b": {"id": b"5678"}, "c": {"s": b"x\0"}}))
    columns = tree.read_nodes("/")

    assert {"name", "id", "e", "s"} == set(columns)
    assert columns["name"].strings() == ["a", "b", "c"]
    assert columns["id"].present.tolist() == [True, True, False]
    assert columns["id"].offsets.tolist() == [0, 4, 8, 8]
    assert columns["e"].present.tolist() == [True, False, False]
    assert columns["s"].strings() == ["", "", "x"]


def test_read_nodes_of_chosen_properties_gives_those():
    """A property that nobody has is a column without rows present."""
    columns = Fdt(write({"a": {"id": b"1234", "e": b""}})).read_nodes("/", ["id", "zz"])

    assert list(columns) == ["name", "id", "zz"]
    assert columns["zz"].present.tolist() == [False]
    with pytest.raises(TypeError):
        Fdt(KHO_V4_ROOT).read_nodes("/", "id")


def test_read_nodes_out_fills_the_arrays_it_is_given():
    """Arrays that are large enough are written over, others are left alone."""
    big = Fdt(write({f"n{i}": {"id": b"%04d" % i, "x": b"y" * i} for i in range(9)}))
    small = Fdt(write({"a": {"id": b"1234"}, "b": {"new": b"z"}}))
    out = big.read_nodes("/")
    before = [(column.data, column.offsets, column.present) for column in out.values()]
    columns = small.read_nodes("/", out=out)
    shared = [np.shares_memory(columns["id"].data, out["id"].data)]
    shared += [np.shares_memory(columns["name"].offsets, out["name"].offsets)]

    assert shared == [True, True]
    assert columns["name"].strings() == ["a", "b"]
    assert columns["id"].present.tolist() == [True, False]
    assert columns["id"].offsets.tolist() == [0, 4, 4]
    assert columns["new"].data.tobytes() == b"z"
    assert big.read_nodes("/", out=columns)["id"].data.tobytes() == b"".join(
        b"%04d" % i for i in range(9)
    )
    for data, offsets, present in before:
        for array in (data, offsets, present):
            array.flags.writeable = False
    assert not np.shares_memory(small.read_nodes("/", out=out)["id"].data, out["id"].data)
    assert small.read_nodes("/", out={"id": "no column"})["id"].data.tobytes() == b"1234"


@pytest.mark.parametrize("place", [0, 3, 40])
def test_read_nodes_of_nodes_that_differ_in_one_place_gives_each_its_own(place):
    """Longer, absent, renamed or moved: what the node before had is not taken for granted."""
    usual = {f"p{i}": bytes([i]) * (i % 5) for i in range(45)}
    name = f"p{place}"
    without = {key: value for key, value in usual.items() if key != name}
    kinds = [usual, usual, {**usual, name: b"longer"}, without, {**without, "other": b"!"}, usual]
    kinds.append({name: usual[name], **without})
    columns = Fdt(write({f"n{i}": kind for i, kind in enumerate(kinds)})).read_nodes("/")

    for key in (*usual, "other"):
        column = columns[key]
        assert [key in kind for kind in kinds] == column.present.tolist()
        assert b"".join(kind.get(key, b"") for kind in kinds) == column.data.tobytes()


@pytest.mark.parametrize("length", [*range(1, 20), 31, 32, 33, 39, 40, 41, 200])
def test_node_names_of_any_length_are_read(length):
    """A name ends at its NUL, found by words or behind them."""
    names = ["n" * length, "m" * length + "@1", "\x7f\x01é" + "\udcff" * length]
    tree = Fdt(write({name: {} for name in names}))

    assert names == [node.name for node in tree.root.children]
    assert names == tree.read_nodes("/")["name"].strings()
    assert all(tree.root.children[name].name == name for name in names)


def test_children_are_a_sequence_and_found_by_name():
    """Numbers, slices and names; the shortcut without a unit address is that of paths."""
    tree = Fdt(write({"cpu@0": {}, "memory": {}, "cpu@1": {}}))
    children = tree.root.children

    assert [node.name for node in children] == ["cpu@0", "memory", "cpu@1"]
    assert (len(children), children[-1].name, children[1:2][0].name) == (3, "cpu@1", "memory")
    assert children["cpu"] == children["cpu@0"] == children[b"cpu@0"] == tree.node("/cpu@0")
    assert children.get("nothing") is None
    assert ("memory" in children, "mem" in children, children[0] in children) == (True, False, True)
    assert tree.root not in children
    assert children == tree.root.children == list(children) != []
    with pytest.raises(KeyError):
        children["nothing"]
    with pytest.raises(IndexError):
        children[3]
    with pytest.raises(TypeError):
        children[1.5]
    with pytest.raises(TypeError):
        hash(children)
    assert repr(children) == repr(list(children))


def test_children_of_many_nodes_are_found_by_the_index():
    """In every node its own, when all have the same names."""
    writer = FdtWriter()
    with writer.node(""):
        for i in range(30):
            with writer.node(f"bus{i}"):
                writer.add_nodes(("dev", 0, 40), {"bus": b"%d" % i})
    tree = Fdt(writer.finish())

    for bus in tree.root.children:
        for number in range(40):
            device = bus.children[f"dev{number}"]
            assert (device.name, device.parent) == (f"dev{number}", bus)
        assert "dev40" not in bus.children


def test_node_without_a_tree_is_an_error():
    """Node.__new__ alone makes a node of no tree, whose attributes raise."""
    node = Node.__new__(Node)
    for call in (
        lambda: node.name,
        lambda: node.path,
        lambda: node.parent,
        lambda: node.children,
        lambda: node.properties,
        lambda: node["a"],
        lambda: "a" in node,
        lambda: repr(node),
    ):
        with pytest.raises((AttributeError, TypeError)):
            call()
    with pytest.raises(TypeError):
        Node()
    with pytest.raises(TypeError):
        Node(None, 0)


def test_read_nodes_of_a_leaf_is_empty():
    """No children: columns of no rows."""
    columns = Fdt(KHO_V4_ROOT).read_nodes("/", ["x"])

    assert (len(columns["name"]), len(columns["x"])) == (0, 0)
    assert columns["x"].fixed().shape == (0, 0)


def test_read_nodes_ignores_grandchildren():
    """Only direct children are rows, whatever is below them."""
    writer = FdtWriter()
    with writer.node(""), writer.node("a") as node:
        node.property("p", b"1")
        node.add_node("deep", {"q": b"2"})
    columns = Fdt(writer.finish()).read_nodes("/")

    assert list(columns) == ["name", "p"]
    assert columns["name"].strings() == ["a"]


def test_read_nodes_of_names_at_two_offsets_makes_one_column():
    """A name may stand in the string table twice; it is one property all the same."""
    a = (BEGIN, b"a\0\0\0", PROP, 1, 0, b"1\0\0\0", END)
    b = (BEGIN, b"b\0\0\0", PROP, 1, 3, b"2\0\0\0", END)
    columns = Fdt(blob(BEGIN, 0, *a, *b, END, FINISH, strings=b"p\0xp\0")).read_nodes("/")

    assert list(columns) == ["name", "p"]
    assert columns["p"].data.tobytes() == b"12"


def test_read_nodes_of_a_sparse_bomb_is_refused():
    """Columns are dense, so very many kinds of property are an error and not terabytes."""
    n = 6000
    strings = b"".join(b"%06d\0" % i for i in range(n))
    children = b"".join(
        struct.pack(">I4sIIII", BEGIN, b"a\0\0\0", PROP, 0, 7 * i, END) for i in range(n)
    )
    tree = Fdt(blob(BEGIN, 0, children, END, FINISH, strings=strings))
    with pytest.raises(FdtError) as caught:
        tree.read_nodes("/")

    assert caught.value.code == "FDT_ERR_NOSPACE"
    assert tree.read_nodes("/", ["000042"])["000042"].present.sum() == 1


def test_fdt_of_a_very_deep_tree_works():
    """Depth costs no stack: 100,000 levels are checked, walked, indexed and printed."""
    depth = 100_000
    child = struct.pack(">I4s", BEGIN, b"a\0\0\0")
    data = blob(BEGIN, 0, child * depth, struct.pack(">I", END) * (depth + 1), FINISH)
    tree = Fdt(data)

    assert depth == max(level for level, _ in tree.walk())
    assert len(tree.read_nodes("/")["name"]) == 1
    assert 2 * depth + 1 == len(tree.node("/a" * depth).path) + 1
    assert 64 + 64 * 2 * depth < len(tree.to_dts()) < 200 * depth


def test_fdt_of_many_equal_names_is_quick():
    """100,000 siblings of one name do not make the index quadratic."""
    child = struct.pack(">I8sI", BEGIN, b"same@1\0\0", END)
    tree = Fdt(blob(BEGIN, 0, child * 100_000, END, FINISH))

    assert "/absent" not in tree
    assert tree.node("/same").offset == 64


def test_reserve_map_is_read():
    """Entries of the memory reserve map come as pairs, and in the text."""
    data = bytearray(blob(*EMPTY_ROOT, off_mem_rsvmap=80, totalsize=112))
    data[80:] = b""
    data += bytes(80 - len(data)) + struct.pack(">4Q", 0x1000, 0x2000, 0, 0)
    tree = Fdt(data)

    assert tree.reserve_map == [(0x1000, 0x2000)]
    assert "/memreserve/\t0x0000000000001000 0x0000000000002000;" in tree.to_dts()


def test_reserve_map_ends_at_an_entry_of_no_bytes():
    """Whatever its address is, and whatever stands behind it, as for libfdt and Linux."""
    data = bytearray(blob(*EMPTY_ROOT, off_mem_rsvmap=76, totalsize=124))
    data += bytes(76 - len(data)) + struct.pack(">6Q", 0x1000, 0x2000, 0x3000, 0, 0x4000, 0x5000)

    assert Fdt(data).reserve_map == [(0x1000, 0x2000)]


def test_reserve_map_without_alignment_is_read():
    """The specification wants 8 bytes of alignment; libfdt does not ask for it."""
    data = bytearray(blob(*EMPTY_ROOT, off_mem_rsvmap=76, totalsize=108))
    data += bytes(76 - len(data)) + struct.pack(">4Q", 0x1000, 0x2000, 0, 0)

    assert Fdt(data).reserve_map == [(0x1000, 0x2000)]


def test_fdt_of_version_16_finds_names_up_to_the_end_of_the_blob():
    """libfdt takes the size of the strings from version 17 on; before, they end with the blob."""
    words = (BEGIN, 0, PROP, 0, 2, END, FINISH)
    tree = Fdt(blob(*words, strings=b"a\0b\0", version=16, size_dt_strings=2))

    assert list(tree.root.properties) == ["b"]
    assert fault(blob(*words, strings=b"a\0b\0", size_dt_strings=2))[0] == "FDT_ERR_BADOFFSET"


def test_to_dts_guesses_as_dtc_does():
    """Strings, cells, bytes, and nothing at all."""
    writer = FdtWriter()
    with writer.node("") as root:
        root.property_strings("compatible", ["a,b", 'say "hi"\n'])
        root.property_cells("reg", [1, 0x12345678])
        root.property("mac", b"\x01\x02\x03")
        root.property("empty", b"")
        root.property("nul", b"\0")
        root.add_node("child@1")
    expected = """\
/dts-v1/;

/ {
\tcompatible = "a,b", "say \\"hi\\"\\n";
\treg = <0x01 0x12345678>;
\tmac = [01 02 03];
\tempty;
\tnul = [00];

\tchild@1 {
\t};
};
"""

    assert expected == Fdt(writer.finish()).to_dts()


def test_names_that_are_no_text_read_back():
    """Bytes beyond UTF-8 survive reading, looking up and writing."""
    data = blob(BEGIN, 0, BEGIN, b"\xff\0\0\0", PROP, 0, 0, END, END, FINISH, strings=b"\xfe\0")
    tree = Fdt(data)
    name = tree.root.children[0].name
    writer = FdtWriter()
    with writer.node(""):
        writer.add_node(name, tree.node("/" + name).properties)

    assert name == "\udcff"
    assert tree.node(b"/\xff")["\udcfe"] == b""
    assert list(Fdt(writer.finish()).node("/\udcff").properties) == ["\udcfe"]


def test_set_property_inplace_patches_the_buffer():
    """A value of the same length is overwritten, nothing else changes."""
    data = bytearray(KHO_V4_ROOT)
    tree = Fdt(data)
    tree.set_property_inplace("/", "preserved-memory-map", np.array([0xABC000], np.uint64))

    assert (0xABC000).to_bytes(8, "little") == tree.root["preserved-memory-map"]
    assert KHO_V4_ROOT[:0x68] == data[:0x68]
    assert KHO_V4_ROOT[0x70:] == data[0x70:]


def test_set_property_inplace_refuses_what_does_not_fit():
    """Other lengths, missing properties and read-only buffers are refused."""
    tree = Fdt(bytearray(KHO_V4_ROOT))
    codes = []
    for path, name, value in (("/", "compatible", b"x"), ("/", "no", b"x"), ("/no", "no", b"")):
        with pytest.raises(FdtError) as caught:
            tree.set_property_inplace(path, name, value)
        codes.append(caught.value.code)
    with pytest.raises(TypeError):
        Fdt(KHO_V4_ROOT).set_property_inplace("/", "compatible", b"kho-v5\0")

    assert codes == ["FDT_ERR_NOSPACE", "FDT_ERR_NOTFOUND", "FDT_ERR_NOTFOUND"]


def test_fdt_holds_its_buffer():
    """A bytearray under a tree cannot be resized."""
    data = bytearray(KHO_V4_ROOT)
    tree = Fdt(data)
    with pytest.raises(BufferError):
        data.append(0)

    assert tree.root["compatible"] == b"kho-v4\0"


@pytest.mark.parametrize("cls", [Fdt, FdtEditor, lambda data: FdtWriter(into=data)])
def test_buffer_is_released_by_the_garbage_collector(cls):
    """An object that dies in a reference cycle gives its buffer back too."""
    data = bytearray(KHO_V4_ROOT)
    cycle = [cls(data)]
    cycle.append(cycle)
    with pytest.raises(BufferError):
        data.append(0)
    del cycle
    gc.collect()
    data.append(0)

    assert len(data) == 153


def test_fdt_of_something_without_a_buffer_is_a_type_error():
    """Buffers only."""
    with pytest.raises(TypeError):
        Fdt("text")


def test_column_takes_arrays_over():
    """Arrays of the right type are not copied; rows are sliced by offsets."""
    data, offsets = np.arange(6, dtype=np.uint8), np.array([0, 2, 4, 6], np.uint64)
    column = Column(data, offsets)

    assert np.shares_memory(data, column.data)
    assert np.shares_memory(offsets, column.offsets)
    assert column.fixed().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert np.shares_memory(data, column.fixed())
    assert len(column) == 3
    assert column.present.all()


def test_column_fixed_of_unequal_rows_is_a_value_error():
    """Ragged columns and columns with gaps have no array form."""
    with pytest.raises(ValueError):
        Column(b"abc", [0, 1, 3]).fixed()
    with pytest.raises(ValueError):
        Column(b"ab", [0, 1, 2], [True, False]).fixed()


def test_column_strings_drops_the_nul():
    """One NUL at the end belongs to the format, further ones to the value."""
    column = Column(b"a\0b\0\0c", [0, 2, 5, 6, 6], [True, True, True, False])

    assert column.strings() == ["a", "b\0", "c", ""]


@pytest.mark.parametrize(
    ("data", "offsets", "present"),
    [
        (b"abc", [], None),
        (b"abc", [0, 4], None),
        (b"abc", [2, 1], None),
        (b"abc", [-1, 1], None),
        (b"abc", [0.0, 1.0], None),
        (b"abc", [[0, 1]], None),
        (b"abc", [0, 1], [True, True]),
    ],
)
def test_column_of_bad_parts_is_a_value_error(data, offsets, present):
    """Offsets must lie in the data and ascend, and flags must be as many as rows."""
    with pytest.raises(ValueError):
        Column(data, offsets, present)
