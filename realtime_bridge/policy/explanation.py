"""Tells how each policy of a table is decided, and for one user and row what it and its parts come to.

Nothing is decided in another way for that: a policy is decided as if it were the table's only one, for somebody who may
read every column, and a part of it as if it were a policy. So what is told comes from the same reading, compiling and
asking as the verdict on all of them together.

Layer: adapters. May import: words, policy.*.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, NamedTuple

from realtime_bridge.policy.blocks import identifier
from realtime_bridge.policy.case import Case, Known, learn
from realtime_bridge.policy.catalog import CatalogPolicy, CatalogTable
from realtime_bridge.policy.compiler import compile_expression
from realtime_bridge.policy.decision import RULE, Surveying, decide, read_policies
from realtime_bridge.policy.expression import (
    And,
    Asked,
    Column,
    Expression,
    Is,
    Leaf,
    Not,
    Or,
    queries_of,
)
from realtime_bridge.policy.knowledge import Asking
from realtime_bridge.policy.predicate import NOTHING, Conjunct, Literal, Predicate, all_hold

_READER: Final = "reader"


class Way(StrEnum):
    """How something is decided, the cheapest way first."""

    INDEX = "index"
    """A value of the row is looked up among those of all users."""
    FACT = "fact"
    """It is known of the user, or compared with what is."""
    ROW = "row"
    """It is read from the row, once for everybody."""
    DATABASE = "database"
    """Postgres is asked about the row."""


class Outcome(StrEnum):
    """What a policy, or a part of one, comes to."""

    TRUE = "TRUE"
    FALSE = "FALSE"
    NULL = "NULL"
    NOT_TRUE = "not TRUE"
    """FALSE or NULL, which are the same to who reads, or nothing since Postgres fails to evaluate a part."""
    UNKNOWN = "unknown"
    """The bridge does not know it: a claim that only Postgres could read, no answer in time."""
    ERROR = "error"
    """Postgres fails to evaluate it."""


# -- how policies are decided ------------------------------------------------------------------------------------------


class Alone(NamedTuple):
    """A policy, or the rule that stands in place of all of them, decided as if it were the only one.

    Attributes:
        refused: the part that cannot be decided; None if all can.
    """

    policy: CatalogPolicy
    predicate: Predicate
    refused: str | None

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways in which its parts are decided; none if it is the same for every row and user."""
        return _ways(self.predicate.conjuncts)


async def decide_each(table: CatalogTable, rule: str | None, roles: Collection[str], asking: Surveying) -> list[Alone]:
    """Decide each policy by itself.

    Args:
        table: as the catalog describes it.
        rule: used instead of its policies.
        roles: those that may connect: a rule is for all of them.
        asking: asks Postgres what cannot be decided in memory.

    Raises:
        UnsupportedExpression: the rule cannot be decided.
        DatabaseError: Postgres could not be asked.
    """
    found: list[Alone] = []
    for policy in _policies(table, rule, roles):
        only = replace(
            table,
            row_security=True,
            policies=(replace(policy, permissive=True, roles=frozenset({_READER})),),
            granted=frozenset({_READER}),
            columns_of={_READER: frozenset(table.columns)},
            exempt=frozenset(),
        )
        decision = await decide(only, [_READER], rule=rule, asking=asking)
        refusal = decision.refusals.get(_READER)  # without a part: no row can ever be seen by it
        predicate = decision.predicates.get(_READER, NOTHING)
        found.append(Alone(policy, predicate, refusal.part or None if refusal else None))
    return found


def _policies(table: CatalogTable, rule: str | None, roles: Collection[str]) -> tuple[CatalogPolicy, ...]:
    return table.policies if rule is None else (CatalogPolicy(RULE, True, rule, frozenset(roles)),)


def _ways(conjuncts: Iterable[Conjunct]) -> tuple[Way, ...]:
    found = {_way(literal) for conjunct in conjuncts for literal in conjunct}
    return tuple(way for way in Way if way in found)


def _way(literal: Literal) -> Way:
    if literal.is_asked:
        return Way.DATABASE
    if literal.key is not None:
        return Way.INDEX
    return Way.ROW if literal.of_row else Way.FACT


# -- what they come to -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExplainedPart:
    """A condition that a policy consists of; `ways` as in `ExplainedPolicy`."""

    sql: str
    outcome: Outcome
    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True)
class ExplainedPolicy:
    """A policy for a user and a row.

    Attributes:
        applies: whether it counts for the user's role; what it comes to is not looked at if not.
        refused: the part that cannot be decided; None if all can.
        ways: how it was decided: those alternatives that hold, or all of them if none does.
    """

    name: str
    permissive: bool
    applies: bool
    sql: str
    refused: str | None = None
    outcome: Outcome | None = None
    ways: tuple[Way, ...] = ()
    parts: tuple[ExplainedPart, ...] = ()


class Explanation(NamedTuple):
    """What all policies of a table come to.

    Attributes:
        ways: how it was decided by all of them together.
        missing: what is not known of the user, or fails; whoever needs it sees nothing of the table.
    """

    policies: list[ExplainedPolicy]
    ways: tuple[Way, ...]
    missing: list[str]


async def explain(case: Case, rule: str | None, asking: Asking, together: Predicate = NOTHING) -> Explanation:
    """Explain the policies of a table, one by one.

    Args:
        case: the user and the row.
        rule: used instead of the table's policies.
        asking: asks Postgres what cannot be decided in memory.
        together: what all policies of the user's role come to together.

    Raises:
        UnsupportedExpression: the rule cannot be decided.
        DatabaseError: Postgres could not be asked.
    """
    role = case.claims.role
    each = await decide_each(case.table, rule, [role], asking)
    applying = [one for one in each if role in one.policy.roles and not one.refused]
    trials = await _trials(case.table, rule, {one.policy.name for one in applying}, asking)
    parts = [predicate for own in trials.values() for trial in own for predicate in trial[1:]]
    predicates = [together, *(one.predicate for one in applying), *parts]
    look = _Look(case, await learn(case, predicates, asking))
    policies = [look.explained(one, trials.get(one.policy.name)) for one in each]
    return Explanation(policies, look.ways(together), look.missing(together))


class _Trial(NamedTuple):
    """A part of a policy, as what sees the row if the part is TRUE, FALSE, or NULL."""

    sql: str
    true: Predicate
    false: Predicate
    null: Predicate


async def _trials(
    table: CatalogTable, rule: str | None, names: Collection[str], asking: Surveying
) -> dict[str, list[_Trial]]:
    """The parts of policies of these names."""
    read, _ = read_policies(table, rule, is_asking=True)
    parts = {policy.name: dict(_parts_of(policy.expression)) for policy in read if policy.name in names}
    types = await asking.types({query for own in parts.values() for part in own.values() for query in queries_of(part)})

    def compiled(part: Expression, truth: bool | None) -> Predicate:
        return compile_expression(Is(part, truth), table.columns, types, hidden=table.generated)

    return {
        name: [_Trial(sql, *(compiled(part, truth) for truth in (True, False, None))) for sql, part in own.items()]
        for name, own in parts.items()
    }


def _parts_of(expression: Expression) -> Iterator[tuple[str, Expression]]:
    """What an expression is joined of, as SQL; constants are left out."""
    match expression:
        case Not(inner) | Is(inner):
            yield from _parts_of(inner)
        case And(parts) | Or(parts):
            for part in parts:
                yield from _parts_of(part)
        case Leaf(_, asked) | (Asked() as asked):
            yield asked.sql, expression
        case Column(name):
            yield identifier(name), expression


class _Look(NamedTuple):
    """What predicates come to."""

    case: Case
    known: Known

    def sees(self, predicate: Predicate) -> bool | None:
        """Whether the user sees the row by it; None if something that it needs is not known."""
        names = {fact.sql for fact in predicate.facts}
        if names & self.known.failed:
            return False
        if names & self.known.absent:
            return None
        return predicate.evaluate(self.case.relation.index, self.case.image, self.known.facts)

    def ways(self, predicate: Predicate) -> tuple[Way, ...]:
        """How it was decided: the alternatives that hold, or all of them if none does."""
        index, image = self.case.relation.index, self.case.image
        holding = [one for one in predicate.conjuncts if all_hold(one, index, image, self.known.facts)]
        return _ways(holding or predicate.conjuncts)

    def missing(self, predicate: Predicate) -> list[str]:
        """The facts that are not known, or failed."""
        return sorted({fact.sql for fact in predicate.facts} & (self.known.absent | self.known.failed))

    def explained(self, one: Alone, trials: Collection[_Trial] | None) -> ExplainedPolicy:
        """A policy with its parts; without trials it is not looked at."""
        policy = one.policy
        found = ExplainedPolicy(
            policy.name,
            policy.permissive,
            self.case.claims.role in policy.roles,
            policy.expression or "",
            one.refused,
        )
        if trials is None:
            return found
        words = {True: Outcome.TRUE, False: Outcome.NOT_TRUE, None: Outcome.UNKNOWN}
        return replace(
            found,
            outcome=words[self.sees(one.predicate)],
            ways=self.ways(one.predicate),
            parts=tuple(ExplainedPart(trial.sql, self._outcome(trial), self.ways(trial.true)) for trial in trials),
        )

    def _outcome(self, trial: _Trial) -> Outcome:
        truths = {
            Outcome.TRUE: self.sees(trial.true),
            Outcome.FALSE: self.sees(trial.false),
            Outcome.NULL: self.sees(trial.null),
        }
        if None in truths.values():
            return Outcome.UNKNOWN
        return next((word for word, truth in truths.items() if truth), Outcome.ERROR)
