# L3: the preserved map of kho-v2 … kho-v4: a radix tree whose nodes are pages of simulated memory.
#
# A node is one page. Inner nodes hold page_size/8 native u64: physical addresses of child pages, 0
# for none. Leaves are bitmaps of 8*page_size bits. A key is, with ps = page shift,
#
#     2**(64 - ps - order)  +  (phys >> (ps + order))
#
# so ascending keys are blocks of descending order, and addresses ascend within an order
# (kho-abi 5.2). Nothing here trusts what it reads: simulated memory belongs to everybody.

# ---- keys ----

cdef inline uint64_t kho_radix_encode_key(uint64_t phys, int order, int page_shift) noexcept nogil:
    return (<uint64_t>1 << (64 - page_shift - order)) | (phys >> (page_shift + order))


cdef inline int kho_radix_decode_key(uint64_t key, int page_shift, uint64_t *phys) noexcept nogil:
    """Order of the block that *key* stands for, its address in *phys*; -1 if it stands for none."""
    cdef int marker = log2_64(key), order = 64 - page_shift - marker
    if marker < 1 or order < 0:
        return -1
    phys[0] = (key ^ (<uint64_t>1 << marker)) << (page_shift + order)
    return order


cdef int as_page_shift(object page_size) except -1:
    cdef uint64_t nbytes = as_u64(page_size)
    if max_order_of(nbytes) < 0:
        raise ValueError(f"page_size {page_size}: not 4096, 16384 or 65536")
    return ctz64(nbytes)


def radix_key(phys, order, *, page_size=4096):
    """Return the key under which the map holds a block.

    Args:
        phys: byte address (``phys_addr_t``), a multiple of ``page_size << order``.
        order: 0 to 63 - page shift.
        page_size: 4096, 16384 or 65536.

    Raises:
        ValueError: the block is misaligned, or its order has no key.

    Source: kho-abi 5.2; the same in kho-v2, kho-v3 and kho-v4.
    """
    cdef int shift = as_page_shift(page_size), o = as_order(order)
    cdef uint64_t at = as_u64(phys)
    if o > 63 - shift:
        raise ValueError(f"order {o}: keys hold orders 0..{63 - shift}")
    if at & ((<uint64_t>1 << (shift + o)) - 1):
        raise ValueError(f"{at:#x}: not aligned to order {o}")
    return kho_radix_encode_key(at, o, shift)


def radix_decode(key, *, page_size=4096):
    """Return ``(phys, order)`` of the block that *key* stands for.

    Raises:
        ValueError: the key has no marker bit where a block's may be (kho-abi 12.18).
    """
    cdef int shift = as_page_shift(page_size), order
    cdef uint64_t phys = 0
    order = kho_radix_decode_key(as_u64(key), shift, &phys)
    if order < 0:
        raise ValueError(f"key {key:#x}: stands for no block")
    return phys, order


# ---- the tree: workers ----

cdef int kho_radix_levels(int page_shift):
    """Levels that hold every bit of a key, as kho-v3 and later have them (kho-abi 4)."""
    cdef int slot_bits = page_shift - 3, above_leaf = 64 - page_shift + 1 - (page_shift + 3)
    return 1 + (above_leaf + slot_bits - 1) // slot_bits


cdef void kho_radix_setup(kho_radix_tree *tree, int page_shift, int levels) noexcept nogil:
    tree.page_shift = page_shift
    tree.slot_bits = page_shift - 3
    tree.leaf_bits = page_shift + 3
    tree.levels = levels
    tree.key_bits = 64 - page_shift + 1


cdef inline void *kho_radix_page(const kho_radix_tree *tree, uint64_t phys) noexcept nogil:
    return <void *>(tree.zero + phys)


cdef inline bint kho_radix_child_sane(const kho_radix_tree *tree, PhysicalMemory memory,
                                      uint64_t phys) noexcept nogil:
    cdef uint64_t page = <uint64_t>1 << tree.page_shift
    return phys != 0 and phys & (page - 1) == 0 and memory.has(phys, page)


cdef int kho_radix_new_page(kho_radix_tree *tree, uint64_t *slot) noexcept nogil:
    """Hang a zeroed page into *slot* and remember it, so that a failed call can take it back."""
    cdef uint64_t pfn = 0
    cdef uint64_t **grown
    if tree.nr_made == tree.made_room:
        grown = <uint64_t **>realloc(tree.made, (2 * tree.made_room + 64) * sizeof(uint64_t *))
        if grown == NULL:
            return -ENOMEM
        tree.made = grown
        tree.made_room = 2 * tree.made_room + 64
    if page_alloc_run(tree.state, 0, 1, NO_NODE, &pfn) == 0:
        return -ENOMEM
    memset(kho_radix_page(tree, pfn << tree.page_shift), 0, <size_t>1 << tree.page_shift)
    slot[0] = pfn << tree.page_shift
    tree.made[tree.nr_made] = slot
    tree.nr_made += 1
    tree.nr_nodes += 1
    return 0


cdef void kho_radix_unmake(kho_radix_tree *tree) noexcept nogil:
    """Take back the pages made since nr_made was last 0, newest first."""
    cdef uint64_t *slot
    while tree.nr_made:
        tree.nr_made -= 1
        slot = tree.made[tree.nr_made]
        page_free_head(tree.state, slot[0] >> tree.page_shift)
        slot[0] = 0
        tree.nr_nodes -= 1
    tree.leaf = 0


cdef int kho_radix_find_leaf(kho_radix_tree *tree, PhysicalMemory memory, uint64_t key,
                             bint make, uint64_t **words) noexcept nogil:
    """The leaf of *key*; -ENOENT: its path is missing and not to be made; -EIO: it is corrupt."""
    cdef uint64_t prefix = key >> tree.leaf_bits, node, mask
    cdef uint64_t *slot
    cdef int level, rc
    if tree.leaf and tree.leaf_prefix == prefix:  # neighbours in a bulk call share their leaf
        words[0] = <uint64_t *>kho_radix_page(tree, tree.leaf)
        return 0
    mask = (<uint64_t>1 << tree.slot_bits) - 1
    node = tree.root
    for level in range(tree.levels - 2, -1, -1):
        slot = <uint64_t *>kho_radix_page(tree, node)
        slot += (prefix >> (level * tree.slot_bits)) & mask
        if slot[0] == 0:
            if not make:
                return -ENOENT
            rc = kho_radix_new_page(tree, slot)
            if rc < 0:
                return rc
        elif not kho_radix_child_sane(tree, memory, slot[0]):
            return -EIO
        node = slot[0]
    tree.leaf = node
    tree.leaf_prefix = prefix
    words[0] = <uint64_t *>kho_radix_page(tree, node)
    return 0


cdef int map_emit(map_cursor *cursor, const uint64_t *words, uint64_t bit, uint64_t nr_bits,
                  uint64_t value, int shift, int order) noexcept nogil:
    """Append *value* + (i << *shift*) for each set bit i in [*bit*, *nr_bits*), a multiple of 64.

    1: there is no more room; the cursor starts at the first bit that found none.
    """
    cdef uint64_t i, j, word, first = cursor.n, n = cursor.n, safe = cursor.room
    cdef uint64_t *out = cursor.values
    cdef int rc = 0
    i = bit >> 6
    word = words[i] & ~low_mask(bit & 63)
    while True:
        if cursor.room - n < 64:  # word by word no more
            while word:
                if n == cursor.room:
                    cursor.start = (i << 6) + __builtin_ctzll(word)
                    rc = 1
                    break
                out[n] = value + (((i << 6) + __builtin_ctzll(word)) << shift)
                n += 1
                word &= word - 1
            if rc:
                break
        elif word == ALL_ONES:
            for j in range(64):
                out[n + j] = value + (((i << 6) + j) << shift)
            n += 64
        elif word:
            # Four at a time, whether there are as many or not: what is too much is written over.
            j = n
            n += popcount64(word)
            while True:
                out[j] = value + (((i << 6) + __builtin_ctzll(word)) << shift)
                word &= word - 1
                out[j + 1] = value + (((i << 6) + __builtin_ctzll(word | TOP_BIT)) << shift)
                word &= word - 1
                out[j + 2] = value + (((i << 6) + __builtin_ctzll(word | TOP_BIT)) << shift)
                word &= word - 1
                out[j + 3] = value + (((i << 6) + __builtin_ctzll(word | TOP_BIT)) << shift)
                word &= word - 1
                j += 4
                if word == 0:
                    break
        i += 1
        if i == nr_bits >> 6:
            break
        word = words[i]
    if cursor.orders != NULL:
        memset(cursor.orders + first, order, n - first)
    cursor.n = n
    return rc


cdef int kho_radix_decode_leaf(const kho_radix_tree *tree, const uint64_t *words, uint64_t base,
                               uint64_t bit, map_cursor *cursor) noexcept nogil:
    """Append what the leaf whose first key is *base* holds from *bit* on."""
    cdef uint64_t phys = 0, nr_bits = <uint64_t>1 << tree.leaf_bits
    cdef int order
    if cursor.orders == NULL:
        return map_emit(cursor, words, bit, nr_bits, base, 0, 0)
    order = kho_radix_decode_key(base, tree.page_shift, &phys)
    if order >= 0:  # the marker is above the leaf's bits: one order for all of them
        return map_emit(cursor, words, bit, nr_bits, phys, order + tree.page_shift, order)
    while True:  # very large orders share the first leaf
        bit = flat_next(words, bit, nr_bits)
        if bit == NO_BIT:
            return 0
        order = kho_radix_decode_key(base + bit, tree.page_shift, &phys)
        if order < 0:
            return -EIO
        if cursor.n == cursor.room:
            cursor.start = bit
            return 1
        cursor.values[cursor.n] = phys
        cursor.orders[cursor.n] = order
        cursor.n += 1
        bit += 1


cdef int kho_radix_collect(kho_radix_tree *tree, PhysicalMemory memory, uint64_t node, int level,
                           uint64_t base, map_cursor *cursor) noexcept nogil:
    """Append the keys >= cursor.start below *node*, ascending, or the blocks they stand for.

    1: there is no more room; -EIO: the tree is corrupt.
    """
    cdef uint64_t *slots = <uint64_t *>kho_radix_page(tree, node)
    cdef uint64_t i, first = 0
    cdef int shift, rc
    cursor.nr_visited += 1
    if cursor.nr_visited > tree.nr_nodes:
        return -EIO  # somebody has written over the tree
    if cursor.start > base:
        first = cursor.start - base
    if level == 0:
        rc = kho_radix_decode_leaf(tree, slots, base, first, cursor)
        if rc == 1:
            cursor.start += base
        return rc
    shift = tree.leaf_bits + (level - 1) * tree.slot_bits
    for i in range(first >> shift, <uint64_t>1 << tree.slot_bits):
        if slots[i] == 0:
            continue
        if not kho_radix_child_sane(tree, memory, slots[i]):
            return -EIO
        rc = kho_radix_collect(tree, memory, slots[i], level - 1, base + (i << shift), cursor)
        if rc:
            return rc
    return 0


cdef int kho_radix_list_nodes(kho_radix_tree *tree, PhysicalMemory memory, uint64_t node,
                              int level, map_cursor *cursor) noexcept nogil:
    """Append the pages of the tree to cursor.values, each before its children."""
    cdef uint64_t *slots = <uint64_t *>kho_radix_page(tree, node)
    cdef uint64_t i
    cdef int rc
    if cursor.n == cursor.room:
        return -EIO
    cursor.values[cursor.n] = node
    cursor.n += 1
    if level == 0:
        return 0
    for i in range(<uint64_t>1 << tree.slot_bits):
        if slots[i] == 0:
            continue
        if not kho_radix_child_sane(tree, memory, slots[i]):
            return -EIO
        rc = kho_radix_list_nodes(tree, memory, slots[i], level - 1, cursor)
        if rc:
            return rc
    return 0


cdef enum:  # what a map counts
    MAP_NODES  # its own pages
    MAP_ROOT  # phys of the root or the first chunk


cdef inline uint64_t map_key_pages(int page_shift, uint64_t key) noexcept nogil:
    """Pages of the block that *key* stands for; 0 for a key that stands for none."""
    cdef int order = 64 - page_shift - log2_64(key)
    return <uint64_t>1 << order if key > 1 and order >= 0 else 0


cdef int map_set_keys(PreservedMap map, const uint64_t *keys, uint64_t n, uint64_t *fresh,
                      uint64_t *nr_fresh) noexcept nogil:
    """Set the bits of *n* keys, all or none. *fresh*: room for a bit a key, cleared."""
    cdef uint64_t i = 0, bit = 0, pages = 0
    cdef uint64_t *words = NULL
    cdef int rc = map.begin()
    if rc < 0:
        return rc
    for i in range(n):
        rc = map.find(keys[i], True, &words, &bit)
        if rc < 0:
            break
        if not flat_test(words, bit):
            flat_set(words, bit)
            flat_set(fresh, i)
            nr_fresh[0] += 1
            pages += map_key_pages(map.memory.page_shift, keys[i])
    if rc == 0:
        map.keys_in_map += nr_fresh[0]
        map.pages_in_map += pages
        return 0
    while i:  # clear the bits that this call set, then free the pages that it made
        i -= 1
        if flat_test(fresh, i) and map.find(keys[i], False, &words, &bit) == 0:
            flat_clear(words, bit)
    map.unmake()
    return rc


cdef int map_clear_keys(PreservedMap map, const uint64_t *keys, uint64_t n,
                        uint64_t *at) noexcept nogil:
    """Clear the bits of *n* keys, all or none: -ENOENT if the one at index *at* is not set.

    Pages stay, as in Linux. After an abort the keys that are not set are passed over.
    """
    cdef uint64_t i, bit = 0
    cdef uint64_t *words = NULL
    cdef int rc = map.begin()
    if rc < 0:
        return rc
    if not map.forgot:
        for i in range(n):
            rc = map.find(keys[i], False, &words, &bit)
            if rc < 0 or not flat_test(words, bit):
                at[0] = i
                return -EIO if rc == -EIO else -ENOENT
    for i in range(n):
        if map.find(keys[i], False, &words, &bit) == 0 and flat_test(words, bit):
            flat_clear(words, bit)  # a key may be named twice
            map.keys_in_map -= 1
            map.pages_in_map -= map_key_pages(map.memory.page_shift, keys[i])
    return 0


@cython.auto_pickle(False)
cdef class PreservedMap:
    """What a kernel preserves, as a set of keys; the shape in memory is the generation's.

    Keys are those of the radix tree in every shape; they are walked in the order of the shape. A
    shape has to say where a key's bit is.

    Attributes:
        nr_keys: blocks in it.

    Context: calls hold the memory's lock.
    """

    cdef int use(self) except -1:
        raise TypeError("PreservedMap: has no shape")

    # ---- what a shape brings; the lock is held ----

    cdef int begin(self) noexcept nogil:
        """Point the workers at today's mapping and page state; nothing is made yet."""
        return -EINVAL

    cdef int find(self, uint64_t key, bint make, uint64_t **words, uint64_t *bit) noexcept nogil:
        """Where the key's bit is, with those of all keys that differ in leaf_bits only.

        -ENOENT: nowhere, and it was not to be made; -ERANGE: it has no place; -ENOMEM; -EIO.
        """
        return -EINVAL

    cdef void unmake(self) noexcept nogil:
        """Take back the pages that find() made since begin()."""

    cdef int collect(self, map_cursor *cursor) noexcept nogil:
        """Fill the cursor's arrays from its start on; 1 if more follow, from the new start."""
        return -EINVAL

    cdef uint64_t count(self, int what) noexcept nogil:
        return 0

    cdef int drop(self) except -1:
        """Free the map's pages, and forget every key."""
        return 0

    # ---- what all of them do ----

    cdef int add(self, const uint64_t *keys, uint64_t n, uint64_t *nr_fresh) noexcept nogil:
        """Add keys, all or none, and count the new ones; 0 or -errno."""
        cdef uint64_t one = 0
        cdef uint64_t *fresh = &one
        cdef int rc
        nr_fresh[0] = 0
        if n > 64:
            fresh = <uint64_t *>calloc((n + 63) >> 6, 8)
            if fresh == NULL:
                return -ENOMEM
        with self.memory.lock:
            rc = map_set_keys(self, keys, n, fresh, nr_fresh)
        if n > 64:
            free(fresh)
        return rc

    cdef int delete(self, const uint64_t *keys, uint64_t n, uint64_t *at) noexcept nogil:
        """Remove keys, all or none: -ENOENT if the one at index *at* is not there."""
        with self.memory.lock:
            return map_clear_keys(self, keys, n, at)

    cdef int has(self, uint64_t key) noexcept nogil:
        """1 if the key is there, 0 if not, or -errno."""
        cdef uint64_t bit = 0
        cdef uint64_t *words = NULL
        cdef int rc
        with self.memory.lock:
            rc = self.begin()
            if rc == 0:
                rc = self.find(key, False, &words, &bit)
            if rc == 0:
                return flat_test(words, bit)
        return 0 if rc == -ENOENT or rc == -ERANGE else rc

    cdef object list_keys(self):
        """All keys: shape (n,), uint64."""
        cdef map_cursor cursor
        cdef uint64_t[::1] room
        cdef int rc
        self.use()
        result = np.empty(self.keys_in_map + 1, np.uint64)
        room = result
        memset(&cursor, 0, sizeof(cursor))
        cursor.values = &room[0]
        cursor.room = self.keys_in_map
        with nogil, self.memory.lock:
            rc = self.begin()
            if rc == 0:
                rc = self.collect(&cursor)
        check(rc, "keys")
        return result[:cursor.n]

    @property
    def nr_keys(self):
        """Keys in it."""
        return self.keys_in_map


@cython.final
@cython.auto_pickle(False)
cdef class RadixTree(PreservedMap):
    """A radix tree of integer keys in pages of simulated memory, as ``struct kho_radix_tree``.

    Args:
        memory: where its pages are allocated, outside scratch.
        levels: inner levels plus the leaf; 0: as kho-v3 and kho-v4 have them.

    Attributes:
        root: physical address of the root page; allocated at once, never 0.
        nr_nodes: pages of the tree, root included. They are freed by :meth:`free` only.

    Raises:
        KhoError: ENOMEM; EROFS if memory is read-only.

    Source: kernel/liveupdate/kexec_handover.c; kho-abi 5.2.
    """

    def __cinit__(self, PhysicalMemory memory not None, *, levels=0):
        cdef int shift = memory.page_shift, depth = PyNumber_Index(levels)
        cdef uint64_t pfn = 0
        depth = depth if depth else kho_radix_levels(shift)
        if not 2 <= depth <= 7:
            raise ValueError(f"levels {depth}: not in 2..7")
        memory.check_writable("RadixTree")
        memory.use()
        self.memory = memory
        kho_radix_setup(&self.tree, shift, depth)
        self.leaf_bits = self.tree.leaf_bits
        with memory.lock:
            if page_alloc_run(memory.state, 0, 1, NO_NODE, &pfn):
                self.tree.root = pfn << shift
                memset(<void *>(memory.zero + self.tree.root), 0, memory.page_size)
                self.tree.nr_nodes = 1
        if self.tree.nr_nodes == 0:
            raise from_errno(ENOMEM, "RadixTree: no page for the root")

    def __dealloc__(self):
        free(self.tree.made)

    cdef int use(self) except -1:
        if self.tree.root == 0:
            raise from_errno(EINVAL, "RadixTree: freed")
        return self.memory.use()

    cdef int begin(self) noexcept nogil:
        if self.memory.state == NULL:
            return -EINVAL
        self.tree.zero = self.memory.zero
        self.tree.state = self.memory.state
        self.tree.nr_made = 0
        return 0

    cdef int find(self, uint64_t key, bint make, uint64_t **words, uint64_t *bit) noexcept nogil:
        if key >> self.tree.key_bits:
            return -ERANGE
        bit[0] = key & low_mask(self.tree.leaf_bits)
        return kho_radix_find_leaf(&self.tree, self.memory, key, make, words)

    cdef void unmake(self) noexcept nogil:
        kho_radix_unmake(&self.tree)

    cdef int collect(self, map_cursor *cursor) noexcept nogil:
        return kho_radix_collect(&self.tree, self.memory, self.tree.root, self.tree.levels - 1, 0,
                                 cursor)

    cdef uint64_t count(self, int what) noexcept nogil:
        return self.tree.nr_nodes if what == MAP_NODES else self.tree.root

    cdef int drop(self) except -1:
        self.free()
        return 0

    @property
    def root(self):
        """Physical address of the root page."""
        return self.tree.root

    @property
    def levels(self):
        """Levels of nodes, the leaf included."""
        return self.tree.levels

    @property
    def nr_nodes(self):
        """Pages of the tree."""
        return self.tree.nr_nodes

    def add_key(self, key):
        """Add *key*, as ``kho_radix_add_key()``; adding it again changes nothing.

        Raises:
            KhoError: ERANGE if the key is wider than 64 - page shift + 1 bits; ENOMEM, and the
                pages that this call made are freed again; EIO if somebody wrote over the tree.
        """
        cdef uint64_t value = as_u64(key), fresh = 0
        self.use()
        check(self.add(&value, 1, &fresh), f"add_key {value:#x}")

    def del_key(self, key):
        """Remove *key*; the pages that led to it stay, as in Linux.

        Raises:
            KhoError: ENOENT if it is not there, EIO if somebody wrote over the tree.
        """
        cdef uint64_t value = as_u64(key), at = 0
        self.use()
        check(self.delete(&value, 1, &at), f"del_key {value:#x}")

    def has_key(self, key):
        """Whether *key* is in the tree."""
        cdef uint64_t value = as_u64(key)
        self.use()
        return bool(check(self.has(value), f"has_key {value:#x}"))

    def keys(self):
        """Return all keys, ascending: shape (n,), uint64."""
        return self.list_keys()

    def nodes(self):
        """Return the addresses of all pages, a node before its children: shape (n,), uint64."""
        cdef map_cursor cursor
        cdef uint64_t[::1] room
        cdef int rc
        self.use()
        result = np.empty(self.tree.nr_nodes, np.uint64)
        room = result
        memset(&cursor, 0, sizeof(cursor))
        cursor.values = &room[0]
        cursor.room = self.tree.nr_nodes
        with nogil, self.memory.lock:
            rc = self.begin()
            if rc == 0:
                rc = kho_radix_list_nodes(&self.tree, self.memory, self.tree.root,
                                          self.tree.levels - 1, &cursor)
        check(rc, "nodes")
        return result[:cursor.n]

    def free(self):
        """Free all pages of the tree."""
        cdef uint64_t[::1] pages = self.nodes()
        cdef Py_ssize_t i
        with self.memory.lock:
            for i in range(pages.shape[0]):
                page_free_head(self.memory.state, pages[i] >> self.tree.page_shift)
        self.tree.root = self.tree.leaf = self.tree.nr_nodes = 0
        self.keys_in_map = self.pages_in_map = 0


# ---- outgoing: what this kernel preserves ----

cdef enum:  # why a block may not be preserved
    BLOCK_OK
    BLOCK_MISALIGNED
    BLOCK_OUTSIDE
    BLOCK_IN_SCRATCH
    BLOCK_NOT_ALLOCATED


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
    array = np.asarray(orders)
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


# ---- incoming: what the previous kernel preserved ----

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


cdef int kho_walk_leaf(kho_walk *walk, const uint64_t *words, uint64_t base) noexcept nogil:
    """Note the blocks of a leaf whose first key is *base*, runs of set bits at a time."""
    cdef uint64_t i, word, start, length, key, phys = 0
    cdef int order = 0, at, bit, marker = log2_64(base)
    cdef uint64_t first_pfn = 0
    if base:  # the marker is above the leaf's bits: one order for all of them
        order = 64 - walk.page_shift - marker
        if order >= 0:
            first_pfn = (base ^ (<uint64_t>1 << marker)) << order
    for i in range(<uint64_t>1 << (walk.leaf_bits - 6)):
        word = words[i]
        at = 0
        while word:
            bit = ctz64(word)
            word >>= bit
            at += bit
            length = ctz64(~word)
            start = (i << 6) + at
            if base == 0:  # very large orders share this leaf: key by key
                length = 1
                order = kho_radix_decode_key(start, walk.page_shift, &phys)
                first_pfn = (phys >> walk.page_shift) - (start << order) if order >= 0 else 0
            if order < 0:
                key = base + start
                return kho_walk_fail(walk, WALK_KEY, key, 0, 0)
            if kho_walk_blocks(walk, first_pfn + (start << order), order, length) < 0:
                return -1
            if length == 64:
                break
            word >>= length
            at += length
    return 0


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
