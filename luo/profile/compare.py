"""Two measured live updates side by side: which phase and which callback takes longer now.

Updates are few, their durations skewed, and now and then one is far off: nothing is assumed of how
they are distributed. A ratio is Hodges and Lehmann's estimate, the median of the ratios of every
run of B to every run of A, and its interval ends at those of these ratios that Mann and Whitney's
test would just not reject (M. Hollander, D. A. Wolfe, E. Chicken, "Nonparametric Statistical
Methods", 3rd ed., 4.2 and 4.3; on a scale of logarithms, where a ratio is a shift).
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from luo.report import PHASES

__all__ = ["CONFIDENCE", "BadDocument", "compare", "interval", "read"]

CONFIDENCE: Final = 0.95
_MOST_RUNS: Final = 1000  # of one side; of more, every second, third, … is taken
_COUNTED: Final = 100**3  # up to 100 runs a side the distribution is counted out
_UNSTEADY: Final = 0.01  # how often a steady document may be called unsteady
_NAMED: Final = 3  # rows that a warning names

#: What makes figures differ though no callback is to blame: where it is in the document, and what
#: it is when it is not there; None: documents without it are not judged by it.
_CONDITIONS: Final[tuple[tuple[str, tuple[str, ...], object], ...]] = (
    ("host", ("source", "path"), None),
    ("devices", ("devices", "total"), None),
    ("devices preserved", ("devices", "preserved"), None),
    ("bytes of state", ("devices", "state_bytes"), None),
    ("KHO ABI", ("kho_abi",), None),
    ("behaviour", ("behaviour",), None),
    ("quirks", ("quirks",), None),
    ("drivers", ("settings", "modules"), "built in"),
    ("next kernel", ("successor",), None),
    ("clock", ("clock",), "wall"),
    ("CPU", ("machine", "cpu"), None),
    ("cores", ("machine", "cores"), None),
    ("Python", ("machine", "python"), None),
    ("luo", ("luo_version",), None),
)


class BadDocument(ValueError):
    """What was given is no ``luo-run/1`` document with updates in it."""


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``luo-run/1`` document, and check what :func:`compare` needs of it.

    Raises:
        BadDocument: it is none, or has no update that came to its end.
        OSError: it cannot be read.
    """
    try:
        document: dict[str, Any] = json.loads(Path(path).read_bytes())
        _check(document)
    except BadDocument as error:
        raise BadDocument(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"{path}: not a luo-run/1 document: {error}") from None
    return document


def compare(
    a: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    b: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    only: Sequence[str] = (),
    fail_slower: float | None = None,
) -> dict[str, Any]:
    """Compare two ``luo-run/1`` documents, or several of each.

    Updates of one document share what the machine was at, and where its memory lay, and so say
    nothing of how much that makes. Of several documents each is therefore one figure, its median:
    taken in turns, A B A B, they tell on a busy machine, too.

    There are three families of rows: the blackout, the phases, and the callbacks. The intervals of
    a family hold all together with a confidence of 95 % (Bonferroni): among hundreds of callbacks
    that are as they were, some would else look slower by chance.

    Args:
        a: the document from before, or several.
        b: the document of now, or several.
        only: the rows to compare, as shell patterns of their names; empty: all.
        fail_slower: how much slower than *a* is too slow: 0.1 for 10 %. None judges nothing.

    Returns:
        the ``luo-compare/1`` document: ``rows`` with medians, ratio, interval (nulls if there are
        too few runs) and ``verdict``; ``differences`` between the circumstances; ``warnings``;
        and ``failed``, the rows that are too slow even at the fast end of the interval, worst
        first.

    Raises:
        BadDocument: one of them is not such a document.
        ValueError: a pattern of *only* that no row matches.
    """
    sides = [[side] if isinstance(side, Mapping) else list(side) for side in (a, b)]
    for document in (*sides[0], *sides[1]):
        _check(document)
    times = [_times(side) for side in sides]
    names = sorted({*times[0], *times[1]}, key=lambda name: _place(name, times))
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"only {pattern!r}: none of {', '.join(names)}")
    if only:
        names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in only)]
    family_sizes = Counter(_family(name) for name in names if name in times[0] and name in times[1])
    exact = all(document.get("clock") == "virtual" for side in sides for document in side)
    rows = []
    for name in names:
        level = (1 - CONFIDENCE) / (family_sizes[_family(name)] or 1)
        rows.append({"name": name, "kind": _kind(name)} | _judged(times, name, level, exact))
    judged = [row for row in rows if row["low"] is not None]
    warnings, failed = [*_too_few(rows, family_sizes), *_unsteady(sides)], []
    if fail_slower is not None:
        failed = [row for row in judged if row["low"] > 1 + fail_slower]
        failed.sort(key=lambda row: -row["low"])
        unsure = [row["name"] for row in judged if row["low"] <= 1 + fail_slower < row["high"]]
        if unsure:
            limit = f"more than {100 * fail_slower:g} % slower"
            warnings.append(f"{limit} is not ruled out for {_listed(unsure)}: more runs would tell")
    return {
        "schema": "luo-compare/1",
        "confidence": CONFIDENCE,
        "fail_slower": fail_slower,
        "documents": {letter: len(side) for letter, side in zip("ab", sides, strict=True)},
        "runs": {
            letter: sum(len(document["runs"]) for document in side)
            for letter, side in zip("ab", sides, strict=True)
        },
        "differences": _differences(sides[0][0], sides[1][0]),
        "rows": rows,
        "warnings": warnings,
        "failed": [row["name"] for row in failed],
    }


def interval(
    a: ArrayLike, b: ArrayLike, level: float = 1 - CONFIDENCE
) -> tuple[float, float | None, float | None]:
    """Return the ratio of the durations *b* to those of *a*, and the ends of its interval.

    Args:
        a: nanoseconds of each run; at least one. A duration of 0 counts as 1 ns.
        b: the same of the other.
        level: how often the interval may miss the true ratio.

    Returns:
        the ratio, and the ends; None for both if so few runs cannot tell at that *level*.
    """
    before, after = (np.maximum(_thinned(side), 1.0) for side in (a, b))
    ratios = np.sort((after[:, np.newaxis] / before).ravel())
    ratio = math.sqrt(ratios[(len(ratios) - 1) // 2] * ratios[len(ratios) // 2])
    cut = _cut(*sorted((len(before), len(after))), level / 2)
    if cut == 0:
        return ratio, None, None
    return ratio, float(ratios[cut - 1]), float(ratios[-cut])


def _thinned(values: ArrayLike) -> Any:
    values = np.asarray(values, np.float64)
    return values[:: -(-len(values) // _MOST_RUNS)]


@cache
def _cut(few: int, many: int, tail: float) -> int:
    """Return how far from either end the interval begins, in sorted ratios; 0: there is none.

    It is the largest k with P(U < k) <= *tail*, U being Mann and Whitney's statistic.
    """
    pairs = few * many
    if few * pairs > _COUNTED:
        deviation = math.sqrt(pairs * (few + many + 1) / 12)
        return max(0, math.floor(pairs / 2 + NormalDist().inv_cdf(tail) * deviation + 0.5))
    # The coefficients of the Gaussian binomial count the orders of all runs with U = 0, 1, 2, …
    ways = [1] + [0] * (pairs // 2)
    for i in range(1, few + 1):
        for u in range(len(ways) - 1, many + i - 1, -1):
            ways[u] -= ways[u - many - i]
        for u in range(i, len(ways)):
            ways[u] += ways[u - i]
    allowed = tail * math.comb(few + many, few)
    return sum(below <= allowed for below in accumulate(ways))


# ---- rows ----


def _times(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the nanoseconds of each phase and callback: of each run, or median, that has it."""
    times: dict[str, list[float]] = {}
    if len(documents) > 1:
        for document in documents:
            for name, runs in _times([document]).items():
                times.setdefault(name, []).append(float(np.median(runs)))
        return times
    for run in documents[0]["runs"]:
        for name, ns in [*run["phases_ns"].items(), *run["callbacks_ns"].items()]:
            times.setdefault(name, []).append(ns)
    return times


def _kind(name: str) -> str:
    return "callback" if "/" in name else "phase"


def _family(name: str) -> str:
    return name if name == "blackout" else _kind(name)


def _place(name: str, times: Sequence[Mapping[str, Sequence[float]]]) -> tuple[object, ...]:
    """Return where *name* stands: blackout, phases in their order, callbacks, dearest first."""
    if name in PHASES:
        return (0, name != "blackout", PHASES.index(name))
    return (1, -max(float(np.median(side[name])) for side in times if name in side), name)


def _judged(
    times: Sequence[Mapping[str, Sequence[float]]], name: str, level: float, exact: bool
) -> dict[str, Any]:
    sides = [side.get(name) for side in times]
    row: dict[str, Any] = {
        f"{letter}_ns": None if side is None else round(float(np.median(side)))
        for letter, side in zip("ab", sides, strict=True)
    } | {"ratio": None, "low": None, "high": None}
    a, b = sides
    if a is None or b is None:
        return row | {"verdict": f"only in {'A' if b is None else 'B'}"}
    ratio, low, high = interval(a, b, level)
    if exact and len({*a}) == len({*b}) == 1:  # a clock without noise: one run says it all
        low = high = ratio
    if low is None or high is None:
        verdict = "too few runs"
    elif low > 1:
        verdict = "slower"
    else:
        verdict = "faster" if high < 1 else "no difference"
    return row | {"ratio": ratio, "low": low, "high": high, "verdict": verdict}


def _too_few(rows: Iterable[Mapping[str, Any]], family_sizes: Mapping[str, int]) -> list[str]:
    """Say how many runs it takes, for each family in which there are too few."""
    warnings = []
    families = {_family(row["name"]): row for row in rows if row["verdict"] == "too few runs"}
    for family in families:
        count = family_sizes[family]
        needed = 1
        while _cut(needed, needed, (1 - CONFIDENCE) / count / 2) == 0:
            needed += 1
        what = family if family == "blackout" else f"{count} {family}{'s' if count > 1 else ''}"
        warnings.append(f"too few runs to tell about {what}: take {needed} or more on both sides")
    return warnings


def _unsteady(sides: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Say so if a single document is at odds with itself: its halves differ."""
    warnings = []
    for letter, side in zip("AB", sides, strict=True):
        blackouts = _times(side).get("blackout", [])
        half = len(blackouts) // 2
        if len(side) > 1 or half == 0:
            continue
        _, low, high = interval(blackouts[:half], blackouts[half:], _UNSTEADY)
        if low is not None and high is not None and not low <= 1 <= high:
            warnings.append(
                f"{letter} is unsteady, its blackout changed on the way: "
                "was the machine busy? Compare several documents, taken in turns"
            )
    return warnings


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


# ---- documents ----


def _check(document: Any) -> None:
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != "luo-run/1":
        raise BadDocument("not a luo-run/1 document" + (f" but {schema}" if schema else ""))
    error = document.get("error")
    if error is not None:
        message = error.get("message") if isinstance(error, dict) else error
        raise BadDocument(f"its live update failed: {message}")
    runs = document.get("runs")
    if not isinstance(runs, list) or not runs:
        raise BadDocument("no update in it came to its end; there is nothing to compare")
    for place, run in enumerate(runs):
        for key in ("phases_ns", "callbacks_ns"):
            times = run.get(key) if isinstance(run, dict) else None
            if not isinstance(times, dict) or not all(map(_is_time, times.values())):
                raise BadDocument(f"runs[{place}].{key} is not nanoseconds by name")


def _is_time(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < 2**63  # type: ignore[operator]  # NaN is not


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    differences = []
    for what, keys, missing in _CONDITIONS:
        values = [_found(document, keys, missing) for document in (a, b)]
        if values[0] != values[1] and None not in values:
            differences.append({"what": what, "a": values[0], "b": values[1]})
    return differences


def _found(value: Any, keys: Iterable[str], missing: object) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return missing if value is None else value
