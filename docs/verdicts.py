"""The tables of ``verdicts.md``: rules from the code, and what a real kernel did from its test."""

import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from guest.verdicts import CASES  # noqa: E402

from luo.image.rules import RULES, Outcome, Rule, Stage  # noqa: E402

PAGE = Path(__file__).with_name("verdicts.md")
RECORD = ROOT / "tests/guest/verdicts.json"


def tables() -> str:
    """Return what stands between the marks of the page."""
    record = json.loads(RECORD.read_text())
    tried: dict[str, Counter[str]] = {}
    for case in CASES.values():
        if case.rule is not None:
            tried.setdefault(case.rule, Counter())[record["seen"][case.name]] += 1
    confirmed = sum(rule in tried for rule in RULES)
    lines = [
        f"{len(RULES)} rules, of which {confirmed} were confirmed by Linux {record['kernel']} on"
        f" {record['date']} with {len(CASES)} handovers, {len(CASES) - taken(record)} of them not"
        " taken.",
        "",
    ]
    for stage in Stage:
        rules = [rule for rule in RULES.values() if rule.stage is stage]
        lines += [f"### {stage.label}", "", "| rule | then | why | shown by | tried |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [row(rule, tried.get(rule.id)) for rule in rules]
        lines.append("")
    return "\n".join(lines)


def taken(record: dict[str, dict[str, str]]) -> int:
    """How many of the handovers the kernel took."""
    return sum(what == Outcome.TAKES.value for what in record["seen"].values())


def row(rule: Rule, tried: Counter[str] | None) -> str:
    """Return a rule as a row of a table."""
    then = {
        Outcome.UNDEFINED: "undefined",
        Outcome.LATER: ", ".join(rule.seen),
    }.get(rule.outcome, rule.outcome.value)
    seen = "no" if tried is None else ", ".join(f"{n} {what}" for what, n in sorted(tried.items()))
    shown = ", ".join(f"`{part}`" for part in rule.kernel.split("; ") if part)
    sources = "; ".join(part for part in (shown, rule.spec) if part)
    return f"| `{rule.id}` | {then} | {rule.why} | {sources} | {seen} |"


def filled(text: str) -> str:
    """Return a page with its tables as they are now."""
    before, rest = text.split("<!-- rules -->\n", 1)
    _, after = rest.split("<!-- end -->", 1)
    return f"{before}<!-- rules -->\n\n{tables()}\n<!-- end -->{after}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
