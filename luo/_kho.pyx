"""Compiled core of luo: memory, preserved map, flattened trees, device table, callback loop.

This file is a table of contents. A fragment may use only what an earlier include
defined, so the order of the includes is the layer diagram of the core.
"""

cimport cython
from cpython.long cimport PyLong_AsUnsignedLongLong
from cpython.number cimport PyNumber_Index
from libc.stdint cimport uint64_t
from libc.stdlib cimport malloc
from libc.string cimport strerror

from luo.errors import from_errno

include "core/errno.pxi"  # L0 integers, errors, allocation
include "core/fdt_ro.pxi"  # L2' flattened tree, read
include "core/fdt_sw.pxi"  # L2' flattened tree, sequential write
include "core/fdt_rw.pxi"  # L2' flattened tree, random access
