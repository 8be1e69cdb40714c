"""The gate on instruction counts: what it judges, and that it catches a slowdown."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

import luo

GATE = Path(__file__).resolve().parents[2] / "benches" / "gate"

PROGRAM = """
import ctypes, sys
import luo
library = ctypes.CDLL(sys.argv[1])
writer = luo.FdtWriter()
writer.begin_node("")
library.start()
writer.add_nodes(("dev", 0, {nodes}), {{"state": bytes(64)}})
library.dump(b"write")
library.stop()
"""


@pytest.fixture
def gate(monkeypatch):
    """The gate, as a module."""
    spec = importlib.util.spec_from_file_location("luo_gate", GATE / "gate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gate_catches_a_planted_slowdown(gate, monkeypatch, tmp_path, capsys):
    """The same work again is within 5 %; 6 % more is not, and the table has both counts."""
    for program in ("valgrind", "gcc"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    try:
        gate.build_of(Path(luo._kho.__file__).read_bytes())
    except gate.Skip as why:
        pytest.skip(str(why))
    monkeypatch.setattr(gate, "PATHS", tmp_path / "program.py")
    stored = tmp_path / "counts.json"

    def run(nodes, *arguments):
        gate.PATHS.write_text(PROGRAM.format(nodes=nodes))
        return gate.main(["--stored", str(stored), *arguments])

    assert run(10_000, "--update") == 0
    before = next(iter(json.loads(stored.read_text()).values()))["paths"]["write"]["core"]
    assert run(10_000) == 0
    assert run(10_600) == 1
    printed = capsys.readouterr().out
    assert f"{before:,}" in printed
    assert "! write core" in printed
    assert "+6.0%" in printed


@pytest.mark.parametrize(
    ("before", "now", "good"),
    [
        (100_000, 100_000, True),
        (100_000, 105_000, True),
        (100_000, 105_001, False),
        (100_000, 95_000, True),
        (100_000, 94_999, False),
        (100, 2_100, True),
        (100, 2_101, False),
        (None, 100, False),
        (100, None, False),
    ],
)
def test_judge_allows_5_percent_either_way(gate, before, now, good):
    """What is faster is stored too; a path that is new or gone is not good; few are no change."""
    stored, counted = (
        {} if count is None else {"path": dict.fromkeys(gate.PARTS, count)}
        for count in (before, now)
    )
    core, interpreter, rest = gate.judge(stored, counted, ("core",))

    assert core == (good, "path", "core", before, now)
    assert interpreter == (True, "path", "interpreter", before, now)  # another build of it
    assert rest == (True, "path", "rest", before, now)
    assert len(list(gate.table([core, rest]))) == 3


def test_read_dump_counts_what_each_object_did_itself(gate):
    """Costs of callees stand in their own lines, and are not counted twice."""
    text = """\
desc: Trigger: Client Request: fdt: a path

events: Ir
summary: 60

ob=/lib/core.so
fn=one
10 5
+3 7
cfn=two
cob=/lib/python3.11
calls=2 10
10 40
* 8

ob=/lib/python3.11
fn=two
0 40
"""
    path, objects = gate.read_dump(text)

    assert path == "fdt: a path"
    assert objects == {"/lib/core.so": 20, "/lib/python3.11": 40}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_kho.cpython-311-x86_64-linux-gnu.so", "core"),
        ("python3.11", "interpreter"),
        ("libpython3.11.so.1.0", "interpreter"),
        ("_multiarray_umath.cpython-311-x86_64-linux-gnu.so", "rest"),
        ("libc.so.6", "rest"),
    ],
)
def test_part_of_is_the_core_the_interpreter_or_the_rest(gate, name, part):
    """numpy and libc choose their code by the machine."""
    assert gate.part_of(name, "_kho.cpython-311-x86_64-linux-gnu.so") == part


PRODUCER = b"GNU C17 12.2.0 -mtune=generic -march=x86-64 -g -O2 -O3 -fwrapv -fPIC\0"
CYTHON = b"_cython_3_3_1\0"


def test_build_of_names_what_counts_depend_on(gate, monkeypatch):
    """Compiler, Cython, Python and the flags that choose instructions; the last level counts."""
    monkeypatch.setattr(gate.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(gate.platform, "python_version_tuple", lambda: ("3", "11", "7"))

    assert gate.build_of(PRODUCER + CYTHON) == (
        "x86_64 gcc-12 cython-3.3 python-3.11 -O3 -march=x86-64"
    )


@pytest.mark.parametrize(
    ("core", "why"),
    [
        (CYTHON, "gcc with -g"),
        (PRODUCER.replace(b"x86-64", b"znver3") + CYTHON, "-march=znver3"),
        (PRODUCER.replace(b"-fPIC", b"-fsanitize=address") + CYTHON, "sanitizers"),
    ],
)
def test_build_of_another_kind_is_not_judged(gate, monkeypatch, core, why):
    """No debug information, another machine's instructions, sanitizers."""
    monkeypatch.setattr(gate.platform, "machine", lambda: "x86_64")
    with pytest.raises(gate.Skip, match=why):
        gate.build_of(core)


def test_build_that_nobody_stored_is_not_judged(gate, monkeypatch, tmp_path, capsys):
    """Exit status 0, with the reason and what there is."""
    stored = tmp_path / "counts.json"
    stored.write_text(json.dumps({"m68k gcc-2": {"interpreter": "", "paths": {}}}))
    monkeypatch.setattr(gate, "build_of", lambda core: "x86_64 gcc-99")

    assert gate.main(["--stored", str(stored)]) == 0
    assert capsys.readouterr().out == (
        "gate: not judged: no counts stored for x86_64 gcc-99; there are those for m68k gcc-2\n"
    )


def test_stored_counts_are_of_the_paths_that_there_are(gate):
    """Each set has the same paths, with a count for each part."""
    document = json.loads(gate.STORED.read_text())

    assert document
    assert len({tuple(one["paths"]) for one in document.values()}) == 1
    for one in document.values():
        assert {tuple(parts) for parts in one["paths"].values()} == {gate.PARTS}
