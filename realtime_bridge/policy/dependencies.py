"""Finds out what answers of Postgres depend on, beyond what their text says: through functions, views and policies.

A function in SQL is read like a policy; of any other, of an operator that is not Postgres' own, and of whatever cannot
be read here, nobody can tell what it depends on. What a function says of its own volatility is not believed, unless it
is Postgres' own or an extension's. The policies of tables that are read count, whoever reads: that is more than what
some roles depend on, and never less.

Layer: adapters. May import: errors, policy.catalog, policy.dependence, policy.expression, policy.nodes,
policy.references.
Sources: pg_proc, pg_policy, pg_class (https://www.postgresql.org/docs/current/catalogs.html).
"""

import asyncio
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import asyncpg

from realtime_bridge.errors import DatabaseError
from realtime_bridge.policy.catalog import Connect, Connection, reads_claims
from realtime_bridge.policy.dependence import OF_ARGUMENTS, OF_CHANCE, OF_TIME, dependence
from realtime_bridge.policy.expression import Asked, Query, Reads, UnsupportedExpression
from realtime_bridge.policy.facts import digest_of
from realtime_bridge.policy.nodes import parse_value
from realtime_bridge.policy.references import Dependency, Kind

_TIMEOUT: Final = 10.0
_ROUNDS: Final = 16
"""How deep functions, views and policies may refer to each other; what lies deeper is not followed."""
_DEFAULT_PATH: Final[tuple[str, ...]] = ("public", "extensions")
_PARAMETER: Final = re.compile(r"\$[0-9]+")
_READS_NO_ROWS: Final = frozenset(
    f"pg_catalog.{name}" for name in ("current_setting", "current_user", "current_role", "user", "nullif", "coalesce")
)


class _Thing(NamedTuple):
    """A function or a table that is read.

    Attributes:
        kind: for how long it holds by itself, whatever it reads.
        reads: what else is read with it: names, to be found on `path` where they have no schema.
    """

    kind: Kind
    digest: str
    tables: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    path: tuple[str, ...] = _DEFAULT_PATH


_UNKNOWN: Final = _Thing(Kind.TIMED, "unknown")


class Dependencies:
    """Reads what answers depend on.

    Args:
        connect: gives a connection for a while; it may be inside a transaction already.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    async def of(self, wanted: Collection[Query | Asked]) -> dict[Query | Asked, Dependency]:
        """What each answer depends on.

        Raises:
            DatabaseError: Postgres cannot be reached, is too slow, or refuses.
        """
        if not wanted:
            return {}
        survey = _Survey()
        try:
            async with asyncio.timeout(_TIMEOUT), self._connect() as connection, connection.transaction():
                await survey.explore(connection, [one.reads for one in wanted])
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            raise DatabaseError(f"what policies depend on could not be read ({type(error).__name__})") from error
        return {one: survey.sum_up(one.reads) for one in wanted}


_Name: TypeAlias = tuple[str, tuple[str, ...]]
"""`schema.name`, and where it is looked for if no schema was written: then it is said to be of `pg_catalog`."""


class _Survey:
    """Everything that was found."""

    def __init__(self) -> None:
        self._functions: dict[_Name, _Thing] = {}
        self._tables: dict[_Name, tuple[str, _Thing]] = {}

    async def explore(self, connection: Connection, reads: Iterable[Reads]) -> None:
        """Read whatever is referred to, and what that refers to, and so on."""
        functions = {(name, _DEFAULT_PATH) for one in reads for name in one.functions}
        tables = {(name, _DEFAULT_PATH) for one in reads for name in one.tables}
        for _ in range(_ROUNDS):
            functions -= self._functions.keys()
            tables -= self._tables.keys()
            if not (functions or tables):
                return
            called = await _read_functions(connection, functions) if functions else {}
            read = await _read_tables(connection, tables) if tables else {}
            self._functions |= called
            self._tables |= read
            things = [*called.values(), *(thing for _, thing in read.values())]
            functions = {(name, thing.path) for thing in things for name in thing.functions}
            tables = {(name, thing.path) for thing in things for name in thing.tables}

    def sum_up(self, reads: Reads) -> Dependency:
        """The dependency of something that reads this."""
        things: dict[tuple[str, _Name], _Thing] = {}
        found: set[str] = set()
        todo: list[tuple[str, _Name]] = [("function", (name, _DEFAULT_PATH)) for name in reads.functions]
        todo += [("table", (name, _DEFAULT_PATH)) for name in reads.tables]
        while todo:
            key = todo.pop()
            if key in things:
                continue
            if key[0] == "function":
                thing = self._functions.get(key[1], _UNKNOWN)
            else:
                name, thing = self._tables.get(key[1], (key[1][0], _UNKNOWN))
                found.add(name)
            things[key] = thing
            todo += [("function", (function, thing.path)) for function in thing.functions]
            todo += [("table", (table, thing.path)) for table in thing.tables]
        kinds = {thing.kind for thing in things.values()}
        kind = next((k for k in (Kind.VOLATILE, Kind.TIMED) if k in kinds), Kind.TRACKED if found else Kind.CLAIMS)
        digests = {repr(key): thing.digest for key, thing in things.items()}
        return Dependency(kind, frozenset(found), digest_of(digests))


async def _read_functions(connection: Connection, names: Collection[_Name]) -> dict[_Name, _Thing]:
    rows = await connection.fetch(_FUNCTIONS, *_candidates(names))
    by_name: dict[str, list[Any]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    found: dict[_Name, _Thing] = {}
    for name in names:
        overloads = next((by_name[candidate] for candidate in _in_order(name) if candidate in by_name), None)
        found[name] = _WORDS.get(name[0], _UNKNOWN) if overloads is None else _joined(map(_function, overloads))
    return found


def _function(row: Any) -> _Thing:
    name, volatility = row["name"], row["volatility"]
    digest = digest_of(*(str(row[part]) for part in ("language", "source", "config", "definer", "volatility")))
    if name.startswith("pg_catalog."):
        return _Thing(_kind_of_builtin(name, volatility), digest)
    schema, _, function = name.partition(".")
    if schema == "auth" and function in ("uid", "role", "email", "jwt") and reads_claims(function, row["source"]):
        return _Thing(Kind.CLAIMS, digest)
    if row["language"] == "c" and row["of_extension"] and volatility == "i":
        return _Thing(Kind.CLAIMS, digest)
    if row["language"] != "sql":
        return _Thing(Kind.TIMED, digest)
    path = _path_of(row["config"] or ())
    return _read(row["source"], digest, path) or _Thing(Kind.TIMED, digest)


def _kind_of_builtin(name: str, volatility: str) -> Kind:
    if name in OF_CHANCE or (volatility == "v" and name not in OF_TIME):
        return Kind.VOLATILE
    if name in OF_TIME:
        return Kind.TIMED
    return Kind.CLAIMS if volatility == "i" or name in OF_ARGUMENTS or name in _READS_NO_ROWS else Kind.TIMED


def _read(sql: str, digest: str, path: tuple[str, ...]) -> _Thing | None:
    """What one statement reads; None if it cannot be told."""
    statement = _PARAMETER.sub("NULL", sql).strip().rstrip(";")
    statement = statement[len("return") :] if statement[:7].lower().rstrip() == "return" else statement
    try:
        reads = dependence(parse_value(f"({statement})"), None).reads
    except UnsupportedExpression:
        return None
    return _Thing(Kind.CLAIMS, digest, reads.tables, reads.functions, path)


async def _read_tables(connection: Connection, names: Collection[_Name]) -> dict[_Name, tuple[str, _Thing]]:
    rows = {row["name"]: row for row in await connection.fetch(_TABLES, *_candidates(names))}
    found: dict[_Name, tuple[str, _Thing]] = {}
    for name in names:
        actual = next((candidate for candidate in _in_order(name) if candidate in rows), None)
        found[name] = (name[0], _UNKNOWN) if actual is None else (actual, _table(rows[actual]))
    return found


def _table(row: Any) -> _Thing:
    digest = digest_of(*(str(row[part]) for part in ("kind", "secured", "policies", "definition", "access")))
    if row["kind"] == "v":
        return _read(row["definition"], digest, _DEFAULT_PATH) or _Thing(Kind.TIMED, digest)
    if row["kind"] not in ("r", "p"):
        return _Thing(Kind.TIMED, digest)
    policies = [_read(f"select {policy}", digest, _DEFAULT_PATH) for policy in row["policies"] if row["secured"]]
    if None in policies:
        return _Thing(Kind.TIMED, digest)
    return _joined([_Thing(Kind.CLAIMS, digest), *(policy for policy in policies if policy is not None)])


def _joined(things: Iterable[_Thing]) -> _Thing:
    all_of = list(things)
    kinds = {thing.kind for thing in all_of}
    kind = next(k for k in (Kind.VOLATILE, Kind.TIMED, Kind.TRACKED, Kind.CLAIMS) if k in kinds)
    return _Thing(
        kind,
        digest_of([thing.digest for thing in all_of]),
        frozenset[str]().union(*(thing.tables for thing in all_of)),
        frozenset[str]().union(*(thing.functions for thing in all_of)),
        all_of[0].path,
    )


def _in_order(name: _Name) -> list[str]:
    """Where a name is looked for: as it is, and if no schema was written, on the path after `pg_catalog`."""
    schema, _, rest = name[0].partition(".")
    return [name[0], *(f"{other}.{rest}" for other in name[1])] if schema == "pg_catalog" else [name[0]]


def _candidates(names: Iterable[_Name]) -> tuple[list[str], list[str]]:
    split = {tuple(candidate.split(".", 1)) for name in names for candidate in _in_order(name)}
    return [schema for schema, _ in split], [rest for _, rest in split]


def _path_of(config: Sequence[str]) -> tuple[str, ...]:
    """The search path that a function sets for itself, else the caller's."""
    setting = next((one.partition("=")[2] for one in config if one.startswith("search_path=")), None)
    if setting is None:
        return _DEFAULT_PATH
    return tuple(part.strip().strip('"') for part in setting.split(",") if part.strip().strip('"'))


_WORDS: Final = {
    **dict.fromkeys(OF_TIME, _Thing(Kind.TIMED, "time")),
    **dict.fromkeys(_READS_NO_ROWS, _Thing(Kind.CLAIMS, "word")),
}
"""SQL's own words, which are no functions in the catalog."""

_FUNCTIONS: Final = """
select n.nspname || '.' || p.proname as name, p.provolatile::text as volatility, l.lanname::text as language,
       coalesce(pg_get_function_sqlbody(p.oid), p.prosrc) as source, p.proconfig as config, p.prosecdef as definer,
       exists (select from pg_depend d
               where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e') as of_extension
from unnest($1::text[], $2::text[]) as wanted(schema, name)
join pg_namespace n on n.nspname = wanted.schema
join pg_proc p on p.pronamespace = n.oid and p.proname = wanted.name
join pg_language l on l.oid = p.prolang
"""

_TABLES: Final = """
select n.nspname || '.' || c.relname as name, c.relkind::text as kind, c.relrowsecurity as secured,
       array(select pg_get_expr(p.polqual, p.polrelid) from pg_policy p
             where p.polrelid = c.oid and p.polcmd in ('r', '*') and p.polqual is not null
             order by p.polname) as policies,
       case when c.relkind = 'v' then pg_get_viewdef(c.oid) end as definition,
       array[c.relacl::text, c.relowner::text, c.relforcerowsecurity::text,
             (select string_agg(p.polname || p.polpermissive || p.polroles::text, ',' order by p.polname)
              from pg_policy p where p.polrelid = c.oid and p.polcmd in ('r', '*'))] as access
from unnest($1::text[], $2::text[]) as wanted(schema, name)
join pg_namespace n on n.nspname = wanted.schema
join pg_class c on c.relnamespace = n.oid and c.relname = wanted.name
"""
