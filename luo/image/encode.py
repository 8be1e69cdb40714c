"""From a document back to an image: for making images by hand, wrong ones included.

What was not edited gives the bytes that were there. Where the meaning of something was edited
(blocks of the map, nodes of the root tree, records of a blob), its bytes are written anew; an
edit of ``contents`` counts too, as long as the same was not edited in both. Nothing is checked but
that it can be written: what is wrong in the document is wrong in the image.

Editable: ``abi``, ``bugs``, ``memory``, ``handover``; ``root.phys`` and ``root.nodes``;
``scratch``; ``map.phys``, ``map.blocks``, ``map.illegal_keys``, ``map.pages`` (a page's address:
it is moved); of a subtree ``phys``, ``nbytes``, every record in ``decoded`` that has a ``type``,
arrays of folios, and ``tree``; ``contents``; ``extents``. What is derived from these (summaries,
violations) is not read.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from luo import abi as _abi
from luo.errors import HandoverError
from luo.fdt import FdtWriter
from luo.image.document import describe
from luo.image.formats import STRUCTS
from luo.image.store import Extent, Image, Ram
from luo.kho import Handover

__all__ = ["encode"]

_BLOB_ROOM: Final = 1 << 30
_DEPTH_MAX: Final = 1 << 12


class _Sheet:
    """Pages that are being written."""

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        self.pages: dict[int, bytearray] = {}

    def write(self, phys: int, data: bytes) -> None:
        """Write *data*; pages that are not there yet begin as zeros."""
        size = self.ram.page_size
        if not self.ram.contains(phys, len(data)):
            raise HandoverError(f"{len(data):#x} bytes cannot be written: not in RAM", phys)
        at = 0
        while at < len(data):
            start = (phys + at) % size
            page = self.pages.setdefault(phys + at - start, bytearray(size))
            part = data[at : at + size - start]
            page[start : start + len(part)] = part
            at += len(part)

    def extents(self) -> Iterator[Extent]:
        """Yield the pages, adjoining ones as one extent."""
        size = self.ram.page_size
        run: list[int] = []
        for phys in sorted(self.pages):
            if run and phys != run[-1] + size:
                yield self._extent(run)
                run = []
            run.append(phys)
        if run:
            yield self._extent(run)

    def _extent(self, run: list[int]) -> Extent:
        data = b"".join(self.pages[phys] for phys in run)
        return Extent(run[0], len(data), data)


def encode(document: Any, *, source: Image | None = None) -> Image:
    """Return the image that *document* describes.

    Args:
        document: as :func:`luo.image.document.describe` makes it, edited.
        source: has the pages that are not in the document; None: what its ``source`` names.

    Raises:
        ValueError: it is no such document, or something in it cannot be written: it names that.
        HandoverError: an address is not in RAM.
        OSError: the source cannot be read.
    """
    try:
        return _Encoder(document, source).image()
    except (
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
        binascii.Error,
    ) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"document cannot be encoded: {what}") from error


def number(value: object, name: str = "number") -> int:
    """Return a number given as such or as text in any base."""
    if isinstance(value, str):
        value = int(value, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ValueError(f"{name} {value!r}: not a number of 64 bits")
    return value


class _Encoder:
    def __init__(self, document: Any, source: Image | None) -> None:
        if not isinstance(document, dict) or document.get("format") != "luo-image":
            raise ValueError("not a document of an image: see 'luo image inspect --json'")
        if document.get("version") != 1:
            raise ValueError(f"document of version {document.get('version')!r}: only 1 is known")
        self.document = document
        self.page = number(document["page_size"], "page_size")
        memory = document["memory"]
        self.ranges = [
            (number(r["start"]), number(r["nbytes"]), number(r.get("node", 0))) for r in memory
        ]
        self.ram = Ram(self.ranges, self.page)
        self.abi = str(document["abi"])
        self.generation = _abi.generation(self.abi)
        self.bugs = list(document.get("bugs", ()))
        self.source = source
        self.sheet = _Sheet(self.ram)
        self.holes: list[Extent] = []

    # ---- pages ----

    def image(self) -> Image:
        self._lay_down_contents()
        handover = self.document["handover"]
        four = Handover(
            *(
                number(handover[k], k)
                for k in ("fdt_phys", "fdt_len", "scratch_phys", "scratch_len")
            )
        )
        before = self._before(four)
        self._scratch()
        self._root(before)
        self._map(before)
        self._records(before)
        return self._finish(four)

    def _lay_down_contents(self) -> None:
        for part in self.document.get("contents", ()):
            data = base64.b64decode(part["base64"], validate=True)
            self.sheet.write(number(part["phys"], "contents"), data)

    def _before(self, four: Handover) -> dict[str, Any]:
        """Return the document of what the contents say, before any other edit is applied."""
        root = self.document.get("root")
        where = number(root["phys"]) if root else four.fdt_phys
        scratch = self.document["scratch"]
        image = Image(
            self.ranges,
            Handover(where, four.fdt_len, number(scratch["phys"]), 16 * len(scratch["areas"])),
            self.sheet.extents(),
            abi=self.abi,
            bugs=self.bugs,
            page_size=self.page,
        )
        return describe(image, contents=False)

    def _finish(self, four: Handover) -> Image:
        own = list(self.sheet.extents())
        extents = list(own)
        for phys, nbytes, kind in self.document["extents"]:
            for start, end in _gaps(number(phys), number(phys) + number(nbytes), own):
                if kind == "hole":
                    extents.append(Extent(start, end - start, None))
                else:
                    extents += self._from_source(start, end)
        return Image(
            self.ranges,
            four,
            extents,
            abi=self.abi,
            bugs=self.bugs,
            page_size=self.page,
            source=str(self.document.get("source", "")),
        )

    def _from_source(self, start: int, end: int) -> Iterator[Extent]:
        if self.source is None:
            name = self.document.get("source")
            if not name:
                raise ValueError(f"page {start:#x} is not in the document, which names no source")
            if not Path(name).exists():
                raise ValueError(f"page {start:#x} is in {name}, which is not there; see --source")
            self.source = Image.load(name)
        if not self.source.kept(start, end - start):
            raise HandoverError(f"page is neither in the document nor in {self.source!r}", start)
        return self.source.pieces(start, end)

    # ---- scratch, root tree ----

    def _scratch(self) -> None:
        scratch = self.document["scratch"]
        array = b"".join(
            _abi.KHO_SCRATCH_SER.pack(number(phys), number(nbytes))
            for phys, nbytes in scratch["areas"]
        )
        if array:
            self.sheet.write(number(scratch["phys"], "scratch"), array)

    def _root(self, before: dict[str, Any]) -> None:
        root = self.document.get("root")
        if root is None:
            return
        nodes = [dict(row) for row in root["nodes"]]
        self._move_subtrees(nodes, before)
        self._move_map(nodes, before)
        old = before["root"]
        if old is not None and nodes == old["nodes"]:
            return
        self.sheet.write(number(root["phys"], "root.phys"), _tree(nodes, self._room(old)))

    @staticmethod
    def _room(old: dict[str, Any] | None) -> int:
        return int(old["totalsize"]) if old else 0

    def _move_subtrees(self, nodes: list[dict[str, Any]], before: dict[str, Any]) -> None:
        """Put an edited phys or nbytes of a subtree into its node of the root tree."""
        old = {subtree["name"]: subtree for subtree in before["subtrees"]}
        for subtree in self.document.get("subtrees", ()):
            known = old.get(subtree["name"])
            for key, name in (
                ("phys", self.generation.data_property),
                ("nbytes", self.generation.size_property),
            ):
                if known is None or name is None or subtree[key] == known[key]:
                    continue
                for row in nodes:
                    if row.get("depth") == 1 and row["name"] == subtree["name"]:
                        row["properties"] = [
                            [n, {"u64": subtree[key]} if n == name else v]
                            for n, v in row["properties"]
                        ]

    def _move_map(self, nodes: list[dict[str, Any]], before: dict[str, Any]) -> None:
        generation, wanted = self.generation, self.document["map"]["phys"]
        if number(wanted) == number(before["map"]["phys"]):
            return
        for row in nodes:
            here = (row["depth"], row["name"])
            if here == ((1, generation.map_node) if generation.map_node else (0, "")):
                row["properties"] = [
                    [n, {"u64": wanted} if n == generation.map_property else v]
                    for n, v in row["properties"]
                ]

    # ---- map ----

    def _map(self, before: dict[str, Any]) -> None:
        new, old = self.document["map"], before["map"]
        if all(new[key] == old[key] for key in ("phys", "blocks", "illegal_keys", "pages")):
            return
        from luo.image.maps import write_chunks, write_radix

        blocks = [(number(phys, "block"), number(order)) for phys, order in new["blocks"]]
        pages = [
            (str(kind), number(phys, "map page"), number(level), number(prefix))
            for kind, phys, level, prefix, *_ in new["pages"]
        ]
        for kind, phys, level, _ in pages:  # forget what they held
            top = kind != "bitmap"
            self.sheet.write(phys, bytes(self.page if top else self._bitmap()))
            del level
        spare = self._spare(blocks)
        if self.generation.bitmap_bytes is None:
            keys = [number(key, "illegal key") for key, _ in new["illegal_keys"]]
            geometry = self.generation.radix_geometry(self.page, self.bugs)
            root = number(new["phys"], "map.phys")
            write_radix(self.sheet.write, geometry, self.page, root, blocks, keys, pages, spare)
        else:
            head = number(new["phys"], "map.phys")
            write_chunks(self.sheet.write, self.generation, self.page, head, blocks, pages, spare)

    def _bitmap(self) -> int:
        return self.generation.bitmap_size(self.page)

    def _spare(self, blocks: list[tuple[int, int]]) -> Iterator[int]:
        """Yield pages that nothing uses, from the top of RAM down."""
        taken = [(phys, phys + (self.page << min(order, 51))) for phys, order in blocks]
        for phys, nbytes in self.document["scratch"]["areas"]:
            taken.append((number(phys), number(phys) + number(nbytes)))
        for phys, nbytes, _ in self.document["extents"]:
            taken.append((number(phys), number(phys) + number(nbytes)))
        taken.sort()
        starts = np.array([start for start, _ in taken], np.uint64)
        reach = np.maximum.accumulate(np.array([end for _, end in taken] or [], np.uint64))
        for start, end in reversed(self.ram.runs):
            at = end - self.page
            while at >= max(start, self.page):
                before = int(np.searchsorted(starts, np.uint64(at + self.page - 1), "right")) - 1
                if before >= 0 and int(reach[before]) > at:
                    at = int(starts[before]) // self.page * self.page - self.page
                elif at in self.sheet.pages:
                    at -= self.page
                else:
                    yield at
                    at -= self.page

    # ---- blobs ----

    def _records(self, before: dict[str, Any]) -> None:
        old = {subtree["name"]: subtree for subtree in before["subtrees"]}
        for subtree in self.document.get("subtrees", ()):
            known = old.get(subtree["name"])
            new_value = subtree.get("decoded")
            old_value = known.get("decoded") if known else None
            if not new_value or new_value == old_value:
                continue
            if "tree" in new_value and new_value["tree"] != (old_value or {}).get("tree"):
                if subtree["phys"] is None:
                    raise ValueError(f"subtree {subtree['name']}: edit root.nodes, it is inline")
                blob = _tree(new_value["tree"], number(subtree["nbytes"] or 0))
                self.sheet.write(number(subtree["phys"], subtree["name"]), blob)
            self._walk(new_value, old_value)

    def _walk(self, new: Any, old: Any) -> None:
        """Write back each record that differs."""
        stack: list[tuple[Any, Any]] = [(new, old)]
        while stack:
            value, before = stack.pop()
            if value == before:
                continue
            if isinstance(value, dict):
                before = before if isinstance(before, dict) else {}
                self._record(value, before)
                stack += [(item, before.get(key)) for key, item in value.items() if key != "tree"]
            elif isinstance(value, list):
                before = before if isinstance(before, list) else []
                stack += [
                    (item, before[i] if i < len(before) else None) for i, item in enumerate(value)
                ]

    def _record(self, value: dict[str, Any], before: dict[str, Any]) -> None:
        kind = value.get("type")
        if kind not in STRUCTS:
            return
        layout, names = STRUCTS[kind]
        where = number(value["at"] if kind == "extent" else value["phys"], kind)
        same = all(value.get(name) == before.get(name) for name in names)
        if not same or value.get("phys") != before.get("phys"):
            fields: list[bytes | int] = []
            for name, code in zip(names, _codes(layout.format), strict=True):
                item = value[name]
                if code.endswith("s"):
                    fields.append(str(item).encode(errors="surrogateescape"))
                else:
                    fields.append(_fits(number(item, f"{kind}.{name}"), code, f"{kind}.{name}"))
            self.sheet.write(where, layout.pack(*fields))
        if kind == "chunk" and value["entries"] != before.get("entries"):
            room = self.page // 8 - 1
            entries = [number(entry, "entry") for entry in value["entries"]]
            if len(entries) > room:
                raise ValueError(f"vmalloc chunk {where:#x}: {len(entries)} entries, above {room}")
            array = np.array(entries + [0] * (room - len(entries)), np.uint64)
            self.sheet.write(where + 8, array.tobytes())
        if kind == "memfd" and value.get("folios") != before.get("folios"):
            self._folios(value)

    def _folios(self, memfd: dict[str, Any]) -> None:
        words = np.array(
            [
                [number(pfn, "pfn") | number(flags, "flags") << 52, number(index, "index")]
                for pfn, flags, index, *_ in memfd["folios"]
            ],
            np.uint64,
        ).tobytes()
        size = self.page << number(memfd["vmalloc_order"])
        pages = [number(page, "page") for page in (memfd["vmalloc"] or {}).get("pages", ())]
        if len(words) > size * len(pages):
            raise ValueError(f"memfd {memfd['phys']}: its pages have no room for so many folios")
        for i in range(0, len(words), size):
            self.sheet.write(pages[i // size], words[i : i + size])


def _fits(value: int, code: str, name: str) -> int:
    if value >> {"Q": 64, "I": 32, "H": 16}[code]:
        raise ValueError(f"{name} {value:#x}: too large for its field")
    return value


def _codes(text: str) -> list[str]:
    """Split a struct's format: ``"<8sQQ"`` gives ``["8s", "Q", "Q"]``."""
    codes, digits = [], ""
    for char in text.lstrip("<="):
        if char.isdigit():
            digits += char
        elif char == "s":
            codes.append(digits + char)
            digits = ""
        else:
            codes += [char] * int(digits or 1)
            digits = ""
    return codes


def _gaps(start: int, end: int, extents: list[Extent]) -> Iterator[tuple[int, int]]:
    """Yield what of [start, end) is in none of the sorted *extents*."""
    low, high = 0, len(extents)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if extents[middle].end <= start else (low, middle)
    for i in range(low, len(extents)):
        if extents[i].phys >= end:
            break
        if extents[i].phys > start:
            yield start, extents[i].phys
        start = max(start, extents[i].end)
    if start < end:
        yield start, end


def _tree(rows: list[dict[str, Any]], room: int) -> bytes:
    """Return a tree given as rows; *room*: bytes to fill up with zeros."""
    writer = FdtWriter()
    depth = -1
    for row in rows:
        if row.get("more"):
            raise ValueError("a tree is too large to be edited: it does not stand whole here")
        here = number(row["depth"], "depth")
        if here > depth + 1 or here > _DEPTH_MAX or (depth >= 0 and here == 0):
            raise ValueError(f"node {row['name']!r}: depth {here} after {depth}")
        for _ in range(depth - here + 1):
            writer.end_node()
        writer.begin_node(row["name"])
        for name, value in row["properties"]:
            writer.property(name, _value(value))
        depth = here
    for _ in range(depth + 1):
        writer.end_node()
    return bytes(writer.finish()).ljust(min(room, _BLOB_ROOM), b"\0")


def _value(value: dict[str, Any]) -> bytes:
    """Return a property's bytes; see :func:`luo.image.formats.value_of`."""
    if "strings" in value:
        return b"".join(
            str(text).encode(errors="surrogateescape") + b"\0" for text in value["strings"]
        )
    if "u64" in value:
        return number(value["u64"]).to_bytes(8, "little")
    if "u32" in value:
        return number(value["u32"]).to_bytes(4, "little")
    if "cells" in value:
        return b"".join(number(cell).to_bytes(4, "big") for cell in value["cells"])
    return bytes.fromhex(value["hex"])
