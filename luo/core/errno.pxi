# L0: integer conversion, allocation, and the one place that raises for a worker.
#
# Three kinds of function live in this module (see CONTRIBUTING.md): a worker is
# `noexcept nogil` and returns 0 or -errno; check() turns that into an exception;
# an entry point converts, takes the lock, calls a worker, calls check().

cdef inline uint64_t as_u64(object value) except? 0xFFFFFFFFFFFFFFFF:
    """The integer *value*, through __index__: floats and strings are refused."""
    cdef object number = PyNumber_Index(value)
    return PyLong_AsUnsignedLongLong(number)


cdef inline int as_order(object value) except -1:
    cdef object number = PyNumber_Index(value)
    if not 0 <= number < 64:
        raise ValueError(f"order {number}: not in 0..63")
    return number


cdef int check(int rc, object what) except -1:
    """Raise for the worker's result *rc* (0 or -errno); *what* names operation and object."""
    if rc < 0:
        raise from_errno(-rc, f"{what}: {strerror(-rc).decode()}")
    return rc


cdef void *xmalloc(size_t nbytes) except NULL:
    cdef void *block = malloc(nbytes if nbytes else 1)
    if block == NULL:
        raise MemoryError(f"{nbytes} bytes")
    return block
