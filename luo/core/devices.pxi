# L3: the device table. Hardware only: what each device is called, where it hangs, which bus and
# driver it names, and whatever bytes the caller keeps beside it, as columns of C arrays.
#
# A row is never moved or reused: an index stays valid for ever, removed devices are marked.
# Rows beyond `nr` may be written at any time and count only when `nr` passes them, so a call that
# fails needs to undo nothing but its entries in the path index.
#
# Arrays shown to Python are read-only views that hold a reference on their block. Growing a block
# that somebody else holds copies it, so a view never dangles; it goes on showing the rows it had.

import fcntl
import os
import struct
import threading

from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport EEXIST, EINVAL, ENOMEM, EROFS
from libc.errno cimport errno as last_errno
from libc.string cimport memchr
from posix.mman cimport MAP_FAILED, MAP_POPULATE, MAP_PRIVATE, PROT_READ, mmap, munmap

from luo.errors import HandoverError, KhoError

cdef extern from *:
    """
    #include <stdint.h>

    /* 64 x 64 -> 128 bits, folded: the mixing step of the path hash. */
    static inline uint64_t devtab_mix(uint64_t a, uint64_t b)
    {
        __extension__ typedef unsigned __int128 wide;
        wide product = (wide)a * b;
        return (uint64_t)product ^ (uint64_t)(product >> 64);
    }

    /* A view may die in one thread while another one grows the table without the GIL. */
    static inline long devtab_refs_add(long *refs, long by)
    {
        return __atomic_add_fetch(refs, by, __ATOMIC_ACQ_REL);
    }

    static inline void devtab_fetch(const void *address)
    {
        __builtin_prefetch(address);
    }
    """
    uint64_t devtab_mix(uint64_t a, uint64_t b) noexcept nogil
    long devtab_refs_add(long *refs, long by) noexcept nogil
    void devtab_fetch(const void *address) noexcept nogil


cdef tuple DEVTAB_RULES = (
    "more devices than an index can name",
    "offsets of the names decrease or exceed the data",
    "name is empty",
    "name holds '/'",
    "name holds NUL",
    "parent is not an earlier device",
    "parent was removed",
    f"path is longer than {DEVTAB_PATH_MAX} bytes",
    "a sibling has this name already",
    "bus code without a name",
    "driver code without a name",
    "NUMA node is below -1",
    "offsets of a column decrease or exceed its data",
    "depth is not the parent's plus one",
    "length of the path is wrong",
    "removed mark is wrong",
    "no such device",
    "rows differ in size",
)


# ---- blocks ----------------------------------------------------------------------------------

cdef void devtab_put(devtab_block *block) noexcept nogil:
    cdef devtab_block *owner

    while block != NULL and devtab_refs_add(&block.refs, -1) == 0:
        owner = block.owner
        if block.mapped:
            munmap(block.data, block.nbytes)
        elif owner == NULL:
            free(block.data)
        free(block)
        block = owner


cdef int devtab_grow(devtab_block **where, size_t used, size_t need) noexcept nogil:
    """Make room for *need* bytes, keeping the first *used*; capacity grows by half or more."""
    cdef devtab_block *old = where[0]
    cdef devtab_block *block
    cdef size_t nbytes = need
    cdef uint8_t *data

    if old != NULL and need <= old.nbytes:
        return 0
    if old != NULL and nbytes < old.nbytes + old.nbytes // 2:
        nbytes = old.nbytes + old.nbytes // 2
    if nbytes < 64:
        nbytes = 64

    if old != NULL and devtab_refs_add(&old.refs, 0) == 1:
        data = <uint8_t *>realloc(old.data, nbytes)
        if data == NULL:
            return -ENOMEM
        old.data = data
        old.nbytes = nbytes
        return 0

    block = <devtab_block *>calloc(1, sizeof(devtab_block))
    if block == NULL:
        return -ENOMEM
    block.data = <uint8_t *>malloc(nbytes)
    if block.data == NULL:
        free(block)
        return -ENOMEM
    block.nbytes = nbytes
    block.refs = 1
    if used:
        memcpy(block.data, old.data, used)
    where[0] = block
    devtab_put(old)
    return 0


cdef inline int32_t *devtab_i32(const devtab_block *block) noexcept nogil:
    return <int32_t *>block.data if block != NULL else NULL


cdef inline uint64_t *devtab_u64(const devtab_block *block) noexcept nogil:
    return <uint64_t *>block.data if block != NULL else NULL


cdef inline uint16_t *devtab_u16(const devtab_block *block) noexcept nogil:
    return <uint16_t *>block.data if block != NULL else NULL


cdef inline uint8_t *devtab_u8(const devtab_block *block) noexcept nogil:
    return block.data if block != NULL else NULL


# ---- ragged rows -----------------------------------------------------------------------------

cdef inline uint64_t devtab_row(
    const devtab_ragged *column, uint64_t row, const uint8_t **data
) noexcept nogil:
    """Bytes of *row*; *data* is set to the first of them."""
    cdef const uint64_t *offsets

    if row >= column.rows:
        data[0] = NULL
        return 0
    offsets = devtab_u64(column.offsets)
    data[0] = devtab_u8(column.data) + offsets[row] if column.data != NULL else NULL
    return offsets[row + 1] - offsets[row]


cdef int devtab_pad(devtab_ragged *column, uint64_t rows) noexcept nogil:
    """Let the offsets reach *rows*; the rows that are new are empty."""
    cdef uint64_t *offsets
    cdef uint64_t row

    if column.offsets != NULL and column.rows >= rows:
        return 0
    if devtab_grow(&column.offsets, (column.rows + 1) * 8 if column.offsets != NULL else 0,
                   (rows + 1) * 8) < 0:
        return -ENOMEM
    offsets = devtab_u64(column.offsets)
    if column.rows == 0:
        offsets[0] = 0
    for row in range(column.rows, rows):
        offsets[row + 1] = offsets[row]
    column.rows = rows
    return 0


cdef int devtab_rows_valid(const devtab_rows *rows, uint64_t count) noexcept nogil:
    cdef uint64_t row

    if rows.offsets == NULL:
        return 1
    for row in range(count):
        if rows.offsets[row] > rows.offsets[row + 1]:
            return 0
    return rows.offsets[count] <= rows.nbytes


cdef int devtab_write_rows(
    devtab_ragged *column, uint64_t at, const devtab_rows *rows, uint64_t count
) noexcept nogil:
    """Write *count* valid rows behind row *at*; they count once `column.rows` passes them."""
    cdef uint64_t *offsets
    cdef uint64_t base, nbytes, row
    cdef int rc = devtab_pad(column, at)

    if rc < 0:
        return rc
    base = devtab_u64(column.offsets)[at]
    if rows.offsets != NULL:
        nbytes = rows.offsets[count] - rows.offsets[0]
    else:
        nbytes = rows.stride * count
    if devtab_grow(&column.offsets, (at + 1) * 8, (at + count + 1) * 8) < 0:
        return -ENOMEM
    if devtab_grow(&column.data, base, base + nbytes) < 0:
        return -ENOMEM

    offsets = devtab_u64(column.offsets) + at
    if rows.offsets != NULL:
        for row in range(count):
            offsets[row + 1] = base + rows.offsets[row + 1] - rows.offsets[0]
        if nbytes:
            memcpy(column.data.data + base, rows.data + rows.offsets[0], nbytes)
        return 0
    for row in range(count):
        offsets[row + 1] = base + rows.stride * (row + 1)
    if not rows.same:
        if nbytes:
            memcpy(column.data.data + base, rows.data, nbytes)
        return 0
    for row in range(count if rows.stride else 0):
        memcpy(column.data.data + base + rows.stride * row, rows.data, rows.stride)
    return 0


cdef inline uint64_t devtab_room(const devtab_block *block) noexcept nogil:
    return block.nbytes if block != NULL else 0


cdef uint64_t devtab_nbytes(const devtab *t) noexcept nogil:
    cdef uint64_t total = 0
    cdef int i

    for i in range(t.nr_columns):
        total += devtab_room(t.columns[i].data) + devtab_room(t.columns[i].offsets)
    return (
        total + devtab_room(t.names.data) + devtab_room(t.names.offsets)
        + devtab_room(t.parents) + devtab_room(t.depths) + devtab_room(t.bus_ids)
        + devtab_room(t.driver_ids) + devtab_room(t.nodes) + devtab_room(t.alive)
        + devtab_room(t.path_bytes) + devtab_room(t.hashes) + devtab_room(t.slots)
    )


# ---- path hash and index ---------------------------------------------------------------------
#
# hash(path) = extend(... extend(extend(seed, first name), second name) ..., last name), so a
# child's hash comes from its parent's, and that of a path string from one pass over it.
# The seed is random in each process: names from outside cannot be made to collide, and if they
# did, every candidate costs one comparison and no more.

cdef inline uint64_t devtab_load64(const uint8_t *address) noexcept nogil:
    cdef uint64_t word
    memcpy(&word, address, 8)
    return word


cdef inline uint64_t devtab_load32(const uint8_t *address) noexcept nogil:
    cdef uint32_t word
    memcpy(&word, address, 4)
    return word


cdef inline uint64_t devtab_extend(
    const devtab *t, uint64_t hashed, const uint8_t *name, uint64_t nbytes
) noexcept nogil:
    cdef uint64_t low = 0, high = 0, left = nbytes

    while left > 16:
        hashed = devtab_mix(devtab_load64(name) ^ t.seed[0], devtab_load64(name + 8) ^ hashed)
        name += 16
        left -= 16
    if left >= 8:
        low = devtab_load64(name)
        high = devtab_load64(name + left - 8)
    elif left >= 4:
        low = devtab_load32(name)
        high = devtab_load32(name + left - 4)
    elif left:
        low = (<uint64_t>name[0] << 16) | (<uint64_t>name[left >> 1] << 8) | name[left - 1]
    hashed = devtab_mix(low ^ t.seed[0], high ^ hashed)
    return devtab_mix(hashed ^ t.seed[1], nbytes ^ t.seed[0]) & t.hash_mask


cdef uint64_t devtab_hash_path(
    const devtab *t, const uint8_t *path, uint64_t nbytes
) noexcept nogil:
    cdef uint64_t hashed = t.seed[1]
    cdef const uint8_t *end = path + nbytes
    cdef const uint8_t *slash

    while True:
        slash = <const uint8_t *>memchr(path, c"/", end - path) if path != end else NULL
        if slash == NULL:
            return devtab_extend(t, hashed, path, end - path)
        hashed = devtab_extend(t, hashed, path, slash - path)
        path = slash + 1


cdef void devtab_hash_rows(devtab *t, uint64_t first, uint64_t stop) noexcept nogil:
    cdef const int32_t *parents = devtab_i32(t.parents)
    cdef uint64_t *hashes = devtab_u64(t.hashes)
    cdef const uint64_t *offsets = devtab_u64(t.names.offsets)
    cdef const uint8_t *names = devtab_u8(t.names.data)
    cdef uint64_t row

    for row in range(first, stop):
        hashes[row] = devtab_extend(
            t, hashes[parents[row]] if parents[row] >= 0 else t.seed[1],
            names + offsets[row], offsets[row + 1] - offsets[row],
        )


cdef inline int devtab_same_name(const devtab *t, uint64_t a, uint64_t b) noexcept nogil:
    """Whether two rows are siblings of one name."""
    cdef const int32_t *parents = devtab_i32(t.parents)
    cdef const uint64_t *offsets = devtab_u64(t.names.offsets)
    cdef uint64_t nbytes = offsets[a + 1] - offsets[a]

    return (
        parents[a] == parents[b]
        and nbytes == offsets[b + 1] - offsets[b]
        and memcmp(t.names.data.data + offsets[a], t.names.data.data + offsets[b], nbytes) == 0
    )


cdef int devtab_index_insert(devtab *t, uint64_t row) noexcept nogil:
    """Enter *row*; -EEXIST, with nothing entered, if a sibling of its name is there."""
    cdef uint64_t *slots = devtab_u64(t.slots)
    cdef uint64_t hashed = devtab_u64(t.hashes)[row]
    cdef uint64_t at = hashed & t.slot_mask

    while slots[at]:
        if slots[at] >> 32 == hashed >> 32:
            if devtab_same_name(t, <uint64_t>(<uint32_t>slots[at]) - 1, row):
                return -EEXIST
        at = (at + 1) & t.slot_mask
    slots[at] = (hashed >> 32) << 32 | (row + 1)
    return 0


cdef void devtab_index_delete(devtab *t, uint64_t row) noexcept nogil:
    """Take *row* out and close the gap: a chain never holds removed devices."""
    cdef uint64_t *slots = devtab_u64(t.slots)
    cdef const uint64_t *hashes = devtab_u64(t.hashes)
    cdef uint64_t at = hashes[row] & t.slot_mask
    cdef uint64_t gap, home

    while <uint32_t>slots[at] != row + 1:
        at = (at + 1) & t.slot_mask
    gap = at
    while True:
        at = (at + 1) & t.slot_mask
        if not slots[at]:
            break
        home = hashes[<uint32_t>slots[at] - 1] & t.slot_mask
        # An entry may move back to the gap unless its home lies behind the gap.
        if (at - home) & t.slot_mask >= (at - gap) & t.slot_mask:
            slots[gap] = slots[at]
            gap = at
    slots[gap] = 0


cdef int devtab_index_reserve(
    devtab *t, uint64_t extra, devtab_fault *fault
) noexcept nogil:
    """Let the index hold *extra* devices more, building it if need be; load is at most 2/3."""
    cdef uint64_t nr_slots = 64
    cdef uint64_t row
    cdef devtab_block *block
    cdef devtab_block *old = t.slots
    cdef const uint8_t *alive = devtab_u8(t.alive)
    cdef const uint64_t *hashes
    cdef uint64_t old_mask = t.slot_mask

    while nr_slots * 2 < (t.nr_alive + extra) * 3:
        nr_slots *= 2
    if old != NULL and nr_slots <= t.slot_mask + 1:
        return 0
    if devtab_grow(&t.hashes, t.nr * 8 if t.hashes != NULL else 0, t.nr * 8) < 0:
        return -ENOMEM
    block = <devtab_block *>calloc(1, sizeof(devtab_block))
    if block == NULL:
        return -ENOMEM
    block.data = <uint8_t *>calloc(nr_slots, 8)
    if block.data == NULL:
        free(block)
        return -ENOMEM
    block.nbytes = nr_slots * 8
    block.refs = 1

    if old == NULL:
        devtab_hash_rows(t, 0, t.nr)
    hashes = devtab_u64(t.hashes)
    t.slots = block
    t.slot_mask = nr_slots - 1
    for row in range(t.nr):
        if row + DEVTAB_LOOKAHEAD < t.nr:
            devtab_fetch(block.data + 8 * (hashes[row + DEVTAB_LOOKAHEAD] & t.slot_mask))
        if alive[row] and devtab_index_insert(t, row) < 0:
            # Only rows from a mapping can do this: those that were added are distinct.
            fault.rule = RULE_DUPLICATE
            fault.row = row
            t.slots = old
            t.slot_mask = old_mask
            devtab_put(block)
            return -EINVAL
    devtab_put(old)
    return 0


cdef struct devtab_near:
    const uint8_t *path  # found last, NULL for none; its row; where its last name begins
    int32_t row
    uint64_t prefix


cdef inline int devtab_is_path(
    const devtab *t, uint64_t row, const uint8_t *path, uint64_t nbytes
) noexcept nogil:
    """Whether *path* is the device's path: its names are compared backwards along the parents."""
    cdef const int32_t *parents = devtab_i32(t.parents)
    cdef const uint64_t *offsets = devtab_u64(t.names.offsets)
    cdef const uint8_t *names = devtab_u8(t.names.data)
    cdef uint64_t size
    cdef int32_t at = <int32_t>row

    if not t.alive.data[row] or devtab_u16(t.path_bytes)[row] != nbytes:
        return 0
    while True:
        size = offsets[at + 1] - offsets[at]
        if size > nbytes or memcmp(path + (nbytes - size), names + offsets[at], size):
            return 0
        nbytes -= size
        at = parents[at]
        if at < 0 or nbytes == 0:
            return at < 0 and nbytes == 0
        nbytes -= 1
        if path[nbytes] != c"/":
            return 0


cdef inline bint devtab_is_near(
    const devtab *t, devtab_near *near, int32_t row, const uint8_t *path, uint64_t nbytes
) noexcept nogil:
    """:func:`devtab_is_path` for one path after the other: siblings have their parents in common.

    The path before, which *near* points to, must still be there.
    """
    cdef const int32_t *parents = devtab_i32(t.parents)
    cdef const uint64_t *names = devtab_u64(t.names.offsets)
    cdef uint64_t size = names[row + 1] - names[row], prefix = nbytes - size

    if (
        near.path != NULL and parents[row] == parents[near.row] and size < nbytes
        and prefix == near.prefix and t.alive.data[row]
        and memcmp(path + prefix, t.names.data.data + names[row], size) == 0
        and memcmp(path, near.path, prefix) == 0
    ):
        return True
    if not devtab_is_path(t, row, path, nbytes):
        return False
    near.path, near.row, near.prefix = path, row, prefix
    return True


cdef int64_t devtab_probe(
    const devtab *t, uint64_t hashed, const uint8_t *path, uint64_t nbytes
) noexcept nogil:
    cdef const uint64_t *slots = devtab_u64(t.slots)
    cdef uint64_t at = hashed & t.slot_mask
    cdef uint64_t row

    while slots[at]:
        if slots[at] >> 32 == hashed >> 32:
            row = <uint64_t>(<uint32_t>slots[at]) - 1
            if devtab_is_path(t, row, path, nbytes):
                return row
        at = (at + 1) & t.slot_mask
    return -1


cdef int devtab_find_paths(
    devtab *t,
    const uint8_t *data,
    const uint64_t *offsets,
    uint64_t count,
    const int32_t *hints,
    int32_t *rows,
    devtab_fault *fault,
) noexcept nogil:
    """Row of each path, -1 if there is none; the index is built once a hint misses."""
    cdef uint64_t hashes[DEVTAB_LOOKAHEAD]
    cdef uint64_t pending[DEVTAB_LOOKAHEAD]
    cdef const uint8_t *path
    cdef devtab_near near
    cdef uint64_t i = 0, stop = 0, k, nr, nbytes
    cdef int32_t hint
    cdef int rc

    memset(&near, 0, sizeof(near))
    while stop < count:
        i = stop
        stop = min(stop + DEVTAB_LOOKAHEAD, count)
        nr = 0
        for i in range(i, stop):
            path = data + offsets[i]
            nbytes = offsets[i + 1] - offsets[i]
            rows[i] = -1
            if nbytes == 0 or nbytes > DEVTAB_PATH_MAX:
                continue
            hint = hints[i] if hints != NULL else -1
            if 0 <= hint and <uint64_t>hint < t.nr and devtab_is_near(t, &near, hint, path, nbytes):
                rows[i] = hint
                continue
            if t.slots == NULL:
                rc = devtab_index_reserve(t, 0, fault)
                if rc < 0:
                    return rc
            hashes[nr] = devtab_hash_path(t, path, nbytes)
            devtab_fetch(t.slots.data + 8 * (hashes[nr] & t.slot_mask))
            pending[nr] = i
            nr += 1
        for k in range(nr):
            i = pending[k]
            rows[i] = <int32_t>devtab_probe(
                t, hashes[k], data + offsets[i], offsets[i + 1] - offsets[i]
            )
    return 0


# ---- append and remove -----------------------------------------------------------------------

cdef int devtab_names_valid(
    const uint64_t *offsets, const uint8_t *data, uint64_t count, devtab_fault *fault
) noexcept nogil:
    """Whether each of *count* names, whose offsets are valid, may be a device's."""
    cdef uint64_t row, size, nbytes = offsets[count] - offsets[0]
    cdef int look = nbytes and (
        memchr(data + offsets[0], c"/", nbytes) != NULL
        or memchr(data + offsets[0], 0, nbytes) != NULL
    )

    for row in range(count):
        size = offsets[row + 1] - offsets[row]
        fault.row = row
        if size == 0:
            fault.rule = RULE_NAME_EMPTY
            return 0
        if look and memchr(data + offsets[row], c"/", size) != NULL:
            fault.rule = RULE_NAME_SLASH
            return 0
        if look and memchr(data + offsets[row], 0, size) != NULL:
            fault.rule = RULE_NAME_NUL
            return 0
    return 1


cdef int devtab_write_codes(
    int32_t *column, const devtab_codes *codes, uint64_t count, uint64_t *bad
) noexcept nogil:
    """Write what each code stands for, -1 for itself; 0, with *bad* set, if one is unknown."""
    cdef uint64_t row
    cdef int32_t code

    for row in range(count):
        code = codes.values[row] if codes.values != NULL else codes.value
        if code < -1 or (codes.ids != NULL and code >= codes.nr_ids):
            bad[0] = row
            return 0
        column[row] = codes.ids[code] if codes.ids != NULL and code >= 0 else code
    return 1


cdef int devtab_link(
    devtab *t, const devtab_codes *codes, uint64_t count, devtab_fault *fault
) noexcept nogil:
    """Set parent, depth and length of the path of the rows behind the last one."""
    cdef uint64_t at = t.nr, row
    cdef int32_t *parents = devtab_i32(t.parents)
    cdef int32_t *depths = devtab_i32(t.depths)
    cdef uint16_t *path_bytes = devtab_u16(t.path_bytes)
    cdef const uint64_t *offsets = devtab_u64(t.names.offsets)
    cdef int32_t parent
    cdef uint64_t nbytes

    for row in range(at, at + count):
        parent = codes.values[row - at] if codes.values != NULL else codes.value
        fault.row = row - at
        if parent < -1 or parent >= <int64_t>row:
            fault.rule = RULE_PARENT
            return -EINVAL
        if parent >= 0 and <uint64_t>parent < at and not t.alive.data[parent]:
            fault.rule = RULE_PARENT_REMOVED
            return -EINVAL
        nbytes = offsets[row + 1] - offsets[row]
        if parent >= 0:
            nbytes += 1 + path_bytes[parent]
        if nbytes > DEVTAB_PATH_MAX:
            fault.rule = RULE_PATH_LENGTH
            return -EINVAL
        parents[row] = parent
        depths[row] = depths[parent] + 1 if parent >= 0 else 1
        path_bytes[row] = <uint16_t>nbytes
    return 0


cdef int devtab_reserve(devtab *t, uint64_t count) noexcept nogil:
    cdef uint64_t nr = t.nr, need = t.nr + count

    if (
        devtab_grow(&t.parents, nr * 4, need * 4) < 0
        or devtab_grow(&t.depths, nr * 4, need * 4) < 0
        or devtab_grow(&t.bus_ids, nr * 4, need * 4) < 0
        or devtab_grow(&t.driver_ids, nr * 4, need * 4) < 0
        or devtab_grow(&t.nodes, nr * 4, need * 4) < 0
        or devtab_grow(&t.alive, nr, need) < 0
        or devtab_grow(&t.path_bytes, nr * 2, need * 2) < 0
    ):
        return -ENOMEM
    return 0


cdef int devtab_append(devtab *t, const devtab_batch *batch, devtab_fault *fault) noexcept nogil:
    """Append a batch, or leave the table as it was: -ENOMEM, or -EINVAL and *fault*."""
    cdef uint64_t at = t.nr, count = batch.count
    cdef uint64_t row, undo
    cdef const uint64_t *hashes
    cdef int column, rc

    fault.row = 0
    if count > DEVTAB_DEVICES_MAX - at:
        fault.rule = RULE_TOO_MANY
        return -EINVAL
    if not devtab_rows_valid(&batch.names, count):
        fault.rule = RULE_OFFSETS
        return -EINVAL
    for column in range(batch.nr_columns):
        if not devtab_rows_valid(&batch.columns[column], count):
            fault.rule = RULE_COLUMN_OFFSETS
            return -EINVAL
    if not devtab_names_valid(batch.names.offsets, batch.names.data, count, fault):
        return -EINVAL

    # Everything that needs memory but the hashes comes first; nothing below `at` changes.
    if devtab_reserve(t, count) < 0 or devtab_write_rows(&t.names, at, &batch.names, count) < 0:
        return -ENOMEM
    for column in range(batch.nr_columns):
        if batch.columns[column].nbytes:
            rc = devtab_write_rows(&t.columns[column], at, &batch.columns[column], count)
            if rc < 0:
                return rc
    rc = devtab_link(t, &batch.parents, count, fault)
    if rc < 0:
        return rc
    if not devtab_write_codes(devtab_i32(t.bus_ids) + at, &batch.buses, count, &fault.row):
        fault.rule = RULE_BUS
        return -EINVAL
    if not devtab_write_codes(devtab_i32(t.driver_ids) + at, &batch.drivers, count, &fault.row):
        fault.rule = RULE_DRIVER
        return -EINVAL
    if not devtab_write_codes(devtab_i32(t.nodes) + at, &batch.nodes, count, &fault.row):
        fault.rule = RULE_NODE
        return -EINVAL
    memset(t.alive.data + at, 1, count)

    rc = devtab_index_reserve(t, count, fault)
    if rc < 0:
        return rc
    if devtab_grow(&t.hashes, at * 8, (at + count) * 8) < 0:
        return -ENOMEM
    devtab_hash_rows(t, at, at + count)
    hashes = devtab_u64(t.hashes)
    for row in range(at, at + count):
        if row + DEVTAB_LOOKAHEAD < at + count:
            devtab_fetch(t.slots.data + 8 * (hashes[row + DEVTAB_LOOKAHEAD] & t.slot_mask))
        if devtab_index_insert(t, row) < 0:
            for undo in range(at, row):
                devtab_index_delete(t, undo)
            fault.rule = RULE_DUPLICATE
            fault.row = row - at
            return -EINVAL

    # Commit: from here on nothing fails.
    t.names.rows = at + count
    for column in range(batch.nr_columns):
        if batch.columns[column].nbytes:
            t.columns[column].rows = at + count
    for row in range(at, at + count):
        if devtab_i32(t.depths)[row] > t.max_depth:
            t.max_depth = devtab_i32(t.depths)[row]
    t.nr_alive += count
    t.nr += count
    return 0


cdef int64_t devtab_remove(devtab *t, uint64_t row, devtab_fault *fault) noexcept nogil:
    """Mark *row* and its descendants as removed; return how many there were, or -errno."""
    cdef const int32_t *parents = devtab_i32(t.parents)
    cdef uint8_t *alive
    cdef int64_t nr = 0
    cdef uint64_t at
    cdef int rc

    if t.slots == NULL:
        rc = devtab_index_reserve(t, 0, fault)
        if rc < 0:
            return rc
    alive = devtab_u8(t.alive)
    if not alive[row]:
        return 0
    # Parents come before children, and no removed device has a child that is not: one pass.
    for at in range(row, t.nr):
        if alive[at] and (at == row or (parents[at] >= 0 and not alive[parents[at]])):
            devtab_index_delete(t, at)
            alive[at] = 0
            nr += 1
    t.nr_alive -= nr
    return nr


# ---- paths, order, eligibility ---------------------------------------------------------------

cdef int devtab_rows_exist(
    const devtab *t, const int32_t *rows, uint64_t count, devtab_fault *fault
) noexcept nogil:
    cdef uint64_t i

    for i in range(count):
        if rows[i] < 0 or <uint64_t>rows[i] >= t.nr:
            fault.rule = RULE_INDEX
            fault.row = i
            return 0
    return 1


cdef inline void devtab_write_path(const devtab *t, int32_t row, uint8_t *path) noexcept nogil:
    """Write the path of *row*, whose length its column holds, from its end to its start."""
    cdef const int32_t *parents = devtab_i32(t.parents)
    cdef const uint64_t *offsets = devtab_u64(t.names.offsets)
    cdef uint64_t size, left = devtab_u16(t.path_bytes)[row]

    while True:
        size = offsets[row + 1] - offsets[row]
        left -= size
        memcpy(path + left, t.names.data.data + offsets[row], size)
        row = parents[row]
        if row < 0:
            return
        left -= 1
        path[left] = c"/"


cdef void devtab_write_paths(
    const devtab *t, const int32_t *rows, uint64_t count, const uint64_t *offsets, uint8_t *data
) noexcept nogil:
    cdef const int32_t *parents = devtab_i32(t.parents)
    cdef const uint64_t *names = devtab_u64(t.names.offsets)
    cdef const uint8_t *last = NULL
    cdef int32_t last_parent = -1
    cdef uint64_t i, size, prefix
    cdef int32_t row

    for i in range(count):
        row = rows[i]
        if parents[row] >= 0 and parents[row] == last_parent:
            # A sibling of the device before has its path up to the name.
            size = names[row + 1] - names[row]
            prefix = devtab_u16(t.path_bytes)[row] - size
            memcpy(data + offsets[i], last, prefix)
            memcpy(data + offsets[i] + prefix, t.names.data.data + names[row], size)
            continue
        devtab_write_path(t, row, data + offsets[i])
        last = data + offsets[i]
        last_parent = parents[row]


cdef int devtab_preserve_order(
    const devtab *t, const uint8_t *requested, uint64_t nr, devtab_order *order
) noexcept nogil:
    """RFC v1 1.10: requested devices and all their ancestors, stable by depth, deepest first."""
    cdef const int32_t *parents = devtab_i32(t.parents)
    cdef const int32_t *depths = devtab_i32(t.depths)
    cdef uint8_t *seen = <uint8_t *>calloc(nr + 1, 1)
    cdef uint64_t *place = <uint64_t *>calloc(<size_t>t.max_depth + 2, sizeof(uint64_t))
    cdef uint64_t row, i, total = 0, size
    cdef int32_t at, depth

    order.nr = 0
    order.list = <int32_t *>malloc((nr + 1) * sizeof(int32_t))
    order.sorted = <int32_t *>malloc((nr + 1) * sizeof(int32_t))
    if seen == NULL or place == NULL or order.list == NULL or order.sorted == NULL:
        free(seen)
        free(place)
        return -ENOMEM

    for row in range(nr):
        if not requested[row] or not t.alive.data[row]:
            continue
        # The ancestors of a collected device are collected: the walk ends at the first such.
        at = <int32_t>row
        while at >= 0 and not seen[at]:
            seen[at] = 1
            order.list[order.nr] = at
            order.nr += 1
            place[depths[at]] += 1
            at = parents[at]

    for depth in range(t.max_depth, 0, -1):
        size = place[depth]
        place[depth] = total
        total += size
    for i in range(order.nr):
        depth = depths[order.list[i]]
        order.sorted[place[depth]] = order.list[i]
        place[depth] += 1
    free(seen)
    free(place)
    return 0


cdef int devtab_group_order(
    const devtab *t, const int32_t *group, int32_t nr_groups, devtab_order *order
) noexcept nogil:
    """Within a depth, bring a group's devices to the place of its first, in their order."""
    cdef const int32_t *depths = devtab_i32(t.depths)
    # A bundle is a group in one depth, or a device without one; numbered as they first appear.
    cdef uint64_t *place = <uint64_t *>calloc(order.nr + 1, sizeof(uint64_t))
    cdef int32_t *bundle = <int32_t *>malloc((order.nr + 1) * sizeof(int32_t))
    cdef int32_t *bundle_of = <int32_t *>malloc((<size_t>nr_groups + 1) * sizeof(int32_t))
    cdef int32_t *depth_of = <int32_t *>calloc(<size_t>nr_groups + 1, sizeof(int32_t))
    cdef int32_t nr = 0, wanted, row
    cdef uint64_t i, size, total = 0
    cdef int rc = -ENOMEM

    if place != NULL and bundle != NULL and bundle_of != NULL and depth_of != NULL:
        for i in range(order.nr):
            row = order.sorted[i]
            wanted = group[row]
            if wanted >= 0 and depth_of[wanted] == depths[row]:
                bundle[i] = bundle_of[wanted]
            else:
                bundle[i] = nr
                if wanted >= 0:
                    depth_of[wanted] = depths[row]
                    bundle_of[wanted] = nr
                nr += 1
            place[bundle[i]] += 1
        for i in range(<uint64_t>nr):
            size = place[i]
            place[i] = total
            total += size
        for i in range(order.nr):
            order.list[place[bundle[i]]] = order.sorted[i]
            place[bundle[i]] += 1
        order.list, order.sorted = order.sorted, order.list
        rc = 0
    free(place)
    free(bundle)
    free(bundle_of)
    free(depth_of)
    return rc


cdef void devtab_eligible(
    const devtab *t, const uint8_t *driver_ok, const uint8_t *bus_ok, uint64_t nr, uint8_t *passes
) noexcept nogil:
    """RFC v1 1.9: the device and every ancestor have a driver and a bus that pass, or none."""
    cdef const int32_t *parents = devtab_i32(t.parents)
    cdef const int32_t *drivers = devtab_i32(t.driver_ids)
    cdef const int32_t *buses = devtab_i32(t.bus_ids)
    cdef uint64_t row

    for row in range(nr):
        passes[row] = (
            t.alive.data[row]
            and (drivers[row] < 0 or driver_ok[drivers[row]])
            and (buses[row] < 0 or bus_ok[buses[row]])
            and (parents[row] < 0 or passes[parents[row]])
        )


# ---- glob ------------------------------------------------------------------------------------

cdef enum:
    GLOB_CHARACTER
    GLOB_ANY
    GLOB_STAR
    GLOB_SET
    GLOB_NOT_SET


cdef object devtab_compile_glob(str pattern):
    """Tokens (n, 3) and ranges (m, 2) of *pattern*, read as fnmatch.fnmatchcase() does."""
    tokens = []
    ranges = []
    cdef Py_ssize_t at = 0, end, k, stop = len(pattern)
    cdef bint after_star = False
    while at < stop:
        char = pattern[at]
        at += 1
        if char == "*" and after_star:
            continue
        after_star = char == "*"
        if char == "*":
            tokens.append((GLOB_STAR, 0, 0))
        elif char == "?":
            tokens.append((GLOB_ANY, 0, 0))
        elif char == "[":
            end = at + 1 if pattern[at:at + 1] == "!" else at
            end = pattern.find("]", end + 1)  # a bracket that comes first is a member
            if end < 0:
                tokens.append((GLOB_CHARACTER, ord("["), 0))
                continue
            members = pattern[at:end]
            at = end + 1
            negated = members.startswith("!")
            members = members[1:] if negated else members
            first = len(ranges)
            k = 0
            while k < len(members):
                if k + 2 < len(members) and members[k + 1] == "-":
                    if members[k] <= members[k + 2]:
                        ranges.append((ord(members[k]), ord(members[k + 2])))
                    k += 3
                else:
                    ranges.append((ord(members[k]), ord(members[k])))
                    k += 1
            tokens.append((GLOB_NOT_SET if negated else GLOB_SET, first, len(ranges) - first))
        else:
            tokens.append((GLOB_CHARACTER, ord(char), 0))
    return (
        np.array(tokens, dtype=np.uint32).reshape(-1, 3),
        np.array(ranges, dtype=np.uint32).reshape(-1, 2),
    )


cdef uint64_t devtab_decode(const uint8_t *data, uint64_t nbytes, uint32_t *text) noexcept nogil:
    """Characters of UTF-8 *data*; bytes that are none come out as surrogateescape has them."""
    cdef uint64_t at = 0, nr = 0, k
    cdef uint32_t char, size, low

    while at < nbytes:
        char = data[at]
        if char < 0x80:
            size = 1
        elif 0xC2 <= char < 0xE0:
            size, low, char = 2, 0x80, char & 0x1F
        elif 0xE0 <= char < 0xF0:
            size, low, char = 3, 0x800, char & 0x0F
        elif 0xF0 <= char < 0xF5:
            size, low, char = 4, 0x10000, char & 0x07
        else:
            size = 0
        if size > 1:
            if at + size > nbytes:
                size = 0
            for k in range(1, size):
                if data[at + k] & 0xC0 != 0x80:
                    size = 0
                    break
                char = char << 6 | (data[at + k] & 0x3F)
            if size and (char < low or char > 0x10FFFF or 0xD800 <= char < 0xE000):
                size = 0
        if size == 0:
            char = 0xDC00 | data[at]
            size = 1
        text[nr] = char
        nr += 1
        at += size
    return nr


cdef inline int devtab_token_takes(
    const devtab_token *token, const uint32_t *ranges, uint32_t char
) noexcept nogil:
    cdef uint32_t k

    if token.kind == GLOB_CHARACTER:
        return token.first == char
    if token.kind == GLOB_ANY:
        return 1
    for k in range(token.first, token.first + token.nr):
        if ranges[2 * k] <= char <= ranges[2 * k + 1]:
            return token.kind == GLOB_SET
    return token.kind == GLOB_NOT_SET


cdef int devtab_glob(
    const devtab_token *tokens, uint64_t nr_tokens, const uint32_t *ranges,
    const uint32_t *text, uint64_t nr,
) noexcept nogil:
    """Whether the whole text matches. A later star makes earlier ones final, so no recursion."""
    cdef uint64_t at = 0, token = 0, retry = 0
    cdef int64_t star = -1

    while at < nr:
        if token < nr_tokens and tokens[token].kind == GLOB_STAR:
            star = token
            retry = at
            token += 1
        elif token < nr_tokens and devtab_token_takes(&tokens[token], ranges, text[at]):
            token += 1
            at += 1
        elif star >= 0:
            retry += 1
            at = retry
            token = star + 1
        else:
            return 0
    while token < nr_tokens and tokens[token].kind == GLOB_STAR:
        token += 1
    return token == nr_tokens


cdef int devtab_match(
    const devtab *t, const devtab_token *tokens, uint64_t nr_tokens, const uint32_t *ranges,
    uint64_t nr, uint8_t *matches,
) noexcept nogil:
    cdef uint8_t *path = <uint8_t *>malloc(DEVTAB_PATH_MAX)
    cdef uint32_t *text = <uint32_t *>malloc(DEVTAB_PATH_MAX * sizeof(uint32_t))
    cdef uint64_t row, size

    if path == NULL or text == NULL:
        free(path)
        free(text)
        return -ENOMEM
    for row in range(nr):
        matches[row] = 0
        if t.alive.data[row]:
            devtab_write_path(t, <int32_t>row, path)
            size = devtab_decode(path, devtab_u16(t.path_bytes)[row], text)
            matches[row] = devtab_glob(tokens, nr_tokens, ranges, text, size)
    free(path)
    free(text)
    return 0


# ---- mapping ---------------------------------------------------------------------------------
#
# A table in a sealed memfd; native byte order, for another process on this machine. All sections
# are there, in this order, each at a multiple of 64 bytes.
#
#     0  8  magic "LUODEVS\0"         32  4  columns of the user (c)
#     8  4  version                   36  4  0
#    12  4  sections = 11 + 2c        40  8  bytes of the file
#    16  8  devices (n)               48 16  0
#    24  4  buses (b)
#    28  4  drivers (d)               64  -  sections: kind 4, column 4, offset 8, bytes 8
#
#     0 name offsets   u64 n+1         6 NUMA nodes      i32 n
#     1 names                          7 bytes of paths  u16 n
#     2 parents        i32 n           8 alive           u8  n
#     3 depths         i32 n           9 string offsets  u64 b+d+c+1
#     4 buses          i32 n          10 strings: names of buses, drivers, columns
#     5 drivers        i32 n          11 column offsets  u64 n+1,  12 column data: c times

cdef enum:
    DEVTAB_VERSION = 1
    DEVTAB_ALIGN = 64
    DEVTAB_FIXED_SECTIONS = 11

cdef bytes DEVTAB_MAGIC = b"LUODEVS\0"
cdef object DEVTAB_HEADER = struct.Struct("=8sIIQIIIIQ16x")
cdef object DEVTAB_SECTION = struct.Struct("=IIQQ")


cdef int devtab_offsets_valid(const uint64_t *offsets, uint64_t nr, uint64_t nbytes) noexcept nogil:
    """Whether *nr* + 1 offsets cut exactly *nbytes* bytes into rows."""
    cdef uint64_t row

    if offsets[0] != 0 or offsets[nr] != nbytes:
        return 0
    for row in range(nr):
        if offsets[row] > offsets[row + 1]:
            return 0
    return 1


cdef int devtab_validate(
    devtab *t, int32_t nr_buses, int32_t nr_drivers, devtab_fault *fault
) noexcept nogil:
    """Check what the rows of a mapping say before anybody relies on it; count them."""
    cdef const int32_t *parents = devtab_i32(t.parents)
    cdef const int32_t *depths = devtab_i32(t.depths)
    cdef const uint16_t *path_bytes = devtab_u16(t.path_bytes)
    cdef const uint8_t *alive = devtab_u8(t.alive)
    cdef const uint64_t *offsets = devtab_u64(t.names.offsets)
    cdef const int32_t *buses = devtab_i32(t.bus_ids)
    cdef const int32_t *drivers = devtab_i32(t.driver_ids)
    cdef const int32_t *nodes = devtab_i32(t.nodes)
    cdef uint64_t row, nbytes
    cdef int32_t parent, depth

    if not devtab_names_valid(offsets, devtab_u8(t.names.data), t.nr, fault):
        return -EINVAL
    for row in range(t.nr):
        fault.row = row
        parent = parents[row]
        if parent < -1 or parent >= <int64_t>row:
            fault.rule = RULE_PARENT
            return -EINVAL
        depth = 1
        nbytes = offsets[row + 1] - offsets[row]
        if parent >= 0:
            depth += depths[parent]
            nbytes += 1 + <uint64_t>path_bytes[parent]
        if depths[row] != depth:
            fault.rule = RULE_DEPTH
            return -EINVAL
        if nbytes != path_bytes[row]:
            fault.rule = RULE_PATH_BYTES
            return -EINVAL
        if alive[row] > 1 or (alive[row] and parent >= 0 and not alive[parent]):
            fault.rule = RULE_ALIVE
            return -EINVAL
        if buses[row] < -1 or buses[row] >= nr_buses:
            fault.rule = RULE_BUS
            return -EINVAL
        if drivers[row] < -1 or drivers[row] >= nr_drivers:
            fault.rule = RULE_DRIVER
            return -EINVAL
        if nodes[row] < -1:
            fault.rule = RULE_NODE
            return -EINVAL
        t.nr_alive += alive[row]
        if depth > t.max_depth:
            t.max_depth = depth
    return 0


@cython.final
@cython.auto_pickle(False)
cdef class _DeviceBytes:
    """Read-only buffer over a block of a table; it holds the block."""

    cdef devtab_block *block
    cdef Py_ssize_t nbytes

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.block.data, self.nbytes, 1, flags)

    def __dealloc__(self):
        devtab_put(self.block)


cdef object devtab_bytes(object name):
    if not isinstance(name, str):
        raise TypeError(f"{name!r}: not a str")
    return name.encode("utf-8", "surrogateescape")


cdef object devtab_text(object name):
    """*name* in the form in which it comes back from bytes."""
    return devtab_bytes(name).decode("utf-8", "surrogateescape")


cdef object devtab_int32(object value, str what):
    number = PyNumber_Index(value)
    if not -1 <= number <= 0x7FFFFFFF:
        raise ValueError(f"{what} {number}: not in -1..2147483647")
    return number


cdef int devtab_intern(list names, dict ids, object name, str kind) except -1:
    """Number of *name*, a new one if need be."""
    known = ids.get(name)
    if known is not None:
        return known
    name = devtab_text(name)
    if not name:
        raise ValueError(f"{kind}: empty name")
    known = ids.get(name)
    if known is None:
        known = len(names)
        names.append(name)
        ids[name] = known
    return known


cdef int devtab_forget_names(list names, dict ids, Py_ssize_t keep) except -1:
    while len(names) > keep:
        del ids[names.pop()]
    return 0


cdef int devtab_add_columns(devtab *t, int nr) noexcept nogil:
    cdef devtab_ragged *columns

    columns = <devtab_ragged *>realloc(t.columns, <size_t>nr * sizeof(devtab_ragged))
    if columns == NULL:
        return -ENOMEM
    t.columns = columns
    memset(columns + t.nr_columns, 0, <size_t>(nr - t.nr_columns) * sizeof(devtab_ragged))
    t.nr_columns = nr
    return 0


cdef void devtab_drop_columns(devtab *t, int keep) noexcept nogil:
    while t.nr_columns > keep:
        t.nr_columns -= 1
        devtab_put(t.columns[t.nr_columns].data)
        devtab_put(t.columns[t.nr_columns].offsets)


cdef object devtab_view(object data, list keep):
    """The bytes of *data*, pinned in *keep* for as long as pointers into them are in use."""
    view = memoryview(data)
    if view.nbytes == 0:
        return None
    view = view.cast("B")
    keep.append(view)
    return view


cdef int devtab_take_rows(devtab_rows *rows, object data, list keep) except -1:
    cdef const uint8_t[::1] view
    pinned = devtab_view(data, keep)
    rows.data = NULL
    rows.nbytes = 0
    if pinned is not None:
        view = pinned
        rows.data = &view[0]
        rows.nbytes = view.shape[0]
    return 0


cdef int devtab_take_offsets(
    devtab_rows *rows, object offsets, uint64_t count, list keep, str what
) except -1:
    cdef const uint64_t[::1] view = offsets
    if <uint64_t>view.shape[0] != count + 1:
        raise ValueError(f"{what}: {view.shape[0]} offsets for {count} rows, not {count + 1}")
    keep.append(memoryview(offsets))
    rows.offsets = &view[0]
    return 0


cdef int devtab_take_codes(
    devtab_codes *codes, object values, uint64_t count, list keep, str what
) except -1:
    cdef const int32_t[::1] view = values
    if <uint64_t>view.shape[0] != count:
        raise ValueError(f"{what}: {view.shape[0]} values for {count} devices")
    keep.append(memoryview(values))
    codes.values = &view[0] if count else NULL
    return 0


cdef int devtab_take_names(
    devtab_codes *codes, object given, uint64_t count, list keep, str what, list names, dict ids
) except -1:
    """Codes of a batch and what they stand for here, interning names that are new."""
    cdef int32_t[::1] here
    cdef Py_ssize_t i
    codes.value = -1
    if given is None:
        return 0
    values, wanted = given
    wanted = tuple(wanted)
    known = np.empty(len(wanted) + 1, dtype=np.int32)
    here = known
    for i, name in enumerate(wanted):
        here[i] = devtab_intern(names, ids, name, what)
    keep.append(memoryview(known))
    codes.ids = &here[0]
    codes.nr_ids = len(wanted)
    if values is not None:
        devtab_take_codes(codes, values, count, keep, what)
    elif len(wanted) == 1:
        codes.value = 0
    else:
        raise ValueError(f"{what}: {len(wanted)} names and no codes")
    return 0


cdef void devtab_write_numbers(
    uint64_t first, uint64_t count, const uint8_t *prefix, uint64_t nr_prefix,
    uint64_t *offsets, uint8_t *data,
) noexcept nogil:
    """Write <prefix><first>, <prefix><first+1>, …; without *data* only where each one ends."""
    cdef uint64_t i, number, digits = 1, limit = 10, at = 0

    offsets[0] = 0
    for i in range(count):
        number = first + i
        while number >= limit:  # numbers stay below 10^19, the greatest limit
            digits += 1
            limit *= 10
        at += nr_prefix + digits
        offsets[i + 1] = at
        if data != NULL:
            if nr_prefix:
                memcpy(data + offsets[i], prefix, nr_prefix)
            for at in range(at, at - digits, -1):
                data[at - 1] = c"0" + <uint8_t>(number % 10)
                number //= 10
            at = offsets[i + 1]


cdef object DEVTAB_INT32 = np.dtype(np.int32)
cdef object DEVTAB_UINT64 = np.dtype(np.uint64)
cdef object DEVTAB_UINT16 = np.dtype(np.uint16)
cdef object DEVTAB_UINT8 = np.dtype(np.uint8)
cdef object DEVTAB_BOOL = np.dtype(np.bool_)


cdef object devtab_listed(const devtab_order *order):
    """The sorted list as an array."""
    cdef int32_t[::1] target
    result = np.empty(order.nr, np.int32)
    if order.nr:
        target = result
        memcpy(&target[0], order.sorted, order.nr * sizeof(int32_t))
    return result


@cython.final
@cython.auto_pickle(False)
cdef class DeviceTable:
    """Columns of the machine's devices: names, parents, buses, drivers, NUMA nodes, user data.

    A device is a row number, given in the order of adding and never reused; a parent comes before
    its children. Arguments and results are arrays; :class:`luo.machine.DeviceTree` has the
    convenient forms. A path is the names from the root to the device, joined by ``/``, without
    one in front. Arrays are read-only views; after adding, take them again.

    Args:
        hash_bits: how many bits of the path hash are kept, 1..64; few of them provoke collisions.

    Context:
        Any thread. Bulk work releases the GIL and holds the table's own lock.
    """

    def __cinit__(self, *, hash_bits=64):
        bits = PyNumber_Index(hash_bits)
        if not 1 <= bits <= 64:
            raise ValueError(f"hash_bits {bits}: not in 1..64")
        self.t.hash_mask = 0xFFFFFFFFFFFFFFFF >> <uint64_t>(64 - bits)
        self.t.seed[0], self.t.seed[1] = struct.unpack("=QQ", os.urandom(16))
        self.writer = threading.RLock()
        self.buses, self.bus_of = [], {}
        self.drivers, self.driver_of = [], {}
        self.user_columns, self.column_of = [], {}

    def __dealloc__(self):
        devtab_drop_columns(&self.t, 0)
        free(self.t.columns)
        devtab_put(self.t.names.data)
        devtab_put(self.t.names.offsets)
        devtab_put(self.t.parents)
        devtab_put(self.t.depths)
        devtab_put(self.t.bus_ids)
        devtab_put(self.t.driver_ids)
        devtab_put(self.t.nodes)
        devtab_put(self.t.alive)
        devtab_put(self.t.path_bytes)
        devtab_put(self.t.hashes)
        devtab_put(self.t.slots)

    # ---- views -------------------------------------------------------------------------------

    cdef object array(self, devtab_block **where, object dtype, uint64_t count):
        cdef devtab_block *block
        if count == 0:
            empty = np.empty(0, dtype=dtype)
            empty.flags.writeable = False
            return empty
        cdef _DeviceBytes view = _DeviceBytes.__new__(_DeviceBytes)
        cdef Py_ssize_t nbytes = count * <uint64_t>dtype.itemsize
        with nogil:
            with self.lock:
                block = where[0]
                devtab_refs_add(&block.refs, 1)
        view.block = block
        view.nbytes = nbytes
        return np.frombuffer(view, dtype=dtype)

    cdef tuple ragged(self, devtab_ragged *column):
        cdef int rc
        cdef uint64_t nr, nbytes
        with nogil:
            with self.lock:
                nr = self.t.nr
                rc = devtab_pad(column, nr)
                nbytes = devtab_u64(column.offsets)[nr] if rc == 0 else 0
        check(rc, "column")
        return (
            self.array(&column.data, DEVTAB_UINT8, nbytes),
            self.array(&column.offsets, DEVTAB_UINT64, nr + 1),
        )

    def __len__(self):
        return self.t.nr_alive

    @property
    def nr_rows(self):
        """Rows ever added: indices are below it, those of removed devices too."""
        return self.t.nr

    @property
    def max_depth(self):
        """Greatest depth ever added; a root has 1, no rows 0."""
        return self.t.max_depth

    @property
    def readonly(self):
        """Whether the table lies on a sealed memfd."""
        return bool(self.mapped)

    @property
    def nbytes(self):
        """Bytes that the columns, the names and the path index have room for."""
        cdef uint64_t total
        with nogil:
            with self.lock:
                total = devtab_nbytes(&self.t)
        return total

    @property
    def parents(self):
        """Row of each parent, -1 for a root: int32."""
        return self.array(&self.t.parents, DEVTAB_INT32, self.t.nr)

    @property
    def depths(self):
        """Distance from above the root: int32, a root has 1."""
        return self.array(&self.t.depths, DEVTAB_INT32, self.t.nr)

    @property
    def bus_ids(self):
        """Index into :attr:`bus_names`, -1 for none: int32."""
        return self.array(&self.t.bus_ids, DEVTAB_INT32, self.t.nr)

    @property
    def driver_ids(self):
        """Index into :attr:`driver_names`, -1 for none: int32."""
        return self.array(&self.t.driver_ids, DEVTAB_INT32, self.t.nr)

    @property
    def nodes(self):
        """NUMA node, -1 for none: int32."""
        return self.array(&self.t.nodes, DEVTAB_INT32, self.t.nr)

    @property
    def alive(self):
        """False for removed devices: bool."""
        return self.array(&self.t.alive, DEVTAB_BOOL, self.t.nr)

    @property
    def path_bytes(self):
        """Bytes of each full path: uint16."""
        return self.array(&self.t.path_bytes, DEVTAB_UINT16, self.t.nr)

    @property
    def names(self):
        """Names of the devices: (uint8 data, uint64 offsets of shape (n+1,))."""
        return self.ragged(&self.t.names)

    @property
    def bus_names(self):
        """Names of the buses, by id."""
        return list(self.buses)

    @property
    def driver_names(self):
        """Names of the drivers, by id."""
        return list(self.drivers)

    @property
    def column_names(self):
        """Names of the user's columns, in the order in which they came up."""
        return list(self.user_columns)

    cdef int column_id(self, object name) except -1:
        known = self.column_of.get(name)
        if known is None:
            raise KeyError(f"column {name!r}: there is none")
        return known

    def column(self, name):
        """Return (uint8 data, uint64 offsets of shape (n+1,)) of the user's column *name*.

        Raises:
            KeyError: no device was ever given such a column.
        """
        return self.ragged(&self.t.columns[self.column_id(name)])

    def sizes(self, name, const int32_t[::1] rows not None):
        """Return how many bytes each of *rows* has in the column *name*: uint64.

        Raises:
            KeyError: no such column.
            IndexError: no such row.
        """
        cdef int column = self.column_id(name)
        cdef uint64_t i, count = rows.shape[0]
        cdef const uint8_t *data
        cdef devtab_fault fault
        cdef bint valid
        result = np.empty(count, dtype=np.uint64)
        cdef uint64_t[::1] sizes = result
        if count == 0:
            return result
        with nogil:
            with self.lock:
                valid = devtab_rows_exist(&self.t, &rows[0], count, &fault)
                for i in range(count if valid else 0):
                    sizes[i] = devtab_row(&self.t.columns[column], rows[i], &data)
        if not valid:
            raise IndexError(f"sizes: no device {rows[fault.row]}")
        return result

    def row(self, name, row):
        """Return what one device has in the column *name*, as bytes.

        Raises:
            KeyError: no such column.
            IndexError: no such row.
        """
        cdef int column = self.column_id(name)
        cdef uint64_t at, size
        cdef const uint8_t *data
        number = PyNumber_Index(row)
        if not 0 <= number < self.t.nr:
            raise IndexError(f"row {name!r}: no device {number}")
        at = number
        with self.lock:
            size = devtab_row(&self.t.columns[column], at, &data)
            return (<const char *>data)[:size] if size else b""

    def gather(self, name, const int32_t[::1] rows not None, out=None):
        """Copy the column *name* of *rows*, which all have k bytes there, into an array.

        Args:
            name: of a user's column.
            rows: shape (n,), int32.
            out: shape (n, k), uint8, C-contiguous, or None for a new array.

        Returns:
            *out*.

        Raises:
            KeyError: no such column.
            IndexError: no such row.
            ValueError: the rows differ in size, or *out* has another shape.
        """
        cdef int column = self.column_id(name)
        cdef uint64_t i, size, width = 0, count = rows.shape[0]
        cdef const uint8_t *data
        cdef devtab_fault fault
        cdef bint valid = True
        cdef uint8_t[:, ::1] target

        if count:
            with nogil:
                with self.lock:
                    valid = devtab_rows_exist(&self.t, &rows[0], count, &fault)
                    for i in range(count if valid else 0):
                        size = devtab_row(&self.t.columns[column], rows[i], &data)
                        if i == 0:
                            width = size
                        elif size != width:
                            fault.rule = RULE_ROW_SIZE
                            fault.row = i
                            valid = False
                            break
            if not valid and fault.rule == RULE_ROW_SIZE:
                raise ValueError(
                    f"gather {name!r}: device {rows[fault.row]} has {size} bytes,"
                    f" device {rows[0]} has {width}"
                )
            if not valid:
                raise IndexError(f"gather {name!r}: no device {rows[fault.row]}")

        result = np.empty((count, width), dtype=np.uint8) if out is None else out
        target = result
        if count == 0:
            width = target.shape[1]  # no row says how wide it is
        if <uint64_t>target.shape[0] != count or <uint64_t>target.shape[1] != width:
            raise ValueError(
                f"gather {name!r}: out is {target.shape[0]} x {target.shape[1]},"
                f" not {count} x {width}"
            )
        if count and width:
            with nogil:
                with self.lock:
                    for i in range(count):
                        devtab_row(&self.t.columns[column], rows[i], &data)
                        memcpy(&target[i, 0], data, width)
        return result

    @staticmethod
    def numbered(prefix, first, count):
        """Return the names <prefix><first>, <prefix><first+1>, … as (data, offsets).

        Args:
            prefix: str.
            first: the first number, 0 or more.
            count: how many names.

        Raises:
            ValueError: a number is below 0, or there are more names than devices can be.
        """
        cdef bytes head = devtab_bytes(prefix)
        cdef const uint8_t *start = <const uint8_t *><const char *>head
        cdef uint64_t nr_head = len(head)
        cdef uint64_t[::1] offsets
        cdef uint8_t[::1] data
        cdef uint64_t number, nr
        first = PyNumber_Index(first)
        count = PyNumber_Index(count)
        if not (0 <= first < 1 << 63 and 0 <= count <= DEVTAB_DEVICES_MAX):
            raise ValueError(f"names: {count} from {first}")
        number, nr = first, count
        offset_array = np.zeros(count + 1, dtype=np.uint64)
        offsets = offset_array
        with nogil:
            devtab_write_numbers(number, nr, start, nr_head, &offsets[0], NULL)
        result = np.empty(offsets[nr], dtype=np.uint8)
        if nr:
            data = result
            with nogil:
                devtab_write_numbers(number, nr, start, nr_head, &offsets[0], &data[0])
        return result, offset_array

    # ---- adding and removing -----------------------------------------------------------------

    cdef int undo_names(self, int buses, int drivers, int columns) except -1:
        devtab_forget_names(self.buses, self.bus_of, buses)
        devtab_forget_names(self.drivers, self.driver_of, drivers)
        devtab_forget_names(self.user_columns, self.column_of, columns)
        with nogil:
            with self.lock:
                devtab_drop_columns(&self.t, columns)
        return 0

    cdef int take_columns(self, devtab_batch *batch, object columns, list keep) except -1:
        """Fill the batch's rows of the user's columns, making those that are new."""
        cdef devtab_rows *rows
        cdef int nr, rc, column
        if columns:
            for name in columns:
                devtab_intern(self.user_columns, self.column_of, name, "column")
        nr = len(self.user_columns)
        if nr == 0:
            return 0
        if nr > self.t.nr_columns:
            with nogil:
                with self.lock:
                    rc = devtab_add_columns(&self.t, nr)
            check(rc, "columns")
        batch.columns = <devtab_rows *>calloc(nr, sizeof(devtab_rows))
        if batch.columns == NULL:
            raise MemoryError(f"{nr} columns")
        batch.nr_columns = nr
        for name, value in columns.items() if columns else ():
            column = self.column_of[devtab_text(name)]
            rows = &batch.columns[column]
            data, shape = value
            devtab_take_rows(rows, data, keep)
            if shape is None:
                rows.same = 1
                rows.stride = rows.nbytes
            elif isinstance(shape, int):
                rows.stride = shape
                if rows.nbytes != shape * batch.count:
                    raise ValueError(
                        f"column {name!r}: {rows.nbytes} bytes, not {batch.count} rows of {shape}"
                    )
            else:
                devtab_take_offsets(rows, shape, batch.count, keep, f"column {name!r}")
        return 0

    cdef int append(self, devtab_batch *batch, str what) except -1:
        cdef devtab_fault fault
        cdef int rc
        cdef int32_t parent
        cdef uint64_t start, nbytes
        with nogil:
            with self.lock:
                rc = devtab_append(&self.t, batch, &fault)
        if rc == -EINVAL:
            rule = DEVTAB_RULES[<int>fault.rule]
            if fault.rule in (RULE_TOO_MANY, RULE_OFFSETS, RULE_COLUMN_OFFSETS):
                raise ValueError(f"{what}: {rule}")
            start = batch.names.offsets[fault.row]
            nbytes = batch.names.offsets[fault.row + 1] - start
            name = b"" if nbytes == 0 else (<const char *>batch.names.data)[start:start + nbytes]
            name = name.decode("utf-8", "surrogateescape")
            where = f" row {fault.row}" if batch.count > 1 else ""
            parent = batch.parents.value
            if batch.parents.values != NULL:
                parent = batch.parents.values[fault.row]
            if fault.rule in (RULE_PARENT, RULE_PARENT_REMOVED):
                rule = f"{rule}: {parent}"
            elif 0 <= parent and <uint64_t>parent < self.t.nr:
                rule = f"{rule}, below {self.path(parent)!r}"
            elif parent >= 0:
                rule = f"{rule}, below row {parent - self.t.nr}"
            raise ValueError(f"{what}{where}, {name!r}: {rule}")
        return check(rc, what)

    def add(self, name, parent=-1, bus=None, driver=None, node=0, columns=None):
        """Add one device; see :meth:`luo.machine.DeviceTree.add`.

        Args:
            name: str.
            parent: row, or -1.
            bus: name, or None.
            driver: name, or None.
            node: NUMA node, -1 for none.
            columns: dict of name to bytes, or None.

        Returns:
            The device's row.
        """
        cdef devtab_batch batch
        cdef uint64_t offsets[2]
        cdef int32_t bus_id, driver_id
        cdef int nr_buses, nr_drivers, nr_columns
        cdef list keep = []
        memset(&batch, 0, sizeof(batch))
        batch.count = 1
        devtab_take_rows(&batch.names, devtab_bytes(name), keep)
        offsets[0] = 0
        offsets[1] = batch.names.nbytes
        batch.names.offsets = offsets
        batch.parents.value = devtab_int32(parent, "parent")
        batch.nodes.value = devtab_int32(node, "node")
        if columns:
            columns = {key: (value, None) for key, value in columns.items()}
        with self.writer:
            self.refuse_if_mapped("add")
            nr_buses, nr_drivers = len(self.buses), len(self.drivers)
            nr_columns = len(self.user_columns)
            try:
                batch.buses.value = -1
                if bus is not None:
                    bus_id = devtab_intern(self.buses, self.bus_of, bus, "bus")
                    batch.buses.value = bus_id
                batch.drivers.value = -1
                if driver is not None:
                    driver_id = devtab_intern(self.drivers, self.driver_of, driver, "driver")
                    batch.drivers.value = driver_id
                self.take_columns(&batch, columns, keep)
                self.append(&batch, "add")
            except BaseException:
                self.undo_names(nr_buses, nr_drivers, nr_columns)
                raise
            finally:
                free(batch.columns)
            return self.t.nr - 1

    def add_many(self, name_data, name_offsets, parents=None, buses=None, drivers=None,
                 nodes=0, columns=None):
        """Add devices, all or none.

        Args:
            name_data: bytes of all names.
            name_offsets: shape (n+1,), uint64: where they begin and end.
            parents: shape (n,), int32, rows or -1; None for no parents. A parent may be one of
                the same call.
            buses: (codes, names): shape (n,) int32 indices into the list of names, -1 none;
                codes None: the only name is everybody's; or None.
            drivers: as buses.
            nodes: shape (n,), int32; or an int for all.
            columns: dict of name to (data, shape), where shape is the size of each row, offsets
                (shape (n+1,), uint64), or None if data is one row for all.

        Returns:
            The rows, as a range.

        Raises:
            TypeError: an array has another type.
            ValueError: a length is wrong, a name is empty, taken by a sibling or holds '/' or
                NUL, a path is too long, a parent is not an earlier device that is still there.
            KhoError: EROFS if the table lies on a memfd, ENOMEM.
        """
        cdef devtab_batch batch
        cdef uint64_t first
        cdef int nr_buses, nr_drivers, nr_columns
        cdef list keep = []
        cdef int32_t[::1] ids
        memset(&batch, 0, sizeof(batch))
        batch.count = len(name_offsets) - 1 if len(name_offsets) else 0
        devtab_take_rows(&batch.names, name_data, keep)
        devtab_take_offsets(&batch.names, name_offsets, batch.count, keep, "names")
        batch.parents.value = -1
        if parents is not None:
            devtab_take_codes(&batch.parents, parents, batch.count, keep, "parents")
        if isinstance(nodes, int):
            batch.nodes.value = devtab_int32(nodes, "node")
        else:
            devtab_take_codes(&batch.nodes, nodes, batch.count, keep, "nodes")
        with self.writer:
            self.refuse_if_mapped("add_many")
            nr_buses, nr_drivers = len(self.buses), len(self.drivers)
            nr_columns = len(self.user_columns)
            first = self.t.nr
            try:
                devtab_take_names(&batch.buses, buses, batch.count, keep, "bus",
                                  self.buses, self.bus_of)
                devtab_take_names(&batch.drivers, drivers, batch.count, keep, "driver",
                                  self.drivers, self.driver_of)
                self.take_columns(&batch, columns, keep)
                if batch.count:
                    self.append(&batch, "add_many")
                else:
                    self.undo_names(nr_buses, nr_drivers, nr_columns)
            except BaseException:
                self.undo_names(nr_buses, nr_drivers, nr_columns)
                raise
            finally:
                free(batch.columns)
            return range(first, first + batch.count)

    cdef int refuse_if_mapped(self, str what) except -1:
        if self.mapped:
            raise KhoError(EROFS, f"{what}: the table lies on a sealed memfd")
        return 0

    def remove(self, row):
        """Remove the device *row* and its descendants; their rows stay, marked.

        Returns:
            How many devices were removed.

        Raises:
            IndexError: there is no such device, or not any more.
            KhoError: EROFS if the table lies on a memfd.
        """
        cdef int64_t rc = 0
        cdef uint64_t at
        cdef devtab_fault fault
        number = PyNumber_Index(row)
        with self.writer:
            self.refuse_if_mapped("remove")
            if not 0 <= number < self.t.nr:
                raise IndexError(f"remove: no device {number}")
            at = number
            with nogil:
                with self.lock:
                    rc = devtab_remove(&self.t, at, &fault)
        if rc == 0:
            raise IndexError(f"remove: no device {number}")
        if rc < 0:
            check(<int>rc, "remove")
        return rc

    # ---- finding -----------------------------------------------------------------------------

    cdef int index_built(self, int rc, devtab_fault *fault) except -1:
        if rc == -EINVAL:
            raise HandoverError(f"device table: row {fault.row}: {DEVTAB_RULES[<int>fault.rule]}")
        return check(rc, "index of paths")

    def index(self):
        """Build the path index now, not at the first search that needs it.

        Raises:
            HandoverError: the table came from a memfd, and two devices have one path.
        """
        cdef devtab_fault fault
        cdef int rc
        with nogil:
            with self.lock:
                rc = devtab_index_reserve(&self.t, 0, &fault)
        self.index_built(rc, &fault)

    def find(self, path):
        """Return the row of the device with the path *path*, or -1."""
        cdef devtab_fault fault
        cdef int rc = 0
        cdef int32_t row = -1
        cdef uint64_t offsets[2]
        cdef bytes encoded = devtab_bytes(path)
        cdef const uint8_t *data = <const uint8_t *><const char *>encoded
        offsets[0] = 0
        offsets[1] = len(encoded)
        with nogil:
            with self.lock:
                rc = devtab_find_paths(&self.t, data, offsets, 1, NULL, &row, &fault)
        self.index_built(rc, &fault)
        return row

    def find_paths(self, const uint8_t[::1] data not None, const uint64_t[::1] offsets not None,
                   const int32_t[::1] hints=None):
        """Return the row of each path, -1 if no device has it: int32.

        Args:
            data: bytes of all paths.
            offsets: shape (n+1,), uint64: where they begin and end.
            hints: shape (n,), int32: the row to look at first; any value may be wrong.

        Raises:
            ValueError: offsets decrease or exceed the data, or hints are not n.
            HandoverError: as :meth:`index`.
        """
        cdef devtab_fault fault
        cdef devtab_rows rows
        cdef uint64_t count
        cdef const uint8_t *first = &data[0] if data.shape[0] else NULL
        cdef const int32_t *hint = NULL
        cdef bint valid
        cdef int rc = 0
        cdef int32_t[::1] found
        if offsets.shape[0] == 0:
            raise ValueError("find_paths: no offsets")
        count = offsets.shape[0] - 1
        if hints is not None:
            if <uint64_t>hints.shape[0] != count:
                raise ValueError(f"find_paths: {hints.shape[0]} hints for {count} paths")
            hint = &hints[0] if count else NULL
        memset(&rows, 0, sizeof(rows))
        rows.offsets = &offsets[0]
        rows.nbytes = data.shape[0]
        with nogil:
            valid = devtab_rows_valid(&rows, count)
        if not valid:
            raise ValueError("find_paths: offsets decrease or exceed the data")
        result = np.empty(count, dtype=np.int32)
        found = result
        if count:
            with nogil:
                with self.lock:
                    rc = devtab_find_paths(
                        &self.t, first, &offsets[0], count, hint, &found[0], &fault
                    )
            self.index_built(rc, &fault)
        return result

    def path(self, row):
        """Return the path of the device *row*, a removed one's too.

        Raises:
            IndexError: no such row.
        """
        cdef int32_t at
        cdef uint64_t nbytes = 0
        cdef uint8_t[::1] target
        number = PyNumber_Index(row)
        if not 0 <= number < self.t.nr:
            raise IndexError(f"path: no device {number}")
        at = number
        with nogil:
            with self.lock:
                nbytes = devtab_u16(self.t.path_bytes)[at]
        data = bytearray(nbytes)
        target = data
        with nogil:
            with self.lock:
                devtab_write_path(&self.t, at, &target[0])
        return data.decode("utf-8", "surrogateescape")

    def paths(self, const int32_t[::1] rows not None, bint terminated=False):
        """Return the paths of *rows*: (uint8 data, uint64 offsets of shape (n+1,)).

        Args:
            rows: int32.
            terminated: with a NUL after each.

        Raises:
            IndexError: no such row.
        """
        cdef uint64_t i, count = rows.shape[0]
        cdef devtab_fault fault
        cdef bint valid
        cdef const uint16_t *path_bytes
        offset_array = np.zeros(count + 1, dtype=np.uint64)
        cdef uint64_t[::1] offsets = offset_array
        cdef uint8_t[::1] target
        if count == 0:
            return np.empty(0, dtype=np.uint8), offset_array
        with nogil:
            with self.lock:
                valid = devtab_rows_exist(&self.t, &rows[0], count, &fault)
                path_bytes = devtab_u16(self.t.path_bytes)
                for i in range(count if valid else 0):
                    offsets[i + 1] = offsets[i] + path_bytes[rows[i]] + terminated
        if not valid:
            raise IndexError(f"paths: no device {rows[fault.row]}")
        data = np.empty(offsets[count], dtype=np.uint8)
        target = data
        with nogil:
            with self.lock:
                devtab_write_paths(&self.t, &rows[0], count, &offsets[0], &target[0])
            for i in range(count if terminated else 0):
                target[offsets[i + 1] - 1] = 0
        return data, offset_array

    # ---- what a live update asks ---------------------------------------------------------------

    def preserve_order(self, const uint8_t[::1] requested not None):
        """Return the devices to preserve, children first: int32; see RFC v1, 1.10.

        Args:
            requested: shape (n,): not 0 for a device that user space asked for.

        Raises:
            ValueError: it has another length.
        """
        cdef uint64_t nr = self.t.nr
        cdef devtab_order order
        cdef int rc
        if <uint64_t>requested.shape[0] != nr:
            raise ValueError(f"preserve_order: {requested.shape[0]} flags for {nr} rows")
        if nr == 0:
            return np.empty(0, dtype=np.int32)
        memset(&order, 0, sizeof(order))
        try:
            with nogil:
                with self.lock:
                    rc = devtab_preserve_order(&self.t, &requested[0], nr, &order)
            check(rc, "preserve_order")
            return devtab_listed(&order)
        finally:
            free(order.list)
            free(order.sorted)

    def group_order(self, const int32_t[::1] order not None, const int32_t[::1] group not None):
        """Bring the groups of a list together: int32.

        Args:
            order: what :meth:`preserve_order` returned.
            group: shape (n,), int32: devices of one depth and one value >= 0 are brought together
                at the place of the first of them; -1 for none.

        Raises:
            IndexError: no such device.
            ValueError: *group* has another length, or a value below -1.
        """
        cdef uint64_t nr = self.t.nr
        cdef devtab_order made
        cdef devtab_fault fault
        cdef int32_t nr_groups
        cdef int rc
        cdef const int32_t[::1] groups = group
        if <uint64_t>group.shape[0] != nr:
            raise ValueError(f"group_order: {group.shape[0]} groups for {nr} rows")
        if order.shape[0] == 0:
            return np.empty(0, np.int32)
        if not devtab_rows_exist(&self.t, &order[0], order.shape[0], &fault):
            raise IndexError(f"group_order: no device {order[fault.row]}")
        values = np.asarray(group)
        if int(values.min()) < -1:
            raise ValueError(f"group_order: group {values.min()}: below -1")
        if int(values.max()) > 2 * nr + 1024:
            # Sparse numbers are made dense: memory goes by how many, not by how large.
            ungrouped = values < 0
            values = np.unique(values, return_inverse=True)[1].astype(np.int32)
            values[ungrouped] = -1
            groups = values
        nr_groups = int(values.max()) + 1
        memset(&made, 0, sizeof(made))
        try:
            made.nr = order.shape[0]
            made.list = <int32_t *>xmalloc(made.nr * sizeof(int32_t))
            made.sorted = <int32_t *>xmalloc(made.nr * sizeof(int32_t))
            memcpy(made.sorted, &order[0], made.nr * sizeof(int32_t))
            with nogil:
                with self.lock:
                    rc = devtab_group_order(&self.t, &groups[0], nr_groups, &made)
            check(rc, "group_order")
            return devtab_listed(&made)
        finally:
            free(made.list)
            free(made.sorted)

    def eligible(self, const uint8_t[::1] driver_ok not None, const uint8_t[::1] bus_ok not None):
        """Return which devices may be requested: bool, shape (n,); see RFC v1, 1.9.

        Args:
            driver_ok: not 0 for each driver, by id, that supports live update.
            bus_ok: the same for buses.

        Raises:
            ValueError: an array is shorter than there are ids.
        """
        cdef uint64_t nr = self.t.nr
        cdef const uint8_t *drivers = &driver_ok[0] if driver_ok.shape[0] else NULL
        cdef const uint8_t *buses = &bus_ok[0] if bus_ok.shape[0] else NULL
        cdef uint8_t[::1] passes
        if driver_ok.shape[0] < len(self.drivers) or bus_ok.shape[0] < len(self.buses):
            raise ValueError(
                f"eligible: {driver_ok.shape[0]} drivers and {bus_ok.shape[0]} buses,"
                f" not {len(self.drivers)} and {len(self.buses)}"
            )
        result = np.empty(nr, dtype=np.bool_)
        if nr:
            passes = result.view(np.uint8)
            with nogil:
                with self.lock:
                    devtab_eligible(&self.t, drivers, buses, nr, &passes[0])
        return result

    def match(self, pattern):
        """Return which devices have a path that the glob *pattern* matches: bool, shape (n,).

        As :func:`fnmatch.fnmatchcase`: ``*`` crosses ``/``, and the whole path must match.
        """
        cdef uint64_t nr = self.t.nr
        cdef uint32_t[:, ::1] tokens
        cdef uint32_t[:, ::1] ranges
        cdef const uint32_t *range_data
        cdef uint64_t nr_tokens
        cdef uint8_t[::1] matches
        cdef int rc
        devtab_bytes(pattern)  # a str, and of characters that a path can have
        if pattern and not pattern.strip("*"):  # every path
            return self.alive.copy()
        tokens, ranges = devtab_compile_glob(pattern)
        result = np.zeros(nr, dtype=np.bool_)
        nr_tokens = tokens.shape[0]
        if nr == 0 or nr_tokens == 0:
            return result
        range_data = &ranges[0, 0] if ranges.shape[0] else NULL
        matches = result.view(np.uint8)
        with nogil:
            with self.lock:
                rc = devtab_match(&self.t, <devtab_token *>&tokens[0, 0], nr_tokens, range_data,
                                  nr, &matches[0])
        check(rc, "match")
        return result

    # ---- to another process ------------------------------------------------------------------

    def to_memfd(self):
        """Write the table into a new memfd, seal it, and return its descriptor.

        Returns:
            A descriptor that the caller closes; sealed against writing and resizing.

        Raises:
            OSError: the system has no memory or no descriptors left.
        """
        cdef uint64_t nr = 0
        nr_buses = nr_drivers = 0
        with self.writer:
            nr = self.t.nr
            names = self.names
            columns = [self.column(name) for name in self.user_columns]
            strings = [devtab_bytes(name) for name in
                       (*self.buses, *self.drivers, *self.user_columns)]
            nr_buses, nr_drivers = len(self.buses), len(self.drivers)
            # The marks are the one array that changes in place: take a copy.
            parts = [
                names[1], names[0], self.parents, self.depths, self.bus_ids, self.driver_ids,
                self.nodes, self.path_bytes, self.alive.copy(),
            ]
        cuts = np.zeros(len(strings) + 1, dtype=np.uint64)
        np.cumsum([len(name) for name in strings], out=cuts[1:], dtype=np.uint64)
        parts += [cuts, np.frombuffer(b"".join(strings) or bytearray(), dtype=np.uint8)]
        kinds = [(kind, 0) for kind in range(DEVTAB_FIXED_SECTIONS)]
        for column, (data, offsets) in enumerate(columns):
            parts += [offsets, data]
            kinds += [(DEVTAB_FIXED_SECTIONS, column), (DEVTAB_FIXED_SECTIONS + 1, column)]

        at = DEVTAB_HEADER.size + DEVTAB_SECTION.size * len(parts)
        table = bytearray()
        places = []
        for (kind, column), part in zip(kinds, parts, strict=True):
            at = -(-at // DEVTAB_ALIGN) * DEVTAB_ALIGN
            table += DEVTAB_SECTION.pack(kind, column, at, part.nbytes)
            places.append(at)
            at += part.nbytes
        header = DEVTAB_HEADER.pack(
            DEVTAB_MAGIC, DEVTAB_VERSION, len(parts), nr, nr_buses, nr_drivers, len(columns), 0, at
        )

        fd = os.memfd_create("luo-devices", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, at)
            devtab_write_fd(fd, 0, header + table)
            for place, part in zip(places, parts, strict=True):
                if part.nbytes:
                    devtab_write_fd(fd, place, part)
            fcntl.fcntl(
                fd, fcntl.F_ADD_SEALS,
                fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE,
            )
        except BaseException:
            os.close(fd)
            raise
        return fd

    @staticmethod
    def from_memfd(fd):
        """Map a table that :meth:`to_memfd` wrote; its arrays are views on the mapping.

        Args:
            fd: a memfd sealed against writing and shrinking; it may be closed afterwards.

        Returns:
            A table that refuses to add and remove. Two devices of one path are found when the
            path index is built.

        Raises:
            HandoverError: the descriptor is not so sealed, or the bytes break the format.
            OSError: the descriptor cannot be mapped.
        """
        cdef DeviceTable table = DeviceTable()
        cdef devtab *t = &table.t
        cdef devtab_block *mapping
        cdef devtab_block *block
        cdef devtab_block **wanted
        cdef devtab_fault fault
        cdef void *base
        cdef size_t nbytes
        cdef int descriptor = fd
        cdef int32_t nr_buses, nr_drivers
        cdef int rc, i
        cdef uint64_t nr
        cdef _DeviceBytes whole

        # Without these seals the bytes could change, or go away, after they were checked.
        seals = 0
        size = os.fstat(fd).st_size
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            if error.errno != EINVAL:
                raise
        needed = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK
        if seals & needed != needed:
            raise HandoverError("device table: the descriptor is no memfd sealed against writing")
        if size < DEVTAB_HEADER.size:
            raise HandoverError("device table: shorter than its header", 0)

        # Linux before 6.7 lets a write-sealed memfd be mapped only privately.
        nbytes = size
        with nogil:
            base = mmap(NULL, nbytes, PROT_READ, MAP_PRIVATE | MAP_POPULATE, descriptor, 0)
            rc = last_errno
        if base == MAP_FAILED:
            raise OSError(rc, strerror(rc).decode())
        mapping = <devtab_block *>calloc(1, sizeof(devtab_block))
        if mapping == NULL:
            munmap(base, nbytes)
            raise MemoryError("device table")
        mapping.data = <uint8_t *>base
        mapping.nbytes = nbytes
        mapping.mapped = 1
        mapping.refs = 1
        whole = _DeviceBytes.__new__(_DeviceBytes)
        whole.block = mapping  # takes over the reference
        whole.nbytes = nbytes

        layout = devtab_read_layout(whole)
        nr_rows, buses, drivers, names, sections = layout
        nr = nr_rows
        t.nr = nr
        table.mapped = True
        for i, name in enumerate((*buses, *drivers, *names)):
            if i < len(buses):
                devtab_reload_name(table.buses, table.bus_of, name, "bus")
            elif i < len(buses) + len(drivers):
                devtab_reload_name(table.drivers, table.driver_of, name, "driver")
            else:
                devtab_reload_name(table.user_columns, table.column_of, name, "column")
        if names:
            check(devtab_add_columns(t, len(names)), "columns")

        for kind, column, offset, length in sections:
            wanted = devtab_section(t, kind, column)
            if wanted == NULL:
                continue
            block = <devtab_block *>calloc(1, sizeof(devtab_block))
            if block == NULL:
                raise MemoryError("device table")
            block.data = mapping.data + <uint64_t>offset
            block.nbytes = length
            block.refs = 1
            block.owner = mapping
            devtab_refs_add(&mapping.refs, 1)
            wanted[0] = block
        t.names.rows = nr

        if not devtab_offsets_valid(devtab_u64(t.names.offsets), nr, t.names.data.nbytes):
            raise HandoverError(f"device table: {DEVTAB_RULES[<int>RULE_OFFSETS]}")
        for i in range(t.nr_columns):
            t.columns[i].rows = nr
            if not devtab_offsets_valid(
                devtab_u64(t.columns[i].offsets), nr, t.columns[i].data.nbytes
            ):
                raise HandoverError(f"device table: {DEVTAB_RULES[<int>RULE_COLUMN_OFFSETS]}")
        nr_buses, nr_drivers = len(buses), len(drivers)
        with nogil:
            rc = devtab_validate(t, nr_buses, nr_drivers, &fault)
        table.index_built(rc, &fault)
        return table


cdef devtab_block **devtab_section(devtab *t, int kind, int column) noexcept:
    """Where the block of a section belongs; NULL for the strings, which become Python's."""
    if kind == 0:
        return &t.names.offsets
    if kind == 1:
        return &t.names.data
    if kind == 2:
        return &t.parents
    if kind == 3:
        return &t.depths
    if kind == 4:
        return &t.bus_ids
    if kind == 5:
        return &t.driver_ids
    if kind == 6:
        return &t.nodes
    if kind == 7:
        return &t.path_bytes
    if kind == 8:
        return &t.alive
    if kind == DEVTAB_FIXED_SECTIONS:
        return &t.columns[column].offsets
    if kind == DEVTAB_FIXED_SECTIONS + 1:
        return &t.columns[column].data
    return NULL


cdef object devtab_reload_name(list names, dict ids, object name, str kind):
    if not name or name in ids:
        raise HandoverError(f"device table: {kind} name {name!r} is empty or there twice")
    ids[name] = len(names)
    names.append(name)


cdef tuple devtab_read_layout(object whole):
    """Rows, names of buses, drivers and columns, and the sections of a mapping, all in bounds."""
    view = memoryview(whole)
    total = view.nbytes
    (magic, version, nr_sections, nr, nr_buses, nr_drivers, nr_columns, zero,
     size) = DEVTAB_HEADER.unpack_from(view, 0)
    if magic != DEVTAB_MAGIC:
        raise HandoverError("device table: wrong magic", 0)
    if version != DEVTAB_VERSION:
        raise HandoverError(f"device table: version {version}, not {DEVTAB_VERSION}", 8)
    if size != total:
        raise HandoverError(f"device table: says {size} bytes, has {total}", 40)
    if nr_sections != DEVTAB_FIXED_SECTIONS + 2 * nr_columns or zero:
        raise HandoverError(f"device table: {nr_sections} sections, {nr_columns} columns", 12)
    if nr > DEVTAB_DEVICES_MAX:
        raise HandoverError(f"device table: {nr} devices", 16)
    nr_strings = nr_buses + nr_drivers + nr_columns
    first = DEVTAB_HEADER.size + DEVTAB_SECTION.size * nr_sections
    if first > total:
        raise HandoverError("device table: section table exceeds the file", 12)

    widths = {0: 8 * (nr + 1), 7: 2 * nr, 8: nr, 9: 8 * (nr_strings + 1), 11: 8 * (nr + 1)}
    widths.update(dict.fromkeys(range(2, 7), 4 * nr))
    sections = []
    for i in range(nr_sections):
        at = DEVTAB_HEADER.size + DEVTAB_SECTION.size * i
        kind, column, offset, nbytes = DEVTAB_SECTION.unpack_from(view, at)
        beyond = i - DEVTAB_FIXED_SECTIONS
        expected = (i, 0) if beyond < 0 else (DEVTAB_FIXED_SECTIONS + beyond % 2, beyond // 2)
        if (kind, column) != expected:
            raise HandoverError(f"device table: section {kind}/{column}, not {expected}", at)
        if offset < first or offset % DEVTAB_ALIGN or offset + nbytes > total:
            raise HandoverError(f"device table: section {kind}/{column} is out of place", at)
        if nbytes != widths.get(kind, nbytes):
            raise HandoverError(f"device table: section {kind}/{column} has {nbytes} bytes", at)
        sections.append((kind, column, offset, nbytes))

    _, _, at, nbytes = sections[9]
    cuts = view[at:at + nbytes].cast("Q")
    _, _, at, nbytes = sections[10]
    text = bytes(view[at:at + nbytes])
    strings = []
    last = 0
    if cuts[0] != 0 or cuts[nr_strings] != nbytes:
        raise HandoverError("device table: offsets of the strings are wrong", sections[9][2])
    for cut in cuts[1:]:
        if not last <= cut <= nbytes:
            raise HandoverError("device table: offsets of the strings are wrong", sections[9][2])
        strings.append(text[last:cut].decode("utf-8", "surrogateescape"))
        last = cut
    return (
        nr, strings[:nr_buses], strings[nr_buses:nr_buses + nr_drivers],
        strings[nr_buses + nr_drivers:], sections,
    )


cdef int devtab_write_fd(int fd, object at, object data) except -1:
    """Write all of *data* at the offset *at*; one pwrite() takes at most 2 GiB."""
    view = memoryview(data).cast("B")
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done:done + (1 << 30)], at + done)
    return 0
