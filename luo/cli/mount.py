"""``luo mount``: the attribute tree as files, for shell scripts and whatever else opens files."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import ModuleType

import click

from luo.cli.errors import Wrong, wrong_input
from luo.cli.host import HostSource, KernelSettings, boot, host_options, kernel_options
from luo.device_node import ControlSocket
from luo.errors import KernelPanic, LuoError
from luo.machine import Machine
from luo.mountpoint import clear, is_dead
from luo.notifier import State
from luo.sysfs import Tree

__all__ = ["mount"]

_FUSE_DEVICE = "/dev/fuse"
_SESSIONS_ABI = "kho-v4"  # the generation in which sessions are handed over


@click.command()
@click.argument("directory", metavar="DIR")
@host_options
@kernel_options
@click.option("--in-process", is_flag=True, help="The next kernels run in this process.")
@click.option(
    "--control",
    metavar="PATH",
    help="Where the control socket is made. [default: beside DIR, as DIR.liveupdate]",
)
def mount(
    directory: str,
    source: HostSource,
    kernels: KernelSettings,
    in_process: bool,
    control: str | None,
) -> None:
    """Mount /sys of a simulated host on DIR, until ^C: live updates with echo and cat.

    \b
    devices/**/liveupdate/requested   1: keep it; beside it preserved, reclaimed
    kernel/liveupdate/prepare         1: PREPARE; 0: CANCEL
    kernel/debug/liveupdate/kexec     1: the jump into the next kernel
    kernel/debug/liveupdate/reboot    1: REBOOT without the jump, then CANCEL
    kernel/liveupdate/state           normal, prepared, updated; poll() wakes
    kernel/liveupdate/finish          1: FINISH
    kernel/debug/kho/{out,in}/        what is handed over
    dev/liveupdate                    mainline's device node, a socket: see 'luo session'

    Whoever mounts is root of that host. ^C, SIGTERM or 'umount DIR' end it: a running PREPARE is
    rolled back, a prepared update cancelled. If this process is killed and DIR says "Transport
    endpoint is not connected": 'fusermount3 -u DIR', as root 'umount -l DIR', or mount there again.
    """  # noqa: D301
    fuse = _fuse()
    _check_directory(directory)
    with wrong_input():
        sessions = kernels.arguments()["kho_abi"] == _SESSIONS_ABI
        if control is not None and not sessions:
            raise Wrong(f"mount: --control: sessions are handed over in {_SESSIONS_ABI} only")
        kernel, image = boot(source.read(), kernels, memfd=sessions)
    machine = kernel.machine
    # As ^C: a terminal that goes away must not leave a mount behind.
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    with (
        _machine_off(machine),
        _offered(machine, directory, control) if sessions else contextlib.nullcontext(),
        Tree(machine, image=image, in_process=in_process) as tree,
    ):
        with wrong_input():
            tree.load()
        mounted = fuse.Mount(tree, directory)
        try:
            with contextlib.suppress(KeyboardInterrupt), mounted.mounted():
                _say(mounted.directory, machine)
                mounted.run()
        except OSError as error:
            raise Wrong(str(error.strerror)) from error


def _fuse() -> ModuleType:
    """Return :mod:`luo.fuse`, or say in a line what is missing."""
    try:
        from luo import fuse
    except ImportError as error:
        raise Wrong(f"mount: {error}: install it with pip install 'luo-kho[fuse]'") from error
    except OSError as error:
        raise Wrong(f"mount: {error}: install libfuse (Debian's package fuse3)") from error
    if not os.path.exists(_FUSE_DEVICE):
        raise Wrong(
            f"mount: no {_FUSE_DEVICE} here: load the module fuse, or give it to the container"
        )
    if not os.access(_FUSE_DEVICE, os.R_OK | os.W_OK):
        raise Wrong(f"mount: {_FUSE_DEVICE}: not for this user; as root: chmod 666 {_FUSE_DEVICE}")
    return fuse


def _check_directory(directory: str) -> None:
    if is_dead(directory):
        if not clear(directory):
            raise Wrong(
                f"mount {directory}: a mount whose process was killed is in the way;"
                f" clear it with 'fusermount3 -u {directory}' or 'umount -l {directory}'"
            )
        click.echo(f"{directory}: a mount whose process was killed was in the way; cleared")
    if not os.path.isdir(directory):
        raise Wrong(f"mount {directory}: is no directory")
    if os.path.ismount(directory):
        raise Wrong(f"mount {directory}: something is mounted there; 'umount {directory}' first")


@contextlib.contextmanager
def _machine_off(machine: Machine) -> Iterator[None]:
    """Switch the machine off at the end: a prepared update is cancelled first."""
    try:
        yield
    finally:
        kernel = machine.running
        if kernel is not None:
            with contextlib.suppress(LuoError, KernelPanic):  # it is going, whatever it says
                if kernel.luo.state is State.PREPARED:
                    kernel.luo.cancel()
            kernel.close()


@contextlib.contextmanager
def _offered(machine: Machine, directory: str, path: str | None) -> Iterator[None]:
    """Offer the device node at *path*, or beside the directory if that can be written."""
    try:
        control = ControlSocket(path or f"{os.path.abspath(directory)}.liveupdate")
    except OSError as error:
        if path is not None:
            raise Wrong(f"--control {error}") from error
        click.echo(f"no control socket, see --control: {error}", err=True)
        yield
        return
    with control:
        control.offer(machine)
        yield


def _say(directory: str, machine: Machine) -> None:
    click.echo(f"mounted on {directory}: {len(machine.devices):,} devices; ^C unmounts")
    click.echo(f"  cat {directory}/kernel/liveupdate/state")
    click.echo(f"  echo 1 > {directory}/devices/…/liveupdate/requested")
    click.echo(f"  echo 1 > {directory}/kernel/liveupdate/prepare")
    click.echo(f"  echo 1 > {directory}/kernel/debug/liveupdate/kexec")
    click.echo(f"  echo 1 > {directory}/kernel/liveupdate/finish")
    if machine.control is not None:
        click.echo(f"  luo session list --control {directory}")
