"""A table as it is decided now: what its description comes to, and the members sorted by that.

Layer: adapters (it does no I/O). May import: words, policy.*.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from realtime_bridge.change import Relation
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.compiler import ColumnType, compile_expression
from realtime_bridge.policy.decision import CANNOT_DECIDE, Decision, Refusal
from realtime_bridge.policy.expression import Asked, Expression, Fact, Query, UnsupportedExpression, facts_of
from realtime_bridge.policy.facts import digest_of
from realtime_bridge.policy.index import AudienceIndex

logger = logging.getLogger(__name__)

_MAX_RELATIONS: Final = 16


class Decider(NamedTuple):
    """What decides the images of one relation. It does not fit if it needs columns that the relation lacks."""

    audiences: AudienceIndex | None
    fits: bool = True


@dataclass(eq=False, slots=True)
class Table:
    """A table as it is decided now.

    Attributes:
        rule: used instead of policies, as it was read where there is no database.
        decision: None if there is none that holds.
        index: the members, sorted by what the decision says.
        deciders: by relation version; bounded, the oldest goes first.
        asked: what Postgres is asked about rows.
        doubtful: `index` may be out of date, and whoever it serves is told so instead of being shown anything.
        last_digest: `digest`, or, while it is doubtful, what that was before.
    """

    name: str
    rule: Expression | None = None
    decision: Decision | None = None
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    index: AudienceIndex | None = None
    deciders: dict[str, Decider] = field(default_factory=dict)
    asked: frozenset[Asked] = frozenset()
    doubtful: bool = False
    last_digest: str | None = None

    @property
    def digest(self) -> str | None:
        """Of the description that the decision was made of."""
        return None if self.decision is None else self.decision.digest

    @property
    def facts(self) -> frozenset[Fact]:
        """What must be known of members."""
        if self.index is not None:
            return self.index.facts
        return frozenset() if self.rule is None else facts_of(self.rule)

    @property
    def indexes(self) -> set[AudienceIndex]:
        """Every index that members must be sorted into."""
        found = {self.index, *(decider.audiences for decider in self.deciders.values())}
        return {index for index in found if index is not None}

    def adopt(self, decision: Decision) -> None:
        """Decide by this from now on. Members are to be sorted in anew."""
        self.decision = decision
        self.last_digest = decision.digest
        self.refusals = decision.refusals
        self.index = AudienceIndex(decision.predicates, _names(decision.table.columns))
        self.asked = frozenset[Asked]().union(*(predicate.asked for predicate in decision.predicates.values()))
        self.deciders.clear()
        self.doubtful = False
        self._log()

    def refuse(self, roles: Collection[str], refusal: Refusal) -> None:
        """Show nothing to anybody, for a reason."""
        refusals = dict.fromkeys(sorted(roles), refusal)
        if refusals == self.refusals and self.index is None:
            return
        self.refusals = refusals
        self.index = self.decision = self.last_digest = None
        self.doubtful = False
        self.asked = frozenset()
        self.deciders.clear()
        self._log()

    def doubt(self, roles: Collection[str]) -> None:
        """Show nothing until it has been described again."""
        self.refusals = dict.fromkeys(sorted(roles), Refusal(f"the policies of {self.name} cannot be read now"))
        self.decision = None
        self.deciders.clear()
        self.doubtful = True

    def decider(self, relation: Relation, roles: Collection[str], members: Callable[[], Iterable[Member]]) -> Decider:
        """What decides the images of a relation; `members` gives those to be sorted into an index made for it."""
        decider = self.deciders.get(relation.version)
        if decider is None:
            if len(self.deciders) >= _MAX_RELATIONS:
                del self.deciders[next(iter(self.deciders))]
            decider = self.deciders[relation.version] = self._decide(relation, roles)
            if decider.audiences is not None and decider.audiences is not self.index:
                for member in members():
                    decider.audiences.add(member)
        return decider

    def _decide(self, relation: Relation, roles: Collection[str]) -> Decider:
        if self.index is not None:
            fits = not self.doubtful and self.index.fits(relation)
            if not (fits or self.doubtful):
                logger.warning("changes lack columns that policies need", extra={"table": self.name})
            return Decider(self.index, fits)
        if self.rule is None:
            return Decider(None)
        types = {column.name: ColumnType(column.type) for column in relation.columns}
        try:
            predicate = compile_expression(self.rule, types)
        except UnsupportedExpression as error:
            self.refuse(roles, Refusal(CANNOT_DECIDE.format(self.name), "BRIDGE_POLICIES", error.part))
            return Decider(None)
        self.refusals = {}
        return Decider(AudienceIndex(dict.fromkeys(roles, predicate), _names(types)))

    def digest_for(self, member: Member, is_followed: Callable[[Query], bool]) -> str:
        """A digest of what decides what a member sees, as `Policy.digest`."""
        if self.doubtful:
            return ""
        role, decision = member.claims.role, self.decision
        rights, how = "", repr(self.rule)
        if decision is not None:
            rights, how = decision.table.digest, decision.digest  # a rule, or a distrust, is of this process alone
        alone, followed = dict[str, object](), dict[str, object]()
        for fact in self.facts:
            if fact.sql in member.facts:
                kind = followed if isinstance(fact, Query) and is_followed(fact) else alone
                kind[fact.sql] = member.facts[fact.sql]
        return f"{digest_of(rights)}.{digest_of(how, self.refusals.get(role), alone)}.{digest_of(followed)}"

    def _log(self) -> None:
        for refusal in dict.fromkeys(self.refusals.values()):
            roles = [role for role, reason in self.refusals.items() if reason == refusal]
            details = {"table": self.name, "roles": roles, "policy": refusal.policy, "part": refusal.part}
            logger.warning("a table is not delivered", extra={"reason": refusal.reason, **details})


def _names(types: Mapping[str, ColumnType]) -> dict[str, str]:
    return {name: column.name for name, column in types.items()}
