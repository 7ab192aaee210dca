"""What decides about a row: a disjunction of conjunctions of literals, each decided by two-valued logic.

A literal asks whether an atom's truth value is one of a set; there is no negation above it. So a value that is unknown
here makes its literal unknown, and never by way of NOT a yes. `None` carries that through.

Layer: pure. May import: change, policy.atoms, policy.expression.
Sources: Kleene's three-valued logic as in https://www.postgresql.org/docs/current/functions-logical.html.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Final, NamedTuple, TypeAlias

from realtime_bridge.change import ABSENT, Image
from realtime_bridge.policy.atoms import Among, Answer, Atom, Facts, Holds, Missing, RowTerm, Same, Truth, UserTerm
from realtime_bridge.policy.expression import Asked, Fact, UnsupportedExpression, any_asked

MAX_CONJUNCTS: Final = 64

Wanted: TypeAlias = frozenset[Truth]

TRUE_ONLY: Final[Wanted] = frozenset({True})
ANY_TRUTH: Final[Wanted] = frozenset({True, False, None})


@dataclass(frozen=True, slots=True)
class Literal:
    """Whether an atom's truth value is one of those wanted."""

    atom: Atom
    wanted: Wanted

    def holds(self, index: Mapping[str, int], image: Image, facts: Facts) -> bool | None:
        """None if a value that it depends on is not known."""
        truth = self.atom.truth(index, image, facts)
        return None if truth is ABSENT else truth in self.wanted

    @property
    def is_asked(self) -> bool:
        """Whether Postgres decides it."""
        return isinstance(self.atom, Answer)

    @property
    def of_row(self) -> bool:
        """Whether it needs the row alone."""
        if isinstance(self.atom, Answer):
            return not self.atom.asked.of_user
        return not any(isinstance(term, UserTerm) for term in self.atom.terms)

    @property
    def of_user(self) -> bool:
        """Whether it needs the user alone, and can be decided before there is a row."""
        return not self.is_asked and not any(isinstance(term, RowTerm) for term in self.atom.terms)

    @property
    def facts(self) -> frozenset[str]:
        """The facts, as SQL, that it needs."""
        return frozenset(term.fact for term in self.atom.terms if isinstance(term, UserTerm))

    @property
    def key(self) -> "Key | None":
        """What an index can look up."""
        if self.wanted != TRUE_ONLY:
            return None
        match self.atom:
            case Same(RowTerm() as row, UserTerm() as user) | Among(RowTerm() as row, UserTerm() as user):
                return Key(row, user, of_elements=False)
            case Holds(RowTerm() as row, UserTerm() as user):
                return Key(row, user, of_elements=True)
        return None


class Key(NamedTuple):
    """That a value of the row is a value of the user's.

    Attributes:
        user: one text, or `Values`.
        of_elements: whether the row's values are the elements of an array, instead of one text.
    """

    row: RowTerm
    user: UserTerm
    of_elements: bool


Conjunct: TypeAlias = frozenset[Literal]
"""All of them; the empty one always holds."""

Dnf: TypeAlias = tuple[Conjunct, ...]
"""One of them; the empty one never holds."""

ALWAYS: Final[Dnf] = (frozenset(),)
NEVER: Final[Dnf] = ()


@dataclass(frozen=True)
class Predicate:
    """Who sees which rows.

    Attributes:
        conjuncts: one of them must hold.
        facts: every fact the expression reads, also in parts that turned out not to matter.
    """

    conjuncts: Dnf
    facts: frozenset[Fact] = frozenset()

    @cached_property
    def asked(self) -> frozenset[Asked]:
        """What Postgres is asked about rows."""
        atoms = (literal.atom for conjunct in self.conjuncts for literal in conjunct)
        return frozenset(atom.asked for atom in atoms if isinstance(atom, Answer))

    @cached_property
    def columns(self) -> frozenset[str]:
        """The columns that it needs."""
        terms = (term for conjunct in self.conjuncts for literal in conjunct for term in literal.atom.terms)
        return frozenset(term.column for term in terms if isinstance(term, RowTerm))

    @cached_property
    def _in_order(self) -> Sequence[Sequence[Literal]]:
        """What Postgres decides comes last: it is asked only what nothing else has decided."""
        ordered = [in_order(conjunct) for conjunct in self.conjuncts]
        return sorted(ordered, key=lambda literals: any(literal.is_asked for literal in literals))

    def evaluate(self, index: Mapping[str, int], image: Image, facts: Facts) -> bool | None:
        """Whether one user may see one row; None if that depends on a value that is not known."""
        unknown = False
        for literals in self._in_order:
            verdict = all_hold(literals, index, image, facts)
            if verdict:
                return True
            unknown = unknown or verdict is None
        return None if unknown else False


EVERYTHING: Final = Predicate(ALWAYS)
NOTHING: Final = Predicate(NEVER)


def in_order(literals: Iterable[Literal]) -> list[Literal]:
    """The literals, with those that Postgres decides last."""
    return sorted(literals, key=lambda literal: literal.is_asked)


def all_hold(literals: Iterable[Literal], index: Mapping[str, int], image: Image, facts: Facts) -> bool | None:
    """Kleene's AND: False as soon as one does not hold, None if one is not known."""
    unknown = False
    for literal in literals:
        verdict = literal.holds(index, image, facts)
        if verdict is False:
            return False
        unknown = unknown or verdict is None
    return None if unknown else True


def any_of(predicates: Iterable[Predicate]) -> Predicate:
    """Permissive policies together.

    Raises:
        UnsupportedExpression: the result has too many alternatives.
    """
    return reduce(lambda a, b: Predicate(either(a.conjuncts, b.conjuncts), a.facts | b.facts), predicates, NOTHING)


def all_of(predicates: Iterable[Predicate]) -> Predicate:
    """Restrictive policies together.

    Raises:
        UnsupportedExpression: the result has too many alternatives.
    """
    return reduce(lambda a, b: Predicate(both(a.conjuncts, b.conjuncts), a.facts | b.facts), predicates, EVERYTHING)


def asked_together(predicate: Predicate) -> Predicate:
    """The same, with alternatives that Postgres alone decides by the same columns put to it as one question.

    Each question has its price, whoever of them is answered yes first. Over other columns it stays another question:
    answers are remembered by the columns' values.
    """
    alike: dict[tuple[str, ...], list[Asked]] = {}
    rest: list[Conjunct] = []
    for conjunct in predicate.conjuncts:
        asked = _only_question(conjunct)
        if asked is None:
            rest.append(conjunct)
        else:
            alike.setdefault(asked.columns, []).append(asked)
    together = (frozenset({Literal(Answer(any_asked(questions)), TRUE_ONLY)}) for questions in alike.values())
    return Predicate((*rest, *together), predicate.facts)


def _only_question(conjunct: Conjunct) -> Asked | None:
    """What is asked about user and row, if nothing else is asked for."""
    if len(conjunct) != 1:
        return None
    (literal,) = conjunct
    is_alone = isinstance(literal.atom, Answer) and literal.wanted == TRUE_ONLY and literal.atom.asked.of_user
    return literal.atom.asked if is_alone and isinstance(literal.atom, Answer) else None


# -- normal form -------------------------------------------------------------------------------------------------------


def literal_of(atom: Atom, wanted: Wanted) -> Dnf:
    """The normal form of one literal; IS NULL is itself never NULL."""
    possible = ANY_TRUTH - {None} if isinstance(atom, Missing) else ANY_TRUTH
    if possible <= wanted:
        return ALWAYS
    return (frozenset({Literal(atom, wanted & possible)}),) if possible & wanted else NEVER


def either(left: Dnf, right: Dnf) -> Dnf:
    """Disjunction, without conjuncts that a weaker one makes superfluous.

    Raises:
        UnsupportedExpression: it has more than `MAX_CONJUNCTS`.
    """
    result: list[Conjunct] = []
    for conjunct in (*left, *right):
        if any(weaker <= conjunct for weaker in result):
            continue
        result = [other for other in result if not conjunct <= other]
        result.append(conjunct)
        if len(result) > MAX_CONJUNCTS:
            raise UnsupportedExpression(f"more than {MAX_CONJUNCTS} alternatives")
    return tuple(result)


def both(left: Dnf, right: Dnf) -> Dnf:
    """Conjunction, distributed over both disjunctions.

    Raises:
        UnsupportedExpression: the result has more than `MAX_CONJUNCTS`.
    """
    merged = (_merge(one, other) for one in left for other in right)
    return either(NEVER, tuple(conjunct for conjunct in merged if conjunct is not None))


def _merge(left: Conjunct, right: Conjunct) -> Conjunct | None:
    """All literals of both; None if two of them contradict each other."""
    wanted = {literal.atom: literal.wanted for literal in left}
    for literal in right:
        wanted[literal.atom] = wanted.get(literal.atom, ANY_TRUTH) & literal.wanted
    return frozenset(Literal(atom, w) for atom, w in wanted.items()) if all(wanted.values()) else None
