"""What the recorder keeps of callbacks: rows, sums by device, spans; and when it keeps nothing."""

import errno
import itertools

import kernels
import numpy as np
import pytest
from rig import Log, errno_of, plain_kernel, small_machine, updated

from luo._kho import SPAN, CallRecorder, bucket_edges
from luo.device import LiveUpdateOps, batch
from luo.errors import CallbackError
from luo.kernel import KernelImage
from luo.liveupdate import Event, State

ROW = ("devices", "PREPARE", "driver", "nic")
COLD = ("devices", "FINISH", "driver", "nic")
HOT = ("devices", "REBOOT", "driver", "nic")


def ticking(step=10):
    """A clock that goes on by *step* each time it is read."""
    ticks = itertools.count(0, step)
    return lambda: next(ticks)


# ---- rows ----


def test_bucket_edges_hold_every_value():
    """Edges ascend, and a value is counted between the edges of its bucket."""
    edges, recorder = bucket_edges(), CallRecorder()
    assert (np.diff(edges) > 0).all()
    for ns in (0, 1, 10, 127, 128, 1000, 123_456_789, 100 * 10**9):
        row = recorder.key("s", "REBOOT", "driver", str(ns))
        recorder.add(row, ns)
        (bucket,) = np.flatnonzero(recorder.histogram(row))
        assert edges[bucket] <= ns < edges[bucket + 1]


def test_longest_call_names_its_device():
    """max_device is who took longest; a call that served several, or none, is nobody's."""
    recorder = CallRecorder()
    row = recorder.key(*ROW)
    recorder.add(row, 5, device=3)
    recorder.add(row, 9, device=7)
    recorder.add(row, 8, device=1)
    assert recorder.rows()[0]["max_device"] == 7
    recorder.add(row, 10, devices=4, device=2)
    assert recorder.rows()[0]["max_device"] == -1


def test_merge_keeps_who_took_longest():
    """Of two recorders the one with the longer call says whose it was."""
    short, long = CallRecorder(), CallRecorder()
    for recorder, ns, device in ((short, 4, 1), (long, 6, 2)):
        recorder.add(recorder.key(*ROW), ns, device=device)
    for first, second in ((short, long), (long, short)):
        merged = CallRecorder()
        merged.merge(first.dump())
        merged.merge(second.dump())
        (row,) = merged.rows()
        assert (row["max_device"], row["max_ns"], row["min_ns"], row["calls"]) == (2, 6, 4, 2)


def test_merge_of_a_call_of_no_time_names_its_device():
    """A callback may be faster than the clock."""
    one, merged = CallRecorder(), CallRecorder()
    one.add(one.key(*ROW), 0, device=5)
    merged.merge(one.dump())
    assert merged.rows()[0]["max_ns"] == 0


# ---- sums by device ----


def test_costs_are_apart_in_blackout_and_out_of_it():
    """REBOOT and RESTORE go to the second row, everything else to the first."""
    recorder = CallRecorder(devices=4)
    recorder.add(recorder.key(*ROW), 100, device=1)
    recorder.add(recorder.key(*HOT), 30, device=1)
    recorder.add(recorder.key(*HOT), 40, device=3)
    recorder.add(recorder.key("s", "RESTORE", "subsystem", "s"), 999, devices=0)
    assert recorder.costs.tolist() == [[0, 100, 0, 0], [0, 30, 0, 40]]


def test_costs_of_a_batch_are_shared_out():
    """A call that served several devices costs each the same."""
    recorder = CallRecorder(ticking(), devices=4)
    row = recorder.key(*HOT)
    assert recorder.lap(row, recorder.begin(), 2, np.array([1, 3], np.int32)) == 10
    assert recorder.costs[1].tolist() == [0, 5, 0, 5]
    for _ in range(1000):  # however many there are
        recorder.lap(row, recorder.begin(), 2, np.array([1, 3], np.int32))
    assert recorder.costs[1].tolist() == [0, 5005, 0, 5005]


def test_costs_of_unknown_devices_are_left_out():
    """What is plugged in later is in the rows, and has a sum once it is covered."""
    recorder = CallRecorder(ticking(), devices=2)
    row = recorder.key(*ROW)
    recorder.add(row, 7, device=2)
    recorder.lap(row, 0, 3, np.array([0, 1, 2], np.int32))
    assert recorder.costs.shape == (2, 2)
    recorder.cover(3)
    recorder.add(row, 7, device=2)
    assert recorder.costs[0, 2] == 7


def test_costs_and_spans_are_no_copies():
    """They are the recorder's own memory."""
    recorder = CallRecorder(devices=4, spans=4)
    assert np.shares_memory(recorder.costs, recorder.costs)
    recorder.add(recorder.key(*ROW), 5, device=1)
    spans, costs = recorder.spans, recorder.costs
    assert np.shares_memory(spans, recorder.spans)
    recorder.add(recorder.key(*ROW), 5, device=1)
    assert costs[0, 1] == 10


# ---- spans ----


def test_spans_beyond_the_buffer_are_counted():
    """Those that find room stay, the others are dropped and said."""
    recorder = CallRecorder(spans=2)
    row = recorder.key(*ROW)
    for ns in (1, 2, 3, 4):
        recorder.add(row, ns, device=ns, begin=10 * ns)
    assert recorder.spans.tolist() == [(10, 1, row, 1, 1, 0), (20, 2, row, 2, 1, 0)]
    assert recorder.dropped == 2
    recorder.clear_spans()
    assert (len(recorder.spans), recorder.dropped) == (0, 0)
    assert recorder.rows()[0]["calls"] == 4


def test_spans_without_a_buffer_are_not_dropped():
    """Nobody asked for them."""
    recorder = CallRecorder()
    recorder.add(recorder.key(*ROW), 1)
    assert (len(recorder.spans), recorder.dropped) == (0, 0)


@pytest.mark.parametrize("room", [0, 3, 5, 100])
def test_forks_write_into_parts_of_the_buffer(room):
    """Spans of each worker stand together; who finds no room drops, and says so."""
    recorder = CallRecorder(devices=8, spans=1 + room)
    row = recorder.key(*ROW)
    recorder.add(row, 1, device=0)
    forks = [recorder.fork(4, worker) for worker in range(2)]
    for worker, fork in enumerate(forks):
        for device in range(3):
            fork.add(row, 5, device=4 * worker + device)
    for fork in forks:
        recorder.absorb(fork)
    recorder.add(row, 1, device=7)
    workers = recorder.spans["worker"].tolist()
    kept = [0, *[0] * min(3, room), *[1] * min(3, max(0, room - 4))]
    assert workers == [*kept, 0][: 1 + room]
    assert len(recorder.spans) + recorder.dropped == 8
    assert recorder.rows()[0]["calls"] == 8
    assert recorder.costs[0].tolist() == [6, 5, 5, 0, 5, 5, 5, 1]


def test_clear_keeps_the_rows_on_their_side_of_blackout():
    """What was a REBOOT row stays one."""
    recorder = CallRecorder(devices=1, spans=1)
    row = recorder.key(*HOT)
    recorder.add(row, 5, device=0)
    recorder.clear()
    assert (recorder.rows(), len(recorder.spans), recorder.costs.sum()) == ([], 0, 0)
    recorder.add(row, 5, device=0)
    assert recorder.costs.tolist() == [[0], [5]]


# ---- wrong use ----


@pytest.mark.parametrize(
    "call",
    [
        lambda recorder: recorder.add(5, 1),
        lambda recorder: recorder.lap(-1, 0),
        lambda recorder: recorder.histogram(1),
        lambda recorder: recorder.quantiles(1, [0.5]),
    ],
)
def test_unknown_row_is_an_index_error(call):
    """Rows are numbered as they were made."""
    recorder = CallRecorder()
    recorder.key(*ROW)
    with pytest.raises(IndexError):
        call(recorder)


def test_wrong_values_are_refused():
    """Sizes, quantiles and what is loaded."""
    recorder = CallRecorder()
    row = recorder.key(*ROW)
    with pytest.raises(ValueError, match="-1 devices"):
        CallRecorder(devices=-1)
    with pytest.raises(ValueError, match="each is 0 to 1"):
        recorder.quantiles(row, [1.5])
    with pytest.raises(ValueError, match="load"):
        recorder.load([], np.empty((1, 1), SPAN), np.zeros((2, 0), np.float32), 0)
    with pytest.raises(ValueError, match="load"):
        recorder.load([], np.empty(1, SPAN), np.zeros((3, 0), np.float32), 0)


def test_quantiles_of_no_call_are_zero():
    """There is nothing to tell."""
    recorder = CallRecorder()
    assert recorder.quantiles(recorder.key(*ROW), [0, 0.5, 1]).tolist() == [0, 0, 0]


# ---- in a kernel ----


def calls_of(kernel):
    """(event, kind, name, path) of each span, in the order of time."""
    profile = kernel.profile
    return [
        (*profile.labels[span["key"]][1:], profile.tree.path(span["device"]))
        for span in profile.spans
        if span["device"] >= 0
    ]


def logged(log, machine, **more):
    """A kernel whose callbacks are written down in *log*."""
    drivers = {name: log.ops("driver", name, size=8) for name in ("portdrv", "nic", "nvme")}
    buses = {"pci": log.ops("bus", "pci")}
    return plain_kernel(machine, drivers, buses, subsystems=[log.subsystem("s")], **more)


def test_spans_are_the_calls_in_their_order():
    """Each callback of a device is a span, and PREPARE begins anew."""
    machine, log, after = small_machine(), Log(), Log()
    kernel = logged(log, machine, spans=True).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()
    kernel.luo.cancel()
    log.clear()
    successor = logged(after, machine, spans=True)
    new = updated(kernel, successor)
    assert calls_of(kernel) == [call for call in log.calls if call[3] is not None]
    new.luo.finish()
    assert calls_of(new) == [call for call in after.calls if call[3] is not None]
    for one in (kernel, new):
        spans = one.profile.spans
        assert one.profile.dropped == 0
        assert (spans["ns"] >= 0).all()
        ends = spans["begin_ns"] + spans["ns"]
        assert (spans["begin_ns"][1:] >= ends[:-1]).all()
        for name, (begin, end) in one.marks.items():
            assert begin <= end, name
    begin, end = kernel.marks["prepare"]
    first = kernel.profile.spans[0]
    assert begin <= first["begin_ns"] < end


def test_span_of_a_batch_names_its_first_device():
    """It says how many it served; their sums are shares of it."""

    @batch
    def prepare(devices):
        pass

    ops = LiveUpdateOps(prepare=prepare)
    kernel = plain_kernel(small_machine(), {"nic": ops}, {"pci": LiveUpdateOps()}, spans=8).boot()
    kernel.devices.request([2, 3])
    kernel.luo.prepare()
    (span,) = kernel.profile.spans
    assert (span["device"], span["devices"]) == (2, 2)
    assert kernel.profile.costs[0, 2] == kernel.profile.costs[0, 3] > 0
    assert kernel.profile.costs.sum() == pytest.approx(float(span["ns"]))


def test_timing_off_reads_no_clock_and_records_nothing():
    """Callbacks are called all the same, and phases are timed still."""
    reads = []

    def clock():
        reads.append(None)
        return len(reads)

    log = Log()
    kernel = logged(log, small_machine(), clock=clock, timing=False, spans=100).boot()
    kernel.devices.request("*")
    reads.clear()
    kernel.luo.prepare()
    assert len(log.of("PREPARE")) == 9
    assert len(reads) == 2  # the phase
    assert kernel.phases["prepare"] == 1
    assert (kernel.profile.rows(), len(kernel.profile.spans)) == ([], 0)
    assert kernel.profile.costs.sum() == 0


def test_timing_off_with_a_limit_is_refused():
    """A limit needs to know what a callback takes."""
    with pytest.raises(ValueError, match="callback_limit"):
        plain_kernel(small_machine(), {}, {}, timing=False, callback_limit=1.0)


def test_cost_is_told_instead_of_measured():
    """Durations are what the hook says; it is asked once a callback and once a phase."""
    now, asked = [0], []

    def cost(label, device, devices):
        asked.append((label, device, devices))
        ns = 1000 if label[0] == "engine" else 10 * (device + 2)
        now[0] += ns
        return ns

    log = Log()
    kernel = logged(log, small_machine(), clock=lambda: now[0], cost=cost, spans=True).boot()
    kernel.devices.request("*")
    asked.clear()
    kernel.luo.prepare()
    assert [label[1] for label, _, _ in asked] == ["PREPARE"] * 10
    assert asked[-1] == (("engine", "PREPARE", "phase", "prepare"), -1, 0)
    spans = kernel.profile.spans
    assert (spans["ns"] == 10 * (spans["device"] + 2)).all()
    assert kernel.phases["prepare"] == spans["ns"].sum() + 1000
    labels = kernel.profile.labels
    assert [labels[key] for key in spans["key"]] == [label for label, _, _ in asked[:-1]]


def test_cost_that_raises_rolls_back():
    """The callback had done its work, so it is cancelled too."""

    def cost(label, device, devices):
        if (label[1], device) == ("PREPARE", 3):
            raise RuntimeError("no idea")
        return 1

    log = Log()
    kernel = logged(log, small_machine(), cost=cost).boot()
    kernel.devices.request("*")
    with pytest.raises(RuntimeError, match="no idea"):
        kernel.luo.prepare()
    assert kernel.luo.state is State.NORMAL
    prepared = [call[1:] for call in log.of("PREPARE")]
    assert [call[1:] for call in log.of("CANCEL")] == prepared[::-1]


def test_negative_cost_is_refused():
    """Time goes on."""
    log = Log()
    kernel = logged(log, small_machine(), cost=lambda *_: -1).boot()
    kernel.devices.request("*")
    with pytest.raises(ValueError, match="a callback of -1 ns"):
        kernel.luo.prepare()
    assert kernel.luo.state is State.NORMAL


def test_steps_are_spans_too():
    """One callback at a time leaves the same spans as all at once."""
    logs, kernels_ = [Log(), Log()], []
    for log in logs:
        kernel = logged(log, small_machine(), spans=True).boot()
        kernel.devices.request("*")
        kernels_.append(kernel)
    kernels_[0].luo.prepare()
    for step in kernels_[1].luo.steps(Event.PREPARE):
        step.run()
    assert calls_of(kernels_[0]) == calls_of(kernels_[1])
    columns = ["device", "devices"]
    bulk, stepped = (kernel.profile.spans[columns].tolist() for kernel in kernels_)
    assert bulk == stepped


def test_sums_are_kept_on_request():
    """Without, there are rows alone, and a table by device is refused."""
    kernel = logged(Log(), small_machine()).boot()
    kernel.devices.request("*")
    kernel.luo.prepare()
    assert kernel.profile.costs.shape == (2, 0)
    assert kernel.profile.rows()
    with pytest.raises(ValueError, match="by_device=True"):
        kernel.profile.table("device")


def test_failed_callback_is_a_span():
    """What it took until it failed is a part of the update."""
    log = Log()
    log.faults["PREPARE", "driver", "nic", "pci0/port/nic1"] = -5
    kernel = logged(log, small_machine(), spans=True).boot()
    kernel.devices.request("*")
    with pytest.raises(CallbackError):
        kernel.luo.prepare()
    assert ("PREPARE", "driver", "nic", "pci0/port/nic1") in calls_of(kernel)
    assert calls_of(kernel)[-1][0] == "CANCEL"


def test_plugged_in_device_has_a_sum():
    """Sums grow with the devices."""
    log = Log()
    kernel = logged(log, small_machine(), by_device=True).boot()
    kernel.machine.devices.add("late", "pci0", "pci", "nic")
    kernel.devices.request("pci0/late")
    kernel.luo.prepare()
    assert kernel.profile.costs.shape == (2, 6)
    assert kernel.profile.costs[0, 5] > 0


# ---- of a kernel in another process ----


def test_remote_kernel_that_was_closed_tells_no_profile():
    """It is gone, and what it had told of REBOOT with it: ESHUTDOWN, as of any question."""
    machine = kernels.machine()
    kernel = kernels.plain(machine).boot()
    kernel.kexec_load(KernelImage("kernels:plain"))
    remote = kernel.kexec()
    remote.luo.prepare()
    remote.reboot(False)
    remote.depart()
    remote.close()
    assert errno_of(lambda: remote.profile) == errno.ESHUTDOWN


def test_remote_kernel_tells_spans_and_sums():
    """They come over in one piece, and stay when it has gone."""
    image = KernelImage("kernels:plain", args={"spans": True})
    machine = kernels.machine()
    kernel = kernels.plain(machine).boot()
    kernel.kexec_load(image)
    with kernel.kexec() as remote:
        remote.devices.request("*")
        remote.kexec_load(image)
        remote.luo.prepare()
        during = remote.profile
        assert len(during.spans) == sum(row["calls"] for row in during.rows()) > 0
        assert during.costs.sum() > 0
        with remote.kexec() as new:
            before = new.arrival.before
            assert before is remote.profile
            assert {before.labels[key][1] for key in before.spans["key"]} == {"PREPARE", "REBOOT"}
            assert before.costs[0].tolist() == during.costs[0].tolist()
            assert before.costs[1].sum() > 0
            after = new.profile
            assert {after.labels[key][1] for key in after.spans["key"]} == {"RESTORE"}
            begin, end = new.arrival.blackout
            assert (begin <= before.spans["begin_ns"][-1] < after.spans["begin_ns"][0]).all()
            assert end >= after.spans["begin_ns"][-1]
            assert new.marks.keys() == {"boot", "restore"}
