"""`realtime-bridge serve`: the bridge under uvicorn, with the fast path and an orderly stop."""

from typing import Annotated

import typer


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 lets the system pick.", min=0, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(help="Processes; more than one needs REDIS_URL.", min=1, max=64)] = 1,
) -> None:
    """Serve /ws, /events and the rest, with settings from the environment or .env."""
    from realtime_bridge.server import run  # the other commands start without it

    run(host=host, port=port, workers=workers)
