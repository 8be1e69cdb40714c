"""What callbacks cost, in tables: by callback, subsystem, driver, bus, event, device and call."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luo._kho import BLACKOUT_EVENTS, SPAN, CallRecorder, bucket_edges

__all__ = ["BLACKOUT_EVENTS", "By", "Profile", "added", "device_costs", "subtrees"]

By: TypeAlias = Literal["callback", "subsystem", "driver", "bus", "event", "device", "span"]

_LABEL: Final = ("subsystem", "event", "kind", "name")
#: Which words of a callback's label the rows of a table have.
_GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "callback": _LABEL,
    "subsystem": ("subsystem",),
    "driver": ("subsystem", "name"),
    "bus": ("subsystem", "name"),
    "event": ("event",),
}
_QUANTILES: Final = (0.5, 0.95, 0.99)
_CHUNK: Final = 65_536  # rows of a file that are Python's at once
#: A column: numbers; or numbers of words, and the words.
_Column: TypeAlias = tuple[NDArray[Any], list[str | None] | None]


@dataclass(frozen=True)
class Profile:
    """What the callbacks of a kernel cost, or of several.

    Attributes:
        recorder: who recorded it.
        tree: its devices, whose ``path(number)`` names one; None if they are not known.
        blackout_ns: the blackout of all updates in it together, which of a kernel is the one that
            it arrived by; 0 if there is none.
        late: subsystems whose RESTORE is no part of blackout: it ran when all devices were
            reclaimed.
    """

    recorder: CallRecorder
    tree: Any = None
    blackout_ns: int = 0
    late: Collection[str] = ()

    @classmethod
    def of(cls, recorder: CallRecorder, tree: Any, arrival: Any) -> Profile:
        """Return the profile of a kernel; *arrival* as of :class:`~luo.kexec.Arrival`, or None."""
        if arrival is None:
            return cls(recorder, tree)
        late = arrival.result["restored_late"]
        return cls(recorder, tree, arrival.phases["blackout"], late)

    @classmethod
    def merged(cls, profiles: Iterable[Profile]) -> Profile:
        """Return one profile of several: of the two kernels of an update, of several runs.

        Rows, sums by device and blackouts are added, spans put behind each other. A device is known
        by its number: all profiles must be of one host.
        """
        profiles = list(profiles)
        recorder, keys = CallRecorder(), {}
        for label in dict.fromkeys(label for one in profiles for label in one.labels):
            keys[label] = recorder.key(*label)
        spans = [np.zeros(0, SPAN)]
        for one in profiles:
            spans.append(one.spans.copy())
            numbers = np.array([keys[label] for label in one.labels], np.int32)
            spans[-1]["key"] = numbers[one.spans["key"]]
        recorder.load(
            keys,
            np.concatenate(spans),
            added(*(one.costs for one in profiles)).astype(np.float32),
            sum(one.dropped for one in profiles),
        )
        for one in profiles:
            recorder.merge(one.dump())
        tree = next((one.tree for one in profiles if one.tree is not None), None)
        late = {name for one in profiles for name in one.late}
        return cls(recorder, tree, sum(one.blackout_ns for one in profiles), late)

    def in_blackout(self, label: Sequence[str]) -> bool:
        """Return whether callbacks with this *label* run in blackout."""
        subsystem, event = label[:2]
        return event in BLACKOUT_EVENTS and not (event == "RESTORE" and subsystem in self.late)

    # ---- what the recorder has ----

    @property
    def labels(self) -> list[tuple[str, str, str, str]]:
        """(subsystem, event, kind, name) by the ``key`` of spans."""
        return self.recorder.labels

    @property
    def spans(self) -> NDArray[np.void]:
        """Every call that was kept, an array of :data:`luo._kho.SPAN`; no copy."""
        return self.recorder.spans

    @property
    def dropped(self) -> int:
        """Calls that found no room for a span."""
        return self.recorder.dropped

    @property
    def costs(self) -> NDArray[np.float32]:
        """Nanoseconds by device, (2, devices): out of blackout, and in it; no copy."""
        return self.recorder.costs

    def dump(self) -> list[list[Any]]:
        """Return all rows in JSON values, as :meth:`luo._kho.CallRecorder.merge` takes them."""
        return self.recorder.dump()

    def histogram(self, label: Sequence[str]) -> list[list[int]]:
        """Return ``[low_ns, high_ns, calls]`` of each bucket that has calls; *high_ns* is not in.

        Raises:
            ValueError: no callback has this *label*, (subsystem, event, kind, name).
        """
        edges = bucket_edges()
        counts = self.recorder.histogram(self.labels.index(tuple(label)))  # type: ignore[arg-type]
        some = np.flatnonzero(counts)
        columns = edges[some], edges[some + 1], counts[some]
        return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    # ---- tables ----

    def table(
        self,
        by: By = "callback",
        worst: int | None = None,
        quantiles: Sequence[float] = _QUANTILES,
    ) -> NDArray[np.void]:
        """Return a table as a structured array.

        All times are nanoseconds. ``blackout_ns`` is what was spent in blackout, that is in REBOOT
        and RESTORE, and ``blackout_share`` which part of it that was: NaN if the blackout is not
        known, more than 1 if several workers spent it side by side.

        Args:
            by: what a row is: a ``"callback"`` in the order of first calls; a ``"subsystem"``,
                ``"driver"``, ``"bus"`` or ``"event"``, dearest first; a ``"device"`` with any cost,
                dearest first; or a ``"span"``, as :attr:`spans` has them.
            worst: only so many, the dearest first.
            quantiles: each 0 to 1; 0.95 is the column ``p95_ns``. Not of devices and spans.

        Raises:
            ValueError: there is no such table, or no such quantile; or costs by device are asked
                for, and the kernel kept none.
        """
        if by == "device":
            if not self.costs.shape[1]:
                raise ValueError("by device: nothing is kept, see Kernel(by_device=True)")
            return device_costs(self.tree, self.costs, worst)
        if by == "span":
            table = self.spans
            return table if worst is None else table[_dearest(table["ns"], worst)]
        if by not in _GROUPS:
            raise ValueError(f"by {by!r}: none of {', '.join([*_GROUPS, 'device', 'span'])}")
        table = self._grouped(by, quantiles)
        if by == "callback" and worst is None:
            return table
        return table[_dearest(table["total_ns"], worst)]

    def rows(
        self,
        by: By = "callback",
        worst: int | None = None,
        quantiles: Sequence[float] = _QUANTILES,
    ) -> list[dict[str, Any]]:
        """Return :meth:`table` as one dictionary a row; what is not known is None.

        A span has the words of its label and the path of its device in place of their numbers.
        """
        return _dictionaries(self._columns(self.table(by, worst, quantiles)))

    def to_csv(self, path: str | os.PathLike[str], by: By = "callback") -> None:
        """Write a table as CSV, with the columns of :meth:`rows`; what is not known is empty."""
        table = self.table(by)
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, self._columns(table[:0]), lineterminator="\n")
            writer.writeheader()
            for start in range(0, len(table), _CHUNK):
                writer.writerows(_dictionaries(self._columns(table[start : start + _CHUNK])))

    def to_parquet(self, path: str | os.PathLike[str], by: By = "callback") -> None:
        """Write a table as Parquet, with the columns of :meth:`rows`; what is not known is null.

        Raises:
            ImportError: pyarrow is missing, which ``luo-kho[parquet]`` brings.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            message = f"parquet: {error}: install it with pip install 'luo-kho[parquet]'"
            raise ImportError(message) from error
        arrays = {}
        for name, (values, words) in self._columns(self.table(by)).items():
            if words is None:
                arrays[name] = pyarrow.array(values, from_pandas=True)  # NaN is null
                continue
            unknown = np.array([word is None for word in words], np.bool_)[values]
            text = [(word or "").encode(errors="backslashreplace").decode() for word in words]
            arrays[name] = pyarrow.DictionaryArray.from_arrays(
                pyarrow.array(values, mask=unknown), pyarrow.array(text, pyarrow.string())
            )
        parquet.write_table(pyarrow.table(arrays), os.fspath(path))

    def _grouped(self, by: str, quantiles: Sequence[float]) -> NDArray[np.void]:
        """Return the rows of callbacks that have the words of *by* in common."""
        words = _GROUPS[by]
        groups, in_blackout = CallRecorder(), Counter[tuple[str, ...]]()
        for label, *figures in self.dump():
            if by in ("driver", "bus") and label[2] != by:
                continue
            group = tuple(
                word if of in words else "" for of, word in zip(_LABEL, label, strict=True)
            )
            groups.merge([[group, *figures]])
            in_blackout[group] += figures[2] if self.in_blackout(label) else 0
        rows = groups.rows()
        blackout = self.blackout_ns or math.nan
        found = []
        for key, (group, row) in enumerate(zip(groups.labels, rows, strict=True)):
            percentiles = groups.quantiles(key, quantiles).tolist()
            figures = [row[name] for name in ("calls", "devices", "total_ns", "min_ns", "max_ns")]
            blackout_ns = in_blackout[group]
            found.append(
                (
                    *(row[word] for word in words),
                    *(*figures, row["max_device"], *percentiles),
                    *(blackout_ns, blackout_ns / blackout),
                )
            )
        columns = {word: _text(row[word] for row in rows) for word in words} | dict.fromkeys(
            ("calls", "devices", "total_ns", "min_ns", "max_ns", "max_device"), "i8"
        )
        columns |= {f"p{100 * q:g}_ns": "i8" for q in quantiles}
        columns |= {"blackout_ns": "i8", "blackout_share": "f8"}
        return np.array(found, list(columns.items()))

    def _columns(self, table: NDArray[np.void]) -> dict[str, _Column]:
        """Return *table* by column, with words for numbers that only this profile understands."""
        if table.dtype != SPAN:
            columns: dict[str, _Column] = {}
            for name in table.dtype.names or ():
                columns[name] = table[name], None
                if table.dtype[name].kind == "U":
                    words, numbers = np.unique(table[name], return_inverse=True)
                    columns[name] = numbers, words.tolist()
            return columns
        devices, numbers = np.unique(table["device"], return_inverse=True)
        labels = list(zip(*self.labels, strict=True)) or [()] * len(_LABEL)
        return {
            **{name: (table[name], None) for name in ("begin_ns", "ns")},
            **{word: (table["key"], list(of)) for word, of in zip(_LABEL, labels, strict=True)},
            "device": (numbers, [self._path(number) for number in devices.tolist()]),
            **{name: (table[name], None) for name in ("devices", "worker")},
        }

    def _path(self, device: int) -> str | None:
        if device < 0:
            return None
        return str(device) if self.tree is None else str(self.tree.path(device))


def _dictionaries(columns: dict[str, _Column]) -> list[dict[str, Any]]:
    lists = []
    for values, words in columns.values():
        cells: list[Any] = values.tolist()
        if words is not None:
            cells = [words[number] for number in cells]
        elif values.dtype.kind == "f":
            cells = [None if math.isnan(value) else value for value in cells]
        lists.append(cells)
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _text(words: Iterable[str]) -> str:
    """Return the type of a column that has room for *words*."""
    return f"U{max(map(len, words), default=1) or 1}"


def _dearest(ns: NDArray[Any], worst: int | None) -> NDArray[np.intp]:
    """Return the places of the *worst* longest times, or of all, longest first."""
    if worst is not None and worst < 0:
        raise ValueError(f"worst {worst}: 0 or more")
    return np.argsort(-ns, kind="stable")[:worst]


# ---- by device ----


def added(*costs: NDArray[Any]) -> NDArray[np.float64]:
    """Return the sum of columns (2, devices), of which some may know more devices than others."""
    total = np.zeros((2, max((one.shape[1] for one in costs), default=0)))
    for one in costs:
        total[:, : one.shape[1]] += one
    return total


def device_costs(tree: Any, costs: NDArray[Any], worst: int | None = None) -> NDArray[np.void]:
    """Return what each device cost, dearest first; those that cost nothing are left out.

    Args:
        tree: the devices; None leaves their words empty.
        costs: nanoseconds, (2, devices): out of blackout, and in it.
        worst: only so many.
    """
    total = costs.sum(0, dtype=np.float64)
    which = _dearest(total, worst)
    which = which[total[which] > 0]
    words: list[list[str]] = [[""] * len(which)] * 3
    if tree is not None:
        words = [
            [tree.path(number) for number in which.tolist()],
            _named(tree.driver_ids[which], tree.driver_names),
            _named(tree.bus_ids[which], tree.bus_names),
        ]
    kinds = [
        ("device", "i4"),
        *((name, _text(of)) for name, of in zip(("path", "driver", "bus"), words, strict=True)),
        *(("total_ns", "i8"), ("blackout_ns", "i8")),
    ]
    table = np.zeros(len(which), kinds)
    figures = (which, *words, total[which].round(), costs[1, which].round())
    for (name, _), values in zip(kinds, figures, strict=True):
        table[name] = values
    return table


def _named(ids: NDArray[np.int32], names: Sequence[str]) -> list[str]:
    return [names[number] if number >= 0 else "" for number in ids.tolist()]


def subtrees(tree: Any, costs: NDArray[Any], most: int = 256) -> list[dict[str, Any]]:
    """Return the tree by cost: rows with everything below a device, the root of all first.

    Args:
        tree: the devices.
        costs: nanoseconds, (2, devices): out of blackout, and in it.
        most: how many rows at most; cheaper siblings are one row together, whose path ends in
            ``/…``.

    Returns:
        dictionaries with ``path`` (empty for the root), ``parent`` (None for the root),
        ``devices``, ``total_ns`` and ``blackout_ns``; a parent before its children, and of these
        the dearest first.
    """
    parents, depths = tree.parents, tree.depths
    known = min(costs.shape[1], len(parents))
    own = np.zeros((3, len(parents) + 1))  # the last is the root, which is -1 as a parent
    own[0, :-1] = tree.alive
    own[1:, :known] = costs[:, :known].sum(0, dtype=np.float64), costs[1, :known]
    sums = own.copy()
    for depth in range(int(depths.max(initial=0)), -1, -1):
        which = np.flatnonzero(depths == depth)
        for one in sums:
            np.add.at(one, parents[which], one[which])
    # A device is no dearer than those above it, and the shallower is first among equals: whoever is
    # in front has everybody above it in front, too. Each may need a row for what is left below it.
    ranked = np.lexsort((depths, -sums[1, :-1]))[: max(0, most // 2 - 1)]
    below: dict[int, list[int]] = {}
    for number in ranked[sums[1, ranked] > 0].tolist():
        below.setdefault(int(parents[number]), []).append(number)
    rows: list[dict[str, Any]] = []

    def show(number: int, path: str, parent: str | None) -> None:
        rows.append(_subtree(path, parent, sums[:, number]))
        children = below.get(number, [])
        for child in children:
            show(child, tree.path(child), path)
        left = sums[:, number] - own[:, number] - sums[:, children].sum(1)
        if left[0] > 0:
            rows.append(_subtree(f"{path}/…", path, left))

    show(-1, "", None)
    return rows


def _subtree(path: str, parent: str | None, figures: NDArray[np.float64]) -> dict[str, Any]:
    devices, total_ns, blackout_ns = (round(figure) for figure in figures.tolist())
    return {
        "path": path,
        "parent": parent,
        "devices": devices,
        "total_ns": max(0, total_ns),
        "blackout_ns": max(0, blackout_ns),
    }
