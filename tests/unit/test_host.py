"""The reader of /sys trees: this machine's, and gathered ones built here."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest

from luo.errors import HandoverError
from luo.topology import host
from luo.topology._rows import Rows, pack_attributes, text, unpack_attributes

CONFIG = bytes.fromhex("861934121000060004000002") + bytes(244)
GIB = 1 << 30


class Sysfs:
    """A /sys tree under construction in *root*; links as the kernel makes them, or absolute."""

    def __init__(self, root: Path, *, absolute: bool = False) -> None:
        self.root = root
        self.absolute = absolute
        (root / "devices").mkdir(parents=True)

    def link(self, where: Path, to: str) -> None:
        if self.absolute:
            where.symlink_to(f"/sys/{to}")
        else:
            where.symlink_to(os.path.relpath(self.root / to, where.parent))

    def device(self, path, *, bus=None, klass=None, driver=None, node=None, **files) -> Path:
        where = self.root / "devices" / path
        where.mkdir(parents=True, exist_ok=True)
        (where / "uevent").write_bytes(b"")
        if bus or klass:
            self.link(where / "subsystem", f"bus/{bus}" if bus else f"class/{klass}")
        if driver:
            self.link(where / "driver", f"bus/{bus}/drivers/{driver}")
        if node is not None:
            (where / "numa_node").write_text(f"{node}\n")
        for name, content in files.items():
            (where / name).write_bytes(content)
        return where


def server(root: Path, *, absolute: bool = False) -> Sysfs:
    """Two PCI functions on two nodes, with what their drivers made of them."""
    tree = Sysfs(root, absolute=absolute)
    tree.device("pci0000:00")
    tree.device("pci0000:00/0000:00:01.0", bus="pci", driver="pcieport", node=0, config=CONFIG)
    nic = "pci0000:00/0000:00:01.0/0000:01:00.0"
    tree.device(nic, bus="pci", driver="ice", node=1, config=CONFIG * 16, vendor=b"0x8086\n")
    tree.device(f"{nic}/net/eth0", klass="net", address=b"02:00:00:00:00:01\n", mtu=b"1500\n")
    tree.device("platform", node=-1)
    tree.device("platform/rtc", bus="platform", driver="rtc_cmos", node=-1)
    tree.device("virtual/tty/tty0", klass="tty")
    return tree


def rows(found) -> dict[str, int]:
    """Index of each device of a host, by path."""
    return {found.devices.path(index): index for index in found.devices}


def state(found, path: str) -> bytes:
    data, offsets = found.devices.column("state")
    index = found.devices[path]
    return bytes(data[int(offsets[index]) : int(offsets[index + 1])])


def bus_of(found, path: str) -> str | None:
    code = found.devices.bus_ids[found.devices[path]]
    return None if code < 0 else found.devices.bus_names[code]


def driver_of(found, path: str) -> str | None:
    code = found.devices.driver_ids[found.devices[path]]
    return None if code < 0 else found.devices.driver_names[code]


def class_of(found, path: str) -> bytes:
    data, offsets = found.devices.column("class")
    index = found.devices[path]
    return bytes(data[int(offsets[index]) : int(offsets[index + 1])])


NIC = "pci0000:00/0000:00:01.0/0000:01:00.0"


@pytest.fixture(params=[False, True], ids=["relative", "absolute"])
def gathered(request, tmp_path):
    return server(tmp_path / "sys", absolute=request.param)


def test_read_gathered_tree_keeps_parents_and_paths(gathered):
    """A device's parent is the nearest device above it; directories between are in its name."""
    found = host.read(gathered.root)

    assert [found.devices.path(k) for k in found.devices] == [
        "pci0000:00",
        "pci0000:00/0000:00:01.0",
        NIC,
        f"{NIC}/net!eth0",
        "platform",
        "platform/rtc",
        "virtual!tty!tty0",
    ]
    assert list(found.devices.parents) == [-1, 0, 1, 2, -1, 4, -1]
    assert found.source == {"kind": "sysfs", "path": str(gathered.root), "devices": 7}


def test_read_links_give_bus_class_and_driver(gathered):
    """Relative and absolute links say the same, though nothing is where they point."""
    found = host.read(gathered.root)

    assert not (gathered.root / "bus").exists()
    assert (bus_of(found, NIC), driver_of(found, NIC)) == ("pci", "ice")
    assert (bus_of(found, "platform/rtc"), driver_of(found, "platform/rtc")) == (
        "platform",
        "rtc_cmos",
    )
    assert bus_of(found, f"{NIC}/net!eth0") is None
    assert class_of(found, f"{NIC}/net!eth0") == b"net"
    assert class_of(found, NIC) == b""


def test_read_pci_state_is_configuration_space(gathered):
    """A PCI function's state is its config file, as long as it is."""
    found = host.read(gathered.root)

    assert state(found, NIC) == CONFIG * 16
    assert state(found, "pci0000:00/0000:00:01.0") == CONFIG


def test_read_other_state_is_attribute_record(gathered):
    """Other devices' state is their own regular files, by name."""
    found = host.read(gathered.root)

    assert unpack_attributes(state(found, f"{NIC}/net!eth0")) == [
        (b"address", b"02:00:00:00:00:01\n"),
        (b"mtu", b"1500\n"),
        (b"uevent", b""),
    ]
    assert found.skipped == 0


def test_read_numa_node_is_inherited(gathered):
    """A device without a node of its own has its parent's; -1 at the top is node 0."""
    for node in (0, 1):
        where = gathered.device(f"system/node/node{node}", bus="node")
        (where / "meminfo").write_text(f"Node {node} MemTotal:  4194304 kB\n")
    found = host.read(gathered.root)
    nodes = {path: int(found.devices.nodes[index]) for path, index in rows(found).items()}

    assert nodes[NIC] == nodes[f"{NIC}/net!eth0"] == 1
    assert nodes["pci0000:00/0000:00:01.0"] == nodes["platform/rtc"] == 0
    assert nodes["system!node!node1"] == 1


def test_read_root_above_sys_is_found(tmp_path):
    """The root may hold sys/devices instead of devices."""
    server(tmp_path / "host7" / "sys")

    assert len(host.read(tmp_path / "host7").devices) == 7


def test_read_absolute_links_below_the_copy_are_resolved(tmp_path):
    """Links that were rewritten to where the copy stands say the same."""
    tree = Sysfs(tmp_path / "sys")
    where = tree.device("platform/uart")
    (where / "subsystem").symlink_to(tree.root / "bus" / "platform")
    (where / "driver").symlink_to("/mnt/gathered/sys/bus/platform/drivers/serial8250")
    found = host.read(tree.root)

    assert bus_of(found, "platform!uart") == "platform"
    assert driver_of(found, "platform!uart") == "serial8250"


def test_read_links_out_of_the_tree_are_ignored(tmp_path):
    """A link that leaves the root names neither bus nor driver, and is never followed."""
    outside = tmp_path / "outside"
    (outside / "secret").mkdir(parents=True)
    (outside / "secret" / "uevent").write_text("SECRET=1\n")
    tree = Sysfs(tmp_path / "sys")
    where = tree.device("a")
    (where / "subsystem").symlink_to("../../../../bus/pci")
    (where / "driver").symlink_to("/etc/passwd")
    (where / "stolen").symlink_to(outside / "secret" / "uevent")
    (tree.root / "devices" / "b").symlink_to(outside / "secret")
    found = host.read(tree.root)

    assert [found.devices.path(k) for k in found.devices] == ["a"]
    assert bus_of(found, "a") is None
    assert driver_of(found, "a") is None
    assert unpack_attributes(state(found, "a")) == [(b"uevent", b"")]


def test_read_devices_directory_that_links_outside_is_refused(tmp_path):
    """A root whose devices directory is a link out of it has no devices."""
    server(tmp_path / "real")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "devices").symlink_to(tmp_path / "real" / "devices")

    with pytest.raises(ValueError, match="no devices"):
        host.read(tmp_path / "copy")


def test_read_missing_links_fall_back_on_uevent(tmp_path):
    """A copy without links has driver and bus from uevent and the shape of the directory."""
    tree = Sysfs(tmp_path / "sys")
    tree.device("virtio0", **{"uevent": b"DRIVER=virtio_net\nMODALIAS=virtio:d01v1AF4\n"})
    tree.device("0000:00:01.0", config=CONFIG, vendor=b"0x8086\n", device=b"0x1234\n")
    found = host.read(tree.root)

    assert (bus_of(found, "virtio0"), driver_of(found, "virtio0")) == ("virtio", "virtio_net")
    assert bus_of(found, "0000:00:01.0") == "pci"
    assert state(found, "0000:00:01.0") == CONFIG


def test_read_copy_without_uevent_files_finds_devices_by_subsystem(tmp_path):
    """In a copy with no uevent at all, a subsystem link or configuration space tells a device."""
    tree = server(tmp_path / "sys")
    for uevent in tree.root.rglob("uevent"):
        uevent.unlink()
    found = host.read(tree.root)

    assert [found.devices.path(k) for k in found.devices] == [
        "pci0000:00!0000:00:01.0",
        "pci0000:00!0000:00:01.0/0000:01:00.0",
        "pci0000:00!0000:00:01.0/0000:01:00.0/net!eth0",
        "platform!rtc",
        "virtual!tty!tty0",
    ]


def test_read_short_configuration_space_falls_back_on_attributes(tmp_path):
    """A config file of less than the standard header is kept as an attribute."""
    tree = Sysfs(tmp_path / "sys")
    tree.device("0000:00:01.0", bus="pci", config=CONFIG[:63])
    found = host.read(tree.root)

    assert unpack_attributes(state(found, "0000:00:01.0")) == [
        (b"config", CONFIG[:63]),
        (b"uevent", b""),
    ]


def test_read_configuration_space_without_privilege_is_the_header(tmp_path):
    """64 bytes, which anybody may read, are state enough."""
    tree = Sysfs(tmp_path / "sys")
    tree.device("0000:00:01.0", bus="pci", config=CONFIG[:64])

    assert state(host.read(tree.root), "0000:00:01.0") == CONFIG[:64]


@pytest.mark.parametrize(
    "name",
    ["rom", "vpd", "resource0", "resource2_wc", "remove", "rescan", "reset", "legacy_io"],
)
def test_read_dangerous_attribute_is_skipped_and_counted(tmp_path, name):
    """Attributes whose reading does something are not opened."""
    tree = Sysfs(tmp_path / "sys")
    tree.device("a", **{name: b"boom", "resource": b"text"})
    found = host.read(tree.root)

    assert unpack_attributes(state(found, "a")) == [(b"resource", b"text"), (b"uevent", b"")]
    assert found.skipped == 1


def test_read_write_only_attribute_is_skipped_even_for_root(tmp_path):
    """No read bit: not opened, whoever reads."""
    tree = Sysfs(tmp_path / "sys")
    where = tree.device("a", unbind_me=b"x")
    (where / "unbind_me").chmod(0o200)
    found = host.read(tree.root)

    assert unpack_attributes(state(found, "a")) == [(b"uevent", b"")]
    assert found.skipped == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not stop root")
def test_read_unreadable_attribute_and_directory_are_skipped(tmp_path):
    """EACCES on a file or a directory costs that one only."""
    tree = Sysfs(tmp_path / "sys")
    where = tree.device("a", key=b"x")
    (where / "key").chmod(0o040)
    locked = tree.device("b")
    locked.chmod(0)
    try:
        found = host.read(tree.root)
    finally:
        locked.chmod(0o755)

    assert [found.devices.path(k) for k in found.devices] == ["a"]
    assert found.skipped == 2


def test_read_fifos_sockets_and_links_are_not_attributes(tmp_path):
    """Only regular files are read, so nothing can block."""
    tree = Sysfs(tmp_path / "sys")
    where = tree.device("a")
    os.mkfifo(where / "fifo")
    (where / "link").symlink_to("uevent")
    with socket.socket(socket.AF_UNIX) as server_socket:
        here = os.getcwd()
        os.chdir(where)  # a socket's path is short
        try:
            server_socket.bind("socket")
        finally:
            os.chdir(here)
        found = host.read(tree.root)

    assert unpack_attributes(state(found, "a")) == [(b"uevent", b"")]


def test_read_large_attributes_are_cut_and_limited(tmp_path):
    """4 KiB an attribute and 64 KiB a device; what does not fit is counted."""
    tree = Sysfs(tmp_path / "sys")
    tree.device("a", **{f"x{nr:02}": bytes([nr]) * 10_000 for nr in range(20)})
    found = host.read(tree.root)
    saved = unpack_attributes(state(found, "a"))

    assert [name for name, _ in saved] == [b"uevent", *(b"x%02d" % nr for nr in range(16))]
    assert {len(value) for name, value in saved if name != b"uevent"} == {4096}
    assert found.skipped == 4


def test_read_power_directory_is_not_entered(tmp_path):
    """Runtime power management holds no devices."""
    tree = Sysfs(tmp_path / "sys")
    tree.device("a")
    tree.device("a/power")

    assert len(host.read(tree.root).devices) == 1


def test_read_deep_and_looping_tree_ends(tmp_path):
    """Links that loop are no directories, and depth is no matter of the interpreter's stack."""
    tree = Sysfs(tmp_path / "sys")
    levels = [f"{tree.root}/devices" + "/d" * depth for depth in range(1, 1201)]
    for level in levels:
        os.mkdir(level)
    Path(levels[-1], "uevent").touch()
    Path(levels[0], "loop").symlink_to("..")
    try:
        found = host.read(tree.root)
    finally:  # too deep for those who clean up by recursion
        Path(levels[-1], "uevent").unlink()
        Path(levels[0], "loop").unlink()
        for level in reversed(levels):
            os.rmdir(level)

    assert [found.devices.path(k) for k in found.devices] == ["!".join(["d"] * 1200)]


def test_read_vanishing_files_are_tolerated(tmp_path, monkeypatch):
    """A file or directory that is gone when it is opened is skipped."""
    tree = Sysfs(tmp_path / "sys")
    tree.device("a", gone=b"x", kept=b"y")
    tree.device("b")
    really = os.open

    def vanish(path, *args, **kwargs):
        if path == "gone" or str(path).endswith("/b"):
            raise FileNotFoundError(2, "gone", path)
        return really(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", vanish)
    found = host.read(tree.root)

    assert [found.devices.path(k) for k in found.devices] == ["a"]
    assert unpack_attributes(state(found, "a")) == [(b"kept", b"y"), (b"uevent", b"")]
    assert found.skipped == 2


def test_read_name_that_is_not_utf8_is_escaped(tmp_path):
    """Bytes that are no UTF-8 appear as escapes; the device is kept."""
    tree = Sysfs(tmp_path / "sys")
    where = os.fsencode(tree.root) + b"/devices/a\xffb"
    os.mkdir(where)
    for name in (b"uevent", b"n\xfe"):
        with open(where + b"/" + name, "wb"):
            pass
    found = host.read(tree.root)

    assert [found.devices.path(k) for k in found.devices] == ["a\\xffb"]
    assert unpack_attributes(state(found, "a\\xffb")) == [(b"n\xfe", b""), (b"uevent", b"")]


def test_rows_name_taken_gets_a_number():
    """Two names that become one by gluing stay two devices."""
    made = Rows()
    for name in ("a!b", "a!b", "a!b"):
        made.add(name, -1, bus=None, driver=None, node=0)

    assert made.names == ["a!b", "a!b~2", "a!b~3"]


# ---- memory ----


def blocks(tree: Sysfs, *, nbytes: int, layout: dict[int, tuple[int, str]]) -> None:
    """Memory blocks: index -> (node, state)."""
    tree.device("system/memory", block_size_bytes=b"%x\n" % nbytes)
    for index, (node, online) in layout.items():
        where = tree.device(
            f"system/memory/memory{index}",
            bus="memory",
            phys_index=b"%08x\n" % index,
            state=online.encode() + b"\n",
        )
        (where / f"node{node}").symlink_to(f"../../node/node{node}")


def test_read_memory_blocks_give_ranges_with_holes(tmp_path):
    """Adjacent online blocks of a node are one range; holes and offline blocks are none."""
    tree = server(tmp_path / "sys")
    layout = {k: (0, "online") for k in (0, 1, 2, 4, 5)}
    layout |= {6: (1, "online"), 7: (1, "offline"), 8: (1, "online")}
    blocks(tree, nbytes=GIB, layout=layout)

    assert host.read(tree.root).ranges == [
        (0, 3 * GIB, 0),
        (4 * GIB, 2 * GIB, 0),
        (6 * GIB, GIB, 1),
        (8 * GIB, GIB, 1),
    ]


def test_read_memory_blocks_without_links_take_the_nodes_list(tmp_path):
    """If blocks lost their link to the node, the node's links to its blocks serve."""
    tree = server(tmp_path / "sys")
    blocks(tree, nbytes=GIB, layout={0: (0, "online"), 1: (1, "online")})
    for link in tree.root.rglob("memory?/node?"):
        link.unlink()
    for node in (0, 1):
        where = tree.device(f"system/node/node{node}", bus="node")
        (where / f"memory{node}").symlink_to(f"../../memory/memory{node}")

    assert host.read(tree.root).ranges == [(0, GIB, 0), (GIB, GIB, 1)]


def test_read_sparse_node_numbers_are_made_dense(tmp_path):
    """Nodes with memory are numbered 0, 1, …; devices follow, those of other nodes to node 0."""
    tree = Sysfs(tmp_path / "sys")
    blocks(tree, nbytes=GIB, layout={0: (0, "online"), 1: (8, "online")})
    tree.device("a", node=8)
    tree.device("b", node=3)
    found = host.read(tree.root)

    assert found.ranges == [(0, GIB, 0), (GIB, GIB, 1)]
    assert found.devices.nodes[found.devices["a"]] == 1
    assert found.devices.nodes[found.devices["b"]] == 0


def test_read_far_apart_ranges_are_moved_together(tmp_path):
    """Addresses that span more than a machine can have lose their holes."""
    tree = Sysfs(tmp_path / "sys")
    far = (65 << 40) // GIB
    blocks(tree, nbytes=GIB, layout={1: (0, "online"), far: (1, "online")})

    assert host.read(tree.root).ranges == [(0, GIB, 0), (GIB, GIB, 1)]


def test_read_meminfo_of_nodes_is_rounded_and_stacked(tmp_path):
    """Without blocks, nodes' MemTotal counts, in whole 4 MiB; values padded by tar are read."""
    tree = server(tmp_path / "sys")
    for node, kib in ((0, 5000), (1, 8192), (2, 100)):
        where = tree.device(f"system/node/node{node}", bus="node")
        line = b"Node %d MemTotal: %8d kB\n" % (node, kib)
        (where / "meminfo").write_bytes(line.ljust(4096, b"\0"))

    assert host.read(tree.root).ranges == [(0, 4 << 20, 0), (4 << 20, 8 << 20, 1)]


@pytest.mark.parametrize("beside", ["sys/../proc", "proc"])
def test_read_meminfo_gathered_beside_counts(tmp_path, beside):
    """proc/meminfo next to sys, or next to devices, is the host's memory."""
    root = tmp_path / "sys" if ".." in beside else tmp_path
    server(root)
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "meminfo").write_text("MemTotal:       2099200 kB\nMemFree: 5 kB\n")

    assert host.read(root).ranges == [(0, 2048 << 20, 0)]


def test_read_tree_without_memory_gets_the_default(tmp_path):
    """16 GiB on one node, and never this machine's memory."""
    tree = server(tmp_path / "sys")

    assert host.read(tree.root).ranges == [(0, 16 * GIB, 0)]


@pytest.mark.parametrize("size", [b"junk", b"0", b"-8000000", b"1000", b"f" * 40, b""])
def test_read_senseless_block_size_is_ignored(tmp_path, size):
    """A block size that no kernel has falls back on the next source."""
    tree = server(tmp_path / "sys")
    blocks(tree, nbytes=GIB, layout={0: (0, "online")})
    (tree.root / "devices/system/memory/block_size_bytes").write_bytes(size)

    assert host.read(tree.root).ranges == [(0, 16 * GIB, 0)]


# ---- roots that are none ----


def test_read_absent_root_is_enoent(tmp_path):
    """ENOENT, with the path."""
    with pytest.raises(FileNotFoundError) as caught:
        host.read(tmp_path / "none")

    assert caught.value.filename == str(tmp_path / "none")


def test_read_root_that_is_a_file_is_enotdir(tmp_path):
    """ENOTDIR, with the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as caught:
        host.read(tmp_path / "file")

    assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("inside", [[], ["devices"], ["sys/devices/empty"]])
def test_read_root_without_devices_is_valueerror(tmp_path, inside):
    """One line that names the root and where devices were looked for."""
    for name in inside:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="no devices") as caught:
        host.read(tmp_path)

    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- records ----


@pytest.mark.parametrize(
    "pairs", [[], [(b"a", b"")], [(b"a", b"1\n"), (b"b", b"\0" * 4096)], [(b"\xff", b"\xfe")]]
)
def test_unpack_attributes_undoes_pack(pairs):
    """What is packed comes back."""
    assert unpack_attributes(pack_attributes(pairs)) == pairs


def test_pack_attributes_is_the_documented_layout():
    """u16 name with NUL, u32 value, name, NUL, value."""
    expected = bytes.fromhex("0400 03000000") + b"mtu\0" + b"15\n"  # 0: lengths, 6: name, 10: value

    assert expected == pack_attributes([(b"mtu", b"15\n")])


def test_unpack_attributes_truncated_is_handovererror():
    """Each proper prefix but the empty one is refused, at a byte inside."""
    whole = pack_attributes([(b"mtu", b"1500\n")])
    for cut in range(1, len(whole)):
        with pytest.raises(HandoverError) as caught:
            unpack_attributes(whole[:cut])
        assert caught.value.phys == 0


@pytest.mark.parametrize("record", ["0000 00000000", "0100 00000000 41"])
def test_unpack_attributes_bad_name_is_handovererror(record):
    """A name without its NUL is refused."""
    with pytest.raises(HandoverError, match="NUL"):
        unpack_attributes(bytes.fromhex(record))


def test_text_of_plain_name_is_unchanged():
    """Only bytes that are no UTF-8 are escaped."""
    assert text("ttyS0 é") == "ttyS0 é"


# ---- this machine ----

LIVE = Path("/sys/devices/virtual")


@pytest.fixture(scope="module")
def live():
    if not LIVE.is_dir():
        pytest.skip("no /sys on this machine")
    return host.read()


def test_read_live_tree_has_every_uevent_directory(live):
    """As many devices as directories with a uevent file, paths equal with ! read as /."""
    expected = {
        os.path.relpath(directory, "/sys/devices")
        for directory, _, files in os.walk("/sys/devices")
        if "uevent" in files
    }
    found = {live.devices.path(k).replace("!", "/") for k in live.devices}

    # devices may come and go between the two walks
    assert len(found ^ {path.replace("!", "/") for path in expected}) <= 4
    assert live.source == {"kind": "sysfs", "path": "/sys", "devices": len(live.devices)}


def test_read_live_tree_every_device_has_state(live):
    """Nothing is without state, and PCI functions have configuration space."""
    data, offsets = live.devices.column("state")
    sizes = np.diff(offsets).tolist()

    assert min(sizes) > 0
    for index in live.devices:
        code = int(live.devices.bus_ids[index])
        config = Path("/sys/devices", live.devices.path(index).replace("!", "/"), "config")
        if code >= 0 and live.devices.bus_names[code] == "pci" and config.exists():
            assert sizes[index] in (64, 256, 4096)
    assert len(data) == sum(sizes)


def test_read_live_tree_memory_is_this_machines(live):
    """The ranges hold at least what Linux says is usable of them, in whole 4 MiB."""
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        usable = int(meminfo.readline().split()[1]) << 10

    assert live.memory_bytes >= usable - (usable % (4 << 20)) - (64 << 20)
    assert all(start % (4 << 20) == 0 == nbytes % (4 << 20) for start, nbytes, _ in live.ranges)
