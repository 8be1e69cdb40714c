"""luo.image.boot: where everything goes, and what cannot be booted."""

import contextlib
import itertools
import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from kho_builder import Builder

from luo import HandoverError, Kernel, PhysicalMemory
from luo.cli import main
from luo.fdt import Fdt, FdtError
from luo.image import Extent, Image
from luo.image import boot as subject
from luo.image.dump import read_device_tree
from luo.kho import Handover
from luo.machine import Machine

PAGE = 4096
MIB = 1 << 20
RAM = 0x40000000
SCRATCH = (0x50000000, 64 * MIB)


def image_of(
    *,
    ranges: list[tuple[int, int, int]] | None = None,
    scratch: tuple[tuple[int, int], ...] = (SCRATCH,),
    blocks: tuple[tuple[int, int], ...] = (),
    structures: int = 0x58000000,
    abi: str = "kho-v4",
) -> Image:
    """A handover with these blocks preserved, each full of its own number."""
    builder = Builder(structures, abi=abi)
    extents = []
    for number, (phys, order) in enumerate(blocks, 1):
        builder.preserve(phys, order)
        extents.append(Extent(phys, PAGE << order, bytes([number % 255 + 1]) * (PAGE << order)))
    builder.finish({})
    array = scratch[0][0]
    nbytes = builder.scratch(array, scratch)
    extents += [Extent(phys, PAGE, bytes(page)) for phys, page in builder.pages.items()]
    handover = Handover(builder.fdt, PAGE, array, nbytes)
    return Image(ranges or [(RAM, 512 * MIB, 0)], handover, extents, abi=abi)


def kernel_file(place: Path, nbytes: int = 5 * MIB, flags: int = 0xA) -> Path:
    """A file that begins as an arm64 Image."""
    head = struct.pack("<IIQQQQQQ4sI", 0, 0, 0, nbytes, flags, 0, 0, 0, b"ARM\x64", 0)
    (place / "kernel").write_bytes(head + bytes(1000))
    return place / "kernel"


def spans(boot: subject.Boot) -> list[tuple[int, int]]:
    """[start, end) of everything that is in memory when the kernel starts."""
    parts = [*boot.segments, boot.kernel, boot.tree]
    parts += [boot.initrd] if boot.initrd is not None else []
    return sorted((part.phys, part.phys + part.nbytes) for part in parts)


def loaded(boot: subject.Boot) -> dict[int, bytes]:
    """Pages of the handover as they are when the kernel starts: the firmware carried out."""
    pages: dict[int, bytes] = {}

    def put(phys: int, data: bytes) -> None:
        for at in range(0, len(data), PAGE):
            pages[phys + at] = data[at : at + PAGE]

    for segment in boot.segments:
        if segment.file is not None and segment.file.startswith("memory/"):
            put(segment.phys, (boot.directory / segment.file).read_bytes())
    flash = (boot.directory / "firmware.bin").read_bytes()
    at = 64
    while True:
        to, nbytes, source = struct.unpack_from("<QQQ", flash, at)
        if not nbytes:
            break
        put(to, flash[source : source + nbytes])
        at += 24
    assert struct.unpack_from("<QQ", flash, at + 16) == (boot.tree.phys, boot.kernel.phys)
    return pages


# ---- what is written ----


def test_write_puts_every_page_where_it_was(tmp_path: Path) -> None:
    """Segments and firmware together hold exactly the image's pages, with their contents."""
    image = image_of(blocks=((0x58400000, 9), (0x40200000, 0), (RAM, 1), (0x5FFFF000, 0)))
    boot = subject.write(image, tmp_path, kernel=kernel_file(tmp_path))
    got = loaded(boot)
    want = {
        extent.phys + at: bytes(extent.data[at : at + PAGE])
        for extent in image.extents
        if extent.data is not None
        for at in range(0, extent.nbytes, PAGE)
    }

    assert got == want


def test_write_leaves_the_begin_of_ram_to_the_firmware(tmp_path: Path) -> None:
    """QEMU writes its own device tree there, so nothing may be loaded below 2 MiB."""
    image = image_of(blocks=((RAM, 1), (RAM + 2 * MIB - PAGE, 0), (RAM + 2 * MIB, 0)))
    boot = subject.write(image, tmp_path, kernel=kernel_file(tmp_path))
    by_loader = [s.phys for s in boot.segments if s.file != "firmware.bin"]

    assert min(by_loader) == RAM + 2 * MIB
    assert sorted(s.phys for s in boot.segments if s.file == "firmware.bin") == [
        RAM,
        RAM + 2 * MIB - PAGE,
    ]
    assert boot.arguments is not None
    assert all(f"addr={phys:#x}" in " ".join(boot.arguments) for phys in by_loader)


def test_write_places_kernel_initrd_and_tree_in_scratch(tmp_path: Path) -> None:
    """As kexec does, if scratch has room for them and for what the kernel needs early."""
    initrd = tmp_path / "ramdisk"
    initrd.write_bytes(bytes(MIB))
    boot = subject.write(image_of(), tmp_path / "out", kernel=kernel_file(tmp_path), initrd=initrd)
    start, size = SCRATCH
    parts = [part for part in (boot.kernel, boot.initrd, boot.tree) if part is not None]

    assert len(parts) == 3
    assert all(part.in_scratch for part in parts)
    assert all(start < part.phys and part.phys + part.nbytes <= start + size for part in parts)
    assert boot.kernel.phys % (2 * MIB) == 0


def test_write_leaves_small_scratch_to_the_kernel(tmp_path: Path) -> None:
    """12 MiB are just what a kernel with 512 MiB needs: nothing else may lie there."""
    image = image_of(scratch=((0x50000000, 12 * MIB),))
    boot = subject.write(image, tmp_path, kernel=kernel_file(tmp_path))

    assert not boot.kernel.in_scratch
    assert not boot.tree.in_scratch


@settings(max_examples=25)
@given(data=st.data())
def test_nothing_overlaps_whatever_is_preserved(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Blocks anywhere: kernel, initramfs and tree find places beside all of them."""
    place = tmp_path_factory.mktemp("boot")
    taken: list[tuple[int, int]] = [(SCRATCH[0], sum(SCRATCH)), (0x58000000, 0x58400000)]
    blocks = []
    for _ in range(data.draw(st.integers(0, 30))):
        order = data.draw(st.integers(0, 6))
        nbytes = PAGE << order
        phys = RAM + data.draw(st.integers(0, 512 * MIB // nbytes - 1)) * nbytes
        if all(phys + nbytes <= low or phys >= high for low, high in taken):
            taken.append((phys, phys + nbytes))
            blocks.append((phys, order))
    image = image_of(blocks=tuple(blocks))
    boot = subject.write(image, place / "out", kernel=kernel_file(place))
    ordered = spans(boot)

    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))
    assert sum(len(page) for page in loaded(boot).values()) >= image.nbytes
    shutil.rmtree(place)


def test_write_joins_what_is_scattered(tmp_path: Path) -> None:
    """A thousand single pages are 256 segments at most, with zeros between."""
    blocks = tuple((0x58400000 + 2 * PAGE * n, 0) for n in range(1000))
    boot = subject.write(image_of(blocks=blocks), tmp_path, kernel=kernel_file(tmp_path))
    got = loaded(boot)

    assert len(boot.segments) <= 256
    assert {got[phys][0] for phys, _ in blocks[:200]} == {n % 255 + 1 for n in range(1, 201)}
    assert set(blocks) <= {(phys, 0) for phys in got}


def test_write_again_forgets_old_segments(tmp_path: Path) -> None:
    """A second handover in the same directory leaves nothing of the first."""
    subject.write(image_of(blocks=((0x59000000, 0),)), tmp_path)
    subject.write(image_of(blocks=((0x5A000000, 0),)), tmp_path)

    assert not (tmp_path / "memory/59000000.bin").exists()
    assert (tmp_path / "memory/5a000000.bin").exists()
    assert (tmp_path / "memory").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "firmware.bin").stat().st_mode & 0o777 == 0o600


def test_tree_tells_handover_memory_and_initrd(tmp_path: Path) -> None:
    """What the kernel reads in the device tree is what the image says."""
    ranges = [(RAM, 512 * MIB, 0), (0x100000000, 1024 * MIB, 1)]
    image = image_of(ranges=ranges)
    boot = subject.write(image, tmp_path, tree=subject.virt_tree(), cmdline="a=b c")
    tree = Fdt((tmp_path / "virt.dtb").read_bytes())
    chosen = tree.node("/chosen")
    assert boot.initrd is not None

    assert read_device_tree(tree) == (image.handover, ranges)
    assert bytes(chosen["bootargs"]) == b"a=b c\0"
    assert int.from_bytes(bytes(chosen["linux,initrd-start"]), "big") == boot.initrd.phys


@pytest.mark.skipif(shutil.which(subject.QEMU) is None, reason="no QEMU for arm64")
def test_tree_of_our_own_says_what_qemus_says(tmp_path: Path) -> None:
    """Every property of the tree that we write stands in QEMU's own, with the same value."""
    file = tmp_path / "virt.dtb"
    arguments = subject.machine_arguments(512 * MIB)
    arguments[1] += f",dumpdtb={file}"
    subprocess.run([subject.QEMU, "-display", "none", *arguments], check=True, timeout=60)
    theirs, ours = Fdt(file.read_bytes()), Fdt(subject.virt_tree())
    phandles = {"phandle", "clocks", "interrupt-parent"}
    wrong = [
        f"{node.path} {name}"
        for _, node in ours.walk()
        for name, value in node.properties.items()
        if name not in phandles and bytes(theirs.node(node.path)[name]) != bytes(value)
    ]

    assert wrong == []


def test_documents_agree(tmp_path: Path) -> None:
    """boot.json, the arguments and run.sh say the same."""
    boot = subject.write(
        image_of(blocks=((0x59000000, 3),)), tmp_path, kernel=kernel_file(tmp_path)
    )
    document = json.loads((tmp_path / "boot.json").read_text())
    text = (tmp_path / "run.sh").read_text()

    assert document["schema"] == "luo-boot/1"
    assert document["qemu"] == [subject.QEMU, *boot.arguments]
    assert document["kernel"]["phys"] == boot.kernel.phys
    assert [s["phys"] for s in document["segments"]] == [s.phys for s in boot.segments]
    assert all(f"addr={s.phys:#x}" in text for s in boot.segments)
    assert subprocess.run(["sh", "-n", tmp_path / "run.sh"], check=False).returncode == 0


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-as") is None, reason="no assembler for arm64")
def test_firmware_is_what_its_comments_say(tmp_path: Path) -> None:
    """The sixteen words are what an assembler makes of the comments beside them."""
    source = Path(subject.__file__).read_text()
    rows = source[source.index("_FIRMWARE: Final = (") :].splitlines()[1:17]
    text = "".join(row.split("#", 1)[1].split("  # table")[0].strip() + "\n" for row in rows)
    (tmp_path / "firmware.s").write_text(text + "table:\n")
    commands = (
        ["as", "-o", "firmware.o", "firmware.s"],
        ["objcopy", "-O", "binary", "-j", ".text", "firmware.o", "firmware"],
    )
    for program, *arguments in commands:
        subprocess.run([f"aarch64-linux-gnu-{program}", *arguments], cwd=tmp_path, check=True)
    boot = subject.write(image_of(), tmp_path / "out")

    assert (boot.directory / "firmware.bin").read_bytes()[:64] == (
        tmp_path / "firmware"
    ).read_bytes()


# ---- a machine to begin with ----


def test_virt_machine_boots_a_kernel_that_can_be_booted(tmp_path: Path) -> None:
    """A kernel on it hands over what write() takes, without a word about scratch."""
    kernel = Kernel(subject.virt_machine("256MiB"), arch="arm64", cmdline="kho=on")
    kernel.boot()
    boot = subject.write(kernel, tmp_path, kernel=kernel_file(tmp_path))

    assert kernel.machine.memory.ranges == [(RAM, 256 * MIB, 0)]
    assert subject.check(Image.from_kernel(kernel)) == []
    assert len(boot.segments) > 0


def test_virt_machine_elsewhere_is_refused() -> None:
    """QEMU's machine has no memory below 1 GiB."""
    with pytest.raises(ValueError, match="0x40000000"):
        subject.virt_machine(ranges=[(0, 512 * MIB, 0)])


# ---- what cannot be booted ----


def refusals(image: Image, **how: int) -> list[tuple[int | None, str]]:
    return [(v.phys, v.rule.split(":")[0]) for v in subject.check(image, **how)]


def test_check_takes_a_good_image() -> None:
    """Nothing is wrong with one that a kernel takes."""
    assert refusals(image_of()) == []


def test_check_names_memory_that_the_machine_does_not_have() -> None:
    """Memory from 0 on is an x86 machine's."""
    memory = PhysicalMemory("512MiB")
    kernel = Kernel(Machine(memory), cmdline="kho=on")
    kernel.boot()

    assert refusals(Image.from_kernel(kernel)) == [(0, "memory of 0x20000000 bytes")]


def test_check_names_generation_page_size_and_scratch() -> None:
    """Each with the address where there is one."""
    good = image_of()
    old = Image(good.ram.ranges, good.handover, good.extents, abi="kho-v2")
    bare = Image(good.ram.ranges, Handover(good.handover.fdt_phys, PAGE, 0, 0), good.extents)
    away = Image(
        good.ram.ranges, Handover(good.handover.fdt_phys, PAGE, 0x30000000, 16), good.extents
    )

    assert [rule for _, rule in refusals(old)] == ["kho-v2"]
    assert refusals(good, page_size=65536) == [(None, "pages of 4096 bytes")]
    assert refusals(bare) == [(None, "no scratch array")]
    assert refusals(away)[0] == (0x30000000, "scratch array of 0x10 bytes is not in memory")


def test_check_names_scratch_outside_memory() -> None:
    """An area that is no memory of this machine."""
    image = image_of(scratch=(SCRATCH, (0x80000000, 4 * MIB)))

    assert refusals(image) == [(0x80000000, "scratch area of 0x400000 bytes is not in memory")]


def test_write_refuses_what_check_finds(tmp_path: Path) -> None:
    """With its address, before anything is written."""
    image = image_of(scratch=((0x50000000, 0),))
    with pytest.raises(HandoverError) as caught:
        subject.write(image, tmp_path / "out")

    assert caught.value.phys == 0x50000000
    assert not (tmp_path / "out").exists()


def test_write_refuses_memory_without_room(tmp_path: Path) -> None:
    """Everything preserved, and scratch too small for a kernel too: there is no place."""
    image = image_of(
        ranges=[(RAM, 16 * MIB, 0)],
        scratch=((RAM + 4 * MIB, 4 * MIB),),
        structures=RAM + 2 * MIB,
        blocks=((RAM + 8 * MIB, 11),),
    )
    with pytest.raises(HandoverError, match="no 0x500000 bytes for the kernel"):
        subject.write(image, tmp_path, kernel=kernel_file(tmp_path))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "no arm64 Image"),
        (b"\x1f\x8b" + bytes(100), "no arm64 Image"),
        (struct.pack("<IIQQQQQQ4sI", 0, 0, 0, 9, 1, 0, 0, 0, b"ARM\x64", 0), "big-endian"),
        (struct.pack("<IIQQQQQQ4sI", 0, 0, 1 << 19, 9, 0, 0, 0, 0, b"ARM\x64", 0), "text offset"),
    ],
)
def test_write_refuses_what_is_no_kernel(tmp_path: Path, content: bytes, rule: str) -> None:
    """A compressed or foreign file is named, before anything is written."""
    (tmp_path / "kernel").write_bytes(content)
    with pytest.raises(ValueError, match=rule):
        subject.write(image_of(), tmp_path / "out", kernel=tmp_path / "kernel")


def test_write_refuses_what_is_no_device_tree(tmp_path: Path) -> None:
    """Bytes that are no tree are the caller's mistake."""
    with pytest.raises(ValueError, match="device tree"):
        subject.write(image_of(), tmp_path, tree=b"no tree" * 20)


# ---- the command ----


def test_command_writes_a_directory(tmp_path: Path) -> None:
    """luo image boot IMAGE -o DIR."""
    image_of(blocks=((0x59000000, 0),)).save(tmp_path / "a.khoimg")
    result = CliRunner().invoke(
        main, ["image", "boot", str(tmp_path / "a.khoimg"), "-o", str(tmp_path / "out")]
    )

    assert result.exit_code == 0, result.output
    assert "KERNEL INITRD" in result.output
    assert (tmp_path / "out/run.sh").stat().st_mode & 0o111


def test_command_names_every_refusal(tmp_path: Path) -> None:
    """Exit status 2, and a line for each rule."""
    image_of(abi="kho-v3", scratch=(SCRATCH, (0x80000000, 4 * MIB))).save(tmp_path / "a.khoimg")
    arguments = ["image", "boot", str(tmp_path / "a.khoimg"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)

    assert result.exit_code == 2
    assert "0x80000000: scratch area" in result.output
    assert not (tmp_path / "out").exists()


# ---- hostile bytes ----


@settings(max_examples=60)
@given(data=st.data())
def test_broken_image_is_written_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever stands in the handover's own pages: files, or an error with a rule."""
    image = image_of(blocks=((0x59000000, 2), (0x5A000000, 9)))
    own = [extent for extent in image.extents if extent.nbytes == PAGE]
    broken = {extent.phys: bytearray(extent.data or b"") for extent in own}
    for _ in range(data.draw(st.integers(1, 6))):
        page = broken[data.draw(st.sampled_from(sorted(broken)))]
        at = data.draw(st.integers(0, PAGE // 8 - 1)) * 8
        page[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    extents = [
        Extent(e.phys, e.nbytes, bytes(broken[e.phys]) if e.phys in broken else e.data)
        for e in image.extents
    ]
    place = tmp_path_factory.mktemp("boot")
    with contextlib.suppress(HandoverError):
        boot = subject.write(
            Image(image.ram.ranges, image.handover, extents), place, tree=subject.virt_tree()
        )
        ordered = spans(boot)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))
    shutil.rmtree(place)


@settings(max_examples=60)
@given(data=st.data())
def test_broken_device_tree_is_written_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A tree of the user's that is damaged is an error that says so, or still a tree."""
    tree = bytearray(subject.virt_tree())
    for _ in range(data.draw(st.integers(1, 4))):
        tree[data.draw(st.integers(0, len(tree) - 1))] = data.draw(st.integers(0, 255))
    place = tmp_path_factory.mktemp("boot")
    with contextlib.suppress(ValueError, FdtError):
        subject.write(image_of(), place, tree=bytes(tree))
        Fdt((place / "virt.dtb").read_bytes())
    shutil.rmtree(place)
