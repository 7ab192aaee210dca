import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psycopg
import pytest

from realtime_bridge.claims import Claims
from realtime_bridge.database import Connection, Database
from realtime_bridge.errors import BadRequestError, ConfigurationError, DatabaseError, ForbiddenError
from tests.services import PgBouncer, running

pytestmark = pytest.mark.integration

ANN = "aaaaaaaa-0000-4000-8000-000000000001"
BOB = "bbbbbbbb-0000-4000-8000-000000000002"

_WHO = "select auth.uid()::text, auth.role(), auth.email(), auth.jwt() ->> 'sub', current_user::text"
_SETTINGS = (
    "role",
    "search_path",
    "statement_timeout",
    "request.jwt.claims",
    "request.jwt.claim",
    "request.jwt.claim.sub",
    "request.jwt.claim.role",
    "request.jwt.claim.email",
)
_OWN = {
    **dict.fromkeys(_SETTINGS, ""),
    "role": "none",
    "search_path": "pg_catalog, pg_temp",
    "statement_timeout": "8s",
}


def as_login(dsn: str) -> str:
    """The address for the user that owns nothing and may become anon, authenticated and service_role."""
    parts = urlsplit(dsn)
    return parts._replace(netloc=f"authenticator@{parts.hostname}:{parts.port}").geturl()


@pytest.fixture(params=["direct", "pooled"])
def dsn(request: pytest.FixtureRequest, database: str) -> Iterator[str]:
    """Both ways to one database: directly, and through a PgBouncer that pools transactions."""
    if request.param == "direct":
        yield as_login(database)
    else:
        with running(PgBouncer(database, pool_size=2)) as bouncer:
            yield as_login(bouncer.dsn)


@pytest.fixture
def pooled(database: str) -> Iterator[str]:
    with running(PgBouncer(database, pool_size=1)) as bouncer:
        yield as_login(bouncer.dsn)


def claims(sub: str | None, role: str = "authenticated", **others: object) -> Claims:
    values = {"role": role, **({} if sub is None else {"sub": sub}), **others}
    return Claims(values, role, sub, time.time() + 60)


async def who(connection: Connection) -> tuple[Any, ...]:
    row = await connection.fetchrow(_WHO)
    assert row is not None
    return tuple(row)


async def bare_settings(connection: Connection) -> dict[str, str | None]:
    """What the auth functions and the planner would go by."""
    return {name: await connection.fetchval("select current_setting($1, true)", name) for name in _SETTINGS}


# -- which way ---------------------------------------------------------------------------------------------------------


async def test_a_direct_connection_is_not_taken_for_a_pooler(database: str) -> None:
    async with Database(as_login(database)) as opened:
        assert not opened.pooled


async def test_a_transaction_pooler_is_found_out_without_a_hint(pooled: str) -> None:
    async with Database(pooled) as opened:
        assert opened.pooled
        for _ in range(3):  # a named prepared statement would now meet itself, or be missing
            async with opened.transaction() as connection:
                assert await connection.fetchval("select $1::int + 1", 1) == 2


async def test_a_pooler_that_takes_turns_among_its_connections_is_found_out_too(database: str) -> None:
    class TakesTurns(PgBouncer):
        def _prepare(self) -> None:
            super()._prepare()
            with (self.directory / "config").open("a") as config:
                config.write("\nserver_round_robin = 1\n")

    with running(TakesTurns(database, pool_size=2)) as bouncer:
        dsn = as_login(bouncer.dsn)
        with psycopg.connect(dsn) as one, psycopg.connect(dsn) as two:  # so that there are two to take turns
            pids = {connection.execute("select pg_backend_pid()").fetchone() for connection in (one, two)}
        assert len(pids) == 2
        async with Database(dsn) as opened:
            assert opened.pooled


async def test_an_address_may_say_that_it_is_a_poolers(database: str) -> None:
    async with Database(f"{as_login(database)}?pgbouncer=true&connection_limit=1") as opened:
        assert opened.pooled
        await opened.check()


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        ("postgresql://u:p@h:6543/d", True),
        ("postgresql://u:p@h:5432,h:6543/d", True),
        ("postgresql://u:6543@h/d", False),
        ("postgresql://u@h/d?pgbouncer=false", False),
        ("postgres:///d", False),
    ],
)
def test_port_6543_is_a_hint(dsn: str, expected: bool) -> None:
    assert Database(dsn).pooled is expected


async def test_many_transactions_share_the_one_connection_of_a_pooler(pooled: str) -> None:
    async def ask(opened: Database, number: int) -> None:
        sub = f"00000000-0000-4000-8000-{number:012}"
        async with opened.transaction_as(claims(sub)) as connection:
            assert (await who(connection))[0] == sub

    async with Database(pooled) as opened, asyncio.TaskGroup() as tasks:
        for number in range(50):
            tasks.create_task(ask(opened, number))


# -- as the caller -----------------------------------------------------------------------------------------------------


async def test_a_transaction_runs_as_the_caller_with_its_claims(dsn: str) -> None:
    async with Database(dsn) as opened:
        async with opened.transaction_as(claims(ANN, email="ann@example.com")) as connection:
            assert await who(connection) == (ANN, "authenticated", "ann@example.com", ANN, "authenticated")
        async with opened.transaction_as(claims(None, "anon")) as connection:
            assert await who(connection) == (None, "anon", None, None, "anon")


async def test_the_bridges_own_transaction_has_neither_role_nor_claims(dsn: str) -> None:
    async with Database(dsn, max_size=1) as opened:
        async with opened.transaction_as(claims(ANN)) as connection:
            await who(connection)
        async with opened.transaction() as connection:
            assert await bare_settings(connection) == _OWN


@pytest.mark.parametrize("fails", [False, True])
async def test_nothing_of_the_caller_remains_on_the_connection(dsn: str, fails: bool) -> None:
    async with Database(dsn, max_size=1) as opened:
        assert opened._pool is not None
        try:
            async with opened.transaction_as(claims(ANN, email="ann@example.com")) as connection:
                await who(connection)
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        async with opened._pool.acquire() as bare, bare.transaction():
            left = await bare_settings(bare)
            assert await bare.fetchval("select current_user") == "authenticator"
    assert ANN not in str(left)
    assert "ann@" not in str(left)
    assert left["role"] == "none"
    assert left["search_path"] == '"$user", public'
    assert left["statement_timeout"] == "0"


async def test_what_a_function_set_for_the_session_does_not_reach_the_next_caller(database: str) -> None:
    async with Database(as_login(database), max_size=1) as opened:
        async with opened.transaction_as(claims(ANN)) as connection:
            await connection.execute("select set_config('app.tenant', 'of ann', false)")
        async with opened.transaction_as(claims(BOB)) as connection:
            assert not await connection.fetchval("select current_setting('app.tenant', true)")


async def test_what_others_left_on_a_poolers_connection_is_overruled(pooled: str) -> None:
    other = await asyncpg.connect(pooled, statement_cache_size=0)
    await other.execute("set role service_role; set search_path = auth; set row_security = off")
    for name in ("sub", "role", "email"):
        await other.execute(f"set request.jwt.claim.{name} = '{BOB}'")
    await other.execute(f"""set request.jwt.claim = '{{"sub":"{BOB}"}}'""")
    async with Database(pooled) as opened:
        async with opened.transaction_as(claims(ANN, email="ann@example.com")) as connection:
            assert await who(connection) == (ANN, "authenticated", "ann@example.com", ANN, "authenticated")
            assert await connection.fetchval("show row_security") == "on"
            assert await connection.fetchval("select count(*) from posts") == 0
        async with opened.transaction_as(claims(None, "anon")) as connection:
            assert await who(connection) == (None, "anon", None, None, "anon")
        async with opened.transaction() as connection:
            assert await bare_settings(connection) == _OWN
    await other.close()


_TEXTS = """select ('2026-07-01 12:00+00'::timestamptz)::text, ('1 day 2 hours'::interval)::text,
                   ('\\x00ff'::bytea)::text, (0.1::float8 + 0.2::float8)::text"""


async def test_values_are_written_as_changes_bring_them_whatever_others_set(pooled: str) -> None:
    other = await asyncpg.connect(pooled, statement_cache_size=0)
    await other.execute(
        "set timezone = 'Asia/Tokyo'; set datestyle = 'SQL, DMY'; set intervalstyle = 'iso_8601';"
        "set bytea_output = 'escape'; set extra_float_digits = -9"
    )
    expected = ("2026-07-01 12:00:00+00", "1 day 02:00:00", "\\x00ff", "0.30000000000000004")
    async with Database(pooled) as opened:
        async with opened.transaction() as connection:
            assert tuple(await connection.fetchrow(_TEXTS) or ()) == expected
        async with opened.transaction_as(claims(ANN)) as connection:
            assert tuple(await connection.fetchrow(_TEXTS) or ()) == expected
    await other.close()


async def test_auth_functions_of_another_year_see_the_same_claims(database: str, dsn: str) -> None:
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(
            """create function public.old_uid() returns uuid language sql stable as
               $$ select nullif(current_setting('request.jwt.claim.sub', true), '')::uuid $$;
               create function public.middle_uid() returns uuid language sql stable as
               $$ select coalesce(current_setting('request.jwt.claim.sub', true),
                                  current_setting('request.jwt.claims', true)::jsonb ->> 'sub')::uuid $$"""
        )
    async with Database(dsn) as opened, opened.transaction_as(claims(ANN)) as connection:
        row = await connection.fetchrow("select old_uid()::text, middle_uid()::text")
        assert row is not None
        assert tuple(row) == (ANN, ANN)


_SPELLINGS = ["'; drop table public.posts; --", "$1", "a'b\"c\\", "\\u0027", "😀 é \u202e", "%s {} $$", "none", ""]


async def test_claims_are_values_whatever_they_spell(dsn: str) -> None:
    async with Database(dsn) as opened:
        for text in _SPELLINGS:
            async with opened.transaction_as(claims(ANN, email=text, name=text)) as connection:
                assert await connection.fetchval("select auth.jwt() ->> 'name'") == text
                assert await who(connection) == (ANN, "authenticated", text, ANN, "authenticated")


_NO_ROLES = [
    "postgres",
    "none",
    "NONE",
    "default",
    "",
    "no_such_role",
    "anon; set role postgres",
    'anon", "x',
    "pg_monitor",
]


async def test_a_role_that_the_login_role_may_not_take_is_forbidden(dsn: str) -> None:
    async with Database(dsn) as opened:
        for role in _NO_ROLES:
            with pytest.raises(ForbiddenError):
                async with opened.transaction_as(claims(ANN, role)):
                    pytest.fail("the block must not begin")
        await opened.check()


async def test_a_role_cannot_be_shed_by_naming_none_as_a_superuser_either(database: str) -> None:
    async with Database(database) as opened:
        with pytest.raises(ForbiddenError):
            async with opened.transaction_as(claims(ANN, "none")):
                pytest.fail("the block must not begin")


async def test_interleaved_transactions_of_two_users_never_mix_claims(dsn: str) -> None:
    async def ask(opened: Database, sub: str) -> None:
        async with opened.transaction_as(claims(sub, email=f"{sub}@x")) as connection:
            for _ in range(3):
                assert await who(connection) == (sub, "authenticated", f"{sub}@x", sub, "authenticated")
                await asyncio.sleep(0)

    async with Database(dsn, max_size=2) as opened, asyncio.TaskGroup() as tasks:
        for number in range(50):
            tasks.create_task(ask(opened, (ANN, BOB)[number % 2]))


async def test_a_readonly_transaction_cannot_write(dsn: str) -> None:
    async with Database(dsn) as opened:
        with pytest.raises(DatabaseError, match="25006"):
            async with opened.transaction_as(claims(ANN), readonly=True) as connection:
                await connection.execute("insert into posts (title) values ('x')")


async def test_a_block_that_fails_writes_nothing(dsn: str) -> None:
    async with Database(dsn) as opened:
        with pytest.raises(BadRequestError):
            async with opened.transaction_as(claims(ANN)) as connection:
                await connection.execute("insert into posts (title) values ('x'); select 1 / 0")
        async with opened.transaction_as(claims(ANN)) as connection:
            assert await connection.fetchval("select count(*) from posts") == 0


async def test_a_cancelled_transaction_frees_its_connection(dsn: str) -> None:
    async with Database(dsn, max_size=1) as opened:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), opened.transaction_as(claims(ANN)) as connection:
                await connection.execute("select pg_sleep(30)")
        async with opened.transaction_as(claims(BOB)) as connection:
            assert (await who(connection))[0] == BOB


# -- errors ------------------------------------------------------------------------------------------------------------


_REFUSED: list[tuple[str, type[Exception]]] = [
    ("select * from auth.no_such_table", DatabaseError),
    ("insert into public.posts (user_id, title) values (gen_random_uuid(), 'x')", ForbiddenError),
    ("select pg_read_file('PG_VERSION')", ForbiddenError),
    ("insert into public.posts (title) values (null)", BadRequestError),
    ("select 'x'::uuid", BadRequestError),
    ("do $$ begin raise exception 'secret of a row'; end $$", BadRequestError),
]


async def test_a_refusal_of_postgres_is_an_error_that_quotes_nothing(dsn: str) -> None:
    async with Database(dsn) as opened:
        for statement, error in _REFUSED:
            with pytest.raises(error) as caught:
                async with opened.transaction_as(claims(ANN)) as connection:
                    await connection.execute(statement)
            assert "secret" not in str(caught.value)
        await opened.check()


async def test_an_argument_that_postgres_has_no_place_for_is_a_bad_request(dsn: str) -> None:
    async with Database(dsn) as opened:
        for value in (2**63, "text"):
            with pytest.raises(BadRequestError):
                async with opened.transaction_as(claims(ANN)) as connection:
                    await connection.fetch("select $1::int8", value)


async def test_a_statement_that_takes_too_long_is_ended_by_the_server(dsn: str) -> None:
    async with Database(dsn, statement_timeout=0.1) as opened:
        with pytest.raises(DatabaseError, match="too long"):
            async with opened.transaction_as(claims(ANN)) as connection:
                await connection.execute("select pg_sleep(30)")
        await opened.check()


async def test_waiting_for_a_free_connection_ends(database: str) -> None:
    async with Database(database, max_size=1, statement_timeout=0.1) as opened, opened.transaction():
        with pytest.raises(DatabaseError, match="too long"):
            await opened.check()


async def test_connections_that_the_server_ended_are_replaced(database: str, dsn: str) -> None:
    async with Database(dsn, max_size=2) as opened:
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity where usename = 'authenticator'"
            )
        with contextlib.suppress(DatabaseError):  # whoever meets the ended connection is told
            await opened.check()
        await opened.check()


@pytest.mark.parametrize(
    "dsn",
    [
        "mysql://u:hidden@h/d",
        "h:5432",
        "",
        "postgresql://u:hidden@[h/d",
        "postgresql://u:hidden@h:port/d",
        "postgresql://u:hidden@h/d?sslmode=never",
    ],
)
async def test_an_address_that_is_none_is_a_mistake_of_configuration(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match="DATABASE_URL") as caught:
        async with Database(dsn):
            pytest.fail("it must not open")
    assert "hidden" not in str(caught.value)


async def test_a_database_that_does_not_exist_is_a_mistake_of_configuration(database: str) -> None:
    with pytest.raises(ConfigurationError, match="no such database"):
        async with Database(f"{database}_not"):
            pytest.fail("it must not open")


async def test_a_user_who_does_not_exist_is_a_mistake_of_configuration(database: str) -> None:
    with pytest.raises(ConfigurationError, match="the user or the password") as caught:
        async with Database(database.replace("postgres@", "stranger:hidden@")):
            pytest.fail("it must not open")
    assert "hidden" not in str(caught.value)


async def test_a_pooler_that_refuses_is_quoted_without_the_password(pooled: str) -> None:
    with pytest.raises(DatabaseError, match="refuses the connection") as caught:
        async with Database(pooled.replace("authenticator@", "stranger:hidden@")):
            pytest.fail("it must not open")
    assert "hidden" not in str(caught.value)


async def test_an_unreachable_host_is_named_without_the_password() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        for hint in ("", "?pgbouncer=true"):
            with pytest.raises(DatabaseError, match="IPv6") as caught:
                async with Database(f"postgresql://somebody:hidden@{address}/d{hint}"):
                    pytest.fail("it must not open")
            assert address in str(caught.value)
            assert "hidden" not in str(caught.value)
            assert "somebody" not in str(caught.value)


# -- the rest ----------------------------------------------------------------------------------------------------------


async def test_the_clock_of_a_postgres_on_the_same_machine_is_ours(dsn: str) -> None:
    async with Database(dsn) as opened:
        assert abs(await opened.clock_offset()) < 5


async def test_leaving_twice_is_fine_and_ends_what_does_not_end(database: str) -> None:
    opened = Database(database, statement_timeout=0.1)
    await opened.__aenter__()
    entered, stay = asyncio.Event(), asyncio.Event()

    async def linger() -> None:
        async with opened.transaction():
            entered.set()
            await stay.wait()

    async with asyncio.TaskGroup() as tasks:
        lingering = tasks.create_task(linger())
        await entered.wait()
        await opened.__aexit__(None, None, None)
        await opened.__aexit__(None, None, None)
        lingering.cancel()
    assert lingering.cancelled()
