"""libluo.so, built once, and programs in C that use it."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import luo

ROOT = Path(__file__).parents[2]
STRICT = ("-std=c11", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
_ASAN = ("-fsanitize=address", "-fno-omit-frame-pointer")


def without_environment(*command, env=None, cwd="/", **more):
    """Run a program with nothing of this process's environment."""
    return subprocess.run(
        [str(word) for word in command],
        env={"PATH": "/usr/bin:/bin", **(env or {})},
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
        **more,
    )


def build(directory, *prefix):
    """Run ``python -m luo.embed build``."""
    env = os.environ | {"PYTHONPATH": str(Path(luo.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-P", *(prefix or ("-m", "luo.embed", "build")), directory],
        env=env,
        text=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """libluo.so of this Python, in a directory of its own."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    shared = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LDLIBRARY"))
    if shared.suffix == ".a" or not shared.exists():
        pytest.skip(f"this Python has no shared library: no {shared}")
    directory = tmp_path_factory.mktemp("libluo")
    done = build(directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{directory / 'libluo.so'}\n"
    return directory / "libluo.so"


@pytest.fixture(scope="session")
def compiled(library, tmp_path_factory):
    """Compile a C file of the repository, and return the program."""
    made = {}

    def compile(source, *flags):
        if (source, flags) not in made:
            program = tmp_path_factory.mktemp("program") / Path(source).stem
            link = (f"-I{luo.get_include()}", f"-L{library.parent}", "-lluo", "-ldl")
            rpath = f"-Wl,-rpath,{library.parent}"
            command = ["gcc", *STRICT, *flags, ROOT / source, *link, rpath, "-o", program]
            subprocess.run(command, check=True)
            made[source, flags] = program
        return made[source, flags]

    return compile


@pytest.fixture(scope="session")
def asan(tmp_path_factory):
    """Compiler flags for AddressSanitizer, which can look for leaks here."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    program = tmp_path_factory.mktemp("asan") / "nothing"
    source = program.with_suffix(".c")
    source.write_text("int main(void) { return 0; }\n")
    for command in (["gcc", *_ASAN, source, "-o", program], [program]):
        done = without_environment(*command)
        if done.returncode:
            pytest.skip(f"no AddressSanitizer that finds leaks: {done.stderr.strip()[-200:]}")
    return _ASAN
