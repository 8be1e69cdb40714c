"""Compare the newest saved run with the one before: ``compare.py quick [--fail PERCENT]``.

The first table is what matters on a machine that others share: luo's time over the peer's, both
times taken in turn. The second is luo's own times; a quiet machine is needed for these.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import report
from table import ROWS


def load(path: Any) -> tuple[str, dict[tuple[Any, ...], report.Heat]]:
    """Return when a run was, and its races."""
    run = report.condense(json.loads(path.read_text()), "")
    return (
        f"{path.name} of {run['date']}, commit {run['commit']}",
        {(heat.row, *heat.size): heat for heat in report.heats_of(run)},
    )


def ratios(before: Any, now: Any) -> Iterator[tuple[str, float, float]]:
    """Yield what is compared with which peer, and the two ratios, by median."""
    for key, heat in now.items():
        if key not in before:
            continue
        for limit in ROWS[heat.row].limits:
            if all({limit.luo, limit.peer} <= set(one.entries) for one in (heat, before[key])):
                yield (
                    f"{heat.row}: {limit.luo} / {limit.peer}, {heat.title()}",
                    before[key].ratio(limit, "median"),
                    heat.ratio(limit, "median"),
                )


def times(before: Any, now: Any) -> Iterator[tuple[str, float, float]]:
    """Yield luo's own times, by minimum."""
    for key, heat in now.items():
        for role, entry in heat.entries.items():
            theirs = before[key].entries.get(role) if key in before else None
            if theirs is not None and role.startswith(("luo", "kho-")):
                yield f"{heat.row}: {role}, {heat.title()}", theirs["min"], entry["min"]


def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the saved runs: full or quick")
    parser.add_argument(
        "--fail", type=float, metavar="PERCENT", help="exit with 1 if a ratio grew by more"
    )
    given = parser.parse_args()
    runs = report.saved(given.name)
    if len(runs) < 2:
        print(f"{len(runs)} saved run called {given.name}: nothing to compare it with yet")
        return
    (then, before), (today, now) = map(load, runs[-2:])
    print(f"before: {then}\nnow:    {today}\n")
    grown = list(ratios(before, now))
    print(
        report.table(
            ("luo's time over the peer's, by median", "before", "now", "change"),
            (
                (what, report.three(old), report.three(new), _change(old, new))
                for what, old, new in grown
            ),
            1,
        )
    )
    print(
        report.table(
            ("luo's time, by minimum", "before", "now", "change"),
            (
                (what, report.duration(old), report.duration(new), _change(old, new))
                for what, old, new in times(before, now)
            ),
            1,
        )
    )
    worse = [what for what, old, new in grown if given.fail and new > old * (1 + given.fail / 100)]
    for what in worse:
        print(f"worse by more than {given.fail:g} %: {what}")
    if worse:
        sys.exit(1)


def _change(old: float, new: float) -> str:
    return f"{100 * (new / old - 1):+.0f} %" if old > 0 else ""


if __name__ == "__main__":
    main()
