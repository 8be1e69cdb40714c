"""A kernel on a clock that is told: figures without noise, from the same code."""

import ctypes
import json

import pytest
from click.testing import CliRunner
from rig import Log, forest, small_kernel, small_machine

import luo
from luo.cli import main
from luo.clock import VirtualClock
from luo.kernel import live_update
from luo.profile.cost import CostModel

MS = 1_000_000

# ---- the clock ----


def test_virtual_clock_moves_only_when_told():
    """It starts where it is told to."""
    clock = VirtualClock(100)

    assert [clock(), clock()] == [100, 100]
    assert clock.advance(5) == clock() == 105
    assert clock.advance(0) == 105


@pytest.mark.parametrize("ns", [-1, 1.5, "1"])
def test_advance_by_no_number_of_nanoseconds_is_refused(ns):
    """Time does not go back, and is counted in whole nanoseconds."""
    clock = VirtualClock()

    with pytest.raises((ValueError, TypeError)):
        clock.advance(ns)
    assert clock() == 0


def virtual_update(cost, clock=None, **kwargs):
    """A live update of the small kernel on a virtual clock; the report."""
    clock = clock or VirtualClock()
    machine = small_machine()
    settings = {"clock": clock, "cost": clock.charging(cost)} | kwargs
    old = small_kernel(machine, Log(), **settings).boot()
    old.devices.request("*")
    return live_update(old, small_kernel(machine, Log(), **settings))


def test_kernels_on_a_virtual_clock_take_what_the_model_says():
    """Eight callbacks of 1 ms each event, and phases of their own; spans one behind the other."""
    model = CostModel({"engine/jump": "5ms", "engine/boot": "2ms"}, default="1ms")

    report = virtual_update(model, spans=True)

    assert report.phases == {
        "prepare": 8 * MS, "reboot": 8 * MS, "jump": 5 * MS, "boot": 2 * MS, "restore": 8 * MS,
        "finish": 8 * MS, "blackout": 23 * MS,
    }  # fmt: skip
    spans = report.kernel.profile.spans
    assert (spans["begin_ns"][1:] == spans["begin_ns"][:-1] + spans["ns"][:-1]).all()


def test_blackout_has_the_time_of_the_last_restore_callback():
    """A device runs again when the callback that reclaims it is over, not when it begins."""
    model = CostModel({"devices/RESTORE": "3ms"})

    assert virtual_update(model).phases["blackout"] == 24 * MS


def test_blackout_has_the_engines_share_of_restore():
    """What comes over is adopted before the first callback."""
    model = CostModel({"engine/restore": "7ms", "engine/reboot": "1ms", "engine/finish": "1ms"})

    assert virtual_update(model).phases["blackout"] == 8 * MS


def test_device_without_restore_callback_does_not_wait_for_a_subsystem():
    """It runs when the devices are through, before the subsystems that restore behind them."""
    clock = VirtualClock()
    cost = clock.charging(CostModel({"late/RESTORE": "9ms", "engine/jump": "1ms"}))
    machine = small_machine()

    def kernel():
        late = luo.Subsystem(
            "late", priority=luo.Priority.BEFORE_DEVICES, restore=lambda context: None
        )
        ops = luo.LiveUpdateOps(lambda device: None)
        return luo.Kernel(
            machine,
            drivers=[luo.Driver(name, ops) for name in ("portdrv", "nic", "nvme")],
            buses=[luo.Bus("pci", luo.LiveUpdateOps())],
            subsystems=[late],
            clock=clock,
            cost=cost,
        )

    old = kernel().boot()
    old.devices.request("*")
    report = live_update(old, kernel())

    assert report.phases["blackout"] == 1 * MS
    assert report.phases["restore"] == 9 * MS


def test_host_driven_clock_is_any_callable():
    """A clock that its owner moves: each reading is what it says."""
    time = iter(range(0, 10**9, 1000))
    kernel = small_kernel(small_machine(), Log(), clock=lambda: next(time)).boot()
    kernel.devices.request("*")

    kernel.luo.prepare()

    rows = kernel.profile.rows()
    assert {row["min_ns"] for row in rows} == {1000}


def test_workers_draw_costs_in_order():
    """Whatever could be called by several threads: a model that draws has the same costs."""
    called = []

    def cost(label, device, devices):
        called.append(device)
        return 1000

    tree = forest({f"n{number}": ("pci", "nic") for number in range(1500)})
    signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    function = signature(lambda device, context: 0)
    ops = luo.LiveUpdateOps(luo.native(function), thread_safe=True)
    clock = VirtualClock()
    kernel = luo.Kernel(
        luo.Machine("64MiB", tree),
        drivers=[luo.Driver("nic", ops)],
        buses=[luo.Bus("pci", luo.LiveUpdateOps())],
        workers=4,
        clock=clock,
        cost=clock.charging(cost),
    ).boot()
    kernel.devices.request("*")
    called.clear()
    began = clock()
    kernel.luo.prepare()

    assert called == [*range(1500), -1]
    assert clock() - began == kernel.phases["prepare"] == 1501 * 1000


def test_callback_limit_judges_simulated_time():
    """A callback that the model makes late fails as one that is late."""
    with pytest.raises(luo.CallbackError) as caught:
        virtual_update(CostModel({"devices/nvme/REBOOT": "2s"}), callback_limit=1)

    assert (caught.value.name, caught.value.event) == ("nvme", "REBOOT")


# ---- luo run --clock virtual ----

COST = """
default = "2us"
[rules]
"engine/jump" = { distribution = "lognormal", median = "15ms", sigma = 0.2 }
"PREPARE" = { distribution = "uniform", low = "1us", high = "90us" }
"REBOOT" = { distribution = "exponential", mean = "40us" }
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ``luo run`` on a small host; return the exit status, the document and the screen."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "host.toml").write_text(
        'memory = "256MiB"\n[devices]\nsource = "synthetic"\ncount = 60\n'
    )
    (tmp_path / "cost.toml").write_text(COST)

    def run(*arguments):
        words = ["run", "--host", "host.toml", "--json", "run.json", *arguments]
        done = CliRunner().invoke(main, words)
        path = tmp_path / "run.json"
        document = json.loads(path.read_text()) if path.exists() else None
        path.unlink(missing_ok=True)
        return done.exit_code, document, done.output

    return run


VIRTUAL = ("--clock", "virtual", "--cost", "cost.toml")


def test_run_on_a_virtual_clock_gives_the_same_figures_each_time(run):
    """Bit for bit with the same seed, others with another."""
    first, second = (run(*VIRTUAL, "--repeat", "3") for _ in range(2))
    other = run(*VIRTUAL, "--repeat", "3", "--seed", "5")

    assert first == second
    status, document, _ = first
    assert status == 0
    assert document["settings"]["clock"] == "virtual"
    assert document["settings"]["cost_file"] == "cost.toml"
    assert document["successor"] == "in-process"
    assert len({run["phases_ns"]["jump"] for run in document["runs"]}) == 3
    assert other[1]["phases_ns"]["jump"] != document["phases_ns"]["jump"]


def test_run_on_a_virtual_clock_replays_a_measured_run(run, tmp_path):
    """A document is a cost model: nothing is missing, and phases come out as they were."""
    _, measured, _ = run("--in-process")
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    status, replayed, screen = run("--clock", "virtual", "--cost", "measured.json")

    assert status == 0
    assert "no rule" not in screen
    for phase in ("prepare", "reboot", "jump", "boot", "restore", "finish"):
        assert replayed["phases_ns"][phase] == pytest.approx(measured["phases_ns"][phase], rel=0.03)
    calls = [[(row["name"], row["event"], row["calls"]) for row in one["callbacks"]]
             for one in (measured, replayed)]  # fmt: skip
    assert calls[0] == calls[1]


def test_run_names_callbacks_without_a_rule(run, tmp_path):
    """They cost nothing, which the user should know."""
    (tmp_path / "few.toml").write_text("[rules]\nPREPARE = '1ms'")

    status, _, screen = run("--clock", "virtual", "--cost", "few.toml")

    assert status == 0
    assert "no rule for devices/" in screen
    assert "they cost nothing" in screen


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--clock", "virtual"), "--clock virtual: name what callbacks cost with --cost FILE"),
        (("--cost", "cost.toml"), "--cost: only a virtual clock is told"),
        (("--clock", "virtual", "--cost", "none.toml"), "none.toml: No such file"),
        (("--clock", "virtual", "--cost", "host.toml"), "host.toml: memory: unknown key"),
    ],
)
def test_run_with_a_clock_that_cannot_be_is_wrong_usage(run, arguments, why):
    """One line, exit status 2, and nothing written."""
    status, document, output = run(*arguments)

    assert (status, document) == (2, None)
    assert why in output


def test_run_that_fails_on_a_virtual_clock_says_so(run, tmp_path):
    """A callback that the model makes too late: rolled back, exit status 1."""
    (tmp_path / "late.toml").write_text("[rules]\nREBOOT = '2s'")

    status, document, _ = run("--clock", "virtual", "--cost", "late.toml", "--callback-limit", "1s")

    assert status == 1
    assert document["error"]["errno_name"] == "ETIMEDOUT"
    assert document["error"]["rolled_back"] is True
