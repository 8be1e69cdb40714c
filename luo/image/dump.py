"""Dump directories: pages of a real machine's memory, read when the next kernel began.

``pages.json`` has the physical addresses (``pages``) and the page size (``page_size``), and
``pages.bin`` the pages in that order. The handover and the ranges of memory come from
``kexec.dtb``, the device tree that the next kernel got; what it does not say, and everything
without one, from ``manifest.json`` (``handoff``, ``machine``). Without either the handover is
looked for in the pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from luo import abi as _abi
from luo.errors import FdtError, HandoverError
from luo.fdt import Fdt, Node
from luo.image.store import Extent, Image
from luo.kho import Handover

__all__ = ["guess_abi", "load_dump", "read_device_tree"]

_PAGES_MAX: Final = 1 << 24
_DEFAULT: Final = "kho-v4"


def load_dump(place: Path, abi: str | None = None, handover: Handover | None = None) -> Image:
    """Open a dump directory; see :meth:`luo.image.Image.load`."""
    index = _json(place / "pages.json")
    manifest = _json(place / "manifest.json") if (place / "manifest.json").exists() else {}
    if not isinstance(manifest, dict):
        raise ValueError(f"{place / 'manifest.json'}: not an object")
    listed = index.get("pages") if isinstance(index, dict) else index
    if not isinstance(listed, list) or len(listed) > _PAGES_MAX:
        raise ValueError(f"{place / 'pages.json'}: has no list of pages")
    page = _number(
        index.get("page_size", manifest.get("page_size", 4096)) if isinstance(index, dict) else 4096
    )
    if page not in _abi.MAX_PAGE_ORDER:
        raise ValueError(f"{place / 'pages.json'}: page size {page}")
    contents = memoryview((place / "pages.bin").read_bytes())
    if len(contents) != len(listed) * page:
        raise ValueError(
            f"{place / 'pages.bin'}: {len(contents)} bytes, {len(listed)} pages are listed"
        )
    addresses = [_number(entry["phys"] if isinstance(entry, dict) else entry) for entry in listed]

    dtb = place / "kexec.dtb"
    if listed and (handover is not None or not (dtb.exists() or "handoff" in manifest)):
        from luo.image.guest_memory import search_pages

        places = ((phys, i * page) for i, phys in enumerate(addresses))
        return search_pages(place / "pages.bin", places, page, abi, handover)
    if dtb.exists():
        try:
            tree = Fdt(dtb.read_bytes())
            told, ranges = read_device_tree(tree)
        except FdtError as error:
            raise ValueError(f"{dtb}: {error}") from error
        if not ranges:  # as with EFI, where it is the memory map that says
            ranges = _ranges(place, manifest)
    else:
        told, ranges = _from_manifest(place, manifest)
    by_address = sorted((phys, i) for i, phys in enumerate(addresses))
    extents: list[Extent] = []
    run: list[int] = []  # [phys, end, index] of adjoining pages that adjoin in the file too
    for phys, i in by_address:
        if run and phys == run[1] and i == run[2] + (run[1] - run[0]) // page:
            run[1] += page
            continue
        if run:
            extents.append(_extent(run, contents, page))
        run = [phys, phys + page, i]
    if run:
        extents.append(_extent(run, contents, page))
    image = Image(
        ranges,
        told,
        extents,
        abi=abi or _named(manifest) or _DEFAULT,
        page_size=page,
        source=str(place),
    )
    if abi is None and not _named(manifest):
        image.abi = guess_abi(image, manifest)
    return image


def read_device_tree(tree: Fdt) -> tuple[Handover, list[tuple[int, int, int]]]:
    """Return handover and ranges of memory that a device tree tells the next kernel.

    Raises:
        HandoverError: ``/chosen`` does not name root tree and scratch.
        ValueError: cells of another number than 1 or 2.
    """
    root = tree.root
    address_cells, size_cells = (
        _cells(root, name, default) for name, default in (("#address-cells", 2), ("#size-cells", 1))
    )
    chosen = tree.node("/chosen").properties if "/chosen" in tree else {}
    handover = Handover.from_chosen(chosen, address_cells, size_cells)
    ranges: list[tuple[int, int, int]] = []
    for node in root.children:
        kind = bytes(node.get("device_type") or b"").rstrip(b"\0")
        if kind != b"memory" and (kind or node.name.split("@")[0] != "memory"):
            continue
        raw = bytes(node.get("reg") or b"")
        entry = 4 * (address_cells + size_cells)
        if len(raw) % entry:
            raise ValueError(f"{node.path}: reg has {len(raw)} bytes")
        where = bytes(node.get("numa-node-id") or b"\0\0\0\0")
        for at in range(0, len(raw), entry):
            split = at + 4 * address_cells
            start = int.from_bytes(raw[at:split], "big")
            nbytes = int.from_bytes(raw[split : at + entry], "big")
            if nbytes:
                ranges.append((start, nbytes, int.from_bytes(where[:4], "big")))
    return handover, ranges


def _cells(root: Node, name: str, default: int) -> int:
    raw = root.get(name)
    value = default if raw is None else int.from_bytes(bytes(raw), "big")
    if value not in (1, 2):
        raise ValueError(f"device tree: {name} is {value}, not 1 or 2")
    return value


def _extent(run: list[int], contents: memoryview, page: int) -> Extent:
    start, end, index = run
    return Extent(start, end - start, contents[index * page :][: end - start])


def _from_manifest(
    place: Path, manifest: Mapping[str, Any]
) -> tuple[Handover, list[tuple[int, int, int]]]:
    try:
        handoff = manifest["handoff"]
        four = [_number(n) for name in ("kho_fdt", "kho_scratch") for n in handoff[name]]
        if len(four) != 4:
            raise ValueError("handoff names not four numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place}: neither kexec.dtb nor a manifest.json with the handoff: {error!r}"
        ) from error
    return Handover(*four), _ranges(place, manifest)


def _ranges(place: Path, manifest: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    try:
        machine = manifest["machine"]
        if "ranges" in machine:
            return [(_number(s), _number(n), _number(node)) for s, n, node in machine["ranges"]]
        return [(_number(machine["ram_base"]), _number(machine["ram_size"]), 0)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place}: neither kexec.dtb nor manifest.json says where memory is: {error!r}"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _number(value: object) -> int:
    if isinstance(value, str):
        value = int(value, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r}: not an address or size")
    return value


def _named(manifest: object) -> str | None:
    """Generation that a manifest names as this library does."""
    names: Iterable[object] = (
        (manifest.get("abi"), manifest.get("generation")) if isinstance(manifest, dict) else ()
    )
    return next((n for n in names if isinstance(n, str) and n in _abi.GENERATIONS), None)


def guess_abi(image: Image, manifest: object = None) -> str:
    """Return the generation by the root tree's compatible; the image's own if that says nothing.

    ``kho-v1`` stands for four formats. What tells them apart is the release of the kernel, if the
    manifest has it; else it is taken for the last of its kind.
    """
    try:
        phys, nbytes = image.handover.fdt_phys, image.handover.fdt_len
        root = Fdt(image.read(phys, min(nbytes, 1 << 26))).root
    except (HandoverError, FdtError):
        return image.abi
    strings = bytes(root.get("compatible") or b"").split(b"\0")
    if b"kho-v1" in strings:
        if any(node.name == "preserved-memory" for node in root.children):
            return "kho-v5-series"
        kernel = manifest.get("kernel") if isinstance(manifest, dict) else None
        release = str(kernel.get("release", "")) if isinstance(kernel, dict) else ""
        found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
        version = tuple(int(part or 0) for part in found.groups()) if found else (7, 0, 0)
        if version < (6, 17, 9):
            return "kho-v1-512"
        return "kho-v1-notifier" if version < (6, 19, 0) else "kho-v1"
    for name, generation in _abi.GENERATIONS.items():
        if generation.compatible.encode() in strings and name == generation.compatible:
            return name
    return image.abi
