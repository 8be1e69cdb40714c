"""Hypothesis profiles, and where the facts (spec vectors, golden data) are."""

import faulthandler
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=5000, deadline=None)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev")
)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let no thread that a failed test left behind keep the interpreter from ending."""
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of facts: beside the repository, or where LUO_SHARED says."""
    from facts import MISSING, SHARED

    if SHARED is None:
        pytest.skip(MISSING)
    return SHARED
