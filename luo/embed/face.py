"""What ``luo_embed.h`` promises, in Python: one function for each of the header's.

C programs hold numbers that look like pointers. Each stands for a :class:`_Machine` or a
:class:`_Kernel` here, and none is used twice: what was freed is known to be gone. A function that
raises returns the negative errno of its exception, and leaves the text for the thread that called.
"""

from __future__ import annotations

import errno
import functools
import gc
import inspect
import itertools
import os
import traceback
from collections.abc import Callable, Generator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from luo.device import Bus, DeviceBatch, Driver, LiveUpdateOps, batch, native
from luo.errors import FdtError, HandoverError, KernelPanic, StateError, from_errno
from luo.handover import Handover
from luo.kernel import Kernel, KernelImage, RemoteKernel
from luo.machine import DeviceTree, Machine
from luo.memory import PhysicalMemory
from luo.notifier import RESTORE, Context, Event, Priority, Step, Subsystem

__all__ = ["ABI", "install"]

#: Of the header that belongs to this module.
ABI: Final = 1

#: The errno of what has none of its own; the first that fits.
_CODES: Final = (
    (HandoverError, errno.EBADMSG),
    (FdtError, errno.EBADMSG),
    (KernelPanic, errno.ENOTRECOVERABLE),
    (MemoryError, errno.ENOMEM),
    (LookupError, errno.ENOENT),
    ((ValueError, TypeError, OverflowError), errno.EINVAL),
    (KeyboardInterrupt, errno.EINTR),
)

_EVENTS: Final = ("PREPARE", "REBOOT", "FINISH", "CANCEL", RESTORE)
_CALLBACKS: Final = ("prepare", "reboot", "finish", "cancel", "restore")
_KEXEC: Final = 5
_STEPS: Final = {"subsystem": 1, "driver": 2, "bus": 3}
_FLAGS: Final = ("requested", "preserved", "reclaimed")
_TEXT_BYTES: Final = 1024

#: Parameters that may be NULL; all other pointers are checked in one place.
_MAY_BE_NULL: Final = {"first", "following", "handed", "options", "ops", "rows", "unreclaimed"}


def install(ffi: Any, lib: Any) -> None:
    """Make the functions of ``libluo.so`` call a :class:`Face`; run once, when it starts.

    Raises:
        ImportError: the library was built with another version of luo.
    """
    if lib.LUO_ABI != ABI:
        raise ImportError(f"libluo.so has ABI {lib.LUO_ABI}, luo in {__file__} has {ABI}: rebuild")
    face = Face(ffi, lib)
    for name in dir(Face):
        if name.startswith("luo_"):
            call = face.guarded(name)
            ffi.def_extern(name=f"py_{name}", error=-errno.EIO)(call)


class _Machine:
    """A machine of a C program: what it is told first, and the machine that is made of it."""

    def __init__(self) -> None:
        self.by_fd: list[tuple[int, int, int, int, int]] = []  # base, bytes, node, fd, offset
        self.by_host: list[tuple[int, int, int, int]] = []  # base, bytes, node, address
        self.tree = DeviceTree()
        self.machine: Machine | None = None
        self.kernels = 0

    def close(self) -> None:
        for *_, fd, _offset in self.by_fd:
            os.close(fd)
        self.by_fd = []


class _Kernel:
    """A kernel of a C program: what it shall have, and the kernel once it boots or is loaded."""

    def __init__(self, box: _Machine, options: dict[str, Any]) -> None:
        self.box = box
        self.options = options
        self.drivers: list[Driver] = []
        self.buses: list[Bus] = []
        self.subsystems: list[Subsystem] = []
        self.kernel: Kernel | RemoteKernel | None = None
        self.next: _Kernel | None = None  # the one that is loaded
        self.steps: Generator[Step, None, object] | None = None
        self.step: Step | None = None  # the next one, or the one that has been handed out
        self.handed = False
        self.number = 0

    def made(self, machine: Machine) -> Kernel:
        """Return the kernel, which is built by now."""
        if self.kernel is None:
            self.kernel = Kernel(
                machine,
                drivers=self.drivers,
                buses=self.buses,
                subsystems=self.subsystems,
                **self.options,
            )
        return _local(self.kernel)

    def end_steps(self) -> None:
        """Forget the event that was stepped through, which has ended; or end it."""
        steps, self.steps, self.step = self.steps, None, None
        if steps is not None:
            steps.close()


class Face:
    """The functions; ``luo_x`` is called for ``luo_x()`` of the header, with cffi's values.

    Args:
        ffi, lib: of the library.
    """

    def __init__(self, ffi: Any, lib: Any) -> None:
        self._ffi = ffi
        self._lib = lib
        self._handles: dict[int, Any] = {}
        self._numbers = itertools.count(0x1000, 0x10)
        self._strings: dict[str, Any] = {}

    # ---- between C and Python ----

    def guarded(self, name: str) -> Callable[..., int]:
        """Return function *name* as C calls it: 0, or -errno with the text set."""
        function = getattr(self, name)
        null = self._ffi.NULL
        parameters = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*given: Any) -> int:
            try:
                for what, value in zip(parameters, given, strict=True):
                    if value == null and what not in _MAY_BE_NULL:
                        raise ValueError(f"{what} is NULL")
                function(*given)
                return 0
            except BaseException as error:  # nothing may get past this into C
                return self._refuse(name, error)

        return call

    def _refuse(self, name: str, error: BaseException) -> int:
        code = next((number for kind, number in _CODES if isinstance(error, kind)), 0)
        if isinstance(error, OSError) and error.errno:
            code = error.errno
        text = str(error)
        if not code:  # a mistake of ours
            code, text = errno.EIO, f"{type(error).__name__}: {text}"
            traceback.print_exception(error)
        raw = f"{name}: {text}".encode("utf-8", "replace")[: _TEXT_BYTES - 1] + b"\0"
        self._ffi.memmove(self._lib.luo_text_buffer(), raw, len(raw))
        return -code

    def _hold(self, kind: str, thing: object) -> Any:
        """Return a new handle for *thing*."""
        number = next(self._numbers)
        self._handles[number] = thing
        return self._ffi.cast(f"struct luo_{kind} *", number)

    def _number(self, pointer: Any) -> int:
        return int(self._ffi.cast("uintptr_t", pointer))

    def _find(self, handle: Any, kind: type[Any], what: str) -> Any:
        thing = self._handles.get(self._number(handle))
        if not isinstance(thing, kind):
            raise from_errno(errno.EBADF, f"no {what}: it was freed, or never was")
        return thing

    def _machine_box(self, machine: Any) -> _Machine:
        box: _Machine = self._find(machine, _Machine, "machine")
        return box

    def _box(self, kernel: Any) -> _Kernel:
        box: _Kernel = self._find(kernel, _Kernel, "kernel")
        return box

    def _running(self, kernel: Any) -> Kernel | RemoteKernel:
        """Return the kernel of a handle, which has booted or was loaded; in whatever process."""
        made = self._box(kernel).kernel
        if made is None:
            raise StateError(errno.EOPNOTSUPP, "the kernel has neither booted nor been loaded")
        return made

    def _kernel(self, kernel: Any) -> Kernel:
        """Return the kernel of a handle, for what only one in this process can be asked."""
        return _local(self._running(kernel))

    def _new_box(self, kernel: Any) -> _Kernel:
        """Return the kernel of a handle that is not made yet."""
        box = self._box(kernel)
        if box.kernel is not None:
            raise from_errno(errno.EBUSY, "the kernel has booted, or was loaded")
        return box

    def _text(self, pointer: Any) -> str:
        return os.fsdecode(self._ffi.string(pointer))

    def _optional_text(self, pointer: Any) -> str | None:
        return None if pointer == self._ffi.NULL else self._text(pointer)

    def _string(self, text: str) -> Any:
        """Return *text* as a string of C that stays for ever."""
        known = self._strings.get(text)
        if known is None:
            known = self._ffi.new("char[]", os.fsencode(text))
            known = self._strings.setdefault(text, known)
        return known

    def _array(self, pointer: Any, count: int, dtype: type[Any]) -> NDArray[Any]:
        """Return an array of C, without a copy."""
        nbytes = count * np.dtype(dtype).itemsize
        return np.frombuffer(self._ffi.buffer(pointer, nbytes) if count else b"", dtype)

    def _texts(self, pointer: Any, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """Return strings of C one behind the other, and where each begins and ends."""
        offsets = np.zeros(count + 1, np.uint64)
        where = self._ffi.from_buffer("uint64_t[]", offsets)
        nbytes = self._lib.luo_measure(pointer, count, where)
        if nbytes < 0:
            raise ValueError("names: one is NULL")
        data = np.empty(nbytes, np.uint8)
        self._lib.luo_join(pointer, count, where, self._ffi.from_buffer("char[]", data))
        return data, offsets

    def _codes(self, pointer: Any, count: int) -> tuple[NDArray[np.int32], list[str]] | None:
        """Return strings of C, many of them equal, as numbers into those that differ."""
        if pointer == self._ffi.NULL:
            return None
        # The same pointer is the same text; most programs have few.
        addresses = self._array(pointer, count, np.uintp)
        found, numbers = np.unique(addresses, return_inverse=True)
        ids: dict[str, int] = {}
        codes = [
            -1 if not address else ids.setdefault(self._text_at(address), len(ids))
            for address in found.tolist()
        ]
        return np.array(codes, np.int32)[numbers], list(ids)

    def _text_at(self, address: int) -> str:
        return self._text(self._ffi.cast("char *", address))

    # ---- the machine ----

    def luo_machine_new(self, machine: Any) -> None:
        machine[0] = self._hold("machine", _Machine())

    def luo_machine_free(self, machine: Any) -> None:
        box = self._machine_box(machine)
        if box.kernels:
            raise from_errno(errno.EBUSY, f"machine: {box.kernels} kernels of it are not freed")
        del self._handles[self._number(machine)]
        box.close()
        del box
        gc.collect()  # the caller's memory must have no user left

    def luo_machine_add_ram(
        self, machine: Any, base: int, nbytes: int, fd: int, offset: int, node: int
    ) -> None:
        box = self._machine_box(machine)
        self._check_range(box, base, nbytes, node)
        if box.by_host:
            raise ValueError("RAM by fd beside RAM of the host")
        if offset % 4096:
            raise ValueError(f"offset {offset:#x}: not whole pages")
        copy = os.dup(fd)
        try:
            length = os.fstat(copy).st_size
            if length < offset + nbytes:
                raise ValueError(f"fd {fd}: {length} bytes, {offset + nbytes} are needed")
        except BaseException:
            os.close(copy)
            raise
        box.by_fd.append((base, nbytes, node, copy, offset))

    def luo_machine_add_host_ram(
        self, machine: Any, base: int, nbytes: int, host: Any, node: int
    ) -> None:
        box = self._machine_box(machine)
        self._check_range(box, base, nbytes, node)
        address = self._number(host)
        if box.by_fd:
            raise ValueError("RAM of the host beside RAM by fd")
        if box.by_host and address - base != box.by_host[0][3] - box.by_host[0][0]:
            raise ValueError("RAM of the host: its ranges lie at different distances")
        if address % 4096:
            raise ValueError(f"host {address:#x}: does not begin on a page")
        box.by_host.append((base, nbytes, node, address))

    @staticmethod
    def _check_range(box: _Machine, base: int, nbytes: int, node: int) -> None:
        """Refuse what cannot be RAM, now and not when the first kernel comes."""
        if box.machine is not None:
            raise from_errno(errno.EBUSY, "RAM: the machine is in use")
        if not 0 <= node < 1024:
            raise ValueError(f"RAM: node {node} is not in 0..1023")
        if base % 4096 or nbytes % 4096 or not nbytes or base + nbytes > 1 << 48:
            raise ValueError(f"RAM {base:#x}+{nbytes:#x}: not whole pages below 2^48")
        known = [part[:2] for part in (*box.by_fd, *box.by_host)]
        if any(start < base + nbytes and base < start + length for start, length in known):
            raise ValueError(f"RAM {base:#x}+{nbytes:#x}: overlaps a range before it")

    def _machine(self, box: _Machine) -> Machine:
        """Return the machine, which is built by now."""
        if box.machine is None:
            if not (box.by_fd or box.by_host):
                raise ValueError("machine: it has no RAM")
            box.machine = Machine(self._memory(box), box.tree)
            box.close()
        return box.machine

    def _memory(self, box: _Machine) -> PhysicalMemory:
        ranges = sorted((part[0], part[1], part[2]) for part in (*box.by_fd, *box.by_host))
        start = ranges[0][0]
        span = ranges[-1][0] + ranges[-1][1] - start
        if box.by_host:
            first = min(box.by_host)
            place = self._ffi.cast("char *", first[3])
            return PhysicalMemory(ranges=ranges, host=self._ffi.buffer(place, span))
        stats = [os.fstat(part[3]) for part in box.by_fd]
        files = {(stat.st_dev, stat.st_ino) for stat in stats}
        distances = {offset - base for base, _, _, _, offset in box.by_fd}
        if len(files) == len(distances) == 1:
            *_, fd, offset = min(box.by_fd)
            return PhysicalMemory(ranges=ranges, fd=fd, offset=offset)
        place = self._lib.luo_reserve(span)
        if place == self._ffi.NULL:
            raise from_errno(errno.ENOMEM, f"RAM: no address space for {span:#x} bytes")
        place = self._ffi.gc(place, lambda there: self._lib.luo_unmap(there, span))
        for base, nbytes, _node, fd, offset in box.by_fd:
            at = self._ffi.cast("char *", place) + (base - start)
            code = self._lib.luo_map(at, nbytes, fd, offset)
            if code < 0:
                raise from_errno(-code, f"RAM {base:#x}+{nbytes:#x}: {os.strerror(-code)}")
        return PhysicalMemory(ranges=ranges, host=self._ffi.buffer(place, span))

    def luo_machine_bytes(self, machine: Any, phys: int, nbytes: int, result: Any) -> None:
        view = self._machine(self._machine_box(machine)).memory.view(phys, nbytes)
        result[0] = self._ffi.from_buffer("char[]", view, require_writable=True)

    def luo_machine_add_devices(self, machine: Any, devices: Any, first: Any) -> None:
        box, count = self._machine_box(machine), devices.count
        if count < 0 or devices.nr_columns < 0 or devices.names == self._ffi.NULL:
            raise ValueError("devices: less than 0, or without names")
        if devices.nr_columns and devices.columns == self._ffi.NULL:
            raise ValueError("devices: columns is NULL")
        columns = {}
        for i in range(devices.nr_columns):
            column = devices.columns[i]
            if self._ffi.NULL in (column.name, column.data):
                raise ValueError(f"column {i}: without name or data")
            columns[self._text(column.name)] = self._column(column, count)
        numbers = [
            None if one == self._ffi.NULL else self._array(one, count, np.int32)
            for one in (devices.parents, devices.nodes)
        ]
        added = box.tree.add_many(
            self._texts(devices.names, count),
            numbers[0],
            self._codes(devices.buses, count),
            self._codes(devices.drivers, count),
            numbers[1],
            **columns,
        )
        if first != self._ffi.NULL:
            first[0] = added.start

    def _column(self, column: Any, count: int) -> Any:
        if column.offsets == self._ffi.NULL:
            flat = self._array(column.data, count * column.width, np.uint8)
            return flat.reshape(count, column.width)
        offsets = self._array(column.offsets, count + 1, np.uint64)
        return self._array(column.data, int(offsets[-1]), np.uint8), offsets

    def luo_machine_find(self, machine: Any, path: Any, device: Any) -> None:
        device[0] = self._machine_box(machine).tree[self._text(path)]

    def luo_machine_path(self, machine: Any, device: int, path: Any, room: int) -> None:
        raw = os.fsencode(self._machine_box(machine).tree.path(device)) + b"\0"
        if len(raw) > room:
            raise from_errno(errno.ENAMETOOLONG, f"path of {len(raw)} bytes: room for {room}")
        self._ffi.memmove(path, raw, len(raw))

    # ---- kernels ----

    def luo_kernel_new(self, machine: Any, options: Any, kernel: Any) -> None:
        box = self._machine_box(machine)
        self._machine(box)
        given: dict[str, Any] = {}
        if options != self._ffi.NULL:
            for name in ("kho_abi", "release", "cmdline", "behaviour"):
                text = self._optional_text(getattr(options, name))
                if text is not None:
                    given[name] = text
            given["workers"] = options.workers or 1
            if options.callback_limit_ns:
                given["callback_limit"] = options.callback_limit_ns / 1e9
            if options.clock != self._ffi.NULL:
                given["clock"] = functools.partial(options.clock, options.clock_ctx)
        Kernel(Machine(4096), **given).close()  # refuses what no kernel may be
        kernel[0] = self._hold("kernel", _Kernel(box, given))
        box.kernels += 1

    def luo_kernel_free(self, kernel: Any) -> None:
        box = self._box(kernel)
        del self._handles[self._number(kernel)]
        box.box.kernels -= 1
        if box.kernel is not None:
            box.kernel.close()
        box.end_steps()

    def _ops(self, ops: Any) -> LiveUpdateOps | None:
        if ops == self._ffi.NULL:
            return None
        calls: dict[str, Any] = {}
        for name in _CALLBACKS:
            pointer = self._number(getattr(ops, name))
            calls[name] = native(pointer, self._number(ops.ctx)) if pointer else None
        size: Any = ops.state_size
        column = self._optional_text(ops.state_column)
        if column is not None:
            size = batch(functools.partial(_sizes, column))
        return LiveUpdateOps(**calls, state_size=size, thread_safe=bool(ops.thread_safe))

    def luo_kernel_add_driver(self, kernel: Any, name: Any, ops: Any) -> None:
        box = self._new_box(kernel)
        _add_new(box.drivers, Driver(self._text(name), self._ops(ops)))

    def luo_kernel_add_bus(self, kernel: Any, name: Any, ops: Any) -> None:
        box = self._new_box(kernel)
        _add_new(box.buses, Bus(self._text(name), self._ops(ops)))

    def luo_kernel_add_subsystem(self, kernel: Any, subsystem: Any) -> None:
        box = self._new_box(kernel)
        if subsystem.name == self._ffi.NULL:
            raise ValueError("subsystem: name is NULL")
        handle, ctx = self._ffi.cast("struct luo_kernel *", kernel), subsystem.ctx
        calls = {}
        for number, name in enumerate(_CALLBACKS):
            pointer = getattr(subsystem, name)
            if pointer != self._ffi.NULL:
                calls[name] = functools.partial(self._call_subsystem, pointer, ctx, handle, number)
        name, priority = self._text(subsystem.name), Priority(subsystem.priority)
        _add_new(box.subsystems, Subsystem(name, priority=priority, **calls))

    def _call_subsystem(
        self, pointer: Any, ctx: Any, handle: Any, event: int, context: Context
    ) -> int:
        given = self._ffi.new("struct luo_context *")
        given.kernel, given.data, given.event = handle, context.data, event
        code: int = pointer(given, ctx)
        context.data = given.data
        return code

    def luo_get_handover(self, kernel: Any, handover: Any) -> None:
        self._tell(handover, self._kernel(kernel).kho.handover())

    def _tell(self, handover: Any, found: Handover) -> None:
        handover[0] = self._ffi.new("struct luo_handover *", found.numbers)[0]

    def _handover(self, handover: Any) -> Handover:
        return Handover(*(getattr(handover, name) for name in Handover.__slots__))

    def luo_handover_to_setup_data(self, handover: Any, next_phys: int, node: Any) -> None:
        raw = self._handover(handover).to_setup_data(next_phys)
        self._ffi.memmove(node, raw, len(raw))

    def luo_handover_from_setup_data(self, node: Any, nbytes: int, handover: Any) -> None:
        raw = self._ffi.buffer(node, min(nbytes, 48))[:]
        self._tell(handover, Handover.from_setup_data(raw))

    def luo_boot(self, kernel: Any, handed: Any) -> None:
        box = self._box(kernel)
        told = None if handed == self._ffi.NULL else self._handover(handed)
        box.made(self._machine(box.box)).boot(told)

    # ---- live update ----

    def luo_state(self, kernel: Any, state: Any) -> None:
        state[0] = int(self._running(kernel).luo.state)

    def luo_request(self, kernel: Any, glob: Any, on: int) -> None:
        self._running(kernel).devices.request(self._text(glob), bool(on))

    def luo_request_devices(self, kernel: Any, devices: Any, count: int, on: int) -> None:
        if count < 0:
            raise ValueError(f"request: {count} devices")
        numbers = self._array(devices, count, np.int32)
        self._running(kernel).devices.request(numbers, bool(on))

    def luo_flags(self, kernel: Any, flag: int, flags: Any, count: int) -> None:
        if not 0 <= flag < len(_FLAGS) or count < 0:
            raise ValueError(f"flag {flag} of {count} devices")
        running = self._running(kernel)
        if isinstance(running, Kernel):
            running.devices.rescan()
        column = getattr(running.devices, _FLAGS[flag])
        if count > len(column):
            raise ValueError(f"flags of {count} devices: there are {len(column)}")
        self._array(flags, count, np.uint8)[:] = column[:count]

    def luo_prepare(self, kernel: Any) -> None:
        self._running(kernel).luo.prepare()

    def luo_cancel(self, kernel: Any) -> None:
        self._running(kernel).luo.cancel()

    def luo_reboot(self, kernel: Any) -> None:
        luo = self._kernel(kernel).luo
        if not luo.reboot():
            raise StateError(errno.EINVAL, f"REBOOT: needs PREPARED, it is {luo.state.name}")

    def luo_finish(self, kernel: Any, unreclaimed: Any) -> None:
        result = self._running(kernel).luo.finish()
        if unreclaimed != self._ffi.NULL:
            unreclaimed[0] = len(result.unreclaimed)

    def luo_kexec_load(self, kernel: Any, following: Any) -> None:
        box = self._box(kernel)
        if following == self._ffi.NULL:
            self._running(kernel).kexec_unload()
            box.next = None
            return
        loaded = self._box(following)
        self._kernel(kernel).kexec_load(loaded.made(self._machine(loaded.box)))
        box.next = loaded

    def luo_kexec_load_image(self, kernel: Any, image: Any, result: Any) -> None:
        box = self._box(kernel)
        self._running(kernel).kexec_load(KernelImage(self._text(image)))
        box.next = _Kernel(box.box, {})
        box.box.kernels += 1
        result[0] = self._hold("kernel", box.next)

    def luo_kexec(self, kernel: Any) -> None:
        box = self._box(kernel)
        running = self._running(kernel).kexec()
        if box.next is not None:
            box.next.kernel = running

    # ---- one callback at a time ----

    def luo_begin(self, kernel: Any, event: int) -> None:
        box, old = self._box(kernel), self._kernel(kernel)
        if box.steps is not None:
            raise StateError(errno.EDEADLK, "begin: an event has been begun, and has not ended")
        old.luo.refuse_callback("begin")
        box.number = 0
        box.steps = old.kexec_steps() if event == _KEXEC else old.luo.steps(Event(event))
        self._advance(box)  # the state is looked at now, not at the first step

    @staticmethod
    def _advance(box: _Kernel) -> None:
        """Go on to the next step; without one the event is complete."""
        assert box.steps is not None
        try:
            # Steps do not overlap here, so that there is nobody to wait for.
            steps = (step for step in box.steps if step.kind != "barrier")
            box.step, box.handed = next(steps, None), False
        except BaseException:
            box.end_steps()
            raise

    def luo_next(self, kernel: Any, step: Any) -> None:
        box = self._box(kernel)
        if box.steps is None:
            raise StateError(errno.EINVAL, "next: no event has been begun")
        if box.handed:
            assert box.step is not None
            if not box.step.done:
                raise from_errno(errno.EBUSY, f"next: {box.step!r} has not been completed")
            self._advance(box)
        found = box.step
        box.number += 1
        step.kernel, step.number = kernel, box.number
        if found is None:
            step.kind, step.name, step.device, step.devices = 0, self._string(""), -1, 0
            box.end_steps()
            return
        box.handed = True
        step.kind, step.name = _STEPS[found.kind], self._string(found.name)
        step.device = -1 if found.device is None else found.device.index
        step.devices = found.devices

    def luo_complete(self, step: Any, ns: int) -> None:
        box = self._box(step.kernel)
        if box.step is None or not box.handed or box.number != step.number or box.step.done:
            raise StateError(errno.EALREADY, f"step {step.number}: has run, or its event has ended")
        given = itertools.chain((ns,), itertools.repeat(0))  # what a rollback calls costs nothing
        # Behind the jump it is the next kernel's step.
        kernels = [one.kernel for one in (box, box.next) if one is not None]
        recorders = [kernel.recorder for kernel in kernels if isinstance(kernel, Kernel)]
        if ns >= 0:
            for recorder in recorders:
                recorder.cost = lambda label, device, devices: next(given)
        try:
            box.step.run()
        except BaseException:
            box.end_steps()
            raise
        finally:
            for recorder in recorders:
                recorder.cost = None

    def luo_abort(self, kernel: Any) -> None:
        box = self._box(kernel)
        if box.steps is None:
            raise StateError(errno.EINVAL, "abort: no event has been begun")
        box.end_steps()

    # ---- memory of the simulated kernel ----

    def luo_alloc_pages(self, kernel: Any, nr_pages: int, phys: Any) -> None:
        phys[0] = self._kernel(kernel).memory.alloc_pages(nr_pages)

    def luo_free_pages(self, kernel: Any, phys: int, nr_pages: int) -> None:
        self._kernel(kernel).memory.free_pages(phys, nr_pages)

    def luo_claim(self, kernel: Any, phys: int, order: int) -> None:
        self._kernel(kernel).memory.claim(phys, order)

    def luo_preserve_pages(self, kernel: Any, phys: int, nr_pages: int) -> None:
        self._kernel(kernel).kho.preserve_pages(phys, nr_pages)

    def luo_unpreserve_pages(self, kernel: Any, phys: int, nr_pages: int) -> None:
        self._kernel(kernel).kho.unpreserve_pages(phys, nr_pages)

    def luo_restore_pages(self, kernel: Any, phys: int, nr_pages: int) -> None:
        self._incoming(kernel).restore_pages(phys, nr_pages)

    def luo_alloc_preserve(self, kernel: Any, nbytes: int, phys: Any) -> None:
        phys[0] = self._kernel(kernel).kho.alloc_preserve(nbytes)

    def luo_unpreserve_free(self, kernel: Any, phys: int) -> None:
        self._kernel(kernel).kho.unpreserve_free(phys)

    def luo_restore_free(self, kernel: Any, phys: int) -> None:
        self._incoming(kernel).restore_free(phys)

    def _incoming(self, kernel: Any) -> Any:
        incoming = self._kernel(kernel).kho.incoming
        if incoming is None:
            raise from_errno(errno.ENOENT, "nothing came in: it was a cold boot")
        return incoming

    # ---- what it cost ----

    def luo_profile(self, kernel: Any, rows: Any, room: int, count: Any) -> None:
        found = self._running(kernel).profile.rows()
        for target, row in zip(self._room(rows, room), found, strict=False):
            for name in ("subsystem", "event", "kind", "name"):
                setattr(target, name, self._string(row[name]))
            for name in ("calls", "devices", "total_ns", "min_ns", "p50_ns", "p99_ns", "max_ns"):
                setattr(target, name, row[name])
        count[0] = len(found)

    def luo_phases(self, kernel: Any, rows: Any, room: int, count: Any) -> None:
        running = self._running(kernel)
        arrival = {} if running.arrival is None else running.arrival.phases
        found = {**arrival, **running.phases}
        for target, (name, ns) in zip(self._room(rows, room), found.items(), strict=False):
            target.name, target.ns = self._string(name), ns
        count[0] = len(found)

    def _room(self, rows: Any, room: int) -> list[Any]:
        if room < 0 or (room and rows == self._ffi.NULL):
            raise ValueError(f"rows: room for {room}")
        return [rows[i] for i in range(room)]


def _local(kernel: Kernel | RemoteKernel) -> Kernel:
    if isinstance(kernel, RemoteKernel):
        raise StateError(errno.EOPNOTSUPP, "the kernel is in another process")
    return kernel


def _sizes(column: str, devices: DeviceBatch) -> NDArray[np.uint64]:
    return devices.sizes(column)


def _add_new(known: list[Any], one: Any) -> None:
    if any(other.name == one.name for other in known):
        raise from_errno(errno.EEXIST, f"{one.name}: the kernel has one of that name")
    known.append(one)
