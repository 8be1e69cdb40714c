"""What callbacks and phases take in simulated time.

A :class:`CostModel` has rules by name, and the most specific one counts:
``"subsystem/name/EVENT"`` (as ``"devices/virtio-pci/REBOOT"``), ``"subsystem/EVENT"``,
``"EVENT"``, then the default. ``"engine/jump"`` and the like are the engine's own share of a
phase, which no callback has. A driver and a bus of one name share a rule.

A file written by hand is TOML; times are ``"12us"`` or a number of nanoseconds::

    default = "5us"         # of callbacks without a rule; 0 if absent
    seed = 1                # of the distributions; 0 if absent
    base = "measured.json"  # begin with what 'luo run --json' or a tracing tool (.csv) measured

    [rules]
    "engine/jump" = "15ms"
    "kvm/REBOOT" = { distribution = "lognormal", median = "80us", sigma = 0.4 }
    "devices/vfio-pci/PREPARE" = { fixed = "20us", per_device = "3us" }

    [names]                 # functions of the .csv, and whose callbacks they are
    virtio_pci_freeze = "devices/virtio-pci/REBOOT"
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from luo.profile import _cost_files
from luo.profile._cost_files import Source
from luo.profile._cost_rules import Distribution, Rule

__all__ = ["CostModel", "Distribution", "Rule"]

Label: TypeAlias = tuple[str, str, str, str]


class CostModel:
    """What callbacks and phases take in simulated time, by rules (see the module's words).

    It is called as the ``cost=`` of a :class:`~luo.kernel.Kernel` is. The n-th draw of a rule
    depends on the seed, the rule's name and n alone.

    Args:
        rules: by name, a :class:`Rule`, a time as ``"12us"``, or nanoseconds.
        default: of callbacks without a rule; likewise.
        seed: of all distributions.

    Attributes:
        rules, default, seed: as given.
        missed: callbacks that were called and have no rule, by ``"subsystem/name/EVENT"``.

    Raises:
        ValueError: a name that no callback has, or a time that is none.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule | str | float] | None = None,
        *,
        default: Rule | str | float = 0,
        seed: int = 0,
    ) -> None:
        source = Source("cost model")
        self.rules = source.rules(rules or {})
        self.default = source.rule(default, "default")
        self.seed = seed
        self.missed: set[str] = set()
        self._samplers: dict[str, Callable[[int], int]] = {}
        self._found: dict[Label, Callable[[int], int]] = {}

    def __repr__(self) -> str:
        return f"<CostModel {len(self.rules)} rules, seed {self.seed}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CostModel):
            return NotImplemented
        mine, theirs = ((one.rules, one.default, one.seed) for one in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]

    # ---- drawing ----

    def __call__(self, label: Label, device: int, devices: int) -> int:
        """Return the nanoseconds of a call: the ``cost=`` of a kernel."""
        return self.draw(label, devices)

    def draw(self, label: Label, devices: int = 1) -> int:
        """Return the nanoseconds of the next call of a callback, or phase.

        Args:
            label: (subsystem, event, kind, name); of a phase ("engine", "JUMP", "phase", "jump").
            devices: how many it serves.
        """
        found = self._found.get(label)
        if found is None:
            found = self._found[label] = self._find(label)
        return found(devices)

    def _find(self, label: Label) -> Callable[[int], int]:
        subsystem, event, kind, name = label
        if kind == "phase":
            names: tuple[str, ...] = (f"engine/{name}",)
        else:
            names = (f"{subsystem}/{name}/{event}", f"{subsystem}/{event}", event)
        key = next((key for key in names if key in self.rules), None)
        if key is None and kind == "phase":
            return lambda devices: 0
        if key is None:
            self.missed.add(names[0])
        if (key or "") not in self._samplers:
            rule = self.default if key is None else self.rules[key]
            self._samplers[key or ""] = rule.sampler(random.Random(f"{self.seed}/{key}"))
        return self._samplers[key or ""]

    def fresh(self, seed: int | None = None) -> CostModel:
        """Return the same model before its first draw, with another seed if one is given."""
        return CostModel(self.rules, default=self.default, seed=self.seed if seed is None else seed)

    # ---- files ----

    @classmethod
    def load(cls, path: str | PathLike[str]) -> CostModel:
        """Read a model from TOML, or from what was measured: ``luo-run/1`` JSON, or CSV.

        Args:
            path: the file; its suffix says which.

        Raises:
            OSError: it cannot be read.
            ValueError: something in it is wrong; names the file, and the line or the key.
        """
        rules, default, seed = _cost_files.load(path)
        return cls(rules, default=default, seed=seed)

    @classmethod
    def from_run(cls, document: Mapping[str, Any], name: str = "run") -> CostModel:
        """Read a model from a ``luo-run/1`` document: what its callbacks and phases took.

        A callback without a histogram costs its mean. Of a phase the engine's own share is the
        median over all updates of what its callbacks leave.

        Args:
            document: the document.
            name: what errors call it.

        Raises:
            ValueError: it is none, or has no callbacks; names the key.
        """
        return cls(Source(name).run(document))

    @classmethod
    def from_csv(
        cls, file: str | PathLike[str] | TextIO, names: Mapping[str, str] | None = None
    ) -> CostModel:
        """Read a model from CSV as tracing tools are made to print it: a line a call.

        The first line that is no ``#`` comment names the columns, in any order; others are
        ignored; comma, semicolon, tab or ``|`` separates.

        =========== ============================================================================
        what        column
        =========== ============================================================================
        name        ``name``, ``function``, ``func``, ``callback``, ``probe``, ``symbol``,
                    ``rule``: a rule's name, or one of *names*; or the three columns
                    ``subsystem``, ``name``, ``event``
        duration    ``duration``, ``dur``, ``latency``, ``lat``, ``elapsed``, ``time``, ``delta``
                    with a unit as in ``duration_ns`` or ``latency (us)``; or only the unit
                    (``nsecs``, ``us``); or without, if each value has one (``12.5 us``)
        count       ``count``, ``calls``: so many calls took that long; 1 if absent
        devices     ``devices``: how many devices a call served
        =========== ============================================================================

        Args:
            file: the file.
            names: rules by the names of functions; lines of other functions are then skipped.

        Raises:
            OSError: it cannot be read.
            ValueError: a line is wrong; names the file and the line.
        """
        if isinstance(file, str | PathLike):
            return cls(_cost_files.load(file, names)[0])
        return cls(Source(getattr(file, "name", "csv")).table(file, names))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model as TOML, which :meth:`load` reads.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(_cost_files.dump(self.rules, self.default, self.seed), "utf-8")
