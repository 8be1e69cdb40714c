"""A first driver, once per device and once for many: what it saves, the next kernel gets back.

As a program, with the next kernel in a second process::

    python examples/first_driver.py

Instead of the built-in drivers of the same names, on the devices of a host in a cloud::

    luo run --preset cloud --drivers examples/first_driver.py
"""

import errno

import luo


# One device at a time. PREPARE: what must survive goes into the slot, in preserved memory.
def save(dev: luo.Device) -> None:
    dev.slot[:] = dev.columns["state"]


# The next kernel: the same bytes in the same device, which runs again from here on.
def restore(dev: luo.Device) -> None:
    if dev.slot != dev.columns["state"]:
        raise OSError(errno.EIO, "another device answers")
    dev.reclaim()


def state_size(dev: luo.Device) -> int:
    return len(dev.columns["state"])


nvme = luo.Driver("nvme", luo.LiveUpdateOps(save, restore=restore, state_size=state_size))


# Many devices at a time: the same, with one call for all of them and arrays instead of bytes.
@luo.batch
def save_all(devices: luo.DeviceBatch) -> None:
    devices.column("state", out=devices.slots)


@luo.batch
def restore_all(devices: luo.DeviceBatch) -> None:
    devices.reclaim((devices.slots == devices.column("state")).all(axis=1))


vfio = luo.Driver(
    "vfio-pci",
    luo.LiveUpdateOps(
        save_all,
        restore=restore_all,
        state_size=luo.batch(lambda devices: devices.sizes("state")),
    ),
)


def kernel(machine: luo.Machine) -> luo.Kernel:
    """Build the software; a successor in another process is started from this function's name."""
    bus = luo.Bus("pci", luo.LiveUpdateOps())
    return luo.Kernel(machine, drivers=[nvme, vfio], buses=[bus])


def main() -> None:
    hardware = luo.DeviceTree()
    port = hardware.add("pci0000:00")
    hardware.add_many(("disk", 0, 4), [port] * 4, "pci", "nvme", state=bytes(range(64)))
    hardware.add_many(("vf", 0, 1000), [port] * 1000, "pci", "vfio-pci", state=bytes(256))

    old = kernel(luo.Machine("1GiB", hardware)).boot()
    old.devices.request("pci0000:00/*")
    report = luo.live_update(old, luo.KernelImage("first_driver:kernel"))
    new = report.kernel

    devices = report.devices
    print(" → ".join(report.states), f"in a second {report.successor}")
    print(f"{devices['preserved']} devices preserved, {devices['reclaimed']} reclaimed")
    print(f"{devices['state_bytes']} bytes saved, {devices['verified_bytes']} found there again")
    for row in report.callbacks:
        print(f"{row['event']:8} {row['name']:8} calls {row['calls']}")
    new.close()


if __name__ == "__main__":
    main()
