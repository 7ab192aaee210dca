"""What a publication lacks to carry every change of the bridge's tables, and the SQL that mends it.

A table that is not published, or only where a row filter lets it, is silent for ever, so this is proven before reading
and again while reading. Only `ensure_publication` changes anything: it is for those who may change the user's database.

Layer: adapters. May import: words, sources.postgres_catalog.
Sources: PostgreSQL documentation, CREATE PUBLICATION, pg_publication_tables.
"""

from collections.abc import Sequence
from typing import Any, Final

import asyncpg

from realtime_bridge.errors import ConfigurationError
from realtime_bridge.sources.postgres_catalog import Primary, connected, translated
from realtime_bridge.sources.replication import reason_of


async def publication_repairs(primary: Primary, publication: str, tables: Sequence[str]) -> list[str]:
    """The statements that make the publication carry every change of the tables; none if it does already.

    Raises:
        ConfigurationError: a table does not exist, or cannot be published.
        asyncpg.PostgresError: use it under `translated`.
    """
    split = [table.partition(".") for table in tables]
    schemas, names = [part[0] for part in split], [part[2] for part in split]
    found = await primary.connection.fetchrow(_PUBLICATION, publication)
    states = await primary.connection.fetch(_TABLES, publication, schemas, names)
    for state in states:
        _refuse_unpublishable(state)
    quoted = '"' + publication.replace('"', '""') + '"'
    missing = ", ".join(state["sql_name"] for state in states if not state["published"])
    filtered = ", ".join(state["sql_name"] for state in states if not state["published"] and state["is_filtered"])
    with_generated = any(state["has_stored"] and not state["published"] for state in states)
    if found is None:
        options = "publish_via_partition_root = true" + with_generated * f", {_WITH_GENERATED}"
        return [f"CREATE PUBLICATION {quoted} FOR TABLE {missing} WITH ({options})"]
    repairs = []
    if with_generated and not found["with_generated"]:
        repairs.append(f"ALTER PUBLICATION {quoted} SET ({_WITH_GENERATED})")
    if not found["complete"]:
        repairs.append(f"ALTER PUBLICATION {quoted} SET (publish = 'insert, update, delete, truncate')")
    if not found["via_root"] and any(state["kind"] == "p" for state in states):
        repairs.append(f"ALTER PUBLICATION {quoted} SET (publish_via_partition_root = true)")
    if filtered:  # a table cannot be a member twice
        repairs.append(f"ALTER PUBLICATION {quoted} DROP TABLE {filtered}")
    if missing:
        repairs.append(f"ALTER PUBLICATION {quoted} ADD TABLE {missing}")
    return repairs


async def ensure_publication(dsn: str, publication: str, tables: Sequence[str]) -> list[str]:
    """Make the publication, or add what it lacks; returns the statements that were run.

    Raises:
        ConfigurationError: a table does not exist or cannot be published, or the role may not.
        SourceError: Postgres cannot be asked.
    """
    async with connected(dsn) as primary:
        with translated():
            repairs = await publication_repairs(primary, publication, tables)
            for repair in repairs:
                await _run(primary, repair)
            left = await publication_repairs(primary, publication, tables)
    if left:
        raise ConfigurationError(
            f"BRIDGE_PUBLICATION: {publication} still does not carry all of BRIDGE_TABLES; is one of them a partition "
            f"of a published table? Name the partitioned table instead. Missing: {'; '.join(left)}"
        )
    return repairs


async def _run(primary: Primary, statement: str) -> None:
    try:
        await primary.connection.execute(statement)
    except asyncpg.PostgresError as error:
        raise ConfigurationError(f"BRIDGE_PUBLICATION: `{statement}` failed: {reason_of(error)}") from error


def _refuse_unpublishable(state: Any) -> None:
    name = state["name"]
    if state["kind"] is None:
        raise ConfigurationError(f"BRIDGE_TABLES: there is no table {name}")
    if state["kind"] not in ("r", "p"):
        raise ConfigurationError(f"BRIDGE_TABLES: {name} is not a table, so Postgres publishes no changes of it")
    if not state["published"] and state["has_virtual"] and state["is_full"]:
        raise ConfigurationError(
            f"BRIDGE_TABLES: {name} has virtual generated columns and REPLICA IDENTITY FULL, and once published its "
            f"rows could not be updated; run `ALTER TABLE {state['sql_name']} REPLICA IDENTITY DEFAULT`"
        )
    if not state["published"] and not state["identified"]:
        raise ConfigurationError(
            f"BRIDGE_TABLES: {name} has no primary key, and once published its rows could not be updated; "
            f"run `ALTER TABLE {state['sql_name']} REPLICA IDENTITY FULL`"
        )


_WITH_GENERATED: Final = "publish_generated_columns = stored"
"""From 18 on, Postgres refuses to update or delete rows whose replica identity holds columns that are not published."""

_PUBLICATION: Final = """
    SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate AS complete, pubviaroot AS via_root,
           to_jsonb(p) ->> 'pubgencols' = 's' AS with_generated
    FROM pg_publication p WHERE pubname = $1
"""

# A partitioned table that is published through its partitions is a member, but not in pg_publication_tables.
_TABLES: Final = """
    SELECT wanted.schema || '.' || wanted.name AS name, format('%I.%I', wanted.schema, wanted.name) AS sql_name,
           c.relkind::text AS kind,
           EXISTS (
               SELECT FROM pg_publication_tables p
               WHERE p.pubname = $1 AND p.schemaname = wanted.schema AND p.tablename = wanted.name
                 AND p.rowfilter IS NULL
           ) OR EXISTS (
               SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
               WHERE p.pubname = $1 AND r.prrelid = c.oid AND c.relkind = 'p' AND r.prqual IS NULL
           ) AS published,
           EXISTS (
               SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
               WHERE p.pubname = $1 AND r.prrelid = c.oid AND r.prqual IS NOT NULL
           ) AS is_filtered,
           'stored' = ANY (generated.kinds) AS has_stored, 'virtual' = ANY (generated.kinds) AS has_virtual,
           c.relreplident = 'f' OR EXISTS (
               SELECT FROM pg_partition_tree(c.oid) t JOIN pg_class l ON l.oid = t.relid WHERE l.relreplident = 'f'
           ) AS is_full,
           c.relreplident IN ('f', 'i') OR (c.relreplident = 'd' AND EXISTS (
               SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary
           )) AS identified
    FROM unnest($2::text[], $3::text[]) AS wanted(schema, name)
    LEFT JOIN (pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace)
        ON n.nspname = wanted.schema AND c.relname = wanted.name
    CROSS JOIN LATERAL (
        SELECT ARRAY(
            SELECT CASE a.attgenerated WHEN 's' THEN 'stored' ELSE 'virtual' END FROM pg_attribute a
            WHERE a.attrelid = c.oid AND a.attgenerated <> '' AND NOT a.attisdropped
              AND current_setting('server_version_num')::int >= 180000
        ) AS kinds
    ) AS generated
"""
