"""``luo quirks``: where RFC v1's code does not do what it means, and how to see it."""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Literal

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luo.cli.errors import Wrong
from luo.demonstrations import run
from luo.quirks import MAINLINE_QUIRKS, QUIRKS, Quirk

__all__ = ["quirks"]


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="The list as JSON.")
@click.pass_context
def quirks(context: click.Context, as_json: bool) -> None:
    """List where the code of RFC v1, or of Linux 7.3, does not do what it means.

    A is the gravest.
    """
    if context.invoked_subcommand is not None:
        if as_json:
            raise click.UsageError(f"--json: not with {context.invoked_subcommand}")
        return
    known = (*QUIRKS.values(), *MAINLINE_QUIRKS.values())
    if as_json:
        rows = [dataclasses.asdict(quirk) for quirk in known]
        click.echo(json.dumps({"schema": "luo-quirks/1", "quirks": rows}, indent=1))
        return
    table = _table("", "name", "sev", "what goes wrong")
    for quirk in known:
        table.add_row(str(quirk.number or "7.3"), quirk.name, quirk.severity, quirk.wrong)
    Console(highlight=False).print(table)


@quirks.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="All of them, in order.")
def show(name: str | None, every: bool) -> None:
    """Run the shortest sequence that shows the quirk NAME, without it and with it.

    NAME is a name or a number of the list that 'luo quirks' prints.
    Lines that end differently are marked with an asterisk.
    """
    if every == (name is not None):
        raise click.UsageError("show: name a quirk, or --all")
    chosen = list(QUIRKS.values()) if name is None else [_named(name)]
    console = Console(highlight=False)
    for place, quirk in enumerate(chosen):
        if place:
            console.print()
        _show(console, quirk)


def _named(text: str) -> Quirk:
    """Return the quirk of that name, in letters of any case, or of that number."""
    name = text.lower()
    if name in MAINLINE_QUIRKS:
        raise Wrong(f"quirk {name}: of Linux 7.3's sessions, which no sequence here shows")
    for quirk in QUIRKS.values():
        if name in (quirk.name, str(quirk.number)):
            return quirk
    near = difflib.get_close_matches(name, QUIRKS, 1, 0.6)
    if near:
        raise Wrong(f"quirk {text}: there is none of that name; did you mean {near[0]}?")
    raise Wrong(f"quirk {text}: there is none; 'luo quirks' lists them")


def _show(console: Console, quirk: Quirk) -> None:
    console.print(f"{quirk.number} {quirk.name}", style="bold")
    console.print(f"intended: {quirk.intended}\nrfc1: {quirk.wrong}", markup=False)
    intended, rfc1 = run(quirk.name), run(quirk.name, quirks=(quirk.name,))
    table = _table("", "step", "intended", "rfc1", "")
    steps = 0
    for meant, does in zip(intended, rfc1, strict=True):
        steps += meant.step
        differs = meant.seen != does.seen
        table.add_row(
            str(steps) if meant.step else "",
            Text(meant.text if meant.step else f"  {meant.text}"),
            Text(meant.seen, "green" if differs else ""),
            Text(does.seen, "red" if differs else ""),
            Text("*" if differs else "", "bold red"),
        )
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if place else "right"
        table.add_column(column, overflow="fold", justify=justify, no_wrap=column == "name")
    return table
