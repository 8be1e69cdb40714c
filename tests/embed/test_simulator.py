"""The C simulator: what it prints, what it leaves in its RAM, and what it leaks."""

import hashlib

import pytest

from . import reference
from .conftest import without_environment

SOURCE = "examples/c/simulator.c"
MIB = 256

EVERYTHING = """\
state normal
prepare 0
state prepared
preserved 101563
the old kernel: -108
state updated
reclaimed 101563
finish 0
state normal
calls 100000 100000 100000 100000 0
"""


def ram(path):
    """Digest of the RAM in a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def simulate(program, path, *arguments, env=None):
    """Run the program over the RAM in the file *path*."""
    path.touch()
    return without_environment(program, "-m", MIB, "-r", path, *arguments, env=env)


def test_simulator_updates_100000_devices_as_python_does(compiled, tmp_path):
    """States, counts and every byte of RAM are those of the same update from Python."""
    ours, theirs = tmp_path / "python", tmp_path / "c"
    ours.touch()
    lines = reference.run(ours, MIB, 100_000)

    done = simulate(compiled(SOURCE, "-O2"), theirs)

    assert done.returncode == 0, done.stderr
    assert done.stdout == EVERYTHING
    assert done.stdout.splitlines() == lines
    assert "RESTORE  driver     sim         100000 calls" in done.stderr
    assert ram(theirs) == ram(ours)


@pytest.mark.parametrize("steps", [(), ("-s",)], ids=["bulk", "steps"])
def test_simulator_that_fails_returns_python_s_errno_and_leaves_its_bytes(
    steps, compiled, tmp_path
):
    """The callback of one device in the middle fails: -EBUSY, and all before it are cancelled."""
    ours, theirs = tmp_path / "python", tmp_path / "c"
    ours.touch()
    lines = reference.run(ours, MIB, 1000, fail=500)

    done = simulate(compiled(SOURCE, "-O2"), theirs, "-n", 1000, "-f", 500, *steps)

    assert done.returncode == 0, done.stderr
    assert lines == ["state normal", "prepare -16", "state normal", "calls 500 0 0 0 500"]
    assert done.stdout.splitlines()[: len(lines)] == lines
    assert ram(theirs) == ram(ours)


def test_simulator_that_steps_leaves_the_bytes_of_the_bulk_update(compiled, tmp_path):
    """One callback at a time in simulated time, or all at once: the RAM is equal."""
    program = compiled(SOURCE, "-O2")
    bulk = simulate(program, tmp_path / "bulk", "-n", 5000)

    steps = simulate(program, tmp_path / "steps", "-n", 5000, "-s")

    assert (bulk.returncode, steps.returncode) == (0, 0), bulk.stderr + steps.stderr
    # 5,000 devices at 800 ns and a subsystem at 5 µs, in PREPARE, REBOOT, RESTORE and FINISH
    simulated = 4 * (5000 * 800 + 5000)
    assert steps.stdout == bulk.stdout + f"simulated {simulated} ns\n"
    for event in ("RESTORE", "FINISH "):
        assert f"{event}  driver     sim           5000 calls,     4.000 ms" in steps.stderr
    assert ram(tmp_path / "steps") == ram(tmp_path / "bulk")


@pytest.mark.parametrize(
    "arguments",
    [("-n", "100000", "-w", "2"), ("-n", "2000", "-s"), ("-n", "2000", "-f", "7")],
    ids=["bulk", "steps", "failure"],
)
def test_simulator_under_asan_leaks_nothing(arguments, compiled, asan, tmp_path):
    """No report of any kind: what Python keeps to its end is in reach."""
    program = compiled(SOURCE, *asan)

    done = simulate(program, tmp_path / "ram", *arguments, env={"PYTHONMALLOC": "malloc"})

    assert done.returncode == 0, done.stderr
    assert "Sanitizer" not in done.stderr


def test_simulator_that_leaks_is_caught_by_asan(compiled, asan, tmp_path):
    """The test above can fail: what C forgets is reported, Python or not."""
    source = tmp_path / "leak.c"
    source.write_text(
        '#include <stdlib.h>\n#include "luo.h"\nstatic void *volatile kept;\n'
        "int main(void) { if (luo_init(LUO_ABI) != LUO_ABI) return 2;\n"
        "for (int i = 0; i < 3; i++) kept = malloc(777);\nkept = NULL; return 0; }\n"
    )

    done = without_environment(compiled(source, *asan), env={"PYTHONMALLOC": "malloc"})

    assert done.returncode != 0
    assert "detected memory leaks" in done.stderr
