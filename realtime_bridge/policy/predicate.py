"""What decides about a row: a disjunction of conjunctions of literals, each decided by two-valued logic.

A literal asks whether an atom's truth value is one of a set; there is no negation above it. So a value that is unknown
here makes its literal unknown, and never by way of NOT a yes. `None` carries that through: what is *not known to the
bridge* (an absent column, a claim that does not cast), as against SQL's NULL, which is a truth value like others.

Layer: pure. May import: canonical, change, policy.expression, policy.ordering.
Sources: Kleene's three-valued logic as in https://www.postgresql.org/docs/current/functions-logical.html.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Final, NamedTuple, TypeAlias

from realtime_bridge.canonical import array_elements, canonical
from realtime_bridge.change import ABSENT, Absent, Image, Value
from realtime_bridge.policy.expression import Asked, Fact, UnsupportedExpression
from realtime_bridge.policy.ordering import order_key

MAX_CONJUNCTS: Final = 64
MAX_ANSWERS: Final = 4096

Truth: TypeAlias = bool | None
"""A truth value of SQL; None is NULL."""

Facts: TypeAlias = Mapping[str, object]
"""Fact (as SQL) → text, `Values` if it is many, None for NULL, ABSENT for what could not be found out.

And `Asked.name` → its `Memo`, of the user's own for what depends on the user.
"""


@dataclass(frozen=True, slots=True)
class Values:
    """The elements of an array, as a fact."""

    texts: frozenset[str]
    has_null: bool = False


class Memo:
    """What Postgres has answered to one `Asked`, by the values of its columns.

    Emptied when it is full, so that it stays within `MAX_ANSWERS`.

    Args:
        ask: told the values of each miss; once, as long as it is among `misses`.
    """

    __slots__ = ("_ask", "answers", "misses")

    def __init__(self, ask: Callable[[tuple[Value, ...]], None]) -> None:
        self._ask = ask
        self.answers: dict[tuple[Value, ...], Truth | Absent] = {}
        self.misses: set[tuple[Value, ...]] = set()

    def truth(self, values: tuple[Value, ...]) -> Truth | Absent:
        """The answer; without one, ABSENT and a miss."""
        answer = self.answers.get(values, ABSENT)
        if answer is ABSENT and values not in self.answers and values not in self.misses:
            self.misses.add(values)
            self._ask(values)
        return answer

    def store(self, values: tuple[Value, ...], truth: Truth | Absent) -> None:
        """Keep an answer; ABSENT if Postgres failed to give one."""
        if len(self.answers) >= MAX_ANSWERS:
            self.answers.clear()
        self.answers[values] = truth
        self.misses.discard(values)


# -- atoms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowTerm:
    """A column's text.

    Attributes:
        form: the type whose canonical text is compared, where equal values may be brought as different texts.
    """

    column: str
    form: str | None = None

    def value(self, index: Mapping[str, int], image: Image, _: Facts) -> object:
        text = image[index[self.column]]
        return text if self.form is None else _in_form(self.form, text)


@dataclass(frozen=True, slots=True)
class UserTerm:
    """A fact's text; `fact` is its SQL. `form` is as in `RowTerm`."""

    fact: str
    form: str | None = None

    def value(self, _: Mapping[str, int], __: Image, facts: Facts) -> object:
        text = facts.get(self.fact, ABSENT)
        return text if self.form is None else _in_form(self.form, text)


@dataclass(frozen=True, slots=True)
class FixedTerm:
    """A constant's text; never NULL."""

    text: str

    def value(self, _: Mapping[str, int], __: Image, ___: Facts) -> object:
        return self.text


Term: TypeAlias = RowTerm | UserTerm | FixedTerm


def _in_form(type_name: str, text: object) -> object:
    if not isinstance(text, str):
        return text
    try:
        return canonical(type_name, text)
    except ValueError:
        return ABSENT


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
class Less:
    """`left < right`, or `left <= right`, as values of one type.

    Attributes:
        type: by whose order (`policy.ordering`).
    """

    left: Term
    right: Term
    or_equal: bool
    type: str

    @property
    def terms(self) -> tuple[Term, ...]:
        return (self.left, self.right)

    def truth(self, index: Mapping[str, int], image: Image, facts: Facts) -> Truth | Absent:
        left = self.left.value(index, image, facts)
        right = self.right.value(index, image, facts)
        if left is None or right is None:
            return None
        if not (isinstance(left, str) and isinstance(right, str)):
            return ABSENT
        try:
            one, other = order_key(self.type, left), order_key(self.type, right)
        except ValueError:
            return ABSENT
        return one <= other if self.or_equal else one < other


@dataclass(frozen=True, slots=True)
class Among:
    """`term = ANY (fact)`, where the fact is many."""

    term: RowTerm
    fact: UserTerm

    @property
    def terms(self) -> tuple[Term, ...]:
        return (self.term, self.fact)

    def truth(self, index: Mapping[str, int], image: Image, facts: Facts) -> Truth | Absent:
        values = self.fact.value(index, image, facts)
        if values is None:
            return None
        if not isinstance(values, Values):
            return ABSENT
        return _is_among(self.term.value(index, image, facts), values)


@dataclass(frozen=True, slots=True)
class Holds:
    """`element = ANY (array)`, where the array is a column."""

    array: RowTerm
    element: Term

    @property
    def terms(self) -> tuple[Term, ...]:
        return (self.array, self.element)

    def truth(self, index: Mapping[str, int], image: Image, facts: Facts) -> Truth | Absent:
        array = self.array.value(index, image, facts)
        if array is None:
            return None
        values = values_of(array)
        return ABSENT if values is None else _is_among(self.element.value(index, image, facts), values)


def values_of(array: object) -> Values | None:
    """The elements of an array's text; None if it is not known, or no such text."""
    if not isinstance(array, str):
        return None
    try:
        elements = array_elements(array)
    except ValueError:
        return None
    return Values(frozenset(element for element in elements if element is not None), None in elements)


def _is_among(value: object, values: Values) -> Truth | Absent:
    """`value = ANY (values)`: FALSE if there are none, whatever the value is."""
    if not values.texts and not values.has_null:
        return False
    if value is ABSENT:
        return ABSENT if values.texts else None
    if value is None:
        return None
    return True if value in values.texts else None if values.has_null else False


@dataclass(frozen=True, slots=True)
class Answer:
    """What Postgres says: an `Asked` as an atom, looked up in its `Memo`."""

    asked: Asked

    @property
    def terms(self) -> tuple[Term, ...]:
        return tuple(RowTerm(column) for column in self.asked.columns)

    def truth(self, index: Mapping[str, int], image: Image, facts: Facts) -> Truth | Absent:
        memo = facts.get(self.asked.name)
        values = tuple(image[index[column]] for column in self.asked.columns)
        if ABSENT in values or not isinstance(memo, Memo):
            return ABSENT
        return memo.truth(values)


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


Atom: TypeAlias = OneOf | Same | Less | Among | Holds | Missing | Answer


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


def in_order(conjunct: Conjunct) -> list[Literal]:
    """The literals, with those that Postgres decides last."""
    return sorted(conjunct, key=lambda literal: literal.is_asked)


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
