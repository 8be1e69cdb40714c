# L5: the timed callback loop, and the bulk arithmetic of slots.
#
# A callback is Python code, so this loop holds the GIL; what it saves is everything else:
# one clock read per boundary between callbacks, no Python frame of ours in between, and a
# device object only for a device whose callback is called.

# ---- the loop ----

@cython.auto_pickle(False)
cdef class DeviceRef:
    """Base of ``luo.device.Device``: a kernel's view of one device, nothing but two fields.

    Attributes:
        devices: the kernel's ``Devices`` that it belongs to.
        index: its number in the device tree.
    """

    cdef readonly object devices
    cdef readonly Py_ssize_t index

    def __init__(self, devices, Py_ssize_t index):
        self.devices = devices
        self.index = index

    def __eq__(self, other):
        return (
            isinstance(other, DeviceRef)
            and self.devices is (<DeviceRef>other).devices
            and self.index == (<DeviceRef>other).index
        )

    def __hash__(self):
        return hash((id(self.devices), self.index))


@cython.final
@cython.auto_pickle(False)
cdef class CallTable:
    """The per-device callbacks of one side, driver or bus, for one event.

    Args:
        ids: driver or bus number of each device (``int32``), -1 for none.
        calls: callable, :class:`NativeCallback` or None for each number.
        keys: recorder row for each number (``int32``).
        bit: this side's bit in the done mask.
        mode: ``"plain"``; ``"set"`` sets the bit after success (PREPARE); ``"clear"`` calls
            only where the bit is set and clears it whatever the outcome (CANCEL);
            ``"need"`` calls only where the bit is set.
    """

    cdef const int32_t[::1] ids
    cdef list calls
    cdef const int32_t[::1] keys
    cdef call_side side
    cdef luo_callback *native
    cdef void **contexts

    def __cinit__(
        self, const int32_t[::1] ids not None, list calls not None,
        const int32_t[::1] keys not None, int bit, str mode not None,
    ):
        cdef Py_ssize_t i
        modes = {"plain": CALL_PLAIN, "set": CALL_SET, "clear": CALL_CLEAR, "need": CALL_NEED}
        if mode not in modes:
            raise ValueError(f"call table: mode {mode!r} is none of {', '.join(modes)}")
        if len(calls) != keys.shape[0]:
            raise ValueError(f"call table: {len(calls)} callbacks, {keys.shape[0]} rows")
        for i in range(ids.shape[0]):
            if ids[i] >= keys.shape[0]:
                raise ValueError(f"call table: device {i} has number {ids[i]} of {keys.shape[0]}")
        self.ids = ids
        self.calls = calls
        self.keys = keys
        self.native = <luo_callback *>calloc(len(calls) + 1, sizeof(luo_callback))
        self.contexts = <void **>calloc(len(calls) + 1, sizeof(void *))
        if self.native == NULL or self.contexts == NULL:
            raise MemoryError("call table")
        for i in range(len(calls)):
            if isinstance(calls[i], NativeCallback):
                self.native[i] = <luo_callback>(<NativeCallback>calls[i]).address
                self.contexts[i] = <void *>(<NativeCallback>calls[i]).ctx
        self.side.ids = &ids[0] if ids.shape[0] else NULL
        self.side.keys = &keys[0] if keys.shape[0] else NULL
        self.side.calls, self.side.contexts = self.native, self.contexts
        self.side.bit = bit
        self.side.mode = modes[mode]

    def __dealloc__(self):
        free(self.native)
        free(self.contexts)


cdef bint is_zero(object outcome) except -1:
    if type(outcome) is int:
        return outcome == 0
    try:
        return PyNumber_Index(outcome) == 0  # False, or a number of numpy's
    except TypeError:
        return False


cdef bint call_one(
    CallRecorder recorder, native_device *device, const call_side *sides, int nr_sides,
    uint8_t *done, int64_t *last, call_failure *failures, Py_ssize_t *nr_failures, bint collect,
) noexcept nogil:
    """Call the native callbacks of one device; returns whether the loop has to stop."""
    cdef const call_side *side
    cdef luo_callback call
    cdef int32_t number, index = device.index
    cdef int64_t now, elapsed
    cdef int t, rc
    for t in range(nr_sides):
        side = &sides[t]
        number = side.ids[index]
        if number < 0:
            continue
        if side.mode >= CALL_CLEAR:
            if not done[index] & side.bit:
                continue
            if side.mode == CALL_CLEAR:
                done[index] &= <uint8_t>~side.bit
        call = side.calls[number]
        rc = 0
        if call != NULL:
            rc = call(<luo_device *>device, side.contexts[number])
            elapsed = 0
            if recorder.timing:
                now = monotonic_ns()
                elapsed = now - last[0]
                recorder.record(side.keys[number], last[0], elapsed, index, 1)
                last[0] = now
            if rc == 0 and recorder.limit_ns and elapsed > recorder.limit_ns:
                rc = -c_errno.ETIMEDOUT
                if side.mode == CALL_SET:  # it did its work, late
                    done[index] |= side.bit
            if rc != 0:
                failures[nr_failures[0]].device = index
                failures[nr_failures[0]].side = t
                failures[nr_failures[0]].rc = rc
                nr_failures[0] += 1
                if not collect:
                    return True
                continue
        if side.mode == CALL_SET:
            done[index] |= side.bit
    return False


cdef call_native(
    CallRecorder recorder, NativeScope scope, const int32_t[::1] order, Py_ssize_t start,
    Py_ssize_t stop, bint backwards, const call_side *sides, int nr_sides, uint8_t[::1] done,
    list failures,
):
    """:func:`call_devices` where nobody needs Python: a stretch at a time without the GIL."""
    cdef call_failure found[2 * NATIVE_STRETCH]
    cdef native_device device
    cdef Py_ssize_t n = 0, end, i, nr_found, nr = stop - start, nr_devices = done.shape[0]
    cdef int64_t last = monotonic_ns() if recorder.timing else 0
    cdef bint collect = failures is not None, stopped = False
    cdef int32_t wrong = -1
    device.calls = &native_calls
    device.scope = &scope.scope
    while n < nr and not stopped:
        end = min(n + NATIVE_STRETCH, nr)
        nr_found = 0
        with nogil:
            while n < end:
                i = stop - 1 - n if backwards else start + n
                n += 1
                device.index = order[i]
                if not 0 <= device.index < nr_devices:
                    wrong = device.index
                    stopped = True
                    break
                if call_one(recorder, &device, sides, nr_sides, &done[0], &last, found,
                            &nr_found, collect):
                    stopped = True
                    break
        if wrong >= 0:
            raise IndexError(f"call_devices: device {wrong} of {nr_devices}")
        for i in range(nr_found):
            outcome = (found[i].device, found[i].side, native_outcome(recorder, found[i].rc))
            if not collect:
                return outcome
            failures.append(outcome)
        try:
            PyErr_CheckSignals()
        except BaseException as interrupt:
            if not collect:
                raise
            failures.append((device.index, 0, interrupt))
    return None


cdef object native_outcome(CallRecorder recorder, int rc):
    if rc == -c_errno.ETIMEDOUT and recorder.limit_ns:
        return TimeoutError(
            c_errno.ETIMEDOUT, f"took too long, the limit is {recorder.limit_ns / 1e6:.3f} ms")
    return rc


def call_devices(
    CallRecorder recorder not None, object devices, type device_type not None,
    const int32_t[::1] order not None, Py_ssize_t start, Py_ssize_t stop, bint backwards,
    list tables not None, uint8_t[::1] done not None, list failures, NativeScope scope=None,
    bint native=False,
):
    """Call each device's callbacks in *order*, timed, table after table for each device.

    Args:
        order: device numbers, ``int32``; positions *start* to *stop* are served.
        backwards: from *stop* - 1 down to *start*.
        tables: one or two :class:`CallTable`, in the order of calling.
        done: one byte a device, see :class:`CallTable`.
        failures: None stops at the first failure; a list collects them all, interrupts too.
        scope: what native callbacks reach; needed if there are any.
        native: that no device here has a callback in Python: the GIL is released.

    Returns:
        None, or the first failure if *failures* is None. A failure is (device, table number,
        outcome): the exception that was raised, or the value that was returned.
    """
    cdef Py_ssize_t n, i, nr_devices = done.shape[0]
    cdef int t, rc, nr_tables = len(tables)
    cdef int32_t number
    cdef CallTable table
    cdef object call, outcome, view
    cdef int64_t last, now, elapsed
    cdef bint real = recorder.clock is None and recorder.cost is None
    cdef call_side sides[2]
    cdef native_device device

    if not issubclass(device_type, DeviceRef):
        raise TypeError(f"call_devices: {device_type.__name__} is no DeviceRef")
    if not (0 <= start <= stop <= order.shape[0]):
        raise IndexError(f"call_devices: {start}..{stop} of {order.shape[0]}")
    if not 0 < nr_tables <= 2:
        raise ValueError(f"call_devices: {nr_tables} tables, not 1 or 2")
    for t in range(nr_tables):
        table = <CallTable?>tables[t]
        if table.ids.shape[0] < nr_devices:
            raise IndexError("call_devices: a table is shorter than the done mask")
        for i in range(table.keys.shape[0]):
            if table.calls[i] is not None and not 0 <= table.keys[i] < recorder.nr_stats:
                raise IndexError(f"call_devices: recorder has no row {table.keys[i]}")
        sides[t] = table.side
    if native and scope is not None and real and nr_devices:
        return call_native(recorder, scope, order, start, stop, backwards, sides, nr_tables, done,
                           failures)

    device.calls = &native_calls
    device.scope = NULL if scope is None else &scope.scope
    last = recorder.now() if recorder.timing else 0
    for n in range(stop - start):
        i = stop - 1 - n if backwards else start + n
        device.index = order[i]
        if not 0 <= device.index < nr_devices:
            raise IndexError(f"call_devices: device {device.index} of {nr_devices}")
        view = None
        for t in range(nr_tables):
            number = sides[t].ids[device.index]
            if number < 0:
                continue
            if sides[t].mode >= CALL_CLEAR:
                if not done[device.index] & sides[t].bit:
                    continue
                if sides[t].mode == CALL_CLEAR:
                    done[device.index] &= <uint8_t>~sides[t].bit
            call = (<CallTable>tables[t]).calls[number]
            if call is not None:
                if sides[t].calls[number] != NULL:
                    if scope is None:
                        raise TypeError("call_devices: native callbacks need a scope")
                    with nogil:
                        rc = sides[t].calls[number](
                            <luo_device *>&device, sides[t].contexts[number])
                    outcome = rc if rc else None
                else:
                    if view is None:
                        # Past __init__: this is once a callback.
                        view = DeviceRef.__new__(device_type)
                        (<DeviceRef>view).devices = devices
                        (<DeviceRef>view).index = device.index
                    try:
                        outcome = call(view)
                        if outcome is not None and is_zero(outcome):
                            outcome = None
                    except Exception as error:
                        outcome = error
                    except BaseException as error:
                        # An interrupt ends what can be undone; where nothing stops, the caller
                        # raises it when everybody has been called.
                        if failures is None:
                            raise
                        outcome = error
                # Before the clock is asked: it may be late, or the clock raise, but it did its
                # work, and whoever undoes has to undo it.
                if outcome is None and sides[t].mode == CALL_SET:
                    done[device.index] |= sides[t].bit
                if recorder.timing:
                    if real:  # next_lap() without the detours
                        now = monotonic_ns()
                        elapsed = now - last
                        recorder.record(sides[t].keys[number], last, elapsed, device.index, 1)
                        last = now
                    else:
                        elapsed = recorder.next_lap(sides[t].keys[number], &last, device.index, 1)
                    if outcome is None and recorder.limit_ns:
                        outcome = recorder.overdue(elapsed)
                if outcome is not None:
                    if failures is None:
                        return device.index, t, outcome
                    failures.append((device.index, t, outcome))
                    continue
            if sides[t].mode == CALL_SET:
                done[device.index] |= sides[t].bit
    return None


# ---- slots and records in bulk ----

def spread_strings(const int32_t[::1] ids not None, list names not None):
    """Return *names* by number as the rows of a string column: the reverse of match_strings().

    Args:
        ids: ``int32``: number of each row in *names*, -1 for an empty row.
        names: list of ``bytes`` without NUL.

    Returns:
        (data, offsets): every string with a NUL behind it, ``uint8`` and ``uint64`` (n + 1,).

    Raises:
        IndexError: a row has another number.
    """
    cdef Py_ssize_t i, bad = -1, n = ids.shape[0], nr_names = len(names)
    cdef bytes joined = b"".join([name + b"\0" for name in names])
    cdef const uint8_t[::1] text = joined
    begins = np.zeros(nr_names + 1, np.uint64)
    np.cumsum([len(name) + 1 for name in names], out=begins[1:])
    cdef const uint64_t[::1] begin = begins
    offset_array = np.empty(n + 1, np.uint64)
    cdef uint64_t[::1] offsets = offset_array
    cdef uint64_t at = 0
    cdef uint8_t[::1] target
    cdef int32_t number
    with nogil:
        offsets[0] = 0
        for i in range(n):
            number = ids[i]
            if number >= nr_names or number < -1:
                bad = i
                break
            if number >= 0:
                at += begin[number + 1] - begin[number]
            offsets[i + 1] = at
    if bad >= 0:
        raise IndexError(f"spread_strings: row {bad} has number {ids[bad]} of {nr_names}")
    data = np.empty(at, np.uint8)
    target = data
    with nogil:
        for i in range(n):
            if offsets[i + 1] > offsets[i]:
                memcpy(&target[offsets[i]], &text[begin[ids[i]]], offsets[i + 1] - offsets[i])
    return data, offset_array


def digest_slots(
    const uint8_t[::1] slab not None, const uint64_t[::1] offsets not None,
    const uint64_t[::1] sizes not None, const int32_t[::1] owners not None,
    uint64_t first, uint64_t[::1] sums not None, uint64_t[::1] nbytes not None,
):
    """Add a digest of each slot of one slab to its owner's sum.

    The digest of a slot depends on its bytes, its length and the number of its record, and an
    owner's sum does not depend on the order of adding. It finds damage, not forgery.

    Args:
        slab: the slab's bytes.
        offsets, sizes, owners: of each slot; owner -1 is left out.
        first: record number of the first slot.
        sums, nbytes: ``uint64`` per owner, added to.

    Raises:
        ValueError: a slot leaves the slab, or its owner is unknown.
    """
    cdef Py_ssize_t i, bad = -1, n = offsets.shape[0]
    cdef uint64_t hashed, word, at, end
    if sizes.shape[0] != n or owners.shape[0] != n or sums.shape[0] != nbytes.shape[0]:
        raise ValueError("digest_slots: arrays differ in length")
    with nogil:
        for i in range(n):
            if owners[i] < 0 or sizes[i] == 0:
                continue
            at = offsets[i]
            if (owners[i] >= sums.shape[0] or at > <uint64_t>slab.shape[0]
                    or sizes[i] > <uint64_t>slab.shape[0] - at):
                bad = i
                break
            end = at + sizes[i]
            hashed = (first + i) * 0x9E3779B97F4A7C15u ^ sizes[i]
            while end - at >= 8:
                memcpy(&word, &slab[at], 8)
                hashed = (hashed ^ word) * 0xD6E8FEB86659FD93u
                hashed ^= hashed >> 32
                at += 8
            if at < end:
                word = 0
                memcpy(&word, &slab[at], end - at)
                hashed = (hashed ^ word) * 0xD6E8FEB86659FD93u
                hashed ^= hashed >> 32
            sums[owners[i]] += hashed * 0x9E3779B97F4A7C15u
            nbytes[owners[i]] += sizes[i]
    if bad >= 0:
        raise ValueError(f"slot {first + bad}: leaves its slab or has no owner")
