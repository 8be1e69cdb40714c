"""``luo image`` and ``luo run --save``, as a person runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import luo

PACKAGE = Path(luo.__file__).parents[1]  # where the package under test is: not the source tree
HOST = """
memory = "1GiB"
nodes = 2
kho_scratch = "32M,32M,32M"
[devices]
source = "synthetic"
count = 30
[[vms]]
name = "vm"
count = 2
vcpus = 2
devices = 1
ram = { 4KiB = "1MiB", 2MiB = "62MiB" }
"""


def run_luo(*arguments, cwd=None):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-m", "luo", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "host.toml").write_text(HOST)
    for generation in ("kho-v4", "kho-v1"):
        done = run_luo(
            "run", "--host", folder / "host.toml", "--in-process",
            "--kho-abi", generation, "--save", folder / generation,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


def test_run_save_writes_an_image_that_breaks_no_rule(saved):
    """What the first kernel handed over is whole, and in its generation."""
    for generation in ("kho-v4", "kho-v1"):
        done = run_luo("image", "verify", saved / generation)

        assert done.returncode == 0, done.stdout
        assert f"no violations of {generation}" in done.stdout


def test_run_save_to_nowhere_is_wrong_usage(saved, tmp_path):
    """A file that cannot be written cancels the update: one line, exit status 2."""
    done = run_luo(
        "run", "--host", saved / "host.toml", "--in-process",
        "--save", tmp_path / "none" / "image",
    )  # fmt: skip

    assert done.returncode == 2
    assert done.stderr.startswith("luo: --save ")
    assert done.stderr.count("\n") == 1


def test_inspect_shows_a_table_json_and_dts(saved):
    """A summary on the screen, all of it as JSON, trees as text."""
    text = run_luo("image", "inspect", saved / "kho-v4")
    assert text.returncode == 0
    assert "liveupdate_orchestrator" in text.stdout
    assert all(len(line) <= 80 for line in text.stdout.splitlines())

    document = json.loads(run_luo("image", "inspect", "--json", saved / "kho-v4").stdout)
    assert document["abi"] == "kho-v4"
    assert document["violations"] == []
    records = document["subtrees"][0]["decoded"]["devices"]["device_records"]
    assert all(record["path"] for record in records)

    dts = run_luo("image", "inspect", "--dts", saved / "kho-v4").stdout
    assert 'compatible = "kho-v4";' in dts
    assert "subsystems {" in dts


def test_encode_diff_and_verify_of_an_edited_document(saved, tmp_path):
    """An edited document becomes an image, whose violation and difference are found."""
    document = json.loads(run_luo("image", "inspect", "--json", saved / "kho-v4").stdout)
    document["map"]["blocks"].append(["0x7000000000000", 0])
    (tmp_path / "edited.json").write_text(json.dumps(document))
    done = run_luo("image", "encode", tmp_path / "edited.json", tmp_path / "wrong")
    assert done.returncode == 0, done.stderr

    checked = run_luo("image", "verify", tmp_path / "wrong")
    assert checked.returncode == 1
    assert "0x7000000000000: preserved block of order 0 is not in RAM" in checked.stdout
    compared = run_luo("image", "diff", saved / "kho-v4", tmp_path / "wrong")
    assert compared.returncode == 1
    assert "only in B: 0x7000000000000" in compared.stdout
    assert run_luo("image", "diff", saved / "kho-v4", saved / "kho-v4").returncode == 0


def test_convert_there_and_back_is_equal(saved, tmp_path):
    """The command converts, and diff finds nothing but the generation's own."""
    there, back = tmp_path / "there", tmp_path / "back"
    assert run_luo("image", "convert", "--to", "kho-v1", saved / "kho-v4", there).returncode == 0
    assert run_luo("image", "convert", "--to", "kho-v4", there, back).returncode == 0

    assert run_luo("image", "verify", there).returncode == 0
    assert run_luo("image", "verify", back).returncode == 0
    left = run_luo("image", "diff", saved / "kho-v4", back).stdout
    assert all("kexec-metadata" in line for line in left.splitlines()), left


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_wrong_input_is_one_line_and_status_2(command, tmp_path):
    """No such file, no image, no dump directory."""
    (tmp_path / "text").write_text("no image " * 100)
    for name in ("none", "text", "."):
        done = run_luo("image", command, tmp_path / name)

        assert done.returncode == 2
        assert done.stderr.startswith("luo: ")
        assert done.stderr.count("\n") == 1
