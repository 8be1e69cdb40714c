"""The calls of one event in blackout: what each cost, what it waits for, the longest chain.

What waits for what: REBOOT calls the participants of the chain one after the other; among the
devices, children come before parents, and for one device the driver before the bus. RESTORE calls
the participants in the reverse order; among the devices, parents come before children, and for one
device the bus before the driver. A batch call waits for all its devices.

The devices are columns, and so are the calls: a pass over a million takes a fraction of a second.
All figures are in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["REBOOT", "RESTORE", "Forest", "Label", "Phase", "Recorded"]

Label: TypeAlias = tuple[str, str, str, str]  # subsystem, event, kind, name
_Floats: TypeAlias = NDArray[np.float64]
_Index: TypeAlias = NDArray[np.int64]
_Mask: TypeAlias = NDArray[np.bool_]

REBOOT: Final = "REBOOT"
RESTORE: Final = "RESTORE"


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """The devices; parents come before their children.

    Attributes:
        parents: number of each one's parent, -1 for a root.
        depths: 0 for a root.
        path: of a device by its number.
    """

    parents: _Index
    depths: _Index
    path: Callable[[int], str]

    def by_depth(self) -> list[_Index]:
        """Return the numbers of the devices of each depth, roots first."""
        order = np.argsort(self.depths, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.depths))[:-1])

    def lift(self, devices: _Index, depth: int) -> _Index:
        """Return which ancestor of *depth* each has; itself if it is not below that."""
        while (deeper := self.depths[devices] > depth).any():
            devices = np.where(deeper, self.parents[devices], devices)
        return devices


@dataclass(frozen=True, slots=True, eq=False)
class Phase:
    """The calls of one event, in the order in which they were made.

    Attributes:
        event: :data:`REBOOT` or :data:`RESTORE`.
        forest: the devices.
        key: of each call, which callback: its place among somebody's labels.
        bus: whether it is a bus's.
        ns: what it cost.
        call, device: pairs, ascending by call: the device is served by the call. A subsystem's
            call has none.
        engine_ns: what of the event is in no callback.
    """

    event: str
    forest: Forest
    key: _Index
    bus: _Mask
    ns: _Floats
    call: _Index
    device: _Index
    engine_ns: float = 0.0

    def without(self, gone: _Mask) -> Phase:
        """Return it without the callbacks *gone*, a mask by label."""
        kept = ~gone[self.key]
        pairs = kept[self.call]
        return replace(
            self,
            key=self.key[kept],
            bus=self.bus[kept],
            ns=self.ns[kept],
            call=(np.cumsum(kept) - 1)[self.call[pairs]],
            device=self.device[pairs],
        )

    def served(self, call: int) -> _Index:
        """Return the devices that *call* served."""
        start, stop = np.searchsorted(self.call, [call, call + 1])
        return self.device[start:stop]

    # ---- with as many workers as you like ----

    def slack(self) -> _Floats:
        """Return how much longer each call could have taken without a longer longest chain."""
        upward = self.event == REBOOT
        through = self._before(upward) + self.ns + self._before(not upward)
        slack = np.zeros(len(self.ns))  # a subsystem is a participant of its own: on the chain
        slack[self.call] = through[self.call].max(initial=0) - through[self.call]
        return slack

    def chain(self) -> list[int]:
        """Return the calls of the longest chain, in order."""
        before = self._before(self.event == REBOOT)
        ends = before + self.ns
        subsystems = np.ones(len(self.ns), np.bool_)
        subsystems[self.call] = False
        chain = np.flatnonzero(subsystems).tolist()
        if self.call.size:
            at = int(self.call[np.argmax(ends[self.call])])
            chain.append(at)
            while before[at] > 0:
                at = self._cause(ends, float(before[at]), at)
                chain.append(at)
        return sorted(chain)  # as they were called

    def _before(self, upward: bool) -> _Floats:
        """Return how long the longest chain of device calls is that must end before each call.

        Args:
            upward: children before parents and driver before bus; else parents and bus first.
        """
        forest = self.forest
        before = np.zeros(len(self.ns))
        ready = np.zeros(len(forest.depths))  # when what comes first for a device has ended
        rank = self._rank(upward)
        order = np.lexsort((self.call, rank))  # those of a call stay together
        edges = np.flatnonzero(np.diff(rank[order])) + 1
        groups = {int(rank[group[0]]): group for group in np.split(order, edges) if group.size}
        depths = forest.by_depth()
        for depth in range(len(depths) - 1, -1, -1) if upward else range(len(depths)):
            rows = depths[depth]
            if not upward and depth:
                ready[rows] = ready[forest.parents[rows]]
            for side in (0, 1):
                group = groups.get((-2 if upward else 2) * depth + side)
                if group is None:
                    continue
                call, device = self.call[group], self.device[group]
                begins = np.flatnonzero(np.diff(call, prepend=-1))
                before[call[begins]] = np.maximum.reduceat(ready[device], begins)
                ready[device] = before[call] + self.ns[call]
            if upward and depth:
                np.maximum.at(ready, forest.parents[rows], ready[rows])
        return before

    def _rank(self, upward: bool) -> _Index:
        """Return a number for each pair: who may have to wait has a higher one."""
        late: _Mask = self.bus[self.call] == upward
        rank: _Index = self.forest.depths[self.device] * (-2 if upward else 2) + late
        return rank

    def _cause(self, ends: _Floats, when: float, at: int) -> int:
        """Return the call whose end at *when* the call *at* waited for."""
        forest, mine, rank = self.forest, self.served(at), self._rank(self.event == REBOOT)
        before = rank < rank[np.searchsorted(self.call, at)]
        pairs = np.flatnonzero(before & (ends[self.call] == when))
        theirs = self.device[pairs]
        if self.event == REBOOT:
            found = np.isin(forest.lift(theirs, int(forest.depths[mine[0]])), mine)
        else:
            found = np.isin(theirs, mine)
            while not found.any():
                mine = forest.parents[mine]
                found = np.isin(theirs, mine)
        return int(self.call[pairs[found.argmax()]])


# ---- from what was recorded ----


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """The callbacks of one event in blackout, as a kernel recorded them.

    Args:
        track: the kernel's, as of :attr:`luo.report.Report.tracks`.
        event: :data:`REBOOT` or :data:`RESTORE`.
        blackout: when it began and ended, on the clock of the spans.

    Attributes:
        spans: those of the event that began in blackout.

    Raises:
        ValueError: there are no spans, or some were dropped.
    """

    track: Any
    event: str
    blackout: tuple[int, int]
    spans: Any = field(init=False)
    _own: list[Label] = field(init=False)

    def __post_init__(self) -> None:
        profile, (begin, end) = self.track.profile, self.blackout
        if profile.dropped:
            raise ValueError(f"{self.track.name}: no room for {profile.dropped:,} of its spans")
        called = any(row["event"] == self.event for row in profile.rows())
        if called and not len(profile.spans):
            raise ValueError(f"{self.track.name}: no spans; its kernel needs spans=True")
        own = [tuple(label) for label in profile.labels]
        wanted = np.array([label[1] == self.event for label in own], np.bool_)
        began = profile.spans["begin_ns"]
        object.__setattr__(self, "_own", own)
        object.__setattr__(
            self,
            "spans",
            profile.spans[wanted[profile.spans["key"]] & (began >= begin) & (began < end)],
        )

    @property
    def labels(self) -> list[Label]:
        """What was called."""
        return [self._own[key] for key in np.unique(self.spans["key"])]

    @property
    def whole(self) -> list[Label]:
        """What is not called device by device: subsystems and batches."""
        return [self._own[key] for key in np.unique(self.spans["key"][self.spans["devices"] != 1])]

    @property
    def workers(self) -> int:
        """How many threads called."""
        return int(self.spans["worker"].max(initial=0)) + 1

    def phase(self, labels: Sequence[Label], forest: Forest) -> Phase:
        """Return the phase, whose keys are places in *labels*."""
        spans = self.spans
        number = {label: place for place, label in enumerate(labels)}
        key = np.array([number.get(label, -1) for label in self._own], np.int64)[spans["key"]]
        bus = np.array([label[2] == "bus" for label in self._own], np.bool_)[spans["key"]]
        # The last callback may have reclaimed its device before its end.
        ns = np.minimum(spans["ns"], self.blackout[1] - spans["begin_ns"]).astype(np.float64)
        return Phase(self.event, forest, key, bus, ns, *self._served())

    def _served(self) -> tuple[_Index, _Index]:
        """Return pairs: which call served which device."""
        spans = self.spans
        call = np.repeat(np.arange(len(spans)), spans["devices"])
        device = np.repeat(spans["device"], spans["devices"]).astype(np.int64)
        batched = spans["devices"] > 1
        for key in np.unique(spans["key"][batched]):
            of_key = spans["key"] == key
            alone = spans["device"][of_key & ~batched]
            device[(of_key & batched)[call]] = self._of_batches(
                spans[of_key & batched], self._own[key], alone
            )
        return call, device

    def _of_batches(self, batches: Any, label: Label, alone: Any) -> _Index:
        """Return the devices that *batches*, calls of one callback, served, one after the other.

        Those that the callback served *alone* are not among them.

        A span says how many there were and which was the first, which tells their depth. At one
        depth a device is known by its share of a batch's time; where other callbacks add to that,
        the order of the tree stands for it; and where drivers were bound by hand, the first device
        stands for all.
        """
        _, _, kind, name = label
        profile, count = self.track.profile, batches["devices"]
        tree = profile.tree
        names, ids = (
            (tree.driver_names, tree.driver_ids)
            if kind == "driver"
            else (tree.bus_names, tree.bus_ids)
        )
        first = np.repeat(batches["device"], count).astype(np.int64)
        if name not in names:
            return first
        share, spent = np.repeat(batches["ns"] / count, count), profile.costs[1]
        found = np.flatnonzero(ids[: len(spent)] == names.index(name))
        found = np.setdiff1d(found[spent[found] > 0], alone)
        depth, level = tree.depths[found], tree.depths[first]
        if not np.array_equal(np.sort(depth), np.sort(level)):
            return first
        ours, theirs = np.lexsort((spent[found], depth)), np.lexsort((share, level))
        if not np.allclose(spent[found[ours]], share[theirs], rtol=1e-5):
            ours, theirs = (np.argsort(of, kind="stable") for of in (depth, level))
        first[theirs] = found[ours]
        return first
