"""Before the jump: what Linux 7.3 would do with an image.

:func:`judge` reads an image as that kernel would, step by step: it trusts what the kernel trusts,
and checks what the kernel checks. What it finds refers to the table :data:`luo.image.rules.RULES`.
:meth:`luo.image.Image.verify` is stricter: it asks whether a right kernel could have written it.

What cannot be seen in the bytes is not judged: a flipped byte in a preserved page is nobody's rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Final, Self

from luo import abi as _abi
from luo.image.rules import Outcome, Rule
from luo.image.store import Image, Ram

__all__ = ["KERNELS", "Problem", "Target", "Verdict", "judge"]

KERNELS: Final = ("linux-7.3",)
"""Kernels whose rules are known."""

_SIGNED: Final = 1 << 63
_SIZES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Target:
    """The kernel that is to boot: what of it the bytes do not tell.

    The defaults are Linux 7.3 as ``real-kernel.md`` builds it, on the memory of the image.

    Attributes:
        page_size: in bytes.
        huge_pages, debug_vm: whether it has CONFIG_TRANSPARENT_HUGEPAGE, CONFIG_DEBUG_VM.
        kho, liveupdate: its parameters of these names.
        memory: bytes of RAM, from the image's first range on; None: as the image has it.
        handlers: names of its file handlers.
        flbs: names of the FLBs that all of them have.
        kernel, initrd, device_tree_at: [start, bytes) where the loader puts them; None: where they
            do no harm, as in scratch.
        device_tree: what it is booted with, to look at ``/chosen``; None: as the image says.
        reserve_mem: regions that it asks for by ``reserve_mem=``: (name, bytes, alignment).
    """

    page_size: int = 4096
    huge_pages: bool = True
    debug_vm: bool = False
    kho: bool = True
    liveupdate: bool = True
    memory: int | None = None
    handlers: tuple[str, ...] = ("memfd-v2",)
    flbs: tuple[str, ...] = ()
    kernel: tuple[int, int] | None = None
    initrd: tuple[int, int] | None = None
    device_tree_at: tuple[int, int] | None = None
    device_tree: bytes | None = None
    reserve_mem: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Self:
        """Read ``name=value`` pairs, separated by commas.

        ``page-size=SIZE``, ``memory=SIZE``, ``huge-pages=BOOL``, ``debug-vm=BOOL``, ``kho=BOOL``,
        ``liveupdate=BOOL``, ``kernel=START+SIZE``, ``initrd=START+SIZE``,
        ``device-tree=START+SIZE``, and any number of ``handler=NAME``, ``flb=NAME``,
        ``reserve-mem=SIZE:ALIGN:NAME``. The first ``handler`` takes the place of the default.

        Raises:
            ValueError: one is not of this form: it names it.
        """
        known: dict[str, Any] = {}
        for pair in (pair for text in texts for pair in text.split(",") if pair):
            name, _, value = pair.partition("=")
            try:
                field, read = _PAIRS[name]
                item = read(value)
            except (KeyError, ValueError) as error:
                reason = f": {error}" if isinstance(error, ValueError) else ""
                names = ", ".join(_PAIRS)
                raise ValueError(f"target {pair!r}{reason or f': not one of {names}'}") from None
            known[field] = (*known.get(field, ()), item) if name in _MANY else item
        return cls(**known)

    def ram(self, image: Image) -> Ram:
        """Return its memory."""
        ranges, left = [], self.memory
        if left is None:
            return image.ram
        for start, nbytes, node in image.ram.ranges:
            ranges.append((start, min(nbytes, left), node))
            left -= ranges[-1][1]
            if not left:
                break
        else:  # more than the image has: behind its last range
            start, nbytes, node = ranges[-1]
            ranges[-1] = (start, nbytes + left, node)
        return Ram(ranges, image.page_size)

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["device_tree"] = None if self.device_tree is None else len(self.device_tree)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _size(text: str) -> int:
    found = re.fullmatch(r"(0x[0-9a-fA-F]+|[0-9]+)([KMGT]?)(?:i?B)?", text)
    if not found:
        raise ValueError("no size")
    value = int(found[1], 0) * _SIZES[found[2]]
    if not 0 < value < _SIGNED:
        raise ValueError("no size")
    return value


def _page_size(text: str) -> int:
    value = _size(text)
    if value not in _abi.MAX_PAGE_ORDER:
        raise ValueError("not 4K, 16K or 64K")
    return value


def _memory_size(text: str) -> int:
    value = _size(text)
    if value % 65536:
        raise ValueError("not whole pages")
    return value


def _flag(text: str) -> bool:
    if text in ("yes", "on", "1", "true"):
        return True
    if text in ("no", "off", "0", "false"):
        return False
    raise ValueError("neither yes nor no")


def _span(text: str) -> tuple[int, int]:
    start, plus, nbytes = text.partition("+")
    if not plus:
        raise ValueError("not START+SIZE")
    first = int(start, 0)
    if not 0 <= first < _SIGNED:
        raise ValueError("no address")
    return first, _size(nbytes)


def _region(text: str) -> tuple[str, int, int]:
    nbytes, _, rest = text.partition(":")
    align, _, name = rest.partition(":")
    if not name:
        raise ValueError("not SIZE:ALIGN:NAME")
    if _size(align) & (_size(align) - 1):
        raise ValueError("alignment is no power of 2")
    return name, _size(nbytes), _size(align)


def _name(text: str) -> str:
    if not 1 <= len(text.encode()) <= 47:
        raise ValueError("not 1 to 47 bytes")
    return text


_PAIRS: Final[dict[str, tuple[str, Any]]] = {
    "page-size": ("page_size", _page_size),
    "huge-pages": ("huge_pages", _flag),
    "debug-vm": ("debug_vm", _flag),
    "kho": ("kho", _flag),
    "liveupdate": ("liveupdate", _flag),
    "memory": ("memory", _memory_size),
    "handler": ("handlers", _name),
    "flb": ("flbs", _name),
    "kernel": ("kernel", _span),
    "initrd": ("initrd", _span),
    "device-tree": ("device_tree_at", _span),
    "reserve-mem": ("reserve_mem", _region),
}
_MANY: Final = ("handler", "flb", "reserve-mem")


@dataclass(frozen=True, slots=True)
class Problem:
    """A rule of the kernel that an image meets.

    Attributes:
        rule: of the table.
        what: that breaks it: names the object.
        phys: physical address where, or None.
        count: how many this stands for; more than one only for the last of its rule.
    """

    rule: Rule
    what: str
    phys: int | None = None
    count: int = 1

    def __str__(self) -> str:
        where = "" if self.phys is None else f"{self.phys:#x}: "
        more = "" if self.count == 1 else f" ({self.count:,} in all)"
        return f"{where}{self.what}{more}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a kernel would do with an image.

    Attributes:
        target: the kernel.
        problems: in the order of the boot; those behind the first would strike, too, if it did not.
        notes: what the kernel takes, and people should know.
    """

    target: Target
    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...]

    @property
    def outcome(self) -> Outcome:
        """Of the first problem; ``TAKES`` without one."""
        return self.problems[0].rule.outcome if self.problems else Outcome.TAKES

    @property
    def seen(self) -> tuple[str, ...]:
        """What will be seen: one thing, or for ``UNDEFINED`` all that is possible.

        ``takes it``, ``boots cold``, ``panics``, ``warning``, ``wrong data``,
        ``wrong attributes``, ``EIO at open``, ``oops at RETRIEVE_FD`` and so on.
        """
        return self.problems[0].rule.seen if self.problems else (Outcome.TAKES.value,)

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""

        def rows(problems: Iterable[Problem]) -> list[dict[str, Any]]:
            return [
                {
                    "rule": p.rule.id,
                    "stage": p.rule.stage.label,
                    "outcome": p.rule.outcome.value,
                    "seen": list(p.rule.seen),
                    "phys": None if p.phys is None else hex(p.phys),
                    "what": p.what,
                    "count": p.count,
                    "why": p.rule.why,
                    "kernel": p.rule.kernel,
                    "spec": p.rule.spec,
                }
                for p in problems
            ]

        return {
            "outcome": self.outcome.value,
            "seen": list(self.seen),
            "target": self.target.document(),
            "problems": rows(self.problems),
            "notes": rows(self.notes),
        }


def judge(image: Image, target: Target | None = None) -> Verdict:
    """Return what the kernel *target* would do with *image*.

    Args:
        image: of any generation; what it says itself is what counts.
        target: None: Linux 7.3 with its defaults.
    """
    from luo.image.boot_path import BootPath

    target = target or Target()
    path = BootPath(image, target)
    path.walk()
    problems = path.problems()
    return Verdict(
        target,
        tuple(p for p in problems if p.rule.outcome is not Outcome.TAKES),
        tuple(p for p in problems if p.rule.outcome is Outcome.TAKES),
    )
