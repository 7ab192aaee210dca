"""What the `postgres` source asks and tells the primary over an ordinary connection.

Layer: adapters. May import: words, sources.replication, sources.transactions.
Sources: PostgreSQL documentation, "System Catalogs", "System Information Functions"; GetXLogInsertRecPtr and
XLogBytePosToRecPtr in src/backend/access/transam/xlog.c.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import asyncpg
from asyncpg.prepared_stmt import PreparedStatement

from realtime_bridge.change import Column, Relation
from realtime_bridge.errors import ConfigurationError, SourceError
from realtime_bridge.pgoutput import RelationMessage
from realtime_bridge.sources.replication import CONNECT_SECONDS, reason_of
from realtime_bridge.sources.transactions import Described, NamedTable, lsn_text

QUERY_SECONDS: Final = 10
_SLOT_SECONDS: Final = 30
_CLOSE_SECONDS: Final = 1
_APPLICATION: Final = "realtime_bridge source"
_PAGE_HEADER: Final = 24
_SEGMENT_HEADER: Final = 40

_FAILURES: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
"""What asyncpg raises: the third where a connection dies in the middle of a command; a TimeoutError is an OSError."""

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class Snapshot(NamedTuple):
    """Which transactions are visible: `pg_current_snapshot()`."""

    xmin: int
    xmax: int
    running: frozenset[int]

    def full(self, xid: int) -> int:
        """The 64 bits of the id of a transaction that is visible; of 32 bits that are older than those, a newer one."""
        newest = self.xmax - 1
        return newest - ((newest - xid) & 0xFFFFFFFF)

    def shows(self, xid: int) -> bool:
        """Whether a committed transaction is visible. `xid` has 32 bits; the nearest 64-bit one is meant."""
        distance = (xid - self.xmax) & 0xFFFFFFFF
        full = self.xmax + (distance if distance < 1 << 31 else distance - (1 << 32))
        return full < self.xmin or (full < self.xmax and full not in self.running)

    @classmethod
    def parse(cls, text: str) -> "Snapshot":
        """Read `xmin:xmax:xid,xid,…`."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, running.split(","))) if running else frozenset())


class Moment(NamedTuple):
    """The primary at one moment.

    Attributes:
        time: seconds since 1970, by the primary's clock, read before `written`.
        written: the LSN where the WAL written by then ends. A stream that has reached it has all that was committed.
        snapshot: what is visible. It is the statement's, and so older than the two: what it shows was written by then.
        rights: differs from an earlier one if what the snapshot shows of policies, grants and roles does.
        published: the transaction (64 bits) that has last put each table into the publication, or changed what of it is
            published. Tables that are not published, or only in part of their rows, are left out.
    """

    time: float
    written: int
    snapshot: Snapshot
    rights: str
    published: Mapping[NamedTable, int]


class SlotState(NamedTuple):
    """A slot as the source finds it. `other_database`: the one it belongs to, if not this; `holder`: who reads it."""

    plugin: str | None
    other_database: str | None
    temporary: bool
    lost: bool
    confirmed: int
    active_pid: int | None
    holder: str | None

    @property
    def is_foreign(self) -> bool:
        """Whether the bridge would never have made it so: somebody else needs it."""
        return self.plugin != "pgoutput" or self.other_database is not None or self.temporary


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """How a replication slot stands, for people and metrics.

    Attributes:
        wal_status: as in pg_replication_slots: reserved, extended, unreserved, lost; None if there is no slot.
        lag_bytes: WAL that Postgres keeps because of the slot.
    """

    exists: bool
    active: bool
    wal_status: str | None
    lag_bytes: int


@contextmanager
def translated() -> Iterator[None]:
    """Turns whatever goes wrong with an ordinary connection into a `SourceError`."""
    try:
        yield
    except _FAILURES as error:
        raise SourceError(f"Postgres could not be asked: {reason_of(error)}") from error


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator["Primary"]:
    """An ordinary connection to the primary, closed when the block is left. Use it under `translated`.

    Raises:
        SourceError: it cannot be reached, refuses, or is a standby.
        ConfigurationError: the address is not one, or the server has no logical replication.
    """
    connection = await _connect(dsn)
    try:
        primary = Primary(connection)
        with translated():
            await primary.prepare()
        yield primary
    finally:
        with suppress(*_FAILURES):
            await connection.close(timeout=_CLOSE_SECONDS)


async def _connect(dsn: str) -> Connection:
    try:
        return await asyncpg.connect(
            dsn,
            timeout=CONNECT_SECONDS,
            command_timeout=QUERY_SECONDS,
            statement_cache_size=0,
            server_settings={"application_name": _APPLICATION},  # a pooler refuses most others
        )
    except (ValueError, asyncpg.ClientConfigurationError) as error:
        raise ConfigurationError(f"DATABASE_URL: {reason_of(error)}") from None
    except OSError as error:
        raise SourceError(
            f"Postgres cannot be reached ({reason_of(error)}). Is DATABASE_URL right? Direct Supabase hosts "
            "(db.<project>.supabase.co) are often IPv6 only: then use a host with IPv6 or the IPv4 add-on."
        ) from error
    except _FAILURES as error:
        raise SourceError(f"Postgres refuses the connection: {reason_of(error)}") from error


class Primary:
    """The questions and commands. Errors of asyncpg pass through: use it under `translated`."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._block = 8192
        self._segment = 16 << 20
        self._moment: PreparedStatement[asyncpg.Record] | None = None

    async def prepare(self) -> None:
        """Make sure that the server can be a source at all.

        Raises:
            SourceError: it is a standby.
            ConfigurationError: it has no logical replication.
        """
        # Behind a pooler the next statement may meet another connection, whose settings are not ours to change.
        await self.connection.execute(_NARROW_SEARCH_PATH, self.connection.get_server_pid())
        row = await self.connection.fetchrow(_SERVER)
        assert row is not None
        if row["standby"]:
            raise SourceError("this Postgres is a standby; DATABASE_URL has to lead to the primary")
        if row["wal_level"] != "logical":
            raise ConfigurationError(
                f"DATABASE_URL: the server's wal_level is {row['wal_level']}; run "
                "`ALTER SYSTEM SET wal_level = logical` and restart Postgres"
            )
        self._block, self._segment = row["block"], row["segment"]

    async def refusal_to_replicate(self) -> str | None:
        """What to do about a role that may not replicate; None if this one may."""
        role, may = await self.connection.fetchrow(_MAY_REPLICATE) or ("", True)
        if may:
            return None
        return f'DATABASE_URL: role {role} may not replicate; run `ALTER ROLE "{role}" REPLICATION` as a superuser'

    async def moment(self, publication: str, tables: Sequence[str], followed: Sequence[str]) -> Moment:
        """Take a snapshot, then read clock and WAL; and by it the rights on tables, and which `followed` are published.

        The order holds up what is concluded: a transaction that the snapshot shows as ended lies before `written`, and
        whatever was committed before `time` does, too.
        """
        if self._moment is None:  # not earlier: behind a pooler there is nothing to prepare on
            self._moment = await self.connection.prepare(_MOMENT)
        row = await self._moment.fetchrow(tables, publication, followed)
        assert row is not None
        snapshot = Snapshot.parse(row[2])
        published = {NamedTable(*r[:3]): max(map(snapshot.full, r[3:])) for r in row[4]}
        return Moment(row[0], end_of_record(row[1], self._block, self._segment), snapshot, row[3], published)

    async def flush(self, written: int) -> None:
        """Have WAL written to disk that nobody waits for: the walsender sends only what is on disk.

        An open transaction's first rows can stay in memory for 15 s; a committed message takes them along.
        """
        async with self.connection.transaction():
            await self.connection.execute("SET LOCAL synchronous_commit = local")  # no standby is waited for
            await self.connection.execute(_FLUSH.format(lsn=lsn_text(written)))

    async def is_walsender(self, pid: int) -> bool:
        """Whether this server has such a process, for a role that is this one's or that this one may read."""
        return bool(await self.connection.fetchval(_IS_WALSENDER, pid))

    async def is_synchronous_standby(self, pid: int) -> bool:
        """Whether commits may be waiting for this very walsender."""
        return bool(await self.connection.fetchval(_IS_SYNCHRONOUS, pid))

    async def describe(self, message: RelationMessage) -> Described:
        """Complete a table's description by what the catalog says now."""
        type_ids = [column.type_id for column in message.columns]
        types = {row[0]: row[1] for row in await self.connection.fetch(TYPES, type_ids)}
        columns = tuple(Column(c.name, types.get(c.type_id, "text")) for c in message.columns)
        catalog = await self.connection.fetchrow(_TABLE, message.id)
        identity = frozenset(column.name for column in message.columns if column.identity)
        # The default identity is the primary key, as it was when the row was written.
        names = identity if message.identity == "d" else frozenset(catalog["key"] if catalog else ())
        key = tuple(i for i, column in enumerate(columns) if column.name in names)
        if len(key) < len(names):
            key = ()  # a part of it is not published
        full = message.identity == "f" and (catalog is None or catalog["leaves_full"])
        relation = Relation(message.schema, message.table, columns, key, full)
        leaves_identify = catalog is None or catalog["leaves_identify"]
        return Described(message, relation, full or (bool(key) and names <= identity and leaves_identify))

    async def slot(self, name: str) -> SlotState | None:
        """The slot as it stands, or None."""
        row = await self.connection.fetchrow(_SLOT, name)
        return None if row is None else SlotState(**dict(row))

    async def slot_status(self, name: str) -> SlotStatus:
        """The slot as people and metrics see it."""
        row = await self.connection.fetchrow(_SLOT_STATUS, name)
        return SlotStatus(False, False, None, 0) if row is None else SlotStatus(True, *row)

    async def create_slot(self, name: str) -> None:
        """Make the permanent slot. Postgres waits for the transactions that are writing now.

        Raises:
            SourceError: it could not be made.
        """
        command = "SELECT pg_create_logical_replication_slot($1, 'pgoutput')"
        try:
            await self.connection.fetchval(command, name, timeout=_SLOT_SECONDS)
        except TimeoutError as error:
            raise SourceError(
                f"the replication slot {name} could not be made within {_SLOT_SECONDS} s: Postgres waits for running "
                "transactions to end; `TABLE pg_stat_activity` shows them in backend_xid"
            ) from error
        except asyncpg.PostgresError as error:
            refusal = await self.refusal_to_replicate()
            if refusal is not None:
                raise ConfigurationError(refusal) from error
            raise SourceError(f"the replication slot {name} could not be made: {reason_of(error)}") from error

    async def drop_slot(self, name: str) -> None:
        """Drop the slot."""
        await self.connection.execute("SELECT pg_drop_replication_slot($1)", name)

    async def terminate(self, pid: int) -> None:
        """End a reader's walsender, and wait a moment until it is gone.

        Raises:
            SourceError: this role may not do it.
        """
        try:
            await self.connection.execute("SELECT pg_terminate_backend($1, 1000)", pid)
        except asyncpg.InsufficientPrivilegeError as error:
            raise SourceError(
                f"the reader of the slot (pid {pid}) belongs to another role and cannot be ended; "
                f"run `SELECT pg_terminate_backend({pid})` as that role"
            ) from error


def end_of_record(insert_lsn: int, block: int, segment: int) -> int:
    """Where the last record ends, given where the next one will start.

    At the start of a page the two differ by the page's header, and no stream ever reports a place behind a header
    while nothing follows it.
    """
    if insert_lsn % segment == _SEGMENT_HEADER:
        return insert_lsn - _SEGMENT_HEADER
    if insert_lsn % block == _PAGE_HEADER:
        return insert_lsn - _PAGE_HEADER
    return insert_lsn


async def slot_status(dsn: str, slot: str) -> SlotStatus:
    """How the slot stands.

    Raises:
        SourceError: Postgres cannot be asked.
        ConfigurationError: the server has no logical replication.
    """
    async with connected(dsn) as primary:
        with translated():
            return await primary.slot_status(slot)


_SERVER: Final = """
    SELECT pg_is_in_recovery() AS standby, current_setting('wal_level') AS wal_level,
           current_setting('wal_block_size')::int8 AS block,
           pg_size_bytes(current_setting('wal_segment_size')) AS segment
"""

# Whoever can make functions or operators in a schema of the search path could otherwise have theirs called.
_NARROW_SEARCH_PATH: Final = """
    SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', false)
    WHERE pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) $1::pg_catalog.int4
"""

# A row of a catalog that was changed has another xmin or place. pg_authid can be read by superusers only.
_MOMENT: Final = """
    SELECT extract(epoch FROM clock.now)::float8,
           (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::int8,
           pg_current_snapshot()::text,
           (WITH named AS MATERIALIZED (
                SELECT c.oid, c.relnamespace, c.xmin AS x, c.ctid AS t
                FROM unnest($1::text[]) AS wanted(name)
                JOIN pg_namespace n ON n.nspname = split_part(wanted.name, '.', 1)
                JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = split_part(wanted.name, '.', 2)
            )
            SELECT sum(hashtextextended(version, 0))::text FROM (
                SELECT concat('class ', oid, x, t) FROM named
                UNION ALL SELECT concat('schema ', oid, xmin, ctid) FROM pg_namespace
                          WHERE oid IN (SELECT relnamespace FROM named)
                UNION ALL SELECT concat('policy ', oid, xmin, ctid) FROM pg_policy
                          WHERE polrelid IN (SELECT oid FROM named)
                UNION ALL SELECT concat('member ', roleid, member, xmin, ctid) FROM pg_auth_members
                UNION ALL SELECT concat('function ', p.oid, p.xmin, p.ctid)
                          FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace AND n.nspname = 'auth'
                          WHERE p.proname IN ('uid', 'role', 'email', 'jwt')
                UNION ALL SELECT concat('role ', oid, rolname, rolsuper, rolinherit, rolbypassrls) FROM pg_roles
            ) AS version(version)),
           ARRAY(
                SELECT (wanted.name, c.oid::int8, c.relfilenode::int8, member.x::text::int8, p.xmin::text::int8)
                FROM unnest($3::text[]) AS wanted(name)
                JOIN pg_namespace n ON n.nspname = split_part(wanted.name, '.', 1)
                JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = split_part(wanted.name, '.', 2)
                    AND c.relpersistence = 'p'
                JOIN pg_publication p ON p.pubname = $2 AND pubinsert AND pubupdate AND pubdelete AND pubtruncate
                CROSS JOIN LATERAL (
                    SELECT p.xmin WHERE p.puballtables
                    UNION ALL SELECT r.xmin FROM pg_publication_rel r
                              WHERE r.prpubid = p.oid AND r.prqual IS NULL
                                AND r.prrelid IN (SELECT c.oid UNION ALL SELECT pg_partition_ancestors(c.oid))
                    UNION ALL SELECT s.xmin FROM pg_publication_namespace s
                              WHERE s.pnpubid = p.oid AND s.pnnspid = n.oid
                ) AS member(x)
            )
    FROM (SELECT clock_timestamp() AS now OFFSET 0) clock
"""

_FLUSH: Final = """
    SELECT pg_logical_emit_message(true, 'realtime_bridge', '') WHERE pg_current_wal_flush_lsn() < '{lsn}'::pg_lsn
"""

_MAY_REPLICATE: Final = "SELECT rolname, rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user"

_IS_WALSENDER: Final = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND backend_type = 'walsender')"

_IS_SYNCHRONOUS: Final = """
    SELECT EXISTS (SELECT FROM pg_stat_replication WHERE pid = $1 AND sync_state IN ('sync', 'quorum'))
"""

# Domains, and arrays of domains, become what they are based on. What only shares its name with a built-in type, or
# only looks like an array by its name, is text: values are encoded by that name.
TYPES: Final = """
    WITH RECURSIVE step(asked, id) AS (
        SELECT id, id FROM unnest($1::oid[]) AS id
        UNION
        SELECT step.asked, CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE base.typarray END
        FROM step
        JOIN pg_type t ON t.oid = step.id
        LEFT JOIN pg_type element ON element.oid = t.typelem AND t.typcategory = 'A' AND element.typtype = 'd'
        LEFT JOIN pg_type base ON base.oid = element.typbasetype
        WHERE t.typtype = 'd' OR base.typarray <> 0
    )
    SELECT DISTINCT ON (step.asked) step.asked,
        CASE WHEN t.typnamespace <> 'pg_catalog'::regnamespace AND (
                EXISTS (SELECT FROM pg_type b
                        WHERE b.typname = t.typname AND b.typnamespace = 'pg_catalog'::regnamespace)
                OR (t.typname LIKE '\\_%' AND t.typcategory <> 'A'))
             THEN 'text' ELSE t.typname::text END
    FROM step
    JOIN pg_type t ON t.oid = step.id
    LEFT JOIN pg_type element ON element.oid = t.typelem AND t.typcategory = 'A' AND element.typtype = 'd'
    LEFT JOIN pg_type base ON base.oid = element.typbasetype
    WHERE t.typtype <> 'd' AND coalesce(base.typarray, 0) = 0
"""

# A partition keeps its own replica identity: unless all are FULL, an old row is not whole, and one with an index other
# than the primary key's sends no key.
_TABLE: Final = """
    SELECT ARRAY(
               SELECT a.attname::text FROM pg_index i
               JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
               WHERE i.indrelid = c.oid AND i.indisprimary
           ) AS key,
           leaves.are_full AS leaves_full, leaves.identify AS leaves_identify
    FROM pg_class c
    CROSS JOIN LATERAL (
        SELECT coalesce(bool_and(l.relreplident = 'f'), true) AS are_full,
               coalesce(bool_and(l.relreplident IN ('d', 'f') OR EXISTS (
                   SELECT FROM pg_index i WHERE i.indrelid = l.oid AND i.indisreplident AND i.indisprimary
               )), true) AS identify
        FROM pg_partition_tree(c.oid) leaf JOIN pg_class l ON l.oid = leaf.relid
        WHERE c.relkind = 'p' AND leaf.isleaf
    ) AS leaves
    WHERE c.oid = $1
"""

_SLOT: Final = """
    SELECT s.plugin::text, nullif(s.database, current_database())::text AS other_database,
           s.temporary, s.wal_status IS NOT DISTINCT FROM 'lost' AS lost,
           coalesce((s.confirmed_flush_lsn - '0/0'::pg_lsn)::int8, 0) AS confirmed,
           s.active_pid, a.application_name AS holder
    FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
    WHERE s.slot_name = $1
"""

_SLOT_STATUS: Final = """
    SELECT active, wal_status, coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::int8
    FROM pg_replication_slots WHERE slot_name = $1
"""
