"""Types an expression over a table's columns, and brings it into the form that `policy.predicate` decides.

Of each node is asked "is its truth value in this set?", beginning with {TRUE}, and the question is pushed down: NOT
swaps the set, AND and OR split it, until only atoms are left. That is exact in SQL's three-valued logic, IS [NOT] TRUE
and IS NULL included.

Only what compares by its canonical text, or in an order that is known here, becomes an atom. For any other type, cast
or collation Postgres is asked, and where it cannot be, the expression is unsupported.

Layer: pure. May import: change, canonical, policy.atoms, policy.expression, policy.ordering,
policy.predicate.
Sources: parse_oper.c and parse_coerce.c (which types compare, and as what).
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import reduce
from typing import Final, NamedTuple, TypeAlias

from realtime_bridge.canonical import FORMED_TYPES, TEXT_TYPES, canonical, cast, family, is_castable, keeps_text
from realtime_bridge.change import ABSENT
from realtime_bridge.policy.atoms import (
    Among,
    Answer,
    Atom,
    FixedTerm,
    Holds,
    Less,
    Missing,
    OneOf,
    RowTerm,
    Same,
    Term,
    Truth,
    UserTerm,
)
from realtime_bridge.policy.expression import (
    And,
    Asked,
    Claim,
    Column,
    Constant,
    Equal,
    Expression,
    Has,
    Is,
    IsNull,
    Leaf,
    Not,
    Operand,
    Or,
    Ordered,
    Query,
    UnsupportedExpression,
    Within,
    facts_of,
)
from realtime_bridge.policy.ordering import is_ordered
from realtime_bridge.policy.predicate import (
    ALWAYS,
    ANY_TRUTH,
    NEVER,
    TRUE_ONLY,
    Dnf,
    Predicate,
    Wanted,
    both,
    either,
    literal_of,
)

_NO_TYPES: Final[Mapping[str, str | None]] = {}


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


def compile_expression(
    expression: Expression,
    columns: Mapping[str, ColumnType],
    types: Mapping[str, str | None] = _NO_TYPES,
    *,
    hidden: Set[str] = frozenset(),
) -> Predicate:
    """Type an expression over a table's columns and normalise "it is TRUE".

    Args:
        expression: what was read, over a table of these columns.
        columns: name → type, of all that changes bring.
        types: `Query.sql` → its type as `ColumnType.written` has it, the elements' if it is many, the base type of a
            domain. Where it is None or missing, or of a collation that is not deterministic, Postgres is asked about
            the row instead.
        hidden: the table's other columns, which no change brings.

    Raises:
        UnsupportedExpression: a column is unknown, types do not compare by their texts and Postgres cannot be asked,
            or there are too many alternatives.
    """
    compiler = _Compiler(columns, types, hidden)
    settled = compiler.settle(expression)
    return Predicate(compiler.want(settled, TRUE_ONLY), facts_of(settled))


_Join: TypeAlias = Callable[[Dnf, Dnf], Dnf]
_ORDER: Final[tuple[Truth, ...]] = (False, None, True)


class _Typed(NamedTuple):
    """An operand: a term, or else a constant's text. A type of None takes any."""

    term: Term | None
    text: str | None
    type: str | None


class _Compiler:
    def __init__(self, columns: Mapping[str, ColumnType], types: Mapping[str, str | None], hidden: Set[str]) -> None:
        self._columns = columns
        self._types = types
        self._hidden = hidden
        self._enums = {column.written: column for column in columns.values() if column.labels is not None}

    def settle(self, expression: Expression) -> Expression:
        """The expression with every leaf as what decides it: itself, or a question."""
        match expression:
            case Leaf(inner, asked, exact):
                try:
                    inner = self.settle(inner)
                    self.want(inner, TRUE_ONLY)
                except UnsupportedExpression:
                    return self._question(asked)
                return inner if exact else Leaf(inner, self._question(asked), exact)
            case Asked():
                return self._question(expression)
            case Not(inner):
                return Not(self.settle(inner))
            case Is(inner, value):
                return Is(self.settle(inner), value)
            case And(parts):
                return And(tuple(map(self.settle, parts)))
            case Or(parts):
                return Or(tuple(map(self.settle, parts)))
        return expression

    def _question(self, asked: Asked) -> Asked:
        """The question with all columns that it may depend on, now that they are known."""
        unknown = (asked.reads.columns - self._columns.keys()) | (asked.reads.names & self._hidden)
        if unknown:
            raise UnsupportedExpression(_not_brought(min(unknown)))
        columns = asked.reads.columns | (asked.reads.names & self._columns.keys())
        return replace(asked, reads=replace(asked.reads, columns=columns, names=frozenset()))

    def want(self, expression: Expression | Atom, wanted: Wanted) -> Dnf:
        """The rows for which the expression's truth value is one of those wanted."""
        match expression:
            case Not(inner):
                return self.want(inner, frozenset(None if truth is None else not truth for truth in wanted))
            case Is():
                return self._want_is(expression, wanted)
            case And() | Or():
                return self._want_junction(expression, wanted)
            case Leaf(inner, asked):
                tells_apart = (False in wanted) != (None in wanted)
                return self.want(asked if tells_apart else inner, wanted)
        atom = self._atom(expression)
        if atom is None or isinstance(atom, bool):
            return ALWAYS if atom in wanted else NEVER
        return literal_of(atom, wanted)

    def _want_is(self, test: Is, wanted: Wanted) -> Dnf:
        it_is: Wanted = frozenset({test.value})
        yes = self.want(test.expression, it_is) if True in wanted else NEVER
        no = self.want(test.expression, ANY_TRUTH - it_is) if False in wanted else NEVER
        return either(yes, no)

    def _want_junction(self, junction: And | Or, wanted: Wanted) -> Dnf:
        """AND is the least of its parts and OR the greatest, in the order FALSE, NULL, TRUE.

        So an AND lies between two bounds if all parts are at least the lower and one is at most the upper, and an OR
        if one part is at least the lower and all are at most the upper.
        """
        parts = self._parts(junction)
        for_low, for_high = (both, either) if isinstance(junction, And) else (either, both)
        result = NEVER
        for low, high in _ranges(wanted):
            at_least = self._fold(parts, frozenset(_ORDER[low:]), for_low)
            at_most = self._fold(parts, frozenset(_ORDER[: high + 1]), for_high)
            result = either(result, both(at_least, at_most))
        return result

    def _fold(self, parts: Iterable[Expression | Atom], wanted: Wanted, join: _Join) -> Dnf:
        if wanted == ANY_TRUTH:
            return ALWAYS
        return reduce(join, (self.want(part, wanted) for part in parts), ALWAYS if join is both else NEVER)

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

    def _atom(self, expression: Expression | Atom) -> Atom | Truth:
        match expression:
            case Equal(left, right):
                return self._equal(left, right)
            case Ordered(left, right, or_equal):
                return self._ordered(left, right, or_equal=or_equal)
            case Within(operand, values):
                return self._within(operand, values)
            case Has(array, element):
                return self._has(array, element)
            case IsNull(operand):
                return self._is_null(operand)
            case Asked():
                return Answer(expression)
            case Column() | Claim() | Query() | Constant():
                return self._condition(expression)
            case OneOf() | Same() | Less() | Among() | Holds() | Missing() | Answer():
                return expression
        raise AssertionError(f"{type(expression).__name__} is no atom")

    def _condition(self, operand: Operand) -> Atom | Truth:
        typed = self._typed(operand, or_else="bool")
        if typed.type != "bool":
            raise UnsupportedExpression(f"a condition of type {typed.type}")
        if typed.term is not None:
            return OneOf(typed.term, frozenset({"t"}))
        return None if typed.text is None else typed.text == "t"

    def _equal(self, left_operand: Operand, right_operand: Operand) -> Atom | Truth:
        left, right, _ = self._compared(left_operand, right_operand, "=")
        if left is None or right is None:
            return None
        match left, right:
            case FixedTerm(text), FixedTerm(other):
                return text == other
            case (FixedTerm(text), (RowTerm() | UserTerm()) as term) | (
                (RowTerm() | UserTerm()) as term,
                FixedTerm(text),
            ):
                return OneOf(term, frozenset({text}))
        return Same(left, right) if isinstance(left, RowTerm) else Same(right, left)

    def _ordered(self, left_operand: Operand, right_operand: Operand, *, or_equal: bool) -> Atom | Truth:
        left, right, order = self._compared(left_operand, right_operand, "<=" if or_equal else "<")
        if not is_ordered(order):
            raise UnsupportedExpression(f"the order of {order}")
        if left is None or right is None:
            return None
        less = Less(left, right, or_equal, order)
        is_constant = isinstance(left, FixedTerm) and isinstance(right, FixedTerm)
        truth = less.truth({}, (), {}) if is_constant else ABSENT
        return less if truth is ABSENT else truth

    def _within(self, operand: Column, values: Query) -> Atom:
        column, element = self._typed_column(operand), self._type_of(values)
        if self._common(column.type, element, "IN") in FORMED_TYPES or not isinstance(column.term, RowTerm):
            raise UnsupportedExpression(f"{column.type} IN {element}")
        return Among(column.term, UserTerm(values.sql))

    def _has(self, array: Column, element: Operand) -> Atom:
        known = self._known(array)
        type_name = known.name.removeprefix("_") if known.schema == "pg_catalog" and known.name[:1] == "_" else None
        type_name = self._cast_column(array, type_name if known.exact else None)
        typed = self._typed(element, or_else=type_name)
        if self._common(typed.type, type_name, "= ANY") in FORMED_TYPES:
            raise UnsupportedExpression(f"{typed.type} = ANY {known.written}")
        term = typed.term or FixedTerm("" if typed.text is None else typed.text)
        if typed.term is None and typed.text is None:
            raise UnsupportedExpression("NULL = ANY")
        return Holds(RowTerm(array.name), term)

    def _is_null(self, operand: Operand) -> Atom | Truth:
        if isinstance(operand, Column) and not operand.casts:
            known = self._known(operand)
            if known.schema != "pg_catalog" and known.labels is None:
                raise UnsupportedExpression(f"column {operand.name} of type {known.written}")  # ROW(NULL) IS NULL
            return Missing(RowTerm(operand.name))
        typed = self._typed(operand)
        return typed.text is None if typed.term is None else Missing(typed.term)

    def _compared(
        self, left_operand: Operand, right_operand: Operand, operator: str
    ) -> tuple[Term | None, Term | None, str]:
        """Two operands as terms that compare with each other (None is NULL), and as what."""
        left = self._typed(left_operand)
        right = self._typed(right_operand, or_else=left.type or "text")
        left = self._typed(left_operand, or_else=right.type)
        common = self._common(left.type, right.type, operator)
        return _in_form(left, common), _in_form(right, common), common

    def _common(self, left: str | None, right: str | None, operator: str) -> str:
        """The family of which two types both are; an integer is a number, too."""
        families = {self._family(left), self._family(right)}
        if families == {"integer", "numeric"}:
            return "numeric"
        found = families.pop() if len(families) == 1 else None
        if found is None:
            raise UnsupportedExpression(f"{left} {operator} {right}")
        return found

    # -- types

    def _typed(self, operand: Operand, *, or_else: str | None = None) -> _Typed:
        """An operand's type; a constant that takes any is of type `or_else`."""
        match operand:
            case Column():
                return self._typed_column(operand)
            case Claim():
                return self._typed_claim(operand)
            case Query():
                return _Typed(UserTerm(operand.sql), None, self._type_of(operand))
            case Constant(text, own, casts):
                typed = reduce(self._cast, [own, *casts] if own else casts, _Typed(None, text, None))
                return self._cast(typed, or_else) if typed.type is None and or_else else typed

    def _known(self, column: Column) -> ColumnType:
        known = self._columns.get(column.name)
        if known is None:
            raise UnsupportedExpression(_not_brought(column.name))
        return known

    def _typed_column(self, column: Column) -> _Typed:
        known = self._known(column)
        type_name = self._cast_column(column, known.written if known.exact else None)
        return _Typed(RowTerm(column.name), None, type_name)

    def _cast_column(self, column: Column, type_name: str | None) -> str:
        """The type after a column's casts, which must leave its texts as they are."""
        if type_name is None or self._family(type_name) is None:
            raise UnsupportedExpression(f"column {column.name} of type {self._known(column).written}")
        for target in map(self._resolve, column.casts):
            if not (keeps_text(type_name, target) or (type_name in self._enums and target in TEXT_TYPES)):
                raise UnsupportedExpression(f"({column.name})::{target}")
            type_name = target
        return type_name

    def _typed_claim(self, claim: Claim) -> _Typed:
        type_name = claim.type
        for target in claim.casts:
            if not is_castable(type_name, target):
                raise UnsupportedExpression(claim.sql)
            type_name = target
        return _Typed(UserTerm(claim.sql), None, type_name)

    def _type_of(self, query: Query) -> str:
        type_name = self._types.get(query.sql)
        if self._family(type_name) is None or type_name is None:
            raise UnsupportedExpression(query.sql)
        return type_name

    def _cast(self, constant: _Typed, type_name: str) -> _Typed:
        target = self._resolve(type_name)
        if constant.text is None or constant.type == target:
            return constant._replace(type=target)
        try:
            return _Typed(None, self._read(constant.text, constant.type, target), target)
        except ValueError as error:
            raise UnsupportedExpression(f"'{constant.text}'::{target} ({error})") from None

    def _read(self, text: str, source: str | None, target: str) -> str:
        if target in self._enums:
            if source is not None or text not in (self._enums[target].labels or ()):
                raise ValueError("not a label")
            return text
        if source is None:
            return canonical(target, text)
        return cast(text, "text" if source in self._enums else source, target)

    def _resolve(self, type_name: str) -> str:
        """The one name of a type that compares by its texts; an enum may be written without its schema."""
        if family(type_name) or type_name in self._enums:
            return type_name
        found = {name for name, enum in self._enums.items() if enum.name == type_name}
        if len(found) != 1:
            raise UnsupportedExpression(f"type {type_name}")
        return found.pop()

    def _family(self, type_name: str | None) -> str | None:
        return type_name if type_name is None or type_name in self._enums else family(type_name)


def _not_brought(column: str) -> str:
    return f"column {column}, which no change brings"


def _in_form(typed: _Typed, common: str) -> Term | None:
    """A term whose texts are equal where its values are; None for NULL."""
    match typed.term:
        case None:
            return None if typed.text is None else FixedTerm(typed.text)
        case RowTerm() | UserTerm() if common in FORMED_TYPES:
            return replace(typed.term, form=common)
    return typed.term


def _ranges(wanted: Wanted) -> list[tuple[int, int]]:
    """The wanted truth values as runs of `_ORDER`: first and last index of each."""
    ranges: list[tuple[int, int]] = []
    for i, truth in enumerate(_ORDER):
        if truth in wanted:
            joined = ranges and ranges[-1][1] == i - 1
            ranges[-1:] = [(ranges[-1][0], i)] if joined else [*ranges[-1:], (i, i)]
    return ranges
