"""The words that a policy is taken apart into: the few things that can be decided here, and what Postgres is asked.

An expression falls apart by what its parts depend on. What depends on the user alone is a *fact*: a `Claim`, which the
token holds, or a `Query`, which only Postgres can answer, as that user. What depends on the row is compared here where
that can be exact. What is left is an `Asked`: Postgres decides it over the image of the row.

Layer: pure. May import: nothing of ours.
Sources: Hasura and ElectricSQL split permissions alike, by session variable and by shape.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_
from typing import TypeAlias


class UnsupportedExpression(Exception):  # noqa: N818 - not a failure of ours: a part that has to be decided elsewhere
    """A part of an expression cannot be decided here.

    Attributes:
        part: that part, as SQL.
    """

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.part = part


# -- what Postgres is asked --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reads:
    """What the value of a piece of SQL may depend on, as far as its text says: what functions read is not among it.

    Attributes:
        columns: of the policy's own table.
        names: written without a table inside a sub-select over tables, and so columns either of one of those or of the
            policy's own table. pg_get_expr leaves no such name.
        tables: `schema.table` of every FROM.
        functions: `schema.name` of whatever is called. SQL's own words are among them (`pg_catalog.current_user`), and
            operators outside `pg_catalog` (`extensions.=`); a text such as `'today'` counts as `pg_catalog.now`.
        references: (table, column) read of those tables; (table, `*`) where it may be any column. An UPDATE of such a
            table that leaves all of these as they are changes nothing.
    """

    columns: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    references: frozenset[tuple[str, str]] = frozenset()

    def __or__(self, other: "Reads") -> "Reads":
        """What both may depend on."""
        return Reads(
            self.columns | other.columns,
            self.names | other.names,
            self.tables | other.tables,
            self.functions | other.functions,
            self.references | other.references,
        )


@dataclass(frozen=True)
class Query:
    """A value that depends on the user alone and that only Postgres knows, under the user's role and claims.

    Attributes:
        sql: one expression; its name in `Member.facts`.
        many: whether it is an array, and the fact is the set of its elements.
        keyed_by: (table, column) pairs: of such a table only rows count in which one of its columns here equals
            `auth.uid()`. So a change of it concerns only users whose `auth.uid()` that column had or has. A table that
            is read and is not here concerns everybody.
    """

    sql: str
    many: bool
    reads: Reads
    keyed_by: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class Asked:
    """A condition that Postgres decides over the image of a row.

    Attributes:
        sql: a boolean expression; columns of the row are written `column` or, inside sub-selects, `table.column`.
        table: `schema.table` that the row is of.
        of_user: whether it may depend on the user too. If not, one answer serves all.
    """

    sql: str
    table: str
    reads: Reads
    of_user: bool

    @cached_property
    def name(self) -> str:
        """What its answers are found by: equal SQL over another table's columns is another question."""
        return f"{self.table}: {self.sql}"

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the answer depends on, in the order in which questions bring their values."""
        return tuple(sorted(self.reads.columns))


def any_asked(questions: Sequence[Asked]) -> Asked:
    """Several conditions about rows of one table and the user as one: whether any of them is TRUE."""
    first, *others = questions
    if not others:
        return first
    reads = reduce(or_, (one.reads for one in questions))
    return Asked(" OR ".join(f"({one.sql})" for one in questions), first.table, reads, of_user=True)


# -- the tree ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the row."""

    name: str
    casts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """Something that the token says of the user.

    Attributes:
        path: `("uid",)`, `("role",)`, `("email",)`, or `("jwt", key, …)`: the claim under these keys, as text.
        casts: types it is then cast to, in order.
    """

    path: tuple[str, ...]
    casts: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        """What it is before any cast."""
        return "uuid" if self.path == ("uid",) else "text"

    @cached_property
    def sql(self) -> str:
        """The claim as SQL: its name in `Member.facts`."""
        head, *keys = self.path
        quoted = ["'" + key.replace("'", "''") + "'" for key in keys]
        arrows = [" -> "] * (len(keys) - 1) + [" ->> "] * bool(keys)
        text = f"auth.{head}()" + "".join(arrow + key for arrow, key in zip(arrows, quoted, strict=True))
        for cast in self.casts:
            text = f"({text})::{cast}"
        return text


Fact: TypeAlias = Claim | Query
"""Something known of the user alone; `sql` is its name in `Member.facts`."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant.

    Attributes:
        text: as written; None for NULL.
        type: what its form says (`int4`, `int8`, `bool`); None for a quoted text or NULL, which take any type.
        casts: types it is then cast to, in order.
    """

    text: str | None
    type: str | None = None
    casts: tuple[str, ...] = ()


Operand: TypeAlias = Column | Claim | Query | Constant


@dataclass(frozen=True, slots=True)
class Equal:
    """`left = right`."""

    left: Operand
    right: Operand


@dataclass(frozen=True, slots=True)
class Ordered:
    """`left < right`, or `left <= right`."""

    left: Operand
    right: Operand
    or_equal: bool


@dataclass(frozen=True, slots=True)
class Within:
    """`operand = ANY (values)`: a column in what a query finds for the user."""

    operand: Column
    values: Query


@dataclass(frozen=True, slots=True)
class Has:
    """`element = ANY (array)`: something in an array column."""

    array: Column
    element: Operand


@dataclass(frozen=True, slots=True)
class IsNull:
    """`operand IS NULL`."""

    operand: Operand


@dataclass(frozen=True, slots=True)
class Is:
    """Whether an expression has one truth value: `IS TRUE`, `IS FALSE`, `IS UNKNOWN` (None). Itself never NULL."""

    expression: "Expression"
    value: bool | None


@dataclass(frozen=True, slots=True)
class Not:
    """`NOT expression`."""

    expression: "Expression"


@dataclass(frozen=True, slots=True)
class And:
    """All of them; TRUE if there are none."""

    expressions: tuple["Expression", ...]


@dataclass(frozen=True, slots=True)
class Or:
    """One of them; FALSE if there are none."""

    expressions: tuple["Expression", ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A condition that may be decided here, if its types allow that, and that Postgres can be asked otherwise.

    Attributes:
        exact: whether `expression` has every truth value of `asked`. If not, it is TRUE exactly where that is, and
            does not tell FALSE from NULL.
    """

    expression: "Expression"
    asked: Asked
    exact: bool = True


Expression: TypeAlias = Operand | Equal | Ordered | Within | Has | IsNull | Is | Not | And | Or | Leaf | Asked
"""An operand that stands as an expression is a boolean condition."""


def facts_of(expression: Expression) -> frozenset[Fact]:
    """Every fact that an expression reads if all of it is decided here."""
    return frozenset(_facts(expression))


def queries_of(expression: Expression) -> frozenset[Query]:
    """The queries among its facts, whose types `compile_expression` needs to know."""
    return frozenset(fact for fact in _facts(expression) if isinstance(fact, Query))


def _facts(expression: Expression) -> Iterator[Fact]:
    match expression:
        case Claim() | Query():
            yield expression
        case Equal(left, right) | Ordered(left, right) | Within(left, right) | Has(left, right):
            yield from _facts(left)
            yield from _facts(right)
        case IsNull(inner) | Is(inner) | Not(inner) | Leaf(inner):
            yield from _facts(inner)
        case And(parts) | Or(parts):
            for part in parts:
                yield from _facts(part)
