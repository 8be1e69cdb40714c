"""The device tree, and the machine that holds it."""

import errno
import fcntl
import itertools
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from luo._kho import DeviceTable
from luo.errors import HandoverError, KhoError
from luo.machine import DeviceTree, Machine


def texts(ragged):
    data, offsets = ragged
    return [bytes(data[start:stop]) for start, stop in itertools.pairwise(offsets)]


def sample():
    """A root bus, a bridge, two functions behind it, and a platform device."""
    tree = DeviceTree()
    tree.add("pci0000:00")
    tree.add("0000:00:01.0", 0, "pci", "pcieport", 1, state=b"bridge")
    tree.add("0000:01:00.0", 1, "pci", "nvme", 1, state=b"disk")
    tree.add("0000:01:00.1", "pci0000:00/0000:00:01.0", "pci", None, 1)
    tree.add("serial8250", None, "platform", "serial8250", -1)
    return tree


def sealed(content, seals=None):
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    if seals is None:
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def contents(tree):
    fd = tree.to_memfd()
    try:
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def reload(tree):
    fd = tree.to_memfd()
    try:
        return DeviceTree.from_memfd(fd)
    finally:
        os.close(fd)


# ---- add -------------------------------------------------------------------------------------


def test_add_gives_indices_in_order():
    """Indices count up from 0, and columns say what was given."""
    tree = sample()

    assert list(tree) == [0, 1, 2, 3, 4]
    assert tree.parents.tolist() == [-1, 0, 1, 1, -1]
    assert tree.depths.tolist() == [1, 2, 3, 3, 1]
    assert tree.nodes.tolist() == [0, 1, 1, 1, -1]
    assert tree.bus_names == ["pci", "platform"]
    assert tree.bus_ids.tolist() == [-1, 0, 0, 0, 1]
    assert tree.driver_names == ["pcieport", "nvme", "serial8250"]
    assert tree.driver_ids.tolist() == [-1, 0, 1, -1, 2]
    assert texts(tree.names)[2] == b"0000:01:00.0"


def test_path_and_lookup_agree():
    """A path is the names from the root, and leads back to the index."""
    tree = sample()

    assert tree.path(3) == "pci0000:00/0000:00:01.0/0000:01:00.1"
    assert tree["pci0000:00/0000:00:01.0/0000:01:00.1"] == 3
    assert "serial8250" in tree
    assert "pci0000:00/serial8250" not in tree


@pytest.mark.parametrize(
    "path", ["", "/", "/pci0000:00", "pci0000:00/", "0000:00:01.0", "pci0000:00//0000:00:01.0"]
)
def test_lookup_of_a_path_that_is_none_is_key_error(path):
    """A path is matched as a whole and as it is."""
    with pytest.raises(KeyError):
        sample()[path]


@pytest.mark.parametrize("name", ["", "a/b", "/", "a\0b", "x" * 65536])
def test_add_bad_name_is_value_error(name):
    """A name is not empty, has no slash or NUL, and its path fits into 65,535 bytes."""
    tree = sample()

    with pytest.raises(ValueError):
        tree.add(name)
    assert len(tree) == 5


def test_add_path_of_the_greatest_length():
    """65,535 bytes of path are allowed, one more is not."""
    tree = DeviceTree()
    tree.add("a" * 65533)
    tree.add("b", 0)

    assert tree["a" * 65533 + "/b"] == 1
    with pytest.raises(ValueError, match="longer"):
        tree.add("bc", 0)


def test_add_deep_chain():
    """Depth is bounded by the length of the path alone."""
    tree = DeviceTree()
    tree.add_many(["d"] * 32768, np.arange(-1, 32767))

    assert tree.depths[-1] == 32768
    assert tree["/".join(["d"] * 32768)] == 32767
    order = tree.preserve_order(np.arange(32768) == 32767)
    assert order.tolist() == list(range(32767, -1, -1))


def test_add_sibling_of_the_same_name_is_value_error():
    """A name is taken once under a parent, and may be anywhere else."""
    tree = sample()

    with pytest.raises(ValueError, match="sibling"):
        tree.add("0000:01:00.0", 1)
    assert tree.add("0000:01:00.0", 0) == 5


@pytest.mark.parametrize("parent", [-1, 5, 1 << 40])
def test_add_below_no_device_is_value_error(parent):
    """A parent is an earlier device."""
    with pytest.raises(ValueError):
        sample().add("x", parent)


def test_add_below_unknown_path_is_key_error():
    """A parent's path must lead to a device."""
    with pytest.raises(KeyError):
        sample().add("x", "nowhere")


def test_add_below_removed_device_is_value_error():
    """A removed device gets no children."""
    tree = sample()
    tree.remove(4)

    with pytest.raises(ValueError, match="removed"):
        tree.add("x", 4)


@pytest.mark.parametrize(
    "arguments",
    [{"bus": ""}, {"driver": ""}, {"node": -2}, {"node": 1 << 31}, {"": b""}],
)
def test_add_bad_argument_leaves_no_trace(arguments):
    """A refused device leaves no bus, driver or column behind."""
    tree = sample()
    before = contents(tree)

    with pytest.raises(ValueError):
        tree.add("x", **{"bus": "b", "driver": "d", "new": b"n"} | arguments)
    assert contents(tree) == before


@pytest.mark.parametrize("arguments", [{"bus": 1}, {"driver": b"x"}, {"node": 0.5}, {"s": 5}])
def test_add_wrong_type_is_type_error(arguments):
    """Names are str, nodes integers, columns buffers."""
    with pytest.raises(TypeError):
        sample().add("x", **arguments)


def test_names_outside_utf8_come_back():
    """Bytes that are no UTF-8 pass as os.fsdecode() has them."""
    name = os.fsdecode(b"disk\xff\xc3\xa4")
    tree = DeviceTree()
    tree.add(name, bus=name, driver=name)

    assert tree.path(0) == name
    assert tree[name] == 0
    assert reload(tree).bus_names == [name]


def test_name_with_odd_surrogates_is_value_error():
    """A lone surrogate that stands for no byte cannot be stored."""
    with pytest.raises(ValueError):
        DeviceTree().add("\ud800")


def test_bus_name_is_interned_in_the_form_in_which_it_reloads():
    """Surrogates that together are valid UTF-8 are the character that they encode."""
    tree = DeviceTree()
    tree.add("a", bus="ä")
    tree.add("b", bus="\udcc3\udca4")

    assert tree.bus_names == ["ä"]
    assert tree.bus_ids.tolist() == [0, 0]


# ---- add_many --------------------------------------------------------------------------------


def test_add_many_parents_in_the_same_call():
    """A batch may hold parents and their children."""
    tree = sample()

    assert tree.add_many(["a", "b", "c"], [-1, 5, 6]) == range(5, 8)
    assert tree.path(7) == "a/b/c"
    assert tree["a/b"] == 6


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "yy"], ["x", "yy"]),
        (("x", "yy"), ["x", "yy"]),
        (("x", "7", "8"), ["x", "7", "8"]),
        (("dev", 9, 3), ["dev9", "dev10", "dev11"]),
        (("", 0, 1), ["0"]),
        ((b"abc", [0, 1, 3]), ["a", "bc"]),
        ((np.frombuffer(b"-abc-", np.uint8), np.array([1, 2, 4])), ["a", "bc"]),
        ([], []),
        (("dev", 5, 0), []),
    ],
)
def test_add_many_names(names, expected):
    """Names are given as str, as a numbered run, or as data and offsets."""
    tree = DeviceTree()
    rows = tree.add_many(names)

    assert rows == range(len(expected))
    assert [tree.path(row) for row in rows] == expected


def test_numbered_names_count_digits():
    """Runs over powers of ten get the digits right, up to the greatest numbers."""
    for start in (0, 8, 98, 999_998, 10**18 - 2, (1 << 63) - 1):
        data, offsets = DeviceTable.numbered("vf", start, 4)

        assert [f"vf{start + i}".encode() for i in range(4)] == texts((data, offsets))


@pytest.mark.parametrize(
    "names", [("d", -1, 2), ("d", 0, -1), ("d", 1 << 63, 1), ("d", 0, 1 << 40)]
)
def test_numbered_names_out_of_range_is_value_error(names):
    """Numbers are 0 or more, and there are no more than an index can name."""
    with pytest.raises(ValueError):
        DeviceTree().add_many(names)


@pytest.mark.parametrize("names", ["abc", b"abc"])
def test_add_many_one_string_is_type_error(names):
    """One string is not a sequence of names."""
    with pytest.raises(TypeError):
        DeviceTree().add_many(names)


@pytest.mark.parametrize(
    ("given", "ids", "known"),
    [
        (None, [-1, -1, -1], []),
        ("pci", [0, 0, 0], ["pci"]),
        (["a", None, "b"], [0, -1, 1], ["a", "b"]),
        (["b", "a", "b"], [0, 1, 0], ["b", "a"]),
        ((None, "b", None), [-1, 0, -1], ["b"]),
        ((np.array([1, -1, 0]), ["a", "b"]), [1, -1, 0], ["a", "b"]),
        ((np.array([0, 1, 2], np.uint8), ["a", "a", "b"]), [0, 0, 1], ["a", "b"]),
        ([None, None, None], [-1, -1, -1], []),
    ],
)
def test_add_many_buses_and_drivers(given, ids, known):
    """A name for all, a name each, or codes and what they stand for."""
    tree = DeviceTree()
    tree.add_many(["x", "y", "z"], buses=given, drivers=given)

    assert tree.bus_ids.tolist() == ids
    assert tree.driver_ids.tolist() == ids
    assert tree.bus_names == tree.driver_names == known


def test_add_many_pair_of_bus_names():
    """Two names for two devices are not codes and names."""
    tree = DeviceTree()
    tree.add_many(["x", "y"], buses=("pci", None), drivers=("a", "b"))

    assert tree.bus_ids.tolist() == [0, -1]
    assert tree.driver_ids.tolist() == [0, 1]


class Rows:
    """As a flattened tree's column is."""

    data = np.frombuffer(b"abc", np.uint8)
    offsets = np.array([0, 1, 1, 3], np.uint64)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"xy", [b"xy", b"xy", b"xy"]),
        (b"", [b"", b"", b""]),
        (np.array([[1, 2], [3, 4], [5, 6]], np.uint8), [b"\1\2", b"\3\4", b"\5\6"]),
        (np.array([1, 2, 3], "<u2"), [b"\1\0", b"\2\0", b"\3\0"]),
        (np.arange(12, dtype=np.uint8).reshape(3, 4)[:, ::2], [b"\0\2", b"\4\6", b"\10\12"]),
        (np.empty((3, 0), np.uint8), [b"", b"", b""]),
        ([b"a", None, bytearray(b"bc")], [b"a", b"", b"bc"]),
        ((b"abc", np.array([0, 1, 1, 3])), [b"a", b"", b"bc"]),
        ((b"-abc-", np.array([1, 2, 2, 4])), [b"a", b"", b"bc"]),
        (Rows, [b"a", b"", b"bc"]),
    ],
)
def test_add_many_columns(value, expected):
    """A column is one value for all, an array of rows, bytes each, or data and offsets."""
    tree = DeviceTree()
    tree.add("first")
    tree.add_many(["x", "y", "z"], state=value)
    tree.add("last", state=b"!")

    assert texts(tree.column("state")) == [b"", *expected, b"!"]
    assert tree.sizes("state", [4, 1, 2]).tolist() == [1, len(expected[0]), len(expected[1])]


@pytest.mark.parametrize(
    "arguments",
    [
        {"names": ["a", "b", "b"], "parents": [-1, 5, 5]},
        {"names": ["a", "b", "0000:01:00.0"]},
        {"names": ["a", "serial8250", "b"], "parents": None},
        {"names": ["a", "", "b"]},
        {"names": ["a", "b", "c/d"]},
        {"names": ["a", "b", "c\0"]},
        {"names": ["a", "b"]},
        {"names": (b"abc", [0, 2, 1, 3])},
        {"names": (b"abc", [0, 1, 2, 4])},
        {"parents": [-1, 5, 7]},
        {"parents": [-1, -2, -1]},
        {"parents": [-1, -1]},
        {"parents": [[-1, -1, -1]]},
        {"parents": [-1, -1, 1 << 32]},
        {"buses": ["pci", ""]},
        {"buses": ([0, 1, 2], ["pci", "usb"])},
        {"drivers": ([0, 1, -2], ["a", "b"])},
        {"drivers": ([0, 1], ["a", "b"])},
        {"nodes": [0, 0, -2]},
        {"nodes": [0, 0]},
        {"state": [b"a"]},
        {"state": np.zeros((2, 4), np.uint8)},
        {"state": (b"abc", [0, 1, 2, 4])},
        {"state": (b"abc", [0, 2, 1, 3])},
        {"state": (b"abc", [0, 1, 3])},
    ],
)
def test_add_many_refused_leaves_the_tree_as_it_was(arguments):
    """Nothing of a refused batch stays: devices, names of buses, columns, or index entries."""
    tree = sample()
    before = contents(tree)
    batch = {
        "names": ["a", "b", "c"],
        "parents": [-1, 5, 1],
        "buses": "newbus",
        "drivers": ["new", None, "newer"],
        "other": [b"1", b"2", b"3"],
    }

    with pytest.raises(ValueError):
        tree.add_many(**batch | arguments)
    assert contents(tree) == before
    assert "a" not in tree
    assert "a/b" not in tree
    tree.add_many(**batch)
    assert tree["a/b"] == 6


@pytest.mark.parametrize(
    "arguments",
    [
        {"parents": [0.5, 1.5, 2.5]},
        {"parents": [True, False, True]},
        {"buses": [1, 2, 3]},
        {"nodes": 1.5},
        {"names": (b"abc", [0.0, 1.0, 2.0, 3.0])},
        {"state": [1, 2, 3]},
    ],
)
def test_add_many_wrong_type_is_type_error(arguments):
    """Numbers are integers, names str, rows buffers."""
    with pytest.raises(TypeError):
        DeviceTree().add_many(**{"names": ["a", "b", "c"]} | arguments)


def test_add_many_nothing_changes_nothing():
    """An empty batch makes no bus and no column."""
    tree = DeviceTree()

    assert tree.add_many([], buses="pci", state=b"x") == range(0)
    assert tree.bus_names == tree.column_names == []


def test_add_many_error_names_row_and_parent():
    """The message of a refused batch says which device, and where."""
    tree = sample()

    with pytest.raises(ValueError, match=r"row 1, 'x': .* below 'pci0000:00'"):
        tree.add_many(["x", "x"], [0, 0])
    with pytest.raises(ValueError, match=r"row 2, 'x': .* below row 0"):
        tree.add_many(["y", "x", "x"], [0, 5, 5])


# ---- views -----------------------------------------------------------------------------------


def test_arrays_cannot_be_written():
    """Views of the table are read-only."""
    tree = sample()

    for array in (tree.parents, tree.alive, *tree.names, *tree.column("state")):
        assert not array.flags.writeable
        with pytest.raises(ValueError):
            array.flags.writeable = True


def test_arrays_outlive_growth_and_the_tree():
    """A view goes on showing its rows while the table grows, and after its end."""
    tree = sample()
    parents, (data, offsets) = tree.parents, tree.column("state")
    before = parents.tolist(), bytes(data), offsets.tolist()

    tree.add_many(("d", 0, 5000), state=b"x" * 100)
    del tree

    assert before == (parents.tolist(), bytes(data), offsets.tolist())


def test_arrays_of_an_empty_tree_are_empty():
    """A tree without devices has arrays without rows, and answers."""
    tree = DeviceTree()

    assert tree.parents.tolist() == tree.alive.tolist() == list(tree) == []
    assert texts(tree.names) == []
    assert tree.preserve_order([]).tolist() == []
    assert tree.eligible([], []).tolist() == []
    assert tree.match("*").tolist() == []
    assert tree.paths([])[1].tolist() == [0]
    assert tree.find_paths(b"a", [0, 1]).tolist() == [-1]
    assert len(reload(tree)) == 0


def test_column_unknown_is_key_error():
    """A column exists once a device was given it."""
    tree = sample()

    for call in (tree.column, lambda name: tree.sizes(name, [0]), lambda n: tree.gather(n, [0])):
        with pytest.raises(KeyError):
            call("nothing")


def test_memory_per_device_is_bounded():
    """Beyond names and columns a device takes less than 150 bytes."""
    tree = DeviceTree()
    tree.add_many(("d", 0, 10000))
    for i in range(3000):
        tree.add(f"e{i}", i)

    assert tree.table.nbytes < 150 * 13000 + tree.names[0].nbytes * 2


# ---- gather ----------------------------------------------------------------------------------


def test_gather_copies_rows():
    """Rows of one size come as one array, in the order asked for."""
    tree = DeviceTree()
    tree.add_many(["a", "b", "c"], state=[b"12", b"34", b"56"])
    out = np.zeros((2, 2), np.uint8)

    assert tree.gather("state", [2, 0, 2]).tobytes() == b"561256"
    assert tree.gather("state", [1, 0], out) is out
    assert out.tobytes() == b"3412"
    assert tree.gather("state", []).shape == (0, 0)


def test_gather_of_other_sizes_is_value_error():
    """Rows must be of one size, and out of their shape."""
    tree = sample()

    with pytest.raises(ValueError, match="device 2 has 4 bytes"):
        tree.gather("state", [1, 2])
    with pytest.raises(ValueError):
        tree.gather("state", [1], np.zeros((1, 5), np.uint8))
    with pytest.raises(ValueError):
        tree.gather("state", [1], np.zeros((2, 6), np.uint8))


@pytest.mark.parametrize("index", [-1, 5, 1 << 30])
def test_index_of_no_device_is_index_error(index):
    """Bulk calls check each index."""
    tree = sample()

    calls = [
        lambda: tree.gather("state", [1, index]),
        lambda: tree.sizes("state", [1, index]),
        lambda: tree.paths([1, index]),
        lambda: tree.path(index),
        lambda: tree.remove(index),
    ]
    for call in calls:
        with pytest.raises(IndexError):
            call()


# ---- remove ----------------------------------------------------------------------------------


def test_remove_takes_descendants():
    """What hangs below goes too; indices of the rest stay."""
    tree = sample()

    assert tree.remove("pci0000:00/0000:00:01.0") == 3
    assert list(tree) == [0, 4]
    assert len(tree) == 2
    assert tree.alive.tolist() == [True, False, False, False, True]
    assert "pci0000:00/0000:00:01.0/0000:01:00.1" not in tree
    assert tree.path(3) == "pci0000:00/0000:00:01.0/0000:01:00.1"


def test_remove_twice_is_an_error():
    """A removed device is no device."""
    tree = sample()
    tree.remove(4)

    with pytest.raises(IndexError):
        tree.remove(4)
    with pytest.raises(KeyError):
        tree.remove("serial8250")


def test_add_after_remove_gets_a_new_index():
    """A path may come back, an index never."""
    tree = sample()
    tree.remove("serial8250")

    assert tree.add("serial8250") == 5
    assert tree["serial8250"] == 5


def test_add_and_remove_again_and_again_stays_fast():
    """Entries of removed devices do not pile up in the path index."""
    tree = sample()
    for _ in range(20000):
        tree.remove(tree.add("usb1"))

    assert tree.table.nbytes < 20005 * 150
    assert "usb1" not in tree


# ---- find_paths ------------------------------------------------------------------------------


@pytest.mark.parametrize("hints", [None, [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [-1, 99, -7, 5, 0]])
def test_find_paths_with_any_hint(hints):
    """A wrong hint costs time only."""
    tree = sample()
    data, offsets = tree.paths(list(tree))

    assert tree.find_paths(data, offsets, hints).tolist() == [0, 1, 2, 3, 4]


def test_find_paths_with_hint_to_a_sibling_path_elsewhere():
    """A hint is right only if all parents' names are right, also next to a right one."""
    tree = DeviceTree()
    tree.add_many(["a", "b", "x", "y", "x", "y"], [-1, -1, 0, 0, 1, 1])
    paths = [b"a/x", b"b/y", b"c/y", b"a/y", b"a/z"]
    offsets = np.cumsum([0, *map(len, paths)])

    found = tree.find_paths(b"".join(paths), offsets, [2, 3, 3, 3, 3])
    assert found.tolist() == [2, 5, -1, 3, -1]


def test_find_paths_of_removed_devices_is_minus_one():
    """A hint to a removed device does not count."""
    tree = sample()
    data, offsets = tree.paths([1, 2, 3])
    tree.remove(2)

    assert tree.find_paths(data, offsets, [1, 2, 3]).tolist() == [1, -1, 3]


@pytest.mark.parametrize("offsets", [[], [0, 9], [2, 1], [0, 3, 1, 4], [-1, 3]])
def test_find_paths_bad_offsets_is_value_error(offsets):
    """Offsets must lie in the data and not decrease."""
    with pytest.raises((ValueError, TypeError)):
        sample().find_paths(b"abcd", offsets)


def test_find_paths_hints_of_another_length_is_value_error():
    """There is a hint for each path, or none at all."""
    with pytest.raises(ValueError):
        sample().find_paths(b"abcd", [0, 4], [1, 2])


# ---- order and eligibility -------------------------------------------------------------------


def test_preserve_order_puts_children_first():
    """Requested devices and ancestors, deepest first, in the order in which they came in."""
    tree = sample()

    assert tree.preserve_order([False, False, True, True, True]).tolist() == [2, 3, 1, 0, 4]
    assert tree.preserve_order(np.array([0, 0, 0, 1, 0], np.uint8)).tolist() == [3, 1, 0]


def test_preserve_order_brings_groups_together():
    """A group comes at the place of its first device, and only within a depth."""
    tree = DeviceTree()
    tree.add_many(("r", 0, 6))
    tree.add("c", 0)
    wanted = np.ones(7, bool)

    order = tree.preserve_order(wanted, [7, -1, 9, 7, -1, 9, 7])
    assert order.tolist() == [6, 0, 3, 1, 2, 5, 4]
    huge = tree.preserve_order(
        wanted, np.array([7, -1, 9, 7, -1, 9, 7]) * 200_000_000 // 200_000_000
    )
    assert huge.tolist() == order.tolist()
    sparse = np.array([2_000_000_000, -1, 5, 2_000_000_000, -1, 5, 2_000_000_000])
    assert tree.preserve_order(wanted, sparse).tolist() == order.tolist()


@pytest.mark.parametrize(
    ("requested", "group"), [([True] * 4, None), ([True] * 5, [0] * 4), ([True] * 5, [-2] * 5)]
)
def test_preserve_order_bad_arrays_are_value_error(requested, group):
    """There is a flag and a group for each device; groups are -1 or more."""
    with pytest.raises(ValueError):
        sample().preserve_order(requested, group)


def test_group_order_of_no_device_is_index_error():
    """Numbers are checked, not followed."""
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match="no device"):
            sample().table.group_order(np.array([wrong], np.int32), np.zeros(5, np.int32))


def test_preserve_order_of_indices_is_type_error():
    """Requested is a mask; a list of indices is a mistake."""
    with pytest.raises(TypeError):
        sample().preserve_order([0, 1, 2, 3, 4])


def test_eligible_needs_driver_and_bus_all_the_way_up():
    """A device without driver or bus passes; a miss above blocks what is below."""
    tree = sample()
    every, nobody = [True, True, True], [False, False, False]

    assert tree.eligible(every, [True, True]).tolist() == [True] * 5
    assert tree.eligible([False, True, True], [True, True]).tolist() == [
        True, False, False, False, True,
    ]  # fmt: skip
    assert tree.eligible([True, False, True], [True, False]).tolist() == [
        True, True, False, True, False,
    ]  # fmt: skip
    assert tree.eligible(nobody, [False, False]).tolist() == [True] + [False] * 4
    with pytest.raises(ValueError):
        tree.eligible([True], [True, True])


def test_match_crosses_slashes():
    """A star stands for any part of the path, and the whole path must match."""
    tree = sample()

    assert tree.match("pci*.0").tolist() == [False, True, True, False, False]
    assert tree.match("*").all()
    assert not tree.match("").any()
    assert tree.match("serial????").sum() == 1
    tree.remove("serial8250")
    assert not tree.match("serial*").any()
    with pytest.raises(TypeError):
        tree.match(b"*")


# ---- memfd -----------------------------------------------------------------------------------


def test_memfd_is_sealed_and_comes_back_equal():
    """The memfd cannot change, and every column is as it was, removed devices included."""
    tree = sample()
    tree.add_many(["x", "y"], [3, 4], extra=[b"1", b"22"])
    tree.remove(3)
    fd = tree.to_memfd()
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    again = DeviceTree.from_memfd(fd)
    os.close(fd)

    assert seals == (
        fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    )
    assert again.readonly
    assert list(again) == list(tree)
    for name in ("parents", "depths", "bus_ids", "driver_ids", "nodes", "alive"):
        assert np.array_equal(getattr(again, name), getattr(tree, name)), name
    for name in ("bus_names", "driver_names", "column_names"):
        assert getattr(again, name) == getattr(tree, name), name
    for name in tree.column_names:
        assert texts(again.column(name)) == texts(tree.column(name))
    assert [again.path(row) for row in range(7)] == [tree.path(row) for row in range(7)]
    assert again["serial8250/y"] == 6
    assert "pci0000:00/0000:00:01.0/0000:01:00.1/x" not in again
    assert again.preserve_order(np.ones(7, bool)).tolist() == [2, 1, 6, 0, 4]
    assert contents(again) == contents(tree)


def test_memfd_tree_refuses_change():
    """A tree from a memfd stays as it is: EROFS."""
    tree = reload(sample())

    for change in (
        lambda: tree.add("x"),
        lambda: tree.add_many(["x"]),
        lambda: tree.remove("serial8250"),
    ):
        with pytest.raises(KhoError) as caught:
            change()
        assert caught.value.errno == errno.EROFS


def test_memfd_arrays_outlive_their_tree():
    """The mapping stays for as long as an array shows it."""
    tree = reload(sample())
    parents = tree.parents
    del tree

    assert parents.tolist() == [-1, 0, 1, 1, -1]


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK])
def test_from_memfd_without_seals_is_handover_error(seals):
    """What could change after the check is not accepted."""
    fd = sealed(contents(sample()), seals)

    with pytest.raises(HandoverError):
        DeviceTree.from_memfd(fd)
    os.close(fd)


def test_from_memfd_of_other_files_is_an_error():
    """A file is no memfd, and a descriptor that is closed is an OSError."""
    with Path(__file__).open("rb") as file:
        fd = file.fileno()
        with pytest.raises(HandoverError):
            DeviceTree.from_memfd(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        DeviceTree.from_memfd(fd)


def section_at(content, kind, column=0):
    """Where the entry of a section stands, and its (offset, bytes)."""
    nr_sections = struct.unpack_from("=I", content, 12)[0]
    for i in range(nr_sections):
        found, number, offset, nbytes = struct.unpack_from("=IIQQ", content, 64 + 24 * i)
        if (found, number) == (kind, column):
            return 64 + 24 * i, offset, nbytes
    raise AssertionError(kind)


def patched(content, at, form, *values):
    copy = bytearray(content)
    struct.pack_into(form, copy, at, *values)
    return bytes(copy)


NAME_OFFSETS, NAMES, PARENTS, DEPTHS, BUSES, DRIVERS, NODES, PATHS, ALIVE, CUTS, STRINGS = range(11)
COLUMN_OFFSETS, COLUMN_DATA = 11, 12


def bad_contents():
    """Each rule of the format, broken once."""
    good = contents(sample())

    def place(kind):
        return section_at(good, kind)[1]

    def entry(kind):
        return section_at(good, kind)[0]

    yield "empty", b""
    yield "short", good[:63]
    yield "truncated", good[:-1]
    yield "longer", good + b"\0"
    yield "magic", patched(good, 0, "=B", 0)
    yield "version", patched(good, 8, "=I", 2)
    yield "sections", patched(good, 12, "=I", 12)
    yield "devices", patched(good, 16, "=Q", 6)
    yield "many devices", patched(good, 16, "=Q", 1 << 62)
    yield "buses", patched(good, 24, "=I", 3)
    yield "columns", patched(good, 32, "=I", 0xFFFFFFFF)
    yield "sections and columns", patched(good, 12, "=I", 11 + 2 * 1000) [:32] + patched(
        good, 32, "=I", 1000)[32:]  # fmt: skip
    yield "zero", patched(good, 36, "=I", 1)
    yield "kind", patched(good, entry(PARENTS), "=I", 3)
    yield "column of a section", patched(good, entry(COLUMN_DATA) + 4, "=I", 1)
    yield "offset", patched(good, entry(NAMES) + 8, "=Q", len(good) + 64 - len(good) % 64)
    yield "huge offset", patched(good, entry(NAMES) + 8, "=Q", (1 << 64) - 64)
    yield "offset in header", patched(good, entry(NAMES) + 8, "=Q", 0)
    yield "alignment", patched(good, entry(PARENTS) + 8, "=Q", place(PARENTS) + 4)
    yield "size", patched(good, entry(PARENTS) + 16, "=Q", 16)
    yield "first name offset", patched(good, place(NAME_OFFSETS), "=Q", 1)
    yield "name offset decreases", patched(good, place(NAME_OFFSETS) + 16, "=Q", 3)
    yield "last name offset", patched(good, place(NAME_OFFSETS) + 40, "=Q", 1 << 40)
    yield "empty name", patched(good, place(NAME_OFFSETS) + 8, "=Q", 0)
    yield "slash", patched(good, place(NAMES) + 3, "=B", ord("/"))
    yield "NUL", patched(good, place(NAMES) + 3, "=B", 0)
    yield "own parent", patched(good, place(PARENTS) + 4, "=i", 1)
    yield "parent below -1", patched(good, place(PARENTS), "=i", -2)
    yield "depth", patched(good, place(DEPTHS) + 8, "=i", 2)
    yield "bus", patched(good, place(BUSES), "=i", 2)
    yield "driver", patched(good, place(DRIVERS), "=i", -2)
    yield "node", patched(good, place(NODES), "=i", -2)
    yield "path length", patched(good, place(PATHS) + 4, "=H", 65535)
    yield "mark", patched(good, place(ALIVE), "=B", 2)
    yield "child of the removed", patched(good, place(ALIVE), "=B", 0)
    yield "string offset", patched(good, place(CUTS), "=Q", 1)
    yield "string offsets decrease", patched(good, place(CUTS) + 8, "=Q", 1 << 33)
    yield "empty bus name", patched(good, place(CUTS) + 8, "=Q", 0)
    yield (
        "bus names alike",
        patched(patched(good, place(CUTS) + 16, "=Q", 6), place(STRINGS), "=6s", b"pcipci"),
    )
    yield "column offsets", patched(good, place(COLUMN_OFFSETS) + 16, "=Q", 1 << 20)
    yield "last column offset", patched(good, place(COLUMN_OFFSETS) + 40, "=Q", 9)


@pytest.mark.parametrize(
    ("rule", "content"), [pytest.param(*bad, id=bad[0]) for bad in bad_contents()]
)
def test_from_memfd_of_bad_content_is_handover_error(rule, content):
    """No rule of the format may be broken."""
    fd = sealed(content)

    with pytest.raises(HandoverError):
        DeviceTree.from_memfd(fd)
    os.close(fd)


def test_from_memfd_with_two_devices_of_one_path_is_found_by_the_index():
    """Duplicates come to light when the index is built, and raise HandoverError each time."""
    good = contents(sample())
    start = section_at(good, NAMES)[1]
    at = good.index(b"0000:01:00.1", start)
    fd = sealed(good[:at] + b"0000:01:00.0" + good[at + 12 :])
    tree = DeviceTree.from_memfd(fd)
    os.close(fd)

    for _ in range(2):
        with pytest.raises(HandoverError, match="row 3"):
            tree.index()
    with pytest.raises(HandoverError):
        tree["serial8250"]


# ---- threads ---------------------------------------------------------------------------------


def test_table_used_by_several_threads_stays_whole():
    """Readers without the GIL see whole devices while another thread adds and removes."""
    tree = DeviceTree()
    tree.add_many(("d", 0, 1000), state=b"abcd")
    stop = threading.Event()
    errors = []

    def read():
        try:
            while not stop.is_set():
                rows = np.arange(tree.nr_rows, dtype=np.int32)
                data, offsets = tree.paths(rows)
                found = tree.find_paths(data, offsets)
                if not np.array_equal(found[:1000], rows[:1000]):
                    raise AssertionError(found)
                tree.gather("state", rows[:1000])
                tree.match("*9")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(60):
        rows = tree.add_many((f"e{i}-", 0, 200), state=b"abcd")
        tree.remove(rows[i])
    stop.set()
    for thread in threads:
        thread.join()

    assert errors == []
    assert len(tree) == 1000 + 60 * 199


# ---- machine ---------------------------------------------------------------------------------


class Memory:
    """As much of physical memory as a machine needs."""

    size = 1 << 30

    def clone(self):
        return Memory()


def test_machine_holds_memory_and_devices():
    """A machine is its memory and its devices."""
    memory, tree = Memory(), sample()
    machine = Machine(memory, tree)

    assert machine.memory is memory
    assert machine.devices is tree
    assert len(Machine(memory).devices) == 0
    assert repr(machine) == "<Machine of 0x40000000 bytes and 5 devices>"


def test_machine_clone_has_its_own_memory_and_equal_devices():
    """A clone shares nothing, and its devices have the same indices."""
    machine = Machine(Memory(), sample())
    clone = machine.clone()
    machine.devices.remove(4)

    assert clone.memory is not machine.memory
    assert len(clone.devices) == 5
    assert clone.devices["serial8250"] == 4
    assert clone.devices.readonly


def test_machine_of_a_size_makes_its_memory():
    """A size stands for memory of that size, which a clone copies."""
    pytest.importorskip("luo.memory")
    machine = Machine("64MiB", sample())
    machine.memory.view(0x10000, 4)[:] = b"luo!"
    clone = machine.clone()

    assert machine.memory.size == 64 << 20
    assert bytes(clone.memory.view(0x10000, 4)) == b"luo!"
    assert Machine(64 << 20).memory.size == 64 << 20
