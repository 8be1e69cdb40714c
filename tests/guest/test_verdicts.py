"""What Linux 7.3 does with each wrong handover of ``verdicts.py`` is what the verdict says.

With LUO_RECORD=1 in the environment what was seen is written to ``verdicts.json``, which
``docs/verdicts.md`` is made from, and which the unit tests compare with the verdicts, too.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import machine
import plain
import pytest
from shapes import Shape, all_shapes
from verdicts import CASES, FLBS, Case, Handmade

from luo.image import Image, boot
from luo.image.verdict import Target, judge

SILENT = 15.0  # a panic before there is a console says nothing
WARNING = re.compile(r"WARNING: |refcount_t: ")
OOPS = re.compile(r"Unable to handle kernel|Internal error: ")


@pytest.fixture(scope="module")
def record(build: machine.Build) -> Iterator[dict[str, str]]:
    """What was seen, by case."""
    found: dict[str, str] = {}
    yield found
    if os.environ.get("LUO_RECORD") == "1" and set(found) == set(CASES):
        document = {
            "kernel": build.image.with_name("version").read_text().strip(),
            "date": datetime.now(UTC).date().isoformat(),
            "seen": {name: found[name] for name in CASES},
        }
        path = Path(__file__).with_name("verdicts.json")
        path.write_text(json.dumps(document, indent=1) + "\n")


def run(build: machine.Build, handmade: Handmade, place: Path, timeout: float) -> machine.Run:
    """Boot with it: QEMU's loader puts kernel, initrd and the handover into place."""
    (place / "initrd").write_bytes(machine.initramfs(build, ["\n".join(handmade.script())]))
    (place / "dtb").write_bytes(handmade.device_tree())
    image = handmade.image(handmade.memory)
    arguments = [
        *boot.machine_arguments(handmade.memory),
        "-kernel", str(build.image), "-initrd", "initrd", "-dtb", "dtb",
        "-append", " ".join([machine.CMDLINE, *handmade.parameters]),
    ]  # fmt: skip
    for i, (start, data) in enumerate(segments(image)):
        (place / f"segment{i}").write_bytes(data)
        arguments += ["-device", f"loader,file=segment{i},addr={start:#x},force-raw=on"]
    guest = machine.Guest(arguments, directory=place, timeout=timeout)
    try:
        guest.wait()
        return guest.run()
    finally:
        guest.stop()


def segments(image: Image) -> Iterator[tuple[int, bytes]]:
    """Yield what the image has, with small gaps filled."""
    start, data = 0, bytearray()
    for extent in image.extents:
        gap = extent.phys - start - len(data)
        if data and gap > 1 << 20:
            yield start, bytes(data)
            data.clear()
        if not data:
            start, gap = extent.phys, 0
        data += bytes(gap) + bytes(extent.data)
    yield start, bytes(data)


def seen(handmade: Handmade, found: machine.Run) -> str:
    """What was seen first, in the words of a verdict."""
    lines = found.console
    text = "\n".join(lines)
    begun = next((i for i, line in enumerate(lines) if "@ 0 start" in line), None)
    if begun is None:
        return "panics" if found.panic or not text.strip() else found.outcome
    if "found kexec handover data" not in text or "disabling KHO revival" in text:
        return "boots cold"
    at_boot = "\n".join(lines[:begun])
    if "reserve_mem" in at_boot and "Revived memory reservation" not in at_boot:
        return "new region"
    if WARNING.search(at_boot):
        return "warning"
    return after_boot(handmade, lines[begun + 1 :])


WHERE = {
    "start": "open", "open": "open", "retrieve-session": "RETRIEVE_SESSION",
    "retrieve": "RETRIEVE_FD", "finish": "FINISH", "close": "FINISH",
}  # fmt: skip


def after_boot(handmade: Handmade, lines: list[str]) -> str:
    """The same, of what PID 1 did."""
    names = {called: name for name, called in handmade.names.items()}
    warned = False
    script = list(handmade.script())
    last = 0
    for line in lines:
        if OOPS.search(line):
            command = script[last].split()[0] if last < len(script) else "end"
            return f"oops at {WHERE.get(command, command)}"
        warned = warned or bool(WARNING.search(line))
        result = re.search(r"@ (\d+) (\S+) (.*)", line)
        if result is None:
            continue
        last, command, text = int(result[1]), result[2], result[3]
        if text.startswith("error=") and "at=read" not in text:
            return f"{text.split()[0][6:]} at {WHERE.get(command, command)}"
        if command != "retrieve":
            continue
        values = dict(part.split("=", 1) for part in text.split() if "=" in part)
        called = script[last - 1].split()[1]
        want = handmade.expect[names.get(called, called), int(script[last - 1].split()[2])]
        has = [int(values[name], 0) for name in ("size", "pos", "seals")]
        if has != [want.size, want.pos, want.seals]:
            return "wrong attributes"
        if values["sha256"] != hashlib.sha256(want.contents).hexdigest():
            return "wrong data"
    if not any("@" in line and " end ok" in line for line in lines):
        return "hang"
    return "warning" if warned else "takes it"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_does_what_the_verdict_says(
    case: Case, build: machine.Build, record: dict[str, str], tmp_path: Path
):
    """Of what is possible, one happens; without a problem the kernel takes it."""
    handmade = case.make()
    verdict = handmade.judged()
    silent = verdict.seen == ("panics",)
    found = run(build, handmade, tmp_path, SILENT if silent else 60)

    what = record[case.name] = seen(handmade, found)

    assert what in verdict.seen, "\n".join([*map(str, verdict.problems[:5]), *found.console[-60:]])


@pytest.mark.parametrize(
    "shape", [s for s in all_shapes() if s.only in ("", "plain")], ids=lambda shape: shape.name
)
def test_what_a_kernel_retrieves_is_taken(shape: Shape):
    """Handovers that ``test_handovers.py`` has a kernel retrieve, two of them not quite as sent."""
    verdict = judge(plain.write(shape), Target(flbs=tuple(FLBS), debug_vm=True))

    other = {"seal-exec": "memfd.seal-exec", "without-flbs": "flb.missing"}
    rules = {problem.rule.id for problem in verdict.problems}
    assert rules == ({other[shape.name]} if shape.name in other else set())


def test_the_cases_are_of_many_kinds():
    """More than 25 wrong handovers, and every outcome."""
    verdicts = [case.make().judged() for case in CASES.values()]

    assert len([v for v in verdicts if v.problems]) >= 25
    assert {v.outcome.name for v in verdicts} == {"TAKES", "COLD", "PANICS", "LATER", "UNDEFINED"}
