"""How libluo.so starts Python, or joins the one that runs; and what happens if it cannot."""

import errno
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import luo
from luo.embed.build import build as build_library

from .conftest import build, without_environment

STARTED = "luo_init 1\nluo_machine_new 0 \n"
NOT_STARTED = f"luo_machine_new {-errno.ENXIO} luo_init() has not been called, or has failed\n"


@pytest.fixture(scope="session")
def probe(compiled):
    """The program that loads libluo.so as a plugin."""
    return compiled("tests/embed/probe.c")


@pytest.mark.parametrize(
    "env",
    [
        {"PATH": "/nonexistent"},
        {"PATH": "{fake}:/usr/bin:/bin"},
        {"PYTHONHOME": "/nonexistent", "PYTHONPATH": "/nonexistent", "PYTHONSTARTUP": "/dev/null"},
        {"LC_ALL": "C", "VIRTUAL_ENV": "/nonexistent"},
    ],
    ids=["no path", "another python first", "python's variables", "C locale"],
)
def test_init_in_any_environment_starts_the_python_of_the_build(env, probe, library, tmp_path):
    """The interpreter is the one that built the library: nothing is searched for."""
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    env = {name: value.format(fake=tmp_path) for name, value in env.items()}

    done = without_environment(probe, library, env=env)

    assert (done.stdout, done.stderr, done.returncode) == (STARTED, "", 0)


def test_init_from_eight_threads_at_once_starts_one_python(probe, library):
    """All wait for the one that starts it; the symbols are local to the library."""
    done = without_environment(probe, library, "threads")

    assert (done.stdout, done.stderr, done.returncode) == (STARTED, "", 0)


def test_init_without_the_python_of_the_build_is_enoent(probe, library, tmp_path):
    """The recorded interpreter is gone: never LUO_ABI, a reason, and calls fail afterwards."""
    broken = tmp_path / "libluo.so"
    wanted = os.fsencode(sys.executable)
    raw = library.read_bytes()
    assert raw.count(wanted + b"\0") == 1
    broken.write_bytes(raw.replace(wanted + b"\0", b"/gone".ljust(len(wanted), b"x") + b"\0"))

    done = without_environment(probe, broken)

    assert done.stdout == f"luo_init {-errno.ENOENT}\n{NOT_STARTED}"
    assert done.stderr.startswith("luo_init: /gonex")
    assert "the Python that libluo.so was built for" in done.stderr


def test_init_of_a_python_that_does_not_start_is_enoexec(probe, library):
    """Not even Python's own start may end the program: there is a number, and a reason."""
    done = without_environment(probe, library, env={"PYTHONMALLOC": "no such thing"})

    assert done.stdout == f"luo_init {-errno.ENOEXEC}\n{NOT_STARTED}"
    assert done.stderr == (
        f"luo_init: {sys.executable} does not start: PYTHONMALLOC: unknown allocator\n"
    )


def test_init_of_a_python_without_luo_is_enoexec(probe, library, tmp_path):
    """An environment that has lost luo starts, and luo_init() says so."""
    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    code = (
        "import sys, types; from pathlib import Path; import luo.embed.build as module\n"
        f"module.sys = types.SimpleNamespace(executable={str(python)!r}, path=[])\n"
        "module.build(Path(sys.argv[1]))"
    )
    done = build(tmp_path / "out", "-c", code)
    assert done.returncode == 0, done.stderr

    done = without_environment(probe, tmp_path / "out" / "libluo.so")

    assert done.stdout == f"luo_init {-errno.ENOEXEC}\n{NOT_STARTED}"
    assert "ModuleNotFoundError: No module named " in done.stderr
    assert done.stderr.endswith(f"luo_init: {python}: luo cannot be imported\n")


def test_init_in_another_python_is_enoexec(probe, library, tmp_path):
    """Of another minor version than the one that built the library: it is not used."""
    other = tmp_path / "libluo.so"
    version = sys.version.split()[0].encode() + b"\0"
    raw = library.read_bytes()
    assert version in raw
    other.write_bytes(raw.replace(version, version.replace(b"3.", b"2.")))

    done = without_environment(probe, other)

    assert done.stdout == f"luo_init {-errno.ENOEXEC}\n{NOT_STARTED}"
    assert done.stderr.startswith(f"luo_init: Python {sys.version.split()[0]} runs here, libluo.so")


JOIN = """
import ctypes, gc, sys
library = ctypes.{how}(sys.argv[1])
library.luo_last_error.restype = ctypes.c_char_p
machine, kernel, first = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int32()
calls = [
    lambda: library.luo_machine_new(ctypes.byref(machine)),
    lambda: library.luo_machine_free(None),
    lambda: library.luo_machine_free(machine),
    lambda: library.luo_machine_free(machine),
]
print(library.luo_init(1), *[call() for call in calls], library.luo_last_error().decode())
import luo.embed.face
assert sys.modules["luo.embed.face"].Face
print(sorted({{type(one).__name__ for one in gc.get_objects()}} & {{"_Machine", "_Kernel"}}))
"""


@pytest.mark.parametrize("how", ["CDLL", "PyDLL"])
@pytest.mark.parametrize("interpreter", ["environment", "base"])
def test_init_in_a_process_that_runs_python_joins_it(interpreter, how, library, tmp_path):
    """With or without its lock, in the environment or outside of it; what is freed is gone."""
    python = sys.executable if interpreter == "environment" else sys._base_executable

    done = without_environment(python, "-c", JOIN.format(how=how), library, cwd=tmp_path)

    expected = f"1 0 {-errno.EINVAL} 0 {-errno.EBADF}"
    assert done.stderr == ""
    assert done.stdout == (
        f"{expected} luo_machine_free: no machine: it was freed, or never was [EBADF]\n[]\n"
    )


def test_build_writes_a_pkg_config_file(library):
    """Header and library are where luo.get_include() and the build say."""
    lines = (library.parent / "luo.pc").read_text().splitlines()

    assert f"includedir={luo.get_include()}" in lines
    assert f"libdir={library.parent}" in lines
    assert "Libs: -L${libdir} -Wl,-rpath,${libdir} -lluo" in lines


@pytest.mark.parametrize(
    ("variable", "value"),
    [("LDLIBRARY", "libpython3.11.a"), ("LIBDIR", "/nonexistent")],
    ids=["static", "gone"],
)
def test_build_without_shared_libpython_says_what_to_install(
    variable, value, monkeypatch, tmp_path
):
    """One clear line, and nothing is written."""
    asked = sysconfig.get_config_var
    monkeypatch.setattr(
        sysconfig, "get_config_var", lambda name: value if name == variable else asked(name)
    )

    with pytest.raises(ValueError, match=r"needs a Python with a shared library .*python3-dev"):
        build_library(tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_build_command_that_cannot_write_is_status_2():
    """The directory cannot be made: one line on standard error."""
    done = build(Path("/proc/nowhere"))

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "/proc/nowhere" in done.stderr


def test_installed_package_has_no_library():
    """Wheels hold none: it links to one libpython, which a wheel may not."""
    names = [path.name for path in Path(luo.__file__).parent.rglob("*.so")]

    assert [name for name in names if "libluo" in name] == []


def test_init_in_two_programs_at_once_starts_both(probe, library):
    """Two programs at once have nothing to do with each other."""
    command = [str(probe), str(library)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={}) for _ in range(2)]

    assert [one.communicate(timeout=60)[0] for one in both] == [STARTED, STARTED]
