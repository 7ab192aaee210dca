"""What decides about a row: a disjunction of conjunctions of literals, each decided by two-valued logic.

A literal asks whether an atom's truth value is one of a set; there is no negation above it. So a value that is unknown
here makes its literal unknown, and never by way of NOT a yes. `None` carries that through: what is *not known to the
bridge* (an absent column, a claim that does not cast), as against SQL's NULL, which is a truth value like others.

Layer: pure. May import: change, policy.expression.
Sources: Kleene's three-valued logic as in https://www.postgresql.org/docs/current/functions-logical.html.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Final, TypeAlias

from realtime_bridge.change import ABSENT, Absent, Image
from realtime_bridge.policy.expression import Fact, UnsupportedExpression

MAX_CONJUNCTS: Final = 64

Truth: TypeAlias = bool | None
"""A truth value of SQL; None is NULL."""

Facts: TypeAlias = Mapping[str, object]
"""Fact (as SQL) → text, None for NULL, ABSENT for what could not be found out."""


# -- atoms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowTerm:
    """A column's text."""

    column: str

    def value(self, index: Mapping[str, int], image: Image, _: Facts) -> object:
        return image[index[self.column]]


@dataclass(frozen=True, slots=True)
class UserTerm:
    """A fact's text; `fact` is its SQL."""

    fact: str

    def value(self, _: Mapping[str, int], __: Image, facts: Facts) -> object:
        return facts.get(self.fact, ABSENT)


Term: TypeAlias = RowTerm | UserTerm


@dataclass(frozen=True, slots=True)
class OneOf:
    """`term IN (texts)`; none of them NULL."""

    term: Term
    texts: frozenset[str]

    @property
    def terms(self) -> tuple[Term, ...]:
        return (self.term,)

    def truth(self, index: Mapping[str, int], image: Image, facts: Facts) -> Truth | Absent:
        value = self.term.value(index, image, facts)
        if value is ABSENT:
            return ABSENT
        return None if value is None else value in self.texts


@dataclass(frozen=True, slots=True)
class Same:
    """`left = right`. A column, if there is one, stands on the left."""

    left: Term
    right: Term

    @property
    def terms(self) -> tuple[Term, ...]:
        return (self.left, self.right)

    def truth(self, index: Mapping[str, int], image: Image, facts: Facts) -> Truth | Absent:
        left = self.left.value(index, image, facts)
        right = self.right.value(index, image, facts)
        if left is None or right is None:  # NULL, whatever the other one is
            return None
        if left is ABSENT or right is ABSENT:
            return ABSENT
        return left == right


@dataclass(frozen=True, slots=True)
class Missing:
    """`term IS NULL`."""

    term: Term

    @property
    def terms(self) -> tuple[Term, ...]:
        return (self.term,)

    def truth(self, index: Mapping[str, int], image: Image, facts: Facts) -> Truth | Absent:
        value = self.term.value(index, image, facts)
        return ABSENT if value is ABSENT else value is None


Atom: TypeAlias = OneOf | Same | Missing


# -- literals, conjunctions, predicates --------------------------------------------------------------------------------

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
    def of_row(self) -> bool:
        """Whether it needs the row alone."""
        return all(isinstance(term, RowTerm) for term in self.atom.terms)

    @property
    def of_user(self) -> bool:
        """Whether it needs the user alone."""
        return all(isinstance(term, UserTerm) for term in self.atom.terms)

    @property
    def key(self) -> tuple[str, str] | None:
        """Column and fact that must be equal, and nothing else asked: what an index can look up."""
        if isinstance(self.atom, Same) and self.wanted == TRUE_ONLY:
            left, right = self.atom.left, self.atom.right
            if isinstance(left, RowTerm) and isinstance(right, UserTerm):
                return left.column, right.fact
        return None


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
    def columns(self) -> frozenset[str]:
        """The columns that it needs."""
        terms = (term for conjunct in self.conjuncts for literal in conjunct for term in literal.atom.terms)
        return frozenset(term.column for term in terms if isinstance(term, RowTerm))

    def evaluate(self, index: Mapping[str, int], image: Image, facts: Facts) -> bool | None:
        """Whether one user may see one row; None if that depends on a value that is not known."""
        unknown = False
        for conjunct in self.conjuncts:
            verdict = all_hold(conjunct, index, image, facts)
            if verdict:
                return True
            unknown = unknown or verdict is None
        return None if unknown else False


EVERYTHING: Final = Predicate(ALWAYS)
NOTHING: Final = Predicate(NEVER)


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
