"""Memfds of any contents, changed in any place, in any folios; and records of any bytes."""

import contextlib
import fcntl
import os
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luo.files import FileArgs
from luo.kho import Kho
from luo.memfd import memfd_handler
from luo.memory import PhysicalMemory

PAGE = 4096
SIZE = 40 * PAGE


def args_of(kho, handler, file=None, data=0):
    kernel = SimpleNamespace(kho=kho, memory=kho.memory)
    return FileArgs(kernel, handler, "session", 1, file, data)


def dirty(nbytes):
    """A memory without a page that is zero."""
    memory = PhysicalMemory(nbytes)
    np.frombuffer(memory.view(0, nbytes), np.uint8)[:] = 0xA5
    return memory


WRITE = st.tuples(
    st.just("write"), st.integers(0, SIZE - 1), st.integers(1, 3 * PAGE), st.integers(0, 255)
)
PUNCH = st.tuples(st.just("zero"), st.integers(0, SIZE // PAGE - 1), st.integers(1, 9), st.just(0))


def change(fd, model, step):
    """Do *step* to a file, within its size, and to the bytes that it should have."""
    kind, at, length, value = step
    if kind == "zero":
        at, length = at * PAGE, length * PAGE
    length = max(0, min(length, len(model) - at))
    model[at : at + length] = bytes([value]) * length
    os.pwrite(fd, bytes([value]) * length, at)


@given(
    size=st.one_of(st.integers(0, SIZE), st.integers(0, 40).map(lambda n: n * PAGE)),
    before=st.lists(WRITE, max_size=6),
    after=st.lists(st.one_of(WRITE, PUNCH), max_size=6),
    position=st.integers(0, 1 << 62),
    seals=st.integers(0, 15).filter(lambda seals: not seals & fcntl.F_SEAL_WRITE),
    max_order=st.integers(0, 6),
    holes=st.integers(0, (1 << 16) - 1),
)
def test_what_the_file_held_at_the_jump_comes_back(
    size, before, after, position, seals, max_order, holes
):
    """Contents, size, position, seals; whatever changed, and wherever free memory lay."""
    memory = dirty(1 << 20)
    kho = Kho(memory, scratch=[])
    # Every 16 pages of free memory have the same pages taken.
    for phys in range(0, 48 * PAGE, PAGE):
        if holes >> (phys // PAGE % 16) & 1:
            with contextlib.suppress(OSError):
                memory.claim(phys, 0)
    handler = memfd_handler(max_order)
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    back = -1
    try:
        os.ftruncate(fd, size)
        model = bytearray(size)
        for step in before:
            change(fd, model, step)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        args = args_of(kho, handler, fd)
        handler.preserve(args)
        for step in after:
            change(fd, model, step)
        os.lseek(fd, position, os.SEEK_SET)
        handler.freeze(args)
        assert all(
            kho.is_preserved(int(p), int(o))
            for p, o in zip(args.private.folios, args.private.orders, strict=True)
        )
        handover = kho.handover()
        kho.close()
        late = args_of(Kho.boot(memory, handover), handler, data=args.data)
        handler.retrieve(late)
        back = late.file

        assert bytes(model) == os.pread(back, size + 1, 0)
        assert size == os.fstat(back).st_size
        assert position == os.lseek(back, 0, os.SEEK_CUR)
        assert seals == fcntl.fcntl(back, fcntl.F_GET_SEALS)
        assert 2 == late.incoming.nr_unrestored  # root tree and metadata
    finally:
        os.close(fd)
        if back >= 0:
            os.close(back)


EDGES = [0, 1, 2, 3, 7, 8, 4095, 4096, 4097, 1 << 12, 1 << 20, 1 << 31, 1 << 32, 1 << 51, 1 << 52,
         3 << 52, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip


@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(["record", "chunk", "array"]),
            st.integers(0, 9),
            st.one_of(
                st.sampled_from(EDGES),
                st.integers(0, 63).map(lambda page: page * PAGE),
                st.integers(0, 63).map(lambda pfn: 3 << 52 | pfn),
                st.integers(0, (1 << 64) - 1),
            ),
        ),
        min_size=1,
        max_size=5,
    ),
    ask=st.booleans(),
)
def test_any_bytes_are_a_file_or_an_error(changes, ask):
    """Any words in it break nothing; each page but 0 is free, or the next kernel's, or held."""
    memory = PhysicalMemory(1 << 20)
    kho = Kho(memory, scratch=[])
    handler = memfd_handler(2)
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.pwrite(fd, bytes(range(256)) * 16 * 11, 0)
    args = args_of(kho, handler, fd)
    handler.preserve(args)
    os.close(fd)
    words = np.frombuffer(memory.view(0, memory.size), np.uint64)
    at = {"record": args.data // 8}
    at["chunk"] = int(words[at["record"] + 4]) // 8
    at["array"] = int(words[at["chunk"] + 1]) // 8
    for of, word, value in changes:
        words[at[of] + word] = value
    size = int(words[at["record"] + 1])
    handover = kho.handover()
    kho.close()
    late = args_of(Kho.boot(memory, handover), handler, data=args.data)
    open_before = os.listdir("/proc/self/fd")
    if ask:
        try:
            handler.retrieve(late)
        except OSError as error:
            late.retrieve_status = -error.errno
        else:
            late.retrieve_status = 1
            assert size == os.fstat(late.file).st_size
            os.close(late.file)
    handler.finish(late)

    assert len(open_before) >= len(os.listdir("/proc/self/fd"))
    _, orders = late.incoming.unrestored()
    held = int((1 << orders.astype(np.int64)).sum()) + late.kho.preserved_pages
    assert memory.nr_pages - 1 == memory.nr_free_pages() + held + late.kho.tree_pages
