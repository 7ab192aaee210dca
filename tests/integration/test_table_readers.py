"""Readers of tables: what they read of a row is, text by text, what the source tells of the same row."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from realtime_bridge.change import ABSENT, Change, Image, Relation
from realtime_bridge.database import Database
from realtime_bridge.dev.supabase import rest
from realtime_bridge.errors import SourceError
from realtime_bridge.sources import database_tables, supabase_tables
from realtime_bridge.sources.base import TEXT_BYTES, TableReader
from realtime_bridge.sources.database_tables import DatabaseTables
from realtime_bridge.sources.postgres import PostgresSource, ensure_publication
from realtime_bridge.sources.supabase_tables import SupabaseTables
from tests.integration.test_postgres_source import read
from tests.integration.test_supabase_source import SERVICE_KEY, connected, local, streaming
from tests.services import PgBouncer, running

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:The '(timeout|verify)' parameter is deprecated:DeprecationWarning:supabase"),
]

PUBLICATION = "bridge"

KINDS = """
create type mood as enum ('sad', 'glad');
create type pair as (a int, b text);
create domain amount as numeric check (value is null or value > 0);
create table kinds (
  dropped int, id bigint primary key, flag bool, exact numeric, far float8, near float4, words text, nothing text,
  padded char(5), short varchar(9), at timestamptz, ides timestamptz, never timestamptz, naive timestamp, day date,
  span interval, doc jsonb, raw json, numbers int[], names text[], matrix int[], bytes bytea, host inet, net cidr,
  range int4range, feeling mood, two pair, void pair, price amount, ident uuid, bits bit(3), sum money
);
alter table kinds drop column dropped
"""

ROW = """
insert into kinds values (
  9007199254740993, true, 1.50, 1e20, 0.1, 'a "quoted" é, {x}', null, 'ab', 'cd', '2026-01-02 03:04:05.678912+00',
  '0044-03-15 12:00:00+00 BC', 'infinity', '2026-01-02 03:04:05', '2026-01-02', '1 day 02:03:04',
  '{"a": [1, null, {"b": "c"}]}', '{"a" :  1}', '{1,NULL,3}', array['x y', '', 'NULL', null, 'a"b\\c'], '{{1,2},{3,4}}',
  '\\x0102ff', '192.168.0.1', '10.0.0.0/8', '[1,5)', 'glad', row(1, 'x,y'), row(null, null), 2.50,
  'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11', '101', 12.34
)
"""


@asynccontextmanager
async def reading(dsn: str, publication: str | None = PUBLICATION) -> AsyncIterator[DatabaseTables]:
    async with Database(dsn) as database:
        yield DatabaseTables(database.transaction, publication)


async def rows_of(reader: TableReader, relation: Relation) -> list[Image]:
    return [row for page in [page async for page in reader.pages(relation)] for row in page.rows]


async def told(dsn: str, namespace: str, table: str, statement: str) -> Change:
    """What the `postgres` source tells of a statement."""
    await ensure_publication(dsn, PUBLICATION, [table])
    slot = namespace.replace("-", "_")
    source = PostgresSource(dsn, slot=slot, publication=PUBLICATION, tables=[table])
    async with source.open(None, owner="ns/1") as stream, connected(dsn) as db:
        await db.execute(statement)
        return (await read(stream, 1))[0]


async def test_postgres_texts_and_description_are_those_of_the_walsender(database: str, namespace: str) -> None:
    async with connected(database) as db:
        await db.execute(KINDS)
    change = await told(database, namespace, "public.kinds", ROW)
    async with reading(database) as reader:
        assert await reader.describe("public.kinds") == change.relation
        assert await rows_of(reader, change.relation) == [change.new]


async def test_texts_do_not_depend_on_how_the_role_likes_them(database: str, namespace: str) -> None:
    async with connected(database) as db:
        await db.execute(KINDS)
        change = await told(database, namespace, "public.kinds", ROW)
        name = await db.fetchval("select current_database()")
        for setting in ("TimeZone = 'Asia/Tokyo'", "DateStyle = 'SQL, DMY'", "IntervalStyle = 'iso_8601'"):
            await db.execute(f"alter database {name} set {setting}")
        await db.execute(f"alter database {name} set bytea_output = 'escape'")
        await db.execute(f"alter database {name} set extra_float_digits = -3")
    async with reading(database) as reader:
        assert await rows_of(reader, change.relation) == [change.new]


@pytest.mark.parametrize(
    ("table", "full"),
    [
        ("(a int, b int, primary key (b, a))", False),
        ("(a int, b int, primary key (b) include (a))", False),
        ("(a int primary key, b int, c int generated always as (a + 1) stored)", False),
        ("(a int, b int); alter table t replica identity full", True),
        ("(a int primary key, b int); alter table t replica identity full", True),
        ("(a int, b int primary key) partition by list (b); create table p partition of t default", False),
    ],
)
async def test_a_table_is_described_as_the_source_will(table: str, full: bool, database: str, namespace: str) -> None:
    async with connected(database) as db:
        await db.execute(f"create table t {table}")
    change = await told(database, namespace, "public.t", "insert into t (a, b) values (1, 2)")
    async with reading(database) as reader:
        relation = await reader.describe("public.t")
        assert relation == change.relation
        assert relation.full is full
        if relation.key:
            assert await rows_of(reader, relation) == [change.new]


async def test_columns_that_are_not_published_are_not_read(database: str, namespace: str) -> None:
    async with connected(database) as db:
        await db.execute("create table t (a int primary key, secret text, b int)")
        await db.execute(f"create publication {PUBLICATION} for table t (a, b)")
    change = await told(database, namespace, "public.t", "insert into t values (1, 'hush', 2)")
    async with reading(database) as reader:
        assert await reader.describe("public.t") == change.relation
        assert await rows_of(reader, change.relation) == [("1", "2")]
        assert await reader.describe("public.posts") is None  # which the publication does not carry
        assert await reader.describe("public.nothing") is None


async def test_long_texts_come_as_long_ones_and_are_not_fetched(database: str) -> None:
    async with connected(database) as db:
        await db.execute("create table t (a int primary key, b text, c text, d text, e int[])")
        await db.execute("alter table t alter c set storage external")
        await db.execute("insert into t values (1, $1, $2, $3, $4)", "x" * 256, "y" * 100_000, "z" * 5000, [1] * 2000)
        async with reading(database, None) as reader:
            relation = await reader.describe("public.t")
            assert relation is not None
            [row] = await rows_of(reader, relation)
            assert (row[0], row[1]) == ("1", "x" * 256)
            assert all(value is not ABSENT and value is not None and len(value) == TEXT_BYTES + 1 for value in row[2:])
        # The large value's own table was not touched.
        read = "select seq_scan + idx_scan from pg_stat_all_tables where relid = (select reltoastrelid from pg_class "
        assert await db.fetchval(read + "where oid = 't'::regclass)") == 0


KEYS = [f"{n % 7:02d} ü,\"'.(*%" for n in range(40)] + ["", "null"]


@pytest.mark.parametrize("through", ["postgres", "pooler", "supabase"])
async def test_every_row_is_read_once_page_by_page(
    through: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_tables, "PAGE_ROWS", 7)
    monkeypatch.setattr(supabase_tables, "FIRST_ROWS", 1)
    monkeypatch.setattr(supabase_tables, "MOST_ROWS", 7)
    pairs = sorted({(key, str(n)) for n, key in enumerate(KEYS)})
    async with connected(database) as db:
        await db.execute(
            'create schema "o d"; create table "o d"."a/b?" ("Group" text, n int, primary key ("Group", n))'
        )
        await db.executemany('insert into "o d"."a/b?" values ($1, $2)', [(key, int(n)) for key, n in pairs])
    async with reader_through(through, database) as reader:
        async with reading(database, None) as describer:
            relation = await describer.describe("o d.a/b?")
        assert relation is not None
        pages = [page async for page in reader.pages(relation)]
        assert len(pages) >= len(pairs) / 7
        assert all(0 < len(page.rows) <= 7 for page in pages)
        assert sorted((row[0], row[1]) for page in pages for row in page.rows) == pairs


@pytest.mark.parametrize("through", ["postgres", "pooler", "supabase"])
async def test_single_rows_are_read_whole_by_their_keys(through: str, database: str) -> None:
    odd, empty, null = KEYS[0], *KEYS[-2:]
    pairs = [(key, n) for key in (odd, empty, null) for n in range(2)]
    long = "x" * 100_000
    async with connected(database) as db:
        await db.execute('create table pairs ("Group" text, n int, v text, w int, primary key ("Group", n))')
        await db.executemany("insert into pairs values ($1, $2, $3, null)", [(*pair, long) for pair in pairs])
    async with reader_through(through, database) as reader:
        async with reading(database, None) as describer:
            relation = await describer.describe("public.pairs")
        assert relation is not None
        wanted = [(odd, "0"), (empty, "1"), (null, "1"), (null, "2"), ("nobody", "0")]
        found = {row[:2]: row[2:] for row in await reader.rows(relation, wanted)}
        assert found == dict.fromkeys(wanted[:3], (long, None))


async def test_rows_that_postgrest_leaves_out_are_not_taken_for_rows_that_are_gone(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "MOST_ROWS", 2)  # which is a setting of each project
    async with connected(database) as db, reader_through("supabase", database) as reader:
        await db.execute("create table t (a int primary key); insert into t values (1), (2), (3)")
        async with reading(database, None) as describer:
            relation = await describer.describe("public.t")
        assert relation is not None
        assert await reader.rows(relation, [("1",), ("2",), ("4",)]) == [("1",), ("2",)]
        with pytest.raises(SourceError, match="does not show all rows"):
            await reader.rows(relation, [("1",), ("2",), ("3",)])


@pytest.mark.parametrize(
    ("type_", "keys"),
    [("char(3)", ["EUR", "GBP", "US "]), ("bit(3)", ["101", "110", "111"]), ('"char"', ["a", "b"]), ("varbit", ["1"])],
)
async def test_keys_of_any_length_are_read_once(
    type_: str, keys: list[str], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_tables, "PAGE_ROWS", 1)
    async with connected(database) as db, reading(database, None) as reader:
        await db.execute(f"create table rates (code {type_} primary key)")
        for key in keys:
            await db.execute(f"insert into rates values ('{key}')")
        relation = await reader.describe("public.rates")
        assert relation is not None
        assert await rows_of(reader, relation) == [(key,) for key in keys]
        assert sorted(await reader.rows(relation, [[key] for key in keys])) == [(key,) for key in keys]


async def test_a_page_that_does_not_get_past_its_key_is_the_end_and_says_so(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_tables, "_KNOWN", database_tables._KNOWN.replace("-1", "NULL"))
    async with connected(database) as db, reading(database, None) as reader:
        await db.execute("create table rates (code char(3) primary key); insert into rates values ('EUR'), ('GBP')")
        relation = await reader.describe("public.rates")
        assert relation is not None
        with pytest.raises(SourceError, match="behind its own key"):
            await rows_of(reader, relation)


async def test_rows_of_other_columns_are_refused_by_name(database: str) -> None:
    async with reading(database, None) as describer, reader_through("supabase", database) as reader:
        relation = await describer.describe("public.posts")
        assert relation is not None
        async with connected(database) as db:
            await db.execute("alter table posts add column mood text")
            await db.execute("insert into posts (id, user_id, title) values (1, gen_random_uuid(), 'x')")
        with pytest.raises(SourceError, match=r"public\.posts has other columns"):
            await reader.rows(relation, [("1",)])


@asynccontextmanager
async def reader_through(name: str, dsn: str) -> AsyncIterator[TableReader]:
    if name == "supabase":
        async with local(dsn) as supabase:
            yield SupabaseTables(supabase.url, SERVICE_KEY)
    elif name == "pooler":
        with running(PgBouncer(dsn)) as pooler:
            async with reading(pooler.dsn, None) as reader:
                yield reader
    else:
        async with reading(dsn, None) as reader:
            yield reader


@pytest.mark.parametrize("through", ["postgres", "supabase"])
async def test_what_was_committed_after_it_was_read_is_later(through: str, database: str) -> None:
    async with connected(database) as db, reader_through(through, database) as reader:
        await db.execute("create table t (a int primary key); insert into t values (1)")
        async with reading(database, None) as describer:
            relation = await describer.describe("public.t")
        assert relation is not None
        [page] = [page async for page in reader.pages(relation)]
        now = await db.fetchval("select (extract(epoch from clock_timestamp()) * 1000000)::int8")
        assert now < page.read_at < now + 60_000_000  # as long as the read took less than the margin


async def test_supabase_texts_are_those_of_realtime(database: str) -> None:
    # What JSON changes on either way: digits beyond a double's, and the white space of json.
    without = "alter table kinds drop exact, drop doc, drop raw, drop price, drop two, drop void"
    async with connected(database) as db:
        await db.execute(f"{KINDS}; {ROW}; create table rest as table kinds; truncate kinds; {without}")
        async with streaming(database, "public.kinds") as realtime:
            columns = await db.fetchval(
                "select string_agg(quote_ident(attname), ',' order by attnum) from pg_attribute "
                "where attrelid = 'kinds'::regclass and attnum > 0 and not attisdropped"
            )
            await db.execute(f"insert into kinds select {columns} from rest")
            await realtime.until(1)
            [change] = realtime.changes
            tables = SupabaseTables(realtime.supabase.url, SERVICE_KEY)
            assert await rows_of(tables, change.relation) == [change.new]
            assert await tables.describe("public.kinds") is None


async def test_with_a_database_a_table_of_supabase_is_described_as_realtime_will(database: str) -> None:
    async with connected(database) as db, reading(database, None) as reader, Database(database) as postgres:
        await db.execute("create table pairs (x text, a int, b int, id int, at timestamptz, primary key (a, b))")
        await db.execute("alter table pairs replica identity full")
        async with streaming(database, "public.pairs", keys=postgres.primary_key) as realtime:
            await db.execute("insert into pairs values ('x', 1, 2, 3, now())")
            await realtime.until(1)
        [change] = realtime.changes
        assert await reader.describe("public.pairs") == change.relation
        assert await rows_of(reader, change.relation) == [change.new]


@pytest.mark.parametrize("grant", ["", "grant select on posts to {}; grant usage on schema public to {}"])
async def test_a_role_that_does_not_see_every_row_is_refused(grant: str, database: str, namespace: str) -> None:
    role = namespace.replace("-", "_")
    async with connected(database) as db:
        await db.execute(f"create role {role} login; {grant.format(role, role)}")
        try:
            async with reading(database.replace("postgres@", f"{role}@", 1), None) as reader:
                relation = await reader.describe("public.posts")
                assert relation is not None
                with pytest.raises(SourceError, match=r"may not read every row of public\.posts"):
                    await rows_of(reader, relation)
        finally:
            await db.execute(f"drop owned by {role}; drop role {role}")


async def test_a_table_that_lost_a_column_is_refused(database: str) -> None:
    async with connected(database) as db, reading(database, None) as reader:
        relation = await reader.describe("public.posts")
        assert relation is not None
        await db.execute("alter table posts drop column body")
        with pytest.raises(SourceError, match="not all the columns"):
            await rows_of(reader, relation)


@pytest.mark.parametrize("problem", ["key", "address", "table"])
async def test_postgrest_that_does_not_answer_says_so_without_a_key(problem: str, database: str) -> None:
    async with local(database) as supabase, reading(database, None) as describer:
        known = await describer.describe("public.posts")
        assert known is not None
        url = supabase.url if problem != "address" else "http://127.0.0.1:1"
        key = SERVICE_KEY if problem != "key" else "sb_secret_wrong"
        relation = known if problem != "table" else Relation("public", "nothing", known.columns, known.key, full=False)
        with pytest.raises(SourceError, match="PostgREST") as caught:
            await rows_of(SupabaseTables(url, key), relation)
        assert key not in str(caught.value)
