"""The fast path: uvicorn does the handshake, the route accepts, and then the socket is ours alone.

An ASGI call that lasts as long as its client costs a task, a queue, the request and the handshake for every idle one,
and a walk through all of it for every message. Here the route ends with the accept of a WebSocket, or the start of a
response of Server-Sent Events, and one small object per client keeps the transport: a delivery is one `transport.write`
of a prepared message. Use it with

    uvicorn --ws realtime_bridge.transports.uvicorn_protocol:BridgeWebSocketProtocol
            --http realtime_bridge.transports.uvicorn_protocol:BridgeHttpProtocol

Routes that do not ask for the takeover (`transports.sockets` and `transports.streams` do) notice nothing of it.

Layer: edges. May import: hub.base, transports.transport_sinks.
Sources: asyncio's transports and protocols; uvicorn 0.54.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final, cast
from urllib.parse import unquote
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from realtime_bridge.hub.base import Receiver, Sink
from realtime_bridge.transports import transport_sinks
from realtime_bridge.transports.transport_sinks import EventSink, SocketSink, drop_unacknowledged, tell_of_shutdown

_CREDENTIALS: Final = ("token", "ticket", "apikey")


_LARGEST_HEAD: Final = 64 * 1024
_HEAD_SECONDS: Final = 10.0
A_TURN: Final = 8
"""New clients in one turn of the loop; each costs about a millisecond."""
_TOO_LARGE: Final = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


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
            if self.conn.handshake_exc is not None and not self.handshake_initiated:
                # A line or a head too large to be parsed: uvicorn would wait for the rest for ever.
                self.transport.write(_TOO_LARGE)
                self.transport.close()

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
        sink = SocketSink(self.transport, self.connections, self.app_state, send_buffer_bytes=self._send_buffer_bytes)
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


class Turnstile:
    """Lets new clients in, a few in each turn of the loop: thousands who come together hold up nobody who is in."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._left = A_TURN
        self._waiting: deque[Callable[[], None]] = deque()

    def enter(self, take_in: Callable[[], None]) -> bool:
        """Take a client in: now, or when it is its turn; returns whether it was now."""
        if not self._left or self._waiting:
            self._waiting.append(take_in)
            return False
        self._count()
        take_in()
        return True

    def _count(self) -> None:
        if self._left == A_TURN:
            self._loop.call_soon(self._turn)
        self._left -= 1

    def _turn(self) -> None:
        self._left = A_TURN
        while self._left and self._waiting:
            self._count()
            self._waiting.popleft()()


_TURNSTILES: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, Turnstile]] = WeakKeyDictionary()


class BridgeHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which lets a route have the transport for the body of its response.

    Offers `scope["extensions"]["realtime_bridge"]["take_over"]` as `BridgeWebSocketProtocol` does: to be called before
    the response is started; with its start, after whatever middleware adds to the headers, the transport is handed
    over, and the ASGI call has done its work. The body has no length and no chunks: its end is the end of the link.

    Besides, it tells a bridge in the application when the server is being stopped, bounds a request's head, which
    httptools takes in without end, drops a client that takes nothing of its answer, and lets new clients in one after
    the other where thousands come at once.
    """

    _head = 0
    _head_timer: asyncio.TimerHandle | None = None
    _is_in = False

    def connection_made(  # type: ignore[override]  # as in the base class
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        drop_unacknowledged(transport, transport_sinks.UNACKNOWLEDGED_SECONDS)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in what a client says; a new one waits for its turn, in which time it is neither read from nor late."""
        if self._is_in:
            self._take_in(data)
            return
        self._is_in = True
        turnstile = _TURNSTILES.get(self.loop) or _TURNSTILES.setdefault(self.loop, Turnstile(self.loop))
        if not turnstile.enter(partial(self._let_in, data)):
            self._head_is_over()
            self.transport.pause_reading()

    def _let_in(self, data: bytes) -> None:
        if self._head_timer is None:  # it had to wait
            if self.transport.is_closing():
                return
            self._expect_head()
            self.transport.resume_reading()
        self._take_in(data)

    def _take_in(self, data: bytes) -> None:
        self._head += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head > _LARGEST_HEAD and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:  # a further request on the same connection
            self._head = 0
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_is_over()
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

    def _head_is_over(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def shutdown(self) -> None:
        tell_of_shutdown(self.app_state)
        super().shutdown()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _Offer(self, cycle, app))

    def give_away(
        self, cycle: RequestResponseCycle, make_receiver: Callable[[Sink], Receiver], send_buffer_bytes: int
    ) -> None:
        """Leave the transport to an `EventSink`; called once the head of the response is written."""
        sink = EventSink(self.transport, self.connections, self.app_state, send_buffer_bytes=send_buffer_bytes)
        sink.serve(make_receiver(sink))
        cycle.response_complete = True
        cycle.message_event.set()
        self.connections.discard(self)
        self._unset_keepalive_if_required()
        self.transport = cycle.transport = _GIVEN_AWAY


class _Offer:
    """An application that is offered the takeover with one request."""

    __slots__ = ("_app", "_cycle", "_protocol", "_wanted")

    def __init__(self, protocol: BridgeHttpProtocol, cycle: RequestResponseCycle, app: Any) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._app = app
        self._wanted: tuple[Callable[[Sink], Receiver], int] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def passing_on(message: Any) -> None:
            if self._cycle.transport is _GIVEN_AWAY:
                return  # what middleware still says of a body that is not its own any more
            await send(message)
            if self._wanted is not None and message["type"] == "http.response.start":
                if self._cycle.disconnected:
                    return
                self._protocol.give_away(self._cycle, *self._wanted)

        scope.setdefault("extensions", {})["realtime_bridge"] = {"take_over": self._take_over}
        await self._app(scope, receive, passing_on)

    def _take_over(self, make_receiver: Callable[[Sink], Receiver], *, send_buffer_bytes: int) -> None:
        self._wanted = make_receiver, send_buffer_bytes
        self._cycle.chunked_encoding = False
        self._cycle.keep_alive = False


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
