"""What Postgres is asked about users and rows: each answer is what that user would get, whoever else is asked about."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest

from realtime_bridge.change import ABSENT, Value
from realtime_bridge.claims import Claims
from realtime_bridge.database import PINNED, Database
from realtime_bridge.errors import BridgeError, DatabaseError
from realtime_bridge.pgoutput import Insert, decode
from realtime_bridge.policy import asking, blocks
from realtime_bridge.policy.asking import Asking
from realtime_bridge.policy.atoms import Failed, Values
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.blocks import Declared
from realtime_bridge.policy.expression import Asked, Query, Reads
from realtime_bridge.policy.index import Question
from tests.services import PgBouncer, eventually, running, unavailable

pytestmark = pytest.mark.integration

ROLES = ["anon", "authenticated"]
ANN, BOB, CAROL = (f"{letter * 8}-0000-4000-8000-000000000001" for letter in "abc")
ORG, OTHER_ORG = "dddddddd-0000-4000-8000-000000000001", "eeeeeeee-0000-4000-8000-000000000001"
ODD = [
    "",
    "None",
    "NULL",
    "null",
    "it's",
    '"',
    "\\",
    "\\'",
    "$$",
    "$x$",
    "{a,b}",
    "{}",
    '{"a"}',
    "%s",
    "ß İ ǆ 😀 \u202e",
]
ODD += ["a,b", " a ", "a\nb\r\t\x01", ":", "!", "\\u0000", "'; drop table members; --", "x" * 100_000]

SCHEMA = f"""
create table members (org_id uuid, user_id uuid, note text, primary key (org_id, user_id));
alter table members enable row level security;
create policy own on members using (user_id = auth.uid());
grant select on members to anon, authenticated;
insert into members values ('{ORG}', '{ANN}', 'of ann'), ('{OTHER_ORG}', '{ANN}', null), ('{ORG}', '{BOB}', 'of bob');

create function is_member(org uuid) returns bool language plpgsql stable security definer set search_path = '' as
$$ begin return exists (select from public.members m where m.user_id = auth.uid() and m.org_id = org); end $$;
create function old_uid() returns uuid language sql stable as
$$ select nullif(current_setting('request.jwt.claim.sub', true), '')::uuid $$;
create function unqualified() returns bigint language sql stable security definer as
$$ select count(*) from members where user_id = auth.uid() $$;

create function meddles() returns text language plpgsql as $$ begin
  perform set_config('request.jwt.claims', '{{"sub": "{CAROL}"}}', true), set_config('app.seen', 'x', false);
  perform set_config('request.jwt.claim.sub', '{CAROL}', false), set_config('search_path', 'nowhere', false);
  set local role service_role;
  return current_setting('app.seen', true);
end $$;
create function remembers() returns text language plpgsql as $$ begin
  if coalesce(current_setting('app.tenant', true), '') = '' then
    perform set_config('app.tenant', auth.uid()::text, true);
  end if;
  return current_setting('app.tenant');
end $$;
create function sleeps() returns bool language plpgsql as
$$ begin perform pg_sleep(60) where auth.jwt() ? 'sleepy'; return true; end $$;
create function asserts() returns bool language plpgsql as
$$ begin assert auth.uid() <> '{BOB}'; return true; end $$;
create function writes() returns bool language sql as
$$ insert into members values (gen_random_uuid(), '{CAROL}', '') returning true $$;

create schema hidden;
create type hidden.mood as enum ('glad', 'sad');
create function hidden.is_ann() returns bool language sql stable security definer as
$$ select auth.uid() = '{ANN}' $$;
create function hidden.is_glad(mood hidden.mood) returns bool language sql immutable as $$ select mood = 'glad' $$;
create function hidden.for_some() returns bool language sql stable as $$ select true $$;
revoke execute on function hidden.for_some() from public;
grant execute on function hidden.for_some() to authenticated;
grant usage on schema hidden to authenticator;
create function for_some() returns bool language sql stable as $$ select true $$;
revoke execute on function for_some() from public;
grant execute on function for_some() to authenticated;
"""


def as_login(dsn: str) -> str:
    """The address for the user that owns nothing and may become anon, authenticated and service_role."""
    parts = urlsplit(dsn)
    return parts._replace(netloc=f"authenticator@{parts.hostname}:{parts.port}").geturl()


@pytest.fixture
def admin(database: str) -> Iterator["psycopg.Connection[Any]"]:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
        yield connection


@pytest.fixture(params=["superuser", "login", "pooled"])
def dsn(request: pytest.FixtureRequest, database: str, admin: "psycopg.Connection[Any]") -> Iterator[str]:
    """The ways to one database: as its superuser, as who may only become others, and through a transaction pooler."""
    with ExitStack() as stack:
        match request.param:
            case "superuser":
                yield database
            case "login":
                yield as_login(database)
            case "pooled":
                yield as_login(stack.enter_context(running(PgBouncer(database, pool_size=1))).dsn)


@pytest.fixture
def login(database: str, admin: "psycopg.Connection[Any]") -> str:
    return as_login(database)


@asynccontextmanager
async def asking_at(dsn: str, timeout: float = 30) -> AsyncIterator[Asking]:
    async with Database(dsn, max_size=1) as database:
        yield Asking(database.transaction, ROLES, timeout=timeout)


def claims_of(user: str | None, role: str = "authenticated", **more: Any) -> Claims:
    return Claims({"role": role, **({} if user is None else {"sub": user}), **more}, role, user, None)


def one(sql: str) -> Query:
    return Query(sql, False, Reads())


def many(sql: str) -> Query:
    return Query(sql, True, Reads())


def asked(sql: str, *columns: str, of_user: bool = True) -> Asked:
    return Asked(sql, "public.docs", Reads(columns=frozenset(columns)), of_user)


def question(asked: Asked, claims: Claims | None, *values: str | None) -> Question:
    return Question(asked, None if claims is None else Member(("", ""), claims), values)


async def fact(opened: Asking, claims: Claims, sql: str) -> object:
    ((value,),) = [list(found.values()) for found in await opened.facts([claims], [one(sql)])]
    return value


UID = one("auth.uid()")
ORGS = many("ARRAY(SELECT members.org_id FROM public.members WHERE members.user_id = auth.uid())")


# -- facts -------------------------------------------------------------------------------------------------------------


async def test_facts_are_those_of_each_user_in_one_go(dsn: str) -> None:
    users = [claims_of(ANN), claims_of(None, "anon"), claims_of(BOB), claims_of(CAROL), claims_of(BOB, "anon")]
    queries = [
        UID,
        one("current_user"),
        one("auth.role()"),
        ORGS,
        one(f"is_member('{ORG}'::uuid)"),
        one("old_uid()"),
        one("unqualified()"),
    ]
    async with asking_at(dsn) as opened:
        found = await opened.facts(users, queries)
    assert [tuple(facts.values()) for facts in found] == [
        (ANN, "authenticated", "authenticated", Values(frozenset({ORG, OTHER_ORG})), "t", ANN, "2"),
        (None, "anon", "anon", Values(frozenset()), "f", None, "0"),
        (BOB, "authenticated", "authenticated", Values(frozenset({ORG})), "t", BOB, "1"),
        (CAROL, "authenticated", "authenticated", Values(frozenset()), "f", CAROL, "0"),
        (BOB, "anon", "anon", Values(frozenset({ORG})), "t", BOB, "1"),
    ]


async def test_a_text_is_what_a_column_of_the_type_would_be_brought_as(login: str) -> None:
    """Each of these has a cast to text that says something else."""
    expected = {
        "true": "t",
        "'a'::character(3)": "a  ",
        "'192.168.1.5'::inet": "192.168.1.5",
        "''::text": "",
        "NULL::text": None,
        "'2026-01-01 12:00'::timestamptz": "2026-01-01 12:00:00+00",
        "'\\x00ff'::bytea": "\\x00ff",
        "row(1, NULL, 'a b')": '(1,,"a b")',
        "ARRAY[1, NULL]": "{1,NULL}",
        "1.50": "1.50",
        "'$$ end $x$; -- \\ %s'::text": "$$ end $x$; -- \\ %s",
        '\'{"b": 1,  "a":2}\'::json': '{"b": 1,  "a":2}',
    }
    async with asking_at(login) as opened:
        (found,) = await opened.facts([claims_of(ANN)], [one(sql) for sql in expected])
    assert found == expected


async def test_many_are_the_elements_of_an_array(login: str) -> None:
    expected = {
        "ARRAY['a b', 'NULL', NULL, '', '\"\\', '{}']": Values(frozenset({"a b", "NULL", "", '"\\', "{}"}), True),
        "'[0:1][1:2]={{1,2},{3,NULL}}'::int[]": Values(frozenset({"1", "2", "3"}), True),
        "'{}'::uuid[]": Values(frozenset()),
        "NULL::uuid[]": Values(frozenset(), has_null=True),
        "'no array'::text": Failed("42804"),
    }
    async with asking_at(login) as opened:
        (found,) = await opened.facts([claims_of(ANN)], [many(sql) for sql in expected])
    assert found == expected


async def test_what_fails_for_one_user_denies_that_one_alone(dsn: str) -> None:
    users = [
        claims_of(ANN),
        claims_of("no uuid"),
        claims_of(BOB, "no_such_role"),
        claims_of(BOB, "none"),
        claims_of(BOB, "postgres"),
        claims_of(CAROL, name="\ud800"),
        claims_of(CAROL, email="\0"),
        claims_of(CAROL, big=1 << 70),
        claims_of(BOB),
    ]
    queries = [UID, one("1 / (auth.uid() <> 'bbbbbbbb-0000-4000-8000-000000000001')::int"), one("asserts()")]
    async with asking_at(dsn) as opened:
        found = [list(facts.values()) for facts in await opened.facts(users, queries)]
    assert found[0] == [ANN, "1", "t"]
    assert found[1] == [Failed("22P02")] * 3
    assert found[2] == [Failed("22023")] * 3
    assert found[3] == [Failed("0P000")] * 3
    assert found[5:8] == [[Failed("22P05")] * 3] * 3
    assert found[8] == [BOB, Failed("22012"), Failed("P0004")]
    if "postgres@" not in dsn:
        assert found[4] == [Failed("42501")] * 3


async def test_no_role_or_setting_of_one_user_meets_the_next(dsn: str) -> None:
    """More users than a PL/pgSQL cursor fetches at a time, and failing ones between them."""
    queries = [one("meddles()"), one("current_setting('app.seen', true)"), UID, one("remembers()"), one("current_user")]
    users = [claims_of(ANN if i % 3 else "no uuid", ROLES[i % 2], number=i) for i in range(40)]
    async with asking_at(dsn) as opened:
        both = [await opened.facts(users, queries), await opened.facts(users, queries[2:])]
        (last,) = await opened.facts([claims_of(BOB, "anon")], [*queries[1:], one("current_setting('search_path')")])
    for i, facts in enumerate(both[1]):
        uid = ANN if i % 3 else Failed("22P02")
        assert list(facts.values()) == [uid, uid, ROLES[i % 2]]
    assert all(facts["meddles()"] in ("x", Failed("42501")) for facts in both[0])
    assert list(last.values()) == ["", BOB, BOB, "anon", "public, extensions, pg_temp"]


async def test_what_others_left_on_a_poolers_connection_does_not_count(database: str, admin: object) -> None:
    with running(PgBouncer(database, pool_size=1)) as bouncer:
        other = await asyncpg.connect(as_login(bouncer.dsn), statement_cache_size=0)
        await other.execute("set role service_role; set search_path = hidden; set row_security = off")
        for name in ("sub", "role", "email"):
            await other.execute(f"set request.jwt.claim.{name} = '{BOB}'")
        await other.execute(f"""set request.jwt.claim = '{{"sub":"{BOB}"}}'""")
        await other.execute("set transform_null_equals = on; set array_nulls = off; set datestyle = 'German'")
        await other.execute("set standard_conforming_strings = off; set plpgsql.variable_conflict = error")
        async with asking_at(as_login(bouncer.dsn)) as opened:
            queries = [UID, one("auth.email()"), one("(NULL::int = NULL)"), one("'2026-07-01'::date"), one("'\\'")]
            (found,) = await opened.facts([claims_of(None, "anon")], [*queries, many("'{NULL}'::text[]")])
            assert list(found.values()) == [None, None, None, "2026-07-01", "\\", Values(frozenset(), True)]
            assert await fact(opened, claims_of(ANN), "auth.jwt() ->> 'sub'") == ANN
        await other.close()


async def test_claims_are_values_whatever_they_spell(login: str) -> None:
    users = [claims_of(ANN, email=text, name=text) for text in ODD]
    queries = [one("auth.jwt() ->> 'name'"), one("auth.email()"), many("ARRAY[auth.jwt() ->> 'name']")]
    async with asking_at(login) as opened:
        found = await opened.facts(users, queries)
    for text, facts in zip(ODD, found, strict=True):
        email = text or ""  # the JSON has it, where the legacy setting is empty
        assert list(facts.values()) == [text, email, Values(frozenset({text}))]


async def test_more_users_than_one_statement_holds(login: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MAX_USERS", 3)
    users = [claims_of(f"00000000-0000-4000-8000-{i:012}", ROLES[i % 2]) for i in range(20)]
    async with asking_at(login) as opened:
        assert [facts[UID.sql] for facts in await opened.facts(users, [UID])] == [user.subject for user in users]
        assert await opened.facts(users, []) == [{}] * 20
        assert await opened.facts([], [UID]) == []
        assert await opened.types([]) == {}
        assert await opened.answers({}, []) == []


async def test_a_value_that_is_too_long_fails_and_many_long_ones_only_take_longer(
    login: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MAX_BYTES", 5000)
    monkeypatch.setattr(blocks, "MAX_TOTAL", 9000)
    users = [claims_of(ANN, size=size) for size in (4000, 6000, 3000, 4500, 4800, 1)]
    query = one("repeat('x', (auth.jwt() ->> 'size')::int)")
    async with asking_at(login) as opened:
        found = [facts[query.sql] for facts in await opened.facts(users, [query])]
    assert [len(text) if isinstance(text, str) else text for text in found] == [
        4000,
        Failed("54000"),
        3000,
        4500,
        4800,
        1,
    ]


async def test_nothing_is_written(login: str, admin: "psycopg.Connection[Any]") -> None:
    async with asking_at(login) as opened:
        assert await fact(opened, claims_of(ANN), "writes()") == Failed("25006")
    assert admin.execute("select count(*) from members").fetchone() == (3,)


async def test_whoever_takes_too_long_fails_alone(login: str) -> None:
    users = [claims_of(ANN), claims_of(BOB, sleepy=True), claims_of(CAROL)]
    async with asking_at(login, timeout=1) as opened:
        found = [list(facts.values()) for facts in await opened.facts(users, [one("sleeps()"), UID])]
        assert found[1] == [Failed("57014")] * 2
        assert found[0] == ["t", ANN]
        assert found[2] in (["t", CAROL], [Failed("57014")] * 2)  # that there was no time left


async def test_a_call_ends_however_many_take_too_long(login: str) -> None:
    users = [claims_of(f"00000000-0000-4000-8000-{i:012}", sleepy=True) for i in range(400)]
    async with asking_at(login, timeout=0.2) as opened:
        found = await opened.facts(users, [one("sleeps()")])  # one after the other: longer than a test may take
    assert all(facts == {"sleeps()": Failed("57014")} for facts in found)


async def test_a_locked_table_is_not_waited_for(login: str, admin: "psycopg.Connection[Any]") -> None:
    async with asking_at(login, timeout=2) as opened:
        with admin.transaction():
            admin.execute("lock table members")
            (found,) = await opened.facts([claims_of(ANN)], [UID, ORGS])
            assert found == {UID.sql: ANN, ORGS.sql: Failed("57014")}
        (found,) = await opened.facts([claims_of(ANN)], [UID, ORGS])
        assert found == {UID.sql: ANN, ORGS.sql: Values(frozenset({ORG, OTHER_ORG}))}


async def test_a_connection_that_dies_says_so(login: str, admin: "psycopg.Connection[Any]") -> None:
    ended = (
        "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'authenticator' and query like 'do %'"
    )
    async with asking_at(login) as opened, asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(fails(opened.facts([claims_of(ANN, sleepy=True)], [one("sleeps()")])))
        await eventually(lambda: admin.execute(ended.encode()).fetchall())
        assert isinstance(await asked, DatabaseError)
        assert await fact(opened, claims_of(ANN), UID.sql) == ANN


async def fails(call: Awaitable[object]) -> BridgeError | None:
    try:
        await call
    except BridgeError as error:
        return error
    return None


# -- names and privileges ----------------------------------------------------------------------------------------------


async def test_a_function_may_stand_in_a_schema_that_the_role_may_not_use(dsn: str) -> None:
    """Postgres resolves a policy's names when it is made, and asks for no USAGE later."""
    glad = asked("hidden.is_glad(mood) and hidden.is_ann()", "mood")
    columns = {"public.docs": {"mood": Declared("hidden.mood")}}
    users = [claims_of(ANN), claims_of(BOB), claims_of(ANN, "anon"), claims_of("no uuid")]
    async with asking_at(dsn) as opened:
        found = await opened.facts(users, [one("hidden.is_ann()"), UID])
        assert [list(facts.values()) for facts in found] == [["t", ANN], ["f", BOB], ["t", ANN], [Failed("22P02")] * 2]
        questions = [question(glad, user, mood) for user in users[:3] for mood in ("glad", "sad", None)]
        assert await opened.answers(columns, questions) == [True, False, None, False, False, False, True, False, None]


async def test_a_function_that_a_role_may_not_call_fails_for_that_role_alone(dsn: str) -> None:
    users = [claims_of(ANN), claims_of(ANN, "anon"), claims_of(BOB), claims_of(BOB, "anon")]
    queries = [one("for_some()"), one("hidden.for_some()"), one("(SELECT hidden.for_some())")]
    async with asking_at(dsn) as opened:
        found = [list(facts.values()) for facts in await opened.facts(users, queries)]
    assert found[0] == found[2] == ["t"] * 3
    assert found[1] == found[3] == [Failed("42501")] * 3


async def test_a_table_that_a_role_may_not_read_fails(login: str, admin: "psycopg.Connection[Any]") -> None:
    admin.execute("revoke select on members from anon")
    async with asking_at(login) as opened:
        found = await opened.facts([claims_of(ANN), claims_of(ANN, "anon")], [ORGS])
    assert [facts[ORGS.sql] for facts in found] == [Values(frozenset({ORG, OTHER_ORG})), Failed("42501")]


async def test_types_that_only_the_roles_may_name_are_named_under_those(
    dsn: str, admin: "psycopg.Connection[Any]"
) -> None:
    admin.execute(
        """create schema apart; create type apart.kind as enum ('a', 'b');
           grant usage on schema apart to authenticated"""
    )
    columns = {"public.docs": {"kind": Declared("apart.kind")}, "public.other": {"kind": Declared("secret.kind")}}
    admin.execute("create schema secret; create type secret.kind as enum ('a')")
    kind = asked("kind = 'a'", "kind")
    elsewhere = Asked("kind = 'a'", "public.other", kind.reads, True)
    async with asking_at(dsn) as opened:
        questions = [question(kind, claims_of(ANN, role), text) for role in ROLES for text in ("a", "b")]
        assert await opened.answers(columns, questions) == [True, False] * 2
        secret = True if "postgres@" in dsn else Failed("42501")
        found = await opened.answers(columns, [question(elsewhere, claims_of(ANN), "a"), *questions])
        assert found == [secret, *[True, False] * 2]


# -- types -------------------------------------------------------------------------------------------------------------


async def test_types_are_found_without_evaluating_anything(login: str, admin: "psycopg.Connection[Any]") -> None:
    admin.execute(
        """create type mood as enum ('glad'); create domain label as varchar(20); create domain labels as label[];
           create domain number as int; create type pair as (a int, b text);
           create collation loose (provider = libc, locale = 'C');
           update pg_collation set collisdeterministic = false where collname = 'loose';
           create domain loose_text as text collate loose;
           create schema apart; create function apart.f() returns uuid language sql as $$ select null::uuid $$;
           grant usage on schema apart to authenticated"""
    )
    expected = {
        one("auth.uid()"): "uuid",
        one("auth.jwt() ->> 'x'"): "text",
        one("meddles()"): "text",
        one("writes()"): "bool",
        one("1 / 0"): None,
        one("1 / (auth.uid() is null)::int"): "int4",
        one("'glad'::mood"): "public.mood",
        one("'x'::label"): "varchar",
        one("1::number"): "int4",
        one("row(1, '')::pair"): "public.pair",
        one("row(1, 2)"): None,
        one("ARRAY[1]"): "_int4",
        one("'x'::text collate loose"): None,
        one("'x'::text collate \"C\""): "text",
        one("'x'::loose_text"): None,
        one("no_such_function()"): None,
        one("pg_sleep(1)"): None,
        one("apart.f()"): "uuid",
        ORGS: "uuid",
        many("'{a}'::label[]"): "varchar",
        many("'{a}'::labels"): "varchar",
        many("'{glad}'::mood[]"): "public.mood",
        many("auth.email()"): None,
        many("'1 2'::int2vector"): None,
    }
    async with asking_at(login) as opened:
        found = await opened.types(list(expected))
    assert found == {query.sql: type_name for query, type_name in expected.items()}


# -- conditions over rows ----------------------------------------------------------------------------------------------

DOCS = {
    "public.docs": {
        "org": Declared("uuid"),
        "note": Declared("text", '"C"'),
        "tags": Declared("text[]"),
        "level": Declared("integer"),
    }
}


async def test_a_condition_is_decided_for_each_row_and_user(dsn: str) -> None:
    member = asked("is_member(org)", "org")
    noted = asked(
        "EXISTS (SELECT 1 FROM public.members WHERE user_id = auth.uid() AND org_id = docs.org AND note = docs.note)",
        "org",
        "note",
    )
    high = asked("level > 2.5::float8", "level", of_user=False)
    tagged = asked("tags && ARRAY[auth.role()]", "tags")
    ann, bob, guest = claims_of(ANN), claims_of(BOB), claims_of(None, "anon")
    expected = [
        (question(member, ann, OTHER_ORG), True),
        (question(noted, bob, None, ORG), False),
        (question(noted, bob, "of bob", ORG), True),
        (question(noted, ann, "of bob", ORG), False),
        (question(high, None, "3"), True),
        (question(high, None, "2"), False),
        (question(high, None, None), None),
        (question(member, bob, OTHER_ORG), False),
        (question(member, bob, ORG), True),
        (question(member, guest, ORG), False),
        (question(tagged, guest, '{"x y",anon,NULL}'), True),
        (question(tagged, guest, "{NULL}"), False),
        (question(tagged, guest, None), None),
    ]
    async with asking_at(dsn) as opened:
        assert await opened.answers(DOCS, [q for q, _ in expected]) == [answer for _, answer in expected]


async def test_names_in_a_sub_select_mean_the_nearest_column(login: str) -> None:
    """As in SQL: a column of the sub-select's own table hides one of the row, and the row's name leads out to it."""
    inner = asked("EXISTS (SELECT 1 FROM public.members WHERE note = 'of ann' AND user_id = auth.uid())", "note")
    outer = asked("EXISTS (SELECT 1 FROM public.members WHERE docs.note = 'x' AND user_id = auth.uid())", "note")
    own = asked("EXISTS (SELECT 1 FROM (VALUES ('a')) docs_1(note) WHERE docs_1.note = docs.note)", "note")
    async with asking_at(login) as opened:
        questions = [question(a, claims_of(ANN), text) for a in (inner, outer, own) for text in ("x", "a")]
        assert await opened.answers(DOCS, questions) == [True, True, True, False, False, True]


async def test_columns_may_be_called_anything(login: str) -> None:
    names = ["found", "loop", "end", "sqlstate", "Mixed Case", 'qu"ote', "docs", "raise", "into", "user_id", "rows"]
    columns = {"public.docs": {name: Declared("text") for name in names}}
    async with asking_at(login) as opened:
        for name in names:
            quoted = '"' + name.replace('"', '""') + '"'
            member = "EXISTS (SELECT 1 FROM public.members m WHERE m.user_id = auth.uid() AND m.note = docs."
            questions = [
                question(asked(f"{quoted} = 'a'", name), claims_of(ANN), "a"),
                question(asked(f"{member}{quoted})", name), claims_of(ANN), "of ann"),
                question(
                    asked(f"{quoted} IS NULL", *names),
                    claims_of(ANN),
                    *(None if n == name else "a" for n in sorted(names)),
                ),
            ]
            assert await opened.answers(columns, questions) == [True] * 3, name


async def test_what_cannot_be_decided_fails_alone(login: str) -> None:
    high = asked("level > 2", "level")
    expected = [
        (question(high, claims_of(ANN), "3"), True),
        (question(high, claims_of(ANN), "three"), Failed("22P02")),
        (question(asked("1 / level > 0", "level"), claims_of(ANN), "0"), Failed("22012")),
        (question(asked("level", "level"), claims_of(ANN), "1"), Failed("42804")),
        (question(asked("no_such_function(level)", "level"), claims_of(ANN), "1"), Failed("42883")),
        (question(asked("level > 2 AND secret IS NULL", "level"), claims_of(ANN), "3"), Failed("42703")),
        (question(asked("docs IS NOT NULL", "level"), claims_of(ANN), "3"), Failed("42703")),
        (question(asked("level > 2 AND", "level"), claims_of(ANN), "3"), Failed("42601")),
        (question(asked("unknown = 1", "unknown"), claims_of(ANN), "3"), Failed("42703")),
        (question(asked("note = 'x'", "note"), claims_of(ANN), "\0"), Failed("22P05")),
        (question(asked("note = 'x'", "note"), claims_of(ANN), "\ud800"), Failed("22P05")),
        (question(asked("asserts() OR level > 0", "level"), claims_of(BOB), "3"), Failed("P0004")),
        (question(high, claims_of("no uuid"), "3"), True),
        (question(high, claims_of(ANN, "none"), "3"), Failed("0P000")),
        (question(high, claims_of(ANN), "4"), True),
    ]
    async with asking_at(login) as opened:
        assert await opened.answers(DOCS, [q for q, _ in expected]) == [answer for _, answer in expected]


async def test_an_absent_value_is_never_asked_about(login: str) -> None:
    absent = Question(asked("note IS NULL", "note"), Member(("", ""), claims_of(ANN)), (ABSENT,))
    async with asking_at(login) as opened:
        assert await opened.answers(DOCS, [absent]) == [Failed("22P05")]


async def test_rows_are_values_whatever_they_spell(login: str) -> None:
    same = asked("note = (auth.jwt() ->> 'note') AND tags = ARRAY[docs.note]", "note", "tags")
    ann = claims_of(ANN)
    questions = []
    for text in ODD:
        array = '{"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"}'
        questions += [question(same, user, text, array) for user in (claims_of(ANN, note=text), ann)]
    async with asking_at(login) as opened:
        assert await opened.answers(DOCS, questions) == [True, None] * len(ODD)


async def test_more_questions_than_one_statement_holds(login: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "MAX_QUESTIONS", 7)
    high, low = (asked(f"level {sign} 10", "level", of_user=False) for sign in "><")
    member = Member(("", ""), claims_of(ANN))
    questions = [Question((high, low)[i % 2], (member, None)[i % 3 == 0], (str(i),)) for i in range(40)]
    async with asking_at(login) as opened:
        found = await opened.answers(DOCS, questions)
    assert found == [i > 10 if i % 2 == 0 else i < 10 for i in range(40)]


# -- every type --------------------------------------------------------------------------------------------------------

KINDS: dict[str, list[str]] = {
    "uuid": [ANN],
    "boolean": ["t", "f"],
    "smallint": ["-32768"],
    "bigint": ["9223372036854775807"],
    "numeric": ["NaN", "1.50", "-Infinity", "0.1e-20"],
    "numeric(10,2)": ["1.5"],
    "real": ["0.1", "NaN", "1e-40"],
    "double precision": ["0.1", "-Infinity", "5e-324"],
    "text": ODD[:-1],
    'text collate "C"': ["ß"],
    "character(3)": ["a"],
    "character varying(5)": ["ab"],
    '"char"': ["a"],
    "name": ["n"],
    "bytea": ["\\x00ff27", ""],
    "json": ['{"b": 1,  "a": [1.0], "b": null}', '"text"', "null"],
    "jsonb": ['{"b": 1,  "a": [1.0, 1e2]}', '"\\u00df \\" \'"', "null"],
    "date": ["infinity", "0044-03-15 BC", "2026-01-01"],
    "time with time zone": ["12:00:00.5+05:30"],
    "timestamp without time zone": ["-infinity", "0044-03-15 12:00 BC", "294276-01-01"],
    "timestamp with time zone": ["infinity", "2026-07-01 12:00:00.123456+02", "0001-01-01 00:00:00 BC"],
    "timestamp(2) with time zone": ["2026-07-01 12:00:00.12"],
    "interval": ["1 year -2 months 3 days -04:05:06.789", "infinity"],
    "interval day to second": ["1 day 00:00:01"],
    "inet": ["192.168.1.5", "::1/64"],
    "cidr": ["10.0.0.0/8"],
    "macaddr": ["08:00:2b:01:02:03"],
    "money": ["-1234.5"],
    "bit(3)": ["101"],
    "bit varying": [""],
    "point": ["(1,2.5)"],
    "box": ["(1,1),(0,0)"],
    "int4range": ["[1,5)", "empty"],
    "tstzrange": ['["2026-01-01 00:00:00+00",infinity)'],
    "datemultirange": ["{[2026-01-01,2026-01-03),[2026-02-01,)}"],
    "tsvector": ["'a b':1 'c''d':2A"],
    "tsquery": ["'a' & !'b'"],
    "oid": ["4294967295"],
    "regclass": ["members"],
    "pg_lsn": ["0/16B3748"],
    "xid8": ["7"],
    "kinds.mood": ["it's", "a,b"],
    "kinds.label": ["x"],
    "kinds.labels": ['{a,"b c",NULL}'],
    "kinds.pair": ['(1,"a ""b"", \\\\ c")', "(,)"],
    "integer[]": ["{1,NULL,3}", "{}", "[0:1][1:2]={{1,2},{3,NULL}}"],
    "text[]": ['{a,"NULL",NULL,"","b c","\\"","\\\\"}'],
    "timestamp with time zone[]": ['{"2026-01-01 00:00:00+00",infinity}'],
    "jsonb[]": ['{"{\\"a\\": 1}",NULL}'],
    "box[]": ["{(1,1),(0,0);(2,2),(1,1)}"],
    "kinds.mood[]": ['{it\'s,"a,b",NULL}'],
    "kinds.pair[]": ['{"(1,\\"a b\\")",NULL}'],
    "kinds.label[]": ["{x,NULL}"],
}
CITEXT = {"kinds.citext": ["AbC"], "kinds.citext[]": ["{AbC,NULL}"]}
MADE = """
create schema kinds; grant usage on schema kinds to anon, authenticated;
create type kinds.mood as enum ('it''s', 'a,b');
create domain kinds.label as varchar(20);
create domain kinds.labels as text[];
create type kinds.pair as (a int, b text);
"""


async def test_every_type_is_read_and_written_as_changes_bring_it(
    database: str, login: str, admin: "psycopg.Connection[Any]"
) -> None:
    admin.execute(MADE)
    kinds = KINDS if admin.info.server_version >= 170000 else {**KINDS, "interval": KINDS["interval"][:1]}
    try:
        admin.execute("create extension citext schema kinds")
    except psycopg.Error as error:
        if not isinstance(error, psycopg.errors.FeatureNotSupported | psycopg.errors.UndefinedFile):
            raise
    else:
        kinds = {**kinds, **CITEXT}
    names = {type_name: f"c{i}" for i, type_name in enumerate(kinds)}
    defined = ", ".join(f"{name} {type_name}" for type_name, name in names.items())
    admin.execute(f"create table docs (id int primary key, {defined})".encode())
    admin.execute("grant select on docs to anon, authenticated; create publication docs for table docs")
    admin.execute("select pg_create_logical_replication_slot('docs', 'pgoutput')")
    for i in range(max(map(len, kinds.values()))):
        values = {name: given[i] for type_name, name in names.items() if i < len(given := kinds[type_name])}
        columns, marks = (
            ", ".join(values),
            ", ".join(f"%s::text::{t.split(' collate')[0]}" for t, n in names.items() if n in values),
        )
        admin.execute(f"insert into docs (id, {columns}) values ({i}, {marks})".encode(), list(values.values()))
    options = " ".join(f"-c {name}={value}" for name, value in PINNED.items())
    with psycopg.connect(database, options=options) as reader:
        changes = reader.execute(
            "select data from pg_logical_slot_get_binary_changes('docs', null, null, 'proto_version', '1', "
            "'publication_names', 'docs')"
        ).fetchall()
        reader.execute("select pg_drop_replication_slot('docs')")
    images = [message.new for (data,) in changes if isinstance(message := decode(data), Insert)]
    declared = {name: Declared(*type_name.split(" collate ")) for type_name, name in names.items()}
    ann = Member(("", ""), claims_of(ANN))
    questions: list[Question] = []
    expected: dict[str, Value] = {}
    for image in images:
        for name, text in zip(names.values(), image[1:], strict=True):
            if text is not None and text is not ABSENT:
                expected[f"(SELECT docs.{name} FROM public.docs WHERE docs.id = {image[0]})"] = text
                stored = f"(SELECT d.{name} FROM public.docs d WHERE d.id = docs.id)"
                same = f"row({name}, pg_typeof({name}))::text = row({stored}, pg_typeof({stored}))::text"
                row = (text, image[0]) if name < "id" else (image[0], text)
                questions.append(Question(asked(same, "id", name), ann, row))
    assert len(expected) == sum(map(len, kinds.values()))
    async with asking_at(login) as opened:
        described = {"public.docs": {"id": Declared("integer"), **declared}}
        assert await opened.answers(described, questions) == [True] * len(questions)
        (found,) = await opened.facts([claims_of(ANN)], [one(sql) for sql in expected])
    assert found == expected
    if not CITEXT.keys() <= kinds.keys():
        unavailable("everything agrees, but for citext, which this Postgres does not have")
