"""The figures of docs/two-apis.md: the same devices by RFC v1's notifiers and by mainline's files.

Tables, and sentences whose numbers are those of the run: ``report.py`` writes both.
"""

from collections.abc import Iterator
from typing import Any

from report import Heat, binary, duration, heats_of, table, three

__all__ = ["block", "section"]

_HEAD = (
    "by",
    "callbacks",
    "PREPARE",
    "REBOOT",
    "jump, boot, restore",
    "FINISH",
    "blackout",
    "sessions",
    "records, a device",
    "pages, a device",
)
_ARRIVING = ("jump", "boot", "restore")
_PHASES = (
    ("PREPARE, or PRESERVE", ("prepare",)),
    ("REBOOT, or freeze", ("reboot",)),
    ("jump, boot, restore or retrieve", _ARRIVING),
    ("FINISH", ("finish",)),
    ("blackout", ("blackout",)),
)
_COLUMNS = (
    ("notifiers", "native"),
    ("notifiers", "python"),
    ("notifiers", "steps"),
    ("files", "python"),
)


def _heats(run: dict[str, Any]) -> list[Heat]:
    """Return the races that say everything of an update, smaller ones first."""
    return [heat for heat in heats_of(run) if heat.row == "api.prepare"]


def _entry(heat: Heat, design: str, kind: str) -> dict[str, Any] | None:
    found = heat.entries.get(f"luo {design} {kind}")
    return found if found and found.get("phases") else None


def _spent(entry: dict[str, Any], *phases: str) -> float:
    return float(sum(entry["phases"][phase] for phase in phases))


def _title(heat: Heat) -> str:
    where = "a generated host" if heat.shape == "generated" else f"the preset {heat.shape}"
    return f"{heat.items:,} devices of {where}"


def section(run: dict[str, Any]) -> str:
    """Return one table for each host, medians; nothing if the run has no such rows."""
    parts = []
    for heat in _heats(run):
        rows = []
        for role, entry in heat.entries.items():
            if not entry.get("phases"):
                continue
            _, design, kind = role.split()
            spent = [
                _spent(entry, *phases)
                for phases in (("prepare",), ("reboot",), _ARRIVING, ("finish",), ("blackout",))
            ]
            rows.append(
                (
                    design,
                    kind,
                    *map(duration, spent),
                    f"{entry['sessions']:,}",
                    f"{three(entry['records'] / heat.items)} B",
                    three(entry["pages"] / heat.items),
                )
            )
        parts.append(f"{_title(heat)}, medians:\n\n" + table(_HEAD, rows, 2))
    return "\n".join(parts)


def shares(run: dict[str, Any]) -> str:
    """Return what a device costs in each phase, at the most devices of a generated host."""
    plain = [heat for heat in _heats(run) if heat.shape == "generated"]
    entries = [_entry(plain[-1], *name) for name in _COLUMNS] if plain else []
    if not entries or None in entries:
        return ""
    heat, rows = plain[-1], []
    for what, phases in _PHASES:
        native, python, steps, files = (_spent(entry, *phases) for entry in entries if entry)
        rows.append(
            (
                what,
                *(duration(spent / heat.items) for spent in (native, python, steps, files)),
                f"{three(steps / python)} times",
                f"{three(files / steps)} times",
                f"{three(files / native)} times",
            )
        )
    head = [
        f"a device, of {heat.items:,}",
        "notifiers, native",
        "notifiers, Python",
        "notifiers, a call each",
        "files, Python",
        "a call each / in one walk",
        "files / a call each",
        "files / native",
    ]
    return table(head, rows, 1)


def findings(run: dict[str, Any]) -> Iterator[str]:
    """Yield what the tables say, a sentence each."""
    heats = _heats(run)
    plain = [heat for heat in heats if heat.shape == "generated"]
    if plain:
        yield from _callbacks(plain[-1])
        yield from _growth(plain)
        yield from _blackout(plain[-1])
        yield from _again(plain[-1])
        yield from _memory(plain[-1])
    for heat in heats:
        if heat.shape != "generated":
            yield from _preset(heat)


def _callbacks(heat: Heat) -> Iterator[str]:
    """Say what native callbacks gain in either design."""
    told = []
    for design in ("notifiers", "files"):
        native, python = (_entry(heat, design, kind) for kind in ("native", "python"))
        if native is None or python is None:
            return
        ratio = _spent(python, "prepare") / _spent(native, "prepare")
        told.append(f"{three(ratio)} times by {design}")
    yield (
        f"Native callbacks make PREPARE {' and '.join(told)} as fast as those in Python, at"
        f" {_title(heat)}."
    )


def _growth(heats: list[Heat]) -> Iterator[str]:
    least, most = heats[0], heats[-1]
    if least is most:
        return
    for what, phases in (("PREPARE", ("prepare",)), ("blackout", ("blackout",))):
        told = []
        for design in ("notifiers", "files"):
            one, other = (_entry(heat, design, "native") for heat in (least, most))
            if one is None or other is None:
                return
            grown = _spent(other, *phases) / _spent(one, *phases)
            told.append(
                f"{duration(_spent(one, *phases))} to {duration(_spent(other, *phases))}"
                f" ({three(grown)} times) by {design}"
            )
        yield (
            f"With {three(most.items / least.items)} times as many devices ({least.items:,} to"
            f" {most.items:,}, native callbacks), {what} goes from {', and from '.join(told)}."
        )


def _blackout(heat: Heat) -> Iterator[str]:
    told = []
    for design, kind in (("notifiers", "native"), ("notifiers", "steps"), ("files", "native")):
        entry = _entry(heat, design, kind)
        if entry is None:
            return
        whole = _spent(entry, "reboot", *_ARRIVING)
        parts = (100 * _spent(entry, *phases) / whole for phases in (("reboot",), ("restore",)))
        told.append("{:.0f} % and {:.0f} %".format(*parts) + f" by {design} ({kind})")
    yield (
        f"REBOOT or freezing, and restoring or retrieving, are {', '.join(told)} of what runs from"
        f" REBOOT to the end of restoring; the rest is jump and boot. {_title(heat)}."
    )


def _again(heat: Heat) -> Iterator[str]:
    """Say what another attempt costs when the last callback of the jump has failed."""
    one, other = (_entry(heat, design, "native") for design in ("notifiers", "files"))
    if one is None or other is None:
        return
    both, kept = _spent(one, "prepare", "reboot"), _spent(other, "reboot")
    yield (
        f"When a callback fails in the jump, another attempt takes PREPARE and REBOOT by notifiers,"
        f" {duration(both)} here, and freezing again by files, {duration(kept)}; if the files are"
        f" to be kept at all, and not {duration(_spent(other, 'prepare'))} of PRESERVE made anew."
    )


def _memory(heat: Heat) -> Iterator[str]:
    one, other = (_entry(heat, design, "native") for design in ("notifiers", "files"))
    if one is None or other is None:
        return
    pages = [three(entry["pages"] / heat.items) for entry in (one, other)]
    records = [three(entry["records"] / heat.items) for entry in (one, other)]
    maps = [binary(entry["map"]) for entry in (one, other)]
    yield (
        f"A device takes {pages[0]} pages of preserved memory by notifiers and {pages[1]} by"
        f" files; what describes it {records[0]} and {records[1]} bytes. The map that the next"
        f" kernel walks has {maps[0]} and {maps[1]}."
    )


def _preset(heat: Heat) -> Iterator[str]:
    one, other = (_entry(heat, design, "native") for design in ("notifiers", "files"))
    if one is None or other is None:
        return
    blackouts = [_spent(entry, "blackout") for entry in (one, other)]
    whole = [_spent(entry, "reboot", *_ARRIVING) for entry in (one, other)]
    yield (
        f"On {_title(heat)}, with guests, IOMMU and interrupts: blackout {duration(blackouts[0])}"
        f" by notifiers, {duration(blackouts[1])} by files in {other['sessions']:,} sessions; until"
        f" guests and everything else are back {duration(whole[0])} and {duration(whole[1])}."
    )


def block(run: dict[str, Any]) -> str:
    """Return what stands between the marks of docs/two-apis.md; nothing without such rows."""
    tables = section(run)
    if not tables:
        return ""
    machine = run["machine"]
    told = "\n".join(f"- {sentence}" for sentence in findings(run))
    return (
        f"{shares(run)}\n{told}\n\n{tables}\n"
        f'Of {run["date"]}, by `make bench ARGS="-k bench_api"` or a whole `make bench`, commit'
        f" {run['commit']}, on {machine['cpu']}, {machine['cores']} cores. Records are without"
        f" slots; pages without the RAM of guests.\n"
    )
