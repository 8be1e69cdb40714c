"""The live update orchestrator: the state machine and its events.

Mirrors RFC v1's ``kernel/liveupdate.c`` (``spec/luo-rfc-v1.md`` 1.3, 1.4, 1.6): what it meant to
do; and where its code does otherwise, that too, by the name of the quirk (:mod:`luo.quirks`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from luo import abi
from luo.errors import (
    CallbackError,
    FdtError,
    HandoverError,
    KernelPanic,
    KhoError,
    StateError,
    from_errno,
)
from luo.fdt import Fdt, FdtWriter
from luo.kho import KhoNode
from luo.notifier import (
    RESTORE,
    Context,
    Event,
    Mortal,
    NotifierChain,
    Participant,
    Priority,
    State,
    Step,
    Subsystem,
    SubsystemParticipant,
)
from luo.state_lock import StateLock

if TYPE_CHECKING:
    from luo._kho import CallRecorder
    from luo.kho import Incoming, Kho, Snapshot

__all__ = [
    "CancelResult",
    "Context",
    "Event",
    "FinishResult",
    "Orchestrator",
    "Priority",
    "State",
    "Step",
    "Subsystem",
]

_log = logging.getLogger(__name__)

#: The transition table (RFC v1 1.4): an absent pair is EINVAL. After REBOOT this kernel stays
#: PREPARED; the next one boots into UPDATED.
NEXT: Final = {
    (State.NORMAL, Event.PREPARE): State.PREPARED,
    (State.PREPARED, Event.REBOOT): State.PREPARED,
    (State.PREPARED, Event.CANCEL): State.NORMAL,
    (State.UPDATED, Event.FINISH): State.NORMAL,
}


#: Kinds of steps that may be under way side by side.
_OVERLAPPING: Final = ("driver", "bus")


def _give_up(steps: Iterable[Step]) -> None:
    """Have *steps*, which were handed out, never run."""
    for step in steps:
        step.done = True


@dataclass(frozen=True, slots=True)
class CancelResult:
    """What CANCEL came to; the state is NORMAL in any case.

    Attributes:
        failures: every cancel callback that failed, in the order of calling.
    """

    failures: tuple[CallbackError, ...] = ()


@dataclass(frozen=True, slots=True)
class FinishResult:
    """What FINISH came to; the state is NORMAL in any case.

    Attributes:
        unreclaimed: paths of the devices that were kept and never reclaimed.
        failures: every finish callback that failed, in the order of calling.
    """

    unreclaimed: tuple[str, ...] = ()
    failures: tuple[CallbackError, ...] = ()


class DeviceLayer(Participant, Protocol):
    """The devices in the chain; :mod:`luo.dev_liveupdate` has them."""

    def free_list(self, failure: BaseException | None = None) -> None:
        """Forget which devices CANCEL has to reach; all, or those from *failure* on."""
        ...

    def luo_properties(self) -> dict[str, int]:
        """Return the values of the ``devices`` node: count and chain heads."""
        ...

    def luo_node(self) -> KhoNode:
        """Return the ``devices`` node of an inline tree, with everything in it."""
        ...

    def nodes_root(self) -> KhoNode | None:
        """Return the tree of the KHO nodes of devices, drivers and buses, if there are any."""
        ...

    def unreclaimed(self) -> Any:
        """Return the numbers of the devices that came over and do not run again."""
        ...


@dataclass(slots=True)
class LuoIncoming:
    """What LUO's node of the previous kernel says, checked.

    Attributes:
        version: (major, minor).
        devices: properties of the ``devices`` node: count, and heads of the two block chains.
        data: the u64 of each subsystem, by name.
        phys, nbytes: the blob; 0 bytes if it is inline.
    """

    version: tuple[int, int]
    devices: dict[str, int] = field(default_factory=dict)
    data: dict[str, int] = field(default_factory=dict)
    phys: int = 0
    nbytes: int = 0

    @classmethod
    def read(cls, incoming: Incoming) -> LuoIncoming | None:
        """Read LUO's node; None if the previous kernel left none. Reads memory only.

        Raises:
            HandoverError: the blob, or a property in it, is not what the format says.
            KernelPanic: its version is not ours (RFC v1 1.3, steps 2 and 3).
        """
        inline = incoming.generation.inline
        try:
            if inline:
                phys, nbytes = incoming.handover.fdt_phys, 0
                tops = incoming.root.root.children
                root = next((node for node in tops if node.name == abi.LUO_NODE), None)
                if root is None:
                    return None
            else:
                if abi.LUO_NODE not in incoming.subtrees():
                    return None
                phys, nbytes = incoming.retrieve_subtree(abi.LUO_NODE)
                if not incoming.memory.is_populated(phys, max(nbytes, 1)):  # or reading fills it
                    raise HandoverError(f"{abi.LUO_NODE}: never written", phys)
                root = Fdt(incoming.load_subtree(abi.LUO_NODE)).root
            raw = bytes(root["version"]) if "version" in root else b""
            if len(raw) != 8:
                raise KernelPanic(f"{abi.LUO_NODE}: version has {len(raw)} bytes, 8 are expected")
            version = struct.unpack("=II", raw)
            if version[0] != abi.LUO_VERSION[0] or version[1] > abi.LUO_VERSION[1]:
                raise KernelPanic(
                    f"{abi.LUO_NODE}: version {version[0]}.{version[1]},"
                    f" this kernel reads {abi.LUO_VERSION[0]}.0 to"
                    f" {abi.LUO_VERSION[0]}.{abi.LUO_VERSION[1]}"
                )
            found = cls(version, phys=phys, nbytes=nbytes)
            for node in root.children:
                if node.name == "devices":
                    names = ("count",) if inline else abi.LUO_DEVICES_PROPERTIES
                    found.devices = {
                        name: _native_u64(node, name, phys)
                        for name in names
                        if name != "nodes" or name in node
                    }
                elif node.name == "subsystems":
                    found.data = {
                        child.name: _native_u64(child, "data", phys) for child in node.children
                    }
        except FdtError as error:
            raise HandoverError(f"{abi.LUO_NODE}: {error}", phys) from error
        return found


def _native_u64(node: Any, name: str, phys: int) -> int:
    raw = bytes(node[name]) if name in node else b""
    if len(raw) != 8:
        raise HandoverError(
            f"{abi.LUO_NODE} {node.path}: {name} has {len(raw)} bytes, 8 are expected", phys
        )
    value: int = struct.unpack("=Q", raw)[0]
    return value


class Orchestrator(Mortal):
    """LUO of one kernel.

    Args:
        kernel: the kernel; callbacks see it as ``context.kernel``.
        recorder: where every callback's time goes.
        enabled: whether ``liveupdate=`` and ``kho=`` are both on.
        quirks: names of what it does as RFC v1's code (:mod:`luo.quirks`).
        phase: context manager that times a phase by name.
        observer: called as ``observer("state", name)`` after each change of state.
        notify: called with the path below ``/sys`` of an attribute whose value has changed.

    Attributes:
        initialised: whether its directory in ``/sys/kernel`` is there.
    """

    def __init__(
        self,
        kernel: Any,
        recorder: CallRecorder,
        *,
        enabled: bool = True,
        quirks: Set[str] = frozenset(),
        phase: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext,
        observer: Callable[[str, str], None] | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.kernel = kernel
        self.enabled = enabled
        self.initialised = False
        self._quirks = quirks
        self._notify = notify
        self._recorder = recorder
        self._phase = phase
        self._observer = observer
        self._state = State.NORMAL
        self._chain = NotifierChain(quirks)
        self._layer: DeviceLayer | None = None
        self._lock = StateLock("callback-deadlock" in quirks)
        self._page = 0  # LUO's blob of the outgoing side, allocated in PREPARE
        self._joined: KhoNode | int = 0  # LUO's node in KHO's root tree, or the blob's address
        self._left: KhoNode | None = None  # quirk node-left-behind: a node of an earlier update
        self._published = False  # REBOOT has run; only the jump or CANCEL may follow
        self._before: Snapshot | None = None  # what was preserved before PREPARE
        self._collected: list[CallbackError] = []
        self._warned: set[tuple[str, str]] = set()  # quirk warn-once
        self._at: Participant | None = None  # who is being called
        self._lost: Any = ()  # numbers of the devices that FINISH found unreclaimed
        self.incoming: LuoIncoming | None = None
        self.reboot_began_ns = 0
        self.last_reclaim_ns = 0
        self.restored_late: list[str] = []  # whose RESTORE began when no device was to be reclaimed
        self.reclaiming = False  # a callback has reclaimed since this was last cleared

    # ---- what anybody may ask ----

    @property
    def state(self) -> State:
        """The present state; read without the lock, as the ``state`` file is."""
        return self._state

    @contextlib.contextmanager
    def read_state(self) -> Iterator[State]:
        """Hold the state as it is while the block runs (``liveupdate_read_state_enter()``).

        Raises:
            StateError: EDEADLK from a callback of a running event, which holds the lock; EINTR
                if the thread was killed while it waited.
        """
        with self._lock.reading("read_state", errno.EINTR):
            yield self._state

    def writing_attribute(self, what: str) -> AbstractContextManager[None]:
        """Hold the state while a device's attribute is written; as :meth:`read_state`, but EAGAIN.

        Raises:
            StateError: EDEADLK from a callback, EAGAIN if killed while it waited.
        """
        return self._lock.reading(what)

    def kill(self, thread: int) -> bool:
        """Have *thread* give up waiting for the state, as a fatal signal does (RFC v1 1.4).

        Its event or write fails with EAGAIN, its :meth:`read_state` with EINTR.

        Args:
            thread: as of ``threading.get_ident()``.

        Returns:
            whether it waited.
        """
        return self._lock.kill(thread)

    def require_normal(self, what: str) -> None:
        """Raise ``StateError(EINVAL)`` unless the state is NORMAL."""
        if self._state is not State.NORMAL:
            raise StateError(errno.EINVAL, f"{what}: needs NORMAL, the state is {self._state.name}")

    def refuse_callback(self, what: str) -> None:
        """Raise ``StateError(EDEADLK)`` if *what* is called from a callback of a running event."""
        self._lock.refuse_deadlock(what)

    @property
    def published(self) -> bool:
        """Whether REBOOT has run, and neither jump nor cancel has followed."""
        return self._published

    def note_reclaim(self) -> None:
        """Note the time: a device has been reclaimed."""
        self.last_reclaim_ns = self._recorder.read_clock()
        self.restored_late.clear()
        self.reclaiming = True

    # ---- who takes part ----

    def register(self, subsystem: Subsystem) -> None:
        """Add *subsystem* to the chain.

        Raises:
            KhoError: EEXIST if the name is taken, EBUSY in PREPARED: it would get REBOOT or
                CANCEL without PREPARE (RFC v1 quirk 11).
        """
        if not isinstance(subsystem, Subsystem):
            raise TypeError(f"register: {subsystem!r} is no Subsystem")
        with self._lock.reading(f"register {subsystem.name}"):
            self._require_unprepared(f"register {subsystem.name}")
            participant = SubsystemParticipant(subsystem, self.kernel, self._recorder)
            participant.prepared = self._state is State.PREPARED
            self._chain.register(participant)

    def unregister(self, subsystem: Subsystem | str) -> None:
        """Remove a subsystem from the chain.

        Raises:
            KhoError: ENOENT if it is not registered, EBUSY in PREPARED: it would never be
                cancelled.
        """
        name = subsystem if isinstance(subsystem, str) else subsystem.name
        with self._lock.reading(f"unregister {name}"):
            self._require_unprepared(f"unregister {name}")
            if self._layer is not None and name == self._layer.name:
                raise from_errno(errno.ENOENT, f"unregister {name}: is no subsystem")
            self._chain.unregister(name)

    @property
    def subsystems(self) -> tuple[Subsystem, ...]:
        """Who is registered, in the order of PREPARE."""
        links = (link for link in self._chain if isinstance(link, SubsystemParticipant))
        return tuple(link.subsystem for link in links)

    def _require_unprepared(self, what: str) -> None:
        if self._state is State.PREPARED and "register-when-prepared" not in self._quirks:
            raise from_errno(errno.EBUSY, f"{what}: a live update is prepared")

    def join_devices(self, layer: DeviceLayer) -> None:
        """Add the device layer to the chain."""
        self._chain.register(layer)
        self._layer = layer

    # ---- events ----

    def prepare(self) -> None:
        """NORMAL to PREPARED: every participant saves what it can while all still runs.

        Raises:
            StateError: EINVAL in another state, EDEADLK from a callback, EOPNOTSUPP if disabled.
            CallbackError: a callback failed; everything is as before.
            KhoNoMemoryError: no room for slots and records; everything is as before.
        """
        self._run(Event.PREPARE)

    def reboot(self) -> bool:
        """Call the REBOOT callbacks and publish LUO's node: what comes before the jump.

        Returns:
            False, and nothing is done, unless the state is PREPARED: then an ordinary kexec
            goes on, as in the kernel.

        Raises:
            StateError: EALREADY if it has run and neither jump nor cancel followed, EDEADLK from
                a callback.
            CallbackError: a callback failed; all were cancelled, the state is NORMAL.
        """
        self.refuse_callback(Event.REBOOT.name)
        if self._state is not State.PREPARED:
            return False
        try:
            self._run(Event.REBOOT)
        except StateError as error:
            if error.errno != errno.EINVAL or self.state is State.PREPARED:
                raise
            return False  # somebody cancelled between the test and the lock
        return True

    def dry_reboot(self) -> CancelResult:
        """Call the REBOOT callbacks, then cancel: for authors of drivers (RFC v1's list, 4).

        Raises:
            StateError: EINVAL unless the state is PREPARED.
            CallbackError: a REBOOT callback failed.
        """
        if not self.reboot():
            raise StateError(
                errno.EINVAL, f"dry reboot: needs PREPARED, the state is {self._state.name}"
            )
        return self.cancel()

    def cancel(self) -> CancelResult:
        """PREPARED to NORMAL: every participant undoes PREPARE, in the reverse order.

        Raises:
            StateError: EINVAL in another state.
        """
        return CancelResult(self._run(Event.CANCEL))

    def finish(self) -> FinishResult:
        """UPDATED to NORMAL: the update is over, what carried it is freed.

        Raises:
            StateError: EINVAL in another state.
        """
        return self.finished(self._run(Event.FINISH))

    def finished(self, failures: tuple[CallbackError, ...]) -> FinishResult:
        """Return what a FINISH that has just run by :meth:`steps` came to.

        Args:
            failures: as :meth:`collect` returned them.
        """
        tree = self.kernel.devices.tree
        return FinishResult(tuple(tree.path(int(index)) for index in self._lost), failures)

    def steps(self, event: Event, *, ahead: bool = False) -> Generator[Step, None, None]:
        """Run *event* one callback at a time; ``prepare()`` and the others run the same steps.

        Each step runs by its ``run()``, or when the next one is asked for. When the last one has
        run the event is complete. Closing the generator early rolls PREPARE and REBOOT back;
        CANCEL and FINISH have no way back and are completed.

        Args:
            event: the event; the state must allow it when the first step is asked for.
            ahead: for callers whose steps take time and overlap. Steps of drivers and buses may
                then run after the next one has been asked for, in any order but driver before bus
                of a device as they come, until a step of kind ``"barrier"``: when what follows it
                is asked for, those left run.

        Yields:
            the steps, in order.
        """
        return self._stepped(Event(event), ahead)

    def _stepped(self, event: Event, ahead: bool) -> Generator[Step, None, None]:
        with self._phase(event.name.lower()):
            yield from self._transition(event, bulk=False, ahead=ahead)

    def _run(self, event: Event) -> tuple[CallbackError, ...]:
        with (
            self._phase(event.name.lower()),
            contextlib.closing(self._transition(event, bulk=True)) as steps,
        ):
            for step in steps:
                step.run()
        return self.collect()

    def collect(self) -> tuple[CallbackError, ...]:
        """Return, and forget, the cancel or finish callbacks that failed in :meth:`steps`."""
        failures, self._collected = tuple(self._collected), []
        return failures

    def _transition(
        self, event: Event, bulk: bool, ahead: bool = False
    ) -> Generator[Step, None, None]:
        with self._lock.writing(event.name):
            self._require(event)
            self._collected = []
            if event is Event.REBOOT:
                self.reboot_began_ns = self._recorder.read_clock()
            if event is Event.FINISH and self._layer is not None:
                self._lost = self._layer.unreclaimed()
            steps = self._steps(event, bulk)
            opened: list[Step] = []  # handed out, not over yet
            ended = stopped = False

            def fail(error: BaseException) -> bool:
                nonlocal ended, stopped
                if self._passes_for_success(event, error):
                    stopped = True
                    return True
                ended = True
                left = [step for step in opened if not step.done]
                if event in (Event.PREPARE, Event.REBOOT):
                    _give_up(left)
                    steps.close()
                    self._roll_back(event, error)
                else:
                    for step in left:
                        step._fail = None
                    self._complete(event, itertools.chain(left, steps))
                return False

            try:
                if event is Event.PREPARE:
                    self._open()
                elif event is Event.CANCEL:
                    self._kho.unfinalize()  # else nothing can be given up
                for step in steps:
                    step._fail = fail
                    if ahead or step.kind != "barrier":
                        opened.append(step)
                        yield step
                    if not ahead or step.kind not in _OVERLAPPING:
                        for each in opened:
                            if not (each.done or ended or stopped):
                                each.run()
                        opened.clear()
                    if ended:
                        return
                    if stopped:
                        _give_up(opened)
                        steps.close()
                        break
                if event is Event.PREPARE:
                    self._close_map()
                elif event is Event.REBOOT:
                    self._publish()
                self._enter(event)
            except BaseException as error:
                # else the kernel went while steps were open
                if not ended and not self.gone and fail(error):
                    return
                raise

    def _require(self, event: Event) -> None:
        if not self.enabled:
            raise StateError(
                errno.EOPNOTSUPP, f"{event.name}: live update is off (liveupdate= or kho=)"
            )
        retested = event is not Event.REBOOT or "state-tested-unlocked" not in self._quirks
        if (self._state, event) not in NEXT and retested:
            wanted = " or ".join(state.name for state, wants in NEXT if wants is event)
            raise StateError(
                errno.EINVAL, f"{event.name}: needs {wanted}, the state is {self._state.name}"
            )
        if event is Event.REBOOT and self._published:
            raise StateError(errno.EALREADY, "REBOOT: has run; jump or cancel")
        frozen = event is Event.PREPARE and self._kho.frozen
        if frozen and "written-in-reboot" not in self._quirks:
            raise from_errno(errno.EBUSY, "PREPARE: somebody has finalized KHO")

    def _steps(self, event: Event, bulk: bool) -> Generator[Step, None, None]:
        collected = self._collected
        for participant in self._chain.order(event.name):
            self._at = participant
            stops = False
            try:
                yield from participant.steps(event.name, bulk)
            finally:
                if not self.gone:  # else the kernel went while steps were open
                    told, stops = self._collect(event, participant)
                    collected += told
            if stops:
                return
            freed = event is Event.REBOOT and "list-freed-at-reboot" in self._quirks
            if freed and participant is self._layer:
                self._layer.free_list()

    def _collect(self, event: Event, participant: Participant) -> tuple[list[CallbackError], bool]:
        """Return the collected failures that are told, and whether the chain stops at them."""
        failures = participant.collect()
        stops = (
            bool(failures)
            and participant is not self._layer
            and "failure-stops-the-rest" in self._quirks
        )
        if "positive-return-stops" in self._quirks:
            failures = [failure for failure in failures if (failure.returned or 0) <= 0]
        if "warn-once" in self._quirks and failures:
            key = (participant.name, event.name)
            failures = [] if key in self._warned else failures[:1]
            self._warned.add(key)
        return failures, stops

    def _passes_for_success(self, event: Event, error: BaseException) -> bool:
        """Whether *error* stops the chain and is no failure: RFC v1 1.7."""
        if not (
            "positive-return-stops" in self._quirks
            and event in (Event.PREPARE, Event.REBOOT)
            and isinstance(error, CallbackError)
            and (error.returned or 0) > 0
        ):
            return False
        if self._at is self._layer:
            self._undo_devices(event, error)
        if event is Event.PREPARE:
            self._undo(Event.CANCEL)
            for participant in self._chain:  # CANCEL will go to everyone
                if isinstance(participant, SubsystemParticipant):
                    participant.prepared = True
        return True

    def _enter(self, event: Event) -> None:
        if event is Event.CANCEL:
            self._withdraw()
        elif event is Event.FINISH:
            self._discard_incoming()
        self._set_state(NEXT.get((self._state, event), self._state))
        if event is Event.FINISH and len(self._lost):
            self.kernel.probe(self._lost)  # what nobody restored is a device like any other

    def _set_state(self, state: State) -> None:
        if state is self._state:
            return
        _log.info("switched from [%s] to [%s]", self._state.name.lower(), state.name.lower())
        self._state = state
        if self._observer is not None:
            self._observer("state", state.name.lower())
        if self._notify is not None and self.initialised:
            lost = "poll-never-wakes" in self._quirks
            self._notify("kernel/state" if lost else "kernel/liveupdate/state")

    def _roll_back(self, event: Event, error: BaseException) -> None:
        # The first error is the one that is raised; what fails here is attached to it.
        undo: list[BaseException] = []
        self._kho.unfinalize()
        if self._at is self._layer:
            undo += self._undo_devices(event, error)
        undo += self._undo(event)
        self._withdraw()
        self._set_state(State.NORMAL)
        self._collected = []
        for problem in undo:
            error.add_note(f"while cancelling: {problem}")
        if isinstance(error, CallbackError):
            error.undo_errors = undo
            error.rolled_back = not undo

    def _undo_devices(self, event: Event, error: BaseException) -> list[BaseException]:
        """Undo what the device layer does by itself when one of its callbacks fails.

        Intended, CANCEL reaches every prepared device, and that is in :meth:`_undo`.
        """
        layer = self._layer
        assert layer is not None
        if event is Event.REBOOT:
            if "reboot-half-cancelled" not in self._quirks:
                return []
            layer.free_list(error)
        elif "cancel-not-reversed" not in self._quirks:
            return []  # nobody is cancelled before it anyway
        return self._cancel(layer)[0]

    def _undo(self, event: Event) -> list[BaseException]:
        """Send CANCEL to whoever was prepared."""
        undo: list[BaseException] = []
        for participant in self._chain.order(Event.CANCEL.name):
            problems, stops = self._cancel(participant)
            undo += problems
            if stops:
                break
        return undo

    def _cancel(self, participant: Participant) -> tuple[list[BaseException], bool]:
        problems = self._finish_steps(participant.steps(Event.CANCEL.name, True))
        told, stops = self._collect(Event.CANCEL, participant)
        return [*problems, *told], stops

    def _complete(self, event: Event, steps: Iterator[Step]) -> None:
        for problem in self._finish_steps(steps):
            _log.warning("%s: %s", event.name, problem)
        self._enter(event)

    @staticmethod
    def _finish_steps(steps: Iterator[Step]) -> list[BaseException]:
        # An interrupt must not stop half-way here: it is noted, and what is left still runs.
        problems: list[BaseException] = []
        while True:
            try:
                step = next(steps, None)
                if step is None:
                    return problems
                step.run()
            except BaseException as error:
                problems.append(error)

    # ---- LUO's node ----

    def _blob(self) -> bytes:
        writer = FdtWriter()
        with writer.node(""):
            writer.property("version", struct.pack("=II", *abi.LUO_VERSION))
            with writer.node("devices"):
                properties = self._layer.luo_properties() if self._layer is not None else {}
                for name in abi.LUO_DEVICES_PROPERTIES:
                    writer.property_native_u64(name, properties.get(name, 0))
            with writer.node("subsystems"):
                for participant in self._chain:
                    if isinstance(participant, SubsystemParticipant):
                        with writer.node(participant.name):
                            writer.property_native_u64("data", participant.context.data)
        return bytes(writer.finish())

    def _node(self) -> KhoNode:
        node, devices, subsystems = KhoNode(), KhoNode(), KhoNode()
        node.properties["version"] = struct.pack("=II", *abi.LUO_VERSION)
        node.children["devices"] = devices if self._layer is None else self._layer.luo_node()
        nodes = None if self._layer is None else self._layer.nodes_root()
        if nodes is not None:
            node.children["nodes"] = nodes
        devices.properties["count"] = bytes(8)
        node.children["subsystems"] = subsystems
        for participant in self._chain:
            if isinstance(participant, SubsystemParticipant):
                child = subsystems.children[participant.name] = KhoNode()
                child.properties["data"] = struct.pack("=Q", participant.context.data)
        return node

    # Where the node is added depends on when the generation has KHO write its map: at the end of
    # PREPARE, so that REBOOT patches the blob in place; or in REBOOT.

    @property
    def _kho(self) -> Kho:
        kho: Kho = self.kernel.kho
        return kho

    def _open(self) -> None:
        self._before = self._kho.snapshot()
        for participant in self._chain:
            participant.start()
        if not self._kho.generation.inline:
            # no value in the blob changes its length
            self._page = self._kho.alloc_preserve(len(self._blob()))

    def _close_map(self) -> None:
        when = self._kho.generation.finalize
        if when == "prepare":
            self._join()
            self._kho.finalize()
        elif when == "jump" and "written-in-reboot" not in self._quirks and self._left is None:
            # What does not fit is found out while there is a way back.
            self._join()
            nbytes = self._kho.tree_bytes()
            self._leave()
            if nbytes > self._kho.fdt_max:
                raise from_errno(
                    errno.E2BIG, f"PREPARE: tree of {nbytes} bytes, fdt_max is {self._kho.fdt_max}"
                )

    def _publish(self) -> None:
        when = self._kho.generation.finalize
        if not self._page and not self._kho.generation.inline:
            self._open()  # quirk state-tested-unlocked: nothing has been prepared
        if when == "prepare":
            self._write_blob()
        else:
            self._join()
            if when == "reboot":
                self._kho.finalize()
        self._published = True

    def _write_blob(self) -> int:
        blob = self._blob()
        self.kernel.memory.view(self._page, len(blob))[:] = blob
        return len(blob)

    def _join(self) -> None:
        if not self._kho.generation.inline:
            self._kho.add_subtree(abi.LUO_NODE, self._page, self._write_blob())
            self._joined = self._page
            return
        if self._left is not None:
            code = self._kho.add_node(None, abi.LUO_NODE, self._left)
            raise KhoError(code, f"REBOOT: kho_add_node() returned {code}: {abi.LUO_NODE} is there")
        node = self._node()
        self._kho.add_node(None, abi.LUO_NODE, node)
        self._joined = node  # not before: what is not in cannot be taken out again

    def take_back(self) -> None:
        """Withdraw LUO's node after a jump that did not happen, from outside of any event."""
        if self._published:
            self._withdraw()

    def _withdraw(self) -> None:
        if isinstance(self._joined, KhoNode) and "node-left-behind" in self._quirks:
            # RFC v1's node has nothing but the version; what ours points to is gone.
            self._left, self._joined = self._joined, 0
            self._left.children.clear()
        if self._joined:
            self._leave()
        self._published = False
        if self._page:
            self._kho.unpreserve_free(self._page)
            self._page = 0
        if self._before is not None:
            self._kho.reinstate(self._before)
            self._before = None

    def _leave(self) -> None:
        where, self._joined = self._joined, 0
        if isinstance(where, KhoNode):
            self._kho.remove_node(None, abi.LUO_NODE)
            return
        try:
            self._kho.remove_subtree(where)
        except KhoError as error:
            if error.errno != errno.ENOENT:  # an abort has forgotten it already
                raise

    # ---- the new kernel's side ----

    def startup(self, found: LuoIncoming | None) -> None:
        """Set the first state from what the previous kernel left (RFC v1 1.3).

        Raises:
            KernelPanic: it left LUO's node and live update is off here.
        """
        if found is None:
            return
        if not self.enabled:
            raise KernelPanic(f"{abi.LUO_NODE}: found, but live update is off in this kernel")
        _log.info("live update boot")
        self.incoming = found
        for participant in self._chain:
            if isinstance(participant, SubsystemParticipant):
                participant.context.data = found.data.get(participant.name, 0)
        self._state = State.UPDATED  # the first state is no transition, and wakes nobody
        if self._observer is not None:
            self._observer("state", "updated")

    def restore(self) -> tuple[CallbackError, ...]:
        """Call the restore callbacks, against the order of PREPARE; failures are collected.

        Returns:
            every callback that failed; its device stays unreclaimed.
        """
        with self._lock.writing(RESTORE):
            failures: list[CallbackError] = []
            problems: list[BaseException] = []
            for participant in self._chain.order(RESTORE):
                self.restored_late.append(participant.name)
                problems += self._finish_steps(participant.steps(RESTORE, True))
                failures += participant.collect()
            if problems:  # an interrupt: there is no way back, so everybody had a turn first
                raise problems[0]
            return tuple(failures)

    def restoring(self) -> Generator[Step, None, tuple[CallbackError, ...]]:
        """Run :meth:`restore` one callback at a time, as :meth:`steps` does with *ahead*.

        There is no way back: what is left when the generator is closed runs then.
        """
        with self._lock.writing(RESTORE):
            failures: list[CallbackError] = []
            left = iter(self._chain.order(RESTORE))
            opened: list[Step] = []
            steps: Iterator[Step] = iter(())
            try:
                for participant in left:
                    steps = participant.steps(RESTORE, False)
                    for step in steps:
                        opened.append(step)
                        yield step
                        if step.kind not in _OVERLAPPING:
                            self._finish_steps(step for step in opened if not step.done)
                            opened.clear()
                    failures += participant.collect()
            except BaseException:
                self._finish_steps(
                    itertools.chain(
                        (step for step in opened if not step.done),
                        steps,
                        *(participant.steps(RESTORE, True) for participant in left),
                    )
                )
                raise
            return tuple(failures)

    def _discard_incoming(self) -> None:
        if self.incoming is not None:
            if self.incoming.nbytes:
                self.kernel.kho.incoming.restore_free(self.incoming.phys)
            self.incoming = None
