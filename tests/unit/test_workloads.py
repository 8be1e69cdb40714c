"""Presets, and hosts described in TOML: what is made, and which descriptions are refused."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import kernels
import numpy as np
import pytest

import luo
from luo import workloads
from luo.cli import main
from luo.kho import Kho
from luo.topology import Host

GIB, TIB = 1 << 30, 1 << 40
PAGE = 4096

SMALL = """
memory = "64GiB"
nodes = 2
[devices]
source = "synthetic"
count = 500
[[vms]]
name = "web"
count = 3
vcpus = 2
devices = 4
ram = { 4KiB = "1MiB", 2MiB = "1GiB" }
[[vms]]
name = "db"
ram = { 1GiB = "2GiB" }
"""


@pytest.fixture
def describe(tmp_path):
    def write(text, name="host.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def nodes_of(host: Host) -> dict[int, int]:
    found: dict[int, int] = {}
    for _, nbytes, node in host.ranges:
        found[node] = found.get(node, 0) + nbytes
    return found


def used(host: Host) -> dict[int, int]:
    found: dict[int, int] = {}
    for vm in host.vms:
        found[vm.node] = found.get(vm.node, 0) + vm.ram_bytes
    return found


@pytest.mark.parametrize(
    ("name", "memory", "nodes", "vms", "devices"),
    [
        ("cloud", 2 * TIB, 2, 400, 3_000),
        ("dense", 16 * TIB, 8, 1_000, 20_000),
        pytest.param("stress", TIB, 2, 0, 1_000_000, marks=pytest.mark.large),
    ],
)
def test_host_preset_is_as_large_as_it_says(name, memory, nodes, vms, devices):
    """Memory, nodes, virtual machines and devices of each preset."""
    made = workloads.host(name)

    assert made.memory_bytes == memory
    assert nodes_of(made) == dict.fromkeys(range(nodes), memory // nodes)
    assert len(made.vms) == vms
    assert len(made.devices) == devices
    assert made.source == {"kind": "synthetic", "path": name, "devices": devices}
    assert made.kho_scratch is None


@pytest.mark.parametrize("name", ["cloud", "dense"])
def test_host_preset_virtual_machines_fit(name):
    """With the kernel's own scratch, each machine's RAM is found on its node, to the last folio."""
    made = workloads.host(name)
    memory = made.machine().memory
    kho = Kho(memory)
    for vm in made.vms:
        for order, nr_folios in vm.ram:
            memory.alloc_folios(nr_folios, order, vm.node)

    assert kho.nr_preserved < 10
    for node, nbytes in nodes_of(made).items():
        assert used(made)[node] < nbytes - memory.nr_free_pages(node) * PAGE


@pytest.mark.parametrize("name", ["cloud", "dense"])
def test_host_preset_mixes_folios_and_keeps_small_ones_few(name):
    """All three sizes of folio occur; the small ones are a few million at most."""
    folios = dict.fromkeys((0, 9, 18), 0)
    for vm in workloads.host(name).vms:
        for order, nr_folios in vm.ram:
            folios[order] += nr_folios

    assert min(folios.values()) > 0
    assert folios[0] < 3_000_000
    assert folios[9] < 3_000_000


@pytest.mark.parametrize("name", ["cloud", "dense"])
def test_host_preset_assigns_each_device_once(name):
    """Devices of virtual machines are bound to vfio-pci, on its node, and not shared."""
    made = workloads.host(name)
    assigned = np.concatenate([vm.devices for vm in made.vms])
    drivers = {made.devices.driver_names[k] for k in made.devices.driver_ids[assigned]}

    assert drivers == {"vfio-pci"}
    assert len(set(assigned.tolist())) == len(assigned) > len(made.vms)
    assert assigned.dtype == np.int32
    for vm in made.vms:
        assert set(made.devices.nodes[vm.devices].tolist()) <= {vm.node}


def test_host_preset_names_are_unique():
    """No two virtual machines share a name."""
    names = [vm.name for vm in workloads.host("dense").vms]

    assert len(set(names)) == len(names)


def test_host_default_preset_is_this_machine():
    """The preset host has this machine's devices, and no virtual machine."""
    try:
        made = workloads.host("host")
    except (OSError, ValueError) as error:
        pytest.skip(f"no /sys on this machine: {error}")

    assert made.source["kind"] == "sysfs"
    assert made.source["path"] == "/sys"
    assert made.vms == []


def test_host_presets_are_listed():
    """Each name in PRESETS has its file."""
    for name in workloads.PRESETS:
        if name not in ("stress",):
            assert len(workloads.host(name, devices=10).devices) == 10


def test_host_devices_overrides_the_count_and_shares_out():
    """With fewer devices than described, machines get evenly what there is."""
    made = workloads.host("cloud", devices=100)
    sizes = [len(vm.devices) for vm in made.vms]
    drivers = made.devices.driver_ids == made.devices.driver_names.index("vfio-pci")

    assert len(made.devices) == 100
    assert sum(sizes) == drivers.sum() > 0
    assert max(sizes) == 1
    assert made.source["devices"] == 100


def test_host_devices_without_any_to_assign_gives_none():
    """One device is a root complex, which nobody can be given."""
    made = workloads.host("cloud", devices=1)

    assert {len(vm.devices) for vm in made.vms} == {0}


def test_host_same_seed_gives_the_same_devices():
    """The seed is that of the device set."""
    one, two, other = (workloads.host("cloud", seed=seed) for seed in (5, 5, 6))

    assert bytes(one.devices.column("state")[0]) == bytes(two.devices.column("state")[0])
    assert bytes(one.devices.column("state")[0]) != bytes(other.devices.column("state")[0])


def test_host_file_describes_a_host(describe):
    """Sizes, counts, names and folios come out as written."""
    path = describe(SMALL)
    made = workloads.host(path)

    assert made.ranges == [(0, 32 * GIB, 0), (32 * GIB, 32 * GIB, 1)]
    assert [vm.name for vm in made.vms] == ["web0", "web1", "web2", "db"]
    assert made.vms[0].ram == [(0, 256), (9, 512)]
    assert made.vms[3].ram == [(18, 2)]
    assert [vm.vcpus for vm in made.vms] == [2, 2, 2, 1]
    assert [len(vm.devices) for vm in made.vms] == [4, 4, 4, 0]
    assert made.source == {"kind": "synthetic", "path": str(path), "devices": 500}


def test_host_file_spreads_machines_over_nodes(describe):
    """Each goes where most memory is left; a named node is taken."""
    more = 'node = 1\n[[vms]]\nname = "x"\nram = {4KiB = 4096}'
    made = workloads.host(describe(f'kho_scratch = "16M,16M,16M"\n{SMALL}{more}'))

    assert [vm.node for vm in made.vms] == [0, 1, 0, 1, 0]


def test_host_file_memory_by_node(describe):
    """A list has a size for each node."""
    made = workloads.host(describe('memory = ["1GiB", "512MiB"]\ndevices.count = 5'))

    assert made.ranges == [(0, GIB, 0), (GIB, GIB // 2, 1)]


def test_host_file_scratch_is_kept_and_counted(describe):
    """An explicit scratch of little makes room that the kernel's sizing would not leave."""
    text = 'memory = "16GiB"\ndevices.count = 5\n[[vms]]\nname = "a"\nram = {1GiB = "15GiB"}'
    made = workloads.host(describe(f'kho_scratch = "64M,128M,128M"\n{text}'))

    assert made.kho_scratch == "64M,128M,128M"
    with pytest.raises(ValueError, match="left beside scratch"):
        workloads.host(describe(text))


def test_host_file_reads_gathered_sysfs(describe, tmp_path):
    """A path is relative to the file; memory comes with the tree."""
    device = tmp_path / "gathered" / "sys" / "devices" / "platform"
    device.mkdir(parents=True)
    (device / "uevent").write_text("")
    made = workloads.host(describe('[devices]\nsource = "sysfs"\npath = "gathered"'))

    assert made.source["path"] == str(tmp_path / "gathered")
    assert made.ranges == [(0, 16 * GIB, 0)]
    assert len(made.devices) == 1


def test_host_file_reads_hwloc(describe, tmp_path):
    """The same with an hwloc file."""
    (tmp_path / "it.xml").write_text(
        '<topology version="2.0"><object type="Machine" local_memory="4294967296">'
        '<object type="OSDev" name="eth0" osdev_type="2"/></object></topology>'
    )
    made = workloads.host(describe('[devices]\nsource = "hwloc"\npath = "it.xml"'))

    assert made.source["kind"] == "hwloc"
    assert made.memory_bytes == 4 * GIB


# ---- descriptions that are refused: the key and the rule ----

HEAD = 'memory = "64GiB"\nnodes = 2\ndevices.count = 50\n'
VM_HEAD = HEAD + '[[vms]]\nname = "a"\n'
RAM = 'ram = { 4KiB = "4KiB" }\n'


@pytest.mark.parametrize(
    ("text", "key", "rule"),
    [
        ("", "memory", "missing"),
        ("memory = ?", "", "line 1"),
        ("colour = 1\n" + HEAD, "colour", "unknown key"),
        (HEAD + "devices.colour = 1", "devices.colour", "unknown key"),
        (VM_HEAD + RAM + "colour = 1", "vms[0].colour", "unknown key"),
        (VM_HEAD + "ram = { 8KiB = 1 }", "vms[0].ram.8KiB", "unknown key"),
        ('"a\\nb" = 1\n' + HEAD, r"'a\nb'", "unknown key"),
        ("memory = true", "memory", "no size"),
        ('memory = "a\\nb"', "memory", "no size"),
        ("memory = 1.5", "memory", "no size"),
        ('memory = "lots"', "memory", "no size"),
        ("memory = -4194304", "memory", "no size"),
        ('memory = "5MiB"', "memory", "no multiple"),
        ('memory = "4MiB"\nnodes = 2', "memory", "no multiple"),
        ('memory = "17TiB"', "memory", "no multiple"),
        ("memory = []", "memory", "1 to"),
        ('memory = ["4MiB", 3]', "memory[1]", "no multiple"),
        ('memory = ["9TiB", "9TiB"]', "memory", "in all"),
        ('memory = ["4MiB"]\nnodes = 1', "nodes", "already"),
        ("nodes = 2", "nodes", "with memory"),
        ('memory = "64GiB"\nnodes = 0', "nodes", "no integer"),
        ('memory = "64GiB"\nnodes = "2"', "nodes", "no integer"),
        ('memory = "64GiB"\nnodes = true', "nodes", "no integer"),
        ('memory = "64GiB"', "devices.count", "no integer"),
        ('memory = "64GiB"\ndevices.count = 0', "devices.count", "no integer"),
        ('memory = "64GiB"\ndevices = 5', "devices", "table"),
        (HEAD + 'devices.source = "cloud"', "devices.source", "none of"),
        (HEAD + "devices.source = 5", "devices.source", "no string"),
        (HEAD + 'devices.path = "x"', "devices.path", "unknown key"),
        (HEAD + 'devices.source = "sysfs"', "memory", "comes with"),
        ('devices.source = "hwloc"', "devices.path", "missing"),
        ('devices.source = "sysfs"\ndevices.count = 5', "devices.count", "unknown key"),
        ('kho_scratch = "lots"\n' + HEAD, "kho_scratch", "neither"),
        ('kho_scratch = "0,0,0"\n' + HEAD, "kho_scratch", "neither"),
        ("kho_scratch = 5\n" + HEAD, "kho_scratch", "no string"),
        ("vms = 5\n" + HEAD, "vms", "array"),
        ("vms = [5]\n" + HEAD, "vms", "array"),
        (HEAD + "[[vms]]\n" + RAM, "vms[0].name", "no name"),
        (HEAD + '[[vms]]\nname = "a/b"\n' + RAM, "vms[0].name", "no name"),
        (HEAD + "[[vms]]\nname = 5\n" + RAM, "vms[0].name", "no string"),
        (VM_HEAD, "vms[0].ram", "missing"),
        (VM_HEAD + "ram = 5", "vms[0].ram", "table"),
        (VM_HEAD + "ram = {}", "vms[0].ram", "no RAM"),
        (VM_HEAD + "ram = { 2MiB = 4096 }", "vms[0].ram.2MiB", "no multiple"),
        (VM_HEAD + 'ram = { 1GiB = "1.5GiB" }', "vms[0].ram.1GiB", "no size"),
        (VM_HEAD + 'ram = { 1GiB = "40GiB" }', "vms[0].ram", "left beside scratch"),
        (VM_HEAD + 'count = 70\nram = { 1GiB = "1GiB" }', "vms[0].ram", "left beside scratch"),
        (VM_HEAD + RAM + "count = 0", "vms[0].count", "no integer"),
        (VM_HEAD + RAM + "vcpus = 0", "vms[0].vcpus", "no integer"),
        (VM_HEAD + RAM + "devices = -1", "vms[0].devices", "no integer"),
        (VM_HEAD + RAM + "devices = 51", "vms", "to be assigned"),
        (VM_HEAD + RAM + "node = 2", "vms[0].node", "no node"),
        (VM_HEAD + RAM + '[[vms]]\nname = "a"\n' + RAM, "vms", "called 'a'"),
        (VM_HEAD + RAM + '[[vms]]\nname = "b"\ncount = 65536\n' + RAM, "vms", "more than"),
    ],
)
def test_host_wrong_description_is_valueerror(describe, text, key, rule):
    """One line: the file, the key, the rule."""
    path = describe(text)
    with pytest.raises(ValueError, match=re.escape(rule)) as caught:
        workloads.host(path)

    assert str(caught.value).startswith(f"{path}: {key}: " if key else f"{path}: ")
    assert "\n" not in str(caught.value)


def test_host_unknown_preset_lists_those_there_are():
    """A name that is neither preset nor file."""
    with pytest.raises(ValueError, match=r"'clowd': host, cloud, dense, stress"):
        workloads.host("clowd")


def test_host_absent_file_is_enoent(tmp_path):
    """A .toml path that is not there."""
    with pytest.raises(FileNotFoundError):
        workloads.host(tmp_path / "none.toml")


def test_host_file_that_is_not_utf8_is_valueerror(tmp_path):
    """Bytes that are no text."""
    path = tmp_path / "host.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        workloads.host(path)


def test_host_bad_number_of_devices_is_valueerror():
    """Zero devices are no host's."""
    with pytest.raises(ValueError, match="devices=0"):
        workloads.host("cloud", devices=0)


def test_machine_has_the_hosts_memory_and_devices(describe):
    """Host.machine() builds hardware of these ranges and this tree."""
    made = workloads.host(describe(SMALL))
    machine = made.machine()

    assert list(machine.memory.ranges) == made.ranges
    assert machine.devices is made.devices


# ---- kernels ready for a live update ----


@pytest.fixture
def small(describe):
    """A small host, quick to boot, with virtual machines."""
    return describe(
        'memory = "256MiB"\nkho_scratch = "4M,8M,8M"\n[devices]\nsource = "synthetic"\ncount = 60\n'
        '[[vms]]\nname = "vm"\ncount = 2\nram = { 4KiB = "64KiB" }\n'
    )


def update(kernel):
    """Do what *kernel* is ready for; return what it came to, without what it took."""
    report = luo.live_update(kernel)
    report.kernel.close()
    assert report.error is None
    return report.devices, report.image


@pytest.mark.parametrize("successor", ["in-process", "process"])
@pytest.mark.parametrize("settings", [{}, {"kho_abi": "kho-v1"}], ids=str)
def test_load_gives_a_kernel_that_can_be_prepared_and_its_clones_too(successor, settings, small):
    """Each clone is another machine, and comes to the same; the original stays as it is."""
    with workloads.load(small, devices=50, seed=1, successor=successor, **settings) as kernel:
        clones = [kernel.clone(), kernel.clone()]
        outcomes = [update(clone) for clone in clones]

        assert kernel.luo.state is luo.State.NORMAL
        assert len({clone.machine for clone in (kernel, *clones)}) == 3
        assert outcomes[0] == outcomes[1] == update(kernel)
        devices, image = outcomes[0]
        assert devices["reclaimed"] == devices["preserved"] > 20
        assert devices["verified_bytes"] == devices["state_bytes"] > 0
        assert image["preserved_pages"] > 32  # the virtual machines' RAM


def test_load_settings_are_those_of_all_kernels(small):
    """Behaviour, generation and quirks, in the clone and in the kernel that waits."""
    settings = {"behaviour": "rfc1", "quirks": ["-flags-not-restored"]}
    with workloads.load(small, **settings) as kernel, kernel.clone() as clone:
        assert (clone.behaviour, clone.kho_abi) == ("rfc1", "kho-v5-series")
        assert clone.quirks == kernel.quirks
        report = luo.live_update(clone)
        assert report.kernel.quirks == kernel.quirks
        report.kernel.close()


def test_load_is_what_luo_run_boots(small, tmp_path):
    """Same devices requested, same bytes handed over, scratch as the host says."""
    document = tmp_path / "run.json"
    arguments = ["run", "--host", str(small), "--seed", "3", "--json", str(document)]
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    run = json.loads(document.read_text())
    with workloads.load(small, seed=3) as kernel:
        assert kernel.parameters.kho_scratch == "4M,8M,8M"
        devices, image = update(kernel)

    assert (devices, image) == (run["devices"], run["image"])


def test_load_takes_drivers_themselves_and_where_they_are(small, tmp_path, monkeypatch):
    """Both kernels have them; a file is found from every directory."""
    (tmp_path / "mine.py").write_text(
        "import luo\n"
        "called = []\n"
        "mine = luo.Subsystem('mine', prepare=lambda context: called.append(context.kernel))\n"
    )
    monkeypatch.chdir(tmp_path)
    called = []
    here = luo.Subsystem(
        "here",
        prepare=lambda context: called.append("prepare"),
        restore=lambda context: called.append("restore"),
    )
    with workloads.load(small, drivers=["mine.py", here]) as kernel:
        monkeypatch.chdir("/")
        assert not called  # nobody's own callbacks are called before they should
        clone = kernel.clone()
        assert {"mine", "here"} <= {one.name for one in clone.luo.subsystems}
        update(clone)

    assert called == ["prepare", "restore"]


def test_load_request_names_what_is_kept(small):
    """One glob or several, of which each must match something."""
    with workloads.load(small, request="*/*.1") as kernel:
        few = int(kernel.devices.requested.sum())
        assert 0 < few < 20
        assert int(kernel.clone().devices.requested.sum()) == few
    with workloads.load(small, request=["*/*.1", "*/*.0"]) as kernel:
        assert int(kernel.devices.requested.sum()) > few
    with pytest.raises(ValueError, match=r"no/such"):
        workloads.load(small, request=["*/*.1", "no/such"])


def test_clone_has_the_requests_of_now(small):
    """What was asked for after load() is asked for in the clone."""
    with workloads.load(small) as kernel:
        kernel.devices.request("*", on=False)
        first = int(np.flatnonzero(kernel.devices.eligible())[0])
        kernel.devices[first].requested = True

        assert np.flatnonzero(kernel.clone().devices.requested).tolist() == [first]


def test_load_takes_a_host_that_is_made_already(small):
    """One that was read from a /sys tree, say."""
    made = workloads.host(small, seed=2)
    with workloads.load(made) as kernel:
        assert kernel.devices.tree is made.devices
        update(kernel.clone())
    with pytest.raises(ValueError, match="made already"):
        workloads.load(made, devices=3)


def test_load_without_successor_leaves_the_choice(small):
    """The kernel and its clones have no next kernel until somebody loads one."""
    with workloads.load(small, successor=None) as kernel:
        clone = kernel.clone()
        assert not kernel.kexec_loaded
        assert not clone.kexec_loaded
        report = luo.live_update(clone, luo.KernelImage("luo.drivers:kernel"), in_process=True)
        report.kernel.close()

    assert report.error is None


def test_load_of_a_host_whose_updates_fail_fails_where_it_can_be_seen(small):
    """Rehearsing touches memory and nothing else: PREPARE says what is wrong."""
    with workloads.load(small, kho_abi="kho-v5-series", devices=100_000) as kernel:
        with pytest.raises(luo.LuoError):
            kernel.luo.prepare()
        assert kernel.luo.state is luo.State.NORMAL


def test_load_wrong_arguments_are_value_errors(small, describe):
    """No such successor; drivers that are here for a process; nothing that can be kept."""
    bare = describe('memory = "64MiB"\n[devices]\nsource = "synthetic"\ncount = 1\n', "bare.toml")
    with pytest.raises(ValueError, match="successor"):
        workloads.load(small, successor="thread")
    with pytest.raises(ValueError, match="module or file"):
        workloads.load(small, drivers=[luo.Driver("mine")], successor="process")
    with pytest.raises(ValueError, match="no device that can be kept"):
        workloads.load(bare)


def test_load_does_not_leave_first_touches_to_prepare(describe):
    """PREPARE of a map with hundreds of nodes meets hardly a page of memory for the first time."""
    ram = 'memory = "64GiB"\n[[vms]]\nname = "vm"\ncount = 5\nram = { 4KiB = "8GiB" }\n'
    host = describe(ram + '[devices]\nsource = "synthetic"\ncount = 100\n')
    with workloads.load(host) as kernel:
        memory = kernel.machine.memory
        before = os.fstat(memory.fd).st_blocks
        kernel.luo.prepare()
        nodes = kernel.image_sizes()["map_bytes"]
        touched = (os.fstat(memory.fd).st_blocks - before) * 512

    assert nodes > 1 << 20
    assert touched < nodes // 8


def test_clone_of_a_kernel_built_by_hand_is_eopnotsupp(small):
    """Nobody knows how to build another; nor if it is the next one."""
    by_hand = luo.Kernel(luo.Machine("64MiB")).boot()
    with workloads.load(small, successor=None) as kernel:
        kernel.kexec_load(luo.Kernel(kernel.machine))
        for one in (by_hand, kernel):
            with pytest.raises(luo.StateError) as refused:
                one.clone()
            assert refused.value.errno == errno.EOPNOTSUPP


def test_clone_of_a_kernel_that_is_gone_is_eshutdown(small):
    """What has ended cannot be repeated."""
    kernel = workloads.load(small)
    kernel.close()
    with pytest.raises(luo.StateError) as gone:
        kernel.clone()

    assert gone.value.errno == errno.ESHUTDOWN


def test_clone_of_an_image_s_kernel_is_of_that_image():
    """With its arguments and command line."""
    image = luo.KernelImage("kernels:plain", cmdline="kho=on liveupdate=on kho_scratch=1M,2M,1M")
    machine = kernels.machine()
    kernel = image.build(machine).boot()
    clone = kernel.clone()

    assert clone.machine is not machine
    assert clone.parameters == kernel.parameters
    assert sorted(clone.devices.tree) == sorted(machine.devices)


def test_live_update_takes_what_is_loaded(small):
    """And without that there is nothing to update to."""
    with workloads.load(small, successor=None) as kernel, pytest.raises(luo.StateError) as none:
        luo.live_update(kernel)

    assert none.value.errno == errno.EINVAL


def test_workloads_of_the_package_are_there_without_an_import_of_their_own():
    """``import luo`` is enough, and does not pay for them."""
    code = "import luo, sys; assert 'luo.workloads' not in sys.modules; luo.workloads.load"
    subprocess.run(
        [sys.executable, "-P", "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(luo.__file__).parents[1])},
    )
