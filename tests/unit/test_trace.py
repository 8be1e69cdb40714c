"""Traces: what is drawn is what was measured, and both formats say the same."""

import io
import json
import re
import tracemalloc
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from luo._kho import SPAN, CallRecorder
from luo.profile import chrome, trace
from luo.profile.tables import Profile
from luo.report import Track

MS = 10**6
OLD = {"prepare": (1_000 * MS, 1_010 * MS), "reboot": (1_015 * MS, 1_020 * MS)}
NEW = {
    "jump": (1_020 * MS, 1_022 * MS),
    "boot": (1_022 * MS, 1_023 * MS),
    "restore": (1_023 * MS, 1_030 * MS),
    "finish": (1_035 * MS, 1_036 * MS),
}
RUN = {"phases_ns": {"blackout": 14 * MS}}
HOSTILE = ['a"b', "new\nline", "\udcff\udc80", "ünïcode", "\x00", "a;b c", "\\", "</script>", "\r"]


def a_track(name, marks, spans, *, pid=0, dropped=0, labels=(), path=None):
    """Return what one kernel recorded: *spans* are (begin, ns, label, device, devices, worker)."""
    recorder = CallRecorder()
    for label in labels:
        recorder.key(*label)
    rows = np.array(spans, SPAN)
    for begin, ns, key, device, devices, _ in rows[:10_000].tolist():
        recorder.add(key, ns, devices, device, begin=begin)
    recorder.load(labels, rows, np.zeros((2, 0), np.float32), dropped)
    tree = SimpleNamespace(path=path or (lambda number: f"pci0000:00/dev{number}"))
    return Track(name, pid, marks, Profile(recorder, tree))


def a_report(*tracks, blackout=(1_015 * MS, 1_030 * MS)):
    """Return what a trace needs of a report."""
    return SimpleNamespace(
        tracks=list(tracks), blackout=blackout, source={"path": "a host"}, runs=[RUN]
    )


OLD_LABELS = [
    ("kvm", "PREPARE", "subsystem", "kvm"),
    ("devices", "PREPARE", "driver", "nvme"),
    ("devices", "PREPARE", "bus", "pci"),
    ("devices", "REBOOT", "driver", "nvme"),
    ("devices", "RESTORE", "driver", "nvme"),  # of the update that it arrived by
]
NEW_LABELS = [("devices", "RESTORE", "driver", "nvme"), ("kvm", "FINISH", "subsystem", "kvm")]


def one_kernel(spans, **more):
    """Return the report of an update that has one kernel yet."""
    return a_report(a_track("old kernel", OLD, spans, labels=OLD_LABELS, **more))


def an_update():
    """Return the report of a small update with two workers."""
    old = [
        (1_000 * MS, 2 * MS, 0, -1, 0, 0),
        (1_002 * MS, 3 * MS, 1, 7, 1, 0),
        (1_005 * MS, 2 * MS, 1, 8, 1, 0),
        (1_002 * MS, 5 * MS, 2, 5, 64, 1),
        (1_016 * MS, 1 * MS, 3, 7, 1, 0),
        (500 * MS, 9 * MS, 4, 7, 1, 0),
    ]
    arrived = {"restore": (499 * MS, 510 * MS)}
    new = [(1_023 * MS, 4 * MS, 0, 7, 1, 0), (1_035 * MS, 0, 1, -1, 0, 0)]
    return a_report(
        a_track("old kernel", {**OLD, **arrived}, old, pid=41, labels=OLD_LABELS),
        a_track("new kernel", NEW, new, pid=42, labels=NEW_LABELS),
    )


# ---- reading them back ----


def as_chrome(drawn):
    """Write *drawn*, unless it is text already.

    Returns:
        {(process, lane): [(name, begin, end, args)]}, and the document.
    """
    if not isinstance(drawn, str):
        stream = io.StringIO()
        chrome.write(drawn, stream)
        drawn = stream.getvalue()
    document = json.loads(drawn)
    events = document["traceEvents"]
    names = {
        (one["name"], one["pid"], one["tid"]): one["args"]["name"]
        for one in events
        if one["ph"] == "M" and "name" in one["args"]
    }
    origin = document["otherData"]["begin_ns"]
    lanes, open_slices = defaultdict(list), defaultdict(list)
    for one in events:
        if one["ph"] in "BEi":
            where = tuple(
                names[what, one["pid"], tid]
                for what, tid in (("process_name", 0), ("thread_name", one["tid"]))
            )
            at = origin + round(one["ts"] * 1000)
            if one["ph"] == "B":
                open_slices[where].append((one["name"], at, one.get("args", {})))
            elif one["ph"] == "E":
                name, begin, args = open_slices[where].pop()
                lanes[where].append((name, begin, at, args))
            else:
                lanes[where].append((one["name"], at, None, one.get("args", {})))
    assert not any(open_slices.values())
    return lanes, document


def packets(drawn):
    """Write *drawn* as protobuf and return its packets, decoded by perfetto's own classes."""
    perfetto = pytest.importorskip("luo.profile.perfetto", reason="needs the package perfetto")
    pb = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    stream = io.BytesIO()
    perfetto.write(drawn, stream)
    decoded = pb.Trace()
    decoded.ParseFromString(stream.getvalue())
    return list(decoded.packet), len(stream.getvalue())


def as_perfetto(drawn):
    """Write *drawn*, and return the same as :func:`as_chrome`; each lane must nest."""
    found, _ = packets(drawn)
    interned = defaultdict(dict)
    tracks, events = {}, defaultdict(list)
    for packet in found:
        for field, entries in packet.interned_data.ListFields():
            for entry in entries:
                text = entry.str.decode() if field.name.endswith("values") else entry.name
                assert entry.iid not in interned[field.name]
                interned[field.name][entry.iid] = text
        if packet.HasField("track_descriptor"):
            tracks[packet.track_descriptor.uuid] = packet.track_descriptor
        if packet.HasField("track_event"):
            events[packet.track_event.track_uuid].append(packet)

    def args_of(notes):
        return {
            interned["debug_annotation_names"][note.name_iid]: args_of(note.dict_entries)
            if note.dict_entries
            else interned["debug_annotation_string_values"][note.string_value_iid]
            if note.string_value_iid
            else note.int_value
            for note in notes
        }

    lanes = defaultdict(list)
    for uuid, mine in events.items():
        where = (tracks[tracks[uuid].parent_uuid].name, tracks[uuid].name)
        if tracks[uuid].HasField("counter"):
            continue
        stack = []
        for packet in sorted(mine, key=lambda packet: packet.timestamp):
            event = packet.track_event
            if event.type == event.TYPE_SLICE_END:
                begun = stack.pop()
                lanes[where].append((*begun[:2], packet.timestamp, begun[2]))
                continue
            name = interned["event_names"][event.name_iid]
            begun = (name, packet.timestamp, args_of(event.debug_annotations))
            if event.type == event.TYPE_INSTANT:
                lanes[where].append((*begun[:2], None, begun[2]))
            else:
                stack.append(begun)
        assert not stack, where
    return lanes, tracks


@pytest.fixture(params=["chrome", "perfetto"])
def lanes_of(request):
    """Each format in turn, read back."""
    reader = {"chrome": as_chrome, "perfetto": as_perfetto}[request.param]
    return lambda drawn: reader(drawn)[0]


# ---- what is drawn ----


def test_trace_has_two_kernels_on_one_clock(lanes_of):
    """Phases stand where they were, the states between them; blackout is a slice of its own."""
    lanes = lanes_of(trace.from_report(an_update()))

    phases = {
        kernel: [one[:3] for one in lanes[kernel, "phases"]]
        for kernel in ("old kernel", "new kernel")
    }
    assert phases["old kernel"] == [
        ("prepare", 1_000 * MS, 1_010 * MS),
        ("state prepared", 1_010 * MS, 1_015 * MS),
        ("reboot", 1_015 * MS, 1_020 * MS),
    ]
    assert [name for name, _, _ in phases["new kernel"]] == [
        "jump", "boot", "restore", "state updated", "finish",
    ]  # fmt: skip
    ((name, begin, end, args),) = lanes["live update", "blackout"]
    assert args == {"blackout_ns": 14 * MS, "digests_ns": 1 * MS}
    assert (begin, end) == (1_015 * MS, 1_030 * MS)
    assert "kernel boot not included" in name


def test_callbacks_stand_in_a_lane_of_their_worker(lanes_of):
    """Subsystems above, then devices by worker; a device has its path, a batch its number."""
    lanes = lanes_of(trace.from_report(an_update()))

    assert lanes["old kernel", "subsystems"] == [("kvm PREPARE", 1_000 * MS, 1_002 * MS, {})]
    assert lanes["old kernel", "devices, worker 0"] == [
        ("nvme PREPARE", 1_002 * MS, 1_005 * MS, {"device": "pci0000:00/dev7"}),
        ("nvme PREPARE", 1_005 * MS, 1_007 * MS, {"device": "pci0000:00/dev8"}),
        ("nvme REBOOT", 1_016 * MS, 1_017 * MS, {"device": "pci0000:00/dev7"}),
    ]
    assert lanes["old kernel", "devices, worker 1"] == [
        (
            "pci PREPARE",
            1_002 * MS,
            1_007 * MS,
            {"first device": "pci0000:00/dev5", "devices": 64},
        )
    ]
    assert lanes["new kernel", "devices"][0][:3] == ("nvme RESTORE", 1_023 * MS, 1_027 * MS)
    assert lanes["new kernel", "subsystems"] == [("kvm FINISH", 1_035 * MS, 1_035 * MS, {})]


def test_phases_carry_the_sums_of_their_callbacks(lanes_of):
    """The dearest first, and none of an earlier update."""
    lanes = lanes_of(trace.from_report(an_update()))

    _, _, _, prepare = lanes["old kernel", "phases"][0]
    assert list(prepare) == ["devices/nvme (driver)", "devices/pci (bus)", "kvm/kvm (subsystem)"]
    assert prepare["devices/nvme (driver)"]["total_ns"] == 5 * MS
    assert prepare["devices/nvme (driver)"]["calls"] == 2
    assert not any("RESTORE" in name for name, *_ in lanes["old kernel", "devices, worker 0"])


def test_only_the_longest_callbacks_have_slices_and_it_says_so(lanes_of):
    """Of both kernels together, and what is left out is in the counters."""
    drawn = trace.from_report(an_update(), spans=3)
    lanes = lanes_of(drawn)

    callbacks = [
        end - begin
        for (_, lane), slices in lanes.items()
        for _, begin, end, _ in slices
        if lane.startswith(("subsystems", "devices"))
    ]
    assert sorted(callbacks) == [3 * MS, 4 * MS, 5 * MS]
    remarks = [name for name, *_ in lanes["live update", "about this trace"]]
    assert "old kernel: slices of the 2 longest of 5 callbacks" in remarks
    assert lanes["live update", "about this trace"][-1][3]["callbacks"] == 7
    old = drawn.processes[1].counters
    assert [counter.name for counter in old] == [
        "callbacks running",
        "devices/nvme: all callbacks",
        "devices/pci: all callbacks",
        "kvm/kvm: all callbacks",
    ]
    assert old[1].points == [
        (1_000 * MS, 5 * MS),
        (1_010 * MS, 0),
        (1_015 * MS, 1 * MS),
        (1_020 * MS, 0),
    ]


def test_dropped_callbacks_are_said(lanes_of):
    """What the recorder had no room for is a remark with its number."""
    report = one_kernel([(1_000 * MS, 5, 0, -1, 0, 0)], dropped=1234)
    lanes = lanes_of(trace.from_report(report))

    remarks = [name for name, *_ in lanes["live update", "about this trace"]]
    assert "old kernel: 1,234 callbacks not recorded: no room" in remarks


@pytest.mark.parametrize("spans", [0, 100])
def test_trace_without_a_span_has_phases_and_says_so(lanes_of, spans):
    """No callback was recorded, or the user wants no slice."""
    report = an_update() if spans == 0 else one_kernel([])
    lanes = lanes_of(trace.from_report(report, spans=spans))

    assert lanes["old kernel", "phases"][0][0] == "prepare"
    assert {lane for _, lane in lanes} == {"phases", "blackout", "about this trace"}


def test_trace_of_nothing_can_be_written(lanes_of):
    """An update that failed before anything leaves an empty picture."""
    lanes = lanes_of(trace.from_report(a_report(blackout=None)))

    assert set(lanes) == {("live update", "about this trace")}


def test_callbacks_over_one_another_get_lanes_of_their_own(lanes_of):
    """Times of a cost model need not be those of a worker."""
    spans = [(1_000 * MS + at, 10, 1, at, 1, 0) for at in range(0, 30, 5)]
    lanes = lanes_of(trace.from_report(one_kernel(spans)))

    devices = {lane: slices for (_, lane), slices in lanes.items() if lane.startswith("devices")}
    assert set(devices) == {"devices", "devices (2)"}
    assert sum(map(len, devices.values())) == len(spans)
    for slices in devices.values():
        assert all(a[2] <= b[1] for a, b in pairwise(slices))


def test_running_counts_what_has_no_slice():
    """The counter's integral is the time that all callbacks took."""
    drawn = trace.from_report(an_update(), spans=0)

    counter = drawn.processes[1].counters[0]
    area = sum(value * (later - now) for (now, value), (later, _) in pairwise(counter.points))
    assert counter.name == "callbacks running"
    assert area == pytest.approx(13 * MS, rel=1e-3)
    assert max(value for _, value in counter.points) == 2


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_escaped_and_whole(lanes_of, name):
    """Names from /sys and from drivers are bytes that somebody else chose."""
    track = a_track(
        name,
        OLD,
        [(1_000 * MS, 5, 0, 3, 1, 0)],
        labels=[(name, "PREPARE", "driver", name)],
        path=lambda _: f"devices/{name}",
    )
    lanes = lanes_of(trace.from_report(a_report(track)))

    seen = trace.printable(name)
    assert seen.isprintable()
    assert lanes[seen, "devices"][0][3] == {"device": f"devices/{seen}"}
    assert lanes[seen, "devices"][0][0] == f"{seen} PREPARE"


def test_kernels_of_one_process_are_two_in_the_trace():
    """A successor in this process has the same number, and would be drawn into the old one."""
    report = an_update()
    report.tracks = [replace(track, pid=77) for track in report.tracks]

    assert [process.pid for process in trace.from_report(report).processes] == [0, 1, 2]


def test_perfetto_knows_which_processes_they_are():
    """With numbers and remarks, and every lane below its kernel in order."""
    _, tracks = as_perfetto(trace.from_report(an_update(), spans=1))

    old = next(track for track in tracks.values() if track.name == "old kernel")
    assert old.process.pid == 41
    assert list(old.process.process_labels) == ["slices of the 1 longest of 5 callbacks"]
    lanes = [track for track in tracks.values() if track.parent_uuid == old.uuid]
    assert [track.sibling_order_rank for track in lanes] == list(range(len(lanes)))
    assert old.child_ordering == old.EXPLICIT


def test_perfetto_names_are_written_once():
    """Ten thousand callbacks with three names hold three names."""
    spans = [(1_000 * MS + 100 * at, 90, 1, at % 3, 1, 0) for at in range(10_000)]
    found, size = packets(trace.from_report(one_kernel(spans)))

    names = [entry.name for packet in found for entry in packet.interned_data.event_names]
    paths = [
        entry.str
        for packet in found
        for entry in packet.interned_data.debug_annotation_string_values
    ]
    assert names.count("nvme PREPARE") == 1
    assert sum(path.startswith(b"pci0000") for path in paths) == 3
    assert size < 65 * len(spans)
    assert found[0].sequence_flags == found[0].SEQ_INCREMENTAL_STATE_CLEARED
    assert {packet.trusted_packet_sequence_id for packet in found} == {1}


class Sink(io.TextIOBase):
    """Counts what is written and keeps nothing."""

    def __init__(self):
        self.size = 0

    def write(self, text):
        self.size += len(text)
        return len(text)


@pytest.mark.large
@pytest.mark.parametrize("form", ["chrome", "perfetto"])
def test_a_million_callbacks_take_bounded_memory(form):
    """What is held beside the recorder's own spans grows with --spans, not with the callbacks."""
    writer = pytest.importorskip(f"luo.profile.{form}", reason="needs the package perfetto")
    peaks = []
    for count in (1_000_000, 4_000_000):
        spans = np.zeros(count, SPAN)
        spans["begin_ns"] = OLD["prepare"][0] + np.arange(count) * 2
        spans["ns"] = np.random.default_rng(count).integers(1, 3, count)
        spans["key"] = 1
        spans["device"] = np.arange(count) % 100_000
        spans["devices"] = 1
        report = one_kernel(spans)
        tracemalloc.start()
        try:
            writer.write(trace.from_report(report, spans=10_000), Sink())
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert max(peaks) < 64 << 20
    assert peaks[1] < peaks[0] * 1.2


# ---- from a document ----


def a_document(**more):
    """Return a small ``luo-run/1`` document."""
    row = {"subsystem": "devices", "kind": "driver", "name": "nvme", "calls": 4, "devices": 4}
    return {
        "schema": "luo-run/1",
        "luo_version": "1",
        "source": {"path": "a host"},
        "runs": [RUN, RUN],
        "phases_ns": {
            "prepare": 10, "reboot": 5, "jump": 2, "boot": 1, "restore": 7, "finish": 1,
            "blackout": 15,
        },
        "callbacks": [{**row, "event": "PREPARE", "total_ns": 6}],
        **more,
    }  # fmt: skip


def test_document_without_a_timeline_has_its_medians_end_to_end(lanes_of):
    """And says that they are."""
    lanes = lanes_of(trace.from_document(a_document()))

    assert [one[:3] for one in lanes["new kernel", "phases"]] == [
        ("jump", 15, 17), ("boot", 17, 18), ("restore", 18, 25), ("finish", 25, 26),
    ]  # fmt: skip
    assert lanes["live update", "blackout"][0][1:3] == (10, 25)
    remarks = [name for name, *_ in lanes["live update", "about this trace"]]
    assert "old kernel: medians of the phases, laid end to end" in remarks


def test_document_with_a_timeline_stands_on_its_clock(lanes_of):
    """Sums of callbacks are those of one update, the mean."""
    timeline = {
        "begin_ns": 1000,
        "kernels": [
            {"name": "old kernel", "phases": [["prepare", 0, 10], ["reboot", 12, 15]]},
            {"name": "new kernel", "phases": [["restore", 15, 20]]},
        ],
        "blackout": [12, 20],
    }
    drawn = trace.from_document(a_document(timeline=timeline))
    lanes = lanes_of(drawn)

    assert [one[:3] for one in lanes["old kernel", "phases"]] == [
        ("prepare", 1000, 1010), ("state prepared", 1010, 1012), ("reboot", 1012, 1015),
    ]  # fmt: skip
    assert lanes["live update", "blackout"][0][1:3] == (1012, 1020)
    assert drawn.processes[1].counters[0].points[0] == (1000, 3)


def test_document_of_a_dry_reboot_has_its_phases(lanes_of):
    """There was no jump, so no new kernel and no blackout."""
    dry = {"prepare": 10, "reboot": 5, "cancel": 3}
    lanes = lanes_of(trace.from_document(a_document(dry_reboot_ns=dry, runs=[], timeline=None)))

    assert [one[:3] for one in lanes["old kernel", "phases"]] == [
        ("prepare", 0, 10), ("reboot", 10, 15), ("cancel", 15, 18),
    ]  # fmt: skip
    assert ("live update", "blackout") not in lanes


def test_chrome_s_times_are_exact():
    """Nanoseconds that a double of microseconds since boot could not hold."""
    track = a_track("old kernel", {"prepare": (2**60 + 1, 2**60 + 5)}, [])
    stream = io.StringIO()
    chrome.write(trace.from_report(a_report(track, blackout=None)), stream)

    assert f'"begin_ns":{2**60 + 1}' in stream.getvalue()
    assert re.search(r'"ph":"B","ts":0\.000,.*"name":"prepare"', stream.getvalue())
    assert '"ph":"E","ts":0.004,' in stream.getvalue()
