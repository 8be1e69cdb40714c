"""``luo faults``: every callback fails in every way, and nothing may be half preserved."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from luo import drivers
from luo.cli.errors import FAILED, INTERRUPTED, check_writable, write_json, wrong_input
from luo.cli.host import HostSource, KernelSettings, host_options, image_of, kernel_options
from luo.errors import CallbackError
from luo.faults import KINDS, FaultReport, FaultRow, Violation, run
from luo.faults.trial import COMPLETED, CRASHED, ROLLED_BACK, unused
from luo.files import FileHandler
from luo.kernel import KernelImage
from luo.quirks import QUIRKS
from luo.topology import Host

__all__ = ["faults"]

_MARKS: Final = {ROLLED_BACK: "↩", COMPLETED: "✓", CRASHED: "☠"}
_SHOWN: Final = 5  # sequences; the document has them all


@click.command()
@host_options
@click.option(
    "--request",
    "requests",
    multiple=True,
    metavar="GLOB",
    help="Only devices whose path matches take part. [default: all that can be kept]",
)
@kernel_options
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(KINDS),
    help="Only faults of this kind. [default: every kind]",
)
@click.option("--pairs", is_flag=True, help="Also two faults in one update.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write every update and its outcome; '-' is standard output.",
)
def faults(
    source: HostSource,
    requests: tuple[str, ...],
    kernels: KernelSettings,
    kinds: tuple[str, ...],
    pairs: bool,
    json_file: str | None,
) -> None:
    """Update a host once for every callback, event and kind of fault.

    After each update either everything is as before or the update is complete. If not, the exit
    status is 1, and the shortest sequence is printed that shows it; with --behaviour or --quirk,
    by the name of the quirk behind it, which is then switched off for what follows.
    """
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in click.get_current_context().params.items()
        if value not in (None, ())
    }
    if json_file not in (None, "-"):
        check_writable(str(json_file))
    console = Console(stderr=json_file == "-", highlight=False)
    report = FaultReport(settings=settings)
    try:
        with _interruptible() as stopped, _quiet(), _progress() as progress, wrong_input():
            host = source.read()
            image = image_of(host, kernels)
            _require_use(host, image)

            def tell(done: int, total: int, what: str) -> None:
                if stopped:  # a callback of a rollback took the interrupt for its own
                    raise KeyboardInterrupt
                progress.update(task, completed=done, total=total or None, description=what)

            task = progress.add_task("reading the devices", total=None)
            try:
                run(
                    image,
                    host.machine,
                    first=partial(drivers.kernel, vms=host.vms, **image.args),
                    requests=requests,
                    kinds=kinds or KINDS,
                    pairs=pairs,
                    progress=tell,
                    report=report,
                )
            except CallbackError as error:
                click.echo(f"luo: without a fault: {error}", err=True)
                sys.exit(FAILED)
    except KeyboardInterrupt:
        if not report.rows:
            sys.exit(INTERRUPTED)
    if json_file is not None:
        write_json(json_file, report.to_dict())
    _show(console, report)
    if report.interrupted:
        sys.exit(INTERRUPTED)
    sys.exit(0 if report.ok else FAILED)


def _require_use(host: Host, image: KernelImage) -> None:
    """Refuse drivers of the user's that no device has: nothing would be tested."""
    parts = [part for spec in image.args["modules"] for part in drivers.load(spec)]
    names = {
        f"{type(part).__name__.lower()} {part.name}"
        for part in parts
        if not isinstance(part, FileHandler)
    }
    if names and names <= set(unused(image.build(host.machine()))):
        raise ValueError(f"{host.source['path']}: no device has {', '.join(sorted(names))}")


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Note ^C, besides raising it: a rollback collects whatever its callbacks raise."""
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log of the faults off the screen, unless somebody has asked for it."""
    handler = logging.NullHandler()
    logging.getLogger("luo").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("luo").removeHandler(handler)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        MofNCompleteColumn(),
        BarColumn(20),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


# ---- the screen ----


def _show(console: Console, report: FaultReport) -> None:
    console.print(_table(report))
    marks = ", ".join(f"{mark} {words}" for words, mark in _MARKS.items())
    console.print(f"{marks}, ✗ violated; with the number of updates", style="dim")
    if report.unused:
        console.print(f"no device has: {', '.join(report.unused)}", style="dim")
    if report.uncovered:
        console.print(f"never called: {', '.join(report.uncovered)}", style="yellow")
    if report.quirks:
        console.print(_quirks(report))
    for violation in report.violations[: None if report.quirks else _SHOWN]:
        _sequence(console, violation)
    more = len(report.violations) - _SHOWN
    if more > 0 and not report.quirks:
        console.print(f"{more} more; --json FILE has them all", style="dim")
    callbacks = sum(kind not in ("kernel", "image") for kind, _, _ in report.callbacks)
    updates = f"{len(report.rows)} update{'s' * (len(report.rows) != 1)}"
    text = f"{updates}, {callbacks} callbacks: "
    if report.violations:
        console.print(text + _verdict(report), style="bold red")
    else:
        console.print(text + "nothing was ever half preserved", style="green")
    if report.interrupted:
        console.print("interrupted: the rest was not tried", style="yellow")


def _verdict(report: FaultReport) -> str:
    """Return how many updates violated, and how few sequences that comes down to."""
    updates = sum(bool(row.violations) for row in report.rows)
    sequences = len(report.violations)
    return (
        f"{updates} update{'s' * (updates > 1)} violated, "
        f"{sequences} sequence{'s' * (sequences > 1)} show{'s' * (sequences == 1)} "
        f"{'them all' if updates > 1 else 'it'}"
    )


def _table(report: FaultReport) -> Table:
    """Return a line for each callback and event, and a column for each kind of fault."""
    lines: dict[tuple[str, str, str], dict[str, list[FaultRow]]] = {}
    for row in report.rows:
        cells = lines.setdefault((row.event or "no fault", row.kind, row.name), {})
        cells.setdefault(row.fault, []).append(row)
    kinds = [kind for kind in KINDS if any(kind in cells for cells in lines.values())]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("event", no_wrap=True)
    table.add_column("callback of", no_wrap=True, overflow="ellipsis")
    for kind in kinds:
        table.add_column(kind, no_wrap=True, min_width=len(kind))
    for (event, kind, name), cells in lines.items():
        if "" in cells:
            table.add_row("", name, _cell(cells[""]))
            continue
        who = f"{kind} {name}" if kind in ("driver", "bus") else name
        table.add_row(event, who, *(_cell(cells.get(kind, [])) for kind in kinds))
    return table


def _cell(rows: list[FaultRow]) -> Text:
    violated = sum(bool(row.violations) for row in rows)
    if violated:
        return Text(f"✗{violated}", "bold red")
    found = Counter(_MARKS[row.outcome] for row in rows)
    return Text(" ".join(f"{mark}{count}" for mark, count in found.items()), "green")


def _quirks(report: FaultReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="quirks that violate")
    for name in ("", "name", "sev", "what goes wrong"):
        table.add_column(name)
    for quirk in (known for name, known in QUIRKS.items() if name in report.quirks):
        table.add_row(str(quirk.number), quirk.name, quirk.severity, quirk.wrong)
    return table


def _sequence(console: Console, violation: Violation) -> None:
    names = ", ".join(violation.quirks)
    console.print(Text(f"{names}: " if names else "").append("the shortest sequence", "bold"))
    for number, step in enumerate(violation.sequence, 1):
        console.print(Text(f" {number:2} {step}"))
    for check, text in violation.checks:
        console.print(Text.assemble((f"    {check}: ", "red"), text))
    console.print()
