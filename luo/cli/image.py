"""``luo image``: look into a handover on disk, check it, compare it, convert it, make one.

Exit status: 0 done, or nothing found; 1 something found (verify, diff); 2 wrong usage or input.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luo import abi
from luo.cli.errors import FAILED, Wrong, wrong_input
from luo.cli.image_boot import boot
from luo.errors import FdtError
from luo.fdt import Fdt
from luo.image import Image, Subtree, Violation
from luo.image.convert import convert as convert_image
from luo.image.diff import compare
from luo.image.document import describe, map_summary, subtree_bytes, violation_rows
from luo.image.encode import encode as encode_image

__all__ = ["image"]

_SUBTREES_SHOWN = 16
_NODES_SHOWN = 4

_abi_option = click.option(
    "--abi",
    "name",
    type=click.Choice(list(abi.GENERATIONS)),
    help="Read it as this generation's, whatever it says itself.",
)


def _path(name: str) -> Callable[[Any], Any]:
    return click.argument(name, type=click.Path(path_type=Path))


@click.group()
def image() -> None:
    """Handovers on disk: image files, or directories with a dump of a machine's memory."""


@image.command()
@_path("path")
@click.option("--json", "as_json", is_flag=True, help="All of it as JSON, which 'encode' takes.")
@click.option("--dts", is_flag=True, help="The root tree, and blobs that are trees, as text.")
@_abi_option
def inspect(path: Path, as_json: bool, dts: bool, name: str | None) -> None:
    """Show what PATH holds: root tree, subtrees, preserved map, scratch."""
    if as_json and dts:
        raise click.UsageError("--json and --dts: choose one")
    with wrong_input():
        found = Image.load(path, abi=name)
        if as_json:
            click.echo(json.dumps(describe(found), indent=1))
        elif dts:
            click.echo(_dts(found), nl=False)
        else:
            _show(found)


@image.command()
@_path("path")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_abi_option
def verify(path: Path, as_json: bool, name: str | None) -> None:
    """Check PATH against every rule of its format; exit status 1 if it breaks one."""
    with wrong_input():
        found = Image.load(path, abi=name)
        violations = found.verify()
        warnings = found.survey.warnings
    if as_json:
        document = {
            "abi": found.abi,
            "violations": violation_rows(violations),
            "warnings": violation_rows(warnings),
        }
        click.echo(json.dumps(document, indent=1))
    else:
        for violation in violations:
            click.echo(_line(violation))
        for warning in warnings:
            click.echo(f"warning: {_line(warning)}")
        count = sum(violation.count for violation in violations)
        blocks = len(found.survey.phys)
        click.echo(
            f"{path}: {count or 'no'} violation{'' if count == 1 else 's'} of {found.abi}"
            f" in {blocks:,} preserved blocks, {len(found.survey.subtrees)} subtrees"
        )
    if violations:
        raise SystemExit(FAILED)


@image.command()
@_path("a")
@_path("b")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def diff(a: Path, b: Path, as_json: bool) -> None:
    """Show what A and B preserve differently; exit status 1 if anything."""
    with wrong_input():
        differences = compare(Image.load(a), Image.load(b))
    if as_json:
        rows = [{"part": d.part, "what": d.what, "a": d.a, "b": d.b} for d in differences]
        click.echo(json.dumps(rows, indent=1))
    else:
        for d in differences:
            sides = (("-", d.a), ("+", d.b))
            if d.what in ("only in A", "only in B", "differ"):
                start, nbytes = d.a or d.b
                click.echo(f"{d.part}: {d.what}: {start} +{nbytes:#x}")
                continue
            for sign, value in sides:
                if value is not None:
                    text = json.dumps(value)
                    text = text if len(text) < 200 else f"{text[:200]}…"
                    click.echo(_printable(f"{sign} {d.part}: {d.what}: {text}"))
    if differences:
        raise SystemExit(FAILED)


@image.command()
@click.option(
    "--to", "target", type=click.Choice(list(abi.GENERATIONS)), required=True, help="Generation."
)
@click.option("--drop", multiple=True, metavar="NAME", help="Leave this subtree out.")
@_path("in_path")
@_path("out_path")
@_abi_option
def convert(
    target: str, drop: tuple[str, ...], in_path: Path, out_path: Path, name: str | None
) -> None:
    """Write IN_PATH as an image of another generation, with the same pages preserved."""
    with wrong_input():
        result = convert_image(Image.load(in_path, abi=name), target, drop=drop)
        nbytes = result.save(out_path)
    click.echo(f"{out_path}: {result.abi}, {_size(nbytes)}")


@image.command()
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where the pages are that do not stand in IN_JSON. [default: what it names]",
)
@_path("in_json")
@_path("out_path")
def encode(source: Path | None, in_json: Path, out_path: Path) -> None:
    """Write the image that IN_JSON describes, an edited 'inspect --json'; right or wrong."""
    with wrong_input():
        try:
            document = json.loads(in_json.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{in_json}: {error}") from error
        pages = None if source is None else Image.load(source)
        nbytes = encode_image(document, source=pages).save(out_path)
    click.echo(f"{out_path}: {document['abi']}, {_size(nbytes)}")


image.add_command(boot)


# ---- text ----


def _printable(text: str) -> str:
    """Escape what would move the cursor: names come from outside."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _line(violation: Violation) -> str:
    text = str(violation).encode(errors="backslashreplace").decode()
    return _printable(text if len(text) < 400 else text[:400] + "…")


def _size(nbytes: int) -> str:
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << shift:
            value = nbytes / (1 << shift)
            return f"{value:,.0f} {unit}" if value == int(value) else f"{value:,.1f} {unit}"
    return f"{nbytes:,} B"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _summary(subtree: Subtree) -> str:
    """Say in a few words what a subtree holds."""
    found = subtree.decoded
    if found is None:
        return "" if subtree.format is None else "cannot be read"
    if "previous_release" in found:
        return f"from release {found['previous_release']}, handover {found['kexec_count']}"
    if "regions" in found:
        return ", ".join(
            f"{r['name']} {_size(r['size'])} at {r['start']:#x}"
            for r in found["regions"]
            if r["start"] is not None and r["size"] is not None
        )
    if "sessions" in found:
        files = sum(len(session["files"]) for session in found["sessions"])
        text = f"{_count(len(found['sessions']), 'session')}, {_count(files, 'file')}"
        held = sum(
            record["memfd"]["size"]
            for session in found["sessions"]
            for record in session["files"]
            if record.get("memfd")
        )
        flbs = len((found["flbs"] or {}).get("flbs", ()))
        text += f" ({_size(held)})" if held else ""
        return f"{text}, {_count(flbs, 'FLB')}, update {found['liveupdate_num']}"
    if "nr_folios" in found:
        return f"{found['nr_folios']} folios, csum {found['csum']}"
    if "devices" in found or "subsystems" in found:
        devices = found.get("devices") or {}
        number = len(devices.get("device_records", ()))
        return (
            f"version {'.'.join(map(str, found.get('version', '?')))}, "
            f"{_count(number, 'device')}, {_count(len(found.get('subsystems', ())), 'subsystem')}"
        )
    if "tree" in found:
        return f"a tree of {_count(len(found['tree']), 'node')}"
    if "nodes" in found:
        return f"{_count(found['nodes'], 'node')}"
    return ""


def _show(found: Image) -> None:
    survey, ram = found.survey, found.ram
    console = Console(highlight=False)
    nodes = sorted({node for _, _, node in ram.ranges})
    memory = sum(nbytes for _, nbytes, _ in ram.ranges)
    console.print(
        Text(
            f"{found.abi}, pages of {_size(found.page_size)}; memory {_size(memory)} on "
            f"{_count(len(nodes), 'node')}; {_size(found.nbytes)} kept in "
            f"{_count(len(found.extents), 'extent')}"
        )
    )
    root = "cannot be read" if survey.fdt is None else f"{survey.fdt.totalsize} bytes"
    handover = found.handover
    console.print(
        Text(
            _printable(
                f"root tree at {handover.fdt_phys:#x}, {root}, compatible "
                f"{', '.join(survey.compatible) or 'with nothing'}; map at {survey.map_phys:#x}"
            )
        )
    )
    console.print()
    table = _table("subtree", "phys", "bytes", "holds", right=("phys", "bytes"))
    for subtree in survey.subtrees[:_SUBTREES_SHOWN]:
        table.add_row(
            Text(_printable(subtree.name[:40])),
            "" if subtree.phys is None else f"{subtree.phys:#x}",
            "" if subtree.nbytes is None else f"{subtree.nbytes:,}",
            Text(_printable(_summary(subtree)[:200])),
        )
    if len(survey.subtrees) > _SUBTREES_SHOWN:
        table.add_row(f"… {len(survey.subtrees) - _SUBTREES_SHOWN:,} more")
    console.print(table)
    console.print()

    summary = map_summary(survey)
    shown = nodes if 1 < len(nodes) <= _NODES_SHOWN else []
    columns = ("order", "block", "blocks", *(f"node {node}" for node in shown), "bytes")
    table = _table(*columns, right=columns)
    for order, row in summary["by_order"].items():
        nbytes = found.page_size << int(order)
        table.add_row(
            order,
            _size(nbytes),
            f"{row['blocks']:,}",
            *(f"{row['blocks_by_node'][str(node)]:,}" for node in shown),
            _size(nbytes * row["blocks"]),
        )
    table.add_section()
    total = [
        sum(row["blocks_by_node"][str(node)] for row in summary["by_order"].values())
        for node in shown
    ]
    table.add_row(
        "all",
        "",
        f"{summary['blocks']:,}",
        *(f"{n:,}" for n in total),
        _size(summary["pages"] * found.page_size),
    )
    console.print(table)
    if len(nodes) > 1:
        per_node = ", ".join(
            f"{node}: {_size(n * found.page_size)}"
            for node, n in list(summary["pages_by_node"].items())[:16]
        )
        console.print(Text(f"preserved by node: {per_node}"))
    own = ", ".join(
        _count(n, {"leaf": "lea"}.get(kind, kind))
        .replace("leas", "leaves")
        .replace("lea ", "leaf ")
        for kind, n in summary["own"].items()
    )
    console.print(Text(f"the map itself: {own or 'nothing'}"))
    areas = ", ".join(f"{phys:#x} +{_size(nbytes)}" for phys, nbytes in survey.scratch[:8])
    more = "" if len(survey.scratch) <= 8 else f", … {len(survey.scratch) - 8} more"
    console.print(Text(f"scratch: {areas or 'none'}{more}; array at {handover.scratch_phys:#x}"))
    violations = found.verify()
    if violations:
        console.print()
        console.print(Text(f"{_count(len(violations), 'violation')}, see 'luo image verify':"))
        for violation in violations[:5]:
            console.print(Text(f"  {_line(violation)}"))


def _dts(found: Image) -> str:
    survey = found.survey
    if survey.fdt is None:
        raise Wrong(f"{found.source}: the root tree cannot be read; see 'luo image verify'")
    parts = [f"// root tree at {found.handover.fdt_phys:#x}\n", survey.fdt.to_dts()]
    for subtree in survey.subtrees:
        blob = subtree_bytes(found, subtree.phys, subtree.nbytes)
        if blob is None or blob[:4] != b"\xd0\x0d\xfe\xed":
            continue
        try:
            text = Fdt(blob).to_dts()
        except FdtError as error:
            text = f"// {error}\n"
        parts.append(f"\n// {_printable(subtree.name)} at {subtree.phys:#x}\n{text}")
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts)
