"""Simulated live updates of any forest: the bytes of a bulk one, the time of a plain scheduler."""

import itertools
import os
import random

import numpy as np
import simpy
from hypothesis import given
from hypothesis import strategies as st
from rig import Log, settled, snapshot

from luo.clock import VirtualClock
from luo.errors import CallbackError
from luo.kernel import live_update
from luo.notifier import State
from luo.sim import Host

from .test_liveupdate import booted, build, expected_order, hosts


def costs_of(seed):
    """A cost hook: any time below 1 ms for each callback and device, nothing for phases."""

    def cost(label, device, devices):
        if label[0] == "engine":
            return 0
        return random.Random(f"{seed} {label} {device} {devices}").randrange(1_000_000)

    return cost


def content(memory):
    """What has been written, by where: a memory of the same bytes has the same."""
    found, end = {}, memory.offset + memory.size
    at = memory.offset
    while at < end:
        try:
            at = os.lseek(memory.fd, at, os.SEEK_DATA)
        except OSError:  # only holes follow
            break
        hole = os.lseek(memory.fd, at, os.SEEK_HOLE)
        raw = np.frombuffer(os.pread(memory.fd, hole - at, at), np.uint8)
        for page in range(0, len(raw), memory.page_size):
            if raw[page : page + memory.page_size].any():
                found[at + page] = raw[page : page + memory.page_size].tobytes()
        at = hole
    return found


def watched(kernel):
    """Have *kernel* write down the memory and what is handed over at the jump."""
    at_jump = []

    memory = kernel.machine.memory
    kernel.on_handover = lambda handover: at_jump.append((handover, content(memory)))
    return at_jump


@given(host=hosts(), workers=st.integers(1, 4), seed=st.integers(0, 1 << 32))
def test_simulated_update_leaves_the_bytes_of_a_bulk_one(host, workers, seed):
    """Equal memory at the jump and at the end, equal figures of devices; the same calls."""
    log = Log()
    bulk, machine = booted(log, host)
    at_jump = watched(bulk)
    expected = live_update(bulk, build(machine, log, host))
    calls = list(log.calls)
    log.clear()

    env = simpy.Environment()
    stepped, copy = booted(log, host)
    simulated_at_jump = watched(stepped)
    simulated = Host(env, stepped, cost=costs_of(seed), workers=workers)
    report = env.run(simulated.live_update(build(copy, log, host)))

    assert simulated_at_jump == at_jump
    assert content(copy.memory) == content(machine.memory)
    assert report.devices == expected.devices
    assert report.states == expected.states
    assert sorted(map(str, log.calls)) == sorted(map(str, calls))
    if workers == 1:
        assert log.calls == calls
    assert simulated.workers.count == 0


def makespan(groups, workers):
    """How long a plain scheduler takes for jobs of one depth after the other."""
    now = 0
    for jobs in groups:
        free = [now] * workers
        for job in jobs:
            free[free.index(min(free))] = min(free) + job
        now = max(free)
    return now


@given(host=hosts(), workers=st.integers(1, 4), seed=st.integers(0, 1 << 32))
def test_phases_take_the_time_of_a_plain_scheduler(host, workers, seed):
    """Each device goes to the worker that is free first; nobody passes a depth."""
    for table in host[1].values():
        table["batched"] = False
    log = Log()
    env = simpy.Environment()
    kernel, machine = booted(log, host)
    cost = costs_of(seed)
    simulated = Host(env, kernel, cost=cost, workers=workers)
    tree = machine.devices
    found = expected_order(tree, kernel.devices.requested)

    report = env.run(simulated.live_update(build(machine, log, host)))

    phases = {"prepare": "PREPARE", "reboot": "REBOOT", "restore": "RESTORE", "finish": "FINISH"}
    for phase, event in phases.items():
        calls = log.of(event)
        spent = {}  # by device; nobody overlaps with a subsystem, so only their sum counts
        groups = [
            [cost((name, event, kind, name), -1, 0)] for _, kind, name, path in calls if not path
        ]
        for _, kind, name, path in calls:
            if path:
                index = tree[path]
                ns = cost(("devices", event, kind, name), index, 1)
                spent[index] = spent.get(index, 0) + ns
        order = [index for index in found if index in spent]
        if event == "RESTORE":
            order.reverse()
        elif event == "FINISH":  # looks for its devices anew
            order.sort(key=lambda index: (-int(tree.depths[index]), index))
        for _, level in itertools.groupby(order, key=lambda index: int(tree.depths[index])):
            groups.append([spent[index] for index in level])

        assert report.phases[phase] == makespan(groups, workers), phase


@given(
    host=hosts(),
    workers=st.integers(1, 3),
    seed=st.integers(0, 1 << 32),
    share=st.floats(0, 1),
    fails=st.booleans(),
)
def test_update_that_ends_early_leaves_nothing(host, workers, seed, share, fails):
    """A callback fails anywhere in PREPARE or REBOOT, or the update is interrupted anywhere."""
    log = Log()
    kernel, machine = booted(log, host)
    before = settled(kernel)
    calls = log.of("PREPARE", "REBOOT")
    log.clear()
    env = simpy.Environment()
    simulated = Host(env, kernel, cost=costs_of(seed), workers=workers)
    if fails and calls:
        log.faults[calls[min(int(share * len(calls)), len(calls) - 1)]] = OSError(5, "broken")
    update = simulated.live_update(build(machine, log, host))

    def canceller():
        yield env.timeout(share * 5e-3)
        if update.is_alive and kernel.machine.running is kernel:
            update.interrupt()

    if not log.faults:
        env.process(canceller())
    try:
        report = env.run(update)
    except CallbackError:
        report = None
    env.run()

    assert simulated.workers.count == 0
    if report is None or report.error is not None:
        assert kernel.luo.state is State.NORMAL
        assert snapshot(kernel) == before
        assert not simulated.blackout_begins.triggered
    else:
        assert simulated.kernel is not kernel
        assert simulated.kernel.luo.state is State.NORMAL


@given(host=hosts(), seed=st.integers(0, 1 << 32), workers=st.integers(1, 4))
def test_simulation_with_one_worker_is_a_bulk_update_on_a_virtual_clock(host, seed, workers):
    """The same phases, blackout and callbacks; of more workers the same callbacks."""

    def cost(label, device, devices):
        return random.Random(f"{seed} {label} {devices}").randrange(1_000_000)

    log = Log()
    clock = VirtualClock(seed)
    bulk, machine = booted(log, host)
    successor = build(machine, log, host)
    for kernel in (bulk, successor):
        kernel.recorder.clock = clock
        kernel.recorder.cost = kernel.charging(clock.charging(cost))
    expected = live_update(bulk, successor)

    env = simpy.Environment()
    stepped, copy = booted(log, host)
    report = env.run(
        Host(env, stepped, cost=cost, workers=workers).live_update(build(copy, log, host))
    )

    assert report.runs[0]["callbacks_ns"] == expected.runs[0]["callbacks_ns"]
    if workers == 1:
        assert report.callbacks == expected.callbacks
        assert report.phases == expected.phases
    else:
        assert report.phases["blackout"] <= expected.phases["blackout"]
