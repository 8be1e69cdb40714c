"""How the ``luo`` command ends: exit statuses, and errors that are one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import click

from luo.errors import LuoError

__all__ = ["FAILED", "INTERRUPTED", "WRONG", "Wrong", "wrong_input"]

FAILED: Final = 1
WRONG: Final = 2
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
