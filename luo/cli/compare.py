"""``luo compare``: which phase and which callback takes longer than before."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from luo.cli.errors import NOT_MET, check_writable, write_json, wrong_input
from luo.profile import screen
from luo.profile.compare import compare as compared
from luo.profile.compare import read

__all__ = ["compare"]


class Percentage(click.ParamType["float"]):
    """A share as ``10%``; a fraction."""

    name = "percentage"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert what the user wrote."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*%\s*", value, re.ASCII)
        if match is None:
            self.fail(f"{value!r}: a percentage as 10% is expected", param, ctx)
        return float(match[1]) / 100


_DOCUMENT = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("files", type=_DOCUMENT, metavar="A.json B.json [A.json B.json]...", nargs=-1)
@click.option(
    "--only",
    multiple=True,
    metavar="GLOB",
    help="Phases and callbacks to compare, as 'blackout' or 'devices/*'. [default: all]",
)
@click.option(
    "--fail-slower",
    type=Percentage(),
    metavar="P%",
    help="Exit status 3 if B is, with confidence, more than P % slower.",
)
@click.option("--all", "everything", is_flag=True, help="Show callbacks without difference, too.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write the comparison; '-' is standard output.",
)
def compare(
    files: tuple[Path, ...],
    only: tuple[str, ...],
    fail_slower: float | None,
    everything: bool,
    json_file: str | None,
) -> None:
    """Compare documents of 'luo run --repeat N --json', A the one from before.

    Shows medians, how much B differs, and an interval that holds with 95 % confidence for all
    phases together, and for all callbacks together. Take 8 updates or more of each. On a busy
    machine measure in turns, and give all documents: A B A B …; then each is one figure.
    """
    if not files or len(files) % 2:
        raise click.UsageError("A.json B.json: one of before for each of now")
    if json_file not in (None, "-"):
        check_writable(str(json_file))
    with wrong_input():
        document = compared(
            [*map(read, files[::2])], [*map(read, files[1::2])], only=only, fail_slower=fail_slower
        )
    if json_file is not None:
        write_json(json_file, document)
    console = Console(stderr=json_file == "-", highlight=False)
    screen.show_comparison(console, document, everything)
    sys.exit(NOT_MET if document["failed"] else 0)
