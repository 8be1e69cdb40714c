"""What a live update costs, phase by phase: PREPARE, REBOOT, jump, boot, restore, FINISH.

``hosts.py`` says what the devices and their callbacks are, ``updates.py`` how updates are timed:
all kinds of callbacks and the peers in turn, on clones of the same host.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peers
import pytest
from conftest import Plan
from race import Results
from updates import updates

entries = pytest.mark.entries

SIZES = {"smoke": [200], "quick": [10_000, 100_000], "full": [10_000, 100_000, 1_000_000]}
KINDS = ["luo batch", "luo native", "luo python"]


@entries("liveupdate.prepare", [*KINDS, "libfdt"], **SIZES)
def bench_liveupdate_prepare(replay: Callable[..., None], size: int) -> None:
    """Order the devices, allocate slots, write records, call PREPARE callbacks."""
    replay(updates, size)


@entries("liveupdate.reboot", [*KINDS[1:], "PREPARE"], **SIZES)
def bench_liveupdate_reboot(replay: Callable[..., None], size: int) -> None:
    """Call REBOOT callbacks of 1 % of the devices, publish; less a bare loop over Python ones."""
    replay(updates, size)


@entries("liveupdate.reboot.batch", ["luo batch", "PREPARE"], **SIZES)
def bench_liveupdate_reboot_batch(replay: Callable[..., None], size: int) -> None:
    """Call one batch callback for 1 % of the devices, publish; the callback included."""
    replay(updates, size)


@entries("liveupdate.restore", [*KINDS, *(f"PREPARE {k[4:]}" for k in KINDS)], **SIZES)
def bench_liveupdate_restore(replay: Callable[..., None], size: int) -> None:
    """Read map and records, boot on them, call restore callbacks, reclaim."""
    replay(updates, size)


@entries(
    "liveupdate.processes",
    ["luo batch", "luo native", "PREPARE batch", "PREPARE native"],
    **SIZES,
)
def bench_liveupdate_processes(replay: Callable[..., None], size: int) -> None:
    """The same with the next kernel in another process."""
    replay(updates, size)


@entries("liveupdate.finish", KINDS, **SIZES)
def bench_liveupdate_finish(replay: Callable[..., None], size: int) -> None:
    """Call FINISH callbacks, free slots and records, reset the flags."""
    replay(updates, size)


def memory(plan: Plan, n: int) -> Results:
    """A process of its own updates a host of *n* devices, and says what its memory was."""
    native, absent = peers.adapter("native")
    if native is None:
        return Results({}, absent={"luo native": absent})
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("footprint.py")), str(n)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    seconds = [told.pop("seconds")] if plan.scale != "smoke" else []
    return Results({"luo native": seconds}, {"seed": 1, "abi": "kho-v4"}, {"luo native": told})


@entries("liveupdate.memory", ["luo native"], **SIZES)
def bench_liveupdate_memory(replay: Callable[..., None], size: int) -> None:
    """Peak memory of a whole update in one process beyond its image; the time is PREPARE's."""
    replay(memory, size)
