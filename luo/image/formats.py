"""What the subtrees hold, where the format is known, and the rules that they break.

Formats: ``kexec-metadata`` (kho-abi 10.3), ``memblock`` (10.2), ``kho_test`` and ``LUO`` of Linux
7.3 with sessions, files, FLBs and memfds (10.4; luo-mainline 4.5), and this library's
``liveupdate_orchestrator``. A blob that is any other tree is shown as such.

Every record that is decoded says where it lies (``phys``), and has its fields under the names of
``STRUCTS``, so that it can be written back.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from luo import abi as _abi
from luo.errors import FdtError
from luo.fdt import Column, Fdt, Node
from luo.image.survey import Violation

if TYPE_CHECKING:
    from luo.image.survey import Subtree, Survey

__all__ = ["DEVICE_COLUMNS", "LUO_OLDER", "STRUCTS", "decode", "tree_rows", "value_of"]

_BLOB_MAX: Final = 256 << 20
_ROWS_MAX: Final = 100_000  # nodes of a tree that are shown
_MAGIC_TEST: Final = 0x4B484F21
_SEALS: Final = 0x3F  # F_SEAL_SEAL … F_SEAL_EXEC
DEVICE_COLUMNS: Final = ("path", "bus", "driver", "state", "index")
LUO_OLDER: Final = ("luo-v1", "luo-v2", "luo-v3", "luo-v4")
_VMALLOC: Final = _abi.VMALLOC_SER

STRUCTS: Final[dict[str, tuple[struct.Struct, tuple[str, ...]]]] = {
    "kexec-metadata": (struct.Struct("<I65sI"), ("version", "previous_release", "kexec_count")),
    "luo": (_abi.LUO_SER, ("compatible", "liveupdate_num", "sessions_pa", "flbs_pa")),
    "block": (_abi.KHO_BLOCK_SER, ("next", "count")),
    "session": (_abi.LUO_SESSION_SER, ("name", "files_pa", "count")),
    "file": (_abi.LUO_FILE_SER, ("compatible", "data", "token")),
    "flbs": (_abi.LUO_FLBS_SER, ("pgcnt", "count")),
    "flb": (_abi.LUO_FLB_SER, ("name", "data", "count")),
    "memfd": (
        struct.Struct("<QQIIQQIHH"),
        (
            "pos", "size", "seals", "flags", "nr_folios",
            "vmalloc_first", "vmalloc_pages", "vmalloc_flags", "vmalloc_order",
        ),
    ),
    "device": (
        struct.Struct("<HHIQQ"),
        ("path_bytes", "bus_bytes", "index", "slot_bytes", "bus_slot_bytes"),
    ),
    "vmalloc": (_VMALLOC, ("first", "total_pages", "flags", "order")),
    "chunk": (struct.Struct("<Q"), ("next",)),
    "extent": (struct.Struct("<QQQQ"), ("phys", "nbytes", "first", "count")),
}  # fmt: skip
"""Layout of each record by its ``type``: little-endian, packed, fields in order."""


def decode(survey: Survey, subtree: Subtree) -> None:
    """Decode *subtree* into its ``format`` and ``decoded``; violations go to the survey."""
    if survey.generation.inline:
        _decode_inline(survey, subtree)
        return
    phys, nbytes = subtree.phys, subtree.nbytes
    if phys is None or nbytes is None or not survey.ram.contains(phys, nbytes):
        return
    if nbytes > _BLOB_MAX:
        survey.wrong(subtree.name, phys, f"blob of {nbytes:#x} bytes: too large to be looked at")
        return
    reader = _Reader(survey, subtree.name)
    blob = reader.read(phys, nbytes, "blob")
    if blob is None:
        return
    known = _KNOWN.get(subtree.name)
    luo_is_tree = subtree.name == "LUO" and blob[:4] == b"\xd0\x0d\xfe\xed"
    if known is not None and not luo_is_tree:
        subtree.format = subtree.name
        subtree.decoded = known(reader, phys, blob)
    elif blob[:4] == b"\xd0\x0d\xfe\xed":
        tree = reader.tree(phys, blob)
        if tree is not None:
            subtree.format = "fdt"
            subtree.decoded = {"tree": tree_rows(tree)}


def _decode_inline(survey: Survey, subtree: Subtree) -> None:
    _, node = subtree.rows[0]
    reader = _Reader(survey, subtree.name)
    subtree.format = "inline"
    where = survey.pages.handover.fdt_phys
    if subtree.name == "memblock":
        subtree.format = "memblock"
        subtree.decoded = _memblock_node(reader, where, node)
    elif subtree.name == _abi.LUO_NODE:
        subtree.format = _abi.LUO_NODE
        assert survey.fdt is not None
        subtree.decoded = _orchestrator_inline(reader, where, survey.fdt, node)
    else:
        children = sum(depth == 1 for depth, _ in subtree.rows)
        subtree.decoded = {"nodes": len(subtree.rows), "children": children}


# ---- trees as rows ----


def value_of(raw: bytes) -> dict[str, Any]:
    """Return a property's value in the form that reads best, and that gives its bytes back."""
    if len(raw) > 1 and raw[-1] == 0 and raw[0]:
        parts = raw[:-1].split(b"\0")
        if all(part and all(32 <= byte < 127 for byte in part) for part in parts):
            return {"strings": [part.decode() for part in parts]}
    if len(raw) == 8:
        return {"u64": hex(int.from_bytes(raw, "little"))}
    if len(raw) == 4:
        return {"u32": hex(int.from_bytes(raw, "little"))}
    return {"hex": raw.hex()}


def tree_rows(tree: Fdt, limit: int = _ROWS_MAX) -> list[dict[str, Any]]:
    """Return a tree as flat rows ``{depth, name, properties: [[name, value], ...]}``."""
    rows: list[dict[str, Any]] = []
    for depth, node in tree.walk():
        if len(rows) == limit:
            rows.append({"depth": 0, "more": True})
            break
        properties = [[name, value_of(bytes(raw))] for name, raw in node.properties.items()]
        rows.append({"depth": depth, "name": node.name, "properties": properties})
    return rows


def _text(raw: bytes) -> str:
    """Text up to the first NUL; what is not UTF-8 stays reversible."""
    return raw.split(b"\0", 1)[0].decode(errors="surrogateescape")


class _Reader:
    """Reads records of one subtree."""

    def __init__(self, survey: Survey, part: str) -> None:
        self.survey = survey
        self.part = part

    def wrong(self, phys: int | None, rule: str, kind: str = "") -> None:
        self.survey.wrong(self.part, phys, rule, kind=kind)

    def read(self, phys: int, nbytes: int, what: str) -> bytes | None:
        return self.survey.read(self.part, phys, nbytes, what)

    def tree(self, phys: int, blob: bytes) -> Fdt | None:
        try:
            return Fdt(blob)
        except FdtError as error:
            self.wrong(phys + (error.offset or 0), f"blob is no tree: {error}")
            return None

    def compatible(self, phys: int, node: Node, expected: str) -> None:
        raw = bytes(node.get("compatible") or b"")
        if expected.encode() not in raw.split(b"\0")[:-1]:
            found = raw.rstrip(b"\0").decode(errors="replace")
            self.wrong(phys, f"{node.path}: compatible is {found!r}, not {expected!r}")

    def number(self, phys: int, node: Node, name: str, nbytes: int = 8) -> int | None:
        raw = node.get(name)
        if raw is not None and raw.nbytes == nbytes:
            return int.from_bytes(bytes(raw), "little")
        found = "is missing" if raw is None else f"has {raw.nbytes} bytes, not {nbytes}"
        self.wrong(phys, f"{node.path}: {name} {found}")
        return None

    def page(self, phys: int, what: str) -> bytes | None:
        """Read a page that must be preserved on its own."""
        size = self.survey.ram.page_size
        if phys % size or not self.survey.ram.contains(phys, size):
            self.wrong(phys, f"{what} is misaligned or not in RAM")
            return None
        if not self.survey.has_block(phys, 0):
            self.wrong(phys, f"{what} is not preserved as a page")
        return self.read(phys, size, what)

    def blocks(self, head: int, entry: int, what: str) -> Iterator[tuple[int, int, bytes]]:
        """Yield (phys, count, page) of a chain of serialization blocks (kho-abi 10.1)."""
        capacity = _abi.block_capacity(entry, self.survey.ram.page_size)
        seen: set[int] = set()
        phys = head
        while phys:
            if phys in seen:
                self.wrong(phys, f"chain of {what} runs in a circle")
                return
            if len(seen) == _abi.KHO_BLOCKS_MAX:
                self.wrong(head, f"chain of {what}: over {_abi.KHO_BLOCKS_MAX} blocks")
                return
            seen.add(phys)
            raw = self.page(phys, f"block of {what}")
            if raw is None:
                return
            following, count = _abi.KHO_BLOCK_SER.unpack_from(raw)
            if not 1 <= count <= capacity:
                self.wrong(phys, f"block of {what} with {count} entries, not 1..{capacity}")
            yield phys, min(count, capacity), raw
            phys = following

    def vmalloc(self, at: int, first: int, pages: int, order: int, what: str) -> dict[str, Any]:
        """Follow a vmalloc descriptor (kho-abi 6) that stands at *at*."""
        size = self.survey.ram.page_size
        room = size // 8 - 1
        entries: list[int] = []
        chunks: list[dict[str, Any]] = []
        seen: set[int] = set()
        result = {"chunks": chunks, "pages": entries}
        if order > 51:
            self.wrong(at, f"{what}: order {order}")
            return result
        if pages == 0 or pages % (1 << order):
            self.wrong(at, f"{what}: {pages} pages of order {order}")
        need, phys = pages >> order, first
        if not first:
            self.wrong(at, f"{what}: no first chunk")
        while phys:
            if phys in seen:
                self.wrong(phys, f"{what}: chain of chunks runs in a circle")
                break
            seen.add(phys)
            raw = self.page(phys, f"{what}: chunk")
            if raw is None:
                break
            words = np.frombuffer(raw, np.uint64)
            empty = np.flatnonzero(words[1:] == 0)
            here = words[1 : 1 + (int(empty[0]) if len(empty) else room)].tolist()
            chunks.append({"type": "chunk", "phys": phys, "next": int(words[0]), "entries": here})
            entries += here
            if len(entries) > need:
                self.wrong(phys, f"{what}: more than the {need} entries of its {pages} pages")
                break
            phys = int(words[0])
        else:
            if len(entries) != need:
                self.wrong(at, f"{what}: {len(entries)} entries, not {need}")
        for entry in entries:
            # A block that straddles NUMA nodes is recorded in parts: what counts is the whole.
            if entry % (size << order):
                self.wrong(entry, f"{what}: misaligned for order {order}")
            if not self.survey.covered(entry, size << order):
                self.wrong(entry, f"{what}: block of order {order} is not preserved")
            elif order == 0 and not self.survey.has_block(entry, 0):
                self.wrong(entry, f"{what}: page is not preserved as a page")
        return result

    def array(
        self, at: int, found: dict[str, Any], order: int, nbytes: int, what: str
    ) -> bytes | None:
        """Read the first bytes of what a vmalloc descriptor names."""
        size = self.survey.ram.page_size << order
        parts: list[bytes] = []
        left = nbytes
        if nbytes > size * len(found["pages"]):
            self.wrong(at, f"{what}: {nbytes} bytes are more than its pages hold")
            return None
        for entry in found["pages"]:
            here = min(size, left)
            if not here:
                break
            left -= here
            part = self.read(entry, here, what)
            if part is None:
                return None
            parts.append(part)
        return b"".join(parts)


# ---- kexec-metadata ----


def _metadata(reader: _Reader, phys: int, blob: bytes) -> dict[str, Any] | None:
    layout, names = STRUCTS["kexec-metadata"]
    if len(blob) < layout.size:
        reader.wrong(phys, f"blob of {len(blob)} bytes, {layout.size} are needed")
        return None
    version, release, count = layout.unpack_from(blob)
    if version != 1:
        reader.wrong(phys, f"version {version}, not 1")
    if b"\0" not in release:
        reader.wrong(phys + 4, "previous_release has no end")
    values = (version, _text(release), count)
    return {"type": "kexec-metadata", "phys": phys, **dict(zip(names, values, strict=True))}


# ---- memblock ----


def _memblock(reader: _Reader, phys: int, blob: bytes) -> dict[str, Any] | None:
    tree = reader.tree(phys, blob)
    if tree is None:
        return None
    return {**_memblock_node(reader, phys, tree.root), "tree": tree_rows(tree)}


def _memblock_node(reader: _Reader, phys: int, top: Node) -> dict[str, Any]:
    reader.compatible(phys, top, "memblock-v1")
    page = reader.survey.ram.page_size
    regions: list[dict[str, Any]] = []
    children = top.children
    if len(children) > 8:
        reader.wrong(phys, f"{len(children)} regions, a kernel has 8 at most")
    names: set[str] = set()
    for node in children[:1024]:
        reader.compatible(phys, node, "reserve-mem-v1")
        if not 1 <= len(node.name.encode(errors="surrogateescape")) <= 15 or node.name in names:
            reader.wrong(phys, f"region {node.name[:64]!r}: not 1..15 characters, or stands twice")
        names.add(node.name)
        start = reader.number(phys, node, "start")
        size = reader.number(phys, node, "size")
        regions.append({"name": node.name, "start": start, "size": size})
        if start is None or size is None:
            continue
        if not size or not reader.survey.ram.contains(start, size):
            reader.wrong(start, f"region {node.name} of {size:#x} bytes is not in RAM")
        elif size >= page and not reader.survey.covered(start // page * page, size // page * page):
            reader.wrong(start, f"region {node.name} of {size:#x} bytes is not preserved")
    placed = sorted((r["start"], r["size"], r["name"]) for r in regions if r["start"] and r["size"])
    for (start, size, name), (following, _, other) in itertools.pairwise(placed):
        if following < start + size:
            reader.wrong(following, f"region {other} overlaps region {name}")
    return {"regions": regions}


# ---- kho_test ----


def _kho_test(reader: _Reader, phys: int, blob: bytes) -> dict[str, Any] | None:
    tree = reader.tree(phys, blob)
    if tree is None:
        return None
    result: dict[str, Any] = {"tree": tree_rows(tree)}
    reader.compatible(phys, tree.root, "kho-test-v1")
    magic = reader.number(phys, tree.root, "magic", 4)
    if magic not in (None, _MAGIC_TEST):
        reader.wrong(phys, f"magic is {magic:#x}, not {_MAGIC_TEST:#x}")
    data = next((node for node in tree.root.children if node.name == "data"), None)
    if data is None:
        reader.wrong(phys, "has no node data")
        return result
    count = reader.number(phys, data, "nr_folios", 4)
    csum = reader.number(phys, data, "csum", 4)
    raw = bytes(data.get("folios_info") or b"")
    result |= {"magic": magic, "nr_folios": count, "csum": csum}
    if len(raw) != _VMALLOC.size:
        reader.wrong(phys, f"folios_info has {len(raw)} bytes, not {_VMALLOC.size}")
        return result
    first, pages, flags, order = _VMALLOC.unpack(raw)
    found = reader.vmalloc(phys, first, pages, order, "folios_info")
    result["vmalloc"] = {
        "first": first,
        "total_pages": pages,
        "flags": flags,
        "order": order,
        **found,
    }
    if count is None:
        return result
    array = reader.array(phys, found, order, 8 * count, "folios_info")
    if array is None:
        return result
    page = reader.survey.ram.page_size
    folios: list[list[int]] = []
    total: int | None = 0
    for word in np.frombuffer(array, np.uint64).tolist():
        at, folio_order = word & ~(page - 1), word & (page - 1)
        folios.append([at, folio_order])
        if not reader.survey.has_block(at, folio_order):
            reader.wrong(at, f"folio of order {folio_order} is not preserved as such")
        elif (
            total is not None
            and reader.survey.pages.written(at, page << folio_order)
            and reader.survey.spend(reader.part, at, page << folio_order)
        ):
            contents = reader.survey.pages.read(at, page << folio_order)
            total += int(np.frombuffer(contents, "<u2").sum(dtype=np.uint64))
        else:
            total = None
    result["folios"] = folios
    # A one's complement sum of 16-bit words, as csum_partial(): equal modulo 0xffff.
    result["csum_of_folios"] = None if total is None else total % 0xFFFF
    if total is not None and csum is not None and total % 0xFFFF != csum % 0xFFFF:
        reader.wrong(phys, f"csum is {csum % 0xFFFF:#x}, the folios have {total % 0xFFFF:#x}")
    return result


# ---- LUO of Linux 7.3 ----


def _record(kind: str, phys: int, raw: bytes, at: int = 0) -> dict[str, Any]:
    layout, names = STRUCTS[kind]
    values = [
        _text(value) if isinstance(value, bytes) else value for value in layout.unpack_from(raw, at)
    ]
    return {"type": kind, "phys": phys, **dict(zip(names, values, strict=True))}


def _luo(reader: _Reader, phys: int, blob: bytes) -> dict[str, Any] | None:
    layout, _ = STRUCTS["luo"]
    if len(blob) < layout.size:
        reader.wrong(phys, f"blob of {len(blob)} bytes, {layout.size} are needed: kernel panics")
        return None
    head = _record("luo", phys, blob)
    if blob[:8] != b"luo-v5\0\0":
        if head["compatible"] in LUO_OLDER and reader.survey.generation.name != "kho-v4":
            rule = f"{head['compatible']} is not decoded: only luo-v5 is"
            reader.survey.warnings.append(Violation(reader.part, phys, rule))
        else:
            reader.wrong(phys, f"compatible is {head['compatible']!r}, not 'luo-v5': kernel panics")
        return head
    names: set[str] = set()
    sessions: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    for block, count, raw in reader.blocks(head["sessions_pa"], 80, "sessions"):
        blocks.append(_record("block", block, raw))
        for i in range(count):
            at = 16 + 80 * i
            session = _record("session", block + at, raw, at)
            if not session["name"] or b"\0" not in raw[at : at + 64]:
                reader.wrong(block + at, "session's name is empty, or has no end")
            if session["name"] in names:
                reader.wrong(block + at, f"session {session['name']!r} stands twice")
            names.add(session["name"])
            sessions.append(session)
    held: dict[int, str] = {}
    for session in sessions:
        _session(reader, session, held)
    _check_folios(reader, sessions)
    flbs = _flbs(reader, head["flbs_pa"]) if head["flbs_pa"] else None
    return {**head, "blocks": blocks, "sessions": sessions, "flbs": flbs}


def _session(reader: _Reader, session: dict[str, Any], held: dict[int, str]) -> None:
    files: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    tokens: set[int] = set()
    name = session["name"]
    for block, count, raw in reader.blocks(session["files_pa"], 64, f"files of {name}"):
        blocks.append(_record("block", block, raw))
        for i in range(count):
            at = 16 + 64 * i
            seen = len(reader.survey.violations)
            record = _record("file", block + at, raw, at)
            what = f"{name}/{record['token']:#x}"
            if not record["compatible"] or b"\0" not in raw[at : at + 48]:
                reader.wrong(block + at, f"file {what}: compatible is empty, or has no end")
            if record["token"] in tokens:
                reader.wrong(block + at, f"file {what}: token stands twice")
            tokens.add(record["token"])
            if record["compatible"] == "memfd-v2":
                if record["data"] in held:
                    reader.wrong(record["data"], f"file {what}: is also {held[record['data']]}")
                else:
                    held[record["data"]] = what
                    record["memfd"] = _memfd(reader, record["data"], what)
            elif record["compatible"].startswith("luo-"):
                device = _device(reader, record["data"])
                if device is not None:
                    record["device"] = device
            wrong = reader.survey.violations[seen:]
            if wrong:
                record["wrong"] = [{"phys": v.phys, "rule": v.rule} for v in wrong]
            files.append(record)
    if session["count"] != len(files):
        reader.wrong(
            session["phys"], f"session {name} says {session['count']} files, and has {len(files)}"
        )
    session["files"], session["blocks"] = files, blocks


def _check_folios(reader: _Reader, sessions: list[dict[str, Any]]) -> None:
    """No memory is in two files: the kernel can restore it once."""
    holders = [
        (f"{session['name']}/{file['token']:#x}", [row[0] for row in file["memfd"]["folios"]])
        for session in sessions
        for file in session["files"]
        if file.get("memfd") and file["memfd"]["folios"]
    ]
    if not holders:
        return
    pfns = np.concatenate([np.array(rows, np.uint64) for _, rows in holders])
    ends = np.cumsum([len(rows) for _, rows in holders])
    order = np.argsort(pfns, kind="stable")
    for at in np.flatnonzero(pfns[order][1:] == pfns[order][:-1]).tolist():
        pair = order[at : at + 2].tolist()
        first, second = (holders[int(np.searchsorted(ends, n, "right"))][0] for n in pair)
        if first != second:  # within one file it was noted
            phys = int(pfns[pair[1]]) * reader.survey.ram.page_size
            reader.wrong(phys, f"file {second}: folio is also that of {first}", kind=second)


def _memfd(reader: _Reader, phys: int, what: str) -> dict[str, Any] | None:
    layout, _ = STRUCTS["memfd"]
    survey = reader.survey
    page = survey.ram.page_size
    shift = page.bit_length() - 1
    if not phys or phys % 8 or not survey.ram.contains(phys, layout.size):
        reader.wrong(phys, f"file {what}: its record is misaligned or not in RAM")
        return None
    if not survey.covered(phys, layout.size):
        reader.wrong(phys, f"file {what}: its record is not preserved")
    raw = reader.read(phys, layout.size, f"file {what}: its record")
    if raw is None:
        return None
    memfd = _record("memfd", phys, raw)
    if memfd["seals"] & ~_SEALS:
        reader.wrong(phys, f"file {what}: unknown seals {memfd['seals']:#x}")
    count, size = memfd["nr_folios"], memfd["size"]
    if not count:
        if any(memfd[name] for name in ("vmalloc_first", "vmalloc_pages")):
            reader.wrong(phys, f"file {what}: no folios, but a vmalloc area")
        if size:
            reader.wrong(phys, f"file {what}: {size} bytes and no folios")
        return memfd | {"vmalloc": None, "folios": []}
    order = memfd["vmalloc_order"]
    found = reader.vmalloc(
        phys, memfd["vmalloc_first"], memfd["vmalloc_pages"], order, f"file {what}"
    )
    memfd["vmalloc"] = found
    array = reader.array(phys, found, order, 16 * count, f"file {what}: folios")
    memfd["folios"] = []
    if array is None:
        return memfd
    words = np.frombuffer(array, np.uint64).reshape(-1, 2)
    at = (words[:, 0] & np.uint64((1 << 52) - 1)) << np.uint64(shift)
    flags = words[:, 0] >> np.uint64(52)
    index = words[:, 1]
    orders = survey.orders_at(at)
    for place in np.flatnonzero(orders < 0)[:1000].tolist():
        reader.wrong(int(at[place]), f"file {what}: folio {place} is not preserved", kind=what)
    if (flags > 3).any():
        reader.wrong(phys, f"file {what}: unknown flags of a folio")
    nr_pages = np.uint64(1) << np.maximum(orders, 0).astype(np.uint64)
    if (index % nr_pages).any():
        place = int(np.flatnonzero(index % nr_pages)[0])
        reader.wrong(int(at[place]), f"file {what}: folio {place} has a misaligned index")
    by_index = np.argsort(index, kind="stable")
    ends = index[by_index] + nr_pages[by_index]
    if (index[by_index][1:] < ends[:-1]).any():
        place = int(by_index[int(np.flatnonzero(index[by_index][1:] < ends[:-1])[0]) + 1])
        reader.wrong(int(at[place]), f"file {what}: folio {place} covers what another does")
    if (index > np.uint64(max(size - 1, 0) >> shift)).any():
        place = int(np.flatnonzero(index > np.uint64(max(size - 1, 0) >> shift))[0])
        reader.wrong(int(at[place]), f"file {what}: folio {place} begins behind the file's end")
    if len(np.unique(at)) != len(at):
        reader.wrong(phys, f"file {what}: two folios are the same memory")
    columns = (at >> np.uint64(shift), flags, index, orders.astype(np.int64))
    memfd["folios"] = [list(row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    return memfd


def _device(reader: _Reader, phys: int) -> dict[str, Any] | None:
    """A device of this library as a file (``luo.device_files``); None if it is something else.

    Its handlers share their name's form with others', whose u64 is no such address.
    """
    survey = reader.survey
    layout, names = STRUCTS["device"]
    order = survey.order_at(phys)
    if not phys or order is None or not survey.pages.written(phys, layout.size):
        return None
    raw = reader.read(phys, layout.size, "device record")
    if raw is None:
        return None
    path, bus, _, slot, bus_slot = values = layout.unpack(raw)
    end = layout.size + path + bus
    for nbytes in (slot, bus_slot):
        end = -(-end // 8) * 8 + nbytes
    if not path or end > survey.ram.page_size << order:
        return None
    text = reader.read(phys + layout.size, path + bus, "device record")
    try:
        path_text, bus_text = (text or b"")[:path].decode(), (text or b"")[path:].decode()
    except UnicodeDecodeError:
        return None
    return {
        "type": "device",
        "phys": phys,
        **dict(zip(names, values, strict=True)),
        "nbytes": end,
        "path": path_text,
        "bus": bus_text,
    }


def _flbs(reader: _Reader, phys: int) -> dict[str, Any] | None:
    page = reader.survey.ram.page_size
    layout, _ = STRUCTS["flb"]
    raw = reader.page(phys, "page of FLBs")
    if raw is None:
        return None
    head = _record("flbs", phys, raw)
    capacity = (page - 16) // layout.size
    if head["count"] > capacity:
        reader.wrong(phys, f"{head['count']} FLBs, above {capacity}")
    records: list[dict[str, Any]] = []
    names: set[str] = set()
    for i in range(min(head["count"], capacity)):
        at = 16 + layout.size * i
        flb = _record("flb", phys + at, raw, at)
        if not flb["name"] or b"\0" not in raw[at : at + 48] or flb["name"] in names:
            reader.wrong(phys + at, f"FLB {flb['name']!r}: no name, no end of it, or stands twice")
        names.add(flb["name"])
        records.append(flb)
    return {**head, "flbs": records}


# ---- this library's ----


def _orchestrator(reader: _Reader, phys: int, blob: bytes) -> dict[str, Any] | None:
    tree = reader.tree(phys, blob)
    if tree is None:
        return None
    result = {"tree": tree_rows(tree), **_orchestrator_node(reader, phys, tree.root)}
    for node in tree.root.children:
        if node.name == "devices":
            numbers = {
                name: reader.number(phys, node, name)
                for name in _abi.LUO_DEVICES_PROPERTIES
                if name != "nodes" or name in node
            }
            if numbers.get("nodes"):
                result["nodes"] = _nodes(reader, numbers["nodes"] or 0)
            shards = _extents(reader, numbers["records"] or 0, "records")
            slabs = _extents(reader, numbers["slabs"] or 0, "slabs")
            records: list[dict[str, Any]] = []
            for shard in shards["extents"]:
                records += _shard(reader, shard)
            _check_devices(reader, phys, numbers["count"], records, slabs["extents"])
            result["devices"] = {
                **numbers,
                "record_shards": shards,
                "slot_slabs": slabs,
                "device_records": records,
            }
    return result


def _nodes(reader: _Reader, phys: int) -> dict[str, Any]:
    """The KHO nodes of devices, drivers and buses."""
    head = reader.read(phys, 8, "nodes")
    nbytes = 0 if head is None else int.from_bytes(head[4:], "big")
    if not 8 <= nbytes <= _BLOB_MAX:
        reader.wrong(phys, f"nodes of {nbytes:#x} bytes")
        return {"phys": phys, "nbytes": 0, "tree": []}
    if not reader.survey.covered(phys, nbytes):
        reader.wrong(phys, f"nodes: {nbytes:#x} bytes not preserved")
    blob = reader.read(phys, nbytes, "nodes")
    tree = None if blob is None else reader.tree(phys, blob)
    if tree is None:
        return {"phys": phys, "nbytes": nbytes, "tree": []}
    reader.compatible(phys, tree.root, _abi.LUO_NODES_COMPATIBLE)
    return {"phys": phys, "nbytes": nbytes, "tree": tree_rows(tree)}


def _orchestrator_node(reader: _Reader, phys: int, top: Node) -> dict[str, Any]:
    """What the blob and the inline node have in common."""
    result: dict[str, Any] = {}
    raw = bytes(top.get("version") or b"")
    if len(raw) != 8:
        reader.wrong(phys, f"version has {len(raw)} bytes, not 8")
    else:
        result["version"] = list(struct.unpack("<II", raw))
        major, minor = result["version"]
        if major != _abi.LUO_VERSION[0] or minor > _abi.LUO_VERSION[1]:
            reader.wrong(phys, f"version {major}.{minor} is not known: the next kernel panics")
    for node in top.children:
        if node.name == "subsystems":
            result["subsystems"] = {
                child.name: reader.number(phys, child, "data") for child in node.children
            }
    return result


def _orchestrator_inline(reader: _Reader, phys: int, tree: Fdt, top: Node) -> dict[str, Any]:
    result = _orchestrator_node(reader, phys, top)
    node = next((child for child in top.children if child.name == "devices"), None)
    if node is None:
        return result
    layout, names = STRUCTS["extent"]
    count = reader.number(phys, node, "count")
    raw = bytes(node.get("slabs") or b"")
    if len(raw) % layout.size:
        reader.wrong(phys, f"slabs of {len(raw)} bytes are not whole entries")
    slabs = [
        dict(zip(names, layout.unpack_from(raw, at), strict=True))
        for at in range(0, len(raw) - layout.size + 1, layout.size)
    ]
    for slab in slabs:
        if not reader.survey.covered(slab["phys"], slab["nbytes"]):
            reader.wrong(slab["phys"], f"slabs: {slab['nbytes']:#x} bytes not preserved")
    columns = tree.read_nodes(node.path, list(DEVICE_COLUMNS))
    records = _records(reader, phys, columns)
    _check_devices(reader, phys, count, records, slabs)
    result["devices"] = {"count": count, "slot_slabs": slabs, "device_records": records}
    return result


def _check_devices(
    reader: _Reader,
    phys: int,
    count: int | None,
    records: list[dict[str, Any]],
    slabs: list[dict[str, Any]],
) -> None:
    if count is not None and count != len(records):
        reader.wrong(phys, f"count is {count}, and {len(records)} devices have records")
    places = sorted((s["first"], s["count"], s["phys"], s["nbytes"]) for s in slabs)
    _check_slots(reader, records, places)


def _check_slots(
    reader: _Reader, records: list[dict[str, Any]], slabs: list[tuple[int, int, int, int]]
) -> None:
    holder: list[tuple[int, int] | None] = [None] * len(records)
    for first, count, phys, nbytes in slabs:
        if first + count > len(records):
            reader.wrong(phys, f"slab lists records {first}…{first + count} of {len(records)}")
        for i in range(first, min(first + count, len(records))):
            if holder[i] is not None:
                reader.wrong(phys, f"slab lists record {i}, which another lists", kind="slab twice")
                break
            holder[i] = (phys, phys + nbytes)
    paths: set[str] = set()
    for i, record in enumerate(records):
        if record["path"] in paths:
            reader.wrong(None, f"record {i}: {record['path']!r} stands twice", kind="path twice")
        paths.add(record["path"])
        for side in ("slot", "bus_slot"):
            at, nbytes = record[side]
            slab = holder[i]
            if nbytes and (slab is None or at < slab[0] or at + nbytes > slab[1]):
                rule = f"record {i}: {side} of {nbytes} bytes leaves its slab"
                reader.wrong(at, rule, kind="slot")


def _extents(reader: _Reader, head: int, what: str) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    extents: list[dict[str, Any]] = []
    layout, names = STRUCTS["extent"]
    for block, count, raw in reader.blocks(head, layout.size, what):
        blocks.append(_record("block", block, raw))
        for i in range(count):
            at = 16 + layout.size * i
            values = dict(zip(names, layout.unpack_from(raw, at), strict=True))
            extents.append({"type": "extent", "at": block + at, **values})
            if not reader.survey.covered(values["phys"], values["nbytes"]):
                reader.wrong(values["phys"], f"{what}: {values['nbytes']:#x} bytes not preserved")
    return {"blocks": blocks, "extents": extents}


def _shard(reader: _Reader, shard: dict[str, Any]) -> list[dict[str, Any]]:
    phys, nbytes = shard["phys"], shard["nbytes"]
    if nbytes > _BLOB_MAX:
        reader.wrong(phys, f"shard of {nbytes:#x} bytes: too large to be looked at")
        return []
    blob = reader.read(phys, nbytes, "shard")
    tree = None if blob is None else reader.tree(phys, blob)
    if tree is None:
        return []
    reader.compatible(phys, tree.root, _abi.LUO_DEVICES_COMPATIBLE)
    columns = tree.read_nodes("/", list(DEVICE_COLUMNS))
    if len(columns["path"]) != shard["count"]:
        rule = f"shard has {len(columns['path'])} records, not {shard['count']}"
        reader.wrong(phys, rule)
    return _records(reader, phys, columns)


def _records(reader: _Reader, phys: int, columns: dict[str, Column]) -> list[dict[str, Any]]:
    n = len(columns["path"])
    try:
        state = np.ascontiguousarray(columns["state"].fixed()).view(np.uint64).reshape(n, 4)
        index = np.ascontiguousarray(columns["index"].fixed()).view(np.uint64).reshape(n)
    except ValueError:
        reader.wrong(phys, "a record's state or index is missing, or not of its size")
        return []
    try:
        texts = {name: columns[name].strings() for name in ("path", "bus", "driver")}
    except ValueError:
        reader.wrong(phys, "a record's path, bus or driver is no text")
        return []
    has = {name: columns[name].present.tolist() for name in ("path", "bus", "driver")}
    if not all(has["path"]):
        reader.wrong(phys, "a record has no path")
    rows = zip(state.tolist(), index.tolist(), strict=True)
    return [
        {
            "path": texts["path"][i],
            "bus": texts["bus"][i] if has["bus"][i] else None,
            "driver": texts["driver"][i] if has["driver"][i] else None,
            "index": number,
            "slot": slots[:2],
            "bus_slot": slots[2:],
        }
        for i, (slots, number) in enumerate(rows)
    ]


_KNOWN: Final[dict[str, Callable[[_Reader, int, bytes], dict[str, Any] | None]]] = {
    _abi.KHO_SUBTREE_METADATA: _metadata,
    "memblock": _memblock,
    "kho_test": _kho_test,
    "LUO": _luo,
    _abi.LUO_NODE: _orchestrator,
}
