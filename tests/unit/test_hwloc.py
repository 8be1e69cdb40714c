"""The reader of hwloc XML: documents of each format, and broken ones."""

import shutil
import struct
import subprocess

import pytest

from luo.topology import hwloc
from luo.topology._rows import unpack_attributes

GIB = 1 << 30

# A two-socket server as hwloc 2 writes it: NUMA nodes are memory children beside the caches, and
# I/O hangs below the package. One bridge tree on each socket.
V2 = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE topology SYSTEM "hwloc2.dtd">
<topology version="2.0">
  <object type="Machine" os_index="0" cpuset="0x0000000f" nodeset="0x00000003" gp_index="1">
    <info name="DMIProductName" value="Two-socket server"/>
    <object type="Package" os_index="0" cpuset="0x00000003" nodeset="0x00000001" gp_index="3">
      <object type="NUMANode" os_index="0" nodeset="0x00000001" gp_index="14"
              local_memory="68719476736">
        <page_type size="4096" count="16777216"/>
      </object>
      <object type="L3Cache" cpuset="0x00000003" nodeset="0x00000001" cache_size="33554432">
        <object type="Core" os_index="0" cpuset="0x00000001" nodeset="0x00000001">
          <object type="PU" os_index="0" cpuset="0x00000001" nodeset="0x00000001"/>
        </object>
      </object>
      <object type="Bridge" gp_index="20" bridge_type="0-1" depth="0" bridge_pci="0000:[00-1f]">
        <object type="Bridge" gp_index="21" bridge_type="1-1" depth="1"
                bridge_pci="0000:[01-02]" pci_busid="0000:00:01.0"
                pci_type="0604 [8086:2030] [8086:0000] 04" pci_link_speed="15.753846">
          <object type="PCIDev" gp_index="22" pci_busid="0000:01:00.0"
                  pci_type="0200 [8086:1592] [1028:0ad1] 02" pci_link_speed="15.753846">
            <info name="PCIVendor" value="Intel Corporation"/>
            <object type="OSDev" gp_index="23" name="ens1f0" osdev_type="2">
              <info name="Address" value="40:a6:b7:00:00:01"/>
            </object>
            <object type="OSDev" gp_index="24" name="irdma0" osdev_type="3"/>
          </object>
          <object type="PCIDev" gp_index="25" pci_busid="0000:02:00.0"
                  pci_type="0108 [144d:a824] [144d:a801] 00" pci_link_speed="7.876923">
            <object type="OSDev" gp_index="26" name="nvme0n1" subtype="Disk" osdev_type="0">
              <info name="Size" value="3750738264"/>
            </object>
          </object>
        </object>
      </object>
    </object>
    <object type="Package" os_index="1" cpuset="0x0000000c" nodeset="0x00000002" gp_index="4">
      <object type="NUMANode" os_index="1" nodeset="0x00000002" local_memory="34363932672"/>
      <object type="Bridge" gp_index="30" bridge_type="0-1" depth="0" bridge_pci="0001:[80-9f]">
        <object type="PCIDev" gp_index="31" pci_busid="0001:81:00.0"
                pci_type="0302 [10de:20b2] [10de:1463] a1" pci_link_speed="31.507692">
          <object type="OSDev" gp_index="32" name="cuda0" subtype="CUDA" osdev_type="5"/>
        </object>
      </object>
    </object>
  </object>
  <support name="discovery.pu"/>
</topology>
"""

# The same kind of server as hwloc 1 wrote it: NUMA nodes contain the sockets and the I/O.
V1 = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE topology SYSTEM "hwloc.dtd">
<topology>
  <object type="Machine" os_index="0" cpuset="0x0000000f" nodeset="0x00000003">
    <object type="NUMANode" os_index="0" cpuset="0x00000003" nodeset="0x00000001"
            local_memory="17179869184">
      <page_type size="4096" count="4194304"/>
      <object type="Socket" os_index="0" cpuset="0x00000003" nodeset="0x00000001"/>
      <object type="Bridge" os_index="0" bridge_type="0-1" depth="0" bridge_pci="0000:[00-0f]">
        <object type="PCIDev" os_index="512" pci_busid="0000:00:1f.2"
                pci_type="0106 [8086:1d02] [1028:04ce] 05" pci_link_speed="0.000000">
          <object type="OSDev" name="sda" osdev_type="0"/>
        </object>
      </object>
    </object>
    <object type="NUMANode" os_index="1" cpuset="0x0000000c" nodeset="0x00000002"
            local_memory="17179869184">
      <object type="Socket" os_index="1" cpuset="0x0000000c" nodeset="0x00000002"/>
      <object type="Bridge" os_index="1" bridge_type="0-1" depth="0" bridge_pci="0000:[40-4f]">
        <object type="Bridge" os_index="67108864" bridge_type="1-1" depth="1"
                bridge_pci="0000:[41-41]" pci_busid="0000:40:02.0"
                pci_type="0604 [8086:3c04] [0000:0000] 07" pci_link_speed="0.000000">
          <object type="PCIDev" os_index="4259840" pci_busid="0000:41:00.0"
                  pci_type="0c06 [15b3:1003] [15b3:0050] 00" pci_link_speed="8.000000">
            <object type="OSDev" name="ib0" osdev_type="2"/>
            <object type="OSDev" name="mlx4_0" osdev_type="3"/>
          </object>
        </object>
      </object>
    </object>
  </object>
</topology>
"""

ROOT_PORT = "pci0000:00/0000:00:01.0"


@pytest.fixture
def document(tmp_path):
    def write(content, name="host.xml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def paths(found):
    return [found.devices.path(index) for index in found.devices]


def cell(found, name, path):
    data, offsets = found.devices.column(name)
    index = found.devices[path]
    return bytes(data[int(offsets[index]) : int(offsets[index + 1])])


def driver(found, path):
    code = int(found.devices.driver_ids[found.devices[path]])
    return None if code < 0 else found.devices.driver_names[code]


def test_read_v2_gives_devices_with_their_parents(document):
    """Bridges, PCI functions and OS devices nest as in the file."""
    path = document(V2)
    found = hwloc.read(path)

    assert paths(found) == [
        "pci0000:00",
        ROOT_PORT,
        f"{ROOT_PORT}/0000:01:00.0",
        f"{ROOT_PORT}/0000:01:00.0/net!ens1f0",
        f"{ROOT_PORT}/0000:01:00.0/infiniband!irdma0",
        f"{ROOT_PORT}/0000:02:00.0",
        f"{ROOT_PORT}/0000:02:00.0/block!nvme0n1",
        "pci0001:80",
        "pci0001:80/0001:81:00.0",
        "pci0001:80/0001:81:00.0/coproc!cuda0",
    ]
    assert found.source == {"kind": "hwloc", "path": str(path), "devices": 10}


def test_read_v2_memory_is_stacked_by_node(document):
    """Sizes are rounded down to 4 MiB; devices sit on the node of what they are attached to."""
    found = hwloc.read(document(V2))

    assert found.ranges == [(0, 64 * GIB, 0), (64 * GIB, 34363932672 // (4 << 20) * (4 << 20), 1)]
    assert list(found.devices.nodes) == [0] * 7 + [1] * 3


def test_read_v2_guesses_drivers_by_class(document):
    """PCI functions have the bus pci and a driver by the table; OS devices have a class."""
    found = hwloc.read(document(V2))

    assert driver(found, ROOT_PORT) == "pcieport"
    assert driver(found, f"{ROOT_PORT}/0000:01:00.0") == "ice"
    assert driver(found, f"{ROOT_PORT}/0000:02:00.0") == "nvme"
    assert driver(found, "pci0001:80/0001:81:00.0") == "nvidia"
    assert driver(found, "pci0000:00") is None
    assert cell(found, "class", f"{ROOT_PORT}/0000:02:00.0/block!nvme0n1") == b"block"


def test_read_v2_builds_configuration_headers(document):
    """Identifiers stand where the PCI specification has them."""
    found = hwloc.read(document(V2))
    nic = cell(found, "state", f"{ROOT_PORT}/0000:01:00.0")
    bridge = cell(found, "state", ROOT_PORT)

    assert len(nic) == len(bridge) == 256
    # 0x00 vendor, device; 0x08 revision, interface, sub-class, class; 0x0e header type
    assert struct.unpack_from("<HH", nic) == (0x8086, 0x1592)
    assert nic[8:12] == bytes([0x02, 0x00, 0x00, 0x02])
    assert (nic[0x0E], bridge[0x0E]) == (0, 1)
    # 0x2c subsystem of a function; 0x18 primary, secondary, subordinate bus of a bridge
    assert struct.unpack_from("<HH", nic, 0x2C) == (0x1028, 0x0AD1)
    assert bridge[0x18:0x1B] == bytes([0x00, 0x01, 0x02])


def test_read_v2_os_device_state_is_its_attributes_and_infos(document):
    """Every device has state, also one without infos."""
    found = hwloc.read(document(V2))
    disk = dict(unpack_attributes(cell(found, "state", f"{ROOT_PORT}/0000:02:00.0/block!nvme0n1")))

    assert disk[b"Size"] == b"3750738264"
    assert disk[b"subtype"] == b"Disk"
    assert all(cell(found, "state", path) for path in paths(found))


def test_read_v1_gives_devices_and_memory(document):
    """Nodes contain sockets and I/O; the devices' node is the one around them."""
    found = hwloc.read(document(V1))

    assert paths(found) == [
        "pci0000:00",
        "pci0000:00/0000:00:1f.2",
        "pci0000:00/0000:00:1f.2/block!sda",
        "pci0000:40",
        "pci0000:40/0000:40:02.0",
        "pci0000:40/0000:40:02.0/0000:41:00.0",
        "pci0000:40/0000:40:02.0/0000:41:00.0/net!ib0",
        "pci0000:40/0000:40:02.0/0000:41:00.0/infiniband!mlx4_0",
    ]
    assert list(found.devices.nodes) == [0] * 3 + [1] * 5
    assert found.ranges == [(0, 16 * GIB, 0), (16 * GIB, 16 * GIB, 1)]


def test_read_v1_without_numa_nodes_has_the_machines_memory(document):
    """A machine without NUMA nodes has local_memory itself."""
    xml = """<topology><object type="Machine" os_index="0" local_memory="8589934592">
      <object type="PCIDev" pci_busid="0000:00:02.0" pci_type="0300 [1013:00b8] [1af4:1100] 00"/>
    </object></topology>"""
    found = hwloc.read(document(xml))

    assert found.ranges == [(0, 8 * GIB, 0)]
    assert paths(found) == ["0000:00:02.0"]


def test_read_without_memory_has_the_default(document):
    """16 GiB on one node."""
    xml = """<topology version="2.0"><object type="Machine">
      <object type="OSDev" name="eth0" osdev_type="2"/></object></topology>"""

    assert hwloc.read(document(xml)).ranges == [(0, 16 * GIB, 0)]


def test_read_v3_has_types_as_bits_and_an_interface(document):
    """hwloc 3: osdev_type is a set of bits, pci_type ends with the programming interface."""
    xml = """<!DOCTYPE topology SYSTEM "hwloc2.dtd"><topology version="3.0">
      <object type="Machine" nodeset="0x1">
      <object type="PCIDev" pci_busid="0000:01:00.0" pci_type="0108 [144d:a824] [144d:a801] 00 02">
        <object type="OSDev" name="nvme0n1" osdev_type="1"/>
      </object>
      <object type="PCIDev" pci_busid="0000:02:00.0" pci_type="0302 [10de:1db8] [10de:131d] a1 00">
        <object type="OSDev" name="nvml0" osdev_type="12"/>
        <object type="OSDev" name="ib0" osdev_type="16"/>
      </object></object></topology>"""
    found = hwloc.read(document(xml))

    assert cell(found, "state", "0000:01:00.0")[9] == 0x02
    assert paths(found)[1] == "0000:01:00.0/block!nvme0n1"
    assert paths(found)[3:] == ["0000:02:00.0/drm!nvml0", "0000:02:00.0/net!ib0"]


def test_read_sparse_nodes_are_made_dense(document):
    """POWER numbers its nodes 0 and 8; the second becomes 1, and its devices follow."""
    xml = V2.replace('os_index="1" nodeset="0x00000002" local', 'os_index="8" local').replace(
        'os_index="1" cpuset="0x0000000c" nodeset="0x00000002"', 'nodeset="0x00000100"'
    )
    found = hwloc.read(document(xml))

    assert [node for *_, node in found.ranges] == [0, 1]
    assert list(found.devices.nodes) == [0] * 7 + [1] * 3


@pytest.mark.parametrize(
    ("nodeset", "node"),
    [("0x00000002", 1), ("0x1,0x0", 32), ("0x00000004,,0x0", 66), ("0xf...f", 0), ("0x0", 0)],
)
def test_read_nodeset_lowest_bit_is_the_node(document, nodeset, node):
    """Words of 32 bits, highest first; an empty word is 0; no bit at all is the parent's node."""
    nodes = "".join(
        f'<object type="NUMANode" os_index="{k}" local_memory="{GIB}"/>' for k in range(67)
    )
    xml = f"""<topology version="2.0"><object type="Machine" nodeset="0xf...f">{nodes}
      <object type="Group" nodeset="{nodeset}"><object type="OSDev" name="x" osdev_type="0"/>
      </object></object></topology>"""
    found = hwloc.read(document(xml))

    assert found.devices.nodes[0] == node


def test_read_same_address_twice_keeps_both(document):
    """A name that a sibling has is numbered."""
    one = '<object type="OSDev" name="eth0" osdev_type="2"/>'
    xml = f'<topology version="2.0"><object type="Machine">{one * 2}</object></topology>'

    assert paths(hwloc.read(document(xml))) == ["net!eth0", "net!eth0~2"]


# ---- bad documents: the rule, and the line ----

DEVICE = '<object type="PCIDev" pci_busid="{}" pci_type="{}"/>'
IDS = "0200 [8086:1592] [0000:0000] 00"


@pytest.mark.parametrize(
    ("content", "line", "rule"),
    [
        ("", 1, "no element"),
        ("not xml at all", 1, "syntax error"),
        ("<topology>\n<object>\n</topology>", 3, "mismatched tag"),
        (V2[: len(V2) // 2], None, "no element|unclosed"),
        ("<html>\n</html>", 1, "no hwloc topology"),
        ('<topology version="9.0"/>', 1, "version"),
        ("<topology>\n\n</topology>", 3, "no PCI or OS device"),
        (f"<topology>\n{DEVICE.format('0000:00:02', IDS)}\n</topology>", 2, "pci_busid"),
        (f"<topology>\n{DEVICE.format('0000:00:02.0', 'x')}\n</topology>", 2, "pci_type"),
        ('<topology>\n<object type="Bridge"/>\n</topology>', 2, "bridge_pci"),
        (
            '<topology>\n<object type="Bridge" bridge_pci="0000:[00-01]"/>\n</topology>',
            2,
            "bridge_type",
        ),
        ('<topology>\n<object type="OSDev" osdev_type="0"/></topology>', 2, "OSDev"),
        ('<topology>\n<object type="OSDev" name="a" osdev_type="z"/></topology>', 2, "no number"),
        ('<topology>\n<object type="NUMANode" local_memory="-1"/></topology>', 2, "no number"),
        (f'<topology>\n<object type="NUMANode" local_memory="{1 << 60}"/></topology>', 2, "NUMA"),
        ('<topology>\n<object type="Group" nodeset="0xzz"/></topology>', 2, "nodeset"),
        ("<topology>" + "\n<object>" * 600, 514, "deep"),
    ],
)
def test_read_wrong_document_is_valueerror_with_the_line(document, content, line, rule):
    """One line of text: the file, the line in it, the rule."""
    path = document(content)
    with pytest.raises(ValueError, match=rule) as caught:
        hwloc.read(path)

    assert str(caught.value).startswith(f"{path}: line {line if line else ''}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "subset",
    [
        '<!ENTITY a "aaaaaaaa">\n<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">',
        '<!ENTITY x SYSTEM "file:///etc/passwd">',
        '<!ENTITY % p "x">',
    ],
)
def test_read_entity_declarations_are_refused(document, subset):
    """Entities are not expanded, nested ones neither: the declaration is the error."""
    path = document(f"<!DOCTYPE topology [\n{subset}\n]>\n<topology>&b;</topology>")
    with pytest.raises(ValueError, match=r"line 2: declares the entity"):
        hwloc.read(path)


def test_read_absent_file_is_oserror(tmp_path):
    """ENOENT, with the path."""
    with pytest.raises(FileNotFoundError):
        hwloc.read(tmp_path / "none.xml")


def test_read_binary_file_is_valueerror(document):
    """Bytes that are no XML in any encoding."""
    with pytest.raises(ValueError, match="line 1"):
        hwloc.read(document(bytes(range(256)) * 16))


@pytest.mark.skipif(shutil.which("lstopo") is None, reason="lstopo (hwloc) is not installed")
@pytest.mark.parametrize("options", [[], ["--export-xml-flags", "v1"]], ids=["v2", "v1"])
def test_read_what_lstopo_writes_here(tmp_path, options):
    """The file of this machine is read, and each PCI function in it is one that Linux has."""
    path = tmp_path / "here.xml"
    command = ["lstopo", "--no-caches", "--whole-io", "--of", "xml", *options, str(path)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if made.returncode or not path.exists():
        pytest.skip(f"lstopo failed: {made.stderr.strip()}")
    try:
        found = hwloc.read(path)
    except ValueError as error:
        pytest.skip(f"this machine has no I/O devices that hwloc sees: {error}")

    content = path.read_text()
    functions = [path for path in paths(found) if path.count("/") and "!" not in path]
    assert all(path.rpartition("/")[2] in content for path in functions)
    assert found.memory_bytes > 0
