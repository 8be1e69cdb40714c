"""Extensions, directives and LUO_* build switches; everything else is in pyproject.toml."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup


def switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise SystemExit(f"{name}={value}: 0 or 1")
    return value == "1"


DEBUG, COVERAGE = switch("LUO_DEBUG"), switch("LUO_COVERAGE")
SANITIZE, ANNOTATE = switch("LUO_SANITIZE"), switch("LUO_ANNOTATE")
print(f"luo: LUO_DEBUG={DEBUG:d} LUO_COVERAGE={COVERAGE:d} LUO_SANITIZE={SANITIZE:d}")

# setuptools and Cython look at dates only, so each flavour keeps what it made to itself.
SWITCHES = {"debug": DEBUG, "sanitize": SANITIZE, "coverage": COVERAGE}
FLAVOUR = "-".join(name for name, on in SWITCHES.items() if on) or "release"
BASE = f"build/{FLAVOUR}"

DIRECTIVES = {
    "language_level": 3,
    "binding": True,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": not DEBUG,
    "initializedcheck": DEBUG,
    "overflowcheck": False,  # hashes and bit tricks wrap on purpose
    "autotestdict": False,
    "linetrace": COVERAGE,
}

flags = ["-O0", "-g"] if DEBUG else ["-O3"]
macros = [("CYTHON_TRACE_NOGIL", "1")] if COVERAGE else []
if DEBUG or SANITIZE:  # counts allocations, and can fail them
    macros.append(("LUO_DEBUG", "1"))
sources = ["luo/_kho.pyx"]
if SANITIZE:
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += ["-fno-omit-frame-pointer", "-fsanitize-coverage=trace-pc,trace-cmp"]
    sources.append("fuzz/coverage.c")

kho = Extension(
    "luo._kho",
    sources,
    depends=[*map(str, Path("luo/core").glob("*.pxi")), "luo/_kho.pxd", "luo/include/luo.h"],
    include_dirs=["luo/include"],
    define_macros=macros,
    extra_compile_args=[*flags, "-Wno-unreachable-code"],
    extra_link_args=["-fsanitize=address,undefined"] if SANITIZE else [],
)

setup(
    options={"build": {"build_base": BASE}},
    ext_modules=cythonize(
        [kho],
        compiler_directives=DIRECTIVES,
        annotate=ANNOTATE,
        # coverage.py finds the C file only beside its source
        build_dir=None if COVERAGE else f"{BASE}/c",
    ),
)
