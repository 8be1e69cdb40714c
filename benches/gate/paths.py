"""The hot paths whose instructions are counted: ``python paths.py LIBRARY`` runs each once.

LIBRARY is ``gate.c``, compiled. Without valgrind nothing is counted, and what is checked of each
result is checked all the same.
"""

import ctypes
import errno
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

import luo
from luo.topology import synthetic

DEVICES = 20_000
NODES = 20_000
CALLS = 2_000
RANDOM_PAGES = 100_000
PAGES_IN_ORDER = 1 << 20
MEMORY = "16GiB"
PAGE = 4096
STATE_BYTES = 64
SEED = 1


class Counter:
    """Requests to callgrind, which counts between them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def dump(self, path: str) -> None:
        """What was counted until now belongs to *path*."""
        self._library.dump(path.encode())

    @contextmanager
    def counting(self, path: str) -> Iterator[None]:
        """Count the block; *path* is its name, or that of what follows the last :meth:`dump`."""
        gc.collect()
        self._library.start()
        try:
            yield
        finally:
            self._library.dump(path.encode())
            self._library.stop()


# ---- flattened device trees ----


def fdt(counter: Counter) -> None:
    """Write nodes from columns and by call, check them, and read them back into columns."""
    rows = np.random.default_rng(SEED).integers(0, 256, (NODES, 104), np.uint8)
    properties = {
        "compatible": b"luo,gate\0",
        "phys": rows[:, :8],
        "size": rows[:, 8:16],
        "state": rows[:, 16:80],
        "bus": rows[:, 80:],
    }
    writer = luo.FdtWriter()
    writer.begin_node("")
    with counter.counting("fdt: write nodes from columns"):
        writer.add_nodes(("dev", 0, NODES), properties)
    writer.end_node()
    blob = bytes(writer.finish())
    with counter.counting("fdt: check a blob"):
        tree = luo.Fdt(blob)
    with counter.counting("fdt: read nodes into columns"):
        columns = tree.read_nodes("/")
    assert columns["name"].strings()[-1] == f"dev{NODES - 1}"
    assert (columns["state"].fixed() == rows[:, 16:80]).all()

    children = tree.root.children
    with counter.counting("fdt: index children by name"):
        last = children[f"dev{NODES - 1}"]
    names = [f"dev{number}" for number in range(CALLS)]
    with counter.counting("fdt: look children up by name"):
        found = [children[name] for name in names]
    assert last == children[-1]
    assert [node.name for node in found] == names

    values = [row.tobytes() for row in rows[:CALLS]]
    writer = luo.FdtWriter()
    writer.begin_node("")
    with counter.counting("fdt: write nodes, one call a node and property"):
        for name, value in zip(names, values, strict=True):
            writer.begin_node(name)
            writer.property("compatible", b"luo,gate\0")
            writer.property("state", value)
            writer.end_node()
    writer.end_node()
    assert len(luo.Fdt(writer.finish()).root.children) == CALLS


# ---- preserved memory ----


def outside_scratch(kho: luo.Kho, pages: np.ndarray) -> np.ndarray:
    """Return the addresses of *pages* that may be preserved."""
    phys = pages.astype(np.uint64) * np.uint64(PAGE)
    for start, nbytes in kho.scratch:
        phys = phys[(phys < start) | (phys >= start + nbytes)]
    return phys


def memory_map(counter: Counter) -> None:
    """Preserve pages in bulk, at random and in order, and one by one; decode; publish kho-v1."""
    everywhere = np.random.default_rng(SEED).permutation(np.arange(1, 4 << 20))[:RANDOM_PAGES]
    for abi in ("kho-v4", "kho-v1"):
        kho = luo.Kho(luo.PhysicalMemory(MEMORY), abi=abi)
        random = outside_scratch(kho, everywhere)
        before = kho.preserved_pages
        with counter.counting(f"map: {abi}, preserve at random"):
            kho.preserve_folios(random, 0)
        assert kho.preserved_pages == before + len(random)
        room = len(random) + CALLS  # for what KHO keeps itself
        out = np.empty(room, np.uint64), np.empty(room, np.uint8)
        with counter.counting(f"map: {abi}, decode"):
            phys, orders = kho.preserved(out)
        assert np.isin(random, phys[orders == 0]).all()
        assert len(phys) < room
        if abi == "kho-v1":
            with counter.counting("map: kho-v1, publish"):
                kho.finalize()
        kho.close()

    kho = luo.Kho(luo.PhysicalMemory(MEMORY))
    in_order = outside_scratch(kho, np.arange(1 << 20, (1 << 20) + PAGES_IN_ORDER))
    before = kho.preserved_pages
    with counter.counting("map: preserve in order"):
        kho.preserve_folios(in_order, 0)
    assert kho.preserved_pages == before + len(in_order)
    one_by_one = [int(phys) for phys in outside_scratch(kho, np.arange(3 << 20, (3 << 20) + CALLS))]
    with counter.counting("map: preserve, one call a folio"):
        for address in one_by_one:
            kho.preserve_folio(address, 0)
    assert kho.preserved_pages == before + len(in_order) + len(one_by_one)


# ---- live updates ----

SAVED = np.arange(STATE_BYTES, dtype=np.uint8)
STATE = SAVED.tobytes()


def save(dev: luo.Device) -> None:
    dev.slot[:] = STATE


def patch(dev: luo.Device) -> None:
    dev.slot[:8] = STATE[:8]


def restore(dev: luo.Device) -> None:
    if dev.slot != STATE:
        raise OSError(errno.EIO, "another state")
    dev.reclaim()


def farewell(dev: luo.Device) -> None:
    pass


@luo.batch
def save_all(devices: luo.DeviceBatch) -> None:
    devices.slots[:] = SAVED


@luo.batch
def restore_all(devices: luo.DeviceBatch) -> None:
    devices.reclaim((devices.slots == SAVED).all(axis=1))


def ops_of(library: ctypes.CDLL) -> dict[str, luo.LiveUpdateOps]:
    """Return callbacks by kind; batches have none for REBOOT, which shows what the engine takes."""
    native = {
        event: luo.native(getattr(library, event))
        for event in ("save", "patch", "farewell", "restore")
    }
    return {
        "batch callbacks": luo.LiveUpdateOps(save_all, restore=restore_all, state_size=STATE_BYTES),
        "native callbacks": luo.LiveUpdateOps(
            native["save"],
            native["patch"],
            native["farewell"],
            restore=native["restore"],
            state_size=STATE_BYTES,
        ),
        "Python callbacks": luo.LiveUpdateOps(
            save, patch, farewell, restore=restore, state_size=STATE_BYTES
        ),
    }


def update(counter: Counter, kind: str, ops: luo.LiveUpdateOps) -> None:
    """Count each phase of an update whose drivers all have *ops*."""
    machine = luo.Machine(MEMORY, synthetic.generate(DEVICES, SEED))
    tree = machine.devices

    def build() -> luo.Kernel:
        return luo.Kernel(
            machine,
            drivers=[luo.Driver(name, ops) for name in tree.driver_names],
            buses=[luo.Bus(name, luo.LiveUpdateOps()) for name in tree.bus_names],
        )

    def phase(what: str, name: str) -> None:
        # the end of what came before
        if (what, name) == ("phase", "boot"):
            counter.dump(f"{kind}: validate")
        elif (what, name) == ("phase", "restore"):
            counter.dump(f"{kind}: boot")

    kernel, successor = build().boot(), build()
    kernel.devices.request((tree.driver_ids >= 0) & (tree.bus_ids >= 0))
    successor.observer = phase
    kernel.on_handover = lambda handover: counter.dump(f"{kind}: REBOOT")
    kernel.kexec_load(successor)
    with counter.counting(f"{kind}: PREPARE"):
        kernel.luo.prepare()
    preserved = int(kernel.devices.preserved.sum())
    with counter.counting(f"{kind}: restore"):
        kernel = kernel.kexec()
    reclaimed = int(kernel.devices.reclaimed.sum())
    with counter.counting(f"{kind}: FINISH"):
        finished = kernel.luo.finish()
    kernel.close()
    assert finished == luo.FinishResult((), ())
    assert preserved == reclaimed > DEVICES // 2


def main(path: str) -> None:
    """Run every path once."""
    library = ctypes.CDLL(path)
    counter = Counter(library)
    gc.disable()
    fdt(counter)
    memory_map(counter)
    for kind, ops in ops_of(library).items():
        update(counter, kind, ops)


if __name__ == "__main__":
    main(sys.argv[1])
