"""Device records that somebody broke are refused before the old kernel is let go.

What the next kernel reads of LUO's own: its node, two chains of blocks, the shards of records.
"""

import os
import struct

import pytest
import rig

from luo import abi
from luo.errors import HandoverError
from luo.fdt import Fdt
from luo.kho import Kho

PAGE = 4096


def left():
    """What a kernel with five preserved devices left: machine, handover, heads of its chains."""
    machine = rig.small_machine()
    kernel = rig.small_kernel(machine, rig.Log()).boot()
    hole = kernel.memory.alloc_folio(10)  # preserved, and never written
    kernel.kho.preserve_folio(hole, 10)
    for device in kernel.devices:
        device.requested = True
    kernel.luo.prepare()
    kernel.luo.reboot()
    phys, nbytes = blob_of(kernel.kho)
    node = Fdt(kernel.memory.view(phys, nbytes)).node("/devices")
    heads = {name: struct.unpack("=Q", node[name])[0] for name in ("records", "slabs")}
    handover = kernel.kho.handover()
    kernel.close()
    return machine, handover, heads, hole


def blob_of(kho):
    """Address and size of LUO's node."""
    node = kho.root.node(f"/{abi.LUO_NODE}")
    return tuple(struct.unpack("=Q", node[name])[0] for name in ("preserved-data", "blob-size"))


def refused(machine, handover):
    """The error with which a successor refuses; validating must fill no hole."""
    successor = rig.small_kernel(machine, rig.Log())
    before = os.fstat(machine.memory.fd).st_blocks
    with pytest.raises(HandoverError) as error:
        successor.validate(handover)
    assert before == os.fstat(machine.memory.fd).st_blocks
    return error.value


def entries(machine, head):
    """A chain's first block as words: next, count, then four words for each entry."""
    return machine.memory.view(head, PAGE).cast("Q")


def test_validate_of_records_as_they_were_left_accepts():
    """What the other tests break is right."""
    machine, handover, _, _ = left()

    assert 5 == len(rig.small_kernel(machine, rig.Log()).validate(handover).records.devices)


@pytest.mark.parametrize("name", ["records", "slabs"])
def test_validate_of_a_block_listed_twice_is_refused(name):
    """A shard listed a million times would be read as often; each block would be freed twice."""
    machine, handover, heads, _ = left()
    words = entries(machine, heads[name])
    words[1] = 2
    words[6:10] = words[2:6]

    assert words[2] == refused(machine, handover).phys


def test_validate_of_a_slab_that_is_a_shard_is_refused():
    """One block is not both."""
    machine, handover, heads, _ = left()
    entries(machine, heads["slabs"])[2] = entries(machine, heads["records"])[2]

    refused(machine, handover)


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 4 << 20, 1 << 63, (1 << 64) - 1])
def test_validate_of_a_shard_in_a_hole_is_refused(nbytes):
    """Preserved memory that nobody ever wrote holds no records, and is not read."""
    machine, handover, heads, hole = left()
    words = entries(machine, heads["records"])
    words[2], words[3] = hole, nbytes

    assert hole == refused(machine, handover).phys


def test_validate_of_a_shard_inside_a_block_is_refused():
    """Only the head of a block can be restored and freed."""
    machine, handover, heads, hole = left()
    entries(machine, heads["records"])[2] = hole + PAGE

    refused(machine, handover)


@pytest.mark.parametrize(("first", "count"), [(1 << 63, 1 << 63), (0, 1 << 40), (3, 3)])
def test_validate_of_a_slab_for_records_that_are_not_there_is_refused(first, count):
    """Counts of any size are compared, not looped over."""
    machine, handover, heads, _ = left()
    words = entries(machine, heads["slabs"])
    words[4], words[5] = first, count

    refused(machine, handover)


def test_validate_of_a_node_in_a_hole_is_refused():
    """LUO's node in preserved memory that nobody ever wrote is not read."""
    machine = rig.small_machine()
    kho = Kho(machine.memory)
    hole = machine.memory.alloc_folio(0)
    kho.preserve_folio(hole, 0)
    kho.add_subtree(abi.LUO_NODE, hole, 100)
    handover = kho.handover()
    kho.close()

    assert hole == refused(machine, handover).phys
