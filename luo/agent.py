"""User space of a kernel with sessions: what it keeps, in which order, and how it gets it back.

Mainline leaves to user space what RFC v1's chain did in the kernel: which files depend on which,
and the order of everything. This is a virtual machine monitor and a host's service in one program.

Happy path: a session for each guest, with the guest's own file and its devices; then the host's own
devices in as many sessions as they need; children before parents, as RFC v1 goes. Last a session
with one file that says which sessions there are: mainline lists nothing, and nobody tells the next
program anything but what is in memory. There everything is retrieved in the reverse order, parents
first; finished in the order of sessions.

Unhappy path: whatever fails before the jump, all sessions are closed, the newest first, which
undoes everything. A file that cannot be retrieved is reported, and the others are.
"""

from __future__ import annotations

import contextlib
import errno
import json
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from luo import abi
from luo.device_files import DeviceFile, DeviceFiles, SubsystemFile
from luo.errors import CallbackError, KhoError, StateError, from_errno
from luo.files import FileArgs, FileHandler
from luo.kexec import kexec_or_cancel, revised
from luo.liveupdate import CancelResult, FinishResult
from luo.notifier import Priority, Subsystem
from luo.report import describe

if TYPE_CHECKING:
    from luo.session import DeviceNode, Session

__all__ = ["STATE", "Agent", "AgentFile", "Guest"]

#: The session and the compatible of the file that says what sessions there are.
STATE_SESSION: Final = "agent"
_STATE_COMPATIBLE: Final = "luo-agent-v1"
_LENGTH_BYTES: Final = 8


class AgentFile:
    """A file of the agent's own: bytes, as of a memfd."""

    __slots__ = ("content",)

    def __init__(self, content: bytes) -> None:
        self.content = content


def _preserve(args: FileArgs) -> None:
    content = args.file.content
    args.data = args.kho.alloc_preserve(_LENGTH_BYTES + len(content))
    view = args.memory.view(args.data, _LENGTH_BYTES + len(content))
    view[:_LENGTH_BYTES] = len(content).to_bytes(_LENGTH_BYTES, "little")
    view[_LENGTH_BYTES:] = content


def _unpreserve(args: FileArgs) -> None:
    args.kho.unpreserve_free(args.data)


def _retrieve(args: FileArgs) -> None:
    order = args.incoming.order_of(args.data)
    room = 0 if order is None else args.memory.page_size << order
    if not room or not args.memory.is_populated(args.data, _LENGTH_BYTES):
        raise from_errno(errno.EINVAL, f"agent's file {args.data:#x}: nothing is there")
    nbytes = int.from_bytes(args.memory.view(args.data, _LENGTH_BYTES), "little")
    if nbytes > room - _LENGTH_BYTES:
        raise from_errno(errno.EINVAL, f"agent's file {args.data:#x}: {nbytes} bytes in {room}")
    args.file = AgentFile(bytes(args.memory.view(args.data + _LENGTH_BYTES, nbytes)))


def _finish(args: FileArgs) -> None:
    args.incoming.restore_free(args.data)


#: Keeps the file of the agent's own: 8 bytes length, and the bytes.
STATE: Final = FileHandler(
    _STATE_COMPATIBLE,
    can_preserve=lambda file: type(file) is AgentFile,
    preserve=_preserve,
    unpreserve=_unpreserve,
    retrieve=_retrieve,
    finish=_finish,
)


@dataclass(frozen=True, slots=True)
class Guest:
    """A virtual machine, whose file and devices go into a session of its own.

    Attributes:
        name: of it; the session is called ``vm:NAME``.
        subsystem: keeps its memory and virtual CPUs.
        devices: numbers of the devices that are assigned to it, ``int32``.
    """

    name: str
    subsystem: Subsystem
    devices: NDArray[np.int32]


def _listed(content: bytes) -> list[tuple[str, int]]:
    """Return the sessions that the agent's own file names, and how many files each has.

    Raises:
        KhoError: EINVAL if it says anything else.
    """
    try:
        return [(str(name), operator.index(count)) for name, count in json.loads(content)]
    except (ValueError, TypeError, RecursionError) as error:
        raise from_errno(errno.EINVAL, f"agent's file: {error}") from None


#: A session that is held: its name, and its files in the order of preserving.
Held = tuple[str, list[Any]]


class Agent:
    """User space of one kernel; its calls are those of the orchestrator.

    Args:
        kernel: the kernel.
        files: keeps its devices.
        guests: virtual machines that it has started.
        subsystems: those of the host's whose state changes in the jump, each with a file.
        phase: context manager that times a phase by name.

    Attributes:
        state: ``"normal"``, ``"preserved"`` or ``"retrieved"``.
        failures: why files could not be retrieved.
    """

    def __init__(
        self,
        kernel: Any,
        files: DeviceFiles,
        guests: Sequence[Guest] = (),
        subsystems: Iterable[Subsystem] = (),
        *,
        phase: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self.kernel = kernel
        self.files = files
        self.state = "normal"
        self._guests = guests
        self._subsystems = tuple(subsystems)
        self._phase = phase
        self._held: list[Held] | None = None  # what came over, and is open
        self._sessions: list[Session] = []
        self._node: DeviceNode | None = None
        self._digests: dict[tuple[str, str], tuple[int, int]] = {}
        self._digest_ns = 0
        self.failures: tuple[CallbackError, ...] = ()

    # ---- what there is to keep ----

    def plan(self) -> list[Held]:
        """Open the files of what is to be kept, by session; children before parents.

        That is what came over, or else the guests and the devices that are requested, with their
        ancestors, as RFC v1 takes them.

        Raises:
            KhoError: EINVAL if a requested device does not support live update any more.
        """
        if self._held is not None:
            return self._held
        devices = self.kernel.devices
        requested = devices.scan()
        lost = np.flatnonzero(requested & ~devices.eligible())
        if lost.size:
            first = int(lost[0])
            why = devices.why_not_eligible(first) or "it is gone"
            raise from_errno(errno.EINVAL, f"preserve {devices.tree.path(first)}: {why}")
        order = devices.tree.preserve_order(requested)
        order = order[devices.supported()[order]]
        owners = self._owners()[order]
        places = np.argsort(owners, kind="stable")  # the host's first, as they are nobody's
        cuts = np.searchsorted(owners[places], np.arange(len(self._guests) + 1)).tolist()
        held: list[Held] = []
        for guest, start, stop in zip(self._guests, cuts, cuts[1:], strict=False):
            own = order[places[start:stop]]
            held.append((f"vm:{guest.name}", [self._file_of(guest.subsystem), *self._open(own)]))
        before = [one for one in self._subsystems if one.priority < Priority.AFTER_DEVICES]
        behind = [one for one in self._subsystems if one.priority == Priority.AFTER_DEVICES]
        host = [
            *map(self._file_of, before),
            *self._open(order[places[: cuts[0]]]),
            *map(self._file_of, behind),
        ]
        most = abi.KHO_BLOCKS_MAX * abi.block_capacity(
            abi.LUO_FILE_SER.size, self.kernel.memory.page_size
        )
        for number, start in enumerate(range(0, len(host), most)):
            name = "host" if not number else f"host-{number}"
            held.append((name, host[start : start + most]))
        return held

    def _owners(self) -> NDArray[np.int32]:
        """Return the guest of each device, -1 for the host; what hangs below goes along."""
        tree = self.kernel.devices.tree
        owners = np.full(len(tree.parents), -1, np.int32)
        for number, guest in enumerate(self._guests):
            owners[guest.devices] = number
        if self._guests:
            for depth in range(1, int(tree.depths.max(initial=0)) + 1):
                here = np.flatnonzero((tree.depths == depth) & (owners < 0) & (tree.parents >= 0))
                owners[here] = owners[tree.parents[here]]
        return owners

    def _open(self, order: NDArray[np.int32]) -> Iterator[DeviceFile]:
        return (DeviceFile(self.kernel.devices, index) for index in order.tolist())

    def _file_of(self, subsystem: Subsystem) -> SubsystemFile:
        return SubsystemFile(subsystem, self.kernel)

    def prefault(self) -> None:
        """Touch the memory that preserving will allocate, as far as sizes are known."""
        memory = self.kernel.memory
        sizes: Counter[int] = Counter()
        with contextlib.suppress(KhoError):  # what is wrong is told when it is preserved
            for _name, files in self.plan():
                sizes[memory.page_size] += 1 + len(files) // abi.block_capacity(
                    abi.LUO_FILE_SER.size, memory.page_size
                )
                for file in files:
                    if isinstance(file, DeviceFile):
                        sizes[self.files.nbytes(self.kernel.devices, file.index)] += 1
        orders: Counter[int] = Counter()
        for nbytes, count in sizes.items():
            orders[(-(-nbytes // memory.page_size) - 1).bit_length()] += count
        for order, count in orders.items():
            memory.prefault_free(count * memory.page_size << order, order)

    # ---- before the jump ----

    def prepare(self) -> None:
        """Preserve every file, each with a call of its own.

        Raises:
            KhoError, CallbackError: of the first that failed; everything is as before, which
                ``rolled_back`` of the latter says.
            StateError: EINVAL if that has been done, or what came over is not finished.
        """
        self._require("normal", "prepare")
        plan = self.plan()  # programs have their files open; that is no part of the update
        with self._phase("prepare"):
            self._node = self.kernel.liveupdate.open()
            try:
                listed = []
                for name, files in plan:
                    session = self._create(name)
                    for token, file in enumerate(files):
                        session.preserve(file, token)
                    listed.append([name, len(files)])
                self._create(STATE_SESSION).preserve(AgentFile(json.dumps(listed).encode()), 0)
            except BaseException as error:
                problems = self._close_all()
                if isinstance(error, CallbackError):
                    error.undo_errors = [*problems]
                    error.rolled_back = not problems
                raise
        self.state = "preserved"

    def _create(self, name: str) -> Session:
        assert self._node is not None
        session = self._node.create_session(name)
        self._sessions.append(session)
        return session

    def _require(self, state: str, what: str) -> None:
        if self.state != state:
            raise StateError(errno.EINVAL, f"{what}: needs {state}, the agent is {self.state}")

    def _close_all(self) -> tuple[CallbackError, ...]:
        """Close every session, the newest first; return what callbacks failed with.

        ^C in a callback is raised when all are closed.
        """
        live = self.kernel.liveupdate
        known = len(live.problems)
        self.state = "normal"
        with contextlib.ExitStack() as closing:
            if self._node is not None:
                closing.callback(self._node.close)
            for session in self._sessions:
                closing.callback(session.close)
            self._sessions, self._node = [], None
        return tuple(live.problems[known:])

    def cancel(self) -> CancelResult:
        """Close what is preserved: everything is as before.

        Raises:
            StateError: EINVAL if nothing is preserved.
        """
        self._require("preserved", "cancel")
        with self._phase("cancel"):
            return CancelResult(self._close_all())

    def dry_reboot(self) -> CancelResult:
        """Freeze everything, and :meth:`cancel` instead of the jump.

        Raises:
            CallbackError: a file would not freeze; that is cancelled too.
        """
        self._require("preserved", "dry_reboot")
        try:
            with self.kernel.liveupdate.frozen():
                pass
        except BaseException as error:
            failures = self.cancel().failures
            if isinstance(error, CallbackError):
                error.undo_errors = [*failures]
                error.rolled_back = not failures
            raise
        return self.cancel()

    def kexec(self, **settings: Any) -> Any:
        """Jump as :meth:`luo.kernel.Kernel.kexec`; if that fails, :meth:`cancel`.

        Linux leaves sessions as they are then: what becomes of them is for their owner to say.
        """
        return kexec_or_cancel(self, self.kernel, settings)

    def digests(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return (bytes, digest) of what is in the slots that are handed over."""
        files = (file for session in self.kernel.liveupdate.outgoing for file in session.files)
        return self.files.digests(files, self.kernel.memory)

    @property
    def record_bytes(self) -> int:
        """Bytes of what describes the files that are handed over, without their slots."""
        live, page = self.kernel.liveupdate, int(self.kernel.memory.page_size)
        sessions: Sequence[Session] = live.outgoing
        capacity = abi.block_capacity(abi.LUO_FILE_SER.size, page)
        blocks = -(-len(sessions) // abi.block_capacity(abi.LUO_SESSION_SER.size, page))
        blocks += sum(-(-len(session.file_set) // capacity) for session in sessions)
        files = (file for session in sessions for file in session.files)
        return blocks * page + sum(record.nbytes for record in self.files.records(files, None))

    # ---- after it ----

    def retrieve(self, verify: bool = False) -> dict[str, Any]:
        """Get everything back, parents first, and say what boot and this came to.

        Args:
            verify: digest the slots before; its time counts in no phase.

        Returns:
            as :meth:`luo.kernel.Kernel.boot_result`, restoring and digests included.

        Raises:
            KhoError: EIO if what came over cannot be read; what retrieving the agent's own file
                failed with.
            StateError: EINVAL if that has been done.
        """
        self._require("normal", "retrieve")
        kernel, live = self.kernel, self.kernel.liveupdate
        clock = kernel.recorder.read_clock
        began = clock()
        self._node = live.open()
        opened = clock() - began
        if verify:
            began = clock()
            files = (file for session in live.incoming for file in session.files)
            self._digests = self.files.digests(files, kernel.memory, kernel.kho.incoming)
            self._digest_ns = clock() - began
        failures: list[CallbackError] = []
        with self._phase("restore"):
            session = self._take(STATE_SESSION)
            listed = _listed(session.retrieve(0).content)
            held: list[Held] = []
            for name, count in reversed(listed):
                session = self._take(name)
                files_of = []
                for token in reversed(range(count)):
                    try:
                        files_of.append(session.retrieve(token))
                    except CallbackError as error:
                        failures.append(error)
                held.append((name, files_of[::-1]))
        begin, end = kernel.marks["restore"]
        kernel.marks["restore"] = begin - opened, end
        self._held = held[::-1]
        self.failures = tuple(failures)
        self.state = "retrieved"
        result: dict[str, Any] = kernel.boot_result()
        if kernel.arrival is not None:
            kernel.arrival = revised(kernel.arrival, result)
        return result

    def _take(self, name: str) -> Session:
        assert self._node is not None
        session = self._node.retrieve_session(name)
        self._sessions.append(session)
        return session

    def result(self) -> dict[str, Any]:
        """Return what retrieving came to, in the words of :meth:`Kernel.boot_result`."""
        return {
            "digest_ns": self._digest_ns,
            "digests": [[*key, *value] for key, value in self._digests.items()],
            "failures": [describe(error) for error in self.failures],
        }

    def finish(self) -> FinishResult:
        """Finish and close every session, in the order in which they were created.

        Returns:
            devices that came over and do not run, and the finish callbacks that failed.

        Raises:
            StateError: EINVAL unless everything has been retrieved.
        """
        self._require("retrieved", "finish")
        devices = self.kernel.devices
        with self._phase("finish"):
            lost = devices.preserved & ~devices.reclaimed & devices.tree.alive
            unreclaimed = tuple(map(devices.tree.path, np.flatnonzero(lost).tolist()))
            failures = self._close_all()  # the first that was created was retrieved last
        return FinishResult(unreclaimed, failures)
