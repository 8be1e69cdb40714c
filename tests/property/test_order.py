"""Random forests of devices against plain definitions."""

import contextlib
import fcntl
import fnmatch
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luo._kho import DeviceTable
from luo.errors import HandoverError
from luo.machine import DeviceTree

bounded = settings(deadline=None, max_examples=150)


@st.composite
def forests(draw, max_size=40):
    """Parents and names of a forest, as lists."""
    size = draw(st.integers(0, max_size))
    shape = draw(st.sampled_from(["any", "deep", "flat"]))
    parents = []
    for row in range(size):
        low = {"any": -1, "deep": max(row - 3, -1), "flat": -1}[shape]
        high = {"any": row - 1, "deep": row - 1, "flat": min(row - 1, 3)}[shape]
        parents.append(draw(st.integers(low, high)))
    stem = draw(st.lists(st.sampled_from(["a", "ä", "0000:", "\udcff", "x" * 20]), min_size=1))
    return parents, [f"{stem[row % len(stem)]}{row:x}" for row in range(size)]


def grow(parents, names, hash_bits=64, **columns):
    tree = DeviceTree()
    tree._table = DeviceTable(hash_bits=hash_bits)
    tree.add_many(names, np.array(parents, np.int32), **columns)
    return tree


def plain_paths(parents, names):
    paths = []
    for parent, name in zip(parents, names, strict=True):
        paths.append(name if parent < 0 else f"{paths[parent]}/{name}")
    return paths


def plain_order(parents, requested, group=None):
    """RFC v1, 1.10: requested devices in order, each then its ancestors; stable by depth."""

    def depth(row):
        return 0 if row < 0 else 1 + depth(parents[row])

    listed = []
    for row in requested:
        while row >= 0 and row not in listed:
            listed.append(row)
            row = parents[row]
    listed.sort(key=depth, reverse=True)
    if group is not None:
        # At the place of the first of one's group and depth; sorting is stable.
        first = [
            next(
                at
                for at, other in enumerate(listed)
                if other == row
                or (group[row] >= 0 and group[other] == group[row] and depth(other) == depth(row))
            )
            for row in listed
        ]
        listed = [row for _, row in sorted(zip(first, listed, strict=True), key=lambda x: x[0])]
    return listed


@bounded
@given(forests(), st.data())
def test_preserve_order_equals_the_plain_definition(forest, data):
    """The order is RFC v1's, without groups and with them."""
    parents, names = forest
    tree = grow(parents, names)
    flags = data.draw(st.lists(st.booleans(), min_size=len(parents), max_size=len(parents)))
    group = data.draw(
        st.lists(st.sampled_from([-1, 0, 1, 5, 2**31 - 1]), min_size=len(parents),
                 max_size=len(parents))
    )  # fmt: skip
    requested = [row for row, flag in enumerate(flags) if flag]
    mask = np.array(flags, bool)

    assert tree.preserve_order(mask).tolist() == plain_order(parents, requested)
    assert tree.preserve_order(mask, np.array(group, np.int32)).tolist() == plain_order(
        parents, requested, group
    )


@bounded
@given(forests(), st.data())
def test_preserve_order_leaves_out_removed_devices(forest, data):
    """Flags of removed devices do not count."""
    parents, names = forest
    tree = grow(parents, names)
    for _ in range(data.draw(st.integers(0, 3))):
        if len(tree):
            tree.remove(data.draw(st.sampled_from(list(tree))))
    mask = np.ones(len(parents), bool)

    assert tree.preserve_order(mask).tolist() == plain_order(parents, list(tree))


@bounded
@given(forests(), st.data())
def test_eligible_equals_a_plain_walk(forest, data):
    """A device may be requested if on the way to the root each driver and bus passes."""
    parents, names = forest
    size = len(parents)
    maybe = st.sampled_from([None, "a", "b", "c"])
    drivers = data.draw(st.lists(maybe, min_size=size, max_size=size))
    buses = data.draw(st.lists(maybe, min_size=size, max_size=size))
    good = data.draw(st.sets(st.sampled_from(["a", "b", "c"])))
    tree = grow(parents, names, buses=buses, drivers=drivers)

    def passes(row):
        while row >= 0:
            if not {drivers[row], buses[row]} <= good | {None}:
                return False
            row = parents[row]
        return True

    eligible = tree.eligible(
        np.array([name in good for name in tree.driver_names], bool),
        np.array([name in good for name in tree.bus_names], bool),
    )
    assert eligible.tolist() == [passes(row) for row in range(size)]


@bounded
@given(forests(), st.sampled_from([1, 3, 34, 64]), st.data())
def test_paths_are_found_again(forest, hash_bits, data):
    """Every path leads back to its device, whatever the hints and however hashes collide."""
    parents, names = forest
    tree = grow(parents, names, hash_bits)
    paths = plain_paths(parents, names)
    rows = data.draw(st.lists(st.sampled_from(range(len(names))), max_size=40)) if names else []
    hints = data.draw(st.lists(st.integers(-2, 45), min_size=len(rows), max_size=len(rows)))

    text, offsets = tree.paths(np.array(rows, np.int32))
    assert bytes(text) == "".join(paths[row] for row in rows).encode("utf-8", "surrogateescape")
    assert tree.find_paths(text, offsets).tolist() == rows
    assert tree.find_paths(text, offsets, np.array(hints, np.int32)).tolist() == rows
    assert tree.find_paths(text, offsets, np.array(rows, np.int32)).tolist() == rows
    wrong = data.draw(st.lists(st.text("a0x:/ä", max_size=6), max_size=10))
    assert [tree._table.find(path) for path in wrong] == [
        paths.index(path) if path in paths else -1 for path in wrong
    ]


@bounded
@given(st.sampled_from([1, 2, 5, 64]), st.data())
def test_adding_and_removing_equals_a_dictionary(hash_bits, data):
    """After any calls the tree has the devices that a dictionary of paths has."""
    tree = DeviceTree()
    tree._table = DeviceTable(hash_bits=hash_bits)
    model = {}
    rows = 0
    for _ in range(data.draw(st.integers(0, 25))):
        if model and data.draw(st.integers(0, 3)) == 0:
            gone = data.draw(st.sampled_from(sorted(model)))
            below = [path for path in model if path == gone or path.startswith(gone + "/")]
            assert tree.remove(gone) == len(below)
            for path in below:
                del model[path]
            continue
        known = [*sorted(model)]
        batch = {}
        names, parents = [], []
        ok = True
        for at in range(data.draw(st.integers(1, 4))):
            above = data.draw(st.sampled_from(["", *known, *batch]))
            name = data.draw(st.sampled_from("abcdef"))
            path = f"{above}/{name}" if above else name
            ok = ok and path not in model and path not in batch
            names.append(name)
            parents.append({**model, **batch}.get(above, -1))
            batch.setdefault(path, rows + at)
        if ok:
            assert tree.add_many(names, np.array(parents, np.int32)) == range(
                rows, rows + len(names)
            )
            rows += len(names)
            model |= batch
        else:
            with pytest.raises(ValueError):
                tree.add_many(names, np.array(parents, np.int32))

    assert {tree.path(row): row for row in tree} == model
    assert {path: tree[path] for path in model} == model
    assert len(tree) == len(model)
    assert tree.nr_rows == rows


@bounded
@given(
    st.lists(st.text("ab/-]ä\udcff!\n", min_size=1, max_size=8), max_size=8),
    st.text("ab*?[]!-/ä\udcff\\^\n", max_size=10),
)
def test_match_equals_fnmatch(paths, pattern):
    """A glob means what fnmatch.fnmatchcase() says."""
    tree = DeviceTree()
    for path in paths:
        above = None
        for end in [at for at, char in enumerate(path + "/") if char == "/"]:
            part = path[:end]
            if part in tree:
                above = tree[part]
            else:
                name = part.rsplit("/", 1)[-1]
                if not name:
                    break
                above = tree.add(name, above)

    expected = [fnmatch.fnmatchcase(tree.path(row), pattern) for row in tree]
    assert tree.match(pattern).tolist() == expected


def reload(content):
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
        return DeviceTree.from_memfd(fd)
    finally:
        os.close(fd)


def use(tree):
    """Every call that reads what the table holds."""
    rows = np.arange(tree.nr_rows, dtype=np.int32)
    text, offsets = tree.paths(rows)
    tree.find_paths(text, offsets, rows)
    tree.match("*a?")
    tree.preserve_order(np.ones(len(rows), bool), rows % 3)
    tree.eligible(np.ones(len(tree.driver_names), bool), np.ones(len(tree.bus_names), bool))
    for name in tree.column_names:
        tree.column(name)[0].sum()
        for row in rows:
            tree.gather(name, [row])
    tree.index()


@bounded
@given(forests(12), st.data())
def test_from_memfd_of_changed_bytes_is_refused_or_safe(forest, data):
    """Bytes changed at random give HandoverError, or a tree that can be used."""
    parents, names = forest
    tree = grow(parents, names, buses="b", drivers="d", state=[b"s" * (i % 4) for i in parents])
    fd = tree.to_memfd()
    content = bytearray(os.pread(fd, os.fstat(fd).st_size, 0))
    os.close(fd)
    use(reload(content))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from([0, 1, 2, 0x2F, 0x7F, 0x80, 0xFF]))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]

    with contextlib.suppress(HandoverError):
        use(reload(content))
