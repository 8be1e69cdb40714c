"""What RFC v1's code does against what it meant: one table, by name; and a second for Linux 7.3.

The numbers are those of ``spec/luo-rfc-v1.md`` 1.14; 27 is the announcement's promise that the code
does not keep. ``Kernel(behaviour="rfc1")`` has all of them, ``quirks=`` switches single ones, and
the code that differs asks ``name in kernel.quirks``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from luo import abi

__all__ = ["BEHAVIOURS", "HOME", "MAINLINE_QUIRKS", "QUIRKS", "Quirk", "generation_of", "resolve"]

#: What a kernel may be asked to do: what RFC v1 meant, or what its code does.
BEHAVIOURS: Final = ("intended", "rfc1")

#: Generation of the handover that RFC v1 was posted with.
HOME: Final = "kho-v5-series"


@dataclass(frozen=True, slots=True)
class Quirk:
    """One place where RFC v1's code does not do what it means.

    Attributes:
        number: of the list in the specification; 0 for those of Linux 7.3.
        name: switches it.
        severity: ``"A"`` wrong outcome, ``"B"`` leak or robustness, ``"C"`` cosmetic.
        wrong: what goes wrong, in one line.
        intended: what happens without it, in one line.
        inline: whether it needs a handover whose users' nodes stand in the root tree itself.
    """

    number: int
    name: str
    severity: str
    wrong: str
    intended: str
    inline: bool = False


def _table(*quirks: Quirk) -> Mapping[str, Quirk]:
    return {quirk.name: quirk for quirk in quirks}


#: Every quirk by name, in the order of the specification.
QUIRKS: Final = _table(
    Quirk(
        1,
        "priorities-inverted",
        "A",
        "AFTER_DEVICES runs first and BEFORE_DEVICES last, in every event",
        "BEFORE_DEVICES runs before the devices in PREPARE and REBOOT",
    ),
    Quirk(
        2,
        "depth-from-garbage",
        "A",
        "depths come from an uninitialised pointer: a parent may be prepared before its child",
        "children are prepared before their parents",
    ),
    Quirk(
        3,
        "poll-never-wakes",
        "A",
        "a change of state notifies kernel/state, which nobody polls",
        "it notifies kernel/liveupdate/state",
    ),
    Quirk(
        4,
        "flags-not-restored",
        "A",
        "the next kernel knows of no preserved device: FINISH calls nobody, state is lost",
        "flags are restored at boot, drivers restore and reclaim, FINISH reaches them",
    ),
    Quirk(
        5,
        "node-left-behind",
        "A",
        "LUO's node stays in KHO after a cancelled reboot: the next ordinary kexec boots as"
        " UPDATED, the next live update fails with 1",
        "a rollback takes the node out again",
        inline=True,
    ),
    Quirk(
        6,
        "list-freed-at-reboot",
        "A",
        "after REBOOT the list of devices is gone: a later failure cancels no device, and"
        " preserved stays 1",
        "the list is kept until the jump: every prepared device is cancelled",
    ),
    Quirk(
        7,
        "reboot-half-cancelled",
        "A",
        "a device that fails REBOOT, and all after it, are never cancelled: preserved stays 1",
        "every prepared device is cancelled",
    ),
    Quirk(
        8,
        "no-image-check",
        "A",
        "REBOOT callbacks run although no kernel image is loaded",
        "no image is EINVAL before anybody is called",
    ),
    Quirk(
        9,
        "positive-return-stops",
        "A",
        "a positive return stops the chain half-way and counts as success",
        "a positive return is EINVAL, and rolls back",
    ),
    Quirk(
        10,
        "state-tested-unlocked",
        "A",
        "a cancel between test and lock leads to REBOOT callbacks in NORMAL",
        "the state is tested again under the lock",
    ),
    Quirk(
        11,
        "register-when-prepared",
        "A",
        "who registers in PREPARED gets REBOOT without PREPARE, who unregisters no CANCEL",
        "both are EBUSY",
    ),
    Quirk(
        12,
        "eligibility-checked-once",
        "A",
        "a device whose driver went since the request is preserved with nothing saved",
        "PREPARE checks again, and a preserved device cannot be unbound",
    ),
    Quirk(
        13,
        "failure-stops-the-rest",
        "A",
        "a subsystem that fails FINISH or CANCEL keeps those behind it from being called",
        "everybody is called, failures are collected",
    ),
    Quirk(
        14,
        "cancel-not-reversed",
        "A",
        "CANCEL and FINISH go through the chain in the order of PREPARE",
        "they go in the reverse order",
    ),
    Quirk(
        15,
        "scan-cursor-freed",
        "B",
        "a device unplugged while PREPARE looks for requested ones is used after it is freed",
        "it is no longer looked at",
    ),
    Quirk(
        16,
        "reference-leak",
        "B",
        "a requested device whose requested child was handled first keeps a reference for ever",
        "every reference is dropped with the list",
    ),
    Quirk(
        17,
        "change-owner-fails",
        "B",
        "with live update off, changing the owner of any device is ENOENT",
        "it succeeds",
    ),
    Quirk(
        18,
        "groups-stay",
        "B",
        "with kho=off, devices added before that was known keep their liveupdate directory",
        "no device has one",
    ),
    Quirk(
        19,
        "initialised-despite-failure",
        "B",
        "LUO counts as initialised although its directory could not be made",
        "it does not, and notifies nobody",
    ),
    Quirk(
        20,
        "requested-races",
        "B",
        "two writers of one requested file both link the device",
        "the second finds that it is requested",
    ),
    Quirk(
        21,
        "callback-deadlock",
        "B",
        "a callback that reads the state or registers waits for itself until it is killed",
        "it gets EDEADLK",
    ),
    Quirk(
        22,
        "no-callback-limit",
        "B",
        "a callback may take as long as it likes",
        "one that takes longer than callback_limit is ETIMEDOUT, and rolls back",
    ),
    Quirk(
        23,
        "warn-once",
        "B",
        "the second failure of a FINISH or CANCEL callback, and all after it, are hidden",
        "the result names every failure",
    ),
    Quirk(
        24,
        "written-in-reboot",
        "B",
        "a state tree that does not fit is found out after the devices were told to stop",
        "it is E2BIG in PREPARE",
        inline=True,
    ),
    Quirk(
        25,
        "stubs-do-not-compile",
        "C",
        "a kernel without CONFIG_LIVEUPDATE, as every one but x86_64, does not compile",
        "it builds",
    ),
    Quirk(
        26,
        "disabled-by-user",
        "C",
        "the log says that the user disabled live update although it was KHO that is off",
        "it says which",
    ),
    Quirk(
        27,
        "all-ancestors",
        "A",
        "a device is refused if any ancestor lacks support, against the announcement",
        "the device and those of its ancestors that support live update are preserved",
    ),
)


#: What of Linux 7.3's sessions does not do what it means (luo-mainline 4.4); off unless named.
MAINLINE_QUIRKS: Final = _table(
    Quirk(
        0,
        "flb-finish-uncounted",
        "B",
        "files are counted down before it is known how many depend on an FLB: unless somebody asked"
        " for it before, it is never finished",
        "the FLB is finished with the last file that depends on it",
    ),
    Quirk(
        0,
        "sessions-empty-block",
        "A",
        "a session of a name that is taken, when the blocks are full, leaves an empty block: after"
        " the next live update the kernel panics",
        "the block is freed again",
    ),
)


def generation_of(behaviour: str, kho_abi: str | None) -> str:
    """Return *kho_abi*, or what a kernel of *behaviour* hands over with if it is None."""
    if kho_abi is not None:
        return kho_abi
    return HOME if behaviour == "rfc1" else "kho-v4"


def resolve(behaviour: str, quirks: Iterable[str], kho_abi: str) -> frozenset[str]:
    """Return the names of the quirks that a kernel has.

    Args:
        behaviour: ``"rfc1"`` starts with all of them, ``"intended"`` with none.
        quirks: names to add, or with a ``-`` in front to take out.
        kho_abi: generation of the handover.

    Raises:
        ValueError: there is no such behaviour or quirk, or the generation cannot express one.
    """
    if behaviour not in BEHAVIOURS:
        raise ValueError(f"behaviour {behaviour!r}: this engine has {', '.join(BEHAVIOURS)}")
    chosen = set(QUIRKS if behaviour == "rfc1" else ())
    for word in (quirks,) if isinstance(quirks, str) else quirks:
        if not isinstance(word, str):
            raise TypeError(f"quirk {word!r}: not a name")
        name = word.removeprefix("-")
        if name not in QUIRKS and name not in MAINLINE_QUIRKS:
            raise ValueError(f"quirk {name!r}: there is none of that name; see 'luo quirks'")
        if word.startswith("-"):
            chosen.discard(name)
        else:
            chosen.add(name)
    if not abi.generation(kho_abi).inline:
        for name in sorted(chosen & QUIRKS.keys()):
            if QUIRKS[name].inline:
                raise ValueError(f"quirk {name}: {kho_abi} cannot express it, {HOME} can")
    return frozenset(chosen)
