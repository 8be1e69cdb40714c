"""Callbacks that are C functions: what they see, what they return, how they fail."""

import ctypes
import errno
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rig import Log, plain_kernel, small_machine, snapshot, updated

import luo
from luo.device import LiveUpdateOps, native
from luo.errors import CallbackError
from luo.liveupdate import Event, State

HERE = Path(__file__).parents[1] / "native"
NIC0, NIC1, DISK = "pci0/port/nic0", "pci0/port/nic1", "pci0/disk"
EVENTS = ("PREPARE", "REBOOT", "FINISH", "CANCEL", "RESTORE")

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


class Context(ctypes.Structure):
    """What the C functions count in, and which device they fail at."""

    _fields_ = (
        ("calls", ctypes.c_int64 * 5),
        ("fail_at", ctypes.c_int32),
        ("rc", ctypes.c_int32),
        ("usec", ctypes.c_int64),
    )

    def counts(self):
        """Calls by event, those that there were."""
        return {name: n for name, n in zip(EVENTS, self.calls, strict=True) if n}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The C functions, compiled against luo.h."""
    made = tmp_path_factory.mktemp("native") / "callbacks.so"
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-std=c11", "-D_DEFAULT_SOURCE"]
    source = HERE / "callbacks.c"
    subprocess.run(["gcc", *flags, "-I", luo.get_include(), source, "-o", made], check=True)
    return ctypes.CDLL(str(made))


@pytest.fixture
def context():
    """Counts of nothing, and no failure."""
    return Context(fail_at=-1)


def table(library, context, **more):
    """A table of native callbacks, which saves, changes and checks eight bytes a device."""
    calls = {"prepare": "save", "reboot": "touch", "restore": "restore"} | more
    calls |= {name: "tally" for name in ("finish", "cancel") if name not in calls}
    return LiveUpdateOps(
        state_size=8,
        **{
            event: native(getattr(library, name), ctypes.pointer(context))
            if isinstance(name, str)
            else name
            for event, name in calls.items()
        },
    )


def kernel_of(machine, ops, **more):
    """A kernel with these callbacks for the nics, and nothing for the others."""
    none = LiveUpdateOps()
    return plain_kernel(machine, {"nic": ops, "nvme": none, "portdrv": none}, {"pci": none}, **more)


def test_native_callbacks_carry_state_over(library, context):
    """They read the hardware's column, write the slot, and reclaim in the next kernel."""
    machine, after = small_machine(), Context(fail_at=-1)
    kernel = kernel_of(machine, table(library, context)).boot()
    kernel.devices.request([2, 3])
    kernel = updated(kernel, kernel_of(machine, table(library, after)))

    assert context.counts() == {"PREPARE": 2, "REBOOT": 2}
    assert kernel.devices.reclaimed.tolist() == [True] * 4 + [False]
    assert bytes(kernel.devices[NIC0].slot)[1:] == NIC0.encode()[1:8]
    result = kernel.luo.finish()
    assert (result.unreclaimed, result.failures) == ((), ())
    assert after.counts() == {"RESTORE": 2, "FINISH": 2}
    rows = {(row["event"], row["name"]): row["calls"] for row in kernel.profile.rows()}
    assert rows["RESTORE", "nic"] == rows["FINISH", "nic"] == 2
    assert kernel.luo.last_reclaim_ns > 0


@pytest.mark.parametrize("event", ["PREPARE", "REBOOT"])
@pytest.mark.parametrize(("rc", "code"), [(-errno.EBUSY, errno.EBUSY), (5, errno.EINVAL)])
def test_native_failure_rolls_back(rc, code, event, library, context):
    """A negative return is the errno, a positive one EINVAL; who ran before is cancelled."""
    event_only = {"prepare": "save", "reboot": "tally"}
    if event == "REBOOT":
        event_only |= {"prepare": None, "cancel": None}
    kernel = kernel_of(small_machine(), table(library, context, **event_only)).boot()
    kernel.devices.request([2, 3])
    before = snapshot(kernel)
    context.fail_at, context.rc = 3, rc
    if event == "REBOOT":
        kernel.luo.prepare()
    with pytest.raises(
        CallbackError, match=f"{event} driver nic of {NIC1}: returned {rc}"
    ) as error:
        getattr(kernel.luo, event.lower())()

    assert (error.value.errno, error.value.device, error.value.rolled_back) == (code, NIC1, True)
    assert context.counts() == {event: 2} | ({"CANCEL": 1} if event == "PREPARE" else {})
    after = snapshot(kernel)
    assert [after[name] for name in ("state", "preserved", "kept")] == [
        before[name] for name in ("state", "preserved", "kept")
    ]


def test_native_finish_failures_are_collected(library, context):
    """Both fail, both are named, and the state is NORMAL."""
    machine = small_machine()
    kernel = kernel_of(machine, table(library, Context(fail_at=-1))).boot()
    kernel.devices.request([2, 3])
    kernel = updated(kernel, kernel_of(machine, table(library, context)))
    context.fail_at, context.rc = 2, -errno.EIO
    failures = kernel.luo.finish().failures

    assert [(failure.device, failure.errno) for failure in failures] == [(NIC0, errno.EIO)]
    assert context.counts() == {"RESTORE": 2, "FINISH": 2}
    assert kernel.luo.state is State.NORMAL


def test_native_and_python_callbacks_mix(library, context):
    """A native driver under a Python bus: driver before bus, for each device in turn."""
    log, machine = Log(), small_machine()
    none = LiveUpdateOps()
    kernel = plain_kernel(
        machine,
        {"nic": table(library, context), "nvme": none, "portdrv": none},
        {"pci": log.ops("bus", "pci", size=4)},
    ).boot()
    kernel.devices.request([2, 3])
    seen = []
    for path in (NIC0, NIC1):
        log.hooks["PREPARE", "bus", "pci", path] = lambda dev: seen.append(
            (dev.path, bytes(dev.slot), context.calls[0])
        )
    kernel.luo.prepare()

    assert seen == [(NIC0, NIC0.encode()[:8], 1), (NIC1, NIC1.encode()[:8], 2)]


def test_native_step_by_step_is_the_same(library, context):
    """steps() yields one step a device for native callbacks too."""
    kernel = kernel_of(small_machine(), table(library, context)).boot()
    kernel.devices.request([2, 3])
    names = [(step.kind, step.device.path) for step in kernel.luo.steps(Event.PREPARE)]

    assert names == [("driver", NIC0), ("driver", NIC1)]
    assert context.counts() == {"PREPARE": 2}
    assert kernel.luo.state is State.PREPARED


def test_native_callback_over_the_limit_is_etimedout(library, context):
    """It did its work, so it is cancelled with the others."""
    kernel = kernel_of(small_machine(), table(library, context), callback_limit=0.001).boot()
    kernel.devices.request([2])
    context.usec = 20_000
    with pytest.raises(CallbackError, match="took too long, the limit is") as error:
        kernel.luo.prepare()

    assert error.value.errno == errno.ETIMEDOUT
    assert context.counts() == {"PREPARE": 1, "CANCEL": 1}


def test_native_accessors_answer_odd_questions(library):
    """No such column, no bus slot, no room for the length, reclaiming in PREPARE."""
    ops = LiveUpdateOps(prepare=native(library.odd_questions), state_size=4)
    kernel = kernel_of(small_machine(), ops).boot()
    kernel.devices.request([2])
    kernel.luo.prepare()

    assert kernel.luo.state is State.PREPARED


def test_native_with_a_clock_of_its_own_is_timed_by_it(library, context):
    """A Python clock is asked between native callbacks as well."""
    ticks = iter(range(0, 1_000_000, 10))
    kernel = kernel_of(small_machine(), table(library, context), clock=lambda: next(ticks)).boot()
    kernel.devices.request([2, 3])
    kernel.luo.prepare()
    (row,) = [row for row in kernel.profile.rows() if row["kind"] == "driver"]

    assert (row["calls"], row["total_ns"]) == (2, 20)


def test_native_takes_every_kind_of_pointer(library, context):
    """ctypes, cffi, an address and a capsule lead to the same function."""
    import cffi

    ffi = cffi.FFI()
    address = ctypes.cast(library.save, ctypes.c_void_p).value
    where = ctypes.addressof(context)
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = (
        ctypes.py_object,
        (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
    )
    name = b"int (struct luo_device *, void *)"
    given = [
        native(library.save, ctypes.byref(context) and ctypes.pointer(context)),
        native(address, where),
        native(ffi.cast("int (*)(void *, void *)", address), ffi.cast("void *", where)),
        native(make(address, name, None), where),
        native(ctypes.c_void_p(address), where),
    ]

    assert [(call.address, call.ctx) for call in given] == [(address, where)] * len(given)
    with pytest.raises(ValueError, match="capsule"):
        native(make(address, b"another", None))
    for wrong in (print, "save", 1.5, None):
        with pytest.raises(TypeError, match="no pointer"):
            native(wrong)
    with pytest.raises(ValueError, match="NULL"):
        native(0)


def test_native_on_many_devices_equals_python(library, context):
    """Ten thousand devices: the same slots as one Python callback each leaves."""
    from luo.machine import DeviceTree, Machine

    def run(ops):
        tree = DeviceTree()
        state = np.arange(10_000, dtype=np.uint64).view(np.uint8).reshape(-1, 8)
        tree.add_many(("dev", 0, 10_000), [-1] * 10_000, "pci", "nic", state=state)
        kernel = plain_kernel(Machine("64MiB", tree), {"nic": ops}, {"pci": LiveUpdateOps()}).boot()
        kernel.devices.request("*")
        kernel.luo.prepare()
        return bytes(kernel.memory.view(int(kernel.devices.slot_phys[0, 0]), 80_000))

    python = LiveUpdateOps(
        prepare=lambda dev: dev.slot.__setitem__(slice(None), dev.columns["state"]), state_size=8
    )
    assert run(table(library, context)) == run(python)
    assert context.counts() == {"PREPARE": 10_000}


# ---- several threads ----


def wide(n=4096):
    """A machine with *n* devices on 16 bridges: two depths."""
    from luo.machine import DeviceTree, Machine

    tree = DeviceTree()
    tree.add_many(("bridge", 0, 16), [-1] * 16, "pci", "portdrv")
    state = np.arange(n, dtype=np.uint64).view(np.uint8).reshape(-1, 8)
    tree.add_many(("dev", 0, n), [i % 16 for i in range(n)], "pci", "nic", state=state)
    return Machine("64MiB", tree)


def threaded(library, context, machine, workers, **more):
    """A kernel that calls the native callbacks of *machine* from so many threads."""
    ops = table(library, context, **more)
    ops = LiveUpdateOps(
        **{
            name: getattr(ops, name)
            for name in ("prepare", "reboot", "cancel", "finish", "restore")
        },
        state_size=8,
        thread_safe=True,
    )
    return kernel_of(machine, ops, workers=workers)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_leave_what_one_leaves(workers, library, context):
    """The same slots, every device once, every call timed, and everything restored."""
    machine, after = wide(), Context(fail_at=-1)
    kernel = threaded(library, context, machine, workers).boot()
    kernel.devices.request("*")
    kernel = updated(kernel, threaded(library, after, machine, workers))
    result = kernel.luo.finish()

    assert context.counts() == {"PREPARE": 4096, "REBOOT": 4096}
    assert after.counts() == {"RESTORE": 4096, "FINISH": 4096}
    assert (result.unreclaimed, result.failures) == ((), ())
    rows = {(row["event"], row["name"]): row["calls"] for row in kernel.profile.rows()}
    assert rows["RESTORE", "nic"] == rows["FINISH", "nic"] == 4096


@pytest.mark.parametrize("place", [0, 1000, 2047, 2048, 4095])
def test_workers_raise_the_first_failure_in_order(place, library, context):
    """All before it have run, and whoever ran is cancelled once: the others never were prepared."""
    kernel = threaded(library, context, wide(), 2).boot()
    kernel.devices.request("*")
    context.fail_at, context.rc = 16 + place, -errno.EBUSY
    with pytest.raises(CallbackError, match="PREPARE driver nic") as error:
        kernel.luo.prepare()
    counts = context.counts()

    assert error.value.device == kernel.devices.tree.path(16 + place)
    assert error.value.rolled_back
    assert counts["PREPARE"] > place
    assert counts.get("CANCEL", 0) == counts["PREPARE"] - 1  # who fails is not cancelled
    assert kernel.luo.state is State.NORMAL
    assert not kernel.devices.preserved.any()


def test_workers_of_two_failures_raise_the_earlier(library):
    """Both threads fail; the device that comes first in order is named."""
    first, second = (
        Context(fail_at=16 + 5, rc=-errno.EIO),
        Context(fail_at=16 + 4000, rc=-errno.EPERM),
    )
    machine = wide()
    machine.devices.add("extra", "bridge0", "pci", "other", state=bytes(8))
    none = LiveUpdateOps()
    make = lambda context: LiveUpdateOps(  # noqa: E731
        prepare=native(library.tally, ctypes.pointer(context)), thread_safe=True
    )
    kernel = plain_kernel(
        machine,
        {"nic": make(first), "other": make(second), "portdrv": none},
        {"pci": make(second)},
        workers=2,
    ).boot()
    kernel.devices.request("*")
    with pytest.raises(CallbackError) as error:
        kernel.luo.prepare()

    assert (error.value.device, error.value.errno) == ("bridge5/dev5", errno.EIO)


def test_workers_collect_failures_in_order(library, context):
    """FINISH has no way back: what fails is listed, the rest runs."""
    machine = wide()
    kernel = threaded(library, Context(fail_at=-1), machine, 2).boot()
    kernel.devices.request("*")
    kernel = updated(kernel, threaded(library, context, machine, 2))
    context.fail_at, context.rc = 16 + 3000, -errno.EIO
    (failure,) = kernel.luo.finish().failures

    assert failure.device == kernel.devices.tree.path(16 + 3000)
    assert context.counts()["FINISH"] == 4096


def test_workers_leave_what_is_not_thread_safe_alone(library, context):
    """Python callbacks, batches and natives that do not say so are called by one thread."""
    import threading

    seen = set()
    ops = LiveUpdateOps(prepare=lambda dev: seen.add(threading.get_ident()))
    kernel = kernel_of(wide(), ops, workers=4).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()
    other = kernel_of(wide(), table(library, context), workers=4).boot()
    other.devices.request("*")
    other.luo.prepare()

    assert seen == {threading.get_ident()}
    assert context.counts() == {"PREPARE": 4096}
