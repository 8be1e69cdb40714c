"""A benchmark suite of one's own: how long is a kexec with these drivers and devices?

Run it with pytest-benchmark, which reads everything from the names and arguments::

    pytest examples/bench_suite.py --benchmark-columns=min,median,iqr,rounds

The hosts are luo's own: :func:`luo.workloads.load` boots a kernel that is ready for a live update,
and every round updates a clone of it, on a machine of its own with the same devices. What is not to
be timed, booting and PREPARE, is in the setup. The last test is a gate, and needs no
pytest-benchmark.
"""

import first_driver
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import luo
import pytest_luo
from luo import workloads

DRIVERS = [first_driver.nvme, first_driver.vfio]


@pytest.mark.parametrize("n", [100, 10_000])
def test_kexec(benchmark: BenchmarkFixture, n: int) -> None:
    """From the first REBOOT callback to the last reclaimed device, in one process."""
    with workloads.load("stress", devices=n, seed=1, drivers=DRIVERS) as original:
        preserved = []

        def prepared() -> tuple[tuple[luo.Kernel], dict[str, object]]:
            kernel = original.clone()
            kernel.luo.prepare()
            preserved.append(int(kernel.devices.preserved.sum()))
            return (kernel,), {}

        kernel = benchmark.pedantic(luo.Kernel.kexec, setup=prepared, rounds=10)

        assert kernel.luo.state is luo.State.UPDATED
        assert kernel.devices.reclaimed.sum() == preserved[-1] > n // 2
        kernel.close()


def test_budget(luo_live_update: pytest_luo.LiveUpdate) -> None:
    """A gate: pytest examples/bench_suite.py -k budget --luo-repeat 20."""
    with workloads.load("cloud", devices=1000, seed=1, drivers=DRIVERS) as kernel:
        report = luo_live_update(kernel)
    report.check({"blackout": "2s", "prepare": "5s", "devices/vfio-pci/RESTORE": "200ms"})
