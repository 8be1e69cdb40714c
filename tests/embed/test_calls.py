"""What the functions of luo_embed.h return, asked from C (calls.c)."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import luo

from .conftest import without_environment

NAMES = (
    "handles", "null", "ram", "split_ram", "two_files", "host_ram", "kernels", "callback_errno",
    "reentry", "handover", "image", "unreclaimed", "steps", "costs", "kexec_steps", "pages",
    "threads",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_calls_in_c_return_what_the_header_says(name, compiled):
    """0 or the right -errno with its text, and the right numbers, for each group of calls."""
    done = without_environment(compiled("tests/embed/calls.c"), name)

    assert (done.stdout, done.returncode) == ("", 0)
    assert done.stderr == "luo_init: luo.h has ABI 2, the library 1\n"


def test_calls_in_c_are_all_named_here(compiled):
    """No group is left out."""
    done = without_environment(compiled("tests/embed/calls.c"))

    assert done.stdout.split() == list(NAMES)


def test_calls_in_c_under_asan_touch_nothing_and_leak_nothing(compiled, asan):
    """Freed handles, NULL, garbage and threads: no report, and no leak at the end."""
    program = compiled("tests/embed/calls.c", *asan)

    done = without_environment(program, "all", env={"PYTHONMALLOC": "malloc"})

    assert (done.stdout, done.returncode) == ("", 0), done.stderr
    assert "Sanitizer" not in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_header_has_the_functions_of_the_library_and_is_cplusplus_too(library, tmp_path):
    """Each that is declared is exported, nothing else is, and a C++ program links to it."""
    header = Path(luo.get_include(), "luo_embed.h").read_text()
    declared = set(re.findall(r"\b(luo_\w+)\(", re.sub(r"/\*.*?\*/", "", header, flags=re.S)))
    source, program = tmp_path / "one.cpp", tmp_path / "one"
    source.write_text('#include "luo.h"\nint main() { return luo_init(LUO_ABI) != LUO_ABI; }\n')
    link = [f"-L{library.parent}", f"-Wl,-rpath,{library.parent}", "-lluo"]
    subprocess.run(
        ["g++", "-Wall", "-Werror", f"-I{luo.get_include()}", source, *link, "-o", program],
        check=True,
    )

    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], text=True, check=True, capture_output=True
    ).stdout.split()[2::3]
    done = without_environment(program)

    assert {name for name in symbols if not name.startswith("PyInit_")} == declared
    assert (done.stderr, done.returncode) == ("", 0)
