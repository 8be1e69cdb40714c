# L3: the preserved map of kho-v5-series and kho-v1: bitmaps by order, listed in a chain of chunks.
#
# Bit n of bitmap i of order o stands for the block of 2**o pages at pfn (i * bits + n) << o. A
# bitmap has 4096 bits in kho-v5-series and kho-v1-512, a page of them later. What the next kernel
# reads is a list of chunks, each a page: next, order, count, then (first phys, bitmap) pairs,
# orders and indices ascending (kho-abi 3.2). It is written when a kernel finalizes, and names the
# very bitmaps that are in use: they live in simulated memory and are not copied.
#
# Bitmaps are found by index in tables beside simulated memory, so that nobody who writes there can
# lead this kernel astray.

cdef enum:
    CHUNK_HEAD_BYTES = 16  # u64 next, u32 order, u32 number of bitmaps
    CHUNK_ENTRY_BYTES = 16  # u64 phys of the first block, u64 phys of the bitmap

cdef struct kho_chunk_head:
    uint64_t next
    uint32_t order
    uint32_t nr


# ---- the map: workers ----

cdef inline uint64_t *kho_chunks_words(const kho_chunk_map *map, uint64_t phys) noexcept nogil:
    return <uint64_t *>(map.zero + phys)


cdef inline int kho_chunks_place(const kho_chunk_map *map, uint64_t key, uint64_t *index,
                                 uint64_t *bit) noexcept nogil:
    """Order of the block that *key* stands for, and where its bit is; -1: nowhere in RAM."""
    cdef int marker = log2_64(key), order = 64 - map.page_shift - marker
    cdef uint64_t block
    if marker < 1 or order < 0 or order >= MAX_ORDERS:
        return -1
    block = key ^ (<uint64_t>1 << marker)
    index[0] = block >> map.bitmap_shift
    bit[0] = block & low_mask(map.bitmap_shift)
    return order


cdef int kho_chunks_open_order(kho_chunk_map *map, int order) noexcept nogil:
    """Make the table of an order's bitmaps; it is touched only where there are some."""
    cdef kho_chunk_order *each = &map.orders[order]
    cdef uint64_t first, last, words
    if each.bitmaps != NULL:
        return 0
    first = (map.state.base_pfn >> order) >> map.bitmap_shift
    last = ((map.state.end_pfn - 1) >> order) >> map.bitmap_shift
    each.first = first
    each.nr_indices = last - first + 1
    words = bitmap_layout(&each.used, each.nr_indices, NULL)
    each.bitmaps = <uint64_t *>calloc(each.nr_indices + words, 8)
    if each.bitmaps == NULL:
        return -ENOMEM
    bitmap_layout(&each.used, each.nr_indices, each.bitmaps + each.nr_indices)
    return 0


cdef int kho_chunks_new_bitmap(kho_chunk_map *map, uint64_t *phys) noexcept nogil:
    """A zeroed bitmap: a whole page, or the next part of one."""
    cdef uint64_t nbytes = (<uint64_t>1 << map.bitmap_shift) >> 3, pfn = 0
    cdef uint64_t page = <uint64_t>1 << map.page_shift
    cdef uint64_t *grown
    if map.nr_slabs == 0 or map.slab_used == page:
        if map.nr_slabs == map.slabs_room:
            grown = <uint64_t *>realloc(map.slabs, (2 * map.slabs_room + 64) * 8)
            if grown == NULL:
                return -ENOMEM
            map.slabs = grown
            map.slabs_room = 2 * map.slabs_room + 64
        if page_alloc_run(map.state, 0, 1, NO_NODE, &pfn) == 0:
            return -ENOMEM
        memset(kho_chunks_words(map, pfn << map.page_shift), 0, page)
        map.slabs[map.nr_slabs] = pfn << map.page_shift
        map.nr_slabs += 1
        map.slab_used = 0
    phys[0] = map.slabs[map.nr_slabs - 1] + map.slab_used
    map.slab_used += nbytes
    return 0


cdef int kho_chunks_bitmap(kho_chunk_map *map, int order, uint64_t index, bint make,
                           uint64_t **words) noexcept nogil:
    """The bitmap of *index*; -ENOENT: it is missing and not to be made."""
    cdef kho_chunk_order *each = &map.orders[order]
    cdef uint64_t *grown
    cdef int rc
    if each.bitmaps == NULL:
        if not make:
            return -ENOENT
        rc = kho_chunks_open_order(map, order)
        if rc < 0:
            return rc
    if index < each.first or index - each.first >= each.nr_indices:
        return -ERANGE if make else -ENOENT
    index -= each.first
    if each.bitmaps[index] == 0:
        if not make:
            return -ENOENT
        if map.nr_made == map.made_room:
            grown = <uint64_t *>realloc(map.made, (2 * map.made_room + 64) * 16)
            if grown == NULL:
                return -ENOMEM
            map.made = grown
            map.made_room = 2 * map.made_room + 64
        rc = kho_chunks_new_bitmap(map, &each.bitmaps[index])
        if rc < 0:
            return rc
        bitmap_set(&each.used, index)
        each.nr += 1
        map.nr_bitmaps += 1
        map.made[2 * map.nr_made] = order
        map.made[2 * map.nr_made + 1] = index
        map.nr_made += 1
    words[0] = kho_chunks_words(map, each.bitmaps[index])
    return 0


cdef void kho_chunks_unmake(kho_chunk_map *map) noexcept nogil:
    """Take back the bitmaps made since nr_made was last 0, newest first."""
    cdef uint64_t nbytes = (<uint64_t>1 << map.bitmap_shift) >> 3, index
    cdef kho_chunk_order *each
    while map.nr_made:
        map.nr_made -= 1
        each = &map.orders[map.made[2 * map.nr_made]]
        index = map.made[2 * map.nr_made + 1]
        bitmap_clear(&each.used, index)
        each.bitmaps[index] = 0
        each.nr -= 1
        map.nr_bitmaps -= 1
        map.slab_used -= nbytes
        if map.slab_used == 0:
            map.nr_slabs -= 1
            page_free_head(map.state, map.slabs[map.nr_slabs] >> map.page_shift)
            map.slab_used = <uint64_t>1 << map.page_shift if map.nr_slabs else 0


cdef int kho_chunks_collect(kho_chunk_map *map, map_cursor *cursor) noexcept nogil:
    """Append blocks, or their keys, in the list's order; 1 if there is no more room.

    The start is order << 52 | block: what a block's number leaves of 64 bits holds any order.
    """
    cdef int order = cursor.start >> 52, shift = map.bitmap_shift, unit
    cdef uint64_t block = cursor.start & low_mask(52), index, first, value, bit
    cdef kho_chunk_order *each
    while order < MAX_ORDERS:
        each = &map.orders[order]
        index = NO_BIT
        if each.bitmaps != NULL:
            index = max(block >> shift, each.first) - each.first
            index = bitmap_next(&each.used, index)
        while index != NO_BIT:
            first = (index + each.first) << shift
            bit = block - first if block > first else 0
            unit = order + map.page_shift
            value = first << unit
            if cursor.orders == NULL:
                unit = 0
                value = first | <uint64_t>1 << (64 - map.page_shift - order)
            if map_emit(cursor, kho_chunks_words(map, each.bitmaps[index]), bit,
                        <uint64_t>1 << shift, value, unit, order):
                cursor.start += <uint64_t>order << 52 | first
                return 1
            index = bitmap_next(&each.used, index + 1)
        order += 1
        block = 0
    return 0


cdef void kho_chunks_free_pages(kho_chunk_map *map, uint64_t *pages, size_t n) noexcept nogil:
    cdef size_t i
    for i in range(n):
        page_free_head(map.state, pages[i] >> map.page_shift)


cdef int kho_chunks_publish(kho_chunk_map *map) noexcept nogil:
    """Write a new list of chunks, then free the one before; -ENOMEM leaves that as it was."""
    cdef uint64_t page = <uint64_t>1 << map.page_shift
    cdef uint64_t capacity = (page - CHUNK_HEAD_BYTES) // CHUNK_ENTRY_BYTES
    cdef uint64_t wanted = 0, i, word, index, in_chunk
    cdef uint64_t *pages
    cdef uint64_t *entry = NULL
    cdef kho_chunk_head *head = NULL
    cdef kho_chunk_order *each
    cdef size_t next_page = 0
    cdef int order, unit
    for order in range(MAX_ORDERS):
        wanted += (map.orders[order].nr + capacity - 1) // capacity
    pages = <uint64_t *>malloc((wanted + 1) * 8)
    if pages == NULL:
        return -ENOMEM
    if page_alloc_array(map.state, pages, wanted, 0, NO_NODE, map.page_shift) < 0:
        free(pages)
        return -ENOMEM
    for order in range(MAX_ORDERS):
        each = &map.orders[order]
        if each.nr == 0:
            continue
        unit = map.bitmap_shift + order + map.page_shift
        in_chunk = capacity  # a chunk has bitmaps of one order
        for i in range((each.nr_indices + 63) >> 6):
            word = each.used.level[0][i]
            while word:
                if in_chunk == capacity:
                    if head != NULL:
                        head.next = pages[next_page]
                    head = <kho_chunk_head *>kho_chunks_words(map, pages[next_page])
                    head.next = 0
                    head.order = order
                    head.nr = capacity
                    entry = <uint64_t *>head + 2
                    next_page += 1
                    in_chunk = 0
                index = (i << 6) + __builtin_ctzll(word)
                word &= word - 1
                entry[0] = (index + each.first) << unit
                entry[1] = each.bitmaps[index]
                entry += 2
                in_chunk += 1
        head.nr = in_chunk
        memset(entry, 0, page - (<char *>entry - <char *>head))
    kho_chunks_free_pages(map, map.chunks, map.nr_chunks)
    free(map.chunks)
    map.chunks = pages
    map.nr_chunks = wanted
    return 0


cdef void kho_chunks_unpublish(kho_chunk_map *map) noexcept nogil:
    kho_chunks_free_pages(map, map.chunks, map.nr_chunks)
    free(map.chunks)
    map.chunks = NULL
    map.nr_chunks = 0


cdef void kho_chunks_clear(kho_chunk_map *map) noexcept nogil:
    """Drop every bitmap and the list."""
    cdef int order
    kho_chunks_unpublish(map)
    kho_chunks_free_pages(map, map.slabs, map.nr_slabs)
    map.nr_slabs = 0
    map.slab_used = 0
    map.nr_bitmaps = 0
    for order in range(MAX_ORDERS):
        free(map.orders[order].bitmaps)
        memset(&map.orders[order], 0, sizeof(kho_chunk_order))


@cython.final
@cython.auto_pickle(False)
cdef class ChunkMap(PreservedMap):
    """Bitmaps by order in simulated memory, and the list of chunks that names them.

    Args:
        memory: where bitmaps and chunks are allocated, outside scratch.
        bitmap_bytes: of one bitmap: a power of two from 64 to the page size. Smaller ones than a
            page share pages.

    Attributes:
        nr_bitmaps: bitmaps; like the tree's pages they stay when their last block goes.
        first_chunk: physical address of the published list, 0 for none.

    Raises:
        ValueError: a size that is none of these.
        KhoError: EROFS if memory is read-only.

    Source: kernel/kexec_handover.c of Linux 6.16 to 7.0; kho-abi 3.2.
    """

    def __cinit__(self, PhysicalMemory memory not None, bitmap_bytes):
        cdef uint64_t nbytes = as_u64(bitmap_bytes)
        if nbytes < 64 or nbytes > memory.page_size or nbytes & (nbytes - 1):
            raise ValueError(f"bitmap_bytes {bitmap_bytes}: not a power of two from 64 to a page")
        memory.check_writable("ChunkMap")
        memory.use()
        self.memory = memory
        self.chunks.page_shift = memory.page_shift
        self.chunks.bitmap_shift = ctz64(nbytes) + 3
        self.leaf_bits = self.chunks.bitmap_shift

    def __dealloc__(self):
        cdef int order
        for order in range(MAX_ORDERS):
            free(self.chunks.orders[order].bitmaps)
        free(self.chunks.slabs)
        free(self.chunks.made)
        free(self.chunks.chunks)

    cdef int use(self) except -1:
        return self.memory.use()

    cdef int begin(self) noexcept nogil:
        if self.memory.state == NULL:
            return -EINVAL
        self.chunks.zero = self.memory.zero
        self.chunks.state = self.memory.state
        self.chunks.nr_made = 0
        return 0

    cdef int find(self, uint64_t key, bint make, uint64_t **words, uint64_t *bit) noexcept nogil:
        cdef uint64_t index = 0
        cdef int order = kho_chunks_place(&self.chunks, key, &index, bit)
        if order < 0:
            return -ERANGE
        return kho_chunks_bitmap(&self.chunks, order, index, make, words)

    cdef void unmake(self) noexcept nogil:
        kho_chunks_unmake(&self.chunks)

    cdef int collect(self, map_cursor *cursor) noexcept nogil:
        return kho_chunks_collect(&self.chunks, cursor)

    cdef uint64_t count(self, int what) noexcept nogil:
        if what == MAP_NODES:
            return self.chunks.nr_slabs + self.chunks.nr_chunks
        return self.chunks.chunks[0] if self.chunks.nr_chunks else 0

    cdef int drop(self) except -1:
        cdef int rc
        with self.memory.lock:
            rc = self.begin()
            if rc == 0:
                kho_chunks_clear(&self.chunks)
                self.keys_in_map = self.pages_in_map = 0
        return check(rc, "drop the preserved map")

    @property
    def nr_bitmaps(self):
        """Bitmaps of the map."""
        return self.chunks.nr_bitmaps

    @property
    def nr_chunks(self):
        """Chunks of the published list."""
        return self.chunks.nr_chunks

    @property
    def first_chunk(self):
        """Physical address of the published list, 0 for none."""
        return self.count(MAP_ROOT)

    def add_keys(self, const uint64_t[::1] keys not None):
        """Add keys as of :func:`radix_key`, all or none.

        Returns:
            int: how many were not there before.

        Raises:
            KhoError: ERANGE if a key stands for no block in RAM; ENOMEM.
        """
        cdef uint64_t fresh = 0
        self.use()
        if keys.shape[0]:
            check(self.add(&keys[0], keys.shape[0], &fresh), "add_keys")
        return fresh

    def del_keys(self, const uint64_t[::1] keys not None):
        """Remove keys, all or none.

        Raises:
            KhoError: ENOENT if one is not there.
        """
        cdef uint64_t at = 0
        self.use()
        if keys.shape[0]:
            check(self.delete(&keys[0], keys.shape[0], &at), "del_keys")

    def has_key(self, key):
        """Whether *key* is in the map."""
        self.use()
        return bool(check(self.has(as_u64(key)), f"has_key {key:#x}"))

    def keys(self):
        """Return all keys in the list's order: shape (n,), uint64."""
        return self.list_keys()

    def publish(self):
        """Write the list of chunks anew, and free the one before.

        Returns:
            int: physical address of the first chunk; 0 if there is no bitmap.

        Raises:
            KhoError: ENOMEM, and the list is as before.
        """
        cdef int rc
        self.use()
        with nogil, self.memory.lock:
            rc = self.begin()
            if rc == 0:
                rc = kho_chunks_publish(&self.chunks)
        check(rc, "publish the preserved map")
        return self.count(MAP_ROOT)

    def unpublish(self):
        """Free the list of chunks; the bitmaps stay."""
        cdef int rc
        self.use()
        with self.memory.lock:
            rc = self.begin()
            if rc == 0:
                kho_chunks_unpublish(&self.chunks)
        check(rc, "unpublish the preserved map")

    def free(self):
        """Free the list and all bitmaps: nothing is in the map then."""
        self.use()
        self.drop()
