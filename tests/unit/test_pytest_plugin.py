"""The fixture ``luo_live_update``, in a suite of somebody else's."""

from pathlib import Path

import pytest

import luo

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def under_test(monkeypatch):
    """What the suite imports is the package that is tested."""
    monkeypatch.setenv("PYTHONPATH", str(Path(luo.__file__).parents[1]))


SUITE = """
    import errno
    import pytest
    import luo
    from luo import workloads

    @pytest.fixture(scope="session")
    def kernel():
        with workloads.load({host!r}, devices=50, seed=1, drivers=DRIVERS) as kernel:
            yield kernel

    DRIVERS = []
"""


@pytest.fixture
def suite(pytester):
    """Run pytest, with the plugin as its entry point loads it, on tests of that kernel."""
    host = pytester.path / "small.toml"
    host.write_text('memory = "256MiB"\n[devices]\nsource = "synthetic"\ncount = 60\n')
    pytester.makeini("[pytest]\naddopts = -p pytest_luo -p no:cacheprovider\nfilterwarnings=error")

    def run(tests, *arguments):
        pytester.makepyfile(SUITE.format(host=str(host)) + tests)
        return pytester.runpytest_subprocess("-q", *arguments)

    return run


def test_budgets_that_hold_pass(suite):
    """Each update is a clone's: the kernel can be updated again, and again by other tests."""
    done = suite("""
    def test_one(luo_live_update, kernel):
        report = luo_live_update(kernel, repeat=3)
        report.check({"blackout": "60s", "prepare": "60s", "devices/PREPARE": "60s"})
        assert len(report.runs) == 3
        assert report.devices["reclaimed"] == report.devices["preserved"] > 10
        assert kernel.luo.state is luo.State.NORMAL

    def test_two(luo_live_update, kernel):
        assert len(luo_live_update(kernel).runs) == 1
    """)

    done.assert_outcomes(passed=2)


def test_budget_that_does_not_hold_fails_and_says_why(suite):
    """The name, the figure, the budget and the dearest callbacks are in pytest's own output."""
    done = suite("""
    def test_one(luo_live_update, kernel):
        luo_live_update(kernel).check({"blackout": "1ns", "finish": "60s"})
    """)

    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "*BudgetError: over budget, by the 95th percentile of 1:",
            "*blackout: *ms, the budget is 0.000 ms",
            "*/RESTORE: *ms",
        ]
    )
    done.stdout.no_fnmatch_line("*finish:*")


def test_luo_repeat_says_how_many_updates(suite):
    """For those that do not say so themselves."""
    done = suite(
        """
    def test_one(luo_live_update, kernel):
        assert len(luo_live_update(kernel).runs) == 4
        assert len(luo_live_update(kernel, repeat=2).runs) == 2
    """,
        "--luo-repeat=4",
    )

    done.assert_outcomes(passed=1)


def test_update_that_loses_something_fails_the_test(suite):
    """A figure of an update that failed is none, even if nothing was raised."""
    done = suite("""
    def late(context):
        raise OSError(errno.EBUSY, "still busy")

    DRIVERS.append(luo.Subsystem("late", finish=late))

    def test_one(luo_live_update, kernel):
        luo_live_update(kernel)
        raise AssertionError("not reached")
    """)

    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*live update: FINISH*late*still busy*"])
    done.stdout.no_fnmatch_line("*not reached*")


def test_kernels_of_a_test_end_with_it(suite):
    """The kernel of the report runs until then; also in another process."""
    done = suite("""
    seen = []

    def test_one(luo_live_update, kernel):
        image = luo.KernelImage("luo.drivers:kernel")
        for next, options in ((None, {}), (image, {"in_process": True, "repeat": 2}), (image, {})):
            report = luo_live_update(kernel if next is None else kernel.clone(), next, **options)
            assert report.kernel.luo.state is luo.State.NORMAL
            seen.append(report.kernel)

    def test_two():
        assert len(seen) == 3
        for kernel in seen:
            with pytest.raises(luo.StateError) as gone:
                kernel.luo.prepare()
            assert gone.value.errno == errno.ESHUTDOWN
    """)

    done.assert_outcomes(passed=2)


def test_repeat_of_nothing_is_value_error(suite):
    """At least one update."""
    done = suite("""
    def test_one(luo_live_update, kernel):
        with pytest.raises(ValueError, match="at least 1"):
            luo_live_update(kernel, repeat=0)
    """)

    done.assert_outcomes(passed=1)


def test_plugin_does_not_import_the_package(pytester):
    """Who does not ask for the fixture does not wait for it."""
    pytester.makepyfile("""
    import sys

    def test_one():
        assert "pytest_luo" in sys.modules
        assert not {"luo", "numpy"} & set(sys.modules)
    """)
    done = pytester.runpytest_subprocess(
        "-p", "pytest_luo", "-p", "no:hypothesispytest", "-p", "no:benchmark"
    )

    done.assert_outcomes(passed=1)
