"""Live updates inside somebody's SimPy simulation: the real engine, one step at a time.

The callbacks are called as in any live update, each when its time in ``env`` has passed; what it
takes a cost model says::

    host = Host(env, kernel, cost=CostModel.load("cost.toml"), workers=2)
    update = host.live_update(next_kernel)  # a process: yield it, or interrupt() it
    env.run()

Happy path: PREPARE, REBOOT, jump, restore and FINISH take the time that the model says, devices of
one depth side by side on as many workers as there are, and the process ends with a
:class:`~luo.report.Report` in simulated nanoseconds.

Unhappy paths: a callback that fails has everything rolled back, which takes its time too, and the
process fails with that error. ``interrupt()`` does the same, and the process ends with a report
whose ``error`` says so; once the next kernel runs it is refused.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

try:
    import simpy
except ImportError as error:  # pragma: no cover
    raise ImportError("luo.sim needs SimPy: pip install 'luo-kho[sim]'") from error

import numpy as np

from luo.clock import CostHook
from luo.errors import KhoError, StateError
from luo.kernel import Kernel, KernelImage
from luo.notifier import RESTORE, Event, State, Step
from luo.profile.cost import CostModel
from luo.report import Report, describe, parse_duration

__all__ = ["Clock", "Host", "LiveUpdate"]

#: ``observer(moment, event, step)``: a step of an event begins or ends.
Observer: TypeAlias = Callable[[str, str, Step], None]
_Result = TypeVar("_Result")
_Waiting: TypeAlias = Generator[simpy.Event, Any, _Result]

_REBOOT: Final = Event.REBOOT.name


class Clock:
    """The time of a SimPy environment, in nanoseconds, for a kernel.

    Args:
        env: the environment.
        unit: what 1 of ``env.now`` is, as ``"1s"`` or ``"1us"``.
    """

    def __init__(self, env: simpy.Environment, unit: str = "1s") -> None:
        self.env = env
        self._unit = parse_duration(unit)
        if not self._unit:
            raise ValueError(f"unit {unit!r}: no time")
        self._ahead = 0  # what the engine does at once takes time that has not passed yet
        self._begin: int | None = None

    def __call__(self) -> int:
        """Return the time, in nanoseconds."""
        begin, self._begin = self._begin, None
        return max(self._ahead, self._now()) if begin is None else begin

    def _now(self) -> int:
        return round(self.env.now * self._unit)

    @property
    def is_ahead(self) -> bool:
        """Whether the environment is to catch up."""
        return self._ahead > self._now()

    def advance(self, ns: int) -> None:
        """Be *ns* nanoseconds ahead of the environment, which is to catch up."""
        self._ahead = self() + ns

    def call(self, step: Step, begin: int) -> None:
        """Run *step*, which began at *begin*: the time of the first reading, and ends now."""
        self._begin = begin
        try:
            step.run()
        finally:
            self._begin = None

    def until(self, ns: int) -> simpy.Timeout:
        """Return what happens at *ns*, or now if that is over."""
        return self.env.timeout(max(0.0, ns / self._unit - self.env.now))


class LiveUpdate(simpy.Process):
    """A live update under way, whose value is its :class:`~luo.report.Report`."""

    def __init__(
        self, env: simpy.Environment, steps: Generator[simpy.Event, Any, Report], old: Kernel
    ) -> None:
        self._old = old
        super().__init__(env, steps)

    def interrupt(self, cause: object = None) -> None:
        """Cancel: everything is rolled back, and the kernel is NORMAL as before.

        Raises:
            StateError: EINVAL if the next kernel runs: there is no way back.
            RuntimeError: the update is over.
        """
        if self.is_alive and self._old.luo.gone:
            raise StateError(errno.EINVAL, "interrupt: the next kernel runs, there is no way back")
        super().interrupt(cause)


@dataclass(slots=True)
class _Lane:
    """A worker's work: callbacks of one device, one after the other.

    Attributes:
        request: of the worker.
        index: number of the device; -1 for a batch, or a subsystem.
        steps: with what each takes; the first is under way.
        begin, end: of that one.
        over: happens when its time has passed.
    """

    request: simpy.resources.resource.Request
    index: int
    steps: deque[tuple[Step, int]] = field(default_factory=deque)
    begin: int = 0
    end: int = 0
    over: simpy.Event | None = None


class Host:
    """A machine in a simulation, whose kernel can be updated live.

    Args:
        env: the environment.
        kernel: the kernel that runs. Its clock is that of *env* from now on.
        cost: what callbacks and phases take: a :class:`~luo.profile.cost.CostModel`, or anything
            that is called as one. It is asked in the order in which the engine lists its
            callbacks, so a model gives the same costs whatever the workers.
        workers: how many callbacks of devices of one depth may be under way at once; or a
            ``simpy.Resource``, which others may use too.
        unit: what 1 of ``env.now`` is, as ``"1s"`` or ``"1us"``.
        observer: called as ``observer("begin" | "end", event, step)`` when a step begins, and when
            its callback has been called without failure.

    Attributes:
        env, observer: as given.
        kernel: the kernel that runs now.
        clock: its clock.
        workers: the resource.
        blackout_begins, blackout_ends: events of the next blackout, or the one there is. It ends
            when the last device runs again: in the next kernel, or in this one after a failure.
            Their value is the time in nanoseconds. Read them anew for each blackout.

    Raises:
        ValueError: the kernel does not run, or has its timing off.
    """

    def __init__(
        self,
        env: simpy.Environment,
        kernel: Kernel,
        *,
        cost: CostHook | None = None,
        workers: int | simpy.Resource = 1,
        unit: str = "1s",
        observer: Observer | None = None,
    ) -> None:
        if kernel.machine.running is not kernel:
            raise ValueError(f"host: {kernel!r} does not run")
        self.env = env
        self.clock = Clock(env, unit)
        self.workers = simpy.Resource(env, workers) if isinstance(workers, int) else workers
        self.observer = observer
        self.blackout_begins = env.event()
        self.blackout_ends = env.event()
        self._cost = CostModel() if cost is None else cost
        self._drawn: int | None = None  # of the step that runs
        self._awaited: deque[int] = deque()  # devices that came over, from the first that is down
        self._undoing = False
        self._update: LiveUpdate | None = None
        self.kernel = kernel
        self._own(kernel)

    def __repr__(self) -> str:
        return f"<Host {self.kernel!r}, {self.workers.capacity} workers>"

    def live_update(self, next: Kernel | KernelImage) -> LiveUpdate:
        """Start a live update.

        Args:
            next: the next kernel: an image, which is built in this process, or a kernel of the
                same machine that has not booted.

        Returns:
            a process. Its value is a report, whose ``error`` is None unless it was interrupted.
            It fails as :func:`luo.kernel.live_update` raises.

        Raises:
            StateError: EBUSY if one is under way.
        """
        if self._update is not None and self._update.is_alive:
            raise StateError(errno.EBUSY, "live update: there is one under way")
        if isinstance(next, KernelImage):
            next = next.build(self.kernel.machine)
        self._own(next)
        self._update = LiveUpdate(self.env, self._run(self.kernel, next), self.kernel)
        return self._update

    def _own(self, kernel: Kernel) -> None:
        if not kernel.recorder.timing:
            raise ValueError("host: the kernel's timing is off")
        kernel.recorder.clock, kernel.recorder.cost = self.clock, self._charge

    def _charge(self, label: tuple[str, str, str, str], device: int, devices: int) -> int:
        """Say what a call took: the ``cost`` of both kernels."""
        ns, self._drawn = self._drawn, None
        if ns is None:  # no step of ours: a phase, or a callback that undoes
            ns = self._cost(label, device, devices)
            self.clock.advance(ns)
        return ns

    # ---- a live update ----

    def _run(self, old: Kernel, next: Kernel) -> _Waiting[Report]:
        report = Report(settings={"workers": self.workers.capacity}, source={"kind": "simpy"})
        report.begin(old)
        self._undoing = False
        try:
            with report.watch(old):
                old.kexec_load(next)
                yield from self._play(old, old.luo.steps(Event.PREPARE, ahead=True), "PREPARE")
                report.note_state(old)
                self._begin_blackout()
                self.kernel = yield from self._play(old, old.kexec_steps(verify=True), _REBOOT)
                self._end_blackout()
                report.note_state(self.kernel)
                finish = self.kernel.luo.steps(Event.FINISH, ahead=True)
                yield from self._play(old, finish, "FINISH")
                luo = self.kernel.luo
                report.note_finish(self.kernel, luo.finished(luo.collect()))
        except BaseException as error:
            if old.luo.gone:
                raise  # the host is down: its blackout has no end
            self._undoing = True
            undo = old.luo.cancel().failures if old.luo.state is State.PREPARED else ()
            old.kexec_unload()
            yield from self._catch_up(old)
            self._end_blackout()
            if isinstance(error, KhoError):
                raise _copyable(error) from error.__cause__
            if not isinstance(error, simpy.Interrupt):
                raise
            report.note_state(old)
            why = "" if error.cause is None else f": {error.cause}"
            report.error = describe(error) | {
                "message": f"interrupted{why}",
                "rolled_back": not undo,
                "undo_errors": [str(problem) for problem in undo],
            }
        return report

    def _begin_blackout(self) -> None:
        if self.blackout_ends.triggered:
            self.blackout_ends = self.env.event()
        self.blackout_begins.succeed(self.clock())

    def _end_blackout(self) -> None:
        if self.blackout_begins.triggered:
            self.blackout_begins = self.env.event()
            self.blackout_ends.succeed(self.clock())

    def _note_running(self, kernel: Kernel) -> None:
        """End the blackout if the last device runs again in the next kernel."""
        waited = bool(self._awaited)
        while self._awaited and kernel.devices.reclaimed[self._awaited[0]]:
            self._awaited.popleft()
        if waited and not self._awaited:
            self._end_blackout()

    # ---- time ----

    def _wait(self, old: Kernel, event: simpy.Event) -> _Waiting[None]:
        """Wait for *event*; an interrupt gets through while there is a way back."""
        while not event.processed:
            try:
                yield event
            except simpy.Interrupt:
                if not (self._undoing or old.luo.gone):
                    raise

    def _catch_up(self, old: Kernel) -> _Waiting[None]:
        """Let the time pass that the engine took for what it did at once."""
        if self.clock.is_ahead:
            yield from self._wait(old, self.clock.until(self.clock()))

    def _play(
        self, old: Kernel, steps: Generator[Step, None, _Result], event: str
    ) -> _Waiting[_Result]:
        """Run *steps*, each when its time has passed; return what they return."""
        lanes: list[_Lane] = []
        request = None
        try:
            while True:
                try:
                    step = next(steps)
                except StopIteration as end:
                    yield from self._catch_up(old)
                    result: _Result = end.value
                    return result
                yield from self._catch_up(old)
                if event == _REBOOT and old.luo.gone:
                    event = RESTORE
                    preserved = old.machine.running.devices.preserved
                    self._awaited = deque(np.flatnonzero(preserved).tolist())
                if event == RESTORE:
                    self._note_running(old.machine.running)
                if step.kind == "barrier":
                    while lanes:
                        yield from self._pass(old, event, lanes)
                    continue
                ns = self._draw(event, step)
                index = -1 if step.device is None else step.device.index
                lane = next((lane for lane in lanes if 0 <= lane.index == index), None)
                if lane is not None:  # the bus's callback, after the driver's
                    lane.steps.append((step, ns))
                    continue
                request = self.workers.request()
                while not request.triggered:
                    yield from self._pass(old, event, lanes, request)
                lanes.append(_Lane(request, index, deque([(step, ns)])))
                request = None
                self._begin(event, lanes[-1])
                while step.kind == "subsystem" and lanes:
                    yield from self._pass(old, event, lanes)
        finally:
            for held in [lane.request for lane in lanes] + [request]:
                if held is not None:
                    held.cancel()
                    self.workers.release(held)
            steps.close()

    def _draw(self, event: str, step: Step) -> int:
        subsystem = step.name if step.kind == "subsystem" else "devices"
        device = -1 if step.device is None else step.device.index
        return self._cost((subsystem, event, step.kind, step.name), device, step.devices)

    def _begin(self, event: str, lane: _Lane) -> None:
        step, ns = lane.steps[0]
        lane.begin = self.clock()
        lane.end = lane.begin + ns
        lane.over = self.clock.until(lane.end)
        if self.observer is not None:
            self.observer("begin", event, step)

    def _pass(
        self,
        old: Kernel,
        event: str,
        lanes: list[_Lane],
        request: simpy.Event | None = None,
    ) -> _Waiting[None]:
        """Wait until the first callback is over, and call it, or until *request* is granted."""
        if not lanes:
            assert request is not None
            yield from self._wait(old, request)
            return
        lane = min(lanes, key=lambda lane: lane.end)
        assert lane.over is not None
        yield from self._wait(old, lane.over if request is None else lane.over | request)
        if not lane.over.processed:
            return
        step, self._drawn = lane.steps.popleft()
        try:
            self.clock.call(step, lane.begin)
        finally:
            self._drawn = None
        if self.observer is not None:
            self.observer("end", event, step)
        if event == RESTORE:
            self._note_running(old.machine.running)
        if lane.steps:
            self._begin(event, lane)
        else:
            lanes.remove(lane)
            self.workers.release(lane.request)


def _copyable(error: KhoError) -> KhoError:
    """Return *error* as an exception of which ``type(error)(*error.args)`` is a whole copy.

    SimPy makes one for each process that waits for a process that failed.
    """

    def copy(self: KhoError, *args: Any) -> None:
        KhoError.__init__(self, *args)
        self.__dict__.update(error.__dict__)

    kind = type(type(error).__name__, (type(error),), {"__init__": copy})
    made: KhoError = kind(*error.args)
    return made.with_traceback(error.__traceback__)
