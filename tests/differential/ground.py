"""A database with the schema in it, random rows, and the changes as the real source brings them."""

import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import sql

from realtime_bridge.change import Change
from realtime_bridge.sources.postgres import PostgresSource, ensure_publication
from realtime_bridge.sources.postgres_stream import PostgresStream
from tests.differential.world import PARENTS, Row, Table, World

PUBLICATION: Final = "differential"
SCHEMA: Final = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
ROWS: Final = 20
RANDOM_TABLES: Final = 8

_OPTIONAL: Final = re.compile(r"-- needs (\w+)\n(.*?)\n(?=\n)", re.DOTALL)
_LAST: Final = "-- == what every table has"
_TABLES: Final = """
select c.oid::regclass::text, json_object_agg(a.attname, t.typname order by a.attnum),
       coalesce(array_agg(a.attname) filter (where a.attnotnull), '{}')
from pg_class c
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
join pg_type t on t.oid = a.atttypid
where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition
  and c.relname <> 'posts'
group by c.oid order by 1
"""


@dataclass
class Ground:
    """Where the comparison takes place.

    Attributes:
        missing: what this server lacks of the optional parts of the schema.
        rows: table → key → the row as it was written last.
    """

    dsn: str
    connection: "psycopg.AsyncConnection[Any]"
    tables: list[Table]
    missing: list[str]
    stream: PostgresStream
    world: World
    rows: dict[str, dict[int, Row]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [f"public.{table.name}" for table in self.tables]

    async def insert(self) -> list[Change]:
        """Fill every table."""
        async with self.connection.transaction():
            for table in self.tables:
                self.rows[table.name] = {key: self.world.row(table, key) for key in range(ROWS)}
                await self._write(_insertion(table), self.rows[table.name].values())
        return await self._read()

    async def change(self) -> list[Change]:
        """Edit some rows of every table, move some to another key, and delete some; no policy refers to any of them."""
        async with self.connection.transaction():
            for table in self.tables:
                rows = self.rows[table.name]
                for key in self.world.some(range(PARENTS, ROWS), 0.6):
                    row = rows.pop(key)
                    match key % 4:
                        case 0:
                            await self._write(_DELETION.format(sql.Identifier(table.name)), [{"id": str(key)}])
                        case 1:  # a key that moves
                            await self._edit(table, key, self.world.edited(table, row) | {"id": str(key + ROWS)})
                        case _:
                            await self._edit(table, key, self.world.edited(table, row))
        return await self._read()

    async def _edit(self, table: Table, key: int, row: Row) -> None:
        self.rows[table.name][int(row["id"] or 0)] = row
        assignments = sql.SQL(", ").join(
            sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in row
        )
        statement = sql.SQL("update {} set {} where id = {}").format(sql.Identifier(table.name), assignments, key)
        await self._write(statement, [row])

    async def _write(self, statement: sql.Composed, rows: Iterable[Row]) -> None:
        async with self.connection.cursor() as cursor:
            await cursor.executemany(statement, list(rows))

    async def _read(self) -> list[Change]:
        """All changes up to now."""
        now, changes = time.time(), list[Change]()
        async for batch in self.stream:
            changes += [body for body in batch.bodies if isinstance(body, Change)]
            if batch.acknowledge is not None:
                self.stream.acknowledge(batch.acknowledge)
            if (batch.proven_until or 0) > now:
                break
        return changes


_DELETION: Final = sql.SQL("delete from {} where id = %(id)s")


def _insertion(table: Table) -> sql.Composed:
    names = sql.SQL(", ").join(map(sql.Identifier, table.columns))
    values = sql.SQL(", ").join(map(sql.Placeholder, table.columns))
    return sql.SQL("insert into {} ({}) values ({})").format(sql.Identifier(table.name), names, values)


@asynccontextmanager
async def ground(dsn: str, slot: str, seed: int) -> AsyncIterator[Ground]:
    """Lay the ground in an empty database: schema, what policies refer to, publication, and an open source.

    Args:
        dsn: the database, as its superuser.
        slot: a name that no other test has.
        seed: of the world.
    """
    world = World(seed)
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn, autocommit=True))
        missing = await _install(connection, world)
        for name, rows in world.background().items():
            for row in rows:
                await connection.execute(f"insert into {name} values ({', '.join(['%s'] * len(row))})".encode(), row)
        tables = [
            Table(name, columns, frozenset(required))
            for name, columns, required in await (await connection.execute(_TABLES)).fetchall()
        ]
        names = [f"public.{table.name}" for table in tables]
        await ensure_publication(dsn, PUBLICATION, names)
        source = PostgresSource(dsn, slot=slot, publication=PUBLICATION, tables=names)
        stream = await stack.enter_async_context(source.open(None, owner=f"{slot}/1"))
        yield Ground(dsn, connection, tables, missing, stream, world)


async def _install(connection: "psycopg.AsyncConnection[Any]", world: World) -> list[str]:
    """Install the schema; returns which of its optional parts this server does not have."""
    missing = []
    found = await connection.execute("select name from pg_available_extensions")
    available = {name for (name,) in await found.fetchall()}
    found = await connection.execute("select 'icu' from pg_collation where collname = 'und-x-icu'")
    available |= {name for (name,) in await found.fetchall()}
    schema = SCHEMA
    for part in _OPTIONAL.finditer(SCHEMA):
        if part[1] not in available:
            missing.append(part[1])
            schema = schema.replace(part[0], "")
    before, mark, after = schema.partition(_LAST)
    assert mark
    await connection.execute(";\n".join([before, *world.policies(RANDOM_TABLES), mark + after]).encode())
    return missing
