"""The source, through the official client, against a local Supabase on a real database that can misbehave."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg
import orjson
import pytest
from realtime import AsyncRealtimeClient

from realtime_bridge.change import ABSENT, Body, Change, Control, Image
from realtime_bridge.dev.supabase import LocalSupabase
from realtime_bridge.errors import ConfigurationError, SourceError
from realtime_bridge.sources import supabase_link as link_module
from realtime_bridge.sources.base import Source, SourceBatch
from realtime_bridge.sources.supabase import SupabaseSource, SupabaseStream
from realtime_bridge.sources.supabase_payload import Keys
from realtime_bridge.values import encode_image
from tests.services import SECRET, eventually

pytestmark = [
    pytest.mark.integration,
    # supabase 2.34.1 hands its own PostgREST client arguments that that client has deprecated.
    pytest.mark.filterwarnings("ignore:The '(timeout|verify)' parameter is deprecated:DeprecationWarning:supabase"),
    # realtime 2.34.1 logs a lost connection through properties that websockets has deprecated.
    pytest.mark.filterwarnings("ignore:ConnectionClosed.(code|reason) is deprecated:DeprecationWarning:websockets"),
]

SERVICE_KEY = "sb_secret_service"
ANON_KEY = "sb_publishable_anon"


class Doubt(NamedTuple):
    """That something may be missing of a table, in its place among what is told."""

    table: str


GAP = Doubt("public.posts")


def local(dsn: str, *tables: str) -> LocalSupabase:
    return LocalSupabase(
        dsn, jwt_secret=SECRET, service_key=SERVICE_KEY, anon_key=ANON_KEY, tables=tables or ("public.posts",)
    )


def source_of(supabase: LocalSupabase, *tables: str) -> SupabaseSource:
    return SupabaseSource(supabase.url, SERVICE_KEY, tables=tables or ("public.posts",))


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


class Reader:
    """Takes from a stream until there is enough, within a deadline."""

    def __init__(self, stream: SupabaseStream, supabase: LocalSupabase) -> None:
        self.supabase = supabase
        self.batches: list[SourceBatch] = []
        self._iterator = aiter(stream)

    @property
    def told(self) -> list[Body | Doubt]:
        """Everything behind the doubt that every stream begins with; other doubts stand behind what came with them."""
        return [
            told
            for number, batch in enumerate(self.batches)
            for told in (*map(without_time, batch.bodies), *map(Doubt, batch.doubts if number else ()))
        ]

    @property
    def changes(self) -> list[Change]:
        return [told for told in self.told if isinstance(told, Change)]

    async def next(self) -> SourceBatch:
        async with asyncio.timeout(15):
            batch = await anext(self._iterator)
        assert len(batch.bodies) == len(batch.watermarks)
        self.batches.append(batch)
        return batch

    async def until(self, number: int) -> list[Body | Doubt]:
        while len(self.told) < number:
            await self.next()
        return self.told


@asynccontextmanager
async def streaming(
    dsn: str, *tables: str, only: Sequence[str] = (), keys: Keys | None = None
) -> AsyncIterator[Reader]:
    """A reader of a stand-in that publishes `tables`; it subscribes to all, or to `only` some."""
    async with local(dsn, *tables) as supabase:
        source = SupabaseSource(supabase.url, SERVICE_KEY, tables=only or tables or ("public.posts",), keys=keys)
        async with source.open(None, owner="test/1") as stream:
            yield Reader(stream, supabase)


def without_time(body: Body) -> Body:
    return Control(body.kind, body.table, body.reason) if isinstance(body, Control) else body


def row(change: Change, image: Image | None) -> Any:
    return None if image is None else orjson.loads(encode_image(change.relation, image))


async def insert(connection: "asyncpg.Connection[asyncpg.Record]", title: str) -> int:
    number: int = await connection.fetchval(
        "insert into posts (user_id, title) values ($1, $2) returning id", uuid4(), title
    )
    return number


async def consumed(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Wait until the stand-in has told, and so forgotten, what is committed by now: once it has, it reads on."""
    passed = "select confirmed_flush_lsn >= $1 from pg_replication_slots where database = current_database()"
    for _ in range(2):
        end = await connection.fetchval("select pg_logical_emit_message(false, 'test', '')")
        await eventually(partial(connection.fetchval, passed, end))


def test_it_is_a_source() -> None:
    source: Source = SupabaseSource("http://127.0.0.1:1", SERVICE_KEY, tables=["public.posts"])
    assert source.name == "supabase"


async def test_insert_update_and_delete_come_with_their_values_in_order(database: str) -> None:
    async with connected(database) as db, streaming(database) as reader:
        number = await insert(db, "first")
        await db.execute("update posts set title = 'second', is_public = true where id = $1", number)
        await db.execute("delete from posts where id = $1", number)
        await reader.until(3)
    created, updated, deleted = reader.changes
    assert [c.operation for c in reader.changes] == ["INSERT", "UPDATE", "DELETE"]
    assert created.relation.name == "public.posts"
    assert created.relation.key == (0,)
    assert created.old is None
    assert row(created, created.new)["title"] == "first"
    assert row(created, created.new)["id"] == number
    assert (row(updated, updated.old)["title"], row(updated, updated.new)["title"]) == ("first", "second")
    assert row(updated, updated.new)["is_public"] is True
    assert deleted.new is None
    # Row-level security is on: whatever the replica identity, a DELETE brings the key only.
    assert row(deleted, deleted.old) == {"id": number}
    assert deleted.old is not None
    assert deleted.old.count(ABSENT) == len(deleted.old) - 1


VALUES = """
select 1::bigint as id, 9007199254740993 as big, 1.5::numeric as exact, 0.1::float8 as double, 1e20::float8 as far,
  true as flag, 'a "quoted" é'::text as words, null::text as nothing,
  '2026-01-02 03:04:05.678912+00'::timestamptz as at,
  '2026-01-02 03:04:05'::timestamp as naive, '2026-01-02'::date as day, '{"a": [1, null, {"b": "c"}]}'::jsonb as doc,
  '{1,NULL,3}'::int[] as numbers, array['x y', '', 'NULL', null, 'a"b\\c'] as names, '{{1,2},{3,4}}'::int[] as matrix,
  '\\x0102ff'::bytea as bytes, array['\\x01'::bytea] as many, '1 day 02:03:04'::interval as span,
  'infinity'::timestamptz as never, '0044-03-15 12:00:00+00 BC'::timestamptz as ides, 'NaN'::numeric as nan,
  '[1,5)'::int4range as range, array['2026-01-02 03:04:05+00'::timestamptz] as times
"""


async def test_values_of_every_kind_have_the_texts_that_postgres_writes(database: str) -> None:
    async with connected(database) as db:
        await db.execute(f"create table kinds as {VALUES}; alter table kinds add primary key (id); truncate kinds")
        async with streaming(database, "public.kinds") as reader:
            await db.execute(f"insert into kinds {VALUES}")
            await reader.until(1)
        await db.execute("set timezone = 'UTC'")
        (change,) = reader.changes
        texts = [f'"{column.name}"::text' for column in change.relation.columns]
        (expected,) = await db.fetch(f"select {', '.join(texts)} from kinds")
    received = dict(zip(change.relation.index, change.new or (), strict=True))
    # json's text is compact where jsonb's has spaces; every other text is what the output function writes.
    assert received.pop("doc") == '{"a":[1,null,{"b":"c"}]}'
    wanted = dict(zip(change.relation.index, expected, strict=True))
    wanted.pop("doc")
    assert (received.pop("flag"), wanted.pop("flag")) == ("t", "true")  # the cast to text alone spells it out
    assert received == wanted


async def test_a_table_without_secured_rows_teaches_its_key_by_an_old_row(database: str) -> None:
    async with connected(database) as db:
        await db.execute("create table pairs (a int, b int, id int, primary key (a, b))")
        async with streaming(database, "public.pairs") as reader:
            await db.execute("insert into pairs values (1, 2, 3)")
            await db.execute("update pairs set a = 5")
            await db.execute("delete from pairs")
            created, control, updated, deleted = await reader.until(4)
    assert isinstance(created, Change)
    assert isinstance(updated, Change)
    assert isinstance(deleted, Change)
    assert created.relation.key == (2,)
    assert control == Control("catalog", "public.pairs")
    assert updated.relation.key == (0, 1)
    assert (updated.old, updated.new) == (("1", "2", ABSENT), ("5", "2", "3"))
    assert deleted.old == ("5", "2", ABSENT)


async def test_keys_are_looked_up_where_they_can_be(database: str) -> None:
    asked: list[str] = []

    async def keys(table: str) -> list[str]:
        asked.append(table)
        return ["b", "a"]

    async with connected(database) as db:
        await db.execute("create table pairs (a int, b int, id int, primary key (a, b))")
        async with streaming(database, "public.pairs", keys=keys) as reader:
            await db.execute("insert into pairs values (1, 2, 3), (4, 5, 6)")
            await reader.until(2)
    assert [change.relation.key for change in reader.changes] == [(0, 1), (0, 1)]
    assert asked == ["public.pairs"]


async def test_a_new_column_is_told_before_the_row_that_has_it(database: str) -> None:
    async with connected(database) as db, streaming(database) as reader:
        await insert(db, "before")
        await db.execute("alter table posts add column mood text")
        await insert(db, "after")
        before, control, after = await reader.until(3)
    assert control == Control("catalog", "public.posts")
    assert isinstance(before, Change)
    assert isinstance(after, Change)
    assert len(after.relation.columns) == len(before.relation.columns) + 1


async def test_a_table_whose_name_only_looks_alike_stays_away(database: str) -> None:
    async with connected(database) as db:
        await db.execute("create table my_posts (id int primary key); create table myxposts (id int primary key)")
        async with streaming(database, "public.my_posts", "public.myxposts", only=("public.my_posts",)) as reader:
            await db.execute("insert into myxposts values (1)")
            await db.execute("insert into my_posts values (2)")
            await reader.until(1)
    assert [change.new for change in reader.changes] == [("2",)]


async def test_a_stream_begins_with_a_doubt_though_nobody_has_read_before(database: str) -> None:
    async with local(database) as supabase:
        source, after = source_of(supabase), None
        for _ in range(2):
            async with source.open(after, owner="test/1") as stream:
                first = await Reader(stream, supabase).next()
            assert (first.bodies, first.doubts, bool(first.watermark)) == ((), ("public.posts",), True)
            after = first.watermark


async def test_a_repeated_subscription_is_one_doubt_behind_what_came_before(database: str) -> None:
    async with connected(database) as db, streaming(database) as reader:
        await insert(db, "before")
        await reader.until(1)
        reader.supabase.resubscribe()
        reader.supabase.resubscribe()
        await reader.until(2)
        await insert(db, "after")
        _, doubt, _ = await reader.until(3)
    assert doubt == GAP
    assert [row(change, change.new)["title"] for change in reader.changes] == ["before", "after"]


@pytest.mark.parametrize("code", [1000, 1011, 1012])
async def test_a_dropped_connection_ends_the_stream_and_the_next_begins_with_a_doubt(database: str, code: int) -> None:
    async with local(database) as supabase, connected(database) as db:
        source = source_of(supabase)
        async with source.open(None, owner="test/1") as stream:
            reader = Reader(stream, supabase)
            await insert(db, "before")
            await reader.until(1)
            await supabase.close(code)
            await insert(db, "lost")
            await consumed(db)
            with pytest.raises(SourceError, match="CHANNEL_ERROR"):
                await reader.until(2)
        async with source.open(reader.batches[-1].watermark, owner="test/2") as stream:
            again = Reader(stream, supabase)
            first = await again.next()
            await insert(db, "after")
            [change] = await again.until(1)
    assert first.doubts == ("public.posts",)
    assert isinstance(change, Change)
    assert row(change, change.new)["title"] == "after"


async def test_an_error_in_place_of_a_row_is_a_doubt_and_its_row_reaches_no_log(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(database) as db:
        await db.execute("create table heap (secret text); create table tidy (id int primary key)")
        async with streaming(database, "public.heap", "public.tidy") as reader:
            await db.execute("insert into heap values ('hush')")  # no key: the real server sends an error instead
            await reader.until(1)
            await db.execute("insert into tidy values (1)")
            *doubts, change = await reader.until(2)
    assert doubts == [Doubt("public.heap")], "and no other table is in doubt"
    assert isinstance(change, Change)
    assert "Unrecognized" not in caplog.text


@pytest.mark.parametrize(
    "frame",
    ["no json", "[" * 100_000, "[]", '{"payload": {"data": {"schema": "public", "table": ["posts"]}}}', '{"topic": 1}'],
)
async def test_a_frame_that_cannot_be_read_and_names_no_table_of_ours_is_a_doubt_of_all(
    frame: str, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(database) as db:
        await db.execute("create table notes (id int primary key)")
    async with streaming(database, "public.posts", "public.notes") as reader:
        client_logger = logging.getLogger(AsyncRealtimeClient.__module__)
        client_logger.error(f"Unrecognized message format {frame!r}\nhush")  # noqa: G004 - as the client does
        assert set(await reader.until(2)) == {Doubt("public.posts"), Doubt("public.notes")}
    assert "hush" not in caplog.text


async def test_a_change_that_is_too_large_is_a_doubt_of_its_table_and_the_rest_goes_on(database: str) -> None:
    async with connected(database) as db, streaming(database) as reader:
        await insert(db, "x" * 1_100_000)
        await reader.until(1)
        await insert(db, "after")
        doubt, change = await reader.until(2)
    assert doubt == GAP
    assert isinstance(change, Change)
    assert row(change, change.new)["title"] == "after"


async def test_a_row_that_cannot_be_read_is_a_doubt_of_its_table(database: str) -> None:
    async with connected(database) as db:
        await db.execute("create table sums (id int primary key, amount numeric)")
        async with streaming(database, "public.sums") as reader:
            await db.execute("insert into sums values (1, 1e400 + 0.5), (2, 1e400)")  # the first is beyond a double
            change, doubt = await reader.until(2)
    assert doubt == Doubt("public.sums")
    assert isinstance(change, Change)
    assert change.new == ("2", "1" + "0" * 400)


async def test_more_changes_than_may_wait_are_a_doubt_of_the_table(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "MOST_WAITING", 2)
    async with connected(database) as db, streaming(database) as reader:
        await db.execute("insert into posts (user_id, title) select $1, n::text from generate_series(1, 9) n", uuid4())
        *changes, doubt = await reader.until(3)
    assert [type(change) for change in changes] == [Change, Change]
    assert doubt == GAP


async def test_more_bytes_than_may_wait_are_a_doubt_of_the_table(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "MOST_WAITING_BYTES", 10_000)
    async with connected(database) as db, streaming(database) as reader:
        titles = ["x" * 20_000, "small"]
        await db.executemany("insert into posts (user_id, title) values ($1, $2)", [(uuid4(), t) for t in titles])
        await reader.until(2)
    assert [row(change, change.new)["title"] for change in reader.changes] == ["small"]
    assert GAP in reader.told


async def test_an_answered_heartbeat_proves_the_time_before_it(database: str) -> None:
    async with local(database) as supabase, source_of(supabase).open(None, owner="test/1") as stream:
        reader = Reader(stream, supabase)
        while reader.batches == [] or reader.batches[-1].proven_until is None:
            await reader.next()
        assert reader.batches[0].proven_until is None


FAILURES: dict[str, tuple[Callable[[LocalSupabase], object], str]] = {
    "phx_close": (LocalSupabase.phx_close, "CLOSED"),
    "system_error": (LocalSupabase.system_error, "Too many database timeouts"),
    "oversize": (LocalSupabase.oversize, "CHANNEL_ERROR"),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_what_ends_a_channel_ends_the_stream_and_the_next_begins_with_a_doubt(
    database: str, failure: str
) -> None:
    misbehave, reason = FAILURES[failure]
    async with local(database) as supabase, connected(database) as db:
        source = source_of(supabase)
        async with source.open(None, owner="test/1") as stream:
            reader = Reader(stream, supabase)
            await reader.next()
            misbehave(supabase)
            await insert(db, "perhaps")
            with pytest.raises(SourceError, match=reason):
                await reader.until(2)
        await consumed(db)
        async with source.open(reader.batches[-1].watermark, owner="test/2") as stream:
            again = Reader(stream, supabase)
            first = await again.next()
            await insert(db, "after")
            [change] = await again.until(1)
    assert first.doubts == ("public.posts",)
    assert isinstance(change, Change)
    assert row(change, change.new)["title"] == "after"


async def test_a_server_that_is_gone_for_a_while_is_told_until_it_is_back(database: str) -> None:
    async with local(database) as supabase:
        source = source_of(supabase)
        async with source.open(None, owner="test/1") as stream:
            restarting = asyncio.create_task(supabase.restart(0.5))
            with pytest.raises(SourceError, match="CHANNEL_ERROR"):
                await Reader(stream, supabase).until(1)
        with pytest.raises(SourceError, match="cannot be reached"):
            await source.check()
        await restarting
        await source.check()


async def test_a_server_that_falls_silent_ends_the_stream_and_proves_nothing_meanwhile(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(link_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(link_module, "CLOSE_SECONDS", 0.1)
    async with local(database) as supabase, source_of(supabase).open(None, owner="test/1") as stream:
        reader = Reader(stream, supabase)
        while reader.batches == [] or reader.batches[-1].proven_until is None:
            await reader.next()
        supabase.freeze()
        frozen_at = time.time()
        with pytest.raises(SourceError, match="heartbeat"):
            await reader.until(1)
        proofs = [batch.proven_until for batch in reader.batches if batch.proven_until is not None]
        assert max(proofs) <= frozen_at - link_module.POLL_SECONDS


@pytest.mark.parametrize("misbehave", [LocalSupabase.freeze, LocalSupabase.ignore_joins])
async def test_a_server_that_answers_no_handshake_or_no_join_is_given_up(
    database: str, monkeypatch: pytest.MonkeyPatch, misbehave: Callable[[LocalSupabase], None]
) -> None:
    monkeypatch.setattr(link_module, "OPEN_SECONDS", 0.3)
    monkeypatch.setattr(link_module, "CLOSE_SECONDS", 0.1)
    async with local(database) as supabase:
        misbehave(supabase)
        with pytest.raises(SourceError, match="in time"):
            await source_of(supabase).check()


async def test_a_join_that_is_refused_is_told_with_its_reason(database: str) -> None:
    async with local(database) as supabase:
        supabase.refuse_joins("InvalidJWTToken: Token has expired 12 seconds ago")
        with pytest.raises(SourceError, match="Token has expired"):
            await source_of(supabase).check()
        supabase.refuse_joins(None)
        await source_of(supabase).check()


async def test_a_fault_of_ours_while_hearing_a_change_ends_the_stream(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*arguments: object) -> None:
        raise RuntimeError("hush")

    async with connected(database) as db, streaming(database) as reader:
        monkeypatch.setattr(link_module._Heard, "add", stumble)
        await insert(db, "unheard")
        with pytest.raises(SourceError, match="hearing it failed: RuntimeError"):
            await reader.until(1)


async def test_a_client_that_stops_listening_without_a_word_is_noticed(
    database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stumble(*arguments: object) -> None:
        raise RuntimeError("past every guard")

    monkeypatch.setattr(link_module, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(link_module.Link, "on_change", stumble)
    async with connected(database) as db, streaming(database) as reader:
        await insert(db, "unheard")
        with pytest.raises(SourceError, match="heartbeat"):
            await reader.until(1)


async def test_changes_told_again_behind_newer_ones_are_read_once(database: str) -> None:
    async with connected(database) as db, streaming(database) as reader:
        number = await insert(db, "first")
        await reader.until(1)
        reader.supabase.delay(0.3)  # so that one poll brings all of them
        reader.supabase.repeat(3)
        for title in ("second", "third", "fourth"):
            await db.execute("update posts set title = $2 where id = $1", number, title)
            await asyncio.sleep(0.002)  # commit times have milliseconds
        await reader.until(4)
        await insert(db, "end")
        await reader.until(5)
    assert [row(change, change.new)["title"] for change in reader.changes] == [
        *("first", "second", "third", "fourth", "end")
    ]
    assert reader.told == reader.changes


async def test_a_refused_key_is_a_matter_of_configuration(database: str) -> None:
    async with local(database) as supabase:
        await source_of(supabase).check()
        with pytest.raises(ConfigurationError, match="SUPABASE_KEY"):
            await SupabaseSource(supabase.url, "wrong", tables=["public.posts"]).check()


async def test_a_subscription_that_the_server_refuses_is_told(database: str) -> None:
    async with local(database) as supabase:
        with pytest.raises(SourceError, match="only the service key"):
            await SupabaseSource(supabase.url, ANON_KEY, tables=["public.posts"]).check()
        with pytest.raises(SourceError, match="check Realtime is enabled"):
            await source_of(supabase, "public.absent").check()


async def test_an_address_where_nobody_listens_is_told() -> None:
    with pytest.raises(SourceError, match="cannot be reached"):
        await SupabaseSource("http://127.0.0.1:1", SERVICE_KEY, tables=["public.posts"]).check()
    with pytest.raises(ConfigurationError, match="SUPABASE_URL"):
        await SupabaseSource("nonsense", SERVICE_KEY, tables=["public.posts"]).check()
