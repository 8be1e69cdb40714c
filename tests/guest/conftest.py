"""What tests of real kernels need: QEMU and a build, and the word that they shall run."""

from __future__ import annotations

import os
import shutil

import machine
import pytest

from luo.image.boot import QEMU


@pytest.fixture(scope="session")
def build() -> machine.Build:
    """Kernel, init and stub; the test is skipped without."""
    if os.environ.get("LUO_KERNEL_TEST") != "1":
        pytest.skip("real kernels boot in 'make kernel-test'")
    found = machine.Build.find()
    if found is None:
        pytest.skip("no kernel to boot: 'make kernel' builds one")
    if shutil.which(QEMU) is None:
        pytest.skip(f"no {QEMU} (Debian: qemu-system-arm)")
    return found
