"""Devices that go on writing into memory while the kernel is changed.

A :class:`Dma` belongs to the hardware: its thread writes through a mapping of its own on the
memory's file, so neither the end of a kernel nor the cut-off of a kernel's views stops it. The ring
that it fills is the business of a driver, which must preserve it for the next kernel.

What counts as a **stray** write: when a kernel has booted, each part of a running device's range
that this kernel was not told to keep, for from the jump on the device may write there. What the
kernel was told is what it finds in the preserved map; one that boots cold finds none. It names
whose memory that is once drivers have restored and probed, logs it, and so do the handle, the
report of :func:`luo.kernel.live_update` and :attr:`luo.kernel.Kernel.strays`.

A part that is free by then may be in use later: :func:`whose` tells at any time.

Memory that the running kernel itself freed under a device is that kernel's own business, as in
Linux: nothing is said until somebody asks :func:`check`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import NDArray

from luo import abi
from luo.errors import LuoError, StateError, from_errno
from luo.incoming import native_u64

if TYPE_CHECKING:
    from luo.kho import Incoming, Kho
    from luo.machine import Machine
    from luo.memory import PhysicalMemory

__all__ = ["Dma", "DmaReport", "Extent", "Stray", "Target", "check", "stamp", "whose"]

_log = logging.getLogger(__name__)

_BURST: Final = 64  # writes between two pauses: some 100 µs with the interpreter for itself

#: The path of a device, and the range that it writes: address and bytes.
Target: TypeAlias = tuple[str, int, int]
Pattern: TypeAlias = Callable[[int], bytes]


class Extent(NamedTuple):
    """Whose a stretch of memory is: address, bytes, owner in words."""

    phys: int
    nbytes: int
    owner: str


class Stray(NamedTuple):
    """Memory that a device may write and that its kernel was not told to keep.

    Attributes:
        device: path of the device.
        phys: first byte.
        nbytes: how many.
        owner: whose it is, as of :func:`whose`, once the kernel had restored and probed.
    """

    device: str
    phys: int
    nbytes: int
    owner: str

    def __str__(self) -> str:
        where = f"{self.phys:#x}+{self.nbytes:#x}"
        return f"DMA of {self.device} into {where}, which was not preserved: {self.owner}"


def stamp(number: int) -> bytes:
    """Return the 64 bytes that write *number* leaves: eight times that u64, little-endian."""
    return number.to_bytes(8, "little") * 8


@dataclass(frozen=True, slots=True)
class DmaReport:
    """What a device wrote until it was stopped.

    The range is a ring of equal entries; write *n*, from 0 on, goes to entry ``n % nr_entries``.

    Attributes:
        device: its path.
        phys, nbytes: the range.
        entry_bytes: of one write.
        writes: complete writes.
        strays: what it may have written where no kernel was told to keep it; all updates.
    """

    device: str
    phys: int
    nbytes: int
    entry_bytes: int
    writes: int
    strays: tuple[Stray, ...]
    _pattern: Pattern = field(repr=False)

    @property
    def nr_entries(self) -> int:
        """Entries of the ring."""
        return self.nbytes // self.entry_bytes

    @property
    def bytes_written(self) -> int:
        """Bytes of all writes."""
        return self.writes * self.entry_bytes

    def last(self, entry: int) -> int | None:
        """Return the number of the last write into *entry*, None if there was none."""
        if not 0 <= entry < self.nr_entries:
            raise IndexError(f"entry {entry} of {self.nr_entries}")
        if entry >= self.writes:
            return None
        return entry + (self.writes - 1 - entry) // self.nr_entries * self.nr_entries

    def expected(self) -> bytes:
        """Return what must stand in the ring now, up to the last entry that was ever written."""
        numbers = (self.last(entry) for entry in range(min(self.writes, self.nr_entries)))
        return b"".join(self._pattern(number) for number in numbers if number is not None)


class _Engine:
    """What the thread of a device works with.

    It does not know the handle, which can be collected while the thread runs.
    """

    def __init__(
        self, memory: PhysicalMemory, phys: int, nbytes: int, pattern: Pattern, interval: float
    ) -> None:
        self.pattern = pattern
        self.entry_bytes = len(pattern(0))
        if not self.entry_bytes or nbytes % self.entry_bytes:
            raise from_errno(
                errno.EINVAL,
                f"dma {phys:#x}+{nbytes:#x}: not whole entries of {self.entry_bytes} bytes",
            )
        self.writes = 0
        self.error: BaseException | None = None
        self.stopping = threading.Event()
        self.progress = threading.Condition()
        self._nr_entries = nbytes // self.entry_bytes
        self._interval = interval
        at = memory.offset + phys - memory.base
        self._start = at % mmap.ALLOCATIONGRANULARITY
        memory.prefault(phys, nbytes)
        self._mapping = mmap.mmap(memory.file("dma"), self._start + nbytes, offset=at - self._start)

    def run(self) -> None:
        try:
            self._burst()
            while not self.stopping.wait(self._interval):
                self._burst()
        except BaseException as error:
            self.error = error
        finally:
            self.stopping.set()
            self._mapping.close()
            with self.progress:
                self.progress.notify_all()

    def _burst(self) -> None:
        size = self.entry_bytes
        for _ in range(min(_BURST, self._nr_entries)):
            data = self.pattern(self.writes)
            if len(data) != size:
                raise ValueError(f"dma: pattern of {len(data)} bytes, the first had {size}")
            at = self._start + self.writes % self._nr_entries * size
            self._mapping[at : at + size] = data
            self.writes += 1
        with self.progress:
            self.progress.notify_all()

    def wait(self, writes: int) -> bool:
        with self.progress:
            self.progress.wait_for(lambda: self.writes >= writes or self.stopping.is_set())
        return self.writes >= writes


class Dma:
    """A device that writes until it is stopped; made by :meth:`luo.machine.Machine.dma`.

    It goes on when kernels come and go, and when none runs at all. It ends with :meth:`stop`, the
    end of a ``with`` block, or when nobody refers to it any more.

    Attributes:
        machine: the hardware that it is a part of.
        device: its path.
        phys, nbytes: the range that it writes.
        strays: see :class:`DmaReport`; as of now.

    Context:
        Any thread. The device's own thread is a daemon; it takes the interpreter for a burst of
        64 writes and then sleeps.
    """

    def __init__(
        self,
        machine: Machine,
        device: SupportsIndex | str,
        phys: SupportsIndex,
        nbytes: SupportsIndex,
        pattern: bytes | Pattern,
        interval: float,
    ) -> None:
        self.machine = machine
        self.device = _path(machine, device)
        self.phys, self.nbytes = operator.index(phys), operator.index(nbytes)
        self.strays: list[Stray] = []
        memory, what = machine.memory, f"dma {self.phys:#x}+{self.nbytes:#x}"
        if not interval > 0:
            raise ValueError(f"{what}: interval {interval!r} is not above 0")
        if self.nbytes <= 0 or not memory.contains(self.phys, self.nbytes):
            raise from_errno(errno.EINVAL, f"{what}: not in RAM")
        if machine.elsewhere is not None:
            raise from_errno(errno.EOPNOTSUPP, f"{what}: the hardware is in another process")
        write = pattern if callable(pattern) else _Constant(bytes(pattern))
        self._engine = _Engine(memory, self.phys, self.nbytes, write, interval)
        # Only the event: the collector may run in the very thread that is to end.
        self._finalizer = weakref.finalize(self, self._engine.stopping.set)
        self._thread = threading.Thread(
            target=self._engine.run, name=f"dma {self.device}", daemon=True
        )
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it writes."""
        return not self._engine.stopping.is_set()

    @property
    def writes(self) -> int:
        """Complete writes until now."""
        return self._engine.writes

    def lap(self) -> int:
        """Wait until it has written every entry of the ring once more; return :attr:`writes`.

        Raises:
            StateError: ESHUTDOWN if it stopped before.
        """
        engine = self._engine
        if not engine.wait(engine.writes + self.nbytes // engine.entry_bytes):
            raise StateError(errno.ESHUTDOWN, f"dma of {self.device}: it has stopped")
        return engine.writes

    def stop(self) -> DmaReport:
        """End it, wait for its thread, unmap; again: only the report.

        Raises:
            Exception: what *pattern* raised, which ended it; a ValueError if its length changed.
        """
        self._finalizer()
        self._thread.join()
        if self._engine.error is not None:
            raise self._engine.error
        return DmaReport(
            self.device,
            self.phys,
            self.nbytes,
            self._engine.entry_bytes,
            self._engine.writes,
            tuple(self.strays),
            self._engine.pattern,
        )

    def __enter__(self) -> Dma:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<Dma {self.device} {self.phys:#x}+{self.nbytes:#x} {state}>"


@dataclass(frozen=True, slots=True)
class _Constant:
    """A pattern that is always the same."""

    data: bytes

    def __call__(self, number: int) -> bytes:
        return self.data


def _path(machine: Machine, device: SupportsIndex | str) -> str:
    tree = machine.devices
    row = tree[device] if isinstance(device, str) else device.__index__()
    path = tree.path(row)
    if not tree.alive[row]:
        raise IndexError(f"{path!r}: was removed")
    return path


# ---- what a kernel that boots makes of it ----


def targets(machine: Machine) -> list[Target]:
    """Return what the machine's devices write at present, also for another process."""
    if machine.elsewhere is not None:
        return machine.elsewhere
    return [(stream.device, stream.phys, stream.nbytes) for stream in machine.streams]


def escaping(machine: Machine, incoming: Incoming | None) -> list[Target]:
    """Return the parts of :func:`targets` that the kernel which boots is not told to keep.

    Args:
        machine: the hardware.
        incoming: what the previous kernel left, booted from, nothing of it restored yet; None:
            nothing.
    """
    wanted = targets(machine)
    if not wanted or incoming is None:
        return wanted
    heads, orders = incoming.unrestored()
    return [
        (device, start, stop - start)
        for device, phys, nbytes in wanted
        for start, stop in _gaps(
            [
                (head, head + size)
                for head, size, _ in _hits(machine.memory, heads, orders, phys, phys + nbytes)
            ],
            phys,
            phys + nbytes,
        )
    ]


def catch(kernel: Any, escaped: list[Target]) -> list[Stray]:
    """Return, log and tell the devices whose memory it is in *kernel* where they may write."""
    strays = [
        Stray(device, *extent)
        for device, phys, nbytes in escaped
        for extent in whose(kernel, phys, nbytes)
    ]
    for stray in strays:
        _log.warning("%s", stray)
    note(kernel.machine, strays)
    return strays


def note(machine: Machine, strays: Iterable[Stray]) -> None:
    """Tell the devices of *machine* what a kernel found."""
    found = list(strays)
    for stream in machine.streams:
        end = stream.phys + stream.nbytes
        stream.strays += [
            stray
            for stray in found
            if stray.device == stream.device and stream.phys <= stray.phys < end
        ]


def check(kernel: Any) -> list[Stray]:
    """Return where running devices write over what is not a driver's, in the running kernel.

    That is memory that is free, in scratch, or KHO's and LUO's own, as a ring that was freed
    before its device was stopped. Memory that somebody allocated or preserved is taken for the
    device's own, whoever that was.

    Args:
        kernel: the running kernel, here or in another process.
    """
    return [
        Stray(device, *extent)
        for device, phys, nbytes in targets(kernel.machine)
        for extent in whose(kernel, phys, nbytes)
        if not extent.owner.startswith(_OF_DRIVERS)
    ]


_OF_DRIVERS: Final = ("allocated", "preserved", "reserve_mem")


# ---- whose memory it is ----


def whose(kernel: Any, phys: SupportsIndex, nbytes: SupportsIndex) -> list[Extent]:
    """Return whose memory [phys, phys + nbytes) is in the running *kernel*.

    Owners, the most specific that applies:

    ============================================ ==================================================
    ``device records``, ``device slots``         of the previous kernel, until FINISH
    ``reserve_mem NAME``                         a region of the command line
    ``subtree NAME``                             a blob that the root tree names; ``… of the
                                                 previous kernel`` until it is restored
    ``KHO root tree``, ``KHO tree page``         the map of what is preserved, where it is a radix
                                                 tree; ``… of the previous kernel`` as above
    ``preserved PHYS/order N``                   by this kernel, for the next one
    ``preserved PHYS/order N by the previous     not restored yet
    kernel``
    ``allocated PHYS/order N``                   by this kernel
    ``scratch``                                  free, for the next kernel to boot in
    ``free``                                     free
    ``reserved``                                 page 0
    ============================================ ==================================================

    Args:
        kernel: a :class:`luo.kernel.Kernel`, or one in another process.
        phys: first byte.
        nbytes: how many.

    Returns:
        the extents by address, neighbours of one owner joined; they cover the range.

    Raises:
        KhoError: EINVAL if the range is empty or not RAM.
        StateError: ESHUTDOWN if the kernel is gone.
    """
    begin, end = operator.index(phys), operator.index(phys) + operator.index(nbytes)
    if hasattr(kernel, "whose"):  # it is in another process
        extents: list[Extent] = kernel.whose(begin, end - begin)
        return extents
    memory: PhysicalMemory = kernel.memory
    if end <= begin or not memory.contains(begin, end - begin):
        raise from_errno(errno.EINVAL, f"whose {begin:#x}+{end - begin:#x}: not in RAM")
    claims = []
    page = memory.page_size
    for at, size, owner in _claims(kernel, memory, begin, end):
        start, stop = max(at // page * page, begin), min(-(-(at + size) // page) * page, end)
        if start < stop:
            claims.append((start, stop, owner))
    edges = sorted({begin, end, *(edge for claim in claims for edge in claim[:2])})
    place = {edge: number for number, edge in enumerate(edges)}
    owners = ["reserved"] * (len(edges) - 1)
    for start, stop, owner in claims:  # the more specific come later
        owners[place[start] : place[stop]] = [owner] * (place[stop] - place[start])
    extents = []
    for start, stop, owner in zip(edges, edges[1:], owners, strict=False):
        if extents and extents[-1].owner == owner:
            extents[-1] = extents[-1]._replace(nbytes=stop - extents[-1].phys)
        else:
            extents.append(Extent(start, stop - start, owner))
    return extents


def _claims(
    kernel: Any, memory: PhysicalMemory, begin: int, end: int
) -> Iterator[tuple[int, int, str]]:
    """Yield (phys, bytes, owner) of what may reach into the range, the more specific later."""

    def blocks(
        found: tuple[NDArray[np.uint64], NDArray[np.uint8]], owner: str
    ) -> Iterator[tuple[int, int, str]]:
        for phys, size, order in _hits(memory, *found, begin, end):
            yield phys, size, owner.format(f"{phys:#x}/order {order}")

    yield from blocks(memory.free_blocks(), "free")
    yield from ((phys, size, "scratch") for phys, size in memory.scratch)
    yield from blocks(memory.allocated_blocks(), "allocated {}")
    kho: Kho | None = None
    with contextlib.suppress(StateError):  # kho=off: nothing of KHO's here
        kho = kernel.kho
    if kho is not None:
        if kho.incoming is not None:
            yield from blocks(kho.incoming.unrestored(), "preserved {} by the previous kernel")
        with contextlib.suppress(LuoError):  # a device may have written over the map
            yield from blocks(kho.preserved(), "preserved {}")
        yield from _of_kho(kho)
        if kho.incoming is not None:
            yield from _left_over(kernel, kho.incoming)
    for region in kernel.reserved.regions.values():
        yield region.phys, region.nbytes, f"reserve_mem {region.name}"


def _of_kho(kho: Kho) -> Iterator[tuple[int, int, str]]:
    """Yield what KHO itself has of the running kernel's memory."""
    yield from ((phys, 1, "KHO tree page") for phys in _map_pages(kho))
    if kho.fdt_phys:
        yield kho.fdt_phys, 1, "KHO root tree"
    with contextlib.suppress(LuoError):  # or over the root tree
        yield from _subtrees(kho)


def _subtrees(kho: Kho) -> Iterator[tuple[int, int, str]]:
    generation = kho.generation
    if generation.inline or not kho.root_bytes:
        return
    for node in kho.root.root.children:
        phys = native_u64(node.get(generation.data_property or ""))
        nbytes = native_u64(node.get(generation.size_property or ""))
        if phys is not None:
            yield phys, nbytes or 1, f"subtree {node.name}"


def _left_over(kernel: Any, incoming: Incoming) -> Iterator[tuple[int, int, str]]:
    """Yield what the previous kernel left and nobody has restored."""
    left = {
        "KHO root tree": (incoming.handover.fdt_phys, 1),
        **{f"subtree {name}": area for name, area in incoming.subtrees().items()},
    }
    for what, (phys, nbytes) in left.items():
        if incoming.is_preserved(phys, nbytes or 1):
            yield phys, nbytes or 1, f"{what} of the previous kernel"
    found = kernel.luo.incoming
    if found is None or incoming.generation.inline:
        return
    for name, what in (("records", "device records"), ("slabs", "device slots")):
        with contextlib.suppress(LuoError):
            entries = incoming.read_blocks(found.devices.get(name, 0), abi.LUO_EXTENT_BYTES)
            for phys, nbytes, _, _ in np.ascontiguousarray(entries).view(np.uint64).tolist():
                yield phys, nbytes, what


def _map_pages(kho: Kho) -> list[int]:
    """Return the pages of the map if it is a radix tree; as many as it has, whatever is in them."""
    if kho.generation.bitmap_bytes is not None or not kho.root_phys:
        return []
    memory, page = kho.memory, kho.memory.page_size
    pages = level = [kho.root_phys]
    for _ in range(kho.generation.radix_geometry(page, kho.bugs).levels - 1):
        slots = np.concatenate([np.frombuffer(memory.view(p, page), np.uint64) for p in level])
        children = np.unique(slots[slots % np.uint64(page) == 0]).tolist()
        level = [p for p in children if p and memory.contains(p, page)][: kho.tree_pages]
        pages = pages + level
        if not level:
            break
    return pages[: kho.tree_pages]


def _hits(
    memory: PhysicalMemory,
    phys: NDArray[np.uint64],
    orders: NDArray[np.uint8],
    begin: int,
    end: int,
) -> Iterator[tuple[int, int, int]]:
    """Return (phys, bytes, order) of the blocks that reach into [begin, end)."""
    sizes = np.left_shift(np.uint64(memory.page_size), orders.astype(np.uint64))
    hit = (phys < np.uint64(end)) & (phys + sizes > np.uint64(begin))
    return zip(phys[hit].tolist(), sizes[hit].tolist(), orders[hit].tolist(), strict=True)


def _gaps(blocks: Iterable[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield what no (start, stop) of *blocks* covers of [begin, end)."""
    at = begin
    for start, stop in sorted(blocks):
        if start > at:
            yield at, start
        at = max(at, stop)
    if at < end:
        yield at, end
