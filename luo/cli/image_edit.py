"""``luo image edit``: the sessions of a handover changed."""

from __future__ import annotations

import re
from pathlib import Path

import click

from luo.cli.errors import wrong_input
from luo.cli.image_text import (
    abi_option,
    count_text,
    memory_options,
    path_argument,
    printable,
    size_text,
)
from luo.handover import Handover
from luo.image import Image
from luo.image.edit import NewFile
from luo.image.edit import edit as edit_image
from luo.image.retrieve import name_of, sessions

__all__ = ["edit"]

_SETTING = re.compile(r"(.*),(pos|seals|order)=(0x[0-9a-fA-F]+|[0-9]+)")
_ADD = "SESSION/TOKEN=FILE[,pos=N][,seals=N][,order=N]"


def _add(text: str) -> NewFile:
    left, equals, path = text.partition("=")
    name, slash, token = left.rpartition("/")
    settings: dict[str, int] = {}
    while found := _SETTING.fullmatch(path):
        path, key, value = found.groups()
        settings.setdefault(key, int(value, 0))
    try:
        number = int(token, 0)
    except ValueError:
        slash = ""
    if not (equals and slash and name and path):
        raise ValueError(f"--add {text}: not {_ADD}")
    return NewFile(name_of(name), number, Path(path), **settings)


def _rename(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (equals and old and new):
        raise ValueError(f"--rename {text}: not OLD=NEW")
    return name_of(old), name_of(new)


@click.command()
@path_argument("path")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The new image."
)
@click.option("--drop", multiple=True, metavar="SESSION[/TOKEN]", help="Leave it out.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="Name a session anew.")
@click.option("--add", multiple=True, metavar=_ADD, help="Add a memfd with these contents.")
@click.option("--move", is_flag=True, help="Give every memfd other pages.")
@abi_option
@memory_options
def edit(
    path: Path,
    output: Path,
    drop: tuple[str, ...],
    rename: tuple[str, ...],
    add: tuple[str, ...],
    move: bool,
    name: str | None,
    base: int | None,
    handover: Handover | None,
) -> None:
    """Write PATH as a handover with other sessions; a kernel takes it as it would have PATH.

    Everything else keeps its place: memory, scratch, other subtrees, preserved blocks. First what
    is to go, then names, then what is new. In names %XX is a byte, as 'luo image retrieve' writes
    them.
    """
    with wrong_input():
        image = Image.load(path, abi=name, base=base, handover=handover)
        result = edit_image(
            image,
            drop=drop,
            rename=[_rename(text) for text in rename],
            add=[_add(text) for text in add],
            move=move,
        )
        nbytes = result.save(output)
        found = sessions(result)
    files = count_text(sum(len(session.files) for session in found), "file")
    text = f"{output}: {count_text(len(found), 'session')}, {files}, {size_text(nbytes)}"
    click.echo(printable(text))
