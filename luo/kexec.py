"""The jump from one kernel to the next, and its commit point.

Happy path of :func:`jump`: REBOOT, handover, the successor validates and acknowledges (commit
point), the old kernel goes, the successor boots, restores and is UPDATED.

Unhappy paths: before the acknowledgement, whatever goes wrong cancels the update, the old kernel
is NORMAL again and the error says which step failed. After it the old kernel's objects are dead,
its views are cut off from the memory, and a successor that dies is a crashed host.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from luo.errors import (
    CallbackError,
    FdtError,
    HandoverError,
    HostCrashError,
    KernelPanic,
    SuccessorError,
)
from luo.fdt import Fdt, FdtWriter
from luo.kho import Handover
from luo.notifier import State, Step

if TYPE_CHECKING:
    from luo.kernel import Kernel
    from luo.machine import Machine
    from luo.profile.tables import Profile
    from luo.remote import RemoteKernel

__all__ = [
    "ARCHES",
    "Arrival",
    "Departure",
    "LocalSuccessor",
    "handover_of",
    "jump",
    "kexec_or_cancel",
    "record_of",
    "revised",
]


#: Architectures that hand over, and how the next kernel is told (kho-abi 9.1, 9.2).
ARCHES: Final = ("x86_64", "arm64")


def record_of(arch: str, handover: Handover) -> str:
    """Return what a kernel of *arch* leaves for the next one, in hex.

    x86_64: a setup_data node. arm64: a device tree whose ``/chosen`` has the two properties.
    """
    if arch == "x86_64":
        return handover.to_setup_data().hex()
    writer = FdtWriter()
    with writer.node(""):
        writer.property_u32("#address-cells", 2)
        writer.property_u32("#size-cells", 2)
        writer.add_node("chosen", handover.to_chosen())
    return bytes(writer.finish()).hex()


def handover_of(arch: str, record: str | None) -> Handover | None:
    """Return the four numbers that a kernel of *arch* finds in *record*.

    Raises:
        HandoverError: it is not a record of this architecture.
    """
    if record is None:
        return None
    raw = bytes.fromhex(record)
    if arch == "x86_64":
        return Handover.from_setup_data(raw)
    try:
        chosen = Fdt(raw).node("/chosen")
        return Handover.from_chosen(chosen.properties)
    except FdtError as error:
        raise HandoverError(f"device tree: {error}") from error


@dataclass(frozen=True, slots=True)
class Departure:
    """What the old kernel leaves behind when REBOOT has run; JSON values.

    Attributes:
        live: whether it is a live update, by REBOOT callbacks or with sessions, not an ordinary
            kexec.
        pid: its process.
        handover: the record that tells the next kernel, in hex (:func:`record_of`); None with
            KHO off.
        reboot_began_ns, reboot_ended_ns: on the monotonic clock.
        digests: [side, name, bytes, digest] of what driver and bus callbacks stored.
        image: the ``image`` object of ``luo run --json``, and if the kernel keeps spans
            ``folios``: how many of each order are handed over.
        preserved, requested: numbers of devices.
        marks: begin and end of each phase that it has passed, on its clock.
    """

    live: bool
    pid: int
    handover: str | None
    reboot_began_ns: int
    reboot_ended_ns: int
    digests: list[list[Any]]
    image: dict[str, Any]
    preserved: int
    requested: int
    marks: dict[str, list[int]]

    @property
    def phases(self) -> dict[str, int]:
        """Nanoseconds of each phase that it has passed."""
        return {name: end - begin for name, (begin, end) in self.marks.items()}


@dataclass(frozen=True, slots=True)
class Arrival:
    """How a kernel came to run by kexec.

    Attributes:
        departure: what the kernel before it left.
        before: what callbacks cost in that kernel.
        result: what boot and restore came to.
        phases: nanoseconds of reboot, jump, boot, restore and blackout. Blackout runs from the
            first REBOOT callback to the last reclaimed device, less what the two digests took.
        blackout: when it began and ended, the digests included.
        jump: when the successor was asked, and when it began to boot.
    """

    departure: Departure
    before: Profile
    result: dict[str, Any]
    phases: dict[str, int]
    blackout: tuple[int, int]
    jump: tuple[int, int]

    @property
    def verified_bytes(self) -> int:
        """Bytes of state whose digests before and after the jump are equal."""
        after = {
            (side, name): (nbytes, sum_) for side, name, nbytes, sum_ in self.result["digests"]
        }
        return sum(
            nbytes
            for side, name, nbytes, sum_ in self.departure.digests
            if after.get((side, name)) == (nbytes, sum_)
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of state that callbacks stored."""
        return sum(nbytes for _side, _name, nbytes, _sum in self.departure.digests)


class _Old(Protocol):
    machine: Machine
    luo: Any

    def reboot(self, verify: bool) -> Departure: ...
    def take_back(self) -> None: ...
    def depart(self) -> None: ...

    @property
    def profile(self) -> Profile: ...


class LocalSuccessor:
    """A successor in this process.

    Until the commit point it only reads, and builds its page state beside the old kernel's.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._plan: Any = None
        kernel.devices.expect_records()

    def __str__(self) -> str:
        return f"successor {self.kernel!r}"

    def validate(self, record: str | None, timeout: float) -> None:
        """Check what the old kernel left; reads only."""
        try:
            self._plan = self.kernel.validate(handover_of(self.kernel.arch, record))
        except (HandoverError, KernelPanic) as error:
            raise SuccessorError(errno.EPROTO, f"validate: {self} refused: {error}") from error

    def start(self, record: str | None, preflight: bool, verify: bool) -> Kernel:
        """Pass the commit point: boot and restore."""
        if preflight:
            return self.kernel.take_over(self._plan, verify)
        return self.kernel.boot_from(record)

    def starting(self, verify: bool) -> Generator[Step, None, Kernel]:
        """Pass the commit point, and yield the restore callbacks as steps."""
        return self.kernel.taking_over(self._plan, verify)

    @property
    def result(self) -> dict[str, Any]:
        """What boot and restore came to."""
        return self.kernel.boot_result()

    def close(self) -> None:
        """Let it go unused."""
        self.kernel.close()


_Result = TypeVar("_Result")


def drained(steps: Generator[Any, None, _Result]) -> _Result:
    """Return what *steps* return, which are all run."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _Result = end.value
            return result


def jump(
    old: _Old,
    successor: LocalSuccessor | RemoteKernel,
    *,
    clock: Callable[[], int] = time.monotonic_ns,
    cost: Callable[[tuple[str, str, str, str], int, int], int] | None = None,
    preflight: bool,
    timeout: float,
    verify: bool,
    rebooting: Generator[Step, None, Departure] | None = None,
) -> Generator[Step, None, Kernel | RemoteKernel]:
    """Change the kernel of a machine: see :meth:`luo.kernel.Kernel.kexec`.

    With *rebooting*, which is REBOOT by steps, it yields these and those of restore, into a
    :class:`LocalSuccessor`; without, both run in bulk.
    """
    machine = old.machine
    try:
        departure = old.reboot(verify) if rebooting is None else (yield from rebooting)
        began = clock()
        if preflight:
            successor.validate(departure.handover, timeout)
    except BaseException as error:
        successor.close()
        with contextlib.suppress(HostCrashError):  # an old kernel that died has nothing to cancel
            if old.luo.state is State.PREPARED:
                failures = old.luo.cancel().failures
                for problem in failures:
                    error.add_note(f"while cancelling: {problem}")
                if isinstance(error, SuccessorError):
                    error.undo_errors = [*failures]
                    error.rolled_back = not failures
            old.take_back()
        raise
    # The commit point: the successor has acknowledged, there is no way back from here.
    old.depart()
    machine.memory.cut_off()
    machine.memory.forget()
    if cost is not None:
        cost(("engine", "JUMP", "phase", "jump"), -1, 0)
    try:
        if rebooting is None:
            kernel = successor.start(departure.handover, preflight, verify)
        else:
            assert isinstance(successor, LocalSuccessor)
            kernel = yield from successor.starting(verify)
    except (HostCrashError, KernelPanic):
        successor.close()
        raise
    except Exception as error:  # an interrupt leaves it running; anything else ends it
        successor.close()
        why = f"{type(error).__name__}: {error}"
        raise HostCrashError(
            errno.EHOSTDOWN, f"start: {successor}: {why}, after the commit point: the host is down"
        ) from error
    kernel.arrival = _arrival(departure, old.profile, successor.result, began)
    return kernel


def _arrival(
    departure: Departure, before: Profile, result: dict[str, Any], began_ns: int
) -> Arrival:
    """Return how a kernel came to run, whose jump began at *began_ns*."""
    restored_ns = result["last_reclaim_ns"] or (
        result["boot_began_ns"] + result["phases"]["boot"] + result["phases"]["restore"]
    )
    instruments = began_ns - departure.reboot_ended_ns + result["digest_ns"]
    return Arrival(
        departure,
        before,
        result,
        {
            "reboot": departure.reboot_ended_ns - departure.reboot_began_ns,
            "jump": result["boot_began_ns"] - began_ns,
            **result["phases"],
            "blackout": restored_ns - departure.reboot_began_ns - instruments,
        },
        (departure.reboot_began_ns, restored_ns),
        (began_ns, result["boot_began_ns"]),
    )


def revised(arrival: Arrival, result: dict[str, Any]) -> Arrival:
    """Return *arrival* with what came of it later: with sessions, user space restores."""
    return _arrival(arrival.departure, arrival.before, result, arrival.jump[0])


def kexec_or_cancel(agent: Any, kernel: Any, settings: dict[str, Any]) -> Any:
    """Return the kernel that *kernel* jumps into; *agent* cancels what it preserved if it stays.

    Raises:
        CallbackError, SuccessorError: what :meth:`luo.kernel.Kernel.kexec` raised, with what came
            of cancelling in it.
    """
    try:
        return kernel.kexec(**settings)
    except BaseException as error:
        if kernel.machine.running is kernel and agent.state == "preserved":
            problems = agent.cancel().failures
            if isinstance(error, CallbackError | SuccessorError):
                error.undo_errors = [*problems]
                error.rolled_back = not problems
        raise
