"""``luo session``: mainline's sessions from a shell, on a control socket or a real node."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn

import click
from rich import box
from rich.console import Console
from rich.table import Table

from luo import uapi
from luo.cli.errors import FAILED, Wrong, check_writable, wrong_input
from luo.client import LiveUpdate, Session

__all__ = ["session"]

_FIRST_FD: Final = 3  # where systemd's protocol has the first descriptor that is passed
_BUSY_SECONDS: Final = 2.0  # how long another process may have the node open before it is an error
_COPY_BYTES: Final = 1 << 20
_TOKENS_SHOWN: Final = 8
_COMMAND: Final = "luo.session.command"


class _Refused(click.ClickException):
    """The kernel said no: one line, exit status 1."""

    exit_code = FAILED


@click.group()
def session() -> None:
    """Sessions of files that outlive the kernel: mainline's live update.

    A session lives as long as somebody has its descriptor: what is created here goes when the
    command ends. TOKEN is a number of 64 bits, as 1 or 0x1a, by which a file is known in its
    session.
    """


# ---- arguments ----


class _WithCommand(click.Command):
    """A command behind whose ``--`` stands another one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take that other one away first."""
        ctx.meta[_COMMAND] = []
        if "--" in args:
            at = args.index("--")
            args, ctx.meta[_COMMAND] = args[:at], args[at + 1 :]
            if not ctx.meta[_COMMAND]:
                raise click.UsageError("--: a command is expected behind it", ctx)
            if shutil.which(ctx.meta[_COMMAND][0]) is None:
                raise Wrong(f"{ctx.meta[_COMMAND][0]}: no such command")
        return super().parse_args(ctx, args)


class _File(click.ParamType["tuple[int, str]"]):
    """``TOKEN=FILE``, or only ``TOKEN``: then the file is ``""``."""

    name = "file"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, str]:
        """Convert what the user wrote."""
        text, _, path = value.partition("=")
        try:
            token = int(text, 0)
        except ValueError:
            token = -1
        if not 0 <= token < 1 << 64:
            raise Wrong(f"{value}: TOKEN=FILE is expected, TOKEN a number of 64 bits")
        return token, path


_name = click.argument("name")
_files = click.argument("files", nargs=-1, type=_File(), metavar="[TOKEN=FILE]...")
_control = click.option(
    "--control",
    envvar="LUO_CONTROL",
    default=uapi.NODE,
    metavar="PATH",
    show_default=True,
    help="Device node, control socket, or what 'luo mount' has mounted; also in LUO_CONTROL.",
)


def _by_token(files: tuple[tuple[int, str], ...], bare: bool = False) -> dict[int, str]:
    """Return *files* by token; without *bare* each must have a file."""
    found: dict[int, str] = {}
    for token, path in files:
        if token in found:
            raise Wrong(f"{token:#x}: the token stands twice")
        if not path and not bare:
            raise Wrong(f"{token:#x}: TOKEN=FILE is expected")
        found[token] = path
    return found


def _node_path(control: str) -> str:
    """Return the path of the node: in a mounted tree, of the link there."""
    return os.path.join(control, uapi.NODE.lstrip("/")) if os.path.isdir(control) else control


# ---- calls ----


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn what the kernel refuses into one line and exit status 1."""
    try:
        yield
    except OSError as error:
        raise _Refused(_shown(str(error))) from error


def _opened(control: str) -> LiveUpdate:
    """Open the node; another process may have it for a moment."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return LiveUpdate.open(_node_path(control))
        except OSError as error:
            if error.errno == errno.EBUSY and time.monotonic() < deadline:
                time.sleep(0.02)
            elif error.errno in (errno.EBUSY, errno.EIO):
                raise _Refused(str(error)) from error
            else:
                raise Wrong(str(error)) from error


def _listed(control: str) -> dict[str, Any]:
    try:
        return LiveUpdate.list_sessions(_node_path(control))
    except OSError as error:
        if error.errno == errno.EIO:
            raise _Refused(str(error)) from error
        raise Wrong(str(error)) from error


def _incoming(control: str, name: str) -> list[int] | None:
    """Return the tokens of a session that came over; None if nobody tells."""
    try:
        told = LiveUpdate.list_sessions(_node_path(control))
    except OSError:
        return None
    for one in told["incoming"]:
        if one["name"] == name:
            return [file["token"] for file in one["files"]]
    return None


# ---- files ----


def _loaded(path: str) -> int:
    """Return a memfd with the content of a file; of ``fd:N``, a duplicate of that descriptor."""
    if path.startswith("fd:"):
        try:
            return os.dup(int(path[3:]))
        except (ValueError, OSError) as error:
            raise Wrong(f"{path}: is no open descriptor") from error
    with wrong_input(), click.open_file(path, "rb") as file:
        fd = os.memfd_create(os.path.basename(path)[:200])
        with open(fd, "wb", closefd=False) as memfd:
            shutil.copyfileobj(file, memfd, _COPY_BYTES)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _preserve(kept: Session, files: Mapping[int, str]) -> None:
    for token, path in files.items():
        fd = _loaded(path)
        try:
            with _refusals():
                kept.preserve_fd(fd, token)
        finally:
            os.close(fd)


def _store(fd: int, path: str) -> None:
    """Write the content of the file *fd* to *path*."""
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as memfd, click.open_file(path, "wb") as file:
        shutil.copyfileobj(memfd, file, _COPY_BYTES)


def _become(command: list[str], fds: Mapping[str, int]) -> NoReturn:
    """Run *command* in place of this process, with descriptors as systemd passes them."""
    # First out of the way: where one shall be, another may be yet.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD + len(fds)) for fd in fds.values()]
    for place, fd in enumerate(moved):
        os.dup2(fd, _FIRST_FD + place, inheritable=True)
    with wrong_input():
        os.execvpe(
            command[0],
            command,
            {
                **os.environ,
                "LISTEN_PID": str(os.getpid()),
                "LISTEN_FDS": str(len(fds)),
                "LISTEN_FDNAMES": ":".join(name.replace(":", "_") for name in fds),
                "LUO_SESSION_FD": str(_FIRST_FD),
            },
        )


# ---- commands ----


@session.command(cls=_WithCommand)
@_name
@_files
@_control
@click.pass_context
def create(
    context: click.Context, name: str, files: tuple[tuple[int, str], ...], control: str
) -> None:
    """Create a session, and keep it until ^C or until the kernel goes.

    What is in each FILE is preserved as a memfd; - is standard input, and fd:N the descriptor N,
    itself.

    With '-- COMMAND' this process becomes COMMAND, and has the session as descriptor 3: see
    LUO_SESSION_FD, LISTEN_FDS.
    """
    wanted, command = _by_token(files), context.meta[_COMMAND]
    with _opened(control) as node, _refusals():
        made = node.create_session(name)
    with made:
        _preserve(made, wanted)
        if command:
            _become(command, {name: made.fileno()})
        count = "1 file" if len(wanted) == 1 else f"{len(wanted)} files"
        click.echo(f"session {_shown(name)}: {count}; ^C drops it")
        poller = select.poll()
        poller.register(made, 0)  # nothing but the end of the kernel
        poller.poll()
        click.echo(f"session {_shown(name)}: the kernel has gone")


@session.command()
@click.argument("files", nargs=-1, required=True, type=_File(), metavar="TOKEN=FILE...")
@click.option(
    "--fd",
    type=click.IntRange(0),
    envvar="LUO_SESSION_FD",
    metavar="N",
    help="The session's descriptor. [default: LUO_SESSION_FD]",
)
def preserve(files: tuple[tuple[int, str], ...], fd: int | None) -> None:
    """Preserve files in the session that this process has inherited.

    Run it below 'luo session create NAME -- COMMAND'. FILE is as there.
    """
    wanted = _by_token(files)
    if fd is None:
        raise Wrong("preserve: no session: run it below 'luo session create NAME -- COMMAND'")
    try:
        inherited = Session.from_fd(os.dup(fd))
    except OSError as error:
        raise Wrong(f"preserve: --fd {fd}: {error.strerror}") from error
    with inherited:
        _preserve(inherited, wanted)


@session.command(cls=_WithCommand)
@_name
@_files
@click.option("--drop-rest", is_flag=True, help="Give up the files that are not named.")
@_control
@click.pass_context
def retrieve(
    context: click.Context,
    name: str,
    files: tuple[tuple[int, str], ...],
    drop_rest: bool,
    control: str,
) -> None:
    """Write files that came over with a session, and finish it.

    With '-- COMMAND' this process becomes COMMAND, and has the session as descriptor 3, which it
    finishes by its end; a TOKEN without FILE is passed as a further descriptor, in that order.
    """
    command = context.meta[_COMMAND]
    wanted = _by_token(files, bare=bool(command))
    for path in filter(None, wanted.values()):
        if path != "-":
            check_writable(path, "retrieve")
    # A session that was taken is finished at the end, whatever happens: look before.
    tokens = _incoming(control, name)
    if tokens is not None:
        _check_tokens(name, wanted, tokens, drop_rest or bool(command))
    with _opened(control) as node, _refusals():
        taken = node.retrieve_session(name)
    with taken:
        with _refusals():
            fds = {token: taken.retrieve_fd(token) for token in wanted}
        for token, path in wanted.items():
            if path:
                with wrong_input():
                    _store(fds[token], path)
        if command:
            passed = {f"{token:#x}": fds[token] for token, path in wanted.items() if not path}
            _become(command, {name: taken.fileno(), **passed})
        for fd in fds.values():
            os.close(fd)
        with _refusals():
            taken.finish()


def _check_tokens(name: str, wanted: Mapping[int, str], there: list[int], any_left: bool) -> None:
    missing = [token for token in wanted if token not in there]
    if missing:
        raise Wrong(f"session {name}: no file has token {missing[0]:#x}; it has {_tokens(there)}")
    left = [token for token in there if token not in wanted]
    if left and not any_left:
        raise Wrong(f"session {name}: {_tokens(left)} would be lost: name them too, or --drop-rest")


@session.command()
@_name
@_control
def finish(name: str, control: str) -> None:
    """Finish a session that came over; its files are given up."""
    with _opened(control) as node, _refusals():
        taken = node.retrieve_session(name)
    with taken, _refusals():
        taken.finish()


@session.command("list")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_control
def list_(name: str | None, as_json: bool, control: str) -> None:
    """List sessions, or the files of the session NAME.

    Not of a real kernel, which does not tell.
    """
    told = _listed(control)
    if name is not None:
        for kind in ("outgoing", "incoming"):
            told[kind] = [one for one in told[kind] if one["name"] == name]
        if not (told["outgoing"] or told["incoming"]):
            raise Wrong(f"session {name}: there is none")
    if as_json:
        click.echo(json.dumps(told, indent=1))
    elif name is not None:
        _print_files(told)
    else:
        _print_sessions(told)


def _rows(told: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each session comes from, and the session."""
    for one in told["outgoing"]:
        yield "this kernel", one
    for one in told["incoming"]:
        yield "retrieved" if one["retrieved"] else "kernel before", one


def _print_sessions(told: Mapping[str, Any]) -> None:
    table = _table("session", "of", "files", "tokens")
    for kind, one in _rows(told):
        tokens = [file["token"] for file in one["files"]]
        table.add_row(_shown(one["name"]), kind, f"{len(tokens):,}", _tokens(tokens))
    if not table.row_count:
        click.echo("no sessions")
        return
    Console(highlight=False, markup=False).print(table)


def _print_files(told: Mapping[str, Any]) -> None:
    table = _table("of", "token", "handler", "data", "")
    for kind, one in _rows(told):
        for file in one["files"]:
            status = file["retrieve_status"]
            state = "" if not status else "retrieved" if status > 0 else os.strerror(-status)
            data = f"{file['data']:#x}"
            table.add_row(kind, f"{file['token']:#x}", file["handler"], data, state)
    if not table.row_count:
        click.echo("no files")
        return
    Console(highlight=False, markup=False).print(table)


def _shown(name: str) -> str:
    """Return *name*, which may be any bytes, so that it does a terminal no harm."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _tokens(tokens: list[int]) -> str:
    shown = " ".join(f"{token:#x}" for token in tokens[:_TOKENS_SHOWN])
    more = len(tokens) - _TOKENS_SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column == "files" else "left")
    return table
