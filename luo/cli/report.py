"""``luo report``: what a live update cost, as a page to show around."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from luo.cli.errors import Wrong, check_writable, wrong_input

__all__ = ["report"]


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN.json")
@click.argument("other", type=click.Path(path_type=Path), metavar="[OTHER.json]", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The page. [default: RUN.html]",
)
def report(run: Path, other: Path | None, output: Path | None) -> None:
    """Make a page of what 'luo run --json' wrote; OTHER.json is an earlier run to compare with.

    The page is one file that loads nothing: figures, their tables, light and dark.
    """
    pages = _pages()
    target = run.with_suffix(".html") if output is None else output
    check_writable(str(target), "-o")
    with wrong_input():
        documents = [_read(path) for path in (run, other) if path is not None]
        names = (run.name, "" if other is None else other.name)
        text = pages.page(*documents, names=names)
        target.write_text(text, "utf-8")
    click.echo(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def _pages() -> ModuleType:
    """Return :mod:`luo.profile.page`, or say in a line what is missing."""
    try:
        from luo.profile import page
    except ImportError as error:
        raise Wrong(f"report: {error}: install it with pip install 'luo-kho[report]'") from error
    return page


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Wrong(f"{path}: not a luo-run/1 document: {error}") from error
