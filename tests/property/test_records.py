"""Device records: written as FdtWriter writes them, read back by path and bus, hostile bytes."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luo import abi
from luo._kho import DeviceList, RecordReader, RecordWriter
from luo.errors import FdtError
from luo.fdt import Fdt, FdtWriter
from luo.machine import DeviceTree

DRIVERS = [b"nic", b"vfio-pci", b""]
BUSES = ["pci", "virtio"]
ROOM = 1 << 20

bounded = settings(deadline=None, max_examples=100)


class Hardware:
    """A few devices, some of which have records."""

    def __init__(self, data):
        n = data.draw(st.integers(1, 24))
        numbers = lambda low, high: st.lists(  # noqa: E731
            st.integers(low, high), min_size=n, max_size=n
        )
        parents = [data.draw(st.integers(-1, row - 1)) for row in range(n)]
        names = [f"dev{row}" + "x" * data.draw(st.integers(0, 5)) for row in range(n)]
        self.buses = data.draw(numbers(-1, 1))
        self.drivers = data.draw(numbers(-1, 2))
        self.tree = DeviceTree()
        for row in range(n):
            bus = BUSES[self.buses[row]] if self.buses[row] >= 0 else None
            self.tree.add(names[row], parents[row] if parents[row] >= 0 else None, bus)
        self.order = data.draw(st.permutations(range(n)))[: data.draw(st.integers(0, n))]
        self.slots = np.array(
            [data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=4, max_size=4))
             for _ in range(n)], np.uint64
        ).reshape(n, 4)  # fmt: skip
        self.phys = np.ascontiguousarray(self.slots[:, ::2].T)
        self.nbytes = np.ascontiguousarray(self.slots[:, 1::2].T)

    @property
    def bus_names(self):
        return [name.encode() for name in self.tree.bus_names]

    def writer(self):
        """What PREPARE makes."""
        return RecordWriter(
            self.tree.table,
            DeviceList(np.array(self.order, np.int32)),
            (np.array(self.drivers, np.int32), DRIVERS),
            (np.array(self.tree.bus_ids), self.bus_names),
            self.phys,
            self.nbytes,
        )

    def write(self, start=0, room=ROOM):
        """The tree of the records from *start* on, as many as have room."""
        writer = self.writer()
        count, nbytes = writer.fit(start, room)
        into = bytearray(b"\xa5" * nbytes)
        writer.write(start, count, into, abi.LUO_DEVICES_COMPATIBLE)
        return count, bytes(into)

    def plain(self, start, count):
        """The same tree, a call for each property."""
        writer = FdtWriter()
        with writer.node(""):
            writer.property_string("compatible", abi.LUO_DEVICES_COMPATIBLE)
            for number, device in enumerate(self.order[start : start + count], start):
                properties = {"path": self.tree.path(device).encode() + b"\0"}
                if self.buses[device] >= 0:
                    properties["bus"] = BUSES[self.buses[device]].encode() + b"\0"
                if self.drivers[device] >= 0:
                    properties["driver"] = DRIVERS[self.drivers[device]] + b"\0"
                properties["state"] = self.slots[device].tobytes()
                properties["index"] = struct.pack("=Q", device)
                writer.add_node(f"device{number}", properties)
        return bytes(writer.finish())


def as_rows(blob):
    """What a tree says, names of properties resolved."""
    return [
        (depth, node.name, {name: bytes(value) for name, value in node.properties.items()})
        for depth, node in Fdt(blob).walk()
    ]


def sample(n=12, bus="pci"):
    """Devices in a chain of bridges, all with a record; a hand-made :class:`Hardware`."""
    hardware = Hardware.__new__(Hardware)
    hardware.tree = DeviceTree()
    for row in range(n):
        hardware.tree.add(f"d{row}", row - 1 if row % 3 else None, bus)
    hardware.buses, hardware.drivers = [0] * n, [row % 2 for row in range(n)]
    hardware.order = list(range(n - 1, -1, -1))
    hardware.phys = np.array([np.arange(n) * 16 + 4096, np.arange(n) * 16 + 4104], np.uint64)
    hardware.nbytes = np.full((2, n), 8, np.uint64)
    hardware.slots = np.stack((hardware.phys[0], hardware.nbytes[0],
                               hardware.phys[1], hardware.nbytes[1]), 1)  # fmt: skip
    return hardware


def slabs_of(hardware):
    return np.array([[4096, 16 * len(hardware.drivers), 0, len(hardware.order)]], np.uint64)


class Reading:
    """A reader, and the columns that it fills."""

    def __init__(self, tree, count, slabs, drivers=DRIVERS):
        n = len(tree.parents)
        self.numbers = np.full(count, -9, np.int32)
        self.owners = np.full((2, count), -9, np.int32)
        self.phys, self.nbytes = np.zeros((2, 2, n), np.uint64)
        buses = [name.encode() for name in tree.bus_names]
        self.reader = RecordReader(
            tree.table, list(drivers), buses, slabs, self.numbers, self.owners,
            self.phys, self.nbytes,
        )  # fmt: skip

    def read(self, blob, count):
        self.reader.read(Fdt(blob, check=False).root, count)


# ---- writing ----


@given(st.data())
@bounded
def test_records_say_what_a_call_for_each_property_says(data):
    """In shards of any size, from any record on; what fits is what fits."""
    hardware = Hardware(data)
    room = data.draw(st.sampled_from([ROOM, 400, 700]))
    start = data.draw(st.integers(0, len(hardware.order)))
    count, blob = hardware.write(start, room)

    plain = hardware.plain(start, count)
    assert as_rows(blob) == as_rows(plain)
    assert len(blob) <= room
    if start + count < len(hardware.order):
        plain = hardware.plain(start, count + 1)
        names = Fdt(plain).walk()
        used = {name for _, node in names for name in node.properties}
        # A shard has all names, whichever its records use.
        missing = sum(len(name) + 1 for name in ("bus", "driver") if name not in used)
        assert len(plain) + missing > room


@pytest.mark.parametrize("n", [1, 9, 10, 11, 101])
def test_records_are_byte_for_byte_those_of_the_sequential_writer(n):
    """If the first has all properties, which settles the order of their names."""
    hardware = sample(n)
    for start in {0, n // 2, n - 1}:
        count, blob = hardware.write(start)
        assert start + count == n
        assert blob == hardware.plain(start, count)


def test_write_into_another_size_or_of_other_records_is_value_error():
    """What was measured is what is written."""
    hardware = sample()
    writer = hardware.writer()
    count, nbytes = writer.fit(0, ROOM)
    for start, nr, size in [
        (0, count, nbytes - 1),
        (0, count, nbytes + 1),
        (0, count - 1, nbytes),
        (1, count, nbytes),
        (-1, 1, nbytes),
        (0, count, 0),
        (0, count, 100),
    ]:
        with pytest.raises(ValueError, match="records"):
            writer.write(start, nr, bytearray(size), abi.LUO_DEVICES_COMPATIBLE)
    for start in (-1, count + 1):
        with pytest.raises(IndexError):
            writer.fit(start, ROOM)


# ---- reading ----


@given(st.data())
@bounded
def test_records_are_read_back_as_they_were_written(data):
    """Numbers, owners and slots, in shards of any size; names that nobody knows are -2."""
    hardware = Hardware(data)
    hardware.nbytes[:] = 0  # slots of no bytes may be anywhere
    count = len(hardware.order)
    reading = Reading(hardware.tree, count, np.zeros((0, 4), np.uint64), [DRIVERS[1], DRIVERS[0]])
    start, room = 0, data.draw(st.sampled_from([ROOM, 700]))
    while start < count:
        here, blob = hardware.write(start, room)
        reading.read(blob, here)
        start += here

    known = {-1: -1, 0: 1, 1: 0, 2: -2}
    assert reading.reader.nr_read == count
    assert reading.reader.lost == []
    assert reading.numbers.tolist() == list(hardware.order)
    assert reading.owners[0].tolist() == [known[hardware.drivers[i]] for i in hardware.order]
    assert reading.owners[1].tolist() == [hardware.tree.bus_ids[i] for i in hardware.order]
    assert (reading.phys[:, hardware.order] == hardware.phys[:, hardware.order]).all()


@given(st.data())
@bounded
def test_records_find_their_devices_wherever_these_are_now(data):
    """By path and bus; the number in a record is a hint. Who is gone is listed."""
    hardware = sample(data.draw(st.integers(1, 20)))
    n = len(hardware.order)
    gone = data.draw(st.sets(st.integers(0, n - 1)))
    moved = data.draw(st.sets(st.integers(0, n - 1)))  # to another bus
    tree = DeviceTree()
    shift = data.draw(st.integers(0, 3))
    for row in range(shift):
        tree.add(f"new{row}", None, "usb")
    there = {}
    for row in range(n):
        above = hardware.tree.path(row).rpartition("/")[0]
        if row in gone or (above and above not in tree):
            continue
        there[row] = tree.add(f"d{row}", above or None, "usb" if row in moved else "pci")
    reading = Reading(tree, n, slabs_of(hardware))
    count, blob = hardware.write()
    reading.read(blob, count)

    expected = [there[i] if i in there and i not in moved else -1 for i in hardware.order]
    assert reading.numbers.tolist() == expected
    assert [(number, path) for number, path, _ in reading.reader.lost] == [
        (number, hardware.tree.path(i))
        for number, i in enumerate(hardware.order)
        if expected[number] < 0
    ]
    assert [state for *_, state in reading.reader.lost] == [
        hardware.slots[i].tolist()
        for number, i in enumerate(hardware.order)
        if expected[number] < 0
    ]


def test_properties_in_another_order_and_nodes_inside_are_read_alike():
    """What an editor may have made of a shard: the order of properties means nothing."""
    hardware = sample()
    writer = FdtWriter()
    with writer.node(""):
        for number, device in enumerate(hardware.order):
            with writer.node(f"any{number}"):
                writer.property("index", struct.pack("=Q", device))
                writer.property("more", b"of it")
                writer.property("driver", b"nic\0")
                writer.property("state", hardware.slots[device].tobytes())
                writer.property("path", hardware.tree.path(device).encode() + b"\0")
                writer.property("bus", b"pci\0")
                with writer.node("inside"):
                    writer.property("path", b"")
    reading = Reading(hardware.tree, 12, slabs_of(hardware))
    reading.read(bytes(writer.finish()), 12)

    assert reading.numbers.tolist() == hardware.order
    assert reading.owners[0].tolist() == [0] * 12


BROKEN = {
    "no path": ("path", None, "path"),
    "a path without end": ("path", b"d5", "path"),
    "an empty path": ("path", b"", "path"),
    "a short state": ("state", bytes(31), "state"),
    "no state": ("state", None, "state"),
    "a long index": ("index", bytes(9), "index"),
    "no index": ("index", None, "index"),
    "a slot before its slab": ("state", struct.pack("=4Q", 4095, 8, 0, 0), "slab"),
    "a slot over the end": ("state", struct.pack("=4Q", 4096 + 12 * 16 - 7, 8, 0, 0), "slab"),
    "a slot around the end": ("state", struct.pack("=4Q", 4096, 2**64 - 8, 0, 0), "slab"),
    "a bus slot elsewhere": ("state", struct.pack("=4Q", 0, 0, 2**63, 1), "slab"),
    "a device twice": ("path", b"d0\0", "same device"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_record_that_breaks_a_rule_is_value_error(what):
    """The message names the record and the rule."""
    name, value, rule = BROKEN[what]
    hardware = sample()
    writer = FdtWriter()
    with writer.node(""):
        for number, device in enumerate(hardware.order):
            properties = {
                "path": hardware.tree.path(device).encode() + b"\0",
                "bus": b"pci\0",
                "state": hardware.slots[device].tobytes(),
                "index": struct.pack("=Q", device),
            }
            if number == 7:
                properties.pop(name)
                if value is not None:
                    properties[name] = value
            writer.add_node(f"device{number}", properties)
    reading = Reading(hardware.tree, 12, slabs_of(hardware))
    place = 11 if what == "a device twice" else 7
    with pytest.raises(ValueError, match=f"record {place}: .*{rule}"):
        reading.read(bytes(writer.finish()), 12)


@pytest.mark.parametrize("said", [0, 11, 13])
def test_more_or_fewer_records_than_said_is_value_error(said):
    """A shard has as many as the chain says."""
    hardware = sample()
    _, blob = hardware.write()
    reading = Reading(hardware.tree, 13, slabs_of(hardware))
    with pytest.raises(ValueError, match="records"):
        reading.read(blob, said)


def test_record_without_a_slab_may_have_no_slots_only():
    """A slab lists its records; one that none lists has no slot."""
    hardware = sample()
    _, blob = hardware.write()
    for slabs in ([], [[4096, 192, 1, 11]], [[4096, 192, 0, 11]], [[2**64 - 8, 192, 0, 12]]):
        reading = Reading(hardware.tree, 12, np.array(slabs, np.uint64).reshape(-1, 4))
        with pytest.raises(ValueError, match="slab"):
            reading.read(blob, 12)


@given(st.data())
@settings(deadline=None, max_examples=400)
def test_damaged_records_are_refused_or_read(data):
    """Bytes, words and lengths at random: an error of its own kind, or an answer."""
    hardware = sample()
    _, blob = hardware.write()
    damaged = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        change = data.draw(st.sampled_from(["byte", "word", "cut"]))
        if change == "byte":
            damaged[at] = data.draw(st.integers(0, 255))
        elif change == "word":
            word = data.draw(st.sampled_from([0, 1, 2, 3, 4, 9, 2**31, 2**32 - 1]))
            at &= ~3
            damaged[at : at + 4] = struct.pack(">I", word)[: len(damaged) - at]
        elif at > 64:
            del damaged[at:]
    reading = Reading(hardware.tree, 12, slabs_of(hardware))
    try:
        reading.read(bytes(damaged), 12)
    except (FdtError, ValueError):
        return
    assert all(-1 <= number < 12 for number in reading.numbers)
