"""A kernel in a second process: how it is started, spoken to, and ended.

The process is started by exec from the image's name with two memfds, the memory and the
hardware's columns. It builds its kernel, says that it is ready and waits, as a loaded kexec image
does. The channel carries commands and results; whatever restoring needs comes from memory.

There, the main thread runs commands one after the other, callbacks and all. The channel's thread
answers questions meanwhile, and each write of ``requested``, which waits while an event runs, has a
thread of its own. Changes of state and woken pollers are pushed. Here, any number of threads may
ask at once.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luo import dma
from luo._kho import SPAN, CallRecorder
from luo.channel import (
    Closed,
    Line,
    decode_error,
    encode_error,
    pack_mask,
    unpack_mask,
)
from luo.device import chosen_mask
from luo.errors import (
    CallbackError,
    HostCrashError,
    KhoError,
    StateError,
    SuccessorError,
    from_errno,
)
from luo.kexec import Departure, drained, handover_of, jump, kexec_or_cancel, revised
from luo.liveupdate import CancelResult, FinishResult, State
from luo.profile.tables import Profile

if TYPE_CHECKING:
    from luo.kernel import Kernel, KernelImage
    from luo.kexec import Arrival
    from luo.machine import Machine

__all__ = ["RemoteKernel"]

_log = logging.getLogger(__name__)

_START: Final = "from luo.remote import serve; serve()"

#: Commands in the middle of which an interrupt is passed on, and waited for until it took effect.
_INTERRUPTIBLE: Final = ("agent", "event", "reboot", "request", "request_one")


def _transfer(call: Any, fd: int, array: NDArray[Any], at: int) -> None:
    """Have *call*, which may move a part only, move all of *array* from or to a file."""
    data = array.view(np.uint8).reshape(-1).data
    while data:
        moved = call(fd, [data], at)
        data, at = data[moved:], at + moved


# ---- the side that asks ----


class _Asked:
    """A command that was sent: who waits for its answer, and the answer when it is there."""

    __slots__ = ("_woken", "answer", "over", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.over = False
        self.answer: dict[str, Any] | None = None  # None when it is over: there will be none
        self._woken: SimpleQueue[None] = SimpleQueue()

    def end(self, answer: dict[str, Any] | None) -> None:
        """Wake who waits."""
        self.answer, self.over = answer, True
        self._woken.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, so many seconds at most; return whether it is over.

        ^C may come at any moment, and in the middle of a ``threading.Event`` it is a RuntimeError.
        """
        if not self.over:
            with contextlib.suppress(Empty):
                self._woken.get(timeout=timeout)
        return self.over


class RemoteKernel:
    """A kernel that runs, or waits to run, in another process.

    Attributes:
        machine: the machine that it runs on; its watchers hear of the pollers that are woken there.
        image: what it was started from.
        luo, devices: its orchestrator and devices, as far as they can be reached from here.
        kho_abi, behaviour, quirks: as of :class:`luo.kernel.Kernel`.
        observer: called as there, of states only, in their order and before the call from here
            that led to them returns. It, and the machine's watchers, run in the thread that
            receives: they may look at ``luo.state``, any other question is EDEADLK.
        pid: its process.
        agent: its user space, if devices are kept by sessions; runs there as well.
        result: what its boot came to: phases, digests, records without a device.
        arrival: how it came to run.

    Context:
        Any thread, many at once. Questions are answered while an event runs. An event waits until
        the one before it has ended, and so does a write of ``requested``: ^C ends the wait, and
        :meth:`RemoteOrchestrator.kill` does.
    """

    def __init__(self, machine: Machine, image: KernelImage, timeout: float = 60.0) -> None:
        """Start the process and wait until its kernel is built, enumerated and bound.

        Raises:
            SuccessorError: ENOEXEC if the image cannot be built, ECHILD if the process dies,
                ETIMEDOUT if it is not ready in *timeout* seconds.
        """
        memory = machine.memory
        fd = memory.file(f"load {image.name}")  # before there is anything to take back
        self.machine = machine
        self.image = image
        self.luo = RemoteOrchestrator(self)
        self.devices = RemoteDevices(self)
        self.observer: Callable[[str, str], None] | None = None
        self.result: dict[str, Any] = {}
        self.arrival: Arrival | None = None
        self._committed = False
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Asked] = {}
        self._closed = False
        self._leaving = False
        self._bulk = os.memfd_create("luo-profile")  # arrays of its profile, when it tells it
        self._bulk_lock = threading.Lock()
        self._last: dict[str, Any] = {}  # its profile at its last REBOOT
        self._gone_profile: Profile | None = None
        self.agent: RemoteAgent | None = None
        self._next: RemoteKernel | None = None
        receiver = weakref.WeakMethod(self._receive)  # the line must not keep the kernel alive

        def receive(message: dict[str, Any] | None) -> None:
            method = receiver()
            if method is not None:
                method(message)

        tree = machine.devices.to_memfd()
        control = [] if machine.control is None else [machine.control.fileno()]
        ours, theirs = socket.socketpair()
        self._line = Line(ours, receive)
        try:
            self._process = subprocess.Popen(
                # -P: the path is ours, and the directory that we happen to be in is no part of it.
                [sys.executable, "-P", "-c", _START, str(theirs.fileno())],
                pass_fds=(theirs.fileno(), fd, tree, self._bulk, *control),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # ^C is for the kernel that runs, which rolls back
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                },
            )
            self.pid = self._process.pid
            theirs.close()
            told = self._ask(
                "load",
                timeout,
                step="load",
                image={"name": image.name, "cmdline": image.cmdline, "args": dict(image.args)},
                memory={
                    "fd": fd,
                    "offset": memory.offset,
                    "ranges": [list(map(int, part)) for part in memory.ranges],
                    "page_size": memory.page_size,
                },
                tree=tree,
                bulk=self._bulk,
                control=control,
            )
            self.kho_abi: str = told["kho_abi"]
            self.behaviour: str = told["behaviour"]
            self.quirks = frozenset(told["quirks"])
            if told["agent"]:
                self.agent = RemoteAgent(self)
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()
            os.close(tree)

    # ---- speaking ----

    def _ask(
        self,
        command: str,
        timeout: float | None = None,
        step: str = "",
        undo: Callable[[], object] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Send a command and return its result.

        With *step*, which is for what precedes the commit point, every failure is a
        :class:`SuccessorError` that names it. *undo* is called if ^C comes when it was just done.
        """
        self._require(command)
        if self._line.here:
            raise StateError(errno.EDEADLK, f"{command}: called from an observer of {self}")
        number, asked = next(self._numbers), _Asked()
        try:
            self._waiting[number] = asked
            with contextlib.suppress(Closed):
                self._line.post({"id": number, "command": command, **arguments})
                if not asked.wait(timeout):
                    raise SuccessorError(
                        errno.ETIMEDOUT, f"{step}: {self} gave no answer in {timeout:g} s", step
                    )
            return self._result(asked, command, step)
        except KeyboardInterrupt:
            if command in _INTERRUPTIBLE:
                self._interrupt(number, asked)
                if undo is not None and "result" in (asked.answer or ()):
                    undo()
            self._waiting.pop(number, None)
            raise

    def _result(self, asked: _Asked, command: str, step: str) -> dict[str, Any]:
        if asked.answer is None:
            self._require(command)  # it may have been closed here meanwhile
            raise self._gone(step or command, self._wait())
        if "error" in asked.answer:
            error = decode_error(asked.answer["error"])
            if step:
                code = errno.ENOEXEC if step == "load" else errno.EPROTO
                why = error.strerror if isinstance(error, KhoError) else error
                raise SuccessorError(code, f"{step}: {self} refused: {why}", step) from error
            raise error
        result: dict[str, Any] = asked.answer["result"]
        return result

    def _interrupt(self, number: int, asked: _Asked) -> None:
        """Pass ^C on to the command there, and wait until it has taken effect."""
        with contextlib.suppress(KhoError):  # it is gone, and the callback with it
            while (told := self._ask("interrupt", of=number))["open"]:
                if asked.wait(None if told["stopped"] else 0.05):
                    return

    def _receive(self, message: dict[str, Any] | None) -> None:
        """Hand on what came; called by the line."""
        if message is None:
            for left in tuple(self._waiting.values()):
                left.end(None)
            return
        self.luo._facts |= message.get("facts", {})
        if "notify" in message:
            self._notified(message["notify"], message["name"])
        elif (asked := self._waiting.pop(message["id"], None)) is not None:
            asked.end(message)

    def _notified(self, what: str, name: str) -> None:
        try:
            if what == "sysfs":
                self.machine.notify(name)
            elif self.observer is not None:
                self.observer(what, name)
        except Exception:
            _log.warning("%s: told of %s %s", self, what, name, exc_info=True)

    def _require_alive(self, what: str) -> None:
        """Raise what a question would, if there is nobody to answer it."""
        self._require(what)
        if not self._line.open:
            raise self._gone(what, self._wait())

    def _require(self, what: str) -> None:
        if self._closed:
            raise StateError(errno.ESHUTDOWN, f"{what}: {self} is gone")

    def _wait(self) -> str:
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its channel"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def _gone(self, step: str, how: str) -> KhoError:
        if self._leaving:
            return StateError(errno.ESHUTDOWN, f"{step}: {self} is gone")
        if self._committed:
            return HostCrashError(
                errno.EHOSTDOWN, f"{step}: {self} {how} after the commit point: the host is down"
            )
        return SuccessorError(errno.ECHILD, f"{step}: {self} {how}", step)

    def __str__(self) -> str:
        return f"successor {self.image.name} (process {self.pid})"

    # ---- as the next kernel ----

    def validate(self, record: str | None, timeout: float) -> None:
        """Let it map the memory read-only and check what it is given; no write on its side.

        Raises:
            SuccessorError: it is not there, died, refused or answered too late.
        """
        if self._process.poll() is not None:
            raise SuccessorError(errno.ESRCH, f"validate: {self} is not there: {self._wait()}")
        self._ask("validate", timeout, "validate", record=record)

    def start(self, record: str | None, preflight: bool, verify: bool) -> RemoteKernel:
        """Pass the commit point: it may write from here on. Returns when it has restored.

        Raises:
            HostCrashError: it died.
            KernelPanic: it may not go on.
        """
        self._committed = True
        self.machine.memory.detach()
        self.machine.running = self
        self.result = self._ask(
            "start",
            record=record,
            preflight=preflight,
            verify=verify,
            devices=dma.targets(self.machine),
        )
        dma.note(self.machine, self.strays)
        return self

    # ---- as the kernel that goes ----

    def depart(self) -> None:
        """End it at the commit point: its successor has acknowledged.

        One that dies on the way has gone as well; there is no way back to it.
        """
        self._leaving = True  # whoever else asks it something now is told that it is gone
        try:
            self._ask("depart")
        except StateError as error:
            if error.errno != errno.ESHUTDOWN:
                raise
        finally:
            self._leave()

    def reboot(self, verify: bool) -> Departure:
        """Run REBOOT and say what is handed over."""
        told = self._ask("reboot", verify=verify)
        self._last = told.pop("profile")
        return Departure(**told)

    @property
    def kexec_loaded(self) -> bool:
        """Whether a next kernel is loaded, as ``/sys/kernel/kexec_loaded`` says."""
        return self._next is not None

    def kexec_load(self, next: KernelImage, *, timeout: float = 60.0) -> None:
        """Load the next kernel, as :meth:`luo.kernel.Kernel.kexec_load` does."""
        from luo.kernel import KernelImage  # the kernel module imports this one

        if not isinstance(next, KernelImage):
            raise TypeError("kexec_load: a kernel in another process is followed by a KernelImage")
        self._require("kexec_load")
        successor = RemoteKernel(self.machine, next, timeout)
        self.kexec_unload()
        self._next = successor
        self._ask("prefault")

    def kexec_unload(self) -> None:
        """Drop the loaded kernel, if there is one."""
        if self._next is not None:
            self._next.close()
            self._next = None

    def kexec(
        self, *, preflight: bool = True, timeout: float = 60.0, verify: bool = False
    ) -> RemoteKernel:
        """Jump, as :meth:`luo.kernel.Kernel.kexec` does."""
        self._require("kexec")
        if self._next is None:
            if "no-image-check" in self.quirks:
                self._ask("event", event="reboot")
                if self.luo.state is State.PREPARED:
                    self.luo.cancel()
            raise StateError(errno.EINVAL, "kexec: no kernel image is loaded")
        successor, self._next = self._next, None
        try:
            kernel = drained(
                jump(self, successor, preflight=preflight, timeout=timeout, verify=verify)
            )
        finally:
            if self._closed:
                self.close()  # its process ended while the next kernel booted
        assert isinstance(kernel, RemoteKernel)
        return kernel

    def take_back(self) -> None:
        """Undo what :meth:`reboot` did for an ordinary kexec that did not happen."""
        with contextlib.suppress(HostCrashError):  # the error that led here says so already
            self._ask("take_back")

    @property
    def liveupdate(self) -> NoReturn:
        """Not here: sessions have descriptors, which only its device node can pass on.

        Raises:
            StateError: EOPNOTSUPP.
        """
        raise StateError(
            errno.EOPNOTSUPP,
            f"liveupdate: {self} runs in another process; offer a luo.device_node.ControlSocket"
            " on the machine, and open it with luo.client",
        )

    @property
    def profile(self) -> Profile:
        """What its callbacks cost until now: a copy. Once it is gone, until its REBOOT."""
        with self._bulk_lock:
            if self._gone_profile is not None:
                return self._gone_profile
            if self._last and self._leaving and self._bulk >= 0:
                self._gone_profile = self._read_profile(self._last)
                return self._gone_profile
            return self._read_profile(self._ask("profile"))

    def _read_profile(self, told: dict[str, Any]) -> Profile:
        spans, costs = np.empty(told["spans"], SPAN), np.empty((2, told["devices"]), np.float32)
        _transfer(os.preadv, self._bulk, spans, 0)
        _transfer(os.preadv, self._bulk, costs, spans.nbytes)
        recorder = CallRecorder()
        recorder.load(told["labels"], spans, costs, told["dropped"])
        recorder.merge(told["calls"])
        return Profile.of(recorder, self.machine.devices, self.arrival)

    @property
    def marks(self) -> dict[str, tuple[int, int]]:
        """When each phase that it has passed began and ended, on the monotonic clock."""
        told = self._ask("marks")["marks"]
        return {name: (begin, end) for name, (begin, end) in told.items()}

    @property
    def phases(self) -> dict[str, int]:
        """Nanoseconds of each phase that it has passed."""
        return {name: end - begin for name, (begin, end) in self.marks.items()}

    @property
    def strays(self) -> list[dma.Stray]:
        """As :attr:`luo.kernel.Kernel.strays`."""
        return [dma.Stray(**stray) for stray in self.result.get("dma", ())]

    def whose(self, phys: int, nbytes: int) -> list[dma.Extent]:
        """As :func:`luo.dma.whose`."""
        told = self._ask("whose", phys=phys, nbytes=nbytes)["extents"]
        return [dma.Extent(*extent) for extent in told]

    def debug_files(self) -> dict[str, bytes]:
        """As :func:`luo.sysfs.debug_files`."""
        files = self._ask("debug_files")["files"]
        return {name: base64.b64decode(content) for name, content in files.items()}

    def write_debug_file(self, name: str, value: int) -> None:
        """As :func:`luo.sysfs.write_debug_file`; waits until a running event has ended."""
        self._ask("write_debug_file", name=name, value=value)

    def close(self) -> None:
        """End the process; the machine is off, its memory keeps the bytes."""
        self.kexec_unload()
        self._leave()
        with self._bulk_lock:
            if self._bulk >= 0:
                os.close(self._bulk)
                self._bulk = -1
        process = getattr(self, "_process", None)
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
            if process.poll() is None:
                process.kill()
                process.wait()

    def _leave(self) -> None:
        if self.machine.running is self:  # first: who is told that it is gone looks for the next
            self.machine.running = None
        self._closed = True
        self._line.close()

    def __enter__(self) -> RemoteKernel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            self.close()


class RemoteOrchestrator:
    """The orchestrator of a :class:`RemoteKernel`."""

    def __init__(self, kernel: RemoteKernel) -> None:
        self._kernel = kernel
        # What it told last; it tells of every change.
        self._facts = {"state": State.NORMAL.name, "enabled": False, "initialised": False}

    def _fact(self, name: str) -> Any:
        self._kernel._require_alive(name)
        return self._facts[name]

    @property
    def state(self) -> State:
        """The present state; waits for nobody."""
        return State[self._fact("state")]

    @property
    def enabled(self) -> bool:
        """Whether ``liveupdate=`` and ``kho=`` are both on there."""
        return bool(self._fact("enabled"))

    @property
    def initialised(self) -> bool:
        """Whether its directory in ``/sys`` exists."""
        return bool(self._fact("initialised"))

    def prepare(self) -> None:
        """As :meth:`luo.liveupdate.Orchestrator.prepare`."""
        self._kernel._ask("event", event="prepare", undo=self.cancel)

    def dry_reboot(self) -> CancelResult:
        """As :meth:`luo.liveupdate.Orchestrator.dry_reboot`."""
        return CancelResult(self._failures(self._kernel._ask("event", event="dry_reboot")))

    def kill(self, thread: int) -> bool:
        """As :meth:`luo.liveupdate.Orchestrator.kill`, for a thread of this process.

        It is one that waits here for the other process, where its call waits for another event.
        """
        return any(
            [
                self._kernel._ask("kill", of=number)["killed"]
                for number, asked in tuple(self._kernel._waiting.items())
                if asked.thread == thread
            ]
        )

    def cancel(self) -> CancelResult:
        """As :meth:`luo.liveupdate.Orchestrator.cancel`."""
        return CancelResult(self._failures(self._kernel._ask("event", event="cancel")))

    def finish(self) -> FinishResult:
        """As :meth:`luo.liveupdate.Orchestrator.finish`."""
        told = self._kernel._ask("event", event="finish")
        return FinishResult(tuple(told["unreclaimed"]), self._failures(told))

    @staticmethod
    def _failures(told: dict[str, Any]) -> tuple[CallbackError, ...]:
        errors = (decode_error(failure) for failure in told["failures"])
        return tuple(error for error in errors if isinstance(error, CallbackError))


class RemoteAgent:
    """The :class:`luo.agent.Agent` of a :class:`RemoteKernel`.

    Attributes:
        state: as there.
    """

    def __init__(self, kernel: RemoteKernel) -> None:
        self._kernel = kernel
        self.state = "normal"

    def _tell(self, call: str, **arguments: Any) -> dict[str, Any]:
        told = self._kernel._ask("agent", call=call, **arguments)
        self.state = told["state"]
        return told

    def prepare(self) -> None:
        """As :meth:`luo.agent.Agent.prepare`."""
        self._tell("prepare", undo=self.cancel)

    def cancel(self) -> CancelResult:
        """As :meth:`luo.agent.Agent.cancel`."""
        return CancelResult(RemoteOrchestrator._failures(self._tell("cancel")))

    def dry_reboot(self) -> CancelResult:
        """As :meth:`luo.agent.Agent.dry_reboot`."""
        try:
            return CancelResult(RemoteOrchestrator._failures(self._tell("dry_reboot")))
        except CallbackError:
            self.state = "normal"
            raise

    def kexec(self, **settings: Any) -> RemoteKernel:
        """As :meth:`luo.agent.Agent.kexec`."""
        kernel: RemoteKernel = kexec_or_cancel(self, self._kernel, settings)
        return kernel

    def retrieve(self, verify: bool = False) -> dict[str, Any]:
        """As :meth:`luo.agent.Agent.retrieve`."""
        kernel = self._kernel
        result: dict[str, Any] = self._tell("retrieve", verify=verify)["result"]
        kernel.result = result
        if kernel.arrival is not None:
            kernel.arrival = revised(kernel.arrival, result)
        return result

    def finish(self) -> FinishResult:
        """As :meth:`luo.agent.Agent.finish`."""
        told = self._tell("finish")
        return FinishResult(tuple(told["unreclaimed"]), RemoteOrchestrator._failures(told))


class RemoteDevices:
    """The devices of a :class:`RemoteKernel`: what can be asked of them from here."""

    def __init__(self, kernel: RemoteKernel) -> None:
        self._kernel = kernel

    def __len__(self) -> int:
        return len(self._kernel.machine.devices)

    def request_one(self, index: int, on: bool) -> None:
        """As :meth:`luo.device.Devices.request_one`."""
        self._kernel._ask("request_one", index=int(index), on=bool(on))

    def change_owner(self, index: int, uid: int, gid: int) -> None:
        """As :meth:`luo.device.Devices.change_owner`."""
        self._kernel._ask("change_owner", index=int(index), uid=uid, gid=gid)

    @property
    def owners(self) -> dict[int, tuple[int, int]]:
        """(uid, gid) of the directories whose owner was changed, by device number: a copy."""
        told = self._kernel._ask("owners")["owners"]
        return {index: (uid, gid) for index, uid, gid in told}

    @property
    def references(self) -> NDArray[np.int32]:
        """How many references live update holds on each device: a copy."""
        text = self._kernel._ask("references")["counts"]
        counts = np.zeros(len(self._kernel.machine.devices.parents), np.int32)
        told = np.frombuffer(base64.b64decode(text), np.int32)
        counts[: len(told)] = told  # devices that came since are not known there
        return counts

    @property
    def nr_linked(self) -> int:
        """Links in its list of requested devices."""
        return int(self._kernel._ask("references")["nr_linked"])

    def request(self, which: str | ArrayLike, on: bool = True) -> int:
        """As :meth:`luo.device.Devices.request`."""
        if isinstance(which, str):
            told = self._kernel._ask("request", glob=which, on=on)
        else:
            n = len(self._kernel.machine.devices.parents)
            mask = pack_mask(chosen_mask(which, n, self._kernel.machine.devices))
            told = self._kernel._ask("request", mask=mask, nr_devices=n, on=on)
        return int(told["changed"])

    def _flags(self, name: str) -> NDArray[np.bool_]:
        told = self._kernel._ask("flags", name=name)
        return unpack_mask(told["mask"], len(self._kernel.machine.devices.parents))

    @property
    def requested(self) -> NDArray[np.bool_]:
        """Flag column: user space asked to keep it."""
        return self._flags("requested")

    @property
    def preserved(self) -> NDArray[np.bool_]:
        """Flag column: its state is kept across the jump."""
        return self._flags("preserved")

    @property
    def reclaimed(self) -> NDArray[np.bool_]:
        """Flag column: it runs again."""
        return self._flags("reclaimed")

    @property
    def grouped(self) -> NDArray[np.bool_]:
        """Flag column: it has a ``liveupdate`` directory in ``/sys``."""
        return self._flags("grouped")


# ---- the side that answers ----


#: Answered by the channel's thread, whatever the main thread does.
_QUESTIONS: Final = frozenset(
    {
        "change_owner",
        "debug_files",
        "flags",
        "interrupt",
        "kill",
        "marks",
        "owners",
        "profile",
        "references",
        "whose",
    }
)
#: How long the process may go on with what it is at when the other end is gone.
_GRACE_SECONDS: Final = 1.0

#: May wait for the end of an event, in a thread of their own.
_WRITES: Final = frozenset({"request", "request_one"})


class _Server:
    """The child's end: one kernel, and the commands that it obeys."""

    def __init__(self, peer: socket.socket) -> None:
        self._kernel: Kernel | None = None
        self._plan: Any = None
        self._commands: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._open: dict[int, threading.Thread] = {}  # not answered yet, and who does it
        self._main = threading.main_thread()
        self._lock = threading.Lock()  # of the three below
        self._begun = 0  # what the main thread took last
        self._current = 0  # the same while it is at it
        self._interrupted: set[int] = set()
        self._telling = False
        self._bulk = -1  # where the arrays of the profile go
        signal.signal(signal.SIGINT, lambda number, frame: self._stop_here())
        self._line = Line(peer, self._receive)

    @property
    def kernel(self) -> Kernel:
        """The kernel that was loaded."""
        if self._kernel is None:
            raise StateError(errno.EINVAL, "no kernel is loaded")
        return self._kernel

    # ---- whose turn it is ----

    def _receive(self, message: dict[str, Any] | None) -> None:
        """Give what came to the thread that obeys it; called by the line."""
        if message is None:
            self._commands.put(None)
            self._main.join(_GRACE_SECONDS)
            if self._main.is_alive():  # in a callback: whoever would kill it may be dead
                os._exit(1)
        elif message["command"] in _QUESTIONS:
            self._obey(message)
        elif message["command"] in _WRITES:
            thread = threading.Thread(target=self._obey, args=(message,), daemon=True)
            self._open[message["id"]] = thread
            thread.start()
        else:
            self._open[message["id"]] = self._main
            self._commands.put(message)

    def run(self) -> None:
        """Obey until the other end is gone."""
        while (message := self._commands.get()) is not None:
            self._obey(message)

    def _obey(self, message: dict[str, Any]) -> None:
        command, number = message.pop("command"), message.pop("id")
        answer: dict[str, Any] = {"id": number}
        main = threading.current_thread() is self._main
        try:
            try:
                if main:
                    self._begin(number)
                answer["result"] = getattr(self, f"do_{command}")(**message)
            finally:
                if main:
                    self._current = 0
        except BaseException as error:
            if "result" not in answer:  # else it was interrupted when it was done
                answer["error"] = encode_error(error)
        if main:
            answer["facts"] = self._facts()
        self._post(answer)
        self._open.pop(number, None)

    def _facts(self) -> dict[str, Any]:
        """Return what the other side keeps, so that it need not ask."""
        try:
            luo = self.kernel.luo
            return {
                "state": luo.state.name,
                "enabled": luo.enabled,
                "initialised": luo.initialised,
            }
        except StateError:  # there is none yet, or any more
            return {}

    def _post(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(Closed):
            self._line.post(message)

    def _tell(self, what: str, name: str) -> None:
        """Push a notification; an interrupt waits until it is on its way."""
        here = threading.current_thread() is self._main
        if here:
            self._telling = True
        self._post({"notify": what, "name": name, "facts": self._facts()})
        if here:
            self._telling = False
            self._stop_here()

    # ---- interrupts: each is meant for one command, and finds it or comes too late ----

    def _begin(self, number: int) -> None:
        with self._lock:
            self._begun = self._current = number
        self._stop_here()

    def _stop_here(self) -> None:
        """Raise KeyboardInterrupt if what the main thread does was interrupted, but only once."""
        if self._current in self._interrupted and not self._telling:
            self._interrupted.discard(self._current)
            raise KeyboardInterrupt

    def _give_up(self, number: int) -> bool:
        """Take back a command that waits for its turn; return whether it did."""
        if self._open.get(number) is not self._main or number == self._begun:
            return False
        self._interrupted.add(number)
        why = StateError(errno.EAGAIN, "killed while it waited for the event before it")
        self._post({"id": number, "error": encode_error(why)})
        return True

    def do_interrupt(self, of: int) -> dict[str, Any]:
        """Interrupt a command: raise KeyboardInterrupt in its callback, end its wait."""
        thread = self._open.get(of)
        if thread is not self._main:  # a write, which may be about to wait
            stopped = thread is None or self.kernel.luo.kill(thread.ident or 0)
            return {"open": thread is not None, "stopped": stopped}
        with self._lock:
            if not self._give_up(of):
                self._interrupted.add(of)
                signal.pthread_kill(self._main.ident or 0, signal.SIGINT)
        return {"open": True, "stopped": True}

    def do_kill(self, of: int) -> dict[str, Any]:
        """Kill a command if it waits."""
        thread = self._open.get(of)
        with self._lock:
            killed = self._give_up(of)
        if thread is not None and not killed:
            killed = self.kernel.luo.kill(thread.ident or 0)
        return {"killed": killed}

    # ---- commands ----

    def do_load(
        self,
        image: dict[str, Any],
        memory: dict[str, Any],
        tree: int,
        bulk: int,
        control: list[int],
    ) -> dict[str, Any]:
        """Map the memory read-only, build the kernel, enumerate and bind."""
        from luo.device_node import ControlSocket
        from luo.kernel import KernelImage
        from luo.machine import DeviceTree, Machine
        from luo.memory import PhysicalMemory

        self._bulk = bulk
        ranges = [tuple(part) for part in memory["ranges"]]
        mapped = PhysicalMemory.attach(
            memory["fd"], ranges, offset=memory["offset"], page_size=memory["page_size"]
        )
        machine = Machine(mapped, DeviceTree.from_memfd(tree))
        machine.elsewhere = []
        for fd in control:
            machine.control = ControlSocket.inherited(fd)
        machine.devices.index()  # an image that waits has time; after the jump there is none
        kernel = KernelImage(image["name"], image["cmdline"], image["args"]).build(machine)
        kernel.devices.expect_records()
        kernel.observer = partial(self._observe, kernel.observer)
        machine.watchers.append(partial(self._tell, "sysfs"))
        self._kernel = kernel
        return {
            "kho_abi": kernel.kho_abi,
            "behaviour": kernel.behaviour,
            "quirks": sorted(kernel.quirks),
            "agent": kernel.agent is not None,
        }

    def _observe(self, also: Callable[[str, str], None] | None, what: str, name: str) -> None:
        if what == "state":  # phases are many, and the blackout is short
            self._tell(what, name)
        if also is not None:
            also(what, name)

    def do_validate(self, record: str | None) -> dict[str, Any]:
        """Check what the old kernel left; reads only."""
        self._plan = self.kernel.validate(handover_of(self.kernel.arch, record))
        return {}

    def do_start(
        self, record: str | None, preflight: bool, verify: bool, devices: list[Any]
    ) -> dict[str, Any]:
        """Boot, restore, and report; *devices* go on writing meanwhile."""
        kernel = self.kernel
        kernel.machine.elsewhere = devices
        kernel.machine.memory.writable()
        if preflight:
            kernel.take_over(self._plan, verify)
        else:
            kernel.boot_from(record)
        return kernel.boot_result()

    def do_event(self, event: str) -> dict[str, Any]:
        """Run an event of the orchestrator."""
        luo = self.kernel.luo
        before = luo.state
        try:
            result = getattr(luo, event)()
            return {
                "failures": [encode_error(error) for error in getattr(result, "failures", ())],
                "unreclaimed": list(getattr(result, "unreclaimed", ())),
            }
        except KeyboardInterrupt:
            if luo.state is State.PREPARED and (before is State.NORMAL or event == "dry_reboot"):
                luo.cancel()  # it came when PREPARE, or REBOOT, was just done
            raise

    def do_agent(self, call: str, **arguments: Any) -> dict[str, Any]:
        """Have user space of this kernel do something; see :class:`luo.agent.Agent`."""
        agent = self.kernel.agent
        if agent is None:
            raise StateError(errno.EOPNOTSUPP, f"{call}: this kernel keeps nothing by sessions")
        done = getattr(agent, call)(**arguments)
        told: dict[str, Any] = {"state": agent.state}
        if isinstance(done, dict):
            return told | {"result": done}
        return told | {
            "failures": [encode_error(error) for error in getattr(done, "failures", ())],
            "unreclaimed": list(getattr(done, "unreclaimed", ())),
        }

    def do_reboot(self, verify: bool) -> dict[str, Any]:
        """Run REBOOT for the jump that the other side leads."""
        # What telling the profile takes is after the end of REBOOT, and so in no phase.
        return asdict(self.kernel.reboot(verify)) | {"profile": self.do_profile()}

    def do_take_back(self) -> dict[str, Any]:
        """Undo what REBOOT did for an ordinary kexec."""
        self.kernel.take_back()
        return {}

    def do_depart(self) -> dict[str, Any]:
        """Go: the successor has acknowledged, and this process may last a little longer."""
        kernel = self.kernel
        kernel.depart()
        with contextlib.suppress(OSError):  # then nothing but its end keeps it from writing
            kernel.machine.memory.cut_off()
        return {}

    def do_prefault(self) -> dict[str, Any]:
        """Touch what PREPARE will write."""
        self.kernel.prefault()
        return {}

    def do_write_debug_file(self, name: str, value: int) -> dict[str, Any]:
        """Write a file of KHO in debugfs."""
        from luo.sysfs import write_debug_file  # which imports this module

        write_debug_file(self.kernel, name, value)
        return {}

    # ---- writes of requested ----

    def do_request_one(self, index: int, on: bool) -> dict[str, Any]:
        """Write ``requested`` of one device."""
        self.kernel.devices.request_one(index, on)
        return {}

    def do_request(
        self, on: bool, glob: str | None = None, mask: str = "", nr_devices: int = 0
    ) -> dict[str, Any]:
        """Write ``requested`` of many devices."""
        devices = self.kernel.devices
        if glob is not None:
            return {"changed": devices.request(glob, on)}
        known, wanted = len(devices.requested), unpack_mask(mask, nr_devices)
        if wanted[known:].any():  # they came after this kernel was loaded
            raise from_errno(errno.ENOENT, f"request: this kernel knows {known} devices")
        return {"changed": devices.request(wanted[:known], on)}

    # ---- questions ----

    def do_flags(self, name: str) -> dict[str, Any]:
        """Tell a flag column."""
        if name not in ("requested", "preserved", "reclaimed", "grouped"):
            raise ValueError(f"flags: {name!r}")
        return {"mask": pack_mask(getattr(self.kernel.devices, name))}

    def do_references(self) -> dict[str, Any]:
        """Tell how many references there are on each device, and links in the list."""
        devices = self.kernel.devices
        counts = np.ascontiguousarray(devices.references, np.int32)
        return {
            "counts": base64.b64encode(counts.tobytes()).decode(),
            "nr_linked": devices.nr_linked,
        }

    def do_owners(self) -> dict[str, Any]:
        """Tell who owns the directories of devices."""
        owners = dict(self.kernel.devices.owners)
        return {"owners": [[index, *owner] for index, owner in owners.items()]}

    def do_change_owner(self, index: int, uid: int, gid: int) -> dict[str, Any]:
        """Change who owns a device's directory."""
        self.kernel.devices.change_owner(index, uid, gid)
        return {}

    def do_debug_files(self) -> dict[str, Any]:
        """Tell what debugfs shows of KHO."""
        from luo.sysfs import debug_files  # which imports this module

        files = debug_files(self.kernel)
        return {"files": {name: base64.b64encode(text).decode() for name, text in files.items()}}

    def do_whose(self, phys: int, nbytes: int) -> dict[str, Any]:
        """Tell whose memory it is."""
        return {"extents": dma.whose(self.kernel, phys, nbytes)}

    def do_profile(self) -> dict[str, Any]:
        """Tell what callbacks cost: rows as JSON, arrays in the memfd, spans first."""
        profile = self.kernel.profile
        spans, costs, dropped = profile.spans, profile.costs, profile.dropped
        _transfer(os.pwritev, self._bulk, spans, 0)
        _transfer(os.pwritev, self._bulk, costs, spans.nbytes)
        return {
            "labels": profile.labels,
            "calls": profile.dump(),
            "spans": len(spans),
            "devices": costs.shape[1],
            "dropped": dropped,
        }

    def do_marks(self) -> dict[str, Any]:
        """Tell when its phases began and ended."""
        return {"marks": dict(self.kernel.marks)}


def serve() -> None:
    """Be the second process: the channel is the file descriptor in the last argument."""
    server = _Server(socket.socket(fileno=int(sys.argv[-1])))
    sys.argv = ["luo-kernel"]
    server.run()
