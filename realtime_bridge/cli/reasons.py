"""What `realtime-bridge why` does: have the engine of the bridge decide one row for one user, explain it, ask Postgres.

The row is read with the rights of DATABASE_URL, all of it or not at all. A row, or what its policies rest on, may
change between one read and the next: what differs is looked at once more before it is told.
"""

import asyncio
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, NamedTuple, TypeAlias

import asyncpg
import orjson
import typer
from rich.console import Console
from rich.text import Text

from realtime_bridge.change import Change, Column, Entry, Image, Relation
from realtime_bridge.checks.facts import quote
from realtime_bridge.claims import Claims
from realtime_bridge.cli.tail import printable
from realtime_bridge.database import Database
from realtime_bridge.errors import BadRequestError, ConfigurationError, ForbiddenError, NotFoundError
from realtime_bridge.parts import make_policy
from realtime_bridge.policy.asking import Asking
from realtime_bridge.policy.blocks import in_array
from realtime_bridge.policy.case import Case
from realtime_bridge.policy.catalog import CatalogTable
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.policy.explanation import ExplainedPolicy, Explanation, Outcome, Way, explain
from realtime_bridge.policy.predicate import NOTHING
from realtime_bridge.settings import Settings


@dataclass(frozen=True, slots=True)
class Bridge:
    """What the bridge says.

    Attributes:
        live: whether somebody who is connected is sent the row; None if it is not known.
        resumed: whether somebody is who reads on from before it.
        refusal: why nobody with this role gets anything of the table.
        missing: facts of the user that are not known, or fail, without which nothing of the table is shown.
    """

    live: bool | None
    resumed: bool | None
    refusal: str | None
    ways: Sequence[Way]
    missing: Sequence[str]


@dataclass(frozen=True, slots=True)
class Postgres:
    """What a SELECT as the user says; `error`: how it ended instead."""

    visible: bool
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Reasons:
    """All of it, in the form of the JSON document.

    Attributes:
        columns: those that the role may read.
        hidden: the others.
        differ: None if there is nothing to compare: a rule decides, which Postgres does not know.
    """

    table: str
    key: Mapping[str, str]
    user: str | None
    role: str
    columns: Sequence[str]
    hidden: Sequence[str]
    policies: Sequence[ExplainedPolicy]
    bridge: Bridge
    postgres: Postgres
    differ: bool | None


class _Row(NamedTuple):
    """A row and its key; `where` finds it, with these values."""

    case: Case
    where: str
    values: Sequence[str | None]
    key: Mapping[str, str]


def tell(settings: Settings, table: str, key: str, claims: Claims, *, as_json: bool) -> int:
    """Print the reasons: the exit status, which is 1 where the bridge and Postgres differ.

    Raises:
        ConfigurationError: the settings do not suffice.
        BridgeError: there is no such row, or it cannot be looked at.
    """
    if settings.database_url is None:
        raise ConfigurationError("DATABASE_URL is missing: `why` reads the row there, and asks Postgres.")
    if table not in settings.tables:
        raise typer.BadParameter(f"{table} is not one of BRIDGE_TABLES", param_hint="--table")
    if claims.role not in settings.roles:
        raise typer.BadParameter(f"{claims.role} is not one of BRIDGE_ROLES", param_hint="--role")
    logging.getLogger().addHandler(logging.NullHandler())  # what is refused is told once, as a reason
    reasons = asyncio.run(_find(settings, settings.database_url.get_secret_value(), table, key, claims))
    if as_json:
        print(orjson.dumps(asdict(reasons), option=orjson.OPT_INDENT_2).decode())
    else:
        _print(reasons)
    return 1 if reasons.differ else 0


async def _find(settings: Settings, dsn: str, table: str, key: str, claims: Claims) -> Reasons:
    async with Database(dsn, max_size=2) as database:
        reasons = await _look(settings, database, table, key, claims)
        return await _look(settings, database, table, key, claims) if reasons.differ else reasons


async def _look(settings: Settings, database: Database, table: str, key: str, claims: Claims) -> Reasons:
    engine = make_policy(settings, database)
    await engine.prepare()
    decision = engine.decision(table)
    if decision is None:
        raise NotFoundError(f"there is no table {table}")
    described = decision.table
    row = await _read_row(database, described, key, claims)
    together = decision.predicates.get(claims.role, NOTHING)
    rule = settings.policies.get(table)
    explanation = await explain(row.case, rule, Asking(database.transaction, settings.roles), together)
    bridge = await _decide(engine, row.case, explanation)
    postgres = await _ask(database, row)
    granted = described.columns_of.get(claims.role, frozenset())
    return Reasons(
        table=table,
        key=row.key,
        user=claims.subject,
        role=claims.role,
        columns=[column for column in described.columns if column in granted],
        hidden=[column for column in described.columns if column not in granted],
        policies=explanation.policies,
        bridge=bridge,
        postgres=postgres,
        differ=None if rule else any((sees is True) != postgres.visible for sees in (bridge.live, bridge.resumed)),
    )


# -- the row -----------------------------------------------------------------------------------------------------------


async def _read_row(database: Database, table: CatalogTable, key: str, claims: Claims) -> _Row:
    """Read a row as changes bring it.

    Raises:
        NotFoundError: there is none.
        ForbiddenError: the role of DATABASE_URL may not read every row.
        typer.BadParameter: that is no key of this table.
    """
    if not table.key:
        raise NotFoundError(f"{table.name} has no primary key by which to name a row")
    schema, _, name = table.name.partition(".")
    types = [table.declared[column].type for column in table.key]
    values = [in_array(value, type_) for value, type_ in zip(_parse_key(key, table.key), types, strict=True)]
    where = f"from {quote(schema)}.{quote(name)} where " + " and ".join(
        _EQUAL.format(quote(column), place, type_)
        for place, (column, type_) in enumerate(zip(table.key, types, strict=True), 1)
    )
    relation = Relation(schema, name, tuple(Column(n, c.name) for n, c in table.columns.items()), (), full=True)
    try:
        async with database.transaction(readonly=True) as connection:
            await connection.execute("select set_config('row_security', 'off', true)")
            found = await connection.fetchrow(
                f"select {_texts(table.columns)} as image, {_texts(table.key)} as key {where}", *values
            )
    except ForbiddenError:
        raise ForbiddenError(
            f"the role of DATABASE_URL may not read every row of {table.name}: it needs SELECT, and BYPASSRLS unless "
            "it owns the table"
        ) from None
    except BadRequestError as error:
        raise typer.BadParameter(str(error), param_hint="--key") from None
    if found is None:
        raise NotFoundError(f"there is no row of {table.name} with that key")
    image: Image = tuple(found["image"])
    return _Row(Case(table, claims, relation, image), where, values, dict(zip(table.key, found["key"], strict=True)))


def _parse_key(key: str, columns: Sequence[str]) -> list[str]:
    """The values of the key's columns, in their order."""
    if len(columns) == 1:
        return [key]
    parts = re.split(rf",(?=(?:{'|'.join(map(re.escape, columns))})=)", key)
    values = dict(part.split("=", 1) for part in parts if "=" in part)
    if values.keys() != set(columns) or len(parts) != len(columns):
        form = ",".join(f"{column}=…" for column in columns)
        raise typer.BadParameter(f"the primary key is of several columns: {form}", param_hint="--key")
    return [values[column] for column in columns]


def _texts(columns: Iterable[str]) -> str:
    """An array of what the types' output functions write, which a cast to text need not be."""
    return f"array[{', '.join(_TEXT.format(quote(column)) for column in columns)}]::text[]"


# IS NULL holds for a composite value of NULLs, too.
_TEXT: Final = "case when num_nulls({0}) = 0 then format('%s', {0}) end"

_EQUAL: Final = "{0} = (${1}::text::{2}[])[1]"

# -- what is said of it ------------------------------------------------------------------------------------------------


async def _decide(engine: PolicyEngine, case: Case, explanation: Explanation) -> Bridge:
    """What the engine says of a change that brings the row, as the hub asks: of who is present, and of who resumes."""
    change = Change("INSERT", case.relation, None, case.image, 0)
    entry = Entry(1, "this", "previous", change)
    member = engine.join(case.claims)
    await engine.load([member])
    (audience,) = await engine.audience([entry])
    is_doubtful = member in audience.doubtful  # policies read this table themselves: it is asked for alone
    if is_doubtful:
        await engine.load([member])
    (verdict,) = await engine.verdicts([entry], member)
    live = None if member in audience.unknown else member in audience.new
    refusal = engine.refusal(case.relation.name, case.claims)
    return Bridge(verdict.new if is_doubtful else live, verdict.new, refusal, explanation.ways, explanation.missing)


async def _ask(database: Database, row: _Row) -> Postgres:
    """What Postgres shows the user of the row: whatever fails shows nothing.

    Raises:
        ForbiddenError: the login role may not take the user's.
        DatabaseError: Postgres cannot be reached, or took too long.
    """
    async with database.transaction_as(row.case.claims, readonly=True) as connection:
        try:
            return Postgres(bool(await connection.fetchval(f"select exists (select {row.where})", *row.values)))
        except (asyncpg.QueryCanceledError, asyncpg.PostgresConnectionError):
            raise
        except asyncpg.PostgresError as error:
            return Postgres(visible=False, error=f"{error} (SQLSTATE {error.sqlstate})")


# -- telling -----------------------------------------------------------------------------------------------------------

_INDENT: Final = 10
_STYLES: Final = {
    Outcome.TRUE: "green",
    Outcome.FALSE: "yellow",
    Outcome.NULL: "yellow",
    Outcome.NOT_TRUE: "yellow",
    Outcome.UNKNOWN: "bold red",
    Outcome.ERROR: "bold red",
}
_Line: TypeAlias = list[tuple[str, str]]
"""Texts, each with its style."""

_SAYS: Final = {True: "shows it", False: "does not show it", None: "cannot decide it"}


def _print(reasons: Reasons) -> None:
    """What matters most is told last, where a reader of a terminal looks first."""
    console = Console(highlight=False, soft_wrap=True)
    for pieces in _lines(reasons):
        console.print(Text.assemble(*((printable(text), style) for text, style in pieces)))


def _lines(reasons: Reasons) -> Iterator[_Line]:
    key = ", ".join(f"{column}={value}" for column, value in reasons.key.items())
    user = "nobody who is signed in" if reasons.user is None else reasons.user
    yield [(f"{reasons.table} {key}", "bold"), (f" for {user}, role {reasons.role}", "")]
    for policy in reasons.policies:
        yield _policy(policy, reasons.role)
        for part in policy.parts:
            outcome = part.outcome.value.ljust(8)
            yield [(" " * _INDENT, ""), (outcome, _STYLES[part.outcome]), (f"{', '.join(part.ways):<10}{part.sql}", "")]
    hidden = f"; not {', '.join(reasons.hidden)}" if reasons.hidden else ""
    yield _headed("columns", f"{reasons.role} may read {', '.join(reasons.columns) or 'none'}{hidden}")
    yield _headed("bridge", _bridge(reasons.bridge))
    yield _headed("Postgres", _postgres(reasons))
    if reasons.differ:
        shows, hides = ("Postgres", "the bridge") if reasons.postgres.visible else ("the bridge", "Postgres")
        yield [("DIFFERENT ", "bold red"), (f"{shows} shows this row, and {hides} does not", "bold red")]


def _policy(policy: ExplainedPolicy, role: str) -> _Line:
    named = f"{policy.name} ({'permissive' if policy.permissive else 'restrictive'})"
    if not policy.applies:
        return _headed("policy", f"{named} does not apply to {role}")
    if policy.outcome is None:
        return _headed("policy", f"{named} cannot be decided by this bridge: {policy.refused}")
    outcome = (policy.outcome.value, _STYLES[policy.outcome])
    return [*_headed("policy", f"{named} is "), outcome, (f", {_how(policy.ways)}", "")]


def _headed(word: str, text: str) -> _Line:
    return [(word.ljust(_INDENT), "cyan"), (text, "")]


def _how(ways: Sequence[Way]) -> str:
    return f"by {', '.join(ways)}" if ways else "whatever the row"


def _bridge(bridge: Bridge) -> str:
    if bridge.refusal is not None:
        return f"shows nothing of the table: {bridge.refusal}"
    if bridge.missing:
        return f"shows nothing of the table, since it does not know of the user: {', '.join(bridge.missing)}"
    if bridge.live == bridge.resumed:
        return f"{_SAYS[bridge.live]}, {_how(bridge.ways)}"
    return f"{_SAYS[bridge.live]} to who is connected, and {_SAYS[bridge.resumed]} to who resumes"


def _postgres(reasons: Reasons) -> str:
    error = f": {reasons.postgres.error}" if reasons.postgres.error else ""
    unequal = "" if reasons.differ is not None else ", by policies that BRIDGE_POLICIES replaces"
    return _SAYS[reasons.postgres.visible] + error + unequal
