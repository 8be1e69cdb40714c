"""``luo graph``: the pictures say what the engine does, in each of its behaviours."""

import html
import re
import shutil
from pathlib import Path

import pytest

import luo
from luo.cli import main
from luo.liveupdate import NEXT
from luo.notifier import BACKWARDS
from luo.quirks import QUIRKS

graph = pytest.importorskip("luo.graph", reason="needs the package graphviz")

DOCS = Path(__file__).resolve().parents[2] / "docs"
RENDERS = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz's program dot")

BOX = re.compile(r"^\t\t(PREPARE|REBOOT|CANCEL|RESTORE|FINISH)\d+ \[label=(?:<(.*)>|(\S+)) ", re.M)


def columns(chart):
    """Return what stands in the boxes of each column, from the top: title, then callbacks."""
    found = {}
    for event, table, name in BOX.findall(chart.source):
        text = html.unescape(re.sub("<[^>]*>+", "|", table)) if table else name.strip('"')
        found.setdefault(event, []).append(tuple(filter(None, text.split("|"))))
    return found


def ways_back(chart):
    """Return the dashed arrows as (tail, head, label)."""
    edge = re.compile(r"^\t(\S+) -> (\S+) \[.*style=dashed(?: taillabel=(.*?))?\]$", re.M)
    return [(tail, head, label.strip('"')) for tail, head, label in edge.findall(chart.source)]


@pytest.mark.parametrize(
    ("name", "chart"),
    [("states", graph.states), ("callbacks", lambda: graph.callbacks(graph.example()))],
)
def test_pictures_in_the_documentation_are_up_to_date(name, chart):
    """What docs/*.dot says is what the engine says now; if not: 'make docs'."""
    expected = chart().source

    assert (DOCS / f"{name}.dot").read_text() == expected
    assert (DOCS / f"{name}.svg").exists()


def test_states_are_those_of_the_transition_table():
    """Every pair of the table is an arrow, and only who has a way back can fail."""
    source = graph.states().source

    for (state, event), after in NEXT.items():
        assert f"{state.name} -> {after.name} [label={event.name}]" in source
        fails = f'{state.name} -> NORMAL [label="{event.name} fails"' in source
        assert fails == (event.name not in BACKWARDS)


def test_states_with_a_quirk_show_where_it_leads():
    """A node that stays behind makes the next ordinary kexec boot as UPDATED."""
    source = graph.states(quirks=["node-left-behind"]).source

    assert 'NORMAL -> UPDATED [label="node-left-behind"' in source
    assert QUIRKS["node-left-behind"].wrong in source
    assert "NORMAL -> UPDATED" not in graph.states().source


def test_callbacks_intended_go_back_in_reverse():
    """CANCEL is PREPARE upside down, sides included; FINISH has the devices children first."""
    found = columns(graph.callbacks(graph.example()))

    up = [(box[0], *reversed(box[1:])) for box in reversed(found["PREPARE"])]
    assert found["PREPARE"] == found["REBOOT"]
    assert found["CANCEL"] == found["RESTORE"] == up
    devices = [box for box in found["PREPARE"] if len(box) > 1]
    assert [box[0] for box in devices] == ["nic0", "port"]
    assert [box for box in found["FINISH"] if len(box) > 1] == devices
    assert found["PREPARE"][0] == ("mm",)
    assert found["FINISH"][-1] == ("mm",)


def test_callbacks_intended_failures_lead_to_all_that_was_prepared():
    """Nobody has been prepared when the first fails; every other way goes to the end."""
    ways = ways_back(graph.callbacks(graph.example()))

    assert {label for *_, label in ways} == {"nobody", ""}
    assert [tail for tail, _, label in ways if label] == ["PREPARE0:e"]
    assert ("REBOOT:w", "CANCEL0:e", "") in ways
    assert ("jump:w", "CANCEL0:e", "") in ways


def test_callbacks_with_priorities_inverted_begin_with_after_devices():
    """The quirk turns the chain round, in every event."""
    meant = columns(graph.callbacks(graph.example()))
    found = columns(graph.callbacks(graph.example(), quirks=["priorities-inverted"]))

    assert found["PREPARE"][0] == ("iommu",)
    assert found["PREPARE"][-2:] == [("mm",), ("kvm",)]
    assert sorted(found["PREPARE"]) == sorted(meant["PREPARE"])


def test_callbacks_with_cancel_not_reversed_go_down_twice():
    """Subsystems are cancelled in the order in which they were prepared."""
    found = columns(graph.callbacks(graph.example(), quirks=["cancel-not-reversed"]))

    for event in ("CANCEL", "FINISH"):
        names = [box[0] for box in found[event] if len(box) == 1]
        assert names == [box[0] for box in found["PREPARE"] if len(box) == 1]


def test_callbacks_with_reboot_half_cancelled_leave_devices_out():
    """The arrow from a device that fails REBOOT says how many of all are cancelled."""
    ways = ways_back(graph.callbacks(graph.example(), quirks=["reboot-half-cancelled"]))

    labels = [label for tail, _, label in ways if re.match(r"REBOOT\d+:p", tail)]
    assert labels == ["4 of 8", "5 of 8", "6 of 8", "7 of 8"]


def test_callbacks_of_rfc1_never_reach_devices_in_the_next_kernel():
    """Neither RESTORE nor FINISH has a device, and a jump that fails cancels none."""
    chart = graph.callbacks(graph.example(), behaviour="rfc1")
    found = columns(chart)

    assert all(len(box) == 1 for event in ("RESTORE", "FINISH") for box in found[event])
    assert next(way for way in ways_back(chart) if way[0] == "jump:w")[2] == "4 of 8"


def test_callbacks_of_a_user_are_not_called():
    """Stand-ins are called in their place, for each callback that there is."""

    def never(what):
        raise AssertionError("called")

    driver = luo.Driver("mine", luo.LiveUpdateOps(never, state_size=never), probe=never)
    chart = graph.callbacks(graph.example([driver], (), [luo.Subsystem("all", reboot=never)]))

    found = columns(chart)
    assert ("mine0", "driver mine", "bus pci") in found["PREPARE"]
    assert ("2 devices", "bus pci") in found["REBOOT"]
    assert ("all",) in found["REBOOT"]
    assert ("all",) not in found["PREPARE"]


def test_callbacks_of_many_devices_share_a_box():
    """Devices in a row with the same callbacks are drawn once, batches like any other."""
    tree = luo.DeviceTree()
    tree.add_many(("dev", 0, 1000), drivers=["one"] * 500 + ["many"] * 500)
    drivers = [
        luo.Driver("one", luo.LiveUpdateOps(lambda dev: None)),
        luo.Driver("many", luo.LiveUpdateOps(luo.batch(lambda devices: None))),
    ]

    found = columns(graph.callbacks(graph.Cast(tree, drivers)))

    assert found["PREPARE"] == [("500 devices", "driver one"), ("500 devices", "driver many")]
    assert "REBOOT" not in found


def test_callbacks_of_an_unknown_quirk_are_refused():
    """As the kernel refuses it."""
    with pytest.raises(ValueError, match="none of that name"):
        graph.callbacks(graph.example(), quirks=["none"])


# ---- the command ----


def luo_graph(capsys, *arguments):
    """Run ``luo graph``; return exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as ended:
        main(["graph", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_graph_without_a_file_prints_text(capsys):
    """The states, unless callbacks are asked for."""
    assert luo_graph(capsys) == (0, graph.states().source, "")


def test_graph_of_a_host_has_its_devices(tmp_path, capsys):
    """Built-in drivers with the user's in their place."""
    examples = DOCS.parent / "examples"
    file = tmp_path / "host.gv"
    ended = luo_graph(
        capsys, "callbacks", "--host", examples / "nic_host.toml", "--request", "*",
        "--drivers", examples / "nic_driver.py", "-o", file,
    )  # fmt: skip

    assert ended == (0, "", "")
    assert "driver mlx5_core" in file.read_text()
    assert "nic-totals" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["state", "--preset", "cloud"], "the same on every host"),
        (["-o", "states.png.txt"], "'txt' is no format"),
        (["--quirk", "none"], "none of that name"),
        (["callbacks", "--request", "*", "--host", "none.toml"], "none.toml"),
    ],
)
def test_graph_of_wrong_input_is_one_line_and_status_2(
    arguments, said, capsys, tmp_path, monkeypatch
):
    """Nothing is written."""
    monkeypatch.chdir(tmp_path)

    status, out, err = luo_graph(capsys, *arguments)

    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_graph_without_dot_is_one_line_and_status_2(capsys, tmp_path, monkeypatch):
    """It says what is missing; the text needs no program."""
    monkeypatch.setenv("PATH", str(tmp_path))

    status, out, err = luo_graph(capsys, "-o", tmp_path / "x.svg")

    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "install Graphviz" in err
    assert luo_graph(capsys, "-o", tmp_path / "x.dot") == (0, "", "")


@RENDERS
def test_graph_renders_any_name(capsys, tmp_path):
    """Names that mean something to DOT, or to its labels, are drawn as they are."""
    (tmp_path / "mine.py").write_text(
        "import luo\n"
        "odd = luo.Driver('<b>&\"\\\\{', luo.LiveUpdateOps(lambda dev: None))\n"
        "also = luo.Subsystem('<i>\\\\n\"', prepare=lambda context: None)\n"
    )
    file = tmp_path / "x.svg"

    ended = luo_graph(capsys, "callbacks", "--drivers", tmp_path / "mine.py", "-o", file)

    assert ended == (0, "", "")
    assert "driver &lt;b&gt;&amp;&quot;\\{" in file.read_text()
