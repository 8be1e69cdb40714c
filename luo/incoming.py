"""Kexec HandOver, the incoming side: what the previous kernel left, read, checked and restored.

Mirrors the second kernel's half of ``kernel/liveupdate/kexec_handover.c`` and ``kho_block.c``, in
every generation. Reading is done before the commit point and writes nothing; whatever breaks a rule
of the format is a ``HandoverError`` that names the address and the rule.
"""

import errno
import logging
import operator
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from luo import abi as _abi
from luo import vmalloc
from luo._kho import IncomingMemory
from luo.errors import FdtError, HandoverError, StateError, from_errno
from luo.fdt import Fdt
from luo.handover import Handover
from luo.kho_tree import KhoInNode
from luo.memory import PhysicalMemory

if TYPE_CHECKING:
    from luo.fdt import Node

__all__ = ["Incoming", "RefuseBlock", "block_chain", "native_u64", "require_call", "whole_pages"]

_log = logging.getLogger(__name__)

_SCRATCH_AREAS_MAX: Final = 1024 + 2  # a node each (MAX_NUMNODES), low and global


# ---- linked blocks (kho-abi 10.1) ----


def block_chain(
    memory: PhysicalMemory, head: int, refuse: "RefuseBlock"
) -> Iterator[tuple[int, int]]:
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


class RefuseBlock:
    """Whether a block of a chain may be read at all."""

    def __init__(self, memory: PhysicalMemory, incoming: IncomingMemory | None) -> None:
        self._memory = memory
        self._incoming = incoming

    def __call__(self, phys: int) -> None:
        """Raise HandoverError if the block at *phys* may not be read."""
        if phys % self._memory.page_size or not self._memory.contains(phys, self._memory.page_size):
            raise HandoverError("block is misaligned or not in RAM", phys)
        if self._incoming is not None and self._incoming.order_of(phys) != 0:
            raise HandoverError("block is not a preserved page", phys)
        if not self._memory.is_populated(phys, self._memory.page_size):
            raise HandoverError("block was never written", phys)


# ---- what was left ----


class Incoming(IncomingMemory):
    """What the previous kernel left.

    Made by :meth:`Kho.validate`, used through :attr:`Kho.incoming`. Reading it writes nothing;
    restoring needs :meth:`Kho.boot`. The root tree and the blob of ``kexec-metadata`` stay reserved
    for as long as this kernel runs, as in Linux, and so count in :attr:`nr_unrestored`.

    Attributes:
        handover: the four numbers.
        abi: name of the generation.
        bugs: mistakes of its kernels that the reader shares.
        generation: the generation itself.
        scratch: ``[(phys, nbytes), ...]`` as the previous kernel listed it, empty areas included.
        metadata: who handed over and how often that happened, or None.
    """

    handover: Handover
    abi: str
    bugs: frozenset[str]
    generation: _abi.Generation
    scratch: list[tuple[int, int]]
    _subtrees: dict[str, tuple[int, int]]
    metadata: _abi.KexecMetadata | None

    def __init__(
        self,
        memory: PhysicalMemory,
        handover: Handover,
        *,
        abi: str = "kho-v4",
        bugs: Iterable[str] = (),
    ) -> None:
        generation = _abi.generation(abi)
        self.handover = handover
        self.abi = abi
        self.bugs = generation.check_bugs(bugs)
        self.generation = generation
        fdt = _open_root(memory, handover, generation.inline)
        self._fdt_len = fdt.totalsize if generation.inline else handover.fdt_len
        root = fdt.root
        strings = bytes(root.get("compatible") or b"").split(b"\0")
        if generation.check_compatible and generation.compatible.encode() not in strings[:-1]:
            raise HandoverError(
                f"root tree is compatible with {b' '.join(strings).decode(errors='replace')!r}, "
                f"not with {generation.compatible}",
                handover.fdt_phys,
            )
        map_phys = self._map_phys(fdt)
        self.scratch = _read_scratch(memory, handover)
        reserved = [(handover.scratch_phys, handover.scratch_len)] if handover.scratch_len else []
        if generation.inline:  # a segment in scratch, and not preserved
            reserved.append((handover.fdt_phys, self._fdt_len))
        try:
            areas = memory.check_scratch(self.scratch)
        except ValueError as error:
            raise HandoverError(str(error), handover.scratch_phys) from None
        self._walk(
            memory,
            map_phys,
            areas,
            fdt=handover.fdt_phys,
            reserved=reserved,
            levels=generation.radix_geometry(memory.page_size, self.bugs).levels,
            bitmap_bytes=generation.bitmap_size(memory.page_size),
            order_cap=memory.max_order if generation.restore_order_cap else None,
        )
        self._subtrees = {}
        self.metadata = None
        if generation.inline:
            return
        if self.order_of(handover.fdt_phys) != 0:
            raise HandoverError("root tree is not preserved as a page", handover.fdt_phys)
        if fdt.totalsize > memory.page_size:
            raise HandoverError("root tree is larger than its preserved page", handover.fdt_phys)
        for node in root.children:
            if not node.name or node.name in self._subtrees:
                raise HandoverError(
                    f"subtree {node.name!r} has no name, or stands twice", handover.fdt_phys
                )
            phys = native_u64(node.get(generation.data_property or ""))
            self._subtrees[node.name] = self._check_subtree(
                node.name,
                phys,
                native_u64(node.get(generation.size_property))
                if generation.size_property
                else self._blob_bytes(phys),
            )
        if generation.metadata:
            self.metadata = self._read_metadata()

    def _map_phys(self, fdt: Fdt) -> int:
        generation, where = self.generation, self.handover.fdt_phys
        holder = fdt.root
        if generation.map_node is not None:
            found = next((n for n in holder.children if n.name == generation.map_node), None)
            if found is None:
                raise HandoverError(f"root tree has no node {generation.map_node}", where)
            holder = found
        phys = native_u64(holder.get(generation.map_property))
        if phys is None:
            raise HandoverError(f"root tree's {generation.map_property} is not 8 bytes", where)
        if phys == 0 and not generation.map_may_be_null:
            raise HandoverError(
                f"root tree's {generation.map_property} is 0: there is no preserved map, or it was"
                " never finalized",
                where,
            )
        return phys

    def _blob_bytes(self, phys: int | None) -> int:
        """Return the size of a blob that nobody noted: a tree's own, else to its block's end."""
        page = self.memory.page_size
        if phys is None or not self.memory.contains(phys, 8):
            return page
        if self.memory.is_populated(phys, 8):
            head = bytes(self.memory.view(phys, 8))
            if head[:4] == b"\xd0\x0d\xfe\xed":
                return int.from_bytes(head[4:], "big")
        order = self.order_of(phys)
        return page - phys % page if order is None else page << order

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
        return Fdt(self.memory.view(self.handover.fdt_phys, self._fdt_len), check=False)

    def subtrees(self) -> dict[str, tuple[int, int]]:
        """Return ``{name: (phys, nbytes)}`` of all blobs, in the order of the root tree."""
        self._check_open()
        return dict(self._subtrees)

    def extended_scratch(self) -> list[tuple[int, int]]:
        """Return where else than in scratch a booting 7.3 kernel may allocate (kho-abi 8).

        Everything but the blocks of 1 GiB in which something preserved, or a page of the map, lies.
        Meant for between :meth:`Kho.validate` and :meth:`Kho.boot`; afterwards the map's pages are
        free, and restored blocks are not seen any more.

        Returns:
            list: ``[(phys, nbytes), ...]``, ascending, each within one range of memory.
        """
        self._check_open()
        gib = 1 << 30
        blocks, orders = self.claimed()
        pages = self.map_pages()
        starts = np.concatenate((blocks, pages))
        sizes = np.concatenate(
            (
                np.left_shift(np.uint64(self.memory.page_size), orders.astype(np.uint64)),
                np.full(len(pages), self.memory.page_size, np.uint64),
            )
        )
        taken = np.zeros((max(s + n for s, n, _ in self.memory.ranges) >> 30) + 2, np.int64)
        # A block above 1 GiB takes several: up at its first, down behind its last.
        np.add.at(taken, (starts >> np.uint64(30)).astype(np.intp), 1)
        np.add.at(taken, ((starts + sizes - np.uint64(1)) >> np.uint64(30)).astype(np.intp) + 1, -1)
        free = np.flatnonzero(np.cumsum(taken)[:-1] == 0)
        areas: list[tuple[int, int]] = []
        for start, nbytes, _ in self.memory.ranges:
            first = len(areas)
            for number in free[
                (free >= start >> 30) & (free <= (start + nbytes - 1) >> 30)
            ].tolist():
                low, high = max(start, number * gib), min(start + nbytes, (number + 1) * gib)
                if len(areas) > first and sum(areas[-1]) == low:
                    areas[-1] = (areas[-1][0], high - areas[-1][0])
                else:
                    areas.append((low, high - low))
        return areas

    def retrieve_subtree(self, name: str) -> tuple[int, int]:
        """Return ``(phys, nbytes)`` of the blob called *name*, as ``kho_retrieve_subtree()``.

        Raises:
            KhoError: ENOENT if there is none; EOPNOTSUPP in kho-v5-series, whose data is inline.
        """
        self._check_open()
        require_call(not self.generation.inline, f"retrieve_subtree {name}", self.generation)
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

    # ---- nodes of the one tree (kho-v5-series) ----

    def _inline(self, what: str) -> None:
        self._check_open()
        require_call(self.generation.inline, what, self.generation)

    def get_node(self, parent: KhoInNode | None, name: str) -> KhoInNode:
        """Return the child of *parent* (None: the root) called *name*, as ``kho_get_node()``.

        Raises:
            KhoError: ENOENT if there is none; EOPNOTSUPP in other generations.
        """
        self._inline("get_node")
        path = f"{'' if parent is None else parent.path.rstrip('/')}/{name}"
        if not name or "/" in name or self._find(path) is None:
            raise from_errno(errno.ENOENT, f"get_node {path}: the previous kernel left none")
        return KhoInNode(path)

    def get_nodes(self, parent: KhoInNode | None) -> list[tuple[str, KhoInNode]]:
        """Return ``(name, node)`` of every child of *parent*, as ``kho_get_nodes()``.

        Raises:
            KhoError: ENOENT if *parent* is not there; EOPNOTSUPP in other generations.
        """
        self._inline("get_nodes")
        path = "/" if parent is None else parent.path
        node = self._find(path)
        if node is None:
            raise from_errno(errno.ENOENT, f"get_nodes {path}: the previous kernel left none")
        return [(n.name, KhoInNode(f"{path.rstrip('/')}/{n.name}")) for n in node.children]

    def get_prop(self, node: KhoInNode | None, name: str) -> memoryview | None:
        """Return a property's bytes where they lie, as ``kho_get_prop()``; None if it has none.

        Raises:
            KhoError: EOPNOTSUPP in other generations.
        """
        self._inline("get_prop")
        found = self._find("/" if node is None else node.path)
        value: memoryview | None = None if found is None else found.get(name)
        return value

    def node_check_compatible(self, node: KhoInNode | None, compatible: str) -> None:
        """Check a node's ``compatible``, as ``kho_node_check_compatible()``.

        Raises:
            KhoError: ENOENT if it has none; EINVAL if *compatible* is not in it; EOPNOTSUPP.
        """
        value = self.get_prop(node, "compatible")
        if value is None:
            raise from_errno(errno.ENOENT, f"{compatible}: the node says nothing of it")
        if compatible.encode() not in bytes(value).split(b"\0")[:-1]:
            raise from_errno(errno.EINVAL, f"{compatible}: the node is {bytes(value)!r}")

    def _find(self, path: str) -> "Node | None":
        try:
            return self.root.node(path)
        except (FdtError, KeyError):
            return None

    # ---- blocks, and how they end ----

    def restore_phys(self, phys: SupportsIndex, nbytes: SupportsIndex) -> int:
        """Take over a range, as ``kho_restore_phys()``; see :meth:`restore_pages`.

        Raises:
            KhoError: EINVAL if it is no whole pages, or as :meth:`restore_pages`; EOPNOTSUPP
                where ranges are given in pages.
        """
        self._check_open()
        require_call(self.generation.phys_calls, "restore_phys", self.generation)
        at, count = whole_pages(self.memory, "restore_phys", phys, nbytes)
        return self.restore_pages(at, count)

    def restore_vmalloc(self, descriptor: bytes) -> NDArray[np.uint64]:
        """Take a vmalloc area over, as ``kho_restore_vmalloc()``; its chunks are freed.

        Args:
            descriptor: the 16 bytes that ``preserve_vmalloc`` gave.

        Returns:
            ndarray: physical address of each block, in the area's order, ``uint64``.

        Raises:
            KhoError: EOPNOTSUPP if the generation has none.
            HandoverError: descriptor or chunks break a rule, or a block is not preserved; nothing
                has been restored then.
        """
        self._check_open()
        require_call(
            _abi.generation(self.abi).vmalloc, "restore_vmalloc", _abi.generation(self.abi)
        )
        return vmalloc.restore(self, descriptor)

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
        for phys, count in block_chain(memory, head, RefuseBlock(memory, self)):
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
        for phys in [p for p, _ in block_chain(self.memory, head, RefuseBlock(self.memory, self))]:
            self.restore_free(phys)


def native_u64(value: memoryview | None) -> int | None:
    """Value of a property of 8 bytes in the CPU's byte order, or None."""
    if value is None or value.nbytes != 8:
        return None
    return int(np.frombuffer(bytes(value), np.uint64)[0])


def require_call(there: bool, what: str, generation: _abi.Generation) -> None:
    """Raise KhoError (EOPNOTSUPP) unless *there*: *generation* lacks the call *what*."""
    if not there:
        raise from_errno(errno.EOPNOTSUPP, f"{what}: {generation.name} has no such call")


def whole_pages(
    memory: PhysicalMemory, what: str, phys: SupportsIndex, nbytes: SupportsIndex
) -> tuple[int, int]:
    """Return (address, pages) of a range in bytes; KhoError (EINVAL) if it is no whole pages."""
    at, size = operator.index(phys), operator.index(nbytes)
    if at % memory.page_size or size % memory.page_size or size < 0:
        raise from_errno(errno.EINVAL, f"{what} {at:#x}+{size:#x}: not whole pages")
    return at, size // memory.page_size


def _open_root(memory: PhysicalMemory, handover: Handover, inline: bool) -> Fdt:
    phys, nbytes = handover.fdt_phys, handover.fdt_len
    if inline and phys > 0 and memory.contains(phys, 40) and memory.is_populated(phys, 40):
        # the reader of kho-v5-series takes the tree's own word for its size
        nbytes = max(40, int.from_bytes(memory.view(phys + 4, 4), "big"))
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
