"""``luo run``: a live update of a host."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from luo import drivers
from luo.cli.clock import ClockSettings, arguments, clock_options, show_missed
from luo.cli.errors import (
    FAILED,
    INTERRUPTED,
    NOT_MET,
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
    request_option,
    timeout_option,
)
from luo.errors import BudgetError, KhoNoMemoryError, LuoError
from luo.image import Image
from luo.kernel import Kernel, dry_run, live_update
from luo.kho import Handover
from luo.profile import benchmark, screen
from luo.report import Report, budget_names, describe, parse_budgets

__all__ = ["run"]


_REPEAT_WITH_BUDGET: Final = 20  # the fewest of which the 95th percentile is not the slowest


class Budgets(click.ParamType["dict[str, int]"]):
    """Limits as ``blackout=50ms,devices/nvme/REBOOT=2ms``; nanoseconds by name."""

    name = "budgets"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, int]:
        """Convert what the user wrote."""
        if isinstance(value, dict):
            return value
        try:
            return parse_budgets(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@host_options
@request_option
@kernel_options
@clock_options
@click.option(
    "--api",
    type=click.Choice(drivers.APIS),
    default=drivers.APIS[0],
    show_default=True,
    help="Design of LUO: notifiers and devices, or mainline's sessions and files.",
)
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
    default=None,
    metavar="N",
    help=f"N live updates in a row. [default: 1, {_REPEAT_WITH_BUDGET} with a budget]",
)
@click.option(
    "--budget",
    type=Budgets(),
    metavar="NAME=T,…",
    help="What a phase, as blackout=50ms, or callbacks, as devices/REBOOT=9ms or "
    "devices/nvme/REBOOT=2ms, may take: exit status 3 unless 95 % of the updates keep to it.",
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
@timeout_option
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
    clocks: ClockSettings,
    requests: tuple[str, ...],
    api: str,
    in_process: bool,
    dry_reboot: bool,
    callback_limit: int | None,
    repeat: int | None,
    budget: dict[str, int] | None,
    kernel_boot: int,
    save_file: Path | None,
    timeout: int,
    json_file: str | None,
    benchmark_file: str | None,
    exports: Exports,
) -> None:
    """Run a live update of a host, of this machine unless another is named."""
    if api == "sessions" and (clocks.virtual or callback_limit is not None):
        raise click.UsageError("--api sessions: callbacks of files have no limit and no model")
    if dry_reboot and budget:
        raise click.UsageError("--dry-reboot: there is no blackout to hold to a budget")
    repeat = repeat or (_REPEAT_WITH_BUDGET if budget else 1)
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in click.get_current_context().params.items()
        if value not in (None, ())
    } | {"repeat": repeat}
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
        costs = clocks.model(source.seed)
        doing("reading the devices")
        host = source.read()
        doing("booting the first kernel")
        report = Report(settings=settings, source=host.source)
        limit = None if callback_limit is None else callback_limit / 1e9
        spans = exports.trace is not None
        kernel, image = boot(
            host,
            kernels,
            api=api,
            callback_limit=limit,
            by_device=True,
            spans=spans,
            **arguments(costs),
        )
        request(kernel, requests, host)
        known = budget_names(kernel) if budget else []
        for name in budget or ():
            if name not in known:
                kernel.close()
                raise Wrong(f"--budget {name}: none of {', '.join(known)}")
    status, wrong = 0, ""
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
                    in_process=in_process or clocks.virtual,
                    timeout=timeout / 1e9,
                    report=report,
                )
        status = FAILED if report.error else 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    except KhoNoMemoryError as error:
        status, wrong = WRONG, str(error)
        report.error = describe(error)
    except LuoError as error:
        status = FAILED
        report.error = report.error or describe(error)
    except OSError as error:  # of --save: the update was cancelled
        raise Wrong(f"--save {save_file}: {error.strerror}") from error
    finally:
        if report.kernel is not None:
            report.kernel.close()
    if budget and status == 0:
        try:
            report.check(budget)
        except BudgetError:
            status = NOT_MET
        except ValueError as error:  # for what turned out not to be called
            status, wrong = WRONG, str(error)
    document = report.to_dict()
    if json_file is not None:
        write_json(json_file, document)
    if benchmark_file is not None:
        write_json(benchmark_file, benchmark.document(document), "--benchmark-json")
    exports.write(document, report)
    if status == WRONG:
        raise Wrong(wrong)
    screen.show(console, document, kernel_boot)
    show_missed(console, costs)
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
