"""The nodes of Postgres' own grammar: from SQL and back.

Layer: pure. May import: policy.expression.
Sources: https://github.com/pganalyze/libpg_query (protobuf/pg_query.proto names the nodes).
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, TypeAlias

import pg_query
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it ships no types

from realtime_bridge.policy.expression import UnsupportedExpression

Node: TypeAlias = Any
"""A protobuf message of libpg_query: a `Node`, which holds one of many kinds, or what it holds."""

pb: Final[Any] = pg_query.pg_query_pb2

_MAX_LENGTH: Final = 65_536
_MAX_SHOWN: Final = 200
_PLACE: Final = re.compile(r"(?m)^\s*(?:location|stmt_location|stmt_len): -?[0-9]+\n")
"""A line of protobuf's text that says where a node was written. Within texts, ends of lines are escaped."""


def parse_value(sql: str) -> Node:
    """The node of a text that is one SQL expression.

    Raises:
        UnsupportedExpression: it is none, or is too long or too deep.
    """
    shown = sql[:_MAX_SHOWN].encode(errors="backslashreplace").decode()
    if len(sql) > _MAX_LENGTH or "\0" in sql:
        raise UnsupportedExpression(shown)
    try:
        tree: Node = pg_query.parse(f"SELECT ({sql}\n)")
    except pg_query.PgQueryError as error:
        raise UnsupportedExpression(f"{shown} ({error.message})") from None
    except (DecodeError, UnicodeError):  # deeper than protobuf reads, or a text or message that is no UTF-8
        raise UnsupportedExpression(shown) from None
    value = only_target(tree.stmts[0].stmt.select_stmt) if len(tree.stmts) == 1 else None
    if value is None:
        raise UnsupportedExpression(shown)
    return value


def sql_of(node: Node) -> str:
    """An expression as SQL that reads as the same node again.

    Raises:
        UnsupportedExpression: libpg_query does not write it so.
    """
    text = _deparsed(node)
    if text is None or _without_places(parse_value(text)) != _without_places(node):
        raise unsupported(node)
    return text


def unsupported(node: Node) -> UnsupportedExpression:
    """The refusal of a node, named as SQL as well as it can be written."""
    text = _deparsed(node) or node.WhichOneof("node") or "expression"
    return UnsupportedExpression(text[:_MAX_SHOWN])


def _deparsed(node: Node) -> str | None:
    tree = pg_query.parse("SELECT 1")
    try:
        tree.stmts[0].stmt.select_stmt.target_list[0].res_target.val.CopyFrom(node)
        text: str = pg_query.deparse(tree)
    except (pg_query.PgQueryError, TypeError, UnicodeError):  # a node that cannot stand as a value by itself
        return None
    return text.removeprefix("SELECT ")


def _without_places(node: Node) -> str:
    return _PLACE.sub("", str(node))


def children(message: Node) -> Iterator[Node]:
    """The messages that a message consists of."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            yield from value if isinstance(value, Iterable) else (value,)


def kind_of(node: Node) -> tuple[str, Node]:
    """Which kind a `Node` holds, and that."""
    kind = node.WhichOneof("node") or ""
    return kind, getattr(node, kind, None)


def words_of(parts: Iterable[Node]) -> list[str]:
    """The words of a name; "*" where there is a star."""
    return [part.string.sval if part.HasField("string") else "*" for part in parts]


def name_of(parts: Iterable[Node]) -> str:
    """A name without `pg_catalog`; any other schema stays."""
    words = words_of(parts)
    return ".".join(words[1:] if words[:1] == ["pg_catalog"] else words)


def full_name(parts: Iterable[Node]) -> str:
    """A name with its schema, which is `pg_catalog` where none is written."""
    words = words_of(parts)
    return ".".join(words if len(words) > 1 else ["pg_catalog", *words])


def only_target(select: Node) -> Node | None:
    """The one value of a SELECT that has nothing else: no FROM, no WHERE, no second column."""
    if not fields_of(select) <= {"target_list", "limit_option", "op"} or len(select.target_list) != 1:
        return None
    return select.target_list[0].res_target.val


def fields_of(message: Node) -> set[str]:
    """The names of the fields that are set."""
    return {field.name for field, _ in message.ListFields()}


def text_of(node: Node) -> str | None:
    """The text of `'text'` or `'text'::text`; None for anything else."""
    kind, inner = kind_of(node)
    if kind == "type_cast" and name_of(inner.type_name.names) == "text" and not inner.type_name.array_bounds:
        kind, inner = kind_of(inner.arg)
    return inner.sval.sval if kind == "a_const" and inner.HasField("sval") else None


def scalar(node: Node) -> Node:
    """What `(SELECT x)` selects; the node itself if it is something else."""
    kind, inner = kind_of(node)
    if kind != "sub_link":
        return node
    plain = inner.sub_link_type == pb.EXPR_SUBLINK and inner.subselect.HasField("select_stmt")
    value = only_target(inner.subselect.select_stmt) if plain else None
    return node if value is None else value


def auth_function(node: Node) -> str | None:
    """`uid` of `auth.uid()`, also as `(SELECT auth.uid())`; None for anything else."""
    kind, call = kind_of(scalar(node))
    if kind != "func_call" or not fields_of(call) <= {"funcname", "funcformat", "location"}:
        return None
    words = words_of(call.funcname)
    return words[1] if len(words) == 2 and words[0] == "auth" and words[1] in AUTH_FUNCTIONS else None


AUTH_FUNCTIONS: Final = frozenset({"uid", "role", "email", "jwt"})
"""Of the schema `auth`: what they say of a user is read from the claims."""
