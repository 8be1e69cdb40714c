"""``luo graph``: the states, and the order of callbacks, as pictures."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from luo import drivers
from luo.cli.errors import Wrong, wrong_input
from luo.cli.host import (
    HostSource,
    KernelSettings,
    host_options,
    kernel_options,
    request,
    request_option,
)
from luo.device import Bus, Driver
from luo.notifier import Subsystem

if TYPE_CHECKING:
    from luo.graph import Cast

__all__ = ["graph"]

_TEXT = ("dot", "gv")


@click.command()
@click.argument("what", type=click.Choice(["state", "callbacks"]), default="state")
@host_options
@request_option
@kernel_options
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="FILE.dot is text; FILE.svg, FILE.png and others are drawn. [default: the text]",
)
def graph(
    what: str,
    source: HostSource,
    requests: tuple[str, ...],
    kernels: KernelSettings,
    output: Path | None,
) -> None:
    """Draw the states, or who is called in which order and where a failure leads.

    The callbacks are those of the built-in subsystems and one device behind a port; of your
    drivers, if you name some; or of a whole host.
    """
    pictures = _pictures()
    hosts = (source.preset, source.devices, source.sysfs, source.hwloc_file, source.host_file)
    named = requests or any(value is not None for value in hosts)
    if what == "state" and (named or kernels.modules):
        raise click.UsageError("state: the states are the same on every host, with any drivers")
    with wrong_input():
        kernels.arguments()  # checked in one place
        if what == "state":
            chart = pictures.states(behaviour=kernels.behaviour, quirks=kernels.quirks)
        else:
            chart = pictures.callbacks(
                _host(source, requests, kernels) if named else _small(pictures, kernels),
                behaviour=kernels.behaviour,
                quirks=kernels.quirks,
                kho_abi=kernels.kho_abi,
            )
    kind = "dot" if output is None else output.suffix.removeprefix(".")
    text = chart.source if kind in _TEXT else None
    if output is None:
        click.echo(text, nl=False)
        return
    with wrong_input():
        output.write_bytes(_drawn(chart, kind) if text is None else text.encode())


def _pictures() -> ModuleType:
    """Return :mod:`luo.graph`, or say in a line what is missing."""
    try:
        from luo import graph
    except ImportError as error:
        raise Wrong(f"graph: {error}: install it with pip install 'luo-kho[graph]'") from error
    return graph


def _drawn(chart: object, kind: str) -> bytes:
    import graphviz

    assert isinstance(chart, graphviz.Digraph)
    if kind not in graphviz.FORMATS:
        raise Wrong(f"graph: {kind or 'no suffix'!r} is no format; try FILE.svg or FILE.dot")
    try:
        drawn: bytes = chart.pipe(format=kind, quiet=True)
    except graphviz.ExecutableNotFound as error:
        raise Wrong(
            "graph: no program 'dot' here: install Graphviz (Debian's package graphviz),"
            " or write FILE.dot"
        ) from error
    except subprocess.CalledProcessError as error:
        raise Wrong(f"graph: dot: {error.stderr.decode(errors='replace').strip()}") from error
    return drawn


def _small(pictures: ModuleType, kernels: KernelSettings) -> Cast:
    """Return a cast of the user's drivers, or of an example's."""
    mine = [thing for spec in kernels.modules for thing in drivers.load(spec)]
    cast: Cast = pictures.example(
        [thing for thing in mine if isinstance(thing, Driver)],
        [thing for thing in mine if isinstance(thing, Bus)],
        [thing for thing in mine if isinstance(thing, Subsystem)],
    )
    return cast


def _host(source: HostSource, requests: tuple[str, ...], kernels: KernelSettings) -> Cast:
    """Return the cast of a host with the built-in drivers, or the user's in their place."""
    from luo.graph import Cast

    host = source.read()
    kernel = drivers.kernel(host.machine(), vms=host.vms, **kernels.arguments())
    with kernel:
        request(kernel, requests, host)
        devices = kernel.devices
        return Cast(
            host.devices, devices.drivers, devices.buses, kernel.luo.subsystems, devices.requested
        )
