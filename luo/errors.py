"""Exceptions of the library; a leaf that imports nothing of ours.

Two number spaces meet only here: Linux's errno in :class:`KhoError` and its
subclasses, libfdt's codes in :class:`FdtError`.
"""

import errno as _errno

__all__ = [
    "BudgetError",
    "CallbackError",
    "FdtError",
    "HandoverError",
    "HostCrashError",
    "KernelPanic",
    "KhoBusyError",
    "KhoError",
    "KhoExistsError",
    "KhoNoMemoryError",
    "KhoNotFoundError",
    "LuoError",
    "StateError",
    "SuccessorError",
    "errno_name",
    "from_errno",
]


#: Where one number has two names, the one that the kernel's sources use.
_KERNEL_NAMES = {
    _errno.EOPNOTSUPP: "EOPNOTSUPP",
    _errno.EAGAIN: "EAGAIN",
    _errno.EDEADLK: "EDEADLK",
}


def errno_name(code: int) -> str:
    """Return Linux's name of the errno *code*, as ``"EINVAL"``; the number if it has none."""
    return _KERNEL_NAMES.get(code) or _errno.errorcode.get(code, str(code))


class LuoError(Exception):
    """Base of everything this library raises on its own behalf."""


class KhoError(LuoError, OSError):
    """An operation was refused or failed at run time.

    Attributes:
        errno: Linux's error number, positive.
        strerror: operation, object and the rule that it broke.
    """

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)

    def __str__(self) -> str:
        return f"{self.strerror} [{errno_name(self.errno or 0)}]"


class KhoExistsError(KhoError, FileExistsError):
    """EEXIST."""


class KhoNotFoundError(KhoError, FileNotFoundError):
    """ENOENT."""


class KhoBusyError(KhoError, BlockingIOError):
    """EBUSY or EAGAIN."""


class KhoNoMemoryError(KhoError, MemoryError):
    """ENOMEM: the simulated machine, or this process, has no memory left."""


class StateError(KhoError):
    """An event, or an object, is not available in the present state."""


_CLASS_OF = {
    _errno.EEXIST: KhoExistsError,
    _errno.ENOENT: KhoNotFoundError,
    _errno.EBUSY: KhoBusyError,
    _errno.EAGAIN: KhoBusyError,
    _errno.ENOMEM: KhoNoMemoryError,
    _errno.ESHUTDOWN: StateError,
}


def from_errno(code: int, message: str) -> KhoError:
    """Build the exception for Linux's errno *code* (positive)."""
    return _CLASS_OF.get(code, KhoError)(code, message)


class CallbackError(KhoError):
    """A callback of a subsystem, driver or bus failed.

    Attributes:
        errno: what the callback returned, or stands for the exception it raised.
        event: ``"PREPARE"``, ``"REBOOT"``, ``"FINISH"``, ``"CANCEL"`` or ``"RESTORE"``.
        kind: ``"subsystem"``, ``"driver"`` or ``"bus"``.
        name: of the subsystem, driver or bus.
        device: path of the device, or None for a subsystem.
        returned: the number that it returned, None if it raised or took too long.
        rolled_back: whether everything is again as it was before PREPARE.
        undo_errors: what failed while undoing; also attached as notes.
        file, line: where the user's callback stands, if that is known.
    """

    def __init__(
        self,
        errno: int,
        message: str,
        *,
        event: str,
        kind: str,
        name: str,
        device: str | None = None,
        returned: int | None = None,
        file: str | None = None,
        line: int | None = None,
    ) -> None:
        super().__init__(errno, message)
        self.event = event
        self.kind = kind
        self.name = name
        self.device = device
        self.returned = returned
        self.file = file
        self.line = line
        self.rolled_back = False
        self.undo_errors: list[BaseException] = []

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_callback_error, (self.errno, self.strerror, self.__dict__.copy()))


def _rebuild_callback_error(errno: int, message: str, state: dict[str, object]) -> CallbackError:
    error = CallbackError(errno, message, event="", kind="", name="")
    error.__dict__.update(state)
    return error


class FdtError(LuoError, ValueError):
    """A flattened device tree is wrong, or an edit of one is.

    Attributes:
        code: libfdt's name of the error, as ``"FDT_ERR_BADSTRUCTURE"``.
        offset: byte in the blob where it was found, or None.
    """

    def __init__(self, code: str, offset: int | None = None, message: str = "") -> None:
        super().__init__(code, offset, message)
        self.code = code
        self.offset = offset
        self.message = message

    def __str__(self) -> str:
        where = "" if self.offset is None else f" at offset {self.offset:#x}"
        return f"{self.code}{where}" + (f": {self.message}" if self.message else "")


class HandoverError(LuoError, ValueError):
    """What the previous kernel left behind breaks a rule of the format.

    Attributes:
        phys: physical address (or offset, for bytes outside memory) of the violation, or None.
        rule: the rule that it breaks, in words.
    """

    def __init__(self, rule: str, phys: int | None = None) -> None:
        super().__init__(rule, phys)
        self.rule = rule
        self.phys = phys

    def __str__(self) -> str:
        return self.rule if self.phys is None else f"{self.phys:#x}: {self.rule}"


class KernelPanic(LuoError):
    """The new kernel must not go on, as Linux would panic there."""


class SuccessorError(KhoError):
    """The next kernel did not take over; the old one goes on, nothing is lost.

    Attributes:
        errno: ENOEXEC (could not be built), ESRCH (not there), ECHILD (died), EPROTO (refused),
            ETIMEDOUT (answered too late).
        step: ``"load"``, ``"validate"`` or ``"acknowledge"``.
        rolled_back: whether a prepared update was cancelled without a failure.
        undo_errors: what failed while it was cancelled; also attached as notes.
    """

    def __init__(self, errno: int, message: str, step: str = "validate") -> None:
        super().__init__(errno, message)
        self.step = step
        self.rolled_back = True
        self.undo_errors: list[BaseException] = []

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.errno, self.strerror, self.step))


class HostCrashError(KhoError):
    """The new kernel died after the commit point: the old one is gone, the host is down."""


class BudgetError(LuoError, AssertionError):
    """An update took longer than it may: what :meth:`luo.report.Report.check` raises.

    Attributes:
        over: nanoseconds as ``(spent, allowed)`` by name of what is over budget, worst first.
    """

    def __init__(self, message: str, over: dict[str, tuple[int, int]]) -> None:
        super().__init__(message)
        self.over = over

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self), self.over))
