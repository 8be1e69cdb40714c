"""Device sets of any size from a seed, shaped like real hosts.

A set is a row of root complexes (``pci0000:00``), each with one of four kinds of equipment behind
its root ports; the seed chooses the kinds and how much of each:

======= ==========================================================================================
network adapters with two physical functions and their virtual functions (siblings below the root
        port, as Linux has them), network interfaces and RDMA devices
storage a switch with NVMe controllers, each with its namespace
gpu     a switch with GPUs, each with its DRM card, and a network adapter
virtio  virtio functions on the root bus, each with its virtio device and what that provides
======= ==========================================================================================

Virtual functions are bound to ``vfio-pci`` where they are meant for virtual machines (those of
mlx5 adapters), and to ``iavf`` with a network interface of their own where the host uses them.
Each root complex has a PCI domain of its own and sits on one NUMA node.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from luo.machine import DeviceTree

__all__ = ["generate"]

STATE_BYTES = 256
VF_STATE_BYTES = 64
HEADER_BYTES = 16
MAX_DEVICES = (1 << 31) - 1  # indices are int32

_U8 = NDArray[np.uint8]
_I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What devices of one kind have in common.

    Name: *prefix* and, by *numbering*, "domain" (of the root complex), "address" (of the PCI
    function), "number" (a count over the host) or "letters" (the count as disks have it), then
    *suffix*. A number is its own count, or that of the kind *counted*, which is just above.
    """

    prefix: str
    numbering: str
    bus: str | None = None
    driver: str | None = None
    klass: str = ""
    ids: tuple[int, int] = (0, 0)  # PCI vendor and device
    pci_class: int = 0  # base class, sub-class, interface
    suffix: str = ""
    counted: str = ""
    bridge: bool = False
    vf: bool = False


def _pci(
    driver: str, vendor: int, device: int, pci_class: int, *, bridge: bool = False, vf: bool = False
) -> _Kind:
    ids = (vendor, device)
    return _Kind("", "address", "pci", driver, "", ids, pci_class, bridge=bridge, vf=vf)


_KINDS = {
    "root": _Kind("pci", "domain"),
    "root port": _pci("pcieport", 0x8086, 0x352A, 0x060400, bridge=True),
    "upstream": _pci("pcieport", 0x1000, 0xC030, 0x060400, bridge=True),
    "downstream": _pci("pcieport", 0x1000, 0xC030, 0x060400, bridge=True),
    "mlx5 pf": _pci("mlx5_core", 0x15B3, 0x101D, 0x020000),
    "mlx5 vf": _pci("vfio-pci", 0x15B3, 0x101E, 0x020000, vf=True),
    "ice pf": _pci("ice", 0x8086, 0x1592, 0x020000),
    "iavf vf": _pci("iavf", 0x8086, 0x1889, 0x020000, vf=True),
    "net": _Kind("net!eth", "number", klass="net"),
    "rdma": _Kind("infiniband!mlx5_", "number", klass="infiniband"),
    "nvme": _pci("nvme", 0x144D, 0xA824, 0x010802),
    "nvme ctrl": _Kind("nvme!nvme", "number", klass="nvme"),
    "namespace": _Kind("nvme", "number", klass="block", suffix="n1", counted="nvme ctrl"),
    "generic": _Kind("ng", "number", klass="nvme-generic", suffix="n1", counted="nvme ctrl"),
    "gpu": _pci("nvidia", 0x10DE, 0x2330, 0x030200),
    "drm": _Kind("drm!card", "number", klass="drm"),
    "virtio net": _pci("virtio-pci", 0x1AF4, 0x1041, 0x020000),
    "virtio blk": _pci("virtio-pci", 0x1AF4, 0x1042, 0x018000),
    "virtio rng": _pci("virtio-pci", 0x1AF4, 0x1044, 0x00FF00),
    "virtio balloon": _pci("virtio-pci", 0x1AF4, 0x1045, 0x00FF00),
    "virtio_net": _Kind("virtio", "number", "virtio", "virtio_net"),
    "virtio_blk": _Kind("virtio", "number", "virtio", "virtio_blk"),
    "virtio_rng": _Kind("virtio", "number", "virtio", "virtio_rng"),
    "virtio_balloon": _Kind("virtio", "number", "virtio", "virtio_balloon"),
    "disk": _Kind("block!vd", "letters", klass="block"),
}
_NAMES = list(_KINDS)
_CODE = {name: code for code, name in enumerate(_NAMES)}
_VIRTIO = [_CODE[f"virtio_{name}"] for name in ("net", "blk", "rng", "balloon")]


# ---- templates of root complexes ----


@dataclass(slots=True)
class _Template:
    """One root complex: kind, parent and address (bus << 8 | devfn) of each device."""

    kinds: list[int]
    parents: list[int]
    addresses: list[int]

    def add(self, kind: str, parent: int, address: int = 0) -> int:
        self.kinds.append(_CODE[kind])
        self.parents.append(parent)
        self.addresses.append(address)
        return len(self.kinds) - 1


def _devfn(device: int, function: int = 0) -> int:
    return device << 3 | function


def _network(vfs: int) -> _Template:
    made = _Template([], [], [])
    root = made.add("root", -1)
    for slot, brand in enumerate(("mlx5", "mlx5", "ice")):
        port = made.add("root port", root, _devfn(1 + slot))
        bus = (1 + slot) << 8
        # two ports; all virtual functions fit the bus's 256 routing identifiers
        for function in range(2):
            pf = made.add(f"{brand} pf", port, bus | function)
            made.add("net", pf)
            if brand == "mlx5":
                made.add("rdma", pf)
        for nr in range(2 * vfs if brand == "mlx5" else vfs):
            vf = made.add("mlx5 vf" if brand == "mlx5" else "iavf vf", port, bus | (2 + nr))
            if brand == "ice":
                made.add("net", vf)
    return made


def _switch(made: _Template, root: int, slot: int, bus: int, ports: int) -> list[tuple[int, int]]:
    # root port, upstream port, downstream ports; gives those with the bus below each
    port = made.add("root port", root, _devfn(slot))
    upstream = made.add("upstream", port, bus << 8)
    return [
        (made.add("downstream", upstream, (bus + 1) << 8 | _devfn(nr)), bus + 2 + nr)
        for nr in range(ports)
    ]


def _storage(drives: int) -> _Template:
    made = _Template([], [], [])
    root = made.add("root", -1)
    for port, bus in _switch(made, root, 1, 1, drives):
        controller = made.add("nvme ctrl", made.add("nvme", port, bus << 8))
        made.add("namespace", controller)
        made.add("generic", controller)
    return made


def _gpu(gpus: int) -> _Template:
    made = _Template([], [], [])
    root = made.add("root", -1)
    for port, bus in _switch(made, root, 1, 1, gpus):
        made.add("drm", made.add("gpu", port, bus << 8))
    nic = made.add("mlx5 pf", made.add("root port", root, _devfn(2)), (gpus + 4) << 8)
    made.add("net", nic)
    made.add("rdma", nic)
    return made


def _virtio(functions: int) -> _Template:
    made = _Template([], [], [])
    root = made.add("root", -1)
    for nr in range(functions):
        name = ("net", "blk", "net", "blk", "rng", "balloon")[nr % 6]
        function = made.add(f"virtio {name}", root, _devfn(1 + nr))
        device = made.add(f"virtio_{name}", function)
        if name in ("net", "blk"):
            made.add("net" if name == "net" else "disk", device)
    return made


# Weights make about three of four devices virtual functions, as on hosts that are full of
# virtual machines.
@cache
def _templates() -> tuple[tuple[_Template, float], ...]:
    return (
        (_network(31), 0.20),
        (_network(63), 0.35),
        (_network(126), 0.15),
        (_storage(8), 0.12),
        (_storage(24), 0.06),
        (_gpu(4), 0.05),
        (_gpu(8), 0.03),
        (_virtio(24), 0.04),
    )


# ---- a whole set ----


def generate(n: int, seed: int = 0, nodes: int = 1) -> DeviceTree:
    """Make a tree of exactly *n* devices.

    The same arguments give the same tree, byte for byte. State (column ``state``) is 64 bytes for
    virtual functions and 256 for others, with the PCI identifiers in its first 16 and the rest
    from the seed; devices that are on no bus have a column ``class``.

    Args:
        n: number of devices, 1 to 2147483647.
        seed: not negative.
        nodes: NUMA nodes; the root complexes are spread over them, in runs of about as
            many devices each.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 1 <= n <= MAX_DEVICES:
        raise ValueError(f"devices={n}: 1 to {MAX_DEVICES}")
    if nodes < 1:
        raise ValueError(f"nodes={nodes}: at least 1")
    rng = np.random.default_rng(seed)

    complexes = _choose(rng, n)
    templates = [template for template, _ in _templates()]
    sizes = np.array([len(template.kinds) for template in templates])
    first = np.zeros(len(complexes) + 1, np.int64)
    np.cumsum(sizes[complexes], out=first[1:])
    # which root complex each device is in, and which device of the template it is
    root_complex = np.repeat(np.arange(len(complexes)), sizes[complexes])[:n]
    at = np.arange(n) - first[root_complex]
    flat = np.concatenate(([0], np.cumsum(sizes)))[complexes][root_complex] + at

    def column(field: str) -> _I64:
        per_template = [np.array(getattr(template, field)) for template in templates]
        values: _I64 = np.concatenate(per_template)[flat]
        return values

    kinds = column("kinds")
    local = column("parents")
    parents = np.where(local < 0, -1, first[root_complex] + local)
    names = _names(kinds, root_complex, column("addresses"))

    table = list(_KINDS.values())
    buses, bus_names = _codes([kind.bus for kind in table])
    drivers, driver_names = _codes([kind.driver for kind in table])
    classes, class_offsets = _ragged([kind.klass for kind in table])
    class_len = np.diff(class_offsets)
    offsets = _offsets(class_len[kinds])
    data = classes[
        np.repeat(class_offsets[:-1][kinds] - offsets[:-1], class_len[kinds])
        + np.arange(offsets[-1])
    ]

    devices = DeviceTree()
    devices.add_many(
        names,
        parents.astype(np.int32),
        (buses[kinds].astype(np.int32), bus_names),
        (drivers[kinds].astype(np.int32), driver_names),
        (first[root_complex] * nodes // n).astype(np.int32),
        **{"state": _states(rng, kinds), "class": (data, offsets.astype(np.uint64))},
    )
    return devices


def _choose(rng: np.random.Generator, n: int) -> _I64:
    # Templates of the root complexes, just enough for n devices. The first is a network, so that
    # the smallest sets have virtual functions too.
    weights = np.array([weight for _, weight in _templates()])
    sizes = np.array([len(template.kinds) for template, _ in _templates()])
    mean = float(sizes @ weights)
    chosen = np.zeros(1, np.int64)
    while (missing := n - int(sizes[chosen].sum())) > 0:
        chosen = np.append(chosen, rng.choice(len(weights), int(missing / mean) + 1, p=weights))
    nr_complexes = int(np.searchsorted(np.cumsum(sizes[chosen]), n)) + 1
    return chosen[:nr_complexes]


def _offsets(lengths: _I64) -> _I64:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _ragged(texts: list[str]) -> tuple[_U8, _I64]:
    encoded = [text.encode() for text in texts]
    return (
        np.frombuffer(b"".join(encoded), np.uint8),
        _offsets(np.array([len(text) for text in encoded], np.int64)),
    )


def _codes(names: list[str | None]) -> tuple[_I64, list[str]]:
    unique = list(dict.fromkeys(name for name in names if name is not None))
    return np.array([-1 if name is None else unique.index(name) for name in names]), unique


# ---- names ----


def _hex(values: _I64, digits: int) -> _U8:
    # shape (n, digits), lower case, most significant first
    nibbles = values[:, None] >> np.arange(4 * (digits - 1), -4, -4) & 0xF
    digits_of: _U8 = np.frombuffer(b"0123456789abcdef", np.uint8)[nibbles]
    return digits_of


def _counts(values: _I64, base: int, zero: int, *, bijective: bool) -> list[tuple[_I64, _U8]]:
    # Each value's digits, as (rows, matrix) for each number of digits. Bijective: a…z, aa, ab, …
    found = []
    low = 0
    digits = 1
    while low <= values.max(initial=-1):
        high = low + base**digits if bijective else base**digits
        rows = np.flatnonzero((values >= low) & (values < high))
        rest = values[rows] - (low if bijective else 0)
        matrix = np.empty((len(rows), digits), np.uint8)
        for place in range(digits - 1, -1, -1):
            rest, digit = np.divmod(rest, base)
            matrix[:, place] = digit + zero
        found.append((rows, matrix))
        low, digits = high, digits + 1
    return found


def _constant(text: str, n: int) -> _U8:
    return np.broadcast_to(np.frombuffer(text.encode(), np.uint8), (n, len(text.encode())))


def _names(kinds: _I64, root_complex: _I64, addresses: _I64) -> tuple[_U8, NDArray[np.uint64]]:
    # Rows with names of one length at a time: (rows, matrix of their names)
    blocks: list[tuple[_I64, _U8]] = []
    # domains of more than 16 bits have a fifth digit, as Linux prints them
    wide = root_complex > 0xFFFF
    virtio = np.isin(kinds, _VIRTIO)
    for code, kind in enumerate(_KINDS.values()):
        rows = np.flatnonzero(kinds == code)
        if not len(rows):
            continue
        if kind.numbering in ("domain", "address"):
            for some, digits in ((rows[~wide[rows]], 4), (rows[wide[rows]], 5)):
                parts = [_constant(kind.prefix, len(some)), _hex(root_complex[some], digits)]
                where = addresses[some]
                parts += [_constant(":", len(some)), _hex(where >> 8, 2)]
                if kind.numbering == "address":
                    parts += [_constant(":", len(some)), _hex(where >> 3 & 0x1F, 2)]
                    parts += [_constant(".", len(some)), _hex(where & 7, 1)]
                blocks.append((some, np.hstack(parts)))
            continue
        # the count over the host of this kind, of the kind above it, or of all virtio devices
        same = virtio if code in _VIRTIO else kinds == _CODE[kind.counted or _NAMES[code]]
        numbers = (np.cumsum(same) - 1)[rows]
        letters = kind.numbering == "letters"
        for some, digits_of in _counts(
            numbers, 26 if letters else 10, ord("a" if letters else "0"), bijective=letters
        ):
            parts = [_constant(kind.prefix, len(some)), digits_of]
            blocks.append((rows[some], np.hstack([*parts, _constant(kind.suffix, len(some))])))

    lengths = np.zeros(len(kinds), np.int64)
    for rows, matrix in blocks:
        lengths[rows] = matrix.shape[1]
    offsets = _offsets(lengths)
    data = np.empty(offsets[-1], np.uint8)
    for rows, matrix in blocks:
        data[offsets[rows][:, None] + np.arange(matrix.shape[1])] = matrix
    return data, offsets.astype(np.uint64)


# ---- state ----


def _states(rng: np.random.Generator, kinds: _I64) -> tuple[_U8, NDArray[np.uint64]]:
    table = list(_KINDS.values())
    size = np.array([VF_STATE_BYTES if kind.vf else STATE_BYTES for kind in table])
    offsets = _offsets(size[kinds])
    # both sizes are multiples of the header, and that of the generator's words
    data = np.frombuffer(bytearray(rng.bytes(int(offsets[-1]))), np.uint8)

    headers = np.zeros((len(table), HEADER_BYTES), np.uint8)
    words = headers.view("<u2")
    for code, kind in enumerate(table):
        words[code, :2] = kind.ids
        words[code, 2] = 0x0406 if kind.bus == "pci" else 0  # memory, bus master, no INTx
        words[code, 3] = 0x0010 if kind.bus == "pci" else 0  # capability list
        headers[code, 9:12] = list(kind.pci_class.to_bytes(3, "little"))
        headers[code, 14] = 0x01 if kind.bridge else 0x00
    data.reshape(-1, HEADER_BYTES)[offsets[:-1] // HEADER_BYTES] = headers[kinds]
    return data, offsets.astype(np.uint64)
