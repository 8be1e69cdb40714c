"""``luo image verify --for KERNEL``: what that kernel would do with an image."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from luo.cli.errors import FAILED
from luo.cli.image_text import new_table, printable
from luo.image import Image
from luo.image.rules import Outcome
from luo.image.verdict import KERNELS, Target, Verdict, judge

__all__ = ["show_verdict", "verdict_options"]

_ROWS_OF_A_RULE = 5

_WOULD = {
    Outcome.TAKES: "takes it",
    Outcome.COLD: "refuses it and boots cold",
    Outcome.PANICS: "panics",
    Outcome.LATER: "comes up and fails later",
    Outcome.UNDEFINED: "does one of these",
}


def verdict_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options ``--for`` and ``--target`` of a command, as *kernel* and *pairs*."""
    command = click.option(
        "--target",
        "pairs",
        multiple=True,
        metavar="NAME=VALUE,...",
        help="With --for: what the bytes do not tell of the kernel: huge-pages=no, kho=off,"
        " liveupdate=off, debug-vm=yes, memory=512MiB, page-size=4K, flb=NAME, handler=NAME,"
        " reserve-mem=SIZE:ALIGN:NAME, kernel=, initrd= or device-tree=START+SIZE, dtb=FILE.",
    )(command)
    return click.option(
        "--for",
        "kernel",
        type=click.Choice(KERNELS),
        help="Instead: would this kernel take it, and what would it do?",
    )(command)


def show_verdict(path: Path, found: Image, pairs: Sequence[str], *, as_json: bool) -> None:
    """Judge an image, and leave with exit status 1 unless the kernel takes it.

    Raises:
        ValueError: *pairs* name no target.
        OSError: the file of ``dtb=`` cannot be read.
    """
    verdict = judge(found, _target(pairs))
    if as_json:
        click.echo(json.dumps({"for": KERNELS[0], **verdict.document()}, indent=1))
    else:
        _show(path, verdict)
    if verdict.problems:
        raise SystemExit(FAILED)


def _target(pairs: Sequence[str]) -> Target:
    each = [pair for text in pairs for pair in text.split(",")]
    files = [pair.partition("=")[2] for pair in each if pair.startswith("dtb=")]
    target = Target.parse(pair for pair in each if not pair.startswith("dtb="))
    return replace(target, device_tree=Path(files[-1]).read_bytes()) if files else target


def _show(path: Path, verdict: Verdict) -> None:
    console = Console(highlight=False)
    said = _WOULD[verdict.outcome]
    if verdict.outcome in (Outcome.LATER, Outcome.UNDEFINED):
        said += f": {', '.join(verdict.seen)}"
    console.print(Text(printable(f"{path}: {KERNELS[0]} {said}")))
    if verdict.problems:
        table = new_table("when", "rule", "what", "then")
        for column in table.columns:
            column.overflow = "fold"
        listed: dict[str, int] = {}
        for problem in verdict.problems:
            rule = problem.rule
            listed[rule.id] = listed.get(rule.id, 0) + problem.count
            if listed[rule.id] > _ROWS_OF_A_RULE:
                continue
            then = rule.outcome.value if rule.outcome is Outcome.UNDEFINED else rule.seen[0]
            what = Text(printable(str(problem)[:200]))
            table.add_row(rule.stage.label, rule.id, what, then)
        console.print()
        console.print(table)
        console.print()
        for rule in dict.fromkeys(problem.rule for problem in verdict.problems):
            shown = "; ".join(part for part in (rule.kernel, rule.spec) if part)
            console.print(Text(f"{rule.id}: {rule.why}{f' ({shown})' if shown else ''}"))
            if listed[rule.id] > _ROWS_OF_A_RULE:
                more = listed[rule.id] - _ROWS_OF_A_RULE
                console.print(Text(f"{rule.id}: {more:,} more; --json lists them", "dim"))
    for note in verdict.notes:
        console.print(Text(printable(f"note: {note.rule.id}: {str(note)[:200]}")))
