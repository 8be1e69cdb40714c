"""Folded stacks, metrics, and ``luo export``: other programs read what the document says."""

import json
import os
import re
import signal
import stat

import pytest

from luo.cli import main
from luo.profile import folded, prometheus, trace

parser = pytest.importorskip("prometheus_client.parser", reason="needs prometheus-client")

HOSTILE = [
    'a"b',
    "new\nline",
    "\udcff\udc80",
    "ünïcode",
    "\x00",
    "a;b c",
    "\\",
    "a 12",
    "",
    "\u2028",
]
#: How flamegraph.pl, inferno and speedscope take a line apart.
STACK = re.compile(r"(\S+) (\d+)\n")


def a_row(event, total_ns, *, name="nvme", kind="driver", subsystem="devices", **more):
    """Return a row of ``callbacks``."""
    row = {"subsystem": subsystem, "event": event, "kind": kind, "name": name}
    return {**row, "calls": 4, "devices": 4, "total_ns": total_ns, "max_ns": 3, **more}


def a_document(*callbacks, **more):
    """Return a ``luo-run/1`` document."""
    phases = {
        "prepare": 10_000, "reboot": 5_000, "jump": 2_000, "boot": 1_000, "restore": 7_000,
        "finish": 1_000, "blackout": 15_000,
    }  # fmt: skip
    return {
        "schema": "luo-run/1",
        "luo_version": "1",
        "kho_abi": "kho-v4",
        "behaviour": "intended",
        "successor": "process",
        "source": {"path": "a host"},
        "devices": {"total": 9, "preserved": 5},
        "phases_ns": phases,
        "runs": [{"phases_ns": {name: ns * k for name, ns in phases.items()}} for k in (1, 2, 3)],
        "callbacks": list(callbacks),
        "image": {"root_fdt_bytes": 305, "preserved_pages": 7, "page_bytes": 4096},
        "error": None,
        **more,
    }


def samples(document):
    """Return what Prometheus' own parser reads: {(name, labels): value}, and types by name."""
    text = "".join(prometheus.metrics(document))
    found, kinds = {}, {}
    for family in parser.text_string_to_metric_families(text):
        kinds[family.name] = family.type
        assert family.documentation
        for one in family.samples:
            key = (one.name, frozenset(one.labels.items()))
            assert key not in found
            found[key] = one.value
    return found, kinds


def of(found, sample, /, **labels):
    """Return the values of the samples of *sample* that have *labels*, by their other labels."""
    return {
        tuple(value for _, value in sorted(have - labels.items())): value
        for (what, have), value in found.items()
        if what == sample and labels.items() <= have
    }


# ---- folded stacks ----


def test_stacks_sum_to_what_callbacks_took():
    """In order of time; the dearest call to one device is a frame of its own, not counted twice."""
    document = a_document(
        a_row("PREPARE", 100),
        a_row("RESTORE", 50, max_device="pci0000:00/0000:00:01.0", max_ns=30),
        a_row("FINISH", 0),
        a_row("PREPARE", 9, name="vfio", max_device="pci0000:00", devices=512),
    )

    assert list(folded.callbacks(document)) == [
        "old_kernel;PREPARE;devices;driver;nvme 100\n",
        "old_kernel;PREPARE;devices;driver;vfio 9\n",
        "new_kernel;RESTORE;devices;driver;nvme;pci0000:00/0000:00:01.0 30\n",
        "new_kernel;RESTORE;devices;driver;nvme 20\n",
    ]


def test_stacks_of_the_tree_sum_to_its_root():
    """A device's frame is below its parent's; rows that hold what is below them are taken apart."""
    rows = [
        {"path": "", "parent": None, "devices": 9, "total_ns": 100, "blackout_ns": 60},
        {"path": "pci0", "parent": "", "devices": 5, "total_ns": 90, "blackout_ns": 60},
        {"path": "pci0/nvme", "parent": "pci0", "devices": 1, "total_ns": 40, "blackout_ns": 35},
        {"path": "pci0/…", "parent": "pci0", "devices": 3, "total_ns": 50, "blackout_ns": 25},
    ]
    lines = list(folded.tree(a_document(subtrees=rows)))

    assert lines == [
        "blackout;pci0;nvme 35\n",
        "blackout;pci0;… 25\n",
        "other 10\n",
        "other;pci0;nvme 5\n",
        "other;pci0;… 25\n",
    ]
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == 100


@pytest.mark.parametrize("name", HOSTILE)
def test_stack_of_a_hostile_name_is_one_line_with_five_frames(name):
    """No tool has an escape for its dividers."""
    (line,) = folded.callbacks(a_document(a_row("PREPARE", 7, name=name)))

    stack, ns = STACK.fullmatch(line).groups()
    assert len(stack.split(";")) == 5
    assert all(stack.split(";"))
    assert ns == "7"
    line.encode()


# ---- metrics ----


def test_metrics_are_read_back_as_they_were():
    """Types, seconds, quantiles that occurred, sizes."""
    found, kinds = samples(a_document(a_row("PREPARE", 8_000)))

    assert kinds["luo_phase_seconds"] == "summary"
    assert kinds["luo_callback_seconds"] == "histogram"
    assert kinds["luo_updates"] == "counter"
    assert of(found, "luo_updates_total") == {(): 3}
    assert of(found, "luo_phase_seconds", phase="blackout") == {
        ("0.5",): 30e-6,
        ("0.95",): 45e-6,
        ("1",): 45e-6,
    }
    assert of(found, "luo_phase_seconds_sum", phase="blackout") == {(): 90e-6}
    assert of(found, "luo_callback_seconds_sum") == {("PREPARE", "driver", "nvme", "devices"): 8e-6}
    assert of(found, "luo_callback_seconds_count", event="PREPARE", name="nvme") == {
        ("driver", "devices"): 4
    }
    assert of(found, "luo_devices") == {("total",): 9, ("preserved",): 5}
    assert of(found, "luo_preserved_bytes") == {(): 7 * 4096}
    assert of(found, "luo_failed") == {(): 0}


def test_buckets_are_cumulative_and_end_at_the_count():
    """A bucket of the recorder goes where its longest call belongs."""
    buckets = [[1_000, 1_016, 1], [9_984, 10_001, 1], [10_001, 10_112, 1], [200 * 10**9, 2**38, 1]]
    found, _ = samples(a_document(a_row("PREPARE", 8_000, histogram=buckets)))

    by_le = {
        float(le): n for (_, _, le, _, _), n in of(found, "luo_callback_seconds_bucket").items()
    }
    assert list(by_le) == sorted(by_le)
    assert list(by_le.values()) == sorted(by_le.values())
    assert by_le[1e-6] == 0
    assert by_le[2.5e-6] == 1
    assert by_le[1e-5] == 2
    assert by_le[2.5e-5] == 3
    assert by_le[100.0] == 3
    assert by_le[float("inf")] == 4


def test_buckets_without_a_histogram_are_the_count_alone():
    """Older documents have none."""
    found, _ = samples(a_document(a_row("PREPARE", 8_000)))

    assert list(of(found, "luo_callback_seconds_bucket").values()) == [4]


@pytest.mark.parametrize("name", HOSTILE)
def test_labels_with_hostile_names_are_escaped(name):
    """Quotes, newlines and backslashes are read back; what is no text is spelt out."""
    found, _ = samples(a_document(a_row("PREPARE", 8_000, name=name)))

    assert of(found, "luo_callback_seconds_count", name=trace.printable(name))


def test_worst_devices_are_metrics():
    """With path, driver and bus; who has no bus has an empty one."""
    worst = [{"path": "pci0/a", "driver": "nvme", "bus": None, "total_ns": 5, "blackout_ns": 2}]
    found, _ = samples(a_document(worst_devices=worst))

    assert of(found, "luo_device_seconds_total") == {("", "nvme", "pci0/a"): 5e-9}


# ---- the command ----


@pytest.fixture
def luo(capsys):
    """Run ``luo``: exit status, standard output, standard error."""

    def run(*args):
        with pytest.raises(SystemExit) as done:
            main([str(arg) for arg in args])
        return done.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def document(tmp_path):
    """A document in a file."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(a_document(a_row("PREPARE", 8_000))))
    return path


def test_export_writes_every_form(luo, document, tmp_path):
    """All at once, from one document."""
    files = {
        option: tmp_path / name
        for option, name in {
            "--folded": "stacks", "--folded-tree": "tree", "--prometheus": "luo.prom",
            "--trace": "trace.json",
        }.items()
    }  # fmt: skip
    status, out, err = luo("export", document, *(word for pair in files.items() for word in pair))

    assert (status, out, err) == (0, "", "")
    assert files["--folded"].read_text() == "old_kernel;PREPARE;devices;driver;nvme 8000\n"
    assert files["--folded-tree"].read_text() == ""
    assert "luo_info{" in files["--prometheus"].read_text()
    assert json.loads(files["--trace"].read_text())["traceEvents"]
    assert sorted(tmp_path.iterdir()) == sorted([document, *files.values()])
    assert stat.S_IMODE(files["--folded"].stat().st_mode) == 0o666 & ~umask()


def umask():
    """Return the file mode creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_export_writes_to_standard_output(luo, document):
    """For a pipe to a flame graph, or a scrape."""
    status, out, _ = luo("export", document, "--folded", "-")

    assert status == 0
    assert STACK.fullmatch(out)


@pytest.mark.parametrize("suffix", ["pftrace", "perfetto", "perfetto-trace"])
def test_export_writes_protobuf_by_suffix(luo, document, tmp_path, suffix):
    """What Perfetto reads."""
    pb = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    status, *_ = luo("export", document, "--trace", tmp_path / f"a.{suffix}")

    decoded = pb.Trace()
    decoded.ParseFromString((tmp_path / f"a.{suffix}").read_bytes())
    assert status == 0
    assert any(packet.HasField("track_event") for packet in decoded.packet)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "write what?"),
        (["--trace", "a.svg"], "FILE.pftrace"),
        (["--trace", "-"], "FILE.pftrace"),
        (["--folded", "-", "--prometheus", "-"], "one document"),
        (["--folded", "same", "--prometheus", "same"], "one document"),
        (["--folded", "no/such/directory"], "No such file"),
        (["--spans", "3", "--folded", "-"], "--spans"),
    ],
)
def test_export_refuses_wrong_usage(luo, document, monkeypatch, tmp_path, args, words):
    """One line, exit status 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    status, out, err = luo("export", document, *args)

    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [document]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "{}", "\udcff", "[" * 100_000, '{"schema": "luo-run/2"}',
        '{"schema": "luo-run/1"}', '{"schema": "luo-run/1", "runs": 5}',
        json.dumps(a_document("no row")), json.dumps(a_document({"event": 5})),
        json.dumps(a_document(a_row("PREPARE", "long"))),
        json.dumps(a_document(runs=None)), json.dumps(a_document(phases_ns=[1])),
        json.dumps(a_document(timeline=7)),
        json.dumps(a_document(timeline={"begin_ns": float("nan"), "kernels": []})),
        json.dumps(a_document(timeline={"begin_ns": 0, "kernels": [{"name": 1, "phases": [1]}]})),
        json.dumps(a_document(timeline={
            "begin_ns": -5, "kernels": [{"name": "x", "phases": [["prepare", 0, 2]]}]})),
        json.dumps(a_document(subtrees=[{"path": 7}])),
    ],
)  # fmt: skip
def test_export_of_something_else_is_one_line(luo, tmp_path, text):
    """What cannot be read leaves files that are there as they are."""
    pytest.importorskip("perfetto")
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    kept = tmp_path / "kept.pftrace"
    kept.write_text("kept")
    more = [tmp_path / name for name in ("a", "b", "c")]
    status, out, err = luo(
        "export", path, "--trace", kept, "--folded", more[0], "--folded-tree", more[1],
        "--prometheus", more[2],
    )  # fmt: skip

    assert (status, out, err.count("\n")) == (2, "", 1)
    assert str(path) in err
    assert not any(name.name.startswith(".") for name in tmp_path.iterdir())


def test_export_of_a_file_that_is_not_there_is_one_line(luo, tmp_path):
    """With the reason."""
    status, _, err = luo("export", tmp_path / "none.json", "--folded", "-")

    assert (status, err) == (2, f"luo: {tmp_path / 'none.json'}: No such file or directory\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_export_without_permission_is_one_line(luo, document, tmp_path):
    """Before anything is done."""
    closed = tmp_path / "closed"
    closed.touch(mode=0o400)
    status, _, err = luo("export", document, "--folded", closed)

    assert (status, err) == (2, f"luo: --folded {closed}: Permission denied\n")


def test_export_to_a_full_device_is_one_line(luo, document):
    """A device is written to as it is, and its error is said."""
    status, _, err = luo("export", document, "--folded", "/dev/full")

    assert (status, err) == (2, "luo: --folded /dev/full: No space left on device\n")


@pytest.mark.parametrize("option", ["--folded", "--trace"])
def test_export_where_nobody_may_make_files_is_one_line(luo, document, option):
    """Not even who may do anything."""
    status, _, err = luo("export", document, option, "/proc/luo.json")

    assert status == 2
    assert err.startswith(f"luo: {option} /proc/luo.json: ")
    assert err.count("\n") == 1


def test_export_to_a_link_writes_what_it_leads_to(luo, document, tmp_path):
    """And the link stays one."""
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").touch()
    status, *_ = luo("export", document, "--folded", tmp_path / "link")

    assert status == 0
    assert (tmp_path / "link").is_symlink()
    assert STACK.fullmatch((tmp_path / "file").read_text())


def test_export_without_perfetto_names_the_extra(luo, document, tmp_path, monkeypatch):
    """And the form that needs none."""
    monkeypatch.setitem(__import__("sys").modules, "luo.profile.perfetto", None)
    monkeypatch.delattr("luo.profile.perfetto")
    status, _, err = luo("export", document, "--trace", tmp_path / "a.pftrace")

    assert status == 2
    assert "luo-kho[trace]" in err
    assert err.count("\n") == 1


def test_interrupted_export_leaves_the_old_file(document, tmp_path, monkeypatch):
    """^C while it is written: no half file, and none beside it."""
    kept = tmp_path / "trace.json"
    kept.write_text("kept")
    monkeypatch.setattr(
        "luo.profile.chrome._of_process", lambda *_: os.kill(os.getpid(), signal.SIGINT) or []
    )
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(SystemExit) as done:
            main(["export", str(document), "--trace", str(kept)])
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)

    assert done.value.code == 130
    assert kept.read_text() == "kept"
    assert sorted(tmp_path.iterdir()) == [document, kept]
