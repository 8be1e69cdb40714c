"""What a live update can be written as besides its document, and ``luo export`` for documents."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Final, TypeVar, cast

import click

from luo.cli.errors import Wrong, check_writable, wrong_input
from luo.cli.host import collected
from luo.profile import chrome, folded, prometheus, trace
from luo.report import Report

__all__ = ["Exports", "export", "export_options", "output", "read_document"]

_Command = TypeVar("_Command", bound=Callable[..., Any])

_PROTOBUF: Final = (".pftrace", ".perfetto", ".perfetto-trace")
_JSON: Final = ".json"


@dataclass(frozen=True, slots=True)
class Exports:
    """The files that the user wants.

    Attributes:
        trace, spans, folded, folded_tree, prometheus: the options.
    """

    trace: str | None
    spans: int | None
    folded: str | None
    folded_tree: str | None
    prometheus: str | None

    @property
    def files(self) -> dict[str, str]:
        """The files by their options."""
        named = {
            "--trace": self.trace,
            "--folded": self.folded,
            "--folded-tree": self.folded_tree,
            "--prometheus": self.prometheus,
        }
        return {option: file for option, file in named.items() if file is not None}

    def check(self) -> None:
        """Refuse before a run what could not be written after it.

        Raises:
            click.ClickException: what is wrong.
        """
        files = self.files
        twice = next((file for file in files.values() if list(files.values()).count(file) > 1), "")
        if twice:
            options = ", ".join(option for option, file in files.items() if file == twice)
            where = "standard output" if twice == "-" else twice
            raise click.UsageError(f"{options}: {where} holds one document")
        if self.spans is not None and self.trace is None:
            raise click.UsageError("--spans: for --trace, which is not there")
        if self.trace is not None:
            _writer(self.trace)
        for option, file in files.items():
            if file != "-":
                check_writable(file, option)

    def write(self, document: Mapping[str, Any], report: Report | None = None) -> None:
        """Write the files.

        Args:
            document: of ``luo-run/1``.
            report: what it is the document of, with spans; None if there is nothing but it.

        Raises:
            Wrong: a file cannot be written.
            LookupError, TypeError, ValueError: the document is none.
        """
        if self.trace is not None:
            writer, binary = _writer(self.trace)
            most = trace.NR_SPANS if self.spans is None else self.spans
            drawn = (
                trace.from_document(document) if report is None else trace.from_report(report, most)
            )
            with output("--trace", self.trace, binary) as stream:
                writer.write(drawn, stream)
        for option, file, lines in (
            ("--folded", self.folded, folded.callbacks),
            ("--folded-tree", self.folded_tree, folded.tree),
            ("--prometheus", self.prometheus, prometheus.metrics),
        ):
            if file is not None:
                text = "".join(lines(document))
                if file == "-":
                    click.echo(text, nl=False)
                    continue
                with output(option, file) as stream:
                    stream.write(text)


def _writer(file: str) -> tuple[ModuleType, bool]:
    """Return the module that writes such a trace, and whether it writes bytes."""
    suffix = Path(file).suffix
    if suffix == _JSON:
        return chrome, False
    if suffix not in _PROTOBUF:
        raise Wrong(f"--trace {file}: FILE.pftrace for Perfetto or FILE.json is expected")
    try:
        from luo.profile import perfetto
    except ImportError as error:
        raise Wrong(
            f"--trace {file}: {error}: install it with pip install 'luo-kho[trace]', or write"
            " FILE.json"
        ) from error
    return perfetto, True


@contextlib.contextmanager
def output(option: str, file: str, binary: bool = False) -> Iterator[IO[Any]]:
    """Open *file*, which *option* names; a regular one takes its place when it is whole."""
    path = Path(file)
    try:
        whole = not path.exists() or stat.S_ISREG(path.lstat().st_mode)
        part = path.with_name(f".{path.name}.{os.getpid()}") if whole else path
        try:
            with part.open("wb" if binary else "w", encoding=None if binary else "utf-8") as stream:
                yield stream
            if whole:
                part.replace(path)
        finally:
            if whole:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise Wrong(f"{option} {file}: {error.strerror}") from error


def _file(option: str, text: str) -> Callable[[_Command], _Command]:
    return click.option(option, type=click.Path(dir_okay=False), metavar="FILE", help=text)


_FILES: Final = (
    _file(
        "--folded", "Write what callbacks cost as stacks for flame graphs; '-' is standard output."
    ),
    _file("--folded-tree", "Write what devices cost as such stacks, along their paths."),
    _file("--prometheus", "Write metrics as Prometheus reads them; '-' is standard output."),
)
_TRACE: Final = (
    _file(
        "--trace",
        "Write every callback's time: FILE.pftrace for ui.perfetto.dev, FILE.json for"
        " chrome://tracing.",
    ),
    click.option(
        "--spans",
        type=click.IntRange(0, 100_000_000),
        metavar="N",
        help=f"Draw the N longest callbacks in it. [default: {trace.NR_SPANS}]",
    ),
)


def export_options(command: _Command) -> _Command:
    """Give *command* the options of the exports, as one argument ``exports``."""
    return cast("_Command", collected(command, (*_TRACE, *_FILES), "exports", Exports))


@click.command()
@click.argument("run", type=click.Path(dir_okay=False, path_type=Path), metavar="RUN.json")
@_file("--trace", "Write phases and sums: FILE.pftrace for Perfetto, FILE.json for Chrome.")
@_FILES[0]
@_FILES[1]
@_FILES[2]
def export(run: Path, **files: str | None) -> None:
    """Write what 'luo run --json' wrote in other programs' formats.

    The document has no single callbacks: a trace of each is 'luo run --trace'.
    """
    exports = Exports(spans=None, **files)
    if not exports.files:
        raise click.UsageError("write what? --trace, --folded, --folded-tree, --prometheus")
    exports.check()
    with wrong_input():
        document = read_document(run)
    try:
        exports.write(document)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Wrong(f"{run}: this luo-run/1 document is not whole: {error!r}") from error


def read_document(path: Path) -> dict[str, Any]:
    """Read a ``luo-run/1`` document.

    Raises:
        OSError, ValueError: it is none; one clear line.
    """
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != "luo-run/1":
        raise ValueError(f"{path}: no luo-run/1 document, as 'luo run --json' writes it")
    return cast("dict[str, Any]", document)
