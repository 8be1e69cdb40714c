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
if SANITIZE:
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

kho = Extension(
    "luo._kho",
    ["luo/_kho.pyx"],
    depends=[*map(str, Path("luo/core").glob("*.pxi")), "luo/_kho.pxd"],
    define_macros=macros,
    extra_compile_args=[*flags, "-Wno-unreachable-code"],
    extra_link_args=["-fsanitize=address,undefined"] if SANITIZE else [],
)

setup(ext_modules=cythonize([kho], compiler_directives=DIRECTIVES, annotate=ANNOTATE))
