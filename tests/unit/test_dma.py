"""Devices that go on writing while the kernel is changed, and whose memory they hit."""

import errno
import gc
import itertools
import logging
import os
import threading

import numpy as np
import pytest
import ring_kernels
from rig import errno_of, leave
from ring_kernels import DISK, NBYTES, NIC, PAGES

from luo import abi, dma
from luo.errors import StateError, SuccessorError
from luo.kernel import Kernel, KernelImage, live_update
from luo.memory import PhysicalMemory

IMAGE = "ring_kernels:kernel"
FORGOTTEN = {"kept": 0}
CUT = {"kept": PAGES - 1}
WATCHED = {"watches": True}

both_successors = pytest.mark.parametrize(
    "in_process", [True, False], ids=["in-process", "second-process"]
)


@pytest.fixture
def machine():
    """A machine whose devices have stopped when the test is over."""
    made = ring_kernels.machine()
    yield made
    for stream in made.streams:
        stream.stop()
    for thread in dma_threads():  # of streams that were collected
        thread.join(30)


def dma_threads():
    """Return the threads of devices."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("dma ")]


def running(machine, *devices, **kwargs):
    """Return a booted kernel that keeps *devices*, and a running ring for each of them."""
    kernel = ring_kernels.kernel(machine, **kwargs).boot()
    streams = []
    for path in devices:
        kernel.devices.request(path)
        streams.append(machine.dma(path, kernel.rings[path][path], NBYTES))
    return kernel, *streams


def ring(machine, stream):
    """Return what is in the ring of *stream*."""
    return bytes(machine.memory.view(stream.phys, stream.nbytes))


# ---- across the change of kernels ----


@both_successors
def test_dma_into_a_preserved_ring_is_all_there_after_five_updates(machine, in_process):
    """Each new kernel sees the device write during blackout; no write is lost, none strays."""
    kernel, stream = running(machine, NIC)
    image = KernelImage(IMAGE, args={"nic": WATCHED})
    before = stream.lap()

    update = live_update(kernel, image, repeat=5, in_process=in_process)

    with update.kernel:
        assert stream.lap() > before + stream.nbytes // 64
        done = stream.stop()
        assert ring(machine, stream) == done.expected()
        assert len(done.expected()) == NBYTES
    assert (done.strays, update.to_dict()["dma"], update.error) == ((), [], None)
    assert update.failures == []


@both_successors
def test_dma_into_a_forgotten_ring_is_caught_with_its_owner(machine, in_process):
    """Device, address, length and what the new kernel has there, wherever that kernel runs."""
    kernel, stream = running(machine, NIC, nic=FORGOTTEN)
    image = KernelImage(IMAGE, args={"nic": FORGOTTEN})

    update = live_update(kernel, image, in_process=in_process)

    update.kernel.close()
    stray = dma.Stray(NIC, stream.phys, NBYTES, "free")
    assert update.to_dict()["dma"] == [stray._asdict()]
    assert stream.stop().strays == (stray,)
    assert (update.error["device"], update.error["message"]) == (NIC, str(stray))


def test_dma_into_memory_that_the_new_kernel_uses_names_the_block(machine, caplog):
    """A forgotten ring that has been allocated again is of that block, and logged at boot."""
    kernel, stream = running(machine, NIC, nic=FORGOTTEN)
    successor = ring_kernels.kernel(machine, nic={"kept": 0, "claims": True})

    with caplog.at_level(logging.WARNING, "luo.dma"):
        live_update(kernel, successor)

    owner = f"allocated {stream.phys:#x}/order 2"
    assert successor.strays == stream.strays == [dma.Stray(NIC, stream.phys, NBYTES, owner)]
    assert [record.getMessage() for record in caplog.records] == [
        f"DMA of {NIC} into {stream.phys:#x}+{NBYTES:#x}, which was not preserved: {owner}"
    ]
    successor.close()


@pytest.mark.parametrize("generation", abi.GENERATIONS)
def test_dma_into_a_partly_preserved_ring_reports_the_page_that_is_missing(machine, generation):
    """Three pages of four were kept: the last one strays, in every generation."""
    options = {"nic": CUT, "kho_abi": generation}
    kernel, stream = running(machine, NIC, **options)

    update = live_update(kernel, ring_kernels.kernel(machine, **options))

    update.kernel.close()
    stream.lap()
    done = stream.stop()
    last_page = dma.Stray(NIC, stream.phys + NBYTES - 4096, 4096, "free")
    assert done.strays == (last_page,)
    assert ring(machine, stream) == done.expected()


def test_dma_of_two_devices_tells_each_its_own(machine):
    """One driver forgets its ring, the other does not: only the first device strays."""
    kernel, nic, disk = running(machine, NIC, DISK, disk=FORGOTTEN)

    update = live_update(kernel, ring_kernels.kernel(machine, disk=FORGOTTEN))

    update.kernel.close()
    assert machine.streams == [nic, disk]
    assert nic.stop().strays == ()
    assert disk.stop().strays == (dma.Stray(DISK, disk.phys, NBYTES, "free"),)


def test_dma_while_a_kernel_boots_cold_strays_with_all_of_it(machine):
    """A kernel that is told nothing keeps nothing, whatever the one before it preserved."""
    kernel, stream = running(machine, NIC)
    leave(kernel)

    with ring_kernels.kernel(machine).boot() as cold:
        assert [(s.device, s.phys, s.nbytes) for s in cold.strays] == [(NIC, stream.phys, NBYTES)]


def test_dma_during_an_update_that_is_cancelled_goes_on(machine):
    """The successor refuses: the old kernel and the device go on, and nothing strays."""
    kernel, stream = running(machine, NIC, nic=FORGOTTEN)
    kernel.kexec_load(KernelImage("kernels:refuses"))
    kernel.luo.prepare()

    with pytest.raises(SuccessorError):
        kernel.kexec()

    stream.lap()
    kernel.close()
    assert stream.stop().strays == ()


def test_dma_goes_on_when_no_kernel_runs(machine):
    """The device belongs to the hardware: the end of the last kernel is nothing to it."""
    kernel, stream = running(machine, NIC)
    kernel.shutdown()

    stream.lap()

    assert machine.streams == [stream]
    done = stream.stop()
    assert ring(machine, stream) == done.expected()


def test_dma_begun_under_a_kernel_in_another_process_is_known_to_the_next(machine):
    """Page state is in the other process; a successor of that kernel is told of the device."""
    kernel, stream = running(machine, DISK, disk=CUT)
    stream.stop()
    image = KernelImage(IMAGE, args={"disk": CUT})
    first = live_update(kernel, image).kernel
    stream = machine.dma(DISK, stream.phys, NBYTES)
    first.devices.request(DISK)

    second = live_update(first, image).kernel

    second.close()
    assert stream.stop().strays == (dma.Stray(DISK, stream.phys + NBYTES - 4096, 4096, "free"),)


def test_dma_from_the_process_of_a_kernel_is_refused():
    """The hardware is in another process; one that it plays would end with its kernel."""
    with ring_kernels.kernel(ring_kernels.machine()).boot() as kernel:
        with pytest.raises(SuccessorError) as caught:
            kernel.kexec_load(KernelImage("ring_kernels:starts_dma"))

        assert caught.value.__cause__.errno == errno.EOPNOTSUPP


# ---- the device ----


@pytest.mark.parametrize(
    ("phys", "nbytes"),
    [
        (0x100000, 0),
        (0x100000, -64),
        (-4096, 4096),
        (64 << 20, 64),
        ((64 << 20) - 64, 128),
        (0x100000, 1 << 64),
        ((1 << 64) - 64, 64),
        ((1 << 64) - 64, 128),
        (1 << 64, 64),
        (0x100000, 100),
    ],
)
def test_dma_of_a_wrong_range_is_einval(machine, phys, nbytes):
    """Empty, outside RAM, wrapping around 64 bits, or no whole entries."""
    assert errno_of(machine.dma, NIC, phys, nbytes) == errno.EINVAL
    assert machine.streams == []


def test_dma_into_a_hole_is_einval():
    """A range that is RAM at both ends and not between them is not RAM."""
    memory = PhysicalMemory(ranges=[(0, 1 << 20, 0), (2 << 20, 1 << 20, 0)])
    machine = ring_kernels.machine(memory)

    assert errno_of(machine.dma, NIC, (1 << 20) - 64, (1 << 20) + 128) == errno.EINVAL


@pytest.mark.parametrize(
    ("device", "error"), [("pci0/fan", KeyError), (77, IndexError), (-1, IndexError)]
)
def test_dma_of_an_unknown_device_is_refused(machine, device, error):
    """A path or an index that no device has."""
    with pytest.raises(error):
        machine.dma(device, 0x100000, NBYTES)


def test_dma_of_a_removed_device_is_index_error(machine):
    """A device that was pulled out writes no more."""
    index = machine.devices[NIC]
    machine.devices.remove(NIC)

    with pytest.raises(IndexError):
        machine.dma(index, 0x100000, NBYTES)


def test_dma_without_a_pause_is_value_error(machine):
    """Without a sleep between bursts the thread would keep the interpreter for itself."""
    with pytest.raises(ValueError, match="interval"):
        machine.dma(NIC, 0x100000, NBYTES, interval=0)


def test_dma_into_memory_attached_read_only_is_erofs(machine):
    """A mapping that may not be written is not written behind its back."""
    memory = machine.memory
    attached = ring_kernels.machine(PhysicalMemory.attach(memory.fd, memory.ranges))

    assert errno_of(attached.dma, NIC, 0x100000, NBYTES) == errno.EROFS


def test_dma_writes_where_the_memory_has_its_bytes():
    """Base, offset in the file and an address within a page are all taken into account."""
    fd = os.memfd_create("bytes")
    os.ftruncate(fd, 3 << 20)
    memory = PhysicalMemory("2MiB", base=1 << 30, fd=fd, offset=1 << 20)
    os.close(fd)
    phys = (1 << 30) + 0x3040
    memory.view(phys - 64, 256)[:] = b"." * 256
    machine = ring_kernels.machine(memory)

    with machine.dma(1, phys, 128, b"abcdefgh") as stream:
        stream.lap()

    assert stream.device == NIC
    assert bytes(memory.view(phys - 64, 256)) == b"." * 64 + b"abcdefgh" * 16 + b"." * 64


def test_stop_twice_gives_the_same_report_and_ends_the_thread(machine):
    """The thread is joined, nothing is written afterwards, and a second call changes nothing."""
    stream = machine.dma(NIC, 0x100000, NBYTES)
    stream.lap()

    first = stream.stop()

    assert stream.stop() == first
    assert (stream.running, machine.streams) == (False, [])
    assert first.bytes_written == 64 * first.writes == 64 * stream.writes
    assert dma_threads() == []
    assert errno_of(stream.lap) == errno.ESHUTDOWN


def test_stream_that_nobody_refers_to_stops(machine):
    """The machine does not hold its streams; their threads do not either."""
    stream = machine.dma(NIC, 0x100000, NBYTES)
    (thread,) = dma_threads()

    del stream
    gc.collect()
    thread.join(30)

    assert not thread.is_alive()
    assert machine.streams == []


def test_pattern_of_numbers_is_what_stands_in_the_ring(machine):
    """Each entry holds what the pattern gives for the last write that went there."""
    stream = machine.dma(NIC, 0x100000, 48, lambda number: b"%016d" % number)
    stream.lap()
    done = stream.stop()

    assert [int(done.expected()[at : at + 16]) for at in (0, 16, 32)] == [
        done.last(entry) for entry in range(3)
    ]
    assert ring(machine, stream) == done.expected()


def test_last_write_of_each_entry_follows_from_their_number():
    """Ten writes into a ring of four; two writes into it; an entry that it does not have."""

    def report(writes):
        return dma.DmaReport(NIC, 0, 256, 64, writes, (), dma.stamp)

    assert [report(10).last(entry) for entry in range(4)] == [8, 9, 6, 7]
    assert [report(2).last(entry) for entry in range(4)] == [0, 1, None, None]
    assert report(2).expected() == dma.stamp(0) + dma.stamp(1)
    assert report(0).expected() == b""
    with pytest.raises(IndexError):
        report(10).last(4)


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        (lambda number: bytes(64) if number < 100 else 1 // 0, ZeroDivisionError),
        (lambda number: bytes(64 if number < 100 else 63), ValueError),
    ],
    ids=["raises", "changes length"],
)
def test_pattern_that_fails_ends_the_device_and_is_raised_by_stop(machine, pattern, error):
    """The thread keeps what happened for who stops the device."""
    stream = machine.dma(NIC, 0x100000, NBYTES, pattern)
    assert errno_of(stream.lap) == errno.ESHUTDOWN

    with pytest.raises(error):
        stream.stop()

    assert stream.writes == 100


# ---- whose memory it is ----


def owners(kernel, phys, nbytes=1):
    """Return the owners of a stretch of memory."""
    return [extent.owner for extent in dma.whose(kernel, phys, nbytes)]


def test_whose_covers_the_range_and_joins_neighbours(machine):
    """Extents follow one upon the other, from the first byte to the last."""
    with ring_kernels.kernel(machine).boot() as kernel:
        phys = kernel.rings[NIC][NIC]
        extents = dma.whose(kernel, phys + 100, NBYTES)
        everything = dma.whose(kernel, 0, machine.memory.size)

        assert extents[0] == dma.Extent(phys + 100, NBYTES - 100, f"allocated {phys:#x}/order 2")
        for some, first, nbytes in (
            (extents, phys + 100, NBYTES),
            (everything, 0, machine.memory.size),
        ):
            ends = [extent.phys + extent.nbytes for extent in some]
            assert [first, *ends] == [*(extent.phys for extent in some), first + nbytes]
        assert all(a.owner != b.owner for a, b in itertools.pairwise(everything))


def test_whose_names_what_a_kernel_has(machine):
    """Page 0, scratch, KHO's pages, named regions, and blocks, which may be preserved."""
    cmdline = "kho=on liveupdate=on reserve_mem=16K:4K:log"
    with ring_kernels.kernel(machine, cmdline=cmdline).boot() as kernel:
        phys, kho = kernel.rings[NIC][NIC], kernel.kho
        before = owners(kernel, phys)
        kho.preserve_folio(phys, 2)
        blob = kho.save_subtree("blob", bytes(100))
        scratch = next(area for area in kho.scratch if area[1])
        free, order = (int(column[-1]) for column in kernel.memory.free_blocks())

        assert before == [f"allocated {phys:#x}/order 2"]
        assert owners(kernel, phys) == [f"preserved {phys:#x}/order 2"]
        assert owners(kernel, blob, 4096) == ["subtree blob"]
        assert owners(kernel, scratch[0], 4096) == ["scratch"]
        assert owners(kernel, kho.fdt_phys) == ["KHO root tree"]
        assert owners(kernel, kho.root_phys) == ["KHO tree page"]
        assert owners(kernel, kernel.reserved.regions["log"].phys) == ["reserve_mem log"]
        assert owners(kernel, free, 4096 << order) == ["free"]
        assert owners(kernel, 0) == ["reserved"]
        pages = [extent for extent in dma.whose(kernel, 0, machine.memory.size)
                 if extent.owner == "KHO tree page"]  # fmt: skip
        assert sum(extent.nbytes for extent in pages) == kho.tree_pages * 4096


def test_whose_names_what_the_previous_kernel_left(machine):
    """Records and slots until FINISH, a preserved block until it is restored, and the trees."""
    kernel, _ = running(machine, NIC)
    extra = kernel.kho.alloc_preserve(8192)
    kernel.kexec_load(ring_kernels.kernel(machine))
    kernel.luo.prepare()
    slot = int(kernel.devices.slot_phys[0, machine.devices[NIC]])

    with kernel.kexec() as new:
        heads = new.luo.incoming.devices
        entries = new.kho.incoming.read_blocks(heads["records"], abi.LUO_EXTENT_BYTES)
        record = int.from_bytes(entries[0, :8].tobytes(), "little")
        root = new.kho.incoming.handover.fdt_phys
        updated = [owners(new, phys) for phys in (slot, record, extra, root)]
        node = owners(new, new.luo.incoming.phys)
        new.luo.finish()
        finished = [owners(new, phys) for phys in (slot, record, extra, root)]

    block = [f"preserved {extra:#x}/order 1 by the previous kernel"]
    tree = ["KHO root tree of the previous kernel"]
    assert updated == [["device slots"], ["device records"], block, tree]
    assert node == ["subtree liveupdate_orchestrator of the previous kernel"]
    assert finished == [["free"], ["free"], block, tree]


def test_whose_without_kho_knows_blocks_only(machine):
    """With kho=off there is nothing of KHO's, and asking is no error."""
    cmdline = "kho=off reserve_mem=16K:4K:log"
    with ring_kernels.kernel(machine, cmdline=cmdline).boot() as kernel:
        phys = kernel.rings[NIC][NIC]

        assert owners(kernel, phys, NBYTES) == [f"allocated {phys:#x}/order 2"]
        assert owners(kernel, kernel.reserved.regions["log"].phys) == ["reserve_mem log"]


@pytest.mark.parametrize(
    ("phys", "nbytes"), [(0, 0), (0, -1), (-1, 2), (64 << 20, 1), (1 << 64, 1)]
)
def test_whose_of_a_wrong_range_is_einval(machine, phys, nbytes):
    """Empty or outside RAM."""
    with ring_kernels.kernel(machine).boot() as kernel:
        assert errno_of(dma.whose, kernel, phys, nbytes) == errno.EINVAL


def test_whose_in_a_kernel_that_is_gone_is_eshutdown(machine):
    """It has no memory any more."""
    kernel = Kernel(machine).boot()
    kernel.close()

    with pytest.raises(StateError) as caught:
        dma.whose(kernel, 0x100000, 4096)

    assert caught.value.errno == errno.ESHUTDOWN


def test_check_names_a_ring_that_was_freed_under_its_device(machine):
    """Nothing is said of it until somebody asks; a ring that is allocated is in order."""
    kernel, stream = running(machine, NIC)
    before = dma.check(kernel)
    kernel.memory.free_pages(stream.phys, PAGES)

    assert before == kernel.strays == []
    assert dma.check(kernel) == [dma.Stray(NIC, stream.phys, NBYTES, "free")]
    kernel.close()


def test_check_of_a_kernel_in_another_process_asks_it(machine):
    """The ring is what the other process says that it is: allocated, or free if forgotten."""
    kernel, nic, disk = running(machine, NIC, DISK, disk=FORGOTTEN)

    with live_update(kernel, KernelImage(IMAGE, args={"disk": FORGOTTEN})).kernel as new:
        free = dma.Stray(DISK, disk.phys, NBYTES, "free")

        assert dma.check(new) == new.strays == [free]
        assert dma.whose(new, np.uint64(nic.phys), 1) == [
            dma.Extent(nic.phys, 1, f"allocated {nic.phys:#x}/order 2")
        ]


@pytest.mark.parametrize(
    ("place", "owner"), [("fdt_phys", "KHO root tree"), ("root_phys", "KHO tree page")]
)
@pytest.mark.parametrize(
    "pattern", [None, b"\xff" * 64, b"\0\x10\0\0\0\0\0\0" * 8], ids=["stamp", "ones", "pages"]
)
def test_check_names_kho_pages_under_a_device(machine, place, owner, pattern):
    """A device that writes over the trees is caught even if they cannot be read any more."""
    with ring_kernels.kernel(machine).boot() as kernel:
        kernel.kho.save_subtree("blob", b"*")
        stream = machine.dma(NIC, getattr(kernel.kho, place), 4096, pattern)
        stream.lap()

        assert dma.check(kernel) == [dma.Stray(NIC, stream.phys, 4096, owner)]
