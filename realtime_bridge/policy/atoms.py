"""What a condition is made of when it can be decided here: atoms, each with one of SQL's three truth values.

`None` is NULL. `ABSENT` is what is *not known to the bridge*: a column that was not brought, a claim that does not
cast, a question that Postgres has not answered.

Layer: pure. May import: canonical, change, policy.expression, policy.ordering.
Sources: https://www.postgresql.org/docs/current/functions-comparisons.html (arrays and NULL).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from realtime_bridge.canonical import array_elements, canonical
from realtime_bridge.change import ABSENT, Absent, Image, Value
from realtime_bridge.policy.expression import Asked
from realtime_bridge.policy.ordering import order_key

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


@dataclass(frozen=True, slots=True)
class Failed:
    """In place of what Postgres failed to evaluate: no truth value, and so wanted by nobody. Not unknown, and not NULL.

    Attributes:
        state: SQLSTATE of the error.
    """

    state: str


class Memo:
    """What Postgres has answered to one `Asked`, by the values of its columns.

    Emptied when it is full, so that it stays within `MAX_ANSWERS`.

    Args:
        ask: told the values of each miss; once, as long as it is among `misses`.
    """

    __slots__ = ("_ask", "answers", "misses")

    def __init__(self, ask: Callable[[tuple[Value, ...]], None]) -> None:
        self._ask = ask
        self.answers: dict[tuple[Value, ...], Truth | Absent | Failed] = {}
        self.misses: set[tuple[Value, ...]] = set()

    def truth(self, values: tuple[Value, ...]) -> Truth | Absent | Failed:
        """The answer; without one, ABSENT and a miss."""
        answer = self.answers.get(values, ABSENT)
        if answer is ABSENT and values not in self.answers and values not in self.misses:
            self.misses.add(values)
            self._ask(values)
        return answer

    def store(self, values: tuple[Value, ...], truth: Truth | Absent | Failed) -> None:
        """Keep an answer; ABSENT if Postgres failed to give one."""
        if len(self.answers) >= MAX_ANSWERS:
            self.answers.clear()
        self.answers[values] = truth
        self.misses.discard(values)


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

    def truth(self, index: Mapping[str, int], image: Image, facts: Facts) -> Truth | Absent | Failed:
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
