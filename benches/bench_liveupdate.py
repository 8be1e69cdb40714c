"""What a live update costs, phase by phase: PREPARE, REBOOT, boot, restore, FINISH.

Parameters: ``n`` devices of a synthetic host, and ``kind``, how the drivers' callbacks are called:
``batch``, once for a run of devices, or ``device``, a Python call for each. Both do the same work:
save 256 bytes, patch 8 of them in REBOOT, compare and reclaim, and say good-bye in FINISH.

Old and new kernel are in this process. Each round works on a fresh clone of the same machine, and
``kexec_load`` has touched the memory that PREPARE will write, so no timed phase meets it first.
"""

import errno
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import luo
from luo.topology import synthetic

SEED = 1
ABI = "kho-v4"
ROUNDS = {1_000: 30, 10_000: 15, 100_000: 5}
STATE = bytes(range(256))
PATCH = b"rebooted"
EXPECTED = PATCH + STATE[len(PATCH) :]
SAVED_ROW, PATCH_ROW, ROW = (np.frombuffer(b, np.uint8) for b in (STATE, PATCH, EXPECTED))


# ---- the same work, once a device and once for many ----


def save(dev: luo.Device) -> None:
    dev.slot[:] = STATE


def patch(dev: luo.Device) -> None:
    dev.slot[: len(PATCH)] = PATCH


def restore(dev: luo.Device) -> int:
    if dev.slot != EXPECTED:
        return -errno.EIO
    dev.reclaim()
    return 0


def farewell(dev: luo.Device) -> None:
    pass


@luo.batch
def save_all(devices: luo.DeviceBatch) -> None:
    devices.slots[:] = SAVED_ROW


@luo.batch
def patch_all(devices: luo.DeviceBatch) -> None:
    devices.slots[:, : len(PATCH)] = PATCH_ROW


@luo.batch
def restore_all(devices: luo.DeviceBatch) -> None:
    devices.reclaim((devices.slots == ROW).all(axis=1))


@luo.batch
def farewell_all(devices: luo.DeviceBatch) -> None:
    pass


OPS = {
    "device": luo.LiveUpdateOps(save, patch, farewell, restore=restore, state_size=len(STATE)),
    "batch": luo.LiveUpdateOps(
        save_all, patch_all, farewell_all, restore=restore_all, state_size=len(STATE)
    ),
}


# ---- the machine, and how far an update has come when the clock starts ----


class Stage:
    """Kernels of one kind on clones of one machine, brought to the beginning of a phase."""

    def __init__(self, n: int, kind: str) -> None:
        self.original = luo.Machine("16GiB", synthetic.generate(n, SEED))
        self.ops = OPS[kind]
        tree = self.original.devices
        owned = (tree.driver_ids >= 0) & (tree.bus_ids >= 0)
        self.requested = owned
        self.order = tree.preserve_order(owned)
        self.driven = int((tree.driver_ids[self.order] >= 0).sum())
        self.rounds = ROUNDS[n]
        self.kernel: luo.Kernel | None = None

    def build(self, machine: luo.Machine) -> luo.Kernel:
        """Build a kernel, not booted."""
        tree = machine.devices
        return luo.Kernel(
            machine,
            drivers=[luo.Driver(name, self.ops) for name in tree.driver_names],
            buses=[luo.Bus(name, luo.LiveUpdateOps()) for name in tree.bus_names],
        )

    def loaded(self) -> luo.Kernel:
        """Return a kernel before PREPARE, with its successor loaded and memory touched."""
        self.close()
        machine = self.original.clone()
        kernel = self.build(machine).boot()
        kernel.devices.request(self.requested)
        kernel.kexec_load(self.build(machine))
        self.kernel = kernel
        return kernel

    def prepared(self) -> luo.Kernel:
        """Return a kernel before REBOOT."""
        kernel = self.loaded()
        kernel.luo.prepare()
        return kernel

    def updated(self) -> luo.Kernel:
        """Return a kernel before FINISH."""
        self.kernel = self.prepared().kexec()
        return self.kernel

    def close(self) -> None:
        """Drop the kernel of the round before, and its machine's memory."""
        if self.kernel is not None:
            self.kernel.close()
            self.kernel = None


class PhaseClock:
    """Seconds as the engine reports them, for two phases that one call runs in a row."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


BOOT_CLOCK, RESTORE_CLOCK = PhaseClock(), PhaseClock()


@pytest.fixture(
    params=[(n, kind) for n in ROUNDS for kind in OPS],
    ids=[f"{n // 1000}k-{kind}" for n in ROUNDS for kind in OPS],
)
def stage(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Any:
    n, kind = request.param
    stage = Stage(n, kind)
    benchmark.extra_info.update(
        impl="luo",
        impl_version=luo.__version__,
        kind=kind,
        devices=n,
        work=len(stage.order),
        unit="preserved device",
        bytes=stage.driven * len(STATE),
        seed=SEED,
        abi=ABI,
    )
    yield stage
    stage.close()


def run(
    benchmark: BenchmarkFixture, stage: Stage, setup: Callable[[], luo.Kernel], target: Any
) -> Any:
    """Time *target* on what *setup* returns, fresh each round."""
    return benchmark.pedantic(target, setup=lambda: ((setup(),), {}), rounds=stage.rounds)


# ---- the phases ----


@pytest.mark.benchmark(group="liveupdate.prepare")
def bench_liveupdate_prepare(benchmark: BenchmarkFixture, stage: Stage) -> None:
    """Order the devices, allocate slots, write records, call PREPARE callbacks."""
    run(benchmark, stage, stage.loaded, lambda kernel: kernel.luo.prepare())

    assert stage.kernel.luo.state is luo.State.PREPARED
    assert int(stage.kernel.devices.preserved.sum()) == len(stage.order)
    assert bytes(stage.kernel.devices[int(stage.order[0])].slot) == STATE


@pytest.mark.benchmark(group="liveupdate.reboot")
def bench_liveupdate_reboot(benchmark: BenchmarkFixture, stage: Stage) -> None:
    """Call REBOOT callbacks, publish LUO's node."""
    run(benchmark, stage, stage.prepared, lambda kernel: kernel.luo.reboot())

    assert bytes(stage.kernel.devices[int(stage.order[0])].slot) == EXPECTED


def jump(stage: Stage, phase: str, clock: PhaseClock) -> Callable[[luo.Kernel], None]:
    """Return what jumps, and advances *clock* by what *phase* took in the new kernel."""

    def target(kernel: luo.Kernel) -> None:
        stage.kernel = kernel.kexec()
        clock.now += stage.kernel.phases[phase] / 1e9

    return target


@pytest.mark.benchmark(group="liveupdate.boot", timer=BOOT_CLOCK)
def bench_liveupdate_boot(benchmark: BenchmarkFixture, stage: Stage) -> None:
    """Install the page state that validating built, make an outgoing side; engine's own clock."""
    run(benchmark, stage, stage.prepared, jump(stage, "boot", BOOT_CLOCK))

    assert stage.kernel.luo.state is luo.State.UPDATED


@pytest.mark.benchmark(group="liveupdate.restore", timer=RESTORE_CLOCK)
def bench_liveupdate_restore(benchmark: BenchmarkFixture, stage: Stage) -> None:
    """Adopt the records, call restore callbacks, reclaim; engine's own clock."""
    run(benchmark, stage, stage.prepared, jump(stage, "restore", RESTORE_CLOCK))

    assert int(stage.kernel.devices.reclaimed.sum()) == len(stage.order)
    assert not stage.kernel.restore_failures


@pytest.mark.benchmark(group="liveupdate.finish")
def bench_liveupdate_finish(benchmark: BenchmarkFixture, stage: Stage) -> None:
    """Call FINISH callbacks, free slots and records, reset the flags."""
    finished = run(benchmark, stage, stage.updated, lambda kernel: kernel.luo.finish())

    assert finished == luo.FinishResult((), ())
    assert stage.kernel.luo.state is luo.State.NORMAL
    assert not stage.kernel.devices.preserved.any()
