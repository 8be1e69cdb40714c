# Header of the compiled core: C types and constants, by fragment, in the order of the includes.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

# ---- fdt_ro: the flattened device tree format (DT spec v0.4, chapter 5) ----

cdef enum:
    FDT_MAGIC = 0xD00DFEED
    FDT_BEGIN_NODE = 1
    FDT_END_NODE = 2
    FDT_PROP = 3
    FDT_NOP = 4
    FDT_END = 9
    FDT_V16_HEADER = 36         # bytes; without size_dt_struct
    FDT_V17_HEADER = 40         # bytes
    FDT_MAX_BYTES = 0x7FFFFFFF  # libfdt's offsets are int
    FDT_MAX_PROPERTY_NAME = 255  # bytes without NUL; ours, the DT spec allows 31

# libfdt's error numbers; 8 and above mean that the blob is wrong.
cdef enum:
    FDT_ERR_NOTFOUND = 1
    FDT_ERR_EXISTS = 2
    FDT_ERR_NOSPACE = 3
    FDT_ERR_BADOFFSET = 4
    FDT_ERR_BADPATH = 5
    FDT_ERR_BADSTATE = 7
    FDT_ERR_TRUNCATED = 8
    FDT_ERR_BADMAGIC = 9
    FDT_ERR_BADVERSION = 10
    FDT_ERR_BADSTRUCTURE = 11
    FDT_ERR_BADLAYOUT = 12
    FDT_ERR_BADVALUE = 15
    FDT_ERR_ALIGNMENT = 19

# A header that was checked: every field lies within [0, totalsize].
ctypedef struct fdt_blob:
    const unsigned char *base
    uint64_t totalsize
    uint64_t off_mem_rsvmap
    uint64_t off_dt_struct
    uint64_t end_dt_struct      # limit of the structure block; totalsize in version 16
    uint64_t off_dt_strings
    uint64_t size_dt_strings
    uint32_t version
    uint32_t last_comp_version
    uint32_t boot_cpuid_phys

# One token of the structure block; offsets count from the start of the blob.
ctypedef struct fdt_token:
    uint32_t tag
    uint64_t next               # offset of the token after this one
    uint64_t data               # FDT_BEGIN_NODE: its name; FDT_PROP: its value
    uint64_t length             # bytes of that, without NUL and padding
    uint64_t nameoff            # FDT_PROP: place of its name in the strings block

# What a worker found wrong, and where.
ctypedef struct fdt_fault:
    int code                    # FDT_ERR_*, or 0
    uint64_t offset
    const char *rule

# ---- fdt_sw: sequential writer ----

cdef enum:
    FDT_SW_RSVMAP = 48          # where libfdt's sequential writer puts the reserve map
    FDT_SW_STRUCT = 64          # and, behind its one empty entry, the structure

# A suffix of the string table, by hash; dist 0 marks a free slot.
ctypedef struct fdt_sw_slot:
    uint32_t hash
    uint32_t dist               # from the end of the table back to the suffix, bytes

# From structure offset pos on, name offsets were written for a table of tabsize bytes.
ctypedef struct fdt_sw_stretch:
    uint64_t pos
    uint64_t tabsize

ctypedef struct fdt_sw:
    unsigned char *buf
    uint64_t cap                # bytes that buf may hold
    uint64_t pos                # end of what is written of the structure
    bint fixed                  # buf belongs to somebody else and cannot grow
    unsigned char *tab          # string table; its used part is the last tabsize bytes
    uint64_t tabcap
    uint64_t tabsize
    fdt_sw_slot *slots
    uint64_t nr_slots           # power of two, or 0
    uint64_t nr_used
    fdt_sw_stretch *stretches
    uint64_t nr_stretches
    uint64_t cap_stretches

# The values of one property, or the names, of n nodes.
ctypedef struct fdt_rows:
    const unsigned char *data
    const uint64_t *offsets     # n + 1, or NULL: every row is width bytes at data + i * stride
    const uint8_t *present      # n, or NULL: all are
    uint64_t size               # bytes behind data
    uint64_t width
    uint64_t stride             # 0: the same bytes for all rows
    uint64_t tail               # bytes at the end of each ragged row that do not count (a NUL)
    const unsigned char *name
    uint64_t name_len
    uint64_t tabsize            # of the string table when nameoff was looked up
    uint32_t nameoff            # big-endian

# ---- core/dispatch.pxi ----

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    HISTOGRAM_SUB_BITS = 6
    HISTOGRAM_SUB = 64  # buckets an octave
    HISTOGRAM_OCTAVES = 34  # up to 2^39 ns, nine minutes
    HISTOGRAM_BUCKETS = 2176  # HISTOGRAM_OCTAVES * HISTOGRAM_SUB

cdef enum:
    CALL_PLAIN = 0
    CALL_SET = 1  # set the done bit after success
    CALL_CLEAR = 2  # call only where the bit is set, and clear it
    CALL_NEED = 3  # call only where the bit is set

cdef struct call_stats:
    uint64_t calls
    uint64_t devices
    int64_t total_ns
    int64_t min_ns
    int64_t max_ns
    uint64_t histogram[2176]
