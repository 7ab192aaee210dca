"""`realtime-bridge dev`: everything on this machine, for a look and for development. `make demo` runs it."""

from typing import Annotated, Literal

import typer


def dev(
    port: Annotated[int, typer.Option(help="Port of the page; 0 lets the system pick.", min=0, max=65535)] = 8000,
    source: Annotated[
        Literal["postgres", "supabase"], typer.Option(help="Where changes come from; supabase starts a local stand-in.")
    ] = "postgres",
    redis: Annotated[bool, typer.Option("--redis", help="Two bridges that share an embedded Valkey.")] = False,
    no_writer: Annotated[bool, typer.Option("--no-writer", help="Leave the table empty and still.")] = False,
    users: Annotated[int, typer.Option(help="How many sample users.", min=1, max=100)] = 2,
    print_env: Annotated[
        bool, typer.Option("--print-env", help="When ready, print addresses, keys and users as one JSON line.")
    ] = False,
) -> None:
    """Run a Postgres with sample data, the bridge, and a page to watch it on, until Ctrl-C. Leaves nothing behind."""
    from realtime_bridge.dev.runner import Options, run  # the other commands start without it

    run(Options(port, source, redis=redis, writer=not no_writer, users=users, print_env=print_env))
