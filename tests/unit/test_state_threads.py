"""Eight threads read the state and write ``requested`` while updates run and are cancelled."""

import errno
import itertools
import sys
import threading
import time
import traceback

import pytest
from rig import forest, plain_kernel

from luo.device import LiveUpdateOps
from luo.liveupdate import Priority, State, Subsystem
from luo.machine import Machine

NR_THREADS, NR_UPDATES = 8, 1000
PATIENCE_S = 100  # far beyond what it takes: then it is a deadlock

#: Two devices of each thread's own, and four below them that all threads fight over.
SHAPE = {
    **{f"own{number}": (None, "d") for number in range(2 * NR_THREADS)},
    **{f"own{number}/shared": (None, "d") for number in range(4)},
}
OWN, SHARED = range(2 * NR_THREADS), range(2 * NR_THREADS, len(SHAPE))


class Crew:
    """Threads of which none may fail and none may hang."""

    def __init__(self):
        self.threads = []
        self.errors = []
        self.over = threading.Event()

    def start(self, work, *arguments):
        """Run *work* in a thread."""

        def run():
            try:
                work(*arguments)
            except BaseException as error:
                self.errors.append(error)
                self.over.set()

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()

    def join(self):
        """Wait for all; who does not come fails the test, with everybody's stack."""
        end = time.monotonic() + PATIENCE_S
        for thread in self.threads:
            thread.join(max(end - time.monotonic(), 0))
        if any(thread.is_alive() for thread in self.threads):
            frames = sys._current_frames()
            stacks = [
                "".join(traceback.format_stack(frames[thread.ident]))
                for thread in self.threads
                if thread.ident in frames
            ]
            pytest.fail("deadlock:\n" + "\n----\n".join(stacks))
        if self.errors:
            raise self.errors[0]


class Witness:
    """A subsystem behind the devices, which sees what an update works on."""

    def __init__(self):
        self.kernel = None
        self.requested = None

    def subsystem(self):
        return Subsystem(
            "witness",
            priority=Priority.AFTER_DEVICES,
            prepare=self.prepare,
            reboot=self.compare,
            cancel=self.compare,
        )

    def prepare(self, context):
        devices = context.kernel.devices
        self.requested = devices.requested.copy()
        kept = self.requested.copy()
        for number in SHARED:  # a parent goes with its child
            kept[number - SHARED.start] |= kept[number]
        assert devices.preserved.tolist() == kept.tolist()
        assert context.kernel.luo.state is State.NORMAL

    def compare(self, context):
        assert context.kernel.devices.requested.tolist() == self.requested.tolist()
        assert context.kernel.luo.state is State.PREPARED


def test_requested_written_by_8_threads_during_1000_updates_loses_nothing(request):
    """A write that succeeded is there, a refused one left nothing, and no update sees half."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    witness = Witness()
    table = LiveUpdateOps(prepare=lambda device: 0, cancel=lambda device: 0, state_size=8)
    machine = Machine("64MiB", forest(SHAPE))
    kernel = plain_kernel(machine, {"d": table}, {}, subsystems=[witness.subsystem()]).boot()
    luo, devices = kernel.luo, kernel.devices
    crew = Crew()
    written, refused = threading.Event(), threading.Event()
    states = set()

    def write(index, on):
        """Write one flag; returns whether it was accepted."""
        try:
            devices.request_one(index, on)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            refused.set()
            return False
        written.set()
        return True

    def user(me):
        flags = {index: False for index in OWN[2 * me : 2 * me + 2]}
        for turn in itertools.count():
            if crew.over.is_set():
                return
            states.add(luo.state)
            index = 2 * me + turn % 2
            if write(index, not flags[index]):
                flags[index] = not flags[index]
            assert bool(devices.requested[index]) is flags[index]
            write(SHARED[turn % len(SHARED)], turn % 3 > 0)
            if turn % 16 == me:
                with luo.read_state() as state:
                    before = devices.requested[index]
                    time.sleep(0)
                    assert luo.state is state
                    assert devices.requested[index] == before

    def updates():
        for number in range(NR_UPDATES):
            luo.prepare()
            assert luo.state is State.PREPARED
            if number % 8 == 0:  # somebody comes too late for this one
                refused.clear()
                refused.wait(PATIENCE_S)
            if number % 3:
                assert luo.cancel().failures == ()
            else:
                assert luo.dry_reboot().failures == ()
            assert luo.state is State.NORMAL
            written.clear()  # and somebody gets through before the next
            written.wait(PATIENCE_S)
        crew.over.set()

    for number in range(NR_THREADS):
        crew.start(user, number)
    crew.start(updates)
    crew.join()

    assert written.is_set()
    assert refused.is_set()
    assert states == {State.NORMAL, State.PREPARED}
    assert luo.state is State.NORMAL
    assert devices.nr_linked == devices.requested.sum()
    assert not devices.preserved.any()
    assert not devices.references.any()
