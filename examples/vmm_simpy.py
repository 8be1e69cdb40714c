"""A host with 50 virtual machines in SimPy, updated live while its guests work.

Each guest sends a request every millisecond to its own device. A live update takes the devices
down in REBOOT and up again in the next kernel; a request that comes meanwhile waits. The engine is
the real one, with the bytes of every device carried over; only time is simulated::

    python examples/vmm_simpy.py
"""

import errno
import statistics
from collections.abc import Iterator

import simpy

import luo
from luo.notifier import Step
from luo.profile.cost import CostModel, Distribution, Rule
from luo.sim import Host

NR_GUESTS = 50

COSTS = CostModel(
    {
        "devices/vfio/PREPARE": "3ms",
        "devices/vfio/REBOOT": Rule(spread=Distribution("lognormal", (1_000_000, 0.3))),
        "devices/vfio/RESTORE": Rule(spread=Distribution("lognormal", (2_000_000, 0.3))),
        "devices/vfio/CANCEL": "500us",
        "engine/jump": "8ms",
        "engine/boot": "12ms",
    },
    seed=1,
)


class Guest:
    """A virtual machine: how long its longest request took is the blackout that it saw."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.up = env.event().succeed()
        self.longest = 0.0
        env.process(self.work())

    def work(self) -> Iterator[simpy.Event]:
        """Send a request every millisecond, for a second."""
        while self.env.now < 1:
            yield self.env.timeout(1e-3)
            asked = self.env.now
            yield self.up
            self.longest = max(self.longest, self.env.now - asked)

    def pause(self) -> None:
        """Take its device down."""
        if self.up.triggered:
            self.up = self.env.event()

    def resume(self) -> None:
        """Have its device run again."""
        if not self.up.triggered:
            self.up.succeed()


# The driver is like any other: what it saves in PREPARE is in the slot in the next kernel.
def driver(broken: str | None = None) -> luo.Driver:
    def save(dev: luo.Device) -> None:
        dev.slot[:] = dev.index.to_bytes(4, "little")

    def stop(dev: luo.Device) -> None:
        if dev.name == broken:
            raise OSError(errno.EIO, "its queue does not drain")

    def restore(dev: luo.Device) -> None:
        assert int.from_bytes(dev.slot, "little") == dev.index
        dev.reclaim()

    ops = luo.LiveUpdateOps(save, stop, cancel=lambda dev: None, restore=restore, state_size=4)
    return luo.Driver("vfio", ops)


def kernel(machine: luo.Machine, broken: str | None = None) -> luo.Kernel:
    bus = luo.Bus("pci", luo.LiveUpdateOps())
    return luo.Kernel(machine, drivers=[driver(broken)], buses=[bus])


def simulate(workers: int, broken: str | None = None) -> None:
    hardware = luo.DeviceTree()
    port = hardware.add("pci0000:00")
    hardware.add_many(("vm", 0, NR_GUESTS), [port] * NR_GUESTS, "pci", "vfio")
    old = kernel(luo.Machine("256MiB", hardware), broken).boot()
    old.devices.request("pci0000:00/*")

    env = simpy.Environment()
    guests = [Guest(env) for _ in range(NR_GUESTS)]

    def observe(moment: str, event: str, step: Step) -> None:
        if step.device is not None:
            guest = guests[int(step.device.name.removeprefix("vm"))]
            if (moment, event) == ("begin", "REBOOT"):
                guest.pause()
            elif (moment, event) == ("end", "RESTORE"):
                guest.resume()

    # Each simulation draws the same costs for the same callbacks.
    host = Host(env, old, cost=COSTS.fresh(), workers=workers, observer=observe)

    def operator() -> Iterator[simpy.Event]:
        yield env.timeout(0.25)
        try:
            report = yield host.live_update(kernel(old.machine))
        except luo.CallbackError as error:
            print(f"  {error.event} of {error.device} failed: {errno.errorcode[error.errno]}")
            print(f"  rolled back: {error.rolled_back}; the old kernel is {old.luo.state.name}")
            for guest in guests:
                guest.resume()
        else:
            print(f"  states: {' → '.join(report.states)}")
            print(f"  blackout of the host: {report.phases['blackout'] / 1e6:.1f} ms")

    env.process(operator())
    env.run()
    seen = [guest.longest * 1e3 for guest in guests]
    print(
        f"  seen by guests: {min(seen):.1f} ms at least, {statistics.median(seen):.1f} ms in the"
        f" middle, {max(seen):.1f} ms at most"
    )
    host.kernel.close()


def main() -> None:
    for workers in (1, 2):
        print(f"{NR_GUESTS} guests, {workers} worker{'s'[: workers - 1]}")
        simulate(workers)
    print("REBOOT of vm31 fails, 2 workers")
    simulate(2, broken="vm31")


if __name__ == "__main__":
    main()
