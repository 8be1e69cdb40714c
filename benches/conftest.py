"""How races become entries of pytest-benchmark, one for each contender.

A benchmark names its row, its contenders and its sizes in a mark::

    @entries("fdt.write", ["luo", "libfdt"], quick=[100_000], full=[1_000_000])
    def bench_fdt_write(replay, size):
        replay(write, size)

The first contender that is asked for runs the whole race; each then replays its own durations with
a timer that shows them, so that the JSON is plain pytest-benchmark's and ``compare`` reads it.
"""

import functools
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import peers
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from race import Contender, Results, race
from table import ROWS

import luo

SCALES = ("smoke", "quick", "full")


#: Contenders that have another name than the peer whose code they run.
OTHERWISE = {
    "callback walk": "walk",
    "chunk loop": "walk",
    "clock reads": "native",
    "luo native": "native",
    "memcpy": "numpy",
}


def versions(contender: str) -> dict[str, str]:
    """Return the versions of luo and Python, and of the peer that a contender is."""
    found = {"luo": luo.__version__, "Python": platform.python_version()}
    name = contender.split(",")[0]
    peer = peers.PEERS.get(OTHERWISE.get(name, name))
    return found if peer is None else found | {peer.name: peer.version()}


class ReplayClock:
    """Seconds that go by only when a duration is replayed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = ReplayClock()


class Plan:
    """How long to race.

    Attributes:
        scale: ``smoke`` (check only), ``quick`` or ``full``.
    """

    def __init__(self, scale: str, timed: bool) -> None:
        self.scale = scale
        self._timed = timed

    def rounds(self, seconds: float) -> Iterator[int]:
        """Yield the numbers of rounds, until there are enough and *seconds* are over (full)."""
        if not self._timed or self.scale == "smoke":
            return
        least, most, limit = (5, 25, seconds) if self.scale == "full" else (3, 9, seconds / 10)
        began = time.monotonic()
        for number in range(most):
            if number >= least and time.monotonic() - began > limit:
                return
            yield number

    def race(self, contenders: list[Contender], seconds: float = 15.0, **info: Any) -> Results:
        """Race for about so long, in a full run."""
        return race(contenders, self.rounds(seconds), **info)


Builder = Callable[..., Results | dict[str, Results]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--scale", choices=SCALES, default="full", help="sizes and rounds; smoke only checks"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "entries(row, contenders, smoke, quick, full): what a benchmark is about"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("entries")
    assert mark is not None
    scale = metafunc.config.getoption("--scale")
    sizes = mark.kwargs.get(scale, mark.kwargs["quick"])
    metafunc.parametrize("size", sizes, ids=size_id, scope="session")
    metafunc.parametrize("contender", mark.args[1])


def size_id(size: Any) -> str:
    """Name a size, or a tuple of a size and shapes, as ``10k-sparse``."""
    parts = size if isinstance(size, tuple) else (size,)
    return "-".join(_short(part) if isinstance(part, int) else str(part) for part in parts)


def _short(n: int) -> str:
    for unit, letter in ((10**6, "M"), (10**3, "k")):
        if n >= unit:
            return f"{n / unit:.3g}{letter}"
    return str(n)


def pytest_itemcollected(item: pytest.Item) -> None:
    mark = item.get_closest_marker("entries")
    if mark is not None:
        item.add_marker(pytest.mark.benchmark(group=mark.args[0], timer=CLOCK))


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    told = versions("luo")
    for name in peers.PEERS:
        if not peers.adapter(name)[1]:
            told |= versions(name)
    machine_info["luo"] = {
        "scale": config.getoption("--scale"),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": told,
    }


@pytest.fixture(scope="session")
def run_race(request: pytest.FixtureRequest) -> Callable[..., Any]:
    timed = not request.config.getoption("--benchmark-disable")
    plan = Plan(request.config.getoption("--scale"), timed)
    return functools.cache(lambda build, *args: build(plan, *args))


@pytest.fixture
def replay(
    request: pytest.FixtureRequest,
    benchmark: BenchmarkFixture,
    contender: str,
    run_race: Callable[..., Any],
) -> Callable[..., None]:
    """Run a race unless it has been run, and make an entry of what it says of one contender."""
    row = ROWS[request.node.get_closest_marker("entries").args[0]]

    def replay_one(build: Builder, *args: Any) -> None:
        results = run_race(build, *args)
        if isinstance(results, dict):
            results = results[row.id]
        if contender not in results.durations:
            pytest.skip(results.absent.get(contender, f"{contender}: not at this size"))
        seconds = iter(results.durations[contender])

        def tick() -> None:
            CLOCK.now += next(seconds, 0.0)

        benchmark.extra_info.update(
            row=row.id,
            role=contender,
            unit=row.unit,
            versions=versions(contender),
            targets={
                f"{limit.luo} / {limit.peer}": limit.most
                for limit in row.limits
                if contender in (limit.luo, limit.peer)
            },
            **results.info,
            **results.own.get(contender, {}),
        )
        benchmark.pedantic(tick, rounds=max(1, len(results.durations[contender])))

    return replay_one
