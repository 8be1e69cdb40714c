"""Devices as files of sessions, beside the same devices by notifiers."""

import ctypes
import errno
import json
import shutil
import subprocess
from pathlib import Path

import device_session_kernels
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rig import SMALL, Log, content, snapshot

import luo
from luo import abi, drivers, workloads
from luo.cli import main
from luo.device import Bus, Driver, LiveUpdateOps, native
from luo.device_files import RECORD, DeviceFile, DeviceRecord, compatible_of, flb_of
from luo.errors import CallbackError, KhoError, StateError, SuccessorError
from luo.kernel import KernelImage, dry_run, live_update
from luo.memory import PhysicalMemory
from luo.notifier import Priority, Subsystem
from luo.report import Report

NIC0, NIC1, DISK, PORT = "pci0/port/nic0", "pci0/port/nic1", "pci0/disk", "pci0/port"
#: Children before parents; of equal depth as they were found.
ORDER = [NIC0, NIC1, PORT, DISK, "pci0"]
SIZES = {"nic": 24, "nvme": 40, "portdrv": 0}
KINDS = {"notifiers": device_session_kernels.notifiers, "sessions": device_session_kernels.sessions}
NATIVE = Path(__file__).parents[1] / "native"


def front(kernel):
    """Who prepares, cancels and finishes in a kernel."""
    return kernel.luo if kernel.agent is None else kernel.agent


def booted(kind, machine=None, log=None, **kwargs):
    """Boot a kernel with everything requested that the three leaves bring along."""
    kernel = KINDS[kind](machine or device_session_kernels.machine(), log, **kwargs).boot()
    kernel.devices.request([NIC0, NIC1, DISK])
    return kernel


def jump(kernel, kind, log=None, verify=False, **kwargs):
    """Load the next kernel, jump, and have it restore."""
    kernel.kexec_load(KINDS[kind](kernel.machine, log, **kwargs))
    kernel = (kernel if kernel.agent is None else kernel.agent).kexec(verify=verify)
    if kernel.agent is not None:
        kernel.agent.retrieve(verify)
    return kernel


def slots(kernel):
    """What is in the slots of every device: the driver's, the bus's."""
    return {dev.path: (bytes(dev.slot), bytes(dev.bus_slot)) for dev in kernel.devices}


def calls(log, *events):
    """Who was called: (event, kind, device), in order."""
    return [(event, kind, path) for event, kind, _name, path in log.of(*events)]


def kept(kernel):
    """What a failed or finished update must leave as it was; pages of the map may stay."""
    found = snapshot(kernel)
    found["free_pages"] += kernel.kho.tree_pages
    del found["free_blocks"]
    return found


def rehearsed(kernel):
    """Return :func:`kept` once everything that stays for ever is there."""
    front(kernel).prepare()
    front(kernel).cancel()
    return kept(kernel)


def left_of_files(kernel):
    """Addresses that nobody has taken over, but what KHO itself leaves: blobs of the root tree."""
    incoming = kernel.kho.incoming
    own = {phys for phys, _nbytes in incoming.subtrees().values()} | {incoming.handover.fdt_phys}
    return set(incoming.unrestored()[0].tolist()) - own


# ---- the same in both designs ----


@pytest.mark.parametrize("batched", [False, True])
def test_both_designs_hand_the_same_slots_over(batched):
    """Bytes of every slot are what the callbacks wrote, and equal; every device runs again."""
    found = {}
    for kind in KINDS:
        kernel = booted(kind, batched=batched)
        front(kernel).prepare()
        kernel = jump(kernel, kind, batched=batched, verify=True)
        found[kind] = slots(kernel)
        arrival = kernel.arrival

        assert kernel.devices.reclaimed.all()
        assert arrival.result["failures"] == []
        assert arrival.verified_bytes == arrival.state_bytes == 24 + 24 + 40 + 4 * 8
        assert front(kernel).finish() == luo.FinishResult((), ())
        assert not kernel.devices.preserved.any()
        kernel.close()
    expected = {
        path: tuple(
            b"\xee" + content(side, path, nbytes)[1:] if nbytes else b""
            for side, nbytes in (("driver", SIZES.get(driver, 0)), ("bus", 8 if bus else 0))
        )
        for path, (bus, driver) in SMALL.items()
    }
    assert found["sessions"] == found["notifiers"] == expected


def test_both_designs_call_the_same_callbacks():
    """Each driver and bus gets the same events for the same devices, children first, and back."""
    logs = {}
    for kind in KINDS:
        before, after = Log(), Log()
        kernel = booted(kind, log=before)
        front(kernel).prepare()
        kernel = jump(kernel, kind, after)
        front(kernel).finish()
        logs[kind] = [
            calls(before, "PREPARE"),
            calls(before, "REBOOT"),
            calls(after, "RESTORE"),
            sorted(calls(after, "FINISH")),
        ]
        kernel.close()

    assert logs["sessions"] == logs["notifiers"]


@pytest.mark.parametrize("kind", KINDS)
def test_both_designs_restore_in_another_process(kind):
    """The second process checks every slot against the bytes that it expects."""
    image = KernelImage(f"device_session_kernels:{kind}")
    kernel = booted(kind)
    report = live_update(kernel, image, repeat=2)
    try:
        document = report.to_dict()

        assert document["error"] is None
        assert document["successor"] == "process"
        assert document["devices"]["reclaimed"] == len(ORDER)
        assert document["devices"]["verified_bytes"] == 24 + 24 + 40 + 4 * 8
        names = {"notifiers": ["prepared", "updated"], "sessions": ["preserved", "retrieved"]}
        assert document["states"] == ["normal", *[*names[kind], "normal"] * 2]
        assert all(run["phases_ns"]["blackout"] > 0 for run in report.runs)
    finally:
        report.kernel.close()


def test_agent_in_another_process_undoes_what_failed_there():
    """The error comes over with its errno and file; the kernel there goes on."""
    report = Report()
    image = KernelImage("device_session_kernels:reluctant")
    with pytest.raises(CallbackError) as caught:
        live_update(booted("sessions"), image, repeat=2, report=report)
    try:
        assert (caught.value.errno, caught.value.event) == (errno.EPIPE, "PRESERVE")
        assert (caught.value.device, caught.value.rolled_back) == ("host/0x3", True)
        assert report.states == ["normal", "preserved", "retrieved", "normal", "normal"]
        assert not report.kernel.devices.preserved.any()
    finally:
        report.kernel.close()


@pytest.mark.parametrize(("side", "path"), [(s, p) for p in ORDER[:4] for s in ("driver", "bus")])
@pytest.mark.parametrize("outcome", [-errno.ENXIO, OSError(errno.EPIPE, "x"), ValueError("x"), 3])
def test_prepare_that_fails_leaves_nothing_in_both_designs(side, path, outcome):
    """The errno is the same, devices before it are cancelled in reverse, memory is as before."""
    seen = {}
    for kind in KINDS:
        log = Log()
        kernel = booted(kind, log=log)
        before = rehearsed(kernel)
        log.clear()
        name = "pci" if side == "bus" else SMALL[path][1]
        log.faults["PREPARE", side, name, path] = outcome
        with pytest.raises(CallbackError) as caught:
            front(kernel).prepare()

        assert caught.value.rolled_back
        assert kept(kernel) == before
        seen[kind] = caught.value.errno, calls(log, "PREPARE"), calls(log, "CANCEL")
        log.clear()
        front(kernel).prepare()  # nothing stands in the way of another attempt
        kernel.close()
    assert seen["sessions"] == seen["notifiers"]


@pytest.mark.parametrize("path", ORDER[:4])
def test_reboot_that_fails_is_the_same_errno_in_both_designs(path):
    """By notifiers the update is cancelled; by sessions its owner does that, with the same end."""
    seen = {}
    for kind in KINDS:
        log = Log()
        kernel = booted(kind, log=log)
        before = rehearsed(kernel)
        log.clear()
        log.faults["REBOOT", "driver", SMALL[path][1], path] = -errno.ETIME
        front(kernel).prepare()
        with pytest.raises(CallbackError) as caught:
            jump(kernel, kind)

        assert caught.value.rolled_back
        assert kept(kernel) == before
        assert kernel.machine.running is kernel
        seen[kind] = caught.value.errno, calls(log, "REBOOT"), sorted(calls(log, "CANCEL"))
        kernel.close()
    assert seen["sessions"] == seen["notifiers"]


def test_freeze_that_fails_cancels_nothing_by_itself():
    """Files stay preserved, slots stay, and the next attempt calls reboot of all of them again."""
    log = Log()
    kernel = booted("sessions", log=log)
    kernel.agent.prepare()
    log.faults["REBOOT", "driver", "nvme", DISK] = -errno.EBUSY
    kernel.kexec_load(device_session_kernels.sessions(kernel.machine))
    with pytest.raises(CallbackError) as caught:
        kernel.kexec()

    assert (caught.value.errno, caught.value.event) == (errno.EBUSY, "FREEZE")
    assert caught.value.device == "host/0x3"
    assert log.of("CANCEL") == []
    assert int(kernel.devices.preserved.sum()) == len(ORDER)
    first = calls(log, "REBOOT")
    log.clear()
    kernel = jump(kernel, "sessions")
    again = calls(log, "REBOOT")
    assert again[: len(first)] == first
    assert kernel.devices.reclaimed.all()
    kernel.close()


@pytest.mark.parametrize("path", ORDER[:4])
def test_restore_that_fails_loses_one_device_in_both_designs(path):
    """The others run; the failure and the device are told, with the same errno."""
    seen = {}
    for kind in KINDS:
        log = Log()
        kernel = booted(kind)
        front(kernel).prepare()
        name = SMALL[path][1]
        for side, owner in (("driver", name), ("bus", "pci")):
            log.faults["RESTORE", side, owner, path] = -errno.EIO
            log.hooks["RESTORE", side, owner, path] = lambda dev: dev.devices.reclaimed.__setitem__(
                dev.index, False
            )
        kernel = jump(kernel, kind, log)
        failed = kernel.arrival.result["failures"]
        finished = front(kernel).finish()
        seen[kind] = ({one["errno"] for one in failed}, finished.unreclaimed)

        assert int(kernel.devices.reclaimed.sum()) == 0
        assert not kernel.devices.preserved.any()
        kernel.close()
    assert seen["sessions"] == seen["notifiers"] == ({errno.EIO}, (path,))


def test_cancel_and_finish_that_fail_stop_nothing():
    """Both are told in the result; memory is freed, and flags are as before."""
    log = Log()
    kernel = booted("sessions", log=log)
    before = rehearsed(kernel)
    log.faults["CANCEL", "driver", "nic", NIC0] = -errno.EIO
    kernel.agent.prepare()
    failures = kernel.agent.cancel().failures

    assert [(one.errno, one.event, one.device) for one in failures] == [
        (errno.EIO, "UNPRESERVE", "host/0x0")
    ]
    assert kept(kernel) == before
    kernel.agent.prepare()
    after = Log()
    after.faults["FINISH", "bus", "pci", NIC1] = -errno.EBUSY
    kernel = jump(kernel, "sessions", after)
    result = kernel.agent.finish()
    assert [(one.errno, one.event) for one in result.failures] == [(errno.EBUSY, "FINISH")]
    assert not left_of_files(kernel)
    kernel.close()


def test_interrupt_while_cancelling_comes_when_all_is_closed():
    """Every device is cancelled, memory is as before, and the agent can begin again."""
    log = Log()
    guests = [device_session_kernels.guest(log, "a", np.array([4], np.int32))]
    kernel = booted("sessions", log=log, guests=guests)
    before = rehearsed(kernel)
    log.clear()
    kernel.agent.prepare()
    log.faults["CANCEL", "driver", "nic", NIC1] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        kernel.agent.cancel()

    assert kept(kernel) == before
    assert {path for _, side, path in calls(log, "CANCEL") if side == "bus"} == set(ORDER[:4])
    assert kernel.agent.state == "normal"
    kernel.agent.prepare()
    kernel.close()


def test_successor_that_refuses_has_the_agent_cancel():
    """Before the commit point everything is undone, and the error says so."""
    kernel = booted("sessions")
    before = rehearsed(kernel)
    kernel.agent.prepare()
    kernel.kexec_load(device_session_kernels.sessions(kernel.machine))

    def spoil(handover):
        blob = kernel.kho.root.node(f"/{abi.LUO_MAINLINE}")["preserved-data"]
        phys = int.from_bytes(bytes(blob), "little")
        kernel.memory.view(phys, 8)[:] = b"luo-v4\0\0"

    kernel.on_handover = spoil
    with pytest.raises(SuccessorError) as caught:
        kernel.agent.kexec()

    assert caught.value.rolled_back
    assert kernel.agent.state == "normal"
    after = kept(kernel)
    assert [after[name] for name in ("kept", "preserved", "slots", "free_pages")] == [
        before[name] for name in ("kept", "preserved", "slots", "free_pages")
    ]
    kernel.close()


# ---- native callbacks ----


class Context(ctypes.Structure):
    """What the C functions count in, and which device they fail at; as in test_native."""

    _fields_ = (
        ("calls", ctypes.c_int64 * 5),
        ("fail_at", ctypes.c_int32),
        ("rc", ctypes.c_int32),
        ("usec", ctypes.c_int64),
    )


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_native_callbacks_are_called_once_a_file(tmp_path):
    """They save, change and check eight bytes of each nic, and reclaim without a word."""
    made = tmp_path / "callbacks.so"
    flags = ["-shared", "-fPIC", "-std=c11", "-D_DEFAULT_SOURCE", "-I", luo.get_include()]
    subprocess.run(["gcc", *flags, NATIVE / "callbacks.c", "-o", made], check=True)
    library = ctypes.CDLL(str(made))

    def made_kernel(machine, context):
        calls = {"prepare": "save", "reboot": "touch", "restore": "restore", "finish": "tally"}
        ops = LiveUpdateOps(
            state_size=8,
            **{
                event: native(getattr(library, name), ctypes.pointer(context))
                for event, name in calls.items()
            },
        )
        none = LiveUpdateOps()
        given = [Driver("nic", ops), Driver("portdrv", none), Driver("nvme", none)]
        return device_session_kernels.sessions(machine, drivers=given, buses=[Bus("pci", none)])

    machine, before, after = (
        device_session_kernels.machine(),
        Context(fail_at=-1),
        Context(fail_at=-1),
    )
    kernel = made_kernel(machine, before).boot()
    kernel.devices.request([NIC0, NIC1])
    kernel.agent.prepare()
    kernel.kexec_load(made_kernel(machine, after))
    kernel = kernel.agent.kexec()
    kernel.agent.retrieve()

    assert list(before.calls) == [2, 2, 0, 0, 0]
    assert kernel.devices.reclaimed.tolist() == [True] * 4 + [False]
    assert bytes(kernel.devices[NIC0].slot)[1:] == NIC0.encode()[1:8]
    assert kernel.luo.last_reclaim_ns > 0
    kernel.agent.finish()
    assert list(after.calls) == [0, 0, 2, 0, 2]
    kernel.close()


# ---- files ----


def test_file_of_a_device_is_preserved_once():
    """A second open file of one device, or one that the orchestrator has, is EBUSY."""
    kernel = booted("sessions")
    devices, files = kernel.devices, kernel.agent.files
    index = devices[DISK].index
    with kernel.liveupdate.open() as node, node.create_session("s") as session:
        session.preserve(files.open(devices, index), 1)
        with pytest.raises(KhoError) as caught:
            session.preserve(files.open(devices, index), 2)
        assert caught.value.errno == errno.EBUSY
    kernel.luo.prepare()
    with kernel.liveupdate.open() as node, node.create_session("s") as session:
        with pytest.raises(CallbackError) as caught:
            session.preserve(files.open(devices, index), 1)

        assert caught.value.errno == errno.EBUSY
        assert session.files == ()
    assert devices[DISK].preserved
    kernel.luo.cancel()
    kernel.close()


def test_device_whose_driver_has_no_table_has_no_handler():
    """It is ENOENT, as for any file that nobody handles."""
    plain = [Driver("nic"), Driver("nvme", LiveUpdateOps()), Driver("portdrv", LiveUpdateOps())]
    kernel = booted_plain(plain)
    with kernel.liveupdate.open() as node, node.create_session("s") as session:
        with pytest.raises(KhoError) as caught:
            session.preserve(DeviceFile(kernel.devices, kernel.devices[NIC0].index), 0)
        assert caught.value.errno == errno.ENOENT
    kernel.close()


def booted_plain(drivers):
    """Boot a kernel with these drivers, and a bus without callbacks."""
    return device_session_kernels.sessions(
        device_session_kernels.machine(), drivers=drivers, buses=[Bus("pci", LiveUpdateOps())]
    ).boot()


def test_devices_without_callbacks_run_when_they_are_retrieved():
    """Nobody else would say so."""
    none = LiveUpdateOps()
    given = {
        "drivers": [Driver(name, none) for name in ("nic", "nvme", "portdrv")],
        "buses": [Bus("pci", none)],
    }
    kernel = booted("sessions", **given)
    kernel.agent.prepare()
    kernel = jump(kernel, "sessions", **given)

    assert kernel.devices.reclaimed.all()
    kernel.close()


def test_reclaim_is_for_devices_that_came_over():
    """In the kernel that preserved it a device cannot be reclaimed."""
    kernel = booted("sessions")
    kernel.agent.prepare()
    with pytest.raises(StateError) as caught:
        kernel.devices[DISK].reclaim()

    assert caught.value.errno == errno.EINVAL
    kernel.close()


def test_device_that_is_gone_is_enodev_and_found_by_path_if_it_moved():
    """One has another number, one another bus, one is not there; the others are not touched."""
    shape = {
        "pci0": (None, None),
        "pci0/disk": ("pci", "nvme"),
        "pci0/port": ("pci", "portdrv"),
        "pci0/port/nic0": ("virtio", "nic"),
    }
    kernel = booted("sessions")
    kernel.agent.prepare()
    # The very same memory under other hardware.
    after = luo.Machine(kernel.machine.memory, device_session_kernels.machine(shape=shape).devices)
    frozen = kernel.liveupdate.freeze()
    handover = kernel.kho.handover()
    kernel.close()
    successor = device_session_kernels.sessions(after).boot(handover)
    successor.agent.retrieve()
    errors = {one.device: one.errno for one in successor.agent.failures}

    assert frozen
    assert errors == {"host/0x0": errno.ENODEV, "host/0x1": errno.ENODEV}
    reclaimed = {dev.path for dev in successor.devices if dev.reclaimed}
    assert reclaimed == {"pci0", DISK, PORT}
    assert bytes(successor.devices[DISK].slot)[1:] == content("driver", DISK, 40)[1:]
    successor.agent.finish()
    assert not left_of_files(successor)
    successor.close()


def test_next_kernel_without_the_driver_loses_one_device_or_all_sessions():
    """By notifiers one device waits; by files nobody can open the node any more, as in Linux."""
    none = LiveUpdateOps()
    given = {
        "drivers": [Driver(name, none) for name in ("nic", "portdrv")],
        "buses": [Bus("pci", none)],
    }
    kernel = booted("notifiers")
    kernel.luo.prepare()
    kernel.kexec_load(luo.Kernel(kernel.machine, **given))
    kernel = kernel.kexec()
    assert kernel.luo.finish().unreclaimed == (DISK,)
    kernel.close()

    kernel = booted("sessions")
    kernel.agent.prepare()
    kernel.kexec_load(device_session_kernels.sessions(kernel.machine, **given))
    kernel = kernel.agent.kexec()
    for _ in range(2):
        with pytest.raises(KhoError) as caught:
            kernel.agent.retrieve()
        assert caught.value.errno == errno.EIO
    kernel.close()


def test_device_plugged_in_after_the_next_kernel_was_loaded_is_found():
    """Both kernels enumerate it when they first meet it."""
    kernel = booted("sessions")
    kernel.kexec_load(device_session_kernels.sessions(kernel.machine))
    kernel.machine.devices.add("late", "pci0", "pci", "nvme", state=b"")
    kernel.devices.request(["pci0/late"])
    kernel.agent.prepare()
    kernel = kernel.agent.kexec()
    kernel.agent.retrieve()

    assert kernel.devices["pci0/late"].reclaimed
    assert bytes(kernel.devices["pci0/late"].slot)[1:] == content("driver", "pci0/late", 40)[1:]
    kernel.close()


@given(
    head=st.binary(min_size=RECORD.size, max_size=RECORD.size),
    rest=st.binary(max_size=64),
    room=st.integers(0, 8192),
)
def test_record_of_hostile_bytes_is_refused_or_within_its_room(head, rest, room):
    """Whatever the bytes, slots lie in the block, or it is EINVAL."""
    memory = PhysicalMemory("1MiB", base="1MiB")
    phys = memory.alloc_folio(1)
    memory.view(phys, 8192)[: len(head + rest)] = head + rest
    try:
        record = DeviceRecord.read(memory, phys, room)
    except KhoError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert refused.errno == errno.EINVAL
        return
    assert record.nbytes <= room
    for start, nbytes in record.slots:
        assert phys + record.nbytes <= start
        assert start + nbytes <= phys + room


def test_hostile_records_fail_their_own_file_only():
    """A record that was written over is EINVAL; an agent's file that was, ends retrieving."""
    for spoiled, code in (("record", None), ("list", errno.EINVAL)):
        kernel = booted("sessions")
        kernel.agent.prepare()
        session = kernel.liveupdate.outgoing[0 if spoiled == "record" else 1]
        phys = session.files[0].data
        kernel.memory.view(phys, 16)[:] = b"\xff" * 16
        if code is None:
            kernel = jump(kernel, "sessions")
            assert [one["errno"] for one in kernel.arrival.result["failures"]] == [errno.EINVAL]
            assert int(kernel.devices.reclaimed.sum()) == len(ORDER) - 1
            kernel.agent.finish()
            assert not left_of_files(kernel)
        else:
            kernel.kexec_load(device_session_kernels.sessions(kernel.machine))
            kernel = kernel.agent.kexec()
            with pytest.raises(KhoError) as caught:
                kernel.agent.retrieve()
            assert caught.value.errno == code
        kernel.close()


def test_compatible_names_fit_and_differ():
    """A long driver's name is cut; two that begin alike are still told apart."""
    names = [compatible_of("x" * n + tail) for n in (1, 30, 60) for tail in ("a", "b")]

    assert max(len(name.encode()) for name in names) <= 47
    assert len(set(names)) == len(names)
    assert compatible_of("vfio-pci") == "luo-vfio-pci-v1"
    assert compatible_of("") == "luo-device-v1"
    assert len(compatible_of("é" * 40).encode()) <= 47


# ---- the agent ----


def test_plan_has_a_session_for_each_guest_and_splits_the_hosts(monkeypatch):
    """A guest's devices, and what hangs below them, go with it; a full session is followed up."""
    log = Log()
    guests = [
        device_session_kernels.guest(log, "a", np.array([1], np.int32))
    ]  # the port, with two nics
    kernel = booted("sessions", guests=guests)
    plan = [(name, list(map(repr, files))) for name, files in kernel.agent.plan()]

    assert plan == [
        (
            "vm:a",
            ["<SubsystemFile kvm-a>", *(f"<DeviceFile {path}>" for path in (NIC0, NIC1, PORT))],
        ),
        ("host", [f"<DeviceFile {DISK}>", "<DeviceFile pci0>"]),
    ]
    kernel.close()
    monkeypatch.setattr(abi, "KHO_BLOCKS_MAX", 1)
    machine = device_session_kernels.machine(
        shape={"pci0": (None, None)} | {f"pci0/disk{n}": ("pci", "nvme") for n in range(100)}
    )
    kernel = device_session_kernels.sessions(machine).boot()
    kernel.devices.request("pci0/disk*")
    names = [(name, len(files)) for name, files in kernel.agent.plan()]
    assert names == [("host", 63), ("host-1", 38)]
    kernel.agent.prepare()
    kernel = jump(kernel, "sessions")
    assert kernel.devices.reclaimed.all()
    kernel.agent.finish()
    kernel.close()


def test_subsystems_are_files_or_flbs_and_carry_their_number():
    """One with a part in the jump is a file, whose number REBOOT changes; others are FLBs."""
    seen = []

    def made(name, **more):
        def prepare(context):
            context.data = 7

        def restore(context):
            seen.append((name, context.data))

        return Subsystem(name, prepare=prepare, restore=restore, **more)

    def number(context):
        context.data = 9

    def build(machine):
        return device_session_kernels.sessions(
            machine,
            flbs=[flb_of(made("still"))],
            subsystems=[
                made("moving", reboot=number, priority=Priority.AFTER_DEVICES),
                made("early", reboot=lambda context: None, priority=Priority.BEFORE_DEVICES),
            ],
        )

    kernel = build(device_session_kernels.machine()).boot()
    kernel.devices.request([DISK])
    kernel.agent.prepare()
    files = [file.handler.compatible for file in kernel.liveupdate.outgoing[0].files]
    assert files == ["luo-early-v1", "luo-nvme-v1", "luo-device-v1", "luo-moving-v1"]
    kernel.kexec_load(build(kernel.machine))
    kernel = kernel.agent.kexec()
    kernel.agent.retrieve()

    assert seen == [("moving", 9), ("still", 7), ("early", 7)]
    kernel.agent.finish()
    kernel.close()


def test_agent_refuses_what_is_out_of_turn():
    """Each call has its state; nothing changes."""
    kernel = booted("sessions")
    agent = kernel.agent
    for call in (agent.cancel, agent.dry_reboot, agent.finish):
        with pytest.raises(StateError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    agent.prepare()
    for call in (agent.prepare, agent.finish, agent.retrieve):
        with pytest.raises(StateError):
            call()
    assert agent.state == "preserved"
    kernel.close()


def test_dry_run_freezes_and_cancels():
    """REBOOT callbacks are called, then everything is undone."""
    log = Log()
    kernel = booted("sessions", log=log)
    report = dry_run(kernel, report=Report())
    document = report.to_dict()

    assert document["states"] == ["normal", "preserved", "normal"]
    assert set(document["dry_reboot_ns"]) == {"prepare", "reboot", "cancel"}
    assert document["dry_reboot_ns"]["reboot"] > 0
    assert len(log.of("REBOOT")) == len(log.of("CANCEL")) == 8
    kernel.close()


def test_built_in_kernels_keep_guests_iommu_and_interrupts():
    """Guests have files, global state is FLBs; the same pages of RAM are kept in both designs."""
    pages = {}
    for api in drivers.APIS:
        host = workloads.host("cloud", devices=300)
        image = workloads.image_of(host, api=api)
        kernel = workloads.first_kernel(host, image).boot()
        workloads.request_all(kernel)
        report = live_update(kernel, image, in_process=True)
        ram = sum(vm.ram_bytes for vm in host.vms) // 4096
        pages[api] = report.to_dict()["image"]["preserved_pages"]
        rows = {(row["subsystem"], row["event"], row["name"]) for row in report.callbacks}

        assert report.error is None
        assert pages[api] > ram
        report.kernel.close()
        if api == "sessions":
            assert {
                ("files", "RETRIEVE", name) for name in ("iommu", "interrupts", "mm", "luo-kvm-v1")
            } <= rows
            assert {row[0] for row in rows} == {"files"}
    assert 0 < pages["sessions"] - pages["rfc1"] < 10_000


# ---- the command ----


def run(*arguments):
    """Run the command line, and return its result."""
    return CliRunner().invoke(main, [str(one) for one in arguments])


def test_run_with_sessions_writes_the_same_document(tmp_path):
    """Its settings say which design; compare and report take it beside one by notifiers."""
    files = {}
    for api in drivers.APIS:
        files[api] = tmp_path / f"{api}.json"
        done = run(
            *("run", "--preset", "cloud", "--devices", 120, "--api", api, "--repeat", 3),
            *("--in-process", "--json", files[api]),
        )
        assert done.exit_code == 0, done.output
    documents = {api: json.loads(file.read_text()) for api, file in files.items()}

    for api, document in documents.items():
        assert document["settings"]["api"] == api
        assert document["devices"]["verified_bytes"] == document["devices"]["state_bytes"] > 0
    one, other = documents.values()
    assert set(one) == set(other)
    assert {row["subsystem"] for row in other["callbacks"]} == {"files"}
    for name in ("requested", "preserved", "reclaimed", "state_bytes"):
        assert one["devices"][name] == other["devices"][name]
    assert list(one["phases_ns"]) == list(other["phases_ns"])
    phases = [phase for kernel in other["timeline"]["kernels"] for phase, *_ in kernel["phases"]]
    assert phases == ["prepare", "reboot", "jump", "boot", "restore", "finish"]
    assert run("compare", files["rfc1"], files["sessions"]).exit_code == 0
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    assert run("report", files["sessions"], files["rfc1"], "-o", page).exit_code == 0
    assert "luo-vfio-pci-v1" in page.read_text()


def test_run_with_sessions_says_what_it_cannot(tmp_path):
    """Sessions are of one generation; a driver that fails is told with its device."""
    refused = run("run", "--preset", "cloud", "--api", "sessions", "--kho-abi", "kho-v1")
    assert refused.exit_code == 2
    assert "kho-v4" in refused.output
    cost = tmp_path / "cost.toml"
    cost.write_text("")
    for options in (("--callback-limit", "1s"), ("--clock", "virtual", "--cost", cost)):
        refused = run("run", "--preset", "cloud", "--api", "sessions", *options)
        assert refused.exit_code == 2
        assert "no limit and no model" in refused.output
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import errno, luo\n"
        "nic = luo.Driver('vfio-pci', luo.LiveUpdateOps(reboot=lambda dev: -errno.EIO))\n"
    )
    done = run(
        *("run", "--preset", "cloud", "--devices", 300, "--api", "sessions", "--in-process"),
        *("--drivers", bad, "--json", tmp_path / "out.json"),
    )
    document = json.loads((tmp_path / "out.json").read_text())

    assert done.exit_code == 1
    assert document["error"]["errno_name"] == "EIO"
    assert document["error"]["rolled_back"]
    assert "REBOOT driver vfio-pci of " in document["error"]["message"]
    assert document["states"] == ["normal", "preserved", "normal"]


def test_budgets_know_the_callbacks_of_files():
    """Names are those of handlers; a phase's worst part is a file's callback."""
    done = run(
        *("run", "--preset", "cloud", "--devices", 120, "--api", "sessions", "--in-process"),
        *("--repeat", 2, "--budget", "restore=1ns,files/luo-vfio-pci-v1/PRESERVE=10s"),
    )

    assert done.exit_code == 3
    assert "RETRIEVE" in done.output
