"""``luo image retrieve``: the sessions of Linux' LUO in an image, and their files as files.

Exit status: 0 done; 1 a file could not be retrieved; 2 wrong usage or input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luo.cli.errors import FAILED, wrong_input
from luo.cli.image_text import (
    abi_option,
    count_text,
    memory_options,
    new_table,
    path_argument,
    printable,
    size_text,
)
from luo.errors import HandoverError
from luo.handover import Handover
from luo.image import Image
from luo.image.retrieve import (
    MANIFEST,
    RetrievedFile,
    SavedFile,
    SavedSession,
    file_bound_data,
    problems,
    select,
    sessions,
)
from luo.image.retrieve import (
    retrieve as retrieve_files,
)

__all__ = ["retrieve", "session_table"]

_COLUMNS = ("session, token", "handler", "bytes", "position", "seals", "folios")
_RIGHT = _COLUMNS[2:]
_NAME_SHOWN = 32
_ERRORS_SHOWN = 20
_FLBS_SHOWN = 8


@click.command()
@path_argument("path")
@click.argument("wanted", nargs=-1, metavar="[SESSION[/TOKEN]]...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to: DIR/SESSION/0xTOKEN, and a manifest. New, or empty.",
)
@click.option("--json", "as_json", is_flag=True, help="Say what was done as JSON: the manifest.")
@abi_option
@memory_options
def retrieve(
    path: Path,
    wanted: tuple[str, ...],
    output: Path | None,
    as_json: bool,
    name: str | None,
    base: int | None,
    handover: Handover | None,
) -> None:
    """Write the files of sessions in PATH to a directory; without -o, list them.

    Without SESSION: all. What stands in names that no path can have is written %XX. A file that
    cannot be retrieved is named with the address where it fails, the others are written; exit
    status 1, as for records that are broken.
    """
    if as_json and output is None:
        raise click.UsageError("--json: needs -o; 'luo image inspect --json' lists")
    console = Console(highlight=False)
    with wrong_input():
        image = Image.load(path, abi=name, base=base, handover=handover)
        chosen = select(sessions(image), wanted)
        if output is None:
            console.print(_table(chosen, None))
            _flbs(console, image)
            _complain(problems(image))
            return
        done = retrieve_files(image, output, chosen)
    if as_json:
        click.echo((output / MANIFEST).read_text(), nl=False)
    else:
        _report(console, image, output, chosen, done)
    _complain([*problems(image), *(result.error for result in done if result.error is not None)])


def _complain(rules: Sequence[str]) -> None:
    """Say what is wrong, and end with status 1 if anything."""
    for rule in rules[:_ERRORS_SHOWN]:
        click.echo(f"luo: {printable(rule)}", err=True)
    if len(rules) > _ERRORS_SHOWN:
        click.echo(f"luo: … {len(rules) - _ERRORS_SHOWN:,} more, see {MANIFEST}", err=True)
    if rules:
        raise SystemExit(FAILED)


def _report(
    console: Console,
    image: Image,
    output: Path,
    chosen: Sequence[SavedSession],
    done: Sequence[RetrievedFile],
) -> None:
    written = [result.file.size or 0 for result in done if result.path is not None]
    unknown = [result.file for result in done if not result.file.known]
    for file in unknown[:_ERRORS_SHOWN]:
        text = f"{file.name}: handler {file.handler!r} is not known, its u64 is {file.data:#x}"
        console.print(Text(printable(text)))
    _flbs(console, image)
    text = (
        f"{output}: {count_text(len(written), 'file')} of {count_text(len(done), 'file')} in "
        f"{count_text(len(chosen), 'session')}, {size_text(sum(written))}"
    )
    console.print(Text(printable(text)))


def _flbs(console: Console, image: Image) -> None:
    found = file_bound_data(image)
    for flb in found[:_FLBS_SHOWN]:
        text = f"FLB {flb.name}: u64 {flb.data:#x}, held by {count_text(flb.count, 'file')}"
        console.print(Text(printable(text)))
    if len(found) > _FLBS_SHOWN:
        console.print(Text(f"… {len(found) - _FLBS_SHOWN} more FLBs"))


def session_table(image: Image, rows: int) -> Table | None:
    """Return a table of the sessions in *image* with up to *rows* lines; None without any.

    Of formats other than luo-v5 it says so in one line.
    """
    if not any(subtree.name == "LUO" for subtree in image.survey.subtrees):
        return None
    try:
        found = sessions(image)
    except HandoverError as error:
        table = new_table("sessions")
        table.add_row(Text(printable(str(error))))
        return table
    return _table(found, rows) if found else None


def _table(found: Sequence[SavedSession], rows: int | None) -> Table:
    table = new_table()
    for name in _COLUMNS:
        right = name in _RIGHT
        table.add_column(
            name, justify="right" if right else "left", no_wrap=True, overflow="ellipsis"
        )
    lines = [(s, file) for s in found for file in (None, *s.files)]
    for session, file in lines[:rows]:
        if file is None:
            files = count_text(len(session.files), "file")
            table.add_row(Text(_cut(printable(session.name))), Text(files))
        else:
            table.add_row(*_cells(file))
    if rows is not None and len(lines) > rows:
        table.add_row(f"… {len(lines) - rows:,} more", "see 'luo image retrieve'")
    return table


def _cut(text: str) -> str:
    return text if len(text) <= _NAME_SHOWN else text[: _NAME_SHOWN - 1] + "…"


def _cells(file: SavedFile) -> list[Text]:
    cells = [f"  {file.token:#x}", _cut(printable(file.handler)) + (" !" if file.wrong else "")]
    if file.device is not None:
        return [Text(cell) for cell in (*cells, f"{file.size:,}")]
    if file.memfd is None:
        return [Text(cell) for cell in (*cells, f"data {file.data:#x}")]
    cells += f"{file.size:,}", f"{file.pos:,}", f"{file.seals:#x}", f"{file.nr_folios:,}"
    return [Text(cell) for cell in cells]
