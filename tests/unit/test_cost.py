"""What callbacks cost in simulated time: rules, draws, and the files that they come from."""

import io
import json
import math
import statistics

import pytest

import luo
from luo.profile.cost import CostModel, Distribution, Rule


def label(name, event="REBOOT", subsystem="devices", kind="driver"):
    """The label of a callback, as a recorder has it."""
    return (subsystem, event, kind, name)


def phase(name):
    """The label of a phase."""
    return ("engine", name.upper(), "phase", name)


def draws(model, n=1, name="nic", devices=1, **kwargs):
    """*n* draws of a callback."""
    return [model.draw(label(name, **kwargs), devices) for _ in range(n)]


@pytest.fixture
def write(tmp_path):
    """Write a file, and return its path."""

    def write(name, text):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


# ---- rules ----


def test_most_specific_rule_counts():
    """The name, then the subsystem, then the event, then the default."""
    model = CostModel(
        {"devices/nic/REBOOT": 1, "devices/REBOOT": 2, "REBOOT": 3, "kvm/PREPARE": "4ns"},
        default=9,
    )

    assert draws(model) == [1]
    assert draws(model, name="nvme") == [2]
    assert draws(model, name="kvm", subsystem="kvm", kind="subsystem") == [3]
    assert draws(model, name="kvm", subsystem="kvm", kind="subsystem", event="PREPARE") == [4]
    assert draws(model, event="FINISH") == [9]
    assert model.missed == {"devices/nic/FINISH"}


def test_phases_have_rules_of_their_own():
    """An event's rule is for callbacks; a phase without a rule costs nothing, not the default."""
    model = CostModel({"engine/jump": "15ms", "REBOOT": 3}, default=9)

    assert model.draw(phase("jump"), 0) == 15_000_000
    assert model.draw(phase("reboot"), 0) == 0
    assert model.missed == set()


def test_fixed_and_per_device_add_up():
    """A batch of 100 devices costs 100 times the one and once the other."""
    model = CostModel({"REBOOT": Rule(1000, 2.5)})

    assert draws(model, devices=100) == [1250]
    assert draws(model, devices=0) == [1000]


def test_distribution_of_a_batch_scales_with_its_devices():
    """Measured with 10 devices a call, called with 30: three times that."""
    spread = Distribution("uniform", (1000, 1000))
    model = CostModel({"REBOOT": Rule(spread=spread, devices=10)})

    assert draws(model, devices=30) == [3000]
    assert draws(model, devices=10) == [1000]


def test_model_is_a_cost_hook():
    """It is called as the recorder calls one."""
    assert CostModel(default=7)(label("nic"), 3, 1) == 7


@pytest.mark.parametrize(
    "rules",
    [
        {"devices/nic/BOOT": 1},
        {"nic": 1},
        {"": 1},
        {"engine/flight": 1},
        {"engine/REBOOT": 1},
        {"/REBOOT": 1},
        {"REBOOT": "12 parsecs"},
        {"REBOOT": -1},
        {"REBOOT": math.nan},
        {"REBOOT": True},
        {"REBOOT": 10**18},
    ],
    ids=str,
)
def test_rules_that_are_none_are_refused(rules):
    """A name that nobody has, a time that is none."""
    with pytest.raises(ValueError, match="cost model: rules"):
        CostModel(rules)


# ---- draws ----

SPREADS = {
    "uniform": (Distribution("uniform", (100_000, 300_000)), 200_000),
    "exponential": (Distribution("exponential", (200_000,)), 200_000),
    "normal": (Distribution("normal", (200_000, 20_000)), 200_000),
    "lognormal": (Distribution("lognormal", (200_000, 0.5)), 200_000 * math.exp(0.125)),
    "histogram": (
        Distribution("histogram", ((100_000, 200_000, 3), (200_000, 200_000, 1))),
        (150_000 * 3 + 200_000) / 4,
    ),
}


@pytest.mark.parametrize("kind", SPREADS)
def test_distribution_has_its_mean(kind):
    """Of 20,000 draws, within 3 %."""
    spread, mean = SPREADS[kind]
    values = draws(CostModel({"REBOOT": Rule(spread=spread)}), 20_000)

    assert statistics.fmean(values) == pytest.approx(mean, rel=0.03)
    assert min(values) >= 0


def test_histogram_draws_only_what_was_measured():
    """Within the buckets, and as often as each was met."""
    spread = Distribution("histogram", ((10, 20, 1), (1000, 1000, 3)))
    values = draws(CostModel({"REBOOT": Rule(spread=spread)}), 4000)

    assert all(10 <= value <= 20 or value == 1000 for value in values)
    assert values.count(1000) == pytest.approx(3000, rel=0.05)


def test_draws_are_the_same_for_a_seed_and_differ_for_another():
    """The n-th draw of a rule, whatever other rules were asked in between."""
    rules = {"REBOOT": Rule(spread=SPREADS["lognormal"][0]), "PREPARE": Rule(spread=Distribution(
        "uniform", (0, 1_000_000)))}  # fmt: skip
    model = CostModel(rules, seed=3)
    expected = draws(model, 10)
    mixed = model.fresh()
    found = []
    for _ in range(10):
        draws(mixed, 3, event="PREPARE")
        found += draws(mixed)

    assert found == expected
    assert draws(model.fresh(4), 10) != expected
    assert draws(model, 10) != expected  # it goes on


def test_draws_are_the_same_on_every_machine():
    """Written down once: what a gate compares with must not move."""
    events = ("PREPARE", "REBOOT", "RESTORE", "FINISH", "CANCEL")
    spreads = (spread for spread, _ in SPREADS.values())
    rules = {event: Rule(spread=spread) for event, spread in zip(events, spreads, strict=True)}
    model = CostModel(rules)

    assert [draws(model, 2, event=event) for event in model.rules] == PINNED


PINNED = [[156017, 131031], [188849, 167523], [183717, 207874], [214722, 119086], [125653, 103641]]


# ---- TOML ----


def test_toml_has_all_forms(write):
    """Times as text or nanoseconds; every key that is documented."""
    path = write(
        "cost.toml",
        """
        default = "5us"
        seed = 7
        [rules]
        "engine/jump" = "15ms"
        "FINISH" = 250
        "devices/vfio-pci/PREPARE" = { fixed = "20us", per_device = 1.5 }
        "kvm/REBOOT" = { distribution = "lognormal", median = "80us", sigma = 0.4 }
        "kvm/RESTORE" = { distribution = "uniform", low = "1us", high = "2us", fixed = 3 }
        "mm/REBOOT" = { histogram = [[900, 1000, 4], [1000, 1200, 2]], devices = 12 }
        """,
    )

    model = CostModel.load(path)

    assert (model.default, model.seed) == (Rule(5000), 7)
    assert model.rules == {
        "engine/jump": Rule(15_000_000),
        "FINISH": Rule(250),
        "devices/vfio-pci/PREPARE": Rule(20_000, 1.5),
        "kvm/REBOOT": Rule(spread=Distribution("lognormal", (80_000, 0.4))),
        "kvm/RESTORE": Rule(3, spread=Distribution("uniform", (1000, 2000))),
        "mm/REBOOT": Rule(
            spread=Distribution("histogram", ((900, 1000, 4), (1000, 1200, 2))), devices=12
        ),
    }


def test_saved_model_is_loaded_again(tmp_path):
    """All kinds of rules, and names with all that TOML escapes."""
    rules = {
        f"devices/{kind}/REBOOT": Rule(1, 2.5, spread) for kind, (spread, _) in SPREADS.items()
    }
    rules['devices/a"b\\c\x7f\t€/REBOOT'] = Rule(3)
    model = CostModel(rules, default=Rule(per_device=1e-7), seed=-5)

    model.save(tmp_path / "saved.toml")

    assert CostModel.load(tmp_path / "saved.toml") == model


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[rules", "cost.toml: Expected ']'"),
        ("rules = 1", "cost.toml: rules: must be a table"),
        ("speed = 1", "cost.toml: speed: unknown key"),
        ("seed = 1.5", "cost.toml: seed: 1.5 is no integer"),
        ("default = 'x'", "cost.toml: default: duration 'x'"),
        ("[rules]\nREBOT = 1", "cost.toml: rules.\"REBOT\": 'REBOT' is no rule"),
        ("[rules]\nREBOOT = []", 'cost.toml: rules."REBOOT": [] is no time'),
        ("[rules]\nREBOOT = {fix = 1}", 'cost.toml: rules."REBOOT".fix: unknown key'),
        ("[rules]\nREBOOT = {devices = 2}", 'rules."REBOOT".devices: there is no distribution'),
        (
            "[rules]\nREBOOT = {distribution = 'pareto'}",
            "rules.\"REBOOT\".distribution: 'pareto' is none of uniform",
        ),
        ("[rules]\nREBOOT = {distribution = 'normal', mean = 1}", "normal: deviation is missing"),
        (
            "[rules]\nREBOOT = {distribution = 'uniform', low = 2, high = 1}",
            'rules."REBOOT".low: is more than high',
        ),
        (
            "[rules]\nREBOOT = {distribution = 'lognormal', median = 1, sigma = 99}",
            'rules."REBOOT".sigma: 99 is no number from 0 to 20',
        ),
        ("[rules]\nREBOOT = {histogram = []}", 'rules."REBOOT".histogram: a list'),
        ("[rules]\nREBOOT = {histogram = [[2, 1, 1]]}", 'rules."REBOOT".histogram[0]'),
        ("[rules]\nREBOOT = {histogram = [[1, 2, 0]]}", 'rules."REBOOT".histogram[0]'),
        ("[names]\nf = 'REBOOT'", "names: there is no base"),
        ("base = 'x.yaml'", "base: 'x.yaml': a .json or .csv file"),
        ("base = 'x.csv'\n[names]\nf = 'g'", "names.\"f\": 'g' is no rule"),
    ],
)
def test_toml_that_is_wrong_is_told_by_its_key(write, text, why):
    """One line: the file, the key, and what is the matter."""
    path = write("cost.toml", text)

    with pytest.raises(ValueError) as caught:
        CostModel.load(path)

    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_of_no_known_kind_is_refused(write):
    """Its suffix says what it is."""
    with pytest.raises(ValueError, match=r"cost\.xml: a \.toml, \.json or \.csv"):
        CostModel.load(write("cost.xml", ""))
    with pytest.raises(FileNotFoundError):
        CostModel.load("nowhere.toml")


def test_file_that_is_no_text_is_refused(tmp_path):
    """Bytes that are no UTF-8, with their place."""
    path = tmp_path / "cost.toml"
    path.write_bytes(b"seed = 1 # \xff")

    with pytest.raises(ValueError, match="byte 11: no UTF-8"):
        CostModel.load(path)


# ---- luo-run/1 ----


def document(**changes):
    """A luo-run/1 document with two callbacks."""
    row = {"subsystem": "devices", "event": "REBOOT", "kind": "driver", "name": "nic"}
    figures = {"calls": 4, "devices": 4, "total_ns": 4000, "min_ns": 900, "max_ns": 1100}
    run = {
        "phases_ns": {"prepare": 50, "reboot": 7000, "jump": 900, "restore": 10},
        "callbacks_ns": {"devices/nic/REBOOT": 4000, "kvm/kvm/RESTORE": 100},
    }
    return {
        "schema": "luo-run/1",
        "callbacks": [row | figures],
        "runs": [run],
    } | changes


def test_run_without_histograms_costs_the_mean():
    """1000 ns each; and the engine what callbacks leave of each phase."""
    model = CostModel.from_run(document())

    assert model.rules == {
        "devices/nic/REBOOT": Rule(1000),
        "engine/prepare": Rule(50),
        "engine/reboot": Rule(3000),
        "engine/jump": Rule(900),
        "engine/restore": Rule(0),
    }


def test_run_with_histograms_costs_what_was_measured():
    """Buckets, within the least and the most that was seen."""
    found = document()
    found["callbacks"][0]["histogram"] = [[896, 912, 1], [1088, 1104, 3]]

    model = CostModel.from_run(found)

    assert model.rules["devices/nic/REBOOT"] == Rule(
        spread=Distribution("histogram", ((900, 912, 1), (1088, 1100, 3)))
    )


def test_run_with_batches_costs_by_device():
    """One call for 50 devices that took 5 µs: 100 ns each."""
    found = document()
    found["callbacks"][0] |= {"calls": 1, "devices": 50, "total_ns": 5000}

    assert CostModel.from_run(found).rules["devices/nic/REBOOT"] == Rule(per_device=100)


def test_run_with_a_driver_and_a_bus_of_one_name_mixes_them():
    """They share a rule, so it has the calls of both."""
    found = document()
    found["callbacks"].append(found["callbacks"][0] | {"kind": "bus", "total_ns": 8000})

    assert CostModel.from_run(found).rules["devices/nic/REBOOT"] == Rule(
        spread=Distribution("histogram", ((1000, 1000, 4), (2000, 2000, 4)))
    )


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([], "schema: no luo-run/1"),
        ({"schema": "luo-run/2"}, "schema: no luo-run/1"),
        (document(callbacks={}), "callbacks: a list"),
        (document(callbacks=[]), "callbacks: none was measured"),
        (document(callbacks=[1]), "callbacks[0]: no row"),
        (document(callbacks=[{"event": "REBOOT"}]), "callbacks[0]: no row"),
        (document(runs=[{}]), "runs[0]: no update"),
        (
            document(runs=[{"phases_ns": {"jump": -1}, "callbacks_ns": {}}]),
            "runs[0].phases_ns.jump",
        ),
        (
            document(callbacks=[document()["callbacks"][0] | {"calls": 0}]),
            "callbacks[0].calls: 0",
        ),
        (
            document(callbacks=[document()["callbacks"][0] | {"histogram": [[3, 1, 1]]}]),
            "callbacks[0].histogram[0]",
        ),
    ],
)
def test_document_that_is_wrong_is_told_by_its_key(write, found, why):
    """The file and the key."""
    with pytest.raises(ValueError) as caught:
        CostModel.load(write("run.json", json.dumps(found)))

    assert "run.json: " + why in str(caught.value)


def test_json_that_is_none_is_told_by_its_line(write):
    """As the parser tells it."""
    with pytest.raises(ValueError, match=r"run\.json: .*line 2"):
        CostModel.load(write("run.json", '{"schema":\n}'))


def test_real_run_gives_a_model_of_every_callback():
    """A report's own document: nothing is missed when the same is run again."""
    kernel = luo.workloads.load("cloud", devices=50)
    report = luo.live_update(kernel)
    model = CostModel.from_run(report.to_dict())

    for row in report.callbacks:
        model.draw((row["subsystem"], row["event"], row["kind"], row["name"]), row["devices"])
    report.kernel.close()

    assert model.missed == set()
    assert {"engine/jump", "engine/boot", "engine/prepare"} <= model.rules.keys()


# ---- CSV ----


def csv_of(text, **kwargs):
    """The rules of a CSV text."""
    return CostModel.from_csv(io.StringIO(text), **kwargs).rules


ONE = {"devices/nic/REBOOT": Rule(1500)}


@pytest.mark.parametrize(
    "text",
    [
        "name,duration_ns\ndevices/nic/REBOOT,1500\n",
        "duration (us),function\n1.5,devices/nic/REBOOT\n",
        "func\tnsecs\ndevices/nic/REBOOT\t1500",
        "probe;latency_us;pid\ndevices/nic/REBOOT;1.5;42",
        "# tracer: function_graph\n#\nCALLBACK|DURATION\ndevices/nic/REBOOT|1.500 us\n",
        'symbol,"dur[ms]"\n"devices/nic/REBOOT",0.0015',
        "time,name,delta_us\n99.5,devices/nic/REBOOT,! 1.5\n\n",
        "subsystem,event,name,elapsed\r\ndevices,REBOOT,nic,1500ns\r\n",
        "rule,seconds\ndevices/nic/REBOOT,1.5e-6",
        "name,count,usecs\ndevices/nic/REBOOT,12,1.5",
    ],
)
def test_csv_of_tracing_tools_is_read(text):
    """Names of columns, units and separators as such tools print them."""
    assert csv_of(text) == ONE


def test_csv_of_functions_is_read_by_names():
    """Functions as ftrace prints them; others are none of ours."""
    text = (
        "duration,function\n"
        "2 us,virtio_pci_freeze [virtio_pci]();\n+ 12 us,schedule();\n4 us,virtio_pci_freeze\n"
    )

    assert csv_of(text, names={"virtio_pci_freeze": "devices/virtio-pci/REBOOT"}) == {
        "devices/virtio-pci/REBOOT": Rule(
            spread=Distribution("histogram", ((2000, 2000, 1), (4000, 4000, 1)))
        )
    }


def test_csv_with_many_calls_is_a_histogram_of_equal_shares():
    """10,000 calls in 512 buckets, whose quantiles are those of the calls."""
    lines = "".join(f"REBOOT,{1000 + number}\n" for number in range(10_000))
    (rule,) = csv_of("name,ns\n" + lines).values()

    assert len(rule.spread.values) == 512
    find = rule.spread.inverse()
    for q in (0.01, 0.5, 0.95, 0.99):
        assert find(q) == pytest.approx(1000 + 10_000 * q, rel=0.01)


def test_csv_with_devices_scales():
    """Calls that served 10 devices, in 1 and 3 µs."""
    text = "name,ns,devices\nREBOOT,1000,10\nREBOOT,3000,10\n"

    assert csv_of(text)["REBOOT"].devices == 10


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "line 1: one column of durations"),
        ("name,pid\n", "line 1: one column of durations is expected, as duration_ns; there is"),
        ("name,dur_us,lat_us\n", "line 1: one column of durations"),
        ("who,ns\n", "line 1: no column of names"),
        ("name,ns\n", "no call of a callback"),
        ("name,ns\nREBOOT,1\nREBOOT\n", "line 3: 1 columns, the header has 2"),
        ("name,ns\n# nothing\nREBOOT,fast\n", "line 3: duration 'fast': no number"),
        ("name,ns\nREBOOT,-1\n", "line 2: duration '-1'"),
        ("name,ns\nREBOOT,3 weeks\n", "line 2: duration '3 weeks'"),
        ("name,duration\nREBOOT,3\n", "line 2: duration '3': no unit, here or in the column"),
        ("name,ns\nvirtio_pci_freeze,3\n", "line 2: 'virtio_pci_freeze' is no rule"),
        ("name,ns\n,3\n", "line 2: there is no name"),
        ("name,ns,count\nREBOOT,3,0\n", "line 2: '0' is no number of calls"),
        ("name,ns,devices\nREBOOT,3,x\n", "line 2: 'x' is no number of devices"),
        ("name,ns\nREBOOT,1e30\n", "line 2: 1e+30 is no time"),
    ],
)
def test_csv_that_is_wrong_is_told_by_its_line(write, text, why):
    """The file and the line."""
    with pytest.raises(ValueError) as caught:
        CostModel.load(write("trace.csv", text))

    assert str(caught.value).startswith("trace.csv: ") or "trace.csv: " in str(caught.value)
    assert why in str(caught.value)


def test_toml_begins_with_a_csv_and_its_own_rules_win(write):
    """Beside the file; functions by names."""
    write("trace.csv", "function,us\nfreeze,3\nthaw,4\nidle,5\n")
    path = write(
        "cost.toml",
        """
        base = "trace.csv"
        [names]
        freeze = "devices/nic/REBOOT"
        thaw = "devices/nic/RESTORE"
        [rules]
        "devices/nic/RESTORE" = "9us"
        """,
    )

    assert CostModel.load(path).rules == {
        "devices/nic/REBOOT": Rule(3000),
        "devices/nic/RESTORE": Rule(9000),
    }


def test_toml_begins_with_a_run(write):
    """What luo run --json wrote, with one callback changed."""
    write("run.json", json.dumps(document()))
    path = write("cost.toml", 'base = "run.json"\n[rules]\n"engine/jump" = "1ms"')

    rules = CostModel.load(path).rules

    assert rules["devices/nic/REBOOT"] == Rule(1000)
    assert rules["engine/jump"] == Rule(1_000_000)
