"""A race: several contenders do the same work in turn, each checked before it is timed.

One row of the table at one size is one race. Contenders take turns round by round, so that a noisy
machine is noisy for all of them, and a ratio compares what ran side by side. What comes out are
durations; ``conftest.py`` makes an entry of pytest-benchmark's JSON for each contender of them.
"""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Contender", "Results", "race", "timed"]


@dataclass
class Contender:
    """One that does the work.

    Args:
        name: ``"luo"``, with a word behind it if there are several, or the peer's.
        run: what is timed; gets what *setup* returned, if there is a setup.
        setup: called before each round, not timed.
        check: called once with the result of an untimed round; raises if that is wrong.
        absent: why it cannot run here.
        info: of its own for ``extra_info``.
    """

    name: str
    run: Callable[..., Any]
    setup: Callable[[], Any] | None = None
    check: Callable[[Any], None] | None = None
    absent: str = ""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Results:
    """What a race came to.

    Args:
        durations: seconds of each round, by contender; none in a run without timing.
        info: for the ``extra_info`` of all of them.
        own: for that of each.
        absent: who did not run, and why.
    """

    durations: dict[str, list[float]]
    info: dict[str, Any] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def race(contenders: list[Contender], rounds: Iterable[object], **info: Any) -> Results:
    """Check every contender, then time them round by round.

    Args:
        contenders: in the order of their turns.
        rounds: a round for each item.
        info: for the ``extra_info`` of every contender.
    """
    running = [one for one in contenders if not one.absent]
    for one in running:
        result = _turn(one)[1]
        if one.check is not None:
            one.check(result)
        del result
    durations: dict[str, list[float]] = {one.name: [] for one in running}
    for _ in rounds:
        for one in running:
            durations[one.name].append(_turn(one)[0])
    return Results(
        durations,
        info,
        {one.name: one.info for one in contenders},
        {one.name: one.absent for one in contenders if one.absent},
    )


def _turn(one: Contender) -> tuple[float, Any]:
    arguments = () if one.setup is None else (one.setup(),)
    return timed(one.run, *arguments)


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Return seconds and result of a call, without the garbage collector."""
    collecting = gc.isenabled()
    gc.disable()  # as pytest-benchmark does while it times
    try:
        start = time.perf_counter()
        result = call(*arguments)
        return time.perf_counter() - start, result
    finally:
        if collecting:
            gc.enable()
