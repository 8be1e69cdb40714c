"""Inputs that a fuzzer found something with once: they find nothing any more."""

import importlib.util
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
FOUND = sorted((FUZZ / "found").glob("*-*"))


@pytest.fixture(scope="module")
def targets():
    """The fuzz targets, by name."""
    sys.path.insert(0, str(FUZZ))
    try:
        spec = importlib.util.spec_from_file_location("fuzz_targets", FUZZ / "targets.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FUZZ))
    return module.TARGETS


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_input_that_was_a_finding_is_none_any_more(path, targets):
    """The target returns: it reads the input, or refuses it as it should."""
    target, _ = targets[path.name.rpartition("-")[0]]
    target(path.read_bytes())


def test_seeds_of_every_target_are_accepted(targets):
    """What luo itself wrote is read without a finding."""
    for target, seeds in targets.values():
        for seed in seeds():
            target(seed)
