"""A real kernel takes handovers of every shape, and gives back every byte."""

from __future__ import annotations

import by_luo
import plain
import pytest
from machine import Build, boot
from shapes import Shape, all_shapes, problems, script

SHAPES = all_shapes()


def of(writer: str) -> list[Shape]:
    return [shape for shape in SHAPES if shape.only in ("", writer)]


@pytest.mark.parametrize("shape", of("plain"), ids=lambda shape: shape.name)
def test_handover_from_the_specification_is_retrieved(build: Build, shape: Shape) -> None:
    """What a plain writer lays out by the specification comes back byte for byte."""
    run = boot(build, script(shape.sessions) + "poweroff", image=plain.write(shape))

    assert problems(shape, run) == []


@pytest.mark.parametrize("shape", of("engine"), ids=lambda shape: shape.name)
def test_handover_of_a_kernel_is_retrieved(build: Build, shape: Shape) -> None:
    """What our kernel preserved comes back byte for byte."""
    with by_luo.kernel_of(shape) as kernel:
        run = boot(build, script(shape.sessions) + "poweroff", image=kernel)

    assert problems(shape, run) == []
