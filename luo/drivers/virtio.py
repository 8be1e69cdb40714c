"""virtio devices: their attributes, and a status word that is final only in REBOOT.

Layout of a slot: the ``state`` column, padded to 8 bytes, then the status, a native u64.
"""

from __future__ import annotations

import errno

import numpy as np
from numpy.typing import NDArray

from luo.device import DeviceBatch, LiveUpdateOps, batch

__all__ = ["OPS"]

# virtio 1.2, section 2.1: device status field.
_DRIVER_OK = 4
_SUSPENDED = 16  # virtio 1.4: the device keeps its state and touches no queue


def _padded(nbytes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return (nbytes + np.uint64(7)) & ~np.uint64(7)


def _state_bytes(devices: DeviceBatch) -> NDArray[np.uint64]:
    return _padded(devices.sizes("state")) + np.uint64(8)


def _status(devices: DeviceBatch) -> NDArray[np.uint64]:
    """Return the status words, as a writable view."""
    return devices.slots[:, -8:].view(np.uint64)[:, 0]


def _prepare(devices: DeviceBatch) -> None:
    state = devices.column("state")
    devices.slots[:, : state.shape[1]] = state
    _status(devices)[:] = _DRIVER_OK


def _reboot(devices: DeviceBatch) -> None:
    """Stop the queues: from here on the state does not change."""
    _status(devices)[:] |= np.uint64(_SUSPENDED)


def _cancel(devices: DeviceBatch) -> None:
    _status(devices)[:] = _DRIVER_OK


def _restore(devices: DeviceBatch) -> NDArray[np.int32]:
    """Set the device going again; one that was not suspended lost requests on the way: EIO."""
    status = _status(devices)
    ready = status == (_DRIVER_OK | _SUSPENDED)
    devices.reclaim(ready)
    return np.where(ready, 0, -errno.EIO).astype(np.int32)


OPS = LiveUpdateOps(
    prepare=batch(_prepare),
    reboot=batch(_reboot),
    cancel=batch(_cancel),
    restore=batch(_restore),
    state_size=batch(_state_bytes),
)
