"""What a live update cost, as figures for plotly and tables beside them.

Everything is of the ``luo-run/1`` document, and the tables have its figures as they are. Plotly
gets seconds, and the nanoseconds of each bar and dot as ``customdata``.

Names of devices, and of whatever else a host or a driver brings along, are hostile: plotly takes
tags and entities in a text for its own, so all of them go through :func:`plain`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, TypeAlias

from luo.profile.compare import BadDocument, compare
from luo.profile.screen import duration
from luo.report import p95

__all__ = ["Column", "Part", "Section", "Table", "capped", "columns", "sections", "words"]

Document: TypeAlias = Mapping[str, Any]
Span: TypeAlias = tuple[str, int, int]  # a phase, its begin and its end in ns

_OLD: Final = ("prepare", "reboot", "jump", "cancel")
_NEW: Final = ("boot", "restore", "finish")
_LATE: Final = "late RESTORE"
_EVENTS: Final = ("PREPARE", "REBOOT", "RESTORE", _LATE, "FINISH", "CANCEL")
_FIGURES: Final = ("total_ns", "min_ns", "p50_ns", "p95_ns", "p99_ns", "max_ns")
_COLOURED: Final = ("blackout", *_OLD, *_NEW)
_VERDICTS: Final = {"slower": "@blackout", "faster": "@prepare"}
_SYMBOLS: Final = ("circle", "square", "diamond", "cross", "x", "star", "triangle-up", "bowtie")

#: What a document of any size may put on the page.
_NR_ROWS: Final = 256
_NR_DRAWN: Final = 16  # bars of one figure
_NR_HISTOGRAMS: Final = 48
_NR_POINTS: Final = 400  # of a line
_NR_NAMED: Final = 6  # in a sentence
_NR_CHARACTERS: Final = 400
_NR_BARS: Final = 40  # of a histogram
_PARTS: Final = 8  # of them from one power of two to the next
_LONG: Final = 30  # characters of a label beside an axis,
_SHORT: Final = 13  # and on a small screen


@dataclass(frozen=True)
class Column:
    """A column, and what its values are: ``text``, ``ns``, ``count``, ``share`` or ``change``.

    A share is a part of 1, a change what a ratio is above 1.
    """

    title: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows under columns; *note* says what is not in it."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass
class Part:
    """A figure and its table.

    Attributes:
        name: unique on the page.
        label: what the figure shows, for those who do not see it.
        table: its figures.
        choice: what the reader chooses it by, where one of several is shown.
        data, layout: plotly's; a colour ``"@name"`` is the style sheet's.
        labels: texts beside the y axis, ``long`` and ``short``; the width of the screen chooses.
    """

    name: str
    label: str
    table: Table
    choice: str = ""
    data: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two about what is seen, and figures with their tables.

    Attributes:
        name: unique on the page.
        more: tables without a figure, folded away.
        beside: the tables are narrow enough to stand beside the figures on a wide screen.
        chooser: what the reader chooses, if one part at a time is shown.
        zoom: paths whose subtree the reader may have alone.
    """

    name: str
    title: str
    lead: str
    parts: Sequence[Part] = ()
    more: Sequence[Table] = ()
    beside: bool = True
    chooser: str = ""
    zoom: Sequence[str] = ()


def sections(
    document: Document, other: Document | None = None, names: tuple[str, str] = ("", "")
) -> list[Section]:
    """Return what there is to see in *document*, compared with *other*, an earlier one."""
    found = [
        None if other is None else _compared(document, other, names),
        _timeline(document),
        _costs(document),
        _callbacks(document),
        _histograms(document),
        _devices(document),
        _tree(document),
        _spread(document),
    ]
    return [section for section in found if section is not None]


def columns(kind: str, *titles: str) -> list[Column]:
    """Return columns of one kind."""
    return [Column(title, kind) for title in titles]


def capped(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a table of no more rows than a page can bear."""
    left = len(rows) - _NR_ROWS
    note = f"{left:,} more are in the document." if left > 0 else ""
    return Table(caption, columns, rows[:_NR_ROWS], note)


def words(text: object) -> str:
    """Return *text* in a length that a page can bear."""
    said = str(text)
    return said if len(said) <= _NR_CHARACTERS else f"{said[:_NR_CHARACTERS]}…"


# ---- the sections ----


def _timeline(document: Document) -> Section | None:
    """Draw the last update: the old and the new kernel, blackout shaded, and enlarged below."""
    timeline, runs = document.get("timeline"), document["runs"]
    blackout = None
    if timeline:
        kernels = [
            (str(kernel["name"]), [(str(name), int(a), int(b)) for name, a, b in kernel["phases"]])
            for kernel in timeline["kernels"]
        ]
        blackout = timeline.get("blackout")
        lead = "The last update" if len(runs) > 1 else "The update"
        lead += ", on one clock for both kernels."
    elif runs or document.get("dry_reboot_ns"):
        kernels = _in_a_row(document.get("dry_reboot_ns") or document["phases_ns"])
        lead = (
            "Medians of all updates, in a row." if len(runs) > 1 else "One phase after the other."
        )
    else:
        return None
    spans = [(kernel, *span) for kernel, phases in kernels for span in phases]
    rows = [(phase, kernel, begin, end - begin) for kernel, phase, begin, end in spans]
    heads = [*columns("text", "phase", "kernel"), *columns("ns", "begins", "takes")]
    table = Table("Phases, by their begin", heads, sorted(rows, key=lambda row: row[2]))
    part = Part("timeline", "Timeline of the phases of the old and the new kernel", table)
    end = 1.02 * max((stop for *_, stop in spans), default=0)
    names = [plain(name) for name, _ in reversed(kernels)]
    part.layout = {"barmode": "overlay", "height": 200, "shapes": [], "annotations": []}
    part.layout |= {"xaxis": _linear(0, end), "yaxis": {"type": "category", "categoryarray": names}}
    part.data = [_phase(*span) for span in spans]
    if not blackout:
        return Section("timeline", "Timeline", lead, [part])
    begin, stop = blackout
    length = stop - begin
    lead += f" Blackout, {duration(length)}, is shaded."
    counted = runs[-1]["phases_ns"].get("blackout", 0) if runs else 0
    if counted and length - counted > 0.02 * counted:
        lead += f" {duration(length - counted)} of it went to this program's own checks of the"
        lead += f" bytes, which the figure of {duration(counted)} leaves out."
    _shade(part, "", blackout, f"blackout {duration(length)}", x=(begin + stop) / 2e9)
    if length < 0.6 * end:
        part.layout["height"] += 150
        part.layout["yaxis2"] = part.layout["yaxis"] | {"domain": [0, 0.38], "anchor": "x2"}
        part.layout["yaxis"] |= {"domain": [0.6, 1]}
        axis = _linear(begin - 0.03 * length, stop + 0.03 * length, begin)
        part.layout["xaxis2"] = axis | {"anchor": "y2"}
        _shade(part, "2", blackout, "enlarged, from the begin of blackout", x=0, xref="paper")
        part.data += [
            _phase(*span) | {"xaxis": "x2", "yaxis": "y2", "showlegend": False}
            for span in spans
            if span[3] >= begin and span[2] <= stop
        ]
    return Section("timeline", "Timeline", lead, [part])


def _in_a_row(spent: Mapping[str, int]) -> list[tuple[str, list[Span]]]:
    """Return the phases of both kernels one after the other, for documents without a timeline."""
    at, kernels = 0, []
    for kernel, phases in (("old kernel", _OLD), ("new kernel", _NEW)):
        row = []
        for phase in phases:
            if phase in spent:
                row.append((phase, at, at + spent[phase]))
                at += spent[phase]
        kernels.append((kernel, row))
    return [(kernel, row) for kernel, row in kernels if row]


def _phase(kernel: str, phase: str, begin: int, end: int) -> dict[str, Any]:
    bar = _bar(phase, [end - begin], [_hover(end - begin, kernel, phase)], _colour(phase))
    return bar | {"y": [plain(kernel)], "base": [begin / 1e9], "width": 0.62}


def _shade(part: Part, panel: str, blackout: Sequence[int], text: str, **where: Any) -> None:
    x0, x1 = (ns / 1e9 for ns in blackout)
    place = {"xref": f"x{panel}", "yref": f"y{panel} domain"}
    shade = {"type": "rect", "x0": x0, "x1": x1, "y0": 0, "y1": 1, "fillcolor": "@shade"}
    part.layout["shapes"].append(place | shade | {"line": {"width": 0}, "layer": "below"})
    said = _said(text, y=1, yanchor="bottom", font={"color": "@blackout", "size": 12})
    part.layout["annotations"].append(place | said | where)


def _costs(document: Document) -> Section | None:
    """Draw a bar a subsystem, stacked by event."""
    cost: dict[str, dict[str, int]] = {}
    for row in document["callbacks"]:
        of = cost.setdefault(row["subsystem"], {})
        of[_when(row)] = of.get(_when(row), 0) + row["total_ns"]
    if not cost:
        return None
    # Sums are divided by the updates that they are of, unless one of them was left half-way.
    updates = 1 if document["error"] else len(document["runs"]) or 1
    each = f" in one update, the mean of {updates:,}" if updates > 1 else ""
    names = sorted(cost, key=lambda name: -sum(cost[name].values()))
    there = {event for of in cost.values() for event in of}
    events = [*(event for event in _EVENTS if event in there), *sorted(there.difference(_EVENTS))]
    heads = [Column("subsystem"), *columns("ns", "all", *events)]
    rows: list[tuple[Any, ...]] = []
    for name in names:
        of = cost[name]
        spent = (of[event] / updates if event in of else None for event in events)
        rows.append((name, sum(of.values()) / updates, *spent))
    table = capped(f"Callbacks by subsystem{each}", heads, rows)
    part = Part("costs", "Stacked bars: callbacks of each subsystem, by event", table)
    drawn = names[:_NR_DRAWN]
    for event in events:
        spent_ns = [cost[name].get(event, 0) / updates for name in drawn]
        hovers = [_hover(ns, name, event) for name, ns in zip(drawn, spent_ns, strict=True)]
        part.data.append(_bar(event, spent_ns, hovers, _colour(event)))
    part.layout = {"barmode": "stack", "bargap": 0.35, "height": 110 + 34 * len(drawn)}
    part.layout["xaxis"] = _linear(0, 1.02 * max(row[1] for row in rows))
    _label(part, drawn)
    lead = f"What callbacks took{each}. REBOOT and RESTORE, in warm colours, are in blackout."
    if _LATE in there:
        lead += f" What is restored after the last device, which ends it, is {_LATE}."
    return Section("costs", "Cost by subsystem and event", lead, [part])


def _callbacks(document: Document) -> Section | None:
    """Draw how long a call takes, from the shortest to the longest, for the dearest callbacks."""
    rows = sorted(document["callbacks"], key=lambda row: -row["total_ns"])
    if not rows:
        return None
    heads = {
        **{name: Column(name) for name in ("name", "event", "subsystem", "kind")},
        **{name: Column(name, "count") for name in ("calls", "devices")},
        **{name: Column(name.removesuffix("_ns"), "ns") for name in _FIGURES},
        "blackout_share": Column("of blackout", "share"),
        "max_device": Column("slowest device"),
    }
    there = [key for key in heads if any(row.get(key) is not None for row in rows)]
    cells = [tuple(row.get(key) for key in there) for row in rows]
    table = capped("Callbacks, all updates together", [heads[key] for key in there], cells)
    part = Part("callbacks", "Shortest, median and longest call of the dearest callbacks", table)
    drawn = rows[:_NR_DRAWN]
    for name, low, high, width in (
        ("shortest to longest", "min_ns", "max_ns", 3),
        ("half to 99 % of calls", "p50_ns", "p99_ns", 9),
    ):
        xs: list[float | None] = []
        ys: list[int | None] = []
        for place, row in enumerate(drawn):
            xs += [_seconds(row[low]), _seconds(row[high]), None]
            ys += [place, place, None]
        line = {"width": width, "color": "@other"}
        part.data.append(_line(name, xs, ys) | {"line": line, "opacity": 0.5, "hoverinfo": "skip"})
    medians = [row["p50_ns"] for row in drawn]
    hovers = [_hover(row["p50_ns"], row["name"], row["event"], "median") for row in drawn]
    dots = _dots([_seconds(ns) for ns in medians], list(range(len(drawn))), hovers)
    dots["marker"] |= {"color": [_colour(_when(row)) for row in drawn]}
    part.data.append(dots | {"customdata": medians})
    ends = [row[key] for row in drawn for key in ("min_ns", "max_ns")]
    part.layout = {"height": 110 + 28 * len(drawn), "xaxis": _log(min(ends), max(ends))}
    _label(part, [f"{row['name']} {row['event']}" for row in drawn])
    lead = "How long one call takes, on a logarithmic scale: the dot is the median, in the colour"
    lead += " of its event. A call may serve many devices at once."
    return Section("callbacks", "Callbacks", lead, [part], beside=False)


def _histograms(document: Document) -> Section | None:
    """Draw a histogram of each of the dearest callbacks that has one; one is shown at a time."""
    rows = [row for row in document["callbacks"] if row.get("histogram") and row["calls"] > 1]
    rows.sort(key=lambda row: -row["total_ns"])
    parts = [_histogram(f"histogram-{k}", row) for k, row in enumerate(rows[:_NR_HISTOGRAMS])]
    if not parts:
        return None
    lead = "Durations of the calls of one callback, on a logarithmic scale."
    if len(rows) > len(parts):
        lead += f" These are the {len(parts)} dearest callbacks of {len(rows):,}."
    return Section("histograms", "Histograms", lead, parts, chooser="Callback")


def _histogram(name: str, row: Document) -> Part:
    bars = _merged(row["histogram"])
    title = f"{row['name']} {row['event']}"
    heads = [*columns("ns", "from", "to"), Column("calls", "count")]
    table = Table(f"Calls of {title} by duration", heads, bars)
    part = Part(name, f"Histogram of the calls of {title}", table, f"{title} ({row['kind']})")
    # A line that goes up and down at the ends of each bar: bars have no width on such an axis.
    xs: list[float | None] = []
    ys: list[int | None] = []
    for low, high, count in bars:
        xs += [_seconds(low), _seconds(low), _seconds(high), _seconds(high)]
        ys += [0, count, count, 0]
    colour = _colour(_when(row))
    outline = {"line": {"width": 1.5, "color": colour}, "fill": "tozeroy", "hoverinfo": "skip"}
    part.data.append(_line("calls", xs, ys) | outline | {"fillcolor": f"{colour}-soft"})
    middles = [math.sqrt(max(1, low) * high) / 1e9 for low, high, _ in bars]
    hovers = [
        f"{count:,} calls<br>{duration(low)} to {duration(high)}" for low, high, count in bars
    ]
    dots = _dots(middles, [count for *_, count in bars], hovers)
    dots["marker"] |= {"opacity": 0}
    part.data.append(dots)
    axis = _log(bars[0][0], bars[-1][1])
    part.layout = {"height": 320, "hovermode": "x", "xaxis": axis, "shapes": [], "annotations": []}
    part.layout["yaxis"] = {"title": {"text": "calls"}, "rangemode": "tozero", "tickformat": ",d"}
    if max(count for *_, count in bars) < 5:
        part.layout["yaxis"]["dtick"] = 1
    near = 0.06 * (axis["range"][1] - axis["range"][0])
    said: list[tuple[float, str]] = []
    for quantile in ("p50", "p95", "p99"):
        if row.get(f"{quantile}_ns"):
            x = math.log10(row[f"{quantile}_ns"] / 1e9)
            part.layout["shapes"].append(_rule("x", 10**x))
            if said and x - said[-1][0] < near:  # one text would lie on the other
                said[-1] = (said[-1][0], f"{said[-1][1]}, {quantile}")
            else:
                said.append((x, quantile))
    for x, text in said:
        part.layout["annotations"].append(_said(text, x=x, y=1, yref="paper", yanchor="bottom"))
    return part


def _merged(buckets: Iterable[Sequence[int]]) -> list[tuple[int, int, int]]:
    """Return *buckets*, too fine for a screen, as few enough bars: low, high, and calls."""
    buckets, parts = list(buckets), _PARTS
    while True:
        bars = []
        for (low, high), of in groupby(buckets, key=lambda bucket: _bounds(bucket[0], parts)):
            held = list(of)
            calls = sum(count for *_, count in held)
            bars.append((min(low, held[0][0]), max(high, held[-1][1]), calls))
        if len(bars) <= _NR_BARS or parts == 1:
            return bars
        parts //= 2


def _bounds(ns: int, parts: int) -> tuple[int, int]:
    """Return the ends of the bar of *ns*: one of equal *parts* from a power of two to the next."""
    power = 1 << max(1, ns).bit_length() - 1
    part = (ns - power) * parts // power
    return power + power * part // parts, power + power * (part + 1) // parts


def _devices(document: Document) -> Section | None:
    """Draw a bar for each of the dearest devices, in blackout and outside."""
    rows = document.get("worst_devices")
    if not rows:
        return None
    keys = ("path", "driver", "bus", "blackout_ns", "total_ns")
    heads = [*columns("text", "device", "driver", "bus"), *columns("ns", "in blackout", "all")]
    table = capped("Dearest devices", heads, [tuple(row[key] for key in keys) for row in rows])
    part = Part("devices", "Bars: the dearest devices, in blackout and outside", table)
    drawn = rows[:_NR_DRAWN]
    for name, colour, spent in (
        ("in blackout", "@blackout", [row["blackout_ns"] for row in drawn]),
        ("outside", "@prepare", [row["total_ns"] - row["blackout_ns"] for row in drawn]),
    ):
        hovers = [_hover(ns, row["path"], name) for row, ns in zip(drawn, spent, strict=True)]
        part.data.append(_bar(name, spent, hovers, colour))
    part.layout = {"barmode": "stack", "bargap": 0.3, "height": 110 + 26 * len(drawn)}
    part.layout["xaxis"] = _linear(0, 1.02 * max(row["total_ns"] for row in drawn))
    _label(part, [row["path"] for row in drawn])
    lead = "Which devices cost most, all updates together. What a batch callback took is shared"
    lead += " out evenly among the devices that it served."
    return Section("devices", "Dearest devices", lead, [part], beside=False)


def _tree(document: Document) -> Section | None:
    """Draw the subtrees as an icicle, the redder the more of it is in blackout."""
    rows = (document.get("subtrees") or [])[:_NR_ROWS]
    if not rows or not rows[0]["total_ns"]:
        return None
    names = [row["path"] or "all devices" for row in rows]
    keys = ("devices", "blackout_ns", "total_ns")
    cells = [(name, *(row[key] for key in keys)) for name, row in zip(names, rows, strict=True)]
    heads = [*columns("text", "subtree"), *columns("count", "devices")]
    heads += columns("ns", "in blackout", "all")
    table = Table("Subtrees, with everything below", heads, cells)
    part = Part("tree", "Icicle: subtrees of devices by cost", table)
    below: dict[str, int] = {}
    for row in rows[1:]:
        below[row["parent"]] = below.get(row["parent"], 0) + row["total_ns"]
    shares, hovers = [], []
    for name, row in zip(names, rows, strict=True):
        shares.append(min(1, row["blackout_ns"] / row["total_ns"]) if row["total_ns"] else 0)
        said = f"{row['devices']:,} devices, {100 * shares[-1]:.0f} % in blackout"
        hovers.append(f"{_hover(row['total_ns'], name)}<br>{said}")
    bar = {"title": {"text": "in blackout", "side": "top"}, "orientation": "h", "thickness": 10}
    bar |= {"tickformat": ".0%", "len": 0.5, "y": 0, "yanchor": "top", "ypad": 4, "nticks": 3}
    marker = {"colors": shares, "colorscale": [[0, "@cold"], [1, "@hot"]], "cmin": 0, "cmax": 1}
    marker |= {
        "line": {"width": 1 if len(rows) < 64 else 0.3, "color": "@card"},
        "colorbar": bar,
        "showscale": True,
    }
    icicle = {
        "type": "icicle",
        "ids": [f"/{row['path']}" for row in rows],
        "parents": ["" if row["parent"] is None else f"/{row['parent']}" for row in rows],
        "labels": [
            "others" if name.endswith("/…") else plain(name.rpartition("/")[2]) for name in names
        ],
        # What a subtree has beyond its parts: rounded sums need not be those of the parts.
        "values": [max(0, row["total_ns"] - below.get(row["path"], 0)) / 1e9 for row in rows],
        "branchvalues": "remainder",
        "customdata": [row["total_ns"] for row in rows],
        "text": [duration(row["total_ns"]) for row in rows],
        "texttemplate": "%{label}<br>%{text}",
        "textfont": {"color": "@ink"},
        "tiling": {"orientation": "v"},
        "pathbar": {"thickness": 24},
        "maxdepth": 5,
    }
    part.data = [icicle | _hovered(hovers) | {"marker": marker}]
    part.layout = {"height": 460, "margin": {"t": 28, "l": 0, "r": 0, "b": 48}}
    part.layout["uniformtext"] = {"minsize": 11, "mode": "hide"}
    zoom = [row["path"] for row in rows if row["path"] in below]
    lead = "What a part of the machine costs with everything below it, all updates together."
    return Section("tree", "Tree of devices by cost", lead, [part], zoom=zoom)


def _spread(document: Document) -> Section | None:
    """Draw the phases update by update."""
    runs = document["runs"]
    if len(runs) < 2:
        return None
    phases = [name for name in _COLOURED if name in runs[0]["phases_ns"]]
    taken = {name: [run["phases_ns"].get(name, 0) for run in runs] for name in phases}
    rows = [(name, min(of), statistics.median(of), p95(of), max(of)) for name, of in taken.items()]
    heads = [Column("phase"), *columns("ns", "min", "median", "p95", "max")]
    part = Part(
        "spread",
        "Lines: what each phase took, update by update",
        Table(f"{len(runs):,} updates", heads, rows),
    )
    step = -(-len(runs) // _NR_POINTS)
    starts = range(0, len(runs), step)
    numbers = [at + 1 for at in starts]
    drawn = {name: [max(of[at : at + step]) for at in starts] for name, of in taken.items()}
    for (name, spent), symbol in zip(drawn.items(), _SYMBOLS, strict=False):
        strong = name == "blackout"
        hovers = [_hover(ns, name, f"update {k}") for k, ns in zip(numbers, spent, strict=True)]
        dots = _dots(numbers, [_seconds(ns) for ns in spent], hovers)
        dots |= {"mode": "lines+markers", "name": name, "showlegend": True, "customdata": spent}
        dots["line"] = {"width": 3 if strong else 1.3, "dash": "solid" if strong else "dot"}
        dots["line"] |= {"color": _colour(name)}
        dots["marker"] = {"size": 7 if strong else 5, "symbol": symbol}
        part.data.append(dots)
    axis = {"title": {"text": "update"}, "tickformat": ",d"}
    part.layout = {"height": 400, "xaxis": axis, "shapes": [], "annotations": []}
    part.layout["yaxis"] = _log(min(map(min, drawn.values())), max(map(max, drawn.values())))
    part.layout["margin"] = {"r": 52}
    _, _, median, high, _ = rows[0]
    for what, ns, anchor in (("median", median, "top"), ("p95", high, "bottom")):
        part.layout["shapes"].append(_rule("y", _seconds(ns)))
        place = {"x": 1, "xref": "paper", "xanchor": "left", "y": math.log10(_seconds(ns))}
        part.layout["annotations"].append(_said(what, yanchor=anchor) | place)
    each = Table(
        "Each update" if step == 1 else f"The slowest of every {step:,} updates",
        [Column("update", "count"), *columns("ns", *phases)],
        list(zip(numbers, *drawn.values(), strict=True)),
    )
    lead = "What the phases took, update by update, on a logarithmic scale; median and p95 are"
    lead += " those of blackout."
    if step > 1:
        lead += f" Each point is the slowest of {step:,}."
    return Section("spread", "Spread over the updates", lead, [part], [each])


def _compared(document: Document, other: Document, names: tuple[str, str]) -> Section:
    """Draw how much longer phases and callbacks take in *document* than in *other*."""
    try:
        result = compare(other, document)
    except BadDocument as error:
        why = f"There is nothing to compare with {words(names[1])}: {words(error)}."
        return Section("comparison", "Comparison", why)
    rows = result["rows"]
    cells = []
    for row in rows:
        ratio, low, high = (
            None if row[k] is None else row[k] - 1 for k in ("ratio", "low", "high")
        )
        cells.append((row["name"], ratio, row["verdict"], row["a_ns"], row["b_ns"], low, high))
    heads = [Column("what"), Column("change", "change"), Column("verdict")]
    heads += [*columns("ns", "before", "now"), *columns("change", "at least", "at most")]
    part = Part(
        "comparison",
        "How much longer or shorter phases and callbacks take, with confidence intervals",
        capped("Medians before and now", heads, cells),
    )
    drawn = [row for row in rows if row["ratio"] is not None][: 2 * _NR_DRAWN]
    if drawn:
        ratios = [row["ratio"] for row in drawn]
        hovers = [
            f"{plain(row['name'])}<br><b>{row['ratio']:.3g}</b> times as long: {row['verdict']}"
            for row in drawn
        ]
        dots = _dots(ratios, list(range(len(drawn))), hovers)
        dots["marker"] |= {"color": [_VERDICTS.get(row["verdict"], "@other") for row in drawn]}
        dots["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [(row["high"] or row["ratio"]) - row["ratio"] for row in drawn],
            "arrayminus": [row["ratio"] - (row["low"] or row["ratio"]) for row in drawn],
            "thickness": 2,
            "width": 4,
            "color": "@muted",
        }
        part.data.append(dots | {"customdata": ratios})
        axis = {"type": "log", "title": {"text": "times as long as before"}, "tickformat": "~g"}
        part.layout = {"height": 110 + 24 * len(drawn), "xaxis": axis, "shapes": [_rule("x", 1)]}
        # Of "subsystem/name/EVENT" the last two: the table has all of it.
        _label(part, [" ".join(row["name"].split("/")[-2:]) for row in drawn])
    lead = f"{words(names[0])} ({_count(result['runs']['b'])}) against {words(names[1])}"
    lead += f" ({_count(result['runs']['a'])}). Lines are confidence intervals, which hold all"
    lead += f" together with {100 * result['confidence']:.0f} %; one that reaches the 1 tells no"
    lead += " difference."
    for verdict in _VERDICTS:
        found = [row["name"] for row in rows if row["verdict"] == verdict]
        if found:
            more = f" and {len(found) - _NR_NAMED} more" if len(found) > _NR_NAMED else ""
            lead += f" {verdict.capitalize()}: {words(', '.join(found[:_NR_NAMED]))}{more}."
    for warning in result["warnings"]:
        lead += f" {words(warning[:1].upper() + warning[1:])}."
    apart = [(one["what"], str(one["a"]), str(one["b"])) for one in result["differences"]]
    besides = [Table("What else was different", columns("text", "what", "before", "now"), apart)]
    return Section("comparison", "Comparison", lead, [part], besides if apart else (), beside=False)


def _count(runs: int) -> str:
    return f"{runs:,} updates" if runs != 1 else "one update"


# ---- pieces of figures ----


def _bar(name: str, spent: Sequence[float], hovers: list[str], colour: str) -> dict[str, Any]:
    """Return bars to the right, of *spent* nanoseconds."""
    # A border of the same colour: what is short is seen all the same.
    marker = {"color": colour, "line": {"color": colour, "width": 1}}
    bars = {"type": "bar", "orientation": "h", "name": plain(name), "marker": marker}
    xs, ys = [ns / 1e9 for ns in spent], list(range(len(spent)))
    return bars | {"x": xs, "y": ys, "customdata": list(spent)} | _hovered(hovers)


def _line(name: str, xs: Sequence[float | None], ys: Sequence[int | None]) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "name": name, "x": xs, "y": ys}


def _dots(xs: Sequence[float], ys: Sequence[float], hovers: list[str]) -> dict[str, Any]:
    marker = {"size": 11, "line": {"width": 2, "color": "@card"}}
    dots = {"type": "scatter", "mode": "markers", "x": xs, "y": ys, "marker": marker}
    return dots | {"showlegend": False} | _hovered(hovers)


def _hovered(texts: list[str]) -> dict[str, Any]:
    return {"hovertext": texts, "hovertemplate": "%{hovertext}<extra></extra>"}


def _hover(ns: float, *what: str) -> str:
    """Return what is said of one bar or dot."""
    return f"{' '.join(map(plain, what))}<br><b>{duration(ns)}</b> ({round(ns):,} ns)"


def _said(text: str, **where: Any) -> dict[str, Any]:
    """Return an annotation."""
    return {"text": text, "showarrow": False, "font": {"size": 11, "color": "@muted"}, **where}


def _rule(axis: str, at: float) -> dict[str, Any]:
    """Return a line across the figure at *at* of *axis*."""
    across = "y" if axis == "x" else "x"
    ends = {f"{axis}0": at, f"{axis}1": at, f"{across}0": 0, f"{across}1": 1}
    line = {"color": "@muted", "width": 1, "dash": "dot"}
    return {"type": "line", **ends, f"{across}ref": "paper", "line": line}


def _when(row: Document) -> str:
    """Return the event of a callback, told from the same event outside blackout."""
    late = row["event"] == "RESTORE" and row.get("blackout_share", 0) is None
    return _LATE if late else str(row["event"])


def _colour(name: str) -> str:
    """Return the colour of a phase or event."""
    if name == _LATE:
        return "@late"
    return f"@{name.lower()}" if name.lower() in _COLOURED else "@other"


def _seconds(ns: float) -> float:
    """Return seconds for a logarithmic axis, where there is no 0."""
    return max(1, ns) / 1e9


def _label(part: Part, texts: Sequence[str]) -> None:
    """Put *texts* beside the y axis, the first one on top."""
    axis = {"tickmode": "array", "tickvals": list(range(len(texts))), "showgrid": False}
    axis |= {"range": [len(texts) - 0.4, -0.6], "zeroline": False}
    part.layout["yaxis"] = axis
    part.labels = {
        "long": [plain(_shortened(text, _LONG)) for text in texts],
        "short": [plain(_shortened(text, _SHORT)) for text in texts],
    }


def _linear(low_ns: float, high_ns: float, zero_ns: float = 0) -> dict[str, Any]:
    """Return an axis of seconds from *low_ns* to *high_ns*, whose texts count from *zero_ns*."""
    values = _steps(low_ns - zero_ns, high_ns - zero_ns)
    return {
        "range": [low_ns / 1e9, max(1, high_ns) / 1e9],
        "tickmode": "array",
        "tickvals": [(value + zero_ns) / 1e9 for value in values],
        "ticktext": [duration(value) if value else "0" for value in values],
    }


def _log(low_ns: float, high_ns: float) -> dict[str, Any]:
    """Return a logarithmic axis of seconds that shows *low_ns* to *high_ns*."""
    low, high = math.log10(max(1, low_ns)), math.log10(max(1, low_ns, high_ns))
    spare = max(0.02, 0.04 * (high - low))
    low, high = low - spare, high + spare
    decades = range(math.floor(low), math.ceil(high) + 1)
    if high - low < 0.7:
        values = _steps(10**low, 10**high)
    else:
        digits = (1, 2, 5) if high - low < 2.3 else (1,)
        values = [float(digit * 10**k) for k in decades for digit in digits]
    values = [value for value in values if low <= math.log10(value) <= high]
    return {
        "type": "log",
        "range": [low - 9, high - 9],
        "tickmode": "array",
        "tickvals": [value / 1e9 for value in values],
        "ticktext": [duration(value) for value in values],
    }


def _steps(low: float, high: float) -> list[float]:
    """Return some four to six round numbers from *low* to *high*."""
    rough = max(high - low, 1) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= rough)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def plain(text: object) -> str:
    """Return *text* as plotly draws it literally: it takes tags and entities for its own."""
    return words(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _shortened(text: str, most: int) -> str:
    """Return *text* without its middle: names of devices differ at their end."""
    if len(text) <= most:
        return text
    return f"{text[: most // 3]}…{text[-(most - most // 3 - 1) :]}"
