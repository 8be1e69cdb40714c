"""A kernel in a second process: how it is started, spoken to, and ended.

The process is started by exec from the image's name with two memfds, the memory and the
hardware's columns. It builds its kernel, says that it is ready and waits, as a loaded kexec image
does. The channel carries commands and results; whatever restoring needs comes from memory.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luo._kho import CallRecorder
from luo.errors import (
    CallbackError,
    FdtError,
    HandoverError,
    HostCrashError,
    KernelPanic,
    KhoError,
    StateError,
    SuccessorError,
    from_errno,
)
from luo.kexec import Departure, handover_of, jump
from luo.liveupdate import CancelResult, FinishResult, State

if TYPE_CHECKING:
    from luo.kernel import Kernel, KernelImage
    from luo.kexec import Arrival
    from luo.machine import Machine

__all__ = ["RemoteKernel"]

_FRAME_LIMIT: Final = 256 << 20  # bytes of one message; a peer that asks for more is broken
_INTERRUPTIBLE: Final = ("event", "reboot")  # commands that run callbacks which can be undone
_START: Final = "from luo.remote import serve; serve()"


class Closed(Exception):
    """The other end of the channel is gone."""


class Channel:
    """Length-prefixed JSON over a socket."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; raise :class:`Closed` if nobody is there."""
        body = json.dumps(message).encode()
        try:
            self._peer.sendall(struct.pack("=I", len(body)) + body)
        except OSError as error:
            raise Closed from error

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the next message.

        Raises:
            Closed: the peer is gone.
            TimeoutError: nothing complete came within *timeout* seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        (length,) = struct.unpack("=I", self._read(4, deadline))
        if length > _FRAME_LIMIT:
            raise Closed(f"message of {length} bytes")
        message: dict[str, Any] = json.loads(self._read(length, deadline))
        return message

    def _read(self, nbytes: int, deadline: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < nbytes:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._peer], [], [], left)[0]:
                raise TimeoutError
            try:
                part = self._peer.recv(min(nbytes - len(parts), 1 << 20))
            except ConnectionError as error:
                raise Closed from error
            if not part:
                raise Closed
            parts += part
        return bytes(parts)

    def close(self) -> None:
        """Close this end."""
        self._peer.close()


# ---- errors across the channel ----


def _encode_error(error: BaseException) -> dict[str, Any]:
    kind = type(error).__name__
    if isinstance(error, CallbackError):
        fields = {name: getattr(error, name) for name in _CALLBACK_FIELDS}
        return {
            "type": "CallbackError",
            "errno": error.errno,
            "message": error.strerror,
            "fields": fields,
            "undo": [str(problem) for problem in error.undo_errors],
        }
    if isinstance(error, FdtError):
        return {"type": kind, "args": [error.code, error.offset, error.message]}
    if isinstance(error, HandoverError):
        return {"type": kind, "args": [error.rule, error.phys]}
    if isinstance(error, KernelPanic):
        return {"type": kind, "args": [str(error)]}
    if isinstance(error, StateError):
        return {"type": kind, "args": [error.errno, error.strerror]}
    if isinstance(error, KhoError):
        return {"type": "KhoError", "args": [error.errno, error.strerror]}
    return {"type": "other", "args": [errno.EIO, f"{kind}: {error}"]}


_CALLBACK_FIELDS: Final = ("event", "kind", "name", "device", "file", "line")
_PLAIN_ERRORS: Final[dict[str, type[Exception]]] = {
    "FdtError": FdtError,
    "HandoverError": HandoverError,
    "KernelPanic": KernelPanic,
    "StateError": StateError,
}


def _decode_error(told: dict[str, Any]) -> Exception:
    kind = told["type"]
    if kind == "CallbackError":
        error = CallbackError(told["errno"], told["message"], **told["fields"])
        error.undo_errors = [KhoError(errno.EIO, problem) for problem in told["undo"]]
        error.rolled_back = not error.undo_errors
        return error
    if kind in _PLAIN_ERRORS:
        return _PLAIN_ERRORS[kind](*told["args"])
    return from_errno(*told["args"])


def pack_mask(mask: NDArray[np.bool_]) -> str:
    """Return a flag column as text for the channel."""
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


def unpack_mask(text: str, n: int) -> NDArray[np.bool_]:
    """Return the flag column of *n* devices that *text* holds."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(bits, count=n).astype(np.bool_)


# ---- the side that asks ----


class RemoteKernel:
    """A kernel that runs, or waits to run, in another process.

    Attributes:
        machine: the machine that it runs on.
        image: what it was started from.
        luo, devices: its orchestrator and devices, as far as they can be reached from here.
        pid: its process.
        result: what its boot came to: phases, digests, records without a device.
        arrival: how it came to run.
    """

    def __init__(self, machine: Machine, image: KernelImage, timeout: float = 60.0) -> None:
        """Start the process and wait until its kernel is built, enumerated and bound.

        Raises:
            SuccessorError: ENOEXEC if the image cannot be built, ECHILD if the process dies,
                ETIMEDOUT if it is not ready in *timeout* seconds.
        """
        self.machine = machine
        self.image = image
        self.luo = RemoteOrchestrator(self)
        self.devices = RemoteDevices(self)
        self.result: dict[str, Any] = {}
        self.arrival: Arrival | None = None
        self._committed = False
        self._count = 0
        self._closed = False
        self._next: RemoteKernel | None = None
        ours, theirs = socket.socketpair()
        self._channel = Channel(ours)
        tree = machine.devices.to_memfd()
        try:
            self._process = subprocess.Popen(
                # -P: the path is ours, and the directory that we happen to be in is no part of it.
                [sys.executable, "-P", "-c", _START, str(theirs.fileno())],
                pass_fds=(theirs.fileno(), machine.memory.fd, tree),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # ^C is for the kernel that runs, which rolls back
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                },
            )
            self.pid = self._process.pid
            theirs.close()
            memory = machine.memory
            self._ask(
                "load",
                timeout,
                step="load",
                image={"name": image.name, "cmdline": image.cmdline, "args": dict(image.args)},
                memory={
                    "fd": memory.fd,
                    "offset": memory.offset,
                    "ranges": [list(map(int, part)) for part in memory.ranges],
                    "page_size": memory.page_size,
                },
                tree=tree,
            )
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()
            os.close(tree)

    # ---- speaking ----

    def _ask(
        self, command: str, timeout: float | None = None, step: str = "", **arguments: Any
    ) -> dict[str, Any]:
        """Send a command and return its result.

        With *step*, which is for what precedes the commit point, every failure is a
        :class:`SuccessorError` that names it.
        """
        self._require(command)
        self._count += 1
        sent = False
        try:
            self._channel.send({"id": self._count, "command": command, **arguments})
            sent = True
            answer = self._answer(timeout)
        except KeyboardInterrupt:
            if sent and command in _INTERRUPTIBLE:
                self._interrupt()
            raise
        except Closed:
            raise self._gone(step or command, self._wait()) from None
        except TimeoutError:
            raise SuccessorError(
                errno.ETIMEDOUT, f"{step}: {self} gave no answer in {timeout:g} s", step
            ) from None
        if "error" in answer:
            error = _decode_error(answer["error"])
            if step:
                code = errno.ENOEXEC if step == "load" else errno.EPROTO
                why = error.strerror if isinstance(error, KhoError) else error
                raise SuccessorError(code, f"{step}: {self} refused: {why}", step) from error
            raise error
        result: dict[str, Any] = answer["result"]
        return result

    def _answer(self, timeout: float | None = None) -> dict[str, Any]:
        while True:
            answer = self._channel.receive(timeout)
            if answer["id"] == self._count:
                return answer  # else it answers a question whose asker was interrupted

    def _interrupt(self) -> None:
        """Pass ^C on to the kernel's callback, and wait until it has been rolled back."""
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(Closed):
            self._answer()

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
        self.result = self._ask("start", record=record, preflight=preflight, verify=verify)
        return self

    # ---- as the kernel that goes ----

    def depart(self) -> None:
        """End it at the commit point: its successor has acknowledged.

        One that dies on the way has gone as well; there is no way back to it.
        """
        with contextlib.suppress(HostCrashError):
            self._ask("depart")
        self.close()

    def reboot(self, verify: bool) -> Departure:
        """Run REBOOT and say what is handed over."""
        return Departure(**self._ask("reboot", verify=verify))

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
        if self._next is not None:
            self._next.close()
        self._next = successor
        self._ask("prefault")

    def kexec(
        self, *, preflight: bool = True, timeout: float = 60.0, verify: bool = False
    ) -> RemoteKernel:
        """Jump, as :meth:`luo.kernel.Kernel.kexec` does."""
        if self._next is None:
            raise StateError(errno.EINVAL, "kexec: no kernel image is loaded")
        successor, self._next = self._next, None
        kernel = jump(self, successor, preflight=preflight, timeout=timeout, verify=verify)
        assert isinstance(kernel, RemoteKernel)
        return kernel

    def cancel_reboot(self) -> bool:
        """Cancel after a failed jump; returns whether nothing failed."""
        return not self.luo.cancel().failures

    def take_back(self) -> None:
        """Undo what :meth:`reboot` did for an ordinary kexec that did not happen."""
        with contextlib.suppress(HostCrashError):  # the error that led here says so already
            self._ask("take_back")

    @property
    def profile(self) -> CallRecorder:
        """What its callbacks cost until now: a copy."""
        recorder = CallRecorder()
        recorder.merge(self._ask("profile")["calls"])
        return recorder

    @property
    def phases(self) -> dict[str, int]:
        """Nanoseconds of each phase that it has passed."""
        phases: dict[str, int] = self._ask("profile")["phases"]
        return phases

    def close(self) -> None:
        """End the process; the machine is off, its memory keeps the bytes."""
        if self._next is not None:
            self._next.close()
            self._next = None
        self._closed = True
        self._channel.close()
        process = getattr(self, "_process", None)
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
            if process.poll() is None:
                process.kill()
                process.wait()
        if getattr(self.machine, "running", None) is self:
            self.machine.running = None

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

    @property
    def state(self) -> State:
        """The present state."""
        return State[self._kernel._ask("state")["state"]]

    def prepare(self) -> None:
        """As :meth:`luo.liveupdate.Orchestrator.prepare`."""
        try:
            self._kernel._ask("event", event="prepare")
        except KeyboardInterrupt:
            if self.state is State.PREPARED:  # ^C came when it was just done
                self.cancel()
            raise

    def cancel(self) -> CancelResult:
        """As :meth:`luo.liveupdate.Orchestrator.cancel`."""
        return CancelResult(self._failures(self._kernel._ask("event", event="cancel")))

    def finish(self) -> FinishResult:
        """As :meth:`luo.liveupdate.Orchestrator.finish`."""
        told = self._kernel._ask("event", event="finish")
        return FinishResult(tuple(told["unreclaimed"]), self._failures(told))

    @staticmethod
    def _failures(told: dict[str, Any]) -> tuple[CallbackError, ...]:
        errors = (_decode_error(failure) for failure in told["failures"])
        return tuple(error for error in errors if isinstance(error, CallbackError))


class RemoteDevices:
    """The devices of a :class:`RemoteKernel`: what can be asked of them from here."""

    def __init__(self, kernel: RemoteKernel) -> None:
        self._kernel = kernel

    def __len__(self) -> int:
        return len(self._kernel.machine.devices)

    def request(self, which: str | ArrayLike, on: bool = True) -> int:
        """As :meth:`luo.device.Devices.request`."""
        if isinstance(which, str):
            told = self._kernel._ask("request", glob=which, on=on)
        else:
            mask = np.asarray(which)
            n = len(self._kernel.machine.devices.parents)
            if mask.dtype != np.bool_:
                indices, mask = mask, np.zeros(n, np.bool_)
                if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < n:
                    raise from_errno(errno.ENOENT, f"request: device number not in 0..{n - 1}")
                mask[indices.astype(np.intp)] = True
            told = self._kernel._ask("request", mask=pack_mask(mask), on=on)
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


# ---- the side that answers ----


class _Server:
    """The child's end: one kernel, and the commands that it obeys."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._kernel: Kernel | None = None
        self._plan: Any = None
        self._interruptible = False

    @property
    def kernel(self) -> Kernel:
        """The kernel that was loaded."""
        if self._kernel is None:
            raise StateError(errno.EINVAL, "no kernel is loaded")
        return self._kernel

    def on_interrupt(self, number: int, frame: object) -> None:
        """Raise KeyboardInterrupt in a callback that can be undone, and nowhere else."""
        if self._interruptible:
            self._interruptible = False
            raise KeyboardInterrupt

    def run(self) -> None:
        """Obey until the other end is gone."""
        while True:
            try:
                message = self._channel.receive()
            except Closed:
                return
            command, answer = message.pop("command"), {"id": message.pop("id")}
            try:
                try:
                    self._interruptible = command in _INTERRUPTIBLE
                    answer["result"] = getattr(self, f"do_{command}")(**message)
                finally:
                    self._interruptible = False
            except BaseException as error:
                answer["error"] = _encode_error(error)
            with contextlib.suppress(Closed):
                self._channel.send(answer)
            if command == "depart" and "result" in answer:
                return

    def do_load(self, image: dict[str, Any], memory: dict[str, Any], tree: int) -> dict[str, Any]:
        """Map the memory read-only, build the kernel, enumerate and bind."""
        from luo.kernel import KernelImage
        from luo.machine import DeviceTree, Machine
        from luo.memory import PhysicalMemory

        ranges = [tuple(part) for part in memory["ranges"]]
        mapped = PhysicalMemory.attach(
            memory["fd"], ranges, offset=memory["offset"], page_size=memory["page_size"]
        )
        machine = Machine(mapped, DeviceTree.from_memfd(tree))
        machine.devices.index()  # an image that waits has time; after the jump there is none
        self._kernel = KernelImage(image["name"], image["cmdline"], image["args"]).build(machine)
        return {}

    def do_validate(self, record: str | None) -> dict[str, Any]:
        """Check what the old kernel left; reads only."""
        self._plan = self.kernel.validate(handover_of(self.kernel.arch, record))
        return {}

    def do_start(self, record: str | None, preflight: bool, verify: bool) -> dict[str, Any]:
        """Boot, restore, and report."""
        kernel = self.kernel
        kernel.machine.memory.writable()
        if preflight:
            kernel.take_over(self._plan, verify)
        else:
            kernel.boot_from(record)
        return kernel.boot_result()

    def do_event(self, event: str) -> dict[str, Any]:
        """Run an event of the orchestrator."""
        result = getattr(self.kernel.luo, event)()
        return {
            "failures": [_encode_error(error) for error in getattr(result, "failures", ())],
            "unreclaimed": list(getattr(result, "unreclaimed", ())),
        }

    def do_reboot(self, verify: bool) -> dict[str, Any]:
        """Run REBOOT for the jump that the other side leads."""
        return asdict(self.kernel.reboot(verify))

    def do_take_back(self) -> dict[str, Any]:
        """Undo what REBOOT did for an ordinary kexec."""
        self.kernel.take_back()
        return {}

    def do_depart(self) -> dict[str, Any]:
        """Go: the successor has acknowledged."""
        self.kernel.depart()
        return {}

    def do_prefault(self) -> dict[str, Any]:
        """Touch what PREPARE will write."""
        self.kernel.prefault()
        return {}

    def do_state(self) -> dict[str, Any]:
        """Tell the state."""
        return {"state": self.kernel.luo.state.name}

    def do_request(
        self, on: bool, glob: str | None = None, mask: str | None = None
    ) -> dict[str, Any]:
        """Write ``requested``."""
        devices = self.kernel.devices
        which: Any = glob if glob is not None else unpack_mask(mask or "", len(devices.requested))
        return {"changed": devices.request(which, on)}

    def do_flags(self, name: str) -> dict[str, Any]:
        """Tell a flag column."""
        if name not in ("requested", "preserved", "reclaimed"):
            raise ValueError(f"flags: {name!r}")
        return {"mask": pack_mask(getattr(self.kernel.devices, name))}

    def do_profile(self) -> dict[str, Any]:
        """Tell what callbacks and phases cost."""
        return {"calls": self.kernel.profile.dump(), "phases": self.kernel.phases}


def serve() -> None:
    """Be the second process: the channel is the file descriptor in the last argument."""
    channel = Channel(socket.socket(fileno=int(sys.argv[-1])))
    sys.argv = ["luo-kernel"]
    server = _Server(channel)
    signal.signal(signal.SIGINT, server.on_interrupt)
    server.run()
