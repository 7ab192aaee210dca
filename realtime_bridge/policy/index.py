"""Which of the present members see a row, found in time proportional to their number.

A table's predicates (one a role) fall apart into *branches*: conjuncts, each with the roles it serves. What a branch
asks of the user alone is answered once, when a member joins; what it asks of the row alone, once a row; and of the
equalities between column and fact the first is a dictionary from the fact's value to members. What is left is asked of
the few members that remain. A branch that several roles share is one, so a public row's audience is one set for all.

Layer: adapters (it does no I/O). May import: words, policy.base, policy.expression, policy.predicate.
Sources: the equality index of ElectricSQL's shape filter.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Final, NamedTuple

from realtime_bridge.change import ABSENT, Image, Relation
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.expression import Fact
from realtime_bridge.policy.predicate import Conjunct, Literal, Predicate, all_hold

Members = Set[Member]

_NOBODY: Final[frozenset[Member]] = frozenset()
_NO_INDEX: Final[Mapping[str, int]] = {}


class Seen(NamedTuple):
    """Who sees a row for certain, and who might; both may hold a member."""

    sure: Members = _NOBODY
    perhaps: Members = _NOBODY


class AudienceIndex:
    """The members present, as one table's predicates sort them.

    Args:
        predicates: role → predicate; a role that is missing sees nothing.
        types: column → type, as the predicates were compiled for; in column order.

    Attributes:
        facts: what a member must know before it is added.
        members: those who may see any row at all.
    """

    def __init__(self, predicates: Mapping[str, Predicate], types: Mapping[str, str]) -> None:
        self._predicates = predicates
        self._columns = {column: types[column] for p in predicates.values() for column in p.columns}
        self._order = {column: i for i, column in enumerate(types)}
        conjuncts = {conjunct: None for p in predicates.values() for conjunct in p.conjuncts}
        self._branches = {conjunct: _Branch(conjunct) for conjunct in conjuncts}
        self.facts: frozenset[Fact] = frozenset().union(*(p.facts for p in predicates.values()))
        self.members: set[Member] = set()

    def fits(self, relation: Relation) -> bool:
        """Whether a relation has the columns that the predicates need, of the types they were compiled for.

        In another order they are others: two that have taken each other's names since, or one that was made anew.
        """
        types = {column.name: column.type for column in relation.columns}
        order = [self._order[name] for name in types if name in self._order]
        return order == sorted(order) and all(types.get(name) == type_ for name, type_ in self._columns.items())

    def add(self, member: Member) -> None:
        """Sort a member in; its facts must be there."""
        if self.admits(member):
            self.members.add(member)
            for branch in self._branches_of(member):
                branch.add(member)

    def discard(self, member: Member) -> None:
        """Take a member out; its facts must be those it was added with."""
        if member in self.members:
            self.members.discard(member)
            for branch in self._branches_of(member):
                branch.discard(member)

    def admits(self, member: Member) -> bool:
        """Whether a member may see any row at all: its role is served, and every fact that is read is known.

        Where one fact is not, Postgres may fail any query of that user: it does not say in which order it evaluates.
        """
        predicate = self._predicates.get(member.claims.role)
        return predicate is not None and all(
            member.facts.get(fact.sql, ABSENT) is not ABSENT for fact in predicate.facts
        )

    def seen(self, relation: Relation, image: Image) -> Seen:
        """Who of the members sees an image. The sets may be the index's own."""
        sure: list[Members] = []
        perhaps: list[Members] = []
        for branch in self._branches.values():
            seen = branch.seen(relation.index, image)
            if seen.sure:
                sure.append(seen.sure)
            if seen.perhaps:
                perhaps.append(seen.perhaps)
        return Seen(union(sure), union(perhaps))

    def sees(self, member: Member, relation: Relation, image: Image) -> bool | None:
        """Whether one member that is admitted sees an image; it need not be present."""
        return self._predicates[member.claims.role].evaluate(relation.index, image, member.facts)

    def _branches_of(self, member: Member) -> Iterator["_Branch"]:
        for conjunct in self._predicates[member.claims.role].conjuncts:
            yield self._branches[conjunct]


class _Branch:
    """One conjunct and the members for whom all that it asks of the user holds."""

    def __init__(self, conjunct: Conjunct) -> None:
        self._of_user = [literal for literal in conjunct if literal.of_user]
        self._of_row = [literal for literal in conjunct if literal.of_row]
        of_both = [literal for literal in conjunct if not (literal.of_user or literal.of_row)]
        keyed = sorted((literal for literal in of_both if literal.key), key=lambda literal: literal.key or ("", ""))
        self._key = keyed[0].key if keyed else None
        self._rest: list[Literal] = [literal for literal in of_both if not keyed or literal is not keyed[0]]
        self._members: set[Member] = set()
        self._by_value: dict[str, set[Member]] = {}

    def _value(self, member: Member) -> str | None:
        """The value a member is found by; members of a branch without a key are all found by the same."""
        if self._key is None:
            return ""
        value = member.facts[self._key[1]]
        return value if isinstance(value, str) else None

    def add(self, member: Member) -> None:
        value = self._value(member)
        if value is not None and all_hold(self._of_user, _NO_INDEX, (), member.facts):
            self._members.add(member)
            self._by_value.setdefault(value, set()).add(member)

    def discard(self, member: Member) -> None:
        if member not in self._members:
            return
        self._members.discard(member)
        value = self._value(member) or ""
        self._by_value[value].discard(member)
        if not self._by_value[value]:
            del self._by_value[value]

    def seen(self, index: Mapping[str, int], image: Image) -> Seen:
        holds = all_hold(self._of_row, index, image, {})
        if holds is False:
            return Seen()
        value = "" if self._key is None else image[index[self._key[0]]]
        if value is None:
            return Seen()
        candidates: Members
        if value is ABSENT:
            holds, candidates = None, self._members
        else:
            candidates = self._by_value.get(value, _NOBODY)
        seen = self._ask(candidates, index, image) if self._rest else Seen(candidates)
        return seen if holds else Seen(_NOBODY, union([seen.sure, seen.perhaps]))

    def _ask(self, candidates: Members, index: Mapping[str, int], image: Image) -> Seen:
        verdicts = {member: all_hold(self._rest, index, image, member.facts) for member in candidates}
        return Seen(
            {member for member, verdict in verdicts.items() if verdict},
            {member for member, verdict in verdicts.items() if verdict is None},
        )


def union(sets: Iterable[Members]) -> Members:
    """The union; the largest of the sets itself if it holds all the others."""
    result: Members = _NOBODY
    for members in sorted(sets, key=len, reverse=True):
        if not members <= result:
            result = result | members if result else members
    return result
