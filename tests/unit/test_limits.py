"""Callbacks that take too long, and devices that wait for their driver."""

import errno
from pathlib import Path

import numpy as np
import pytest
from rig import errno_of, plain_kernel, small_machine, snapshot, updated

from luo.device import Driver, LiveUpdateOps, batch
from luo.errors import CallbackError, StateError
from luo.liveupdate import State, Subsystem

NIC0, NIC1, DISK = "pci0/port/nic0", "pci0/port/nic1", "pci0/disk"
OPS = LiveUpdateOps()
OTHERS = {"portdrv": OPS, "nvme": OPS}


class Clock:
    """A clock that stands, until a callback moves it."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now

    def late(self, *_):
        """Take two seconds."""
        self.now += 2_000_000_000


def limited(clock, ops=OPS, subsystems=(), **more):
    """A kernel whose callbacks may take a second."""
    drivers = OTHERS | {"nic": ops}
    return plain_kernel(
        small_machine(), drivers, {"pci": OPS}, clock=clock, subsystems=subsystems, **more
    ).boot()


def where(clock, place, event, undone):
    """A kernel that is late in *event* at *place*; who is cancelled goes to *undone*."""
    if place == "subsystem":
        late = Subsystem("slow", **{event: clock.late, "cancel": lambda c: undone.append("slow")})
        return {"subsystems": [late]}
    if place == "device":
        cancel = lambda dev: undone.append(dev.path)  # noqa: E731
        return {"ops": LiveUpdateOps(**{event: clock.late, "cancel": cancel})}
    cancel = batch(lambda devices: undone.extend(dev.path for dev in devices))
    return {"ops": LiveUpdateOps(**{event: batch(clock.late), "cancel": cancel})}


@pytest.mark.parametrize("event", ["prepare", "reboot"])
@pytest.mark.parametrize(
    ("place", "cancelled"), [("subsystem", ["slow"]), ("device", [NIC0]), ("batch", [NIC0])]
)
def test_late_callback_is_etimedout_and_is_cancelled(place, cancelled, event):
    """It did its work, so it gets its CANCEL; everything is as before."""
    clock, undone = Clock(), []
    kernel = limited(clock, callback_limit=1.0, **where(clock, place, event, undone))
    kernel.devices.request([2])
    before = snapshot(kernel)
    if event == "reboot":
        kernel.luo.prepare()
    with pytest.raises(CallbackError, match=r"2000\.000 ms, the limit is 1000\.000 ms") as caught:
        getattr(kernel.luo, event)()

    assert caught.value.errno == errno.ETIMEDOUT
    assert caught.value.rolled_back
    assert undone == cancelled
    after = snapshot(kernel)
    if event == "reboot":  # pages of the map stay
        before = settled_state(before)
        after = settled_state(after)
    assert after == before


def settled_state(taken):
    """What is left of a snapshot when pages of the map are left out."""
    return {name: taken[name] for name in ("state", "requested", "preserved", "kept", "subtrees")}


@pytest.mark.parametrize("place", ["subsystem", "device", "batch"])
def test_late_cancel_is_collected(place):
    """CANCEL has no way back: the result names who was late."""
    clock = Clock()
    late = {
        "subsystem": {"subsystems": [Subsystem("slow", cancel=clock.late)]},
        "device": {"ops": LiveUpdateOps(prepare=lambda dev: None, cancel=clock.late)},
        "batch": {"ops": LiveUpdateOps(prepare=lambda dev: None, cancel=batch(clock.late))},
    }[place]
    kernel = limited(clock, callback_limit=1.0, **late)
    kernel.devices.request([2])
    kernel.luo.prepare()
    (failure,) = kernel.luo.cancel().failures

    assert failure.errno == errno.ETIMEDOUT
    assert kernel.luo.state is State.NORMAL


@pytest.mark.parametrize(
    "setting", [{}, {"callback_limit": 1.0, "quirks": ["no-callback-limit"]}], ids=str
)
def test_callback_without_a_limit_takes_its_time(setting):
    """None is the default, and with the quirk there is none."""
    clock = Clock()
    kernel = limited(clock, ops=LiveUpdateOps(prepare=clock.late), **setting)
    kernel.devices.request([2])
    kernel.luo.prepare()

    assert kernel.luo.state is State.PREPARED


# ---- devices that wait for their driver ----


def boot_without_driver(log, **more):
    """A kernel that came over without a driver bound to the nics: it binds them later."""
    machine = small_machine()
    save = LiveUpdateOps(prepare=lambda dev: dev.slot.__setitem__(slice(None), b"word"),
                         state_size=4)  # fmt: skip
    kernel = plain_kernel(machine, OTHERS | {"nic": save}, {"pci": OPS}).boot()
    kernel.devices.request([2, 3])

    def restore(dev):
        log.append(("restore", dev.path, bytes(dev.slot)))
        dev.reclaim()

    def probe(dev):
        log.append(("probe", dev.path))

    late = Driver("late", LiveUpdateOps(**{"restore": restore} | more), probe=probe)
    return updated(kernel, plain_kernel(machine, OTHERS | {"late": late}, {"pci": OPS}))


def test_preserved_device_without_driver_waits_for_it():
    """It is not reclaimed and not probed; binding restores it from its slot."""
    log = []
    kernel = boot_without_driver(log)
    nic = kernel.devices[NIC0]
    assert (nic.preserved, nic.reclaimed, log) == (True, False, [])
    nic.bind("late")

    assert log == [("restore", NIC0, b"word")]
    assert nic.reclaimed
    assert kernel.luo.finish().unreclaimed == (NIC1,)


def test_bind_of_a_waiting_device_may_fail_to_restore():
    """The error comes out of bind(); the device stays bound and unreclaimed."""
    kernel = boot_without_driver([], restore=lambda dev: -errno.EIO)
    with pytest.raises(CallbackError) as caught:
        kernel.devices[NIC0].bind("late")

    assert (caught.value.errno, caught.value.event) == (errno.EIO, "RESTORE")
    assert kernel.devices[NIC0].driver.name == "late"
    assert not kernel.devices[NIC0].reclaimed


def test_bind_of_a_waiting_device_takes_batch_callbacks():
    """A batch restore gets a run of one."""
    seen = []

    def restore(devices):
        seen.append((list(devices.index), bytes(devices.slots)))
        devices.reclaim()

    kernel = boot_without_driver([], restore=batch(restore))
    kernel.devices[NIC1].bind("late")

    assert seen == [([3], b"word")]
    assert kernel.devices.reclaimed.tolist() == [True, True, False, True, False]


def test_bind_of_a_waiting_device_without_restore_reclaims_it():
    """As at boot: nobody else would."""
    kernel = boot_without_driver([], restore=None)
    kernel.devices[NIC0].bind("late")

    assert kernel.devices[NIC0].reclaimed


def test_device_that_nobody_reclaimed_is_probed_after_finish():
    """It is a device like any other then."""
    log = []
    kernel = boot_without_driver(log, restore=lambda dev: None)
    kernel.devices[NIC0].bind("late")
    kernel.luo.finish()

    assert log == [("probe", NIC0)]


def test_bind_in_normal_probes_and_failure_unbinds(monkeypatch):
    """As in the kernel: who fails its probe is not bound."""
    calls = []

    def probe(dev):
        calls.append(dev.path)
        if dev.path == NIC1:
            raise OSError(errno.ENODEV, "not mine")

    spare = Driver("spare", OPS, probe=probe)
    drivers = OTHERS | {"nic": OPS, "spare": spare}
    kernel = plain_kernel(small_machine(), drivers, {"pci": OPS}).boot()
    for path in (NIC0, NIC1):
        kernel.devices[path].unbind()
    kernel.devices[NIC0].bind("spare")

    assert errno_of(kernel.devices[NIC1].bind, "spare") == errno.ENODEV
    assert calls == [NIC0, NIC1]
    assert kernel.devices[NIC0].driver is spare
    assert kernel.devices[NIC1].driver is None


def test_references_are_held_from_prepare_to_the_end_of_the_update():
    """One on each device of the update; CANCEL and FINISH drop them."""
    kernel = limited(None)
    kernel.devices.request([2])
    kernel.luo.prepare()
    held = kernel.devices.references.tolist()
    kernel.luo.cancel()

    assert held == [1, 1, 1, 0, 0]
    assert not kernel.devices.references.any()
    successor = plain_kernel(kernel.machine, OTHERS | {"nic": OPS}, {"pci": OPS})
    kernel = updated(kernel, successor)
    assert kernel.devices.references.tolist() == held
    kernel.luo.finish()
    assert not np.any(kernel.devices.references)


def test_events_outside_their_state_say_which_is_needed():
    """The message names the wanted state and the present one."""
    kernel = limited(None)
    with pytest.raises(StateError, match="CANCEL: needs PREPARED, the state is NORMAL"):
        kernel.luo.cancel()


def test_error_points_into_the_users_file_and_not_into_the_library():
    """What is raised inside Python's own modules was called from somewhere."""

    def prepare(dev):
        Path("/no/such/file").read_text()

    kernel = limited(None, ops=LiveUpdateOps(prepare=prepare))
    kernel.devices.request([2])
    with pytest.raises(CallbackError) as caught:
        kernel.luo.prepare()

    assert (caught.value.errno, caught.value.file) == (errno.ENOENT, __file__)
    assert caught.value.line == prepare.__code__.co_firstlineno + 1
