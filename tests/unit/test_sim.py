"""Live updates inside a SimPy environment: time, workers, blackout, and the ways back."""

import errno
import itertools

import pytest
import simpy
from rig import SMALL, Log, forest, settled, small_kernel, small_machine, snapshot

import luo
from luo.errors import CallbackError, HostCrashError, StateError, SuccessorError
from luo.kernel import Kernel, KernelImage
from luo.machine import Machine
from luo.notifier import Priority, State
from luo.profile.cost import CostModel
from luo.sim import Clock, Host

MS = 1_000_000


def subsystems(log):
    """A subsystem before the devices and one behind them."""
    return [
        log.subsystem("first", priority=Priority.BEFORE_DEVICES),
        log.subsystem("last", priority=Priority.AFTER_DEVICES),
    ]


def host_of(env, log=None, cost=None, settle=False, **kwargs):
    """A host with the small kernel, everything requested, and the kernel to come.

    With *settle* it has a cancelled update behind it, and ``host.before`` says what there is.
    """
    log = log or Log()
    machine = small_machine()
    old = small_kernel(machine, log, subsystems(log)).boot()
    old.devices.request("*")
    before = settled(old) if settle else None
    log.calls.clear()
    host = Host(env, old, cost=cost or CostModel(default="1ms"), **kwargs)
    host.before = before
    return host, small_kernel(machine, log, subsystems(log))


class Times:
    """When steps began and ended: an observer."""

    def __init__(self, env):
        self.env = env
        self.seen = []

    def __call__(self, moment, event, step):
        where = step.name if step.device is None else step.device.name
        self.seen.append((round(self.env.now * 1000, 6), moment, event, step.kind, where))

    def of(self, event, kind=None):
        """(begin, end) in milliseconds of each step of *event*, by whom it serves."""
        found = {}
        for now, _moment, happened, side, where in self.seen:
            if happened == event and kind in (None, side):
                found.setdefault((side, where), []).append(now)
        return {key: tuple(times) for key, times in found.items()}


# ---- the happy path ----


def test_live_update_ends_with_a_report_in_simulated_time():
    """9 callbacks of 1 ms in REBOOT and in restore, 5 ms of jump: blackout is their sum."""
    env = simpy.Environment()
    cost = CostModel({"engine/jump": "5ms", "engine/boot": "2ms"}, default="1ms")
    host, successor = host_of(env, cost=cost)
    old = host.kernel

    report = env.run(host.live_update(successor))

    assert report.error is None
    assert report.states == ["normal", "prepared", "updated", "normal"]
    assert report.kernel is host.kernel is successor
    assert successor.luo.state is State.NORMAL
    phases = report.phases
    # 4 devices with a driver and a bus, and two subsystems.
    assert {name: ns / MS for name, ns in phases.items()} == {
        "prepare": 10, "reboot": 10, "jump": 5, "boot": 2, "restore": 10, "finish": 10,
        "blackout": 26,
    }  # fmt: skip
    assert round(env.now * 1000, 6) == 47
    with pytest.raises(StateError):
        old.kho


def test_steps_run_when_their_time_has_passed():
    """What a callback reads of env.now is its end; driver before bus, one after the other."""
    env = simpy.Environment()
    log = Log()
    host, successor = host_of(env, log)
    times = host.observer = Times(env)
    called = []
    log.hooks["PREPARE", "driver", "nic", "pci0/port/nic0"] = lambda _: called.append(env.now)

    env.run(host.live_update(successor))

    spans = times.of("PREPARE")
    begin, end = spans["driver", "nic0"]
    assert round(end - begin, 6) == 1
    assert [round(now * 1000, 6) for now in called] == [end]
    assert spans["bus", "nic0"][0] == end
    flat = sorted(spans.values())
    assert all(a[1] == b[0] for a, b in itertools.pairwise(flat))


def test_workers_overlap_devices_of_one_depth_and_wait_at_each():
    """Two functions side by side, then port and disk, with both sides of each in order."""
    env = simpy.Environment()
    host, successor = host_of(env, workers=2)
    times = host.observer = Times(env)

    report = env.run(host.live_update(successor))

    spans = times.of("PREPARE")
    assert spans["subsystem", "first"] == (0, 1)
    assert spans["driver", "nic0"] == spans["driver", "nic1"] == (1, 2)
    assert spans["bus", "nic0"] == spans["bus", "nic1"] == (2, 3)
    assert spans["driver", "port"] == spans["driver", "disk"] == (3, 4)
    assert spans["subsystem", "last"] == (5, 6)
    assert report.phases["prepare"] == 6 * MS


def test_depth_waits_for_its_slowest_device():
    """A worker that is free does not begin with the next depth."""
    env = simpy.Environment()
    costs = {"nic": 0, "portdrv": 1, "nvme": 1, "pci": 0, "first": 0, "last": 0}
    slow = iter([9, 1])

    def cost(label, device, devices):
        ms = next(slow, 0) if label[3] == "nic" else costs.get(label[3], 0)
        return ms * MS

    host, successor = host_of(env, cost=cost, workers=2)
    times = host.observer = Times(env)
    env.run(host.live_update(successor))

    assert times.of("PREPARE")["driver", "port"][0] == 9


def test_workers_are_a_resource_that_others_use_too():
    """A worker that somebody else holds is not there for callbacks."""
    env = simpy.Environment()
    workers = simpy.Resource(env, 2)
    host, successor = host_of(env, workers=workers)

    def somebody():
        with workers.request() as worker:
            yield worker
            yield env.timeout(1)

    env.process(somebody())
    env.run(until=1e-9)
    report = env.run(host.live_update(successor))

    assert report.phases["prepare"] == 10 * MS
    assert workers.count == 1
    env.run()
    assert workers.count == 0


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_profile_counts_simulated_time(workers):
    """Callbacks and spans say what the model said, whatever overlaps."""
    env = simpy.Environment()
    log = Log()
    machine = small_machine()
    old = small_kernel(machine, log, spans=True).boot()
    old.devices.request("*")
    host = Host(env, old, cost=CostModel(default="1ms"), workers=workers)
    times = host.observer = Times(env)
    report = env.run(host.live_update(small_kernel(machine, log, spans=True)))

    rows = {(row["event"], row["kind"], row["name"]): row for row in report.callbacks}
    assert rows["REBOOT", "bus", "pci"]["total_ns"] == 4 * MS
    assert {row["max_ns"] for row in rows.values()} == {MS}
    spans = old.profile.spans
    labels = old.profile.labels
    begun = sorted(
        (round(int(span["begin_ns"]) / MS, 6), labels[span["key"]][1])
        for span in spans
        if span["ns"] == MS
    )
    observed = sorted(
        (now, event)
        for now, moment, event, _, _ in times.seen
        if moment == "begin" and event in ("PREPARE", "REBOOT")
    )
    assert begun == observed


def test_blackout_events_tell_begin_and_end():
    """From the first REBOOT callback until the last device runs; subsystems restore after it."""
    env = simpy.Environment()
    host, successor = host_of(env)
    seen = []

    def guest():
        while True:
            begin = yield host.blackout_begins
            seen.append((env.now, begin))
            end = yield host.blackout_ends
            seen.append((env.now, end))

    env.process(guest())
    report = env.run(host.live_update(successor))

    (at, begin), (until, end) = seen
    assert (round(at * 1e9), round(until * 1e9)) == (begin, end)
    assert report.blackout == (begin, end)
    assert end - begin == report.phases["blackout"] == 19 * MS
    assert report.phases["restore"] == 10 * MS


def test_blackout_events_are_new_in_the_next_update():
    """Three updates of one host are three blackouts."""
    env = simpy.Environment()
    host, successor = host_of(env)
    blackouts = []

    def guest():
        while True:
            begin = yield host.blackout_begins
            blackouts.append((yield host.blackout_ends) - begin)

    env.process(guest())
    machine = host.kernel.machine
    for _ in range(3):
        host.kernel.devices.request("*")
        env.run(host.live_update(successor))
        successor = small_kernel(machine, Log(), subsystems(Log()))

    assert blackouts == [19 * MS] * 3


def test_restore_callback_may_reclaim_nothing_and_blackout_ends_with_restore():
    """Devices that never run again: there is nobody to wait for when restore is over."""
    env = simpy.Environment()
    log = Log()
    host, successor = host_of(env, log)
    for path, (_, driver) in SMALL.items():
        for kind, name in (("driver", driver), ("bus", "pci")):
            log.faults["RESTORE", kind, name, path] = -errno.EIO
    log.hooks = dict.fromkeys(log.faults, lambda device: None)
    ended = []
    host.blackout_ends.callbacks.append(lambda event: ended.append(event.value))

    report = env.run(host.live_update(successor))

    assert len(ended) == 1
    assert len(report.failures) == 8


def test_live_update_into_an_image_is_built_here():
    """An image becomes a kernel in this process, on the same clock."""
    env = simpy.Environment()
    host = luo.workloads.host("cloud", devices=40)
    image = luo.workloads.image_of(host)
    kernel = luo.workloads.first_kernel(host, image).boot()
    luo.workloads.request_all(kernel)
    simulated = Host(env, kernel, cost=CostModel(default="10us"))

    report = env.run(simulated.live_update(image))

    assert report.error is None
    assert report.successor == "in-process"
    assert report.devices["reclaimed"] == report.devices["preserved"] > 0
    assert report.devices["verified_bytes"] == report.devices["state_bytes"] > 0
    assert report.to_dict()["phases_ns"]["blackout"] == report.phases["blackout"] > 0
    report.kernel.close()


def test_batch_is_one_step_that_costs_by_device():
    """A batch takes one worker, and what its rule says for each device."""
    env = simpy.Environment()
    machine = Machine("64MiB", forest({f"n{i}": ("pci", "nic") for i in range(7)}))
    log = Log()

    def kernel():
        driver = luo.Driver("nic", log.ops("driver", "nic", size=8, batched=True))
        return Kernel(machine, drivers=[driver], buses=[luo.Bus("pci", luo.LiveUpdateOps())])

    old = kernel().boot()
    old.devices.request("*")
    cost = CostModel({"devices/nic/PREPARE": _rule("1ms", "100us")})
    report = env.run(Host(env, old, cost=cost, workers=4).live_update(kernel()))

    assert report.phases["prepare"] == 1_700_000
    assert report.devices["reclaimed"] == 7


def _rule(fixed, per_device):
    from luo.profile.cost import Rule
    from luo.report import parse_duration

    return Rule(parse_duration(fixed), parse_duration(per_device))


# ---- determinism ----


def test_same_seed_gives_the_same_report_and_more_workers_the_same_costs():
    """Draws belong to callbacks, not to the moment or the worker."""

    def simulate(workers, seed):
        env = simpy.Environment()
        cost = CostModel(
            {event: _spread(event) for event in ("PREPARE", "REBOOT", "RESTORE")}, seed=seed
        )
        host, successor = host_of(env, cost=cost, workers=workers)
        report = env.run(host.live_update(successor))
        return report.runs[0]["callbacks_ns"], report.phases, env.now

    one, again, two, other = simulate(1, 7), simulate(1, 7), simulate(2, 7), simulate(1, 8)

    assert one == again
    assert one[0] == two[0]
    assert two[1]["blackout"] < one[1]["blackout"]
    assert one != other


def _spread(event):
    from luo.profile.cost import Distribution, Rule

    return Rule(spread=Distribution("lognormal", (100_000 * len(event), 0.5)))


# ---- the ways back ----


@pytest.mark.parametrize("event", ["PREPARE", "REBOOT"])
def test_callback_that_fails_ends_the_update_with_its_error(event):
    """The process fails as the engine raises, when all is rolled back, which takes its time."""
    env = simpy.Environment()
    log = Log()
    host, successor = host_of(env, log, settle=True, workers=2)
    log.faults[event, "driver", "nvme", "pci0/disk"] = OSError(errno.EBUSY, "in use")
    caught = []

    def operator():
        try:
            yield host.live_update(successor)
        except CallbackError as error:
            caught.append((error, env.now))

    env.process(operator())
    env.run()
    (error, when) = caught[0]

    assert (error.event, error.name, error.device) == (event, "nvme", "pci0/disk")
    assert (error.errno, error.rolled_back, error.undo_errors) == (errno.EBUSY, True, [])
    assert snapshot(host.kernel) == host.before
    assert host.kernel.luo.state is State.NORMAL
    cancelled = len(log.of("CANCEL"))
    assert cancelled > 0
    failed_at = 4 if event == "PREPARE" else 10
    assert round(when * 1000, 6) == pytest.approx(failed_at + cancelled)
    assert host.workers.count == 0
    assert host.blackout_begins.triggered is False
    assert not host.kernel.kexec_loaded


@pytest.mark.parametrize("ms", [0, 0.5, 2, 3.5, 10, 10.5, 12, 19.999])
def test_interrupt_before_the_commit_point_rolls_back(ms):
    """At any moment of PREPARE and REBOOT: NORMAL, nothing left, and the report says so."""
    env = simpy.Environment()
    log = Log()
    host, successor = host_of(env, log, settle=True)
    ends = []
    host.blackout_ends.callbacks.append(ends.append)
    update = host.live_update(successor)

    def operator():
        yield env.timeout(ms / 1000)
        update.interrupt("the other host is down")

    env.process(operator())
    report = env.run(update)

    assert report.error["type"] == "Interrupt"
    assert report.error["message"] == "interrupted: the other host is down"
    assert report.error["rolled_back"] is True
    assert report.runs == []
    assert host.kernel.luo.state is State.NORMAL
    assert snapshot(host.kernel) == host.before
    assert host.workers.count == 0
    assert bool(ends) == (ms > 10)
    assert report.kernel is host.kernel


def test_interrupt_takes_the_time_of_cancel():
    """Half of PREPARE is done: each callback that ran has a CANCEL of 1 ms."""
    env = simpy.Environment()
    log = Log()
    host, successor = host_of(env, log)
    update = host.live_update(successor)
    env.run(until=0.0045)
    update.interrupt()
    update_ends = []
    update.callbacks.append(lambda _: update_ends.append(env.now))
    env.run()

    assert len(log.of("PREPARE")) == len(log.of("CANCEL")) == 4
    assert round(update_ends[0] * 1000, 6) == 8.5


@pytest.mark.parametrize("ms", [20.5, 29, 31])
def test_interrupt_after_the_commit_point_is_refused(ms):
    """The caller is told that there is no way back, and the update goes on."""
    env = simpy.Environment()
    host, successor = host_of(env)
    update = host.live_update(successor)
    env.run(until=ms / 1000)

    with pytest.raises(StateError, match="no way back") as caught:
        update.interrupt()
    assert caught.value.errno == errno.EINVAL
    simpy.Process.interrupt(update)  # past our own: noticed, and of no effect
    report = env.run(update)
    assert report.error is None
    assert successor.luo.state is State.NORMAL


def test_interrupt_of_an_update_that_is_over_is_simpys_own_error():
    """As of any process that has ended."""
    env = simpy.Environment()
    host, successor = host_of(env)
    update = host.live_update(successor)
    env.run(update)

    with pytest.raises(RuntimeError):
        update.interrupt()


def test_update_after_a_cancelled_one_succeeds():
    """Nothing of the first is in the way of the second."""
    env = simpy.Environment()
    host, successor = host_of(env)
    update = host.live_update(successor)
    env.run(until=0.015)
    update.interrupt()
    env.run(update)
    machine = host.kernel.machine
    log = Log()

    report = env.run(host.live_update(small_kernel(machine, log, subsystems(log))))

    assert report.error is None
    assert report.phases["blackout"] == 19 * MS


def test_successor_that_refuses_cancels():
    """The handover has another format: the old kernel is NORMAL, and blackout is over."""
    env = simpy.Environment()
    log = Log()
    machine = small_machine()
    old = small_kernel(machine, log).boot()
    old.devices.request("*")
    host = Host(env, old, cost=CostModel(default="1ms"))
    other = small_kernel(machine, log, kho_abi="kho-v1")
    ends = []
    host.blackout_ends.callbacks.append(ends.append)

    with pytest.raises(SuccessorError):
        env.run(host.live_update(other))

    assert old.luo.state is State.NORMAL
    assert len(ends) == 1


def test_interrupt_of_python_in_restore_leaves_a_host_that_is_known_to_be_down_or_updated():
    """A ^C in a restore callback: whoever is left has had a turn, and it is raised."""
    env = simpy.Environment()
    log = Log()
    host, successor = host_of(env, log)
    log.faults["RESTORE", "driver", "nvme", "pci0/disk"] = KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        env.run(host.live_update(successor))

    assert len(log.of("RESTORE")) == 10
    assert successor.luo.state is State.UPDATED


def test_live_update_while_one_is_under_way_is_busy():
    """One at a time."""
    env = simpy.Environment()
    host, successor = host_of(env)
    host.live_update(successor)

    with pytest.raises(StateError) as caught:
        host.live_update(successor)
    assert caught.value.errno == errno.EBUSY


def test_host_of_a_kernel_that_does_not_run_is_refused():
    """Before boot, and without timing."""
    env = simpy.Environment()
    machine = small_machine()

    with pytest.raises(ValueError, match="does not run"):
        Host(env, small_kernel(machine, Log()))
    kernel = small_kernel(machine, Log(), timing=False).boot()
    with pytest.raises(ValueError, match="timing is off"):
        Host(env, kernel)


def test_crash_after_the_commit_point_is_raised_and_blackout_has_no_end():
    """A next kernel that dies while it boots takes the host with it."""
    env = simpy.Environment()
    host, successor = host_of(env)
    successor.luo.startup = lambda found: 1 / 0
    ends = []
    host.blackout_ends.callbacks.append(ends.append)

    with pytest.raises(HostCrashError):
        env.run(host.live_update(successor))
    assert ends == []


# ---- the clock ----


def test_clock_reads_the_environment_in_its_unit():
    """Nanoseconds, whatever 1 of env.now is."""
    for unit, expected in (("1s", 2_500_000_000), ("1us", 2_500), ("10ms", 25_000_000)):
        env = simpy.Environment()
        clock = Clock(env, unit)
        env.run(until=2.5)

        assert clock() == expected
    with pytest.raises(ValueError, match="no time"):
        Clock(env, "0s")


def test_unit_of_the_environment_changes_nothing_in_nanoseconds():
    """The same figures if the simulation counts microseconds."""
    figures = []
    for unit in ("1s", "1us", "1ns"):
        env = simpy.Environment(initial_time=1234)
        host, successor = host_of(env, unit=unit)
        figures.append(env.run(host.live_update(successor)).phases)

    assert figures[0] == figures[1] == figures[2]


def test_image_is_a_kernel_image():
    """What is no kernel is refused at once."""
    env = simpy.Environment()
    host, _ = host_of(env)

    with pytest.raises(luo.KhoError):
        host.live_update(KernelImage("no.such:thing"))
