"""``python -m luo.embed build DIR``: build ``libluo.so`` and ``luo.pc``."""

from __future__ import annotations

from pathlib import Path

import click

from luo.cli.errors import Wrong, wrong_input
from luo.embed.build import build as build_library


@click.group()
def main() -> None:
    """Put the engine into C programs."""


@main.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
def build(directory: Path) -> None:
    """Build libluo.so and luo.pc in DIR, for this Python and the luo that it has."""
    try:
        with wrong_input():
            click.echo(build_library(directory))
    except ImportError as error:
        raise Wrong(f"{error}; install luo-kho[embed]") from error


main(prog_name="python -m luo.embed")
