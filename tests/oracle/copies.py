"""Clients on every transport, as users would write them: each folds what it is told into a copy and obeys `resync`.

They go away after a while, rudely or not, and come back to any bridge with the position that they have. Whatever they
are told is also put down, together with how much had been committed by then, for the judge.
"""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import ClassVar, Final, NoReturn
from urllib.parse import urlencode

import httpx
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage

from tests.clients import Message, bearer, http, open_socket, read_posts, receive
from tests.oracle.truth import close, open_connection, read_as
from tests.oracle.world import Key, Row, Tables, User, key_of
from tests.oracle.writer import LOST

OPEN_SECONDS: Final = 3.0
"""Without an answer for so long, a bridge counts as gone."""
QUIET_SECONDS: Final = 5.0
"""The same for a link on which nothing comes, though it is pinged every second."""
_LINK_LOST: Final = (
    OSError,
    EOFError,
    TimeoutError,
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    httpx.TransportError,
)
_COME_BACK: Final = frozenset({1000, 1001, 1006, 1011, 1012, 1013, 4408})
"""Codes with which a link may end that is begun again: see docs/protocol.md."""
_STAYS: Final = ((0.2, 1.0), (0.5, 3.0), (5.0, 15.0))
"""Seconds from and up to which a link lasts, one pair or another."""


@dataclass(frozen=True)
class Told:
    """A message as it was received.

    Attributes:
        link: number of the link on which it came; a position was handed in when that was begun.
        begun: `Truth.begun` when it came: later commits cannot have had a part in it.
        at: when it came.
    """

    link: int
    begun: int
    message: Message
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


class RefusedError(Exception):
    """A bridge has refused what it should have answered."""


class Copy:
    """A user's copy of all tables that the user may ask for.

    Args:
        doors: addresses of the bridges.
        dsn: the database, to read tables as the user.
        begun: see `Told`.

    Attributes:
        name: for people.
        told: what came since the judge has last looked.
        resumed: how often a position that was handed in was gone on from, without a resync.
        lost_at: when a link last broke that was not broken here; in the loop's time.
    """

    transport: ClassVar[str]

    def __init__(self, user: User, doors: Sequence[str], dsn: str, begun: Callable[[], int], seed: int) -> None:
        self.name = f"{user.name}/{self.transport}"
        self.user = user
        self.rows: Tables = {table: {} for table in user.tables}
        self.told: list[Told] = []
        self.resumed = 0
        self.lost_at = 0.0
        self._doors = doors
        self._dsn = dsn
        self._begun = begun
        self._random = random.Random(seed)
        self._position: str | None = None
        self._one_table = user.tables[0] if len(user.tables) == 1 else None
        self._link = 0
        self._is_resuming = False

    @property
    def has_begun(self) -> bool:
        """Whether it has read the tables for the first time."""
        return self._position is not None

    async def run(self) -> None:
        """Follow, go away, and come back, for ever."""
        while True:
            self._link += 1
            self._is_resuming = self._position is not None
            try:
                await self._follow(self._random.choice(self._doors), self._random.uniform(*self._random.choice(_STAYS)))
            except RefusedError as error:
                error.add_note(self.name)
                raise
            except _LINK_LOST:
                self.lost_at = asyncio.get_running_loop().time()
                await asyncio.sleep(self._random.uniform(0.01, 0.1))

    async def _follow(self, door: str, seconds: float) -> None:
        """Read a link of that transport, for so long at most."""
        raise NotImplementedError

    # -- folding

    async def _take(self, message: Message) -> None:
        """Fold a message: see docs/protocol.md. Never interrupted by a link that ends."""
        self.told.append(Told(self._link, self._begun(), message))
        kind = message["type"]
        if kind == "error":
            _come_back_or_raise(message["code"], message["detail"])
        elif kind == "resync":
            self._is_resuming = False
            await asyncio.sleep(message["after_ms"] / 1000)
            await self._read(concerned(message, self.user))
        elif kind.isupper():
            self._fold(message)
        if "position" in message:
            self._move(message)
        if kind != "ready" and self._is_resuming:
            self._is_resuming, self.resumed = False, self.resumed + 1

    def _fold(self, message: Message) -> None:
        table = f"{message['schema']}.{message['table']}"
        rows, old, new = self.rows[table], message.get("old_record"), message.get("record")
        before = {} if old is None else rows.pop(key_of(table, old), {})
        if new is not None:
            key = key_of(table, new)
            rows[key] = {**rows.get(key, {}), **before, **new} if message["type"] == "UPDATE" else new

    def _move(self, message: Message) -> None:
        """Remember where to go on from."""
        self._position = message["position"]

    async def _start(self, position: str, tables: Sequence[str]) -> None:
        """Read tables for the first time: what follows the position is told."""
        self.told.append(Told(self._link, self._begun(), {"type": "start", "tables": tables}))
        await self._read(tables)
        self._position = position

    async def _read(self, tables: Sequence[str]) -> None:
        """Read tables as the user, until that succeeds: posts from a bridge, now and then."""
        for table in tables:
            while True:
                try:
                    self.rows[table] = await self._read_one(table)
                except (*LOST, httpx.HTTPError):
                    await asyncio.sleep(0.05)
                else:
                    break

    async def _read_one(self, table: str) -> dict[Key, Row]:
        if table == "public.posts" and self._random.random() < 0.5:
            async with asyncio.timeout(OPEN_SECONDS):
                rows, _ = await read_posts(self._random.choice(self._doors), self.user.token)
            return {(key,): row for key, row in rows.items()}
        connection = await open_connection(self._dsn)
        try:
            return await read_as(connection, self.user, table)
        finally:
            await close(connection)


def concerned(resync: Message, user: User) -> Sequence[str]:
    """The tables that a `resync` is about: of all tables it means those of its subscriptions, which are named so."""
    every: Sequence[str] = resync.get("subscriptions", user.tables)
    return every if resync["table"] == "*" else [resync["table"]]


class SocketCopy(Copy):
    """Follows a WebSocket; all tables are subscribed to by its address."""

    transport = "websocket"

    async def _follow(self, door: str, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        async with (
            asyncio.timeout(OPEN_SECONDS) as limit,
            open_socket(door, self.user.token, **self._query()) as socket,
        ):
            try:
                ready = await _receive(socket, OPEN_SECONDS)
                limit.reschedule(None)
                await self._begin(socket, ready)
                while (left := until - loop.time()) > 0:
                    await self._take(await _receive(socket, min(left, QUIET_SECONDS)))
                    if self._random.random() < 0.1:
                        await socket.send('{"type":"ping"}')
            except TimeoutError:
                if loop.time() < until:
                    raise
            finally:
                await self._leave(socket)

    async def _leave(self, socket: ClientConnection) -> None:
        if self._random.random() < 0.5:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await socket.close()
        socket.transport.abort()

    def _query(self) -> dict[str, str | None]:
        return {"position": self._position, "table": self._one_table}

    async def _begin(self, socket: ClientConnection, ready: Message) -> None:
        if self._position is None:
            await self._start(ready["position"], self.user.tables)
        else:
            await self._take(ready)


async def _receive(socket: ClientConnection, seconds: float) -> Message:
    """The next message.

    Raises:
        RefusedError: the link has ended in a way after which a client must not come back.
    """
    try:
        return await receive(socket, seconds)
    except ConnectionClosed as closed:
        if closed.rcvd is None:
            raise
        return _come_back_or_raise(closed.rcvd.code, closed.rcvd.reason)


def _come_back_or_raise(code: int, reason: str) -> NoReturn:
    """End a link as a bridge has told, or one of its subscriptions, in `EOFError` if a client may come back."""
    if code in _COME_BACK:
        raise EOFError
    raise RefusedError(f"{code}: {reason}")


class SubscribingCopy(SocketCopy):
    """Follows a WebSocket on which it subscribes to each table by a message of its own, from a position of its own."""

    transport = "subscriptions"

    def __init__(self, user: User, doors: Sequence[str], dsn: str, begun: Callable[[], int], seed: int) -> None:
        super().__init__(user, doors, dsn, begun, seed)
        self._positions: dict[str, str] = {}  # by table
        self._subscribed: set[str] = set()

    @property
    def has_begun(self) -> bool:
        return len(self._positions) == len(self.user.tables)

    def _query(self) -> dict[str, str | None]:
        return {"table": ""}

    async def _begin(self, socket: ClientConnection, ready: Message) -> None:
        self._subscribed.clear()
        self._is_resuming = bool(self._positions)
        for table in self.user.tables:
            begin = {"position": self._positions[table]} if table in self._positions else {}
            await socket.send(json.dumps({"type": "subscribe", "id": table, "table": table, **begin}))

    async def _take(self, message: Message) -> None:
        if message["type"] == "subscribed":
            table, position = message["id"], message["position"]
            self._subscribed.add(table)
            if table not in self._positions:
                await self._start(position, [table])
            self._positions[table] = position
        else:
            await super()._take(message)

    def _move(self, message: Message) -> None:
        if message["type"] == "pong" and "complete_until" not in message:
            return  # some of them are behind, and others are not
        moved = message.get("subscriptions", self._subscribed)
        self._positions.update({table: message["position"] for table in moved if table in self._subscribed})


class StreamCopy(Copy):
    """Follows an event stream, and comes back with the id of the last event, as browsers do."""

    transport = "stream"

    async def _follow(self, door: str, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        async with self._events(door) as events:
            while (left := until - loop.time()) > 0:
                try:
                    async with asyncio.timeout(left):
                        message = await anext(events)
                except TimeoutError:
                    return
                if message["type"] == "ready" and self._position is None:
                    await self._start(message["position"], self.user.tables)
                else:
                    await self._take(message)

    @asynccontextmanager
    async def _events(self, door: str) -> AsyncIterator[AsyncIterator[Message]]:
        headers = {**bearer(self.user.token), "Accept": "text/event-stream"}
        if self._position is not None:
            headers["Last-Event-ID"] = self._position
        query = "" if self._one_table is None else f"?table={self._one_table}"
        async with (
            httpx.AsyncClient(timeout=httpx.Timeout(OPEN_SECONDS, read=QUIET_SECONDS), verify=False) as client,
            client.stream("GET", f"{door}/events{query}", headers=headers) as response,
        ):
            await _refuse(response)
            async with aclosing(_parsed(response.aiter_lines())) as events:
                yield events


async def _parsed(lines: AsyncIterator[str]) -> AsyncGenerator[Message, None]:
    """The messages of a stream. Where it stops in between, it has ended."""
    data, id_ = "", ""
    async for line in lines:
        name, _, value = line.partition(": ")
        if name == "data":
            data = value
        elif name == "id":
            id_ = value
        elif not line and data:
            message: Message = json.loads(data)
            assert message.get("position", "") == id_, f"id {id_} of {message}"
            yield message
            data, id_ = "", ""
    raise EOFError


class PollCopy(Copy):
    """Polls, with limits that cut answers, and now and then gives up in the middle of one."""

    transport = "long poll"

    async def _follow(self, door: str, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        async with http(door, self.user.token) as client:
            while loop.time() < until:
                await self._poll(client, self._random.choice([0.0, 0.2, 1.0, 3.0]), self._random.choice([1, 7, 500]))

    async def _poll(self, client: httpx.AsyncClient, wait: float, limit: int) -> None:
        patience = wait + OPEN_SECONDS if self._random.random() < 0.8 else self._random.uniform(0, wait)
        given: dict[str, object] = {"wait": wait, "limit": limit, "position": self._position, "table": self._one_table}
        query = urlencode({name: value for name, value in given.items() if value is not None})
        try:
            async with asyncio.timeout(patience):
                answer = await client.get(f"/events?{query}")
        except TimeoutError:
            if patience < wait:
                return
            raise
        await _refuse(answer)
        body = answer.json()
        if self._position is None:
            await self._start(body["position"], self.user.tables)
            return
        for message in body["messages"]:
            await self._take(message)
        until = {} if body["complete_until"] is None else {"complete_until": body["complete_until"]}
        await self._take({"type": "polled", "position": body["position"], **until})


async def _refuse(answer: httpx.Response) -> None:
    """Raise for an answer that is none.

    Raises:
        EOFError: it may be asked for again.
        RefusedError: it must not.
    """
    if answer.status_code == 503:
        raise EOFError
    if answer.status_code != 200:
        raise RefusedError(f"answered with {answer.status_code}: {(await answer.aread()).decode()}")


TRANSPORTS: Final = (SocketCopy, StreamCopy, PollCopy, SubscribingCopy)
