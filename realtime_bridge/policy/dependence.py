"""What a piece of SQL depends on, as far as its text says: columns of the row, tables, functions.

Names are resolved as far as they are certain, and beyond that to all that they may mean: a name that may be a column
of the row counts as one, and a table counts for every column that may be one of its own.

Layer: pure. May import: policy.expression, policy.nodes.
Sources: parse_relation.c, parse_clause.c (which names a FROM makes visible, and to whom); ruleutils.c (pg_get_expr
writes a table before every column in a sub-select, and no name twice).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from realtime_bridge.policy.expression import Reads, UnsupportedExpression
from realtime_bridge.policy.nodes import (
    AUTH_FUNCTIONS,
    Node,
    auth_function,
    children,
    full_name,
    kind_of,
    name_of,
    pb,
    text_of,
    words_of,
)


@dataclass(frozen=True, slots=True)
class Dependence:
    """What an expression depends on.

    Attributes:
        keyed_by: see `Query.keyed_by`.
        has_collation: whether it names a collation.
    """

    reads: Reads
    keyed_by: frozenset[tuple[str, str]]
    has_collation: bool

    @property
    def on_row(self) -> bool:
        """Whether it may depend on the row."""
        return bool(self.reads.columns or self.reads.names)

    @property
    def on_user(self) -> bool:
        """Whether it may depend on the user."""
        return bool(self.reads.tables) or not self.reads.functions <= _OF_ARGUMENTS | _OF_TIME

    @property
    def on_time(self) -> bool:
        """Whether its own words read the clock."""
        return not self.reads.functions.isdisjoint(_OF_TIME)

    @property
    def on_chance(self) -> bool:
        """Whether its own words say something else at every call."""
        return not self.reads.functions.isdisjoint(_OF_CHANCE)


def dependence(node: Node, table: str | None, claims: frozenset[str] = AUTH_FUNCTIONS) -> Dependence:
    """What an expression over a table depends on.

    Args:
        node: the expression.
        table: `schema.table` that the row is of; None if no name of a table means the row.
        claims: the functions of `auth` that say what their names do.

    Raises:
        UnsupportedExpression: it reads what is not known where it would be evaluated (a whole row, another setting
            than the claims), or has a form whose names are not understood.
    """
    walk = _Walk("" if table is None else table.partition(".")[2], "uid" in claims)
    walk.visit(node, ())
    return Dependence(walk.reads, walk.keyed_by, walk.has_collation)


def names_in(select: Node) -> frozenset[str]:
    """The names that a SELECT's FROM makes visible."""
    return frozenset(name for source in select.from_clause for name, _ in _items(source, frozenset()))


def conjuncts_of(node: Node) -> list[Node]:
    """The parts of an AND; the node itself if it is none."""
    kind, inner = kind_of(node)
    if kind == "bool_expr" and inner.boolop == pb.AND_EXPR:
        return [part for argument in inner.args for part in conjuncts_of(argument)]
    return [node]


def sides_of(node: Node) -> tuple[Node, Node] | None:
    """What `a = b` compares; None for anything else."""
    kind, inner = kind_of(node)
    if kind == "a_expr" and inner.kind == pb.AEXPR_OP and name_of(inner.name) == "=" and inner.HasField("lexpr"):
        return inner.lexpr, inner.rexpr
    return None


class _Item(NamedTuple):
    """What one name in a FROM means.

    Attributes:
        table: `schema.table`; None if it is a function, a sub-select, or one of WITH.
        is_plain: whether its columns are called by their own names, and by no other.
    """

    table: str | None
    is_plain: bool = True


class _Level(NamedTuple):
    """What one SELECT makes visible: the items of its FROM, or the names of its WITH."""

    items: Mapping[str, _Item]
    withs: frozenset[str] = frozenset()


_Levels: TypeAlias = tuple[_Level, ...]
_Place: TypeAlias = tuple[str, str]
"""Item and column."""


@dataclass(slots=True)
class _Walk:
    """Collects what an expression reads.

    Attributes:
        own: the name by which sub-selects call the row.
        sources: each table in a FROM, with a column of it that must equal `auth.uid()` there.
    """

    own: str
    knows_uid: bool
    has_collation: bool = False
    columns: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    references: set[tuple[str, str]] = field(default_factory=set)
    sources: list[tuple[str, str | None]] = field(default_factory=list)

    @property
    def reads(self) -> Reads:
        return Reads(
            columns=frozenset(self.columns),
            names=frozenset(self.names),
            tables=frozenset(table for table, _ in self.sources),
            functions=frozenset(self.functions),
            references=frozenset(self.references),
        )

    @property
    def keyed_by(self) -> frozenset[tuple[str, str]]:
        without = {table for table, key in self.sources if key is None}
        return frozenset((table, key) for table, key in self.sources if key is not None and table not in without)

    def visit(self, message: Node, levels: _Levels) -> None:
        _VISITORS.get(message.DESCRIPTOR.name, _Walk.visit_parts)(self, message, levels)

    def visit_parts(self, message: Node, levels: _Levels) -> None:
        for child in children(message):
            self.visit(child, levels)

    # -- expressions

    def visit_column(self, reference: Node, levels: _Levels) -> None:
        words = words_of(reference.fields)
        items = [item for level in levels for item in level.items.values()]
        if words == ["*"] and items:
            self._refer(items, "*")
        elif len(words) == 1 and words != ["*"]:
            self._visit_name(words[0], items)
        elif len(words) == 2 and (words[0] == self.own or any(words[0] in level.items for level in levels)):
            self._visit_place(words[0], words[1], levels)
        else:
            raise UnsupportedExpression(".".join(words))

    def _visit_name(self, name: str, items: Sequence[_Item]) -> None:
        """A name without a table: in a sub-select it may be a column of any table, or any table as a whole."""
        if not items:
            self.columns.add(name)
            return
        if name == self.own:
            raise UnsupportedExpression(name)
        self.names.add(name)
        self._refer(items, "*")

    def _visit_place(self, item: str, column: str, levels: _Levels) -> None:
        """A name that several levels have may mean each of them."""
        if item == self.own:
            if column == "*":
                raise UnsupportedExpression(f"{item}.*")
            self.columns.add(column)
        self._refer((level.items[item] for level in levels if item in level.items), column)

    def _refer(self, items: Iterable[_Item], column: str) -> None:
        self.references.update((item.table, column) for item in items if item.table is not None)

    def visit_call(self, call: Node, levels: _Levels) -> None:
        name = full_name(call.funcname)
        setting = text_of(call.args[0]) if name == "pg_catalog.current_setting" and call.args else None
        is_claim = setting is not None and _CLAIM_SETTING.fullmatch(setting)
        if name in _ELSEWHERE and not is_claim:
            raise UnsupportedExpression(f"{name.removeprefix('pg_catalog.')}()")
        self.functions.add(name)
        self.visit_parts(call, levels)

    def visit_word(self, word: Node, _: _Levels) -> None:
        """SQL's own words for functions: CURRENT_USER, CURRENT_DATE."""
        name = pb.SQLValueFunctionOp.Name(word.op).removeprefix("SVFOP_").removesuffix("_N").lower()
        if f"pg_catalog.{name}" in _ELSEWHERE:
            raise UnsupportedExpression(name)
        self.functions.add(f"pg_catalog.{name}")

    def visit_constant(self, constant: Node, _: _Levels) -> None:
        if _MOMENT.search(constant.sval.sval):
            self.functions.add("pg_catalog.now")

    def visit_operator(self, expression: Node, levels: _Levels) -> None:
        self._use(expression.name)
        self.visit_parts(expression, levels)

    def visit_collation(self, clause: Node, levels: _Levels) -> None:
        self.has_collation = True
        self.visit_parts(clause, levels)

    def visit_order(self, order: Node, levels: _Levels) -> None:
        self._use(order.use_op)
        self.visit_parts(order, levels)

    def _use(self, operator: Iterable[Node]) -> None:
        """Note an operator, unless it is one of Postgres' own, which all depend on their arguments alone."""
        words = words_of(operator)
        if len(words) > 1 and words[0] != "pg_catalog":
            self.functions.add(".".join(words))

    def visit_link(self, link: Node, levels: _Levels) -> None:
        self._use(link.oper_name)
        if link.HasField("testexpr"):
            self.visit(link.testexpr, levels)
        if link.sub_link_type == pb.EXISTS_SUBLINK:  # which columns it selects does not matter
            link = _copy(link)
            targets = link.subselect.select_stmt.target_list
            if all(kind_of(target.res_target.val)[0] == "column_ref" for target in targets):
                del targets[:]
        self.visit(link.subselect, levels)

    def refuse(self, message: Node, _: _Levels) -> None:
        raise UnsupportedExpression(message.DESCRIPTOR.name)

    def skip(self, message: Node, levels: _Levels) -> None:
        """Part of a FROM or WITH, read by `visit_select`."""

    # -- sub-selects

    def visit_select(self, select: Node, levels: _Levels) -> None:
        outer = self._visit_with(select.with_clause, levels)
        withs = frozenset[str]().union(*(level.withs for level in outer))
        items = {name: item for source in select.from_clause for name, item in _items(source, withs)}
        keys = dict(sorted(_keyed(select, items, outer, self.own), reverse=True)) if self.knows_uid else {}
        for name, item in items.items():
            if item.table is not None:
                self.sources.append((item.table, keys.get(name)))
                self._refer([item] if not item.is_plain else [], "*")
        self.visit_parts(select, (*outer, _Level(items)))

    def _visit_with(self, clause: Node, levels: _Levels) -> _Levels:
        """Visit the queries of WITH; what follows sees all of them, each of them those before it."""
        names = [query.common_table_expr.ctename for query in clause.ctes]
        for i, query in enumerate(clause.ctes):
            visible = frozenset(names if clause.recursive else names[:i])
            self.visit(query.common_table_expr.ctequery, (*levels, _Level({}, visible)))
        return (*levels, _Level({}, frozenset(names))) if names else levels


def _items(source: Node, withs: frozenset[str], *, is_plain: bool = True) -> Iterator[tuple[str, _Item]]:
    kind, inner = kind_of(source)
    name = inner.alias.aliasname
    match kind:
        case "range_var" if not inner.catalogname:
            is_table = inner.schemaname or inner.relname not in withs
            table = f"{inner.schemaname or 'pg_catalog'}.{inner.relname}" if is_table else None
            yield name or inner.relname, _Item(table, is_plain and not inner.alias.colnames)
        case "range_subselect":
            yield name, _Item(None)
        case "range_function":
            yield name or _name_of_function(inner), _Item(None)
        case "join_expr":
            is_plain = is_plain and not (name or inner.is_natural or inner.using_clause)
            yield from _items(inner.larg, withs, is_plain=is_plain)
            yield from _items(inner.rarg, withs, is_plain=is_plain)
            if name:
                yield name, _Item(None)
        case _:
            raise UnsupportedExpression(inner.DESCRIPTOR.name)


def _name_of_function(item: Node) -> str:
    """By what name its columns are called where it has no alias."""
    function = item.functions[0].list.items[0]
    return words_of(function.func_call.funcname)[-1] if function.HasField("func_call") else ""


def _keyed(select: Node, items: Mapping[str, _Item], outer: _Levels, own: str) -> set[_Place]:
    """Columns of a FROM that must equal `auth.uid()` in every row of it that counts."""
    taken = {own, *(name for level in outer for name in level.items)}

    def place(node: Node) -> _Place | None:
        kind, inner = kind_of(node)
        words = words_of(inner.fields) if kind == "column_ref" else []
        known = len(words) == 2 and words[0] in items and words[0] not in taken and items[words[0]].is_plain
        return (words[0], words[1]) if known else None

    pairs = [sides for condition in _conditions(select) if (sides := sides_of(condition)) is not None]
    pairs += [(right, left) for left, right in pairs]
    links = {(place(left), place(right)) for left, right in pairs}
    keyed = {place(left) for left, right in pairs if auth_function(right) == "uid"}
    while more := {right for left, right in links if left is not None and left in keyed} - keyed:
        keyed |= more
    return {found for found in keyed if found is not None}


def _conditions(select: Node) -> Iterator[Node]:
    """What must hold of every row of a FROM: WHERE, and ON of inner joins."""
    if select.HasField("where_clause"):
        yield from conjuncts_of(select.where_clause)
    sources = list(select.from_clause)
    while sources:
        kind, join = kind_of(sources.pop())
        if kind == "join_expr":
            sources += [join.larg, join.rarg]
            if join.jointype == pb.JOIN_INNER and join.HasField("quals"):
                yield from conjuncts_of(join.quals)


def _copy(message: Node) -> Node:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


_VISITORS: Final[Mapping[str, Callable[[_Walk, Node, _Levels], None]]] = {
    "ColumnRef": _Walk.visit_column,
    "FuncCall": _Walk.visit_call,
    "SQLValueFunction": _Walk.visit_word,
    "A_Const": _Walk.visit_constant,
    "A_Expr": _Walk.visit_operator,
    "CollateClause": _Walk.visit_collation,
    "SortBy": _Walk.visit_order,
    "SubLink": _Walk.visit_link,
    "SelectStmt": _Walk.visit_select,
    "WithClause": _Walk.skip,
    "RangeVar": _Walk.skip,
    "Alias": _Walk.skip,
    **dict.fromkeys(
        ("ParamRef", "LockingClause", "InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt", "CurrentOfExpr"),
        _Walk.refuse,
    ),
}

_CLAIM_SETTING: Final = re.compile(r"role|request\.jwt\.claims|request\.jwt\.claim(\..*)?")

_MOMENT: Final = re.compile(r"\b(now|today|tomorrow|yesterday)\b", re.IGNORECASE)
"""Words that a text may hold, and that are a moment where it is read as one."""


def _builtin(names: str) -> frozenset[str]:
    return frozenset(f"pg_catalog.{name}" for name in names.split())


_ELSEWHERE: Final = _builtin(
    "current_setting set_config session_user current_schema current_schemas current_query pg_backend_pid "
    "inet_client_addr inet_client_port inet_server_addr inet_server_port"
)
"""What the bridge's own connection would answer otherwise than the user's."""

_OF_TIME: Final = _builtin(
    "now transaction_timestamp statement_timestamp clock_timestamp timeofday age "
    "current_date current_time current_timestamp localtime localtimestamp"
)

_OF_CHANCE: Final = _builtin(
    "random random_normal gen_random_uuid uuidv4 uuidv7 nextval currval lastval setseed txid_current pg_current_xact_id"
)

_OF_ARGUMENTS: Final = _builtin(
    "lower upper initcap length char_length octet_length btrim ltrim rtrim trim substr substring overlay left right "
    "lpad rpad replace reverse translate split_part strpos position starts_with repeat ascii md5 encode decode concat "
    "concat_ws regexp_match regexp_matches regexp_replace regexp_like like_escape similar_to_escape "
    "abs ceil ceiling floor round trunc mod power sqrt sign div "
    "date_trunc date_part extract timezone make_date make_timestamp make_timestamptz to_timestamp to_date to_char "
    "to_number isfinite overlaps "
    "array_length cardinality array_position array_positions array_to_string string_to_array array_append array_cat "
    "array_remove unnest "
    "jsonb_typeof json_typeof jsonb_array_length json_array_length jsonb_extract_path jsonb_extract_path_text "
    "json_extract_path json_extract_path_text jsonb_array_elements jsonb_array_elements_text jsonb_object_keys "
    "jsonb_path_exists jsonb_path_match jsonb_path_query jsonb_exists jsonb_exists_any jsonb_exists_all "
    "lower_inc upper_inc isempty int4range int8range numrange tsrange tstzrange daterange "
    "to_tsvector to_tsquery plainto_tsquery phraseto_tsquery websearch_to_tsquery"
)
"""Functions whose value follows from their arguments, whoever asks. What is missing here costs time, no exactness."""
