"""Somebody else's extension that does ``cimport luo._kho``, against the installed package."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

import luo
from luo.device import Bus, Driver, LiveUpdateOps, native
from luo.kernel import Kernel
from luo.machine import DeviceTree, Machine
from luo.memory import PhysicalMemory

SOURCE = Path(__file__).with_name("extension.pyx")


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """The extension, translated and compiled with what the package has installed."""
    pytest.importorskip("Cython")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    where = tmp_path_factory.mktemp("cython")
    c = where / "extension.c"
    made = where / f"extension{EXTENSION_SUFFIXES[0]}"
    env = os.environ | {"PYTHONPATH": str(Path(luo.__file__).parents[1])}
    subprocess.run(
        [sys.executable, "-P", "-m", "cython", "-3", SOURCE, "-o", c],
        cwd=where,
        env=env,
        check=True,
    )
    include = [f"-I{path}" for path in (sysconfig.get_path("include"), luo.get_include())]
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", *include, c, "-o", made], check=True)
    loader = ExtensionFileLoader("extension", str(made))
    module = module_from_spec(spec_from_file_location("extension", made, loader=loader))
    loader.exec_module(module)
    return module


def test_cimported_memory_is_read_where_it_lies(extension):
    """Attributes and methods of PhysicalMemory at C level, without the GIL."""
    memory = PhysicalMemory(ranges=[(1 << 20, 1 << 20, 0), (4 << 20, 1 << 20, 0)])
    phys = np.array([1 << 20, (1 << 20) + 8, 4 << 20], np.uint64)
    for number, at in enumerate(phys.tolist(), 1):
        memory.view(at, 8)[:] = number.to_bytes(8, "little")

    assert extension.sum_u64(memory, phys) == 6
    with pytest.raises(IndexError, match="0x200000: no u64 in RAM"):
        extension.sum_u64(memory, np.array([2 << 20], np.uint64))


def test_cimported_device_table_shows_its_columns(extension):
    """The fields of the table are the same that Python's arrays show."""
    tree = DeviceTree()
    tree.add_many(["root", "a", "b", "c"], [-1, 0, 0, 1])

    found = [extension.children_of(tree.table, parent) for parent in (-1, 0, 1, 2)]

    assert found == [1, 2, 1, 0]
    with pytest.raises(TypeError):
        extension.children_of(tree, 0)


def test_callback_in_cython_carries_state_over(extension):
    """A driver of another package, in C by Cython, saves, compares and reclaims 1,000 devices."""
    tree = DeviceTree()
    state = np.arange(8000, dtype=np.uint8).reshape(1000, 8)
    tree.add_many(("dev", 0, 1000), None, "pci", "nic", state=state)
    machine = Machine("64MiB", tree)
    call = native(extension.callback())
    events = ("prepare", "reboot", "restore", "finish")
    ops = LiveUpdateOps(**dict.fromkeys(events, call), state_size=8)
    drivers, buses = [Driver("nic", ops)], [Bus("pci", LiveUpdateOps())]
    old, new = (Kernel(machine, drivers=drivers, buses=buses) for _ in range(2))
    old.boot().devices.request("*")
    old.kexec_load(new)
    old.luo.prepare()
    kernel = old.kexec()
    result = kernel.luo.finish()

    assert (result.unreclaimed, result.failures) == ((), ())
    assert extension.calls() == [1000, 1000, 1000, 0, 1000]
