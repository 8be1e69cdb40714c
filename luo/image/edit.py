"""A handover changed: sessions dropped, renamed, files added, pages moved.

The result is what a kernel of the same generation would have written: map, root tree and LUO's
records are made anew by :class:`luo.kho.Kho`; every preserved block that the change does not
concern keeps its place and its order, as nobody but its owner knows who points at it. So do other
subtrees, files of unknown handlers, the areas of scratch, and the count of handovers. What a
dropped or moved memfd had (record, array, folios) is no longer preserved; its pages are not used
for anything else. Files of other handlers are dropped from the lists only, what they preserved
stays.

FLBs are counted: where all files hold one, or all memfds, or all of one handler, a file that comes
or goes changes its count, and one that nobody holds goes. What it preserved stays.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from luo import abi as _abi
from luo.image.convert import Rebuilding, check_whole
from luo.image.formats import STRUCTS
from luo.image.retrieve import decoded_luo, file_name, pieces, select, sessions
from luo.image.store import Image
from luo.image.survey import Survey
from luo.kho import Kho

__all__ = ["NewFile", "edit"]

_MEMFD: Final = "memfd-v2"
_SEALS: Final = 0x3F
_FLAGS: Final = 3  # of a folio: DIRTY, and its contents count
_NAME_MAX: Final = 63
_PFN_BITS: Final = 52


@dataclass(frozen=True, slots=True)
class NewFile:
    """A memfd to be added.

    Attributes:
        session: its session, which is made if there is none of that name.
        token: of it, u64.
        contents: bytes, or the path of a file.
        pos: position, u64.
        seals: ``F_SEAL_*`` bits.
        order: of its folios.
    """

    session: str
    token: int
    contents: bytes | Path
    pos: int = 0
    seals: int = 0
    order: int = 0


@dataclass(slots=True)
class _File:
    """A file of the new image: *record* as it was decoded, or *new*."""

    token: int
    handler: str
    data: int = 0
    memfd: dict[str, Any] | None = None
    new: NewFile | None = None


@dataclass(slots=True)
class _Session:
    name: str
    files: list[_File] = field(default_factory=list)


def edit(
    image: Image,
    *,
    drop: Iterable[str] = (),
    rename: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    add: Iterable[NewFile] = (),
    move: bool = False,
) -> Image:
    """Return *image* changed; first dropped, then renamed, then added.

    Args:
        image: one that breaks no rule, with sessions in ``luo-v5``.
        drop: sessions and files to leave out, as :func:`luo.image.retrieve.select` takes them.
        rename: sessions' old and new names.
        add: memfds.
        move: give every memfd other pages, of the same orders.

    Raises:
        ValueError: no such session or file, a name or token that is taken, or that no kernel could
            have; or nobody knows whose files an FLB counts.
        HandoverError: the image breaks a rule, has no sessions, or lacks a page that is to be
            moved: it names the address.
        KhoError: ENOMEM, EADDRNOTAVAIL if there is no room for what has to be written.
        OSError: the contents of a new file cannot be read.
    """
    check_whole(image, "edit")
    luo = decoded_luo(image)
    before = _listed(luo)
    after = _dropped(image, before, list(drop))
    _rename(after, dict(rename))
    _add(after, list(add))
    flbs = _counted(luo["flbs"], before, after)
    moved = [f for s in after for f in s.files if move and f.memfd is not None]
    kept = {id(f) for s in after for f in s.files if f.new is None} - {id(f) for f in moved}
    gone = [f for s in before for f in s.files if f.memfd is not None and id(f) not in kept]
    if moved:
        _check_pages(image, {f.data for f in moved})
    new = Rebuilding.begin(image, _abi.generation(image.abi))
    stays = _stays(image.survey, luo, gone, [f for s in before for f in s.files if id(f) in kept])
    mask = np.isin(new.phys | new.orders, stays)
    new.kho.preserve_folios(new.phys[mask], new.orders[mask])
    writer = _Writer(image, new.kho)
    for file in (f for s in after for f in s.files):
        if file.new is not None:
            file.data = writer.add(file.new)
        elif file.memfd is not None and id(file) not in kept:
            file.data = writer.move(file.memfd)
    for subtree in reversed(image.survey.subtrees):  # each is put before the others
        if subtree.name == _abi.LUO_MAINLINE:
            blob = writer.luo(luo["liveupdate_num"], after, flbs)
            new.kho.save_subtree(subtree.name, blob)
        elif subtree.name != _abi.KHO_SUBTREE_METADATA:
            assert subtree.phys is not None
            assert subtree.nbytes is not None
            new.kho.add_subtree(subtree.name, subtree.phys, subtree.nbytes)
    new.set_metadata()
    return new.result(new.kho.handover())


# ---- what is wanted ----


def _listed(luo: dict[str, Any]) -> list[_Session]:
    return [
        _Session(
            session["name"],
            [
                _File(f["token"], f["compatible"], f["data"], f.get("memfd"))
                for f in session["files"]
            ],
        )
        for session in luo["sessions"]
    ]


def _dropped(image: Image, before: Sequence[_Session], drop: Sequence[str]) -> list[_Session]:
    """Return new sessions of the same files, without those that are named."""
    if not drop:
        return [_Session(session.name, list(session.files)) for session in before]
    found = sessions(image)
    whole: set[str] = set()
    tokens: dict[str, set[int]] = {}
    for text in drop:
        for session in select(found, [text]):
            if text in (session.name, file_name(session.name)):
                whole.add(session.name)
            else:
                gone = tokens.setdefault(session.name, set())
                gone |= {file.token for file in session.files}
    return [
        _Session(s.name, [f for f in s.files if f.token not in tokens.get(s.name, ())])
        for s in before
        if s.name not in whole
    ]


def _check_name(name: str) -> None:
    raw = name.encode(errors="surrogateescape")
    if not 1 <= len(raw) <= _NAME_MAX or b"\0" in raw:
        raise ValueError(f"session {name!r}: not 1 to {_NAME_MAX} bytes without NUL")


def _rename(after: list[_Session], names: Mapping[str, str]) -> None:
    known = {session.name for session in after}
    for old in names:
        if old not in known:
            raise ValueError(f"rename {old!r}: no such session")
    for session in after:
        session.name = names.get(session.name, session.name)
        _check_name(session.name)
    if len({session.name for session in after}) != len(after):
        raise ValueError("rename: two sessions would have the same name")


def _add(after: list[_Session], add: Sequence[NewFile]) -> None:
    by_name = {session.name: session for session in after}
    for new in add:
        _check_name(new.session)
        what = f"add {new.session}/{new.token:#x}"
        if not 0 <= new.token < 1 << 64 or not 0 <= new.pos < 1 << 64:
            raise ValueError(f"{what}: token or position {new.pos:#x} is no u64")
        if new.seals & ~_SEALS:
            raise ValueError(f"{what}: unknown seals {new.seals:#x}")
        if new.session not in by_name:
            by_name[new.session] = _Session(new.session)
            after.append(by_name[new.session])
        files = by_name[new.session].files
        if any(file.token == new.token for file in files):
            raise ValueError(f"{what}: the token is taken")
        files.append(_File(new.token, _MEMFD, new=new))


def _counted(
    flbs: dict[str, Any] | None, before: Sequence[_Session], after: Sequence[_Session]
) -> list[tuple[str, int, int]] | None:
    """Return (name, data, count) of each FLB that is still held; None without a page of them."""
    if flbs is None:
        return None
    old, new = (
        [file.handler for session in side for file in session.files] for side in (before, after)
    )
    result = []
    for flb in flbs["flbs"]:
        count = flb["count"]
        if new and sorted(old) != sorted(new):
            # Whose: everybody's, else memfds, Linux 7.3's only files, else one other handler's.
            whose = [h for h in (_MEMFD, *sorted(set(old))) if old.count(h) == count]
            if count == len(old):
                count = len(new)
            elif whose and (whose[0] == _MEMFD or len(whose) == 1):
                count = new.count(whose[0])
            else:
                raise ValueError(
                    f"FLB {flb['name']!r} is held by {count} of {len(old)} files: "
                    "nobody knows which"
                )
        if count and new:
            result.append((flb["name"], flb["data"], count))
    return result


# ---- what stays ----


def _check_pages(image: Image, records: Collection[int]) -> None:
    for session in sessions(image):
        for file in session.files:
            if file.data in records:
                for _ in pieces(image, file):
                    pass


def _stays(
    survey: Survey, luo: dict[str, Any], gone: Iterable[_File], kept: Iterable[_File]
) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return (phys | order) of the blocks that go on being preserved where they are."""
    keys = {phys | order for phys, order in survey.iter_blocks()}
    page = survey.ram.page_size
    away = {block["phys"] for block in luo["blocks"]} | {luo["phys"], luo["flbs_pa"]}
    for session in luo["sessions"]:
        away |= {block["phys"] for block in session["blocks"]}
    folios: set[int] = set()
    for file in gone:
        memfd = file.memfd or {}
        away.add(memfd["phys"])
        folios |= {pfn * page | order for pfn, _, _, order in memfd["folios"]}
        for part in (memfd["vmalloc"] or {}).get("chunks", ()):
            away.add(part["phys"])
        size = page << memfd["vmalloc_order"]
        for entry in (memfd["vmalloc"] or {}).get("pages", ()):
            away |= {phys for phys, _ in _blocks_in(survey, entry, size)}
    shared = {file.data // page * page for file in kept if file.memfd is not None}
    keys -= folios
    keys -= {
        phys | order
        for phys in away - shared
        if phys and (order := survey.order_at(phys)) is not None
    }
    return np.array(sorted(keys), np.uint64)


def _blocks_in(survey: Survey, phys: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield the blocks that make up an entry: one, or parts where a border of nodes cuts it."""
    at = phys
    while at < phys + nbytes:
        order = survey.order_at(at)
        if order is None:
            return
        yield at, order
        at += survey.ram.page_size << order


# ---- writing ----


class _Writer:
    """Writes LUO's records into preserved memory of *kho*."""

    def __init__(self, image: Image, kho: Kho) -> None:
        self.image = image
        self.kho = kho
        self.page = image.page_size

    def _record(self, name: str, *values: bytes | int) -> bytes:
        layout, _ = STRUCTS[name]
        return layout.pack(*values)

    def _save(self, data: bytes) -> int:
        phys = self.kho.alloc_preserve(len(data))
        self.kho.memory.view(phys, len(data))[:] = data
        return phys

    def _memfd(
        self, pos: int, size: int, seals: int, flags: int, folios: Sequence[tuple[int, int, int]]
    ) -> int:
        """Write array and record of a memfd; *folios*: ``[(phys, flags, index), ...]``."""
        kho, page = self.kho, self.page
        area = (0, 0, 0, 0)
        if folios:
            rows = np.array(folios, np.uint64).reshape(-1, 3)
            words = np.empty((len(rows), 2), np.uint64)
            shift = np.uint64(page.bit_length() - 1)
            words[:, 0] = rows[:, 0] >> shift | rows[:, 1] << np.uint64(_PFN_BITS)
            words[:, 1] = rows[:, 2]
            raw = words.tobytes()
            blocks = kho.memory.alloc_folios(-(-len(raw) // page), 0)
            for i, phys in enumerate(blocks.tolist()):
                part = raw[i * page : (i + 1) * page]
                kho.memory.view(phys, page)[:] = part.ljust(page, b"\0")
            layout, _ = STRUCTS["vmalloc"]
            area = layout.unpack(kho.preserve_vmalloc(blocks))
        return self._save(self._record("memfd", pos, size, seals, flags, len(folios), *area))

    def move(self, memfd: Mapping[str, Any]) -> int:
        """Copy a memfd to other pages, and return where its record is."""
        memory = self.kho.memory
        folios = []
        for pfn, flags, index, order in memfd["folios"]:
            nbytes = self.page << order
            phys = memory.alloc_folio(order)
            for part in self.image.pieces(pfn * self.page, pfn * self.page + nbytes):
                if part.data is not None:
                    at = phys + part.phys - pfn * self.page
                    memory.view(at, part.nbytes)[:] = part.data
            self.kho.preserve_folio(phys, order)
            folios.append((phys, flags, index))
        return self._memfd(memfd["pos"], memfd["size"], memfd["seals"], memfd["flags"], folios)

    def add(self, new: NewFile) -> int:
        """Write a new memfd, every page of it, and return where its record is."""
        if isinstance(new.contents, bytes):
            return self._contents(new, io.BytesIO(new.contents), len(new.contents))
        with new.contents.open("rb") as file:
            return self._contents(new, file, os.fstat(file.fileno()).st_size)

    def _contents(self, new: NewFile, source: BinaryIO, size: int) -> int:
        memory, nbytes = self.kho.memory, self.page << new.order
        blocks = memory.alloc_folios(-(-size // nbytes), new.order)
        for i, phys in enumerate(blocks.tolist()):
            view = memory.view(phys, nbytes)
            part = source.read(min(nbytes, size - i * nbytes))
            view[:] = part.ljust(nbytes, b"\0")
        self.kho.preserve_folios(blocks, new.order)
        step = 1 << new.order
        folios = [(phys, _FLAGS, i * step) for i, phys in enumerate(blocks.tolist())]
        return self._memfd(new.pos, size, new.seals, 0, folios)

    def luo(
        self,
        number: int,
        sessions: Iterable[_Session],
        flbs: Sequence[tuple[str, int, int]] | None,
    ) -> bytes:
        """Write blocks and page of FLBs, and return the blob that names them."""
        rows = []
        for session in sessions:
            files = [
                self._record("file", file.handler.encode(errors="surrogateescape"), file.data,
                             file.token)
                for file in session.files
            ]  # fmt: skip
            head = self.kho.write_blocks(b"".join(files), STRUCTS["file"][0].size)
            name = session.name.encode(errors="surrogateescape")
            rows.append(self._record("session", name, head, len(files)))
        head = self.kho.write_blocks(b"".join(rows), STRUCTS["session"][0].size)
        page = 0
        if flbs is not None:
            listed = b"".join(
                self._record("flb", name.encode(errors="surrogateescape"), data, count)
                for name, data, count in flbs
            )
            page = self._save((self._record("flbs", 1, len(flbs)) + listed).ljust(self.page, b"\0"))
        return self._record("luo", _abi.LUO_COMPATIBLE, number, head, page)
