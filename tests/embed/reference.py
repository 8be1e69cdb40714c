"""examples/c/simulator.c in Python: the same machine, the same callbacks, the same update."""

import errno

import numpy as np

from luo.device import Bus, Driver, LiveUpdateOps
from luo.errors import CallbackError
from luo.kernel import Kernel
from luo.liveupdate import Priority, State, Subsystem
from luo.machine import DeviceTree, Machine
from luo.memory import PhysicalMemory

REGS, PER_BRIDGE, TICKS = 32, 64, 0x1234


def devices(count):
    """Bridges with devices below them, which have registers."""
    bridges = -(-count // PER_BRIDGE)
    numbers = np.arange(count * REGS)
    regs = (numbers // REGS * 7 + numbers % REGS).astype(np.uint8)
    widths = np.repeat([0, REGS], [bridges, count])
    offsets = np.concatenate(([0], np.cumsum(widths))).astype(np.uint64)
    tree = DeviceTree()
    tree.add_many(
        [f"bridge{i}" for i in range(bridges)] + [f"dev{i}" for i in range(count)],
        [-1] * bridges + [i // PER_BRIDGE for i in range(count)],
        "pci",
        ["pcieport"] * bridges + ["sim"] * count,
        regs=(regs, offsets),
    )
    return tree


def driver(fail_at, calls):
    """The driver of the simulator."""

    def prepare(device):
        if device.index == fail_at:
            return -errno.EBUSY
        device.slot[:] = device.columns["regs"]
        calls["prepare"] += 1

    def reboot(device):
        device.slot[0] ^= 0xFF
        calls["reboot"] += 1

    def restore(device):
        regs, slot = device.columns["regs"], device.slot
        if slot[0] ^ regs[0] != 0xFF or slot[1:] != regs[1:]:
            return -errno.EIO
        calls["restore"] += 1
        device.reclaim()

    def counter(event):
        def count(device):
            calls[event] += 1

        return count

    return LiveUpdateOps(
        prepare, reboot, counter("finish"), counter("cancel"), restore, state_size=REGS
    )


def timer():
    """The subsystem, which keeps a page of its own."""

    def prepare(context):
        context.data = context.kho.alloc_preserve(4096)

    def reboot(context):
        context.memory.view(context.data, 8)[:] = TICKS.to_bytes(8, "little")

    def restore(context):
        assert bytes(context.memory.view(context.data, 8)) == TICKS.to_bytes(8, "little")

    return Subsystem(
        "timer",
        priority=Priority.AFTER_DEVICES,
        prepare=prepare,
        reboot=reboot,
        restore=restore,
        cancel=lambda context: context.kho.unpreserve_free(context.data),
        finish=lambda context: context.kho.incoming.restore_free(context.data),
    )


def run(path, mib, count, fail=-1):
    """Run it over the RAM in the file *path*, and return the lines that the program prints."""
    with open(path, "r+b") as file:
        file.truncate(mib << 20)
        memory = PhysicalMemory(mib << 20, fd=file.fileno())
    machine = Machine(memory, devices(count))
    fail_at = -(-count // PER_BRIDGE) + fail if fail >= 0 else -1
    calls = dict.fromkeys(("prepare", "reboot", "restore", "finish", "cancel"), 0)

    def kernel():
        return Kernel(
            machine,
            drivers=[Driver("sim", driver(fail_at, calls)), Driver("pcieport", LiveUpdateOps())],
            buses=[Bus("pci", LiveUpdateOps())],
            subsystems=[timer()],
        )

    lines = []
    old, new = kernel(), kernel()
    old.boot().devices.request("*")
    old.kexec_load(new)

    def state(kernel):
        lines.append(f"state {kernel.luo.state.name.lower()}")

    def event(name, call):
        try:
            call()
            lines.append(f"{name} 0")
        except CallbackError as error:
            lines.append(f"{name} {-error.errno}")

    state(old)
    event("prepare", old.luo.prepare)
    state(old)
    if old.luo.state is State.PREPARED:
        lines.append(f"preserved {old.devices.preserved.sum()}")
        running = old.kexec()
        lines.append(f"the old kernel: {-errno.ESHUTDOWN}")
        state(running)
        lines.append(f"reclaimed {running.devices.reclaimed.sum()}")
        event("finish", running.luo.finish)
        state(running)
        running.close()
    lines.append("calls " + " ".join(map(str, calls.values())))
    old.close()
    return lines
