"""Transactions that a real server sends while they run are told at their commit, and cost bounded memory until then."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from realtime_bridge.change import Change, Control
from realtime_bridge.dev.engines import EmbeddedPostgres
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.errors import SourceError
from realtime_bridge.sources import replication
from realtime_bridge.sources.base import SourceBatch
from realtime_bridge.sources.postgres import PostgresSource
from realtime_bridge.sources.postgres_stream import PostgresStream
from tests.bridges import BridgeProcess
from tests.clients import open_socket, receive, receive_data
from tests.integration.test_postgres_source import (
    PUBLICATION,
    USER,
    Database,
    batches,
    bodies,
    changes,
    idle,
    opened,
    read,
    read_until_idle,
    titles,
)
from tests.services import eventually, fresh_databases, running, token

pytestmark = pytest.mark.integration

MANY = 300
"""Rows of a kilobyte and more: several times what the server holds before it sends."""


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    with running(EmbeddedPostgres(options={"logical_decoding_work_mem": "64kB"})) as server:
        yield server


@pytest.fixture
async def db(server: EmbeddedPostgres, namespace: str) -> AsyncIterator[Database]:
    with fresh_databases(server, "template1") as make:
        dsn = make()
        await install_schema(dsn)
        async with opened(dsn, namespace) as db:
            yield db


@asynccontextmanager
async def writing(db: Database) -> AsyncIterator[Any]:
    """A further connection."""
    connection = await asyncpg.connect(db.dsn)
    try:
        yield connection
    finally:
        await connection.close()


async def post(connection: Any, name: str, count: int = MANY) -> None:
    """Posts named `name 1`, `name 2`, …, each with a large body."""
    await connection.execute(
        f"INSERT INTO posts (user_id, title, body) SELECT '{USER}', '{name} ' || n, repeat(md5(n::text), 40) "
        f"FROM generate_series(1, {count}) n"
    )


def named(*names: str, count: int = MANY) -> list[str]:
    return [f"{name} {n}" for name in names for n in range(1, count + 1)]


async def statistics(db: Database, slot: str = "") -> Any:
    """What the server says of what it has sent from a slot in blocks, and put on its disk."""
    return await db.connection.fetchrow(
        "SELECT stream_txns, stream_count, stream_bytes, spill_bytes FROM pg_stat_replication_slots "
        "WHERE slot_name = $1",
        slot or db.slot,
    )


async def read_until_sent(db: Database, stream: PostgresStream, transactions: int) -> list[SourceBatch]:
    """What is told until so many transactions have come in part; all of it is acknowledged."""
    found: list[SourceBatch] = []
    while (await statistics(db))["stream_txns"] < transactions:
        found += await batches(stream, lambda found: True)
    return found


async def test_transactions_that_are_sent_side_by_side_are_told_in_the_order_of_their_commits(db: Database) -> None:
    async with (
        db.source().open(None, owner="ns/1") as stream,
        writing(db) as one,
        writing(db) as other,
        one.transaction(),
    ):
        async with other.transaction():
            for part in ("i", "ii", "iii"):
                await post(one, f"one {part}")
                await post(other, f"other {part}")
            assert changes(await read_until_sent(db, stream, 2)) == []
            assert await read_until_idle(stream) == []  # time is proven all the same
            await db.post("small")
            assert titles(await read(stream, 1)) == ["small"]
        assert titles(await read(stream, 3 * MANY)) == named("other i", "other ii", "other iii")
        await db.post("between")
        assert titles(await read(stream, 1)) == ["between"]
        await one.execute("COMMIT; BEGIN")
        assert titles(await read(stream, 3 * MANY)) == named("one i", "one ii", "one iii")


async def test_what_is_rolled_back_is_not_told(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream, writing(db) as other:
        await other.execute("BEGIN")
        await post(other, "gone")
        await read_until_sent(db, stream, 1)
        await other.execute("ROLLBACK")
        assert await read_until_idle(stream) == []
        await other.execute("BEGIN; SAVEPOINT outside")
        await post(other, "kept a")
        await other.execute("SAVEPOINT inside; ALTER TABLE posts ADD COLUMN likes int")
        await post(other, "gone")
        await read_until_sent(db, stream, 2)
        await other.execute("ROLLBACK TO inside")
        await post(other, "kept b")
        await other.execute("COMMIT")
        found = await read(stream, 2 * MANY)
    assert titles(found) == named("kept a", "kept b")
    assert not any("likes" in change.relation.index for change in found)


async def test_a_policy_that_changes_at_the_end_is_announced_before_the_first_row(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream, writing(db) as other:
        await db.post("before")
        await read(stream, 1)
        await other.execute("BEGIN")
        await post(other, "secret")
        await read_until_sent(db, stream, 1)
        await other.execute("CREATE POLICY less ON posts AS RESTRICTIVE USING (false); COMMIT")
        first, *rest = bodies(await batches(stream, lambda found: len(changes(found)) == MANY))
    assert isinstance(first, Control)
    assert (first.kind, first.table) == ("catalog", "*")
    assert {body.table for body in rest if isinstance(body, Control)} == {"public.posts"}


async def test_a_table_that_policies_refer_to_only_since_its_rows_were_sent_is_told_as_bulk(db: Database) -> None:
    references: list[str] = []
    await db.run("CREATE TABLE members (n int PRIMARY KEY, t text)")
    await db.publish("public.posts", "public.members")
    async with db.source(references=lambda: references).open(None, owner="ns/1") as stream, writing(db) as other:
        await other.execute("BEGIN; INSERT INTO members SELECT n, repeat('x', 1000) FROM generate_series(1, 500) n")
        await batches(stream, lambda _: any(held.unwanted for held in stream._assembler._streams.values()))
        references.append("public.members")
        await other.execute("COMMIT")
        found = await read_until_idle(stream)
    assert [(body.table, body.reason) for body in found if isinstance(body, Control)] == [
        ("public.members", "bulk"),
        ("public.members", "upstream_gap"),  # for what was committed before it was referred to
    ]


# -- resuming --------------------------------------------------------------------------------------------------------


async def test_a_connection_lost_in_the_middle_loses_nothing_and_repeats_nothing(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream, writing(db) as other:
        await other.execute("BEGIN")
        await post(other, "large a")
        await db.post("early")
        found = [*await read_until_sent(db, stream, 1), *await batches(stream, lambda found: len(found) > 2)]
        assert titles(changes(found)) == ["early"]
        await db.run(f"SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{db.slot}'")
        with pytest.raises(SourceError):
            await batches(stream, lambda found: False)
        await db.post("meanwhile")
        async with db.source().open(found[-1].watermark, owner="ns/1") as stream:
            await post(other, "large b")
            again = await read_until_sent(db, stream, 2)
            await other.execute("COMMIT")
            rest = await read(stream, 2 * MANY + 1 - len(changes(again)))
            assert await read_until_idle(stream) == []
    assert titles([*changes(again), *rest]) == ["meanwhile", *named("large a", "large b")]


async def history(db: Database) -> str:
    """Transactions of every shape behind the slot, which nobody has read yet; returns the watermark before them."""
    async with db.source().open(None, owner="ns/1") as stream:
        start = (await anext(stream)).watermark
    async with writing(db) as one, writing(db) as other:
        await one.execute("BEGIN")
        await other.execute("BEGIN")
        for n in range(3):
            await post(one, f"one {n}", 40)
            await other.execute(f"SAVEPOINT s{n}")
            await post(other, f"other {n}", 90)
            if n == 1:
                await other.execute("ROLLBACK TO s1")
        await other.execute("COMMIT")
        await db.post("small")
        await one.execute("UPDATE posts SET title = 'both' WHERE title = 'small'; COMMIT")
        await db.run("TRUNCATE posts")
    return start


async def everything(db: Database, slot: str, after: str) -> list[tuple[str, str]]:
    """All changes behind a watermark, and the watermark behind each, from a copy of the slot."""
    await eventually(lambda: idle(db))
    await db.run(f"SELECT pg_copy_logical_replication_slot('{db.slot}', '{slot}')")
    source = PostgresSource(db.dsn, slot=slot, publication=PUBLICATION, tables=["public.posts"])
    found: list[SourceBatch] = []
    async with source.open(after.replace(db.slot, slot), owner="ns/1") as stream:
        now = await db.connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")
        found = await batches(stream, lambda found: any((b.proven_until or 0) > now for b in found))
    return [
        (watermark.replace(slot, db.slot), titles([body])[0] if isinstance(body, Change) else str(body.reason))
        for batch in found
        for watermark, body in zip(batch.watermarks, batch.bodies, strict=True)
        if isinstance(body, Change) or body.kind == "resync"
    ]


async def test_sent_in_blocks_or_whole_the_same_is_told_with_the_same_watermarks(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = await history(db)
    streamed = await everything(db, f"{db.slot}_streamed", start)
    middle = next(watermark for watermark, told in streamed if told == "other 2 7")
    resumed = await everything(db, f"{db.slot}_resumed", middle)
    # What began before the place from which the server reads on comes whole, however it came at first.
    assert (await statistics(db, f"{db.slot}_streamed"))["stream_txns"] == 2
    assert (await statistics(db, f"{db.slot}_resumed"))["stream_txns"] == 1
    monkeypatch.setattr(replication, "_STREAMED", "proto_version '99'")  # as if the server were too old for it
    whole = await everything(db, f"{db.slot}_whole", start)
    assert (await statistics(db, f"{db.slot}_whole"))["stream_txns"] == 0
    expected = [*named("other 0", "other 2", count=90), "small", *named("one 0", "one 1", "one 2", count=40), "both"]
    assert [told for _, told in whole] == [*expected, "truncated"]
    assert streamed == whole
    assert resumed == [one for one in whole if whole.index(one) > [told for _, told in whole].index("other 2 7")]


# -- memory ----------------------------------------------------------------------------------------------------------


async def test_a_transaction_of_200_000_rows_costs_little_memory_here_and_no_disk_there(db: Database) -> None:
    settings = {"BRIDGE_SLOT": db.slot, "BRIDGE_PUBLICATION": PUBLICATION}
    async with (
        BridgeProcess(db.dsn, **settings) as bridge,
        open_socket(bridge.url, token(USER)) as socket,
        writing(db) as other,
    ):
        assert (await receive(socket))["type"] == "ready"
        await db.post("first")
        assert (await receive_data(socket))["record"]["title"] == "first"
        before = bridge.memory("VmRSS")
        await other.execute("BEGIN")
        for n in range(4):
            await other.execute(f"SAVEPOINT s{n}")
            await other.execute(
                f"INSERT INTO posts (user_id, title, body) SELECT '{USER}', 'bulk', repeat('x', 400) "
                "FROM generate_series(1, 50000)"
            )
        await eventually(lambda: has_sent(db, 100 << 20), 60)
        await db.post("meanwhile")
        assert (await receive_data(socket))["record"]["title"] == "meanwhile"
        await other.execute("ROLLBACK TO s3; COMMIT")
        bulk = await receive_data(socket, 30)
        assert (bulk["type"], bulk["table"], bulk["reason"]) == ("resync", "public.posts", "bulk")
        await db.post("next")
        assert (await receive_data(socket))["record"]["title"] == "next"
        assert bridge.memory("VmHWM") - before < 32 << 20
    assert (await statistics(db))["spill_bytes"] < 1 << 20


async def has_sent(db: Database, size: int) -> bool:
    return bool((await statistics(db))["stream_bytes"] > size)
