"""What holds for any hwloc file, description, record and size of device set."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luo import workloads
from luo.errors import HandoverError
from luo.topology import Host, hwloc, synthetic
from luo.topology._rows import pack_attributes, unpack_attributes

XML = b"""<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE topology SYSTEM "hwloc2.dtd">
<topology version="2.0">
  <object type="Machine" nodeset="0x00000003">
    <object type="Package" nodeset="0x00000002">
      <object type="NUMANode" os_index="1" nodeset="0x00000002" local_memory="8589934592"/>
      <object type="Bridge" bridge_type="0-1" depth="0" bridge_pci="0000:[00-1f]">
        <object type="PCIDev" pci_busid="0000:01:00.0" pci_type="0200 [8086:1592] [1028:0ad1] 02">
          <info name="PCIVendor" value="Intel Corporation"/>
          <object type="OSDev" name="ens1f0" osdev_type="2"/>
        </object>
      </object>
    </object>
  </object>
</topology>
"""

TOML = b"""memory = "64GiB"
nodes = 2
kho_scratch = "64M,1G,1G"
[devices]
count = 20
[[vms]]
name = "web"
count = 3
devices = 1
ram = { 4KiB = "1MiB", 2MiB = "1GiB" }
"""


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The document with a few bytes replaced, removed or doubled."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(damaged) - 1))
        length = draw(st.integers(0, 20))
        damaged[at : at + length] = draw(st.binary(max_size=4) | st.just(damaged[at : at + 40]))
        if not damaged:
            break
    return bytes(damaged)


def outcome(call, *arguments, **options):
    """What the call returns, or the error that it may raise."""
    try:
        return call(*arguments, **options)
    except (ValueError, OSError) as error:
        return error


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200) | damaged(XML))
def test_hwloc_read_any_bytes_is_a_host_or_valueerror(content):
    """No bytes give another exception, or a message of two lines."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "host.xml")
        path.write_bytes(content)
        found = outcome(hwloc.read, path)

    if isinstance(found, Host):
        assert len(found.devices) == found.source["devices"] > 0
    else:
        assert type(found) is ValueError
        assert str(found).startswith(f"{path}: line ")
        assert len(str(found).splitlines()) == 1


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200) | damaged(TOML))
def test_workloads_host_any_bytes_is_a_host_or_valueerror(content):
    """The same for descriptions."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "host.toml")
        path.write_bytes(content)
        found = outcome(workloads.host, path, devices=10)

    if isinstance(found, Host):
        assert sum(vm.ram_bytes for vm in found.vms) < found.memory_bytes
    else:
        assert directory in str(found)
        assert len(str(found).splitlines()) == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=300)), max_size=6))
def test_attributes_pack_and_unpack_are_inverse(pairs):
    """Any names and values come back."""
    assert unpack_attributes(pack_attributes(pairs)) == pairs


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_attributes_unpack_any_bytes_is_canonical_or_handovererror(record):
    """What is accepted packs to the same bytes."""
    found = outcome(unpack_attributes, record)

    if isinstance(found, HandoverError):
        assert found.phys is not None
        assert 0 <= found.phys < len(record)
    else:
        assert pack_attributes(found) == record


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000), st.integers(0, 1 << 64), st.integers(1, 9))
def test_generate_any_size_is_a_tree(n, seed, nodes):
    """Exactly n devices with distinct paths, parents first, nodes in range, state for each."""
    tree = synthetic.generate(n, seed, nodes)
    paths = {tree.path(index) for index in tree}
    sizes = np.diff(np.asarray(tree.column("state")[1]))

    assert len(tree) == len(paths) == n
    assert (np.asarray(tree.parents) < np.arange(n)).all()
    assert set(np.asarray(tree.nodes).tolist()) <= set(range(nodes))
    assert set(sizes.tolist()) <= {64, 256}
