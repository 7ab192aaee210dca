"""What the database says about tables: columns and their types, policies, grants, and what policies reach.

All of it is read in one transaction, with a search path on which every name outside `pg_catalog` carries its schema
(`pg_temp` is named last, since it would come first if it were left out). Nothing is left behind on the connection, so
it works behind a transaction pooler. It is read again and again: so first one query asks whether anything is another.

Layer: adapters. May import: words, database, policy.blocks, policy.compiler, policy.keeping, policy.nodes,
policy.references.
Sources: get_row_security_policies (rowsecurity.c) and check_enable_rls (rls.c): which policies count for whom;
https://www.postgresql.org/docs/current/catalogs.html. Works on Postgres 15 to 18.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from realtime_bridge.change import Column, Relation
from realtime_bridge.database import CALLER_SEARCH_PATH
from realtime_bridge.errors import DatabaseError
from realtime_bridge.policy.blocks import Declared
from realtime_bridge.policy.compiler import ColumnType
from realtime_bridge.policy.keeping import References
from realtime_bridge.policy.references import read_references

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]

_TIMEOUT: Final = 10.0
_CALLER_PATH: Final = tuple(CALLER_SEARCH_PATH.split(", "))


@dataclass(frozen=True, slots=True)
class CatalogPolicy:
    """A policy that counts when rows are read.

    Attributes:
        expression: as pg_get_expr writes it; None if it was dropped at that moment.
        roles: of those asked about, the ones it applies to.
        version: another one whenever it was altered, if only to become what it had been: somebody may have read the
            table in between.
    """

    name: str
    permissive: bool
    expression: str | None
    roles: frozenset[str]
    version: str = ""


@dataclass(frozen=True)
class CatalogTable:
    """A table as the database describes it.

    Attributes:
        oid: of another table, once one of the same name has taken its place: then its rows are others, too.
        columns: name → type, in column order; without generated ones, which changes do not bring.
        declared: name → how the column is declared, for these and the generated ones.
        key: the columns of the primary key, in its order; empty if there is none.
        row_security: whether RLS is enabled.
        policies: for SELECT, in order of name.
        granted: roles with USAGE on the schema and SELECT on the whole table.
        columns_of: role → those of `columns` that it may select; none without USAGE on the schema.
        exempt: roles that no policy binds: superusers, BYPASSRLS, and owners of the table unless RLS is forced.
        readers: of `uid`, `role`, `email` and `jwt`, those whose function in the schema `auth` reads the claims as
            Supabase's does. What another body says of a user is not known here.
        references: what the policies of all tables reach.
        reached: a digest of what those of this one do.
    """

    name: str
    oid: int
    columns: Mapping[str, ColumnType]
    declared: Mapping[str, Declared]
    key: tuple[str, ...]
    row_security: bool
    policies: tuple[CatalogPolicy, ...]
    granted: frozenset[str]
    columns_of: Mapping[str, frozenset[str]]
    exempt: frozenset[str]
    readers: frozenset[str]
    references: References
    reached: str

    @property
    def generated(self) -> frozenset[str]:
        """Columns that Postgres computes: changes do not bring them, so nothing can be decided by them."""
        return frozenset(self.declared) - frozenset(self.columns)

    @property
    def relation(self) -> Relation:
        """The columns as changes bring them; what identifies a row there, only a source knows."""
        schema, _, name = self.name.partition(".")
        return Relation(schema, name, tuple(Column(n, c.name) for n, c in self.columns.items()), (), full=False)

    @cached_property
    def digest(self) -> str:
        """Of the content: equal only if it is the same table, and nothing that verdicts rest on differs."""
        columns = [
            (name, c.schema, c.name, None if c.labels is None else sorted(c.labels), c.exact)
            for name, c in self.columns.items()
        ]
        policies = [(p.name, p.permissive, p.expression, sorted(p.roles), p.version) for p in self.policies]
        roles = (sorted(self.granted), sorted(self.exempt), sorted(self.readers))
        selectable = sorted((role, sorted(names)) for role, names in self.columns_of.items())
        shape = (self.name, self.oid, columns, list(self.declared.items()), self.key, self.row_security)
        content = (shape, policies, roles, selectable, self.reached)
        return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()


class _Reading(NamedTuple):
    """What was found, and by what it can be told whether it still holds.

    Attributes:
        asked: tables, roles and rules.
        names: of everything that was looked at.
        moment: what `_MOMENT` said before that; None if it was not asked about all of these names.
    """

    asked: tuple[object, ...]
    found: Mapping[str, CatalogTable]
    names: frozenset[str]
    moment: str | None


class Catalog:
    """Reads tables' descriptions.

    Args:
        connect: gives a connection for a while; it may be inside a transaction already.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._last: _Reading | None = None

    async def read(
        self, tables: Sequence[str], roles: Sequence[str], rules: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, CatalogTable]:
        """Describe tables; one that does not exist is left out. Where nothing is another the answer is the same one.

        Args:
            tables: `schema.table` each.
            roles: whose access is asked about; one that does not exist has none.
            rules: table → expression used in place of its policies; what it reaches counts as what they do.

        Raises:
            DatabaseError: Postgres cannot be reached, is too slow, or refuses.
        """
        asked = (tuple(tables), tuple(roles), tuple(rules.items()))
        last = self._last if self._last is not None and self._last.asked == asked else None
        async with self._connected() as connection:
            moment = None if last is None else await _moment(connection, last.names)
            if last is not None and moment is not None and moment == last.moment:
                return dict(last.found)
            found, names = await _read(connection, tables, list(roles), rules)
        is_of_all = last is not None and names <= last.names
        self._last = _Reading(asked, found, names, moment if is_of_all else None)
        return dict(found)

    async def published(self, publication: str) -> dict[str, frozenset[str]]:
        """The tables of which a publication carries every change of every row → the columns that it carries.

        Raises:
            DatabaseError: Postgres cannot be reached, is too slow, or refuses.
        """
        async with self._connected() as connection:
            rows = await connection.fetch(_PUBLISHED, publication)
        return {row["name"]: frozenset(row["columns"]) for row in rows}

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        try:
            async with asyncio.timeout(_TIMEOUT), self._connect() as connection, connection.transaction():
                await connection.execute(_PREPARE)
                yield connection
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            raise DatabaseError(f"the catalog could not be read ({type(error).__name__})") from error


async def _moment(connection: Connection, names: Iterable[str]) -> str:
    """Another one if anything in the catalog is that has one of these names, or that rights rest on."""
    return str(await connection.fetchval(_MOMENT, sorted(names)))


async def _read(
    connection: Connection, tables: Sequence[str], roles: list[str], rules: Mapping[str, str]
) -> tuple[dict[str, CatalogTable], frozenset[str]]:
    schemas, names = zip(*(table.split(".", 1) for table in tables), strict=True) if tables else ((), ())
    found = await connection.fetch(_TABLES, list(schemas), list(names), roles)
    oids = [row["oid"] for row in found]
    columns = _by_table(await connection.fetch(_COLUMNS, oids, roles))
    policies = _by_table(await connection.fetch(_POLICIES, oids, roles))
    texts = {
        row["name"]: [p["expression"] for p in policies.get(row["oid"], ()) if p["expression"] is not None]
        for row in found
    }
    texts.update({table: [rule] for table, rule in rules.items()})
    reached = [(text, table) for table, own in texts.items() for text in own]
    references, reached_names = await read_references(connection.fetch, reached, _CALLER_PATH)
    described = {
        row["name"]: _table(
            row, roles, columns.get(row["oid"], ()), policies.get(row["oid"], ()), references, texts[row["name"]]
        )
        for row in found
    }
    return described, reached_names | frozenset(names)


def _table(
    row: asyncpg.Record,
    roles: Sequence[str],
    columns: Sequence[Any],
    policies: Sequence[Any],
    references: References,
    texts: Sequence[str],
) -> CatalogTable:
    brought = {column["name"]: column for column in columns if not column["generated"]}
    keyed = sorted((column["place"], column["name"]) for column in columns if column["place"] is not None)
    return CatalogTable(
        name=row["name"],
        oid=row["oid"],
        columns={name: _column_type(column) for name, column in brought.items()},
        declared={column["name"]: Declared(column["declared"], column["collation"] or "") for column in columns},
        key=tuple(name for _, name in keyed),
        row_security=row["row_security"],
        policies=tuple(_policy(policy) for policy in policies),
        granted=frozenset(row["granted"]),
        columns_of={role: _selectable(role, row, brought) for role in roles},
        exempt=frozenset(row["exempt"]),
        readers=references.claims,
        references=references,
        reached=references.digest(texts, row["name"]),
    )


def _selectable(role: str, row: asyncpg.Record, columns: Mapping[str, Any]) -> frozenset[str]:
    if role in row["granted"]:
        return frozenset(columns)
    return frozenset(name for name, column in columns.items() if role in row["entering"] and role in column["readers"])


def _by_table(rows: Sequence[asyncpg.Record]) -> dict[int, list[Any]]:
    tables: dict[int, list[Any]] = {}
    for row in rows:
        tables.setdefault(row["table"], []).append(row)
    return tables


def _column_type(row: Mapping[str, Any]) -> ColumnType:
    labels = None if row["labels"] is None else frozenset(row["labels"])
    return ColumnType(row["type"], row["schema"], labels, row["exact"])


def _policy(row: Mapping[str, Any]) -> CatalogPolicy:
    return CatalogPolicy(row["name"], row["permissive"], row["expression"], frozenset(row["roles"]), row["version"])


_PREPARE: Final = """
select pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
       pg_catalog.set_config('standard_conforming_strings', 'on', true)
"""

_TABLES: Final = """
select c.oid,
       n.nspname || '.' || c.relname as name,
       c.relrowsecurity as row_security,
       array(select r.rolname::text from pg_roles r
             where r.rolname = any($3::text[])
               and has_schema_privilege(r.oid, n.oid, 'USAGE')) as entering,
       array(select r.rolname::text from pg_roles r
             where r.rolname = any($3::text[])
               and has_schema_privilege(r.oid, n.oid, 'USAGE')
               and has_table_privilege(r.oid, c.oid, 'SELECT')) as granted,
       array(select r.rolname::text from pg_roles r
             where r.rolname = any($3::text[])
               and (r.rolsuper or r.rolbypassrls
                    or (pg_has_role(r.oid, c.relowner, 'USAGE') and not c.relforcerowsecurity))) as exempt
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
join unnest($1::text[], $2::text[]) as wanted(schema, name) on n.nspname = wanted.schema and c.relname = wanted.name
where c.relkind in ('r', 'p')
"""

_COLUMNS: Final = """
select a.attrelid as table,
       a.attname::text as name,
       t.typname::text as type,
       n.nspname::text as schema,
       case when t.typtype = 'e'
            then array(select e.enumlabel::text from pg_enum e where e.enumtypid = t.oid) end as labels,
       coalesce(l.collisdeterministic, true) as exact,
       a.attgenerated <> '' as generated,
       format_type(a.atttypid, a.atttypmod) as declared,
       case when a.attcollation <> own.typcollation then a.attcollation::regcollation::text end as collation,
       array_position(i.indkey::int2[], a.attnum) as place,
       case when a.attacl is null then '{}' else
            array(select r.rolname::text from pg_roles r
                  where r.rolname = any($2::text[]) and has_column_privilege(r.oid, a.attrelid, a.attnum, 'SELECT'))
       end as readers
from pg_attribute a
join pg_type own on own.oid = a.atttypid
left join pg_index i on i.indrelid = a.attrelid and i.indisprimary
cross join lateral (
  with recursive chain(oid, base, kind) as (
    select b.oid, b.typbasetype, b.typtype from pg_type b where b.oid = a.atttypid
    union all
    select b.oid, b.typbasetype, b.typtype from chain join pg_type b on b.oid = chain.base where chain.kind = 'd'
  )
  select chain.oid from chain where chain.kind <> 'd'
) as base
join pg_type t on t.oid = base.oid
join pg_namespace n on n.oid = t.typnamespace
left join pg_collation l on l.oid = a.attcollation
where a.attrelid = any($1::oid[]) and a.attnum > 0 and not a.attisdropped
order by a.attrelid, a.attnum
"""

# A policy without USING (FOR ALL, WITH CHECK only) says nothing about reading. Role 0 is PUBLIC.
_POLICIES: Final = """
select p.polrelid as table,
       p.polname::text as name,
       p.polpermissive as permissive,
       p.oid::text || '.' || p.xmin::text as version,
       pg_get_expr(p.polqual, p.polrelid) as expression,
       array(select r.rolname::text from pg_roles r
             where r.rolname = any($2::text[])
               and exists (select from unnest(p.polroles) as applies(role)
                           where applies.role = 0
                              or pg_has_role(r.oid, nullif(applies.role, 0), 'USAGE'))) as roles
from pg_policy p
where p.polrelid = any($1::oid[]) and p.polcmd in ('r', '*') and p.polqual is not null
order by p.polrelid, p.polname
"""

# A row of a catalog that was changed has another xmin or place. pg_authid can be read by superusers only.
_MOMENT: Final = """
with named as materialized (
  select oid, xmin as x, ctid as t from pg_class
  where relname = any($1::text[]) and relkind in ('r', 'p', 'v', 'm', 'f')
)
select sum(hash_record_extended(version, 0))::text from (
  select row(text 'class', oid, x, t) from named
  union all
  select row(text 'column', a.attrelid, a.attnum, a.xmin, a.ctid)
  from pg_attribute a join named on a.attrelid = named.oid
  union all
  select row(text 'policy', p.oid, p.xmin, p.ctid) from pg_policy p join named on p.polrelid = named.oid
  union all
  select row(text 'key', i.indexrelid, i.xmin, i.ctid) from pg_index i join named on i.indrelid = named.oid
  where i.indisprimary
  union all
  select row(text 'function', oid, xmin, ctid) from pg_proc where proname = any($1::text[])
  union all
  select row(text 'operator', o.oid, o.xmin, o.ctid, p.xmin, p.ctid)
  from pg_operator o join pg_proc p on p.oid = o.oprcode::oid
  where o.oprname = any($1::text[]) and o.oprnamespace <> 'pg_catalog'::regnamespace
  union all
  select row(text 'type', oid, xmin, ctid) from pg_type where typtype in ('d', 'e')
  union all
  select row(text 'label', oid, xmin, ctid) from pg_enum
  union all
  select row(text 'schema', oid, xmin, ctid) from pg_namespace where nspname !~ '^pg_(temp|toast)'
  union all
  select row(text 'member', roleid, member, xmin, ctid) from pg_auth_members
  union all
  select row(text 'role', oid, rolname, rolsuper, rolinherit, rolbypassrls) from pg_roles
) as of_all(version)
"""

# Postgres 15 names generated columns too, although it leaves them out.
_PUBLISHED: Final = """
select t.schemaname || '.' || t.tablename as name,
       array(select a.attname::text from pg_attribute a
             where a.attrelid = c.oid and a.attname = any(t.attnames) and a.attgenerated = '') as columns
from pg_publication_tables t
join pg_publication p on p.pubname = t.pubname
join pg_class c on c.relname = t.tablename
join pg_namespace n on n.oid = c.relnamespace and n.nspname = t.schemaname
where p.pubname = $1 and p.pubinsert and p.pubupdate and p.pubdelete and p.pubtruncate and t.rowfilter is null
"""
