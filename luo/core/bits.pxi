# L1: bits. Two kinds of bitmap over memory that is never touched until a bit in it is set:
#
# hierarchical (struct bitmap64): level 0 holds the bits; bit i of level k says that word i of
#   level k-1 is not zero. Finding the next set bit touches at most two words a level, however
#   many empty words lie between. 2**36 bits need six levels.
# flat: plain words, for "is this bit set" questions; index n is word n/64, bit n%64, which on a
#   little-endian machine is also the kernel's `unsigned long` bitmap (kho-abi section 1).

cdef inline int ctz64(uint64_t word) noexcept nogil:
    """Count trailing zeros; 64 for 0, as the kernel does since 7.3 (kho-abi 12.3)."""
    return __builtin_ctzll(word) if word else 64


cdef inline int log2_64(uint64_t word) noexcept nogil:
    """Index of the highest set bit; -1 for 0."""
    return 63 - __builtin_clzll(word) if word else -1


cdef inline int popcount64(uint64_t word) noexcept nogil:
    """Count set bits, by halves of halves: plain x86-64 has no instruction for it."""
    word -= word >> 1 & <uint64_t>0x5555555555555555
    word = (word & <uint64_t>0x3333333333333333) + (word >> 2 & <uint64_t>0x3333333333333333)
    word = word + (word >> 4) & <uint64_t>0x0F0F0F0F0F0F0F0F
    return word * <uint64_t>0x0101010101010101 >> 56


cdef inline bint flat_test(const uint64_t *words, uint64_t i) noexcept nogil:
    return (words[i >> 6] >> (i & 63)) & 1


cdef inline void flat_set(uint64_t *words, uint64_t i) noexcept nogil:
    words[i >> 6] |= <uint64_t>1 << (i & 63)


cdef inline void flat_clear(uint64_t *words, uint64_t i) noexcept nogil:
    words[i >> 6] &= ~(<uint64_t>1 << (i & 63))


cdef inline uint64_t low_mask(uint64_t nr_bits) noexcept nogil:
    """The lowest *nr_bits* (0..64) bits set."""
    return ALL_ONES if nr_bits >= 64 else (<uint64_t>1 << nr_bits) - 1


cdef void flat_fill(uint64_t *words, uint64_t start, uint64_t count, bint value) noexcept nogil:
    """Set or clear *count* bits from *start* on."""
    cdef uint64_t end = start + count, word, mask, stop
    while start < end:
        word = start >> 6
        stop = min((word + 1) << 6, end)
        mask = low_mask(stop - start) << (start & 63)
        if value:
            words[word] |= mask
        else:
            words[word] &= ~mask
        start = stop


cdef uint64_t flat_fill_new(uint64_t *words, uint64_t start, uint64_t count) noexcept nogil:
    """Set *count* bits from *start* on; how many of them were not."""
    cdef uint64_t end = start + count, mask, stop, fresh = 0
    cdef uint64_t *word
    while start < end:
        word = &words[start >> 6]
        stop = min(((start >> 6) + 1) << 6, end)
        mask = low_mask(stop - start) << (start & 63)
        fresh += popcount64(mask & ~word[0])
        word[0] |= mask
        start = stop
    return fresh


cdef uint64_t flat_count(const uint64_t *words, uint64_t start, uint64_t count) noexcept nogil:
    """How many of *count* bits from *start* on are set."""
    cdef uint64_t end = start + count, stop, found = 0
    while start < end:
        stop = min(((start >> 6) + 1) << 6, end)
        found += popcount64(words[start >> 6] >> (start & 63) & low_mask(stop - start))
        start = stop
    return found


cdef uint64_t flat_next(const uint64_t *words, uint64_t start, uint64_t end) noexcept nogil:
    """First set bit in [start, end), or NO_BIT."""
    cdef uint64_t word, bits
    while start < end:
        word = start >> 6
        bits = words[word] >> (start & 63)
        if bits:
            start += ctz64(bits)
            return start if start < end else NO_BIT
        start = (word + 1) << 6
    return NO_BIT


cdef uint64_t bitmap_layout(bitmap64 *bits, uint64_t nr_bits, uint64_t *words) noexcept nogil:
    """Place the levels for *nr_bits* bits at *words*; return the words used.

    With *words* NULL nothing is placed and only the size is returned.
    """
    cdef uint64_t used = 0, n = nr_bits
    cdef int level = 0
    while True:
        n = (n + 63) >> 6
        if words != NULL:
            bits.level[level] = words + used
        used += n
        level += 1
        if n <= 1:
            break
    if words != NULL:
        bits.nr_levels = level
        bits.nr_bits = nr_bits
    return used


cdef inline bint bitmap_test(const bitmap64 *bits, uint64_t i) noexcept nogil:
    return flat_test(bits.level[0], i)


cdef inline void bitmap_set(bitmap64 *bits, uint64_t i) noexcept nogil:
    cdef uint64_t word
    cdef int level
    for level in range(bits.nr_levels):
        word = bits.level[level][i >> 6]
        bits.level[level][i >> 6] = word | (<uint64_t>1 << (i & 63))
        if word:
            return  # the levels above know already
        i >>= 6


cdef inline void bitmap_clear(bitmap64 *bits, uint64_t i) noexcept nogil:
    cdef uint64_t word
    cdef int level
    for level in range(bits.nr_levels):
        word = bits.level[level][i >> 6] & ~(<uint64_t>1 << (i & 63))
        bits.level[level][i >> 6] = word
        if word:
            return
        i >>= 6


cdef uint64_t bitmap_next(const bitmap64 *bits, uint64_t start) noexcept nogil:
    """First set bit at *start* or above, or NO_BIT."""
    cdef uint64_t i = start, word
    cdef int level = 0
    if start >= bits.nr_bits:
        return NO_BIT
    while True:
        word = bits.level[level][i >> 6] >> (i & 63)
        if word:
            i += ctz64(word)
            break
        # nothing in the rest of this word: ask the level above for the next word
        i = (i >> 6) + 1
        level += 1
        if level == bits.nr_levels or i >= (((bits.nr_bits - 1) >> (6 * level)) + 1):
            return NO_BIT
    while level:
        level -= 1
        i = (i << 6) + ctz64(bits.level[level][i])
    return i
