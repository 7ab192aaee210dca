"""`realtime-bridge check`: why nothing arrives, and what mends it."""

from typing import Annotated

import typer


def check(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Make or complete the publication, and drop our slot if it is lost.")
    ] = False,
) -> None:
    """Look at everything that keeps changes from arriving; say what mends it."""
    from realtime_bridge.cli.report import report  # the other commands start without it

    raise typer.Exit(report(as_json=as_json, fix=fix))
