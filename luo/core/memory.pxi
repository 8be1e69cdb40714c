# L2: physical memory. Bytes, which survive a kernel, and page state, which does not.
#
# Bytes: one shared mapping of a file; the file offset of a byte is offset + (phys - base).
#
# Page state: a buddy allocator over the pfns of the span. For each order there is a hierarchical
# bitmap of free blocks, a flat one of allocated heads, and a flat one of claims: blocks that the
# previous kernel preserved and that nobody has restored yet (Linux keeps that mark in
# page->private).
# The index of a block in its order's bitmaps is (pfn >> order) - (base_pfn >> order), so blocks are
# naturally aligned in physical addresses whatever the base is.
#
# A segment is a range of memory cut at the borders of scratch; no block crosses a segment's border.
# Free blocks are always merged as far as that rule allows, so the free bitmaps are a function of
# the set of free pages: allocating and freeing again leaves no trace.
#
# Order of allocation, which prefault_free() and the tests rely on: segments by ascending address;
# in a segment the smallest order that has a block, and of those the lowest address.
#
# Page 0 is RAM and may be preserved and claimed, but is never free: address 0 means "null" in the
# ABI.

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <unistd.h>
    #ifndef MREMAP_DONTUNMAP
    #define MREMAP_DONTUNMAP 4
    #endif
    #ifndef MADV_HUGEPAGE
    #define MADV_HUGEPAGE 14
    #endif
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif
    """
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED
    int MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP
    int MADV_POPULATE_WRITE
    int ADVICE_HUGE "MADV_HUGEPAGE"
    void *MAP_FAILED
    int SEEK_DATA, SEEK_HOLE
    int MFD_CLOEXEC, MFD_ALLOW_SEALING
    int F_ADD_SEALS, F_SEAL_SEAL, F_SEAL_GROW, F_SEAL_SHRINK
    int EBUSY, ENXIO, EIO, ERANGE, ENOENT, EINTR
    ctypedef long long off_t
    ctypedef char volatile_char "volatile char"
    int close(int fd)
    void *mmap(void *address, size_t nbytes, int prot, int flags, int fd, off_t offset)
    int munmap(void *address, size_t nbytes)
    int mprotect(void *address, size_t nbytes, int prot)
    int madvise(void *address, size_t nbytes, int advice)
    int mincore(void *address, size_t nbytes, unsigned char *pages)
    void *mremap(void *address, size_t old_bytes, size_t new_bytes, int flags, ...)
    off_t lseek(int fd, off_t offset, int whence)


cdef enum:
    HUGE_PAGE = 1 << 21


# ---- page state: workers ----

cdef inline uint64_t page_index(const page_state *st, uint64_t pfn, int order) noexcept nogil:
    return (pfn >> order) - (st.base_pfn >> order)


cdef inline uint64_t page_pfn(const page_state *st, uint64_t index, int order) noexcept nogil:
    return (index + (st.base_pfn >> order)) << order


cdef page_segment *page_segment_of(const page_state *st, uint64_t pfn) noexcept nogil:
    """The segment that holds *pfn*, or NULL."""
    cdef size_t low = 0, high = st.nr_segments, middle
    while low < high:
        middle = (low + high) >> 1
        if st.segments[middle].end <= pfn:
            low = middle + 1
        else:
            high = middle
    if low < st.nr_segments and st.segments[low].start <= pfn:
        return &st.segments[low]
    return NULL


cdef inline void page_insert(page_state *st, page_segment *seg, uint64_t pfn,
                             int order) noexcept nogil:
    bitmap_set(&st.free[order], page_index(st, pfn, order))
    st.nr_blocks[order] += 1
    seg.nr_free += <uint64_t>1 << order


cdef inline void page_remove(page_state *st, page_segment *seg, uint64_t pfn,
                             int order) noexcept nogil:
    bitmap_clear(&st.free[order], page_index(st, pfn, order))
    st.nr_blocks[order] -= 1
    seg.nr_free -= <uint64_t>1 << order


cdef inline int page_order_of_run(const page_state *st, uint64_t pfn, uint64_t end) noexcept nogil:
    """Largest order of an aligned block at *pfn* that ends at or before *end*."""
    return min(min(ctz64(pfn), log2_64(end - pfn)), st.top)


cdef void page_free_block(page_state *st, page_segment *seg, uint64_t pfn,
                          int order) noexcept nogil:
    """Give the block back and merge it with its buddies as far as the segment reaches."""
    cdef uint64_t buddy, parent
    cdef int o
    if pfn == 0:  # page 0 stays out: free the rest of its block
        for o in range(order):
            page_free_block(st, seg, <uint64_t>1 << o, o)
        return
    while order < st.top:
        buddy = pfn ^ (<uint64_t>1 << order)
        parent = pfn & buddy
        if parent < seg.start or parent + (<uint64_t>2 << order) > seg.end:
            break
        if not bitmap_test(&st.free[order], page_index(st, buddy, order)):
            break
        page_remove(st, seg, buddy, order)
        pfn = parent
        order += 1
    page_insert(st, seg, pfn, order)


cdef void page_free_run(page_state *st, page_segment *seg, uint64_t pfn,
                        uint64_t end) noexcept nogil:
    cdef int order
    while pfn < end:
        order = page_order_of_run(st, pfn, end)
        page_free_block(st, seg, pfn, order)
        pfn += <uint64_t>1 << order


cdef void page_split_run(page_state *st, page_segment *seg, uint64_t pfn,
                         uint64_t end) noexcept nogil:
    """As page_free_run() for what is left of one taken block: nothing there can merge."""
    cdef int order
    while pfn < end:
        order = page_order_of_run(st, pfn, end)
        page_insert(st, seg, pfn, order)
        pfn += <uint64_t>1 << order


cdef void page_free_span(page_state *st, uint64_t pfn, uint64_t end) noexcept nogil:
    """As page_free_run() for pages of one or more adjoining segments."""
    cdef page_segment *seg
    cdef uint64_t stop
    while pfn < end:
        seg = page_segment_of(st, pfn)
        stop = min(end, seg.end)
        page_free_run(st, seg, pfn, stop)
        pfn = stop


cdef uint64_t page_take_run(page_state *st, page_segment *seg, uint64_t pfn,
                            uint64_t end) noexcept nogil:
    """Take the pages [pfn, end) of one segment; NO_BIT, or the first pfn that is not free.

    In the second case nothing is taken.
    """
    cdef uint64_t p = pfn, head = 0, stop
    cdef int order
    while p < end:
        for order in range(st.top + 1):
            if not st.nr_blocks[order]:
                continue
            if bitmap_test(&st.free[order], page_index(st, p, order)):
                head = (p >> order) << order
                break
        else:
            if p == 0 and seg.start == 0 and page_zero_is_idle(st):
                p = 1  # page 0 is never free, but may be claimed
                continue
            page_free_run(st, seg, pfn, p)
            return p
        page_remove(st, seg, head, order)
        stop = head + (<uint64_t>1 << order)
        page_split_run(st, seg, head, p)
        if stop > end:
            page_split_run(st, seg, end, stop)
        p = stop
    return NO_BIT


cdef bint page_zero_is_idle(const page_state *st) noexcept nogil:
    """Whether no allocated or claimed block holds page 0."""
    cdef int order
    if st.base_pfn:
        return False
    for order in range(st.top + 1):
        if st.nr_heads[order] and flat_test(st.heads[order], 0):
            return False
        if st.nr_claims[order] and flat_test(st.claims[order], 0):
            return False
    return True


cdef inline bint page_usable(const page_state *st, const page_segment *seg,
                             int node) noexcept nogil:
    return seg.scratch == st.restricted and (node == NO_NODE or seg.node == node)


cdef uint64_t page_alloc_run(page_state *st, int order, uint64_t count, int node,
                             uint64_t *pfn) noexcept nogil:
    """Allocate up to *count* adjoining blocks, the ones that as many single calls would get.

    Returns how many (0: no memory left) and the first in *pfn*.
    """
    cdef page_segment *seg
    cdef uint64_t index, head, end, run
    cdef size_t i
    cdef int found
    if order > st.top or luo_allocation_fails():
        return 0
    for i in range(st.nr_segments):
        seg = &st.segments[i]
        if not page_usable(st, seg, node) or not seg.nr_free >> order:
            continue
        for found in range(order, st.top + 1):
            if not st.nr_blocks[found]:
                continue
            index = bitmap_next(&st.free[found], page_index(st, seg.start, found))
            if index == NO_BIT:
                continue
            head = page_pfn(st, index, found)
            if head >= seg.end:
                continue
            # Single calls would use up this block from its start before they touch another:
            # what is left of it are the smallest blocks of the segment.
            run = min(count, <uint64_t>1 << (found - order))
            end = head + (run << order)
            page_remove(st, seg, head, found)
            page_split_run(st, seg, end, head + (<uint64_t>1 << found))
            flat_fill(st.heads[order], page_index(st, head, order), run, True)
            st.nr_heads[order] += run
            pfn[0] = head
            return run
    return 0


cdef int page_head_order(const page_state *st, uint64_t pfn) noexcept nogil:
    """Order of the allocated block that starts at *pfn*, or -1."""
    cdef int order = min(ctz64(pfn), st.top)
    if pfn < st.base_pfn or pfn >= st.end_pfn:
        return -1
    while order >= 0:
        if st.nr_heads[order] and flat_test(st.heads[order], page_index(st, pfn, order)):
            return order
        order -= 1
    return -1


cdef int page_claim_order(const page_state *st, uint64_t pfn) noexcept nogil:
    """Order of the preserved, not restored block that starts at *pfn*, or -1."""
    cdef int order = min(ctz64(pfn), st.top)
    if pfn < st.base_pfn or pfn >= st.end_pfn:
        return -1
    while order >= 0:
        if st.nr_claims[order] and flat_test(st.claims[order], page_index(st, pfn, order)):
            return order
        order -= 1
    return -1


cdef int page_owner(const page_state *st, uint64_t pfn, uint64_t *head,
                    bint *claimed) noexcept nogil:
    """Order of the allocated or claimed block that holds *pfn*, or -1."""
    cdef uint64_t index
    cdef int order
    if pfn < st.base_pfn or pfn >= st.end_pfn:
        return -1
    for order in range(st.top + 1):
        index = page_index(st, pfn, order)
        if st.nr_heads[order] and flat_test(st.heads[order], index):
            claimed[0] = False
        elif st.nr_claims[order] and flat_test(st.claims[order], index):
            claimed[0] = True
        else:
            continue
        head[0] = (pfn >> order) << order
        return order
    return -1


cdef void page_set_heads(page_state *st, uint64_t pfn, int order, uint64_t count,
                         bint claimed) noexcept nogil:
    if claimed:
        flat_fill(st.claims[order], page_index(st, pfn, order), count, True)
        st.nr_claims[order] += count
    else:
        flat_fill(st.heads[order], page_index(st, pfn, order), count, True)
        st.nr_heads[order] += count


cdef void page_clear_heads(page_state *st, uint64_t pfn, int order,
                           uint64_t count) noexcept nogil:
    flat_fill(st.heads[order], page_index(st, pfn, order), count, False)
    st.nr_heads[order] -= count


cdef int page_claim_run(page_state *st, uint64_t pfn, int order, uint64_t count, bint claimed,
                        bint scratch_too, uint64_t *conflict) noexcept nogil:
    """Take *count* adjoining blocks at a fixed place and mark them as allocated or claimed.

    -EINVAL: they leave RAM; -ERANGE: they reach into scratch; -EBUSY: not free. The pfn at fault
    goes to *conflict*, and nothing is taken. Blocks may cross from one range to the next: a kernel
    preserves such, since it compares only the nodes of a block's two ends.
    """
    cdef page_segment *seg
    cdef uint64_t end = pfn + (count << order), p = pfn, stop
    cdef int rc = 0
    if order > st.top:
        conflict[0] = pfn
        return -EINVAL
    while p < end:
        seg = page_segment_of(st, p)
        conflict[0] = p
        if seg == NULL:
            rc = -EINVAL
        elif seg.scratch and (scratch_too == 0 or seg.start > pfn or seg.end < end):
            rc = -ERANGE
        else:
            stop = min(end, seg.end)
            conflict[0] = page_take_run(st, seg, p, stop)
            rc = 0 if conflict[0] == NO_BIT else -EBUSY
        if rc < 0:
            page_free_span(st, pfn, p)
            return rc
        p = stop
    page_set_heads(st, pfn, order, count, claimed)
    return 0


cdef int page_free_head(page_state *st, uint64_t pfn) noexcept nogil:
    """Free the allocated block that starts at *pfn*; its order, or -EINVAL."""
    cdef int order = page_head_order(st, pfn)
    if order < 0:
        return -EINVAL
    page_clear_heads(st, pfn, order, 1)
    page_free_span(st, pfn, pfn + (<uint64_t>1 << order))
    return order


cdef int page_alloc_array(page_state *st, uint64_t *phys, uint64_t count, int order, int node,
                          int page_shift) noexcept nogil:
    """Allocate *count* blocks, all or none."""
    cdef uint64_t done = 0, pfn = 0, run, i, step = <uint64_t>1 << (order + page_shift)
    while done < count:
        run = page_alloc_run(st, order, count - done, node, &pfn)
        if run == 0:
            for i in range(done):
                page_free_head(st, phys[i] >> page_shift)
            return -ENOMEM
        for i in range(run):
            phys[done + i] = (pfn << page_shift) + i * step
        done += run
    return 0


cdef int page_free_array(page_state *st, const uint64_t *phys, uint64_t count, uint8_t *orders,
                         int page_shift, uint64_t *at) noexcept nogil:
    """Free *count* blocks, all or none; *orders* is room for their orders.

    -EINVAL: the one at index *at* is no allocated block (or is named twice).
    """
    cdef uint64_t i = 0, j, pfn, block, conflict = 0
    cdef int order
    while i < count:
        pfn = phys[i] >> page_shift
        order = page_head_order(st, pfn)
        if order < 0 or phys[i] != pfn << page_shift:
            at[0] = i
            while i:  # undo: nothing else can have taken them meanwhile
                i -= 1
                page_claim_run(st, phys[i] >> page_shift, orders[i], 1, False, True, &conflict)
            return -EINVAL
        # blocks that adjoin in memory are freed as one run
        block = <uint64_t>1 << order
        j = i
        while True:
            orders[j] = order
            j += 1
            if j == count or phys[j] != phys[j - 1] + (block << page_shift):
                break
            if phys[j] >> page_shift >= st.end_pfn:
                break
            if not flat_test(st.heads[order], page_index(st, phys[j] >> page_shift, order)):
                break
        page_clear_heads(st, pfn, order, j - i)
        page_free_span(st, pfn, pfn + ((j - i) << order))
        i = j
    return 0


cdef bint page_all_allocated(const page_state *st, uint64_t pfn, uint64_t end) noexcept nogil:
    """Whether allocated blocks cover [pfn, end)."""
    cdef uint64_t head = 0
    cdef bint claimed = False
    cdef int order
    while pfn < end:
        order = page_owner(st, pfn, &head, &claimed)
        if order < 0 or claimed:
            return False
        pfn = head + (<uint64_t>1 << order)
    return True


cdef bint page_all_claimed(const page_state *st, uint64_t pfn, uint64_t end) noexcept nogil:
    """Whether claimed blocks cover [pfn, end)."""
    cdef uint64_t head = 0
    cdef bint claimed = False
    cdef int order
    while pfn < end:
        order = page_owner(st, pfn, &head, &claimed)
        if order < 0 or not claimed:
            return False
        pfn = head + (<uint64_t>1 << order)
    return True


cdef uint64_t page_count_free(const page_state *st, int node, bint scratch) noexcept nogil:
    cdef uint64_t total = 0
    cdef size_t i
    for i in range(st.nr_segments):
        if st.segments[i].scratch == scratch and (node == NO_NODE or st.segments[i].node == node):
            total += st.segments[i].nr_free
    return total


cdef void page_state_free(page_state *st) noexcept nogil:
    if st != NULL:
        if st.map != NULL:
            munmap(st.map, st.map_bytes)
        free(st.segments)
        free(st)


cdef page_state *page_state_new(const memory_range *ranges, size_t nr_ranges,
                                const memory_range *scratch, size_t nr_scratch) noexcept nogil:
    """Everything free. *scratch*: sorted, not empty, disjoint, inside the ranges. NULL: ENOMEM."""
    cdef page_state *st = <page_state *>calloc(1, sizeof(page_state))
    cdef uint64_t *words = NULL
    cdef uint64_t used, pfn, stop, nr_bits
    cdef page_segment *seg
    cdef size_t i, area
    cdef int order, step
    if st == NULL:
        return NULL
    st.base_pfn = ranges[0].start
    st.end_pfn = ranges[nr_ranges - 1].end
    st.top = log2_64(st.end_pfn - st.base_pfn)
    st.segments = <page_segment *>calloc(nr_ranges + 2 * nr_scratch, sizeof(page_segment))
    if st.segments == NULL:
        page_state_free(st)
        return NULL

    for step in range(2):  # measure, then place
        used = 0
        for order in range(st.top + 1):
            nr_bits = page_index(st, st.end_pfn - 1, order) + 1
            used += bitmap_layout(&st.free[order], nr_bits, words + used if step else NULL)
            if step:
                st.heads[order] = words + used
                st.claims[order] = words + used + ((nr_bits + 63) >> 6)
            used += 2 * ((nr_bits + 63) >> 6)
        if step == 0:
            st.map_bytes = used * 8
            st.map = mmap(NULL, st.map_bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
            if st.map == MAP_FAILED:
                st.map = NULL
                page_state_free(st)
                return NULL
            words = <uint64_t *>st.map

    area = 0
    for i in range(nr_ranges):
        pfn = ranges[i].start
        while pfn < ranges[i].end:
            while area < nr_scratch and scratch[area].end <= pfn:
                area += 1
            seg = &st.segments[st.nr_segments]
            st.nr_segments += 1
            seg.scratch = area < nr_scratch and scratch[area].start <= pfn
            stop = ranges[i].end
            if area < nr_scratch:
                stop = min(stop, scratch[area].end if seg.scratch else scratch[area].start)
            seg.start = pfn
            seg.end = stop
            seg.node = ranges[i].node
            page_free_run(st, seg, pfn, stop)
            pfn = stop
    return st


cdef int page_state_copy_heads(page_state *to, const page_state *old,
                               uint64_t *conflict) noexcept nogil:
    """Take in *to* (all free) what is allocated or claimed in *old*."""
    cdef uint64_t index, nr_bits, pfn, left
    cdef uint64_t *words
    cdef int order, kind, rc
    for kind in range(2):
        for order in range(old.top + 1):
            left = old.nr_claims[order] if kind else old.nr_heads[order]
            words = old.claims[order] if kind else old.heads[order]
            nr_bits = page_index(old, old.end_pfn - 1, order) + 1
            index = 0
            while left:
                index = flat_next(words, index, nr_bits)
                pfn = page_pfn(old, index, order)
                rc = page_claim_run(to, pfn, order, 1, kind, True, conflict)
                if rc < 0:
                    return rc
                index += 1
                left -= 1
    return 0


# ---- the mapping ----

@cython.final
@cython.auto_pickle(False)
cdef class MemoryMapping:
    """Pages of the address space that hold simulated memory.

    Every view of the memory keeps its mapping alive; the last one to die unmaps it. Made by
    ``PhysicalMemory`` only.
    """

    def __init__(self):
        raise TypeError("made by PhysicalMemory")

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.address, self.nbytes, self.readonly, flags)

    def __dealloc__(self):
        if self.address != NULL and self.owner is None:
            munmap(self.address, self.nbytes)


cdef MemoryMapping new_mapping(void *address, size_t nbytes, bint readonly, object owner=None):
    cdef MemoryMapping mapping = MemoryMapping.__new__(MemoryMapping)
    mapping.owner = owner
    mapping.address = <char *>address
    mapping.nbytes = nbytes
    mapping.readonly = readonly
    return mapping


cdef char *reserve_addresses(size_t nbytes) noexcept nogil:
    """Address space for a mapping of memory, aligned so that mremap() moves whole page tables.

    Measured for 16 TiB: half the time of an unaligned move, and the populated part is not moved
    entry by entry. NULL with errno set if there is none.
    """
    cdef size_t align = 1 << 30 if nbytes >= 1 << 30 else 1 << 21
    cdef size_t gap
    cdef char *start = <char *>mmap(NULL, nbytes + align, PROT_NONE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if start == MAP_FAILED:
        return NULL
    gap = -<size_t>start & (align - 1)
    nbytes = (nbytes + 4095) & ~<size_t>4095
    if gap:
        munmap(start, gap)
    if align - gap:
        munmap(start + gap + nbytes, align - gap)
    return start + gap


cdef int os_error(object what) except -1:
    raise OSError(c_errno.errno, f"{what}: {strerror(c_errno.errno).decode()}")


# ---- memory ----

def parse_size(size):
    """Return a size in bytes, given as an integer or as text: ``"64GiB"``, ``"512 MiB"``, ``"2M"``.

    Units are powers of 1024: K, M, G, T, P, E, alone or followed by ``iB``.

    Raises:
        TypeError: neither an integer nor text.
        ValueError: not such a text, or negative.
    """
    if not isinstance(size, str):
        size = PyNumber_Index(size)
        if size < 0:
            raise ValueError(f"size {size}: negative")
        return size
    found = re.fullmatch(r"\s*([0-9]+)\s*(?:([KMGTPE])(?:iB)?|B)?\s*", size, re.ASCII)
    if found is None:
        raise ValueError(f'size "{size}": not a number with K, M, G, T, P, E or KiB, MiB, GiB …')
    number, unit = found.groups()
    return int(number) << (10 * ("KMGTPE".index(unit) + 1) if unit else 0)


cdef uint64_t MAX_SPAN = 1 << 46  # 64 TiB: half of what a process can map on x86-64


cdef int max_order_of(uint64_t page_size) noexcept nogil:
    """MAX_PAGE_ORDER of Linux on arm64 (and x86 for 4 KiB); -1 for another page size."""
    if page_size == 4096:
        return 10
    if page_size == 16384:
        return 11
    if page_size == 65536:
        return 13
    return -1


cdef int as_node(object node, int nr_nodes) except? -2:
    if node is None:
        return NO_NODE
    cdef object number = PyNumber_Index(node)
    if not 0 <= number < nr_nodes:
        raise ValueError(f"node {number}: memory has nodes 0..{nr_nodes - 1}")
    return number


@cython.final
@cython.auto_pickle(False)
cdef class PhysicalMemory:
    """The memory of a simulated machine: bytes, which outlive a kernel, and page state.

    Args:
        size: RAM in bytes, or as text (``"64GiB"``). With *ranges* it may be
            None; otherwise it must be their sum.
        base: physical address of the first byte (``phys_addr_t``), a multiple of *page_size*.
            With *ranges* it is the first range's start.
        nodes: number of NUMA nodes that *size* is divided among, in equal parts as far as blocks of
            the kernel's largest order allow. Not used with *ranges*.
        ranges: ``[(start, nbytes, node), ...]``: disjoint, page-aligned, in any order. What lies
            between them is a hole: no RAM.
        fd: a file that holds the bytes, at least ``offset`` + span long; it is duplicated. None:
            a new memfd, sparse, sealed against resizing. Whoever gives an unsealed file and then
            shortens it gets SIGBUS.
        offset: byte of *fd* that belongs to the first physical byte; a multiple of the host's page
            size.
        page_size: 4096, 16384 or 65536.
        host: a writable buffer that is the memory, from *base* to the end of the last range, in
            place of a file; it is kept. Then there is no successor in another process, nobody can
            tell what was never written, and :meth:`cut_off` cuts nothing off.

    Attributes:
        fd, offset, base, page_size: as above; *fd* is this object's own, -1 with *host*.
        size: bytes from *base* to the end of the last range, holes included.
        nr_pages: pages of RAM, holes not included.
        nr_nodes: highest NUMA node + 1.
        scratch: ``[(phys, nbytes), ...]`` sorted, as set by :meth:`reserve_scratch`.
        readonly: whether the mapping is read-only (:meth:`attach`).
        detached: whether the page state lives in another process (:meth:`detach`).

    Allocation is deterministic: lowest segment first (a segment is a range cut at scratch's
    borders), there the smallest order that has a free block, of those the lowest address. Blocks
    are naturally aligned and never cross a border of range, node or scratch. Address 0 is never
    handed out.

    Raises:
        ValueError, TypeError: an argument is out of range.
        OSError: the file cannot be made, is too short, or cannot be mapped.

    Context: calls hold the memory's own lock; those on arrays release the GIL.
    """

    def __cinit__(self, size=None, *, base=0, nodes=1, ranges=None, fd=None, offset=0,
                  page_size=4096, host=None):
        self.fd = -1
        cdef list parts
        cdef object number_of_nodes, total, step, at, unit, start
        if ranges is None:
            if size is None:
                raise TypeError("PhysicalMemory: size or ranges is needed")
            total = parse_size(size)
            start = parse_size(base)
            unit = parse_size(page_size)
            number_of_nodes = PyNumber_Index(nodes)
            if max_order_of(as_u64(unit)) < 0:
                raise ValueError(f"page_size {unit}: not 4096, 16384 or 65536")
            if total <= 0 or total % unit:
                raise ValueError(f"size {total}: not a positive multiple of the page size {unit}")
            if not 1 <= number_of_nodes <= 1024:
                raise ValueError(f"nodes {number_of_nodes}: not in 1..1024")
            step = total // number_of_nodes
            block = unit << max_order_of(as_u64(unit))
            step -= step % (block if step >= block else unit)
            if step == 0:
                raise ValueError(f"size {total}: less than a page a node ({number_of_nodes})")
            parts = []
            at = 0
            for node in range(number_of_nodes):
                end = total if node == number_of_nodes - 1 else at + step
                parts.append((start + at, end - at, node))
                at = end
        else:
            parts = sorted(
                (PyNumber_Index(s), PyNumber_Index(n), PyNumber_Index(node))
                for s, n, node in ranges
            )
            if not parts:
                raise ValueError("ranges: empty")
            if parse_size(base) not in (0, parts[0][0]):
                raise ValueError(f"base {base:#x}: the first range starts at {parts[0][0]:#x}")
            total = sum(n for s, n, node in parts)
            if size is not None and parse_size(size) != total:
                raise ValueError(f"size {size}: the ranges hold {total} bytes")
        self.setup(parts, fd, offset, page_size, False, host)

    cdef int setup(self, list ranges, object fd, object offset, object page_size,
                   bint readonly, object host) except -1:
        cdef size_t i = 0
        cdef object limit = MAX_SPAN, previous = -1
        self.page_size = parse_size(page_size)
        if max_order_of(self.page_size) < 0:
            raise ValueError(f"page_size {page_size}: not 4096, 16384 or 65536")
        self.page_shift = ctz64(self.page_size)
        if not ranges:
            raise ValueError("ranges: empty")
        for start, nbytes, node in ranges:
            if start < 0 or start % self.page_size or nbytes <= 0 or nbytes % self.page_size:
                raise ValueError(f"range {start:#x}+{nbytes:#x}: not whole pages")
            if start < previous:
                raise ValueError(f"range {start:#x}+{nbytes:#x}: overlaps the one before it")
            if not 0 <= node < 1024:
                raise ValueError(f"range {start:#x}+{nbytes:#x}: node {node} is not in 0..1023")
            previous = start + nbytes
            if previous > limit << 2 or previous - ranges[0][0] > limit:
                raise ValueError(f"range {start:#x}+{nbytes:#x}: span over {limit:#x}")
        self.memory_ranges = <memory_range *>xmalloc(len(ranges) * sizeof(memory_range))
        self.nr_ranges = len(ranges)
        for start, nbytes, node in ranges:
            self.memory_ranges[i].start = start >> self.page_shift
            self.memory_ranges[i].end = (start + nbytes) >> self.page_shift
            self.memory_ranges[i].node = node
            self.nr_pages += nbytes >> self.page_shift
            self.nr_nodes = max(self.nr_nodes, <int>node + 1)
            i += 1
        self.base = ranges[0][0]
        self.size = previous - ranges[0][0]
        self.scratch = []
        self.offset = as_u64(offset)
        self.readonly = readonly
        if host is not None:
            if fd is not None or self.offset:
                raise ValueError("host: it has neither fd nor offset")
            self.adopt(self.map_host(host))
            return 0
        if fd is None:
            if self.offset:
                raise ValueError(f"offset {offset}: without fd there is none")
            self.fd = os.memfd_create("luo-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, self.size)
            fcntl.fcntl(self.fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_GROW | F_SEAL_SHRINK)
        else:
            self.fd = os.dup(fd)
            if self.offset % mmap_module.PAGESIZE:
                raise ValueError(f"offset {offset}: not a multiple of the host's page size")
            length = os.fstat(self.fd).st_size
            if length < self.offset + self.size:
                raise ValueError(f"fd {fd}: {length} bytes, {self.offset + self.size} are needed")
        self.adopt(self.map_bytes())
        return 0

    cdef MemoryMapping map_host(self, object host):
        cdef unsigned char[::1] octets = memoryview(host).cast("B")
        if <uint64_t>octets.shape[0] < self.size:
            raise ValueError(f"host: {octets.shape[0]} bytes, {self.size} are needed")
        if <uint64_t>&octets[0] % mmap_module.PAGESIZE:
            raise ValueError("host: does not begin on a page of the host")
        return new_mapping(&octets[0], self.size, False, octets)

    def file(self, str what not None):
        """Return :attr:`fd`, for *what*.

        Raises:
            KhoError: EOPNOTSUPP if the memory has no file, but is a buffer of the host.
        """
        if self.fd < 0:
            raise from_errno(errno.EOPNOTSUPP, f"{what}: memory is a buffer, it has no file")
        return self.fd

    cdef MemoryMapping map_bytes(self):
        cdef char *address = reserve_addresses(self.size)
        cdef int prot = PROT_READ if self.readonly else PROT_READ | PROT_WRITE
        if address == NULL:  # a few spans of TiBs fill the address space; garbage may hold some
            gc.collect()
            address = reserve_addresses(self.size)
        if address == NULL or mmap(address, self.size, prot, MAP_SHARED | MAP_NORESERVE | MAP_FIXED,
                                   self.fd, <off_t>self.offset) == MAP_FAILED:
            os_error(f"mapping {self.size:#x} bytes of memory")
        return new_mapping(address, self.size, self.readonly)

    cdef int adopt(self, MemoryMapping mapping) except -1:
        self.mapping = mapping
        self.window = memoryview(mapping)
        self.zero = <uint64_t>mapping.address - self.base
        return 0

    def __dealloc__(self):
        page_state_free(self.state)
        free(self.memory_ranges)
        if self.fd >= 0:
            close(self.fd)

    def __repr__(self):
        return (f"PhysicalMemory({self.nr_pages << self.page_shift:#x} bytes in "
                f"{self.nr_ranges} ranges at {self.base:#x}, {self.nr_nodes} nodes, "
                f"page_size={self.page_size})")

    @staticmethod
    def attach(fd, ranges, *, offset=0, page_size=4096, readonly=True):
        """Map memory that another process made, from its *fd* and ranges.

        Args:
            fd: the other's :attr:`fd`, inherited or received; it is duplicated.
            ranges: the other's :attr:`ranges`.
            offset, page_size: the other's.
            readonly: never write until :meth:`writable`.

        Returns:
            PhysicalMemory: with no page state; a boot makes it.
        """
        cdef PhysicalMemory memory = PhysicalMemory.__new__(
            PhysicalMemory, ranges=ranges, fd=fd, offset=offset, page_size=page_size)
        if readonly:
            if mprotect(memory.mapping.address, memory.mapping.nbytes, PROT_READ) < 0:
                os_error("attach")
            memory.readonly = memory.mapping.readonly = True
            memory.adopt(memory.mapping)
        return memory

    def writable(self):
        """Allow writing to memory that was attached read-only; views made before stay read-only."""
        if not self.readonly:
            return
        if mprotect(self.mapping.address, self.mapping.nbytes, PROT_READ | PROT_WRITE) < 0:
            os_error("writable")
        self.readonly = self.mapping.readonly = False
        self.adopt(self.mapping)

    # ---- what there is ----

    @property
    def ranges(self):
        """``[(start, nbytes, node), ...]`` by ascending address."""
        cdef memory_range r
        cdef size_t i
        result = []
        for i in range(self.nr_ranges):
            r = self.memory_ranges[i]
            start, nbytes = r.start << self.page_shift, (r.end - r.start) << self.page_shift
            result.append((start, nbytes, r.node))
        return result

    @property
    def max_order(self):
        """The kernel's MAX_PAGE_ORDER: 10, 11, 13 for 4, 16, 64 KiB pages."""
        return max_order_of(self.page_size)

    @property
    def restricted(self):
        """Whether only scratch is handed out, as before the preserved map has been walked."""
        return self.state != NULL and self.state.restricted

    def nr_free_pages(self, node=None):
        """Free pages outside scratch, of one NUMA node or of all."""
        self.use()
        cdef int nid = as_node(node, self.nr_nodes)
        with self.lock:
            return page_count_free(self.state, nid, False)

    @property
    def nr_scratch_pages(self):
        """Pages in scratch, free or not."""
        return sum(nbytes for phys, nbytes in self.scratch) >> self.page_shift

    @property
    def nr_free_scratch_pages(self):
        """Free pages in scratch."""
        self.use()
        with self.lock:
            return page_count_free(self.state, NO_NODE, True)

    @property
    def nr_allocated(self):
        """Blocks that are allocated, whatever their order."""
        cdef uint64_t total = 0
        cdef int order
        self.use()
        with self.lock:
            for order in range(self.state.top + 1):
                total += self.state.nr_heads[order]
        return total

    def contains(self, phys, nbytes=1):
        """Whether [phys, phys + nbytes) is RAM."""
        cdef int wide = 0, long_piece = 0
        cdef int64_t start, size
        if PyLong_CheckExact(phys) and PyLong_CheckExact(nbytes):  # mostly, and in 63 bits
            start = PyLong_AsLongAndOverflow(phys, &wide)
            size = PyLong_AsLongAndOverflow(nbytes, &long_piece)
            if not wide and not long_piece:
                return (
                    size >= 0 and start >= 0 and <uint64_t>start >= self.base
                    and <uint64_t>size <= self.size
                    and <uint64_t>start - self.base <= self.size - <uint64_t>size
                    and self.has(start, size)
                )
        cdef object at = PyNumber_Index(phys), n = PyNumber_Index(nbytes)
        if at < self.base or n < 0 or at + n > self.base + self.size:
            return False
        return self.has(at, n)

    cdef bint has(self, uint64_t phys, uint64_t nbytes) noexcept nogil:
        """Whether all of [phys, phys + nbytes) is RAM; an empty piece is if its address is."""
        cdef uint64_t pfn = phys >> self.page_shift
        cdef uint64_t end = phys + (nbytes if nbytes else 1)
        cdef size_t low = 0, high = self.nr_ranges, middle
        if end < phys:
            return False
        end = ((end - 1) >> self.page_shift) + 1
        while low < high:
            middle = (low + high) >> 1
            if self.memory_ranges[middle].end <= pfn:
                low = middle + 1
            else:
                high = middle
        while low < self.nr_ranges and self.memory_ranges[low].start <= pfn:
            pfn = self.memory_ranges[low].end
            if end <= pfn:
                return True
            low += 1
        return False

    cdef int node_at(self, uint64_t pfn) noexcept nogil:
        """NUMA node of *pfn*, or NO_NODE."""
        cdef size_t low = 0, high = self.nr_ranges, middle
        while low < high:
            middle = (low + high) >> 1
            if self.memory_ranges[middle].end <= pfn:
                low = middle + 1
            else:
                high = middle
        if low < self.nr_ranges and self.memory_ranges[low].start <= pfn:
            return self.memory_ranges[low].node
        return NO_NODE

    def node_of(self, phys):
        """NUMA node of the byte at *phys*; ValueError if it is not RAM."""
        cdef int node = self.node_at(as_u64(phys) >> self.page_shift)
        if node == NO_NODE:
            raise ValueError(f"{phys:#x}: not RAM")
        return node

    cdef bint populated(self, uint64_t phys, uint64_t nbytes) noexcept nogil:
        """Whether the file has data for all of [phys, phys + nbytes), which must be RAM.

        Reading a hole through the mapping would fill it; asking the file does not. Of a buffer
        nobody knows.
        """
        cdef off_t at = <off_t>(self.offset + (phys - self.base)), end = at + <off_t>nbytes
        if self.fd < 0:
            return True
        if lseek(self.fd, at, SEEK_DATA) != at:
            return False
        # Looking for the next hole may look at everything behind. Holes are whole pages.
        return end <= (at | 4095) + 1 or lseek(self.fd, at, SEEK_HOLE) >= end

    def is_populated(self, phys, nbytes):
        """Whether all these bytes have been touched: none lies in a hole of the file."""
        self.check_ram("is_populated", phys, nbytes)
        return self.populated(as_u64(phys), as_u64(nbytes))

    def is_resident(self, phys, nbytes):
        """Whether reading all these bytes where they lie fills no hole and waits for no disk.

        A cheap question: what was swapped out is populated, and not resident.
        """
        self.check_ram("is_resident", phys, nbytes)
        cdef uint64_t at = self.zero + as_u64(phys), end = at + as_u64(nbytes), stop, i
        cdef unsigned char[512] pages
        cdef bint resident = True
        with nogil:
            at &= ~<uint64_t>4095
            while at < end and resident:
                stop = min(end, at + 512 * 4096)
                if mincore(<void *>at, stop - at, pages) < 0:
                    resident = False
                for i in range((stop - at + 4095) // 4096):
                    resident = resident and pages[i] & 1
                at = stop
        return resident

    def read_into(self, phys, buffer):
        """Copy the bytes at *phys* to *buffer* without touching them: a hole reads as zeros.

        Raises:
            KhoError: EINVAL outside RAM.
            OSError: the file cannot be read.
        """
        with memoryview(buffer) as view, view.cast("B") as target:
            self.check_ram("read_into", phys, target.nbytes)
            if self.fd < 0:
                target[:] = self.view(phys, target.nbytes)
                return
            at, done = self.offset + (as_u64(phys) - self.base), 0
            while done < target.nbytes:
                nr = os.preadv(self.fd, [target[done:]], at + done)
                if nr == 0:  # the file was cut; what is behind its end is a hole
                    target[done:] = bytes(target.nbytes - done)
                    break
                done += nr

    # ---- bytes ----

    cdef int check_ram(self, object what, object phys, object nbytes) except -1:
        if not self.contains(phys, nbytes):
            raise from_errno(EINVAL, f"{what} {phys:#x}+{nbytes:#x}: not in RAM")
        return 0

    def view(self, phys, nbytes):
        """Return the bytes at *phys* as a memoryview of format ``B``, writable unless read-only.

        Raises:
            KhoError: EINVAL if any byte is outside RAM.
        """
        self.check_ram("view", phys, nbytes)
        cdef Py_ssize_t start = as_u64(phys) - self.base
        return self.window[start:start + <Py_ssize_t>as_u64(nbytes)]

    def prefault(self, phys, nbytes):
        """Touch every page of the bytes, so that nobody pays for it later; contents stay.

        Raises:
            KhoError: EINVAL outside RAM, EROFS if memory is read-only.
        """
        nbytes = parse_size(nbytes)
        self.check_ram("prefault", phys, nbytes)
        self.check_writable("prefault")
        cdef uint64_t at = as_u64(phys), count = as_u64(nbytes)
        cdef int rc
        with nogil:
            rc = touch_pages(<char *>(self.zero + at), count)
        if rc < 0:
            c_errno.errno = -rc
            os_error(f"prefault {phys:#x}+{nbytes:#x}")

    def prefault_free(self, nbytes, order=0, node=None):
        """Touch the blocks that the next allocations of *order* will get.

        Args:
            nbytes: how much, in bytes; as much as is free if that is less.
            order: of the allocations to come.
            node: of the allocations to come.

        Returns:
            int: bytes touched.
        """
        self.use()
        self.check_writable("prefault_free")
        cdef int o = as_order(order), nid = as_node(node, self.nr_nodes), rc = 0
        cdef uint64_t block, left, run, pfn = 0, at, done = 0
        cdef uint64_t *runs = NULL
        cdef uint64_t *grown
        cdef size_t nr_runs = 0, i
        if o >= MAX_ORDERS:
            return 0
        block = self.page_size << o
        left = <uint64_t>min((parse_size(nbytes) + block - 1) // block, self.nr_pages)
        # Allocated, touched and given back, one run after the other: this leaves no trace.
        with nogil, self.lock:
            while left and rc == 0:
                run = page_alloc_run(self.state, o, left, nid, &pfn)
                if run == 0:
                    break
                left -= run
                if nr_runs & 63 == 0:
                    grown = <uint64_t *>realloc(runs, (nr_runs + 64) * 16)
                    if grown == NULL:
                        rc = -ENOMEM
                        page_clear_heads(self.state, pfn, o, run)
                        page_free_run(self.state, page_segment_of(self.state, pfn), pfn,
                                      pfn + (run << o))
                        break
                    runs = grown
                runs[2 * nr_runs] = pfn
                runs[2 * nr_runs + 1] = run
                nr_runs += 1
            for i in range(nr_runs):
                if rc == 0:
                    # These are whole blocks: elsewhere memory is sparse, and stays so.
                    advise_huge(<void *>(self.zero + (runs[2 * i] << self.page_shift)),
                                runs[2 * i + 1] * block)
                    rc = touch_pages(<char *>(self.zero + (runs[2 * i] << self.page_shift)),
                                     runs[2 * i + 1] * block)
                    done += runs[2 * i + 1] * block
                at = runs[2 * i]
                page_clear_heads(self.state, at, o, runs[2 * i + 1])
                page_free_run(self.state, page_segment_of(self.state, at), at,
                              at + (runs[2 * i + 1] << o))
            free(runs)
        if rc < 0:
            c_errno.errno = -rc
            os_error(f"prefault_free {nbytes:#x}")
        return done

    # ---- pages ----

    cdef int use(self) except -1:
        """The gate of every call on page state: it must live here, and is built on first use."""
        if self.detached:
            raise from_errno(errno.ESHUTDOWN, "page state: it lives in another process")
        if self.state == NULL:
            self.state = self.new_state(self.scratch)
        return 0

    cdef int check_writable(self, object what) except -1:
        if self.readonly:
            raise from_errno(errno.EROFS, f"{what}: memory is attached read-only")
        return 0

    cdef page_state *new_state(self, list scratch) except NULL:
        """A state with everything free. *scratch*: from check_scratch()."""
        cdef page_state *state
        cdef size_t nr = len(scratch), i
        cdef memory_range *areas = <memory_range *>xmalloc(nr * sizeof(memory_range))
        for i in range(nr):
            phys, nbytes = scratch[i]
            areas[i].start = <uint64_t>phys >> self.page_shift
            areas[i].end = <uint64_t>(phys + nbytes) >> self.page_shift
        state = page_state_new(self.memory_ranges, self.nr_ranges, areas, nr)
        free(areas)
        if state == NULL:
            raise MemoryError("page state")
        return state

    def check_scratch(self, areas):
        """Return *areas* sorted and without empty ones.

        Args:
            areas: ``[(phys, nbytes), ...]``.

        Raises:
            ValueError: an area is not whole pages, is not in RAM, or overlaps another.
        """
        result = sorted((PyNumber_Index(p), PyNumber_Index(n)) for p, n in areas)
        result = [(p, n) for p, n in result if n]
        previous = 0
        for phys, nbytes in result:
            if phys < 0 or nbytes < 0 or (phys | nbytes) & (self.page_size - 1):
                raise ValueError(f"scratch {phys:#x}+{nbytes:#x}: not whole pages")
            if not self.contains(phys, nbytes):
                raise ValueError(f"scratch {phys:#x}+{nbytes:#x}: not in RAM")
            if phys < previous:
                raise ValueError(f"scratch {phys:#x}+{nbytes:#x}: overlaps the one before it")
            previous = phys + nbytes
        return result

    def reserve_scratch(self, areas):
        """Set *areas* aside as scratch, in place of those before: never handed out from now on.

        Raises:
            ValueError: see :meth:`check_scratch`.
            KhoError: EBUSY if an allocated block reaches into or crosses the border of an area.
        """
        cdef list wanted = self.check_scratch(areas)
        cdef page_state *state
        cdef uint64_t conflict = 0, pfn = 0
        cdef bint taken = False
        cdef int rc = 0
        cdef size_t i
        if self.detached:
            self.use()
        state = self.new_state(wanted)
        with self.lock:
            if self.state != NULL:
                rc = page_state_copy_heads(state, self.state, &conflict)
            for i in range(state.nr_segments):
                if rc == 0 and state.segments[i].scratch and not scratch_untouched(
                        &state.segments[i]):
                    conflict = state.segments[i].start
                    rc = -EBUSY
            if rc == 0:
                state, self.state = self.state, state
                self.scratch = wanted
        page_state_free(state)
        if rc < 0:
            raise from_errno(EBUSY, f"reserve_scratch {conflict << self.page_shift:#x}: "
                                    "not free")

    def restrict(self, areas):
        """Forget all page state and hand out nothing but scratch until :meth:`release`.

        This is how a kernel boots that may not write over what the one before it preserved.
        """
        cdef list wanted = self.check_scratch(areas)
        cdef page_state *state
        if self.detached:
            self.use()
        state = self.new_state(wanted)
        state.restricted = True
        with self.lock:
            state, self.state = self.state, state
            self.scratch = wanted
        page_state_free(state)

    def release(self):
        """End the restriction to scratch: all that is not claimed or allocated is free."""
        self.use()
        self.state.restricted = False

    def forget(self):
        """Drop all page state and scratch, as the end of a kernel does; bytes stay.

        Page state that lived in another process is gone with it, and begins anew here.
        """
        cdef page_state *state = NULL
        # A state is replaced and never taken away: another thread may be waiting to use it.
        if self.state != NULL:
            state = self.new_state([])
        with self.lock:
            state, self.state = self.state, state
            self.scratch = []
            self.detached = False
        page_state_free(state)

    def detach(self):
        """Leave page state to another process: calls that need it raise StateError, ESHUTDOWN."""
        self.forget()
        self.detached = True

    def alloc_folio(self, order, node=None):
        """Allocate 2**order pages, naturally aligned; contents are whatever was there.

        Args:
            order: 0 to any; above :attr:`max_order` as long as an aligned block is free.
            node: NUMA node, strictly; None for any.

        Returns:
            int: physical address, never 0.

        Raises:
            KhoError: ENOMEM if no block is free.
        """
        cdef int o = as_order(order), nid = as_node(node, self.nr_nodes)
        cdef uint64_t pfn = 0, got
        self.use()
        with self.lock:
            got = page_alloc_run(self.state, o, 1, nid, &pfn)
        if got == 0:
            raise from_errno(ENOMEM, f"alloc_folio order {o}: no free block"
                                     + ("" if node is None else f" on node {node}"))
        return pfn << self.page_shift

    def alloc_folios(self, n, order, node=None):
        """Allocate *n* blocks of one order, all or none.

        Returns:
            ndarray: shape (n,), uint64, the addresses that *n* calls of :meth:`alloc_folio` give.

        Raises:
            KhoError: ENOMEM, and nothing is allocated.
        """
        cdef int o = as_order(order), nid = as_node(node, self.nr_nodes), rc = -ENOMEM
        cdef uint64_t count = as_u64(n)
        self.use()
        if o < MAX_ORDERS and count <= self.nr_pages >> o:
            result = np.empty(count, np.uint64)
            if count == 0:
                return result
            rc = self.alloc_into(result, o, nid)
        if rc < 0:
            raise from_errno(-rc, f"alloc_folios {count} of order {o}: not enough free blocks")
        return result

    cdef int alloc_into(self, uint64_t[::1] phys, int order, int node) except -1000:
        with nogil, self.lock:
            return page_alloc_array(self.state, &phys[0], phys.shape[0], order, node,
                                    self.page_shift)

    def alloc_pages(self, nr_pages, node=None):
        """Allocate adjoining pages, as ``alloc_pages_exact()``.

        They come out of one aligned block of the next power of two, whose tail is given back; to
        :meth:`free` and :meth:`free_pages` they are the naturally aligned blocks of that run.

        Returns:
            int: physical address of the first.

        Raises:
            ValueError: *nr_pages* is 0.
            KhoError: ENOMEM.
        """
        cdef uint64_t count = as_u64(nr_pages), pfn = 0, end, got = 0
        cdef int nid = as_node(node, self.nr_nodes), order
        cdef page_segment *seg
        self.use()
        if count == 0:
            raise ValueError("alloc_pages 0")
        order = log2_64(count - 1) + 1
        with self.lock:
            if order < MAX_ORDERS:
                got = page_alloc_run(self.state, order, 1, nid, &pfn)
            if got and count != <uint64_t>1 << order:
                seg = page_segment_of(self.state, pfn)
                page_clear_heads(self.state, pfn, order, 1)
                end = pfn + count
                page_free_run(self.state, seg, end, pfn + (<uint64_t>1 << order))
                page_head_blocks(self.state, pfn, end)
        if got == 0:
            raise from_errno(ENOMEM, f"alloc_pages {count}: no free block of order {order}")
        return pfn << self.page_shift

    def claim(self, phys, order):
        """Allocate the block at *phys*, as the owner of that very address.

        Raises:
            KhoError: EINVAL if it is misaligned, outside RAM or crosses the border of scratch;
                EBUSY if any page of it is not free.
        """
        cdef int o = as_order(order), rc = -EINVAL, held
        cdef uint64_t at = as_u64(phys), conflict = 0, head = 0
        cdef bint claimed = False
        self.use()
        if o < MAX_ORDERS and at & ((self.page_size << o) - 1) == 0:
            with self.lock:
                rc = page_claim_run(self.state, at >> self.page_shift, o, 1, False, True, &conflict)
                if rc == -EBUSY:
                    held = page_owner(self.state, conflict, &head, &claimed)
        if rc == -EBUSY:
            raise from_errno(EBUSY, f"claim {at:#x}/order {o}: overlaps "
                                    + describe_block(self, head, held, claimed))
        if rc < 0:
            raise from_errno(EINVAL, f"claim {at:#x}/order {o}: misaligned, outside RAM or "
                                     "across a border")

    def free(self, phys):
        """Free the allocated block that starts at *phys*.

        Raises:
            KhoError: EINVAL if no allocated block starts there.
        """
        cdef uint64_t at = as_u64(phys)
        cdef int rc = -EINVAL
        self.use()
        if at & (self.page_size - 1) == 0:
            with self.lock:
                rc = page_free_head(self.state, at >> self.page_shift)
        if rc < 0:
            raise from_errno(EINVAL, f"free {at:#x}: no allocated block starts here")

    def free_folios(self, const uint64_t[::1] phys not None):
        """Free many blocks, all or none.

        Args:
            phys: shape (n,), uint64; orders may differ.

        Raises:
            KhoError: EINVAL names the first that is no allocated block, or is there twice.
        """
        cdef uint64_t count = phys.shape[0], at = 0
        cdef uint8_t *orders
        cdef int rc
        self.use()
        if count == 0:
            return
        orders = <uint8_t *>xmalloc(count)
        with nogil, self.lock:
            rc = page_free_array(self.state, &phys[0], count, orders, self.page_shift, &at)
        free(orders)
        if rc < 0:
            raise from_errno(EINVAL, f"free_folios {phys[at]:#x}: no allocated block starts here")

    def free_pages(self, phys, nr_pages):
        """Free the allocated blocks that make up *nr_pages* pages from *phys* on, all or none.

        Raises:
            KhoError: EINVAL if allocated blocks do not cover exactly these pages.
        """
        cdef uint64_t at = as_u64(phys), count = as_u64(nr_pages), pfn, end
        cdef int order = 0
        self.use()
        pfn = at >> self.page_shift
        end = pfn + count
        with self.lock:
            if at & (self.page_size - 1) or end < pfn:
                order = -1
            while order >= 0 and pfn < end:
                order = page_head_order(self.state, pfn)
                pfn += <uint64_t>1 << order if order >= 0 else 0
            if order >= 0 and pfn == end:
                pfn = at >> self.page_shift
                while pfn < end:
                    order = page_free_head(self.state, pfn)
                    pfn += <uint64_t>1 << order
                return
        raise from_errno(EINVAL, f"free_pages {at:#x}, {count} pages: not exactly allocated blocks")

    def is_allocated(self, phys, nbytes=1):
        """Whether allocated blocks cover all pages of [phys, phys + nbytes)."""
        self.use()
        if not self.contains(phys, nbytes):
            return False
        cdef uint64_t at = as_u64(phys), end = at + as_u64(nbytes)
        with self.lock:
            return page_all_allocated(self.state, at >> self.page_shift,
                                      ((end - 1) >> self.page_shift) + 1)

    def order_of(self, phys):
        """Order of the allocated block that starts at *phys*, or None."""
        cdef uint64_t at = as_u64(phys)
        cdef int order = -1
        self.use()
        if at & (self.page_size - 1) == 0:
            with self.lock:
                order = page_head_order(self.state, at >> self.page_shift)
        return None if order < 0 else order

    def free_blocks(self):
        """Return all free blocks, scratch included, as ``(phys, orders)``, by order and address."""
        cdef uint64_t index
        cdef int order
        phys, orders = [], []
        self.use()
        with self.lock:
            for order in range(self.state.top + 1):
                index = bitmap_next(&self.state.free[order], 0)
                while index != NO_BIT:
                    phys.append(page_pfn(self.state, index, order) << self.page_shift)
                    orders.append(order)
                    index = bitmap_next(&self.state.free[order], index + 1)
        return np.array(phys, np.uint64), np.array(orders, np.uint8)

    def allocated_blocks(self):
        """Return all allocated blocks as ``(phys, orders)``, by order and address."""
        cdef uint64_t count
        cdef int order
        phys, orders = [], []
        self.use()
        for order in range(self.state.top + 1):
            count = self.state.nr_heads[order]
            if count:
                phys.append(list_heads(self, self.state, self.state.heads[order], order, count))
                orders.append(np.full(count, order, np.uint8))
        if not phys:
            return np.empty(0, np.uint64), np.empty(0, np.uint8)
        return np.concatenate(phys), np.concatenate(orders)

    # ---- one kernel after the other ----

    def cut_off(self):
        """Cut every view made so far off from the memory: the commit point.

        The bytes move to a fresh mapping with their page tables; what the old views see are zeros
        for ever, and what they write goes nowhere. Views made from now on work.

        Of a buffer of the host nothing can be cut off: its owner goes on writing there.

        Context: no other thread may be inside a call that uses a view or this memory.
        """
        cdef char *old = self.mapping.address
        cdef char *place
        cdef void *blank
        cdef MemoryMapping fresh
        if self.fd < 0:
            return
        with self.lock:
            place = reserve_addresses(self.size)
            if place == NULL:
                os_error("cut_off")
            fresh = new_mapping(place, self.size, self.readonly)
            if mremap(old, self.size, self.size, MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED,
                      place) == MAP_FAILED:
                fresh = self.map_bytes()  # a kernel before 5.13: page tables are built anew
            blank = mmap(old, self.size, PROT_READ | (0 if self.readonly else PROT_WRITE),
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0)
            if blank == MAP_FAILED:
                os_error("cut_off")
            self.adopt(fresh)

    def clone(self):
        """Return an independent copy: same ranges and bytes, fresh page state.

        Populated extents are copied at once, so that no first touch is left for a timed phase; of
        a buffer of the host, everything. The copy has a file of its own.

        Raises:
            OSError: ENOMEM or ENOSPC of the host.
        """
        cdef PhysicalMemory copy = PhysicalMemory.__new__(
            PhysicalMemory, ranges=self.ranges, page_size=self.page_size)
        cdef off_t at = <off_t>self.offset, end = <off_t>(self.offset + self.size), stop
        cdef uint64_t start
        cdef int rc = 0
        with nogil:
            while at < end:
                if self.fd >= 0:
                    at = lseek(self.fd, at, SEEK_DATA)
                if at < 0 or at >= end:
                    if at < 0 and c_errno.errno != ENXIO:
                        rc = -c_errno.errno
                    break
                stop = lseek(self.fd, at, SEEK_HOLE) if self.fd >= 0 else end
                stop = end if stop < 0 or stop > end else stop
                start = <uint64_t>at - self.offset
                rc = touch_pages(copy.mapping.address + start, stop - at)
                if rc < 0:
                    break
                memcpy(copy.mapping.address + start, self.mapping.address + start, stop - at)
                at = stop
        if rc < 0:
            c_errno.errno = -rc
            os_error("clone")
        return copy


cdef void advise_huge(void *start, uint64_t nbytes) noexcept nogil:
    """Ask for huge pages where [start, start + nbytes) has whole ones; the host may refuse."""
    cdef uint64_t first = (<uint64_t>start + HUGE_PAGE - 1) & ~<uint64_t>(HUGE_PAGE - 1)
    cdef uint64_t end = (<uint64_t>start + nbytes) & ~<uint64_t>(HUGE_PAGE - 1)
    if first < end:
        madvise(<void *>first, end - first, ADVICE_HUGE)


cdef int touch_pages(char *start, uint64_t nbytes) noexcept nogil:
    """Make the pages of [start, start + nbytes) present and writable; 0 or -errno."""
    cdef char *first = <char *>(<uint64_t>start & ~<uint64_t>4095)
    cdef volatile_char *byte
    cdef uint64_t length = nbytes + <uint64_t>(start - first), done = 0
    if nbytes == 0:
        return 0
    while madvise(first, length, MADV_POPULATE_WRITE) < 0:
        if c_errno.errno == EINTR:
            continue
        if c_errno.errno != EINVAL:
            return -c_errno.errno
        while done < length:  # a kernel before 5.14
            byte = <volatile_char *>(first + done)
            byte[0] = byte[0]
            done += 4096
        break
    return 0


cdef bint scratch_untouched(const page_segment *seg) noexcept nogil:
    """Whether all pages of the segment are free (page 0 never is)."""
    return seg.nr_free == seg.end - seg.start - (1 if seg.start == 0 else 0)


cdef void page_head_blocks(page_state *st, uint64_t pfn, uint64_t end) noexcept nogil:
    """Mark the naturally aligned blocks of a taken run as allocated heads."""
    cdef int order
    while pfn < end:
        order = page_order_of_run(st, pfn, end)
        page_set_heads(st, pfn, order, 1, False)
        pfn += <uint64_t>1 << order


cdef object describe_block(PhysicalMemory memory, uint64_t pfn, int order, bint claimed):
    if order < 0:
        return "a reserved page"
    return (f"{'preserved' if claimed else 'allocated'} "
            f"{pfn << memory.page_shift:#x}/order {order}")


cdef object list_heads(
    PhysicalMemory memory, const page_state *st, const uint64_t *words, int order, uint64_t count
):
    """Addresses of the *count* blocks of one order that are marked in *words* of *st*, ascending.

    The state is the memory's, or one that a kernel builds beside it before it boots.
    """
    cdef uint64_t[::1] out
    cdef uint64_t index = 0, n = 0, nr_bits
    result = np.empty(count, np.uint64)
    out = result
    nr_bits = page_index(st, st.end_pfn - 1, order) + 1
    with nogil, memory.lock:
        while n < count:
            index = flat_next(words, index, nr_bits)
            if index == NO_BIT:
                break
            out[n] = page_pfn(st, index, order) << memory.page_shift
            n += 1
            index += 1
    return result
