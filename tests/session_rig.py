"""Kernels with file handlers and FLBs whose every callback is written down and can be made to fail.

What a callback answers is what :mod:`session_model` says that it answers.
"""

import functools
import os
import struct

import kho_walker
import session_model as plain
from rig import act
from session_model import PAGE, Call, FlbCall, Handler, Raises

from luo.errors import CallbackError
from luo.files import FileHandler
from luo.flb import Flb
from luo.kernel import Kernel
from luo.machine import Machine

EVENTS = ("preserve", "unpreserve", "retrieve", "finish")
OPTIONAL = ("freeze", "unfreeze", "can_finish")


class Recorder:
    """The callbacks that were made, and what they shall do.

    Attributes:
        calls: those of the present operation, in order.
        faults: what the n-th of them does: returns a number or False, or :class:`Raises`.
        hooks: called with the arguments at the n-th of them, before that.
    """

    def __init__(self):
        self.calls, self.faults, self.hooks = [], {}, {}
        self._handlers, self._flbs = {}, {}

    def begin(self, faults=None):
        """Begin an operation."""
        self.calls, self.faults, self.hooks = [], faults or {}, {}

    def _note(self, call, subject):
        number = len(self.calls)
        self.calls.append(call)
        if number in self.hooks:
            self.hooks[number](subject)
        outcome = self.faults.get(number)
        if not isinstance(outcome, Raises):
            return outcome
        if outcome == plain.INTERRUPT:
            raise KeyboardInterrupt
        return act(
            ValueError("on purpose") if outcome.errno is None else OSError(outcome.errno, "")
        )

    # ---- files ----

    def handler(self, part: Handler) -> FileHandler:
        """Return the file handler that *part* describes: always the same one."""
        if part not in self._handlers:
            self._handlers[part] = self._make_handler(part)
        return self._handlers[part]

    def _make_handler(self, part):
        def can_preserve(file):
            call = Call("CAN_PRESERVE", part.compatible, None, None, file, 0, None, 0)
            outcome = self._note(call, file)
            return outcome is not False and file.kind in part.kinds

        def make(event):
            def called(args):
                assert args.handler is self._handlers[part]
                call = Call(
                    event.upper(),
                    part.compatible,
                    args.session,
                    args.token,
                    args.file,
                    args.data,
                    args.private,
                    args.retrieve_status,
                )
                if event in ("preserve", "freeze"):
                    args.data = plain.answer_data(call)
                if event == "preserve":
                    args.private = plain.answer_private(call)
                if event == "retrieve":
                    args.file = plain.answer_file(call)
                outcome = self._note(call, args)
                return outcome is not False if event == "can_finish" else outcome

            return called

        optional = [event for event in OPTIONAL if event in part.optional]
        return FileHandler(
            part.compatible,
            can_preserve=can_preserve,
            get_id=(lambda file: file.identity) if "get_id" in part.optional else None,
            **{event: make(event) for event in (*EVENTS, *optional)},
        )

    # ---- FLBs ----

    def flb(self, name: str) -> Flb:
        """Return the FLB of that name: always the same one."""
        if name not in self._flbs:
            self._flbs[name] = self._make_flb(name)
        return self._flbs[name]

    def _make_flb(self, name):
        def make(event):
            def called(args):
                assert args.flb is self._flbs[name]
                call = FlbCall(event.upper(), name, args.data, args.obj)
                if event == "preserve":
                    args.data = plain.answer_data(call)
                if event in ("preserve", "retrieve"):
                    args.obj = plain.answer_private(call)
                return self._note(call, args)

            return called

        return Flb(name, **{event: make(event) for event in EVENTS})


def told(error):
    """What a callback's error says: event, kind, name, errno, and of a file where it is."""
    where = error.device if error.kind == "file" and error.event != "CAN_PRESERVE" else None
    return error.event, error.kind, error.name, error.errno, where


def expected_told(failure):
    """What it shall say."""
    call = failure.call
    if isinstance(call, FlbCall):
        return call.event, "flb", call.name, failure.errno, None
    where = None if call.token is None else f"{call.session}/{call.token:#x}"
    return call.event, "file", call.compatible, failure.errno, where


def outcome_of(call, *arguments):
    """What a call of the engine came to, in the model's words."""
    try:
        return "returned", call(*arguments)
    except CallbackError as error:
        return "refused", error.errno, told(error)
    except OSError as error:
        return "refused", error.errno, None
    except KeyboardInterrupt:
        return "refused", -1, None


def expected_outcome_of(call, model):
    """What the model says that it shall come to: ^C is heard when all is done."""
    try:
        outcome = "returned", call(model)
    except plain.Refused as refused:
        failure = refused.failure if refused.errno > 0 else None
        told = None if failure is None else expected_told(failure)
        outcome = "refused", refused.errno, told
    if any(failure.errno < 0 for failure in model.lost):
        return "refused", -1, None
    return outcome


# ---- machines ----


def machine(memory="16MiB"):
    """Return a machine without devices."""
    return Machine(memory)


def kernel(on, recorder, handlers=(), **kwargs):
    """Return a kernel of that machine, which has not booted."""
    return Kernel(on, file_handlers=[recorder.handler(part) for part in handlers], **kwargs)


def link(running, recorder, flbs):
    """Register FLBs, (handler, name) each, and return the kernel."""
    for part, name in flbs:
        running.liveupdate.register_flb(recorder.handler(part), recorder.flb(name))
    return running


def booted(recorder, handlers=(), flbs=(), **kwargs):
    """Return a kernel with these handlers and FLBs that runs on a machine of its own."""
    return link(kernel(machine(), recorder, handlers, **kwargs).boot(), recorder, flbs)


@functools.cache
def beside() -> tuple[int, int]:
    """Return how many blocks a kernel preserves, and of what came over, beside those of LUO."""
    first = Kernel(machine()).boot()
    kept = first.kho.nr_preserved
    first.kexec_load(Kernel(first.machine))
    return kept, first.kexec().kho.incoming.nr_unrestored


# ---- bytes ----


def reader(memory):
    """Return read(phys, nbytes) through the memory's own file."""
    return lambda phys, nbytes: os.pread(memory.fd, nbytes, memory.offset + phys - memory.base)


def walked(memory, handover):
    """Return what the walker reads of a handover."""
    numbers = handover.fdt_phys, handover.fdt_len, handover.scratch_phys, handover.scratch_len
    return kho_walker.read_handover(reader(memory), *numbers, 12, "kho-v4")


class Found:
    """Where the pages of LUO are, followed from its head alone."""

    def __init__(self, read, head: int, sessions: list[str]) -> None:
        self.read, self.head, self.sessions = read, head, sessions

    def u64(self, phys: int) -> int:
        """Read a number."""
        return struct.unpack("<Q", self.read(phys, 8))[0]

    def __call__(self, name: tuple) -> int:
        """Return the address of the page called *name* (:meth:`session_model.Kernel.serialise`)."""
        match name:
            case ("head",):
                return self.head
            case ("flbs",):
                return self.u64(self.head + 24)
            case ("session", 0):
                return self.u64(self.head + 16)
            case ("file", session, 0):
                place = self.sessions.index(session)
                block = self(("session", place // plain.SESSIONS_A_BLOCK))
                return self.u64(block + 16 + 80 * (place % plain.SESSIONS_A_BLOCK) + 64)
            case (*chain, number):
                return self.u64(self((*chain, number - 1)))
        raise KeyError(name)


def check_bytes(memory, handover, model):
    """Compare every byte of LUO in memory with what the model of a frozen kernel serialises."""
    read, image = reader(memory), walked(memory, handover)
    if not model.enabled:
        assert "LUO" not in image.subtrees
        return
    phys, nbytes = image.subtrees["LUO"]
    assert nbytes == 32
    found = Found(read, phys, [session.name for session in model.outgoing])
    pages = model.serialise(found)
    where = {name: found(name) for name in pages}
    for name, expected in pages.items():
        assert read(where[name], PAGE if len(expected) > 32 else 32) == expected, name
    assert len({*where.values()}) == len(where) == model.outgoing_pages
    assert {(at, 0) for at in where.values()} <= {*image.preserved}


def updated(old, recorder, handlers=(), flbs=(), *, preflight=True, **kwargs):
    """Jump from *old* to a kernel with these handlers and FLBs, and return it."""
    old.kexec_load(kernel(old.machine, recorder, handlers, **kwargs))
    return link(old.kexec(preflight=preflight), recorder, flbs)


def short(recorder):
    """The calls of *recorder* in few words: "EVENT compatible token" or "EVENT name"."""
    return [
        f"{call.event} {call.name}"
        if isinstance(call, FlbCall)
        else f"{call.event} {call.compatible} {'?' if call.token is None else call.token}"
        for call in recorder.calls
    ]
