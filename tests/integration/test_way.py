"""The main job: a committed row reaches its owner and nobody else, by every source, broker and transport."""

import asyncio
import uuid

import asyncpg
import pytest

from tests.clients import Copy, http, open_socket, receive, receive_data
from tests.services import eventually, token
from tests.ways import Way

pytestmark = pytest.mark.integration

ADA, BOB = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))


async def test_a_committed_row_reaches_its_owner_and_nobody_else(way: Way) -> None:
    async with way.bridge() as bridge:
        url = bridge.url
        async with (
            open_socket(url, token(ADA)) as ada,
            open_socket(url, token(BOB)) as bob,
            http(url) as client,
        ):
            polls = {user: Copy(url, token(user)) for user in (ADA, BOB)}
            for copy in polls.values():
                await copy.poll(client, wait=0)
            assert (await receive(ada))["type"] == "ready"
            assert (await receive(bob))["type"] == "ready"
            connection = await asyncpg.connect(way.database)
            insert = "insert into posts (user_id, title, is_public) values ($1, $2, $3) returning id"
            private = await connection.fetchval(insert, ADA, "private", False)
            public = await connection.fetchval(insert, ADA, "public", True)
            await connection.close()

            first = await receive_data(ada)
            assert (first["type"], first["schema"], first["table"]) == ("INSERT", "public", "posts")
            assert (first["record"]["id"], first["record"]["user_id"]) == (private, ADA)
            assert set(first) == {"type", "schema", "table", "record", "commit_timestamp", "position"}
            assert (await receive_data(ada))["record"]["id"] == public
            assert (await receive_data(bob))["record"]["id"] == public  # and nothing before it

            for user, ids in ((ADA, [private, public]), (BOB, [public])):
                while len(polls[user].history) < len(ids):
                    await polls[user].poll(client, wait=5)
                assert [message["record"]["id"] for message in polls[user].history] == ids


async def test_rows_that_leave_and_enter_a_view_are_told(way: Way) -> None:
    async with way.bridge() as bridge:
        async with open_socket(bridge.url, token(BOB)) as bob, open_socket(bridge.url, token(ADA)) as ada:
            for socket in (ada, bob):
                await receive(socket)
            connection = await asyncpg.connect(way.database)
            post = await connection.fetchval("insert into posts (user_id, title) values ($1, 'x') returning id", ADA)
            await connection.execute("update posts set is_public = true where id = $1", post)
            await connection.execute("update posts set title = 'y' where id = $1", post)
            await connection.execute("update posts set is_public = false where id = $1", post)
            await connection.execute("delete from posts where id = $1", post)
            await connection.close()
            seen = [await receive_data(bob) for _ in range(3)]
            assert [m["type"] for m in seen] == ["INSERT", "UPDATE", "DELETE"]
            assert "old_record" not in seen[0]
            assert seen[1]["old_record"]["title"] == "x"
            assert (seen[2]["old_record"], seen[2]["left"]) == ({"id": post}, True)
            own = [await receive_data(ada) for _ in range(5)]
            assert [m["type"] for m in own[:4]] == ["INSERT", "UPDATE", "UPDATE", "UPDATE"]
            assert (own[4]["type"], own[4]["old_record"]["title"], "left" in own[4]) == ("DELETE", "y", False)


async def test_a_position_from_a_read_misses_nothing(way: Way) -> None:
    async with way.bridge() as bridge:
        async with http(bridge.url, token(ADA)) as client:
            await client.post("/posts", json={"title": "one"})
            answer = await client.get("/posts")
            assert [row["title"] for row in answer.json()] == ["one"]
            await client.post("/posts", json={"title": "two"})
        async with open_socket(bridge.url, token(ADA), position=answer.headers["Realtime-Position"]) as socket:
            titles = []
            while "two" not in titles:
                message = await receive(socket)
                if message["type"] == "INSERT":
                    titles.append(message["record"]["title"])
            assert titles in (["two"], ["one", "two"])  # a position may be older than the read, never newer


async def test_a_slow_reader_costs_only_itself_and_catches_up(way: Way) -> None:
    async with way.bridge(BRIDGE_TAKEOVER_SECONDS="30") as bridge:  # a burst may keep the leader busy
        async with open_socket(bridge.url, token(ADA)) as slow, open_socket(bridge.url, token(ADA)) as quick:
            await receive(slow)
            await receive(quick)
            slow.transport.pause_reading()
            connection = await asyncpg.connect(way.database)
            sql = "insert into posts (user_id, title, body) values ($1, $2, $3)"
            await connection.executemany(sql, [(ADA, str(i), "x" * 30_000) for i in range(600)])
            await connection.close()
            assert [(await receive_data(quick))["record"]["title"] for _ in range(600)] == [str(i) for i in range(600)]
            async with http(bridge.url) as client:

                async def is_behind() -> bool:
                    return "realtime_bridge_subscriptions_behind 1.0" in (await client.get("/metrics")).text

                await eventually(is_behind)
            slow.transport.resume_reading()
            assert [(await receive_data(slow))["record"]["title"] for _ in range(600)] == [str(i) for i in range(600)]


async def test_a_waiting_poll_is_answered_by_a_change(way: Way) -> None:
    async with way.bridge() as bridge:
        copy = Copy(bridge.url, token(ADA))
        async with http(bridge.url) as client:
            await copy.poll(client, wait=0)
            async with asyncio.TaskGroup() as tasks:
                poll = tasks.create_task(copy.poll(client, wait=50))
                connection = await asyncpg.connect(way.database)
                await connection.execute("insert into posts (user_id, title) values ($1, 'not yours')", BOB)
                await connection.execute("insert into posts (user_id, title) values ($1, 'yours')", ADA)
                await connection.close()
                assert await poll
            assert [m["record"]["title"] for m in copy.history] == ["yours"]
            before = copy.position
            assert not await copy.poll(client, wait=0)
            assert copy.position == before
