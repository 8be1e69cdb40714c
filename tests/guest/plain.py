"""Writes a shape from the specification alone (kho-abi 5, 6, 10; luo-mainline 4.5).

Nothing of luo is in it but the class that holds pages: if what luo writes and what this writes both
come back from a real kernel, each confirms the other.
"""

from __future__ import annotations

import struct

from kho_builder import Builder
from shapes import FLBS, MIB, PAGE, File, Shape

from luo.image import Extent, Image
from luo.kho import Handover

SESSIONS_IN_BLOCK = 51
FILES_IN_BLOCK = 63
CHUNK = 511  # addresses
DIRTY_UPTODATE = 3
SCRATCH = ((0x50000000, 64 * MIB),)


class Writer:
    """Pages and folios of a handover that is being written.

    Attributes:
        pages: everything but file contents.
        extents: file contents.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.pages = Builder(shape.structures)
        self.extents: list[Extent] = []
        self._data = shape.data

    def folio(self, order: int, content: bytes) -> int:
        """A preserved folio."""
        nbytes = PAGE << order
        phys = -(-self._data // nbytes) * nbytes
        self._data = phys + nbytes
        self.pages.preserve(phys, order)
        self.extents.append(Extent(phys, nbytes, content.ljust(nbytes, b"\0")))
        return phys

    def vmalloc(self, content: bytes) -> bytes:
        """A preserved area of single pages; its descriptor (kho-abi 6)."""
        parts = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
        listed = [self.pages.blob(part) for part in parts]
        chunks = [self.pages.blob(b"") for _ in range(len(listed) // CHUNK + 1)]
        for i, chunk in enumerate(chunks):
            after = chunks[i + 1] if i + 1 < len(chunks) else 0
            here = listed[i * CHUNK : (i + 1) * CHUNK]
            struct.pack_into(f"<{1 + len(here)}Q", self.pages.pages[chunk], 0, after, *here)
        return struct.pack("<QIHH", chunks[0], len(listed), 1, 0)

    def blocks(self, entries: list[bytes], capacity: int) -> int:
        """A chain of blocks; address of the first (kho-abi 10.1)."""
        groups = [entries[at : at + capacity] for at in range(0, len(entries), capacity)]
        after = 0
        for group in reversed(groups):
            after = self.pages.blob(struct.pack("<QQ", after, len(group)) + b"".join(group))
        return after

    def memfd(self, file: File) -> int:
        """A memfd's record, with its folios."""
        records = []
        step = 1 << file.order
        for index in range(0, 0 if file.nothing else file.nr_pages, step):
            if all(page in file.holes for page in range(index, min(index + step, file.nr_pages))):
                continue
            part = file.content[index * PAGE : (index + step) * PAGE]
            pfn = self.folio(file.order, part) // PAGE
            records.append(struct.pack("<QQ", pfn | DIRTY_UPTODATE << 52, index))
        records += [bytes(16)] * (file.records - len(records))
        area = self.vmalloc(b"".join(records)) if records else bytes(16)
        head = struct.pack("<QQIIQ", file.pos, file.size, file.seals, 0, len(records))
        return self.pages.blob(head + area)

    def luo(self) -> int:
        """LUO's blob."""
        sessions = []
        for name, files in self.shape.sessions.items():
            rows = [struct.pack("<48sQQ", b"memfd-v2", self.memfd(f), f.token) for f in files]
            chain = self.blocks(rows, FILES_IN_BLOCK)
            sessions.append(struct.pack("<64sQQ", name, chain, len(files)))
        sessions_pa = self.blocks(sessions, SESSIONS_IN_BLOCK)
        count = self.shape.nr_files
        flbs_pa = 0
        if self.shape.flbs and count:
            rows = [struct.pack("<48sQQ", name.encode(), data, count) for name, data in FLBS]
            flbs_pa = self.pages.blob(struct.pack("<QQ", 1, len(rows)) + b"".join(rows))
        return self.pages.blob(
            struct.pack("<8sQQQ", b"luo-v5", self.shape.number, sessions_pa, flbs_pa)
        )

    def image(self) -> Image:
        """The whole handover."""
        shape, pages = self.shape, self.pages
        subtrees = {"LUO": (self.luo(), 32)}
        if shape.metadata:
            blob = struct.pack("<I65sI", 1, b"plain", 1)
            subtrees["kexec-metadata"] = (pages.blob(blob), len(blob))
        pages.finish(subtrees)
        areas = shape.scratch or SCRATCH
        array = shape.array or next(start for start, size in areas if size)
        nbytes = pages.scratch(array, areas)
        extents = [Extent(phys, PAGE, bytes(page)) for phys, page in pages.pages.items()]
        return Image(
            shape.ranges,
            Handover(pages.fdt, PAGE, array, nbytes),
            [*extents, *self.extents],
            source=f"plain {shape.name}",
        )


def write(shape: Shape) -> Image:
    """The handover of *shape*."""
    return Writer(shape).image()
