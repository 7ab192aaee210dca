"""What the database says about tables: columns and their types, policies, grants.

All of it is read in one transaction, with a search path on which every name outside `pg_catalog` carries its schema
(`pg_temp` is named last, since it would come first if it were left out). Nothing is left behind on the connection, so
it works behind a transaction pooler.

Layer: adapters. May import: errors, policy.compiler.
Sources: get_row_security_policies (rowsecurity.c) and check_enable_rls (rls.c): which policies count for whom;
https://www.postgresql.org/docs/current/catalogs.html; github:supabase/auth, the migrations that make and change the
auth functions. Works on Postgres 15 to 18.
"""

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from realtime_bridge.errors import DatabaseError
from realtime_bridge.policy.compiler import ColumnType

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"
Connect: TypeAlias = Callable[[], AbstractAsyncContextManager[Connection]]

_TIMEOUT: Final = 10.0


@dataclass(frozen=True, slots=True)
class CatalogPolicy:
    """A policy that counts when rows are read.

    Attributes:
        expression: as pg_get_expr writes it; None if it was dropped at that moment.
        roles: of those asked about, the ones it applies to.
    """

    name: str
    permissive: bool
    expression: str | None
    roles: frozenset[str]


@dataclass(frozen=True)
class CatalogTable:
    """A table as the database describes it.

    Attributes:
        columns: name → type, in column order; without generated ones, which changes do not bring.
        row_security: whether RLS is enabled.
        policies: for SELECT, in order of name.
        columns_of: role → the columns that it may select, with USAGE on the schema.
        key: the columns of the primary key.
        exempt: roles that no policy binds: superusers, BYPASSRLS, and owners of the table unless RLS is forced.
        readers: of `uid`, `role`, `email` and `jwt`, those whose function in the schema `auth` reads the claims as
            Supabase's does. What another body says of a user is not known here.
    """

    name: str
    columns: Mapping[str, ColumnType]
    row_security: bool
    policies: tuple[CatalogPolicy, ...]
    columns_of: Mapping[str, frozenset[str]]
    key: frozenset[str]
    exempt: frozenset[str]
    readers: frozenset[str]

    @cached_property
    def digest(self) -> str:
        """Of the content: equal exactly if nothing that verdicts rest on differs."""
        columns = [
            (name, c.schema, c.name, None if c.labels is None else sorted(c.labels), c.exact, c.declared)
            for name, c in self.columns.items()
        ]
        policies = [(p.name, p.permissive, p.expression, sorted(p.roles)) for p in self.policies]
        grants = sorted((role, sorted(columns)) for role, columns in self.columns_of.items())
        roles = (grants, sorted(self.key), sorted(self.exempt), sorted(self.readers))
        content = (self.name, columns, self.row_security, policies, roles)
        return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()


class Catalog:
    """Reads tables' descriptions.

    Args:
        connect: gives a connection for a while; it may be inside a transaction already.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect

    async def read(self, tables: Sequence[str], roles: Sequence[str]) -> dict[str, CatalogTable]:
        """Describe tables; one that does not exist is left out.

        Args:
            tables: `schema.table` each.
            roles: whose access is asked about; one that does not exist has none.

        Raises:
            DatabaseError: Postgres cannot be reached, is too slow, or refuses.
        """
        try:
            async with asyncio.timeout(_TIMEOUT), self._connect() as connection, connection.transaction():
                return await _read(connection, tables, list(roles))
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            raise DatabaseError(f"the catalog could not be read ({type(error).__name__})") from error

    async def published(self, publication: str) -> frozenset[str]:
        """The tables all of whose changes a publication carries, with every column and row.

        Raises:
            DatabaseError: Postgres cannot be reached, is too slow, or refuses.
        """
        return frozenset(row["name"] for row in await self._fetch(_PUBLISHED, publication))

    async def fingerprint(self) -> str:
        """Another one whenever anything may have changed that a description, or what its policies go through, rests on.

        Raises:
            DatabaseError: Postgres cannot be reached, is too slow, or refuses.
        """
        (row,) = await self._fetch(_FINGERPRINT)
        return str(row["fingerprint"])

    async def _fetch(self, query: str, *arguments: str) -> Sequence[asyncpg.Record]:
        try:
            async with asyncio.timeout(_TIMEOUT), self._connect() as connection:
                return await connection.fetch(query, *arguments)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            raise DatabaseError(f"the catalog could not be read ({type(error).__name__})") from error


async def _read(connection: Connection, tables: Sequence[str], roles: list[str]) -> dict[str, CatalogTable]:
    await connection.execute(_PREPARE)
    schemas, names = zip(*(table.split(".", 1) for table in tables), strict=True) if tables else ((), ())
    found = await connection.fetch(_TABLES, list(schemas), list(names), roles)
    oids = [row["oid"] for row in found]
    columns = _by_table(await connection.fetch(_COLUMNS, oids, roles))
    policies = _by_table(await connection.fetch(_POLICIES, oids, roles))
    bodies = await connection.fetch(_READERS)
    readers = frozenset(row["name"] for row in bodies if reads_claims(row["name"], row["body"]))
    return {
        row["name"]: CatalogTable(
            name=row["name"],
            columns={column["name"]: _column_type(column) for column in columns.get(row["oid"], ())},
            row_security=row["row_security"],
            policies=tuple(_policy(policy) for policy in policies.get(row["oid"], ())),
            columns_of=_readable(columns.get(row["oid"], ())),
            key=frozenset(row["key"]),
            exempt=frozenset(row["exempt"]),
            readers=readers,
        )
        for row in found
    }


def reads_claims(name: str, body: str) -> bool:
    """Whether a function of the schema `auth` says what `policy.facts` does, in one of the forms Supabase has had."""
    return _READER[name].fullmatch(re.sub(r"[\s();]+", "", body).lower()) is not None


def _setting(name: str) -> str:
    setting = f"current_setting'{re.escape(name)}',true"
    return f"(?:nullif{setting},''|{setting})"


def _claim(name: str, type_name: str) -> re.Pattern[str]:
    own, of_all = _setting(f"request.jwt.claim.{name}"), f"{_CLAIMS}::jsonb?->>'{name}'"
    return re.compile(f"select(?:{own}|{of_all}|coalesce{own},{of_all})(?:::{type_name})?")


_CLAIMS: Final = _setting("request.jwt.claims")
_READER: Final = {
    "uid": _claim("sub", "uuid"),
    "role": _claim("role", "text"),
    "email": _claim("email", "text"),
    "jwt": re.compile(f"select(?:coalesce{_setting('request.jwt.claim')},)?{_CLAIMS}::jsonb"),
}
"""Bodies without white space and parentheses."""


def _by_table(rows: Sequence[asyncpg.Record]) -> dict[int, list[Any]]:
    tables: dict[int, list[Any]] = {}
    for row in rows:
        tables.setdefault(row["table"], []).append(row)
    return tables


def _column_type(row: Mapping[str, Any]) -> ColumnType:
    labels = None if row["labels"] is None else frozenset(row["labels"])
    return ColumnType(row["type"], row["schema"], labels, row["exact"], (row["declared"], row["collation"]))


def _readable(columns: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    roles = {role for column in columns for role in column["readers"]}
    return {role: frozenset(column["name"] for column in columns if role in column["readers"]) for role in roles}


def _policy(row: Mapping[str, Any]) -> CatalogPolicy:
    return CatalogPolicy(row["name"], row["permissive"], row["expression"], frozenset(row["roles"]))


_PREPARE: Final = """
select pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
       pg_catalog.set_config('standard_conforming_strings', 'on', true)
"""

_TABLES: Final = """
select c.oid,
       n.nspname || '.' || c.relname as name,
       c.relrowsecurity as row_security,
       array(select a.attname::text from pg_index i
             join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any(i.indkey::int2[])
             where i.indrelid = c.oid and i.indisprimary) as key,
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
       format_type(a.atttypid, a.atttypmod) as declared,
       case when a.attcollation <> own.typcollation
            then (select quote_ident(s.nspname) || '.' || quote_ident(l.collname) from pg_namespace s
                  where s.oid = l.collnamespace) else '' end as collation,
       array(select r.rolname::text from pg_roles r
             where r.rolname = any($2::text[])
               and has_schema_privilege(r.oid, c.relnamespace, 'USAGE')
               and has_column_privilege(r.oid, a.attrelid, a.attnum, 'SELECT')) as readers
from pg_attribute a
join pg_class c on c.oid = a.attrelid
join pg_type own on own.oid = a.atttypid
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
where a.attrelid = any($1::oid[]) and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
order by a.attrelid, a.attnum
"""

_READERS: Final = """
select p.proname::text as name, p.prosrc as body
from pg_proc p
join pg_namespace n on n.oid = p.pronamespace
join pg_language l on l.oid = p.prolang
where n.nspname = 'auth' and p.proname in ('uid', 'role', 'email', 'jwt') and p.pronargs = 0 and l.lanname = 'sql'
"""

# A policy without USING (FOR ALL, WITH CHECK only) says nothing about reading. Role 0 is PUBLIC.
_POLICIES: Final = """
select p.polrelid as table,
       p.polname::text as name,
       p.polpermissive as permissive,
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

_PUBLISHED: Final = """
select p.schemaname || '.' || p.tablename as name
from pg_catalog.pg_publication_tables p
join pg_catalog.pg_publication o on o.pubname = p.pubname
  and o.pubinsert and o.pubupdate and o.pubdelete and o.pubtruncate
join pg_catalog.pg_namespace n on n.nspname = p.schemaname
join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = p.tablename
where p.pubname = $1 and p.rowfilter is null
  and cardinality(p.attnames) = (select count(*) from pg_catalog.pg_attribute a
                                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
                                   and a.attgenerated = '')
"""

# A row of a catalog that was changed has another xmin or place. pg_authid can be read by superusers only.
_FINGERPRINT: Final = """
with own as materialized (
  select n.oid from pg_catalog.pg_namespace n
  where n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast') and n.nspname !~ '^pg_(toast_)?temp_'
), class as materialized (
  select c.oid, c.xmin as x, c.ctid as t, c.relkind as kind from pg_catalog.pg_class c
  where c.relnamespace in (select oid from own) and c.relkind in ('r', 'p', 'v', 'm', 'f')
)
select sum(hashtextextended(version, 0))::text as fingerprint from (
  select concat('class ', oid, x, t) from class
  union all select concat('column ', attrelid, attnum, xmin, ctid) from pg_catalog.pg_attribute
            where attrelid in (select oid from class) and attnum > 0
  union all select concat('policy ', oid, xmin, ctid) from pg_catalog.pg_policy
  union all select concat('rule ', oid, xmin, ctid) from pg_catalog.pg_rewrite
            where ev_class in (select oid from class where kind = 'v')
  union all select concat('function ', oid, xmin, ctid) from pg_catalog.pg_proc
            where pronamespace in (select oid from own)
  union all select concat('schema ', oid, xmin, ctid) from pg_catalog.pg_namespace
  union all select concat('member ', roleid, member, xmin, ctid) from pg_catalog.pg_auth_members
  union all select concat('role ', oid, rolname, rolsuper, rolinherit, rolbypassrls) from pg_catalog.pg_roles
  union all select concat('publication ', oid, xmin, ctid) from pg_catalog.pg_publication
  union all select concat('published ', oid, xmin, ctid) from pg_catalog.pg_publication_rel
  union all select concat('published in ', oid, xmin, ctid) from pg_catalog.pg_publication_namespace
  union all select concat('enum ', oid, xmin, ctid) from pg_catalog.pg_enum
) as version(version)
"""
