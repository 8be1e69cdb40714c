"""An image as a document of JSON values: what ``luo image inspect --json`` prints.

It is complete: the format's own pages stand in it as base64, and what they mean beside them, so it
can be edited and encoded again (:func:`luo.image.encode.encode`). Pages that are only preserved
are named by the image that they are in (``source``). Addresses, and other numbers that may not fit
into a double, are strings in base 16.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from luo.image.formats import tree_rows
from luo.image.store import Image
from luo.image.survey import Survey, Violation

__all__ = ["describe", "map_summary", "plain", "subtree_bytes", "violation_rows"]

_HEX: Final = frozenset(
    (
        "phys", "at", "start", "next", "first", "data", "token", "sessions_pa", "flbs_pa",
        "files_pa", "vmalloc_first", "records", "slabs", "entries",
    )
)  # fmt: skip


def plain(value: Any, name: str = "") -> Any:
    """Return decoded *value* with its addresses in base 16."""
    if isinstance(value, dict):
        if value.get("type") == "extent":  # its first is a number of a record
            return {k: v if k == "first" else plain(v, k) for k, v in value.items()}
        return {key: plain(item, key) for key, item in value.items()}
    if isinstance(value, list):
        if name in ("slot", "bus_slot") and len(value) == 2:
            return [hex(value[0]), value[1]]
        if name == "pages" and all(isinstance(item, int) for item in value):
            return [hex(item) for item in value]
        if name == "folios" and value and len(value[0]) == 2:
            return [[hex(phys), order] for phys, order in value]
        if name == "folios":
            return [[hex(pfn), *rest] for pfn, *rest in value]
        return [plain(item, name) for item in value]
    if name in _HEX and isinstance(value, int):
        return hex(value)
    return value


def violation_rows(violations: Iterable[Violation]) -> list[dict[str, Any]]:
    """Return violations as JSON values."""
    return [
        {
            "part": v.part,
            "phys": None if v.phys is None else hex(v.phys),
            "rule": v.rule,
            "count": v.count,
        }
        for v in violations
    ]


def map_summary(survey: Survey) -> dict[str, Any]:
    """Return numbers of blocks by order, pages by order and NUMA node, and pages of the map."""
    nodes = sorted({node for _, _, node in survey.ram.ranges})
    of_block = node_numbers(survey)
    by_order: dict[str, Any] = {}
    for order in np.unique(survey.orders).tolist():
        mine = survey.orders == order
        by_order[str(order)] = {
            "blocks": int(mine.sum()),
            "pages": int(mine.sum()) << order,
            "blocks_by_node": {str(n): int((mine & (of_block == n)).sum()) for n in nodes},
        }
    sizes = survey.sizes >> np.uint64(survey.ram.page_size.bit_length() - 1)
    kinds: dict[str, int] = {}
    for page in survey.map_pages:
        kinds[page.kind] = kinds.get(page.kind, 0) + 1
    return {
        "blocks": len(survey.phys),
        "pages": int(sizes.sum()),
        "by_order": by_order,
        "pages_by_node": {str(n): int(sizes[of_block == n].sum()) for n in nodes},
        "own": kinds,
    }


def node_numbers(survey: Survey) -> NDArray[np.int64]:
    """Return the NUMA node of each block's first page, -1 outside RAM."""
    starts = np.array([start for start, _, _ in survey.ram.ranges], np.uint64)
    ends = np.array([start + nbytes for start, nbytes, _ in survey.ram.ranges], np.uint64)
    numbers = np.array([node for _, _, node in survey.ram.ranges], np.int64)
    at = np.searchsorted(starts, survey.phys, "right").astype(np.intp) - 1
    inside = (at >= 0) & (survey.phys < ends[np.maximum(at, 0)])
    return np.where(inside, numbers[np.maximum(at, 0)], -1)


def describe(image: Image, *, contents: bool = True) -> dict[str, Any]:
    """Return *image* as a document.

    Args:
        image: to be described.
        contents: whether the format's own pages are in it.
    """
    survey = image.survey
    handover = image.handover
    own = survey.own_spans()
    document: dict[str, Any] = {
        "format": "luo-image",
        "version": 1,
        "source": image.source,
        "notes": list(image.notes),
        "abi": image.abi,
        "bugs": sorted(image.bugs),
        "page_size": image.page_size,
        "memory": [
            {"start": hex(start), "nbytes": nbytes, "node": node}
            for start, nbytes, node in image.ram.ranges
        ],
        "handover": {
            "fdt_phys": hex(handover.fdt_phys),
            "fdt_len": handover.fdt_len,
            "scratch_phys": hex(handover.scratch_phys),
            "scratch_len": handover.scratch_len,
        },
        "root": None,
        "subtrees": [
            {
                "name": subtree.name,
                "phys": None if subtree.phys is None else hex(subtree.phys),
                "nbytes": subtree.nbytes,
                "format": subtree.format,
                "decoded": plain(subtree.decoded),
            }
            for subtree in survey.subtrees
        ],
        "scratch": {
            "phys": hex(handover.scratch_phys),
            "areas": [[hex(phys), nbytes] for phys, nbytes in survey.scratch],
        },
        "map": {
            "format": "radix" if survey.generation.bitmap_bytes is None else "chunks",
            "phys": hex(survey.map_phys),
            "summary": map_summary(survey),
            "blocks": [[hex(phys), order] for phys, order in survey.iter_blocks()],
            "illegal_keys": [[hex(key), hex(leaf)] for key, leaf in survey.illegal_keys],
            "pages": [
                [page.kind, hex(page.phys), page.level, hex(page.prefix), page.keys]
                for page in survey.map_pages
            ],
        },
        "extents": [
            [hex(extent.phys), extent.nbytes, "hole" if extent.data is None else "data"]
            for extent in image.extents
        ],
        "violations": violation_rows(image.verify()),
        "warnings": violation_rows(survey.warnings),
    }
    if survey.fdt is not None:
        document["root"] = {
            "phys": hex(handover.fdt_phys),
            "totalsize": survey.fdt.totalsize,
            "compatible": survey.compatible,
            "nodes": tree_rows(survey.fdt),
        }
    if contents:
        document["contents"] = [
            {
                "phys": hex(part.phys),
                "nbytes": part.nbytes,
                "base64": base64.b64encode(part.data).decode(),
            }
            for span in own
            for part in image.pieces(*span)
            if part.data is not None
        ]
    return document


def subtree_bytes(image: Image, phys: int | None, nbytes: int | None) -> bytes | None:
    """Return a blob, None if the image does not have it all."""
    if phys is None or nbytes is None or not image.written(phys, nbytes):
        return None
    return image.read(phys, nbytes)
