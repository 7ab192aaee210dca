"""The sink for any ASGI server: what is written waits in a bounded list until the server takes it.

Slower and heavier than `transports.uvicorn_protocol`, and blind to pongs and to what the server itself has buffered,
but it needs nothing of the server, and the hub cannot tell the difference.

Layer: edges. May import: errors, wire.frames, hub.base.
Sources: the ASGI specification, WebSocket spec 2.4; asyncio.timeout as the one deadline of a closing connection.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from starlette.websockets import WebSocket, WebSocketDisconnect

from realtime_bridge.errors import MessageTooLargeError
from realtime_bridge.hub.base import Encoding, Receiver, Sink
from realtime_bridge.wire.frames import MESSAGE_BYTES, clip_reason

logger = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 10.0
"""How long the server may take to send what was written before a close."""


class AsgiSink:
    """An accepted ASGI WebSocket as a `Sink`.

    What the hub writes while the sink is `full` is kept too, so the list is bounded by what the hub does with that
    hint: at most one turn's messages over the limit.
    """

    encoding = Encoding.JSON

    def __init__(self, websocket: WebSocket, *, send_buffer_bytes: int) -> None:
        self.full = False
        self._websocket = websocket
        self._limit = send_buffer_bytes
        self._waiting: deque[bytes] = deque()
        self._owed = 0  # bytes that the server has not taken, the message in its hands included
        self._something = asyncio.Event()
        self._close: tuple[int, str] | None = None
        self._open = True
        self._deadline = asyncio.timeout(None)

    async def serve(self, make_receiver: Callable[[Sink], Receiver]) -> None:
        """Carry messages both ways until the connection is over, however it ends; cancelling ends it too."""
        receiver = make_receiver(self)
        try:
            with suppress(TimeoutError):
                async with self._deadline, asyncio.TaskGroup() as tasks:
                    writer = tasks.create_task(self._send_all(receiver), name="websocket writer")
                    await self._receive_all(receiver)
                    writer.cancel()
        finally:
            self._open = False
            receiver.lost()

    # Sink

    def write(self, messages: Sequence[bytes]) -> None:
        if not self._open:
            return
        self._waiting.extend(messages)
        self._owed += sum(map(len, messages))
        self.full = self._owed > self._limit
        self._something.set()
