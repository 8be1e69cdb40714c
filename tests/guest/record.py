"""Writes the result of ``make kernel-test`` into docs/real-kernel.md, between its marks.

Usage: record.py RESULTS.xml, which is what pytest's --junitxml gave.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import machine

from luo.image.boot import QEMU

BEGIN = "<!-- make kernel-test writes from here -->\n"
END = "<!-- to here -->\n"
PAGE = machine.ROOT / "docs/real-kernel.md"


def outcome(case: ElementTree.Element) -> str:
    """``passed``, ``failed`` or ``skipped``."""
    kinds = {child.tag for child in case}
    if kinds & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in kinds else "passed"


def table(results: Path) -> str:
    """The section."""
    suite = ElementTree.parse(results).getroot()
    cases = list(suite.iter("testcase"))
    counts: dict[str, Counter[str]] = {}
    seconds: Counter[str] = Counter()
    for case in cases:
        name = case.get("name", "").split("[")[0].removeprefix("test_").replace("_", " ")
        counts.setdefault(name, Counter())[outcome(case)] += 1
        seconds[name] += float(case.get("time", 0))
    total = sum(counts.values(), Counter())
    build = machine.Build.find()
    version = "?" if build is None else (build.image.parent / "version").read_text().strip()
    qemu = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    now = datetime.datetime.now(datetime.UTC)
    said = ", ".join(f"{total[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    lines = [
        f"{now:%Y-%m-%d %H:%M} UTC: **{said}**, in {sum(seconds.values()):.0f} s. Linux of Debian's"
        f" {version}; {qemu.splitlines()[0]}.",
        "",
        "| what | passed | failed | skipped | s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, count in counts.items():
        numbers = " | ".join(str(count[kind]) for kind in ("passed", "failed", "skipped"))
        lines.append(f"| {name} | {numbers} | {seconds[name]:.0f} |")
    return "\n".join(lines) + "\n"


def main(results: Path) -> None:
    """Replace what stands between the marks."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        sys.exit(f"{PAGE}: has no marks")
    PAGE.write_text(before + BEGIN + table(results) + END + after)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
