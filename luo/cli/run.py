"""``luo run``: a live update of a host."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from luo.cli.errors import (
    FAILED,
    INTERRUPTED,
    WRONG,
    Wrong,
    check_writable,
    write_json,
    wrong_input,
)
from luo.cli.export import Exports, export_options
from luo.cli.host import (
    Duration,
    HostSource,
    KernelSettings,
    boot,
    host_options,
    kernel_options,
    request,
)
from luo.errors import KhoNoMemoryError, LuoError
from luo.image import Image
from luo.kernel import Kernel, dry_run, live_update
from luo.kho import Handover
from luo.profile import benchmark, screen
from luo.report import Report, describe

__all__ = ["run"]


@click.command()
@host_options
@click.option(
    "--request",
    "requests",
    multiple=True,
    metavar="GLOB",
    help="Keep the devices whose path matches. [default: all with a driver and a bus]",
)
@kernel_options
@click.option("--in-process", is_flag=True, help="The next kernel runs in this process.")
@click.option(
    "--dry-reboot",
    is_flag=True,
    help="PREPARE and REBOOT, and then cancel instead of the jump: for authors of drivers.",
)
@click.option(
    "--callback-limit",
    type=Duration(),
    default=None,
    metavar="T",
    help="A callback that takes longer fails.",
)
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
    "--save",
    "save_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write what the first kernel hands over; see 'luo image'.",
)
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
@click.option(
    "--benchmark-json",
    "benchmark_file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write the phases of all updates as pytest-benchmark does; '-' is standard output.",
)
@export_options
def run(
    source: HostSource,
    kernels: KernelSettings,
    requests: tuple[str, ...],
    in_process: bool,
    dry_reboot: bool,
    callback_limit: int | None,
    repeat: int,
    kernel_boot: int,
    save_file: Path | None,
    timeout: int,
    json_file: str | None,
    benchmark_file: str | None,
    exports: Exports,
) -> None:
    """Run a live update of a host, of this machine unless another is named."""
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in click.get_current_context().params.items()
        if value not in (None, ())
    }
    if dry_reboot and (repeat > 1 or save_file is not None or benchmark_file is not None):
        raise click.UsageError("--dry-reboot: there is no jump, so nothing to repeat, save or time")
    on_stdout = [*exports.files.values(), json_file, benchmark_file].count("-")
    if on_stdout > 1:
        raise click.UsageError("standard output holds one document, not more")
    exports.check()
    for option, file in (
        ("--json", json_file),
        ("--benchmark-json", benchmark_file),
        ("--save", save_file),
    ):
        if file not in (None, "-"):
            check_writable(str(file), option)
    # The document has standard output for itself.
    console = Console(stderr=bool(on_stdout), highlight=False)
    with _progress() as doing, wrong_input():
        doing("reading the devices")
        host = source.read()
        doing("booting the first kernel")
        report = Report(settings=settings, source=host.source)
        limit = None if callback_limit is None else callback_limit / 1e9
        kernel, image = boot(host, kernels, callback_limit=limit, spans=exports.trace is not None)
        request(kernel, requests, host)
    status = 0
    try:
        with _progress() as doing:
            _observe(kernel, doing)
            if save_file is not None:
                kernel.on_handover = partial(_save, kernel, save_file)
            if dry_reboot:
                dry_run(kernel, report=report)
            else:
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
        write_json(json_file, document)
    if benchmark_file is not None:
        write_json(benchmark_file, benchmark.document(document), "--benchmark-json")
    exports.write(document, report)
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
