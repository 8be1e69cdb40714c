"""Memfds in sessions: what keeping one costs, against copying it.

Linux hands the pages of a memfd over as they are; here they are copied to memory that crosses, and
out of it. So the peer is the copy alone: of the file to touched memory with ``preadv``, of touched
memory to a new file with ``pwritev``. The jump compares all of the file, and copies nothing of what
does not differ. Contents are random, in folios of order 0.
"""

import mmap
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Plan
from race import Contender, Results

from luo.files import FileArgs
from luo.kho import Kho
from luo.memfd import memfd_handler
from luo.memory import PhysicalMemory

SEED = 1
PAGE = 4096
MIB = 1 << 20
PIECE = 16 * MIB

entries = pytest.mark.entries
SIZES = {"smoke": [MIB], "quick": [64 * MIB], "full": [64 * MIB, 1024 * MIB]}


class Files:
    """A memfd, memory that has room for it, and the copies that the peer makes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = PhysicalMemory(nbytes + nbytes // 64 + 16 * MIB)
        self.kho = Kho(self.memory, scratch=[])
        self.handler = memfd_handler()
        self.fd = os.memfd_create("bench")
        rng = np.random.default_rng(SEED)
        for at in range(0, nbytes, MIB):
            os.pwrite(self.fd, rng.bytes(MIB), at)
        self.memory.prefault_free(nbytes + nbytes // 128 + 4 * MIB)
        self.room = memoryview(mmap.mmap(-1, nbytes))
        self.read()  # touches it

    def args(self, kho: Kho, file: int | None, data: int = 0) -> FileArgs:
        kernel = SimpleNamespace(kho=kho, memory=self.memory)
        return FileArgs(kernel, self.handler, "bench", 1, file, data)

    def preserve(self) -> FileArgs:
        args = self.args(self.kho, self.fd)
        self.handler.preserve(args)
        return args

    def read(self, _: Any = None) -> None:
        for at in range(0, self.nbytes, PIECE):
            assert os.preadv(self.fd, [self.room[at : at + PIECE]], at) > 0

    def write(self, _: Any = None) -> int:
        fd = os.memfd_create("copy")
        for at in range(0, self.nbytes, PIECE):
            assert os.pwritev(fd, [self.room[at : at + PIECE]], at) > 0
        return fd

    def check(self, fd: int) -> None:
        assert os.fstat(fd).st_size == self.nbytes
        for at in range(0, self.nbytes, MIB):
            assert os.pread(fd, MIB, at) == os.pread(self.fd, MIB, at)


class Turns:
    """What one contender made in its last turn, and has to take back before the next."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], object]] = []

    def begin(self) -> None:
        while self.undo:
            self.undo.pop()()


def preserve(plan: Plan, nbytes: int) -> Results:
    """PRESERVE of a file in memory that is there."""
    files, turns = Files(nbytes), Turns()

    def run(_: Any) -> FileArgs:
        args = files.preserve()
        turns.undo.append(partial(files.handler.unpreserve, args))
        return args

    def check(args: FileArgs) -> None:
        view = b"".join(bytes(files.memory.view(int(p), PAGE)) for p in args.private.folios[:256])
        assert view == os.pread(files.fd, len(view), 0)

    contenders = [Contender("luo", run, turns.begin, check), Contender("file copy", files.read)]
    return _race(plan, files, contenders)


def freeze(plan: Plan, nbytes: int) -> Results:
    """The jump: nothing has changed."""
    files = Files(nbytes)
    args = files.preserve()

    def check(_: Any) -> None:
        assert (files.nbytes, 0) == (
            args.private.cost.compared_bytes,
            args.private.cost.recopied_bytes,
        )

    contenders = [
        Contender("luo", lambda: files.handler.freeze(args), check=check),
        Contender("file copy", files.read),
    ]
    return _race(plan, files, contenders)


def retrieve(plan: Plan, nbytes: int) -> Results:
    """A new memfd of what was handed over; the next kernel has booted."""
    files, turns = Files(nbytes), Turns()

    def setup() -> FileArgs:
        turns.begin()
        kept = files.preserve()
        handover = files.kho.handover()
        files.kho.close()
        files.kho = Kho.boot(files.memory, handover)
        return files.args(files.kho, None, kept.data)

    def run(args: FileArgs) -> int:
        files.handler.retrieve(args)
        turns.undo.append(partial(os.close, args.file))
        return args.file

    def write(_: Any = None) -> int:
        fd = files.write()
        turns.undo.append(partial(os.close, fd))
        return fd

    contenders = [
        Contender("luo", run, setup, files.check),
        Contender("file copy", write, turns.begin, files.check),
    ]
    return _race(plan, files, contenders)


def _race(plan: Plan, files: Files, contenders: list[Contender]) -> Results:
    try:
        return plan.race(
            contenders, items=files.nbytes // PAGE, bytes=files.nbytes, abi="kho-v4", seed=SEED
        )
    finally:
        os.close(files.fd)


@entries("memfd.preserve", ["luo", "file copy"], **SIZES)
def bench_memfd_preserve(replay: Callable[..., None], size: int) -> None:
    """PRESERVE of a memfd, against reading it into touched memory."""
    replay(preserve, size)


@entries("memfd.freeze", ["luo", "file copy"], **SIZES)
def bench_memfd_freeze(replay: Callable[..., None], size: int) -> None:
    """What a memfd that did not change costs the jump, against reading it."""
    replay(freeze, size)


@entries("memfd.retrieve", ["luo", "file copy"], **SIZES)
def bench_memfd_retrieve(replay: Callable[..., None], size: int) -> None:
    """Retrieving a memfd, against writing touched memory to a new one."""
    replay(retrieve, size)
