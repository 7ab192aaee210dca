"""`/events`: the same messages for clients without WebSocket, as Server-Sent Events or as a long poll.

A stream is a connection like a WebSocket's that cannot be spoken to.

A long poll is a reader that is advanced by hand: a bounded number of slices, and, if there was nothing, one wait at the
end of the history. Its connection lives as long as the request.

Layer: edges. May import: everything above.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import time
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from realtime_bridge.claims import Claims
from realtime_bridge.errors import BadRequestError, ForbiddenError, UnauthorizedError
from realtime_bridge.hub.base import Encoding, Sink
from realtime_bridge.hub.connection import Connection
from realtime_bridge.hub.hub import Hub
from realtime_bridge.hub.subscription import State, Subscription
from realtime_bridge.transports.opening import begin
from realtime_bridge.transports.requests import Credentials, Interest, accepts_events
from realtime_bridge.transports.streams import EventStream
from realtime_bridge.wire.native import optional_timestamp
from realtime_bridge.wire.sse import retry_event

RETRY_MS: Final = 2000
"""How long a browser waits before it comes back to a broken stream."""
MAX_WAIT_SECONDS: Final = 60.0
MAX_LIMIT: Final = 1000
MAX_SLICES: Final = 20
"""What one poll may examine: so many slices of the history. `more` tells that there is more."""


class Collector:
    """The sink of a long poll: keeps what it is given for the answer.

    Attributes:
        refusal: why what the address asked for cannot be read any further.
    """

    encoding = Encoding.JSON
    full = False

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.refusal: BadRequestError | None = None

    def write(self, messages: Sequence[bytes]) -> None:
        """Keep messages; bounded by what the poll asks for."""
        self.messages += messages

    def ping(self) -> None:
        """Nothing: a poll is over soon."""

    def close(self, code: int, reason: str = "") -> None:
        """Remember a refusal of what was asked for; else nothing: a poll is over soon."""
        if code == 4400:
            self.refusal = BadRequestError(reason)

    def abort(self) -> None:
        """Nothing: a poll is over soon."""


class EventReceiver:
    """One client of a stream: the receiver of its sink."""

    __slots__ = ("_connection", "_hub")

    def __init__(self, hub: Hub, connection: Connection) -> None:
        self._hub = hub
        self._connection = connection

    def received(self, text: str) -> None:
        """Nothing: a stream goes one way."""

    def alive(self) -> None:
        """Remember when something was last heard."""
        self._connection.heard_at = asyncio.get_running_loop().time()

    def room(self) -> None:
        """Have those that wait for room read on."""
        self._hub.room(self._connection)

    def lost(self) -> None:
        """Forget the connection."""
        self._hub.close(self._connection)


@dataclass(frozen=True)
class EventsEndpoint:
    """Serves `/events`.

    Attributes:
        draining: set when the process is being stopped: polls that wait are then answered.
    """

    hub: Hub
    credentials: Credentials
    draining: asyncio.Event
    send_buffer_bytes: int

    async def __call__(self, request: Request) -> Response:
        """Answer one long poll, or begin a stream if the client accepts one.

        Raises:
            BridgeError: mapped to a problem response by the route.
        """
        interest = Interest.parse(request.query_params, self.hub.tables)
        wait = _number(request, "wait", 25.0, MAX_WAIT_SECONDS)
        limit = max(1, int(_number(request, "limit", 500, MAX_LIMIT)))
        stream = accepts_events(request)
        claims = await self.credentials.claims_of(request, stream=stream)
        if claims is None:
            raise UnauthorizedError("missing")
        for table in interest.tables:
            if (refusal := self.hub.refusal(table, claims)) is not None:
                raise ForbiddenError(refusal)
        if interest.filter is not None:
            self.hub.check_filter(interest.filter, interest.tables[0], claims)
        if stream:
            return await self._stream(request, claims, interest)
        return await self._poll(request, claims, interest, wait, limit)

    async def _stream(self, request: Request, claims: Claims, interest: Interest) -> Response:
        """Begin a stream; `Last-Event-ID` wins over the address, since a browser comes back to the same address."""
        self.hub.admit(claims)
        start = await self.hub.locate(request.headers.get("last-event-id") or interest.position, claims)

        def receiver(sink: Sink) -> EventReceiver:
            sink.write([retry_event(RETRY_MS)])
            return EventReceiver(self.hub, begin(self.hub, sink, claims, interest, start))

        return EventStream(receiver, send_buffer_bytes=self.send_buffer_bytes)

    async def _poll(self, request: Request, claims: Claims, interest: Interest, wait: float, limit: int) -> Response:
        start = await self.hub.locate(interest.position, claims)
        collector, news = Collector(), asyncio.Event()
        connection = self.hub.open(collector, claims, lasting=False)
        try:
            subscription = self.hub.subscribe(
                connection, interest.tables, start, filter_=interest.filter, events=interest.events, by_hand=news.set
            )
            if claims.expires_at is not None:
                wait = min(wait, max(0.0, claims.expires_at - time()))
            async with _unless_gone(request) as gone:
                more = await self._read(subscription, collector, limit)
                until = asyncio.get_running_loop().time() + wait
                while not (collector.messages or more or collector.refusal or gone.is_set() or self.draining.is_set()):
                    left = until - asyncio.get_running_loop().time()
                    if left <= 0:
                        break
                    await _first(news, self.draining, gone, timeout=left)
                    news.clear()
                    more = await self._read(subscription, collector, limit)
            if collector.refusal is not None and not collector.messages:
                raise collector.refusal
            return self._answer(collector, connection, more)
        finally:
            self.hub.close(connection)

    async def _read(self, subscription: Subscription, collector: Collector, limit: int) -> bool:
        """Advance until something was found and read to the end or to the limit; whether there is more."""
        for _ in range(MAX_SLICES):
            left = limit - len(collector.messages)
            if subscription.state is not State.BEHIND or left <= 0:
                break
            await self.hub.advance(subscription, most=left)
        return subscription.state is State.BEHIND

    def _answer(self, collector: Collector, connection: Connection, more: bool) -> Response:
        complete_until = optional_timestamp(self.hub.complete_until) if self.hub.at_end(connection) else None
        body = b'{"messages":[%b],"position":"%b","more":%b,"complete_until":%b}' % (
            b",".join(collector.messages),
            self.hub.position_of(connection).encode(),
            b"true" if more else b"false",
            b"null" if complete_until is None else f'"{complete_until}"'.encode(),
        )
        headers = {"Cache-Control": "no-store"}
        return Response(body, media_type="application/json", headers=headers)


def _number(request: Request, name: str, default: float, most: float) -> float:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.replace(".", "", 1).isascii() or not text.replace(".", "", 1).isdigit():
        raise BadRequestError(f"{name}: a number from 0 to {most:g}")
    return min(float(text), most)


@asynccontextmanager
async def _unless_gone(request: Request) -> AsyncIterator[asyncio.Event]:
    """An event that is set when the client gives the request up."""
    gone = asyncio.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(watch())
        yield gone
        task.cancel()


async def _first(*events: asyncio.Event, timeout: float) -> None:
    """Wait until one of the events is set, or until the time is over."""
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(event.wait()) for event in events]
        await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
