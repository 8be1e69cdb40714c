"""Tables of what callbacks cost: columns, order, files; and what of it ``luo-run/1`` has."""

import builtins
import csv
import json
import time

import numpy as np
import pytest

import luo
from luo._kho import CallRecorder
from luo.profile.tables import Profile, added, device_costs
from luo.report import Report

TABLES = ("callback", "subsystem", "driver", "bus", "event", "device", "span")


@pytest.fixture
def tree():
    """A bridge with two disks, and a card."""
    tree = luo.DeviceTree()
    tree.add("bridge", bus="pci", driver="port")
    tree.add("disk0", parent="bridge", bus="nvme", driver="nvme")
    tree.add("disk1", parent="bridge", bus="nvme", driver="nvme")
    tree.add("nic")
    return tree


@pytest.fixture
def profile(tree):
    """Three callbacks: two disks, the bridge, and a subsystem that is restored late."""
    recorder = CallRecorder(devices=4, spans=4)
    for label, ns, devices, device in (
        (("devices", "PREPARE", "driver", "nvme"), 100, 1, 1),
        (("devices", "PREPARE", "driver", "nvme"), 300, 1, 2),
        (("devices", "REBOOT", "bus", "pci"), 50, 1, 0),
        (("kvm", "RESTORE", "subsystem", "kvm"), 2000, 0, -1),
        (("kvm", "REBOOT", "subsystem", "kvm"), 450, 0, -1),
    ):
        recorder.add(recorder.key(*label), ns, devices, device, begin=7)
    return Profile(recorder, tree, 1000, {"kvm"})


def test_table_by_callback_is_in_the_order_of_first_calls(profile):
    """All figures of each row; a late RESTORE is no part of blackout."""
    table = profile.table()

    assert table.dtype.names == (
        "subsystem", "event", "kind", "name", "calls", "devices", "total_ns", "min_ns", "max_ns",
        "max_device", "p50_ns", "p95_ns", "p99_ns", "blackout_ns", "blackout_share",
    )  # fmt: skip
    assert table[0].tolist()[:10] == (
        "devices", "PREPARE", "driver", "nvme", 2, 2, 400, 100, 300, 2,
    )  # fmt: skip
    assert table["blackout_ns"].tolist() == [0, 50, 0, 450]
    assert table["blackout_share"].tolist() == [0, 0.05, 0, 0.45]


@pytest.mark.parametrize(
    ("by", "words", "total", "dark"),
    [
        ("subsystem", [("kvm",), ("devices",)], [2450, 450], [450, 50]),
        ("driver", [("devices", "nvme")], [400], [0]),
        ("bus", [("devices", "pci")], [50], [50]),
        ("event", [("RESTORE",), ("REBOOT",), ("PREPARE",)], [2000, 500, 400], [0, 500, 0]),
    ],
)
def test_table_by_group_is_dearest_first(by, words, total, dark, profile):
    """Words of the group, sums, and the part in blackout."""
    table = profile.table(by)

    assert [row[: len(words[0])] for row in table.tolist()] == words
    assert table["total_ns"].tolist() == total
    assert table["blackout_ns"].tolist() == dark
    assert len(profile.table(by, worst=1)) == 1


def test_table_by_device_names_it(profile):
    """Path, driver and bus; what has cost nothing is left out."""
    assert profile.table("device").tolist() == [
        (2, "bridge/disk1", "nvme", "nvme", 300, 0),
        (1, "bridge/disk0", "nvme", "nvme", 100, 0),
        (0, "bridge", "port", "pci", 50, 50),
    ]
    assert [row["path"] for row in profile.rows("device", worst=1)] == ["bridge/disk1"]


def test_spans_are_the_recorders_own_and_rows_have_words(profile):
    """No copy as an array; as dictionaries, label and path."""
    assert np.shares_memory(profile.table("span"), profile.spans)
    assert profile.dropped == 1
    assert profile.rows("span", worst=2) == [
        {"begin_ns": 7, "ns": 2000, "subsystem": "kvm", "event": "RESTORE", "kind": "subsystem",
         "name": "kvm", "device": None, "devices": 0, "worker": 0},
        {"begin_ns": 7, "ns": 300, "subsystem": "devices", "event": "PREPARE", "kind": "driver",
         "name": "nvme", "device": "bridge/disk1", "devices": 1, "worker": 0},
    ]  # fmt: skip


def test_quantiles_are_columns(profile):
    """Any number of them, by their percentage."""
    (row,) = profile.rows("driver", quantiles=(0, 0.5, 0.999, 1))

    assert [name for name in row if name.startswith("p")] == [
        "p0_ns", "p50_ns", "p99.9_ns", "p100_ns",
    ]  # fmt: skip
    assert (row["p0_ns"], row["p100_ns"]) == (100, 300)


@pytest.mark.parametrize("by", TABLES)
def test_empty_profile_has_empty_tables(by, tmp_path):
    """All columns are there, in memory and in files."""
    empty = Profile(CallRecorder(devices=1))

    assert len(empty.table(by)) == 0
    assert empty.rows(by) == []
    empty.to_csv(tmp_path / "empty.csv", by)
    assert (tmp_path / "empty.csv").read_text().count("\n") == 1


def test_unknown_blackout_is_nan_and_none(tree):
    """A kernel knows what its callbacks cost, and not what the other one's did."""
    recorder = CallRecorder()
    recorder.add(recorder.key("kvm", "REBOOT", "subsystem", "kvm"), 5)
    profile = Profile(recorder)

    assert np.isnan(profile.table()["blackout_share"][0])
    assert profile.rows()[0]["blackout_share"] is None
    assert profile.rows()[0]["blackout_ns"] == 5


def test_profile_without_a_tree_has_numbers_only():
    """Of devices and spans."""
    recorder = CallRecorder(devices=2, spans=1)
    recorder.add(recorder.key("devices", "REBOOT", "driver", "nvme"), 5, 1, 1)
    profile = Profile(recorder)

    assert profile.table("device").tolist() == [(1, "", "", "", 5, 5)]
    assert profile.rows("span")[0]["device"] == "1"


@pytest.mark.parametrize(
    "wrong", [{"by": "phase"}, {"worst": -1}, {"quantiles": [2]}, {"by": "device", "worst": -1}]
)
def test_table_that_does_not_exist_is_value_error(wrong, profile):
    """Of what there is none, which quantile is none."""
    with pytest.raises(ValueError, match=r"none of|0 or more|0 to 1"):
        profile.table(**wrong)


def test_histogram_of_an_unknown_label_is_value_error(profile):
    """There is no empty histogram by mistake."""
    with pytest.raises(ValueError, match="not in list"):
        profile.histogram(("kvm", "FINISH", "subsystem", "kvm"))


def test_added_columns_may_differ_in_length():
    """A device that was plugged in later has cost nothing before."""
    one, two = np.ones((2, 2), np.float32), np.ones((2, 3), np.float32)

    assert added(one, two, -one).tolist() == [[1, 1, 1]] * 2
    assert added().shape == (2, 0)


def test_device_costs_of_a_device_without_driver_and_bus(tree):
    """Their words are empty."""
    costs = np.array([[0, 0, 0, 9], [0, 0, 0, 1]], np.float32)

    assert device_costs(tree, costs).tolist() == [(3, "nic", "", "", 10, 1)]


# ---- files ----


@pytest.mark.parametrize("by", TABLES)
def test_csv_has_what_rows_have(by, profile, tmp_path):
    """With a header; nothing where a row has None."""
    profile.to_csv(tmp_path / "table.csv", by)
    with open(tmp_path / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))

    assert read == [
        {name: "" if value is None else str(value) for name, value in row.items()}
        for row in profile.rows(by)
    ]


@pytest.mark.parametrize("by", TABLES)
def test_parquet_has_what_rows_have(by, profile, tmp_path):
    """Numbers are numbers, words are words, None is null."""
    parquet = pytest.importorskip("pyarrow.parquet")
    profile.to_parquet(tmp_path / "table.parquet", by)

    assert parquet.read_table(tmp_path / "table.parquet").to_pylist() == profile.rows(by)


def test_files_of_more_rows_than_are_written_at_once(tree, tmp_path):
    """Spans are written part by part."""
    recorder = CallRecorder(devices=4, spans=70_000)
    key = recorder.key("devices", "REBOOT", "driver", "nvme")
    for number in range(70_000):
        recorder.add(key, number, 1, number % 4)
    Profile(recorder, tree).to_csv(tmp_path / "spans.csv", "span")

    with open(tmp_path / "spans.csv") as file:
        assert [int(line.split(",")[1]) for line in list(file)[1:]] == [*range(70_000)]


def test_names_that_are_no_text_are_escaped_in_files(tmp_path):
    """A path in /sys may be any bytes."""
    parquet = pytest.importorskip("pyarrow.parquet")
    tree = luo.DeviceTree()
    tree.add("nic\udcff")
    profile = Profile(CallRecorder(devices=1), tree)
    profile.costs[0, 0] = 1
    profile.to_csv(tmp_path / "t.csv", "device")
    profile.to_parquet(tmp_path / "t.parquet", "device")

    assert "nic\\udcff" in (tmp_path / "t.csv").read_text()
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist()[0]["path"] == "nic\\udcff"


def test_to_parquet_without_pyarrow_names_the_extra(profile, tmp_path, monkeypatch):
    """One line, and no file."""
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'luo-kho\[parquet\]'"):
        profile.to_parquet(tmp_path / "table.parquet")
    assert not list(tmp_path.iterdir())


# ---- what a real update leaves ----

BUSY_NS = 3_000_000


def _busy(device):
    """Take long for one device of each event, and next to nothing for the others."""
    until = time.monotonic_ns() + (BUSY_NS if device.name == "disk1" else 0)
    while time.monotonic_ns() < until:
        pass


def _restore(device):
    _busy(device)
    device.reclaim()


@pytest.fixture
def kernels(tree):
    """Return a function that makes the kernels of one machine, one after the other."""
    machine = luo.Machine(luo.PhysicalMemory("64MiB"), tree)
    ops = luo.LiveUpdateOps(_busy, _busy, _busy, restore=_restore, state_size=8)
    late = luo.Subsystem(
        "late",
        priority=luo.Priority.BEFORE_DEVICES,
        prepare=lambda context: None,
        restore=lambda context: time.sleep(0.001),
    )

    def make():
        return luo.Kernel(
            machine,
            drivers=[luo.Driver("nvme", ops)],
            buses=[luo.Bus("nvme", luo.LiveUpdateOps())],
            subsystems=[late],
            spans=True,
        )

    return make


def test_report_of_several_updates_counts_every_callback_once(kernels):
    """A kernel's sums go through two updates: as the new one, and as the old one."""
    report, nr_updates = Report(), 3
    kernel = kernels().boot()
    for _ in range(nr_updates):
        kernel.devices.request("bridge/*")
        kernel = luo.live_update(kernel, kernels(), report=report).kernel
    kernel.close()
    document = json.loads(report.to_json())
    callbacks = {(row["name"], row["event"]): row for row in document["callbacks"]}
    (worst, other) = document["worst_devices"]

    assert callbacks["nvme", "REBOOT"]["calls"] == 2 * nr_updates
    assert callbacks["nvme", "REBOOT"]["max_device"] == worst["path"] == "bridge/disk1"
    assert other["path"] == "bridge/disk0"
    total = sum(row["total_ns"] for row in callbacks.values() if row["name"] == "nvme")
    assert worst["total_ns"] + other["total_ns"] == pytest.approx(total, rel=1e-5)
    dark = sum(callbacks["nvme", event]["total_ns"] for event in ("REBOOT", "RESTORE"))
    assert worst["blackout_ns"] + other["blackout_ns"] == pytest.approx(dark, rel=1e-5)
    assert worst["total_ns"] >= 4 * nr_updates * BUSY_NS
    root, *rows = document["subtrees"]
    assert [row["path"] for row in rows][:2] == ["bridge", "bridge/disk1"]
    assert root["total_ns"] == pytest.approx(total, rel=1e-5)


def test_report_callbacks_have_histogram_and_share_of_blackout(kernels):
    """Shares add up to less than 1; who is restored after the last reclaim has none."""
    kernel = kernels().boot()
    kernel.devices.request("bridge/*")
    report = luo.live_update(kernel, kernels())
    report.kernel.close()
    (run,) = report.runs
    callbacks = {(row["name"], row["event"]): row for row in report.callbacks}

    for row in callbacks.values():
        assert sum(calls for _, _, calls in row["histogram"]) == row["calls"]
        assert row["min_ns"] <= row["p50_ns"] <= row["p95_ns"] <= row["max_ns"]
    assert callbacks["late", "RESTORE"]["total_ns"] >= 1_000_000
    assert callbacks["late", "RESTORE"]["blackout_share"] is None
    assert callbacks["nvme", "PREPARE"]["blackout_share"] is None
    blackout = run["phases_ns"]["blackout"]
    for event in ("REBOOT", "RESTORE"):
        row = callbacks["nvme", event]
        assert row["blackout_share"] == row["total_ns"] / blackout
    assert 0 < sum(row["blackout_share"] or 0 for row in callbacks.values()) <= 1
    subsystems = {row["subsystem"]: row for row in report.profile.rows("subsystem")}
    assert subsystems["late"]["blackout_ns"] == 0


def test_kernel_profile_has_its_share_of_the_blackout_that_it_arrived_by(kernels):
    """A kernel that booted cold has none; merged, old and new kernel have the whole of it."""
    old, new = kernels().boot(), kernels()
    old.devices.request("bridge/*")
    old.kexec_load(new)
    old.luo.prepare()
    old.kexec()
    before, after = old.profile, new.profile
    both = Profile.merged([before, after])
    new.close()
    (row,) = after.rows("driver")

    assert [row["blackout_share"] for row in before.rows()] == [None] * len(before.rows())
    assert after.blackout_ns == both.blackout_ns == new.arrival.phases["blackout"]
    assert row["blackout_share"] == row["blackout_ns"] / after.blackout_ns > 0
    assert both.rows("driver")[0]["blackout_ns"] > row["blackout_ns"]
    assert {*both.late} == {"late"}


def test_report_timeline_is_that_of_the_last_update(kernels):
    """Phases of both kernels on one clock, in order, the blackout across the jump."""
    report = Report()
    kernel = kernels().boot()
    for _ in range(2):
        kernel.devices.request("bridge/*")
        kernel = luo.live_update(kernel, kernels(), report=report).kernel
    kernel.close()
    timeline = report.to_dict()["timeline"]
    phases = [phase for one in timeline["kernels"] for phase in one["phases"]]

    assert [one["name"] for one in timeline["kernels"]] == ["old kernel", "new kernel"]
    assert [phase[0] for phase in phases] == [
        "prepare", "reboot", "jump", "boot", "restore", "finish",
    ]  # fmt: skip
    ends = [at for _, begin, end in phases for at in (begin, end)]
    assert ends == sorted(ends)
    assert ends[0] == 0
    begin, end = timeline["blackout"]
    assert phases[0][2] <= begin < phases[2][1] < end <= phases[4][2]
    assert timeline["begin_ns"] == report.tracks[0].marks["prepare"][0]


def test_report_of_both_processes_has_the_devices_of_both(tmp_path):
    """What the next kernel's devices cost comes over from its process."""
    from luo import workloads

    host = workloads.host("cloud", devices=300)
    image = workloads.image_of(host, by_device=True)
    kernel = workloads.first_kernel(host, image).boot()
    workloads.request_all(kernel)
    report = luo.live_update(kernel, image, repeat=2)
    report.kernel.close()
    rows = report.callbacks
    of_devices = sum(row["total_ns"] for row in rows if row["subsystem"] == "devices")

    assert report.to_dict()["subtrees"][0]["total_ns"] == pytest.approx(of_devices, rel=1e-4)
    assert {track.name for track in report.tracks} == {"old kernel", "new kernel"}


def test_report_without_a_jump_has_no_timeline():
    """Nor figures of devices, before any update."""
    document = Report().to_dict()

    assert document["timeline"] is None
    assert document["subtrees"] == document["worst_devices"] == document["callbacks"] == []
    assert (document["clock"], document["budgets"]) == ("wall", None)


def test_report_of_a_kernel_with_a_clock_of_its_own_says_virtual(tree):
    """Its figures are nobody's nanoseconds."""
    ticks = iter(range(0, 10**9, 1000))
    machine = luo.Machine(luo.PhysicalMemory("64MiB"), tree)
    report = Report()
    with luo.Kernel(machine, clock=lambda: next(ticks)).boot() as kernel:
        report.begin(kernel)

    assert report.to_dict()["clock"] == "virtual"
