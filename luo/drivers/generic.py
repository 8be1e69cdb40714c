"""A driver for whatever has state: saves the ``state`` column, restores it, reclaims."""

from __future__ import annotations

import errno

import numpy as np
from numpy.typing import NDArray

from luo.device import DeviceBatch, LiveUpdateOps, batch

__all__ = ["OPS", "save", "state_bytes"]


def state_bytes(devices: DeviceBatch) -> NDArray[np.uint64]:
    """Return how much state the hardware has, by device."""
    return devices.sizes("state")


def save(devices: DeviceBatch) -> None:
    """Copy the hardware's state into the slots."""
    if devices.slots.shape[1]:
        devices.column("state", devices.slots)


def differ(devices: DeviceBatch, first: int, stop: int, code: int) -> NDArray[np.int32]:
    """Return -*code* for each device whose slot and hardware differ in bytes *first* to *stop*."""
    here = devices.column("state")[:, first:stop]
    same = (devices.slots[:, first : first + here.shape[1]] == here).all(axis=1)
    return np.where(same, 0, -code).astype(np.int32)


def _restore(devices: DeviceBatch) -> NDArray[np.int32] | None:
    """Give each device back what was saved of it, and let it run.

    The attributes of a device that is not the one that was saved differ: EIO.
    """
    if not devices.slots.shape[1]:
        devices.reclaim()
        return None
    result = differ(devices, 0, devices.slots.shape[1], errno.EIO)
    devices.reclaim(result == 0)
    return result


OPS = LiveUpdateOps(prepare=batch(save), restore=batch(_restore), state_size=batch(state_bytes))
