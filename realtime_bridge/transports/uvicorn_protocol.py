"""The fast path: uvicorn does the handshake, the route accepts, and then the socket is ours alone.

An ASGI call that lasts as long as its WebSocket costs a task, a queue, the request and the handshake for every idle
client, and a walk through all of it for every message. Here the route ends with the accept, and one small object per
client keeps the transport: a delivery is one `transport.write` of a prepared frame. Use it with
`uvicorn --ws realtime_bridge.transports.uvicorn_protocol:BridgeWebSocketProtocol`; routes that do not ask for the
takeover (`transports.sockets` does) notice nothing of it.

`BridgeHttpProtocol`, passed as `http=`, tells the bridge when uvicorn begins to stop, so that waiting polls are
answered. Server-Sent Events will go through it the way WebSockets go: it offers the same extension in its HTTP scopes.
A route that asked for it starts its response; the protocol sends status line and headers with `connection: close`, so
that the body needs no chunks and a prepared `Encoding.EVENT` is written as it is, marks the cycle complete, stops the
keep-alive timer, and gives the transport to an `EventSink`: what `SocketSink` is below, less the parser, for which any
input is merely a sign of life, and closing is a flush and the end.

Layer: edges. May import: wire.frames, hub.base.
Sources: RFC 6455, sections 5.5 and 7; asyncio's transports and protocols; uvicorn 0.54; tcp(7) for TCP_NOTSENT_LOWAT.
"""

import asyncio
import logging
import random
import socket
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final, cast
from urllib.parse import unquote

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from realtime_bridge.hub.base import Encoding, Receiver, Sink
from realtime_bridge.wire.frames import (
    BINARY,
    CLOSE,
    PING,
    FrameError,
    FrameParser,
    close_frame,
    ping_frame,
    pong_frame,
)

logger = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 10.0
"""How long a peer may take to join in a close before it is dropped."""

_CREDENTIALS: Final = ("token", "ticket", "apikey")

_NOTSENT_BYTES: Final = 16 * 1024
"""Unsent bytes the kernel takes over for one socket: little enough that what a slow reader owes is seen in the
transport's buffer. What is on its way is not counted, so a far link stays busy: with 100 ms of round trip one
connection carried 27 MB/s, and 30 without the limit."""

_PING: Final = (ping_frame(),)


class SocketSink(asyncio.Protocol):
    """A WebSocket after its handshake, as a `Sink`: all that is kept for one client below the hub.

    Reading never stops, so that pongs and closes are always noticed; what arrives is either handed on or dropped.
    """

    __slots__ = (
        "_connections",
        "_listening",
        "_open",
        "_owed_pong",
        "_parser",
        "_receiver",
        "_timer",
        "_transport",
        "full",
    )

    encoding = Encoding.FRAME

    restart_spread_seconds: ClassVar[float] = 3.0
    """On shutdown each client is told to come back after a random time up to this one."""

    def __init__(self, transport: asyncio.Transport, connections: set[Any], *, send_buffer_bytes: int) -> None:
        self.full = False
        self._transport = transport
        self._connections = connections
        self._receiver: Receiver = _NOBODY
        self._parser = FrameParser()
        self._owed_pong: bytes | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._open = True  # neither side has begun to close
        self._listening = True  # what arrives can still be understood
        transport.set_write_buffer_limits(high=send_buffer_bytes, low=send_buffer_bytes // 4)
        _show_owed_bytes(transport)

    def serve(self, receiver: Receiver) -> None:
        """Take the transport from the protocol that has it."""
        self._receiver = receiver
        self._connections.add(self)
        self._transport.set_protocol(self)

    # Sink

    def write(self, messages: Sequence[bytes]) -> None:
        if self._open and not self._transport.is_closing():
            self._transport.write(messages[0] if len(messages) == 1 else b"".join(messages))

    def ping(self) -> None:
        self.write(_PING)

    def close(self, code: int, reason: str = "") -> None:
        self.write((close_frame(code, reason),))
        self._begin_close()

    def abort(self) -> None:
        self._open = False
        self._transport.abort()

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        if not self._listening:
            return
        if self._open:
            self._receiver.alive()
        try:
            for opcode, payload in self._parser.feed(data):
                self._take(opcode, payload)
        except FrameError as error:
            self._refuse(error.code, error.reason)
            self._hang_up()

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        if self._owed_pong is not None:
            payload, self._owed_pong = self._owed_pong, None
            self.write((pong_frame(payload),))
        # With TLS this may be called from within `write`, and a receiver must not.
        asyncio.get_running_loop().call_soon(self._tell_room)

    def eof_received(self) -> None:
        self._begin_close()  # the transport closes by itself, but would wait for ever for a peer that reads nothing

    def connection_lost(self, exc: Exception | None) -> None:
        self._open = self._listening = False
        if self._timer is not None:
            self._timer.cancel()
        self._connections.discard(self)
        receiver, self._receiver = self._receiver, _NOBODY
        receiver.lost()

    # what uvicorn asks of each member of `server_state.connections`

    def shutdown(self) -> None:
        """Ask the client to come back, at a time of its own."""
        self.close(1012, f"retry in {random.randint(0, round(self.restart_spread_seconds * 1000))} ms")

    # inside

    def _take(self, opcode: int, payload: str | bytes) -> None:
        if opcode == CLOSE:
            self._answer_close(cast("bytes", payload))
        elif not self._open:
            pass  # RFC 6455, 1.4: after a close nothing counts but the other close
        elif isinstance(payload, str):
            self._receiver.received(payload)
        elif opcode == PING:
            self._answer_ping(payload)
        elif opcode == BINARY:
            self._refuse(4400, "binary messages are not understood")

    def _answer_ping(self, payload: bytes) -> None:
        """Answer, but one who reads nothing gets one pong for all pings: RFC 6455, 5.5.3."""
        if self.full:
            self._owed_pong = payload
        else:
            self.write((pong_frame(payload),))

    def _answer_close(self, payload: bytes) -> None:
        """Echo the code if the peer was first, then end the connection, as a server is to do."""
        self.write((_echo(payload),))
        self._begin_close()
        self._listening = False
        self._transport.close()

    def _refuse(self, code: int, reason: str) -> None:
        """Close because of what the peer did; said in the log once, since `close` can be only once."""
        if self._open:
            logger.info("client refused", extra={"close_code": code, "reason": reason})
        self.close(code, reason)

    def _hang_up(self) -> None:
        """Half-close: closing at once, with bytes unread, could make the peer's kernel drop our last words."""
        self._listening = False
        if not self._transport.can_write_eof():  # TLS
            self._transport.close()
        elif not self._transport.is_closing():
            self._transport.write_eof()

    def _begin_close(self) -> None:
        if self._open:
            self._open = False
            self._timer = asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)

    def _tell_room(self) -> None:
        if self._open and not self.full:
            self._receiver.room()


_EMPTY_CLOSE: Final = b"\x88\x00"


def _echo(payload: bytes) -> bytes:
    """The close frame that answers one of that payload: the same code, no reason."""
    return close_frame(int.from_bytes(payload[:2], "big")) if payload else _EMPTY_CLOSE


def _show_owed_bytes(transport: asyncio.Transport) -> None:
    """Keep what the peer has not taken yet out of the kernel, whose own buffer can hide megabytes of it."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    sock = transport.get_extra_info("socket")
    if option is not None and sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):  # the peer may be gone already
            sock.setsockopt(socket.IPPROTO_TCP, option, _NOTSENT_BYTES)


class _Nobody:
    """The receiver of a sink that has none yet, or none any more."""

    def received(self, text: str) -> None: ...

    def alive(self) -> None: ...

    def room(self) -> None: ...

    def lost(self) -> None: ...


_NOBODY: Final = _Nobody()


class _GivenAway(asyncio.Transport):
    """What uvicorn's protocol is left with: it ends its ASGI call by closing the transport, and that must not count."""

    def close(self) -> None: ...


_GIVEN_AWAY: Final = _GivenAway()


class BridgeWebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, which lets a route have the transport.

    Offers `scope["extensions"]["realtime_bridge"]["take_over"]`, which is `take_over` below. Besides, no log line of
    this class holds a query string or a header, on any route: they may hold a token.
    """

    _make_receiver: Callable[[Sink], Receiver] | None = None
    _send_buffer_bytes = 0
    _sink: SocketSink | None = None
    _early = b""

    def take_over(self, make_receiver: Callable[[Sink], Receiver], *, send_buffer_bytes: int) -> None:
        """Ask for the transport; to be called before the accept, which then hands it over.

        With the accept the ASGI call has done its work: `make_receiver` was called, messages go to what it returned,
        and for the application the connection is over.
        """
        self._make_receiver = make_receiver
        self._send_buffer_bytes = send_buffer_bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.conn.debug = False  # would log the request as it came

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sink is None:
            super().connection_lost(exc)
        else:  # lost in the moment of the hand-over, which TLS transports tell late
            self._sink.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.handshake_initiated and not self.handshake_complete:
            # The client did not wait for the accept. Who will read this is not decided yet; one read is enough to hold.
            self._early += data
            self.transport.pause_reading()
        else:
            super().data_received(data)

    async def run_asgi(self) -> None:
        app, scope = self.app, self.scope
        extensions = cast("dict[str, Any]", scope["extensions"])
        extensions["realtime_bridge"] = {"take_over": self.take_over}
        self.app = lambda _scope, receive, send: app(scope, receive, send)
        self.scope = {**scope, "query_string": b""}  # the base class logs from here
        await super().run_asgi()
        if self._sink is not None:
            # Open the circles, so that all of the handshake is freed now and not by some later garbage collection.
            del extensions["realtime_bridge"], self.app
            self.conn.parser.close()

    def send(self, message: Any) -> Coroutine[Any, Any, None]:
        return self._accept(message) if message["type"] == "websocket.accept" else super().send(message)

    async def _accept(self, message: Any) -> None:
        if self._make_receiver is None:
            await super().send(message)
            if early := self._take_early():
                super().data_received(early)
            return
        self.conn.extensions = []  # prepared messages are not compressed, nor would the parser inflate
        self.response.headers.pop("Sec-WebSocket-Extensions", None)
        self.ping_interval = None
        await super().send(message)
        if self.transport.is_closing():
            raise ClientDisconnected
        self._give_away(self._make_receiver)

    def _give_away(self, make_receiver: Callable[[Sink], Receiver]) -> None:
        sink = SocketSink(self.transport, self.connections, send_buffer_bytes=self._send_buffer_bytes)
        sink.serve(make_receiver(sink))
        self._sink = sink
        if early := self._take_early():
            self.loop.call_soon(sink.data_received, early)
        self.connections.discard(self)
        self.transport = _GIVEN_AWAY
        self.disconnected = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1005})

    def _take_early(self) -> bytes:
        early, self._early = self._early, b""
        if early:
            self.transport.resume_reading()
        return early


class BridgeHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, by which a bridge in the application hears that the server is being stopped."""

    def shutdown(self) -> None:
        bridge = self.app_state.get("realtime_bridge")
        if bridge is not None:
            bridge.drain()
        super().shutdown()


class RedactQuery(logging.Filter):
    """Takes queries that hold a credential out of log records; meant for `uvicorn.access` and `uvicorn.error`."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_redact(arg) if isinstance(arg, str) else arg for arg in record.args)
        return True


def _redact(text: str) -> str:
    path, mark, query = text.partition("?")
    names = unquote(query).lower()  # decoded, as `%74oken` is a token too
    return f"{path}?[redacted]" if mark and any(name in names for name in _CREDENTIALS) else text
