"""Regions that keep their place by name."""

import errno
import struct

import pytest

from luo import Driver, HandoverError, Kernel, LiveUpdateOps, Machine, live_update
from luo.abi import GENERATIONS
from luo.errors import KhoError
from luo.fdt import Fdt
from luo.machine import DeviceTree
from luo.reserve_mem import ReservedMemory, ReserveMem, memblock_regions

ON = "kho=on liveupdate=on"
ONE = f"{ON} reserve_mem=64K:4K:trace reserve_mem=2M:2M:oops"


@pytest.fixture
def machine() -> Machine:
    tree = DeviceTree()
    tree.add("one", driver="d")
    return Machine("256MiB", tree)


def build(machine: Machine, cmdline: str = ONE, abi: str = "kho-v4") -> Kernel:
    return Kernel(machine, drivers=[Driver("d", LiveUpdateOps())], cmdline=cmdline, kho_abi=abi)


def updated(machine: Machine, abi: str = "kho-v4", **kwargs: str) -> tuple[Kernel, Kernel]:
    """The first kernel's regions are filled; both kernels."""
    old = build(machine, abi=abi).boot()
    old.devices.request("one")
    for region in old.reserved.regions.values():
        machine.memory.view(region.phys, 8)[:] = region.name.encode().ljust(8)
    regions = dict(old.reserved.regions)
    new = build(machine, abi=abi, **kwargs)
    live_update(old, new)
    return regions, new


@pytest.mark.parametrize("abi", GENERATIONS)
def test_region_of_the_same_name_comes_back_with_its_bytes(machine, abi):
    """In every generation, where it was, for as many updates as one likes."""
    regions, new = updated(machine, abi)

    for name, region in regions.items():
        there = new.reserved.regions[name]
        assert (region.phys, region.nbytes, True) == (there.phys, there.nbytes, there.revived)
        assert name.encode().ljust(8) == bytes(machine.memory.view(there.phys, 8))
    new.devices.request("one")
    third = build(machine, abi=abi)
    live_update(new, third)

    assert {r.phys for r in regions.values()} == {r.phys for r in third.reserved.regions.values()}


@pytest.mark.parametrize("abi", GENERATIONS)
def test_region_survives_a_cancelled_update_and_free_pages_are_equal(machine, abi):
    """PREPARE and CANCEL leave as many free pages as before, and the region in place."""
    kernel = build(machine, abi=abi).boot()
    kernel.devices.request("one")
    kernel.luo.prepare()
    kernel.luo.cancel()  # the pages of the map stay, as in Linux
    free = machine.memory.nr_free_pages()
    kernel.luo.prepare()
    kernel.luo.cancel()

    assert free == machine.memory.nr_free_pages()


@pytest.mark.parametrize("change", ["64K:4K:other", "128K:4K:trace", "64K:32M:trace"])
def test_region_of_another_name_size_or_alignment_is_new(machine, change):
    """Whoever asks for something else gets something else; the old one stays where it is."""
    regions, new = updated(machine, cmdline=f"{ON} reserve_mem={change}")
    (region,) = new.reserved.regions.values()

    assert not region.revived
    assert region.phys not in {old.phys for old in regions.values()}


def test_memblock_blob_is_the_tree_that_linux_writes(machine):
    """compatible, then a node a region with compatible, start and size (kho-abi 10.2)."""
    kernel = build(machine, f"{ON} reserve_mem=64K:4K:trace").boot()
    region = kernel.reserved.regions["trace"]
    phys, nbytes = next(
        (struct.unpack("=Q", node["preserved-data"])[0], struct.unpack("=Q", node["blob-size"])[0])
        for node in kernel.kho.root.root.children
        if node.name == "memblock"
    )
    tree = Fdt(machine.memory.view(phys, nbytes)).root

    assert b"memblock-v1\0" == bytes(tree["compatible"])
    (child,) = tree.children
    assert ("trace", b"reserve-mem-v1\0") == (child.name, bytes(child["compatible"]))
    assert struct.pack("=Q", region.phys) == bytes(child["start"])
    assert struct.pack("=Q", 64 << 10) == bytes(child["size"])


def test_region_without_a_place_is_left_out(machine, caplog):
    """The kernel boots without it, and says so."""
    kernel = build(machine, f"{ON} reserve_mem=1G:4K:large reserve_mem=4K:4K:small").boot()

    assert ["small"] == list(kernel.reserved.regions)
    assert "large" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "64K", "64K:4K", "x:4K:a", "0:4K:a", "64K:3K:a", "64K:4K:", "64K:4K:" + 16 * "n"]
)
def test_parse_of_a_wrong_parameter_is_einval(text):
    """size:align:name, the alignment a power of two, the name of 1 to 15 bytes."""
    with pytest.raises(KhoError) as caught:
        ReserveMem.parse(text)

    assert errno.EINVAL == caught.value.errno


def test_ninth_region_is_refused():
    """Linux keeps eight."""
    with pytest.raises(KhoError):
        ReservedMemory([ReserveMem(f"r{i}", 4096, 4096) for i in range(9)])


def test_memblock_regions_of_a_wrong_tree_is_refused(machine):
    """A region without its properties is an error that names it, and the boot goes on without."""
    old = build(machine).boot()
    old.devices.request("one")
    phys = next(
        struct.unpack("=Q", node["preserved-data"])[0]
        for node in old.kho.root.root.children
        if node.name == "memblock"
    )
    blob = machine.memory.view(phys, 4096)
    at = bytes(blob).index(b"reserve-mem-v1")
    blob[at : at + 7] = b"REVERSE"
    new = build(machine)
    live_update(old, new)

    with pytest.raises(HandoverError, match="reserve-mem-v1"):
        memblock_regions(new.kho.incoming)
    assert not any(region.revived for region in new.reserved.regions.values())
