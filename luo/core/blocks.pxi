# L3: many blocks at once. One walk of the map for each would miss the cache at every step; here the
# addresses are sorted by leaf first, and each leaf is written once.
#
# A bin is up to 2**16 keys whose bits adjoin, in a leaf or a bitmap. Passes over the addresses:
#
#     count   how many fall into each bin; addresses that adjoin are noted as runs
#     sort    the low bits of each go to its bin's part of one array, runs excepted
#     mark    bin by bin; runs whole words at a time
#
# All that can fail is done before the first bit changes. The addresses belong to somebody who may
# be writing to them: the count is a promise that sorting checks, and what is checked there is what
# is marked.

cdef enum:  # why a block may not be preserved
    BLOCK_OK
    BLOCK_MISALIGNED
    BLOCK_OUTSIDE
    BLOCK_IN_SCRATCH
    BLOCK_NOT_ALLOCATED

cdef enum:
    RUN = 16  # addresses that are looked at together
    BIN_BITS = 16

cdef extern from *:
    """
    #define LUO_CAREFUL UINT32_C(0x80000000)
    """
    const uint32_t CAREFUL "LUO_CAREFUL"  # of a bin: not all that falls into it is allowed

cdef struct block_lane:  # the bins of one order
    uint64_t first  # block number >> bin_bits of the first
    uint64_t nr
    uint64_t at  # of the first in the tables

cdef struct block_run:  # blocks that adjoin
    uint64_t phys
    uint64_t nr
    uint64_t at  # in the array
    int order

cdef struct block_batch:
    const uint64_t *phys
    const uint8_t *orders  # NULL: `order` for all
    uint64_t n
    int order
    int page_shift
    int bin_bits
    block_lane lanes[64]
    uint64_t nr_bins
    uint64_t **words  # by bin; NULL: nothing falls into it
    uint32_t *ends  # by bin: how many fall into it, then the end of its part of `low`
    uint32_t *next  # by bin: the next free place in it, and CAREFUL
    uint16_t *low
    block_run *runs
    size_t nr_runs
    size_t runs_room


cdef inline bint blocks_adjoin(const uint64_t *phys, uint64_t step) noexcept nogil:
    """Whether RUN addresses lie *step* apart."""
    cdef uint64_t odd = 0
    cdef int i
    if phys[RUN - 1] - phys[0] != (RUN - 1) * step:
        return False
    for i in range(1, RUN):
        odd |= phys[i] - phys[i - 1] ^ step
    return odd == 0


cdef inline bint blocks_share(const uint64_t *phys, int shift) noexcept nogil:
    """Whether RUN addresses differ only in bits below *shift*."""
    cdef uint64_t odd = 0
    cdef int i
    if (phys[RUN - 1] ^ phys[0]) >> shift:
        return False
    for i in range(1, RUN):
        odd |= phys[i] ^ phys[0]
    return odd >> shift == 0


cdef bint blocks_same_order(const uint8_t *orders) noexcept nogil:
    cdef int i, odd = 0
    for i in range(1, RUN):
        odd |= orders[i] ^ orders[0]
    return odd == 0


cdef void batch_lanes(block_batch *batch, const page_state *st) noexcept nogil:
    """Number the bins of the orders that occur; an order that no block in RAM has gets none."""
    cdef uint64_t i
    cdef block_lane *lane
    cdef int order, shift
    if batch.orders == NULL:
        batch.lanes[batch.order].nr = 1
    else:
        for i in range(batch.n):
            batch.lanes[batch.orders[i]].nr = 1
    for order in range(64):
        lane = &batch.lanes[order]
        if lane.nr == 0:
            continue
        lane.nr = 0
        if order <= st.top:
            shift = order + batch.bin_bits
            lane.first = st.base_pfn >> shift
            lane.nr = ((st.end_pfn - 1) >> shift) + 1 - lane.first
            lane.at = batch.nr_bins
            batch.nr_bins += lane.nr


cdef int batch_note_run(block_batch *batch, uint64_t i, int order) noexcept nogil:
    cdef uint64_t phys = batch.phys[i]
    cdef block_run *run
    cdef block_run *grown
    if batch.nr_runs:
        run = &batch.runs[batch.nr_runs - 1]
        if run.order == order and run.at + run.nr == i and phys == run.phys + (
                run.nr << (order + batch.page_shift)):
            run.nr += RUN
            return 0
    if batch.nr_runs == batch.runs_room:
        grown = <block_run *>realloc(batch.runs,
                                     (2 * batch.runs_room + 64) * sizeof(block_run))
        if grown == NULL:
            return -ENOMEM
        batch.runs = grown
        batch.runs_room = 2 * batch.runs_room + 64
    run = &batch.runs[batch.nr_runs]
    batch.nr_runs += 1
    run.phys = phys
    run.nr = RUN
    run.at = i
    run.order = order
    return 0


cdef int batch_count(block_batch *batch) noexcept nogil:
    """Count the blocks of each bin, runs excepted; -EINVAL: one has no bin."""
    cdef uint64_t i = 0, stop, at
    cdef int order = batch.order, page_shift = batch.page_shift
    cdef const uint64_t *phys = batch.phys
    cdef const uint8_t *orders = batch.orders
    cdef uint32_t *ends = batch.ends
    cdef block_lane *lane
    while i < batch.n:
        stop = min(i + RUN, batch.n)
        if orders != NULL:
            order = orders[i]
        lane = &batch.lanes[order]
        if stop == i + RUN and lane.nr and (orders == NULL or blocks_same_order(orders + i)):
            if blocks_adjoin(phys + i, <uint64_t>1 << (order + page_shift)):
                if batch_note_run(batch, i, order) < 0:
                    return -ENOMEM
                i = stop
                continue
            if blocks_share(phys + i, page_shift + order + batch.bin_bits):
                at = (phys[i] >> page_shift >> order >> batch.bin_bits) - lane.first
                if at >= lane.nr:
                    return -EINVAL
                ends[lane.at + at] += RUN
                i = stop
                continue
        while i < stop:
            if orders != NULL:
                order = orders[i]
            lane = &batch.lanes[order]
            at = (phys[i] >> page_shift >> order >> batch.bin_bits) - lane.first
            if at >= lane.nr:
                return -EINVAL
            ends[lane.at + at] += 1
            i += 1
    return 0


cdef int batch_check_runs(block_batch *batch, PreservedMemory kho) noexcept nogil:
    """Mark the bins of each run as used; -EINVAL: a block of one is not allowed."""
    cdef uint64_t block, last
    cdef block_run *run
    cdef block_lane *lane
    cdef size_t i
    for i in range(batch.nr_runs):
        run = &batch.runs[i]
        if kho.check_block(run.phys, run.order) != BLOCK_OK or kho.check_run(
                run.phys, run.nr << run.order) != BLOCK_OK:
            return -EINVAL
        lane = &batch.lanes[run.order]
        block = run.phys >> (batch.page_shift + run.order)
        last = (block + run.nr - 1 >> batch.bin_bits) - lane.first
        block = (block >> batch.bin_bits) - lane.first
        if last >= lane.nr:
            return -EINVAL
        while block <= last:
            batch.words[lane.at + block] = <uint64_t *>batch
            block += 1
    return 0


cdef int batch_find(block_batch *batch, PreservedMemory kho) noexcept nogil:
    """Find the words of each bin that is used, and give it its part of `low`."""
    cdef uint64_t i, at, first_pfn, bit = 0
    cdef uint32_t end = 0
    cdef block_lane *lane
    cdef int order, rc
    for order in range(MAX_ORDERS):
        lane = &batch.lanes[order]
        for i in range(lane.nr):
            at = lane.at + i
            batch.next[at] = end
            end += batch.ends[at]
            if batch.ends[at] == 0 and batch.words[at] == NULL:
                continue
            first_pfn = (lane.first + i) << (batch.bin_bits + order)
            rc = kho.map.find(
                kho_radix_encode_key(first_pfn << batch.page_shift, order, batch.page_shift),
                True, &batch.words[at], &bit)
            if rc < 0:
                return rc
            batch.words[at] += bit >> 6
            if batch.ends[at] and (kho.debug or kho.check_run(
                    first_pfn << batch.page_shift,
                    <uint64_t>1 << (batch.bin_bits + order)) != BLOCK_OK):
                batch.next[at] |= CAREFUL
            batch.ends[at] = end
    return 0


cdef int batch_sort(block_batch *batch, PreservedMemory kho) noexcept nogil:
    """Put the low bits of each block's number into its bin; -EINVAL: one is not allowed."""
    cdef uint64_t i = 0, j, stop, part, at, n = batch.n, block, odd = 0
    cdef uint64_t bin_mask = low_mask(batch.bin_bits)
    cdef int order = batch.order, bin_bits = batch.bin_bits, shift = batch.page_shift + order
    cdef const uint64_t *phys = batch.phys
    cdef const uint8_t *orders = batch.orders
    cdef uint16_t *low = batch.low
    cdef uint32_t *next_place = batch.next
    cdef uint32_t place
    cdef block_lane *lane
    cdef size_t run
    for run in range(batch.nr_runs + 1):
        stop = batch.runs[run].at if run < batch.nr_runs else n
        while i < stop:
            part = min(i + RUN, stop)
            if orders != NULL:
                order = orders[i]
                shift = batch.page_shift + order
            lane = &batch.lanes[order]
            if part == i + RUN and lane.nr and (
                    orders == NULL or blocks_same_order(orders + i)) and blocks_share(
                    phys + i, shift + bin_bits):
                at = (phys[i] >> shift >> bin_bits) - lane.first
                place = next_place[lane.at + at] if at < lane.nr else CAREFUL
                if place + RUN <= n:  # not a bin in which each is looked at
                    for j in range(<uint64_t>RUN):
                        odd |= phys[i + j] & low_mask(shift)
                        low[place + j] = phys[i + j] >> shift & bin_mask
                    next_place[lane.at + at] = place + RUN
                    i = part
                    continue
            while i < part:
                if orders != NULL:
                    order = orders[i]
                    shift = batch.page_shift + order
                lane = &batch.lanes[order]
                block = phys[i] >> shift
                at = (block >> bin_bits) - lane.first
                if at >= lane.nr:
                    return -EINVAL
                place = next_place[lane.at + at]
                next_place[lane.at + at] = place + 1
                if place >= n and ((place & ~CAREFUL) >= n
                                   or kho.check_block(phys[i], order) != BLOCK_OK):
                    return -EINVAL
                odd |= phys[i] & low_mask(shift)
                low[place & ~CAREFUL] = block & bin_mask
                i += 1
        if run < batch.nr_runs:
            i += batch.runs[run].nr
    for at in range(batch.nr_bins):
        if batch.words[at] != NULL:
            odd |= (next_place[at] & ~CAREFUL) ^ batch.ends[at]
    return -EINVAL if odd else 0


cdef uint64_t batch_mark_bin(uint64_t *words, const uint16_t *low, uint64_t n) noexcept nogil:
    """Set *n* bits; how many of them were not."""
    cdef uint64_t i, bit, at = 0, word = words[0], fresh = 0
    for i in range(n):
        if low[i] >> 6 != at:  # neighbours in ascending order wait for no store
            words[at] = word
            at = low[i] >> 6
            word = words[at]
        bit = <uint64_t>1 << (low[i] & 63)
        fresh += (word & bit) == 0
        word |= bit
    words[at] = word
    return fresh


cdef uint64_t batch_mark_run(const block_batch *batch, const block_run *run) noexcept nogil:
    cdef const block_lane *lane = &batch.lanes[run.order]
    cdef uint64_t block = run.phys >> (batch.page_shift + run.order), end = block + run.nr, stop
    cdef uint64_t fresh = 0
    while block < end:
        stop = min(end, ((block >> batch.bin_bits) + 1) << batch.bin_bits)
        fresh += flat_fill_new(
            batch.words[lane.at + (block >> batch.bin_bits) - lane.first],
            block & low_mask(batch.bin_bits), stop - block)
        block = stop
    return fresh


cdef uint64_t batch_mark(const block_batch *batch, PreservedMap map) noexcept nogil:
    """Set the bits of all blocks; how many were not set."""
    cdef uint64_t at, i, begin = 0, fresh = 0, here
    cdef const block_lane *lane
    cdef int order
    for order in range(MAX_ORDERS):
        lane = &batch.lanes[order]
        here = 0
        for i in range(lane.nr):
            at = lane.at + i
            if batch.words[at] != NULL:
                here += batch_mark_bin(batch.words[at], batch.low + begin, batch.ends[at] - begin)
                begin = batch.ends[at]
        fresh += here
        map.pages_in_map += here << order
    for i in range(batch.nr_runs):
        here = batch_mark_run(batch, &batch.runs[i])
        fresh += here
        map.pages_in_map += here << batch.runs[i].order
    map.keys_in_map += fresh
    return fresh


cdef int batch_preserve(block_batch *batch, PreservedMemory kho, uint64_t *fresh) noexcept nogil:
    """All steps; the lock is held. -EINVAL: not worth it, or a block is not allowed."""
    cdef uint64_t nbytes
    cdef int rc = kho.map.begin()
    if rc < 0:
        return rc
    batch_lanes(batch, kho.memory.state)
    if batch.n < RUN or batch.n < batch.nr_bins >> 3 or batch.n >= CAREFUL:
        return -EINVAL
    nbytes = 2 * batch.n
    batch.words = <uint64_t **>calloc(batch.nr_bins, sizeof(uint64_t *))
    batch.ends = <uint32_t *>calloc(batch.nr_bins, sizeof(uint32_t))
    batch.next = <uint32_t *>malloc(batch.nr_bins * sizeof(uint32_t))
    batch.low = <uint16_t *>malloc(nbytes)
    if batch.words == NULL or batch.ends == NULL or batch.next == NULL or batch.low == NULL:
        return -ENOMEM
    advise_huge(batch.low, nbytes)  # its first touch costs more than its use
    rc = batch_count(batch)
    if rc == 0:
        rc = batch_check_runs(batch, kho)
    if rc == 0:
        rc = batch_find(batch, kho)
    if rc == 0:
        rc = batch_sort(batch, kho)
    if rc == 0:
        fresh[0] = batch_mark(batch, kho.map)
    else:
        kho.map.unmake()
    return rc


cdef int preserve_many(PreservedMemory kho, const uint64_t *phys, const uint8_t *orders, int order,
                       uint64_t n, uint64_t *fresh) noexcept nogil:
    """Preserve *n* blocks, all or none.

    -EINVAL: too few for their spread, or one is not allowed; one by one says which.
    """
    cdef block_batch batch
    cdef int rc
    memset(&batch, 0, sizeof(batch))
    batch.phys = phys
    batch.orders = orders
    batch.order = order
    batch.n = n
    batch.page_shift = kho.memory.page_shift
    batch.bin_bits = min(kho.map.leaf_bits, BIN_BITS)
    with kho.memory.lock:
        rc = batch_preserve(&batch, kho, fresh)
    free(batch.words)
    free(batch.ends)
    free(batch.next)
    free(batch.low)
    free(batch.runs)
    return rc
