"""`/ws`: the bridge's own protocol over a WebSocket.

Translates and nothing else: what a client says becomes calls of the hub, what the hub writes goes out as it is.

Layer: edges. May import: everything above.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import orjson
from starlette.websockets import WebSocket

from realtime_bridge.claims import Claims
from realtime_bridge.errors import BadRequestError, BridgeError, ForbiddenError, TooManyRequestsError, UnauthorizedError
from realtime_bridge.filters import parse_filter
from realtime_bridge.hub.base import Sink
from realtime_bridge.hub.connection import Connection
from realtime_bridge.hub.hub import Hub, Start
from realtime_bridge.transports.opening import begin
from realtime_bridge.transports.requests import Credentials, Interest, bearer_subprotocol, parse_events, parse_table
from realtime_bridge.transports.sockets import refuse_socket, serve_socket
from realtime_bridge.wire import native

logger = logging.getLogger(__name__)

AUTH_SECONDS: Final = 10.0
"""Time for the first message of a client that came without a token."""
MAX_COLUMNS: Final = 100
MESSAGES_PER_SECOND: Final = 20.0
MESSAGES_AT_ONCE: Final = 200
"""What a client may say: a bucket of so many messages that fills up again at that rate."""

Spawn = Callable[[Coroutine[Any, Any, None]], None]


@dataclass(frozen=True)
class WebSocketEndpoint:
    """Serves `/ws`.

    Attributes:
        allowed: whether an Origin header may connect to a host.
        spawn: runs a short piece of work in the bridge's own task group.
    """

    hub: Hub
    credentials: Credentials
    allowed: Callable[[str | None, str | None], bool]
    spawn: Spawn
    send_buffer_bytes: int

    async def __call__(self, websocket: WebSocket) -> None:
        """Refuse by accepting and closing, since a browser hides an HTTP status; else serve until the link ends."""
        subprotocol, _ = bearer_subprotocol(websocket)
        try:
            if not self.allowed(websocket.headers.get("origin"), websocket.headers.get("host")):
                raise ForbiddenError("origin not allowed")
            interest = Interest.parse(websocket.query_params, self.hub.tables)
            claims = await self.credentials.claims_of(websocket)
            self.hub.admit(claims)
            start = await self.hub.locate(interest.position, claims)
        except BridgeError as error:
            logger.info("connection refused", extra={"code": error.close_code, "reason": error.detail})
            await refuse_socket(websocket, error.close_code, error.detail, subprotocol=subprotocol)
            return
        await serve_socket(
            websocket,
            lambda sink: NativeSocket(self, sink, interest, start, claims),
            send_buffer_bytes=self.send_buffer_bytes,
            subprotocol=subprotocol,
        )


class NativeSocket:
    """One client of `/ws`: the receiver of its sink."""

    __slots__ = (
        "_allowance",
        "_connection",
        "_endpoint",
        "_gone",
        "_inbox",
        "_interest",
        "_said_at",
        "_sink",
        "_start",
        "_timer",
    )

    def __init__(
        self,
        endpoint: WebSocketEndpoint,
        sink: Sink,
        interest: Interest,
        start: Start,
        claims: Claims | None,
    ) -> None:
        self._endpoint = endpoint
        self._sink = sink
        self._interest: Interest | None = interest
        self._start = start
        self._connection: Connection | None = None
        self._inbox: deque[str] | None = None
        self._gone = False
        self._allowance = float(MESSAGES_AT_ONCE)
        loop = asyncio.get_running_loop()
        self._said_at = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        if claims is None:
            endpoint.hub.strangers.add(self)
            self._timer = loop.call_later(AUTH_SECONDS, sink.close, 4408, "no auth message in 10 s")
        else:
            loop.call_soon(self._open, claims)

    # -- what the sink tells -------------------------------------------------------------------------------------------

    def received(self, text: str) -> None:
        """Take a message in; messages of one client are answered one after the other."""
        self.alive()
        if not self._may_speak():
            self._refuse(TooManyRequestsError("too many messages"))
        elif self._inbox is not None:
            self._inbox.append(text)
        else:
            self._inbox = deque((text,))
            self._endpoint.spawn(self._answer())

    def alive(self) -> None:
        """Remember when something was last heard."""
        if self._connection is not None:
            self._connection.heard_at = asyncio.get_running_loop().time()

    def room(self) -> None:
        """Have those that wait for room read on."""
        if self._connection is not None:
            self._endpoint.hub.room(self._connection)

    def lost(self) -> None:
        """Forget the connection."""
        self._gone = True
        self._endpoint.hub.strangers.discard(self)
        self._known()
        if self._inbox is not None:
            self._inbox.clear()
        if self._connection is not None:
            self._endpoint.hub.close(self._connection)
            self._connection = None

    # -- answering -----------------------------------------------------------------------------------------------------

    def _may_speak(self) -> bool:
        now = asyncio.get_running_loop().time()
        self._allowance = min(MESSAGES_AT_ONCE, self._allowance + (now - self._said_at) * MESSAGES_PER_SECOND) - 1
        self._said_at = now
        return self._allowance >= 0

    def _refuse(self, error: BridgeError) -> None:
        logger.info("connection refused", extra={"code": error.close_code, "reason": error.detail})
        self._sink.close(error.close_code, error.detail)

    async def _answer(self) -> None:
        assert self._inbox is not None, "spawned with something to answer"
        try:
            while self._inbox:
                await self._handle(self._inbox.popleft())
        except BridgeError as error:
            self._refuse(error)
        except Exception:  # a fault of ours: better the client comes back than waits for an answer
            logger.exception("answering a client failed")
            self._sink.close(1011, "internal error")
        finally:
            self._inbox = None

    async def _handle(self, text: str) -> None:
        try:
            message = orjson.loads(text)
        except orjson.JSONDecodeError:
            raise BadRequestError("message is not JSON") from None
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "auth":
            await self._authenticate(message.get("token"))
        elif self._connection is None:
            raise UnauthorizedError("the first message must be auth")
        elif kind == "subscribe":
            await self._subscribe(self._connection, message)
        elif kind == "unsubscribe":
            await self._unsubscribe(self._connection, message)
        elif kind == "ping":
            self._pong(self._connection)
        else:
            raise BadRequestError("type: auth, subscribe, unsubscribe or ping")

    async def _authenticate(self, token: object) -> None:
        if not isinstance(token, str):
            raise UnauthorizedError("auth without a token")
        claims = await self._endpoint.credentials.verify(token)
        if self._connection is not None:
            await self._endpoint.hub.reauthenticate(self._connection, claims)
            return
        self._known()
        if self._start.fresh:
            self._start = await self._endpoint.hub.locate(None, claims)
        self._open(claims)

    def _known(self) -> None:
        """The client has said who it is: nobody waits for that any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _open(self, claims: Claims) -> None:
        if self._gone:
            return
        self._endpoint.hub.strangers.discard(self)
        assert self._interest is not None, "a connection is opened once"
        interest, self._interest = self._interest, None
        try:
            self._connection = begin(self._endpoint.hub, self._sink, claims, interest, self._start)
        except BridgeError as error:
            self._refuse(error)

    async def _subscribe(self, connection: Connection, message: dict[str, Any]) -> None:
        hub = self._endpoint.hub
        id_ = message.get("id")
        try:
            if not isinstance(id_, str) or not 1 <= len(id_) <= 64:
                raise BadRequestError("id: a text of 1 to 64 characters")
            table = parse_table(message.get("table"), hub.tables)
            if (refusal := hub.refusal(table, connection.claims)) is not None:
                raise ForbiddenError(refusal)
            filter_text, columns = message.get("filter"), message.get("columns")
            if filter_text is not None and not isinstance(filter_text, str):
                raise BadRequestError("filter: a text")
            position = message.get("position")
            if position is not None and not isinstance(position, str):
                raise BadRequestError("position: a text")
            start = await hub.locate(position, connection.claims)
            if self._connection is None:
                return  # it was lost meanwhile
            events, shown = parse_events(message.get("events")), _columns(columns)
            filter_ = parse_filter(filter_text) if filter_text else None
            if filter_ is not None:
                hub.check_filter(filter_, table, connection.claims)
            hub.subscribe(connection, (table,), start, id_=id_, filter_=filter_, events=events, columns=shown)
        except BridgeError as error:
            shown_id = id_ if isinstance(id_, str) else None
            connection.send(native.error(error.close_code, error.detail, shown_id))
        else:
            connection.send(native.subscribed(id_, table, hub.position_at(start)))

    async def _unsubscribe(self, connection: Connection, message: dict[str, Any]) -> None:
        id_ = message.get("id")
        if not isinstance(id_, str) or not await self._endpoint.hub.unsubscribe(connection, id_):
            connection.send(native.error(4400, "id: no such subscription", id_ if isinstance(id_, str) else None))
        else:
            connection.send(native.unsubscribed(id_))

    def _pong(self, connection: Connection) -> None:
        hub = self._endpoint.hub
        position = hub.position_of(connection)
        complete_until = hub.complete_until if hub.at_end(connection) else None
        connection.send(native.pong(position, complete_until), position)


def _columns(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise BadRequestError("columns: a list of texts")
    if len(value) > MAX_COLUMNS:
        raise BadRequestError(f"columns: at most {MAX_COLUMNS}")
    return tuple(dict.fromkeys(value)) or None
