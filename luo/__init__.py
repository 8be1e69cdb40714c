"""Linux Live Update Orchestrator and Kexec HandOver, as a user-space engine.

The names below are what programs use; each lives in a module of its own, whose docstring says
more: :mod:`luo.machine` and :mod:`luo.kernel` for the two lifecycles, :mod:`luo.device` and
:mod:`luo.notifier` for what takes part, :mod:`luo.session` for mainline's sessions of files,
:mod:`luo.kho`, :mod:`luo.memory` and :mod:`luo.fdt` for
the bytes underneath.
"""

from typing import Any

try:
    import luo._kho as _kho  # noqa: F401, tried here so that the message is ours
except ModuleNotFoundError as error:
    if error.name != "luo._kho":
        raise
    raise ImportError(
        f"the compiled core of luo is missing in {__path__[0]}: this is a source tree that has "
        "not been built. Run 'make build' and use .venv/bin/python from another directory, or "
        "'python setup.py build_ext --inplace'"
    ) from None

from luo.device import Bus, Device, DeviceBatch, Devices, Driver, LiveUpdateOps, batch, native
from luo.errors import (
    BudgetError,
    CallbackError,
    FdtError,
    HandoverError,
    HostCrashError,
    KernelPanic,
    KhoBusyError,
    KhoError,
    KhoExistsError,
    KhoNoMemoryError,
    KhoNotFoundError,
    LuoError,
    StateError,
    SuccessorError,
)
from luo.fdt import Column, Fdt, FdtEditor, FdtWriter
from luo.files import FileArgs, FileHandler
from luo.flb import Flb, FlbArgs
from luo.kernel import Kernel, KernelImage, RemoteKernel, live_update
from luo.kho import Handover, Kho, KhoNode, radix_decode, radix_key
from luo.liveupdate import CancelResult, FinishResult, Orchestrator
from luo.machine import DeviceTree, Machine
from luo.memfd import memfd_handler
from luo.memory import PhysicalMemory, parse_size
from luo.notifier import Context, Event, Priority, State, Step, Subsystem
from luo.report import Report, version
from luo.session import DeviceNode, LiveUpdate, Session

__all__ = [
    "BudgetError",
    "Bus",
    "CallbackError",
    "CancelResult",
    "Column",
    "Context",
    "Device",
    "DeviceBatch",
    "DeviceNode",
    "DeviceTree",
    "Devices",
    "Driver",
    "Event",
    "Fdt",
    "FdtEditor",
    "FdtError",
    "FdtWriter",
    "FileArgs",
    "FileHandler",
    "FinishResult",
    "Flb",
    "FlbArgs",
    "Handover",
    "HandoverError",
    "HostCrashError",
    "Kernel",
    "KernelImage",
    "KernelPanic",
    "Kho",
    "KhoBusyError",
    "KhoError",
    "KhoExistsError",
    "KhoNoMemoryError",
    "KhoNode",
    "KhoNotFoundError",
    "LiveUpdate",
    "LiveUpdateOps",
    "LuoError",
    "Machine",
    "Orchestrator",
    "PhysicalMemory",
    "Priority",
    "RemoteKernel",
    "Report",
    "Session",
    "State",
    "StateError",
    "Step",
    "Subsystem",
    "SuccessorError",
    "batch",
    "get_include",
    "live_update",
    "memfd_handler",
    "native",
    "parse_size",
    "radix_decode",
    "radix_key",
]


def get_include() -> str:
    """Return the directory of ``luo.h``, for compilers."""
    return f"{__path__[0]}/include"


def __getattr__(name: str) -> Any:
    if name == "__version__":  # looked up when it is asked for: metadata takes long to import
        return version()
    if name == "workloads":  # with all built-in drivers and topologies, for who asks
        import luo.workloads

        return luo.workloads
    raise AttributeError(f"module 'luo' has no attribute {name!r}")
