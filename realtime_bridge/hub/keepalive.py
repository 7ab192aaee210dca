"""What happens to connections by the mere passing of time: pings, dead peers, tokens that end.

One task looks at every connection once a second; no connection has a timer of its own.

Layer: core. May import: words, wire, hub.*.
"""

import asyncio
import time
from typing import TYPE_CHECKING, Final

from realtime_bridge.hub.breath import Breath
from realtime_bridge.hub.connection import Connection
from realtime_bridge.wire import native

if TYPE_CHECKING:
    from realtime_bridge.hub.hub import Hub

EXPIRY_WARNING_SECONDS: Final = 60


class Keepalive:
    """Looks after every connection of a hub.

    Args:
        ping_seconds: a ping after so many idle seconds; a peer from which nothing has come for twice as long and five
            seconds is dead.
    """

    def __init__(self, hub: "Hub", ping_seconds: float) -> None:
        self._hub = hub
        self._ping_seconds = ping_seconds

    async def run(self) -> None:
        """Tick once a second, or more often if pings are faster, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, self._ping_seconds / 2))
            now, wall = loop.time(), time.time()
            breath = Breath()
            for connection in tuple(self._hub.connections):
                if connection.lasting:
                    self._look(connection, now, wall)
                await breath.take()

    def _look(self, connection: Connection, now: float, wall: float) -> None:
        expires_at = connection.claims.expires_at
        if expires_at is not None and wall >= expires_at:
            connection.sink.close(4401, "token expired")
            return
        if expires_at is not None and not connection.warned and wall >= expires_at - EXPIRY_WARNING_SECONDS:
            connection.warned = True
            connection.send(native.auth_expiring(expires_at))
        if now - connection.heard_at > 2 * self._ping_seconds + 5:
            connection.sink.close(4408, "no sign of life")
            return
        if now - connection.pinged_at >= self._ping_seconds:
            connection.pinged_at = now
            connection.sink.ping()
        if now - connection.sent_at >= self._ping_seconds and self._hub.at_end(connection):
            connection.sent_at = now
            position = self._hub.position_of(connection)
            connection.send(native.ping(position, self._hub.complete_until), position)
