"""Kexec HandOver: what one kernel leaves for the next, byte for byte as Linux does.

This is the outgoing side. :mod:`luo.incoming` reads it back, :mod:`luo.scratch` sizes the memory
that the next kernel boots in, :mod:`luo.handover` has the four numbers that it is told.

Mirrors ``kernel/liveupdate/kexec_handover.c`` and ``kho_block.c`` of Linux 7.3 ("kho-v4") and what
they were in the six generations before; :data:`luo.abi.GENERATIONS` says how these differ. The
facts are in the project's KHO ABI specification ("kho-abi"). Left out: what only a kernel has
(memblock, CMA, deferred page initialisation, debugfs).

Life cycles: from kho-v2 on the map is live, and handed over as it is. Before, it is written by
:meth:`Kho.finalize`: any number of times in kho-v1; in kho-v1-notifier and kho-v1-512 once, after
which nothing may change until :meth:`Kho.abort`, which forgets every preservation; in kho-v5-series
at the jump at the latest, and :meth:`Kho.unfreeze` takes it back.

Outgoing, the happy path: ``Kho(memory)`` reserves scratch, makes the map and the root tree;
subsystems preserve memory and add subtrees; :meth:`Kho.handover` names the four numbers. Incoming:
:meth:`Kho.validate` reads them, without a write; :meth:`Kho.boot` forgets the old kernel's page
state, reserves what it preserved, and makes an outgoing side of its own; subsystems restore from
:attr:`Kho.incoming`.

Unhappy paths: a validation error changes nothing. An error in a bulk call or in adding a subtree
leaves everything as before. After :meth:`Kho.close`, the commit point, every call raises
``StateError``.
"""

import enum
import errno
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from luo import abi as _abi
from luo import vmalloc
from luo._kho import ChunkMap, PreservedMemory, RadixTree, radix_decode, radix_key
from luo.errors import FdtError, KhoError, StateError, from_errno
from luo.fdt import Fdt, FdtEditor, FdtWriter
from luo.handover import Handover
from luo.incoming import (
    Incoming,
    RefuseBlock,
    block_chain,
    native_u64,
    require_call,
    whole_pages,
)
from luo.kho_tree import KhoInNode, KhoNode, flatten, same_value
from luo.memory import PhysicalMemory, parse_size
from luo.scratch import ScratchParam, parse_kho_scratch, scratch_layout

if TYPE_CHECKING:
    import sys

    if sys.version_info >= (3, 12):
        from collections.abc import Buffer
    else:
        from typing_extensions import Buffer

__all__ = [
    "ChunkMap",
    "Handover",
    "Incoming",
    "Kho",
    "KhoEvent",
    "KhoInNode",
    "KhoNode",
    "RadixTree",
    "ScratchParam",
    "parse_kho_scratch",
    "radix_decode",
    "radix_key",
    "scratch_layout",
]

_log = logging.getLogger(__name__)

_KEXEC_ALIGN: Final = 1 << 16  # of the segment that holds the scratch array


class KhoEvent(enum.IntEnum):
    """What a notifier of :meth:`Kho.register_notifier` is told (kho-abi 2.2, 3.3)."""

    FINALIZE = 0
    ABORT = 1
    UNFREEZE = 1  # what the same number means in kho-v5-series


Notifier = Callable[[KhoEvent, "Kho"], int | None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What finalizing may cost, as it was at one time.

    Attributes:
        finalized: whether KHO was.
        phys: the preserved blocks, where an abort would forget them; else None.
        orders: their orders.
        subtrees: those that waited for finalizing: name to (phys, bytes).
    """

    finalized: bool
    phys: NDArray[np.uint64] | None = None
    orders: NDArray[np.uint8] | int = 0
    subtrees: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Kho(PreservedMemory):
    """KHO of one kernel: cold boot.

    Args:
        memory: of the machine; its page state must be this kernel's.
        abi: generation of the format, a name in :data:`luo.abi.GENERATIONS`.
        scratch: None: sized by the kernel's rules (:func:`scratch_layout`). Text: a
            ``kho_scratch=`` parameter, ``"16M,512M,256M"`` or ``"200%"``. A list
            ``[(phys, nbytes), ...]``: these areas; ``[]``: none.
        fdt_max: bytes that the inline tree of kho-v5-series may have; int or ``"10MiB"``.
        debug: refuse to preserve what is not allocated.
        release: the kernel's release, left for the next one in ``kexec-metadata``; up to 64 bytes.
        bugs: mistakes of the generation's kernels to reproduce, by the names in
            :attr:`luo.abi.Generation.bugs`; without them it does what was meant.

    Attributes:
        memory, debug: as given.
        abi: name of the generation.
        generation: the generation itself.
        bugs: as given.
        scratch: ``[(phys, nbytes), ...]`` in the ABI's order, areas of size 0 included.
        incoming: what the previous kernel left (:class:`Incoming`); None after a cold boot.
        fdt_phys: physical address of the root tree, one page; in kho-v5-series 0 until the jump.
        fdt_max: as given; may be changed, as by the debugfs file.
        closed: whether :meth:`close` was called.

    Raises:
        ValueError: an unknown generation or bug, areas that are not whole pages in RAM, a long
            release.
        KhoError: ENOMEM if scratch or the first pages find no place; EBUSY if scratch is not free;
            EINVAL for a wrong ``kho_scratch=``; EROFS.

    Source: ``kho_init()``; kho-abi 2 to 5 and 8.
    """

    abi: str
    generation: _abi.Generation
    bugs: frozenset[str]
    scratch: list[tuple[int, int]]
    incoming: Incoming | None
    fdt_phys: int

    def __init__(
        self,
        memory: PhysicalMemory,
        *,
        abi: str = "kho-v4",
        scratch: str | Iterable[tuple[int, int]] | None = None,
        fdt_max: int | str = _abi.KHO_FDT_MAX,
        debug: bool = False,
        release: str = "luo",
        bugs: Iterable[str] = (),
    ) -> None:
        wanted = _abi.generation(abi).check_bugs(bugs)
        if scratch is None or isinstance(scratch, str):
            param = None if scratch is None else parse_kho_scratch(scratch, abi)
            areas = scratch_layout(memory, param, abi=abi)
        else:
            areas = [(operator.index(phys), operator.index(nbytes)) for phys, nbytes in scratch]
        memory.reserve_scratch(areas)
        self._start(memory, abi, areas, None, debug, release, fdt_max, wanted)

    def _start(
        self,
        memory: PhysicalMemory,
        abi: str,
        scratch: list[tuple[int, int]],
        incoming: Incoming | None,
        debug: bool,
        release: str,
        fdt_max: int | str,
        bugs: frozenset[str],
    ) -> None:
        generation = _abi.generation(abi)
        before = incoming.metadata.kexec_count if incoming and incoming.metadata else 0
        metadata = _abi.KexecMetadata(release, before + 1).pack()
        self.abi = abi
        self.generation = generation
        self.bugs = bugs
        self.scratch = scratch
        self.incoming = incoming
        self.fdt_phys = 0
        self._fdt_max = parse_size(fdt_max)
        self._segments: dict[str, tuple[int, int]] = {}  # in scratch: name to (phys, bytes)
        self._finalized = False
        self._notifiers: list[tuple[int, Notifier]] = []  # (priority, callback), in calling order
        self._queue: dict[str, tuple[int, int]] = {}  # subtrees that wait for finalizing
        self._joining: dict[str, tuple[int, int]] | None = None  # the ones being finalized
        self._tree = KhoNode()  # inline data
        self._flat = b""  # the same, finalized
        self._setup(
            memory,
            levels=generation.radix_geometry(memory.page_size, bugs).levels,
            bitmap_bytes=generation.bitmap_size(memory.page_size),
            debug=debug,
            split_by_node=generation.numa_split,
            split_unaligned=_abi.BUG_V5_SPLIT in bugs,
        )
        if generation.inline:
            return
        try:
            if generation.undo == "abort":  # preserved and written by finalizing
                self.fdt_phys = memory.alloc_folio(0)
                memory.view(self.fdt_phys, memory.page_size)[:] = bytes(memory.page_size)
                return
            self.fdt_phys = self.alloc_preserve(memory.page_size)
            self._write_root(self.root_phys, {})
            if generation.metadata:
                self.save_subtree(_abi.KHO_SUBTREE_METADATA, metadata)
        except BaseException:
            if self.fdt_phys:
                self.unpreserve_free(self.fdt_phys)
            self.free_map()
            raise

    def _write_root(self, map_phys: int, children: Mapping[str, tuple[int, int]]) -> None:
        generation = self.generation
        writer = FdtWriter(into=self.memory.view(self.fdt_phys, self.memory.page_size))
        with writer.node(""):
            writer.property_string("compatible", generation.compatible)
            writer.property_native_u64(generation.map_property, map_phys)
            for name, (phys, _) in children.items():
                with writer.node(name):
                    writer.property_native_u64(generation.data_property or "", phys)
        writer.finish()

    @staticmethod
    def validate(
        memory: PhysicalMemory,
        handover: Handover,
        *,
        abi: str = "kho-v4",
        bugs: Iterable[str] = (),
    ) -> Incoming:
        """Check what the previous kernel left, without a single write.

        Memory may be mapped read-only, and the kernel that owns its page state may still run: the
        new page state is built beside it and used by :meth:`boot`, so the map is walked once.

        Raises:
            HandoverError: a rule of the format is broken (kho-abi 9.3, 12.18): it names the address
                and the rule.
            ValueError: an unknown generation or bug.
        """
        return Incoming(memory, handover, abi=abi, bugs=bugs)

    @classmethod
    def boot(
        cls,
        memory: PhysicalMemory,
        handover: Handover | Incoming,
        *,
        abi: str = "kho-v4",
        fdt_max: int | str = _abi.KHO_FDT_MAX,
        debug: bool = False,
        release: str = "luo",
        bugs: Iterable[str] = (),
    ) -> Self:
        """Boot on what the previous kernel left: forget its page state, reserve what it preserved.

        Args:
            memory: of the machine, writable by now.
            handover: the four numbers, or what :meth:`validate` made of them.
            abi: generation of the format; only looked at with the four numbers.
            fdt_max: as for a cold boot.
            debug: as for a cold boot.
            release: as for a cold boot.
            bugs: as for a cold boot; only looked at with the four numbers.

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
            incoming = cls.validate(memory, handover, abi=abi, bugs=bugs)
        incoming.install()
        kho = cls.__new__(cls)
        kho._start(
            memory,
            incoming.abi,
            incoming.scratch,
            incoming,
            debug,
            release,
            fdt_max,
            incoming.bugs,
        )
        return kho

    def close(self) -> None:
        """End this kernel's KHO, at the commit point: later calls raise StateError (ESHUTDOWN)."""
        super().close()
        if self.incoming is not None:
            self.incoming.close()

    def _check_open(self) -> None:
        if self.closed:
            raise StateError(errno.ESHUTDOWN, "KHO: this kernel is gone")

    def _has(self, there: bool, what: str) -> None:
        self._check_open()
        require_call(there, what, self.generation)

    # ---- ranges by address and bytes ----

    def preserve_phys(self, phys: SupportsIndex, nbytes: SupportsIndex) -> None:
        """Preserve a range, as ``kho_preserve_phys()``: all of it or nothing.

        Raises:
            KhoError: EINVAL if it is no whole pages, or as :meth:`preserve_pages`; EBUSY while
                finalized; EOPNOTSUPP where ranges are given in pages.
        """
        self._has(self.generation.phys_calls, "preserve_phys")
        self.preserve_pages(*whole_pages(self.memory, "preserve_phys", phys, nbytes))

    def unpreserve_phys(self, phys: SupportsIndex, nbytes: SupportsIndex) -> None:
        """Take back :meth:`preserve_phys` of the very same range.

        Raises:
            KhoError: as :meth:`preserve_phys`; ENOENT if it is not preserved as it stands.
        """
        self._has(self.generation.phys_calls, "unpreserve_phys")
        self.unpreserve_pages(*whole_pages(self.memory, "unpreserve_phys", phys, nbytes))

    # ---- finalizing ----

    @property
    def finalized(self) -> bool:
        """Whether there is something to hand over: always where the map is live."""
        return self.generation.finalize is None or self._finalized

    def register_notifier(self, callback: Notifier, *, priority: int = 0) -> None:
        """Have *callback* called at each finalizing and each undoing of it.

        Args:
            callback: called as ``callback(event, kho)``; None or 0 is success, a negative errno or
                an exception makes finalizing fail.
            priority: higher ones are called first; equal ones in order of registration.

        Raises:
            KhoError: EEXIST if it is registered; EOPNOTSUPP where there are no notifiers.
        """
        self._has(self.generation.notifiers, "register_notifier")
        if any(known == callback for _, known in self._notifiers):
            raise from_errno(errno.EEXIST, f"register_notifier {callback!r}: is registered")
        self._notifiers.append((priority, callback))
        self._notifiers.sort(key=lambda entry: -entry[0])  # stable

    def unregister_notifier(self, callback: Notifier) -> None:
        """Take back :meth:`register_notifier`.

        Raises:
            KhoError: ENOENT if it is not registered; EOPNOTSUPP where there are no notifiers.
        """
        self._has(self.generation.notifiers, "unregister_notifier")
        left = [entry for entry in self._notifiers if entry[1] != callback]
        if len(left) == len(self._notifiers):
            raise from_errno(errno.ENOENT, f"unregister_notifier {callback!r}: is not registered")
        self._notifiers = left

    def _call_notifiers(self, event: KhoEvent) -> None:
        for _, callback in list(self._notifiers):
            result = callback(event, self)
            if result:
                who = getattr(callback, "__qualname__", callback)
                code = -result if result < 0 else errno.EINVAL
                raise from_errno(code, f"{event.name} {who}: returned {result}")

    def _tell_undone(self) -> None:
        # Nobody can stop the undoing: what fails is logged, and all others are called.
        for _, callback in list(self._notifiers):
            try:
                callback(KhoEvent.ABORT, self)
            except Exception:
                _log.warning("KHO notifier %r failed in the undoing", callback, exc_info=True)

    def finalize(self) -> None:
        """Write what the next kernel will read, as ``kho_finalize()`` or the ``finalize`` file.

        kho-v1: the map as it is now; it may be repeated, and what changes later is not in it.
        kho-v1-notifier and kho-v1-512: notifiers join, then map and root tree are written, and
        nothing may be preserved until :meth:`abort`. If anything fails it is an abort.
        kho-v5-series: notifiers are called, then nothing may change until :meth:`unfreeze`, map
        and tree are written. If anything fails it is an unfreeze.

        Raises:
            KhoError: EOPNOTSUPP where the map is live; EEXIST if it is finalized; ENOMEM if pages
                are wanting, or the tree is larger than its page or ``fdt_max``; what a notifier
                fails with.
        """
        how = self.generation.finalize
        self._has(how is not None, "finalize")
        if how == "reboot":
            Fdt(self._root_bytes(), check=False).set_property_inplace(
                "/", self.generation.map_property, _u64(self._publish())
            )
            self._finalized = True
            return
        if self._finalized:
            raise from_errno(errno.EEXIST, "finalize: is finalized")
        if self._joining is not None:
            raise from_errno(errno.EBUSY, "finalize: called by its own notifier")
        self._joining = dict(self._queue)
        try:
            if self.generation.inline:
                self._finalize_tree()
            else:
                self._finalize_map()
        except BaseException as error:
            self._undo_finalize()
            if isinstance(error, FdtError) and error.code == "FDT_ERR_NOSPACE":
                raise from_errno(
                    errno.ENOMEM, "finalize: the root tree is larger than its page"
                ) from error
            raise
        finally:
            self._joining = None
        self._finalized = True

    def _finalize_map(self) -> None:
        assert self._joining is not None
        self._remember()
        self.preserve_folio(self.fdt_phys, 0)
        self._call_notifiers(KhoEvent.FINALIZE)
        self._freeze(True)
        self._write_root(self._publish(), self._joining)

    def _finalize_tree(self) -> None:
        self._call_notifiers(KhoEvent.FINALIZE)
        self._freeze(True)
        flat = self._flatten(self._publish() if self.nr_preserved else 0)
        if len(flat) > self.fdt_max:
            raise from_errno(
                errno.ENOMEM, f"finalize: tree of {len(flat)} bytes, above fdt_max {self.fdt_max}"
            )
        self._flat = flat

    def _undo_finalize(self) -> None:
        self._freeze(False)
        self._finalized = False
        self._joining = None
        if self.generation.undo == "abort":
            self._queue.clear()
            self._forget()
        else:
            self._flat = b""
            self._unpublish()
        self._tell_undone()

    def abort(self) -> None:
        """Take :meth:`finalize` back, and forget every preservation and subtree (kho-abi 3.3).

        The memory itself stays allocated. Unpreserving it is no error from then on, and does
        nothing: only the map could tell what somebody had preserved.

        Raises:
            KhoError: ENOENT if it is not finalized; EOPNOTSUPP where there is no abort.
        """
        self._has(self.generation.undo == "abort", "abort")
        if not self._finalized:
            raise from_errno(errno.ENOENT, "abort: is not finalized")
        self._undo_finalize()

    def unfreeze(self) -> None:
        """Take :meth:`finalize` back; preservations and nodes stay (kho-abi 2.2).

        Raises:
            KhoError: ENOENT if it is not finalized; EOPNOTSUPP where there is no unfreezing.
        """
        self._has(self.generation.undo == "unfreeze", "unfreeze")
        if not self._finalized:
            raise from_errno(errno.ENOENT, "unfreeze: is not finalized")
        self._undo_finalize()

    def unfinalize(self) -> None:
        """Take :meth:`finalize` back, if it was called and there is anything to take back.

        As :meth:`abort` or :meth:`unfreeze`. kho-v1 has neither: its map is 0 again, as if it had
        never been finalized, so that a list that gets old is not handed over.
        """
        if not self._finalized:
            return
        if self.generation.undo is not None:
            self._undo_finalize()
            return
        self._check_open()
        Fdt(self._root_bytes(), check=False).set_property_inplace(
            "/", self.generation.map_property, _u64(0)
        )
        self._unpublish()
        self._finalized = False

    def snapshot(self) -> "Snapshot":
        """Return what :meth:`unfinalize` would take away, for :meth:`reinstate`."""
        self._check_open()
        if self.generation.undo != "abort":
            return Snapshot(self._finalized)
        return Snapshot(self._finalized, *self.preserved(), dict(self._queue))

    def reinstate(self, snapshot: "Snapshot") -> None:
        """Have what was there at the time of *snapshot*: what an abort forgot, and kho-v1's map.

        If nothing at all is preserved then the pages of a list of chunks are freed.

        Raises:
            KhoError: ENOMEM; EBUSY while finalized.
        """
        if self.generation.undo == "abort":
            if snapshot.phys is not None:
                self.preserve_folios(snapshot.phys, snapshot.orders)
            self._queue = dict(snapshot.subtrees)
            self._remember()
        elif self.generation.undo is None and snapshot.finalized and not self._finalized:
            self.finalize()
        if self.generation.bitmap_bytes is not None and not self.nr_preserved:
            self.free_map()

    # ---- the one tree of kho-v5-series ----

    @property
    def fdt_max(self) -> int:
        """Bytes that the inline tree may have.

        Raises:
            KhoError: when set: EBUSY while finalized.
        """
        return self._fdt_max

    @fdt_max.setter
    def fdt_max(self, nbytes: int | str) -> None:
        self._check_open()
        if self._finalized:
            raise from_errno(errno.EBUSY, "fdt_max: the tree is finalized")
        self._fdt_max = parse_size(nbytes)
        if "tree" in self._segments:
            self._drop_segment("tree")

    def _change_tree(self, what: str) -> None:
        self._has(self.generation.inline, what)
        if self.frozen:
            raise from_errno(errno.EBUSY, f"{what}: the tree is finalized")

    def add_node(self, parent: KhoNode | None, name: str, node: KhoNode) -> int:
        """Hang *node* below *parent*, None being the root, as ``kho_add_node()``.

        Returns:
            int: 0; 1 if this very node has that place already.

        Raises:
            ValueError: the name is no node name.
            KhoError: EEXIST if another node has it; EINVAL if *node* hangs somewhere else; EBUSY
                while finalized; EOPNOTSUPP in other generations.
        """
        self._change_tree(f"add_node {name}")
        if not name or "/" in name or "\0" in name:
            raise ValueError(f"add_node {name!r}: not a node name")
        children = (self._tree if parent is None else parent).children
        if name in children or (parent is None and name == self.generation.map_node):
            if children.get(name) is node:
                return 1
            raise from_errno(errno.EEXIST, f"add_node {name}: the name is taken")
        if node.attached or node is self._tree or any(below is parent for below in node.walk()):
            raise from_errno(errno.EINVAL, f"add_node {name}: the node hangs somewhere else")
        children[name] = node
        node.attached = True
        return 0

    def remove_node(self, parent: KhoNode | None, name: str) -> KhoNode:
        """Take the child *name* of *parent* out, as ``kho_remove_node()``, and return it.

        Raises:
            KhoError: ENOENT, EBUSY, EOPNOTSUPP.
        """
        self._change_tree(f"remove_node {name}")
        node = (self._tree if parent is None else parent).children.pop(name, None)
        if node is None:
            raise from_errno(errno.ENOENT, f"remove_node {name}: there is none")
        node.attached = False
        return node

    def add_prop(self, node: KhoNode | None, name: str, value: "Buffer") -> int:
        """Give *node* a property, as ``kho_add_prop()``; the value is read when KHO finalizes.

        Returns:
            int: 0; 1 if it has that property with the very same bytes in memory.

        Raises:
            ValueError: the name is no property name.
            KhoError: EEXIST if it has another of that name; EBUSY while finalized; EOPNOTSUPP.
        """
        self._change_tree(f"add_prop {name}")
        if not name or "\0" in name:
            raise ValueError(f"add_prop {name!r}: not a property name")
        memoryview(value).release()  # TypeError for what is no buffer, now and not at the jump
        properties = (self._tree if node is None else node).properties
        if name in properties or (node is None and name == "compatible"):
            if name in properties and same_value(properties[name], value):
                return 1
            raise from_errno(errno.EEXIST, f"add_prop {name}: the node has another value of it")
        properties[name] = value
        return 0

    def add_string_prop(self, node: KhoNode | None, name: str, value: str) -> int:
        """Give *node* a string, as ``kho_add_string_prop()``: :meth:`add_prop` with its NUL."""
        return self.add_prop(node, name, value.encode() + b"\0")

    def remove_prop(self, node: KhoNode | None, name: str) -> "Buffer":
        """Take a property away, as ``kho_remove_prop()``, and return its value.

        Raises:
            KhoError: ENOENT, EBUSY, EOPNOTSUPP.
        """
        self._change_tree(f"remove_prop {name}")
        properties = (self._tree if node is None else node).properties
        if name not in properties:
            raise from_errno(errno.ENOENT, f"remove_prop {name}: there is none")
        value: Buffer = properties.pop(name)
        return value

    # ---- root tree ----

    def _root_bytes(self) -> memoryview:
        if self.generation.undo is not None and not self._finalized:
            raise from_errno(errno.ENOENT, "root tree: is written by finalizing")
        if self.generation.inline:
            return memoryview(self._flat)
        return self.memory.view(self.fdt_phys, self.memory.page_size)

    def tree_bytes(self) -> int:
        """Return how large the tree of kho-v5-series would be, flattened now; in bytes."""
        return len(self._flatten(0))

    def _flatten(self, map_phys: int) -> bytes:
        generation = self.generation
        return flatten(
            self._tree,
            generation.compatible,
            generation.map_node or "",
            generation.map_property,
            map_phys,
        )

    @property
    def root(self) -> Fdt:
        """The root tree as it is now; a reader that later changes do not reach is not promised.

        Raises:
            KhoError: ENOENT if it is written by finalizing, and that has not happened.
        """
        self._check_open()
        return Fdt(self._root_bytes())

    @property
    def root_bytes(self) -> int:
        """Bytes of the root tree that are in use; 0 if it is yet to be finalized."""
        self._check_open()
        if self.generation.undo is not None and not self._finalized:
            return 0
        return Fdt(self._root_bytes(), check=False).totalsize

    def root_copy(self) -> bytes:
        """Return the bytes of the root tree that are in use; none if it is yet to be finalized."""
        if not self.root_bytes:
            return b""
        copy = bytes(self._root_bytes())  # in one go: another thread may be changing it
        return copy[: Fdt(copy, check=False).totalsize]

    def add_subtree(self, name: str, phys: SupportsIndex, nbytes: SupportsIndex) -> None:
        """Name a blob in the root tree, as ``kho_add_subtree()``.

        The blob is neither copied nor preserved by this, and may change until the jump. In
        kho-v1-notifier and kho-v1-512 a notifier calls this in FINALIZE; called before, it joins
        the next finalizing as if by a notifier of its own, ahead of the others, until an abort.

        Args:
            name: of the new child, any that a node may have.
            phys: physical address of the blob.
            nbytes: its size.

        Raises:
            ValueError: the name is no node name.
            KhoError: EINVAL if the blob is not in RAM; EEXIST if the name is taken; ENOMEM if the
                page is full, and nothing changes; EBUSY after finalizing, where that closes the
                map; EOPNOTSUPP in kho-v5-series, whose data is inline.
        """
        generation = self.generation
        self._has(not generation.inline, f"add_subtree {name}")
        at, size = operator.index(phys), operator.index(nbytes)
        if not self.memory.contains(at, size):
            raise from_errno(errno.EINVAL, f"add_subtree {name}: {at:#x}+{size:#x} is not in RAM")
        if not name or "/" in name or "\0" in name:
            raise ValueError(f"add_subtree {name!r}: not a node name")
        if generation.undo == "abort":
            self._join(name, at, size)
            return
        editor = FdtEditor(self._root_bytes())
        added = False
        try:
            editor.add_node("/", name)
            added = True
            editor.set_property(f"/{name}", generation.data_property or "", _u64(at))
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

    def _join(self, name: str, phys: int, nbytes: int) -> None:
        if self.frozen:
            raise from_errno(errno.EBUSY, f"add_subtree {name}: the root tree is finalized")
        subtrees = self._queue if self._joining is None else self._joining
        if name in subtrees:
            raise from_errno(errno.EEXIST, f"add_subtree {name}: the name is taken")
        subtrees[name] = (phys, nbytes)

    def remove_subtree(self, phys: SupportsIndex) -> None:
        """Remove the child that names the blob at *phys*, as ``kho_remove_subtree()``.

        If several do, only the first in the tree goes (the one added last).

        Raises:
            KhoError: ENOENT if none does; EBUSY after finalizing, where that closes the map;
                EOPNOTSUPP in kho-v5-series.
        """
        self._has(not self.generation.inline, "remove_subtree")
        at = operator.index(phys)
        if self.generation.undo == "abort":
            self._leave(at)
            return
        name = next(
            (
                node.name
                for node in Fdt(self._root_bytes()).root.children
                if native_u64(node.get(self.generation.data_property or "")) == at
            ),
            None,
        )
        if name is None:
            raise from_errno(errno.ENOENT, f"remove_subtree {at:#x}: no subtree names it")
        editor = FdtEditor(self._root_bytes())
        editor.del_node(f"/{name}")
        editor.pack()

    def _leave(self, phys: int) -> None:
        if self.frozen:
            raise from_errno(errno.EBUSY, f"remove_subtree {phys:#x}: the root tree is finalized")
        subtrees = self._queue if self._joining is None else self._joining
        for name, (at, _) in reversed(subtrees.items()):
            if at == phys:
                del subtrees[name]
                return
        raise from_errno(errno.ENOENT, f"remove_subtree {phys:#x}: no subtree names it")

    def save_subtree(self, name: str, buffer: "Buffer") -> int:
        """Copy *buffer* into preserved memory and name it in the root tree.

        Returns:
            int: physical address of the copy.

        Raises:
            ValueError: as :meth:`add_subtree`.
            KhoError: EINVAL if it is empty; E2BIG above one block of ``memory.max_order``; EEXIST,
                ENOMEM, EBUSY, EOPNOTSUPP. Nothing changes then.
        """
        self._has(not self.generation.inline, f"save_subtree {name}")
        with memoryview(buffer) as view, view.cast("B") as data:
            phys = self.alloc_preserve(data.nbytes)
            try:
                self.memory.view(phys, data.nbytes)[:] = data
                self.add_subtree(name, phys, data.nbytes)
            except BaseException:
                self.unpreserve_free(phys)
                raise
        return phys

    # ---- vmalloc ----

    def preserve_vmalloc(self, pages: "Buffer | NDArray[np.uint64]", order: int = 0) -> bytes:
        """Preserve an area of scattered blocks, as ``kho_preserve_vmalloc()``.

        Args:
            pages: physical address of each block, in the area's order, ``uint64``.
            order: of each block.

        Returns:
            the descriptor, 16 bytes, for its owner to carry over.

        Raises:
            KhoError: EOPNOTSUPP if the generation has none; EINVAL for no pages or 2**32 and more,
                or as :meth:`preserve_pages`; ENOMEM. Nothing is left preserved then.
        """
        self._check_open()
        self._has(self.generation.vmalloc, "preserve_vmalloc")
        return vmalloc.preserve(self, np.asarray(pages), order)

    def unpreserve_vmalloc(self, descriptor: bytes) -> None:
        """Undo :meth:`preserve_vmalloc`; the blocks stay allocated.

        Raises:
            HandoverError: somebody wrote over the chunks.
            KhoError: ENOENT if a block is not preserved; nothing changes then.
        """
        self._check_open()
        vmalloc.unpreserve(self, descriptor)

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
        for phys in [p for p, _ in block_chain(self.memory, head, RefuseBlock(self.memory, None))]:
            self.unpreserve_free(phys)

    # ---- the jump ----

    def handover(self) -> Handover:
        """Return the four numbers for the next kernel.

        The scratch array is copied to a segment in scratch, 64 KiB aligned from the top down, the
        areas tried in order, as ``kexec_file_load()`` does; calling it again gives the same place.
        kho-v5-series: finalizes if that has not happened, and copies the tree to another segment.
        kho-v1: the map is as the last :meth:`finalize` left it; without one the next kernel refuses
        the handover.

        Raises:
            KhoError: EADDRNOTAVAIL if scratch has no room for the segments; ENOENT if a generation
                that must be finalized is not; what :meth:`finalize` raises.
        """
        self._check_open()
        page = self.memory.page_size
        phys, length = self.fdt_phys, page
        if self.generation.inline:
            if not self._finalized:
                self.finalize()
            phys, length = self._tree_segment(len(self._flat))
            self.memory.view(phys, len(self._flat))[:] = self._flat
        elif self.generation.undo is not None and not self._finalized:
            raise from_errno(errno.ENOENT, "handover: is not finalized")
        if not self.scratch:
            return Handover(phys, length, 0, 0)
        array = b"".join(_abi.KHO_SCRATCH_SER.pack(*area) for area in self.scratch)
        at, _ = self._segment("scratch", len(array))
        self.memory.view(at, len(array))[:] = array
        return Handover(phys, length, at, len(array))

    def place_segments(self) -> None:
        """Reserve and touch the segment of the inline tree, as loading an image does.

        Only kho-v5-series has one; otherwise nothing happens. Without this :meth:`handover` does
        it, at the jump.

        Raises:
            KhoError: EADDRNOTAVAIL if scratch has no room even for a page.
        """
        self._check_open()
        if self.generation.inline:
            self.memory.prefault(*self._tree_segment(self.memory.page_size))

    def _tree_segment(self, nbytes: int) -> tuple[int, int]:
        # Linux refuses to load an image if scratch has no room for fdt_max; here it is enough that
        # the tree itself fits, so that small machines work.
        if "tree" in self._segments and self._segments["tree"][1] < nbytes:
            self._drop_segment("tree")
        if "tree" in self._segments:
            return self._segments["tree"]
        try:
            return self._segment("tree", self.fdt_max)
        except KhoError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
        return self._segment("tree", nbytes)

    def _segment(self, name: str, nbytes: int) -> tuple[int, int]:
        """Return (phys, bytes) of a segment in scratch, whole pages; placed at the first call."""
        if name not in self._segments:
            page = self.memory.page_size
            nr_pages = -(-nbytes // page)
            self._segments[name] = self._place_in_scratch(nr_pages), nr_pages * page
        return self._segments[name]

    def _drop_segment(self, name: str) -> None:
        phys, nbytes = self._segments.pop(name)
        for at, _ in _natural_blocks(phys, nbytes, self.memory.page_size):
            self.memory.free(at)

    def _place_in_scratch(self, nr_pages: int) -> int:
        page = self.memory.page_size
        nbytes = nr_pages * page
        for align in (_KEXEC_ALIGN, page):  # an area without such a spot: any page will do
            for start, size in self.scratch:
                at = (start + size - nbytes) // align * align
                while at >= start and size:
                    if self._claim_all(at, nbytes):
                        return at
                    at -= align
        raise from_errno(errno.EADDRNOTAVAIL, f"handover: no room for {nbytes} bytes in scratch")

    def _claim_all(self, phys: int, nbytes: int) -> bool:
        claimed: list[int] = []
        for at, order in _natural_blocks(phys, nbytes, self.memory.page_size):
            try:
                self.memory.claim(at, order)
            except KhoError:
                for taken in claimed:
                    self.memory.free(taken)
                return False
            claimed.append(at)
        return True


def _natural_blocks(phys: int, nbytes: int, page_size: int) -> Iterator[tuple[int, int]]:
    """Yield (phys, order) of the naturally aligned blocks that make up whole pages."""
    pfn, end = phys // page_size, (phys + nbytes) // page_size
    while pfn < end:
        order = (end - pfn).bit_length() - 1
        if pfn:
            order = min(order, (pfn & -pfn).bit_length() - 1)
        yield pfn * page_size, order
        pfn += 1 << order


def _u64(value: int) -> bytes:
    """8 bytes in the CPU's byte order, as KHO stores integers in properties."""
    return np.uint64(value).tobytes()
