"""Kexec HandOver: what one kernel leaves for the next, byte for byte as Linux does.

Mirrors ``kernel/liveupdate/kexec_handover.c`` and ``kho_block.c`` of Linux 7.3 ("kho-v4"); the
facts are in the project's KHO ABI specification ("kho-abi"). Left out: what only a kernel has
(memblock, CMA, deferred page initialisation, debugfs).

Outgoing, the happy path: ``Kho(memory)`` reserves scratch, makes the map and the root tree;
subsystems preserve memory and add subtrees; :meth:`Kho.handover` names the four numbers. Incoming:
:meth:`Kho.validate` reads them, without a write; :meth:`Kho.boot` forgets the old kernel's page
state, reserves what it preserved, and makes an outgoing side of its own; subsystems restore from
:attr:`Kho.incoming`.

Unhappy paths: a validation error changes nothing. An error in a bulk call or in adding a subtree
leaves everything as before. After :meth:`Kho.close`, the commit point, every call raises
``StateError``.
"""

import errno
import logging
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from luo import abi as _abi
from luo._kho import IncomingMemory, PreservedMemory, RadixTree, radix_decode, radix_key
from luo.errors import FdtError, HandoverError, KhoError, StateError, from_errno
from luo.fdt import Fdt, FdtEditor, FdtWriter
from luo.memory import PhysicalMemory

if TYPE_CHECKING:
    import sys

    if sys.version_info >= (3, 12):
        from collections.abc import Buffer
    else:
        from typing_extensions import Buffer

__all__ = [
    "Handover",
    "Incoming",
    "Kho",
    "RadixTree",
    "ScratchParam",
    "parse_kho_scratch",
    "radix_decode",
    "radix_key",
    "scratch_layout",
]

_log = logging.getLogger(__name__)

_LOW_LIMIT: Final = 1 << 32  # ARCH_LOW_ADDRESS_LIMIT of x86
_KEXEC_ALIGN: Final = 1 << 16  # of the segment that holds the scratch array
_SCRATCH_AREAS_MAX: Final = 1024 + 2  # a node each (MAX_NUMNODES), low and global


# ---- the four numbers ----


@dataclass(frozen=True, slots=True)
class Handover:
    """All that a new kernel is told: where the root tree and the scratch array lie.

    Attributes:
        fdt_phys: physical address of the root tree.
        fdt_len: bytes to map there: the page size.
        scratch_phys: physical address of the scratch array; 0 for none.
        scratch_len: its bytes, 16 an area.
    """

    fdt_phys: int
    fdt_len: int
    scratch_phys: int
    scratch_len: int

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """The four numbers in order."""
        return (self.fdt_phys, self.fdt_len, self.scratch_phys, self.scratch_len)

    def to_setup_data(self, next_phys: int = 0) -> bytes:
        """Return the x86 setup_data node, 48 bytes (kho-abi 9.1).

        Args:
            next_phys: physical address of the next node in the list.
        """
        return _abi.SETUP_DATA_SER.pack(
            next_phys,
            _abi.SETUP_KEXEC_KHO,
            32,
            self.fdt_phys,
            self.fdt_len,
            self.scratch_phys,
            self.scratch_len,
        )

    @classmethod
    def from_setup_data(cls, node: "Buffer") -> Self:
        """Read an x86 setup_data node.

        Raises:
            HandoverError: it is too short, or not of type 10 with 32 bytes.
        """
        data = bytes(node)
        if len(data) < _abi.SETUP_DATA_SER.size:
            raise HandoverError(f"setup_data node of {len(data)} bytes: 48 are needed")
        _, kind, length, *numbers = _abi.SETUP_DATA_SER.unpack_from(data)
        if kind != _abi.SETUP_KEXEC_KHO or length != 32:
            raise HandoverError(f"setup_data node of type {kind} and length {length}: not KHO's")
        return cls(*numbers)

    def to_chosen(self, address_cells: int = 2, size_cells: int = 2) -> dict[str, bytes]:
        """Return the properties of the device tree's ``/chosen`` (kho-abi 9.2).

        Args:
            address_cells: the root's ``#address-cells``, 1 or 2.
            size_cells: the root's ``#size-cells``, 1 or 2.

        Raises:
            OverflowError: a number does not fit into its cells.
        """

        def cells(phys: int, nbytes: int) -> bytes:
            return phys.to_bytes(4 * address_cells, "big") + nbytes.to_bytes(4 * size_cells, "big")

        return {
            _abi.CHOSEN_FDT: cells(self.fdt_phys, self.fdt_len),
            _abi.CHOSEN_SCRATCH: cells(self.scratch_phys, self.scratch_len),
        }

    @classmethod
    def from_chosen(
        cls, properties: Mapping[str, "Buffer"], address_cells: int = 2, size_cells: int = 2
    ) -> Self:
        """Read the properties of ``/chosen``.

        Raises:
            HandoverError: one is missing, or is not exactly one address and size.
        """
        numbers: list[int] = []
        for name in (_abi.CHOSEN_FDT, _abi.CHOSEN_SCRATCH):
            if name not in properties:
                raise HandoverError(f"/chosen has no {name}")
            value = bytes(properties[name])
            if len(value) != 4 * (address_cells + size_cells):
                raise HandoverError(f"/chosen/{name} has {len(value)} bytes: not one entry")
            split = 4 * address_cells
            numbers += int.from_bytes(value[:split], "big"), int.from_bytes(value[split:], "big")
        return cls(*numbers)


# ---- scratch ----


@dataclass(frozen=True, slots=True)
class ScratchParam:
    """Meaning of ``kho_scratch=``.

    Attributes:
        scale: percent of what the kernel itself reserved, or None if sizes were given.
        lowmem: bytes below 4 GiB, or None with a scale.
        global_: bytes anywhere.
        pernode: bytes on each node.
    """

    scale: int | None = 200
    lowmem: int | None = None
    global_: int | None = None
    pernode: int | None = None


_MEMPARSE = re.compile(r"(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)([KkMmGgTtPpEe]?)")


def _memparse(text: str) -> int | None:
    found = _MEMPARSE.fullmatch(text)
    if found is None:
        return None
    digits, unit = found.groups()
    octal = digits.startswith("0") and digits.isdecimal()
    number = int(digits, 8 if octal else 0)
    value = number << (10 * ("KMGTPE".index(unit.upper()) + 1) if unit else 0)
    return value if value < 1 << 64 else None


def parse_kho_scratch(text: str) -> ScratchParam:
    """Read a ``kho_scratch=`` parameter as Linux 7.3 does (kho-abi 8).

    Args:
        text: ``"N%"``, or three sizes ``"LOW,GLOBAL,NODE"`` with K, M, G, T, P, E, of which not all
            are 0.

    Raises:
        KhoError: EINVAL for anything else.
    """
    wrong = from_errno(
        errno.EINVAL, f"kho_scratch={text}: not N% or three sizes, not all of them 0"
    )
    if text.endswith("%"):
        digits = text[:-1]
        if not (digits.isascii() and digits.isdecimal()) or len(text) > 11:
            raise wrong
        if int(digits) > 0xFFFFFFFF:
            raise wrong
        return ScratchParam(scale=int(digits))
    sizes = [_memparse(part) for part in text.split(",")]
    if len(sizes) != 3 or None in sizes or not any(sizes):
        raise wrong
    return ScratchParam(None, *sizes)


def _reserved_by_kernel(
    ranges: Sequence[tuple[int, int, int]], page_size: int
) -> list[tuple[int, int, int]]:
    """Model of what a kernel has reserved when it sizes scratch: ``[(start, nbytes, node)]``.

    memmap: 64 bytes a page, at the end of each range. Kernel image: 32 MiB, or a 64th of memory if
    that is less, at the start of the first range.
    """
    total = sum(nbytes for _, nbytes, _ in ranges)
    start, nbytes, node = ranges[0]
    reserved = [(start, min(32 << 20, total // 64, nbytes), node)]
    for start, nbytes, node in ranges:
        memmap = nbytes // page_size * 64
        reserved.append((start + nbytes - memmap, memmap, node))
    return reserved


def scratch_layout(
    memory: PhysicalMemory, param: ScratchParam | None = None
) -> list[tuple[int, int]]:
    """Size and place scratch as Linux 7.3 does on a cold boot.

    Sizes (kho-abi 8): low = what the kernel reserved below 4 GiB times the scale; global = all that
    it reserved times the scale, less low; per node likewise; each rounded up to a block of the
    largest order. What "the kernel reserved" is, is modelled: a memmap of 64 bytes a page on its
    node, and an image of 32 MiB (a 64th of memory if that is less) in the lowest range.
    Places: from the top down, each within one range.

    Returns:
        list: ``[(phys, nbytes), ...]``: low, global, then one for each node that has memory. An
        area of size 0 has address 0.

    Raises:
        KhoError: ENOMEM if an area finds no place.
    """
    param = param or ScratchParam()
    ranges = memory.ranges
    align = memory.page_size << memory.max_order
    nodes = sorted({node for _, _, node in ranges})
    if param.scale is None:
        low, everywhere = param.lowmem or 0, param.global_ or 0
        per_node = dict.fromkeys(nodes, param.pernode or 0)
    else:
        reserved = _reserved_by_kernel(ranges, memory.page_size)
        scale = param.scale
        below = sum(max(0, min(s + n, _LOW_LIMIT) - s) for s, n, _ in reserved)
        low = below * scale // 100
        everywhere = sum(n for _, n, _ in reserved) * scale // 100 - low
        per_node = {
            node: sum(n for _, n, where in reserved if where == node) * scale // 100
            for node in nodes
        }

    taken: list[tuple[int, int]] = []

    def place(nbytes: int, limit: int | None, node: int | None, what: str) -> tuple[int, int]:
        nbytes = -(-nbytes // align) * align
        if nbytes == 0:
            return (0, 0)
        for start, size, where in reversed(ranges):
            if node is not None and where != node:
                continue
            end = start + size if limit is None else min(start + size, limit)
            floor = max(start, memory.page_size)  # page 0 is nobody's
            at = (end - nbytes) // align * align
            while at >= floor:
                clash = [p for p, n in taken if p < at + nbytes and p + n > at]
                if not clash:
                    taken.append((at, nbytes))
                    return (at, nbytes)
                at = (min(clash) - nbytes) // align * align
        raise from_errno(
            errno.ENOMEM,
            f"scratch: no place for {nbytes:#x} bytes {what}; give smaller areas, or scratch=[]",
        )

    return [
        place(low, _LOW_LIMIT, None, "below 4 GiB"),
        place(everywhere, None, None, "anywhere"),
        *(place(per_node[node], None, node, f"on node {node}") for node in nodes),
    ]


# ---- linked blocks (kho-abi 10.1) ----


def _chain(memory: PhysicalMemory, head: int, refuse: "_Refuse") -> Iterator[tuple[int, int]]:
    """Yield (phys, count) of each block, with the chain's rules checked on the way."""
    seen: set[int] = set()
    phys = head
    while phys:
        if phys in seen:
            raise HandoverError("chain of blocks runs in a circle", phys)
        if len(seen) == _abi.KHO_BLOCKS_MAX:
            raise HandoverError(f"chain of over {_abi.KHO_BLOCKS_MAX} blocks", head)
        refuse(phys)
        seen.add(phys)
        following, count = _abi.KHO_BLOCK_SER.unpack_from(memory.view(phys, memory.page_size))
        yield phys, count
        phys = following


class _Refuse:
    """Whether a block of a chain may be read at all."""

    def __init__(self, memory: PhysicalMemory, incoming: IncomingMemory | None) -> None:
        self._memory = memory
        self._incoming = incoming

    def __call__(self, phys: int) -> None:
        if phys % self._memory.page_size or not self._memory.contains(phys, self._memory.page_size):
            raise HandoverError("block is misaligned or not in RAM", phys)
        if self._incoming is not None and self._incoming.order_of(phys) != 0:
            raise HandoverError("block is not a preserved page", phys)
        if not self._memory.is_populated(phys, self._memory.page_size):
            raise HandoverError("block was never written", phys)


# ---- incoming ----


class Incoming(IncomingMemory):
    """What the previous kernel left.

    Made by :meth:`Kho.validate`, used through :attr:`Kho.incoming`. Reading it writes nothing;
    restoring needs :meth:`Kho.boot`. The root tree and the blob of ``kexec-metadata`` stay reserved
    for as long as this kernel runs, as in Linux, and so count in :attr:`nr_unrestored`.

    Attributes:
        handover: the four numbers.
        abi: name of the generation.
        scratch: ``[(phys, nbytes), ...]`` as the previous kernel listed it, empty areas included.
        metadata: who handed over and how often that happened, or None.
    """

    handover: Handover
    abi: str
    scratch: list[tuple[int, int]]
    _subtrees: dict[str, tuple[int, int]]
    metadata: _abi.KexecMetadata | None

    def __init__(self, memory: PhysicalMemory, handover: Handover, *, abi: str = "kho-v4") -> None:
        generation = _abi.generation(abi)
        self.handover = handover
        self.abi = abi
        fdt = _open_root(memory, handover)
        root = fdt.root
        strings = bytes(root.get("compatible") or b"").split(b"\0")
        if generation.compatible.encode() not in strings[:-1]:
            raise HandoverError(
                f"root tree is compatible with {b' '.join(strings).decode(errors='replace')!r}, "
                f"not with {generation.compatible}",
                handover.fdt_phys,
            )
        map_phys = _native_u64(root.get(generation.map_property))
        if not map_phys:
            raise HandoverError(
                f"root tree's {generation.map_property} is not 8 bytes, or 0", handover.fdt_phys
            )
        self.scratch = _read_scratch(memory, handover)
        array = [(handover.scratch_phys, handover.scratch_len)] if handover.scratch_len else []
        try:
            areas = memory.check_scratch(self.scratch)
        except ValueError as error:
            raise HandoverError(str(error), handover.scratch_phys) from None
        self._walk(
            memory,
            map_phys,
            areas,
            fdt=handover.fdt_phys,
            reserved=array,
            levels=generation.radix_geometry(memory.page_size).levels,
        )
        if self.order_of(handover.fdt_phys) != 0:
            raise HandoverError("root tree is not preserved as a page", handover.fdt_phys)
        if fdt.totalsize > memory.page_size:
            raise HandoverError("root tree is larger than its preserved page", handover.fdt_phys)
        self._subtrees = {}
        for node in root.children:
            if not node.name or node.name in self._subtrees:
                raise HandoverError(
                    f"subtree {node.name!r} has no name, or stands twice", handover.fdt_phys
                )
            self._subtrees[node.name] = self._check_subtree(
                node.name,
                _native_u64(node.get(generation.data_property)),
                _native_u64(node.get(generation.size_property))
                if generation.size_property
                else memory.page_size,
            )
        self.metadata = self._read_metadata()

    def _check_subtree(self, name: str, phys: int | None, nbytes: int | None) -> tuple[int, int]:
        where = self.handover.fdt_phys
        if phys is None:
            raise HandoverError(f"subtree {name}: its address is missing or not 8 bytes", where)
        if nbytes is None:
            raise HandoverError(f"subtree {name}: its size is missing or not 8 bytes", where)
        if not self.is_preserved(phys, nbytes or 1):
            raise HandoverError(f"subtree {name}: {nbytes:#x} bytes that are not preserved", phys)
        return phys, nbytes

    def _read_metadata(self) -> _abi.KexecMetadata | None:
        if _abi.KHO_SUBTREE_METADATA not in self._subtrees:
            return None
        phys, nbytes = self._subtrees[_abi.KHO_SUBTREE_METADATA]
        nbytes = min(nbytes, 128)
        metadata = None
        if nbytes and self.memory.is_populated(phys, nbytes):  # reading a hole would fill it
            metadata = _abi.KexecMetadata.unpack(bytes(self.memory.view(phys, nbytes)))
        if metadata is None:
            _log.warning("kexec-metadata at %#x: unknown version or too short, ignored", phys)
        return metadata

    def _check_open(self) -> None:
        if self.closed:
            raise StateError(errno.ESHUTDOWN, "KHO: this kernel is gone")

    @property
    def root(self) -> Fdt:
        """The root tree; a new reader at each use, as a commit cuts older ones off."""
        self._check_open()
        return Fdt(self.memory.view(self.handover.fdt_phys, self.handover.fdt_len), check=False)

    def subtrees(self) -> dict[str, tuple[int, int]]:
        """Return ``{name: (phys, nbytes)}`` of all blobs, in the order of the root tree."""
        self._check_open()
        return dict(self._subtrees)

    def retrieve_subtree(self, name: str) -> tuple[int, int]:
        """Return ``(phys, nbytes)`` of the blob called *name*, as ``kho_retrieve_subtree()``.

        Raises:
            KhoError: ENOENT if there is none.
        """
        self._check_open()
        if name not in self._subtrees:
            raise from_errno(
                errno.ENOENT, f"retrieve_subtree {name}: the previous kernel left none"
            )
        return self._subtrees[name]

    def load_subtree(self, name: str) -> memoryview:
        """Return the bytes of the blob called *name*, where they lie in memory.

        Raises:
            KhoError: ENOENT if there is none.
        """
        phys, nbytes = self.retrieve_subtree(name)
        return self.memory.view(phys, nbytes)

    def read_blocks(self, head: int, entry_size: int) -> NDArray[np.uint8]:
        """Return a copy of all entries of a chain of blocks (kho-abi 10.1).

        Args:
            head: physical address of the first block; 0: an empty set.
            entry_size: bytes of an entry.

        Returns:
            ndarray: shape (n, entry_size), uint8.

        Raises:
            HandoverError: a block is not a preserved page, is empty or over-full, or the chain runs
                in a circle or over 10,000 blocks.
        """
        self._check_open()
        memory = self.memory
        capacity = _abi.block_capacity(entry_size, memory.page_size)
        parts = [np.empty((0, entry_size), np.uint8)]
        for phys, count in _chain(memory, head, _Refuse(memory, self)):
            if not 1 <= count <= capacity:
                raise HandoverError(f"block with {count} entries, not 1..{capacity}", phys)
            data = np.frombuffer(
                memory.view(phys + _abi.KHO_BLOCK_SER.size, count * entry_size), np.uint8
            )
            parts.append(data.reshape(count, entry_size))
        return np.concatenate(parts)

    def restore_free_blocks(self, head: int) -> None:
        """Take over and free all blocks of a chain.

        Raises:
            HandoverError: as :meth:`read_blocks`, and nothing is freed.
        """
        for phys in [p for p, _ in _chain(self.memory, head, _Refuse(self.memory, self))]:
            self.restore_free(phys)


def _native_u64(value: memoryview | None) -> int | None:
    """Value of a property of 8 bytes in the CPU's byte order, or None."""
    if value is None or value.nbytes != 8:
        return None
    return int(np.frombuffer(bytes(value), np.uint64)[0])


def _open_root(memory: PhysicalMemory, handover: Handover) -> Fdt:
    phys, nbytes = handover.fdt_phys, handover.fdt_len
    if phys <= 0 or phys % memory.page_size or nbytes <= 0 or not memory.contains(phys, nbytes):
        raise HandoverError(f"root tree of {nbytes} bytes is misaligned or not in RAM", phys)
    if not memory.is_populated(phys, nbytes):
        raise HandoverError("root tree was never written", phys)
    try:
        return Fdt(memory.view(phys, nbytes))
    except FdtError as error:
        raise HandoverError(f"root tree: {error}", phys) from error


def _read_scratch(memory: PhysicalMemory, handover: Handover) -> list[tuple[int, int]]:
    phys, nbytes = handover.scratch_phys, handover.scratch_len
    if phys == 0 and nbytes == 0:
        return []
    entry = _abi.KHO_SCRATCH_SER.size
    count = nbytes // entry  # as Linux counts; a remainder is not an error there
    if not 1 <= count <= _SCRATCH_AREAS_MAX:
        raise HandoverError(f"scratch array of {nbytes} bytes", phys)
    if phys <= 0 or phys % 8 or not memory.contains(phys, nbytes):
        raise HandoverError("scratch array is misaligned or not in RAM", phys)
    if not memory.is_populated(phys, nbytes):
        raise HandoverError("scratch array was never written", phys)
    return list(_abi.KHO_SCRATCH_SER.iter_unpack(memory.view(phys, count * entry)))


# ---- outgoing ----


class Kho(PreservedMemory):
    """KHO of one kernel: cold boot.

    Args:
        memory: of the machine; its page state must be this kernel's.
        abi: generation of the format: ``"kho-v4"``.
        scratch: None: sized by the kernel's rules (:func:`scratch_layout`). Text: a
            ``kho_scratch=`` parameter, ``"16M,512M,256M"`` or ``"200%"``. A list
            ``[(phys, nbytes), ...]``: these areas; ``[]``: none.
        debug: refuse to preserve what is not allocated.
        release: the kernel's release, left for the next one in ``kexec-metadata``; up to 64 bytes.

    Attributes:
        memory, debug: as given.
        abi: name of the generation.
        scratch: ``[(phys, nbytes), ...]`` in the ABI's order, areas of size 0 included.
        incoming: what the previous kernel left (:class:`Incoming`); None after a cold boot.
        fdt_phys: physical address of the root tree, one page.
        closed: whether :meth:`close` was called.

    Raises:
        ValueError: an unknown generation, areas that are not whole pages in RAM, a long release.
        KhoError: ENOMEM if scratch or the first pages find no place; EBUSY if scratch is not free;
            EINVAL for a wrong ``kho_scratch=``; EROFS.

    Source: ``kho_init()``; kho-abi 5 and 8.
    """

    abi: str
    scratch: list[tuple[int, int]]
    incoming: Incoming | None
    fdt_phys: int

    def __init__(
        self,
        memory: PhysicalMemory,
        *,
        abi: str = "kho-v4",
        scratch: str | Iterable[tuple[int, int]] | None = None,
        debug: bool = False,
        release: str = "luo",
    ) -> None:
        _abi.generation(abi)
        if scratch is None or isinstance(scratch, str):
            param = None if scratch is None else parse_kho_scratch(scratch)
            areas = scratch_layout(memory, param)
        else:
            areas = [(operator.index(phys), operator.index(nbytes)) for phys, nbytes in scratch]
        memory.reserve_scratch(areas)
        self._start(memory, abi, areas, None, debug, release)

    def _start(
        self,
        memory: PhysicalMemory,
        abi: str,
        scratch: list[tuple[int, int]],
        incoming: Incoming | None,
        debug: bool,
        release: str,
    ) -> None:
        generation = _abi.generation(abi)
        before = incoming.metadata.kexec_count if incoming and incoming.metadata else 0
        metadata = _abi.KexecMetadata(release, before + 1).pack()
        self.abi = abi
        self._generation = generation
        self.scratch = scratch
        self.incoming = incoming
        self.fdt_phys = 0
        self._scratch_copy = 0
        self._setup(memory, levels=generation.radix_geometry(memory.page_size).levels, debug=debug)
        try:
            self.fdt_phys = self.alloc_preserve(memory.page_size)
            writer = FdtWriter(into=memory.view(self.fdt_phys, memory.page_size))
            with writer.node(""):
                writer.property_string("compatible", generation.compatible)
                writer.property_native_u64(generation.map_property, self.root_phys)
            writer.finish()
            if generation.metadata:
                self.save_subtree(_abi.KHO_SUBTREE_METADATA, metadata)
        except BaseException:
            if self.fdt_phys:
                self.unpreserve_free(self.fdt_phys)
            self.free_map()
            raise

    @staticmethod
    def validate(memory: PhysicalMemory, handover: Handover, *, abi: str = "kho-v4") -> Incoming:
        """Check what the previous kernel left, without a single write.

        Memory may be mapped read-only, and the kernel that owns its page state may still run: the
        new page state is built beside it and used by :meth:`boot`, so the map is walked once.

        Raises:
            HandoverError: a rule of the format is broken (kho-abi 9.3, 12.18): it names the address
                and the rule.
            ValueError: an unknown generation.
        """
        return Incoming(memory, handover, abi=abi)

    @classmethod
    def boot(
        cls,
        memory: PhysicalMemory,
        handover: Handover | Incoming,
        *,
        abi: str = "kho-v4",
        debug: bool = False,
        release: str = "luo",
    ) -> Self:
        """Boot on what the previous kernel left: forget its page state, reserve what it preserved.

        Args:
            memory: of the machine, writable by now.
            handover: the four numbers, or what :meth:`validate` made of them.
            abi: generation of the format; only looked at with the four numbers.
            debug: as for a cold boot.
            release: as for a cold boot.

        Returns:
            Kho: whose :attr:`incoming` has what was left, and whose outgoing side is fresh.

        Raises:
            HandoverError: as :meth:`validate`, and nothing has changed.
            KhoError: EROFS if memory is read-only; EINVAL if this was booted already; ENOMEM.
        """
        if memory.readonly:
            raise from_errno(errno.EROFS, "boot: memory is attached read-only")
        if isinstance(handover, Incoming):
            incoming = handover
            if incoming.memory is not memory:
                raise ValueError("boot: validated on another memory")
        else:
            incoming = cls.validate(memory, handover, abi=abi)
        incoming.install()
        kho = cls.__new__(cls)
        kho._start(memory, incoming.abi, incoming.scratch, incoming, debug, release)
        return kho

    def close(self) -> None:
        """End this kernel's KHO, at the commit point: later calls raise StateError (ESHUTDOWN)."""
        super().close()
        if self.incoming is not None:
            self.incoming.close()

    def _check_open(self) -> None:
        if self.closed:
            raise StateError(errno.ESHUTDOWN, "KHO: this kernel is gone")

    # ---- root tree ----

    def _root_bytes(self) -> memoryview:
        return self.memory.view(self.fdt_phys, self.memory.page_size)

    @property
    def root(self) -> Fdt:
        """The root tree as it is now; a reader that later changes do not reach is not promised."""
        self._check_open()
        return Fdt(self._root_bytes())

    @property
    def root_bytes(self) -> int:
        """Bytes of the root tree's page that are in use."""
        self._check_open()
        return Fdt(self._root_bytes(), check=False).totalsize

    def add_subtree(self, name: str, phys: SupportsIndex, nbytes: SupportsIndex) -> None:
        """Name a blob in the root tree, as ``kho_add_subtree()``.

        The blob is neither copied nor preserved by this, and may change until the jump.

        Args:
            name: of the new child, any that a node may have.
            phys: physical address of the blob.
            nbytes: its size.

        Raises:
            ValueError: the name is no node name.
            KhoError: EINVAL if the blob is not in RAM; EEXIST if the name is taken; ENOMEM if the
                page is full, and nothing changes.
        """
        self._check_open()
        at, size = operator.index(phys), operator.index(nbytes)
        if not self.memory.contains(at, size):
            raise from_errno(errno.EINVAL, f"add_subtree {name}: {at:#x}+{size:#x} is not in RAM")
        if not name or "/" in name or "\0" in name:
            raise ValueError(f"add_subtree {name!r}: not a node name")
        generation = self._generation
        editor = FdtEditor(self._root_bytes())
        added = False
        try:
            editor.add_node("/", name)
            added = True
            editor.set_property(f"/{name}", generation.data_property, _u64(at))
            if generation.size_property is not None:
                editor.set_property(f"/{name}", generation.size_property, _u64(size))
            editor.pack()
        except FdtError as error:
            if added:
                editor.del_node(f"/{name}")
            editor.pack()
            code = errno.EEXIST if error.code == "FDT_ERR_EXISTS" else errno.ENOMEM
            why = "the name is taken" if code == errno.EEXIST else "the root tree's page is full"
            raise from_errno(code, f"add_subtree {name}: {why}") from error

    def remove_subtree(self, phys: SupportsIndex) -> None:
        """Remove the child that names the blob at *phys*, as ``kho_remove_subtree()``.

        If several do, only the first in the tree goes (the one added last).

        Raises:
            KhoError: ENOENT if none does.
        """
        self._check_open()
        at = operator.index(phys)
        name = next(
            (
                node.name
                for node in Fdt(self._root_bytes()).root.children
                if _native_u64(node.get(self._generation.data_property)) == at
            ),
            None,
        )
        if name is None:
            raise from_errno(errno.ENOENT, f"remove_subtree {at:#x}: no subtree names it")
        editor = FdtEditor(self._root_bytes())
        editor.del_node(f"/{name}")
        editor.pack()

    def save_subtree(self, name: str, buffer: "Buffer") -> int:
        """Copy *buffer* into preserved memory and name it in the root tree.

        Returns:
            int: physical address of the copy.

        Raises:
            ValueError: as :meth:`add_subtree`.
            KhoError: EINVAL if it is empty; E2BIG above one block of ``memory.max_order``; EEXIST,
                ENOMEM. Nothing changes then.
        """
        with memoryview(buffer) as view, view.cast("B") as data:
            phys = self.alloc_preserve(data.nbytes)
            try:
                self.memory.view(phys, data.nbytes)[:] = data
                self.add_subtree(name, phys, data.nbytes)
            except BaseException:
                self.unpreserve_free(phys)
                raise
        return phys

    # ---- linked blocks ----

    def write_blocks(self, entries: "Buffer | NDArray[np.uint8]", entry_size: int) -> int:
        """Write entries into a chain of preserved pages (kho-abi 10.1).

        Args:
            entries: bytes, or an array of shape (n, entry_size), uint8.
            entry_size: bytes of an entry.

        Returns:
            int: physical address of the first block; 0 for no entries.

        Raises:
            ValueError: *entries* is not whole entries.
            KhoError: ENOSPC above 10,000 blocks, ENOMEM; nothing is left then.
        """
        self._check_open()
        page = self.memory.page_size
        capacity = _abi.block_capacity(entry_size, page)
        data = (
            np.frombuffer(np.ascontiguousarray(entries, np.uint8), np.uint8)
            if isinstance(entries, np.ndarray) and entries.size
            else np.frombuffer(bytes(entries), np.uint8)
        )
        if data.size % entry_size:
            raise ValueError(f"write_blocks: {data.size} bytes are not entries of {entry_size}")
        total = data.size // entry_size
        nr_blocks = -(-total // capacity)
        if nr_blocks > _abi.KHO_BLOCKS_MAX:
            raise from_errno(
                errno.ENOSPC, f"write_blocks: {nr_blocks} blocks, above {_abi.KHO_BLOCKS_MAX}"
            )
        blocks: list[int] = []
        try:
            blocks.extend(self.alloc_preserve(page) for _ in range(nr_blocks))
        except BaseException:
            for phys in reversed(blocks):
                self.unpreserve_free(phys)
            raise
        for i, phys in enumerate(blocks):
            part = data[i * capacity * entry_size : (i + 1) * capacity * entry_size]
            following = blocks[i + 1] if i + 1 < nr_blocks else 0
            view = self.memory.view(phys, page)
            _abi.KHO_BLOCK_SER.pack_into(view, 0, following, part.size // entry_size)
            view[_abi.KHO_BLOCK_SER.size : _abi.KHO_BLOCK_SER.size + part.size] = part.data
        return blocks[0] if blocks else 0

    def free_blocks(self, head: int) -> None:
        """Unpreserve and free a chain that :meth:`write_blocks` made.

        Raises:
            HandoverError: somebody wrote over the chain: it leaves RAM or runs in a circle.
            KhoError: EINVAL or ENOENT if a block is not allocated or not preserved.
        """
        self._check_open()
        for phys in [p for p, _ in _chain(self.memory, head, _Refuse(self.memory, None))]:
            self.unpreserve_free(phys)

    # ---- the jump ----

    def handover(self) -> Handover:
        """Return the four numbers for the next kernel.

        The scratch array is copied to a segment in scratch, 64 KiB aligned from the top down, the
        areas tried in order, as ``kexec_file_load()`` does; calling it again gives the same place.

        Raises:
            KhoError: EADDRNOTAVAIL if scratch has no room for the array.
        """
        self._check_open()
        page = self.memory.page_size
        if not self.scratch:
            return Handover(self.fdt_phys, page, 0, 0)
        array = b"".join(_abi.KHO_SCRATCH_SER.pack(*area) for area in self.scratch)
        if not self._scratch_copy:
            self._scratch_copy = self._place_in_scratch(len(array))
        self.memory.view(self._scratch_copy, len(array))[:] = array
        return Handover(self.fdt_phys, page, self._scratch_copy, len(array))

    def _place_in_scratch(self, nbytes: int) -> int:
        page = self.memory.page_size
        order = (-(-nbytes // page) - 1).bit_length()
        for align in (_KEXEC_ALIGN, page << order):  # an area without such a spot: any page will do
            for start, size in self.scratch:
                at = (start + size - (page << order)) // align * align
                while at >= start and size:
                    try:
                        self.memory.claim(at, order)
                    except KhoError:
                        at -= align
                    else:
                        return at
        raise from_errno(errno.EADDRNOTAVAIL, f"handover: no room for {nbytes} bytes in scratch")


def _u64(value: int) -> bytes:
    """8 bytes in the CPU's byte order, as KHO stores integers in properties."""
    return np.uint64(value).tobytes()
