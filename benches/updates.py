"""Whole live updates in turn: each kind of callbacks, one and two processes, and the peers.

One round is an update of each kind on a clone of the same host, so that every row that is about
phases comes from the same updates. PREPARE and FINISH are wall time around the call; REBOOT, jump,
boot and restore are one call, and what the engine says of each. Every update is checked.
"""

import statistics
from functools import partial
from typing import Any

import hosts
import peers
from conftest import Plan
from race import Results, timed

import luo

KINDS = ("batch", "native", "python")
PHASES = ("prepare", "reboot", "jump", "boot", "restore", "finish")
#: More devices are restored in batches where they are saved one by one.
ONE_BY_ONE_MOST = 100_000
#: What the new kernel does until devices run again; the jump is where it reads the records.
ARRIVING = ("jump", "boot", "restore")


class Updates:
    """Updates of one host."""

    def __init__(self, n: int) -> None:
        self.host = hosts.Host(n)
        self.absent: dict[str, str] = {}
        try:
            hosts.callbacks("native")
        except peers.AbsentError as error:
            self.absent["native"] = str(error)
        self.kinds = [kind for kind in KINDS if kind not in self.absent]
        self.one_by_one = n <= ONE_BY_ONE_MOST
        self.image: dict[str, int] = {}

    def run(self, kind: str, processes: int = 1) -> dict[str, float]:
        """Update a clone; returns seconds by phase, and of the bare loops that go with it."""
        host, took = self.host, {}
        mixed = kind == "python" and not self.one_by_one
        kernel = host.loaded(f"{kind}, batch restore" if mixed else kind, processes)
        took["prepare"], _ = timed(kernel.luo.prepare)
        host.check_saved(kernel)
        if kind == "python":
            every, share = (
                [luo.Device(kernel.devices, int(index)) for index in which]
                for which in (host.driven, sorted(host.patched))
            )
            took["save loop"], _ = timed(bare_loop, every, hosts.save)
            took["patch loop"], _ = timed(bare_loop, share, hosts.patch)
            del every, share
        _, running = timed(kernel.kexec)
        host.check_restored(running)
        arrival = running.arrival
        took |= {name: arrival.phases[name] / 1e9 for name in PHASES[1:5]}
        self.image = arrival.departure.image
        took["finish"], finished = timed(running.luo.finish)
        assert finished == luo.FinishResult((), ())
        assert running.luo.state is luo.State.NORMAL
        running.close()
        return took


def bare_loop(devices: list[luo.Device], callback: Any) -> None:
    """Call a callback for each device, and nothing else."""
    for dev in devices:
        callback(dev)


class LibFdtRecords:
    """libfdt in C, which writes the records that PREPARE of this host writes."""

    def __init__(self, updates: Updates) -> None:
        self.libfdt = peers.find("libfdt")
        kernel = updates.host.loaded("batch")
        kernel.luo.prepare()
        kernel.luo.reboot()
        self.columns, self.nbytes = hosts.records(kernel)
        kernel.close()
        assert len(self.columns) == len(updates.host.order)
        self.into = peers.touched(self.nbytes + (1 << 20))
        nbytes = self.write()
        found = hosts.columns_of([luo.Fdt(self.into[:nbytes]).read_nodes("/")])
        assert found.same_as(self.columns)

    def write(self) -> int:
        return int(self.libfdt.write(self.columns, self.into, luo.abi.LUO_DEVICES_COMPATIBLE))


def updates(plan: Plan, n: int) -> dict[str, Results]:
    """Everything that is told by updates of *n* devices, by row."""
    made = Updates(n)
    records = None
    try:
        records = LibFdtRecords(made)
    except peers.AbsentError as error:
        made.absent["libfdt"] = str(error)
    took: dict[str, list[dict[str, float]]] = {}
    runs: dict[str, Any] = {kind: partial(made.run, kind) for kind in made.kinds}
    runs |= {
        f"{kind}, two processes": partial(made.run, kind, 2)
        for kind in made.kinds
        if kind != "python"
    }
    if records is not None:
        runs["libfdt"] = lambda: {"prepare": timed(records.write)[0]}
    for name, run in runs.items():
        run()  # checks, and touches what is touched once
        took[name] = []
    for _ in plan.rounds(150.0 if n > ONE_BY_ONE_MOST else 60.0):
        for name, run in runs.items():
            took[name].append(run())
    return _rows(made, took)


def _rows(made: Updates, took: dict[str, list[dict[str, float]]]) -> dict[str, Results]:
    info = {
        "items": len(made.host.order),
        "bytes": len(made.host.driven) * len(hosts.STATE),
        "devices": len(made.host.driven),
        "image": made.image,
        "abi": "kho-v4",
        "seed": hosts.SEED,
    }

    def total(name: str, *phases: str) -> list[float]:
        return [sum(run[phase] for phase in phases) for run in took.get(name, ())]

    def row(
        durations: dict[str, list[float]], own: dict[str, dict[str, Any]] | None = None
    ) -> Results:
        absent = {
            name: why
            for what, why in made.absent.items()
            for name in (what, f"luo {what}", f"PREPARE {what}")
        }
        return Results(
            {name: values for name, values in durations.items() if name not in absent},
            info,
            own or {},
            absent,
        )

    kinds = {kind: f"luo {kind}" for kind in KINDS}
    whole = [kind for kind in made.kinds if kind != "python" or made.one_by_one]
    prepare = {kind: total(kind, "prepare") for kind in KINDS}
    # Who is compared with PREPARE is compared with the faster one of that round.
    bulk = [prepare[kind] for kind in made.kinds if kind != "python"]
    fastest = [min(times) for times in zip(*bulk, strict=True)]
    # The engine's own clock would count what calling costs as the callbacks' time.
    patching = [max(1e-9, run["reboot"] - run["patch loop"]) for run in took["python"]]
    return {
        "liveupdate.prepare": row(
            {kinds[kind]: prepare[kind] for kind in KINDS} | {"libfdt": total("libfdt", "prepare")},
            {kinds[kind]: {"phases": medians(took[kind])} for kind in whole},
        ),
        "liveupdate.prepare.python": row(
            {"luo python": prepare["python"], "for loop": total("python", "save loop")}
        ),
        "liveupdate.reboot": row(
            {"luo native": total("native", "reboot"), "luo python": patching, "PREPARE": fastest}
        ),
        "liveupdate.reboot.batch": row({"luo batch": total("batch", "reboot"), "PREPARE": fastest}),
        "liveupdate.restore": row(
            {kinds[kind]: total(kind, *ARRIVING) for kind in whole}
            | {f"PREPARE {kind}": prepare[kind] for kind in whole}
        ),
        "liveupdate.processes": row(
            {
                f"{what} {kind}": total(f"{kind}, two processes", *phases)
                for what, phases in (("luo", ARRIVING), ("PREPARE", ("prepare",)))
                for kind in KINDS[:2]
            }
        ),
        "liveupdate.finish": row({kinds[kind]: total(kind, "finish") for kind in whole}),
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median seconds of each phase."""
    return {phase: statistics.median(run[phase] for run in runs) for phase in PHASES if runs}
