"""For each quirk of RFC v1 the shortest sequence that shows it.

A demonstration is a function that is given a :class:`Stage`: a small machine, and a builder of
kernels that have the behaviour and the quirks in question. It does what a user would do, step by
step, and notes what is seen. Run twice, without the quirk and with it, the same steps end
differently. Both are on the generation that RFC v1 was posted with, unless another is named, so
that a pair differs in nothing but the quirk.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Final, TypeAlias

from luo.device import Device, Driver, LiveUpdateOps
from luo.errors import KernelPanic, KhoError, errno_name
from luo.kernel import Kernel
from luo.kho import KhoNode
from luo.machine import Machine
from luo.notifier import Context, Priority, State, Subsystem
from luo.quirks import HOME

__all__ = ["DEMONSTRATIONS", "Row", "Stage", "run"]

#: What a callback does: nothing, return this number, or call this with its context or device.
Act: TypeAlias = int | Callable[[Any], int | None] | None

_EVENTS: Final = ("prepare", "reboot", "finish", "cancel", "restore")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a demonstration.

    Attributes:
        text: what was done, or what was looked at.
        seen: how it ended, or what was there.
        step: whether it is a step, else something looked at after it.
    """

    text: str
    seen: str
    step: bool


class Stage:
    """One run of a demonstration.

    Args:
        behaviour, quirks, kho_abi: of every kernel that runs here.

    Attributes:
        machine: a small machine without devices yet.
        calls: (event, who) of each callback, since :meth:`called` was last asked.
        log: what the engine logged.
        rows: steps and what was seen, in the order of time.
    """

    def __init__(self, behaviour: str, quirks: Iterable[str], kho_abi: str) -> None:
        self.machine = Machine("64MiB")
        self.calls: list[tuple[str, str]] = []
        self.log: list[str] = []
        self._chosen = {"behaviour": behaviour, "quirks": tuple(quirks), "kho_abi": kho_abi}
        self._drivers: list[Driver] = []
        self.rows: list[Row] = []

    # ---- hardware, software ----

    def _acts(self, who: str | None, acts: Mapping[str, Act]) -> dict[str, Callable[[Any], Any]]:
        """Return a callback for each event, which writes the call down and does as told.

        *who* names the caller; None: the device that the callback is given.
        """

        def call(event: str, subject: Any) -> int | None:
            self.calls.append((event.upper(), subject.name if who is None else who))
            act = acts.get(event)
            return act(subject) if callable(act) else act

        return {event: partial(call, event) for event in _EVENTS}

    def subsystem(
        self, name: str, priority: Priority = Priority.WITH_DEVICES, **acts: Act
    ) -> Subsystem:
        """Return a subsystem that is recorded, and at some events does something."""
        return Subsystem(name, priority=priority, **self._acts(name, acts))

    def device(
        self, name: str, parent: str | None = None, *, supported: bool = True, **acts: Act
    ) -> None:
        """Add a device, with a driver of the same name that is recorded.

        Args:
            name: of the device and its driver.
            parent: path of the device above it.
            supported: whether the driver supports live update.
            acts: what the driver does at some events.
        """
        self.machine.devices.add(name, parent, driver=name)

        def note(event: str, device: Device) -> None:
            self.calls.append((event, device.name))

        callbacks: dict[str, Any] = self._acts(None, {"restore": Device.reclaim, **acts})
        self._drivers.append(
            Driver(
                name,
                LiveUpdateOps(**callbacks) if supported else None,
                probe=partial(note, "PROBE"),
                shutdown=partial(note, "SHUTDOWN"),
            )
        )

    def kernel(self, *subsystems: Subsystem, **arguments: Any) -> Kernel:
        """Return a kernel of the machine with all drivers, which has not booted."""
        return Kernel(
            self.machine,
            drivers=self._drivers,
            subsystems=subsystems,
            **{**self._chosen, **arguments},
        )

    def boot(self, *subsystems: Subsystem, **arguments: Any) -> Kernel:
        """Return a kernel that has booted cold."""
        kernel = self.kernel(*subsystems, **arguments).boot()
        self.calls.clear()
        return kernel

    @property
    def running(self) -> Kernel:
        """The kernel that runs now."""
        kernel: Kernel = self.machine.running
        return kernel

    # ---- what is done and seen ----

    def do(self, text: str, call: Callable[..., Any] | None = None, *args: Any) -> Any:
        """Do a step by calling *call*, and note how it ended.

        Without *call* something has been arranged that will do it.

        Returns:
            what it returned, or the error that it raised.
        """
        result: Any = None
        seen = ""
        if call is not None:
            try:
                result = call(*args)
                seen = result if isinstance(result, str) else "ok"
            except (KhoError, KernelPanic) as error:
                result, seen = error, ended(error)
        self.rows.append(Row(text, seen, True))
        return result

    def see(self, what: str, seen: object) -> None:
        """Note what is there to be seen after a step."""
        self.rows.append(Row(what, str(seen), False))

    def request(self, kernel: Kernel, *paths: str) -> None:
        """Write 1 to the ``requested`` of devices."""
        for path in paths:
            device = kernel.devices[path]
            self.do(f"request {device.name}", partial(setattr, device, "requested", True))

    def called(self, *events: str) -> str:
        """Return who was called since this was last asked, of *events* or of all."""
        calls = [call for call in self.calls if not events or call[0] in events]
        self.calls.clear()
        groups = groupby(calls, key=lambda call: call[0])
        words = (" ".join((event, *(who for _, who in group))) for event, group in groups)
        return ", ".join(words) or "nobody"


def ended(error: KhoError | KernelPanic) -> str:
    """Return in a word how a step ended that raised *error*."""
    if isinstance(error, KernelPanic):
        return "kernel panic"
    # RFC v1's reboot() returns KHO's "1, already there" as it is: no errno.
    return "returns 1" if error.errno == 1 else errno_name(error.errno or 0)


@contextlib.contextmanager
def _logged(lines: list[str]) -> Iterator[None]:
    """Take what the engine logs for *lines*, instead of standard error."""
    logger = logging.getLogger("luo")
    level, propagate = logger.level, logger.propagate
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


# ---- what is looked at ----


def _preserved(kernel: Kernel) -> str:
    """Return the devices whose ``preserved`` reads 1."""
    return _names(kernel, kernel.devices.preserved)


def _names(kernel: Kernel, flags: Any) -> str:
    return " ".join(device.path for device in kernel.devices if flags[device.index]) or "none"


def _failures(result: Any) -> str:
    return " ".join(failure.name for failure in result.failures) or "none"


# ---- steps that several take ----

_PREPARE: Final = "echo 1 > prepare"
_CANCEL: Final = "echo 0 > prepare"
_JUMP: Final = "kexec -e"


def _refused(stage: Stage, kernel: Kernel) -> None:
    """Prepare a live update, and jump to a kernel that refuses: it has live update off."""
    stage.do(
        "kexec -l a kernel with liveupdate=off", kernel.kexec_load, stage.kernel(cmdline="kho=on")
    )
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.do("kexec -e, which that kernel refuses", kernel.kexec)


# ---- one for each quirk ----

_Demonstration: TypeAlias = Callable[[Stage], None]
_TABLE: dict[str, _Demonstration] = {}


def _demonstration(function: _Demonstration) -> _Demonstration:
    """Enter *function* as the demonstration of the quirk that it is named after."""
    _TABLE[function.__name__.strip("_").replace("_", "-")] = function
    return function


@_demonstration
def _priorities_inverted(stage: Stage) -> None:
    stage.device("nic0")
    kernel = stage.boot()
    for name, priority in (("late", Priority.AFTER_DEVICES), ("early", Priority.BEFORE_DEVICES)):
        subsystem = stage.subsystem(name, priority)
        stage.do(f"{name} registers {priority.name}", kernel.luo.register, subsystem)
    stage.request(kernel, "nic0")
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.see("PREPARE calls", stage.called())
    stage.do("dry reboot", kernel.luo.dry_reboot)
    stage.see("REBOOT calls", stage.called("REBOOT"))


@_demonstration
def _depth_from_garbage(stage: Stage) -> None:
    stage.device("pci0")
    stage.device("port", "pci0")
    stage.device("nic0", "pci0/port")
    kernel = stage.boot()
    stage.request(kernel, "pci0/port/nic0")
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.see("called", stage.called())


@_demonstration
def _poll_never_wakes(stage: Stage) -> None:
    kernel = stage.boot()
    woken: list[str] = []
    stage.do("a program polls kernel/liveupdate/state", stage.machine.watchers.append, woken.append)
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.see("notified", " ".join(woken))


@_demonstration
def _flags_not_restored(stage: Stage) -> None:
    stage.device("nic0")
    kernel = stage.boot()
    stage.request(kernel, "nic0")
    stage.do("kexec -l the next kernel", kernel.kexec_load, stage.kernel())
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.called()
    stage.do(_JUMP, kernel.kexec)
    stage.see("state", stage.running.luo.state.name)
    stage.see("called in the next kernel", stage.called("RESTORE", "PROBE"))
    stage.see("preserved", _preserved(stage.running))
    stage.do("echo 1 > finish", stage.running.luo.finish)
    stage.see("called", stage.called())


@_demonstration
def _node_left_behind(stage: Stage) -> None:
    kernel = stage.boot(stage.subsystem("mm"))
    _refused(stage, kernel)
    stage.do("echo 1 > prepare, again", kernel.luo.prepare)
    stage.called()
    stage.do("dry reboot", kernel.luo.dry_reboot)
    stage.see("called", stage.called())
    stage.see("state", kernel.luo.state.name)
    stage.do("kexec -l a good kernel", kernel.kexec_load, stage.kernel())
    stage.do("kexec -e, an ordinary one", kernel.kexec)
    stage.see("state of the next kernel", stage.running.luo.state.name)


@_demonstration
def _list_freed_at_reboot(stage: Stage) -> None:
    stage.device("nic0")
    kernel = stage.boot()
    stage.request(kernel, "nic0")
    _refused(stage, kernel)
    stage.see("called", stage.called())
    stage.see("preserved", _preserved(kernel))
    stage.do("poweroff", kernel.shutdown)
    stage.see("called by the shutdown", stage.called())


@_demonstration
def _reboot_half_cancelled(stage: Stage) -> None:
    for name in ("nic0", "nic1", "nic2"):
        stage.device(name, reboot=-errno.EIO if name == "nic1" else None)
    kernel = stage.boot()
    stage.request(kernel, "nic0", "nic1", "nic2")
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.called()
    stage.do("dry reboot; nic1's callback fails", kernel.luo.dry_reboot)
    stage.see("called", stage.called())
    stage.see("preserved", _preserved(kernel))


@_demonstration
def _no_image_check(stage: Stage) -> None:
    kernel = stage.boot(stage.subsystem("mm"))
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.called()
    stage.do("kexec -e, with no image loaded", kernel.kexec)
    stage.see("called", stage.called())
    stage.see("state", kernel.luo.state.name)


@_demonstration
def _positive_return_stops(stage: Stage) -> None:
    kernel = stage.boot(
        stage.subsystem("first"),
        stage.subsystem("second", prepare=errno.EBUSY),
        stage.subsystem("third"),
    )
    stage.do("echo 1 > prepare; second returns +16", kernel.luo.prepare)
    stage.see("called", stage.called())
    stage.see("state", kernel.luo.state.name)


@_demonstration
def _state_tested_unlocked(stage: Stage) -> None:
    kernel = stage.boot(stage.subsystem("mm"))
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.called()

    def cancel(what: str, name: str) -> None:
        if (what, name) == ("phase", "reboot"):
            kernel.luo.cancel()

    kernel.observer = cancel
    stage.do("echo 0 > prepare, while the next step waits for the lock")
    stage.do("reboot(KEXEC)", lambda: "goes on" if kernel.luo.reboot() else "ordinary kexec")
    stage.see("called", stage.called())
    stage.see("state", kernel.luo.state.name)


@_demonstration
def _register_when_prepared(stage: Stage) -> None:
    kernel = stage.boot(stage.subsystem("early"))
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.do("late registers", kernel.luo.register, stage.subsystem("late"))
    stage.do("early unregisters", kernel.luo.unregister, "early")
    stage.do("dry reboot", kernel.luo.dry_reboot)
    stage.see("called", stage.called())


@_demonstration
def _eligibility_checked_once(stage: Stage) -> None:
    for name in ("nic0", "nic1"):
        stage.device(name)
    kernel = stage.boot()
    stage.request(kernel, "nic0", "nic1")
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.do("unbind nic0's driver", kernel.devices["nic0"].unbind)
    stage.do(_CANCEL, kernel.luo.cancel)
    stage.see("called", stage.called())
    stage.do("unbind nic1's driver", kernel.devices["nic1"].unbind)
    stage.do("echo 1 > prepare, again", kernel.luo.prepare)
    stage.see("called then", stage.called())
    stage.see("preserved", _preserved(kernel))


@_demonstration
def _failure_stops_the_rest(stage: Stage) -> None:
    kernel = stage.boot(
        stage.subsystem("first"),
        stage.subsystem("second", cancel=-errno.EIO),
        stage.subsystem("third"),
    )
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.called()
    result = stage.do("echo 0 > prepare; second's callback fails", kernel.luo.cancel)
    stage.see("called", stage.called())
    stage.see("failures", _failures(result))
    stage.see("state", kernel.luo.state.name)


@_demonstration
def _cancel_not_reversed(stage: Stage) -> None:
    def subsystems() -> tuple[Subsystem, ...]:
        return stage.subsystem("first"), stage.subsystem("second")

    kernel = stage.boot(*subsystems())
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.see("PREPARE calls", stage.called())
    stage.do(_CANCEL, kernel.luo.cancel)
    stage.see("CANCEL calls", stage.called())
    stage.do("kexec -l the next kernel", kernel.kexec_load, stage.kernel(*subsystems()))
    stage.do("echo 1 > prepare, again", kernel.luo.prepare)
    stage.do(_JUMP, kernel.kexec)
    stage.called()
    stage.do("echo 1 > finish", stage.running.luo.finish)
    stage.see("FINISH calls", stage.called())


@_demonstration
def _scan_cursor_freed(stage: Stage) -> None:
    for name in ("nic0", "nic1"):
        stage.device(name)
    kernel = stage.boot()
    stage.request(kernel, "nic0", "nic1")

    def unplug(what: str, name: str) -> None:
        if (what, name) == ("scan", "devices"):
            stage.machine.devices.remove("nic0")

    kernel.observer = unplug
    stage.do("nic0 is unplugged while the next step looks for requested devices")
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.see("called", stage.called())


@_demonstration
def _reference_leak(stage: Stage) -> None:
    stage.device("port")
    stage.device("nic0", "port")
    kernel = stage.boot()
    port = kernel.devices["port"]
    stage.do("unbind port's driver", port.unbind)
    stage.do("bind it again: port is now behind nic0 in the list of devices", port.bind, "port")
    stage.request(kernel, "port", "port/nic0")
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.do(_CANCEL, kernel.luo.cancel)
    for path in ("port", "port/nic0"):
        references = kernel.devices.references[kernel.devices[path].index]
        stage.see(f"references held on {path}", int(references))


@_demonstration
def _change_owner_fails(stage: Stage) -> None:
    stage.device("nic0")
    kernel = stage.do(
        "boot with liveupdate=off", partial(stage.boot, cmdline="kho=on liveupdate=off")
    )
    nic0 = kernel.devices["nic0"].index
    stage.do(
        "move nic0 to a namespace owned by 1000", kernel.devices.change_owner, nic0, 1000, 1000
    )


@_demonstration
def _groups_stay(stage: Stage) -> None:
    stage.device("nic0")
    kernel = stage.do(
        "boot with kho=off liveupdate=on", partial(stage.boot, cmdline="kho=off liveupdate=on")
    )
    stage.see("with a liveupdate directory", _names(kernel, kernel.devices.grouped))


@_demonstration
def _initialised_despite_failure(stage: Stage) -> None:
    kernel = stage.kernel()
    notified: list[str] = []
    stage.machine.watchers.append(notified.append)
    stage.do("another module makes kernel/liveupdate first", kernel.sysfs.add, "liveupdate")
    stage.do("boot", kernel.boot)
    stage.see("initialised", "yes" if kernel.luo.initialised else "no")
    stage.do("a module asks for PREPARE", kernel.luo.prepare)
    stage.see("notified", " ".join(notified) or "nobody")


@_demonstration
def _requested_races(stage: Stage) -> None:
    stage.device("nic0")
    kernel = stage.boot()
    nic0 = kernel.devices["nic0"]

    def write_too(what: str, _name: str) -> None:
        if what == "write":
            kernel.observer = None
            nic0.requested = True

    kernel.observer = write_too
    stage.do("another program writes the same, just before the next step takes the lock")
    stage.request(kernel, "nic0")
    stage.see("requested", int(nic0.requested))
    stage.see("links in the list", kernel.devices.nr_linked)


@_demonstration
def _callback_deadlock(stage: Stage) -> None:
    answer: list[str] = []
    asks, answered = threading.Event(), threading.Event()

    def ask(context: Context) -> None:
        asks.set()
        try:
            with context.kernel.luo.read_state():
                answer.append("ok")
        except KhoError as error:
            answer.append(ended(error))
        answered.set()

    kernel = stage.boot(stage.subsystem("mm", prepare=ask))
    writer = threading.Thread(target=kernel.luo.prepare, daemon=True)
    stage.do("echo 1 > prepare; mm's callback asks for the state", writer.start)
    killed = False
    for _ in range(1000):  # ten seconds, if it neither goes on nor can be killed
        if answered.wait(0.01):
            break
        if asks.is_set() and kernel.luo.kill(writer.ident or 0):
            killed = True
            break
    stage.see("the callback", "waits until it is killed" if killed else "goes on")
    writer.join(10)
    stage.see("read_state() in it", " ".join(answer))


@_demonstration
def _no_callback_limit(stage: Stage) -> None:
    now = 0

    def take_a_minute(_context: Context) -> None:
        nonlocal now
        now += 60 * 10**9

    kernel = stage.boot(
        stage.subsystem("mm", prepare=take_a_minute), callback_limit=1, clock=lambda: now
    )
    stage.do("echo 1 > prepare; mm takes a minute, the limit is a second", kernel.luo.prepare)
    stage.see("called", stage.called())
    stage.see("state", kernel.luo.state.name)


@_demonstration
def _warn_once(stage: Stage) -> None:
    kernel = stage.boot(stage.subsystem("mm", cancel=-errno.EIO))
    for time in ("first", "second"):
        stage.do(f"the {time} echo 1 > prepare", kernel.luo.prepare)
        result = stage.do(f"the {time} echo 0 > prepare; mm's callback fails", kernel.luo.cancel)
        stage.see(f"failures of the {time}", _failures(result))


@_demonstration
def _written_in_reboot(stage: Stage) -> None:
    def save(context: Context) -> None:
        node = KhoNode()
        context.kho.add_node(None, "log", node)
        context.kho.add_prop(node, "lines", bytes(1 << 16))

    def drop(context: Context) -> None:
        context.kho.remove_node(None, "log")

    kernel = stage.boot(stage.subsystem("log", prepare=save, cancel=drop), stage.subsystem("disk"))
    stage.do("echo 32768 > kho/out/fdt_max", partial(setattr, kernel.kho, "fdt_max", 1 << 15))
    stage.do("kexec -l the next kernel", kernel.kexec_load, stage.kernel())
    stage.do("echo 1 > prepare; log saves 64 KiB", kernel.luo.prepare)
    stage.see("called", stage.called())

    def jump() -> str | None:
        if kernel.luo.state is not State.PREPARED:
            return "not reached"
        kernel.kexec()
        return None

    stage.do("kexec -e, if that worked", jump)
    stage.see("called by the reboot", stage.called())
    stage.see("state", kernel.luo.state.name)


@_demonstration
def _stubs_do_not_compile(stage: Stage) -> None:
    stage.do("build a kernel for arm64", partial(stage.kernel, arch="arm64"))


@_demonstration
def _disabled_by_user(stage: Stage) -> None:
    stage.do(
        "boot with kho=off liveupdate=on", partial(stage.boot, cmdline="kho=off liveupdate=on")
    )
    stage.see("dmesg", "; ".join(stage.log))


@_demonstration
def _all_ancestors(stage: Stage) -> None:
    stage.device("pci0")
    stage.device("port", "pci0", supported=False)
    stage.device("nic0", "pci0/port")
    kernel = stage.boot()
    stage.do("port's driver does not support live update")
    stage.request(kernel, "pci0/port/nic0")
    stage.do(_PREPARE, kernel.luo.prepare)
    stage.see("called", stage.called())
    stage.see("preserved", _preserved(kernel))


#: Every demonstration, by the name of its quirk.
DEMONSTRATIONS: Final[Mapping[str, _Demonstration]] = _TABLE


def run(
    name: str,
    behaviour: str = "intended",
    quirks: Iterable[str] = (),
    kho_abi: str = HOME,
) -> tuple[Row, ...]:
    """Run the demonstration of the quirk *name*, on kernels of *behaviour* with *quirks*.

    Returns:
        the steps and what was seen, in the order of time; with the same texts in every run.

    Raises:
        KeyError: there is no such quirk.
        ValueError: as of :func:`luo.quirks.resolve`.
    """
    stage = Stage(behaviour, quirks, kho_abi)
    with _logged(stage.log):
        try:
            DEMONSTRATIONS[name](stage)
        finally:
            if stage.machine.running is not None:
                stage.machine.running.close()
    return tuple(stage.rows)
