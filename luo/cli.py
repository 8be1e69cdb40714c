"""The ``luo`` command: the only place that knows options, screens and exit statuses.

Exit status: 0 done, 1 the live update failed, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from luo import abi, drivers, workloads
from luo.cli_errors import FAILED, INTERRUPTED, WRONG, Wrong, wrong_input
from luo.cli_image import image as image_commands
from luo.cli_quirks import quirks as quirk_commands
from luo.errors import KhoNoMemoryError, LuoError
from luo.image import Image
from luo.kernel import Kernel, KernelImage, live_update
from luo.kho import Handover
from luo.profile import screen
from luo.report import Report, describe, parse_duration, version
from luo.topology import Host, hwloc
from luo.topology import host as sysfs_host

__all__ = ["main"]


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


class _OneLine(click.Group):
    """A group whose errors are one line on standard error."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run, and exit."""
        # A shell starts background jobs with SIGINT ignored; an update must still roll back.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            click.echo(f"luo: {error.format_message()}", err=True)
            status = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            status = INTERRUPTED
        sys.exit(status if isinstance(status, int) else 0)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@click.group(
    cls=_OneLine, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(version(), prog_name="luo")
def main() -> None:
    """Live updates of a Linux host: what survives the reboot, what it costs, and what fails."""


main.add_command(image_commands)
main.add_command(quirk_commands)


@main.command()
@click.option("--preset", type=click.Choice(workloads.PRESETS), help="A ready-made host.")
@click.option(
    "--devices",
    type=click.IntRange(1, 16_000_000),
    metavar="N",
    help="N generated devices in place of the host's.",
)
@click.option(
    "--sysfs",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Devices of the /sys tree at DIR, which may come from another host.",
)
@click.option(
    "--hwloc",
    "hwloc_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Devices of a host as 'lstopo --of xml' wrote it.",
)
@click.option(
    "--host",
    "host_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A host described in TOML.",
)
@click.option(
    "--request",
    "requests",
    multiple=True,
    metavar="GLOB",
    help="Keep the devices whose path matches. [default: all with a driver and a bus]",
)
@click.option(
    "--drivers",
    "modules",
    multiple=True,
    metavar="MODULE[:ATTR]|FILE.py",
    help="Your own drivers and subsystems, in both kernels.",
)
@click.option("--in-process", is_flag=True, help="The next kernel runs in this process.")
@click.option(
    "--repeat",
    type=click.IntRange(1, 100_000),
    default=1,
    metavar="N",
    help="N live updates in a row.",
)
@click.option(
    "--kernel-boot",
    type=Duration(),
    default=0,
    metavar="T",
    help="Draw a modelled boot of the kernel, as 1.2s.",
)
@click.option(
    "--kho-abi",
    type=click.Choice(list(abi.GENERATIONS)),
    default="kho-v4",
    show_default=True,
    help="Generation of the handover.",
)
@click.option(
    "--kho-bug",
    "kho_bugs",
    multiple=True,
    type=click.Choice([bug for known in abi.GENERATIONS.values() for bug in known.bugs]),
    help="Repeat a mistake that this generation's kernels made.",
)
@click.option(
    "--save",
    "save_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write what the first kernel hands over; see 'luo image'.",
)
@click.option("--seed", type=int, default=0, metavar="S", help="Seed of a generated preset.")
@click.option(
    "--timeout",
    type=Duration(),
    default="60s",
    metavar="T",
    show_default=True,
    help="For the next kernel's answers.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write the figures; '-' is standard output.",
)
def run(
    preset: str | None,
    devices: int | None,
    sysfs: Path | None,
    hwloc_file: Path | None,
    host_file: Path | None,
    requests: tuple[str, ...],
    modules: tuple[str, ...],
    in_process: bool,
    repeat: int,
    kernel_boot: int,
    kho_abi: str,
    kho_bugs: tuple[str, ...],
    save_file: Path | None,
    seed: int,
    timeout: int,
    json_file: str | None,
) -> None:
    """Run a live update of a host, of this machine unless another is named."""
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in click.get_current_context().params.items()
        if value not in (None, ())
    }
    sources = [
        name
        for name, value in (
            ("--preset", preset),
            ("--sysfs", sysfs),
            ("--hwloc", hwloc_file),
            ("--host", host_file),
        )
        if value is not None
    ]
    if len(sources) > 1:
        raise click.UsageError(f"{' and '.join(sources)}: name one host")
    if devices is not None and (sysfs is not None or hwloc_file is not None):
        raise click.UsageError(f"--devices: {sources[0]} says which devices there are")
    if json_file not in (None, "-"):
        _check_writable(str(json_file))
    if save_file is not None:
        _check_writable(str(save_file), "--save")
    # The document has standard output for itself.
    console = Console(stderr=json_file == "-", highlight=False)
    with _progress() as doing, wrong_input():
        doing("reading the devices")
        host = _host(preset, devices, sysfs, hwloc_file, host_file, seed)
        doing("booting the first kernel")
        report = Report(settings=settings, source=host.source)
        abi.generation(kho_abi).check_bugs(kho_bugs)
        kernel, image = _boot(host, modules, {"kho_abi": kho_abi, "kho_bugs": kho_bugs}, doing)
        _request(kernel, requests, host)
    status = 0
    try:
        with _progress() as doing:
            _observe(kernel, doing)
            if save_file is not None:
                kernel.on_handover = partial(_save, kernel, save_file)
            doing("starting the next kernel")
            live_update(
                kernel,
                image,
                repeat=repeat,
                in_process=in_process,
                timeout=timeout / 1e9,
                report=report,
            )
        status = FAILED if report.error else 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except KhoNoMemoryError as error:
        status = WRONG
        report.error = describe(error)
    except LuoError as error:
        status = FAILED
        report.error = report.error or describe(error)
    except OSError as error:  # of --save: the update was cancelled
        raise Wrong(f"--save {save_file}: {error.strerror}") from error
    finally:
        if report.kernel is not None:
            report.kernel.close()
    document = report.to_dict()
    if json_file is not None:
        _write(json_file, json.dumps(document, indent=2))
    if status == WRONG:
        raise Wrong(document["error"]["message"])
    screen.show(console, document, kernel_boot)
    if host.skipped:
        console.print(f"{host.skipped:,} attributes were unreadable and skipped", style="dim")
    sys.exit(status)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show what is being done, while it is done, on a terminal."""
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda what: progress.update(task, description=what)


def _observe(kernel: Kernel, doing: Callable[[str], None]) -> None:
    kernel.observer = lambda what, name: doing(f"{what} {name}")


def _save(kernel: Kernel, path: Path, handover: Handover) -> None:
    """Write what *kernel* is about to hand over."""
    assert kernel.kho is not None
    memory = kernel.machine.memory
    Image.from_memory(memory, handover, abi=kernel.kho.abi, bugs=kernel.kho.bugs).save(path)


def _host(
    preset: str | None,
    devices: int | None,
    sysfs: Path | None,
    hwloc_file: Path | None,
    host_file: Path | None,
    seed: int,
) -> Host:
    if sysfs is not None:
        return sysfs_host.read(str(sysfs))
    if hwloc_file is not None:
        return hwloc.read(str(hwloc_file))
    name = str(host_file) if host_file is not None else preset or "host"
    return workloads.host(name, devices=devices, seed=seed)


def _boot(
    host: Host, modules: tuple[str, ...], handover: dict[str, Any], doing: Callable[[str], None]
) -> tuple[Kernel, KernelImage]:
    """Boot the first kernel cold, and name the image of the next."""
    cmdline = "kho=on liveupdate=on"
    if host.kho_scratch:
        cmdline += f" kho_scratch={host.kho_scratch}"
    machine = host.machine()
    # A file's drivers must be found by the second process too, whatever its directory is.
    found = [str(Path(spec).resolve()) if spec.endswith(".py") else spec for spec in modules]
    arguments = {"modules": found, "cmdline": cmdline, **handover}
    kernel = drivers.kernel(machine, vms=host.vms, **arguments)
    image = KernelImage("luo.drivers:kernel", args=arguments)
    return kernel.boot(), image


def _request(kernel: Kernel, requests: tuple[str, ...], host: Host) -> None:
    where = host.source["path"]
    if requests:
        for glob in requests:
            if not kernel.devices.tree.match(glob).any():
                raise ValueError(f"--request {glob}: no device of {where} matches")
            kernel.devices.request(glob)
    else:
        owned = (kernel.devices.driver_ids >= 0) & (kernel.devices.bus_ids >= 0)
        kernel.devices.request(owned & kernel.devices.eligible())
    if not np.any(kernel.devices.requested):
        raise ValueError(f"{where}: no device that can be kept; see --request and --drivers")


def _check_writable(path: str, option: str = "--json") -> None:
    """Refuse a file that cannot be written before the run, not after it."""
    at = path if os.path.exists(path) else os.path.dirname(path) or "."
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise Wrong(f"{option} {path}: {os.strerror(errno.ENOENT)}")
    if not os.access(at, os.W_OK):
        raise Wrong(f"{option} {path}: {os.strerror(errno.EACCES)}")


def _write(path: str, text: str) -> None:
    if path == "-":
        click.echo(text)
        return
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise Wrong(f"--json {path}: {error.strerror}") from error
