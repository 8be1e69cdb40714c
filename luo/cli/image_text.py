"""Texts that ``luo image`` and its parts share, and the options that say what PATH is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich import box
from rich.table import Table

from luo import abi
from luo.handover import Handover

__all__ = [
    "abi_option",
    "count_text",
    "memory_options",
    "new_table",
    "path_argument",
    "printable",
    "size_text",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])

abi_option = click.option(
    "--abi",
    "name",
    type=click.Choice(list(abi.GENERATIONS)),
    help="Read it as this generation's, whatever it says itself.",
)


def path_argument(name: str) -> Callable[[Any], Any]:
    """Return an argument that is a path."""
    return click.argument(name, type=click.Path(path_type=Path))


def _number(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else int(value, 0)
    except ValueError:
        raise click.BadParameter(f"{value!r}: not a number") from None


def _four(ctx: click.Context, param: click.Parameter, value: str | None) -> Handover | None:
    if value is None:
        return None
    try:
        numbers = [int(part, 0) for part in value.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 4) or not all(0 <= number < 1 << 64 for number in numbers):
        raise click.BadParameter(f"{value!r}: not FDT,LEN,SCRATCH,LEN, nor FDT,LEN")
    return Handover(*(numbers if len(numbers) == 4 else [*numbers, 0, 0]))


def memory_options(command: _Command) -> _Command:
    """Add ``base`` and ``handover``, for PATHs that are a guest's memory."""
    add_base = click.option(
        "--base",
        callback=_number,
        metavar="ADDRESS",
        help="PATH is raw memory (QEMU's pmemsave) from here on. [default: found out]",
    )
    add_handover = click.option(
        "--handover",
        callback=_four,
        metavar="FDT,LEN,SCRATCH,LEN",
        help="PATH is memory, and the handover is there. [default: looked for]",
    )
    return add_base(add_handover(command))


def printable(text: str) -> str:
    """Escape what would move the cursor: names come from outside."""
    text = text.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def size_text(nbytes: int) -> str:
    """Return bytes in the unit that reads best."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << shift:
            value = nbytes / (1 << shift)
            return f"{value:,.0f} {unit}" if value == int(value) else f"{value:,.1f} {unit}"
    return f"{nbytes:,} B"


def count_text(n: int, what: str) -> str:
    """Return a number of things."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def new_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """Return an empty table in the style of this command."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left")
    return made
