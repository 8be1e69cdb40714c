"""Guest memory written by hand, from the specification alone: with sessions of Linux' LUO in it.

Pages come from ``kho_builder``; this puts LUO's records, memfds and a device tree into them, and
the whole into the files that QEMU writes.
"""

import struct
from pathlib import Path

from kho_builder import Builder, flatten

PAGE = 4096
MIB = 1 << 20


class Guest:
    """A guest's memory after the jump: handover, device tree, sessions.

    Attributes:
        base, size: its RAM.
        builder: pages of the handover.
        sessions: name to ``[(token, handler, data), ...]``.
        flbs: ``[(name, data, count), ...]``.
    """

    def __init__(self, base=0x4000_0000, size=64 * MIB, abi="kho-v4", page_shift=12):
        self.base, self.size = base, size
        self.page = 1 << page_shift
        self.builder = Builder(base + 2 * MIB, page_shift=page_shift, abi=abi)
        self.folios = base + 32 * MIB  # where data is put
        self.sessions: dict[bytes, list[tuple[int, bytes, int]]] = {}
        self.flbs: list[tuple[bytes, int, int]] = []
        self.luo = b"luo-v5"
        self.kexec_count = 1
        self.subtrees: dict[str, tuple[int, int]] = {}
        self.ranges = [(base, size)]
        self.scratch = [
            (base + 16 * MIB, 4 * MIB),
            (base + 24 * MIB, 0),
            (base + 24 * MIB, 4 * MIB),
        ]

    def folio(self, data: bytes, order: int = 0) -> int:
        """A preserved block with *data* in it."""
        nbytes = self.page << order
        self.folios = -(-self.folios // nbytes) * nbytes
        phys = self.folios
        self.folios += nbytes
        padded = data.ljust(nbytes, b"\0")
        for at in range(0, nbytes, self.page):
            self.builder.pages[phys + at] = bytearray(padded[at : at + self.page])
        self.builder.preserve(phys, order)
        return phys

    def vmalloc(self, data: bytes) -> bytes:
        """The descriptor of a preserved area with *data* (§6)."""
        pages = [
            self.builder.blob(data[at : at + self.page]) for at in range(0, len(data), self.page)
        ]
        room = self.page // 8 - 1
        chunks = [self.builder.blob(b"") for _ in range(len(pages) // room + 1)]
        for i, chunk in enumerate(chunks):
            words = [chunks[i + 1] if i + 1 < len(chunks) else 0]
            words += pages[i * room : (i + 1) * room]
            struct.pack_into(f"<{len(words)}Q", self.builder.pages[chunk], 0, *words)
        return struct.pack("<QIHH", chunks[0], len(pages), 1, 0)

    def memfd(self, folios, size, pos=0, seals=0) -> int:
        """A record of a memfd; *folios*: ``[(phys, flags, index), ...]``."""
        area = bytes(16)
        if folios:
            area = self.vmalloc(
                b"".join(
                    struct.pack("<QQ", phys // self.page | flags << 52, index)
                    for phys, flags, index in folios
                )
            )
        return self.builder.blob(struct.pack("<QQIIQ", pos, size, seals, 0, len(folios)) + area)

    def add(self, session: bytes, token: int, data: bytes, pos=0, seals=0, order=0) -> None:
        """A memfd with *data* in a session."""
        nbytes = self.page << order
        folios = [
            (self.folio(data[at : at + nbytes], order), 3, at // self.page)
            for at in range(0, len(data), nbytes)
        ]
        record = self.memfd(folios, len(data), pos, seals)
        self.sessions.setdefault(session, []).append((token, b"memfd-v2", record))

    def blocks(self, entries: list[bytes], size: int) -> int:
        """A chain of serialization blocks (§10.1)."""
        room = (self.page - 16) // size
        parts = [entries[i : i + room] for i in range(0, len(entries), room)]
        pages = [self.builder.blob(b"") for _ in parts]
        for i, part in enumerate(parts):
            after = pages[i + 1] if i + 1 < len(pages) else 0
            block = struct.pack("<QQ", after, len(part)) + b"".join(part)
            self.builder.pages[pages[i]][: len(block)] = block
        return pages[0] if pages else 0

    def finish(self) -> dict[int, bytearray]:
        """Return all pages, address to contents."""
        records = []
        for name, files in self.sessions.items():
            entries = [struct.pack("<48sQQ", kind, data, token) for token, kind, data in files]
            records.append(struct.pack("<64sQQ", name, self.blocks(entries, 64), len(files)))
        flbs = 0
        if self.flbs:
            listed = b"".join(struct.pack("<48sQQ", *flb) for flb in self.flbs)
            flbs = self.builder.blob(struct.pack("<QQ", 1, len(self.flbs)) + listed)
        head = struct.pack("<8sQQQ", self.luo, 1, self.blocks(records, 80), flbs)
        self.head = self.builder.blob(head)
        metadata = struct.pack("<I65sI", 1, b"7.3.4", self.kexec_count)
        self.subtrees |= {
            "LUO": (self.head, 32),
            "kexec-metadata": (self.builder.blob(metadata), len(metadata)),
        }
        self.builder.finish(self.subtrees)
        self.array = self.scratch[0][0]
        self.builder.scratch(self.array, self.scratch)
        return self.builder.pages

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """The handover."""
        return self.builder.fdt, self.page, self.array, 16 * len(self.scratch)

    def device_tree(self) -> bytes:
        """What the next kernel is told (§9.2)."""
        fdt, fdt_len, array, array_len = self.numbers
        children = {
            "chosen": {
                "linux,kho-fdt": struct.pack(">QQ", fdt, fdt_len),
                "linux,kho-scratch": struct.pack(">QQ", array, array_len),
            }
        }
        for start, nbytes in self.ranges:
            children[f"memory@{start:x}"] = {
                "device_type": b"memory\0",
                "reg": struct.pack(">QQ", start, nbytes),
            }
        cells = struct.pack(">I", 2)
        return flatten({"#address-cells": cells, "#size-cells": cells}, children)


def write_raw(path: Path, pages: dict[int, bytes], base: int, size: int) -> Path:
    """A raw file as ``pmemsave`` writes it, sparse."""
    with path.open("wb") as file:
        file.truncate(size)
        for phys, data in pages.items():
            file.seek(phys - base)
            file.write(data)
    return path


def write_elf(path: Path, pages: dict[int, bytes], segments, *, xnum=False, edit=None) -> Path:
    """An ELF core; *segments*: ``[(phys, filesz, memsz), ...]``; *edit*: changes its headers."""
    count = len(segments)
    offset = 64 + 56 * count + (64 if xnum else 0) + 37
    headers = bytearray(offset)
    ident = b"\x7fELF\2\1\1" + bytes(9)
    struct.pack_into(
        "<16sHHIQQQIHHHHHH", headers, 0, ident, 4, 183, 1, 0, 64, 64 + 56 * count if xnum else 0,
        0, 64, 56, 0xFFFF if xnum else count, 64 if xnum else 0, 1 if xnum else 0, 0,
    )  # fmt: skip
    if xnum:
        struct.pack_into("<I", headers, 64 + 56 * count + 44, count)
    at, places = offset, []
    for i, (phys, filesz, memsz) in enumerate(segments):
        known = next((o for p, n, o in places if p <= phys and phys + filesz <= p + n), None)
        here = at if known is None else known + phys - next(p for p, _, o in places if o == known)
        struct.pack_into(
            "<IIQQQQQQ", headers, 64 + 56 * i, 1, 0, here, 0xFFFF_0000_0000_0000 + phys, phys,
            filesz, memsz, 0,
        )  # fmt: skip
        places.append((phys, filesz, here))
        at += filesz if known is None else 0
    if edit:
        edit(headers)
    with path.open("wb") as file:
        file.truncate(at)
        file.write(headers)
        for phys, data in pages.items():
            for start, nbytes, here in places:
                if start <= phys < start + nbytes:
                    file.seek(here + phys - start)
                    file.write(data)
    return path
