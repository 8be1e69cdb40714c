"""The preserved map's radix tree: keys, pages, what a failed call leaves."""

import errno
import struct

import numpy as np
import pytest
from facts import vectors

from luo import abi
from luo.errors import KhoError
from luo.kho import RadixTree, radix_decode, radix_key
from luo.memory import PhysicalMemory

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4096

# The worked examples of kho-abi 5.2: block, key, slots L5..L1, bit of the leaf.
EXAMPLES = [
    (0x123456000, 0, 0x0010_0000_0012_3456, [2, 0, 0, 0, 36], 13398),
    (0x40000000, 9, 0x0000_0800_0000_0200, [0, 2, 0, 0, 0], 512),
    (0x40000000, 18, 0x0000_0004_0000_0001, [0, 0, 2, 0, 0], 1),
]


def errno_of(call, *args) -> int:
    """The errno that a call raises, 0 if it returns."""
    try:
        call(*args)
    except KhoError as error:
        return error.errno
    return 0


def slots_of(memory: PhysicalMemory, node: int) -> dict[int, int]:
    """Slots of an inner node that are not empty."""
    words = np.frombuffer(memory.view(node, memory.page_size), np.uint64)
    return {int(i): int(words[i]) for i in words.nonzero()[0]}


def bits_of(memory: PhysicalMemory, leaf: int) -> list[int]:
    """Bits of a leaf that are set."""
    view = np.frombuffer(memory.view(leaf, memory.page_size), np.uint8)
    return np.unpackbits(view, bitorder="little").nonzero()[0].tolist()


def follow(memory: PhysicalMemory, root: int, slots: list[int]) -> int:
    """The leaf that these slots, root first, lead to."""
    for slot in slots:
        (root,) = struct.unpack_from("=Q", memory.view(root, memory.page_size), 8 * slot)
    return root


# ---- keys ----


@pytest.mark.parametrize(("phys", "order", "key", "slots", "bit"), EXAMPLES)
def test_radix_key_of_the_worked_examples(phys, order, key, slots, bit):
    """Encoded, decoded, and found in the tree where the specification says."""
    memory = PhysicalMemory("16MiB", base=GIB)
    tree = RadixTree(memory)
    tree.add_key(key)

    assert key == radix_key(phys, order)
    assert (phys, order) == radix_decode(key)
    assert [bit] == bits_of(memory, follow(memory, tree.root, slots))
    assert tree.nr_nodes == 6


@vectors("radix_4k", "id")
def test_radix_key_of_a_vector(vector):
    """Key, decoding, slots and bit for 4 KiB pages."""
    phys, order, key = int(vector["phys"], 16), vector["order"], int(vector["key"], 16)
    memory = PhysicalMemory("1MiB", base=GIB)
    tree = RadixTree(memory)
    tree.add_key(key)
    slots = [vector["index"][f"L{level}"] for level in (5, 4, 3, 2, 1)]

    assert key == radix_key(phys, order)
    assert (phys, order) == radix_decode(key)
    assert [vector["leaf_bit"]] == bits_of(memory, follow(memory, tree.root, slots))


@vectors("radix_4k_unaligned_negative")
def test_radix_key_of_an_unaligned_vector_is_valueerror(vector):
    """Low bits would be lost."""
    with pytest.raises(ValueError, match="not aligned"):
        radix_key(int(vector["phys"], 16), vector["order"])


@vectors("radix_illegal_keys_4k", "key")
def test_radix_decode_of_an_illegal_vector_is_valueerror(vector):
    """No marker bit where a block's may be."""
    with pytest.raises(ValueError, match="no block"):
        radix_decode(int(vector["key"], 16))


@vectors("radix_other_page_sizes")
def test_radix_key_of_a_vector_of_another_page_size(vector):
    """16 and 64 KiB pages: kho-v3's depth, and kho-v2's that loses order 0 on 16 KiB."""
    page, geometry = 1 << vector["page_shift"], vector["index"]
    phys, order, key = int(vector["phys"], 16), vector["order"], int(vector["key"], 16)
    memory = PhysicalMemory("16MiB", base=GIB, page_size=page)
    tree = RadixTree(memory, levels=len(geometry) + 1)
    tree.add_key(key)
    slots = [geometry[f"L{level}"] for level in range(len(geometry), 0, -1)]

    assert key == radix_key(phys, order, page_size=page)
    assert [vector["leaf_bit"]] == bits_of(memory, follow(memory, tree.root, slots))
    assert (int(vector["key_recomposed_from_indices"], 16) == key) == vector["lossless"]


@vectors("radix_geometry")
def test_radix_geometry_of_a_vector(vector):
    """Levels and bits by page size, kho-v4's and (marker not counted) kho-v2's."""
    page = 1 << vector["page_shift"]
    geometry = abi.generation("kho-v4").radix_geometry(page)
    expected = [vector[k] for k in ("table_index_bits", "leaf_index_bits", "order0_marker_bit")]

    assert expected == [geometry.slot_bits, geometry.leaf_bits, geometry.marker_bit]
    if vector["generation"] != "kho-v2":
        assert vector["levels_total"] == geometry.levels
        memory = PhysicalMemory("16MiB", page_size=page)
        assert vector["levels_total"] == RadixTree(memory).levels


def test_radix_key_at_the_borders_round_trips():
    """Every order, at the first and the last address that it can have."""
    for page in (4 * KIB, 16 * KIB, 64 * KIB):
        shift = page.bit_length() - 1
        for order in range(64 - shift):
            last = (1 << 64) - (page << order)
            for phys in (0, last):
                key = radix_key(phys, order, page_size=page)

                assert (phys, order) == radix_decode(key, page_size=page)
                assert key < 1 << (65 - shift)
        with pytest.raises(ValueError, match="order"):
            radix_key(0, 64 - shift, page_size=page)


def test_radix_key_of_wrong_arguments():
    """Pages of another size, floats, negative addresses."""
    with pytest.raises(ValueError, match="page_size"):
        radix_key(0, 0, page_size=8192)
    for wrong in ((1.0, 0), (0, 1.0), ("0", 0)):
        with pytest.raises(TypeError):
            radix_key(*wrong)
    for wrong in (-PAGE, 1 << 64):
        with pytest.raises(OverflowError):
            radix_key(wrong, 0)


# ---- the tree ----


@vectors("radix_tree_images")
def test_tree_of_an_image_vector_is_equal_page_by_page(vector):
    """Pages are taken in the order in which the path is built, and hold exactly these slots."""
    root = int(vector["root"], 16)
    memory = PhysicalMemory("1MiB", base=root)
    tree = RadixTree(memory)
    for phys, order in vector["insert"]:
        tree.add_key(radix_key(int(phys, 16), order))
    inner = {
        int(node, 16): {int(i): int(child, 16) for i, child in slots.items()}
        for node, slots in vector["inner_nodes"].items()
    }
    leaves = {int(leaf, 16): bits for leaf, bits in vector["leaves"].items()}

    assert root == tree.root
    assert vector["pages_total"] == tree.nr_nodes
    assert {*inner, *leaves} == set(tree.nodes().tolist())
    assert inner == {node: slots_of(memory, node) for node in inner}
    assert leaves == {leaf: bits_of(memory, leaf) for leaf in leaves}
    walked = [radix_decode(key) for key in tree.keys().tolist()]
    assert [(int(phys, 16), order) for phys, order in vector["walk_order"]] == walked


def test_tree_keys_ascend_and_count_once():
    """Adding twice is as good as once; deleting leaves the pages."""
    memory = PhysicalMemory("16MiB")
    tree = RadixTree(memory)
    keys = [5, 3, 1 << 52, (1 << 53) - 1, 1 << 15, 7, 5]
    for key in keys:
        tree.add_key(key)

    assert sorted(set(keys)) == tree.keys().tolist()
    assert tree.nr_keys == 6
    nodes = tree.nr_nodes
    tree.del_key(3)
    assert not tree.has_key(3)
    assert tree.has_key(5)
    assert errno_of(tree.del_key, 3) == errno.ENOENT
    assert errno_of(tree.del_key, 1 << 40) == errno.ENOENT
    assert (5, nodes) == (tree.nr_keys, tree.nr_nodes)


def test_tree_add_of_a_wide_key_is_erange():
    """Keys have 53 bits on 4 KiB pages, 49 on 64 KiB."""
    memory = PhysicalMemory("16MiB")
    tree = RadixTree(memory)

    assert errno_of(tree.add_key, 1 << 53) == errno.ERANGE
    assert not tree.has_key(1 << 53)
    wide = RadixTree(PhysicalMemory("16MiB", page_size=65536))
    assert errno_of(wide.add_key, 1 << 49) == errno.ERANGE
    wide.add_key((1 << 49) - 1)


def test_tree_add_without_memory_frees_what_it_made():
    """ENOMEM at each page of the path: free pages, slots and keys are as before."""
    memory = PhysicalMemory("1MiB")
    tree = RadixTree(memory)
    tree.add_key(1 << 52)
    spare = memory.alloc_folios(memory.nr_free_pages(), 0).tolist()
    image = {node: bytes(memory.view(node, PAGE)) for node in tree.nodes().tolist()}
    for pages in range(5):
        assert pages == memory.nr_free_pages()
        assert errno_of(tree.add_key, 1 << 51) == errno.ENOMEM
        assert pages == memory.nr_free_pages()
        assert image == {node: bytes(memory.view(node, PAGE)) for node in tree.nodes().tolist()}
        memory.free(spare.pop())
    tree.add_key(1 << 51)

    assert tree.keys().tolist() == [1 << 51, 1 << 52]
    assert memory.nr_free_pages() == 0


def test_tree_free_gives_all_pages_back():
    """Afterwards the tree is of no use."""
    memory = PhysicalMemory("16MiB")
    before = memory.nr_free_pages()
    tree = RadixTree(memory)
    for key in range(1, 1 << 50, 1 << 45):
        tree.add_key(key)
    tree.free()

    assert before == memory.nr_free_pages()
    assert errno_of(tree.add_key, 1) == errno.EINVAL
    assert errno_of(tree.keys) == errno.EINVAL


@pytest.mark.parametrize("value", [1, PAGE + 8, 64 * MIB, (1 << 64) - PAGE])
def test_tree_that_somebody_wrote_over_is_eio(value):
    """A slot that leads outside RAM is an error, not a crash."""
    memory = PhysicalMemory("16MiB")
    tree = RadixTree(memory)
    tree.add_key(1 << 52)
    struct.pack_into("=Q", memory.view(tree.root, PAGE), 16, value)
    other = (1 << 52) + (1 << 20)

    for call in (tree.keys, tree.nodes):
        assert errno_of(call) == errno.EIO
    assert errno_of(tree.add_key, other) == errno.EIO


def test_tree_whose_slots_lead_to_its_root_ends_at_once():
    """2**45 paths through one page: no more is read than the tree has."""
    memory = PhysicalMemory("16MiB")
    tree = RadixTree(memory)
    tree.add_key(1)
    words = np.frombuffer(memory.view(tree.root, PAGE), np.uint64)
    words[:] = tree.root

    assert len(tree.keys()) == 1
    assert errno_of(tree.nodes) == errno.EIO
