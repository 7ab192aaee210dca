"""Which of the present members see a row, found in time proportional to their number.

A table's predicates (one a role) fall apart into *branches*: conjuncts, each with the roles it serves. What a branch
asks of the user alone is answered once, when a member joins; what it asks of the row alone, once a row; and of the
equalities between row and fact the first is a dictionary from the fact's values to members. What is left is asked of
the few members that remain. A branch that several roles share is one, so a public row's audience is one set for all.

What Postgres has to decide is looked up among its answers. Where one is missing the verdict is unknown and a question
is left open: the engine has `open_questions` answered and looks again.

Layer: adapters (it does no I/O). May import: words, policy.atoms, policy.base, policy.expression,
policy.predicate.
Sources: the equality index of ElectricSQL's shape filter.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Final, NamedTuple, TypeVar

from realtime_bridge.change import ABSENT, Absent, Image, Relation, Value
from realtime_bridge.policy.atoms import Failed, Memo, Truth, Values, values_of
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.expression import Asked, Fact
from realtime_bridge.policy.predicate import Conjunct, Key, Predicate, all_hold, in_order

Members = Set[Member]
_Key = TypeVar("_Key")

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
                member.facts.setdefault(asked.name, self._memo(asked, member))
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

        Where one is not, or failed, Postgres may fail any query of that user, in whatever order it evaluates.
        """
        predicate = self._predicates.get(member.claims.role)
        return predicate is not None and not any(
            value is ABSENT or isinstance(value, Failed)
            for value in (member.facts.get(fact.sql, ABSENT) for fact in predicate.facts)
        )

    def seen(self, relation: Relation, image: Image) -> Seen:
        """Who of the members sees an image. The sets may be the index's own."""
        found = [branch.seen(relation.index, image) for branch in self._plain]
        if self._asking:  # nothing is asked for those who see it anyway
            sure = union(seen.sure for seen in found)
            found += [branch.seen(relation.index, image, self.shared, sure) for branch in self._asking]
        if len(found) == 1:
            return found[0]
        return Seen(union(seen.sure for seen in found), union(seen.perhaps for seen in found))

    def eyes_of(self, member: Member, relation: Relation) -> Callable[[Image], bool | None]:
        """Tells whether one member that is admitted sees an image of a relation, by what is known now.

        Images that are alike in all that is read of them are evaluated once.
        """
        predicate, index = self._predicates[member.claims.role], relation.index
        facts = {**member.facts, **self.shared} if self.shared else member.facts
        read = [index[column] for column in predicate.columns]
        pick = itemgetter(*read) if read else lambda _: None
        found: dict[object, bool | None] = {}

        def sees(image: Image) -> bool | None:
            values = pick(image)
            if values not in found:
                found[values] = predicate.evaluate(index, image, facts)
            return found[values]

        return sees

    def open_questions(self) -> list[Question]:
        """What `seen` and `eyes_of` have missed since the last call."""
        questions = self._questions.copy()
        self._questions.clear()
        for question in questions:
            memo = self._memo_of(question)
            if memo is not None:
                memo.misses.discard(question.values)
        return questions

    def answer(self, question: Question, truth: Truth | Absent | Failed) -> None:
        """Keep what Postgres says."""
        memo = self._memo_of(question)
        if memo is not None:
            memo.store(question.values, truth)

    def is_answered(self, question: Question) -> bool:
        """Whether an answer is kept."""
        memo = self._memo_of(question)
        return memo is not None and question.values in memo.answers

    def drop(self, question: Question) -> None:
        """Keep the answer no longer."""
        memo = self._memo_of(question)
        if memo is not None:
            memo.answers.pop(question.values, None)

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


class Answered(NamedTuple):
    """What Postgres says to a question of an index."""

    asker: AudienceIndex
    question: Question
    truth: Truth | Failed


@contextmanager
def lent(answers: Iterable[Answered]) -> Iterator[None]:
    """Have answers that are not kept looked up within the block, where none is kept. Await nothing in it."""
    missing = [one for one in answers if not one.asker.is_answered(one.question)]
    try:
        for asker, question, truth in missing:
            asker.answer(question, truth)
        yield
    finally:
        for asker, question, _ in missing:
            asker.drop(question)


def _leave_open(questions: list[Question], asked: Asked, member: Member | None, values: tuple[Value, ...]) -> None:
    questions.append(Question(asked, member, values))


class _Branch:
    """One conjunct and the members for whom all that it asks of the user holds."""

    def __init__(self, conjunct: Conjunct) -> None:
        of_both = [literal for literal in conjunct if not (literal.of_user or literal.of_row)]
        keyed = sorted((literal for literal in of_both if literal.key), key=lambda literal: repr(literal.key))
        self._key = keyed[0].key if keyed else None
        self._of_user = [literal for literal in conjunct if literal.of_user]
        self._of_row = in_order(literal for literal in conjunct if literal.of_row)
        self._compared = [one for one in of_both if not (one.is_asked or one in keyed[:1])]
        self._asked = [literal for literal in of_both if literal.is_asked]
        self._compared_facts = sorted({fact for literal in self._compared for fact in literal.facts})
        self._members: set[Member] = set()
        self._by_value: dict[str, set[Member]] = {}
        self._alike: dict[tuple[object, ...], set[Member]] = {}
        self.is_asking = any(literal.is_asked for literal in conjunct)

    def add(self, member: Member) -> None:
        if not all_hold(self._of_user, _NO_INDEX, (), member.facts):
            return
        values = self._values(member)
        for value in values:
            self._by_value.setdefault(value, set()).add(member)
        if values or self._key is None or self._key.of_elements:  # NULL = ANY (array) depends on the array
            self._members.add(member)
            if self._compared:
                self._alike.setdefault(self._compared_values(member), set()).add(member)

    def discard(self, member: Member) -> None:
        if member not in self._members:
            return
        self._members.discard(member)
        for value in self._values(member):
            _take(self._by_value, value, member)
        if self._compared:
            _take(self._alike, self._compared_values(member), member)

    def _values(self, member: Member) -> Collection[str]:
        """The values that a member is found by."""
        if self._key is None:
            return ()
        value = self._key.user.value(_NO_INDEX, (), member.facts)
        if isinstance(value, Values):
            return value.texts
        return (value,) if isinstance(value, str) else ()

    def _compared_values(self, member: Member) -> tuple[object, ...]:
        """What comparisons depend on: members with equal ones are alike."""
        return tuple(member.facts.get(fact) for fact in self._compared_facts)

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
        seen = self._compare(candidates, index, image) if self._compared else Seen(candidates)
        if self._asked:
            seen = self._ask(seen, sure, index, image)
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

    def _compare(self, candidates: Members, index: Mapping[str, int], image: Image) -> Seen:
        """Those for whom the comparisons hold; where all are candidates, one of those alike speaks for the others."""
        alike: Iterable[Members] = ({member} for member in candidates)
        if candidates is self._members:
            alike = self._alike.values()
        verdicts = [(some, all_hold(self._compared, index, image, next(iter(some)).facts)) for some in alike]
        return Seen(
            union(some for some, verdict in verdicts if verdict),
            union(some for some, verdict in verdicts if verdict is None),
        )

    def _ask(self, seen: Seen, sure: Members, index: Mapping[str, int], image: Image) -> Seen:
        candidates = union(seen) - sure
        verdicts = {member: all_hold(self._asked, index, image, member.facts) for member in candidates}
        known = {member for member, verdict in verdicts.items() if verdict and member not in seen.perhaps}
        return Seen(known, {member for member, verdict in verdicts.items() if verdict is not False} - known)


def _take(members: dict[_Key, set[Member]], key: _Key, member: Member) -> None:
    members[key].discard(member)
    if not members[key]:
        del members[key]


def union(sets: Iterable[Members]) -> Members:
    """The union; the largest of the sets itself if it holds all the others."""
    present = [members for members in sets if members]
    if len(present) < 2:
        return present[0] if present else _NOBODY
    largest = max(present, key=len)
    if all(members is largest or members <= largest for members in present):
        return largest
    return _NOBODY.union(*present)
