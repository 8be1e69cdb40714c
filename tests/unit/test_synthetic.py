"""Generated device sets: exact, repeatable, and shaped like hosts."""

import re

import numpy as np
import pytest

from luo.topology import synthetic

BDF = re.compile(r"[0-9a-f]{4,5}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")


def names(tree):
    return [tree.path(index).rpartition("/")[2] for index in tree]


def drivers(tree):
    ids = np.asarray(tree.driver_ids)
    return [None if code < 0 else tree.driver_names[code] for code in ids]


def columns(tree):
    found = [np.asarray(tree.parents), np.asarray(tree.bus_ids), np.asarray(tree.driver_ids)]
    found += [
        np.asarray(tree.nodes),
        np.asarray(tree.paths(np.arange(len(tree), dtype=np.int32))[0]),
    ]
    for name in tree.column_names:
        found += [np.asarray(part) for part in tree.column(name)]
    return [part.tobytes() for part in found]


@pytest.fixture(scope="module")
def tree():
    return synthetic.generate(20_000, seed=7, nodes=4)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 411, 3000, 65_537])
def test_generate_has_exactly_n_devices(n):
    """Any size is hit exactly."""
    assert len(synthetic.generate(n, seed=1)) == n


def test_generate_same_seed_gives_the_same_tree():
    """Same arguments, same bytes in every column."""
    assert columns(synthetic.generate(5000, 3, 2)) == columns(synthetic.generate(5000, 3, 2))


def test_generate_other_seed_gives_another_tree():
    """The seed chooses equipment and state."""
    assert columns(synthetic.generate(5000, 3)) != columns(synthetic.generate(5000, 4))


def test_generate_paths_are_unique(tree):
    """No name twice under one parent."""
    found = [tree.path(index) for index in tree]

    assert len(set(found)) == len(found)


def test_generate_parents_precede_children(tree):
    """Registration order is that of discovery."""
    parents = np.asarray(tree.parents)

    assert (parents < np.arange(len(parents))).all()


def test_generate_pci_names_are_addresses(tree):
    """Devices on the bus pci are named domain:bus:device.function, in their root's domain."""
    pci = tree.bus_names.index("pci")
    for index in np.flatnonzero(np.asarray(tree.bus_ids) == pci)[::97]:
        path = tree.path(int(index))
        assert BDF.fullmatch(path.rpartition("/")[2])
        assert path.startswith(f"pci{path.rpartition('/')[2][:5]}")


def test_generate_bridges_lead_to_the_bus_of_what_is_below(tree):
    """Functions below one bridge are on one bus, and no bus is below two bridges."""
    pci = tree.bus_names.index("pci")
    parents = np.asarray(tree.parents)
    above: dict[str, int] = {}
    for index in np.flatnonzero(np.asarray(tree.bus_ids) == pci):
        bus = tree.path(int(index)).rpartition("/")[2][:-5]
        assert above.setdefault(bus, int(parents[index])) == parents[index]


def test_generate_has_the_equipment_of_hosts(tree):
    """Ports, adapters with virtual functions, NVMe, GPUs, virtio; most are virtual functions."""
    found = drivers(tree)

    assert {
        "pcieport", "mlx5_core", "vfio-pci", "ice", "iavf", "nvme", "nvidia", "virtio-pci",
        "virtio_net", "virtio_blk",
    } <= set(found)  # fmt: skip
    assert 0.5 < (found.count("vfio-pci") + found.count("iavf")) / len(found) < 0.9


def test_generate_virtual_functions_are_siblings_of_physical_ones(tree):
    """As in Linux: below the same port."""
    found = drivers(tree)
    parents = np.asarray(tree.parents)
    of_ports = {int(parents[k]) for k in range(len(found)) if found[k] == "mlx5_core"}

    assert {int(parents[k]) for k in range(len(found)) if found[k] == "vfio-pci"} <= of_ports


def test_generate_counted_names_are_unique_and_gapless(tree):
    """eth0, eth1, …; vda … vdz, vdaa …; a namespace has its controller's number."""
    found = names(tree)
    eth = [int(name[7:]) for name in found if name.startswith("net!eth")]
    disks = [name[8:] for name in found if name.startswith("block!vd")]

    assert eth == list(range(len(eth)))
    assert disks[:3] == ["a", "b", "c"]
    assert len(set(disks)) == len(disks)
    for index in tree:
        path = tree.path(index)
        if controller := re.search(r"nvme!nvme(\d+)/nvme(\d+)n1$", path):
            assert controller[1] == controller[2]


@pytest.mark.parametrize(
    ("number", "letters"), [(0, "a"), (25, "z"), (26, "aa"), (701, "zz"), (702, "aaa")]
)
def test_counts_of_letters_are_those_of_disks(number, letters):
    """Bijective base 26, as the kernel names disks."""
    ((rows, digits),) = [
        block
        for block in synthetic._counts(np.array([number]), 26, ord("a"), bijective=True)
        if len(block[0])
    ]

    assert bytes(digits[0]).decode() == letters
    assert list(rows) == [0]


def test_generate_state_has_sizes_and_identifiers(tree):
    """64 bytes for virtual functions, 256 for others; vendor and device in front."""
    data, offsets = (np.asarray(part) for part in tree.column("state"))
    sizes = np.diff(offsets)
    found = drivers(tree)
    for driver, size, ids in (
        ("vfio-pci", 64, "b3151e10"),
        ("iavf", 64, "86808918"),
        ("nvme", 256, "4d1424a8"),
        ("virtio_net", 256, "00000000"),
    ):
        index = found.index(driver)
        assert sizes[index] == size
        assert bytes(data[int(offsets[index]) :][:4]).hex() == ids
    assert set(sizes.tolist()) == {64, 256}


def test_generate_states_differ_beyond_the_header(tree):
    """Two functions of one kind differ, so that a mix-up of states shows."""
    data, offsets = (np.asarray(part) for part in tree.column("state"))
    found = drivers(tree)
    vfs = [k for k in range(len(found)) if found[k] == "vfio-pci"][:500]

    assert len({bytes(data[int(offsets[k]) : int(offsets[k + 1])]) for k in vfs}) == len(vfs)


def test_generate_spreads_root_complexes_over_nodes(tree):
    """Each node has its part, and all below a root is on the root's node."""
    nodes, parents = np.asarray(tree.nodes), np.asarray(tree.parents)
    below = parents >= 0

    assert (nodes[below] == nodes[parents[below]]).all()
    assert set(nodes.tolist()) == set(range(4))
    assert np.bincount(nodes).min() > len(nodes) // 8


def test_generate_class_devices_have_a_class(tree):
    """Devices on no bus are roots or have a class."""
    data, offsets = (np.asarray(part) for part in tree.column("class"))
    bare = (np.asarray(tree.bus_ids) < 0) & (np.asarray(tree.parents) >= 0)

    assert (np.diff(offsets)[bare] > 0).all()
    index = names(tree).index("net!eth0")
    assert bytes(data[int(offsets[index]) : int(offsets[index + 1])]) == b"net"


@pytest.mark.parametrize("arguments", [(0,), (-1,), (1 << 31,), (5, 0, 0), (5, -1)])
def test_generate_bad_argument_is_valueerror(arguments):
    """Out of range is the caller's mistake."""
    with pytest.raises(ValueError):
        synthetic.generate(*arguments)
