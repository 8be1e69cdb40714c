"""The page of figures: ``report.py RUN.json`` writes ``docs/benchmarks.md`` and what belongs to it.

``condense`` takes of pytest-benchmark's JSON what the page needs; that is kept beside the plots, as
``docs/benchmarks/run.json``, and everything else is made of it: the page, the block of the README,
and the plots. So anybody can make them again without the run, and a test does.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from table import LIMITS, PEERS, ROWS, Limit

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BESIDE = ROOT / "docs" / "benchmarks"
README = ROOT / "README.md"
TWO_APIS = ROOT / "docs" / "two-apis.md"
RESULTS = ROOT / "benches" / "results"
MARKS = ("<!-- figures: written by make bench -->", "<!-- end of figures -->")
MISSED = "**missed**"
#: Rows of updates that are told elsewhere: the same PREPARE, and memory.
NOT_GROWING = ("liveupdate.prepare.python", "liveupdate.memory")


# ---- the run ----


def condense(run: dict[str, Any], command: str) -> dict[str, Any]:
    """Return what the page needs of a run: no names of hosts, no single rounds."""
    machine, commit = run["machine_info"], run["commit_info"]
    cpu = machine["cpu"]
    kept = ("min", "median", "iqr", "rounds")
    return {
        "date": run["datetime"][:10],
        "command": command,
        "commit": commit["id"][:12] + (" with changes" if commit["dirty"] else ""),
        "machine": {
            "cpu": cpu.get("brand_raw", machine["processor"]),
            "cores": cpu.get("count", 0),
            "memory": machine["luo"]["memory"],
            "system": f"{machine['system']} {machine['release'].split('-')[0]}",
        },
        "versions": machine["luo"]["versions"],
        "entries": [
            {
                "size": _listed(one["params"]["size"]),
                **{name: one["stats"][name] for name in kept},
                **{
                    name: value
                    for name, value in one["extra_info"].items()
                    if name not in ("targets", "unit", "seed", "versions")
                },
            }
            for one in run["benchmarks"]
        ],
    }


def _listed(size: Any) -> list[Any]:
    return list(size) if isinstance(size, list | tuple) else [size]


@dataclass
class Heat:
    """One race: a row at one size, with an entry for each contender."""

    row: str
    size: tuple[Any, ...]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def items(self) -> int:
        return int(max(entry["items"] for entry in self.entries.values()))

    @property
    def shape(self) -> str:
        return str(next(iter(self.entries.values())).get("shape", ""))

    def seconds(self, role: str, stat: str) -> float:
        """Return a contender's time, without the loop that all of them have."""
        entry = self.entries[role]
        less = entry.get("less")
        if not less or less == role or less not in self.entries:
            return float(entry[stat])
        return float(entry[stat] - self.entries[less][stat])

    def is_noise(self, role: str) -> bool:
        """Whether a contender's minimum says nothing, as where what it calls was subtracted."""
        return self.seconds(role, "min") < 0.1 * self.seconds(role, "median")

    def ratio(self, limit: Limit, stat: str) -> float:
        """Return luo's time over the peer's; noise may leave nothing when a loop is subtracted."""
        ours, theirs = (max(1e-12, self.seconds(role, stat)) for role in (limit.luo, limit.peer))
        return ours / theirs

    def title(self) -> str:
        unit = ROWS[self.row].unit
        words = [f"{self.items:,} {unit}s"]
        first = next(iter(self.entries.values()))
        if "span" in first:
            words.append(f"over {binary(first['span'])}")
        elif self.row.startswith(("map.preserve", "map.generation")):
            words = [f"{binary(first['bytes'])}: {words[0]}"]
        if "folios" in first:
            words.append(f"of a map of {first['folios']:,} folios")
        if "among" in first:
            words.append(f"among {first['among']:,}")
        if self.shape:
            words.append(f"({self.shape})")
        return " ".join(words)


def heats_of(run: dict[str, Any]) -> list[Heat]:
    """Return the races of a run, in the order of the table and of their sizes."""
    found: dict[tuple[Any, ...], Heat] = {}
    for entry in run["entries"]:
        key = (entry["row"], *entry["size"])
        heat = found.setdefault(key, Heat(entry["row"], tuple(entry["size"])))
        heat.entries[entry["role"]] = entry
    rows = list(ROWS)
    return sorted(found.values(), key=lambda heat: (rows.index(heat.row), heat.shape, heat.items))


def largest(heats: Iterable[Heat]) -> list[Heat]:
    """Return of each row and shape the race with most items."""
    best: dict[tuple[str, str], Heat] = {}
    for heat in heats:
        key = (heat.row, heat.shape)
        if key not in best or heat.items > best[key].items:
            best[key] = heat
    return list(best.values())


# ---- words ----


def binary(nbytes: int) -> str:
    """Say a number of bytes with a binary unit."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} B"


def duration(seconds: float) -> str:
    """Say a time with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{three(seconds / size)} {unit}"
    return f"{three(max(seconds, 0.0) * 1e9)} ns"


def three(number: float) -> str:
    """Write a number with three digits, and no exponent."""
    if number >= 100 or number == 0:
        return f"{number:.0f}"
    return f"{number:.{2 - max(0, math.floor(math.log10(max(number, 1e-3))))}f}"


def said(limit: Limit, ratio: float) -> str:
    """Say a ratio in the way of its limit."""
    if limit.percent:
        return f"{100 * ratio:.1f} %"
    if limit.most >= 1:
        return f"{three(ratio)} times its time"
    return f"{three(1 / ratio)} times faster" if ratio < 1 else f"{three(ratio)} times slower"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], right: int = 99) -> str:
    """Return a Markdown table; columns from *right* on are aligned right."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |"]
    lines.append(
        "| " + " | ".join("---:" if k >= right else "---" for k in range(len(head))) + " |"
    )
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# ---- the table of ratios ----


@dataclass
class Verdict:
    """One ratio against its limit, which both minimum and median must keep."""

    work: str
    size: str
    against: str
    limit: str
    by_min: float
    by_median: float
    most: float
    words: Callable[[float], str]

    @property
    def worse(self) -> float:
        return max(self.by_min, self.by_median)

    @property
    def told(self) -> str:
        return "reached" if self.worse <= self.most else MISSED

    def cells(self) -> tuple[str, ...]:
        ratios = (self.words(self.by_min), self.words(self.by_median))
        return (self.work, self.size, self.against, self.limit, *ratios, self.told)


HEAD = ("work", "size", "against", "must be", "by minimum", "by median", "")


def verdicts(run: dict[str, Any]) -> list[Verdict]:
    """Return every row of the table of ratios at its largest size."""
    found = []
    heats = heats_of(run)
    for heat in largest(heats):
        row = ROWS[heat.row]
        several = len({limit.luo for limit in row.limits}) > 1
        for limit in row.limits:
            if limit.shape in ("", heat.shape) and {limit.luo, limit.peer} <= set(heat.entries):
                by_min, by_median = (heat.ratio(limit, stat) for stat in ("min", "median"))
                kind = f" ({limit.luo[4:]})" if several and limit.luo != "luo" else ""
                found.append(
                    Verdict(
                        row.work + kind,
                        heat.title(),
                        PEERS.get(limit.peer, limit.peer),
                        limit.words(),
                        by_min,
                        by_median,
                        limit.most,
                        partial(said, limit),
                    )
                )
    return found + timing(heats) + worst(scaling(heats)) + memory(heats)


@dataclass
class Growth:
    """Cost per device of one phase at the largest size, over that at a tenth of it."""

    what: str
    sizes: str
    by_min: float
    by_median: float


def scaling(heats: list[Heat]) -> list[Growth]:
    """Return how the cost per device grows, of every phase and kind of callbacks."""
    found = []
    for top in largest(heats):
        if not top.row.startswith("liveupdate.") or top.row in NOT_GROWING:
            continue
        tenth = [h for h in heats if h.row == top.row and h.size[0] * 10 == top.size[0]]
        for role in top.entries if tenth else ():
            if role.startswith("luo ") and not tenth[0].is_noise(role):
                grown = [
                    (top.seconds(role, stat) / top.items)
                    / max(tenth[0].seconds(role, stat) / tenth[0].items, 1e-12)
                    for stat in ("min", "median")
                ]
                sizes = f"{tenth[0].size[0]:,} to {top.size[0]:,} devices"
                found.append(Growth(f"{ROWS[top.row].work} ({role[4:]})", sizes, *grown))
    return found


def worst(growths: list[Growth]) -> list[Verdict]:
    """Return the verdict on the phase whose cost per device grows most."""
    if not growths:
        return []
    one = max(growths, key=lambda growth: max(growth.by_min, growth.by_median))
    limit = LIMITS["scaling"]
    return [
        Verdict(
            f"cost per device, worst of all phases: {one.what}",
            one.sizes,
            "itself",
            f"within {limit:g} times",
            one.by_min,
            one.by_median,
            limit,
            lambda ratio: f"{three(ratio)} times",
        )
    ]


def memory(heats: list[Heat]) -> list[Verdict]:
    """Return what a device takes of memory beside the image."""
    found = []
    for heat in largest(heat for heat in heats if heat.row == "liveupdate.memory"):
        for entry in heat.entries.values():
            found.append(
                Verdict(
                    ROWS[heat.row].work,
                    heat.title(),
                    "the image itself",
                    f"at most {LIMITS['memory']:g} bytes a device",
                    entry["value"],
                    entry["value"],
                    LIMITS["memory"],
                    lambda value: f"{three(value)} bytes a device",
                )
            )
    return found


def timing(heats: list[Heat]) -> list[Verdict]:
    """Return what timing adds to a callback: the time with it less the time without."""
    found = []
    for heat in largest(heat for heat in heats if heat.row == "callbacks.event"):
        for role in ("luo python", "luo native"):
            if not {role, f"{role} untimed"} <= heat.entries.keys():
                continue
            by_min, by_median = (
                (heat.seconds(role, stat) - heat.seconds(f"{role} untimed", stat))
                / heat.items
                * 1e9
                for stat in ("min", "median")
            )
            found.append(
                Verdict(
                    f"what timing adds to a callback ({role.removeprefix('luo ')})",
                    heat.title(),
                    "the same without timing",
                    f"at most {LIMITS['timing']:g} ns",
                    by_min,
                    by_median,
                    LIMITS["timing"],
                    lambda ns: f"{three(max(ns, 0.0))} ns",
                )
            )
    return found


def block(run: dict[str, Any]) -> str:
    """Return the figures that the README quotes: the table of ratios, by median."""
    machine = run["machine"]
    rows = [
        (one.work, one.size, one.against, one.limit, one.words(one.worse), one.told)
        for one in verdicts(run)
    ]
    return (
        table(("work", "size", "against", "must be", "is", ""), rows)
        + f"\nOf {run['date']} on {machine['cpu']}, {machine['cores']} cores; the worse one of"
        " minimum and median. How they were taken, and all others:"
        " [docs/benchmarks.md](docs/benchmarks.md).\n"
    )


# ---- plots, each with its table ----


@dataclass
class Line:
    """Points of a plot under one name."""

    name: str
    points: list[tuple[float, float]]


def by_size(heats: list[Heat]) -> list[Line]:
    """Return ns per device by number of devices, for each phase."""
    wanted = [
        ("liveupdate.prepare", "luo batch", "PREPARE, batch"),
        ("liveupdate.prepare", "luo native", "PREPARE, native"),
        ("liveupdate.prepare", "luo python", "PREPARE, Python"),
        ("liveupdate.prepare", "libfdt", "libfdt, records only"),
        ("liveupdate.restore", "luo batch", "jump, boot, restore, batch"),
        ("liveupdate.restore", "luo native", "jump, boot, restore, native"),
        ("liveupdate.finish", "luo batch", "FINISH, batch"),
    ]
    return [
        Line(
            name,
            [
                (heat.size[0], 1e9 * heat.seconds(role, "median") / heat.items)
                for heat in heats
                if heat.row == row and role in heat.entries
            ],
        )
        for row, role, name in wanted
    ]


def shares(heats: list[Heat]) -> tuple[str, dict[str, dict[str, float]]]:
    """Return median seconds of each phase by kind of callbacks, at the largest size with all kinds.

    Before them the size in words.
    """
    best: tuple[str, dict[str, dict[str, float]]] = ("", {})
    for heat in heats:
        if heat.row == "liveupdate.prepare":
            phases = {
                role.removeprefix("luo "): entry["phases"]
                for role, entry in heat.entries.items()
                if entry.get("phases")
            }
            if len(phases) >= len(best[1]):
                best = heat.title(), phases
    return best


def by_density(heats: list[Heat], row: str) -> list[Line]:
    """Return ns per folio by share of pages, for each contender."""
    found: dict[str, Line] = {}
    for heat in heats:
        for role, entry in heat.entries.items() if heat.row == row else ():
            line = found.setdefault(role, Line(role, []))
            line.points.append((entry["share"], 1e9 * heat.seconds(role, "median") / heat.items))
    return [Line(line.name, sorted(line.points)) for line in found.values()]


STEPS = ("preserve", "publish", "read")


def by_generation(heats: list[Heat]) -> dict[str, list[float]]:
    """Return median seconds to preserve, publish and read back, by generation."""
    found: dict[str, list[float]] = {}
    for step in STEPS:
        for heat in largest(heat for heat in heats if heat.row == f"map.generation.{step}"):
            for role in heat.entries:
                found.setdefault(role, []).append(heat.seconds(role, "median"))
    return {name: values for name, values in found.items() if len(values) == len(STEPS)}


def lines_table(head: str, lines: list[Line], label: Callable[[float], str]) -> str:
    """Return a table of lines that have the same points."""
    places = sorted({x for line in lines for x, _ in line.points})
    rows = []
    for line in lines:
        values = dict(line.points)
        rows.append([line.name, *(three(values[x]) if x in values else "" for x in places)])
    return table([head, *map(label, places)], rows, 1)


def plots(run: dict[str, Any], into: Path) -> None:
    """Draw the four pictures; the same run gives the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "luo",
            "svg.fonttype": "none",
            "font.size": 10,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    from matplotlib import pyplot

    heats = heats_of(run)

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        target = into / f"{name}.svg"
        figure.savefig(target, facecolor="white", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
        # matplotlib ends lines of paths with a blank
        target.write_text("\n".join(map(str.rstrip, target.read_text().splitlines())) + "\n")

    def lines(axes: Any, drawn: list[Line], across: str, up: str) -> None:
        for line, marker in zip(drawn, "osD^vPX*", strict=False):
            axes.plot(*zip(*line.points, strict=True), marker=marker, label=line.name)
        axes.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter("")

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    drawn = [line for line in by_size(heats) if line.points]
    if drawn:
        lines(axes, drawn, "devices", "ns per device")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    save(figure, "cost-per-device")

    figure, axes = pyplot.subplots(figsize=(8, 2.8))
    _, kinds = shares(heats)
    left = dict.fromkeys(kinds, 0.0)
    for phase in next(iter(kinds.values()), {}):
        widths = [100 * kinds[kind][phase] / sum(kinds[kind].values()) for kind in kinds]
        axes.barh(list(kinds), widths, left=list(left.values()), label=phase)
        left = {kind: left[kind] + width for kind, width in zip(kinds, widths, strict=True)}
    axes.set(xlabel="% of the update", xlim=(0, 100))
    axes.legend(fontsize=8, ncol=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, "phase-shares")

    figure, pair = pyplot.subplots(1, 2, figsize=(8, 4), sharey=True)
    for axes, what in zip(pair, ("preserve", "decode"), strict=True):
        drawn = by_density(heats, f"map.density.{what}")
        if drawn:
            lines(axes, drawn, "share of all pages", "ns per folio")
            axes.legend(fontsize=8)
        axes.set_title(what)
    save(figure, "map-by-density")

    figure, axes = pyplot.subplots(figsize=(8, 4))
    generations = by_generation(heats)
    for k, step in enumerate(STEPS):
        axes.bar(
            [place + 0.27 * (k - 1) for place in range(len(generations))],
            [1e3 * values[k] for values in generations.values()],
            0.25,
            label=step,
        )
    axes.set(ylabel="ms", yscale="log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xticks(range(len(generations)), list(generations), fontsize=8)
    axes.legend(fontsize=8, ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    save(figure, "map-by-generation")


# ---- the page ----

DOUBTS = """\
Doubt these figures. They are of one machine, and most likely of a virtual one that others share;
what they say is how contenders compared that took turns in the same minutes. A time without a peer
beside it is a note. Nothing on this page is written by hand.

How they were taken is in [benches/README.md](../benches/README.md): contenders of a row take turns
round by round, each is checked for the right result first, memory is touched before the clock
starts, on both sides alike. Where a row left a choice, the one that is hardest on luo was taken,
and is told there. A row is reached if both the minimum and the median of its rounds say so.
"""


def page(run: dict[str, Any]) -> str:
    """Return ``docs/benchmarks.md``."""
    heats = heats_of(run)
    machine = run["machine"]
    rows = verdicts(run)
    missed = sum(one.told == MISSED for one in rows)
    parts = [
        "# Benchmarks\n",
        DOUBTS,
        table(
            ("", ""),
            [
                ("date", run["date"]),
                ("command", f"`{run['command']}`"),
                ("commit", run["commit"]),
                (
                    "machine",
                    f"{machine['cpu']}, {machine['cores']} cores, {binary(machine['memory'])},"
                    f" {machine['system']}",
                ),
                *((name, version) for name, version in run["versions"].items()),
            ],
        ),
        "## Ratios\n",
        f"{len(rows) - missed} of {len(rows)} are reached, {missed} are missed.\n",
        table(HEAD, [one.cells() for one in rows]),
        "## Cost per device by size\n",
        "![ns per device by number of devices](benchmarks/cost-per-device.svg)\n",
        lines_table("ns per device (median)", by_size(heats), lambda n: f"{n:,.0f}"),
        table(
            ("cost per device", "", "by minimum", "by median"),
            (
                (one.what, one.sizes, f"{three(one.by_min)} times", f"{three(one.by_median)} times")
                for one in scaling(heats)
            ),
            2,
        ),
        "## Phase shares\n",
        "![share of each phase of an update](benchmarks/phase-shares.svg)\n",
        _shares_table(heats),
        "## Map cost by density\n",
        "![ns per folio by share of pages](benchmarks/map-by-density.svg)\n",
        *(
            lines_table(
                f"{what}, ns per folio (median)",
                by_density(heats, f"map.density.{what}"),
                lambda share: f"1/{1 / share:.0f}" if share < 1 else "all pages",
            )
            for what in ("preserve", "decode")
        ),
        "## Map cost by generation\n",
        "![ms by generation of KHO](benchmarks/map-by-generation.svg)\n",
        _generations_table(heats),
        *two_designs(run),
        "## Every row\n",
        *(_details(heats, row) for row in ROWS),
    ]
    return "\n".join(part for part in parts if part)


def two_designs(run: dict[str, Any]) -> list[str]:
    """Return the section on notifiers and files, if the run has it."""
    import two_apis  # which imports this module

    tables = two_apis.section(run)
    what = "What this says: [two-apis.md](two-apis.md).\n"
    return ["## By notifiers and by files\n", what, tables] if tables else []


def _shares_table(heats: list[Heat]) -> str:
    size, kinds = shares(heats)
    phases = list(next(iter(kinds.values()), {}))
    rows = [
        [
            kind,
            *(
                f"{duration(took[phase])} ({100 * took[phase] / sum(took.values()):.0f} %)"
                for phase in phases
            ),
            duration(sum(took.values())),
        ]
        for kind, took in kinds.items()
    ]
    return table([f"{size}, medians", *phases, "in all"], rows, 1)


def _generations_table(heats: list[Heat]) -> str:
    notes = [heat for heat in heats if heat.row == "map.generation.preserve"]
    rows = [
        [name, *(duration(value) for value in values), duration(values[0] + values[1])]
        for name, values in by_generation(heats).items()
    ]
    told = ""
    if notes:
        entry = next(iter(largest(notes)[0].entries.values()))
        told = (
            f"\n{largest(notes)[0].title()}, medians. Published for the kernel with the KHO v5"
            f" series: {entry['published']} (another machine, so no ratio).\n"
        )
    return table(["generation", *STEPS, "preserve and publish"], rows, 1) + told


def _details(heats: list[Heat], row: str) -> str:
    here = [heat for heat in heats if heat.row == row]
    if not here or row.startswith(("map.density", "map.generation", "api.")):
        return ""
    unit = ROWS[row].unit
    lines = []
    for heat in here:
        base = next((role for role in heat.entries if role.startswith("luo")), "")
        for role, entry in heat.entries.items():
            own = heat.seconds(role, "median")
            against = heat.seconds(base, "median") if base else own
            lines.append(
                [
                    heat.title(),
                    role,
                    duration(entry["min"]),
                    duration(entry["median"]),
                    duration(entry["iqr"]),
                    str(entry["rounds"]),
                    duration(own / heat.items),
                    three(own / against) if against > 0 and own >= 0 else "",
                ]
            )
    head = ["size", "who", "minimum", "median", "IQR", "rounds", f"a {unit}", "luo = 1"]
    work = ROWS[row].work
    text = [f"### {row}\n", f"{work[0].upper()}{work[1:]}.\n"]
    if any("less" in entry for heat in here for entry in heat.entries.values()):
        text.append("The last two columns are less the bare loop.\n")
    if row == "liveupdate.memory":
        rows = [
            [
                heat.title(),
                three(entry["value"]),
                three(entry["prepare"]),
                binary(entry["image"]),
                binary(entry["hardware"]),
            ]
            for heat in here
            for entry in heat.entries.values()
        ]
        text.append(
            table(
                ["size", "bytes a device", "until PREPARE is over", "image", "device tree"], rows, 1
            )
        )
    else:
        text.append(table(head, lines, 2))
    return "\n".join(text)


def saved(name: str) -> list[Path]:
    """Return the runs that ``--benchmark-save=<name>`` left, the newest last."""
    return sorted(RESULTS.glob(f"*/*_{name}.json"), key=lambda path: path.stat().st_mtime_ns)


def quoted(readme: str, text: str) -> str:
    """Return the README with the block between its marks replaced."""
    before, _, rest = readme.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}"


def write_two_apis(run: dict[str, Any], at: Path) -> None:
    """Put the figures of a run that has such rows into the page on the two designs."""
    import two_apis  # which imports this module

    text = two_apis.block(run)
    if text:
        at.write_text(quoted(TWO_APIS.read_text(), text))


def main() -> None:
    """Write everything from a run, or from what an earlier one left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run",
        nargs="?",
        help="JSON of a run, or the name of saved ones, of which"
        " the newest is taken; none: what is kept of the last one",
    )
    parser.add_argument("--command", default="make bench", help="what the page says of the run")
    parser.add_argument("--into", type=Path, help="write page and plots here instead of docs/")
    given = parser.parse_args()
    page_at, beside = PAGE, BESIDE
    if given.into:
        page_at, beside = given.into / PAGE.name, given.into / BESIDE.name
    beside.mkdir(parents=True, exist_ok=True)
    kept = beside / "run.json"
    if given.run:
        path = Path(given.run) if given.run.endswith(".json") else saved(given.run)[-1]
        run = condense(json.loads(path.read_text()), given.command)
        kept.write_text(json.dumps(run, indent=1) + "\n")
    run = json.loads(kept.read_text())
    page_at.write_text(page(run))
    plots(run, beside)
    write_two_apis(run, page_at.parent / TWO_APIS.name if given.into else TWO_APIS)
    readme = README.read_text()
    if not given.into and MARKS[0] in readme:
        README.write_text(quoted(readme, block(run)))
    for one in verdicts(run):
        print(" | ".join(one.cells()))
    print(f"written: {page_at}")


if __name__ == "__main__":
    main()
