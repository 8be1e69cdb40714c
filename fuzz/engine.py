"""A fuzzer for the compiled core: mutate, run, keep what took a new edge, report what went wrong.

Needs the core of a LUO_SANITIZE=1 build, whose edges and comparisons gcc counts
(``coverage.c``). The worker is a process of its own, since a sanitizer ends it; the input that it
is at lies in a shared file, so that nothing is lost with it.
"""

import argparse
import ctypes
import hashlib
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LIMIT = 1 << 18  # bytes of an input
HANG = 10  # seconds of one run
MEMORY = 2048  # MiB that a worker may have resident, 1024 in one allocation
EDGES, PAIRS = 1 << 16, 1 << 10  # as in coverage.c

Target = Callable[[bytes], None]

INTERESTING = [
    *(0, 1, 2, 3, 4, 7, 8, 9, 16, 17, 0x20, 0x7F, 0xFF, 0x100, 0xFFF, 0x1000, 0x7FFF, 0xFFFF),
    *(0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF, 1 << 32, 1 << 52, 1 << 53),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1),
]


# ---- coverage ----


class Coverage:
    """What the core's runs have covered so far."""

    def __init__(self, core: str) -> None:
        library = ctypes.CDLL(core)
        try:
            edges = (ctypes.c_uint8 * EDGES).in_dll(library, "luo_fuzz_edges")
        except ValueError:
            raise SystemExit(f"{core}: not a LUO_SANITIZE=1 build") from None
        self._edges = np.frombuffer(edges, np.uint8)
        pairs = (ctypes.c_uint64 * (2 * PAIRS)).in_dll(library, "luo_fuzz_pairs")
        self._pairs = np.frombuffer(pairs, np.uint64).reshape(PAIRS, 2)
        self._nr_pairs = ctypes.c_uint64.in_dll(library, "luo_fuzz_nr_pairs")
        self._seen = np.zeros(EDGES, np.uint8)
        # how often an edge was taken counts as 1, 2, 3, 4 to 7, 8 to 15, …: a bit each
        counts = np.arange(256)
        self._class = np.array(
            [0, 1, 2, 4] + [1 << min(int(n).bit_length(), 7) for n in counts[4:]], np.uint8
        )

    def begin(self) -> None:
        """Forget the last run."""
        self._edges.fill(0)
        self._nr_pairs.value = 0

    def is_new(self) -> bool:
        """Whether the run took an edge, or took it so often, as no run before."""
        taken = np.take(self._class, self._edges)
        fresh = taken & ~self._seen
        if not fresh.any():
            return False
        self._seen |= taken
        return True

    def pairs(self) -> list[tuple[int, int]]:
        """Unequal numbers that the run compared."""
        n = min(self._nr_pairs.value, PAIRS)
        return list(dict.fromkeys(map(tuple, self._pairs[:n].tolist())))

    @property
    def nr_edges(self) -> int:
        """Edges seen so far."""
        return int(np.count_nonzero(self._seen))


# ---- mutation ----


class Mutator:
    """Changes inputs; what it does follows from the seed alone."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mutate(
        self, data: bytes, others: Sequence[bytes], pairs: Sequence[tuple[int, int]]
    ) -> bytes:
        """A changed copy of *data*; *pairs*: numbers that a run on it compared."""
        out = bytearray(data)
        choose = self.random
        for _ in range(1 << choose.randrange(5)):
            if not out:
                out += choose.randbytes(16)
            at = choose.randrange(len(out))
            action = choose.randrange(11 if pairs else 10)
            if action == 0:
                out[at] ^= 1 << choose.randrange(8)
            elif action == 1:
                out[at] = choose.randrange(256)
            elif action <= 4:  # a word, at its natural place more often than not
                width = choose.choice((2, 4, 4, 8, 8))
                at -= at % width if choose.random() < 0.8 else 0
                room = out[at : at + width]
                order = choose.choice(("big", "little"))
                if action == 2:
                    value = choose.choice(INTERESTING)
                else:
                    delta = choose.randrange(-16, 17) << (12 if choose.random() < 0.2 else 0)
                    value = int.from_bytes(room, order) + delta
                value &= (1 << 8 * len(room)) - 1
                out[at : at + width] = value.to_bytes(len(room), order)
            elif action == 5:
                del out[at : at + choose.choice((1, 4, 8, choose.randrange(1, 64)))]
            elif action == 6:
                out[at:at] = choose.randbytes(choose.choice((1, 4, 8, 16)))
            elif action == 7:  # a piece again, somewhere else
                piece = out[at : at + choose.choice((4, 8, 16, 48, 256))]
                to = choose.randrange(len(out) + 1)
                out[to : to if choose.random() < 0.5 else to + len(piece)] = piece
            elif action == 8:  # a piece of another input
                other = choose.choice(others) if others else b"\0"
                start = choose.randrange(len(other)) if other else 0
                piece = other[start : start + choose.choice((4, 8, 16, 64, 1024))]
                out[at : at + len(piece) * choose.randrange(2)] = piece
            elif action == 9:
                if choose.random() < 0.3:
                    del out[at:]
            else:
                self._replace(out, *choose.choice(pairs))
        return bytes(out[:LIMIT])

    def _replace(self, out: bytearray, a: int, b: int) -> None:
        """Where one of two compared numbers stands, put the other."""
        choose = self.random
        if choose.random() < 0.5:
            a, b = b, a
        for width in choose.sample((2, 4, 8), 3):
            if max(a, b) >> 8 * width:
                continue
            order = choose.choice(("big", "little"))
            word = a.to_bytes(width, order)
            at = out.find(word, choose.randrange(len(out)))
            at = out.find(word) if at < 0 else at
            if at >= 0:
                out[at : at + width] = b.to_bytes(width, order)
                return


# ---- the worker ----


def shared(path: Path) -> mmap.mmap:
    """The file with the input that runs: u32 length, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.truncate(4 + LIMIT)
        return mmap.mmap(file.fileno(), 4 + LIMIT)


def work(target: Target, seeds: Sequence[bytes], seconds: float, seed: int, current: Path) -> int:
    """Fuzz in this process; 1 if the target raised what it must not."""
    import luo._kho

    coverage, mutator = Coverage(luo._kho.__file__), Mutator(seed)
    window = shared(current)
    corpus: list[tuple[bytes, list[tuple[int, int]]]] = []
    runs, end = 0, time.monotonic() + seconds
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    waiting = list(seeds)
    while time.monotonic() < end:
        is_seed = bool(waiting)
        if is_seed:
            data = waiting.pop()
        else:
            # the newest are looked at most: what led to a new edge leads on
            n = len(corpus)
            index = n - 1 - int(n * mutator.random.random() ** 2)
            origin, pairs = corpus[max(index, 0)]
            data = mutator.mutate(origin, [other for other, _ in corpus[-64:]], pairs)
        window[0:4] = struct.pack("<I", len(data))
        window[4 : 4 + len(data)] = data
        coverage.begin()
        signal.alarm(HANG)
        try:
            target(data)
        except BaseException:
            signal.alarm(0)
            traceback.print_exc()
            return 1
        signal.alarm(0)
        runs += 1
        if coverage.is_new() or is_seed:  # what is all Python takes no edges of the core
            corpus.append((data, coverage.pairs()))
    print(f"{runs} runs, {len(corpus)} inputs kept, {coverage.nr_edges} edges", flush=True)
    return 0


def run(module: str, name: str, seconds: float, seed: int, found: Path) -> int:
    """Fuzz target *name* in a child; 1 if it found something, which is in *found* then."""
    current = HERE / "out" / f"{name}.current"
    current.unlink(missing_ok=True)
    environment = dict(os.environ)
    environment["ASAN_OPTIONS"] = (
        f"{os.environ.get('ASAN_OPTIONS', '')}:detect_leaks=0:halt_on_error=1:abort_on_error=1:"
        f"hard_rss_limit_mb={MEMORY}:max_allocation_size_mb=1024:handle_segv=1"
    )
    environment["UBSAN_OPTIONS"] = "halt_on_error=1:abort_on_error=1:print_stacktrace=1"
    command = [sys.executable, "-P", module, name, "--worker"]
    command += ["--seconds", str(seconds), "--seed", str(seed)]
    print(f"{name}: ", end="", flush=True)
    result = subprocess.run(command, env=environment, timeout=seconds + 120)
    if result.returncode == 0:
        return 0
    if not current.exists():
        return 1  # it did not come as far as a run
    raw = current.read_bytes()
    (length,) = struct.unpack_from("<I", raw)
    data = raw[4 : 4 + length]
    found.mkdir(parents=True, exist_ok=True)
    path = found / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    why = "took too long" if result.returncode == -signal.SIGALRM else f"rc {result.returncode}"
    print(f"{name}: {why}; the input is {path}", flush=True)
    return 1


def main(
    module: str, targets: dict[str, tuple[Target, Callable[[], list[bytes]]]], found: Path
) -> int:
    """Command line: fuzz the named targets one after the other, or replay files."""
    parser = argparse.ArgumentParser(description="Fuzz luo's readers.")
    parser.add_argument("names", nargs="*", choices=[*targets, []], help="targets; default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--replay", type=Path, help="run one target on this file, once")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.names or list(targets)
    if options.replay:
        for name in names:
            targets[name][0](options.replay.read_bytes())
        return 0
    if options.worker:
        (name,) = names
        target, seeds = targets[name]
        current = HERE / "out" / f"{name}.current"
        return work(target, seeds(), options.seconds, options.seed, current)
    return max(run(module, name, options.seconds, options.seed, found) for name in names)
