"""RFC v1's rules as tables, one row one test; numbers are sections of ``spec/luo-rfc-v1.md``."""

import contextlib
import errno
import itertools
import logging
import signal
import struct
import sys
import threading
import time

import pytest
from rig import (
    Log,
    errno_of,
    forest,
    plain_kernel,
    small_kernel,
    small_machine,
    snapshot,
    updated,
)

from luo import abi, state_lock
from luo.device import Bus, Driver, LiveUpdateOps
from luo.errors import CallbackError, KernelPanic, KhoError, StateError
from luo.fdt import FdtWriter
from luo.kernel import Kernel
from luo.kho import Kho, KhoNode
from luo.liveupdate import Priority, State, Subsystem
from luo.machine import Machine
from luo.notifier import Event
from luo.quirks import HOME

BEHAVIOURS = ("intended", "rfc1")
ABI = {"intended": "kho-v4", "rfc1": HOME}
NIC, DISK, PORT = "pci0/port/nic0", "pci0/disk", "pci0/port"
NOT_SET = object()


def in_state(state, log, behaviour="intended", **kwargs):
    """A kernel in *state* whose every callback is logged, with one subsystem; the NIC requested."""
    machine = small_machine()

    def kernel():
        return small_kernel(machine, log, [log.subsystem("sub")], behaviour=behaviour, **kwargs)

    running = kernel().boot()
    running.devices.request_one(2, True)
    if state == "PREPARED":
        running.luo.prepare()
    elif state == "UPDATED":
        running = updated(running, kernel())
    log.clear()
    return running


@pytest.fixture
def log():
    return Log()


# ---- 1.1: what is numbered ----


@pytest.mark.parametrize(
    ("enum", "names"),
    [
        (State, ["NORMAL", "PREPARED", "UPDATED"]),
        (Event, ["PREPARE", "REBOOT", "FINISH", "CANCEL"]),
        (Priority, ["BEFORE_DEVICES", "WITH_DEVICES", "AFTER_DEVICES"]),
    ],
)
def test_enum_has_the_kernels_numbers(enum, names):
    """States, events and priorities count from 0 in the kernel's order."""
    assert [enum(number).name for number in range(len(enum))] == names


# ---- 1.4: every state and every trigger ----


def load_and_kexec(kernel):
    """Load a successor of the same kind and jump; returns it."""
    kernel.kexec_load(
        small_kernel(kernel.machine, Log(), behaviour=kernel.behaviour, kho_abi=kernel.kho_abi)
    )
    return kernel.kexec()


def shut_down(kernel):
    """Power off; there is no state afterwards."""
    kernel.shutdown()
    return NOT_SET


def toggle(path, on):
    """A write of ``requested``."""
    return lambda kernel: kernel.devices.request_one(kernel.devices[path].index, on)


NEW = Subsystem("new")
TRIGGERS = {
    "prepare": lambda kernel: kernel.luo.prepare(),
    "cancel": lambda kernel: kernel.luo.cancel(),
    "finish": lambda kernel: kernel.luo.finish(),
    "reboot": lambda kernel: kernel.luo.reboot(),
    "dry_reboot": lambda kernel: kernel.luo.dry_reboot(),
    "kexec": load_and_kexec,
    "kexec without image": lambda kernel: kernel.kexec(),
    "shutdown": shut_down,
    "request": toggle(DISK, True),
    "request again": toggle(NIC, True),
    "register": lambda kernel: kernel.luo.register(NEW),
    "unregister": lambda kernel: kernel.luo.unregister("sub"),
    "bind": lambda kernel: kernel.devices["pci0"].bind("nic"),
    "unbind": lambda kernel: kernel.devices[DISK].unbind(),
    "reclaim": lambda kernel: kernel.devices[DISK].reclaim(),
}
OK, EINVAL, EBUSY, EAGAIN, EINTR = 0, errno.EINVAL, errno.EBUSY, errno.EAGAIN, errno.EINTR

#: (trigger, state): (errno, state afterwards, events that are called in order).
TRANSITIONS = {
    ("prepare", "NORMAL"): (OK, "PREPARED", ["PREPARE"]),
    ("prepare", "PREPARED"): (EINVAL, "PREPARED", []),
    ("prepare", "UPDATED"): (EINVAL, "UPDATED", []),
    ("cancel", "NORMAL"): (EINVAL, "NORMAL", []),
    ("cancel", "PREPARED"): (OK, "NORMAL", ["CANCEL"]),
    ("cancel", "UPDATED"): (EINVAL, "UPDATED", []),
    ("finish", "NORMAL"): (EINVAL, "NORMAL", []),
    ("finish", "PREPARED"): (EINVAL, "PREPARED", []),
    ("finish", "UPDATED"): (OK, "NORMAL", ["FINISH"]),
    ("reboot", "NORMAL"): (OK, "NORMAL", []),
    ("reboot", "PREPARED"): (OK, "PREPARED", ["REBOOT"]),
    ("reboot", "UPDATED"): (OK, "UPDATED", []),
    ("dry_reboot", "NORMAL"): (EINVAL, "NORMAL", []),
    ("dry_reboot", "PREPARED"): (OK, "NORMAL", ["REBOOT", "CANCEL"]),
    ("dry_reboot", "UPDATED"): (EINVAL, "UPDATED", []),
    ("kexec", "NORMAL"): (OK, "NORMAL", []),
    ("kexec", "PREPARED"): (OK, "UPDATED", ["REBOOT"]),
    ("kexec", "UPDATED"): (OK, "NORMAL", []),  # an ordinary one: what was preserved is lost
    ("kexec without image", "NORMAL"): (EINVAL, "NORMAL", []),
    ("kexec without image", "PREPARED"): (EINVAL, "PREPARED", []),
    ("kexec without image", "UPDATED"): (EINVAL, "UPDATED", []),
    ("shutdown", "NORMAL"): (OK, None, []),
    ("shutdown", "PREPARED"): (OK, None, []),
    ("shutdown", "UPDATED"): (OK, None, []),
    ("request", "NORMAL"): (OK, "NORMAL", []),
    ("request", "PREPARED"): (EINVAL, "PREPARED", []),
    ("request", "UPDATED"): (EINVAL, "UPDATED", []),
    ("register", "NORMAL"): (OK, "NORMAL", []),
    ("register", "PREPARED"): (EBUSY, "PREPARED", []),
    ("register", "UPDATED"): (OK, "UPDATED", []),
    ("unregister", "NORMAL"): (OK, "NORMAL", []),
    ("unregister", "PREPARED"): (EBUSY, "PREPARED", []),
    ("unregister", "UPDATED"): (OK, "UPDATED", []),
    ("bind", "NORMAL"): (OK, "NORMAL", []),
    ("bind", "PREPARED"): (EBUSY, "PREPARED", []),
    ("bind", "UPDATED"): (EBUSY, "UPDATED", []),
    ("unbind", "NORMAL"): (OK, "NORMAL", []),
    ("unbind", "PREPARED"): (EBUSY, "PREPARED", []),
    ("unbind", "UPDATED"): (EBUSY, "UPDATED", []),
    ("reclaim", "NORMAL"): (EINVAL, "NORMAL", []),
    ("reclaim", "PREPARED"): (EINVAL, "PREPARED", []),
    ("reclaim", "UPDATED"): (EINVAL, "UPDATED", []),
    ("request again", "NORMAL"): (OK, "NORMAL", []),
    ("request again", "PREPARED"): (OK, "PREPARED", []),
    ("request again", "UPDATED"): (EINVAL, "UPDATED", []),  # a new kernel: nothing is requested
}

#: Where RFC v1's code comes out elsewhere (quirks 8, 11 and 12).
TRANSITIONS_RFC1 = TRANSITIONS | {
    ("kexec without image", "PREPARED"): (EINVAL, "NORMAL", ["REBOOT", "CANCEL"]),
    ("register", "PREPARED"): (OK, "PREPARED", []),
    ("unregister", "PREPARED"): (OK, "PREPARED", []),
    ("bind", "PREPARED"): (OK, "PREPARED", []),
    ("bind", "UPDATED"): (OK, "UPDATED", []),
    ("unbind", "PREPARED"): (OK, "PREPARED", []),
    ("unbind", "UPDATED"): (OK, "UPDATED", []),
}


def test_transitions_have_a_row_for_every_state_and_trigger():
    """The table is whole."""
    assert set(TRANSITIONS) == set(itertools.product(TRIGGERS, ("NORMAL", "PREPARED", "UPDATED")))


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize(("trigger", "state"), TRANSITIONS)
def test_trigger_in_each_state_is_what_the_table_says(trigger, state, behaviour, log):
    """Errno, state afterwards and callbacks of one trigger in one state."""
    table = TRANSITIONS if behaviour == "intended" else TRANSITIONS_RFC1
    code, after, events = table[trigger, state]
    kernel = in_state(state, log, behaviour)
    before = snapshot(kernel)
    result = None
    if code:
        with pytest.raises(OSError) as caught:
            TRIGGERS[trigger](kernel)

        assert caught.value.errno == code
        assert after != state or snapshot(kernel) == before
    else:
        result = TRIGGERS[trigger](kernel)
    if after is not None:
        running = result if isinstance(result, Kernel) else kernel
        assert running.luo.state.name == after
    assert [event for event, _ in itertools.groupby(call[0] for call in log.calls)] == events


@pytest.mark.parametrize(
    ("trigger", "state", "wanted"),
    [
        ("prepare", "PREPARED", "NORMAL"),
        ("prepare", "UPDATED", "NORMAL"),
        ("cancel", "NORMAL", "PREPARED"),
        ("cancel", "UPDATED", "PREPARED"),
        ("finish", "NORMAL", "UPDATED"),
        ("finish", "PREPARED", "UPDATED"),
        ("dry_reboot", "NORMAL", "PREPARED"),
        ("request", "PREPARED", "NORMAL"),
        ("request", "UPDATED", "NORMAL"),
    ],
)
def test_wrong_state_says_wanted_and_present(trigger, state, wanted, log):
    """A refusal for the state's sake names the state that is wanted and the one that is."""
    with pytest.raises(StateError, match=f"{wanted}.*{state}"):
        TRIGGERS[trigger](in_state(state, log))


@pytest.mark.parametrize(
    ("state", "trigger", "line"),
    [
        ("NORMAL", "prepare", "switched from [normal] to [prepared]"),
        ("PREPARED", "cancel", "switched from [prepared] to [normal]"),
        ("UPDATED", "finish", "switched from [updated] to [normal]"),
    ],
)
def test_change_of_state_is_logged(state, trigger, line, log, caplog):
    """Each change of state is logged with both names, once."""
    kernel = in_state(state, log)
    caplog.clear()
    with caplog.at_level(logging.INFO, "luo"):
        TRIGGERS[trigger](kernel)

    assert [text for text in caplog.messages if "switched" in text] == [line]


# ---- errors: who is refused with what ----


def off(cmdline, **kwargs):
    """A kernel without live update."""
    return lambda log: small_kernel(small_machine(), log, cmdline=cmdline, **kwargs).boot()


def state(name):
    """A kernel in the state *name*."""
    return lambda log: in_state(name, log)


def bare(drivers, buses):
    """A kernel with some owners that do not support live update."""
    return lambda log: plain_kernel(small_machine(), drivers, buses).boot()


TABLE = LiveUpdateOps()
ALL = {"portdrv": TABLE, "nic": TABLE, "nvme": TABLE}
normal, prepared, arrived = state("NORMAL"), state("PREPARED"), state("UPDATED")
kho_off, luo_off = off("kho=off liveupdate=on"), off("kho=on liveupdate=off")


def gone(log):
    """A kernel that was left behind."""
    kernel = in_state("NORMAL", log)
    load_and_kexec(kernel)
    return kernel


def built(log):
    """A kernel that has not booted."""
    return small_kernel(small_machine(), log)


def twice(call, *arguments):
    """Do it once, then again for the error."""
    call(*arguments)
    return call(*arguments)


REFUSALS = [
    # 1.2: the feature is off
    ("prepare", luo_off, errno.EOPNOTSUPP),
    ("cancel", luo_off, errno.EOPNOTSUPP),
    ("finish", luo_off, errno.EOPNOTSUPP),
    ("prepare", kho_off, errno.EOPNOTSUPP),
    ("cancel", kho_off, errno.EOPNOTSUPP),
    ("finish", kho_off, errno.EOPNOTSUPP),
    ("kho", kho_off, errno.EOPNOTSUPP),
    ("kho", built, errno.EOPNOTSUPP),
    # 1.4, beside the transitions
    ("reboot twice", prepared, errno.EALREADY),
    # 1.6: registration
    ("register twice", normal, errno.EEXIST),
    ("register a taken name", normal, errno.EEXIST),
    ("register the devices' name", normal, errno.EEXIST),
    ("unregister unknown", normal, errno.ENOENT),
    ("unregister twice", normal, errno.ENOENT),
    ("unregister the devices", normal, errno.ENOENT),
    # 1.9
    ("request nic", bare(ALL | {"nic": None}, {"pci": TABLE}), EINVAL),
    ("request nic", bare(ALL, {"pci": None}), EINVAL),
    ("request nic", bare(ALL, {}), EINVAL),
    ("request number 9", normal, errno.ENOENT),
    ("request unplugged", normal, errno.ENODEV),
    # binding (1.14, 12)
    ("bind unknown", normal, errno.ENODEV),
    ("bind bound", normal, EBUSY),
    ("unbind preserved", prepared, EBUSY),
    ("unbind preserved", arrived, EBUSY),
    # slots and nodes outside an update
    ("slot", normal, EINVAL),
    ("kho_node", normal, EINVAL),
    ("reclaim nic", prepared, EINVAL),
    # 1.14, 17: without its directory a device cannot change hands in RFC v1's code
    ("change owner", off("kho=1", behaviour="rfc1"), errno.ENOENT),
    # kexec and boot
    ("boot", normal, EBUSY),
    ("boot another", normal, EBUSY),
    ("kexec", normal, EINVAL),
    # whoever is gone
    ("shutdown", gone, errno.ESHUTDOWN),
    ("kexec", gone, errno.ESHUTDOWN),
    ("prepare", gone, errno.ESHUTDOWN),
    ("state", gone, errno.ESHUTDOWN),
    ("request nic", gone, errno.ESHUTDOWN),
    ("kho", gone, errno.ESHUTDOWN),
    ("memory", gone, errno.ESHUTDOWN),
]


def unplugged(kernel):
    """Write ``requested`` of a device that goes meanwhile."""
    kernel.machine.devices.remove(DISK)
    kernel.devices.request_one(4, True)


ACTS = {
    **TRIGGERS,
    "kexec": lambda kernel: kernel.kexec(),
    "reboot twice": lambda kernel: twice(kernel.luo.reboot),
    "register twice": lambda kernel: twice(kernel.luo.register, NEW),
    "register a taken name": lambda kernel: kernel.luo.register(Subsystem("sub")),
    "register the devices' name": lambda kernel: kernel.luo.register(Subsystem("devices")),
    "unregister unknown": lambda kernel: kernel.luo.unregister("new"),
    "unregister twice": lambda kernel: twice(kernel.luo.unregister, "sub"),
    "unregister the devices": lambda kernel: kernel.luo.unregister("devices"),
    "request nic": lambda kernel: kernel.devices.request_one(2, True),
    "request number 9": lambda kernel: kernel.devices.request([9]),
    "request unplugged": unplugged,
    "bind unknown": lambda kernel: kernel.devices["pci0"].bind("none"),
    "bind bound": lambda kernel: kernel.devices[NIC].bind("nvme"),
    "unbind preserved": lambda kernel: kernel.devices[NIC].unbind(),
    "slot": lambda kernel: kernel.devices[NIC].slot,
    "kho_node": lambda kernel: kernel.devices[NIC].kho_node,
    "reclaim nic": lambda kernel: kernel.devices[NIC].reclaim(),
    "change owner": lambda kernel: kernel.devices.change_owner(2, 1000, 1000),
    "boot": lambda kernel: kernel.boot(),
    "boot another": lambda kernel: small_kernel(kernel.machine, Log()).boot(),
    "state": lambda kernel: kernel.luo.state,
    "kho": lambda kernel: kernel.kho,
    "memory": lambda kernel: kernel.memory,
}


@pytest.mark.parametrize(("act", "kernel", "code"), REFUSALS)
def test_refusal_has_its_errno(act, kernel, code, log):
    """Who is refused raises a KhoError with Linux's errno, and calls nobody."""
    kernel = kernel(log)
    log.clear()
    with pytest.raises(KhoError) as caught:
        ACTS[act](kernel)

    assert caught.value.errno == code
    assert {call[0] for call in log.calls} <= {"REBOOT"}  # only of the first of two


@pytest.mark.parametrize("event", ["prepare", "cancel", "finish", "reboot"])
def test_event_of_a_thread_that_reads_the_state_is_edeadlk(event, log):
    """A reader that starts an event would wait for itself."""
    kernel = in_state({"prepare": "NORMAL", "finish": "UPDATED"}.get(event, "PREPARED"), log)
    with kernel.luo.read_state():
        assert errno_of(TRIGGERS[event], kernel) == errno.EDEADLK
    TRIGGERS[event](kernel)


#: (what a callback does, errno, returned): DESIGN, callbacks.
OUTCOMES = [
    (-errno.EBUSY, errno.EBUSY, -errno.EBUSY),
    (-1, errno.EPERM, -1),
    (OSError(errno.ENOSPC, "full"), errno.ENOSPC, None),
    (OSError("no errno"), errno.EIO, None),
    (ValueError("bad"), errno.EIO, None),
    (errno.EBUSY, EINVAL, errno.EBUSY),
    (1, EINVAL, 1),
    ("done", EINVAL, None),
]


@pytest.mark.parametrize(
    "key",
    [("subsystem", "sub", None), ("driver", "nic", NIC), ("bus", "pci", NIC)],
    ids=["subsystem", "driver", "bus"],
)
@pytest.mark.parametrize("event", ["PREPARE", "REBOOT", "CANCEL", "FINISH"])
@pytest.mark.parametrize(("outcome", "code", "returned"), OUTCOMES)
def test_callback_outcome_has_its_errno(outcome, code, returned, event, key, log):
    """What a callback raises or returns becomes an errno; CANCEL and FINISH collect it."""
    kernel = in_state({"PREPARE": "NORMAL", "FINISH": "UPDATED"}.get(event, "PREPARED"), log)
    log.faults[event, *key] = outcome
    if event in ("PREPARE", "REBOOT"):
        with pytest.raises(CallbackError) as caught:
            TRIGGERS[event.lower()](kernel)
        error = caught.value
    else:
        (error,) = TRIGGERS[event.lower()](kernel).failures

    assert (error.event, error.kind, error.name, error.device) == (event, *key)
    assert (error.errno, error.returned) == (code, returned)
    assert kernel.luo.state.name == "NORMAL"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"behaviour": "rfc2"}, "behaviour 'rfc2'"),
        ({"quirks": ("no-such",)}, "quirk 'no-such'"),
        ({"quirks": ("-no-such",)}, "quirk 'no-such'"),
        ({"quirks": ("node-left-behind",)}, "cannot express"),
        ({"behaviour": "rfc1", "kho_abi": "kho-v4"}, "cannot express"),
        ({"kho_abi": "kho-v9"}, "kho-v9"),
    ],
)
def test_kernel_wrong_behaviour_is_value_error(settings, error):
    """A behaviour, quirk or generation that there is not, or that cannot be together."""
    with pytest.raises(ValueError, match=error):
        Kernel(small_machine(), **settings)


# ---- 1.9: who may be requested, and in which order that is checked ----

SUPPORT = [None, "good", "bad"]  # no driver (or bus), one with a table, one without
PAIRS = list(itertools.product(SUPPORT, SUPPORT))


def supports(node):
    """Whether what is there has a table."""
    return "bad" not in node


def family(parent, child, behaviour):
    """A kernel of two devices, each a pair of its driver and its bus."""
    shape = {"up": (parent[1], parent[0]), "up/down": (child[1], child[0])}
    owners = {"good": TABLE, "bad": None}
    machine = Machine("64MiB", forest(shape))
    return plain_kernel(machine, owners, owners, behaviour=behaviour).boot()


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("parent", PAIRS)
@pytest.mark.parametrize("child", PAIRS)
def test_request_is_granted_to_who_supports_live_update(child, parent, behaviour):
    """Driver and bus, where there are any, need a table; in RFC v1's code on the whole path."""
    kernel = family(parent, child, behaviour)
    granted = supports(child) and (behaviour == "intended" or supports(parent))
    code = errno_of(kernel.devices.request_one, 1, True)

    assert code == (None if granted else EINVAL)
    assert kernel.devices.requested.tolist() == [False, granted]
    kernel.luo.prepare()
    assert kernel.devices.preserved.tolist() == [granted and supports(parent), granted]


def rebound(kernel):
    """Bind the device to a driver without a table."""
    kernel.devices["up/down"].unbind()
    kernel.devices["up/down"].bind("bad")


GOOD = ("good", None)
#: (what happened before, value written, errno or None, words of the refusal)
WRITES = [
    ([], True, None, ""),
    ([], False, None, ""),  # the same value
    (["prepare"], False, None, ""),  # the same value counts in any state
    (["request", "prepare"], True, None, ""),
    (["request", "rebind"], True, None, ""),  # and is not asked whether it may
    (["request", "rebind"], False, None, ""),  # nor is a 0
    (["rebind"], True, EINVAL, "does not support"),
    (["prepare"], True, EINVAL, "PREPARED"),
    (["request", "prepare"], False, EINVAL, "PREPARED"),
    (["rebind", "prepare"], True, EINVAL, "PREPARED"),  # the state comes before eligibility
    (["prepare", "cancel"], True, None, ""),
    (["request", "prepare", "cancel"], False, None, ""),  # it has survived
    (["request", "prepare", "reboot"], False, EINVAL, "PREPARED"),
]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize(("before", "value", "code", "words"), WRITES)
def test_write_of_requested_is_checked_in_order(before, value, code, words, behaviour):
    """First whether it changes anything, then the state, then whether the device supports it."""
    kernel = family(GOOD, GOOD, behaviour)
    for what in before:
        {**TRIGGERS, "request": toggle("up/down", True), "rebind": rebound}[what](kernel)
    was = bool(kernel.devices.requested[1])
    if code is None:
        kernel.devices.request_one(1, value)
    else:
        with pytest.raises(KhoError, match=words) as caught:
            kernel.devices.request_one(1, value)

        assert caught.value.errno == code
    assert bool(kernel.devices.requested[1]) is (was if code else value)
    assert kernel.devices.nr_linked == kernel.devices.requested.sum()


# ---- 1.13: the kernel's own return values of KHO's tree ----


def test_kho_add_node_same_child_again_is_1():
    """A node that is there already is told by a positive 1, which is no errno."""
    kho, node = Kho(small_machine().memory, abi=HOME), KhoNode()

    assert [kho.add_node(None, "n", node) for _ in range(2)] == [0, 1]


def test_kho_add_node_other_child_of_the_name_is_eexist():
    """A name is taken once."""
    kho = Kho(small_machine().memory, abi=HOME)
    kho.add_node(None, "n", KhoNode())

    assert errno_of(kho.add_node, None, "n", KhoNode()) == errno.EEXIST


def test_kho_add_node_after_finalize_is_ebusy():
    """The tree has become an FDT."""
    kho = Kho(small_machine().memory, abi=HOME)
    kho.finalize()

    assert errno_of(kho.add_node, None, "n", KhoNode()) == EBUSY


def test_kho_add_node_in_a_generation_without_is_eopnotsupp():
    """Later generations have subtrees."""
    kho = Kho(small_machine().memory, abi="kho-v4")

    assert errno_of(kho.add_node, None, "n", KhoNode()) == errno.EOPNOTSUPP


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_finalize_by_hand_before_reboot_is_ebusy_and_cancels_all(behaviour, log):
    """LUO adds its node at REBOOT: a tree that is an FDT already fails it (1.13)."""
    kernel = in_state("PREPARED", log, behaviour, kho_abi=HOME)
    kernel.kho.finalize()

    assert errno_of(kernel.luo.reboot) == EBUSY
    assert kernel.luo.state is State.NORMAL
    assert ("CANCEL", "subsystem", "sub", None) in log.calls


# ---- 1.2: liveupdate= and kho= ----

ON, OFF, MALFORMED = True, False, None
SPELLINGS = [
    *((text, ON) for text in ("y", "Y", "t", "T", "1", "e", "E", "on", "oN", "On", "ON")),
    *((text, ON) for text in ("yes", "true", "1x", "enable", "once", "yellow", "10", "on,off")),
    *((text, OFF) for text in ("n", "N", "f", "F", "0", "d", "D", "of", "oF", "Of", "OFF")),
    *((text, OFF) for text in ("no", "false", "0x1", "disable", "off", "often", "01")),
    *((text, MALFORMED) for text in ("", "o", "O", "ox", "2", "x", "-1", "+1", "=1", "ja", "?")),
]


@pytest.mark.parametrize("name", ["liveupdate", "kho"])
@pytest.mark.parametrize(("text", "meaning"), SPELLINGS)
def test_parameter_is_read_as_the_kernel_reads_a_bool(text, meaning, name, log, caplog):
    """The first character decides, after an ``o`` the second; what follows does not count."""
    other = "kho" if name == "liveupdate" else "liveupdate"
    with caplog.at_level(logging.WARNING):
        kernel = small_kernel(small_machine(), log, cmdline=f"{other}=1 {name}={text}").boot()

    assert kernel.luo.enabled is (meaning is ON)
    assert ("malformed early option" in caplog.text) is (meaning is MALFORMED)


@pytest.mark.parametrize(
    ("cmdline", "enabled"),
    [
        ("", False),
        ("kho=1", False),
        ("liveupdate=1", False),
        ("kho=1 liveupdate", False),  # bare: malformed
        ("kho liveupdate=1", False),
        ("kho=1 liveupdate=1", True),
        ("liveupdate=1 kho=1", True),
        ("kho=1 liveupdate=1 liveupdate=0", False),  # the last one counts
        ("kho=1 liveupdate=0 liveupdate=1", True),
        ("kho=1 liveupdate=1 liveupdate=x", True),  # a malformed one changes nothing
        ("kho=1 liveupdate=1 liveupdate", True),
        ("kho=1 Liveupdate=1", False),
        ("kho=1 liveupdate.x=1", False),
        ("kho=0 liveupdate=1", False),
    ],
)
def test_live_update_needs_both_parameters(cmdline, enabled, log):
    """Off unless both are on; without, it ends in NORMAL, has no directory and no groups."""
    kernel = small_kernel(small_machine(), log, cmdline=cmdline).boot()

    assert kernel.luo.enabled is enabled
    assert kernel.luo.initialised is enabled
    assert bool(kernel.devices.grouped.all()) is enabled
    assert kernel.luo.state is State.NORMAL


# ---- 1.3: the new kernel's checks, in their order ----

VERSION = struct.pack("=II", 1, 0)


def left_behind(kho_abi, version, name="version"):
    """A machine whose last kernel left LUO's node as it is forged here, and the handover."""
    machine = small_machine()
    kernel = Kernel(machine, kho_abi=kho_abi).boot()
    if kernel.kho.generation.inline:
        node = KhoNode()
        node.properties.update({} if version is None else {name: version})
        kernel.kho.add_node(None, abi.LUO_NODE, node)
    else:
        writer = FdtWriter()
        with writer.node(""):
            if version is not None:
                writer.property(name, version)
        kernel.kho.save_subtree(abi.LUO_NODE, bytes(writer.finish()))
    handover = kernel.kho.handover()
    kernel.close()
    return machine, handover


ENABLED, DISABLED, NO_KHO = "kho=1 liveupdate=1", "kho=1 liveupdate=0", "kho=0 liveupdate=1"
#: (version, command line): what the panic names, or None for UPDATED.
BOOTS = [
    (VERSION, ENABLED, None),
    (VERSION, DISABLED, "off"),
    (VERSION, NO_KHO, "off"),
    *((bytes(n), ENABLED, "version") for n in (0, 1, 4, 7, 9, 12, 16)),
    (None, ENABLED, "version"),
    (struct.pack("=II", 0, 0), ENABLED, "version"),
    (struct.pack("=II", 2, 0), ENABLED, "version"),
    (struct.pack("=II", 1, 1), ENABLED, "version"),
    (struct.pack("=II", 0xFFFFFFFF, 0), ENABLED, "version"),
    (struct.pack("=II", 1, 0xFFFFFFFF), ENABLED, "version"),
    (struct.pack(">II", 1, 0), ENABLED, "version"),  # it is the host's order, not FDT's
    # the version is looked at first
    (None, DISABLED, "version"),
    (VERSION[:7], DISABLED, "version"),
    (struct.pack("=II", 2, 0), DISABLED, "version"),
    (struct.pack("=II", 1, 1), NO_KHO, "version"),
]


@pytest.mark.parametrize("kho_abi", ["kho-v4", HOME])
@pytest.mark.parametrize(("version", "cmdline", "panics"), BOOTS)
def test_boot_check(version, cmdline, panics, kho_abi):
    """What the new kernel does with LUO's node: length, version, feature, in this order."""
    machine, handover = left_behind(kho_abi, version)
    kernel = Kernel(machine, kho_abi=kho_abi, cmdline=cmdline)
    if panics:
        with pytest.raises(KernelPanic, match=panics):
            kernel.boot(handover)
        assert machine.running is None
    else:
        assert kernel.boot(handover).luo.state is State.UPDATED
        assert kernel.luo.finish().unreclaimed == ()


@pytest.mark.parametrize("kho_abi", ["kho-v4", HOME])
@pytest.mark.parametrize(
    ("own", "found", "panics"),
    [
        ((1, 3), (1, 0), False),
        ((1, 3), (1, 2), False),
        ((1, 3), (1, 3), False),
        ((1, 3), (1, 4), True),
        ((1, 3), (0, 3), True),
        ((2, 0), (1, 0), True),
    ],
)
def test_boot_with_another_minor(own, found, panics, kho_abi, monkeypatch):
    """An older minor is accepted, a newer one and any other major are not."""
    machine, handover = left_behind(kho_abi, struct.pack("=II", *found))
    monkeypatch.setattr(abi, "LUO_VERSION", own)
    kernel = Kernel(machine, kho_abi=kho_abi)
    if panics:
        with pytest.raises(KernelPanic, match="version"):
            kernel.boot(handover)
    else:
        assert kernel.boot(handover).luo.state is State.UPDATED


@pytest.mark.parametrize("kho_abi", ["kho-v4", HOME])
def test_boot_with_the_version_under_another_name_panics(kho_abi):
    """A property that is missing has no length either."""
    machine, handover = left_behind(kho_abi, VERSION, "Version")
    with pytest.raises(KernelPanic, match="version"):
        Kernel(machine, kho_abi=kho_abi).boot(handover)


@pytest.mark.parametrize("cmdline", [ENABLED, DISABLED, NO_KHO])
@pytest.mark.parametrize("how", ["cold", "no node"])
def test_boot_without_luo_node_is_normal(how, cmdline, log):
    """No handover, or one without LUO's node: NORMAL, whatever is on."""
    machine = small_machine()
    before = small_kernel(machine, log).boot()
    handover = before.kho.handover() if how == "no node" else None
    before.close()

    assert small_kernel(machine, log, cmdline=cmdline).boot(handover).luo.state is State.NORMAL


def test_boot_into_updated_is_no_transition(log, caplog):
    """The first state is set without a message of a transition and wakes no poller."""
    kernel = in_state("PREPARED", log)
    machine = kernel.machine
    successor = small_kernel(machine, log)
    kernel.kexec_load(successor)
    woken = []
    machine.watchers.append(woken.append)
    with caplog.at_level(logging.INFO, "luo"):
        kernel.kexec()

    assert "live update boot" in caplog.text
    assert "switched" not in caplog.text
    assert "kernel/liveupdate/state" not in woken


# ---- the lock: who waits, and who can be killed ----


def waiting(thread):
    """Return once *thread* waits for the lock of the state."""
    while True:
        frame, inside = sys._current_frames().get(thread.ident), False
        while frame is not None:
            inside |= frame.f_code.co_filename == threading.__file__
            if inside and frame.f_code.co_filename == state_lock.__file__:
                return
            frame = frame.f_back
        time.sleep(0.001)


class Other(threading.Thread):
    """Another thread that does one thing; its outcome is an errno, 0, or what it returned."""

    def __init__(self, call, *arguments):
        super().__init__(daemon=True)
        self._call = call, arguments
        self.outcome = NOT_SET
        self.start()

    def run(self):
        call, arguments = self._call
        try:
            self.outcome = call(*arguments)
        except OSError as error:
            self.outcome = error.errno

    def ended(self):
        """Wait for it; returns its outcome."""
        self.join(60)
        assert not self.is_alive()
        return self.outcome


@contextlib.contextmanager
def event_running(kernel, log, event="PREPARE"):
    """An event runs in another thread, and is held in a callback while the block lasts."""
    begun, go_on = threading.Event(), threading.Event()

    def hold(_):
        begun.set()
        assert go_on.wait(60)

    log.hooks[event, "subsystem", "sub", None] = hold
    thread = Other(TRIGGERS[event.lower()], kernel)
    assert begun.wait(60)
    try:
        yield
    finally:
        go_on.set()
        thread.ended()


def read(kernel):
    """Enter and leave the state lock as a reader; returns the state."""
    with kernel.luo.read_state() as now:
        return now.name


#: What does not wait while an event runs (1.1: a lock-free read; 1.9: the same value).
FREE = {
    "state": (lambda kernel: kernel.luo.state.name, "NORMAL"),
    "requested": (lambda kernel: bool(kernel.devices[NIC].requested), True),
    "preserved": (lambda kernel: bool(kernel.devices[DISK].preserved), False),
    "request again": (toggle(NIC, True), None),
    "clear again": (toggle(DISK, False), None),
}


@pytest.mark.parametrize("what", FREE)
def test_reader_without_lock_does_not_wait_for_an_event(what, log):
    """State, flags and a write of the value that is there are answered while callbacks run."""
    kernel = in_state("NORMAL", log)
    call, answer = FREE[what]
    with event_running(kernel, log):
        thread = Other(call, kernel)

        assert thread.ended() == answer


#: What waits until PREPARE is over, and what it comes to then.
WAITS = {
    "read_state": (read, "PREPARED"),
    "request": (TRIGGERS["request"], EINVAL),
    "prepare": (TRIGGERS["prepare"], EINVAL),
    "cancel": (lambda kernel: kernel.luo.cancel().failures, ()),
    "finish": (TRIGGERS["finish"], EINVAL),
    "register": (TRIGGERS["register"], EBUSY),
    "unregister": (TRIGGERS["unregister"], EBUSY),
    "bind": (TRIGGERS["bind"], EBUSY),
    "unbind": (TRIGGERS["unbind"], EBUSY),
}


@pytest.mark.parametrize("what", WAITS)
def test_reader_and_writer_wait_for_an_event(what, log):
    """Whoever needs the state to stand still waits, and then meets the new state."""
    kernel = in_state("NORMAL", log)
    call, answer = WAITS[what]
    with event_running(kernel, log):
        thread = Other(call, kernel)
        waiting(thread)

        assert thread.outcome is NOT_SET
    assert thread.ended() == answer


def test_reboot_waits_for_an_event_and_looks_at_the_state_again(log):
    """A reboot that waited for a cancel is an ordinary kexec (1.14, 10)."""
    kernel = in_state("PREPARED", log)
    with event_running(kernel, log, "CANCEL"):
        thread = Other(TRIGGERS["reboot"], kernel)
        waiting(thread)

    assert thread.ended() is False
    assert log.of("REBOOT") == []


def test_readers_do_not_wait_for_each_other(log):
    """Any number of threads hold the state at once."""
    kernel = in_state("NORMAL", log)
    with kernel.luo.read_state():
        assert Other(read, kernel).ended() == "NORMAL"
        assert Other(TRIGGERS["request"], kernel).ended() is None


@pytest.mark.parametrize(
    ("event", "state"), [("prepare", "NORMAL"), ("cancel", "PREPARED"), ("finish", "UPDATED")]
)
def test_event_waits_for_readers(event, state, log):
    """An event begins when the last reader has left."""
    kernel = in_state(state, log)
    with kernel.luo.read_state():
        thread = Other(TRIGGERS[event], kernel)
        waiting(thread)

        assert log.calls == []
        assert kernel.luo.state.name == state
    thread.ended()
    assert log.calls != []


#: (what waits, state, errno when it is killed): 1.4, 1.6 and 1.9.
KILLED = [
    ("prepare", "NORMAL", EAGAIN),
    ("cancel", "PREPARED", EAGAIN),
    ("reboot", "PREPARED", EAGAIN),
    ("finish", "UPDATED", EAGAIN),
    ("read_state", "NORMAL", EINTR),
    ("request", "NORMAL", EAGAIN),
]


@pytest.mark.parametrize(("what", "state", "code"), KILLED)
def test_waiting_thread_that_is_killed_gives_up(what, state, code, log):
    """A fatal signal ends the wait for the lock; nothing has happened, and others go on."""
    kernel = in_state(state, log)
    if what in ("read_state", "request"):
        with event_running(kernel, log):
            thread = Other(WAITS[what][0], kernel)
            waiting(thread)

            assert kernel.luo.kill(thread.ident)
            assert thread.ended() == code
        assert not kernel.devices.requested[4]
        assert kernel.luo.state is State.PREPARED
        return
    with kernel.luo.read_state():
        thread = Other(TRIGGERS[what], kernel)
        waiting(thread)

        assert kernel.luo.kill(thread.ident)
        assert thread.ended() == code
    assert log.calls == []
    assert kernel.luo.state.name == state
    TRIGGERS[what](kernel)


def test_kill_of_a_thread_that_does_not_wait_does_nothing(log):
    """Neither now nor when it waits later."""
    kernel = in_state("NORMAL", log)
    assert not kernel.luo.kill(threading.get_ident())
    kernel.luo.prepare()
    kernel.luo.cancel()


def test_interrupt_of_the_main_thread_ends_its_wait(log):
    """^C in the main thread interrupts the wait for the lock, and nothing has happened."""
    kernel = in_state("NORMAL", log)
    main, held, let_go = threading.main_thread(), threading.Event(), threading.Event()

    def hold():
        with kernel.luo.read_state():
            held.set()
            waiting(main)
            signal.pthread_kill(main.ident, signal.SIGINT)
            let_go.wait(60)

    thread = Other(hold)
    assert held.wait(60)
    with pytest.raises(KeyboardInterrupt):
        kernel.luo.prepare()
    assert kernel.luo.state is State.NORMAL
    let_go.set()
    thread.ended()
    kernel.luo.prepare()


# ---- 1.6: who is called in which order ----

#: Priorities in the order of registration (d: the devices, which come with the kernel).
ORDERS = [
    # registered, intended, rfc1
    ("0 1 2", "0 1 d 2", "2 1 d 0"),
    ("2 1 0", "0 1 d 2", "2 1 d 0"),
    ("1 1 1", "1a 1b 1c d", "1a 1b 1c d"),
    ("0 0 2 2", "0a 0b d 2a 2b", "2a 2b d 0a 0b"),
    ("2 0 2 0", "0a 0b d 2a 2b", "2a 2b d 0a 0b"),
    ("1 0 1 2 0", "0a 0b 1a 1b d 2", "2 1a 1b d 0a 0b"),
    ("1 d 1", "1a d 1b", "1a d 1b"),
    ("d 0 1 2", "0 d 1 2", "2 d 1 0"),
    ("2 d 1 1 0", "0 d 1a 1b 2", "2 d 1a 1b 0"),
]


def named(text):
    """Names of the subsystems in *text*: equal priorities get a letter each."""
    words = text.split()
    return [
        word if word == "d" or words.count(word) == 1 else word + "abc"[words[:at].count(word)]
        for at, word in enumerate(words)
    ]


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize(("registered", "intended", "rfc1"), ORDERS)
def test_chain_order(registered, intended, rfc1, behaviour, log):
    """By priority, then by registration; intended, CANCEL and FINISH go the other way round."""
    names = named(registered)
    subsystems = [
        name if name == "d" else log.subsystem(name, priority=int(name[0])) for name in names
    ]
    cut = names.index("d") if "d" in names else len(names)

    def make(machine):
        drivers = {"nic": log.ops("driver", "nic")}
        return plain_kernel(
            machine, drivers, {"pci": None}, subsystems=subsystems[:cut], behaviour=behaviour
        )

    machine = Machine("64MiB", forest({"nic0": (None, "nic")}))
    kernel = make(machine).boot()
    for subsystem in subsystems[cut + 1 :]:
        kernel.luo.register(subsystem)
    kernel.devices.request("*")
    kernel.luo.prepare()
    if behaviour == "intended":
        kernel.luo.dry_reboot()
        forwards, backwards = intended.split(), intended.split()[::-1]
    else:
        kernel.luo.cancel()
        kernel.luo.prepare()
        forwards, backwards = rfc1.split(), rfc1.split()

    def order(event):
        return ["d" if kind == "driver" else name for _, kind, name, _ in log.of(event)]

    def called(event):
        seen = order(event)
        return seen[: len(seen) // 2] if event == "PREPARE" and behaviour == "rfc1" else seen

    assert called("PREPARE") == forwards
    assert order("CANCEL") == backwards
    if behaviour == "intended":
        assert order("REBOOT") == forwards


@pytest.mark.parametrize(("behaviour", "order"), [("intended", "2 d 1 0"), ("rfc1", "2 1 0")])
def test_finish_order(behaviour, order, log):
    """FINISH goes against PREPARE; in RFC v1's code it does not, and meets no device."""
    machine = Machine("64MiB", forest({"nic0": (None, "nic")}))

    def make():
        parts = [log.subsystem(name, priority=int(name)) for name in "012"]
        drivers = {"nic": log.ops("driver", "nic")}
        return plain_kernel(machine, drivers, {}, subsystems=parts, behaviour=behaviour)

    kernel = make().boot()
    kernel.devices.request("*")
    updated(kernel, make()).luo.finish()

    assert ["d" if call[1] == "driver" else call[2] for call in log.of("FINISH")] == order.split()


# ---- 1.11: who is shut down ----

LIFE = [PORT, NIC, "pci0/port/nic1", DISK]
KEPT = {PORT, NIC}  # the NIC is requested, its port goes with it


def ends_by_kexec(kernel, make):
    """Jump."""
    kernel.kexec_load(make())
    kernel.kexec()


def ends_by_shutdown(kernel, make):
    """Power off."""
    kernel.shutdown()


#: (state, end, behaviour): which devices are not shut down. It counts for every kind of end.
ENDS = [
    ("NORMAL", ends_by_kexec, "intended", set()),
    ("NORMAL", ends_by_shutdown, "intended", set()),
    ("PREPARED", ends_by_kexec, "intended", KEPT),
    ("PREPARED", ends_by_shutdown, "intended", KEPT),
    ("UPDATED", ends_by_kexec, "intended", KEPT),
    ("UPDATED", ends_by_shutdown, "intended", KEPT),
    ("cancelled", ends_by_kexec, "intended", set()),
    ("cancelled", ends_by_shutdown, "intended", set()),
    ("cancelled after REBOOT", ends_by_kexec, "intended", set()),
    ("cancelled after REBOOT", ends_by_shutdown, "intended", set()),
    ("finished", ends_by_kexec, "intended", set()),
    ("finished", ends_by_shutdown, "intended", set()),
    ("NORMAL", ends_by_kexec, "rfc1", set()),
    ("PREPARED", ends_by_kexec, "rfc1", KEPT),
    ("PREPARED", ends_by_shutdown, "rfc1", KEPT),
    ("UPDATED", ends_by_kexec, "rfc1", set()),  # quirk 4: nobody knows of them
    ("cancelled", ends_by_shutdown, "rfc1", set()),
    ("cancelled after REBOOT", ends_by_kexec, "rfc1", KEPT),  # quirk 6: the flag stays
    ("cancelled after REBOOT", ends_by_shutdown, "rfc1", KEPT),
    ("finished", ends_by_kexec, "rfc1", set()),
]


@pytest.mark.parametrize(("state", "end", "behaviour", "kept"), ENDS)
def test_shutdown_skips_preserved_devices(state, end, behaviour, kept):
    """Whatever ends a kernel shuts down the devices that are not preserved, last one first."""
    machine, down = small_machine(), []

    def make():
        return Kernel(
            machine,
            drivers=[
                Driver(name, TABLE, shutdown=lambda device: down.append(device.path))
                for name in ("portdrv", "nic", "nvme")
            ],
            buses=[Bus("pci", TABLE)],
            behaviour=behaviour,
        )

    kernel = make().boot()
    kernel.devices.request_one(2, True)
    if state != "NORMAL":
        kernel.luo.prepare()
    if state in ("UPDATED", "finished"):
        kernel = updated(kernel, make())
    if state == "finished":
        kernel.luo.finish()
    if state == "cancelled":
        kernel.luo.cancel()
    if state == "cancelled after REBOOT":
        kernel.luo.dry_reboot()
    down.clear()
    end(kernel, make)

    assert down == [path for path in LIFE[::-1] if path not in kept]
