"""Options of ``luo run`` for a clock that is not the machine's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from rich.console import Console

from luo.cli.host import collected
from luo.clock import VirtualClock
from luo.profile.cost import CostModel, Rule

__all__ = ["ClockSettings", "arguments", "clock_options", "show_missed"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_NR_MISSED = 3


@dataclass(frozen=True, slots=True)
class ClockSettings:
    """Which clock the user wants.

    Attributes:
        clock, cost_file: the options.
    """

    clock: str
    cost_file: Path | None

    def __post_init__(self) -> None:
        if self.virtual and self.cost_file is None:
            raise click.UsageError("--clock virtual: name what callbacks cost with --cost FILE")
        if not self.virtual and self.cost_file is not None:
            raise click.UsageError("--cost: only a virtual clock is told; add --clock virtual")

    @property
    def virtual(self) -> bool:
        """Whether costs come from a file, and all kernels are in this process."""
        return self.clock == "virtual"

    def model(self, seed: int) -> CostModel | None:
        """Read what callbacks cost; None if the clock tells.

        Args:
            seed: of the distributions, 0 for the file's own.

        Raises:
            OSError, ValueError: the file is wrong; one clear line.
        """
        if self.cost_file is None:
            return None
        model = CostModel.load(self.cost_file)
        return model.fresh(seed) if seed else model


def arguments(model: CostModel | None) -> dict[str, Any]:
    """Return the arguments of kernels that *model* tells what callbacks cost, on one clock."""
    if model is None:
        return {}
    clock = VirtualClock()
    return {"clock": clock, "cost": clock.charging(model)}


def show_missed(console: Console, model: CostModel | None) -> None:
    """Say which callbacks the model knows nothing of."""
    if model is None or not model.missed or model.default != Rule():
        return
    missed = sorted(model.missed)
    more = f" and {len(missed) - _NR_MISSED} more" if len(missed) > _NR_MISSED else ""
    shown = ", ".join(missed[:_NR_MISSED])
    console.print(f"no rule for {shown}{more}: they cost nothing", style="dim")


_OPTIONS = (
    click.option(
        "--clock",
        type=click.Choice(["wall", "virtual"]),
        default="wall",
        show_default=True,
        help="Measure, or have everything take what --cost says: the same figures in each run with "
        "the same --seed. The next kernel then runs in this process.",
    ),
    click.option(
        "--cost",
        "cost_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="What callbacks cost: .toml by hand, .json of 'luo run', .csv of a tracing tool.",
    ),
)


def clock_options(command: _Command) -> _Command:
    """Give *command* the options of the clock, as one argument ``clocks``."""
    return cast("_Command", collected(command, _OPTIONS, "clocks", ClockSettings))
