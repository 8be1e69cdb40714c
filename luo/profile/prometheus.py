"""A live update as metrics, in the text that Prometheus scrapes.

https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4. Durations are in
seconds, and have the buckets that Prometheus expects: the same for every callback and every run,
so that series of several hosts can be added.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias

from luo.profile.trace import printable

__all__ = ["LE_NS", "metrics"]

_Labels: TypeAlias = Mapping[str, str]
_Sample: TypeAlias = tuple[str, _Labels, float]  # suffix of the name, labels, value

#: Upper bounds of the buckets: 1, 2.5 and 5 of every decade from 10 ns to 100 s.
LE_NS: Final = (
    *(first * 10**power for power in range(10) for first in (10, 25, 50)),
    10**11,
    math.inf,
)
_BY: Final = ("subsystem", "event", "kind", "name")


def metrics(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the metrics of *document*.

    Args:
        document: of ``luo-run/1``. Callbacks without ``histogram`` have the bucket of all alone.

    Raises:
        LookupError, TypeError, ValueError: it is none.
    """
    runs, rows = document["runs"], document["callbacks"]
    source, devices, image = document["source"], document["devices"], document["image"]
    info = {
        "version": document["luo_version"],
        "kho_abi": document["kho_abi"],
        "behaviour": document["behaviour"],
        "successor": document["successor"],
        "host": source.get("path") or source.get("kind", ""),
        "clock": document.get("clock", "wall"),
    }
    yield from _metric("luo_info", "gauge", "What was measured.", [("", info, 1)])
    yield from _metric(
        "luo_updates_total", "counter", "Live updates that came to their end.",
        [("", {}, len(runs))],
    )  # fmt: skip
    yield from _metric(
        "luo_failed", "gauge", "1 if the last live update failed.",
        [("", {}, int(document["error"] is not None))],
    )  # fmt: skip
    yield from _metric(
        "luo_callback_failures_total", "counter",
        "Callbacks of RESTORE, FINISH and CANCEL that failed.",
        [("", {}, len(document.get("failures", ())))],
    )  # fmt: skip
    yield from _metric(
        "luo_devices", "gauge", "Devices, by what became of them.",
        [("", {"what": what}, devices[what])
         for what in ("total", "requested", "preserved", "reclaimed") if what in devices],
    )  # fmt: skip
    yield from _metric(
        "luo_phase_seconds", "summary", "What each phase of a live update took.",
        _phases(runs),
    )  # fmt: skip
    yield from _metric(
        "luo_callback_seconds", "histogram", "What each call of a callback took.",
        (sample for row in rows for sample in _histogram(row)),
    )  # fmt: skip
    yield from _metric(
        "luo_callback_devices_total", "counter", "Devices that callbacks were called for.",
        [("", _labels(row), row["devices"]) for row in rows if row.get("devices")],
    )  # fmt: skip
    yield from _metric(
        "luo_device_seconds_total", "counter", "What the dearest devices took, all events.",
        [("", {key: row[key] or "" for key in ("path", "driver", "bus")}, row["total_ns"] / 1e9)
         for row in document.get("worst_devices", ())],
    )  # fmt: skip
    yield from _metric(
        "luo_handover_bytes", "gauge", "Size of what is handed over, without preserved memory.",
        [("", {"part": part.removesuffix("_bytes")}, image[part])
         for part in ("root_fdt_bytes", "map_bytes", "device_tree_bytes") if part in image],
    )  # fmt: skip
    if "preserved_pages" in image:
        nbytes = image["preserved_pages"] * image.get("page_bytes", 4096)
        yield from _metric(
            "luo_preserved_bytes", "gauge", "Memory that stays where it is.", [("", {}, nbytes)]
        )


def _phases(runs: Iterable[Mapping[str, Any]]) -> Iterator[_Sample]:
    """Yield quantiles, sum and count of each phase; a quantile is a value that occurred."""
    spent: dict[str, list[int]] = {}
    for run in runs:
        for phase, ns in run["phases_ns"].items():
            spent.setdefault(phase, []).append(ns)
    for phase, values in spent.items():
        values.sort()
        for quantile in (0.5, 0.95, 1):
            nearest = values[math.ceil(quantile * len(values)) - 1]
            yield "", {"phase": phase, "quantile": str(quantile)}, nearest / 1e9
        yield "_sum", {"phase": phase}, sum(values) / 1e9
        yield "_count", {"phase": phase}, len(values)


def _histogram(row: Mapping[str, Any]) -> Iterator[_Sample]:
    """Yield buckets, sum and count of one callback.

    A bucket of the document that lies over a bound is counted above it: good to its 1.6 %.
    """
    labels = _labels(row)
    counts = [0] * len(LE_NS)
    for _, high, count in row.get("histogram", ()):
        counts[bisect_left(LE_NS, high - 1)] += count
    counts[-1] += row["calls"] - sum(counts)
    total = 0
    for le, count in zip(LE_NS, counts, strict=True):
        total += count
        if row.get("histogram") or le == math.inf:
            yield "_bucket", {**labels, "le": _number(le / 1e9)}, total
    yield "_sum", labels, row["total_ns"] / 1e9
    yield "_count", labels, row["calls"]


def _labels(row: Mapping[str, Any]) -> dict[str, str]:
    return {key: row[key] for key in _BY}


def _metric(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> Iterator[str]:
    """Yield a metric with all its samples; nothing if there is none."""
    head = f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for suffix, labels, value in samples:
        inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"{head}{name}{suffix}{f'{{{inner}}}' if inner else ''} {_number(value)}\n"
        head = ""


def _escaped(text: str) -> str:
    return printable(text).replace("\\", r"\\").replace('"', r"\"")


def _number(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    return repr(int(value) if value == int(value) else float(value))
