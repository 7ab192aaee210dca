"""The sinks for any ASGI server: what is written waits in a bounded list until the server takes it.

Slower and heavier than `transports.uvicorn_protocol`, and blind to pongs and to what the server itself has buffered,
but it needs nothing of the server, and the hub cannot tell the difference.

Layer: edges. May import: errors, wire, hub.base.
Sources: the ASGI specification, WebSocket spec 2.4; asyncio.timeout as the one deadline of a closing connection.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from starlette.types import Message, Receive, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from realtime_bridge.errors import MessageTooLargeError
from realtime_bridge.hub.base import Encoding, Receiver, Sink
from realtime_bridge.wire import native
from realtime_bridge.wire.frames import MESSAGE_BYTES, clip_reason
from realtime_bridge.wire.sse import COMMENT, wrap_event

logger = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 10.0
"""How long the server may take to send what was written before a close."""


class _AsgiSink:
    """What every sink over ASGI has in common.

    What the hub writes while the sink is `full` is kept too, so the list is bounded by what the hub does with that
    hint: at most one turn's messages over the limit.
    """

    encoding: Encoding
    _end_of_link: ClassVar[str]

    def __init__(self, receive: Receive, send: Send, *, send_buffer_bytes: int) -> None:
        self.full = False
        self._receive, self._to_server = receive, send
        self._high, self._low = send_buffer_bytes, send_buffer_bytes // 4
        self._receiver: Receiver | None = None
        self._waiting: deque[bytes] = deque()
        self._owed = 0  # bytes the server has not taken over, the message it is just being given included
        self._wake = asyncio.Event()
        self._close: tuple[int, str] | None = None
        self._deadline = asyncio.timeout(None)
        self._open = True  # neither closed nor lost
        self._ended = False

    async def serve(self, make_receiver: Callable[[Sink], Receiver]) -> None:
        """Carry messages both ways until the connection is over. Cancelling it ends the connection."""
        try:
            async with self._deadline:
                self._receiver = receiver = make_receiver(self)
                try:
                    await self._carry(receiver)
                finally:
                    self._open, self._ended = False, True
                    receiver.lost()
        except TimeoutError:
            if not self._deadline.expired():
                raise

    # Sink

    def write(self, messages: Sequence[bytes]) -> None:
        if self._open:
            self._waiting.extend(messages)
            self._owed += sum(map(len, messages))
            self.full = self.full or self._owed > self._high
            self._wake.set()

    def ping(self) -> None:
        """Answer at once: ASGI knows no pings, and it is the server's own that find a dead peer."""
        asyncio.get_running_loop().call_soon(self._pretend_pong)

    def close(self, code: int, reason: str = "") -> None:
        if self._open:
            self._open = False
            self._close = code, clip_reason(reason)
            self._deadline.reschedule(asyncio.get_running_loop().time() + CLOSE_SECONDS)
            self._wake.set()

    def abort(self) -> None:
        self._open = False
        if not self._ended and not self._deadline.expired():
            self._ended = True
            self._waiting.clear()
            self._deadline.reschedule(0)

    # inside

    async def _carry(self, receiver: Receiver) -> None:
        async with asyncio.TaskGroup() as tasks:
            writer = tasks.create_task(self._send_all(receiver), name="asgi writer")
            while (message := await self._receive())["type"] != self._end_of_link:
                if self._open:
                    self._take(message, receiver)
            writer.cancel()

    async def _send_all(self, receiver: Receiver) -> None:
        """Send what is waiting, whenever something is, and at last the close."""
        while self._close is None or self._waiting:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                message = self._waiting.popleft()
                await self._send(self._carrier(message))
                self._pay(len(message), receiver)
        await self._send(self._ending(*self._close))

    async def _send(self, message: Message) -> None:
        try:
            await self._to_server(message)
        except (OSError, WebSocketDisconnect, RuntimeError):  # the last when the server has begun to close by itself
            self.abort()

    def _pay(self, size: int, receiver: Receiver) -> None:
        self._owed -= size
        if self.full and self._owed <= self._low:
            self.full = False
            if self._open:
                receiver.room()

    def _pretend_pong(self) -> None:
        if self._open and self._receiver is not None:
            self._receiver.alive()

    # what the protocol decides

    def _carrier(self, message: bytes) -> Message:
        raise NotImplementedError

    def _ending(self, code: int, reason: str) -> Message:
        raise NotImplementedError

    def _take(self, message: Message, receiver: Receiver) -> None:
        receiver.alive()


class AsgiSink(_AsgiSink):
    """An accepted ASGI WebSocket as a `Sink`."""

    encoding = Encoding.JSON
    _end_of_link = "websocket.disconnect"

    def __init__(self, websocket: WebSocket, *, send_buffer_bytes: int) -> None:
        super().__init__(websocket.receive, websocket.send, send_buffer_bytes=send_buffer_bytes)

    def _carrier(self, message: bytes) -> Message:
        return {"type": "websocket.send", "text": message.decode()}

    def _ending(self, code: int, reason: str) -> Message:
        return {"type": "websocket.close", "code": code, "reason": reason}

    def _take(self, message: Message, receiver: Receiver) -> None:
        receiver.alive()
        text = message.get("text")
        if text is None:
            self._refuse(4400, "binary messages are not understood")
        elif len(text) > MESSAGE_BYTES or len(text.encode()) > MESSAGE_BYTES:
            self._refuse(4000 + MessageTooLargeError.status_code, f"message over {MESSAGE_BYTES} bytes")
        else:
            receiver.received(text)

    def _refuse(self, code: int, reason: str) -> None:
        logger.info("client refused", extra={"close_code": code, "reason": reason})
        self.close(code, reason)


class AsgiEventSink(_AsgiSink):
    """A started ASGI response of Server-Sent Events as a `Sink`; its close is told as an `error` message."""

    encoding = Encoding.EVENT
    _end_of_link = "http.disconnect"

    def ping(self) -> None:
        self.write((COMMENT,))
        super().ping()

    def _carrier(self, message: bytes) -> Message:
        return {"type": "http.response.body", "body": message, "more_body": True}

    def _ending(self, code: int, reason: str) -> Message:
        return {"type": "http.response.body", "body": wrap_event(native.error(code, reason)), "more_body": False}
