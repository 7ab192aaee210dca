"""As much of PostgREST as reads a table, and inserts or replaces rows of one.

Layer: whole (dev). May import: errors.
Sources: PostgREST's reference of tables and views; Supabase's projects answer at most 1,000 rows.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias
from urllib.parse import parse_qsl

import asyncpg
import orjson

from realtime_bridge.errors import BadRequestError, NotFoundError

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

MOST_ROWS: Final = 1_000
_OPERATORS: Final = {"eq": "=", "neq": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_IS: Final = frozenset({"null", "true", "false", "unknown"})
_DIRECTIONS: Final = frozenset({"", "asc", "desc"})
_COLUMNS: Final = """
select attname, format_type(atttypid, atttypmod) from pg_attribute
where attrelid = to_regclass($1) and attnum > 0 and not attisdropped
"""


def quote(name: str) -> str:
    """A name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


class Selected(NamedTuple):
    """Rows as a JSON array, and which of how many they are, as in the header `Content-Range`."""

    rows: bytes
    content_range: str


async def select(pool: Pool, schema: str, table: str, query: str, *, counted: bool = False) -> Selected:
    """Rows for an address' `query`; how many there are beyond those shown is only told if they are `counted`.

    Raises:
        NotFoundError: no such table.
        BadRequestError: something in the query is not understood, or a value does not fit its column.
    """
    name = f"{quote(schema)}.{quote(table)}"
    types: dict[str, str] = {row[0]: row[1] for row in await pool.fetch(_COLUMNS, name)}
    if not types:
        raise NotFoundError(f"no table {schema}.{table}")
    asked = _Query(types)
    for word, value in parse_qsl(query, keep_blank_values=True):
        asked.take(word, value)
    rows = f"select count(*), coalesce(json_agg(to_jsonb(r)), '[]')::text from ({asked.sql(name)}) r"  # noqa: S608 - names are quoted
    try:
        [(count, text)] = await pool.fetch(rows, *asked.arguments)
        total = await pool.fetchval(asked.count(name), *asked.arguments) if counted else "*"
    except (asyncpg.DataError, asyncpg.SyntaxOrAccessError) as error:
        raise BadRequestError(str(error)) from None
    shown = f"{asked.offset}-{asked.offset + count - 1}" if count else "*"
    return Selected(text.encode(), f"{shown}/{total}")


async def upsert(pool: Pool, schema: str, table: str, query: str, body: bytes) -> None:
    """Insert a row, or change the one with the same `on_conflict`, the one parameter of the `query`.

    Raises:
        NotFoundError: no such table.
        BadRequestError: something is not understood, or a value does not fit its column.
    """
    name = f"{quote(schema)}.{quote(table)}"
    columns = {row[0] for row in await pool.fetch(_COLUMNS, name)}
    if not columns:
        raise NotFoundError(f"no table {schema}.{table}")
    key = dict(parse_qsl(query)).get("on_conflict", "")
    row = orjson.loads(body)
    if not isinstance(row, dict) or key not in columns or not row.keys() <= columns:
        raise BadRequestError("not understood here")
    names = ", ".join(map(quote, row))
    changes = ", ".join(f"{quote(column)} = excluded.{quote(column)}" for column in row)
    sql = (
        f"insert into {name} ({names}) select {names} from jsonb_populate_record(null::{name}, $1) "  # noqa: S608
        f"on conflict ({quote(key)}) do update set {changes}"
    )
    try:
        await pool.execute(sql, body.decode())
    except (asyncpg.DataError, asyncpg.SyntaxOrAccessError, asyncpg.IntegrityConstraintViolationError) as error:
        raise BadRequestError(str(error)) from None


@dataclass
class _Query:
    """What is asked of a table: `select`, `order`, `limit`, `offset`, and filters of columns (all must hold)."""

    types: Mapping[str, str]
    arguments: list[str | list[str]] = field(default_factory=list)
    columns: str = "*"
    conditions: list[str] = field(default_factory=list)
    order: str = ""
    limit: int = field(default_factory=lambda: MOST_ROWS)
    offset: int = 0

    def take(self, word: str, value: str) -> None:
        """Take one parameter of the address.

        Raises:
            BadRequestError: it is not understood here.
        """
        if word == "select":
            self.columns = "*" if value == "*" else ", ".join(self._column(name) for name in value.split(","))
        elif word == "order":
            self.order = "order by " + ", ".join(self._order(term) for term in value.split(","))
        elif word in ("limit", "offset") and value.isdecimal():
            setattr(self, word, min(int(value), MOST_ROWS) if word == "limit" else int(value))
        else:
            self.conditions.append(self._condition(word, value))

    def sql(self, name: str) -> str:
        """The whole, for the table of this quoted name."""
        return f"select {self.columns} from {name} {self._where} {self.order} limit {self.limit} offset {self.offset}"  # noqa: S608

    def count(self, name: str) -> str:
        """How many rows there are without limit and offset."""
        return f"select count(*) from {name} {self._where}"  # noqa: S608

    @property
    def _where(self) -> str:
        return f"where {' and '.join(self.conditions)}" if self.conditions else ""

    def _column(self, name: str) -> str:
        if name not in self.types:
            raise BadRequestError(f"{name}: no such column, or not understood here")
        return quote(name)

    def _order(self, term: str) -> str:
        name, _, direction = term.partition(".")
        if direction not in _DIRECTIONS:
            raise BadRequestError(f"order: {term}")
        return f"{self._column(name)} {direction}"

    def _condition(self, name: str, value: str) -> str:
        column = self._column(name)
        word, _, operand = value.partition(".")
        if word == "is" and operand in _IS:
            return f"{column} is {operand}"
        if word == "in" and operand.startswith("(") and operand.endswith(")"):
            self.arguments.append(_items(operand[1:-1]))
            return f"{column} = any (${len(self.arguments)}::text[]::{self.types[name]}[])"
        if word in _OPERATORS:
            self.arguments.append(operand)
            return f"{column} {_OPERATORS[word]} ${len(self.arguments)}::text::{self.types[name]}"
        raise BadRequestError(f"{name}: {value} is not understood here")


def _items(text: str) -> list[str]:
    """The items of an `in` list; one in double quotes may hold commas."""
    return [
        re.sub(r"\\(.)", r"\1", quoted) if quoted or not bare else bare
        for quoted, bare in re.findall(r'"((?:[^"\\]|\\.)*)"|([^,"]+)', text)
    ]
