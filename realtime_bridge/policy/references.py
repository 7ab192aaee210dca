"""Reads from the catalog what policies reach: functions, tables and views, and what those reach in turn.

Names are looked up without their schemas, so that it is noticed when one begins to mean something else; and level by
level, since only its body says what a function reads.

Layer: adapters. May import: policy.keeping, policy.nodes.
Sources: https://www.postgresql.org/docs/current/catalogs.html; github:supabase/auth, the migrations that make and
change the auth functions. Works on Postgres 15 to 18.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from realtime_bridge.policy.keeping import (
    CatalogFunction,
    CatalogRelation,
    Owner,
    References,
    names_in,
    part_of,
    parts_of_function,
    parts_of_relation,
)
from realtime_bridge.policy.nodes import AUTH_FUNCTIONS

Fetch: TypeAlias = Callable[..., Awaitable[Sequence[Mapping[str, Any]]]]
"""`fetch` of a connection in whose search path nothing but pg_catalog is."""

_MAX_LEVELS: Final = 32


async def read_references(
    fetch: Fetch, policies: Iterable[tuple[str, str]], path: tuple[str, ...]
) -> tuple[References, frozenset[str]]:
    """Everything that policies reach, and the names by which it was found.

    What lies deeper than any reasonable function calls another is not looked for, and so is not known.

    Args:
        fetch: asks for rows.
        policies: each with the table that it is of.
        path: the schemas in which callers look for names without one.
    """
    functions: dict[str, list[CatalogFunction]] = {}
    relations: dict[str, CatalogRelation] = {}
    asked: frozenset[str] = frozenset()
    names = AUTH_FUNCTIONS | names_in(part_of(policy, table) for policy, table in policies)
    for _ in range(_MAX_LEVELS):
        news = sorted(names - asked)
        if not news:
            break
        asked = names
        for row in await fetch(_FUNCTIONS, news):
            name, function = row["name"], _function(row)
            functions.setdefault(name, []).append(function)
            names |= names_in(parts_of_function(name, function))
        for row in await fetch(_RELATIONS, news):
            name, relation = row["name"], _relation(row)
            relations[name] = relation
            names |= names_in(parts_of_relation(name, relation))
    return References({name: tuple(same) for name, same in functions.items()}, relations, path), names


def reads_claims(name: str, body: str) -> bool:
    """Whether a function of the schema `auth` says what `policy.facts` does, in one of the forms Supabase has had."""
    return _READER[name].fullmatch(re.sub(r"[\s();]+", "", body).lower()) is not None


def _function(row: Mapping[str, Any]) -> CatalogFunction:
    schema, _, name = row["name"].partition(".")
    is_reader = schema == "auth" and name in AUTH_FUNCTIONS and not row["takes_any"] and row["body"] is not None
    return CatalogFunction(
        language=row["language"],
        volatility=row["volatility"],
        definer=Owner(row["owner"], row["is_exempt"]) if row["has_rights"] else None,
        search_path=row["search_path"],
        body=row["body"],
        arguments=frozenset(row["arguments"]),
        reads_claims=is_reader and reads_claims(name, row["body"]),
        digest=row["digest"],
    )


def _relation(row: Mapping[str, Any]) -> CatalogRelation:
    owner = Owner(row["owner"], row["is_exempt"])
    return CatalogRelation(
        kind=row["kind"],
        owner=owner,
        definer=owner if row["has_rights"] else None,
        is_forced=row["is_forced"],
        is_inherited=row["is_inherited"],
        policies=tuple(row["policies"]),
        body=row["body"],
        digest=row["digest"],
    )


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

# An aggregate's entry in pg_proc looks like an immutable function of Postgres' own. What is Postgres' own needs no
# digest, and its body is nobody's business. A row as text has every column of it.
_FUNCTIONS: Final = """
select n.nspname || '.' || called.name as name,
       case when p.prokind = 'a' and n.nspname <> 'pg_catalog' then 'aggregate' else l.lanname::text end as language,
       p.provolatile::text as volatility,
       p.pronargs > 0 as takes_any,
       coalesce(p.proargnames, '{}') as arguments,
       r.rolname::text as owner,
       r.rolsuper or r.rolbypassrls as is_exempt,
       p.prosecdef as has_rights,
       (select substr(setting, length('search_path=') + 1) from unnest(p.proconfig) as setting
        where starts_with(setting, 'search_path=')) as search_path,
       case when l.lanname = 'sql' and p.prokind = 'f' then
            coalesce('create function f() returns void language sql ' || pg_get_function_sqlbody(p.oid), p.prosrc)
       end as body,
       case when n.nspname <> 'pg_catalog' then
            md5(concat(p, r.rolname, r.rolsuper, r.rolbypassrls, n.nspacl))
       else '' end as digest
from (
  select proname::text as name, pronamespace as namespace, oid as id from pg_proc where proname = any($1::text[])
  union all
  select oprname::text, oprnamespace, oprcode::oid from pg_operator where oprname = any($1::text[])
) as called
join pg_namespace n on n.oid = called.namespace
join pg_proc p on p.oid = called.id
join pg_language l on l.oid = p.prolang
join pg_roles r on r.oid = p.proowner
"""

_RELATIONS: Final = """
select n.nspname || '.' || c.relname as name,
       c.relkind::text as kind,
       r.rolname::text as owner,
       r.rolsuper or r.rolbypassrls as is_exempt,
       c.relkind = 'v' and not coalesce(
           (select option_value::bool from pg_options_to_table(c.reloptions) where option_name = 'security_invoker'),
           false) as has_rights,
       c.relforcerowsecurity as is_forced,
       c.relkind = 'r' and c.relhassubclass as is_inherited,
       case when c.relrowsecurity then
            array(select pg_get_expr(p.polqual, p.polrelid) from pg_policy p
                  where p.polrelid = c.oid and p.polcmd in ('r', '*') and p.polqual is not null
                  order by p.polname)
       else '{}' end as policies,
       case when c.relkind = 'v' and n.nspname not in ('pg_catalog', 'information_schema') then
            pg_get_viewdef(c.oid)
       end as body,
       md5(concat(
           c.oid, c.relkind, c.relowner, c.relacl, c.relrowsecurity, c.relforcerowsecurity, c.relhassubclass,
           c.reloptions, n.nspacl, r.rolname, r.rolsuper, r.rolbypassrls,
           case when c.relkind = 'v' then pg_get_viewdef(c.oid) end,
           array(select (a.attname, a.atttypid, a.atttypmod, a.attacl) from pg_attribute a
                 where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped order by a.attnum),
           array(select (p.polname, p.polpermissive, p.polroles, pg_get_expr(p.polqual, p.polrelid)) from pg_policy p
                 where p.polrelid = c.oid and p.polcmd in ('r', '*') order by p.polname)
       )) as digest
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
join pg_roles r on r.oid = c.relowner
where c.relname = any($1::text[]) and c.relkind in ('r', 'p', 'v', 'm', 'f') and n.nspname !~ '^pg_(temp|toast)'
"""
