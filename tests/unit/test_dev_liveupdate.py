"""The devices in a live update: order, batches, slots, records, and the next kernel's side."""

import errno
import itertools

import numpy as np
import pytest
from rig import (
    Log,
    content,
    errno_of,
    forest,
    leave,
    plain_kernel,
    settled,
    small_kernel,
    small_machine,
    snapshot,
    updated,
)

from luo.device import Bus, Driver, LiveUpdateOps, batch
from luo.errors import CallbackError, KhoError
from luo.kernel import Kernel
from luo.liveupdate import Event, State, Subsystem
from luo.machine import Machine
from luo.memory import PhysicalMemory

OPS = LiveUpdateOps()
NIC0, NIC1, DISK, PORT = "pci0/port/nic0", "pci0/port/nic1", "pci0/disk", "pci0/port"


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def machine():
    return small_machine()


def owners(calls):
    """(kind, path) of each call to a driver or bus."""
    return [(kind, device) for _, kind, _, device in calls if kind != "subsystem"]


def both(*paths):
    """Driver then bus of each of *paths*."""
    return [(kind, path) for path in paths for kind in ("driver", "bus")]


# ---- order ----


@pytest.mark.parametrize(
    ("requested", "order"),
    [
        ("*", [NIC0, NIC1, PORT, DISK]),
        (NIC1, [NIC1, PORT]),
        (PORT, [PORT]),
        (DISK, [DISK]),
        ("pci0", []),
        ("*nic*", [NIC0, NIC1, PORT]),
        ([4, 3], [NIC1, PORT, DISK]),
    ],
    ids=str,
)
def test_prepare_calls_children_first_driver_then_bus(requested, order, log, machine):
    """Requested devices and their ancestors, deepest first; of each the driver, then the bus."""
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request(requested)
    kernel.luo.prepare()

    assert owners(log.of("PREPARE")) == both(*order)
    above = {"pci0", *order} if order or requested == "pci0" else set(order)
    assert {device.path for device in kernel.devices if device.preserved} == above


def test_events_order_of_the_devices(log, machine):
    """REBOOT and FINISH go as PREPARE, CANCEL and RESTORE exactly the other way."""
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()
    kernel.luo.cancel()
    kernel.luo.prepare()
    kernel = updated(kernel, small_kernel(machine, log))
    kernel.luo.finish()
    forward = both(NIC0, NIC1, PORT, DISK)

    assert owners(log.of("PREPARE")) == forward * 2
    assert owners(log.of("REBOOT")) == forward
    assert owners(log.of("FINISH")) == forward
    assert owners(log.of("CANCEL")) == forward[::-1]
    assert owners(log.of("RESTORE")) == forward[::-1]


def test_flags_after_each_event(log, machine):
    """preserved from PREPARE to FINISH, reclaimed from RESTORE to FINISH."""

    def flags(kernel):
        devices = kernel.devices
        return [
            "".join("01"[int(flag)] for flag in column)
            for column in (devices.requested, devices.preserved, devices.reclaimed)
        ]

    kernel = small_kernel(machine, log).boot()
    kernel.devices.request([2])
    seen = [flags(kernel)]
    kernel.luo.prepare()
    seen.append(flags(kernel))
    kernel.luo.cancel()
    seen.append(flags(kernel))
    kernel.luo.prepare()
    kernel.luo.reboot()
    seen.append(flags(kernel))
    kernel.luo.cancel()
    kernel = updated(kernel, small_kernel(machine, log))
    seen.append(flags(kernel))
    kernel.luo.finish()
    seen.append(flags(kernel))
    none, kept = "00000", "11100"

    assert seen == [
        ["00100", none, none],
        ["00100", kept, none],
        ["00100", none, none],
        ["00100", kept, none],
        [none, kept, kept],
        [none, none, none],
    ]


def test_bus_failure_in_prepare_cancels_that_driver_first(log, machine):
    """The bus fails: the device's driver is cancelled, then those before, in reverse."""
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    log.faults["PREPARE", "bus", "pci", PORT] = -errno.EIO
    assert errno_of(kernel.luo.prepare) == errno.EIO

    done = [*both(NIC0, NIC1), ("driver", PORT)]
    assert owners(log.of("PREPARE")) == [*done, ("bus", PORT)]
    assert owners(log.of("CANCEL")) == done[::-1]


def test_driver_failure_in_prepare_gives_that_device_nothing(log, machine):
    """The driver fails: neither it nor its bus is called again; those before are cancelled."""
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    log.faults["PREPARE", "driver", "portdrv", PORT] = -errno.EIO
    assert errno_of(kernel.luo.prepare) == errno.EIO

    assert owners(log.of("PREPARE")) == [*both(NIC0, NIC1), ("driver", PORT)]
    assert owners(log.of("CANCEL")) == both(NIC0, NIC1)[::-1]


@pytest.mark.parametrize("kind", ["driver", "bus"])
def test_reboot_failure_cancels_every_prepared_device(kind, log, machine):
    """REBOOT fails in the middle: all that were prepared are cancelled (quirk 7)."""
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    before = snapshot(kernel)
    kernel.luo.prepare()
    log.faults["REBOOT", kind, "portdrv" if kind == "driver" else "pci", PORT] = -errno.EIO
    assert errno_of(kernel.luo.reboot) == errno.EIO

    assert owners(log.of("CANCEL")) == both(NIC0, NIC1, PORT, DISK)[::-1]
    assert snapshot(kernel) == before


def test_callbacks_are_all_optional(log, machine):
    """Only the table must exist; who has one callback is called for that one."""
    drivers = {
        "nic": log.ops("driver", "nic", events=["reboot"]),
        "nvme": log.ops("driver", "nvme", events=["cancel"]),
        "portdrv": OPS,
    }
    kernel = plain_kernel(
        machine, drivers, {"pci": log.ops("bus", "pci", events=["finish"])}
    ).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()
    kernel.luo.reboot()
    kernel.luo.cancel()

    assert owners(log.of("REBOOT")) == [("driver", NIC0), ("driver", NIC1)]
    assert owners(log.of("CANCEL")) == [("driver", DISK)]
    assert log.of("PREPARE") == []
    log.clear()
    kernel = updated(
        kernel, plain_kernel(machine, drivers, {"pci": log.ops("bus", "pci", events=["finish"])})
    )
    kernel.luo.finish()
    assert owners(log.of("FINISH")) == [("bus", path) for path in (NIC0, NIC1, PORT, DISK)]


def test_prepare_rechecks_that_requested_devices_are_eligible(log, machine):
    """A device whose driver was exchanged since the request fails PREPARE (quirk 12)."""
    drivers = {"nic": OPS, "nvme": OPS, "portdrv": OPS, "dumb": None}
    kernel = plain_kernel(machine, drivers, {"pci": OPS}).boot()
    kernel.devices.request([2])
    kernel.devices[NIC0].unbind()
    kernel.devices[NIC0].bind("dumb")
    before = snapshot(kernel)
    with pytest.raises(KhoError, match="dumb") as caught:
        kernel.luo.prepare()

    assert caught.value.errno == errno.EINVAL
    assert snapshot(kernel) == before
    kernel.devices[NIC0].requested = False
    kernel.luo.prepare()
    assert not kernel.devices.preserved.any()


def test_prepare_passes_over_a_requested_device_that_was_unplugged(log, machine):
    """What is not there any more is not prepared, nor are its ancestors for its sake."""
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request([2, 4])
    machine.devices.remove(PORT)
    kernel.luo.prepare()

    assert owners(log.of("PREPARE")) == both(DISK)


def test_prepare_of_nothing_is_an_update_of_no_devices(log, machine):
    """Without a request the subsystems are still updated."""
    kernel = small_kernel(machine, log).boot()
    before = snapshot(kernel)
    kernel.luo.prepare()
    kernel.luo.cancel()

    assert snapshot(kernel) == before
    kernel = updated(kernel, small_kernel(machine, log))
    assert kernel.luo.state is State.UPDATED
    assert kernel.luo.finish().unreclaimed == ()
    assert log.calls == []


# ---- batches ----

WIDE = {
    "root": (None, None),
    **{f"root/a{number}": ("pci", "one" if number % 2 else "two") for number in range(6)},
    "root/a0/x": ("pci", "one"),
    "root/a1/y": ("usb", "one"),
    "root/a2/z": ("pci", "one"),
}


def wide(**drivers):
    """A kernel for :data:`WIDE` with tables for its two drivers."""
    tables = {"one": OPS, "two": OPS} | drivers
    buses = {name: tables.pop(name, OPS) for name in ("pci", "usb")}
    kernel = plain_kernel(Machine("64MiB", forest(WIDE)), tables, buses).boot()
    kernel.devices.request("*")
    return kernel


def collector(runs, result=None):
    """A batch callback that notes the paths of each run."""

    def work(devices):
        runs.append([device.path for device in devices])
        return result(devices) if callable(result) else result

    return batch(work)


def test_batch_is_called_once_a_run():
    """A run: devices of one depth, driver, bus and size, brought together within their depth."""
    runs = []
    kernel = wide(one=LiveUpdateOps(prepare=collector(runs), cancel=collector(runs)))
    kernel.luo.prepare()
    expected = [
        ["root/a0/x", "root/a2/z"],
        ["root/a1/y"],
        ["root/a1", "root/a3", "root/a5"],
    ]

    assert runs == expected
    runs.clear()
    kernel.luo.cancel()
    assert runs == expected[::-1]


def test_batch_runs_are_cut_by_slot_size():
    """Slots of a run are one array, so devices of another size are another run."""
    runs = []

    def size(devices):
        return [24 if device.name in ("a1", "a5", "x") else 8 for device in devices]

    kernel = wide(one=LiveUpdateOps(prepare=collector(runs), state_size=batch(size)))
    kernel.luo.prepare()

    assert runs == [
        ["root/a0/x"],
        ["root/a1/y"],
        ["root/a2/z"],
        ["root/a1", "root/a5"],
        ["root/a3"],
    ]


def test_batch_gets_index_slots_and_columns():
    """A batch has the numbers, one writable array of slots, and columns of its devices."""
    seen = []

    def save(devices):
        seen.append((devices.index.copy(), devices.slots.shape, len(devices)))
        devices.column("state", devices.slots)
        assert (devices.sizes("state") == devices.slots.shape[1]).all()
        assert devices.column("state").tobytes() == devices.slots.tobytes()
        assert devices.kernel is kernel

    kernel = wide(
        one=LiveUpdateOps(prepare=batch(save), state_size=batch(lambda d: d.sizes("state")))
    )
    kernel.luo.prepare()

    assert [shape for _, shape, _ in seen] == [(2, 9), (1, 9), (3, 7)]
    for device in kernel.devices:
        expected = device.path.encode() if device.driver and device.driver.name == "one" else b""
        assert bytes(device.slot) == expected


def test_batch_of_a_bus_gets_the_bus_slots():
    """A bus's batch has the bus's slots, of devices with different drivers too."""
    seen = []

    def save(devices):
        seen.append((len(devices), devices.slots.shape))
        devices.slots[:] = devices.index[:, None]

    kernel = wide(
        one=LiveUpdateOps(state_size=5), pci=LiveUpdateOps(prepare=batch(save), state_size=3)
    )
    kernel.luo.prepare()

    assert sum(count for count, _ in seen) == 8
    assert {shape[1] for _, shape in seen} == {3}
    for device in kernel.devices:
        on_pci = device.bus is not None and device.bus.name == "pci"
        assert bytes(device.bus_slot) == bytes([device.index] * 3 if on_pci else [])
        assert bytes(device.slot) == bytes(len(device.slot))


@pytest.mark.parametrize(
    "result",
    [
        None,
        0,
        np.int64(0),
        lambda d: np.zeros(len(d), np.int32),
        lambda d: np.zeros(len(d), np.int64),
    ],
    ids=["none", "0", "numpy-0", "int32s", "int64s"],
)
def test_batch_success_of_any_kind(result):
    """None, 0, or a 0 for each device."""
    runs = []
    kernel = wide(
        one=LiveUpdateOps(prepare=collector(runs, result), reboot=collector(runs, result))
    )
    kernel.luo.prepare()

    assert kernel.luo.dry_reboot().failures == ()
    assert len(runs) == 6


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (-errno.EBUSY, errno.EBUSY),
        (errno.EBUSY, errno.EINVAL),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (ValueError("wrong"), errno.EIO),
        ("text", errno.EINVAL),
        ([0, 0, 0], errno.EINVAL),
        (np.zeros(4, np.int32), errno.EINVAL),
        (np.zeros(0, np.int32), errno.EINVAL),
        (np.zeros((3, 1), np.int32), errno.EINVAL),
        (np.full(3, 0.5), errno.EINVAL),
        (np.full(3, np.nan), errno.EINVAL),
        (np.array(["a", "b", "c"]), errno.EINVAL),
        (np.array([None, None, None]), errno.EINVAL),
    ],
    ids=repr,
)
def test_batch_failure_as_a_whole_names_the_first_device(result, code):
    """One bad outcome for a run: nobody of it counts as prepared, the first device is named."""
    undone = []

    def fail(devices):
        if len(devices) != 3:
            return None
        if isinstance(result, Exception):
            raise type(result)(*result.args)  # one that keeps no frame alive
        return result

    kernel = wide(
        one=LiveUpdateOps(prepare=batch(fail), cancel=collector(undone)),
    )
    before = snapshot(kernel)
    with pytest.raises(CallbackError) as caught:
        kernel.luo.prepare()
    error = caught.value

    assert (error.errno, error.kind, error.name, error.device) == (code, "driver", "one", "root/a1")
    assert undone == [["root/a1/y"], ["root/a0/x", "root/a2/z"]]
    assert snapshot(kernel) == before


@pytest.mark.parametrize("event", ["prepare", "reboot"])
def test_batch_partial_failure_cancels_the_others_of_the_run(event):
    """One result a device: the first bad one is named, PREPARE's good ones are cancelled."""
    undone = []

    def fail(devices):
        if len(devices) != 3:
            return None
        return np.array([0, -errno.ENOSPC, -errno.EBUSY], np.int32)

    table = {"prepare": None, event: batch(fail), "cancel": collector(undone)}
    kernel = wide(one=LiveUpdateOps(**table))
    before = snapshot(kernel)
    with pytest.raises(CallbackError) as caught:
        (kernel.luo.prepare(), kernel.luo.reboot())

    assert (caught.value.errno, caught.value.device) == (errno.ENOSPC, "root/a3")
    first = ["root/a1"] if event == "prepare" else ["root/a1", "root/a3", "root/a5"]
    assert undone == [first, ["root/a1/y"], ["root/a0/x", "root/a2/z"]]
    assert snapshot(kernel) == before


def test_batch_partial_failure_in_the_middle_cuts_the_cancelled_run():
    """The cancelled devices of a run around a failed one come as two runs."""
    undone = []

    def fail(devices):
        return np.array([0, -errno.EIO, 0], np.int32) if len(devices) == 3 else None

    kernel = wide(one=LiveUpdateOps(prepare=batch(fail), cancel=collector(undone)))
    assert errno_of(kernel.luo.prepare) == errno.EIO

    assert sorted(undone[:2]) == [["root/a1"], ["root/a5"]]
    assert undone[0] == ["root/a5"]
    assert len(undone) == 4


@pytest.mark.parametrize("event", ["cancel", "finish", "restore"])
def test_batch_failures_where_nothing_stops_are_all_collected(event):
    """CANCEL, FINISH and RESTORE name every device of an array that failed."""

    def fail(devices):
        return np.array([-errno.EIO, 0, -errno.EBUSY], np.int32) if len(devices) == 3 else None

    machine = Machine("64MiB", forest(WIDE))
    drivers = {"one": LiveUpdateOps(**{event: batch(fail)}), "two": OPS}
    kernel = plain_kernel(machine, drivers, {"pci": OPS, "usb": OPS}).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()
    if event == "cancel":
        failures = kernel.luo.cancel().failures
    else:
        kernel = updated(kernel, plain_kernel(machine, drivers, {"pci": OPS, "usb": OPS}))
        failures = kernel.restore_failures if event == "restore" else kernel.luo.finish().failures

    assert [(error.errno, error.device, error.event) for error in failures] == [
        (errno.EIO, "root/a1", event.upper()),
        (errno.EBUSY, "root/a5", event.upper()),
    ]


@pytest.mark.parametrize(("driver_batch", "bus_batch"), list(itertools.product([0, 1], repeat=2)))
@pytest.mark.parametrize("stepped", [0, 1], ids=["bulk", "steps"])
def test_batch_and_per_device_do_the_same_work(driver_batch, bus_batch, stepped):
    """Any mixture of forms calls everybody for every event, and the bytes come over."""
    log = Log()
    machine = Machine("64MiB", forest(WIDE))

    def make():
        return plain_kernel(
            machine,
            {
                "one": log.ops("driver", "one", size=20, batched=bool(driver_batch)),
                "two": log.ops("driver", "two", size=9),
            },
            {
                "pci": log.ops("bus", "pci", size=7, batched=bool(bus_batch)),
                "usb": log.ops("bus", "usb"),
            },
        )

    def run(event):
        if stepped:
            for step in kernel.luo.steps(event):
                step.run()
        else:
            {Event.PREPARE: kernel.luo.prepare, Event.CANCEL: kernel.luo.cancel,
             Event.FINISH: kernel.luo.finish}[event]()  # fmt: skip

    kernel = make().boot()
    kernel.devices.request("*")
    before = snapshot(kernel)
    run(Event.PREPARE)
    run(Event.CANCEL)
    assert snapshot(kernel) == before
    run(Event.PREPARE)
    kernel = updated(kernel, make())
    assert kernel.restore_failures == ()
    run(Event.FINISH)

    everybody = sorted(owners(log.of("REBOOT")))
    assert len(everybody) == 2 * (len(WIDE) - 1)
    for event in ("RESTORE", "FINISH", "CANCEL"):
        assert sorted(owners(log.of(event))) == everybody


# ---- sizes of slots ----

SIZES = [0, 1, 7, 8, 9, 63, 4095, 4096, 4097, 100_000, 1 << 20, 0, 3]


def sized(kind, *, how, machine, log):
    """A kernel whose devices have the sizes of :data:`SIZES` on the side *kind*."""

    def of(device):
        return SIZES[int(device.name[1:])]

    def of_batch(devices):
        return np.array([of(device) for device in devices])

    size = {"device": of, "batch": batch(of_batch)}[how]
    sizes = {"driver": size if kind != "bus" else 0, "bus": size if kind != "driver" else 0}
    return plain_kernel(
        machine,
        {"d": log.ops("driver", "d", size=sizes["driver"])},
        {"b": log.ops("bus", "b", size=sizes["bus"])},
    )


def many(n):
    """A tree of *n* devices d0… in a row."""
    return forest({f"d{number}": ("b", "d") for number in range(n)})


@pytest.mark.parametrize("how", ["device", "batch"])
@pytest.mark.parametrize("kind", ["driver", "bus", "both"])
def test_slots_of_varying_sizes_come_over(kind, how, log):
    """Each device has a slot of the size it asked for, its own, and its bytes come over."""
    machine = Machine("64MiB", many(len(SIZES)))
    kernel = sized(kind, how=how, machine=machine, log=log).boot()
    kernel.devices.request("*")
    before = settled(kernel)
    kernel.luo.prepare()
    for device, nbytes in zip(kernel.devices, SIZES, strict=True):
        assert len(device.slot) == (nbytes if kind != "bus" else 0)
        assert len(device.bus_slot) == (nbytes if kind != "driver" else 0)
        assert bytes(device.slot) == content("driver", device.path, len(device.slot))
        assert bytes(device.bus_slot) == content("bus", device.path, len(device.bus_slot))
    kernel.luo.cancel()
    assert snapshot(kernel) == before
    kernel = updated(kernel, sized(kind, how=how, machine=machine, log=log))

    assert kernel.restore_failures == ()
    assert kernel.devices.reclaimed.all()


def test_slots_over_several_slabs_come_over(log):
    """Slots of more than 4 MiB in all lie in several slabs, none across the end of one."""
    mib = 1 << 20
    sizes = [3 * mib, 2 * mib, mib, 4 * mib, 1, 0, 4 * mib - 8, 9, 3 * mib // 2, 0]

    def make():
        return plain_kernel(
            machine,
            {"d": log.ops("driver", "d", size=lambda device: sizes[device.index])},
            {"b": log.ops("bus", "b", size=lambda device: 8 if sizes[device.index] < 9 else 0)},
        )

    machine = Machine("128MiB", many(len(sizes)))
    kernel = make().boot()
    kernel.devices.request("*")
    before = settled(kernel)
    kernel.luo.prepare()
    assert sum(len(device.slot) for device in kernel.devices) == sum(sizes)
    kernel.luo.cancel()
    assert snapshot(kernel) == before
    kernel = updated(kernel, make())

    assert kernel.restore_failures == ()
    assert kernel.luo.finish().unreclaimed == ()


def test_batch_over_several_slabs_gets_runs_that_are_arrays():
    """A batch run ends where its slots leave a slab; all devices are still served."""
    runs = []

    def save(devices):
        runs.append(len(devices))
        devices.slots[:] = devices.index[:, None]

    nbytes, n = 100_000, 100
    machine = Machine("128MiB", many(n))
    table = {"d": LiveUpdateOps(prepare=batch(save), state_size=nbytes)}
    kernel = plain_kernel(machine, table, {"b": OPS}).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()

    assert sum(runs) == n
    assert 1 <= len(runs) <= -(-n * nbytes // (4 << 20)) + 1
    for device in kernel.devices:
        assert bytes(device.slot) == bytes([device.index]) * nbytes


@pytest.mark.parametrize(
    ("driver", "bus", "code"),
    [(4 << 20, 0, None), (0, 4 << 20, None), ((4 << 20) + 1, 0, errno.E2BIG),
     (0, (4 << 20) + 1, errno.E2BIG), ((4 << 20) - 8, 8, None), ((4 << 20) - 7, 8, errno.E2BIG),
     (1 << 40, 0, errno.E2BIG), (2**63, 2**63, errno.E2BIG), (2**64 - 1, 0, errno.E2BIG)],
)  # fmt: skip
def test_slot_above_4_mib_is_e2big(driver, bus, code):
    """What a kernel cannot allocate in one piece is refused, with the device's name."""
    machine = Machine("64MiB", many(3))
    kernel = plain_kernel(
        machine,
        {"d": LiveUpdateOps(state_size=lambda device: driver if device.index == 1 else 0)},
        {"b": LiveUpdateOps(state_size=lambda device: bus if device.index == 1 else 0)},
    ).boot()
    kernel.devices.request("*")
    before = snapshot(kernel) if code else settled(kernel)
    if code is None:
        kernel.luo.prepare()
        assert len(kernel.devices["d1"].slot) == driver
        kernel.luo.cancel()
    else:
        with pytest.raises(KhoError, match="d1") as caught:
            kernel.luo.prepare()
        assert caught.value.errno == code

    assert snapshot(kernel) == before


@pytest.mark.parametrize(
    ("size", "code"),
    [
        (lambda device: -1, errno.EIO),
        (lambda device: "8", errno.EIO),
        (lambda device: 1.5, errno.EIO),
        (lambda device: None, errno.EIO),
        (lambda device: [8, 8], errno.EIO),
        (lambda device: 2**64, errno.EIO),
        (lambda device: 1 // 0, errno.EIO),
        (lambda device: act_enospc(), errno.ENOSPC),
        (batch(lambda devices: np.zeros(len(devices) + 1, np.uint64)), errno.EIO),
        (batch(lambda devices: np.full(len(devices), -1)), errno.EIO),
        (batch(lambda devices: np.zeros(len(devices))), errno.EIO),
        (batch(lambda devices: None), errno.EIO),
    ],
    ids=["negative", "text", "float", "none", "list", "too-large", "raises", "oserror",
         "batch-length", "batch-negative", "batch-float", "batch-none"],
)  # fmt: skip
def test_state_size_failure_is_a_callback_error_of_prepare(size, code):
    """A size that is none, or a callback that raises, names driver and device."""
    kernel = plain_kernel(
        Machine("64MiB", many(3)), {"d": LiveUpdateOps(state_size=size)}, {"b": OPS}
    ).boot()
    kernel.devices.request([1, 2])
    before = snapshot(kernel)
    with pytest.raises(CallbackError) as caught:
        kernel.luo.prepare()
    error = caught.value

    assert (error.errno, error.event, error.kind) == (code, "PREPARE", "driver")
    assert (error.name, error.device) == ("d", "d1")
    assert error.file == __file__
    assert error.rolled_back is True
    assert snapshot(kernel) == before


def act_enospc():
    raise OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize("size", [8, np.int32(8), True, batch(lambda d: 8),
                                  batch(lambda d: np.full(len(d), 8, np.uint8)),
                                  lambda d: np.uint64(8)])  # fmt: skip
def test_state_size_of_every_kind(size):
    """A number, a function of one device, a batch that returns one number or n."""
    expected = 1 if size is True else 8
    kernel = plain_kernel(
        Machine("64MiB", many(3)), {"d": LiveUpdateOps(state_size=size)}, {"b": OPS}
    ).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()

    assert {len(device.slot) for device in kernel.devices} == {expected}


def test_state_size_is_asked_once_a_device():
    """Sizes are asked for in PREPARE and nowhere else, once each."""
    asked = []
    machine = Machine("64MiB", many(4))

    def size(device):
        asked.append(device.path)
        return 8

    def make():
        return plain_kernel(
            machine, {"d": LiveUpdateOps(state_size=size)}, {"b": LiveUpdateOps(cancel=batch(len0))}
        )

    def len0(devices):
        return None

    kernel = make().boot()
    kernel.devices.request([0, 2])
    kernel.kexec_load(make())
    assert asked == []
    kernel.luo.prepare()
    kernel = kernel.kexec()
    kernel.luo.finish()

    assert sorted(asked) == ["d0", "d2"]


# ---- the next kernel ----


def test_restore_without_callback_is_reclaimed_by_the_layer(machine, log):
    """Who has no restore callback, driver or bus, is reclaimed: nobody else would do it."""
    old = plain_kernel(machine, {"nic": OPS, "nvme": OPS, "portdrv": OPS}, {"pci": OPS}).boot()
    old.devices.request("*")
    forgets = LiveUpdateOps(restore=lambda device: None)
    kernel = updated(
        old, plain_kernel(machine, {"nic": forgets, "nvme": OPS, "portdrv": OPS}, {"pci": OPS})
    )

    assert kernel.devices.reclaimed.tolist() == [True, True, False, False, True]
    assert kernel.luo.finish().unreclaimed == (NIC0, NIC1)


def test_restore_that_returns_0_has_not_reclaimed(machine, log):
    """0 says that nothing failed; ``reclaim()`` says that the device runs."""
    later = []
    table = LiveUpdateOps(restore=later.append)
    old = plain_kernel(machine, {"nic": table}, {"pci": OPS}).boot()
    old.devices.request("*nic*")
    kernel = updated(old, plain_kernel(machine, {"nic": table}, {"pci": OPS}))

    assert [device.path for device in later] == [NIC1, NIC0]
    assert not kernel.devices[NIC0].reclaimed
    later[1].reclaim()
    assert kernel.devices[NIC0].reclaimed
    assert kernel.luo.finish().unreclaimed == (NIC1,)


def test_restore_failure_is_collected_and_the_device_unreclaimed(machine, log):
    """A failing restore stops nobody; its device is named as unreclaimed in FINISH."""
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")

    def fail(device):
        raise OSError(errno.EIO, "dead")

    drivers = {
        "nic": LiveUpdateOps(restore=fail),
        "nvme": log.ops("driver", "nvme"),
        "portdrv": log.ops("driver", "portdrv"),
    }
    kernel = updated(kernel, plain_kernel(machine, drivers, {"pci": OPS}))

    assert kernel.luo.state is State.UPDATED
    assert [(error.event, error.device, error.errno) for error in kernel.restore_failures] == [
        ("RESTORE", NIC1, errno.EIO),
        ("RESTORE", NIC0, errno.EIO),
    ]
    assert kernel.devices[DISK].reclaimed
    assert kernel.luo.finish().unreclaimed == (NIC0, NIC1)


def test_restore_order_is_parents_first(machine, log):
    """A bus runs before what is behind it: parents first, bus then driver."""
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    updated(kernel, small_kernel(machine, log))
    paths = [device for _, _, _, device in log.of("RESTORE")]

    assert paths.index(PORT) < paths.index(NIC0)
    assert owners(log.of("RESTORE"))[:2] == [("bus", DISK), ("driver", DISK)]


def test_reclaim_of_what_was_not_preserved_is_einval(machine, log):
    """Only a device that came over, and only until FINISH, can be reclaimed."""
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request([2])
    assert errno_of(kernel.devices[NIC0].reclaim) == errno.EINVAL
    kernel.luo.prepare()
    assert errno_of(kernel.devices[NIC0].reclaim) == errno.EINVAL
    kernel = updated(kernel, small_kernel(machine, log))

    assert errno_of(kernel.devices[DISK].reclaim) == errno.EINVAL
    assert errno_of(kernel.devices.reclaim, np.array([2, 4], np.int32)) == errno.EINVAL
    kernel.devices[NIC0].reclaim()
    kernel.devices.reclaim(np.array([0, 1, 2], np.int32))
    kernel.devices.reclaim(np.zeros(0, np.int32))
    kernel.luo.finish()
    assert errno_of(kernel.devices[NIC0].reclaim) == errno.EINVAL


def test_batch_reclaim_takes_a_mask():
    """A batch reclaims all of its devices, or those that a mask says."""
    machine = Machine("64MiB", many(4))

    def make():
        table = LiveUpdateOps(
            restore=batch(lambda devices: devices.reclaim(devices.index % 2 == 0))
        )
        return plain_kernel(machine, {"d": table}, {"b": OPS})

    kernel = make().boot()
    kernel.devices.request("*")
    kernel = updated(kernel, make())

    assert kernel.devices.reclaimed.tolist() == [True, False, True, False]
    assert kernel.luo.finish().unreclaimed == ("d1", "d3")


def arrive(handover, memory, shape, log, **kwargs):
    """Boot a kernel on the same memory and another set of hardware."""
    return small_kernel(Machine(memory, forest(shape)), log, **kwargs).boot(handover)


def test_records_match_by_path_whatever_the_number(log):
    """Devices are found by path: another order and number of devices does not matter."""
    machine = small_machine()
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    shape = {
        "before": ("pci", "nic"),
        "pci0": (None, None),
        "pci0/disk": ("pci", "nvme"),
        "pci0/new": ("pci", "nic"),
        "pci0/port": ("pci", "portdrv"),
        "pci0/port/nic1": ("pci", "nic"),
        "pci0/port/nic0": ("pci", "nic"),
    }
    kernel = arrive(leave(kernel), machine.memory, shape, log)

    assert kernel.restore_failures == ()
    assert {device.path for device in kernel.devices if device.reclaimed} == {
        "pci0", DISK, PORT, NIC0, NIC1,
    }  # fmt: skip
    assert kernel.boot_result()["records_without_device"] == []


def test_record_whose_device_is_gone_is_reported(log):
    """A device that is not there any more is nobody's fault: named, its memory freed in FINISH."""
    machine = small_machine()
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    shape = {
        "pci0": (None, None),
        "pci0/port": ("pci", "portdrv"),
        "pci0/port/nic1": ("pci", "nic"),
    }
    kernel = arrive(leave(kernel), machine.memory, shape, log)

    assert sorted(kernel.boot_result()["records_without_device"]) == [DISK, NIC0]
    assert kernel.devices.reclaimed.all()
    assert kernel.luo.finish().unreclaimed == ()
    assert kernel.kho.incoming.nr_unrestored == 2  # the root tree and the metadata


def test_device_unplugged_between_prepare_and_jump_is_a_record_without_device(machine, log):
    """A device that goes after PREPARE is missing in the next kernel, and only that one."""
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()
    machine.devices.remove(DISK)
    kernel = updated(kernel, small_kernel(machine, log))

    assert kernel.boot_result()["records_without_device"] == [DISK]
    assert kernel.luo.finish().unreclaimed == ()


@pytest.mark.parametrize("bus", ["usb", None])
def test_record_of_a_device_on_another_bus_is_reported(bus, log):
    """A device of the same path on another bus is another device."""
    machine = small_machine()
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request([2])
    shape = {
        "pci0": (None, None),
        "pci0/port": ("pci", "portdrv"),
        "pci0/port/nic0": (bus, "nic"),
    }
    kernel = arrive(leave(kernel), machine.memory, shape, log)

    assert kernel.boot_result()["records_without_device"] == [NIC0]
    assert kernel.devices.preserved.tolist() == [True, True, False]


def test_record_of_a_device_without_bus_that_has_one_now_is_reported(log):
    """That holds for a device that had no bus before, too."""
    machine = small_machine()
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request([2])
    shape = {
        "pci0": ("pci", None),
        "pci0/port": ("pci", "portdrv"),
        "pci0/port/nic0": ("pci", "nic"),
    }
    kernel = arrive(leave(kernel), machine.memory, shape, log)

    assert kernel.boot_result()["records_without_device"] == ["pci0"]


def test_next_kernel_with_another_driver_gets_the_slot(log):
    """Records match by path and bus: the driver may be another one, or missing."""
    machine = small_machine()
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    seen = {}

    def restore(device):
        seen[device.path] = bytes(device.slot)
        device.reclaim()

    kernel = updated(
        kernel, plain_kernel(machine, {"nic": LiveUpdateOps(restore=restore)}, {"pci": OPS})
    )

    assert seen.keys() == {NIC0, NIC1}
    assert seen[NIC0][1:] == content("driver", NIC0, 24)[1:]
    assert kernel.devices[DISK].driver is None
    assert len(kernel.devices[DISK].slot) == 40
    gone = [PORT, DISK]  # nobody has restored these
    assert kernel.devices.reclaimed.tolist() == [True, False, True, True, False]
    assert kernel.luo.finish().unreclaimed == tuple(gone)


def test_slots_in_finish_are_still_there(machine, log):
    """FINISH callbacks still read their slots; after it they are gone and freed."""
    seen = {}
    log.hooks["FINISH", "driver", "nic", NIC0] = lambda device: seen.update(
        slot=bytes(device.slot), reclaimed=device.reclaimed
    )
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    kernel = updated(kernel, small_kernel(machine, log))
    now = bytes(kernel.devices[NIC0].slot)
    kernel.luo.finish()

    assert seen == {"slot": now, "reclaimed": True}
    assert errno_of(lambda: kernel.devices[NIC0].slot) == errno.EINVAL
    assert kernel.kho.incoming.nr_unrestored == 2


def test_fresh_mapping_of_the_memory_finds_the_same(log):
    """A kernel on another mapping of the same memory restores all: nothing is kept in Python."""
    machine = small_machine()
    kernel = small_kernel(machine, log).boot()
    kernel.devices.request("*")
    handover = leave(kernel)
    memory = machine.memory
    mapped = PhysicalMemory(fd=memory.fd, ranges=memory.ranges)
    kernel = small_kernel(Machine(mapped, machine.devices), log).boot(handover)

    assert kernel.restore_failures == ()
    assert kernel.devices.reclaimed.all()


def test_driver_names_that_occur_once_or_never(log):
    """Records carry the names of driver and bus, or that there is none."""
    shape = {"a": (None, None), "b": ("pci", None), "c": (None, "nic"), "d": ("usb", "nic")}
    machine = Machine("64MiB", forest(shape))

    def make():
        return plain_kernel(
            machine, {"nic": log.ops("driver", "nic", size=8)}, {"pci": OPS, "usb": OPS}
        )

    kernel = make().boot()
    kernel.devices.request("*")
    kernel = updated(kernel, make())

    assert kernel.devices.reclaimed.all()
    assert kernel.boot_result()["records_without_device"] == []


def test_records_over_several_shards_come_over():
    """30,000 devices with long paths have records of more than 4 MiB, in several shards."""
    n = 30_000
    machine = Machine("128MiB")
    tree = machine.devices
    tree.add("r" * 100)
    tree.add_many(("device-with-a-rather-long-name-", 0, n), np.zeros(n, np.int32), "b", "d")

    def save(devices):
        devices.slots[:] = devices.index.view(np.uint8).reshape(-1, 4)

    def check(devices):
        same = (devices.slots == devices.index.view(np.uint8).reshape(-1, 4)).all(axis=1)
        devices.reclaim(same)
        return np.where(same, 0, -errno.EIO).astype(np.int32)

    def make():
        table = LiveUpdateOps(prepare=batch(save), restore=batch(check), state_size=4)
        return plain_kernel(machine, {"d": table}, {"b": OPS})

    kernel = make().boot()
    kernel.devices.request("*")
    kernel = updated(kernel, make())

    assert kernel.arrival.departure.image["device_tree_bytes"] > 4 << 20
    assert kernel.restore_failures == ()
    assert int(kernel.devices.reclaimed.sum()) == n + 1
    assert kernel.luo.finish().unreclaimed == ()


def test_subsystem_and_devices_share_one_rollback(machine, log):
    """A subsystem after the devices that fails takes the devices' slots and records back."""
    kernel = small_kernel(machine, log, [Subsystem("zz", priority=2, prepare=lambda c: -5)]).boot()
    kernel.devices.request("*")
    before = snapshot(kernel)
    assert errno_of(kernel.luo.prepare) == 5

    assert snapshot(kernel) == before
    assert owners(log.of("CANCEL")) == both(NIC0, NIC1, PORT, DISK)[::-1]


def test_driver_and_bus_of_the_same_name_are_told_apart():
    """kind says whether it was the driver or the bus."""
    tree = forest({"x": ("same", "same")})
    for kind in ("driver", "bus"):
        fail = LiveUpdateOps(prepare=lambda device: -errno.EIO)
        kernel = Kernel(
            Machine("64MiB", tree),
            drivers=[Driver("same", fail if kind == "driver" else OPS)],
            buses=[Bus("same", fail if kind == "bus" else OPS)],
        ).boot()
        kernel.devices.request("*")
        with pytest.raises(CallbackError) as caught:
            kernel.luo.prepare()

        assert (caught.value.kind, caught.value.name) == (kind, "same")
