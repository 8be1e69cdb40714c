"""How the ``luo`` command ends: exit statuses, errors that are one line, files it leaves."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click

from luo.errors import LuoError

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "NOT_MET",
    "WRONG",
    "Wrong",
    "check_writable",
    "write_json",
    "wrong_input",
]

FAILED: Final = 1
WRONG: Final = 2
NOT_MET: Final = 3
INTERRUPTED: Final = 130


class Wrong(click.ClickException):
    """Wrong input: one line, exit status 2."""

    exit_code = WRONG


@contextlib.contextmanager
def wrong_input() -> Iterator[None]:
    """Turn what the user gave wrong into one line and exit status 2."""
    try:
        yield
    except MemoryError as error:
        raise Wrong(f"too little memory: {error}") from error
    except OSError as error:
        plain = error.filename is not None and not isinstance(error, LuoError)
        raise Wrong(f"{error.filename}: {error.strerror}" if plain else str(error)) from error
    except (ValueError, LuoError) as error:
        raise Wrong(str(error)) from error


def check_writable(path: str, option: str = "--json") -> None:
    """Refuse a file that cannot be written before the run, not after it."""
    at = path if os.path.exists(path) else os.path.dirname(path) or "."
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise Wrong(f"{option} {path}: {os.strerror(errno.ENOENT)}")
    if not os.access(at, os.W_OK):
        raise Wrong(f"{option} {path}: {os.strerror(errno.EACCES)}")


def write_json(path: str, document: Mapping[str, Any], option: str = "--json") -> None:
    """Write *document* to *path*, which *option* names; ``"-"`` is standard output."""
    text = json.dumps(document, indent=2)
    if path == "-":
        click.echo(text)
        return
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise Wrong(f"{option} {path}: {error.strerror}") from error
