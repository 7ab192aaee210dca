"""Sources that bring no old row: rows that leave and DELETEs reach exactly those who could see the row."""

import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
import httpx
import orjson
import pytest
from websockets.asyncio.client import ClientConnection

from realtime_bridge.dev.supabase import LocalSupabase
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import Message, open_socket, receive, receive_data
from tests.contract.test_broker_forks import store_of
from tests.services import SECRET, eventually, token

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

ADA, BOB = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
SERVICE_KEY = token(None, role="service_role")
RULES = orjson.dumps({"public.posts": "user_id = auth.uid() or is_public"}).decode()

SOURCES = ["postgres", "supabase"]
BROKERS = ["memory", "redis"]


@dataclass
class Scene:
    """A table without REPLICA IDENTITY FULL, bridges that read it, and two users."""

    connection: "asyncpg.Connection[asyncpg.Record]"
    bridges: list[BridgeProcess]
    sockets: AsyncExitStack

    async def insert(self, title: str, *, public: bool = False, body: str = "") -> int:
        sql = "insert into posts (user_id, title, is_public, body) values ($1, $2, $3, $4) returning id"
        return int(await self.connection.fetchval(sql, ADA, title, public, body))

    async def publish(self, row: int, *, public: bool) -> None:
        await self.connection.execute("update posts set is_public = $2 where id = $1", row, public)

    async def delete(self, row: int) -> None:
        await self.connection.execute("delete from posts where id = $1", row)

    async def listen(self, bridge: BridgeProcess) -> tuple[ClientConnection, ClientConnection]:
        """Sockets of Ada, who owns every row, and of Bob, who sees the public ones."""
        ada, bob = [await self.sockets.enter_async_context(open_socket(bridge.url, token(sub))) for sub in (ADA, BOB)]
        for socket in (ada, bob):
            assert (await receive(socket))["type"] == "ready"
        return ada, bob

    async def seeded(self, bridge: BridgeProcess, times: int = 1) -> None:
        """Wait until the table was read so many times, and what is committed from now on is later than that."""
        await eventually(lambda: bridge.log.count("row index seeded") >= times, 30)
        now = await self.connection.fetchval("select clock_timestamp()")
        later = "select clock_timestamp() > $1::timestamptz + interval '1.1 s'"
        await eventually(partial(self.connection.fetchval, later, now))


@asynccontextmanager
async def scene(
    database: str,
    namespace: str,
    source: str,
    given: Mapping[str, str] | None = None,
    *,
    dsn: str | None = None,
    bridges: int = 1,
) -> AsyncIterator[Scene]:
    """Bridges that are not started yet: rows inserted before are known to them from reading the table alone.

    `given` are settings beside the usual ones, `dsn` is what the bridges know in place of the database.
    """
    slot = namespace.replace("-", "_")
    settings = {"BRIDGE_NAMESPACE": namespace, "BRIDGE_SLOT": slot, "BRIDGE_RESYNC_SECONDS": "0.1", **(given or {})}
    async with AsyncExitStack() as stack:
        connection = await asyncpg.connect(database)
        stack.push_async_callback(connection.close)
        await connection.execute("alter table posts replica identity default")
        if source == "supabase":
            supabase = LocalSupabase(database, jwt_secret=SECRET, service_key=SERVICE_KEY, anon_key="anon")
            await stack.enter_async_context(supabase)
            settings |= {"SUPABASE_URL": supabase.url, "SUPABASE_KEY": SERVICE_KEY}
        else:
            await ensure_publication(database, PUBLICATION, ["public.posts"])
        processes = [BridgeProcess(database if dsn is None else dsn, **settings) for _ in range(bridges)]
        yield Scene(connection, processes, stack)


async def metric(bridge: BridgeProcess, name: str) -> float:
    async with httpx.AsyncClient() as client:
        page = (await client.get(f"{bridge.url}/metrics")).text
    found = re.search(rf"^realtime_bridge_{name} (\S+)$", page, re.M)
    assert found is not None, page
    return float(found[1])


def assert_resync(message: Message) -> None:
    """That there may be something to read, and not a word of what."""
    assert message.keys() == {"type", "table", "reason", "position", "after_ms"}
    assert (message["type"], message["table"], message["reason"]) == ("resync", "public.posts", "visibility_changed")


async def story(socket: ClientConnection) -> list[tuple[Any, ...]]:
    """What a user is sent until a row titled `end` arrives: type, key, and whether it has only left."""
    told: list[tuple[Any, ...]] = []
    while True:
        message = await receive_data(socket, 30)
        row = message.get("record") or message.get("old_record") or {}
        if row.get("title") == "end":
            return told
        told.append((message["type"], *([row["id"]] if row else []), *(["left"] if message.get("left") else [])))


@pytest.mark.parametrize("broker_name", BROKERS)
@pytest.mark.parametrize("source", SOURCES)
async def test_what_is_gone_is_told_to_those_who_saw_it_and_to_nobody_else(
    source: str, broker_name: str, database: str, namespace: str, request: pytest.FixtureRequest
) -> None:
    settings = {"REDIS_URL": request.getfixturevalue("redis_url")} if broker_name == "redis" else {}
    async with scene(database, namespace, source, settings) as stage:
        [bridge] = stage.bridges
        own, shared = await stage.insert("own"), await stage.insert("shared", public=True)
        async with bridge:
            await stage.seeded(bridge)
            ada, bob = await stage.listen(bridge)
            # Rows known from reading the table,
            await stage.delete(own)
            await stage.publish(shared, public=False)
            await stage.publish(shared, public=True)
            await stage.delete(shared)
            # and rows known from their own changes.
            mine, ours = await stage.insert("mine"), await stage.insert("ours", public=True)
            await stage.delete(mine)
            await stage.publish(ours, public=False)
            await stage.delete(ours)
            await stage.insert("end", public=True)
            assert await story(ada) == [
                ("DELETE", own),
                ("UPDATE", shared),
                ("UPDATE", shared),
                ("DELETE", shared),
                ("INSERT", mine),
                ("INSERT", ours),
                ("DELETE", mine),
                ("UPDATE", ours),
                ("DELETE", ours),
            ]
            assert await story(bob) == [
                ("DELETE", shared, "left"),
                ("INSERT", shared),
                ("DELETE", shared),
                ("INSERT", ours),
                ("DELETE", ours, "left"),
            ]
            assert (await metric(bridge, "old_rows_unknown_total"), await metric(bridge, "resyncs_total")) == (0, 0)


async def test_without_a_database_a_row_is_known_from_its_first_change_on(database: str, namespace: str) -> None:
    async with scene(database, namespace, "supabase", {"BRIDGE_POLICIES": RULES}, dsn="") as stage:
        [bridge] = stage.bridges
        async with bridge:
            ada, bob = await stage.listen(bridge)
            mine, ours = await stage.insert("mine"), await stage.insert("ours", public=True)
            await stage.publish(mine, public=True)
            await stage.publish(ours, public=False)
            await stage.delete(mine)
            await stage.delete(ours)
            await stage.insert("end", public=True)
            assert await story(ada) == [
                ("INSERT", mine),
                ("INSERT", ours),
                ("UPDATE", mine),
                ("UPDATE", ours),
                ("DELETE", mine),
                ("DELETE", ours),
            ]
            assert await story(bob) == [
                ("INSERT", ours),
                ("INSERT", mine),
                ("DELETE", ours, "left"),
                ("DELETE", mine),
            ]


async def test_old_values_are_told_but_for_long_ones(database: str, namespace: str) -> None:
    async with scene(database, namespace, "postgres") as stage:
        [bridge] = stage.bridges
        row = await stage.insert("short", body="long " * 100)
        async with bridge:
            await stage.seeded(bridge)
            ada, _ = await stage.listen(bridge)
            await stage.delete(row)
            gone = (await receive_data(ada))["old_record"]
            assert (gone["id"], gone["title"], gone["user_id"], "body" in gone) == (row, "short", ADA, False)


@asynccontextmanager
async def blind_role(database: str, namespace: str) -> AsyncIterator[str]:
    """A role that may follow the table, but does not see its rows."""
    role = namespace.replace("-", "_")
    connection = await asyncpg.connect(database)
    try:
        await connection.execute(f"create role {role} login noinherit replication in role anon, authenticated")
        yield role
    finally:
        await connection.execute(f"drop owned by {role}; drop role {role}")
        await connection.close()


@pytest.mark.parametrize("source", SOURCES)
async def test_until_the_table_is_read_what_is_gone_is_a_resync_and_names_no_row(
    source: str, database: str, namespace: str
) -> None:
    async with blind_role(database, namespace) as role:
        dsn = database.replace("postgres@", f"{role}@", 1)
        async with scene(database, namespace, source, dsn=dsn) as stage:
            secret, other = await stage.insert("secret"), await stage.insert("other")
            async with stage.bridges[0] as bridge:
                await eventually(lambda: "may not read every row of public.posts" in bridge.log)
                ada, bob = await stage.listen(bridge)
                await stage.delete(secret)
                for socket in (ada, bob):
                    assert_resync(await receive_data(socket))

                await stage.connection.execute(f"alter role {role} bypassrls; grant select on posts to {role}")
                await stage.seeded(bridge)
                await stage.delete(other)
                await stage.insert("end", public=True)
                assert (await story(ada), await story(bob)) == ([("DELETE", other)], [])


async def test_what_finds_no_room_is_a_resync_and_names_no_row(database: str, namespace: str) -> None:
    async with scene(database, namespace, "postgres", {"BRIDGE_ROW_INDEX_BYTES": "1"}) as stage:
        [bridge] = stage.bridges
        secret = await stage.insert("secret")
        async with bridge:
            await stage.seeded(bridge)
            ada, bob = await stage.listen(bridge)
            await stage.delete(secret)
            for socket in (ada, bob):
                assert_resync(await receive_data(socket))
            await stage.insert("end", public=True)
            assert await story(ada) == await story(bob) == []
            assert await metric(bridge, "old_rows_unknown_total") == 1
            assert await metric(bridge, "row_index_left_out") >= 1
            assert bridge.log.count("no room for all rows") == 1


@pytest.mark.fault
async def test_rows_are_read_again_when_the_broker_has_lost_them(database: str, namespace: str, redis_url: str) -> None:
    async with (
        scene(database, namespace, "postgres", {"REDIS_URL": redis_url}) as stage,
        store_of(redis_url, namespace) as store,
    ):
        own = await stage.insert("own")
        async with stage.bridges[0] as bridge:
            await stage.seeded(bridge)
            ada, bob = await stage.listen(bridge)
            await store.lose_everything()
            assert [(await receive_data(socket, 30))["type"] for socket in (ada, bob)] == ["resync", "resync"]
            await stage.seeded(bridge, 2)
            await stage.delete(own)
            await stage.insert("end", public=True)
            assert (await story(ada), await story(bob)) == ([("DELETE", own)], [])


@pytest.mark.fault
@pytest.mark.parametrize("source", SOURCES)
async def test_a_successor_knows_what_the_dead_leader_knew(
    source: str, database: str, namespace: str, redis_url: str
) -> None:
    async with scene(database, namespace, source, {"REDIS_URL": redis_url}, bridges=2) as stage:
        leader, follower = stage.bridges
        read, told = await stage.insert("read"), 0
        async with leader, follower:
            await stage.seeded(leader)
            ada, bob = await stage.listen(follower)
            told = await stage.insert("told")
            assert (await receive_data(ada))["record"]["id"] == told
            leader.kill()
            if source == "supabase":  # which has told nobody what happened meanwhile
                assert [(await receive_data(socket, 30))["type"] for socket in (ada, bob)] == ["resync", "resync"]
                await stage.seeded(follower)
            await stage.delete(read)
            await stage.delete(told)
            await stage.insert("end", public=True)
            assert (await story(ada), await story(bob)) == ([("DELETE", read), ("DELETE", told)], [])
            assert await metric(follower, "old_rows_unknown_total") == 0
            assert follower.log.count("row index seeded") == (source == "supabase")
