"""Kernels whose every callback is written down and can be made to fail, and what they leave."""

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from luo.device import Bus, Driver, LiveUpdateOps, batch
from luo.kernel import Kernel
from luo.kho import Handover, Kho
from luo.liveupdate import Subsystem
from luo.machine import DeviceTree, Machine

EVENTS = ("prepare", "reboot", "finish", "cancel", "restore")


def act(outcome):
    """Do what a callback was told to do: raise *outcome*, or return it."""
    if isinstance(outcome, BaseException):
        raise outcome
    if isinstance(outcome, type) and issubclass(outcome, BaseException):
        raise outcome("on purpose")
    return outcome


class Log:
    """The calls that were made, in order, and the calls that shall fail.

    Attributes:
        calls: (event, kind, name, device path or None).
        faults: what the callback does at that call, by the same key: see :func:`act`.
        hooks: called with the context or device at that call, before its outcome.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str, str | None]] = []
        self.faults: dict[tuple[str, str, str, str | None], Any] = {}
        self.hooks: dict[tuple[str, str, str, str | None], Callable[[Any], object]] = {}

    def clear(self) -> None:
        """Forget calls, faults and hooks."""
        self.calls.clear()
        self.faults.clear()
        self.hooks.clear()

    def of(self, *events: str) -> list[tuple[str, str, str, str | None]]:
        """Return the calls of these events."""
        return [call for call in self.calls if call[0] in events]

    def note(self, call, subject):
        """Write *call* down, and do what it was told to."""
        self.calls.append(call)
        if call in self.hooks:
            self.hooks[call](subject)
        return act(self.faults.get(call))

    # ---- who is called ----

    def subsystem(self, name: str, events: Iterable[str] = EVENTS, **kwargs: Any) -> Subsystem:
        """Return a subsystem with a callback for each of *events*."""

        def make(event):
            return lambda context: self.note((event.upper(), "subsystem", name, None), context)

        return Subsystem(name, **{event: make(event) for event in events}, **kwargs)

    def ops(
        self,
        kind: str,
        name: str,
        *,
        size: Any = 0,
        batched: bool = False,
        events: Iterable[str] = EVENTS,
    ) -> LiveUpdateOps:
        """Return a table with a callback for each of *events*, which save and check content."""

        def make(event):
            upper = event.upper()

            def single(device):
                slot = device.slot if kind == "driver" else device.bus_slot
                work(upper, device, slot)
                return self.note((upper, kind, name, device.path), device)

            def several(devices):
                results = np.zeros(len(devices), np.int32)
                for place, device in enumerate(devices):
                    work(upper, device, memoryview(devices.slots[place]))
                    outcome = self.note((upper, kind, name, device.path), device)
                    results[place] = 0 if outcome is None else outcome
                return results

            return batch(several) if batched else single

        def work(event, device, slot):
            if event == "PREPARE":
                slot[:] = content(kind, device.path, len(slot))
            elif event == "REBOOT" and len(slot):
                slot[0] = 0xEE
            elif event == "RESTORE":
                expected = bytearray(len(slot))
                if "prepare" in events:
                    expected[:] = content(kind, device.path, len(slot))
                if expected and "reboot" in events:
                    expected[0] = 0xEE
                if bytes(slot) != bytes(expected):
                    raise AssertionError(f"{kind} slot of {device.path} is {bytes(slot)[:16]!r}")
                device.reclaim()

        return LiveUpdateOps(state_size=size, **{event: make(event) for event in events})


def content(kind: str, path: str, nbytes: int) -> bytes:
    """Return the bytes that a callback of *kind* saves for the device at *path*."""
    seed = zlib.crc32(f"{kind} {path}".encode()) | 1
    return (
        (np.arange(nbytes, dtype=np.uint64) * np.uint64(seed) >> np.uint64(5))
        .astype(np.uint8)
        .tobytes()
    )


# ---- machines ----


def forest(shape: dict[str, tuple[str | None, str | None]]) -> DeviceTree:
    """Return a tree of devices: {path: (bus, driver)}, parents first."""
    tree = DeviceTree()
    for path, (bus, driver) in shape.items():
        parent, _, name = path.rpartition("/")
        tree.add(name, parent or None, bus, driver, state=path.encode())
    return tree


#: A host bridge, a port with two functions behind it, and a disk beside it.
SMALL = {
    "pci0": (None, None),
    "pci0/port": ("pci", "portdrv"),
    "pci0/port/nic0": ("pci", "nic"),
    "pci0/port/nic1": ("pci", "nic"),
    "pci0/disk": ("pci", "nvme"),
}


def small_machine(memory: Any = "64MiB") -> Machine:
    """Return a machine with the devices of :data:`SMALL`."""
    return Machine(memory, forest(SMALL))


def small_kernel(machine: Machine, log: Log, subsystems: Iterable[Any] = (), **kwargs: Any):
    """Return a kernel of *machine* with a logging driver and bus for every device."""
    return Kernel(
        machine,
        drivers=[
            Driver("portdrv", log.ops("driver", "portdrv")),
            Driver("nic", log.ops("driver", "nic", size=24)),
            Driver("nvme", log.ops("driver", "nvme", size=40)),
        ],
        buses=[Bus("pci", log.ops("bus", "pci", size=8))],
        subsystems=subsystems,
        **kwargs,
    )


# ---- what is there ----


def subtrees(kho: Kho) -> dict[str, tuple[bytes, bytes]]:
    """Return the raw properties of each subtree of the root tree, by name."""
    if not kho.root_bytes:  # there is none before it is finalized
        return {}
    return {
        node.name: tuple(bytes(value) for value in node.properties.values())
        for node in kho.root.root.children
    }


def snapshot(kernel: Kernel) -> dict[str, Any]:
    """Return all that a failed update must leave as it was."""
    phys, orders = kernel.memory.free_blocks()
    kept, kept_orders = kernel.kho.preserved()
    devices = kernel.devices
    return {
        "state": kernel.luo.state.name,
        "requested": devices.requested.tolist(),
        "preserved": devices.preserved.tolist(),
        "reclaimed": devices.reclaimed.tolist(),
        "slots": slots_exist(kernel),
        "free_pages": kernel.memory.nr_free_pages(),
        "free_blocks": list(zip(phys.tolist(), orders.tolist(), strict=True)),
        "kept": list(zip(kept.tolist(), kept_orders.tolist(), strict=True)),
        "subtrees": subtrees(kernel.kho),
    }


def settled(kernel: Kernel) -> dict[str, Any]:
    """Return :func:`snapshot` after a cancelled update.

    Pages of the map may stay, as in Linux, and the segment in scratch that the image will need.
    """
    if kernel.kho.generation.finalize is None:
        kernel.kho.handover()
    else:  # what is handed over is written by an update
        kernel.luo.prepare()
        kernel.luo.reboot()
        kernel.kho.handover()
        kernel.luo.cancel()
    pages = kernel.memory.nr_free_pages() + kernel.kho.tree_pages
    kernel.luo.prepare()
    kernel.luo.cancel()
    assert kernel.memory.nr_free_pages() + kernel.kho.tree_pages == pages
    return snapshot(kernel)


def slots_exist(kernel: Kernel) -> bool:
    """Return whether a device of *kernel* has a slot at present."""
    for device in kernel.devices:
        try:
            device.slot
        except OSError:
            return False
        return True
    return False


def errno_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int | None:
    """Return the errno with which *call* is refused, None if it is not."""
    try:
        call(*args, **kwargs)
    except OSError as error:
        return error.errno
    return None


def updated(kernel: Kernel, successor: Kernel) -> Kernel:
    """Live update *kernel* to *successor* in this process, up to UPDATED."""
    kernel.kexec_load(successor)
    if kernel.luo.state.name == "NORMAL":
        kernel.luo.prepare()
    return kernel.kexec()


def hand_over(kho: Kho) -> Handover:
    """Finalize *kho* where its generation has that, and return the four numbers."""
    if kho.generation.finalize is not None and not kho.finalized:
        kho.finalize()
    return kho.handover()


def plain_kernel(machine: Machine, drivers: dict[str, Any], buses: dict[str, Any], **kwargs: Any):
    """Return a kernel of *machine*; an owner is given as its table (or None), or as itself."""

    def made(cls, owners):
        return [
            owner if isinstance(owner, cls) else cls(name, owner) for name, owner in owners.items()
        ]

    return Kernel(machine, drivers=made(Driver, drivers), buses=made(Bus, buses), **kwargs)


def leave(kernel: Kernel):
    """Prepare and reboot *kernel*, let it go, and return the handover for any kernel's boot()."""
    kernel.luo.prepare()
    kernel.luo.reboot()
    handover = kernel.kho.handover()
    kernel.close()
    return handover
