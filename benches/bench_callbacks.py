"""Callbacks of drivers: what calling and timing one costs, by kind.

``liveupdate.prepare.python`` is PREPARE of :mod:`updates`, records and all, against a bare loop
over devices that are there, which calls the same callback. ``callbacks.event`` is an event in which
nothing but calling happens: REBOOT of devices that all have a callback, which does nothing; and the
same with ``timing=False``, so that the difference is what timing costs, and with spans.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import hosts
import peers
import pytest
from conftest import Plan
from race import Contender, Results
from updates import bare_loop, updates

import luo

entries = pytest.mark.entries

SIZES = {"smoke": [200], "quick": [10_000, 100_000], "full": [10_000, 100_000, 1_000_000]}


@entries("liveupdate.prepare.python", ["luo python", "for loop"], **SIZES)
def bench_callbacks_prepare(replay: Callable[..., None], size: int) -> None:
    """PREPARE with a Python callback a device, each timed, against the loop that only calls."""
    replay(updates, size)


def event(plan: Plan, n: int) -> Results:
    """REBOOT of devices that all have a callback, which does nothing."""
    host = hosts.Host(n)
    native, absent = None, ""
    try:
        native = peers.find("native")
    except peers.AbsentError as error:
        absent = str(error)

    def kernel(kind: str, **settings: Any) -> luo.Kernel:
        nothing = hosts.callbacks(kind)["nothing"]
        tree = host.machine.devices
        machine = host.machine.clone()
        made = luo.Kernel(
            machine,
            drivers=[
                luo.Driver(name, luo.LiveUpdateOps(reboot=nothing, state_size=8))
                for name in tree.driver_names
            ],
            buses=[luo.Bus(name, luo.LiveUpdateOps()) for name in tree.bus_names],
            **settings,
        ).boot()
        made.devices.request(host.requested)
        return made

    kernels: dict[str, luo.Kernel] = {}

    def prepared(kind: str, **settings: Any) -> luo.Kernel:
        name = f"{kind} {settings}"
        made = kernels[name] = kernels.get(name) or kernel(kind, **settings)
        made.recorder.touch()
        if made.luo.state is luo.State.PREPARED:
            made.luo.cancel()
        made.luo.prepare()
        return made

    def reboot(made: luo.Kernel) -> luo.Kernel:
        assert made.luo.reboot()
        return made

    def check(made: luo.Kernel) -> None:
        called = sum(row["devices"] for row in made.profile.rows() if row["event"] == "REBOOT")
        assert called == (n if made.recorder.timing else 0)
        assert made.profile.dropped == 0

    views = prepared("python").devices
    devices = [luo.Device(views, int(index)) for index in host.driven]

    def clock(_: Any = None) -> None:
        assert native is not None
        native.clock_reads(n)

    results = plan.race(
        [
            Contender("luo python", reboot, partial(prepared, "python"), check),
            Contender("luo native", reboot, partial(prepared, "native"), check, absent),
            Contender(
                "luo python untimed", reboot, partial(prepared, "python", timing=False), check
            ),
            Contender(
                "luo native untimed",
                reboot,
                partial(prepared, "native", timing=False),
                check,
                absent,
            ),
            Contender(
                "luo native spans", reboot, partial(prepared, "native", spans=n), check, absent
            ),
            Contender("luo batch", reboot, partial(prepared, "batch"), check),
            Contender("for loop", partial(bare_loop, devices, hosts.nothing)),
            Contender("clock reads", clock, absent=absent),
        ],
        seconds=40.0,
        items=n,
        bytes=0,
        abi="kho-v4",
        seed=hosts.SEED,
    )
    for made in kernels.values():
        made.close()
    return results


@entries(
    "callbacks.event",
    [
        "luo python",
        "luo native",
        "luo python untimed",
        "luo native untimed",
        "luo native spans",
        "luo batch",
        "for loop",
        "clock reads",
    ],
    **SIZES,
)
def bench_callbacks_event(replay: Callable[..., None], size: int) -> None:
    """An event of callbacks that do nothing; and what reading a clock as often costs in C."""
    replay(event, size)
