"""Turns a sub-select that is about one column of the row into the set of that column's values.

`EXISTS (SELECT … FROM members m WHERE m.org = posts.org AND m.user_id = auth.uid())` holds exactly where `posts.org` is
one of `ARRAY(SELECT m.org FROM members m WHERE m.user_id = auth.uid())`: rows that differ in nothing but that column
find the same rows of `members`, save for the one equality. The set depends on the user alone.

Layer: pure. May import: policy.expression, policy.nodes, policy.dependence.
Sources: convert_EXISTS_sublink_to_join in subselect.c (under which conditions Postgres does it).
"""

from typing import Final, NamedTuple

from realtime_bridge.policy.dependence import conjuncts_of, dependence, names_in, sides_of
from realtime_bridge.policy.nodes import Node, fields_of, kind_of, pb, words_of

_PLAIN: Final = {"target_list", "from_clause", "where_clause", "limit_option", "op"}


class Membership(NamedTuple):
    """A column of the row, and the array that it must be an element of; each as a node."""

    column: Node
    array: Node


def membership(link: Node, table: str) -> Membership | None:
    """When a sub-select over other tables is TRUE; None if that is not about one column of the row.

    Args:
        link: `EXISTS (SELECT …)`, which is FALSE otherwise, or `user's value = ANY (SELECT …)`, which may be NULL.
        table: `schema.table` that the row is of.
    """
    select = link.subselect.select_stmt
    if not fields_of(select) <= _PLAIN or select.op != pb.SETOP_NONE or not select.from_clause:
        return None
    conjuncts = conjuncts_of(select.where_clause) if select.HasField("where_clause") else []
    targets = [target.res_target.val for target in select.target_list]
    if link.sub_link_type == pb.ANY_SUBLINK:
        if len(targets) != 1 or kind_of(targets[0])[0] != "column_ref":
            return None
        conjuncts = [*conjuncts, _equation(link.testexpr, targets[0])]
    elif any(kind_of(target)[0] not in ("column_ref", "a_const") for target in targets):
        return None
    own = table.partition(".")[2]
    return None if own in names_in(select) else _about_one_column(select, conjuncts, table, own)


def _about_one_column(select: Node, conjuncts: list[Node], table: str, own: str) -> Membership | None:
    for i, conjunct in enumerate(conjuncts):
        sides = sides_of(conjunct)
        for column, value in (sides, sides[::-1]) if sides is not None else ():
            if _is_of_row(column, own):
                array = array_of(_selecting(value, select, conjuncts[:i] + conjuncts[i + 1 :]))
                if not dependence(array, table).on_row:
                    return Membership(column, array)
    return None


def _is_of_row(node: Node, own: str) -> bool:
    kind, inner = kind_of(node)
    while kind == "type_cast":
        kind, inner = kind_of(inner.arg)
    return kind == "column_ref" and len(inner.fields) == 2 and words_of(inner.fields)[0] == own


def _equation(left: Node, right: Node) -> Node:
    node = pb.Node()
    node.a_expr.kind = pb.AEXPR_OP
    node.a_expr.name.add().string.sval = "="
    node.a_expr.lexpr.CopyFrom(left)
    node.a_expr.rexpr.CopyFrom(right)
    return node


def _selecting(value: Node, select: Node, conjuncts: list[Node]) -> Node:
    """A SELECT of another value, under other conditions."""
    result = pb.SelectStmt()
    result.CopyFrom(select)
    del result.target_list[:]
    result.target_list.add().res_target.val.CopyFrom(value)
    result.ClearField("where_clause")
    if len(conjuncts) == 1:
        result.where_clause.CopyFrom(conjuncts[0])
    elif conjuncts:
        result.where_clause.bool_expr.boolop = pb.AND_EXPR
        result.where_clause.bool_expr.args.extend(conjuncts)
    return result


def array_of(select: Node) -> Node:
    """`ARRAY(SELECT …)`."""
    node = pb.Node()
    node.sub_link.sub_link_type = pb.ARRAY_SUBLINK
    node.sub_link.subselect.select_stmt.CopyFrom(select)
    return node
