"""PCI devices: their configuration space goes over; who answers by other ids is refused."""

from __future__ import annotations

import errno

import numpy as np
from numpy.typing import NDArray

from luo.device import DeviceBatch, LiveUpdateOps, batch
from luo.drivers.generic import differ, save, state_bytes

__all__ = ["OPS"]


def _restore(devices: DeviceBatch) -> NDArray[np.int32] | None:
    """Restore configuration space; vendor and device id at offset 0 must be the same: ENODEV."""
    if devices.slots.shape[1] < 4:
        devices.reclaim()
        return None
    result = differ(devices, 0, 4, errno.ENODEV)
    devices.reclaim(result == 0)
    return result


OPS = LiveUpdateOps(prepare=batch(save), restore=batch(_restore), state_size=batch(state_bytes))
