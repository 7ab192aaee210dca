"""Postgres as the bridge asks it: a few connections, and nothing outside a transaction.

Every transaction begins by setting all that its verdicts depend on (role, claims, search path, limits), for itself
alone. So nothing of a caller outlives it, nothing that somebody else left on the connection reaches it, and it works
the same behind a pooler that hands out another connection with each transaction.

Layer: adapters. May import: errors, claims.
Sources: the auth functions of github:supabase/auth, migrations 20220224000811 and 20220531120530 (what they read);
https://www.pgbouncer.org/features.html (what transaction pooling takes away).
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, Self, TypeAlias
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from realtime_bridge.claims import Claims
from realtime_bridge.errors import BadRequestError, BridgeError, ConfigurationError, DatabaseError, ForbiddenError

logger = logging.getLogger(__name__)

Connection: TypeAlias = "PoolConnectionProxy[asyncpg.Record]"

_CONNECT_SECONDS: Final = 10.0
_POOLER_PORT: Final = ":6543"
_FOREIGN_PARAMETERS: Final = frozenset({"pgbouncer", "connection_limit", "pool_timeout", "supa"})
"""Parameters that Prisma and Vercel put into addresses; Postgres would be sent them as settings and refuse."""

PINNED: Final[Mapping[str, str]] = {
    "TimeZone": "UTC",
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
}
"""Settings on which the text of values depends: texts are compared, so all that read or bring any have the same."""

_BEGIN: Final = f"""
select pg_catalog.set_config('search_path', $1, true),
       pg_catalog.set_config('statement_timeout', $2, true),
       pg_catalog.set_config('row_security', 'on', true),
       {", ".join(f"pg_catalog.set_config('{name}', '{value}', true)" for name, value in PINNED.items())},
       pg_catalog.set_config('request.jwt.claims', $3, true),
       pg_catalog.set_config('request.jwt.claim', $3, true),
       pg_catalog.set_config('request.jwt.claim.sub', $4, true),
       pg_catalog.set_config('request.jwt.claim.role', $5, true),
       pg_catalog.set_config('request.jwt.claim.email', $6, true),
       pg_catalog.set_config('role', $7, true)
"""
_OWN_SEARCH_PATH: Final = "pg_catalog, pg_temp"
CALLER_SEARCH_PATH: Final = "public, extensions, pg_temp"
"""Where functions look for names without a schema, as they would where PostgREST calls them."""

LOGIN_ROLE: Final = "none"
"""Not the name of a role: Postgres' word for going back to that of the login."""

_PRIMARY_KEY: Final = """
select a.attname
from pg_index i
join pg_class c on c.oid = i.indrelid
join pg_namespace n on n.oid = c.relnamespace
cross join unnest(i.indkey::int2[]) with ordinality as k (attnum, place)
join pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum
where i.indisprimary and n.nspname = $1 and c.relname = $2
order by k.place
"""


class Database:
    """A pool of few connections to the primary.

    Enter it before its first use and leave it last; leaving waits for what is in progress, but not for long.
    An instance belongs to one event loop.

    Args:
        dsn: the address: direct, or of a session or transaction pooler.
        max_size: most connections to hold at a time.
        statement_timeout: seconds that one statement, or the wait for a free connection, may take.
    """

    def __init__(self, dsn: str, *, max_size: int = 5, statement_timeout: float = 8.0) -> None:
        self._dsn, self._hinted = _without_foreign_parameters(dsn)
        self._max_size = max_size
        self._statement_timeout = statement_timeout
        self._pooled = self._hinted
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    @property
    def pooled(self) -> bool:
        """Whether a pooler may hand out another connection with each transaction: known once entered."""
        return self._pooled

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            ConfigurationError: the address is none, or the password, user or database is wrong.
            DatabaseError: Postgres cannot be reached now, or is a standby.
        """
        try:
            self._pooled = self._hinted or await _is_pooled(self._dsn)
            self._pool = await self._open()
        except Exception as error:
            raise _unconnected(error, self._dsn) from error
        try:
            await self.check()
        except BaseException:
            await self.__aexit__()
            raise
        logger.info("database connected", extra={"pooled": self._pooled})
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(self._statement_timeout):
                await pool.close()
        except TimeoutError:
            pool.terminate()

    async def _open(self) -> "asyncpg.Pool[asyncpg.Record]":
        return await asyncpg.create_pool(
            self._dsn,
            min_size=1,
            max_size=self._max_size,
            timeout=_CONNECT_SECONDS,
            command_timeout=self._statement_timeout + 2,  # the server's own limit comes first, if it is alive
            **_connection_options(pooled=self._pooled),
        )

    @asynccontextmanager
    async def transaction(self, *, readonly: bool = False) -> AsyncIterator[Connection]:
        """A transaction as the login role, without claims; names outside `pg_catalog` need their schema.

        Raises (also for what the block raises):
            ForbiddenError: the login role may not do that.
            BadRequestError: Postgres refused a value.
            DatabaseError: Postgres cannot be reached, is too slow, or refuses for another reason.
        """
        settings = (_OWN_SEARCH_PATH, self._milliseconds, "", "", "", "", LOGIN_ROLE)
        async with self._begin(settings, readonly=readonly) as connection:
            yield connection

    @asynccontextmanager
    async def transaction_as(self, claims: Claims, *, readonly: bool = False) -> AsyncIterator[Connection]:
        """A transaction as the caller: row-level security decides what it sees and does.

        Raises (also for what the block raises):
            ForbiddenError: the role is none the login role may take, or may not do that.
            BadRequestError: Postgres refused a value, one of the claims perhaps.
            DatabaseError: Postgres cannot be reached, is too slow, or refuses for another reason.
        """
        if claims.role == LOGIN_ROLE:  # which to Postgres means: back to the login role
            raise ForbiddenError("the role may not be used")
        settings = (
            CALLER_SEARCH_PATH,
            self._milliseconds,
            *claim_settings(claims),
            claims.role,
        )
        async with self._begin(settings, readonly=readonly) as connection:
            yield connection

    @asynccontextmanager
    async def _begin(self, settings: tuple[str, ...], *, readonly: bool) -> AsyncIterator[Connection]:
        assert self._pool is not None, "the database is not entered"
        cancelled: asyncio.CancelledError | None = None
        try:
            async with (
                self._pool.acquire(timeout=self._statement_timeout) as connection,
                connection.transaction(isolation="read_committed", readonly=readonly),
            ):
                try:
                    await _take_role(connection, settings)
                    yield connection
                except asyncio.CancelledError as error:
                    cancelled = error
                    raise
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            if cancelled is not None:  # and then the rollback met a dead connection
                raise cancelled from error
            raise _translated(error) from error

    @property
    def _milliseconds(self) -> str:
        return str(max(1, int(self._statement_timeout * 1000)))

    async def check(self) -> None:
        """Prove that the primary answers.

        Raises:
            DatabaseError: it does not, or what answers is a standby, which may be behind what it is asked about.
        """
        async with self.transaction(readonly=True) as connection:
            if await connection.fetchval("select pg_is_in_recovery()"):
                raise DatabaseError("Postgres is a standby: the bridge needs the primary")

    async def primary_key(self, table: str) -> list[str]:
        """The columns of a table's primary key, in the key's order; empty if it has none or does not exist.

        Raises:
            DatabaseError: Postgres cannot be asked.
        """
        schema, _, name = table.partition(".")
        async with self.transaction(readonly=True) as connection:
            rows = await connection.fetch(_PRIMARY_KEY, schema, name)
        return [row["attname"] for row in rows]

    async def clock_offset(self) -> float:
        """Seconds by which Postgres' clock is ahead of ours: the answer of the quickest of three questions.

        Raises:
            DatabaseError: Postgres cannot be reached, or is too slow.
        """
        answers = []
        async with self.transaction(readonly=True) as connection:
            for _ in range(3):
                asked, started = time.time(), time.perf_counter()
                theirs = await connection.fetchval("select extract(epoch from clock_timestamp())::float8")
                took = time.perf_counter() - started
                answers.append((took, theirs - asked - took / 2))
        return float(min(answers)[1])


async def _take_role(connection: Connection, settings: tuple[str, ...]) -> None:
    try:
        await connection.execute(_BEGIN, *settings)
    except (asyncpg.InvalidParameterValueError, asyncpg.InsufficientPrivilegeError) as error:
        raise ForbiddenError("the role may not be used: Postgres does not let the login role take it") from error


def claim_settings(claims: Claims) -> tuple[str, str, str, str]:
    """What the settings of a caller are set to: all claims as one JSON, then `sub`, `role` and `email`.

    The auth functions of one year or another read them in one way or the other. A claim by itself wins over the JSON,
    and so must never be left to whoever set it last; where it is empty, the JSON is looked into.

    Raises:
        TypeError: the claims hold what JSON cannot.
    """
    names = ("sub", "role", "email")
    values = (claims.values.get(name) for name in names)
    sub, role, email = (value if isinstance(value, str) else "" for value in values)
    return claims.encoded, sub, role, email


# -- poolers -----------------------------------------------------------------------------------------------------------


def _without_foreign_parameters(dsn: str) -> tuple[str, bool]:
    """The address as asyncpg takes it, and whether it says itself that it is a transaction pooler's.

    Raises:
        ConfigurationError: it is no address of a Postgres.
    """
    try:
        parts = urlsplit(dsn)
        parameters = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        raise ConfigurationError("DATABASE_URL is not an address.") from None
    if parts.scheme not in ("postgres", "postgresql"):
        raise ConfigurationError("DATABASE_URL does not begin with postgresql://.")
    hosts = parts.netloc.rpartition("@")[2].split(",")
    hinted = ("pgbouncer", "true") in parameters or any(host.endswith(_POOLER_PORT) for host in hosts)
    kept = [(name, value) for name, value in parameters if name not in _FOREIGN_PARAMETERS]
    return (parts._replace(query=urlencode(kept)).geturl() if kept != parameters else dsn), hinted


def _connection_options(*, pooled: bool) -> dict[str, Any]:
    """What asyncpg must leave out where the next transaction may meet another connection."""
    return {"statement_cache_size": 0, "reset": _leave_alone} if pooled else {}


async def _leave_alone(connection: object) -> None:
    """Reset nothing: it would meet a connection that is somebody else's."""


async def _is_pooled(dsn: str) -> bool:
    """Whether anything but Postgres itself answers there.

    Postgres tells every connection the process id by which to cancel its queries, and it is that of the backend;
    a pooler tells one of its own making. It cannot be proven from outside that a pooler gives the same backend for
    longer than a transaction, so all are taken for transaction poolers. Two connections are asked, since a made-up id
    may happen to be right.
    """
    for _ in range(2):
        connection = await asyncpg.connect(
            dsn, timeout=_CONNECT_SECONDS, command_timeout=_CONNECT_SECONDS, statement_cache_size=0
        )
        try:
            async with connection.transaction():
                backend = await connection.fetchval("select pg_catalog.pg_backend_pid()")
            if backend != connection.get_server_pid():
                return True
        finally:
            await connection.close(timeout=_CONNECT_SECONDS)
    return False


# -- errors ------------------------------------------------------------------------------------------------------------


def _translated(error: Exception) -> BridgeError:
    """What an error of asyncpg or the network means to a caller. Holds no value of a row and no address."""
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return ForbiddenError("Postgres does not permit it to this role")
    if isinstance(error, asyncpg.QueryCanceledError | TimeoutError):
        return DatabaseError("Postgres took too long")
    if not isinstance(error, asyncpg.PostgresError) or isinstance(error, asyncpg.PostgresConnectionError):
        return DatabaseError("Postgres cannot be reached")
    state = error.sqlstate or "unknown"
    if state[:2] in ("22", "23", "P0"):  # data (asyncpg's own refusals too), constraints, raised by a function
        return BadRequestError(f"Postgres refused the values (SQLSTATE {state})")
    return DatabaseError(f"Postgres refused (SQLSTATE {state})")


def _unconnected(error: Exception, dsn: str) -> BridgeError:
    """What an error at the start means to the operator. Names the host, never the password."""
    host = urlsplit(dsn).netloc.rpartition("@")[2] or "the local socket"
    match error:
        case asyncpg.InvalidAuthorizationSpecificationError():
            return ConfigurationError(f"DATABASE_URL: {host} refuses the user or the password.")
        case asyncpg.InvalidCatalogNameError():
            return ConfigurationError(f"DATABASE_URL: there is no such database at {host}.")
        case asyncpg.ClientConfigurationError() | ValueError():
            return ConfigurationError("DATABASE_URL is not an address that can be used.")
        case asyncpg.PostgresError():
            return DatabaseError(f"Postgres at {host} refuses the connection: {error}")
        case _:
            reason = type(error).__name__
            return DatabaseError(
                f"Postgres at {host} cannot be reached ({reason}). Direct hosts of Supabase are often IPv6 only: "
                "where there is no IPv6, use the address of the session or transaction pooler."
            )
