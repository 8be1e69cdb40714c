"""The chain that bounds blackout, its slack and the shares of workers, against brute force."""

from itertools import groupby, pairwise
from unittest.mock import patch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luo.profile import whatif
from luo.profile.steps import REBOOT, RESTORE, Forest, Phase
from luo.profile.whatif import WhatIf

DRIVER, BUS, SUBSYSTEM = 0, 1, 2


@st.composite
def calls_of(draw, max_devices=7):
    """Parents, event, and the calls in a legal order: (kind, devices, ns, whether thread-safe)."""
    n = draw(st.integers(1, max_devices))
    parents = [draw(st.integers(-1, index - 1)) for index in range(n)]
    depths = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    event = draw(st.sampled_from([REBOOT, RESTORE]))
    calls = []
    levels = range(max(depths), -1, -1) if event == REBOOT else range(max(depths) + 1)
    for depth in levels:
        here = [device for device in range(n) if depths[device] == depth]
        for kind in (DRIVER, BUS) if event == REBOOT else (BUS, DRIVER):
            called = [device for device in here if draw(st.booleans())]
            batch = called if len(called) > 1 and draw(st.booleans()) else []
            groups = [batch] if batch else [[device] for device in called]
            for devices in groups:
                ns = draw(st.integers(0, 4))
                calls.append((kind, devices, ns, not batch and draw(st.booleans())))
    for place in (0, len(calls)):
        if draw(st.booleans()):
            calls.insert(place, (SUBSYSTEM, [], draw(st.integers(0, 4)), False))
    return parents, depths, event, calls


def phase_of(parents, depths, event, calls):
    """The same as columns; the key says kind and thread-safety, and whether it is a batch."""
    forest = Forest(np.array(parents), np.array(depths), lambda index: f"dev{index}")
    pairs = [(place, device) for place, call in enumerate(calls) for device in call[1]]
    call, device = np.array(pairs, np.int64).reshape(-1, 2).T
    return Phase(
        event,
        forest,
        np.arange(len(calls)),
        np.array([kind == BUS for kind, *_ in calls], np.bool_),
        np.array([ns for _, _, ns, _ in calls], np.float64),
        np.ascontiguousarray(call),
        np.ascontiguousarray(device),
    )


def above(parents, device):
    """The device and all its ancestors."""
    line = []
    while device >= 0:
        line.append(device)
        device = parents[device]
    return line


def precedes(parents, event, one, other):
    """Whether the call *one* must have ended before *other* begins."""
    first, second = (one, other) if event == REBOOT else (other, one)
    for low in first[1]:
        for high in second[1]:
            if low != high and high in above(parents, low):
                return True
            if low == high and (first[0], second[0]) == (DRIVER, BUS):
                return True
    return False


def longest(parents, event, calls):
    """The longest of all chains of device calls, by trying every one; with the subsystems."""
    devices = [call for call in calls if call[1]]

    def after(call):
        later = (other for other in devices if precedes(parents, event, call, other))
        return call[2] + max(map(after, later), default=0)

    return max(map(after, devices), default=0) + sum(call[2] for call in calls if not call[1])


def longer(calls, place, ns):
    """The calls, of which one takes so much longer."""
    kind, devices, spent, safe = calls[place]
    return [*calls[:place], (kind, devices, spent + ns, safe), *calls[place + 1 :]]


@given(calls_of())
def test_chain_is_the_longest_of_all(case):
    """What it costs is what no chain exceeds, and each link must wait for the one before it."""
    parents, _, event, calls = case
    phase = phase_of(*case)
    chain = phase.chain()
    links = [calls[place] for place in chain if calls[place][1]]

    assert phase.ns[chain].sum() == longest(parents, event, calls)
    assert all(precedes(parents, event, one, other) for one, other in pairwise(links))


@given(calls_of(max_devices=6), st.randoms())
def test_slack_is_what_a_call_can_take_longer_and_no_more(case, random):
    """With its slack more, the chain is as long as before; with one nanosecond more it is not.

    In whatever order they were called: the tree says who waits.
    """
    parents, depths, event, calls = case
    random.shuffle(calls)
    length = longest(parents, event, calls)
    phase = phase_of(parents, depths, event, calls)

    assert phase.ns[phase.chain()].sum() == length
    for place, slack in enumerate(phase.slack()):
        assert longest(parents, event, longer(calls, place, slack)) == length
        assert longest(parents, event, longer(calls, place, slack + 1)) == length + 1


@given(calls_of(max_devices=12), st.integers(2, 4))
def test_workers_take_what_the_engine_s_rule_says(case, workers):
    """A stretch of one depth is shared out by devices, and the longest share counts."""
    _, depths, event, calls = case
    unsafe = {device for _, devices, _, safe in calls if not safe for device in devices}
    if event == RESTORE:  # the driver's call of a device comes after the bus's, as in REBOOT
        calls = sorted(calls, key=lambda call: (depths[call[1][0]], call[1]) if call[1] else (-1,))
    else:
        calls = sorted(calls, key=lambda call: (-depths[call[1][0]], call[1]) if call[1] else (1,))
    expected = 0
    stretch = lambda call: (  # noqa: E731
        depths[call[1][0]] if call[1] and not unsafe.intersection(call[1]) else None
    )
    for depth, group in groupby(calls, stretch):
        run = list(group)
        devices = [[call[2] for call in one] for _, one in groupby(run, lambda call: call[1])]
        count = 1 if depth is None else min(workers, len(devices))
        if event == RESTORE:
            devices.reverse()
        ends = [len(devices) * share // count for share in range(count + 1)]
        expected += max(sum(map(sum, devices[begin:end])) for begin, end in pairwise(ends))
    phase = phase_of(*case[:3], calls)
    ways = [2 if safe else 0 if len(devices) != 1 else 1 for _, devices, _, safe in calls]
    labels = tuple(("devices", event, "driver", f"{n}") for n in range(len(calls)))
    model = WhatIf(0, 0, 0, workers, {}, "kho-v4", labels, np.array(ways, np.int8), (phase, phase))
    with patch("luo.dev_liveupdate.SHARE", 1), patch.object(whatif, "_threads_ns", lambda *_: 0):
        assert model._spent(phase) == expected
