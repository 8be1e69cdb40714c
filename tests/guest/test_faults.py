"""A fault of Linux 7.3 that is a quirk here: the real kernel has it, ours if asked by name."""

from __future__ import annotations

import pytest
from machine import Build, boot, next_kernel

from luo import Kernel
from luo.errors import KhoExistsError
from luo.image import Image
from luo.image.boot import virt_machine
from luo.image.verdict import judge
from luo.session import EMPTY_BLOCK

NAMES = [f"s{number}" for number in range(51)]  # fill a block


def test_a_name_that_is_taken_behind_a_full_block_panics_the_next_real_kernel(build: Build) -> None:
    """51 sessions and one that is EEXIST leave an empty block, over which Linux panics."""
    creating = "open\n" + "".join(f"create {name}\n" for name in NAMES)
    refused = f"create {NAMES[0]}\n"

    good = boot(build, [creating + next_kernel(2), "open\npoweroff"])
    bad = boot(build, [creating + refused + next_kernel(2), "open\npoweroff"])

    assert good.outcome == "done"
    assert bad.outcome.startswith("panic")
    assert [result.values["error"] for result in bad.stages[0].errors] == ["EEXIST"]


@pytest.mark.parametrize(("quirks", "outcome"), [((), "done"), ((EMPTY_BLOCK,), "panic")])
def test_our_handover_has_that_block_only_if_asked_for(
    build: Build, quirks: tuple[str, ...], outcome: str
) -> None:
    """The real kernel and the verdict on it agree about ours, with the quirk and without."""
    kernel = Kernel(virt_machine("512MiB"), arch="arm64", file_handlers=(), quirks=quirks)
    with kernel.boot(), kernel.liveupdate.open() as node:
        held = [node.create_session(name) for name in NAMES]
        with pytest.raises(KhoExistsError):
            node.create_session(NAMES[0])
        with kernel.liveupdate.frozen():
            image = Image.from_kernel(kernel)
            run = boot(build, "open\npoweroff", image=image, checked=False)
            verdict = judge(image)

    assert len(held) == len(NAMES)
    assert run.outcome.partition(":")[0] == outcome
    assert bool(verdict.problems) == (outcome == "panic")
