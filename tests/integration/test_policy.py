"""The policy engine agrees with Postgres: who sees which row is what `SELECT` shows under that role and those claims.

Faults that were planted to see whether `test_the_engine_shows_exactly_what_postgres_shows` finds them; all were found:
NOT dropped; `<>` true for NULL; IS NOT TRUE taken for IS FALSE; a claim that is null read as 'None'; a uuid compared as
it is written; restrictive policies ignored; policies of inherited roles ignored; a boolean claim not cast; the bounds of
AND and OR exchanged; a missing claim equal to NULL; policies FOR ALL left out; `sub` that does not cast read as NULL.
"""

import json
import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql

from realtime_bridge.change import Change, Column, Entry, Image, Relation
from realtime_bridge.claims import Claims
from realtime_bridge.database import Database
from realtime_bridge.errors import ConfigurationError
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.engine import PolicyEngine

pytestmark = pytest.mark.integration

USERS = [str(uuid.UUID(int=0xABCDEF << 96 | i)) for i in range(4)]
ROLES = ["anon", "authenticated", "service_role", "policy_editor"]
ROWS, CLAIMS = 200, 120

SCHEMA = """
do $$ begin
  if not exists (select from pg_roles where rolname = 'policy_editor') then
    create role policy_editor inherit;
    grant authenticated to policy_editor;
  end if;
end $$;
create type mood as enum ('happy', 'sad', 'None');
create domain label as varchar(20);

create table owned (id int primary key, owner uuid, is_public bool, deleted bool);
create policy a on owned for select using ((select auth.uid()) = owner or is_public);
create policy b on owned as restrictive using (deleted is not true);
create policy c on owned for insert with check (true);
create policy d on owned for update using (true);

create table tenants (id int primary key, org text, secret bool);
create policy a on tenants to authenticated using (org = (auth.jwt() ->> 'org') and not secret);
create policy b on tenants for select using ((auth.jwt() ->> 'admin')::boolean);
create policy c on tenants as restrictive for select to anon using (org is null);

create table nested (id int primary key, org varchar(20), kind label, level int, big bigint);
create policy a on nested using (org = (auth.jwt() -> 'app_metadata' ->> 'org') and kind <> 'x');
create policy b on nested for all using (level = (auth.jwt() ->> 'level')::int);
create policy c on nested using (big = (auth.jwt() ->> 'level')::bigint and level is null);

create table lists (id int primary key, status text, feeling mood, code smallint);
create policy a on lists using (status in ('a', 'ß', 'None') and feeling <> 'sad');
create policy b on lists using (status not in ('a', 'b') and code = any (array[1, 2, -3]) and auth.uid() is not null);
create policy c on lists using (code not in (1, null) or feeling::text = 'None');

create table logic (id int primary key, a bool, b bool, n int, owner uuid);
create policy a on logic using (not (a or n = 1) is not true and b is not null);
create policy b on logic using ((a and b) is unknown and (n <> 2 or owner = auth.uid()) is not false);
create policy c on logic using (not (a and not (b or n is null)) and not ((n = 1) is null));
create policy d on logic as restrictive using (auth.role() in ('authenticated', 'anon') or (n = 2) is true);

create table texts (id int primary key, owner uuid, email text, name text);
create policy a on texts using (owner::text = (auth.jwt() ->> 'sub'));
create policy b on texts using (email = auth.email() and auth.role() <> 'anon');
create policy c on texts using (name = (select auth.uid())::text or name = (select auth.jwt() ->> 'org'));

create table others (id int primary key, owner uuid, org text, a bool);
create policy a on others using (owner <> auth.uid() and not (org = (auth.jwt() ->> 'org')));
create policy b on others using (a = (auth.jwt() ->> 'admin')::bool);
create policy c on others using ((owner = auth.uid()) is null and a);

create table by_role (id int primary key, a bool, n int);
create policy a on by_role to authenticated using (a);
create policy b on by_role to anon using (n = 1);
create policy c on by_role to policy_editor using (n = 2);
create policy d on by_role as restrictive to policy_editor using (n is distinct from 3 is not null);
"""
SCHEMA = SCHEMA.replace("n is distinct from 3 is not null", "not (n = 3) is true")
TABLES = ["owned", "tenants", "nested", "lists", "logic", "texts", "others", "by_role"]

TEXTS = [None, "a", "b", "None", "null", "", "A", "ß", "ss", "x", "true", " a", "İ", "it's", USERS[0], USERS[1].upper()]
POOLS: dict[str, list[Any]] = {
    "uuid": [None, *USERS],
    "bool": [None, "t", "f"],
    "int4": [None, "1", "2", "3", "-3", "7"],
    "int8": [None, "1", "2", "99999999999"],
    "int2": [None, "1", "2", "-3", "4"],
    "mood": [None, "happy", "sad", "None"],
    "text": [*TEXTS, "a@b.c"],
    "varchar": [t for t in TEXTS if t is None or len(t) < 20],
}
MISSING = object()
CLAIM_POOLS: dict[str, list[Any]] = {
    "sub": [
        *USERS * 3,
        USERS[0].upper(),
        f"{{{USERS[1]}}}",
        USERS[2].replace("-", ""),
        None,
        MISSING,
        "",
        "None",
        7,
        "x",
    ],
    "org": [*[t for t in TEXTS if t is not None], "a", "b", "a", "b", None, MISSING, 7, True, 1.5, {"a": 1}, ["a"]],
    "app_metadata": [
        {"org": "a"},
        {"org": "ß"},
        {"org": None},
        {},
        MISSING,
        "org",
        ["org"],
        None,
        {"org": {"org": "a"}},
    ],
    "level": [1, "1", " 2 ", "+3", "007", "-3", "99999999999", 99999999999, None, MISSING, "x", 1.0, True, ""],
    "admin": [True, False, "yes", "of", "T", " on ", None, MISSING, "maybe", 1, "1", {}],
    "email": ["a@b.c", "A@b.c", "", None, MISSING],
    "session_id": ["s1", "s2"],
}


@dataclass
class Sample:
    """A table with its rows as Postgres' output functions write them."""

    relation: Relation
    rows: list[Image]

    def entries(self) -> list[Entry]:
        changes = [Change("INSERT", self.relation, None, row, 0) for row in self.rows]
        return [Entry(i + 1, str(i + 1), str(i), change) for i, change in enumerate(changes)]


class Truth:
    """Postgres itself."""

    def __init__(self, connection: "psycopg.Connection[Any]") -> None:
        self.connection = connection

    def fill(self, table: str, chance: random.Random) -> Sample:
        columns = self.connection.execute(
            "select attname, case t.typtype when 'd' then b.typname else t.typname end from pg_attribute a "
            "join pg_type t on t.oid = atttypid left join pg_type b on b.oid = t.typbasetype "
            "where attrelid = %s::regclass and attnum > 0 order by attnum",
            [table],
        ).fetchall()
        insert = sql.SQL("insert into {} values ({})").format(
            sql.Identifier(table), sql.SQL(",").join(sql.Placeholder() * len(columns))
        )
        for i in range(ROWS):
            self.connection.execute(insert, [i, *(chance.choice(POOLS[type_name]) for _, type_name in columns[1:])])
        self.connection.commit()
        relation = Relation("public", table, tuple(Column(*c) for c in columns), (0,), full=True)
        result = self.connection.pgconn.exec_(f"select * from {table} order by id".encode())
        rows = [[result.get_value(r, c) for c in range(result.nfields)] for r in range(result.ntuples)]
        return Sample(relation, [tuple(None if v is None else v.decode() for v in row) for row in rows])

    def visible(self, table: str, claims: Claims) -> set[str] | None:
        """The keys that a `SELECT` shows; None if it fails."""
        try:
            self.connection.execute("select set_config('request.jwt.claims', %s, true)", [json.dumps(claims.values)])
            self.connection.execute(sql.SQL("set local role {}").format(sql.Identifier(claims.role)))
            rows = self.connection.execute(sql.SQL("select id from {}").format(sql.Identifier(table))).fetchall()
            return {str(row[0]) for row in rows}
        except psycopg.errors.Error:
            return None
        finally:
            self.connection.rollback()


@pytest.fixture
def truth(database: str) -> Iterator[Truth]:
    with psycopg.connect(database) as connection:
        connection.execute(SCHEMA)
        for table in TABLES:
            connection.execute(f"alter table {table} enable row level security".encode())
            connection.execute(f"grant select on {table} to anon, authenticated, service_role".encode())
        connection.execute("grant usage on schema public, auth to policy_editor")
        connection.commit()
        yield Truth(connection)


def random_claims(chance: random.Random) -> Claims:
    picked = {name: chance.choice(pool) for name, pool in CLAIM_POOLS.items()}
    role = chance.choice(["anon", "authenticated", "authenticated", "authenticated", "service_role", "policy_editor"])
    values = {"role": role, **{name: value for name, value in picked.items() if value is not MISSING}}
    return Claims(values, role, None, None)


def claims_of(user: str | None, role: str = "authenticated", **more: Any) -> Claims:
    return Claims({"role": role, **({} if user is None else {"sub": user}), **more}, role, user, None)


def make_engine(
    database: Database, tables: Sequence[str], roles: Sequence[str] = ROLES, rules: dict[str, str] | None = None
) -> PolicyEngine:
    return PolicyEngine([f"public.{table}" for table in tables], roles, rules or {}, Catalog(database.transaction))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [1, 2])
async def test_the_engine_shows_exactly_what_postgres_shows(database: str, truth: Truth, seed: int) -> None:
    chance = random.Random(seed)
    samples = {table: truth.fill(table, chance) for table in TABLES}
    everybody = [random_claims(chance) for _ in range(CLAIMS)]
    async with Database(database) as asked:
        engine = make_engine(asked, TABLES)
        await engine.load()
        assert engine.denied_tables == {}
        members = [engine.join(claims) for claims in everybody]
        pairs = shown = undecided = 0
        for table, sample in samples.items():
            audiences = await engine.audience(sample.entries())
            for claims, member in zip(everybody, members, strict=True):
                seen = {row[0] for row, audience in zip(sample.rows, audiences, strict=True) if member in audience.new}
                verdicts = await engine.verdicts(sample.entries(), member)
                assert seen == {row[0] for row, verdict in zip(sample.rows, verdicts, strict=True) if verdict.new}
                expected = truth.visible(table, claims)
                if expected is None:
                    assert not seen, (table, claims)
                elif seen != expected:
                    assert not seen, (table, claims, seen ^ expected)
                    assert "ABSENT" in str(member.facts), (table, claims, seen ^ expected)
                    undecided += len(sample.rows)
                pairs += len(sample.rows)
                shown += len(seen)
    assert shown > pairs / 10
    assert undecided < pairs / 10
