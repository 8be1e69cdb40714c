# L2' flattened device tree, sequential write: FdtWriter.
#
# Same bytes as libfdt's fdt_sw: reserve map at 48, then structure, strings behind FDT_END. The
# string table grows downward, so the newest name comes first, and a name is looked up from the
# table's start: the newest string that ends in it wins. Whatever is in the table keeps its distance
# from the table's end, so that is what the hash of suffixes holds; an offset from the start is
# distance and present size put together. When the table grows, offsets written before are too
# small by what it grew; the writer notes where that happened ("stretches") and finish() adjusts
# only what was written before the last growth, which in bulk writing is the first node.


cdef inline uint64_t fdt_sw_limit(const fdt_sw *sw) noexcept nogil:
    """Bytes that structure and strings may have together."""
    return sw.cap if sw.fixed else FDT_MAX_BYTES


# ---- string table ----


cdef inline uint32_t fdt_sw_mix(uint64_t hashed) noexcept nogil:
    hashed = (hashed ^ (hashed >> 32)) * <uint64_t>0x9E3779B97F4A7C15ULL
    return <uint32_t>(hashed >> 32)


cdef inline uint64_t fdt_sw_step(uint64_t hashed, unsigned char byte) noexcept nogil:
    """Hash of byte + suffix, from that of the suffix: one pass gives all suffixes of a name."""
    return (hashed + byte + 1) * <uint64_t>0xD6E8FEB86659FD93ULL


cdef uint64_t fdt_sw_slot_of(
    const fdt_sw *sw, uint32_t hashed, const unsigned char *name, uint64_t length
) noexcept nogil:
    """Slot of the suffix *name*, or the free one where it belongs."""
    cdef uint64_t slot = hashed & (sw.nr_slots - 1)
    cdef const unsigned char *end = sw.tab + sw.tabcap
    cdef const unsigned char *at
    while sw.slots[slot].dist:
        if sw.slots[slot].hash == hashed and sw.slots[slot].dist > length:
            at = end - sw.slots[slot].dist
            if at[length] == 0 and memcmp(at, name, length) == 0:
                return slot
        slot = (slot + 1) & (sw.nr_slots - 1)
    return slot


cdef int fdt_sw_rehash(fdt_sw *sw, uint64_t nr_slots) noexcept nogil:
    cdef fdt_sw_slot *old = sw.slots
    cdef fdt_sw_slot *slots = <fdt_sw_slot *>calloc(nr_slots, sizeof(fdt_sw_slot))
    cdef uint64_t i, slot
    if slots == NULL:
        return -ENOMEM
    for i in range(sw.nr_slots):
        if old[i].dist:
            slot = old[i].hash & (nr_slots - 1)
            while slots[slot].dist:
                slot = (slot + 1) & (nr_slots - 1)
            slots[slot] = old[i]
    free(old)
    sw.slots = slots
    sw.nr_slots = nr_slots
    return 0


cdef int64_t fdt_sw_find_string(
    const fdt_sw *sw, const unsigned char *name, uint64_t length
) noexcept nogil:
    """Distance of *name* from the end of the table, or 0."""
    cdef uint64_t hashed = 0, i
    if sw.nr_slots == 0:
        return 0
    for i in range(length, 0, -1):
        hashed = fdt_sw_step(hashed, name[i - 1])
    return sw.slots[fdt_sw_slot_of(sw, fdt_sw_mix(hashed), name, length)].dist


cdef int64_t fdt_sw_add_string(
    fdt_sw *sw, const unsigned char *name, uint64_t length, uint64_t end
) noexcept nogil:
    """Distance of *name* from the end of the table, added at its start if need be; or -errno.

    The structure is going to reach up to *end*, and there must be room for both.
    """
    cdef int64_t found = fdt_sw_find_string(sw, name, length)
    cdef uint64_t hashed = 0, i, slot, cap
    cdef unsigned char *tab
    cdef void *grown
    cdef int rc
    if found:
        return found
    if end + sw.tabsize + length + 1 > fdt_sw_limit(sw):
        return -ENOSPC

    # All that can fail comes first.
    if sw.tabsize + length + 1 > sw.tabcap:
        cap = max(2 * sw.tabcap, sw.tabsize + length + 1)
        cap = max(cap, <uint64_t>256)
        tab = <unsigned char *>malloc(cap)
        if tab == NULL:
            return -ENOMEM
        if sw.tabsize:
            memcpy(tab + cap - sw.tabsize, sw.tab + sw.tabcap - sw.tabsize, sw.tabsize)
        free(sw.tab)
        sw.tab = tab
        sw.tabcap = cap
    if sw.nr_stretches == sw.cap_stretches:
        cap = 2 * sw.cap_stretches if sw.cap_stretches else 16
        grown = realloc(sw.stretches, cap * sizeof(fdt_sw_stretch))
        if grown == NULL:
            return -ENOMEM
        sw.stretches = <fdt_sw_stretch *>grown
        sw.cap_stretches = cap
    cap = sw.nr_slots if sw.nr_slots else 64
    while 2 * (sw.nr_used + length) > cap:
        cap *= 2
    if cap != sw.nr_slots:
        rc = fdt_sw_rehash(sw, cap)
        if rc < 0:
            return rc

    sw.tabsize += length + 1
    tab = sw.tab + sw.tabcap - sw.tabsize
    memcpy(tab, name, length)
    tab[length] = 0
    sw.stretches[sw.nr_stretches].pos = sw.pos
    sw.stretches[sw.nr_stretches].tabsize = sw.tabsize
    sw.nr_stretches += 1
    for i in range(length, 0, -1):
        hashed = fdt_sw_step(hashed, name[i - 1])
        slot = fdt_sw_slot_of(sw, fdt_sw_mix(hashed), tab + i - 1, length - i + 1)
        sw.nr_used += sw.slots[slot].dist == 0
        sw.slots[slot].hash = fdt_sw_mix(hashed)
        sw.slots[slot].dist = <uint32_t>(sw.tabsize - (i - 1))
    return sw.tabsize


# ---- structure ----


cdef int fdt_sw_grow(fdt_sw *sw, uint64_t need) noexcept nogil:
    """Let the buffer hold *need* bytes, of which there are at most FDT_MAX_BYTES."""
    cdef uint64_t cap = min(max(2 * sw.cap, need), <uint64_t>FDT_MAX_BYTES)
    cdef void *grown
    if need <= sw.cap:
        return 0
    grown = realloc(sw.buf, cap)
    if grown == NULL:
        return -ENOMEM
    sw.buf = <unsigned char *>grown
    sw.cap = cap
    return 0


cdef inline int fdt_sw_reserve(fdt_sw *sw, uint64_t nbytes) noexcept nogil:
    """Make room for *nbytes* more of structure."""
    if nbytes > FDT_MAX_BYTES or sw.pos + nbytes + sw.tabsize > fdt_sw_limit(sw):
        return -ENOSPC
    return fdt_sw_grow(sw, sw.pos + nbytes) if sw.pos + nbytes > sw.cap else 0


cdef inline unsigned char *fdt_sw_put_name(
    unsigned char *to, const unsigned char *name, uint64_t length
) noexcept nogil:
    cdef uint64_t padded = fdt_align(length + 1)
    fdt_st32(to, FDT_BEGIN_NODE)
    memset(to + padded, 0, 4)           # the last word of the name: NUL and padding
    fdt_copy(to + 4, name, length)
    return to + 4 + padded


cdef inline unsigned char *fdt_sw_put_value(
    unsigned char *to, const unsigned char *value, uint64_t length
) noexcept nogil:
    """Behind its property's header, which is what *to* - 4 is."""
    cdef uint64_t padded = fdt_align(length)
    if padded != length:
        memset(to + padded - 4, 0, 4)
    fdt_copy(to, value, length)
    return to + padded


cdef void fdt_sw_adjust(fdt_sw *sw) noexcept nogil:
    """Bring name offsets of a smaller string table up to date."""
    cdef fdt_blob blob
    cdef fdt_token token
    cdef fdt_fault fault
    cdef uint64_t offset = sw.start, stretch = 0, last = sw.nr_stretches - 1
    if sw.nr_stretches == 0:
        return
    blob.base = sw.buf
    blob.off_dt_struct = sw.start
    blob.end_dt_struct = sw.pos
    while offset < sw.stretches[last].pos:
        while sw.stretches[stretch + 1].pos <= offset:
            stretch += 1
        if fdt_next_tag(&blob, offset, &token, &fault) < 0:
            return                      # somebody else wrote into the buffer
        if token.tag == FDT_PROP:
            fdt_st32(
                sw.buf + offset + 8,
                <uint32_t>(token.nameoff + sw.tabsize - sw.stretches[stretch].tabsize),
            )
        offset = token.next


cdef int fdt_sw_finish(fdt_sw *sw) noexcept nogil:
    """Write FDT_END, strings and header; sw.pos becomes totalsize."""
    cdef unsigned char *header
    cdef uint64_t end = sw.pos + 4
    cdef int rc
    if end + sw.tabsize > fdt_sw_limit(sw):
        return -ENOSPC
    rc = fdt_sw_grow(sw, end + sw.tabsize)
    if rc < 0:
        return rc
    fdt_sw_adjust(sw)
    fdt_st32(sw.buf + sw.pos, FDT_END)
    if sw.tabsize:
        memcpy(sw.buf + end, sw.tab + sw.tabcap - sw.tabsize, sw.tabsize)
    header = sw.buf
    memset(header, 0, FDT_SW_RSVMAP)
    fdt_st32(header, FDT_MAGIC)
    fdt_st32(header + 4, <uint32_t>(end + sw.tabsize))
    fdt_st32(header + 8, <uint32_t>sw.start)
    fdt_st32(header + 12, <uint32_t>end)
    fdt_st32(header + 16, FDT_SW_RSVMAP)
    fdt_st32(header + 20, 17)
    fdt_st32(header + 24, 16)
    fdt_st32(header + 32, <uint32_t>sw.tabsize)
    fdt_st32(header + 36, <uint32_t>(end - sw.start))
    sw.pos = end + sw.tabsize
    return 0


cdef void fdt_sw_free(fdt_sw *sw) noexcept nogil:
    if not sw.fixed:
        free(sw.buf)
    free(sw.tab)
    free(sw.slots)
    free(sw.stretches)
    memset(sw, 0, sizeof(fdt_sw))


# ---- many nodes ----
#
# Most bytes of a node are the same in all nodes: tokens, lengths, offsets of names, values given
# once for all. So writing goes by steps, each of which copies such a run of bytes and puts one
# property's value behind it.

cdef enum:
    FDT_DIGITS = 20             # of the largest uint64_t
    FDT_SHORT = 256             # bytes; above, a value is no part of a run


# A run of names <prefix><number>: text holds the present one, NUL padded to a whole word.
ctypedef struct fdt_counter:
    unsigned char *text         # prefix_len + FDT_DIGITS + 8 bytes
    uint64_t prefix_len
    uint64_t digits


# A run of bytes that ends, if there is a value, in the header of its property.
ctypedef struct fdt_step:
    fdt_rows *value             # or NULL
    const unsigned char *run
    uint64_t length


# What add_nodes() writes.
ctypedef struct fdt_nodes:
    fdt_rows names
    bint counted                # names are <prefix><first>, <prefix><first + 1>...
    uint64_t first
    fdt_counter counter
    fdt_rows *properties
    uint64_t nr_properties
    uint64_t nr_rows
    fdt_step *steps             # nr_properties + 1
    uint64_t nr_steps
    unsigned char *runs


cdef void fdt_counter_set(fdt_counter *counter, uint64_t number) noexcept nogil:
    cdef unsigned char reversed_[FDT_DIGITS]
    cdef uint64_t digits = 0, i
    while True:
        reversed_[digits] = <unsigned char>(c"0" + number % 10)
        number //= 10
        digits += 1
        if number == 0:
            break
    for i in range(digits):
        counter.text[counter.prefix_len + i] = reversed_[digits - 1 - i]
    memset(counter.text + counter.prefix_len + digits, 0, 8)
    counter.digits = digits


cdef inline void fdt_counter_next(fdt_counter *counter, uint64_t number) noexcept nogil:
    """Go on to *number*, one above the present one."""
    cdef unsigned char *last = counter.text + counter.prefix_len + counter.digits - 1
    if last[0] != c"9":
        last[0] += 1
    else:
        fdt_counter_set(counter, number)


cdef inline int fdt_row_bounds(
    const fdt_rows *rows, uint64_t row, uint64_t *start, uint64_t *length
) noexcept nogil:
    """Where a ragged row lies, or -1; its offsets are loaded once, since they may change."""
    cdef uint64_t stop = rows.offsets[row + 1]
    start[0] = rows.offsets[row]
    if start[0] > stop or stop > rows.size:
        return -1
    length[0] = stop - start[0]
    return 0


cdef inline int fdt_size_rows(
    const fdt_rows *rows, uint64_t nr_rows, uint64_t head, uint64_t nul, uint64_t *sizes,
    uint64_t *total, uint64_t *bad
) noexcept nogil:
    """Add to *total*, and to *sizes* if not NULL, what the rows of one column take; -1: bad row.

    A row takes *head* bytes, its own, and *nul* more, which a row of no bytes may not need.
    """
    cdef uint64_t row, start, stop, length, mask, nbytes, added = 0, wrong = 0
    for row in range(nr_rows):
        mask = 0 if rows.present != NULL and rows.present[row] == 0 else <uint64_t>-1
        start, stop = rows.offsets[row], rows.offsets[row + 1]
        length = stop - start
        # What is out of bounds sets the top bit here: a difference below zero, or the offset.
        wrong |= (start | stop | (length - nul) | (rows.size - stop)) & mask
        nbytes = (head + fdt_align(length + nul)) & mask
        added += nbytes
        if sizes != NULL:
            sizes[row] += nbytes
    if wrong >> 63 == 0:
        total[0] += added
        return 0
    for row in range(nr_rows):
        if rows.present == NULL or rows.present[row]:
            bad[0] = row
            if fdt_row_bounds(rows, row, &start, &length) < 0 or length < nul:
                break
    return -1


cdef int fdt_nodes_size(
    const fdt_nodes *nodes, uint64_t *sizes, uint64_t *total, uint64_t *bad
) noexcept nogil:
    """Check all rows and add up what they take in the structure; -1 if row *bad* is wrong.

    *sizes*, if not NULL, gets each row's bytes. A total above FDT_MAX_BYTES is only that.
    """
    cdef const fdt_rows *rows
    cdef uint64_t row, i, stop, nbytes, fixed = 8, digits = 1, limit = 10, done = 0
    for i in range(nodes.nr_properties):
        rows = &nodes.properties[i]
        if rows.offsets == NULL:
            fixed += 12 + fdt_align(rows.width)
    if sizes != NULL:
        for row in range(nodes.nr_rows):
            sizes[row] = fixed
    total[0] = nodes.nr_rows * min(fixed, <uint64_t>1 << 32)

    if not nodes.counted:
        if fdt_size_rows(&nodes.names, nodes.nr_rows, 0, 1, sizes, total, bad) < 0:
            return -1
    while nodes.counted and done < nodes.nr_rows:
        if nodes.first + done < limit:
            stop = min(nodes.nr_rows, limit - nodes.first)
            nbytes = fdt_align(nodes.names.width + digits + 1)
            total[0] += (stop - done) * nbytes
            if sizes != NULL:
                for row in range(done, stop):
                    sizes[row] += nbytes
            done = stop
        digits += 1
        limit *= 10

    for i in range(nodes.nr_properties):
        rows = &nodes.properties[i]
        if rows.offsets != NULL:
            if fdt_size_rows(rows, nodes.nr_rows, 12, 0, sizes, total, bad) < 0:
                return -1
            total[0] = min(total[0], <uint64_t>1 << 62)
    return 0


cdef inline bint fdt_stale(const fdt_sw *sw, const fdt_rows *rows, uint64_t row) noexcept nogil:
    """Whether the row has the property and strings were added since its name was looked up."""
    return rows.tabsize != sw.tabsize and (rows.present == NULL or rows.present[row] != 0)


cdef int64_t fdt_sw_look_up(
    fdt_sw *sw, const fdt_nodes *nodes, uint64_t row, uint64_t end
) noexcept nogil:
    """Look up, or add, the names of *row*'s properties: the row up to which that holds; or -errno.

    A name may be found elsewhere once a longer one was added that ends in it.
    """
    cdef uint64_t i
    cdef fdt_rows *rows
    cdef int64_t dist
    for i in range(nodes.nr_properties):
        rows = &nodes.properties[i]
        if fdt_stale(sw, rows, row):
            dist = fdt_sw_add_string(sw, rows.name, rows.name_len, end)
            if dist < 0:
                return dist
            rows.dist = dist
            rows.tabsize = sw.tabsize
    for i in range(nodes.nr_properties):
        if fdt_stale(sw, &nodes.properties[i], row):
            return row + 1
    return nodes.nr_rows


cdef void fdt_nodes_plan(fdt_nodes *nodes, uint64_t tabsize) noexcept nogil:
    """Lay out the steps for a string table of that size."""
    cdef unsigned char *to = nodes.runs
    cdef fdt_step *step = nodes.steps
    cdef fdt_rows *rows
    cdef uint64_t i
    step.run = to
    for i in range(nodes.nr_properties):
        rows = &nodes.properties[i]
        if rows.present != NULL and step.run != to:
            step.value = NULL           # what comes before is there in any case
            step.length = to - step.run
            step += 1
            step.run = to
        fdt_st32(to, FDT_PROP)
        fdt_st32(to + 4, <uint32_t>rows.width)
        fdt_st32(to + 8, <uint32_t>(tabsize - rows.dist))
        to += 12
        if rows.offsets == NULL and rows.stride == 0 and rows.width <= FDT_SHORT:
            to = fdt_sw_put_value(to, rows.data, rows.width)
        else:
            step.value = rows
            step.length = to - step.run
            step += 1
            step.run = to
    fdt_st32(to, FDT_END_NODE)
    step.value = NULL
    step.length = to + 4 - step.run
    nodes.nr_steps = step + 1 - nodes.steps


cdef int64_t fdt_sw_put_rows(
    fdt_sw *sw, fdt_nodes *nodes, uint64_t first, uint64_t stop, const unsigned char *limit
) noexcept nogil:
    """Write rows from *first* on, up to one whose names were not looked up; that row, or -errno."""
    cdef unsigned char *to = sw.buf + sw.pos
    cdef unsigned char *begin
    cdef const unsigned char *value
    cdef const fdt_step *step
    cdef const fdt_step *end = nodes.steps + nodes.nr_steps
    cdef const fdt_rows *rows
    cdef uint64_t row, at, length = 0
    for row in range(first, stop):
        begin = to
        if nodes.counted:
            value = nodes.counter.text
            length = nodes.counter.prefix_len + nodes.counter.digits
        else:
            if fdt_row_bounds(&nodes.names, row, &at, &length) < 0:
                return -EINVAL          # another thread changed the arrays
            value = nodes.names.data + at
        if 4 + fdt_align(length + 1) > <uint64_t>(limit - to):
            return -EINVAL
        to = fdt_sw_put_name(to, value, length)
        # As far before the next row as can be: a load soon after this store would wait for it.
        if nodes.counted:
            fdt_counter_next(&nodes.counter, nodes.first + row + 1)
        step = nodes.steps
        while step != end:
            rows = step.value
            if rows != NULL and rows.present != NULL:
                if not rows.present[row]:
                    step += 1
                    continue
                if rows.tabsize != sw.tabsize and row != first:
                    sw.pos = begin - sw.buf
                    if nodes.counted:
                        fdt_counter_set(&nodes.counter, nodes.first + row)
                    return row
            if step.length > <uint64_t>(limit - to):
                return -EINVAL
            fdt_copy(to, step.run, step.length)
            to += step.length
            if rows != NULL:
                value = rows.data + row * rows.stride
                length = rows.width
                if rows.offsets != NULL:
                    if fdt_row_bounds(rows, row, &at, &length) < 0:
                        return -EINVAL
                    value = rows.data + at
                    fdt_st32(to - 8, <uint32_t>length)
                if fdt_align(length) > <uint64_t>(limit - to):
                    return -EINVAL
                to = fdt_sw_put_value(to, value, length)
            step += 1
    sw.pos = to - sw.buf
    return stop


cdef int fdt_sw_add_nodes(fdt_sw *sw, fdt_nodes *nodes, uint64_t nbytes) noexcept nogil:
    """Write nodes; fdt_nodes_size() checked them and said that they take *nbytes*."""
    cdef uint64_t end = sw.pos + nbytes
    cdef int64_t stop, row = 0
    cdef int rc = fdt_sw_reserve(sw, nbytes)
    if rc < 0:
        return rc
    if nodes.counted:
        fdt_counter_set(&nodes.counter, nodes.first)
    while row < <int64_t>nodes.nr_rows:
        stop = fdt_sw_look_up(sw, nodes, row, end)
        if stop < 0:
            return <int>stop
        fdt_nodes_plan(nodes, sw.tabsize)
        row = fdt_sw_put_rows(sw, nodes, row, stop, sw.buf + end)
        if row < 0:
            return <int>row
    return 0


cdef object fdt_whole(object array):
    """An array's own bytes, one behind the other."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


# What add_nodes() is given, as pointers. Rows count from `start` of what the caller gave.
@cython.final
@cython.auto_pickle(False)
cdef class _FdtRows:
    cdef list keep              # owners of what is pointed to
    cdef fdt_nodes nodes
    cdef unsigned char *joined  # names that were Python objects
    cdef uint64_t start

    def __cinit__(self, names, properties, start, stop):
        cdef Py_ssize_t rows
        cdef fdt_rows *column
        cdef uint64_t nbytes = 4
        cdef bint counted
        self.keep = []
        counted = (
            isinstance(names, tuple) and len(names) == 3
            and not isinstance(names[1], (str, bytes))
        )
        if counted:
            rows = PyNumber_Index(names[2])
            if rows < 0:
                raise ValueError(f"names: {rows} nodes")
        elif isinstance(names, (str, bytes)):
            raise TypeError("names: a sequence of names is needed")
        else:
            rows = len(names)
        start, stop, _ = slice(start, stop).indices(rows)
        self.start = start
        self.nodes.counted = counted
        self.nodes.nr_rows = max(stop - start, 0)
        if 12 * self.nodes.nr_rows > FDT_MAX_BYTES:
            raise FdtError("FDT_ERR_NOSPACE", None, f"{self.nodes.nr_rows} nodes")
        self._take_names(names, start, self.nodes.nr_rows)

        properties = dict(properties)
        self.nodes.properties = <fdt_rows *>calloc(len(properties) + 1, sizeof(fdt_rows))
        if self.nodes.properties == NULL:
            raise MemoryError
        for name, value in properties.items():
            column = &self.nodes.properties[self.nodes.nr_properties]
            self._take_property(column, name, value, rows, start)
            self.nodes.nr_properties += 1
            nbytes += 12 + FDT_SHORT
        self.nodes.steps = <fdt_step *>xmalloc((len(properties) + 1) * sizeof(fdt_step))
        self.nodes.runs = <unsigned char *>xmalloc(nbytes)

    def __dealloc__(self):
        free(self.nodes.properties)
        free(self.nodes.counter.text)
        free(self.nodes.steps)
        free(self.nodes.runs)
        free(self.joined)

    cdef int _point(self, fdt_rows *rows, object data) except -1:
        """Let *rows* point to the uint8 array *data*, or to bytes."""
        cdef const uint8_t[::1] view = data
        self.keep.append(data)
        rows.size = view.shape[0]
        rows.data = &view[0] if view.shape[0] else <const unsigned char *>b""
        return 0

    cdef int _take_column(self, fdt_rows *rows, Column column, Py_ssize_t start) except -1:
        self.keep.append(column)
        rows.size = column._data.shape[0]
        rows.data = &column._data[0] if rows.size else <const unsigned char *>b""
        rows.offsets = &column._offsets[start]
        if column._present.shape[0]:
            rows.present = &column._present[0] + start
        return 0

    cdef int _take_names(self, object names, Py_ssize_t start, Py_ssize_t rows) except -1:
        cdef bytes prefix
        cdef list chosen
        cdef uint64_t[::1] offsets
        cdef const unsigned char *text
        cdef unsigned char *grown
        cdef Py_ssize_t i
        cdef uint64_t low, high, length, cap = 0
        if isinstance(names, Column):
            if not (<Column>names)._present_array[start:start + rows].all():
                raise ValueError("names: a row is not present")
            self._take_column(&self.nodes.names, names, start)
            low, high = self.nodes.names.offsets[0], self.nodes.names.offsets[rows]
            if rows and low <= high <= self.nodes.names.size:
                fdt_check_names(self.nodes.names.data + low, high - low)
            self.nodes.names.present = NULL
            return 0
        if self.nodes.counted:
            prefix = fdt_encode(names[0])
            fdt_check_name(<const unsigned char *>PyBytes_AS_STRING(prefix + b"0"), len(prefix) + 1)
            self.nodes.first = as_u64(names[1])
            if self.nodes.first > <uint64_t>1000000000000000000:
                raise OverflowError(f"names: {self.nodes.first} is above 10 ** 18")
            self.nodes.first += start
            self.nodes.names.width = len(prefix)
            self.nodes.counter.prefix_len = len(prefix)
            self.nodes.counter.text = <unsigned char *>xmalloc(len(prefix) + FDT_DIGITS + 8)
            memcpy(self.nodes.counter.text, PyBytes_AS_STRING(prefix), len(prefix))
            return 0

        chosen = list(names[start:start + rows])
        array = np.zeros(rows + 1, np.uint64)
        offsets = array
        for i in range(rows):
            owner = fdt_text(chosen[i], &text, &length)
            if self.joined == NULL or self.nodes.names.size + length > cap:
                cap = 2 * (self.nodes.names.size + length) + 16 * rows
                grown = <unsigned char *>realloc(self.joined, cap)
                if grown == NULL:
                    raise MemoryError
                self.joined = grown
            fdt_copy(self.joined + self.nodes.names.size, text, length)
            self.nodes.names.size += length
            offsets[i + 1] = self.nodes.names.size
        fdt_check_names(self.joined, self.nodes.names.size)
        self.nodes.names.data = self.joined
        self.nodes.names.offsets = &offsets[0]
        self.keep.append(array)
        return 0

    cdef int _take_property(
        self, fdt_rows *rows, object name, object value, Py_ssize_t all_rows, Py_ssize_t start
    ) except -1:
        cdef bytes key = fdt_property_key(name)
        cdef uint64_t[::1] offsets
        cdef uint8_t[::1] present
        cdef uint64_t i, end = 0
        self.keep.append(key)
        rows.name = <const unsigned char *>PyBytes_AS_STRING(key)
        rows.name_len = len(key)
        rows.tabsize = <uint64_t>-1     # never looked up yet
        if isinstance(value, Column):
            if len(value) != all_rows:
                raise ValueError(f"{name}: {len(value)} rows for {all_rows} nodes")
            self._take_column(rows, value, start)
        elif isinstance(value, np.ndarray):
            if value.ndim == 0 or value.shape[0] != all_rows:
                raise ValueError(f"{name}: shape {value.shape} for {all_rows} nodes")
            if value.dtype.hasobject:
                raise TypeError(f"{name}: an array of Python objects has no bytes")
            self._point(rows, fdt_whole(value[start:start + self.nodes.nr_rows]))
            if self.nodes.nr_rows:
                rows.width = rows.stride = rows.size // self.nodes.nr_rows
        elif isinstance(value, (list, tuple)):
            if len(value) != all_rows:
                raise ValueError(f"{name}: {len(value)} values for {all_rows} nodes")
            chosen = value[start:start + self.nodes.nr_rows]
            array = np.zeros(self.nodes.nr_rows + 1, np.uint64)
            flags = np.ones(self.nodes.nr_rows, np.uint8)
            offsets, present = array, flags
            for i in range(self.nodes.nr_rows):
                item = chosen[i]
                if item is None:
                    present[i] = 0
                elif type(item) is bytes:
                    end += PyBytes_GET_SIZE(item)
                else:
                    end += memoryview(item).nbytes
                offsets[i + 1] = end
            self._point(rows, b"".join([item for item in chosen if item is not None]))
            self.keep += [array, flags]
            rows.offsets = &offsets[0]
            if self.nodes.nr_rows:
                rows.present = &present[0]
        elif PyObject_CheckBuffer(value):
            # Small ones are copied, which an empty buffer needs; large ones are not.
            large = memoryview(value).nbytes > 4096
            self._point(rows, np.frombuffer(value, np.uint8) if large else fdt_value(value))
            rows.width = rows.size
        else:
            raise TypeError(
                f"{name}: bytes, an array, a list of bytes or a Column, "
                f"not {type(value).__name__}"
            )
        if rows.width > FDT_MAX_BYTES:
            raise FdtError("FDT_ERR_NOSPACE", None, f"{name}: {rows.width} bytes")
        return 0

    cdef uint64_t size(self, uint64_t *sizes) except? 0:
        """Check all rows; bytes that they take in the structure."""
        cdef uint64_t total, bad = 0
        cdef int rc
        with nogil:
            rc = fdt_nodes_size(&self.nodes, sizes, &total, &bad)
        if rc < 0:
            raise ValueError(
                f"row {self.start + bad}: its name is empty, or offsets point outside the data"
            )
        return total


cdef inline int fdt_check_name(const unsigned char *name, uint64_t length) except -1:
    """Check the name of a node below the root."""
    if length == 0:
        raise ValueError("only the root node may have an empty name")
    if memchr(name, c"/", length) != NULL or memchr(name, 0, length) != NULL:
        raise ValueError(f"node name {fdt_decode(name, length)!r}: '/' and NUL are not allowed")
    return 0


cdef int fdt_check_names(const unsigned char *names, uint64_t length) except -1:
    """Check many names of nodes, one behind the other."""
    if length and memchr(names, c"/", length) != NULL:
        raise ValueError("names: a name has '/' in it")
    if length and memchr(names, 0, length) != NULL:
        raise ValueError("names: a name has NUL in it")
    return 0


cdef bytes fdt_property_key(object name):
    """A property's name as bytes, within the rules."""
    cdef bytes key = fdt_encode(name)
    if PyBytes_GET_SIZE(key) == 0:
        raise ValueError("a property needs a name")
    if PyBytes_GET_SIZE(key) > FDT_MAX_PROPERTY_NAME:
        raise ValueError(f"property name {key[:40]!r}...: above {FDT_MAX_PROPERTY_NAME} bytes")
    if memchr(PyBytes_AS_STRING(key), 0, PyBytes_GET_SIZE(key)) != NULL:
        raise ValueError(f"property name {key!r}: NUL is not allowed")
    return key


cdef bytes fdt_reserve_map(object entries):
    """The memory reserve map as bytes, the entry of zeros that ends it included."""
    cdef list words = []
    for address, nbytes in entries:
        words.append(as_u64(address).to_bytes(8, "big"))
        words.append(as_u64(nbytes).to_bytes(8, "big"))
        if nbytes == 0:
            raise ValueError("reserve_map: an entry of 0 bytes would end it")
    words.append(bytes(16))
    return b"".join(words)


# ---- the writer ----


# Owner of a finished tree's bytes, once the writer let go of them.
@cython.final
@cython.auto_pickle(False)
cdef class _FdtBytes:
    cdef unsigned char *buf
    cdef Py_ssize_t nbytes

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.buf, self.nbytes, False, flags)

    def __dealloc__(self):
        free(self.buf)


# Where the name of a property is: callers give the same str object again and again.
cdef enum:
    FDT_KNOWN = 64

ctypedef struct fdt_known:
    PyObject *name              # a reference, or NULL
    uint64_t tabsize            # of the string table when it was looked up
    int64_t dist                # from the end of the table


@cython.final
@cython.auto_pickle(False)
cdef class _FdtNodeContext:
    cdef FdtWriter writer
    cdef object name
    cdef object token

    def __cinit__(self, FdtWriter writer not None, name):
        self.writer = writer
        self.name = name

    def __enter__(self):
        if self.token is not None:
            raise ValueError(f"node {self.name!r} was begun already")
        self.token = self.writer.begin_node(self.name)
        return self.writer

    def __exit__(self, kind, value, traceback):
        if kind is None:
            self.writer.end_node(self.token)


@cython.final
@cython.auto_pickle(False)
@cython.no_gc  # it holds an export: the collector would clear the memoryview under it
@cython.binding(False)  # the interpreter has shorter ways to call builtin methods
@cython.embedsignature(True)
@cython.embedsignature.format("clinic")
cdef class FdtWriter:
    """Write a flattened device tree from its first byte to its last.

    Gives byte for byte what libfdt's sequential writer (``fdt_create()`` to ``fdt_finish()``) gives
    for the same calls, version 17.

    Args:
        size_hint: bytes that will be needed, to have them from the start; it may be wrong.
        into: writable buffer to write to, as a view of simulated memory; it does not grow.
        reserve_map: ``[(address, bytes), ...]``, the memory reserve map; an entry of 0 bytes
            would end it.

    Raises:
        ValueError: a call breaks a rule: a property after a child, names with "/" or NUL, a second
            root, ``end_node()`` or ``finish()`` at the wrong place.
        FdtError: FDT_ERR_NOSPACE: *into* is full, or the tree has more than 2 GiB - 1.

    Context:
        One thread at a time; a second one gets RuntimeError while a bulk call runs without the GIL.
        A call that raises leaves the tree as it was. Names of properties that it brought in may
        stay in the string table, which libfdt would take out again.

    Source:
        libfdt's ``fdt_sw.c``; DT spec v0.4, chapter 5.

    Example:
        >>> writer = FdtWriter()
        >>> with writer.node("") as node:
        ...     node.property_string("compatible", "kho-v4")
        ...     node.property_native_u64("preserved-memory-map", 0x123456000)
        >>> len(writer.finish())
        152
    """

    cdef fdt_sw _sw
    cdef Py_buffer _buffer
    cdef bint _held
    cdef object _into
    cdef uint64_t *_open        # tokens of the open nodes
    cdef uint64_t _depth        # how many those are
    cdef uint64_t _cap_open
    cdef uint64_t _nr_begun
    cdef bint _ended            # the last thing written was a node's end
    cdef bint _busy
    cdef bint _finished
    cdef fdt_known _known[FDT_KNOWN]

    def __cinit__(self, size_hint=0, *, into=None, reserve_map=()):
        cdef uint64_t hint = as_u64(size_hint)
        cdef bytes reserved = fdt_reserve_map(reserve_map)
        self._sw.start = FDT_SW_RSVMAP + len(reserved)
        if into is None:
            if self._sw.start > FDT_MAX_BYTES:
                raise FdtError("FDT_ERR_NOSPACE", None, f"reserve map of {len(reserved)} bytes")
            hint = max(hint, self._sw.start)
            hint = min(max(hint, <uint64_t>1024), <uint64_t>FDT_MAX_BYTES)
            self._sw.buf = <unsigned char *>xmalloc(hint)
            self._sw.cap = hint
            advise_huge(self._sw.buf, hint)
        else:
            PyObject_GetBuffer(into, &self._buffer, PyBUF_WRITABLE)
            self._held = True
            self._into = memoryview(into).cast("B") if self._buffer.len else memoryview(b"")
            self._sw.fixed = True
            self._sw.buf = <unsigned char *>self._buffer.buf
            self._sw.cap = min(<uint64_t>self._buffer.len, <uint64_t>FDT_MAX_BYTES)
            if self._sw.cap < self._sw.start:
                raise FdtError("FDT_ERR_NOSPACE", None, f"{self._sw.cap} bytes hold no header")
        memcpy(self._sw.buf + FDT_SW_RSVMAP, PyBytes_AS_STRING(reserved), len(reserved))
        self._sw.pos = self._sw.start

    def __dealloc__(self):
        cdef int i
        fdt_sw_free(&self._sw)
        free(self._open)
        for i in range(FDT_KNOWN):
            Py_XDECREF(self._known[i].name)
        if self._held:
            PyBuffer_Release(&self._buffer)

    def begin_node(self, name) -> int:
        """Begin a node, the root (named "") first.

        Args:
            name: with its unit address; neither "/" nor NUL.

        Returns:
            token to give back to ``end_node()``.
        """
        self._begin(name)
        return self._nr_begun

    def end_node(self, token=None) -> None:
        """End the innermost open node.

        Args:
            token: what its ``begin_node()`` returned, to have the order checked.
        """
        self._claim()
        if self._depth == 0:
            raise ValueError("end_node: no node is open")
        if token is not None and token != self._open[self._depth - 1]:
            raise ValueError("end_node: not the node that was begun last")
        self._end()

    def node(self, name):
        """Return a context that begins a node and ends it; its target is this writer.

        Raises:
            ValueError: on leaving it, if nodes begun inside are still open. An exception that
                leaves the block leaves the node open.
        """
        return _FdtNodeContext.__new__(_FdtNodeContext, self, name)

    def property(self, name, value) -> None:
        """Add a property to the open node.

        Args:
            name: 1 to 255 bytes without NUL.
            value: any buffer, taken as it is.
        """
        self._add(name, value)

    def property_u32(self, name, value) -> None:
        """Add a property of one big-endian 32-bit cell, as the DT spec has it."""
        cdef uint64_t number = as_u64(value)
        cdef uint32_t word
        if number > <uint32_t>-1:
            raise OverflowError(f"{name}: {number} needs more than 32 bits")
        word = htobe32(<uint32_t>number)
        self._property(name, &word, 4)

    def property_u64(self, name, value) -> None:
        """Add a property of one big-endian 64-bit number, as the DT spec has it."""
        cdef uint64_t word = htobe64(as_u64(value))
        self._property(name, &word, 8)

    def property_native_u64(self, name, value) -> None:
        """Add a property of one 64-bit number in the processor's byte order, as KHO has it."""
        cdef uint64_t word = as_u64(value)
        self._property(name, &word, 8)

    def property_cells(self, name, values) -> None:
        """Add a property of big-endian 32-bit cells, as ``reg = <1 2 3>``."""
        cdef list cells = [as_u64(value) for value in values]
        if cells and max(cells) > <uint32_t>-1:
            raise OverflowError(f"{name}: {max(cells)} needs more than 32 bits")
        self.property(name, np.array(cells, ">u4"))

    def property_string(self, name, value) -> None:
        """Add a property of one NUL-terminated string."""
        cdef const unsigned char *text
        cdef uint64_t length
        cdef object owner = fdt_text(value, &text, &length)
        if memchr(text, 0, length) != NULL:
            raise ValueError(f"{name}: NUL inside the string {value!r}")
        self._property(name, text, length + 1)  # both str and bytes end in a NUL

    def property_strings(self, name, values) -> None:
        """Add a property of NUL-terminated strings, one after the other."""
        cdef bytes raw
        cdef list parts = []
        if isinstance(values, (str, bytes)):
            raise TypeError(f"{name}: a sequence of strings is needed")
        for value in values:
            raw = fdt_encode(value)
            if b"\0" in raw:
                raise ValueError(f"{name}: NUL inside the string {value!r}")
            parts.append(raw)
            parts.append(b"\0")
        self.property(name, b"".join(parts))

    def add_node(self, name, properties=None) -> None:
        """Add a whole node without children.

        Args:
            name: of the node.
            properties: dict from name to value, any buffer.
        """
        cdef uint64_t before = self._sw.pos, depth = self._depth
        cdef bint ended = self._ended
        self._begin(name)
        try:
            if properties:
                for key, value in properties.items():
                    self._add(key, value)
            if self._depth != depth + 1:
                raise ValueError("end_node: not the node that was begun last")
            self._end()
        except BaseException:
            if not self._finished and self._depth == depth + 1:
                self._depth -= 1
                self._nr_begun -= depth == 0
                self._rewind(before)
                self._ended = ended
            raise

    def add_nodes(self, names, properties, start=0, stop=None) -> None:
        """Add many nodes without children, side by side in the open node.

        Args:
            names: sequence of str; or ``("dev", first, count)`` for dev<first>, dev<first + 1>...;
                or a Column.
            properties: dict from a property's name to its values: bytes or another buffer, the
                same for all nodes; an array of shape (n,) or (n, k), the raw bytes of each row;
                a list of n buffers, None where the node has no such property; a Column.
            start: first row to write.
            stop: row before which to stop; None: all. Both count as in a slice.

        Raises:
            ValueError: lengths do not agree, or a name breaks the rules; nothing is written.

        Context:
            Runs without the GIL, except for what turns sequences of Python objects into arrays.
        """
        cdef _FdtRows rows
        cdef uint64_t nbytes, before
        cdef int rc
        self._claim()
        rows = _FdtRows.__new__(_FdtRows, names, properties, start, stop)
        nbytes = rows.size(NULL)
        self._claim()                   # the size was counted without the GIL
        if self._depth == 0:
            raise ValueError("add_nodes: no node is open")
        if rows.nodes.nr_rows == 0:
            return
        before = self._sw.pos
        self._busy = True
        with nogil:
            rc = fdt_sw_add_nodes(&self._sw, &rows.nodes, nbytes)
        self._busy = False
        if rc < 0:
            self._rewind(before)
            self._fail(rc, f"add_nodes: {rows.nodes.nr_rows} nodes, {nbytes} bytes")
        self._ended = True

    @staticmethod
    def nodes_size(names, properties) -> object:
        """Return the bytes of structure that each node would take.

        Args:
            names: as in ``add_nodes()``.
            properties: as in ``add_nodes()``.

        Returns:
            uint64, shape (n,). Names of properties are not counted, being shared, nor are the
            open node, the header (64 bytes) and FDT_END (4).
        """
        cdef _FdtRows rows = _FdtRows.__new__(_FdtRows, names, properties, 0, None)
        cdef uint64_t[::1] sizes
        result = np.empty(rows.nodes.nr_rows, np.uint64)
        if rows.nodes.nr_rows:
            sizes = result
            rows.size(&sizes[0])
        return result

    def finish(self) -> memoryview:
        """End the tree.

        Returns:
            its bytes, writable: of *into*, or of a block of their own.

        Raises:
            ValueError: nodes are open, or there is no root.
        """
        cdef _FdtBytes owner
        cdef void *trimmed
        cdef int rc
        self._claim()
        if self._depth:
            raise ValueError(f"finish: {self._depth} nodes are open")
        if not self._nr_begun:
            raise ValueError("finish: there is no root node")
        self._busy = True
        with nogil:
            rc = fdt_sw_finish(&self._sw)
        self._busy = False
        if rc < 0:
            self._fail(rc, "finish")
        self._finished = True
        if self._sw.fixed:
            return self._into[:self._sw.pos]
        owner = _FdtBytes.__new__(_FdtBytes)
        trimmed = realloc(self._sw.buf, self._sw.pos)
        owner.buf = <unsigned char *>trimmed if trimmed != NULL else self._sw.buf
        owner.nbytes = self._sw.pos
        self._sw.buf = NULL
        fdt_sw_free(&self._sw)
        return memoryview(owner)

    def __repr__(self) -> str:
        return f"<FdtWriter, {self._nr_begun} nodes begun, {self._depth} open>"

    cdef inline int _claim(self) except -1:
        """Refuse a call that comes at the wrong time."""
        if self._busy:
            raise RuntimeError("another thread is using this FdtWriter")
        if self._finished:
            raise ValueError("the tree is finished")
        return 0

    cdef int _fail(self, int rc, object what) except -1:
        if rc == -ENOMEM:
            raise MemoryError
        if rc == -EINVAL:
            raise RuntimeError(f"{what}: the arrays changed meanwhile")
        raise FdtError("FDT_ERR_NOSPACE", self._sw.pos, str(what))

    cdef inline int _room(self, uint64_t nbytes, object what) except -1:
        cdef int rc = fdt_sw_reserve(&self._sw, nbytes)
        if rc < 0:
            self._fail(rc, what)
        return 0

    cdef void _rewind(self, uint64_t pos) noexcept:
        """Take back the structure behind *pos*; strings stay, and no stretch begins behind it."""
        cdef uint64_t i
        self._sw.pos = pos
        for i in range(self._sw.nr_stretches):
            if self._sw.stretches[i].pos > pos:
                self._sw.stretches[i].pos = pos

    cdef inline int _begin(self, object name) except -1:
        cdef const unsigned char *text
        cdef uint64_t length, cap
        cdef uint64_t *grown
        cdef object owner = fdt_text(name, &text, &length)
        self._claim()
        if self._depth:
            fdt_check_name(text, length)
        elif self._nr_begun:
            raise ValueError(f"node {name!r}: the root node is complete, and there is only one")
        elif length:
            raise ValueError(f"the root node has no name, not {name!r}")
        if self._depth == self._cap_open:
            cap = 2 * self._cap_open + 8
            grown = <uint64_t *>realloc(self._open, cap * sizeof(uint64_t))
            if grown == NULL:
                raise MemoryError
            self._open, self._cap_open = grown, cap
        self._room(4 + fdt_align(length + 1), name)
        self._sw.pos = fdt_sw_put_name(self._sw.buf + self._sw.pos, text, length) - self._sw.buf
        self._nr_begun += 1
        self._open[self._depth] = self._nr_begun
        self._depth += 1
        self._ended = False
        return 0

    cdef inline int _end(self) except -1:
        self._claim()
        self._room(4, "end_node")
        fdt_st32(self._sw.buf + self._sw.pos, FDT_END_NODE)
        self._sw.pos += 4
        self._depth -= 1
        self._ended = True
        return 0

    cdef inline int _add(self, object name, object value) except -1:
        cdef Py_buffer buffer
        if type(value) is bytes:
            return self._property(name, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
        PyObject_GetBuffer(value, &buffer, PyBUF_SIMPLE)
        try:
            return self._property(name, buffer.buf, buffer.len)
        finally:
            PyBuffer_Release(&buffer)

    cdef int _property(self, object name, const void *value, uint64_t nbytes) except -1:
        cdef fdt_known *known = &self._known[(<size_t><void *>name >> 4) % FDT_KNOWN]
        cdef bytes key = None
        cdef int64_t dist = known.dist
        cdef unsigned char *to
        cdef int rc
        if known.name != <PyObject *>name or known.tabsize != self._sw.tabsize:
            key = fdt_property_key(name)
        self._claim()
        if self._depth == 0:
            raise ValueError(f"property {name!r}: no node is open")
        if self._ended:
            raise ValueError(f"property {name!r}: properties come before a node's children")
        rc = fdt_sw_reserve(&self._sw, 12 + fdt_align(nbytes))
        if rc < 0:
            self._fail(rc, f"property {name!r} of {nbytes} bytes")
        if key is not None:
            dist = fdt_sw_add_string(
                &self._sw, <const unsigned char *>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key),
                self._sw.pos + 12 + fdt_align(nbytes),
            )
            if dist < 0:
                self._fail(<int>dist, f"property {name!r}")
            if type(name) is str:
                Py_INCREF(name)
                Py_XDECREF(known.name)
                known.name, known.tabsize, known.dist = <PyObject *>name, self._sw.tabsize, dist
        to = self._sw.buf + self._sw.pos
        fdt_st32(to, FDT_PROP)
        fdt_st32(to + 4, <uint32_t>nbytes)
        fdt_st32(to + 8, <uint32_t>(self._sw.tabsize - dist))
        to = fdt_sw_put_value(to + 12, <const unsigned char *>value, nbytes)
        self._sw.pos = to - self._sw.buf
        return 0
