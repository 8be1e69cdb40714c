"""A kernel's view of its devices: flags, requests, binding, probe and shutdown."""

import errno
import logging

import numpy as np
import pytest
from rig import Log, errno_of, forest, plain_kernel, small_kernel, small_machine, updated

from luo.device import Bus, Device, Driver, LiveUpdateOps, batch
from luo.errors import KhoError, StateError
from luo.kernel import Kernel, KernelImage
from luo.liveupdate import State, Subsystem
from luo.machine import Machine

OPS = LiveUpdateOps()
NIC0, DISK, PORT = "pci0/port/nic0", "pci0/disk", "pci0/port"


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def machine():
    return small_machine()


@pytest.fixture
def kernel(machine, log):
    return small_kernel(machine, log).boot()


def kernel_with(drivers=None, buses=None, **kwargs):
    """A running kernel on the small machine; tables by name, all of them unless given."""
    drivers = {"portdrv": OPS, "nic": OPS, "nvme": OPS} | (drivers or {})
    return plain_kernel(small_machine(), drivers, {"pci": OPS} | (buses or {}), **kwargs).boot()


# ---- a view ----


def test_device_shows_what_the_hardware_is(kernel):
    """A view looks everything up: name, path, parent, bus, driver, columns."""
    nic = kernel.devices[NIC0]

    assert (nic.name, nic.path, nic.index) == ("nic0", NIC0, 2)
    assert nic.parent.path == PORT
    assert kernel.devices["pci0"].parent is None
    assert (nic.bus.name, nic.driver.name) == ("pci", "nic")
    assert (kernel.devices["pci0"].bus, kernel.devices["pci0"].driver) == (None, None)
    assert nic.columns == {"state": NIC0.encode()}
    assert nic.kernel is kernel
    assert nic.kho is kernel.kho
    assert nic.memory is kernel.memory
    assert (nic.requested, nic.preserved, nic.reclaimed) == (False, False, False)


def test_device_views_of_the_same_device_are_equal(machine, log):
    """Equality and hash are those of kernel and number."""
    kernel = small_kernel(machine, log).boot()
    other = small_kernel(small_machine(), log).boot()

    assert kernel.devices[NIC0] == kernel.devices[2]
    assert hash(kernel.devices[NIC0]) == hash(kernel.devices[2])
    assert kernel.devices[NIC0] != kernel.devices[DISK]
    assert kernel.devices[NIC0] != other.devices[NIC0]


def test_devices_is_a_collection(kernel):
    """len() counts, iteration yields views, [] takes a path or a number."""
    assert len(kernel.devices) == 5
    assert [device.index for device in kernel.devices] == [0, 1, 2, 3, 4]
    assert all(type(device) is Device for device in kernel.devices)
    with pytest.raises(KeyError):
        kernel.devices["pci0/nothing"]
    for number in (-1, 5, 1000):
        assert errno_of(lambda n=number: kernel.devices[n]) == errno.ENOENT


def test_devices_removed_is_gone(kernel, machine):
    """A device that was unplugged is in no list and cannot be looked up."""
    machine.devices.remove(PORT)

    assert [device.path for device in kernel.devices] == ["pci0", DISK]
    assert errno_of(lambda: kernel.devices[2]) == errno.ENOENT
    assert errno_of(kernel.devices.request, [2]) in (errno.ENOENT, errno.EINVAL)
    assert kernel.devices.request("*") == 2


def test_device_slot_outside_an_update_is_einval(kernel):
    """Slots exist from PREPARE to FINISH."""
    kernel.devices.request([2])
    nic = kernel.devices[NIC0]

    assert errno_of(lambda: nic.slot) == errno.EINVAL
    kernel.luo.prepare()
    assert (len(nic.slot), len(nic.bus_slot)) == (24, 8)
    assert len(kernel.devices[DISK].slot) == 0
    kernel.luo.cancel()
    assert errno_of(lambda: nic.bus_slot) == errno.EINVAL


def test_kernel_driver_that_it_lacks_leaves_the_device_unbound():
    """A driver that only the hardware names is not bound; a bus without an object has no table."""
    kernel = plain_kernel(small_machine(), {"nic": OPS}, {}).boot()

    assert kernel.devices[NIC0].driver.name == "nic"
    assert kernel.devices[DISK].driver is None
    assert kernel.devices[DISK].bus == Bus("pci", None)


def test_kernel_two_drivers_of_one_name_is_value_error():
    """Names are unique in a kernel."""
    with pytest.raises(ValueError, match="nic"):
        Kernel(small_machine(), drivers=[Driver("nic"), Driver("nic")])
    with pytest.raises(ValueError, match="pci"):
        Kernel(small_machine(), buses=[Bus("pci"), Bus("pci")])


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"prepare": 3}, TypeError),
        ({"restore": "f"}, TypeError),
        ({"state_size": -1}, ValueError),
        ({"state_size": "8"}, TypeError),
        ({"state_size": 1.5}, TypeError),
    ],
)
def test_ops_wrong_field_is_refused(fields, error):
    """A table with a callback that cannot be called, or a size that is none, is refused at once."""
    with pytest.raises(error):
        LiveUpdateOps(**fields)


def test_batch_of_no_function_is_type_error():
    """batch() marks something callable."""
    with pytest.raises(TypeError):
        batch(3)


# ---- requested ----


def test_requested_is_written_and_read(kernel):
    """The flag is the device's own; ancestors' flags stay."""
    nic = kernel.devices[NIC0]
    nic.requested = True

    assert nic.requested is True
    assert [device.path for device in kernel.devices if device.requested] == [NIC0]
    nic.requested = False
    assert not kernel.devices.requested.any()


@pytest.mark.parametrize("state", [State.PREPARED, State.UPDATED])
def test_requested_outside_normal_is_einval(state, kernel, machine, log):
    """A change needs NORMAL."""
    kernel.devices.request([2])
    kernel.luo.prepare()
    if state is State.UPDATED:
        kernel = updated(kernel, small_kernel(machine, log))
    device = kernel.devices[DISK]

    assert errno_of(setattr, device, "requested", True) == errno.EINVAL
    assert errno_of(kernel.devices.request, "*") == errno.EINVAL
    assert errno_of(kernel.devices.request, [4]) == errno.EINVAL
    assert not device.requested


NOT_ELIGIBLE = [
    pytest.param({"nic": None}, {}, NIC0, "driver nic of pci0/port/nic0", id="own driver"),
    pytest.param({"portdrv": None}, {}, NIC0, "driver portdrv of pci0/port", id="parent's driver"),
    pytest.param({}, {"pci": None}, NIC0, "bus pci of pci0/port/nic0", id="bus"),
]


@pytest.mark.parametrize(("drivers", "buses", "path", "why"), NOT_ELIGIBLE)
def test_requested_not_eligible_is_einval_and_says_why(drivers, buses, path, why):
    """A driver or bus without a table, on the device or above it, keeps it from being requested."""
    kernel = kernel_with(drivers, buses, quirks=["all-ancestors"])
    with pytest.raises(KhoError, match=why) as caught:
        kernel.devices[path].requested = True

    assert caught.value.errno == errno.EINVAL
    assert not kernel.devices.requested.any()
    assert errno_of(kernel.devices.request, [2]) == errno.EINVAL


@pytest.mark.parametrize(("drivers", "buses", "path", "why"), NOT_ELIGIBLE)
def test_request_glob_takes_the_eligible_ones(drivers, buses, path, why):
    """A glob takes of what it matches those that support live update."""
    kernel = kernel_with(drivers, buses, quirks=["all-ancestors"])
    kernel.devices.request("*")

    assert kernel.devices.requested.tolist() == kernel.devices.eligible().tolist()
    assert not kernel.devices[path].requested


def test_eligible_passes_nodes_without_driver_and_bus():
    """A node with neither passes; a device without driver passes if its bus has a table.

    What is above a device counts only under the quirk.
    """
    tree = forest(
        {
            "root": (None, None),
            "root/unbound": ("pci", None),
            "root/unbound/child": ("pci", "good"),
            "root/alien": ("pci", "unknown"),
            "root/nobus": (None, "good"),
            "root/bad": ("pci", "bad"),
            "root/bad/child": (None, None),
            "root/other": ("usb", None),
        }
    )
    machine = Machine("16MiB", tree)
    drivers, buses = {"good": OPS, "bad": None}, {"pci": OPS}
    announced = plain_kernel(machine, drivers, buses)
    coded = plain_kernel(machine, drivers, buses, quirks=["all-ancestors"])
    expected = [True, True, True, True, True, False, True, False]

    assert announced.devices.eligible().tolist() == expected
    expected[6] = False  # root/bad is above it
    assert coded.devices.eligible().tolist() == expected


def test_prepare_leaves_ancestors_without_support_alone():
    """A device is kept with those of its ancestors that support live update."""
    kernel = kernel_with({"portdrv": None})
    kernel.devices[NIC0].requested = True
    kernel.luo.prepare()

    assert kernel.devices.preserved.tolist() == [True, False, True, False, False]


def test_requested_of_an_ancestor_does_not_exclude_it(kernel):
    """An ancestor is kept while a child is requested, whatever its own flag says."""
    kernel.devices[NIC0].requested = True
    kernel.devices[PORT].requested = True
    kernel.devices[PORT].requested = False
    kernel.luo.prepare()

    assert kernel.devices[PORT].preserved is True
    assert kernel.devices[PORT].requested is False


def test_requested_survives_prepare_and_cancel_but_not_the_jump(kernel, machine, log):
    """The flag is this kernel's: events leave it, and the next kernel starts without."""
    kernel.devices.request([2, 4])
    expected = kernel.devices.requested.tolist()
    kernel.luo.prepare()
    kernel.luo.cancel()

    assert kernel.devices.requested.tolist() == expected
    kernel = updated(kernel, small_kernel(machine, log))
    assert not kernel.devices.requested.any()
    kernel.luo.finish()
    kernel.devices.request("*")
    assert kernel.devices.requested.all()


# ---- request in bulk ----


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("*", [0, 1, 2, 3, 4]),
        ("pci0/port/*", [2, 3]),
        ("*nic?", [2, 3]),
        ("pci0", [0]),
        ("nothing", []),
        ([4, 0], [0, 4]),
        ([], []),
        (np.array([2], np.int32), [2]),
        (np.array([2, 2], np.uint64), [2]),
        (range(1, 4), [1, 2, 3]),
        (np.array([0, 1, 0, 0, 1], np.bool_), [1, 4]),
        ([False, False, True, False, False], [2]),
        (np.zeros(5, np.bool_), []),
    ],
    ids=repr,
)
def test_request_by_glob_mask_or_numbers(which, expected, kernel):
    """All three say which devices, and the number that changed comes back."""
    assert kernel.devices.request(which) == len(expected)
    assert np.flatnonzero(kernel.devices.requested).tolist() == expected
    assert kernel.devices.request(which) == 0
    assert kernel.devices.request(which, on=False) == len(expected)
    assert not kernel.devices.requested.any()


def test_request_takes_paths(kernel):
    """A list of paths is a list of devices; any iterable that an array is made of."""
    assert kernel.devices.request([NIC0, DISK]) == 2
    assert kernel.devices.request((NIC0,), False) == 1
    assert kernel.devices.requested.tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("value", ["0", 2, -1, None, "yes"])
def test_requested_takes_only_true_and_false(value, kernel):
    """Anything else is a mistake of the caller, not a request."""
    with pytest.raises(ValueError, match="neither True nor False"):
        kernel.devices[NIC0].requested = value

    assert not kernel.devices.requested.any()


@pytest.mark.parametrize("cmdline", ["kho=on", "liveupdate=on", ""])
def test_request_with_live_update_off_is_eopnotsupp(cmdline):
    """There is no file to write, and no event that would look at it."""
    kernel = kernel_with(cmdline=cmdline)

    assert errno_of(kernel.devices.request, "*") == errno.EOPNOTSUPP
    assert errno_of(kernel.devices.request_one, 2, True) == errno.EOPNOTSUPP


def test_close_from_a_callback_ends_the_event_with_eshutdown():
    """As a power cut would: whatever is asked of the kernel afterwards says that it is gone."""
    ops = LiveUpdateOps(prepare=lambda dev: dev.kernel.close())
    kernel = kernel_with({"nic": ops})
    kernel.devices.request([2])
    with pytest.raises(StateError) as caught:
        kernel.luo.prepare()

    assert caught.value.errno == errno.ESHUTDOWN
    assert errno_of(lambda: kernel.luo.state) == errno.ESHUTDOWN


@pytest.mark.parametrize(
    "make",
    [
        lambda: Driver(None),
        lambda: Driver("x", 5),
        lambda: Driver("x", probe=5),
        lambda: Bus(None),
        lambda: Bus("x", "ops"),
        lambda: Kernel(None),
        lambda: Kernel(small_machine(), cmdline=None),
        lambda: Kernel(small_machine(), drivers=[None]),
        lambda: Kernel(small_machine(), quirks=[5]),
        lambda: KernelImage(None),
        lambda: KernelImage("a:b", args=5),
        lambda: Subsystem(None),
        lambda: Kernel(small_machine()).luo.register(None),
    ],
)
def test_wrong_types_are_type_errors(make):
    """The caller's mistake is told at once, and by name."""
    with pytest.raises(TypeError):
        make()


@pytest.mark.parametrize(
    ("which", "error"),
    [
        ([5], KhoError),
        ([-1], KhoError),
        ([0, 2**40], KhoError),
        (np.ones(4, np.bool_), ValueError),
        (np.ones((5, 1), np.bool_), ValueError),
        ([1.5], TypeError),
        (["pci0", "pci9"], KhoError),
        (["pci0", None], TypeError),
    ],
    ids=repr,
)
def test_request_wrong_argument_changes_nothing(which, error, kernel):
    """A number of no device is ENOENT, a mask of another shape a ValueError, the rest TypeError."""
    with pytest.raises(error) as caught:
        kernel.devices.request(which)

    assert getattr(caught.value, "errno", errno.ENOENT) == errno.ENOENT
    assert not kernel.devices.requested.any()


def test_request_one_not_eligible_changes_nothing():
    """A mask or numbers are all or nothing; taking back needs no eligibility."""
    kernel = kernel_with({"nvme": None})

    assert errno_of(kernel.devices.request, [2, 4]) == errno.EINVAL
    assert errno_of(kernel.devices.request, np.ones(5, np.bool_)) == errno.EINVAL
    assert not kernel.devices.requested.any()
    kernel.devices.request([2])
    assert kernel.devices.request(np.ones(5, np.bool_), on=False) == 1


# ---- bind and unbind ----


def test_bind_and_unbind_change_the_driver(log):
    """Unbound, a device has no driver; it can be bound to any that the kernel has."""
    kernel = kernel_with()
    nic = kernel.devices[NIC0]
    nic.unbind()

    assert nic.driver is None
    nic.bind("nvme")
    assert nic.driver.name == "nvme"
    nic.unbind()
    nic.bind(kernel.devices[DISK].driver)
    assert nic.driver.name == "nvme"


def test_bind_unknown_is_enodev_and_bound_is_ebusy():
    """A driver that the kernel lacks is ENODEV; a device has one driver at a time."""
    kernel = kernel_with()

    assert errno_of(kernel.devices[NIC0].bind, "nvme") == errno.EBUSY
    kernel.devices[NIC0].unbind()
    assert errno_of(kernel.devices[NIC0].bind, "unheard-of") == errno.ENODEV
    assert kernel.devices[NIC0].driver is None


@pytest.mark.parametrize("state", [State.PREPARED, State.UPDATED])
@pytest.mark.parametrize("path", [NIC0, PORT, DISK], ids=["requested", "ancestor", "other"])
def test_bind_and_unbind_during_an_update_are_ebusy(state, path, kernel, machine, log):
    """While an update is under way no driver comes or goes (quirk 12)."""
    kernel.devices.request([2])
    kernel.devices["pci0"].unbind()
    kernel.luo.prepare()
    if state is State.UPDATED:
        kernel = updated(kernel, small_kernel(machine, log))
    driver = kernel.devices[path].driver

    assert errno_of(kernel.devices[path].unbind) == errno.EBUSY
    assert kernel.devices[path].driver is driver
    assert errno_of(kernel.devices["pci0"].bind, "nic") == errno.EBUSY
    if state is State.PREPARED:
        kernel.luo.cancel()
    else:
        kernel.luo.finish()
    kernel.devices[path].unbind()
    assert kernel.devices[path].driver is None


def test_bound_driver_counts_not_the_hardwares():
    """Eligibility and callbacks follow what is bound now."""
    calls = []
    kernel = kernel_with(
        {"nic": None, "other": LiveUpdateOps(prepare=lambda device: calls.append(device.path))}
    )
    assert errno_of(kernel.devices.request, [2]) == errno.EINVAL
    kernel.devices[NIC0].unbind()
    kernel.devices[NIC0].bind("other")
    kernel.devices[NIC0].requested = True
    kernel.luo.prepare()

    assert calls == [NIC0]


# ---- probe and shutdown ----


def lifecycle(calls, **kwargs):
    """A kernel (not booted) whose drivers write probe and shutdown down."""

    def driver(name, failing=None):
        def probe(device):
            calls.append(("probe", device.path))
            if device.path == failing:
                raise OSError(errno.EIO, "dead")

        return Driver(
            name, OPS, probe=probe, shutdown=lambda device: calls.append(("down", device.path))
        )

    def make(machine, failing=None):
        drivers = [driver(name, failing) for name in ("portdrv", "nic", "nvme")]
        return Kernel(machine, drivers=drivers, buses=[Bus("pci", OPS)], **kwargs)

    return make


EVERYONE = [PORT, NIC0, "pci0/port/nic1", DISK]


def test_probe_is_called_for_each_bound_device_at_boot(machine):
    """A cold boot probes every device with a driver, parents first."""
    calls = []
    make = lifecycle(calls)
    kernel = make(machine)

    assert calls == []
    kernel.boot()
    assert calls == [("probe", path) for path in EVERYONE]


def test_probe_that_fails_leaves_the_device_unbound(machine, caplog):
    """Who fails to probe has no driver; the kernel runs, and says so."""
    calls = []
    with caplog.at_level(logging.WARNING):
        kernel = lifecycle(calls)(machine, failing=NIC0).boot()

    assert kernel.devices[NIC0].driver is None
    assert kernel.devices[DISK].driver is not None
    assert "pci0/port/nic0" in caplog.text


def test_probe_and_shutdown_skip_preserved_devices(machine):
    """A preserved device is neither shut down nor probed again; the others are."""
    calls = []
    make = lifecycle(calls)
    kernel = make(machine).boot()
    kernel.devices.request([2])
    kernel.kexec_load(make(machine))
    kernel.luo.prepare()
    calls.clear()
    kernel.kexec()

    left = ["pci0/port/nic1", DISK]
    expected = [("down", path) for path in left[::-1]] + [("probe", path) for path in left]
    assert calls == expected


def test_shutdown_in_normal_reaches_every_device(machine):
    """Switching off shuts every bound device down, children first."""
    calls = []
    kernel = lifecycle(calls)(machine).boot()
    calls.clear()
    kernel.shutdown()

    assert calls == [("down", path) for path in EVERYONE[::-1]]
    assert machine.running is None
    assert errno_of(kernel.shutdown) == errno.ESHUTDOWN


def test_shutdown_that_raises_does_not_stop_the_jump(machine, log, caplog):
    """At that point there is no way back: the failure is logged."""
    driver = Driver("nic", OPS, shutdown=lambda device: 1 // 0)
    kernel = Kernel(machine, drivers=[driver]).boot()
    kernel.kexec_load(small_kernel(machine, log))
    with caplog.at_level(logging.WARNING):
        successor = kernel.kexec()

    assert machine.running is successor
    assert "shutdown of pci0/port/nic1" in caplog.text


# ---- the end of a kernel ----


def test_objects_of_a_kernel_that_is_gone_are_eshutdown(kernel, machine, log):
    """After the jump whatever belonged to the old kernel refuses everything."""
    kernel.devices.request("*")
    devices, luo, kho, nic = kernel.devices, kernel.luo, kernel.kho, kernel.devices[NIC0]
    contexts = []
    kernel.luo.register(
        log.subsystem("one", ["prepare"]),
    )
    log.hooks["PREPARE", "subsystem", "one", None] = contexts.append
    kernel.luo.prepare()
    log.clear()
    batches = contexts[0]
    kernel = updated(kernel, small_kernel(machine, log))
    old = nic.devices
    assert old is devices
    uses = {
        "luo.state": lambda: luo.state,
        "luo.prepare": luo.prepare,
        "luo.cancel": luo.cancel,
        "luo.finish": luo.finish,
        "luo.reboot": luo.reboot,
        "luo.register": lambda: luo.register(log.subsystem("new")),
        "luo.steps": lambda: next(luo.steps(0)),
        "luo.read_state": lambda: luo.read_state().__enter__(),
        "devices[]": lambda: devices[NIC0],
        "devices len": lambda: len(devices),
        "devices iter": lambda: list(devices),
        "devices.request": lambda: devices.request("*"),
        "devices.requested": lambda: devices.requested,
        "devices.preserved": lambda: devices.preserved,
        "devices.reclaim": lambda: devices.reclaim(np.array([2], np.int32)),
        "device.path": lambda: nic.path,
        "device.slot": lambda: nic.slot,
        "device.requested": lambda: nic.requested,
        "device.requested=": lambda: setattr(nic, "requested", False),
        "device.preserved": lambda: nic.preserved,
        "device.reclaim": nic.reclaim,
        "device.bind": lambda: nic.bind("nic"),
        "device.unbind": nic.unbind,
        "device.kernel": lambda: nic.kernel.kho,
        "device.kho": lambda: nic.kho,
        "device.memory": lambda: nic.memory,
        "device.columns": lambda: nic.columns,
        "kho.preserve_folio": lambda: kho.preserve_folio(0x200000, 0),
        "kho.preserved": kho.preserved,
        "kho.alloc_preserve": lambda: kho.alloc_preserve(8),
        "kho.save_subtree": lambda: kho.save_subtree("x", b"x"),
        "kho.handover": kho.handover,
        "context.kho": lambda: batches.kho,
        "context.memory": lambda: batches.memory,
    }

    assert {name: errno_of(use) for name, use in uses.items()} == dict.fromkeys(
        uses, errno.ESHUTDOWN
    )
    assert kernel.luo.state is State.UPDATED


def test_kernel_that_is_gone_refuses_everything(kernel, machine, log):
    """Its profile stays readable, all else is ESHUTDOWN."""
    kernel.devices.request("*")
    old = kernel
    updated(kernel, small_kernel(machine, log))
    uses = {
        "boot": old.boot,
        "memory": lambda: old.memory,
        "kho": lambda: old.kho,
        "kexec": old.kexec,
        "kexec_load": lambda: old.kexec_load(small_kernel(machine, log)),
        "shutdown": old.shutdown,
        "set_cmdline": lambda: old.set_cmdline("kho=on"),
    }

    assert set(map(errno_of, uses.values())) <= {errno.ESHUTDOWN, errno.EBUSY}
    assert {name for name, use in uses.items() if errno_of(use) != errno.ESHUTDOWN} <= {
        "set_cmdline"
    }
    assert {row["event"] for row in old.profile.rows()} == {"PREPARE", "REBOOT"}
    old.close()


def test_views_of_the_old_kernel_are_cut_off(kernel, machine, log):
    """A view made before the jump sees zeros, and what is written into it reaches nobody."""
    kernel.devices.request("*")
    kernel.luo.prepare()
    view = kernel.devices[NIC0].slot
    bus_view = kernel.devices[NIC0].bus_slot
    kernel.kexec_load(small_kernel(machine, log))
    kernel = kernel.kexec()
    now = bytes(kernel.devices[NIC0].slot)

    assert any(now)
    assert bytes(view) == bytes(24)
    assert bytes(bus_view) == bytes(8)
    view[:] = b"\xff" * 24
    assert bytes(kernel.devices[NIC0].slot) == now


@pytest.mark.parametrize("kho_abi", ["kho-v4", "kho-v5-series"])
def test_device_added_after_the_successor_was_loaded_comes_over(kho_abi):
    """Hot plug while the next kernel waits: it finds the device when it looks at the records."""
    machine, log = Machine("64MiB"), Log()
    kernel = Kernel(machine, kho_abi=kho_abi).boot()
    kernel.kexec_load(plain_kernel(machine, {"d": log.ops("driver", "d")}, {}, kho_abi=kho_abi))
    machine.devices.add("late", driver="d")
    kernel.devices["late"].requested = True
    kernel.luo.prepare()
    kernel = kernel.kexec()

    assert kernel.devices["late"].reclaimed
    assert kernel.luo.finish().unreclaimed == ()
    assert [call[0] for call in log.calls] == ["RESTORE", "FINISH"]


def test_device_added_after_boot_is_enumerated_and_kept(machine):
    """Hot plug: a device that comes after the kernel was built is bound, requested and kept."""
    make = lifecycle([])
    kernel = make(machine).boot()
    old = len(machine.devices)
    machine.devices.add("late", driver=machine.devices.driver_names[0])

    assert not kernel.devices["late"].requested
    kernel.devices["late"].requested = True
    kernel.luo.prepare()

    assert kernel.devices.preserved.tolist() == [False] * old + [True]
    kernel.luo.cancel()
