# L4 device records: one FDT node a device, written and read in one pass over each shard.
#
#   /                  compatible
#   /device<record>    path, bus, driver: strings    state: u64[4]    index: u64
#
# (luo/abi.py, LUO_DEVICES_COMPATIBLE.) The bytes are those that FdtWriter gives for the same nodes.
# The reader trusts nothing: tokens come from fdt_next_tag(), which checks each against its block.

cdef enum:
    RECORD_PATH
    RECORD_BUS
    RECORD_DRIVER
    RECORD_STATE
    RECORD_INDEX
    NR_RECORD_PROPERTIES
    RECORD_NAME_BYTES = 32  # "device", 20 digits, NUL, and room to copy whole words
    RECORD_PROPERTY_BYTES = 12  # FDT_PROP, length, name
    RECORD_HEAD_BYTES = 100  # header, no reserve map, root with its compatible
    RECORD_TAIL_BYTES = 47  # two ends, names of properties
    RECORD_TREE_BYTES = 147

cdef struct record_text:
    const uint8_t *data
    uint64_t nbytes

cdef record_text[NR_RECORD_PROPERTIES] RECORD_NAMES
RECORD_NAMES[RECORD_PATH].data, RECORD_NAMES[RECORD_PATH].nbytes = b"path", 4
RECORD_NAMES[RECORD_BUS].data, RECORD_NAMES[RECORD_BUS].nbytes = b"bus", 3
RECORD_NAMES[RECORD_DRIVER].data, RECORD_NAMES[RECORD_DRIVER].nbytes = b"driver", 6
RECORD_NAMES[RECORD_STATE].data, RECORD_NAMES[RECORD_STATE].nbytes = b"state", 5
RECORD_NAMES[RECORD_INDEX].data, RECORD_NAMES[RECORD_INDEX].nbytes = b"index", 5

# A sequential writer puts each new name before those it has: the last one used comes first.
cdef bytes RECORD_STRINGS = b"index\0state\0driver\0bus\0path\0compatible\0"
cdef uint32_t[5] RECORD_NAMEOFF = [23, 19, 12, 6, 0]
cdef uint32_t RECORD_COMPATIBLE = 28


cdef struct record_owners:  # drivers or buses
    const int32_t *ids  # by device; -1 none
    Py_ssize_t nr
    const uint8_t *text  # names one after the other, with NUL
    const uint64_t *ends  # nr + 1, from 0


# ---- writing ----

cdef inline unsigned char *record_property(
    unsigned char *at, int which, uint64_t nbytes
) noexcept nogil:
    """Begin a property; returns where its value goes, with what pads it cleared."""
    fdt_st32(at, FDT_PROP)
    fdt_st32(at + 4, <uint32_t>nbytes)
    fdt_st32(at + 8, RECORD_NAMEOFF[which])
    if nbytes & 3:
        memset(at + RECORD_PROPERTY_BYTES + (nbytes & ~<uint64_t>3), 0, 4)
    return at + RECORD_PROPERTY_BYTES


cdef inline uint64_t record_text_bytes(const record_owners *owners, int32_t device) noexcept nogil:
    """Bytes of the property that names a device's owner, 0 if it has none."""
    cdef int32_t owner = owners.ids[device]
    if owner < 0:
        return 0
    return RECORD_PROPERTY_BYTES + fdt_align(owners.ends[owner + 1] - owners.ends[owner])


@cython.final
@cython.auto_pickle(False)
cdef class RecordWriter:
    """Writes the records of a list of devices.

    Args:
        table: the machine's devices.
        devices: the list.
        drivers, buses: (ids, names): the number of each device's driver or bus (``int32``, -1 for
            none), and their names by number, ``bytes``.
        slot_phys, slot_bytes: where their slots are, ``uint64 (2, devices)``: drivers', buses'.

    Raises:
        IndexError: a column is too short for a device, or a number names no owner.
    """

    cdef DeviceTable table
    cdef DeviceList devices
    cdef record_owners drivers
    cdef record_owners buses
    cdef const uint64_t[:, ::1] phys
    cdef const uint64_t[:, ::1] nbytes
    cdef list kept

    def __cinit__(self, DeviceTable table not None, DeviceList devices not None,
                  tuple drivers not None, tuple buses not None,
                  const uint64_t[:, ::1] slot_phys not None,
                  const uint64_t[:, ::1] slot_bytes not None):
        self.kept = []
        self.table, self.devices = table, devices
        self.take(&self.drivers, drivers)
        self.take(&self.buses, buses)
        devices.covered(min(<Py_ssize_t>table.t.nr, slot_phys.shape[1], slot_bytes.shape[1]),
                        "records")
        if slot_phys.shape[0] != 2 or slot_bytes.shape[0] != 2:
            raise IndexError("records: slots have two sides")
        self.phys, self.nbytes = slot_phys, slot_bytes

    cdef int take(self, record_owners *owners, tuple given) except -1:
        cdef const int32_t[::1] ids
        cdef const uint64_t[::1] ends
        cdef bytes text = b"".join([name + b"\0" for name in given[1]])
        cdef Py_ssize_t i
        cdef int32_t bad = -1
        lengths = np.zeros(len(given[1]) + 1, np.uint64)
        np.cumsum([len(name) + 1 for name in given[1]], out=lengths[1:])
        ids, ends = given[0], lengths
        self.devices.covered(ids.shape[0], "records")
        owners.nr = len(given[1])
        with nogil:
            for i in range(self.devices.n):
                if ids[self.devices.order[i]] >= owners.nr:
                    bad = self.devices.order[i]
                    break
        if bad >= 0:
            raise IndexError(f"records: device {bad} has owner {ids[bad]} of {owners.nr}")
        owners.ids = &ids[0] if ids.shape[0] else NULL
        owners.text, owners.ends = text, &ends[0]
        self.kept.append((ids, ends, text))
        return 0

    cdef uint64_t size(self, int32_t device, int nr_digits) noexcept nogil:
        return (
            8 + fdt_align(7 + nr_digits)
            + RECORD_PROPERTY_BYTES + fdt_align(devtab_u16(self.table.t.path_bytes)[device] + 1)
            + record_text_bytes(&self.buses, device) + record_text_bytes(&self.drivers, device)
            + RECORD_PROPERTY_BYTES + 32 + RECORD_PROPERTY_BYTES + 8
        )

    def fit(self, Py_ssize_t start, uint64_t room):
        """Return how many records from *start* on fit into *room* bytes, and what they take.

        The second number is the size of the whole tree.
        """
        cdef uint64_t nbytes = RECORD_TREE_BYTES, size, power = 10
        cdef Py_ssize_t i
        cdef int nr_digits = 1
        if not 0 <= start <= self.devices.n:
            raise IndexError(f"records: {start} of {self.devices.n}")
        with nogil:
            with self.table.lock:
                for i in range(start, self.devices.n):
                    while <uint64_t>i >= power:
                        power *= 10
                        nr_digits += 1
                    size = self.size(self.devices.order[i], nr_digits)
                    if nbytes + size > room:
                        break
                    nbytes += size
                else:
                    i = self.devices.n
        return i - start, nbytes

    def write(self, Py_ssize_t start, Py_ssize_t count, unsigned char[::1] into not None,
              compatible):
        """Write the tree of *count* records from *start* on.

        Args:
            start, count: as :meth:`fit` returned them.
            into: as many bytes as it said.
            compatible: of the root, 14 characters.

        Raises:
            ValueError: *into* is of another size.
        """
        cdef bytes text = compatible.encode() + b"\0"
        cdef uint64_t room = into.shape[0], at
        cdef unsigned char *base
        if not (0 <= start and 0 <= count <= self.devices.n - start) or len(text) != 15:
            raise ValueError(f"records: {start}, {count} of {self.devices.n}, {compatible!r}")
        if room < RECORD_TREE_BYTES or room > FDT_MAX_BYTES:
            raise ValueError(f"records: {room} bytes for a tree")
        base = &into[0]
        memset(base, 0, RECORD_HEAD_BYTES)
        fdt_st32(base, FDT_MAGIC)
        fdt_st32(base + 4, <uint32_t>room)
        fdt_st32(base + 8, FDT_SW_RSVMAP + 16)
        fdt_st32(base + 16, FDT_SW_RSVMAP)
        fdt_st32(base + 20, 17)
        fdt_st32(base + 24, 16)
        at = FDT_SW_RSVMAP + 16
        fdt_st32(base + at, FDT_BEGIN_NODE)
        fdt_st32(base + at + 8, FDT_PROP)
        fdt_st32(base + at + 12, 15)
        fdt_st32(base + at + 16, RECORD_COMPATIBLE)
        memcpy(base + at + 20, <const char *>text, 15)
        with nogil:
            with self.table.lock:
                at = self.write_records(base, room - RECORD_TAIL_BYTES, start, count)
        if at + RECORD_TAIL_BYTES != room:
            raise ValueError(f"records: {count} do not take {room} bytes")
        fdt_st32(base + at, FDT_END_NODE)
        fdt_st32(base + at + 4, FDT_END)
        at += 8
        memcpy(base + at, <const char *>RECORD_STRINGS, len(RECORD_STRINGS))
        fdt_st32(base + 12, <uint32_t>at)
        fdt_st32(base + 32, <uint32_t>len(RECORD_STRINGS))
        fdt_st32(base + 36, <uint32_t>(at - FDT_SW_RSVMAP - 16))

    cdef uint64_t write_records(
        self, unsigned char *base, uint64_t end, Py_ssize_t start, Py_ssize_t count
    ) noexcept nogil:
        """Write what has room before *end*; returns where that ends."""
        cdef const devtab *t = &self.table.t
        cdef const int32_t *parents = devtab_i32(t.parents)
        cdef const uint64_t *names = devtab_u64(t.names.offsets)
        cdef const uint16_t *path_bytes = devtab_u16(t.path_bytes)
        cdef const record_owners *owners
        cdef unsigned char *at = base + RECORD_HEAD_BYTES
        cdef unsigned char *value
        cdef const unsigned char *last = NULL
        cdef int32_t device, owner, last_parent = -1
        cdef unsigned char[RECORD_NAME_BYTES] name
        cdef uint64_t nbytes, prefix, word, number = start
        cdef Py_ssize_t i
        cdef int which, nr_digits = 1, digit
        memset(name, 0, RECORD_NAME_BYTES)
        memcpy(name, b"device", 6)
        while number >= 10:
            number //= 10
            nr_digits += 1
        number = start
        for digit in range(nr_digits - 1, -1, -1):
            name[6 + digit] = <unsigned char>(c"0" + number % 10)
            number //= 10

        for i in range(start, start + count):
            device = self.devices.order[i]
            if <uint64_t>(at - base) + self.size(device, nr_digits) > end:
                break
            fdt_st32(at, FDT_BEGIN_NODE)
            memcpy(at + 4, name, fdt_align(7 + nr_digits))
            at += 4 + fdt_align(7 + nr_digits)

            nbytes = path_bytes[device]
            value = record_property(at, RECORD_PATH, nbytes + 1)
            value[nbytes] = 0
            if parents[device] >= 0 and parents[device] == last_parent:
                # A sibling of the device before has its path up to the name.
                prefix = nbytes - (names[device + 1] - names[device])
                memcpy(value, last, prefix)
                memcpy(value + prefix, t.names.data.data + names[device], nbytes - prefix)
            else:
                devtab_write_path(t, device, value)
                last_parent = parents[device]
            last = value
            at = value + fdt_align(nbytes + 1)

            for which in range(RECORD_BUS, RECORD_DRIVER + 1):
                owners = &self.buses if which == RECORD_BUS else &self.drivers
                owner = owners.ids[device]
                if owner < 0:
                    continue
                nbytes = owners.ends[owner + 1] - owners.ends[owner]
                value = record_property(at, which, nbytes)
                memcpy(value, owners.text + owners.ends[owner], nbytes)
                at = value + fdt_align(nbytes)

            at = record_property(at, RECORD_STATE, 32)
            memcpy(at, &self.phys[0, device], 8)
            memcpy(at + 8, &self.nbytes[0, device], 8)
            memcpy(at + 16, &self.phys[1, device], 8)
            memcpy(at + 24, &self.nbytes[1, device], 8)
            at = record_property(at + 32, RECORD_INDEX, 8)
            word = <uint64_t>device
            memcpy(at, &word, 8)
            fdt_st32(at + 8, FDT_END_NODE)
            at += 12

            # Count on, in digits.
            digit = 5 + nr_digits
            while digit > 5 and name[digit] == c"9":
                name[digit] = c"0"
                digit -= 1
            if digit > 5:
                name[digit] += 1
            else:
                name[6] = c"1"
                name[6 + nr_digits] = c"0"
                nr_digits += 1
        return at - base


# ---- reading ----

cdef struct record:
    record_text[3] text  # path, bus, driver: with NUL; of no bytes if they are absent
    uint64_t[4] state  # phys and bytes of the driver's slot, of the bus's
    uint64_t hint

cdef enum record_outcome:
    RECORD_DONE
    RECORD_FOUND
    RECORD_UNKNOWN_BUS  # the name has to be looked up
    RECORD_UNKNOWN_DRIVER
    RECORD_LOST  # its device is not here
    RECORD_BAD_TREE
    RECORD_NO_MEMORY
    RECORD_TOO_MANY
    RECORD_BAD_PATH
    RECORD_BAD_STATE
    RECORD_BAD_INDEX
    RECORD_BAD_SLOT
    RECORD_TWICE

cdef dict RECORD_RULES = {
    RECORD_BAD_PATH: "its path is missing or has no end",
    RECORD_BAD_STATE: "state is not 32 bytes",
    RECORD_BAD_INDEX: "index is not 8 bytes",
    RECORD_BAD_SLOT: "a slot leaves its slab",
    RECORD_TWICE: "two records name the same device",
}


cdef int record_property_of(
    const fdt_blob *blob, uint64_t offset, uint64_t nameoff, fdt_fault *fault
) noexcept nogil:
    """Which property it is, NR_RECORD_PROPERTIES for none of ours, -1 for a fault."""
    cdef int which
    cdef int64_t length = fdt_property_name(blob, offset, nameoff, fault)
    cdef const unsigned char *name = blob.base + blob.off_dt_strings + nameoff
    if length < 0:
        return -1
    for which in range(NR_RECORD_PROPERTIES):
        if <uint64_t>length == RECORD_NAMES[which].nbytes and memcmp(
            name, RECORD_NAMES[which].data, length
        ) == 0:
            return which
    return NR_RECORD_PROPERTIES


cdef record_outcome record_next(
    const fdt_blob *blob, uint64_t *at, fdt_seen *seen, record *found, fdt_fault *fault
) noexcept nogil:
    """Read the record at or behind the token at *at*, and go behind it."""
    cdef fdt_token token
    cdef fdt_seen *here
    cdef const unsigned char *value
    cdef uint64_t offset, end = blob.end_dt_struct, depth = 0, place = 0
    cdef int64_t nameoff
    cdef int which, given = 0
    cdef bint properties = True  # whether one may stand here
    while True:
        offset = at[0]
        if fdt_next_tag(blob, offset, &token, fault) < 0:
            return RECORD_BAD_TREE
        at[0] = token.next
        if token.tag == FDT_BEGIN_NODE:
            break
        if token.tag == FDT_END_NODE:
            return RECORD_DONE
        if token.tag == FDT_END:
            fdt_fault_set(fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END inside a node")
            return RECORD_BAD_TREE
    for which in range(3):
        found.text[which].nbytes = 0
    while True:
        offset = at[0]
        if properties and end - offset >= 4 and fdt_ld32(blob.base + offset) == FDT_PROP:
            here = &seen[place % FDT_SEEN]
            place += 1
            if not fdt_seen_before(here, blob.base + offset, end - offset):
                nameoff = fdt_see(blob, offset, here, fault)
                if nameoff < 0:
                    return RECORD_BAD_TREE
                here.number = record_property_of(blob, offset, nameoff, fault)
                if here.number < 0:
                    here.nbytes = 0
                    return RECORD_BAD_TREE
            at[0] = offset + here.nbytes
            which = <int>here.number
            if which == NR_RECORD_PROPERTIES or given >> which & 1:
                continue  # of a name that occurs twice the first counts, as for libfdt
            given |= 1 << which
            value = blob.base + offset + 12
            if which <= RECORD_DRIVER:
                found.text[which].data, found.text[which].nbytes = value, here.length
            elif which == RECORD_STATE:
                if here.length != 32:
                    return RECORD_BAD_STATE
                memcpy(found.state, value, 32)
            else:
                if here.length != 8:
                    return RECORD_BAD_INDEX
                memcpy(&found.hint, value, 8)
            continue
        if fdt_next_tag(blob, offset, &token, fault) < 0:
            return RECORD_BAD_TREE
        at[0] = token.next
        if token.tag == FDT_BEGIN_NODE:
            properties = False
            depth += 1
        elif token.tag == FDT_END_NODE:
            if depth == 0:
                break
            depth -= 1
        elif token.tag == FDT_END:
            fdt_fault_set(fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END inside a node")
            return RECORD_BAD_TREE
        elif token.tag == FDT_PROP and depth == 0:
            fdt_fault_set(fault, FDT_ERR_BADSTRUCTURE, offset, "property after a child node")
            return RECORD_BAD_TREE
    if not given >> RECORD_STATE & 1:
        return RECORD_BAD_STATE
    if not given >> RECORD_INDEX & 1:
        return RECORD_BAD_INDEX
    if found.text[RECORD_PATH].nbytes == 0 or found.text[RECORD_PATH].data[
        found.text[RECORD_PATH].nbytes - 1
    ]:
        return RECORD_BAD_PATH
    return RECORD_FOUND


@cython.final
@cython.auto_pickle(False)
cdef class RecordReader:
    """Reads device records, checks them, and matches them to devices by path and bus.

    Args:
        table: the machine's devices.
        drivers, buses: names by number, ``bytes``; buses by the table's own numbers.
        slabs: ``uint64 (n, 4)``: phys, bytes, first record, count; by first record, and no record
            in two.
        numbers: ``int32 (records,)``, filled with the device of each record, -1 if there is none.
        owners: ``int32 (2, records)``, filled with the number of each one's driver and bus; -1 if
            it has none, -2 if its name is not among those given.
        slot_phys, slot_bytes: ``uint64 (2, devices)``, filled for the devices that were found.

    Attributes:
        nr_read: records so far.
        lost: of each record without a device: its number, its path, the four words of its state.
    """

    cdef readonly Py_ssize_t nr_read
    cdef readonly list lost
    cdef DeviceTable table
    cdef dict drivers
    cdef dict buses
    cdef record_text[3] known  # by property: what was looked up last, and its number
    cdef int32_t[3] number
    cdef const uint64_t[:, ::1] slabs
    cdef Py_ssize_t next_slab
    cdef uint64_t[4] slab  # as in slabs, but that the last is the record behind it
    cdef int32_t[::1] numbers
    cdef int32_t *devices_of  # by record
    cdef int32_t *drivers_of
    cdef int32_t *buses_of
    cdef uint64_t *phys[2]  # by device
    cdef uint64_t *nbytes[2]
    cdef uint8_t *taken
    cdef Py_ssize_t nr_rows
    cdef list kept
    cdef devtab_near near
    cdef record found
    cdef bint pending  # it was read, and waits for what only Python can look up

    def __cinit__(self, DeviceTable table not None, list drivers not None, list buses not None,
                  const uint64_t[:, ::1] slabs not None, int32_t[::1] numbers not None,
                  int32_t[:, ::1] owners not None, uint64_t[:, ::1] slot_phys not None,
                  uint64_t[:, ::1] slot_bytes not None):
        cdef Py_ssize_t nr_rows = table.t.nr
        cdef int side
        if (
            slabs.shape[0] and slabs.shape[1] != 4
            or owners.shape[0] != 2 or owners.shape[1] != numbers.shape[0]
            or slot_phys.shape[0] != 2 or slot_phys.shape[1] < nr_rows
            or slot_bytes.shape[0] != 2 or slot_bytes.shape[1] < nr_rows
        ):
            raise ValueError("records: arrays differ in shape")
        flags = np.zeros(nr_rows, np.uint8)
        cdef uint8_t[::1] taken = flags
        self.table, self.slabs, self.numbers, self.nr_rows = table, slabs, numbers, nr_rows
        self.kept = [numbers, owners, slot_phys, slot_bytes, taken]
        if numbers.shape[0]:
            self.devices_of = &numbers[0]
            self.drivers_of, self.buses_of = &owners[0, 0], &owners[1, 0]
        if nr_rows:
            self.taken = &taken[0]
            for side in range(2):
                self.phys[side], self.nbytes[side] = &slot_phys[side, 0], &slot_bytes[side, 0]
        self.drivers = {name + b"\0": i for i, name in enumerate(drivers)}
        self.buses = {name + b"\0": i for i, name in enumerate(buses)}
        self.lost = []

    def read(self, Node node not None, Py_ssize_t count):
        """Read the *count* records that are the children of *node*.

        Raises:
            FdtError: the tree breaks a rule.
            ValueError: a record does, or there are more or fewer of them.
        """
        cdef fdt_blob blob = node._fdt._blob
        cdef fdt_fault fault
        cdef fdt_token token
        cdef fdt_seen[FDT_SEEN] seen
        cdef uint64_t at
        cdef Py_ssize_t stop = self.nr_read + count
        cdef record_outcome outcome
        cdef int which
        if not 0 <= count <= self.numbers.shape[0] - self.nr_read:
            raise ValueError(f"{count} records behind {self.nr_read} of {self.numbers.shape[0]}")
        memset(&fault, 0, sizeof(fault))
        memset(seen, 0, sizeof(seen))
        memset(&self.near, 0, sizeof(self.near))  # what it points to may be gone
        memset(self.known, 0, sizeof(self.known))
        if fdt_begin_tag(&blob, node._offset, &token, &fault) < 0:
            fdt_raise(&fault)
        at = token.next
        while True:
            with nogil:
                with self.table.lock:
                    outcome = self.read_some(&blob, &at, stop, seen, &fault)
            if outcome == RECORD_UNKNOWN_BUS or outcome == RECORD_UNKNOWN_DRIVER:
                which = RECORD_BUS if outcome == RECORD_UNKNOWN_BUS else RECORD_DRIVER
                self.known[which] = self.found.text[which]
                name = (<const char *>self.known[which].data)[:self.known[which].nbytes]
                names = self.buses if which == RECORD_BUS else self.drivers
                self.number[which] = names.get(name, -2)
            elif outcome == RECORD_LOST:
                path = (<const char *>self.found.text[RECORD_PATH].data)[
                    :self.found.text[RECORD_PATH].nbytes - 1]
                self.lost.append((self.nr_read - 1, path.decode("utf-8", "surrogateescape"),
                                  [self.found.state[i] for i in range(4)]))
            else:
                break
        if outcome == RECORD_BAD_TREE:
            fdt_raise(&fault)
        if outcome == RECORD_NO_MEMORY:
            raise MemoryError("device records")
        if outcome == RECORD_TOO_MANY:
            raise ValueError(f"more than {count} records")
        if outcome != RECORD_DONE:
            raise ValueError(f"record {self.nr_read}: {RECORD_RULES[outcome]}")
        if self.nr_read != stop:
            raise ValueError(f"{count - (stop - self.nr_read)} records instead of {count}")

    cdef record_outcome read_some(
        self, const fdt_blob *blob, uint64_t *at, Py_ssize_t stop, fdt_seen *seen,
        fdt_fault *fault
    ) noexcept nogil:
        """Read on until something needs Python, or the end."""
        cdef record *found = &self.found
        cdef record_outcome outcome
        cdef record_text *text
        cdef Py_ssize_t nr
        cdef int32_t device, bus
        cdef int which, side
        while True:
            if not self.pending:
                outcome = record_next(blob, at, seen, found, fault)
                if outcome != RECORD_FOUND:
                    return outcome
                if self.nr_read == stop:
                    return RECORD_TOO_MANY
                self.pending = True
            for which in range(RECORD_BUS, RECORD_DRIVER + 1):
                text = &found.text[which]
                # Neighbours mostly share bus and driver: a comparison instead of a look-up.
                if text.nbytes and (
                    text.nbytes != self.known[which].nbytes
                    or memcmp(text.data, self.known[which].data, text.nbytes)
                ):
                    return RECORD_UNKNOWN_BUS if which == RECORD_BUS else RECORD_UNKNOWN_DRIVER
            self.pending = False
            nr = self.nr_read
            if not self.in_slab(nr):
                return RECORD_BAD_SLOT
            self.drivers_of[nr] = (
                self.number[RECORD_DRIVER] if found.text[RECORD_DRIVER].nbytes else -1)
            bus = self.number[RECORD_BUS] if found.text[RECORD_BUS].nbytes else -1
            self.buses_of[nr] = bus
            device = self.find(&found.text[RECORD_PATH])
            if device < -1:
                return RECORD_NO_MEMORY
            # A device of that path on another bus is another device, and one that came a moment
            # ago has no columns yet.
            if device >= self.nr_rows or (
                device >= 0 and devtab_i32(self.table.t.bus_ids)[device] != bus
            ):
                device = -1
            self.devices_of[nr] = device
            if device < 0:
                self.nr_read += 1
                return RECORD_LOST
            if self.taken[device]:
                return RECORD_TWICE
            self.taken[device] = 1
            self.nr_read += 1
            for side in range(2):
                self.phys[side][device] = found.state[2 * side]
                self.nbytes[side][device] = found.state[2 * side + 1]

    cdef bint in_slab(self, uint64_t nr) noexcept nogil:
        """Whether both slots of record *nr* lie in the slab that lists it."""
        cdef const uint64_t *state = self.found.state
        cdef uint64_t start, end
        cdef int side
        if state[1] == 0 and state[3] == 0:
            return True
        while nr >= self.slab[3] and self.next_slab < self.slabs.shape[0]:
            for side in range(4):
                self.slab[side] = self.slabs[self.next_slab, side]
            self.slab[3] += self.slab[2]
            self.next_slab += 1
        if not self.slab[2] <= nr < self.slab[3]:
            return False
        start, end = self.slab[0], self.slab[0] + self.slab[1]
        for side in range(2):
            if state[2 * side + 1] and not (
                start <= state[2 * side] <= end and state[2 * side + 1] <= end - state[2 * side]
            ):
                return False
        return True

    cdef int32_t find(self, const record_text *path) noexcept nogil:
        """The device of that path, -1 if there is none, -2 without memory for an index."""
        cdef devtab *t = &self.table.t
        cdef uint64_t nbytes = path.nbytes - 1
        cdef devtab_fault fault
        if nbytes == 0 or nbytes > DEVTAB_PATH_MAX:
            return -1
        if self.found.hint < t.nr and devtab_is_near(
            t, &self.near, <int32_t>self.found.hint, path.data, nbytes
        ):
            return <int32_t>self.found.hint
        if t.slots == NULL and devtab_index_reserve(t, 0, &fault) < 0:
            return -2
        return <int32_t>devtab_probe(
            t, devtab_hash_path(t, path.data, nbytes), path.data, nbytes)
