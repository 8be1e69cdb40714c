"""RFC v1's quirks by name: what each sequence comes to without it, with it, and in all of rfc1."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import luo
from luo.abi import GENERATIONS
from luo.demonstrations import DEMONSTRATIONS, Stage, run
from luo.device import Bus, Driver, LiveUpdateOps
from luo.kernel import Kernel
from luo.machine import Machine
from luo.quirks import HOME, MAINLINE_QUIRKS, QUIRKS, resolve

#: What is seen, from spec/luo-rfc-v1.md 1.4 to 1.14: one value where the quirk changes nothing,
#: else (without it, with it), or (without it, with it, within all of rfc1). A depth from garbage
#: is here that of the device listed before: nic0, port, pci0 get 0, 3, 2; nic0, nic1, nic2 0, 1, 1.
SEEN = {
    "priorities-inverted": {
        "late registers AFTER_DEVICES": "ok",
        "early registers BEFORE_DEVICES": "ok",
        "request nic0": "ok",
        "echo 1 > prepare": "ok",
        "PREPARE calls": ("PREPARE early nic0 late", "PREPARE late nic0 early"),
        "dry reboot": "ok",
        "REBOOT calls": ("REBOOT early nic0 late", "REBOOT late nic0 early"),
    },
    "depth-from-garbage": {
        "request nic0": "ok",
        "echo 1 > prepare": "ok",
        "called": ("PREPARE nic0 port pci0", "PREPARE port pci0 nic0"),
    },
    "poll-never-wakes": {
        "a program polls kernel/liveupdate/state": "ok",
        "echo 1 > prepare": "ok",
        "notified": ("kernel/liveupdate/state", "kernel/state"),
    },
    "flags-not-restored": {
        "request nic0": "ok",
        "kexec -l the next kernel": "ok",
        "echo 1 > prepare": "ok",
        "kexec -e": "ok",
        "state": "UPDATED",
        "called in the next kernel": ("RESTORE nic0", "PROBE nic0"),
        "preserved": ("nic0", "none"),
        "echo 1 > finish": "ok",
        "called": ("FINISH nic0", "nobody"),
    },
    "node-left-behind": {
        "kexec -l a kernel with liveupdate=off": "ok",
        "echo 1 > prepare": "ok",
        "kexec -e, which that kernel refuses": "EPROTO",
        "echo 1 > prepare, again": "ok",
        "dry reboot": ("ok", "returns 1"),
        "called": "REBOOT mm, CANCEL mm",
        "state": "NORMAL",
        "kexec -l a good kernel": "ok",
        "kexec -e, an ordinary one": "ok",
        "state of the next kernel": ("NORMAL", "UPDATED"),
    },
    "list-freed-at-reboot": {
        "request nic0": "ok",
        "kexec -l a kernel with liveupdate=off": "ok",
        "echo 1 > prepare": "ok",
        "kexec -e, which that kernel refuses": "EPROTO",
        "called": (
            "PREPARE nic0, REBOOT nic0, CANCEL nic0",
            "PREPARE nic0, REBOOT nic0",
        ),
        "preserved": ("none", "nic0"),
        "poweroff": "ok",
        "called by the shutdown": ("SHUTDOWN nic0", "nobody"),
    },
    "reboot-half-cancelled": {
        "request nic0": "ok",
        "request nic1": "ok",
        "request nic2": "ok",
        "echo 1 > prepare": "ok",
        "dry reboot; nic1's callback fails": "EIO",
        "called": (
            "REBOOT nic0 nic1, CANCEL nic2 nic1 nic0",
            "REBOOT nic0 nic1, CANCEL nic0",
            "REBOOT nic1",
        ),
        "preserved": ("none", "nic1 nic2", "nic0 nic1 nic2"),
    },
    "no-image-check": {
        "echo 1 > prepare": "ok",
        "kexec -e, with no image loaded": "EINVAL",
        "called": ("nobody", "REBOOT mm, CANCEL mm"),
        "state": ("PREPARED", "NORMAL"),
    },
    "positive-return-stops": {
        "echo 1 > prepare; second returns +16": ("EINVAL", "ok"),
        "called": "PREPARE first second, CANCEL first",
        "state": ("NORMAL", "PREPARED"),
    },
    "state-tested-unlocked": {
        "echo 1 > prepare": "ok",
        "echo 0 > prepare, while the next step waits for the lock": "",
        "reboot(KEXEC)": ("ordinary kexec", "goes on"),
        "called": ("CANCEL mm", "CANCEL mm, REBOOT mm"),
        "state": "NORMAL",
    },
    "register-when-prepared": {
        "echo 1 > prepare": "ok",
        "late registers": ("EBUSY", "ok"),
        "early unregisters": ("EBUSY", "ok"),
        "dry reboot": "ok",
        "called": (
            "PREPARE early, REBOOT early, CANCEL early",
            "PREPARE early, REBOOT late, CANCEL late",
        ),
    },
    "eligibility-checked-once": {
        "request nic0": "ok",
        "request nic1": "ok",
        "echo 1 > prepare": "ok",
        "unbind nic0's driver": ("EBUSY", "ok"),
        "echo 0 > prepare": "ok",
        "called": (
            "PREPARE nic0 nic1, CANCEL nic1 nic0",
            "PREPARE nic0 nic1, CANCEL nic1",
            "PREPARE nic1 nic0, CANCEL nic1",
        ),
        "unbind nic1's driver": "ok",
        "echo 1 > prepare, again": ("EINVAL", "ok"),
        "called then": "nobody",
        "preserved": ("none", "nic0 nic1"),
    },
    "failure-stops-the-rest": {
        "echo 1 > prepare": "ok",
        "echo 0 > prepare; second's callback fails": "ok",
        "called": ("CANCEL third second first", "CANCEL third second", "CANCEL first second"),
        "failures": "second",
        "state": "NORMAL",
    },
    "cancel-not-reversed": {
        "echo 1 > prepare": "ok",
        "PREPARE calls": "PREPARE first second",
        "echo 0 > prepare": "ok",
        "CANCEL calls": ("CANCEL second first", "CANCEL first second"),
        "kexec -l the next kernel": "ok",
        "echo 1 > prepare, again": "ok",
        "kexec -e": "ok",
        "echo 1 > finish": "ok",
        "FINISH calls": ("FINISH second first", "FINISH first second"),
    },
    "scan-cursor-freed": {
        "request nic0": "ok",
        "request nic1": "ok",
        "nic0 is unplugged while the next step looks for requested devices": "",
        "echo 1 > prepare": ("ok", "kernel panic"),
        "called": ("PREPARE nic1", "nobody"),
    },
    "reference-leak": {
        "unbind port's driver": "ok",
        "bind it again: port is now behind nic0 in the list of devices": "ok",
        "request port": "ok",
        "request nic0": "ok",
        "echo 1 > prepare": "ok",
        "echo 0 > prepare": "ok",
        "references held on port": ("0", "1"),
        "references held on port/nic0": "0",
    },
    "change-owner-fails": {
        "boot with liveupdate=off": "ok",
        "move nic0 to a namespace owned by 1000": ("ok", "ENOENT"),
    },
    "groups-stay": {
        "boot with kho=off liveupdate=on": "ok",
        "with a liveupdate directory": ("none", "nic0"),
    },
    "initialised-despite-failure": {
        "another module makes kernel/liveupdate first": "ok",
        "boot": "ok",
        "initialised": ("no", "yes"),
        "a module asks for PREPARE": "ok",
        "notified": ("nobody", "kernel/liveupdate/state", "kernel/state"),
    },
    "requested-races": {
        "another program writes the same, just before the next step takes the lock": "",
        "request nic0": "ok",
        "requested": "1",
        "links in the list": ("1", "2"),
    },
    "callback-deadlock": {
        "echo 1 > prepare; mm's callback asks for the state": "ok",
        "the callback": ("goes on", "waits until it is killed"),
        "read_state() in it": ("EDEADLK", "EINTR"),
    },
    "no-callback-limit": {
        "echo 1 > prepare; mm takes a minute, the limit is a second": ("ETIMEDOUT", "ok"),
        "called": ("PREPARE mm, CANCEL mm", "PREPARE mm"),
        "state": ("NORMAL", "PREPARED"),
    },
    "warn-once": {
        "the first echo 1 > prepare": "ok",
        "the first echo 0 > prepare; mm's callback fails": "ok",
        "failures of the first": "mm",
        "the second echo 1 > prepare": "ok",
        "the second echo 0 > prepare; mm's callback fails": "ok",
        "failures of the second": ("mm", "none"),
    },
    "written-in-reboot": {
        "echo 32768 > kho/out/fdt_max": "ok",
        "kexec -l the next kernel": "ok",
        "echo 1 > prepare; log saves 64 KiB": ("E2BIG", "ok"),
        "called": ("PREPARE log disk, CANCEL disk log", "PREPARE log disk"),
        "kexec -e, if that worked": ("not reached", "ENOMEM"),
        "called by the reboot": (
            "nobody",
            "REBOOT log disk, CANCEL disk log",
            "REBOOT log disk, CANCEL log disk",
        ),
        "state": "NORMAL",
    },
    "stubs-do-not-compile": {
        "build a kernel for arm64": ("ok", "ENOEXEC"),
    },
    "disabled-by-user": {
        "boot with kho=off liveupdate=on": "ok",
        "dmesg": (re.compile(r"(?i)(?!.*user).*\bkho\b.*"), re.compile(".*disabled by user.*")),
    },
    "all-ancestors": {
        "port's driver does not support live update": "",
        "request nic0": ("ok", "EINVAL"),
        "echo 1 > prepare": "ok",
        "called": ("PREPARE nic0 pci0", "nobody"),
        "preserved": ("pci0 pci0/port/nic0", "none"),
    },
}

WITHOUT, WITH, WITHIN = range(3)


def wrong(rows, name, where):
    """Return {what: (expected, seen)} where *rows* are not what the table says."""
    expected = {
        what: value[min(where, len(value) - 1)] if isinstance(value, tuple) else value
        for what, value in SEEN[name].items()
    }
    seen = {row.text: row.seen for row in rows}

    assert [row.text for row in rows] == list(expected)
    return {
        what: (want, seen[what])
        for what, want in expected.items()
        if not (want.fullmatch(seen[what]) if isinstance(want, re.Pattern) else want == seen[what])
    }


# ---- the table ----


def test_quirks_every_one_has_a_demonstration_and_a_row():
    """The table of demonstrations has exactly the names of the table of quirks, in its order."""
    assert list(DEMONSTRATIONS) == list(QUIRKS) == list(SEEN)


@pytest.mark.parametrize("name", QUIRKS)
def test_demonstration_differs_as_the_specification_says(name):
    """The same steps come to one outcome without the quirk, and to another with it alone."""
    intended, quirk = run(name), run(name, quirks=(name,))

    assert wrong(intended, name, WITHOUT) == {}
    assert wrong(quirk, name, WITH) == {}
    assert wrong(quirk, name, WITHOUT)
    assert wrong(intended, name, WITH)


@pytest.mark.parametrize("name", QUIRKS)
def test_demonstration_within_rfc1_shows_the_quirk(name):
    """No quirk is hidden by the others: all of RFC v1 together shows each."""
    assert wrong(run(name, "rfc1"), name, WITHIN) == {}


@pytest.mark.parametrize("name", QUIRKS)
def test_demonstration_in_rfc1_without_the_quirk_does_not_show_it(name):
    """Taken out of RFC v1, the quirk is gone: what is shown comes from nothing else."""
    assert wrong(run(name, "rfc1", (f"-{name}",)), name, WITHIN)


@pytest.mark.parametrize("name", [name for name, quirk in QUIRKS.items() if not quirk.inline])
def test_demonstration_on_the_newest_generation_differs_alike(name):
    """What needs no inline tree can be had on Linux 7.3's handover too."""
    assert wrong(run(name, kho_abi="kho-v4"), name, WITHOUT) == {}
    assert wrong(run(name, quirks=(name,), kho_abi="kho-v4"), name, WITH) == {}


# ---- the other faces that the specification names ----


@pytest.mark.parametrize(
    ("quirks", "ended", "called", "state"),
    [
        ((), "EINVAL", "REBOOT first second, CANCEL third second first", "NORMAL"),
        (("positive-return-stops",), "ok", "REBOOT first second", "UPDATED"),
    ],
)
def test_positive_return_in_reboot_lets_the_jump_go_ahead(quirks, ended, called, state):
    """1.7: later subsystems are skipped, and the kexec goes ahead."""
    stage = Stage("intended", quirks, HOME)
    kernel = stage.boot(
        stage.subsystem("first"), stage.subsystem("second", reboot=16), stage.subsystem("third")
    )
    kernel.kexec_load(stage.kernel())
    kernel.luo.prepare()
    stage.called()
    stage.do("jump", kernel.kexec)
    with stage.running as running:
        assert stage.rows[-1].seen == ended
        assert stage.called() == called
        assert running.luo.state.name == state


@pytest.mark.parametrize(
    ("quirks", "called", "preserved"),
    [
        ((), "CANCEL bus.nic1 nic1 bus.nic0 nic0", [False, False]),
        (("reboot-half-cancelled",), "CANCEL nic0", [True, True]),
    ],
)
def test_reboot_of_a_bus_that_fails_cancels_the_driver_of_its_device(quirks, called, preserved):
    """1.10, 1.14: under the quirk the device whose bus fails gets its driver's CANCEL alone."""
    stage = Stage("intended", quirks, HOME)
    calls = []

    def note(event, who):
        def callback(device):
            calls.append((event, f"{who}{device.name}"))
            return -5 if (event, who) == ("REBOOT", "bus.") else None

        return callback

    def ops(who):
        return LiveUpdateOps(reboot=note("REBOOT", who), cancel=note("CANCEL", who))

    for name in ("nic0", "nic1"):
        stage.machine.devices.add(name, None, "pci", "nic")
    with Kernel(
        stage.machine,
        drivers=[Driver("nic", ops(""))],
        buses=[Bus("pci", ops("bus."))],
        kho_abi=HOME,
        quirks=quirks,
    ).boot() as kernel:
        kernel.devices.request("*")
        kernel.luo.prepare()
        stage.do("reboot", kernel.luo.reboot)
        cancelled = [who for event, who in calls if event == "CANCEL"]

        assert stage.rows[-1].seen == "EIO"
        assert " ".join(("CANCEL", *cancelled)) == called
        assert kernel.devices.preserved.tolist() == preserved


@pytest.mark.parametrize(
    ("quirks", "called"),
    [
        ((), "FINISH third second first"),
        (("failure-stops-the-rest",), "FINISH third second"),
        (("failure-stops-the-rest", "cancel-not-reversed"), "FINISH first second"),
    ],
)
def test_finish_that_fails_keeps_the_rest_from_being_called(quirks, called):
    """1.6: the chain stops at the failing callback of FINISH too; the state is NORMAL anyway."""
    stage = Stage("intended", quirks, HOME)

    def subsystems():
        return [
            stage.subsystem("first"),
            stage.subsystem("second", finish=-5),
            stage.subsystem("third"),
        ]

    kernel = stage.boot(*subsystems())
    kernel.kexec_load(stage.kernel(*subsystems()))
    kernel.luo.prepare()
    with kernel.kexec() as running:
        stage.called()
        failures = running.luo.finish().failures

        assert stage.called() == called
        assert [failure.name for failure in failures] == ["second"]
        assert running.luo.state.name == "NORMAL"


# ---- resolve() ----


def test_resolve_of_rfc1_is_all_of_them():
    """rfc1 starts with every quirk, intended with none."""
    assert resolve("rfc1", (), HOME) == frozenset(QUIRKS)
    assert resolve("intended", (), HOME) == frozenset()


def test_resolve_adds_and_takes_out():
    """A name adds, a name with a minus takes out; the last word counts."""
    assert resolve("intended", ("warn-once",), "kho-v4") == {"warn-once"}
    assert resolve("intended", "warn-once", "kho-v4") == {"warn-once"}
    assert resolve("rfc1", ("-warn-once",), HOME) == frozenset(QUIRKS) - {"warn-once"}
    assert resolve("intended", ("warn-once", "-warn-once"), "kho-v4") == frozenset()
    assert resolve("intended", ("-warn-once", "warn-once"), "kho-v4") == {"warn-once"}


@pytest.mark.parametrize("word", ["warn-twice", "-warn-twice", "", "-"])
def test_resolve_of_an_unknown_name_is_refused(word):
    """Who misspells a quirk is told."""
    with pytest.raises(ValueError, match="there is none of that name"):
        resolve("rfc1", (word,), HOME)


def test_resolve_of_an_unknown_behaviour_is_refused():
    """There are two behaviours."""
    with pytest.raises(ValueError, match="intended, rfc1"):
        resolve("rfc2", (), HOME)


@pytest.mark.parametrize("kho_abi", sorted(set(GENERATIONS) - {HOME}))
@pytest.mark.parametrize("name", [name for name, quirk in QUIRKS.items() if quirk.inline])
def test_resolve_of_what_the_generation_cannot_express_is_refused(name, kho_abi):
    """LUO's node stands in the root tree itself only where RFC v1 was posted."""
    with pytest.raises(ValueError, match=f"{name}: {kho_abi} cannot express it, {HOME} can"):
        resolve("intended", (name,), kho_abi)


def test_resolve_of_rfc1_elsewhere_needs_the_inline_ones_taken_out():
    """The rest of RFC v1 can be had on any generation."""
    inline = {name for name, quirk in QUIRKS.items() if quirk.inline}
    with pytest.raises(ValueError, match="kho-v4 cannot express it"):
        resolve("rfc1", (), "kho-v4")

    assert inline == {"node-left-behind", "written-in-reboot"}
    assert resolve("rfc1", [f"-{name}" for name in inline], "kho-v4") == set(QUIRKS) - inline


def test_kernel_of_rfc1_is_at_home_by_default():
    """Each behaviour has a generation of its own unless another is named."""
    machine = Machine("64MiB")
    rfc1, intended = Kernel(machine, behaviour="rfc1"), Kernel(machine)

    assert (rfc1.kho_abi, rfc1.behaviour, rfc1.quirks) == (HOME, "rfc1", frozenset(QUIRKS))
    assert (intended.kho_abi, intended.behaviour) == ("kho-v4", "intended")
    assert intended.quirks == frozenset()
    assert Kernel(machine, quirks=("warn-once",)).kho_abi == "kho-v4"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quirks": ("node-left-behind",)}, "kho-v4 cannot express it"),
        ({"behaviour": "rfc1", "kho_abi": "kho-v4"}, "kho-v4 cannot express it"),
        ({"behaviour": "rfc2"}, "this engine has intended, rfc1"),
        ({"quirks": ("warn-twice",)}, "there is none of that name"),
    ],
)
def test_kernel_with_quirks_that_cannot_be_is_refused(arguments, words):
    """A kernel is not built with what resolve() refuses."""
    with pytest.raises(ValueError, match=words):
        Kernel(Machine("64MiB"), **arguments)


# ---- the command ----


def luo_quirks(*arguments, columns=100):
    """Run ``luo quirks`` in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(luo.__file__).parents[1]),
        "COLUMNS": str(columns),
        "NO_COLOR": "1",
    }
    return subprocess.run(
        [sys.executable, "-P", "-m", "luo", "quirks", *arguments],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )


def words(text):
    """Return *text* without what depends on the width of the screen."""
    return " ".join(text.split())


@pytest.mark.parametrize("columns", [60, 100])
def test_quirks_lists_all_within_the_screen(columns):
    """Number, whole name, severity and what goes wrong; no line is wider than the terminal."""
    done = luo_quirks(columns=columns)
    lines = done.stdout.splitlines()

    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, lines)) <= columns
    for quirk in QUIRKS.values():
        pattern = rf"\s*{quirk.number}\s+{quirk.name}\s+{quirk.severity}\s+\S"
        assert [line for line in lines if re.match(pattern, line)], quirk.name
        assert set(quirk.wrong.split()) <= set(done.stdout.split()), quirk.name
    assert "…" not in done.stdout


def test_quirks_json_has_the_table():
    """--json: every field of every quirk, in order."""
    done = luo_quirks("--json")
    document = json.loads(done.stdout)

    assert done.returncode == 0
    assert document["schema"] == "luo-quirks/1"
    assert [row["name"] for row in document["quirks"]] == [*QUIRKS, *MAINLINE_QUIRKS]
    assert document["quirks"][4] == {
        "number": 5,
        "name": "node-left-behind",
        "severity": "A",
        "wrong": QUIRKS["node-left-behind"].wrong,
        "intended": QUIRKS["node-left-behind"].intended,
        "inline": True,
    }


@pytest.mark.parametrize("columns", [60, 100])
def test_quirks_show_has_steps_once_and_both_outcomes(columns):
    """The steps are numbered; both outcomes stand side by side, what differs has an asterisk."""
    done = luo_quirks("show", "no-image-check", columns=columns)

    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert words(done.stdout).startswith(
        "8 no-image-check intended: no image is EINVAL before anybody is called"
        " rfc1: REBOOT callbacks run although no kernel image is loaded step intended rfc1"
    )
    assert done.stdout.count("echo 1 > prepare") == 1
    assert re.search(r"^\s*1\s+echo 1 > prepare\s+ok\s+ok\s*$", done.stdout, re.M)
    assert re.search(r"^\s+state\s+PREPARED\s+NORMAL\s+\*\s*$", done.stdout, re.M)


def test_quirks_show_without_colour_marks_no_more_than_what_differs():
    """An asterisk is on each line that differs, and on no other."""
    done = luo_quirks("show", "positive-return-stops", columns=160)
    marked = [line for line in done.stdout.splitlines() if "*" in line]

    assert [words(line) for line in marked] == [
        "1 echo 1 > prepare; second returns +16 EINVAL ok *",
        "state NORMAL PREPARED *",
    ]


@pytest.mark.parametrize("name", ["8", "No-Image-CHECK"])
def test_quirks_show_takes_a_number_and_any_case(name):
    """As the list has them."""
    done = luo_quirks("show", name, columns=160)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("8 no-image-check\n")


def test_quirks_show_all_runs_every_demonstration():
    """--all: each quirk under its name, in order, with a difference in each."""
    done = luo_quirks("show", "--all", columns=100)
    parts = re.split(r"^(\d+ [a-z0-9-]+)$", done.stdout, flags=re.M)[1:]

    assert (done.returncode, done.stderr) == (0, "")
    assert parts[::2] == [f"{quirk.number} {quirk.name}" for quirk in QUIRKS.values()]
    assert all(" *" in part for part in parts[1::2])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("show", "warn-twice"),
            "luo: quirk warn-twice: there is none of that name; did you mean warn-once?",
        ),
        (("show", "nope"), "luo: quirk nope: there is none; 'luo quirks' lists them"),
        (("show", "28"), "luo: quirk 28: there is none; 'luo quirks' lists them"),
        (("show",), "luo: show: name a quirk, or --all"),
        (("show", "warn-once", "--all"), "luo: show: name a quirk, or --all"),
        (("--json", "show", "warn-once"), "luo: --json: not with show"),
    ],
)
def test_quirks_wrong_usage_is_one_line_and_status_2(arguments, line):
    """An unknown name is answered with one that is near, if there is any."""
    done = luo_quirks(*arguments)

    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")
