"""For how long an answer of Postgres' holds, and which changes end it: what lies behind the names in its SQL.

A fact or an answer depends on tables: those it names, those that functions in SQL read, and those that the policies of
any of these read. Where all of them are followed, the answer holds until one changes. What cannot be looked into (a
function in another language, a table that is not followed, the clock) makes it hold for a while only.

Layer: pure. May import: policy.dependence, policy.expression, policy.nodes.
Sources: https://www.postgresql.org/docs/current/xfunc-volatility.html; check_enable_rls in rls.c (whose policies
count); FuncnameGetCandidates and RangeVarGetRelid in namespace.c (what a name without a schema means).
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Final, NamedTuple, TypeAlias

import pg_query
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it ships no types

from realtime_bridge.policy.dependence import Dependence, dependence
from realtime_bridge.policy.expression import Reads, UnsupportedExpression
from realtime_bridge.policy.nodes import AUTH_FUNCTIONS, Node, children, parse_value


class Keeping(IntEnum):
    """For how long an answer may be kept: of several things that it depends on, the greatest counts."""

    CLAIMS = 0
    """As long as the claims and the definitions of what it calls are the same."""
    TRACKED = 1
    """Until one of its tables changes."""
    TIMED = 2
    """For a while."""
    VOLATILE = 3
    """Not at all."""


@dataclass(frozen=True)
class Dependencies:
    """What an answer depends on.

    Attributes:
        tables: all that are known; with `TRACKED` these are all there are.
        keyed_by: as in `Query`: a change of such a table concerns those users alone.
        references: as in `Reads`: what an UPDATE of one of the tables has to touch to matter.
        reason: what shortens `keeping` to what it is, for people.
    """

    keeping: Keeping
    tables: frozenset[str]
    keyed_by: frozenset[tuple[str, str]]
    references: frozenset[tuple[str, str]]
    reason: str


class Owner(NamedTuple):
    """The role whose rights a function or a view has. `is_exempt`: a superuser, or one with BYPASSRLS."""

    name: str
    is_exempt: bool


@dataclass(frozen=True)
class CatalogFunction:
    """A function, or the one behind an operator.

    Attributes:
        language: of an aggregate that is not Postgres' own: `aggregate`.
        volatility: as declared: i, s or v. Only of Postgres' own functions and of those in C it is believed.
        definer: None if it has the rights of its caller.
        search_path: None if it has that of its caller.
        body: of a function in SQL: its statements, or a CREATE FUNCTION around them.
        arguments: the names by which its body may call them.
        reads_claims: one of those in the schema `auth`, which says what its name says.
        digest: of all that the catalog says about it.
    """

    language: str
    volatility: str
    definer: Owner | None = None
    search_path: str | None = None
    body: str | None = None
    arguments: frozenset[str] = frozenset()
    reads_claims: bool = False
    digest: str = ""


@dataclass(frozen=True)
class CatalogRelation:
    """A table, or what can be read like one.

    Attributes:
        kind: `pg_class.relkind`.
        definer: of a view; None if it has the rights of its reader.
        is_inherited: whether tables that are not its partitions inherit from it.
        policies: for SELECT, while row security is on.
        body: of a view.
        digest: of all that the catalog says about it.
    """

    kind: str
    owner: Owner
    definer: Owner | None = None
    is_forced: bool = False
    is_inherited: bool = False
    policies: tuple[str, ...] = ()
    body: str | None = None
    digest: str = ""


@dataclass(frozen=True)
class References:
    """What the catalog says about everything that policies may reach, by `schema.name`.

    Attributes:
        functions: all of one name together. Which of them is called is not found out, and so all count.
        path: the schemas in which callers look for a name without one, after pg_catalog.
    """

    functions: Mapping[str, tuple[CatalogFunction, ...]]
    relations: Mapping[str, CatalogRelation]
    path: tuple[str, ...]

    @cached_property
    def claims(self) -> frozenset[str]:
        """The functions of `auth` that say what their names say."""
        return frozenset(
            name for name in AUTH_FUNCTIONS if all(f.reads_claims for f in self.functions.get(f"auth.{name}", ()))
        )

    def dependencies(
        self, reads: Reads, followed: Collection[str], keyed_by: frozenset[tuple[str, str]] = frozenset()
    ) -> Dependencies:
        """What something depends on that reads this.

        Args:
            reads: what its own SQL reads.
            followed: the tables of which every change is known.
            keyed_by: as in `Query`.
        """
        survey = _Survey(self, frozenset(followed))
        survey.run(Dependence(reads, keyed_by, has_collation=False))
        return survey.dependencies

    def digest(self, policies: Iterable[str], table: str) -> str:
        """Of all that policies of a table reach: another one if anything of that is."""
        survey = _Survey(self, frozenset())
        for policy in policies:
            survey.run(part_of(policy, table, self.claims))
        return hashlib.blake2b(repr(sorted(survey.digests)).encode(), digest_size=16).hexdigest()


def names_in(parts: Iterable["Part"]) -> frozenset[str]:
    """The names, without their schemas, of all tables and functions that these parts mention."""
    reads = [part.reads for part in parts if part is not None]
    return frozenset(name.partition(".")[2] for one in reads for name in one.tables | one.functions)


def parts_of_function(
    name: str, function: CatalogFunction, claims: frozenset[str] = AUTH_FUNCTIONS
) -> tuple["Part", ...]:
    """What a function reads; nothing of one that cannot be looked into."""
    return () if function.body is None else _parts_of_body(function.body, name, function.arguments, claims)


def parts_of_relation(
    name: str, relation: CatalogRelation, claims: frozenset[str] = AUTH_FUNCTIONS
) -> tuple["Part", ...]:
    """What a view or a table's policies read."""
    if relation.body is not None:
        return _parts_of_body(relation.body, name, frozenset(), claims)
    return tuple(part_of(policy, name, claims) for policy in relation.policies)


@lru_cache(maxsize=4096)
def part_of(policy: str, table: str, claims: frozenset[str] = AUTH_FUNCTIONS) -> "Part":
    """What an expression over a table reads."""
    try:
        return dependence(parse_value(policy), table, claims)
    except UnsupportedExpression:
        return None


@lru_cache(maxsize=4096)
def _parts_of_body(body: str, name: str, arguments: frozenset[str], claims: frozenset[str]) -> tuple["Part", ...]:
    try:
        statements = [raw.stmt for raw in pg_query.parse(body).stmts]
    except (pg_query.PgQueryError, DecodeError, UnicodeError):
        return (None,)
    return tuple(_part_of_statement(statement, name, arguments, claims) for statement in statements)


def _part_of_statement(statement: Node, name: str, arguments: frozenset[str], claims: frozenset[str]) -> "Part":
    kind = statement.WhichOneof("node")
    if kind == "create_function_stmt":
        statement = statement.create_function_stmt.sql_body
    elif kind != "select_stmt":
        return None
    _resolve(statement, arguments, "")
    try:
        return dependence(statement, name, claims)
    except UnsupportedExpression:
        return None


def _resolve(message: Node, arguments: frozenset[str], table: str | None) -> None:
    """Write a table before each column that can only be one of it, and NULL for each `$1`: what is read is the same.

    Args:
        message: a part of a function's body.
        arguments: names that may mean something else than a column.
        table: the only one that is in sight; empty if there is none yet, None if there are several.
    """
    match message.DESCRIPTOR.name:
        case "SelectStmt" if message.from_clause or message.HasField("with_clause"):
            table = _only_table(message) if table == "" else None
        case "ColumnRef" if table and len(message.fields) == 1:
            name = message.fields[0].string
            if name.sval not in {"", table, *arguments}:  # "": a star
                message.fields.add().string.sval = name.sval
                name.sval = table
        case "Node" if message.WhichOneof("node") == "param_ref":
            message.a_const.isnull = True
    for child in children(message):
        _resolve(child, arguments, table)


def _only_table(select: Node) -> str | None:
    source = select.from_clause[0].range_var if len(select.from_clause) == 1 else None
    if source is None or select.HasField("with_clause"):
        return None
    return source.alias.aliasname or source.relname or None


Part: TypeAlias = Dependence | None
"""What a piece of SQL reads; None if that cannot be told."""


class _Caller(NamedTuple):
    """How a piece of SQL is run.

    Attributes:
        path: where names without a schema are looked for.
        user: whose rights the functions it calls have, if they have their caller's; None for those of whoever asks.
        reader: whose rights count where it reads a table: within a view another one's.
    """

    path: tuple[str, ...]
    user: Owner | None = None
    reader: Owner | None = None


@dataclass
class _Survey:
    """Goes to everything that a piece of SQL reaches."""

    references: References
    followed: frozenset[str]
    keeping: Keeping = Keeping.CLAIMS
    reason: str = "it follows from the claims"
    digests: set[str] = field(default_factory=set)
    _seen: set[tuple[str, _Caller]] = field(default_factory=set)
    _keys: dict[str, frozenset[str]] = field(default_factory=dict)
    _columns: set[tuple[str, str]] = field(default_factory=set)
    _left: list[tuple[Part, str, _Caller]] = field(default_factory=list)

    @property
    def dependencies(self) -> Dependencies:
        keyed_by = frozenset((table, column) for table, columns in self._keys.items() for column in columns)
        return Dependencies(self.keeping, frozenset(self._keys), keyed_by, frozenset(self._columns), self.reason)

    def run(self, part: Part) -> None:
        """Go to everything that this reaches."""
        self._left.append((part, "", _Caller(self.references.path)))
        while self._left:
            self._visit(*self._left.pop())

    def _shorten(self, keeping: Keeping, reason: str) -> None:
        if keeping > self.keeping:
            self.keeping, self.reason = keeping, reason

    def _visit(self, part: Part, of: str, caller: _Caller) -> None:
        if part is None:
            self._shorten(Keeping.TIMED, f"{of} cannot be looked into")
            return
        for name in part.reads.functions:
            self._call(name, caller)
        for name in part.reads.tables:
            self._read(name, part, caller)

    # -- functions

    def _call(self, name: str, caller: _Caller) -> None:
        found = list(_meant(name, caller.path, self.references.functions))
        if not found and name not in _OF_ARGUMENTS:
            self._shorten(Keeping.TIMED, f"{name} is not known")
        for full in found:
            if self._is_new(full, caller):
                for function in self.references.functions[full]:
                    self.digests.add(f"{full} {function.digest}")
                    self._enter(full, function, caller)

    def _enter(self, name: str, function: CatalogFunction, caller: _Caller) -> None:
        if function.reads_claims or name in _OF_ARGUMENTS:
            return
        if function.language in ("internal", "c"):
            self._shorten(_DECLARED[function.volatility], f"{name} is declared {_VOLATILITY[function.volatility]}")
            return
        path = caller.path if function.search_path is None else _schemas(function.search_path)
        if function.body is None or path is None:
            self._shorten(Keeping.TIMED, f"{name} cannot be looked into")
            return
        user = function.definer or caller.user
        for part in parts_of_function(name, function, self.references.claims):
            self._left.append((part, name, _Caller(path, user, user)))

    # -- relations

    def _read(self, name: str, part: Dependence, caller: _Caller) -> None:
        table = next(_meant(name, caller.path, self.references.relations), None)
        if table is None:
            self._shorten(Keeping.TIMED, f"{name} is not known")
            return
        relation = self.references.relations[table]
        if relation.kind in ("r", "p"):
            keys = frozenset(column for keyed, column in part.keyed_by if keyed == name)
            known = self._keys.get(table, keys)
            self._keys[table] = known | keys if known and keys else frozenset()
            self._columns |= {(table, column) for read, column in part.reads.references if read == name}
        if self._is_new(table, caller):
            self.digests.add(f"{table} {relation.digest}")
            self._open(table, relation, caller)

    def _open(self, table: str, relation: CatalogRelation, caller: _Caller) -> None:
        parts = parts_of_relation(table, relation, self.references.claims)
        if relation.kind == "v" and parts:
            reader = relation.definer or caller.reader
            self._left += [(part, table, caller._replace(reader=reader)) for part in parts]
            return
        if relation.kind not in ("r", "p") or relation.is_inherited or table not in self.followed:
            self._shorten(Keeping.TIMED, f"{table} is not followed")
        self._shorten(Keeping.TRACKED, f"{table} is followed")
        if not _is_exempt(caller.reader, relation):
            for part in parts:
                self._columns |= {(table, column) for column in _own_columns(part)}
                self._left.append((part, f"a policy of {table}", caller))

    def _is_new(self, name: str, caller: _Caller) -> bool:
        news = (name, caller) not in self._seen
        self._seen.add((name, caller))
        return news


def _meant(name: str, path: tuple[str, ...], known: Collection[str]) -> Iterator[str]:
    """What a name may mean, the likeliest first; a name without a schema is written as one of pg_catalog."""
    schema, _, bare = name.partition(".")
    schemas = ("pg_catalog", *path) if schema == "pg_catalog" else (schema,)
    return (full for one in schemas if (full := f"{one}.{bare}") in known)


def _own_columns(part: Part) -> frozenset[str]:
    """The columns that a policy reads of its table; `*` if they may be any."""
    if part is None or part.reads.names:
        return frozenset("*")
    return part.reads.columns


def _is_exempt(reader: Owner | None, relation: CatalogRelation) -> bool:
    """Whether a table's policies do not count for whoever reads it."""
    return reader is not None and (reader.is_exempt or (reader == relation.owner and not relation.is_forced))


def _schemas(search_path: str) -> tuple[str, ...] | None:
    """The schemas of a search path; None if one of them depends on the role."""
    names = tuple(name.strip().strip('"') for name in search_path.split(","))
    return None if "$user" in names else names


_VOLATILITY: Final = {"i": "immutable", "s": "stable", "v": "volatile"}
_DECLARED: Final = {"i": Keeping.CLAIMS, "s": Keeping.TIMED, "v": Keeping.VOLATILE}
"""What is believed of functions that are part of Postgres, or that only a superuser can make."""

_OF_ARGUMENTS: Final = frozenset(
    f"pg_catalog.{name}"
    for name in (  # noqa: SIM905 - a list of words is read as one
        "array_to_json array_to_string concat concat_ws current_catalog current_database current_role current_setting "
        "current_user date date_part date_trunc extract format generate_series interval isfinite json_agg "
        "json_build_array json_build_object json_object_agg json_populate_record json_to_record json_to_recordset "
        "jsonb_agg jsonb_build_array jsonb_build_object jsonb_object_agg jsonb_populate_record jsonb_to_record "
        "jsonb_to_recordset overlaps pg_typeof phraseto_tsquery plainto_tsquery quote_literal quote_nullable "
        "row_to_json string_agg text time timestamp timestamptz timetz timezone to_char to_date to_json to_jsonb "
        "to_number to_timestamp to_tsquery to_tsvector user websearch_to_tsquery"
    ).split()
)
"""Declared stable for the sake of settings that the bridge pins, or of the role: what they say follows from that."""
