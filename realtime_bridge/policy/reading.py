"""Reads the SQL of a policy into the tree of `policy.expression`.

Postgres' own grammar reads the text; an allow-list decides what becomes a node. Whatever is not on it (a function, an
operator, a cast, a sub-select over a table) is left to the database if there is one, and else named in an
`UnsupportedExpression`; it is never guessed at. Names without a schema are those of `pg_catalog`, as `pg_get_expr`
writes them under an empty search path.

Layer: pure. May import: canonical, policy.expression, policy.nodes, policy.dependence, policy.membership.
Sources: ruleutils.c (what pg_get_expr writes); gram.y (what the nodes mean).
"""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Final, TypeVar

from realtime_bridge.canonical import is_castable
from realtime_bridge.policy.dependence import Dependence, dependence
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
)
from realtime_bridge.policy.membership import array_of, membership
from realtime_bridge.policy.nodes import (
    AUTH_FUNCTIONS,
    Node,
    auth_function,
    fields_of,
    kind_of,
    name_of,
    parse_value,
    pb,
    scalar,
    sql_of,
    text_of,
    unsupported,
    words_of,
)

_T = TypeVar("_T")

_INTEGER: Final = re.compile(r"-?[0-9]+")


def parse_expression(
    sql: str, *, table: str | None = None, claims: frozenset[str] = AUTH_FUNCTIONS, asking: bool = False
) -> Expression:
    """Read a boolean SQL expression.

    Args:
        sql: as pg_get_expr writes it, or a person.
        table: `schema.table` that it is about; without it, `table.column` is not understood.
        claims: the functions of the schema `auth` that read the claims as Supabase's do. What another one says of a
            user is a `Query`.
        asking: whether there is a database: what cannot be decided here becomes a `Query` or an `Asked`.

    Raises:
        UnsupportedExpression: it is no expression, a part of it cannot be decided here and nobody can be asked, or it
            reads what is not known where it would be asked: a whole row, another setting than the claims.
    """
    assert table is not None or not asking, "a question is about a table"
    return _Reader(table, claims, asking=asking).expression(parse_value(sql))


def ask_whole(sql: str, table: str) -> Asked:
    """The whole expression as one question.

    Raises:
        UnsupportedExpression: as for `parse_expression`.
    """
    return _Reader(table, AUTH_FUNCTIONS, asking=True).asked(parse_value(sql))


class _Reader:
    """Reads nodes; with `asking`, what it cannot read becomes a query or a question."""

    def __init__(self, table: str | None, claims: frozenset[str], *, asking: bool) -> None:
        self._table = table
        self._own = None if table is None else table.partition(".")[2]
        self._claims = claims
        self._asking = asking

    def expression(self, node: Node) -> Expression:
        """A boolean node.

        Raises:
            UnsupportedExpression: as for `parse_expression`.
        """
        if self._asking and not self._depends(node).on_row:
            return self._of_user(node)
        kind, inner = kind_of(node)
        read = _CONNECTIVES.get(kind)
        expression = read(self, node, inner) if read else None
        return self._leaf(node) if expression is None else expression

    def asked(self, node: Node) -> Asked:
        """The question whether a boolean node holds."""
        assert self._table is not None, "a question is about a table"
        depends = self._depends(node)
        return Asked(sql_of(node), self._table, depends.reads, depends.on_user)

    def _depends(self, node: Node) -> Dependence:
        return dependence(node, self._table, self._claims)

    def _of_user(self, node: Node) -> Expression:
        """A condition that no column is part of: read from the claims if it can be, and else a query."""
        plain = self._read_plainly(_Reader.expression, node)
        if isinstance(plain, Constant):
            return plain
        asked = self.asked(node)
        if plain is not None:
            return Leaf(plain, asked)
        depends = self._depends(node)
        return asked if depends.on_chance else Leaf(Query(asked.sql, False, depends.reads, depends.keyed_by), asked)

    def _read_plainly(self, read: "Callable[[_Reader, Node], _T]", node: Node) -> "_T | None":
        """What a node is read as without a database; None if it cannot be."""
        try:
            return read(_Reader(self._table, self._claims, asking=False), node)
        except UnsupportedExpression:
            return None

    def _leaf(self, node: Node) -> Expression:
        """A condition of the row, which Postgres is asked if it cannot be decided here."""
        if not self._asking:
            return self._condition(node)
        try:
            condition = self._condition(node)
        except UnsupportedExpression:
            return self.asked(node)
        return condition if isinstance(condition, Column | Leaf) else Leaf(condition, self.asked(node))

    # -- connectives: None if the node is not one

    def read_junction(self, node: Node, inner: Node) -> Expression:
        parts = tuple(self.expression(argument) for argument in inner.args)
        if inner.boolop == pb.AND_EXPR:
            return And(parts)
        if inner.boolop == pb.OR_EXPR:
            return Or(parts)
        if inner.boolop == pb.NOT_EXPR and len(parts) == 1:
            return Not(parts[0])
        raise unsupported(node)

    def read_truth_test(self, node: Node, inner: Node) -> Expression:
        value, positive = _TRUTH_TESTS[inner.booltesttype]
        test = Is(self.expression(inner.arg), value)
        return test if positive else Not(test)

    def read_coalesce(self, _: Node, inner: Node) -> Expression | None:
        """`coalesce(condition, true)` or `false`: NULL counts as that."""
        kind, default = kind_of(inner.args[-1])
        if len(inner.args) != 2 or kind != "a_const" or not default.HasField("boolval"):
            return None
        condition = self.expression(inner.args[0])
        return Not(Is(condition, False)) if default.boolval.boolval else Is(condition, True)

    def read_selected(self, node: Node, _: Node) -> Expression | None:
        value = scalar(node)
        return None if value is node else self.expression(value)

    # -- conditions

    def _condition(self, node: Node) -> Expression:
        kind, inner = kind_of(node)
        read = _CONDITIONS.get(kind)
        condition = read(self, node, inner) if read else None
        return self.operand(node) if condition is None else condition

    def read_null_test(self, node: Node, inner: Node) -> Expression:
        is_boolean = kind_of(inner.arg)[0] in ("bool_expr", "boolean_test", "null_test")
        tested = self.expression(inner.arg) if is_boolean else self._condition(inner.arg)
        test: Expression = IsNull(tested) if isinstance(tested, Operand) else Is(tested, None)
        if inner.nulltesttype == pb.IS_NULL:
            return test
        if inner.nulltesttype == pb.IS_NOT_NULL:
            return Not(test)
        raise unsupported(node)

    def read_comparison(self, node: Node, inner: Node) -> Expression | None:
        """A comparison; None for operators that are none, or that are not Postgres' own."""
        read = _COMPARISONS.get((inner.kind, name_of(inner.name)))
        return read(self, node, inner) if read is not None and inner.HasField("lexpr") else None

    def read_equal(self, _: Node, inner: Node) -> Expression:
        return Equal(self.operand(inner.lexpr), self.operand(inner.rexpr))

    def read_ordered(self, _: Node, inner: Node) -> Expression:
        operator = name_of(inner.name)
        left, right = self.operand(inner.lexpr), self.operand(inner.rexpr)
        if operator.startswith(">"):
            left, right = right, left
        return Ordered(left, right, operator.endswith("="))

    def read_between(self, _: Node, inner: Node) -> Expression:
        value = self.operand(inner.lexpr)
        low, high = (self.operand(item) for item in inner.rexpr.list.items)
        return And((Ordered(low, value, or_equal=True), Ordered(value, high, or_equal=True)))

    def read_not_distinct(self, _: Node, inner: Node) -> Expression:
        left, right = self.operand(inner.lexpr), self.operand(inner.rexpr)
        return Or((And((IsNull(left), IsNull(right))), Is(Equal(left, right), True)))

    def read_in_list(self, _: Node, inner: Node) -> Expression:
        """IN is what its disjunction is, also where NULLs are."""
        operand = self.operand(inner.lexpr)
        return Or(tuple(Equal(operand, self.operand(item)) for item in inner.rexpr.list.items))

    def read_in_array(self, _: Node, inner: Node) -> Expression:
        element = self.operand(inner.lexpr)
        elements = self._elements(inner.rexpr)
        if elements is not None:
            return Or(tuple(Equal(element, one) for one in elements))
        if self._asking and isinstance(element, Column) and not self._depends(inner.rexpr).on_row:
            return Within(element, self._query(inner.rexpr, many=True))
        return Has(self._array_column(inner.rexpr), element)

    def _elements(self, node: Node) -> list[Operand] | None:
        """The elements of `ARRAY[…]`, which may be cast as a whole; None if it is something else."""
        kind, inner = kind_of(node)
        if kind == "a_array_expr":
            return [self.operand(element) for element in inner.elements]
        if kind == "type_cast" and len(inner.type_name.array_bounds) == 1:
            elements = self._elements(inner.arg)
            type_name = _type(node, inner.type_name, is_array=True)
            return None if elements is None else [_cast(element, type_name) for element in elements]
        return None

    def _array_column(self, node: Node) -> Column:
        """A column that is an array; its casts are those of the elements."""
        kind, inner = kind_of(node)
        if kind == "type_cast" and len(inner.type_name.array_bounds) == 1:
            column = self._array_column(inner.arg)
            return Column(column.name, (*column.casts, _type(node, inner.type_name, is_array=True)))
        operand = self.operand(node)
        if not isinstance(operand, Column) or operand.casts:
            raise unsupported(node)
        return operand

    def read_link(self, node: Node, link: Node) -> Expression | None:
        """A sub-select over tables; None if it stands for one value."""
        operator = name_of(link.oper_name) or "="
        if not self._asking or link.sub_link_type == pb.EXPR_SUBLINK:
            return None
        if link.sub_link_type == pb.EXISTS_SUBLINK:
            return self._membership(node, link)
        if (link.sub_link_type, operator) not in ((pb.ANY_SUBLINK, "="), (pb.ALL_SUBLINK, "<>")):
            return None
        if link.sub_link_type == pb.ANY_SUBLINK and not self._depends(link.testexpr).on_row:
            return Leaf(self._membership(node, link), self.asked(node), exact=False)
        element = self.operand(link.testexpr)
        if not isinstance(element, Column):
            raise unsupported(node)
        within = Within(element, self._query(array_of(link.subselect.select_stmt), many=True))
        return within if link.sub_link_type == pb.ANY_SUBLINK else Not(within)

    def _membership(self, node: Node, link: Node) -> Expression:
        assert self._table is not None, "a question is about a table"
        found = membership(link, self._table)
        column = None if found is None else self.operand(found.column)
        if found is None or not isinstance(column, Column):
            raise unsupported(node)
        return Is(Within(column, self._query(found.array, many=True)), True)

    # -- operands

    def operand(self, node: Node) -> Operand:
        """A value.

        Raises:
            UnsupportedExpression: it can neither be read nor be a query.
        """
        if self._asking and not self._depends(node).on_row:
            plain = self._read_plainly(_Reader.operand, node)
            is_read = isinstance(plain, Constant) or (isinstance(plain, Claim) and _is_castable(plain))
            return plain if plain is not None and is_read else self._query(node, many=False)
        kind, inner = kind_of(node)
        read = _OPERANDS.get(kind)
        if read is None:
            raise unsupported(node)
        return read(self, node, inner)

    def _query(self, node: Node, *, many: bool) -> Query:
        """A value that is compared with the row's, and so must not differ between two rows of one moment.

        How text compares follows from its collation too, which a fact does not have: one that names a collation is not
        for comparing.
        """
        depends = self._depends(node)
        is_moment = depends.on_time and not depends.reads.tables
        if depends.on_row or depends.on_chance or is_moment or depends.has_collation:
            raise unsupported(node)
        return Query(sql_of(node), many, depends.reads, depends.keyed_by)

    def read_column(self, node: Node, inner: Node) -> Operand:
        match words_of(inner.fields):
            case [name] if name != "*":
                return Column(name)
            case [item, name] if item == self._own and name != "*":
                return Column(name)
        raise unsupported(node)

    def read_constant(self, node: Node, inner: Node) -> Operand:
        if inner.isnull:
            return Constant(None)
        match inner.WhichOneof("val"):
            case "sval":
                return Constant(inner.sval.sval)
            case "ival":
                return Constant(str(inner.ival.ival), "int4")
            case "boolval":
                return Constant("t" if inner.boolval.boolval else "f", "bool")
            case "fval":
                is_whole = _INTEGER.fullmatch(inner.fval.fval) and -(2**63) <= int(inner.fval.fval) < 2**63
                return Constant(inner.fval.fval, "int8" if is_whole else "numeric")
        raise unsupported(node)

    def read_function(self, node: Node, _: Node) -> Operand:
        name = auth_function(node)
        if name not in self._claims - {"jwt"}:
            raise unsupported(node)
        return Claim((name,))

    def read_claim(self, node: Node, inner: Node) -> Operand:
        """`auth.jwt() -> 'a' ->> 'b'`; text in the end."""
        keys: list[str] = []
        operand = node
        kind = "a_expr"
        while kind == "a_expr":
            key = text_of(inner.rexpr)
            if name_of(inner.name) != ("->" if keys else "->>") or inner.kind != pb.AEXPR_OP or key is None:
                raise unsupported(node)
            keys.insert(0, key)
            operand = inner.lexpr
            kind, inner = kind_of(operand)
        if auth_function(operand) != "jwt" or "jwt" not in self._claims:
            raise unsupported(node)
        return Claim(("jwt", *keys))

    def read_scalar(self, node: Node, _: Node) -> Operand:
        value = scalar(node)
        if value is node:
            raise unsupported(node)
        return self.operand(value)

    def read_type_cast(self, node: Node, inner: Node) -> Operand:
        return _cast(self.operand(inner.arg), _type(node, inner.type_name))


def _cast(operand: Operand, type_name: str) -> Operand:
    match operand:
        case Column(name, casts):
            return Column(name, (*casts, type_name))
        case Claim(path, casts):
            return Claim(path, (*casts, type_name))
        case Constant(text, own, casts):
            return Constant(text, own, (*casts, type_name))
    raise UnsupportedExpression(f"({operand.sql})::{type_name}")


def _is_castable(claim: Claim) -> bool:
    types = (claim.type, *claim.casts)
    return all(is_castable(source, target) for source, target in pairwise(types))


def _type(node: Node, type_name: Node, *, is_array: bool = False) -> str:
    plain = {"names", "typemod", "location"} | ({"array_bounds"} if is_array else set())
    if not fields_of(type_name) <= plain or type_name.typemod != -1:
        raise unsupported(node)
    return name_of(type_name.names)


_CONNECTIVES: Final[Mapping[str, Callable[[_Reader, Node, Node], Expression | None]]] = {
    "bool_expr": _Reader.read_junction,
    "boolean_test": _Reader.read_truth_test,
    "coalesce_expr": _Reader.read_coalesce,
    "sub_link": _Reader.read_selected,
}

_CONDITIONS: Final[Mapping[str, Callable[[_Reader, Node, Node], Expression | None]]] = {
    "null_test": _Reader.read_null_test,
    "a_expr": _Reader.read_comparison,
    "sub_link": _Reader.read_link,
}

_COMPARISONS: Final[Mapping[tuple[int, str], Callable[[_Reader, Node, Node], Expression]]] = {
    (pb.AEXPR_OP, "="): _Reader.read_equal,
    (pb.AEXPR_OP, "<>"): lambda reader, node, inner: Not(reader.read_equal(node, inner)),
    (pb.AEXPR_OP, "<"): _Reader.read_ordered,
    (pb.AEXPR_OP, "<="): _Reader.read_ordered,
    (pb.AEXPR_OP, ">"): _Reader.read_ordered,
    (pb.AEXPR_OP, ">="): _Reader.read_ordered,
    (pb.AEXPR_BETWEEN, "BETWEEN"): _Reader.read_between,
    (pb.AEXPR_NOT_BETWEEN, "NOT BETWEEN"): lambda reader, node, inner: Not(reader.read_between(node, inner)),
    (pb.AEXPR_NOT_DISTINCT, "="): _Reader.read_not_distinct,
    (pb.AEXPR_DISTINCT, "="): lambda reader, node, inner: Not(reader.read_not_distinct(node, inner)),
    (pb.AEXPR_IN, "="): _Reader.read_in_list,
    (pb.AEXPR_IN, "<>"): lambda reader, node, inner: Not(reader.read_in_list(node, inner)),
    (pb.AEXPR_OP_ANY, "="): _Reader.read_in_array,
    (pb.AEXPR_OP_ALL, "<>"): lambda reader, node, inner: Not(reader.read_in_array(node, inner)),
}

_TRUTH_TESTS: Final[Mapping[int, tuple[bool | None, bool]]] = {
    pb.IS_TRUE: (True, True),
    pb.IS_NOT_TRUE: (True, False),
    pb.IS_FALSE: (False, True),
    pb.IS_NOT_FALSE: (False, False),
    pb.IS_UNKNOWN: (None, True),
    pb.IS_NOT_UNKNOWN: (None, False),
}

_OPERANDS: Final[Mapping[str, Callable[[_Reader, Node, Node], Operand]]] = {
    "column_ref": _Reader.read_column,
    "a_const": _Reader.read_constant,
    "a_expr": _Reader.read_claim,
    "func_call": _Reader.read_function,
    "sub_link": _Reader.read_scalar,
    "type_cast": _Reader.read_type_cast,
}
