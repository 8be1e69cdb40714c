"""Areas that are contiguous only in their owner's view."""

import errno
import struct

import numpy as np
import pytest
from facts import vectors

from luo import abi
from luo.errors import HandoverError, KhoError
from luo.kho import Kho
from luo.memory import PhysicalMemory

WITH = [name for name, generation in abi.GENERATIONS.items() if generation.vmalloc]


@pytest.fixture
def memory():
    return PhysicalMemory("256MiB", nodes=2)


def shuffled(memory: PhysicalMemory, n: int, order: int = 0) -> np.ndarray:
    return np.random.default_rng(1).permutation(memory.alloc_folios(n, order))


def handed_over(kho: Kho, descriptor: bytes) -> Kho:
    """Hand over, and boot the next kernel on it."""
    memory = kho.memory
    if kho.generation.finalize is not None and not kho.finalized:
        kho.finalize()
    handover = kho.handover()
    kho.close()
    return Kho.boot(memory, handover, abi=kho.abi)


@pytest.mark.parametrize("abi_name", WITH)
@pytest.mark.parametrize(("n", "order"), [(1, 0), (510, 0), (511, 0), (1500, 0), (7, 3)])
def test_vmalloc_of_any_length_comes_back_in_order(memory, abi_name, n, order):
    """Addresses come back as they were given; the chunks are freed, the blocks are the caller's."""
    kho = Kho(memory, abi=abi_name)
    pages = shuffled(memory, n, order)
    descriptor = kho.preserve_vmalloc(pages, order)
    incoming = handed_over(kho, descriptor).incoming
    free = memory.nr_free_pages()

    assert pages.tolist() == incoming.restore_vmalloc(descriptor).tolist()
    assert free + n // 511 + 1 == memory.nr_free_pages()
    with pytest.raises(HandoverError):
        incoming.restore_vmalloc(descriptor)


def read_chunks(memory: PhysicalMemory, first: int) -> list[list[int]]:
    """The entries of each chunk, from the memory's bytes alone."""
    chunks = []
    while first:
        page = np.frombuffer(memory.view(first, 4096), np.uint64)
        stop = np.flatnonzero(page[1:] == 0)
        chunks.append(page[1:][: stop[0] if len(stop) else None].tolist())
        first = int(page[0])
    return chunks


@vectors("vmalloc_chunk_counts", "entries")
def test_vmalloc_chunks_are_as_many_as_linux_writes(memory, vector):
    """A full chunk is followed by another, which may be empty."""
    kho = Kho(memory, abi="kho-v4")
    descriptor = kho.preserve_vmalloc(memory.alloc_folios(vector["entries"], 0))
    chunks = read_chunks(memory, struct.unpack("=QIHH", descriptor)[0])

    assert vector["chunks"] == len(chunks)
    assert vector["trailing_empty_chunk"] == (chunks[-1] == [])


def test_vmalloc_descriptor_and_chunks_say_what_was_given(memory):
    """Addresses in the area's order, the number of pages, VM_ALLOC, the order."""
    kho = Kho(memory, abi="kho-v4")
    pages = shuffled(memory, 1200)
    first, *numbers = struct.unpack("=QIHH", kho.preserve_vmalloc(pages))

    assert [1200, 1, 0] == numbers
    assert pages.tolist() == [phys for chunk in read_chunks(memory, first) for phys in chunk]


def test_unpreserve_vmalloc_is_the_reverse(memory):
    """The set of preserved blocks and the free pages are as before."""
    kho = Kho(memory, abi="kho-v4")
    pages = shuffled(memory, 600)
    kho.unpreserve_vmalloc(kho.preserve_vmalloc(pages))  # the map's pages stay, as in Linux
    before, free = kho.preserved()[0].tolist(), memory.nr_free_pages()
    kho.unpreserve_vmalloc(kho.preserve_vmalloc(pages))

    assert (before, free) == (kho.preserved()[0].tolist(), memory.nr_free_pages())


def test_preserve_vmalloc_without_memory_for_chunks_leaves_nothing(memory):
    """ENOMEM half-way: no block stays preserved."""
    kho = Kho(memory, abi="kho-v4")
    pages = memory.alloc_folios(600, 0)
    kho.preserve_folios(pages, 0)  # so that the map has its pages
    kho.unpreserve_folios(pages, 0)
    before = kho.preserved()[0].tolist()
    memory.alloc_folios(memory.nr_free_pages(), 0)
    with pytest.raises(KhoError) as caught:
        kho.preserve_vmalloc(pages)

    assert errno.ENOMEM == caught.value.errno
    assert before == kho.preserved()[0].tolist()


@pytest.mark.parametrize("abi_name", [name for name in abi.GENERATIONS if name not in WITH])
def test_vmalloc_of_a_generation_without_it_is_eopnotsupp(memory, abi_name):
    """Before Linux 6.18 there was none."""
    with pytest.raises(KhoError) as caught:
        Kho(memory, abi=abi_name).preserve_vmalloc(memory.alloc_folios(1, 0))

    assert errno.EOPNOTSUPP == caught.value.errno


def test_restore_vmalloc_of_wrong_bytes_is_refused(memory):
    """Circles, addresses out of RAM, wrong counts, chunks that are not preserved."""
    kho = Kho(memory, abi="kho-v4")
    pages = memory.alloc_folios(5, 0)
    first, total, flags, order = struct.unpack("=QIHH", kho.preserve_vmalloc(pages))
    incoming = handed_over(kho, b"").incoming
    words = np.frombuffer(memory.view(first, 4096), np.uint64)
    good = words.copy()

    def refused(word: int = 1, value: int = int(good[1]), **changed: int) -> str:
        words[:] = good
        words[word] = value
        numbers = {"first": first, "total": total, "flags": flags, "order": order} | changed
        with pytest.raises(HandoverError) as caught:
            incoming.restore_vmalloc(struct.pack("=QIHH", *numbers.values()))
        return str(caught.value)

    assert "circle" in refused(word=0, value=first)
    assert "not in RAM" in refused(word=0, value=1 << 50)
    assert "not a preserved page" in refused(word=0, value=first + 4096)
    assert "not preserved" in refused(value=1 << 20)
    assert "aligned" in refused(value=int(good[1]) + 8)
    assert "more than 4" in refused(total=4)
    assert "5 blocks, not 6" in refused(total=6)
    assert "order 3" in refused(order=3)
    assert "order 60" in refused(order=60)
    words[:] = good
    assert (
        pages.tolist()
        == incoming.restore_vmalloc(struct.pack("=QIHH", first, total, flags, order)).tolist()
    )


@pytest.mark.parametrize("wrong", ["twice", "a chunk", "inside a larger block"])
def test_restore_vmalloc_of_blocks_that_cannot_all_be_taken_restores_nothing(memory, wrong):
    """What would fail half-way is refused before the first block is taken."""
    kho = Kho(memory)
    pages = memory.alloc_folios(5, 0)
    larger = memory.alloc_folio(3)
    kho.preserve_folio(larger, 3)
    descriptor = kho.preserve_vmalloc(pages)
    (first,) = struct.unpack_from("<Q", descriptor)
    incoming = handed_over(kho, descriptor).incoming
    words = memory.view(first, 4096).cast("Q")
    words[5] = {"twice": words[1], "a chunk": first, "inside a larger block": larger + 4096}[wrong]
    before = incoming.nr_unrestored

    with pytest.raises(HandoverError):
        incoming.restore_vmalloc(descriptor)

    assert before == incoming.nr_unrestored
