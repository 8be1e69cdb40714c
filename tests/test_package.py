"""What is installed: where it lies, what it exports, what it says when it has not been built."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import luo

ROOT = Path(__file__).resolve().parents[1]
MADE = ("luo/_kho", "benches/results")  # what a build or a run makes

installed_only = pytest.mark.skipif(
    os.environ.get("LUO_TEST_INSTALLED") != "1",
    reason="not run by 'make test', which tests the installed package",
)


@installed_only
def test_import_from_the_tests_finds_the_installed_package():
    """The source tree is not what is tested."""
    where = Path(luo.__file__).resolve()

    assert ROOT / "luo" not in where.parents
    assert "site-packages" in where.parts


@installed_only
def test_installed_package_has_types_presets_and_no_c_file():
    """Stub, header and presets are shipped; fragments and generated C are not."""
    names = {path.name for path in Path(luo.__file__).parent.rglob("*")}

    assert {"_kho.pyi", "_kho.pxd", "py.typed", "cloud.toml", "page.html"} <= names
    assert not [name for name in names if name.endswith((".c", ".pxi"))]


@installed_only
def test_version_is_the_distribution_s():
    """``__version__`` is looked up in the metadata of luo-kho."""
    assert luo.__version__ == metadata.version("luo-kho")


def test_all_is_sorted_unique_and_everything_public():
    """``__all__`` has each public name that the package itself binds, once."""
    submodules = {path.stem for path in Path(luo.__file__).parent.iterdir()}
    # "@": pytest's, which rewrites what comes with a plugin of its
    public = {name for name in vars(luo) if not name.startswith(("_", "@"))} - submodules

    assert sorted(public - {"Any", "version"}) == list(luo.__all__)


def test_all_of_each_module_names_what_is_there():
    """Every ``__all__`` in the package can be imported."""
    for path in Path(luo.__file__).parent.rglob("*.py"):
        if path.name == "__main__.py":
            continue
        parts = path.relative_to(Path(luo.__file__).parent).with_suffix("").parts
        try:
            module = importlib.import_module(".".join(("luo", *parts)).removesuffix(".__init__"))
        except (ImportError, OSError):
            assert path.name == "fuse.py"  # needs an extra and libfuse
            continue
        missing = [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]

        assert missing == [], module.__name__


def test_unknown_attribute_is_attribute_error():
    """The lazy version does not swallow misspelled names."""
    with pytest.raises(AttributeError, match="no attribute 'Kernels'"):
        _ = luo.Kernels


def test_import_without_the_core_names_the_build_command(tmp_path):
    """A source tree that was not built says so, and how to build it."""
    shutil.copytree(ROOT / "luo", tmp_path / "luo", ignore=shutil.ignore_patterns("*.so", "*.c"))

    done = subprocess.run(
        [sys.executable, "-c", "import luo"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        text=True,
        capture_output=True,
    )

    assert done.returncode == 1
    assert "ImportError: the compiled core of luo is missing" in done.stderr
    assert "make build" in done.stderr


def test_import_loads_no_screen_and_no_metadata():
    """Importing the library is quick: what only the command or a report needs comes later."""
    code = "import sys, luo; print(*sorted(set(sys.modules) & set(sys.argv[1:])))"
    late = ["click", "rich", "importlib.metadata", "luo.cli", "luo.topology", "luo.drivers"]

    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *late],
        cwd=os.environ.get("TMPDIR", "/tmp"),
        env=os.environ | {"PYTHONPATH": str(Path(luo.__file__).parents[1])},
        text=True,
        capture_output=True,
        check=True,
    )

    assert done.stdout.split() == []


@installed_only
def test_second_process_started_in_the_source_tree_uses_the_installed_package():
    """The directory that one happens to be in is not on the successor's path."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "luo", "run", "--preset", "cloud", "--devices", "50",
         "--json", "-"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert '"successor": "process"' in done.stdout


def test_distribution_names_its_licence_and_needs():
    """Licence text, Python and base dependencies are as documented."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert project["requires-python"] == ">=3.11"
    needs = {need.split(">")[0] for need in project["dependencies"]}
    assert needs == {"cffi", "click", "numpy", "rich", "typing_extensions"}


def test_documents_name_files_that_are_there():
    """Every relative link, and every path under the project's directories, exists."""
    for document in [*ROOT.glob("*.md"), *ROOT.glob("benches/*.md"), *ROOT.glob("docs/**/*.md")]:
        text = document.read_text()
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        paths = re.findall(r"`((?:luo|tests|benches|examples|docs)/[\w./*]+)`", text)
        paths = [path for path in paths if not path.startswith(MADE)]
        missing = [link for link in links if not (document.parent / link).exists()]
        missing += [path for path in paths if not any(ROOT.glob(path))]

        assert missing == [], document.name
