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
# devices.pxi: L3 the device table
include "core/devices.pxi"
