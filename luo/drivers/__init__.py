"""What the built-in kernels run: drivers for what hosts have, and the usual subsystems.

:func:`kernel` is the factory that kernel images name; :func:`load` brings the user's own drivers.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from luo import abi
from luo.agent import STATE, Guest
from luo.device import Bus, Driver, LiveUpdateOps
from luo.device_files import DeviceFiles, flb_of, subsystem_handler
from luo.drivers import generic, pci, virtio
from luo.drivers.chain import ChainSubsystem
from luo.drivers.interrupts import Interrupts
from luo.drivers.iommu import Iommu
from luo.drivers.kvm import Kvm
from luo.drivers.mm import Regions
from luo.errors import from_errno
from luo.files import FileHandler
from luo.kernel import Kernel
from luo.notifier import Subsystem

if TYPE_CHECKING:
    from luo.machine import DeviceTree, Machine
    from luo.topology import VM

__all__ = ["APIS", "ASSIGNABLE_DRIVER", "absolute", "kernel", "load"]

#: Designs of LUO that devices can be kept by.
APIS = ("rfc1", "sessions")

#: Bound to what a virtual machine may be given.
ASSIGNABLE_DRIVER = "vfio-pci"

#: What modules bring.
Part: TypeAlias = Driver | Bus | Subsystem | FileHandler

#: By bus, the callbacks of every driver on it; other buses get the generic ones.
_OPS_BY_BUS = {"pci": pci.OPS, "virtio": virtio.OPS}


def _drivers(tree: DeviceTree) -> list[Driver]:
    """Return one built-in driver for each name that the hardware asks for."""
    made = []
    for number, name in enumerate(tree.driver_names):
        driven = np.flatnonzero(tree.driver_ids == number)
        bus = int(tree.bus_ids[driven[0]]) if driven.size else -1
        ops = _OPS_BY_BUS.get(tree.bus_names[bus] if bus >= 0 else "", generic.OPS)
        made.append(Driver(name, ops))
    return made


def kernel(
    machine: Machine,
    *,
    vms: Sequence[VM] = (),
    modules: Iterable[str | Part] = (),
    api: str = "rfc1",
    cmdline: str = "kho=on liveupdate=on",
    observer: Callable[[str, str], None] | None = None,
    memfd: bool = False,
    **settings: Any,
) -> Kernel:
    """Build a kernel with the built-in drivers and subsystems.

    Args:
        machine: the machine.
        vms: virtual machines that it starts when it boots cold; a successor has those that it is
            handed.
        modules: the user's drivers, subsystems and file handlers: where they are, as :func:`load`
            takes it, or themselves; a driver or bus of a built-in name replaces it.
        api: ``"rfc1"``: notifiers and the device layer; ``"sessions"``: mainline's sessions and
            files (:mod:`luo.device_files`).
        cmdline: as of :class:`~luo.kernel.Kernel`.
        observer: likewise.
        memfd: have it keep memfds in sessions, too; more handlers are *modules*.
        **settings: likewise: ``kho_abi``, ``behaviour``, ``quirks``…
    """
    tree = machine.devices
    drivers = {driver.name: driver for driver in _drivers(tree)}
    buses = {name: Bus(name, LiveUpdateOps()) for name in tree.bus_names}
    if api not in APIS:
        raise ValueError(f"api {api!r}: none of {', '.join(APIS)}")
    subsystems: dict[str, Subsystem] = {}
    parts: tuple[ChainSubsystem, ...] = (Regions(), Kvm(vms), Iommu(vms), Interrupts())
    for part in parts:
        subsystems[part.subsystem.name] = part.subsystem
    handlers: dict[str, FileHandler] = {}
    if memfd:
        from luo.memfd import memfd_handler

        handlers[abi.LUO_MEMFD_COMPATIBLE] = memfd_handler()
    for spec in modules:
        for thing in load(spec) if isinstance(spec, str) else (spec,):
            if isinstance(thing, FileHandler):
                handlers[thing.compatible] = thing
                continue
            kind: dict[str, Any] = (
                drivers
                if isinstance(thing, Driver)
                else buses
                if isinstance(thing, Bus)
                else subsystems
            )
            kind[thing.name] = thing
    given: dict[str, Any] = {"cmdline": cmdline, "observer": observer, **settings}
    given |= {"drivers": drivers.values(), "buses": buses.values()}
    if api == "sessions":
        return _with_sessions(machine, vms, parts, subsystems, handlers.values(), given)
    return Kernel(
        machine,
        subsystems=subsystems.values(),
        file_handlers=handlers.values() if handlers else None,
        **given,
    )


def _with_sessions(
    machine: Machine,
    vms: Sequence[VM],
    parts: Sequence[ChainSubsystem],
    subsystems: dict[str, Subsystem],
    others: Iterable[FileHandler],
    given: dict[str, Any],
) -> Kernel:
    """Build a kernel whose user space keeps devices and virtual machines by sessions.

    A subsystem that has nothing to do in the jump is an FLB of the devices, that of the IOMMU of
    those that can be assigned. A virtual machine has a file, and so has what the user brings with a
    callback for the jump.
    """
    kept = {part.name: part.subsystem for part in parts if subsystems[part.name] is part.subsystem}
    theirs = [one for name, one in subsystems.items() if name not in kept]
    moving = [one for one in theirs if one.reboot is not None]
    still = [kept[name] for name in (Regions.name, Interrupts.name) if name in kept]
    still += [one for one in theirs if one.reboot is None]
    tables = {ASSIGNABLE_DRIVER: (flb_of(kept[Iommu.name]),)} if Iommu.name in kept else {}
    files = DeviceFiles(given["drivers"], given["buses"], map(flb_of, still), tables)
    handlers = [*files.handlers, STATE, *others]
    handlers += [subsystem_handler(one.name, partial(_same, one)) for one in moving]
    guests = []
    if Kvm.name in kept:
        handlers.append(subsystem_handler(Kvm.name, lambda: Kvm().subsystem))
        guests = [Guest(vm.name, Kvm([vm]).subsystem, vm.devices) for vm in vms]
    made = Kernel(machine, file_handlers=handlers, **given)
    made.use_sessions(files, guests, moving)
    return made


def _same(subsystem: Subsystem) -> Subsystem:
    return subsystem


def load(spec: str) -> list[Part]:
    """Return the drivers, buses, subsystems and file handlers that *spec* names.

    Args:
        spec: ``MODULE``, ``MODULE:ATTR`` or ``FILE.py``, also ``FILE.py:ATTR``. Without ATTR
            everything of these types at the module's top level is taken; ATTR is one of them or
            a list of them.

    Raises:
        KhoError: ENOEXEC if there is no such module, or it fails to import, or nothing in it is
            a driver, bus, subsystem or file handler.
    """
    name, _, attribute = spec.partition(":")
    module = _import(name, spec)
    if attribute:
        try:
            found: Any = getattr(module, attribute)
        except AttributeError:
            raise from_errno(errno.ENOEXEC, f"drivers {spec}: no {attribute} in it") from None
        things = list(found) if isinstance(found, list | tuple) else [found]
    else:
        things = [v for v in vars(module).values() if isinstance(v, Part)]
    if not things:
        raise from_errno(
            errno.ENOEXEC, f"drivers {spec}: no Driver, Bus, Subsystem or FileHandler in it"
        )
    for thing in things:
        if not isinstance(thing, Part):
            raise from_errno(
                errno.ENOEXEC,
                f"drivers {spec}: {thing!r} is no Driver, Bus, Subsystem or FileHandler",
            )
    return things


def absolute(spec: str) -> str:
    """Return *spec*, as :func:`load` takes it, so that it names the same in every directory."""
    name, colon, attribute = spec.partition(":")
    return f"{Path(name).resolve()}{colon}{attribute}" if name.endswith(".py") else spec


def _import(name: str, spec: str) -> ModuleType:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = Path(name).resolve()
        if not path.is_file():
            raise from_errno(errno.ENOEXEC, f"drivers {spec}: no such file")
        loader = importlib.util.spec_from_file_location(f"luo_user_{path.stem}", path)
        assert loader is not None
        assert loader.loader is not None
        module = importlib.util.module_from_spec(loader)
        sys.modules[loader.name] = module
        loader.loader.exec_module(module)
    except OSError:
        raise
    except (Exception, SystemExit) as error:  # a script that ends itself is no drivers
        raise from_errno(
            errno.ENOEXEC, f"drivers {spec}: {type(error).__name__}: {error}"
        ) from error
    return module
