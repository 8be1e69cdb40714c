"""What callbacks and phases take in simulated time.

A :class:`CostModel` has rules by name, and the most specific one counts:
``"subsystem/name/EVENT"`` (as ``"devices/virtio-pci/REBOOT"``), ``"subsystem/EVENT"``,
``"EVENT"``, then the default. ``"engine/jump"`` and the like are the engine's own share of a
phase, which no callback has. A driver and a bus of one name share a rule.

A file written by hand is TOML; times are ``"12us"`` or a number of nanoseconds::

    default = "5us"         # of callbacks without a rule; 0 if absent
    seed = 1                # of the distributions; 0 if absent
    base = "measured.json"  # begin with what 'luo run --json' or a tracing tool (.csv) measured

    [rules]
    "engine/jump" = "15ms"
    "kvm/REBOOT" = { distribution = "lognormal", median = "80us", sigma = 0.4 }
    "devices/vfio-pci/PREPARE" = { fixed = "20us", per_device = "3us" }

    [names]                 # functions of the .csv, and whose callbacks they are
    virtio_pci_freeze = "devices/virtio-pci/REBOOT"
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
import tomllib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, Final, TextIO, TypeAlias

import numpy as np

from luo.report import parse_duration

__all__ = ["CostModel", "Distribution", "Rule"]

Label: TypeAlias = tuple[str, str, str, str]

EVENTS: Final = ("PREPARE", "REBOOT", "RESTORE", "FINISH", "CANCEL")
#: The engine's phases, and the event whose callbacks are a part of each.
PHASES: Final = {
    "prepare": "PREPARE",
    "reboot": "REBOOT",
    "jump": None,
    "boot": None,
    "restore": "RESTORE",
    "finish": "FINISH",
    "cancel": "CANCEL",
}
_LIMIT_NS: Final = 10**15  # eleven days; what is drawn is cut there
_NR_BUCKETS: Final = 512  # of as many equal calls that a measured distribution is cut into

# ---- distributions ----

_NORMAL: Final = NormalDist()
_TIME, _NUMBER = "a time", "a number"
#: By name: parameters with what each is, and the inverse of the distribution function.
_KINDS: Final[dict[str, tuple[dict[str, str], Callable[..., float]]]] = {
    "uniform": ({"low": _TIME, "high": _TIME}, lambda u, low, high: low + u * (high - low)),
    "exponential": ({"mean": _TIME}, lambda u, mean: -mean * math.log1p(-u)),
    "normal": (
        {"mean": _TIME, "deviation": _TIME},
        lambda u, mean, deviation: mean + deviation * _NORMAL.inv_cdf(u),
    ),
    "lognormal": (
        {"median": _TIME, "sigma": _NUMBER},
        lambda u, median, sigma: median * math.exp(sigma * _NORMAL.inv_cdf(u)),
    ),
}
_MAX_NUMBER: Final = 20.0


@dataclass(frozen=True, slots=True)
class Distribution:
    """How the cost of a call is spread.

    Args:
        kind: ``"uniform"``, ``"exponential"``, ``"normal"``, ``"lognormal"``, or ``"histogram"``.
        values: its parameters in the order of :meth:`parameters`, times in nanoseconds; of a
            histogram [low, high, count] of each bucket, ascending.
    """

    kind: str
    values: tuple[Any, ...]

    @staticmethod
    def parameters(kind: str) -> dict[str, str]:
        """Return the parameters of *kind* by name: ``"a time"`` or ``"a number"``."""
        return dict(_KINDS[kind][0])

    def inverse(self) -> Callable[[float], float]:
        """Return what gives the cost that a share of calls, more than 0 and less than 1, is below.

        One number drawn gives one cost, so a sequence is the same wherever Python is.
        """
        if self.kind != "histogram":
            function, values = _KINDS[self.kind][1], self.values
            return lambda u: function(u, *values)
        below = list(itertools.accumulate((count for _, _, count in self.values), initial=0))
        buckets, total = self.values, below[-1]

        def find(u: float) -> float:
            place = bisect_right(below, u * total) - 1
            low, high, count = buckets[place]
            return float(low + (high - low) * (u * total - below[place]) / count)

        return find


@dataclass(frozen=True, slots=True)
class Rule:
    """What one call takes: all of it together.

    Args:
        fixed: nanoseconds of any call.
        per_device: nanoseconds of each device that it serves.
        spread: what is drawn besides; None for nothing.
        devices: how many devices a call of *spread* served: one that serves more takes more in
            proportion. 0: it does not depend on the devices.
    """

    fixed: float = 0
    per_device: float = 0
    spread: Distribution | None = None
    devices: float = 0

    def sampler(self, stream: random.Random) -> Callable[[int], int]:
        """Return what draws the nanoseconds of a call that serves so many devices."""
        fixed, each, reference = self.fixed, self.per_device, self.devices
        if self.spread is None:
            return lambda devices: min(round(fixed + each * devices), _LIMIT_NS)
        find = self.spread.inverse()

        def sample(devices: int) -> int:
            u = (stream.getrandbits(52) + 0.5) / (1 << 52)
            drawn = find(u) * (devices / reference if reference else 1)
            return round(min(max(fixed + each * devices + drawn, 0), _LIMIT_NS))

        return sample


class CostModel:
    """What callbacks and phases take in simulated time, by rules (see the module's words).

    It is called as the ``cost=`` of a :class:`~luo.kernel.Kernel` is. The n-th draw of a rule
    depends on the seed, the rule's name and n alone.

    Args:
        rules: by name, a :class:`Rule`, a time as ``"12us"``, or nanoseconds.
        default: of callbacks without a rule; likewise.
        seed: of all distributions.

    Attributes:
        rules, default, seed: as given.
        missed: callbacks that were called and have no rule, by ``"subsystem/name/EVENT"``.

    Raises:
        ValueError: a name that no callback has, or a time that is none.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule | str | float] | None = None,
        *,
        default: Rule | str | float = 0,
        seed: int = 0,
    ) -> None:
        words = _Words("cost model")
        self.rules = {}
        for name, rule in (rules or {}).items():
            words.check_name(name, f"rules.{_quoted(name)}")
            self.rules[name] = words.rule(rule, f"rules.{_quoted(name)}")
        self.default = words.rule(default, "default")
        self.seed = seed
        self.missed: set[str] = set()
        self._samplers: dict[str, Callable[[int], int]] = {}
        self._found: dict[Label, Callable[[int], int]] = {}

    def __repr__(self) -> str:
        return f"<CostModel {len(self.rules)} rules, seed {self.seed}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CostModel):
            return NotImplemented
        mine, theirs = ((one.rules, one.default, one.seed) for one in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]

    # ---- drawing ----

    def __call__(self, label: Label, device: int, devices: int) -> int:
        """Return the nanoseconds of a call: the ``cost=`` of a kernel."""
        return self.draw(label, devices)

    def draw(self, label: Label, devices: int = 1) -> int:
        """Return the nanoseconds of the next call of a callback, or phase.

        Args:
            label: (subsystem, event, kind, name); of a phase ("engine", "JUMP", "phase", "jump").
            devices: how many it serves.
        """
        found = self._found.get(label)
        if found is None:
            found = self._found[label] = self._find(label)
        return found(devices)

    def _find(self, label: Label) -> Callable[[int], int]:
        subsystem, event, kind, name = label
        if kind == "phase":
            names: tuple[str, ...] = (f"engine/{name}",)
        else:
            names = (f"{subsystem}/{name}/{event}", f"{subsystem}/{event}", event)
        key = next((key for key in names if key in self.rules), None)
        if key is None and kind == "phase":
            return lambda devices: 0
        if key is None:
            self.missed.add(names[0])
        if (key or "") not in self._samplers:
            rule = self.default if key is None else self.rules[key]
            self._samplers[key or ""] = rule.sampler(random.Random(f"{self.seed}/{key}"))
        return self._samplers[key or ""]

    def fresh(self, seed: int | None = None) -> CostModel:
        """Return the same model before its first draw, with another seed if one is given."""
        return CostModel(self.rules, default=self.default, seed=self.seed if seed is None else seed)

    # ---- files ----

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CostModel:
        """Read a model from TOML, or from what was measured: ``luo-run/1`` JSON, or CSV.

        Args:
            path: the file; its suffix says which.

        Raises:
            OSError: it cannot be read.
            ValueError: something in it is wrong; names the file, and the line or the key.
        """
        name = fspath(path)
        suffix = Path(name).suffix.lower()
        if suffix == ".csv":
            return cls.from_csv(path)
        if suffix not in (".toml", ".json"):
            raise ValueError(f"{name}: a .toml, .json or .csv file is expected")
        text = _read(path)
        try:
            found = tomllib.loads(text) if suffix == ".toml" else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: {error}") from None
        if suffix == ".json":
            return cls.from_run(found, name)
        return _Words(name).model(found)

    @classmethod
    def from_run(cls, document: Mapping[str, Any], name: str = "run") -> CostModel:
        """Read a model from a ``luo-run/1`` document: what its callbacks and phases took.

        A callback without a histogram costs its mean. Of a phase the engine's own share is the
        median over all updates of what its callbacks leave.

        Args:
            document: the document.
            name: what errors call it.

        Raises:
            ValueError: it is none, or has no callbacks; names the key.
        """
        if not isinstance(document, Mapping) or document.get("schema") != "luo-run/1":
            raise ValueError(f"{name}: schema: no luo-run/1 document")
        words = _Words(name)
        measured = words.measured(document)
        if not measured:
            raise ValueError(f"{name}: callbacks: none was measured")
        return cls({**measured, **words.phases(document)})

    @classmethod
    def from_csv(
        cls, file: str | PathLike[str] | TextIO, names: Mapping[str, str] | None = None
    ) -> CostModel:
        """Read a model from CSV as tracing tools are made to print it: a line a call.

        The first line that is no ``#`` comment names the columns, in any order; others are
        ignored; comma, semicolon, tab or ``|`` separates.

        =========== ============================================================================
        what        column
        =========== ============================================================================
        name        ``name``, ``function``, ``func``, ``callback``, ``probe``, ``symbol``,
                    ``rule``: a rule's name, or one of *names*; or the three columns
                    ``subsystem``, ``name``, ``event``
        duration    ``duration``, ``dur``, ``latency``, ``lat``, ``elapsed``, ``time``, ``delta``
                    with a unit as in ``duration_ns`` or ``latency (us)``; or only the unit
                    (``nsecs``, ``us``); or without, if each value has one (``12.5 us``)
        count       ``count``, ``calls``: so many calls took that long; 1 if absent
        devices     ``devices``: how many devices a call served
        =========== ============================================================================

        Args:
            file: the file.
            names: rules by the names of functions; lines of other functions are then skipped.

        Raises:
            OSError: it cannot be read.
            ValueError: a line is wrong; names the file and the line.
        """
        if isinstance(file, str | PathLike):
            return _Words(fspath(file)).table(_read(file).split("\n"), names)
        return _Words(getattr(file, "name", "csv")).table(file, names)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model as TOML, which :meth:`load` reads.

        Raises:
            OSError: it cannot be written.
        """
        lines = [f"default = {_toml(self.default)}", f"seed = {self.seed}", "", "[rules]"]
        lines += [f"{_quoted(name)} = {_toml(rule)}" for name, rule in self.rules.items()]
        Path(path).write_text("\n".join(lines) + "\n", "utf-8")


def _read(path: str | PathLike[str]) -> str:
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{fspath(path)}: byte {error.start}: no UTF-8") from None


def _quoted(name: str) -> str:
    """Return *name* as a string of TOML."""
    return json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml(rule: Rule) -> str:
    parts: dict[str, Any] = {}
    spread = rule.spread
    if spread is not None and spread.kind == "histogram":
        parts["histogram"] = [list(bucket) for bucket in spread.values]
    elif spread is not None:
        parts["distribution"] = _quoted(spread.kind)
        parts |= dict(zip(Distribution.parameters(spread.kind), spread.values, strict=True))
    for key in ("fixed", "per_device", "devices"):
        if getattr(rule, key):
            parts[key] = getattr(rule, key)
    if parts.keys() <= {"fixed"}:
        return str(rule.fixed)
    return "{ " + ", ".join(f"{key} = {value}" for key, value in parts.items()) + " }"


# ---- reading ----

_NAMES: Final = ("name", "function", "func", "callback", "probe", "symbol", "rule")
_DURATIONS: Final = ("duration", "dur", "latency", "lat", "elapsed", "time", "delta", "")
_COUNTS: Final = ("count", "calls")
_UNITS: Final = {
    unit: size
    for size, units in (
        (1, "ns nsec nsecs nanosecond nanoseconds"),
        (10**3, "us µs μs usec usecs microsecond microseconds"),
        (10**6, "ms msec msecs millisecond milliseconds"),
        (10**9, "s sec secs second seconds"),
    )
    for unit in units.split()
}
# As ftrace's function graph prints it, with its mark of how long that is.
_VALUE: Final = re.compile(r"[+!#*@$]?\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*([a-zµμ]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Words:
    """What a file says, checked; errors name the file and the place in it."""

    file: str

    def wrong(self, where: str, why: str) -> ValueError:
        return ValueError(f"{self.file}: {where}: {why}")

    def check_name(self, name: str, where: str) -> None:
        subsystem, _, rest = name.partition("/")
        if subsystem == "engine":
            if rest not in PHASES:
                raise self.wrong(where, f"{rest!r} is no phase: {', '.join(PHASES)}")
        elif name.rpartition("/")[2] not in EVENTS or name.startswith("/") or "//" in name:
            raise self.wrong(
                where,
                f"{name!r} is no rule: EVENT, subsystem/EVENT, subsystem/name/EVENT (one of"
                f" {', '.join(EVENTS)}) or engine/phase",
            )

    # ---- a rule ----

    def rule(self, value: object, where: str) -> Rule:
        if isinstance(value, Rule):
            return value
        if not isinstance(value, dict):
            return Rule(self.time(value, where))
        left = dict(value)
        fixed = self.time(left.pop("fixed", 0), f"{where}.fixed")
        per_device = self.time(left.pop("per_device", 0), f"{where}.per_device")
        reference = self.number(left.pop("devices", 0), f"{where}.devices", 1 << 32)
        spread = None
        if "histogram" in left:
            spread = self.histogram(left.pop("histogram"), f"{where}.histogram")
        elif "distribution" in left:
            kind = left.pop("distribution")
            if not isinstance(kind, str) or kind not in _KINDS:
                raise self.wrong(
                    f"{where}.distribution", f"{kind!r} is none of {', '.join(_KINDS)}"
                )
            values = []
            for key, what in Distribution.parameters(kind).items():
                if key not in left:
                    raise self.wrong(where, f"{kind}: {key} is missing")
                read = self.time if what == _TIME else self.number
                values.append(read(left.pop(key), f"{where}.{key}"))
            if kind == "uniform" and values[0] > values[1]:
                raise self.wrong(f"{where}.low", "is more than high")
            spread = Distribution(kind, tuple(values))
        for key in left:
            raise self.wrong(f"{where}.{key}", "unknown key")
        if spread is None and reference:
            raise self.wrong(f"{where}.devices", "there is no distribution")
        return Rule(fixed, per_device, spread, reference)

    def time(self, value: object, where: str) -> float:
        if isinstance(value, str):
            try:
                value = parse_duration(value)
            except ValueError as error:
                raise self.wrong(where, str(error)) from None
        if not _is_number(value) or not 0 <= value <= _LIMIT_NS:  # type: ignore[operator]
            raise self.wrong(where, f'{value!r} is no time, as "12us" or nanoseconds')
        return value  # type: ignore[return-value]

    def number(self, value: object, where: str, limit: float = _MAX_NUMBER) -> float:
        if not _is_number(value) or not 0 <= value <= limit:  # type: ignore[operator]
            raise self.wrong(where, f"{value!r} is no number from 0 to {limit:g}")
        return value  # type: ignore[return-value]

    def histogram(self, value: object, where: str) -> Distribution:
        if not isinstance(value, list) or not value:
            raise self.wrong(where, "a list of [low, high, count] is expected")
        before = 0.0
        for place, row in enumerate(value):
            good = isinstance(row, list) and len(row) == 3 and all(map(_is_number, row))
            if not good or not before <= row[0] <= row[1] <= _LIMIT_NS or row[2] <= 0:
                raise self.wrong(f"{where}[{place}]", f"{row!r}: [low, high, count], ascending")
            before = row[1]
        return Distribution("histogram", tuple(map(tuple, value)))

    # ---- TOML ----

    def model(self, found: dict[str, Any]) -> CostModel:
        tables: dict[str, dict[str, Any]] = {}
        for key in ("rules", "names"):
            tables[key] = found.pop(key, {})
            if not isinstance(tables[key], dict):
                raise self.wrong(key, "must be a table")
        seed, base = found.pop("seed", 0), found.pop("base", None)
        default = self.rule(found.pop("default", 0), "default")
        for key in found:
            raise self.wrong(key, "unknown key")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise self.wrong("seed", f"{seed!r} is no integer")
        rules = self.base(base, tables["names"])
        for name, value in tables["rules"].items():
            where = f"rules.{_quoted(name)}"
            self.check_name(name, where)
            rules[name] = self.rule(value, where)
        return CostModel(rules, default=default, seed=seed)

    def base(self, base: object, names: dict[str, Any]) -> dict[str, Rule]:
        for function, rule in names.items():
            where = f"names.{_quoted(function)}"
            if not isinstance(rule, str):
                raise self.wrong(where, f"{rule!r} is no rule's name")
            self.check_name(rule, where)
        if base is None:
            if names:
                raise self.wrong("names", "there is no base that has functions")
            return {}
        suffix = Path(base).suffix.lower() if isinstance(base, str) else ""
        if suffix not in (".json", ".csv"):
            raise self.wrong("base", f"{base!r}: a .json or .csv file is expected")
        path = Path(self.file).parent / str(base)
        if suffix == ".csv":
            return dict(CostModel.from_csv(path, names or None).rules)
        if names:
            raise self.wrong("names", "only a .csv has functions")
        return dict(CostModel.load(path).rules)

    # ---- luo-run/1 ----

    def measured(self, document: Mapping[str, Any]) -> dict[str, Rule]:
        rows: dict[str, list[tuple[float, float, list[Any]]]] = defaultdict(list)
        callbacks = document.get("callbacks")
        if not isinstance(callbacks, list):
            raise self.wrong("callbacks", "a list is expected")
        for place, row in enumerate(callbacks):
            where = f"callbacks[{place}]"
            try:
                name = "{subsystem}/{name}/{event}".format_map(row)
                calls, total = row["calls"], row["total_ns"]
                devices = row.get("devices") or 0
            except (KeyError, TypeError, AttributeError) as error:
                raise self.wrong(where, f"no row of callbacks: {error}") from None
            self.check_name(name, where)
            self.number(devices, f"{where}.devices", 1 << 62)
            if not self.number(calls, f"{where}.calls", 1 << 62):
                raise self.wrong(f"{where}.calls", "0 is no number of calls")
            mean = self.time(self.number(total, f"{where}.total_ns", 1 << 62) / calls, where)
            buckets = row.get("histogram")
            if buckets:
                self.histogram(buckets, f"{where}.histogram")
                low, high = row.get("min_ns", 0), row.get("max_ns", _LIMIT_NS)
                for bound, key in ((low, "min_ns"), (high, "max_ns")):
                    self.time(bound, f"{where}.{key}")
                buckets = [
                    [min(max(value, low), high) for value in bucket[:2]] + [bucket[2]]
                    for bucket in buckets
                ]
            rows[name].append((calls, devices, buckets or [[mean, mean, calls]]))
        rules = {}
        for name, same in rows.items():
            calls = sum(row[0] for row in same)
            devices = sum(row[1] for row in same)
            rules[name] = _rule([bucket for row in same for bucket in row[2]], devices / calls)
        return rules

    def phases(self, document: Mapping[str, Any]) -> dict[str, Rule]:
        own: dict[str, list[float]] = defaultdict(list)
        for place, run in enumerate(document.get("runs") or ()):
            where = f"runs[{place}]"
            try:
                spent: dict[str, float] = defaultdict(float)
                for name, ns in run["callbacks_ns"].items():
                    spent[name.rpartition("/")[2]] += self.number(ns, where, 1 << 62)
                for phase, event in PHASES.items():
                    ns = run["phases_ns"].get(phase)
                    if ns is not None:
                        left = self.time(ns, f"{where}.phases_ns.{phase}") - spent[event or ""]
                        own[phase].append(max(0, left))
            except (KeyError, TypeError, AttributeError) as error:
                raise self.wrong(where, f"no update: {error}") from None
        return {f"engine/{phase}": Rule(round(median(each))) for phase, each in own.items()}

    # ---- CSV ----

    def table(self, lines: Iterable[str], names: Mapping[str, str] | None) -> CostModel:
        calls: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for line, name, *call in self.calls(lines):
            if names is not None:
                if name in names:
                    calls[names[name]].append((call[0], call[1], call[2]))
                continue
            try:
                self.check_name(name, f"line {line}")
            except ValueError as error:
                raise ValueError(f"{error}; or name it in [names] of a .toml file") from None
            calls[name].append((call[0], call[1], call[2]))
        if not calls:
            raise ValueError(f"{self.file}: no call of a callback in it")
        rules = {}
        for name, same in calls.items():
            values = np.array(same)
            order = np.argsort(values[:, 0], kind="stable")
            buckets: dict[tuple[float, float], float] = defaultdict(float)
            for part in np.array_split(values[order], min(len(order), _NR_BUCKETS)):
                buckets[part[0, 0], part[-1, 0]] += part[:, 1].sum()
            devices = float((values[:, 1] * values[:, 2]).sum() / values[:, 1].sum())
            rules[name] = _rule([[*map(float, at), float(n)] for at, n in buckets.items()], devices)
        return CostModel(rules)

    def calls(self, lines: Iterable[str]) -> Iterator[tuple[int, str, float, float, float]]:
        """Yield of each line its number, the name, nanoseconds, count and devices."""
        numbered = (
            (number, line)
            for number, line in enumerate(lines, 1)
            if line.strip() and not line.lstrip().startswith("#")
        )
        number, header = next(numbered, (1, ""))
        separator = max(",;\t|", key=header.count)
        columns = _Columns.read(self.cells(header, separator, number), self.file, number)
        for number, line in numbered:
            where = f"line {number}"
            cells = self.cells(line, separator, number)
            if len(cells) != columns.count:
                raise self.wrong(where, f"{len(cells)} columns, the header has {columns.count}")
            name = columns.name_of(cells)
            if not name:
                raise self.wrong(where, "there is no name")
            ns = self.nanoseconds(cells[columns.duration], columns.unit, where)
            counts = [1.0, 0.0]
            for nr, column in enumerate((columns.calls, columns.devices)):
                if column is not None:
                    text = cells[column]
                    if not text.isdecimal() or not 1 - nr <= int(text) <= 1 << 53:
                        raise self.wrong(where, f"{text!r} is no number of {_COUNTED[nr]}")
                    counts[nr] = float(text)
            yield number, name, ns, counts[0], counts[1]

    def cells(self, line: str, separator: str, number: int) -> list[str]:
        try:
            cells = next(csv.reader([line], delimiter=separator), [])
        except csv.Error as error:
            raise self.wrong(f"line {number}", str(error)) from None
        return [cell.strip() for cell in cells]

    def nanoseconds(self, text: str, unit: int, where: str) -> float:
        match = _VALUE.fullmatch(text)
        own = match[2].lower() if match is not None else ""
        if match is None or (own and own not in _UNITS):
            raise self.wrong(where, f"duration {text!r}: no number, or no unit that is known")
        scale = _UNITS[own] if own else unit
        if not scale:
            raise self.wrong(where, f"duration {text!r}: no unit, here or in the column's name")
        return self.time(float(match[1]) * scale, where)


_COUNTED: Final = ("calls", "devices")


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where things are in a line of CSV; ``unit`` is 0 if each value has its own."""

    count: int
    names: tuple[int, ...]
    duration: int
    unit: int
    calls: int | None
    devices: int | None

    @classmethod
    def read(cls, header: Sequence[str], file: str, line: int) -> _Columns:
        words = [tuple(re.findall(r"[a-zµμ]+", cell.lower())) for cell in header]
        single = [word[0] if len(word) == 1 else "" for word in words]
        durations = [
            (place, _UNITS.get(word[-1], 0))
            for place, word in enumerate(words)
            if word and _is_duration(word)
        ]
        if len(durations) > 1:  # the other one is when it was
            durations = [one for one in durations if words[one[0]][0] != "time"]
        where = f"{file}: line {line}"
        if len(durations) != 1:
            found = ", ".join(header[place] for place, _ in durations) or ", ".join(header)
            raise ValueError(
                f"{where}: one column of durations is expected, as duration_ns; there is {found}"
            )
        if {"subsystem", "name", "event"} <= set(single):
            names = tuple(single.index(word) for word in ("subsystem", "name", "event"))
        else:
            names = tuple(place for place, word in enumerate(single) if word in _NAMES)[:1]
        if not names:
            raise ValueError(f"{where}: no column of names: {', '.join(_NAMES)}")
        calls = next((place for place, word in enumerate(single) if word in _COUNTS), None)
        devices = single.index("devices") if "devices" in single else None
        return cls(len(header), names, *durations[0], calls, devices)

    def name_of(self, cells: Sequence[str]) -> str:
        if len(self.names) > 1:
            return "/".join(cells[place] for place in self.names)
        # ftrace prints calls as C: "virtio_pci_freeze();", and a module behind it in brackets.
        return re.sub(r"\s*(\[\w+\])?\s*(\(\))?\s*;?\s*$", "", cells[self.names[0]])


def _is_duration(words: tuple[str, ...]) -> bool:
    """Whether a column of this name has durations: what it is and its unit, or one of them."""
    what, unit = (words[0], words[1:]) if words[0] not in _UNITS else ("", words)
    return what in _DURATIONS and (not unit or (len(unit) == 1 and unit[0] in _UNITS))


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _rule(buckets: list[list[float]], devices: float) -> Rule:
    """Return the rule of a measured distribution, whose calls served so many devices on average."""
    buckets.sort()
    apart: list[list[float]] = []
    for low, high, count in buckets:  # two that overlap, of a driver and a bus, become one
        if apart and low < apart[-1][1]:
            apart[-1][1] = max(high, apart[-1][1])
            apart[-1][2] += count
        else:
            apart.append([low, high, count])
    reference = devices if devices > 1 else 0
    if len(apart) == 1 and apart[0][0] == apart[0][1]:
        each = apart[0][0]
        return Rule(per_device=each / reference) if reference else Rule(each)
    return Rule(spread=Distribution("histogram", tuple(map(tuple, apart))), devices=reference)
