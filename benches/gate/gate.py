"""Hold the instruction counts of the hot paths to the stored ones: ``make gate``.

A clock on a shared machine cannot tell 5 % from noise; callgrind's counts hardly move. Counted for
each path of ``paths.py`` are the instructions in luo's compiled core, and in the Python
interpreter, where a call shows that crept into a bulk path. numpy and libc, which choose their code
by the machine, are "rest": not judged, but shown where something else is not good, since work that
moves between numpy and the core is neither more nor less.

What the core counts depends on its compiler, Cython and Python, so ``counts.json`` has a set for
each for which somebody has stored one; the interpreter's counts are judged on that very build of
it. Without a set nothing is judged, and the reason is said. Exit status: 0 all is within 5 %, or
nothing could be judged; 1 something is not, or a path failed.

    python benches/gate/gate.py             count and compare
    python benches/gate/gate.py --update    count and store
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import luo
import luo._kho

HERE = Path(__file__).resolve().parent
STORED = HERE / "counts.json"
PATHS = HERE / "paths.py"
PARTS = ("core", "interpreter", "rest")
JUDGED = PARTS[:2]
# The interpreter adapts itself to what it has run, not alike each time: where it works for every
# device, its counts differ by 6 % from one directory to another.
TOLERANCE = {"core": 0.05, "interpreter": 0.25}
# Instructions more or less that are no change, however few there are. The interpreter's depend a
# little on where its objects lie; one call of it for each of 20,000 devices is several millions.
SLACK = {"core": 2_000, "interpreter": 1_000_000}

Counts = dict[str, dict[str, int]]
Row = tuple[bool, str, str, int | None, int | None]


class Skip(Exception):
    """Why nothing can be judged here."""


def build_of(core: bytes) -> str:
    """Return what the counts of *core* depend on, from what compiler and Cython left in it.

    Raises:
        Skip: it does not say, or it is not for every x86-64.
    """
    producer = re.search(rb"GNU C\d+ (\d+)\.[\d.]+ ([^\0]*)\0", core)
    cython = re.search(rb"cython_(\d+)_(\d+)_\d+", core)
    if producer is None or cython is None:
        raise Skip("the core was not built by gcc with -g")
    if b"-fsanitize" in producer[2]:
        raise Skip("the core was built with sanitizers")
    flags = producer[2].decode().split()
    level = [flag for flag in flags if flag.startswith("-O")][-1:]
    chosen = {flag for flag in flags if re.match(r"-(m(?!tune)|fstack-protector|flto)", flag)}
    if platform.machine() == "x86_64" and "-march=x86-64" not in chosen:
        raise Skip(f"the core was built with {' '.join(sorted(chosen))}, not for every x86-64")
    python = ".".join(platform.python_version_tuple()[:2])
    gcc, major, minor = (group.decode() for group in (producer[1], cython[1], cython[2]))
    names = [platform.machine(), f"gcc-{gcc}", f"cython-{major}.{minor}", f"python-{python}"]
    return " ".join([*names, *level, *sorted(chosen)])


def count(core: Path) -> Counts:
    """Run all paths under callgrind; return the instructions of each by part.

    Raises:
        Skip: there is no valgrind, or no compiler.
        SystemExit: a path failed.
    """
    for program in ("valgrind", "gcc"):
        if shutil.which(program) is None:
            raise Skip(f"no {program} (Debian: {program})")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        library = directory / "gate.so"
        flags = ["-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I", luo.get_include()]
        subprocess.run(["gcc", *flags, "-o", library, HERE / "gate.c"], check=True)
        done = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--instr-atstart=no",
                "--compress-strings=no",
                f"--callgrind-out-file={directory}/counted",
                f"--log-file={directory}/log",
                sys.executable,
                "-P",
                PATHS,
                library,
            ],
            # nothing of ours that could make the interpreter count differently
            env={
                "PATH": os.environ["PATH"],
                "PYTHONHASHSEED": "0",
                "PYTHONPATH": str(Path(luo.__file__).parents[1]),
            },
        )
        if done.returncode:
            print((directory / "log").read_text()[-2000:], file=sys.stderr)
            raise SystemExit(1)
        counts = {}
        for dump in sorted(directory.glob("counted.*"), key=lambda path: int(path.suffix[1:])):
            path, objects = read_dump(dump.read_text())
            counts[path] = dict.fromkeys(PARTS, 0)
            for name, instructions in objects.items():
                counts[path][part_of(Path(name).name, core.name)] += instructions
        return counts


def part_of(name: str, core: str) -> str:
    """Return the part that the object file *name* belongs to."""
    if name == core:
        return "core"
    return "interpreter" if re.fullmatch(r"(lib)?python3[.\da-z]*", name) else "rest"


def read_dump(text: str) -> tuple[str, Counter[str]]:
    """Return the name that a dump was given, and its instructions by object file."""
    path = ""
    objects: Counter[str] = Counter()
    where = ""
    called = False  # the line behind "calls=" is what the callee took
    for line in text.splitlines():
        if line.startswith("desc: Trigger: Client Request: "):
            path = line.partition("Request: ")[2]
        elif line.startswith("ob="):
            where = line[3:]
        elif line.startswith("calls="):
            called = True
        elif line[:1].isdigit() or line[:1] in ("+", "-", "*"):
            if not called:
                objects[where] += int(line.split()[1])
            called = False
    return path, objects


def judge(stored: Counts, counted: Counts, judged: tuple[str, ...]) -> Iterator[Row]:
    """Yield (good, path, part, stored, counted); a path that only one side has is not good."""
    for path in {**stored, **counted}:
        for part in PARTS:
            before = stored.get(path, {}).get(part)
            now = counted.get(path, {}).get(part)
            if part not in judged:
                good = True
            elif before is None or now is None:
                good = False
            else:
                good = abs(now - before) <= max(TOLERANCE[part] * before, SLACK[part])
            yield good, path, part, before, now


def table(rows: list[Row]) -> Iterator[str]:
    """Yield lines, those that are not within tolerance marked."""
    width = max(len(path) for _, path, *_ in rows)
    yield f"  {'path':{width}} {'part':11} {'stored':>13} {'counted':>13} {'change':>8}"
    for good, path, part, before, now in rows:
        change = f"{now / before - 1:+.1%}" if before and now is not None else "-"
        numbers = " ".join(f"{'-' if n is None else format(n, ','):>13}" for n in (before, now))
        yield f"{' ' if good else '!'} {path:{width}} {part:11} {numbers} {change:>8}"


def main(arguments: list[str] | None = None) -> int:
    """Count, and compare or store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="store the counts")
    parser.add_argument("--stored", type=Path, default=STORED, help="file of the stored counts")
    options = parser.parse_args(arguments)
    core = Path(luo._kho.__file__)
    document = json.loads(options.stored.read_text()) if options.stored.exists() else {}
    try:
        build = build_of(core.read_bytes())
        if build not in document and not options.update:
            raise Skip(
                f"no counts stored for {build}; there are those for {'; '.join(document) or 'none'}"
            )
        counted = count(core)
    except Skip as why:
        print(f"gate: not judged: {why}")
        return 0
    if options.update:
        document[build] = {"interpreter": sys.version, "paths": counted}
        options.stored.write_text(json.dumps(document, indent=1) + "\n")
        print(f"stored {len(counted)} paths for {build}")
        return 0
    stored = document[build]
    judged = JUDGED if stored["interpreter"] == sys.version else JUDGED[:1]
    rows = list(judge(stored["paths"], counted, judged))
    print(*table([row for row in rows if row[2] in judged]), sep="\n")
    if judged != JUDGED:
        print(f"the interpreter is not judged: stored was {stored['interpreter']}")
    bad = {path for good, path, *_ in rows if not good}
    within = " and ".join(f"{TOLERANCE[part]:.0%} of the {part}'s" for part in judged)
    if not bad:
        print(f"gate: all {len(counted)} paths are within {within}")
        return 0
    print(f"\ngate: {len(bad)} of {len(counted)} paths are not within {within}")
    print(*table([row for row in rows if row[1] in bad]), sep="\n")
    print("If that is meant to be: make gate ARGS=--update, and say why in the commit.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
