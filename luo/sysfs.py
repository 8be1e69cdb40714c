"""The attribute tree: what /sys shows of live updates, without mounting anything.

Paths are those below ``/sys``. :class:`Tree` belongs to a machine and asks whichever kernel runs on
it, here or in another process; a jump changes who answers, and nothing else:

- ``kernel/liveupdate/{state,prepare,finish}``, ``devices/**/liveupdate/{requested,preserved,
  reclaimed}``: files, modes, grammar and errno of RFC v1 (``spec/luo-rfc-v1.md`` 1.4, 1.5, 1.8,
  1.9). With live update off they are not there.
- ``kernel/debug/kho/{out,in}/…``: what each generation's debugfs has (kho-abi 2.7, 3.5, 10.5). One
  difference: Linux fixes the length of ``out/fdt`` at boot and so cuts later subtrees off; here it
  is the root tree as it is now.
- ``kernel/debug/liveupdate/{reboot,kexec}``: ours. 1 written to the first runs REBOOT and cancels;
  to the second, it is what ``kexec -e`` does. ``kexec`` takes an ordinary kexec too, so these are
  there with live update off.
- ``dev/liveupdate``: a symbolic link to the machine's control socket, if it has one: the device
  node of mainline's live update.

While no kernel runs every path but the first directories is ENODEV. During a jump, between the old
kernel's end and the new one's start, user space stands still: calls wait.
"""

from __future__ import annotations

import errno
import logging
import re
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

from luo.errors import KhoError, LuoError, StateError, errno_name, from_errno
from luo.fdt import Fdt
from luo.incoming import native_u64
from luo.kernel import Kernel, KernelImage, RemoteKernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from luo.kho import Kho
    from luo.liveupdate import CancelResult, FinishResult
    from luo.machine import DeviceTree, Machine

__all__ = ["OpenFile", "Stat", "Tree", "debug_files", "parse_long", "write_debug_file"]

_log = logging.getLogger(__name__)

AnyKernel: TypeAlias = Kernel | RemoteKernel
_Names: TypeAlias = list[str]

_PAGE: Final = 4096  # what a write of an attribute takes at most, and what stat() says of its size
_LONG: Final = 1 << 63
_DIGITS: Final = {
    8: re.compile(rb"[0-7]+"),
    10: re.compile(rb"[0-9]+"),
    16: re.compile(rb"[0-9a-fA-F]+"),
}


def parse_long(text: bytes) -> int:
    """Read a number as the kernel's ``kstrtol()`` does in base 0 (RFC v1 1.5).

    A sign, ``0x`` for hexadecimal or ``0`` for octal, digits, and at most one newline at the end.
    What stands behind a NUL is not looked at.

    Raises:
        KhoError: EINVAL if it is no number, ERANGE if it does not fit into 64 bits with a sign.
    """
    shown = text[:40]
    rest, _, _ = text.partition(b"\0")
    negative = rest.startswith(b"-")
    if rest[:1] in (b"-", b"+"):
        rest = rest[1:]
    base = 10
    if rest.startswith(b"0"):
        base = 8
        if rest[1:2] in (b"x", b"X") and _DIGITS[16].match(rest, 2):
            base, rest = 16, rest[2:]
    digits = _DIGITS[base].match(rest)
    if digits is None:
        raise from_errno(errno.EINVAL, f"{shown!r}: not a number")
    # Written bytes are at most a page, but int() refuses long decimals, and they do not fit anyway.
    significant = digits[0].lstrip(b"0") or b"0"
    value = int(significant, base) if len(significant) <= 22 else _LONG << 1
    if value > (_LONG if negative else _LONG - 1):
        raise from_errno(errno.ERANGE, f"{shown!r}: does not fit into a long")
    if rest[digits.end() :] not in (b"", b"\n"):
        raise from_errno(errno.EINVAL, f"{shown!r}: something stands behind the number")
    return -value if negative else value


# ---- what debugfs shows of KHO ----


def debug_files(kernel: AnyKernel) -> dict[str, bytes]:
    """Return what ``/sys/kernel/debug/kho`` holds: content by path, as ``"out/scratch_phys"``.

    Which files there are depends on the generation, and on what has happened: the root tree of a
    generation that writes it by finalizing is there only while it is finalized, that of a later one
    only after a cold boot; ``in`` only if something came in. Empty with KHO off.
    """
    if isinstance(kernel, RemoteKernel):
        return kernel.debug_files()
    if not kernel.kho_enabled:
        return {}
    kho = kernel.kho
    try:
        return _kho_files(kho)
    finally:
        if kho.closed:  # what was read may be the next kernel's already
            raise StateError(errno.ESHUTDOWN, "debug files: this kernel is gone")


def _kho_files(kho: Kho) -> dict[str, bytes]:
    generation, incoming = kho.generation, kho.incoming
    files = {
        "out/scratch_phys": "".join(f"{phys:#x}\n" for phys, _ in kho.scratch).encode(),
        "out/scratch_len": "".join(f"{nbytes:#x}\n" for _, nbytes in kho.scratch).encode(),
    }
    if generation.finalize is not None:
        files["out/finalize"] = b"%d\n" % kho.finalized
    if generation.inline:
        files["out/fdt_max"] = b"%d\n" % kho.fdt_max
    root = kho.root_copy()
    if root:  # else it is yet to be written
        if generation.undo is not None or incoming is None:
            files["out/fdt"] = root
        for node in () if generation.inline else Fdt(root).root.children:
            blob = _outgoing_blob(kho, node)
            if blob is not None:
                files[f"out/sub_fdts/{node.name}"] = blob
    if incoming is not None:
        memory = incoming.memory
        size = incoming.root.totalsize
        files["in/fdt"] = bytes(memory.view(incoming.handover.fdt_phys, size))
        for name, (phys, nbytes) in incoming.subtrees().items():
            files[f"in/sub_fdts/{name}"] = bytes(memory.view(phys, nbytes))
    return files


def _outgoing_blob(kho: Kho, node: Any) -> bytes | None:
    """Return a copy of the blob that *node* of the root tree names; None while it is being made."""
    generation, memory = kho.generation, kho.memory
    phys = native_u64(node.get(generation.data_property or ""))
    if generation.size_property is not None:
        nbytes = native_u64(node.get(generation.size_property))
    elif phys is not None:  # a tree, which knows its size
        head = bytes(memory.view(phys, 8))
        nbytes = int.from_bytes(head[4:], "big") if head[:4] == b"\xd0\x0d\xfe\xed" else 0
    if phys is None or nbytes is None or not memory.contains(phys, nbytes):
        _log.warning("subtree %s: its properties are not what the format says", node.name)
        return None
    return bytes(memory.view(phys, nbytes))


def write_debug_file(kernel: AnyKernel, name: str, value: int) -> None:
    """Write *value* to ``out/finalize`` or ``out/fdt_max`` (kho-abi 2.2, 2.7, 3.3).

    Raises:
        KhoError: EINVAL for a value that the file does not take, ENOENT if this generation has no
            such file, EEXIST or ENOENT if it is finalized already or not at all, EBUSY for
            ``fdt_max`` while it is, and what finalizing fails with.
    """
    if isinstance(kernel, RemoteKernel):
        kernel.write_debug_file(name, value)
        return
    kho = kernel.kho
    if name == "out/fdt_max" and kho.generation.inline:
        if value < 0:
            raise from_errno(errno.EINVAL, f"{name}: {value} bytes")
        kho.fdt_max = value
    elif name != "out/finalize" or kho.generation.finalize is None:
        raise from_errno(errno.ENOENT, f"{name}: {kho.abi} has none")
    elif value == 1:
        kho.finalize()
    elif value == 0 and kho.generation.undo == "abort":
        kho.abort()
    elif value == 0 and kho.generation.undo == "unfreeze":
        kho.unfreeze()
    else:
        raise from_errno(errno.EINVAL, f"{name}: {kho.abi} does not take {value}")


# ---- directories and files ----


def _tell(result: CancelResult | FinishResult) -> None:
    """Log what went wrong in an event that succeeds in any case (RFC v1 1.4)."""
    for failure in result.failures:
        _log.warning("%s", failure)
    for path in getattr(result, "unreclaimed", ()):
        _log.warning("%s: not reclaimed", path)


class Stat(NamedTuple):
    """What ``stat()`` says.

    Attributes:
        mode: with the file's type.
        uid, gid: of the owner.
        size: bytes; a page for an attribute of sysfs, 0 for a directory.
    """

    mode: int
    uid: int
    gid: int
    size: int


@dataclass(frozen=True, slots=True)
class _Node:
    """A directory or a file of the running kernel.

    Attributes:
        mode: with the type.
        names: of a directory: what is in it.
        show: of a file: its content; None if it cannot be read.
        store: takes the number written; None if it cannot be written.
        accepts: numbers that may be written; None for any.
        size: as :class:`Stat` has it.
        device: whose directory or file it is, -1 for none.
        target: of a symbolic link.
    """

    mode: int
    names: Callable[[], list[str]] | None = None
    show: Callable[[], bytes] | None = None
    store: Callable[[int], object] | None = None
    accepts: tuple[int, ...] | None = None
    size: int = 0
    device: int = -1
    target: str | None = None


def _directory(names: Callable[[], list[str]], permissions: int = 0o755, device: int = -1) -> _Node:
    return _Node(stat.S_IFDIR | permissions, names, device=device)


def _attribute(
    permissions: int,
    show: Callable[[], bytes] | None = None,
    store: Callable[[int], object] | None = None,
    accepts: tuple[int, ...] | None = None,
    *,
    size: int = _PAGE,
    device: int = -1,
) -> _Node:
    return _Node(stat.S_IFREG | permissions, None, show, store, accepts, size, device)


class _Children:
    """Who is below whom in the device tree, as it was when this was built."""

    def __init__(self, tree: DeviceTree) -> None:
        self.key = self.key_of(tree)
        alive = np.flatnonzero(tree.alive)
        above = tree.parents[alive] + 1  # roots are below 0
        order = np.argsort(above, kind="stable")
        self._below = alive[order]
        self._starts = np.searchsorted(above[order], np.arange(tree.nr_rows + 2))
        self._data, self._offsets = tree.names

    @staticmethod
    def key_of(tree: DeviceTree) -> tuple[int, int]:
        """Return what differs when devices have come or gone."""
        return tree.nr_rows, len(tree)

    def names(self, device: int) -> list[str]:
        """Return the names of the children of *device*, -1 being above the roots."""
        below = self._below[self._starts[device + 1] : self._starts[device + 2]]
        first, last = self._offsets[below].tolist(), self._offsets[below + 1].tolist()
        data = memoryview(self._data.data)
        return [
            str(data[start:end], "utf-8", "surrogateescape")
            for start, end in zip(first, last, strict=True)
        ]


#: What a device's group shows: permissions of each file, all named after the flag column.
_GROUP: Final = {"requested": 0o644, "preserved": 0o444, "reclaimed": 0o444}

_TOP: Final = ("devices", "kernel")

_NODE: Final = "dev/liveupdate"


class OpenFile:
    """A file as one opener has it: content stays the same between two reads from the start.

    Attributes:
        tree: whose file it is.
        path: of the file.
    """

    def __init__(self, tree: Tree, path: str) -> None:
        self.tree = tree
        self.path = path
        self._content: bytes | None = None
        self._seen = 0

    def read(self, size: int = -1, offset: int = 0) -> bytes:
        """Return up to *size* bytes from *offset*; reading from 0 takes the content anew.

        Raises:
            OSError: as :meth:`Tree.read`.
        """
        if offset == 0 or self._content is None:
            self._seen = self.tree.events(self.path)
            self._content = self.tree.read(self.path)
        return self._content[offset : None if size < 0 else offset + size]

    @property
    def changed(self) -> bool:
        """Whether ``poll()`` says POLLERR and POLLPRI: notified since, or never read, as in Linux.

        A jump counts as a notification of every file: the one that was open is gone.
        """
        return self._seen != self.tree.events(self.path)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to *timeout* seconds until :attr:`changed`; return whether it is."""
        return self.tree.wait_until(lambda: self.changed, timeout)


class Tree:
    """The attribute tree of a machine.

    Args:
        machine: the machine; whoever runs on it answers.
        image: the next kernel, which :meth:`load` and the ``kexec`` file load, again after each
            jump. None: somebody calls ``kexec_load()``, or ``kexec`` is EINVAL.
        in_process: build *image* in this process; only while the running kernel is here as well.
        timeout: seconds for the next kernel's answers.

    Attributes:
        machine, image: as given.
        watchers: called without arguments when :attr:`OpenFile.changed` may have become true.

    Context:
        Any thread, many at once. Reads never wait for a running event; a write of ``requested``
        does, as does one that is an event, until :meth:`kill`.

    Example:
        >>> tree = Tree(machine, image=image)               # doctest: +SKIP
        >>> tree.write("kernel/liveupdate/prepare", "1")    # doctest: +SKIP
        1
    """

    def __init__(
        self,
        machine: Machine,
        *,
        image: KernelImage | None = None,
        in_process: bool = False,
        timeout: float = 60.0,
    ) -> None:
        self.machine = machine
        self.image = image
        self.watchers: list[Callable[[], None]] = []
        self._in_process = in_process
        self._timeout = timeout
        self._changed = threading.Condition()  # of everything below, and of whoever waits for it
        self._jumping: tuple[AnyKernel, int] | None = None  # the old kernel, and the thread
        self._events: dict[str, int] = {}
        self._jumps = 0
        self._inodes: dict[str, tuple[int | None, tuple[int, int] | None]] = {}  # mode, owner
        self._children: _Children | None = None
        self._grouped: tuple[Any, np.ndarray[Any, np.dtype[np.bool_]]] | None = None
        machine.watchers.append(self._notified)

    def close(self) -> None:
        """Let go of the machine; the kernel goes on."""
        if self._notified in self.machine.watchers:
            self.machine.watchers.remove(self._notified)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- the kernel behind it ----

    def _kernel(self) -> AnyKernel:
        """Return the running kernel; in the midst of a jump, the new one when it runs."""
        with self._changed:
            while True:
                # Read once: the jump does not take this lock to change it.
                kernel: AnyKernel | None = self.machine.running
                jumping = self._jumping
                if jumping is None or jumping[1] == threading.get_ident() or kernel is jumping[0]:
                    break
                self._changed.wait()
        if kernel is None:
            raise from_errno(errno.ENODEV, "no kernel runs on this machine")
        return kernel

    def _ask(self, question: Callable[[AnyKernel], Any]) -> Any:
        """Return what the running kernel answers; one that goes meanwhile is followed."""
        while True:
            kernel = self._kernel()
            try:
                return question(kernel)
            except StateError as error:
                if error.errno != errno.ESHUTDOWN or not self._has_gone(kernel):
                    raise

    def _has_gone(self, kernel: AnyKernel) -> bool:
        """Return whether *kernel*, which says that it is gone, has left to another.

        A kernel that jumps says so before it is off the machine: then this waits for the jump.
        """
        with self._changed:
            while (
                self.machine.running is kernel
                and self._jumping is not None
                and self._jumping[1] != threading.get_ident()
            ):
                self._changed.wait()
        return self.machine.running is not kernel

    def load(self) -> None:
        """Load :attr:`image` as the next kernel, as ``kexec -l`` does, unless one is loaded.

        Raises:
            SuccessorError: ENOEXEC, ECHILD or ETIMEDOUT; nothing has changed.
            KhoError: ENODEV if no kernel runs.
        """
        kernel = self._kernel()
        if self.image is None or kernel.kexec_loaded:
            return
        if isinstance(kernel, Kernel):
            following = self.image.build(self.machine) if self._in_process else self.image
            kernel.kexec_load(following, timeout=self._timeout)
        else:
            kernel.kexec_load(self.image, timeout=self._timeout)

    def kill(self, thread: int) -> None:
        """Send the thread *thread* a fatal signal: if it waits for the lock, it gets EAGAIN."""
        self._kernel().luo.kill(thread)

    def _kexec(self, kernel: AnyKernel) -> None:
        with self._changed:
            if self._jumping is not None:
                raise from_errno(errno.EBUSY, "kexec: a jump is under way")
            self._jumping = kernel, threading.get_ident()
        try:
            self.load()
            kernel.kexec(timeout=self._timeout)
        finally:
            with self._changed:
                self._jumping = None
                if self.machine.running is not kernel:
                    self._jumps += 1
                    self._inodes.clear()
                self._changed.notify_all()
            self._call_watchers()
            if self.machine.running is not None:
                try:
                    self.load()
                except LuoError as error:  # the jump itself is done; the next one says so again
                    _log.warning("next kernel: %s", error)

    # ---- notifications ----

    def _notified(self, path: str) -> None:
        with self._changed:
            self._events[path] = self._events.get(path, 0) + 1
            self._changed.notify_all()
        self._call_watchers()

    def _call_watchers(self) -> None:
        for watcher in list(self.watchers):
            watcher()

    def events(self, path: str) -> int:
        """Return how often pollers of *path* were woken, plus 1 (Linux starts to count there)."""
        with self._changed:
            return 1 + self._jumps + self._events.get(path.strip("/"), 0)

    def wait_until(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until *condition*, asked anew at each notification and jump; return what it says."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def open(self, path: str) -> OpenFile:
        """Return *path* as an opener has it, to read, and to wait for a notification.

        Raises:
            OSError: ENOENT, ENODEV, EISDIR.
        """
        self._ask(lambda kernel: self._file(kernel, path))
        return OpenFile(self, path)

    def poll(self, path: str, timeout: float | None = None) -> bool:
        """Wait up to *timeout* seconds for the next notification of *path*; return if one came."""
        before = self.events(path)
        return self.wait_until(lambda: self.events(path) != before, timeout)

    # ---- finding ----

    def _find(self, kernel: AnyKernel, path: str) -> _Node:
        """Return what is at *path*; KhoError (ENOENT, ENOTDIR) if nothing is."""
        path = path.strip("/")
        if not path:
            return _directory(self._top)
        if path == _NODE and self._node_path is not None:
            return _Node(stat.S_IFLNK | 0o777, target=self._node_path)
        if path == "dev" and self._node_path is not None:
            return _directory(lambda: ["liveupdate"])
        if path == "devices":
            return _directory(lambda: self._tree_children().names(-1))
        if path.startswith("devices/"):
            node = self._find_device(kernel, path.removeprefix("devices/"))
        else:
            node = self._find_kernel(kernel, path)
        if node is None:
            above = path.rpartition("/")[0]
            code = errno.ENOENT if self._find(kernel, above).names else errno.ENOTDIR
            raise from_errno(code, f"{path}: {errno_name(code)}")
        return node

    @property
    def _node_path(self) -> str | None:
        """Where the machine's control socket is; None without one."""
        control = self.machine.control
        return None if control is None else control.path

    def _top(self) -> _Names:
        return list(_TOP) if self._node_path is None else ["dev", *_TOP]

    def _inode(self, kernel: AnyKernel, path: str, node: _Node) -> tuple[int, int, int]:
        """Return mode, user and group of *node*, which is at *path*."""
        mode, owner = self._inodes.get(path.strip("/"), (None, None))
        if owner is None:
            owner = kernel.devices.owners.get(node.device, (0, 0)) if node.device >= 0 else (0, 0)
        return node.mode if mode is None else stat.S_IFMT(node.mode) | mode, *owner

    def _file(self, kernel: AnyKernel, path: str) -> _Node:
        node = self._find(kernel, path)
        if node.names is not None:
            raise from_errno(errno.EISDIR, f"{path}: is a directory")
        return node

    def _tree_children(self) -> _Children:
        tree = self.machine.devices
        children = self._children
        if children is None or children.key != _Children.key_of(tree):
            children = self._children = _Children(tree)
        return children

    def _is_grouped(self, kernel: AnyKernel, device: int) -> bool:
        """Return whether *device* has a ``liveupdate`` directory: settled when it was added."""
        known = self._grouped
        if known is None or known[0] is not kernel or device >= len(known[1]):
            if isinstance(kernel, Kernel):
                kernel.devices.rescan()  # it may have been plugged in
            known = self._grouped = kernel, kernel.devices.grouped
        return device < len(known[1]) and bool(known[1][device])

    def _find_device(self, kernel: AnyKernel, path: str) -> _Node | None:
        devices = self.machine.devices
        if path in devices:
            device = devices[path]
            group = ["liveupdate"] if self._is_grouped(kernel, device) else []
            return _directory(lambda: self._tree_children().names(device) + group, device=device)
        above, _, name = path.rpartition("/")
        attribute = ""
        if name in _GROUP:
            attribute = name
            above, _, name = above.rpartition("/")
        if name != "liveupdate" or above not in devices:
            return None
        device = devices[above]
        if not self._is_grouped(kernel, device):
            return None
        if not attribute:
            return _directory(lambda: list(_GROUP), device=device)

        def show() -> bytes:
            return b"%d\n" % getattr(kernel.devices, attribute)[device]

        def store(value: int) -> None:
            kernel.devices.request_one(device, bool(value))

        return _attribute(
            _GROUP[attribute],
            show,
            store if attribute == "requested" else None,
            (0, 1),
            device=device,
        )

    def _find_kernel(self, kernel: AnyKernel, path: str) -> _Node | None:
        files = self._kernel_files(kernel, path)
        if path in files:
            return files[path]
        below = [name.removeprefix(f"{path}/") for name in files if name.startswith(f"{path}/")]
        if not below:
            return None
        names = list(dict.fromkeys(name.partition("/")[0] for name in below))
        return _directory(lambda: names, 0o700 if path == "kernel/debug" else 0o755)

    def _kernel_files(self, kernel: AnyKernel, path: str) -> dict[str, _Node]:
        """Return the files below ``kernel/``; those of KHO only if *path* asks for them."""
        luo = kernel.luo
        files: dict[str, _Node] = {}
        if luo.enabled and luo.initialised:
            group = "kernel/liveupdate"
            files[f"{group}/state"] = _attribute(
                0o444, lambda: f"{luo.state.name.lower()}\n".encode()
            )
            files[f"{group}/prepare"] = _attribute(
                0o200, None, lambda on: luo.prepare() if on else _tell(luo.cancel()), (0, 1)
            )
            files[f"{group}/finish"] = _attribute(0o200, None, lambda _: _tell(luo.finish()), (1,))
        debug = "kernel/debug/liveupdate"
        files[f"{debug}/reboot"] = _attribute(
            0o200, None, lambda _: _tell(luo.dry_reboot()), (1,), size=0
        )
        files[f"{debug}/kexec"] = _attribute(
            0o200, None, lambda _: self._kexec(kernel), (1,), size=0
        )
        debug = "kernel/debug/kho"
        if path == "kernel/debug" or path.startswith(debug):
            for name, content in debug_files(kernel).items():
                files[f"{debug}/{name}"] = self._debug_file(kernel, name, content)
        return files

    @staticmethod
    def _debug_file(kernel: AnyKernel, name: str, content: bytes) -> _Node:
        if name in ("out/finalize", "out/fdt_max"):
            store = partial(write_debug_file, kernel, name)
            return _attribute(0o600, lambda: content, store, size=0)
        blob = name.endswith("/fdt") or "/sub_fdts/" in name
        return _attribute(0o400, lambda: content, size=len(content) if blob else 0)

    # ---- what anybody may do ----

    def list(self, path: str = "") -> _Names:
        """Return the names in the directory *path*: devices in the order of adding.

        Raises:
            OSError: ENOENT, ENOTDIR; ENODEV while no kernel runs.
        """
        if not path.strip("/"):
            return self._top()  # also while nothing runs, so that a mount of it can be looked at

        def names(kernel: AnyKernel) -> Sequence[str]:
            node = self._find(kernel, path)
            if node.names is None:
                raise from_errno(errno.ENOTDIR, f"{path}: is no directory")
            return node.names()

        return list(self._ask(names))

    def stat(self, path: str = "") -> Stat:
        """Return mode, owner and size of *path*.

        Raises:
            OSError: ENOENT, ENOTDIR; ENODEV while no kernel runs.
        """
        if not path.strip("/"):
            return Stat(stat.S_IFDIR | 0o755, 0, 0, 0)

        def found(kernel: AnyKernel) -> Stat:
            node = self._find(kernel, path)
            return Stat(*self._inode(kernel, path, node), node.size)

        result: Stat = self._ask(found)
        return result

    def readlink(self, path: str) -> str:
        """Return where the symbolic link *path* leads.

        Raises:
            OSError: EINVAL if it is none; ENOENT, ENOTDIR; ENODEV while no kernel runs.
        """
        target = self._ask(lambda kernel: self._find(kernel, path)).target
        if target is None:
            raise from_errno(errno.EINVAL, f"{path}: is no symbolic link")
        return str(target)

    def read(self, path: str, *, uid: int = 0, gid: int = 0) -> bytes:
        """Return the content of the file *path*, as user *uid* of group *gid*.

        Raises:
            OSError: EACCES if the user may not; EIO for a file that nobody can read; ENOENT,
                EISDIR; ENODEV while no kernel runs.
        """

        def content(kernel: AnyKernel) -> bytes:
            node = self._file(kernel, path)
            self._permit(kernel, path, uid, gid, 4)
            if node.show is None:
                raise from_errno(errno.EIO, f"{path}: cannot be read")
            return node.show()

        result: bytes = self._ask(content)
        return result

    def write(self, path: str, data: bytes | str, *, uid: int = 0, gid: int = 0) -> int:
        """Write *data* to the file *path*, as user *uid* of group *gid*.

        Args:
            path: the file.
            data: a number (:func:`parse_long`); of more than a page only the first is taken.
            uid: numeric user; 0 may do everything.
            gid: numeric group.

        Returns:
            How many bytes were taken.

        Raises:
            OSError: EACCES if the user may not; EIO for a file that nobody can write; EINVAL for
                what is no number, or not one that the file takes; ENOENT, EISDIR; ENODEV while no
                kernel runs, or if it goes while the write waits; whatever the call behind the
                file fails with (RFC v1 1.4).
            KernelPanic: of a jump.
        """
        path = path.strip("/")
        taken = (data.encode() if isinstance(data, str) else data)[:_PAGE]
        kernel = self._kernel()
        try:
            node = self._file(kernel, path)
            self._permit(kernel, path, uid, gid, 2)
            if node.store is None:
                raise from_errno(errno.EIO, f"{path}: cannot be written")
            value = self._number(path, taken, node.accepts)
            node.store(value)
        except StateError as error:
            if error.errno != errno.ESHUTDOWN:
                raise
            raise from_errno(errno.ENODEV, f"{path}: the kernel is gone") from error
        return len(taken)

    @staticmethod
    def _number(path: str, text: bytes, accepts: tuple[int, ...] | None) -> int:
        try:
            value = parse_long(text)
        except KhoError as error:  # ERANGE too (RFC v1 1.5)
            raise from_errno(errno.EINVAL, f"{path}: {error.strerror}") from error
        if accepts is not None and value not in accepts:
            wanted = " or ".join(map(str, accepts))
            raise from_errno(errno.EINVAL, f"{path}: {value} instead of {wanted}")
        return value

    def _permit(self, kernel: AnyKernel, path: str, uid: int, gid: int, wanted: int) -> None:
        """Raise KhoError (EACCES) unless user *uid* may search all above and use *path* itself."""
        if uid == 0:
            return
        parts = path.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            here = "/".join(parts[:depth])
            mode, owner, group = self._inode(kernel, here, self._find(kernel, here))
            shift = 6 if uid == owner else 3 if gid == group else 0
            if not mode >> shift & (wanted if depth == len(parts) else 1):
                raise from_errno(errno.EACCES, f"{here}: permission denied to user {uid}")

    def chown(self, path: str, uid: int, gid: int) -> None:
        """Change the owner of *path*; -1 leaves the user or group as it is.

        Of a device's directory: ``device_change_owner()``, which changes its group with it. Of
        anything else: this one, until a jump makes the tree anew.

        Raises:
            OSError: ENOENT; ENODEV while no kernel runs.
        """
        path = path.strip("/")
        kernel = self._kernel()
        node = self._find(kernel, path)
        _, owner, owning_group = self._inode(kernel, path, node)
        mine = owner if uid < 0 else uid, owning_group if gid < 0 else gid
        if node.device >= 0 and path == f"devices/{self.machine.devices.path(node.device)}":
            kernel.devices.change_owner(node.device, *mine)
            group = f"{path}/liveupdate"
            for changed in [p for p in self._inodes if p == group or p.startswith(f"{group}/")]:
                self._inodes[changed] = self._inodes[changed][0], None
        else:
            mode, _ = self._inodes.get(path, (None, None))
            self._inodes[path] = mode, mine

    def chmod(self, path: str, mode: int) -> None:
        """Change the permissions of *path*, until a jump makes the tree anew.

        Raises:
            OSError: ENOENT; ENODEV while no kernel runs.
        """
        path = path.strip("/")
        self._find(self._kernel(), path)
        _, owner = self._inodes.get(path, (None, None))
        self._inodes[path] = stat.S_IMODE(mode), owner

    def walk(self, path: str = "") -> Iterator[str]:
        """Yield the paths of all files below *path*, depth first."""
        for name in self.list(path):
            here = f"{path}/{name}".strip("/")
            if stat.S_ISDIR(self.stat(here).mode):
                yield from self.walk(here)
            else:
                yield here
