"""Hypothesis profiles, where the facts (spec vectors, golden data) are, and who leaks."""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=5000, deadline=None)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev")
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of facts: beside the repository, or where LUO_SHARED says."""
    from facts import MISSING, SHARED

    if SHARED is None:
        pytest.skip(MISSING)
    return SHARED


@pytest.fixture(autouse=True, scope="module")
def no_leaks():
    """In a checked build: the core holds no more blocks after a file's tests than before."""
    from luo import _kho

    count = getattr(_kho, "_allocations", None)
    if count is None:
        yield
        return
    gc.collect()
    before = count()
    yield
    gc.collect()
    assert before >= count()
