"""LUO's data in a handover that somebody changed: the next kernel refuses it, or panics."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig import Log, hand_over, small_kernel, small_machine

from luo import abi
from luo.errors import FdtError, HandoverError, KernelPanic
from luo.machine import Machine
from luo.memory import PhysicalMemory

PAGE = 4096


def left(name: str) -> tuple[Machine, object, dict[int, bytes]]:
    """A machine after REBOOT, its handover, and every page of it that has content."""
    machine = small_machine("64MiB")
    log = Log()
    kernel = small_kernel(machine, log, [log.subsystem("sub")], kho_abi=name).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()
    kernel.luo.reboot()
    handover = hand_over(kernel.kho)
    memory = machine.memory
    pages = {}
    for phys in range(PAGE, memory.size, PAGE):
        if memory.is_populated(phys, PAGE):
            content = bytes(memory.view(phys, PAGE))
            if any(content):
                pages[phys] = content
    kernel.close()
    return machine, handover, pages


LEFT = {}


def again(name: str) -> tuple[Machine, object, dict[int, bytes]]:
    """A fresh machine with the same handover."""
    if name not in LEFT:
        LEFT[name] = left(name)
    machine, handover, pages = LEFT[name]
    memory = PhysicalMemory("64MiB")
    for phys, content in pages.items():
        os.pwrite(memory.fd, content, memory.offset + phys)
    return Machine(memory, machine.devices), handover, pages


@pytest.mark.parametrize("name", sorted(abi.GENERATIONS))
def test_boot_of_the_handover_as_it_was_left_is_updated(name):
    """What the other test changes is right."""
    machine, handover, _ = again(name)
    log = Log()
    kernel = small_kernel(machine, log, [log.subsystem("sub")], kho_abi=name)

    assert kernel.boot(handover).luo.state.name == "UPDATED"
    assert kernel.devices.reclaimed.all()


@given(
    name=st.sampled_from(sorted(abi.GENERATIONS)),
    edits=st.lists(
        st.tuples(
            st.integers(0, 255),
            st.integers(0, PAGE // 4 - 1) | st.integers(0, 127),
            st.sampled_from([0, 1, 2, 3, 4, 9, 0xFFFFFFFF, 0x80000000, 0x1000])
            | st.integers(0, 0xFFFFFFFF),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_validate_of_changed_luo_data_refuses_or_accepts(name, edits):
    """Any words of any page: an error of the two kinds, a panic, or a kernel that can boot."""
    machine, handover, pages = again(name)
    where = sorted(pages)
    for place, index, value, flip in edits:
        phys = where[place % len(where)]
        view = machine.memory.view(phys + 4 * index, 4)
        (old,) = struct.unpack("<I", view)
        view[:] = struct.pack("<I", old ^ value if flip else value)
    before = os.fstat(machine.memory.fd).st_blocks
    kernel = small_kernel(machine, Log(), kho_abi=name)
    try:
        plan = kernel.validate(handover)
    except (HandoverError, FdtError, KernelPanic):
        return
    finally:
        assert before == os.fstat(machine.memory.fd).st_blocks
    kernel.take_over(plan)
    if kernel.luo.state.name == "UPDATED":
        kernel.luo.finish()
