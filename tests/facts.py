"""Where the facts are (specification, vectors, golden data), for tests and their parameters."""

import json
import os
from functools import cache
from pathlib import Path

import pytest

_CANDIDATE = Path(os.environ.get("LUO_SHARED") or Path(__file__).resolve().parents[2] / "shared")

SHARED: Path | None = _CANDIDATE if (_CANDIDATE / "spec").is_dir() else None
"""Directory ``shared`` beside the repository, or where LUO_SHARED says; None if missing."""

MISSING = "no directory 'shared' beside the repository, and LUO_SHARED is not set"
"""Reason of a skip."""


@cache
def _load() -> dict[str, list[dict[str, object]]]:
    assert SHARED is not None
    return json.loads((SHARED / "spec" / "kho_vectors.json").read_text())


def sections() -> list[str]:
    """Names of the sections of vectors."""
    return list(_load())


def vectors(section: str, label: str = "") -> pytest.MarkDecorator:
    """Parametrize ``vector`` with each vector of *section*, named by its field *label*."""
    if SHARED is None:
        rows = [pytest.param({}, marks=pytest.mark.skip(reason=MISSING))]
    else:
        found = _load()[section]
        rows = [
            pytest.param(row, id=str(row.get(label, f"{index:02}")))
            for index, row in enumerate(found if isinstance(found, list) else [found])
        ]
    return pytest.mark.parametrize("vector", rows)
