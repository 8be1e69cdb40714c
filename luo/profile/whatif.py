"""Where blackout goes: the chain that bounds it, the slack of the rest, and what if.

A :class:`WhatIf` has the calls of one live update that were in blackout, each with what it cost
and what it waited for (:mod:`luo.profile.steps`), and the engine's own time: between the callbacks
and around them, publishing LUO's node, the jump, the new kernel's boot. From these it computes what
blackout would be if something were otherwise.

With one worker blackout is the sum of all that. With n workers it is what the engine's own rule
(:func:`luo.dev_liveupdate.shares`) makes of it: a stretch of devices of one depth, all of whose
callbacks are native and thread-safe, is cut into shares of equally many, and nothing else is called
until the longest share has ended. The longest chain is what no number of workers shortens.

All figures are in nanoseconds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from luo import abi
from luo._kho import CallRecorder
from luo.dev_liveupdate import shares
from luo.kernel import Kernel, live_update
from luo.machine import Machine
from luo.memory import parse_size
from luo.notifier import Context, Subsystem
from luo.profile.steps import REBOOT, RESTORE, Forest, Label, Phase, Recorded

__all__ = ["Answer", "Link", "Part", "WhatIf"]

#: How a callback is called: for many devices at once or for none, device by device, or that from
#: several threads.
_WHOLE, _SINGLE, _THREADS = 0, 1, 2

#: Folios that are laid out to measure what the map costs; more are reckoned from so many.
_MAX_FOLIOS: Final = 1 << 24
_NR_MEASURED: Final = 7
_MAX_ORDER: Final = 10  # the largest that a kernel with 4 KiB pages allocates


@dataclass(frozen=True, slots=True)
class Link:
    """A step of the chain that bounds blackout.

    Attributes:
        name: ``"subsystem/name/EVENT"`` of a callback, or the part of the engine.
        kind: ``"subsystem"``, ``"driver"``, ``"bus"`` or ``"engine"``.
        device: path of the device; None for a subsystem, the engine, and a call of many devices.
        devices: how many devices the call served.
        ns: what it cost.
    """

    name: str
    kind: str
    device: str | None
    devices: int
    ns: float


@dataclass(frozen=True, slots=True)
class Part:
    """A callback's part of blackout, all its calls together.

    Attributes:
        name, kind: as of :class:`Link`.
        calls: how often it was called.
        ns: what these calls cost.
        chain_ns: what of that is on the chain that bounds blackout.
        slack_ns: how much longer any one of its calls could have taken without making that chain
            longer; 0 if one is on it.
    """

    name: str
    kind: str
    calls: int
    ns: float
    chain_ns: float
    slack_ns: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What blackout would be.

    Attributes:
        question: what would be otherwise.
        blackout_ns: what it would be.
        saved_ns: how much less that is than it was; negative if it is more.
    """

    question: str
    blackout_ns: float
    saved_ns: float


@dataclass(frozen=True, slots=True, eq=False)
class WhatIf:
    """The blackout of a live update, and what it would be.

    A model does not change: what is asked of it is another model, of which more can be asked::

        model = WhatIf.from_report(report)
        model.moved("virtio-pci/REBOOT").with_workers(2).blackout_ns

    Callbacks are named ``"nvme"``, ``"nvme/REBOOT"`` or ``"devices/nvme/REBOOT"``; all those of a
    subsystem, or of the devices, ``"kvm"`` or ``"devices/REBOOT"``.

    Attributes:
        prepare_ns: what PREPARE took, and what has been moved there.
        jump_ns, boot_ns: what these phases took.
        workers: threads that call native callbacks which are thread-safe.
        folios: how many were handed over, by order.
    """

    prepare_ns: float
    jump_ns: float
    boot_ns: float
    workers: int
    folios: Mapping[int, int]
    _kho_abi: str
    _labels: tuple[Label, ...]
    _ways: NDArray[np.int8]
    _phases: tuple[Phase, Phase]

    @classmethod
    def from_report(cls, report: Any) -> WhatIf:
        """Take the last update of *report*.

        Callbacks after the last device was reclaimed are not in blackout and left out. Which
        callbacks are thread-safe is known of kernels that ran in this process; others are taken
        to have none.

        Args:
            report: of :func:`luo.kernel.live_update`; its kernels had ``spans=True``.

        Raises:
            ValueError: it has no update with spans, or some were dropped.
        """
        if len(report.tracks) != 2 or report.blackout is None or not report.runs:
            raise ValueError("what-if: no live update has come to its end")
        old, new = report.tracks
        spent = report.runs[-1]["phases_ns"]
        recorded = (
            Recorded(old, REBOOT, report.blackout),
            Recorded(new, RESTORE, report.blackout),
        )
        labels = tuple(sorted({label for phase in recorded for label in phase.labels}))
        whole = {label for phase in recorded for label in phase.whole}
        ways = [
            _WHOLE if label in whole else _THREADS if label[1:] in report.thread_safe else _SINGLE
            for label in labels
        ]
        tree = old.profile.tree
        forest = Forest(
            np.array(tree.parents, np.int64), np.array(tree.depths, np.int64), tree.path
        )
        reboot, restore = (phase.phase(labels, forest) for phase in recorded)
        model = cls(
            prepare_ns=spent["prepare"],
            jump_ns=spent["jump"],
            boot_ns=spent["boot"],
            workers=max(phase.workers for phase in recorded),
            folios={int(order): n for order, n in report.image.get("folios", {}).items()},
            _kho_abi=report.kernel.kho_abi,
            _labels=labels,
            _ways=np.array(ways, np.int8),
            _phases=(reboot, restore),
        )
        # What is in no callback is the engine's. Blackout ends within RESTORE.
        last = spent["blackout"] - spent["reboot"] - spent["jump"] - spent["boot"]
        own = (spent["reboot"] - model._spent(reboot), last - model._spent(restore))
        reboot, restore = (
            replace(phase, engine_ns=max(0.0, ns))
            for phase, ns in zip((reboot, restore), own, strict=True)
        )
        return replace(model, _phases=(reboot, restore))

    @classmethod
    def median(cls, models: Sequence[WhatIf]) -> WhatIf:
        """Return one model of several updates of the same host.

        Each call has its median, scaled so that those of a callback make up the median of their
        sums: what is rare in each call may be in every update.

        Raises:
            ValueError: there are none, or they did not make the same calls.
        """
        if not models:
            raise ValueError("what-if: no update")
        first = models[0]
        nr = len(first._labels)
        merged = []
        for phases in zip(*(model._phases for model in models), strict=True):
            key = phases[0].key
            if not all(np.array_equal(phase.key, key) for phase in phases) or any(
                model._labels != first._labels for model in models
            ):
                raise ValueError("what-if: the updates did not make the same calls")
            ns = np.median([phase.ns for phase in phases], axis=0)
            sums = np.median([np.bincount(key, phase.ns, nr) for phase in phases], axis=0)
            now = np.bincount(key, ns, nr)
            ns *= np.divide(sums, now, out=np.ones(nr), where=now > 0)[key]
            engine_ns = statistics.median(phase.engine_ns for phase in phases)
            merged.append(replace(phases[0], ns=ns, engine_ns=engine_ns))
        return replace(
            first,  # whom a batch served is known best of the first kernel
            prepare_ns=statistics.median(model.prepare_ns for model in models),
            jump_ns=statistics.median(model.jump_ns for model in models),
            boot_ns=statistics.median(model.boot_ns for model in models),
            _phases=(merged[0], merged[1]),
        )

    # ---- what it is ----

    @property
    def blackout_ns(self) -> float:
        """Blackout, with the workers that there are."""
        return sum(self.engine.values()) + sum(map(self._spent, self._phases))

    @property
    def bound_ns(self) -> float:
        """What blackout would be with any number of workers, and all callbacks thread-safe."""
        return sum(link.ns for link in self.chain())

    @property
    def engine(self) -> dict[str, float]:
        """The engine's own time, by part of blackout.

        ``"REBOOT"`` and ``"RESTORE"`` are what is between the callbacks and around them, publishing
        included; ``"jump"`` has the check of the handover and the walk of the map, ``"boot"`` what
        the new kernel does with it.
        """
        reboot, restore = self._phases
        return {
            REBOOT: reboot.engine_ns,
            "jump": self.jump_ns,
            "boot": self.boot_ns,
            RESTORE: restore.engine_ns,
        }

    def chain(self) -> list[Link]:
        """Return the chain that bounds blackout, in order, with the engine's part of it."""
        engine = (Link(f"engine/{name}", "engine", None, 0, ns) for name, ns in self.engine.items())
        reboot, restore = map(self._links, self._phases)
        return [*reboot, *engine, *restore]

    def _links(self, phase: Phase) -> Iterable[Link]:
        for place in phase.chain():
            key = phase.key[place]
            devices = phase.served(place)
            path = phase.forest.path(int(devices[0])) if len(devices) == 1 else None
            _, _, kind, _ = self._labels[key]
            yield Link(self._name(key), kind, path, len(devices), float(phase.ns[place]))

    def slack(self) -> list[Part]:
        """Return the part of each callback in blackout, dearest first."""
        parts = []
        for phase in self._phases:
            nr, chain = len(self._labels), phase.chain()
            calls = np.bincount(phase.key, minlength=nr)
            ns = np.bincount(phase.key, phase.ns, nr)
            on_chain = np.bincount(phase.key[chain], phase.ns[chain], nr)
            slack = np.full(nr, np.inf)
            np.minimum.at(slack, phase.key, phase.slack())
            slack[phase.key[chain]] = 0  # whatever adding in another order makes of it
            parts += [
                Part(
                    self._name(key),
                    self._labels[key][2],
                    int(calls[key]),
                    float(ns[key]),
                    float(on_chain[key]),
                    float(slack[key]),
                )
                for key in np.flatnonzero(calls).tolist()
            ]
        return sorted(parts, key=lambda part: -part.ns)

    def _name(self, key: int) -> str:
        subsystem, event, _, name = self._labels[key]
        return f"{subsystem}/{name}/{event}"

    # ---- what if ----

    def with_workers(self, count: int, *, thread_safe: bool = False) -> WhatIf:
        """Return it with so many threads, each with a processor of its own.

        Args:
            count: threads.
            thread_safe: as if each callback that is called device by device were native and
                thread-safe, and took as long as it does.

        Raises:
            ValueError: *count* is not 1 to 1024.
        """
        if not 1 <= count <= 1024:
            raise ValueError(f"workers {count!r}: 1 to 1024 threads")
        ways = self._ways.copy()
        if thread_safe:
            ways[ways == _SINGLE] = _THREADS
        return replace(self, workers=count, _ways=ways)

    def moved(self, name: str) -> WhatIf:
        """Return it with the REBOOT callback *name* in PREPARE, where it takes as long.

        Raises:
            ValueError: there is no such callback in REBOOT.
        """
        if name.endswith(f"/{RESTORE}"):
            raise ValueError(f"move {name!r}: only what REBOOT calls can go to PREPARE")
        which = self._matching(name if name.endswith(f"/{REBOOT}") else f"{name}/{REBOOT}")
        reboot, restore = self._phases
        spent = float(reboot.ns[which[reboot.key]].sum())
        return replace(
            self, prepare_ns=self.prepare_ns + spent, _phases=(reboot.without(which), restore)
        )

    def faster(self, name: str, factor: float) -> WhatIf:
        """Return it with all calls of *name* *factor* times as fast.

        Raises:
            ValueError: there is no such callback in blackout; *factor* is no number above 0.
        """
        if not 0 < factor < math.inf:
            raise ValueError(f"faster {name!r}: {factor!r} times, not a number above 0")
        times = np.where(self._matching(name), factor, 1.0)
        reboot, restore = (replace(phase, ns=phase.ns / times[phase.key]) for phase in self._phases)
        return replace(self, _phases=(reboot, restore))

    def with_pages(self, nbytes: int | str) -> WhatIf:
        """Return it with smaller folios that were handed over put together to *nbytes* each.

        What the map costs when it is published, in the jump, at boot, and when its folios are taken
        back, is measured: by updates in this process that preserve such folios and nothing else.
        The engine's time, and kvm's RESTORE if it is in blackout, change by as much. Takes a tenth
        of a second for a million folios.

        Args:
            nbytes: a power of two of pages; bytes, or as ``"2MiB"``.

        Raises:
            ValueError: *nbytes* is no such number; the report does not say what was handed over.
        """
        order = (parse_size(nbytes) >> 12).bit_length() - 1
        if order < 0 or parse_size(nbytes) != 4096 << order:
            raise ValueError(f"pages of {nbytes!r}: no power of two of 4 KiB pages")
        if not self.folios:
            raise ValueError("pages: the report does not say what was handed over")
        if abi.generation(self._kho_abi).restore_order_cap:  # larger ones go over in pieces
            order = min(order, _MAX_ORDER)
        whole, rest = divmod(
            sum(n << own for own, n in self.folios.items() if own < order), 1 << order
        )
        if not whole:
            return self
        folios = {own: n for own, n in self.folios.items() if own >= order}
        folios[order] = folios.get(order, 0) + whole
        if rest:
            folios[0] = rest
        saved = _saved_by(self.folios, folios, self._kho_abi)
        reboot, restore = self._phases
        kvm = np.array([label[:2] == ("kvm", RESTORE) for label in self._labels], np.bool_)
        ns = np.where(kvm[restore.key], np.maximum(0, restore.ns - saved["map"]), restore.ns)
        return replace(
            self,
            jump_ns=max(0.0, self.jump_ns - saved["jump"]),
            boot_ns=max(0.0, self.boot_ns - saved["boot"]),
            folios=folios,
            _phases=(
                replace(reboot, engine_ns=max(0.0, reboot.engine_ns - saved["reboot"])),
                replace(restore, ns=ns),
            ),
        )

    def answer(self, question: str, changed: WhatIf) -> Answer:
        """Return what *changed* would come to, which is this one with *question*."""
        was, would_be = self.blackout_ns, changed.blackout_ns
        return Answer(question, would_be, was - would_be)

    def answers(self) -> list[Answer]:
        """Answer the usual questions; what saves most comes first.

        They are 2 and 4 workers, with callbacks as they are and with all of them thread-safe; each
        driver's and bus's REBOOT callback in PREPARE; the dearest callback, and the dearest of a
        driver or bus, twice as fast; 2 MiB pages.
        """
        asked = {}
        for count in (2, 4):
            asked[f"{count} workers"] = self.with_workers(count)
            asked[f"{count} workers, all callbacks thread-safe"] = self.with_workers(
                count, thread_safe=True
            )
        parts = self.slack()
        of_devices = [part for part in parts if part.kind != "subsystem"]
        for part in of_devices:
            if part.name.endswith(REBOOT):
                asked[f"{part.name} in PREPARE"] = self.moved(part.name)
        for part in (*parts[:1], *of_devices[:1]):
            asked[f"{part.name} twice as fast"] = self.faster(part.name, 2)
        if any(order < 9 and n >= 512 >> order for order, n in self.folios.items()):
            asked["2 MiB pages"] = self.with_pages("2MiB")
        answers = [self.answer(question, model) for question, model in asked.items()]
        return sorted(answers, key=lambda answer: -answer.saved_ns)

    def _matching(self, name: str) -> NDArray[np.bool_]:
        """Return which labels *name* means."""
        what, _, event = name.rpartition("/")
        if event not in (REBOOT, RESTORE):
            what, event = name, ""
        used = np.zeros(len(self._labels), np.bool_)
        for phase in self._phases:
            used[phase.key] = True
        which = np.array(
            [
                what in (own, subsystem, f"{subsystem}/{own}") and event in ("", at)
                for subsystem, at, _, own in self._labels
            ],
            np.bool_,
        )
        if not (which & used).any():
            known = ", ".join(map(self._name, np.flatnonzero(used).tolist())) or "nothing"
            raise ValueError(f"no callback {name!r} in blackout, which has {known}")
        return which

    def _spent(self, phase: Phase) -> float:
        """Return what the calls of *phase* take with the workers that there are."""
        total = float(phase.ns.sum())
        if self.workers == 1 or not len(phase.call):
            return total
        # A device is called from a thread if all its callbacks may be.
        threaded = self._ways[phase.key] == _THREADS
        safe = np.ones(len(phase.forest.depths), np.bool_)
        safe[phase.device[~threaded[phase.call]]] = False
        device = np.full(len(phase.key), -1, np.int64)
        device[phase.call] = phase.device
        threaded &= safe[device]
        first = np.diff(device, prepend=-2) != 0  # of a device's calls
        depth = np.where(threaded, phase.forest.depths[device], -1)
        edges = np.flatnonzero(np.diff(depth, prepend=-2, append=-2))
        several = np.add.reduceat(first & threaded, edges[:-1], dtype=np.int64) > 1
        for place in np.flatnonzero(several):
            begin, end = edges[place : place + 2]
            devices = np.flatnonzero(first[begin:end])
            stretches = shares(0, len(devices), self.workers)
            if len(stretches) > 1:
                starts = [start for start, _ in stretches]
                if phase.event == RESTORE:  # which goes through the list from its end
                    starts = [len(devices) - stop for _, stop in reversed(stretches)]
                spent = np.add.reduceat(phase.ns[begin:end], devices[starts])
                total += float(spent.max() - spent.sum())
                total += _threads_ns(len(stretches), len(self._labels))
        return total


# ---- measured with the engine ----


@lru_cache
def _threads_ns(count: int, callbacks: int) -> float:
    """Return what *count* threads take that have nothing to call of so many callbacks."""
    recorder, spent = CallRecorder(), []
    for number in range(callbacks):
        recorder.key("devices", REBOOT, "driver", str(number))
    for _ in range(_NR_MEASURED):
        begin = time.monotonic_ns()
        forks = [recorder.fork(0, worker) for worker in range(count)]
        with ThreadPoolExecutor(count) as pool:
            for fork in forks:
                pool.submit(fork.rows)
        for fork in forks:
            recorder.absorb(fork)
        spent.append(time.monotonic_ns() - begin)
    return float(statistics.median(spent))


def _saved_by(now: Mapping[int, int], then: Mapping[int, int], kho_abi: str) -> dict[str, float]:
    """Return what a map of *then* saves, by phase; ``"map"`` is what taking folios back takes."""
    share = max(1.0, sum(now.values()) / _MAX_FOLIOS)
    smaller = [{order: round(n / share) for order, n in of.items()} for of in (now, then)]
    spent = [[_update(folios, kho_abi) for folios in smaller] for _ in range(_NR_MEASURED)]
    # The least of each: whatever else the machine does can only add to it.
    was, would_be = (
        {phase: min(one[phase] for one in of) for phase in of[0]} for of in zip(*spent, strict=True)
    )
    return {phase: (was[phase] - would_be[phase]) * share for phase in was}


def _update(folios: Mapping[int, int], kho_abi: str) -> dict[str, int]:
    """Run an update that preserves *folios* and nothing else; returns what its phases took."""
    largest = 1 << max(folios)
    pages = sum(n << order for order, n in folios.items())
    # Room for the map, and for the blocks to be where their order wants them.
    room = pages + pages // 64 + 4 * largest + (1 << 15)
    machine = Machine(-(-room // largest) * largest * 4096)
    blocks = []

    def prepare(context: Context) -> None:
        for order, count in folios.items():
            phys = context.memory.alloc_folios(count, order)
            context.kho.preserve_folios(phys, order)
            blocks.append(phys)

    def restore(context: Context) -> None:
        assert context.kho.incoming is not None
        for phys in blocks:
            context.kho.incoming.restore_folios(phys)

    old, new = (
        Kernel(
            machine,
            subsystems=[Subsystem("map", prepare=prepare, restore=restore)],
            kho_abi=kho_abi,
            cmdline="kho=on liveupdate=on kho_scratch=16M,16M,16M",
        )
        for _ in range(2)
    )
    report = live_update(old.boot(), new)
    report.kernel.close()
    taken = sum(row["total_ns"] for row in report.callbacks if row["event"] == RESTORE)
    return {**report.phases, "map": taken}
