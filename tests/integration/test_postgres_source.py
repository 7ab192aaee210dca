"""The `postgres` source against a real server: nothing is lost, repeated, or told before it can be seen."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from realtime_bridge.change import ABSENT, Body, Change, Control
from realtime_bridge.dev.engines import EmbeddedPostgres
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.errors import BridgeError, ConfigurationError, SourceError
from realtime_bridge.sources.base import SourceBatch
from realtime_bridge.sources.postgres import PostgresSource, ensure_publication, slot_status
from realtime_bridge.sources.postgres_stream import PostgresStream
from realtime_bridge.sources.replication import UnpublishedError
from tests.proxies import Proxy
from tests.services import OTHER_POSTGRES, PgBouncer, eventually, running

pytestmark = pytest.mark.integration

PUBLICATION = "realtime_bridge"
POSTS = "public.posts"
USER = "00000000-0000-0000-0000-000000000001"


class Database:
    """A published database, with an ordinary connection to write to it."""

    def __init__(self, dsn: str, slot: str, connection: Any) -> None:
        self.dsn = dsn
        self.slot = slot
        self.connection = connection

    async def run(self, *statements: str) -> None:
        for statement in statements:
            await self.connection.execute(statement)

    async def post(self, *titles: str) -> None:
        for title in titles:
            await self.connection.execute("INSERT INTO posts (user_id, title) VALUES ($1, $2)", USER, title)

    def source(self, *tables: str, **options: Any) -> PostgresSource:
        return PostgresSource(self.dsn, slot=self.slot, publication=PUBLICATION, tables=tables or (POSTS,), **options)

    async def publish(self, *tables: str) -> None:
        await ensure_publication(self.dsn, PUBLICATION, tables)


@asynccontextmanager
async def opened(dsn: str, namespace: str) -> AsyncIterator[Database]:
    connection = await asyncpg.connect(dsn)
    try:
        await ensure_publication(dsn, PUBLICATION, [POSTS])
        yield Database(dsn, namespace.replace("-", "_"), connection)
    finally:
        await connection.close()


@pytest.fixture
async def db(database: str, namespace: str) -> AsyncIterator[Database]:
    async with opened(database, namespace) as db:
        yield db


async def batches(stream: PostgresStream, until: Callable[[list[SourceBatch]], Any]) -> list[SourceBatch]:
    """Read until the condition holds of all that was read; every batch is acknowledged."""
    found: list[SourceBatch] = []
    async with asyncio.timeout(15):
        async for batch in stream:
            found.append(batch)
            assert len(batch.bodies) == len(batch.watermarks)
            if batch.acknowledge is not None:
                stream.acknowledge(batch.acknowledge)
            if until(found):
                break
    return found


def bodies(found: list[SourceBatch]) -> list[Body]:
    return [body for batch in found for body in batch.bodies]


def changes(found: list[SourceBatch]) -> list[Change]:
    return [body for body in bodies(found) if isinstance(body, Change)]


async def read(stream: PostgresStream, count: int) -> list[Change]:
    """The next so many changes."""
    return changes(await batches(stream, lambda found: len(changes(found)) >= count))


async def read_until_idle(stream: PostgresStream) -> list[Body]:
    """Everything committed before now."""
    now = time.time()
    return bodies(await batches(stream, lambda found: any((b.proven_until or 0) > now for b in found)))


def titles(found: list[Change]) -> list[Any]:
    return [(change.new or change.old or ())[change.relation.index["title"]] for change in found]


# -- what a change looks like ----------------------------------------------------------------------------------------


async def test_every_operation_arrives_in_commit_order_behind_its_catalog_control(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await db.post("first")
        await db.run("UPDATE posts SET title = 'second'", "DELETE FROM posts")
        found = bodies(await batches(stream, lambda found: len(bodies(found)) >= 4))
    catalog, inserted, updated, deleted = found
    assert isinstance(catalog, Control)
    assert (catalog.kind, catalog.table) == ("catalog", POSTS)
    assert isinstance(inserted, Change)
    assert isinstance(updated, Change)
    assert isinstance(deleted, Change)
    assert [inserted.operation, updated.operation, deleted.operation] == ["INSERT", "UPDATE", "DELETE"]
    assert (inserted.old, deleted.new) == (None, None)
    assert updated.old == inserted.new
    assert updated.new == deleted.old
    assert (inserted.relation.name, inserted.relation.key, inserted.relation.full) == (POSTS, (0,), True)
    assert [column.type for column in inserted.relation.columns][:3] == ["int8", "uuid", "text"]
    assert abs(inserted.commit_time / 1e6 - time.time()) < 60


async def test_a_changed_policy_is_announced_before_the_next_row(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await db.post("before")
        await read(stream, 1)
        await db.run("CREATE POLICY more ON posts FOR SELECT TO anon USING (is_public)")
        await db.post("after")
        found = bodies(await batches(stream, lambda found: changes(found)))
    # Once for whatever the transaction wrote before its first description, and once by that description.
    assert [getattr(body, "kind", "change") for body in found] == ["catalog", "catalog", "change"]


async def test_rows_before_a_policy_change_in_one_transaction_come_behind_its_announcement(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await db.post("before")
        await read(stream, 1)
        insert = "INSERT INTO posts (user_id, title) VALUES (gen_random_uuid(), 'secret')"
        await db.run(f"BEGIN; {insert}; CREATE POLICY less ON posts AS RESTRICTIVE USING (false); COMMIT")
        found = bodies(await batches(stream, lambda found: changes(found)))
    assert isinstance(found[0], Control)
    assert (found[0].kind, found[0].table) == ("catalog", "*")


@pytest.mark.parametrize(
    "statement", ["REVOKE USAGE ON SCHEMA public FROM anon", "CREATE ROLE {0}; GRANT anon TO {0}; DROP ROLE {0}"]
)
async def test_rights_beyond_the_table_are_announced_before_the_next_row(
    db: Database, statement: str, namespace: str
) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await db.post("before")
        await read(stream, 1)
        role = namespace.replace("-", "_")
        for part in statement.format(role).split("; ")[:2]:
            await db.run(part)
        await db.post("after")
        found = bodies(await batches(stream, lambda found: changes(found)))
        await db.run(*statement.format(role).split("; ")[2:])
    assert isinstance(found[0], Control)
    assert (found[0].kind, found[0].table) == ("catalog", "*")


async def test_a_new_column_makes_copies_doubtful(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await db.post("before")
        await read(stream, 1)
        await db.run("ALTER TABLE posts ADD COLUMN likes int NOT NULL DEFAULT 7")
        await db.post("after")
        found = bodies(await batches(stream, lambda found: changes(found)))
    assert [getattr(body, "reason", "change") for body in found] == [None, None, "schema_changed", "change"]
    change = found[-1]
    assert isinstance(change, Change)
    assert change.new is not None
    assert change.new[change.relation.index["likes"]] == "7"


async def test_the_default_identity_brings_keys_only_and_a_changed_key_shows(db: Database) -> None:
    await db.run("CREATE TABLE notes (a int, id int PRIMARY KEY, body text)", "INSERT INTO notes VALUES (1, 1, 'x')")
    await db.publish("public.notes")
    async with db.source("public.notes").open(None, owner="ns/1") as stream:
        await db.run("UPDATE notes SET body = 'y'", "UPDATE notes SET id = 2", "DELETE FROM notes")
        plain, moved, deleted = await read(stream, 3)
    assert plain.relation.key == (1,)
    assert not plain.relation.full
    assert plain.old is None
    assert (moved.old, moved.new) == ((ABSENT, "1", ABSENT), ("1", "2", "y"))
    assert deleted.old == (ABSENT, "2", ABSENT)


@pytest.mark.parametrize("full", [False, True])
async def test_an_unchanged_large_value_is_absent_unless_the_old_row_brings_it(db: Database, full: bool) -> None:
    await db.run(
        "CREATE TABLE notes (id int PRIMARY KEY, n int, body text)",
        "ALTER TABLE notes ALTER body SET STORAGE EXTERNAL",
        f"ALTER TABLE notes REPLICA IDENTITY {'FULL' if full else 'DEFAULT'}",
        "INSERT INTO notes VALUES (1, 1, repeat('x', 10000))",
    )
    await db.publish("public.notes")
    async with db.source("public.notes").open(None, owner="ns/1") as stream:
        await db.run("UPDATE notes SET n = 2")
        (change,) = await read(stream, 1)
    assert change.new == ("1", "2", "x" * 10000 if full else ABSENT)


async def test_an_identity_without_the_primary_key_makes_updates_doubtful(db: Database) -> None:
    await db.run(
        "CREATE TABLE notes (id int PRIMARY KEY, code int NOT NULL UNIQUE)",
        "ALTER TABLE notes REPLICA IDENTITY USING INDEX notes_code_key",
    )
    await db.publish("public.notes")
    async with db.source("public.notes").open(None, owner="ns/1") as stream:
        await db.run("INSERT INTO notes VALUES (1, 1)", "UPDATE notes SET id = 2", "DELETE FROM notes")
        found = await read_until_idle(stream)
    assert [getattr(body, "reason", "change") for body in found] == [None, "change", "upstream_gap", "upstream_gap"]


async def test_partitions_speak_in_the_name_of_their_table_and_full_only_if_all_are(db: Database) -> None:
    await db.run(
        "CREATE TABLE logs (id int PRIMARY KEY, body text) PARTITION BY RANGE (id)",
        "CREATE TABLE logs_1 PARTITION OF logs FOR VALUES FROM (0) TO (10)",
        "ALTER TABLE logs REPLICA IDENTITY FULL",
        "INSERT INTO logs VALUES (1, 'x')",
    )
    await db.publish("public.logs")
    async with db.source("public.logs").open(None, owner="ns/1") as stream:
        await db.run("DELETE FROM logs")
        (half,) = await read(stream, 1)
        await db.run("ALTER TABLE logs_1 REPLICA IDENTITY FULL", "ALTER TABLE logs REPLICA IDENTITY FULL")
        await db.run("INSERT INTO logs VALUES (1, 'x')", "DELETE FROM logs")
        whole = (await read(stream, 2))[1]
    assert (half.relation.name, half.old) == ("public.logs", ("1", ABSENT))
    assert whole.old == ("1", "x")


async def test_a_partition_that_sends_no_key_makes_updates_doubtful(db: Database) -> None:
    await db.run(
        "CREATE TABLE logs (id int PRIMARY KEY, code int NOT NULL) PARTITION BY RANGE (id)",
        "CREATE TABLE logs_1 PARTITION OF logs FOR VALUES FROM (0) TO (10)",
        "CREATE UNIQUE INDEX code ON logs_1 (code)",
    )
    await db.publish("public.logs")
    told = []
    async with db.source("public.logs").open(None, owner="ns/1") as stream:
        for index in ("logs_1_pkey", "code", "logs_1_pkey"):
            await db.run(f"ALTER TABLE logs_1 REPLICA IDENTITY USING INDEX {index}")
            await db.run("INSERT INTO logs VALUES (1, 10)", "UPDATE logs SET id = 2", "DELETE FROM logs")
            found = await read_until_idle(stream)
            words = (body.reason if isinstance(body, Control) else body.operation for body in found)
            told.append([word for word in words if word is not None])
    whole = ["INSERT", "UPDATE", "DELETE"]
    assert told == [whole, ["INSERT", "upstream_gap", "upstream_gap"], whole]


async def test_a_deletion_that_came_without_a_key_is_a_gap_whatever_the_identity_is_by_now(db: Database) -> None:
    await db.run(
        "CREATE TABLE logs (id int PRIMARY KEY, code int NOT NULL) PARTITION BY RANGE (id)",
        "CREATE TABLE logs_1 PARTITION OF logs FOR VALUES FROM (0) TO (10)",
        "CREATE UNIQUE INDEX code ON logs_1 (code)",
        "ALTER TABLE logs_1 REPLICA IDENTITY USING INDEX code",
    )
    await db.publish("public.logs")
    async with db.source("public.logs").open(None, owner="ns/1") as stream:
        watermark = (await anext(stream)).watermark
    await eventually(lambda: idle(db))
    await db.run("INSERT INTO logs VALUES (1, 10)", "DELETE FROM logs", "ALTER TABLE logs_1 REPLICA IDENTITY DEFAULT")
    async with db.source("public.logs").open(watermark, owner="ns/1") as stream:
        found = await read_until_idle(stream)
    assert [getattr(body, "reason", "change") for body in found] == [None, "change", "upstream_gap"]


async def test_domains_and_look_alikes_get_the_type_by_which_they_are_written(db: Database) -> None:
    await db.run(
        "CREATE DOMAIN small AS int CHECK (VALUE < 100)",
        "CREATE DOMAIN smaller AS small",
        "CREATE SCHEMA other",
        "CREATE TYPE other.int4 AS ENUM ('one, two')",
        "CREATE TYPE _mood AS ENUM ('{,}')",
        "CREATE TYPE colour AS ENUM ('red')",
        "CREATE TABLE notes (id smaller PRIMARY KEY, a smaller[], b other.int4, c _mood, d colour, e colour[])",
    )
    await db.publish("public.notes")
    async with db.source("public.notes").open(None, owner="ns/1") as stream:
        await db.run("INSERT INTO notes VALUES (1, '{2}', 'one, two', '{,}', 'red', '{red}')")
        (change,) = await read(stream, 1)
    types = [column.type for column in change.relation.columns]
    assert types == ["int4", "_int4", "text", "text", "colour", "_colour"]
    assert change.new == ("1", "{2}", "one, two", "{,}", "red", "{red}")


async def test_texts_do_not_depend_on_how_the_role_likes_them(db: Database) -> None:
    settings = {"TimeZone": "Asia/Tokyo", "DateStyle": "German", "IntervalStyle": "iso_8601", "bytea_output": "escape"}
    await db.run(
        "CREATE TABLE notes (id int PRIMARY KEY, a timestamptz, b interval, c bytea, d float8)",
        *(f"ALTER DATABASE \"{db.dsn.rpartition('/')[2]}\" SET {name} = '{value}'" for name, value in settings.items()),
        f'ALTER DATABASE "{db.dsn.rpartition("/")[2]}" SET extra_float_digits = -10',
    )
    await db.publish("public.notes")
    async with db.source("public.notes").open(None, owner="ns/1") as stream:
        values = "1, '2026-01-01 00:00:00+00', '1 day 02:03:04', '\\x00ff', 0.1::float8 + 0.2::float8"
        await db.run(f"INSERT INTO notes VALUES ({values})")
        (change,) = await read(stream, 1)
    assert change.new == ("1", "2026-01-01 00:00:00+00", "1 day 02:03:04", "\\x00ff", "0.30000000000000004")


# -- what is told instead of changes ---------------------------------------------------------------------------------


async def test_a_truncate_is_a_resync_of_the_tables_that_are_followed(db: Database) -> None:
    await db.run("CREATE TABLE notes (id int PRIMARY KEY)")
    await db.publish(POSTS, "public.notes")
    async with db.source().open(None, owner="ns/1") as stream:
        await read_until_idle(stream)
        await db.run("TRUNCATE posts, notes")
        found = await read_until_idle(stream)
    assert [(b.table, b.reason) for b in found if isinstance(b, Control) and b.kind == "resync"] == [
        (POSTS, "truncated")
    ]


async def test_a_bulk_transaction_is_one_resync_a_table_and_the_next_one_is_told(db: Database) -> None:
    async with db.source(transaction_rows=10).open(None, owner="ns/1") as stream:
        await db.run(f"INSERT INTO posts (user_id, title) SELECT '{USER}', 'many' FROM generate_series(1, 11)")
        await db.post("one")
        found = await read_until_idle(stream)
    assert [getattr(b, "reason", "change") for b in found] == ["bulk", None, "change"]


async def test_a_large_transaction_comes_in_bounded_batches(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await db.run(f"INSERT INTO posts (user_id, title) SELECT '{USER}', n FROM generate_series(1, 2500) n")
        found = await batches(stream, lambda found: len(changes(found)) >= 2500)
    assert max(len(batch.bodies) for batch in found) <= 1000
    assert titles(changes(found)) == [str(n) for n in range(1, 2501)]


# -- resuming --------------------------------------------------------------------------------------------------------


async def test_closing_at_any_point_loses_nothing_and_repeats_no_row(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        start = (await batches(stream, lambda found: True))[0].watermark
    await db.post("a", "b")
    await db.run(f"INSERT INTO posts (user_id, title) SELECT '{USER}', 'c' || n FROM generate_series(1, 3) n")
    await db.post("d")
    expected = ["a", "b", "c1", "c2", "c3", "d"]
    async with db.source().open(start, owner="ns/1") as stream:
        found = await batches(stream, lambda found: len(changes(found)) >= 6)
        watermarks = [w for batch in found for w in batch.watermarks]
    every = bodies(found)
    # What was acknowledged is gone, so cuts are tried from the last to the first on slots that saw none of it.
    for cut in range(len(every)):
        head = titles([body for body in every[: cut + 1] if isinstance(body, Change)])
        await db.run(f"SELECT pg_copy_logical_replication_slot('{db.slot}', '{db.slot}_{cut}')")
        again = PostgresSource(db.dsn, slot=f"{db.slot}_{cut}", publication=PUBLICATION, tables=[POSTS])
        async with again.open(watermarks[cut].replace(db.slot, f"{db.slot}_{cut}"), owner="ns/1") as stream:
            tail = await read_until_idle(stream)
        assert not [body for body in tail if isinstance(body, Control) and body.reason is not None]
        assert head + titles([body for body in tail if isinstance(body, Change)]) == expected


async def test_cancelling_the_iteration_loses_nothing(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        found: list[SourceBatch] = []
        written = 0
        async with asyncio.timeout(20):
            while len(changes(found)) < 50:
                written += 1
                if written <= 50:
                    await db.post(str(written))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.0005 * (written % 20)):
                        found.append(await anext(stream))
    assert titles(changes(found)) == [str(n) for n in range(1, 51)]


async def test_only_what_was_acknowledged_is_forgotten(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        start = (await batches(stream, lambda found: True))[0].watermark
        await db.post("kept")
        async with asyncio.timeout(10):
            async for batch in stream:
                if batch.bodies:
                    break
            for _ in range(3):
                await anext(stream)
    async with db.source().open(start, owner="ns/1") as stream:
        assert titles(await read(stream, 1)) == ["kept"]


async def test_idle_traffic_elsewhere_moves_the_watermark_so_that_wal_is_freed(db: Database) -> None:
    await db.run("CREATE TABLE elsewhere (n int)")
    async with db.source().open(None, owner="ns/1") as stream:
        first = (await batches(stream, lambda found: True))[0].acknowledge
        await db.run("INSERT INTO elsewhere SELECT generate_series(1, 1000)")
        last = (await batches(stream, lambda found: any(b.proven_until for b in found[1:])))[-1].acknowledge
        assert first is not None
        assert last is not None
        assert last > first
        confirmed = "SELECT (confirmed_flush_lsn - '0/0') >= $2 FROM pg_replication_slots WHERE slot_name = $1"
        await batches(stream, lambda found: len(found) >= 3)
        assert await db.connection.fetchval(confirmed, db.slot, last)


@pytest.mark.parametrize("backend_type", ["walsender", "client backend"])
async def test_a_lost_connection_ends_the_iteration_and_the_next_one_continues(db: Database, backend_type: str) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        watermark = (await anext(stream)).watermark
        await db.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            f"AND backend_type = '{backend_type}' AND pid <> pg_backend_pid()"
        )
        await db.post("meanwhile")
        with pytest.raises(SourceError):
            await batches(stream, lambda found: False)
    async with db.source().open(watermark, owner="ns/1") as stream:
        assert titles(await read(stream, 1)) == ["meanwhile"]


# -- gaps ------------------------------------------------------------------------------------------------------------


async def first_bodies(source: PostgresSource, after: str | None) -> list[Body]:
    async with source.open(after, owner="ns/1") as stream:
        return list((await anext(stream)).bodies)


GAP = Control("resync", "*", "upstream_gap")
GAP_OF_POSTS = Control("resync", POSTS, "upstream_gap")


async def test_a_first_start_is_no_gap(db: Database) -> None:
    assert await first_bodies(db.source(), None) == []
    assert await first_bodies(db.source(), None) == []


async def test_another_incarnation_is_a_gap(db: Database) -> None:
    for watermark in ("", "supabase:whatever", f"1/1/{db.slot}|0|0|0"):
        assert await first_bodies(db.source(), watermark) == [GAP]


async def test_a_slot_that_was_dropped_is_made_anew_and_is_a_gap(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        watermark = (await anext(stream)).watermark
    await eventually(lambda: idle(db))
    await db.run(f"SELECT pg_drop_replication_slot('{db.slot}')")
    await db.post("lost")
    assert await first_bodies(db.source(), watermark) == [GAP]


async def test_a_slot_that_somebody_else_read_is_a_gap(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        watermark = (await anext(stream)).watermark
    await eventually(lambda: idle(db))
    await db.post("stolen")
    await db.run(f"SELECT pg_replication_slot_advance('{db.slot}', pg_current_wal_lsn())")
    assert await first_bodies(db.source(), watermark) == [GAP]


async def test_a_server_that_went_back_in_time_is_a_gap(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        incarnation = (await anext(stream)).watermark.partition("|")[0]
    assert await first_bodies(db.source(), f"{incarnation}|0|ffffffff00000000|0") == [GAP]


async def test_a_lost_slot_is_replaced_and_is_a_gap(namespace: str) -> None:
    options = {"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
    with running(EmbeddedPostgres(options=options)) as server:
        connection = await asyncpg.connect(server.dsn())
        try:
            await connection.execute("CREATE TABLE posts (id int PRIMARY KEY)")
            async with opened(server.dsn(), namespace) as db:
                async with db.source().open(None, owner="ns/1") as stream:
                    watermark = (await anext(stream)).watermark
                await eventually(lambda: idle(db))
                for _ in range(4):
                    await db.run("SELECT pg_switch_wal()", "CREATE TABLE filler ()", "DROP TABLE filler", "CHECKPOINT")
                assert (await slot_status(db.dsn, db.slot)).wal_status == "lost"
                assert await first_bodies(db.source(), watermark) == [GAP]
                assert (await slot_status(db.dsn, db.slot)).wal_status == "reserved"
        finally:
            await connection.close()


@pytest.mark.parametrize("bin_dir", [None, *OTHER_POSTGRES], ids=str)
async def test_what_was_written_without_a_publication_is_a_gap_once_there_is_one_again(
    bin_dir: Path | None, namespace: str
) -> None:
    with running(EmbeddedPostgres(bin_dir=bin_dir)) as server:
        await install_schema(server.dsn())
        async with opened(server.dsn(), namespace) as db:
            seen: list[SourceBatch] = []
            with pytest.raises(BridgeError, match="CREATE PUBLICATION"):
                await drop_the_publication_of(db, seen)
            assert (await slot_status(db.dsn, db.slot)).exists
            await db.publish(POSTS)
            is_new = db.connection.get_server_version().major >= 18
            with contextlib.nullcontext() if is_new else pytest.raises(UnpublishedError):
                async with db.source().open(seen[-1].watermark, owner="ns/2") as stream:
                    await gap(stream)
            async with db.source().open(seen[-1].watermark, owner="ns/3") as stream:
                assert await gap(stream) == (GAP_OF_POSTS if is_new else GAP)
                await db.post("told")
                assert titles(await read(stream, 1)) == ["told"]


async def drop_the_publication_of(db: Database, seen: list[SourceBatch]) -> None:
    """Read until that is noticed, with something written meanwhile."""
    async with db.source().open(None, owner="ns/1") as stream:
        await db.run(f"DROP PUBLICATION {PUBLICATION}")
        await db.post("missed")
        await batches(stream, lambda found: seen.extend(found[-1:]))


async def gap(stream: PostgresStream) -> Body:
    """The first thing that is told, which nothing is proven before."""
    found = await batches(stream, bodies)
    assert not any(batch.proven_until for batch in found)
    return bodies(found)[0]


async def idle(db: Database) -> bool:
    """Whether the walsender of a closed stream has let go of its slot."""
    return not (await slot_status(db.dsn, db.slot)).active


# -- who may read ----------------------------------------------------------------------------------------------------


async def test_a_new_leader_ends_the_frozen_reader_of_its_namespace(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as frozen:
        watermark = (await anext(frozen)).watermark
        await db.post("told to the new one")
        async with db.source().open(watermark, owner="ns/2") as stream:
            assert titles(await read(stream, 1)) == ["told to the new one"]
        with pytest.raises(SourceError):
            await batches(frozen, lambda found: False)


async def test_a_foreign_reader_is_named_and_left_alone(db: Database) -> None:
    async with db.source().open(None, owner="someone/1") as theirs:
        with pytest.raises(SourceError, match=r"pid [0-9]+.*'someone/1'"):
            async with db.source().open(None, owner="some/1"):
                pass
        await db.post("still theirs")
        assert titles(await read(theirs, 1)) == ["still theirs"]


async def test_a_cancelled_reader_lets_go_of_the_slot_at_once(db: Database) -> None:
    async def follow() -> None:
        async with db.source().open(None, owner="ns/1") as stream:
            async for _ in stream:
                reading.set()

    reading = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(follow())
        await asyncio.wait_for(reading.wait(), 10)
        task.cancel()
    await eventually(lambda: idle(db), timeout=5)


async def test_a_slot_of_another_kind_is_refused(db: Database) -> None:
    await db.run(f"SELECT pg_create_physical_replication_slot('{db.slot}')")
    try:
        with pytest.raises(ConfigurationError, match="BRIDGE_SLOT"):
            await db.source().check()
    finally:
        await db.run(f"SELECT pg_drop_replication_slot('{db.slot}')")


# -- what must be there ----------------------------------------------------------------------------------------------


async def test_a_missing_publication_is_refused_with_the_sql_that_makes_it(db: Database) -> None:
    await db.run(f"DROP PUBLICATION {PUBLICATION}")
    with pytest.raises(ConfigurationError, match=r"CREATE PUBLICATION .* FOR TABLE public.posts") as caught:
        await db.source().check()
    await db.run(str(caught.value).split("`")[3])
    await db.source().check()
    assert not (await slot_status(db.dsn, db.slot)).exists


@pytest.mark.parametrize(
    "spoil",
    [
        "ALTER PUBLICATION realtime_bridge DROP TABLE posts",
        "ALTER PUBLICATION realtime_bridge SET (publish = 'insert')",
        "ALTER PUBLICATION realtime_bridge SET TABLE posts WHERE (is_public)",
    ],
)
async def test_what_a_publication_lacks_is_mended_by_ensure_publication(db: Database, spoil: str) -> None:
    await db.run(spoil)
    with pytest.raises(ConfigurationError, match="ALTER PUBLICATION"):
        await db.source().check()
    assert await ensure_publication(db.dsn, PUBLICATION, [POSTS])
    assert await ensure_publication(db.dsn, PUBLICATION, [POSTS]) == []
    await db.source().check()


async def test_a_partitioned_table_needs_the_publication_to_speak_in_its_name(db: Database) -> None:
    await db.run(
        "CREATE TABLE logs (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE logs_1 PARTITION OF logs FOR VALUES FROM (0) TO (10)",
        f"ALTER PUBLICATION {PUBLICATION} ADD TABLE logs",
        f"ALTER PUBLICATION {PUBLICATION} SET (publish_via_partition_root = false)",
    )
    with pytest.raises(ConfigurationError, match="publish_via_partition_root = true"):
        await db.source("public.logs").check()
    await ensure_publication(db.dsn, PUBLICATION, ["public.logs"])
    await db.source("public.logs").check()
    with pytest.raises(ConfigurationError, match="partition"):
        await ensure_publication(db.dsn, PUBLICATION, ["public.logs_1"])


async def test_tables_that_cannot_be_published_are_refused_before_harm_is_done(db: Database) -> None:
    await db.run("CREATE TABLE keyless (n int)", "CREATE VIEW seen AS TABLE posts")
    for table, reason in [("keyless", "REPLICA IDENTITY FULL"), ("seen", "not a table"), ("nowhere", "no table")]:
        with pytest.raises(ConfigurationError, match=reason):
            await ensure_publication(db.dsn, PUBLICATION, [f"public.{table}"])


async def test_a_publication_that_loses_its_table_is_noticed_while_reading(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await db.run(f"ALTER PUBLICATION {PUBLICATION} DROP TABLE posts")
        with pytest.raises(SourceError, match="ADD TABLE public"):
            await batches(stream, lambda found: False)


async def test_what_was_not_published_while_nobody_read_is_a_gap_behind_what_was(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        watermark = (await anext(stream)).watermark
    await eventually(lambda: idle(db))
    await db.post("told")
    await db.run(f"ALTER PUBLICATION {PUBLICATION} DROP TABLE posts")
    await db.post("missed")
    await db.run(f"ALTER PUBLICATION {PUBLICATION} ADD TABLE posts")
    await db.post("told, too")
    async with db.source().open(watermark, owner="ns/1") as stream:
        found = await batches(stream, lambda found: GAP_OF_POSTS in bodies(found))
        assert titles(changes(found)) == ["told", "told, too"]
        assert bodies(found)[-1] == GAP_OF_POSTS
        watermark = found[-1].watermark
    assert await first_bodies(db.source(), watermark) == []


async def test_what_was_not_published_for_a_moment_is_a_gap_before_anything_is_proven(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await read_until_idle(stream)
        await db.run(f"ALTER PUBLICATION {PUBLICATION} DROP TABLE posts")
        await db.post("missed")
        missed_at = time.time()
        await db.run(f"ALTER PUBLICATION {PUBLICATION} ADD TABLE posts")
        found = await batches(stream, lambda found: any((b.proven_until or 0) > missed_at for b in found))
        assert bodies(found) == [GAP_OF_POSTS]
        await db.post("told")
        assert titles(await read(stream, 1)) == ["told"]


async def test_a_table_that_was_not_read_for_a_time_is_a_gap_once_it_is_again(db: Database) -> None:
    await db.run("CREATE TABLE notes (id int PRIMARY KEY)")
    await db.publish(POSTS, "public.notes")
    both = db.source(POSTS, references=lambda: {"public.notes"})
    async with both.open(None, owner="ns/1") as stream:
        watermark = (await anext(stream)).watermark
    async with db.source().open(watermark, owner="ns/1") as stream:
        await db.run("INSERT INTO notes VALUES (1)")
        await db.post("told")
        told = await batches(stream, lambda found: any(b.proven_until for b in found) and changes(found))
    async with both.open(told[-1].watermark, owner="ns/1") as stream:
        found = await batches(stream, lambda found: any(batch.proven_until for batch in found))
        assert bodies(found) == [Control("resync", "public.notes", "upstream_gap")]
    async with both.open(found[-1].watermark, owner="ns/1") as stream:
        assert await read_until_idle(stream) == []


async def test_after_a_version_that_did_not_note_its_tables_each_is_a_gap_once(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        watermark = (await anext(stream)).watermark
    async with db.source().open(watermark.rpartition("|")[0], owner="ns/1") as stream:
        assert await read_until_idle(stream) == [GAP_OF_POSTS]


@pytest.mark.parametrize("apart", [True, False], ids=["in several transactions", "in one"])
async def test_rows_of_a_table_that_goes_by_another_name_for_a_moment_are_told(db: Database, apart: bool) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await db.post("first")
        await read_until_idle(stream)
        meanwhile = [
            "ALTER TABLE posts RENAME TO former",
            "UPDATE former SET title = 'changed'",
            "ALTER TABLE former RENAME TO posts",
        ]
        await db.run(*(meanwhile if apart else ["; ".join(meanwhile)]))
        found = await read_until_idle(stream)
    assert [(getattr(body, "kind", "change"), getattr(body, "reason", None)) for body in found] == [
        ("catalog", None),
        ("resync", "bulk"),
    ]


@pytest.mark.parametrize(
    ("away", "back"),
    [
        ("ALTER TABLE posts RENAME TO former", "ALTER TABLE former RENAME TO posts"),
        ("CREATE SCHEMA other; ALTER TABLE posts SET SCHEMA other", "ALTER TABLE other.posts SET SCHEMA public"),
        ("ALTER TABLE posts SET UNLOGGED", "ALTER TABLE posts SET LOGGED"),
    ],
    ids=["renamed", "in another schema", "unlogged"],
)
async def test_a_table_that_was_seen_to_be_away_is_a_gap_when_it_is_back(db: Database, away: str, back: str) -> None:
    await db.run(f"DROP PUBLICATION {PUBLICATION}", f"CREATE PUBLICATION {PUBLICATION} FOR TABLES IN SCHEMA public")
    async with db.source().open(None, owner="ns/1") as stream:
        await db.post("first")
        await read_until_idle(stream)
        await db.run(away)
        seen: list[SourceBatch] = []
        with pytest.raises(SourceError, match=f"{PUBLICATION}|no table"):
            await batches(stream, lambda found: seen.extend(found[-1:]))
    await db.run(back)
    async with db.source().open(seen[-1].watermark, owner="ns/1") as stream:
        assert await read_until_idle(stream) == [GAP_OF_POSTS]


async def test_what_began_before_a_table_was_published_is_a_gap_of_a_first_start(db: Database) -> None:
    async with db.source().open(None, owner="ns/1"):
        pass
    await eventually(lambda: idle(db))
    await db.run(f"ALTER PUBLICATION {PUBLICATION} DROP TABLE posts")
    writing = await asyncpg.connect(db.dsn)
    await writing.execute(f"BEGIN; INSERT INTO posts (user_id, title) VALUES ('{USER}', 'kept back')")
    await db.publish(POSTS)
    async with db.source().open(None, owner="ns/1") as stream:
        await anext(stream)
        await writing.execute("COMMIT")
        assert await read_until_idle(stream) == [GAP_OF_POSTS]
    await writing.close()


@pytest.mark.parametrize(
    "rewritten",
    [
        ["ALTER TABLE posts ALTER COLUMN title TYPE text USING upper(title)"],
        ["ALTER TABLE posts SET UNLOGGED", "UPDATE posts SET title = 'changed'", "ALTER TABLE posts SET LOGGED"],
    ],
    ids=["by another type", "after it was unlogged"],
)
async def test_a_table_that_was_rewritten_is_a_gap(db: Database, rewritten: list[str]) -> None:
    await db.run(f"DROP PUBLICATION {PUBLICATION}", f"CREATE PUBLICATION {PUBLICATION} FOR TABLES IN SCHEMA public")
    async with db.source().open(None, owner="ns/1") as stream:
        await db.post("first")
        await read_until_idle(stream)
        await db.run(*rewritten)
        assert await read_until_idle(stream) == [GAP_OF_POSTS]


async def test_rows_that_a_filter_kept_back_are_a_gap_once_it_is_gone(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await db.post("all see it")
        await read_until_idle(stream)
        await db.run(f"ALTER PUBLICATION {PUBLICATION} SET TABLE posts WHERE (id < 0)", "UPDATE posts SET title = 'no'")
        await db.publish(POSTS)
        assert await read_until_idle(stream) == [GAP_OF_POSTS]


@pytest.mark.parametrize("apart", [True, False], ids=["in several transactions", "in one"])
async def test_what_policies_read_is_doubted_too_when_it_was_not_published(db: Database, apart: bool) -> None:
    await db.run("CREATE TABLE members (id int PRIMARY KEY)", "INSERT INTO members VALUES (1)")
    await db.publish(POSTS, "public.members")
    async with db.source(references=lambda: {"public.members"}).open(None, owner="ns/1") as stream:
        await read_until_idle(stream)
        meanwhile = [
            f"ALTER PUBLICATION {PUBLICATION} DROP TABLE members",
            "DELETE FROM members",
            f"ALTER PUBLICATION {PUBLICATION} ADD TABLE members",
        ]
        await db.run(*(meanwhile if apart else ["; ".join(meanwhile)]))
        assert await read_until_idle(stream) == [Control("resync", "public.members", "upstream_gap")]


@pytest.mark.parametrize("change", ["SET (publish = 'insert')", "RENAME TO other", "SET TABLE posts WHERE (id < 2)"])
async def test_nothing_is_proven_while_a_publication_does_not_carry_everything(change: str, db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await read_until_idle(stream)
        await db.run(f"ALTER PUBLICATION {PUBLICATION} {change}")
        changed_at = time.time()
        seen: list[SourceBatch] = []
        with pytest.raises(SourceError):
            await batches(stream, lambda found: seen.extend(found[-1:]))
        assert max((batch.proven_until or 0 for batch in seen), default=0) < changed_at


async def test_a_role_without_replication_is_told_what_it_lacks(db: Database, postgres: EmbeddedPostgres) -> None:
    name = db.dsn.rpartition("/")[2]
    with pytest.raises(ConfigurationError, match='ALTER ROLE "authenticator" REPLICATION'):
        await PostgresSource(
            postgres.dsn(name, "authenticator"), slot=db.slot, publication=PUBLICATION, tables=[POSTS]
        ).check()


async def test_an_address_where_nobody_answers_says_so(postgres: EmbeddedPostgres) -> None:
    dsn = postgres.dsn().replace(f":{postgres.port}/", ":1/")
    with pytest.raises(SourceError, match="IPv6"):
        await PostgresSource(dsn, slot="s", publication=PUBLICATION, tables=[POSTS]).check()
    with pytest.raises(ConfigurationError, match="DATABASE_URL"):
        await PostgresSource("mysql://localhost/x", slot="s", publication=PUBLICATION, tables=[POSTS]).check()


async def test_a_pooler_is_refused_with_the_advice_to_connect_directly(db: Database) -> None:
    with running(PgBouncer(db.dsn)) as pooler:
        source = PostgresSource(pooler.dsn, slot=db.slot, publication=PUBLICATION, tables=[POSTS])
        with pytest.raises((ConfigurationError, SourceError), match="pooler"):
            await source.check()


class Moving(Proxy):
    """A name that leads each connection to the next one of some servers."""

    def __init__(self, *ports: int) -> None:
        super().__init__()
        self._ports = iter(ports)

    def begin(self, link: Any) -> None:
        self.upstream = next(self._ports)
        super().begin(link)


async def test_a_name_that_moves_between_two_servers_while_it_is_read_is_refused(namespace: str) -> None:
    with running(EmbeddedPostgres()) as old, running(EmbeddedPostgres()) as new:
        for server in (old, new):
            await install_schema(server.dsn())
            async with opened(server.dsn(), namespace) as db, db.source().open(None, owner="ns/1"):
                pass
        async with Moving(old.port, new.port) as proxy:
            dsn = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"
            moved = Database(dsn, namespace.replace("-", "_"), None)
            with pytest.raises(SourceError, match="two servers"):
                async with moved.source().open(None, owner="ns/2"):
                    pass


async def test_a_server_without_logical_replication_is_refused_with_the_sql_that_mends_it() -> None:
    with running(EmbeddedPostgres(options={"wal_level": "replica"})) as server:
        source = PostgresSource(server.dsn(), slot="s", publication=PUBLICATION, tables=[POSTS])
        with pytest.raises(ConfigurationError, match="ALTER SYSTEM SET wal_level = logical"):
            await source.check()


async def test_the_status_of_a_slot_is_known_without_reading_it(db: Database) -> None:
    assert not (await slot_status(db.dsn, db.slot)).exists
    async with db.source().open(None, owner="ns/1"):
        status = await slot_status(db.dsn, db.slot)
        assert (status.exists, status.active, status.wal_status) == (True, True, "reserved")
        assert status.lag_bytes >= 0


# -- proof and visibility --------------------------------------------------------------------------------------------


async def test_time_is_proven_although_an_open_transaction_keeps_wal_in_memory(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        await db.run("BEGIN", f"INSERT INTO posts (user_id, title) VALUES ('{USER}', 'open')")
        found = await read_until_idle(stream)
        assert found == []
        await db.run("COMMIT")
        assert titles(await read(stream, 1)) == ["open"]


async def test_time_is_proven_at_the_start_of_a_wal_segment_without_writing_anything(namespace: str) -> None:
    with running(EmbeddedPostgres(options={"autovacuum": "off"})) as server:
        admin = await asyncpg.connect(server.dsn())
        try:
            await admin.execute("CREATE TABLE posts (id int PRIMARY KEY)")
            async with opened(server.dsn(), namespace) as db, db.source().open(None, owner="ns/1") as stream:
                await admin.execute("SELECT pg_switch_wal()")
                await read_until_idle(stream)
                await read_until_idle(stream)
                written = "SELECT pg_walfile_name_offset(pg_current_wal_insert_lsn())::text"
                assert str(await admin.fetchval(written)).endswith(",40)")
        finally:
            await admin.close()


async def test_what_is_proven_was_given(db: Database) -> None:
    async with db.source().open(None, owner="ns/1") as stream:
        committed: list[float] = []
        async with asyncio.TaskGroup() as tasks:

            async def write() -> None:
                for n in range(200):
                    await db.post(str(n))
                    committed.append(time.time())

            tasks.create_task(write())
            seen = 0
            async with asyncio.timeout(20):
                async for batch in stream:
                    seen += len(changes([batch]))
                    if batch.proven_until is not None:
                        assert seen >= sum(at < batch.proven_until for at in committed)
                    if seen == 200:
                        break


async def test_a_clock_of_postgres_that_is_ahead_proves_nothing_of_what_is_to_come(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() - 3600)
    async with db.source().open(None, owner="ns/1") as stream:
        found = await batches(stream, lambda found: sum(batch.proven_until is not None for batch in found) == 2)
        first, second = (batch.proven_until for batch in found if batch.proven_until is not None)
        assert first < second <= time.time()


@pytest.mark.parametrize("rows", [1, 2000], ids=["sent whole", "sent in blocks"])
async def test_a_commit_is_not_told_before_it_can_be_seen(namespace: str, rows: int) -> None:
    with running(EmbeddedPostgres(options={"logical_decoding_work_mem": "64kB"})) as server:
        admin = await asyncpg.connect(server.dsn())
        try:
            await admin.execute("CREATE TABLE posts (id int PRIMARY KEY)")
            async with opened(server.dsn(), namespace) as db, db.source().open(None, owner="ns/1") as stream:
                await commit_that_waits_for_a_standby(admin, db, stream, rows)
        finally:
            await admin.close()


async def commit_that_waits_for_a_standby(admin: Any, db: Database, stream: PostgresStream, rows: int) -> None:
    await set_standbys(admin, db.dsn, "nobody")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(db.run(f"INSERT INTO posts SELECT generate_series(1, {rows})"))
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        await eventually(lambda: admin.fetchval(waiting))
        sent = "SELECT sent_lsn >= pg_current_wal_lsn() FROM pg_stat_replication"
        await eventually(lambda: admin.fetchval(sent))
        held = await batches(stream, lambda found: len(found) >= 4)
        assert bodies(held) == []
        assert await admin.fetchval("SELECT count(*) FROM posts") == 0
        await set_standbys(admin, db.dsn, "")
        assert [change.new for change in await read(stream, rows)] == [(str(n),) for n in range(1, rows + 1)]
        assert await admin.fetchval("SELECT count(*) FROM posts") == rows
        streamed = "SELECT stream_txns FROM pg_stat_replication_slots WHERE slot_name = $1"
        assert await admin.fetchval(streamed, db.slot) == (rows > 1)


async def set_standbys(admin: Any, dsn: str, names: str) -> None:
    await admin.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
    await admin.execute("SELECT pg_reload_conf()")
    await eventually(lambda: admin.fetchval("SELECT current_setting('synchronous_standby_names') = $1", names))
    if names:
        await commits_wait(admin, dsn)


async def commits_wait(admin: Any, dsn: str) -> None:
    """Wait until commits wait for standbys, which begins when the checkpointer, too, has read the settings again."""
    connection = await asyncpg.connect(dsn)
    is_waiting = "SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = $1"

    async def commit_again_and_again() -> None:
        with contextlib.suppress(asyncpg.PostgresConnectionError, asyncpg.InterfaceError):
            while True:
                await connection.execute("SELECT pg_logical_emit_message(true, 'test', '')")

    committing = asyncio.create_task(commit_again_and_again())
    await eventually(lambda: admin.fetchval(is_waiting, connection.get_server_pid()))
    connection.terminate()
    await committing


async def test_a_server_that_takes_the_bridge_for_a_standby_is_told_apart_from_a_slow_one(namespace: str) -> None:
    with running(EmbeddedPostgres()) as server:
        admin = await asyncpg.connect(server.dsn(), server_settings={"synchronous_commit": "local"})
        try:
            await admin.execute("CREATE TABLE posts (id int PRIMARY KEY)")
            async with opened(server.dsn(), namespace) as db, db.source().open(None, owner="ns/1") as stream:
                await set_standbys(admin, db.dsn, "*")
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(db.run("INSERT INTO posts VALUES (1)"))
                    with pytest.raises(SourceError, match="synchronous_standby_names"):
                        await batches(stream, lambda found: False)
                    await set_standbys(admin, db.dsn, "")
        finally:
            await admin.close()
