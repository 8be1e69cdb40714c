"""Boot a real arm64 kernel with a handover: memory, device tree and command for QEMU's ``virt``.

::

    kernel = Kernel(virt_machine("512MiB"), arch="arm64", ...)      # sessions, files, …
    boot = write(Image.from_kernel(kernel), "out", kernel="Image", initrd="initrd")
    subprocess.run(boot.command)                                    # or out/run.sh

Nothing of the handover may be overwritten before the kernel looks at it, and QEMU's own loader
writes to fixed places. So it gets no kernel: a firmware of sixteen instructions in flash starts it,
as kexec's trampoline would, and kernel, initramfs and device tree lie where the handover leaves
room, in scratch if that is large enough. QEMU itself still writes its device tree to the begin of
RAM; what belongs there waits in flash until the firmware copies it.

What a kernel demands of an image: ``docs/real-kernel.md``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from luo.errors import FdtError, HandoverError
from luo.fdt import Fdt, FdtEditor, FdtWriter
from luo.image.store import Extent, Image, merge_spans
from luo.image.survey import Survey, Violation
from luo.machine import DeviceTree, Machine
from luo.memory import PhysicalMemory, parse_size

if TYPE_CHECKING:
    from luo.kernel import Kernel

__all__ = [
    "CMDLINE",
    "QEMU",
    "RAM_BASE",
    "Boot",
    "Part",
    "Segment",
    "check",
    "kernel_page_size",
    "machine_arguments",
    "virt_machine",
    "virt_tree",
    "write",
]

QEMU: Final = "qemu-system-aarch64"
RAM_BASE: Final = 0x40000000
RAM_MAX: Final = 255 << 30
CMDLINE: Final = (
    "console=ttyAMA0 earlycon=pl011,0x9000000 liveupdate=on kho=on panic=-1 rdinit=/init"
)
GENERATIONS: Final = ("kho-v3", "kho-v4")

_MIB: Final = 1 << 20
_QEMU_WRITES: Final = 2 * _MIB  # at the begin of RAM: its device tree, of 1 MiB as yet
_IMAGE_ALIGN: Final = 2 * _MIB
_TREE_ALIGN: Final = 64 << 10
_TREE_MAX: Final = 2 * _MIB
_ROOM: Final = 32 * _MIB  # for a kernel or initramfs that is named later
_SEGMENTS_MAX: Final = 256
_EARLY: Final = 8 * _MIB  # of scratch: what a kernel allocates before it knows memory, less memmap

# Image's head (Linux: Documentation/arch/arm64/booting.rst)
_HEAD: Final = struct.Struct("<IIQQQQQQ4sI")
_MAGIC: Final = b"ARM\x64"
_PAGE_SIZES: Final = {1: 4096, 2: 16384, 3: 65536}

# What runs first, at address 0, with caches and MMU off. x9 walks the table behind it: triples of
# (to, bytes, from) that are copied, 16 bytes a time, until bytes is 0; then device tree and entry.
_FIRMWARE: Final = (
    0x10000209,  #     adr  x9, table
    0xA8C12D2A,  # 1:  ldp  x10, x11, [x9], #16
    0xB40000EB,  #     cbz  x11, 3f
    0xF840852C,  #     ldr  x12, [x9], #8
    0xA8C1398D,  # 2:  ldp  x13, x14, [x12], #16
    0xA881394D,  #     stp  x13, x14, [x10], #16
    0xF100416B,  #     subs x11, x11, #16
    0x54FFFFA1,  #     b.ne 2b
    0x17FFFFF9,  #     b    1b
    0xA9401120,  # 3:  ldp  x0, x4, [x9]
    0xAA1F03E1,  #     mov  x1, xzr
    0xAA1F03E2,  #     mov  x2, xzr
    0xAA1F03E3,  #     mov  x3, xzr
    0xD61F0080,  #     br   x4
    0xD503201F,  #     nop
    0xD503201F,  #     nop
)  # table:


@dataclass(frozen=True, slots=True)
class Segment:
    """Memory that has contents when the kernel starts.

    Attributes:
        phys: physical address.
        nbytes: of it.
        file: that holds the bytes, relative to the directory; None for a part that is named when
            the machine is started.
    """

    phys: int
    nbytes: int
    file: str | None


@dataclass(frozen=True, slots=True)
class Part(Segment):
    """A segment that is no part of the handover.

    Attributes:
        in_scratch: whether it lies there, as kexec would have it.
    """

    in_scratch: bool


@dataclass(frozen=True)
class Boot:
    """A directory from which a kernel can be booted.

    Attributes:
        directory: with ``run.sh`` and ``boot.json``.
        segments: what crosses.
        kernel, initrd, tree: the rest; initrd None if there is none.
        arguments: QEMU's; names of files in them are relative to the directory. None if kernel or
            initramfs are named later, as arguments of ``run.sh``.
    """

    directory: Path
    segments: tuple[Segment, ...]
    kernel: Part
    initrd: Part | None
    tree: Part
    arguments: tuple[str, ...] | None

    @property
    def command(self) -> list[str]:
        """What to run, from any directory."""
        return [str(self.directory / "run.sh")]


def virt_machine(
    size: int | str = "512MiB",
    *,
    ranges: Iterable[tuple[int, int, int]] | None = None,
    devices: DeviceTree | None = None,
) -> Machine:
    """Return a machine whose memory lies as that of QEMU's ``virt``.

    Args:
        size: of its memory, which begins at 1 GiB.
        ranges: ``[(start, nbytes, node), ...]`` instead.
        devices: of the machine.

    Raises:
        ValueError: memory where that machine has none.
    """
    nbytes = parse_size(size)
    wanted = [(RAM_BASE, nbytes, 0)] if ranges is None else list(ranges)
    for start, length, _ in wanted:
        if start < RAM_BASE or start + length > RAM_BASE + RAM_MAX:
            raise ValueError(f"memory {start:#x}+{length:#x}: {_WHERE}")
    return Machine(PhysicalMemory(ranges=wanted), devices)


_WHERE: Final = f"QEMU's virt machine has its own from {RAM_BASE:#x} to {RAM_BASE + RAM_MAX:#x}"


# ---- what cannot be booted ----


def check(image: Image, *, page_size: int = 4096) -> list[Violation]:
    """Return why no kernel can be started with this image; nothing if one can.

    Whether that kernel then takes the handover over is another question.

    Args:
        image: the handover.
        page_size: of the kernel.
    """
    return _check(image, Survey(image, formats=False), page_size)


def _check(image: Image, survey: Survey, page_size: int) -> list[Violation]:
    found: list[Violation] = []

    def wrong(phys: int | None, rule: str) -> None:
        found.append(Violation("boot", phys, rule))

    if image.abi not in GENERATIONS:
        wrong(None, f"{image.abi}: kernels of {' and '.join(GENERATIONS)} can be booted so")
    if image.page_size != page_size:
        wrong(None, f"pages of {image.page_size} bytes: the kernel has {page_size}")
    for start, nbytes, _ in image.ram.ranges:
        if start < RAM_BASE or start + nbytes > RAM_BASE + RAM_MAX:
            wrong(start, f"memory of {nbytes:#x} bytes: {_WHERE}")
    handover = image.handover
    for what, phys, nbytes, without in (
        ("root tree", handover.fdt_phys, handover.fdt_len, "nothing is handed over"),
        ("scratch array", handover.scratch_phys, handover.scratch_len, "a kernel could not boot"),
    ):
        if not nbytes:
            wrong(None, f"no {what}: {without}")
        elif not image.ram.contains(phys, nbytes):
            wrong(phys, f"{what} of {nbytes:#x} bytes is not in memory")
    if handover.scratch_len and not any(size for _, size in survey.scratch):
        wrong(handover.scratch_phys, "no scratch area of any size: a kernel could not boot")
    for start, size in survey.scratch:
        if size and not image.ram.contains(start, size):
            wrong(start, f"scratch area of {size:#x} bytes is not in memory")
    return found


# ---- where everything goes ----


def _subtract(
    spans: Iterable[tuple[int, int]], taken: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yield what of spans is in no *taken*, which is sorted and disjoint."""
    for start, end in spans:
        for low, high in taken:
            if high <= start or low >= end:
                continue
            if low > start:
                yield start, low
            start = max(start, high)
        if start < end:
            yield start, end


class _Places:
    """Where there is room for what is no part of the handover.

    Args:
        image: the handover.
        survey: of it.
        segments: [start, end) of what will be loaded.
        parts: bytes of everything that looks for a place.
    """

    def __init__(
        self, image: Image, survey: Survey, segments: Iterable[tuple[int, int]], parts: int
    ) -> None:
        low = image.ram.runs[0][0]
        handover = image.handover
        page = image.page_size
        known = [
            *survey.spans(),
            *((extent.phys, extent.end) for extent in image.extents),
            *segments,
            (low, low + page),  # address 0 of a machine is nobody's
            (handover.fdt_phys, handover.fdt_phys + page),
            (handover.scratch_phys, handover.scratch_phys + max(handover.scratch_len, page)),
            (RAM_BASE, RAM_BASE + _QEMU_WRITES),
        ]
        self.taken = merge_spans(known)
        self.ram = image.ram
        self.scratch = merge_spans((at, at + size) for at, size in survey.scratch if size)
        total = sum(end - start for start, end in self.scratch)
        memmap = image.ram.nr_pages * 64
        self.use_scratch = total >= parts + memmap + _EARLY

    def place(self, what: str, nbytes: int, align: int) -> tuple[int, bool]:
        """Take bytes: in scratch if that leaves enough of it, else behind or before it.

        Returns:
            tuple: the address, and whether it is in scratch.
        """
        outside = list(_subtract(self.ram.runs, self.scratch))
        for spans, inside in ((self.scratch if self.use_scratch else [], True), (outside, False)):
            for start, end in _subtract(spans, self.taken):
                at = -(-start // align) * align
                if at + nbytes <= end:
                    self.taken = merge_spans([*self.taken, (at, at + nbytes)])
                    return at, inside
        raise HandoverError(f"no {nbytes:#x} bytes for the {what}: everything is preserved")


def _coalesced(extents: Iterable[Extent]) -> list[tuple[int, int, list[Extent]]]:
    """Join extents with contents into at most 256 segments: (start, end, extents).

    What adjoins is joined; if that leaves more, also what is near, over the smallest gaps, which
    are zeros then.
    """
    written = [extent for extent in extents if extent.data is not None]
    gaps = sorted(after.phys - one.end for one, after in itertools.pairwise(written))
    widest = gaps[-_SEGMENTS_MAX] if len(gaps) >= _SEGMENTS_MAX else 0
    runs: list[tuple[int, int, list[Extent]]] = []
    for extent in written:
        if runs and extent.phys - runs[-1][1] <= widest:
            start, _, parts = runs[-1]
            parts.append(extent)
            runs[-1] = (start, extent.end, parts)
        else:
            runs.append((extent.phys, extent.end, [extent]))
    return runs


# ---- device tree ----


def virt_tree(memory: int = 512 * _MIB) -> bytes:
    """Return a device tree of QEMU's ``virt`` machine with what a kernel cannot do without.

    Processor, PSCI, interrupt controller (GICv3), timer, clock, serial line. Addresses and
    interrupts are those of QEMU's memory map, which does not change.

    Args:
        memory: bytes of it.
    """
    clock, gic = 1, 2
    w = FdtWriter(1 << 14)
    with w.node(""):
        w.property_cells("interrupt-parent", [gic])
        w.property_cells("#size-cells", [2])
        w.property_cells("#address-cells", [2])
        w.property_string("compatible", "linux,dummy-virt")
        w.property_string("model", "linux,dummy-virt")
        with w.node("psci"):
            w.property_string("method", "hvc")
            w.property_strings("compatible", ["arm,psci-1.0", "arm,psci-0.2", "arm,psci"])
        with w.node(f"memory@{RAM_BASE:x}"):
            w.property_cells("reg", [0, RAM_BASE, memory >> 32, memory & 0xFFFFFFFF])
            w.property_string("device_type", "memory")
        with w.node("pl011@9000000"):
            w.property_strings("clock-names", ["uartclk", "apb_pclk"])
            w.property_cells("clocks", [clock, clock])
            w.property_cells("interrupts", [0, 1, 4])
            w.property_cells("reg", [0, 0x9000000, 0, 0x1000])
            w.property_strings("compatible", ["arm,pl011", "arm,primecell"])
        with w.node("intc@8000000"):
            w.property_cells("phandle", [gic])
            w.property_cells("reg", [0, 0x8000000, 0, 0x10000, 0, 0x80A0000, 0, 0xF60000])
            w.property_cells("#redistributor-regions", [1])
            w.property_string("compatible", "arm,gic-v3")
            w.property("ranges", b"")
            w.property_cells("#size-cells", [2])
            w.property_cells("#address-cells", [2])
            w.property("interrupt-controller", b"")
            w.property_cells("#interrupt-cells", [3])
        with w.node("cpus"):
            w.property_cells("#size-cells", [0])
            w.property_cells("#address-cells", [1])
            with w.node("cpu@0"):
                w.property_cells("reg", [0])
                w.property_string("compatible", "arm,cortex-a57")
                w.property_string("device_type", "cpu")
        with w.node("timer"):
            w.property_cells("interrupts", [1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4])
            w.property("always-on", b"")
            w.property_strings("compatible", ["arm,armv8-timer", "arm,armv7-timer"])
        with w.node("apb-pclk"):
            w.property_cells("phandle", [clock])
            w.property_string("clock-output-names", "clk24mhz")
            w.property_cells("clock-frequency", [24_000_000])
            w.property_cells("#clock-cells", [0])
            w.property_string("compatible", "fixed-clock")
        with w.node("chosen"):
            w.property_string("stdout-path", "/pl011@9000000")
    return bytes(w.finish())


def machine_arguments(memory: int) -> list[str]:
    """Return QEMU's arguments for the machine, with so many bytes of memory."""
    return [
        "-machine", "virt,gic-version=3,its=off,acpi=off", "-cpu", "cortex-a57", "-smp", "1",
        "-m", f"{-(-memory // _MIB)}M", "-net", "none",
    ]  # fmt: skip


def _qemu_tree(memory: int) -> bytes | None:
    """Return the device tree that QEMU has for the machine; None without QEMU."""
    program = shutil.which(QEMU)
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "virt.dtb"
        arguments = machine_arguments(memory)
        arguments[1] += f",dumpdtb={file}"
        try:
            done = subprocess.run(
                [program, "-display", "none", *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return file.read_bytes() if done.returncode == 0 and file.exists() else None


def _device_tree(base: bytes, image: Image, cmdline: str, initrd: tuple[int, int] | None) -> bytes:
    """Return *base* with the image's memory and handover in it."""
    try:
        tree = Fdt(base)
    except FdtError as error:
        raise ValueError(f"device tree: {error}") from error
    root = tree.root
    cells = [int.from_bytes(bytes(root.get(name) or b""), "big") for name in _CELLS]
    if not all(count in (1, 2) for count in cells):
        raise ValueError(f"device tree: {_CELLS} of the root are {cells}, not 1 or 2")
    memory = [node.name for node in root.children if node.name.split("@")[0] == "memory"]
    size = tree.totalsize
    buffer = bytearray(size + (16 << 10) + 256 * len(image.ram.ranges) + len(cmdline))
    buffer[:size] = base[:size]
    editor = FdtEditor(buffer)
    for name in memory:
        editor.del_node(f"/{name}")
    nodes = {node for _, _, node in image.ram.ranges}
    for start, nbytes, node in reversed(image.ram.ranges):  # each goes before the others
        name = f"memory@{start:x}"
        editor.add_node("/", name)
        editor.set_property(f"/{name}", "device_type", b"memory\0")
        reg = start.to_bytes(4 * cells[0], "big") + nbytes.to_bytes(4 * cells[1], "big")
        editor.set_property(f"/{name}", "reg", reg)
        if len(nodes) > 1:
            editor.set_property(f"/{name}", "numa-node-id", node.to_bytes(4, "big"))
    if "/chosen" not in tree:
        editor.add_node("/", "chosen")
    chosen = image.handover.to_chosen(cells[0], cells[1])
    chosen["bootargs"] = cmdline.encode() + b"\0"
    if initrd is not None:
        for name, at in zip(("linux,initrd-start", "linux,initrd-end"), initrd, strict=True):
            chosen[name] = at.to_bytes(8, "big")
    for name, value in chosen.items():
        editor.set_property("/chosen", name, value)
    return bytes(buffer[: editor.pack()])


_CELLS: Final = ("#address-cells", "#size-cells")


# ---- writing ----


def _kernel_head(file: Path) -> tuple[int, int]:
    """Return (bytes that it takes in memory, page size) of an arm64 Image."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size or head[56:60] != _MAGIC:
        raise ValueError(f"{file}: no arm64 Image (not compressed, not ELF)")
    _, _, offset, nbytes, flags, *_ = _HEAD.unpack(head)
    if flags & 1:
        raise ValueError(f"{file}: a big-endian kernel")
    if offset:
        raise ValueError(f"{file}: text offset {offset:#x}; Linux 5.8 and newer have 0")
    return max(nbytes, size), _PAGE_SIZES.get(flags >> 1 & 3, 4096)


def kernel_page_size(file: str | os.PathLike[str]) -> int:
    """Return the page size of an arm64 Image.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    return _kernel_head(Path(file))[1]


def _firmware(copies: Sequence[tuple[int, bytes]], tree: int, entry: int) -> bytes:
    """Return the flash: the instructions, their table, and the bytes to copy."""
    code = struct.pack(f"<{len(_FIRMWARE)}I", *_FIRMWARE)
    at = -(-(len(code) + 24 * len(copies) + 16 + 16) // 16) * 16
    table, data = bytearray(), bytearray()
    for to, content in copies:
        table += struct.pack("<QQQ", to, len(content), at + len(data))
        data += content
    table += struct.pack("<QQQQ", 0, 0, tree, entry)
    head = code + bytes(table)
    return head + bytes(at - len(head)) + bytes(data)


def _write_segment(file: Path, start: int, end: int, parts: Iterable[Extent]) -> None:
    with file.open("wb") as stream:
        for part in parts:
            assert part.data is not None
            stream.seek(part.phys - start)
            stream.write(part.data)
        stream.truncate(end - start)


@contextlib.contextmanager
def _image_of(source: Image | Kernel) -> Iterator[Image]:
    """Yield the image: of a kernel, what it would hand over, its sessions frozen."""
    if isinstance(source, Image):
        yield source
        return
    held = source.liveupdate.frozen() if source.liveupdate.enabled else contextlib.nullcontext()
    with held:
        yield Image.from_kernel(source)


def write(
    source: Image | Kernel,
    directory: str | os.PathLike[str],
    *,
    kernel: str | os.PathLike[str] | None = None,
    initrd: str | os.PathLike[str] | None = None,
    cmdline: str = CMDLINE,
    tree: bytes | None = None,
    checked: bool = True,
) -> Boot:
    """Write all that QEMU needs to start a kernel with this handover.

    ``memory/ADDRESS.bin`` are the segments, ``virt.dtb`` the device tree, ``firmware.bin`` what
    runs first, ``boot.json`` says where everything is, and ``run.sh`` starts it. Only what crosses
    is written. Kernel and initramfs are copied; without them ``run.sh`` takes them as arguments, up
    to 32 MiB each.

    Args:
        source: an image; or a kernel, whose sessions are frozen while its memory is read.
        directory: made if it is not there.
        kernel: an arm64 Image, not compressed.
        initrd: an initramfs.
        cmdline: of the kernel.
        tree: device tree of the machine; None: what QEMU says, or :func:`virt_tree` without it.
        checked: refuse what :func:`check` finds. Without, it is written as far as it can be.

    Raises:
        HandoverError: no kernel can be booted with this image: the address and the rule.
        ValueError: kernel or device tree are no such thing, or too large.
        OSError: a file cannot be read or written.
    """
    with _image_of(source) as image:
        return _write(image, Path(directory), kernel, initrd, cmdline, tree, checked)


def _write(
    image: Image,
    place: Path,
    kernel: str | os.PathLike[str] | None,
    initrd: str | os.PathLike[str] | None,
    cmdline: str,
    tree: bytes | None,
    checked: bool,
) -> Boot:
    image_bytes, page_size = (_ROOM, 4096) if kernel is None else _kernel_head(Path(kernel))
    survey = Survey(image, formats=False)
    wrong = _check(image, survey, page_size) if checked else []
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise HandoverError(f"{wrong[0].rule}{more}", wrong[0].phys)
    low, high = image.ram.runs[0][0], image.ram.runs[-1][1]
    memory = high - RAM_BASE
    if low < RAM_BASE:
        raise HandoverError(f"memory: {_WHERE}", low)
    initrd_bytes = Path(initrd).stat().st_size if initrd is not None else 0
    later = kernel is None
    if later and initrd is None:
        initrd_bytes = _ROOM

    runs = _coalesced(image.extents)
    places = _Places(
        image,
        survey,
        ((start, end) for start, end, _ in runs),
        image_bytes + initrd_bytes + _TREE_MAX,
    )
    entry, inside = places.place("kernel", image_bytes, _IMAGE_ALIGN)
    kernel_part = Part(entry, image_bytes, None if kernel is None else "Image", inside)
    initrd_part = None
    if initrd_bytes:
        at, inside = places.place("initramfs", initrd_bytes, image.page_size)
        initrd_part = Part(at, initrd_bytes, None if initrd is None else "initrd", inside)
    base = tree or _qemu_tree(memory) or virt_tree()
    span = None if initrd_part is None else (initrd_part.phys, initrd_part.phys + initrd_bytes)
    dtb = _device_tree(base, image, cmdline, span)
    if len(dtb) > _TREE_MAX:
        raise ValueError(f"device tree of {len(dtb):#x} bytes: a kernel takes {_TREE_MAX:#x}")
    at, inside = places.place("device tree", len(dtb), _TREE_ALIGN)
    tree_part = Part(at, len(dtb), "virt.dtb", inside)

    (place / "memory").mkdir(parents=True, exist_ok=True)
    (place / "memory").chmod(0o700)  # it is somebody's memory
    for old in (place / "memory").glob("*.bin"):
        old.unlink()
    segments, copies = _write_segments(place, runs)
    (place / "virt.dtb").write_bytes(dtb)
    (place / "firmware.bin").touch(0o600)
    (place / "firmware.bin").write_bytes(_firmware(copies, tree_part.phys, entry))
    for name, file in (("Image", kernel), ("initrd", initrd)):
        if file is not None and Path(file).resolve() != (place / name).resolve():
            shutil.copyfile(file, place / name)
    arguments = _arguments(memory, kernel_part, initrd_part, tree_part, segments)
    named = arguments if kernel is not None else None
    boot = Boot(place, tuple(segments), kernel_part, initrd_part, tree_part, named)
    _write_script(place / "run.sh", arguments)
    (place / "boot.json").write_text(json.dumps(_document(boot, image, cmdline), indent=1) + "\n")
    return boot


def _write_segments(
    place: Path, runs: Iterable[tuple[int, int, list[Extent]]]
) -> tuple[list[Segment], list[tuple[int, bytes]]]:
    """Write files of the segments; return them, and what the firmware must copy."""
    segments: list[Segment] = []
    copies: list[tuple[int, bytes]] = []
    for start, end, parts in runs:
        limit = RAM_BASE + _QEMU_WRITES
        for part in parts:
            if part.phys < limit:
                assert part.data is not None
                nbytes = min(part.end, limit) - part.phys
                copies.append((part.phys, bytes(memoryview(part.data)[:nbytes])))
        above = [piece for part in parts for piece in _above(part, limit)]
        if above:
            first = max(start, limit)
            name = f"memory/{first:x}.bin"
            _write_segment(place / name, first, end, above)
            segments.append(Segment(first, end - first, name))
    segments += [Segment(to, len(content), "firmware.bin") for to, content in copies]
    return sorted(segments, key=lambda segment: segment.phys), copies


def _above(part: Extent, limit: int) -> Iterator[Extent]:
    assert part.data is not None
    if part.phys >= limit:
        yield part
    elif part.end > limit:
        yield Extent(limit, part.end - limit, memoryview(part.data)[limit - part.phys :])


def _arguments(
    memory: int, kernel: Part, initrd: Part | None, tree: Part, segments: Iterable[Segment]
) -> tuple[str, ...]:
    """Return QEMU's arguments; a file that is named later is $KERNEL or $INITRD."""
    loaded = [segment for segment in segments if segment.file != "firmware.bin"]
    parts = [Segment(kernel.phys, kernel.nbytes, kernel.file or "$KERNEL"), tree]
    if initrd is not None:
        parts.append(Segment(initrd.phys, initrd.nbytes, initrd.file or "$INITRD"))
    arguments = [*machine_arguments(memory), "-bios", "firmware.bin"]
    for segment in [*loaded, *parts]:
        arguments += [
            "-device",
            f"loader,file={segment.file},addr={segment.phys:#x},force-raw=on",
        ]
    return tuple(arguments)


def _write_script(file: Path, arguments: Sequence[str]) -> None:
    """Write ``run.sh``: QEMU on this terminal; arguments behind those that it takes are QEMU's."""
    lines = [
        "#!/bin/sh",
        "# Boots a kernel with what another handed over; written by 'luo image boot'.",
        "set -eu",
    ]
    later = [name for name in ("KERNEL", "INITRD") if any(f"${name}" in a for a in arguments)]
    if later:
        usage = f'echo "usage: $0 {" ".join(later)} [QEMU ...]" >&2; exit 2'
        lines.append(f"[ $# -ge {len(later)} ] || {{ {usage}; }}")
    for name in later:
        too_large = (
            f'echo "$1: larger than {_ROOM} bytes, so luo image boot must know it" >&2; exit 2'
        )
        lines += [
            f'[ "$(wc -c < "$1")" -le {_ROOM} ] || {{ {too_large}; }}',
            f"{name}=$(realpath -- \"$1\" | sed 's/,/,,/g')",
            "shift",
        ]
    words = [
        f'"{argument}"' if "$" in argument else shlex.quote(argument) for argument in arguments
    ]
    lines += [
        'cd "$(dirname -- "$0")"',
        f"exec {QEMU} -nographic -no-reboot \\",
        *(f"  {' '.join(words[i : i + 2])} \\" for i in range(0, len(words), 2)),
        '  "$@"',
    ]
    file.write_text("\n".join(lines) + "\n")
    file.chmod(0o755)


def _document(boot: Boot, image: Image, cmdline: str) -> dict[str, Any]:
    def part(segment: Segment | None) -> dict[str, Any] | None:
        if segment is None:
            return None
        row: dict[str, Any] = {
            "phys": segment.phys, "bytes": segment.nbytes, "file": segment.file
        }  # fmt: skip
        if isinstance(segment, Part):
            row["in_scratch"] = segment.in_scratch
        return row

    names = ("fdt_phys", "fdt_len", "scratch_phys", "scratch_len")
    return {
        "schema": "luo-boot/1",
        "kho_abi": image.abi,
        "page_size": image.page_size,
        "handover": dict(zip(names, image.handover.numbers, strict=True)),
        "memory": [list(entry) for entry in image.ram.ranges],
        "segments": [part(segment) for segment in boot.segments],
        "kernel": part(boot.kernel),
        "initrd": part(boot.initrd),
        "device_tree": part(boot.tree),
        "cmdline": cmdline,
        "qemu": None if boot.arguments is None else [QEMU, *boot.arguments],
    }
