"""``luo image boot``: what QEMU needs to boot a real arm64 kernel with a handover."""

from __future__ import annotations

from pathlib import Path

import click

from luo.cli.errors import Wrong, wrong_input
from luo.image import Image
from luo.image.boot import CMDLINE, Boot, check, kernel_page_size, write

__all__ = ["boot"]

_file = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where run.sh, boot.json and the rest are written.",
)
@click.option(
    "--kernel", type=_file, help="An arm64 Image. [default: the one that run.sh is given]"
)
@click.option("--initrd", type=_file, help="An initramfs. [default: without --kernel, run.sh's]")
@click.option("--cmdline", default=CMDLINE, show_default=True, help="Of the kernel.")
@click.option(
    "--dtb", type=_file, help="Device tree of the machine. [default: what QEMU says of its virt]"
)
def boot(
    path: Path,
    directory: Path,
    kernel: Path | None,
    initrd: Path | None,
    cmdline: str,
    dtb: Path | None,
) -> None:
    """Write what QEMU's arm64 machine needs to boot a real kernel with PATH's handover.

    Its memory segments, the device tree, and the command: run.sh.
    """
    with wrong_input():
        image = Image.load(path)
        page_size = 4096 if kernel is None else kernel_page_size(kernel)
        wrong = check(image, page_size=page_size)
        if wrong:
            lines = "".join(f"\n  {violation}" for violation in wrong)
            raise Wrong(f"{path}: cannot be booted:{lines}")
        tree = None if dtb is None else dtb.read_bytes()
        made = write(image, directory, kernel=kernel, initrd=initrd, cmdline=cmdline, tree=tree)
    _show(made)


def _show(made: Boot) -> None:
    nbytes = sum(segment.nbytes for segment in made.segments)
    click.echo(f"{len(made.segments)} segments of {nbytes:,} bytes cross")
    for what, part in (("kernel", made.kernel), ("initramfs", made.initrd), ("tree", made.tree)):
        if part is not None:
            where = "in scratch" if part.in_scratch else "outside scratch"
            click.echo(f"{what} at {part.phys:#x}, {where}")
    arguments = (
        ""
        if made.arguments is not None
        else " KERNEL" + " INITRD" * (made.initrd is not None and made.initrd.file is None)
    )
    click.echo(f"run {made.directory / 'run.sh'}{arguments}")
