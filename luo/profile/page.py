"""What a live update cost, as one HTML page that loads nothing.

Cells carry the exact figure of the ``luo-run/1`` document in ``data-ns`` or ``data-value``; what a
person reads is rounded. Jinja escapes whatever the document says, :func:`_json` does in scripts,
and the content security policy of the page lets no script run but those that it came with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from luo._kho import BLACKOUT_EVENTS
from luo.profile.figures import Section, Table, capped, columns, sections, words
from luo.profile.screen import duration, size
from luo.report import p95

__all__ = ["page"]

_SCHEMA: Final = "luo-run/1"
_ERROR: Final = dict.fromkeys(("errno_name", "file", "line", "rolled_back"))
_TROUBLE: Final = ("event", "kind", "name", "device", "message")
#: What reading a document may come to, in which something is not what it should be.
_NOT_WHOLE: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_NOTHING: Final = "–"  # noqa: RUF001  what a table shows where there is no value


def page(
    document: Mapping[str, Any],
    other: Mapping[str, Any] | None = None,
    *,
    names: tuple[str, str] = ("now", "before"),
) -> str:
    """Return the page of *document*, a ``luo-run/1`` document.

    Args:
        document: what ``luo run --json`` wrote.
        other: an earlier one, to compare with.
        names: what the page calls the two.

    Raises:
        ValueError: *document* or *other* is no ``luo-run/1`` document.
    """
    for name, given in zip(names, (document, other), strict=True):
        if given is not None and given.get("schema") != _SCHEMA:
            raise ValueError(f"{name}: no {_SCHEMA} document")
    try:
        return _render(document, sections(document, other, names))
    except (*_NOT_WHOLE, RecursionError) as error:
        why = words(repr(error))
        raise ValueError(f"{names[0]}: this {_SCHEMA} document is not whole: {why}") from error


def _render(document: Mapping[str, Any], shown: list[Section]) -> str:
    figures = {
        part.name: {"data": part.data, "layout": part.layout, "labels": part.labels}
        for section in shown
        for part in section.parts
        if part.data
    }
    here = files("luo.profile")
    style, script = (here.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    plotly = get_plotlyjs().replace("</script", "<\\/script").replace("\r\n", "\n")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"breaks": _breaks, "cell": _cell, "exact": _exact, "words": words}
    policy = [
        "default-src 'none'",
        f"script-src {_hash(plotly)} {_hash(script)}",
        f"style-src-elem {_hash(style)} {_hash('')}",  # plotly makes an empty style sheet
        "style-src-attr 'unsafe-inline'",  # and sets styles of elements
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    text = environment.from_string(here.joinpath("page.html").read_text("utf-8")).render(
        document=document,
        title=words(f"Live update of {_where(document)}"),
        facts=_facts(document),
        headline=_headline(document),
        error=document["error"] and _ERROR | document["error"],
        budgets=_budgets(document),
        troubles=_troubles(document),
        states=_states(document),
        about=_about(document),
        sections=shown,
        figures=_json(figures),
        policy=Markup("; ".join(policy)),
        style=Markup(style),
        script=Markup(script),
        plotly=Markup(plotly),
        # plotly adds a style sheet for maps, unless an element of this name is there
        present=re.findall(r'getElementById\("([0-9a-f]{64})"\)', plotly),
    )
    # A name that is no UTF-8 has lone surrogates.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ---- what is on it besides figures ----


def _where(document: Mapping[str, Any]) -> str:
    source = document["source"]
    return str(source.get("path") or source.get("kind") or "a host")


def _facts(document: Mapping[str, Any]) -> list[str]:
    machine, runs = document["machine"], document["runs"]
    said = [f"{document['devices']['total']:,} devices", document["kho_abi"]]
    if len(runs) > 1:
        said.append(f"{len(runs):,} updates in a row")
    if document["behaviour"] != "intended":
        said.append(f"behaviour {document['behaviour']}")
    if document.get("clock") == "virtual":
        said.append("virtual clock")
    return [*said, f"{machine['cpu']}, {machine['cores']} cores", f"luo {document['luo_version']}"]


def _headline(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures that a reader wants first: key, title, value, kind, and a remark."""
    runs, devices, image = document["runs"], document["devices"], document["image"]
    cards: list[dict[str, Any]] = []

    def card(key: str, title: str, value: float, kind: str, said: str) -> None:
        cards.append({"key": key, "title": title, "value": value, "kind": kind, "said": said})

    for phase, said in (("blackout", "devices stand still"), ("prepare", "while guests run")):
        if len(runs) > 1:
            taken = [run["phases_ns"].get(phase, 0) for run in runs]
            said = f"median; p95 {duration(p95(taken))}, slowest {duration(max(taken))}"
        if runs:
            card(phase, phase.capitalize(), document["phases_ns"][phase], "ns", said)
    for name, ns in (document["dry_reboot_ns"] or {}).items():
        card(f"dry-{name}", f"Dry {name}", ns, "ns", "without the jump")
    dear = [
        row
        for row in document["callbacks"]
        if row.get("blackout_share", row["event"] in BLACKOUT_EVENTS or None) is not None
    ]
    if runs and dear:
        worst = max(dear, key=lambda row: row["total_ns"])
        said = f"{worst['name']} {worst['event']}"
        if "blackout_share" in worst:
            said += f"; {100 * worst['blackout_share']:.0f} % of blackout"
        card("dearest", "Dearest in blackout", worst["total_ns"] / len(runs), "ns", said)
    if "preserved" in devices:
        said = f"of {devices['total']:,}; {devices['requested']:,} were requested"
        card("preserved", "Devices preserved", devices["preserved"], "count", said)
        lost = devices["preserved"] - devices["reclaimed"]
        said = f"{lost:,} were not" if lost else "all that were preserved"
        card("reclaimed", "Devices reclaimed", devices["reclaimed"], "count", said)
    if "preserved_pages" in image:
        nbytes = image["preserved_pages"] * image.get("page_bytes", 4096)
        card("memory", "Memory kept", nbytes, "bytes", f"{image['preserved_pages']:,} pages")
    if "state_bytes" in devices:
        said = f"{size(devices['verified_bytes'])} equal in the new kernel"
        card("state", "State of callbacks", devices["state_bytes"], "bytes", said)
    return cards


def _budgets(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what became of the budgets: whether they were met, a title, tables."""
    verdict = document.get("budgets")
    if not verdict:
        return None
    judged = verdict["budgets"]
    over = sum(not one["met"] for one in judged)
    heads = [*columns("text", "budget", "verdict"), *columns("ns", "p95", "limit")]
    rows = [
        (one["name"], "met" if one["met"] else "over", one["p95_ns"], one["limit_ns"])
        for one in judged
    ]
    tables = [capped(f"By the 95th percentile of {verdict['runs']:,} updates", heads, rows)]
    dear = [
        row
        for one in judged
        for part in one["worst"]
        for row in (
            (one["name"], part["name"], None, part["p95_ns"]),
            *((one["name"], part["name"], of["path"], of["ns"]) for of in part["devices"]),
        )
    ]
    if dear:
        heads = [*columns("text", "budget", "callback", "device"), *columns("ns", "takes")]
        tables.append(capped("Worst offenders", heads, dear))
    title = f"Over budget: {over:,} of {len(judged):,}" if over else "Every budget is met"
    return {"met": bool(verdict["met"]), "title": title, "tables": tables}


def _states(document: Mapping[str, Any]) -> str:
    """Say the states passed; a round that comes again and again is said once."""
    states = [str(state) for state in document["states"]]
    rounds = len(states) // 3
    if rounds > 1 and states == states[:1] + states[1:4] * rounds:
        return words(" → ".join(states[:4])) + f", {rounds:,} times"
    return words(" → ".join(states))


def _about(document: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, Any]] = [("states", _states(document))]
    for name in ("machine", "source", "settings", "image"):
        rows += [(f"{name}: {key}", value) for key, value in document[name].items()]
    for name in ("kho_abi", "behaviour", "quirks", "successor", "clock", "luo_version"):
        rows.append((name, document.get(name)))
    said = [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in rows
        if value not in (None, "", [])
    ]
    return capped("What was asked for, and where it ran", columns("text", "what", "value"), said)


def _troubles(document: Mapping[str, Any]) -> list[Table]:
    """Return what went wrong besides the error itself."""
    undo = (document["error"] or {}).get("undo_errors") or []
    tables = []
    for caption, rows in (
        ("Rolling back failed in part", [{"message": text} for text in undo]),
        ("Callbacks that failed", document["failures"]),
        ("Memory that devices may have written, and nobody kept", document["dma"]),
    ):
        if rows:
            keys = [key for key in _TROUBLE if key in rows[0]] or list(rows[0])
            cells = [tuple(str(row.get(key, "")) for key in keys) for row in rows]
            tables.append(capped(caption, columns("text", *keys), cells))
    return tables


# ---- HTML ----


def _cell(value: Any, kind: str) -> str:
    """Return *value* as a person reads it."""
    if value is None:
        return _NOTHING
    if kind == "ns":
        return duration(value)
    if kind == "bytes":
        return size(value)
    if kind == "count":
        return f"{value:,}"
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind == "change":
        return f"{100 * value:+.1f} %".replace("-", "−")  # noqa: RUF001  as wide as the plus
    return words(value)


def _exact(value: float | None, kind: str) -> str:
    """Return *value* in full, for programs and for sorting."""
    if value is None:
        return ""
    return str(round(value)) if kind == "ns" else repr(value)


def _breaks(text: str) -> Markup:
    """Return *text*, escaped, with places in paths where a line may end."""
    return escape(text).replace("/", Markup("/<wbr>"))


def _json(value: Any) -> Markup:
    """Return *value* for a script element, which ends at the first ``</script`` in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _hash(text: str) -> str:
    """Return the source expression by which a content security policy allows *text*."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
