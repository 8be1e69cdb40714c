"""The ``luo`` command: the only place that knows options, screens and exit statuses.

Exit status: 0 done, 1 the live update failed, 2 wrong usage or input, 3 a budget or comparison was
not met, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

try:  # this takes as long as a person needs for ^C
    import click

    from luo.cli.compare import compare
    from luo.cli.errors import INTERRUPTED
    from luo.cli.export import export
    from luo.cli.faults import faults
    from luo.cli.graph import graph
    from luo.cli.image import image
    from luo.cli.mount import mount
    from luo.cli.quirks import quirks
    from luo.cli.report import report
    from luo.cli.run import run
    from luo.cli.session import session
    from luo.cli.whatif import what_if
    from luo.report import version
except KeyboardInterrupt:
    sys.exit(130)

__all__ = ["main"]


class _OneLine(click.Group):
    """A group whose errors are one line on standard error."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run, and exit."""
        # A shell starts background jobs with SIGINT ignored; an update must still roll back.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            click.echo(f"luo: {error.format_message()}", err=True)
            status = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            status = INTERRUPTED
        sys.exit(status if isinstance(status, int) else 0)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@click.group(
    cls=_OneLine, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(version(), prog_name="luo")
def main() -> None:
    """Live updates of a Linux host: what survives the reboot, what it costs, and what fails."""


for command in (
    run,
    report,
    what_if,
    compare,
    export,
    faults,
    image,
    mount,
    session,
    quirks,
    graph,
):
    main.add_command(command)
