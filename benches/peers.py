"""The one table of peers: what each needs, how it does the work, which version it is.

A peer that is not there raises :class:`AbsentError` with its line of ``README.md``, and whoever
asked for it is skipped with that line. Baselines in C are compiled when they are first asked for,
with ``cc -O2``, into ``build/``.
"""

import array
import ctypes
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import luo

__all__ = ["PEERS", "AbsentError", "Columns", "adapter", "find", "touched"]

HERE = Path(__file__).parent
BUILD = HERE / "build"
CC = os.environ.get("CC", "cc")
FLAGS = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]


class AbsentError(Exception):
    """A peer cannot run here; the text is its line of ``README.md``."""


@dataclass(frozen=True)
class Peer:
    """A row of the table.

    Args:
        name: as in entries and tables.
        needs: what must be installed; ends in how.
        load: makes the adapter; may raise ImportError, OSError or CalledProcessError.
        version: of the adapter.
    """

    name: str
    needs: str
    load: Callable[[], Any]
    version: Callable[[], str]

    @property
    def line(self) -> str:
        """Its line of ``README.md``, which is the reason of a skip."""
        return f"{self.name}: {self.needs}"


@cache
def _try(name: str) -> Any:
    try:
        return PEERS[name].load()
    except (ImportError, OSError, subprocess.CalledProcessError):
        return AbsentError(PEERS[name].line)


def find(name: str) -> Any:
    """Return the adapter of a peer.

    Raises:
        AbsentError: it is not there.
    """
    found = _try(name)
    if isinstance(found, AbsentError):
        raise found
    return found


def adapter(name: str) -> tuple[Any, str]:
    """Return a peer's adapter, or None and why it is absent."""
    found = _try(name)
    return (None, str(found)) if isinstance(found, AbsentError) else (found, "")


def touched(nbytes: int) -> np.ndarray:
    """Return a zeroed buffer whose pages are there, for whoever must not meet them first."""
    buffer = np.empty(nbytes, np.uint8)
    buffer.fill(0)
    return buffer


# ---- columns, as C sees them ----


class _CColumn(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("present", ctypes.c_void_p),
    ]


@dataclass
class Columns:
    """Names and property values of many nodes.

    Args:
        names: data and offsets (n + 1, uint64) of the names, each with its NUL.
        properties: data, offsets and presence (or None: all) by the property's name.
    """

    names: tuple[np.ndarray, np.ndarray]
    properties: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]] = field(
        default_factory=dict
    )

    def __len__(self) -> int:
        return len(self.names[1]) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all names and values."""
        return len(self.names[0]) + sum(len(data) for data, _, _ in self.properties.values())

    @classmethod
    def room(cls, rows: int, names: int, properties: dict[str, int]) -> "Columns":
        """Return columns to be filled: of *rows* rows, with room for so many bytes each."""
        offsets = [np.zeros(rows + 1, np.uint64) for _ in range(len(properties) + 1)]
        return cls(
            (touched(names), offsets.pop()),
            {
                name: (touched(nbytes), offsets.pop(), touched(rows))
                for name, nbytes in properties.items()
            },
        )

    def to_c(self) -> tuple[Any, Any, int]:
        """Return what the functions of ``libfdt.c`` take: names, columns, how many columns.

        Valid as long as this object is.
        """
        names = _CColumn(b"", *(part.ctypes.data for part in self.names), None)
        columns = (_CColumn * len(self.properties))(
            *(
                _CColumn(
                    name.encode(),
                    data.ctypes.data,
                    offsets.ctypes.data,
                    None if present is None else present.ctypes.data,
                )
                for name, (data, offsets, present) in self.properties.items()
            )
        )
        return ctypes.byref(names), columns, len(self.properties)

    def same_as(self, other: "Columns") -> bool:
        """Tell whether *other* has the same names, properties and values in every row."""
        if list(self.properties) != list(other.properties) or len(self) != len(other):
            return False
        pairs = [(self.names, other.names)]
        for name, (data, offsets, present) in self.properties.items():
            its_data, its_offsets, its_present = other.properties[name]
            here, there = (
                np.ones(len(self), np.bool_) if one is None else one.astype(np.bool_)
                for one in (present, its_present)
            )
            if not np.array_equal(here, there):
                return False
            pairs.append(((data, offsets), (its_data, its_offsets)))
        return all(
            np.array_equal(offsets, its_offsets)
            and np.array_equal(data[: int(offsets[-1])], its_data[: int(offsets[-1])])
            for (data, offsets), (its_data, its_offsets) in pairs
        )

    def rows(self) -> Iterable[tuple[str, list[tuple[str, bytes]]]]:
        """Yield (name, [(property, value), ...]) of each node."""
        for i in range(len(self)):
            yield (
                _row(*self.names, i)[:-1].decode(),
                [
                    (name, _row(data, offsets, i))
                    for name, (data, offsets, present) in self.properties.items()
                    if present is None or present[i]
                ],
            )


def _row(data: np.ndarray, offsets: np.ndarray, i: int) -> bytes:
    return data[int(offsets[i]) : int(offsets[i + 1])].tobytes()


# ---- C ----


def compiled(source: str, *libraries: str, include: str = "") -> ctypes.CDLL:
    """Compile ``baselines/<source>`` unless that is done, and load it.

    Raises:
        CalledProcessError: the compiler refuses, as for want of a header.
        OSError: there is no compiler.
    """
    BUILD.mkdir(exist_ok=True)
    made = BUILD / f"{Path(source).stem}.so"
    origin = HERE / "baselines" / source
    if not made.exists() or made.stat().st_mtime < origin.stat().st_mtime:
        flags = [*FLAGS, *([f"-I{include}"] if include else [])]
        fresh = made.with_suffix(f".{os.getpid()}")  # others may be loading the one that is there
        subprocess.run(
            [CC, *flags, str(origin), "-o", str(fresh), *(f"-l{lib}" for lib in libraries)],
            check=True,
            capture_output=True,
        )
        fresh.replace(made)
    return ctypes.CDLL(str(made))


@cache
def compiler() -> str:
    """Return the first line that the compiler says of itself."""
    said = subprocess.run([CC, "--version"], check=True, capture_output=True, text=True).stdout
    return f"{said.splitlines()[0]}, {' '.join(FLAGS)}"


def _pointer(value: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(value.ctypes.data)


class LibFdt:
    """libfdt in C, called from C (``baselines/libfdt.c``)."""

    def __init__(self) -> None:
        self._c = compiled("libfdt.c", "fdt")
        self._c.write_columns.restype = ctypes.c_int64
        self._c.read_nodes.restype = self._c.read_tags.restype = ctypes.c_int64

    def write(self, columns: Columns, into: np.ndarray, compatible: str | None = None) -> int:
        """Write a tree of one level into *into*; returns its bytes."""
        nbytes = self._c.write_columns(
            _pointer(into),
            ctypes.c_int(min(len(into), 2**31 - 1)),
            None if compatible is None else compatible.encode(),
            *columns.to_c(),
            ctypes.c_uint64(len(columns)),
        )
        return _positive(nbytes)

    def read_nodes(self, tree: np.ndarray, into: Columns) -> int:
        """Read the root's children into columns with loops over nodes and properties."""
        return _positive(self._c.read_nodes(_pointer(tree), *into.to_c()))

    def read_tags(self, tree: np.ndarray, into: Columns) -> int:
        """The same in one pass over the tags; which is the faster one."""
        return _positive(self._c.read_tags(_pointer(tree), *into.to_c()))


def _positive(result: int) -> int:
    if result < 0:
        raise RuntimeError(f"libfdt: error {result}")
    return result


class _CTree(ctypes.Structure):
    _fields_ = [
        ("arena", ctypes.c_void_p),
        ("room", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("root", ctypes.c_uint64),
    ]


class Tree:
    """A radix tree of the C walk, in an arena of its own."""

    def __init__(self, pages: int) -> None:
        self.arena = touched(pages * 4096)
        self.c = _CTree(self.arena.ctypes.data, self.arena.nbytes, 0, 0)

    def clear(self) -> None:
        """Make it empty, with its arena zeroed as before."""
        self.arena[: self.c.used] = 0
        self.c.used = self.c.root = 0


class Walk:
    """The map in plain C (``baselines/walk.c``)."""

    def __init__(self) -> None:
        self._c = compiled("walk.c")
        self._c.walk_decode.restype = self._c.chunks_publish.restype = ctypes.c_uint64

    def preserve(self, tree: Tree, phys: np.ndarray, order: int = 0) -> None:
        """Preserve blocks, one walk from the root each."""
        rc = self._c.walk_preserve(
            ctypes.byref(tree.c), _pointer(phys), ctypes.c_uint64(len(phys)), order
        )
        if rc:
            raise RuntimeError("walk_preserve: the arena is full")

    def decode(self, tree: Tree, phys: np.ndarray, orders: np.ndarray) -> int:
        """Read the blocks into arrays, with a callback for each; returns how many."""
        found: int = self._c.walk_decode(
            _pointer(tree.arena), ctypes.c_uint64(tree.c.root), _pointer(phys), _pointer(orders)
        )
        return found

    def publish(
        self, arena: np.ndarray, phys: int, order: int, first: np.ndarray, bitmaps: np.ndarray
    ) -> int:
        """Write the chunks that name bitmaps of one order; returns how many chunks."""
        chunks: int = self._c.chunks_publish(
            _pointer(arena),
            ctypes.c_uint64(phys),
            order,
            _pointer(first),
            _pointer(bitmaps),
            ctypes.c_uint64(len(first)),
        )
        return chunks


class NativeDriver:
    """Callbacks in C, and a bare clock read (``baselines/drivers.c``)."""

    def __init__(self) -> None:
        self._c = compiled("drivers.c", include=luo.get_include())
        self._c.clock_reads.restype = ctypes.c_int64
        self.state = (ctypes.c_uint8 * 64).in_dll(self._c, "state")
        self.patch = (ctypes.c_uint8 * 8).in_dll(self._c, "patch")

    def callback(self, name: str, ctx: int = 0) -> Any:
        """Return ``driver_<name>`` as a native callback."""
        return luo.native(getattr(self._c, f"driver_{name}"), ctx, self._c)

    def clock_reads(self, n: int) -> int:
        """Read the monotonic clock n times; returns the nanoseconds from the first to the last."""
        took: int = self._c.clock_reads(ctypes.c_uint64(n))
        return took


# ---- Python's ----


class PyLibFdt:
    """libfdt with its own Python binding: a call a node, a call a property."""

    def __init__(self) -> None:
        self._lib = importlib.import_module("libfdt")

    def write(self, nodes: list[tuple[str, list[tuple[str, bytes]]]], room: int) -> bytearray:
        """Write a tree of one level; returns it, with the rest of the room behind it."""
        writer = self._lib.FdtSw(room)  # or it copies the tree whenever it has to grow
        begin, add, end = writer.begin_node, writer.property, writer.end_node
        writer.finish_reservemap()
        begin("")
        for name, properties in nodes:
            begin(name)
            for prop, value in properties:
                add(prop, value)
            end()
        end()
        made: bytearray = writer._fdt
        self._lib.fdt_finish(made)  # as_fdt() would copy it first
        return made


class PyFdt:
    """The package ``fdt``: objects first, bytes at the end."""

    def __init__(self) -> None:
        self._fdt = importlib.import_module("fdt")

    def write(self, nodes: list[tuple[str, list[tuple[str, bytes]]]]) -> bytes:
        """Write a tree of one level; returns it."""
        tree = self._fdt.FDT()
        for name, properties in nodes:
            node = self._fdt.Node(name)
            for prop, value in properties:
                node.append(self._fdt.PropBytes(prop, data=value))
            tree.root.append(node)
        return bytes(tree.to_dtb(17))

    def read(self, tree: bytes) -> list[tuple[str, list[tuple[str, bytes]]]]:
        """Read one back."""
        parsed = self._fdt.parse_dtb(tree)
        return [
            (node.name, [(prop.name, bytes(prop.data)) for prop in node.props])
            for node in parsed.root.nodes
        ]


class CRoaring:
    """Compressed bitmaps, from page numbers that fit 32 bits."""

    def __init__(self) -> None:
        self._lib = importlib.import_module("pyroaring")

    @staticmethod
    def numbers(pfns: np.ndarray) -> "array.array[int]":
        """Return page numbers in the form that ``BitMap`` takes fastest: four times numpy's."""
        made = array.array("I")
        made.frombytes(pfns.astype(np.uint32).tobytes())
        return made

    def preserve(self, numbers: "array.array[int]") -> Any:
        """Return the set of them."""
        return self._lib.BitMap(numbers)

    @staticmethod
    def decode(bitmap: Any) -> "array.array[int]":
        """Return the numbers of a set, ascending."""
        return bitmap.to_array()


class Numpy:
    """A bitmap over all page numbers, as one would write it with numpy."""

    @staticmethod
    def preserve(bitmap: np.ndarray, pfns: np.ndarray) -> None:
        """Set the bits of *pfns*."""
        np.bitwise_or.at(bitmap, pfns >> 3, np.uint8(1) << (pfns & 7).astype(np.uint8))

    @staticmethod
    def decode(bitmap: np.ndarray) -> np.ndarray:
        """Return the numbers of the bits that are set."""
        return np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))


class EmptyCall:
    """A Cython method that does nothing (``baselines/empty.pyx``), built as the core is."""

    def __init__(self) -> None:
        importlib.import_module("Cython")
        BUILD.mkdir(exist_ok=True)
        source = HERE / "baselines" / "empty.pyx"
        name = "bench_empty_call"
        made = BUILD / f"{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        if not made.exists() or made.stat().st_mtime < source.stat().st_mtime:
            generated = BUILD / f"{name}.c"
            subprocess.run(
                [sys.executable, "-P", "-m", "cython", "-3", "-X", "binding=True",
                 "--module-name", name, str(source), "-o", str(generated)],
                check=True, capture_output=True,
            )  # fmt: skip
            include = sysconfig.get_path("include")
            subprocess.run(
                [CC, "-O3", "-shared", "-fPIC", f"-I{include}", str(generated), "-o", str(made)],
                check=True, capture_output=True,
            )  # fmt: skip
        spec = importlib.util.spec_from_file_location(name, made)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.make = module.Empty


def _distribution(name: str) -> Callable[[], str]:
    return lambda: f"{name} {importlib.metadata.version(name)}"


def _debian(package: str) -> Callable[[], str]:
    @cache
    def version() -> str:
        query = ["dpkg-query", "-W", "-f=${Version}", package]
        try:
            found = subprocess.run(query, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            found = "of unknown version"
        return f"{package} {found}; {compiler()}"

    return version


def _croaring() -> str:
    lib = importlib.import_module("pyroaring")
    return f"pyroaring {lib.__version__} with CRoaring {lib.__croaring_version__}"


PEERS = {
    peer.name: peer
    for peer in (
        Peer("libfdt", "gcc and libfdt (Debian: gcc libfdt-dev)", LibFdt, _debian("libfdt-dev")),
        Peer("walk", "a C compiler (Debian: gcc)", Walk, compiler),
        Peer("native", "a C compiler (Debian: gcc)", NativeDriver, compiler),
        Peer("pylibfdt", "pylibfdt (PyPI: pylibfdt)", PyLibFdt, _distribution("pylibfdt")),
        Peer("fdt", "the package fdt (PyPI: fdt)", PyFdt, _distribution("fdt")),
        Peer("croaring", "pyroaring (PyPI: pyroaring)", CRoaring, _croaring),
        Peer("numpy", "numpy, which luo needs itself (PyPI: numpy)", Numpy, _distribution("numpy")),
        Peer(
            "empty call",
            "Cython, a C compiler and Python's headers (PyPI: Cython; Debian: gcc python3-dev)",
            EmptyCall,
            _distribution("Cython"),
        ),
    )
}
"""Every peer that is not a builtin; ``set`` and ``dict`` are Python's own."""
