# L2' flattened device tree, read side: Fdt, Node, Column.
#
# The blob is hostile. Each worker below checks an offset against the block it must lie in before
# it loads anything, keeps no pointer into the blob between calls, and walks with counters instead
# of recursion. So a blob that changes while it is read yields wrong answers or an FdtError, but no
# access outside the buffer. Loads go through memcpy: values have 4-byte alignment at best, and
# the buffer itself may have none.
#
#   offset 0   header: magic totalsize off_dt_struct off_dt_strings off_mem_rsvmap version
#              last_comp_version boot_cpuid_phys size_dt_strings [size_dt_struct], u32 big-endian
#   structure  { FDT_BEGIN_NODE name\0 pad4 | FDT_END_NODE | FDT_NOP | FDT_END
#              | FDT_PROP len nameoff value pad4 }
#   strings    names of properties, NUL terminated

from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_INCREF, Py_XDECREF, PyObject
from libc.errno cimport EINVAL, ENOMEM, ENOSPC
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memchr, memcmp, memcpy, memmove, memset

import os
import sys

import numpy as np

from luo.errors import FdtError


cdef extern from *:
    void fdt_prefetch "__builtin_prefetch"(const void *where) noexcept nogil


cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object text)
    void *PyUnicode_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)


cdef extern from "<endian.h>" nogil:
    uint32_t be32toh(uint32_t)
    uint64_t be64toh(uint64_t)
    uint64_t le64toh(uint64_t)
    uint32_t htobe32(uint32_t)
    uint64_t htobe64(uint64_t)


_FDT_ERRORS = (
    "FDT_ERR_OK", "FDT_ERR_NOTFOUND", "FDT_ERR_EXISTS", "FDT_ERR_NOSPACE", "FDT_ERR_BADOFFSET",
    "FDT_ERR_BADPATH", "FDT_ERR_BADPHANDLE", "FDT_ERR_BADSTATE", "FDT_ERR_TRUNCATED",
    "FDT_ERR_BADMAGIC", "FDT_ERR_BADVERSION", "FDT_ERR_BADSTRUCTURE", "FDT_ERR_BADLAYOUT",
    "FDT_ERR_INTERNAL", "FDT_ERR_BADNCELLS", "FDT_ERR_BADVALUE", "FDT_ERR_BADOVERLAY",
    "FDT_ERR_NOPHANDLES", "FDT_ERR_BADFLAGS", "FDT_ERR_ALIGNMENT",
)


# ---- faults and loads ----


cdef inline int fdt_fault_set(
    fdt_fault *fault, int code, uint64_t offset, const char *rule
) noexcept nogil:
    fault.code = code
    fault.offset = offset
    fault.rule = rule
    return -1


cdef int fdt_raise(const fdt_fault *fault) except -1:
    """Raise what a worker found: the one place where its codes become exceptions."""
    if fault.code == 0:
        raise MemoryError
    raise FdtError(_FDT_ERRORS[fault.code], fault.offset, fault.rule.decode())


cdef inline uint32_t fdt_ld32(const void *where) noexcept nogil:
    cdef uint32_t word
    memcpy(&word, where, 4)
    return be32toh(word)


cdef inline uint64_t fdt_ld64(const void *where) noexcept nogil:
    cdef uint64_t word
    memcpy(&word, where, 8)
    return be64toh(word)


cdef inline void fdt_st32(void *where, uint32_t value) noexcept nogil:
    cdef uint32_t word = htobe32(value)
    memcpy(where, &word, 4)


cdef inline uint64_t fdt_align(uint64_t nbytes) noexcept nogil:
    return (nbytes + 3) & ~<uint64_t>3


cdef inline void fdt_copy(
    unsigned char *to, const unsigned char *source, uint64_t length
) noexcept nogil:
    """memcpy that is inlined where most names and values are: up to 64 bytes.

    Each branch is one or two pairs of loads, the second counted from the end.
    """
    if length > 64:
        memcpy(to, source, length)
    elif length >= 32:
        memcpy(to, source, 32)
        memcpy(to + length - 32, source + length - 32, 32)
    elif length >= 16:
        memcpy(to, source, 16)
        memcpy(to + length - 16, source + length - 16, 16)
    elif length >= 8:
        memcpy(to, source, 8)
        memcpy(to + length - 8, source + length - 8, 8)
    elif length >= 4:
        memcpy(to, source, 4)
        memcpy(to + length - 4, source + length - 4, 4)
    elif length:
        to[0] = source[0]
        to[length >> 1] = source[length >> 1]
        to[length - 1] = source[length - 1]


# ---- names ----


cdef inline bytes fdt_encode(object name):
    """The name's bytes; what was no UTF-8 in a blob comes back unchanged."""
    if type(name) is str:
        if (<str>name).isascii():
            return (<str>name).encode("ascii")
        return (<str>name).encode("utf-8", "surrogateescape")
    if isinstance(name, str):
        return str.encode(name, "utf-8", "surrogateescape")
    if isinstance(name, bytes):
        return bytes(name)
    raise TypeError(f"a name must be str, not {type(name).__name__}")


cdef inline object fdt_text(object name, const unsigned char **text, uint64_t *length):
    """Point to the name's bytes, as ``fdt_encode()`` gives them; what is returned owns them."""
    cdef bytes raw
    if type(name) is str and PyUnicode_IS_COMPACT_ASCII(name):
        text[0] = <const unsigned char *>PyUnicode_DATA(name)
        length[0] = PyUnicode_GET_LENGTH(name)
        return name
    raw = fdt_encode(name)
    text[0] = <const unsigned char *>PyBytes_AS_STRING(raw)
    length[0] = PyBytes_GET_SIZE(raw)
    return raw


cdef inline str fdt_decode(const unsigned char *name, uint64_t length):
    return (<const char *>name)[:length].decode("utf-8", "surrogateescape")


cdef inline uint64_t fdt_name_length(const unsigned char *name, uint64_t room) noexcept nogil:
    """Bytes before the NUL; *room* if there is none in so many."""
    cdef uint64_t word, at = 0
    cdef const unsigned char *nul
    while at < 32 and room - at >= 8:   # most names end here, before a call pays
        memcpy(&word, name + at, 8)
        word = le64toh(word)
        word = (word - <uint64_t>0x0101010101010101ULL) & ~word & <uint64_t>0x8080808080808080ULL
        if word:
            return at + (ctz64(word) >> 3)
        at += 8
    nul = <const unsigned char *>memchr(name + at, 0, room - at)
    return nul - name if nul != NULL else room


# ---- header and tokens ----


cdef int fdt_blob_init(
    fdt_blob *blob, const unsigned char *base, uint64_t nbytes, fdt_fault *fault
) noexcept nogil:
    """Check the header of the *nbytes* at *base* and fill *blob*."""
    cdef uint64_t header, size_dt_struct, tail
    if nbytes < 4:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, 0, "no room for the magic number")
    if fdt_ld32(base) != FDT_MAGIC:
        return fdt_fault_set(fault, FDT_ERR_BADMAGIC, 0, "magic number is not 0xd00dfeed")
    if nbytes < FDT_V16_HEADER:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, 0, "no room for the header")
    blob.base = base
    blob.totalsize = fdt_ld32(base + 4)
    blob.off_dt_struct = fdt_ld32(base + 8)
    blob.off_dt_strings = fdt_ld32(base + 12)
    blob.off_mem_rsvmap = fdt_ld32(base + 16)
    blob.version = fdt_ld32(base + 20)
    blob.last_comp_version = fdt_ld32(base + 24)
    blob.boot_cpuid_phys = fdt_ld32(base + 28)
    blob.size_dt_strings = fdt_ld32(base + 32)

    if blob.version < 16 or blob.last_comp_version > 17:
        return fdt_fault_set(fault, FDT_ERR_BADVERSION, 20, "neither version 16 nor 17")
    if blob.version < blob.last_comp_version:
        return fdt_fault_set(fault, FDT_ERR_BADVERSION, 24, "last_comp_version above version")
    header = FDT_V16_HEADER if blob.version == 16 else FDT_V17_HEADER
    if blob.totalsize < header or blob.totalsize > FDT_MAX_BYTES:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, 4, "totalsize out of range")
    if blob.totalsize > nbytes:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, 4, "totalsize beyond the buffer")
    if blob.off_mem_rsvmap < header or blob.off_mem_rsvmap > blob.totalsize:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, 16, "reserve map outside the blob")
    if blob.off_dt_struct < header or blob.off_dt_struct > blob.totalsize:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, 8, "structure block outside the blob")
    if blob.off_dt_struct & 3:
        return fdt_fault_set(fault, FDT_ERR_ALIGNMENT, 8, "structure block not 4-byte aligned")
    tail = blob.totalsize - blob.off_dt_struct
    size_dt_struct = tail if blob.version == 16 else fdt_ld32(base + 36)
    if size_dt_struct > tail:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, 36, "structure block outside the blob")
    blob.end_dt_struct = blob.off_dt_struct + size_dt_struct
    if blob.off_dt_strings < header or blob.off_dt_strings > blob.totalsize:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, 12, "strings block outside the blob")
    if blob.size_dt_strings > blob.totalsize - blob.off_dt_strings:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, 32, "strings block outside the blob")
    return 0


cdef inline int fdt_next_tag(
    const fdt_blob *blob, uint64_t offset, fdt_token *token, fdt_fault *fault
) noexcept nogil:
    """Read the token at *offset*, any number at all."""
    cdef uint64_t end = blob.end_dt_struct, after
    token.next = offset
    token.data = token.length = token.nameoff = 0
    token.tag = FDT_END
    if offset < blob.off_dt_struct or offset > end or end - offset < 4:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, offset, "structure block ends here")
    token.tag = fdt_ld32(blob.base + offset)
    after = offset + 4
    if token.tag == FDT_PROP:
        if end - after < 8:
            return fdt_fault_set(fault, FDT_ERR_TRUNCATED, offset, "property header cut off")
        token.length = fdt_ld32(blob.base + after)
        token.nameoff = fdt_ld32(blob.base + after + 4)
        token.data = after + 8
        if fdt_align(token.length) > end - token.data:
            return fdt_fault_set(fault, FDT_ERR_TRUNCATED, offset, "property value cut off")
        token.next = token.data + fdt_align(token.length)
    elif token.tag == FDT_BEGIN_NODE:
        token.data = after
        token.length = fdt_name_length(blob.base + after, end - after)
        if token.length == end - after:
            return fdt_fault_set(fault, FDT_ERR_TRUNCATED, offset, "node name without NUL")
        token.next = after + fdt_align(token.length + 1)
        if token.next > end:
            return fdt_fault_set(fault, FDT_ERR_TRUNCATED, offset, "node name cut off")
    elif token.tag == FDT_END_NODE or token.tag == FDT_NOP or token.tag == FDT_END:
        token.next = after
    else:
        return fdt_fault_set(fault, FDT_ERR_BADSTRUCTURE, offset, "unknown token")
    return 0


cdef inline int fdt_begin_tag(
    const fdt_blob *blob, uint64_t offset, fdt_token *token, fdt_fault *fault
) noexcept nogil:
    """Read the token at *offset*, which must begin a node."""
    if fdt_next_tag(blob, offset, token, fault) < 0:
        return -1
    if token.tag != FDT_BEGIN_NODE:
        return fdt_fault_set(fault, FDT_ERR_BADOFFSET, offset, "no node begins here")
    return 0


cdef int64_t fdt_property_name(
    const fdt_blob *blob, uint64_t offset, uint64_t nameoff, fdt_fault *fault
) noexcept nogil:
    """Length of the name at *nameoff* that the property at *offset* has, or -1."""
    cdef uint64_t room
    cdef const unsigned char *name
    cdef const unsigned char *nul
    if nameoff >= blob.size_dt_strings:
        return fdt_fault_set(fault, FDT_ERR_BADOFFSET, offset, "name outside the strings block")
    room = blob.size_dt_strings - nameoff
    name = blob.base + blob.off_dt_strings + nameoff
    nul = <const unsigned char *>memchr(name, 0, min(room, <uint64_t>FDT_MAX_PROPERTY_NAME + 1))
    if nul != NULL:
        return nul - name
    if room <= FDT_MAX_PROPERTY_NAME:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, offset, "property name without NUL")
    # Names may share bytes, so without a limit a blob could stand for names of any total size.
    return fdt_fault_set(fault, FDT_ERR_BADVALUE, offset, "property name above 255 bytes")


cdef inline uint64_t fdt_skip_properties(const fdt_blob *blob, uint64_t offset) noexcept nogil:
    """Offset of the first token from *offset* on, a place within the block, that is no property."""
    cdef uint64_t length, end = blob.end_dt_struct
    while end - offset >= 12 and fdt_ld32(blob.base + offset) == FDT_PROP:
        length = fdt_align(fdt_ld32(blob.base + offset + 4))
        if length > end - offset - 12:
            break
        offset += 12 + length
    return offset


cdef int fdt_find_property(
    const fdt_blob *blob, uint64_t node, const unsigned char *name, uint64_t name_len,
    uint64_t *where, fdt_token *token, fdt_fault *fault
) noexcept nogil:
    """Find the node's first property of that name: 1, 0 if it has none, or -1."""
    cdef uint64_t offset
    cdef const unsigned char *strings = blob.base + blob.off_dt_strings
    if fdt_begin_tag(blob, node, token, fault) < 0:
        return -1
    while True:
        offset = token.next
        if fdt_next_tag(blob, offset, token, fault) < 0:
            return -1
        if token.tag == FDT_NOP:
            continue
        if token.tag != FDT_PROP:
            return 0
        if token.nameoff >= blob.size_dt_strings:
            return <int>fdt_property_name(blob, offset, token.nameoff, fault)
        if (
            name_len < blob.size_dt_strings - token.nameoff
            and strings[token.nameoff + name_len] == 0
            and memcmp(strings + token.nameoff, name, name_len) == 0
        ):
            where[0] = offset
            return 1


cdef inline bint fdt_name_matches(
    const unsigned char *node, uint64_t node_len, const unsigned char *name, uint64_t name_len
) noexcept nogil:
    """Whether a node is meant by *name*: equal, or equal up to an '@' that *name* has not."""
    if node_len < name_len or memcmp(node, name, name_len) != 0:
        return False
    if node_len == name_len:
        return True
    return node[name_len] == c"@" and memchr(name, c"@", name_len) == NULL


cdef int fdt_find_child(
    const fdt_blob *blob, uint64_t node, const unsigned char *name, uint64_t name_len,
    int64_t *budget, uint64_t *where, fdt_fault *fault
) noexcept nogil:
    """Find the node's first child that *name* means: 1, 0 if none, -1, or -2 out of *budget*.

    The budget counts nodes that were passed over, grandchildren included; NULL is no limit.
    """
    cdef fdt_token token
    cdef uint64_t offset, depth = 0
    if fdt_begin_tag(blob, node, &token, fault) < 0:
        return -1
    while True:
        offset = token.next
        if fdt_next_tag(blob, offset, &token, fault) < 0:
            return -1
        if token.tag == FDT_BEGIN_NODE:
            if depth == 0 and fdt_name_matches(
                blob.base + token.data, token.length, name, name_len
            ):
                where[0] = offset
                return 1
            depth += 1
            if budget != NULL:
                budget[0] -= 1
                if budget[0] < 0:
                    return -2
        elif token.tag == FDT_END_NODE:
            if depth == 0:
                return 0
            depth -= 1
        elif token.tag == FDT_END:
            return fdt_fault_set(
                fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END inside a node"
            )


cdef int fdt_find_root(const fdt_blob *blob, uint64_t *where, fdt_fault *fault) noexcept nogil:
    cdef fdt_token token
    cdef uint64_t offset = blob.off_dt_struct
    while True:
        if fdt_next_tag(blob, offset, &token, fault) < 0:
            return -1
        if token.tag == FDT_BEGIN_NODE:
            where[0] = offset
            return 0
        if token.tag != FDT_NOP:
            return fdt_fault_set(
                fault, FDT_ERR_BADSTRUCTURE, offset, "structure does not begin with a node"
            )
        offset = token.next


cdef int fdt_check_reserve_map(
    const fdt_blob *blob, uint64_t *nr_entries, fdt_fault *fault
) noexcept nogil:
    """Count the entries of the memory reserve map before the first of no bytes, which ends it."""
    cdef uint64_t offset = blob.off_mem_rsvmap
    nr_entries[0] = 0
    while True:
        if blob.totalsize - offset < 16:
            return fdt_fault_set(fault, FDT_ERR_TRUNCATED, offset, "reserve map without an end")
        if fdt_ld64(blob.base + offset + 8) == 0:  # whatever its address, as for libfdt and Linux
            return 0
        nr_entries[0] += 1
        offset += 16


# ---- properties met before ----
#
# Nodes side by side are mostly alike. So what the property at one place of a node was is kept, and
# where the next node has the same twelve bytes (token, length, name) at that place, they need no
# parsing: the way through the blob is predicted by the processor instead of computed from what
# was just loaded.

cdef enum:
    FDT_SEEN = 32               # places of a node


ctypedef struct fdt_seen:
    unsigned char header[12]
    uint64_t length             # of the value
    uint64_t nbytes             # of the token; 0 in an entry that is not in use
    int64_t number              # read_nodes, first pass: of the kind; second: of the column, or -1


cdef inline bint fdt_seen_before(
    const fdt_seen *seen, const unsigned char *at, uint64_t room
) noexcept nogil:
    return seen.nbytes - 1 < room and memcmp(at, seen.header, 12) == 0


cdef int64_t fdt_see(
    const fdt_blob *blob, uint64_t offset, fdt_seen *seen, fdt_fault *fault
) noexcept nogil:
    """Let *seen* be the property at *offset*, a place within the block: its name offset, or -1."""
    cdef uint64_t nameoff, room = blob.end_dt_struct - offset
    seen.nbytes = 0
    if room < 12:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, offset, "property header cut off")
    memcpy(seen.header, blob.base + offset, 12)
    seen.length = fdt_ld32(seen.header + 4)
    nameoff = fdt_ld32(seen.header + 8)
    if fdt_align(seen.length) > room - 12:
        return fdt_fault_set(fault, FDT_ERR_TRUNCATED, offset, "property value cut off")
    if nameoff >= blob.size_dt_strings:
        return fdt_fault_set(fault, FDT_ERR_BADOFFSET, offset, "name outside the strings block")
    seen.nbytes = 12 + fdt_align(seen.length)
    return nameoff


cdef int fdt_check_structure(
    const fdt_blob *blob, uint64_t *nr_nodes, uint64_t *size_dt_struct, fdt_fault *fault
) noexcept nogil:
    """Check every token: one root without a name, balanced, properties first, names in place."""
    cdef fdt_token token
    cdef fdt_seen seen[FDT_SEEN]
    cdef fdt_seen *at
    cdef int64_t nameoff
    cdef uint64_t offset = blob.off_dt_struct, end = blob.end_dt_struct
    cdef uint64_t depth = 0, nodes = 0, place = 0
    cdef bint properties = False        # whether a property may stand here
    memset(seen, 0, sizeof(seen))
    while True:
        if properties and end - offset >= 4 and fdt_ld32(blob.base + offset) == FDT_PROP:
            at = &seen[place % FDT_SEEN]
            place += 1
            if not fdt_seen_before(at, blob.base + offset, end - offset):
                nameoff = fdt_see(blob, offset, at, fault)
                if nameoff < 0 or fdt_property_name(blob, offset, nameoff, fault) < 0:
                    return -1
            offset += at.nbytes
            continue
        if fdt_next_tag(blob, offset, &token, fault) < 0:
            return -1
        if token.tag == FDT_PROP:
            if depth == 0:
                return fdt_fault_set(
                    fault, FDT_ERR_BADSTRUCTURE, offset, "property outside of a node"
                )
            return fdt_fault_set(
                fault, FDT_ERR_BADSTRUCTURE, offset, "property after a child node"
            )
        elif token.tag == FDT_BEGIN_NODE:
            if depth == 0:
                if nodes:
                    return fdt_fault_set(
                        fault, FDT_ERR_BADLAYOUT, offset, "more than one root node"
                    )
                if token.length:
                    return fdt_fault_set(
                        fault, FDT_ERR_BADLAYOUT, offset, "the root node has a name"
                    )
            depth += 1
            nodes += 1
            place = 0
            properties = True
        elif token.tag == FDT_END_NODE:
            if depth == 0:
                return fdt_fault_set(
                    fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END_NODE without a node"
                )
            depth -= 1
            properties = False
        elif token.tag == FDT_END:
            if depth:
                return fdt_fault_set(
                    fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END inside a node"
                )
            if nodes == 0:
                return fdt_fault_set(fault, FDT_ERR_BADSTRUCTURE, offset, "no root node")
            nr_nodes[0] = nodes
            size_dt_struct[0] = token.next - blob.off_dt_struct
            return 0
        offset = token.next


# ---- index of all nodes ----
#
# Built when look-ups have passed over FDT_SCAN_BUDGET nodes. Nodes are numbered in file order, so
# their offsets ascend and a binary search finds a node's number. The hash table maps (number of
# the parent, name) to the first such child; a name with a unit address stands in it a second time
# without the address, which is libfdt's shortcut. A slot holds all that a look-up needs, so that
# one misses the cache twice: for the slot, and for the name in the blob. SipHash-1-3 with a random
# key, since the names are the enemy's: chosen collisions would make the build quadratic.

cdef enum:
    FDT_SCAN_BUDGET = 256       # nodes
    FDT_AHEAD = 16              # slots that are fetched before they are needed


ctypedef struct fdt_index_node:
    uint32_t offset
    uint32_t parent             # number; the root is its own


ctypedef struct fdt_index_slot:
    uint32_t hash               # the half that does not choose the slot
    uint32_t parent
    uint32_t offset             # of the node; 0: the slot is free
    uint32_t number


ctypedef struct fdt_index:
    uint64_t nr_nodes
    fdt_index_node *nodes
    fdt_index_slot *slots
    uint64_t nr_slots           # power of two, above twice the number of keys
    uint64_t key[2]


cdef inline uint64_t fdt_rotl(uint64_t x, int bits) noexcept nogil:
    return (x << bits) | (x >> (64 - bits))


cdef inline void fdt_sipround(uint64_t *v) noexcept nogil:
    v[0] += v[1]
    v[1] = fdt_rotl(v[1], 13) ^ v[0]
    v[0] = fdt_rotl(v[0], 32)
    v[2] += v[3]
    v[3] = fdt_rotl(v[3], 16) ^ v[2]
    v[0] += v[3]
    v[3] = fdt_rotl(v[3], 21) ^ v[0]
    v[2] += v[1]
    v[1] = fdt_rotl(v[1], 17) ^ v[2]
    v[2] = fdt_rotl(v[2], 32)


cdef uint64_t fdt_name_hash(
    const uint64_t *key, uint64_t parent, const unsigned char *name, uint64_t length
) noexcept nogil:
    cdef uint64_t v[4]
    cdef uint64_t word, left = length
    v[0] = key[0] ^ <uint64_t>0x736F6D6570736575ULL
    v[1] = key[1] ^ <uint64_t>0x646F72616E646F6DULL
    v[2] = key[0] ^ <uint64_t>0x6C7967656E657261ULL
    v[3] = key[1] ^ <uint64_t>0x7465646279746573ULL
    v[3] ^= parent
    fdt_sipround(v)
    v[0] ^= parent
    while left >= 8:
        memcpy(&word, name, 8)
        v[3] ^= word
        fdt_sipround(v)
        v[0] ^= word
        name += 8
        left -= 8
    word = 0
    memcpy(&word, name, left)
    word ^= length << 56
    v[3] ^= word
    fdt_sipround(v)
    v[0] ^= word
    v[2] ^= 0xFF
    fdt_sipround(v)
    fdt_sipround(v)
    fdt_sipround(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


cdef fdt_index_slot *fdt_index_find(
    const fdt_blob *blob, const fdt_index *index, uint64_t hashed, uint64_t parent,
    const unsigned char *name, uint64_t length, fdt_fault *fault
) noexcept nogil:
    """Slot of the child *name* of node number *parent*, or the free one where it belongs."""
    cdef fdt_token token
    cdef fdt_index_slot *slot
    cdef uint64_t at = hashed, probes
    for probes in range(index.nr_slots):
        slot = &index.slots[at & (index.nr_slots - 1)]
        if slot.offset == 0:
            return slot
        if slot.hash == <uint32_t>(hashed >> 32) and slot.parent == parent:
            if fdt_begin_tag(blob, slot.offset, &token, fault) < 0:
                return NULL
            if fdt_name_matches(blob.base + token.data, token.length, name, length):
                return slot
        at += 1
    fdt_fault_set(fault, FDT_ERR_BADSTRUCTURE, 0, "blob changed while it was read")
    return NULL


cdef int fdt_index_number_nodes(
    const fdt_blob *blob, uint64_t root, fdt_index *index, fdt_fault *fault
) noexcept nogil:
    """First pass of building: offsets and parents of all nodes, and how many slots it takes."""
    cdef fdt_token token
    cdef fdt_index_node *grown
    cdef uint64_t offset = root, depth = 0, parent = 0, cap = 0, keys = 0
    while True:
        offset = fdt_skip_properties(blob, offset)
        if fdt_next_tag(blob, offset, &token, fault) < 0:
            return -1
        if token.tag == FDT_BEGIN_NODE:
            if index.nr_nodes == cap:
                cap = 2 * cap + 64
                grown = <fdt_index_node *>realloc(index.nodes, cap * sizeof(fdt_index_node))
                if grown == NULL:
                    return -1
                index.nodes = grown
            index.nodes[index.nr_nodes].offset = <uint32_t>offset
            index.nodes[index.nr_nodes].parent = <uint32_t>parent
            parent = index.nr_nodes
            index.nr_nodes += 1
            keys += 1 + (memchr(blob.base + token.data, c"@", token.length) != NULL)
            depth += 1
        elif token.tag == FDT_END_NODE:
            parent = index.nodes[parent].parent
            depth -= 1
            if depth == 0:
                break
        elif token.tag == FDT_END:
            return fdt_fault_set(fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END inside a node")
        offset = token.next
    index.nr_slots = 2
    while index.nr_slots <= 2 * keys:
        index.nr_slots *= 2
    return 0


cdef int fdt_index_add(
    const fdt_blob *blob, fdt_index *index, uint64_t number, uint64_t hashed,
    const unsigned char *name, uint64_t length, fdt_fault *fault
) noexcept nogil:
    """Let node *number* have that key, unless one before it has."""
    cdef fdt_index_slot *slot = fdt_index_find(
        blob, index, hashed, index.nodes[number].parent, name, length, fault
    )
    if slot == NULL:
        return -1
    if slot.offset == 0:
        slot.hash = <uint32_t>(hashed >> 32)
        slot.parent = index.nodes[number].parent
        slot.offset = index.nodes[number].offset
        slot.number = <uint32_t>number
    return 0


cdef int fdt_index_fill(
    const fdt_blob *blob, fdt_index *index, fdt_fault *fault
) noexcept nogil:
    """Second pass of building: enter all nodes but the root into the free slots."""
    cdef fdt_token ahead[FDT_AHEAD]
    cdef uint64_t hashes[FDT_AHEAD]
    cdef fdt_token *token
    cdef uint64_t number, parent, length
    cdef const unsigned char *name
    cdef const unsigned char *at
    for number in range(1, index.nr_nodes + FDT_AHEAD):
        token = &ahead[number % FDT_AHEAD]
        if number > FDT_AHEAD:
            name = blob.base + token.data
            length = token.length
            if fdt_index_add(
                blob, index, number - FDT_AHEAD, hashes[number % FDT_AHEAD], name, length, fault
            ) < 0:
                return -1
            at = <const unsigned char *>memchr(name, c"@", length)
            if at != NULL:
                parent = index.nodes[number - FDT_AHEAD].parent
                length = at - name
                if fdt_index_add(
                    blob, index, number - FDT_AHEAD,
                    fdt_name_hash(index.key, parent, name, length), name, length, fault,
                ) < 0:
                    return -1
        if number < index.nr_nodes:
            if fdt_begin_tag(blob, index.nodes[number].offset, token, fault) < 0:
                return -1
            hashes[number % FDT_AHEAD] = fdt_name_hash(
                index.key, index.nodes[number].parent, blob.base + token.data, token.length
            )
            fdt_prefetch(
                &index.slots[hashes[number % FDT_AHEAD] & (index.nr_slots - 1)]
            )
    return 0


cdef int64_t fdt_index_number(const fdt_index *index, uint64_t offset) noexcept nogil:
    """Number of the node at *offset*, or -1."""
    cdef uint64_t low = 0, high = index.nr_nodes, middle
    while low < high:
        middle = (low + high) >> 1
        if index.nodes[middle].offset < offset:
            low = middle + 1
        else:
            high = middle
    if low < index.nr_nodes and index.nodes[low].offset == offset:
        return low
    return -1


# ---- columns ----


@cython.final
@cython.auto_pickle(False)
cdef class Column:
    """One value per node, ragged: what a property is over many nodes.

    Attributes:
        data: the bytes of all rows, one after the other; uint8, shape (m,).
        offsets: where each row begins in *data*, and at last where the last ends; uint64,
            shape (n + 1,), never descending.
        present: whether the node has the property at all; bool, shape (n,).

    Args:
        data: any buffer of bytes.
        offsets: n + 1 integers.
        present: n booleans, or None if all are.

    Raises:
        ValueError: the shapes do not agree, or *offsets* descends or points outside *data*.

    Context:
        Arrays of the right type are taken over without a copy; whoever changes them afterwards
        keeps the rules (they are checked again when the column is written).
    """

    cdef object _data_array
    cdef object _offsets_array
    cdef object _present_array
    cdef const uint8_t[::1] _data
    cdef const uint64_t[::1] _offsets
    cdef const uint8_t[::1] _present

    def __cinit__(self, data, offsets, present=None):
        cdef Py_ssize_t row, rows
        cdef uint64_t wrong = 0
        if isinstance(data, np.ndarray):
            data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        else:
            data = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
        offsets = np.ascontiguousarray(offsets)
        if offsets.ndim != 1 or offsets.shape[0] == 0 or offsets.dtype.kind not in "iu":
            raise ValueError("offsets: n + 1 integers are needed")
        if offsets.dtype.kind == "i" and offsets.shape[0] and offsets.min() < 0:
            raise ValueError("offsets: negative")
        offsets = offsets.astype(np.uint64, copy=False)
        rows = offsets.shape[0] - 1
        if present is None:
            present = np.ones(rows, np.bool_)
        else:
            present = np.ascontiguousarray(present, np.bool_)
        if present.shape != (rows,):
            raise ValueError(f"present: shape {present.shape}, not ({rows},)")
        self._data_array, self._offsets_array, self._present_array = data, offsets, present
        self._data, self._offsets = data, offsets
        self._present = present.view(np.uint8)
        for row in range(rows):         # a descent, and nothing else, sets the top bit
            wrong |= self._offsets[row] | (self._offsets[row + 1] - self._offsets[row])
        if wrong >> 63:
            raise ValueError("offsets: a row ends before it begins")
        if self._offsets[rows] > <uint64_t>self._data.shape[0]:
            raise ValueError(f"offsets: {self._offsets[rows]} is outside the data")

    @property
    def data(self) -> object:
        """Bytes of all rows; uint8, shape (m,)."""
        return self._data_array

    @property
    def offsets(self) -> object:
        """Where each row begins, and the last ends; uint64, shape (n + 1,)."""
        return self._offsets_array

    @property
    def present(self) -> object:
        """Whether each row is there; bool, shape (n,)."""
        return self._present_array

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._offsets.shape[0] - 1

    def fixed(self) -> object:
        """Return the rows as one array, without a copy.

        Returns:
            uint8, shape (n, k), if each of the n rows is there and has k bytes.

        Raises:
            ValueError: a row is missing, or rows differ in size.
        """
        cdef Py_ssize_t row, rows = self._offsets.shape[0] - 1
        cdef uint64_t width
        if rows == 0:
            return np.empty((0, 0), np.uint8)
        width = self._offsets[1] - self._offsets[0]
        for row in range(rows):
            if not self._present[row]:
                raise ValueError(f"row {row} is not present")
            if self._offsets[row + 1] - self._offsets[row] != width:
                raise ValueError(f"row {row} has not {width} bytes, as row 0 has")
        return self._data_array[self._offsets[0]:self._offsets[rows]].reshape(rows, width)

    def strings(self) -> list:
        """Return the rows as text, each without the NUL at its end.

        Returns:
            list of n str; a row that is not present is "". Bytes that are no UTF-8 become
            surrogates, as in names of files.
        """
        cdef Py_ssize_t row, rows = self._offsets.shape[0] - 1
        cdef uint64_t start, stop
        cdef list result = []
        for row in range(rows):
            start, stop = self._offsets[row], self._offsets[row + 1]
            if stop > <uint64_t>self._data.shape[0] or start > stop:
                raise ValueError(f"offsets: row {row} is outside the data")
            if stop > start and self._data[stop - 1] == 0:
                stop -= 1
            result.append(fdt_decode(&self._data[start], stop - start) if stop > start else "")
        return result

    def __repr__(self) -> str:
        return f"<Column of {len(self)} rows, {self._data_array.nbytes} bytes>"


# ---- many nodes at once ----


# A kind of property: all that have one name offset.
ctypedef struct fdt_kind:
    uint64_t nameoff
    uint64_t nbytes             # over all rows
    int64_t column              # or -1


ctypedef struct fdt_column:
    uint64_t *offsets
    uint8_t *present
    unsigned char *data
    uint64_t cap
    uint64_t pos
    uint64_t rows               # up to the last one that has it


ctypedef struct fdt_scan:
    uint64_t nr_rows
    uint64_t name_bytes
    int32_t *kind_of            # by name offset: 0 unseen, else number of the kind + 1
    fdt_kind *kinds
    uint64_t nr_kinds
    uint64_t cap_kinds
    fdt_column *columns         # NULL in the first pass; the names' is number 0
    uint64_t nr_columns


cdef int fdt_scan_kind(
    const fdt_blob *blob, uint64_t offset, fdt_scan *scan, uint64_t nameoff, fdt_fault *fault
) noexcept nogil:
    """Give a name offset a number in the first pass."""
    cdef uint64_t cap = 2 * scan.cap_kinds + 16
    cdef fdt_kind *grown
    if fdt_property_name(blob, offset, nameoff, fault) < 0:
        return -1
    if scan.nr_kinds == scan.cap_kinds:
        grown = <fdt_kind *>realloc(scan.kinds, cap * sizeof(fdt_kind))
        if grown == NULL:
            return -1
        scan.kinds, scan.cap_kinds = grown, cap
    scan.kinds[scan.nr_kinds].nameoff = nameoff
    scan.kinds[scan.nr_kinds].nbytes = 0
    scan.nr_kinds += 1
    scan.kind_of[nameoff] = <int32_t>scan.nr_kinds
    return 0


cdef int fdt_scan_property(
    const fdt_blob *blob, uint64_t offset, fdt_scan *scan, fdt_seen *seen, fdt_fault *fault
) noexcept nogil:
    """Let *seen* be the property at *offset*."""
    cdef int64_t nameoff = fdt_see(blob, offset, seen, fault)
    cdef int32_t kind
    if nameoff < 0:
        return -1
    if scan.kind_of[nameoff] == 0 and scan.columns == NULL:
        if fdt_scan_kind(blob, offset, scan, nameoff, fault) < 0:
            seen.nbytes = 0
            return -1
    kind = scan.kind_of[nameoff] - 1
    seen.number = kind if scan.columns == NULL or kind < 0 else scan.kinds[kind].column
    return 0


cdef inline int fdt_put_row(
    fdt_column *column, uint64_t row, const unsigned char *data, uint64_t length
) noexcept nogil:
    """Put the value of *row*, or of no property if *data* is NULL; -1 if there is no room."""
    if column.rows > row:
        return 0                        # of two properties with one name the first counts
    while column.rows < row:            # rows that have none
        column.rows += 1
        column.offsets[column.rows] = column.pos
    if data == NULL:
        return 0
    if length > column.cap - column.pos:
        return -1
    fdt_copy(column.data + column.pos, data, length)
    column.present[row] = 1
    column.pos += length
    column.rows += 1
    column.offsets[column.rows] = column.pos
    return 0


cdef object fdt_array(object old, Py_ssize_t length, object dtype):
    """An array of that length and type: the first part of *old* if it may be, or a new one."""
    if (
        isinstance(old, np.ndarray) and old.dtype == dtype and old.ndim == 1
        and len(old) >= length and old.flags.c_contiguous and old.flags.writeable
    ):
        return old[:length]
    return np.empty(length, dtype)


cdef tuple fdt_arrays(object old, Py_ssize_t nbytes, Py_ssize_t rows):
    """Data, offsets and presence of a column that read_nodes fills; each has an address."""
    if not isinstance(old, Column):
        old = Column(b"", [0])
    data = fdt_array(old.data, max(nbytes, 1), np.uint8)
    offsets = fdt_array(old.offsets, rows + 1, np.uint64)
    present = fdt_array(old.present, max(rows, 1), np.bool_).view(np.uint8)
    offsets[0] = 0
    present.fill(0)
    return data, offsets, present


cdef int fdt_scan_children(
    const fdt_blob *blob, uint64_t node, fdt_scan *scan, fdt_fault *fault
) noexcept nogil:
    """A pass of read_nodes: the first counts rows and bytes, the second fills the columns.

    What the first pass counted is a bound here, not a promise: somebody may write to the blob.
    """
    cdef const unsigned char *base = blob.base
    cdef fdt_column *columns = scan.columns
    cdef fdt_token token
    cdef fdt_seen seen[FDT_SEEN]
    cdef fdt_seen *at
    cdef uint64_t end = blob.end_dt_struct, offset, depth = 0, place = 0, row = 0, i
    cdef uint64_t length = 0, name_length = <uint64_t>-1, name_bytes = 0
    cdef uint32_t tag
    memset(seen, 0, sizeof(seen))
    if fdt_begin_tag(blob, node, &token, fault) < 0:
        return -1
    offset = token.next
    while True:
        tag = fdt_ld32(base + offset) if end - offset >= 4 else <uint32_t>FDT_END
        if tag == FDT_PROP and depth == 1:
            at = &seen[place % FDT_SEEN]
            place += 1
            if not fdt_seen_before(at, base + offset, end - offset):
                if fdt_scan_property(blob, offset, scan, at, fault) < 0:
                    return -1
            if columns == NULL:
                scan.kinds[at.number].nbytes += at.length
            elif at.number >= 0:
                if fdt_put_row(
                    &columns[at.number], row - 1, base + offset + 12, at.length
                ) < 0:
                    break
            offset += at.nbytes
        elif tag == FDT_BEGIN_NODE and depth == 0:
            length = fdt_name_length(base + offset + 4, end - offset - 4)
            if length != name_length:   # predicted likewise
                name_length = length
                name_bytes = 4 + fdt_align(length + 1)
            if length == end - offset - 4 or name_bytes > end - offset:
                if fdt_next_tag(blob, offset, &token, fault) < 0:
                    return -1
                break
            if columns == NULL:
                scan.name_bytes += length
                scan.nr_rows += 1
            elif row >= scan.nr_rows or fdt_put_row(
                &columns[0], row, base + offset + 4, length
            ) < 0:
                break
            row += 1
            depth = 1
            place = 0
            offset += name_bytes
        elif tag == FDT_END_NODE:
            offset += 4
            if depth == 0:
                if row != scan.nr_rows:
                    break
                for i in range(scan.nr_columns):
                    fdt_put_row(&columns[i], row, NULL, 0)
                return 0
            depth -= 1
        else:
            if fdt_next_tag(blob, offset, &token, fault) < 0:
                return -1
            if token.tag == FDT_END:
                return fdt_fault_set(
                    fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END inside a node"
                )
            if token.tag == FDT_BEGIN_NODE:
                if depth == 0:
                    break
                depth += 1
            offset = token.next
    return fdt_fault_set(fault, FDT_ERR_BADSTRUCTURE, offset, "blob changed while it was read")


# ---- the tree ----


# A node: where it begins, and its number in the index, or -1 if nobody asked.
ctypedef struct fdt_place:
    uint64_t offset
    int64_t number


@cython.final
@cython.auto_pickle(False)
@cython.no_gc  # it holds an export: the collector would clear the memoryview under it
cdef class Fdt:
    """A flattened device tree, read where it lies.

    Attributes:
        totalsize: bytes of the tree, as its header says; the buffer may be longer.
        root: its root node.

    Args:
        buffer: bytes, or a view of memory; held as long as this object lives.
        check: validate header, reserve map and the whole structure at once, in one pass without
            the GIL. Without it the header alone is validated, and what is wrong further in is
            found, by the same exception, when it is met.

    Raises:
        FdtError: ``code`` is libfdt's name of the error, ``offset`` the byte where it is.

    Context:
        Objects of this class do not change and may be shared by threads. Whoever changes the
        structure of the bytes underneath makes a new one; changing values is fine.

    Source:
        DT spec v0.4, chapter 5; libfdt's ``fdt_check_full()``. Stricter than that: properties
        come before children, blocks are aligned, a property's name has at most 255 bytes.

    Example:
        >>> from luo.fdt import Fdt, FdtWriter
        >>> writer = FdtWriter()
        >>> with writer.node(""):
        ...     writer.add_node("memfd", {"compatible": b"memfd-v1"})
        >>> bytes(Fdt(writer.finish()).node("/memfd")["compatible"])
        b'memfd-v1'
    """

    cdef Py_buffer _buffer
    cdef bint _held
    cdef fdt_blob _blob
    cdef uint64_t _root
    cdef object _view           # read-only
    cdef fdt_index _index
    cdef object _slots          # owner of the index's
    cdef int64_t _budget        # nodes that look-ups may still pass over before there is an index

    def __cinit__(self, buffer, *, check=True):
        cdef fdt_fault fault
        cdef uint64_t nr, size_dt_struct
        cdef bint full = check
        cdef int rc
        memset(&fault, 0, sizeof(fault))
        PyObject_GetBuffer(buffer, &self._buffer, PyBUF_SIMPLE)
        self._held = True
        self._budget = FDT_SCAN_BUDGET
        with nogil:
            rc = fdt_blob_init(
                &self._blob, <const unsigned char *>self._buffer.buf, self._buffer.len, &fault
            )
            if rc == 0 and self._blob.version == 16:  # libfdt trusts the size of version 17 only
                self._blob.size_dt_strings = self._blob.totalsize - self._blob.off_dt_strings
            if rc == 0 and full:
                rc = fdt_check_reserve_map(&self._blob, &nr, &fault)
                if rc == 0:
                    rc = fdt_check_structure(&self._blob, &nr, &size_dt_struct, &fault)
            if rc == 0:
                rc = fdt_find_root(&self._blob, &self._root, &fault)
        if rc < 0:
            fdt_raise(&fault)
        self._view = memoryview(buffer).cast("B").toreadonly()

    def __dealloc__(self):
        free(self._index.nodes)
        if self._held:
            PyBuffer_Release(&self._buffer)

    @property
    def totalsize(self) -> int:
        """Bytes of the tree, as its header says."""
        return self._blob.totalsize

    @property
    def version(self) -> int:
        """Version of the format, 17 or, without ``size_dt_struct``, 16."""
        return self._blob.version

    @property
    def reserve_map(self) -> list:
        """Entries of the memory reserve map: (address, bytes)."""
        cdef fdt_fault fault
        cdef uint64_t nr, i
        cdef const unsigned char *entries = self._blob.base + self._blob.off_mem_rsvmap
        if fdt_check_reserve_map(&self._blob, &nr, &fault) < 0:
            fdt_raise(&fault)
        return [(fdt_ld64(entries + 16 * i), fdt_ld64(entries + 16 * i + 8)) for i in range(nr)]

    @property
    def root(self) -> Node:
        """The root node."""
        return fdt_node(self, self._root)

    def node(self, path) -> Node:
        """Return the node at *path*, as ``fdt_path_offset()`` does.

        Args:
            path: begins with "/". A name without "@" also means the first child with that name
                and a unit address: "/memory" finds "memory@0".

        Raises:
            FdtError: FDT_ERR_BADPATH if *path* begins otherwise, FDT_ERR_NOTFOUND.
        """
        cdef int64_t offset = self._path_offset(path)
        if offset < 0:
            raise FdtError("FDT_ERR_NOTFOUND", None, f"no node {path}")
        return fdt_node(self, offset)

    def __contains__(self, path) -> bool:
        """Tell whether there is a node at *path*."""
        return self._path_offset(path) >= 0

    def read_nodes(self, path, properties=None, out=None) -> dict:
        """Read all children of a node at once.

        Args:
            path: of the node whose children are the rows.
            properties: names of those that are wanted; None: all that any child has.
            out: columns of an earlier call, by name. Their arrays are written over where they are
                large enough, so that no memory is touched for the first time.

        Returns:
            dict from the property's name to its Column, one row per child in file order, and
            under "name" the children's names (which hide a property called "name"). A name that
            was asked for and that no child has is a column with no row present.

        Raises:
            FdtError: as ``node()``; FDT_ERR_NOSPACE if *properties* is None and the columns would
                take more than 64 times the blob, since most of their rows are empty.

        Context:
            Copies the values, in two passes without the GIL.
        """
        cdef fdt_fault fault
        cdef fdt_scan scan
        cdef fdt_kind *kind
        cdef uint64_t node, i
        cdef int64_t found = self._path_offset(path)
        cdef uint64_t[::1] offsets
        cdef uint8_t[::1] present, data
        cdef const unsigned char *strings = self._blob.base + self._blob.off_dt_strings
        cdef dict numbers = {"name": 0}
        cdef list nbytes, arrays = []
        cdef str name
        cdef int rc
        if found < 0:
            raise FdtError("FDT_ERR_NOTFOUND", None, f"no node {path}")
        node = found
        if properties is not None:
            if isinstance(properties, (str, bytes)):
                raise TypeError("properties: a sequence of names is needed")
            for name in properties:
                numbers.setdefault(name, len(numbers))
        nbytes = [0] * len(numbers)
        memset(&fault, 0, sizeof(fault))
        memset(&scan, 0, sizeof(scan))
        try:
            # A table by name offset instead of a hash: no name can be slow. Its pages are only
            # touched where the names are.
            scan.kind_of = <int32_t *>calloc(self._blob.size_dt_strings + 1, sizeof(int32_t))
            if scan.kind_of == NULL:
                raise MemoryError
            with nogil:
                rc = fdt_scan_children(&self._blob, node, &scan, &fault)
            if rc < 0:
                fdt_raise(&fault)

            for i in range(scan.nr_kinds):
                kind = &scan.kinds[i]
                found = fdt_property_name(&self._blob, node, kind.nameoff, &fault)
                if found < 0:
                    fdt_raise(&fault)
                name = fdt_decode(strings + kind.nameoff, found)
                kind.column = -1
                if name == "name" or (properties is not None and name not in numbers):
                    continue
                if name not in numbers:
                    numbers[name] = len(numbers)
                    nbytes.append(0)
                kind.column = numbers[name]
                nbytes[numbers[name]] += kind.nbytes
            nbytes[0] = scan.name_bytes
            if properties is None and <uint64_t>len(numbers) > (
                max(64 * self._blob.totalsize, <uint64_t>1 << 24) // (9 * (scan.nr_rows + 1))
            ):
                raise FdtError(
                    "FDT_ERR_NOSPACE", node,
                    f"{len(numbers)} columns of {scan.nr_rows} rows: name the wanted properties",
                )

            scan.nr_columns = len(numbers)
            scan.columns = <fdt_column *>xmalloc(scan.nr_columns * sizeof(fdt_column))
            for name, i in numbers.items():
                old = None if out is None else out.get(name)
                arrays.append(fdt_arrays(old, nbytes[i], scan.nr_rows))
                data, offsets, present = arrays[i]
                scan.columns[i].data = &data[0]
                scan.columns[i].offsets = &offsets[0]
                scan.columns[i].present = &present[0]
                scan.columns[i].cap = nbytes[i]
                scan.columns[i].pos = 0
                scan.columns[i].rows = 0
            with nogil:
                rc = fdt_scan_children(&self._blob, node, &scan, &fault)
            if rc < 0:
                fdt_raise(&fault)
            return {
                name: Column(
                    arrays[i][0][:scan.columns[i].pos], arrays[i][1],
                    arrays[i][2][:scan.nr_rows].view(np.bool_),
                )
                for name, i in numbers.items()
            }
        finally:
            free(scan.kind_of)
            free(scan.kinds)
            free(scan.columns)

    def walk(self):
        """Walk over all nodes in file order.

        Yields:
            (depth, node), the root first with depth 0.

        Raises:
            FdtError: the structure is wrong (met only with ``check=False``).
        """
        cdef fdt_fault fault
        cdef fdt_token token
        cdef uint64_t offset = self._root, depth = 0
        while True:
            if fdt_next_tag(&self._blob, offset, &token, &fault) < 0:
                fdt_raise(&fault)
            if token.tag == FDT_BEGIN_NODE:
                yield depth, fdt_node(self, offset)
                depth += 1
            elif token.tag == FDT_END_NODE:
                depth -= 1
                if depth == 0:
                    return
            elif token.tag == FDT_END:
                fdt_fault_set(&fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END inside a node")
                fdt_raise(&fault)
            offset = token.next

    def to_dts(self) -> str:
        """Return the tree as device tree source, as ``dtc -O dts`` guesses it.

        Returns:
            text; a value is shown as strings, 32-bit big-endian cells or bytes, whichever fits
            first. KHO's native integers thus appear as cells with their bytes swapped.

        Raises:
            FdtError: the structure is wrong (met only with ``check=False``).
        """
        cdef fdt_fault fault
        cdef fdt_token token
        cdef uint64_t offset = self._root, depth = 0
        cdef int64_t length
        cdef const unsigned char *strings = self._blob.base + self._blob.off_dt_strings
        cdef list lines = ["/dts-v1/;", ""]
        cdef bint blank = False
        cdef str name
        for address, nbytes in self.reserve_map:
            lines.append(f"/memreserve/\t{address:#018x} {nbytes:#018x};")
        while True:
            if fdt_next_tag(&self._blob, offset, &token, &fault) < 0:
                fdt_raise(&fault)
            # Indentation stops growing somewhere, or depth would make the text quadratic.
            indent = "\t" * <int>min(depth, <uint64_t>64)
            if token.tag == FDT_BEGIN_NODE:
                name = fdt_decode(self._blob.base + token.data, token.length)
                if blank:
                    lines.append("")
                lines.append(f"{indent}{name if depth else '/'} {{")
                depth += 1
                blank = False
            elif token.tag == FDT_END_NODE:
                depth -= 1
                indent = "\t" * <int>min(depth, <uint64_t>64)
                lines.append(f"{indent}}};")
                blank = True
                if depth == 0:
                    break
            elif token.tag == FDT_PROP:
                length = fdt_property_name(&self._blob, offset, token.nameoff, &fault)
                if length < 0:
                    fdt_raise(&fault)
                name = fdt_decode(strings + token.nameoff, length)
                value = _dts_value(self._view[token.data:token.data + token.length])
                lines.append(f"{indent}{name}{value};")
                blank = True
            elif token.tag == FDT_END:
                fdt_fault_set(&fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END inside a node")
                fdt_raise(&fault)
            offset = token.next
        lines.append("")
        return "\n".join(lines)

    def set_property_inplace(self, path, name, value) -> None:
        """Overwrite a property's value by one of the same length, as ``fdt_setprop_inplace()``.

        Args:
            path: of the node.
            name: of the property.
            value: any buffer.

        Raises:
            TypeError: the buffer is read-only.
            FdtError: FDT_ERR_NOTFOUND: no such node or property; FDT_ERR_NOSPACE: the
                length differs.
        """
        cdef fdt_fault fault
        cdef fdt_token token
        cdef uint64_t where
        cdef bytes key = fdt_encode(name)
        cdef bytes raw
        cdef int64_t node
        cdef int rc
        if self._buffer.readonly:
            raise TypeError("the tree lies in a read-only buffer")
        raw = fdt_value(value)
        node = self._path_offset(path)
        if node < 0:
            raise FdtError("FDT_ERR_NOTFOUND", None, f"no node {path}")
        rc = fdt_find_property(
            &self._blob, node, <const unsigned char *>PyBytes_AS_STRING(key),
            PyBytes_GET_SIZE(key), &where, &token, &fault,
        )
        if rc < 0:
            fdt_raise(&fault)
        if rc == 0:
            raise FdtError("FDT_ERR_NOTFOUND", node, f"{path} has no property {name}")
        if token.length != <uint64_t>PyBytes_GET_SIZE(raw):
            raise FdtError(
                "FDT_ERR_NOSPACE", where,
                f"{path} {name}: {token.length} bytes cannot become {PyBytes_GET_SIZE(raw)}",
            )
        memcpy(
            <unsigned char *>self._buffer.buf + token.data, PyBytes_AS_STRING(raw), token.length
        )

    def __repr__(self) -> str:
        return f"<Fdt of {self._blob.totalsize} bytes>"

    cdef int _build_index(self) except -1:
        cdef fdt_fault fault
        cdef fdt_index index
        cdef uint32_t[:, ::1] slots
        cdef int rc
        cdef bytes key
        if self._index.nodes != NULL:
            return 0
        memset(&fault, 0, sizeof(fault))
        memset(&index, 0, sizeof(index))
        key = os.urandom(16)
        memcpy(index.key, PyBytes_AS_STRING(key), 16)
        try:
            with nogil:
                rc = fdt_index_number_nodes(&self._blob, self._root, &index, &fault)
            if rc < 0:
                fdt_raise(&fault)
            array = np.zeros((index.nr_slots, sizeof(fdt_index_slot) // 4), np.uint32)
            slots = array               # numpy asks for huge pages
            index.slots = <fdt_index_slot *>&slots[0, 0]
            with nogil:
                rc = fdt_index_fill(&self._blob, &index, &fault)
            if rc < 0:
                fdt_raise(&fault)
            if self._index.nodes == NULL:  # no other thread was faster
                self._index, self._slots = index, array
                index.nodes = NULL
        finally:
            free(index.nodes)
        return 0

    cdef int _child(
        self, fdt_place *node, const unsigned char *name, uint64_t length, fdt_place *child
    ) except -1:
        """Find the first child that *name* means: 1, or 0 if there is none.

        *node* may be *child*; it gets its number, if there are numbers.
        """
        cdef fdt_fault fault
        cdef fdt_index_slot *slot
        cdef int rc
        memset(&fault, 0, sizeof(fault))
        if self._index.nodes == NULL:
            rc = fdt_find_child(
                &self._blob, node.offset, name, length, &self._budget, &child.offset, &fault
            )
            if rc == -1:
                fdt_raise(&fault)
            if rc >= 0:
                child.number = -1
                return rc
            self._build_index()
        self._number(node)
        slot = fdt_index_find(
            &self._blob, &self._index,
            fdt_name_hash(self._index.key, node.number, name, length), node.number, name, length,
            &fault,
        )
        if slot == NULL:
            fdt_raise(&fault)
        child.number = slot.number
        child.offset = slot.offset
        return slot.offset != 0

    cdef int _number(self, fdt_place *node) except -1:
        """Let *node* have its number in the index."""
        if node.number < 0:
            self._build_index()
            node.number = fdt_index_number(&self._index, node.offset)
            if node.number < 0:
                raise FdtError("FDT_ERR_BADOFFSET", node.offset, "no node begins here")
        return 0

    cdef int64_t _path_offset(self, object path) except? -1:
        """Offset of the node at *path*, or -1."""
        cdef const unsigned char *at
        cdef const unsigned char *end
        cdef const unsigned char *slash
        cdef uint64_t length
        cdef object owner = fdt_text(path, &at, &length)
        cdef fdt_place place
        place.offset = self._root
        place.number = 0
        end = at + length
        if at == end or at[0] != c"/":
            raise FdtError("FDT_ERR_BADPATH", None, f"{path!r} does not begin with '/'")
        while True:
            while at < end and at[0] == c"/":
                at += 1
            if at == end:
                return place.offset
            slash = <const unsigned char *>memchr(at, c"/", end - at)
            if slash == NULL:
                slash = end
            if not self._child(&place, at, slash - at, &place):
                return -1
            at = slash


cdef bytes fdt_value(object value):
    """The bytes of any buffer."""
    cdef Py_buffer buffer
    if type(value) is bytes:
        return value
    PyObject_GetBuffer(value, &buffer, PyBUF_SIMPLE)
    try:
        return PyBytes_FromStringAndSize(<const char *>buffer.buf, buffer.len)
    finally:
        PyBuffer_Release(&buffer)


_DTS_STRING = frozenset(range(0x20, 0x7F)) | frozenset(b"\0\a\b\t\n\v\f\r")
_DTS_ESCAPE = {
    7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r",
    ord('"'): '\\"', ord("\\"): "\\\\",
}


cdef str _dts_value(object view):
    """A property's value with " = " before it, in the notation that dtc would guess."""
    cdef bytes raw = bytes(view)
    cdef Py_ssize_t i, nuls = raw.count(0)
    if not raw:
        return ""
    if raw[len(raw) - 1] == 0 and 2 * nuls <= len(raw) and _DTS_STRING.issuperset(raw):
        texts = raw[:len(raw) - 1].decode("ascii").split("\0")
        return " = " + ", ".join(f'"{text.translate(_DTS_ESCAPE)}"' for text in texts)
    if len(raw) % 4 == 0:
        return " = <" + " ".join(
            [f"0x{fdt_ld32(PyBytes_AS_STRING(raw) + i):02x}" for i in range(0, len(raw), 4)]
        ) + ">"
    return f" = [{raw.hex(' ')}]"


cdef inline Node fdt_node(Fdt fdt, uint64_t offset):
    """The node that begins at *offset*, which the caller has seen."""
    cdef Node node = Node.__new__(Node)
    node._fdt, node._offset = fdt, offset
    return node


@cython.final
@cython.auto_pickle(False)
@cython.no_gc
@cython.freelist(64)
@cython.nonecheck(True)  # Node.__new__(Node) belongs to no tree
cdef class Node:
    """A node of a flattened device tree.

    Attributes:
        name: with its unit address, and without any "/"; "" for the root.
        path: "/" for the root, else names joined by "/".
        parent: the node above, or None for the root.
        children: nodes directly below; a sequence in file order, and ``children["uart@9000000"]``.
        properties: dict from name to value, in file order.
        offset: byte in the blob where it begins.

    Args:
        fdt: the tree.
        offset: byte in the blob of its FDT_BEGIN_NODE; usually one gets nodes from the tree.

    Raises:
        FdtError: FDT_ERR_BADOFFSET if no node begins there. All attributes raise FdtError if the
            structure is wrong (met only with ``check=False``).

    Context:
        Values are read-only views of the buffer: no copies, and alive as long as the tree's buffer.
    """

    cdef Fdt _fdt
    cdef uint64_t _offset

    def __init__(self, Fdt fdt not None, offset):
        cdef fdt_fault fault
        cdef fdt_token token
        cdef uint64_t where = as_u64(offset)
        if fdt_begin_tag(&fdt._blob, where, &token, &fault) < 0:
            fdt_raise(&fault)
        self._fdt, self._offset = fdt, where

    @property
    def offset(self) -> int:
        """Byte in the blob where the node begins."""
        return self._offset

    @property
    def name(self) -> str:
        """Name with its unit address; "" for the root."""
        cdef fdt_fault fault
        cdef fdt_token token
        if fdt_begin_tag(&self._fdt._blob, self._offset, &token, &fault) < 0:
            fdt_raise(&fault)
        return fdt_decode(self._fdt._blob.base + token.data, token.length)

    @property
    def path(self) -> str:
        """Names from the root down; the tree's first path or parent makes an index of its nodes."""
        cdef list names = []
        cdef Fdt fdt = self._fdt
        cdef fdt_fault fault
        cdef fdt_token token
        cdef int64_t number = self._number()
        while number:
            if fdt_begin_tag(&fdt._blob, fdt._index.nodes[number].offset, &token, &fault) < 0:
                fdt_raise(&fault)
            names.append(fdt_decode(fdt._blob.base + token.data, token.length))
            number = fdt._index.nodes[number].parent
        return "/" + "/".join(reversed(names))

    @property
    def parent(self) -> Node | None:
        """The node above, or None for the root."""
        cdef int64_t number = self._number()
        cdef fdt_index_node *nodes = self._fdt._index.nodes
        if number == 0:
            return None
        return fdt_node(self._fdt, nodes[nodes[number].parent].offset)

    @property
    def children(self) -> Children:
        """Nodes directly below."""
        cdef Children children = Children.__new__(Children, self._fdt)
        children._place.offset = self._offset
        return children

    @property
    def properties(self) -> dict:
        """Values by name, in file order; of two with one name the first."""
        cdef fdt_fault fault
        cdef fdt_token token
        cdef uint64_t offset
        cdef int64_t length
        cdef const fdt_blob *blob = &self._fdt._blob
        cdef dict values = {}
        if fdt_begin_tag(blob, self._offset, &token, &fault) < 0:
            fdt_raise(&fault)
        while True:
            offset = token.next
            if fdt_next_tag(blob, offset, &token, &fault) < 0:
                fdt_raise(&fault)
            if token.tag == FDT_NOP:
                continue
            if token.tag != FDT_PROP:
                return values
            length = fdt_property_name(blob, offset, token.nameoff, &fault)
            if length < 0:
                fdt_raise(&fault)
            name = fdt_decode(blob.base + blob.off_dt_strings + token.nameoff, length)
            if name not in values:
                values[name] = self._fdt._view[token.data:token.data + token.length]

    def __getitem__(self, name) -> memoryview:
        """Return the value of the property *name*, or raise KeyError."""
        value = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __contains__(self, name) -> bool:
        """Tell whether the node has a property *name*."""
        return self.get(name) is not None

    def get(self, name) -> memoryview | None:
        """Return the value of the property *name*, or None."""
        cdef fdt_fault fault
        cdef fdt_token token
        cdef uint64_t where
        cdef bytes key = fdt_encode(name)
        cdef int rc = fdt_find_property(
            &self._fdt._blob, self._offset, <const unsigned char *>PyBytes_AS_STRING(key),
            PyBytes_GET_SIZE(key), &where, &token, &fault,
        )
        if rc < 0:
            fdt_raise(&fault)
        return self._fdt._view[token.data:token.data + token.length] if rc else None

    def __eq__(self, other) -> bool:
        return (
            isinstance(other, Node)
            and self._fdt is (<Node>other)._fdt
            and self._offset == (<Node>other)._offset
        )

    def __hash__(self) -> int:
        return hash((id(self._fdt), self._offset))

    def __repr__(self) -> str:
        return f"<Node {self.name or '/'} at {self._offset:#x}>"

    cdef int64_t _number(self) except -1:
        """Number of the node in the tree's index; 0 is the root."""
        cdef fdt_place place
        if self._offset == self._fdt._root:
            return 0
        place.offset, place.number = self._offset, -1
        self._fdt._number(&place)
        return place.number


@cython.final
@cython.auto_pickle(False)
@cython.no_gc
@cython.binding(False)
@cython.embedsignature(True)
@cython.embedsignature.format("clinic")
cdef class Children:
    """Nodes directly below a node of a flattened device tree.

    A sequence of :class:`Node` in file order, made when one first goes through it; names instead of
    numbers find single nodes without that, by the tree's index once it has one.

    Raises:
        FdtError: the structure is wrong (met only with ``check=False``).

    Example:
        >>> from luo.fdt import Fdt, FdtWriter
        >>> writer = FdtWriter()
        >>> with writer.node(""):
        ...     writer.add_nodes(("dev", 0, 3), {"bus": b"pci"})
        >>> children = Fdt(writer.finish()).root.children
        >>> len(children), children["dev2"], children[-1] == children["dev2"], "dev3" in children
        (3, <Node dev2 at 0x8c>, True, False)
    """

    cdef Fdt _fdt
    cdef fdt_place _place       # of the node above
    cdef list _nodes            # None until it is needed

    def __cinit__(self, Fdt fdt not None):
        self._fdt = fdt
        self._place.offset, self._place.number = fdt._root, -1

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._all())

    def __iter__(self):
        """Go through them in file order."""
        return iter(self._all())

    def __getitem__(self, key) -> Node:
        """Return the node of that name, as ``Fdt.node()`` finds it, or of that number.

        Raises:
            KeyError: there is no node of that name.
        """
        cdef Node node
        if not isinstance(key, (str, bytes)):
            return self._all()[key]
        node = self._find(key)
        if node is None:
            raise KeyError(key)
        return node

    def __contains__(self, key) -> bool:
        """Tell whether a name means one of them, or whether a node is one."""
        if isinstance(key, (str, bytes)):
            return self._find(key) is not None
        return key in self._all()

    def get(self, name) -> Node | None:
        """Return the node of that name, or None."""
        return self._find(name)

    cdef Node _find(self, object name):
        cdef const unsigned char *text
        cdef uint64_t length
        cdef fdt_place child
        cdef object owner = fdt_text(name, &text, &length)
        if self._fdt._child(&self._place, text, length, &child):
            return fdt_node(self._fdt, child.offset)
        return None

    def __eq__(self, other) -> bool:
        if isinstance(other, Children):
            other = (<Children>other)._all()
        return self._all() == other

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self._all())

    cdef list _all(self):
        cdef fdt_fault fault
        cdef fdt_token token
        cdef uint64_t offset, depth = 0
        cdef const fdt_blob *blob = &self._fdt._blob
        cdef list nodes = []
        if self._nodes is not None:
            return self._nodes
        if fdt_begin_tag(blob, self._place.offset, &token, &fault) < 0:
            fdt_raise(&fault)
        while True:
            offset = fdt_skip_properties(blob, token.next)
            if fdt_next_tag(blob, offset, &token, &fault) < 0:
                fdt_raise(&fault)
            if token.tag == FDT_BEGIN_NODE:
                if depth == 0:
                    nodes.append(fdt_node(self._fdt, offset))
                depth += 1
            elif token.tag == FDT_END_NODE:
                if depth == 0:
                    self._nodes = nodes
                    return nodes
                depth -= 1
            elif token.tag == FDT_END:
                fdt_fault_set(&fault, FDT_ERR_BADSTRUCTURE, offset, "FDT_END inside a node")
                fdt_raise(&fault)
