"""Building ``libluo.so``: cffi's embedding mode, with a start that is our own.

The library starts the interpreter that built it, by the path that is written into it: a virtual
environment is found by that, whatever PATH says. Programs call functions in C that pass their
arguments on to :mod:`luo.embed.face`, and fail while there is no Python.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import cffi

import luo
from luo.report import version

__all__ = ["build", "declarations"]

_HERE: Final = Path(__file__).parent

#: What luo_embed.h needs of luo.h, and start.h offers to the face.
_TYPES: Final = """
struct luo_device;
typedef int (*luo_callback)(struct luo_device *dev, void *ctx);
"""
_HELPERS: Final = """
char *luo_text_buffer(void);
int64_t luo_measure(const char *const *strings, int32_t count, uint64_t *offsets);
void luo_join(const char *const *strings, int32_t count, const uint64_t *offsets, char *data);
void *luo_reserve(uint64_t nbytes);
int luo_map(void *place, uint64_t nbytes, int fd, uint64_t offset);
void luo_unmap(void *place, uint64_t nbytes);
"""

#: Run when Python has started. A Python that was running already may not have luo on its path.
_INIT: Final = """
import sys
try:
    import luo
except ImportError:
    sys.path += [path for path in {path!r} if path not in sys.path]
from _luo_embedded import ffi, lib
from luo.embed.face import install
install(ffi, lib)
"""

_PKG_CONFIG: Final = """\
libdir={libdir}
includedir={includedir}

Name: luo
Description: Linux Live Update Orchestrator and Kexec HandOver as a user-space engine
Version: {version}
Cflags: -I${{includedir}}
Libs: -L${{libdir}} -Wl,-rpath,${{libdir}} -lluo
"""

_FUNCTION: Final = re.compile(r"^int (luo_\w+)\(([^()]*)\);", re.MULTILINE)


def declarations() -> str:
    """Return luo_embed.h as cffi's parser takes it: without what Python does not implement."""
    text = Path(luo.get_include(), "luo_embed.h").read_text()
    text = text.replace("const char *luo_last_error(void);", "")
    return text.replace("int luo_init(int abi);", "")


def functions() -> Iterator[tuple[str, str, str]]:
    """Yield name, parameters and names of the parameters of what Python implements."""
    for name, parameters in _FUNCTION.findall(declarations()):
        named = [re.split(r"[\s*]", one)[-1] for one in parameters.split(",")]
        yield name, " ".join(parameters.split()), ", ".join(named)


def _sources() -> tuple[str, str]:
    """Return what cffi parses, and the C in front of its own."""
    types = _FUNCTION.sub("", declarations())
    externs = [f'extern "Python" int py_{name}({given});' for name, given, _ in functions()]
    passing = [
        f"static int py_{name}({given});\n"
        f"LUO_PUBLIC int {name}({given})\n"
        f"{{ return luo_started ? py_{name}({named}) : luo_not_started(); }}"
        for name, given, named in functions()
    ]
    # A path is no string of C until it is quoted, and JSON's quotes are C's for ASCII.
    start = f"#define LUO_PYTHON {json.dumps(sys.executable)}\n{(_HERE / 'start.h').read_text()}"
    return "\n".join([_TYPES, types, _HELPERS, *externs]), "\n".join([start, *passing])


def _libpython() -> str:
    """Return the directory of the shared libpython.

    Raises:
        ValueError: this Python has none, or not its headers.
    """
    directory = sysconfig.get_config_var("LIBDIR") or ""
    library = sysconfig.get_config_var("LDLIBRARY") or ""
    header = Path(sysconfig.get_path("include"), "Python.h")
    for needed in (Path(directory, library), header):
        if needed.suffix == ".a" or not needed.exists():
            raise ValueError(
                f"{sys.executable}: libluo.so needs a Python with a shared library and headers,"
                f" {needed} is not there (Debian: python3-dev; pyenv: --enable-shared)"
            )
    return str(directory)


def build(directory: Path) -> Path:
    """Build ``libluo.so`` and ``luo.pc`` in *directory*, which is made if need be.

    Returns:
        the library's path.

    Raises:
        ValueError: this Python has no shared library or no headers, or the compiler failed.
        OSError: the directory cannot be written.
    """
    libdir = _libpython()
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    declared, preamble = _sources()
    builder = cffi.FFI()
    builder.embedding_api("")
    builder.cdef(declared)
    builder.embedding_init_code(_INIT.format(path=[path for path in sys.path if path]))
    builder.set_source(
        "_luo_embedded",
        preamble,
        include_dirs=[luo.get_include()],
        library_dirs=[libdir],
        runtime_library_dirs=[libdir],
        extra_compile_args=["-O2", "-fvisibility=hidden", "-Wno-unused-function"],
        extra_link_args=["-Wl,-soname,libluo.so"],
    )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            made = builder.compile(scratch, target="libluo.*")
        except cffi.VerificationError as error:
            raise ValueError(f"libluo.so: {error}") from error
        target = directory / "libluo.so"
        target.unlink(missing_ok=True)  # a program may have the old one mapped
        shutil.copy(made, target)
    (directory / "luo.pc").write_text(
        _PKG_CONFIG.format(libdir=directory, includedir=luo.get_include(), version=version())
    )
    return target
