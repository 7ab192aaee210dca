"""All lose their links at once and come back with their positions: what that asks of the database, and what they get.

Counts are asserted, never times. A herd is gathered for as long as it takes here, so that a slow machine asks no more.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from math import ceil
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection

from realtime_bridge.hub import settler
from tests.bridges import BridgeProcess
from tests.clients import Message, http, open_socket, receive
from tests.integration.test_streams import stream_of
from tests.services import eventually, token
from tests.steady import metric
from tests.worlds import World, world

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

USERS = 600
OF_A_TEAM = 100
TEAMS = USERS // OF_A_TEAM
MISSED = 3
AT_ONCE = 200
ADA = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
SCHEMA = f"""
    create table members (user_id uuid, team int, primary key (user_id, team));
    create policy own on members for select using (user_id = auth.uid());
    create table papers (id serial primary key, team int, title text);
    create policy team on papers for select using (
      team in (select m.team from members m where m.user_id = auth.uid()));
    alter table members replica identity full, enable row level security;
    alter table papers replica identity full, enable row level security;
    grant select on members, papers to authenticated;
    insert into members select ('00000000-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid, n / {OF_A_TEAM}
      from generate_series(0, {USERS - 1}) n;
    insert into members values ('{ADA}', -1);
"""


def gather_patiently() -> None:
    """Wait for those who come, however slowly they do."""
    vars(settler).update(GATHER_SECONDS=0.5, GATHER_MOST_SECONDS=60)


@asynccontextmanager
async def replicas(database: str, namespace: str, redis_url: str, **settings: str) -> AsyncIterator[World]:
    """Two bridges; what is known of a user holds until a membership changes."""
    async with world(
        database,
        namespace,
        SCHEMA,
        ["public.papers"],
        gather_patiently,
        followed=["public.members"],
        redis_url=redis_url,
        BRIDGE_FACT_SECONDS="3600",
        **settings,
    ) as it:
        yield it


class Herd:
    """Users who come together, each with the position that it was told last."""

    def __init__(self, it: World) -> None:
        self._it = it
        self._positions: list[str | None] = [None] * USERS
        self._few = asyncio.Semaphore(AT_ONCE)

    async def come(self, bridge: BridgeProcess) -> list[list[tuple[int, str]]]:
        """Connect all, and cut all once each has been told everything: the papers that each was told of, in order."""
        async with AsyncExitStack() as links:
            sockets = await asyncio.gather(*(self._connect(bridge, user, links) for user in range(USERS)))
            told = await self._it.told(*sockets)
            for user, socket in enumerate(sockets):
                self._positions[user] = await position_of(socket)
        await eventually(lambda: is_left(bridge), 60)
        return [[told_of(message) for message in messages] for messages in told]

    async def _connect(self, bridge: BridgeProcess, user: int, links: AsyncExitStack) -> ClientConnection:
        bearer = token(f"00000000-0000-4000-8000-{user:012}")
        async with self._few:
            link = open_socket(bridge.url, bearer, position=self._positions[user])
            socket = await links.enter_async_context(link)
            assert (await receive(socket, 60))["type"] == "ready"
            return socket


async def position_of(socket: ClientConnection) -> str:
    """Where a client that was told everything stands, as a pong says."""
    await socket.send('{"type":"ping"}')
    while (message := await receive(socket, 60))["type"] != "pong":
        pass
    return str(message["position"])


async def is_left(bridge: BridgeProcess) -> bool:
    return await metric(bridge, "connections") == 0


def told_of(message: Message) -> tuple[Any, Any]:
    assert message["type"] == "INSERT", message
    return message["record"]["team"], message["record"]["title"]


@pytest.mark.parametrize(("replica", "queries"), [(0, 0), (1, ceil(USERS / 500) + 1)])
async def test_a_herd_that_comes_back_asks_for_what_is_not_known_of_it_in_few_questions_and_misses_nothing(
    database: str, namespace: str, redis_url: str, replica: int, queries: int
) -> None:
    async with replicas(database, namespace, redis_url) as it:
        herd = Herd(it)
        assert await herd.come(it.bridge) == [[]] * USERS
        for number in range(MISSED):
            await it.admin.execute(
                "insert into papers (team, title) select team, $1 from generate_series(0, $2) team",
                str(number),
                TEAMS - 1,
            )
        bridge = it.bridges[replica]
        before = await metric(bridge, "fact_queries_total")
        told = await herd.come(bridge)
        assert told == [[(user // OF_A_TEAM, str(number)) for number in range(MISSED)] for user in range(USERS)]
        assert await metric(bridge, "fact_queries_total") - before <= queries
        assert await metric(bridge, "resyncs_total") == 0


class Reader:
    """One user who reads on from its position, each time by another transport, with a new token.

    Attributes:
        told: the titles of the papers it was told of, and the reasons of resyncs.
    """

    def __init__(self, it: World) -> None:
        self._it = it
        self._position = ""
        self._ttl = 3600
        self.told: list[str] = []

    async def read(self, transport: str, bridge: BridgeProcess) -> None:
        self._ttl += 1  # another `exp`, and so another token
        async with asyncio.timeout(30):
            await getattr(self, f"_read_by_{transport}")(bridge)

    async def write(self, title: str) -> None:
        await self._it.admin.execute("insert into papers (team, title) values (-1, $1)", title)

    async def _read_by_socket(self, bridge: BridgeProcess) -> None:
        position = self._position or None
        async with open_socket(bridge.url, token(ADA, ttl=self._ttl), position=position) as socket:
            await receive(socket)
            self._take(*await self._it.told(socket))
            self._position = await position_of(socket)

    async def _read_by_stream(self, bridge: BridgeProcess) -> None:
        async with stream_of(bridge.url, ADA, ttl=self._ttl, last=self._position) as stream:
            await self._it.admin.execute("insert into papers (team, title) values (-1, 'end')")
            messages = []
            while (message := await stream.receive_data()).get("record", {}).get("title") != "end":
                messages.append(message)
            self._take(messages)
            self._position = stream.last_id

    async def _read_by_poll(self, bridge: BridgeProcess) -> None:
        async with http(bridge.url, token(ADA, ttl=self._ttl)) as client:
            given = {"position": self._position} if self._position else {}
            answer = (await client.get("/events", params={"wait": 0, **given})).json()
        self._take(answer["messages"])
        self._position = answer["position"]

    def _take(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if message["type"] == "resync":
                self.told.append(message["reason"])
            elif message["table"] == "papers":
                self.told.append(message["record"]["title"])


@pytest.mark.parametrize("transport", ["socket", "stream", "poll"])
async def test_a_position_is_good_by_every_transport_while_replicas_are_restarted_and_tokens_refreshed(
    database: str, namespace: str, redis_url: str, transport: str
) -> None:
    async with replicas(database, namespace, redis_url) as it:
        first, second = it.bridges
        reader = Reader(it)
        await reader.read(transport, first)
        written = []
        for after in ("socket", "stream", "poll"):
            for bridge, other in ((second, first), (first, second)):
                await reader.write(f"before {bridge.port} {after}")
                await asyncio.to_thread(bridge.stop)
                await reader.write(f"without {bridge.port} {after}")
                bridge.start()
                await bridge.ready()
                await it.met()
                written += [f"before {bridge.port} {after}", f"without {bridge.port} {after}"]
                await reader.read(transport, bridge)
                await reader.write(f"to {other.port} {after}")
                await it.met()
                written.append(f"to {other.port} {after}")
                await reader.read(after, other)
        assert reader.told == written


async def test_a_user_who_sees_nothing_is_told_positions_by_pings_and_so_outlives_the_history(
    database: str, namespace: str, redis_url: str
) -> None:
    settings = {"BRIDGE_PING_SECONDS": "0.2", "BRIDGE_HISTORY_SIZE": "50"}
    async with replicas(database, namespace, redis_url, **settings) as it:
        async with open_socket(it.bridge.url, token(ADA), table="papers") as socket:
            old = str((await receive(socket))["position"])
            for number in range(500):
                await it.admin.execute("insert into papers (team, title) values (0, $1)", str(number))
            await it.met()
            newest = await metric(it.bridge, "entries_total")
            new = old
            while int(new.split("-")[1]) < newest:
                message = await receive(socket)
                assert message["type"] == "ping"
                new = message["position"]
        await it.admin.execute("insert into papers (team, title) values (-1, 'seen')")
        await it.met()
        await asyncio.to_thread(it.bridge.stop)
        it.bridge.start()  # what it serves from now on comes from the history alone
        await it.bridge.ready()
        told = []
        for position in (new, old):
            async with open_socket(it.bridge.url, token(ADA), position=position, table="papers") as socket:
                assert (await receive(socket))["type"] == "ready"
                message = await receive(socket)
                told.append(message.get("reason") or message["record"]["title"])
        assert told == ["seen", "history_gone"]
