"""The preserved map: filling it, reading it, publishing it.

The same order-0 folios for every contender, as physical addresses (page numbers for those that know
no addresses). Trees, arenas, bitmaps and result arrays of all are touched before the clock starts.
"""

import struct
from collections.abc import Callable
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import peers
import pytest
from conftest import Plan
from race import Contender, Results

from luo import abi
from luo.kho import Kho
from luo.memory import PhysicalMemory

SEED = 1
PAGE = 4096
GIB = 1 << 30
START = GIB  # folios begin here; KHO's own pages, those of its map included, lie below
SET_MOST = 1_000_000  # more page numbers take a Python set gigabytes
UNORDERED_MOST = 1_000_000  # more in no order take CRoaring half a minute
PUBLISHED = "577 ms to preserve and serialize 48 GiB, 469 ms with a table tree, over 2 s to read"

entries = pytest.mark.entries


# ---- folios ----


@lru_cache(1)  # the same ones for several rows; nobody writes to them
def scattered(n: int, span: int) -> np.ndarray:
    """Return addresses of n different pages anywhere in *span* bytes, in no order."""
    rng = np.random.default_rng(SEED)
    pfns = rng.integers(0, span // PAGE, n + n // 8 + 64, dtype=np.uint64)
    pfns.sort()  # numpy's unique() takes 20 times as long
    pfns = pfns[np.append(True, pfns[1:] != pfns[:-1])]
    rng.shuffle(pfns)
    return pfns[:n] * np.uint64(PAGE) + np.uint64(START)


def in_order(nbytes: int) -> np.ndarray:
    """Return addresses of all pages of *nbytes* bytes, ascending."""
    return (np.arange(nbytes // PAGE, dtype=np.uint64) * np.uint64(PAGE)) + np.uint64(START)


def every(share: float, span: int) -> np.ndarray:
    """Return addresses of a share of the pages in *span* bytes, ascending, at random."""
    rng = np.random.default_rng(SEED)
    here = rng.random(span // PAGE) < share
    return np.flatnonzero(here).astype(np.uint64) * np.uint64(PAGE) + np.uint64(START)


def kho(span: int, name: str = "kho-v4", scratch: list[tuple[int, int]] | None = None) -> Kho:
    """Return a KHO with nothing preserved, whose map finds its pages touched."""
    memory = PhysicalMemory(span)
    made = Kho(memory, abi=name, scratch=scratch or [])
    memory.prefault_free(span // PAGE // 8 * 9 // 8 + (8 << 20))  # one bit a page, and nodes above
    return made


class Folios:
    """The same folios for all, and what each fills with them."""

    def __init__(self, phys: np.ndarray) -> None:
        self.phys = phys
        self.sorted = np.sort(phys)
        self.pfns = phys // np.uint64(PAGE)
        self.span = (int(self.sorted[-1]) // GIB + 2) * GIB
        self.walk, self.no_walk = peers.adapter("walk")
        self.croaring, self.no_croaring = peers.adapter("croaring")
        leaves = self.span // (PAGE << 15) + 1
        self.tree = peers.Tree(leaves + leaves // 512 + 64)
        self.bitmap = peers.touched(self.span // PAGE // 8)
        self.numpy = peers.find("numpy")

    def filled(self) -> Kho:
        made = kho(self.span)
        made.preserve_folios(self.phys, 0)
        return made

    def check(self, map_: Kho) -> None:
        """Check that a map has these folios, and below them only KHO's own pages."""
        found, orders = map_.preserved()
        own = int(np.searchsorted(found, START))
        assert own < 64
        assert np.array_equal(found[own:], self.sorted)
        assert not orders.any()

    def cleared_tree(self) -> None:
        self.tree.clear()

    def cleared_bitmap(self) -> None:
        self.bitmap[:] = 0


# ---- preserving ----


def preserve(plan: Plan, phys: np.ndarray, seconds: float = 20.0, **info: Any) -> Results:
    """Fill an empty map with all of them."""
    folios = Folios(phys)
    numbers = None if folios.no_croaring else folios.croaring.numbers(folios.pfns)
    ordered = len(phys) <= UNORDERED_MOST or bool((phys[1:] > phys[:-1]).all())
    few = folios.pfns.tolist() if len(phys) <= SET_MOST else []

    def ours(map_: Kho) -> Kho:
        map_.preserve_folios(phys, 0)
        return map_

    def walk(_: None) -> None:
        folios.walk.preserve(folios.tree, phys)

    def check_walk(_: None) -> None:
        found, orders = np.zeros(len(phys), np.uint64), np.ones(len(phys), np.uint8)
        assert folios.walk.decode(folios.tree, found, orders) == len(phys)
        assert np.array_equal(found, folios.sorted)
        assert not orders.any()

    def check_croaring(made: Any) -> None:
        assert np.array_equal(np.array(made, np.uint64), folios.sorted // np.uint64(PAGE))

    def check_numpy(_: None) -> None:
        found = folios.numpy.decode(folios.bitmap)
        assert np.array_equal(found.astype(np.uint64) * np.uint64(PAGE), folios.sorted)

    return plan.race(
        [
            Contender("luo", ours, lambda: kho(folios.span), folios.check),
            Contender("walk", walk, folios.cleared_tree, check_walk, folios.no_walk),
            Contender(
                "croaring",
                lambda: folios.croaring.preserve(numbers),
                check=check_croaring,
                absent=folios.no_croaring
                or ("" if ordered else f"croaring: only to {UNORDERED_MOST:,} folios in no order"),
            ),
            Contender(
                "numpy",
                lambda _: folios.numpy.preserve(folios.bitmap, folios.pfns),
                folios.cleared_bitmap,
                check_numpy,
            ),
            Contender(
                "set",
                lambda: set(few),
                check=lambda made: check_croaring(sorted(made)),
                absent="" if few else f"set: only to {SET_MOST:,} folios",
            ),
        ],
        seconds,
        items=len(phys),
        bytes=len(phys) * PAGE,
        abi="kho-v4",
        seed=SEED,
        **info,
    )


def preserve_random(plan: Plan, size: tuple[int, int]) -> Results:
    """Anywhere in so many GiB."""
    n, gib = size
    return preserve(plan, scattered(n, gib * GIB), 40.0, span=gib * GIB)


@entries(
    "map.preserve.random",
    ["luo", "walk", "croaring", "numpy", "set"],
    smoke=[(10_000, 1)],
    quick=[(500_000, 64)],
    full=[(10_000_000, 1024)],
)
def bench_map_preserve_random(replay: Callable[..., None], size: tuple[int, int]) -> None:
    """Preserve folios of one page in no order, all in one call."""
    replay(preserve_random, size)


def preserve_ordered(plan: Plan, gib: int) -> Results:
    """All pages of so many GiB."""
    return preserve(plan, in_order(gib * GIB), 30.0, published=PUBLISHED)


@entries(
    "map.preserve.ordered",
    ["luo", "walk", "croaring", "numpy", "set"],
    smoke=[1],
    quick=[4],
    full=[48],
)
def bench_map_preserve_ordered(replay: Callable[..., None], size: int) -> None:
    """Preserve all folios of one page in so many GiB, in order, all in one call."""
    replay(preserve_ordered, size)


# ---- decoding ----


def decode(plan: Plan, phys: np.ndarray, seconds: float = 15.0, **info: Any) -> Results:
    """Read a map into arrays that are given, and that all use in turn."""
    folios = Folios(phys)
    map_ = folios.filled()
    room = map_.nr_preserved
    found, orders = np.zeros(room, np.uint64), np.zeros(room, np.uint8)
    bitmap = None
    if not folios.no_walk:
        folios.walk.preserve(folios.tree, phys)
    if not folios.no_croaring:
        bitmap = folios.croaring.preserve(folios.croaring.numbers(folios.sorted // np.uint64(PAGE)))
    folios.numpy.preserve(folios.bitmap, folios.pfns)

    def check(made: Any) -> None:
        own = int(np.searchsorted(made[0], START)) if isinstance(made, tuple) else 0
        assert np.array_equal(found[own : own + len(phys)], folios.sorted)
        assert not orders[: own + len(phys)].any()
        found[:], orders[:] = 0, 1  # for the next one to fill

    def check_numbers(numbers: Any) -> None:
        assert np.array_equal(np.array(numbers, np.uint64) * np.uint64(PAGE), folios.sorted)

    return plan.race(
        [
            Contender("luo", lambda: map_.preserved(out=(found, orders)), check=check),
            Contender(
                "callback walk",
                lambda: folios.walk.decode(folios.tree, found, orders),
                check=check,
                absent=folios.no_walk,
            ),
            Contender(
                "croaring",
                lambda: folios.croaring.decode(bitmap),
                check=check_numbers,
                absent=folios.no_croaring,
            ),
            Contender("numpy", lambda: folios.numpy.decode(folios.bitmap), check=check_numbers),
        ],
        seconds,
        items=len(phys),
        bytes=len(phys) * PAGE,
        abi="kho-v4",
        seed=SEED,
        **info,
    )


def decode_shape(plan: Plan, size: tuple[str, int, int]) -> Results:
    """``sparse``: so many folios anywhere in so many GiB. ``dense``: all pages of so many GiB."""
    shape, n, gib = size
    phys = scattered(n, gib * GIB) if shape == "sparse" else in_order(gib * GIB)
    return decode(plan, phys, shape=shape)


@entries(
    "map.decode",
    ["luo", "callback walk", "croaring", "numpy"],
    smoke=[("sparse", 10_000, 1), ("dense", 0, 1)],
    quick=[("sparse", 500_000, 64), ("dense", 0, 4)],
    full=[("sparse", 10_000_000, 1024), ("dense", 0, 48)],
)
def bench_map_decode(replay: Callable[..., None], size: tuple[str, int, int]) -> None:
    """Read all blocks of a map into given arrays."""
    replay(decode_shape, size)


# ---- by density ----


def density(plan: Plan, size: tuple[int, float]) -> dict[str, Results]:
    """Some share of the pages in so many GiB."""
    gib, share = size
    phys = every(share, gib * GIB)
    info = {"share": share, "span": gib * GIB}
    return {
        "map.density.preserve": preserve(plan, phys, 5.0, **info),
        "map.density.decode": decode(plan, phys, 5.0, **info),
    }


SHARES = [1 / 4096, 1 / 512, 1 / 64, 1 / 8, 1 / 2, 1.0]
DENSITIES = {
    "smoke": [(1, 1 / 8)],
    "quick": [(4, share) for share in SHARES],
    "full": [(64, share) for share in SHARES],
}


@entries("map.density.preserve", ["luo", "walk", "croaring"], **DENSITIES)
def bench_map_density_preserve(replay: Callable[..., None], size: tuple[int, float]) -> None:
    """Preserve a share of the pages, in order."""
    replay(density, size)


@entries("map.density.decode", ["luo", "callback walk", "croaring"], **DENSITIES)
def bench_map_density_decode(replay: Callable[..., None], size: tuple[int, float]) -> None:
    """Decode a map with a share of the pages in it."""
    replay(density, size)


# ---- one call ----


def call(plan: Plan, size: tuple[str, int]) -> Results:
    """Calls from a Python loop; the loop's own time is subtracted from both."""
    shape, n = size
    phys = scattered(n, 1024 * GIB) if shape == "scattered" else in_order(n * PAGE)
    folios = Folios(phys)
    addresses = phys.tolist()
    empty, absent = peers.adapter("empty call")

    def calls(target: Any) -> Any:
        preserve_folio = target.preserve_folio
        for address in addresses:
            preserve_folio(address, 0)
        return target

    def bare() -> None:
        for _ in addresses:
            pass

    return plan.race(
        [
            Contender("luo", calls, lambda: kho(folios.span), folios.check),
            Contender("empty call", lambda: calls(empty.make()), absent=absent),
            Contender("bare loop", bare),
        ],
        items=n,
        bytes=n * PAGE,
        abi="kho-v4",
        shape=shape,
        less="bare loop",
        seed=SEED,
    )


@entries(
    "map.call",
    ["luo", "empty call", "bare loop"],
    smoke=[("ordered", 1_000), ("scattered", 1_000)],
    quick=[("ordered", 100_000), ("scattered", 100_000)],
    full=[("ordered", 1_000_000), ("scattered", 1_000_000)],
)
def bench_map_call(replay: Callable[..., None], size: tuple[str, int]) -> None:
    """Preserve one folio a call, in order and anywhere in 1 TiB."""
    replay(call, size)


# ---- publishing ----

CALLS = 200


def publish_v4(plan: Plan, size: tuple[int, int]) -> Results:
    """What names the map to the next kernel, of a full map and of an empty one."""
    n, gib = size
    full, empty = kho((gib + 2) * GIB), kho((gib + 2) * GIB)
    full.preserve_folios(scattered(n, gib * GIB), 0)

    def publish(map_: Kho) -> Any:
        for _ in repeat(None, CALLS):
            handover = map_.handover()
        return map_, handover

    def check(made: Any) -> None:
        map_, handover = made
        assert handover == map_.handover()
        assert _map_of(map_) == map_.root_phys

    return plan.race(
        [
            Contender("luo", lambda: publish(full), check=check),
            Contender("empty map", lambda: publish(empty), check=check),
        ],
        items=CALLS,
        bytes=full.tree_pages * PAGE,
        abi="kho-v4",
        folios=n,
        seed=SEED,
    )


def _map_of(map_: Kho) -> int:
    value: int = struct.unpack("=Q", bytes(map_.root.root[map_.generation.map_property]))[0]
    return value


@entries(
    "map.publish.v4",
    ["luo", "empty map"],
    smoke=[(1_000, 1)],
    quick=[(500_000, 64)],
    full=[(10_000_000, 1024)],
)
def bench_map_publish_v4(replay: Callable[..., None], size: tuple[int, int]) -> None:
    """Hand over a map that is live: the time must not depend on what is in it."""
    replay(publish_v4, size)


def publish_v1(plan: Plan, size: tuple[int, int]) -> Results:
    """Write the list of chunks; the peer gets its entries in order, and pages that are touched."""
    n, gib = size
    map_ = kho((gib + 2) * GIB, "kho-v1")
    map_.preserve_folios(scattered(n, gib * GIB), 0)
    walk, absent = peers.adapter("walk")
    before = map_.memory.nr_allocated
    map_.finalize()
    chunks = chunks_of(map_)
    first, bitmaps = (
        np.array([entry[k] for _, part in chunks for entry in part], np.uint64) for k in (0, 1)
    )
    assert map_.memory.nr_allocated == before + len(chunks)  # and so no page for a bitmap
    arena = peers.touched(len(chunks) * PAGE)

    def check(_: None) -> None:
        assert chunks_of(map_) == chunks  # the bitmaps are the same pages as before
        assert map_.memory.nr_allocated == before + len(chunks)

    def check_walk(count: int) -> None:
        assert parse_chunks(lambda phys: memoryview(arena)[phys - PAGE :][:PAGE], PAGE) == chunks
        assert count == len(chunks)

    return plan.race(
        [
            Contender("luo", map_.finalize, check=check),
            Contender(
                "chunk loop",
                lambda: walk.publish(arena, PAGE, 0, first, bitmaps),
                check=check_walk,
                absent=absent,
            ),
        ],
        items=len(first),
        bytes=len(chunks) * PAGE,
        abi="kho-v1",
        folios=n,
        seed=SEED,
    )


def chunks_of(map_: Kho) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return the published chunks: order, and (first block, bitmap) of each entry."""
    return parse_chunks(lambda phys: map_.memory.view(phys, PAGE), _map_of(map_))


def parse_chunks(page: Any, at: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Follow a list of chunks from *at* on; *page* gives the bytes of one."""
    found = []
    while at:
        chunk = page(at)
        at, order, count = abi.KHO_CHUNK_SER.unpack_from(chunk)
        start = abi.KHO_CHUNK_SER.size
        entries_ = chunk[start : start + count * abi.KHO_CHUNK_ENTRY_SER.size]
        found.append((order, list(abi.KHO_CHUNK_ENTRY_SER.iter_unpack(entries_))))
    return found


@entries(
    "map.publish.v1",
    ["luo", "chunk loop"],
    smoke=[(1_000, 1)],
    quick=[(500_000, 256)],
    full=[(10_000_000, 1024)],
)
def bench_map_publish_v1(replay: Callable[..., None], size: tuple[int, int]) -> None:
    """Finalize a map of chunks: only the list is written."""
    replay(publish_v1, size)


# ---- by generation ----

GENERATIONS = list(abi.GENERATIONS)


def generations(plan: Plan, gib: int) -> dict[str, Results]:
    """All pages of so many GiB in each generation: filled, published, read by the next kernel."""
    phys = in_order(gib * GIB)
    span = gib * GIB + 3 * GIB
    info = {"items": len(phys), "bytes": gib * GIB, "published": PUBLISHED}
    scratch = [(span - GIB, 64 << 20)]

    def fresh(name: str) -> Kho:
        return kho(span, name, scratch)

    def filled(name: str) -> Kho:
        return fill(fresh(name))

    def fill(map_: Kho) -> Kho:
        map_.preserve_folios(phys, 0)
        return map_

    def publish(map_: Kho) -> tuple[Kho, Any]:
        if map_.generation.finalize is not None:
            map_.finalize()
        return map_, map_.handover()

    def read_back(made: tuple[Kho, Any]) -> Any:
        map_, handover = made
        return Kho.validate(map_.memory, handover, abi=map_.abi)

    def check(map_: Kho) -> None:
        found, orders = map_.preserved()
        assert np.array_equal(found[found >= START][: len(phys)], phys)
        assert not orders.any()

    def check_published(made: tuple[Kho, Any]) -> None:
        check_read(read_back(made))

    def check_read(incoming: Any) -> None:
        assert incoming.nr_preserved >= len(phys)
        assert all(incoming.order_of(int(at)) == 0 for at in phys[:: len(phys) // 64])

    def contenders(run: Any, setup: Any, checked: Any) -> list[Contender]:
        return [
            Contender(name, run, lambda name=name: setup(name), checked, info={"abi": name})
            for name in GENERATIONS
        ]

    return {
        "map.generation.preserve": plan.race(contenders(fill, fresh, check), 15.0, **info),
        "map.generation.publish": plan.race(
            contenders(publish, filled, check_published), 15.0, **info
        ),
        "map.generation.read": plan.race(
            contenders(read_back, lambda name: publish(filled(name)), check_read), 15.0, **info
        ),
    }


GIBS = {"smoke": [1], "quick": [4], "full": [48]}


@entries("map.generation.preserve", GENERATIONS, **GIBS)
def bench_map_generation_preserve(replay: Callable[..., None], size: int) -> None:
    """Preserve folios in order."""
    replay(generations, size)


@entries("map.generation.publish", GENERATIONS, **GIBS)
def bench_map_generation_publish(replay: Callable[..., None], size: int) -> None:
    """Finalize where the generation does, and hand over."""
    replay(generations, size)


@entries("map.generation.read", GENERATIONS, **GIBS)
def bench_map_generation_read(replay: Callable[..., None], size: int) -> None:
    """Check what is handed over and build the page state of it, as the next kernel does."""
    replay(generations, size)
