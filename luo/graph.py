"""Pictures of a live update, for Graphviz: the states, and who is called in which order.

Neither is drawn from a list of its own. The states are those of the transition table,
:data:`luo.liveupdate.NEXT`. The order of callbacks is what an engine did: drivers, buses and
subsystems are replaced by stand-ins with the same callbacks, which note that they are called, and
live updates are run with them: one to its end, one cancelled, and one for each callback that can
fail. So the picture shows the behaviour and the quirks of the kernel that was asked for.

Needs the package ``graphviz`` (``luo-kho[graph]``); the program of that name only to render.
"""

from __future__ import annotations

import errno
import html
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import graphviz
import numpy as np
from numpy.typing import NDArray

from luo.device import Batch, Bus, Driver, LiveUpdateOps, batch
from luo.drivers.interrupts import Interrupts
from luo.drivers.iommu import Iommu
from luo.drivers.kvm import Kvm
from luo.drivers.mm import Regions
from luo.errors import CallbackError
from luo.kernel import Kernel
from luo.liveupdate import NEXT
from luo.machine import DeviceTree, Machine
from luo.notifier import BACKWARDS, RESTORE, Event, State, Subsystem
from luo.quirks import HOME, QUIRKS, resolve

__all__ = ["Cast", "callbacks", "example", "states"]

#: Readable on white and on black, as the background is whatever the page has.
_INK: Final = "#767676"
_BACK: Final = "#d1495b"
_FILL: Final = {"state": "#dbe9f6", "subsystem": "#dbe9f6", "device": "#e2f0d9"}

_CALLBACKS: Final = (*(event.name.lower() for event in Event), RESTORE.lower())

#: Changes of state that only a quirk makes.
_ASTRAY: Final = {
    "node-left-behind": (State.NORMAL, State.UPDATED),
    "state-tested-unlocked": (State.NORMAL, State.NORMAL),
}


def _chart(name: str, **attributes: str) -> graphviz.Digraph:
    chart = graphviz.Digraph(name)
    chart.attr(bgcolor="transparent", fontname="Helvetica", fontcolor=_INK, **attributes)
    chart.attr("node", shape="box", style="filled,rounded", fontname="Helvetica", color=_INK)
    chart.attr("edge", fontname="Helvetica", fontsize="11", color=_INK, fontcolor=_INK)
    return chart


def _back(
    chart: graphviz.Digraph, tail: str, head: str, label: str = "", **attributes: str
) -> None:
    """Draw an arrow that a failure takes."""
    chart.edge(tail, head, label, color=_BACK, fontcolor=_BACK, style="dashed", **attributes)


# ---- states ----


def states(*, behaviour: str = "intended", quirks: Iterable[str] = ()) -> graphviz.Digraph:
    """Draw the transition table.

    Args:
        behaviour: as of :class:`~luo.kernel.Kernel`.
        quirks: likewise.

    Raises:
        ValueError: there is no such behaviour or quirk.
    """
    chart = _chart("states", rankdir="LR", nodesep="0.6", ranksep="1.1")
    chart.node("boot", label="cold boot", shape="plaintext", style="", fontcolor=_INK)
    for state in State:
        chart.node(state.name, fillcolor=_FILL["state"])
    chart.edge("boot", State.NORMAL.name)
    for (state, event), after in NEXT.items():
        chart.edge(state.name, after.name, label=event.name)
        if event.name not in BACKWARDS:
            _back(chart, state.name, State.NORMAL.name, f"{event.name} fails")
        if event is Event.REBOOT:
            label = "jump:\nthe next kernel"
            chart.edge(after.name, State.UPDATED.name, label=label, style="bold")
    for state in State:
        if (state, Event.REBOOT) not in NEXT and state is not State.NORMAL:
            chart.edge(state.name, State.NORMAL.name, label="ordinary kexec", style="dotted")
    for name in sorted(resolve(behaviour, quirks, HOME)):
        if name in _ASTRAY:
            before, after = _ASTRAY[name]
            _back(chart, before.name, after.name, name, tooltip=QUIRKS[name].wrong)
    return chart


# ---- who is called ----


@dataclass(frozen=True)
class Cast:
    """Who takes part in the update that is drawn.

    Attributes:
        tree: the devices.
        drivers, buses, subsystems: as of :class:`~luo.kernel.Kernel`; none of their callbacks
            is called.
        requested: the devices to keep, ``bool (n,)``; None for all that support live update.
    """

    tree: DeviceTree
    drivers: Sequence[Driver] = ()
    buses: Sequence[Bus] = ()
    subsystems: Sequence[Subsystem] = ()
    requested: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class _Call:
    """One callback that was called, with the devices that it was called for."""

    event: str
    kind: str
    name: str
    devices: tuple[str, ...] = ()


@dataclass
class _Log:
    """What the stand-ins were called for; the call number *fails* returns an error."""

    calls: list[_Call] = field(default_factory=list)
    fails: int = -1

    def note(self, call: _Call) -> int:
        self.calls.append(call)
        return -errno.EIO if len(self.calls) - 1 == self.fails else 0

    def subsystem(self, real: Subsystem) -> Subsystem:
        def stand_in(event: str) -> Callable[[Any], int]:
            return lambda context: self.note(_Call(event.upper(), "subsystem", real.name))

        there = {event: stand_in(event) for event in _CALLBACKS if getattr(real, event)}
        return Subsystem(real.name, priority=real.priority, **there)

    def ops(self, kind: str, owner: Driver | Bus) -> LiveUpdateOps | None:
        def stand_in(event: str, real: object) -> Any:
            def one(device: Any) -> int:
                return self._served(event, kind, owner.name, device, (device.path,))

            def many(devices: Any) -> int:
                paths = tuple(device.path for device in devices)
                return self._served(event, kind, owner.name, devices, paths)

            return batch(many) if isinstance(real, Batch) else one

        if owner.ops is None:
            return None
        there = {event: getattr(owner.ops, event) for event in _CALLBACKS}
        return LiveUpdateOps(**{k: stand_in(k, real) for k, real in there.items() if real})

    def _served(self, event: str, kind: str, name: str, what: Any, paths: tuple[str, ...]) -> int:
        result = self.note(_Call(event.upper(), kind, name, paths))
        if event == RESTORE.lower() and not result:
            what.reclaim()
        return result


@dataclass
class _Visit:
    """What stands in one box: a subsystem, or the sides of one or more devices in a row."""

    calls: list[tuple[int, _Call]]  # number in the log; those of the first device
    nr_devices: int

    def like(self, other: _Visit) -> bool:
        mine = [(call.kind, call.name) for _, call in self.calls]
        theirs = [(call.kind, call.name) for _, call in other.calls]
        return self.calls[0][1].kind != "subsystem" and mine == theirs


class _Engine:
    """Runs updates of one cast on a machine of its own."""

    def __init__(
        self, cast: Cast, behaviour: str, quirks: tuple[str, ...], kho_abi: str | None
    ) -> None:
        self._cast = cast
        self._settings = {"behaviour": behaviour, "quirks": quirks, "kho_abi": kho_abi}
        # Room for the records of all devices; slots have no bytes.
        self._machine = Machine(max(64 << 20, len(cast.tree) << 12), cast.tree)

    def _kernel(self, log: _Log) -> Kernel:
        cast = self._cast
        return Kernel(
            self._machine,
            drivers=[Driver(one.name, log.ops("driver", one)) for one in cast.drivers],
            buses=[Bus(one.name, log.ops("bus", one)) for one in cast.buses],
            subsystems=[log.subsystem(one) for one in cast.subsystems],
            **self._settings,  # type: ignore[arg-type]
        )

    def run(self, script: Callable[[Kernel, Kernel], object], fails: int = -1) -> list[_Call]:
        """Return the calls of *script*, which is given a running kernel and one that is not."""
        log = _Log(fails=fails)
        old = self._kernel(log).boot()
        new = self._kernel(log)
        try:
            wanted = self._cast.requested
            old.devices.request(old.devices.eligible() if wanted is None else wanted)
            script(old, new)
        except CallbackError:
            if fails < 0:
                raise
        finally:
            new.close()
            old.close()
        return log.calls


def _update(old: Kernel, new: Kernel) -> None:
    old.kexec_load(new)
    old.luo.prepare()
    old.kexec()
    new.luo.finish()


def _cancel(old: Kernel, new: Kernel) -> None:
    old.luo.prepare()
    old.luo.cancel()


def _dry_reboot(old: Kernel, new: Kernel) -> None:
    old.luo.prepare()
    old.luo.dry_reboot()


def _visits(calls: Iterable[tuple[int, _Call]]) -> Iterator[_Visit]:
    """Put the sides of one device together, then devices in a row that are served alike."""
    last: _Visit | None = None
    for key, group in itertools.groupby(calls, lambda pair: pair[1].devices or pair[0]):
        visit = _Visit(list(group), len(key) if isinstance(key, tuple) else 0)
        if last is not None and last.like(visit):
            last.nr_devices += visit.nr_devices
            continue
        if last is not None:
            yield last
        last = visit
    if last is not None:
        yield last


def _flat(calls: Iterable[_Call]) -> list[tuple[str, str, str]]:
    """Return (kind, name, device) of each device of each call."""
    return [(call.kind, call.name, device) for call in calls for device in (call.devices or ("",))]


class _Picture:
    """The callback sequence as it is drawn."""

    def __init__(self, engine: _Engine, kernel: str) -> None:
        self._engine = engine
        self.chart = _chart(
            "callbacks", splines="line", nodesep="0.5", ranksep="0.35", label=kernel
        )
        self._update = engine.run(_update)
        self._cancelled = engine.run(_cancel)
        self._at: dict[tuple[str, str, str, str], str] = {}  # call of one device -> box and port
        self._fallible: list[tuple[int, str]] = []  # calls that may fail, and their boxes

    def draw(self) -> graphviz.Digraph:
        """Draw a column for each event, the jump, and the ways back."""
        self._column(Event.PREPARE.name, self._update)
        last = self._column(Event.REBOOT.name, self._update)
        self._column(RESTORE, self._update)
        self._column(Event.FINISH.name, self._update)
        self._column(Event.CANCEL.name, self._cancelled)
        self.chart.node("jump", fillcolor="#f6e8c3", shape="cds", style="filled")
        self.chart.edge(last, "jump")
        self.chart.edge("jump:e", f"{RESTORE}:w", constraint="false", style="bold")
        for event, script in ((Event.PREPARE.name, _cancel), (Event.REBOOT.name, _dry_reboot)):
            ways = {
                box: self._way_back(self._engine.run(script, fails=number))
                for number, box in self._fallible
                if self._update[number].event == event
            }
            if len(ways) > 1 and len(set(ways.values())) == 1:
                ways = {event: next(iter(ways.values()))}
            for box, (head, label) in ways.items():
                # CANCEL stands between the two.
                tail, into = ("e", "w") if event == Event.PREPARE.name else ("w", "e")
                self._go_back(f"{box}:{tail}", f"{head}:{into}", label)
        head, label = self._way_back(self._engine.run(_dry_reboot))
        self._go_back("jump:w", f"{head}:e", label)
        return self.chart

    def _column(self, event: str, calls: list[_Call]) -> str:
        """Draw the calls of *event*, one below the other; return the last box."""
        chosen = [(n, call) for n, call in enumerate(calls) if call.event == event]
        with self.chart.subgraph(name=f"cluster_{event}") as column:
            column.attr(color=_INK, style="rounded", label="", margin="12")
            column.node(event, label=_heading(event), shape="plaintext", style="", fontcolor=_INK)
            above = event
            for number, visit in enumerate(_visits(chosen)):
                box = f"{event}{number}"
                self._box(column, box, event, visit)
                column.edge(above, box)
                above = box
            if not chosen:
                above = f"{event}-nobody"
                column.node(above, "nobody is called", shape="plaintext", style="", fontcolor=_INK)
                column.edge(event, above)
        return above

    def _box(self, column: graphviz.Digraph, box: str, event: str, visit: _Visit) -> None:
        first = visit.calls[0][1]
        if first.kind == "subsystem":
            column.node(box, graphviz.nohtml(first.name), fillcolor=_FILL["subsystem"])
        else:
            path = first.devices[0].rsplit("/", 1)[-1]
            title = path if visit.nr_devices == 1 else f"{visit.nr_devices:,} devices"
            cells = "".join(
                f'<tr><td port="p{i}">{html.escape(f"{call.kind} {call.name}")}</td></tr>'
                for i, (_, call) in enumerate(visit.calls)
            )
            column.node(
                box,
                f'<<table border="0" cellborder="1" cellspacing="0" bgcolor="{_FILL["device"]}">'
                f'<tr><td border="0">{html.escape(title)}</td></tr>{cells}</table>>',
                shape="plain",
                style="",
            )
        for i, (number, call) in enumerate(visit.calls):
            port = box if first.kind == "subsystem" else f"{box}:p{i}"
            for key in _flat([call]):
                self._at[event, *key] = port
            if event not in BACKWARDS:
                self._fallible.append((number, port))

    def _go_back(self, tail: str, head: str, label: str) -> None:
        # At its tail: a label in the middle would bend the line.
        _back(self.chart, tail, head, taillabel=label, constraint="false")

    def _way_back(self, calls: list[_Call]) -> tuple[str, str]:
        """Return the first CANCEL box after a failure, and what there is to say about the way."""
        event = Event.CANCEL.name
        everybody = _flat(call for call in self._cancelled if call.event == event)
        done = _flat(call for call in calls if call.event == event)
        if not done:
            return event, "nobody"
        # A way that goes on to the end of the column needs no words.
        whole = done == everybody[-len(done) :]
        label = "" if whole else f"{len(done)} of {len(everybody)}"
        return next(
            (self._at[event, *key] for key in done if (event, *key) in self._at), event
        ), label


def _heading(event: str) -> str:
    if event == RESTORE:
        return f"{RESTORE}\nboot into {State.UPDATED.name}"
    before, after = next((s, NEXT[s, e]) for s, e in NEXT if e.name == event)
    return f"{event}\n{before.name} → {after.name}"


def callbacks(
    cast: Cast,
    *,
    behaviour: str = "intended",
    quirks: Iterable[str] = (),
    kho_abi: str | None = None,
) -> graphviz.Digraph:
    """Draw who is called in which order, and where a failure leads.

    A box is a subsystem or a device with its callbacks; devices in a row with the same callbacks
    share one. A dashed arrow leads from a callback that may fail to the first cancel callback
    that is called then; from there it goes down the column to its end, unless the arrow says how
    many of all are called.

    Args:
        cast: who takes part.
        behaviour: as of :class:`~luo.kernel.Kernel`.
        quirks: likewise.
        kho_abi: likewise.

    Raises:
        ValueError: there is no such behaviour or quirk.
    """
    quirks = tuple(quirks)
    kernel = " ".join([behaviour, *quirks])
    return _Picture(_Engine(cast, behaviour, quirks, kho_abi), kernel).draw()


def example(
    drivers: Sequence[Driver] = (),
    buses: Sequence[Bus] = (),
    subsystems: Sequence[Subsystem] = (),
) -> Cast:
    """Make a small cast: the built-in subsystems, and one device of each driver below a port.

    Args:
        drivers: the drivers; without any, one that has every callback.
        buses: the devices are on the first; without any, on one that has every callback.
        subsystems: others, behind the built-in ones.
    """
    every = LiveUpdateOps(**dict.fromkeys(_CALLBACKS, lambda device: None))  # type: ignore[arg-type]
    known = {"port": Driver("port", LiveUpdateOps() if drivers else every)}
    drivers = drivers or [Driver("nic", every)]
    known.update({driver.name: driver for driver in drivers})
    buses = buses or [Bus("pci", every)]
    tree = DeviceTree()
    port = tree.add("port", None, buses[0].name, "port")
    for number, driver in enumerate(drivers):
        name = driver.name.replace("/", "!")
        tree.add(f"{name}{number}", port, buses[0].name, driver.name)
    parts = {part.name: part for part in (p().subsystem for p in (Regions, Kvm, Iommu, Interrupts))}
    parts.update({part.name: part for part in subsystems})
    return Cast(tree, list(known.values()), buses, list(parts.values()))
