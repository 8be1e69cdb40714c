# L0: integer conversion, allocation, and the one place that raises for a worker.
#
# Three kinds of function live in this module (see CONTRIBUTING.md): a worker is
# `noexcept nogil` and returns 0 or -errno; check() turns that into an exception;
# an entry point converts, takes the lock, calls a worker, calls check().

# All memory of the host comes through here, so that a checked build (LUO_DEBUG) can count what is
# in use and let the n-th allocation fail, pages of simulated memory included.

cdef extern from * nogil:
    """
    #include <stdlib.h>
    #ifdef LUO_DEBUG
    static long luo_until_failure;  /* allocations, the failing one included; 0: none will fail */
    static long luo_blocks_in_use;

    static int luo_allocation_fails(void) {
        long left = __atomic_load_n(&luo_until_failure, __ATOMIC_RELAXED);
        while (left > 0) {
            if (__atomic_compare_exchange_n(&luo_until_failure, &left, left - 1, 0,
                                            __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
                return left == 1;
            }
        }
        return 0;
    }

    static void *luo_counted(void *block) {
        if (block != NULL) {
            __atomic_fetch_add(&luo_blocks_in_use, 1, __ATOMIC_RELAXED);
        }
        return block;
    }

    static void *luo_malloc(size_t nbytes) {
        return luo_allocation_fails() ? NULL : luo_counted(malloc(nbytes));
    }

    static void *luo_calloc(size_t count, size_t nbytes) {
        return luo_allocation_fails() ? NULL : luo_counted(calloc(count, nbytes));
    }

    static void *luo_realloc(void *block, size_t nbytes) {
        void *grown = luo_allocation_fails() ? NULL : realloc(block, nbytes);
        return block == NULL ? luo_counted(grown) : grown;
    }

    static void luo_free(void *block) {
        if (block != NULL) {
            __atomic_fetch_sub(&luo_blocks_in_use, 1, __ATOMIC_RELAXED);
        }
        free(block);
    }

    static long luo_fail_allocation(long n) {
        return __atomic_exchange_n(&luo_until_failure, n, __ATOMIC_RELAXED);
    }

    static long luo_allocations(void) {
        return __atomic_load_n(&luo_blocks_in_use, __ATOMIC_RELAXED);
    }

    #define LUO_IS_DEBUG 1
    #else
    #define luo_allocation_fails() 0
    #define luo_malloc malloc
    #define luo_calloc calloc
    #define luo_realloc realloc
    #define luo_free free
    #define luo_fail_allocation(n) (n)
    #define luo_allocations() 0L
    #define LUO_IS_DEBUG 0
    #endif
    """
    const bint IS_DEBUG "LUO_IS_DEBUG"
    bint luo_allocation_fails()
    long luo_fail_allocation(long n)
    long luo_allocations()
    void *malloc "luo_malloc"(size_t nbytes)
    void *calloc "luo_calloc"(size_t count, size_t nbytes)
    void *realloc "luo_realloc"(void *block, size_t nbytes)
    void free "luo_free"(void *block)


# Before Python 3.13 cython.pymutex is CPython's PyThread_type_lock, which reads the clock each time
# it is taken, for a timeout that nobody gave: several times the cost of all else that a call on one
# block does. Here the same names stand for a plain mutex.
cdef extern from *:
    """
    #if PY_VERSION_HEX < 0x030d0000
    #include <pthread.h>

    static PyThread_type_lock luo_lock_new(void) {
        pthread_mutex_t *lock = PyMem_RawMalloc(sizeof(*lock));
        if (lock != NULL && pthread_mutex_init(lock, NULL) != 0) {
            PyMem_RawFree(lock);
            lock = NULL;
        }
        return lock;
    }

    static void luo_lock_free(PyThread_type_lock lock) {
        if (lock != NULL) {
            pthread_mutex_destroy(lock);
            PyMem_RawFree(lock);
        }
    }

    static inline int luo_lock_acquire(PyThread_type_lock lock, int wait) {
        return (wait ? pthread_mutex_lock(lock) : pthread_mutex_trylock(lock)) == 0;
    }

    #define PyThread_allocate_lock luo_lock_new
    #define PyThread_free_lock luo_lock_free
    #define PyThread_acquire_lock luo_lock_acquire
    #define PyThread_acquire_lock_timed(lock, us, intr) ((PyLockStatus)luo_lock_acquire(lock, us))
    #define PyThread_release_lock(lock) ((void)pthread_mutex_unlock(lock))
    #endif
    """


def _fail_allocation(n):
    """Let the *n*-th allocation from now on fail, once; 0: none. Only in a checked build.

    Counts blocks of the host's memory and blocks of simulated pages alike.

    Returns:
        int: what is left of the count before; 0 if that allocation has failed, or none was to.
    """
    return luo_fail_allocation(PyNumber_Index(n))


def _allocations():
    """Return how many blocks of the host's memory the core holds. Only in a checked build."""
    return luo_allocations()


if not IS_DEBUG:
    del globals()["_fail_allocation"], globals()["_allocations"]


cdef inline uint64_t as_u64(object value) except? 0xFFFFFFFFFFFFFFFF:
    """The integer *value*, through __index__: floats and strings are refused."""
    if PyLong_CheckExact(value):
        return <uint64_t>value
    return <uint64_t>PyNumber_Index(value)


cdef inline int as_order(object value) except -1:
    cdef int too_large = 0
    cdef object number = value if PyLong_CheckExact(value) else PyNumber_Index(value)
    cdef long order = PyLong_AsLongAndOverflow(number, &too_large)
    if not 0 <= order < 64:
        raise ValueError(f"order {number}: not in 0..63")
    return order


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
