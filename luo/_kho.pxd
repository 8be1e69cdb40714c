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
                   bint readonly) except -1
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
    uint64_t nr_keys
    uint64_t nr_nodes
    uint64_t leaf  # phys of the leaf last used, 0: none
    uint64_t leaf_prefix  # key >> leaf_bits of it
    uint64_t **made  # slots filled by the present call, for its undoing
    size_t nr_made
    size_t made_room

cdef struct kho_radix_cursor:
    uint64_t *keys
    uint64_t n
    uint64_t room
    uint64_t start  # first key wanted
    uint64_t nr_visited

cdef struct kho_walk:
    page_state *state
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
    int why  # WALK_*, and what it is about
    int order
    uint64_t at  # phys or key
    uint64_t conflict  # pfn


@cython.final
cdef class RadixTree:
    cdef PhysicalMemory memory
    cdef kho_radix_tree tree

    cdef int use(self) except -1
    cdef int begin(self) noexcept nogil
    cdef int add(self, const uint64_t *keys, uint64_t n, uint64_t *nr_fresh) noexcept nogil
    cdef int delete(self, const uint64_t *keys, uint64_t n, uint64_t *at) noexcept nogil
    cdef int has(self, uint64_t key) noexcept nogil
    cdef int collect(self, uint64_t *keys, uint64_t room, uint64_t *start,
                     uint64_t *n) noexcept nogil


cdef class PreservedMemory:  # luo.kho.Kho extends it
    cdef object __weakref__
    cdef readonly PhysicalMemory memory
    cdef readonly bint debug
    cdef readonly bint closed
    cdef RadixTree map
    cdef memory_range *scratch_areas
    cdef size_t nr_scratch

    cdef int use(self) except -1
    cdef int check_run(self, uint64_t phys, uint64_t pages) noexcept nogil
    cdef int check_block(self, uint64_t phys, int order) noexcept nogil
    cdef int refuse(self, object what, uint64_t phys, uint64_t nbytes, int why) except -1
    cdef uint64_t *encode_blocks(self, const uint64_t[::1] phys, object orders, object what,
                                 bint checked) except NULL
    cdef uint64_t *split_run(self, uint64_t phys, uint64_t pages, uint64_t *n) except NULL
    cdef uint64_t fill(self, uint64_t[::1] phys, uint8_t[::1] orders, uint64_t room,
                       uint64_t *start) except? 0xFFFFFFFFFFFFFFFF


cdef class IncomingMemory:  # luo.kho.Incoming extends it
    cdef object __weakref__
    cdef readonly PhysicalMemory memory
    cdef readonly bint closed
    cdef readonly uint64_t nr_preserved
    cdef readonly uint64_t nr_preserved_pages
    cdef list areas  # scratch
    cdef page_state *state  # NULL from install() on
    cdef uint64_t *nodes
    cdef size_t nr_nodes

    cdef int use(self) except -1
    cdef int walk_error(self, kho_walk *walk) except -1
    cdef page_state *pages(self) noexcept nogil
