"""Clocks for a kernel: simulated time in place of the machine's.

``Kernel(clock=…)`` takes anything that is called without arguments and returns nanoseconds that
never go back, so a simulator that owns time passes its own. :class:`VirtualClock` is for who has
none: it stands still until a callback or a phase is charged for::

    clock = VirtualClock()
    kernel = Kernel(machine, clock=clock, cost=clock.charging(CostModel.load("cost.toml")))
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["CostHook", "VirtualClock"]

#: ``cost(label, device, devices)`` returns what a call took, in nanoseconds, once it is over. The
#: label is (subsystem, event, kind, name), the device a number or -1, devices how many it served.
CostHook: TypeAlias = Callable[[tuple[str, str, str, str], int, int], int]


class VirtualClock:
    """A clock that moves when it is told to, and only forward.

    Args:
        begin_ns: where it starts.
    """

    __slots__ = ("_now",)

    def __init__(self, begin_ns: int = 0) -> None:
        self._now = operator.index(begin_ns)

    def __call__(self) -> int:
        """Return the time, in nanoseconds."""
        return self._now

    def __repr__(self) -> str:
        return f"<VirtualClock {self._now} ns>"

    def advance(self, ns: int) -> int:
        """Let *ns* nanoseconds pass.

        Returns:
            the time then.

        Raises:
            ValueError: they are less than none.
        """
        passed = operator.index(ns)
        if passed < 0:
            raise ValueError(f"clock: {ns} ns would be back in time")
        self._now += passed
        return self._now

    def charging(self, cost: CostHook) -> CostHook:
        """Return *cost* so that what a call took passes on this clock."""

        def charge(label: tuple[str, str, str, str], device: int, devices: int) -> int:
            ns = cost(label, device, devices)
            self.advance(ns)
            return ns

        return charge
