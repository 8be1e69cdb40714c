"""A kernel in another process: asked by many threads, while it is busy, and when it dies."""

import contextlib
import errno
import gc
import logging
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref

import kernels
import pytest
from rig import errno_of

from luo.channel import Closed, Line, decode_error, encode_error
from luo.dma import Extent, whose
from luo.errors import (
    CallbackError,
    FdtError,
    HandoverError,
    HostCrashError,
    KernelPanic,
    KhoBusyError,
    KhoError,
    KhoExistsError,
    KhoNoMemoryError,
    KhoNotFoundError,
    StateError,
    from_errno,
)
from luo.kernel import KernelImage, RemoteKernel
from luo.liveupdate import State
from luo.sysfs import debug_files, write_debug_file

PLAIN = KernelImage("kernels:plain")
DISK = 4  # number of the device whose callbacks wait and fail


@contextlib.contextmanager
def running(image=PLAIN, **kwargs):
    """Boot *image* in another process by an ordinary kexec, and request all devices."""
    machine = kernels.machine()
    kernel = kernels.plain(machine, **kwargs).boot()
    kernel.kexec_load(image)
    with kernel.kexec() as remote:
        if remote.luo.enabled:
            remote.devices.request("*")
        yield remote
    if machine.running is not None:
        machine.running.close()


@pytest.fixture
def remote():
    """A running kernel in another process with everything requested."""
    with running() as remote:
        yield remote


class Gate:
    """A callback in another process that waits until it is let through."""

    def __init__(self, directory, event, **args):
        self.began, self.gate = directory / "began", directory / "gate"
        paths = {"began": str(self.began), "gate": str(self.gate)}
        self.image = KernelImage("kernels:gated", args={"event": event, **paths, **args})

    def wait(self):
        """Return when the callback has begun."""
        appears(self.began)

    def open(self):
        """Let it through."""
        self.gate.touch()


def appears(path):
    """Wait for a file."""
    until(path.exists)


def until(condition):
    """Wait for something that is about to happen."""
    for _ in range(4000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("it did not happen")


class Caller(threading.Thread):
    """A call in a thread of its own, and what came of it."""

    def __init__(self, call, *args):
        super().__init__(daemon=True)  # a test that fails must not wait for it
        self.call, self.args = call, args
        self.result = self.error = None
        self.start()

    def run(self):
        """Call."""
        try:
            self.result = self.call(*self.args)
        except BaseException as error:
            self.error = error

    def outcome(self):
        """Return the result, or raise the error, when it is there."""
        self.join(30)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


@contextlib.contextmanager
def busy(tmp_path, event="PREPARE", **args):
    """Have a thread run PREPARE in another process, up to the callback that waits."""
    gate = Gate(tmp_path, event, **args)
    with running(gate.image) as remote:
        if event == "CANCEL":
            remote.luo.prepare()
        thread = Caller(getattr(remote.luo, event.lower()))
        gate.wait()
        try:
            yield remote, gate, thread
        finally:
            gate.open()
            thread.join(30)


# ---- while an event runs ----


def test_remote_questions_are_answered_while_an_event_runs(tmp_path):
    """Whatever can be asked does not wait for a slow callback."""
    with busy(tmp_path) as (remote, gate, thread):
        assert remote.luo.state is State.NORMAL
        assert (remote.luo.enabled, remote.luo.initialised) == (True, True)
        assert remote.devices.requested.all()
        assert not remote.devices.reclaimed.any()
        assert remote.devices.grouped.all()
        assert remote.devices.references.tolist() == [1] * 5
        assert remote.devices.nr_linked == 5
        assert remote.devices.owners == {}
        assert isinstance(remote.profile.dump(), list)
        assert "out/scratch_phys" in remote.debug_files()
        assert whose(remote, 0, 4096) == [(0, 4096, "reserved")]
        assert thread.is_alive()
        gate.open()
        thread.outcome()
        assert remote.luo.state is State.PREPARED
        assert remote.devices.preserved.all()


@pytest.mark.parametrize(
    ("event", "expected", "flag"), [("PREPARE", errno.EINVAL, True), ("CANCEL", None, False)]
)
def test_remote_request_one_waits_for_the_event(event, expected, flag, tmp_path):
    """A write of requested waits; then it is refused in PREPARED and done in NORMAL."""
    with busy(tmp_path, event) as (remote, gate, thread):
        write = Caller(remote.devices.request_one, DISK, False)
        # It is on its way there before the questions that are asked behind it are answered.
        for _ in range(20):
            assert remote.devices.requested[DISK]
        assert write.is_alive()
        gate.open()
        thread.outcome()
        assert errno_of(write.outcome) == expected
        assert remote.devices.requested[DISK] == flag


def test_remote_request_one_of_the_same_value_does_not_wait(tmp_path):
    """Writing what is there is done at once, whatever runs (RFC v1 1.9)."""
    with busy(tmp_path) as (remote, _gate, thread):
        remote.devices.request_one(DISK, True)
        assert thread.is_alive()


def test_remote_event_waits_for_the_one_before_it(tmp_path):
    """Two threads: the second event begins when the first has ended."""
    with busy(tmp_path) as (remote, gate, thread):
        cancel = Caller(remote.luo.cancel)
        assert remote.devices.requested.all()
        assert cancel.is_alive()
        gate.open()
        thread.outcome()
        assert cancel.outcome().failures == ()
        assert remote.luo.state is State.NORMAL


def test_remote_kernel_close_ends_the_calls_of_other_threads(tmp_path):
    """Who waits for an answer when the kernel is closed gets ESHUTDOWN."""
    with busy(tmp_path) as (remote, _gate, thread):
        write = Caller(remote.devices.request_one, DISK, False)
        remote.close()
        assert errno_of(write.outcome) == errno.ESHUTDOWN
        assert errno_of(thread.outcome) == errno.ESHUTDOWN


# ---- notifications ----


def test_remote_notifications_arrive_in_order(remote):
    """The observer and the machine's watchers hear of each state before the call returns."""
    heard, read = [], []
    remote.observer = lambda what, name: heard.append((what, name, remote.luo.state.name))
    remote.machine.watchers.append(
        lambda path: (heard.append(path), read.append(remote.luo.state.name))
    )
    expected = []
    for _ in range(5):
        remote.luo.prepare()
        expected += [("state", "prepared", "PREPARED"), "kernel/liveupdate/state"]
        assert heard == expected
        remote.luo.cancel()
        expected += [("state", "normal", "NORMAL"), "kernel/liveupdate/state"]
        assert heard == expected
    assert read == ["PREPARED", "NORMAL"] * 5


def test_remote_failed_prepare_notifies_nobody(tmp_path):
    """A state that did not change is not announced."""
    heard = []
    image = KernelImage("kernels:fails", args={"event": "PREPARE"})
    with running(image) as remote:
        remote.observer = lambda what, name: heard.append(name)
        assert errno_of(remote.luo.prepare) == errno.EBUSY
        assert heard == []


def test_remote_state_is_known_while_it_restores(tmp_path):
    """A restore callback takes its time: the kernel runs already, and says UPDATED."""
    machine = kernels.machine()
    kernel = kernels.plain(machine).boot()
    kernel.devices.request("*")
    gate = Gate(tmp_path, "RESTORE")
    kernel.kexec_load(gate.image)
    kernel.luo.prepare()
    thread = Caller(kernel.kexec)
    gate.wait()
    remote = machine.running
    until(lambda: remote.luo.initialised)  # it says so, and then calls back: the file may be first
    assert remote.luo.state is State.UPDATED
    assert not remote.devices.reclaimed.all()
    gate.open()
    with thread.outcome() as same:
        assert same is remote
        assert remote.devices.reclaimed.all()


def test_remote_question_from_an_observer_is_edeadlk(remote):
    """Whoever is told in the receiving thread cannot wait for an answer there."""
    seen = []
    remote.observer = lambda what, name: seen.append(errno_of(lambda: remote.devices.preserved))
    remote.luo.prepare()
    assert seen == [errno.EDEADLK]


def test_remote_observer_that_raises_is_logged(remote, caplog):
    """What an observer raises harms neither the call nor the channel."""
    remote.machine.watchers.append(lambda path: 1 // 0)
    with caplog.at_level(logging.WARNING):
        remote.luo.prepare()
    assert "told of sysfs kernel/liveupdate/state" in caplog.text
    assert remote.devices.preserved.all()


def test_remote_observer_that_closes_the_kernel_ends_the_call(remote):
    """Closing from the receiving thread does not wait for that thread."""
    remote.observer = lambda what, name: remote.close()
    assert errno_of(remote.luo.prepare) == errno.ESHUTDOWN
    assert remote.machine.running is None


# ---- many threads ----


def test_remote_threads_get_each_its_own_answers(remote):
    """Eight threads write and read each its own device; nobody gets the answer of another."""
    remote.devices.request("*", on=False)

    def work(index):
        for turn in range(40):
            on = turn % 2 == 0
            remote.devices.request_one(index, on)
            assert bool(remote.devices.requested[index]) is on
            assert remote.luo.state is State.NORMAL

    threads = [Caller(work, index) for index in (2, 3, 4)]
    readers = [Caller(lambda: [len(remote.profile.dump()) for _ in range(40)]) for _ in range(5)]
    for thread in threads + readers:
        thread.outcome()
    assert not remote.devices.requested.any()


# ---- the surface ----


def test_remote_dry_reboot_calls_reboot_and_cancels(remote):
    """REBOOT without a jump: every callback is called, then the state is NORMAL."""
    assert errno_of(remote.luo.dry_reboot) == errno.EINVAL
    remote.luo.prepare()
    assert remote.luo.dry_reboot().failures == ()
    assert remote.luo.state is State.NORMAL
    assert not remote.devices.preserved.any()
    assert {"PREPARE", "REBOOT", "CANCEL"} <= {row["event"] for row in remote.profile.rows()}


@pytest.mark.parametrize("event", ["REBOOT", "CANCEL"])
def test_remote_dry_reboot_says_who_failed(event):
    """A REBOOT callback that fails is raised; one of CANCEL is in the result."""
    with running(KernelImage("kernels:fails", args={"event": event})) as remote:
        remote.luo.prepare()
        if event == "REBOOT":
            with pytest.raises(CallbackError, match="REBOOT driver nvme"):
                remote.luo.dry_reboot()
        else:
            failures = remote.luo.dry_reboot().failures
            assert [(f.event, f.device, f.returned) for f in failures] == [
                ("CANCEL", "pci0/disk", -16)
            ]
        assert remote.luo.state is State.NORMAL


def test_remote_kernel_says_what_it_is():
    """Generation, behaviour and quirks are those of the kernel there."""
    with running() as remote:
        assert (remote.kho_abi, remote.behaviour, remote.quirks) == (
            "kho-v4",
            "intended",
            frozenset(),
        )
    image = KernelImage("kernels:plain", args={"quirks": ["warn-once"]})
    with running(image) as remote:
        assert remote.quirks == {"warn-once"}


def test_remote_live_update_off_is_not_enabled():
    """A kernel without live update says so, and has no directories."""
    with running(KernelImage("kernels:plain", "kho=on")) as remote:
        assert (remote.luo.enabled, remote.luo.initialised) == (False, False)
        assert not remote.devices.grouped.any()
        assert errno_of(remote.luo.prepare) == errno.EOPNOTSUPP


@pytest.mark.parametrize("kho_abi", ["kho-v4", "kho-v5-series"])
def test_remote_debug_files_and_owners_are_those_of_the_kernel(kho_abi):
    """debugfs and owners of memory are the same, wherever the kernel runs."""
    seen = []
    for where in (KernelImage, None):
        machine = kernels.machine()
        kernel = kernels.plain(machine, kho_abi=kho_abi).boot()
        image = KernelImage("kernels:plain", args={"kho_abi": kho_abi})
        kernel.kexec_load(image if where else image.build(machine))
        with kernel.kexec() as successor:
            extents = whose(successor, 0, machine.memory.size)
            assert type(extents[0]) is Extent
            with pytest.raises(KhoNotFoundError):
                write_debug_file(successor, "out/nothing", 1)
            seen.append((debug_files(successor), extents, successor.strays))
    assert seen[0] == seen[1]


def test_remote_write_of_debugfs_waits_for_the_event(tmp_path):
    """KHO is finalized when the event that runs has ended, not in the midst of it."""
    home = {"kho_abi": "kho-v5-series"}
    gate = Gate(tmp_path, "PREPARE", outcome=-errno.EBUSY, **home)
    with running(gate.image, **home) as remote:
        thread = Caller(remote.luo.prepare)
        gate.wait()
        write = Caller(remote.write_debug_file, "out/finalize", 1)
        assert remote.debug_files()["out/finalize"] == b"0\n"
        assert write.is_alive()
        gate.open()
        assert errno_of(thread.outcome) == errno.EBUSY
        write.outcome()
        assert remote.debug_files()["out/finalize"] == b"1\n"


def test_remote_change_owner(remote):
    """Owners of directories are kept there."""
    remote.devices.change_owner(DISK, 1000, 100)
    assert remote.devices.owners == {DISK: (1000, 100)}
    image = KernelImage("kernels:plain", "kho=on", {"quirks": ["change-owner-fails"]})
    with running(image) as off:
        assert errno_of(off.devices.change_owner, DISK, 1000, 100) == errno.ENOENT


def test_remote_request_of_no_device_is_index_error(remote):
    """A mistake in the arguments is the same one as with a kernel here."""
    with pytest.raises(IndexError):
        remote.devices.request_one(99, True)
    assert errno_of(remote.devices.request, [99]) == errno.ENOENT
    with pytest.raises(TypeError, match="float64"):
        remote.devices.request([1.5])
    with pytest.raises(ValueError, match="shape"):
        remote.devices.request([True])


def test_remote_device_that_came_since_is_not_known_there(remote):
    """Columns have a row for each device of the machine, also of those it does not know."""
    remote.machine.devices.add("new")
    assert remote.devices.requested.tolist() == [True] * 5 + [False]
    assert len(remote.devices.references) == 6
    assert remote.devices.request([2, 3], on=False) == 2
    assert errno_of(remote.devices.request, [2, 5]) == errno.ENOENT
    assert not remote.devices.requested[2]


def test_remote_kexec_without_an_image_runs_reboot_under_the_quirk():
    """EINVAL in any case; with no-image-check REBOOT and CANCEL callbacks ran before."""
    seen = {}
    for quirks in ([], ["no-image-check"]):
        with running(KernelImage("kernels:plain", args={"quirks": quirks})) as remote:
            remote.luo.prepare()
            assert errno_of(remote.kexec) == errno.EINVAL
            events = {row["event"] for row in remote.profile.rows()}
            seen[bool(quirks)] = (remote.luo.state, "REBOOT" in events)
    assert seen == {False: (State.PREPARED, False), True: (State.NORMAL, True)}


def test_remote_chain_leaves_the_old_process_behind(remote):
    """After a jump from process to process the old one has ended, and says that it is gone."""
    remote.kexec_load(PLAIN)
    remote.luo.prepare()
    with remote.kexec() as kernel:
        assert errno_of(lambda: remote.luo.state) == errno.ESHUTDOWN
        assert errno_of(remote.kexec) == errno.ESHUTDOWN
        with pytest.raises(ProcessLookupError):
            os.kill(remote.pid, 0)
        assert kernel.luo.finish().failures == ()


# ---- that dies ----


def test_remote_death_during_a_question_is_a_crash(tmp_path):
    """Whoever waits when the process dies is told, and so is everybody who asks afterwards."""
    with busy(tmp_path) as (remote, _gate, thread):
        write = Caller(remote.devices.request_one, DISK, False)
        assert remote.devices.requested.all()
        os.kill(remote.pid, signal.SIGKILL)
        for waiting in (write, thread):
            with pytest.raises(HostCrashError, match="SIGKILL"):
                waiting.outcome()
        for question in (lambda: remote.luo.state, lambda: remote.devices.requested):
            with pytest.raises(HostCrashError, match="SIGKILL"):
                question()


def test_remote_process_in_a_callback_ends_with_the_one_that_started_it(tmp_path):
    """A kernel whose machine was killed is no orphan, whatever its callbacks wait for."""
    gate = Gate(tmp_path, "PREPARE")
    script = f"""
import kernels
from luo.kernel import KernelImage
kernel = kernels.plain(kernels.machine()).boot()
kernel.kexec_load(KernelImage("kernels:gated", args={dict(gate.image.args)!r}))
remote = kernel.kexec()
remote.devices.request("*")
print(remote.pid, flush=True)
remote.luo.prepare()
"""
    starter = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with starter:
        pid = int(starter.stdout.readline())
        gate.wait()
        starter.kill()
        # Both have the pipe open; who adopts the second process may not reap it.
        ready, _, _ = select.select([starter.stdout], [], [], 30)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        assert ready


def test_remote_kernel_that_nobody_refers_to_ends():
    """The channel's thread does not keep it alive."""
    machine = kernels.machine()
    kernel = RemoteKernel(machine, PLAIN)
    pid, gone = kernel.pid, weakref.ref(kernel)
    del kernel
    gc.collect()
    assert gone() is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_remote_kernels_leave_no_thread_and_no_descriptor():
    """Twenty kernels come and go: threads and descriptors are as before."""
    machine = kernels.machine()
    RemoteKernel(machine, PLAIN).close()
    gc.collect()  # machines of other tests
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for number in range(20):
        kernel = RemoteKernel(machine, PLAIN)
        if number % 2:
            os.kill(kernel.pid, signal.SIGKILL)
        kernel.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_remote_load_failure_leaves_no_thread_and_no_descriptor():
    """Nor does one that cannot be loaded leave any."""
    machine = kernels.machine()
    RemoteKernel(machine, PLAIN).close()
    gc.collect()  # machines of other tests
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    assert errno_of(RemoteKernel, machine, KernelImage("kernels:raises")) == errno.ENOEXEC
    gc.collect()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


# ---- interrupts and kills ----


@contextlib.contextmanager
def interrupted_when(condition):
    """Send this process SIGINT once *condition* holds; the block must be interrupted."""

    def interrupt():
        until(condition)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    thread.join()


def asks(remote, count):
    """Return a condition: *count* calls wait for their answer."""
    return lambda: len(remote._waiting) == count


def test_remote_interrupt_of_a_waiting_event_takes_it_back(tmp_path):
    """^C of an event that waits for another one: it never begins, the other goes on."""
    with busy(tmp_path) as (remote, gate, thread):
        with interrupted_when(asks(remote, 2)):
            remote.luo.cancel()
        assert thread.is_alive()
        gate.open()
        thread.outcome()
        assert remote.luo.state is State.PREPARED


def test_remote_interrupt_of_a_waiting_write_takes_it_back(tmp_path):
    """^C of a write that waits for an event: nothing is written later."""
    with busy(tmp_path, "CANCEL") as (remote, gate, thread):
        with interrupted_when(asks(remote, 2)):
            remote.devices.request_one(DISK, False)
        gate.open()
        thread.outcome()
        assert remote.devices.requested[DISK]


def test_remote_interrupt_ends_a_callback_that_waits_for_itself(tmp_path):
    """^C gets a kernel out of the deadlock of RFC v1's quirk."""
    began = tmp_path / "began"
    image = KernelImage("kernels:waits_for_itself", args={"began": str(began)})
    with running(image) as remote:
        with interrupted_when(began.exists):
            remote.luo.prepare()
        assert remote.luo.state is State.NORMAL
        assert not remote.devices.preserved.any()


@pytest.mark.parametrize("what", ["event", "write"])
def test_remote_kill_of_a_waiting_thread_is_eagain(what, tmp_path):
    """A fatal signal for a thread that waits for an event: EAGAIN, and nothing is done."""
    with busy(tmp_path, "CANCEL") as (remote, gate, thread):
        call = (
            (remote.luo.prepare,) if what == "event" else (remote.devices.request_one, DISK, False)
        )
        victim = Caller(*call)
        until(lambda: remote.luo.kill(victim.ident))
        assert errno_of(victim.outcome) == errno.EAGAIN
        assert thread.is_alive()
        assert not remote.luo.kill(thread.ident)  # it does not wait, it runs
        assert not remote.luo.kill(threading.get_ident())
        gate.open()
        thread.outcome()
        assert remote.luo.state is State.NORMAL
        assert remote.devices.requested[DISK]


def test_remote_kill_ends_a_callback_that_waits_for_itself(tmp_path):
    """The thread whose event deadlocks waits, so it can be killed: the event fails."""
    began = tmp_path / "began"
    image = KernelImage("kernels:waits_for_itself", args={"began": str(began)})
    with running(image) as remote:
        thread = Caller(remote.luo.prepare)
        appears(began)
        until(lambda: remote.luo.kill(thread.ident))
        with pytest.raises(CallbackError, match="selfish") as caught:
            thread.outcome()
        assert caught.value.errno == errno.EINTR
        assert remote.luo.state is State.NORMAL


def test_remote_interrupts_at_any_moment_leave_normal_or_prepared(remote):
    """Wherever ^C strikes: raised means rolled back, not raised means done."""
    seed = random.randrange(1 << 32)
    delays = random.Random(seed)
    counts = {"interrupted": 0, "done": 0}

    def interrupt(number, frame):
        while frame is not None:  # not before the call, and not after it
            if frame.f_code.co_name == "_ask":
                raise KeyboardInterrupt
            frame = frame.f_back

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for turn in range(150):
            signal.setitimer(signal.ITIMER_REAL, delays.uniform(1e-5, 4e-3))
            try:
                remote.luo.prepare()
            except KeyboardInterrupt:
                counts["interrupted"] += 1
                expected = State.NORMAL
            else:
                counts["done"] += 1
                expected = State.PREPARED
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            kept = remote.devices.preserved
            assert remote.luo.state is expected, (seed, turn)
            assert kept.all() if expected is State.PREPARED else not kept.any(), (seed, turn)
            if expected is State.PREPARED:
                remote.luo.cancel()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert counts["interrupted"] > 0, counts
    assert not remote._waiting


# ---- errors ----


def callback_error():
    """Return an error with all that one can have."""
    error = CallbackError(
        22,
        "words",
        event="PREPARE",
        kind="driver",
        name="nvme",
        device="pci0/disk",
        returned=16,
        file="driver.py",
        line=7,
    )
    undo = CallbackError(5, "undo", event="CANCEL", kind="bus", name="pci", returned=-5)
    error.undo_errors = [undo, StateError(errno.EAGAIN, "again")]
    error.add_note("while cancelling: undo")
    return error


@pytest.mark.parametrize(
    "error",
    [
        KhoError(1, "kho_add_node() returned 1"),
        KhoError(errno.EEXIST, "as it is"),
        KhoExistsError(errno.EEXIST, "there"),
        KhoNotFoundError(errno.ENOENT, "not there"),
        KhoBusyError(errno.EBUSY, "busy"),
        KhoNoMemoryError(errno.ENOMEM, "full"),
        StateError(errno.EAGAIN, "killed"),
        FdtError("FDT_ERR_BADMAGIC", 4, "words"),
        HandoverError("a rule", 0x1000),
        KernelPanic("node found"),
        ValueError("a mask"),
        TypeError("no number"),
        IndexError("too high"),
        KeyError("path"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_remote_error_keeps_type_and_arguments(error):
    """What is raised there is raised here."""
    told = decode_error(encode_error(error))
    assert type(told) is type(error)
    assert told.args == error.args
    assert str(told) == str(error)


def test_remote_error_of_a_subclass_keeps_its_kind():
    """A refinement of StateError is one; of another OSError the errno stays."""

    class Refined(StateError):
        """Known only there."""

    assert type(decode_error(encode_error(Refined(errno.EINVAL, "x")))) is StateError
    told = decode_error(encode_error(PermissionError(errno.EACCES, "no")))
    assert (type(told), told.errno) == (KhoError, errno.EACCES)
    assert decode_error(encode_error(ZeroDivisionError("x"))).errno == errno.EIO
    assert type(decode_error(encode_error(from_errno(errno.ENOSPC, "x")))) is KhoError


def test_remote_callback_error_keeps_everything():
    """Returned number, undo errors with their types, notes, file and line."""
    error = callback_error()
    told = decode_error(encode_error(error))
    assert vars(told) | {"undo_errors": []} == vars(error) | {"undo_errors": []}
    assert [type(undo) for undo in told.undo_errors] == [CallbackError, StateError]
    assert [undo.errno for undo in told.undo_errors] == [5, errno.EAGAIN]
    assert told.undo_errors[0].returned == -5
    assert (told.errno, str(told)) == (error.errno, str(error))


def test_remote_undo_errors_arrive(tmp_path):
    """A rollback that fails there is told here, by type and returned number."""
    args = {"fail": [["CANCEL", "nic", -5], ["REBOOT", "nvme", 16]]}
    with running(KernelImage("kernels:failing", args=args)) as remote:
        remote.luo.prepare()
        with pytest.raises(CallbackError) as caught:
            remote.luo.dry_reboot()
    error = caught.value
    assert (error.event, error.errno, error.returned) == ("REBOOT", errno.EINVAL, 16)
    assert error.rolled_back is False
    assert [(type(undo), undo.event, undo.returned) for undo in error.undo_errors] == [
        (CallbackError, "CANCEL", -5)
    ] * 2
    assert len(error.__notes__) == 2


def test_remote_positive_errno_1_arrives():
    """Under node-left-behind the second reboot is KhoError 1, as the system call returns it."""
    home = {"kho_abi": "kho-v5-series"}
    image = KernelImage(
        "kernels:plain", args=home | {"quirks": ["node-left-behind", "written-in-reboot"]}
    )
    with running(image, **home) as remote:
        remote.luo.prepare()
        remote.luo.dry_reboot()
        remote.luo.prepare()
        with pytest.raises(KhoError) as caught:
            remote.luo.dry_reboot()
        assert (type(caught.value), caught.value.errno) == (KhoError, 1)


# ---- the line ----


@contextlib.contextmanager
def lines(*receivers):
    """Return both ends of a channel."""
    ends = [
        Line(peer, receive) for peer, receive in zip(socket.socketpair(), receivers, strict=True)
    ]
    try:
        yield ends
    finally:
        for end in ends:
            end.close()


def test_line_carries_large_messages_both_ways_at_once():
    """Two ends that both send more than a socket holds do not wait for each other."""
    got = [[], []]
    big = "x" * (3 << 20)
    with lines(got[0].append, got[1].append) as (one, other):
        for number in range(4):
            one.post({"n": number, "big": big})
            other.post({"n": number, "big": big})
        until(lambda: len(got[0]) == len(got[1]) == 4)
        assert [[message["n"] for message in side] for side in got] == [[0, 1, 2, 3]] * 2
        assert got[0][3]["big"] == big


def test_line_close_is_seen_at_both_ends():
    """Each end is told once that it is over, and nothing can be posted any more."""
    got = [[], []]
    with lines(got[0].append, got[1].append) as (one, other):
        one.post({"last": 1})
        until(lambda: got[1])
        one.close()
        one.close()
        until(lambda: got[1][-1] is None)
        assert got == [[None], [{"last": 1}, None]]
        for end in (one, other):
            assert not end.open
            with pytest.raises(Closed):
                end.post({})


@pytest.mark.parametrize(
    "frame",
    [struct.pack("=I", 1 << 30), struct.pack("=I", 3) + b"{x}", struct.pack("=I", 2) + b"\xff\xff"],
    ids=["too long", "no JSON", "no text"],
)
def test_line_broken_frame_is_the_end(frame):
    """A peer that talks nonsense is as good as gone."""
    got = []
    ours, theirs = socket.socketpair()
    line = Line(ours, got.append)
    theirs.sendall(struct.pack("=I", 2) + b"{}" + frame)
    until(lambda: not line.open)
    until(lambda: len(got) == 2)
    assert got == [{}, None]
    assert theirs.recv(1) == b""
    theirs.close()


def test_remote_channel_that_breaks_is_a_crash(remote):
    """A kernel whose process lives and talks nonsense is lost."""
    remote._line._peer.shutdown(socket.SHUT_RD)
    with pytest.raises(HostCrashError, match="ended with status 0"):
        remote.devices.requested


def test_remote_question_while_it_leaves_is_eshutdown(remote):
    """Its process may end before this side has heard of it: it has left, the host is not down."""
    remote._leaving = True  # as depart() begins
    os.kill(remote.pid, signal.SIGKILL)

    assert errno_of(lambda: remote.devices.requested) == errno.ESHUTDOWN
