"""The stand-in's Realtime: its connections, the poller that feeds them, and every way in which it can misbehave.

Layer: whole (dev). May import: wire.phoenix, dev.supabase.{channels,changes}.
Sources: supabase/realtime (UserSocket, MessageDispatcher, Extensions.PostgresCdcRls).
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NoReturn
from urllib.parse import parse_qs, urlsplit

import asyncpg
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from realtime_bridge.dev.supabase.changes import Slot, Told
from realtime_bridge.dev.supabase.channels import Rules, Socket
from realtime_bridge.wire import phoenix

POLL_SECONDS: Final = 0.05
TOO_LARGE_FRAME: Final = 1_048_577
"""One byte more than what the Python client takes."""


_DATABASE_GONE: Final = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What ends a socket whose join cannot be looked up any more."""


class Realtime:
    """Every connection, and what they are sent."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._sockets: dict[ServerConnection, Socket] = {}
        self._resume_at = 0.0
        self._to_drop = 0
        self._to_repeat = 0
        self._is_next_oversize = False

    async def serve(self, connection: ServerConnection) -> None:
        """Serve one connection, to its end."""
        assert connection.request is not None, "the handshake is over"
        query = parse_qs(urlsplit(connection.request.path).query)
        vsn = phoenix.parse_vsn(query.get("vsn", [None])[0])
        socket = Socket(connection, self._rules, vsn, query["apikey"][0])
        self._sockets[connection] = socket
        try:
            with suppress(ConnectionClosed, *_DATABASE_GONE):
                async for data in connection:
                    await socket.receive(data)
        finally:
            del self._sockets[connection]

    async def poll(self, slot: Slot) -> NoReturn:
        """Tell every connection of every change, until cancelled."""
        while True:
            await asyncio.sleep(max(POLL_SECONDS, self._resume_at - asyncio.get_running_loop().time()))
            changes = await slot.take()
            for change in (*changes, *self._repeated(changes)):
                self._tell(change)

    def _repeated(self, changes: Sequence[Told]) -> Sequence[Told]:
        """Those that are told again, all behind the last: A B C A B C."""
        again = changes[: self._to_repeat]
        self._to_repeat -= len(again)
        return again

    def _tell(self, change: Told) -> None:
        if self._to_drop:
            self._to_drop -= 1
            return
        padding = TOO_LARGE_FRAME if self._is_next_oversize else 0
        self._is_next_oversize = False
        for socket in self._sockets.values():
            socket.fan_out(change, padding=padding)

    # -- misbehaving: see `LocalSupabase` ----------------------------------------------------------------------------

    async def close(self, code: int) -> None:
        """Close every connection, and wait for it."""
        await asyncio.gather(*(connection.close(code) for connection in self._sockets))

    def drop(self, changes: int) -> None:
        """Tell nobody of the next so many changes."""
        self._to_drop = changes

    def deafen(self) -> None:
        """Tell those who are connected now of no change any more."""
        for socket in self._sockets.values():
            socket.deafen()

    def delay(self, seconds: float) -> None:
        """Let the poller stand still for so long."""
        self._resume_at = asyncio.get_running_loop().time() + seconds

    def repeat(self, changes: int) -> None:
        """Tell of the next so many changes twice."""
        self._to_repeat = changes

    def oversize(self) -> None:
        """Tell of the next change in a frame that is too large for the client."""
        self._is_next_oversize = True

    def phx_close(self) -> None:
        """End every channel."""
        for socket in self._sockets.values():
            socket.close_channels()

    def say(self, message: str, *, is_error: bool = False) -> None:
        """Send a `system` message to every channel that is live."""
        for socket in self._sockets.values():
            socket.say(message, is_error=is_error)
