"""Tables as they stand, read from Postgres itself: with the texts that its walsender would write.

A page is read by primary key in a transaction of its own, so nothing is held for long, and a pooler is as good as a
direct connection. Row-level security is switched off rather than obeyed: a role that may not see every row is refused,
where it would otherwise miss some in silence.

Layer: adapters. May import: words, sources.{base,postgres_catalog,replication}.
Sources: text_format in src/backend/utils/adt/varlena.c, which calls the output function (a cast to text need not: bool,
bpchar, inet); num_nulls in misc.c, since `IS NULL` holds for a composite value of NULLs.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final, NamedTuple, TypeAlias

from asyncpg.pool import PoolConnectionProxy

from realtime_bridge.change import Column, Image, Relation, Value
from realtime_bridge.errors import ForbiddenError, SourceError
from realtime_bridge.sources.base import TEXT_BYTES, Page
from realtime_bridge.sources.postgres_catalog import TYPES

Connection: TypeAlias = "PoolConnectionProxy[Any]"
Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]

PAGE_ROWS: Final = 500
_STORED_BYTES: Final = 4096
_MARGIN: Final = 1_000_000
"""By so much, in microseconds, the clock of Postgres may be set back in one step without harm."""


class DatabaseTables:
    """Reads tables over ordinary connections; see `TableReader`.

    Args:
        connect: a transaction in which a role is at work that sees all rows.
        publication: what carries the tables' changes; None where Supabase Realtime does.
    """

    def __init__(self, connect: Connect, publication: str | None) -> None:
        self._connect = connect
        self._publication = publication

    async def describe(self, table: str) -> Relation | None:
        """See `TableReader.describe`."""
        schema, _, name = table.partition(".")
        async with self._connect() as connection:
            found = await connection.fetch(_COLUMNS, schema, name, self._publication)
            types = {row[0]: row[1] for row in await connection.fetch(TYPES, [row["type"] for row in found])}
        if not found:
            return None
        columns = tuple(Column(row["name"], types.get(row["type"], "text")) for row in found)
        key = tuple(i for i, row in enumerate(found) if row["is_key"])
        if len(key) < found[0]["keys"]:
            key = ()  # a part of it is not published
        return Relation(schema, name, columns, key, full=self._publication is not None and found[0]["is_full"])

    async def pages(self, relation: Relation) -> AsyncGenerator[Page, None]:
        """See `TableReader.pages`."""
        keys: Image = ()
        while True:
            found = await self._read(relation, partial(_page, is_first=not keys), keys)
            if not found:
                return
            rows: list[Image] = [tuple(row["texts"]) for row in found]
            if any(relation.key_of(row) == keys for row in rows):
                raise SourceError(f"{relation.name} cannot be read in pages: a row of it lies behind its own key")
            yield Page(rows, found[-1]["read_at"] + _MARGIN)
            keys = relation.key_of(rows[-1])

    async def rows(self, relation: Relation, keys: Sequence[Sequence[str]]) -> list[Image]:
        """See `TableReader.rows`."""
        found = await self._read(relation, partial(_rows, count=len(keys)), [text for key in keys for text in key])
        return [tuple(row["texts"]) for row in found]

    async def _read(
        self, relation: Relation, query: Callable[[Relation, "_Table"], str], arguments: Sequence[Value]
    ) -> Sequence[Any]:
        try:
            async with self._connect() as connection:
                await connection.execute(_SEE_ALL_OR_FAIL)
                known = await connection.fetch(_KNOWN, relation.schema, relation.table)
                types = {row["name"]: row["type"] for row in known}
                if not types.keys() >= relation.index.keys():
                    raise SourceError(f"{relation.name} has not all the columns any more that its changes had")
                return await connection.fetch(query(relation, _Table(types, known[0]["only"])), *arguments)
        except ForbiddenError:
            raise SourceError(
                f"the role of DATABASE_URL may not read every row of {relation.name}: it needs SELECT, and "
                "BYPASSRLS unless it owns the table"
            ) from None


class _Table(NamedTuple):
    """What a query has to say of a table: the type of each column, and `ONLY`, or nothing for a partitioned one."""

    types: Mapping[str, str]
    only: str


def _page(relation: Relation, table: _Table, *, is_first: bool) -> str:
    """The query of a page; its arguments are the texts of the key behind which it begins."""
    columns = ((_WHOLE_TEXT if i in relation.key else _SHORT_TEXT, c.name) for i, c in enumerate(relation.columns))
    texts = ", ".join(text.format(quoted(name)) for text, name in columns)
    order = _key(relation)
    behind = "" if is_first else f"WHERE ({order}) > ({_arguments(relation, table)})"
    return f"""
        SELECT ARRAY[{texts}] AS texts, (extract(epoch FROM clock_timestamp()) * 1000000)::int8 AS read_at
        FROM {table.only} {quoted(relation.schema)}.{quoted(relation.table)} {behind}
        ORDER BY {order} LIMIT {PAGE_ROWS}
    """  # noqa: S608 - names are quoted, and types as Postgres writes them


def _rows(relation: Relation, table: _Table, *, count: int) -> str:
    """The query of some rows; its arguments are the texts of their keys."""
    texts = ", ".join(_WHOLE_TEXT.format(quoted(column.name)) for column in relation.columns)
    keys = ", ".join(f"({_arguments(relation, table, i * len(relation.key))})" for i in range(count))
    return f"""
        SELECT ARRAY[{texts}] AS texts FROM {table.only} {quoted(relation.schema)}.{quoted(relation.table)}
        WHERE ({_key(relation)}) IN ({keys})
    """  # noqa: S608 - as above


def _key(relation: Relation) -> str:
    return ", ".join(quoted(relation.columns[i].name) for i in relation.key)


def _arguments(relation: Relation, table: _Table, before: int = 0) -> str:
    """A key's values as arguments of a query, so many of which come `before` it."""
    types = (table.types[relation.columns[i].name] for i in relation.key)
    return ", ".join(f"${n}::text::{type_}" for n, type_ in enumerate(types, before + 1))


def quoted(name: str) -> str:
    """A name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


_SEE_ALL_OR_FAIL: Final = "SELECT set_config('row_security', 'off', true)"

_TEXT: Final = "format('%s', {0})"
_WHOLE_TEXT: Final = f"CASE WHEN num_nulls({{0}}) = 1 THEN NULL ELSE {_TEXT} END"

# A value that takes much room where it is stored is not fetched to find out that its text is long; and of a long text
# no more is sent than shows that it is.
_SHORT_TEXT: Final = f"""
    CASE WHEN num_nulls({{0}}) = 1 THEN NULL
         WHEN pg_column_size({{0}}) > {_STORED_BYTES} THEN repeat(' ', {TEXT_BYTES + 1})
         ELSE left({_TEXT}, {TEXT_BYTES + 1}) END
"""

# Before Postgres 18 no publication carries generated columns, and 15 names them nevertheless.
_COLUMNS: Final = """
    SELECT a.attname::text AS name, a.atttypid AS type, a.attnum = ANY (primary_key.columns) AS is_key,
           cardinality(primary_key.columns) AS keys,
           c.relreplident = 'f' AND NOT EXISTS (
               SELECT FROM pg_partition_tree(c.oid) leaf JOIN pg_class l ON l.oid = leaf.relid
               WHERE leaf.isleaf AND l.relreplident <> 'f'
           ) AS is_full
    FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    CROSS JOIN LATERAL (
        SELECT coalesce(max((i.indkey::int2[])[0:i.indnkeyatts - 1]), '{}') AS columns FROM pg_index i
        WHERE i.indrelid = c.oid AND i.indisprimary
    ) AS primary_key
    LEFT JOIN pg_publication_tables p
        ON p.pubname = $3 AND p.schemaname = n.nspname AND p.tablename = c.relname
    WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')
      AND ($3 IS NULL OR a.attname = ANY (p.attnames))
      AND (a.attgenerated = '' OR ($3 IS NOT NULL AND current_setting('server_version_num')::int >= 180000))
    ORDER BY a.attnum
"""

# With -1 a type without its length is meant: `character` and `bit`, as NULL would have it, are of length 1.
_KNOWN: Final = """
    SELECT a.attname::text AS name, format_type(a.atttypid, -1) AS type,
           CASE c.relkind WHEN 'p' THEN '' ELSE 'ONLY' END AS only
    FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE n.nspname = $1 AND c.relname = $2
"""
