"""A whole driver: a network card whose rings stay in memory while the kernel changes.

docs/driver-guide.md goes through it part by part. As a program, which shows what stays and what
moves on::

    python examples/nic_driver.py

In place of the built-in driver of two cards, with the next kernel in a second process::

    luo run --host examples/nic_host.toml --drivers examples/nic_driver.py
"""

import errno
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import luo

RINGS = 4  # of a card; each is a page of descriptors
ENTRY = struct.Struct("=Q")
COMPATIBLE = b"example,nic-v1\0"  # of what this driver leaves behind

# What a slot holds, in the byte order of the CPU: how many rings, and how long they are; then for
# each ring where it is, which PREPARE knows, and how far it is, which only REBOOT knows.
HEADER = struct.Struct("=II")
RING = struct.Struct("=QQ")


def ids(dev: luo.Device) -> bytes:
    """Return vendor and device id: the first four bytes of configuration space."""
    return dev.columns["state"][:4]


@dataclass
class Nic:
    """What the driver keeps of a card that runs.

    Attributes:
        rings: address of each ring.
        heads: descriptors that each ring has taken so far.
        running: whether it takes more.
    """

    rings: NDArray[np.uint64]
    heads: list[int]
    running: bool = True


class Nics:
    """The cards of one kernel."""

    def __init__(self) -> None:
        self.nics: dict[luo.Device, Nic] = {}
        self.driver = luo.Driver(
            "mlx5_core",
            luo.LiveUpdateOps(
                prepare=self.prepare,
                reboot=self.reboot,
                cancel=self.cancel,
                restore=self.restore,
                finish=self.finish,
                state_size=self.state_size,
            ),
            probe=self.probe,
            shutdown=self.shutdown,
        )
        self.totals = luo.Subsystem(
            "nic-totals",
            priority=luo.Priority.AFTER_DEVICES,
            prepare=self.keep_totals,
            reboot=self.add_up,
            cancel=self.drop_totals,
            finish=self.check_totals,
        )

    # ---- a card at work ----

    def probe(self, dev: luo.Device) -> None:
        """Start a card that nobody handed over: new rings, nothing in them."""
        self.nics[dev] = Nic(dev.memory.alloc_folios(RINGS, 0), [0] * RINGS)

    def shutdown(self, dev: luo.Device) -> None:
        """Stop a card that is not kept, and give its rings back."""
        dev.memory.free_folios(self.nics.pop(dev).rings)

    def transmit(self, dev: luo.Device, ring: int, word: int) -> None:
        """Put a descriptor into a ring."""
        nic = self.nics[dev]
        if not nic.running:
            raise OSError(errno.ENETDOWN, "the card is stopped")
        page = dev.memory.view(int(nic.rings[ring]), dev.memory.page_size)
        ENTRY.pack_into(page, nic.heads[ring] * ENTRY.size % len(page), word)
        nic.heads[ring] += 1

    # ---- the old kernel ----

    def state_size(self, dev: luo.Device) -> int:
        """Say how many bytes of preserved memory the card's slot needs."""
        return HEADER.size + RING.size * len(self.nics[dev].rings)

    def prepare(self, dev: luo.Device) -> None:
        """Keep the rings, and say where they are; the card goes on working."""
        nic = self.nics[dev]
        dev.kho.preserve_folios(nic.rings, 0)
        dev.kho_node.properties["compatible"] = COMPATIBLE
        HEADER.pack_into(dev.slot, 0, len(nic.rings), dev.memory.page_size)
        self.write(dev, nic)

    def reboot(self, dev: luo.Device) -> None:
        """Stop the card, and write down how far each ring is."""
        nic = self.nics[dev]
        nic.running = False
        self.write(dev, nic)

    def write(self, dev: luo.Device, nic: Nic) -> None:
        """Write where the rings are, and how far."""
        for number, (phys, head) in enumerate(zip(nic.rings.tolist(), nic.heads, strict=True)):
            RING.pack_into(dev.slot, HEADER.size + RING.size * number, phys, head)

    def cancel(self, dev: luo.Device) -> None:
        """Undo prepare, and reboot if that was called."""
        nic = self.nics[dev]
        dev.kho.unpreserve_folios(nic.rings, 0)
        nic.running = True

    # ---- the new kernel ----

    def restore(self, dev: luo.Device) -> None:
        """Take the rings over, and let the card go on where it stopped."""
        if dev.bus_slot != ids(dev):
            raise OSError(errno.ENODEV, "another card answers")
        if dev.kho_node.properties.get("compatible") != COMPATIBLE:
            raise OSError(errno.EPROTO, "another driver wrote this")
        nr_rings, ring_bytes = HEADER.unpack_from(dev.slot)
        if (nr_rings, ring_bytes) != (RINGS, dev.memory.page_size):
            raise OSError(errno.EPROTO, f"{nr_rings} rings of {ring_bytes} bytes")
        rings, heads = zip(*RING.iter_unpack(dev.slot[HEADER.size :]), strict=True)
        folios = np.array(rings, np.uint64)
        dev.kho.incoming.restore_folios(folios)
        self.nics[dev] = Nic(folios, list(heads))
        dev.reclaim()

    def finish(self, dev: luo.Device) -> None:
        """Free what restore did not take over: nobody knows these rings any more."""
        if not dev.reclaimed:
            for phys, _head in RING.iter_unpack(dev.slot[HEADER.size :]):
                dev.kho.incoming.restore_free(phys)

    # ---- a subsystem: what belongs to no single card ----

    def sent(self) -> int:
        """Return how many descriptors all cards have sent that are kept, or were."""
        return sum(sum(nic.heads) for dev, nic in self.nics.items() if dev.preserved)

    def keep_totals(self, context: luo.Context) -> None:
        """Keep a page; its address goes over as the subsystem's number."""
        context.data = context.kho.alloc_preserve(ENTRY.size)

    def add_up(self, context: luo.Context) -> None:
        """Write the sum: after the devices, when every card has stopped."""
        ENTRY.pack_into(context.memory.view(context.data, ENTRY.size), 0, self.sent())

    def drop_totals(self, context: luo.Context) -> None:
        """Give the page back: there is no update."""
        context.kho.unpreserve_free(context.data)

    def check_totals(self, context: luo.Context) -> None:
        """Compare the sum with what the cards have, and free the page."""
        if not context.data:  # the kernel before had no such subsystem
            return
        (sent,) = ENTRY.unpack(context.memory.view(context.data, ENTRY.size))
        context.kho.incoming.restore_free(context.data)
        if sent != self.sent():
            raise OSError(errno.EIO, f"{sent} descriptors were sent, {self.sent()} are here")


# ---- the bus: which device it was ----


def save_ids(dev: luo.Device) -> None:
    """Note who answered before the change."""
    dev.bus_slot[:] = ids(dev)


pci = luo.Bus("pci", luo.LiveUpdateOps(prepare=save_ids, state_size=4))


# ---- what luo run --drivers finds in this file ----

cards = Nics()
mlx5 = cards.driver
totals = cards.totals


# ---- the same on a machine of its own ----


def kernel(machine: luo.Machine, cards: Nics) -> luo.Kernel:
    return luo.Kernel(machine, drivers=[cards.driver], buses=[pci], subsystems=[cards.totals])


def main() -> None:
    hardware = luo.DeviceTree()
    port = hardware.add("port")
    hardware.add_many(("card", 0, 2), [port] * 2, "pci", "mlx5_core", state=bytes(range(64)))
    before, after = Nics(), Nics()
    old = kernel(luo.Machine("1GiB", hardware), before).boot()
    old.devices.request("port/*")
    card = old.devices["port/card0"]

    before.transmit(card, 0, 0xA)
    old.luo.prepare()
    before.transmit(card, 0, 0xB)
    old.luo.dry_reboot()
    before.transmit(card, 0, 0xC)
    print("sent before, while prepared, and after a dry reboot: 0xa 0xb 0xc")

    new = luo.live_update(old, kernel(old.machine, after)).kernel
    card = new.devices["port/card0"]
    nic = after.nics[card]
    page = new.memory.view(int(nic.rings[0]), ENTRY.size * nic.heads[0])
    print("in the ring in the next kernel:", *(f"{word:#x}" for (word,) in ENTRY.iter_unpack(page)))
    after.transmit(card, 0, 0xD)
    print("and it sends on: descriptor", nic.heads[0])
    new.close()


if __name__ == "__main__":
    main()
