"""Which of the present members see a row, found in time proportional to their number.

A table's predicates (one a role) fall apart into *branches*: conjuncts, each with the roles it serves. What a branch
asks of the user alone is answered once, when a member joins; what it asks of the row alone, once a row; and of the
equalities between row and fact the first is a dictionary from the fact's values to members. What is left is asked of
the few members that remain. A branch that several roles share is one, so a public row's audience is one set for all.

What Postgres has to decide is looked up among its answers. Where one is missing the verdict is unknown and a question
is left open: the engine has `open_questions` answered and looks again.

Layer: adapters (it does no I/O). May import: words, policy.base, policy.expression, policy.predicate.
Sources: the equality index of ElectricSQL's shape filter.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from functools import partial
from typing import Final, NamedTuple

from realtime_bridge.change import ABSENT, Absent, Image, Relation, Value
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.expression import Asked, Fact
from realtime_bridge.policy.predicate import (
    Conjunct,
    Key,
    Memo,
    Predicate,
    Truth,
    Values,
    all_hold,
    in_order,
    values_of,
)

Members = Set[Member]

_NOBODY: Final[frozenset[Member]] = frozenset()
_NO_INDEX: Final[Mapping[str, int]] = {}
_NO_MEMOS: Final[Mapping[str, Memo]] = {}


class Seen(NamedTuple):
    """Who sees a row for certain, and who might; both may hold a member."""

    sure: Members = _NOBODY
    perhaps: Members = _NOBODY


class Question(NamedTuple):
    """Something to ask Postgres.

    Attributes:
        member: whose role and claims count; None if the answer is the same for all.
        values: of `asked.columns`, in their order.
    """

    asked: Asked
    member: Member | None
    values: tuple[Value, ...]


class AudienceIndex:
    """The members present, as one table's predicates sort them.

    Args:
        predicates: role → predicate; a role that is missing sees nothing.
        types: column → type, as the predicates were compiled for; in column order.

    Attributes:
        facts: what a member must know before it is added.
        members: those who may see any row at all.
        shared: `Asked.name` → answers, of what does not depend on the user. Those of what does are in `Member.facts`,
            new whenever the member is added.
    """

    def __init__(self, predicates: Mapping[str, Predicate], types: Mapping[str, str]) -> None:
        self._predicates = predicates
        self._columns = {column: types[column] for p in predicates.values() for column in p.columns}
        self._order = {column: i for i, column in enumerate(types)}
        conjuncts = {conjunct: None for p in predicates.values() for conjunct in p.conjuncts}
        self._branches = {conjunct: _Branch(conjunct) for conjunct in conjuncts}
        self._plain = [branch for branch in self._branches.values() if not branch.is_asking]
        self._asking = [branch for branch in self._branches.values() if branch.is_asking]
        self._questions: list[Question] = []
        self.facts: frozenset[Fact] = frozenset().union(*(p.facts for p in predicates.values()))
        asked = frozenset[Asked]().union(*(p.asked for p in predicates.values()))
        self.shared = {one.name: self._memo(one, None) for one in asked if not one.of_user}
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
        if not self.admits(member):
            return
        self.members.add(member)
        for asked in self._predicates[member.claims.role].asked:
            if asked.of_user:
                member.facts[asked.name] = self._memo(asked, member)
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
        found = [branch.seen(relation.index, image) for branch in self._plain]
        if self._asking:  # nothing is asked for those who see it anyway
            sure = union(seen.sure for seen in found)
            found += [branch.seen(relation.index, image, self.shared, sure) for branch in self._asking]
        return Seen(union(seen.sure for seen in found), union(seen.perhaps for seen in found))

    def sees(self, member: Member, relation: Relation, image: Image) -> bool | None:
        """Whether one member that is admitted sees an image."""
        facts = {**member.facts, **self.shared} if self.shared else member.facts
        return self._predicates[member.claims.role].evaluate(relation.index, image, facts)

    def open_questions(self) -> list[Question]:
        """What `seen` and `sees` have missed since the last call."""
        questions = self._questions.copy()
        self._questions.clear()
        for question in questions:
            memo = self._memo_of(question)
            if memo is not None:
                memo.misses.discard(question.values)
        return questions

    def answer(self, question: Question, truth: Truth | Absent) -> None:
        """Keep what Postgres says; ABSENT if it failed to."""
        memo = self._memo_of(question)
        if memo is not None:
            memo.store(question.values, truth)

    def _memo(self, asked: Asked, member: Member | None) -> Memo:
        return Memo(partial(_leave_open, self._questions, asked, member))

    def _memo_of(self, question: Question) -> Memo | None:
        if question.member is None:
            return self.shared[question.asked.name]
        memo = question.member.facts.get(question.asked.name)
        return memo if isinstance(memo, Memo) else None

    def _branches_of(self, member: Member) -> Iterator["_Branch"]:
        for conjunct in self._predicates[member.claims.role].conjuncts:
            yield self._branches[conjunct]


def _leave_open(questions: list[Question], asked: Asked, member: Member | None, values: tuple[Value, ...]) -> None:
    questions.append(Question(asked, member, values))


class _Branch:
    """One conjunct and the members for whom all that it asks of the user holds."""

    def __init__(self, conjunct: Conjunct) -> None:
        literals = in_order(conjunct)
        self._of_user = [literal for literal in literals if literal.of_user]
        self._of_row = [literal for literal in literals if literal.of_row]
        of_both = [literal for literal in literals if not (literal.of_user or literal.of_row)]
        keyed = sorted((literal for literal in of_both if literal.key), key=lambda literal: repr(literal.key))
        self._key = keyed[0].key if keyed else None
        self._rest = [literal for literal in of_both if not keyed or literal is not keyed[0]]
        self._members: set[Member] = set()
        self._by_value: dict[str, set[Member]] = {}
        self.is_asking = any(literal.is_asked for literal in literals)

    def add(self, member: Member) -> None:
        if not all_hold(self._of_user, _NO_INDEX, (), member.facts):
            return
        values = self._values(member)
        if values is None:
            self._members.add(member)
        for value in values or ():
            self._members.add(member)
            self._by_value.setdefault(value, set()).add(member)

    def discard(self, member: Member) -> None:
        if member not in self._members:
            return
        self._members.discard(member)
        for value in self._values(member) or ():
            self._by_value[value].discard(member)
            if not self._by_value[value]:
                del self._by_value[value]

    def _values(self, member: Member) -> Iterable[str] | None:
        """The values that a member is found by; None if the branch has no key."""
        if self._key is None:
            return None
        value = self._key.user.value(_NO_INDEX, (), member.facts)
        if isinstance(value, Values):
            return value.texts
        return (value,) if isinstance(value, str) else ()

    def seen(
        self,
        index: Mapping[str, int],
        image: Image,
        shared: Mapping[str, Memo] = _NO_MEMOS,
        sure: Members = _NOBODY,
    ) -> Seen:
        """Who of the branch sees an image; those who are `sure` to see it already are not asked for."""
        found = self._found(self._key, index, image) if self._key else self._members
        candidates = self._members if found is None else found
        holds = bool(candidates) and all_hold(self._of_row, index, image, shared)
        if holds is False:
            return Seen()
        seen = self._ask(candidates - sure, index, image) if self._rest else Seen(candidates)
        return seen if holds and found is not None else Seen(_NOBODY, union(seen))

    def _found(self, key: Key, index: Mapping[str, int], image: Image) -> Members | None:
        """Those whom the row's value finds; None if it is not known."""
        value = key.row.value(index, image, {})
        if value is None:
            return _NOBODY
        if key.of_elements:
            values = values_of(value)
            return None if values is None else union(self._by_value.get(text, _NOBODY) for text in values.texts)
        return self._by_value.get(value, _NOBODY) if isinstance(value, str) else None

    def _ask(self, candidates: Members, index: Mapping[str, int], image: Image) -> Seen:
        verdicts = {member: all_hold(self._rest, index, image, member.facts) for member in candidates}
        return Seen(
            {member for member, verdict in verdicts.items() if verdict},
            {member for member, verdict in verdicts.items() if verdict is None},
        )


def union(sets: Iterable[Members]) -> Members:
    """The union; the largest of the sets itself if it holds all the others."""
    largest, *others = sorted((members for members in sets if members), key=len, reverse=True) or [_NOBODY]
    missing = [members for members in others if not members <= largest]
    return _NOBODY.union(largest, *missing) if missing else largest
