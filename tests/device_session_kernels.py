"""Kernels that keep the small set of devices by sessions, for tests; also in a second process."""

import errno

from rig import SMALL, Log, forest

from luo.agent import STATE, Guest
from luo.device import Bus, Driver
from luo.device_files import DeviceFiles, subsystem_handler
from luo.kernel import Kernel
from luo.machine import Machine


def machine(memory="64MiB", shape=None):
    """Return a machine with the small set of devices, or another."""
    return Machine(memory, forest(shape or SMALL))


def owners(log, batched=False, events=None):
    """Return logging drivers and buses for the small set."""
    more = {"batched": batched} | ({} if events is None else {"events": events})
    return {
        "drivers": [
            Driver("portdrv", log.ops("driver", "portdrv", **more)),
            Driver("nic", log.ops("driver", "nic", size=24, **more)),
            Driver("nvme", log.ops("driver", "nvme", size=40, **more)),
        ],
        "buses": [Bus("pci", log.ops("bus", "pci", size=8, **more))],
    }


def notifiers(machine, log=None, batched=False, **kwargs):
    """Return a kernel that keeps devices as RFC v1 does."""
    return Kernel(machine, **owners(log or Log(), batched), **kwargs)


def sessions(machine, log=None, batched=False, flbs=(), guests=(), subsystems=(), **kwargs):
    """Return the same kernel, whose user space keeps devices by sessions."""
    given = owners(log or Log(), batched) | kwargs
    files = DeviceFiles(given["drivers"], given["buses"], flbs)
    handlers = [*files.handlers, STATE]
    handlers += [subsystem_handler(one.name, lambda one=one: one) for one in subsystems]
    kinds = {guest.subsystem.name: guest.subsystem for guest in guests}
    handlers += [subsystem_handler(name, lambda one=one: one) for name, one in kinds.items()]
    kernel = Kernel(machine, file_handlers=handlers, **given)
    kernel.use_sessions(files, guests, subsystems)
    return kernel


def guest(log, name, devices):
    """Return a guest whose subsystem is written down."""
    return Guest(name, log.subsystem(f"kvm-{name}"), devices)


def reluctant(machine):
    """Return a kernel with sessions that takes the disk over and does not let it go on."""
    log = Log()
    log.faults["PREPARE", "driver", "nvme", "pci0/disk"] = OSError(errno.EPIPE, "on purpose")
    return sessions(machine, log)
