"""A live update on a terminal: states, timeline, cost of callbacks, size of the handover."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from luo._kho import BLACKOUT_EVENTS
from luo.report import PHASES

__all__ = ["duration", "show", "show_comparison", "size"]

_PHASES: Final = ("prepare", "reboot", "jump", "boot", "restore", "finish")
_BLACKOUT: Final = ("reboot", "jump", "boot", "restore")
_LABELS: Final = {"prepare": "PREPARE", "reboot": "REBOOT", "finish": "FINISH"}
_MODELLED: Final = "kernel boot"
_EVENTS: Final = (
    *("PREPARE", "CAN_PRESERVE", "PRESERVE", "REBOOT", "FREEZE"),
    *("RESTORE", "RETRIEVE", "CAN_FINISH", "FINISH", "CANCEL", "UNPRESERVE"),
)
_WORDS: Final = ("subsystem", "event", "kind", "name")
_UNDO_SHOWN: Final = 3  # failures while rolling back; the document has them all
_DEVICES_SHOWN: Final = 3
_STANDS_OUT: Final = 0.1  # of what all devices cost
_DIFFERING_SHOWN: Final = 20  # callbacks
_VERDICTS: Final = {"slower": "bold red", "faster": "bold green", "no difference": "dim"}
_NAME_WIDTH: Final = 20  # a longer name may be cut before a column is left out


def duration(ns: float) -> str:
    """Return *ns* as a person reads it."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}" if ns < 999.5 * size else f"{ns / size:.0f} {unit}"
    return f"{ns:.0f} ns"


def size(nbytes: float) -> str:
    """Return *nbytes* as a person reads it."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def show(console: Console, document: Mapping[str, Any], kernel_boot_ns: int = 0) -> None:
    """Print the ``luo-run/1`` *document*.

    Args:
        console: where to.
        document: the document.
        kernel_boot_ns: a modelled boot of the kernel, drawn as a bar of its own; 0 for none.
    """
    parts: list[RenderableType] = [_headline(document), _states(document)]
    if document["runs"]:
        parts += [Text(), _timeline(document, kernel_boot_ns, console.width)]
    if document.get("dry_reboot_ns"):
        spent = (f"{name.upper()} {duration(ns)}" for name, ns in document["dry_reboot_ns"].items())
        parts += [Text(), Text("dry reboot, no jump: " + ", ".join(spent))]
    if document["callbacks"]:
        parts += [Text(), _callbacks(document, console.width)]
    parts += _dearest_devices(document)
    if document["runs"]:
        parts += [Text(), _image(document)]
    if document["budgets"]:
        parts += [Text(), _verdict(document["budgets"])]
    if document["error"]:
        parts += [Text(), _error(document["error"])]
    console.print(Group(*parts))


def show_comparison(
    console: Console, document: Mapping[str, Any], everything: bool = False
) -> None:
    """Print the ``luo-compare/1`` *document*.

    Args:
        console: where to.
        document: the document.
        everything: callbacks without a difference, too.
    """
    rows = document["rows"]
    shown = [row for row in rows if everything or row["kind"] == "phase" or _differs(row)]
    if not everything:
        shown = shown[: len(PHASES) + _DIFFERING_SHOWN]
    left = Counter(row["verdict"] for row in rows if row not in shown)
    taken = (
        f"{letter.upper()}: {document['runs'][letter]:,} updates"
        + (f" in {count:,} documents" if count > 1 else "")
        for letter, count in document["documents"].items()
    )
    parts: list[RenderableType] = [Text(f"{', '.join(taken)}; medians, and how B differs from A")]
    for row in document["differences"]:
        parts.append(Text(f"not the same {row['what']}: A {row['a']}, B {row['b']}", "yellow"))
    parts += [Text(), _comparison(shown, document["confidence"], console.width)]
    if left:
        what = ", ".join(f"{verdict} ({count:,})" for verdict, count in left.items())
        parts.append(Text(f"callbacks left out: {what}; see --all", "dim"))
    parts += [Text(f"warning: {warning}", "yellow") for warning in document["warnings"]]
    if document["fail_slower"] is not None:
        parts += [Text(), _judgement(document)]
    console.print(Group(*parts))


def _differs(row: Mapping[str, Any]) -> bool:
    return row["verdict"] not in ("no difference", "too few runs")


def _comparison(rows: Sequence[Mapping[str, Any]], confidence: float, screen: int) -> Table:
    columns = ["", "A", "B", "change", f"{confidence:.0%} interval", "verdict"]
    cells = [
        [
            row["name"],
            *("" if row[side] is None else duration(row[side]) for side in ("a_ns", "b_ns")),
            "" if row["ratio"] is None else _change(row["ratio"]),
            "" if row["low"] is None else f"{_change(row['low'])} to {_change(row['high'])}",
            row["verdict"],
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    # Figures are never cut: on a narrow screen there are fewer.
    for kept in (range(6), (0, 1, 2, 3, 5), (0, 3, 5)):
        left = screen - sum(widths[place] + 2 for place in kept[1:]) - 1
        if left >= min(widths[0], _NAME_WIDTH):
            break
    table = Table(box=None, header_style="dim", padding=(0, 1), pad_edge=False)
    for place in kept:
        table.add_column(
            columns[place],
            justify="left" if place in (0, 5) else "right",
            no_wrap=True,
            overflow="ellipsis",
            max_width=max(8, left) if place == 0 else None,
        )
    for row in cells:
        style = _VERDICTS.get(row[5], "")
        table.add_row(*(Text(row[place], style if place == 5 else "") for place in kept))
    return table


def _change(ratio: float) -> str:
    """Return *ratio* as a percentage, or as a factor where that says more."""
    if not 0.1 <= ratio < 10:
        return f"x{ratio:.3g}"
    return f"{100 * (ratio - 1):+.1f} %"


def _judgement(document: Mapping[str, Any]) -> Text:
    limit = f"{100 * document['fail_slower']:g} %"
    if not document["failed"]:
        return Text(f"nothing is more than {limit} slower with confidence", "green")
    rows = {row["name"]: row for row in document["rows"]}
    text = Text(f"more than {limit} slower:", "bold red")
    for name in document["failed"]:
        text.append(f"\n  {name}: {_change(rows[name]['ratio'])}", "red")
    return text


def _headline(document: Mapping[str, Any]) -> Text:
    source, devices = document["source"], document["devices"]
    where = source.get("path") or source.get("kind", "")
    text = Text.assemble((f"{devices['total']:,} devices", "bold"), f" from {where}")
    if "preserved" in devices:
        text.append(
            f"; {devices['requested']:,} requested, {devices['preserved']:,} preserved, "
            f"{devices['reclaimed']:,} reclaimed"
        )
    if len(document["runs"]) > 1:
        text.append(f"; {len(document['runs'])} updates, medians")
    return text


def _states(document: Mapping[str, Any]) -> Text:
    text = Text("states  ", style="dim")
    for place, state in enumerate(document["states"]):
        text.append(" → " if place else "", "dim")
        text.append(state, "bold green" if state == "normal" else "bold yellow")
    return text


def _timeline(document: Mapping[str, Any], kernel_boot_ns: int, screen: int) -> Table:
    spent = document["phases_ns"]
    phases = [(name, spent[name]) for name in _PHASES]
    if kernel_boot_ns:
        phases.insert(3, (_MODELLED, kernel_boot_ns))
    total = sum(ns for _, ns in phases) or 1
    width = max(10, min(64, screen - 34))
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, width=width)
    table.add_column(justify="right", no_wrap=True)
    at = 0.0
    for name, ns in phases:
        start, stop = at / total * width, (at + ns) / total * width
        at += ns
        modelled = name == _MODELLED
        style = "blue" if modelled else "red" if name in _BLACKOUT else "green"
        bar = Text(" " * int(start))
        bar.append(("░" if modelled else "█") * max(1, round(stop) - int(start)), style)
        bar.truncate(width)
        label = Text(_LABELS.get(name, name), style if name in _BLACKOUT or modelled else "")
        if modelled:
            label.append(" (modelled)", "dim")
        table.add_row(label, bar, duration(ns))
    blackout = spent["blackout"]
    table.add_row(
        Text("LUO blackout", "bold red"),
        Text("kernel boot not included", "dim"),
        Text(duration(blackout), "bold red"),
    )
    if kernel_boot_ns:
        table.add_row(
            Text("with kernel boot", "bold"),
            Text("modelled", "dim"),
            Text(duration(blackout + kernel_boot_ns), "bold"),
        )
    return table


def _callbacks(document: Mapping[str, Any], screen: int) -> Table:
    """One row a subsystem, event and name, the dearest first within its subsystem."""
    rows = document["callbacks"]
    cost: dict[str, int] = {}
    for row in rows:
        cost[row["subsystem"]] = cost.get(row["subsystem"], 0) + row["total_ns"]
    rows = sorted(
        rows,
        key=lambda row: (
            -cost[row["subsystem"]],
            row["subsystem"],
            _EVENTS.index(row["event"]) if row["event"] in _EVENTS else len(_EVENTS),
            -row["total_ns"],
        ),
    )
    cells = [_cells(row, before) for row, before in zip(rows, [None, *rows], strict=False)]
    # Figures are never cut: a name gets what they leave, and on a narrow screen there are fewer.
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in cells[0]}
    columns, left = list(widths), 0
    for spared in ((), ("devices", "p50", "p99"), ("devices", "p50", "p99", "kind", "max")):
        columns = [name for name in widths if name not in spared]
        left = screen + widths["name"] - sum(widths[name] + 2 for name in columns) + 1
        if left >= min(widths["name"], _NAME_WIDTH):
            break
    table = Table(
        title="callbacks",
        title_justify="left",
        title_style="bold",
        box=None,
        header_style="dim",
        padding=(0, 1),
        pad_edge=False,
    )
    for name in columns:
        figure = name not in _WORDS
        table.add_column(
            name,
            justify="right" if figure else "left",
            no_wrap=True,
            overflow="ellipsis",
            max_width=max(8, left) if name == "name" else None,
        )
    for row in cells:
        style = {"subsystem": "bold", "event": "red" if row["event"] in BLACKOUT_EVENTS else ""}
        table.add_row(*(Text(row[name], style.get(name, "")) for name in columns))
    return table


def _cells(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, str]:
    """Return what the table shows of *row*, by column; *before* is the row above it."""
    again = before is not None and before["subsystem"] == row["subsystem"]
    return {
        "subsystem": "" if again else row["subsystem"],
        "event": row["event"],
        "kind": row["kind"],
        "name": row["name"],
        "calls": f"{row['calls']:,}",
        "devices": f"{row['devices']:,}" if row.get("devices") else "",
        **{name: duration(row[f"{name}_ns"]) for name in ("total", "p50", "p99", "max")},
    }


def _dearest_devices(document: Mapping[str, Any]) -> list[RenderableType]:
    """Name the devices that stand out, if any do."""
    everything = document["subtrees"][0]["total_ns"] if document["subtrees"] else 0
    rows = [
        row
        for row in document["worst_devices"][:_DEVICES_SHOWN]
        if row["total_ns"] > _STANDS_OUT * everything
    ]
    lines = (f"{row['path']} ({row['driver']}): {duration(row['total_ns'])}" for row in rows)
    return [Text("\n".join(["", "dearest devices, all updates together", *lines]))] if rows else []


def _image(document: Mapping[str, Any]) -> Text:
    image, devices = document["image"], document["devices"]
    pages = image["preserved_pages"]
    lines = [
        f"handed over: {pages:,} pages ({size(pages * image.get('page_bytes', 4096))}); "
        f"root tree {size(image['root_fdt_bytes'])}, map {size(image['map_bytes'])}, "
        f"device records {size(image['device_tree_bytes'])}",
        f"state: {size(devices['state_bytes'])} saved by callbacks, "
        f"{size(devices['verified_bytes'])} verified in the new kernel ({document['successor']})",
    ]
    for name in ("records_without_device", "devices_without_record"):
        if devices.get(name):
            lines.append(f"{name.replace('_', ' ')}: {devices[name]:,}")
    return Text("\n".join(lines))


def _verdict(verdict: Mapping[str, Any]) -> Text:
    """Say which budgets were met, and who is to blame for those that were not."""
    text = Text(f"budgets, by the 95th percentile of {verdict['runs']:,} updates:", "bold")
    for one in verdict["budgets"]:
        word, style = ("met", "green") if one["met"] else ("over", "bold red")
        spent, limit = duration(one["p95_ns"]), duration(one["limit_ns"])
        text.append(f"\n  {word:<4} ", style)
        text.append(f"{one['name']}: {spent} of {limit}", "" if one["met"] else "red")
        for part in one["worst"]:
            if part["name"] != one["name"]:
                text.append(f"\n         {part['name']}: {duration(part['p95_ns'])}")
            for device in part["devices"]:
                text.append(f"\n           {device['path']}: {duration(device['ns'])}")
    return text


def _error(error: Mapping[str, Any]) -> Text:
    text = Text.assemble(("live update failed: ", "bold red"), error["message"])
    if error.get("file"):
        text.append(f"\n  at {error['file']}:{error['line']}", "bold")
    undo = error["undo_errors"]
    if error["rolled_back"]:
        text.append("\n  everything is as it was before PREPARE")
    elif undo:
        text.append("\n  rolling back failed in part:")
    for problem in undo[:_UNDO_SHOWN]:
        text.append(f"\n    {problem}")
    if len(undo) > _UNDO_SHOWN:
        text.append(f"\n    and {len(undo) - _UNDO_SHOWN:,} more")
    return text
