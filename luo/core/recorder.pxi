# L4: what callbacks cost: a row a callback; a sum a device and spans for who asks.
#
# Whatever a call writes here has been laid out before: rows when a callback is first named, the
# columns by device and the buffer of spans when the kernel is built. Nothing allocates in a loop.

cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


# ---- the histogram: log-linear, 64 buckets an octave ----

cdef inline int histogram_bucket(int64_t ns) noexcept nogil:
    # A bucket is at most 1/64 wide, its middle within 0.8 % of the value.
    cdef int shift
    if ns < 2 * HISTOGRAM_SUB:
        return <int>ns if ns > 0 else 0
    shift = 63 - __builtin_clzll(<uint64_t>ns) - HISTOGRAM_SUB_BITS
    if shift > HISTOGRAM_OCTAVES - 2:
        return HISTOGRAM_BUCKETS - 1
    return (shift + 1) * HISTOGRAM_SUB + <int>((ns >> shift) - HISTOGRAM_SUB)


cdef inline int64_t histogram_edge(int bucket) noexcept nogil:
    cdef int shift
    if bucket < 2 * HISTOGRAM_SUB:
        return bucket
    shift = bucket // HISTOGRAM_SUB - 1
    return <int64_t>(HISTOGRAM_SUB + bucket % HISTOGRAM_SUB) << shift


def bucket_edges():
    """Return where the buckets of :meth:`CallRecorder.histogram` begin, and where the last ends.

    Returns:
        ``int64`` (buckets + 1,), nanoseconds, ascending. What is longer than the last edge is
        counted in the last bucket.
    """
    return np.array([histogram_edge(bucket) for bucket in range(HISTOGRAM_BUCKETS + 1)], np.int64)


#: One call: its begin on the recorder's clock and its duration; row of the recorder; number of the
#: device, of the first of several, or -1; how many devices it served; and which worker called it.
SPAN = np.dtype([
    ("begin_ns", np.int64), ("ns", np.int64), ("key", np.int32), ("device", np.int32),
    ("devices", np.int32), ("worker", np.int32),
])

#: Events whose callbacks run in blackout: of devices and subsystems, and of files.
BLACKOUT_EVENTS = ("REBOOT", "RESTORE", "FREEZE", "RETRIEVE")


@cython.final
@cython.auto_pickle(False)
cdef class CallRecorder:
    """What every callback cost: count, total, min, max and a histogram, in constant memory.

    A row belongs to one (subsystem, event, kind, name). The histogram is log-linear with
    64 buckets an octave, so percentiles are good to 1 % between 10 ns and 100 s. On request each
    device has the sum of its callbacks, and each call is a span.

    Args:
        clock: None for ``CLOCK_MONOTONIC``, or a callable that returns nanoseconds.
        devices: how many devices have a sum, 8 bytes each.
        spans: how many calls are kept one by one, 32 bytes each.

    Attributes:
        clock: as given.
        cost: ``cost(label, device, devices)`` returns the nanoseconds that a callback shall have
            taken, in place of a difference of clock readings; None for what it took. The label is
            the row's, the device is the first of several, or -1.
        limit_ns: nanoseconds that a callback may take, 0 for as long as it likes.
        timing: False reads no clock and records nothing.
        dropped: calls that found no room for a span.
    """

    cdef public object clock
    cdef public object cost
    cdef public int64_t limit_ns
    cdef public bint timing
    cdef readonly int64_t dropped
    cdef dict key_of
    cdef list names
    cdef call_stats **stats
    cdef Py_ssize_t nr_stats
    cdef object costs_array
    cdef list pending  # batch calls whose cost is not shared out yet: (row of costs, ns, index)
    cdef float *device_ns
    cdef Py_ssize_t nr_devices
    cdef object spans_array
    cdef call_span *spans_at
    cdef Py_ssize_t spans_room, spans_reserved, nr_spans
    cdef int32_t worker

    def __cinit__(self, clock=None, *, Py_ssize_t devices=0, Py_ssize_t spans=0):
        if devices < 0 or spans < 0:
            raise ValueError(f"call recorder: {devices} devices, {spans} spans")
        self.clock = clock
        self.timing = True
        self.key_of = {}
        self.names = []
        self.pending = []
        self.hold_spans(np.empty(spans, SPAN))
        self.costs_array = np.zeros((2, 0), np.float32)
        self.cover(devices)

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.nr_stats):
            free(self.stats[i])
        free(self.stats)

    cdef hold_spans(self, array):
        cdef uint8_t[::1] raw = array.view(np.uint8)
        raw[:] = 0  # touched now: a span is written between two callbacks
        self.spans_array = array
        self.spans_at = <call_span *>&raw[0] if raw.shape[0] else NULL
        self.spans_room = array.shape[0]
        self.spans_reserved = -1
        self.nr_spans = 0

    # ---- the clock ----

    cdef int64_t now(self) except? -1:
        if self.clock is None:
            return monotonic_ns()
        return PyLong_AsLongLong(PyNumber_Index(self.clock()))

    def read_clock(self):
        """Return the recorder's clock, in nanoseconds."""
        return self.now()

    def begin(self):
        """Return when a callback begins, for :meth:`lap`: the clock, or 0 without timing."""
        return self.now() if self.timing else 0

    def overdue(self, int64_t ns):
        """Return a ``TimeoutError`` if a callback of *ns* nanoseconds took too long, else None."""
        if self.limit_ns == 0 or ns <= self.limit_ns:
            return None
        return TimeoutError(
            c_errno.ETIMEDOUT, f"took {ns / 1e6:.3f} ms, the limit is {self.limit_ns / 1e6:.3f} ms")

    # ---- recording ----

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
        row.max_device = -1
        row.blackout = event in BLACKOUT_EVENTS
        self.stats[self.nr_stats] = row
        self.nr_stats += 1
        self.names.append(label)
        self.key_of[label] = self.nr_stats - 1
        return self.nr_stats - 1

    cdef void record(
        self, Py_ssize_t key, int64_t begin, int64_t ns, int32_t device, int64_t devices
    ) noexcept nogil:
        cdef call_stats *row = self.stats[key]
        row.calls += 1
        row.devices += devices
        row.total_ns += ns
        if ns < row.min_ns:
            row.min_ns = ns
        if ns > row.max_ns:
            row.max_ns = ns
            row.max_device = device if devices == 1 else -1
        row.histogram[histogram_bucket(ns)] += 1
        if self.nr_devices or self.spans_at != NULL:
            self.record_one(key, begin, ns, device, devices)

    cdef void record_one(
        self, Py_ssize_t key, int64_t begin, int64_t ns, int32_t device, int64_t devices
    ) noexcept nogil:
        """Record what is kept of single devices and calls."""
        cdef call_span *span
        if devices == 1 and 0 <= device < self.nr_devices:
            self.device_ns[self.stats[key].blackout * self.nr_devices + device] += <float>ns
        if self.spans_at == NULL:
            return
        if self.nr_spans == self.spans_room:
            self.dropped += 1
            return
        span = &self.spans_at[self.nr_spans]
        span.begin_ns, span.ns = begin, ns
        span.key, span.device = <int32_t>key, device
        span.devices, span.worker = <int32_t>devices, self.worker
        self.nr_spans += 1

    cdef int64_t next_lap(
        self, Py_ssize_t key, int64_t *last, int32_t device, int64_t devices
    ) except -1:
        """Record a call that began at *last* and has just ended, which *last* is set to."""
        cdef int64_t begin = last[0], ns
        if self.cost is None:
            last[0] = self.now()
            ns = last[0] - begin
        else:
            ns = PyLong_AsLongLong(PyNumber_Index(self.cost(self.names[key], device, devices)))
            last[0] = self.now()
        if ns < 0:
            raise ValueError(f"{self.names[key]}: a callback of {ns} ns")
        self.record(key, begin, ns, device, devices)
        return ns

    def lap(self, Py_ssize_t key, int64_t begin, int64_t devices=0, index=None):
        """Record one call that began at *begin* and has just ended.

        Args:
            key: row number.
            begin: as :meth:`begin` returned it.
            devices: how many devices it served.
            index: their numbers, ``int32``, which the recorder keeps; their sums get equal shares.

        Returns:
            the nanoseconds that it took, 0 without timing.
        """
        cdef int64_t ns
        if not 0 <= key < self.nr_stats:
            raise IndexError(f"recorder row {key}: not in 0..{self.nr_stats - 1}")
        if not self.timing:
            return 0
        if index is None:
            return self.next_lap(key, &begin, -1, devices)
        ns = self.next_lap(key, &begin, index[0], devices)
        if devices != 1 and self.nr_devices:
            self.pending.append((self.stats[key].blackout, ns, index))
            if len(self.pending) > 256:
                self.share_out()
        return ns

    def add(self, Py_ssize_t key, int64_t ns, int64_t devices=1, int32_t device=-1, *,
            int64_t begin=0):
        """Record one call of *ns* nanoseconds that served *devices* devices, or just *device*."""
        if not 0 <= key < self.nr_stats:
            raise IndexError(f"recorder row {key}: not in 0..{self.nr_stats - 1}")
        self.record(key, begin, ns, device, devices)

    # ---- the sums by device ----

    def cover(self, Py_ssize_t devices):
        """Have sums for so many devices; those that are there stay."""
        cdef float[:, ::1] costs
        if devices <= self.nr_devices:
            return
        longer = np.zeros((2, devices), np.float32)
        longer[:, :self.nr_devices] = self.costs_array
        costs = longer
        self.costs_array = longer
        self.nr_devices = devices
        self.device_ns = &costs[0, 0]

    def touch(self):
        """Write the sums as they are: no callback shall be the first to touch their memory."""
        if self.timing:
            self.costs_array += np.float32(0)

    cdef share_out(self):
        pending, self.pending = self.pending, []
        for row, ns, index in pending:
            known = index[index < self.nr_devices]
            np.add.at(self.costs_array[row], known, np.float32(ns / max(len(index), 1)))

    @property
    def costs(self):
        """Nanoseconds by device, ``float32 (2, devices)``: out of blackout, and in it.

        In blackout are REBOOT and RESTORE. The recorder's own memory, no copy.
        """
        self.share_out()
        return self.costs_array

    # ---- spans ----

    @property
    def spans(self):
        """Every call that found room, in the order of its end for each worker; no copy.

        Returns:
            an array of :data:`SPAN`.
        """
        return self.spans_array[:self.nr_spans]

    def clear_spans(self):
        """Forget the spans, and how many were dropped."""
        self.nr_spans = self.dropped = 0

    def load(self, labels, spans, costs, int64_t dropped):
        """Take over what another recorder has besides its rows; call it before :meth:`merge`.

        Args:
            labels: its labels, in order: what the spans' ``key`` means.
            spans, costs, dropped: its attributes; the arrays become this one's.
        """
        for label in labels:
            self.key(*label)
        spans = np.require(spans, SPAN, "CW")
        costs = np.require(costs, np.float32, "CW")
        if spans.ndim != 1 or costs.ndim != 2 or costs.shape[0] != 2:
            raise ValueError(f"load: spans {spans.shape}, costs {costs.shape}")
        cdef uint8_t[::1] raw = spans.view(np.uint8)
        cdef float[:, ::1] sums = costs
        self.spans_array, self.costs_array = spans, costs
        self.spans_at = <call_span *>&raw[0] if raw.shape[0] else NULL
        self.nr_spans = self.spans_room = spans.shape[0]
        self.nr_devices = costs.shape[1]
        self.device_ns = &sums[0, 0] if costs.shape[1] else NULL
        self.dropped = dropped

    # ---- several recorders ----

    def fork(self, Py_ssize_t calls, int32_t worker):
        """Return an empty recorder with the same rows, clock and limit, for another thread.

        It writes into this one's sums, and its spans into a part of this one's buffer, so all
        forks must be made before one is used, and :meth:`absorb`-ed in the same order; meanwhile
        this one records nothing.

        Args:
            calls: how many it will record at most.
            worker: its number, for spans.
        """
        cdef CallRecorder other = CallRecorder(self.clock)
        cdef Py_ssize_t at
        other.limit_ns, other.timing, other.cost = self.limit_ns, self.timing, self.cost
        for label in self.names:
            other.key(*label)
        other.worker = worker
        other.costs_array = self.costs_array
        other.device_ns, other.nr_devices = self.device_ns, self.nr_devices
        if self.spans_at != NULL:
            at = max(self.spans_reserved, self.nr_spans)
            other.spans_array = self.spans_array
            other.spans_at = self.spans_at + at
            other.spans_room = min(calls, self.spans_room - at)
            self.spans_reserved = at + other.spans_room
        return other

    def absorb(self, CallRecorder other not None):
        """Add what a :meth:`fork` recorded; it is of no more use."""
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
            if more.max_ns > row.max_ns:
                row.max_ns, row.max_device = more.max_ns, more.max_device
            for bucket in range(HISTOGRAM_BUCKETS):
                row.histogram[bucket] += more.histogram[bucket]
        if other.nr_spans:
            memmove(self.spans_at + self.nr_spans, other.spans_at,
                    other.nr_spans * sizeof(call_span))
            self.nr_spans += other.nr_spans
        self.dropped += other.dropped
        self.spans_reserved = -1

    # ---- reading ----

    @property
    def labels(self):
        """(subsystem, event, kind, name) of each row."""
        return list(self.names)

    def histogram(self, Py_ssize_t key):
        """Return the counts of row *key*, ``uint64``, by :func:`bucket_edges`; a copy."""
        if not 0 <= key < self.nr_stats:
            raise IndexError(f"recorder row {key}: not in 0..{self.nr_stats - 1}")
        counts = np.empty(HISTOGRAM_BUCKETS, np.uint64)
        cdef uint64_t[::1] out = counts
        memcpy(&out[0], self.stats[key].histogram, HISTOGRAM_BUCKETS * sizeof(uint64_t))
        return counts

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
                ns = (histogram_edge(bucket) + histogram_edge(bucket + 1) - 1) >> 1
                return row.min_ns if ns < row.min_ns else row.max_ns if ns > row.max_ns else ns
        return row.max_ns

    def quantiles(self, Py_ssize_t key, wanted):
        """Return quantiles of row *key*, good to 1 %.

        Args:
            key: row number.
            wanted: each 0 to 1.

        Returns:
            ``int64``, nanoseconds; zeros if it has no calls.
        """
        if not 0 <= key < self.nr_stats:
            raise IndexError(f"recorder row {key}: not in 0..{self.nr_stats - 1}")
        quantiles = [float(q) for q in wanted]
        if not all(0 <= q <= 1 for q in quantiles):
            raise ValueError(f"quantiles {quantiles}: each is 0 to 1")
        if self.stats[key].calls == 0:
            return np.zeros(len(quantiles), np.int64)
        return np.array([self.quantile(self.stats[key], q) for q in quantiles], np.int64)

    def rows(self):
        """Return one dictionary per row with calls: figures by :data:`luo-run/1` names.

        ``max_device`` is the number of the device that took longest, -1 if it was no one device.
        """
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
                "p95_ns": self.quantile(row, 0.95), "p99_ns": self.quantile(row, 0.99),
                "max_ns": row.max_ns, "max_device": row.max_device,
            })
        return result

    def dump(self):
        """Return all rows, in JSON values, for :meth:`merge` in another process."""
        cdef Py_ssize_t i
        cdef int bucket
        cdef call_stats *row
        result = []
        for i in range(self.nr_stats):
            row = self.stats[i]
            if row.calls:
                result.append([
                    list(self.names[i]), row.calls, row.devices,
                    row.total_ns, row.min_ns, row.max_ns, row.max_device,
                    [[bucket, row.histogram[bucket]] for bucket in range(HISTOGRAM_BUCKETS)
                     if row.histogram[bucket]],
                ])
        return result

    def merge(self, dump, events=None):
        """Add what :meth:`dump` returned; *events* limits it to rows of these events."""
        cdef call_stats *row
        for label, calls, devices, total_ns, min_ns, max_ns, max_device, histogram in dump:
            if events is not None and label[1] not in events:
                continue
            row = self.stats[self.key(*label)]
            row.calls += calls
            row.devices += devices
            row.total_ns += total_ns
            row.min_ns = min(row.min_ns, <int64_t>min_ns)
            if max_ns > row.max_ns or row.calls == calls:
                row.max_ns, row.max_device = max_ns, max_device
            for bucket, count in histogram:
                if not 0 <= bucket < HISTOGRAM_BUCKETS:
                    raise ValueError(
                        f"histogram bucket {bucket}: not in 0..{HISTOGRAM_BUCKETS - 1}")
                row.histogram[<int>bucket] += count

    def clear(self):
        """Forget all calls; row numbers stay valid."""
        cdef Py_ssize_t i
        for i in range(self.nr_stats):
            blackout = self.stats[i].blackout
            memset(self.stats[i], 0, sizeof(call_stats))
            self.stats[i].min_ns, self.stats[i].max_device = INT64_MAX, -1
            self.stats[i].blackout = blackout
        self.pending.clear()
        self.costs_array[:] = 0
        self.clear_spans()
