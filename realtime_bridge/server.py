"""The bridge under uvicorn, as `serve` and `dev` run it: with the fast path and an orderly stop.

Layer: whole.
"""

import asyncio
import gc
import logging
import math
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack

from fastapi import FastAPI
from uvicorn import Config, Server
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from realtime_bridge import logs
from realtime_bridge.app import create_app
from realtime_bridge.database import Database
from realtime_bridge.errors import ConfigurationError, UnavailableError
from realtime_bridge.parts import (
    make_broker,
    make_database,
    make_get_user,
    make_key_set,
    make_policy,
    make_source,
    make_verifier,
)
from realtime_bridge.settings import Settings

logger = logging.getLogger(__name__)


class BridgeServer(Server):
    """A uvicorn server that tells when it listens.

    Args:
        started: called once with the port, when connections are accepted.
    """

    def __init__(self, config: Config, *, started: Callable[[int], None] | None = None) -> None:
        super().__init__(config)
        self._on_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and tell the port."""
        await super().startup(sockets)
        if self._on_started is not None and self.started:
            self._on_started(self.servers[0].sockets[0].getsockname()[1])


class Workers(Multiprocess):
    """Several processes that share a listening socket, which ends with the first word to stop."""

    def terminate_all(self) -> None:
        """Stop them. Held open here, the socket would take in connections that nobody serves any more."""
        for listening in self.sockets:
            listening.close()
        super().terminate_all()

    def run(self) -> None:
        """Supervise them until a signal, or until one fails to start, which ends in `SystemExit`."""
        super().run()
        if any(process.exitcode == STARTUP_FAILURE for process in self.processes):
            sys.exit(STARTUP_FAILURE)


def run(*, host: str, port: int, workers: int) -> None:
    """Serve until a signal; several workers share one listening socket, and are started again when they die.

    Raises:
        ConfigurationError: it can never work like this.
        UnavailableError: Postgres or Redis cannot be reached now.
        SystemExit: with 1, if it fails to start otherwise (the port is taken, say); a log line tells why.
    """
    logs.configure()
    settings = Settings.load()
    if workers > 1 and settings.redis_url is None:
        raise ConfigurationError(
            "REDIS_URL is missing: without it the history is in the memory of one process, so --workers must be 1."
        )
    asyncio.run(preflight(settings))
    config = server_config(settings, host=host, port=port, workers=workers)

    def started(bound: int) -> None:
        logger.info("listening", extra={"url": f"http://{host}:{bound}", "port": bound})

    try:
        if workers > 1:
            listening = config.bind_socket()
            started(listening.getsockname()[1])
            Workers(config, sockets=[listening]).run()
        else:
            BridgeServer(config, started=started).run()
    except SystemExit as ended:  # uvicorn has a status of its own for this
        sys.exit(1 if ended.code == STARTUP_FAILURE else ended.code)


def server_config(settings: Settings, *, host: str, port: int, workers: int = 1) -> Config:
    """How uvicorn runs the bridge: our protocol class, no compression (its memory), time to drain."""
    return Config(
        "realtime_bridge.server:application",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        http="realtime_bridge.transports.uvicorn_protocol:BridgeHttpProtocol",
        ws="realtime_bridge.transports.uvicorn_protocol:BridgeWebSocketProtocol",
        ws_per_message_deflate=False,
        ws_max_size=65_536,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=4096,
        timeout_keep_alive=75,  # longer than what stands in front keeps a connection to use it again
        timeout_graceful_shutdown=max(1, math.floor(settings.drain_seconds) - 1),  # the rest is for what is done then
    )


def application() -> FastAPI:
    """What every process serves; workers begin here, with nothing of the parent's set up."""
    logs.configure()
    app = create_app()
    gc.freeze()  # what is imported stays; walked through by every full collection, it would hold up readers for 0.1 s
    return app


async def preflight(settings: Settings) -> None:
    """Find out before the start what can never work, so that it is one sentence and not a traceback.

    Raises:
        ConfigurationError: naming the variable or the SQL that mends it.
        UnavailableError: Postgres or Redis cannot be reached now.
    """
    async with make_broker(settings), AsyncExitStack() as stack:
        database = make_database(settings)
        if database is not None:
            await stack.enter_async_context(database)
        await make_policy(settings, database).prepare()
        await _check_source(settings, database)
    make_verifier(settings, make_key_set(settings), make_get_user(settings))


async def _check_source(settings: Settings, database: Database | None) -> None:
    try:
        await make_source(settings, database).check()
    except UnavailableError:
        return  # it may come; /readyz tells until then
