"""``luo image``: look into a handover on disk, check it, compare it, convert it, make one.

Exit status: 0 done, or nothing found; 1 something found (verify, diff); 2 wrong usage or input.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from luo import abi
from luo.cli.errors import FAILED, Wrong, wrong_input
from luo.cli.image_boot import boot
from luo.cli.image_edit import edit
from luo.cli.image_retrieve import retrieve, session_table
from luo.cli.image_text import (
    abi_option,
    count_text,
    memory_options,
    new_table,
    path_argument,
    printable,
    size_text,
)
from luo.cli.image_verdict import show_verdict, verdict_options
from luo.errors import FdtError
from luo.fdt import Fdt
from luo.handover import Handover
from luo.image import Image, Subtree, Violation
from luo.image.convert import convert as convert_image
from luo.image.diff import compare
from luo.image.document import describe, map_summary, subtree_bytes, violation_rows
from luo.image.encode import encode as encode_image

__all__ = ["image"]

_SUBTREES_SHOWN = 16
_NODES_SHOWN = 4
_NOTES_SHOWN = 4
_FILES_SHOWN = 16


@click.group()
def image() -> None:
    """Handovers on disk: image files, or a machine's memory.

    Memory is QEMU's: the raw file of 'pmemsave', the ELF core of 'dump-guest-memory'; or a
    directory with a dump of some pages.
    """


image.add_command(boot)
image.add_command(edit)
image.add_command(retrieve)


@image.command()
@path_argument("path")
@click.option("--json", "as_json", is_flag=True, help="All of it as JSON, which 'encode' takes.")
@click.option("--dts", is_flag=True, help="The root tree, and blobs that are trees, as text.")
@abi_option
@memory_options
def inspect(
    path: Path,
    as_json: bool,
    dts: bool,
    name: str | None,
    base: int | None,
    handover: Handover | None,
) -> None:
    """Show what PATH holds: root tree, subtrees, sessions, preserved map, scratch."""
    if as_json and dts:
        raise click.UsageError("--json and --dts: choose one")
    with wrong_input():
        found = Image.load(path, abi=name, base=base, handover=handover)
        if as_json:
            click.echo(json.dumps(describe(found), indent=1))
        elif dts:
            click.echo(_dts(found), nl=False)
        else:
            _show(found)


@image.command()
@path_argument("path")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@abi_option
@memory_options
@verdict_options
def verify(
    path: Path,
    as_json: bool,
    name: str | None,
    base: int | None,
    handover: Handover | None,
    kernel: str | None,
    pairs: tuple[str, ...],
) -> None:
    """Check PATH against every rule of its format; exit status 1 if it breaks one.

    With --for: say what that kernel would do with it; exit status 1 unless it takes it.
    """
    if pairs and kernel is None:
        raise click.UsageError("--target: of what? see --for")
    with wrong_input():
        found = Image.load(path, abi=name, base=base, handover=handover)
        if kernel is not None:
            show_verdict(path, found, pairs, as_json=as_json)
            return
        violations = found.verify()
        warnings = found.survey.warnings
    if as_json:
        document = {
            "abi": found.abi,
            "notes": found.notes,
            "violations": violation_rows(violations),
            "warnings": violation_rows(warnings),
        }
        click.echo(json.dumps(document, indent=1))
    else:
        for violation in violations:
            click.echo(_line(violation))
        for warning in warnings:
            click.echo(f"warning: {_line(warning)}")
        for note in found.notes[:1]:
            click.echo(printable(f"{path}: {note}"))
        count = sum(violation.count for violation in violations)
        blocks = len(found.survey.phys)
        click.echo(
            f"{path}: {count or 'no'} violation{'' if count == 1 else 's'} of {found.abi}"
            f" in {blocks:,} preserved blocks, {len(found.survey.subtrees)} subtrees"
        )
    if violations:
        raise SystemExit(FAILED)


@image.command()
@path_argument("a")
@path_argument("b")
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
                    click.echo(printable(f"{sign} {d.part}: {d.what}: {text}"))
    if differences:
        raise SystemExit(FAILED)


@image.command()
@click.option(
    "--to", "target", type=click.Choice(list(abi.GENERATIONS)), required=True, help="Generation."
)
@click.option("--drop", multiple=True, metavar="NAME", help="Leave this subtree out.")
@path_argument("in_path")
@path_argument("out_path")
@abi_option
@memory_options
def convert(
    target: str,
    drop: tuple[str, ...],
    in_path: Path,
    out_path: Path,
    name: str | None,
    base: int | None,
    handover: Handover | None,
) -> None:
    """Write IN_PATH as an image of another generation, with the same pages preserved."""
    with wrong_input():
        source = Image.load(in_path, abi=name, base=base, handover=handover)
        result = convert_image(source, target, drop=drop)
        nbytes = result.save(out_path)
    click.echo(f"{out_path}: {result.abi}, {size_text(nbytes)}")


@image.command()
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where the pages are that do not stand in IN_JSON. [default: what it names]",
)
@path_argument("in_json")
@path_argument("out_path")
def encode(source: Path | None, in_json: Path, out_path: Path) -> None:
    """Write the image that IN_JSON describes, an edited 'inspect --json'; right or wrong."""
    with wrong_input():
        try:
            document = json.loads(in_json.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{in_json}: {error}") from error
        pages = None if source is None else Image.load(source)
        nbytes = encode_image(document, source=pages).save(out_path)
    click.echo(f"{out_path}: {document['abi']}, {size_text(nbytes)}")


# ---- text ----


def _line(violation: Violation) -> str:
    text = str(violation).encode(errors="backslashreplace").decode()
    return printable(text if len(text) < 400 else text[:400] + "…")


def _summary(subtree: Subtree) -> str:
    """Say in a few words what a subtree holds."""
    found = subtree.decoded
    if found is None:
        return "" if subtree.format is None else "cannot be read"
    if "previous_release" in found:
        return f"from release {found['previous_release']}, handover {found['kexec_count']}"
    if "regions" in found:
        return ", ".join(
            f"{r['name']} {size_text(r['size'])} at {r['start']:#x}"
            for r in found["regions"]
            if r["start"] is not None and r["size"] is not None
        )
    if "sessions" in found:
        files = sum(len(session["files"]) for session in found["sessions"])
        text = f"{count_text(len(found['sessions']), 'session')}, {count_text(files, 'file')}"
        held = sum(
            record["memfd"]["size"]
            for session in found["sessions"]
            for record in session["files"]
            if record.get("memfd")
        )
        flbs = len((found["flbs"] or {}).get("flbs", ()))
        text += f" ({size_text(held)})" if held else ""
        return f"{text}, {count_text(flbs, 'FLB')}, update {found['liveupdate_num']}"
    if "nr_folios" in found:
        return f"{found['nr_folios']} folios, csum {found['csum']}"
    if "devices" in found or "subsystems" in found:
        devices = found.get("devices") or {}
        number = count_text(len(devices.get("device_records", ())), "device")
        subsystems = count_text(len(found.get("subsystems", ())), "subsystem")
        return f"version {'.'.join(map(str, found.get('version', '?')))}, {number}, {subsystems}"
    if "tree" in found:
        return f"a tree of {count_text(len(found['tree']), 'node')}"
    if "nodes" in found:
        return f"{count_text(found['nodes'], 'node')}"
    return ""


def _show(found: Image) -> None:
    survey, ram = found.survey, found.ram
    console = Console(highlight=False)
    nodes = sorted({node for _, _, node in ram.ranges})
    memory = sum(nbytes for _, nbytes, _ in ram.ranges)
    console.print(
        Text(
            f"{found.abi}, pages of {size_text(found.page_size)}; memory {size_text(memory)} on "
            f"{count_text(len(nodes), 'node')}; {size_text(found.nbytes)} kept in "
            f"{count_text(len(found.extents), 'extent')}"
        )
    )
    root = "cannot be read" if survey.fdt is None else f"{survey.fdt.totalsize} bytes"
    handover = found.handover
    console.print(
        Text(
            printable(
                f"root tree at {handover.fdt_phys:#x}, {root}, compatible "
                f"{', '.join(survey.compatible) or 'with nothing'}; map at {survey.map_phys:#x}"
            )
        )
    )
    for note in found.notes[:_NOTES_SHOWN]:
        console.print(Text(printable(note)))
    console.print()
    table = new_table("subtree", "phys", "bytes", "holds", right=("phys", "bytes"))
    for subtree in survey.subtrees[:_SUBTREES_SHOWN]:
        table.add_row(
            Text(printable(subtree.name[:40])),
            "" if subtree.phys is None else f"{subtree.phys:#x}",
            "" if subtree.nbytes is None else f"{subtree.nbytes:,}",
            Text(printable(_summary(subtree)[:200])),
        )
    if len(survey.subtrees) > _SUBTREES_SHOWN:
        table.add_row(f"… {len(survey.subtrees) - _SUBTREES_SHOWN:,} more")
    console.print(table)
    console.print()
    sessions = session_table(found, _FILES_SHOWN)
    if sessions is not None:
        console.print(sessions)
        console.print()

    summary = map_summary(survey)
    shown = nodes if 1 < len(nodes) <= _NODES_SHOWN else []
    columns = ("order", "block", "blocks", *(f"node {node}" for node in shown), "bytes")
    table = new_table(*columns, right=columns)
    for order, row in summary["by_order"].items():
        nbytes = found.page_size << int(order)
        table.add_row(
            order,
            size_text(nbytes),
            f"{row['blocks']:,}",
            *(f"{row['blocks_by_node'][str(node)]:,}" for node in shown),
            size_text(nbytes * row["blocks"]),
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
        size_text(summary["pages"] * found.page_size),
    )
    console.print(table)
    if len(nodes) > 1:
        per_node = ", ".join(
            f"{node}: {size_text(n * found.page_size)}"
            for node, n in list(summary["pages_by_node"].items())[:16]
        )
        console.print(Text(f"preserved by node: {per_node}"))
    own = ", ".join(
        count_text(n, {"leaf": "lea"}.get(kind, kind))
        .replace("leas", "leaves")
        .replace("lea ", "leaf ")
        for kind, n in summary["own"].items()
    )
    console.print(Text(f"the map itself: {own or 'nothing'}"))
    areas = ", ".join(f"{phys:#x} +{size_text(nbytes)}" for phys, nbytes in survey.scratch[:8])
    more = "" if len(survey.scratch) <= 8 else f", … {len(survey.scratch) - 8} more"
    console.print(Text(f"scratch: {areas or 'none'}{more}; array at {handover.scratch_phys:#x}"))
    violations = found.verify()
    if violations:
        console.print()
        console.print(Text(f"{count_text(len(violations), 'violation')}, see 'luo image verify':"))
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
        parts.append(f"\n// {printable(subtree.name)} at {subtree.phys:#x}\n{text}")
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts)
