"""Handovers that somebody broke: luo refuses them, or reads what the walker reads.

Bytes from the previous kernel are hostile. Whatever stands in the tree, the root tree or the
scratch array, validating raises HandoverError or FdtError, or accepts what the rules allow; it
ends soon, and fills no hole of the memory's file.
"""

import itertools
import os
import struct
import time

import kho_walker
import model
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kho_builder import Builder, flatten

from luo.errors import FdtError, HandoverError
from luo.kho import Handover, Incoming, Kho
from luo.memory import PhysicalMemory

PAGE = 4096
MIB = 1 << 20
RANGES = [(0x40000000, 256 * MIB, 0), (0x100000000, 256 * MIB, 1)]
SCRATCH = [(0x44000000, 16 * MIB), (0x100400000, 16 * MIB)]
START = 0x40100000  # pages of the handover
BOUND = 5.0  # seconds for one validation, far above what any of these takes


def right(abi: str = "kho-v4") -> tuple[Builder, Handover]:
    """A handover that breaks no rule."""
    builder = Builder(START, abi=abi)
    builder.preserve(0x100000000, 9)
    builder.preserve(0x40800000, 0)
    builder.preserve(0x40801000, 0)
    builder.preserve(0x48000000, 13)
    builder.finish({"part": (builder.blob(b"content"), 7), "more": (builder.blob(b"m"), 1)})
    length = builder.scratch(SCRATCH[0][0], SCRATCH)
    return builder, Handover(builder.fdt, PAGE, SCRATCH[0][0], length)


def filled(pages: dict[int, bytearray]) -> PhysicalMemory:
    """A machine whose memory holds *pages* and is otherwise a hole."""
    memory = PhysicalMemory(ranges=RANGES)
    for phys, page in pages.items():
        os.pwrite(memory.fd, page, memory.offset + phys - memory.base)
    return memory


def validate(memory: PhysicalMemory, handover: Handover, abi: str = "kho-v4") -> Incoming | None:
    """What luo says; None if it refuses in one of the two allowed ways."""
    before, start = os.fstat(memory.fd).st_blocks, time.monotonic()
    try:
        return Kho.validate(memory, handover, abi=abi)
    except (HandoverError, FdtError):
        return None
    finally:
        assert time.monotonic() - start < BOUND
        assert before == os.fstat(memory.fd).st_blocks


def walk(memory: PhysicalMemory, handover: Handover, abi: str = "kho-v4") -> kho_walker.Image:
    """What the walker says, all its rules checked."""

    def read(phys: int, nbytes: int) -> bytes:
        if not any(s <= phys and phys + nbytes <= s + n for s, n, _ in RANGES):
            raise kho_walker.Broken("read outside RAM", phys)
        return os.pread(memory.fd, nbytes, memory.offset + phys - memory.base)

    image = kho_walker.read_handover(read, *handover.numbers, abi=abi)
    kho_walker.check_image(image, [(start, nbytes) for start, nbytes, _ in RANGES])
    return image


def agree(memory: PhysicalMemory, handover: Handover, abi: str = "kho-v4") -> bool:
    """Whether luo accepts; then the walker must, and read the same, and booting must work."""
    incoming = validate(memory, handover, abi)
    if incoming is None:
        with pytest.raises((HandoverError, FdtError)):
            Kho.boot(memory, handover, abi=abi)
        return False
    image = walk(memory, handover, abi)

    assert len(image.preserved) == incoming.nr_preserved
    assert len(image.nodes) == incoming.tree_pages
    kho = Kho.boot(memory, handover, abi=abi)
    for phys, order in image.preserved[:64]:
        if kho.generation.restore_order_cap and order > memory.max_order:
            continue
        assert order == kho.incoming.restore_folio(phys)
    return True


def test_validate_of_the_right_handover_accepts():
    """The handover that the other tests break is right."""
    builder, handover = right()

    assert agree(filled(builder.pages), handover)


BUILDER, HANDOVER = right()
TARGETS = sorted(BUILDER.pages)
INTERESTING = [
    *(0, 1, 8, PAGE, PAGE - 1, (1 << 64) - 1, 1 << 63, (1 << 64) - PAGE, 1 << 52, 1 << 53),
    *(0x40000000, 0x4FFFF000, 0x50000000, 0x60000000, 0xFFFFF000, 0x10FFFF000, 0x110000000),
    *(SCRATCH[0][0], SCRATCH[0][0] + PAGE, 0x40200000, 0x40800000, 0x48000000, *TARGETS),
    *(START + 1, START + 8, BUILDER.root, BUILDER.fdt),
]

words = st.sampled_from(INTERESTING) | st.integers(0, (1 << 64) - 1)
bits = st.integers(0, 63).map(lambda bit: ("flip", 1 << bit))
changes = st.tuples(
    st.sampled_from(TARGETS),
    st.integers(0, 511) | st.integers(0, 47),
    bits | st.tuples(st.just("set"), words),
)


@given(edits=st.lists(changes, min_size=1, max_size=4))
def test_validate_of_changed_words_refuses_or_agrees_with_the_walker(edits):
    """Any words of the tree, the root tree, the blobs and the scratch array, set or flipped."""
    builder, handover = right()
    for phys, index, (action, value) in edits:
        (old,) = struct.unpack_from("<Q", builder.pages[phys], 8 * index)
        new = old ^ value if action == "flip" else value
        struct.pack_into("<Q", builder.pages[phys], 8 * index, new)
    agree(filled(builder.pages), handover)


@given(
    st.sampled_from(TARGETS),
    st.lists(st.tuples(st.integers(0, 511), st.sampled_from(TARGETS)), min_size=1, max_size=40),
)
def test_validate_of_rewired_nodes_refuses_or_agrees_with_the_walker(node, slots):
    """Slots that lead to other pages of the handover: cycles, shared nodes, blobs as nodes."""
    builder, handover = right()
    for index, target in slots:
        struct.pack_into("<Q", builder.pages[node], 8 * index, target)
    agree(filled(builder.pages), handover)


@given(st.integers(0, 511), st.binary(min_size=1, max_size=64))
def test_validate_of_a_changed_root_tree_refuses_or_agrees_with_the_walker(offset, data):
    """Any bytes anywhere in the root tree."""
    builder, handover = right()
    builder.pages[builder.fdt][offset : offset + len(data)] = data
    agree(filled(builder.pages), handover)


numbers = st.sampled_from([*INTERESTING, 16, 15, 48, 32, 0x1000, 0x200000]) | st.integers(
    0, (1 << 64) - 1
)


@given(which=st.integers(0, 3), value=numbers)
@example(which=3, value=(1 << 64) - 16)
@example(which=1, value=(1 << 64) - 1)
@example(which=2, value=(1 << 64) - 16)
def test_validate_of_a_changed_number_refuses_or_agrees_with_the_walker(which, value):
    """Each of the handover's four numbers can be anything."""
    builder, handover = right()
    four = [handover.fdt_phys, handover.fdt_len, handover.scratch_phys, handover.scratch_len]
    four[which] = value
    agree(filled(builder.pages), Handover(*four))


@given(areas=st.lists(st.tuples(numbers, numbers), max_size=6))
@example(areas=[(0, (1 << 64) - 1)])
@example(areas=[((1 << 64) - PAGE, 2 * PAGE)])
@example(areas=[(0x44000000, 16 * MIB)] * 6)
def test_validate_of_any_scratch_array_refuses_or_agrees_with_the_walker(areas):
    """Areas that wrap round, overlap one another or the tree, or lie outside RAM."""
    builder, handover = right()
    length = builder.scratch(SCRATCH[0][0], areas)
    changed = Handover(handover.fdt_phys, PAGE, handover.scratch_phys, length)
    agree(filled(builder.pages), changed)


@given(st.sampled_from(TARGETS), st.integers(0, PAGE))
def test_validate_of_a_cut_page_refuses_or_agrees_with_the_walker(phys, length):
    """A page whose end was lost."""
    builder, handover = right()
    builder.pages[phys][length:] = bytes(PAGE - length)
    agree(filled(builder.pages), handover)


# ---- lists of chunks ----


@pytest.mark.parametrize("name", model.CHUNKS)
def test_validate_of_the_right_list_accepts(name):
    """What the builder writes for an older generation is right."""
    builder, handover = right(name)

    assert agree(filled(builder.pages), handover, name)


@given(
    name=st.sampled_from(model.CHUNKS),
    edits=st.lists(
        st.tuples(
            st.integers(0, 63),
            st.integers(0, 511) | st.integers(0, 9),
            bits | st.tuples(st.just("set"), words) | st.tuples(st.just("page"), words),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_validate_of_a_changed_list_refuses_or_agrees_with_the_walker(name, edits):
    """Any words of chunks, bitmaps, the root tree and the scratch array, set or flipped."""
    builder, handover = right(name)
    targets = sorted(builder.pages)
    for place, index, (action, value) in edits:
        phys = targets[place % len(targets)]
        (old,) = struct.unpack_from("<Q", builder.pages[phys], 8 * index)
        new = old ^ value if action == "flip" else value
        if action == "page":  # somewhere in the handover: cycles, shared bitmaps, chunks as bitmaps
            new = targets[value % len(targets)] + (value >> 32 & 0xE00)
        struct.pack_into("<Q", builder.pages[phys], 8 * index, new)
    agree(filled(builder.pages), handover, name)


@pytest.mark.parametrize("name", model.CHUNKS)
def test_validate_of_a_list_that_claims_everything_is_refused_soon(name):
    """Every page a full chunk of the same bitmaps: a small image cannot cost a lot of time."""
    builder, handover = right(name)
    chunks = [builder.page() for _ in range(500)]
    bitmap = builder.page()
    builder.pages[bitmap][:] = b"\xff" * PAGE
    for phys, after in zip(chunks, [*chunks[1:], 0], strict=True):
        entries = struct.pack("<QQ", 0, bitmap) * 255
        builder.pages[phys][:] = struct.pack("<QII", after, 0, 255) + entries
    struct.pack_into("<Q", builder.pages[builder.root], 0, chunks[0])

    assert validate(filled(builder.pages), handover, name) is None


# ---- known attacks ----


def root_slot(builder: Builder, index: int, value: int) -> None:
    """Overwrite a slot of the radix root."""
    struct.pack_into("<Q", builder.pages[builder.root], 8 * index, value)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(BUILDER.root, id="to-the-root"),
        pytest.param(0x40200000, id="to-a-hole-of-the-file"),
        pytest.param(0x60000000, id="between-ranges"),
        pytest.param(0x110000000, id="behind-ram"),
        pytest.param(0x4FFFF008, id="unaligned-over-the-end"),
        pytest.param((1 << 64) - PAGE, id="top-of-the-address-space"),
        pytest.param(SCRATCH[0][0], id="to-scratch"),
        pytest.param(0x40800000, id="to-a-preserved-hole"),
    ],
)
def test_validate_of_a_wrong_slot_is_refused_with_its_address(value):
    """The error names the address that the slot holds."""
    builder, handover = right()
    root_slot(builder, 2, value)
    memory = filled(builder.pages)

    with pytest.raises(HandoverError) as error:
        Kho.validate(memory, handover)

    assert value == error.value.phys
    assert validate(memory, handover) is None


def test_validate_of_a_slot_to_the_root_tree_is_refused():
    """What stands there, read as a node, leads out of memory."""
    builder, handover = right()
    root_slot(builder, 2, builder.fdt)

    assert validate(filled(builder.pages), handover) is None


def test_validate_of_a_tree_of_shared_nodes_ends_soon():
    """Six nodes whose slots all lead to the next one stand for 2^60 keys; they are refused."""
    builder, _ = right()
    chain = [builder.page() for _ in range(6)]
    for phys, below in itertools.pairwise(chain):
        builder.pages[phys][:] = struct.pack("<Q", below) * 512
    builder.pages[chain[0]][24:] = bytes(PAGE - 24)  # only the slots that legal keys use
    builder.pages[chain[-1]][:] = b"\xff" * PAGE
    builder.root = chain[0]
    builder.finish({})
    handover = Handover(builder.fdt, PAGE, SCRATCH[0][0], 32)

    assert validate(filled(builder.pages), handover) is None


@pytest.mark.parametrize("order", [*range(14, 52, 3), 51])
def test_validate_of_a_block_larger_than_ram_is_refused(order):
    """One bit of a leaf can claim an exabyte; nothing of that size is allocated or walked."""
    builder, handover = right()
    builder.preserve(0, order)
    memory = filled(builder.pages)

    assert validate(memory, handover) is None


def test_validate_of_a_full_leaf_is_refused_soon():
    """A leaf of ones at order 13 claims a terabyte."""
    builder, handover = right()
    leaf = next(node for node in nodes_of(builder) if node.level == 0)  # of the largest order
    builder.pages[leaf.phys][:] = b"\xff" * PAGE

    assert validate(filled(builder.pages), handover) is None


def nodes_of(builder: Builder) -> list[kho_walker.TreeNode]:
    """Node pages of what was built."""
    nodes: list[kho_walker.TreeNode] = []
    pages = builder.pages
    list(kho_walker.walk_keys(lambda at, n: bytes(pages[at][:n]), builder.root, 12, nodes))
    return nodes


@pytest.mark.parametrize("index", [*range(3, 512, 51), 511, 8, 16])
def test_validate_of_a_key_without_marker_is_refused(index):
    """Root slots from 3 on would be keys of more than 53 bits."""
    builder, handover = right()
    leaf = builder.page()
    builder.pages[leaf][0] = 1
    for _ in range(4):
        above = builder.page()
        struct.pack_into("<Q", builder.pages[above], 0, leaf)
        leaf = above
    root_slot(builder, index, leaf)

    assert validate(filled(builder.pages), handover) is None


@pytest.mark.parametrize("key", [0, 1])
def test_validate_of_the_keys_0_and_1_is_refused(key):
    """They have no marker, or one that no order has."""
    builder, handover = right()
    builder.add_key(key)

    assert validate(filled(builder.pages), handover) is None


@pytest.mark.parametrize(
    "children",
    [
        {"part": {}},
        {"part": {"preserved-data": bytes(8)}},
        {"part": {"preserved-data": bytes(7), "blob-size": bytes(8)}},
        {"part": {"preserved-data": struct.pack("<Q", 0x60000000), "blob-size": b"\1" + bytes(7)}},
        {"part": {"preserved-data": struct.pack("<Q", 0x40200000), "blob-size": b"\xff" * 8}},
    ],
)
def test_subtree_with_wrong_properties_is_refused(children):
    """A subtree without address or size, or whose blob is outside RAM, cannot be loaded."""
    builder, handover = right()
    root = {"compatible": b"kho-v4\0", "preserved-memory-map": struct.pack("<Q", builder.root)}
    tree = flatten(root, children)
    builder.pages[builder.fdt][: len(tree)] = tree
    memory = filled(builder.pages)

    with pytest.raises((HandoverError, OSError)):
        Kho.validate(memory, handover).load_subtree("part")


def test_validate_of_metadata_in_a_hole_fills_no_hole():
    """A kexec-metadata blob in a preserved page that was never written is not read."""
    builder, handover = right()
    builder.finish({"kexec-metadata": (0x40800000, 73)})
    incoming = validate(filled(builder.pages), handover)

    assert incoming is None or incoming.metadata is None


def test_validate_of_two_subtrees_with_one_name_is_refused():
    """Linux would take the first and never see the second; nobody writes such a tree."""
    builder, handover = right()
    builder.finish({"part": (builder.blob(b"a"), 1), "pbrt": (builder.blob(b"b"), 1)})
    page = builder.pages[builder.fdt]
    page[:] = page.replace(b"pbrt", b"part")

    assert validate(filled(builder.pages), handover) is None


def test_validate_of_a_subtree_without_name_is_refused():
    """Only the root has an empty name."""
    builder, handover = right()
    builder.finish({"abc": (builder.blob(b"a"), 1)})
    page = builder.pages[builder.fdt]
    page[:] = page.replace(b"abc\0", bytes(4))

    assert validate(filled(builder.pages), handover) is None


def test_validate_of_a_root_tree_over_its_page_is_refused():
    """Only the page at its start is preserved; what stands behind belongs to nobody."""
    builder, handover = right()
    builder.fdt = 0x40900000
    builder.preserve(builder.fdt, 0)
    root = {"compatible": b"kho-v4\0", "preserved-memory-map": struct.pack("<Q", builder.root)}
    tree = flatten({**root, "long": bytes(5000)}, {})
    builder.pages[builder.fdt] = bytearray(tree[:PAGE])
    builder.pages[builder.fdt + PAGE] = bytearray(tree[PAGE:].ljust(PAGE, b"\0"))
    changed = Handover(builder.fdt, 2 * PAGE, handover.scratch_phys, handover.scratch_len)

    assert validate(filled(builder.pages), changed) is None
