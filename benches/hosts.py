"""Machines for the benchmarks of a live update, and what it leaves in memory.

A host of *n* devices is a synthetic one in which exactly n devices have a driver and a bus, with 64
bytes of state each; the few ancestors that have none come along. A random 1 % of them is bound to
the driver ``patched``, which alone has a reboot callback: it writes 8 of the 64 bytes anew.
"""

import errno
import sys
from functools import cache
from typing import Any

import numpy as np
import peers

import luo
from luo import abi, agent
from luo.device_files import DeviceFiles
from luo.fdt import Fdt
from luo.topology import synthetic

SEED = 1
STATE = bytes(range(64))
PATCH = b"rebooted"
PATCHED = PATCH + STATE[len(PATCH) :]
PATCHED_DRIVER = "patched"
_STATE_ROW, _PATCH_ROW, _PATCHED_ROW = (np.frombuffer(b, np.uint8) for b in (STATE, PATCH, PATCHED))

# ---- the same work: once a device from Python, once for many, once a device in C ----


def save(dev: luo.Device) -> None:
    dev.slot[:] = STATE


def patch(dev: luo.Device) -> None:
    dev.slot[: len(PATCH)] = PATCH


def restore(dev: luo.Device) -> int:
    if dev.slot != STATE:
        return -errno.EIO
    dev.reclaim()
    return 0


def restore_patched(dev: luo.Device) -> int:
    if dev.slot != PATCHED:
        return -errno.EIO
    dev.reclaim()
    return 0


def nothing(dev: luo.Device) -> None:
    pass


@luo.batch
def save_all(devices: luo.DeviceBatch) -> None:
    devices.slots[:] = _STATE_ROW


@luo.batch
def patch_all(devices: luo.DeviceBatch) -> None:
    devices.slots[:, : len(PATCH)] = _PATCH_ROW


@luo.batch
def restore_all(devices: luo.DeviceBatch) -> None:
    devices.reclaim((devices.slots == _STATE_ROW).all(axis=1))


@luo.batch
def restore_all_patched(devices: luo.DeviceBatch) -> None:
    devices.reclaim((devices.slots == _PATCHED_ROW).all(axis=1))


@luo.batch
def nothing_all(devices: luo.DeviceBatch) -> None:
    pass


@cache
def callbacks(kind: str) -> dict[str, Any]:
    """Return the callbacks of a kind: ``python``, ``batch`` or ``native``.

    ``python, batch restore`` is for sets so large that restoring them one by one would take all the
    time there is.

    Raises:
        AbsentError: native ones cannot be compiled.
    """
    if kind == "python":
        return {
            "save": save,
            "patch": patch,
            "restore": restore,
            "restore patched": restore_patched,
            "nothing": nothing,
        }
    if kind == "python, batch restore":
        one, many = callbacks("python"), callbacks("batch")
        return one | {name: many[name] for name in ("restore", "restore patched")}
    if kind == "batch":
        return {
            "save": save_all,
            "patch": patch_all,
            "restore": restore_all,
            "restore patched": restore_all_patched,
            "nothing": nothing_all,
        }
    native = peers.find("native")
    native.state[:], native.patch[:] = STATE, PATCH
    return {
        "save": native.callback("save"),
        "patch": native.callback("patch"),
        "restore": native.callback("restore"),
        "restore patched": native.callback("restore", len(PATCH)),
        "nothing": native.callback("nothing"),
    }


# ---- kernels ----


def ops(kind: str, patched: bool) -> luo.LiveUpdateOps:
    """Return the callbacks of a driver; of ``patched``, or of another."""
    calls = callbacks(kind)
    return luo.LiveUpdateOps(
        calls["save"],
        calls["patch"] if patched else None,
        calls["nothing"],
        restore=calls["restore patched" if patched else "restore"],
        state_size=len(STATE),
    )


def drivers(tree: luo.DeviceTree, kind: str) -> list[luo.Driver]:
    """Return a driver for each name in *tree*."""
    return [luo.Driver(name, ops(kind, name == PATCHED_DRIVER)) for name in tree.driver_names]


def build(machine: luo.Machine, kind: str, api: str = "rfc1") -> luo.Kernel:
    """Build a kernel, not booted; also what a second process is started from."""
    tree = machine.devices
    given = {
        "drivers": drivers(tree, kind),
        "buses": [luo.Bus(name, luo.LiveUpdateOps()) for name in tree.bus_names],
    }
    if api == "rfc1":
        return luo.Kernel(machine, **given)
    files = DeviceFiles(given["drivers"], given["buses"])
    kernel = luo.Kernel(machine, file_handlers=[*files.handlers, agent.STATE], **given)
    kernel.use_sessions(files)
    return kernel


class Host:
    """A host of *n* devices, and clones of it with a kernel before PREPARE."""

    def __init__(self, n: int) -> None:
        tree, owned = _synthetic(n)
        chosen = np.flatnonzero(owned)[:n]
        self.requested = np.zeros(len(owned), np.bool_)
        self.requested[chosen] = True
        drivers = tree.driver_ids.copy()
        share = np.random.default_rng(SEED).choice(chosen, max(1, n // 100), replace=False)
        drivers[share] = len(tree.driver_names)
        devices = luo.DeviceTree()
        devices.add_many(
            tree.names,
            tree.parents,
            (tree.bus_ids, tree.bus_names),
            (drivers, [*tree.driver_names, PATCHED_DRIVER]),
        )
        self.machine = luo.Machine("16GiB", devices)
        self.order = devices.preserve_order(self.requested)
        self.driven = self.order[devices.driver_ids[self.order] >= 0]
        self.patched = share

    def loaded(self, kind: str, processes: int = 1, api: str = "rfc1") -> luo.Kernel:
        """Return a kernel before PREPARE, its successor loaded and memory touched."""
        machine = self.machine.clone()
        kernel = build(machine, kind, api).boot()
        kernel.devices.request(self.requested)
        if processes == 1:
            kernel.kexec_load(build(machine, kind, api))
        else:
            kernel.kexec_load(luo.KernelImage("hosts:build", args={"kind": kind}))
        return kernel

    def check_saved(self, kernel: luo.Kernel) -> None:
        """Check what PREPARE must leave: state, flags, slots."""
        assert kernel.luo.state is luo.State.PREPARED
        assert int(kernel.devices.preserved.sum()) == len(self.order)
        for index in (*self.driven[:: max(1, len(self.driven) // 64)], *self.patched[:8]):
            assert bytes(kernel.devices[int(index)].slot) == STATE

    def check_restored(self, kernel: Any) -> None:
        """Check what the update must leave: restore compares every slot, and reclaims what fits."""
        assert kernel.luo.state is luo.State.UPDATED
        assert not kernel.arrival.result["failures"]
        assert kernel.arrival.result["reclaimed"] == len(self.order)


def _synthetic(n: int) -> tuple[luo.DeviceTree, np.ndarray]:
    total = n + n // 4 + 64
    while True:
        tree = synthetic.generate(total, SEED)
        owned = (tree.driver_ids >= 0) & (tree.bus_ids >= 0)
        if int(owned.sum()) >= n:
            return tree, owned
        total += total // 16


# ---- what is in memory ----


def records(kernel: luo.Kernel) -> tuple[peers.Columns, int]:
    """Return the device records of a kernel after REBOOT, and the bytes of their shards.

    Found as the next kernel finds them: root tree, LUO's blob, chain of shards (``luo.abi``).
    """
    memory = kernel.memory
    subtree = kernel.kho.root.node(f"/{abi.LUO_NODE}")
    blob = Fdt(memory.view(_u64(subtree["preserved-data"]), _u64(subtree["blob-size"])))
    at = _u64(blob.node("/devices")["records"])
    parts: list[dict[str, Any]] = []
    nbytes = 0
    while at:
        block = memory.view(at, memory.page_size)
        following, count = abi.KHO_BLOCK_SER.unpack_from(block)
        entries = np.frombuffer(block, np.uint64, 4 * count, abi.KHO_BLOCK_SER.size).reshape(-1, 4)
        for phys, size, *_ in entries.tolist():
            shard = Fdt(memory.view(phys, size), check=False)
            parts.append(shard.read_nodes("/"))
            nbytes += shard.totalsize
        at = following
    return columns_of(parts), nbytes


def columns_of(parts: list[dict[str, Any]]) -> peers.Columns:
    """Join columns of :meth:`luo.Fdt.read_nodes` one below the other."""
    joined: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        columns = [part[name] for part in parts]
        sizes = np.concatenate([np.diff(column.offsets) for column in columns])
        offsets = np.zeros(len(sizes) + 1, np.uint64)
        np.cumsum(sizes, out=offsets[1:])
        joined[name] = (
            np.concatenate([column.data for column in columns]),
            offsets,
            np.concatenate([column.present for column in columns]).view(np.uint8),
        )
    data, offsets, _ = joined.pop("name")
    if len(data) and data[int(offsets[1]) - 1]:  # each name gets the NUL that C wants
        data = np.insert(data, offsets[1:].astype(np.int64), 0)
        offsets = offsets + np.arange(len(offsets), dtype=np.uint64)
    return peers.Columns((data, offsets), dict(joined))


def _u64(value: Any) -> int:
    return int.from_bytes(bytes(value), sys.byteorder)
