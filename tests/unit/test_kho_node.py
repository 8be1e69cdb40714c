"""KHO nodes of devices, drivers and buses: made in PREPARE, read in the next kernel, freed."""

import errno
import itertools

import pytest
from rig import settled, small_machine, snapshot, updated

from luo import abi
from luo.device import Bus, Driver, LiveUpdateOps
from luo.errors import CallbackError, HandoverError, StateError
from luo.image import Image
from luo.image.convert import convert
from luo.kernel import Kernel
from luo.kho import KhoNode
from luo.machine import Machine

EVERY = list(abi.GENERATIONS)
NIC0, NIC1 = "pci0/port/nic0", "pci0/port/nic1"


def kernel_of(machine, seen, **more):
    """A kernel whose nic driver and pci bus use every node there is."""
    ops = {
        "prepare": lambda dev: dev.kho_node.properties.update(queue=dev.path.encode(), seq=b"aaaa"),
        "reboot": lambda dev: dev.kho_node.properties.update(seq=b"bbbb"),
        "restore": lambda dev: (seen.append(("RESTORE", dev.path, dict(dev.kho_node.properties))),
                                dev.reclaim())[1],
        "finish": lambda dev: seen.append(("FINISH", dev.path, dict(dev.kho_node.properties))),
    } | more.pop("ops", {})  # fmt: skip
    nic = Driver("nic", LiveUpdateOps(**ops))

    def bus_prepare(dev):
        node = dev.devices.kho_node(dev.bus)
        node.properties["count"] = bytes([node.properties.get("count", b"\0")[0] + 1])
        dev.devices.kho_node(nic).properties.setdefault("firmware", b"1.2")

    return Kernel(
        machine,
        drivers=[nic, Driver("nvme", LiveUpdateOps()), Driver("portdrv", LiveUpdateOps())],
        buses=[Bus("pci", LiveUpdateOps(prepare=bus_prepare))],
        **more,
    )


@pytest.fixture
def machine():
    """A machine with the small set of devices."""
    return small_machine()


def unrestored_without_devices(generation):
    """How many blocks an update of nothing leaves: what KHO itself keeps."""
    machine = small_machine()
    kernel = kernel_of(machine, [], kho_abi=generation).boot()
    kernel = updated(kernel, kernel_of(machine, [], kho_abi=generation))
    kernel.luo.finish()
    return kernel.kho.incoming.nr_unrestored


@pytest.mark.parametrize("generation", EVERY)
def test_kho_node_is_read_in_the_next_kernel(generation, machine):
    """Restore and finish read what prepare wrote and reboot changed; after FINISH it is gone."""
    seen = []
    kernel = kernel_of(machine, [], kho_abi=generation).boot()
    kernel.devices.request([2, 3])
    kernel = updated(kernel, kernel_of(machine, seen, kho_abi=generation))
    firmware = kernel.kho_node(kernel.devices.drivers[0]).properties
    count = kernel.kho_node(kernel.devices.buses[0]).properties
    result = kernel.luo.finish()

    expected = {path: {"queue": path.encode(), "seq": b"bbbb"} for path in (NIC0, NIC1)}
    assert {path: node for event, path, node in seen if event == "RESTORE"} == expected
    assert {path: node for event, path, node in seen if event == "FINISH"} == expected
    assert firmware == {"firmware": b"1.2"}
    assert count == {"count": b"\x03"}  # both, and the port above them
    assert (result.unreclaimed, result.failures) == ((), ())
    assert kernel.kho.incoming.nr_unrestored == unrestored_without_devices(generation)
    with pytest.raises(StateError, match="NORMAL") as caught:
        kernel.devices[NIC0].kho_node
    assert caught.value.errno == errno.EINVAL


def test_kho_node_of_who_made_none_is_empty(machine):
    """The next kernel may ask for any node."""
    kernel = kernel_of(machine, []).boot()
    kernel.devices.request([2])
    kernel = updated(kernel, kernel_of(machine, []))

    assert kernel.devices["pci0/port"].kho_node.properties == {}


def test_kho_node_of_a_device_that_takes_no_part_is_einval(machine):
    """Only devices that are preserved have one."""
    kernel = kernel_of(machine, []).boot()
    kernel.devices.request([2])
    kernel.luo.prepare()
    with pytest.raises(StateError, match=NIC1) as caught:
        kernel.devices[NIC1].kho_node

    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("generation", ["kho-v5-series", "kho-v1-notifier", "kho-v4"])
def test_kho_node_is_freed_by_cancel(generation, machine):
    """Nothing stays behind, and the next update starts without."""
    kernel = kernel_of(machine, [], kho_abi=generation).boot()
    kernel.devices.request([2])
    before = settled(kernel)
    for _ in range(2):
        kernel.luo.prepare()
        assert kernel.devices[NIC0].kho_node.properties["seq"] == b"aaaa"
        kernel.luo.cancel()
        assert snapshot(kernel) == before


@pytest.mark.parametrize("generation", ["kho-v4", "kho-v5-series"])
@pytest.mark.parametrize("value", [b"longer", b"aaaaa", b"aaa"])
def test_kho_node_changed_in_length_by_reboot_rolls_back(value, generation, machine):
    """REBOOT allocates nothing any more, so a value of another length is EINVAL."""
    ops = {"reboot": lambda dev: dev.kho_node.properties.update(seq=value)}
    kernel = kernel_of(machine, [], ops=ops, kho_abi=generation).boot()
    kernel.devices.request([2])
    before = settled_without(kernel)
    kernel.luo.prepare()
    with pytest.raises(CallbackError, match=f"/seq has {len(value)} bytes") as caught:
        kernel.luo.reboot()

    assert (caught.value.errno, caught.value.device) == (errno.EINVAL, NIC0)
    assert snapshot(kernel) == before


def cyclic(node):
    """Make *node* a child of itself."""
    node.children["again"] = node


def deep(node):
    """Put a hundred nodes below each other into *node*."""
    for _ in range(100):
        node.children["down"] = node = KhoNode()


WRONG = [
    pytest.param(lambda node: node.properties.update(x=5), "x is 5, not bytes", id="number"),
    pytest.param(lambda node: node.properties.update(x="text"), "not bytes", id="text"),
    pytest.param(lambda node: node.properties.update({"a\0b": b""}), "is no name", id="nul"),
    pytest.param(lambda node: node.properties.update({"a" * 256: b""}), "is no name", id="long"),
    pytest.param(lambda node: node.children.update({"a/b": KhoNode()}), "is no name", id="slash"),
    pytest.param(lambda node: node.children.update(x=None), "is no KhoNode", id="none"),
    pytest.param(cyclic, "already", id="cycle"),
    pytest.param(deep, "too deep", id="deep"),
]


@pytest.mark.parametrize(("spoil", "why"), WRONG)
def test_kho_node_that_cannot_be_written_names_its_device(spoil, why, machine):
    """EINVAL, with driver and device; everything is as before."""
    ops = {"prepare": lambda dev: spoil(dev.kho_node)}
    kernel = kernel_of(machine, [], ops=ops).boot()
    kernel.devices.request([2])
    before = settled_without(kernel)
    with pytest.raises(CallbackError, match=why) as caught:
        kernel.luo.prepare()

    error = caught.value
    assert (error.errno, error.event, error.kind) == (errno.EINVAL, "PREPARE", "driver")
    assert (error.name, error.device, error.rolled_back) == ("nic", NIC0, True)
    assert snapshot(kernel) == before


def settled_without(kernel):
    """What is there when pages of the map are, without any driver having been called."""
    kernel.devices.request([2], False)
    kernel.devices.request([4])
    kernel.luo.prepare()
    kernel.luo.cancel()
    kernel.devices.request([4], False)
    kernel.devices.request([2])
    return snapshot(kernel)


def test_kho_node_made_in_reboot_is_einval(machine):
    """There is no room for a new one."""
    ops = {"prepare": None, "reboot": lambda dev: dev.kho_node.properties.update(seq=b"x")}
    kernel = kernel_of(machine, [], ops=ops).boot()
    kernel.devices.request([2])
    kernel.luo.prepare()
    with pytest.raises(CallbackError, match="PREPARE, which makes it") as caught:
        kernel.luo.reboot()

    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("start", "target"), list(itertools.permutations(EVERY, 2)))
def test_kho_node_survives_conversion(start, target, machine, tmp_path):
    """A kernel of another generation reads the nodes of a converted image, there and back."""
    kernel = kernel_of(machine, [], kho_abi=start).boot()
    kernel.devices.request([2])
    kernel.on_handover = lambda handover: Image.from_memory(
        machine.memory, handover, abi=start
    ).save(tmp_path / "image")
    updated(kernel, kernel_of(machine, [], kho_abi=start)).close()
    converted = convert(Image.load(tmp_path / "image"), target)
    back = convert(converted, start)

    assert converted.verify() == back.verify() == []
    for image in (converted, back):
        seen = []
        other = Machine(image.memory(), machine.devices)
        with kernel_of(other, seen, kho_abi=image.abi) as kernel:
            kernel.boot(image.handover)
            assert seen == [("RESTORE", NIC0, {"queue": NIC0.encode(), "seq": b"bbbb"})]
            assert kernel.luo.finish().failures == ()


@pytest.mark.parametrize("wrong", ["outside", "unpreserved", "noise", "name"])
def test_kho_nodes_that_are_wrong_are_refused(wrong, machine):
    """The tree of nodes is checked before anything is taken over."""
    kernel = kernel_of(machine, []).boot()
    kernel.devices.request([2])
    kernel.luo.prepare()
    kernel.luo.reboot()
    layer = next(link for link in kernel.luo._chain if link.name == "devices")
    place = layer.luo_properties()["nodes"]
    blob = bytes(machine.memory.view(place, 4096))
    if wrong in ("outside", "unpreserved"):
        at = bytes(machine.memory.view(kernel.luo._page, 4096)).index(place.to_bytes(8, "little"))
        value = 1 << 60 if wrong == "outside" else machine.memory.alloc_folio(0)
        machine.memory.view(kernel.luo._page + at, 8)[:] = value.to_bytes(8, "little")
    elif wrong == "noise":
        machine.memory.view(place, 16)[:] = b"\xff" * 16
    else:
        at = blob.index(b"luo-nodes-v1")
        machine.memory.view(place + at, 12)[:] = b"luo-nodes-v9"
    with pytest.raises(HandoverError):
        kernel_of(Machine(machine.memory, machine.devices), []).validate(kernel.kho.handover())
