"""Two designs of LUO on the same devices: RFC v1's notifiers, and mainline's sessions and files.

The same host, drivers and callbacks, and every update checked. By notifiers the engine walks over
all devices in one call; by files each device is one PRESERVE_FD and one RETRIEVE_FD, made by an
agent, which is timed with them. Callbacks for many devices at once are there by notifiers only.
"steps" are notifiers with callbacks in Python, and a call of the engine for each, as for a file.
"""

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import hosts
import peers
import pytest
from conftest import Plan
from race import Results, timed

import luo
from luo import workloads

entries = pytest.mark.entries

SIZES: dict[str, list[tuple[int, str]]] = {
    "smoke": [(200, "generated")],
    "quick": [(1_000, "generated"), (10_000, "generated"), (3_000, "cloud")],
    "full": [
        *((n, "generated") for n in (1_000, 10_000, 100_000)),
        (3_000, "cloud"),
        (20_000, "dense"),
    ],
}
CONTENDERS = [
    "luo notifiers batch",
    "luo notifiers native",
    "luo notifiers python",
    "luo notifiers steps",
    "luo files native",
    "luo files python",
]
#: Of more devices than so many there are so many rounds: files take seconds then.
MANY, MOST_ROUNDS = 12_000, 3
APIS = {"notifiers": "rfc1", "files": "sessions"}
PHASES = ("prepare", "reboot", "jump", "boot", "restore", "finish")


@entries("api.prepare", CONTENDERS, **SIZES)
def bench_api_prepare(replay: Callable[..., None], size: tuple[int, str]) -> None:
    """Save the state of every device, and everything that says where it is."""
    replay(both, *size)


@entries("api.reboot", CONTENDERS, **SIZES)
def bench_api_reboot(replay: Callable[..., None], size: tuple[int, str]) -> None:
    """What is done in blackout before the jump."""
    replay(both, *size)


@entries("api.restore", CONTENDERS, **SIZES)
def bench_api_restore(replay: Callable[..., None], size: tuple[int, str]) -> None:
    """Jump, boot and restore, or retrieve, until everything is back."""
    replay(both, *size)


@entries("api.finish", CONTENDERS, **SIZES)
def bench_api_finish(replay: Callable[..., None], size: tuple[int, str]) -> None:
    """Free what was handed over."""
    replay(both, *size)


@entries("api.blackout", CONTENDERS, **SIZES)
def bench_api_blackout(replay: Callable[..., None], size: tuple[int, str]) -> None:
    """From the first REBOOT callback or freeze to the last device that runs."""
    replay(both, *size)


# ---- hosts ----


class Generated:
    """The host of the other benchmarks: n devices, and nothing else."""

    ram = 0

    def __init__(self, n: int) -> None:
        self._host = hosts.Host(n)
        self.count = len(self._host.order)

    def loaded(self, kind: str, api: str) -> luo.Kernel:
        """Return a kernel before PREPARE."""
        return self._host.loaded(kind, api=api)


class Preset:
    """A ready-made host: virtual machines with their RAM, their devices, IOMMU and interrupts."""

    def __init__(self, name: str) -> None:
        self._host = workloads.host(name)
        self._touched: dict[str, luo.Kernel] = {}  # by design
        self.ram = sum(vm.ram_bytes for vm in self._host.vms)
        self.count = 0

    def loaded(self, kind: str, api: str) -> luo.Kernel:
        """Return a kernel before PREPARE, its successor loaded and memory touched."""
        if api not in self._touched:
            self._touched[api] = workloads.load(self._host, api=api, successor=None)
        touched = self._touched[api]
        requested = touched.devices.requested
        self.count = len(self._host.devices.preserve_order(requested))
        drivers = hosts.drivers(self._host.devices, kind)
        image = workloads.image_of(self._host, api=api, modules=drivers)
        machine = touched.machine.clone()
        kernel = workloads.first_kernel(self._host, image, machine).boot()
        kernel.devices.request(requested)
        kernel.kexec_load(image.build(machine))
        return kernel

    def close(self) -> None:
        """Let the machines go."""
        for kernel in self._touched.values():
            kernel.close()


# ---- updates ----


def update(host: Generated | Preset, kind: str, api: str) -> dict[str, Any]:
    """Update a host; return seconds by phase, and what was handed over."""
    gc.collect()  # machines of 16 TiB each, of which the address space has eight
    if kind == "steps":
        return stepwise(host.loaded("python", api), host.count)
    kernel = host.loaded(kind, api)
    front: Any = kernel.luo if kernel.agent is None else kernel.agent
    took: dict[str, Any] = {}
    took["prepare"], _ = timed(front.prepare)
    took["sessions"] = len(kernel.liveupdate.outgoing)
    jumping: Any = kernel if kernel.agent is None else kernel.agent
    _, running = timed(jumping.kexec)
    if running.agent is not None:
        timed(running.agent.retrieve)
    arrival = running.arrival
    assert arrival.result["failures"] == []
    assert arrival.result["reclaimed"] == arrival.departure.preserved == host.count
    took |= {name: arrival.phases[name] / 1e9 for name in (*PHASES[1:5], "blackout")}
    took["image"] = arrival.departure.image
    front = running.luo if running.agent is None else running.agent
    took["finish"], finished = timed(front.finish)
    assert finished == luo.FinishResult((), ())
    running.close()
    return took


def stepwise(kernel: luo.Kernel, count: int) -> dict[str, Any]:
    """Update by notifiers, one callback at a time; as :func:`update`."""
    took: dict[str, Any] = {"sessions": 0}
    took["prepare"], _ = timed(run_steps, kernel.luo.steps(luo.Event.PREPARE))
    _, running = timed(run_steps, kernel.kexec_steps())
    arrival = running.arrival
    assert arrival.result["failures"] == []
    assert arrival.result["reclaimed"] == arrival.departure.preserved == count
    took |= {name: arrival.phases[name] / 1e9 for name in (*PHASES[1:5], "blackout")}
    took["image"] = arrival.departure.image
    took["finish"], _ = timed(run_steps, running.luo.steps(luo.Event.FINISH))
    assert running.luo.state is luo.State.NORMAL
    running.close()
    return took


def run_steps(steps: Any) -> Any:
    """Run all steps; return what their generator returns."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        step.run()


def both(plan: Plan, n: int, shape: str) -> dict[str, Results]:
    """Updates of one host by both designs, in turn; by row."""
    host: Generated | Preset = Generated(n) if shape == "generated" else Preset(shape)
    absent: dict[str, str] = {}
    try:
        hosts.callbacks("native")
    except peers.AbsentError as error:
        absent = {name: str(error) for name in CONTENDERS if name.endswith("native")}
    runs = {}
    for name in CONTENDERS:
        _, design, kind = name.split()
        if name not in absent:
            runs[name] = partial(update, host, kind, APIS[design])
    took: dict[str, list[dict[str, Any]]] = {}
    for name, run in runs.items():
        run()  # checks, and touches what is touched once
        took[name] = []
    own = {}
    for number in plan.rounds(60.0):
        if number >= MOST_ROUNDS and host.count > MANY:
            break
        for name, run in runs.items():
            took[name].append(run())
    for name, each in took.items():
        if each:
            image = each[-1]["image"]
            own[name] = {
                "phases": {
                    phase: statistics.median(one[phase] for one in each)
                    for phase in (*PHASES, "blackout")
                },
                "sessions": each[-1]["sessions"],
                "records": image["device_tree_bytes"],
                "map": image["map_bytes"],
                "pages": image["preserved_pages"] - host.ram // 4096,
            }
    info = {"items": host.count, "bytes": host.count * len(hosts.STATE), "shape": shape}
    info |= {"abi": "kho-v4", "seed": hosts.SEED}
    if isinstance(host, Preset):
        host.close()

    def row(*phases: str, with_own: bool = False) -> Results:
        return Results(
            {name: [sum(one[p] for p in phases) for one in each] for name, each in took.items()},
            info,
            own if with_own else {},
            absent,
        )

    return {
        "api.prepare": row("prepare", with_own=True),
        "api.reboot": row("reboot"),
        "api.restore": row("jump", "boot", "restore"),
        "api.finish": row("finish"),
        "api.blackout": row("blackout"),
    }
