"""Compiled core of luo: memory, preserved map, flattened trees, device table, callback loop.

This file is a table of contents. A fragment may use only what an earlier include
defined, so the order of the includes is the layer diagram of the core.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_AsLongLong, PyLong_CheckExact
from cpython.exc cimport PyErr_CheckSignals
from cpython.number cimport PyNumber_Index
from cpython.pycapsule cimport PyCapsule_GetContext, PyCapsule_GetPointer, PyCapsule_IsValid
from libc cimport errno as c_errno
from libc.stdint cimport INT64_MAX, int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memcmp, memcpy, memmove, memset, strcmp, strerror
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import errno
import fcntl
import gc
import mmap as mmap_module
import os
import re

import numpy as np

from luo.errors import HandoverError, from_errno

# L0 integers, errors, allocation
include "core/errno.pxi"
# L1 bitmaps
include "core/bits.pxi"
# L2 physical memory and its pages
include "core/memory.pxi"
# L3 the preserved map
include "core/radix.pxi"
# L3 the preserved map in its older shape
include "core/chunks.pxi"
# L3 many blocks at once
include "core/blocks.pxi"
# L3 what this kernel preserves
include "core/outgoing.pxi"
# L3 what the previous kernel preserved
include "core/incoming.pxi"
# L1' flattened tree, read
include "core/fdt_ro.pxi"
# L1' flattened tree, sequential write
include "core/fdt_sw.pxi"
# L1' flattened tree, random access
include "core/fdt_rw.pxi"
# L3' device table
include "core/devices.pxi"
# L4 what a live update works out about its devices
include "core/plan.pxi"
# L4 device records
include "core/records.pxi"
# L4 what a native callback sees
include "core/native.pxi"
# L4 what callbacks cost
include "core/recorder.pxi"
# L5 timed callback loop, slots
include "core/dispatch.pxi"
