"""Kernel images for tests: factories that the second process imports by name.

What goes wrong goes wrong in here, in the process of the kernel that is wrong.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from rig import SMALL, Log, forest, small_kernel, snapshot

from luo.device import Bus, Driver, LiveUpdateOps, batch
from luo.errors import HandoverError, KernelPanic
from luo.kernel import Kernel
from luo.liveupdate import Priority, Subsystem
from luo.machine import Machine

NO_FACTORY = 3


def machine(memory="64MiB"):
    """Return a machine with the small set of devices."""
    return Machine(memory, forest(SMALL))


def plain(machine, **kwargs):
    """Return a kernel that does what it should."""
    return small_kernel(machine, Log(), **kwargs)


#: The small set, three more functions, and a console whose driver knows no live update.
EVERY = {
    **SMALL,
    **{f"pci0/port/nic{number}": ("pci", "nic") for number in (2, 3, 4)},
    "console": (None, "tty"),
}


def every_machine():
    """Return a machine with a device for each kind of callback."""
    return Machine("64MiB", forest(EVERY))


def every(machine, **kwargs):
    """Return a kernel with each kind of callback: batches, sizes, probe, shutdown, subsystems."""
    log = Log()
    nvme = Driver(
        "nvme",
        log.ops("driver", "nvme", size=lambda device: 40),
        probe=lambda device: None,
        shutdown=lambda device: None,
    )
    tty = Driver("tty", probe=lambda device: None, shutdown=lambda device: None)
    nic = log.ops("driver", "nic", size=batch(lambda devices: 24), batched=True)
    given = {
        "drivers": [Driver("portdrv", log.ops("driver", "portdrv")), Driver("nic", nic), nvme, tty],
        "buses": [Bus("pci", log.ops("bus", "pci", size=8))],
        "subsystems": [
            log.subsystem("early", priority=Priority.BEFORE_DEVICES),
            log.subsystem("amid"),
            log.subsystem("late", priority=Priority.AFTER_DEVICES),
        ],
    }
    return Kernel(machine, **{**given, **kwargs})


def few(machine):
    """Return a kernel of one driver and one subsystem."""
    log = Log()
    disk = Driver("nvme", log.ops("driver", "nvme", size=40))
    pci = Bus("pci", LiveUpdateOps())
    return Kernel(machine, drivers=[disk], buses=[pci], subsystems=[log.subsystem("late")])


def end():
    """Die at once, as a kernel does that hangs for good."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


# ---- that cannot be loaded ----


def no_kernel(machine):
    """Return something else."""
    return object()


def raises(machine):
    """Fail to build."""
    raise RuntimeError("on purpose")


def exits(machine):
    """Call for the end of the process, politely."""
    sys.exit(7)


def leaves(machine):
    """End the process with a status."""
    os._exit(7)


def killed(machine):
    """Die while it is loaded."""
    end()


def sleeps(machine, seconds):
    """Take its time."""
    time.sleep(seconds)
    return plain(machine)


def writes(machine):
    """Write to memory that is not its own yet."""
    machine.memory.view(0x100000, 8)[:] = b"too soon"
    return plain(machine)


def boots(machine):
    """Do not wait."""
    return plain(machine).boot()


# ---- that do not take over ----


def dies_waiting(machine, when):
    """Die once a file called *when* is there."""

    def wait():
        while not Path(when).exists():
            time.sleep(0.01)
        end()

    threading.Thread(target=wait, daemon=True).start()
    return plain(machine)


def dies_validating(machine):
    """Die when asked whether the handover is good."""
    kernel = plain(machine)
    kernel.validate = lambda handover: end()
    return kernel


def refuses(machine):
    """Find the handover wrong."""
    kernel = plain(machine)

    def validate(handover):
        raise HandoverError("refused on purpose", 0x1234)

    kernel.validate = validate
    return kernel


def breaks_validating(machine):
    """Have a bug in the check."""
    kernel = plain(machine)
    kernel.validate = lambda handover: 1 // 0
    return kernel


def panics_validating(machine):
    """Panic at the sight of it."""
    kernel = plain(machine)

    def validate(handover):
        raise KernelPanic("on purpose")

    kernel.validate = validate
    return kernel


def late(machine, seconds):
    """Check the handover slowly."""
    kernel = plain(machine)
    check = kernel.validate

    def validate(handover):
        time.sleep(seconds)
        return check(handover)

    kernel.validate = validate
    return kernel


def off(machine):
    """Have live update off."""
    return plain(machine, cmdline="kho=on")


# ---- that die after the commit point ----


def dies_taking_over(machine):
    """Die before the first write."""
    kernel = plain(machine)
    kernel.take_over = lambda plan, verify=False: end()
    return kernel


def breaks_taking_over(machine):
    """Have a bug where there is no way back."""
    kernel = plain(machine)
    kernel.take_over = lambda plan, verify=False: 1 // 0
    return kernel


def dies_restoring(machine):
    """Die in a restore callback."""
    return plain(machine, subsystems=[Subsystem("bad", restore=lambda context: end())])


def dies_finishing(machine):
    """Die in FINISH."""
    return plain(machine, subsystems=[Subsystem("bad", finish=lambda context: end())])


# ---- that tell ----


def fails(machine, event, outcome=-16):
    """Fail in the callback for *event* of one driver."""
    log = Log()
    log.faults[event, "driver", "nvme", "pci0/disk"] = outcome
    return small_kernel(machine, log)


def failing(machine, fail):
    """Fail in callbacks of drivers for all their devices: [event, driver, outcome] each."""
    log = Log()
    for event, driver, outcome in fail:
        for path, (_bus, bound) in SMALL.items():
            if bound == driver:
                log.faults[event, "driver", driver, path] = outcome
    return small_kernel(machine, log)


def slow(machine, event, marker):
    """Take a minute in the callback for *event* of one driver, once a file says that it began."""

    def wait(device):
        Path(marker).touch()
        time.sleep(60)

    log = Log()
    log.hooks[event, "driver", "nvme", "pci0/disk"] = wait
    return small_kernel(machine, log)


def gated(machine, event, began, gate, outcome=None, **kwargs):
    """Wait in the callback for *event* of one driver until a file called *gate* is there.

    A file called *began* says that it waits; *outcome* is what it returns.
    """
    key = event, "driver", "nvme", "pci0/disk"

    def wait(device):
        Path(began).touch()
        while not Path(gate).exists():
            time.sleep(0.005)

    log = Log()
    log.hooks[key], log.faults[key] = wait, outcome
    return small_kernel(machine, log, **kwargs)


def waits_for_itself(machine, began):
    """Ask for the state in a PREPARE callback, which waits for ever under a quirk of RFC v1."""

    def read(context):
        Path(began).touch()
        with context.kernel.luo.read_state():
            pass

    subsystem = Subsystem("selfish", prepare=read)
    return small_kernel(machine, Log(), [subsystem], quirks=["callback-deadlock"])


def everything(kernel: Kernel) -> dict:
    """Return all that a kernel has of the one before it, in JSON values."""
    memory, incoming = kernel.memory, kernel.kho.incoming
    phys, orders = memory.allocated_blocks()
    seen = snapshot(kernel) | {
        "allocated": [phys.tolist(), orders.tolist()],
        "scratch": memory.scratch,
        "tree_pages": kernel.kho.tree_pages,
        "data": [part.context.data for part in kernel.luo._chain],
    }
    if incoming is not None:
        phys, orders = incoming.unrestored()
        seen["unrestored"] = [phys.tolist(), orders.tolist()]
        seen["incoming"] = sorted(incoming.subtrees().items())
    if seen["slots"]:
        seen["bytes"] = [
            [bytes(device.slot).hex(), bytes(device.bus_slot).hex()] for device in kernel.devices
        ]
    return json.loads(json.dumps(seen, default=bytes.hex))


def telling(machine, out):
    """Write everything to the file *out*, one line after RESTORE and one after FINISH."""

    def tell(context):
        with Path(out).open("a") as file:
            file.write(json.dumps(everything(context.kernel)) + "\n")

    def keep(context):
        context.data = context.kho.alloc_preserve(10_000)
        context.memory.view(context.data, 10_000)[:] = b"*" * 10_000

    def drop(context):
        context.kho.unpreserve_free(context.data)

    def take(context):
        assert bytes(context.memory.view(context.data, 10_000)) == b"*" * 10_000
        context.kho.incoming.restore_free(context.data)

    first = Subsystem(
        "teller", priority=Priority.BEFORE_DEVICES, restore=tell, finish=tell
    )  # called last in both
    keeper = Subsystem("keeper", prepare=keep, cancel=drop, finish=take)
    return small_kernel(machine, Log(), [first, keeper])
