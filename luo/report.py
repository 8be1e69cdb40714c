"""What a live update came to: figures, states, failures; the ``luo-run/1`` document."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from luo._kho import SPAN, CallRecorder
from luo.dma import Stray
from luo.errors import BudgetError, LuoError, errno_name
from luo.liveupdate import CancelResult, FinishResult, State
from luo.profile.tables import BLACKOUT_EVENTS, Profile, added, device_costs, subtrees

__all__ = [
    "PHASES",
    "Report",
    "Track",
    "budget_names",
    "describe",
    "p95",
    "parse_budgets",
    "parse_duration",
    "version",
]

PHASES: Final = ("prepare", "reboot", "jump", "boot", "restore", "finish", "blackout")
_UNITS: Final = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
#: Events whose callbacks are a part of the phase.
_EVENTS: Final = {
    "prepare": ("PREPARE", "CAN_PRESERVE", "PRESERVE"),
    "reboot": ("REBOOT", "FREEZE"),
    "restore": ("RESTORE", "RETRIEVE"),
    "finish": ("FINISH", "CAN_FINISH"),
    "blackout": BLACKOUT_EVENTS,
}
_OLD_EVENTS: Final = (*_EVENTS["prepare"], *_EVENTS["reboot"])
_NEW_EVENTS: Final = (*_EVENTS["restore"], *_EVENTS["finish"])
#: What of a file handler is called in an update, and what says whether it is.
_FILE_EVENTS: Final = {
    "PRESERVE": "preserve",
    "FREEZE": "freeze",
    "RETRIEVE": "retrieve",
    "FINISH": "finish",
}
_DEVICES: Final = "devices"  # the subsystem that calls drivers and buses
_NR_WORST: Final = 3
_NR_DEVICES: Final = 32  # dearest ones in the document
#: Phases of the document's timeline, by kernel: it may have marks of an earlier update.
_TIMELINE: Final = {
    "old kernel": ("prepare", "reboot"),
    "new kernel": ("jump", "boot", "restore", "finish"),
}
_CALLBACK_FIELDS: Final = ("event", "kind", "name", "device", "file", "line")


def parse_duration(text: str) -> int:
    """Return the nanoseconds of *text*, as ``"1.2s"``, ``"50ms"``, ``"20us"`` or ``"7ns"``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|ms|s)\s*", text)
    if match is None:
        raise ValueError(f"duration {text!r}: a number with ns, us, ms or s is expected")
    return round(float(match[1]) * _UNITS[match[2]])


def parse_budgets(text: str) -> dict[str, int]:
    """Return the nanoseconds by name of *text*, as ``"blackout=50ms,devices/nvme/REBOOT=2ms"``."""
    budgets: dict[str, int] = {}
    for part in text.split(","):
        name, _, limit = part.rpartition("=")
        name = name.strip()
        if not name:
            raise ValueError(f"budget {part.strip()!r}: NAME=TIME is expected, as blackout=50ms")
        if name in budgets:
            raise ValueError(f"budget {name!r} is there twice")
        try:
            budgets[name] = parse_duration(limit)
        except ValueError as error:
            raise ValueError(f"budget {name!r}: {error}") from None
    return budgets


def budget_names(kernel: Any) -> list[str]:
    """Return the names of budgets that an update of *kernel*, with devices requested, will have.

    It may have fewer: a callback may turn out not to be called.
    """
    devices, names = kernel.devices, dict.fromkeys(PHASES)
    if kernel.agent is not None:
        for handler in kernel.liveupdate.handlers:
            for event, call in _FILE_EVENTS.items():
                if getattr(handler, call) is not None:
                    names[f"files/{event}"] = names[f"files/{handler.compatible}/{event}"] = None
        return list(names)
    kept = above = np.flatnonzero(devices.requested)
    while len(above):
        above = np.unique(devices.tree.parents[above])
        above = above[above >= 0]
        kept = np.union1d(kept, above)
    kept = kept[devices.supported()[kept]]
    callbacks = [(subsystem.name, subsystem.name, subsystem) for subsystem in kernel.luo.subsystems]
    for side in ("driver", "bus"):
        owners = devices.parties(side)
        numbers = np.unique(devices.ids(side)[kept])
        for owner in [owners[number] for number in numbers.tolist() if number >= 0]:
            callbacks.append((_DEVICES, owner.name, owner.ops))
    for subsystem, name, callable_by in callbacks:
        for event in ("PREPARE", "REBOOT", "RESTORE", "FINISH"):
            if getattr(callable_by, event.lower(), None) is not None:
                names |= dict.fromkeys((f"{subsystem}/{event}", f"{subsystem}/{name}/{event}"))
    return list(names)


def describe(error: BaseException) -> dict[str, Any]:
    """Return the ``error`` object of ``luo run --json`` for *error*."""
    code = getattr(error, "errno", None)
    return {
        "type": type(error).__name__,
        "message": str(error) or type(error).__name__,
        "errno": code,
        "errno_name": errno_name(code) if code else None,
        **{name: getattr(error, name, None) for name in _CALLBACK_FIELDS},
        "rolled_back": getattr(error, "rolled_back", None),
        "undo_errors": [str(problem) for problem in getattr(error, "undo_errors", ())],
    }


@dataclass(frozen=True)
class Track:
    """One kernel's part in an update.

    Attributes:
        name: ``"old kernel"`` or ``"new kernel"``.
        pid: its process.
        marks: when each of its phases began and ended, nanoseconds on the one clock of both. The
            new kernel has the jump too.
        profile: what its callbacks cost, with spans if it kept any; also of other updates.
    """

    name: str
    pid: int
    marks: dict[str, tuple[int, int]]
    profile: Profile


def _track(name: str, kernel: Any) -> Track:
    return Track(name, getattr(kernel, "pid", os.getpid()), dict(kernel.marks), kernel.profile)


class Report:
    """A live update, or several in a row, in figures.

    Attributes:
        kernel: the kernel that runs now, None if none does.
        settings, source: what was asked for and where the devices came from; the caller's.
        runs: one dictionary an update: phases, numbers of devices, and what callbacks took, by
            ``"subsystem/name/EVENT"``.
        states: states passed, by name, in lower case.
        failures: restore, finish and cancel callbacks that failed.
        dma: where devices may have written that the next kernel was not told to keep.
        error: why the update failed, None if it did not.
        thread_safe: (event, kind, name) of the native callbacks that several threads may call, as
            far as the kernels ran in this process.
        tracks: the two kernels of the last update, old and new.
        blackout: when that one's blackout began and ended, nanoseconds on the clock of the tracks.
        clock: ``"wall"``; ``"virtual"`` if the kernel was given a clock or a cost.
        verdict: what :meth:`check` found, with the worst offenders; None if nothing was checked.
        dry: nanoseconds of prepare, reboot and cancel, if there was no jump; else empty.
    """

    def __init__(
        self,
        *,
        settings: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        self.kernel: Any = None
        self.settings = dict(settings or {})
        self.source = dict(source or {})
        self.runs: list[dict[str, Any]] = []
        self.states: list[str] = []
        self.failures: list[dict[str, Any]] = []
        self.dma: list[dict[str, Any]] = []
        self.error: dict[str, Any] | None = None
        self.tracks: list[Track] = []
        self.blackout: tuple[int, int] | None = None
        self.dry: dict[str, int] = {}
        self.image: dict[str, Any] = {}
        self.devices: dict[str, Any] = {}
        self.successor = ""
        self.clock = "wall"
        self.verdict: dict[str, Any] | None = None
        self.thread_safe: frozenset[tuple[str, str, str]] = frozenset()
        self._calls = CallRecorder()
        self._tree: Any = None
        self._costs = np.zeros((2, 0))
        self._late: set[str] = set()  # subsystems that were restored after the blackout
        self._counted = np.zeros((2, 0), np.float32)  # what the running kernel had before
        self._abi = ""
        self._behaviour = "intended"
        self._quirks: list[str] = []

    # ---- filling ----

    def begin(self, kernel: Any) -> None:
        """Start from the running *kernel*."""
        self.kernel = kernel
        self._abi = getattr(kernel, "kho_abi", self._abi)
        self._behaviour = getattr(kernel, "behaviour", self._behaviour)
        self._quirks = sorted(getattr(kernel, "quirks", self._quirks))
        self._tree = kernel.machine.devices
        self._counted = kernel.profile.costs.copy()
        recorder = getattr(kernel, "recorder", None)
        if recorder is not None and (recorder.clock is not None or recorder.cost is not None):
            self.clock = "virtual"
        self.thread_safe |= getattr(kernel.devices, "thread_safe", frozenset())
        self.devices = {"total": len(kernel.machine.devices)}
        self.note_state(kernel)

    def note_state(self, kernel: Any) -> None:
        """Note the state of *kernel*, which runs now."""
        self.kernel = kernel
        agent = getattr(kernel, "agent", None)
        self.states.append(kernel.luo.state.name.lower() if agent is None else agent.state)

    @contextlib.contextmanager
    def watch(self, kernel: Any) -> Iterator[None]:
        """Note an error that ends the update, and what it left."""
        try:
            yield
        except BaseException as error:
            self.error = describe(error)
            running = self.kernel = kernel.machine.running
            if running is not kernel:
                self._counted = np.zeros((2, 0), np.float32)
            if running is not None:
                with contextlib.suppress(LuoError):
                    self.note_state(running)
                    self._count(running.profile)
                    who = "old kernel" if running is kernel else "new kernel"
                    self.tracks, self.blackout = [_track(who, running)], None
                    self._calls.merge(running.profile.dump())
                    if isinstance(error, KeyboardInterrupt):
                        self.error["message"] = "interrupted"
                        undo = self.error["undo_errors"] = list(getattr(error, "__notes__", ()))
                        normal = self.states[-1] == State.NORMAL.name.lower()
                        self.error["rolled_back"] = normal and not undo
            raise

    def note_finish(self, kernel: Any, finished: FinishResult) -> None:
        """Add one update that has come to its end in *kernel*."""
        self.note_state(kernel)
        arrival = kernel.arrival
        departure, result = arrival.departure, arrival.result
        phases = {"prepare": departure.phases.get("prepare", 0), **arrival.phases}
        phases["finish"] = kernel.phases.get("finish", 0)
        departed = {name: (begin, end) for name, (begin, end) in departure.marks.items()}
        if "freeze" in departed:  # what the jump begins with, in sessions
            departed["reboot"] = departure.reboot_began_ns, departure.reboot_ended_ns
        new = _track("new kernel", kernel)
        new.marks["jump"] = arrival.jump
        self.tracks = [Track("old kernel", departure.pid, departed, arrival.before), new]
        profile = new.profile
        self.blackout = arrival.blackout
        self.successor = "process" if hasattr(kernel, "pid") else "in-process"
        self.image = departure.image
        self.devices |= {
            "requested": departure.requested,
            "preserved": departure.preserved,
            "reclaimed": result["reclaimed"],
            "state_bytes": arrival.state_bytes,
            "verified_bytes": arrival.verified_bytes,
            "records_without_device": len(result["records_without_device"]),
            "devices_without_record": result["devices_without_record"],
        }
        calls = CallRecorder()
        for dump, events in (
            (arrival.before.dump(), _OLD_EVENTS),
            (profile.dump(), _NEW_EVENTS),
        ):
            calls.merge(dump, events)
        self._calls.merge(calls.dump())
        self._late = set(result["restored_late"])
        self._count(arrival.before)
        self._counted = np.zeros((2, 0), np.float32)
        self._count(profile)
        callbacks: Counter[str] = Counter()
        for row in calls.rows():
            callbacks["{subsystem}/{name}/{event}".format_map(row)] += row["total_ns"]
        self.runs.append(
            {"phases_ns": phases, "devices": dict(self.devices), "callbacks_ns": dict(callbacks)}
        )
        self.failures += [*result["failures"], *map(describe, finished.failures)]
        if self.error is None and self.failures:
            self.error = self.failures[0]
        lost = finished.unreclaimed
        if self.error is None and lost:
            message = f"{len(lost)} devices were not reclaimed, the first is {lost[0]}"
            self.error = describe(LuoError(message)) | {"device": lost[0]}
        self.dma += result["dma"]
        if self.error is None and self.dma:
            stray = Stray(**self.dma[0])
            self.error = describe(LuoError(str(stray))) | {"device": stray.device}
        known = result["reclaimed"] + len(lost) + len(result["records_without_device"])
        if self.error is None and departure.preserved > known:
            message = f"{departure.preserved - known} devices were preserved in vain"
            self.error = describe(LuoError(f"{message}: the new kernel knows nothing of them"))
        stored, verified = arrival.state_bytes, arrival.verified_bytes
        if self.error is None and stored != verified:
            self.error = describe(
                LuoError(f"{stored - verified} of {stored} bytes of state differ after the jump")
            )

    def note_dry(self, kernel: Any, cancelled: CancelResult) -> None:
        """Add one update of *kernel* that was cancelled instead of the jump."""
        self.note_state(kernel)
        self.devices["requested"] = int(kernel.devices.requested.sum())
        self.tracks = [_track("old kernel", kernel)]
        spent = kernel.phases
        spent.setdefault("reboot", spent.get("freeze", 0))
        self.dry = {name: spent.get(name, 0) for name in ("prepare", "reboot", "cancel")}
        self._calls.merge(kernel.profile.dump())
        self._count(kernel.profile)
        self.failures += map(describe, cancelled.failures)
        if self.failures:
            self.error = self.failures[0]

    def _count(self, profile: Profile) -> None:
        """Add what the devices of one kernel cost since it was last counted."""
        self._costs = added(self._costs, profile.costs, -self._counted)
        self._counted = profile.costs.copy()

    # ---- reading ----

    @property
    def phases(self) -> dict[str, int]:
        """Nanoseconds of each phase: the median of all runs."""
        return {
            name: round(statistics.median([run["phases_ns"].get(name, 0) for run in self.runs]))
            if self.runs
            else 0
            for name in PHASES
        }

    @property
    def profile(self) -> Profile:
        """What callbacks and devices cost, all runs together; spans are in :attr:`tracks`."""
        recorder = CallRecorder()
        recorder.load((), np.zeros(0, SPAN), self._costs.astype(np.float32), 0)
        recorder.merge(self._calls.dump())
        blackout = sum(run["phases_ns"].get("blackout", 0) for run in self.runs)
        return Profile(recorder, self._tree, blackout, self._late)

    @property
    def callbacks(self) -> list[dict[str, Any]]:
        """What callbacks cost: one row a subsystem, event, kind and name; all runs together.

        Beside the figures there are the buckets of the histogram as ``[low_ns, high_ns, calls]``,
        the path of the device that took longest, and the share of blackout of what is in it.
        """
        profile = self.profile
        rows = profile.rows()
        for row in rows:
            label = (row["subsystem"], row["event"], row["kind"], row["name"])
            if not profile.in_blackout(label):
                row["blackout_share"] = None
            del row["blackout_ns"]
            slowest = row["max_device"]
            known = self._tree is not None and slowest >= 0
            row["max_device"] = self._tree.path(slowest) if known else None
            row["histogram"] = profile.histogram(label)
        return rows

    def check(self, budgets: Mapping[str, str | int]) -> None:
        """Hold the updates to *budgets*, by their 95th percentile: the slowest of fewer than 20.

        Args:
            budgets: limit by name: a phase (``"blackout"``), or what all callbacks of a subsystem
                (``"subsystem/EVENT"``) or of a driver, bus or subsystem in it
                (``"subsystem/name/EVENT"``) may take together in one update; as ``"50ms"`` or in
                nanoseconds.

        Raises:
            BudgetError: what is over budget, worst first, with its dearest callbacks.
            ValueError: a name that these updates have not, a limit that is no duration, or no
                update that has come to its end.
        """
        if not self.runs:
            raise ValueError("budgets: no update has come to its end")
        figures = [_figures(run) for run in self.runs]
        names = dict.fromkeys(name for run in figures for name in run)
        spent = {name: p95([run.get(name, 0) for run in figures]) for name in names}
        judged: list[dict[str, Any]] = []
        for name, limit in budgets.items():
            allowed = parse_duration(limit) if isinstance(limit, str) else limit
            if name not in spent:
                raise ValueError(f"budget {name!r}: none of {', '.join(spent)}")
            if allowed < 0:
                raise ValueError(f"budget {name!r}: {limit!r} is no duration")
            met = spent[name] <= allowed
            worst = [] if met else self._worst(name, spent)
            judged.append(
                {"name": name, "limit_ns": allowed, "p95_ns": spent[name], "met": met}
                | {"worst": worst}
            )
        judged.sort(key=lambda one: one["limit_ns"] / max(1, one["p95_ns"]))
        over = [one for one in judged if not one["met"]]
        self.verdict = {"met": not over, "runs": len(self.runs), "budgets": judged}
        if over:
            raise BudgetError(
                "\n".join(_told(self.verdict)),
                {one["name"]: (one["p95_ns"], one["limit_ns"]) for one in over},
            )

    def _worst(self, name: str, spent: Mapping[str, int]) -> list[dict[str, Any]]:
        """Return the dearest callbacks of the budget *name*, each with its dearest devices."""
        parts = [part for part in spent if _is_part(part, name)] or [name]
        if name == "blackout":
            late = {f"{subsystem}/{subsystem}/RESTORE" for subsystem in self._late}
            parts = [part for part in parts if part not in late]
        parts.sort(key=lambda part: -spent[part])
        return [
            {"name": part, "p95_ns": spent[part], "devices": self._worst_devices(part)}
            for part in parts[:_NR_WORST]
        ]

    def _worst_devices(self, callback: str) -> list[dict[str, Any]]:
        """Return what the devices of the driver or bus of *callback* cost in one update."""
        subsystem, _, name = callback.partition("/")
        name, _, event = name.rpartition("/")
        if subsystem != _DEVICES or self._tree is None:
            return []
        # The sums know no event: in blackout or out of it is as near as they come.
        costs = np.zeros_like(self._costs)
        row, known = int(event in BLACKOUT_EVENTS), costs.shape[1]
        for ids, names in (
            (self._tree.driver_ids, self._tree.driver_names),
            (self._tree.bus_ids, self._tree.bus_names),
        ):
            if name in names:
                mine = np.flatnonzero(ids[:known] == names.index(name))
                costs[row, mine] = self._costs[row, mine] / len(self.runs)
        return [
            {"path": device["path"].item(), "ns": device["total_ns"].item()}
            for device in device_costs(self._tree, costs, _NR_WORST)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the ``luo-run/1`` document."""
        return {
            "schema": "luo-run/1",
            "luo_version": version(),
            "machine": {
                "cpu": _cpu(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
            },
            "settings": self.settings,
            "source": self.source,
            "kho_abi": self._abi,
            "behaviour": self._behaviour,
            "quirks": self._quirks,
            "successor": self.successor,
            "devices": self.devices,
            "states": self.states,
            "phases_ns": self.phases,
            "callbacks": self.callbacks,
            "image": self.image,
            "runs": self.runs,
            "clock": self.clock,
            "timeline": self._timeline(),
            "worst_devices": self._dearest_devices(),
            "subtrees": subtrees(self._tree, self._costs) if self._costs.shape[1] else [],
            "budgets": self.verdict,
            "dry_reboot_ns": self.dry or None,
            "failures": self.failures,
            "dma": self.dma,
            "error": self.error,
        }

    def _dearest_devices(self) -> list[dict[str, Any]]:
        rows = self.profile.rows("device", _NR_DEVICES) if self._costs.shape[1] else []
        return [{name: row[name] for name in row if name != "device"} for row in rows]

    def _timeline(self) -> dict[str, Any] | None:
        """Return when the phases of the last update ran, from the begin of the first."""
        if self.blackout is None:
            return None
        kernels = {
            track.name: {
                name: mark for name, mark in track.marks.items() if name in _TIMELINE[track.name]
            }
            for track in self.tracks
        }
        begin = min(mark[0] for phases in kernels.values() for mark in phases.values())
        return {
            "begin_ns": begin,
            "kernels": [
                {
                    "name": kernel,
                    "phases": [
                        [name, phases[name][0] - begin, phases[name][1] - begin]
                        for name in _TIMELINE[kernel]
                        if name in phases
                    ],
                }
                for kernel, phases in kernels.items()
            ],
            "blackout": [at - begin for at in self.blackout],
        }

    def to_json(self) -> str:
        """Return the ``luo-run/1`` document as text."""
        return json.dumps(self.to_dict(), indent=2)


def _figures(run: Mapping[str, Any]) -> dict[str, int]:
    """Return what one update took, by the names of :meth:`Report.check`."""
    figures = {name: run["phases_ns"].get(name, 0) for name in PHASES}
    for name, ns in run["callbacks_ns"].items():
        subsystem, event = name.partition("/")[0], name.rpartition("/")[2]
        total = f"{subsystem}/{event}"
        figures[total] = figures.get(total, 0) + ns
        figures[name] = ns
    return figures


def _told(verdict: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is over budget, worst first, line by line."""
    yield f"over budget, by the 95th percentile of {verdict['runs']}:"
    for one in verdict["budgets"]:
        if one["met"]:
            continue
        yield f"{one['name']}: {_ms(one['p95_ns'])}, the budget is {_ms(one['limit_ns'])}"
        for part in one["worst"]:
            if part["name"] != one["name"]:
                yield f"    {part['name']}: {_ms(part['p95_ns'])}"
            for device in part["devices"]:
                yield f"        {device['path']}: {_ms(device['ns'])}"


def _is_part(name: str, whole: str) -> bool:
    """Whether *name*, a callback's, is a part of *whole*, a phase or the event of a subsystem."""
    if name.count("/") < 2:
        return False
    subsystem, event = name.partition("/")[0], name.rpartition("/")[2]
    return event in _EVENTS.get(whole, ()) or whole == f"{subsystem}/{event}"


def p95(values: list[int]) -> int:
    """Return the 95th percentile by nearest rank, which is a value that occurred."""
    return sorted(values)[-(-95 * len(values) // 100) - 1]


def _ms(ns: int) -> str:
    return f"{ns / 1e6:.3f} ms"


def version() -> str:
    """Return the version of the installed distribution; "unknown" in a tree that is not one."""
    from importlib import metadata  # 20 ms, which only reports need

    try:
        return metadata.version("luo-kho")
    except metadata.PackageNotFoundError:  # run from a tree that is not installed
        return "unknown"


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
