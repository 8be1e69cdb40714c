"""Memfds as files of a session: contents, size, position and seals.

Mirrors ``mm/memfd_luo.c`` and ``include/linux/kho/abi/memfd.h`` of Linux 7.3 ("memfd-v2";
luo-mainline 4.4, 4.5). A file is a descriptor of a real memfd of this process, and a real memfd
comes back.

Linux hands over the memfd's own pages. Here these belong to the host, and what crosses are folios
of simulated memory, so contents are copied: at PRESERVE into the folios, and out of them when the
file is retrieved. Linux refuses to resize a preserved memfd, and lets it be written in place until
the jump. Nobody can freeze another's memfd from user space, so the jump compares file and folios
and copies what differs (:class:`MemfdCost` says what that cost), and a file whose size has changed
by then makes it fail with EPERM. A file that was cut and has grown to its old size again is taken
for one that was written. With F_SEAL_WRITE and F_SEAL_SHRINK nothing can differ, and nothing is
compared.

Unhappy paths: a preserve that fails leaves nothing. A retrieve that fails frees what it can, and
so does finish for a file that nobody retrieved; what cannot be read stays preserved, unused, until
the next boot.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from luo import abi, vmalloc
from luo.errors import HandoverError, KhoError, KhoNoMemoryError, from_errno
from luo.files import FileHandler

if TYPE_CHECKING:
    from luo.files import FileArgs
    from luo.incoming import Incoming
    from luo.memory import PhysicalMemory

__all__ = [
    "MemfdCost",
    "MemfdHandler",
    "MemfdRecord",
    "PreservedMemfd",
    "folio_orders",
    "memfd_handler",
    "read_memfd",
    "write_contents",
]

_log = logging.getLogger(__name__)

_F_SEAL_FUTURE_WRITE: Final = 0x10
_F_SEAL_EXEC: Final = 0x20
_SEALS: Final = (
    fcntl.F_SEAL_SEAL
    | fcntl.F_SEAL_SHRINK
    | fcntl.F_SEAL_GROW
    | fcntl.F_SEAL_WRITE
    | _F_SEAL_FUTURE_WRITE
    | _F_SEAL_EXEC
)  # those of memfd-v2
_FIXED: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK  # with both, contents cannot change
_MFD_EXEC: Final = 0x10

_PAGES_MAX: Final = (1 << 32) - 1  # of a file: UINT_MAX
_DIRTY: Final = 1
_UPTODATE: Final = 2
_PFN_BITS: Final = 52

_GRAIN: Final = 4096  # bytes that are compared and recopied together
_CHUNK: Final = 1 << 20  # bytes that are compared at a time: in the cache, when they are
_PIECE: Final = 1 << 24  # bytes that are copied at a time


# ---- what it costs ----


@dataclass(slots=True)
class MemfdCost:
    """What keeping memfds cost; of one, or of all of a handler.

    Attributes:
        copied_bytes: copied to memory at PRESERVE; holes are not.
        preserve_ns: time of PRESERVE.
        compared_bytes: file and folios compared, in jumps and attempts at one.
        recopied_bytes: of these, in blocks of 4096, what differed and was copied.
        freeze_ns: time of that, which is blackout.
        retrieved_bytes: copied from memory into new memfds; zeros of holes are not.
        retrieve_ns: time of retrieving.
    """

    copied_bytes: int = 0
    preserve_ns: int = 0
    compared_bytes: int = 0
    recopied_bytes: int = 0
    freeze_ns: int = 0
    retrieved_bytes: int = 0
    retrieve_ns: int = 0

    def add(self, other: MemfdCost) -> None:
        """Add *other* to this one."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(slots=True)
class PreservedMemfd:
    """What the handler knows of a file: ``args.private``.

    Attributes:
        size: in bytes, as it was at PRESERVE; nobody may change it until the jump.
        seals: as they were at PRESERVE.
        folios: physical address of each folio, in the order of the file, uint64.
        orders: of each, uint8.
        cost: what this file cost.
    """

    size: int
    seals: int
    folios: NDArray[np.uint64]
    orders: NDArray[np.uint8]
    cost: MemfdCost
    _layout: _Layout
    _undo: ExitStack


@dataclass(frozen=True, eq=False)
class MemfdHandler(FileHandler):
    """Keeps memfds; made by :func:`memfd_handler`.

    Attributes:
        cost: what all its files cost.
    """

    cost: MemfdCost = field(default_factory=MemfdCost)


def memfd_handler(max_order: int = 0) -> MemfdHandler:
    """Return a handler for memfds, ``memfd-v2``.

    Args:
        max_order: the largest order of its folios, where memory has such blocks free; a file ends
            in smaller ones, and none goes past its last page. Linux makes folios of order 0 unless
            huge pages are enabled for memfds, and a kernel without huge pages takes no others.

    Raises:
        ValueError: *max_order* is negative.
    """
    if max_order < 0:
        raise ValueError(f"max_order {max_order}: is negative")
    operations = _Operations(max_order, MemfdCost())
    return MemfdHandler(
        abi.LUO_MEMFD_COMPATIBLE,
        can_preserve=_can_preserve,
        preserve=operations.preserve,
        unpreserve=_unpreserve,
        retrieve=operations.retrieve,
        finish=_finish,
        freeze=operations.freeze,
        cost=operations.cost,
    )


class _Operations:
    """The callbacks that cost something."""

    def __init__(self, max_order: int, cost: MemfdCost) -> None:
        self.max_order = max_order
        self.cost = cost

    def preserve(self, args: FileArgs) -> None:
        begin = time.perf_counter_ns()
        kept = _preserve(args, self.max_order)
        kept.cost.preserve_ns = time.perf_counter_ns() - begin
        self.cost.add(kept.cost)
        args.private = kept

    def freeze(self, args: FileArgs) -> None:
        begin = time.perf_counter_ns()
        cost = _freeze(args)
        cost.freeze_ns = time.perf_counter_ns() - begin
        args.private.cost.add(cost)
        self.cost.add(cost)

    def retrieve(self, args: FileArgs) -> None:
        begin = time.perf_counter_ns()
        cost = _retrieve(args)
        cost.retrieve_ns = time.perf_counter_ns() - begin
        self.cost.add(cost)


# ---- before the jump ----


def _can_preserve(file: Any) -> bool:
    """Whether *file* is of tmpfs and has no name; OSError (EBADF) if it is not open."""
    if not isinstance(file, int):
        return False
    try:
        fcntl.fcntl(file, fcntl.F_GET_SEALS)  # EINVAL: neither tmpfs nor hugetlbfs
    except OSError as error:
        if error.errno == errno.EBADF:
            raise
        return False
    # The block of hugetlbfs is a huge page, that of tmpfs is a page.
    return os.fstat(file).st_nlink == 0 and os.fstatvfs(file).f_bsize == os.sysconf("SC_PAGESIZE")


def _preserve(args: FileArgs, max_order: int) -> PreservedMemfd:
    kho, memory, fd = args.kho, args.memory, args.file
    with ExitStack() as undo:
        phys = kho.alloc_preserve(abi.LUO_MEMFD_SER.size + abi.VMALLOC_SER.size)
        undo.callback(kho.unpreserve_free, phys)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if seals & ~_SEALS:
            raise from_errno(
                errno.EOPNOTSUPP, f"memfd has seals {seals & ~_SEALS:#x}, unknown to memfd-v2"
            )
        size = os.fstat(fd).st_size
        nr_pages = -(-size // memory.page_size)
        if nr_pages > _PAGES_MAX:
            raise from_errno(errno.EFBIG, f"memfd has {nr_pages} pages, above 2^32 - 1")
        folios, orders = _alloc(memory, nr_pages, max_order)
        undo.callback(memory.free_folios, folios)
        sizes = np.left_shift(np.uint64(memory.page_size), orders.astype(np.uint64))
        offsets = np.cumsum(sizes) - sizes
        layout = _Layout(offsets, folios, sizes)
        cost = MemfdCost(copied_bytes=_fill(fd, size, memory, layout))
        kho.preserve_folios(folios, orders)
        undo.callback(kho.unpreserve_folios, folios, orders)
        descriptor = bytes(abi.VMALLOC_SER.size)
        if size:
            array = _write_array(memory, folios, offsets)
            undo.callback(memory.free_folios, array)
            descriptor = kho.preserve_vmalloc(array)
            undo.callback(kho.unpreserve_vmalloc, descriptor)
        record = abi.LUO_MEMFD_SER.pack(_position(fd), size, seals, 0, len(folios)) + descriptor
        memory.view(phys, len(record))[:] = record
        args.data = phys
        return PreservedMemfd(size, seals, folios, orders, cost, layout, undo.pop_all())


def _position(fd: int) -> int:
    return os.lseek(fd, 0, os.SEEK_CUR)


def _unpreserve(args: FileArgs) -> None:
    args.private._undo.close()


def _freeze(args: FileArgs) -> MemfdCost:
    memory, fd, kept = args.memory, args.file, args.private
    size = os.fstat(fd).st_size
    if size != kept.size:
        raise from_errno(
            errno.EPERM, f"memfd was resized from {kept.size} to {size} bytes while preserved"
        )
    cost = MemfdCost()
    if kept.seals & _FIXED != _FIXED:
        cost.compared_bytes = size
        cost.recopied_bytes = _refill(fd, size, memory, kept._layout)
    struct.pack_into("=Q", memory.view(args.data, 8), 0, _position(fd))
    return cost


def _alloc(
    memory: PhysicalMemory, nr_pages: int, max_order: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Return (addresses, orders) of folios that make up *nr_pages* pages, the largest first."""
    order = min(max_order, memory.max_order)
    while True:
        counts = [(nr_pages >> order, order)]
        counts += [(1, o) for o in range(order - 1, -1, -1) if nr_pages >> o & 1]
        parts = [np.empty(0, np.uint64)]
        try:
            for count, o in counts:
                parts.append(memory.alloc_folios(count, o))
        except KhoNoMemoryError:
            memory.free_folios(np.concatenate(parts))
            if order == 0:
                raise
            order -= 1
            continue
        orders = np.repeat([o for _, o in counts], [count for count, _ in counts])
        return np.concatenate(parts), orders.astype(np.uint8)


def _write_array(
    memory: PhysicalMemory, folios: NDArray[np.uint64], offsets: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Write the records of folios to pages of their own; return the address of each page."""
    page = memory.page_size
    nr_pages = -(-len(folios) * abi.LUO_FOLIO_SER.size // page)
    words = np.zeros(nr_pages * page // 8, np.uint64)
    words[: 2 * len(folios) : 2] = folios // np.uint64(page) | np.uint64(
        (_DIRTY | _UPTODATE) << _PFN_BITS
    )
    words[1 : 2 * len(folios) : 2] = offsets // np.uint64(page)
    array = memory.alloc_folios(nr_pages, 0)
    for offset, phys, nbytes in _whole_pages(memory, array).pieces(0, words.nbytes, _PIECE):
        memory.view(phys, nbytes)[:] = words.data.cast("B")[offset : offset + nbytes]
    return array


# ---- after the jump ----


class _Header(NamedTuple):
    pos: int
    size: int
    seals: int
    flags: int
    nr_folios: int
    descriptor: bytes


@dataclass(frozen=True, slots=True, eq=False)
class MemfdRecord:
    """A memfd that was handed over.

    Attributes:
        pos: its position.
        size: in bytes.
        seals: as ``F_ADD_SEALS`` takes them.
        folios: physical address of each folio, as listed, shape (n,), uint64; pages of the file
            that none has are zeros.
        index: number of a folio's first page in the file, uint64; may lie behind the file's end.
        filled: whether a folio has contents; one without is zeros.
    """

    pos: int
    size: int
    seals: int
    folios: NDArray[np.uint64]
    index: NDArray[np.uint64]
    filled: NDArray[np.bool_]


def read_memfd(incoming: Incoming, phys: int) -> MemfdRecord:
    """Return what the record at *phys* says, without taking anything over.

    Whether the folios are preserved is for ``restore_folios``, or :func:`folio_orders`, to say.

    Args:
        incoming: what was handed over, booted on or not.
        phys: what the handler left in the file's record.

    Raises:
        HandoverError: a rule of the format is broken.
        KhoError: EOPNOTSUPP for seals that memfd-v2 does not have.
    """
    header = _read_header(incoming, phys)
    if header.seals & ~_SEALS:
        raise from_errno(
            errno.EOPNOTSUPP,
            f"memfd at {phys:#x} has seals {header.seals & ~_SEALS:#x}, unknown to memfd-v2",
        )
    if header.flags:
        raise HandoverError(f"memfd has flags {header.flags:#x}, of which there are none", phys)
    if header.size >> 63:
        raise HandoverError(f"memfd of {header.size:#x} bytes, above 2^63 - 1", phys)
    folios, index, flags = _read_array(incoming, phys, header)
    return MemfdRecord(
        header.pos, header.size, header.seals, folios, index, flags & np.uint64(_UPTODATE) != 0
    )


def _read_header(incoming: Incoming, phys: int) -> _Header:
    nbytes = abi.LUO_MEMFD_SER.size + abi.VMALLOC_SER.size
    if incoming.order_of(phys) is None:
        raise HandoverError("memfd's record is not a preserved block", phys)
    if not incoming.memory.is_populated(phys, nbytes):
        raise HandoverError("memfd's record was never written", phys)
    raw = bytes(incoming.memory.view(phys, nbytes))
    return _Header._make((*abi.LUO_MEMFD_SER.unpack_from(raw), raw[abi.LUO_MEMFD_SER.size :]))


def _read_array(
    incoming: Incoming, phys: int, header: _Header
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Return address, index and flags of each folio; an entry with pfn 0 is no folio."""
    if not header.nr_folios:
        return (np.empty(0, np.uint64),) * 3
    memory = incoming.memory
    blocks, order = vmalloc.read(incoming, header.descriptor)
    wanted = header.nr_folios * abi.LUO_FOLIO_SER.size
    if wanted > len(blocks) * memory.page_size << order:
        raise HandoverError(
            f"memfd's {header.nr_folios} folios are more than its array of {len(blocks)} blocks"
            f" of order {order} holds",
            phys,
        )
    layout = _whole_pages(memory, blocks, order)
    for _, at, nbytes in layout.pieces(0, wanted, wanted):
        if not memory.is_populated(at, nbytes):
            raise HandoverError("memfd's array of folios was never written", at)
    words = np.empty(wanted // 8, np.uint64)
    for offset, at, nbytes in layout.pieces(0, wanted, wanted):
        words.data.cast("B")[offset : offset + nbytes] = memory.view(at, nbytes)
    entries = words.reshape(-1, 2)
    pfns = entries[:, 0] & np.uint64((1 << _PFN_BITS) - 1)
    entries, pfns = entries[pfns != 0], pfns[pfns != 0]
    shift = memory.page_size.bit_length() - 1
    beyond = np.flatnonzero(pfns >> np.uint64(64 - shift))
    if beyond.size:
        raise HandoverError(f"memfd's folio has pfn {int(pfns[beyond[0]]):#x}", phys)
    return pfns << np.uint64(shift), entries[:, 1].copy(), entries[:, 0] >> np.uint64(_PFN_BITS)


def folio_orders(incoming: Incoming, record: MemfdRecord) -> NDArray[np.uint8]:
    """Return the order of each folio, for who reads a file and does not take it over.

    Raises:
        KhoError: EIO if one is not preserved.
    """
    orders = np.zeros(len(record.folios), np.uint8)
    for place, phys in enumerate(record.folios.tolist()):
        order = incoming.order_of(phys)
        if order is None:
            raise from_errno(errno.EIO, f"memfd's folio {phys:#x}: is not preserved")
        orders[place] = order
    return orders


def write_contents(
    memory: PhysicalMemory, record: MemfdRecord, orders: NDArray[np.uint8], fd: int
) -> int:
    """Write what a memfd's folios hold to a new, empty file, and give it its size.

    Args:
        memory: that has the folios.
        record: of the memfd.
        orders: of its folios, shape (n,), uint8.
        fd: the file.

    Returns:
        int: bytes that were written; zeros that lie in holes are not.

    Raises:
        KhoError: EEXIST if folios overlap in the file; EINVAL if an index is no multiple of its
            folio's pages. Nothing has been written then.
        OSError: the file cannot be written.
    """
    by_index = np.argsort(record.index, kind="stable")
    index, folios = record.index[by_index], record.folios[by_index]
    nr_pages = np.left_shift(np.uint64(1), orders[by_index].astype(np.uint64))
    wrong = np.flatnonzero(index & (nr_pages - np.uint64(1)))
    if wrong.size:
        raise from_errno(
            errno.EINVAL,
            f"memfd's folio {int(folios[wrong[0]]):#x}: index {int(index[wrong[0]])} is no multiple"
            f" of {int(nr_pages[wrong[0]])} pages",
        )
    wrong = np.flatnonzero(index[1:] - index[:-1] < nr_pages[:-1])
    if wrong.size:
        raise from_errno(
            errno.EEXIST,
            f"memfd's folio {int(folios[wrong[0] + 1]):#x}: overlaps another at index"
            f" {int(index[wrong[0] + 1])}",
        )
    os.ftruncate(fd, record.size)
    page = np.uint64(memory.page_size)
    seen = record.filled[by_index] & (index <= np.uint64(max(record.size - 1, 0)) // page)
    layout = _Layout(index[seen] * page, folios[seen], nr_pages[seen] * page)
    return sum(
        _write(fd, offset, memory, phys, nbytes)
        for offset, phys, nbytes in layout.pieces(0, record.size, _CHUNK)
    )


def _retrieve(args: FileArgs) -> MemfdCost:
    incoming, memory = args.incoming, args.memory
    try:
        record = read_memfd(incoming, args.data)
    except (HandoverError, KhoError) as error:
        _discard(incoming, args.data)
        if isinstance(error, KhoError):
            raise
        raise from_errno(errno.EINVAL, f"memfd at {args.data:#x}: {error}") from error
    _free_metadata(incoming, args.data)
    try:
        orders = incoming.restore_folios(record.folios)
    except KhoError as error:
        _free_folios(incoming, record.folios)
        raise from_errno(errno.EIO, f"memfd's folio: {error}") from error
    with ExitStack() as undo:
        undo.callback(memory.free_folios, record.folios)
        with ExitStack() as on_error:
            fd = _new_memfd()
            on_error.callback(os.close, fd)
            cost = MemfdCost(retrieved_bytes=write_contents(memory, record, orders, fd))
            if record.pos < 1 << 63:  # Linux leaves the new file at 0 otherwise
                os.lseek(fd, record.pos, os.SEEK_SET)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, record.seals)
            on_error.pop_all()
    args.file = fd
    return cost


def _new_memfd() -> int:
    """Return a memfd like Linux makes one here: without a name, executable, sealable."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("", flags | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a host before 6.3, where all are executable
            raise
    return os.memfd_create("", flags)


def _finish(args: FileArgs) -> None:
    if not args.retrieve_status:  # else retrieving has freed all that can be freed
        _discard(args.incoming, args.data)


def _discard(incoming: Incoming, phys: int) -> None:
    """Free a memfd that nobody will retrieve, as far as it can be read."""
    try:
        header = _read_header(incoming, phys)
    except HandoverError as error:
        _log.warning("memfd at %#x is not freed: %s", phys, error)
        return
    try:
        folios, _, _ = _read_array(incoming, phys, header)
    except HandoverError as error:
        _log.warning("folios of memfd at %#x are not freed: %s", phys, error)
        incoming.restore_free(phys)
        return
    _free_metadata(incoming, phys)
    _free_folios(incoming, folios)


def _free_metadata(incoming: Incoming, phys: int) -> None:
    """Free the array of folios, which has been read, and the record."""
    header = _read_header(incoming, phys)
    try:
        incoming.restore_free(phys)
        if header.nr_folios:
            order = vmalloc.VmallocDescriptor.unpack(header.descriptor).order
            for block in incoming.restore_vmalloc(header.descriptor).tolist():
                incoming.memory.free_pages(block, 1 << order)
    except (HandoverError, KhoError) as error:  # one is part of the other
        _log.warning("array of memfd at %#x is not freed: %s", phys, error)


def _free_folios(incoming: Incoming, folios: NDArray[np.uint64]) -> None:
    """Free folios, except those that are not preserved."""
    try:
        incoming.restore_folios(folios)
    except KhoError:
        lost = 0
        for phys in folios.tolist():
            try:
                incoming.restore_free(phys)
            except KhoError:
                lost += 1
        _log.warning("%d of a memfd's %d folios are not preserved", lost, len(folios))
        return
    incoming.memory.free_folios(folios)


# ---- bytes of a file, bytes of memory ----


class _Layout:
    """Where in memory the bytes of a file lie, as runs that adjoin in both.

    Args:
        offsets: in the file, ascending, uint64.
        phys: address of each.
        sizes: bytes of each.
    """

    def __init__(
        self, offsets: NDArray[np.uint64], phys: NDArray[np.uint64], sizes: NDArray[np.uint64]
    ) -> None:
        adjoin = (offsets[1:] - offsets[:-1] == sizes[:-1]) & (phys[1:] - phys[:-1] == sizes[:-1])
        first = np.flatnonzero(np.concatenate(([True], ~adjoin))[: len(phys)])
        self._offsets: list[int] = offsets[first].tolist()
        self._phys: list[int] = phys[first].tolist()
        self._sizes: list[int] = np.add.reduceat(sizes, first).tolist() if first.size else []

    def pieces(self, start: int, end: int, most: int) -> Iterator[tuple[int, int, int]]:
        """Yield (offset, phys, bytes) of what lies in [start, end) of the file.

        Args:
            start: first byte in the file.
            end: behind the last.
            most: bytes of a piece.
        """
        for run in range(max(0, bisect_right(self._offsets, start) - 1), len(self._offsets)):
            offset, phys = self._offsets[run], self._phys[run]
            if offset >= end:
                break
            stop = min(end, offset + self._sizes[run])
            for at in range(max(start, offset), stop, most):
                yield at, phys + at - offset, min(most, stop - at)


def _whole_pages(memory: PhysicalMemory, blocks: NDArray[np.uint64], order: int = 0) -> _Layout:
    """Layout of bytes that fill blocks of one order."""
    size = memory.page_size << order
    return _Layout(
        np.arange(len(blocks), dtype=np.uint64) * np.uint64(size),
        blocks,
        np.full(len(blocks), size, np.uint64),
    )


class _Source:
    """A file that is read, and whose position stays."""

    def __init__(self, fd: int) -> None:
        try:  # a description of its own can look for holes
            self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            self._own = True
        except OSError:  # of another user, or without /proc
            self.fd = os.dup(fd)
            self._own = False

    def close(self) -> None:
        os.close(self.fd)

    def extents(self, size: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, whether it is data) of what makes up the first *size* bytes."""
        at = 0
        if not self._own:
            yield 0, size, True
            at = size
        while at < size:
            start = self._seek(at, os.SEEK_DATA, size)
            if start > at:
                yield at, start, False
            at = start
            if start < size:
                at = self._seek(start, os.SEEK_HOLE, size)
                yield start, at, True

    def _seek(self, at: int, how: int, size: int) -> int:
        try:
            return min(os.lseek(self.fd, at, how), size)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data behind, or the file was cut
                raise
            return size

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill *buffer* with the bytes from *offset* on."""
        done = 0
        while done < len(buffer):
            nbytes = os.preadv(self.fd, [buffer[done:]], offset + done)
            if not nbytes:
                raise from_errno(errno.EPERM, f"memfd: was cut to {offset + done} bytes")
            done += nbytes


def _fill(fd: int, size: int, memory: PhysicalMemory, layout: _Layout) -> int:
    """Copy a file to memory; return the bytes of it that are no holes."""
    copied = 0
    with closing(_Source(fd)) as source:
        for start, end, is_data in source.extents(size):
            for offset, phys, nbytes in layout.pieces(start, end, _PIECE):
                if is_data:
                    _copy(source, offset, memory, phys, nbytes)
                    copied += nbytes
                else:
                    _clear(memory, phys, nbytes)
    for _, phys, nbytes in layout.pieces(size, size + memory.page_size, _PIECE):
        memory.view(phys, nbytes)[:] = bytes(nbytes)  # what is behind the end of the last page
    return copied


def _copy(source: _Source, offset: int, memory: PhysicalMemory, phys: int, nbytes: int) -> None:
    done = 0
    if memory.fd >= 0 and not memory.is_resident(phys, nbytes):
        # Pages that the file of memory lacks cost half of what faults on them would.
        at = memory.offset + phys - memory.base
        with suppress(OSError):  # files of two file systems, or a host without this
            while done < nbytes and (
                part := os.copy_file_range(
                    source.fd, memory.fd, nbytes - done, offset + done, at + done
                )
            ):
                done += part
    source.read(memory.view(phys + done, nbytes - done), offset + done)


def _refill(fd: int, size: int, memory: PhysicalMemory, layout: _Layout) -> int:
    """Copy what differs in a file to memory; return the bytes of it."""
    copied = 0
    buffer = bytearray(_CHUNK)
    with closing(_Source(fd)) as source, memoryview(buffer) as view:
        for start, end, is_data in source.extents(size):
            for offset, phys, nbytes in layout.pieces(start, end, _CHUNK):
                if not is_data:
                    copied += _clear(memory, phys, nbytes)
                    continue
                source.read(view[:nbytes], offset)
                if nbytes == _CHUNK and buffer == memory.view(phys, nbytes):  # memcmp()
                    continue
                whole = -(-nbytes // _GRAIN) * _GRAIN  # of the file's last page, with zeros
                view[nbytes:whole] = bytes(whole - nbytes)
                copied += _update(memory, phys, np.frombuffer(buffer, np.uint64, whole // 8))
    return copied


def _update(memory: PhysicalMemory, phys: int, new: NDArray[np.uint64]) -> int:
    """Copy what differs to memory; return the bytes of it."""
    old = np.frombuffer(memory.view(phys, new.nbytes), np.uint64)
    differs = new != old
    if not differs.any():
        return 0
    grains = differs.reshape(-1, _GRAIN // 8).any(axis=1)
    old.reshape(-1, _GRAIN // 8)[grains] = new.reshape(-1, _GRAIN // 8)[grains]
    return int(np.count_nonzero(grains)) * _GRAIN


def _clear(memory: PhysicalMemory, phys: int, nbytes: int) -> int:
    """Make bytes of memory zero that are not; return how many were written."""
    cleared = 0
    for at in range(phys, phys + nbytes, _CHUNK):
        part = min(_CHUNK, -(-(phys + nbytes - at) // _GRAIN) * _GRAIN)
        if _peek(memory, at, part).any():
            cleared += _update(memory, at, np.zeros(part // 8, np.uint64))
    return cleared


def _peek(memory: PhysicalMemory, phys: int, nbytes: int) -> NDArray[np.uint64]:
    """Return bytes of memory, where they lie unless that would fill a hole of its file."""
    if memory.is_resident(phys, nbytes):
        return np.frombuffer(memory.view(phys, nbytes), np.uint64)
    words = np.empty(nbytes // 8, np.uint64)
    memory.read_into(phys, words.data)
    return words


def _write(fd: int, offset: int, memory: PhysicalMemory, phys: int, nbytes: int) -> int:
    """Write bytes of memory to a file of zeros; return how many were written."""
    if memory.is_resident(phys, nbytes):
        return _write_all(fd, memory.view(phys, nbytes), offset)
    whole = -(-nbytes // _GRAIN) * _GRAIN
    words = _peek(memory, phys, whole)
    grains = np.flatnonzero(words.reshape(-1, _GRAIN // 8).any(axis=1)) * _GRAIN
    data = words.data.cast("B")[:nbytes]
    return sum(_write_all(fd, data[at : at + _GRAIN], offset + at) for at in grains.tolist())


def _write_all(fd: int, data: memoryview, offset: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwritev(fd, [data[done:]], offset + done)
    return done
