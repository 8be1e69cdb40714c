"""The walker itself: it reads what the builder wrote, and refuses what breaks a rule."""

import struct

import kho_walker
import model
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kho_builder import Builder, flatten

PAGE = 4096
MIB = 1 << 20
RAM = [(0x40000000, 256 * MIB), (0x100000000, 256 * MIB)]
SCRATCH = [(0x44000000, 16 * MIB), (0x44000000, 0)]


def read_pages(builder: Builder, phys: int, nbytes: int) -> bytes:
    """Memory of which only the written pages exist."""
    start = phys % (1 << builder.page_shift)
    page = builder.pages.get(phys - start)
    if page is None or start + nbytes > len(page):
        raise kho_walker.Broken("page was not written", phys)
    return bytes(page[start : start + nbytes])


def built(areas=SCRATCH) -> tuple[Builder, int]:
    """A small handover that breaks no rule, and its number of scratch bytes."""
    builder = Builder(0x40100000)
    builder.preserve(0x100000000, 9)
    builder.preserve(0x40800000, 0)
    builder.finish({"part": (builder.blob(b"content"), 7)})
    return builder, builder.scratch(SCRATCH[0][0], areas)


def read(builder: Builder, scratch_bytes: int) -> kho_walker.Image:
    """Read a built handover and check it."""
    image = kho_walker.read_handover(
        lambda phys, nbytes: read_pages(builder, phys, nbytes),
        builder.fdt,
        1 << builder.page_shift,
        SCRATCH[0][0],
        scratch_bytes,
        builder.page_shift,
    )
    kho_walker.check_image(image, RAM)
    return image


block_sets = st.sets(
    st.integers(0, 40).flatmap(
        lambda order: st.tuples(
            st.integers(0, (1 << 52 - order) - 1).map(lambda n: n), st.just(order)
        )
    ),
    max_size=20,
)


@pytest.mark.parametrize("page_shift", [12, 14, 16])
@given(pairs=block_sets)
def test_walk_of_built_blocks_gives_them_in_order(page_shift, pairs):
    """Any set of blocks, on any page size, is read back in walk order with its node pages."""
    limit = 64 - page_shift
    blocks = {
        (n % (1 << limit - order) << page_shift + order, order)
        for n, order in pairs
        if order < limit
    }
    builder = Builder(0x40100000, page_shift)
    for block in blocks:
        builder.preserve(*block)
    nodes: list[kho_walker.TreeNode] = []
    keys = kho_walker.walk_keys(
        lambda phys, nbytes: read_pages(builder, phys, nbytes), builder.root, page_shift, nodes
    )
    found = [kho_walker.decode_key(key, page_shift) for key in keys]

    assert model.walk_order(blocks | {(builder.fdt, 0)}) == found
    assert builder.pages.keys() - {builder.fdt} == {node.phys for node in nodes}


def test_read_handover_of_a_right_one_is_accepted():
    """The handover that the other tests break is right."""
    image = read(*built())

    assert (0x100000000, 9) in image.preserved
    assert [name for name in image.subtrees] == ["part"]
    assert image.scratch == SCRATCH


@pytest.mark.parametrize("phys", [0x40000000, 0x4FFFF000, 0x43FFF000, 0x45000000])
def test_check_image_of_a_block_at_a_border_is_accepted(phys):
    """First and last page of RAM, last before scratch and first after it."""
    builder, nbytes = built()
    builder.preserve(phys, 0)

    assert (phys, 0) in read(builder, nbytes).preserved


def breaks(rule: str, phys: int | None = None):
    """Expect the walker to name *rule* (and where)."""
    return pytest.raises(kho_walker.Broken, match=rule if phys is None else f"{phys:#x}.*{rule}")


@pytest.mark.parametrize(
    ("phys", "order", "rule"),
    [
        (0x50000000, 0, "outside RAM"),
        (0x40000000, 20, "outside RAM"),
        (0x44000000, 0, "in scratch"),
        (0x44FFF000, 0, "in scratch"),
        (0x100000000, 0, "overlap"),
        (0x100100000, 8, "overlap"),
        (0x40800000, 1, "overlap"),
    ],
)
def test_check_image_of_a_misplaced_block_is_refused(phys, order, rule):
    """A block outside RAM, in scratch or over another one is named."""
    builder, nbytes = built()
    builder.preserve(phys, order)

    with breaks(rule):
        read(builder, nbytes)


def test_check_image_of_a_preserved_tree_node_is_refused():
    """A page of the tree must not be preserved."""
    builder, nbytes = built()
    builder.preserve(builder.root, 0)

    with breaks("overlap"):
        read(builder, nbytes)


def test_check_image_of_a_tree_in_scratch_is_refused():
    """A page of the tree must not lie in scratch."""
    builder, _ = built()
    nbytes = builder.scratch(SCRATCH[0][0], [(0x40100000, 4 * MIB)])

    with breaks("in scratch"):
        read(builder, nbytes)


def test_check_image_without_the_root_trees_page_is_refused():
    """The root tree's own page must be preserved at order 0."""
    builder = Builder(0x40100000, fdt=0x40000000)
    builder.pages[builder.fdt] = bytearray(PAGE)
    builder.finish({})
    builder.fdt, old = 0x40002000, builder.fdt
    builder.pages[builder.fdt] = builder.pages[old]

    with breaks("not preserved", builder.fdt):
        read(builder, builder.scratch(SCRATCH[0][0], SCRATCH))


@pytest.mark.parametrize(("phys", "nbytes"), [(0x40900000, 8), (0x40800000, PAGE + 1)])
def test_check_image_of_an_unpreserved_blob_is_refused(phys, nbytes):
    """Every byte of a subtree's blob must be preserved."""
    builder, size = built()
    builder.finish({"part": (phys, nbytes)})

    with breaks("part"):
        read(builder, size)


@pytest.mark.parametrize("value", [0x40100001, 0x40100000, 0x60000000])
def test_walk_of_a_wrong_slot_is_refused(value):
    """A slot that is no page, turns back to the root, or leads out of memory."""
    builder, nbytes = built()
    struct.pack_into("<Q", builder.pages[builder.root], 8 * 511, value)

    with breaks(".", value):
        read(builder, nbytes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"kho-v4\0", b"kho-v3\0"),
        (b"kho-v4\0", b"kho-v44"),
        (b"blob-size\0", b"blob-sise\0"),
        (b"preserved-data\0", b"preserved-dada\0"),
        (b"preserved-memory-map\0", b"preserved-memory-mop\0"),
        (struct.pack(">I", 9), struct.pack(">I", 4)),
        (struct.pack(">II", 3, 8), struct.pack(">II", 3, 7)),
        (struct.pack(">II", 3, 8), struct.pack(">II", 3, 4000)),
        (b"\xd0\x0d\xfe\xed", b"\xd0\x0d\xfe\xee"),
    ],
)
def test_read_root_of_a_wrong_tree_is_refused(old, new):
    """Another generation, a missing property, a wrong length, a tree without end."""
    builder, nbytes = built()
    page = bytes(builder.pages[builder.fdt])

    assert old in page
    builder.pages[builder.fdt] = bytearray(page.replace(old, new))
    with breaks("."):
        read(builder, nbytes)


def test_parse_fdt_cut_anywhere_is_refused():
    """No prefix of a tree is a tree."""
    tree = flatten({"compatible": b"kho-v4\0"}, {"a": {"b": b"c"}})

    assert kho_walker.parse_fdt(tree).children["a"].properties == {"b": b"c"}
    for length in range(len(tree)):
        with breaks("."):
            kho_walker.parse_fdt(tree[:length])


@pytest.mark.parametrize(
    ("blocks", "rule"),
    [
        ({PAGE: (2 * PAGE, 1), 2 * PAGE: (PAGE, 1)}, "turns round"),
        ({PAGE: (0, 0)}, "0 entries"),
        ({PAGE: (0, 256)}, "256 entries"),
        ({PAGE: (7, 1)}, "no page"),
        ({PAGE: (3 * PAGE, 1)}, "not written"),
    ],
)
def test_read_blocks_of_a_wrong_chain_is_refused(blocks, rule):
    """A chain that turns round, an empty or overfull block, a wrong link."""
    builder = Builder(0x40100000)
    for phys, header in blocks.items():
        builder.pages[phys] = bytearray(struct.pack("<QQ", *header).ljust(PAGE, b"\0"))

    with breaks(rule):
        kho_walker.read_blocks(lambda at, n: read_pages(builder, at, n), PAGE, 16)


@pytest.mark.parametrize(("total", "rule"), [(2, "more than"), (4, "not 4")])
def test_read_vmalloc_of_a_wrong_total_is_refused(total, rule):
    """The descriptor's number of pages must be what the chunks list."""
    chunk = struct.pack("<4Q", 0, PAGE, 2 * PAGE, 3 * PAGE).ljust(PAGE, b"\0")
    descriptor = struct.pack("<QIHH", PAGE, total, 1, 0)

    with breaks(rule):
        kho_walker.read_vmalloc(lambda at, n: chunk, descriptor)
