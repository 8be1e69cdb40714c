# L4: what a native callback sees: one device of an event, as `luo.h` shows it.
#
# A scope holds everything that the accessors reach, for one event: addresses of slots, columns,
# flags. It keeps the arrays alive, so that no accessor needs Python. The device itself is a few
# words on the stack of the loop.

cdef int32_t native_index(const luo_device *opaque) noexcept nogil:
    return (<const native_device *>opaque).index


cdef int native_event(const luo_device *opaque) noexcept nogil:
    return (<const native_device *>opaque).scope.event


cdef void *native_slot(const luo_device *opaque, int bus, size_t *nbytes) noexcept nogil:
    cdef const native_device *device = <const native_device *>opaque
    cdef const native_slots *slots = &device.scope.slots[1 if bus else 0]
    cdef uint64_t size = 0
    if <uint64_t>device.index < slots.nr:
        size = slots.nbytes[device.index]
    if nbytes != NULL:
        nbytes[0] = size
    return <void *>(device.scope.zero + slots.phys[device.index]) if size else NULL


cdef const void *native_column_of(
    const luo_device *opaque, const char *name, size_t *nbytes
) noexcept nogil:
    cdef const native_device *device = <const native_device *>opaque
    cdef const native_column *column
    cdef uint64_t start, size = 0
    cdef const void *data = NULL
    cdef int i
    for i in range(device.scope.nr_columns):
        column = &device.scope.columns[i]
        if strcmp(column.name, name) == 0:
            if <uint64_t>device.index < column.nr:
                start = column.offsets[device.index]
                size = column.offsets[device.index + 1] - start
                data = <const void *>(column.data + start) if size else NULL
            break
    if nbytes != NULL:
        nbytes[0] = size
    return data


cdef int native_reclaim(const luo_device *opaque) noexcept nogil:
    cdef const native_device *device = <const native_device *>opaque
    cdef const native_scope *scope = device.scope
    if (scope.reclaimed == NULL or <uint64_t>device.index >= scope.nr_flags
            or not scope.preserved[device.index]):
        return -c_errno.EINVAL
    scope.reclaimed[device.index] = 1
    return 0


cdef luo_device_calls native_calls
native_calls.nbytes = sizeof(luo_device_calls)
native_calls.index = native_index
native_calls.event = native_event
native_calls.slot = native_slot
native_calls.column = native_column_of
native_calls.reclaim = native_reclaim

cdef tuple NATIVE_EVENTS = ("PREPARE", "REBOOT", "FINISH", "CANCEL", "RESTORE")


@cython.final
@cython.auto_pickle(False)
cdef class NativeScope:
    """What native callbacks of one event reach.

    Args:
        memory: the machine's memory.
        table: its devices.
        event: name of the event.
        slot_phys, slot_bytes: of each device's slots, ``uint64 (2, devices)``: drivers', buses';
            None where there are none.
        preserved, reclaimed: flag columns, ``bool``; None where nothing can be reclaimed.
    """

    cdef native_scope scope
    cdef PhysicalMemory memory
    cdef list held
    cdef object view

    def __cinit__(self, PhysicalMemory memory not None, DeviceTable table not None,
                  str event not None, const uint64_t[:, ::1] slot_phys,
                  const uint64_t[:, ::1] slot_bytes, preserved, reclaimed):
        cdef const uint64_t[::1] offsets
        cdef const uint8_t[::1] data, kept
        cdef uint8_t[::1] flags
        cdef native_column *column
        cdef int side
        self.memory = memory
        self.held = []
        # A view keeps the mapping, whatever becomes of the kernel.
        self.view = memory.view(memory.ranges[0][0], memory.page_size)
        self.scope.zero = memory.zero
        self.scope.event = NATIVE_EVENTS.index(event)
        if slot_phys is not None and slot_bytes is not None and slot_phys.shape[1]:
            if not (
                slot_phys.shape[0] == slot_bytes.shape[0] == 2
                and slot_phys.shape[1] == slot_bytes.shape[1]
            ):
                raise ValueError("native scope: slots differ in shape")
            self.held.append((slot_phys, slot_bytes))
            for side in range(2):
                self.scope.slots[side].phys = &slot_phys[side, 0]
                self.scope.slots[side].nbytes = &slot_bytes[side, 0]
                self.scope.slots[side].nr = slot_phys.shape[1]
        names = table.column_names
        self.scope.columns = <native_column *>calloc(len(names) + 1, sizeof(native_column))
        if self.scope.columns == NULL:
            raise MemoryError("native scope")
        for name in names:
            data, offsets = table.column(name)
            encoded = name.encode("utf-8", "surrogateescape")
            self.held.append((encoded, data, offsets))
            column = &self.scope.columns[self.scope.nr_columns]
            column.name = encoded
            column.data = &data[0] if data.shape[0] else NULL
            column.nr = max(offsets.shape[0] - 1, 0)
            column.offsets = &offsets[0] if offsets.shape[0] else NULL
            self.scope.nr_columns += 1
        if reclaimed is not None:
            kept, flags = preserved.view(np.uint8), reclaimed.view(np.uint8)
            if kept.shape[0] != flags.shape[0]:
                raise ValueError("native scope: flag columns differ in length")
            self.held.append((kept, flags))
            if flags.shape[0]:
                self.scope.preserved, self.scope.reclaimed = &kept[0], &flags[0]
                self.scope.nr_flags = flags.shape[0]

    def __dealloc__(self):
        free(self.scope.columns)


@cython.final
@cython.auto_pickle(False)
cdef class NativeCallback:
    """A C function ``int (*)(struct luo_device *, void *)`` as a callback.

    Args:
        address: of the function.
        ctx: its second argument, an address.
        keepalive: kept as long as this is.

    Attributes:
        address, ctx, keepalive: as given.
    """

    cdef readonly uint64_t address, ctx
    cdef readonly object keepalive

    def __cinit__(self, address, ctx=0, keepalive=None):
        self.address, self.ctx = as_u64(address), as_u64(ctx)
        if self.address == 0:
            raise ValueError("native: the function pointer is NULL")
        self.keepalive = keepalive

    def __repr__(self):
        return f"<native callback at {self.address:#x}>"


def capsule_address(capsule, str name):
    """Return the pointer and the context of a ``PyCapsule`` called *name*, as numbers.

    Raises:
        ValueError: it is no capsule of that name.
    """
    encoded = name.encode()
    cdef const char *wanted = encoded
    if not PyCapsule_IsValid(capsule, wanted):
        raise ValueError(f"native: {capsule!r} is no capsule called {name!r}")
    return (<uint64_t>PyCapsule_GetPointer(capsule, wanted),
            <uint64_t>PyCapsule_GetContext(capsule))
