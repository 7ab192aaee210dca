"""Subscriptions by message and by address: tables, filters, columns, operations, positions, resyncs."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import Any

import asyncpg
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from tests.bridges import BridgeProcess
from tests.clients import Message, open_socket, receive, receive_data
from tests.services import token
from tests.ways import POSTGRES_WAYS, SUPABASE_WAYS, Way

pytestmark = pytest.mark.integration

ADA = str(uuid.UUID(int=1))
TABLES = ["public.posts", "public.notes"]
NOTES = """
create table notes (id int, part text, owner uuid, mood text, score numeric, primary key (id, part));
alter table notes replica identity full;
alter table notes enable row level security;
create policy own on notes for select using (owner = auth.uid());
grant select on notes to authenticated;
"""


@asynccontextmanager
async def notes_bridge(
    way: Way, more: str = "", **settings: str
) -> AsyncIterator[tuple[BridgeProcess, asyncpg.Connection]]:
    connection = await asyncpg.connect(way.database)
    await connection.execute(NOTES + more)
    try:
        async with way.bridge(*TABLES, **settings) as bridge:
            yield bridge, connection
    finally:
        await connection.close()


async def say(socket: ClientConnection, **message: Any) -> None:
    await socket.send(json.dumps(message))


async def next_of(socket: ClientConnection, kind: str) -> Message:
    while (message := await receive(socket))["type"] != kind:
        pass
    return message


async def read_all(socket: ClientConnection) -> set[str]:
    """The types of all that comes until it is closed."""
    kinds = set()
    with suppress(ConnectionClosed):
        while True:
            kinds.add((await receive(socket))["type"])
    return kinds


async def test_the_address_subscribes_to_all_tables_or_to_those_it_names(way: Way) -> None:
    async with notes_bridge(way) as (bridge, connection):
        async with (
            open_socket(bridge.url, token(ADA)) as everything,
            open_socket(bridge.url, token(ADA), table="notes") as notes,
            open_socket(bridge.url, token(ADA), table="") as nothing,
        ):
            assert (await receive(everything))["tables"] == TABLES
            assert (await receive(notes))["tables"] == ["public.notes"]
            assert (await receive(nothing))["tables"] == []
            await connection.execute("insert into posts (user_id, title) values ($1, 'x')", ADA)
            await connection.execute("insert into notes values (1, 'a', $1)", ADA)
            assert [(await receive_data(everything))["table"] for _ in range(2)] == ["posts", "notes"]
            assert (await receive_data(notes))["table"] == "notes"
            await say(nothing, type="ping")
            assert (await receive(nothing))["type"] == "pong"  # and no change before it


async def test_subscriptions_by_message_carry_their_ids_and_share_a_message(way: Way) -> None:
    async with notes_bridge(way) as (bridge, connection):
        async with open_socket(bridge.url, token(ADA), table="") as socket:
            await receive(socket)
            await say(socket, type="subscribe", id="all", table="public.notes")
            await say(socket, type="subscribe", id="same", table="notes")
            await say(socket, type="subscribe", id="happy", table="notes", filter="mood=eq.happy")
            await say(socket, type="subscribe", id="brief", table="notes", columns=["mood"])
            await say(socket, type="subscribe", id="gone", table="notes", events=["DELETE"])
            for id_ in ("all", "same", "happy", "brief", "gone"):
                assert (await next_of(socket, "subscribed"))["id"] == id_
            await say(socket, type="ping")
            await next_of(socket, "pong")

            await connection.execute("insert into notes values (1, 'a', $1, 'sad', 1.50)", ADA)
            whole, brief = sorted(
                [await receive_data(socket) for _ in range(2)], key=lambda m: len(m["record"]), reverse=True
            )
            assert sorted(whole["subscriptions"]) == ["all", "same"]
            assert whole["record"]["score"] == 1.5
            assert (brief["subscriptions"], brief["record"]) == (["brief"], {"id": 1, "part": "a", "mood": "sad"})

            await connection.execute("update notes set mood = 'happy'")
            by_id = {tuple(sorted(m["subscriptions"])): m for m in [await receive_data(socket) for _ in range(3)]}
            assert by_id["all", "same"]["type"] == "UPDATE"
            assert by_id["happy",]["type"] == "INSERT"  # it enters the filter
            await connection.execute("update notes set mood = 'sad'")
            by_id = {tuple(sorted(m["subscriptions"])): m for m in [await receive_data(socket) for _ in range(3)]}
            left = by_id["happy",]
            assert (left["type"], left["left"], left["old_record"]) == ("DELETE", True, {"id": 1, "part": "a"})
            await connection.execute("delete from notes")
            deleted = [await receive_data(socket) for _ in range(2)]
            assert {tuple(sorted(m["subscriptions"])) for m in deleted} == {("all", "gone", "same"), ("brief",)}
            assert all(m["type"] == "DELETE" and "left" not in m for m in deleted)


async def test_a_refused_subscription_says_why_and_the_connection_lives_on(way: Way) -> None:
    async with notes_bridge(way) as (bridge, _):
        async with open_socket(bridge.url, token(ADA)) as socket:
            await receive(socket)
            refusals: list[tuple[dict[str, Any], int, str]] = [
                ({"id": "a", "table": "public.secrets"}, 4400, "not served"),
                ({"id": "a", "table": 7}, 4400, "table"),
                ({"id": "", "table": "posts"}, 4400, "id"),
                ({"id": "x" * 65, "table": "posts"}, 4400, "id"),
                ({"table": "posts"}, 4400, "id"),
                ({"id": "a", "table": "posts", "filter": 3}, 4400, "filter"),
                ({"id": "a", "table": "posts", "filter": "title=match.x"}, 4400, "match"),
                ({"id": "a", "table": "posts", "filter": "zzz=eq.1"}, 4400, "no column zzz"),
                ({"id": "a", "table": "posts", "filter": "id=eq.abc"}, 4400, "not of type"),
                ({"id": "a", "table": "posts", "events": ["EXPLODE"]}, 4400, "events"),
                ({"id": "a", "table": "posts", "columns": "title"}, 4400, "columns"),
                ({"id": "a", "table": "posts", "position": "x"}, 4400, "position"),
                ({"id": "a", "table": "posts", "position": 5}, 4400, "position"),
            ]
            for request, code, words in refusals:
                await say(socket, type="subscribe", **request)
                error = await next_of(socket, "error")
                assert (error["code"], words in error["detail"]) == (code, True), (request, error)
            await say(socket, type="unsubscribe", id="never")
            assert (await next_of(socket, "error"))["code"] == 4400
            await say(socket, type="subscribe", id="a", table="posts")
            assert (await next_of(socket, "subscribed"))["id"] == "a"
            await say(socket, type="subscribe", id="a", table="posts")
            assert "already" in (await next_of(socket, "error"))["detail"]
            await say(socket, type="unsubscribe", id="a")
            assert (await next_of(socket, "unsubscribed"))["id"] == "a"


async def test_a_filter_tells_nobody_of_columns_that_they_may_not_read(way: Way) -> None:
    grants = "revoke select on notes from authenticated; grant select (id, part, owner) on notes to authenticated"
    async with notes_bridge(way, grants) as (bridge, _):
        async with open_socket(bridge.url, token(ADA), table="") as socket:
            details = []
            for column in ("mood", "zzz"):
                await say(socket, type="subscribe", id=column, table="notes", filter=f"{column}=eq.sad")
                details.append((await next_of(socket, "error"))["detail"])
            assert "may not read" in details[0]
            assert details[1] == details[0].replace("mood", "zzz")
            await say(socket, type="subscribe", id="id", table="notes", filter="id=eq.1")
            await next_of(socket, "subscribed")


async def test_a_filter_on_a_column_that_is_dropped_ends_what_was_asked_for_and_nothing_else(way: Way) -> None:
    async with notes_bridge(way, BRIDGE_RESYNC_SECONDS="0.2") as (bridge, connection):
        async with (
            open_socket(bridge.url, token(ADA)) as socket,
            open_socket(bridge.url, token(ADA), table="notes", filter="mood=eq.sad") as filtered,
        ):
            await receive(filtered)
            await say(socket, type="subscribe", id="sad", table="notes", filter="mood=eq.sad")
            await next_of(socket, "subscribed")
            await connection.execute("insert into notes values (0, 'a', $1, 'sad')", ADA)
            assert (await receive_data(filtered))["record"]["id"] == 0
            await connection.execute("alter table notes drop column mood")
            async with asyncio.TaskGroup() as tasks:
                ended = tasks.create_task(next_of(socket, "error"))
                reading = tasks.create_task(read_all(filtered))
                for i in count(1):
                    await connection.execute("insert into notes values ($1, 'a', $2)", i, ADA)
                    _, going_on = await asyncio.wait((ended, reading), timeout=0.2)
                    if not going_on:
                        break
            assert (ended.result()["code"], ended.result()["id"]) == (4400, "sad")
            assert "mood" in ended.result()["detail"]
            assert (filtered.close_code, "mood" in (filtered.close_reason or "")) == (4400, True)
            assert reading.result() <= {"INSERT", "resync"}
            await connection.execute("insert into notes values (0, 'b', $1)", ADA)
            while (message := await receive_data(socket)).get("record", {}).get("part") != "b":
                assert "subscriptions" not in message
            await say(socket, type="unsubscribe", id="sad")
            assert "no such" in (await next_of(socket, "error"))["detail"]


async def test_a_subscription_resumes_by_its_own_position(way: Way) -> None:
    async with notes_bridge(way) as (bridge, connection):
        async with open_socket(bridge.url, token(ADA)) as socket:
            start = (await receive(socket))["position"]
            for i in range(3):
                await connection.execute("insert into notes values ($1, 'a', $2)", i, ADA)
            seen = [await receive_data(socket) for _ in range(3)]
            await say(socket, type="subscribe", id="late", table="notes", position=seen[0]["position"])
            assert (await next_of(socket, "subscribed"))["position"] == seen[0]["position"]
            again = [await receive_data(socket) for _ in range(2)]
            assert [(m["record"]["id"], m["subscriptions"]) for m in again] == [(1, ["late"]), (2, ["late"])]
        async with open_socket(bridge.url, token(ADA), position=start) as back:
            assert (await receive(back))["position"] == start
            assert [(await receive_data(back))["record"]["id"] for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("way", POSTGRES_WAYS, indirect=True)
async def test_truncate_and_bulk_are_told_as_a_resync_of_the_table(way: Way) -> None:
    async with notes_bridge(way, BRIDGE_TRANSACTION_ROWS="100", BRIDGE_RESYNC_SECONDS="1") as (
        bridge,
        connection,
    ):
        async with open_socket(bridge.url, token(ADA)) as socket:
            await receive(socket)
            await connection.execute("insert into notes select i, 'a', $1 from generate_series(1, 500) i", ADA)
            bulk = await receive_data(socket)
            assert (bulk["type"], bulk["table"], bulk["reason"]) == ("resync", "public.notes", "bulk")
            assert bulk["after_ms"] >= 0
            await connection.execute("truncate notes")
            truncated = await receive_data(socket)  # held until it may be told
            assert (truncated["type"], truncated["reason"]) == ("resync", "truncated")
            await connection.execute("insert into notes values (1, 'a', $1)", ADA)
            assert (await receive_data(socket))["type"] == "INSERT"


@pytest.mark.parametrize("way", SUPABASE_WAYS, indirect=True)
async def test_a_bulk_change_comes_row_by_row_where_transactions_are_not_told(way: Way) -> None:
    async with notes_bridge(way, BRIDGE_TRANSACTION_ROWS="100") as (bridge, connection):
        async with open_socket(bridge.url, token(ADA)) as socket:
            await receive(socket)
            await connection.execute("insert into notes select i, 'a', $1 from generate_series(1, 500) i", ADA)
            told = [await receive_data(socket) for _ in range(500)]
            assert [(m["type"], m["record"]["id"]) for m in told] == [("INSERT", i) for i in range(1, 501)]


@pytest.mark.parametrize(
    "alter", ["add column extra int default 7", "alter column score type text", "drop column score"]
)
async def test_an_altered_table_is_told_as_such(way: Way, alter: str) -> None:
    """Once if the history tells it, or if it is found by looking; twice if both, one after the other.

    A new type rewrites every row, and that, found by looking, is a gap.
    """
    reasons = {"schema_changed", *(["upstream_gap"] if "type" in alter else [])}
    async with notes_bridge(way, BRIDGE_RESYNC_SECONDS="0.2") as (bridge, connection):
        async with open_socket(bridge.url, token(ADA)) as socket:
            await receive(socket)
            await connection.execute(f"begin; alter table notes {alter}; insert into notes values (1, 'a'); commit")
            message = await receive_data(socket)
            assert (message["type"], message["table"], message["reason"]) == ("resync", TABLES[1], "schema_changed")
            await connection.execute("insert into notes values (2, 'a', $1)", ADA)
            while (message := await receive_data(socket))["type"] == "resync":
                assert message["reason"] in reasons
            assert message["record"]["id"] == 2
            await connection.execute("alter table notes add column idle int")  # of which no row tells
            while (message := await receive_data(socket))["reason"] != "schema_changed":
                assert message["reason"] in reasons
            assert (message["type"], message["table"]) == ("resync", TABLES[1])


async def test_a_table_without_row_level_security_delivers_nothing_and_says_so(way: Way) -> None:
    connection = await asyncpg.connect(way.database)
    await connection.execute(
        "create table open_to_all (id int primary key); grant select on open_to_all to authenticated"
    )
    await connection.execute("alter table open_to_all replica identity full")
    async with way.bridge("public.open_to_all") as bridge:
        async with open_socket(bridge.url, token(ADA)) as socket:
            assert (await receive(socket))["tables"] == []
            error = await receive(socket)
            assert (error["type"], error["code"]) == ("error", 4403)
            await connection.execute("insert into open_to_all values (1)")
            await say(socket, type="ping")
            assert (await receive(socket))["type"] == "pong"
    await connection.close()
