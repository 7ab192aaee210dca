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
        granted: roles with USAGE on the schema and SELECT on the whole table.
        exempt: roles that no policy binds: superusers, BYPASSRLS, and owners of the table unless RLS is forced.
        readers: of `uid`, `role`, `email` and `jwt`, those whose function in the schema `auth` reads the claims as
            Supabase's does. What another body says of a user is not known here.
    """

    name: str
    columns: Mapping[str, ColumnType]
    row_security: bool
    policies: tuple[CatalogPolicy, ...]
    granted: frozenset[str]
    exempt: frozenset[str]
    readers: frozenset[str]

    @cached_property
    def digest(self) -> str:
        """Of the content: equal exactly if nothing that verdicts rest on differs."""
        columns = [
            (name, c.schema, c.name, None if c.labels is None else sorted(c.labels), c.exact)
            for name, c in self.columns.items()
        ]
        policies = [(p.name, p.permissive, p.expression, sorted(p.roles)) for p in self.policies]
        roles = (sorted(self.granted), sorted(self.exempt), sorted(self.readers))
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


async def _read(connection: Connection, tables: Sequence[str], roles: list[str]) -> dict[str, CatalogTable]:
    await connection.execute(_PREPARE)
    schemas, names = zip(*(table.split(".", 1) for table in tables), strict=True) if tables else ((), ())
    found = await connection.fetch(_TABLES, list(schemas), list(names), roles)
    oids = [row["oid"] for row in found]
    columns = _by_table(await connection.fetch(_COLUMNS, oids))
    policies = _by_table(await connection.fetch(_POLICIES, oids, roles))
    bodies = await connection.fetch(_READERS)
    readers = frozenset(row["name"] for row in bodies if reads_claims(row["name"], row["body"]))
    return {
        row["name"]: CatalogTable(
            name=row["name"],
            columns={column["name"]: _column_type(column) for column in columns.get(row["oid"], ())},
            row_security=row["row_security"],
            policies=tuple(_policy(policy) for policy in policies.get(row["oid"], ())),
            granted=frozenset(row["granted"]),
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
    return ColumnType(row["type"], row["schema"], labels, row["exact"])


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
       coalesce(l.collisdeterministic, true) as exact
from pg_attribute a
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
