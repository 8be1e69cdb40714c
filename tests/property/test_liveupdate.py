"""Live updates of any forest, any failure anywhere, and a long chain of them."""

import errno
import gc
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import SMALL, Log, forest, settled, small_kernel, snapshot

from luo import abi
from luo.device import Bus, Driver
from luo.errors import CallbackError
from luo.kernel import Kernel
from luo.liveupdate import Event, Priority, State
from luo.machine import Machine

DRIVERS, BUSES = ("d0", "d1", "d2"), ("b0", "b1")
CALLBACKS = ["prepare", "reboot", "cancel", "finish", "restore"]
SIZES = [0, 1, 8, 9, 100, 5000]
EVENTS = {"PREPARE", "REBOOT", "CANCEL", "FINISH", "RESTORE"}


# ---- what shall happen, said plainly ----


def expected_order(tree, requested):
    """Devices of an update, children first: RFC v1 1.10, the long way."""
    chosen = []
    for index in np.flatnonzero(requested):
        at = int(index)
        while at >= 0 and at not in chosen:
            chosen.append(at)
            at = int(tree.parents[at])
    return sorted(chosen, key=lambda index: -int(tree.depths[index]))


def legal(calls, event, failing=None):
    """Check one event's calls: nobody twice, and nothing after the failing call."""
    assert len(calls) == len(set(calls))
    assert {call[0] for call in calls} <= {event}
    if failing is not None:
        assert calls[-1] == failing


def depths_of(calls, tree):
    """Depth of the device of each call to a driver or bus."""
    return [int(tree.depths[tree[call[3]]]) for call in calls if call[3] is not None]


# ---- a fixed forest: every failure at every place ----

OUTCOMES = {
    "negative": -errno.EBUSY,
    "exception": ValueError,
    "oserror": OSError(errno.ENOSPC, "full"),
    "positive": errno.EBUSY,
    "interrupt": KeyboardInterrupt,
}


def small(log, machine, **kwargs):
    """The small kernel with a subsystem on each side of the devices."""
    parts = [log.subsystem(priority.name, priority=priority) for priority in Priority]
    return small_kernel(machine, log, parts, **kwargs)


NR_CALLS = 3 + 2 * (len(SMALL) - 1)
PLACES = list(itertools.product(["PREPARE", "REBOOT"], range(NR_CALLS)))


def fail_at(kernel, log, event, place, outcome, stepped=False):
    """Let call number *place* of *event* fail; return that call and the exception."""
    kernel.luo.prepare()
    kernel.luo.reboot()
    key = log.of(event)[place]
    kernel.luo.cancel()
    log.clear()
    log.faults[key] = outcome
    return key, failure(kernel, stepped)


def failure(kernel, stepped=False):
    """Return the exception with which PREPARE or REBOOT fails."""
    try:
        if stepped:
            for wanted in (Event.PREPARE, Event.REBOOT):
                for step in kernel.luo.steps(wanted):
                    step.run()
        else:
            kernel.luo.prepare()
            kernel.luo.reboot()
    except (CallbackError, KeyboardInterrupt) as error:
        return error
    raise AssertionError("nothing failed")


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("stepped", [False, True], ids=["bulk", "steps"])
def test_any_callback_failing_leaves_all_as_before(outcome, stepped):
    """Each callback of PREPARE and REBOOT in turn: all is as before, and the error names it."""
    log = Log()
    kernel = small(log, Machine("64MiB", forest(SMALL))).boot()
    kernel.devices.request("*")
    before = snapshot(kernel)
    for event, place in PLACES:
        log.clear()
        key, error = fail_at(kernel, log, event, place, OUTCOMES[outcome], stepped)
        prepared = log.of("PREPARE")
        undone = [call[1:] for call in log.of("CANCEL")]

        assert snapshot(kernel) == before
        legal(prepared, "PREPARE", key if event == "PREPARE" else None)
        legal(log.of("REBOOT"), "REBOOT", key if event == "REBOOT" else None)
        done = prepared[:-1] if event == "PREPARE" else prepared
        assert undone == [call[1:] for call in done][::-1]
        if outcome == "interrupt":
            assert isinstance(error, KeyboardInterrupt)
        else:
            assert (error.event, error.kind, error.name, error.device) == key
            assert error.rolled_back is True


def test_fixed_forest_has_the_places_that_are_tried():
    """The number of callbacks that the exhaustive test goes through is all there are."""
    log = Log()
    kernel = small(log, Machine("64MiB", forest(SMALL))).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()
    kernel.luo.reboot()

    assert len(log.of("PREPARE")) == len(log.of("REBOOT")) == NR_CALLS


@pytest.mark.parametrize("run", range(2 * NR_CALLS))
def test_steps_closed_after_any_step_roll_back(run):
    """Closing the steps after each number of callbacks leaves all as before PREPARE."""
    log = Log()
    kernel = small(log, Machine("64MiB", forest(SMALL))).boot()
    kernel.devices.request("*")
    before = snapshot(kernel)
    event = Event.PREPARE if run < NR_CALLS else Event.REBOOT
    if event is Event.REBOOT:
        kernel.luo.prepare()
    steps = kernel.luo.steps(event)
    for _ in range(run % NR_CALLS):
        next(steps).run()
    next(steps)
    steps.close()

    assert snapshot(kernel) == before
    assert [c[1:] for c in log.of("PREPARE")][::-1] == [c[1:] for c in log.of("CANCEL")]
    assert len(log.of(event.name)) == run % NR_CALLS


# ---- any forest ----


@st.composite
def hosts(draw):
    """{path: (bus, driver)}, a table's shape by owner, and which devices are requested."""
    n = draw(st.integers(1, 14))
    paths = []
    shape = {}
    for number in range(n):
        parent = draw(st.sampled_from(["", *paths[-4:]]))
        path = f"{parent}/n{number}" if parent else f"n{number}"
        paths.append(path)
        shape[path] = (
            draw(st.sampled_from([None, *BUSES])),
            draw(st.sampled_from([None, *DRIVERS])),
        )
    tables = {
        name: {
            "batched": draw(st.booleans()),
            "events": draw(
                st.sets(st.sampled_from(["prepare", "reboot", "cancel", "finish", "restore"]))
            ),
            "sizes": draw(
                st.lists(st.sampled_from([0, 1, 8, 9, 100, 5000]), min_size=1, max_size=3)
            ),
            "one_by_one": draw(st.booleans()),
        }
        for name in (*DRIVERS, *BUSES)
    }
    requested = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    priorities = draw(st.lists(st.sampled_from(list(Priority)), max_size=3))
    name = draw(st.sampled_from(sorted(abi.GENERATIONS)))
    return shape, tables, requested, priorities, name


def build(machine, log, host):
    """A kernel for *host*."""
    _, tables, _, priorities, generation = host

    def table(kind, name):
        how = tables[name]
        sizes = how["sizes"]

        def size(device):
            return sizes[device.index % len(sizes)]

        return log.ops(
            kind,
            name,
            size=size if how["one_by_one"] or len(sizes) > 1 else sizes[0],
            batched=how["batched"],
            events=sorted(how["events"]),
        )

    return Kernel(
        machine,
        drivers=[Driver(name, table("driver", name)) for name in DRIVERS],
        buses=[Bus(name, table("bus", name)) for name in BUSES],
        subsystems=[
            log.subsystem(f"s{number}", priority=priority)
            for number, priority in enumerate(priorities)
        ],
        kho_abi=generation,
    )


def booted(log, host):
    """A running kernel of *host* with its requests, and its machine."""
    machine = Machine("32MiB", forest(host[0]))
    kernel = build(machine, log, host).boot()
    kernel.devices.request(np.array(host[2]))
    return kernel, machine


@given(host=hosts(), data=st.data())
def test_any_failure_in_any_forest_leaves_all_as_before(host, data):
    """A random callback fails in a random way: all is as before PREPARE, and the error names it."""
    log = Log()
    kernel, _ = booted(log, host)
    before = settled(kernel)
    log.clear()
    kernel.luo.prepare()
    kernel.luo.reboot()
    kernel.luo.cancel()
    called = log.of("PREPARE", "REBOOT")
    prepared = log.of("PREPARE")
    log.clear()
    if not called:
        return
    key = data.draw(st.sampled_from(called))
    tables = host[1]
    batched = key[1] != "subsystem" and tables[key[2]]["batched"]
    ways = ["negative", "positive"] if batched else list(OUTCOMES)
    way = data.draw(st.sampled_from(ways))
    log.faults[key] = OUTCOMES[way]
    error = failure(kernel)
    if way == "interrupt":
        assert isinstance(error, KeyboardInterrupt)
    else:
        assert (error.event, error.kind, error.name, error.device) == key
        assert error.rolled_back is True

    assert snapshot(kernel) == before
    assert set(log.of("PREPARE")) <= set(prepared)
    undone = [call[1:] for call in log.of("CANCEL")]
    assert len(undone) == len(set(undone))
    # Nobody is cancelled that was not prepared; who failed in PREPARE is not.
    reached = {call[1:] for call in log.of("PREPARE")}
    for call in undone:
        kind, name, _ = call
        has_prepare = kind == "subsystem" or "prepare" in tables[name]["events"]
        if has_prepare:
            assert call in reached
        assert key != ("PREPARE", *call)
    # Everybody is that was, and has a cancel callback.
    for call in reached:
        kind, name, _ = call
        if ("PREPARE", *call) != key and (
            kind == "subsystem" or "cancel" in tables[name]["events"]
        ):
            assert call in undone


@given(host=hosts())
def test_any_forest_comes_over(host):
    """A random host is updated: flags, order and bytes are right, and nothing is left behind."""
    log = Log()
    kernel, machine = booted(log, host)
    tree = machine.devices
    order = expected_order(tree, np.array(host[2]))
    kept = {tree.path(index) for index in order}
    kernel.kexec_load(build(machine, log, host))
    kernel.luo.prepare()
    assert {device.path for device in kernel.devices if device.preserved} == kept
    kernel = kernel.kexec()

    assert kernel.restore_failures == ()
    assert {device.path for device in kernel.devices if device.preserved} == kept
    unreclaimed = kernel.luo.finish()
    assert unreclaimed.unreclaimed == ()
    assert unreclaimed.failures == ()
    assert kernel.luo.state is State.NORMAL
    generation = kernel.kho.generation
    own = 0 if generation.inline else 1 + generation.metadata  # the root tree and the metadata
    assert kernel.kho.incoming.nr_unrestored == own
    for event in EVENTS:
        legal(log.of(event), event)
    for event in ("PREPARE", "REBOOT", "FINISH"):
        depths = depths_of(log.of(event), tree)
        assert depths == sorted(depths, reverse=True)
    depths = depths_of(log.of("RESTORE"), tree)
    assert depths == sorted(depths)
    if not any(table["batched"] for table in host[1].values()):
        paths = [tree.path(index) for index in order]
        places = [paths.index(call[3]) for call in log.of("PREPARE") if call[3] is not None]
        assert places == sorted(places)


@given(host=hosts(), run=st.integers(0, 40))
def test_any_forest_stepped_equals_bulk(host, run):
    """Steps and bulk make the same calls and leave the same; closed early, steps roll back."""
    log = Log()
    bulk, _ = booted(log, host)
    bulk.luo.prepare()
    bulk.luo.reboot()
    bulk.luo.cancel()
    expected = list(log.calls)
    log.clear()
    stepped, _ = booted(log, host)
    before = settled(stepped)
    log.clear()
    for event in (Event.PREPARE, Event.REBOOT, Event.CANCEL):
        for step in stepped.luo.steps(event):
            step.run()

    assert log.calls == expected
    assert snapshot(stepped) == before
    steps = stepped.luo.steps(Event.PREPARE)
    for step in itertools.islice(steps, run):
        step.run()
    steps.close()
    if stepped.luo.state is State.NORMAL:
        assert snapshot(stepped) == before


# ---- a chain ----


def mappings():
    """Number of mappings of this process."""
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_chain_of_1000_updates_grows_nothing():
    """Free pages, slots, image size, open files and mappings stay what they are."""
    log = Log()
    machine = Machine("64MiB", forest(SMALL))
    kernel = small(log, machine).boot()
    seen, layouts = set(), set()
    first = None
    for number in range(1000):
        kernel.devices.request("*")
        kernel.kexec_load(small(log, machine))
        kernel.luo.prepare()
        slots = tuple(len(device.slot) + len(device.bus_slot) for device in kernel.devices)
        kernel = kernel.kexec()
        assert kernel.restore_failures == ()
        result = kernel.luo.finish()
        assert (result.unreclaimed, result.failures) == ((), ())
        image = tuple(kernel.arrival.departure.image.items())
        phys, orders = kernel.memory.free_blocks()
        blocks = (phys.tobytes(), orders.tobytes())
        log.clear()
        if number < 2:
            continue  # the first kernel booted cold
        seen.add((kernel.memory.nr_free_pages(), kernel.kho.nr_preserved, slots, image))
        layouts.add(blocks)
        if number == 20:
            gc.collect()
            first = len(os.listdir("/proc/self/fd")), mappings()
    gc.collect()

    assert len(seen) == 1
    assert len(layouts) <= 2  # what one kernel kept is where the next one cannot be
    fds, maps = len(os.listdir("/proc/self/fd")), mappings()
    assert fds <= first[0]
    assert maps <= first[1] + 8  # what the interpreter's own heap took


@settings(max_examples=10)
@given(host=hosts())
def test_chain_of_any_forest_grows_nothing(host):
    """Twelve updates of a random host in a row: free pages and image stay constant."""
    log = Log()
    kernel, machine = booted(log, host)
    seen = set()
    for number in range(12):
        kernel.devices.request(np.array(host[2]))
        kernel.kexec_load(build(machine, log, host))
        kernel.luo.prepare()
        kernel = kernel.kexec()
        kernel.luo.finish()
        if number >= 2:
            image = tuple(kernel.arrival.departure.image.items())
            seen.add((kernel.memory.nr_free_pages(), kernel.kho.nr_preserved, image))

    assert len(seen) == 1
