"""Regions of memory that are reserved by name on the command line and keep their place.

Mirrors ``reserve_mem=`` of ``mm/memblock.c`` (kho-abi 10.2): the next kernel finds a region of the
same name, size and alignment where it was, with what is in it; else it reserves a new one.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from luo.errors import FdtError, HandoverError, KhoNoMemoryError, from_errno
from luo.fdt import Fdt, FdtWriter
from luo.kho import KhoEvent, KhoNode
from luo.memory import parse_size

if TYPE_CHECKING:
    from luo.kho import Incoming, Kho
    from luo.memory import PhysicalMemory

__all__ = ["Region", "ReserveMem", "ReservedMemory", "memblock_regions"]

_log = logging.getLogger(__name__)

_NODE: Final = "memblock"
_COMPATIBLE: Final = "memblock-v1"
_REGION_COMPATIBLE: Final = "reserve-mem-v1"
_REGIONS_MAX: Final = 8
_NAME_MAX: Final = 15  # bytes


@dataclass(frozen=True, slots=True)
class ReserveMem:
    """One ``reserve_mem=`` parameter.

    Attributes:
        name: of the region, 1 to 15 bytes.
        nbytes: its size.
        align: alignment of its start in bytes, a power of two.
    """

    name: str
    nbytes: int
    align: int

    @classmethod
    def parse(cls, text: str) -> ReserveMem:
        """Read ``size:align:name``.

        Raises:
            KhoError: EINVAL if it is not that, the size is 0, or the name is too long or starts
                with a digit.
        """
        try:
            size, align, name = text.split(":")
            found = cls(name, parse_size(_bytes(size)), max(1, parse_size(_bytes(align))))
        except ValueError as error:
            raise from_errno(errno.EINVAL, f"reserve_mem={text}: not size:align:name") from error
        if found.nbytes <= 0 or found.align & (found.align - 1):
            raise from_errno(errno.EINVAL, f"reserve_mem={text}: size 0, or no power of two")
        if not 1 <= len(name.encode()) <= _NAME_MAX or "/" in name:
            raise from_errno(errno.EINVAL, f"reserve_mem={text}: name is not 1 to 15 bytes")
        return found


def _bytes(text: str) -> str:
    """Return a size as the kernel writes it (``64K``) in the words of :func:`parse_size`."""
    return text + "iB" if text[-1:] in tuple("KMGTPE") else text


@dataclass(frozen=True, slots=True)
class Region:
    """A region that a kernel has.

    Attributes:
        name: as asked for.
        phys: start.
        nbytes: size.
        revived: whether it came over from the previous kernel.
    """

    name: str
    phys: int
    nbytes: int
    revived: bool = False


def memblock_regions(incoming: Incoming) -> dict[str, tuple[int, int]]:
    """Return (phys, nbytes) of each region that the previous kernel left, by name.

    Raises:
        HandoverError: the tree is not what the format says.
    """
    try:
        node = _memblock_node(incoming)
        if node is None:
            return {}
        if bytes(node.get("compatible") or b"") != _COMPATIBLE.encode() + b"\0":
            raise HandoverError(f"memblock: not compatible with {_COMPATIBLE}")
        found = {}
        for child in node.children:
            compatible = bytes(child.get("compatible") or b"")
            raw = [bytes(child.get(name) or b"") for name in ("start", "size")]
            if compatible != _REGION_COMPATIBLE.encode() + b"\0" or list(map(len, raw)) != [8, 8]:
                raise HandoverError(f"memblock region {child.name}: not {_REGION_COMPATIBLE}")
            phys, nbytes = (struct.unpack("=Q", value)[0] for value in raw)
            found[child.name] = (phys, nbytes)
    except FdtError as error:
        raise HandoverError(f"memblock: {error}") from error
    return found


def _memblock_node(incoming: Incoming) -> Any:
    if incoming.generation.inline:
        root = incoming.root.root
        return next((child for child in root.children if child.name == _NODE), None)
    if _NODE not in incoming.subtrees():
        return None
    return Fdt(incoming.load_subtree(_NODE)).root


class ReservedMemory:
    """The named regions of one kernel.

    Args:
        wanted: what its command line asks for.

    Attributes:
        regions: what it has, by name; filled by :meth:`reserve`.
    """

    def __init__(self, wanted: Iterable[ReserveMem]) -> None:
        self._wanted = list(wanted)
        if len(self._wanted) > _REGIONS_MAX:
            raise from_errno(errno.EINVAL, f"reserve_mem: more than {_REGIONS_MAX} regions")
        self.regions: dict[str, Region] = {}
        self._page = 0  # the blob, between FINALIZE and ABORT

    def reserve(self, memory: PhysicalMemory, kho: Kho | None) -> None:
        """Find or allocate the regions, and have them handed over.

        One that finds no place is left out, with a warning.
        """
        left: dict[str, tuple[int, int]] = {}
        if kho is not None and kho.incoming is not None:
            try:
                left = memblock_regions(kho.incoming)
            except HandoverError as error:
                _log.warning("reserve_mem: %s", error)
        for wanted in self._wanted:
            phys, nbytes = left.get(wanted.name, (0, 0))
            if phys and phys % wanted.align == 0 and nbytes == wanted.nbytes:
                self.regions[wanted.name] = Region(wanted.name, phys, nbytes, revived=True)
                continue
            pages = -(-max(wanted.nbytes, wanted.align) // memory.page_size)
            try:
                start = memory.alloc_folio((pages - 1).bit_length())
            except KhoNoMemoryError:
                _log.warning("reserve_mem: no place for %s", wanted)  # and the boot goes on
                continue
            self.regions[wanted.name] = Region(wanted.name, start, wanted.nbytes)
        if kho is None or not self.regions:
            return
        if kho.generation.notifiers:
            kho.register_notifier(self._finalizing)
        else:
            self._preserve(kho)
            kho.save_subtree(_NODE, self._blob())

    def _preserve(self, kho: Kho) -> None:
        page = kho.memory.page_size
        for region in self.regions.values():
            # A size that is no whole pages is recorded without its end, as Linux does.
            kho.preserve_pages(region.phys // page * page, region.nbytes // page)

    def _finalizing(self, event: KhoEvent, kho: Kho) -> None:
        if event is not KhoEvent.FINALIZE:
            if self._page:  # its preservation is forgotten with all others
                kho.memory.free(self._page)
                self._page = 0
            return
        self._preserve(kho)
        if not kho.generation.inline:
            self._page = kho.save_subtree(_NODE, self._blob())
            return
        top = KhoNode()
        if kho.add_node(None, _NODE, top) == 0:
            kho.add_string_prop(top, "compatible", _COMPATIBLE)
            for region in self.regions.values():
                node = KhoNode()
                kho.add_node(top, region.name, node)
                kho.add_string_prop(node, "compatible", _REGION_COMPATIBLE)
                kho.add_prop(node, "start", struct.pack("=Q", region.phys))
                kho.add_prop(node, "size", struct.pack("=Q", region.nbytes))

    def _blob(self) -> bytes:
        writer = FdtWriter()
        with writer.node(""):
            writer.property_string("compatible", _COMPATIBLE)
            for region in self.regions.values():
                with writer.node(region.name):
                    writer.property_string("compatible", _REGION_COMPATIBLE)
                    writer.property_native_u64("start", region.phys)
                    writer.property_native_u64("size", region.nbytes)
        return bytes(writer.finish())
