"""Each vector of the specification, given to the independent reader or model and to luo.

Left out are the vectors of vmalloc areas (``vmalloc_chunk_counts``).
"""

import errno
import struct
from typing import Any

import kho_walker
import model
import numpy as np
import pytest
from facts import SHARED, sections, vectors
from kho_builder import Builder

from luo import abi
from luo.errors import HandoverError, KhoError
from luo.fdt import Fdt, FdtEditor, FdtWriter
from luo.kho import (
    Handover,
    Kho,
    RadixTree,
    ScratchParam,
    parse_kho_scratch,
    radix_decode,
    radix_key,
)
from luo.memory import PhysicalMemory

Vector = dict[str, Any]
PAGE = 4096


def number(text: str) -> int:
    """A vector's number: hexadecimal text."""
    return int(text, 16)


def reader(memory: PhysicalMemory) -> kho_walker.Read:
    """The walker's access to a machine's memory."""
    return lambda phys, nbytes: bytes(memory.view(phys, nbytes))


# ---- keys ----


@vectors("radix_4k", "id")
def test_encode_key_of_a_4k_vector_is_the_walkers_key(vector: Vector):
    """Key, indices and leaf bit of a block on 4 KiB pages."""
    phys, order, key = number(vector["phys"]), vector["order"], number(vector["key"])
    indices = [*vector["index"].values(), vector["leaf_bit"]]

    assert key == kho_walker.encode_key(phys, order)
    assert (phys, order) == kho_walker.decode_key(key)
    assert indices == kho_walker.split_key(key)


@vectors("radix_4k", "id")
def test_radix_key_of_a_4k_vector_is_luos_key(vector: Vector):
    """Key of a block on 4 KiB pages, both ways."""
    phys, order, key = number(vector["phys"]), vector["order"], number(vector["key"])

    assert key == radix_key(phys, order)
    assert (phys, order) == radix_decode(key)


@vectors("radix_4k_unaligned_negative")
def test_encode_key_of_an_unaligned_block_loses_its_low_bits(vector: Vector):
    """The format cannot hold an unaligned block: the key decodes to the block around it."""
    phys, order, key = number(vector["phys"]), vector["order"], number(vector["key"])

    assert key == kho_walker.encode_key(phys, order)
    assert (number(vector["decoded_phys"]), order) == kho_walker.decode_key(key)


@vectors("radix_4k_unaligned_negative")
def test_radix_key_of_an_unaligned_block_is_refused(vector: Vector):
    """What would be recorded as another block is not encoded at all."""
    with pytest.raises((ValueError, OSError)):
        radix_key(number(vector["phys"]), vector["order"])


@vectors("radix_illegal_keys_4k", "key")
def test_decode_key_of_an_illegal_key_is_refused_by_the_walker(vector: Vector):
    """A key without a marker in 1..52 names no block."""
    with pytest.raises(kho_walker.Broken):
        kho_walker.decode_key(number(vector["key"]))


@vectors("radix_illegal_keys_4k", "key")
def test_radix_decode_of_an_illegal_key_is_refused_by_luo(vector: Vector):
    """A key without a marker in 1..52 names no block."""
    with pytest.raises(ValueError, match=vector["key"]):
        radix_decode(number(vector["key"]))


@vectors("radix_geometry")
def test_geometry_of_a_page_size_is_the_walkers(vector: Vector):
    """Bits and levels of the tree, by page size and generation."""
    abi = vector["generation"].split("/")[-1]
    slot_bits, leaf_bits, inner = kho_walker.geometry(vector["page_shift"], abi)

    assert (vector["table_index_bits"], vector["leaf_index_bits"]) == (slot_bits, leaf_bits)
    assert (vector["inner_levels"], vector["levels_total"]) == (inner, inner + 1)
    assert vector["key_bits_covered"] == leaf_bits + inner * slot_bits


@vectors("radix_other_page_sizes")
def test_encode_key_on_other_pages_is_the_walkers_key(vector: Vector):
    """Keys and indices on 16 and 64 KiB pages, and what kho-v2 loses of them."""
    shift, abi = vector["page_shift"], vector["generation"].split("/")[-1]
    phys, order, key = number(vector["phys"]), vector["order"], number(vector["key"])
    slot_bits, leaf_bits, inner = kho_walker.geometry(shift, abi)
    indices = kho_walker.split_key(key, shift, abi)
    recomposed = indices[-1]
    for level, slot in enumerate(reversed(indices[:-1])):
        recomposed |= slot << (leaf_bits + level * slot_bits)

    assert key == kho_walker.encode_key(phys, order, shift)
    assert (number(vector["decoded_phys"]), vector["decoded_order"]) == (
        kho_walker.decode_key(key, shift)
    )
    assert [*vector["index"].values(), vector["leaf_bit"]] == indices
    assert inner == len(indices) - 1
    assert number(vector["key_recomposed_from_indices"]) == recomposed
    assert vector["lossless"] == (recomposed == key)


@vectors("radix_other_page_sizes")
def test_radix_key_on_other_pages_is_luos_key(vector: Vector):
    """luo has the same keys; only the tree's depth differs by generation."""
    page_size, order = 1 << vector["page_shift"], vector["order"]
    phys, key = number(vector["phys"]), number(vector["key"])

    assert key == radix_key(phys, order, page_size=page_size)
    assert (phys, order) == radix_decode(key, page_size=page_size)


@vectors("radix_geometry")
def test_radix_tree_of_a_page_size_has_the_vectors_levels(vector: Vector):
    """luo's tree has as many levels as the vectors say; kho-v2's with the bug of its kernels."""
    page_size = 1 << vector["page_shift"]
    memory = PhysicalMemory("64MiB", page_size=page_size)
    name, bugs = vector["generation"].split("/")[-1], ()
    if name == "kho-v2":
        bugs = (abi.BUG_V2_DEPTH,)
    geometry = abi.generation(name).radix_geometry(page_size, bugs)

    assert vector["levels_total"] == geometry.levels
    assert vector["levels_total"] == RadixTree(memory, levels=geometry.levels).levels
    assert RadixTree(memory).levels == abi.generation(name).radix_geometry(page_size).levels
    assert (vector["table_index_bits"], vector["leaf_index_bits"], vector["order0_marker_bit"]) == (
        geometry.slot_bits,
        geometry.leaf_bits,
        geometry.marker_bit,
    )


@vectors("radix_other_page_sizes")
def test_preserve_folio_on_other_pages_writes_the_vectors_key(vector: Vector):
    """A machine with 16 or 64 KiB pages writes the tree that a kernel of that page size reads.

    With the bug of kho-v2's kernels it writes the key that they leave of it.
    """
    name, bugs = vector["generation"].split("/")[-1], ()
    if name == "kho-v2":
        bugs = (abi.BUG_V2_DEPTH,)
    shift, phys, order = vector["page_shift"], number(vector["phys"]), vector["order"]
    start = phys & -(1 << 30)
    memory = PhysicalMemory(ranges=[(start, 1 << 30, 0)], page_size=1 << shift)
    kho = Kho(memory, scratch=[], abi=name, bugs=bugs)
    kho.preserve_folio(phys, order)
    nodes: list[kho_walker.TreeNode] = []
    handover = kho.handover()
    root, _ = kho_walker.read_root(reader(memory), handover.fdt_phys, handover.fdt_len, name)
    written = number(vector["key_recomposed_from_indices" if bugs else "key"])
    walked = kho_walker.geometry(shift, name if bugs else "kho-v4")

    assert written in kho_walker.walk_keys(reader(memory), root, shift, nodes, walked)


# ---- trees ----


def image_pages(vector: Vector) -> dict[int, bytearray]:
    """The pages of a vector's tree: address to content."""
    pages = {}
    for phys, slots in vector["inner_nodes"].items():
        words = [number(slots.get(str(index), "0x0")) for index in range(PAGE // 8)]
        pages[number(phys)] = bytearray(struct.pack("<512Q", *words))
    for phys, bits in vector["leaves"].items():
        pages[number(phys)] = bytearray(sum(1 << bit for bit in bits).to_bytes(PAGE, "little"))
    return pages


def blocks(pairs: list[list[Any]]) -> list[model.Block]:
    """A vector's list of [address, order]."""
    return [(number(phys), order) for phys, order in pairs]


def tree_shape(keys: list[int]) -> set[tuple[int, int]]:
    """(level, key prefix) of each node page that *keys* need: a full path each."""
    return {
        (level, key >> shift << shift)
        for key in keys
        for level, shift in enumerate((15, 24, 33, 42, 51, 60))
    }


@vectors("radix_tree_images", "pages_total")
def test_walk_of_a_tree_image_gives_its_blocks(vector: Vector):
    """The walker reads the image page by page, in walk order, and needs all its pages."""
    pages = image_pages(vector)
    nodes: list[kho_walker.TreeNode] = []
    keys = list(kho_walker.walk_keys(lambda at, _: pages[at], number(vector["root"]), 12, nodes))

    assert blocks(vector["walk_order"]) == [kho_walker.decode_key(key) for key in keys]
    assert vector["pages_total"] == len(nodes) == len(pages)
    assert tree_shape(keys) == {(node.level, node.prefix) for node in nodes}
    assert model.walk_order(blocks(vector["insert"])) == blocks(vector["walk_order"])


@vectors("radix_tree_images", "pages_total")
def test_preserve_folio_of_a_tree_image_builds_the_same_tree(vector: Vector):
    """Given the vector's blocks, luo's tree has the vector's paths and no page more."""
    memory = PhysicalMemory("8GiB")
    kho = Kho(memory, scratch=[])
    own = list(zip(*(column.tolist() for column in kho.preserved()), strict=True))
    for phys, order in blocks(vector["insert"]):
        kho.preserve_folio(phys, order)
    handover = kho.handover()
    root, _ = kho_walker.read_root(reader(memory), handover.fdt_phys, handover.fdt_len)
    nodes: list[kho_walker.TreeNode] = []
    keys = list(kho_walker.walk_keys(reader(memory), root, 12, nodes))
    found = [kho_walker.decode_key(key) for key in keys]

    assert model.walk_order({*own, *blocks(vector["insert"])}) == found
    assert tree_shape(keys) == {(node.level, node.prefix) for node in nodes}
    assert len(tree_shape(keys)) == len(nodes)


@vectors("radix_tree_images", "pages_total")
def test_validate_of_a_tree_image_finds_its_blocks(vector: Vector):
    """luo reads the vector's tree from memory; one whose blocks overlap is refused."""
    scratch_phys = 0x18000000
    builder = Builder(0x10100000, root=number(vector["root"]), pages=image_pages(vector))
    builder.finish({})
    length = builder.scratch(scratch_phys, [(scratch_phys, 64 << 20)])
    memory = PhysicalMemory("8GiB")
    for phys, page in builder.pages.items():
        memory.view(phys, PAGE)[:] = page
    handover = Handover(builder.fdt, PAGE, scratch_phys, length)
    if vector["pages_total"] == 15:  # 1 GiB and 2 MiB at the same address
        with pytest.raises(HandoverError):
            Kho.validate(memory, handover)
        return
    incoming = Kho.validate(memory, handover)

    assert len(vector["insert"]) + 1 == incoming.nr_preserved  # and the root tree's page
    assert len({*builder.pages} - {builder.fdt, scratch_phys}) == incoming.tree_pages


# ---- ranges ----


@vectors("range_split", "pfn")
def test_split_pages_of_a_vector_gives_the_models_blocks(vector: Vector):
    """A run of pages is cut as mainline cuts it."""
    assert blocks(vector["mainline_blocks"]) == (
        model.split_pages(number(vector["pfn"]), vector["nr_pages"])
    )


@vectors("range_split_numa", "first_pfn_of_node1")
def test_split_pages_of_a_numa_vector_gives_the_models_blocks(vector: Vector):
    """No block holds pages of two NUMA nodes."""
    border = number(vector["first_pfn_of_node1"])

    assert blocks(vector["blocks_with_numa_rule"]) == (
        model.split_pages(number(vector["pfn"]), vector["nr_pages"], [border])
    )


def preserved_by(kho: Kho, pfn: int, nr_pages: int) -> set[model.Block]:
    """What preserving a run of pages adds to *kho*, and unpreserving takes away again."""

    def now() -> set[model.Block]:
        return set(zip(*(column.tolist() for column in kho.preserved()), strict=True))

    before = now()
    kho.preserve_pages(pfn * PAGE, nr_pages)
    added = now() - before
    kho.unpreserve_pages(pfn * PAGE, nr_pages)

    assert before == now() | before
    assert not now() & added - before
    return added


@vectors("range_split", "pfn")
def test_preserve_pages_of_a_vector_records_its_blocks(vector: Vector):
    """luo cuts a run of pages as mainline does."""
    kho = Kho(PhysicalMemory("8GiB"), scratch=[])
    expected = {(pfn * PAGE, order) for pfn, order in blocks(vector["mainline_blocks"])}

    assert expected == preserved_by(kho, number(vector["pfn"]), vector["nr_pages"])


@vectors("range_split_numa", "first_pfn_of_node1")
def test_preserve_pages_across_nodes_records_the_numa_vectors_blocks(vector: Vector):
    """luo cuts a run of pages at the border of two NUMA nodes."""
    border = number(vector["first_pfn_of_node1"]) * PAGE
    ranges = [(0, border, 0), (border, 4 << 30, 1)]
    kho = Kho(PhysicalMemory(ranges=ranges), scratch=[])
    expected = {(pfn * PAGE, order) for pfn, order in blocks(vector["blocks_with_numa_rule"])}

    assert expected == preserved_by(kho, number(vector["pfn"]), vector["nr_pages"])


@vectors("range_split", "pfn")
def test_preserve_phys_with_the_v5_bug_records_the_vectors_walk(vector: Vector):
    """With the bug of its kernels kho-v5-series records what they did, else what was meant."""
    pfn, nr_pages = number(vector["pfn"]), vector["nr_pages"]
    steps = vector["v5_series_walk"]
    walked = {(number(step["recorded_first_pfn"]), step["order"]) for step in steps}
    for bugs, expected in (
        ((abi.BUG_V5_SPLIT,), walked),
        ((), set(blocks(vector["mainline_blocks"]))),
    ):
        kho = Kho(PhysicalMemory("8GiB"), scratch=[], abi="kho-v5-series", bugs=bugs)
        kho.preserve_phys(pfn * PAGE, nr_pages * PAGE)
        found = set(zip(*(column.tolist() for column in kho.preserved()), strict=True))

        assert {(first * PAGE, order) for first, order in expected} == found
        kho.unpreserve_phys(pfn * PAGE, nr_pages * PAGE)

        assert kho.nr_preserved == 0
    assert walked == set(model.split_v5(pfn, nr_pages))


# ---- bitmaps and chunks ----


def finalized(kho: Kho) -> Handover:
    """The four numbers, finalized where the generation has that."""
    if kho.generation.finalize:
        kho.finalize()
    return kho.handover()


def chunks(memory: PhysicalMemory, head: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """(phys, order, [(phys_start, bitmap)]) of each chunk of the list at *head*."""
    found = []
    while head:
        page = bytes(memory.view(head, memory.page_size))
        following, order, count = struct.unpack_from("<QII", page)
        found.append((head, order, list(struct.iter_unpack("<QQ", page[16 : 16 + 16 * count]))))
        head = following
    return found


@vectors("v1_bitmap", "id")
def test_bitmap_place_of_a_vector_is_the_walkers(vector: Vector):
    """Index, first address and bit of a block."""
    expected = vector["bitmap_index"], number(vector["phys_start"]), vector["bit"]

    assert expected == kho_walker.bitmap_place(
        number(vector["phys"]), vector["order"], vector["bits_per_bitmap"], vector["page_shift"]
    )


@vectors("v1_bitmap", "id")
def test_preserve_folio_of_a_bitmap_vector_sets_its_bit(vector: Vector):
    """luo lists one bitmap, which starts where the vector says, with the vector's bit set."""
    page, order = 1 << vector["page_shift"], vector["order"]
    phys, nbytes = number(vector["phys"]), vector["bytes_per_bitmap"]
    size = page << order
    base = phys & -(1 << 30)
    ranges = [(base, max(1 << 30, size), 0)]
    names = ("kho-v5-series", "kho-v1-512") if nbytes == 512 else ("kho-v1", "kho-v1-notifier")
    for name in names:
        memory = PhysicalMemory(ranges=ranges, page_size=page)
        area = (base, 1 << 22) if phys - base >= 1 << 22 else (base + (1 << 29), 1 << 22)
        kho = Kho(memory, scratch=[area] if order < 18 and name == "kho-v5-series" else [],
                  abi=name)  # fmt: skip
        kho.preserve_folio(phys, order)
        if kho.generation.finalize == "jump":
            kho.finalize()
            head = kho.root_phys
        else:
            handover = finalized(kho)
            head, _ = kho_walker.read_root(reader(memory), handover.fdt_phys, page, name)
        place = number(vector["phys_start"])
        mine = [bitmap for _, o, entries in chunks(memory, head) for at, bitmap in entries
                if (o, at) == (order, place)]  # fmt: skip

        assert len(mine) == 1
        assert memory.view(mine[0], nbytes)[vector["byte"]] & number(vector["byte_mask"])


@vectors("v1_chunk_counts", "bitmaps_of_one_order")
@pytest.mark.parametrize("name", ["kho-v5-series", "kho-v1-512", "kho-v1-notifier", "kho-v1"])
def test_finalize_of_many_bitmaps_writes_the_vectors_chunks(vector: Vector, name: str):
    """A chunk lists up to 255 bitmaps of one order; indices ascend, the last chunk ends."""
    count = vector["bitmaps_of_one_order"]
    bits = 4096 if name in ("kho-v5-series", "kho-v1-512") else 32768
    memory = PhysicalMemory(bits * PAGE * 512 * 2)
    kho = Kho(memory, scratch=[], abi=name)
    span = bits * PAGE << 1
    kho.preserve_folios(np.arange(count, dtype=np.uint64) * np.uint64(span), 1)
    kho.finalize()
    listed = [chunk for chunk in chunks(memory, kho.root_phys) if chunk[1] == 1]

    assert vector["chunks"] == len(listed)
    assert [i * span for i in range(count)] == [at for _, _, es in listed for at, _ in es]
    assert {len(entries) for _, _, entries in listed[:-1]} <= {255}


@vectors("fdt_blobs", "length")
def test_finalize_writes_the_streamed_blob(vector: Vector):
    """6.16 to 6.18 wrote the root tree in one go: the vector's bytes but for two addresses."""
    if vector["generation"] != "kho-v1":
        pytest.skip("no root tree of kho-v1")
    for name in ("kho-v1-512", "kho-v1-notifier"):
        memory = PhysicalMemory("64MiB")
        kho = Kho(memory, abi=name)
        phys = kho.save_subtree("memblock", b"x")
        kho.finalize()
        expected = bytes.fromhex(vector["hex"])
        for old, new in ((0x123456000, kho.root_phys), (0x10ABC000, phys)):
            expected = expected.replace(struct.pack("<Q", old), struct.pack("<Q", new))

        assert expected == bytes(memory.view(kho.fdt_phys, len(expected)))


# ---- blobs ----

MAP = struct.pack("<Q", 0x123456000)
METADATA = {"preserved-data": struct.pack("<Q", 0x10ABC000), "blob-size": struct.pack("<Q", 73)}
LUO = {"preserved-data": struct.pack("<Q", 0x10ABD000), "blob-size": struct.pack("<Q", 40)}
REGION = {
    "compatible": b"reserve-mem-v1\0",
    "start": struct.pack("<Q", 0x140000000),
    "size": struct.pack("<Q", 0x400000),
}

Properties = dict[str, bytes]

SEQUENTIAL: dict[int, tuple[Properties, dict[str, Properties]]] = {
    152: ({"compatible": b"kho-v4\0", "preserved-memory-map": MAP}, {}),
    196: (
        {"compatible": b"kho-v1\0", "preserved-memory-map": MAP},
        {"memblock": {"fdt": struct.pack("<Q", 0x10ABC000)}},
    ),
    206: ({"compatible": b"memblock-v1\0"}, {"n1": REGION}),
}
"""What the sequentially written vectors say, by their length: (root, children)."""

EDITED: dict[int, dict[str, Properties]] = {
    233: {"kexec-metadata": METADATA},
    285: {"kexec-metadata": METADATA, "LUO": LUO},
}
"""What was added to the first tree to make the edited ones, by their length, oldest first."""


def content(vector: Vector) -> tuple[Properties, list[tuple[str, list[tuple[str, bytes]]]]]:
    """What the tree of *vector* holds, in file order."""
    root, children = SEQUENTIAL[vector["length"] if vector["length"] in SEQUENTIAL else 152]
    listed = [(name, list(properties.items())) for name, properties in children.items()]
    for name, properties in EDITED.get(vector["length"], {}).items():
        listed.insert(0, (name, list(properties.items())[::-1]))
    return root, listed


@vectors("fdt_blobs", "length")
def test_parse_fdt_of_a_blob_gives_its_tree(vector: Vector):
    """The walker's reader finds names and values in file order: newest first where edited."""
    tree = kho_walker.parse_fdt(bytes.fromhex(vector["hex"]))
    root, children = content(vector)

    assert list(root.items()) == list(tree.properties.items())
    assert children == [(c.name, list(c.properties.items())) for c in tree.children.values()]


@vectors("fdt_blobs", "length")
def test_fdt_of_a_blob_gives_its_tree(vector: Vector):
    """luo's reader finds the same."""
    tree = Fdt(bytes.fromhex(vector["hex"]))
    root, children = content(vector)

    assert vector["length"] == tree.totalsize
    assert root == {name: bytes(tree.root[name]) for name in tree.root.properties}
    assert children == [
        (node.name, [(name, bytes(node[name])) for name in node.properties])
        for node in tree.root.children
    ]


@vectors("fdt_blobs", "length")
def test_fdt_writer_and_editor_give_the_blob(vector: Vector):
    """luo writes, and edits, to the very bytes of the vector."""
    root, children = SEQUENTIAL[vector["length"] if vector["length"] in SEQUENTIAL else 152]
    buffer = bytearray(PAGE)
    writer = FdtWriter(into=buffer)
    with writer.node(""):
        for name, value in root.items():
            writer.property(name, value)
        for name, properties in children.items():
            writer.add_node(name, properties)
    writer.finish()
    if vector["length"] in EDITED:
        for name, properties in EDITED[vector["length"]].items():
            editor = FdtEditor(buffer)
            editor.add_node("/", name)
            for key, value in properties.items():
                editor.set_property(f"/{name}", key, value)
            editor.pack()

    assert vector["hex"] == bytes(buffer[: vector["length"]]).hex()


@vectors("fdt_blobs", "length")
def test_libfdt_gives_the_blob(vector: Vector):
    """The vectors are what libfdt writes."""
    root, children = SEQUENTIAL[vector["length"] if vector["length"] in SEQUENTIAL else 152]
    oracle = pytest.importorskip("libfdt_oracle")
    tree = oracle.write(root, children)
    for name, properties in EDITED.get(vector["length"], {}).items():
        oracle.add(tree, name, properties)

    assert vector["hex"] == oracle.to_bytes(tree).hex()


@vectors("kexec_metadata", "release")
def test_read_metadata_of_the_vector_gives_its_fields(vector: Vector):
    """The walker reads release and count from 73 packed bytes."""
    blob = bytes.fromhex(vector["hex"])

    assert vector["length"] == len(blob)
    assert (1, vector["release"], vector["count"]) == kho_walker.read_metadata(blob)


@vectors("kexec_metadata", "release")
def test_kho_of_the_vectors_release_writes_its_metadata(vector: Vector):
    """After a cold boot the first handover carries exactly the vector's blob."""
    memory = PhysicalMemory("64MiB")
    handover = Kho(memory, release=vector["release"]).handover()
    _, subtrees = kho_walker.read_root(reader(memory), handover.fdt_phys, handover.fdt_len)
    phys, nbytes = subtrees["kexec-metadata"]

    assert vector["hex"] == memory.view(phys, nbytes).hex()


@vectors("x86_setup_data_node", "length")
def test_from_setup_data_of_the_vector_is_the_walkers_handover(vector: Vector):
    """The walker reads the four numbers of an x86 setup_data node."""
    node = bytes.fromhex(vector["hex"])

    assert kho_walker.from_setup_data(node) == (0x10AAA000, 0x1000, 0x3FFF0000, 0x40)


@vectors("x86_setup_data_node", "length")
def test_to_setup_data_of_the_vector_is_luos_node(vector: Vector):
    """luo writes and reads the same bytes."""
    node = bytes.fromhex(vector["hex"])
    handover = Handover(0x10AAA000, 0x1000, 0x3FFF0000, 0x40)

    assert node == handover.to_setup_data()
    assert handover == Handover.from_setup_data(node)


AREAS = [
    (0x10000000, 16 << 20),
    (0x20000000, 512 << 20),
    (0x100000000, 256 << 20),
    (0x200000000, 256 << 20),
]


@vectors("scratch_array", "length")
def test_read_scratch_of_the_vector_gives_its_areas(vector: Vector):
    """The walker reads the areas, and ignores a trailing piece of an entry."""
    data = bytes.fromhex(vector["hex"])

    assert kho_walker.read_scratch(lambda at, n: data[at : at + n], 0, len(data)) == AREAS
    assert AREAS[:3] == kho_walker.read_scratch(lambda at, n: data[at : at + n], 0, len(data) - 1)


@vectors("scratch_array", "length")
def test_handover_of_the_vectors_areas_names_its_array(vector: Vector):
    """luo writes the array of these areas, into one of them."""
    memory = PhysicalMemory(ranges=[(0, 4 << 30, 0), (4 << 30, 8 << 30, 1)])
    handover = Kho(memory, scratch=AREAS).handover()
    array = memory.view(handover.scratch_phys, handover.scratch_len)

    assert vector["hex"] == array.hex()
    assert kho_walker.overlaps(handover.scratch_phys, handover.scratch_len, AREAS)


@vectors("kho_block_capacity", "entry_size")
def test_block_capacity_of_a_vector_is_the_walkers(vector: Vector):
    """Entries that fit into a block of one page."""
    assert vector["capacity"] == kho_walker.block_capacity(vector["entry_size"])


@vectors("kho_block_capacity", "entry_size")
def test_write_blocks_fills_a_block_with_the_vectors_capacity(vector: Vector):
    """One more entry than the capacity takes a second block, with that entry alone."""
    size, capacity = vector["entry_size"], vector["capacity"]
    memory = PhysicalMemory("64MiB")
    kho = Kho(memory)
    entries = [bytes([i % 251]) * size for i in range(capacity + 1)]
    full = kho.write_blocks(b"".join(entries[:-1]), size)
    over = kho.write_blocks(b"".join(entries), size)

    assert ([full], entries[:-1]) == kho_walker.read_blocks(reader(memory), full, size)
    pages, found = kho_walker.read_blocks(reader(memory), over, size)

    assert entries == found
    assert [capacity, 1] == [kho_walker.u64(memory.view(page, 16), 8) for page in pages]


@vectors("kho_scratch_param_7_3", "input")
def test_parse_scratch_of_a_vector_is_the_models(vector: Vector):
    """The model understands ``kho_scratch=`` as a 7.3 kernel does."""
    expected = {k: v for k, v in vector.items() if k not in ("input", "result")}

    assert (expected or None) == model.parse_scratch(vector["input"])


@vectors("kho_scratch_param_7_3", "input")
def test_parse_kho_scratch_of_a_vector_is_luos(vector: Vector):
    """luo understands it so, too."""
    if vector["result"] == "scale":
        expected = ScratchParam(scale=vector["percent"])
    elif vector["result"] == "fixed":
        expected = ScratchParam(None, vector["lowmem"], vector["global_"], vector["pernode"])
    else:
        with pytest.raises(KhoError) as error:
            parse_kho_scratch(vector["input"])

        assert error.value.errno == errno.EINVAL
        return

    assert expected == parse_kho_scratch(vector["input"])


def test_vectors_of_the_specification_are_all_known():
    """A section that the specification gains does not go unnoticed."""
    if SHARED is None:
        pytest.skip("no directory 'shared'")
    left_out = {"description", "vmalloc_chunk_counts"}
    used = {
        "v1_bitmap",
        "v1_chunk_counts",
        "radix_4k",
        "radix_4k_unaligned_negative",
        "radix_illegal_keys_4k",
        "radix_geometry",
        "radix_other_page_sizes",
        "radix_tree_images",
        "range_split",
        "range_split_numa",
        "fdt_blobs",
        "kexec_metadata",
        "x86_setup_data_node",
        "scratch_array",
        "kho_block_capacity",
        "kho_scratch_param_7_3",
    }

    assert used | left_out == set(sections())
