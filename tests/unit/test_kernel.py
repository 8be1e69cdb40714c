"""Kernels and the jump between them: images, the second process, the commit point, chains."""

import contextlib
import errno
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import kernels
import numpy as np
import pytest
from rig import Log, errno_of, leave, settled, small_kernel, snapshot, updated

import luo.kernel
from luo.device import Driver, LiveUpdateOps
from luo.errors import (
    CallbackError,
    HandoverError,
    HostCrashError,
    KernelPanic,
    KhoError,
    StateError,
    SuccessorError,
)
from luo.kernel import Kernel, KernelImage, RemoteKernel, live_update
from luo.liveupdate import State, Subsystem
from luo.machine import Machine
from luo.memory import PhysicalMemory

PLAIN = KernelImage("kernels:plain")


@pytest.fixture
def machine():
    return kernels.machine()


@pytest.fixture
def kernel(machine):
    """A running kernel with everything requested; whatever runs at the end is closed."""
    kernel = kernels.plain(machine).boot()
    kernel.devices.request("*")
    yield kernel
    if machine.running is not None:
        machine.running.close()
    kernel.close()
    assert not children()


def children():
    """Whether this process has children, running or not waited for."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def prepare_and_kexec(kernel, **kwargs):
    """PREPARE and jump: one of them is going to fail."""
    kernel.luo.prepare()
    return kernel.kexec(**kwargs)


def works(kernel, successor=None):
    """Live update *kernel* to its end; return the new kernel."""
    kernel.kexec_load(successor or kernels.plain(kernel.machine))
    kernel.luo.prepare()
    kernel = kernel.kexec()
    assert kernel.luo.state is State.UPDATED
    assert kernel.devices.reclaimed.tolist() == kernel.devices.preserved.tolist()
    assert kernel.luo.finish().unreclaimed == ()
    return kernel


# ---- images ----


@pytest.mark.parametrize("name", ["", "module", "module:", ":factory"])
def test_image_name_without_module_or_factory_is_value_error(name):
    """An image is named ``package.module:factory``."""
    with pytest.raises(ValueError, match=r"package\.module:factory"):
        KernelImage(name)


@pytest.mark.parametrize(
    "name", ["no_such_module:factory", "kernels:no_such", "kernels:NO_FACTORY", "kernels:no_kernel"]
)
def test_image_build_of_no_factory_is_enoexec(name, machine):
    """What is no factory, or makes no kernel, cannot be built."""
    assert errno_of(KernelImage(name).build, machine) == errno.ENOEXEC


def test_image_build_gives_arguments_and_command_line(machine):
    """args go to the factory; cmdline replaces the factory's."""
    kernel = KernelImage("kernels:plain", "kho=on", {"release": "9.9"}).build(machine)

    assert (kernel.release, kernel.cmdline, kernel.luo.enabled) == ("9.9", "kho=on", False)
    assert KernelImage("kernels:plain").build(machine).luo.enabled is True


def test_image_in_a_namespace_is_found(machine):
    """The factory may be an attribute of something in the module."""
    kernel = KernelImage("luo.kernel:Kernel").build(machine)

    assert type(kernel) is Kernel


@pytest.mark.parametrize(
    "wrong",
    [{"kho_abi": "kho-v9"}, {"behaviour": "rfc2"}, {"workers": 0},
     {"quirks": ["x"]}, {"callback_limit": 0}],
    ids=str,
)  # fmt: skip
def test_kernel_unknown_setting_is_value_error(wrong, machine):
    """What this engine has not is refused when the kernel is built."""
    with pytest.raises(ValueError):
        Kernel(machine, **wrong)


# ---- one kernel at a time ----


def test_boot_while_another_runs_is_ebusy(kernel, machine):
    """A machine runs one kernel."""
    assert errno_of(kernels.plain(machine).boot) == errno.EBUSY
    assert errno_of(kernel.boot) == errno.EBUSY
    assert errno_of(kernel.set_cmdline, "") == errno.EBUSY


def test_kernel_before_boot_has_no_kho(machine):
    """A kernel that has not booted has devices and no KHO."""
    kernel = kernels.plain(machine)

    assert errno_of(lambda: kernel.kho) == errno.EOPNOTSUPP
    assert errno_of(kernel.kexec) == errno.EBUSY
    assert errno_of(kernel.kexec_load, PLAIN) == errno.EBUSY
    assert len(kernel.devices) == 5
    assert kernel.booted is False


def test_kexec_without_a_loaded_kernel_is_einval(kernel):
    """There must be something to jump into, and REBOOT is not run before (quirk 8)."""
    kernel.luo.prepare()

    assert errno_of(kernel.kexec) == errno.EINVAL
    assert kernel.luo.state is State.PREPARED
    kernel.kexec_load(kernels.plain(kernel.machine))
    kernel.kexec_unload()
    assert errno_of(kernel.kexec) == errno.EINVAL
    assert [row["event"] for row in kernel.profile.rows() if row["event"] == "REBOOT"] == []


def test_kexec_load_of_a_wrong_kernel_is_refused(kernel):
    """A kernel of another machine, a booted one, or something else."""
    with pytest.raises(ValueError, match="this machine"):
        kernel.kexec_load(kernels.plain(kernels.machine()))
    with pytest.raises(ValueError, match="this machine"):
        kernel.kexec_load(kernel)
    with pytest.raises(TypeError):
        kernel.kexec_load("kernels:plain")


def test_kexec_of_an_ordinary_kind_calls_nobody(kernel, machine):
    """In NORMAL kexec is an ordinary one: no callback, NORMAL again, nothing preserved."""
    kernel.kexec_load(kernels.plain(machine))
    kernel = kernel.kexec()

    assert kernel.luo.state is State.NORMAL
    assert kernel.profile.rows() == []
    assert not kernel.devices.preserved.any()
    assert kernel.arrival.departure.live is False


def test_kexec_with_kho_off_is_a_cold_boot(machine):
    """Without KHO nothing is handed over."""
    kernel = kernels.plain(machine, cmdline="").boot()
    kernel.kexec_load(kernels.plain(machine))
    kernel = kernel.kexec()

    assert kernel.kho.incoming is None
    assert kernel.luo.state is State.NORMAL


def test_kernel_as_context_manager_is_closed(machine):
    """Leaving the block switches it off."""
    with kernels.plain(machine).boot() as kernel:
        assert machine.running is kernel
    assert machine.running is None
    kernels.plain(machine).boot()


def test_kexec_count_and_release_are_handed_on(machine):
    """Each kernel learns the release of the one before and how many there were."""
    kernel = kernels.plain(machine, release="1.0").boot()
    for number in range(1, 4):
        kernel.kexec_load(kernels.plain(machine, release=f"{number}.1"))
        kernel = kernel.kexec()
        metadata = kernel.kho.incoming.metadata
        assert metadata.kexec_count == number

    assert metadata.previous_release == "2.1"


# ---- in this process ----


def test_local_successor_refuses_before_the_commit_point(kernel, machine):
    """LUO off in the successor: it refuses, and the old kernel goes on."""
    before = settled(kernel)
    kernel.kexec_load(kernels.off(machine))
    with pytest.raises(SuccessorError) as caught:
        prepare_and_kexec(kernel)

    assert (caught.value.errno, caught.value.step) == (errno.EPROTO, "validate")
    assert caught.value.rolled_back is True
    assert snapshot(kernel) == before
    works(kernel)


def test_local_successor_that_cannot_read_refuses(kernel, machine, monkeypatch):
    """A HandoverError of the successor's check cancels."""
    before = settled(kernel)
    kernel.kexec_load(kernels.refuses(machine))
    with pytest.raises(SuccessorError) as caught:
        prepare_and_kexec(kernel)

    assert isinstance(caught.value.__cause__, HandoverError)
    assert snapshot(kernel) == before
    works(kernel)


def test_local_reboot_failure_keeps_the_old_kernel(machine):
    """A REBOOT callback fails: nothing has happened, the loaded kernel is dropped."""
    kernel = kernels.fails(machine, "REBOOT").boot()
    kernel.devices.request("*")
    before = settled(kernel)
    successor = kernels.plain(machine)
    kernel.kexec_load(successor)
    with pytest.raises(CallbackError) as caught:
        prepare_and_kexec(kernel)

    assert (caught.value.event, caught.value.device) == ("REBOOT", "pci0/disk")
    assert caught.value.rolled_back is True
    assert snapshot(kernel) == before
    assert errno_of(kernel.kexec) == errno.EINVAL
    assert errno_of(successor.boot) == errno.ESHUTDOWN


def test_local_successor_that_breaks_after_the_commit_point_is_a_crash(kernel, machine):
    """An error of the new kernel where there is no way back is a crashed host, and says why."""
    kernel.kexec_load(kernels.breaks_taking_over(machine))
    with pytest.raises(HostCrashError, match="division"):
        prepare_and_kexec(kernel)

    assert machine.running is None
    assert errno_of(lambda: kernel.memory) == errno.ESHUTDOWN
    kernels.plain(machine).boot()


def test_preflight_off_mismatch_panics(kernel, machine):
    """Without preflight a LUO that does not fit is a panic, as on a real host."""
    kernel.kexec_load(kernels.off(machine))
    with pytest.raises(KernelPanic, match="off"):
        prepare_and_kexec(kernel, preflight=False)

    assert machine.running is None
    assert errno_of(lambda: kernel.memory) == errno.ESHUTDOWN


def spoiled(machine):
    """A kernel whose driver spoils the root tree on its way out, after the commit point."""

    def spoil(device):
        device.memory.view(device.kho.fdt_phys, 4)[:] = bytes(4)

    kernel = Kernel(
        machine,
        drivers=[Driver("nic", LiveUpdateOps(), shutdown=spoil), Driver("nvme", LiveUpdateOps())],
    )
    return kernel.boot()


def test_preflight_off_unreadable_root_is_a_cold_boot(machine, caplog):
    """Without preflight a root that cannot be read is a cold boot, with the reason logged."""
    kernel = spoiled(machine)
    kernel.kexec_load(kernels.plain(machine))
    with caplog.at_level(logging.WARNING, "luo.kernel"):
        kernel = prepare_and_kexec(kernel, preflight=False)

    assert kernel.luo.state is State.NORMAL
    assert kernel.kho.incoming is None
    assert "disabling KHO revival" in caplog.text


def test_preflight_off_good_handover_is_a_live_update(kernel, machine):
    """Without preflight all goes well if nothing is wrong."""
    kernel.kexec_load(kernels.plain(machine))
    kernel = prepare_and_kexec(kernel, preflight=False)

    assert kernel.luo.state is State.UPDATED
    assert kernel.devices.reclaimed.all()


def test_preflight_protects_from_what_happens_after_it(machine):
    """What was read before the commit point is not read again after it."""
    kernel = spoiled(machine)
    kernel.kexec_load(kernels.plain(machine))
    kernel = prepare_and_kexec(kernel)

    assert kernel.luo.state is State.UPDATED


# ---- in a second process: loading ----


@pytest.mark.parametrize(
    ("name", "args", "code"),
    [
        ("no_such_module:factory", {}, errno.ENOEXEC),
        ("kernels:no_such", {}, errno.ENOEXEC),
        ("kernels:no_kernel", {}, errno.ENOEXEC),
        ("kernels:raises", {}, errno.ENOEXEC),
        ("kernels:plain", {"unknown": 1}, errno.ENOEXEC),
        ("kernels:boots", {}, errno.ENOEXEC),
        ("kernels:exits", {}, errno.ENOEXEC),
        ("kernels:leaves", {}, errno.ECHILD),
        ("kernels:killed", {}, errno.ECHILD),
        ("kernels:writes", {}, errno.ENOEXEC),
        ("kernels:sleeps", {"seconds": 1.5}, errno.ETIMEDOUT),
    ],
    ids=lambda value: value.partition(":")[2] if isinstance(value, str) else "",
)
def test_process_load_failure_changes_nothing(name, args, code, kernel):
    """An image that cannot be loaded leaves the old kernel, and what was loaded before."""
    kernel.kexec_load(kernels.plain(kernel.machine))
    before = settled(kernel)
    gc.collect()  # machines of other tests
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SuccessorError) as caught:
        kernel.kexec_load(KernelImage(name, args=args), timeout=1 if "seconds" in args else 60)

    assert (caught.value.errno, caught.value.step) == (code, "load")
    assert name in str(caught.value)
    assert snapshot(kernel) == before
    assert not children()
    assert len(os.listdir("/proc/self/fd")) == fds
    prepare_and_kexec(kernel)


def test_process_load_says_what_went_wrong(kernel):
    """The error of the other process is in the message."""
    with pytest.raises(SuccessorError, match="RuntimeError: on purpose"):
        kernel.kexec_load(KernelImage("kernels:raises"))
    with pytest.raises(SuccessorError, match="SIGKILL"):
        kernel.kexec_load(KernelImage("kernels:killed"))
    with pytest.raises(SuccessorError, match="status 7"):
        kernel.kexec_load(KernelImage("kernels:leaves"))


def test_process_loaded_is_replaced_and_unloaded(kernel):
    """One kernel is loaded at a time; the one before it ends."""
    kernel.kexec_load(PLAIN)
    assert children()
    kernel.kexec_load(kernels.plain(kernel.machine))
    assert not children()
    kernel.kexec_load(PLAIN)
    kernel.kexec_unload()
    assert not children()


# ---- in a second process: before the commit point ----


def wait_for_a_death():
    """Return when a child is dead; it is left for its owner to be waited for."""
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)


NOT_TAKING_OVER = [
    ("dies_validating", {}, errno.ECHILD, "SIGKILL"),
    ("refuses", {}, errno.EPROTO, "refused on purpose"),
    ("breaks_validating", {}, errno.EPROTO, "ZeroDivisionError"),
    ("panics_validating", {}, errno.EPROTO, "on purpose"),
    ("off", {}, errno.EPROTO, "live update is off"),
    ("late", {"seconds": 1.0}, errno.ETIMEDOUT, "no answer in 0.3 s"),
]


@pytest.mark.parametrize(
    ("factory", "args", "code", "why"), NOT_TAKING_OVER, ids=[row[0] for row in NOT_TAKING_OVER]
)
def test_process_that_does_not_take_over_cancels_everything(factory, args, code, why, kernel):
    """Before the commit point any failure leaves all as before PREPARE, and says which it was."""
    before = settled(kernel)
    kernel.kexec_load(KernelImage(f"kernels:{factory}", args=args))
    with pytest.raises(SuccessorError, match=why) as caught:
        prepare_and_kexec(kernel, timeout=0.3 if args else 60)
    error = caught.value

    assert (error.errno, error.step, error.rolled_back) == (code, "validate", True)
    assert snapshot(kernel) == before
    assert kernel.machine.running is kernel
    assert not children()
    assert errno_of(kernel.kexec) == errno.EINVAL
    works(kernel)


def test_process_that_died_waiting_is_esrch(kernel, tmp_path):
    """A successor that is not there any more is noticed, and everything is cancelled."""
    when = tmp_path / "now"
    before = settled(kernel)
    kernel.kexec_load(KernelImage("kernels:dies_waiting", args={"when": str(when)}))
    kernel.luo.prepare()
    when.touch()
    wait_for_a_death()
    with pytest.raises(SuccessorError, match="SIGKILL") as caught:
        kernel.kexec()

    assert (caught.value.errno, caught.value.rolled_back) == (errno.ESRCH, True)
    assert snapshot(kernel) == before
    works(works(kernel, PLAIN), PLAIN)


def test_process_successor_and_reboot_failure(machine):
    """A REBOOT callback fails: the waiting process ends, the old kernel is as before."""
    kernel = kernels.fails(machine, "REBOOT").boot()
    kernel.devices.request("*")
    before = settled(kernel)
    kernel.kexec_load(PLAIN)
    with pytest.raises(CallbackError) as caught:
        prepare_and_kexec(kernel)

    assert caught.value.rolled_back is True
    assert snapshot(kernel) == before
    assert not children()


def test_process_successor_and_prepare_failure(machine):
    """A PREPARE callback fails: the loaded process waits on, for the next attempt."""
    log = Log()
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    kernel.kexec_load(PLAIN)
    log.faults["PREPARE", "driver", "nvme", "pci0/disk"] = -errno.EBUSY
    assert errno_of(kernel.luo.prepare) == errno.EBUSY
    log.clear()
    with prepare_and_kexec(kernel) as successor:
        assert successor.luo.state is State.UPDATED


def test_interrupt_while_the_successor_validates_cancels(kernel):
    """^C while the old kernel waits for the answer rolls back, and is raised."""
    before = settled(kernel)
    kernel.kexec_load(KernelImage("kernels:late", args={"seconds": 1.0}))
    kernel.luo.prepare()

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            kernel.kexec()
    finally:
        signal.signal(signal.SIGALRM, previous)

    assert snapshot(kernel) == before
    assert not children()
    works(kernel)


# ---- in a second process: after the commit point ----


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        ("dies_taking_over", "SIGKILL"),
        ("dies_restoring", "SIGKILL"),
        ("breaks_taking_over", "division"),
    ],
)
def test_process_that_dies_after_the_commit_point_is_a_crash(factory, why, kernel, machine):
    """There is no way back: the host is down, the error says so, and it can be switched on."""
    kernel.kexec_load(KernelImage(f"kernels:{factory}"))
    with pytest.raises(HostCrashError, match=why):
        prepare_and_kexec(kernel)

    assert machine.running is None
    assert not children()
    for use in (lambda: kernel.memory, lambda: kernel.luo.state, kernel.kexec):
        assert errno_of(use) == errno.ESHUTDOWN
    again = kernels.plain(machine).boot()
    again.devices.request("*")
    works(again)


def test_process_that_dies_in_finish_is_a_crash(kernel, machine):
    """A kernel that runs and dies takes the host with it."""
    kernel.kexec_load(KernelImage("kernels:dies_finishing"))
    remote = prepare_and_kexec(kernel)
    assert errno_of(remote.luo.finish) == HostCrashError(errno.EHOSTDOWN, "").errno
    remote.close()

    assert machine.running is None


def test_process_preflight_off_mismatch_panics(kernel, machine):
    """The panic of the other process arrives as one."""
    kernel.kexec_load(KernelImage("kernels:off"))
    with pytest.raises(KernelPanic, match="off"):
        prepare_and_kexec(kernel, preflight=False)

    assert machine.running is None
    assert not children()


def test_process_preflight_off_unreadable_root_is_a_cold_boot(machine):
    """So is its cold boot."""
    kernel = spoiled(machine)
    kernel.kexec_load(PLAIN)
    with prepare_and_kexec(kernel, preflight=False) as remote:
        assert remote.luo.state is State.NORMAL
        assert not remote.devices.preserved.any()


def test_process_ends_with_its_parent(tmp_path):
    """A waiting kernel whose parent dies does not stay behind."""
    script = (
        "import os, kernels; from luo.kernel import KernelImage\n"
        "k = kernels.plain(kernels.machine()).boot()\n"
        "k.kexec_load(KernelImage('kernels:plain'))\n"
        "print(k._next.pid, flush=True); os._exit(0)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    for _ in range(500):
        try:
            os.kill(int(out), 0)
        except ProcessLookupError:
            return
        with contextlib.suppress(OSError), open(f"/proc/{int(out)}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "Z":  # nobody waits for orphans here
                return
        time.sleep(0.01)
    pytest.fail("the waiting kernel is still there")


# ---- a kernel in a second process, from here ----


def test_remote_kernel_is_used_as_a_local_one(kernel, machine):
    """State, flags, events, requests and profile of the other process can be reached."""
    kernel.kexec_load(PLAIN)
    remote = prepare_and_kexec(kernel)

    assert type(remote) is RemoteKernel
    assert machine.running is remote
    assert remote.luo.state is State.UPDATED
    assert len(remote.devices) == 5
    assert remote.devices.preserved.all()
    assert remote.devices.reclaimed.all()
    assert not remote.devices.requested.any()
    assert errno_of(remote.luo.prepare) == errno.EINVAL
    result = remote.luo.finish()
    assert (result.unreclaimed, result.failures) == ((), ())
    assert remote.luo.state is State.NORMAL
    assert remote.devices.request("*nic*") == 2
    assert remote.devices.request([4]) == 1
    assert remote.devices.request(np.zeros(5, np.bool_)) == 0
    assert remote.devices.request([2], on=False) == 1
    assert remote.devices.requested.tolist() == [False, False, False, True, True]
    assert errno_of(remote.devices.request, [9]) == errno.ENOENT
    remote.luo.prepare()
    assert remote.luo.state is State.PREPARED
    assert remote.luo.cancel().failures == ()
    assert {"PREPARE", "CANCEL", "RESTORE", "FINISH"} == {
        row["event"] for row in remote.profile.rows()
    }
    assert remote.phases.keys() >= {"boot", "restore", "finish", "prepare", "cancel"}
    remote.close()
    remote.close()
    assert machine.running is None
    assert errno_of(lambda: remote.luo.state) == errno.ESHUTDOWN
    assert errno_of(remote.kexec_load, PLAIN) == errno.ESHUTDOWN


@pytest.mark.parametrize("outcome", [-errno.EBUSY, errno.EBUSY, "text"], ids=str)
def test_remote_callback_error_arrives_whole(outcome, kernel):
    """A callback's failure in the other process names everything, file and line too."""
    kernel.kexec_load(KernelImage("kernels:fails", args={"event": "PREPARE", "outcome": outcome}))
    with prepare_and_kexec(kernel) as remote:
        remote.luo.finish()
        remote.devices.request("*")
        with pytest.raises(CallbackError) as caught:
            remote.luo.prepare()
        error = caught.value
        assert (error.event, error.kind, error.name, error.device) == (
            "PREPARE",
            "driver",
            "nvme",
            "pci0/disk",
        )
        assert error.errno == (errno.EBUSY if outcome == -errno.EBUSY else errno.EINVAL)
        assert error.file.endswith("rig.py")
        assert error.line > 0
        assert error.rolled_back is True
        assert remote.luo.state is State.NORMAL


@pytest.mark.parametrize("event", ["RESTORE", "FINISH", "CANCEL"])
def test_remote_collected_failures_arrive(event, kernel):
    """What fails without stopping anything is in the results."""
    kernel.kexec_load(KernelImage("kernels:fails", args={"event": event}))
    with prepare_and_kexec(kernel) as remote:
        finished = remote.luo.finish()
        remote.devices.request("*")
        remote.luo.prepare()
        cancelled = remote.luo.cancel()
        seen = {
            "RESTORE": [(f["event"], f["errno"]) for f in remote.result["failures"]],
            "FINISH": [(f.event, f.errno) for f in finished.failures],
            "CANCEL": [(f.event, f.errno) for f in cancelled.failures],
        }

        assert seen == {
            name: [(name, 16)] if name == event else [] for name in ("RESTORE", "FINISH", "CANCEL")
        }


def test_remote_kexec_errors(kernel):
    """A kernel in another process can only be followed by an image, and one must be loaded."""
    kernel.kexec_load(PLAIN)
    with prepare_and_kexec(kernel) as remote:
        assert errno_of(remote.kexec) == errno.EINVAL
        with pytest.raises(TypeError):
            remote.kexec_load(kernels.plain(kernel.machine))


@pytest.mark.parametrize(
    ("factory", "args", "code", "why"),
    NOT_TAKING_OVER[:3],
    ids=[row[0] for row in NOT_TAKING_OVER[:3]],
)
def test_remote_kernel_survives_a_successor_that_does_not(factory, args, code, why, kernel):
    """Before the commit point a kernel in another process is as safe as one in this."""
    kernel.kexec_load(PLAIN)
    with prepare_and_kexec(kernel) as remote:
        remote.luo.finish()
        remote.devices.request("*")
        remote.kexec_load(KernelImage(f"kernels:{factory}", args=args))
        with pytest.raises(SuccessorError, match=why) as caught:
            prepare_and_kexec(remote)
        assert (caught.value.errno, caught.value.rolled_back) == (code, True)
        assert remote.luo.state is State.NORMAL
        assert not remote.devices.preserved.any()
        works(remote, PLAIN)


def test_remote_reboot_failure_keeps_it(kernel):
    """A REBOOT callback of a kernel in another process fails: it goes on."""
    kernel.kexec_load(KernelImage("kernels:fails", args={"event": "REBOOT"}))
    with prepare_and_kexec(kernel) as remote:
        remote.luo.finish()
        remote.devices.request("*")
        remote.kexec_load(PLAIN)
        with pytest.raises(CallbackError) as caught:
            prepare_and_kexec(remote)
        assert (caught.value.event, caught.value.device) == ("REBOOT", "pci0/disk")
        assert remote.luo.state is State.NORMAL
        assert remote.machine.running is remote


@pytest.mark.parametrize("event", ["PREPARE", "REBOOT"])
def test_remote_kernel_interrupted_rolls_back(event, kernel, tmp_path):
    """^C here interrupts the callback there: it rolls back, then ^C is raised."""
    marker = tmp_path / "began"
    kernel.kexec_load(KernelImage("kernels:slow", args={"event": event, "marker": str(marker)}))

    def interrupt():
        while not marker.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with prepare_and_kexec(kernel) as remote:
        remote.luo.finish()
        remote.devices.request("*")
        remote.kexec_load(PLAIN)
        began = time.monotonic()
        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            prepare_and_kexec(remote)
        thread.join()
        assert time.monotonic() - began < 30
        assert remote.luo.state is State.NORMAL
        assert not remote.devices.preserved.any()
        assert remote.machine.running is remote


def test_remote_kernel_that_waits_is_not_interrupted(kernel):
    """^C that finds no callback running does no harm there."""
    kernel.kexec_load(PLAIN)
    with prepare_and_kexec(kernel) as remote:
        os.kill(remote.pid, signal.SIGINT)
        assert remote.luo.finish().failures == ()
        os.kill(remote.pid, signal.SIGINT)
        remote.devices.request("*")
        remote.luo.prepare()
        assert remote.luo.state is State.PREPARED


def test_remote_load_failure_keeps_what_was_loaded(kernel):
    """As in this process: an image that cannot be loaded changes nothing."""
    kernel.kexec_load(PLAIN)
    with prepare_and_kexec(kernel) as remote:
        remote.luo.finish()
        remote.kexec_load(PLAIN)
        with pytest.raises(SuccessorError):
            remote.kexec_load(KernelImage("kernels:raises"))
        remote.luo.prepare()
        remote.kexec()


# ---- the same wherever it runs ----


def told(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_successor_is_in_the_same_state_wherever_it_runs(tmp_path):
    """In this process, in a second one, or on a fresh mapping: the kernels are equal."""
    results = {}
    for where in ("here", "process", "mapping", "clone"):
        machine = kernels.machine()
        out = tmp_path / where
        kernel = kernels.telling(machine, str(tmp_path / "old")).boot()
        kernel.devices.request([2, 4])
        image = KernelImage("kernels:telling", args={"out": str(out)})
        if where in ("here", "process"):
            kernel.kexec_load(image if where == "process" else image.build(machine))
            kernel = prepare_and_kexec(kernel)
        else:
            handover = leave(kernel)
            if where == "clone":
                machine = machine.clone()
            else:
                memory = PhysicalMemory(fd=machine.memory.fd, ranges=machine.memory.ranges)
                machine = Machine(memory, machine.devices)
            kernel = image.build(machine).boot(handover)
        assert kernel.luo.finish().failures == ()
        kernel.close()
        results[where] = told(out)

    assert [len(lines) for lines in results.values()] == [2, 2, 2, 2]
    restored, finished = results["here"]
    assert restored["preserved"] == restored["reclaimed"] == [True, True, True, False, True]
    assert any(any(side) for side in restored["bytes"])
    assert len(restored["unrestored"][0]) > 4
    for where in ("process", "mapping", "clone"):
        assert results[where] == [restored, finished], where


# ---- chains, clones, several machines ----


def test_live_update_chain_of_processes(kernel, machine):
    """Process after process: each starts, takes over and is followed."""
    report = live_update(kernel, PLAIN, repeat=4)

    assert len(report.runs) == 4
    assert report.error is None
    assert report.states == ["normal", *["prepared", "updated", "normal"] * 4]
    assert {run["devices"]["reclaimed"] for run in report.runs} == {5}
    assert machine.running is report.kernel
    report.kernel.close()
    assert not children()


def test_live_update_chain_here_then_there(kernel, machine):
    """Kernels in this process and in others may follow each other, as long as the last is local."""
    for _ in range(3):
        kernel = works(kernel)
        kernel.devices.request("*")
    kernel = works(kernel, PLAIN)
    kernel.devices.request("*")
    kernel = works(kernel, PLAIN)
    kernel.close()


def test_live_update_image_here(kernel):
    """An image may be built in this process."""
    report = live_update(kernel, PLAIN, repeat=3, in_process=True)

    assert report.successor == "in-process"
    assert report.devices["verified_bytes"] == report.devices["state_bytes"] > 0
    assert type(report.kernel) is Kernel


def test_live_update_wrong_arguments_are_value_errors(kernel):
    """At least one update; more than one needs an image, for a kernel boots once."""
    with pytest.raises(ValueError, match="at least 1"):
        live_update(kernel, PLAIN, repeat=0)
    with pytest.raises(ValueError, match="image"):
        live_update(kernel, kernels.plain(kernel.machine), repeat=2)
    assert kernel.luo.state is State.NORMAL


def test_live_update_failure_is_in_the_report(machine):
    """A failed update leaves the report as far as it went, with the kernel that runs."""
    kernel = kernels.fails(machine, "PREPARE").boot()
    kernel.devices.request("*")
    report = luo.kernel.Report()
    with pytest.raises(CallbackError):
        live_update(kernel, PLAIN, report=report)

    assert report.kernel is kernel
    assert report.error["device"] == "pci0/disk"
    assert report.error["errno_name"] == "EBUSY"
    assert report.states == ["normal", "normal"]
    assert report.to_dict()["error"] == report.error
    kernel.close()


def test_live_update_report_has_the_figures(kernel):
    """Phases, callbacks and sizes."""
    report = live_update(kernel, kernels.plain(kernel.machine))
    document = json.loads(report.to_json())

    assert document["devices"]["preserved"] == document["devices"]["reclaimed"] == 5
    assert document["image"]["preserved_pages"] > 0
    assert all(document["phases_ns"][name] > 0 for name in ("prepare", "reboot", "boot", "finish"))


@pytest.mark.parametrize("where", ["here", "process"])
def test_clone_can_be_updated_and_the_original_does_not_notice(where, kernel, machine):
    """A clone has the same devices and bytes; what happens to it stays with it."""
    phys = kernel.memory.alloc_folio(0)
    kernel.memory.view(phys, 5)[:] = b"bytes"
    before = snapshot(kernel)
    clone = machine.clone()

    assert bytes(clone.memory.view(phys, 5)) == b"bytes"
    other = kernels.plain(clone).boot()
    other.devices.request("*")
    other = works(other, PLAIN if where == "process" else None)
    other.close()
    assert snapshot(kernel) == before
    assert bytes(kernel.memory.view(phys, 5)) == b"bytes"
    works(kernel)


def test_clone_in_the_middle_of_an_update_can_go_on_alone(kernel, machine):
    """What was handed over can be restored on a clone, while the original cancels."""
    before = settled(kernel)
    kernel.luo.prepare()
    kernel.luo.reboot()
    handover = kernel.kho.handover()
    clone = machine.clone()
    other = kernels.plain(clone).boot(handover)

    assert other.luo.state is State.UPDATED
    assert other.restore_failures == ()
    assert other.devices.reclaimed.all()
    kernel.luo.cancel()
    assert snapshot(kernel) == before
    assert other.luo.finish().unreclaimed == ()


def test_two_machines_in_one_process_are_apart():
    """Kernels of two machines, one updated here, one in a process, do not meet."""
    one, two = kernels.machine(), kernels.machine("128MiB")
    first, second = kernels.plain(one).boot(), kernels.plain(two).boot()
    for kernel in (first, second):
        kernel.devices.request("*")
    first.kexec_load(PLAIN)
    second.kexec_load(kernels.plain(two))
    first.luo.prepare()
    assert second.luo.state is State.NORMAL
    second.luo.prepare()
    first = first.kexec()
    assert second.luo.state is State.PREPARED
    second = second.kexec()

    assert first.luo.state is second.luo.state is State.UPDATED
    assert first.luo.finish().unreclaimed == second.luo.finish().unreclaimed == ()
    first.close()
    second.close()


def test_updated_twice_needs_finish_between(kernel, machine):
    """PREPARE in UPDATED is refused; after FINISH the next update is as good as the first."""
    kernel = updated(kernel, kernels.plain(machine))
    kernel.kexec_load(kernels.plain(machine))

    assert errno_of(kernel.luo.prepare) == errno.EINVAL
    kernel.luo.finish()
    kernel.devices.request("*")
    kernel.luo.prepare()
    assert kernel.kexec().luo.state is State.UPDATED


def test_phases_of_a_live_update(kernel, machine):
    """arrival has the phases; blackout covers REBOOT, jump, boot and restore."""
    kernel = updated(kernel, kernels.plain(machine))
    phases = kernel.arrival.phases

    assert phases.keys() == {"reboot", "jump", "boot", "restore", "blackout"}
    assert phases["blackout"] >= phases["reboot"] + phases["boot"]
    assert kernel.arrival.departure.phases["prepare"] > 0
    assert kernel.arrival.state_bytes == 0  # nobody asked for digests


def test_verify_finds_a_slot_that_changed(machine):
    """The two digests are compared outside both kernels: a changed byte is found."""
    kernel = kernels.plain(machine).boot()
    kernel.devices.request("*")

    def spoil(context):
        context.kernel.devices["pci0/disk"].slot[3] ^= 1

    successor = kernels.plain(machine)
    check = successor.validate

    def validate(handover):
        kernel.devices["pci0/disk"].slot[3] ^= 1
        return check(handover)

    successor.validate = validate
    kernel.kexec_load(successor)
    kernel = prepare_and_kexec(kernel, verify=True)

    assert kernel.arrival.state_bytes - kernel.arrival.verified_bytes == 40
    assert spoil is not None


def test_subsystem_state_in_memory_comes_over(machine):
    """A subsystem preserves a folio in PREPARE and finds it by its u64 in the next kernel."""
    seen = []

    def prepare(context):
        context.data = context.kho.alloc_preserve(4096)
        context.memory.view(context.data, 4)[:] = b"kept"

    def restore(context):
        seen.append(bytes(context.memory.view(context.data, 4)))

    def finish(context):
        context.kho.incoming.restore_free(context.data)

    def make():
        part = Subsystem("one", prepare=prepare, restore=restore, finish=finish)
        return Kernel(machine, subsystems=[part])

    kernel = updated(make().boot(), make())
    assert kernel.luo.finish().failures == ()

    assert seen == [b"kept"]


def test_errors_are_what_they_say():
    """The classes of the errors of a jump are KhoErrors with their own errno."""
    assert issubclass(SuccessorError, KhoError)
    assert issubclass(HostCrashError, KhoError)
    assert issubclass(StateError, KhoError)
    assert not issubclass(KernelPanic, OSError)
