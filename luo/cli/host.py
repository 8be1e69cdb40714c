"""What the commands that boot a kernel share: options for the host, and for its kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click
import numpy as np

from luo import abi, drivers, workloads
from luo.kernel import Kernel, KernelImage
from luo.quirks import BEHAVIOURS, generation_of, resolve
from luo.report import parse_duration
from luo.topology import Host, hwloc
from luo.topology import host as sysfs_host

__all__ = [
    "Duration",
    "HostSource",
    "KernelSettings",
    "boot",
    "collected",
    "host_options",
    "image_of",
    "kernel_options",
    "request",
    "request_option",
    "timeout_option",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Duration(click.ParamType["int"]):
    """A time as ``1.2s`` or ``300ms``; nanoseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert what the user wrote."""
        if isinstance(value, int):
            return value
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@dataclass(frozen=True, slots=True)
class HostSource:
    """Which host the user named; this machine unless another.

    Attributes:
        preset, devices, sysfs, hwloc_file, host_file, seed: the options.
    """

    preset: str | None
    devices: int | None
    sysfs: Path | None
    hwloc_file: Path | None
    host_file: Path | None
    seed: int

    def __post_init__(self) -> None:
        named = [name for name in _SOURCES if getattr(self, name) is not None]
        words = [_SOURCES[name] for name in named]
        if len(words) > 1:
            raise click.UsageError(f"{' and '.join(words)}: name one host")
        if self.devices is not None and named and named[0] in ("sysfs", "hwloc_file"):
            raise click.UsageError(f"--devices: {words[0]} says which devices there are")

    def read(self) -> Host:
        """Read the host, or make it.

        Raises:
            OSError, ValueError: it cannot be read; one clear line.
        """
        if self.sysfs is not None:
            return sysfs_host.read(str(self.sysfs))
        if self.hwloc_file is not None:
            return hwloc.read(str(self.hwloc_file))
        name = str(self.host_file) if self.host_file is not None else self.preset or "host"
        return workloads.host(name, devices=self.devices, seed=self.seed)


_SOURCES = {
    "preset": "--preset",
    "sysfs": "--sysfs",
    "hwloc_file": "--hwloc",
    "host_file": "--host",
}


@dataclass(frozen=True, slots=True)
class KernelSettings:
    """How the user wants the kernels.

    Attributes:
        modules, kho_abi, kho_bugs, behaviour, quirks: the options.
    """

    modules: tuple[str, ...]
    kho_abi: str | None
    kho_bugs: tuple[str, ...]
    behaviour: str
    quirks: tuple[str, ...]

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of :func:`luo.drivers.kernel`; JSON values.

        Raises:
            ValueError: the generation has not the bug, or cannot express the quirk.
        """
        kho_abi = generation_of(self.behaviour, self.kho_abi)
        abi.generation(kho_abi).check_bugs(self.kho_bugs)
        resolve(self.behaviour, self.quirks, kho_abi)
        return {
            # A file's drivers must be found by the second process too, whatever its directory is.
            "modules": [drivers.absolute(spec) for spec in self.modules],
            "kho_abi": kho_abi,
            "kho_bugs": list(self.kho_bugs),
            "behaviour": self.behaviour,
            "quirks": list(self.quirks),
        }


_HOST_OPTIONS = (
    click.option("--preset", type=click.Choice(workloads.PRESETS), help="A ready-made host."),
    click.option(
        "--devices",
        type=click.IntRange(1, 16_000_000),
        metavar="N",
        help="N generated devices in place of the host's.",
    ),
    click.option(
        "--sysfs",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Devices of the /sys tree at DIR, which may come from another host.",
    ),
    click.option(
        "--hwloc",
        "hwloc_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Devices of a host as 'lstopo --of xml' wrote it.",
    ),
    click.option(
        "--host",
        "host_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A host described in TOML.",
    ),
    click.option("--seed", type=int, default=0, metavar="S", help="Seed of a generated preset."),
)

_KERNEL_OPTIONS = (
    click.option(
        "--drivers",
        "modules",
        multiple=True,
        metavar="MODULE[:ATTR]|FILE.py",
        help="Your own drivers and subsystems, in every kernel.",
    ),
    click.option(
        "--kho-abi",
        type=click.Choice(list(abi.GENERATIONS)),
        help="Generation of the handover. [default: kho-v4; kho-v5-series for rfc1]",
    ),
    click.option(
        "--kho-bug",
        "kho_bugs",
        multiple=True,
        type=click.Choice([bug for known in abi.GENERATIONS.values() for bug in known.bugs]),
        help="Repeat a mistake that this generation's kernels made.",
    ),
    click.option(
        "--behaviour",
        type=click.Choice(BEHAVIOURS),
        default=BEHAVIOURS[0],
        show_default=True,
        help="What RFC v1 meant, or what its code does.",
    ),
    click.option(
        "--quirk",
        "quirks",
        multiple=True,
        metavar="[-]NAME",
        help="Switch one quirk of RFC v1 on, or off with '-'; see 'luo quirks'.",
    ),
)


#: What of the host is kept, as :func:`request` takes it.
request_option = click.option(
    "--request",
    "requests",
    multiple=True,
    metavar="GLOB",
    help="Keep the devices whose path matches. [default: all with a driver and a bus]",
)

#: How long the next kernel may be silent, in nanoseconds.
timeout_option = click.option(
    "--timeout",
    type=Duration(),
    default="60s",
    metavar="T",
    show_default=True,
    help="For the next kernel's answers.",
)


def host_options(command: _Command) -> _Command:
    """Give *command* the options that name a host, as one argument ``source``."""
    return cast("_Command", collected(command, _HOST_OPTIONS, "source", HostSource))


def kernel_options(command: _Command) -> _Command:
    """Give *command* the options of the kernels, as one argument ``kernels``."""
    return cast("_Command", collected(command, _KERNEL_OPTIONS, "kernels", KernelSettings))


def collected(command: Any, options: tuple[Any, ...], name: str, kind: type[Any]) -> Any:
    """Give *command* the *options*, as one argument *name* of type *kind*."""

    @wraps(command)
    def called(**given: Any) -> Any:
        values = {field.name: given.pop(field.name) for field in fields(kind)}
        return command(**given, **{name: kind(**values)})

    for option in reversed(options):
        called = option(called)
    return called


def boot(host: Host, kernels: KernelSettings, **more: Any) -> tuple[Kernel, KernelImage]:
    """Boot the first kernel of *host* cold, and name the image of the next.

    Args:
        host: the host.
        kernels: what both kernels are.
        **more: further keyword arguments of :func:`luo.drivers.kernel`; JSON values.
    """
    image = image_of(host, kernels, **more)
    return workloads.first_kernel(host, image).boot(), image


def image_of(host: Host, kernels: KernelSettings, **more: Any) -> KernelImage:
    """Name the image of a kernel for *host*; its arguments are as of :func:`boot`."""
    return workloads.image_of(host, **kernels.arguments(), **more)


def request(kernel: Kernel, requests: tuple[str, ...], host: Host) -> None:
    """Request the devices that match *requests*, or all that have a driver and a bus.

    Raises:
        ValueError: there is none.
    """
    where = host.source["path"]
    if requests:
        for glob in requests:
            if not kernel.devices.tree.match(glob).any():
                raise ValueError(f"--request {glob}: no device of {where} matches")
            kernel.devices.request(glob)
    else:
        workloads.request_all(kernel)
    if not np.any(kernel.devices.requested):
        raise ValueError(f"{where}: no device that can be kept; see --request and --drivers")
