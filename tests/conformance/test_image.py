"""Handovers that luo wrote, read by the walker through the memory's file alone."""

import json
import os
import struct
import subprocess
import sys

import kho_walker
import model
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luo.kho import Handover, Kho
from luo.memory import PhysicalMemory

PAGE = 4096
MIB = 1 << 20


def file_reader(memory: PhysicalMemory) -> kho_walker.Read:
    """Reads the memory's file with pread; never touches the mapping."""

    def read(phys: int, nbytes: int) -> bytes:
        if not any(s <= phys and phys + nbytes <= s + n for s, n, _ in memory.ranges):
            raise kho_walker.Broken("read outside RAM", phys)
        return os.pread(memory.fd, nbytes, memory.offset + phys - memory.base)

    return read


def read_image(memory: PhysicalMemory, handover: Handover) -> kho_walker.Image:
    """The image, all its rules checked."""
    image = kho_walker.read_handover(
        file_reader(memory),
        handover.fdt_phys,
        handover.fdt_len,
        handover.scratch_phys,
        handover.scratch_len,
        memory.page_size.bit_length() - 1,
    )
    kho_walker.check_image(image, [(start, nbytes) for start, nbytes, _ in memory.ranges])
    return image


def preserved(kho: Kho) -> list[model.Block]:
    """What luo says is preserved, in its order."""
    phys, orders = kho.preserved()
    return list(zip(phys.tolist(), orders.tolist(), strict=True))


MACHINES = {
    "small": {"ranges": [(0, 64 * MIB, 0)]},
    "base": {"ranges": [(0x40000000, 512 * MIB, 0)]},
    "numa": {"ranges": [(0, 64 * MIB + 12 * PAGE, 0), (64 * MIB + 12 * PAGE, 128 * MIB, 1)]},
    "holes": {"ranges": [(MIB, 63 * MIB, 0), (1 << 32, 64 * MIB, 0), (1 << 43, 64 * MIB, 1)]},
    "16k": {"ranges": [(0, 256 * MIB, 0)], "page_size": 16384},
    "64k": {"ranges": [(0, 8192 * MIB, 0)], "page_size": 65536},
}


def machine(name: str) -> PhysicalMemory:
    """One of the machines of these tests."""
    return PhysicalMemory(**MACHINES[name])


sizes = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40), st.booleans()), max_size=12)


@pytest.mark.parametrize("name", MACHINES)
@given(sizes=sizes, nr_subtrees=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_handover_of_random_preservations_is_what_the_walker_reads(name, sizes, nr_subtrees, seed):
    """The walker finds exactly what ``Kho.preserved()`` says, in the same order."""
    memory = machine(name)
    kho = Kho(memory)
    random = np.random.default_rng(seed)
    for order, count, by_pages in sizes:
        if by_pages:
            phys = memory.alloc_pages(count)
            kho.preserve_pages(phys, count)
        else:
            folios = memory.alloc_folios(1 + count // (1 << order), order)
            kho.preserve_folios(random.permutation(folios), order)
    blobs = {f"part{i}": random.bytes(1 + 977 * i) for i in range(nr_subtrees)}
    for key, blob in blobs.items():
        kho.save_subtree(key, blob)
    image = read_image(memory, kho.handover())

    assert preserved(kho) == image.preserved
    assert model.walk_order(image.preserved) == image.preserved
    assert len(image.preserved) == kho.nr_preserved
    assert [*reversed(blobs), "kexec-metadata"] == list(image.subtrees)
    read = file_reader(memory)
    assert blobs == {key: read(*image.subtrees[key]) for key in blobs}
    assert kho_walker.read_metadata(read(*image.subtrees["kexec-metadata"]))[2] == 1
    assert [tuple(area) for area in kho.scratch] == image.scratch


@given(sizes=sizes, seed=st.integers(0, 2**32))
def test_handover_after_unpreserving_is_what_the_walker_reads(sizes, seed):
    """What was unpreserved is gone from the tree; its empty pages stay and harm nobody."""
    memory = machine("small")
    kho = Kho(memory)
    before = preserved(kho)
    random = np.random.default_rng(seed)
    kept: list[model.Block] = []
    for order, count, _ in sizes:
        for phys in memory.alloc_folios(1 + count // (1 << order), order).tolist():
            kho.preserve_folio(phys, order)
            if random.integers(2):
                kho.unpreserve_folio(phys, order)
            else:
                kept.append((phys, order))
    image = read_image(memory, kho.handover())

    assert model.walk_order(before + kept) == image.preserved == preserved(kho)


@given(sizes=sizes)
def test_handover_of_a_successor_is_what_the_walker_reads(sizes):
    """The kernel that booted from a handover hands over its own state, with the count raised."""
    memory = machine("numa")
    first = Kho(memory)
    for order, count, _ in sizes:
        first.preserve_folios(memory.alloc_folios(1 + count // (1 << order), order), order)
    handover = first.handover()
    seen = read_image(memory, handover)
    memory.forget()
    second = Kho.boot(memory, handover)
    image = read_image(memory, second.handover())

    assert preserved(second) == image.preserved
    assert seen.scratch == image.scratch
    metadata = file_reader(memory)(*image.subtrees["kexec-metadata"])
    assert kho_walker.read_metadata(metadata)[2] == 2


@given(
    steps=st.lists(st.tuples(st.sampled_from("ar"), st.integers(0, 9), st.integers(1, 31))),
)
def test_root_tree_after_adding_and_removing_equals_libfdts(steps):
    """The root tree is, byte for byte, what libfdt's editor makes of the same calls."""
    oracle = pytest.importorskip("libfdt_oracle")
    memory = machine("small")
    kho = Kho(memory)
    handover = kho.handover()
    read = file_reader(memory)
    page = read(handover.fdt_phys, PAGE)
    root, subtrees = kho_walker.read_root(read, handover.fdt_phys, PAGE)
    values = {"compatible": b"kho-v4\0", "preserved-memory-map": struct.pack("<Q", root)}
    tree = oracle.write(values, {})
    oracle.add_subtree(tree, "kexec-metadata", *subtrees["kexec-metadata"])

    assert oracle.to_bytes(tree) == page[: tree.totalsize()]
    there: dict[str, int] = {}
    for action, index, length in steps:
        name = f"{index}" * length
        if action == "a" and name not in there:
            there[name] = kho.save_subtree(name, bytes(length))
            oracle.add_subtree(tree, name, there[name], length)
        elif action == "r" and name in there:
            kho.remove_subtree(there.pop(name))
            oracle.remove(tree, name)
        page = read(handover.fdt_phys, PAGE)

        assert oracle.to_bytes(tree) == page[: tree.totalsize()]


@pytest.mark.parametrize(("length", "room"), [(7, 70), (13, 61), (19, 57), (25, 51), (31, 49)])
def test_add_subtree_beyond_the_page_is_refused_where_libfdt_refuses(length, room):
    """A page holds as many children as was measured with libfdt; the next one is ENOMEM."""
    memory = machine("small")
    kho = Kho(memory)
    fdt = kho.handover().fdt_phys
    read = file_reader(memory)
    kho.remove_subtree(kho_walker.read_root(read, fdt, PAGE)[1]["kexec-metadata"][0])
    phys = memory.alloc_folio(0)
    kho.preserve_folio(phys, 0)
    for i in range(room):
        kho.add_subtree(f"{i:0{length}}", phys, 8)
    before = read(fdt, PAGE)

    with pytest.raises(MemoryError):
        kho.add_subtree("n" * length, phys, 8)

    total = int.from_bytes(before[4:8], "big")
    assert before[:total] == read(fdt, PAGE)[:total]
    assert room == len(kho_walker.read_root(read, fdt, PAGE)[1])


def test_handover_read_by_a_fresh_process_is_the_same():
    """A process with only the memory's fd and four numbers reads it, without luo."""
    memory = machine("small")
    kho = Kho(memory)
    kho.preserve_folios(memory.alloc_folios(5, 9), 9)
    kho.preserve_folios(memory.alloc_folios(700, 0), 0)
    phys = kho.save_subtree("part", b"content")
    handover = kho.handover()
    numbers = (handover.fdt_phys, handover.fdt_len, handover.scratch_phys, handover.scratch_len)
    child = subprocess.run(
        [sys.executable, "-I", kho_walker.__file__, *map(str, (memory.fd, *numbers))],
        pass_fds=[memory.fd],
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    seen = json.loads(child.stdout)

    assert preserved(kho) == [tuple(block) for block in seen["preserved"]]
    assert seen["subtrees"]["part"] == [phys, len(b"content")]
    assert [list(area) for area in kho.scratch] == seen["scratch"]
    assert not [name for name in seen["modules"] if name.split(".")[0] in ("luo", "numpy")]


def test_reading_a_handover_through_its_file_populates_nothing():
    """pread leaves the holes of the memory's file holes."""
    memory = PhysicalMemory("1TiB")
    kho = Kho(memory)
    kho.preserve_folios(memory.alloc_folios(64, 18), 18)
    handover = kho.handover()
    before = os.fstat(memory.fd).st_blocks
    image = read_image(memory, handover)

    assert before == os.fstat(memory.fd).st_blocks
    assert len([order for _, order in image.preserved if order == 18]) == 64
