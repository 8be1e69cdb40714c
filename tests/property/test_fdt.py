"""Flattened device trees against libfdt, byte for byte, and against hostile bytes."""

import contextlib
import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from luo.fdt import Column, Fdt, FdtEditor, FdtError, FdtWriter

libfdt = pytest.importorskip("libfdt", reason="pylibfdt, the oracle, is not installed")

# Few letters: many names are equal, and many end in one another.
PROPERTY_NAMES = st.text("abc", min_size=1, max_size=4)
NODE_NAMES = st.one_of(
    st.text("ab", min_size=1, max_size=2),
    st.builds("{}@{}".format, st.text("ab", min_size=1, max_size=2), st.integers(0, 2)),
    st.text("dev0123456789,._+-", min_size=1, max_size=20),
)
VALUES = st.binary(max_size=9)
PROPERTIES = st.lists(st.tuples(PROPERTY_NAMES, VALUES), max_size=4)
TREES = st.recursive(
    st.tuples(PROPERTIES, st.just([])),
    lambda trees: st.tuples(PROPERTIES, st.lists(st.tuples(NODE_NAMES, trees), max_size=4)),
    max_leaves=12,
)


def outcome(call) -> tuple:
    """The FdtError that the call raises, or None, and what it returns."""
    try:
        return None, call()
    except FdtError as error:
        return error, None


def write(tree, writer, name="") -> None:
    """Write with whichever of the two writers: their single calls have the same names."""
    properties, children = tree
    writer.begin_node(name)
    for key, value in properties:
        writer.property(key, value)
    for child, subtree in children:
        write(subtree, writer, child)
    writer.end_node()


def written_by_us(tree, **options) -> bytes:
    writer = FdtWriter(**options)
    write(tree, writer)
    return bytes(writer.finish())


def written_by_libfdt(tree) -> bytes:
    writer = libfdt.FdtSw(1 << 16)
    writer.finish_reservemap()
    write(tree, writer)
    blob = writer.as_fdt()
    return bytes(blob.as_bytearray()[: blob.totalsize()])


def read(node) -> tuple:
    """The tree of a node as *write* takes it."""
    return (
        [(name, bytes(value)) for name, value in node.properties.items()],
        [(child.name, read(child)) for child in node.children],
    )


def without_duplicates(tree) -> tuple:
    properties, children = tree
    first = {}
    for name, value in properties:
        first.setdefault(name, value)
    return list(first.items()), [(name, without_duplicates(child)) for name, child in children]


@given(TREES)
def test_writer_gives_libfdts_bytes(tree):
    """Any sequence of calls gives what libfdt's sequential writer gives."""
    expected = written_by_libfdt(tree)

    assert expected == written_by_us(tree)
    assert expected == written_by_us(tree, into=bytearray(len(expected)))
    with pytest.raises(FdtError):
        written_by_us(tree, into=bytearray(len(expected) - 1))


@given(st.lists(st.tuples(st.integers(0, 3), PROPERTIES, st.booleans()), max_size=6))
def test_writer_knows_names_by_object_and_by_text(nodes):
    """The same str object, an equal one, bytes: a name is looked up anew whenever it must be."""
    spellings = [str, lambda name: "".join(list(name)), str.encode, lambda name: name]
    tree = ([], [("n", (properties, [])) for _, properties, _ in nodes])
    writer = FdtWriter()
    with writer.node(""):
        for spelling, properties, whole in nodes:
            pairs = [(spellings[spelling](name), value) for name, value in properties]
            if whole and len(dict(pairs)) == len(pairs):
                writer.add_node("n", dict(pairs))
                continue
            with writer.node("n"):
                for name, value in pairs:
                    writer.property(name, value)

    assert written_by_libfdt(tree) == bytes(writer.finish())


def columns_of(node) -> dict:
    """What read_nodes gives for the children of a node, made from single reads."""
    children = [(child.name, child.properties) for child in node.children]
    names = {name: None for _, properties in children for name in properties if name != "name"}
    return {"name": [name.encode() for name, _ in children]} | {
        name: [None if name not in had else bytes(had[name]) for _, had in children]
        for name in names
    }


def rows_of(column) -> list:
    parts = [column.data[a:b].tobytes() for a, b in itertools.pairwise(column.offsets.tolist())]
    return [part if there else None for part, there in zip(parts, column.present, strict=True)]


@given(TREES, TREES)
def test_read_nodes_gives_what_single_reads_give(tree, other):
    """Every node's children as columns, in new arrays and in those of another tree's columns."""
    out = None
    for blob in (written_by_us(tree), written_by_us(other)):
        fdt = Fdt(blob)
        for _, node in fdt.walk():
            if node.path not in fdt or fdt.node(node.path) != node:
                continue  # of a name that stands twice, or below it: paths find the first
            expected = columns_of(node)
            columns = fdt.read_nodes(node.path)

            assert expected == {name: rows_of(column) for name, column in columns.items()}
            again = fdt.read_nodes(node.path, out=out)
            assert expected == {name: rows_of(column) for name, column in again.items()}
            out = again


@given(TREES)
def test_reader_gives_back_what_was_written(tree):
    """Names, values and order are those that were written, and written again are equal."""
    blob = written_by_us(tree)
    fdt = Fdt(blob)

    assert without_duplicates(tree) == read(fdt.root)
    if tree == without_duplicates(tree):
        assert blob == written_by_us(read(fdt.root))
    assert fdt.to_dts() == Fdt(blob, check=False).to_dts()


@given(TREES)
def test_reader_finds_what_libfdt_finds(tree):
    """Each path, exact or by the unit-address shortcut, with and without the index."""
    blob = written_by_us(tree)
    oracle, scanned, indexed = libfdt.FdtRo(blob), Fdt(blob), Fdt(blob)
    for _, node in indexed.walk():
        path = node.path
        for spelling in {path, path.split("@")[0], path.rpartition("@")[0] or "/", path + "/a"}:
            expected = oracle.path_offset(spelling, quiet=[libfdt.NOTFOUND])
            for fdt in (scanned, indexed):
                found = fdt.node(spelling).offset - 64 if spelling in fdt else -libfdt.NOTFOUND

                assert expected == found


@st.composite
def tables(draw):
    """Names, columns in every form that add_nodes takes, and the same as lists."""
    n = draw(st.integers(0, 8))
    first = draw(st.integers(0, 1002))
    columns, lists = {}, {}
    for key in draw(st.lists(PROPERTY_NAMES, unique=True, max_size=5)):
        kind = draw(st.sampled_from(["same", "long", "array", "list", "column"]))
        if kind in ("same", "long"):
            value = draw(VALUES) * (1 if kind == "same" else 60)
            columns[key], lists[key] = value, [value] * n
        elif kind == "array":
            width = draw(st.integers(0, 9))
            rows = [draw(st.binary(min_size=width, max_size=width)) for _ in range(n)]
            array = np.array([list(row) for row in rows], np.uint8).reshape(n, width)
            columns[key], lists[key] = array, rows
        else:
            rows = draw(st.lists(st.none() | VALUES, min_size=n, max_size=n))
            offsets = np.cumsum([0] + [len(row or b"") for row in rows]).astype(np.uint64)
            data = b"".join(row or b"" for row in rows)
            present = [row is not None for row in rows]
            columns[key] = rows if kind == "list" else Column(data, offsets, present)
            lists[key] = rows
    return [f"dev{first + i}" for i in range(n)], ("dev", first, n), columns, lists


@given(tables(), TREES, st.integers(0, 8))
def test_add_nodes_gives_the_bytes_of_single_calls(table, before, cut):
    """Bulk and single writing agree, after anything, in slices, and with a buffer just enough."""
    names, counted, columns, lists = table
    tree = (
        before[0],
        [
            *before[1],
            *(
                (name, ([(k, v[i]) for k, v in lists.items() if v[i] is not None], []))
                for i, name in enumerate(names)
            ),
        ],
    )
    expected = written_by_libfdt(tree)
    for given_names, slices, options in (
        (names, [(0, None)], {}),
        (counted, [(0, cut), (cut, None)], {}),
        (counted, [(0, None)], {"into": bytearray(len(expected))}),
    ):
        writer = FdtWriter(**options)
        with writer.node(""):
            for key, value in before[0]:
                writer.property(key, value)
            for name, subtree in before[1]:
                write(subtree, writer, name)
            for start, stop in slices:
                writer.add_nodes(given_names, columns, start, stop)

        assert expected == bytes(writer.finish())
    if not before[1]:
        read_back = Fdt(expected).read_nodes("/")
        assert names == read_back.pop("name").strings()
        for key, rows in lists.items():
            if any(row is not None for row in rows):
                column = read_back.pop(key)
                assert [row is not None for row in rows] == column.present.tolist()
                assert b"".join(row or b"" for row in rows) == column.data.tobytes()
        assert read_back == {}


EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("add_node"), st.integers(0, 9), NODE_NAMES),
        st.tuples(st.just("set_property"), st.integers(0, 9), PROPERTY_NAMES, VALUES),
        st.tuples(st.just("del_node"), st.integers(0, 9)),
        st.tuples(st.just("del_property"), st.integers(0, 9), PROPERTY_NAMES),
        st.tuples(st.just("pack")),
    ),
    max_size=30,
)


def edited_by_libfdt(buffer: bytearray, edit: tuple) -> int:
    """The edit as libfdt's calls on the whole buffer; its result."""
    kind, *rest = edit
    if kind == "pack":
        return libfdt.fdt_pack(buffer)
    libfdt.fdt_open_into(buffer, buffer, len(buffer))
    offset = libfdt.fdt_path_offset(buffer, rest[0])
    if offset < 0:
        return offset
    if kind == "add_node":
        return libfdt.fdt_add_subnode(buffer, offset, rest[1])
    if kind == "set_property":
        return libfdt.fdt_setprop(buffer, offset, rest[1], rest[2], len(rest[2]))
    if kind == "del_property":
        return libfdt.fdt_delprop(buffer, offset, rest[1])
    return libfdt.fdt_del_node(buffer, offset)


@given(TREES, EDITS, st.integers(0, 400))
def test_editor_gives_libfdts_bytes(tree, edits, room):
    """Any sequence of edits leaves the same bytes, what lies behind the tree included."""
    blob = written_by_us(tree)
    ours = bytearray(blob + bytes(room))
    theirs = bytearray(ours)
    libfdt.fdt_open_into(theirs, theirs, len(theirs))
    editor = FdtEditor(ours)

    assert theirs == ours
    for kind, *rest in edits:
        if rest:
            paths = [node.path for _, node in Fdt(ours).walk()]
            rest[0] = paths[rest[0] % len(paths)]
        if (kind, *rest) == ("del_node", "/"):
            continue
        note(f"{kind} {rest}")
        expected = edited_by_libfdt(theirs, (kind, *rest))
        fault, _ = outcome(partial(getattr(editor, kind), *rest))

        assert min(expected, 0) == (-getattr(libfdt, fault.code) if fault else 0)
        if expected == -libfdt.FDT_ERR_NOSPACE:
            break  # libfdt leaves its string behind the tree
        assert theirs == ours
    used = editor.pack()
    libfdt.fdt_pack(theirs)

    assert theirs[:used] == ours[:used]
    assert read(Fdt(ours).root) == read(Fdt(bytes(theirs)).root)


def use(fdt: Fdt) -> None:
    """Everything a reader can do; FdtError may come from anywhere."""
    for step in (
        lambda: [node.path for _, node in fdt.walk()],
        lambda: [(n.name, n.parent, n.children, n.properties, "a" in n) for _, n in fdt.walk()],
        lambda: fdt.read_nodes("/"),
        lambda: fdt.read_nodes("/", ["a", "ab"]),
        lambda: [column.strings() for column in fdt.read_nodes("/").values()],
        lambda: fdt.reserve_map,
        lambda: fdt.to_dts(),
        lambda: "/a/b" in fdt,
        lambda: fdt.node("/a@1"),
        lambda: [(n in n.children, n.children.get("a")) for _, n in fdt.walk()],
    ):
        with contextlib.suppress(FdtError):
            step()


def edit(buffer: bytearray) -> None:
    editor = FdtEditor(buffer)
    for step in (
        lambda: editor.add_node("/", "new"),
        lambda: editor.set_property("/a", "ab", b"123"),
        lambda: editor.set_property("/", "new", b"12345"),
        lambda: editor.del_property("/", "a"),
        lambda: editor.del_node("/a"),
        lambda: editor.pack(),
    ):
        with contextlib.suppress(FdtError):
            step()
    with contextlib.suppress(FdtError):
        use(Fdt(bytes(buffer), check=False))


FLIPS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(1, 255)), max_size=4)
WORDS = st.lists(
    st.tuples(
        st.integers(0, 1 << 14),
        st.sampled_from([0, 1, 2, 3, 4, 9, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0, 16, 40]),
    ),
    max_size=2,
)


@given(TREES, FLIPS, WORDS, st.none() | st.integers(0, 1 << 16), st.integers(0, 3))
def test_reader_of_spoiled_bytes_gives_fdterror_or_a_tree(tree, flips, words, cut, shift):
    """Flipped bits, planted words and truncation: FdtError or a tree, never anything else."""
    data = bytearray(written_by_us(tree))
    for at, value in words:
        where = 4 * (at % (len(data) // 4))
        data[where : where + 4] = value.to_bytes(4, "big")
    for at, mask in flips:
        data[at % len(data)] ^= mask
    if cut is not None:
        del data[cut % len(data) :]
    spoiled = memoryview(bytes(shift) + bytes(data))[shift:]
    theirs = libfdt.fdt_check_full(bytearray(data), len(data)) if data else -1
    with contextlib.suppress(FdtError):
        use(Fdt(spoiled, check=False))
    fault, fdt = outcome(lambda: Fdt(spoiled))
    if fault:
        assert fault.code.startswith("FDT_ERR_")
        assert fault.offset is not None
        assert fault.offset <= max(len(data), 40)
    else:
        # What we accept, libfdt accepts; the other way round we are stricter.
        assert theirs == 0
        before = read(fdt.root)
        use(fdt)
        assert before == read(fdt.root)
    with contextlib.suppress(FdtError):
        edit(bytearray(data))


@given(st.binary(max_size=200))
def test_reader_of_any_structure_gives_fdterror_or_a_tree(noise):
    """A good header with noise behind it."""
    words = [noise[i : i + 4] for i in range(0, len(noise), 4)]
    structure = b"".join(
        (word[0] % 10).to_bytes(4, "big") if word[0] < 200 else word.ljust(4, b"\0")
        for word in words
    )
    fields = [0xD00DFEED, 60 + len(structure), 56, 56 + len(structure), 40, 17, 16, 0, 4]
    header = b"".join(f.to_bytes(4, "big") for f in [*fields, len(structure)])
    data = header + bytes(16) + structure + b"abc\0"
    for check in (True, False):
        with contextlib.suppress(FdtError):
            use(Fdt(data, check=check))
    with contextlib.suppress(FdtError):
        edit(bytearray(data + bytes(64)))
