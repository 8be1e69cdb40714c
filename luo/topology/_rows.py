"""What the readers collect: plain rows, one a device, from which a tree is filled in one call.

Sysfs has directories between devices that are no devices themselves (``net`` in
``virtio2/net/eth0``, ``virtual/tty`` in ``virtual/tty/tty0``). They become part of the name of the
device below them, joined by ``!``, the character that Linux itself puts for a slash inside a
device's name: ``virtio2/net!eth0``, ``virtual!tty!tty0``. So every node of the tree is a device,
and with ``!`` read as ``/`` its path is the one below ``/sys/devices``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from luo.errors import HandoverError
from luo.machine import DeviceTree

GLUE = "!"
# What every memory range is rounded to: a kernel's largest buddy block with 4 KiB pages.
RANGE_ALIGN = 4 << 20
DEFAULT_MEMORY = 16 << 30
# PhysicalMemory's largest span of addresses, and its last address.
MAX_SPAN = 1 << 46
MAX_PHYS = 1 << 48

Range = tuple[int, int, int]

# Attribute record, repeated: u16 bytes of name with its NUL, u32 bytes of value (both
# little-endian), name, NUL, value.
_HEAD = struct.Struct("<HI")


def pack_attributes(attributes: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Serialise ``(name, value)`` pairs in the order given."""
    parts: list[bytes] = []
    for name, value in attributes:
        parts += (_HEAD.pack(len(name) + 1, len(value)), name, b"\0", value)
    return b"".join(parts)


def unpack_attributes(state: bytes) -> list[tuple[bytes, bytes]]:
    """Undo :func:`pack_attributes`.

    Raises:
        HandoverError: the record is cut short or a name is not terminated; at which byte.
    """
    found = []
    at = 0
    while at < len(state):
        if len(state) - at < _HEAD.size:
            raise HandoverError("attribute record: cut short in a header", at)
        name_len, value_len = _HEAD.unpack_from(state, at)
        name_end = at + _HEAD.size + name_len
        end = name_end + value_len
        if end > len(state):
            raise HandoverError("attribute record: cut short in an attribute", at)
        if not name_len or state[name_end - 1]:
            raise HandoverError("attribute record: name is not NUL-terminated", at)
        found.append((state[at + _HEAD.size : name_end - 1], state[name_end:end]))
        at = end
    return found


def text(name: str) -> str:
    r"""Make a file's name printable UTF-8: bytes that are none become ``\xNN``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass(slots=True)
class Rows:
    """Devices in registration order, parents first; one list a column."""

    names: list[str] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    buses: list[str | None] = field(default_factory=list)
    drivers: list[str | None] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    classes: list[bytes] = field(default_factory=list)
    states: list[bytes] = field(default_factory=list)
    # (parent, name) of every row: a name is unique under its parent
    taken: set[tuple[int, str]] = field(default_factory=set)

    def add(
        self,
        name: str,
        parent: int,
        *,
        bus: str | None,
        driver: str | None,
        node: int,
        klass: str = "",
        state: bytes = b"",
    ) -> int:
        """Append a device and return its index; a name that is taken gets ``~2``, ``~3``, …"""
        unique, nr = name, 1
        while (parent, unique) in self.taken:
            nr += 1
            unique = f"{name}~{nr}"
        self.taken.add((parent, unique))
        self.names.append(unique)
        self.parents.append(parent)
        self.buses.append(bus)
        self.drivers.append(driver)
        self.nodes.append(node)
        self.classes.append(klass.encode())
        self.states.append(state)
        return len(self.names) - 1

    def tree(self, node_of: dict[int, int]) -> DeviceTree:
        """Fill a tree; ``node_of`` gives the memory's node for each node of the source."""
        devices = DeviceTree()
        devices.add_many(
            self.names,
            self.parents,
            self.buses,
            self.drivers,
            [node_of.get(node, 0) for node in self.nodes],
            **{"state": self.states, "class": self.classes},
        )
        return devices


def renumber(ranges: list[Range]) -> tuple[list[Range], dict[int, int]]:
    """Number the nodes that have memory 0, 1, … in the order of their numbers in the source.

    Nodes without memory have no place in the memory; their devices count as node 0's.
    """
    node_of = {node: nr for nr, node in enumerate(sorted({node for _, _, node in ranges}))}
    return [(start, nbytes, node_of[node]) for start, nbytes, node in ranges], node_of


def stack_ranges(ranges: Iterable[Range]) -> list[Range]:
    """Close the holes between ranges: the first starts at address 0, each next where one ends."""
    stacked = []
    start = 0
    for _, nbytes, node in ranges:
        stacked.append((start, nbytes, node))
        start += nbytes
    return stacked


def stack_nodes(sizes: Iterable[tuple[int, int]]) -> list[Range]:
    """Lay ``(node, nbytes)`` out one after another from address 0, sizes rounded down."""
    rounded = ((0, nbytes - nbytes % RANGE_ALIGN, node) for node, nbytes in sizes)
    return stack_ranges(one for one in rounded if one[1])
