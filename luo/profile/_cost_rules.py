"""Rules of a cost model: what one call takes, and how that is spread."""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

__all__ = ["EVENTS", "KINDS", "LIMIT_NS", "PHASES", "TIME", "Distribution", "Rule"]

EVENTS: Final = ("PREPARE", "REBOOT", "RESTORE", "FINISH", "CANCEL")
#: The engine's phases, and the event whose callbacks are a part of each.
PHASES: Final = {
    "prepare": "PREPARE",
    "reboot": "REBOOT",
    "jump": None,
    "boot": None,
    "restore": "RESTORE",
    "finish": "FINISH",
    "cancel": "CANCEL",
}
LIMIT_NS: Final = 10**15  # eleven days; what is drawn is cut there

_NORMAL: Final = NormalDist()
TIME, NUMBER = "a time", "a number"
#: By name: parameters with what each is, and the inverse of the distribution function.
KINDS: Final[dict[str, tuple[dict[str, str], Callable[..., float]]]] = {
    "uniform": ({"low": TIME, "high": TIME}, lambda u, low, high: low + u * (high - low)),
    "exponential": ({"mean": TIME}, lambda u, mean: -mean * math.log1p(-u)),
    "normal": (
        {"mean": TIME, "deviation": TIME},
        lambda u, mean, deviation: mean + deviation * _NORMAL.inv_cdf(u),
    ),
    "lognormal": (
        {"median": TIME, "sigma": NUMBER},
        lambda u, median, sigma: median * math.exp(sigma * _NORMAL.inv_cdf(u)),
    ),
}


@dataclass(frozen=True, slots=True)
class Distribution:
    """How the cost of a call is spread.

    Args:
        kind: ``"uniform"``, ``"exponential"``, ``"normal"``, ``"lognormal"``, or ``"histogram"``.
        values: its parameters in the order of :data:`KINDS`, times in nanoseconds; of a histogram
            [low, high, count] of each bucket, ascending.
    """

    kind: str
    values: tuple[Any, ...]

    def inverse(self) -> Callable[[float], float]:
        """Return what gives the cost that a share of calls, more than 0 and less than 1, is below.

        One number drawn gives one cost, so a sequence is the same wherever Python is.
        """
        if self.kind != "histogram":
            function, values = KINDS[self.kind][1], self.values
            return lambda u: function(u, *values)
        below = list(itertools.accumulate((count for _, _, count in self.values), initial=0))
        buckets, total = self.values, below[-1]

        def find(u: float) -> float:
            place = bisect_right(below, u * total) - 1
            low, high, count = buckets[place]
            return float(low + (high - low) * (u * total - below[place]) / count)

        return find


@dataclass(frozen=True, slots=True)
class Rule:
    """What one call takes: all of it together.

    Args:
        fixed: nanoseconds of any call.
        per_device: nanoseconds of each device that it serves.
        spread: what is drawn besides; None for nothing.
        devices: how many devices a call of *spread* served: one that serves more takes more in
            proportion. 0: it does not depend on the devices.
    """

    fixed: float = 0
    per_device: float = 0
    spread: Distribution | None = None
    devices: float = 0

    def sampler(self, stream: random.Random) -> Callable[[int], int]:
        """Return what draws the nanoseconds of a call that serves so many devices."""
        fixed, each, reference = self.fixed, self.per_device, self.devices
        if self.spread is None:
            return lambda devices: min(round(fixed + each * devices), LIMIT_NS)
        find = self.spread.inverse()

        def sample(devices: int) -> int:
            u = (stream.getrandbits(52) + 0.5) / (1 << 52)
            drawn = find(u) * (devices / reference if reference else 1)
            return round(min(max(fixed + each * devices + drawn, 0), LIMIT_NS))

        return sample
