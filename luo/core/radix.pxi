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
