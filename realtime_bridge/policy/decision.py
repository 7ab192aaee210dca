"""What a table's policies come to, for each role that may connect: a predicate, or a refusal with its reason.

Layer: adapters. May import: words, policy.*.
Sources: get_row_security_policies (rowsecurity.c): permissive policies are joined by OR, restrictive ones by AND.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from realtime_bridge.policy.catalog import CatalogTable
from realtime_bridge.policy.compiler import compile_expression
from realtime_bridge.policy.expression import And, Expression, Or, Query, UnsupportedExpression, queries_of
from realtime_bridge.policy.facts import digest_of
from realtime_bridge.policy.predicate import EVERYTHING, Predicate, all_of, any_of, asked_together
from realtime_bridge.policy.reading import ask_whole, parse_expression

RULE: Final = "BRIDGE_POLICIES"
"""In place of a policy's name where a rule stands in place of all of them."""
CANNOT_DECIDE: Final = "the policies of {} cannot be decided by this bridge; its log says which part"


class Refusal(NamedTuple):
    """Why a role gets nothing of a table. Clients are told the reason, never a policy's text."""

    reason: str
    policy: str = ""
    part: str = ""


class Surveying(Protocol):
    """Tells what queries are, as `policy.asking` does. It may raise `DatabaseError`."""

    async def types(self, queries: Collection[Query]) -> Mapping[str, str | None]:
        """The name of each query's type by its SQL; None if Postgres does not understand it by itself."""
        ...


class Part(NamedTuple):
    """One policy, or the rule that stands in their place, as it was read.

    Attributes:
        roles: those it applies to; None for all.
    """

    name: str
    permissive: bool
    sql: str
    expression: Expression
    roles: frozenset[str] | None = None


@dataclass(frozen=True)
class Decision:
    """What the catalog's description of a table comes to.

    Attributes:
        digest: of the description, and of how it was decided.
        table: the description.
        predicates: by role; each role has one of these or a refusal.
        columns: role → the columns that it may read, in column order, where it may not read the table as a whole.
    """

    digest: str
    table: CatalogTable
    predicates: Mapping[str, Predicate]
    refusals: Mapping[str, Refusal]
    columns: Mapping[str, tuple[str, ...]]


async def decide(
    table: CatalogTable,
    roles: Collection[str],
    *,
    rule: str | None = None,
    asking: Surveying | None = None,
    whole: bool = False,
) -> Decision:
    """Decide a table for some roles.

    Args:
        table: as the catalog describes it.
        roles: those that may connect.
        rule: used instead of its policies.
        asking: can be asked what is not decided in memory; without it that refuses the table.
        whole: leave every policy to Postgres as a whole.

    Raises:
        UnsupportedExpression: the rule cannot be decided.
        DatabaseError: Postgres could not be asked.
    """
    parts, refused = read_policies(table, rule, is_asking=asking is not None, whole=whole)
    queries = sorted({query for part in parts for query in queries_of(part.expression)}, key=lambda query: query.sql)
    types = None if asking is None else await asking.types(queries)
    decided = {role: _decide(role, table, rule, parts, refused, types) for role in sorted(roles)}
    predicates = {role: found for role, found in decided.items() if isinstance(found, Predicate)}
    return Decision(
        digest_of(table.digest, rule, whole),
        table,
        predicates,
        {role: found for role, found in decided.items() if isinstance(found, Refusal)},
        {role: _readable(role, table) for role in decided if role not in table.granted},
    )


def read_policies(
    table: CatalogTable, rule: str | None, *, is_asking: bool, whole: bool = False
) -> tuple[list[Part], dict[str, UnsupportedExpression]]:
    """The policies that can be read, and why others cannot, by name.

    Raises:
        UnsupportedExpression: the rule cannot be read.
    """
    if rule is not None:
        return [Part(RULE, True, rule, _expression(table, rule, is_asking, whole, is_rule=True))], {}
    parts: list[Part] = []
    refused: dict[str, UnsupportedExpression] = {}
    for policy in table.policies:
        sql = policy.expression or ""
        try:
            expression = _expression(table, sql, is_asking, whole, is_rule=False)
        except UnsupportedExpression as error:
            refused[policy.name] = error
        else:
            parts.append(Part(policy.name, policy.permissive, sql, expression, policy.roles))
    return parts, refused


def _expression(table: CatalogTable, sql: str, is_asking: bool, whole: bool, *, is_rule: bool) -> Expression:
    if whole:
        return ask_whole(sql, table.name)
    if is_rule:
        return parse_expression(sql, table=table.name, asking=is_asking)
    return parse_expression(sql, table=table.name, claims=table.readers, asking=is_asking)


def _decide(
    role: str,
    table: CatalogTable,
    rule: str | None,
    parts: Iterable[Part],
    refused: Mapping[str, UnsupportedExpression],
    types: Mapping[str, str | None] | None,
) -> Predicate | Refusal:
    """What a role sees of a table."""
    if (reason := _closed(role, table)) is not None:
        return Refusal(reason)
    if rule is None:
        if not table.row_security:
            return Refusal(f"{table.name} has no row-level security, and BRIDGE_POLICIES has no rule for it")
        if role in table.exempt:
            return EVERYTHING
        for policy in table.policies:
            if role in policy.roles and policy.name in refused:
                return Refusal(CANNOT_DECIDE.format(table.name), policy.name, refused[policy.name].part)
    applying = [part for part in parts if part.roles is None or role in part.roles]
    try:
        predicate = _combine(applying, table, types)
    except UnsupportedExpression as error:
        if rule is not None:
            raise
        return Refusal(CANNOT_DECIDE.format(table.name), "", error.part)
    return predicate if predicate.conjuncts else Refusal(f"no policy of {table.name} shows role {role} any row")


def _closed(role: str, table: CatalogTable) -> str | None:
    """Why a role's grants let it read nothing of a table."""
    readable = _readable(role, table)
    if not readable:
        return f"role {role} may not read {table.name}"
    if not set(table.key) <= set(readable):
        return f"role {role} may not read the primary key of {table.name}"
    return None


def _readable(role: str, table: CatalogTable) -> tuple[str, ...]:
    granted = table.columns_of.get(role, frozenset())
    return tuple(column for column in table.columns if column in granted)


def _combine(parts: Sequence[Part], table: CatalogTable, types: Mapping[str, str | None] | None) -> Predicate:
    """One permissive policy must hold, and every restrictive one.

    Args:
        parts: those that apply to the role.
        table: as the catalog describes it.
        types: of queries; None if Postgres cannot be asked anything.

    Raises:
        UnsupportedExpression: there are too many alternatives, or something that Postgres would have to be asked.
    """

    def compiled(expression: Expression) -> Predicate:
        return compile_expression(expression, table.columns, types or {}, hidden=table.generated)

    permissive = [part for part in parts if part.permissive]
    restrictive = [part for part in parts if not part.permissive]
    try:
        some = asked_together(any_of(compiled(part.expression) for part in permissive))
        return all_of([some, *(compiled(part.expression) for part in restrictive)])
    except UnsupportedExpression:
        if types is None:
            raise
    one = Or(tuple(ask_whole(part.sql, table.name) for part in permissive))
    return compiled(And((one, *(ask_whole(part.sql, table.name) for part in restrictive))))
