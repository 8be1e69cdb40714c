"""``python -m luo.embed build DIR``: build ``libluo.so`` and ``luo.pc``."""

from __future__ import annotations

from importlib.util import find_spec
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
    if find_spec("setuptools") is None:
        raise Wrong("build: no setuptools: install it with pip install 'luo-kho[embed]'")
    with wrong_input():
        click.echo(build_library(directory))


main(prog_name="python -m luo.embed")
