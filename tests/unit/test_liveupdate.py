"""The orchestrator: states, events, the chain of subsystems, rollback, and LUO's node."""

import errno
import itertools
import struct

import numpy as np
import pytest
from rig import (
    EVENTS,
    SMALL,
    Log,
    errno_of,
    hand_over,
    slots_exist,
    small_kernel,
    small_machine,
    snapshot,
)
from rig import updated as update

from luo import abi
from luo.device import Bus, Driver, LiveUpdateOps
from luo.errors import CallbackError, HandoverError, KhoError, StateError
from luo.fdt import Fdt, FdtWriter
from luo.kernel import Kernel
from luo.liveupdate import Event, Priority, State, Subsystem

BEFORE, WITH, AFTER = Priority

#: Blocks that KHO itself leaves behind: the root tree and the metadata.
KHO_OWN = 2


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def machine():
    return small_machine()


def boot(machine, log, *subsystems, request=True, **kwargs):
    """A running kernel, everything requested."""
    kernel = small_kernel(machine, log, subsystems, **kwargs).boot()
    if request:
        kernel.devices.request("*")
    log.clear()
    return kernel


def chain(log):
    """One subsystem before, two with and one after the devices."""
    return [
        log.subsystem("late", priority=AFTER),
        log.subsystem("one"),
        log.subsystem("early", priority=BEFORE),
        log.subsystem("two", priority=WITH),
    ]


def in_state(state, log):
    """A kernel in *state*."""
    machine = small_machine()
    kernel = boot(machine, log, *chain(log))
    if state is State.PREPARED:
        kernel.luo.prepare()
    elif state is State.UPDATED:
        kernel = update(kernel, small_kernel(machine, log, chain(log)))
    log.clear()
    return kernel


def prepare_and_reboot(kernel, reboot=None):
    """PREPARE, then REBOOT (or *reboot*): one of them is going to fail."""
    kernel.luo.prepare()
    (reboot or kernel.luo.reboot)()


def drain(steps):
    """Run every step."""
    for step in steps:
        step.run()


def names(calls):
    """Names of the subsystems called, the devices as one."""
    kinds = [name if kind == "subsystem" else "devices" for _, kind, name, _ in calls]
    return [name for name, _ in itertools.groupby(kinds)]


# ---- states and events ----

ALLOWED = {
    (State.NORMAL, Event.PREPARE): State.PREPARED,
    (State.PREPARED, Event.REBOOT): State.PREPARED,
    (State.PREPARED, Event.CANCEL): State.NORMAL,
    (State.UPDATED, Event.FINISH): State.NORMAL,
}
PAIRS = [
    pytest.param(state, event, id=f"{state.name}-{event.name}")
    for state in State
    for event in Event
]


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_steps_in_each_state_follows_the_table(state, event, log):
    """The stepping form allows what the table allows; the state counts at the first step."""
    kernel = in_state(state, log)
    steps = kernel.luo.steps(event)
    expected = ALLOWED.get((state, event))
    if expected is None:
        with pytest.raises(StateError) as caught:
            next(steps)

        assert caught.value.errno == errno.EINVAL
        assert state is kernel.luo.state
    else:
        drain(steps)

        assert expected is kernel.luo.state


def test_dry_reboot_calls_reboot_then_cancels(log):
    """A dry run calls what a reboot calls, then cancel, and leaves all as before PREPARE."""
    kernel = boot(small_machine(), log, *chain(log))
    before = snapshot(kernel)
    kernel.luo.prepare()
    log.clear()
    result = kernel.luo.dry_reboot()

    assert [event for event, _ in itertools.groupby(c[0] for c in log.calls)] == [
        "REBOOT",
        "CANCEL",
    ]
    assert [c[1:] for c in log.of("CANCEL")] == [c[1:] for c in log.of("REBOOT")][::-1]
    assert result.failures == ()
    assert before == snapshot(kernel)


def test_reboot_twice_is_ealready(log):
    """After REBOOT only the jump or CANCEL may follow."""
    kernel = in_state(State.PREPARED, log)
    assert kernel.luo.reboot() is True
    log.clear()

    assert errno_of(kernel.luo.reboot) == errno.EALREADY
    assert errno_of(kernel.luo.dry_reboot) == errno.EALREADY
    assert log.calls == []
    assert State.PREPARED is kernel.luo.state
    kernel.luo.cancel()
    assert State.NORMAL is kernel.luo.state
    kernel.luo.prepare()
    assert kernel.luo.reboot() is True


def test_observer_is_told_each_change_of_state(log, machine):
    """The observer hears of a state once it is reached, and never of one that is not."""
    seen = []
    kernel = boot(machine, log, observer=lambda *what: seen.append(what))
    kernel.luo.prepare()
    kernel.luo.cancel()
    log.faults["PREPARE", "driver", "nic", "pci0/port/nic0"] = -errno.EIO
    errno_of(kernel.luo.prepare)

    assert [name for what, name in seen if what == "state"] == ["prepared", "normal"]
    assert [name for what, name in seen if what == "phase"] == [
        "boot",
        "prepare",
        "cancel",
        "prepare",
    ]


@pytest.mark.parametrize("cmdline", ["kho=on", "liveupdate=on", "kho=off liveupdate=on", ""])
def test_event_disabled_is_eopnotsupp(cmdline, log, machine):
    """Without ``kho=on`` and ``liveupdate=on`` no event starts, and kexec is an ordinary one."""
    kernel = small_kernel(machine, log, [log.subsystem("one")], cmdline=cmdline).boot()

    assert kernel.luo.enabled is False
    for call in (kernel.luo.prepare, kernel.luo.cancel, kernel.luo.finish):
        assert errno_of(call) == errno.EOPNOTSUPP
    assert kernel.luo.reboot() is False
    assert log.calls == []
    assert State.NORMAL is kernel.luo.state


# ---- order ----


@pytest.mark.parametrize("priorities", list(itertools.permutations((BEFORE, WITH, AFTER))))
def test_chain_runs_by_priority_and_back(priorities, log, machine):
    """BEFORE runs before the devices in PREPARE and REBOOT; the others run the exact reverse."""
    parts = [log.subsystem(priority.name, priority=priority) for priority in priorities]
    kernel = boot(machine, log, *parts)
    forward = ["BEFORE_DEVICES", "WITH_DEVICES", "devices", "AFTER_DEVICES"]
    kernel.luo.prepare()
    kernel.luo.cancel()
    kernel.luo.prepare()
    kernel = update(kernel, small_kernel(machine, log, parts))
    kernel.luo.finish()
    seen = {event: names(log.of(event)) for event in ("REBOOT", "CANCEL", "RESTORE", "FINISH")}

    assert forward * 2 == names(log.of("PREPARE"))
    assert forward == seen["REBOOT"]
    assert forward[::-1] == seen["CANCEL"] == seen["RESTORE"] == seen["FINISH"]


def test_chain_equal_priorities_run_in_order_of_registration(log, machine):
    """Equal priorities run first come first served, and back in reverse."""
    kernel = boot(machine, log, *[log.subsystem(name) for name in "cab"])
    kernel.luo.register(log.subsystem("z"))
    kernel.luo.prepare()
    kernel.luo.cancel()

    assert names(log.of("PREPARE")) == ["c", "a", "b", "devices", "z"]
    assert names(log.of("CANCEL")) == ["z", "devices", "b", "a", "c"]


def test_chain_subsystem_without_callback_is_passed_over(log, machine):
    """Every callback of a subsystem is optional."""
    kernel = boot(machine, log, Subsystem("silent"), log.subsystem("half", ["prepare", "finish"]))
    kernel.luo.prepare()
    kernel = update(kernel, small_kernel(machine, log, [Subsystem("silent")]))

    assert kernel.luo.finish().failures == ()
    assert State.NORMAL is kernel.luo.state


# ---- registration ----


@pytest.mark.parametrize("name", ["", "a/b", "a\0b", "x" * 64, "ä" * 32])
def test_subsystem_bad_name_is_value_error(name):
    """A name is a node name of at most 63 bytes."""
    with pytest.raises(ValueError, match="subsystem name"):
        Subsystem(name)


def test_subsystem_uncallable_callback_is_type_error():
    """A callback that cannot be called is refused at once."""
    for event in EVENTS:
        with pytest.raises(TypeError):
            Subsystem("one", **{event: 3})


# ---- calling back ----


def toggle(device):
    device.requested = not device.requested


CALL_BACK = {
    "prepare": lambda kernel: kernel.luo.prepare(),
    "reboot": lambda kernel: kernel.luo.reboot(),
    "cancel": lambda kernel: kernel.luo.cancel(),
    "finish": lambda kernel: kernel.luo.finish(),
    "dry_reboot": lambda kernel: kernel.luo.dry_reboot(),
    "steps": lambda kernel: next(kernel.luo.steps(Event.PREPARE)),
    "read_state": lambda kernel: kernel.luo.read_state().__enter__(),
    "register": lambda kernel: kernel.luo.register(Subsystem("new")),
    "unregister": lambda kernel: kernel.luo.unregister("one"),
    "requested": lambda kernel: toggle(kernel.devices["pci0/disk"]),
    "request": lambda kernel: kernel.devices.request("*", False),
    "bind": lambda kernel: kernel.devices["pci0"].bind("nic"),
    "kexec": lambda kernel: kernel.kexec(),
    "shutdown": lambda kernel: kernel.shutdown(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("event", "what"),
    list(itertools.product(["PREPARE", "REBOOT", "CANCEL", "FINISH", "RESTORE"], CALL_BACK)),
)
def test_callback_that_calls_back_gets_edeadlk(event, what, log):
    """A callback holds the lock of its event: whatever takes it is EDEADLK, and nothing is lost."""
    machine = small_machine()
    kernel = boot(machine, log, *chain(log))
    seen = []

    def call_back(kernel):
        seen.append(errno_of(CALL_BACK[what], kernel))

    def subsystem_calls_back(context):
        call_back(context.kernel)

    log.hooks[event, "subsystem", "two", None] = subsystem_calls_back
    log.hooks[event, "driver", "nic", "pci0/port/nic0"] = subsystem_calls_back
    kernel.luo.prepare()
    if event == "CANCEL":
        kernel.luo.cancel()
    elif event == "REBOOT":
        kernel.luo.reboot()
    elif event != "PREPARE":
        kernel = update(kernel, small_kernel(machine, log, chain(log)))
        kernel.luo.finish()

    assert seen == [errno.EDEADLK, errno.EDEADLK]
    expected = State.PREPARED if event in ("PREPARE", "REBOOT") else State.NORMAL
    assert expected is kernel.luo.state
    assert kernel.machine.running is kernel


# ---- failures ----

OUTCOMES = [
    pytest.param(-errno.EBUSY, errno.EBUSY, id="negative"),
    pytest.param(np.int32(-errno.EBUSY), errno.EBUSY, id="numpy-negative"),
    pytest.param(errno.EBUSY, errno.EINVAL, id="positive"),
    pytest.param(True, errno.EINVAL, id="true"),
    pytest.param(OSError(errno.ENOSPC, "full"), errno.ENOSPC, id="oserror"),
    pytest.param(OSError("without a number"), errno.EIO, id="oserror-bare"),
    pytest.param(ValueError("wrong"), errno.EIO, id="exception"),
    pytest.param(MemoryError(), errno.EIO, id="memory-error"),
    pytest.param("done", errno.EINVAL, id="text"),
    pytest.param(1.5, errno.EINVAL, id="float"),
]
PLACES = [
    pytest.param("subsystem", "two", None, id="subsystem"),
    pytest.param("driver", "portdrv", "pci0/port", id="driver"),
    pytest.param("bus", "pci", "pci0/port/nic1", id="bus"),
]
GOOD = [None, 0, False, np.int32(0), np.int64(0), np.uint8(0)]


@pytest.mark.parametrize("event", ["PREPARE", "REBOOT"])
@pytest.mark.parametrize(("kind", "name", "device"), PLACES)
@pytest.mark.parametrize(("outcome", "code"), OUTCOMES)
def test_callback_failure_is_named(event, kind, name, device, outcome, code, log, machine):
    """The error names event, kind, name, device and errno; an exception is its cause."""
    kernel = boot(machine, log, *chain(log))
    before = snapshot(kernel)
    log.faults[event, kind, name, device] = outcome
    with pytest.raises(CallbackError) as caught:
        prepare_and_reboot(kernel)
    error = caught.value

    assert (code, event, kind, name, device) == (
        error.errno, error.event, error.kind, error.name, error.device
    )  # fmt: skip
    assert error.rolled_back is True
    assert error.undo_errors == []
    assert (outcome if isinstance(outcome, BaseException) else None) is error.__cause__
    for part in (event, name, *([device] if device else [])):
        assert part in str(error)
    assert before == snapshot(kernel)
    assert State.NORMAL is kernel.luo.state


@pytest.mark.parametrize("outcome", GOOD, ids=lambda value: f"{type(value).__name__}-{value}")
def test_callback_zero_of_any_kind_is_success(outcome, log, machine):
    """None and every integer 0 are success, for subsystems and devices alike."""
    kernel = boot(machine, log, *chain(log))
    for event in ("PREPARE", "REBOOT", "CANCEL"):
        for place in PLACES:
            log.faults[(event, *place.values)] = outcome
    kernel.luo.prepare()

    assert kernel.luo.dry_reboot().failures == ()


def test_callback_positive_return_asks_whether_minus_was_meant(log, machine):
    """A positive return is an error, and the message says which one may have been meant."""
    kernel = boot(machine, log)
    log.faults["PREPARE", "driver", "nvme", "pci0/disk"] = errno.EBUSY
    with pytest.raises(CallbackError, match="did you mean -EBUSY") as caught:
        kernel.luo.prepare()

    assert caught.value.errno == errno.EINVAL


def raises_here(subject):
    raise RuntimeError("on purpose")


def returns_here(subject):
    return -errno.EBUSY


@pytest.mark.parametrize("kind", ["subsystem", "driver", "bus"])
@pytest.mark.parametrize(
    ("callback", "ahead"), [(raises_here, 1), (returns_here, 0)], ids=["raises", "returns"]
)
def test_callback_failure_has_the_users_file_and_line(kind, callback, ahead, machine):
    """An exception is located where it was raised, a return value at the function."""
    ops = LiveUpdateOps(prepare=callback)
    silent = LiveUpdateOps()
    drivers = [
        Driver("nvme", ops if kind == "driver" else silent),
        Driver("nic", silent),
        Driver("portdrv", silent),
    ]
    kernel = Kernel(
        machine,
        drivers=drivers,
        buses=[Bus("pci", ops if kind == "bus" else silent)],
        subsystems=[Subsystem("one", prepare=callback if kind == "subsystem" else None)],
    ).boot()
    kernel.devices.request("*")
    with pytest.raises(CallbackError) as caught:
        kernel.luo.prepare()

    assert __file__ == caught.value.file
    assert callback.__code__.co_firstlineno + ahead == caught.value.line
    assert f"{__file__}:{caught.value.line}" in str(caught.value)


def test_prepare_failure_cancels_those_before_but_not_the_failing_one(log, machine):
    """Who fails in PREPARE gets no CANCEL, nor does anybody after it; the rest in reverse."""
    kernel = boot(machine, log, *chain(log))
    log.faults["PREPARE", "subsystem", "late", None] = -errno.EIO
    assert errno_of(kernel.luo.prepare) == errno.EIO
    prepared = [call[1:] for call in log.of("PREPARE")]

    assert prepared[-1] == ("subsystem", "late", None)
    assert prepared[-2::-1] == [call[1:] for call in log.of("CANCEL")]

    log.clear()
    log.faults["PREPARE", "subsystem", "one", None] = -errno.EIO
    assert errno_of(kernel.luo.prepare) == errno.EIO
    assert names(log.of("PREPARE")) == ["early", "one"]
    assert names(log.of("CANCEL")) == ["early"]


@pytest.mark.parametrize(("kind", "name", "device"), PLACES)
def test_reboot_failure_cancels_everybody(kind, name, device, log, machine):
    """All were prepared: REBOOT's failure cancels all, the failing one and those after too."""
    kernel = boot(machine, log, *chain(log))
    kernel.luo.prepare()
    prepared = [call[1:] for call in log.of("PREPARE")]
    log.faults["REBOOT", kind, name, device] = -errno.EIO
    assert errno_of(kernel.luo.reboot) == errno.EIO
    rebooted = [call[1:] for call in log.of("REBOOT")]

    assert prepared[: len(rebooted)] == rebooted
    assert (kind, name, device) == rebooted[-1]
    assert prepared[::-1] == [call[1:] for call in log.of("CANCEL")]


def test_reboot_done_then_cancel_reaches_every_device(log, machine):
    """After a REBOOT that succeeded a CANCEL still reaches all devices (quirk 6)."""
    kernel = boot(machine, log)
    before = snapshot(kernel)
    kernel.luo.prepare()
    kernel.luo.reboot()
    kernel.luo.cancel()

    assert [c[1:] for c in log.of("PREPARE")][::-1] == [c[1:] for c in log.of("CANCEL")]
    assert not kernel.devices.preserved.any()
    assert before == snapshot(kernel)


@pytest.mark.parametrize("event", ["PREPARE", "REBOOT"])
@pytest.mark.parametrize(("kind", "name", "device"), PLACES)
def test_interrupt_in_a_callback_rolls_back_and_is_raised(event, kind, name, device, log, machine):
    """^C in a callback leaves all as before PREPARE, and is raised as itself."""
    kernel = boot(machine, log, *chain(log))
    before = snapshot(kernel)
    log.faults[event, kind, name, device] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        prepare_and_reboot(kernel)

    assert before == snapshot(kernel)
    undone = [call[1:] for call in log.of("CANCEL")]
    done = [call[1:] for call in log.of("PREPARE")]
    assert (done[-2::-1] if event == "PREPARE" else done[::-1]) == undone
    log.clear()
    kernel.luo.prepare()


@pytest.mark.parametrize(("kind", "name", "device"), PLACES)
def test_cancel_failure_is_collected_and_all_are_cancelled(kind, name, device, log, machine):
    """A failing CANCEL stops nobody: everybody is called, the state is NORMAL (quirk 13)."""
    kernel = boot(machine, log, *chain(log))
    before = snapshot(kernel)
    kernel.luo.prepare()
    prepared = [call[1:] for call in log.calls]
    log.faults["CANCEL", kind, name, device] = -errno.EIO
    log.faults["CANCEL", "subsystem", "early", None] = ValueError("too late")
    result = kernel.luo.cancel()

    assert prepared[::-1] == [call[1:] for call in log.of("CANCEL")]
    assert [(errno.EIO, name, device), (errno.EIO, "early", None)] == [
        (error.errno, error.name, error.device) for error in result.failures
    ]
    assert before == snapshot(kernel)


@pytest.mark.parametrize(("kind", "name", "device"), PLACES)
def test_finish_failure_is_collected_and_the_state_is_normal(kind, name, device, log, machine):
    """A failing FINISH stops nobody, and all that came over is freed."""
    kernel = boot(machine, log, *chain(log))
    kernel = update(kernel, small_kernel(machine, log, chain(log)))
    called = sorted(str(call[1:]) for call in log.of("PREPARE"))
    log.clear()
    log.faults["FINISH", kind, name, device] = -errno.EIO
    result = kernel.luo.finish()

    assert called == sorted(map(str, {call[1:] for call in log.of("FINISH")}))
    assert [(errno.EIO, "FINISH", name, device)] == [
        (error.errno, error.event, error.name, error.device) for error in result.failures
    ]
    assert State.NORMAL is kernel.luo.state
    assert not kernel.devices.preserved.any()
    assert kernel.kho.incoming.nr_unrestored == KHO_OWN


def test_prepare_failure_keeps_what_failed_while_cancelling(log, machine):
    """The first error is raised; what fails on the way back is attached to it."""
    kernel = boot(machine, log, *chain(log))
    log.faults["PREPARE", "subsystem", "late", None] = -errno.EIO
    log.faults["CANCEL", "subsystem", "one", None] = -errno.EBUSY
    log.faults["CANCEL", "bus", "pci", "pci0/disk"] = ValueError("no")
    with pytest.raises(CallbackError) as caught:
        kernel.luo.prepare()
    error = caught.value

    assert (error.name, error.event, error.errno) == ("late", "PREPARE", errno.EIO)
    assert error.rolled_back is False
    assert [(undo.name, undo.errno) for undo in error.undo_errors] == [
        ("pci", errno.EIO),
        ("one", errno.EBUSY),
    ]
    assert len(error.__notes__) == 2
    assert State.NORMAL is kernel.luo.state


@pytest.mark.parametrize(("kind", "name", "device"), PLACES)
@pytest.mark.parametrize("event", ["CANCEL", "FINISH"])
def test_interrupt_in_cancel_or_finish_is_raised_when_all_were_called(
    event, kind, name, device, log, machine
):
    """There is no way back from CANCEL and FINISH: ^C is raised once everybody was called."""
    kernel = boot(machine, log, *chain(log))
    kernel.luo.prepare()
    if event == "FINISH":
        kernel = update(kernel, small_kernel(machine, log, chain(log)))
    everybody = {call[1:] for call in log.of("PREPARE")}
    log.clear()
    log.faults[event, kind, name, device] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        kernel.luo.cancel() if event == "CANCEL" else kernel.luo.finish()

    assert everybody == {call[1:] for call in log.of(event)}
    assert len(everybody) == len(log.of(event))
    assert State.NORMAL is kernel.luo.state
    assert not slots_exist(kernel)


@pytest.mark.parametrize(("kind", "name", "device"), PLACES)
def test_interrupt_in_cancel_of_a_rollback_does_not_end_it(kind, name, device, log, machine):
    """^C while a failed PREPARE is rolled back does not stop the rollback."""
    kernel = boot(machine, log, *chain(log))
    before = snapshot(kernel)
    log.faults["PREPARE", "subsystem", "late", None] = -errno.EIO
    log.faults["CANCEL", kind, name, device] = KeyboardInterrupt
    with pytest.raises(CallbackError) as caught:
        kernel.luo.prepare()

    assert [KeyboardInterrupt] == [type(undo) for undo in caught.value.undo_errors]
    assert [c[1:] for c in log.of("PREPARE")][-2::-1] == [c[1:] for c in log.of("CANCEL")]
    assert before == snapshot(kernel)


def test_failed_update_can_be_tried_again(log, machine):
    """After any failure the next attempt is as good as the first."""
    kernel = boot(machine, log, *chain(log))
    for key in (
        ("PREPARE", "subsystem", "early", None),
        ("PREPARE", "bus", "pci", "pci0/disk"),
        ("REBOOT", "driver", "nvme", "pci0/disk"),
        ("REBOOT", "subsystem", "late", None),
    ):
        log.clear()
        log.faults[key] = -errno.EIO
        kernel.kexec_load(small_kernel(machine, log, chain(log)))
        with pytest.raises(CallbackError):
            prepare_and_reboot(kernel, kernel.kexec)
    log.clear()
    kernel = update(kernel, small_kernel(machine, log, chain(log)))

    assert kernel.restore_failures == ()
    assert kernel.luo.finish().unreclaimed == ()


# ---- one callback at a time ----


def drive(kernel, event):
    """Run *event* step by step and return (kind, name, path) of each."""
    seen = []
    for step in kernel.luo.steps(event):
        seen.append((step.kind, step.name, step.device and step.device.path))
        step.run()
    return seen


def test_steps_make_the_same_calls_as_bulk(log, machine):
    """Both forms call the same callbacks in the same order; a step says what it is."""
    bulk = boot(machine, log, *chain(log))
    bulk.luo.prepare()
    bulk.luo.reboot()
    bulk.luo.cancel()
    expected = list(log.calls)
    log.clear()
    stepped = boot(small_machine(), log, *chain(log))
    steps = []
    for event in (Event.PREPARE, Event.REBOOT, Event.CANCEL):
        steps += [(event.name, *step) for step in drive(stepped, event)]

    assert expected == log.calls == steps
    assert snapshot(bulk) == snapshot(stepped)


def memory_of(kernel):
    """Return the bytes of every preserved block, by address."""
    return {
        int(phys): bytes(kernel.memory.view(int(phys), 4096 << int(order)))
        for phys, order in zip(*kernel.kho.preserved(), strict=True)
    }


def test_steps_leave_the_same_bytes_as_bulk(log):
    """Slots, records, blocks and LUO's node are byte for byte the same in both forms."""
    bulk = boot(small_machine(), log, *chain(log))
    stepped = boot(small_machine(), log, *chain(log))
    bulk.luo.prepare()
    drive(stepped, Event.PREPARE)
    assert memory_of(bulk) == memory_of(stepped)
    bulk.luo.reboot()
    drive(stepped, Event.REBOOT)

    assert memory_of(bulk) == memory_of(stepped)
    assert snapshot(bulk) == snapshot(stepped)
    assert len(memory_of(bulk)) > 4


def test_steps_not_run_by_hand_run_when_the_next_is_asked_for(log, machine):
    """Going on to the next step runs the one before."""
    kernel = boot(machine, log, *chain(log))
    count = sum(1 for _ in kernel.luo.steps(Event.PREPARE))

    assert count == len(log.calls) > 0
    assert State.PREPARED is kernel.luo.state


def test_steps_finish_in_the_next_kernel(log, machine):
    """FINISH can be stepped as well and frees what came over."""
    kernel = boot(machine, log, *chain(log))
    kernel = update(kernel, small_kernel(machine, log, chain(log)))
    log.clear()
    steps = drive(kernel, Event.FINISH)

    assert [call[1:] for call in log.calls] == steps
    assert State.NORMAL is kernel.luo.state
    assert kernel.kho.incoming.nr_unrestored == KHO_OWN


@pytest.mark.parametrize("run", [0, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("event", [Event.PREPARE, Event.REBOOT])
def test_steps_closed_early_roll_back(event, run, log, machine):
    """Closing the steps of PREPARE or REBOOT cancels what was called, in reverse."""
    kernel = boot(machine, log, *chain(log))
    before = snapshot(kernel)
    if event is Event.REBOOT:
        kernel.luo.prepare()
    steps = kernel.luo.steps(event)
    for number, step in enumerate(steps):
        if number >= run:
            break
        step.run()
    steps.close()
    if run == 100:  # every step had run
        expected = State.PREPARED
    else:
        expected = State.NORMAL
        assert [c[1:] for c in log.of("PREPARE")][::-1] == [c[1:] for c in log.of("CANCEL")]
        assert before == snapshot(kernel)
    assert expected is kernel.luo.state


@pytest.mark.parametrize("run", range(14))
def test_steps_of_cancel_closed_early_are_completed(run, log, machine):
    """CANCEL has no way back: closing its steps runs what is left, each callback once."""
    kernel = boot(machine, log, *chain(log))
    before = snapshot(kernel)
    kernel.luo.prepare()
    steps = kernel.luo.steps(Event.CANCEL)
    for _, step in zip(range(run), steps, strict=False):
        step.run()
    next(steps, None)
    steps.close()

    assert [c[1:] for c in log.of("PREPARE")][::-1] == [c[1:] for c in log.of("CANCEL")]
    assert before == snapshot(kernel)


def test_steps_never_asked_do_nothing(log, machine):
    """Making the generator starts nothing."""
    kernel = boot(machine, log)
    kernel.luo.steps(Event.PREPARE).close()

    assert log.calls == []
    kernel.luo.prepare()


def test_step_run_twice_is_ealready(log, machine):
    """A callback is called once."""
    kernel = boot(machine, log, *chain(log))
    steps = kernel.luo.steps(Event.PREPARE)
    step = next(steps)
    step.run()

    assert errno_of(step.run) == errno.EALREADY
    assert len(log.calls) == 1
    steps.close()


def test_step_kept_after_the_end_is_not_run(log, machine):
    """A step of an event that was closed calls nobody any more."""
    kernel = boot(machine, log, *chain(log))
    steps = kernel.luo.steps(Event.PREPARE)
    next(steps)
    late = next(steps)
    steps.close()
    log.clear()

    assert errno_of(late.run) == errno.EALREADY
    assert log.calls == []
    assert State.NORMAL is kernel.luo.state


def test_step_that_fails_has_rolled_back_when_it_raises(log, machine):
    """run() raises the callback's error after the rollback, and the steps are over."""
    kernel = boot(machine, log, *chain(log))
    before = snapshot(kernel)
    log.faults["PREPARE", "driver", "nic", "pci0/port/nic1"] = -errno.EIO
    steps = kernel.luo.steps(Event.PREPARE)
    with pytest.raises(CallbackError) as caught:
        drain(steps)

    assert caught.value.rolled_back is True
    assert before == snapshot(kernel)
    assert list(steps) == []
    log.clear()
    kernel.luo.prepare()


def test_step_failure_caught_by_the_caller_ends_the_event(log, machine):
    """Whoever swallows the error gets no further step: the event is over."""
    kernel = boot(machine, log, *chain(log))
    log.faults["PREPARE", "driver", "nic", "pci0/port/nic1"] = -errno.EIO
    steps = kernel.luo.steps(Event.PREPARE)
    for step in steps:
        errno_of(step.run)

    assert log.of("PREPARE")[-1] == ("PREPARE", "driver", "nic", "pci0/port/nic1")
    assert State.NORMAL is kernel.luo.state


def test_steps_open_keep_the_lock(log, machine):
    """Between two steps the event goes on: another one is refused."""
    kernel = boot(machine, log)
    steps = kernel.luo.steps(Event.PREPARE)
    next(steps)

    assert errno_of(kernel.luo.prepare) == errno.EDEADLK
    steps.close()
    kernel.luo.prepare()


def test_steps_left_open_when_the_kernel_goes_are_harmless(log, machine):
    """A kernel may be switched off between two steps; nobody is called any more."""
    kernel = boot(machine, log, *chain(log))
    steps = kernel.luo.steps(Event.PREPARE)
    step = next(steps)
    step.run()
    kernel.close()
    log.clear()
    steps.close()

    assert log.calls == []
    boot(machine, log)


# ---- what subsystems carry over ----


@pytest.mark.parametrize("value", [0, 1, 0x1234_5678_9ABC_DEF0, 2**64 - 1])
def test_context_data_is_carried_over(value, log, machine):
    """A subsystem's u64 is in the next kernel's context in RESTORE and FINISH, then it is 0."""
    seen = []

    def tell(context):
        seen.append((context.event, context.data))

    def give(context):
        context.data = value

    old = [Subsystem("other"), Subsystem("one", prepare=give)]
    new = [Subsystem("one", restore=tell, finish=tell, prepare=tell), Subsystem("third")]
    kernel = update(boot(machine, log, *old), small_kernel(machine, log, new))
    kernel.luo.finish()
    kernel.luo.prepare()

    assert [("RESTORE", value), ("FINISH", value), ("PREPARE", 0)] == seen


def test_context_data_of_reboot_is_what_goes_over(log, machine):
    """REBOOT may still change it."""
    seen = []

    def give(context):
        context.data += 7 if context.event == "PREPARE" else 100

    parts = [Subsystem("one", prepare=give, reboot=give, restore=lambda c: seen.append(c.data))]
    update(boot(machine, log, *parts), small_kernel(machine, log, parts))

    assert seen == [107]


@pytest.mark.parametrize("event", ["PREPARE", "REBOOT"])
def test_context_data_is_0_again_after_a_failure(event, log, machine):
    """What a failed update left in a context does not get into the next one."""
    seen = []

    def give(context):
        seen.append(context.data)
        context.data = 5
        if len(seen) == 1 and event == "PREPARE":
            raise OSError(errno.EIO, "once")

    def fail(context):
        return -errno.EIO

    kernel = boot(
        machine, log, Subsystem("one", prepare=give, reboot=fail if event == "REBOOT" else None)
    )
    with pytest.raises(CallbackError):
        prepare_and_reboot(kernel)
    kernel.luo.prepare()

    assert seen == [0, 0]


@pytest.mark.parametrize("value", [-1, 2**64])
def test_context_data_out_of_range_is_overflow_error(value, log, machine):
    """It is an unsigned 64-bit number."""

    def give(context):
        context.data = value

    kernel = boot(machine, log, Subsystem("one", prepare=give))
    with pytest.raises(CallbackError) as caught:
        kernel.luo.prepare()

    assert isinstance(caught.value.__cause__, OverflowError)


def test_context_has_kernel_kho_memory_and_event(log, machine):
    """A context names its event and leads to the kernel's parts."""
    seen = []

    def look(context):
        seen.append((context.event, context.kernel, context.kho, context.memory))

    kernel = boot(machine, log, Subsystem("one", prepare=look, cancel=look))
    kernel.luo.prepare()
    kernel.luo.cancel()

    expected = (kernel, kernel.kho, machine.memory)
    assert [("PREPARE", *expected), ("CANCEL", *expected)] == seen


def test_luo_node_is_what_the_format_says(log, machine):
    """LUO's blob has version 1.0, the devices' chains and one node a subsystem."""

    def give(context):
        context.data = 77

    kernel = boot(machine, log, Subsystem("one", prepare=give), Subsystem("two"))
    kernel.luo.prepare()
    kernel.luo.reboot()
    node = kernel.kho.root.node(f"/{abi.LUO_NODE}")
    phys, nbytes = (
        int.from_bytes(node["preserved-data"], "little"),
        int.from_bytes(node["blob-size"], "little"),
    )
    blob = Fdt(kernel.memory.view(phys, nbytes))

    assert struct.pack("=II", 1, 0) == bytes(blob.root["version"])
    assert len(SMALL) == int.from_bytes(blob.node("/devices")["count"], "little")
    assert sorted(child.name for child in blob.node("/subsystems").children) == ["one", "two"]
    assert int.from_bytes(blob.node("/subsystems/one")["data"], "little") == 77


# ---- the next boot ----


OURS = struct.pack("=II", 1, 0)


def left_behind(machine, log, version=OURS, *, data=None):
    """Hand over with LUO's node, made by hand; return the handover."""
    kernel = small_kernel(machine, log).boot()
    writer = FdtWriter()
    with writer.node(""):
        if version is not None:
            writer.property("version", version)
    blob = bytes(writer.finish()) if data is None else data
    kernel.kho.save_subtree(abi.LUO_NODE, blob)
    handover = hand_over(kernel.kho)
    kernel.close()
    return handover


@pytest.mark.parametrize("blob", [b"no tree at all", b"\xd0\x0d\xfe\xed" + bytes(60)])
def test_validate_of_a_luo_node_that_is_no_tree_is_handover_error(blob, log, machine):
    """Bytes under LUO's name that are no tree are refused before the first write."""
    handover = left_behind(machine, log, data=blob)
    machine.memory.forget()
    with pytest.raises(HandoverError):
        small_kernel(machine, log).validate(handover)


def test_kexec_after_cancel_boots_normal(log, machine):
    """A cancelled REBOOT leaves no node: the next ordinary kexec boots NORMAL (quirk 5)."""
    kernel = boot(machine, log)
    kernel.luo.prepare()
    kernel.luo.reboot()
    kernel.luo.cancel()
    kernel.kexec_load(small_kernel(machine, log))
    kernel = kernel.kexec()

    assert State.NORMAL is kernel.luo.state
    assert kernel.kho.incoming.nr_unrestored == KHO_OWN


def test_live_update_after_cancelled_reboot_works(log, machine):
    """A cancelled attempt does not stand in the way of the next (quirk 5)."""
    kernel = boot(machine, log, *chain(log))
    for _ in range(3):
        kernel.luo.prepare()
        kernel.luo.dry_reboot()
    kernel = update(kernel, small_kernel(machine, log, chain(log)))

    assert State.UPDATED is kernel.luo.state
    assert len(SMALL) == int(kernel.devices.reclaimed.sum())


def test_kexec_in_updated_is_an_ordinary_one(log, machine):
    """UPDATED and kexec: no callback, and what was preserved is lost."""
    kernel = boot(machine, log, *chain(log))
    kernel = update(kernel, small_kernel(machine, log, chain(log)))
    log.clear()
    kernel.kexec_load(small_kernel(machine, log, chain(log)))
    kernel = kernel.kexec()

    assert log.calls == []
    assert State.NORMAL is kernel.luo.state
    assert not kernel.devices.preserved.any()


def test_prepare_out_of_memory_is_as_before(log):
    """No room for slots fails PREPARE with ENOMEM and leaves all as before."""
    machine = small_machine()
    kernel = boot(machine, log, *chain(log))
    taken = kernel.memory.alloc_folios(kernel.memory.nr_free_pages(), 0)
    kernel.memory.free(int(taken[0]))
    before = snapshot(kernel)
    with pytest.raises(KhoError) as caught:
        kernel.luo.prepare()

    assert caught.value.errno == errno.ENOMEM
    assert before == snapshot(kernel)
    kernel.memory.free_folios(np.ascontiguousarray(taken[1:]))
    kernel.luo.prepare()
