"""A benchmark suite of one's own: how long is a kexec with these drivers and devices?

Run it with pytest-benchmark, which reads everything from the names and arguments::

    pytest examples/bench_suite.py --benchmark-columns=min,median,iqr,rounds

Every round jumps on a clone of the same machine: same bytes, same devices, page state of a machine
just switched on. What is not to be timed, booting and PREPARE, is in the setup.
"""

import first_driver
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import luo


def machine(n: int) -> luo.Machine:
    """Make a machine with *n* virtual functions behind one port."""
    hardware = luo.DeviceTree()
    port = hardware.add("pci0000:00")
    hardware.add_many(("vf", 0, n), [port] * n, "pci", "vfio-pci", state=bytes(256))
    return luo.Machine("1GiB", hardware)


@pytest.mark.parametrize("n", [100, 10_000])
def test_kexec(benchmark: BenchmarkFixture, n: int) -> None:
    """From the first REBOOT callback to the last reclaimed device, in one process."""
    original = machine(n)

    def prepared() -> tuple[tuple[luo.Kernel], dict[str, object]]:
        clone = original.clone()
        kernel = first_driver.kernel(clone).boot()
        kernel.devices.request("*/vf*")
        kernel.kexec_load(first_driver.kernel(clone))
        kernel.luo.prepare()
        return (kernel,), {}

    kernel = benchmark.pedantic(luo.Kernel.kexec, setup=prepared, rounds=10)

    assert kernel.luo.state is luo.State.UPDATED
    assert kernel.devices.reclaimed.sum() == n + 1  # and the port
