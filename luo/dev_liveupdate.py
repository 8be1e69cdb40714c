"""The devices in a live update: order, records, slots and callbacks.

Mirrors RFC v1's ``drivers/base/dev_liveupdate.c`` (``spec/luo-rfc-v1.md`` 1.8 to 1.12), and adds
what its list left to do: state slots in preserved memory, a record and a KHO node for each
device, and the way back in the next kernel.

Happy path: PREPARE orders the requested devices and their ancestors, children first; lays out
slots in slabs and records in shards; calls driver then bus of each. REBOOT calls who has a
callback. The next kernel reads the records before the old one is let go, matches them to its
devices by path and bus, and calls restore, parents first. FINISH goes children first and frees.

Unhappy path: a failure in PREPARE or REBOOT ends in CANCEL for whatever PREPARE had finished,
in reverse, bus before driver; then slots and records are freed and the flags are as before.
"""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from luo._kho import (
    CallTable,
    DeviceList,
    NativeCallback,
    NativeScope,
    add_counts,
    call_devices,
    set_flags,
)
from luo.device import SIDES, Batch, Bus, Device, DeviceBatch, Devices, Driver
from luo.device_records import DeviceRecords, Index, slot_digests
from luo.errors import CallbackError, StateError, from_errno
from luo.kho import KhoNode
from luo.kho_tree import shape_of
from luo.notifier import (
    BACKWARDS,
    RESTORE,
    Context,
    Event,
    Priority,
    Step,
    callback_error,
    failed,
)
from luo.saved_devices import SavedDevices

if TYPE_CHECKING:
    from luo._kho import CallRecorder

__all__ = ["SHARE", "DeviceParticipant", "shares"]

_BIT: Final = {"driver": 1, "bus": 2}
_MODE: Final = {"PREPARE": "set", "REBOOT": "need", "CANCEL": "clear"}


#: How a stretch of devices is called: once for all, one by one from Python, one by one without the
#: GIL, and that from several threads. Where driver and bus differ the lower number is taken.
_BATCH, _PYTHON, _NATIVE, _THREADS = 1, 2, 3, 4

#: Devices below which a thread is not worth its start.
SHARE: Final = 256


def shares(start: int, stop: int, workers: int) -> list[tuple[int, int]]:
    """Return the stretches of *start* to *stop*, places of devices, for each thread; or just one.

    Args:
        start: first place of devices of one depth, all of whose callbacks are thread-safe.
        stop: the place behind the last.
        workers: how many threads there may be; fewer are used if they are not worth it.
    """
    count = max(1, min(workers, (stop - start) // SHARE))
    cuts = np.linspace(start, stop, count + 1).astype(int).tolist()
    return list(itertools.pairwise(cuts))


@dataclass(slots=True)
class _Run:
    """A stretch of the walk that is called in one way."""

    start: int
    stop: int
    way: int


@dataclass(slots=True)
class _Walk:
    """The devices of one update in the order of PREPARE.

    Attributes:
        devices: all of them.
        chosen, runs, tables: by event, who is called: the devices, the runs that these are cut
            into, and the callbacks of each side.
        scopes: by event, what native callbacks reach, if there are any.
    """

    devices: DeviceList
    chosen: dict[str, DeviceList] = field(default_factory=dict)
    runs: dict[str, list[_Run]] = field(default_factory=dict)
    tables: dict[str, dict[str, CallTable]] = field(default_factory=dict)
    scopes: dict[str, NativeScope | None] = field(default_factory=dict)

    @property
    def order(self) -> Index:
        """The numbers of all devices."""
        numbers: Index = self.devices.numbers
        return numbers

    def called(self, event: str, run: _Run) -> Index:
        """Return the numbers of the devices of *run*."""
        numbers: Index = self.chosen[event].numbers[run.start : run.stop]
        return numbers


class DeviceParticipant:
    """All devices of a kernel as one participant of the chain."""

    name = "devices"
    priority = Priority.WITH_DEVICES

    def __init__(self, devices: Devices, recorder: CallRecorder, workers: int = 1) -> None:
        self.devices = devices
        self.context = Context(devices.kernel)
        self.records: DeviceRecords | None = None
        self._recorder = recorder
        self._done = np.zeros(len(devices.requested), np.uint8)
        self._walk: _Walk | None = None
        self._saved = SavedDevices(self.devices)
        self._nodes: KhoNode | None = None  # what drivers put beside their slots
        self._nodes_closed = False
        self._shapes: dict[tuple[str, str], Any] = {}  # of each node, when PREPARE was over
        self._place_of: Index | None = None
        self._listed: NDArray[np.bool_] | None = None  # whom CANCEL still reaches; None: everyone
        self._held = np.zeros(0, np.int32)  # whom the list holds a reference on
        self._failures: list[CallbackError] = []
        self._workers = workers

    # ---- the chain's side ----

    @property
    def prepared(self) -> bool:
        """Whether CANCEL has something to undo."""
        return self._walk is not None and self.records is None

    def start(self) -> None:
        """Begin an update: what a CANCEL that was stopped half-way left is forgotten."""
        if self.prepared:
            self._discard()

    def collect(self) -> list[CallbackError]:
        """Return, and forget, the failures of restore, finish and cancel callbacks."""
        failures, self._failures = self._failures, []
        return failures

    def steps(self, event: str, bulk: bool) -> Iterator[Step]:
        """Yield the steps of *event*: one a callback, or one a stretch of devices if *bulk*."""
        if event == Event.PREPARE.name:
            self._plan()
        elif self._walk is None:
            if event == Event.CANCEL.name:
                self._discard()  # PREPARE failed before there was an order of devices
            return
        walk = self._walk
        assert walk is not None
        # Drivers may have come and gone in PREPARED, where RFC v1's code does not refuse it.
        if event not in walk.runs or self._has("eligibility-checked-once"):
            self._arrange(walk, event)
        for runs in self._levels(walk, event, bulk):
            for run in runs:
                if run.way == _BATCH:
                    yield from self._batch_steps(walk, event, run, bulk)
                elif bulk:
                    yield self._bulk_step(walk, event, run, self._sides(event))
                else:
                    yield from self._single_steps(walk, event, run, self._sides(event))
            if not bulk:
                yield Step.barrier()
            for run in runs:
                self._mark(event, walk.called(event, run))
        if walk.chosen[event] is not walk.devices:  # else that was everybody
            self._mark(event, walk.order)
        if event == Event.PREPARE.name:
            self._nodes_closed = True
            if self._nodes is not None:
                self._shapes = self._check_nodes(event)
                if not self.devices.kernel.kho.generation.inline:  # which takes them as they are
                    self._saved.write_nodes(self._nodes)
        elif event == Event.REBOOT.name and self._nodes is not None:
            self._check_nodes(event)
            if self._saved.nodes:
                self._saved.patch_nodes(self._nodes)
        elif event == Event.CANCEL.name:
            self._discard()
        elif event == Event.FINISH.name:
            self._release()
        elif event == RESTORE:
            self._reclaim_the_rest(walk)

    def _levels(self, walk: _Walk, event: str, bulk: bool) -> Iterator[list[_Run]]:
        """Yield the runs of one depth together, whose steps may overlap; if *bulk*, each alone."""
        runs = walk.runs[event]
        if bulk:
            yield from ([run] for run in (reversed(runs) if self._backwards(event) else runs))
            return
        depths = self.devices.tree.depths[walk.chosen[event].numbers]
        pieces = []
        for run in runs:
            changes = np.flatnonzero(np.diff(depths[run.start : run.stop])) + run.start + 1
            cuts = (run.start, *changes.tolist(), run.stop)  # a run may cross depths
            pieces += [_Run(start, stop, run.way) for start, stop in itertools.pairwise(cuts)]
        ordered = pieces[::-1] if self._backwards(event) else pieces
        for _, level in itertools.groupby(ordered, lambda run: int(depths[run.start])):
            yield list(level)

    def _bulk_step(self, walk: _Walk, event: str, run: _Run, sides: tuple[str, ...]) -> Step:
        count = run.stop - run.start
        return Step("devices", self.name, lambda: self._call(walk, event, run, sides), None, count)

    def _batch_steps(self, walk: _Walk, event: str, run: _Run, bulk: bool) -> Iterator[Step]:
        """Yield the steps of a batch run, one side after the other; one may be no batch."""
        sides = self._sides(event)
        first = int(walk.called(event, run)[0])
        callbacks = [self._callback(side, first, event) for side in sides]
        for place, (side, callback) in enumerate(zip(sides, callbacks, strict=True)):
            # Nothing to call, but the done mask: at once, or when the side before has been called.
            if callback is None and place == 0:
                self._call(walk, event, run, (side,))
            if callback is None:
                continue
            silent = sides[place + 1 :] if None in callbacks[place + 1 :] else ()
            if isinstance(callback, Batch):
                parts = self._parts(walk, event, run, side)
                ordered = parts[::-1] if self._backwards(event) else parts
                for part in ordered:
                    then = silent if part is ordered[-1] else ()
                    call = partial(self._call_part, walk, event, part, side, run, then)
                    yield Step(side, self._owner(side, first), call, None, part.stop - part.start)
                if not parts and silent:
                    self._call(walk, event, run, silent)
            elif bulk:
                yield self._bulk_step(walk, event, run, (side,))
            else:
                yield from self._single_steps(walk, event, run, (side,))
            if not bulk and place == 0 and not silent:
                yield Step.barrier()

    def _call_part(
        self,
        walk: _Walk,
        event: str,
        part: _Run,
        side: str,
        run: _Run,
        silent: tuple[str, ...],
    ) -> None:
        self._call_batch(walk, event, part, side)
        if silent:
            self._call(walk, event, run, silent)

    def _single_steps(
        self, walk: _Walk, event: str, run: _Run, sides: tuple[str, ...]
    ) -> Iterator[Step]:
        """Yield one step a device and callback."""
        both = len(sides) == len(SIDES)
        places = range(run.start, run.stop)
        for place in reversed(places) if self._backwards(event) else places:
            here = _Run(place, place + 1, _PYTHON)
            number = int(walk.called(event, here)[0])
            called = [
                side
                for side in sides
                if self._callback(side, number, event) is not None
                and self._wants(event, number, side)
            ]
            if not called:
                self._call_single(walk, event, here, sides, both)  # only the done mask
                continue
            device = Device(self.devices, number)
            for side in called:
                # Of a side without a callback there is the done mask, with the other's call.
                among = sides if len(called) == 1 else (side,)
                marks = both and side == called[-1]
                call = partial(self._call_single, walk, event, here, among, marks)
                yield Step(side, self._owner(side, number), call, device, 1)

    def _call_single(
        self, walk: _Walk, event: str, here: _Run, sides: tuple[str, ...], marks: bool
    ) -> None:
        self._call(walk, event, here, sides)
        if marks:
            self._mark(event, walk.called(event, here))

    def _sides(self, event: str) -> tuple[str, ...]:
        return SIDES[::-1] if self._backwards(event) else SIDES

    @staticmethod
    def _backwards(event: str) -> bool:
        return event in (Event.CANCEL.name, RESTORE)

    def _wants(self, event: str, device: int, side: str) -> bool:
        return event not in ("REBOOT", "CANCEL") or bool(self._done[device] & _BIT[side])

    def _mark(self, event: str, which: Index) -> None:
        """Set the flags that *event* leaves on devices that are through with it."""
        if event == Event.PREPARE.name:
            set_flags(self.devices.preserved.view(np.uint8), which, True)
            return
        if event == Event.CANCEL.name and self._listed is not None:
            which = which[self._listed[which]]
        if event in (Event.CANCEL.name, Event.FINISH.name):
            set_flags(self.devices.preserved.view(np.uint8), which, False)
            set_flags(self.devices.reclaimed.view(np.uint8), which, False)

    # ---- who is called ----

    def _owner(self, side: str, device: int) -> str:
        number = int(self.devices.ids(side)[device])
        return "" if number < 0 else str(self.devices.parties(side)[number].name)

    def _callback(self, side: str, device: int, event: str) -> Any:
        number = int(self.devices.ids(side)[device])
        ops = None if number < 0 else self.devices.parties(side)[number].ops
        return None if ops is None else getattr(ops, event.lower())

    def _kinds(self, side: str, event: str) -> NDArray[np.int8]:
        """Return for each owner how its callback is called, 0 if it has none."""
        kinds = []
        for owner in self.devices.parties(side):
            callback = None if owner.ops is None else getattr(owner.ops, event.lower())
            if callback is None:
                kinds.append(0)
            elif isinstance(callback, Batch):
                kinds.append(_BATCH)
            elif not isinstance(callback, NativeCallback):
                kinds.append(_PYTHON)
            else:
                kinds.append(_THREADS if self._workers > 1 and owner.ops.thread_safe else _NATIVE)
        return np.array(kinds, np.int8)

    def _arrange(self, walk: _Walk, event: str) -> None:
        """Choose who is called for *event*, cut them into runs, and build the call tables."""
        devices = self.devices
        drivers, buses = (self._kinds(side, event) for side in SIDES)
        chosen = walk.devices
        # PREPARE leaves its mark on every device; elsewhere who has no callback costs nothing.
        if event != Event.PREPARE.name:
            chosen = chosen.choose(devices.driver_ids, devices.bus_ids, drivers, buses)
        if event == Event.FINISH.name:
            chosen = self._found_again(chosen, _BATCH in drivers or _BATCH in buses)
        walk.chosen[event] = chosen
        cuts, ways = chosen.cut_runs(
            devices.tree.depths,
            devices.driver_ids,
            devices.bus_ids,
            drivers,
            buses,
            devices.slot_phys,
            devices.slot_bytes,
            _PYTHON,
            _BATCH,
            _THREADS,
        )
        walk.runs[event] = [
            _Run(start, stop, way)
            for (start, stop), way in zip(
                itertools.pairwise(cuts.tolist()), ways.tolist(), strict=True
            )
        ]
        walk.tables[event] = {side: self._table(side, event) for side in SIDES}
        walk.scopes[event] = self._scope(event)

    def _found_again(self, chosen: DeviceList, batches: bool) -> DeviceList:
        """Return *chosen* as FINISH meets it, which looks for devices anew (RFC v1 1.12).

        Who went is not found, equal depths come in the order of registration. Batch runs stay
        together, as their slots do.
        """
        tree, order = self.devices.tree, chosen.numbers
        here = tree.alive[order]
        if not here.all():
            order = order[here]
        if not batches:
            order = order[np.lexsort((order, -tree.depths[order]))]
        return chosen if order is chosen.numbers else DeviceList(order)

    def _table(self, side: str, event: str) -> CallTable:
        calls: list[Callable[[Device], int | None] | None] = []
        keys = []
        for owner in self.devices.parties(side):
            callback = None if owner.ops is None else getattr(owner.ops, event.lower())
            calls.append(None if isinstance(callback, Batch) else callback)
            keys.append(self._key(event, side, owner.name) if callback is not None else 0)
        mode = _MODE.get(event, "plain")
        return CallTable(self.devices.ids(side), calls, np.array(keys, np.int32), _BIT[side], mode)

    def _scope(self, event: str) -> NativeScope | None:
        """Return what the native callbacks of *event* reach, None if there are none."""
        devices = self.devices
        callbacks = (
            getattr(owner.ops, event.lower())
            for side in SIDES
            for owner in self.devices.parties(side)
            if owner.ops is not None
        )
        if not any(isinstance(callback, NativeCallback) for callback in callbacks):
            return None
        flags = (devices.preserved, devices.reclaimed) if self.records is not None else (None, None)
        return NativeScope(
            devices.kernel.memory,
            devices.tree.table,
            event,
            devices.slot_phys,
            devices.slot_bytes,
            *flags,
        )

    def _key(self, event: str, side: str, name: str) -> int:
        return self._recorder.key(self.name, event, side, name)

    # ---- calling ----

    def _call(self, walk: _Walk, event: str, run: _Run, sides: tuple[str, ...]) -> None:
        collect: list[Any] | None = [] if event in BACKWARDS else None
        call = partial(self._call_stretch, walk, event, run.way, sides)
        stretches = []
        # Told what callbacks cost, it asks in their order: costs may be drawn.
        if run.way == _THREADS and self._recorder.cost is None:
            stretches = shares(run.start, run.stop, self._workers)
        if len(stretches) > 1:
            failure = self._call_threads(call, stretches, self._backwards(event), collect)
        else:
            failure = call(self._recorder, run.start, run.stop, collect)
        if walk.scopes[event] is not None and event == RESTORE:
            self.devices.kernel.luo.note_reclaim()  # native code reclaims without a word
            self.devices.kernel.luo.reclaiming = False  # their time has passed
        interrupt = None
        for device, side, outcome in collect or ():
            if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
                interrupt = interrupt or outcome
            else:
                self._failures.append(self._error(event, sides[side], device, outcome))
        if interrupt is not None:
            raise interrupt
        if failure is not None:
            device, side, outcome = failure
            error = self._error(event, sides[side], device, outcome)
            raise error from error.__cause__

    def _call_stretch(
        self,
        walk: _Walk,
        event: str,
        way: int,
        sides: tuple[str, ...],
        recorder: CallRecorder,
        start: int,
        stop: int,
        collect: list[Any] | None,
    ) -> Any:
        return call_devices(
            recorder,
            self.devices,
            Device,
            walk.chosen[event].numbers,
            start,
            stop,
            self._backwards(event),
            [walk.tables[event][side] for side in sides],
            self._done,
            collect,
            walk.scopes[event],
            way in (_NATIVE, _THREADS),
        )

    def _call_threads(
        self,
        call: Callable[..., Any],
        stretches: list[tuple[int, int]],
        backwards: bool,
        collect: list[Any] | None,
    ) -> Any:
        """Call the devices of one depth from several threads; returns the first failure in order.

        Each has a stretch of its own. Of a stretch behind a failure some have run: they are
        cancelled as those before it are.
        """
        if backwards:
            stretches.reverse()
        forks = [
            self._recorder.fork(len(SIDES) * (stop - start), worker)
            for worker, (start, stop) in enumerate(stretches)
        ]
        found: list[list[Any] | None] = [None if collect is None else [] for _ in stretches]
        with ThreadPoolExecutor(len(stretches)) as pool:  # leaving waits for all of them
            calls = [
                pool.submit(call, fork, start, stop, there)
                for fork, (start, stop), there in zip(forks, stretches, found, strict=True)
            ]
        for fork in forks:
            self._recorder.absorb(fork)
        for there in found:
            if collect is not None and there is not None:
                collect += there
        return next((failure for done in calls if (failure := done.result()) is not None), None)

    def _error(self, event: str, side: str, device: int, outcome: object) -> CallbackError:
        return callback_error(
            outcome,
            event=event,
            kind=side,
            name=self._owner(side, device),
            callback=self._callback(side, device, event),
            device=self.devices.tree.path(device),
        )

    def _parts(self, walk: _Walk, event: str, run: _Run, side: str) -> list[_Run]:
        """Return the parts of a batch run that are to be called: CANCEL skips who did not run."""
        chosen = walk.called(event, run)
        if event not in ("REBOOT", "CANCEL"):
            return [run]
        wanted = (self._done[chosen] & _BIT[side]) != 0
        edges = np.flatnonzero(np.diff(np.concatenate(([False], wanted, [False])).astype(np.int8)))
        return [
            _Run(run.start + int(start), run.start + int(stop), _BATCH)
            for start, stop in zip(edges[::2], edges[1::2], strict=True)
        ]

    def _batch(self, walk: _Walk, event: str, run: _Run, side: str) -> DeviceBatch:
        index = walk.called(event, run)
        nbytes = self.devices.slot_bytes[:, index[0]].tolist()
        row = SIDES.index(side)
        size, stride = nbytes[row], sum(-(-one // 8) * 8 for one in nbytes)
        if size:
            phys = int(self.devices.slot_phys[row, index[0]])
            extent = self.devices.kernel.memory.view(phys, stride * (len(index) - 1) + size)
            slots = np.ndarray((len(index), size), np.uint8, extent, 0, (stride, 1))
        else:
            slots = np.empty((len(index), 0), np.uint8)
        return DeviceBatch(self.devices, index, slots)

    def _call_batch(self, walk: _Walk, event: str, run: _Run, side: str) -> None:
        devices = self._batch(walk, event, run, side)
        index, bit = devices.index, np.uint8(_BIT[side])
        first = int(index[0])
        callback = self._callback(side, first, event)
        key = self._key(event, side, self._owner(side, first))
        if event == Event.CANCEL.name:
            self._done[index] &= ~bit
        begin = self._recorder.begin()
        outcome: Any
        try:
            outcome = callback(devices)
        except Exception as error:
            outcome = error
        elapsed = self._recorder.lap(key, begin, len(index), index)
        wrong = self._wrong(outcome, len(index))
        if event == Event.PREPARE.name:
            ran = np.ones(len(index), np.bool_)
            ran[[place for place, _ in wrong]] = False
            self._done[index[ran]] |= bit
        if not wrong and (late := self._recorder.overdue(elapsed)) is not None:
            outcome = late
            wrong = [(0, late)]
        errors = [self._error(event, side, int(index[place]), what) for place, what in wrong]
        if event in BACKWARDS:
            # One outcome for the whole run is one failure.
            self._failures += errors[:1] if errors and wrong[0][1] is outcome else errors
        elif errors:
            raise errors[0] from errors[0].__cause__

    @staticmethod
    def _wrong(outcome: Any, n: int) -> list[tuple[int, object]]:
        """Return (place, outcome) of each device of a batch that failed, lowest first."""
        is_array = isinstance(outcome, np.ndarray) and outcome.dtype.kind in "iu"
        if is_array and outcome.shape == (n,):
            return [(int(place), int(outcome[place])) for place in np.flatnonzero(outcome)]
        if isinstance(outcome, BaseException) or failed(outcome):
            return [(place, outcome) for place in range(n)]
        return []

    # ---- PREPARE ----

    def _plan(self) -> None:
        """Order the devices, allocate slots, write records: all that can fail for memory."""
        devices = self.devices
        tree = devices.tree
        requested = devices.scan()
        lost = np.flatnonzero(requested & (~devices.eligible() | devices.orphans()))
        if lost.size and not self._has("eligibility-checked-once"):
            first = int(lost[0])
            why = devices.why_not_eligible(first) or "its driver has gone since the request"
            raise from_errno(errno.EINVAL, f"PREPARE {tree.path(first)}: {why}")
        order = self._order(requested)
        listed = DeviceList(order)
        self._size_slots(listed, devices.slot_bytes)
        drivers, buses = (self._batched(side) for side in SIDES)
        group = listed.groups(
            devices.driver_ids, devices.bus_ids, drivers, buses, devices.slot_bytes
        )
        if group is not None and not self._has("depth-from-garbage"):
            listed = DeviceList(tree.table.group_order(order, group))
        self._saved.allocate_slots(listed)
        self._saved.write_records(listed)
        self._done = np.zeros(len(devices.requested), np.uint8)
        self._walk = _Walk(listed)
        self._hold(listed.numbers)
        if self._has("reference-leak"):
            devices.references[devices.leaked(requested)] += 1  # and nobody drops it
        for event in (Event.PREPARE, Event.REBOOT):  # REBOOT shall not do it in blackout
            self._arrange(self._walk, event.name)

    def _has(self, quirk: str) -> bool:
        return quirk in self.devices.kernel.quirks

    def _order(self, requested: NDArray[np.bool_]) -> Index:
        """Return the devices of an update, children first; who does not support it is left out."""
        tree = self.devices.tree
        if self._has("depth-from-garbage"):
            # What an uninitialised pointer leads to is anybody's guess. Here it is the device that
            # was listed before.
            listed: dict[int, None] = {}
            for index in np.flatnonzero(requested).tolist():
                while index >= 0 and index not in listed:
                    listed[index] = None
                    index = int(tree.parents[index])
            order = np.fromiter(listed, np.int32, len(listed))
            depths = np.concatenate(([0], tree.depths[order]))[:-1]
            order = order[np.argsort(-depths, kind="stable")]
        else:
            order = tree.preserve_order(requested)
        if self._has("all-ancestors"):
            return order
        supported = self.devices.supported()[order]
        if self._has("eligibility-checked-once"):
            supported |= requested[order]
        return order if supported.all() else order[supported]

    def _size_slots(
        self, listed: DeviceList, slot_bytes: NDArray[np.uint64], one_by_one: bool = True
    ) -> None:
        """Ask for the slot sizes of each device in *listed*, on both sides.

        Without *one_by_one*, 0 for a device whose size a callback of its own must tell.
        """
        order = listed.numbers
        for side, nbytes in zip(SIDES, slot_bytes, strict=True):
            ids = self.devices.ids(side)
            asks = [
                owner.ops.state_size if owner.ops is not None else 0
                for owner in self.devices.parties(side)
            ]
            sizes = [ask if isinstance(ask, int) else 0 for ask in asks]
            listed.size_slots(ids, np.array(sizes, np.uint64), nbytes)
            for number, ask in enumerate(asks):
                if isinstance(ask, int) or not (which := order[ids[order] == number]).size:
                    continue
                if isinstance(ask, Batch):
                    run = DeviceBatch(self.devices, which, np.empty((len(which), 0), np.uint8))
                    nbytes[which] = self._ask(side, ask, run, None)
                elif one_by_one:
                    for index in which.tolist():
                        device = Device(self.devices, index)
                        nbytes[index] = self._ask(side, ask, device, device.path)

    def _ask(self, side: str, ask: Any, what: Any, path: str | None) -> Any:
        first = what.index if path is not None else int(what.index[0])
        shapes: tuple[tuple[int, ...], ...] = ((),) if path is not None else ((), (len(what),))
        try:
            answer = ask(what)
            array = np.asarray(answer)
            if (
                array.dtype.kind not in "iub"
                or array.shape not in shapes
                or int(array.min(initial=0)) < 0
            ):
                raise TypeError(f"state_size returned {answer!r}, not a number of bytes")
            return array.astype(np.uint64)
        except Exception as error:
            raise callback_error(
                error,
                event=Event.PREPARE.name,
                kind=side,
                name=self._owner(side, first),
                callback=ask,
                device=path or self.devices.tree.path(first),
            ) from error

    def _batched(self, side: str) -> NDArray[np.uint8]:
        """Return which owners are called in batches, in any event."""
        events = [*(event.name for event in Event), RESTORE]
        kinds = np.array([self._kinds(side, event) for event in events])
        batched: NDArray[np.uint8] = (kinds == _BATCH).any(axis=0).view(np.uint8)
        return batched

    # ---- KHO nodes ----

    def kho_node(self, owner: Device | Driver | Bus) -> KhoNode:
        """Return the node of *owner*, made now if PREPARE runs; see :attr:`Device.kho_node`."""
        if self._walk is None:
            state = self.devices.kernel.luo.state
            raise StateError(
                errno.EINVAL,
                f"kho_node of {_name(owner)}: there are nodes from PREPARE to FINISH,"
                f" the state is {state.name}",
            )
        kind, name = self._node_name(owner)
        found = self._nodes.children.get(kind) if self._nodes is not None else None
        node = found.children.get(name) if found is not None else None
        if node is not None:
            return node
        if self.records is not None:
            return KhoNode()
        if self._nodes_closed:
            raise StateError(
                errno.EINVAL, f"kho_node of {_name(owner)}: PREPARE, which makes it, is over"
            )
        self._nodes = self._nodes or KhoNode()
        level = self._nodes.children.setdefault(kind, KhoNode())
        return level.children.setdefault(name, KhoNode())

    def _node_name(self, owner: Device | Driver | Bus) -> tuple[str, str]:
        """Return under which two names the node of *owner* stands in the tree."""
        if isinstance(owner, Device):
            place = self._place(owner.index)
            if place < 0:
                raise StateError(
                    errno.EINVAL, f"kho_node of {owner.path}: takes no part in this update"
                )
            number = place if self.records is None else int(self.records.numbers[place])
            return "devices", f"device{number}"
        return ("drivers" if isinstance(owner, Driver) else "buses"), owner.name.replace("/", "!")

    def _place(self, index: int) -> int:
        """Return the place of device number *index* in the walk, -1 if it has none."""
        assert self._walk is not None
        if self._place_of is None:
            self._place_of = np.full(len(self._done), -1, np.int32)
            self._place_of[self._walk.order] = np.arange(len(self._walk.order), dtype=np.int32)
        return int(self._place_of[index]) if index < len(self._place_of) else -1

    def _check_nodes(self, event: str) -> dict[tuple[str, str], Any]:
        """Return the shape of every node that drivers have filled, by kind and name.

        Raises:
            CallbackError: EINVAL: something in one cannot be written, or REBOOT has changed more
                than values.
        """
        assert self._nodes is not None
        shapes: dict[tuple[str, str], Any] = {}
        for kind, level in self._nodes.children.items():
            for name, node in level.children.items():
                try:
                    shape = shapes[kind, name] = shape_of(node)
                    if event == Event.REBOOT.name and self._shapes[kind, name] != shape:
                        new = [part for part in shape if part not in self._shapes[kind, name]]
                        where = f"{new[0][0]}/{new[0][1]} has {new[0][2]} bytes" if new else "less"
                        raise ValueError(f"{where}: REBOOT may change values, not their lengths")
                except ValueError as error:
                    raise self._node_error(event, kind, name, str(error)) from None
        return shapes

    def _node_error(self, event: str, kind: str, name: str, why: str) -> CallbackError:
        device, side, owner = None, kind[:-1].replace("buse", "bus"), name
        if kind == "devices":
            assert self._walk is not None
            number = int(self._walk.order[int(name.removeprefix("device"))])
            device = self.devices.tree.path(number)
            side = "driver" if self.devices.driver_ids[number] >= 0 else "bus"
            owner = self._owner(side, number)
        where = f" of {device}" if device is not None else ""
        return CallbackError(
            errno.EINVAL,
            f"{event} {side} {owner}{where}: kho_node {why}",
            event=event,
            kind=side,
            name=owner,
            device=device,
        )

    def nodes_root(self) -> KhoNode | None:
        """Return the tree of the KHO nodes of devices, drivers and buses, if there are any."""
        return self._nodes

    # ---- the end of an update ----

    def free_list(self, failure: BaseException | None = None) -> None:
        """Forget which devices CANCEL has to reach (quirks of RFC v1's REBOOT).

        Args:
            failure: of a REBOOT callback: the devices before it are reached as yet, and if it is a
                bus's then so is the driver of its device. None: nobody is.
        """
        if self._walk is None or not (failure is None or isinstance(failure, CallbackError)):
            return
        kept = np.zeros(len(self._done), np.bool_)
        done = np.zeros_like(self._done)
        if failure is not None and failure.device is not None:
            # Not looked up in the tree: it may have been unplugged since.
            order = self._walk.order
            place = [self.devices.tree.path(int(i)) for i in order].index(failure.device)
            index = int(order[place])
            kept[order[:place]] = True
            if failure.kind == "bus":
                done[index] = self._done[index] & _BIT["driver"]
        done[kept] = self._done[kept]
        self._done[:] = done
        self._listed = kept
        self._hold(self._held[kept[self._held]])

    def _hold(self, which: Index) -> None:
        """Hold a reference on each of *which*, and on nobody else."""
        add_counts(self.devices.references, self._held, -1)
        add_counts(self.devices.references, which, 1)
        self._held = which

    def _discard(self) -> None:
        """Free what PREPARE allocated (CANCEL)."""
        self._saved.free()
        self._forget()

    def _release(self) -> None:
        """Free what came over from the previous kernel (FINISH)."""
        if self.records is not None:
            self.records.free(self.devices.kernel.kho.incoming)
        self._forget()

    def _forget(self) -> None:
        self._hold(self._held[:0])
        self._saved = SavedDevices(self.devices)
        self._nodes = None
        self._nodes_closed = False
        self._shapes = {}
        self._place_of = None
        self._listed = None
        self._walk = None
        self.records = None
        self._done[:] = 0
        self.devices.clear_slots()

    def prefault(self) -> None:
        """Touch the memory that PREPARE will allocate for the devices that are requested now.

        Sizes that only a callback of one device knows are left out: it is not called before its
        time.
        """
        devices, memory = self.devices, self.devices.kernel.memory
        listed = DeviceList(self._order(devices.requested & devices.tree.alive))
        sizes = np.zeros_like(devices.slot_bytes)
        self._size_slots(listed, sizes, False)
        slabs, _too_large = listed.cut_slabs(sizes, memory.page_size << memory.max_order)
        blocks = slabs[:, 1].tolist() + SavedDevices(devices).shard_sizes(listed)
        orders = [(-(-nbytes // memory.page_size) - 1).bit_length() for nbytes in blocks]
        for order, count in Counter(orders).items():
            memory.prefault_free(count * memory.page_size << order, order)

    # ---- the outgoing side, for LUO's node and the report ----

    def luo_properties(self) -> dict[str, int]:
        """Return the values of the ``devices`` node."""
        return self._saved.luo_properties()

    def luo_node(self) -> KhoNode:
        """Return the ``devices`` node of an inline tree: the records themselves."""
        return self._saved.luo_node()

    @property
    def record_bytes(self) -> int:
        """Bytes of all records."""
        return self._saved.record_bytes

    def digests(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return (bytes, digest) of what is in the slots now, by (side, driver or bus name)."""
        if self._walk is None:
            return {}
        devices, order = self.devices, self._walk.order
        if self.records is not None:
            return self.records.digests(devices.kernel.memory, devices)

        def slots_of(part: slice) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
            here = order[part]
            return devices.slot_phys.take(here, 1), devices.slot_bytes.take(here, 1)

        return slot_digests(
            devices.kernel.memory,
            self._saved.slab_entries,
            slots_of,
            lambda side, part: devices.ids(side)[order[part]],
            {side: [owner.name for owner in devices.parties(side)] for side in SIDES},
        )

    # ---- the new kernel ----

    def adopt(self, records: DeviceRecords) -> None:
        """Take over the records of the previous kernel: flags and slots of the matched devices."""
        found = records.found
        self.records = records
        self._nodes = records.nodes
        self._done = np.zeros(len(self.devices.requested), np.uint8)
        self._walk = _Walk(DeviceList(found))
        set_flags(self.devices.preserved.view(np.uint8), found, True)
        self._hold(found)
        self.devices.slotted = True

    def unreclaimed(self) -> Index:
        """Return the devices that came over and do not run again."""
        lost = self.devices.preserved & ~self.devices.reclaimed & self.devices.tree.alive
        return np.flatnonzero(lost).astype(np.int32)

    def restore_device(self, index: int) -> None:
        """Call the restore callback of a driver that was bound to a device after boot.

        Raises:
            CallbackError: it failed.
        """
        walk, records = self._walk, self.records
        assert walk is not None
        assert records is not None
        self._arrange(walk, RESTORE)  # with the driver in it
        called = np.flatnonzero(walk.chosen[RESTORE].numbers == index)
        if called.size and self._callback("driver", index, RESTORE) is not None:
            run = _Run(int(called[0]), int(called[0]) + 1, _PYTHON)
            if isinstance(self._callback("driver", index, RESTORE), Batch):
                self._call_batch(walk, RESTORE, run, "driver")
            else:
                self._call(walk, RESTORE, run, ("driver",))
        else:
            self._reclaim_the_rest(walk)
        failures = self.collect()
        if failures:
            raise failures[0]

    def note_binding(self, index: int) -> None:
        """Have REBOOT and CANCEL call the driver that was bound to a device since PREPARE.

        Only the quirk eligibility-checked-once lets that happen: tables are looked up at call time.
        """
        if not self.prepared or self._place(index) < 0:
            return
        assert self._walk is not None
        self._done[index] |= _BIT["driver"]
        for event in (Event.REBOOT.name, Event.CANCEL.name):
            self._walk.runs.pop(event, None)

    def _reclaim_the_rest(self, walk: _Walk) -> None:
        """Reclaim the devices that have no restore callback: nobody else would.

        Not those whose driver is not here: they wait for it.
        """
        assert self.records is not None
        if walk.chosen[RESTORE] is walk.devices:
            return  # everybody has one
        devices, records = self.devices, self.records
        kinds = (self._kinds(side, RESTORE) for side in SIDES)
        places = walk.devices.places_without(devices.driver_ids, devices.bus_ids, *kinds)
        silent = walk.order[places]
        had_driver = records.owners[0][records.numbers[places] if records.lost else places] != -1
        waits = had_driver & (devices.driver_ids[silent] < 0)
        silent = silent[~(waits | devices.reclaimed[silent])]
        if silent.size:
            devices.reclaim(silent)
            devices.kernel.luo.reclaiming = False  # that was no callback


def _name(owner: Device | Driver | Bus) -> str:
    return owner.path if isinstance(owner, Device) else owner.name
