"""Flattened device trees: KHO's container for everything that has a name.

Mirrors libfdt, one class per way of access: :class:`Fdt` reads a tree where it lies (``fdt_ro.c``),
:class:`FdtWriter` writes one from first byte to last (``fdt_sw.c``), :class:`FdtEditor` changes one
in place (``fdt_rw.c``). Left out: overlays, aliases and phandles.

Unlike libfdt they have plurals: :meth:`FdtWriter.add_nodes` and :meth:`Fdt.read_nodes` take and
give whole columns, without the GIL.
"""

from luo._kho import Children, Column, Fdt, FdtEditor, FdtWriter, Node
from luo.errors import FdtError

__all__ = ["Children", "Column", "Fdt", "FdtEditor", "FdtError", "FdtWriter", "Node"]
