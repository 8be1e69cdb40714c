"""``luo what-if``: where blackout goes, and what it would be if something were otherwise."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luo.cli.errors import FAILED, Wrong, check_writable, write_json, wrong_input
from luo.cli.host import (
    HostSource,
    KernelSettings,
    boot,
    host_options,
    kernel_options,
    request,
    request_option,
    timeout_option,
)
from luo.dev_liveupdate import SHARE
from luo.errors import KhoNoMemoryError, LuoError
from luo.kernel import KernelImage, live_update
from luo.profile.screen import duration
from luo.profile.whatif import Answer, WhatIf
from luo.report import Report

__all__ = ["what_if"]

_NR_PARTS = 12
_WHY_NOT_WORKERS = (
    "workers share out devices of one depth that are called one by one,"
    f" if there are {2 * SHARE} of them"
)


class Faster(click.ParamType["tuple[str, float]"]):
    """A callback and how many times as fast it is, as ``nvme=2``."""

    name = "name=n"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        """Convert what the user wrote."""
        name, equals, factor = value.rpartition("=")
        try:
            if not equals or not name or not 0 < float(factor) < math.inf:
                raise ValueError
        except ValueError:
            self.fail(f"{value!r}: NAME=N is expected, as nvme=2", param, ctx)
        return name, float(factor)


@click.command("what-if")
@host_options
@request_option
@kernel_options
@click.option("--in-process", is_flag=True, help="The next kernel runs in this process.")
@click.option(
    "--repeat",
    type=click.IntRange(1, 1000),
    default=5,
    metavar="N",
    show_default=True,
    help="N live updates in a row, of which the medians count.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    metavar="K",
    help="Ask: what if K threads called the callbacks that are thread-safe?",
)
@click.option(
    "--move",
    "moves",
    multiple=True,
    metavar="NAME/REBOOT",
    help="Ask: what if this callback were in PREPARE?",
)
@click.option(
    "--faster",
    "faster",
    multiple=True,
    type=Faster(),
    metavar="NAME[/EVENT]=N",
    help="Ask: what if this callback were N times as fast?",
)
@click.option(
    "--pages",
    metavar="SIZE",
    help="Ask: what if guests had pages of SIZE, as 2MiB, where they have smaller ones?",
)
@timeout_option
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write the figures; '-' is standard output.",
)
def what_if(
    source: HostSource,
    kernels: KernelSettings,
    requests: tuple[str, ...],
    in_process: bool,
    repeat: int,
    workers: int | None,
    moves: tuple[str, ...],
    faster: tuple[tuple[str, float], ...],
    pages: str | None,
    timeout: int,
    json_file: str | None,
) -> None:
    """Say where blackout goes, and what it would be if something were otherwise.

    Live updates of a host are run and measured: of this machine unless another is named. Without a
    question the usual ones are answered; several questions are answered one by one and together.
    """
    if json_file not in (None, "-"):
        check_writable(str(json_file))
    console = Console(stderr=json_file == "-", highlight=False)
    report = Report()
    try:
        with wrong_input():
            host = source.read()
            report.kernel, image = boot(host, kernels, spans=True)
            request(report.kernel, requests, host)
        models = _measured(report, image, repeat, in_process, timeout / 1e9)
    except (KhoNoMemoryError, ValueError) as error:
        raise Wrong(str(error)) from error
    except LuoError as error:
        click.echo(f"luo: live update failed: {error}", err=True)
        sys.exit(FAILED)
    finally:
        if report.kernel is not None:
            report.kernel.close()
    with wrong_input():
        model = WhatIf.median(models)
        answers = _asked(model, workers, moves, faster, pages) or model.answers()
    document = {
        "schema": "luo-what-if/1",
        "source": host.source,
        "measured_blackout_ns": [one.blackout_ns for one in models],
        "blackout_ns": model.blackout_ns,
        "bound_ns": model.bound_ns,
        "engine_ns": model.engine,
        "chain": [asdict(link) for link in model.chain()],
        "callbacks": [asdict(part) for part in model.slack()],
        "answers": [asdict(answer) for answer in answers],
    }
    if json_file is not None:
        write_json(json_file, document)
    _show(console, document)


def _measured(
    report: Report, image: KernelImage, repeat: int, in_process: bool, timeout: float
) -> list[WhatIf]:
    """Run live updates in a row, beginning with the report's kernel, and return each one's model.

    Raises:
        LuoError: one failed.
    """
    models = []
    for _ in range(repeat):
        requested = report.kernel.devices.requested.copy()
        live_update(report.kernel, image, in_process=in_process, timeout=timeout, report=report)
        if report.error:
            raise LuoError(report.error["message"])
        models.append(WhatIf.from_report(report))
        report.kernel.devices.request(requested)
    return models


def _asked(
    model: WhatIf,
    workers: int | None,
    moves: tuple[str, ...],
    faster: tuple[tuple[str, float], ...],
    pages: str | None,
) -> list[Answer]:
    """Answer what the user asked, one by one and, if it was more than one thing, together."""
    questions: list[tuple[str, str, tuple[Any, ...]]] = [
        (f"{name} in PREPARE", "moved", (name,)) for name in moves
    ]
    questions += [(f"{name} {n:g} times as fast", "faster", (name, n)) for name, n in faster]
    if pages is not None:
        questions.append((f"{pages} pages", "with_pages", (pages,)))
    if workers is not None:
        questions.append((f"{workers} workers", "with_workers", (workers,)))
    together, answers = model, []
    for question, method, arguments in questions:
        answers.append(model.answer(question, getattr(model, method)(*arguments)))
        together = getattr(together, method)(*arguments)
    if len(questions) > 1:
        answers.append(model.answer("all of these", together))
    return answers


# ---- the screen ----


def _show(console: Console, document: Mapping[str, Any]) -> None:
    """Print the ``luo-what-if/1`` *document*."""
    blackout, answers = document["blackout_ns"] or 1, document["answers"]
    nr = len(document["measured_blackout_ns"])
    console.print(
        Text.assemble(
            ("LUO blackout ", "bold"),
            (duration(document["blackout_ns"]), "bold red"),
            (", kernel boot not included", "dim"),
            (f"; medians of {nr} updates" if nr > 1 else "", "dim"),
        )
    )
    console.print(
        _table(
            console.width,
            "the chain that bounds it",
            ("step", "device", "cost"),
            [
                (link["name"], link["device"] or _served(link["devices"]), duration(link["ns"]))
                for link in document["chain"]
            ]
            + [("however many workers", "", duration(document["bound_ns"]))],
        )
    )
    engine = [
        {"name": f"engine/{name}", "calls": 0, "ns": ns, "chain_ns": ns, "slack_ns": 0}
        for name, ns in document["engine_ns"].items()
    ]
    parts = sorted([*document["callbacks"], *engine], key=lambda part: -part["ns"])
    left = parts[_NR_PARTS:]
    rows = [
        (
            part["name"],
            f"{part['calls']:,}" if part["calls"] else "",
            duration(part["ns"]),
            f"{part['ns'] / blackout:.1%}",
            duration(part["chain_ns"]) if part["chain_ns"] else "",
            "" if part["chain_ns"] else duration(part["slack_ns"]),
        )
        for part in parts[:_NR_PARTS]
    ]
    if left:
        ns = sum(part["ns"] for part in left)
        rows.append((f"{len(left)} more", "", duration(ns), f"{ns / blackout:.1%}", "", ""))
    columns = ("part", "calls", "cost", "share", "on chain", "slack")
    console.print(_table(console.width, "where blackout goes", columns, rows))
    console.print(
        _table(
            console.width,
            "what if",
            ("question", "blackout", "saves", ""),
            [
                (
                    answer["question"],
                    duration(answer["blackout_ns"]),
                    "-" * (answer["saved_ns"] < 0) + duration(abs(answer["saved_ns"])),
                    f"{answer['saved_ns'] / blackout:.1%}",
                )
                for answer in answers
            ],
        )
    )
    if any(answer["saved_ns"] == 0 and "workers" in answer["question"] for answer in answers):
        console.print(_WHY_NOT_WORKERS, style="dim")


def _served(devices: int) -> str:
    return f"{devices:,} devices" if devices else ""


def _table(
    screen: int, title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]
) -> Table:
    """Return a table for a *screen* so wide: of words first, then of figures."""
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=None,
        header_style="dim",
        padding=(0, 1),
        pad_edge=False,
    )
    # Figures are never cut: the last column of words gets what they leave.
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    words = 2 if "device" in columns else 1
    left = screen - sum(widths) - 2 * len(widths) + widths[words - 1] + 1
    widths[words - 1] = min(widths[words - 1], max(8, left))
    for place, (name, width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(
            name,
            justify="left" if place < words else "right",
            no_wrap=True,
            overflow="ellipsis",
            width=width,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table
