"""What tests share besides fixtures: waiting, tokens, a PgBouncer, and what to do where an engine is missing."""

import asyncio
import inspect
import itertools
import os
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, overload
from urllib.parse import urlsplit

import jwt
import psycopg
import pytest

from realtime_bridge.dev.engines import EmbeddedPostgres
from realtime_bridge.dev.processes import EmbeddedServer
from realtime_bridge.errors import ConfigurationError

T = TypeVar("T")
S = TypeVar("S", bound=EmbeddedServer)

SECRET = "a-secret-for-tests-only-of-more-than-32-bytes"
OTHER_POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
"""Besides the one that comes with the suite."""
_numbers = itertools.count(1)


def unavailable(reason: str) -> NoReturn:
    """Skip the test for want of an engine; with CI set, where nothing may be missing, fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@contextmanager
def running(server: S) -> Iterator[S]:
    """Enter a server; where there is none to start, skip or fail."""
    with ExitStack() as stack:
        try:
            stack.enter_context(server)
        except ConfigurationError as error:
            unavailable(str(error))
        yield server


def drop_database(admin: psycopg.Connection, name: str) -> None:
    """Drop a database, whoever is still connected to it and whatever slots it has (which go with it)."""
    admin.execute(f"alter database {name} allow_connections false".encode())
    deadline = time.monotonic() + 10
    while True:
        admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name])
        try:
            admin.execute(f"drop database {name} with (force)".encode())
        except psycopg.errors.ObjectInUse:  # a walsender has not let go of its slot yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def fresh_databases(postgres: EmbeddedPostgres, template: str) -> Iterator[Callable[[], str]]:
    """Makes databases with the sample schema and returns their addresses; all are dropped at the end."""
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        made: list[str] = []

        def make() -> str:
            name = f"test_{os.getpid()}_{next(_numbers)}"
            admin.execute(f"create database {name} template {template}".encode())
            made.append(name)
            return postgres.dsn(name)

        yield make
        for name in made:
            drop_database(admin, name)


@overload
async def eventually(condition: Callable[[], Awaitable[T]], timeout: float = 10) -> T: ...
@overload
async def eventually(condition: Callable[[], T], timeout: float = 10) -> T: ...
async def eventually(condition: Callable[[], T | Awaitable[T]], timeout: float = 10) -> T:
    """Call a condition, synchronous or not, until what it returns is truthy, and return that.

    Raises:
        AssertionError: it was not so within `timeout` seconds; the message holds what it returned last.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        value: T = await result if inspect.isawaitable(result) else result
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s; last value: {value!r}")
        await asyncio.sleep(0.01)


def token(sub: str | None, role: str = "authenticated", ttl: float = 3600, secret: str = SECRET, **claims: Any) -> str:
    """A token as Supabase Auth signs them with HS256; `claims` are added or replace what is there."""
    now = int(time.time())
    payload = {"sub": sub, "role": role, "aud": "authenticated", "iat": now, "exp": int(now + ttl), **claims}
    return jwt.encode({name: value for name, value in payload.items() if value is not None}, secret, algorithm="HS256")


class PgBouncer(EmbeddedServer):
    """A transaction pooler without prepared statements in front of a database, as Supabase's port 6543 is one."""

    name: ClassVar[str] = "PgBouncer"
    unprivileged: ClassVar[bool] = True

    def __init__(self, dsn: str, *, pool_size: int = 5) -> None:
        self._upstream = urlsplit(dsn)
        self._pool_size = pool_size

    @property
    def dsn(self) -> str:
        """The address of the same database through the pooler."""
        return self._upstream._replace(netloc=f"{self._upstream.username}@127.0.0.1:{self.port}").geturl()

    def _prepare(self) -> None:
        program = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
        if program is None:
            raise ConfigurationError("pgbouncer is not installed: apt-get install pgbouncer")
        self._program = program
        (self.directory / "users").write_text('"postgres" ""\n"authenticator" ""\n')
        (self.directory / "config").write_text(
            f"""
            [databases]
            * = host={self._upstream.hostname} port={self._upstream.port}
            [pgbouncer]
            listen_addr = 127.0.0.1
            listen_port = {self.port}
            unix_socket_dir =
            auth_type = trust
            auth_file = users
            pool_mode = transaction
            default_pool_size = {self._pool_size}
            ignore_startup_parameters = extra_float_digits
            """.replace("    ", "")
        )
        self._folder.hand_over(self.directory)

    def _command(self) -> Sequence[str | Path]:
        return [self._program, "config"]

    def _is_ready(self) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0
