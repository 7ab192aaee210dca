"""Members as the hub treats them, with what Postgres says of them: loaded, put in doubt, away for a while."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

import asyncpg
import pytest

from realtime_bridge.change import Change, Column, Control, Entry, Relation
from realtime_bridge.claims import Claims
from realtime_bridge.database import Database
from realtime_bridge.policy.asking import Asking
from realtime_bridge.policy.base import Member, Seen
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.engine import PolicyEngine
from tests.proxies import Proxy

pytestmark = pytest.mark.integration

ANN = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
BOB = "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
CLAIMS = Claims({"role": "authenticated", "sub": BOB}, "authenticated", BOB, None)
MEMBERS = Relation("public", "members", (Column("user_id", "uuid"), Column("team", "int4")), (0, 1), True)
PAPERS = Relation("public", "papers", (Column("id", "int4"), Column("team", "int4")), (0,), True)
SCHEMA = f"""
    create table members (user_id uuid, team int, primary key (user_id, team));
    create policy own on members for select using (user_id = auth.uid());
    create table papers (id int primary key, team int);
    create policy team on papers for select using (
      team in (select m.team from members m where m.user_id = auth.uid()));
    alter table members enable row level security;
    alter table papers enable row level security;
    create function is_member(wanted int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.members m where m.team = wanted and m.user_id = auth.uid()) $$;
    grant select on members, papers to authenticated;
    insert into members values ('{BOB}', 1);
"""


class Overtaken(Asking):
    """While it answers, something else happens."""

    meanwhile: Callable[[], Awaitable[object]] | None = None

    async def answers(self, *args: Any) -> Any:
        found = await super().answers(*args)
        if self.meanwhile is not None:
            await self.meanwhile()
        return found


@asynccontextmanager
async def engine_of(
    dsn: str, policy: str = "true", *, through: Proxy | None = None, kind: type[Asking] = Asking
) -> AsyncIterator[tuple[PolicyEngine, Member, "asyncpg.Connection[asyncpg.Record]"]]:
    """An engine, a member of team 1 that is loaded, and a connection to change that.

    Args:
        through: what the engine's connections go through.
        kind: of what asks.
    """
    asked = dsn if through is None else dsn.replace(f":{through.upstream}/", f":{through.port}/")
    admin = await asyncpg.connect(dsn)
    try:
        await admin.execute(SCHEMA)
        await admin.execute(f"create policy further on papers as restrictive using ({policy})")
        async with Database(asked) as database:
            asking = kind(database.transaction, ["authenticated"])
            tables = ["public.papers"]
            engine = PolicyEngine(tables, ["authenticated"], {}, Catalog(database.transaction), asking)
            await engine.prepare()
            bob = engine.join(CLAIMS)
            await engine.load([bob])
            yield engine, bob, admin
    finally:
        await admin.close()


def paper(number: int, *, time: int = 0) -> Entry:
    change = Change("INSERT", PAPERS, None, (str(number), "1"), time or number)
    return Entry(number, str(number), str(number - 1), change)


def leaves(number: int, *, time: int = 0, who: str = BOB) -> Entry:
    """A membership ends."""
    return Entry(number, str(number), str(number - 1), Change("DELETE", MEMBERS, (who, "1"), None, time or number))


def control(kind: Literal["catalog", "resync"], number: int) -> Entry:
    """Of the table of memberships."""
    return Entry(number, str(number), str(number - 1), Control(kind, "public.members", commit_time=number))


async def test_a_member_that_is_loaded_again_before_it_is_in_doubt_leaves_nothing_behind(database: str) -> None:
    async with engine_of(database) as (engine, bob, admin):
        assert [audience.new for audience in await engine.audience([paper(1)])] == [{bob}]
        await admin.execute("delete from members")
        await engine.load([bob])
        assert [audience.doubtful for audience in await engine.audience([leaves(2)])] == [{bob}]
        await engine.load([bob])
        assert [audience.new for audience in await engine.audience([paper(3)])] == [set()]


async def test_what_a_member_that_is_away_saw_is_put_in_doubt_as_well(database: str) -> None:
    async with engine_of(database) as (engine, bob, _):
        bob.sights = {"public.papers": Seen("digest", 0, 0)}
        engine.leave(bob)
        assert [audience.doubtful for audience in await engine.audience([leaves(2)])] == [set()]
        assert engine.join(CLAIMS) is bob
        assert (bob.pending, bob.doubts) == (True, {"public.papers": 2})


async def test_a_membership_that_ends_is_in_doubt_for_all_that_its_transaction_writes(database: str) -> None:
    async with engine_of(database) as (engine, bob, _):
        first, second = await engine.audience([paper(1, time=7), leaves(2, time=7)])
        assert (first.new, first.doubtful, second.doubtful) == (set(), {bob}, set())


async def test_what_is_asked_of_rows_is_in_doubt_where_a_whole_table_is(database: str) -> None:
    async with engine_of(database, "is_member(team)") as (engine, bob, _):
        assert [audience.new for audience in await engine.audience([paper(1)])] == [{bob}]
        [audience] = await engine.audience([control("resync", 2)])
        assert (audience.doubtful, bob.pending, bob.doubts) == ({bob}, True, {"public.papers": 2})


async def test_whoever_reads_on_is_told_from_where_on_it_sees_otherwise(database: str) -> None:
    async with engine_of(database) as (engine, bob, _):
        entries = [paper(1), leaves(2), control("catalog", 3), control("resync", 4), paper(5)]
        verdicts = await engine.verdicts(entries, bob)
        papers = {"public.papers"}
        assert [verdict.changed for verdict in verdicts] == [set(), papers, set(), papers, set()]


async def test_that_postgres_does_not_answer_is_told_once_until_it_does(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[tuple[str, bool]]:
        """What the bridge has logged since the last time, and whether with a traceback."""
        found = [(r.getMessage(), bool(r.exc_info)) for r in caplog.records if r.name.startswith("realtime_bridge")]
        caplog.clear()
        return found

    async with (
        Proxy(urlsplit(database).port or 0) as proxy,
        engine_of(database, "is_member(team)", through=proxy) as (engine, _, _),
    ):
        for number in (1, 2):
            proxy.refuses = True
            proxy.cut()
            for _ in range(2):
                engine.part()
                await engine.load([engine.join(CLAIMS)])
                await engine.audience([paper(number)])
            assert told() == [("Postgres cannot be asked what users see", False)]
            await engine.reload("*")
            assert told() == [("policies could not be read", False)]
            proxy.refuses = False
            await engine.reload("*")
            await engine.load([engine.join(CLAIMS)])
            assert told() == []


async def test_an_answer_that_is_overtaken_decides_what_was_asked_for_and_nothing_later(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_of(database, "is_member(team)", kind=Overtaken) as (engine, bob, admin):
        monkeypatch.setattr(Overtaken, "meanwhile", lambda *_: engine.audience([leaves(2, who=ANN)]))
        assert [verdict.new for verdict in await engine.verdicts([paper(1)], bob)] == [True]
        await admin.execute("delete from members")
        assert [verdict.new for verdict in await engine.verdicts([paper(3)], bob)] == [False]
