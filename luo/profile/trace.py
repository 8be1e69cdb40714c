"""What a trace of a live update shows, whichever program draws it.

A :class:`Trace` is made from a :class:`~luo.report.Report`, with a slice for every callback or for
the longest of them, or from a ``luo-run/1`` document, which has phases and sums alone.
:mod:`luo.profile.perfetto` and :mod:`luo.profile.chrome` write it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from typing import Any, Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from luo._kho import SPAN
from luo.report import Report, Track, version

__all__ = [
    "NR_SPANS",
    "Counter",
    "Lane",
    "Process",
    "Slice",
    "Trace",
    "from_document",
    "from_report",
    "kernel_of",
    "printable",
]

NR_SPANS: Final = 100_000
#: The callbacks of each phase that has some.
_EVENT_OF: Final = {
    name: name.upper() for name in ("prepare", "reboot", "cancel", "restore", "finish")
}
_OLD: Final = "old kernel"
_NEW: Final = "new kernel"
_OLD_PHASES: Final = ("prepare", "reboot", "cancel")
_NEW_PHASES: Final = ("jump", "boot", "restore", "finish")
_STATE_AFTER: Final = {"prepare": "prepared", "restore": "updated"}
_NO_SLICE: Final = "no callback has a slice: sums alone"
_FIGURES: Final = ("calls", "devices", "total_ns", "min_ns", "p50_ns", "p99_ns", "max_ns")
_NR_ROWS: Final = 50  # sums that a phase carries, the dearest
_NR_COUNTERS: Final = 32
_NR_BINS: Final = 1000  # of the counter of callbacks that run
_CHUNK: Final = 1 << 18  # spans looked at in one go, 8 MiB


_Phases: TypeAlias = Sequence[tuple[str, int, int]]  # name, begin, end
_Kernels: TypeAlias = Sequence[tuple[str, _Phases]]


@dataclass(frozen=True, slots=True)
class Slice:
    """Something on a lane that took time, or an instant.

    Attributes:
        name, categories: what it is.
        begin_ns, end_ns: on the clock of the kernels; *end_ns* is None for an instant.
        args: what is said of it: str, int, float, or a mapping of these.
    """

    name: str
    categories: tuple[str, ...]
    begin_ns: int
    end_ns: int | None
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lane:
    """A row of the picture.

    Attributes:
        name: its name.
        slices: makes its slices when they are written: in order of time, none partly over another.
    """

    name: str
    slices: Callable[[], Iterable[Slice]]


@dataclass(frozen=True, slots=True)
class Counter:
    """A figure over time.

    Attributes:
        name, unit: what it counts.
        points: (nanoseconds, value from then on), in order of time.
    """

    name: str
    unit: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Process:
    """A kernel; or a group of lanes that is none.

    Attributes:
        name: its name.
        pid: its number; 0 for what is no kernel.
        remarks: what is missing in it, a line each.
        lanes, counters: from the top.
    """

    name: str
    pid: int
    remarks: tuple[str, ...] = ()
    lanes: tuple[Lane, ...] = ()
    counters: tuple[Counter, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """A live update as processes with lanes.

    Attributes:
        processes: blackout, then the kernels in order of time.
        begin_ns: when the first of it begins.
        about: what it is a trace of.
    """

    processes: tuple[Process, ...]
    begin_ns: int
    about: Mapping[str, Any]


def printable(text: str) -> str:
    r"""Return *text* as valid Unicode on one line.

    A name from ``/sys`` may hold bytes that are no UTF-8, which Python keeps as surrogates, and
    control characters. Both become ``\x`` and ``\u`` escapes.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def kernel_of(event: str) -> str:
    """Return which kernel calls the callbacks of *event*."""
    return _NEW if event.lower() in _NEW_PHASES else _OLD


# ---- from a report ----


def from_report(report: Report, spans: int = NR_SPANS) -> Trace:
    """Return the trace of the last live update of *report*.

    Args:
        report: the report; its kernels recorded spans if they had ``spans=``.
        spans: how many callbacks have a slice of their own at most, the longest; those of both
            kernels together.
    """
    tracks = report.tracks
    windows = [_phases_of(track) for track in tracks]
    chosen, recorded = _longest([_spans_of(track) for track in tracks], spans)
    pids = [track.pid for track in tracks]
    if len(set(pids)) < len(pids) or not all(pids):
        pids = list(range(1, len(tracks) + 1))  # a kernel is a process here even if it had none
    kernels = []
    for track, phases, mine, seen, pid in zip(tracks, windows, chosen, recorded, pids, strict=True):
        rows = [row for row in track.profile.rows() if _is_of(track, row["event"])]
        dropped = int(track.profile.dropped)
        remarks, counters = [], []
        if not seen:
            remarks.append(_NO_SLICE)
        elif len(mine) < seen:
            remarks.append(f"slices of the {len(mine):,} longest of {seen:,} callbacks")
        if dropped:
            remarks.append(f"{dropped:,} callbacks not recorded: no room")
        if seen:
            counters.append(_running(_spans_of(track), phases))
        if remarks:
            counters += _costs(phases, rows)
        lanes = [Lane("phases", partial(_phase_slices, phases, rows))]
        lanes += _callback_lanes(mine, track.profile.labels, _path_of(track))
        kernels.append(Process(track.name, pid, tuple(remarks), tuple(lanes), tuple(counters)))
    about = {
        "host": str(report.source.get("path") or report.source.get("kind", "")),
        "updates": len(report.runs),
        "callbacks": sum(recorded),
        "slices": sum(map(len, chosen)),
        "not_recorded": sum(int(track.profile.dropped) for track in tracks),
        "luo_version": version(),
    }
    return _trace(kernels, list(chain(*windows)), report.blackout, report.runs, about)


def _path_of(track: Track) -> Callable[[int], str]:
    tree = track.profile.tree
    return str if tree is None else cast("Callable[[int], str]", tree.path)


def _phases_of(track: Track) -> _Phases:
    """Return name, begin and end of the phases of *track* that are of this update."""
    wanted = _NEW_PHASES if track.name == _NEW else _OLD_PHASES
    return sorted(
        ((name, *mark) for name, mark in track.marks.items() if name in wanted),
        key=lambda phase: (phase[1], -phase[2]),
    )


def _is_of(track: Track, event: str) -> bool:
    """Whether *track* called *event* in this update; its profile has other updates' as well."""
    return (kernel_of(event) == _NEW) == (track.name == _NEW)


def _spans_of(track: Track) -> Iterator[NDArray[np.void]]:
    """Yield the spans of *track*, some at a time."""
    wanted = np.array([_is_of(track, label[1]) for label in track.profile.labels], np.bool_)
    spans = track.profile.spans
    for at in range(0, len(spans), _CHUNK):
        chunk = spans[at : at + _CHUNK]
        yield chunk[wanted[chunk["key"]]]


def _longest(
    sources: Iterable[Iterable[NDArray[np.void]]], most: int
) -> tuple[list[NDArray[np.void]], list[int]]:
    """Return the *most* longest spans of all *sources*, by source, and how many each has."""
    chosen, seen = [], []
    for source in sources:
        kept: list[NDArray[np.void]] = []
        count = 0
        for chunk in source:
            count += len(chunk)
            kept.append(chunk)
            if sum(map(len, kept)) > most + _CHUNK:
                kept = _cut(kept, most)
        chosen.append(np.concatenate(kept) if kept else np.empty(0, SPAN))
        seen.append(count)
    return _cut(chosen, most), seen


def _cut(parts: Sequence[NDArray[np.void]], most: int) -> list[NDArray[np.void]]:
    """Return of each part what is among the *most* longest of all."""
    if sum(map(len, parts)) <= most:
        return list(parts)
    ns = np.concatenate([part["ns"] for part in parts])
    mask = np.zeros(len(ns), np.bool_)
    if most:
        mask[np.argpartition(ns, -most)[-most:]] = True
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return [part[keep] for part, keep in zip(parts, np.split(mask, ends), strict=True)]


def _callback_lanes(
    spans: NDArray[np.void],
    labels: Sequence[tuple[str, str, str, str]],
    path: Callable[[int], str],
) -> Iterator[Lane]:
    """Yield a lane of subsystems, then one of drivers and buses for each worker."""
    of_subsystem = np.array([kind == "subsystem" for _, _, kind, _ in labels], np.bool_)
    above = of_subsystem[spans["key"]]
    groups = [("subsystems", spans[above])]
    workers = np.unique(spans["worker"][~above])
    for worker in workers.tolist():
        name = f"devices, worker {worker}" if len(workers) > 1 else "devices"
        groups.append((name, spans[~above & (spans["worker"] == worker)]))
    for name, group in groups:
        for at, lane in enumerate(_without_overlap(group), 1):
            yield Lane(name if at == 1 else f"{name} ({at})", partial(_slices, lane, labels, path))


def _without_overlap(spans: NDArray[np.void]) -> list[NDArray[np.void]]:
    """Return *spans* in order of time; as several lanes, if some lie over one another.

    A worker calls one callback after the other. Only where a cost model says how long each took
    may the next begin before that is over.
    """
    spans = spans[np.lexsort((spans["ns"], spans["begin_ns"]))]
    begins, ends = spans["begin_ns"], spans["begin_ns"] + spans["ns"]
    if (ends[:-1] <= begins[1:]).all():
        return [spans] if len(spans) else []
    lane_of = np.empty(len(spans), np.int64)
    free: list[tuple[int, int]] = []  # when each lane is, soonest first
    for at, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        lane = len(free)
        if free and free[0][0] <= begin:
            lane = heapq.heapreplace(free, (end, free[0][1]))[1]
        else:
            heapq.heappush(free, (end, lane))
        lane_of[at] = lane
    order = np.argsort(lane_of, kind="stable")
    cuts = np.flatnonzero(np.diff(lane_of[order])) + 1
    return [spans[which] for which in np.split(order, cuts)]


def _slices(
    spans: NDArray[np.void],
    labels: Sequence[tuple[str, str, str, str]],
    path: Callable[[int], str],
) -> Iterator[Slice]:
    named = [(f"{name} {event}", (subsystem, kind)) for subsystem, event, kind, name in labels]
    for at in range(0, len(spans), _CHUNK):
        for begin, ns, key, device, devices, _ in spans[at : at + _CHUNK].tolist():
            args: dict[str, Any] = {}
            if device >= 0:
                args["device" if devices <= 1 else "first device"] = path(device)
            if devices > 1:
                args["devices"] = devices
            name, categories = named[key]
            yield Slice(name, categories, begin, begin + ns, args)


def _running(spans: Iterable[NDArray[np.void]], phases: _Phases) -> Counter:
    """Return how many callbacks ran at a time, with or without a slice: the mean of each bin."""
    first, last = _bounds(phases)
    width = max(1, -(-(last - first) // _NR_BINS))
    busy = np.zeros(_NR_BINS + 1)  # ns in bins that are covered in part
    covered = np.zeros(_NR_BINS + 1)  # change of the number of spans that cover a bin whole
    for chunk in spans:
        begins = np.clip(chunk["begin_ns"], first, last) - first
        ends = np.clip(chunk["begin_ns"] + chunk["ns"], first, last) - first
        i, j = begins // width, ends // width
        here = np.minimum(ends, (i + 1) * width) - begins
        busy += np.bincount(i, here, _NR_BINS + 1)
        later = j > i
        busy += np.bincount(j[later], (ends - j * width)[later], _NR_BINS + 1)
        covered += np.bincount(i[later] + 1, minlength=_NR_BINS + 1)
        covered -= np.bincount(j[later], minlength=_NR_BINS + 1)
    level = np.round(busy / width + np.cumsum(covered), 3)
    change = np.flatnonzero(np.diff(level, prepend=-1))
    points = [(first + at * width, float(level[at])) for at in change.tolist()]
    points = [point for point in points if point[0] < last]
    return Counter("callbacks running", "callbacks", [*points, (last, 0.0)])


# ---- from a document ----


def from_document(document: Mapping[str, Any]) -> Trace:
    """Return the trace of a ``luo-run/1`` *document*: phases, and sums of callbacks by update.

    A document without ``timeline`` has its phases laid end to end, their medians.

    Raises:
        LookupError, TypeError, ValueError: it is none.
    """
    runs, source = document["runs"], document["source"]
    remarks = [_NO_SLICE]
    if len(runs) > 1:
        remarks.append(f"sums of {len(runs):,} updates in the phases, their means as counters")
    if document.get("timeline"):
        kernels, blackout = _measured(document["timeline"])
        figures = runs
    else:
        remarks.append("medians of the phases, laid end to end")
        kernels, blackout = _end_to_end(document.get("dry_reboot_ns") or document["phases_ns"])
        figures = ()
    processes = []
    for pid, (name, phases) in enumerate(kernels, 1):
        events = {_EVENT_OF.get(phase) for phase, _, _ in phases}
        rows = [row for row in document["callbacks"] if row["event"] in events]
        processes.append(
            Process(
                name,
                pid,
                tuple(remarks),
                (Lane("phases", partial(_phase_slices, phases, rows)),),
                tuple(_costs(phases, rows, max(1, len(runs)))),
            )
        )
    about = {
        "host": str(source.get("path") or source.get("kind", "")),
        "updates": len(runs),
        "luo_version": str(document["luo_version"]),
    }
    every = [phase for _, phases in kernels for phase in phases]
    return _trace(processes, every, blackout, figures, about)


def _measured(timeline: Mapping[str, Any]) -> tuple[_Kernels, tuple[int, int] | None]:
    """Return the kernels' phases, and the blackout, of a document's *timeline*."""
    origin = int(timeline["begin_ns"])
    kernels = [
        (
            str(kernel["name"]),
            [
                (str(phase), origin + int(begin), origin + int(end))
                for phase, begin, end in kernel["phases"]
            ],
        )
        for kernel in timeline["kernels"]
    ]
    if not timeline.get("blackout"):
        return kernels, None
    begin, end = timeline["blackout"]
    return kernels, (origin + int(begin), origin + int(end))


def _end_to_end(spent: Mapping[str, Any]) -> tuple[_Kernels, tuple[int, int] | None]:
    """Return what :func:`_measured` does, of how long each phase took."""
    at, kernels = 0, []
    for name, names in ((_OLD, _OLD_PHASES), (_NEW, _NEW_PHASES)):
        phases = []
        for phase in names:
            ns = int(spent.get(phase, 0))
            if ns:
                phases.append((phase, at, at + ns))
                at += ns
        kernels.append((name, phases))
    begin, ns = int(spent.get("prepare", 0)), int(spent.get("blackout", 0))
    return kernels, (begin, begin + ns) if ns else None


# ---- both ----


def _trace(
    kernels: Sequence[Process],
    phases: _Phases,
    blackout: tuple[int, int] | None,
    runs: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
) -> Trace:
    """Put blackout and the remarks above the *kernels*."""
    first, _ = _bounds(phases)
    notes = [
        Slice(f"{kernel.name}: {remark}", ("remark",), first, None)
        for kernel in kernels
        for remark in kernel.remarks
    ]
    notes.append(Slice("about", ("remark",), first, None, about))
    lanes = [Lane("about this trace", lambda: notes)]
    if blackout is not None:
        name = "LUO blackout (kernel boot not included)"
        shade = Slice(name, ("blackout",), *blackout, _of_blackout(blackout, runs))
        lanes.insert(0, Lane("blackout", lambda: [shade]))
    return Trace((Process("live update", 0, (), tuple(lanes)), *kernels), first, about)


def _of_blackout(blackout: tuple[int, int], runs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the figure of the last update, which leaves out what two digests took in between."""
    figure = runs[-1].get("phases_ns", {}).get("blackout") if runs else None
    if figure is None:
        return {}
    return {"blackout_ns": figure, "digests_ns": max(0, blackout[1] - blackout[0] - figure)}


def _bounds(phases: _Phases) -> tuple[int, int]:
    """Return when the first of *phases* begins and the last ends; zeros if there is none."""
    return (
        min((begin for _, begin, _ in phases), default=0),
        max((end for _, _, end in phases), default=0),
    )


def _phase_slices(phases: _Phases, rows: Sequence[Mapping[str, Any]]) -> Iterator[Slice]:
    """Yield the phases, with the sums of their callbacks, and the states between them."""
    begins = [begin for _, begin, _ in phases[1:]]
    for (name, begin, end), following in zip_longest(phases, begins):
        mine = [row for row in rows if row["event"] == _EVENT_OF.get(name)]
        mine.sort(key=lambda row: -row["total_ns"])
        args: dict[str, Any] = {
            "{subsystem}/{name} ({kind})".format_map(row): {
                figure: row[figure] for figure in _FIGURES if figure in row
            }
            for row in mine[:_NR_ROWS]
        }
        if len(mine) > _NR_ROWS:
            args["others"] = {
                "rows": len(mine) - _NR_ROWS,
                "total_ns": sum(row["total_ns"] for row in mine[_NR_ROWS:]),
            }
        yield Slice(name, ("phase",), begin, end, args)
        state = _STATE_AFTER.get(name)
        if state is not None and following is not None and following > end:
            yield Slice(f"state {state}", ("state",), end, following)


def _costs(phases: _Phases, rows: Iterable[Mapping[str, Any]], runs: int = 1) -> list[Counter]:
    """Return what the callbacks of the dearest names took together, phase by phase."""
    costs: dict[str, dict[str, float]] = {}
    for row in rows:
        by_event = costs.setdefault("{subsystem}/{name}".format_map(row), {})
        by_event[row["event"]] = by_event.get(row["event"], 0) + row["total_ns"] / runs
    dearest = sorted(costs, key=lambda name: -sum(costs[name].values()))[:_NR_COUNTERS]
    counters = []
    for name in dearest:
        points: list[tuple[int, float]] = []
        for phase, begin, end in phases:
            value = costs[name].get(_EVENT_OF.get(phase, ""), 0)
            for point in ((begin, value), (end, 0.0)):
                if points and points[-1][0] == point[0]:
                    points.pop()
                if not points or points[-1][1] != point[1]:
                    points.append(point)
        counters.append(Counter(f"{name}: all callbacks", "ns", points))
    return counters
