# cython: language_level=3, boundscheck=False, wraparound=False
"""An extension of somebody else's: the engine's memory, devices and callbacks at C level."""

from cpython.pycapsule cimport PyCapsule_New, PyCapsule_SetContext
from libc.errno cimport EIO
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memcmp, memcpy

from luo._kho cimport DeviceTable, PhysicalMemory
from luo.callbacks cimport (
    LUO_PREPARE,
    LUO_RESTORE,
    luo_device,
    luo_device_column,
    luo_device_event,
    luo_device_reclaim,
    luo_device_slot,
)


def sum_u64(PhysicalMemory memory not None, const uint64_t[::1] phys not None):
    """Return the sum of the u64 at each of *phys*, read where they lie, without the GIL."""
    cdef uint64_t total = 0, at
    cdef Py_ssize_t i, outside = -1
    with nogil:
        for i in range(phys.shape[0]):
            at = phys[i]
            if at & 7 or not memory.has(at, 8):
                outside = i
                break
            total += (<const uint64_t *>(memory.zero + at))[0]
    if outside >= 0:
        raise IndexError(f"{phys[outside]:#x}: no u64 in RAM")
    return total


def children_of(DeviceTable table not None, int32_t parent):
    """Return how many devices have *parent*, from the table's own column."""
    cdef const int32_t *parents = <const int32_t *>table.t.parents.data
    cdef uint64_t i, found = 0
    with nogil:
        for i in range(table.t.nr):
            found += parents[i] == parent
    return found


cdef struct counts:
    int64_t calls[5]


cdef counts seen


cdef int carry(luo_device *dev, void *ctx) noexcept nogil:
    """Save the column ``state`` in PREPARE; compare with it in RESTORE."""
    cdef size_t nbytes = 0, room = 0
    cdef int event = luo_device_event(dev)
    cdef const void *state = luo_device_column(dev, "state", &nbytes)
    cdef void *slot = luo_device_slot(dev, &room)
    (<counts *>ctx).calls[event] += 1
    nbytes = min(nbytes, room)
    if event == LUO_PREPARE:
        memcpy(slot, state, nbytes)
    elif event == LUO_RESTORE:
        if memcmp(slot, state, nbytes):
            return -EIO
        return luo_device_reclaim(dev)
    return 0


def callback():
    """Return the callback as a capsule for ``luo.native()``."""
    capsule = PyCapsule_New(<void *>carry, "int (struct luo_device *, void *)", NULL)
    PyCapsule_SetContext(capsule, &seen)
    return capsule


def calls():
    """Return how often it was called for each event."""
    return [n for n in seen.calls]
