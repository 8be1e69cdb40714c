"""Physical memory of a simulated machine: a façade of the core.

Mirrors what KHO needs of ``mm/memblock.c`` and ``mm/page_alloc.c``: ranges with NUMA nodes, a buddy
allocator, scratch. Bytes survive the change of kernel, page state does not.
"""

from luo._kho import PhysicalMemory, parse_size

__all__ = ["PhysicalMemory", "parse_size"]
