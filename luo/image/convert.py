"""One generation's image as another's.

Map, root tree and references are written anew by :class:`luo.kho.Kho`; every preserved page other
than the format's own (root tree, ``kexec-metadata``) stays where it is, as a block of the same
order. What the blobs hold is carried, not translated, as KHO knows nothing of it; but for this
library's ``liveupdate_orchestrator``, so that the other generation's kernel finds its devices.

kho-v5-series has no blobs, its users' data stands in the one tree. A blob that is a tree becomes
nodes there, with a property that says where the blob is, whose pages stay preserved; on the way
back that is used again. Nodes without it become a blob on new pages, with a property beside its
address that has them dropped on the way back. A third property, of the root, says where root tree
and ``kexec-metadata`` were if the generation has not got them. None means anything to a kernel.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from luo import abi as _abi
from luo.errors import FdtError, HandoverError, KhoError
from luo.fdt import Fdt, FdtEditor, FdtWriter, Node
from luo.image import orchestrator
from luo.image.store import Extent, Image
from luo.image.survey import Subtree, Survey
from luo.kho import Handover, Kho
from luo.kho_tree import KhoNode
from luo.memory import PhysicalMemory

__all__ = ["Rebuilding", "check_whole", "convert"]

BLOB_AT: Final = "luo,blob"  # in kho-v5-series: u64 phys and u64 bytes of the blob it was
WAS_INLINE: Final = "luo,inline"  # elsewhere, empty: the blob's pages were made by converting
OWN_AT: Final = "luo,own"  # of the root: u64 phys of the root tree and of kexec-metadata it had
_BLOB_AT: Final = struct.Struct("=QQ")
_OWN_AT: Final = struct.Struct("=QQ")
_FDT_MAGIC: Final = b"\xd0\x0d\xfe\xed"


def convert(image: Image, abi: str, *, drop: Collection[str] = ()) -> Image:
    """Return *image* in another generation's format.

    Args:
        image: one that breaks no rule.
        abi: name of the other generation.
        drop: names of subtrees to leave out; what they preserved stays preserved.

    Raises:
        ValueError: there is no such generation or subtree; or something that the generation cannot
            express: it names all of that.
        HandoverError: the image breaks a rule, or a page of a blob was not kept.
        KhoError: ENOMEM, E2BIG or EADDRNOTAVAIL if there is no room for what has to be written.
    """
    target = _abi.generation(abi)
    survey = image.survey
    check_whole(image, "convert")
    names = {subtree.name for subtree in survey.subtrees}
    for name in drop:
        if name not in names:
            raise ValueError(f"--drop {name}: the image has no such subtree")
    kept = [
        subtree
        for subtree in survey.subtrees
        if subtree.name not in drop and subtree.name != _abi.KHO_SUBTREE_METADATA
    ]
    refused = [reason for subtree in kept if (reason := _refuse(image, subtree, target))]
    if refused:
        raise ValueError(f"{abi} cannot express: {'; '.join(refused)}; see --drop")

    new = Rebuilding.begin(image, target)
    kho, places = new.kho, new.places
    kho.preserve_folios(new.phys, new.orders)
    made: list[str] = []
    for subtree in reversed(kept):  # each is put before the others
        if target.inline:
            _add_nodes(kho, subtree, image)
        elif _add_blob(kho, subtree, image):
            made.append(subtree.name)
    new.set_metadata()
    if target.inline:
        kho.add_prop(None, OWN_AT, places.pack())
    if target.finalize is not None:
        kho.finalize()
    handover = kho.handover()
    if not target.inline:
        _note(kho, {f"/{name}": (WAS_INLINE, b"") for name in made})
        if not target.metadata and places.metadata:
            _note(kho, {"/": (OWN_AT, places.pack())})
    return new.result(handover)


def check_whole(image: Image, what: str) -> None:
    """Raise HandoverError if the image breaks a rule."""
    for first in image.verify()[:1]:
        raise HandoverError(f"{what}: {first.part}: {first.rule}", first.phys)


@dataclass(slots=True)
class Rebuilding:
    """A fresh KHO in a copy of an image's memory, where all that was preserved has its place.

    Attributes:
        image: the image.
        kho: what nobody has preserved anything in yet.
        phys, orders: what *image* preserves beside the format's own root tree and metadata.
        places: where these two are.
        metadata: what the image has, or None.
    """

    image: Image
    kho: Kho
    phys: NDArray[np.uint64]
    orders: NDArray[np.uint8]
    places: Places
    metadata: _abi.KexecMetadata | None

    @classmethod
    def begin(cls, image: Image, target: _abi.Generation) -> Self:
        """Copy the memory and start over; KhoError if there is no room."""
        survey = image.survey
        own = _own_blocks(survey, target)
        keep = ~np.isin(survey.phys | survey.orders, np.array(sorted(own), np.uint64))
        memory = image.memory()
        for at, order in _natural_blocks(survey, own):
            memory.claim(at, order)
        metadata = _metadata(survey)
        places = Places.of(survey)
        places.hold(memory, survey)
        kho = Kho(
            memory,
            abi=target.name,
            scratch=survey.scratch,
            release=metadata.previous_release if metadata else "luo",
        )
        places.move_in(kho)
        return cls(image, kho, survey.phys[keep], survey.orders[keep], places, metadata)

    def set_metadata(self) -> None:
        """Write how often this was handed over: Kho counts from a cold boot."""
        if not self.kho.generation.metadata or self.metadata is None:
            return
        blob = self.metadata.pack()
        raw = self.kho.root.node(f"/{_abi.KHO_SUBTREE_METADATA}")
        phys = int.from_bytes(bytes(raw[self.kho.generation.data_property or ""]), "little")
        self.kho.memory.view(phys, len(blob))[:] = blob

    def result(self, handover: Handover) -> Image:
        """Return the new image, without pages that the old one did not have itself."""
        image, kho = self.image, self.kho
        new = Image.from_memory(kho.memory, handover, abi=kho.abi, source=image.source)
        return Image(
            image.ram.ranges,
            handover,
            _only_kept(new, image),
            abi=kho.abi,
            page_size=image.page_size,
            source=image.source,
        )


def _refuse(image: Image, subtree: Subtree, target: _abi.Generation) -> str | None:
    """Say why *target* cannot have this subtree, if so."""
    if image.survey.generation.inline:
        return None
    assert subtree.phys is not None
    assert subtree.nbytes is not None
    if target.size_property is not None:
        return None
    what = None
    blob = image.read(subtree.phys, subtree.nbytes)
    if blob[:4] != _FDT_MAGIC:
        what = f"{subtree.nbytes} bytes that are no tree"
    else:
        try:
            Fdt(blob)
        except FdtError as error:
            what = f"a tree that cannot be read: {error}"
    return None if what is None else f"{subtree.name} ({what}, and it has no sizes of blobs)"


# ---- the format's own pages ----


def _own_blocks(survey: Survey, target: _abi.Generation) -> set[int]:
    """Return (phys | order) of the blocks that are not taken along."""
    own: set[int] = set()
    for at in _own_places(survey, target):
        order = survey.order_at(at)
        if order is not None:
            own.add(at | order)
    return own


def _own_places(survey: Survey, target: _abi.Generation) -> Iterator[int]:
    if survey.fdt is None or survey.generation.inline:
        return
    yield survey.pages.handover.fdt_phys
    for subtree in survey.subtrees:
        made = WAS_INLINE in subtree.rows[0][1] and target.inline
        if subtree.phys is not None and (subtree.name == _abi.KHO_SUBTREE_METADATA or made):
            yield subtree.phys
            if subtree.name == _abi.LUO_NODE:
                yield from orchestrator.made_places(subtree)


def _natural_blocks(survey: Survey, own: set[int]) -> Iterator[tuple[int, int]]:
    """Yield aligned blocks that make up all preserved memory but *own*, few and large."""
    page = survey.ram.page_size
    mine = {key & ~63: page << (key & 63) for key in own}
    cuts = sorted(mine)
    for start, end in survey.preserved_runs():
        edges = [start]
        for at in cuts:
            if start <= at < end:
                edges += [at, at + mine[at]]
        edges.append(end)
        for low, high in zip(edges[::2], edges[1::2], strict=True):
            pfn, stop = low // page, high // page
            while pfn < stop:
                order = (stop - pfn).bit_length() - 1
                if pfn:
                    order = min(order, (pfn & -pfn).bit_length() - 1)
                yield pfn * page, order
                pfn += 1 << order


def _metadata(survey: Survey) -> _abi.KexecMetadata | None:
    for subtree in survey.subtrees:
        found = subtree.decoded
        if subtree.name == _abi.KHO_SUBTREE_METADATA and found:
            return _abi.KexecMetadata(found["previous_release"], found["kexec_count"])
    return None


# ---- blobs and nodes ----


def _add_blob(kho: Kho, subtree: Subtree, image: Image) -> bool:
    """Name the blob in the new root tree; returns whether it had to be made."""
    survey = image.survey
    if not survey.generation.inline:
        assert subtree.phys is not None
        assert subtree.nbytes is not None
        kho.add_subtree(subtree.name, subtree.phys, subtree.nbytes)
        return False
    raw = subtree.rows[0][1].get(BLOB_AT)
    if raw is not None and raw.nbytes == _BLOB_AT.size:
        phys, nbytes = _BLOB_AT.unpack(raw)
        if survey.covered(phys, nbytes) and survey.pages.written(phys, nbytes):
            kho.add_subtree(subtree.name, phys, nbytes)
            return False
    if subtree.name == _abi.LUO_NODE:
        orchestrator.to_blob(kho, image, subtree)
    else:
        kho.save_subtree(subtree.name, _flatten(subtree.rows))
    return True


def _flatten(rows: Iterable[tuple[int, Node]]) -> bytes:
    """Return a node and all below it as a tree of its own."""
    writer = FdtWriter()
    depth = -1
    for here, node in rows:
        for _ in range(depth - here + 1):
            writer.end_node()
        writer.begin_node(node.name if here else "")
        for name, value in node.properties.items():
            if here or name != BLOB_AT:
                writer.property(name, value)
        depth = here
    for _ in range(depth + 1):
        writer.end_node()
    return bytes(writer.finish())


def _add_nodes(kho: Kho, subtree: Subtree, image: Image) -> None:
    survey = image.survey
    if survey.generation.inline:
        kho.add_node(None, subtree.name, _kho_node(subtree.rows))
        return
    assert subtree.phys is not None
    assert subtree.nbytes is not None
    node = _kho_node(Fdt(image.read(subtree.phys, subtree.nbytes)).walk())
    if WAS_INLINE not in subtree.rows[0][1]:
        node.properties[BLOB_AT] = _BLOB_AT.pack(subtree.phys, subtree.nbytes)
    if subtree.name == _abi.LUO_NODE:
        orchestrator.to_node(image, subtree, node)
    kho.add_node(None, subtree.name, node)


def _kho_node(rows: Iterable[tuple[int, Node]]) -> KhoNode:
    """Return a node and all below it as nodes of the state tree."""
    stack: list[KhoNode] = []
    for depth, node in rows:
        made = KhoNode()
        made.properties = {name: bytes(value) for name, value in node.properties.items()}
        del stack[depth:]
        if stack:
            if node.name in stack[-1].children:
                raise ValueError(f"{node.path}: stands twice, which kho-v5-series cannot express")
            stack[-1].children[node.name] = made
        stack.append(made)
    return stack[0]


def _note(kho: Kho, properties: Mapping[str, tuple[str, bytes]]) -> None:
    """Put properties into the finished root tree; one that has no room there is left out."""
    for path, (name, value) in properties.items():
        editor = FdtEditor(kho.memory.view(kho.fdt_phys, kho.memory.page_size))
        with contextlib.suppress(FdtError):
            editor.set_property(path, name, value)
        editor.pack()


@dataclass(slots=True)
class Places:
    """Where the format's own pages are, so that they are there again after a way back.

    Attributes:
        root: page of the root tree, 0 if it has none.
        metadata: page of ``kexec-metadata``, likewise.
    """

    root: int = 0
    metadata: int = 0

    @classmethod
    def of(cls, survey: Survey) -> Self:
        """Return the places in an image, or those that it remembers."""
        raw = None if survey.fdt is None else survey.fdt.root.get(OWN_AT)
        places = cls(*_OWN_AT.unpack(raw)) if raw is not None and raw.nbytes == 16 else cls()
        if not survey.generation.inline:
            places.root = survey.pages.handover.fdt_phys
        for subtree in survey.subtrees:
            if subtree.name == _abi.KHO_SUBTREE_METADATA and subtree.phys:
                places.metadata = subtree.phys
        return places

    def pack(self) -> bytes:
        """Return the value of the property."""
        return _OWN_AT.pack(self.root, self.metadata)

    def hold(self, memory: PhysicalMemory, survey: Survey) -> None:
        """Keep these pages from being used for anything else; forget those that are in use."""
        for name in ("root", "metadata"):
            phys = getattr(self, name)
            try:
                if not phys or survey.in_scratch(phys, memory.page_size):
                    raise ValueError(phys)
                memory.claim(phys, 0)
            except (KhoError, ValueError):
                setattr(self, name, 0)

    def move_in(self, kho: Kho) -> None:
        """Move root tree and metadata of a fresh *kho* to these pages."""
        memory, page = kho.memory, kho.memory.page_size
        if self.root and not kho.generation.inline:
            old = kho.fdt_phys
            memory.view(self.root, page)[:] = bytes(memory.view(old, page))
            kho.fdt_phys = self.root
            if kho.generation.undo is None:
                kho.preserve_folio(self.root, 0)
                kho.unpreserve_free(old)
            else:  # it is preserved by finalizing
                memory.free(old)
        if self.metadata and kho.generation.metadata:
            name = _abi.KHO_SUBTREE_METADATA
            old = int.from_bytes(
                bytes(kho.root.node(f"/{name}")[kho.generation.data_property or ""]), "little"
            )
            kho.remove_subtree(old)
            memory.view(self.metadata, page)[:] = bytes(memory.view(old, page))
            kho.unpreserve_free(old)
            kho.preserve_folio(self.metadata, 0)
            kho.add_subtree(name, self.metadata, len(_abi.KexecMetadata("", 0).pack()))


def _only_kept(result: Image, source: Image) -> Iterator[Extent]:
    """Yield the result's pages, without those that the source did not have itself."""
    for extent in result.extents:
        if extent.data is not None:
            yield extent
        else:
            yield from source.pieces(extent.phys, extent.end)
