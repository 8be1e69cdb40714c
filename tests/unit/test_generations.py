"""Generations of the handover: what each has, when it writes its map, and how that is undone."""

import errno
import itertools
import os
import struct

import kho_walker
import numpy as np
import pytest
from rig import (
    Log,
    errno_of,
    hand_over,
    small_kernel,
    small_machine,
    snapshot,
)
from rig import updated as update

from luo import abi
from luo.errors import CallbackError, HandoverError, KhoError, SuccessorError
from luo.kernel import KernelImage, live_update
from luo.kho import ChunkMap, Handover, Incoming, Kho, KhoEvent, KhoNode, radix_key
from luo.machine import Machine
from luo.memory import PhysicalMemory

PAGE = 4096
MIB = 1 << 20
ALL = tuple(abi.GENERATIONS)
CHUNKS = ALL[:4]
CLOSING = ALL[:3]
ABORTING = ALL[1:3]
SIZES = {4096: "256MiB", 16384: "1GiB", 65536: "8GiB"}


def blocks(kho: Kho | Incoming, of: str = "preserved") -> list[tuple[int, int]]:
    """What is preserved, in walk order."""
    return list(zip(*(column.tolist() for column in getattr(kho, of)()), strict=True))


def read_image(memory: PhysicalMemory, handover: Handover, name: str) -> kho_walker.Image:
    """What the walker reads, with its rules checked."""

    def read(phys: int, nbytes: int) -> bytes:
        return os.pread(memory.fd, nbytes, memory.offset + phys - memory.base)

    shift = memory.page_size.bit_length() - 1
    image = kho_walker.read_handover(read, *handover.numbers, shift, name)
    kho_walker.check_image(image, [(start, nbytes) for start, nbytes, _ in memory.ranges])
    return image


# ---- what each has ----


def test_generations_are_the_seven():
    """Oldest first; these are the names that users give."""
    assert ALL == (
        "kho-v5-series", "kho-v1-512", "kho-v1-notifier", "kho-v1", "kho-v2", "kho-v3", "kho-v4",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("call", "having"),
    [
        (lambda kho: kho.finalize(), CHUNKS),
        (lambda kho: kho.abort(), ABORTING),
        (lambda kho: kho.unfreeze(), ALL[:1]),
        (lambda kho: kho.register_notifier(lambda event, kho: None), CLOSING),
        (lambda kho: kho.unregister_notifier(lambda event, kho: None), CLOSING),
        (lambda kho: kho.preserve_phys(PAGE, PAGE), ALL[:2]),
        (lambda kho: kho.unpreserve_phys(PAGE, PAGE), ALL[:2]),
        (lambda kho: kho.add_node(None, "n", KhoNode()), ALL[:1]),
        (lambda kho: kho.remove_node(None, "n"), ALL[:1]),
        (lambda kho: kho.add_prop(None, "n", b""), ALL[:1]),
        (lambda kho: kho.remove_prop(None, "n"), ALL[:1]),
        (lambda kho: kho.add_subtree("n", PAGE, 1), ALL[1:]),
        (lambda kho: kho.remove_subtree(PAGE), ALL[1:]),
        (lambda kho: kho.save_subtree("n", b"x"), ALL[1:]),
    ],
)
def test_call_that_a_generation_lacks_is_eopnotsupp(call, having):
    """Whatever a generation has not is EOPNOTSUPP there, and only there."""
    lacking = [
        name
        for name in ALL
        if errno_of(call, Kho(PhysicalMemory("64MiB"), abi=name)) == errno.EOPNOTSUPP
    ]

    assert [name for name in ALL if name not in having] == lacking


def test_bug_of_another_generation_is_value_error():
    """A mistake can only be asked for where kernels made it."""
    for name in ALL:
        for bug in ("kho-v2-depth", "kho-v5-split", "unknown"):
            if bug not in abi.GENERATIONS[name].bugs:
                with pytest.raises(ValueError, match=bug):
                    Kho(PhysicalMemory("64MiB"), abi=name, bugs=(bug,))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("page_size", sorted(SIZES))
def test_boot_of_a_generation_finds_what_was_left(name, page_size):
    """Blocks and blobs come over on every page size, and the walker reads the same."""
    memory = PhysicalMemory(SIZES[page_size], page_size=page_size)
    kho = Kho(memory, abi=name)
    singles, large = memory.alloc_folios(700, 0), memory.alloc_folio(memory.max_order)
    kho.preserve_folios(singles, 0)
    kho.preserve_folio(large, memory.max_order)
    run = memory.alloc_pages(37)
    kho.preserve_pages(run, 37)
    if kho.generation.inline:
        node = KhoNode()
        kho.add_node(None, "blob", node)
        kho.add_prop(node, "content", b"content")
    else:
        kho.save_subtree("blob", b"content")
    handover = hand_over(kho)
    image = read_image(memory, handover, name)
    incoming = Kho.validate(memory, handover, abi=name)

    assert image.preserved == blocks(kho)
    assert len(image.nodes) == incoming.tree_pages == kho.tree_pages
    assert incoming.nr_preserved == kho.nr_preserved
    kho.close()
    memory.forget()
    kho = Kho.boot(memory, handover, abi=name)
    incoming = kho.incoming
    assert incoming.restore_folios(singles).tolist() == [0] * 700
    assert incoming.restore_folio(large) == memory.max_order
    incoming.restore_pages(run, 37)
    if kho.generation.inline:
        blob = incoming.get_prop(incoming.get_node(None, "blob"), "content")
    else:
        blob = incoming.load_subtree("blob")
    assert bytes(blob[:7]) == b"content"


@pytest.mark.parametrize("name", ALL)
def test_boot_many_times_leaks_nothing(name):
    """From the second handover on each leaves as many pages free as the one before."""
    memory = PhysicalMemory("256MiB")
    kho, free = Kho(memory, abi=name), []
    for _ in range(5):
        phys = memory.alloc_folio(3)
        kho.preserve_folio(phys, 3)
        handover = hand_over(kho)
        kho.close()
        kho = Kho.boot(memory, handover, abi=name)
        assert kho.incoming.restore_folio(phys) == 3
        memory.free(phys)
        free.append(memory.nr_free_pages())

    # what Linux keeps as well: the root trees and metadata of all kernels before
    assert max(a - b for a, b in itertools.pairwise(free)) <= 2


@pytest.mark.parametrize("name", ALL)
def test_restore_above_the_largest_order_is_as_in_its_kernels(name):
    """From 6.16 to kho-v2 a kernel restored nothing above its allocator's largest order."""
    memory = PhysicalMemory("256MiB")
    kho = Kho(memory, abi=name)
    phys = 64 * MIB
    memory.claim(phys, 13)
    kho.preserve_folio(phys, 13)
    handover = hand_over(kho)
    kho.close()
    incoming = Kho.boot(memory, handover, abi=name).incoming
    if name in ("kho-v1-512", "kho-v1-notifier", "kho-v1", "kho-v2"):
        for call in (incoming.restore_folio, incoming.restore_free):
            assert errno_of(call, phys) == errno.EINVAL
        assert errno_of(incoming.restore_pages, phys, 1 << 13) == errno.EINVAL
        assert errno_of(incoming.restore_folios, np.array([phys], np.uint64)) == errno.EINVAL
    else:
        assert incoming.restore_folio(phys) == 13


@pytest.mark.parametrize("name", ALL)
def test_preserve_pages_across_nodes_is_cut_from_kho_v3_on(name):
    """Before, a block could reach from one NUMA node to the next."""
    memory = PhysicalMemory(ranges=[(0, 65 * MIB, 0), (65 * MIB, 63 * MIB, 1)])
    kho = Kho(memory, scratch=[], abi=name)
    before = set(blocks(kho))
    kho.preserve_pages(64 * MIB, 512)
    expected = {(64 * MIB, 9)} if name < "kho-v3" or name == "kho-v5-series" else {
        (64 * MIB, 8), (65 * MIB, 8),
    }  # fmt: skip

    assert expected == set(blocks(kho)) - before


def test_kho_v2_with_its_bug_on_16k_pages_is_refused_by_its_reader():
    """Order 0 has lost its marker, so that a block is taken for a very large one."""
    memory = PhysicalMemory("1GiB", page_size=16384)
    handover = Kho(memory, abi="kho-v2", bugs=("kho-v2-depth",)).handover()
    with pytest.raises(HandoverError):
        Kho.validate(memory, handover, abi="kho-v2", bugs=("kho-v2-depth",))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("page_size", sorted(SIZES))
def test_scratch_of_a_generation_is_aligned_as_in_its_kernels(name, page_size):
    """To page blocks before kho-v3, then to blocks of the largest order."""
    memory = PhysicalMemory(SIZES[page_size], page_size=page_size)
    order = {4096: 9, 16384: 11, 65536: 13}[page_size]
    align = page_size << (order if name < "kho-v3" else memory.max_order)
    if name == "kho-v5-series":
        align = page_size << order
    areas = Kho(memory, abi=name).scratch

    assert all(phys % align == size % align == 0 for phys, size in areas)
    assert len(areas) == 3


def test_preserve_phys_of_parts_of_pages_is_einval():
    """Both address and size are whole pages."""
    for name in ALL[:2]:
        kho = Kho(PhysicalMemory("64MiB"), abi=name)
        for phys, nbytes in ((PAGE, 1), (PAGE + 1, PAGE), (PAGE, PAGE + 8), (PAGE, -PAGE)):
            assert errno_of(kho.preserve_phys, phys, nbytes) == errno.EINVAL
            assert errno_of(kho.unpreserve_phys, phys, nbytes) == errno.EINVAL


def test_restore_phys_takes_over_a_range():
    """The way back of preserve_phys, where there is one."""
    for name in ALL:
        memory = PhysicalMemory("64MiB")
        kho = Kho(memory, abi=name)
        phys = memory.alloc_pages(7)
        kho.preserve_pages(phys, 7)
        handover = hand_over(kho)
        incoming = Kho.boot(memory, handover, abi=name).incoming
        if name in ALL[:2]:
            assert errno_of(incoming.restore_phys, phys, 7 * PAGE + 1) == errno.EINVAL
            assert incoming.restore_phys(phys, 7 * PAGE) >= 3
        else:
            assert errno_of(incoming.restore_phys, phys, 7 * PAGE) == errno.EOPNOTSUPP


@pytest.mark.parametrize("name", ALL)
def test_incoming_calls_that_a_generation_lacks_are_eopnotsupp(name):
    """Nodes are there in kho-v5-series, subtrees in the others."""
    memory = PhysicalMemory("64MiB")
    incoming = Kho.validate(memory, hand_over(Kho(memory, abi=name)), abi=name)
    nodes = (
        lambda: incoming.get_node(None, "n"),
        lambda: incoming.get_nodes(None),
        lambda: incoming.get_prop(None, "p"),
        lambda: incoming.node_check_compatible(None, "c"),
    )
    subtrees = (lambda: incoming.retrieve_subtree("n"), lambda: incoming.load_subtree("n"))
    lacking, having = (subtrees, nodes) if name == ALL[0] else (nodes, subtrees)

    assert {errno_of(call) for call in lacking} == {errno.EOPNOTSUPP}
    assert errno.EOPNOTSUPP not in {errno_of(call) for call in having}


# ---- finalizing ----


@pytest.mark.parametrize("name", CLOSING)
def test_finalize_closes_the_map(name):
    """Nothing may be preserved or given up until it is undone; twice is EEXIST."""
    memory = PhysicalMemory("64MiB")
    kho = Kho(memory, abi=name)
    phys = memory.alloc_folio(0)
    kept = kho.alloc_preserve(1)
    array = np.array([phys], np.uint64)
    kho.finalize()

    for call, *arguments in (
        (kho.preserve_folio, phys, 0),
        (kho.unpreserve_folio, kept, 0),
        (kho.preserve_folios, array, 0),
        (kho.unpreserve_folios, array, 0),
        (kho.preserve_pages, phys, 1),
        (kho.unpreserve_pages, kept, 1),
        (kho.alloc_preserve, 1),
        (kho.unpreserve_free, kept),
    ):
        assert errno_of(call, *arguments) == errno.EBUSY
    assert errno_of(kho.finalize) == errno.EEXIST
    assert kho.finalized
    assert kho.frozen


@pytest.mark.parametrize("name", ABORTING)
def test_abort_forgets_everything_but_frees_nothing(name):
    """The blocks stay allocated; giving them up then is no error, and frees them."""
    memory = PhysicalMemory("64MiB")
    kho = Kho(memory, abi=name)
    free = memory.nr_free_pages()
    phys = kho.save_subtree("blob", b"x")
    folios = memory.alloc_folios(10, 2)
    kho.preserve_folios(folios, 2)
    kho.finalize()
    kho.abort()

    assert not kho.finalized
    assert kho.nr_preserved == kho.preserved_pages == kho.tree_pages == 0
    assert errno_of(kho.abort) == errno.ENOENT
    assert errno_of(kho.remove_subtree, phys) == errno.ENOENT
    kho.unpreserve_folios(folios, 2)
    memory.free_folios(folios)
    kho.unpreserve_free(phys)
    assert memory.nr_free_pages() == free
    kho.finalize()  # from here on the map knows again
    kho.abort()
    kho.finalize()
    kho.abort()


def test_unfreeze_keeps_everything():
    """Preservations and nodes stay, and can change again."""
    kho = Kho(PhysicalMemory("64MiB"), abi="kho-v5-series")
    node = KhoNode()
    kho.add_node(None, "n", node)
    phys = kho.alloc_preserve(PAGE)
    pages = kho.tree_pages
    kho.finalize()
    for call, *arguments in (
        (kho.add_node, None, "m", KhoNode()),
        (kho.add_prop, node, "p", b""),
        (kho.remove_node, None, "n"),
        (kho.remove_prop, node, "p"),
    ):
        assert errno_of(call, *arguments) == errno.EBUSY
    assert kho.tree_pages == pages + 1
    kho.unfreeze()

    assert kho.tree_pages == pages
    assert blocks(kho) == [(phys, 0)]
    assert kho.add_node(None, "n", node) == 1
    assert errno_of(kho.unfreeze) == errno.ENOENT


@pytest.mark.parametrize("name", CLOSING)
def test_notifiers_are_called_in_order(name):
    """By priority, then in order of registration; the undoing tells the same ones."""
    kho = Kho(PhysicalMemory("64MiB"), abi=name)
    calls = []

    def make(who):
        def notifier(event, which):
            assert which is kho
            calls.append((who, event))

        return notifier

    low, first, second = make("low"), make("first"), make("second")
    kho.register_notifier(low, priority=-1)
    kho.register_notifier(first)
    kho.register_notifier(second)
    assert errno_of(kho.register_notifier, first) == errno.EEXIST
    kho.finalize()
    (kho.unfreeze if kho.generation.inline else kho.abort)()

    assert calls == [
        (who, event)
        for event in (KhoEvent.FINALIZE, KhoEvent.ABORT)
        for who in ("first", "second", "low")
    ]
    kho.unregister_notifier(first)
    assert errno_of(kho.unregister_notifier, first) == errno.ENOENT


@pytest.mark.parametrize("name", ABORTING)
def test_add_subtree_in_a_notifier_joins_in_order(name):
    """Children stand in the order in which the notifiers add them."""
    memory = PhysicalMemory("64MiB")
    kho = Kho(memory, abi=name)

    def make(child):
        def notifier(event, which):
            if event is KhoEvent.FINALIZE:
                which.save_subtree(child, child.encode())

        return notifier

    for child in ("one", "two", "three"):
        kho.register_notifier(make(child))
    kho.finalize()

    assert [node.name for node in kho.root.root.children] == ["one", "two", "three"]
    assert list(read_image(memory, kho.handover(), name).subtrees) == ["one", "two", "three"]
    assert errno_of(kho.save_subtree, "four", b"4") == errno.EBUSY


@pytest.mark.parametrize("name", CLOSING)
@pytest.mark.parametrize("how", [-errno.EPERM, 1, OSError(errno.EPERM, "no"), RuntimeError("no")])
def test_notifier_that_fails_undoes_finalizing(name, how):
    """All are told of the undoing, and the error is the notifier's."""
    kho = Kho(PhysicalMemory("64MiB"), abi=name)
    told = []

    def fails(event, which):
        if event is KhoEvent.FINALIZE:
            if isinstance(how, Exception):
                raise how
            return how
        told.append("fails")
        raise RuntimeError("nobody can stop the undoing")

    kho.register_notifier(fails)
    kho.register_notifier(lambda event, which: told.append(event.name))
    with pytest.raises((OSError, RuntimeError)) as caught:
        kho.finalize()

    assert told == ["fails", "ABORT"]
    assert not kho.finalized
    assert not kho.frozen
    if isinstance(how, int):
        assert caught.value.errno == (errno.EPERM if how < 0 else errno.EINVAL)
    kho.unregister_notifier(fails)
    kho.finalize()


@pytest.mark.parametrize("name", ABORTING)
def test_handover_without_finalize_is_enoent(name):
    """The root tree is written by finalizing."""
    kho = Kho(PhysicalMemory("64MiB"), abi=name)

    assert errno_of(kho.handover) == errno.ENOENT
    assert errno_of(lambda: kho.root) == errno.ENOENT
    assert kho.root_bytes == 0


def test_kho_v1_never_finalized_is_refused():
    """Its map is 0 then, and the next kernel says so."""
    memory = PhysicalMemory("64MiB")
    kho = Kho(memory, abi="kho-v1")
    handover = kho.handover()
    with pytest.raises(HandoverError, match="never finalized"):
        Kho.validate(memory, handover, abi="kho-v1")
    kho.finalize()
    Kho.validate(memory, handover, abi="kho-v1")
    kho.unfinalize()
    with pytest.raises(HandoverError, match="never finalized"):
        Kho.validate(memory, handover, abi="kho-v1")


def test_kho_v1_finalize_is_repeatable_and_its_last_list_counts():
    """What is preserved in a new bitmap later is not in the list; the old list is freed."""
    memory = PhysicalMemory("512MiB")
    kho = Kho(memory, abi="kho-v1")
    handover = kho.handover()
    kho.finalize()
    before = read_image(memory, handover, "kho-v1").preserved
    free = memory.nr_free_pages()
    memory.claim(256 * MIB, 5)
    kho.preserve_folio(256 * MIB, 5)

    assert read_image(memory, handover, "kho-v1").preserved == before
    for _ in range(3):
        kho.finalize()
    assert read_image(memory, handover, "kho-v1").preserved == [*before, (256 * MIB, 5)]
    # a block of 32 pages, its bitmap, and one chunk more
    assert memory.nr_free_pages() == free - 34


@pytest.mark.parametrize("name", CHUNKS)
def test_finalize_without_memory_leaves_the_blocks(name):
    """A list that cannot be written changes nothing that is preserved, but for an abort."""
    memory = PhysicalMemory("64MiB")
    kho = Kho(memory, abi=name)
    kho.alloc_preserve(PAGE)
    before = blocks(kho)
    if name in ABORTING:
        kho.preserve_folio(kho.fdt_phys, 0)  # its bitmap is there
    taken = []
    while errno_of(lambda: taken.append(memory.alloc_folio(0))) is None:
        pass
    assert errno_of(kho.finalize) == errno.ENOMEM

    assert not kho.finalized
    assert blocks(kho) == ([] if name in ABORTING else before)
    memory.free_folios(np.array(taken, np.uint64))
    kho.finalize()


@pytest.mark.parametrize("name", CHUNKS)
def test_preserve_many_without_memory_leaves_everything(name):
    """A bulk call that runs out of pages for bitmaps frees those that it made."""
    memory = PhysicalMemory("2GiB")
    kho = Kho(memory, scratch=[], abi=name)
    kho.alloc_preserve(PAGE)
    taken = memory.alloc_folios(memory.nr_free_pages() - 1, 0)
    before = blocks(kho), kho.tree_pages, memory.nr_free_pages()
    step = 128 * MIB  # no two in one bitmap
    phys = np.arange(15, dtype=np.uint64) * np.uint64(step) + np.uint64(step)
    refused = errno_of(kho.preserve_folios, phys, 1)

    if name in ("kho-v1-notifier", "kho-v1"):  # a page each; smaller ones share a page
        assert refused == errno.ENOMEM
        assert before == (blocks(kho), kho.tree_pages, memory.nr_free_pages())
    else:
        wanted = np.arange(100, dtype=np.uint64) * np.uint64(16 * MIB)
        assert errno_of(kho.preserve_folios, wanted, 0) == errno.ENOMEM
    assert not (set(blocks(kho)) - set(before[0])) - {(at, 1) for at in phys.tolist()}
    memory.free_folios(taken)


def test_chunk_map_keeps_sets_of_keys():
    """Keys are those of the radix tree, walked by ascending order, then address."""
    memory = PhysicalMemory("1GiB")
    chunks = ChunkMap(memory, 512)
    wanted = [(0x1000, 0), (0x3000, 0), (0x20000000, 0), (0x2000, 1), (0x40000, 6)]
    keys = np.array([radix_key(*block) for block in wanted], np.uint64)
    assert chunks.add_keys(keys[::-1].copy()) == 5
    assert chunks.add_keys(keys) == 0

    assert chunks.keys().tolist() == keys.tolist()
    assert chunks.nr_keys == 5
    assert chunks.nr_bitmaps == 4
    assert chunks.publish() == chunks.first_chunk
    assert chunks.nr_chunks == 3
    with pytest.raises(KhoError):
        chunks.del_keys(np.array([radix_key(0x5000, 0)], np.uint64))
    chunks.del_keys(keys[:2].copy())
    assert not chunks.has_key(int(keys[0]))
    assert chunks.keys().tolist() == keys[2:].tolist()
    chunks.unpublish()
    assert chunks.first_chunk == 0
    chunks.free()
    assert chunks.nr_keys == chunks.nr_bitmaps == 0


@pytest.mark.parametrize("wrong", [0, 32, 500, 8192])
def test_chunk_map_of_another_bitmap_size_is_value_error(wrong):
    """A bitmap is a power of two of bytes, at most a page."""
    with pytest.raises(ValueError, match="bitmap_bytes"):
        ChunkMap(PhysicalMemory("64MiB"), wrong)


# ---- the one tree of kho-v5-series ----


def series(**kwargs) -> Kho:
    return Kho(PhysicalMemory("64MiB"), abi="kho-v5-series", **kwargs)


def test_add_node_and_prop_of_the_same_is_one():
    """The very same node or bytes again is 1, another of that name EEXIST."""
    kho = series()
    node, value = KhoNode(), bytearray(b"value")

    assert kho.add_node(None, "n", node) == 0
    assert kho.add_node(None, "n", node) == 1
    assert errno_of(kho.add_node, None, "n", KhoNode()) == errno.EEXIST
    assert errno_of(kho.add_node, None, "preserved-memory", KhoNode()) == errno.EEXIST
    assert errno_of(kho.add_node, None, "m", node) == errno.EINVAL
    assert errno_of(kho.add_node, node, "m", node) == errno.EINVAL
    assert kho.add_prop(node, "p", value) == 0
    assert kho.add_prop(node, "p", value) == kho.add_prop(node, "p", memoryview(value)) == 1
    assert errno_of(kho.add_prop, node, "p", bytes(value)) == errno.EEXIST
    assert errno_of(kho.add_prop, None, "compatible", b"x\0") == errno.EEXIST
    assert kho.remove_prop(node, "p") is value
    assert errno_of(kho.remove_prop, node, "p") == errno.ENOENT
    assert kho.remove_node(None, "n") is node
    assert errno_of(kho.remove_node, None, "n") == errno.ENOENT
    assert kho.add_node(None, "m", node) == 0


@pytest.mark.parametrize("name", ["", "a/b", "a\0b"])
def test_add_node_of_a_wrong_name_is_value_error(name):
    """As everywhere in trees."""
    with pytest.raises(ValueError, match="node name"):
        series().add_node(None, name, KhoNode())


def test_values_are_read_when_finalized():
    """A property is a reference until then; nodes nest as deep as one likes."""
    kho = series()
    value, node = bytearray(b"old"), None
    parent, path = None, []
    for level in range(1500):
        node = KhoNode()
        kho.add_node(parent, f"n{level}", node)
        parent, path = node, [*path, f"n{level}"]
    kho.add_prop(node, "p", value)
    value[:] = b"new"
    kho.add_string_prop(None, "note", "text")
    handover = kho.handover()
    value[:] = b"yet"
    kho.close()
    incoming = Kho.boot(kho.memory, handover, abi="kho-v5-series").incoming
    here = None
    for name in path:
        here = incoming.get_node(here, name)

    assert bytes(incoming.get_prop(here, "p")) == b"new"
    assert incoming.get_prop(here, "q") is None
    assert bytes(incoming.get_prop(None, "note")) == b"text\0"
    assert [name for name, _ in incoming.get_nodes(None)] == ["preserved-memory", "n0"]
    assert errno_of(incoming.get_node, None, "n1") == errno.ENOENT
    incoming.node_check_compatible(None, "kho-v1")
    assert errno_of(incoming.node_check_compatible, None, "kho-v2") == errno.EINVAL
    assert errno_of(incoming.node_check_compatible, here, "x") == errno.ENOENT


def test_tree_above_fdt_max_is_enomem_and_undone():
    """fdt_max is what the next kernel makes room for."""
    kho = series(fdt_max="64KiB")
    kho.add_prop(None, "big", bytes(1 << 16))
    assert errno_of(kho.handover) == errno.ENOMEM

    assert not kho.frozen
    kho.remove_prop(None, "big")
    assert kho.handover().fdt_len == 1 << 16


def test_fdt_max_may_change_until_finalized():
    """As by its file in debugfs."""
    kho = series()
    kho.place_segments()
    kho.fdt_max = "1MiB"
    assert kho.handover().fdt_len == MIB

    with pytest.raises(KhoError) as caught:
        kho.fdt_max = "2MiB"
    assert caught.value.errno == errno.EBUSY
    kho.unfreeze()
    kho.fdt_max = "128KiB"
    assert kho.handover().fdt_len == 1 << 17


def test_handover_of_an_inline_tree_lies_in_scratch():
    """It is copied to a segment there, 64 KiB aligned, at the same place each time."""
    memory = PhysicalMemory("256MiB")
    kho = Kho(memory, abi="kho-v5-series")
    kho.place_segments()
    free = memory.nr_free_pages()
    first = kho.handover()
    kho.unfreeze()
    kho.add_prop(None, "more", b"more")

    assert first == kho.handover()
    assert first.fdt_phys % (1 << 16) == 0
    assert any(at <= first.fdt_phys < at + size for at, size in kho.scratch)
    assert memory.nr_free_pages() == free  # nothing was preserved, so no map was written


def test_null_map_of_kho_v5_series_preserves_nothing():
    """0 means that nothing is preserved."""
    kho = series()
    incoming = Kho.validate(kho.memory, kho.handover(), abi="kho-v5-series")

    assert incoming.nr_preserved == incoming.tree_pages == 0


# ---- hostile lists ----


def written(name: str = "kho-v1") -> tuple[PhysicalMemory, Handover, int, int]:
    """A handover with one bitmap of order 0 and one of order 1; its two chunks."""
    memory = PhysicalMemory("256MiB")
    kho = Kho(memory, abi=name)
    folio = memory.alloc_folio(1)
    kho.preserve_folio(folio, 1)
    if not kho.generation.inline:
        kho.save_subtree("blob", b"x")
    else:
        kho.alloc_preserve(1)
    handover = hand_over(kho)
    head = kho.root_phys
    (following,) = struct.unpack_from("<Q", memory.view(head, 8))
    kho.close()
    return memory, handover, head, following


@pytest.mark.parametrize("name", CHUNKS)
@pytest.mark.parametrize(
    ("offset", "form", "value", "rule"),
    [
        (0, "<Q", "self", "overlaps"),
        (0, "<Q", "next+8", "misaligned"),
        (0, "<Q", 1 << 40, "not in RAM"),
        (0, "<Q", 200 * MIB, "never written"),
        (0, "<Q", "scratch", "scratch"),
        (0, "<Q", "fdt", "preserved map"),
        (8, "<I", 64, "order 64"),
        (8, "<I", 0xFFFFFFFF, "order"),
        (12, "<I", 256, "more than fit"),
        (12, "<I", 0xFFFFFFFF, "more than fit"),
        (16, "<Q", 4096, "starts at"),
        (16, "<Q", 1 << 63, "not in RAM"),
        (24, "<Q", 0, "misaligned"),
        (24, "<Q", 8, "misaligned"),
        (24, "<Q", 200 * MIB, "never written"),
        (24, "<Q", "self", "overlaps"),
        (24, "<Q", "scratch", "scratch"),
        (24, "<Q", 1 << 50, "not in RAM"),
    ],
)
def test_validate_of_a_broken_chunk_is_refused(name, offset, form, value, rule):
    """Each field of a chunk that leads astray is named; nothing is written, no hole is read."""
    memory, handover, head, following = written(name)
    values = {
        "self": head,
        "next+8": following + 8,
        "scratch": handover.scratch_phys & -PAGE,
        "fdt": handover.fdt_phys,
    }
    struct.pack_into(form, memory.view(head, PAGE), offset, values.get(value, value))
    before = os.fstat(memory.fd).st_blocks
    with pytest.raises(HandoverError, match=rule):
        Kho.validate(memory, handover, abi=name)

    assert before == os.fstat(memory.fd).st_blocks


@pytest.mark.parametrize("name", CHUNKS)
def test_validate_of_a_bitmap_listed_twice_is_refused(name):
    """So that nobody makes a small image do a lot of work."""
    memory, handover, head, following = written(name)
    bitmap = bytes(memory.view(head + 24, 8))
    memory.view(following + 24, 8)[:] = bitmap
    with pytest.raises(HandoverError, match="twice"):
        Kho.validate(memory, handover, abi=name)


@pytest.mark.parametrize("name", CHUNKS)
def test_validate_of_blocks_that_overlap_is_refused(name):
    """A block inside another, recorded in two orders."""
    memory, handover, head, following = written(name)
    start, bitmap = struct.unpack_from("<QQ", memory.view(head + 16, 16))
    _, wide = struct.unpack_from("<QQ", memory.view(following + 16, 16))
    bits = int.from_bytes(memory.view(wide, 512), "little")
    block = bits.bit_length() - 1
    memory.view(bitmap + block * 2 // 8, 1)[0] |= 1 << block * 2 % 8
    with pytest.raises(HandoverError, match="overlaps"):
        Kho.validate(memory, handover, abi=name)

    assert start == 0


# ---- live update ----


@pytest.fixture
def log():
    return Log()


def running(name, log, **kwargs):
    """A running kernel with everything requested, and something preserved by somebody else."""
    machine = small_machine(kwargs.pop("memory", "64MiB"))
    kernel = small_kernel(machine, log, [log.subsystem("sub")], kho_abi=name, **kwargs).boot()
    kernel.devices.request("*")
    kernel.kho.alloc_preserve(PAGE)
    if not kernel.kho.generation.inline:
        kernel.kho.save_subtree("other", b"other")
    kernel.kho.preserve_folio(kernel.memory.alloc_folio(1), 1)
    return machine, kernel


def prepare_and_reboot(kernel):
    """One of the two fails."""
    kernel.luo.prepare()
    kernel.luo.reboot()


def state_of(kernel):
    """All that a failed update must leave; pages of the map may stay, as in Linux."""
    found = snapshot(kernel)
    del found["free_blocks"]
    found["free_pages"] += kernel.kho.tree_pages
    found["queue"] = dict(kernel.kho._queue)
    return found


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("event", ["PREPARE", "REBOOT"])
@pytest.mark.parametrize("who", [("subsystem", "sub", None), ("driver", "nvme", "pci0/disk"),
                                 ("bus", "pci", "pci0/port")], ids=lambda who: who[0])  # fmt: skip
def test_failed_event_leaves_everything_as_before(name, event, who, log):
    """In every generation, whatever finalizing has done by then."""
    _, kernel = running(name, log)
    before = state_of(kernel)
    for _ in range(3):
        log.faults[(event, *who)] = -errno.EIO
        with pytest.raises(CallbackError) as caught:
            prepare_and_reboot(kernel)
        assert caught.value.rolled_back
        assert before == state_of(kernel)
        assert kernel.kho.generation.finalize is None or not kernel.kho.finalized


@pytest.mark.parametrize("name", ALL)
def test_cancel_after_reboot_and_handover_leaves_everything_as_before(name, log):
    """Also when the map was written and the tree copied."""
    _, kernel = running(name, log)
    before = state_of(kernel)
    for _ in range(3):
        kernel.luo.prepare()
        kernel.luo.cancel()
        assert before == state_of(kernel)
        kernel.luo.prepare()
        kernel.luo.reboot()
        kernel.kho.handover()
        kernel.luo.cancel()
        after = state_of(kernel)
        if kernel.kho.generation.inline:  # its segment in scratch stays for the next time
            assert after["free_pages"] <= before["free_pages"]
        assert {**before, "free_pages": 0} == {**after, "free_pages": 0}
        before = after


@pytest.mark.parametrize("name", ALL)
def test_successor_of_another_generation_is_refused_and_nothing_lost(name, log):
    """It cannot read what it is given; the old kernel goes on, and updates to its own kind."""
    machine, kernel = running(name, log)
    others = [other for other in ALL if other != name]
    if name.startswith("kho-v1"):  # bytes do not tell these apart where nothing is amiss
        others = [other for other in others if not other.startswith("kho-v1")]
    before = state_of(kernel)
    for other in others:
        kernel.luo.prepare()
        kernel.kexec_load(small_kernel(machine, log, kho_abi=other))
        with pytest.raises(SuccessorError):
            kernel.kexec()
        assert {**before, "free_pages": 0} == {**state_of(kernel), "free_pages": 0}
    kernel = update(kernel, small_kernel(machine, log, [log.subsystem("sub")], kho_abi=name))

    assert kernel.luo.state.name == "UPDATED"
    assert kernel.luo.finish().unreclaimed == ()


@pytest.mark.parametrize("name", ALL)
def test_live_update_again_and_again(name, log):
    """Content of the slots, checked by the callbacks, comes over time after time."""
    machine, kernel = running(name, log)
    for _ in range(4):
        subsystems = [log.subsystem("sub")]
        kernel = update(kernel, small_kernel(machine, log, subsystems, kho_abi=name))
        assert kernel.devices.reclaimed.sum() == len(kernel.devices)
        kernel.luo.finish()
        kernel.devices.request("*")
    assert kernel.luo.state.name == "NORMAL"


@pytest.mark.parametrize("name", ALL)
def test_ordinary_kexec_is_not_a_live_update(name, log):
    """Without PREPARE nothing of LUO is handed over, in any generation."""
    machine, kernel = running(name, log)
    kernel.kexec_load(small_kernel(machine, log, kho_abi=name))
    kernel = kernel.kexec()

    assert kernel.luo.state.name == "NORMAL"


@pytest.mark.parametrize("name", ALL)
def test_data_set_in_reboot_comes_over(name, log):
    """Where PREPARE has closed the map, REBOOT still patches LUO's node in place."""
    machine, kernel = running(name, log)
    seen = []
    log.hooks["PREPARE", "subsystem", "sub", None] = lambda context: setattr(context, "data", 1)
    log.hooks["REBOOT", "subsystem", "sub", None] = lambda context: setattr(context, "data", 2)
    log.hooks["RESTORE", "subsystem", "sub", None] = lambda context: seen.append(context.data)
    update(kernel, small_kernel(machine, log, [log.subsystem("sub")], kho_abi=name))

    assert seen == [2]


@pytest.mark.parametrize("name", ALL)
def test_preserve_in_reboot_is_ebusy_where_prepare_closed_the_map(name, log):
    """Its author learns of it by a failed update, which is rolled back."""
    _, kernel = running(name, log)
    before = state_of(kernel)
    log.hooks["REBOOT", "subsystem", "sub", None] = lambda context: context.kho.alloc_preserve(1)
    kernel.luo.prepare()
    if name in ABORTING:
        with pytest.raises(CallbackError) as caught:
            kernel.luo.reboot()
        assert caught.value.errno == errno.EBUSY
        assert before == state_of(kernel)
    else:
        assert kernel.luo.reboot()


@pytest.mark.parametrize("name", CLOSING)
def test_prepare_after_somebody_finalized_is_ebusy(name, log):
    """As in RFC v1; the finalizing stays."""
    _, kernel = running(name, log)
    kernel.kho.finalize()
    assert errno_of(kernel.luo.prepare) == errno.EBUSY

    assert kernel.kho.finalized
    assert kernel.luo.state.name == "NORMAL"


def test_prepare_of_records_above_fdt_max_is_e2big(log):
    """In PREPARE, where it can be cancelled, not at the jump."""
    _, kernel = running("kho-v5-series", log)
    before = state_of(kernel)
    kernel.kho.fdt_max = 256
    assert errno_of(kernel.luo.prepare) == errno.E2BIG

    assert before == state_of(kernel)


def test_luo_node_of_kho_v5_series_is_inline(log):
    """RFC v1's node with its version, and below it what LUO itself needs."""
    machine, kernel = running("kho-v5-series", log)
    kernel.luo.prepare()
    kernel.luo.reboot()
    handover = kernel.kho.handover()
    tree = read_image(machine.memory, handover, "kho-v5-series").tree
    node = tree.children["liveupdate_orchestrator"]

    assert node.properties["version"] == struct.pack("<II", 1, 0)
    assert len(node.children["devices"].children) == len(kernel.devices)
    assert "data" in node.children["subsystems"].children["sub"].properties


def test_kernel_with_a_bug_of_its_generation_has_it(log):
    """The name is given to the kernel; one of another generation is refused."""
    machine = small_machine(PhysicalMemory("64MiB"))
    kernel = small_kernel(machine, log, kho_abi="kho-v5-series", kho_bugs=("kho-v5-split",)).boot()
    kernel.kho.preserve_phys(PAGE, 7 * PAGE)
    assert blocks(kernel.kho) == [(7 * PAGE, 0), (4 * PAGE, 1), (0, 2)]

    with pytest.raises(ValueError, match="kho-v2-depth"):
        small_kernel(machine, log, kho_bugs=("kho-v2-depth",))


@pytest.mark.parametrize("name", ALL)
def test_live_update_to_another_process(name):
    """The second process reads the generation that its image names."""
    machine = Machine("256MiB", small_machine().devices)
    image = KernelImage("luo.drivers:kernel", args={"kho_abi": name})
    kernel = image.build(machine).boot()
    kernel.devices.request("*")
    report = live_update(kernel, image)
    try:
        assert report.to_dict()["kho_abi"] == name
        assert report.states == ["normal", "prepared", "updated", "normal"]
        assert report.error is None
    finally:
        report.kernel.close()
