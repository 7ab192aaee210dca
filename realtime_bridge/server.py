"""uvicorn as `serve` and `dev` run it.

Layer: whole.
"""

import socket
from collections.abc import Callable

from uvicorn import Config, Server
from uvicorn.supervisors import Multiprocess


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


def run_workers(config: Config, *, started: Callable[[int], None]) -> None:
    """Several processes that share one listening socket, started again when they die, until a signal."""
    listening = config.bind_socket()
    started(listening.getsockname()[1])
    Multiprocess(config, sockets=[listening]).run()
