"""``luo report``: what a live update cost, as a page to show around."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import click

from luo.cli.errors import Wrong, check_writable, wrong_input
from luo.cli.export import output, read_document

__all__ = ["report"]


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN.json")
@click.argument("other", type=click.Path(path_type=Path), metavar="[OTHER.json]", required=False)
@click.option(
    "-o",
    "--output",
    "output_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The page. [default: RUN.html]",
)
def report(run: Path, other: Path | None, output_file: Path | None) -> None:
    """Make a page of what 'luo run --json' wrote; OTHER.json is an earlier run to compare with.

    The page is one file that loads nothing: figures, their tables, light and dark.
    """
    pages = _pages()
    target = run.with_suffix(".html") if output_file is None else output_file
    check_writable(str(target), "-o")
    given = [path for path in (run, other) if path is not None]
    with wrong_input():
        documents = [read_document(path) for path in given]
        if target.exists() and any(map(target.samefile, given)):
            raise Wrong(f"-o {target}: the page is made of it")
        names = (run.name, "" if other is None else other.name)
        text = pages.page(*documents, names=names)
    with output("-o", str(target)) as stream:
        stream.write(text)
    click.echo(f"{target}: {len(text.encode()) / 1e6:.1f} MB")


def _pages() -> ModuleType:
    """Return :mod:`luo.profile.page`, or say in a line what is missing."""
    try:
        from luo.profile import page
    except ImportError as error:
        raise Wrong(f"report: {error}: install it with pip install 'luo-kho[report]'") from error
    return page
