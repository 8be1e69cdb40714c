"""pytest plugin: the fixture ``luo_live_update``, for suites that hold live updates to budgets.

A module beside the package, since pytest imports it at every start: importing ``luo`` takes as long
as importing pytest, and only who asks for the fixture shall wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from luo import Kernel, KernelImage, Report

__all__ = ["LiveUpdate", "luo_live_update"]


class LiveUpdate(Protocol):
    """What the fixture ``luo_live_update`` is."""

    def __call__(
        self,
        kernel: Kernel,
        next: Kernel | KernelImage | None = None,
        *,
        repeat: int | None = None,
        in_process: bool = False,
    ) -> Report:
        """Update *kernel*, and fail the test if the update fails.

        Args:
            kernel: the running kernel, with devices requested.
            next: what it is updated to, one update after the other as
                :func:`luo.live_update` does; None is the kernel that it has loaded already, as
                those of :func:`luo.workloads.load` have: each update is then of a clone of its
                own, and *kernel* stays as it is.
            repeat: how many updates; as many as ``--luo-repeat`` says if None.
            in_process: build the image *next* in this process.

        Returns:
            the report, for ``.check({"blackout": "50ms"})``; its kernel runs until the test ends.
        """


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--luo-repeat``."""
    parser.getgroup("luo", "live updates").addoption(
        "--luo-repeat",
        type=int,
        default=1,
        metavar="N",
        help="live updates that luo_live_update makes; budgets are judged on their 95th percentile",
    )


@pytest.fixture
def luo_live_update(request: pytest.FixtureRequest) -> Iterator[LiveUpdate]:
    """Update a kernel, any number of times, and return the report with ``.check(budgets)``."""
    from luo.kernel import live_update
    from luo.report import Report

    reports = []

    def run(
        kernel: Kernel,
        next: Kernel | KernelImage | None = None,
        *,
        repeat: int | None = None,
        in_process: bool = False,
    ) -> Report:
        nr_updates = request.config.getoption("--luo-repeat") if repeat is None else repeat
        if nr_updates < 1:
            raise ValueError(f"repeat {nr_updates}: at least 1")
        report = Report()
        reports.append(report)
        if next is not None:
            live_update(kernel, next, repeat=nr_updates, in_process=in_process, report=report)
        else:
            for _ in range(nr_updates):
                if report.kernel is not None:
                    report.kernel.close()
                live_update(kernel.clone(), report=report)
        if report.error is not None:
            pytest.fail(f"live update: {report.error['message']}", pytrace=False)
        return report

    yield run
    for report in reports:
        if report.kernel is not None:
            report.kernel.close()
