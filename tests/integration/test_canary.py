"""The canary through a local Supabase: what it proves, and what it notices that heartbeats do not."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from realtime_bridge.database import Database
from realtime_bridge.dev.supabase import LocalSupabase
from realtime_bridge.errors import SourceError
from realtime_bridge.sources import supabase_canary
from realtime_bridge.sources.supabase import SupabaseSource
from realtime_bridge.sources.supabase_canary import Canary, Writer, postgres_writer, postgrest_writer
from tests.integration.test_supabase_source import SERVICE_KEY, Doubt, Reader, connected, insert, local
from tests.services import eventually

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:The '(timeout|verify)' parameter is deprecated:DeprecationWarning:supabase"),
    pytest.mark.filterwarnings("ignore:ConnectionClosed.(code|reason) is deprecated:DeprecationWarning:websockets"),
]

POSTS, TABLE = "public.posts", "public.Canary"
MAKE = 'create table "Canary" (id text primary key, beat bigint not null)'


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supabase_canary, "BEAT_SECONDS", 0.1)


@asynccontextmanager
async def writing(through: str, dsn: str, supabase: LocalSupabase, table: str = TABLE) -> AsyncIterator[Writer]:
    if through == "postgres":
        async with Database(dsn) as database:
            yield postgres_writer(database.transaction, table)
    else:
        url = supabase.url if through == "supabase" else "http://127.0.0.1:1"
        yield postgrest_writer(url, SERVICE_KEY, table)


@asynccontextmanager
async def beating(canary: Canary) -> AsyncIterator[None]:
    running = asyncio.create_task(canary.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])


@asynccontextmanager
async def project(dsn: str, through: str = "postgres") -> AsyncIterator[tuple[LocalSupabase, Canary]]:
    """A project with a canary that beats."""
    async with connected(dsn) as db:
        await db.execute(MAKE)
    async with local(dsn, POSTS, TABLE) as supabase, writing(through, dsn, supabase) as writer:
        canary = Canary(TABLE, "here", writer)
        async with beating(canary):
            yield supabase, canary


@asynccontextmanager
async def listening(supabase: LocalSupabase, canary: Canary, after: str | None = None) -> AsyncIterator[Reader]:
    source = SupabaseSource(supabase.url, SERVICE_KEY, tables=[POSTS], canary=canary)
    async with source.open(after, owner="test/1") as stream:
        yield Reader(stream, supabase)


async def proven(reader: Reader, after: float) -> float:
    """Take from the stream until something later than a time is proven."""
    while True:
        until = (await reader.next()).proven_until
        if until is not None and until > after:
            return until


@pytest.mark.parametrize("through", ["postgres", "supabase"])
async def test_what_comes_back_proves_the_time_before_it_and_is_told_to_nobody(through: str, database: str) -> None:
    async with (
        connected(database) as db,
        project(database, through) as (supabase, canary),
        listening(supabase, canary) as reader,
    ):
        first = await proven(reader, 0)
        assert await proven(reader, first) <= time.time()
        await insert(db, "told")
        await reader.until(1)
        assert reader.told == reader.changes
        assert canary.problem == ""
        assert [row["id"] for row in await db.fetch('select * from "Canary"')] == ["here"]


async def test_changes_that_are_dropped_in_silence_for_a_while_are_a_doubt(database: str) -> None:
    async with (
        connected(database) as db,
        project(database) as (supabase, canary),
        listening(supabase, canary) as reader,
    ):
        await proven(reader, 0)
        supabase.drop(sys.maxsize)
        await insert(db, "dropped")
        before = await db.fetchval('select beat from "Canary"')
        await eventually(lambda: db.fetchval('select true from "Canary" where beat > $1', before))
        await asyncio.sleep(0.2)  # until that, too, is dropped
        supabase.drop(0)
        assert await reader.until(1) == [Doubt(POSTS)]


def drop_all(supabase: LocalSupabase) -> None:
    supabase.drop(sys.maxsize)


@pytest.mark.parametrize("misbehave", [LocalSupabase.deafen, drop_all])
async def test_a_poller_that_falls_silent_while_heartbeats_are_answered_proves_nothing_and_ends_the_stream(
    database: str, monkeypatch: pytest.MonkeyPatch, misbehave: Callable[[LocalSupabase], None]
) -> None:
    monkeypatch.setattr(supabase_canary, "RETURN_SECONDS", 3.0)  # longer than a heartbeat takes
    async with project(database) as (supabase, canary):
        async with listening(supabase, canary) as reader:
            await proven(reader, 0)
            misbehave(supabase)
            silent_at = time.time()
            with pytest.raises(SourceError, match="did not tell of the canary"):
                await proven(reader, silent_at)
        supabase.drop(0)
        async with listening(supabase, canary, "before") as again:
            await proven(again, silent_at)
            assert (again.batches[0].doubts, again.told) == ((POSTS,), [])


async def test_several_bridges_on_one_project_hear_their_own_canaries(database: str) -> None:
    async with connected(database) as db, project(database) as (supabase, canary), Database(database) as other:
        second = Canary(TABLE, "there", postgres_writer(other.transaction, TABLE))
        async with (
            beating(second),
            listening(supabase, canary) as reader,
            listening(supabase, second) as another,
        ):
            for each in (reader, another):
                await proven(each, await proven(each, 0))
            await db.execute('delete from "Canary"')
            await insert(db, "told")
            for each in (reader, another):
                await each.until(1)
                assert each.told == each.changes


async def test_a_canary_that_is_not_published_is_told(database: str) -> None:
    async with local(database) as supabase, Database(database) as other:
        canary = Canary(TABLE, "here", postgres_writer(other.transaction, TABLE))
        source = SupabaseSource(supabase.url, SERVICE_KEY, tables=[POSTS], canary=canary)
        with pytest.raises(SourceError, match="table: Canary"):
            await source.check()


@pytest.mark.parametrize(
    ("through", "reason"),
    [("postgres", "SQLSTATE 42P01"), ("supabase", "PostgREST answers 404"), ("nobody", "reached")],
)
async def test_a_canary_that_cannot_be_written_says_why_and_is_not_waited_for(
    through: str, reason: str, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    table = "public.nothing"
    async with local(database) as supabase, writing(through, database, supabase, table) as writer:
        canary = Canary(table, "here", writer)
        async with beating(canary):
            await eventually(lambda: reason in canary.problem)
        assert not canary.is_overdue()
        assert SERVICE_KEY not in caplog.text


async def test_the_local_project_inserts_and_replaces_rows(database: str) -> None:
    async with connected(database) as db, local(database) as supabase:
        await db.execute(MAKE)
        headers = {"apikey": SERVICE_KEY, "Prefer": "resolution=merge-duplicates"}
        async with httpx.AsyncClient(base_url=f"{supabase.url}/rest/v1/", headers=headers) as http:
            for beat in (1, 2):
                answer = await http.post("Canary?on_conflict=id", json={"id": "a", "beat": beat})
                assert answer.status_code == 201
            refused = [
                await http.post("Canary?on_conflict=id", json={"id": "a", "beat": "x"}),
                await http.post("Canary?on_conflict=id", json={"other": 1}),
                await http.post("nothing?on_conflict=id", json={}),
                await http.post("Canary?on_conflict=id", json={}, headers={"apikey": "wrong"}),
            ]
        assert [answer.status_code for answer in refused] == [400, 400, 404, 401]
        assert [tuple(row) for row in await db.fetch('select * from "Canary"')] == [("a", 2)]
