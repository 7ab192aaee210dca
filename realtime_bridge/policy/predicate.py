"""An expression over typed columns as a disjunction of conjunctions of literals that two-valued logic can decide.

`compile_expression` asks of each node "is its truth value in this set?", beginning with {TRUE}, and pushes the
question down: NOT swaps the set, AND and OR split it, until only atoms are left. That is exact in SQL's three-valued
logic, IS [NOT] TRUE and IS NULL included, and leaves no negation above a literal: a value that is unknown here makes
its literal unknown, and never by way of NOT a yes.

A second, outer logic carries what is *not known to the bridge* (an absent column, a claim that does not cast): None.

Layer: pure. May import: change, canonical, policy.expression.
Sources: rls.md sections 0 and 6; parse_oper.c and parse_coerce.c (which types compare, and as what).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeAlias

from realtime_bridge.canonical import INTEGER_BITS, TEXT_TYPES, canonical
from realtime_bridge.change import ABSENT, Absent, Image
from realtime_bridge.policy.expression import (
    And,
    Column,
    Constant,
    Equal,
    Expression,
    Fact,
    Is,
    IsNull,
    Not,
    Operand,
    Or,
    UnsupportedExpression,
)

MAX_CONJUNCTS: Final = 64

Truth: TypeAlias = bool | None
"""A truth value of SQL; None is NULL."""

Facts: TypeAlias = Mapping[str, object]
"""Fact (as SQL) → text, None for NULL, ABSENT for what could not be found out."""


@dataclass(frozen=True, slots=True)
class ColumnType:
    """What a column's values are.

    Attributes:
        name: `pg_type.typname`, of the base type where the column's type is a domain.
        schema: of that type.
        labels: of an enum; None for any other type.
        exact: whether equal texts are the same texts: not so under a nondeterministic collation.
    """

    name: str
    schema: str = "pg_catalog"
    labels: frozenset[str] | None = None
    exact: bool = True

    @property
    def written(self) -> str:
        """The name as pg_get_expr writes it, with a schema unless it is `pg_catalog`."""
        return self.name if self.schema == "pg_catalog" else f"{self.schema}.{self.name}"


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

_TRUE: Final[Wanted] = frozenset({True})
_ANY: Final[Wanted] = frozenset({True, False, None})


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
        if isinstance(self.atom, Same) and self.wanted == _TRUE:
            left, right = self.atom.left, self.atom.right
            if isinstance(left, RowTerm) and isinstance(right, UserTerm):
                return left.column, right.fact
        return None


Conjunct: TypeAlias = frozenset[Literal]
"""All of them; the empty one is TRUE."""


@dataclass(frozen=True)
class Predicate:
    """Who sees which rows: one of the conjuncts must hold. Without conjuncts nobody sees any row.

    Attributes:
        facts: every fact the expression reads, also in parts that turned out not to matter.
    """

    conjuncts: tuple[Conjunct, ...]
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


EVERYTHING: Final = Predicate((frozenset(),))
NOTHING: Final = Predicate(())


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
    result = NOTHING
    for predicate in predicates:
        result = Predicate(_either(result.conjuncts, predicate.conjuncts), result.facts | predicate.facts)
    return result


def all_of(predicates: Iterable[Predicate]) -> Predicate:
    """Restrictive policies together.

    Raises:
        UnsupportedExpression: the result has too many alternatives.
    """
    result = EVERYTHING
    for predicate in predicates:
        result = Predicate(_both(result.conjuncts, predicate.conjuncts), result.facts | predicate.facts)
    return result


# -- compiling ---------------------------------------------------------------------------------------------------------


def compile_expression(expression: Expression, columns: Mapping[str, ColumnType]) -> Predicate:
    """Type an expression over a table's columns and normalise "it is TRUE".

    Raises:
        UnsupportedExpression: a column is unknown, types do not compare by their texts, or there are too many
            alternatives.
    """
    compiler = _Compiler(columns)
    return Predicate(compiler.want(expression, _TRUE), frozenset(compiler.facts))


_Dnf: TypeAlias = tuple[Conjunct, ...]
_Join: TypeAlias = Callable[[_Dnf, _Dnf], _Dnf]
_ALWAYS: Final[_Dnf] = (frozenset(),)
_NEVER: Final[_Dnf] = ()
_ORDER: Final[tuple[Truth, ...]] = (False, None, True)


class _Typed(NamedTuple):
    """An operand: a term, or else a constant's text. A type of None takes any."""

    term: Term | None
    text: str | None
    type: str | None


class _Compiler:
    def __init__(self, columns: Mapping[str, ColumnType]) -> None:
        self._columns = columns
        self.facts: set[Fact] = set()

    def want(self, expression: Expression | Atom, wanted: Wanted) -> _Dnf:
        """The rows for which the expression's truth value is one of those wanted."""
        match expression:
            case Not(inner):
                return self.want(inner, frozenset(None if truth is None else not truth for truth in wanted))
            case Is():
                return self._want_is(expression, wanted)
            case And() | Or():
                return self._want_junction(expression, wanted)
            case OneOf() | Same() | Missing():
                return _literal(expression, wanted)
        atom = self._atom(expression)
        if isinstance(atom, OneOf | Same | Missing):
            return _literal(atom, wanted)
        return _ALWAYS if atom in wanted else _NEVER

    def _want_is(self, test: Is, wanted: Wanted) -> _Dnf:
        it_is: Wanted = frozenset({test.value})
        yes = self.want(test.expression, it_is) if True in wanted else _NEVER
        no = self.want(test.expression, _ANY - it_is) if False in wanted else _NEVER
        return _either(yes, no)

    def _want_junction(self, junction: And | Or, wanted: Wanted) -> _Dnf:
        """AND is the least of its parts and OR the greatest, in the order FALSE, NULL, TRUE.

        So an AND lies between two bounds if all parts are at least the lower and one is at most the upper, and an OR
        if one part is at least the lower and all are at most the upper.
        """
        parts = self._parts(junction)
        for_low, for_high = (_both, _either) if isinstance(junction, And) else (_either, _both)
        result = _NEVER
        for low, high in _ranges(wanted):
            at_least = self._fold(parts, frozenset(_ORDER[low:]), for_low)
            at_most = self._fold(parts, frozenset(_ORDER[: high + 1]), for_high)
            result = _either(result, _both(at_least, at_most))
        return result

    def _fold(self, parts: Iterable[Expression | Atom], wanted: Wanted, join: _Join) -> _Dnf:
        if wanted == _ANY:
            return _ALWAYS
        return reduce(join, (self.want(part, wanted) for part in parts), _ALWAYS if join is _both else _NEVER)

    def _parts(self, junction: And | Or) -> list[Expression | Atom]:
        """The parts, where an OR's comparisons of one term with constants are one part: an IN list is one literal."""
        if isinstance(junction, And):
            return list(junction.expressions)
        parts: list[Expression | Atom] = []
        lists: dict[Term, frozenset[str]] = {}
        for part in junction.expressions:
            atom = self._atom(part) if isinstance(part, Equal) else None
            if isinstance(atom, OneOf):
                lists[atom.term] = lists.get(atom.term, frozenset()) | atom.texts
            else:
                parts.append(part)
        return parts + [OneOf(term, texts) for term, texts in lists.items()]

    def _atom(self, expression: Equal | IsNull | Operand) -> Atom | Truth:
        match expression:
            case Equal(left, right):
                return self._equal(left, right)
            case IsNull(operand):
                typed = self._typed(operand)
                return typed.text is None if typed.term is None else Missing(typed.term)
        condition = self._as(self._typed(expression), "bool", expression)
        if condition.term is not None:
            return OneOf(condition.term, frozenset({"t"}))
        return None if condition.text is None else condition.text == "t"

    def _equal(self, left_operand: Operand, right_operand: Operand) -> Atom | Truth:
        left, right = self._typed(left_operand), self._typed(right_operand)
        left = self._as(left, left.type or right.type or "text", left_operand)
        right = self._as(right, right.type or left.type or "text", right_operand)
        assert left.type is not None, "typed above"
        assert right.type is not None, "typed above"
        if self._family(left.type) != self._family(right.type):
            raise UnsupportedExpression(f"{left.type} = {right.type}")
        if right.term is None:
            left, right = right, left
        if left.term is not None and right.term is not None:
            return Same(left.term, right.term) if isinstance(left.term, RowTerm) else Same(right.term, left.term)
        if left.text is None:
            return None
        if right.term is not None:
            return OneOf(right.term, frozenset({left.text}))
        return None if right.text is None else left.text == right.text

    # -- types

    def _typed(self, operand: Operand) -> _Typed:
        match operand:
            case Column():
                return self._typed_column(operand)
            case Fact():
                return self._typed_fact(operand)
            case Constant():
                typed = _Typed(None, operand.text, operand.type)
                if operand.type is not None:
                    typed = self._as(_Typed(None, operand.text, None), operand.type, operand)
                return reduce(lambda before, cast: self._as(before, cast, operand), operand.casts, typed)

    def _typed_column(self, column: Column) -> _Typed:
        known = self._columns.get(column.name)
        if known is None:
            raise UnsupportedExpression(f"column {column.name}, which the table does not have")
        type_name = known.written
        if self._family(type_name) is None or not known.exact:
            raise UnsupportedExpression(f"column {column.name} of type {type_name}")
        for cast in column.casts:
            if not (cast == type_name or keeps_text(type_name, cast) or (self._enum(type_name) and cast in TEXT_TYPES)):
                raise UnsupportedExpression(f"({column.name})::{cast}")
            type_name = cast
        return _Typed(RowTerm(column.name), None, type_name)

    def _typed_fact(self, fact: Fact) -> _Typed:
        type_name = fact.type
        for cast in fact.casts:
            if not is_castable(type_name, cast):
                raise UnsupportedExpression(fact.sql)
            type_name = cast
        self.facts.add(fact)
        return _Typed(UserTerm(fact.sql), None, type_name)

    def _as(self, typed: _Typed, type_name: str, operand: Operand) -> _Typed:
        """The operand as of a type; only constants change."""
        if typed.type == type_name:
            return typed
        if typed.term is not None:
            raise UnsupportedExpression(f"{operand} as {type_name}")
        enum = self._enum(type_name)
        try:
            text = typed.text
            if enum is not None:
                type_name, text = enum.written, _label(enum, text, typed.type)
            elif text is not None:
                text = canonical(type_name, text) if typed.type is None else self._recast(text, typed.type, type_name)
            elif family(type_name) is None:
                raise ValueError(f"type {type_name}")  # noqa: TRY301
        except ValueError as error:
            raise UnsupportedExpression(f"'{typed.text}'::{type_name} ({error})") from None
        return _Typed(None, text, type_name)

    def _recast(self, text: str, source: str, target: str) -> str:
        return cast(text, "text" if self._enum(source) else source, target)

    def _enum(self, type_name: str) -> ColumnType | None:
        """The one enum among the columns' types that this name means."""
        found = {column for column in self._columns.values() if column.labels and type_name in (column.name, column.written)}
        return found.pop() if len(found) == 1 else None

    def _family(self, type_name: str) -> str | None:
        enum = self._enum(type_name)
        return family(type_name) if enum is None else enum.written
