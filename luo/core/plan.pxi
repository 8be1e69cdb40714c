# L4 what a live update works out about its devices: sizes and places of slots, groups, runs.
#
# Everything is a pass over device numbers and columns by device number, without the GIL and without
# an array that nobody keeps: at a million devices a temporary costs more than the arithmetic.

cdef inline uint64_t slot_room(uint64_t nbytes) noexcept nogil:
    """The room that a slot of *nbytes* takes."""
    return (nbytes + 7) & ~<uint64_t>7


cdef struct kind_of_device:
    uint64_t owners
    uint64_t driver_bytes
    uint64_t bus_bytes


def set_flags(uint8_t[::1] flags not None, const int32_t[::1] which not None, bint value):
    """Set a flag column (``bool``, seen as ``uint8``) to *value* for the devices *which*.

    Raises:
        IndexError: the column is too short for one of them; those before it are set.
    """
    cdef Py_ssize_t i, bad = -1
    with nogil:
        for i in range(which.shape[0]):
            if not 0 <= which[i] < flags.shape[0]:
                bad = i
                break
            flags[which[i]] = value
    if bad >= 0:
        raise IndexError(f"set_flags: device {which[bad]} of {flags.shape[0]}")


def first_unset(const uint8_t[::1] flags not None, const int32_t[::1] which not None):
    """Return the place in *which* of the first device whose flag is not set, -1 if all are.

    Raises:
        IndexError: the column is too short for one of them.
    """
    cdef Py_ssize_t i, bad = -1, found = -1
    with nogil:
        for i in range(which.shape[0]):
            if not 0 <= which[i] < flags.shape[0]:
                bad = i
                break
            if not flags[which[i]]:
                found = i
                break
    if bad >= 0:
        raise IndexError(f"first_unset: device {which[bad]} of {flags.shape[0]}")
    return found


def both_pass(const int32_t[::1] driver_ids not None, const int32_t[::1] bus_ids not None,
              const uint8_t[::1] drivers not None, const uint8_t[::1] buses not None):
    """Return which devices have a driver and a bus that pass, or none; ``bool``.

    Args:
        driver_ids, bus_ids: columns, -1 for none.
        drivers, buses: not 0 for each owner that passes.

    Raises:
        IndexError: a number names no owner.
        ValueError: the columns differ in length.
    """
    cdef Py_ssize_t i, n = driver_ids.shape[0], bad = -1
    cdef int32_t driver, bus
    if bus_ids.shape[0] != n:
        raise ValueError(f"both_pass: {n} drivers of devices, {bus_ids.shape[0]} buses")
    result = np.empty(n, np.bool_)
    cdef uint8_t[::1] passes = result.view(np.uint8)
    with nogil:
        for i in range(n):
            driver, bus = driver_ids[i], bus_ids[i]
            if driver >= drivers.shape[0] or bus >= buses.shape[0]:
                bad = i
                break
            passes[i] = (driver < 0 or drivers[driver]) and (bus < 0 or buses[bus])
    if bad >= 0:
        raise IndexError(f"both_pass: device {bad} has no such driver or bus")
    return result


def add_counts(int32_t[::1] counts not None, const int32_t[::1] which not None, int32_t change):
    """Add *change* to a column of counts for the devices *which*.

    Raises:
        IndexError: the column is too short for one of them; those before it are changed.
    """
    cdef Py_ssize_t i, bad = -1
    with nogil:
        for i in range(which.shape[0]):
            if not 0 <= which[i] < counts.shape[0]:
                bad = i
                break
            counts[which[i]] += change
    if bad >= 0:
        raise IndexError(f"add_counts: device {which[bad]} of {counts.shape[0]}")


@cython.final
@cython.auto_pickle(False)
cdef class DeviceList:
    """Devices in the order in which an event meets them (RFC v1 1.10).

    Args:
        numbers: of the devices, ``int32 (n,)``; not to be changed from here on.

    Attributes:
        numbers: as given.

    Columns are given by device number. "Owners" are drivers or buses; ``ids`` is an ``int32``
    column of their numbers, -1 for none. Slots are ``uint64 (2, devices)``, drivers' before buses'.

    Raises:
        IndexError: of each method: a column is too short for a device, or a number names no owner.
    """

    cdef readonly object numbers
    cdef const int32_t[::1] order
    cdef Py_ssize_t n
    cdef int32_t highest

    def __cinit__(self, numbers):
        cdef Py_ssize_t i
        cdef int32_t low = 0, high = -1
        self.numbers = numbers
        self.order = numbers
        self.n = self.order.shape[0]
        with nogil:
            for i in range(self.n):
                low, high = min(low, self.order[i]), max(high, self.order[i])
        if low < 0:
            raise IndexError(f"device list: device {low}")
        self.highest = high

    def __len__(self):
        return self.n

    cdef int covered(self, Py_ssize_t length, str what) except -1:
        if self.highest >= length:
            raise IndexError(f"{what}: device {self.highest} of {length}")
        return 0

    # ---- slots ----

    def size_slots(self, const int32_t[::1] ids not None, const uint64_t[::1] sizes not None,
                   uint64_t[::1] nbytes not None):
        """Write the size of each device's slot to *nbytes*: that of its owner in *sizes*, or 0."""
        cdef Py_ssize_t i, nr_owners = sizes.shape[0]
        cdef int32_t device, owner, bad = -1
        self.covered(min(ids.shape[0], nbytes.shape[0]), "size_slots")
        with nogil:
            for i in range(self.n):
                device = self.order[i]
                owner = ids[device]
                if owner >= nr_owners:
                    bad = device
                    break
                nbytes[device] = sizes[owner] if owner >= 0 else 0
        if bad >= 0:
            raise IndexError(f"size_slots: device {bad} has owner {ids[bad]} of {nr_owners}")

    def cut_slabs(self, const uint64_t[:, ::1] slot_bytes not None, uint64_t limit):
        """Lay the slots out in slabs of at most *limit* bytes, in order, none across an end.

        Returns:
            (slabs, place): ``uint64 (n, 4)`` with 0, bytes, first place in the list, count; and
            the first place whose two slots are larger than a slab, -1 if there is none.
        """
        cdef Py_ssize_t i, first = 0, too_large = -1
        cdef uint64_t used = 0, driver, bus, room
        cdef int32_t device
        slabs = []
        self.covered(slot_bytes.shape[1], "cut_slabs")
        for i in range(self.n):
            device = self.order[i]
            driver, bus = slot_bytes[0, device], slot_bytes[1, device]
            # Each is compared before they are added: a callback may say anything.
            if driver > limit or bus > limit or slot_room(driver) + slot_room(bus) > limit:
                too_large = i
                break
            room = slot_room(driver) + slot_room(bus)
            if used + room > limit:
                slabs.append((0, used, first, i - first))
                first, used = i, 0
            used += room
        if used:
            slabs.append((0, used, first, self.n - first))
        return np.array(slabs, np.uint64).reshape(-1, 4), too_large

    def place_slots(self, const uint64_t[:, ::1] slabs not None,
                    const uint64_t[:, ::1] slot_bytes not None,
                    uint64_t[:, ::1] slot_phys not None):
        """Write the address of each slot to *slot_phys*, 0 for one of no bytes.

        Args:
            slabs: as :meth:`cut_slabs` returned them, with their addresses.
            slot_bytes, slot_phys: the slots.
        """
        cdef Py_ssize_t i = 0, s, stop
        cdef uint64_t at, driver, bus
        cdef int32_t device
        self.covered(min(slot_bytes.shape[1], slot_phys.shape[1]), "place_slots")
        with nogil:
            for s in range(slabs.shape[0] + 1):
                at, stop = 0, self.n  # behind the last slab are slots of no bytes
                if s < slabs.shape[0]:
                    at, stop = slabs[s, 0], min(stop, <Py_ssize_t>(slabs[s, 2] + slabs[s, 3]))
                while i < stop:
                    device = self.order[i]
                    driver, bus = slot_bytes[0, device], slot_bytes[1, device]
                    slot_phys[0, device] = at if driver else 0
                    at += slot_room(driver)
                    slot_phys[1, device] = at if bus else 0
                    at += slot_room(bus)
                    i += 1

    # ---- groups and runs ----

    def groups(self, const int32_t[::1] driver_ids not None, const int32_t[::1] bus_ids not None,
               const uint8_t[::1] drivers not None, const uint8_t[::1] buses not None,
               const uint64_t[:, ::1] slot_bytes not None):
        """Return a column of groups for who is called in batches, None if nobody is.

        Devices of a group have the same driver, bus and slot sizes. ``int32``, -1 for none.

        Args:
            driver_ids, bus_ids: columns.
            drivers, buses: not 0 for an owner that is called in batches.
            slot_bytes: the slots.
        """
        cdef Py_ssize_t i, nr = driver_ids.shape[0], nr_drivers = drivers.shape[0]
        cdef uint64_t slots = 64, at, hashed
        cdef int32_t device, driver, bus, last = -1, found, nr_groups = 0, bad = -1
        cdef int32_t *table = NULL
        cdef int32_t *grown
        cdef kind_of_device *kinds = NULL
        cdef kind_of_device key
        self.covered(min(nr, bus_ids.shape[0], slot_bytes.shape[1]), "groups")
        if not (np.any(drivers) or np.any(buses)):
            return None
        # Twice as many slots as there can be groups.
        while slots < <uint64_t>self.n * 2:
            slots *= 2
        result = np.full(nr, -1, np.int32)
        cdef int32_t[::1] out = result
        table = <int32_t *>calloc(slots, sizeof(int32_t))
        kinds = <kind_of_device *>malloc((self.n + 1) * sizeof(kind_of_device))
        if table == NULL or kinds == NULL:
            free(table)
            free(kinds)
            raise MemoryError("groups")
        with nogil:
            for i in range(self.n):
                device = self.order[i]
                driver, bus = driver_ids[device], bus_ids[device]
                if driver >= nr_drivers or bus >= buses.shape[0]:
                    bad = device
                    break
                if not (driver >= 0 and drivers[driver] or bus >= 0 and buses[bus]):
                    continue
                key.owners = <uint64_t><uint32_t>driver << 32 | <uint32_t>bus
                key.driver_bytes, key.bus_bytes = slot_bytes[0, device], slot_bytes[1, device]
                # Neighbours are mostly of one kind.
                if last >= 0 and memcmp(&key, &kinds[last], sizeof(key)) == 0:
                    out[device] = last
                    continue
                hashed = (key.owners * 0x9E3779B97F4A7C15u ^ key.driver_bytes) * 0xD6E8FEB86659FD93u
                hashed = ((hashed ^ hashed >> 32) + key.bus_bytes) * 0x9E3779B97F4A7C15u
                at = hashed >> 20 & (slots - 1)
                while True:
                    found = table[at] - 1
                    if found < 0:
                        kinds[nr_groups] = key
                        found = nr_groups
                        nr_groups += 1
                        table[at] = nr_groups
                        break
                    if memcmp(&key, &kinds[found], sizeof(key)) == 0:
                        break
                    at = (at + 1) & (slots - 1)
                out[device] = last = found
        free(table)
        free(kinds)
        if bad >= 0:
            raise IndexError(f"groups: device {bad} has no such driver or bus")
        return result if nr_groups else None

    def choose(self, const int32_t[::1] driver_ids not None, const int32_t[::1] bus_ids not None,
               const int8_t[::1] drivers not None, const int8_t[::1] buses not None):
        """Return the list of those devices that have a callback, this one if all have.

        Args:
            driver_ids, bus_ids: columns.
            drivers, buses: for each owner how its callback is called, 0 if it has none.
        """
        cdef Py_ssize_t i, nr = 0
        cdef int32_t device, driver, bus, bad = -1
        chosen = np.empty(self.n, np.int32)
        cdef int32_t[::1] out = chosen
        self.covered(min(driver_ids.shape[0], bus_ids.shape[0]), "choose")
        with nogil:
            for i in range(self.n):
                device = self.order[i]
                driver, bus = driver_ids[device], bus_ids[device]
                if driver >= drivers.shape[0] or bus >= buses.shape[0]:
                    bad = device
                    break
                if driver >= 0 and drivers[driver] or bus >= 0 and buses[bus]:
                    out[nr] = device
                    nr += 1
        if bad >= 0:
            raise IndexError(f"choose: device {bad} has no such driver or bus")
        return self if nr == self.n else DeviceList(chosen[:nr])

    def places_without(self, const int32_t[::1] driver_ids not None,
                       const int32_t[::1] bus_ids not None, const int8_t[::1] drivers not None,
                       const int8_t[::1] buses not None):
        """Return the places in the list of those whom :meth:`choose` leaves out; ``int32``."""
        cdef Py_ssize_t i, nr = 0
        cdef int32_t device, driver, bus, bad = -1
        places = np.empty(self.n, np.int32)
        cdef int32_t[::1] out = places
        self.covered(min(driver_ids.shape[0], bus_ids.shape[0]), "places_without")
        with nogil:
            for i in range(self.n):
                device = self.order[i]
                driver, bus = driver_ids[device], bus_ids[device]
                if driver >= drivers.shape[0] or bus >= buses.shape[0]:
                    bad = device
                    break
                if not (driver >= 0 and drivers[driver] or bus >= 0 and buses[bus]):
                    out[nr] = <int32_t>i
                    nr += 1
        if bad >= 0:
            raise IndexError(f"places_without: device {bad} has no such driver or bus")
        return places[:nr].copy()

    def cut_runs(self, const int32_t[::1] depths not None, const int32_t[::1] driver_ids not None,
                 const int32_t[::1] bus_ids not None, const int8_t[::1] drivers not None,
                 const int8_t[::1] buses not None, const uint64_t[:, ::1] slot_phys not None,
                 const uint64_t[:, ::1] slot_bytes not None, int8_t python, int8_t batch,
                 int8_t threads):
        """Cut the list into runs that are called in one way.

        Where driver and bus are called in two ways, the lower number is the device's. Who has no
        callback goes with its neighbour before it. A run of batch callbacks has one depth, driver,
        bus and slot sizes, and its slots lie at equal distances, so that they are one array; a run
        for several threads has one depth.

        Args:
            depths, driver_ids, bus_ids: columns.
            drivers, buses: for each owner how its callback is called, 0 if it has none.
            slot_phys, slot_bytes: the slots.
            python, batch, threads: the ways that have rules.

        Returns:
            (cuts, ways): ``int64 (n + 1,)``, the places where runs begin, and the end; and how
            each is called, ``int8 (n,)``.
        """
        cdef Py_ssize_t i, nr = 0
        cdef int32_t device, driver, bus, last = -1, bad = -1
        cdef int8_t one, two, way, before = 0, of_run = 0
        cdef uint64_t stride
        cdef bint new
        self.covered(min(depths.shape[0], driver_ids.shape[0], bus_ids.shape[0],
                         slot_phys.shape[1], slot_bytes.shape[1]), "cut_runs")
        cuts = np.empty(self.n + 1, np.int64)
        ways = np.empty(self.n, np.int8)
        cdef int64_t[::1] cut = cuts
        cdef int8_t[::1] kept = ways
        with nogil:
            for i in range(self.n):
                device = self.order[i]
                driver, bus = driver_ids[device], bus_ids[device]
                if driver >= drivers.shape[0] or bus >= buses.shape[0]:
                    bad = device
                    break
                one = drivers[driver] if driver >= 0 else 0
                two = buses[bus] if bus >= 0 else 0
                way = min(one, two) if one and two else one | two
                if way == 0:
                    way = python if before == 0 or before == batch else before
                else:
                    before = way
                new = i == 0 or way != of_run
                if not new and way == threads:
                    new = depths[device] != depths[last]
                elif not new and way == batch:
                    stride = slot_room(slot_bytes[0, last]) + slot_room(slot_bytes[1, last])
                    new = (
                        depths[device] != depths[last]
                        or driver != driver_ids[last] or bus != bus_ids[last]
                        or slot_bytes[0, device] != slot_bytes[0, last]
                        or slot_bytes[1, device] != slot_bytes[1, last]
                        or slot_bytes[0, device]
                        and slot_phys[0, device] != slot_phys[0, last] + stride
                        or slot_bytes[1, device]
                        and slot_phys[1, device] != slot_phys[1, last] + stride
                    )
                if new:
                    cut[nr], kept[nr] = i, way
                    nr += 1
                of_run, last = way, device
            cut[nr] = self.n
        if bad >= 0:
            raise IndexError(f"cut_runs: device {bad} has no such driver or bus")
        return cuts[:nr + 1].copy(), ways[:nr].copy()
