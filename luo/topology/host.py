"""The host's ``/sys/devices`` as it is, or a ``/sys`` tree gathered from another host.

Nothing is written and no symbolic link is followed: of a link only its text is read, and a link
that leads out of the tree says nothing. A tree may be the live one, or a copy made by cp, tar or
rsync: with relative links or absolute ones to ``/sys/…``, with files missing, with values padded
by NULs (tar does that).
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field
from os import PathLike

from luo.topology import Host
from luo.topology._rows import (
    DEFAULT_MEMORY,
    GLUE,
    MAX_PHYS,
    MAX_SPAN,
    RANGE_ALIGN,
    Range,
    Rows,
    pack_attributes,
    renumber,
    stack_nodes,
    stack_ranges,
    text,
)

__all__ = ["read"]

CONFIG_BYTES = 4096  # PCI Express extended configuration space
CONFIG_MIN_BYTES = 64  # the standard header: what a reader without privilege gets
ATTRIBUTE_BYTES = 4096
STATE_BYTES = 64 << 10  # of the attributes of one device
MAX_INDEX = 1 << 40  # of a memory block

# Attributes whose reading is big, slow or does something: images behind BARs and ROMs, port and
# memory windows, serial EEPROMs, and actions that some kernels leave readable.
_NEVER = re.compile(
    r"resource\d+(_wc)?|rom|vpd|legacy_io|legacy_mem|eeprom|nvmem|telem|crashlog"
    r"|remove|rescan|reset|delete|bind|unbind"
)
_NODE = re.compile(r"node(\d{1,4})")
_MEM_TOTAL = re.compile(rb"MemTotal:\s*(\d{1,15})\s*kB")
# Prefixes of MODALIAS that are names of buses: for copies that lost their links.
_MODALIAS_BUSES = frozenset({"acpi", "pci", "platform", "usb", "virtio", "vmbus", "xen"})

_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def read(sysfs: str | PathLike[str] = "/sys") -> Host:
    r"""Read a host's devices, NUMA nodes and memory from a sysfs tree.

    A device is a directory with a ``uevent`` file; in a copy that has no such file at all, one
    with a ``subsystem`` link or PCI configuration space. Order is depth-first, names sorted, so
    parents come first. Directories between devices become part of names, joined by ``!``
    (``net!eth0``); names that are not UTF-8 are kept with ``\xNN`` for each such byte.

    =========== =====================================================================
    bus         ``subsystem`` link into ``bus/``; column ``class`` if it is into ``class/``
    driver      ``driver`` link, else ``DRIVER=`` of ``uevent``
    node        ``numa_node``, a ``nodeN`` link, else the parent's, else 0. Nodes are
                numbered among those with memory; devices of others count as node 0's
    ``state``   PCI: configuration space, up to 4096 bytes. Others: the regular files of their
                own directory, up to 4 KiB each and 64 KiB in all, as attribute records
    =========== =====================================================================

    An attribute record is u16 bytes of name with NUL and u32 bytes of value, both little-endian,
    then name, NUL and value; names ascend. Files without a read bit, those whose reading has
    side effects and those that give an error or would block are counted in ``Host.skipped``.

    Memory: the online blocks of ``devices/system/memory``, holes included; else ``meminfo`` of the
    nodes, else of the host, stacked from address 0; else 16 GiB on one node. Holes are closed if
    the addresses span more than 64 TiB. Sizes are rounded down to 4 MiB.

    Args:
        sysfs: directory that holds ``devices`` or ``sys/devices``.

    Raises:
        OSError: ENOENT, ENOTDIR or EACCES: the directory is not there or not readable.
        ValueError: it has no devices.

    Source: Documentation/admin-guide/sysfs-rules.rst; ``device_create_file(dev, &dev_attr_uevent)``
        in drivers/base/core.c gives every device its ``uevent``.
    """
    path = os.fspath(sysfs)
    top = os.path.realpath(path)
    if not os.path.lexists(top):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if not os.path.isdir(top):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    if not os.access(top, os.R_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    for root in (top, os.path.join(top, "sys")):
        if not _inside(os.path.join(root, "devices"), top):
            continue
        for by_uevent in (True, False):
            walk = _Walk(os.path.realpath(root), by_uevent)
            walk.run()
            if walk.rows.names:
                ranges, node_of = renumber(walk.memory.ranges(walk.root))
                return Host(
                    devices=walk.rows.tree(node_of),
                    ranges=ranges,
                    source={"kind": "sysfs", "path": path, "devices": len(walk.rows.names)},
                    skipped=walk.skipped,
                )
    raise ValueError(f"{path}: no devices in devices/ or sys/devices/")


def _inside(path: str, top: str) -> bool:
    real = os.path.realpath(path)
    return os.path.isdir(real) and os.path.commonpath((real, top)) == top


# ---- memory ----


@dataclass(slots=True)
class _Memory:
    """What the walk saw of the memory: it passes all of it anyway, and follows no link."""

    block_bytes: int = 0
    blocks: dict[str, tuple[int, int | None]] = field(default_factory=dict)  # name: index, node
    node_of: dict[str, int] = field(default_factory=dict)  # block's name: node, by node's entries
    sizes: list[tuple[int, int]] = field(default_factory=list)  # node, bytes

    def note(self, fd: int, parts: tuple[str, ...], entries: list[str]) -> None:
        """Note what the directory *parts*, below ``devices/system``, tells."""
        if parts == ("memory",):
            size = _number(_value(fd, "block_size_bytes"), 16) or 0
            if 0 < size <= MAX_SPAN and not size % RANGE_ALIGN:
                self.block_bytes = size
        elif len(parts) == 2 and parts[0] == "memory":
            index = _number(_value(fd, "phys_index"), 16)
            # a block that is offline has pages that nobody may allocate
            if (
                index is not None
                and 0 <= index <= MAX_INDEX
                and _value(fd, "state") in (b"", b"online")
            ):
                nodes = [int(found[1]) for name in entries if (found := _NODE.fullmatch(name))]
                self.blocks[parts[1]] = (index, min(nodes, default=None))
        elif len(parts) == 2 and parts[0] == "node" and (found := _NODE.fullmatch(parts[1])):
            node = int(found[1])
            self.sizes.append((node, _meminfo(_value(fd, "meminfo"))))
            for name in entries:
                self.node_of.setdefault(name, node)

    def ranges(self, root: str) -> list[Range]:
        """Ranges by the best source there is."""
        found = self._from_blocks() or stack_nodes(sorted(self.sizes))
        if not found:
            above = os.path.dirname(root) if os.path.basename(root) == "sys" else root
            found = stack_nodes([(0, _meminfo(_proc_meminfo(above)))])
        if not found:
            found = stack_nodes([(0, DEFAULT_MEMORY)])
        end = sum(found[-1][:2])
        if end > MAX_PHYS or end - found[0][0] > MAX_SPAN:
            return stack_ranges(found)
        return found

    def _from_blocks(self) -> list[Range]:
        nodes = {
            index * self.block_bytes: self.node_of.get(name, 0) if node is None else node
            for name, (index, node) in self.blocks.items()
        }
        ranges: list[Range] = []
        for start, node in sorted(nodes.items()) if self.block_bytes else ():
            if ranges and ranges[-1][2] == node and sum(ranges[-1][:2]) == start:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + self.block_bytes, node)
            else:
                ranges.append((start, self.block_bytes, node))
        return ranges


def _meminfo(content: bytes) -> int:
    found = _MEM_TOTAL.search(content)
    return int(found[1]) << 10 if found else 0


def _proc_meminfo(above: str) -> bytes:
    # this host's for /sys; for a copy, what was gathered beside it
    path = os.path.join(above, "proc")
    if not _inside(path, above):
        return b""
    try:
        fd = os.open(path, _DIRECTORY)
    except OSError:
        return b""
    try:
        return _value(fd, "meminfo")
    finally:
        os.close(fd)


# ---- devices ----


@dataclass(slots=True)
class _Pending:
    """A directory still to be visited, below the device *parent* (-1: none)."""

    parts: tuple[str, ...]
    glue: str
    parent: int


@dataclass(slots=True)
class _Walk:
    """One walk over ``devices``; *by_uevent* says what tells a device."""

    root: str
    by_uevent: bool
    rows: Rows = field(default_factory=Rows)
    memory: _Memory = field(default_factory=_Memory)
    skipped: int = 0

    def run(self) -> None:
        # Depth-first with an explicit stack: a hostile tree may be deeper than Python's.
        # Directories are remembered by inode: bind mounts can make them cyclic.
        seen: set[tuple[int, int]] = set()
        stack = [_Pending(("devices",), "", -1)]
        while stack:
            here = stack.pop()
            try:
                fd = os.open(os.path.join(self.root, *here.parts), _DIRECTORY)
            except OSError:  # gone meanwhile, too deep, or not ours to read
                self.skipped += 1
                continue
            try:
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                self._visit(fd, here, stack)
            finally:
                os.close(fd)

    def _visit(self, fd: int, here: _Pending, stack: list[_Pending]) -> None:
        files: dict[str, os.DirEntry[str]] = {}
        links: list[str] = []
        directories: list[str] = []
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        links.append(entry.name)
                    elif entry.is_dir(follow_symlinks=False):
                        directories.append(entry.name)
                    elif entry.is_file(follow_symlinks=False):
                        files[entry.name] = entry
        except OSError:  # what was listed before the error still counts
            self.skipped += 1

        if here.parts[1:2] == ("system",):
            self.memory.note(fd, here.parts[2:], [*links, *directories])

        parent, glue = here.parent, here.glue
        if len(here.parts) > 1:
            name = glue + here.parts[-1]
            if self._is_device(files, links):
                parent = self._device(fd, here, name, files, links)
                glue = ""
            else:
                glue = name + GLUE
        directories.sort(reverse=True)
        stack += [
            _Pending((*here.parts, name), glue, parent)
            for name in directories
            if name != "power"  # runtime power management of the device; has no devices
        ]

    def _is_device(self, files: dict[str, os.DirEntry[str]], links: list[str]) -> bool:
        if self.by_uevent:
            return "uevent" in files
        return "subsystem" in links or files.keys() >= {"config", "vendor", "device"}

    def _device(
        self,
        fd: int,
        here: _Pending,
        name: str,
        files: dict[str, os.DirEntry[str]],
        links: list[str],
    ) -> int:
        uevent = _variables(_value(fd, "uevent")) if "uevent" in files else {}
        bus, klass = None, ""
        where = self._link(fd, "subsystem", here.parts) if "subsystem" in links else ()
        if len(where) == 2 and where[0] == "bus":
            bus = text(where[1])
        elif len(where) == 2 and where[0] == "class":
            klass = text(where[1])
        elif not where:  # no link, or one that leads out of the tree
            alias = uevent.get("MODALIAS", "").partition(":")[0]
            if files.keys() >= {"config", "vendor", "device"}:
                bus = "pci"
            elif alias in _MODALIAS_BUSES:
                bus = alias

        driver = None
        where = self._link(fd, "driver", here.parts) if "driver" in links else ()
        if len(where) == 4 and (where[0], where[2]) == ("bus", "drivers"):
            driver = text(where[3])
        elif not where:
            driver = uevent.get("DRIVER") or None

        return self.rows.add(
            text(name),
            here.parent,
            bus=bus,
            driver=driver,
            node=self._node(fd, here, files, links),
            klass=klass,
            state=self._state(fd, bus, files),
        )

    def _link(self, fd: int, name: str, parts: tuple[str, ...]) -> tuple[str, ...]:
        # Where a link of the directory *parts* points, as components below the root; () if out
        # of the tree. By its text alone: the target may be missing, and is never opened.
        try:
            target = os.readlink(name, dir_fd=fd)
        except OSError:
            return ()
        if target.startswith("/"):
            if target.startswith(self.root + "/"):
                target = target[len(self.root) :]
            elif "/sys/" in target:  # made on the live tree, wherever that was mounted
                target = target.partition("/sys/")[2]
            else:
                return ()
            found = []
        else:
            found = list(parts)
        for part in target.split("/"):
            if part == "..":
                if not found:
                    return ()
                found.pop()
            elif part not in ("", "."):
                found.append(part)
        return tuple(found)

    def _node(
        self, fd: int, here: _Pending, files: dict[str, os.DirEntry[str]], links: list[str]
    ) -> int:
        if "numa_node" in files:
            node = _number(_value(fd, "numa_node"), 10)
            if node is not None and 0 <= node < 1 << 16:
                return node
        if here.parts[1] == "system":  # CPUs and memory blocks link to their node
            for name in (*links, here.parts[-1]):
                if found := _NODE.fullmatch(name):
                    return int(found[1])
        return self.rows.nodes[here.parent] if here.parent >= 0 else 0

    def _state(self, fd: int, bus: str | None, files: dict[str, os.DirEntry[str]]) -> bytes:
        if bus == "pci" and "config" in files:
            config = _config(fd)
            if len(config) >= CONFIG_MIN_BYTES:
                return config

        attributes: list[tuple[bytes, bytes]] = []
        room = STATE_BYTES
        for name in sorted(files):
            value = None if _NEVER.fullmatch(name) else _attribute(fd, files[name])
            if value is None or len(value) > room:
                self.skipped += 1
                continue
            room -= len(value)
            attributes.append((os.fsencode(name), value))
        return pack_attributes(attributes)


def _attribute(fd: int, entry: os.DirEntry[str]) -> bytes | None:
    # None: not to be read, or not readable. A privileged reader could open a write-only file;
    # whoever took its read bits away meant that nobody should.
    try:
        if not entry.stat(follow_symlinks=False).st_mode & 0o444:
            return None
        return _read(fd, entry.name, ATTRIBUTE_BYTES)
    except OSError:
        return None


def _read(fd: int, name: str, limit: int) -> bytes:
    file = os.open(name, _FILE, dir_fd=fd)
    try:
        return os.read(file, limit)
    finally:
        os.close(file)


def _config(fd: int) -> bytes:
    try:
        file = os.open("config", _FILE, dir_fd=fd)
    except OSError:
        return b""
    found = b""
    try:
        # a read of configuration space may stop at any boundary that the kernel likes
        while len(found) < CONFIG_BYTES and (more := os.read(file, CONFIG_BYTES - len(found))):
            found += more
    except OSError:
        pass
    finally:
        os.close(file)
    return found


def _value(fd: int, name: str) -> bytes:
    try:
        return _read(fd, name, ATTRIBUTE_BYTES).strip(b"\0 \t\r\n")
    except OSError:
        return b""


def _number(value: bytes, base: int) -> int | None:
    try:
        return int(value, base) if len(value) < 32 else None
    except ValueError:
        return None


def _variables(uevent: bytes) -> dict[str, str]:
    lines = uevent.replace(b"\0", b"\n").decode("utf-8", "backslashreplace").splitlines()
    return {key: value for key, _, value in (line.partition("=") for line in lines)}
