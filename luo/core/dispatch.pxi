# L5: the timed callback loop, what it records, and the bulk arithmetic of slots.
#
# A callback is Python code, so this loop holds the GIL; what it saves is everything else:
# one clock read per boundary between callbacks, no Python frame of ours in between, and a
# device object only for a device whose callback is called.

cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


# ---- what callbacks cost ----

cdef inline int histogram_bucket(int64_t ns) noexcept nogil:
    # 64 buckets an octave: a bucket is at most 1/64 wide, its middle within 0.8 % of the value.
    cdef int shift
    if ns < 2 * HISTOGRAM_SUB:
        return <int>ns if ns > 0 else 0
    shift = 63 - __builtin_clzll(<uint64_t>ns) - HISTOGRAM_SUB_BITS
    if shift > HISTOGRAM_OCTAVES - 2:
        return HISTOGRAM_BUCKETS - 1
    return (shift + 1) * HISTOGRAM_SUB + <int>((ns >> shift) - HISTOGRAM_SUB)


cdef inline int64_t histogram_value(int bucket) noexcept nogil:
    cdef int shift
    if bucket < 2 * HISTOGRAM_SUB:
        return bucket
    shift = bucket // HISTOGRAM_SUB - 1
    cdef int64_t low = <int64_t>(HISTOGRAM_SUB + bucket % HISTOGRAM_SUB) << shift
    return low + ((<int64_t>1 << shift) >> 1)


@cython.final
@cython.auto_pickle(False)
cdef class CallRecorder:
    """What every callback cost: count, total, min, max and a histogram, in constant memory.

    A row belongs to one (subsystem, event, kind, name). The histogram is log-linear with
    64 buckets an octave, so percentiles are good to 1 % between 10 ns and 100 s.

    Attributes:
        clock: None for ``CLOCK_MONOTONIC``, or a callable that returns nanoseconds.
        limit_ns: nanoseconds that a callback may take, 0 for as long as it likes.
    """

    cdef readonly object clock
    cdef public int64_t limit_ns
    cdef dict key_of
    cdef list names
    cdef call_stats **stats
    cdef Py_ssize_t nr_stats

    def __cinit__(self, clock=None):
        self.clock = clock
        self.key_of = {}
        self.names = []

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.nr_stats):
            free(self.stats[i])
        free(self.stats)

    cdef int64_t now(self) except? -1:
        if self.clock is None:
            return monotonic_ns()
        return PyLong_AsLongLong(PyNumber_Index(self.clock()))

    def read_clock(self):
        """Return the recorder's clock, in nanoseconds."""
        return self.now()

    def overdue(self, int64_t ns):
        """Return a ``TimeoutError`` if a callback of *ns* nanoseconds took too long, else None."""
        if self.limit_ns == 0 or ns <= self.limit_ns:
            return None
        return TimeoutError(
            c_errno.ETIMEDOUT, f"took {ns / 1e6:.3f} ms, the limit is {self.limit_ns / 1e6:.3f} ms")

    def key(self, str subsystem not None, str event not None, str kind not None, str name not None):
        """Return the row number of (subsystem, event, kind, name), made on first use."""
        cdef tuple label = (subsystem, event, kind, name)
        cdef call_stats **grown
        cdef call_stats *row
        key = self.key_of.get(label)
        if key is not None:
            return key
        grown = <call_stats **>realloc(self.stats, (self.nr_stats + 1) * sizeof(call_stats *))
        if grown == NULL:
            raise MemoryError("call recorder")
        self.stats = grown
        row = <call_stats *>calloc(1, sizeof(call_stats))
        if row == NULL:
            raise MemoryError("call recorder")
        row.min_ns = INT64_MAX
        self.stats[self.nr_stats] = row
        self.nr_stats += 1
        self.names.append(label)
        self.key_of[label] = self.nr_stats - 1
        return self.nr_stats - 1

    cdef void record(self, Py_ssize_t key, int64_t ns, int64_t devices) noexcept nogil:
        cdef call_stats *row = self.stats[key]
        row.calls += 1
        row.devices += devices
        row.total_ns += ns
        if ns < row.min_ns:
            row.min_ns = ns
        if ns > row.max_ns:
            row.max_ns = ns
        row.histogram[histogram_bucket(ns)] += 1

    def add(self, Py_ssize_t key, int64_t ns, int64_t devices=1):
        """Record one call of *ns* nanoseconds that served *devices* devices."""
        if not 0 <= key < self.nr_stats:
            raise IndexError(f"recorder row {key}: not in 0..{self.nr_stats - 1}")
        self.record(key, ns, devices)

    cdef int64_t quantile(self, call_stats *row, double q) noexcept nogil:
        cdef uint64_t seen = 0
        cdef uint64_t wanted = <uint64_t>(q * row.calls)
        cdef int bucket
        cdef int64_t ns
        if wanted >= row.calls:
            wanted = row.calls - 1
        for bucket in range(HISTOGRAM_BUCKETS):
            seen += row.histogram[bucket]
            if seen > wanted:
                ns = histogram_value(bucket)
                return row.min_ns if ns < row.min_ns else row.max_ns if ns > row.max_ns else ns
        return row.max_ns

    def rows(self):
        """Return one dictionary per row with calls, as the ``callbacks`` of ``luo run --json``."""
        cdef Py_ssize_t i
        cdef call_stats *row
        result = []
        for i in range(self.nr_stats):
            row = self.stats[i]
            if row.calls == 0:
                continue
            subsystem, event, kind, name = self.names[i]
            result.append({
                "subsystem": subsystem, "event": event, "kind": kind, "name": name,
                "calls": row.calls, "devices": row.devices, "total_ns": row.total_ns,
                "min_ns": row.min_ns, "p50_ns": self.quantile(row, 0.50),
                "p99_ns": self.quantile(row, 0.99), "max_ns": row.max_ns,
            })
        return result

    def dump(self):
        """Return everything recorded, in JSON values, for :meth:`merge` in another process."""
        cdef Py_ssize_t i
        cdef int bucket
        cdef call_stats *row
        result = []
        for i in range(self.nr_stats):
            row = self.stats[i]
            if row.calls:
                result.append([
                    list(self.names[i]), row.calls, row.devices,
                    row.total_ns, row.min_ns, row.max_ns,
                    [[bucket, row.histogram[bucket]] for bucket in range(HISTOGRAM_BUCKETS)
                     if row.histogram[bucket]],
                ])
        return result

    def merge(self, dump, events=None):
        """Add what :meth:`dump` returned; *events* limits it to rows of these events."""
        cdef call_stats *row
        for label, calls, devices, total_ns, min_ns, max_ns, histogram in dump:
            if events is not None and label[1] not in events:
                continue
            row = self.stats[self.key(*label)]
            row.calls += calls
            row.devices += devices
            row.total_ns += total_ns
            row.min_ns = min(row.min_ns, <int64_t>min_ns)
            row.max_ns = max(row.max_ns, <int64_t>max_ns)
            for bucket, count in histogram:
                if not 0 <= bucket < HISTOGRAM_BUCKETS:
                    raise ValueError(
                        f"histogram bucket {bucket}: not in 0..{HISTOGRAM_BUCKETS - 1}")
                row.histogram[<int>bucket] += count

    def fork(self):
        """Return an empty recorder with the same rows, clock and limit, for another thread."""
        cdef CallRecorder other = CallRecorder(self.clock)
        other.limit_ns = self.limit_ns
        for label in self.names:
            other.key(*label)
        return other

    def absorb(self, CallRecorder other not None):
        """Add what a :meth:`fork` recorded since, and clear it."""
        cdef Py_ssize_t i
        cdef int bucket
        cdef call_stats *row
        cdef call_stats *more
        if other.nr_stats > self.nr_stats:
            raise ValueError("absorb: the recorder has rows that this one has not")
        for i in range(other.nr_stats):
            row, more = self.stats[i], other.stats[i]
            if more.calls == 0:
                continue
            row.calls += more.calls
            row.devices += more.devices
            row.total_ns += more.total_ns
            row.min_ns = min(row.min_ns, more.min_ns)
            row.max_ns = max(row.max_ns, more.max_ns)
            for bucket in range(HISTOGRAM_BUCKETS):
                row.histogram[bucket] += more.histogram[bucket]
            memset(more, 0, sizeof(call_stats))
            more.min_ns = INT64_MAX

    def clear(self):
        """Forget all calls; row numbers stay valid."""
        cdef Py_ssize_t i
        for i in range(self.nr_stats):
            memset(self.stats[i], 0, sizeof(call_stats))
            self.stats[i].min_ns = INT64_MAX


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
            now = monotonic_ns()
            elapsed = now - last[0]
            last[0] = now
            recorder.record(side.keys[number], elapsed, 1)
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
    cdef int64_t last = monotonic_ns()
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
    cdef int64_t last, now
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
    if native and scope is not None and recorder.clock is None and nr_devices:
        return call_native(recorder, scope, order, start, stop, backwards, sides, nr_tables, done,
                           failures)

    device.calls = &native_calls
    device.scope = NULL if scope is None else &scope.scope
    last = recorder.now()
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
                now = recorder.now()
                recorder.record(sides[t].keys[number], now - last, 1)
                if outcome is None and recorder.limit_ns:
                    outcome = recorder.overdue(now - last)
                    # It did its work, late: whoever undoes has to undo it too.
                    if outcome is not None and sides[t].mode == CALL_SET:
                        done[device.index] |= sides[t].bit
                last = now
                if outcome is not None:
                    if failures is None:
                        return device.index, t, outcome
                    failures.append((device.index, t, outcome))
                    continue
            if sides[t].mode == CALL_SET:
                done[device.index] |= sides[t].bit
    return None


# ---- slots and records in bulk ----

def pack_slots(const uint64_t[::1] sizes not None, uint64_t slab_bytes):
    """Lay slots out in slabs, in order, none across the end of a slab.

    Args:
        sizes: bytes of each slot, ``uint64``; 0 takes no room.
        slab_bytes: capacity of a slab.

    Returns:
        (slab, offset, used): slab number (``int32``) and byte offset in it (``uint64``) of each
        slot, and the bytes used in each slab (``uint64``).

    Raises:
        ValueError: a slot is larger than a slab; the message has its number.
    """
    cdef Py_ssize_t i, n = sizes.shape[0], too_large = -1
    cdef uint64_t used = 0
    cdef int32_t slab = 0
    slabs = np.empty(n, np.int32)
    offsets = np.empty(n, np.uint64)
    cdef int32_t[::1] slab_view = slabs
    cdef uint64_t[::1] offset_view = offsets
    full = []
    for i in range(n):
        if sizes[i] > slab_bytes:
            too_large = i
            break
        if used + sizes[i] > slab_bytes:
            full.append(used)
            slab += 1
            used = 0
        slab_view[i] = slab
        offset_view[i] = used
        used += sizes[i]
    if too_large >= 0:
        raise ValueError(f"slot {too_large}: {sizes[too_large]} bytes, a slab holds {slab_bytes}")
    if used:
        full.append(used)
    return slabs, offsets, np.array(full, np.uint64)


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


def cut_runs(
    const int8_t[::1] ways not None, const int64_t[::1] places not None,
    const int32_t[::1] order not None, const int32_t[::1] depths not None,
    const int32_t[::1] drivers not None, const int32_t[::1] buses not None,
    const uint64_t[::1] driver_phys not None, const uint64_t[::1] driver_bytes not None,
    const uint64_t[::1] bus_phys not None, const uint64_t[::1] bus_bytes not None,
    int8_t batch, int8_t threads,
):
    """Cut the devices of an event into runs that are called in one way; ``int64``, with both ends.

    A run of batch callbacks has one depth, driver, bus and slot sizes, and its slots lie at equal
    distances, so that they are one array; a run for several threads has one depth.

    Args:
        ways: how each device is called, ``int8 (n,)``.
        places: place of each in *order*, ``int64 (n,)``.
        order, driver_phys, driver_bytes, bus_phys, bus_bytes: of the update: device numbers, and
            where their slots are.
        depths, drivers, buses: by device number.
        batch, threads: the ways that have rules.

    Raises:
        IndexError: a place or a device number is outside.
    """
    cdef Py_ssize_t i, nr = 0, bad = -1, n = ways.shape[0]
    cdef int64_t place, before = 0
    cdef int32_t device, last = 0
    cdef uint64_t stride
    cdef bint new
    if places.shape[0] != n or not (
        order.shape[0] == driver_phys.shape[0] == driver_bytes.shape[0]
        == bus_phys.shape[0] == bus_bytes.shape[0]
    ):
        raise ValueError("cut_runs: arrays differ in length")
    result = np.empty(n + 1, np.int64)
    cdef int64_t[::1] cuts = result
    with nogil:
        for i in range(n):
            place = places[i]
            if not 0 <= place < order.shape[0]:
                bad = i
                break
            device = order[place]
            if not (0 <= device < depths.shape[0] and device < drivers.shape[0]
                    and device < buses.shape[0]):
                bad = i
                break
            new = i == 0 or ways[i] != ways[i - 1]
            if not new and ways[i] == threads:
                new = depths[device] != depths[last]
            elif not new and ways[i] == batch:
                stride = (driver_bytes[before] + 7 & ~<uint64_t>7) + (
                    bus_bytes[before] + 7 & ~<uint64_t>7)
                new = (
                    depths[device] != depths[last]
                    or drivers[device] != drivers[last] or buses[device] != buses[last]
                    or driver_bytes[place] != driver_bytes[before]
                    or bus_bytes[place] != bus_bytes[before]
                    or driver_bytes[place] and driver_phys[place] != driver_phys[before] + stride
                    or bus_bytes[place] and bus_phys[place] != bus_phys[before] + stride
                )
            if new:
                cuts[nr] = i
                nr += 1
            last, before = device, place
        cuts[nr] = n
    if bad >= 0:
        raise IndexError(f"cut_runs: place {places[bad]} is of no device")
    return result[:nr + 1]


cdef struct row_key:
    uint64_t word[3]


def group_rows(
    const int32_t[::1] first not None, const int32_t[::1] second not None,
    const uint64_t[::1] third not None, const uint64_t[::1] fourth not None,
):
    """Return for each row a number that rows with the same four values share; ``int32``.

    Numbers are given in the order of first occurrence.
    """
    cdef Py_ssize_t i, n = first.shape[0]
    cdef uint64_t slots = 64, at, hashed
    cdef int32_t found, nr_groups = 0
    cdef int32_t *table = NULL
    cdef row_key *keys = NULL
    cdef row_key key
    if second.shape[0] != n or third.shape[0] != n or fourth.shape[0] != n:
        raise ValueError("group_rows: arrays differ in length")
    while slots < <uint64_t>n * 2:
        slots *= 2
    result = np.empty(n, np.int32)
    cdef int32_t[::1] out = result
    table = <int32_t *>calloc(slots, sizeof(int32_t))
    keys = <row_key *>malloc((n + 1) * sizeof(row_key))
    if table == NULL or keys == NULL:
        free(table)
        free(keys)
        raise MemoryError("group_rows")
    with nogil:
        for i in range(n):
            key.word[0] = <uint64_t><uint32_t>first[i] << 32 | <uint32_t>second[i]
            key.word[1], key.word[2] = third[i], fourth[i]
            # Neighbours are mostly of one kind.
            if i and memcmp(&key, &keys[out[i - 1]], sizeof(key)) == 0:
                out[i] = out[i - 1]
                continue
            hashed = (key.word[0] * 0x9E3779B97F4A7C15u ^ key.word[1]) * 0xD6E8FEB86659FD93u
            hashed = ((hashed ^ hashed >> 32) + key.word[2]) * 0x9E3779B97F4A7C15u
            at = hashed >> 20 & (slots - 1)
            while True:
                found = table[at]
                if found == 0:
                    keys[nr_groups] = key
                    out[i] = nr_groups
                    nr_groups += 1
                    table[at] = nr_groups
                    break
                if memcmp(&key, &keys[found - 1], sizeof(key)) == 0:
                    out[i] = found - 1
                    break
                at = (at + 1) & (slots - 1)
    free(table)
    free(keys)
    return result


def match_strings(
    const uint8_t[::1] data not None, const uint64_t[::1] offsets not None, list names not None
):
    """Return for each row of a string column (NUL-terminated) its number in *names*.

    Args:
        data, offsets: the rows, as of a ``Column``; an empty row is no string.
        names: list of ``bytes`` without NUL.

    Returns:
        ``int32`` array: the number, -1 for an empty row, -2 for a name that is not in *names*.
    """
    cdef Py_ssize_t i, n = offsets.shape[0] - 1
    cdef uint64_t begin, length, last_begin = 0, last_length = 0
    cdef int32_t last = -1
    cdef dict number_of = {name + b"\0": i for i, name in enumerate(names)}
    if n < 0:
        raise ValueError("match_strings: a column has one offset more than rows")
    result = np.empty(n, np.int32)
    cdef int32_t[::1] out = result
    for i in range(n):
        if offsets[i + 1] < offsets[i] or offsets[i + 1] > <uint64_t>data.shape[0]:
            raise ValueError(f"match_strings: offsets of row {i} leave the data")
        begin, length = offsets[i], offsets[i + 1] - offsets[i]
        if length == 0:
            out[i] = -1
            continue
        # Neighbours mostly share bus and driver: a comparison instead of a look-up.
        if length != last_length or memcmp(&data[begin], &data[last_begin], length) != 0:
            last = number_of.get((<const char *>&data[begin])[:length], -2)
            last_begin, last_length = begin, length
        out[i] = last
    return result


def find_stray_slot(
    const uint64_t[:, ::1] slabs not None, const uint64_t[::1] phys not None,
    const uint64_t[::1] nbytes not None,
):
    """Return the first record whose slot does not lie in the slab that lists it, -1 if none.

    Args:
        slabs: ``uint64 (n, 4)``: phys, bytes, first record, count; each record is in one at most,
            and none names records that there are not.
        phys, nbytes: of each record's slot; one of no bytes is nowhere.
    """
    cdef Py_ssize_t i, s, stop, at, n = phys.shape[0], found = -1
    cdef uint64_t start, end
    if nbytes.shape[0] != n or (slabs.shape[0] and slabs.shape[1] != 4):
        raise ValueError("find_stray_slot: arrays differ in shape")
    listed = np.zeros(n, np.uint8)
    cdef uint8_t[::1] seen = listed
    with nogil:
        for s in range(slabs.shape[0]):
            start, end = slabs[s, 0], slabs[s, 0] + slabs[s, 1]
            if slabs[s, 2] > <uint64_t>n or slabs[s, 3] > <uint64_t>n - slabs[s, 2] or end < start:
                continue
            at, stop = <Py_ssize_t>slabs[s, 2], <Py_ssize_t>(slabs[s, 2] + slabs[s, 3])
            for i in range(at, stop):
                if (nbytes[i] == 0 or phys[i] >= start and phys[i] <= end
                        and nbytes[i] <= end - phys[i]):
                    seen[i] = 1
        for i in range(n):
            if nbytes[i] and not seen[i]:
                found = i
                break
    return found


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
