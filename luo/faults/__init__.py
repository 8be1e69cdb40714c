"""Faults on purpose: one live update for every callback, event and kind of fault.

After each, either everything is as before or the update is complete; a violation comes with the
shortest sequence that shows it, and in a kernel with quirks with the names of those behind it.

Happy path of :func:`run`: a kernel boots cold and is updated and cancelled once without a fault,
which tells who is called for what. Then each fault in turn happens in an update of that same
machine: after a rollback the kernel is as before, after an update its successor is the next one's
kernel.

Unhappy path: a violation is repeated on a fresh machine with fewer faults, devices and steps as
long as it shows. If the kernel has quirks, those whose removal cures it are taken out for the rest
of the campaign, so that one does not hide another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from luo.abi import generation
from luo.errors import LuoError
from luo.faults.injection import Call, Fault
from luo.faults.trial import (
    BEYOND,
    CANCEL,
    ENGINE,
    LEAVING,
    REBOUND,
    UNBOUND,
    UNLOADED,
    UPDATE,
    Build,
    Case,
    Rig,
    Subject,
    Trial,
    choose,
    unused,
)
from luo.kernel import Kernel, KernelImage
from luo.machine import Machine
from luo.report import version

__all__ = ["EVENTS", "KINDS", "Fault", "FaultReport", "FaultRow", "Violation", "run"]

#: Every kind of fault, in the order of the table.
KINDS: Final = ("errno", "positive", "exception", "delay", "memory", "death")

#: The events of a table, in the order in which they happen.
EVENTS: Final = (
    "LOAD",
    "STATE_SIZE",
    "PREPARE",
    "WAIT",
    "REBOOT",
    "VALIDATE",
    "SHUTDOWN",
    "BOOT",
    "RESTORE",
    "PROBE",
    "FINISH",
    "CANCEL",
)

Progress: TypeAlias = Callable[[int, int, str], None]

#: Kinds of faults that an event cannot have: nobody looks at the result, or times it.
_LEFT_OUT: Final = {
    "STATE_SIZE": ("delay",),
    "PROBE": ("positive", "delay", "death"),
    "SHUTDOWN": ("positive", "delay", "death"),
}

#: Bytes of KHO's tree that no tree has room in.
_NO_ROOM: Final = 64

#: The next kernel says no, while there is a way back.
REFUSAL: Final = Fault("image", "next kernel", "VALIDATE", "errno")

#: What a violation is put down to that no quirk explains.
_UNKNOWN: Final = ("unknown",)

_MANY: Final = 24  # allocations of one event that are all tried; of more, so many spread evenly
_TRIES: Final = 40  # fresh machines that one violation is worth


# ---- what comes out ----


@dataclass(frozen=True, slots=True)
class Violation:
    """Something half preserved.

    Attributes:
        checks: which checks failed, and what they found, as (check, text).
        sequence: the shortest sequence of steps that shows it.
        quirks: the quirks whose removal cures it; ``("unknown",)`` if none does.
    """

    checks: tuple[tuple[str, str], ...]
    sequence: tuple[str, ...]
    quirks: tuple[str, ...] = ()

    def __str__(self) -> str:
        why = f" [{', '.join(self.quirks)}]" if self.quirks else ""
        steps = [f"  {number}. {step}" for number, step in enumerate(self.sequence, 1)]
        found = [f"  {check}: {text}" for check, text in self.checks]
        return "\n".join((f"{len(steps)} steps{why}:", *steps, "then:", *found))


@dataclass(frozen=True, slots=True)
class FaultRow:
    """One live update, and what became of it.

    Attributes:
        faults: what was done to it; none for the update and the cancel without.
        where: path of the device, "" for none.
        outcome: ``"rolled back"``, ``"completed"`` or ``"crashed host, as it must"``.
        checks: names of the checks that were made.
        violations: what they found, in the order in which it was found.
    """

    faults: tuple[Fault, ...]
    where: str
    outcome: str
    checks: tuple[str, ...]
    violations: tuple[Violation, ...] = ()

    @property
    def kind(self) -> str:
        """Kind of the callback: subsystem, driver, bus, image or kernel."""
        return self.faults[0].kind if self.faults else "kernel"

    @property
    def name(self) -> str:
        """Name of whose callback it is."""
        return self.faults[0].name if self.faults else "no fault"

    @property
    def event(self) -> str:
        """Event, or the two events of a pair."""
        return " + ".join(fault.event for fault in self.faults)

    @property
    def fault(self) -> str:
        """Kind of the fault; "" without."""
        return self.faults[0].what if self.faults else ""


@dataclass(slots=True)
class FaultReport:
    """What a campaign found.

    Attributes:
        rows: one a live update.
        violations: each once, in the order in which they were found.
        quirks: names of the quirks that violate, each with what shows it.
        uncovered: callbacks, in words, that an update of this machine does not call.
        unused: drivers and buses, in words, that no device of this machine has.
        settings: the caller's.
        interrupted: whether ^C ended the campaign, so that not all was tried.
    """

    rows: list[FaultRow] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    quirks: dict[str, Violation] = field(default_factory=dict)
    uncovered: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        """Whether everything was tried, and nothing was ever half preserved."""
        return not self.violations and not self.interrupted

    @property
    def callbacks(self) -> set[tuple[str, str, str]]:
        """Every (kind, name, event) in which a fault happened."""
        return {fault.key for row in self.rows for fault in row.faults}

    def to_dict(self) -> dict[str, Any]:
        """Return the ``luo-faults/1`` document."""
        numbers = {id(violation): n for n, violation in enumerate(self.violations)}
        return {
            "schema": "luo-faults/1",
            "luo_version": version(),
            "settings": self.settings,
            "ok": self.ok,
            "interrupted": self.interrupted,
            "updates": len(self.rows),
            "uncovered": self.uncovered,
            "unused": self.unused,
            "quirks": {name: numbers[id(shown)] for name, shown in self.quirks.items()},
            "violations": [asdict(violation) for violation in self.violations],
            "rows": [
                {
                    "kind": row.kind,
                    "name": row.name,
                    "event": row.event,
                    "fault": row.fault,
                    "device": row.where or None,
                    "faults": [asdict(fault) for fault in row.faults],
                    "outcome": row.outcome,
                    "checks": list(row.checks),
                    "violations": [numbers[id(violation)] for violation in row.violations],
                }
                for row in self.rows
            ],
        }


# ---- the campaign ----


class _Shown(NamedTuple):
    """A case that violates *check*, on which devices, and what was seen."""

    case: Case
    devices: tuple[int, ...]
    trial: Trial
    check: str


def run(
    kernel: KernelImage | Build,
    machine: Callable[[], Machine],
    *,
    first: Build | None = None,
    requests: Iterable[str] = (),
    kinds: Iterable[str] = KINDS,
    pairs: bool = False,
    progress: Progress | None = None,
    report: FaultReport | None = None,
) -> FaultReport:
    """Update a machine again and again, with every fault at every callback.

    Args:
        kernel: the image of the kernels, or their factory, for which there is no second process:
            the faults of kind ``"death"`` are left out then.
        machine: makes a machine; always the same one.
        first: factory of the kernel that boots cold, if it is another.
        requests: globs of the devices that may be requested; all if there is none. Of these it
            takes three of each driver and each bus.
        kinds: of :data:`KINDS`.
        pairs: also two faults in one update: PREPARE or REBOOT and the CANCEL that follows,
            RESTORE and FINISH.
        progress: called before and after each update as ``progress(done, total, what)``; what it
            raises ends the campaign, and the update that it is called after does not count.
        report: filled as the campaign goes on: it has what was found when an exception ends that.

    Returns:
        what was found; it is not :attr:`~FaultReport.ok` if anything was half preserved.

    Raises:
        ValueError: there is no such kind, or no device that a request matches.
        LuoError: PREPARE fails without a fault.
    """
    image = kernel if isinstance(kernel, KernelImage) else None
    build = kernel.build if isinstance(kernel, KernelImage) else kernel
    wanted = tuple(kinds)
    for kind in wanted:
        if kind not in KINDS:
            raise ValueError(f"fault {kind!r}: {', '.join(KINDS)}")
    subject = Subject(machine, first or build, build, image)
    report = FaultReport() if report is None else report
    try:
        campaign = _Campaign(subject, tuple(requests), wanted, progress, report)
        try:
            campaign.run(pairs)
        finally:
            campaign.close()
    except KeyboardInterrupt:
        report.interrupted = True
        raise
    return report


class _Campaign:
    def __init__(
        self,
        subject: Subject,
        requests: tuple[str, ...],
        kinds: tuple[str, ...],
        progress: Progress | None,
        report: FaultReport,
    ) -> None:
        self.subject = subject
        self.kinds = kinds if subject.image else tuple(k for k in kinds if k != "death")
        self.report = report
        self._progress = progress
        self._total = 0
        with subject.first(subject.machine()) as kernel:
            self.quirks = frozenset(kernel.quirks)
            self.devices = self._chosen(kernel, requests)
            self._inline = generation(kernel.kho_abi).inline
            self._bound = [n for n in self.devices if kernel.devices.driver_ids[n] >= 0]
            below = kernel.devices.below
            self._ports = [n for n in self._bound if below(n)[list(self.devices)].any()]
            self.report.unused += unused(kernel)
        self._rig: Rig | None = None
        self._explained: dict[Any, list[Violation]] = {}
        self._light = False

    def close(self) -> None:
        """Switch the machine off."""
        if self._rig is not None:
            self._rig.close()
            self._rig = None

    @staticmethod
    def _chosen(kernel: Kernel, requests: tuple[str, ...]) -> tuple[int, ...]:
        if not requests:
            return choose(kernel)
        among = np.zeros(len(kernel.devices.requested), np.bool_)
        for glob in requests:
            found = kernel.devices.tree.match(glob)
            if not found.any():
                raise ValueError(f"request {glob}: no device matches")
            among |= found
        return choose(kernel, among)

    # ---- all cases ----

    def run(self, pairs: bool) -> None:
        """Run every case."""
        sites = self._learn()
        cases = [*self._callback_cases(sites), *self._engine_cases()]
        if pairs:
            cases += self._pairs(sites)
        self._run(cases)
        missing = self._keys - set(sites)
        if any(event in ("PROBE", "SHUTDOWN") for *_, event in missing) and self.devices:
            # All devices of that driver are preserved, so nobody probes them or shuts them down.
            self.close()
            self.devices = ()
            others = {key: calls for key, calls in self._learn().items() if key in missing}
            self._run([*self._callback_cases(others)])
            missing -= set(others)
        self.report.uncovered += sorted(
            " ".join(key) for key in missing if " ".join(key[:2]) not in self.report.unused
        )

    def _run(self, cases: list[Case]) -> None:
        self._total = len(self.report.rows) + len(cases)
        for case in cases:
            self._case(case)

    def _tell(self, what: str) -> None:
        if self._progress is not None:
            self._progress(len(self.report.rows), self._total, what)

    def _learn(self) -> dict[tuple[str, str, str], list[Call]]:
        """Update and cancel once without a fault, and return who was called, by key."""
        sites: dict[tuple[str, str, str], list[Call]] = {}
        for case in (Case(script=CANCEL, after="kexec"), Case()):
            trial = self._case(case)
            for call in trial.calls:
                if (call.event == "CANCEL") == (case.script == CANCEL):
                    sites.setdefault(call.key, []).append(call)
        self._keys = trial.old_watch.keys
        self._batched = trial.old_watch.batched
        self._allocations = trial.allocations
        return sites

    def _case(self, case: Case) -> Trial:
        """Run *case*, and find out about each violation; as often as a quirk is found behind it."""
        self._tell(_title(case))
        violations: list[Violation] = []
        while True:
            rig = self._rig = self._rig or Rig(self.subject, self.quirks, self.devices)
            history = tuple(rig.history)
            trial = rig.run(case)
            self._tell(_title(case))  # ^C in a callback, which looks like a fault, is no result
            if not trial.wrong:
                break
            self.close()
            found = self._explain(replace(case, history=(*history, *case.history)), trial)
            violations += found
            taken = {quirk for one in found for quirk in one.quirks}
            if not taken & self.quirks:
                break
            self.quirks -= taken
        where = trial.path_of(case.faults[0].device) if case.faults else ""
        row = FaultRow(case.faults, where, trial.outcome, tuple(trial.checks), tuple(violations))
        self.report.rows.append(row)
        return trial

    def _callback_cases(self, sites: dict[tuple[str, str, str], list[Call]]) -> Iterator[Case]:
        for key in sorted(sites, key=lambda key: (EVENTS.index(key[2]), key)):
            for what in self.kinds:
                for number, fault in enumerate(self._variants(key, what, sites[key])):
                    script = CANCEL if fault.event == "CANCEL" else UPDATE
                    # What must work afterwards is tried once a callback and kind: in turn.
                    after = ("update", "kexec")[KINDS.index(what) % 2] if not number else ""
                    yield Case((fault,), script, after)
                    if script == CANCEL and what == "errno" and not number:
                        again = Case((fault,), script)  # the second failure is told as well
                        yield replace(again, history=(again,))

    def _variants(self, key: tuple[str, str, str], what: str, calls: list[Call]) -> Iterator[Fault]:
        """Yield a fault at the first, a middle and the last device, or of a whole batch."""
        event = key[2]
        if what in _LEFT_OUT.get(event, ()):
            return
        devices = [device for call in calls for device in call.devices]
        batched = key in self._batched
        if batched or not devices:
            yield Fault(*key, what)
        one = what in ("errno", "positive") and event != "STATE_SIZE" if batched else bool(devices)
        if one:
            count = 1 if what == "death" else 3
            places = dict.fromkeys((0, len(devices) // 2, len(devices) - 1))
            for place in list(places)[:count]:
                yield Fault(*key, what, devices[place])

    def _engine_cases(self) -> Iterator[Case]:
        """Yield the faults that are no callback's."""
        if "death" in self.kinds:
            for event in ("LOAD", "WAIT", "VALIDATE", "BOOT"):
                yield Case((Fault("image", "next kernel", event, "death"),), after="update")
        if "errno" in self.kinds:
            for after in ("update", "kexec"):
                yield Case((REFUSAL,), after=after)
            yield Case((Fault("kernel", "no image", "REBOOT", "errno"),), script=UNLOADED)
            yield from self._going()
        if "memory" in self.kinds:
            for event, count in self._allocations.items():
                step = max(1.0, count / _MANY)
                places = sorted({1 + int(n * step) for n in range(min(count, _MANY))} | {count})
                for place in places if count else ():
                    yield Case((Fault(*ENGINE, event, "memory", None, place),))
            if self._inline:
                yield Case((Fault(*ENGINE, "PREPARE", "memory"),), room=_NO_ROOM)

    def _going(self) -> Iterator[Case]:
        """Yield updates in which a driver or a subsystem goes."""
        for script, who, devices in (
            (UNBOUND, "driver gone", self._bound),
            (REBOUND, "driver bound anew", self._ports),
        ):
            for index in devices[:1]:
                yield Case((Fault("kernel", who, "PREPARE", "errno", index),), script)
        if any(kind == "subsystem" for kind, _, _ in self._keys):
            yield Case((Fault("kernel", "subsystem gone", "CANCEL", "errno"),), LEAVING)

    def _pairs(self, sites: dict[tuple[str, str, str], list[Call]]) -> Iterator[Case]:
        """Yield two faults in one update, of one kind."""
        for firsts, second in ((("PREPARE", "REBOOT"), "CANCEL"), (("RESTORE",), "FINISH")):
            for what in (kind for kind in ("errno", "exception") if kind in self.kinds):
                lasts = {
                    key: list(self._variants(key, what, calls))[-1]
                    for key, calls in sites.items()
                    if key[2] in (*firsts, second)
                }
                ones = [fault for key, fault in lasts.items() if key[2] in firsts]
                if what == "errno" and second == "CANCEL":
                    ones.append(REFUSAL)
                twos = [fault for key, fault in lasts.items() if key[2] == second]
                for one in ones:
                    for two in twos:
                        yield Case((one, two))

    # ---- a violation ----

    def _explain(self, case: Case, trial: Trial) -> list[Violation]:
        """Find the shortest sequence that shows what *trial* found, and the quirks behind it.

        Returns:
            a violation; several if the sequence shows the work of several quirks.
        """
        key = (tuple(fault.key for fault in case.faults), trial.wrong[0][0])
        if not self.quirks and key in self._explained:
            return self._explained[key]
        shown = self._shorten(case, trial)
        found: list[Violation] = []
        for guilty, checks in self._guilty(shown).items():
            violation = Violation(tuple(checks), tuple(shown.trial.steps), guilty)
            known = [
                other
                for other in self.report.violations
                if (other.sequence, other.quirks) == (violation.sequence, violation.quirks)
            ]
            found += known or [violation]
            if known:
                continue
            self.report.violations.append(violation)
            if guilty != _UNKNOWN:
                for quirk in guilty:
                    self.report.quirks.setdefault(quirk, violation)
        self._explained[key] = found
        return found

    def _shows(
        self, case: Case, devices: tuple[int, ...], check: str, quirks: frozenset[str]
    ) -> _Shown | None:
        """Try *case* on a fresh machine; None if *check* does not fail."""
        self._tell(f"shortening: {_title(case)}")
        try:
            # Without what only the first kernel has it is faster, and as good if it shows there.
            subject = self.subject
            if self._light:
                subject = replace(subject, first=subject.successor)
            rig = Rig(subject, quirks, devices)
        except LuoError:
            return None
        try:
            trial = rig.run(case)
        finally:
            rig.close()
        if check not in dict(trial.wrong):
            return None
        return _Shown(case, devices, trial, check)

    def _shorten(self, case: Case, trial: Trial) -> _Shown:
        check = trial.wrong[0][0]
        best = _Shown(case, self.devices, trial, check)
        tries = iter(range(_TRIES))

        def attempt(case: Case, devices: tuple[int, ...]) -> bool:
            nonlocal best
            # Whose driver goes must be requested, or it is another case.
            kept = {fault.device for fault in case.faults if fault.kind == "kernel"} - {None}
            if not kept <= set(devices) or next(tries, None) is None:
                return False
            shown = self._shows(case, devices, check, self.quirks)
            if shown is not None:
                best = shown
            return shown is not None

        alone = replace(case, history=())
        self._light = self.subject.first is not self.subject.successor
        again = self._light and attempt(alone, self.devices)
        if not again:
            self._light = False
            again = attempt(alone, self.devices) or any(
                attempt(replace(case, history=(earlier,)), self.devices)
                for earlier in reversed(case.history)
            )
        if not again:
            others = f"# after {len(case.history)} other updates of the same machine"
            best.trial.steps.insert(0, others)
            return best
        for fewer in _simpler(best.case):
            if attempt(fewer, best.devices):
                break
        involved = {fault.device for fault in best.case.faults if fault.device is not None}
        for few in ((), tuple(sorted(involved)), *((one,) for one in self.devices[:8])):
            if len(few) < len(best.devices) and attempt(best.case, few):
                break
        # Half of them at a time, as long as that helps.
        size = len(best.devices) // 2
        while size and len(best.devices) > 1:
            for start in range(0, len(best.devices), size):
                if attempt(best.case, best.devices[:start] + best.devices[start + size :]):
                    break
            else:
                size //= 2
        return best

    def _guilty(self, shown: _Shown) -> dict[tuple[str, ...], list[tuple[str, str]]]:
        """Return what was found, by the quirks whose removal cures it."""
        found: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        by_check: dict[str, tuple[str, ...]] = {}
        for check, text in shown.trial.wrong:
            if check not in by_check:
                known = list(by_check.values())
                by_check[check] = self._behind(shown, check, known) if self.quirks else ()
            found.setdefault(by_check[check], []).append((check, text))
        return found

    def _behind(
        self, shown: _Shown, check: str, candidates: Iterable[tuple[str, ...]]
    ) -> tuple[str, ...]:
        """Return the quirks whose removal cures *check*: one if one does, else the fewest."""

        def cured(without: Iterable[str]) -> bool:
            left = self.quirks - set(without)
            return self._shows(shown.case, shown.devices, check, left) is None

        guilty = sorted(self.quirks)
        if cured(()) or not cured(guilty):  # a fresh machine does not show it, or any does
            return _UNKNOWN
        for quirks in (*candidates, *((quirk,) for quirk in guilty)):
            if cured(quirks):
                return quirks
        for quirk in list(guilty):
            rest = [other for other in guilty if other != quirk]
            if cured(rest):
                guilty = rest
        return tuple(guilty)


def _simpler(case: Case) -> Iterator[Case]:
    """Yield cases that are shorter than *case*, the shortest first."""
    yield Case(script=("prepare", "cancel"))
    if case.script != ("prepare", "cancel"):
        yield Case(script=CANCEL)
        yield Case()
    if any(fault.what == "death" and fault.event not in BEYOND for fault in case.faults):
        yield Case((REFUSAL,))
    for after in ("", case.after):
        for fault in case.faults:
            if len(case.faults) > 1:
                yield replace(case, faults=(fault,), after=after, history=())
    if case.history:
        yield replace(case, history=())
    if case.script == UPDATE and all(f.event in ("STATE_SIZE", "PREPARE") for f in case.faults):
        yield replace(case, script=("prepare",), after="", history=())
    if case.after:
        yield replace(case, after="")


def _title(case: Case) -> str:
    if not case.faults:
        return "no fault"
    return " and ".join(f"{f.name} {f.event}: {f.what}" for f in case.faults)
