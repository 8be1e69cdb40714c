"""Folded stacks: a line a stack, for flamegraph.pl, inferno and speedscope.

Frames are divided by ``;``, the last is followed by a blank and nanoseconds. The tools know no
escape, and take a number after a blank for a figure, so neither may stand in a frame.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from luo.profile.trace import kernel_of, printable

__all__ = ["callbacks", "tree"]

_ORDER: Final = ("PREPARE", "REBOOT", "CANCEL", "RESTORE", "FINISH")
_UNDIVIDED: Final = str.maketrans({";": ":"})


def callbacks(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the callbacks took: ``kernel;event;subsystem;kind;name ns``, all runs together.

    The dearest call to one device has a frame of its own, with the device's path.

    Args:
        document: of ``luo-run/1``.

    Raises:
        LookupError, TypeError, ValueError: it is none.
    """
    rows = sorted(  # what has a frame in common stands together, in order of time
        document["callbacks"], key=lambda row: (_ORDER.index(row["event"]), row["subsystem"])
    )
    for row in rows:
        event, rest, path = row["event"], row["total_ns"], row.get("max_device")
        stack = (kernel_of(event), event, row["subsystem"], row["kind"], row["name"])
        if (
            isinstance(path, str) and row["devices"] == row["calls"]
        ):  # of a batch it is but the first
            rest -= row["max_ns"]
            yield from _line((*stack, path), row["max_ns"])
        yield from _line(stack, rest)


def tree(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what devices took, in blackout and out of it, along their paths: ``when;part;… ns``.

    Args:
        document: of ``luo-run/1``; without ``subtrees`` there is nothing to yield.

    Raises:
        LookupError, TypeError, ValueError: it is none.
    """
    for when in ("blackout", "other"):
        own: dict[str, float] = {}
        for row in document.get("subtrees", ()):
            ns = row["blackout_ns"] if when == "blackout" else row["total_ns"] - row["blackout_ns"]
            own[row["path"]] = own.get(row["path"], 0) + ns
            if row["parent"] is not None:  # a row holds what is below it
                own[row["parent"]] = own.get(row["parent"], 0) - ns
        for path, ns in own.items():
            yield from _line((when, *filter(None, path.split("/"))), ns)


def _line(frames: Iterable[str], ns: float) -> Iterator[str]:
    if round(ns) > 0:  # what took no time has no width
        stack = ";".join(_frame(frame) for frame in frames)
        yield f"{stack} {round(ns)}\n"


def _frame(name: str) -> str:
    return re.sub(r"\s", "_", printable(name).translate(_UNDIVIDED)) or "(unnamed)"
