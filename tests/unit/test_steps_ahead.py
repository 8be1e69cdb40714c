"""Steps that are under way side by side, and REBOOT, jump and restore by steps."""

import errno

import pytest
from rig import Log, forest, settled, small_kernel, small_machine, snapshot

import luo
from luo.errors import CallbackError, StateError
from luo.kernel import Kernel
from luo.liveupdate import Event, State
from luo.machine import Machine


def prepared_host(events=("prepare", "reboot", "cancel", "restore", "finish"), batched=False):
    """A running kernel of three devices side by side, all requested, and its log."""
    log = Log()
    tree = forest({f"n{number}": ("pci", "nic") for number in range(3)})

    def kernel(machine):
        ops = log.ops("driver", "nic", size=8, events=events, batched=batched)
        bus = log.ops("bus", "pci", size=8, events=events)
        return Kernel(
            machine, drivers=[luo.Driver("nic", ops)], buses=[luo.Bus("pci", bus)],
            subsystems=[log.subsystem("kvm")],
        )  # fmt: skip

    running = kernel(Machine("64MiB", tree)).boot()
    running.devices.request("*")
    return running, kernel, log


def names(steps):
    """(kind, device) of each step."""
    return [(step.kind, step.device and step.device.name) for step in steps]


SIDES = [(kind, f"n{number}") for number in range(3) for kind in ("driver", "bus")]


def test_steps_ahead_are_handed_out_up_to_a_barrier():
    """Nobody but the subsystem before them has run by then; what follows has them run."""
    kernel, _, log = prepared_host()
    steps = kernel.luo.steps(Event.PREPARE, ahead=True)
    seen = [next(steps) for _ in range(8)]

    assert names(seen) == [("subsystem", None), *SIDES, ("barrier", None)]
    assert len(log.calls) == 1
    assert not kernel.devices.preserved.any()
    assert next(steps, None) is None
    assert len(log.calls) == 7
    assert kernel.luo.state is State.PREPARED
    assert kernel.devices.preserved.all()


def test_steps_ahead_run_in_any_order():
    """Last device first, driver before bus: what each saved is found in the next kernel."""
    kernel, build, log = prepared_host()
    kernel.kexec_load(build(kernel.machine))
    handed_out = []
    for step in kernel.luo.steps(Event.PREPARE, ahead=True):
        if step.kind == "barrier":
            for each in sorted(handed_out, key=lambda step: -step.device.index):
                each.run()
        elif step.device is not None:
            handed_out.append(step)

    called = [call[3] for call in log.of("PREPARE")[1:]]
    assert called == ["n2", "n2", "n1", "n1", "n0", "n0"]
    new = kernel.kexec()
    assert new.restore_failures == ()
    assert new.luo.finish().unreclaimed == ()


@pytest.mark.parametrize("ran", [(), (0,), (4,), (0, 1, 4)])
def test_steps_ahead_closed_early_cancel_only_who_ran(ran):
    """Steps that were handed out and never run have nothing to undo."""
    kernel, _, log = prepared_host()
    before = settled(kernel)
    log.clear()
    steps = kernel.luo.steps(Event.PREPARE, ahead=True)
    seen = [step for _, step in zip(range(7), steps, strict=False)][1:]
    for place in ran:
        seen[place].run()
    steps.close()

    assert snapshot(kernel) == before
    cancelled = {call[1:] for call in log.of("CANCEL")}
    assert cancelled == {call[1:] for call in log.of("PREPARE")}
    assert len(cancelled) == 1 + len(ran)
    with pytest.raises(StateError):
        seen[5].run()


def test_step_ahead_that_fails_rolls_back_and_gives_up_the_others():
    """The second device fails, the third has run, the first has not."""
    kernel, _, log = prepared_host()
    before = settled(kernel)
    log.clear()
    log.faults["PREPARE", "driver", "nic", "n1"] = -errno.EBUSY
    steps = kernel.luo.steps(Event.PREPARE, ahead=True)
    seen = [step for _, step in zip(range(7), steps, strict=False)][1:]
    seen[4].run()
    with pytest.raises(CallbackError):
        seen[2].run()

    assert snapshot(kernel) == before
    assert [call[1:] for call in log.of("CANCEL")] == [
        ("driver", "nic", "n2"), ("subsystem", "kvm", None)
    ]  # fmt: skip
    with pytest.raises(StateError):
        seen[0].run()
    assert next(steps, None) is None


def test_finish_ahead_closed_early_is_completed():
    """There is no way back: those handed out run, and those that were not."""
    kernel, build, log = prepared_host()
    kernel.kexec_load(build(kernel.machine))
    kernel.luo.prepare()
    new = kernel.kexec()
    steps = new.luo.steps(Event.FINISH, ahead=True)
    next(steps)
    next(steps)
    steps.close()

    assert len(log.of("FINISH")) == 7
    assert new.luo.state is State.NORMAL


def test_batch_with_a_bus_that_is_called_has_a_barrier_between():
    """They serve the same devices; a bus without callbacks needs none."""
    kernel, _, _ = prepared_host(batched=True)
    seen = names(kernel.luo.steps(Event.PREPARE, ahead=True))

    barrier = ("barrier", None)
    buses = [("bus", f"n{number}") for number in range(3)]
    assert seen == [("subsystem", None), ("driver", None), barrier, *buses, barrier]


def test_batch_whose_bus_is_silent_leaves_it_prepared_with_it():
    """A bus with nothing but cancel: it is told of the devices whose driver was prepared."""
    log = Log()
    tree = forest({f"n{number}": ("pci", "nic") for number in range(3)})
    ops = log.ops("driver", "nic", events=["prepare"], batched=True)
    kernel = Kernel(
        Machine("64MiB", tree),
        drivers=[luo.Driver("nic", ops)],
        buses=[luo.Bus("pci", log.ops("bus", "pci", events=["cancel"]))],
    ).boot()
    kernel.devices.request("*")

    assert names(kernel.luo.steps(Event.PREPARE, ahead=True)) == [
        ("driver", None),
        ("barrier", None),
    ]
    kernel.luo.cancel()
    assert len(log.of("CANCEL")) == 3


# ---- kexec by steps ----


def test_kexec_steps_jump_and_restore():
    """The next kernel is what the generator returns; its marks are those of kexec()."""
    kernel, build, log = prepared_host()
    kernel.kexec_load(build(kernel.machine))
    kernel.luo.prepare()
    log.clear()
    steps = kernel.kexec_steps(verify=True)
    seen = []
    try:
        while True:
            seen.append(next(steps))
    except StopIteration as end:
        new = end.value

    assert len(log.of("REBOOT")) == len(log.of("RESTORE")) == 7
    assert [step.kind for step in seen].count("barrier") == 2
    assert new.luo.state is State.UPDATED
    assert {"boot", "restore"} <= new.marks.keys()
    assert {"prepare", "reboot"} == kernel.marks.keys() - {"boot"}
    assert new.arrival.verified_bytes == new.arrival.state_bytes > 0
    assert new.luo.finish().unreclaimed == ()


def test_kexec_steps_closed_in_reboot_cancel():
    """Before the commit point there is a way back."""
    kernel, build, _ = prepared_host()
    before = settled(kernel)
    kernel.kexec_load(build(kernel.machine))
    kernel.luo.prepare()
    steps = kernel.kexec_steps()
    next(steps)
    steps.close()

    assert snapshot(kernel) == before
    assert not kernel.kexec_loaded


def test_kexec_steps_closed_in_restore_complete_it():
    """After it there is none: everybody has a turn."""
    kernel, build, log = prepared_host()
    machine = kernel.machine
    kernel.kexec_load(build(machine))
    kernel.luo.prepare()
    steps = kernel.kexec_steps()
    while not log.of("RESTORE"):
        next(steps)
    steps.close()

    assert len(log.of("RESTORE")) == 7
    assert machine.running.luo.finish().unreclaimed == ()


def test_kexec_steps_without_a_kernel_in_this_process_are_refused():
    """Nobody is loaded; and another process has no steps."""
    kernel = small_kernel(small_machine(), Log()).boot()

    with pytest.raises(StateError) as caught:
        next(kernel.kexec_steps())
    assert caught.value.errno == errno.EINVAL
