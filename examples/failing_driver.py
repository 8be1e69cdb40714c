"""A driver whose callback fails, and how its error is read.

As a program::

    python examples/failing_driver.py

On the devices of a host in a cloud, which exits with status 1 and names the culprit::

    luo run --preset cloud --drivers examples/failing_driver.py
"""

import errno

import luo

served = 0


def prepare(dev: luo.Device) -> None:
    """Save all but the third disk, whose queue is never empty."""
    global served
    served += 1
    if served == 3:
        raise OSError(errno.EBUSY, "a command is in flight")


def cancel(dev: luo.Device) -> None:
    """Undo prepare; called for the devices that had been prepared."""
    global served
    served -= 1


nvme = luo.Driver("nvme", luo.LiveUpdateOps(prepare, cancel=cancel))


def kernel(machine: luo.Machine) -> luo.Kernel:
    return luo.Kernel(machine, drivers=[nvme])


def main() -> None:
    hardware = luo.DeviceTree()
    hardware.add_many(("disk", 0, 4), drivers="nvme")
    machine = luo.Machine("1GiB", hardware)
    with kernel(machine).boot() as running:
        running.devices.request("disk*")
        free = machine.memory.nr_free_pages()
        try:
            running.luo.prepare()
        except luo.CallbackError as error:
            print(error)
            print("event      ", error.event)
            print("callback of", error.kind, error.name)
            print("device     ", error.device)
            print("errno      ", error.errno, errno.errorcode[error.errno])
            print("at         ", f"{error.file}:{error.line}")
            print("rolled back", error.rolled_back)
        print("state      ", running.luo.state.name)
        print("preserved  ", int(running.devices.preserved.sum()))
        print("free pages ", machine.memory.nr_free_pages() - free, "less than before")


if __name__ == "__main__":
    main()
