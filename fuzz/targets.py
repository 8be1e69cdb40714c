"""What is fuzzed: readers of bytes that came from outside. ``make fuzz SECONDS=60``.

Each target is a function of bytes that returns, or raises what is a finding. Seeds are made by luo
itself at each start. ``python fuzz/targets.py NAME --replay FILE`` runs one input again.
"""

import contextlib
import fcntl
import importlib.util
import logging
import os
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import engine

from luo.abi import GENERATIONS
from luo.device import Bus, Driver, LiveUpdateOps
from luo.errors import FdtError, HandoverError, KernelPanic
from luo.fdt import Fdt, FdtEditor, FdtWriter
from luo.kernel import Kernel
from luo.kho import Handover, Incoming, Kho
from luo.machine import DeviceTree, Machine
from luo.memory import PhysicalMemory

PAGE = 4096
MIB = 1 << 20


def expect(condition: bool, what: str) -> None:
    """An assertion that -O does not take away."""
    if not condition:
        raise AssertionError(what)


# ---- flattened trees ----


def tree_seeds() -> list[bytes]:
    """Trees of some shapes: empty, KHO's root, values of all kinds, deep, many children."""
    seeds = []

    def tree(fill: Callable[[FdtWriter], object], **arguments: Any) -> None:
        writer = FdtWriter(**arguments)
        with writer.node(""):
            fill(writer)
        seeds.append(bytes(writer.finish()))

    def root(writer: FdtWriter) -> None:
        writer.property_string("compatible", "kho-v4")
        writer.property_native_u64("preserved-memory-map", 0x123456000)
        for name in ("memblock", "kexec-metadata"):
            writer.add_node(name, {"preserved-data": bytes(8), "blob-size": b"I" + bytes(7)})

    def board(writer: FdtWriter) -> None:
        writer.property_cells("#address-cells", [2])
        writer.property_strings("compatible", ["acme,board", "acme,soc"])
        with writer.node("memory@40000000"):
            writer.property("reg", struct.pack(">4I", 0, 0x40000000, 0, 0x10000000))
        with writer.node("soc"):
            writer.property("ranges", b"")
            with writer.node("uart@9000000"):
                writer.property("name-with-tail", b"\1\2\3")
                writer.property("tail", b"\xff")

    def deep(writer: FdtWriter) -> None:
        for level in range(40):
            writer.begin_node(f"n{level}")
        for _ in range(40):
            writer.end_node()

    def wide(writer: FdtWriter) -> None:
        n = 30
        values = {"path": [b"%d\0" % i for i in range(n)], "index": np.arange(n, dtype=np.uint64)}
        writer.add_nodes(("dev", 0, n), values)

    tree(lambda writer: None)
    tree(root)
    tree(board, reserve_map=[(0x1000, 0x2000), (0x80000000, 16)])
    tree(deep)
    tree(wide)
    old = bytearray(seeds[2])  # version 16: the word behind the header is not its own
    old[20:24] = struct.pack(">I", 16)
    seeds.append(bytes(old))
    return seeds


def fdt(data: bytes) -> None:
    """Every way to read *data* as a tree gives FdtError or an answer; editing keeps it a tree."""
    for check in (True, False):
        try:
            read_tree(Fdt(data, check=check), check)
        except FdtError:
            continue
    with contextlib.suppress(FdtError):
        edit_tree(data)


def read_tree(tree: Fdt, checked: bool) -> None:
    """Call every reader."""
    try:
        nodes = list(tree.walk())
    except FdtError:
        expect(not checked, "walk of a checked tree fails")
        nodes = []
    expect(not checked or bool(nodes), "a checked tree has a root")
    calls: list[Callable[[], object]] = [
        tree.to_dts,
        lambda: tree.reserve_map,
        lambda: tree.read_nodes("/"),
        lambda: tree.read_nodes("/", ["path", "index", "reg", "compatible"]),
        lambda: "/soc/uart" in tree,
        lambda: tree.node("/soc/uart@9000000"),
    ]
    for depth, node in nodes[:: max(1, len(nodes) // 16)]:
        calls += [
            lambda node=node: node.properties,
            lambda node=node: node.children,
            lambda node=node: node.get("reg"),
            lambda node=node: tree.node(node.path) and tree.read_nodes(node.path),
        ]
        parent = node.parent
        expect((parent is None) == (depth == 0), "only the root has no parent")
    for call in calls:
        try:
            call()
        except FdtError as error:
            allowed = ("FDT_ERR_NOTFOUND", "FDT_ERR_NOSPACE")
            expect(not checked or error.code in allowed, f"a checked tree raises {error}")


def edit_tree(data: bytes) -> None:
    """Edit a copy; whatever the editor accepts and leaves must be a tree."""
    room = bytearray(data.ljust(len(data) + 512, b"\0"))
    editor = FdtEditor(room)
    steps: list[Callable[[], object]] = [
        lambda: editor.add_node("/", "fuzz"),
        lambda: editor.set_property("/fuzz", "preserved-data", bytes(8)),
        lambda: editor.set_property("/", "compatible", b"kho-v4\0"),
        lambda: editor.set_property("/soc", "ranges", b"1234567"),
        lambda: editor.del_property("/", "compatible"),
        lambda: editor.del_node("/soc"),
        lambda: editor.del_node("/fuzz"),
    ]
    for step in steps:
        try:
            step()
        except FdtError:
            continue
    editor.pack()
    Fdt(room)


# ---- memory that a kernel left ----

RANGES = [(0x40000000, 32 * MIB, 0), (0x80000000, 32 * MIB, 1)]
SCRATCH = [(0x40800000, 4 * MIB), (0, 0), (0x80800000, 4 * MIB)]
RECORD = struct.Struct("<IHH")


def pack(memory: PhysicalMemory, handover: Handover) -> bytes:
    """The handover and what is written in memory, as an input: runs of bytes by page."""
    out = [struct.pack("<4Q", *handover.numbers)]
    at = 0
    while True:
        try:
            at = os.lseek(memory.fd, at, os.SEEK_DATA)
        except OSError:
            return b"".join(out)
        page = os.pread(memory.fd, PAGE, at)
        start = 0
        while start < PAGE:
            if not page[start]:
                start += 1
                continue
            end = page.find(bytes(16), start)
            run = page[start : end if end >= 0 else PAGE]
            if page.count(page[start], start) == PAGE - start:  # one byte over and over
                run = page[start : start + 64]
            out.append(RECORD.pack(at // PAGE, start, len(run)) + run)
            start += len(run) + 16
        at += PAGE


def unpack(data: bytes) -> tuple[PhysicalMemory, Handover]:
    """The memory and handover that *data* stands for; any bytes do."""
    memory = PhysicalMemory(ranges=RANGES)
    numbers = struct.unpack_from("<4Q", data.ljust(32, b"\0"))
    at = 32
    while at + RECORD.size <= len(data):
        page, start, length = RECORD.unpack_from(data, at)
        at += RECORD.size
        run = data[at : at + min(length, PAGE)]
        at += len(run)
        where = page * PAGE + start % PAGE
        if where + len(run) <= memory.size and any(
            s <= memory.base + where < s + n for s, n, _ in RANGES
        ):
            os.pwrite(memory.fd, run, where)
    return memory, Handover(*numbers)


def handover_seeds() -> list[bytes]:
    """A kernel with nothing, one with blobs and blocks of several orders, one without scratch."""
    seeds = []
    for scratch in (SCRATCH, []):
        memory = PhysicalMemory(ranges=RANGES)
        kho = Kho(memory, scratch=scratch)
        seeds.append(pack(memory, kho.handover()))
        kho.save_subtree("blob", b"content" * 20)
        kho.save_subtree("blocks", struct.pack("<Q", kho.write_blocks(bytes(range(200)) * 40, 16)))
        for order in (0, 3, 9, 10):
            kho.preserve_folio(memory.alloc_folio(order), order)
        kho.preserve_pages(memory.alloc_pages(21), 21)
        kho.save_subtree("area", kho.preserve_vmalloc(memory.alloc_folios(9, 0)))
        kho.save_subtree("huge", kho.preserve_vmalloc(memory.alloc_folios(3, 2), 2))
        seeds.append(pack(memory, kho.handover()))
    return seeds


def handover(data: bytes) -> None:
    """Validate, boot, read and restore all of it: HandoverError, FdtError, or all of it works."""
    restore(*unpack(data), "kho-v4")


def restore(memory: PhysicalMemory, numbers: Handover, abi: str) -> None:
    """Validate, boot, read and restore what was handed over in one generation."""
    incoming = validate(memory, numbers, abi)
    if incoming is None:
        return
    kho = Kho.boot(memory, incoming)
    for name in incoming.subtrees():
        blob = incoming.load_subtree(name)
        heads = [incoming.subtrees()[name][0]]
        if len(blob) >= 8:
            heads += struct.unpack_from("<Q", blob)
        if len(blob) >= 16 and incoming.generation.vmalloc:
            with contextlib.suppress(HandoverError):
                incoming.restore_vmalloc(bytes(blob[:16]))
        for head in heads:
            for size in (1, 16, 80):
                try:
                    incoming.read_blocks(head, size)
                except HandoverError:
                    continue
    phys, orders = incoming.unrestored()
    expect(len(phys) == incoming.nr_unrestored, "as many blocks as are counted")
    half = len(phys) // 2
    restored = incoming.restore_folios(phys[:half])
    expect(restored.tolist() == orders[:half].tolist(), "orders are what they were")
    for at in phys[half : half + 200].tolist():
        incoming.restore_free(at)
    if half:
        kho.preserve_folios(phys[:half], orders[:half])
        memory.alloc_folio(0)
    kho.close()


def validate(memory: PhysicalMemory, numbers: Handover, abi: str) -> Incoming | None:
    """Kho.validate(), which must not fill a hole of the memory's file."""
    before = os.fstat(memory.fd).st_blocks
    try:
        return Kho.validate(memory, numbers, abi=abi)
    except (HandoverError, FdtError):
        return None
    finally:
        expect(before == os.fstat(memory.fd).st_blocks, "validate fills a hole")


# ---- the orchestrator's own: version, records, slots ----

CMDLINE = "kho=on liveupdate=on kho_scratch=4M,4M,4M"


def machine(memory: PhysicalMemory) -> Machine:
    """A machine with a bridge and three devices."""
    tree = DeviceTree()
    tree.add("pci0")
    for name, driver in (("port", "portdrv"), ("nic", "nic"), ("disk", "nvme")):
        tree.add(name, "pci0", "pci", driver)
    return Machine(memory, tree)


def kernel(host: Machine, abi: str = "kho-v4") -> Kernel:
    """A kernel that preserves them all."""

    def ops(size: int) -> LiveUpdateOps:
        return LiveUpdateOps(
            state_size=size,
            prepare=lambda device: None,
            restore=lambda device: device.reclaim(),
            finish=lambda device: None,
            cancel=lambda device: None,
        )

    drivers = [Driver(name, ops(size)) for name, size in (("portdrv", 0), ("nic", 24), ("nvme", 8))]
    return Kernel(host, drivers=drivers, buses=[Bus("pci", ops(8))], cmdline=CMDLINE, kho_abi=abi)


def records_seeds() -> list[bytes]:
    """What such a kernel hands over."""
    return [left_by_kernel("kho-v4")]


def left_by_kernel(abi: str) -> bytes:
    """What it hands over in one generation."""
    memory = PhysicalMemory(ranges=RANGES)
    old = kernel(machine(memory), abi).boot()
    for device in old.devices:
        device.requested = True
    old.luo.prepare()
    old.luo.reboot()
    seed = pack(memory, old.kho.handover())
    old.close()
    return seed


def records(data: bytes) -> None:
    """A kernel refuses, panics for a wrong version, or comes up and can finish."""
    boot(*unpack(data), "kho-v4")


def boot(memory: PhysicalMemory, numbers: Handover, abi: str) -> None:
    """Boot a kernel of one generation on a handover."""
    new = kernel(machine(memory), abi)
    before = os.fstat(memory.fd).st_blocks
    try:
        plan = new.validate(numbers)
    except (HandoverError, FdtError, KernelPanic):
        return
    finally:
        expect(before == os.fstat(memory.fd).st_blocks, "validate fills a hole")
    new.take_over(plan, verify=True)
    if new.luo.state.name == "UPDATED":
        new.luo.finish()
    new.close()


def generations_seeds() -> list[bytes]:
    """The same from each generation but the newest; the first byte says which, and how to read."""
    names = list(GENERATIONS)[:-1]
    return [bytes([i]) + left_by_kernel(name) for i, name in enumerate(names)] + [
        bytes([128 + i]) + left_by_kernel(name) for i, name in enumerate(names)
    ]


def generations(data: bytes) -> None:
    """As handover and records, in the generations before the newest."""
    which = (data or b"\0")[0]
    name = list(GENERATIONS)[which % 128 % len(GENERATIONS)]
    (boot if which < 128 else restore)(*unpack(data[1:]), name)


# ---- device table ----


def devices_seeds() -> list[bytes]:
    """A table of some devices, as the next kernel gets it."""
    tree = DeviceTree()
    tree.add("root")
    tree.add("a", 0, "pci", "nic", state=b"state of a")
    tree.add("b", "root/a", "virtio", None, node=1, state=b"")
    seeds = []
    for _ in range(2):
        fd = tree.to_memfd()
        seeds.append(os.pread(fd, engine.LIMIT, 0))
        os.close(fd)
        first = len(tree)
        rows = [b"x" * i for i in range(20)]
        tree.add_many(("dev", first, 20), [1] * 20, "pci", "nic", state=rows)
    return seeds


def devices(data: bytes) -> None:
    """HandoverError, or a table whose every query answers."""
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
        try:
            tree = DeviceTree.from_memfd(fd)
            tree.index()
        except HandoverError:
            return
    finally:
        os.close(fd)
    alive = list(tree)
    paths = tree.paths(np.array(alive, np.int32))
    found = tree.find_paths(*paths)
    expect(found.tolist() == alive, "each device is found by its path")
    requested = np.zeros(len(tree.alive), np.uint8)
    requested[alive[:5]] = 1
    tree.preserve_order(requested)
    tree.match("*a*")
    for name in tree.column_names:
        tree.sizes(name, np.array(alive, np.int32))
        tree.column(name)
    os.close(tree.to_memfd())


# ---- images ----


def image_seeds() -> list[bytes]:
    """The handovers above, each behind the number of its generation."""
    seeds = [bytes([list(GENERATIONS).index("kho-v4")]) + seed for seed in handover_seeds()]
    return seeds + [bytes([i]) + seeds[1][1:] for i in range(len(GENERATIONS))]


def image(data: bytes) -> None:
    """A broken handover becomes an image whose every violation is listed, and nothing raises."""
    from luo.image import Image
    from luo.image.document import describe

    memory, numbers = unpack(data[1:])
    names = list(GENERATIONS)
    name = names[(data or b"\0")[0] % len(names)]
    found = Image.from_memory(memory, numbers, abi=name)
    violations = found.verify()
    describe(found)
    before = os.fstat(memory.fd).st_blocks
    try:
        Kho.validate(memory, numbers, abi=name)
    except (HandoverError, FdtError):
        expect(bool(violations), "verify finds nothing in what validate refuses")
    expect(before == os.fstat(memory.fd).st_blocks, "a hole was filled")


def imagefile_seeds() -> list[bytes]:
    """Head and tables of image files."""
    from luo.image import Image

    seeds = []
    for seed in handover_seeds()[:2]:
        memory, numbers = unpack(seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "image")
            Image.from_memory(memory, numbers).save(path)
            seeds.append(path.read_bytes()[:4096].rstrip(b"\0"))
    return seeds


def imagefile(data: bytes) -> None:
    """A file with any head and tables, the check sum right: HandoverError, or an image."""
    from luo.image import Image
    from luo.image.document import describe

    file = bytearray(data[:4096].ljust(128 << 10, b"\0"))
    ranges, extents = struct.unpack_from("<2Q", file, 88)
    tables = memoryview(file)[128 : 128 + min(24 * (ranges + extents), len(file))]
    struct.pack_into("<I", file, 12, 0)
    struct.pack_into("<I", file, 12, zlib.crc32(tables, zlib.crc32(file[:128])))
    try:
        found = Image.from_bytes(file)
    except HandoverError:
        return
    found.verify()
    describe(found)


TARGETS = {
    "fdt": (fdt, tree_seeds),
    "handover": (handover, handover_seeds),
    "records": (records, records_seeds),
    "generations": (generations, generations_seeds),
    "devices": (devices, devices_seeds),
}
if importlib.util.find_spec("luo.image") is not None:
    TARGETS |= {"image": (image, image_seeds), "imagefile": (imagefile, imagefile_seeds)}

if __name__ == "__main__":
    logging.disable()  # a line for each run is too much
    sys.exit(engine.main(__file__, TARGETS, Path(__file__).parent / "found"))
