"""What the checks of Postgres look at, read in five queries: the server, its slot and publication, tables and roles.

Nothing is changed, and nothing but the catalogs is read.

Layer: whole. May import: nothing of this package.
Sources: PostgreSQL documentation, "System Catalogs" and "System Views". Works on Postgres 15 to 18, and tells the
version of older ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

OLDEST_VERSION: Final = 15
SUPABASE_PUBLICATION: Final = "supabase_realtime"
"""What Supabase's own Realtime reads."""


@dataclass(frozen=True, slots=True)
class Server:
    """The server itself.

    Attributes:
        version: `server_version_num`, as 150004.
        slots, senders: replication slots and walsenders: how many there may be, and how many there are.
        slot_keep_megabytes: `max_slot_wal_keep_size`; -1 means without limit.
        role: the login role.
        auth_functions: of `auth.uid()` and so on, those that exist, without parentheses.
    """

    version: int
    version_text: str
    wal_level: str
    slots: int
    slots_used: int
    senders: int
    senders_used: int
    slot_keep_megabytes: int
    role: str
    auth_functions: tuple[str, ...]

    @property
    def supported(self) -> bool:
        return self.version >= OLDEST_VERSION * 10_000


@dataclass(frozen=True, slots=True)
class Slot:
    """The replication slot of the configured name.

    Attributes:
        plugin: `pgoutput` in ours; None in a physical slot.
        here: whether it belongs to the connected database.
        holder: whoever reads it now, in words; None if nobody does.
        application: the holder's application name, where it is told.
        lag_bytes: WAL that Postgres keeps because of it.
    """

    plugin: str | None
    here: bool
    temporary: bool
    holder: str | None
    application: str
    wal_status: str | None
    lag_bytes: int

    @property
    def ours(self) -> bool:
        """Whether it can be the bridge's own."""
        return self.plugin == "pgoutput" and self.here and not self.temporary


@dataclass(frozen=True, slots=True)
class Publication:
    """The publication of the configured name.

    Attributes:
        unpublished: the operations that it leaves out.
        generated: whether it carries generated columns that are stored.
    """

    unpublished: tuple[str, ...]
    via_root: bool
    generated: bool


@dataclass(frozen=True, slots=True)
class Column:
    """A column.

    Attributes:
        type: the name of the base type: `_int4` is an array.
        kind: its `typtype`.
        generated: `attgenerated`: empty, or `s` if it is stored, or `v` if it is virtual.
    """

    name: str
    type: str
    kind: str
    generated: str


@dataclass(frozen=True, slots=True)
class Role:
    """A role of BRIDGE_ROLES.

    Attributes:
        exempt: why row-level security does not bind it anywhere; empty if it does.
        takeable: whether the login role may take it.
    """

    name: str
    exists: bool
    exempt: str
    takeable: bool


@dataclass(frozen=True, slots=True)
class Access:
    """What a role may do with a table.

    Attributes:
        owner: it counts as the table's owner, whom its policies do not bind.
        policies: permissive ones that count for it when it reads.
    """

    schema_usage: bool
    select: bool
    owner: bool
    policies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of BRIDGE_TABLES.

    Attributes:
        sql_name: quoted for SQL.
        kind: `relkind`; None if there is no such table.
        persistence: `relpersistence`.
        identity: `relreplident`.
        partial_leaves: partitions of it whose own replica identity is not FULL, quoted for SQL.
        published_columns: None if it is not published.
        narrow: publications that carry its UPDATEs or DELETEs, but not every column; from Postgres 18 on, not every
            generated one either. Under REPLICA IDENTITY FULL Postgres refuses these operations because of them.
        policies: name → expression, of all policies that count for reading.
        rule: from BRIDGE_POLICIES, in their place.
        access: role → what it may do.
    """

    name: str
    sql_name: str
    sql_schema: str
    kind: str | None
    persistence: str
    key: tuple[str, ...]
    identity: str
    partial_leaves: tuple[str, ...]
    row_security: bool
    columns: tuple[Column, ...]
    published: bool
    published_columns: tuple[str, ...] | None
    narrow: tuple[str, ...]
    row_filter: str | None
    policies: Mapping[str, str]
    rule: str | None
    access: Mapping[str, Access]

    @property
    def exists(self) -> bool:
        return self.kind in ("r", "p")


@dataclass(frozen=True)
class Facts:
    """All of it.

    Attributes:
        publication_name, slot_name, namespace, fact_seconds, repair_column: as configured; `supabase_realtime` for the
            publication that Supabase's own Realtime reads.
        owned: whether publication and slot are the bridge's to look after.
    """

    server: Server
    slot: Slot | None
    publication: Publication | None
    roles: Sequence[Role]
    tables: Sequence[Table]
    publication_name: str
    slot_name: str
    namespace: str
    fact_seconds: float
    repair_column: str
    owned: bool

    @cached_property
    def sql_publication(self) -> str:
        """The publication's name quoted for SQL."""
        return quote(self.publication_name)


def quote(name: str) -> str:
    """A name as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


async def read_server(connection: Connection) -> Server:
    """The server; works on any version."""
    return Server(**_fields(await connection.fetchrow(_SERVER)))


async def read_slot(connection: Connection, name: str) -> Slot | None:
    """The slot of that name, if there is one."""
    row = await connection.fetchrow(_SLOT, name)
    return None if row is None else Slot(**_fields(row))


async def read_publication(connection: Connection, name: str) -> Publication | None:
    """The publication of that name, if there is one."""
    row = await connection.fetchrow(_PUBLICATION, name)
    return None if row is None else Publication(**_fields(row))


async def read_roles(connection: Connection, names: Sequence[str]) -> list[Role]:
    """The roles, in that order, those that do not exist too."""
    return [Role(**_fields(row)) for row in await connection.fetch(_ROLES, list(names))]


async def read_tables(
    connection: Connection, names: Sequence[str], *, roles: Sequence[str], publication: str, rules: Mapping[str, str]
) -> list[Table]:
    """The tables, in that order, those that do not exist too."""
    if not names:
        return []
    schemas, tables = zip(*(name.split(".", 1) for name in names), strict=True)
    rows = await connection.fetch(_TABLES, list(schemas), list(tables), publication)
    access: dict[str, dict[str, Access]] = {}
    for row in await connection.fetch(_ACCESS, list(schemas), list(tables), list(roles)):
        fields = _fields(row)
        table, role = fields.pop("table"), fields.pop("role")
        access.setdefault(table, {})[role] = Access(**fields)
    return [_table(_fields(row), rules, access) for row in rows]


def _table(fields: dict[str, Any], rules: Mapping[str, str], access: Mapping[str, Mapping[str, Access]]) -> Table:
    columns = zip(*(fields.pop(f"column_{part}") for part in ("names", "types", "kinds", "generated")), strict=True)
    policies = zip(fields.pop("policy_names"), fields.pop("policy_texts"), strict=True)
    return Table(
        **fields,
        columns=tuple(Column(*column) for column in columns),
        policies=dict(policies),
        rule=rules.get(fields["name"]),
        access=access.get(fields["name"], {}),
    )


def _fields(row: asyncpg.Record | None) -> dict[str, Any]:
    assert row is not None, "the query gives a row"
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


_SERVER: Final = """
    SELECT current_setting('server_version_num')::int AS version,
           split_part(current_setting('server_version'), ' ', 1) AS version_text,
           current_setting('wal_level') AS wal_level,
           current_setting('max_replication_slots')::int AS slots,
           (SELECT count(*) FROM pg_replication_slots)::int AS slots_used,
           current_setting('max_wal_senders')::int AS senders,
           (SELECT count(*) FROM pg_stat_replication)::int AS senders_used,
           coalesce((SELECT setting::int8 FROM pg_settings WHERE name = 'max_slot_wal_keep_size'), -1)
               AS slot_keep_megabytes,
           current_user::text AS role,
           ARRAY(SELECT p.proname::text FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                 WHERE n.nspname = 'auth' AND p.pronargs = 0) AS auth_functions
"""

# Before a walsender has sent its application name there is its process id.
_SLOT: Final = """
    SELECT s.plugin::text, coalesce(s.database = current_database(), false) AS here, s.temporary,
           CASE WHEN s.active_pid IS NOT NULL THEN format(
               '%s (role %s, from %s, pid %s)', coalesce(nullif(a.application_name, ''), 'a program without a name'),
               coalesce(a.usename, '?'), coalesce(host(a.client_addr), 'the server itself'), s.active_pid
           ) END AS holder,
           coalesce(a.application_name, '') AS application,
           s.wal_status,
           coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn), 0)::int8 AS lag_bytes
    FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
    WHERE s.slot_name = $1
"""

_PUBLICATION: Final = """
    SELECT array_remove(ARRAY[
               CASE WHEN NOT pubinsert THEN 'insert' END, CASE WHEN NOT pubupdate THEN 'update' END,
               CASE WHEN NOT pubdelete THEN 'delete' END, CASE WHEN NOT pubtruncate THEN 'truncate' END
           ], NULL) AS unpublished,
           pubviaroot AS via_root, coalesce(to_jsonb(p) ->> 'pubgencols' = 's', false) AS generated
    FROM pg_publication p WHERE pubname = $1
"""

# From 16 on, being a member is not enough to take a role.
_ROLES: Final = """
    SELECT wanted.name, r.oid IS NOT NULL AS exists,
           CASE WHEN r.rolsuper THEN 'it is a superuser' WHEN r.rolbypassrls THEN 'it has BYPASSRLS' ELSE '' END
               AS exempt,
           coalesce(pg_has_role(
               current_user, r.oid,
               CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END
           ), false) AS takeable
    FROM unnest($1::text[]) WITH ORDINALITY AS wanted(name, place) LEFT JOIN pg_roles r ON r.rolname = wanted.name
    ORDER BY wanted.place
"""

# A generated column is in no change before Postgres 18, where the publication's list of columns tells.
_TABLES: Final = """
    SELECT wanted.schema || '.' || wanted.name AS name, format('%I.%I', wanted.schema, wanted.name) AS sql_name,
           format('%I', wanted.schema) AS sql_schema,
           c.relkind::text AS kind, coalesce(c.relpersistence::text, '') AS persistence,
           ARRAY(
               SELECT a.attname::text FROM pg_index i
               JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
               WHERE i.indrelid = c.oid AND i.indisprimary
           ) AS key,
           coalesce(c.relreplident::text, '') AS identity,
           ARRAY(
               SELECT format('%I.%I', n.nspname, l.relname) FROM pg_partition_tree(c.oid) leaf
               JOIN pg_class l ON l.oid = leaf.relid JOIN pg_namespace n ON n.oid = l.relnamespace
               WHERE c.relkind = 'p' AND leaf.isleaf AND l.relreplident <> 'f' ORDER BY 1
           ) AS partial_leaves,
           coalesce(c.relrowsecurity, false) AS row_security,
           columns.names AS column_names, columns.types AS column_types, columns.kinds AS column_kinds,
           columns.generated AS column_generated,
           published.columns IS NOT NULL OR EXISTS (
               SELECT FROM pg_publication p LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
               WHERE p.pubname = $3 AND (r.oid IS NOT NULL OR p.puballtables)
           ) AS published,
           published.columns AS published_columns, published.row_filter,
           ARRAY(
               SELECT p.pubname::text FROM pg_publication p JOIN pg_publication_tables t ON t.pubname = p.pubname
               LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
               WHERE t.schemaname = wanted.schema AND t.tablename = wanted.name AND (p.pubupdate OR p.pubdelete)
                 AND (r.prattrs IS NOT NULL
                      OR (current_setting('server_version_num')::int >= 180000 AND EXISTS (
                          SELECT FROM pg_attribute a
                          WHERE a.attrelid = c.oid AND a.attgenerated <> '' AND NOT a.attisdropped
                            AND a.attname <> ALL (t.attnames))))
               ORDER BY 1
           ) AS narrow,
           policies.names AS policy_names, policies.texts AS policy_texts
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS wanted(schema, name, place)
    LEFT JOIN (pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace)
        ON s.nspname = wanted.schema AND c.relname = wanted.name
    LEFT JOIN LATERAL (
        SELECT t.attnames::text[] AS columns, t.rowfilter AS row_filter FROM pg_publication_tables t
        WHERE t.pubname = $3 AND t.schemaname = wanted.schema AND t.tablename = wanted.name
    ) published ON true
    CROSS JOIN LATERAL (
        SELECT coalesce(array_agg(a.attname::text ORDER BY a.attnum), '{}') AS names,
               coalesce(array_agg(t.typname::text ORDER BY a.attnum), '{}') AS types,
               coalesce(array_agg(t.typtype::text ORDER BY a.attnum), '{}') AS kinds,
               coalesce(array_agg(a.attgenerated::text ORDER BY a.attnum), '{}') AS generated
        FROM pg_attribute a JOIN pg_type d ON d.oid = a.atttypid
        JOIN pg_type t ON t.oid = CASE WHEN d.typtype = 'd' THEN d.typbasetype ELSE d.oid END
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    ) columns
    CROSS JOIN LATERAL (
        SELECT coalesce(array_agg(p.polname::text ORDER BY p.polname), '{}') AS names,
               coalesce(array_agg(pg_get_expr(p.polqual, p.polrelid) ORDER BY p.polname), '{}') AS texts
        FROM pg_policy p WHERE p.polrelid = c.oid AND p.polcmd IN ('r', '*') AND p.polqual IS NOT NULL
    ) policies
    ORDER BY wanted.place
"""

# Role 0 is PUBLIC, of which pg_has_role knows nothing.
_ACCESS: Final = """
    SELECT wanted.schema || '.' || wanted.name AS table, r.rolname::text AS role,
           has_schema_privilege(r.oid, s.oid, 'USAGE') AS schema_usage,
           has_table_privilege(r.oid, c.oid, 'SELECT') AS select,
           pg_has_role(r.oid, c.relowner, 'USAGE') AND NOT c.relforcerowsecurity AS owner,
           ARRAY(
               SELECT p.polname::text FROM pg_policy p
               WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd IN ('r', '*') AND p.polqual IS NOT NULL
                 AND EXISTS (SELECT FROM unnest(p.polroles) AS applies(role)
                             WHERE applies.role = 0 OR pg_has_role(r.oid, nullif(applies.role, 0), 'USAGE'))
               ORDER BY 1
           ) AS policies
    FROM unnest($1::text[], $2::text[]) AS wanted(schema, name)
    JOIN pg_namespace s ON s.nspname = wanted.schema
    JOIN pg_class c ON c.relnamespace = s.oid AND c.relname = wanted.name
    JOIN pg_roles r ON r.rolname = ANY ($3::text[])
"""
