"""Scratch: the memory that the next kernel boots in, sized and placed as Linux does (kho-abi 8)."""

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from luo import abi as _abi
from luo.errors import from_errno
from luo.memory import PhysicalMemory

__all__ = ["ScratchParam", "parse_kho_scratch", "scratch_layout"]

_LOW_LIMIT: Final = 1 << 32  # ARCH_LOW_ADDRESS_LIMIT of x86


@dataclass(frozen=True, slots=True)
class ScratchParam:
    """Meaning of ``kho_scratch=``.

    Attributes:
        scale: percent of what the kernel itself reserved, or None if sizes were given.
        lowmem: bytes below 4 GiB, or None with a scale.
        global_: bytes anywhere.
        pernode: bytes on each node.
    """

    scale: int | None = 200
    lowmem: int | None = None
    global_: int | None = None
    pernode: int | None = None


_NUMBER = r"(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)"
_MEMPARSE = re.compile(_NUMBER + "([KkMmGgTtPpEe]?)")
_THREE_SIZES = re.compile(",".join(3 * [_NUMBER + "[KkMmGgTtPpEe]?"]))
_V5_PERCENT = re.compile(_NUMBER + "%")


def _memparse(text: str) -> int | None:
    found = _MEMPARSE.fullmatch(text)
    if found is None:
        return None
    digits, unit = found.groups()
    value = _number(digits) << (10 * ("KMGTPE".index(unit.upper()) + 1) if unit else 0)
    return value if value < 1 << 64 else None


def _number(digits: str) -> int:
    octal = digits.startswith("0") and digits.isdecimal()
    return int(digits, 8 if octal else 0)


def parse_kho_scratch(text: str, abi: str = "kho-v4") -> ScratchParam:
    """Read a ``kho_scratch=`` parameter as the kernels of a generation do (kho-abi 8).

    Args:
        text: ``"N%"``, or three sizes ``"LOW,GLOBAL,NODE"`` with K, M, G, T, P, E, of which not all
            are 0.
        abi: the generation. Those of Linux 6.16 and before want every size above 0, and stop
            reading behind the third; the v5 series read the percentage in any base, up to the sign.

    Raises:
        KhoError: EINVAL for anything else.
    """
    grammar = _abi.generation(abi).scratch_grammar
    wrong = from_errno(
        errno.EINVAL,
        f"kho_scratch={text}: no N% or three sizes as {abi} has them, or all of them 0",
    )
    percent = _V5_PERCENT.match(text) if grammar == "v5" else None
    if percent is not None:
        scale = _number(percent[1])
        if scale > 0xFFFFFFFF:
            raise wrong
        return ScratchParam(scale=scale)
    if grammar != "v5" and text.endswith("%"):
        digits = text[:-1]
        if not (digits.isascii() and digits.isdecimal()) or len(text) > 11:
            raise wrong
        if int(digits) > 0xFFFFFFFF:
            raise wrong
        return ScratchParam(scale=int(digits))
    if grammar == "7.3":
        parts = text.split(",")
    else:
        found = _THREE_SIZES.match(text)
        parts = found[0].split(",") if found is not None else []
    sizes = [_memparse(part) for part in parts]
    enough = any if grammar == "7.3" else all
    if len(sizes) != 3 or None in sizes or not enough(sizes):
        raise wrong
    return ScratchParam(None, *sizes)


def _reserved_by_kernel(
    ranges: Sequence[tuple[int, int, int]], page_size: int
) -> list[tuple[int, int, int]]:
    """Model of what a kernel has reserved when it sizes scratch: ``[(start, nbytes, node)]``.

    memmap: 64 bytes a page, at the end of each range. Kernel image: 32 MiB, or a 64th of memory if
    that is less, at the start of the first range.
    """
    total = sum(nbytes for _, nbytes, _ in ranges)
    start, nbytes, node = ranges[0]
    reserved = [(start, min(32 << 20, total // 64, nbytes), node)]
    for start, nbytes, node in ranges:
        memmap = nbytes // page_size * 64
        reserved.append((start + nbytes - memmap, memmap, node))
    return reserved


def scratch_layout(
    memory: PhysicalMemory, param: ScratchParam | None = None, *, abi: str = "kho-v4"
) -> list[tuple[int, int]]:
    """Size and place scratch as the kernels of a generation do on a cold boot.

    Sizes (kho-abi 8): low = what the kernel reserved below 4 GiB times the scale; global = all that
    it reserved times the scale, less low; per node likewise; each rounded up to a block of the
    largest order. Before kho-v3 they were rounded to page blocks, and global was less the rounded
    low; where that would be less than nothing, here it is nothing. What "the kernel reserved" is,
    is modelled: a memmap of 64 bytes a page on its node, and an image of 32 MiB (a 64th of memory
    if that is less) in the lowest range.
    Places: from the top down, each within one range.

    Returns:
        list: ``[(phys, nbytes), ...]``: low, global, then one for each node that has memory. An
        area of size 0 has address 0.

    Raises:
        KhoError: ENOMEM if an area finds no place.
    """
    param = param or ScratchParam()
    ranges = memory.ranges
    align = memory.page_size << memory.max_order
    old = _abi.generation(abi).pageblock_scratch
    if old:
        align = memory.page_size << _abi.PAGEBLOCK_ORDER[memory.page_size]
    nodes = sorted({node for _, _, node in ranges})
    if param.scale is None:
        low, everywhere = param.lowmem or 0, param.global_ or 0
        per_node = dict.fromkeys(nodes, param.pernode or 0)
    else:
        reserved = _reserved_by_kernel(ranges, memory.page_size)
        scale = param.scale
        below = sum(max(0, min(s + n, _LOW_LIMIT) - s) for s, n, _ in reserved)
        low = below * scale // 100
        if old:
            low = -(-low // align) * align
        everywhere = max(0, sum(n for _, n, _ in reserved) * scale // 100 - low)
        per_node = {
            node: sum(n for _, n, where in reserved if where == node) * scale // 100
            for node in nodes
        }

    taken: list[tuple[int, int]] = []

    def place(nbytes: int, limit: int | None, node: int | None, what: str) -> tuple[int, int]:
        nbytes = -(-nbytes // align) * align
        if nbytes == 0:
            return (0, 0)
        for start, size, where in reversed(ranges):
            if node is not None and where != node:
                continue
            end = start + size if limit is None else min(start + size, limit)
            floor = max(start, memory.page_size)  # page 0 is nobody's
            at = (end - nbytes) // align * align
            while at >= floor:
                clash = [p for p, n in taken if p < at + nbytes and p + n > at]
                if not clash:
                    taken.append((at, nbytes))
                    return (at, nbytes)
                at = (min(clash) - nbytes) // align * align
        raise from_errno(
            errno.ENOMEM,
            f"scratch: no place for {nbytes:#x} bytes {what}; give smaller areas, or scratch=[]",
        )

    return [
        place(low, _LOW_LIMIT, None, "below 4 GiB"),
        place(everywhere, None, None, "anywhere"),
        *(place(per_node[node], None, node, f"on node {node}") for node in nodes),
    ]
