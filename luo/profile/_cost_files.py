"""Cost models in files: TOML by hand, ``luo-run/1``, CSV of tracing tools."""

from __future__ import annotations

import csv
import json
import math
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from statistics import median
from typing import Any, Final

from luo.profile._cost_rules import EVENTS, KINDS, LIMIT_NS, PHASES, TIME, Distribution, Rule
from luo.report import parse_duration

__all__ = ["Source", "dump", "load"]

_MAX_NUMBER: Final = 20.0
_NR_BUCKETS: Final = 512  # of as many equal calls that a measured distribution is cut into


def load(
    path: str | PathLike[str], names: Mapping[str, str] | None = None
) -> tuple[dict[str, Rule], Rule, int]:
    """Return rules, default and seed of the file at *path*; its suffix says what it is.

    Args:
        path: the file.
        names: rules by the names of functions in a .csv.

    Raises:
        OSError, ValueError: as of :meth:`luo.profile.cost.CostModel.load`.
    """
    name = fspath(path)
    suffix = Path(name).suffix.lower()
    if suffix not in (".toml", ".json", ".csv"):
        raise ValueError(f"{name}: a .toml, .json or .csv file is expected")
    source = Source(name)
    try:
        text = Path(name).read_text("utf-8")
        if suffix == ".csv":
            return source.table(text.split("\n"), names), Rule(), 0
        found = tomllib.loads(text) if suffix == ".toml" else json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start}: no UTF-8") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from None
    return source.toml(found) if suffix == ".toml" else (source.run(found), Rule(), 0)


def dump(rules: Mapping[str, Rule], default: Rule, seed: int) -> str:
    """Return what :func:`load` reads, as TOML."""
    lines = [f"default = {_toml(default)}", f"seed = {seed}", "", "[rules]"]
    lines += [f"{quoted(name)} = {_toml(rule)}" for name, rule in rules.items()]
    return "\n".join(lines) + "\n"


def quoted(name: str) -> str:
    """Return *name* as a string of TOML."""
    return json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml(rule: Rule) -> str:
    parts: dict[str, Any] = {}
    spread = rule.spread
    if spread is not None and spread.kind == "histogram":
        parts["histogram"] = [list(bucket) for bucket in spread.values]
    elif spread is not None:
        parts["distribution"] = quoted(spread.kind)
        parts |= dict(zip(KINDS[spread.kind][0], spread.values, strict=True))
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
class Source:
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

    def rules(self, values: Mapping[str, object]) -> dict[str, Rule]:
        """Return the rules of a table, or what is one."""
        found = {}
        for name, value in values.items():
            where = f"rules.{quoted(name)}"
            self.check_name(name, where)
            found[name] = self.rule(value, where)
        return found

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
            if not isinstance(kind, str) or kind not in KINDS:
                raise self.wrong(f"{where}.distribution", f"{kind!r} is none of {', '.join(KINDS)}")
            values = []
            for key, what in KINDS[kind][0].items():
                if key not in left:
                    raise self.wrong(where, f"{kind}: {key} is missing")
                read = self.time if what == TIME else self.number
                values.append(read(left.pop(key), f"{where}.{key}"))
            if kind == "uniform" and values[0] > values[1]:
                raise self.wrong(f"{where}.low", "is more than high")
            spread = Distribution(kind, tuple(values))
        for key in left:
            raise self.wrong(f"{where}.{key}", "unknown key")
        if spread is None and reference:
            raise self.wrong(f"{where}.devices", "there is no distribution")
        if 0 < reference < 1:
            raise self.wrong(f"{where}.devices", f"{reference!r}: at least 1, or 0")
        return Rule(fixed, per_device, spread, reference)

    def time(self, value: object, where: str) -> float:
        if isinstance(value, str):
            try:
                value = parse_duration(value)
            except ValueError as error:
                raise self.wrong(where, str(error)) from None
        if not _is_number(value) or not 0 <= value <= LIMIT_NS:  # type: ignore[operator]
            raise self.wrong(where, f'{value!r} is no time, as "12us" or nanoseconds')
        return value  # type: ignore[return-value]

    def count(self, value: object, where: str, least: int = 1) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 62:
            raise self.wrong(where, f"{value!r} is no number of {where.rpartition('.')[2]}")
        return value

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
            if not good or not before <= row[0] <= row[1] <= LIMIT_NS:
                raise self.wrong(f"{where}[{place}]", f"{row!r}: [low, high, count], ascending")
            self.count(row[2], f"{where}[{place}].count")
            before = row[1]
        return Distribution("histogram", tuple(map(tuple, value)))

    # ---- TOML ----

    def toml(self, found: dict[str, Any]) -> tuple[dict[str, Rule], Rule, int]:
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
        return rules | self.rules(tables["rules"]), default, seed

    def base(self, base: object, names: dict[str, Any]) -> dict[str, Rule]:
        for function, rule in names.items():
            where = f"names.{quoted(function)}"
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
        if names and suffix != ".csv":
            raise self.wrong("names", "only a .csv has functions")
        return load(Path(self.file).parent / str(base), names or None)[0]

    # ---- luo-run/1 ----

    def run(self, document: object) -> dict[str, Rule]:
        """Return the rules of a document: of its callbacks, and the engine's own shares."""
        if not isinstance(document, Mapping) or document.get("schema") != "luo-run/1":
            raise self.wrong("schema", "no luo-run/1 document")
        rules = self.callbacks(document)
        if not rules:
            raise self.wrong("callbacks", "none was measured")
        return rules | self.phases(document)

    def callbacks(self, document: Mapping[str, Any]) -> dict[str, Rule]:
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
                buckets = row.get("histogram")
            except (KeyError, TypeError, AttributeError) as error:
                raise self.wrong(where, f"no row of callbacks: {error}") from None
            self.check_name(name, where)
            self.count(devices, f"{where}.devices", 0)
            self.count(calls, f"{where}.calls")
            mean = self.time(self.count(total, f"{where}.total_ns", 0) / calls, where)
            if buckets:
                self.histogram(buckets, f"{where}.histogram")
                low, high = row.get("min_ns", 0), row.get("max_ns", LIMIT_NS)
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
        runs = document.get("runs") or []
        if not isinstance(runs, list):
            raise self.wrong("runs", "a list is expected")
        for place, run in enumerate(runs):
            where = f"runs[{place}]"
            try:
                spent: dict[str, float] = defaultdict(float)
                for name, ns in run["callbacks_ns"].items():
                    spent[name.rpartition("/")[2]] += self.count(ns, where, 0)
                for phase, event in PHASES.items():
                    ns = run["phases_ns"].get(phase)
                    if ns is not None:
                        left = self.time(ns, f"{where}.phases_ns.{phase}") - spent[event or ""]
                        own[phase].append(max(0, left))
            except (KeyError, TypeError, AttributeError) as error:
                raise self.wrong(where, f"no update: {error}") from None
        return {f"engine/{phase}": Rule(round(median(each))) for phase, each in own.items()}

    # ---- CSV ----

    def table(self, lines: Iterable[str], names: Mapping[str, str] | None) -> dict[str, Rule]:
        """Return the rules of CSV; *names* as of :meth:`luo.profile.cost.CostModel.from_csv`."""
        calls: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
        for line, name, ns, count, devices in self.calls(lines):
            if names is not None and name not in names:
                continue
            rule = name if names is None else names[name]
            try:
                self.check_name(rule, f"line {line}")
            except ValueError as error:
                raise ValueError(f"{error}; or name it in [names] of a .toml file") from None
            calls[rule].append((ns, count, devices))
        if not calls:
            raise ValueError(f"{self.file}: no call of a callback in it")
        rules = {}
        for name, same in calls.items():
            same.sort()
            buckets: dict[tuple[float, float], int] = defaultdict(int)
            size = -(-len(same) // _NR_BUCKETS)
            for part in (same[at : at + size] for at in range(0, len(same), size)):
                buckets[part[0][0], part[-1][0]] += sum(count for _, count, _ in part)
            nr_devices = sum(count * devices for _, count, devices in same)
            nr_calls = sum(count for _, count, _ in same)
            rules[name] = _rule(
                [[*at, count] for at, count in buckets.items()], nr_devices / nr_calls
            )
        return rules

    def calls(self, lines: Iterable[str]) -> Iterator[tuple[int, str, float, int, int]]:
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
            counts = [1, 0]
            for nr, column in enumerate((columns.calls, columns.devices)):
                if column is not None:
                    text = cells[column]
                    if not re.fullmatch("[0-9]{1,15}", text) or int(text) < 1 - nr:
                        raise self.wrong(where, f"{text!r} is no number of {_COUNTED[nr]}")
                    counts[nr] = int(text)
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


def _rule(buckets: list[list[Any]], devices: float) -> Rule:
    """Return the rule of a measured distribution, whose calls served so many devices on average."""
    buckets.sort()
    apart: list[list[Any]] = []
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
