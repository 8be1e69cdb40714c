# L3: what a kernel preserves for the next one: checked here, kept by a map of whatever shape.

cdef list memory_pieces(PhysicalMemory memory):
    """Where blocks may be preserved: RAM without scratch, ``[(pfn, end), ...]`` in order."""
    ends = {}  # where RAM begins (1) and ends (-1), and where scratch does the opposite
    for start, nbytes, _ in memory.ranges:
        ends[start] = ends.get(start, 0) + 1
        ends[start + nbytes] = ends.get(start + nbytes, 0) - 1
    for start, nbytes in memory.scratch:
        ends[start] = ends.get(start, 0) - 1
        ends[start + nbytes] = ends.get(start + nbytes, 0) + 1
    borders = [at >> memory.page_shift for at in sorted(ends) if ends[at]]
    return list(zip(borders[::2], borders[1::2], strict=True))


cdef object as_orders(object orders, Py_ssize_t n, object what, int *order):
    """Orders of *n* blocks: an array of uint8; or None, and the one of all of them in *order*."""
    if not isinstance(orders, np.ndarray) and hasattr(orders, "__index__"):
        order[0] = as_order(orders)
        return None
    array = np.array(orders)  # a copy: what is checked here cannot change
    if array.size and (array.dtype.kind not in "iu" or not 0 <= array.min() <= array.max() < 64):
        raise ValueError(f"{what}: orders are integers in 0..63")
    each = np.ascontiguousarray(array, np.uint8)
    if len(each) != n:
        raise ValueError(f"{what}: {n} addresses, {len(each)} orders")
    return each


@cython.auto_pickle(False)
cdef class PreservedMemory:
    """What a kernel preserves for the next one: the outgoing half of KHO that touches pages.

    ``luo.kho.Kho`` extends it and calls :meth:`_setup`.

    Attributes:
        memory: in which the map lives.
        debug: whether preserving what is not allocated is refused.
        closed: whether :meth:`close` was called.
    """

    def _setup(self, PhysicalMemory memory not None, *, levels=0, bitmap_bytes=0, debug=False,
               split_by_node=True, split_unaligned=False):
        # The scratch of memory has been reserved by now. levels: see RadixTree. bitmap_bytes: the
        # map is a list of chunks with bitmaps of this size. split_*: how a range is cut.
        if self.map is not None:
            raise TypeError("PreservedMemory: initialised twice")
        memory.check_writable("Kho")
        memory.use()
        pieces = memory_pieces(memory)
        self.pieces = <memory_range *>xmalloc(len(pieces) * sizeof(memory_range))
        for start, end in pieces:
            self.pieces[self.nr_pieces].start = start
            self.pieces[self.nr_pieces].end = end
            self.nr_pieces += 1
        self.debug = bool(debug)
        self.memory = memory
        self.split_by_node = bool(split_by_node)
        self.split_unaligned = bool(split_unaligned)
        if bitmap_bytes:
            self.map = ChunkMap(memory, bitmap_bytes)
        else:
            self.map = RadixTree(memory, levels=levels)

    def __dealloc__(self):
        free(self.pieces)

    @cython.final
    cdef int use(self) except -1:
        if self.closed:
            raise from_errno(errno.ESHUTDOWN, "KHO: this kernel is gone")
        if self.map is None:
            raise from_errno(EINVAL, "KHO: not initialised")
        return self.memory.use()

    @cython.final
    cdef int use_unfrozen(self) except -1:
        if self.map is not None and not (self.closed or self.frozen or self.memory.detached) \
                and self.memory.state != NULL:
            return 0
        self.use()
        if self.frozen:
            raise from_errno(EBUSY, "KHO: finalized; nothing may be preserved or given up now")
        return 0

    def close(self):
        """End this kernel's KHO: every later call raises StateError (ESHUTDOWN)."""
        self.closed = True

    def free_map(self):
        """Free the map's pages and with it every preservation; the blocks themselves stay
        allocated.

        Of a radix tree nothing is left then: only for a kernel that gives up on KHO.
        """
        self.use()
        self.map.drop()

    def _freeze(self, on):
        # Whether preserving and unpreserving are refused with EBUSY.
        self.use()
        self.frozen = bool(on)

    def _publish(self):
        # Write the list of chunks; returns the address of the first, 0 for none. The list that was
        # published before is freed by _unpublish(old pages).
        self.use()
        return (<ChunkMap?>self.map).publish()

    def _unpublish(self):
        # Free the list of chunks; the bitmaps, and with them the preservations, stay.
        self.use()
        (<ChunkMap?>self.map).unpublish()

    def _forget(self):
        # Drop every preservation, as an abort does. From now on unpreserving what is not there is
        # no error: only the map could tell what somebody had preserved.
        self.use()
        (<ChunkMap?>self.map).drop()
        self.map.forgot = True

    def _remember(self):
        # End that leniency.
        self.use()
        self.map.forgot = False

    @property
    def nr_preserved(self):
        """Blocks in the map."""
        return 0 if self.map is None else self.map.keys_in_map

    @property
    def preserved_pages(self):
        """Pages of the blocks in the map."""
        return 0 if self.map is None else self.map.pages_in_map

    @property
    def tree_pages(self):
        """Pages of the map: nodes of the tree, or chunks and pages of bitmaps."""
        return 0 if self.map is None else self.map.count(MAP_NODES)

    @property
    def root_phys(self):
        """Physical address of the tree's root page, or of the first published chunk; 0: none."""
        return 0 if self.map is None else self.map.count(MAP_ROOT)

    @cython.final
    cdef int check_run(self, uint64_t phys, uint64_t pages) noexcept nogil:
        cdef uint64_t pfn = phys >> self.memory.page_shift
        cdef memory_range *piece = self.pieces
        cdef size_t left = self.nr_pieces, half
        if phys & (self.memory.page_size - 1):
            return BLOCK_MISALIGNED
        while left > 1:  # the last piece that starts at pfn or below
            half = left >> 1
            if piece[half].start <= pfn:
                piece += half
                left -= half
            else:
                left = half
        if left == 0 or pfn < piece.start or pfn >= piece.end or pages > piece.end - pfn:
            if pages > self.memory.nr_pages or not self.memory.has(
                    phys, pages << self.memory.page_shift):
                return BLOCK_OUTSIDE
            return BLOCK_IN_SCRATCH
        if self.debug and not page_all_allocated(self.memory.state, pfn, pfn + pages):
            return BLOCK_NOT_ALLOCATED
        return BLOCK_OK

    @cython.final
    cdef int check_block(self, uint64_t phys, int order) noexcept nogil:
        if order > 63 - self.memory.page_shift:
            return BLOCK_OUTSIDE
        if phys & ((self.memory.page_size << order) - 1):
            return BLOCK_MISALIGNED
        return self.check_run(phys, <uint64_t>1 << order)

    cdef int refuse(self, object what, uint64_t phys, uint64_t nbytes, int why) except -1:
        """Raise EINVAL that names the rule which the block breaks."""
        rule = "misaligned"
        if why == BLOCK_OUTSIDE:
            rule = "not in RAM"
        elif why == BLOCK_NOT_ALLOCATED:
            rule = "not allocated"
        elif why == BLOCK_IN_SCRATCH:
            for start, size in self.memory.scratch:
                if phys < start + size and phys + nbytes > start:
                    rule = f"overlaps scratch {start:#x}+{size:#x}"
                    break
        raise from_errno(EINVAL, f"{what}: {rule}")

    def preserve_folio(self, phys, order):
        """Preserve the block at *phys*, as ``kho_preserve_folio()``; twice is as good as once.

        Args:
            phys: byte address, a multiple of ``page_size << order``.
            order: any for which the block is in RAM.

        Raises:
            KhoError: EINVAL if it is misaligned, not in RAM, overlaps scratch, or (``debug=True``)
                is not allocated; ENOMEM if a page of the tree cannot be had, and nothing changes.
        """
        cdef uint64_t at = as_u64(phys), key, is_fresh = 0, nr_fresh = 0
        cdef int o = as_order(order), why, rc = 0
        self.use_unfrozen()
        with self.memory.lock:
            why = self.check_block(at, o)
            if why == BLOCK_OK:
                key = kho_radix_encode_key(at, o, self.memory.page_shift)
                rc = map_set_keys(self.map, &key, 1, &is_fresh, &nr_fresh)
        if why:
            self.refuse(f"preserve_folio {at:#x}/order {o}", at,
                        self.memory.page_size << o if o < 48 else 0, why)
        if rc < 0:  # the text costs more than the call
            check(rc, f"preserve_folio {at:#x}/order {o}")

    def unpreserve_folio(self, phys, order):
        """Take back :meth:`preserve_folio` of the very same block.

        Raises:
            KhoError: ENOENT if this very block, with this order, is not preserved.
        """
        cdef uint64_t at = as_u64(phys), key, where = 0
        cdef int o = as_order(order), rc
        self.use_unfrozen()
        if o > 63 - self.memory.page_shift or at & ((self.memory.page_size << o) - 1):
            check(-ENOENT, f"unpreserve_folio {at:#x}/order {o}")
        key = kho_radix_encode_key(at, o, self.memory.page_shift)
        rc = self.map.delete(&key, 1, &where)
        if rc < 0:
            check(rc, f"unpreserve_folio {at:#x}/order {o}")

    def is_preserved(self, phys, order):
        """Whether exactly this block is in the map (a larger one around it does not count)."""
        cdef uint64_t at = as_u64(phys)
        cdef int o = as_order(order)
        self.use()
        if o > 63 - self.memory.page_shift or at & ((self.memory.page_size << o) - 1):
            return False
        return bool(check(self.map.has(kho_radix_encode_key(at, o, self.memory.page_shift)),
                          "is_preserved"))

    cdef uint64_t *encode_blocks(self, const uint64_t[::1] phys, const uint8_t[::1] orders,
                                 int order, object what, bint checked) except NULL:
        """Keys of many blocks, malloc()ed; raises if any block may not be preserved."""
        cdef uint64_t n = phys.shape[0], i
        cdef uint64_t *keys
        cdef int why = 0, shift = self.memory.page_shift
        keys = <uint64_t *>xmalloc(n * 8)
        with nogil, self.memory.lock:
            for i in range(n):
                if orders is not None:
                    order = orders[i]
                if checked:
                    why = self.check_block(phys[i], order)
                elif order > 63 - shift or phys[i] & ((self.memory.page_size << order) - 1):
                    why = BLOCK_MISALIGNED
                if why:
                    break
                keys[i] = kho_radix_encode_key(phys[i], order, shift)
        if why:
            free(keys)
            if not checked:
                check(-ENOENT, f"{what} {phys[i]:#x}/order {order}")
            self.refuse(f"{what} {phys[i]:#x}/order {order}", phys[i],
                        self.memory.page_size << order if order < 48 else 0, why)
        return keys

    def preserve_folios(self, const uint64_t[::1] phys not None, order):
        """Preserve many blocks, all or none.

        The map takes its pages from the lowest free ones: ``memory.prefault_free(nbytes)``, a
        little more than a bit for each block in the memory that they lie in, spares the call their
        first touch.

        Args:
            phys: shape (n,), uint64, byte addresses.
            order: one for all, or an array of n.

        Returns:
            int: how many were not preserved before.

        Raises:
            ValueError: the arrays differ in length.
            KhoError: as :meth:`preserve_folio`, naming the first block that is refused.

        Context: releases the GIL.
        """
        cdef uint64_t n = phys.shape[0], fresh = 0
        cdef uint64_t *keys
        cdef const uint8_t[::1] orders
        cdef const uint8_t *each = NULL
        cdef int rc, o = 0
        self.use_unfrozen()
        orders = as_orders(order, n, "preserve_folios", &o)
        if n == 0:
            return 0
        if orders is not None:
            each = &orders[0]
        with nogil:
            rc = preserve_many(self, &phys[0], each, o, n, &fresh)
        if rc == -EINVAL:
            keys = self.encode_blocks(phys, orders, o, "preserve_folios", True)
            with nogil:
                rc = self.map.add(keys, n, &fresh)
            free(keys)
        check(rc, f"preserve_folios {n} blocks")
        return fresh

    def unpreserve_folios(self, const uint64_t[::1] phys not None, order):
        """Take back the preservation of many blocks, all or none.

        Raises:
            KhoError: ENOENT names the first that is not preserved.

        Context: releases the GIL.
        """
        cdef uint64_t at = 0
        cdef uint64_t *keys
        cdef const uint8_t[::1] orders
        cdef int rc, o = 0
        self.use_unfrozen()
        orders = as_orders(order, phys.shape[0], "unpreserve_folios", &o)
        keys = self.encode_blocks(phys, orders, o, "unpreserve_folios", False)
        with nogil:
            rc = self.map.delete(keys, phys.shape[0], &at)
        free(keys)
        if rc < 0:
            check(rc, f"unpreserve_folios {phys[at]:#x}")

    cdef uint64_t *split_run(self, uint64_t phys, uint64_t pages, uint64_t *n) except NULL:
        """Keys of the blocks that a run of pages is recorded as, malloc()ed (kho-abi 7).

        Each is as large as alignment and length allow, then (where the generation does so) halved
        while its two ends lie on different nodes.
        """
        cdef PhysicalMemory memory = self.memory
        cdef uint64_t pfn = phys >> memory.page_shift, end = pfn + pages, room = 64
        cdef uint64_t *keys = <uint64_t *>xmalloc(room * 8)
        cdef uint64_t *grown
        cdef int order
        n[0] = 0
        while pfn < end:
            order = log2_64(end - pfn)
            if not self.split_unaligned:
                order = min(ctz64(pfn), order)
            while self.split_by_node and order and memory.node_at(pfn) != memory.node_at(
                    pfn + (<uint64_t>1 << order) - 1):
                order -= 1
            if n[0] == room:
                room *= 2
                grown = <uint64_t *>realloc(keys, room * 8)
                if grown == NULL:
                    free(keys)
                    raise MemoryError("preserve_pages")
                keys = grown
            keys[n[0]] = kho_radix_encode_key(pfn << memory.page_shift, order, memory.page_shift)
            n[0] += 1
            pfn += <uint64_t>1 << order
        return keys

    def preserve_pages(self, phys, nr_pages):
        """Preserve a run of pages, as ``kho_preserve_pages()``: all of it or nothing.

        It is recorded as naturally aligned blocks, which from kho-v3 on do not reach from one NUMA
        node to another; the new kernel restores it with ``restore_pages``.

        Raises:
            KhoError: EINVAL if it is misaligned, not in RAM, overlaps scratch, or
                (``debug=True``) is not allocated; ENOMEM.
        """
        cdef uint64_t at = as_u64(phys), pages = as_u64(nr_pages), n = 0, fresh = 0
        cdef uint64_t *keys
        cdef int rc, why
        self.use_unfrozen()
        why = self.check_run(at, pages) if pages else BLOCK_OK
        if why:
            self.refuse(f"preserve_pages {at:#x}, {pages} pages", at,
                        pages << self.memory.page_shift, why)
        keys = self.split_run(at, pages, &n)
        with nogil:
            rc = self.map.add(keys, n, &fresh)
        free(keys)
        check(rc, f"preserve_pages {at:#x}, {pages} pages")

    def unpreserve_pages(self, phys, nr_pages):
        """Take back :meth:`preserve_pages` of the very same run.

        Raises:
            KhoError: ENOENT if any of the run's blocks is not preserved, and nothing changes.
        """
        cdef uint64_t at = as_u64(phys), pages = as_u64(nr_pages), n = 0, where = 0
        cdef uint64_t *keys
        cdef int rc, why
        self.use_unfrozen()
        why = self.check_run(at, pages) if pages else BLOCK_OK
        if why == BLOCK_MISALIGNED or why == BLOCK_OUTSIDE:
            check(-ENOENT, f"unpreserve_pages {at:#x}, {pages} pages")
        keys = self.split_run(at, pages, &n)
        with nogil:
            rc = self.map.delete(keys, n, &where)
        free(keys)
        check(rc, f"unpreserve_pages {at:#x}, {pages} pages")

    def alloc_preserve(self, nbytes, node=None):
        """Allocate zeroed memory and preserve it, as ``kho_alloc_preserve()``.

        Args:
            nbytes: at least 1; rounded up to a power of two of pages.
            node: NUMA node, strictly; None for any.

        Returns:
            int: physical address of one block.

        Raises:
            KhoError: EINVAL for 0, E2BIG above one block of ``memory.max_order``, ENOMEM.
        """
        cdef uint64_t count = as_u64(nbytes), pfn = 0, phys = 0, key, fresh = 0
        cdef int nid = as_node(node, self.memory.nr_nodes if self.memory else 0), order, rc
        cdef PhysicalMemory memory
        self.use_unfrozen()
        memory = self.memory
        if count == 0:
            raise from_errno(EINVAL, "alloc_preserve 0: nothing to allocate")
        order = log2_64((count - 1) >> memory.page_shift) + 1
        if order > max_order_of(memory.page_size):
            raise from_errno(errno.E2BIG, f"alloc_preserve {count}: above one block of order "
                                          f"{max_order_of(memory.page_size)}")
        with nogil:
            with memory.lock:
                rc = 0 if page_alloc_run(memory.state, order, 1, nid, &pfn) else -ENOMEM
            if rc == 0:
                phys = pfn << memory.page_shift
                memset(<void *>(memory.zero + phys), 0, memory.page_size << order)
                key = kho_radix_encode_key(phys, order, memory.page_shift)
                rc = self.map.add(&key, 1, &fresh)
                if rc < 0:
                    with memory.lock:
                        page_free_head(memory.state, pfn)
        if rc < 0:
            check(rc, f"alloc_preserve {count}")
        return phys

    def unpreserve_free(self, phys):
        """Unpreserve and free a block of :meth:`alloc_preserve`, as ``kho_unpreserve_free()``.

        Raises:
            KhoError: EINVAL if no allocated block starts there, ENOENT if it is not preserved.
        """
        cdef uint64_t at = as_u64(phys), key, where = 0
        cdef int order = -1, rc
        self.use_unfrozen()
        if at & (self.memory.page_size - 1) == 0:
            with self.memory.lock:
                order = page_head_order(self.memory.state, at >> self.memory.page_shift)
        if order < 0:
            raise from_errno(EINVAL, f"unpreserve_free {at:#x}: no allocated block starts here")
        key = kho_radix_encode_key(at, order, self.memory.page_shift)
        rc = self.map.delete(&key, 1, &where)
        if rc == 0:
            with self.memory.lock:
                rc = page_free_head(self.memory.state, at >> self.memory.page_shift)
        if rc < 0:
            check(rc, f"unpreserve_free {at:#x}/order {order}")

    def preserved(self, out=None):
        """Return all preserved blocks in the ABI's walk order, by address within an order.

        A radix tree has larger orders first, a list of chunks smaller ones.

        Args:
            out: ``(phys, orders)``, arrays of uint64 and uint8 with room for :attr:`nr_preserved`
                rows, to be filled instead of new ones.

        Returns:
            tuple: ``(phys, orders)``; with *out*, slices of it.

        Raises:
            ValueError: *out* is too short.
        """
        cdef uint64_t start = 0, count = self.nr_preserved
        self.use()
        if out is None:
            phys, orders = np.empty(count, np.uint64), np.empty(count, np.uint8)
        else:
            phys, orders = out
        if count == 0:
            return phys[:0], orders[:0]
        if min(len(phys), len(orders)) < self.nr_preserved:
            raise ValueError(f"preserved: no room for {count} blocks")
        n = self.fill(phys, orders, count, &start)
        return phys[:n], orders[:n]

    cdef uint64_t fill(self, uint64_t[::1] phys, uint8_t[::1] orders, uint64_t room,
                       uint64_t *start) except? 0xFFFFFFFFFFFFFFFF:
        """Blocks from *start* on, up to *room*; *start* moves on, to NO_BIT at the end."""
        cdef map_cursor cursor
        cdef int rc
        memset(&cursor, 0, sizeof(cursor))
        cursor.values = &phys[0]
        cursor.orders = &orders[0]
        cursor.room = room
        cursor.start = start[0]
        with nogil, self.memory.lock:
            rc = self.map.begin()
            if rc == 0:
                rc = self.map.collect(&cursor)
        check(rc, "preserved")
        start[0] = cursor.start if rc else NO_BIT
        return cursor.n

    def preserved_chunks(self, n):
        """Yield what :meth:`preserved` returns in pieces of up to *n* blocks.

        Blocks preserved or unpreserved meanwhile are seen if the walk has not passed them.
        """
        cdef uint64_t start = 0, count, room
        room = as_u64(n)
        if room == 0:
            raise ValueError("preserved_chunks 0")
        while start != NO_BIT:
            self.use()
            phys, orders = np.empty(room, np.uint64), np.empty(room, np.uint8)
            count = self.fill(phys, orders, room, &start)
            if count:
                yield phys[:count], orders[:count]
