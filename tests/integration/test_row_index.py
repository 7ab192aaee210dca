"""Sources that bring no old row: rows that leave and DELETEs reach exactly those who could see the row."""

import re
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import asyncpg
import orjson
import pytest
from websockets.asyncio.client import ClientConnection

from tests.bridges import BridgeProcess
from tests.clients import Message, http, open_socket, receive, receive_data
from tests.contract.test_broker_forks import store_of
from tests.services import eventually, token
from tests.steady import proven
from tests.ways import SHARED_WAYS, SUPABASE_WAYS, Way

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

ADA, BOB = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
RULES = orjson.dumps({"public.posts": "user_id = auth.uid() or is_public"}).decode()
RESYNC_SECONDS: Final = "0.1"


@dataclass
class Scene:
    """A table without REPLICA IDENTITY FULL, and two users."""

    connection: "asyncpg.Connection[asyncpg.Record]"
    sockets: AsyncExitStack

    async def insert(self, title: str, *, public: bool = False, body: str = "") -> int:
        sql = "insert into posts (user_id, title, is_public, body) values ($1, $2, $3, $4) returning id"
        return int(await self.connection.fetchval(sql, ADA, title, public, body))

    async def publish(self, row: int, *, public: bool) -> None:
        await self.connection.execute("update posts set is_public = $2 where id = $1", row, public)

    async def delete(self, *rows: int) -> None:
        await self.connection.execute("delete from posts where id = any ($1)", rows)

    async def listen(
        self, bridge: BridgeProcess, positions: tuple[str | None, str | None] = (None, None)
    ) -> tuple[ClientConnection, ClientConnection]:
        """Sockets of Ada, who owns every row, and of Bob, who sees the public ones."""
        ada, bob = [
            await self.sockets.enter_async_context(open_socket(bridge.url, token(sub), position=position))
            for sub, position in zip((ADA, BOB), positions, strict=True)
        ]
        for socket in (ada, bob):
            assert (await receive(socket))["type"] == "ready"
        return ada, bob

    async def seeded(self, bridge: BridgeProcess, times: int = 1) -> None:
        """Wait until the table was read so many times, and what is committed from now on is later than that."""
        await eventually(lambda: bridge.log.count("row index seeded") >= times, 30)
        now = await self.connection.fetchval("select clock_timestamp()")
        later = "select clock_timestamp() > $1::timestamptz + interval '1.1 s'"
        await eventually(partial(self.connection.fetchval, later, now))

    async def heard(self, *sockets: ClientConnection) -> None:
        """Wait until those who read are told of what is inserted: a resync that is still to come would stand for it."""
        for socket in sockets:
            message: Message = {}
            while message.get("record", {}).get("title") != "heard":
                await self.insert("heard", public=True)
                with suppress(TimeoutError):
                    message = await receive_data(socket, 1)


@asynccontextmanager
async def scene(way: Way) -> AsyncIterator[Scene]:
    """Rows that are inserted before there is a bridge are known to it from reading the table alone."""
    async with AsyncExitStack() as stack:
        connection = await asyncpg.connect(way.database)
        stack.push_async_callback(connection.close)
        await connection.execute("alter table posts replica identity default")
        yield Scene(connection, stack)


async def metric(bridge: BridgeProcess, name: str) -> float:
    async with http(bridge.url) as client:
        page = (await client.get("/metrics")).text
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


async def test_what_is_gone_is_told_to_those_who_saw_it_and_to_nobody_else(way: Way) -> None:
    async with scene(way) as stage:
        own, shared = await stage.insert("own"), await stage.insert("shared", public=True)
        async with way.bridge() as bridge:
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


@pytest.mark.parametrize("way", SUPABASE_WAYS, indirect=True)
async def test_without_a_database_a_row_is_known_from_its_first_change_on(way: Way) -> None:
    async with scene(way) as stage:
        async with way.bridge(BRIDGE_POLICIES=RULES, DATABASE_URL="") as bridge:
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


async def test_long_texts_are_not_known_of_a_row_that_was_and_cost_nothing_else(way: Way) -> None:
    async with scene(way) as stage:
        row = await stage.insert("short", body="long " * 100)
        async with way.bridge() as bridge:
            await stage.seeded(bridge)
            ada, bob = await stage.listen(bridge)
            await stage.publish(row, public=True)
            await stage.publish(row, public=False)
            await stage.delete(row)
            assert (await receive_data(ada))["old_record"] == (await receive_data(ada))["old_record"] == {"id": row}
            gone = (await receive_data(ada))["old_record"]
            assert (gone["id"], gone["title"], gone["user_id"], "body" in gone) == (row, "short", ADA, False)
            enters, leaves = await receive_data(bob), await receive_data(bob)
            assert (enters["type"], enters["record"]["body"]) == ("INSERT", "long " * 100)
            assert (leaves["type"], leaves["old_record"], leaves["left"]) == ("DELETE", {"id": row}, True)


@asynccontextmanager
async def blind_role(way: Way) -> AsyncIterator[str]:
    """A role that may follow the table, but does not see its rows."""
    role = way.namespace.replace("-", "_")
    connection = await asyncpg.connect(way.database)
    try:
        await connection.execute(f"create role {role} login noinherit replication in role anon, authenticated")
        yield role
    finally:
        await connection.execute(f"drop owned by {role}; drop role {role}")
        await connection.close()


async def test_until_the_table_is_read_what_is_gone_is_a_resync_and_names_no_row(way: Way) -> None:
    async with blind_role(way) as role, scene(way) as stage:
        secret, other = await stage.insert("secret"), await stage.insert("other")
        blind = way.database.replace("postgres@", f"{role}@", 1)
        async with way.bridge(DATABASE_URL=blind, BRIDGE_RESYNC_SECONDS=RESYNC_SECONDS) as bridge:
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


async def test_what_finds_no_room_is_one_resync_and_names_no_row(way: Way) -> None:
    async with scene(way) as stage:
        secrets = [await stage.insert("secret") for _ in range(3)]
        async with way.bridge(BRIDGE_ROW_INDEX_BYTES="1", BRIDGE_RESYNC_SECONDS=RESYNC_SECONDS) as bridge:
            await stage.seeded(bridge)
            ada, bob = await stage.listen(bridge)
            await stage.delete(*secrets)
            for socket in (ada, bob):
                assert_resync(await receive_data(socket))
            await stage.insert("end", public=True)
            assert await story(ada) == await story(bob) == []
            assert await metric(bridge, "old_rows_unknown_total") == 3
            assert await metric(bridge, "policy_undecided_total") == 3
            assert await metric(bridge, "row_index_left_out") >= 3
            assert bridge.log.count("no room for all rows") == 1


@pytest.mark.fault
@pytest.mark.parametrize("way", SHARED_WAYS, indirect=True)
async def test_rows_are_read_again_when_the_broker_has_lost_them(way: Way) -> None:
    async with scene(way) as stage, store_of(way.redis_url, way.namespace) as store:
        own = await stage.insert("own")
        async with way.bridge(BRIDGE_RESYNC_SECONDS=RESYNC_SECONDS) as bridge:
            await stage.seeded(bridge)
            ada, bob = await stage.listen(bridge)
            await store.lose_everything()
            assert [(await receive_data(socket, 30))["type"] for socket in (ada, bob)] == ["resync", "resync"]
            await stage.seeded(bridge, 2)
            await proven(bridge)
            await stage.heard(ada, bob)  # behind another resync, where the source has no memory
            await stage.delete(own)
            await stage.insert("end", public=True)
            told = [[event for event in await story(socket) if event[0] == "DELETE"] for socket in (ada, bob)]
            assert told == [[("DELETE", own)], []]


@pytest.mark.fault
@pytest.mark.parametrize("way", SHARED_WAYS, indirect=True)
async def test_a_successor_knows_what_the_dead_leader_knew(way: Way) -> None:
    async with scene(way) as stage:
        read = await stage.insert("read")
        async with way.replicas(2) as [leader, follower]:
            await stage.seeded(leader)
            ada, bob = await stage.listen(follower)
            told = await stage.insert("told")
            assert (await receive_data(ada))["record"]["id"] == told
            await proven(leader)
            leader.kill()
            if way.forgets_its_place:  # and they have come just before
                assert [(await receive_data(socket, 30))["type"] for socket in (ada, bob)] == ["resync", "resync"]
            await stage.delete(read)
            await stage.delete(told)
            await stage.insert("end", public=True)
            assert (await story(ada), await story(bob)) == ([("DELETE", read), ("DELETE", told)], [])
            assert await metric(follower, "old_rows_unknown_total") == 0
            assert "row index seeded" not in follower.log


@pytest.mark.fault
@pytest.mark.parametrize("way", SHARED_WAYS, indirect=True)
async def test_after_a_restart_the_rows_are_there_and_what_was_missed_is_known(way: Way) -> None:
    async with scene(way) as stage:
        away, after = await stage.insert("away"), await stage.insert("after", public=True)
        async with way.bridge() as bridge:
            await stage.seeded(bridge)
            sockets = await stage.listen(bridge)
            await stage.insert("met", public=True)
            positions = tuple([(await receive_data(socket))["position"] for socket in sockets])
            await proven(bridge)
            bridge.stop()
            await stage.delete(away)
            bridge.start()
            await bridge.ready()
            ada, bob = await stage.listen(bridge, positions)
            if way.forgets_its_place:
                assert [(await receive_data(socket))["reason"] for socket in (ada, bob)] == ["upstream_gap"] * 2
            else:
                assert (await receive_data(ada))["old_record"]["id"] == away
            await stage.publish(after, public=False)
            await stage.delete(after)
            await stage.insert("end", public=True)
            assert await story(ada) == [("UPDATE", after), ("DELETE", after)]
            assert await story(bob) == [("DELETE", after, "left")]
            assert bridge.log.count("row index seeded") == 1
