"""How a kernel of each architecture tells the next one where things are."""

import errno

import pytest

from luo import Driver, HandoverError, Kernel, LiveUpdateOps, Machine, StateError, live_update
from luo.kexec import ARCHES, handover_of, record_of
from luo.kho import Handover
from luo.machine import DeviceTree

HANDOVER = Handover(0x12345000, 4096, 0x3FF0000, 48)


def build(machine: Machine, arch: str) -> Kernel:
    return Kernel(machine, drivers=[Driver("d", LiveUpdateOps())], arch=arch)


@pytest.fixture
def machine() -> Machine:
    tree = DeviceTree()
    tree.add("one", driver="d")
    return Machine("256MiB", tree)


@pytest.mark.parametrize("arch", ARCHES)
def test_record_of_an_architecture_reads_back(arch):
    """What a kernel leaves, one of its architecture finds."""
    assert HANDOVER == handover_of(arch, record_of(arch, HANDOVER))


@pytest.mark.parametrize(("writer", "reader"), [ARCHES, ARCHES[::-1]])
def test_record_of_another_architecture_is_refused(writer, reader):
    """A kernel of another architecture does not find it."""
    with pytest.raises(HandoverError):
        handover_of(reader, record_of(writer, HANDOVER))


def test_record_of_x86_is_the_setup_data_node():
    """Type 10, 32 bytes behind the head, then the four numbers (kho-abi 9.1)."""
    node = bytes.fromhex(record_of("x86_64", HANDOVER))

    assert (48, 10, 32) == (
        len(node),
        int.from_bytes(node[8:12], "little"),
        int.from_bytes(node[12:16], "little"),
    )


@pytest.mark.parametrize("arch", ARCHES)
def test_live_update_of_an_architecture_keeps_the_device(machine, arch):
    """Both architectures carry a device over."""
    kernel = build(machine, arch).boot()
    kernel.devices.request("one")
    report = live_update(kernel, build(machine, arch))

    assert (1, None) == (report.devices["reclaimed"], report.error)


def test_prepare_of_an_architecture_without_kho_is_eopnotsupp(machine):
    """An architecture that does not hand over has no live update."""
    kernel = build(machine, "riscv64").boot()
    with pytest.raises(StateError) as caught:
        kernel.luo.prepare()

    assert errno.EOPNOTSUPP == caught.value.errno
