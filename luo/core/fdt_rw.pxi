# L2' flattened device tree, random access: FdtEditor.
#
# Same bytes as libfdt's fdt_rw, edit for edit: room is made by moving everything behind the place
# of the edit, new children and properties go before the older ones, strings to the end of their
# table. What a move leaves behind stays there, padding included, as with libfdt.


cdef int fdt_rw_splice(
    unsigned char *base, uint64_t capacity, uint64_t offset, uint64_t old, uint64_t new,
    fdt_fault *fault
) noexcept nogil:
    """Make *old* bytes at *offset* into *new*, moving all that follows up to the strings' end."""
    cdef uint64_t end = <uint64_t>fdt_ld32(base + 12) + fdt_ld32(base + 32)
    if offset + old > end:
        return fdt_fault_set(fault, FDT_ERR_BADOFFSET, offset, "edit outside the tree")
    if new > old and new - old > capacity - end:
        return fdt_fault_set(fault, FDT_ERR_NOSPACE, offset, "no room left in the buffer")
    memmove(base + offset + new, base + offset + old, end - offset - old)
    return 0


cdef int fdt_rw_splice_struct(
    unsigned char *base, uint64_t capacity, uint64_t offset, uint64_t old, uint64_t new,
    fdt_fault *fault
) noexcept nogil:
    if fdt_rw_splice(base, capacity, offset, old, new, fault) < 0:
        return -1
    fdt_st32(base + 36, <uint32_t>(fdt_ld32(base + 36) + new - old))
    fdt_st32(base + 12, <uint32_t>(fdt_ld32(base + 12) + new - old))
    return 0


cdef int64_t fdt_rw_find_string(
    const fdt_blob *blob, const unsigned char *name, uint64_t length
) noexcept nogil:
    """First place in the strings block where *name* and a NUL stand, or -1."""
    cdef const unsigned char *strings = blob.base + blob.off_dt_strings
    cdef const unsigned char *at = strings
    cdef const unsigned char *last
    if length + 1 > blob.size_dt_strings:
        return -1
    last = strings + blob.size_dt_strings - length - 1
    while at <= last:
        at = <const unsigned char *>memchr(at, name[0], last - at + 1)
        if at == NULL:
            return -1
        if at[length] == 0 and memcmp(at, name, length) == 0:
            return at - strings
        at += 1
    return -1


cdef int fdt_rw_add_property(
    unsigned char *base, uint64_t capacity, const fdt_blob *blob, uint64_t offset,
    const unsigned char *name, uint64_t name_len, const unsigned char *value, uint64_t length,
    fdt_fault *fault
) noexcept nogil:
    """Add a property that is not there yet at *offset*."""
    cdef int64_t nameoff = fdt_rw_find_string(blob, name, name_len)
    cdef uint64_t strings = 0, nbytes = 12 + fdt_align(length), at
    if nameoff < 0:
        # Both moves must succeed or none; libfdt takes the string back instead.
        strings = name_len + 1
        at = blob.off_dt_strings + blob.size_dt_strings
        if strings + nbytes > capacity - at:
            return fdt_fault_set(fault, FDT_ERR_NOSPACE, offset, "no room left in the buffer")
        nameoff = blob.size_dt_strings
        memcpy(base + at, name, name_len)
        base[at + name_len] = 0
        fdt_st32(base + 32, <uint32_t>(blob.size_dt_strings + strings))
    if fdt_rw_splice_struct(base, capacity, offset, 0, nbytes, fault) < 0:
        return -1
    fdt_st32(base + offset, FDT_PROP)
    fdt_st32(base + offset + 4, <uint32_t>length)
    fdt_st32(base + offset + 8, <uint32_t>nameoff)
    memcpy(base + offset + 12, value, length)
    return 0


cdef int fdt_rw_node_end(
    const fdt_blob *blob, uint64_t node, uint64_t *end, fdt_fault *fault
) noexcept nogil:
    """Offset behind the node's FDT_END_NODE."""
    cdef fdt_token token
    cdef uint64_t offset = node, depth = 0
    while True:
        if fdt_next_tag(blob, offset, &token, fault) < 0:
            return -1
        if token.tag == FDT_BEGIN_NODE:
            depth += 1
        elif token.tag == FDT_END_NODE:
            depth -= 1
            if depth == 0:
                end[0] = token.next
                return 0
        elif token.tag == FDT_END:
            return fdt_fault_set(fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END inside a node")
        offset = token.next


@cython.final
@cython.auto_pickle(False)
@cython.no_gc  # it holds an export: the collector would clear the memoryview under it
cdef class FdtEditor:
    """Edit a flattened device tree where it lies, in a buffer of fixed size.

    Gives byte for byte what libfdt gives for ``fdt_open_into()`` into the buffer itself and then
    the same edits: a new child comes before its older siblings, a new property before the older
    ones. Strings are never taken out.

    Attributes:
        capacity: bytes of the buffer.
        totalsize: what the header says: the capacity, or after ``pack()`` the bytes in use.
        data_size: bytes in use.

    Args:
        buffer: writable; all of it may be used, as one page of 4096 bytes. It holds a tree
            already: ``FdtWriter(into=buffer)`` makes an empty one.

    Raises:
        FdtError: the tree is wrong; FDT_ERR_NOTFOUND, FDT_ERR_EXISTS and FDT_ERR_NOSPACE of an
            edit, which then has changed nothing.
        ValueError: a name breaks the rules.

    Context:
        Holds the GIL. An ``Fdt`` that reads the same buffer is to be made anew after an edit.

    Source:
        libfdt's ``fdt_rw.c``. The kernel's ``kho_add_subtree()`` edits KHO's root tree like this.

    Example:
        >>> page = bytearray(4096)
        >>> writer = FdtWriter(into=page)
        >>> with writer.node(""):
        ...     pass
        >>> _ = writer.finish()
        >>> editor = FdtEditor(page)
        >>> editor.add_node("/", "LUO")
        >>> editor.set_property("/LUO", "blob-size", (32).to_bytes(8, "little"))
        >>> editor.pack()
        114
    """

    cdef Py_buffer _buffer
    cdef bint _held
    cdef unsigned char *_base
    cdef uint64_t _capacity
    cdef bint _packed
    cdef fdt_blob _blob

    def __cinit__(self, buffer):
        cdef fdt_fault fault
        cdef uint64_t nr_entries = 0, nr_nodes = 0, size_dt_struct = 0
        cdef int rc
        memset(&fault, 0, sizeof(fault))
        PyObject_GetBuffer(buffer, &self._buffer, PyBUF_WRITABLE)
        self._held = True
        self._base = <unsigned char *>self._buffer.buf
        self._capacity = min(<uint64_t>self._buffer.len, <uint64_t>FDT_MAX_BYTES)
        rc = fdt_blob_init(&self._blob, self._base, self._capacity, &fault)
        if rc == 0:
            rc = fdt_check_reserve_map(&self._blob, &nr_entries, &fault)
        if rc == 0:
            rc = fdt_check_structure(&self._blob, &nr_nodes, &size_dt_struct, &fault)
        if rc < 0:
            fdt_raise(&fault)
        if self._blob.version != 16:
            size_dt_struct = self._blob.end_dt_struct - self._blob.off_dt_struct
        self._arrange(16 * (nr_entries + 1), size_dt_struct, self._capacity, False)

    def __dealloc__(self):
        if self._held:
            PyBuffer_Release(&self._buffer)

    @property
    def capacity(self) -> int:
        """Bytes of the buffer."""
        return self._capacity

    @property
    def totalsize(self) -> int:
        """Bytes of the tree, as its header says."""
        return fdt_ld32(self._base + 4)

    @property
    def data_size(self) -> int:
        """Bytes that the tree needs where it lies."""
        return <uint64_t>fdt_ld32(self._base + 12) + fdt_ld32(self._base + 32)

    def add_node(self, path, name) -> None:
        """Add a child to a node, before the children it has, as ``fdt_add_subnode()``.

        Args:
            path: of the parent.
            name: of the child. As in libfdt "memory" exists if there is a "memory@0".

        Raises:
            FdtError: FDT_ERR_EXISTS; FDT_ERR_NOTFOUND: no parent; FDT_ERR_NOSPACE.
        """
        cdef fdt_fault fault
        cdef fdt_token token
        cdef bytes raw = fdt_encode(name)
        cdef uint64_t parent, where, nbytes, offset = 0
        cdef unsigned char *at
        cdef int rc
        memset(&fault, 0, sizeof(fault))
        fdt_check_name(<const unsigned char *>PyBytes_AS_STRING(raw), len(raw))
        parent = self._open(path)
        rc = fdt_find_child(
            &self._blob, parent, <const unsigned char *>PyBytes_AS_STRING(raw),
            PyBytes_GET_SIZE(raw), NULL, &where, &fault,
        )
        if rc > 0:
            raise FdtError("FDT_ERR_EXISTS", where, f"{path} has a child {name}")
        token.next = 0
        if rc == 0:
            rc = fdt_begin_tag(&self._blob, parent, &token, &fault)
        while rc == 0:
            offset = token.next
            rc = fdt_next_tag(&self._blob, offset, &token, &fault)
            if token.tag != FDT_PROP and token.tag != FDT_NOP:
                break
        nbytes = fdt_align(len(raw) + 1)
        if rc == 0:
            rc = fdt_rw_splice_struct(
                self._base, self._capacity, offset, 0, 8 + nbytes, &fault
            )
        if rc < 0:
            fdt_raise(&fault)
        at = self._base + offset
        fdt_st32(at, FDT_BEGIN_NODE)
        memset(at + 4, 0, nbytes)
        memcpy(at + 4, PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw))
        fdt_st32(at + 4 + nbytes, FDT_END_NODE)

    def set_property(self, path, name, value) -> None:
        """Add a property, before those the node has, or change its value; ``fdt_setprop()``.

        Args:
            path: of the node.
            name: 1 to 255 bytes without NUL.
            value: any buffer, taken as it is.

        Raises:
            FdtError: FDT_ERR_NOTFOUND: no such node; FDT_ERR_NOSPACE.
        """
        cdef fdt_fault fault
        cdef fdt_token token
        cdef bytes key = fdt_property_key(name)
        cdef bytes raw = fdt_value(value)
        cdef uint64_t where, node = self._open(path), length = len(raw)
        cdef const unsigned char *key_at = <const unsigned char *>PyBytes_AS_STRING(key)
        cdef int rc
        memset(&fault, 0, sizeof(fault))
        rc = fdt_find_property(&self._blob, node, key_at, len(key), &where, &token, &fault)
        if rc > 0:
            rc = fdt_rw_splice_struct(
                self._base, self._capacity, token.data, fdt_align(token.length),
                fdt_align(length), &fault,
            )
            if rc == 0:
                fdt_st32(self._base + where + 4, <uint32_t>length)
                memcpy(self._base + token.data, PyBytes_AS_STRING(raw), length)
        elif rc == 0:
            rc = fdt_begin_tag(&self._blob, node, &token, &fault)
            if rc == 0:
                rc = fdt_rw_add_property(
                    self._base, self._capacity, &self._blob, token.next, key_at, len(key),
                    <const unsigned char *>PyBytes_AS_STRING(raw), length, &fault,
                )
        if rc < 0:
            fdt_raise(&fault)

    def del_node(self, path) -> None:
        """Take out a node with all below it, as ``fdt_del_node()``.

        Raises:
            FdtError: FDT_ERR_NOTFOUND.
            ValueError: *path* is the root.
        """
        cdef fdt_fault fault
        cdef uint64_t root, end, node = self._open(path)
        cdef int rc
        memset(&fault, 0, sizeof(fault))
        rc = fdt_find_root(&self._blob, &root, &fault)
        if rc == 0 and node == root:
            raise ValueError("the root node cannot be deleted")
        if rc == 0:
            rc = fdt_rw_node_end(&self._blob, node, &end, &fault)
        if rc == 0:
            rc = fdt_rw_splice_struct(self._base, self._capacity, node, end - node, 0, &fault)
        if rc < 0:
            fdt_raise(&fault)

    def del_property(self, path, name) -> None:
        """Take out a property, as ``fdt_delprop()``; its name stays in the string table.

        Raises:
            FdtError: FDT_ERR_NOTFOUND: no such node or property.
        """
        cdef fdt_fault fault
        cdef fdt_token token
        cdef bytes key = fdt_encode(name)
        cdef uint64_t where, node = self._open(path)
        cdef int rc
        memset(&fault, 0, sizeof(fault))
        rc = fdt_find_property(
            &self._blob, node, <const unsigned char *>PyBytes_AS_STRING(key), len(key), &where,
            &token, &fault,
        )
        if rc == 0:
            raise FdtError("FDT_ERR_NOTFOUND", node, f"{path} has no property {name}")
        if rc > 0:
            rc = fdt_rw_splice_struct(
                self._base, self._capacity, where, token.next - where, 0, &fault
            )
        if rc < 0:
            fdt_raise(&fault)

    def pack(self) -> int:
        """Close all gaps and set totalsize to the bytes in use, as ``fdt_pack()``.

        Returns:
            totalsize, bytes. A later edit opens the tree again: totalsize is the capacity then.
        """
        cdef fdt_fault fault
        cdef uint64_t nr_entries
        self._header()
        if fdt_check_reserve_map(&self._blob, &nr_entries, &fault) < 0:
            fdt_raise(&fault)
        self._arrange(
            16 * (nr_entries + 1), self._blob.end_dt_struct - self._blob.off_dt_struct, 0, True
        )
        self._packed = True
        return fdt_ld32(self._base + 4)

    def __repr__(self) -> str:
        return f"<FdtEditor, {self.data_size} of {self._capacity} bytes>"

    cdef int _header(self) except -1:
        cdef fdt_fault fault
        if fdt_blob_init(&self._blob, self._base, self._capacity, &fault) < 0:
            fdt_raise(&fault)
        if self._blob.version < 17:
            raise FdtError("FDT_ERR_BADVERSION", 20, "not version 17 any more")
        return 0

    cdef uint64_t _open(self, object path) except? 0:
        """Get ready for an edit of the node at *path*; its offset."""
        cdef fdt_fault fault
        cdef bytes raw = fdt_encode(path)
        cdef const unsigned char *at = <const unsigned char *>PyBytes_AS_STRING(raw)
        cdef const unsigned char *end = at + PyBytes_GET_SIZE(raw)
        cdef const unsigned char *slash
        cdef uint64_t node
        cdef int rc
        memset(&fault, 0, sizeof(fault))
        if self._packed:
            fdt_st32(self._base + 4, <uint32_t>self._capacity)
            self._packed = False
        self._header()
        if at == end or at[0] != c"/":
            raise FdtError("FDT_ERR_BADPATH", None, f"{path!r} does not begin with '/'")
        rc = fdt_find_root(&self._blob, &node, &fault)
        while rc == 0:
            while at < end and at[0] == c"/":
                at += 1
            if at == end:
                return node
            slash = <const unsigned char *>memchr(at, c"/", end - at)
            if slash == NULL:
                slash = end
            rc = fdt_find_child(&self._blob, node, at, slash - at, NULL, &node, &fault)
            if rc == 0:
                raise FdtError("FDT_ERR_NOTFOUND", None, f"no node {path}")
            at = slash
            rc = min(rc, 0)
        fdt_raise(&fault)

    cdef int _arrange(
        self, uint64_t rsvmap, uint64_t structure, uint64_t totalsize, bint always
    ) except -1:
        """Put the blocks into libfdt's order, without gaps, if they are not in order or *always*.

        *rsvmap* and *structure* are the blocks' bytes; *totalsize* 0 means what is in use.
        """
        cdef fdt_blob *blob = &self._blob
        cdef uint64_t at_struct = FDT_V17_HEADER + rsvmap, at_strings = at_struct + structure
        cdef uint64_t strings = blob.size_dt_strings
        cdef bint ordered = (
            blob.off_mem_rsvmap >= FDT_V17_HEADER
            and blob.off_dt_struct >= blob.off_mem_rsvmap + rsvmap
            and blob.off_dt_strings >= blob.off_dt_struct + structure
        )
        cdef unsigned char *copy
        if always or not ordered:
            if at_strings + strings > self._capacity:
                raise FdtError("FDT_ERR_NOSPACE", 4, "blocks out of order, no room to sort them")
            if ordered:
                memmove(self._base + FDT_V17_HEADER, self._base + blob.off_mem_rsvmap, rsvmap)
                memmove(self._base + at_struct, self._base + blob.off_dt_struct, structure)
                memmove(self._base + at_strings, self._base + blob.off_dt_strings, strings)
            else:
                copy = <unsigned char *>xmalloc(rsvmap + structure + strings)
                memcpy(copy, self._base + blob.off_mem_rsvmap, rsvmap)
                memcpy(copy + rsvmap, self._base + blob.off_dt_struct, structure)
                memcpy(copy + rsvmap + structure, self._base + blob.off_dt_strings, strings)
                memcpy(self._base + FDT_V17_HEADER, copy, rsvmap + structure + strings)
                free(copy)
                fdt_st32(self._base + 24, 16)
            fdt_st32(self._base + 16, FDT_V17_HEADER)
            fdt_st32(self._base + 8, <uint32_t>at_struct)
            fdt_st32(self._base + 12, <uint32_t>at_strings)
        fdt_st32(self._base + 20, 17)
        fdt_st32(self._base + 36, <uint32_t>structure)
        fdt_st32(self._base + 4, <uint32_t>(totalsize if totalsize else at_strings + strings))
        return 0
