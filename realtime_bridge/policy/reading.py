"""Reads the SQL of a policy into the tree of `policy.expression`.

Postgres' own grammar reads the text; an allow-list decides what becomes a node. Whatever is not on it (a function, an
operator, a cast, a sub-select over a table) is left to the database if there is one, and else named in an
`UnsupportedExpression`; it is never guessed at. Names without a schema are those of `pg_catalog`, as `pg_get_expr`
writes them under an empty search path.

Layer: pure. May import: policy.expression.
Sources: ruleutils.c (what pg_get_expr writes); https://github.com/pganalyze/libpg_query (the nodes).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

import pg_query
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it ships no types

from realtime_bridge.policy.expression import (
    And,
    Asked,
    Claim,
    Column,
    Constant,
    Equal,
    Expression,
    Is,
    IsNull,
    Not,
    Operand,
    Or,
    Query,
    UnsupportedExpression,
)

Node: TypeAlias = Any
"""A protobuf message of libpg_query."""

AUTH_FUNCTIONS: Final = frozenset({"uid", "role", "email", "jwt"})

_MAX_LENGTH: Final = 65_536
_MAX_SHOWN: Final = 200
_BIG_INTEGER: Final = re.compile(r"-?[0-9]+")


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
    if asking:
        raise UnsupportedExpression("not yet")
    return _expression(_value_of(sql))


def ask_whole(sql: str, table: str) -> Asked:
    """The whole expression as one question.

    Raises:
        UnsupportedExpression: as for `parse_expression`.
    """
    raise UnsupportedExpression("not yet")


def _value_of(sql: str) -> Node:
    shown = sql[:_MAX_SHOWN].encode(errors="backslashreplace").decode()
    if len(sql) > _MAX_LENGTH or "\0" in sql:
        raise UnsupportedExpression(shown)
    try:
        tree: Node = pg_query.parse(f"SELECT ({sql}\n)")
    except pg_query.PgQueryError as error:
        raise UnsupportedExpression(f"{shown} ({error.message})") from None
    except (DecodeError, UnicodeError):  # deeper than protobuf reads, or a text or message that is no UTF-8
        raise UnsupportedExpression(shown) from None
    value = _only_target(tree.stmts[0].stmt.select_stmt) if len(tree.stmts) == 1 else None
    if value is None:
        raise UnsupportedExpression(shown)
    return value


def _only_target(select: Node) -> Node | None:
    """The one value of a SELECT that has nothing else: no FROM, no WHERE, no second column."""
    names = {field.name for field, _ in select.ListFields()}
    if not names <= {"target_list", "limit_option", "op"} or len(select.target_list) != 1:
        return None
    return select.target_list[0].res_target.val


def _unsupported(node: Node) -> UnsupportedExpression:
    """Name a node as SQL, as well as it can be written."""
    tree = pg_query.parse("SELECT 1")
    try:
        tree.stmts[0].stmt.select_stmt.target_list[0].res_target.val.CopyFrom(node)
        text = pg_query.deparse(tree).removeprefix("SELECT ")
    except (pg_query.PgQueryError, TypeError, UnicodeError):  # a node that cannot stand as a value by itself
        text = node.WhichOneof("node") or "expression"
    return UnsupportedExpression(text[:_MAX_SHOWN])


def _kind(node: Node) -> tuple[str, Node]:
    kind = node.WhichOneof("node") or ""
    return kind, getattr(node, kind, None)


def _expression(node: Node) -> Expression:
    kind, inner = _kind(node)
    reader = _EXPRESSIONS.get(kind)
    return reader(node, inner) if reader else _operand(node)


def _boolean(node: Node, inner: Node) -> Expression:
    parts = tuple(_expression(argument) for argument in inner.args)
    if inner.boolop == pg_query.pg_query_pb2.AND_EXPR:
        return And(parts)
    if inner.boolop == pg_query.pg_query_pb2.OR_EXPR:
        return Or(parts)
    if inner.boolop == pg_query.pg_query_pb2.NOT_EXPR and len(parts) == 1:
        return Not(parts[0])
    raise _unsupported(node)


def _null_test(node: Node, inner: Node) -> Expression:
    tested = _expression(inner.arg)
    test: Expression = IsNull(tested) if isinstance(tested, Column | Claim | Constant) else Is(tested, None)
    if inner.nulltesttype == pg_query.pg_query_pb2.IS_NULL:
        return test
    if inner.nulltesttype == pg_query.pg_query_pb2.IS_NOT_NULL:
        return Not(test)
    raise _unsupported(node)


def _truth_test(node: Node, inner: Node) -> Expression:
    pb = pg_query.pg_query_pb2
    tests: Mapping[int, tuple[bool | None, bool]] = {
        pb.IS_TRUE: (True, True),
        pb.IS_NOT_TRUE: (True, False),
        pb.IS_FALSE: (False, True),
        pb.IS_NOT_FALSE: (False, False),
        pb.IS_UNKNOWN: (None, True),
        pb.IS_NOT_UNKNOWN: (None, False),
    }
    if inner.booltesttype not in tests:
        raise _unsupported(node)
    value, positive = tests[inner.booltesttype]
    test = Is(_expression(inner.arg), value)
    return test if positive else Not(test)


def _comparison(node: Node, inner: Node) -> Expression:
    pb = pg_query.pg_query_pb2
    operator = _name(inner.name)
    if inner.kind == pb.AEXPR_OP and operator in ("=", "<>") and inner.HasField("lexpr"):
        equal = Equal(_operand(inner.lexpr), _operand(inner.rexpr))
        return equal if operator == "=" else Not(equal)
    if inner.kind == pb.AEXPR_IN and operator in ("=", "<>") and inner.rexpr.HasField("list"):
        items = [_operand(item) for item in inner.rexpr.list.items]
        return _one_of(_operand(inner.lexpr), items, positive=operator == "=")
    if (inner.kind, operator) in ((pb.AEXPR_OP_ANY, "="), (pb.AEXPR_OP_ALL, "<>")):
        return _one_of(_operand(inner.lexpr), _array(inner.rexpr), positive=operator == "=")
    return _operand(node)


def _one_of(operand: Operand, items: Iterable[Operand], *, positive: bool) -> Expression:
    """`IN` is what its disjunction is, also where NULLs are; `NOT IN` is its negation."""
    test = Or(tuple(Equal(operand, item) for item in items))
    return test if positive else Not(test)


def _array(node: Node) -> list[Operand]:
    """The elements of `ARRAY[…]`, which may be cast as a whole."""
    kind, inner = _kind(node)
    if kind == "a_array_expr":
        return [_operand(element) for element in inner.elements]
    if kind == "type_cast" and len(inner.type_name.array_bounds) == 1:
        type_name = _type(node, inner.type_name, array=True)
        return [_cast(element, type_name) for element in _array(inner.arg)]
    raise _unsupported(node)


_EXPRESSIONS: Final[Mapping[str, Callable[[Node, Node], Expression]]] = {
    "bool_expr": _boolean,
    "null_test": _null_test,
    "boolean_test": _truth_test,
    "a_expr": _comparison,
    "sub_link": lambda node, _: _expression(_selected(node)),
}


# -- operands ----------------------------------------------------------------------------------------------------------


def _operand(node: Node) -> Operand:
    kind, inner = _kind(node)
    reader = _OPERANDS.get(kind)
    if reader is None:
        raise _unsupported(node)
    return reader(node, inner)


def _column(node: Node, inner: Node) -> Operand:
    if len(inner.fields) != 1 or not inner.fields[0].HasField("string"):
        raise _unsupported(node)
    return Column(inner.fields[0].string.sval)


def _constant(node: Node, inner: Node) -> Operand:
    if inner.isnull:
        return Constant(None)
    match inner.WhichOneof("val"):
        case "sval":
            return Constant(inner.sval.sval)
        case "ival":
            return Constant(str(inner.ival.ival), "int4")
        case "boolval":
            return Constant("t" if inner.boolval.boolval else "f", "bool")
        case "fval" if _BIG_INTEGER.fullmatch(inner.fval.fval):
            return Constant(inner.fval.fval, "int8")  # an integer beyond int4; beyond int8 it is refused later
    raise _unsupported(node)


def _claim_text(node: Node, _: Node) -> Operand:
    path = _claim(node)
    if path is None:
        raise _unsupported(node)
    return Claim(path)


def _function(node: Node, inner: Node) -> Operand:
    name = _auth_function(inner)
    if name is None or name == "jwt":
        raise _unsupported(node)
    return Claim((name,))


def _auth_function(call: Node) -> str | None:
    """`uid` of `auth.uid()`; None for any other call."""
    plain = {field.name for field, _ in call.ListFields()} <= {"funcname", "funcformat", "location"}
    names = [part.string.sval for part in call.funcname]
    if plain and len(names) == 2 and names[0] == "auth" and names[1] in ("uid", "role", "email", "jwt"):
        return str(names[1])
    return None


def _claim(node: Node) -> tuple[str, ...] | None:
    """The path of `auth.jwt() -> 'a' ->> 'b'`; None for anything else, and for what is not text in the end."""
    kind, inner = _kind(node)
    if kind != "a_expr" or inner.kind != pg_query.pg_query_pb2.AEXPR_OP or _name(inner.name) != "->>":
        return None
    keys: list[str] = []
    while kind == "a_expr":
        key = _key(inner.rexpr)
        if key is None or (keys and _name(inner.name) != "->"):
            return None
        keys.append(key)
        node = inner.lexpr
        kind, inner = _kind(node)
    node = _scalar(node)
    kind, inner = _kind(node)
    if kind == "func_call" and _auth_function(inner) == "jwt":
        return ("jwt", *reversed(keys))
    return None


def _key(node: Node) -> str | None:
    """The text of `'key'` or `'key'::text`."""
    try:
        operand = _operand(node)
    except UnsupportedExpression:
        return None
    plain = isinstance(operand, Constant) and operand.type is None and operand.casts in ((), ("text",))
    return operand.text if isinstance(operand, Constant) and plain else None


def _scalar(node: Node) -> Node:
    """What `(SELECT x)` selects; the node itself if it is something else."""
    kind, inner = _kind(node)
    if kind != "sub_link":
        return node
    plain = inner.sub_link_type == pg_query.pg_query_pb2.EXPR_SUBLINK and inner.subselect.HasField("select_stmt")
    value = _only_target(inner.subselect.select_stmt) if plain else None
    return node if value is None else value


def _selected(node: Node) -> Node:
    value = _scalar(node)
    if value is node:
        raise _unsupported(node)
    return value


def _type_cast(node: Node, inner: Node) -> Operand:
    return _cast(_operand(inner.arg), _type(node, inner.type_name))


def _cast(operand: Operand, type_name: str) -> Operand:
    match operand:
        case Column(name, casts):
            return Column(name, (*casts, type_name))
        case Claim(path, casts):
            return Claim(path, (*casts, type_name))
        case Query():
            raise UnsupportedExpression("not yet")
        case Constant(text, own, casts):
            return Constant(text, own, (*casts, type_name))


_OPERANDS: Final[Mapping[str, Callable[[Node, Node], Operand]]] = {
    "column_ref": _column,
    "a_const": _constant,
    "a_expr": _claim_text,
    "func_call": _function,
    "sub_link": lambda node, _: _operand(_selected(node)),
    "type_cast": _type_cast,
}


def _name(parts: Iterable[Node]) -> str:
    """A name without `pg_catalog`; any other schema stays."""
    words = [part.string.sval for part in parts]
    return ".".join(words[1:] if words[:1] == ["pg_catalog"] else words)


def _type(node: Node, type_name: Node, *, array: bool = False) -> str:
    plain = {"names", "typemod", "location"} | ({"array_bounds"} if array else set())
    if not {field.name for field, _ in type_name.ListFields()} <= plain or type_name.typemod != -1:
        raise _unsupported(node)
    return _name(type_name.names)
