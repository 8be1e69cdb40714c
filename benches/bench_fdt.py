"""Device trees: writing many nodes, reading them back, looking them up.

A node of the shape ``fixed`` has 184 bytes: its name, and five properties of 8, 8, 8, 16 and 64
bytes, different in every node. ``ragged`` is shaped like a device record: strings of any length,
some of them absent.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peers
import pytest
from conftest import Plan
from race import Contender, Results

from luo.fdt import Column, Fdt, FdtWriter

SEED = 1
WIDTHS = {"id": 8, "phys": 8, "size": 8, "reg": 16, "state": 64}
RAGGED = {"path": (20, 60), "bus": (4, 8), "driver": (4, 12), "state": (32, 32), "index": (8, 8)}
ABSENT = {"bus": 0.2, "driver": 0.2}
OBJECTS_MOST = 2_000  # more nodes take the package fdt minutes

entries = pytest.mark.entries


class Nodes:
    """Nodes of one shape, as columns: for C, for luo, and one by one."""

    def __init__(self, n: int, shape: str) -> None:
        rng = np.random.default_rng(SEED)
        self.n = n
        names = [f"dev{i}\0".encode() for i in range(n)]
        self.columns = peers.Columns(_ragged(np.array([len(name) for name in names]), names))
        self.luo: dict[str, Any] = {}
        for name in WIDTHS if shape == "fixed" else RAGGED:
            if shape == "fixed":
                width = WIDTHS[name]
                values = rng.integers(0, 256, (n, width), dtype=np.uint8)
                offsets = np.arange(n + 1, dtype=np.uint64) * np.uint64(width)
                self.luo[name] = values
                present = None
                data = values.reshape(-1)
            else:
                low, high = RAGGED[name]
                present = rng.random(n) >= ABSENT.get(name, 0)
                data, offsets = _ragged(rng.integers(low, high, n, endpoint=True) * present)
                data[:] = rng.integers(1, 256, len(data), dtype=np.uint8)
                self.luo[name] = Column(data, offsets, present)
            self.columns.properties[name] = (data, offsets, present)
        self.room = self.columns.nbytes + n * 100 + 4096

    def check(self, tree: bytes | bytearray | memoryview | np.ndarray) -> None:
        """Check that a tree reads back as these columns."""
        found = columns_read(Fdt(tree).read_nodes("/", list(self.columns.properties)))
        assert found.same_as(self.columns)


def _ragged(sizes: np.ndarray, rows: Sequence[bytes] = ()) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(sizes) + 1, np.uint64)
    np.cumsum(sizes, out=offsets[1:])
    data = np.empty(int(offsets[-1]), np.uint8)
    if rows:
        data[:] = np.frombuffer(b"".join(rows), np.uint8)
    return data, offsets


def columns_read(read: dict[str, Column]) -> peers.Columns:
    """Return what ``read_nodes()`` gave in the form of the peers, names with their NUL."""
    name = read.pop("name")
    rows = [f"{one}\0".encode() for one in name.strings()]
    return peers.Columns(
        _ragged(np.array([len(row) for row in rows]), rows),
        {k: (c.data, c.offsets, c.present.view(np.uint8)) for k, c in read.items()},
    )


# ---- writing ----


def luo_columns(nodes: Nodes, into: np.ndarray) -> memoryview:
    writer = FdtWriter(into=into)
    with writer.node(""):
        writer.add_nodes(("dev", 0, nodes.n), nodes.luo)
    return writer.finish()


def write(plan: Plan, size: tuple[int, str]) -> Results:
    """From columns: luo and libfdt into buffers of theirs; the floor is a copy of the bytes."""
    nodes = Nodes(*size)
    libfdt, absent = peers.adapter("libfdt")
    own, theirs, copied = (peers.touched(nodes.room) for _ in range(3))
    made = bytes(luo_columns(nodes, own))
    tree = np.frombuffer(made, np.uint8)

    def check_libfdt(nbytes: int) -> None:
        assert theirs[:nbytes].tobytes() == made

    return plan.race(
        [
            Contender("luo", lambda: luo_columns(nodes, own), check=nodes.check),
            Contender(
                "libfdt",
                lambda: libfdt.write(nodes.columns, theirs),
                check=check_libfdt,
                absent=absent,
            ),
            Contender("memcpy", lambda: np.copyto(copied[: len(tree)], tree)),
        ],
        items=nodes.n,
        bytes=len(made),
        shape=size[1],
        seed=SEED,
    )


@entries(
    "fdt.write",
    ["luo", "libfdt", "memcpy"],
    smoke=[(1_000, "fixed"), (1_000, "ragged")],
    quick=[(100_000, "fixed"), (100_000, "ragged")],
    full=[(1_000_000, "fixed"), (1_000_000, "ragged")],
)
def bench_fdt_write(replay: Callable[..., None], size: tuple[int, str]) -> None:
    """Write siblings from columns into a given buffer."""
    replay(write, size)


def calls(plan: Plan, n: int) -> Results:
    """With a Python call a node and property; the package fdt where there are few nodes."""
    nodes = Nodes(n, "fixed")
    rows = list(nodes.columns.rows())
    tables = [(name, dict(properties)) for name, properties in rows]
    own, theirs = (peers.touched(nodes.room) for _ in range(2))
    libfdt, no_libfdt = peers.adapter("libfdt")
    pylibfdt, no_pylibfdt = peers.adapter("pylibfdt")
    objects, no_objects = peers.adapter("fdt")

    def by_call() -> memoryview:
        writer = FdtWriter(into=own)
        begin, prop, end = writer.begin_node, writer.property, writer.end_node
        begin("")
        for name, properties in rows:
            begin(name)
            for key, value in properties:
                prop(key, value)
            end()
        end()
        return writer.finish()

    def by_node() -> memoryview:
        writer = FdtWriter(into=own)
        add = writer.add_node
        with writer.node(""):
            for name, properties in tables:
                add(name, properties)
        return writer.finish()

    def check_libfdt(nbytes: int) -> None:
        assert theirs[:nbytes].tobytes() == bytes(by_call())

    return plan.race(
        [
            Contender("luo", by_call, check=nodes.check),
            Contender("luo add_node", by_node, check=nodes.check),
            Contender(
                "libfdt",
                lambda: libfdt.write(nodes.columns, theirs),
                check=check_libfdt,
                absent=no_libfdt,
            ),
            Contender(
                "pylibfdt",
                lambda: pylibfdt.write(rows, nodes.room),
                check=nodes.check,
                absent=no_pylibfdt,
            ),
            Contender(
                "fdt",
                lambda: objects.write(rows),
                check=nodes.check,
                absent=no_objects
                or ("" if n <= OBJECTS_MOST else f"fdt: only to {OBJECTS_MOST:,} nodes"),
            ),
        ],
        seconds=15.0 if n <= OBJECTS_MOST else 40.0,
        items=n,
        bytes=len(by_call()),
        shape="fixed",
        seed=SEED,
    )


@entries(
    "fdt.calls",
    ["luo", "luo add_node", "libfdt", "pylibfdt", "fdt"],
    smoke=[500],
    quick=[2_000, 50_000],
    full=[2_000, 1_000_000],
)
def bench_fdt_calls(replay: Callable[..., None], size: int) -> None:
    """Write siblings one by one: a call a node and property, or a call a node."""
    replay(calls, size)


# ---- reading ----


def read(plan: Plan, size: tuple[int, str]) -> Results:
    """Into columns that are given and were touched before, on either side."""
    nodes = Nodes(*size)
    tree = peers.touched(nodes.room)
    nbytes = len(luo_columns(nodes, tree))
    tree = tree[:nbytes]
    libfdt, absent = peers.adapter("libfdt")
    names = list(nodes.columns.properties)
    into = peers.Columns.room(
        nodes.n,
        len(nodes.columns.names[0]),
        {name: len(nodes.columns.properties[name][0]) for name in names},
    )

    out = Fdt(tree).read_nodes("/")

    def check_luo(made: dict[str, Column]) -> None:
        assert columns_read(made).same_as(nodes.columns)

    def check(count: int) -> None:
        assert count == nodes.n
        assert into.same_as(nodes.columns)
        for data, offsets, present in into.properties.values():
            data[:], offsets[:], present[:] = 0, 0, 0  # for the next one to fill

    return plan.race(
        [
            Contender("luo", lambda: Fdt(tree).read_nodes("/", out=out), check=check_luo),
            Contender("luo, new arrays", lambda: Fdt(tree).read_nodes("/"), check=check_luo),
            Contender("libfdt", lambda: libfdt.read_nodes(tree, into), check=check, absent=absent),
            Contender(
                "libfdt, by tags",
                lambda: libfdt.read_tags(tree, into),
                check=check,
                absent=absent,
            ),
        ],
        items=nodes.n,
        bytes=nbytes,
        shape=size[1],
        seed=SEED,
    )


@entries(
    "fdt.read",
    ["luo", "luo, new arrays", "libfdt", "libfdt, by tags"],
    smoke=[(1_000, "fixed"), (1_000, "ragged")],
    quick=[(100_000, "fixed"), (100_000, "ragged")],
    full=[(1_000_000, "fixed"), (1_000_000, "ragged")],
)
def bench_fdt_read(replay: Callable[..., None], size: tuple[int, str]) -> None:
    """Read all children of a node into columns, structure checked."""
    replay(read, size)


# ---- looking up ----


def lookup(plan: Plan, n: int) -> dict[str, Results]:
    """Single names, from all over the node; and what the index costs."""
    nodes = Nodes(n, "fixed")
    tree = peers.touched(nodes.room)
    tree = tree[: len(luo_columns(nodes, tree))]
    children = Fdt(tree).root.children
    offsets = {child.name: child.offset for child in children}
    every = list(offsets)
    asked = random.Random(SEED).sample(every, min(n, 100_000))
    _ = children[every[-1]]  # builds the index

    def check(_: Any) -> None:
        assert all(children[name].offset == offsets[name] for name in asked)
        assert "nobody" not in children

    def bare() -> None:
        for _ in asked:
            pass

    def ours() -> None:
        for name in asked:
            _ = children[name]

    def theirs() -> None:
        for name in asked:
            _ = offsets[name]

    found = plan.race(
        [
            Contender("luo", ours, check=check),
            Contender("dict", theirs),
            Contender("bare loop", bare),
        ],
        items=len(asked),
        bytes=len(tree),
        among=n,
        less="bare loop",
        seed=SEED,
    )
    values = list(offsets.values())
    index = plan.race(
        [
            Contender(
                "luo",
                lambda fresh: fresh[every[-1]],
                lambda: Fdt(tree, check=False).root.children,
            ),
            Contender("dict", lambda: dict(zip(every, values, strict=True))),
        ],
        items=n,
        bytes=len(tree),
        seed=SEED,
    )
    return {"fdt.lookup": found, "fdt.index": index}


SIZES = {"smoke": [1_000], "quick": [100_000], "full": [1_000_000]}


@entries("fdt.lookup", ["luo", "dict", "bare loop"], **SIZES)
def bench_fdt_lookup(replay: Callable[..., None], size: int) -> None:
    """Look up single children by name, the bare loop subtracted from both."""
    replay(lookup, size)


@entries("fdt.index", ["luo", "dict"], **SIZES)
def bench_fdt_index(replay: Callable[..., None], size: int) -> None:
    """Build the index that the first look-up builds; a dict from strings that are there."""
    replay(lookup, size)
