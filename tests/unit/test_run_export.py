"""``luo run --trace`` and the other exports: real updates, with a kernel in a second process."""

import json
import shutil
import textwrap
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from luo import DeviceTree, KernelImage, Machine, PhysicalMemory, drivers, live_update
from luo.cli import main
from luo.profile import folded, trace

from .test_native import Context, kernel_of, library, table, wide  # noqa: F401
from .test_trace import as_chrome, as_perfetto

DRIVERS = """
import errno, luo

def keep(dev):
    dev.slot[:] = b"12345678"

def refuse(dev):
    if REFUSE:
        raise OSError(errno.EBUSY, "no")

def restore(dev):
    dev.reclaim()

def finish(dev):
    pass

names = ["pcieport", "mlx5_core", "vfio-pci", "ice", "iavf", "nvme", "nvidia", "virtio-pci", "wifi"]
ops = luo.LiveUpdateOps(
    prepare=keep, reboot=refuse, restore=restore, finish=finish, cancel=finish, state_size=8
)
REFUSE = False
for name in names:
    globals()[name] = luo.Driver(name, ops)
for name in ("pci", "soc"):
    globals()[name] = luo.Bus(name, luo.LiveUpdateOps(reboot=finish))
"""


@pytest.fixture
def mine(tmp_path):
    """Drivers that are called once a device."""
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(DRIVERS))
    return path


@pytest.fixture
def luo_run(tmp_path, mine, capsys):
    """Run ``luo run`` on a small host with a trace and a document, and read both."""
    host = tmp_path / "small.toml"
    host.write_text(
        'memory = "256MiB"\n[devices]\nsource = "synthetic"\ncount = 60\n'
        '[[vms]]\nname = "vm"\ncount = 2\nvcpus = 2\nram = { 4KiB = "64KiB" }\n'
    )
    document, drawn = tmp_path / "run.json", tmp_path / "trace.json"

    always = ["--host", host, "--drivers", mine, "--json", document, "--trace", drawn]

    def run(*args, status=0):
        with pytest.raises(SystemExit) as done:
            main(["run", *map(str, [*always, *args])])
        assert done.value.code == status, capsys.readouterr().err
        return json.loads(document.read_text()), as_chrome(drawn.read_text())[0]

    return run


def costs_of(lanes):
    """Return what the slices of callbacks sum to, by ``subsystem/name/EVENT``, and how many."""
    costs, calls = Counter(), Counter()
    for (_, lane), slices in lanes.items():
        if lane.startswith(("subsystems", "devices")):
            for name, begin, end, _ in slices:
                name, event = name.rsplit(" ", 1)
                subsystem = name if lane == "subsystems" else "devices"
                costs[f"{subsystem}/{name}/{event}"] += end - begin
                calls[event] += 1
    return costs, calls


@pytest.mark.parametrize(
    "options", [[], ["--in-process"], ["--repeat", "3"], ["--in-process", "--repeat", "3"]]
)
def test_trace_of_a_run_holds_every_callback_of_both_kernels(luo_run, options):
    """Slices sum to the figures of the last update, and stand in their phases."""
    document, lanes = luo_run(*options)
    last = document["runs"][-1]
    costs, calls = costs_of(lanes)

    assert costs == Counter(last["callbacks_ns"])
    assert min(calls[event] for event in ("PREPARE", "REBOOT", "RESTORE", "FINISH")) > 10
    phases = {}
    for kernel, events in (
        ("old kernel", {"PREPARE", "REBOOT"}),
        ("new kernel", {"RESTORE", "FINISH"}),
    ):
        mine = {name: (begin, end) for name, begin, end, _ in lanes[kernel, "phases"]}
        phases |= mine
        assert not {name for name in mine if name.startswith("state")} - {
            "state prepared",
            "state updated",
        }
        for (process, lane), slices in lanes.items():
            if process == kernel and lane.startswith(("subsystems", "devices")):
                for name, begin, end, _ in slices:
                    event = name.rsplit(" ", 1)[1]
                    first, after = mine[event.lower()]
                    assert event in events
                    assert first <= begin <= end <= after
    for name in ("prepare", "restore", "finish"):
        begin, end = phases[name]
        assert end - begin == last["phases_ns"][name]
    ((_, begin, end, args),) = lanes["live update", "blackout"]
    assert args["blackout_ns"] == last["phases_ns"]["blackout"]
    assert end - begin - args["digests_ns"] == args["blackout_ns"]
    assert phases["prepare"][1] <= begin < phases["jump"][0] < phases["restore"][0] < end


def test_capped_trace_of_a_run_says_so(luo_run):
    """--spans N: so many slices, the longest of both kernels."""
    _, lanes = luo_run("--spans", 7)
    _, calls = costs_of(lanes)

    assert sum(calls.values()) == 7
    assert any("longest of" in name for name, *_ in lanes["live update", "about this trace"])


def test_trace_of_a_dry_reboot_has_the_one_kernel(luo_run):
    """PREPARE, REBOOT and CANCEL."""
    _, lanes = luo_run("--dry-reboot")
    _, calls = costs_of(lanes)

    assert set(calls) == {"PREPARE", "REBOOT", "CANCEL"}
    assert {process for process, _ in lanes} == {"old kernel", "live update"}


def test_trace_of_a_failed_update_shows_how_far_it_came(luo_run, mine):
    """What was called, and what was undone."""
    mine.write_text(mine.read_text().replace("REFUSE = False", "REFUSE = True"))
    _, lanes = luo_run(status=1)
    _, calls = costs_of(lanes)

    assert calls["PREPARE"] > calls["REBOOT"] > 0
    assert calls["CANCEL"] > 0
    assert {process for process, _ in lanes} == {"old kernel", "live update"}


def test_trace_in_virtual_time_is_the_same_each_time(luo_run, tmp_path):
    """Byte for byte, with the costs of a measured run."""
    luo_run()
    cost = (tmp_path / "run.json").rename(tmp_path / "cost.json")
    traces = []
    for _ in range(2):
        document, lanes = luo_run("--clock", "virtual", "--cost", cost)
        traces.append((tmp_path / "trace.json").read_bytes())

    assert traces[0] == traces[1]
    assert costs_of(lanes)[0] == Counter(document["runs"][0]["callbacks_ns"])


def test_stacks_and_metrics_of_a_run_are_those_of_its_document(luo_run, tmp_path):
    """Written by the run, and from its document later."""
    files = {"--folded": tmp_path / "stacks", "--prometheus": tmp_path / "prom"}
    options = [word for pair in files.items() for word in pair]
    document, _ = luo_run(*options)
    written = {option: path.read_text() for option, path in files.items()}
    with pytest.raises(SystemExit) as done:
        main(["export", str(tmp_path / "run.json"), *map(str, options)])

    assert done.value.code == 0
    assert {option: path.read_text() for option, path in files.items()} == written
    total = sum(int(line.split()[1]) for line in written["--folded"].splitlines())
    assert total == sum(row["total_ns"] for row in document["callbacks"])


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_callbacks_of_several_threads_have_a_lane_for_each(library):  # noqa: F811
    """A worker calls one after the other, several do so at a time."""
    machine = wide()

    def kernel():
        ops = table(library, Context(fail_at=-1))
        return kernel_of(machine, replace(ops, thread_safe=True), workers=3, spans=True)

    old = kernel().boot()
    old.devices.request("*")
    report = live_update(old, kernel())
    lanes = as_chrome(trace.from_report(report))[0]
    report.kernel.close()

    devices = {where: slices for where, slices in lanes.items() if where[1].startswith("devices")}
    assert set(devices) == {
        (kernel, f"devices, worker {number}")
        for kernel in ("old kernel", "new kernel")
        for number in range(3)
    }
    for slices in devices.values():
        assert all(a[2] <= b[1] for a, b in pairwise(slices))
    assert costs_of(lanes)[0] == Counter(report.runs[0]["callbacks_ns"])


def test_names_from_hardware_do_not_break_a_trace(mine):
    """A device whose name is no UTF-8, in both kernels and every format."""
    tree = DeviceTree()
    names = ['q"uote', "new\nline", "\udcff\udc80", "semi;colon blank 7", "ünï"]
    for name in names:
        tree.add(name, bus="soc", driver="wifi")
    args = {"modules": [str(mine)], "spans": True, "cmdline": "kho=on liveupdate=on"}
    machine = Machine(memory=PhysicalMemory("64MiB"), devices=tree)
    kernel = drivers.kernel(machine, **args).boot()
    for number in range(len(names)):
        kernel.devices.request([number])
    report = live_update(kernel, KernelImage("luo.drivers:kernel", args=args))
    try:
        drawn = trace.from_report(report)
        lanes, _ = as_perfetto(drawn)
        for kernel_name in ("old kernel", "new kernel"):
            seen = {args["device"] for *_, args in lanes[kernel_name, "devices"]}
            assert seen == {trace.printable(name) for name in names}
        assert as_chrome(drawn)[0] == lanes
        assert all(line.count(" ") == 1 for line in folded.callbacks(report.to_dict()))
    finally:
        report.kernel.close()
