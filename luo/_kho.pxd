# Header of the compiled core: C types and constants, by fragment, in the order of the includes.

cimport cython
from libc.stdint cimport uint8_t, uint64_t


# ---- bits ----

cdef extern from *:
    int __builtin_ctzll(unsigned long long word) noexcept nogil
    int __builtin_clzll(unsigned long long word) noexcept nogil

cdef extern from *:
    """
    #include <stdint.h>
    #define LUO_NO_BIT UINT64_MAX
    """
    const uint64_t NO_BIT "LUO_NO_BIT"  # "there is none" as a bit index, pfn or phys
    const uint64_t ALL_ONES "LUO_NO_BIT"
    const uint64_t TOP_BIT "(UINT64_C(1) << 63)"

cdef struct bitmap64:
    uint64_t nr_bits
    int nr_levels
    uint64_t *level[6]


# ---- memory ----

cdef enum:
    MAX_ORDERS = 37  # orders 0..36: a span of up to 2**36 pages
    NO_NODE = -1  # any NUMA node

cdef struct memory_range:
    uint64_t start  # pfn
    uint64_t end  # pfn, not included
    int node

cdef struct page_segment:  # blocks never cross its borders: a range cut at scratch's borders
    uint64_t start  # pfn
    uint64_t end  # pfn, not included
    uint64_t nr_free  # pages
    int node
    bint scratch

cdef struct page_state:
    void *map  # anonymous, lazily touched: all bitmaps below
    size_t map_bytes
    uint64_t base_pfn  # of the span
    uint64_t end_pfn
    int top  # largest order
    bint restricted  # only scratch is handed out
    size_t nr_segments
    page_segment *segments
    uint64_t nr_blocks[MAX_ORDERS]  # free blocks by order
    uint64_t nr_heads[MAX_ORDERS]  # allocated blocks
    uint64_t nr_claims[MAX_ORDERS]  # blocks that the previous kernel preserved, not restored yet
    bitmap64 free[MAX_ORDERS]
    uint64_t *heads[MAX_ORDERS]
    uint64_t *claims[MAX_ORDERS]


@cython.final
cdef class MemoryMapping:  # exports the bytes; unmaps them when the last view has died
    cdef char *address
    cdef size_t nbytes
    cdef bint readonly
    cdef object owner  # of bytes that are not ours to unmap, or None


@cython.final
cdef class PhysicalMemory:
    cdef object __weakref__
    cdef MemoryMapping mapping
    cdef object window  # memoryview of the whole mapping; views are slices of it
    cdef uint64_t zero  # address at which phys 0 would be mapped: phys -> pointer is an addition
    cdef memory_range *memory_ranges
    cdef size_t nr_ranges
    cdef page_state *state  # NULL until it is needed
    cdef readonly list scratch  # [(phys, nbytes)]
    cdef readonly int fd
    cdef readonly uint64_t offset
    cdef readonly uint64_t base
    cdef readonly uint64_t size
    cdef readonly uint64_t page_size
    cdef readonly uint64_t nr_pages
    cdef readonly int nr_nodes
    cdef readonly bint readonly
    cdef readonly bint detached
    cdef int page_shift
    cdef cython.pymutex lock  # page state, and the preserved maps that live in this memory

    cdef int use(self) except -1
    cdef int setup(self, list ranges, object fd, object offset, object page_size,
                   bint readonly, object host) except -1
    cdef MemoryMapping map_host(self, object host)
    cdef MemoryMapping map_bytes(self)
    cdef int adopt(self, MemoryMapping mapping) except -1
    cdef bint has(self, uint64_t phys, uint64_t nbytes) noexcept nogil
    cdef int node_at(self, uint64_t pfn) noexcept nogil
    cdef bint populated(self, uint64_t phys, uint64_t nbytes) noexcept nogil
    cdef page_state *new_state(self, list scratch) except NULL
    cdef int check_ram(self, object what, object phys, object nbytes) except -1
    cdef int check_writable(self, object what) except -1
    cdef int alloc_into(self, uint64_t[::1] phys, int order, int node) except -1000


# ---- radix ----

cdef struct kho_radix_tree:
    uint64_t root  # phys
    uint64_t zero  # as PhysicalMemory.zero, renewed by every call
    page_state *state  # likewise
    int page_shift
    int slot_bits  # of the key, per inner level
    int leaf_bits
    int levels  # inner levels and the leaf
    int key_bits
    uint64_t nr_nodes
    uint64_t leaf  # phys of the leaf last used, 0: none
    uint64_t leaf_prefix  # key >> leaf_bits of it
    uint64_t **made  # slots filled by the present call, for its undoing
    size_t nr_made
    size_t made_room

cdef struct map_cursor:  # a walk that fills arrays
    uint64_t *values  # addresses, or the keys themselves
    uint8_t *orders  # of the blocks; NULL: keys are wanted
    uint64_t n
    uint64_t room
    uint64_t start  # where to begin, and where to go on; at first 0
    uint64_t nr_visited

cdef struct kho_walk:
    page_state *state
    uint64_t fdt  # phys of the root tree
    int page_shift
    int slot_bits
    int leaf_bits
    uint64_t *nodes  # phys of the tree's pages
    size_t nr_nodes
    size_t room
    uint64_t nr_keys
    uint64_t nr_pages
    uint64_t run_pfn  # adjoining blocks that are not claimed yet
    uint64_t run_count
    int run_order
    page_segment *gap_seg
    uint64_t gap_pfn  # free pages that are in no free list now
    uint64_t gap_end
    int why  # WALK_*, and what it is about
    int order
    uint64_t at  # phys or key
    uint64_t conflict  # pfn


cdef class PreservedMap:  # keys of blocks, in whatever shape a generation has for them
    cdef PhysicalMemory memory
    cdef int leaf_bits  # log2 of the keys whose bits adjoin: of a leaf, or of a bitmap
    cdef bint forgot  # after an abort nobody can tell what was preserved
    cdef uint64_t keys_in_map
    cdef uint64_t pages_in_map  # of the blocks that the keys stand for

    cdef int use(self) except -1
    cdef int begin(self) noexcept nogil
    cdef int find(self, uint64_t key, bint make, uint64_t **words, uint64_t *bit) noexcept nogil
    cdef void unmake(self) noexcept nogil
    cdef int collect(self, map_cursor *cursor) noexcept nogil
    cdef uint64_t count(self, int what) noexcept nogil
    cdef int drop(self) except -1
    cdef int add(self, const uint64_t *keys, uint64_t n, uint64_t *nr_fresh) noexcept nogil
    cdef int delete(self, const uint64_t *keys, uint64_t n, uint64_t *at) noexcept nogil
    cdef int has(self, uint64_t key) noexcept nogil
    cdef object list_keys(self)


@cython.final
cdef class RadixTree(PreservedMap):
    cdef kho_radix_tree tree


cdef class PreservedMemory:  # luo.kho.Kho extends it
    cdef object __weakref__
    cdef readonly PhysicalMemory memory
    cdef readonly bint debug
    cdef readonly bint closed
    cdef readonly bint frozen
    cdef PreservedMap map
    cdef bint split_by_node  # a range is cut where NUMA nodes meet
    cdef bint split_unaligned  # the mistake of kho-v5-series
    cdef memory_range *pieces  # of RAM, without scratch
    cdef size_t nr_pieces

    cdef int use(self) except -1
    cdef int use_unfrozen(self) except -1
    cdef int check_run(self, uint64_t phys, uint64_t pages) noexcept nogil
    cdef int check_block(self, uint64_t phys, int order) noexcept nogil
    cdef int refuse(self, object what, uint64_t phys, uint64_t nbytes, int why) except -1
    cdef uint64_t *encode_blocks(self, const uint64_t[::1] phys, const uint8_t[::1] orders,
                                 int order, object what, bint checked) except NULL
    cdef uint64_t *split_run(self, uint64_t phys, uint64_t pages, uint64_t *n) except NULL
    cdef uint64_t fill(self, uint64_t[::1] phys, uint8_t[::1] orders, uint64_t room,
                       uint64_t *start) except? 0xFFFFFFFFFFFFFFFF


cdef class IncomingMemory:  # luo.kho.Incoming extends it
    cdef object __weakref__
    cdef readonly PhysicalMemory memory
    cdef readonly bint closed
    cdef readonly uint64_t nr_preserved
    cdef readonly uint64_t preserved_pages
    cdef list areas  # scratch
    cdef int order_cap  # larger blocks cannot be restored
    cdef page_state *state  # NULL from install() on
    cdef uint64_t *nodes
    cdef size_t nr_nodes

    cdef int use(self) except -1
    cdef int walk_error(self, kho_walk *walk) except -1
    cdef object cap_note(self)
    cdef page_state *pages(self) noexcept nogil


# ---- chunks ----

cdef struct kho_chunk_order:  # the bitmaps of one order
    uint64_t *bitmaps  # phys by index - first; 0: none
    uint64_t first
    uint64_t nr_indices
    uint64_t nr
    bitmap64 used  # which there are

cdef struct kho_chunk_map:
    uint64_t zero  # as PhysicalMemory.zero, renewed by every call
    page_state *state  # likewise
    int page_shift
    int bitmap_shift  # log2 of a bitmap's bits
    uint64_t nr_bitmaps
    uint64_t *slabs  # pages that hold the bitmaps
    size_t nr_slabs
    size_t slabs_room
    uint64_t slab_used  # bytes of the last one
    uint64_t *made  # (order, index) of each bitmap made by the present call, for its undoing
    size_t nr_made
    size_t made_room
    uint64_t *chunks  # pages of the list that is published
    size_t nr_chunks
    kho_chunk_order orders[MAX_ORDERS]

cdef struct kho_chunk_entry:
    uint64_t start  # phys
    uint64_t bitmap  # phys
    int order


@cython.final
cdef class ChunkMap(PreservedMap):
    cdef kho_chunk_map chunks


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


from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

# ---- fdt_ro: the flattened device tree format (DT spec v0.4, chapter 5) ----

cdef enum:
    FDT_MAGIC = 0xD00DFEED
    FDT_BEGIN_NODE = 1
    FDT_END_NODE = 2
    FDT_PROP = 3
    FDT_NOP = 4
    FDT_END = 9
    FDT_V16_HEADER = 36         # bytes; without size_dt_struct
    FDT_V17_HEADER = 40         # bytes
    FDT_MAX_BYTES = 0x7FFFFFFF  # libfdt's offsets are int
    FDT_MAX_PROPERTY_NAME = 255  # bytes without NUL; ours, the DT spec allows 31

# libfdt's error numbers; 8 and above mean that the blob is wrong.
cdef enum:
    FDT_ERR_NOTFOUND = 1
    FDT_ERR_EXISTS = 2
    FDT_ERR_NOSPACE = 3
    FDT_ERR_BADOFFSET = 4
    FDT_ERR_BADPATH = 5
    FDT_ERR_BADSTATE = 7
    FDT_ERR_TRUNCATED = 8
    FDT_ERR_BADMAGIC = 9
    FDT_ERR_BADVERSION = 10
    FDT_ERR_BADSTRUCTURE = 11
    FDT_ERR_BADLAYOUT = 12
    FDT_ERR_BADVALUE = 15
    FDT_ERR_ALIGNMENT = 19

# A header that was checked: every field lies within [0, totalsize].
ctypedef struct fdt_blob:
    const unsigned char *base
    uint64_t totalsize
    uint64_t off_mem_rsvmap
    uint64_t off_dt_struct
    uint64_t end_dt_struct      # limit of the structure block; totalsize in version 16
    uint64_t off_dt_strings
    uint64_t size_dt_strings
    uint32_t version
    uint32_t last_comp_version
    uint32_t boot_cpuid_phys

# One token of the structure block; offsets count from the start of the blob.
ctypedef struct fdt_token:
    uint32_t tag
    uint64_t next               # offset of the token after this one
    uint64_t data               # FDT_BEGIN_NODE: its name; FDT_PROP: its value
    uint64_t length             # bytes of that, without NUL and padding
    uint64_t nameoff            # FDT_PROP: place of its name in the strings block

# What a worker found wrong, and where.
ctypedef struct fdt_fault:
    int code                    # FDT_ERR_*, or 0
    uint64_t offset
    const char *rule

# ---- fdt_sw: sequential writer ----

cdef enum:
    FDT_SW_RSVMAP = 48          # where libfdt's sequential writer puts the reserve map

# A suffix of the string table, by hash; dist 0 marks a free slot.
ctypedef struct fdt_sw_slot:
    uint32_t hash
    uint32_t dist               # from the end of the table back to the suffix, bytes

# From structure offset pos on, name offsets were written for a table of tabsize bytes.
ctypedef struct fdt_sw_stretch:
    uint64_t pos
    uint64_t tabsize

ctypedef struct fdt_sw:
    unsigned char *buf
    uint64_t cap                # bytes that buf may hold
    uint64_t start              # of the structure, behind the reserve map
    uint64_t pos                # end of what is written of the structure
    bint fixed                  # buf belongs to somebody else and cannot grow
    unsigned char *tab          # string table; its used part is the last tabsize bytes
    uint64_t tabcap
    uint64_t tabsize
    fdt_sw_slot *slots
    uint64_t nr_slots           # power of two, or 0
    uint64_t nr_used
    fdt_sw_stretch *stretches
    uint64_t nr_stretches
    uint64_t cap_stretches

# The values of one property, or the names, of n nodes.
ctypedef struct fdt_rows:
    const unsigned char *data
    const uint64_t *offsets     # n + 1, or NULL: every row is width bytes at data + i * stride
    const uint8_t *present      # n, or NULL: all are; only with offsets
    uint64_t size               # bytes behind data
    uint64_t width
    uint64_t stride             # 0: the same bytes for all rows
    const unsigned char *name
    uint64_t name_len
    uint64_t dist               # of the name from the end of the string table
    uint64_t tabsize            # of the table when that was looked up

# ---- core/native.pxi ----

from libc.stdint cimport int32_t, uint8_t, uint64_t

cdef extern from "luo.h":
    struct luo_device:
        pass
    ctypedef int (*luo_callback)(luo_device *, void *) noexcept nogil
    struct luo_device_calls:
        size_t nbytes
        int32_t (*index)(const luo_device *) noexcept nogil
        int (*event)(const luo_device *) noexcept nogil
        void *(*slot)(const luo_device *, int, size_t *) noexcept nogil
        const void *(*column)(const luo_device *, const char *, size_t *) noexcept nogil
        int (*reclaim)(const luo_device *) noexcept nogil

cdef struct native_slots:
    const uint64_t *phys  # by device number
    const uint64_t *nbytes
    uint64_t nr

cdef struct native_column:
    const char *name
    const uint8_t *data
    const uint64_t *offsets  # nr + 1
    uint64_t nr

cdef struct native_scope:
    uint64_t zero  # as PhysicalMemory.zero
    int event
    native_slots slots[2]
    native_column *columns
    int nr_columns
    const uint8_t *preserved  # NULL where nothing can be reclaimed
    uint8_t *reclaimed
    uint64_t nr_flags

cdef struct native_device:  # what struct luo_device is
    const luo_device_calls *calls
    const native_scope *scope
    int32_t index

# ---- core/recorder.pxi ----

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    HISTOGRAM_SUB_BITS = 6
    HISTOGRAM_SUB = 64  # buckets an octave
    HISTOGRAM_OCTAVES = 34  # up to 2^39 ns, nine minutes
    HISTOGRAM_BUCKETS = 2176  # HISTOGRAM_OCTAVES * HISTOGRAM_SUB

cdef struct call_stats:
    uint64_t calls
    uint64_t devices
    int64_t total_ns
    int64_t min_ns
    int64_t max_ns
    int32_t max_device
    int32_t blackout  # row of the sums by device
    uint64_t histogram[2176]

cdef struct call_span:  # as SPAN
    int64_t begin_ns
    int64_t ns
    int32_t key
    int32_t device
    int32_t devices
    int32_t worker

# ---- core/dispatch.pxi ----

cdef enum:
    CALL_PLAIN = 0
    CALL_SET = 1  # set the done bit after success
    CALL_CLEAR = 2  # call only where the bit is set, and clear it
    CALL_NEED = 3  # call only where the bit is set
    NATIVE_STRETCH = 1024  # devices called before a signal is looked for

cdef struct call_side:  # one side, driver or bus, of the loop over devices
    const int32_t *ids  # owner of each device, -1 none
    const luo_callback *calls  # by owner; NULL: none, or not native
    void *const *contexts
    const int32_t *keys  # recorder row by owner
    uint8_t bit  # in the done mask
    int mode

cdef struct call_failure:
    int32_t device
    int32_t side
    int32_t rc  # as returned, or -ETIMEDOUT
