"""Many blocks at once against the plain model: every shape of array, map and memory."""

import contextlib
import errno
import threading

import model
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luo.abi import GENERATIONS
from luo.errors import KhoError
from luo.kho import Incoming, Kho
from luo.memory import PhysicalMemory

MIB, GIB = 1 << 20, 1 << 30
MACHINES = [
    {"ranges": [(0, 256 * MIB, 0)]},
    {"ranges": [(GIB + 4096, 64 * MIB + 12288, 0), (GIB + 80 * MIB, 200 * MIB, 1)]},
    {"ranges": [(MIB, 15 * MIB, 0), (1 << 32, 64 * MIB, 1), (1 << 36, 64 * MIB, 0)]},
    {"ranges": [(0, 512 * MIB, 0), (1 << 33, 512 * MIB, 1)], "page_size": 16384},
    {"ranges": [(1 << 30, 1 << 30, 0)], "page_size": 65536},
]

# What an array is made of: (shape, where in memory, how many, order)
pieces = st.lists(
    st.tuples(
        st.sampled_from(["run", "random", "ascending", "descending", "same"]),
        st.floats(0, 1),
        st.integers(1, 300),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=8,
)


def machine(which: int, abi: str) -> tuple[Kho, model.KhoModel]:
    """A kernel with scratch that ends in the midst of a leaf, and its model."""
    memory = PhysicalMemory(**MACHINES[which])
    start, nbytes, _ = memory.ranges[-1]
    area = memory.page_size << memory.max_order
    place = (start + nbytes // 2) // memory.page_size * memory.page_size
    kho = Kho(memory, scratch=[(place, area)] if area < nbytes // 2 else [], abi=abi)
    plain = model.KhoModel(memory.ranges, list(kho.scratch), memory.page_size, abi=abi)
    plain.preserved = set(listed(kho))
    return kho, plain


def listed(kho: Kho) -> list[model.Block]:
    """What *kho* preserves, as it lists it."""
    return [(int(phys), int(order)) for phys, order in zip(*kho.preserved(), strict=True)]


def state(kho: Kho) -> tuple:
    """All that a refused call must leave as it was."""
    free = [array.tolist() for array in kho.memory.free_blocks()]
    return listed(kho), kho.nr_preserved, kho.preserved_pages, kho.tree_pages, free


def blocks_of(kho: Kho, pieces, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Aligned blocks in RAM, though some may lie in scratch or reach over an end."""
    rng = np.random.default_rng(seed)
    page, ranges = kho.memory.page_size, kho.memory.ranges
    phys, orders = [], []
    for shape, where, count, order in pieces:
        start, nbytes, _ = ranges[int(where * (len(ranges) - 1) + 0.5)]
        size = page << order
        room = max(nbytes // size - 1, 1)
        first = int(where * room) % room
        index = {
            "run": lambda first=first, count=count: first + np.arange(count),
            "same": lambda first=first, count=count: np.full(count, first),
            "descending": lambda first=first, count=count: first + np.arange(count)[::-1],
            "ascending": lambda room=room, count=count: np.sort(rng.integers(0, room, count)),
            "random": lambda room=room, count=count: rng.integers(0, room, count),
        }[shape]()
        head = -(-start // size) * size
        phys.append(head + index.astype(np.uint64) * np.uint64(size))
        orders.append(np.full(count, order, np.uint8))
    return np.concatenate(phys).astype(np.uint64), np.concatenate(orders)


def free_blocks(memory: PhysicalMemory) -> list[list[int]]:
    """What *memory* has free, by order and address."""
    return [array.tolist() for array in memory.free_blocks()]


def copy_of(memory: PhysicalMemory, incoming: Incoming) -> PhysicalMemory:
    """Other memory in which the same blocks were taken, one by one."""
    other = PhysicalMemory(ranges=memory.ranges, page_size=memory.page_size)
    other.reserve_scratch(memory.scratch)
    for columns in (memory.allocated_blocks(), incoming.unrestored()):
        for phys, order in zip(*columns, strict=True):
            other.claim(int(phys), int(order))
    return other


def preserve(kho: Kho, phys: np.ndarray, orders: np.ndarray | int) -> int:
    """The errno of the call."""
    try:
        kho.preserve_folios(phys, orders)
    except KhoError as error:
        return error.errno or -1
    return 0


@given(
    which=st.sampled_from(range(len(MACHINES))),
    abi=st.sampled_from(sorted(GENERATIONS)),
    pieces=pieces,
    one_order=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_preserve_folios_of_any_shape_is_what_the_model_preserves(
    which, abi, pieces, one_order, seed
):
    """What is refused changes nothing; what is allowed goes in, and again, and half comes out."""
    kho, plain = machine(which, abi)
    if one_order:
        pieces = [(*piece[:3], pieces[0][3]) for piece in pieces]
    phys, orders = blocks_of(kho, pieces, seed)
    given_orders = int(orders[0]) if one_order else orders
    before = state(kho)
    blocks = list(zip(phys.tolist(), orders.tolist(), strict=True))
    expected = plain.preserve_folios(blocks)

    assert expected == preserve(kho, phys, given_orders)
    if expected:
        assert before == state(kho)
        allowed = np.array([plain.preserve_folio(*block) == 0 for block in blocks])
        phys, orders = phys[allowed], orders[allowed]
        given_orders = given_orders if one_order else orders
        assert preserve(kho, phys, given_orders) == 0
    assert plain.walk() == listed(kho)
    pages = sum(1 << order for _, order in plain.preserved)
    assert (len(plain.preserved), pages) == (kho.nr_preserved, kho.preserved_pages)

    assert kho.preserve_folios(phys, given_orders) == 0
    half = len(phys) // 2
    kept = set(zip(phys[half:].tolist(), orders[half:].tolist(), strict=True))
    kho.unpreserve_folios(phys[half:], orders[half:])
    assert len(kept) == len(plain.preserved) - kho.nr_preserved
    assert kho.preserve_folios(phys, given_orders) == len(kept)
    assert plain.walk() == listed(kho)


@pytest.mark.parametrize("abi", GENERATIONS)
@pytest.mark.parametrize(
    ("at", "value", "rule"),
    [
        (0, 4096 + 8, "misaligned"),
        (5000, 4096 + 8, "misaligned"),
        (777, 1 << 45, "not in RAM"),
        (4095, (1 << 64) - 4096, "not in RAM"),
        (3000, 130 * MIB, "overlaps scratch"),
        (9999, 256 * MIB, "not in RAM"),
    ],
)
@pytest.mark.parametrize("ascending", [True, False])
def test_preserve_folios_with_a_wrong_one_names_it_and_changes_nothing(
    abi, at, value, rule, ascending
):
    """One among ten thousand, in runs or shuffled."""
    kho = Kho(PhysicalMemory("256MiB"), scratch=[(129 * MIB, 2 * MIB)], abi=abi)
    phys = np.arange(10_000, dtype=np.uint64) * np.uint64(4096) + np.uint64(64 * MIB)
    if not ascending:
        np.random.default_rng(1).shuffle(phys)
    phys[at] = value
    before = state(kho)
    with pytest.raises(KhoError, match=f"{value:#x}/order 0: {rule}") as error:
        kho.preserve_folios(phys, 0)

    assert error.value.errno == errno.EINVAL
    assert before == state(kho)


@pytest.mark.parametrize("abi", ["kho-v4", "kho-v1", "kho-v1-512"])
def test_preserve_folios_without_memory_for_the_map_changes_nothing(abi):
    """Some of the leaves can be had, then no more."""
    memory = PhysicalMemory("1GiB")
    kho = Kho(memory, scratch=[], abi=abi)
    rng = np.random.default_rng(2)
    phys = (rng.integers(1, 1 << 18, 50_000).astype(np.uint64)) << np.uint64(12)
    spare = memory.alloc_folios(memory.nr_free_pages() - 2, 0)
    before = state(kho)
    assert preserve(kho, phys, 0) == errno.ENOMEM
    assert before == state(kho)
    memory.free_folios(spare)

    assert kho.preserve_folios(phys, 0) == len(np.unique(phys))


def test_preserve_folios_of_debug_kho_looks_at_each_block():
    """With debug=True what is not allocated is refused, alone in its leaf or in a run."""
    memory = PhysicalMemory("256MiB")
    kho = Kho(memory, scratch=[], debug=True)
    phys = memory.alloc_folios(20_000, 0)
    assert kho.preserve_folios(phys, 0) == 20_000
    kho.unpreserve_folios(phys, 0)
    memory.free(int(phys[10_000]))
    for array in (phys, np.random.default_rng(3).permutation(phys)):
        with pytest.raises(KhoError, match=f"{int(phys[10_000]):#x}/order 0: not allocated"):
            kho.preserve_folios(array, 0)


def test_preserve_folios_of_an_array_that_changes_meanwhile_is_safe():
    """Another thread writes to the addresses: a call fails or not, and never marks what is not RAM.

    Nothing outside RAM, misaligned or in scratch is ever in the map.
    """
    memory = PhysicalMemory("256MiB")
    kho = Kho(memory, scratch=[(128 * MIB, 64 * MIB)])
    good = np.random.default_rng(4).integers(1, 1 << 15, 200_000).astype(np.uint64) << np.uint64(12)
    phys, bad = good.copy(), good.copy()
    bad[::7] = np.uint64(150 * MIB)
    bad[3::11] = np.uint64((1 << 64) - 4096)
    bad[5::13] += np.uint64(8)
    orders = np.zeros(len(phys), np.uint8)
    stop = threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            phys[:], orders[::5] = bad, 200
            phys[:], orders[:] = good, 0

    thread = threading.Thread(target=scribble, daemon=True)
    thread.start()
    try:
        outcomes = {preserve(kho, phys, 0) for _ in range(100)}
        for _ in range(20):
            with contextlib.suppress(ValueError):  # it was 200 when it was looked at
                outcomes.add(preserve(kho, phys, orders))
    finally:
        stop.set()
        thread.join()
    found, _ = kho.preserved()

    assert outcomes <= {0, errno.EINVAL}
    assert not np.any(found % np.uint64(4096))
    assert not np.any((found >= 128 * MIB) & (found < 192 * MIB))
    assert int(found.max()) < 256 * MIB


@given(
    which=st.sampled_from(range(len(MACHINES))),
    abi=st.sampled_from(sorted(GENERATIONS)),
    pieces=pieces,
    seed=st.integers(0, 1 << 32),
    room=st.integers(1, 200),
)
def test_preserved_chunks_of_any_room_are_what_preserved_returns(which, abi, pieces, seed, room):
    """A walk goes on where its array was full, in the midst of a word too."""
    kho, _ = machine(which, abi)
    phys, orders = blocks_of(kho, pieces, seed)
    for block in zip(phys.tolist(), orders.tolist(), strict=True):
        preserve(kho, np.array(block[:1], np.uint64), block[1])
    whole = listed(kho)
    parts = [np.column_stack(part).tolist() for part in kho.preserved_chunks(room)]

    assert whole == [tuple(block) for part in parts for block in part]
    assert all(len(part) == room for part in parts[:-1])


@given(
    which=st.sampled_from([0, 1, 3]),
    pieces=pieces,
    seed=st.integers(0, 1 << 32),
    wrong=st.booleans(),
)
def test_restore_folios_of_any_shape_takes_each_block_once(which, pieces, seed, wrong):
    """In runs or alone, with an array's orders; one that is not there leaves all as it was."""
    kho, _ = machine(which, "kho-v4")
    memory = kho.memory
    phys, orders = blocks_of(kho, pieces, seed)
    chosen = {}
    for at, order in zip(phys.tolist(), orders.tolist(), strict=True):
        end = at + (memory.page_size << order)
        if any(at < start + nbytes and start < end for start, nbytes in kho.scratch):
            continue
        with contextlib.suppress(KhoError):  # over an end, or over another one
            memory.claim(at, order)
            chosen[at] = order
    heads = np.array(list(chosen), np.uint64)
    kho.preserve_folios(heads, np.array(list(chosen.values()), np.uint8))
    incoming = Kho.boot(memory, kho.handover()).incoming
    assert incoming is not None
    assert free_blocks(memory) == free_blocks(copy_of(memory, incoming))
    before = incoming.nr_unrestored, memory.nr_allocated
    if wrong and len(heads):
        with pytest.raises(KhoError, match="restored before"):
            incoming.restore_folios(np.append(heads, heads[-1]))
        assert before == (incoming.nr_unrestored, memory.nr_allocated)

    assert list(chosen.values()) == incoming.restore_folios(heads).tolist()
    assert (before[0] - len(heads), before[1] + len(heads)) == (
        incoming.nr_unrestored,
        memory.nr_allocated,
    )
    assert [chosen[int(at)] for at in heads] == [memory.order_of(int(at)) for at in heads]
