"""What two images preserve differently.

Compared is what the next kernel gets: generation, page size, memory, scratch, preserved memory as
sets of pages, what is in them, subtrees and metadata. Where the format keeps its own pages, and
into blocks of which orders the same pages are cut, makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from luo.abi import KHO_SUBTREE_METADATA
from luo.image.document import plain
from luo.image.store import Extent, Image
from luo.image.survey import Subtree

__all__ = ["Difference", "compare"]

_LISTED_MAX: Final = 1000
_STEP: Final = 1 << 20

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference.

    Attributes:
        part: ``"generation"``, ``"page_size"``, ``"memory"``, ``"scratch"``, ``"pages"``,
            ``"contents"``, ``"map"``, or the name of a subtree.
        what: in words, or the name of the value.
        a, b: the value in each image, None where it has none.
    """

    part: str
    what: str
    a: Any
    b: Any


def compare(a: Image, b: Image) -> list[Difference]:
    """Return the differences between two images; none if they preserve the same."""
    found: list[Difference] = []

    def note(part: str, what: str, left: Any, right: Any) -> None:
        if left != right:
            found.append(Difference(part, what, left, right))

    note("generation", "name", a.abi, b.abi)
    note("generation", "bugs", sorted(a.bugs), sorted(b.bugs))
    if a.abi == b.abi:
        note("root", "compatible", a.survey.compatible, b.survey.compatible)
    note("page_size", "bytes", a.page_size, b.page_size)
    note("memory", "ranges", _ranges(a.ram.ranges), _ranges(b.ram.ranges))
    note("scratch", "areas", _ranges(a.survey.scratch), _ranges(b.survey.scratch))
    found += _pages(a, b)
    keys = [sorted(hex(key) for key, _ in image.survey.illegal_keys) for image in (a, b)]
    note("map", "illegal keys", *keys)
    found += _subtrees(a, b)
    found += _contents(a, b)
    return found


def _ranges(ranges: Any) -> list[list[Any]]:
    return [[hex(start), *rest] for start, *rest in ranges]


def _preserved(image: Image) -> list[Span]:
    """Preserved memory without the format's own: root tree and kexec-metadata."""
    survey = image.survey
    places = [] if survey.generation.inline else [image.handover.fdt_phys]
    places += [s.phys for s in survey.subtrees if s.name == KHO_SUBTREE_METADATA and s.phys]
    own: list[Span] = []
    for phys in sorted(set(places)):
        order = survey.order_at(phys)
        if order is not None:
            own.append((phys, phys + (image.page_size << order)))
    return list(_minus(survey.preserved_runs(), own))


def _minus(spans: list[Span], other: list[Span]) -> Iterator[Span]:
    """Yield what of sorted disjoint *spans* is not in *other*."""
    at = 0
    for start, end in spans:
        while at < len(other) and other[at][1] <= start:
            at += 1
        here = at
        while start < end:
            if here == len(other) or other[here][0] >= end:
                yield start, end
                break
            if other[here][0] > start:
                yield start, other[here][0]
            start = max(start, other[here][1])
            here += 1


def _both(spans: list[Span], other: list[Span]) -> Iterator[Span]:
    """Yield what is in both of two lists of sorted disjoint spans."""
    i = j = 0
    while i < len(spans) and j < len(other):
        start, end = max(spans[i][0], other[j][0]), min(spans[i][1], other[j][1])
        if start < end:
            yield start, end
        if spans[i][1] < other[j][1]:
            i += 1
        else:
            j += 1


def _pages(a: Image, b: Image) -> list[Difference]:
    left, right = _preserved(a), _preserved(b)
    found = [Difference("pages", "only in A", _span(span), None) for span in _minus(left, right)]
    found += [Difference("pages", "only in B", None, _span(span)) for span in _minus(right, left)]
    return found


def _span(span: Span) -> list[Any]:
    return [hex(span[0]), span[1] - span[0]]


def _subtrees(a: Image, b: Image) -> list[Difference]:
    found: list[Difference] = []
    left, right = ({s.name: s for s in image.survey.subtrees} for image in (a, b))
    for name in dict.fromkeys([*left, *right]):
        if name not in left or name not in right:
            found.append(
                Difference(name, "subtree", _names(left.get(name)), _names(right.get(name)))
            )
            continue
        fields: tuple[tuple[str, Any, Any], ...] = (
            ("phys", _hex(left[name].phys), _hex(right[name].phys)),
            ("nbytes", left[name].nbytes, right[name].nbytes),
        )
        for field, one, other in fields:
            # Not every generation says where data is, or how long: nothing to compare then.
            own = name == KHO_SUBTREE_METADATA and field == "phys"
            if one is not None and other is not None and one != other and not own:
                found.append(Difference(name, field, one, other))
        leaves = _leaves(_shown(left[name]), _shown(right[name]), "")
        found += [
            Difference(name, path, one, other)
            for (path, one, other), _ in zip(leaves, range(_LISTED_MAX), strict=False)
        ]
    return found


def _shown(subtree: Subtree) -> Any:
    decoded = plain(subtree.decoded)
    if subtree.name == KHO_SUBTREE_METADATA and decoded:
        del decoded["phys"]
    return decoded


def _hex(phys: int | None) -> str | None:
    return None if phys is None else hex(phys)


def _names(subtree: Subtree | None) -> Any:
    return None if subtree is None else {"phys": _hex(subtree.phys), "nbytes": subtree.nbytes}


def _leaves(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, a, b) of each value that differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            if key != "tree":  # says again, less well, what the other values say
                yield from _leaves(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        if a.keys() == b.keys() == {"tree"}:
            yield from _leaves(a["tree"], b["tree"], "tree")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _leaves(one, other, f"{path}[{i}]")
    elif a != b:
        yield path, a, b


def _contents(a: Image, b: Image) -> list[Difference]:
    """Pages that both preserve and both keep, and that hold different bytes."""
    if a.page_size != b.page_size:
        return []
    spans: list[Span] = []
    for start, end in _both(_preserved(a), _preserved(b)):
        for one in a.pieces(start, end):
            for other in b.pieces(one.phys, one.end):
                part = next(iter(_cut(one, other.phys, other.end)))
                for page in _unequal(part, other, a.page_size):
                    if spans and spans[-1][1] == page:
                        spans[-1] = (spans[-1][0], page + a.page_size)
                    else:
                        spans.append((page, page + a.page_size))
    return [Difference("contents", "differ", _span(span), _span(span)) for span in spans]


def _cut(extent: Extent, start: int, end: int) -> Iterator[Extent]:
    data = extent.data
    part = None if data is None else memoryview(data)[start - extent.phys : end - extent.phys]
    yield Extent(start, end - start, part)


def _unequal(a: Extent, b: Extent, page: int) -> Iterator[int]:
    if a.data is None and b.data is None:
        return
    for at in range(0, a.nbytes, _STEP):
        size = min(_STEP, a.nbytes - at)
        left, right = (
            bytes(size) if extent.data is None else bytes(extent.data[at : at + size])
            for extent in (a, b)
        )
        if left == right:
            continue
        for inner in range(0, size, page):
            if left[inner : inner + page] != right[inner : inner + page]:
                yield a.phys + at + inner
