"""Figures of ``luo run`` in pytest-benchmark's JSON, which tools for comparing already read."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["document", "stats"]


def document(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of *run*, a ``luo-run/1`` document, as pytest-benchmark writes its own.

    Each phase is a benchmark in a group of its own, each update a round. A run that failed has no
    benchmarks.
    """
    host = str(run["source"].get("path") or run["source"].get("kind", ""))
    devices = run["devices"]
    runs = [] if run["error"] else run["runs"]
    extra_info = {
        "devices": devices["total"],
        "preserved": devices.get("preserved"),
        "state_bytes": devices.get("state_bytes"),
        "abi": run["kho_abi"],
        "behaviour": run["behaviour"],
        "quirks": run["quirks"],
        "successor": run["successor"],
        "versions": {
            "luo": run["luo_version"],
            "python": run["machine"]["python"],
            "numpy": np.__version__,
        },
    }
    return {
        "machine_info": _machine_info(run["machine"]),
        "commit_info": _commit_info(),
        "benchmarks": [
            {
                "group": f"liveupdate.{phase}",
                "name": f"{phase}[{host}]",
                "fullname": f"luo run::{phase}[{host}]",
                "params": {"host": host},
                "param": host,
                "extra_info": extra_info,
                "options": {"disable_gc": False, "timer": "monotonic_ns", "warmup": False},
                "stats": stats([one["phases_ns"][phase] / 1e9 for one in runs]),
            }
            for phase in (run["phases_ns"] if runs else ())
        ],
        "datetime": datetime.now(UTC).isoformat(),
        "version": f"luo-kho {run['luo_version']}",
    }


def stats(seconds: Sequence[float]) -> dict[str, Any]:
    """Return what pytest-benchmark computes of the duration of each round; at least one."""
    data = sorted(seconds)
    mean, total = statistics.mean(seconds), sum(seconds)
    stddev = statistics.stdev(seconds) if len(data) > 1 else 0
    q1, q3 = _quartiles(data)
    iqr = q3 - q1
    low, high = q1 - 1.5 * iqr, q3 + 1.5 * iqr
    stddev_outliers = sum(not mean - stddev <= one <= mean + stddev for one in data)
    iqr_outliers = sum(not low <= one <= high for one in data)
    return {
        "min": data[0],
        "max": data[-1],
        "mean": mean,
        "stddev": stddev,
        "rounds": len(data),
        "median": statistics.median(data),
        "iqr": iqr,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": iqr_outliers,
        "stddev_outliers": stddev_outliers,
        "outliers": f"{stddev_outliers};{iqr_outliers}",
        "ld15iqr": data[bisect_left(data, low)],
        "hd15iqr": data[bisect_right(data, high) - 1],
        "ops": len(data) / total if total else 0,
        "total": total,
        "data": list(seconds),
        "iterations": 1,
    }


def _quartiles(data: Sequence[float]) -> tuple[float, float]:
    """Return the quartiles of ascending *data*, a quarter of n less two in from either end."""
    at = max(0.0, (len(data) - 2) / 4)
    part, whole = math.modf(at)
    k = int(whole)
    if part == 0:
        return data[k], data[-1 - k]
    return (
        (1 - part) * data[k] + part * data[k + 1],
        part * data[-2 - k] + (1 - part) * data[-1 - k],
    )


def _machine_info(machine: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "node": platform.node(),
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_compiler": platform.python_compiler(),
        "python_implementation": platform.python_implementation(),
        "python_implementation_version": platform.python_version(),
        "python_version": platform.python_version(),
        "python_build": list(platform.python_build()),
        "release": platform.release(),
        "system": platform.system(),
        "cpu": {"brand_raw": machine["cpu"], "count": machine["cores"]},
    }


def _commit_info() -> dict[str, Any]:
    """Describe the commit of the directory that we are in: it is the user's drivers that count."""
    try:
        commit, time, author_time = _git("log", "-1", "--format=%H%n%cI%n%aI").split("\n")
        return {
            "id": commit,
            "time": time,
            "author_time": author_time,
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "project": Path(_git("rev-parse", "--show-toplevel")).name,
            "branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
        }
    except (OSError, ValueError, subprocess.CalledProcessError):
        unversioned = {"id": "unversioned", "time": None, "author_time": None, "dirty": False}
        return {**unversioned, "project": Path.cwd().name, "branch": "(unknown)"}


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.strip()
