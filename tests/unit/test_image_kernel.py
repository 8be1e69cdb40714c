"""Kernels on images: what one generation's kernel left, another's takes over."""

import itertools

import numpy as np
import pytest

from luo import drivers, workloads
from luo.image import Image
from luo.image.convert import convert
from luo.liveupdate import State
from luo.machine import Machine

HOST = """
memory = "512MiB"
nodes = 2
[devices]
source = "synthetic"
count = 30
[[vms]]
name = "vm"
count = 1
vcpus = 2
devices = 1
ram = { 4KiB = "1MiB", 2MiB = "30MiB" }
"""
CMDLINE = "kho=on liveupdate=on kho_scratch=16M,16M,16M"
SOME = ["kho-v5-series", "kho-v1-512", "kho-v1", "kho-v4"]


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """For a generation: its image, the devices of the machine and the paths that were kept."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "host.toml").write_text(HOST)

    def run(generation):
        host = workloads.host(str(folder / "host.toml"))
        machine = host.machine()

        def kernel():
            return drivers.kernel(machine, vms=host.vms, kho_abi=generation, cmdline=CMDLINE)

        first, path = kernel().boot(), folder / generation
        owned = (first.devices.driver_ids >= 0) & (first.devices.bus_ids >= 0)
        first.devices.request(owned & first.devices.eligible())
        first.on_handover = lambda handover: Image.from_memory(
            machine.memory, handover, abi=generation
        ).save(path)
        first.kexec_load(kernel())
        first.luo.prepare()
        kept = np.flatnonzero(first.devices.preserved).tolist()
        second = first.kexec()
        second.luo.finish()
        second.close()
        return Image.load(path), machine.devices, host, kept

    return {generation: run(generation) for generation in SOME}


@pytest.mark.parametrize(("start", "target"), list(itertools.product(SOME, SOME)))
def test_kernel_of_another_generation_takes_over_a_converted_image(left, start, target):
    """It is UPDATED, finds every device, reclaims it, and finishes without a failure."""
    image, devices, host, kept = left[start]
    converted = convert(image, target)
    machine = Machine(converted.memory(), devices)
    kernel = drivers.kernel(machine, vms=host.vms, kho_abi=target, cmdline=CMDLINE)

    kernel.boot(converted.handover)

    assert State.UPDATED is kernel.luo.state
    assert kept == np.flatnonzero(kernel.devices.preserved).tolist()
    result = kernel.luo.finish()
    assert ((), ()) == (result.unreclaimed, result.failures)
    kernel.close()


def test_handover_that_cannot_be_saved_cancels_the_update(left):
    """What the hook raises comes out of kexec, and the old kernel runs on."""
    _, devices, host, _ = left["kho-v4"]
    machine = Machine(host.machine().memory, devices)

    def kernel():
        return drivers.kernel(machine, vms=host.vms, cmdline=CMDLINE)

    def refuse(handover):
        raise OSError("no room")

    first = kernel().boot()
    first.devices.request("*")
    first.on_handover = refuse
    first.kexec_load(kernel())
    first.luo.prepare()
    with pytest.raises(OSError, match="no room"):
        first.kexec()

    assert State.NORMAL is first.luo.state
    first.close()
