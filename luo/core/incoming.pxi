# L3: what the previous kernel preserved: its map is walked, checked, claimed, then restored from.

cdef enum:  # what a map can be wrong in
    WALK_NODE_OUTSIDE = 1
    WALK_NODE_SCRATCH
    WALK_NODE_HOLE
    WALK_NODE_TAKEN
    WALK_NODE_FDT
    WALK_BITMAP_TWICE
    WALK_CHUNK_ORDER
    WALK_CHUNK_COUNT
    WALK_BITMAP_START
    WALK_KEY
    WALK_BLOCK_OUTSIDE
    WALK_BLOCK_SCRATCH
    WALK_BLOCK_TAKEN
    WALK_NO_MEMORY


cdef int kho_walk_fail(kho_walk *walk, int why, uint64_t at, int order,
                       uint64_t conflict) noexcept nogil:
    walk.why = why
    walk.at = at
    walk.order = order
    walk.conflict = conflict
    return -1


# A map lists the blocks of an order by ascending address, so the free pages behind a claimed block
# are kept out of the free lists: the next block is most likely cut out of them, and what lies
# between the two goes back once and for all, in the pieces that stay.

cdef void kho_walk_open_gap(kho_walk *walk, uint64_t pfn) noexcept nogil:
    """Take out the free blocks that adjoin from *pfn* on, outside scratch."""
    cdef page_state *st = walk.state
    cdef page_segment *seg = page_segment_of(st, pfn)
    cdef int order
    walk.gap_seg = seg
    walk.gap_pfn = walk.gap_end = pfn
    if seg == NULL or seg.scratch:
        return
    while walk.gap_end < seg.end:
        order = min(ctz64(walk.gap_end), st.top)
        while order >= 0 and not (st.nr_blocks[order] and bitmap_test(
                &st.free[order], page_index(st, walk.gap_end, order))):
            order -= 1
        if order < 0:
            return
        page_remove(st, seg, walk.gap_end, order)
        walk.gap_end += <uint64_t>1 << order


cdef void kho_walk_close_gap(kho_walk *walk) noexcept nogil:
    page_free_run(walk.state, walk.gap_seg, walk.gap_pfn, walk.gap_end)
    walk.gap_pfn = walk.gap_end = 0


cdef int kho_walk_flush(kho_walk *walk) noexcept nogil:
    """Claim the pending run of adjoining blocks."""
    cdef uint64_t conflict = 0, pfn = walk.run_pfn, end = pfn + (walk.run_count << walk.run_order)
    cdef int rc, why
    if walk.run_count == 0:
        return 0
    if walk.gap_pfn <= pfn and end <= walk.gap_end:
        page_split_run(walk.state, walk.gap_seg, walk.gap_pfn, pfn)
        page_set_heads(walk.state, pfn, walk.run_order, walk.run_count, True)
        walk.gap_pfn = end
    else:
        kho_walk_close_gap(walk)
        rc = page_claim_run(walk.state, pfn, walk.run_order, walk.run_count, True, False, &conflict)
        if rc < 0:
            why = WALK_BLOCK_TAKEN if rc == -EBUSY else \
                WALK_BLOCK_SCRATCH if rc == -ERANGE else WALK_BLOCK_OUTSIDE
            pfn = (conflict >> walk.run_order) << walk.run_order
            return kho_walk_fail(walk, why, pfn << walk.page_shift, walk.run_order, conflict)
        kho_walk_open_gap(walk, end)
    walk.nr_keys += walk.run_count
    walk.nr_pages += walk.run_count << walk.run_order
    walk.run_count = 0
    return 0


cdef int kho_walk_blocks(kho_walk *walk, uint64_t pfn, int order, uint64_t count) noexcept nogil:
    """Note *count* adjoining blocks; claim those before if these do not continue them."""
    if walk.run_count:
        if walk.run_order == order and pfn == walk.run_pfn + (walk.run_count << order):
            walk.run_count += count
            return 0
        if kho_walk_flush(walk) < 0:
            return -1
    if order > walk.state.top or pfn < walk.state.base_pfn or pfn >= walk.state.end_pfn:
        return kho_walk_fail(walk, WALK_BLOCK_OUTSIDE, pfn << walk.page_shift, order, pfn)
    walk.run_pfn = pfn
    walk.run_order = order
    walk.run_count = count
    return 0


cdef int kho_walk_bits(kho_walk *walk, const uint64_t *words, uint64_t nr_words,
                       uint64_t first_pfn, int order) noexcept nogil:
    """Note the blocks of a bitmap, runs of set bits at a time."""
    cdef uint64_t i, word, length
    cdef int at, bit
    for i in range(nr_words):
        word = words[i]
        at = 0
        while word:
            bit = ctz64(word)
            word >>= bit
            at += bit
            length = ctz64(~word)
            if kho_walk_blocks(walk, first_pfn + (((i << 6) + at) << order), order, length) < 0:
                return -1
            if length == 64:
                break
            word >>= length
            at += length
    return 0


cdef int kho_walk_leaf(kho_walk *walk, const uint64_t *words, uint64_t base) noexcept nogil:
    """Note the blocks of a leaf whose first key is *base*."""
    cdef uint64_t bit = 0, phys = 0, nr_bits = <uint64_t>1 << walk.leaf_bits
    cdef int order = kho_radix_decode_key(base, walk.page_shift, &phys)
    if order >= 0:  # the marker is above the leaf's bits: one order for all of them
        return kho_walk_bits(walk, words, nr_bits >> 6, phys >> walk.page_shift, order)
    while True:  # very large orders share the first leaf
        bit = flat_next(words, bit, nr_bits)
        if bit == NO_BIT:
            return 0
        order = kho_radix_decode_key(base + bit, walk.page_shift, &phys)
        if order < 0:
            return kho_walk_fail(walk, WALK_KEY, base + bit, 0, 0)
        if kho_walk_blocks(walk, phys >> walk.page_shift, order, 1) < 0:
            return -1
        bit += 1


cdef int kho_walk_take_page(kho_walk *walk, PhysicalMemory memory, uint64_t node) noexcept nogil:
    """Claim one page of the map, which may be read from then on."""
    cdef uint64_t page = <uint64_t>1 << walk.page_shift, conflict = 0
    cdef uint64_t *grown
    cdef int rc
    if node == 0 or node & (page - 1) or not memory.has(node, page):
        return kho_walk_fail(walk, WALK_NODE_OUTSIDE, node, 0, 0)
    if node == walk.fdt:
        return kho_walk_fail(walk, WALK_NODE_FDT, node, 0, 0)
    kho_walk_close_gap(walk)
    rc = page_claim_run(walk.state, node >> walk.page_shift, 0, 1, False, False, &conflict)
    if rc < 0:
        return kho_walk_fail(walk, WALK_NODE_SCRATCH if rc == -ERANGE else WALK_NODE_TAKEN, node, 0,
                             conflict)
    if walk.nr_nodes == walk.room:
        grown = <uint64_t *>realloc(walk.nodes, (2 * walk.room + 64) * 8)
        if grown == NULL:
            return kho_walk_fail(walk, WALK_NO_MEMORY, 0, 0, 0)
        walk.nodes = grown
        walk.room = 2 * walk.room + 64
    walk.nodes[walk.nr_nodes] = node
    walk.nr_nodes += 1
    # a page that nobody ever wrote cannot be a node, and reading it would fill a hole of the file
    if not memory.populated(node, page):
        return kho_walk_fail(walk, WALK_NODE_HOLE, node, 0, 0)
    return 0


cdef int kho_walk_node(kho_walk *walk, PhysicalMemory memory, uint64_t node, int level,
                       uint64_t base) noexcept nogil:
    """Claim one page of the tree and all that hangs below it; -1 with the reason in *walk*."""
    cdef uint64_t i
    cdef uint64_t *slots
    cdef int shift
    if kho_walk_take_page(walk, memory, node) < 0:
        return -1
    slots = <uint64_t *>(memory.zero + node)
    if level == 0:
        return kho_walk_leaf(walk, slots, base)
    shift = walk.leaf_bits + (level - 1) * walk.slot_bits
    for i in range(<uint64_t>1 << walk.slot_bits):
        if slots[i] == 0:
            continue
        if base + (i << shift) >> (64 - walk.page_shift + 1):
            return kho_walk_fail(walk, WALK_KEY, base + (i << shift), 0, 0)
        if kho_walk_node(walk, memory, slots[i], level - 1, base + (i << shift)) < 0:
            return -1
    return 0


# ---- the list of chunks ----

cdef int kho_compare_u64(const void *one, const void *other) noexcept nogil:
    cdef uint64_t a = (<const uint64_t *>one)[0], b = (<const uint64_t *>other)[0]
    return (a > b) - (a < b)


cdef int kho_walk_list(kho_walk *walk, PhysicalMemory memory, uint64_t head,
                       kho_chunk_entry **entries, uint64_t *n) noexcept nogil:
    """Claim the chunks and copy what they list; a chunk that is met again is taken already."""
    cdef uint64_t capacity = ((<uint64_t>1 << walk.page_shift) - CHUNK_HEAD_BYTES)
    cdef uint64_t room = 0, i, at = head
    cdef kho_chunk_head *chunk
    cdef kho_chunk_entry *grown
    cdef uint64_t *pairs
    cdef uint32_t order, count
    capacity //= CHUNK_ENTRY_BYTES
    while at:
        if kho_walk_take_page(walk, memory, at) < 0:
            return -1
        chunk = <kho_chunk_head *>(memory.zero + at)
        # each field is read once: what was checked is what is used
        order = chunk.order
        count = chunk.nr
        if order > <uint32_t>walk.state.top:
            return kho_walk_fail(walk, WALK_CHUNK_ORDER, at, order, 0)
        if count > capacity:
            return kho_walk_fail(walk, WALK_CHUNK_COUNT, at, order, count)
        if n[0] + count > room:
            room = 2 * room + capacity
            grown = <kho_chunk_entry *>realloc(entries[0], room * sizeof(kho_chunk_entry))
            if grown == NULL:
                return kho_walk_fail(walk, WALK_NO_MEMORY, 0, 0, 0)
            entries[0] = grown
        pairs = <uint64_t *>chunk + 2
        for i in range(count):
            entries[0][n[0]].start = pairs[2 * i]
            entries[0][n[0]].bitmap = pairs[2 * i + 1]
            entries[0][n[0]].order = order
            n[0] += 1
        at = chunk.next
    return 0


cdef int kho_walk_bitmaps(kho_walk *walk, PhysicalMemory memory, const kho_chunk_entry *entries,
                          uint64_t n, uint64_t nbytes, uint64_t *sorted) noexcept nogil:
    """Claim the pages of the bitmaps; each bitmap is named once, and smaller ones share pages."""
    cdef uint64_t i, page = <uint64_t>1 << walk.page_shift, last = 0, here
    for i in range(n):
        sorted[i] = entries[i].bitmap
    qsort(sorted, n, 8, kho_compare_u64)
    for i in range(n):
        here = sorted[i] & ~(page - 1)
        if sorted[i] & (nbytes - 1):
            return kho_walk_fail(walk, WALK_NODE_OUTSIDE, sorted[i], 0, 0)
        if i and sorted[i] == sorted[i - 1]:
            return kho_walk_fail(walk, WALK_BITMAP_TWICE, sorted[i], 0, 0)
        if here != last or i == 0:
            if kho_walk_take_page(walk, memory, here) < 0:
                return -1
            last = here
    return 0


cdef int kho_walk_entries(kho_walk *walk, PhysicalMemory memory, const kho_chunk_entry *entries,
                          uint64_t n, uint64_t nbytes) noexcept nogil:
    cdef uint64_t i, span
    cdef int bits = ctz64(nbytes) + 3, order
    for i in range(n):
        order = entries[i].order
        # a span of 2**64 bytes or more starts at 0
        span = <uint64_t>1 << (bits + order + walk.page_shift) \
            if bits + order + walk.page_shift < 64 else 0
        if entries[i].start & (span - 1):
            return kho_walk_fail(walk, WALK_BITMAP_START, entries[i].bitmap, order,
                                 entries[i].start)
        if kho_walk_bits(walk, <uint64_t *>(memory.zero + entries[i].bitmap), nbytes >> 3,
                         entries[i].start >> walk.page_shift, order) < 0:
            return -1
    return 0


cdef int kho_walk_chunks(kho_walk *walk, PhysicalMemory memory, uint64_t head,
                         uint64_t bitmap_bytes) noexcept nogil:
    """Claim the list at *head* and all that its bitmaps name; -1 with the reason in *walk*."""
    cdef kho_chunk_entry *entries = NULL
    cdef uint64_t *sorted = NULL
    cdef uint64_t n = 0
    cdef int rc = kho_walk_list(walk, memory, head, &entries, &n)
    if rc == 0 and n:
        sorted = <uint64_t *>malloc(n * 8)
        if sorted == NULL:
            rc = kho_walk_fail(walk, WALK_NO_MEMORY, 0, 0, 0)
        else:
            rc = kho_walk_bitmaps(walk, memory, entries, n, bitmap_bytes, sorted)
        if rc == 0:
            rc = kho_walk_entries(walk, memory, entries, n, bitmap_bytes)
    free(sorted)
    free(entries)
    return rc


# ---- restoring ----

@cython.auto_pickle(False)
cdef class IncomingMemory:
    """What the previous kernel preserved: the incoming half of KHO that touches pages.

    ``luo.kho.Incoming`` extends it and calls :meth:`_walk`. Until :meth:`install` its page state is
    its own, so a map can be validated beside the kernel that still runs, on memory that is mapped
    read-only.

    Attributes:
        memory: in which the map lies.
        closed: whether :meth:`close` was called.
        nr_preserved: blocks that were preserved.
        preserved_pages: pages of them.
    """

    def _walk(self, PhysicalMemory memory not None, root, scratch, *, fdt=0, reserved=(), levels=0,
              bitmap_bytes=0, order_cap=None):
        # Claim all that the map at root says is preserved; HandoverError names the address and the
        # rule of kho-abi 12.18 that it breaks. scratch: where nothing preserved may lie. fdt: the
        # root tree, which is no node. reserved: [(phys, nbytes)] to be claimed beside. levels: see
        # RadixTree. bitmap_bytes: root is a list of chunks with bitmaps of this size; 0: nothing is
        # preserved. order_cap: larger blocks cannot be restored.
        cdef kho_walk walk
        cdef list areas = memory.check_scratch(scratch)
        cdef uint64_t at = as_u64(root), conflict = 0, pfn, count, bitmap = as_u64(bitmap_bytes)
        cdef int rc = 0, shift = memory.page_shift, depth = PyNumber_Index(levels)
        if self.memory is not None:
            raise TypeError("IncomingMemory: initialised twice")
        self.memory = memory
        self.areas = areas
        self.state = memory.new_state(areas)
        self.state.restricted = True
        self.order_cap = MAX_ORDERS - 1 if order_cap is None else PyNumber_Index(order_cap)
        memset(&walk, 0, sizeof(walk))
        walk.state = self.state
        walk.fdt = as_u64(fdt)
        walk.page_shift = shift
        walk.slot_bits = shift - 3
        walk.leaf_bits = shift + 3
        depth = depth if depth else kho_radix_levels(shift)
        for phys, nbytes in reserved:
            pfn = as_u64(phys) >> shift
            count = ((as_u64(phys + nbytes) - 1) >> shift) + 1 - pfn
            if page_claim_run(self.state, pfn, 0, count, False, True, &conflict) < 0:
                raise HandoverError(f"{nbytes} reserved bytes are not in one piece of RAM", phys)
        with nogil, memory.lock:
            if bitmap:
                rc = kho_walk_chunks(&walk, memory, at, bitmap)
            else:
                rc = kho_walk_node(&walk, memory, at, depth - 1, 0)
            if rc == 0:
                rc = kho_walk_flush(&walk)
            kho_walk_close_gap(&walk)
        self.nodes = walk.nodes
        self.nr_nodes = walk.nr_nodes
        self.nr_preserved = walk.nr_keys
        self.preserved_pages = walk.nr_pages
        if rc < 0:
            self.walk_error(&walk)

    cdef int walk_error(self, kho_walk *walk) except -1:
        cdef uint64_t head = 0
        cdef bint claimed = False
        cdef int held = page_owner(self.state, walk.conflict, &head, &claimed)
        cdef object other = describe_block(self.memory, head, held, claimed)
        if not claimed and held == 0:
            other = f"tree node or reserved page {head << self.memory.page_shift:#x}"
        if walk.why == WALK_NO_MEMORY:
            raise MemoryError("walk of the preserved map")
        if walk.why == WALK_KEY:
            raise HandoverError(f"preserved map: key {walk.at:#x} stands for no block")
        if walk.why in (WALK_CHUNK_ORDER, WALK_CHUNK_COUNT, WALK_BITMAP_START):
            rule = {
                WALK_CHUNK_ORDER: f"is of order {walk.order}, which no block in RAM has",
                WALK_CHUNK_COUNT: f"lists {walk.conflict} bitmaps, more than fit",
                WALK_BITMAP_START: f"has a bitmap that starts at {walk.conflict:#x}, where none of "
                                   f"order {walk.order} does",
            }[walk.why]
            raise HandoverError(f"chunk of the preserved map {rule}", walk.at)
        if walk.why <= WALK_BITMAP_TWICE:
            rule = {
                WALK_BITMAP_TWICE: "is listed as a bitmap twice",
                WALK_NODE_OUTSIDE: "is misaligned or not in RAM",
                WALK_NODE_SCRATCH: "lies in scratch",
                WALK_NODE_HOLE: "was never written",
                WALK_NODE_TAKEN: f"overlaps {other}",
                WALK_NODE_FDT: "is the root tree",
            }[walk.why]
            raise HandoverError(f"node of the preserved map {rule}", walk.at)
        rule = {
            WALK_BLOCK_OUTSIDE: "is not in RAM",
            WALK_BLOCK_SCRATCH: "overlaps scratch",
            WALK_BLOCK_TAKEN: f"overlaps {other}",
        }[walk.why]
        raise HandoverError(f"preserved block of order {walk.order} {rule}", walk.at)

    def __dealloc__(self):
        page_state_free(self.state)
        free(self.nodes)

    @property
    def tree_pages(self):
        """Pages that the map's tree had."""
        return self.nr_nodes

    @property
    def nr_unrestored(self):
        """Blocks that nobody has restored yet."""
        cdef page_state *st = self.pages()
        cdef uint64_t total = 0
        cdef int order
        if st == NULL:
            return 0
        for order in range(st.top + 1):
            total += st.nr_claims[order]
        return total

    @property
    def nr_restored(self):
        """Blocks that were restored."""
        return self.nr_preserved - self.nr_unrestored

    cdef object cap_note(self):
        return "" if self.order_cap >= MAX_ORDERS - 1 else f" of order 0..{self.order_cap}"

    cdef page_state *pages(self) noexcept nogil:
        """The page state that holds the claims: its own before install(), then the memory's."""
        if self.state != NULL or self.memory is None:
            return self.state
        return self.memory.state

    cdef int use(self) except -1:
        if self.closed:
            raise from_errno(errno.ESHUTDOWN, "KHO: this kernel is gone")
        if self.state != NULL:
            raise from_errno(EINVAL, "incoming: not booted yet")
        if self.memory is None:
            raise from_errno(EINVAL, "incoming: not initialised")
        return self.memory.use()

    def close(self):
        """Every later call raises StateError (ESHUTDOWN)."""
        self.closed = True

    def is_preserved(self, phys, nbytes=1):
        """Whether preserved, not restored blocks cover all pages of [phys, phys + nbytes)."""
        cdef uint64_t at, end
        cdef page_state *st
        if self.memory is None or not self.memory.contains(phys, nbytes):
            return False
        at = as_u64(phys)
        end = at + as_u64(nbytes)
        with self.memory.lock:
            st = self.pages()
            return st != NULL and page_all_claimed(
                st, at >> self.memory.page_shift, ((end - 1) >> self.memory.page_shift) + 1)

    def order_of(self, phys):
        """Order of the preserved, not restored block that starts at *phys*, or None."""
        cdef uint64_t at = as_u64(phys)
        cdef page_state *st
        cdef int order = -1
        if self.memory is None or at & (self.memory.page_size - 1):
            return None
        with self.memory.lock:
            st = self.pages()
            if st != NULL:
                order = page_claim_order(st, at >> self.memory.page_shift)
        return None if order < 0 else order

    def install(self):
        """Make this the memory's page state: the previous kernel's is forgotten.

        The tree's pages become free and the restriction to scratch ends.

        Raises:
            KhoError: EINVAL if it is installed already.
        """
        cdef PhysicalMemory memory = self.memory
        cdef page_state *old = NULL
        cdef bint done
        cdef size_t i
        if memory is None:
            raise from_errno(EINVAL, "incoming: not initialised")
        if memory.detached:
            memory.use()
        with memory.lock:
            done = self.closed or self.state == NULL
            if not done:
                old = memory.state
                memory.state = self.state
                self.state = NULL
                for i in range(self.nr_nodes):
                    page_free_head(memory.state, self.nodes[i] >> memory.page_shift)
                memory.state.restricted = False
                memory.scratch = self.areas
        if done:
            raise from_errno(EINVAL, "incoming: booted already")
        page_state_free(old)
        free(self.nodes)
        self.nodes = NULL

    def restore_folio(self, phys):
        """Take over the preserved block at *phys*, as ``kho_restore_folio()``.

        It is ordinary allocated memory from now on.

        Returns:
            int: its order.

        Raises:
            KhoError: EINVAL if no preserved block starts there, it was restored before, or it is
                larger than a kernel of this generation restores (kho-abi 12.8).
        """
        cdef uint64_t at = as_u64(phys)
        cdef int order = -EINVAL
        self.use()
        if at & (self.memory.page_size - 1) == 0:
            with self.memory.lock:
                order = page_restore(self.memory.state, at >> self.memory.page_shift,
                                     self.order_cap)
        if order < 0:
            raise from_errno(EINVAL, f"restore_folio {at:#x}: not the head of a preserved block"
                                     f"{self.cap_note()}, or restored before")
        return order

    def restore_folios(self, const uint64_t[::1] phys not None):
        """Take over many blocks, all or none.

        Returns:
            ndarray: shape (n,), uint8, their orders.

        Raises:
            KhoError: EINVAL names the first that is no preserved block, or was restored.

        Context: releases the GIL.
        """
        cdef uint64_t n = phys.shape[0], i = 0, mask
        cdef uint8_t[::1] orders
        cdef int order = 0
        cdef page_state *st
        self.use()
        result = np.empty(n, np.uint8)
        if n == 0:
            return result
        orders = result
        mask = self.memory.page_size - 1
        with nogil, self.memory.lock:
            st = self.memory.state
            while i < n:
                order = -EINVAL
                if phys[i] & mask == 0:
                    order = page_restore(st, phys[i] >> self.memory.page_shift, self.order_cap)
                if order < 0:
                    break
                orders[i] = order
                i += 1
                # blocks that adjoin are mostly preserved as such
                while i + RUN <= n and blocks_adjoin(&phys[i - 1], self.memory.page_size << order):
                    if not page_restore_run(st, phys[i] >> self.memory.page_shift, order, RUN - 1):
                        break
                    memset(&orders[i], order, RUN - 1)
                    i += RUN - 1
            if order < 0:
                n = i
                for i in range(n):
                    page_unrestore(st, phys[i] >> self.memory.page_shift)
        if order < 0:
            raise from_errno(EINVAL, f"restore_folios {phys[n]:#x}: not the head of a preserved "
                                     f"block{self.cap_note()}, or restored before")
        return result

    def restore_pages(self, phys, nr_pages):
        """Take over a run of pages, as ``kho_restore_pages()``, by the blocks it is recorded as.

        Linux 7.3 steps by its own split and so misses the later parts of a run that was cut between
        NUMA nodes (kho-abi 12.6); this does not.

        Returns:
            int: blocks that it was made of; ``memory.free_pages`` takes the same run.

        Raises:
            KhoError: EINVAL if preserved, not restored blocks do not make up exactly these pages.
        """
        cdef uint64_t at = as_u64(phys), count = as_u64(nr_pages), pfn, end, n = 0
        cdef int order = 0
        cdef page_state *st
        self.use()
        pfn = at >> self.memory.page_shift
        end = pfn + count
        with self.memory.lock:
            st = self.memory.state
            if at & (self.memory.page_size - 1) or end < pfn:
                order = -1
            while order >= 0 and pfn < end:
                order = page_claim_order(st, pfn)
                order = -1 if order > self.order_cap else order
                pfn += <uint64_t>1 << order if order >= 0 else 0
            if order >= 0 and pfn == end:
                pfn = at >> self.memory.page_shift
                while pfn < end:
                    pfn += <uint64_t>1 << page_restore(st, pfn, self.order_cap)
                    n += 1
                return n
        raise from_errno(EINVAL, f"restore_pages {at:#x}, {count} pages: not exactly preserved "
                                 f"blocks{self.cap_note()}, or restored before")

    def restore_free(self, phys):
        """Take over the block at *phys* and free it, as ``kho_restore_free()``.

        Raises:
            KhoError: EINVAL if no preserved block starts there, or it was restored before.
        """
        cdef uint64_t at = as_u64(phys)
        cdef int order = -EINVAL
        self.use()
        if at & (self.memory.page_size - 1) == 0:
            with self.memory.lock:
                order = page_restore(self.memory.state, at >> self.memory.page_shift,
                                     self.order_cap)
                if order >= 0:
                    page_free_head(self.memory.state, at >> self.memory.page_shift)
        if order < 0:
            raise from_errno(EINVAL, f"restore_free {at:#x}: not the head of a preserved block"
                                     f"{self.cap_note()}, or restored before")

    def map_pages(self):
        """Return the pages that hold the map, ``uint64``; none once booted, when they are free."""
        cdef size_t i
        pages = np.empty(self.nr_nodes if self.nodes != NULL else 0, np.uint64)
        cdef uint64_t[::1] out = pages
        for i in range(<size_t>out.shape[0]):
            out[i] = self.nodes[i]
        return pages

    def unrestored(self):
        """Return what nobody has restored yet as ``(phys, orders)``, larger orders first."""
        self.use()
        return self.claimed()

    def claimed(self):
        """Return what :meth:`unrestored` does, before booting too."""
        cdef int order
        cdef page_state *st
        phys, orders = [np.empty(0, np.uint64)], [np.empty(0, np.uint8)]
        if self.memory is None:
            raise from_errno(EINVAL, "incoming: not initialised")
        st = self.pages()
        for order in range(st.top, -1, -1):
            if st.nr_claims[order]:
                found = list_heads(
                    self.memory, st, st.claims[order], order, st.nr_claims[order])
                phys.append(found)
                orders.append(np.full(len(found), order, np.uint8))
        return np.concatenate(phys), np.concatenate(orders)


cdef int page_restore(page_state *st, uint64_t pfn, int order_cap) noexcept nogil:
    """Turn the claim at *pfn* into an allocated block; its order, or -EINVAL."""
    cdef int order = page_claim_order(st, pfn)
    if order < 0 or order > order_cap:
        return -EINVAL
    flat_clear(st.claims[order], page_index(st, pfn, order))
    st.nr_claims[order] -= 1
    flat_set(st.heads[order], page_index(st, pfn, order))
    st.nr_heads[order] += 1
    return order


cdef bint page_restore_run(page_state *st, uint64_t pfn, int order, uint64_t count) noexcept nogil:
    """As page_restore() for *count* adjoining claims of one order; False: they are not all that."""
    cdef uint64_t index = page_index(st, pfn, order)
    if pfn < st.base_pfn or pfn + (count << order) > st.end_pfn:
        return False
    if flat_count(st.claims[order], index, count) != count:
        return False
    flat_fill(st.claims[order], index, count, False)
    st.nr_claims[order] -= count
    flat_fill(st.heads[order], index, count, True)
    st.nr_heads[order] += count
    return True


cdef void page_unrestore(page_state *st, uint64_t pfn) noexcept nogil:
    cdef int order = page_head_order(st, pfn)
    if order >= 0:  # or somebody has written to the array meanwhile
        page_clear_heads(st, pfn, order, 1)
        page_set_heads(st, pfn, order, 1, True)
