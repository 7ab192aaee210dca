"""What is read of tables and of what their policies reach, and that nothing that may matter changes unnoticed."""

from collections.abc import AsyncIterator, Iterator, Set
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import psycopg
import pytest

from realtime_bridge.database import Database
from realtime_bridge.policy.blocks import Declared
from realtime_bridge.policy.catalog import Catalog, CatalogTable
from realtime_bridge.policy.dependence import dependence
from realtime_bridge.policy.keeping import Dependencies, Keeping
from realtime_bridge.policy.nodes import parse_value

pytestmark = pytest.mark.integration

ROLES = ["anon", "authenticated"]
SCHEMA = """
do $$ begin create role catalog_owner; exception when duplicate_object then null; end $$;
do $$ begin create role catalog_reader inherit; exception when duplicate_object then null; end $$;

create table members (org_id uuid, user_id uuid, role text, primary key (user_id, org_id));
create table profiles (id uuid primary key, is_admin bool);
alter table members enable row level security;
create policy own on members using (user_id = (select auth.uid()));
alter table profiles enable row level security;
create policy own on profiles using (id = auth.uid() and now() > '2020-01-01');
grant select on members, profiles to anon, authenticated;

create function is_admin() returns bool language sql stable security definer set search_path = '' as
$$ select exists (select from public.profiles p where p.id = auth.uid() and p.is_admin) $$;
create function is_admin_by_name() returns bool language sql as
$$ select exists (select from profiles where id = auth.uid() and is_admin) $$;
create function may_read(org uuid) returns bool begin atomic
  select is_admin() or exists (select from members m where m.user_id = auth.uid() and m.org_id = org);
end;
create function opaque() returns bool language plpgsql immutable as $$ begin return is_admin(); end $$;

create type mood as enum ('glad', 'sad');
create view admins as select p.id from profiles p where p.is_admin;
create table docs (
  id int, org_id uuid, owner uuid, note text, feeling mood, total int generated always as (id * 2) stored,
  primary key (org_id, id)
);
alter table docs enable row level security;
create policy a on docs using (owner = auth.uid());
create policy b on docs using (may_read(org_id));
create policy c on docs to catalog_owner using (exists (select from admins));
create function alike(text, text) returns bool language sql immutable as $$ select $1 = $2 $$;
create operator === (function = alike, leftarg = text, rightarg = text);
create policy d on docs using (org_id::text === 'x');
grant select on docs to anon, authenticated;
create table apart (id int primary key, org_id uuid);
"""


@pytest.fixture
def admin(database: str) -> Iterator["psycopg.Connection[Any]"]:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
        yield connection


# -- tables ------------------------------------------------------------------------------------------------------------


async def read(database: str, *, rule: str | None = None) -> CatalogTable:
    async with Database(database) as opened:
        rules = {} if rule is None else {"public.docs": rule}
        return (await Catalog(opened.transaction).read(["public.docs"], [*ROLES, "no_such_role"], rules))["public.docs"]


async def test_columns_are_those_that_each_role_may_select(database: str, admin: "psycopg.Connection[Any]") -> None:
    admin.execute("revoke select on docs from anon; grant select (id, note, total) on docs to anon")
    docs = await read(database)
    brought = frozenset({"id", "org_id", "owner", "note", "feeling"})
    assert docs.columns_of == {"authenticated": brought, "anon": {"id", "note"}, "no_such_role": frozenset()}
    assert docs.granted == {"authenticated"}
    assert set(docs.columns) == brought
    assert docs.generated == {"total"}
    assert docs.key == ("org_id", "id")
    admin.execute("revoke usage on schema public from public, anon, authenticated")
    assert not any((await read(database)).columns_of.values())


async def test_a_column_is_declared_as_it_was_made(database: str, admin: "psycopg.Connection[Any]") -> None:
    admin.execute(
        """create schema "Odd Schema"; create type "Odd Schema"."a ""type" as enum ('x');
           create domain label as varchar(20); create collation apart (provider = libc, locale = 'C');
           alter table docs add price numeric(10, 2), add code char(3), add seen timestamptz(3)[], add l label,
             add e "Odd Schema"."a ""type", add es "Odd Schema"."a ""type"[], add c text collate "C",
             add "Odd" varchar(5) collate apart"""
    )
    declared = (await read(database)).declared
    assert list(declared.items())[6:] == [
        ("price", Declared("numeric(10,2)")),
        ("code", Declared("character(3)")),
        ("seen", Declared("timestamp(3) with time zone[]")),
        ("l", Declared("public.label")),
        ("e", Declared('"Odd Schema"."a ""type"')),
        ("es", Declared('"Odd Schema"."a ""type"[]')),
        ("c", Declared("text", '"C"')),
        ("Odd", Declared("character varying(5)", "public.apart")),
    ]


async def test_published_are_the_tables_whose_every_change_is(database: str, admin: "psycopg.Connection[Any]") -> None:
    admin.execute(
        """create publication whole for table docs, members (user_id, org_id);
           create publication part for table docs where (id > 0), members with (publish = 'insert, update, delete');
           create publication everything for all tables;
           create publication rows for table docs where (id > 0), members"""
    )
    async with Database(database) as opened:
        catalog = Catalog(opened.transaction)
        found = await catalog.published("whole")
        assert found == {
            "public.docs": {"id", "org_id", "owner", "note", "feeling"},
            "public.members": {"user_id", "org_id"},
        }
        assert await catalog.published("part") == {}
        assert await catalog.published("none") == {}
        assert {"public.posts", "public.apart", "public.docs"} <= (await catalog.published("everything")).keys()
        assert set(await catalog.published("rows")) == {"public.members"}


# -- changes -----------------------------------------------------------------------------------------------------------

MATTERS = {
    "a function": "create or replace function is_admin() returns bool language sql stable as $$ select true $$",
    "its rights": "alter function is_admin() security invoker",
    "its search path": "alter function is_admin() set search_path = public",
    "its volatility": "alter function is_admin() volatile",
    "who may call it": "revoke execute on function is_admin() from public",
    "a function like it": "create function is_admin(text) returns bool language sql as $$ select true $$",
    "a function that it calls": "create or replace function auth.uid() returns uuid language sql as "
    "$$ select null::uuid $$",
    "a function behind an operator": "create or replace function alike(text, text) returns bool language sql "
    "immutable as $$ select lower($1) = lower($2) $$",
    "a policy that it reads through": "alter policy own on profiles using (false)",
    "another such policy": "create policy other on members using (true)",
    "one less": "drop policy own on members",
    "such policies at all": "alter table members disable row level security",
    "or for owners": "alter table profiles force row level security",
    "who may read there": "revoke select on members from anon",
    "which columns": "grant select (role) on members to public",
    "a type there": "alter table members alter role type varchar",
    "the owner there": "alter table profiles owner to catalog_owner",
    "a policy": "alter policy a on docs using (false)",
    "a policy's roles": "alter policy a on docs to anon",
    "a label": "alter type mood rename value 'sad' to 'sadder'",
    "another label": "alter type mood add value 'in between'",
    "a type's name": "alter type mood rename to moods",
    "a view": "create or replace view admins as select p.id from profiles p",
    "a type": "alter table docs alter note type varchar(5)",
    "a column": "alter table docs rename note to notes",
    "a generated column": "alter table docs alter total drop expression",
    "the key": "alter table docs drop constraint docs_pkey",
    "who may read": "revoke select on docs from anon",
    "which of its columns": "revoke select on docs from anon; grant select (id) on docs to anon",
    "a schema": "revoke usage on schema public from public, anon",
    "a role": "alter role catalog_owner bypassrls",
    "a member of it": "grant catalog_owner to catalog_reader",
}


async def test_another_table_in_the_place_of_one_is_another_digest(
    database: str, admin: "psycopg.Connection[Any]"
) -> None:
    async with Database(database) as opened:
        catalog = Catalog(opened.transaction)
        before = (await catalog.read(["public.apart"], ROLES))["public.apart"]
        admin.execute("drop table apart; create table apart (id int primary key, org_id uuid)")
        after = (await catalog.read(["public.apart"], ROLES))["public.apart"]
    assert (before.declared, before.key) == (after.declared, after.key)
    assert before.digest != after.digest


async def test_what_verdicts_rest_on_is_another_digest(database: str, admin: "psycopg.Connection[Any]") -> None:
    """Also for a catalog that has been read before, and asks only whether anything has changed."""
    admin.execute("alter function may_read owner to catalog_owner")
    connection = await asyncpg.connect(database)

    @asynccontextmanager
    async def lent() -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        yield connection

    async def digest(catalog: Catalog) -> str:
        return (await catalog.read(["public.docs"], [*ROLES, "catalog_reader"]))["public.docs"].digest

    for what, statement in MATTERS.items():
        transaction = connection.transaction()
        await transaction.start()
        catalog = Catalog(lent)
        assert len({await digest(catalog) for _ in range(3)}) == 1
        before = await digest(catalog)
        await connection.execute(f"set local search_path = public; {statement}")
        after = await digest(catalog)
        assert after != before, what
        assert await digest(Catalog(lent)) == after, what
        await transaction.rollback()
    await connection.close()


async def test_what_is_unchanged_is_not_read_again(database: str, admin: "psycopg.Connection[Any]") -> None:
    async with Database(database) as opened:
        catalog = Catalog(opened.transaction)
        first = await catalog.read(["public.docs"], ROLES)
        second = await catalog.read(["public.docs"], ROLES)
        third = await catalog.read(["public.docs"], ROLES)
        assert third["public.docs"] is second["public.docs"] is not first["public.docs"]
        assert first["public.docs"].digest == second["public.docs"].digest
        admin.execute("insert into docs values (1, gen_random_uuid())")
        admin.execute("vacuum analyze docs")
        admin.execute("create table unrelated ()")
        assert (await catalog.read(["public.docs"], ROLES))["public.docs"] is third["public.docs"]
        assert (await catalog.read(["public.docs"], ["anon"]))["public.docs"].columns_of.keys() == {"anon"}
        assert (await catalog.read(["public.docs"], ROLES))["public.docs"].digest == third["public.docs"].digest


async def test_what_a_rule_reaches_counts_as_what_policies_do(database: str, admin: "psycopg.Connection[Any]") -> None:
    before = await read(database, rule="opaque()")
    admin.execute("create or replace function opaque() returns bool language sql as $$ select true $$")
    assert (await read(database, rule="opaque()")).digest != before.digest


# -- what lies behind names --------------------------------------------------------------------------------------------

FOLLOWED = ["public.members", "public.profiles", "public.parents"]


async def dependencies(database: str, sql: str, followed: list[str] = FOLLOWED) -> Dependencies:
    references = (await read(database, rule=sql)).references
    found = dependence(parse_value(sql), "public.docs", references.claims)
    return references.dependencies(found.reads, followed, found.keyed_by)


BEHIND = """
set check_function_bodies = off;
create schema extensions; create extension citext schema extensions;
create view shown as select p.id from profiles p where p.is_admin;
create view shown_to_reader with (security_invoker) as select p.id from profiles p where p.is_admin;
create materialized view copied as select id from profiles;
create table parents (user_id uuid); create table children () inherits (parents);

create function by_place(uuid, text) returns bool language sql security definer as
$$ select exists (select from members m where m.user_id = auth.uid() and m.org_id = $1 and m.role = $2) $$;
create function by_name(uuid, role text) returns bool language sql security definer as
$$ select exists (select from members where user_id = auth.uid() and org_id = $1 and role = by_name.role) $$;
create function by_argument(user_id uuid) returns bool language sql security definer as
$$ select exists (select from members where user_id = auth.uid()) $$;
create function keyless() returns bool language sql immutable security definer as
$$ select count(*) > 1 from public.profiles p where p.is_admin $$;
create function no_reading() returns bool language sql as $$ insert into apart values (1) returning true $$;
create function for_caller() returns bool language sql set search_path = "$user", public as
$$ select is_admin() $$;
create function elsewhere() returns bool language sql set search_path = auth as
$$ select exists (select from members) $$;
create function round_and_round() returns bool language sql as $$ select true $$;
create or replace function round_and_round() returns bool language sql as $$ select round_and_round() $$;
create function by_chance() returns bool language sql as $$ select random() > 0.5 $$;
create function calls_opaque() returns bool language sql as $$ select opaque() $$;
create aggregate own_sum(int) (sfunc = int4pl, stype = int);
"""
MEMBERS = "SELECT m.org_id FROM public.members m WHERE m.user_id = auth.uid()"
OWN = frozenset({("public.members", "user_id")})
ADMINS = frozenset({("public.profiles", "id")})


CASES: list[tuple[str, Keeping, Set[tuple[str, str]]]] = [
    ("owner = auth.uid()", Keeping.CLAIMS, set()),
    ("lower(note) = auth.email()", Keeping.CLAIMS, set()),
    ("current_user = 'anon' OR CURRENT_ROLE = 'anon'", Keeping.CLAIMS, set()),
    ("(current_setting('request.jwt.claims', true)::json ->> 'a') = 'b'", Keeping.CLAIMS, set()),
    ("jsonb_build_object('a', note) ? concat('a', 'b')", Keeping.CLAIMS, set()),
    ("note::extensions.citext OPERATOR(extensions.=) 'a'::extensions.citext", Keeping.CLAIMS, set()),
    ("round_and_round()", Keeping.CLAIMS, set()),
    (f"org_id IN ({MEMBERS})", Keeping.TRACKED, OWN),
    ("is_admin()", Keeping.TRACKED, ADMINS),
    ("may_read(org_id)", Keeping.TRACKED, OWN | ADMINS),
    ("by_place(org_id, 'x')", Keeping.TRACKED, OWN),
    ("by_name(org_id, 'x')", Keeping.TRACKED, OWN),
    ("by_argument(org_id)", Keeping.TRACKED, set()),
    ("keyless()", Keeping.TRACKED, set()),
    ("keyless() OR is_admin()", Keeping.TRACKED, set()),
    ("EXISTS (SELECT FROM public.shown s WHERE s.id = auth.uid())", Keeping.TRACKED, set()),
    ("EXISTS (SELECT FROM public.shown_to_reader s WHERE s.id = auth.uid())", Keeping.TIMED, set()),
    ("EXISTS (SELECT FROM public.copied c WHERE c.id = auth.uid())", Keeping.TIMED, set()),
    (
        "EXISTS (SELECT FROM public.parents p WHERE p.user_id = auth.uid())",
        Keeping.TIMED,
        {("public.parents", "user_id")},
    ),
    ("EXISTS (SELECT FROM public.apart a WHERE a.org_id = docs.org_id)", Keeping.TIMED, set()),
    ("EXISTS (SELECT FROM public.profiles p WHERE p.id = auth.uid())", Keeping.TIMED, ADMINS),
    ("EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.rolname = 'anon')", Keeping.TIMED, set()),
    ("EXISTS (SELECT FROM public.nowhere)", Keeping.TIMED, set()),
    ("is_admin_by_name()", Keeping.TIMED, ADMINS),
    ("elsewhere()", Keeping.TIMED, set()),
    ("for_caller()", Keeping.TIMED, set()),
    ("no_reading()", Keeping.TIMED, set()),
    ("opaque()", Keeping.TIMED, set()),
    ("calls_opaque()", Keeping.TIMED, set()),
    ("no_such_function()", Keeping.TIMED, set()),
    ("(SELECT public.own_sum(1)) = 1", Keeping.TIMED, set()),
    ("now() > '2020-01-01'", Keeping.TIMED, set()),
    ("CURRENT_DATE > '2020-01-01'", Keeping.TIMED, set()),
    ("has_table_privilege('docs', 'select')", Keeping.TIMED, set()),
    ("random() > 0.5", Keeping.VOLATILE, set()),
    ("now() > '2020-01-01' AND gen_random_uuid() = owner AND opaque()", Keeping.VOLATILE, set()),
    ("by_chance()", Keeping.VOLATILE, set()),
]


async def test_an_answer_is_kept_as_long_as_what_lies_behind_it_allows(
    database: str, admin: "psycopg.Connection[Any]"
) -> None:
    admin.execute(BEHIND.encode())
    for sql, keeping, keyed_by in CASES:
        found = await dependencies(database, sql)
        assert (found.keeping, found.keyed_by) == (keeping, keyed_by), (sql, found.reason)


async def test_a_table_that_is_not_followed_is_known_but_not_tracked(
    database: str, admin: "psycopg.Connection[Any]"
) -> None:
    found = await dependencies(database, "may_read(org_id)", ["public.members"])
    assert (found.keeping, found.reason) == (Keeping.TIMED, "public.profiles is not followed")
    assert found.tables == {"public.members", "public.profiles"}
    columns = {("public.members", "user_id"), ("public.members", "org_id")}
    assert found.references == {*columns, ("public.profiles", "id"), ("public.profiles", "is_admin")}


async def test_an_auth_function_that_says_something_else_is_a_function_like_others(
    database: str, admin: "psycopg.Connection[Any]"
) -> None:
    admin.execute(
        "create or replace function auth.uid() returns uuid language sql stable as "
        "$$ select m.user_id from public.members m limit 1 $$"
    )
    found = await dependencies(database, f"org_id IN ({MEMBERS})")
    assert (found.keeping, found.keyed_by) == (Keeping.TRACKED, frozenset())
    admin.execute("create or replace function auth.uid() returns uuid language plpgsql as $$ begin return null; end $$")
    assert (await dependencies(database, "owner = auth.uid()")).keeping == Keeping.TIMED


async def test_a_nearer_function_of_the_same_name_counts_too(database: str, admin: "psycopg.Connection[Any]") -> None:
    assert (await dependencies(database, "lower(note) = 'x'")).keeping == Keeping.CLAIMS
    admin.execute("create function lower(varchar) returns text language plpgsql as $$ begin return random(); end $$")
    assert (await dependencies(database, "lower(note) = 'x'")).keeping == Keeping.TIMED
