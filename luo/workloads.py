"""Ready-made hosts, and hosts described in the same words: TOML.

:func:`load` gives a booted kernel of one, ready for a live update, to other test and benchmark
suites::

    kernel = workloads.load("dense", devices=10_000, seed=1)
    for _ in range(20):
        with kernel.clone() as again:  # another machine, the same in everything
            again.luo.prepare()

The presets are the files ``presets/*.toml`` of this package, which also serve as examples::

    memory = "2TiB"            # a size, or one for each node: ["1TiB", "512GiB"]
    nodes = 2                  # NUMA nodes that share the memory evenly; 1 if absent
    kho_scratch = "64M,1G,1G"  # kernel parameter; the kernel's own sizing if absent

    [devices]
    source = "synthetic"       # or "sysfs" or "hwloc", which bring memory and nodes with them
    count = 3000               # of "synthetic"
    path = "gathered/sys"      # of "sysfs" (/sys if absent) and "hwloc"; relative to this file

    [[vms]]                    # any number of these
    name = "web"               # web0, web1, … if there are several
    count = 40                 # 1 if absent
    vcpus = 8                  # 1 if absent
    devices = 2                # assigned to each: devices bound to vfio-pci; 0 if absent
    node = 1                   # NUMA node of its RAM; where most is left if absent
    ram = { 4KiB = "16MiB", 2MiB = "2GiB", 1GiB = "8GiB" }    # by size of folio
"""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from luo import drivers as builtin
from luo.device import Bus, Driver
from luo.drivers import ASSIGNABLE_DRIVER
from luo.errors import KhoError, LuoError
from luo.kernel import Kernel, KernelImage, live_update
from luo.kho import ScratchParam, parse_kho_scratch, scratch_layout
from luo.machine import DeviceTree, Machine
from luo.memory import PhysicalMemory, parse_size
from luo.notifier import Subsystem
from luo.topology import PAGE_SHIFT, VM, Host, hwloc, synthetic
from luo.topology import host as sysfs_host
from luo.topology._rows import RANGE_ALIGN, Range, stack_nodes

__all__ = ["PRESETS", "first_kernel", "host", "image_of", "load", "request_all"]

PRESETS: Final = ("host", "cloud", "dense", "stress")

MAX_NODES = 1024
MAX_MEMORY = 16 << 40
MAX_VMS = 1 << 16
MAX_VCPUS = 4096
MAX_VM_DEVICES = 1 << 16
# One part in so many of a node is kept for what a kernel needs itself: device records, page
# tables of the IOMMU, nodes of the map.
KERNEL_SHARE = 64
FOLIO_ORDERS: Final = {"4KiB": 0, "2MiB": 9, "1GiB": 18}
_REHEARSED: Final = ("api", "cmdline", "kho_abi", "kho_bugs", "behaviour", "quirks")

_VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def host(preset: str | PathLike[str], *, devices: int | None = None, seed: int = 0) -> Host:
    """Make a host from a preset or a TOML file (see the module's words).

    ========== ============== ============== ===== =========
    preset     memory         nodes          VMs   devices
    ========== ============== ============== ===== =========
    ``host``   this machine's this machine's 0     ``/sys``
    ``cloud``  2 TiB          2              400   3,000
    ``dense``  16 TiB         8              1,000 20,000
    ``stress`` 1 TiB          2              0     1,000,000
    ========== ============== ============== ===== =========

    Args:
        preset: one of ``PRESETS``, or the path of a TOML file.
        devices: make this many synthetic devices instead of those described. Virtual machines
            then share what devices there are, evenly, up to the number described.
        seed: of synthetic devices.

    Raises:
        OSError: the file, or one that it names, cannot be read.
        ValueError: it is no preset, or the description breaks a rule; names the key and the rule.
    """
    name = os.fspath(preset)
    if name in PRESETS:
        path = Path(__file__).parent / "presets" / f"{name}.toml"
    elif name.endswith(".toml") or os.path.exists(name):
        path = Path(name)
    else:
        raise ValueError(f"no preset {name!r}: {', '.join(PRESETS)}, or the path of a .toml file")
    try:
        described = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:  # broken TOML or UTF-8
        raise ValueError(f"{name}: {error}") from None
    return _Description(name, path.parent, devices, seed).host(_Table(name, "", described))


def load(
    source: str | PathLike[str] | Host,
    *,
    devices: int | None = None,
    seed: int = 0,
    request: str | Iterable[str] = (),
    drivers: Iterable[str | Driver | Bus | Subsystem] = (),
    successor: str | None = "in-process",
    **settings: Any,
) -> Kernel:
    """Boot a kernel that is ready for a live update: next kernel loaded, devices requested.

    The memory that the update will write has been touched. ``.clone()`` of the kernel gives
    another, on a machine of its own, for one more measurement.

    Args:
        source: a preset, a TOML file, or a host from :mod:`luo.topology`.
        devices: make this many, as of :func:`host`; not for a host that is made already.
        seed: likewise.
        request: globs over the paths of the devices to keep; without any all that have a driver
            and a bus, as ``luo run`` does.
        drivers: your own drivers, buses and subsystems in both kernels, or where they are, as
            ``luo run --drivers`` takes it. Those that are themselves here cannot be sent to
            another process.
        successor: where the next kernel waits: ``"in-process"``, ``"process"``, or None for none.
        **settings: of both kernels, as of :class:`~luo.kernel.Kernel`: ``behaviour``,
            ``kho_abi``, ``quirks``, ``workers``… With ``"process"`` they must be JSON values.

    Raises:
        OSError, ValueError: as of :func:`host`; a glob that matches nothing, nothing that can be
            kept, no such successor.
    """
    if successor not in ("in-process", "process", None):
        raise ValueError(f'successor {successor!r}: "in-process", "process" or None')
    if isinstance(source, Host):
        if devices is not None or seed:
            raise ValueError("devices and seed: the host is made already")
        made = source
    else:
        made = host(source, devices=devices, seed=seed)
    modules = [builtin.absolute(one) if isinstance(one, str) else one for one in drivers]
    if successor == "process" and not all(isinstance(one, str) for one in modules):
        raise ValueError('drivers: name the module or file of those for successor="process"')
    image = image_of(made, modules=modules, **settings)
    kernel = first_kernel(made, image, _touched(made, image)).boot()
    try:
        for glob in (request,) if isinstance(request, str) else request:
            if not kernel.devices.request(glob):
                raise ValueError(f"request {glob!r}: no device that can be kept matches")
        if not kernel.devices.requested.any():
            request_all(kernel)
        if not kernel.devices.requested.any():
            raise ValueError(f"{made.source['path']}: no device that can be kept")
        if successor is not None:
            here = successor == "in-process"
            kernel.kexec_load(image.build(kernel.machine) if here else image)
    except BaseException:
        kernel.close()
        raise
    return kernel


def image_of(host: Host, **settings: Any) -> KernelImage:
    """Name the image of the built-in kernel for *host*.

    Args:
        host: the host.
        **settings: keyword arguments of :func:`luo.drivers.kernel`.
    """
    cmdline = "kho=on liveupdate=on"
    if host.kho_scratch:
        cmdline += f" kho_scratch={host.kho_scratch}"
    return KernelImage("luo.drivers:kernel", args={"cmdline": cmdline, **settings})


def first_kernel(host: Host, image: KernelImage, machine: Machine | None = None) -> Kernel:
    """Build what boots cold on *host*: a kernel of *image* that starts the virtual machines.

    Args:
        host: the host.
        image: the image.
        machine: the host's machine, if there is one already.
    """
    build: Callable[[Machine], Kernel] = partial(builtin.kernel, vms=host.vms, **image.args)
    kernel = build(machine or host.machine())
    kernel.builder = build
    return kernel


def _touched(host: Host, image: KernelImage) -> Machine:
    """Return the machine of *host*, on which what subsystems write in an update has been touched.

    Loading a kernel touches what the devices will need. What subsystems take, and the nodes of the
    map, are known when they have been written: by an update with the built-in drivers, since
    nobody's own should be called unasked.
    """
    settings = {name: value for name, value in image.args.items() if name in _REHEARSED}
    plain = KernelImage(image.name, args=settings)
    machine = host.machine()
    with contextlib.suppress(LuoError):  # what fails now will fail where it can be seen
        kernel = first_kernel(host, plain, machine).boot()
        request_all(kernel)
        live_update(kernel, plain, in_process=True)
    if machine.running is not None:
        machine.running.close()
    return Machine(machine.memory.clone(), host.devices)


def request_all(kernel: Kernel) -> None:
    """Request every device that has a driver and a bus, and supports live update."""
    devices = kernel.devices
    owned = (devices.driver_ids >= 0) & (devices.bus_ids >= 0)
    devices.request(owned & devices.eligible())


@dataclass(slots=True)
class _Table:
    """A table of the description, whose keys are taken one by one and checked."""

    file: str
    key: str
    values: dict[str, object]

    def where(self, key: str) -> str:
        shown = key if key.isprintable() else repr(key)
        return f"{self.key}.{shown}" if self.key else shown

    def wrong(self, key: str, rule: str) -> NoReturn:
        raise ValueError(f"{self.file}: {self.where(key)}: {rule}")

    def done(self) -> None:
        for key in self.values:
            self.wrong(key, "unknown key")

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value = self.values.pop(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.wrong(key, f"{value!r} is no integer from {low} to {high}")
        return value

    def string(self, key: str, default: str | None) -> str | None:
        value = self.values.pop(key, default)
        if value is not None and (not isinstance(value, str) or not value or "\0" in value):
            self.wrong(key, f"{value!r} is no string of at least one character")
        return value

    def size(self, key: str, value: object, step: int, low: int) -> int:
        try:
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise ValueError
            nbytes = parse_size(value)
        except ValueError:
            self.wrong(key, f'{value!r} is no size, as "64GiB" or a number of bytes')
        if nbytes % step or not low <= nbytes <= MAX_MEMORY:
            self.wrong(key, f"{value!r} is no multiple of {step} bytes from {low} to {MAX_MEMORY}")
        return nbytes

    def table(self, key: str) -> _Table | None:
        value = self.values.pop(key, None)
        if value is not None and not isinstance(value, dict):
            self.wrong(key, "must be a table")
        return None if value is None else _Table(self.file, self.where(key), value)

    def tables(self, key: str) -> list[_Table]:
        value = self.values.pop(key, [])
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            self.wrong(key, f"must be an array of tables: [[{key}]]")
        return [_Table(self.file, f"{key}[{nr}]", one) for nr, one in enumerate(value)]


@dataclass(slots=True)
class _Group:
    """What a ``[[vms]]`` table says."""

    table: _Table
    name: str
    count: int
    vcpus: int
    devices: int
    node: int | None
    ram: list[tuple[int, int]]

    def names(self) -> list[str]:
        return [self.name] if self.count == 1 else [f"{self.name}{k}" for k in range(self.count)]


def _group(table: _Table) -> _Group:
    name = table.string("name", None)
    if name is None or not _VM_NAME.fullmatch(name):
        table.wrong("name", f"{name!r} is no name of letters, digits and . _ -")
    found = _Group(
        table,
        name,
        count=table.integer("count", 1, 1, MAX_VMS),
        vcpus=table.integer("vcpus", 1, 1, MAX_VCPUS),
        devices=table.integer("devices", 0, 0, MAX_VM_DEVICES),
        node=table.integer("node", 0, 0, MAX_NODES - 1) if "node" in table.values else None,
        ram=[],
    )
    ram = table.table("ram")
    if ram is None:
        table.wrong("ram", "missing; the RAM by size of folio")
    for key, order in FOLIO_ORDERS.items():
        folio = 1 << (PAGE_SHIFT + order)
        nbytes = ram.size(key, ram.values.pop(key, 0), folio, 0)
        if nbytes:
            found.ram.append((order, nbytes // folio))
    ram.done()
    if not found.ram:
        table.wrong("ram", "no RAM at all")
    table.done()
    return found


@dataclass(slots=True)
class _Description:
    """How the description is read: where it stands and what the caller overrides."""

    file: str
    directory: Path
    nr_devices: int | None
    seed: int

    def host(self, top: _Table) -> Host:
        # All words are checked before anything is read or made.
        scratch = top.string("kho_scratch", None)
        try:
            param = None if scratch is None else parse_kho_scratch(scratch)
        except KhoError:
            top.wrong("kho_scratch", f'{scratch!r} is neither "N%" nor sizes "LOW,GLOBAL,NODE"')
        groups = [_group(table) for table in top.tables("vms")]
        names = [name for group in groups for name in group.names()]
        if len(names) > MAX_VMS:
            top.wrong("vms", f"more than {MAX_VMS} virtual machines")
        if len(set(names)) < len(names):
            twice = next(name for name, nr in Counter(names).items() if nr > 1)
            top.wrong("vms", f"two virtual machines are called {twice!r}")
        ranges = self._ranges(top)
        devices = top.table("devices") or _Table(self.file, "devices", {})
        source = devices.string("source", "synthetic")
        if source not in ("synthetic", "sysfs", "hwloc"):
            devices.wrong("source", f'{source!r} is none of "synthetic", "sysfs", "hwloc"')
        if (source == "synthetic") != bool(ranges):
            rule = "missing" if not ranges else f'comes with the devices if source = "{source}"'
            top.wrong("memory", rule)
        count = path = None
        if source == "synthetic":
            count = devices.integer("count", 0, 1, synthetic.MAX_DEVICES)
        else:
            path = devices.string("path", "/sys" if source == "sysfs" else None)
            if path is None:
                devices.wrong("path", "missing; the hwloc XML file")
        devices.done()
        top.done()

        made = self._devices(ranges, source, count, path)
        made.kho_scratch = scratch
        if groups:
            self._place(top, groups, made, param)
        return made

    def _ranges(self, top: _Table) -> list[Range]:
        # empty if the description has no memory
        memory = top.values.pop("memory", None)
        if memory is None:
            if "nodes" in top.values:
                top.wrong("nodes", "goes with memory only")
            return []
        if isinstance(memory, list):
            if "nodes" in top.values:
                top.wrong("nodes", "memory has a size for each node already")
            if not 1 <= len(memory) <= MAX_NODES:
                top.wrong("memory", f"1 to {MAX_NODES} nodes")
            sizes = [
                top.size(f"memory[{node}]", size, RANGE_ALIGN, RANGE_ALIGN)
                for node, size in enumerate(memory)
            ]
            if sum(sizes) > MAX_MEMORY:
                top.wrong("memory", f"more than {MAX_MEMORY} bytes in all")
            return stack_nodes(enumerate(sizes))
        nodes = top.integer("nodes", 1, 1, MAX_NODES)
        total = top.size("memory", memory, RANGE_ALIGN, nodes * RANGE_ALIGN)
        return stack_nodes((node, total // nodes) for node in range(nodes))

    def _devices(
        self, ranges: list[Range], source: str, count: int | None, path: str | None
    ) -> Host:
        read = None
        if path is not None:
            reader = sysfs_host.read if source == "sysfs" else hwloc.read
            read = reader(self.directory / path)
            if self.nr_devices is None:
                read.source["path"] = os.fspath(self.directory / path)
                return read
            ranges = read.ranges
        nr_devices = self.nr_devices if self.nr_devices is not None else count or 0
        tree = synthetic.generate(nr_devices, self.seed, len({node for *_, node in ranges}))
        return Host(tree, ranges, {"kind": "synthetic", "path": self.file, "devices": len(tree)})

    def _place(
        self, top: _Table, groups: list[_Group], made: Host, param: ScratchParam | None
    ) -> None:
        # RAM goes where most is left; devices come from the machine's own node while it has any.
        try:
            scratch = scratch_layout(PhysicalMemory(ranges=made.ranges), param)
        except KhoError as error:
            top.wrong("kho_scratch", str(error))
        left = dict.fromkeys((node for *_, node in made.ranges), 0)
        for start, nbytes, node in made.ranges:
            left[node] += nbytes - nbytes // KERNEL_SHARE
            left[node] -= sum(size for phys, size in scratch if start <= phys < start + nbytes)
        pools = _assignable(made.devices, len(left))
        wanted = sum(group.count * group.devices for group in groups)
        there = sum(map(len, pools))
        if wanted > there and self.nr_devices is None:
            top.wrong(
                "vms",
                f"{wanted} devices are to be assigned, {there} are bound to {ASSIGNABLE_DRIVER}",
            )
        # with another number of devices than described, all get their share of those there are
        served = given = 0
        for group in groups:
            for name in group.names():
                roomiest = max(left, key=lambda one: (left[one], -one))
                node = roomiest if group.node is None else group.node
                if node not in left:
                    group.table.wrong("node", f"the host has no node {node}")
                served += group.devices
                share = served * min(wanted, there) // max(wanted, 1) - given
                given += share
                vm = VM(name, node, list(group.ram), group.vcpus, _take(pools, node, share))
                if vm.ram_bytes > left[node]:
                    group.table.wrong(
                        "ram",
                        f"{vm.ram_bytes} bytes for {name}, but node {node} has only "
                        f"{max(left[node], 0)} left beside scratch and the kernel's own",
                    )
                left[node] -= vm.ram_bytes
                made.vms.append(vm)


def _assignable(devices: DeviceTree, nodes: int) -> list[NDArray[np.int32]]:
    # Indices of the devices that a virtual machine may be given, by node, ascending.
    if ASSIGNABLE_DRIVER not in devices.driver_names:
        return [np.zeros(0, np.int32)] * nodes
    driver = devices.driver_names.index(ASSIGNABLE_DRIVER)
    found = np.flatnonzero((devices.driver_ids == driver) & devices.alive).astype(np.int32)
    return [found[devices.nodes[found] == node] for node in range(nodes)]


def _take(pools: list[NDArray[np.int32]], node: int, n: int) -> NDArray[np.int32]:
    taken = []
    while n:
        if not len(pools[node]):
            node = max(range(len(pools)), key=lambda one: len(pools[one]))
        taken.append(pools[node][:n])
        pools[node] = pools[node][n:]
        n -= len(taken[-1])
    return np.concatenate(taken) if taken else np.zeros(0, np.int32)
