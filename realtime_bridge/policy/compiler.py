"""Types an expression over a table's columns, and brings it into the form that `policy.predicate` decides.

Of each node is asked "is its truth value in this set?", beginning with {TRUE}, and the question is pushed down: NOT
swaps the set, AND and OR split it, until only atoms are left. That is exact in SQL's three-valued logic, IS [NOT] TRUE
and IS NULL included.

Only what compares by its canonical text becomes an atom; any other type, cast or collation is unsupported.

Layer: pure. May import: canonical, policy.expression, policy.predicate.
Sources: parse_oper.c and parse_coerce.c (which types compare, and as what).
"""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import reduce
from typing import Final, NamedTuple, TypeAlias

from realtime_bridge.canonical import TEXT_TYPES, canonical, cast, family, is_castable, keeps_text
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
from realtime_bridge.policy.predicate import (
    ALWAYS,
    ANY_TRUTH,
    NEVER,
    TRUE_ONLY,
    Among,
    Answer,
    Atom,
    Dnf,
    Holds,
    Less,
    Missing,
    OneOf,
    Predicate,
    RowTerm,
    Same,
    Term,
    Truth,
    UserTerm,
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
    return Predicate(_Compiler(columns).want(expression, TRUE_ONLY), facts_of(expression))


_Join: TypeAlias = Callable[[Dnf, Dnf], Dnf]
_ORDER: Final[tuple[Truth, ...]] = (False, None, True)


class _Typed(NamedTuple):
    """An operand: a term, or else a constant's text. A type of None takes any."""

    term: Term | None
    text: str | None
    type: str | None


class _Compiler:
    def __init__(self, columns: Mapping[str, ColumnType]) -> None:
        self._columns = columns
        self._enums = {column.written: column for column in columns.values() if column.labels is not None}

    def want(self, expression: Expression | Atom, wanted: Wanted) -> Dnf:
        """The rows for which the expression's truth value is one of those wanted."""
        match expression:
            case Not(inner):
                return self.want(inner, frozenset(None if truth is None else not truth for truth in wanted))
            case Is():
                return self._want_is(expression, wanted)
            case And() | Or():
                return self._want_junction(expression, wanted)
            case OneOf() | Same() | Missing():
                return literal_of(expression, wanted)
            case Ordered() | Within() | Has() | Leaf() | Asked() | Query():
                raise UnsupportedExpression("not yet")
            case Less() | Among() | Holds() | Answer():
                return literal_of(expression, wanted)
        atom = self._atom(expression)
        if isinstance(atom, OneOf | Same | Missing):
            return literal_of(atom, wanted)
        return ALWAYS if atom in wanted else NEVER

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

    def _atom(self, expression: Equal | IsNull | Operand) -> Atom | Truth:
        match expression:
            case Equal(left, right):
                return self._equal(left, right)
            case IsNull(operand):
                typed = self._typed(operand)
                return typed.text is None if typed.term is None else Missing(typed.term)
        condition = self._typed(expression, or_else="bool")
        if condition.type != "bool":
            raise UnsupportedExpression(f"a condition of type {condition.type}")
        if condition.term is not None:
            return OneOf(condition.term, frozenset({"t"}))
        return None if condition.text is None else condition.text == "t"

    def _equal(self, left_operand: Operand, right_operand: Operand) -> Atom | Truth:
        left = self._typed(left_operand)
        right = self._typed(right_operand, or_else=left.type or "text")
        left = self._typed(left_operand, or_else=right.type)
        if self._family(left.type) != self._family(right.type):
            raise UnsupportedExpression(f"{left.type} = {right.type}")
        match left, right:
            case (_Typed(None, None), _) | (_, _Typed(None, None)):
                return None
            case _Typed(None, str(text)), _Typed(None, str(other)):
                return text == other
            case (_Typed(None, str(text)), _Typed(term)) | (_Typed(term), _Typed(None, str(text))) if term is not None:
                return OneOf(term, frozenset({text}))
        assert left.term is not None, "constants are dealt with"
        assert right.term is not None, "constants are dealt with"
        return Same(left.term, right.term) if isinstance(left.term, RowTerm) else Same(right.term, left.term)

    # -- types

    def _typed(self, operand: Operand, *, or_else: str | None = None) -> _Typed:
        """An operand's type; a constant that takes any is of type `or_else`."""
        match operand:
            case Column():
                return self._typed_column(operand)
            case Claim():
                return self._typed_fact(operand)
            case Query():
                raise UnsupportedExpression("not yet")
            case Constant(text, own, casts):
                typed = reduce(self._cast, [own, *casts] if own else casts, _Typed(None, text, None))
                return self._cast(typed, or_else) if typed.type is None and or_else else typed

    def _typed_column(self, column: Column) -> _Typed:
        known = self._columns.get(column.name)
        if known is None:
            raise UnsupportedExpression(f"column {column.name}, which no change brings")
        type_name = known.written
        if self._family(type_name) is None or not known.exact:
            raise UnsupportedExpression(f"column {column.name} of type {type_name}")
        for target in map(self._resolve, column.casts):
            if not (keeps_text(type_name, target) or (type_name in self._enums and target in TEXT_TYPES)):
                raise UnsupportedExpression(f"({column.name})::{target}")
            type_name = target
        return _Typed(RowTerm(column.name), None, type_name)

    def _typed_fact(self, fact: Claim) -> _Typed:
        type_name = fact.type
        for target in fact.casts:
            if not is_castable(type_name, target):
                raise UnsupportedExpression(fact.sql)
            type_name = target
        return _Typed(UserTerm(fact.sql), None, type_name)

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


def _ranges(wanted: Wanted) -> list[tuple[int, int]]:
    """The wanted truth values as runs of `_ORDER`: first and last index of each."""
    ranges: list[tuple[int, int]] = []
    for i, truth in enumerate(_ORDER):
        if truth in wanted:
            joined = ranges and ranges[-1][1] == i - 1
            ranges[-1:] = [(ranges[-1][0], i)] if joined else [*ranges[-1:], (i, i)]
    return ranges
