"""What callbacks cost, in tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luo._kho import CallRecorder

__all__ = ["Profile"]


@dataclass(frozen=True)
class Profile:
    """What the callbacks of a kernel cost.

    Attributes:
        recorder: who recorded it.
        tree: its devices, whose ``path(number)`` names one; None if they are not known.
    """

    recorder: CallRecorder
    tree: Any = None

    @property
    def labels(self) -> list[tuple[str, str, str, str]]:
        """(subsystem, event, kind, name) by the ``key`` of spans."""
        return self.recorder.labels

    @property
    def spans(self) -> NDArray[np.void]:
        """Every call that was kept, an array of :data:`luo._kho.SPAN`; no copy."""
        return self.recorder.spans

    @property
    def dropped(self) -> int:
        """Calls that found no room for a span."""
        return self.recorder.dropped

    @property
    def costs(self) -> NDArray[np.float32]:
        """Nanoseconds by device, (2, devices): out of blackout, and in it; no copy."""
        return self.recorder.costs

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary a subsystem, event, kind and name that was called."""
        rows: list[dict[str, Any]] = self.recorder.rows()
        return rows

    def dump(self) -> list[list[Any]]:
        """Return all rows in JSON values, as :meth:`luo._kho.CallRecorder.merge` takes them."""
        return self.recorder.dump()
