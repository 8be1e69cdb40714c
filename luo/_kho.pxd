# Header of the compiled core: C types and constants, by fragment, in the order of the includes.

# ---- core/devices.pxi ----

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    DEVTAB_DEVICES_MAX = 0x7FFFFFFE  # rows; an index is an int32, and a slot holds index + 1
    DEVTAB_PATH_MAX = 0xFFFF  # bytes of a path: what its length column holds (PATH_MAX is 4096)
    DEVTAB_LOOKAHEAD = 16  # rows whose slots are fetched ahead of the probe


cdef struct devtab_block:  # bytes of one array; whoever shows them to Python holds a reference
    uint8_t *data
    size_t nbytes  # capacity
    long refs
    devtab_block *owner  # the mapping that the bytes lie in, or NULL
    int mapped  # the block is itself a mapping


cdef struct devtab_ragged:  # rows of any length; rows not reached yet are empty
    devtab_block *data
    devtab_block *offsets  # uint64_t [rows + 1]; NULL while rows == 0
    uint64_t rows


cdef struct devtab:
    uint64_t nr  # rows, removed devices included
    uint64_t nr_alive
    int32_t max_depth
    devtab_ragged names
    devtab_block *parents  # int32_t: row, -1 none; always lower than the own row
    devtab_block *depths  # int32_t: root = 1
    devtab_block *bus_ids  # int32_t, -1 none
    devtab_block *driver_ids  # int32_t, -1 none
    devtab_block *nodes  # int32_t: NUMA node, -1 none
    devtab_block *alive  # uint8_t: 0 or 1
    devtab_block *path_bytes  # uint16_t: bytes of the full path
    devtab_block *hashes  # uint64_t: hash of the full path, by this process's seed
    devtab_block *slots  # uint64_t [slot_mask + 1]: hash bits 32.. in 32.., row + 1; 0 is free
    uint64_t slot_mask
    uint64_t seed[2]
    uint64_t hash_mask
    devtab_ragged *columns  # the user's
    int nr_columns


cdef enum devtab_rule:  # what a row, or an argument, breaks; DEVTAB_RULES has the words
    RULE_TOO_MANY
    RULE_OFFSETS
    RULE_NAME_EMPTY
    RULE_NAME_SLASH
    RULE_NAME_NUL
    RULE_PARENT
    RULE_PARENT_REMOVED
    RULE_PATH_LENGTH
    RULE_DUPLICATE
    RULE_BUS
    RULE_DRIVER
    RULE_NODE
    RULE_COLUMN_OFFSETS
    RULE_DEPTH
    RULE_PATH_BYTES
    RULE_ALIVE
    RULE_INDEX
    RULE_ROW_SIZE


cdef struct devtab_fault:
    devtab_rule rule
    uint64_t row


cdef struct devtab_order:  # a preserve order in the making
    int32_t *list  # as collected, then as sorted
    int32_t *sorted
    uint64_t nr


cdef struct devtab_token:  # of a compiled glob
    int32_t kind
    uint32_t first  # the character; or the first range
    uint32_t nr  # ranges


cdef struct devtab_rows:  # rows of bytes that are to be appended
    const uint8_t *data
    uint64_t nbytes  # of data
    const uint64_t *offsets  # [count + 1]; NULL: every row has `stride` bytes
    uint64_t stride
    int same  # data is one row, for all


cdef struct devtab_codes:  # an int32 per row
    const int32_t *values  # NULL: `value` for all
    int32_t value
    const int32_t *ids  # what a code stands for; NULL: itself
    int32_t nr_ids


cdef struct devtab_batch:  # what add_many() appends
    uint64_t count
    devtab_rows names
    devtab_codes parents
    devtab_codes buses
    devtab_codes drivers
    devtab_codes nodes
    devtab_rows *columns  # of the user's; one without bytes leaves its rows empty
    int nr_columns


cdef class DeviceTable:
    cdef devtab t
    cdef cython.pymutex lock  # guards t; taken without the GIL, and no Python runs under it
    cdef object writer  # RLock: one thread at a time adds or removes
    cdef bint mapped  # lies on a sealed memfd: read-only
    cdef list buses  # names by id, and back
    cdef dict bus_of
    cdef list drivers
    cdef dict driver_of
    cdef list user_columns
    cdef dict column_of

    cdef object array(self, devtab_block **where, object dtype, uint64_t count)
    cdef tuple ragged(self, devtab_ragged *column)
    cdef int column_id(self, object name) except -1
    cdef int refuse_if_mapped(self, str what) except -1
    cdef int append(self, devtab_batch *batch, str what) except -1
    cdef int take_columns(self, devtab_batch *batch, object columns, list keep) except -1
    cdef int undo_names(self, int buses, int drivers, int columns) except -1
    cdef int index_built(self, int rc, devtab_fault *fault) except -1


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
