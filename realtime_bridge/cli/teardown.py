"""`realtime-bridge teardown`: drops what the bridge has made, and nothing else."""

from typing import Annotated

import typer


def teardown(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Drop the bridge's slot, publication and Redis keys. Stop every bridge first."""
    from realtime_bridge.cli.remains import remove  # the other commands start without it

    remove(ask=not yes)
