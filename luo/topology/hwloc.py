"""Hosts as hwloc XML, which ``lstopo --of xml`` writes: formats 1, 2 and 3 of hwloc's releases.

Taken from it: PCI bridges and devices, the OS devices below them, NUMA nodes with their memory.
Not in such a file, and modelled here: drivers (a table by class and vendor) and configuration
space (256 bytes, made of the identifiers that the file has).
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, field
from os import PathLike
from typing import BinaryIO
from xml.parsers import expat

from luo.topology import Host
from luo.topology._rows import (
    DEFAULT_MEMORY,
    GLUE,
    MAX_SPAN,
    Rows,
    pack_attributes,
    renumber,
    stack_nodes,
    text,
)

__all__ = ["read"]

MAX_FILE_BYTES = 256 << 20
CHUNK_BYTES = 1 << 16
MAX_DEPTH = 512
MAX_INFO_BYTES = 4096
CONFIG_BYTES = 256

_BUSID = re.compile(r"([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}):([01][0-9a-fA-F])\.([0-7])")
_BUSES = re.compile(r"([0-9a-fA-F]{4,8}):\[([0-9a-fA-F]{2})-([0-9a-fA-F]{2})\]")
_IDS = re.compile(
    r"([0-9a-fA-F]{4}) \[([0-9a-fA-F]{4}):([0-9a-fA-F]{4})\]"
    r" \[([0-9a-fA-F]{4}):([0-9a-fA-F]{4})\] ([0-9a-fA-F]{2})(?: ([0-9a-fA-F]{2}))?"
)

# osdev_type: a number in formats 1 and 2, one bit or several in format 3
_OSDEV_CLASSES = ("block", "drm", "net", "infiniband", "dma", "coproc", "dax")
_OSDEV_BITS = (
    (0x40, "dma"),
    (0x20, "infiniband"),
    (0x10, "net"),
    (0x04, "drm"),
    (0x08, "coproc"),
    (0x01, "block"),
    (0x02, "dax"),
)

# Which driver a device of a Linux host is bound to, as a guess: by vendor and class, then by class
# (PCI base class and sub-class); whatever is not here has none.
_DRIVERS_BY_VENDOR = {
    (0x10DE, 0x0300): "nvidia",
    (0x10DE, 0x0302): "nvidia",
    (0x10DE, 0x0680): "nvidia-nvswitch",
    (0x1002, 0x0300): "amdgpu",
    (0x1002, 0x0302): "amdgpu",
    (0x1002, 0x0380): "amdgpu",
    (0x1002, 0x1200): "amdgpu",
    (0x8086, 0x0300): "i915",
    (0x102B, 0x0300): "mgag200",
    (0x1A03, 0x0300): "ast",
    (0x15B3, 0x0200): "mlx5_core",
    (0x15B3, 0x0207): "mlx5_core",
    (0x15B3, 0x0280): "mlx5_core",
    (0x15B3, 0x0C06): "mlx4_core",
    (0x14E4, 0x0200): "bnxt_en",
    (0x1077, 0x0200): "qede",
    (0x1077, 0x0C04): "qla2xxx",
    (0x10DF, 0x0C04): "lpfc",
    (0x1425, 0x0200): "cxgb4",
    (0x1000, 0x0104): "megaraid_sas",
    (0x1000, 0x0107): "mpt3sas",
    (0x9005, 0x0104): "smartpqi",
    (0x9005, 0x0107): "smartpqi",
    (0x103C, 0x0104): "hpsa",
    (0x1D0F, 0x0200): "ena",
    (0x8086, 0x0880): "ioatdma",
    (0x8086, 0x0B40): "qat_4xxx",
    (0x8086, 0x0207): "hfi1",
    (0x8086, 0x0208): "hfi1",
}
_DRIVERS_BY_CLASS = {
    0x0101: "ata_piix",
    0x0106: "ahci",
    0x0108: "nvme",
    0x0403: "snd_hda_intel",
    0x0502: "cxl_pci",
    0x0601: "lpc_ich",
    0x0604: "pcieport",
    0x0609: "pcieport",
    0x0C03: "xhci_hcd",
    0x0C05: "i801_smbus",
}
# Intel's network adapters, by the range of device identifiers.
_INTEL_NICS = (
    (0x1592, 0x159B, "ice"),
    (0x1889, 0x1889, "iavf"),
    (0x154C, 0x154C, "iavf"),
    (0x1571, 0x1571, "iavf"),
    (0x1572, 0x158B, "i40e"),
    (0x37CC, 0x37D3, "i40e"),
    (0x10ED, 0x10ED, "ixgbevf"),
    (0x1515, 0x1515, "ixgbevf"),
    (0x1565, 0x1565, "ixgbevf"),
    (0x10B6, 0x10B6, "ixgbe"),
    (0x10C6, 0x10C8, "ixgbe"),
    (0x10DB, 0x10DD, "ixgbe"),
    (0x10E1, 0x10E1, "ixgbe"),
    (0x10EC, 0x10FC, "ixgbe"),
    (0x1514, 0x151C, "ixgbe"),
    (0x1528, 0x1528, "ixgbe"),
    (0x1557, 0x1563, "ixgbe"),
    (0x10CA, 0x10CA, "igbvf"),
    (0x1520, 0x1520, "igbvf"),
    (0x10A7, 0x10A9, "igb"),
    (0x10C9, 0x10C9, "igb"),
    (0x10E6, 0x10E8, "igb"),
    (0x150A, 0x150E, "igb"),
    (0x1521, 0x1524, "igb"),
    (0x1533, 0x153B, "igb"),
    (0x15F2, 0x15F3, "igc"),
    (0x10D3, 0x10D3, "e1000e"),
    (0x100E, 0x100F, "e1000"),
)


def read(path: str | PathLike[str]) -> Host:
    """Read a host from hwloc XML.

    Host bridges are named as Linux names them (``pci0000:00``), PCI bridges and devices by their
    address, OS devices by class and name (``net!eth0``); parents are those of the file. PCI
    devices have the bus ``pci``, OS devices a column ``class``. A device's node is the lowest in
    the ``nodeset`` of what it is attached to; nodes are numbered among those with memory.
    State is a 256-byte configuration header of the file's identifiers for PCI bridges and devices,
    and for others the element's attributes and ``info`` pairs as attribute records (see
    ``topology.host``).

    Memory: ``local_memory`` of the NUMA nodes, else of the machine, else 16 GiB; stacked from
    address 0, sizes rounded down to 4 MiB.

    Args:
        path: an XML file; UTF-8, or what its declaration says. DTDs are not fetched.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no hwloc XML, is broken, declares entities, or has no devices; with the
            line.

    Source: hwloc's DTDs, hwloc.dtd and hwloc2.dtd; its documentation's section on XML.
    """
    name = os.fspath(path)
    parsed = _Parser(name)
    with open(name, "rb") as file:
        parsed.run(file)
    sizes = sorted(parsed.sizes.items()) or [(0, parsed.machine_bytes)]
    ranges, node_of = renumber(stack_nodes(sizes) or stack_nodes([(0, DEFAULT_MEMORY)]))
    return Host(
        devices=parsed.rows.tree(node_of),
        ranges=ranges,
        source={"kind": "hwloc", "path": name, "devices": len(parsed.rows.names)},
    )


@dataclass(slots=True)
class _Object:
    """An open ``object`` element."""

    type: str
    node: int
    device: int = -1  # row of the nearest device at or above it
    own: bool = False  # whether that is this very object
    infos: list[tuple[bytes, bytes]] = field(default_factory=list)  # and attributes of its own

    def note(self, name: str, value: str) -> None:
        self.infos.append((name.encode()[:MAX_INFO_BYTES], value.encode()[:MAX_INFO_BYTES]))


@dataclass
class _Parser:
    """One pass over the file: expat's events, and the objects that are open."""

    name: str
    rows: Rows = field(default_factory=Rows)
    sizes: dict[int, int] = field(default_factory=dict)
    machine_bytes: int = 0
    stack: list[_Object] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    version: int = 1

    def __post_init__(self) -> None:
        self.expat = expat.ParserCreate()
        self.expat.StartElementHandler = self._start
        self.expat.EndElementHandler = self._end
        self.expat.EntityDeclHandler = self._entity
        self.expat.buffer_text = True

    def run(self, file: BinaryIO) -> None:
        try:
            left = MAX_FILE_BYTES
            while chunk := file.read(CHUNK_BYTES):
                left -= len(chunk)
                if left < 0:
                    raise self._wrong(f"larger than {MAX_FILE_BYTES >> 20} MiB, no hwloc XML")
                self.expat.Parse(chunk, False)
            self.expat.Parse(b"", True)
        except expat.ExpatError as error:
            raise ValueError(
                f"{self.name}: line {error.lineno}: {expat.ErrorString(error.code)}"
            ) from None
        if not self.rows.names:
            raise self._wrong("no PCI or OS device up to here, the end (lstopo --whole-io?)")

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.name}: line {self.expat.CurrentLineNumber}: {what}")

    def _entity(self, name: str, *rest: object) -> None:
        # entities are of no use here, and nested ones expand without bound
        raise self._wrong(f"declares the entity {name!r}")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if not self.tags:
            if tag != "topology":
                raise self._wrong(f"root element is {tag!r}, no hwloc topology")
            # formats before 2 have no version
            major = attributes.get("version", "1").partition(".")[0]
            if major not in ("1", "2", "3"):
                raise self._wrong(f"topology version {attributes['version']!r}, known are 1 to 3")
            self.version = int(major)
        elif len(self.tags) > MAX_DEPTH:
            raise self._wrong(f"more than {MAX_DEPTH} elements deep")
        self.tags.append(tag)
        if tag == "object":
            self._object(attributes)
        elif tag == "info" and self.tags[-2:-1] == ["object"]:
            self.stack[-1].note(attributes.get("name", ""), attributes.get("value", ""))

    def _end(self, tag: str) -> None:
        self.tags.pop()
        if tag != "object":
            return
        closed = self.stack.pop()
        if closed.own and not self.rows.states[closed.device]:
            self.rows.states[closed.device] = pack_attributes(sorted(closed.infos))

    def _object(self, attributes: dict[str, str]) -> None:
        above = self.stack[-1] if self.stack else _Object("", 0)
        kind = attributes.get("type", "")
        here = _Object(kind, above.node, above.device)
        if kind in ("Bridge", "OSDev"):
            for key, value in attributes.items():
                here.note(key, value)
        nodes = attributes.get("nodeset", "")
        if nodes:
            here.node = self._lowest(nodes)
        self.stack.append(here)

        if kind == "NUMANode":
            # a node's own number; formats before 2.0 left it out of single-node machines
            node = self._integer(attributes, "os_index", 0)
            here.node = node
            self.sizes[node] = self._integer(attributes, "local_memory", 0)
            if node >= 1 << 16 or not 0 <= self.sizes[node] <= MAX_SPAN:
                raise self._wrong("NUMANode with an impossible os_index or local_memory")
        elif kind == "Machine":
            self.machine_bytes = self._integer(attributes, "local_memory", 0)
        elif kind == "Bridge":
            self._bridge(here, attributes)
        elif kind == "PCIDev":
            self._pci(here, attributes, None)
        elif kind == "OSDev":
            self._osdev(here, attributes)

    def _bridge(self, here: _Object, attributes: dict[str, str]) -> None:
        buses = _BUSES.fullmatch(attributes.get("bridge_pci", ""))
        if buses is None:
            raise self._wrong(f"bridge_pci={attributes.get('bridge_pci', '')!r} of a Bridge")
        upstream = attributes.get("bridge_type", "").partition("-")[0]
        if upstream == "1":
            secondary, subordinate = int(buses[2], 16), int(buses[3], 16)
            self._pci(here, attributes, (secondary, subordinate))
        elif upstream == "0":
            name = f"pci{int(buses[1], 16):04x}:{buses[2].lower()}"
            self._add(here, name)
        else:
            raise self._wrong(f"bridge_type={attributes.get('bridge_type', '')!r} of a Bridge")

    def _pci(
        self, here: _Object, attributes: dict[str, str], buses: tuple[int, int] | None
    ) -> None:
        address = _BUSID.fullmatch(attributes.get("pci_busid", ""))
        if address is None:
            raise self._wrong(f"pci_busid={attributes.get('pci_busid', '')!r} of a {here.type}")
        ids = _IDS.fullmatch(attributes.get("pci_type", "").strip())
        if ids is None:
            raise self._wrong(f"pci_type={attributes.get('pci_type', '')!r} of a {here.type}")
        klass, vendor, device, subvendor, subdevice, revision = (
            int(ids[k], 16) for k in range(1, 7)
        )
        interface = int(ids[7] or "0", 16)  # only format 3 has it

        config = bytearray(CONFIG_BYTES)
        # Command: memory space and bus master, as with a driver at work. Status: none.
        struct.pack_into("<HHHH", config, 0, vendor, device, 0x0006, 0)
        struct.pack_into("<BBBB", config, 8, revision, interface, klass & 0xFF, klass >> 8)
        if buses is None:
            struct.pack_into("<HH", config, 0x2C, subvendor, subdevice)
        else:
            config[0x0E] = 0x01  # header type: bridge
            struct.pack_into("<BBB", config, 0x18, int(address[2], 16), *buses)
        driver = "pcieport" if buses is not None else _driver(vendor, device, klass)
        name = f"{int(address[1], 16):04x}:{address[2]}:{address[3]}.{address[4]}".lower()
        self._add(here, name, bus="pci", driver=driver, state=bytes(config))

    def _osdev(self, here: _Object, attributes: dict[str, str]) -> None:
        name = text(attributes.get("name", "")).replace("/", GLUE)
        kind = self._integer(attributes, "osdev_type", -1)
        if self.version < 3:
            klass = _OSDEV_CLASSES[kind] if 0 <= kind < len(_OSDEV_CLASSES) else ""
        else:
            klass = next((name for bit, name in _OSDEV_BITS if kind > 0 and kind & bit), "")
        if not name or kind < 0:
            raise self._wrong("OSDev without a name or with an impossible osdev_type")
        self._add(here, f"{klass}{GLUE}{name}" if klass else name, klass=klass)

    def _add(
        self,
        here: _Object,
        name: str,
        *,
        bus: str | None = None,
        driver: str | None = None,
        klass: str = "",
        state: bytes = b"",
    ) -> None:
        here.device = self.rows.add(
            name, here.device, bus=bus, driver=driver, node=here.node, klass=klass, state=state
        )
        here.own = True

    def _integer(self, attributes: dict[str, str], key: str, default: int) -> int:
        value = attributes.get(key)
        if value is None:
            return default
        if not re.fullmatch(r"\d{1,20}", value, re.ASCII):
            raise self._wrong(f"{key}={value!r} is no number")
        return int(value)

    def _lowest(self, nodeset: str) -> int:
        # "0x00000003", "0x00000001,,0x0" (32-bit words, highest first, empty is 0), "0xf...f"
        words = nodeset.replace("0xf...f", "0xffffffff").split(",")
        for nr, word in enumerate(reversed(words)):
            if not re.fullmatch(r"(0x[0-9a-fA-F]{1,8})?", word):
                raise self._wrong(f"nodeset={nodeset!r} is no bitmap")
            value = int(word or "0", 16)
            if value:
                return nr * 32 + (value & -value).bit_length() - 1
        return self.stack[-1].node if self.stack else 0


def _driver(vendor: int, device: int, klass: int) -> str | None:
    if vendor == 0x1AF4 and 0x1000 <= device <= 0x107F:
        return "virtio-pci"
    if vendor == 0x8086 and klass == 0x0200:
        for first, last, driver in _INTEL_NICS:
            if first <= device <= last:
                return driver
    return _DRIVERS_BY_VENDOR.get((vendor, klass), _DRIVERS_BY_CLASS.get(klass))
