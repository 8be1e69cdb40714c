# Header of the compiled core: C types and constants, by fragment, in the order of the includes.

# ---- core/dispatch.pxi ----

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    HISTOGRAM_SUB_BITS = 6
    HISTOGRAM_SUB = 64  # buckets an octave
    HISTOGRAM_OCTAVES = 34  # up to 2^39 ns, nine minutes
    HISTOGRAM_BUCKETS = 2176  # HISTOGRAM_OCTAVES * HISTOGRAM_SUB

cdef enum:
    CALL_PLAIN = 0
    CALL_SET = 1  # set the done bit after success
    CALL_CLEAR = 2  # call only where the bit is set, and clear it
    CALL_NEED = 3  # call only where the bit is set

cdef struct call_stats:
    uint64_t calls
    uint64_t devices
    int64_t total_ns
    int64_t min_ns
    int64_t max_ns
    uint64_t histogram[2176]
