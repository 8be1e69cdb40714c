"""The sessions and files of Linux' LUO in an image, given back as files.

A session is a directory, a file in it is named by its token; what a file system cannot express
(position, seals, holes, what could not be retrieved and why) stands in ``manifest.json`` beside
them. Names come from outside: they are percent-encoded, so that they cannot leave the directory,
and decode to the same bytes.

Contents are as the kernel would give them: a page that no folio holds, or whose folio is not
up to date, reads as zero. What the kernel cannot retrieve is not retrieved here either; the address
says where it fails.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote_from_bytes, unquote_to_bytes

from luo.errors import HandoverError
from luo.image.formats import LUO_OLDER
from luo.image.store import Image

__all__ = [
    "MANIFEST",
    "FileBoundData",
    "RetrievedFile",
    "SavedFile",
    "SavedSession",
    "decoded_luo",
    "file_bound_data",
    "file_name",
    "name_of",
    "pieces",
    "problems",
    "read_file",
    "retrieve",
    "select",
    "sessions",
]

MANIFEST: Final = "manifest.json"
_SUBTREE: Final = "LUO"
_MEMFD: Final = "memfd-v2"
_UPTODATE: Final = 2  # flag of a folio
_SLACK: Final = 1 << 30  # bytes of holes, beyond what an image has, that are hashed or returned
_ZEROS: Final = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file of a session, as it was preserved.

    Attributes:
        session: name of the session; bytes that are not UTF-8 as surrogates.
        token: the user's.
        handler: compatible of its handler.
        data: what the handler left, u64.
        memfd: the decoded record of a memfd that can be read (``luo.image.formats``), or None.
        device: the decoded record of one of this library's devices, or None.
        wrong: rules that it breaks.
    """

    session: str
    token: int
    handler: str
    data: int
    memfd: dict[str, Any] | None = field(repr=False, default=None)
    device: dict[str, Any] | None = field(repr=False, default=None)
    wrong: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``session/0xtoken``."""
        return f"{self.session}/{self.token:#x}"

    @property
    def known(self) -> bool:
        """Whether its handler is one whose files can be given back."""
        return self.handler == _MEMFD or self.device is not None

    def _number(self, name: str) -> int | None:
        return None if self.memfd is None else int(self.memfd[name])

    @property
    def size(self) -> int | None:
        """Bytes, or None where nobody knows; of a device: of its record with the slots."""
        return self._number("size") if self.device is None else int(self.device["nbytes"])

    @property
    def pos(self) -> int | None:
        """Position of its file description."""
        return self._number("pos")

    @property
    def seals(self) -> int | None:
        """``F_SEAL_*`` bits."""
        return self._number("seals")

    @property
    def nr_folios(self) -> int | None:
        """Folios that hold it."""
        return self._number("nr_folios")


@dataclass(frozen=True, slots=True)
class SavedSession:
    """A session: ``name``, ``count`` as its record says, and the ``files`` that were found."""

    name: str
    count: int
    files: tuple[SavedFile, ...]


@dataclass(frozen=True, slots=True)
class FileBoundData:
    """An FLB: ``name``, its u64 ``data``, and how many files hold it (``count``)."""

    name: str
    data: int
    count: int


@dataclass(frozen=True, slots=True)
class RetrievedFile:
    """What became of a file.

    Attributes:
        file: the file.
        path: below the directory; None: there are no contents.
        error: why not, with the address; None if there are, or if its handler is not known.
        sha256: of the contents; None if that was not computed (endless holes).
        holes: ``[(offset, nbytes), ...]`` that no folio holds.
    """

    file: SavedFile
    path: str | None = None
    error: str | None = None
    sha256: str | None = None
    holes: tuple[tuple[int, int], ...] = ()


# ---- what there is ----


def decoded_luo(image: Image) -> dict[str, Any]:
    """Return LUO's records as ``luo.image.formats`` decodes them; errors as :func:`sessions`."""
    subtree = next((s for s in image.survey.subtrees if s.name == _SUBTREE), None)
    if subtree is None:
        raise HandoverError("no subtree LUO: this kernel handed over no sessions")
    found = subtree.decoded or {}
    if subtree.format == "fdt":
        tree = found["tree"][0]["properties"]
        strings = next((v.get("strings") for name, v in tree if name == "compatible"), None)
        found = {"compatible": (strings or ["an unknown tree"])[0]}
    if "sessions" not in found:
        what = found.get("compatible")
        if what is None:
            raise HandoverError("LUO cannot be read", subtree.phys)
        more = ", an older format" if what in LUO_OLDER else ""
        raise HandoverError(f"LUO is {what!r}{more}: only luo-v5 is supported", subtree.phys)
    return found


def sessions(image: Image) -> list[SavedSession]:
    """Return the sessions in *image*, in the order of their creation, with their files.

    Raises:
        HandoverError: it has none at all, or in another format than ``luo-v5``. What only parts of
            it break is noted where it is broken.
    """
    return [
        SavedSession(
            session["name"],
            session["count"],
            tuple(_file(session["name"], record) for record in session["files"]),
        )
        for session in decoded_luo(image)["sessions"]
    ]


def _file(session: str, record: dict[str, Any]) -> SavedFile:
    wrong = tuple(
        each["rule"] if each["phys"] is None else f"{each['phys']:#x}: {each['rule']}"
        for each in record.get("wrong", ())
    )
    return SavedFile(
        session,
        record["token"],
        record["compatible"],
        record["data"],
        record.get("memfd"),
        record.get("device"),
        wrong,
    )


def file_bound_data(image: Image) -> list[FileBoundData]:
    """Return the FLBs in *image*; errors as :func:`sessions`."""
    found = decoded_luo(image)["flbs"] or {"flbs": []}
    return [FileBoundData(flb["name"], flb["data"], flb["count"]) for flb in found["flbs"]]


def problems(image: Image) -> list[str]:
    """Return the rules that LUO's records break beside those of single files.

    Sessions or files may be missing for them.
    """
    of_files = {
        (rule["phys"], rule["rule"])
        for session in decoded_luo(image)["sessions"]
        for file in session["files"]
        for rule in file.get("wrong", ())
    }
    return [
        v.rule if v.phys is None else f"{v.phys:#x}: {v.rule}"
        for v in image.survey.violations
        if v.part == _SUBTREE and (v.phys, v.rule) not in of_files
    ]


def select(found: Sequence[SavedSession], wanted: Iterable[str]) -> list[SavedSession]:
    """Return the sessions and files that are named, in their own order.

    Args:
        found: of :func:`sessions`.
        wanted: ``SESSION`` or ``SESSION/TOKEN`` each, the name as it is or as :func:`file_name`
            writes it; none: all.

    Raises:
        ValueError: there is no such session or file.
    """
    chosen: dict[int, set[int] | None] = {}
    for text in wanted:
        hits = [i for i, s in enumerate(found) if text in (s.name, file_name(s.name))]
        for i in hits:
            chosen[i] = None
        if hits:
            continue
        name, _, token = text.rpartition("/")
        for i, session in enumerate(found):
            if name not in (session.name, file_name(session.name)):
                continue
            hits.append(i)
            numbers = {j for j, f in enumerate(session.files) if f.token == _token(text, token)}
            if not numbers:
                raise ValueError(f"{text}: session {name} has no such token")
            mine = chosen.setdefault(i, set())
            if mine is not None:
                mine |= numbers
        if not hits:
            raise ValueError(f"{text}: no such session")
    if not chosen:
        return list(found)
    result = []
    for i, numbers_of in sorted(chosen.items()):
        session = found[i]
        files = (
            session.files
            if numbers_of is None
            else tuple(f for j, f in enumerate(session.files) if j in numbers_of)
        )
        result.append(SavedSession(session.name, session.count, files))
    return result


def _token(text: str, token: str) -> int:
    try:
        return int(token, 0)
    except ValueError:
        raise ValueError(f"{text}: {token!r} is not a token") from None


# ---- names ----


def file_name(name: str, nth: int = 0) -> str:
    """Return *name* so that it is one safe component of a path.

    Letters, digits, ``_``, ``-``, ``~`` and inner dots stay; any other byte is ``%XX``. A NUL,
    which no name has, stands for an empty one, and with a number for the *nth* of the same.
    """
    raw = name.encode(errors="surrogateescape")
    text = quote_from_bytes(raw, safe="~")
    if text[:1] == "." or text == MANIFEST:
        text = f"%{raw[0]:02X}{text[1:]}"
    return text + (f"%00{nth or ''}" if nth or not text else "")


def name_of(text: str) -> str:
    """Return the name that :func:`file_name` made *text* of."""
    raw = unquote_to_bytes(text.encode(errors="surrogateescape"))
    return raw.split(b"\0", 1)[0].decode(errors="surrogateescape")


# ---- contents ----


def pieces(image: Image, file: SavedFile) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, bytes) of what a memfd's folios hold, ascending; between them it is zero.

    Of a device: its record, with the slots of driver and bus. Nothing is copied.

    Raises:
        HandoverError: it cannot be read; the address says where.
    """
    memfd, page = file.memfd, image.page_size
    if not file.known:
        raise HandoverError(f"file {file.name}: handler {file.handler!r} is not known", file.data)
    if file.device is not None:
        yield from _run(image, file, file.data, 0, file.device["nbytes"])
        return
    if memfd is None or len(memfd["folios"]) != memfd["nr_folios"]:
        why = file.wrong[0] if file.wrong else "its record cannot be read"
        raise HandoverError(why, None if file.wrong else file.data)
    size, end = memfd["size"], 0
    for pfn, flags, index, order in sorted(memfd["folios"], key=lambda row: row[2]):
        phys, offset = pfn * page, index * page
        if order < 0:
            raise HandoverError(f"file {file.name}: folio is not preserved", phys)
        if offset < end:
            raise HandoverError(f"file {file.name}: folio covers what another does", phys)
        end = offset + (page << order)
        if not flags & _UPTODATE or offset >= size:
            continue
        yield from _run(image, file, phys, offset, min(end, size))


def _run(
    image: Image, file: SavedFile, phys: int, offset: int, end: int
) -> Iterator[tuple[int, memoryview]]:
    """Yield what pages from *phys* on hold of a file's bytes from *offset* to *end*."""
    page = image.page_size
    at, stop = phys, phys + -(-(end - offset) // page) * page
    for part in image.pieces(phys, stop):
        if part.phys != at:
            break
        if part.data is not None:
            here = offset + part.phys - phys
            yield here, memoryview(part.data)[: end - here]
        at = part.end
    if at < stop:
        raise HandoverError(f"file {file.name}: page was not kept in the image", at)


def read_file(image: Image, file: SavedFile) -> bytes:
    """Return the contents of a file.

    Raises:
        HandoverError: as :func:`pieces`; or it is holes in the main, and too large for a buffer.
    """
    parts = list(pieces(image, file))
    size = file.size or 0
    if size > image.nbytes + _SLACK:
        raise HandoverError(f"file {file.name}: {size} bytes, most of them holes", file.data)
    contents = bytearray(size)
    for at, data in parts:
        contents[at : at + len(data)] = data
    return bytes(contents)


# ---- files ----


def retrieve(
    image: Image,
    directory: Path,
    chosen: Sequence[SavedSession] | None = None,
    *,
    progress: Callable[[RetrievedFile], object] = lambda _: None,
) -> list[RetrievedFile]:
    """Write files of *image*, and a manifest of all that was asked for.

    Args:
        image: read only.
        directory: new, or empty; mode 0700, files 0600.
        chosen: what to write; None: all.
        progress: told of each file.

    Returns:
        list: what became of each file, in order; one that failed does not stop the others.

    Raises:
        HandoverError: the image has no sessions that can be read at all.
        OSError: a directory or file cannot be written; EEXIST, ENOTEMPTY.
    """
    chosen = sessions(image) if chosen is None else chosen
    directory.mkdir(mode=0o700, exist_ok=True)
    if any(directory.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(directory))
    writer = _Writer(image)
    done: list[RetrievedFile] = []
    rows: list[dict[str, Any]] = []
    names: dict[str, int] = {}
    for session in chosen:
        place = directory / _unique(names, session.name)
        place.mkdir(mode=0o700)
        tokens: dict[str, int] = {}
        results = []
        for file in session.files:
            result = writer.write(file, place / _unique(tokens, f"{file.token:#x}"), directory)
            progress(result)
            results.append(result)
        rows.append(
            {
                "name": session.name,
                "directory": place.name,
                "count": session.count,
                "files": [_row(result) for result in results],
            }
        )
        done += results
    manifest = {
        "format": "luo-retrieve",
        "version": 1,
        "source": image.source,
        "abi": image.abi,
        "liveupdate_num": decoded_luo(image)["liveupdate_num"],
        "wrong": problems(image),
        "sessions": rows,
        "flbs": [
            {"name": flb.name, "data": hex(flb.data), "count": flb.count}
            for flb in file_bound_data(image)
        ],
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return done


def _unique(names: dict[str, int], name: str) -> str:
    nth = names.get(name, 0)
    names[name] = nth + 1
    return file_name(name, nth)


def _row(result: RetrievedFile) -> dict[str, Any]:
    file = result.file
    row: dict[str, Any] = {
        "token": hex(file.token),
        "handler": file.handler,
        "data": hex(file.data),
        "path": result.path,
    }
    if file.memfd is not None:
        row |= {
            "size": file.size,
            "pos": file.pos,
            "seals": file.seals,
            "folios": file.nr_folios,
        }
    if file.device is not None:
        row["size"] = file.size
        row["device"] = {name: file.device[name] for name in ("path", "bus", "index")}
    if result.path is not None:
        row |= {"sha256": result.sha256, "holes": [list(hole) for hole in result.holes]}
    if result.error is not None:
        row["error"] = result.error
    if file.wrong:
        row["wrong"] = list(file.wrong)
    return row


class _Writer:
    """Writes files; knows what was written, so that memory is given out once."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.taken: dict[int, SavedFile] = {}
        self.slack = image.nbytes + _SLACK

    def write(self, file: SavedFile, path: Path, top: Path) -> RetrievedFile:
        if not file.known:
            return RetrievedFile(file)
        try:
            self._claim(file)
            holes = tuple(_gaps(pieces(self.image, file), file.size or 0))  # so all of it is there
        except HandoverError as error:
            return RetrievedFile(file, error=str(error))
        size = file.size or 0
        empty = sum(nbytes for _, nbytes in holes)
        digest = hashlib.sha256() if empty <= self.slack else None
        self.slack -= empty if digest else 0
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "wb") as out:
                out.truncate(size)
                end = 0
                for at, data in pieces(self.image, file):
                    _hash_zeros(digest, at - end)
                    if digest:
                        digest.update(data)
                    out.seek(at)
                    out.write(data)
                    end = at + len(data)
                _hash_zeros(digest, size - end)
        except (OSError, OverflowError) as error:
            path.unlink()
            if isinstance(error, OSError) and error.errno not in (errno.EFBIG, errno.EINVAL):
                raise
            why = f"file {file.name}: {size} bytes are more than a file here can have"
            return RetrievedFile(file, error=why)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        where = str(path.relative_to(top))
        return RetrievedFile(file, where, None, digest.hexdigest() if digest else None, holes)

    def _claim(self, file: SavedFile) -> None:
        """Refuse memory that another file had: the kernel restores it once."""
        page = self.image.page_size
        if file.device is not None:
            pfns = [file.data // page]
        else:
            pfns = [row[0] for row in file.memfd["folios"]] if file.memfd else []
        for pfn in pfns:
            holder = self.taken.setdefault(pfn, file)
            if holder is not file:
                rule = f"file {file.name}: folio is also that of {holder.name}"
                raise HandoverError(rule, pfn * page)
        if len(set(pfns)) != len(pfns):
            raise HandoverError(f"file {file.name}: two folios are the same memory", file.data)


def _gaps(parts: Iterable[tuple[int, memoryview]], size: int) -> Iterator[tuple[int, int]]:
    end = 0
    for at, data in parts:
        if at > end:
            yield end, at - end
        end = at + len(data)
    if size > end:
        yield end, size - end


def _hash_zeros(digest: Any, nbytes: int) -> None:
    while digest and nbytes > 0:
        digest.update(_ZEROS[: min(nbytes, len(_ZEROS))])
        nbytes -= len(_ZEROS)
