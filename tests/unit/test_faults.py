"""``luo faults``: every callback fails in every way; what is half preserved is found, and named."""

import contextlib
import ctypes
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import kernels
import numpy as np
import pytest

import luo
from luo import faults
from luo.abi import GENERATIONS
from luo.cli import main
from luo.dev_liveupdate import DeviceParticipant
from luo.device import Driver, LiveUpdateOps, native
from luo.errors import KhoError, LuoError
from luo.faults import KINDS, REFUSAL, Fault
from luo.faults.injection import Allocations, exhausted
from luo.faults.trial import (
    CANCEL,
    COMPLETED,
    CRASHED,
    ENGINE,
    LEAVING,
    REBOUND,
    ROLLED_BACK,
    UNBOUND,
    UNLOADED,
    Case,
    Rig,
    Subject,
    choose,
)
from luo.kernel import Kernel, KernelImage
from luo.liveupdate import Orchestrator
from luo.machine import Machine
from luo.notifier import Priority, State, Subsystem, SubsystemParticipant

IN_PROCESS = tuple(kind for kind in KINDS if kind != "death")
CALLBACKS = {
    *(("subsystem", name) for name in ("early", "amid", "late")),
    *(("driver", name) for name in ("portdrv", "nic", "nvme")),
    ("bus", "pci"),
}


def rig(quirks=(), machine=kernels.every_machine, **kwargs):
    """Return a rig of the kernel with every kind of callback."""

    def build(machine):
        return kernels.every(machine, quirks=quirks, **kwargs)

    with build(machine()) as kernel:
        devices, names = choose(kernel), kernel.quirks
    return Rig(Subject(machine, build, build, None), names, devices)


def wrong(case, *before, **kwargs):
    """Return the names of the checks that fail in *case* on a fresh rig, and the trial."""
    bench = rig(**kwargs)
    for earlier in before:
        bench.run(earlier)
    trial = bench.run(case)
    bench.close()
    return {name for name, _ in trial.wrong}, trial


def device(path):
    """Return the number of the device at *path*."""
    return kernels.every_machine().devices[path]


def fault(kind, name, event, what="errno", path=None):
    """Return a fault at the device *path*."""
    return Fault(kind, name, event, what, None if path is None else device(path))


# ---- the intended behaviour ----


@pytest.fixture(scope="module")
def report():
    """Every fault of the kinds that need no second process, in pairs too."""
    return faults.run(kernels.every, kernels.every_machine, kinds=IN_PROCESS, pairs=True)


def test_run_of_intended_behaviour_violates_nothing(report):
    """After each update everything is as before, or the update is complete."""
    assert report.ok, "\n\n".join(map(str, report.violations))
    assert report.uncovered == report.unused == []


def test_run_covers_every_callback_of_the_kernel(report):
    """Five events of seven owners, two sizes, and probe and shutdown of two drivers."""
    events = ("PREPARE", "REBOOT", "RESTORE", "FINISH", "CANCEL")
    expected = {(*owner, event) for owner in CALLBACKS for event in events}
    expected |= {("driver", name, "STATE_SIZE") for name in ("nic", "nvme")}
    for event in ("PROBE", "SHUTDOWN"):
        expected |= {("driver", name, event) for name in ("nvme", "tty")}
    assert len(expected) == 41

    found = {key for key in report.callbacks if key[0] not in ("kernel", "image")}

    assert found == expected


@pytest.mark.parametrize("what", IN_PROCESS)
def test_run_makes_every_kind_of_fault_at_every_callback(report, what):
    """Probe and shutdown have no result, and no limit; nor is a size's time limited."""
    out = {"positive": ("PROBE", "SHUTDOWN"), "delay": ("PROBE", "SHUTDOWN", "STATE_SIZE")}
    expected = {key for key in report.callbacks if key[0] not in ("kernel", "image")}
    expected = {key for key in expected if key[2] not in out.get(what, ())}

    found = {row.faults[0].key for row in report.rows if row.fault == what}

    assert {key for key in found if key[0] not in ("kernel", "image")} == expected


def test_run_fails_the_first_a_middle_and_the_last_device(report):
    """One by one, and in a batch through the array of results, and the batch as a whole."""
    rows = [row for row in report.rows if len(row.faults) == 1 and row.fault == "errno"]

    def where(kind, name):
        return {row.where for row in rows if row.faults[0].key == (kind, name, "PREPARE")}

    assert where("driver", "nic") == {"", *(f"pci0/port/nic{number}" for number in (0, 2, 4))}
    assert len(where("bus", "pci")) == 3
    assert where("driver", "nvme") == {"pci0/disk"}


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        ("STATE_SIZE", ROLLED_BACK),
        ("PREPARE", ROLLED_BACK),
        ("REBOOT", ROLLED_BACK),
        ("CANCEL", ROLLED_BACK),
        ("RESTORE", COMPLETED),
        ("FINISH", COMPLETED),
        ("PROBE", COMPLETED),
        ("SHUTDOWN", COMPLETED),
    ],
)
def test_run_of_a_callback_that_fails_ends_as_its_event_has_it(report, event, outcome):
    """Before the jump it is rolled back, after it there is no way back."""
    outcomes = {
        row.outcome
        for row in report.rows
        if row.event == event and row.kind != "kernel" and row.fault in ("errno", "exception")
    }

    assert outcomes == {outcome}


def test_run_in_pairs_covers_the_failure_of_what_undoes_a_failure(report):
    """PREPARE or REBOOT with each CANCEL, a refusal with each CANCEL, RESTORE with each FINISH."""
    events = {row.event for row in report.rows if len(row.faults) == 2}

    assert events == {
        "PREPARE + CANCEL",
        "REBOOT + CANCEL",
        "VALIDATE + CANCEL",
        "RESTORE + FINISH",
    }


def test_run_tries_each_allocation_of_prepare_and_boot(report):
    """Memory ends at the first, at the last, and between; also in the successor."""
    places = {
        event: [
            row.faults[0].place
            for row in report.rows
            if row.faults[:1] and row.faults[0].key == (*ENGINE, event)
        ]
        for event in ("PREPARE", "BOOT")
    }

    assert places["PREPARE"] == list(range(1, len(places["PREPARE"]) + 1))
    assert len(places["PREPARE"]) >= 4
    assert {row.outcome for row in report.rows if row.event == "BOOT"} == {CRASHED}


def test_kexec_that_is_refused_tells_which_cancel_failed():
    """Nothing that fails in a rollback is lost."""
    found, trial = wrong(Case((REFUSAL, fault("subsystem", "late", "CANCEL"))))

    assert found == set()
    assert trial.error.rolled_back is False
    assert [problem.name for problem in trial.error.undo_errors] == ["late"]
    assert trial.error.__notes__[0].startswith("while cancelling: CANCEL subsystem late")


@pytest.mark.parametrize("abi", GENERATIONS)
def test_run_in_every_generation_violates_nothing(abi):
    """The handover's format changes nothing about who is rolled back."""
    report = faults.run(
        lambda machine: kernels.every(machine, kho_abi=abi),
        kernels.every_machine,
        requests=["pci0/disk"],
        kinds=["errno", "memory"],
    )

    assert report.ok, "\n\n".join(map(str, report.violations))


def test_run_with_a_second_process_kills_it_in_every_event():
    """Before the commit point that is a rollback, after it the host is down, and boots again."""
    report = faults.run(KernelImage("kernels:few"), kernels.every_machine, kinds=["death"])

    assert report.ok, "\n\n".join(map(str, report.violations))
    outcomes = {(row.kind, row.event): row.outcome for row in report.rows if row.faults}
    for event in ("LOAD", "WAIT", "VALIDATE"):
        assert outcomes["image", event] == ROLLED_BACK
    for event in ("PREPARE", "REBOOT", "CANCEL"):
        assert outcomes["driver", event] == outcomes["subsystem", event] == ROLLED_BACK
    for event in ("RESTORE", "FINISH"):
        assert outcomes["driver", event] == outcomes["subsystem", event] == CRASHED
    assert outcomes["image", "BOOT"] == CRASHED


def test_run_of_what_is_no_kind_of_fault_is_refused():
    """A word that is none of them is the caller's mistake."""
    with pytest.raises(ValueError, match="fault 'fire'"):
        faults.run(kernels.every, kernels.every_machine, kinds=["fire"])


def test_run_of_a_request_that_matches_nothing_is_refused():
    """A pattern that is misspelt would test nothing."""
    with pytest.raises(ValueError, match="no device matches"):
        faults.run(kernels.every, kernels.every_machine, requests=["usb*"])


def test_run_whose_progress_raises_stops_and_leaves_no_kernel():
    """That is how ^C ends it."""
    machines = []

    def machine():
        machines.append(kernels.every_machine())
        return machines[-1]

    def stop(done, total, what):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        faults.run(kernels.every, machine, progress=stop)

    assert [machine.running for machine in machines] == [None] * len(machines)


# ---- each check finds what it is for: one planted bug each ----


def meddler(event, work, priority=Priority.BEFORE_DEVICES):
    """Return a subsystem that does *work* to the kernel in one event."""

    def callback(context):
        work(context.kernel)

    return Subsystem("meddler", priority=priority, **{event: callback})


def flag(name, value):
    """Return what sets one flag of the first device."""

    def work(kernel):
        getattr(kernel.devices, name)[0] = value

    return work


def leave_slots(kernel):
    kernel.devices.slotted = True


def leak_pages(kernel):
    kernel.memory.alloc_folio(0)


def leak_preserved(kernel):
    kernel.kho.alloc_preserve(4096)


def count_link(kernel):
    kernel.devices.nr_linked += 1


def hold(kernel):
    kernel.devices.references[0] += 1


@pytest.mark.parametrize(
    ("check", "work"),
    [
        ("requested", flag("requested", True)),
        ("preserved", flag("preserved", True)),
        ("reclaimed", flag("reclaimed", True)),
        ("slots", leave_slots),
        ("references", hold),
        ("nr_linked", count_link),
        ("free pages", leak_pages),
        ("preserved set", leak_preserved),
    ],
)
def test_check_of_a_rollback_finds_what_a_cancel_callback_leaves(monkeypatch, check, work):
    """A flag, a slot, a reference, a link, a page, a preserved page."""
    settled = []
    look = luo.faults.trial.look

    def looked(kernel):
        settled.append(1)  # the bug begins when the rig has taken its first look
        return look(kernel)

    monkeypatch.setattr("luo.faults.trial.look", looked)
    part = meddler("cancel", lambda kernel: settled and work(kernel))

    found, _ = wrong(Case(script=CANCEL), subsystems=[part])

    assert check in found


def test_check_of_free_blocks_finds_a_page_that_was_exchanged_for_another(monkeypatch):
    """As many are free as before, but not the same."""
    pages = []

    def exchange(context):
        memory = context.memory
        pages.append(memory.alloc_folio(0))
        if len(pages) > 1:
            memory.free(pages[-2])

    part = Subsystem("meddler", cancel=exchange)

    found, _ = wrong(Case(script=CANCEL), subsystems=[part])

    assert found == {"free blocks"}


def test_check_that_nobody_fails_unasked_finds_a_double_free():
    """The second one is EINVAL, in a CANCEL that nobody made fail."""

    def prepare(context):
        context.data = context.kho.alloc_preserve(4096)

    def cancel(context):
        context.kho.unpreserve_free(context.data)
        context.kho.unpreserve_free(context.data)

    part = Subsystem("twice", prepare=prepare, cancel=cancel)

    found, trial = wrong(Case(script=CANCEL), subsystems=[part])

    assert found == {"no fault"}
    assert dict(trial.wrong)["no fault"].startswith("subsystem twice failed CANCEL")


def test_check_of_state_finds_an_update_that_does_not_come_back(monkeypatch):
    """A rollback that forgets to say NORMAL."""
    real = Orchestrator._roll_back

    def roll_back(self, event, error):
        real(self, event, error)
        self._state = State.PREPARED

    monkeypatch.setattr(Orchestrator, "_roll_back", roll_back)

    found, _ = wrong(Case((fault("subsystem", "late", "PREPARE"),)))

    assert "state" in found


def test_check_of_the_tree_finds_the_node_of_an_update_that_was_undone(monkeypatch):
    """What would boot the next kernel as UPDATED."""
    monkeypatch.setattr(Orchestrator, "_leave", lambda self: setattr(self, "_joined", 0))

    found, _ = wrong(Case((REFUSAL,)))

    assert "KHO's tree" in found


@pytest.mark.parametrize(
    ("check", "quirk", "case", "before"),
    [
        ("outcome", "positive-return-stops", ("subsystem", "amid", "PREPARE", "positive"), ()),
        ("outcome", "no-callback-limit", ("subsystem", "amid", "REBOOT", "delay"), ()),
        ("callbacks", "reboot-half-cancelled", ("bus", "pci", "REBOOT", "errno", "pci0/disk"), ()),
        ("callbacks", "failure-stops-the-rest", ("subsystem", "late", "FINISH"), ()),
        ("order", "cancel-not-reversed", (), ()),
        ("priorities", "priorities-inverted", (), ()),
    ],
)
def test_check_finds_the_quirk_that_breaks_it(check, quirk, case, before):
    """Without the quirk nothing is found."""
    given = Case((fault(*case),) if case else ())

    assert check in wrong(given, *before, quirks=[quirk])[0]
    assert wrong(given, *before)[0] == set()


@pytest.mark.parametrize(
    ("check", "quirk", "case"),
    [
        ("no image", "no-image-check", Case(script=UNLOADED)),
        ("room", "written-in-reboot", Case(room=64)),
        ("KHO's tree", "node-left-behind", Case((REFUSAL,))),
        ("reclaimed", "flags-not-restored", Case()),
        ("preserved", "list-freed-at-reboot", Case((REFUSAL,))),
    ],
)
def test_check_in_rfc1s_own_generation_finds_the_quirk(check, quirk, case):
    """The ones that are about the tree of kho-v5-series."""
    given = {"kho_abi": "kho-v5-series"}

    assert check in wrong(case, quirks=[quirk], **given)[0]
    assert wrong(case, **given)[0] == set()


@pytest.mark.parametrize(
    ("check", "quirk", "script", "path"),
    [
        ("references", "reference-leak", REBOUND, "pci0/port"),
        ("outcome", "eligibility-checked-once", UNBOUND, "pci0/disk"),
        ("callbacks", "register-when-prepared", LEAVING, None),
    ],
)
def test_check_of_what_goes_in_an_update_finds_the_quirk(check, quirk, script, path):
    """A driver that goes, one that comes back, a subsystem that leaves."""
    case = Case((fault("kernel", "gone", "PREPARE", "errno", path),), script)

    assert check in wrong(case, quirks=[quirk])[0]
    assert wrong(case)[0] == set()


def test_check_of_children_finds_a_parent_that_is_prepared_first():
    """RFC v1's uninitialised pointer."""
    bench = rig(quirks=["depth-from-garbage"])
    bench.close()
    bench.devices = (device("pci0/port/nic1"),)
    bench.machine = kernels.every_machine()
    bench.start()

    trial = bench.run(Case())
    bench.close()

    assert "children first" in dict(trial.wrong)


def test_check_of_the_result_finds_a_failure_that_is_hidden():
    """The second CANCEL that fails."""
    case = Case((fault("subsystem", "late", "CANCEL"),), CANCEL)

    assert "result" in wrong(case, case, quirks=["warn-once"])[0]
    assert wrong(case, case)[0] == set()


def test_check_of_the_second_update_finds_who_cannot_be_prepared_again():
    """It stopped in REBOOT, and nobody has told it to go on."""
    stopped = []

    def reboot(context):
        stopped.append(1)

    def prepare(context):
        return -errno.EBUSY if stopped else 0

    part = Subsystem("stubborn", prepare=prepare, reboot=reboot)

    assert "second update" in wrong(Case((REFUSAL,), after="update"), subsystems=[part])[0]


def test_check_of_an_ordinary_kexec_finds_one_that_fails(monkeypatch):
    """After a live update that did not happen the kernel can still be changed."""
    real = Kernel._hand_over

    def hand_over(self, live):
        if not live:
            raise KhoError(errno.EBUSY, "somebody has finalized KHO")
        return real(self, live)

    monkeypatch.setattr(Kernel, "_hand_over", hand_over)

    assert wrong(Case((REFUSAL,), after="kexec"))[0] == {"ordinary kexec"}


def test_check_that_a_fault_happens_finds_a_callback_that_is_left_out(monkeypatch):
    """Else a case would test nothing, and nobody would know."""
    real = SubsystemParticipant.steps

    def steps(self, event, bulk):
        return iter(()) if event == "REBOOT" else real(self, event, bulk)

    monkeypatch.setattr(SubsystemParticipant, "steps", steps)

    assert "reached" in wrong(Case((fault("subsystem", "late", "REBOOT"),)))[0]


@pytest.mark.parametrize(
    ("field", "value"), [("errno", errno.EPERM), ("name", "amid"), ("kind", "driver")]
)
def test_check_of_the_error_finds_the_wrong_culprit(monkeypatch, field, value):
    """Errno, name and kind are those of the callback that failed."""
    real = Orchestrator._roll_back

    def roll_back(self, event, error):
        setattr(error, field, value)
        real(self, event, error)

    monkeypatch.setattr(Orchestrator, "_roll_back", roll_back)

    assert wrong(Case((fault("subsystem", "late", "PREPARE"),)))[0] == {"error"}


def test_check_of_shutdown_finds_a_preserved_device_that_is_shut_down(monkeypatch):
    """The disk is preserved, the console is not."""
    real = Kernel._each

    def each(self, callback):
        if callback != "shutdown":
            return real(self, callback)
        preserved, self.devices.preserved = self.devices.preserved, np.zeros(9, np.bool_)
        try:
            return real(self, callback)
        finally:
            self.devices.preserved = preserved

    monkeypatch.setattr(Kernel, "_each", each)

    found, trial = wrong(Case())

    assert found == {"shutdown"}
    assert "pci0/disk was shut down 1 times, 0 were expected" in dict(trial.wrong)["shutdown"]


def test_check_of_shutdown_finds_a_device_that_is_forgotten(monkeypatch):
    """Nobody is shut down."""
    monkeypatch.setattr(Kernel, "_shutdown_devices", lambda self: None)

    assert wrong(Case())[0] == {"shutdown"}


def test_check_of_probe_finds_a_restored_device_that_is_probed(monkeypatch):
    """The next kernel holds probing back."""
    real = Kernel._probe

    def probe(self, devices):
        real(self, [*devices, self.devices["pci0/disk"]])

    monkeypatch.setattr(Kernel, "_probe", probe)

    assert "probe" in wrong(Case())[0]


def test_check_of_unrestored_memory_finds_slots_that_finish_does_not_free(monkeypatch):
    """The engine's own memory, which no callback that failed excuses."""
    monkeypatch.setattr(DeviceParticipant, "_release", DeviceParticipant._forget)

    assert "unrestored" in wrong(Case())[0]
    assert "unrestored" in wrong(Case((fault("driver", "nvme", "RESTORE"),)))[0]


def test_check_of_memory_after_an_update_finds_what_finish_leaks():
    """Each kernel has a page less than the one before."""
    part = Subsystem("leak", finish=lambda context: leak_pages(context.kernel))

    assert wrong(Case(), subsystems=[part])[0] == {"free pages"}


def test_check_after_a_crash_finds_an_old_kernel_that_goes_on(monkeypatch):
    """After the commit point its objects are dead."""
    monkeypatch.setattr(Kernel, "depart", lambda self: None)

    found, trial = wrong(Case((Fault(*ENGINE, "BOOT", "memory", None, 1),)))

    assert trial.outcome == CRASHED
    assert "old kernel gone" in found


def test_check_after_a_crash_finds_a_machine_that_does_not_boot(monkeypatch):
    """Switched off and on again, it boots NORMAL."""
    real, booted = Kernel.boot, []

    def boot(self, handover=None):
        if any(machine is self.machine for machine in booted):
            raise KhoError(errno.EIO, "memory was left in a state that nobody can boot from")
        booted.append(self.machine)
        return real(self, handover)

    monkeypatch.setattr(Kernel, "boot", boot)

    assert wrong(Case((Fault(*ENGINE, "BOOT", "memory", None, 1),)))[0] == {"cold boot"}


def test_every_check_of_a_campaign_has_a_bug_that_it_finds(report):
    """The tests above plant one for each of these."""
    made = {check for row in report.rows for check in row.checks}

    assert made <= {
        *("requested", "preserved", "reclaimed", "slots", "references", "nr_linked"),
        *("free pages", "free blocks", "preserved set", "KHO's tree", "state", "outcome"),
        *("callbacks", "order", "priorities", "children first", "result", "reached", "error"),
        *("shutdown", "probe", "unrestored", "no image", "old kernel gone", "cold boot"),
        *("second update", "ordinary kexec", "no fault"),
    }


# ---- what is injected ----


def test_exhausted_memory_has_no_free_page_and_gets_them_all_back():
    """Only scratch is left, of which nobody allocates."""
    kernel = kernels.every(kernels.every_machine()).boot()
    memory = kernel.memory
    before = memory.nr_free_pages(), [array.tolist() for array in memory.free_blocks()]

    with exhausted(memory):
        with pytest.raises(MemoryError):
            memory.alloc_folio(0)
        assert memory.nr_free_pages() == 0

    assert (memory.nr_free_pages(), [array.tolist() for array in memory.free_blocks()]) == before
    kernel.close()


def test_allocations_that_end_at_the_second_let_the_first_through():
    """And afterwards Kho is what it was."""
    kernel = kernels.every(kernels.every_machine()).boot()

    with Allocations(kernel.machine, 2) as counted:
        kernel.kho.alloc_preserve(4096)
        with pytest.raises(MemoryError):
            kernel.kho.alloc_preserve(4096)

    assert counted.count == 2
    kernel.kho.alloc_preserve(4096)
    kernel.close()


def test_run_of_native_callbacks_fails_them_like_others():
    """C functions are called one by one, and do their work."""
    signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    count = 0

    @signature
    def function(device, ctx):
        nonlocal count
        count += 1
        return 0

    ops = LiveUpdateOps(*(native(function) for _ in range(4)))

    report = faults.run(lambda machine: Kernel(machine, drivers=[Driver("nvme", ops)]), disks)

    assert report.ok, "\n\n".join(map(str, report.violations))
    events = {key[2] for key in report.callbacks if key[0] == "driver"}
    assert events == {"PREPARE", "REBOOT", "FINISH", "CANCEL"}
    assert count > len(report.rows)


# ---- violations: the shortest sequence, and the quirks behind it ----


def leaky():
    """Return a driver that forgets in CANCEL what PREPARE has preserved."""

    def prepare(dev):
        dev.kho.alloc_preserve(16384)

    ops = LiveUpdateOps(prepare, cancel=lambda dev: None, restore=lambda dev: dev.reclaim())
    return Driver("nvme", ops)


def leaking(machine):
    """Return a kernel whose disk leaks."""
    return Kernel(machine, drivers=[leaky()])


def disks():
    """Return a machine of three disks."""
    tree = luo.DeviceTree()
    tree.add_many(("disk", 0, 3), drivers="nvme")
    return Machine("64MiB", tree)


def test_run_of_a_leaking_driver_shows_the_shortest_sequence():
    """One device, no fault, three steps; every case that shows it has the same explanation."""
    report = faults.run(leaking, disks, kinds=["errno"])

    first = report.violations[0]
    assert not report.ok
    assert first.sequence == (
        'kernel.devices.request(["disk0"])',
        "kernel.luo.prepare()",
        "kernel.luo.cancel()",
    )
    assert dict(first.checks)["preserved set"] == ("1 blocks (4 pages) more and 0 less than before")
    assert first.quirks == ()
    assert sum(first in row.violations for row in report.rows) > 3
    assert str(first).startswith("3 steps:\n  1. kernel.devices.request")


def test_run_of_rfc1_finds_the_quirks_that_violate_by_name():
    """Each is taken out when it is found, so that it does not hide the next."""
    report = faults.run(
        lambda machine: kernels.every(machine, behaviour="rfc1"),
        kernels.every_machine,
        kinds=["errno", "positive", "delay", "memory"],
    )

    assert set(report.quirks) == {
        "cancel-not-reversed",
        "eligibility-checked-once",
        "failure-stops-the-rest",
        "flags-not-restored",
        "list-freed-at-reboot",
        "no-callback-limit",
        "no-image-check",
        "node-left-behind",
        "positive-return-stops",
        "priorities-inverted",
        "reboot-half-cancelled",
        "reference-leak",
        "register-when-prepared",
        "warn-once",
        "written-in-reboot",
    }
    assert all(violation.quirks != ("unknown",) for violation in report.violations)
    shown = report.quirks["node-left-behind"]
    assert dict(shown.checks)["KHO's tree"] == "liveupdate_orchestrator, not before"


def test_run_of_one_quirk_names_that_one():
    """With the sequence that shows it."""
    report = faults.run(
        lambda machine: kernels.every(machine, quirks=["reboot-half-cancelled"]),
        kernels.every_machine,
        kinds=["errno"],
    )

    assert list(report.quirks) == ["reboot-half-cancelled"]
    (violation,) = report.violations
    assert "returns -EREMOTEIO" in violation.sequence[-1]
    assert "[EREMOTEIO]" in violation.sequence[-1]


def test_run_of_a_bug_that_is_no_quirk_calls_it_unknown():
    """A leak in a kernel with a quirk that has nothing to do with it."""
    report = faults.run(
        lambda machine: Kernel(machine, drivers=[leaky()], quirks=["poll-never-wakes"]),
        disks,
        kinds=["exception"],
    )

    assert {violation.quirks for violation in report.violations} == {("unknown",)}
    assert report.quirks == {}


def test_run_of_a_driver_that_always_fails_raises_its_error():
    """There is no update to put faults into."""

    def prepare(dev):
        raise OSError(errno.EBUSY, "never idle")

    with pytest.raises(LuoError, match="never idle"):
        faults.run(
            lambda machine: Kernel(machine, drivers=[Driver("nvme", LiveUpdateOps(prepare))]),
            disks,
        )


def test_to_dict_of_a_report_names_rows_and_violations():
    """The document of --json."""
    report = faults.run(leaking, disks, kinds=["errno"])

    document = json.loads(json.dumps(report.to_dict()))

    assert document["schema"] == "luo-faults/1"
    assert document["ok"] is False
    row = next(row for row in document["rows"] if row["event"] == "CANCEL")
    assert (row["kind"], row["name"], row["fault"]) == ("driver", "nvme", "errno")
    assert row["device"].startswith("disk")
    assert document["violations"][row["violations"][0]]["sequence"][-1] == "kernel.luo.cancel()"


# ---- the command ----

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "leaky_driver.py"
COMMAND = [sys.executable, "-P", "-m", "luo", "faults"]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    "PYTHONPATH": str(Path(luo.__file__).parents[1]),
}


@pytest.fixture
def host(tmp_path):
    """A small host, functions bound to vfio-pci among its devices."""
    path = tmp_path / "small.toml"
    path.write_text('memory = "256MiB"\n[devices]\nsource = "synthetic"\ncount = 60\n')
    return str(path)


def status(*arguments):
    """Run ``luo faults`` in this process and return its exit status."""
    with pytest.raises(SystemExit) as end:
        main(["faults", *arguments])
    return end.value.code


def test_command_on_a_healthy_host_is_status_0_with_a_table(host, capsys):
    """One line a callback, one column a kind, no log in between."""
    assert status("--host", host, "--kind", "errno", "--kind", "exception") == 0

    out = capsys.readouterr()
    assert out.err == ""
    assert "nothing was ever half preserved" in out.out
    assert all(len(line) <= 80 for line in out.out.splitlines())
    line = next(line for line in out.out.splitlines() if "kvm" in line and "RESTORE" in line)
    assert line.split() == ["RESTORE", "kvm", "✓1", "✓1"]


def test_command_on_a_leaking_driver_is_status_1_with_the_sequence(host, tmp_path, capsys):
    """And the same in the document."""
    out = tmp_path / "out.json"

    code = status("--host", host, "--drivers", str(EXAMPLE), "--kind", "errno", "--json", str(out))

    printed = capsys.readouterr().out
    assert code == 1
    assert "the shortest sequence" in printed
    assert "kernel.luo.cancel()" in printed
    violated = sum(map(int, re.findall(r"✗(\d+)", printed)))
    assert f": {violated} updates violated, 1 sequence shows them all" in " ".join(printed.split())
    document = json.loads(out.read_text())
    assert document["settings"]["kinds"] == ["errno"]
    assert document["violations"][0]["sequence"][1:] == [
        "kernel.luo.prepare()",
        "kernel.luo.cancel()",
    ]


def test_command_on_the_mended_driver_is_status_0(host, tmp_path, capsys):
    """It is the leak that was found."""
    text = EXAMPLE.read_text()
    wrong, right = "    rings.pop(dev.path)\n", "dev.kho.unpreserve_free(rings.pop(dev.path))"
    assert wrong in text
    driver = tmp_path / "mended.py"
    driver.write_text(text.replace(wrong, f"    {right}\n"))

    assert status("--host", host, "--drivers", str(driver), "--kind", "errno") == 0


def test_command_with_a_quirk_is_status_1_and_names_it(host, capsys):
    """From the table of quirks."""
    assert status("--host", host, "--quirk", "no-image-check", "--kind", "errno") == 1

    printed = capsys.readouterr().out
    assert "no-image-check: the shortest sequence" in printed
    assert "REBOOT callbacks run although no kernel image is loaded" in " ".join(printed.split())


def test_command_with_drivers_that_no_device_has_is_status_2(host, tmp_path, capsys):
    """Nothing of theirs would be tested."""
    driver = tmp_path / "mine.py"
    driver.write_text('import luo\nfloppy = luo.Driver("floppy", luo.LiveUpdateOps())\n')

    assert status("--host", host, "--drivers", str(driver)) == 2
    assert "no device has driver floppy" in capsys.readouterr().err


def test_command_with_a_driver_that_always_fails_is_status_1(host, tmp_path, capsys):
    """Its error is one line."""
    driver = tmp_path / "mine.py"
    driver.write_text(
        "import luo\ndef prepare(dev): return -16\n"
        'vfio = luo.Driver("vfio-pci", luo.LiveUpdateOps(prepare))\n'
    )

    assert status("--host", host, "--drivers", str(driver)) == 1
    assert capsys.readouterr().err.startswith("luo: without a fault: PREPARE driver vfio-pci")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kind", "fire"],
        ["--json", "/no/such/directory/x"],
        ["--request", "usb*"],
        ["--quirk", "x"],
    ],
)
def test_command_with_a_wrong_option_is_status_2(host, arguments):
    """Before anything is done."""
    assert status("--host", host, *arguments) == 2


def test_command_with_json_to_standard_output_prints_nothing_else_there(host, capsys):
    """The table goes to standard error."""
    assert status("--host", host, "--kind", "positive", "--json", "-") == 0

    out = capsys.readouterr()
    assert json.loads(out.out)["ok"] is True
    assert "nothing was ever half preserved" in out.err


@pytest.mark.parametrize("nth", [1, 40])
def test_command_interrupted_in_the_middle_prints_what_it_has(nth, host, tmp_path, capsys):
    """The update in which ^C came does not count; before the first there is nothing to print."""
    driver, out = tmp_path / "mine.py", tmp_path / "out.json"
    driver.write_text(
        "import os, signal, luo\n"
        "def prepare(dev):\n"
        f"    with open({str(tmp_path / 'calls')!r}, 'a') as calls:\n"
        "        calls.write('x')\n"
        "        count = calls.tell()\n"
        f"    if count == {nth}: os.kill({os.getpid()}, signal.SIGINT)\n"
        'vfio = luo.Driver("vfio-pci", luo.LiveUpdateOps(prepare))\n'
    )
    arguments = ("--host", host, "--drivers", str(driver), "--kind", "errno", "--json", str(out))

    assert status(*arguments) == 130

    printed = " ".join(capsys.readouterr().out.split())
    if nth == 1:
        assert (printed, out.exists()) == ("", False)
        return
    document = json.loads(out.read_text())
    assert document["interrupted"]
    assert not document["ok"]
    assert document["violations"] == []
    assert document["updates"] == len(document["rows"]) > 2
    assert f"{document['updates']} updates" in printed
    assert printed.endswith("interrupted: the rest was not tried")


def test_command_that_is_interrupted_is_status_130_and_leaves_no_process(host, tmp_path):
    """^C while callbacks run, which a rollback may take for a failure of one."""
    driver, begun = tmp_path / "mine.py", tmp_path / "begun"
    driver.write_text(
        "import pathlib, luo\n"
        f"def prepare(dev): pathlib.Path({str(begun)!r}).touch()\n"
        'vfio = luo.Driver("vfio-pci", luo.LiveUpdateOps(prepare))\n'
    )
    process = subprocess.Popen(
        [*COMMAND, "--host", host, "--drivers", str(driver), "--kind", "death"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (130, "")
    assert not out or out.endswith("interrupted: the rest was not tried\n")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 0)
        raise AssertionError("a process of the session is left")
