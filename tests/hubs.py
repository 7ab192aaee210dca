"""Hubs as they are, over a broker in memory that can be harmed, and readers that write down what they get."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request

from realtime_bridge.broker.base import Sight, Update
from realtime_bridge.broker.memory import MemoryBroker, _wait, _wake
from realtime_bridge.change import Body, Change, Column, Entry, Image, Position, Relation
from realtime_bridge.claims import Claims
from realtime_bridge.errors import BrokerError
from realtime_bridge.filters import Filter
from realtime_bridge.hub.base import Encoding
from realtime_bridge.hub.connection import Connection
from realtime_bridge.hub.hub import Hub
from realtime_bridge.hub.window import Window
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.transports.events import EventsEndpoint
from realtime_bridge.transports.requests import Interest
from tests.services import eventually

Message = dict[str, Any]

ANN, BOB = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
CAL = "c0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
POSTS, NOTES = "public.posts", "public.notes"
COLUMNS = {"id": "int8", "owner": "uuid", "team": "text", "mood": "text"}
RULE = "auth.uid() = owner or team = (auth.jwt() ->> 'team')"


def relation(table: str, *, full: bool = True) -> Relation:
    schema, _, name = table.partition(".")
    return Relation(schema, name, tuple(Column(*c) for c in COLUMNS.items()), (0,), full)


RELATIONS = {table: relation(table) for table in (POSTS, NOTES)}


def row(key: int, owner: str = ANN, team: str = "none", mood: str = "sad") -> Image:
    return str(key), owner, team, mood


def insert(key: int, owner: str = ANN, *, table: str = POSTS, mood: str = "sad") -> Change:
    return Change("INSERT", RELATIONS[table], None, row(key, owner, mood=mood), 0)


def claims(user: str = ANN, team: str = "red") -> Claims:
    return Claims({"role": "authenticated", "sub": user, "team": team}, "authenticated", user, None)


class Reader:
    """A sink that writes down what it gets, and in what circumstances."""

    encoding = Encoding.JSON

    def __init__(self) -> None:
        self.full = False
        self.messages: list[Message] = []
        self.closed: list[int] = []
        self.on_write: Callable[[Message], None] = lambda message: None

    def write(self, messages: Sequence[bytes]) -> None:
        for message in map(orjson.loads, messages):
            self.messages.append(message)
            self.on_write(message)

    def ping(self) -> None: ...

    def close(self, code: int, reason: str = "") -> None:
        self.closed.append(code)

    def abort(self) -> None: ...

    @property
    def keys(self) -> list[int]:
        """Keys of the rows of all data messages."""
        return [(m.get("record") or m["old_record"])["id"] for m in self.messages if m["type"].isupper()]

    @property
    def resyncs(self) -> list[str]:
        return [m["reason"] for m in self.messages if m["type"] == "resync"]


class ForkingBroker(MemoryBroker):
    """A broker in memory that can lose its newest entries as a failover does.

    Attributes:
        recalled: what it was told of users' sights.
    """

    def __init__(self, *, history_size: int = 1000) -> None:
        super().__init__(
            history_size=history_size, history_bytes=1 << 20, history_seconds=3600, row_index_bytes=1 << 20
        )
        self.forks: list[tuple[str, int]] = []
        self.recalled: list[Sight] = []
        self.batch = 500
        self.down = False
        self.cuts_off = False
        self.poison = 0

    async def recall(self, epoch: str, sights: Sequence[Sight]) -> list[int]:
        self.recalled += sights
        return await super().recall(epoch, sights)

    def fork(self, number: int) -> None:
        self.forks.append((self._epoch, number))
        self._epoch = f"epoch{len(self.forks)}"
        for lost in range(number + 1, self._number + 1):
            self._bytes -= self._held.pop(lost).entry.size
        self._number = number
        self._id = self._held[number].entry.id if number in self._held else ""
        self._proven_until = 0.0
        self._appended = _wake(self._appended)

    def lose(self, epoch: str, number: int) -> None:
        """The same without a word to those who follow, and of no epoch that is known."""
        self.fork(number)
        self._epoch = epoch
        self.forks.clear()
        self._sights.clear()

    def _common(self, epoch: str) -> int | None:
        lowest: int | None = None
        for parent, number in reversed(self.forks):
            lowest = number if lowest is None else min(lowest, number)
            if parent == epoch:
                return lowest
        return None

    async def locate(self, position: Position) -> int:
        common = self._common(position.epoch)
        if common is not None:
            position = Position(self._epoch, min(position.number, common))
        return await super().locate(position)

    async def read(self, after: int, *, limit: int = 500, max_bytes: int = 1 << 20) -> list[Entry]:
        if self.down:
            raise BrokerError("down")
        return await self._read(after, limit)

    async def _read(self, after: int, limit: int) -> list[Entry]:
        entries = await super().read(after, limit=limit)
        if any(entry.number == self.poison for entry in entries):
            raise ValueError("written by a later version")
        return entries

    async def _updates(self, number: int) -> AsyncGenerator[Update, None]:
        epoch = self._epoch
        yield Update("entries", epoch, number, (), self._proven_until)
        while True:
            appended = self._appended
            if self.cuts_off:
                self.cuts_off = False
                raise BrokerError("cut off")
            if epoch != self._epoch:
                common = self._common(epoch)
                assert common is not None
                epoch, number = self._epoch, min(number, common)
                yield Update("fork", epoch, number, (), self._proven_until)
                continue
            entries = tuple(await self._read(number, self.batch))
            number += len(entries)
            yield Update("entries", epoch, number, entries, self._proven_until)
            if number == self._number:
                await _wait(appended, 1)


@dataclass
class HubWorld:
    """A hub that runs, with all that belongs to it."""

    hub: Hub
    broker: ForkingBroker
    policy: PolicyEngine
    token: str
    tasks: asyncio.TaskGroup
    task: asyncio.Task[None]

    async def restart(self) -> None:
        """Run the hub again, as whoever runs it does after a fault."""
        self.task.cancel()
        await asyncio.wait([self.task])
        self.task = self.tasks.create_task(self.hub.run())

    async def append(self, *bodies: Body) -> None:
        await self.broker.append(self.token, bodies)

    def open(self, user: str = ANN, team: str = "red") -> tuple[Connection, Reader]:
        reader = Reader()
        return self.hub.open(reader, claims(user, team)), reader

    async def connect(
        self,
        user: str = ANN,
        position: str | None = None,
        *,
        team: str = "red",
        tables: Sequence[str] = (POSTS,),
        id_: str | None = None,
    ) -> tuple[Connection, Reader]:
        connection, reader = self.open(user, team)
        self.hub.subscribe(connection, tables, await self.hub.locate(position), id_=id_)
        return connection, reader

    async def settled(self) -> None:
        """Everybody at the end, and the end where the broker's is."""

        def is_settled() -> bool:
            return self.hub.position == f"{self.broker._epoch}-{self.broker._number}" and self.hub.behind() == 0

        await eventually(is_settled)

    async def fanning_out(self) -> None:
        """In the middle of a fan-out."""
        while not self.hub._standing.turn.locked():
            await passes(1)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Nothing is written meanwhile."""
        async with self.hub._standing.turn:
            yield


async def hub_of(
    broker: MemoryBroker,
    policy: PolicyEngine,
    *,
    resync_seconds: float = 0.0,
    max_connections: int = 100,
    replays: bool = True,
) -> Hub:
    """A hub that does not run yet, with its policy prepared."""
    await policy.prepare()
    return Hub(
        broker,
        policy,
        tables=(POSTS, NOTES),
        max_connections=max_connections,
        max_connections_per_user=max_connections,
        send_buffer_bytes=65_536,
        ping_seconds=25,
        resync_seconds=resync_seconds,
        replays=replays,
    )


@asynccontextmanager
async def running(
    policy: PolicyEngine | None = None,
    *,
    history_size: int = 1000,
    window_size: int = 1000,
    resync_seconds: float = 0.0,
    max_connections: int = 100,
    replays: bool = True,
) -> AsyncIterator[HubWorld]:
    """A hub that runs. Leaving it with every connection closed must leave nothing behind."""
    broker = ForkingBroker(history_size=history_size)
    token = await broker.acquire_lease(ttl=600)
    policy = policy or PolicyEngine([POSTS, NOTES], ["authenticated"], {POSTS: RULE, NOTES: RULE})
    hub = await hub_of(broker, policy, resync_seconds=resync_seconds, max_connections=max_connections, replays=replays)
    hub._standing.window = Window(size=window_size, max_bytes=1 << 20)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(hub.run())
        await hub.begun()
        for user in (ANN, BOB):  # who comes with a position has been here before
            await hub.position_for(claims(user))
        yield (world := HubWorld(hub, broker, policy, token, tasks, task))
        for connection in tuple(hub.connections):
            hub.close(connection)
        assert (hub._standing.directory.count, hub._standing.directory._tables) == (0, {})
        assert (hub._per_user, policy.present) == ({}, 0)
        world.task.cancel()


async def passes(times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


async def poll(
    world: HubWorld,
    user: str,
    position: str | None,
    *,
    limit: int = 500,
    wait: float = 0.0,
    filter_: Filter | None = None,
) -> Message:
    """A long poll, past its request's parsing; of all tables, or with a filter of one."""

    async def receive() -> Any:
        await asyncio.Event().wait()

    request = Request({"type": "http", "method": "GET", "headers": [], "query_string": b""}, receive)
    endpoint = EventsEndpoint(world.hub, None, asyncio.Event(), 65_536)  # type: ignore[arg-type]
    interest = Interest((POSTS, NOTES) if filter_ is None else (POSTS,), position, filter_)
    answer = await endpoint._poll(request, claims(user), interest, wait, limit)
    message: Message = orjson.loads(answer.body)
    return message
