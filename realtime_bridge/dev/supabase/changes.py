"""The stand-in's changes: real ones, from a temporary logical slot that is polled, as Supabase polls its own.

Layer: whole (dev). May import: change, pgoutput, wire, dev.supabase.rest.
Sources: the poller of supabase/realtime (Extensions.PostgresCdcRls); supabase/walrus (apply_rls).
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import asyncpg
import orjson

from realtime_bridge.change import ABSENT, Change, Column, Image, Relation
from realtime_bridge.dev.supabase.rest import Pool, quote
from realtime_bridge.pgoutput import Begin, Delete, Insert, RelationMessage, Update, decode, filled
from realtime_bridge.wire import phoenix
from realtime_bridge.wire.native import microtimestamp
from realtime_bridge.wire.phoenix import Payload

PUBLICATION: Final = "supabase_realtime"
LARGEST_CHANGE: Final = 1_048_576
TOO_LARGE: Final = "Error 413: Payload Too Large"
NO_KEY: Final = "Error 400: Bad Request, no primary key"

_SESSION: Final = {
    "TimeZone": "UTC",
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "search_path": "pg_catalog",  # functions of the same name elsewhere are not called
}
_GET: Final = """
select data from pg_logical_slot_get_binary_changes(
  $1, null, null, 'proto_version', '1', 'publication_names', $2)
"""
_DESCRIBE: Final = """
select a.attname as name, coalesce(b.typname, t.typname) as type, c.relrowsecurity as is_secured,
       coalesce(a.attnum = any (i.indkey), false) as is_key
from pg_class c
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
join pg_type t on t.oid = a.atttypid
left join pg_type b on b.oid = t.typbasetype
left join pg_index i on i.indrelid = c.oid and i.indisprimary
where c.oid = $1
order by a.attnum
"""


@asynccontextmanager
async def open_pool(dsn: str) -> AsyncIterator[Pool]:
    """Connections that write values as Supabase does."""
    async with asyncpg.create_pool(dsn, min_size=1, max_size=4, server_settings=_SESSION) as pool:
        yield pool


async def publish(pool: Pool, tables: Sequence[str]) -> None:
    """Make the publication for these tables, if there is none."""
    if not await pool.fetchval("select exists (select from pg_publication where pubname = $1)", PUBLICATION):
        names = ", ".join(".".join(map(quote, name.split(".", 1))) for name in tables)
        await pool.execute(f"create publication {PUBLICATION} for table {names}")


async def published(pool: Pool) -> list[tuple[str, str]]:
    """Schema and name of each table of the publication."""
    names = "select schemaname, tablename from pg_publication_tables where pubname = $1"
    return [(row[0], row[1]) for row in await pool.fetch(names, PUBLICATION)]


@asynccontextmanager
async def open_slot(dsn: str) -> AsyncIterator["Slot"]:
    """A temporary slot on a session of its own, with which it ends."""
    connection = await asyncpg.connect(dsn, server_settings=_SESSION)
    try:
        name = f"supabase_realtime_{connection.get_server_pid()}"
        await connection.execute("select pg_create_logical_replication_slot($1, 'pgoutput', true)", name)
        yield Slot(connection, name)
    finally:
        await connection.close()


class Told(NamedTuple):
    """A change as it is told.

    Attributes:
        data: the `data` of a `postgres_changes` payload.
    """

    relation: Relation
    operation: str
    data: bytes


class Slot:
    """What was committed since the last poll. Reading it is forgetting it."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]", name: str) -> None:
        self._connection = connection
        self._name = name

    async def take(self) -> list[Told]:
        """The changes since the last time, in commit order."""
        tables: dict[int, _Table] = {}
        commit_time = 0
        told = []
        for (data,) in await self._connection.fetch(_GET, self._name, PUBLICATION):
            match decode(data):
                case Begin() as begin:
                    commit_time = begin.commit_time
                case RelationMessage() as described:
                    tables[described.id] = await self._describe(described)
                case Insert() | Update() | Delete() as message:
                    table = tables[message.relation_id]
                    change = _change(table, message, commit_time)
                    told.append(Told(table.relation, change.operation, _data(table, change)))
        return told

    async def _describe(self, message: RelationMessage) -> "_Table":
        described = {row["name"]: row for row in await self._connection.fetch(_DESCRIBE, message.id)}
        columns = tuple(Column(column.name, described[column.name]["type"]) for column in message.columns)
        key = tuple(i for i, column in enumerate(columns) if described[column.name]["is_key"])
        relation = Relation(message.schema, message.table, columns, key, full=message.identity == "f")
        identity = frozenset(column.name for column in message.columns if column.identity)
        return _Table(relation, identity, any(row["is_secured"] for row in described.values()))


@dataclass(frozen=True)
class _Table:
    """A relation, which of its columns old rows bring, and whether row-level security is on."""

    relation: Relation
    identity: frozenset[str]
    is_secured: bool

    def old_image(self, old: Image, *, is_whole: bool) -> Image:
        """An old row sent as a key has NULL in place of all else."""
        columns = zip(self.relation.columns, old, strict=True)
        return tuple(value if is_whole or column.name in self.identity else ABSENT for column, value in columns)


def _change(table: _Table, message: Insert | Update | Delete, commit_time: int) -> Change:
    match message:
        case Insert(_, new):
            return Change("INSERT", table.relation, None, new, commit_time)
        case Update(_, None, _, new):
            return Change("UPDATE", table.relation, None, new, commit_time)
        case Update(_, old, whole, new):
            assert old is not None, "else the case above"
            image = table.old_image(old, is_whole=whole)
            return Change("UPDATE", table.relation, image, filled(new, old) if whole else new, commit_time)
        case Delete(_, old, whole):
            return Change("DELETE", table.relation, table.old_image(old, is_whole=whole), None, commit_time)


def _data(table: _Table, change: Change) -> bytes:
    relation = change.relation
    if not relation.key and change.operation != "DELETE":
        return _refused(change)
    key = [relation.columns[i].name for i in relation.key]
    hidden = change.operation == "DELETE" and table.is_secured
    data = phoenix.change_data(change, microtimestamp(change.commit_time), old=key if hidden else None)
    return data if len(data) <= LARGEST_CHANGE else _cut(data)


def _cut(data: bytes) -> bytes:
    """What Supabase leaves of a change that is too large: values of at most 64 bytes, and no NULL."""
    fields = orjson.loads(data)
    for name in ("record", "old_record"):
        if name in fields:
            row = fields[name].items()
            fields[name] = {k: v for k, v in row if v is not None and len(orjson.dumps(v)) <= 64}
    return orjson.dumps({**fields, "errors": [TOO_LARGE]})


def _refused(change: Change) -> bytes:
    """What Supabase sends in place of a row of a table without primary key."""
    rows: dict[str, Payload] = {"record": {}} if change.operation == "INSERT" else {"record": {}, "old_record": {}}
    relation = change.relation
    return orjson.dumps(
        {
            "schema": relation.schema,
            "table": relation.table,
            "type": change.operation,
            "commit_timestamp": None,
            "errors": [NO_KEY],
            "columns": [],
            **rows,
        }
    )
