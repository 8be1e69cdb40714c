"""A driver that leaks: what PREPARE allocates, CANCEL forgets. And how that is found.

``luo faults`` fails every callback in every way, and looks whether anything is left; it exits with
status 1 and the shortest sequence that shows it::

    luo faults --preset cloud --drivers examples/leaky_driver.py

At the end it prints::

    the shortest sequence
      1 kernel.devices.request(["pci0000:00/0000:00:01.0/0000:01:00.2"])
      2 kernel.luo.prepare()
      3 kernel.luo.cancel()
        preserved set: 1 blocks (4 pages) more and 0 less than before

Most updates of the table above it are marked ✗, since each of their rollbacks leaks; the last line
says how many there are, and that this one sequence shows them all.
"""

import luo

RING_BYTES = 16384

rings: dict[str, int] = {}


def prepare(dev: luo.Device) -> None:
    """Give the device a ring that survives, and leave its address in the slot."""
    ring = rings[dev.path] = dev.kho.alloc_preserve(RING_BYTES)
    dev.slot[:] = ring.to_bytes(8, "little")


def cancel(dev: luo.Device) -> None:
    """Undo prepare. The ring stays preserved: this is the mistake."""
    rings.pop(dev.path)
    # dev.kho.unpreserve_free(rings.pop(dev.path)) would be right


def restore(dev: luo.Device) -> None:
    """Run on."""
    dev.reclaim()


def finish(dev: luo.Device) -> None:
    """Free the ring: the device has got a new one by now."""
    incoming = dev.kho.incoming
    assert incoming is not None
    incoming.restore_free(int.from_bytes(dev.slot, "little"))


vfio = luo.Driver(
    "vfio-pci",
    luo.LiveUpdateOps(prepare, cancel=cancel, restore=restore, finish=finish, state_size=8),
)
