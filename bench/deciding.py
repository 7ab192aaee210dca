"""Who of 10,000 connected users sees a change: decided by the bridge, and by asking Postgres for one after the other.

Decides whether policies go on being compiled and users sorted by what is known of them, instead of the database being
asked at every change. Beside a figure stands what Supabase Realtime does for it, written after its own and run in the
same database: a prepared SELECT by the row's key, executed under the role and claims of every subscriber.

The clock is around one call for one change; no source, broker or socket is part of it. What only Postgres can decide
has a floor of its own: the same conditions for the same users, written by hand in one block.
"""

import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeAlias, TypeVar

import asyncpg

from realtime_bridge.change import Change, Column, Entry, Image, Relation
from realtime_bridge.claims import Claims
from realtime_bridge.database import Database
from realtime_bridge.dev.engines import EmbeddedPostgres
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.policy.asking import Asking
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.engine import PolicyEngine

T = TypeVar("T")
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

USERS = 10_000
OF_AN_ORG = 100
CHECKED_USERS = 100
CONDITIONS = 8
CHANGES = 1_000
CHECKED_CHANGES = 30
ASKED = 3
ROLE = "authenticated"


def condition(row: str, number: int) -> str:
    """A condition on two columns of the row and one of the user, which nothing can look up; of nobody it is TRUE."""
    return (
        "exists (select from public.members m where m.user_id = (select auth.uid()) "
        f"and m.org = {row}org and m.level > {row}level + {number})"
    )


# Each table has one row, for the check by key; the changes that the bridge is given are of no row in particular.
SCHEMA = f"""
create function id_of(number int) returns uuid language sql as
  $$ select (lpad(to_hex(number), 8, '0') || '-0000-4000-8000-000000000000')::uuid $$;
create table members (user_id uuid primary key, org int, level int);
create policy own on members using (user_id = (select auth.uid()));
insert into members select id_of(number), number / {OF_AN_ORG}, 1 from generate_series(0, {USERS - 1}) as number;

create table own (id int primary key, owner uuid);
create policy own on own using (owner = (select auth.uid()));
create table shared (id int primary key, org int);
create policy org on shared using (org in (select m.org from members m where m.user_id = (select auth.uid())));
create table open (id int primary key, is_public bool);
create policy everybody on open using (is_public);
create table checked (id int primary key, org int, level int);
{"".join(f"create policy p{i} on checked using ({condition('checked.', i)});" for i in range(CONDITIONS))}
insert into own values (1, id_of(7));
insert into shared values (1, 7);
insert into open values (1, true);
insert into checked values (1, 0, 1);

create table subscribers (id serial primary key, claims jsonb);
insert into subscribers (claims) select jsonb_build_object('sub', m.user_id, 'role', '{ROLE}') from members m;
create function ask_each(name text, most int) returns int language plpgsql as $$
declare
  everyone jsonb[] := array(select claims from subscribers order by id limit most);
  one jsonb;
  sees bool;
  found int := 0;
begin
  execute format('prepare one_row as select exists (select 1 from %I where id = %L)', name, '1');
  foreach one in array everyone loop
    perform set_config('role', one ->> 'role', true), set_config('request.jwt.claims', one::text, true);
    execute 'execute one_row' into sees;
    found := found + sees::int;
  end loop;
  perform set_config('role', 'none', true);
  deallocate one_row;
  return found;
end $$;

do $$ declare name text; begin
  foreach name in array array['members', 'own', 'shared', 'open', 'checked'] loop
    execute format('alter table %I enable row level security; grant select on %1$I to {ROLE}', name);
  end loop;
end $$;
create publication bench for table members, own, shared, open, checked;
analyze
"""
FLOOR = f"""
do $$ declare
  everyone text[] := array(select json_array_elements_text(current_setting('bench.users')::json));
  row_org constant int := 0;
  row_level constant int := 1;
  one text;
  sees bool;
begin
  foreach one in array everyone loop
    perform set_config('request.jwt.claims', one, true), set_config('role', '{ROLE}', true);
    {"".join(f"sees := {condition('row_', i)};" for i in range(CONDITIONS))}
  end loop;
  perform set_config('role', 'none', true);
end $$
"""


class Figure(NamedTuple):
    """What was measured, in milliseconds, and what else takes for the same."""

    name: str
    times: Sequence[float]
    bound: float
    others: Sequence[float] = ()
    what: str = "one by one"

    def __str__(self) -> str:
        median = statistics.median(self.times)
        line = f"{self.name:<42}{shown(median):>12}{shown(self.bound):>12}"
        if not self.others:
            return line
        other = statistics.median(self.others)
        return f"{line}{shown(other):>12}  {self.what:<12}{other / median:>10,.1f}"


def shown(milliseconds: float) -> str:
    return f"{milliseconds * 1000:,.1f} µs" if milliseconds < 1 else f"{milliseconds:,.1f} ms"


def id_of(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-000000000000"


def claims_of(number: int) -> Claims:
    return Claims({"sub": id_of(number), "role": ROLE}, ROLE, id_of(number), None)


def insertions(table: str, columns: Mapping[str, str], rows: Iterable[tuple[str, ...]]) -> Iterator[Entry]:
    relation = Relation(
        "public", table, tuple(map(Column, ("id", *columns), ("int4", *columns.values()))), (0,), full=True
    )
    for number, row in enumerate(rows, 1):
        image: Image = (str(number), *row)
        yield Entry(number, str(number), str(number - 1), Change("INSERT", relation, None, image, 0))


@asynccontextmanager
async def connected(dsn: str, users: int, *tables: str) -> AsyncIterator[tuple[PolicyEngine, float]]:
    """An engine with so many users, and the milliseconds that it took to learn all about them."""
    async with Database(dsn) as database:
        asking = Asking(database.transaction, [ROLE])
        catalog = Catalog(database.transaction)
        engine = PolicyEngine(tables, [ROLE], {}, catalog, asking, publication="bench", fact_seconds=3600)
        await engine.prepare()
        members = [engine.join(claims_of(number)) for number in range(users)]
        begin = time.perf_counter()
        await engine.load(members)
        yield engine, (time.perf_counter() - begin) * 1000


async def timed(work: Awaitable[T]) -> tuple[float, T]:
    """Milliseconds, and what came out."""
    begin = time.perf_counter()
    result = await work
    return (time.perf_counter() - begin) * 1000, result


async def decide(engine: PolicyEngine, entry: Entry, recipients: int) -> float:
    took, (audience,) = await timed(engine.audience([entry]))
    assert (len(audience.new), len(audience.unknown)) == (recipients, 0)
    return took


async def ask_each(connection: Connection, table: str, users: int, recipients: int) -> float:
    took, found = await timed(connection.fetchval("select ask_each($1, $2)", table, users))
    assert found == recipients
    return took


async def known(dsn: str, connection: Connection) -> AsyncIterator[Figure]:
    """What is decided by what is known of users and rows."""
    async with connected(dsn, USERS, "public.own", "public.shared", "public.open") as (engine, learned):
        yield Figure(f"learning all about {USERS:,} users", [learned], 2000)
        owners = insertions("own", {"owner": "uuid"}, ((id_of(number),) for number in range(CHANGES)))
        orgs = insertions("shared", {"org": "int4"}, ((str(number % 100),) for number in range(CHANGES)))
        public = insertions("open", {"is_public": "bool"}, [("t",)] * CHANGES)
        for name, bound, entries, table, recipients in (
            ("own row: 1 sees it", 0.01, owners, "own", 1),
            (f"membership: {OF_AN_ORG} see it", 0.02, orgs, "shared", OF_AN_ORG),
            (f"public: all {USERS:,} see it", 0.2, public, "open", USERS),
        ):
            asked = [await ask_each(connection, table, USERS, recipients) for _ in range(ASKED)]
            yield Figure(name, [await decide(engine, entry, recipients) for entry in entries], bound, asked)


async def checked(dsn: str, connection: Connection) -> AsyncIterator[Figure]:
    """What Postgres decides over the row. All that is compared takes turns."""
    everyone = json.dumps([claims_of(number).encoded for number in range(CHECKED_USERS)])
    await connection.execute("select set_config('bench.users', $1, false)", everyone)
    rows = (("0", str(number + 1)) for number in range(CHECKED_CHANGES))
    decided, asked, by_hand = [], [], []
    async with connected(dsn, CHECKED_USERS, "public.checked") as (engine, _):
        for entry in insertions("checked", {"org": "int4", "level": "int4"}, rows):
            decided.append(await decide(engine, entry, 0))
            asked.append(await ask_each(connection, "checked", CHECKED_USERS, 0))
            by_hand.append((await timed(connection.execute(FLOOR)))[0])
    yield Figure(f"{CONDITIONS} conditions of {CHECKED_USERS} users by Postgres", decided, 5, asked)
    yield Figure("  beside its floor", decided, 5, by_hand, "by hand")


async def main() -> None:
    print(f"{'medians':<42}{'decided':>12}{'bound':>12}{'beside':>12}  {'':<12}{'ratio':>10}")
    with EmbeddedPostgres() as postgres:
        await install_schema(postgres.dsn())
        connection = await asyncpg.connect(postgres.dsn())
        await connection.execute(SCHEMA)
        for figures in (known(postgres.dsn(), connection), checked(postgres.dsn(), connection)):
            async for figure in figures:
                print(figure, flush=True)
        await connection.close()
