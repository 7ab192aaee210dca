"""The compiled form is compared with an evaluator that knows nothing of it: Kleene's tables, applied to the tree."""

from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.change import ABSENT, Image, Value
from realtime_bridge.policy.atoms import RowTerm, UserTerm
from realtime_bridge.policy.compiler import ColumnType, compile_expression
from realtime_bridge.policy.expression import (
    And,
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
    UnsupportedExpression,
)
from realtime_bridge.policy.predicate import MAX_CONJUNCTS, Key, Predicate, all_of, any_of, asked_together
from realtime_bridge.policy.reading import parse_expression

Row: TypeAlias = dict[str, Value]

MOOD = ColumnType("mood", "public", frozenset({"happy", "sad"}))
COLUMNS = {
    "a": ColumnType("bool"),
    "b": ColumnType("bool"),
    "n": ColumnType("int4"),
    "m": ColumnType("int8"),
    "owner": ColumnType("uuid"),
    "name": ColumnType("text"),
    "short": ColumnType("varchar"),
    "mood": MOOD,
    "price": ColumnType("numeric"),
    "at": ColumnType("timestamptz"),
    "code": ColumnType("bpchar"),
    "folded": ColumnType("text", exact=False),
    "list": ColumnType("_text"),
    "day": ColumnType("date"),
    "whole": ColumnType("whole", "public"),
    "codes": ColumnType("_bpchar"),
    "prices": ColumnType("_numeric"),
    "folds": ColumnType("_text", exact=False),
    "moods": ColumnType("_mood", "public"),
    "data": ColumnType("jsonb"),
}
INDEX = {name: i for i, name in enumerate(COLUMNS)}
USER = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"


def compiled(sql: str) -> Predicate:
    return compile_expression(parse_expression(sql), COLUMNS)


def image(row: Row) -> Image:
    return tuple(row.get(name) for name in COLUMNS)


def seen(sql: str, facts: dict[str, Value] | None = None, **row: Value) -> bool | None:
    return compiled(sql).evaluate(INDEX, image(row), facts or {})


# -- three-valued logic ------------------------------------------------------------------------------------------------

ROLE, LEVEL = Claim(("role",)), Claim(("jwt", "level"), ("int4",))

constants = st.sampled_from([None, "1", "2"]).map(lambda text: Constant(text, None, ("int4",)))
numbers: st.SearchStrategy[Operand] = st.one_of(st.sampled_from([Column("n"), Column("m"), LEVEL]), constants)
booleans: st.SearchStrategy[Expression] = st.one_of(
    st.sampled_from([Column("a"), Column("b")]),
    st.sampled_from([Constant("t", "bool"), Constant("f", "bool"), Constant(None)]),
)
leaves = st.one_of(booleans, st.builds(Equal, numbers, numbers), st.builds(IsNull, numbers))


def nodes(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    some = st.lists(inner, max_size=3).map(tuple)
    return st.one_of(
        st.builds(Not, inner),
        st.builds(And, some),
        st.builds(Or, some),
        st.builds(Is, inner, st.sampled_from([True, False, None])),
    )


expressions = st.recursive(leaves, nodes, max_leaves=8)
rows = st.fixed_dictionaries(
    {
        "a": st.sampled_from([None, "t", "f"]),
        "b": st.sampled_from([None, "t", "f"]),
        "n": st.sampled_from([None, "1", "2"]),
        "m": st.sampled_from([None, "1", "2"]),
    }
)
levels = st.sampled_from([None, "1", "2"])


def text_of(operand: Expression, row: Row, facts: Row) -> Value:
    match operand:
        case Column(name):
            return row[name]
        case Claim():
            return facts[operand.sql]
        case Constant(text):
            return text
        case _:
            raise AssertionError(operand)


def kleene(expression: Expression, row: Row, facts: Row) -> bool | None:
    match expression:
        case Equal(left, right):
            one, other = text_of(left, row, facts), text_of(right, row, facts)
            return None if one is None or other is None else one == other
        case IsNull(operand):
            return text_of(operand, row, facts) is None
        case Is(inner, value):
            return kleene(inner, row, facts) is value
        case Not(inner):
            truth = kleene(inner, row, facts)
            return None if truth is None else not truth
        case And(parts):
            truths = [kleene(part, row, facts) for part in parts]
            return False if False in truths else None if None in truths else True
        case Or(parts):
            truths = [kleene(part, row, facts) for part in parts]
            return True if True in truths else None if None in truths else False
    text = text_of(expression, row, facts)
    return None if text is None else text == "t"


def try_compile(expression: Expression) -> Predicate | None:
    """None if it has too many alternatives, the only thing that these expressions may fail by."""
    try:
        return compile_expression(expression, COLUMNS)
    except UnsupportedExpression as error:
        if "alternatives" in error.part:
            return None
        raise


@given(expressions, st.lists(st.tuples(rows, levels), min_size=1, max_size=5))
def test_a_predicate_holds_exactly_where_kleene_says_true(
    expression: Expression, cases: list[tuple[Row, Value]]
) -> None:
    predicate = try_compile(expression)
    for row, level in cases if predicate else []:
        facts = {LEVEL.sql: level}
        assert predicate is not None
        assert predicate.evaluate(INDEX, image(row), facts) is (kleene(expression, row, facts) is True)


@given(expressions, rows, levels, st.sets(st.sampled_from(["a", "b", "n", "m", "level"]), min_size=1))
def test_what_is_absent_never_changes_a_verdict_that_was_given(
    expression: Expression, row: Row, level: Value, absent: set[str]
) -> None:
    predicate = try_compile(expression)
    if predicate is None:
        return
    known = {LEVEL.sql: level}
    partly = {LEVEL.sql: ABSENT if "level" in absent else level}
    verdict = predicate.evaluate(
        INDEX, image({name: ABSENT if name in absent else value for name, value in row.items()}), partly
    )
    assert verdict in (None, predicate.evaluate(INDEX, image(row), known))


@given(st.lists(expressions, max_size=3), st.lists(expressions, max_size=2), rows, levels)
def test_permissive_policies_are_or_ed_and_restrictive_ones_and_ed(
    permissive: list[Expression], restrictive: list[Expression], row: Row, level: Value
) -> None:
    facts = {LEVEL.sql: level}
    try:
        some = any_of(compile_expression(e, COLUMNS) for e in permissive)
        together = all_of([some, *(compile_expression(e, COLUMNS) for e in restrictive)])
    except UnsupportedExpression:
        return
    expected = any(kleene(e, row, facts) for e in permissive) and all(kleene(e, row, facts) for e in restrictive)
    assert together.evaluate(INDEX, image(row), facts) is expected


def test_an_absent_value_is_unknown_and_not_null() -> None:
    assert seen("n is null", n=ABSENT) is None
    assert seen("not (n = 1)", n=ABSENT) is None
    assert seen("(n = 1) is not true", n=ABSENT) is None
    assert seen("n = 1 or a", n=ABSENT, a="t") is True
    assert seen("n = 1 and a", n=ABSENT, a="f") is False
    assert seen("n = null", n=ABSENT) is False
    assert seen("n = m", n=ABSENT, m="1") is None
    assert seen("n = m", n=ABSENT, m=None) is False


def test_a_text_that_postgres_would_not_write_is_unknown() -> None:
    midnight = "'2026-01-01 00:00:00+00'"
    assert seen(f"at = {midnight}", at="2026-01-01 02:00:00+02") is None
    assert seen(f"not (at = {midnight})", at="2026-01-01 02:00:00+02") is None
    assert seen(f"at < {midnight}", at="2026-01-01 02:00:00+02") is None
    assert seen("price < 1", price="0,5") is None
    assert seen("price < 1", price=ABSENT) is None
    assert seen("price < 1", price=None) is False
    assert seen("price < null", price="0,5") is False
    assert seen("'a' = any (list)", list="a") is None
    assert seen("at is null", at="2026-01-01 02:00:00+02") is False


def test_a_claim_as_a_number_is_compared_as_one() -> None:
    fact = "(auth.jwt() ->> 'n')::numeric"
    assert seen(f"{fact} = price", {fact: "1.5"}, price="1.50") is True
    assert seen(f"{fact} < price", {fact: "9"}, price="10.0") is True
    assert seen(f"{fact} < n", {fact: "9"}, n="10") is True
    assert seen(f"{fact} < price", {fact: ABSENT}, price="10") is None


def test_a_fact_that_is_not_known_is_unknown() -> None:
    assert seen("owner = auth.uid()", {}, owner=USER) is None
    assert seen("owner <> auth.uid()", {"auth.uid()": ABSENT}, owner=USER) is None
    assert seen("owner = auth.uid()", {"auth.uid()": None}, owner=USER) is False


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "row", "expected"),
    [
        (f"owner = '{{{USER.upper()}}}'", {"owner": USER}, True),
        ("n = ' +01 '", {"n": "1"}, True),
        ("n = '-0'::int8", {"n": "0"}, True),
        ("n = m", {"n": "1", "m": "1"}, True),
        ("n = 2147483648", {"n": "1"}, False),
        ("a = 'yes'", {"a": "t"}, True),
        ("a <> 'off'", {"a": "t"}, True),
        ("name = 'a'::varchar", {"name": "a"}, True),
        ("(short)::text = name", {"short": "a", "name": "a"}, True),
        ("owner::text = 'A'", {"owner": USER}, False),
        (f"owner::text = '{USER}'", {"owner": USER}, True),
        ("n::text = '1'", {"n": "1"}, True),
        ("n::bigint = m", {"n": "1", "m": "1"}, True),
        ("mood = 'happy'", {"mood": "happy"}, True),
        ("mood = 'happy'::mood", {"mood": "happy"}, True),
        ("mood = any (array['sad'::public.mood])", {"mood": "happy"}, False),
        ("mood::text = 'happy'", {"mood": "happy"}, True),
        ("'happy'::public.mood::text = name", {"name": "happy"}, True),
        ("1 = 1", {}, True),
        ("'a' = 'b'", {}, False),
        ("1::text = '1'", {}, True),
        ("true::text = name", {"name": "true"}, True),
        ("name in ('a', null)", {"name": "a"}, True),
        ("name not in ('a', null)", {"name": "b"}, False),
        ("price = 1", {"price": "1.00"}, True),
        ("price = '1e0'", {"price": "1"}, True),
        ("price = 'nan'", {"price": "NaN"}, True),
        ("price < 'nan'", {"price": "Infinity"}, True),
        ("price > 1.5", {"price": "1.50"}, False),
        ("price >= 1.5", {"price": "1.50"}, True),
        ("n = price", {"n": "1", "price": "1.0"}, True),
        ("n::numeric = 1.0", {"n": "1"}, True),
        ("n < 1.5", {"n": "1"}, True),
        ("m > n", {"n": "9", "m": "10"}, True),
        ("2 > 1", {}, True),
        ("at is null", {"at": None}, True),
        ("data is not null", {"data": "{}"}, True),
        ("at = '2026-01-01 00:00:00+00'", {"at": "2026-01-01 00:00:00+00"}, True),
        ("at < '2026-01-01 00:00:00+00'::timestamp with time zone", {"at": "0044-03-15 00:00:00+00 BC"}, True),
        ("at > '2026-01-01 00:00:00+00'", {"at": "infinity"}, True),
        ("at > '2026-01-01 00:00:00+00'", {"at": "2026-01-01 00:00:00.000001+00"}, True),
        ("day between '2026-01-01' and '2026-12-31'", {"day": "2026-12-31"}, True),
        ("'a' = any (list)", {"list": '{b,"a"}'}, True),
        ("'a' = any (list)", {"list": "{b,NULL}"}, False),
        ("'a' <> all (list)", {"list": "{b,NULL}"}, False),
        ("'a' <> all (list)", {"list": "{b}"}, True),
        ("name = any (list)", {"name": "NULL", "list": "{NULL}"}, False),
        ("name = any (list)", {"name": "NULL", "list": '{"NULL"}'}, True),
        ("a is distinct from b", {"a": None, "b": "f"}, True),
        ("a is not distinct from b", {"a": None, "b": None}, True),
        ("coalesce(a, true)", {"a": None}, True),
        ("coalesce(n = 1, false)", {"n": None}, False),
        ("name = any (array[]::text[])", {"name": None}, False),
        ("name <> all (array[]::text[])", {"name": None}, True),
    ],
)
def test_values_compare_as_their_types_do(sql: str, row: Row, expected: bool) -> None:
    assert compiled(sql).evaluate(INDEX, image(row), {}) is expected


@pytest.mark.parametrize(
    ("sql", "part"),
    [
        ("missing", "column missing, which no change brings"),
        ("price = name", "numeric = text"),
        ("price::text = name", "(price)::text"),
        ("price = 'x'", "'x'::numeric (not a number)"),
        ("at = 'tomorrow'", "'tomorrow'::timestamptz (not written as Postgres writes it in UTC)"),
        ("at::date = '2026-01-01'", "(at)::date"),
        ("name < 'a'", "the order of text"),
        ("at < day", "timestamptz < date"),
        ("whole is null", "column whole of type public.whole"),
        ("code = any (codes)", "column codes of type _bpchar"),
        ("'a' = any (codes)", "column codes of type _bpchar"),
        ("1.5 = any (prices)", "numeric = ANY _numeric"),
        ("null = any (list)", "NULL = ANY"),
        ("1 = any (list)", "int4 = ANY text"),
        ("'a' = any (folds)", "column folds of type _text"),
        ("'a' = any (name)", "column name of type text"),
        ("'sad' = any (moods)", "column moods of type public._mood"),
        ("code = 'a'", "column code of type bpchar"),
        ("folded = 'a'", "column folded of type text"),
        ("list = name", "column list of type _text"),
        ("n = name", "int4 = text"),
        ("owner = auth.role()", "uuid = text"),
        ("mood = name", "public.mood = text"),
        ("mood = 'hapy'", "'hapy'::public.mood (not a label)"),
        ("n = 'x'", "'x'::int4 (not an integer)"),
        ("owner = 'x'", "'x'::uuid (not a uuid)"),
        ("n", "a condition of type int4"),
        ("auth.uid()", "a condition of type uuid"),
        ("1", "a condition of type int4"),
        ("a::text = 'true'", "(a)::text"),
        ("m::int4 = n", "(m)::int4"),
        ("name::uuid = owner", "(name)::uuid"),
        ("auth.uid()::int4 = n", "(auth.uid())::int4"),
        ("(auth.jwt() ->> 'x')::date = day", "(auth.jwt() ->> 'x')::date"),
        ("(auth.jwt() ->> 'x')::public.mood = mood", "(auth.jwt() ->> 'x')::public.mood"),
        ("'x'::citext = name", "type citext"),
        ("'x'::text::public.mood = mood", "'x'::public.mood (not a label)"),
    ],
)
def test_types_whose_texts_do_not_decide_are_refused(sql: str, part: str) -> None:
    with pytest.raises(UnsupportedExpression) as caught:
        compiled(sql)
    assert caught.value.part == part


def test_an_enum_name_without_schema_must_be_unique() -> None:
    columns = {"x": MOOD, "y": ColumnType("mood", "other", frozenset({"happy"}))}
    assert compile_expression(parse_expression("y = 'happy'::other.mood"), columns).conjuncts
    with pytest.raises(UnsupportedExpression, match="type mood"):
        compile_expression(parse_expression("x = 'happy'::mood"), columns)


# -- the form ----------------------------------------------------------------------------------------------------------


def test_constants_disappear_and_contradictions_too() -> None:
    assert compiled("true or a").conjuncts == (frozenset(),)
    assert compiled("a and false").conjuncts == ()
    assert compiled("a and not a").conjuncts == ()
    assert compiled("a and n is null and n is not null").conjuncts == ()
    assert compiled("a or (a and b)") == compiled("a")


def test_a_list_of_constants_is_one_literal() -> None:
    predicate = compiled("n in (" + ",".join(map(str, range(1000))) + ") and a")
    (conjunct,) = predicate.conjuncts
    assert len(conjunct) == 2


def test_an_equality_of_column_and_fact_can_be_looked_up() -> None:
    (conjunct,) = compiled("auth.uid() = owner and auth.role() = 'x' and a").conjuncts
    key = Key(RowTerm("owner"), UserTerm("auth.uid()"), of_elements=False)
    assert {literal.key for literal in conjunct} == {key, None}
    assert sorted((literal.of_row, literal.of_user) for literal in conjunct) == [
        (False, False),
        (False, True),
        (True, False),
    ]
    (conjunct,) = compiled("auth.uid() <> owner").conjuncts
    assert [literal.key for literal in conjunct] == [None]


def test_too_many_alternatives_are_refused() -> None:
    many = " and ".join(f"(n = {i} or m = {i})" for i in range(7))
    with pytest.raises(UnsupportedExpression, match=f"more than {MAX_CONJUNCTS} alternatives"):
        compiled(many)


def test_a_predicate_knows_its_columns_and_facts() -> None:
    predicate = compiled("auth.uid() = owner or (a and auth.role() = 'x')")
    assert predicate.columns == {"owner", "a"}
    assert predicate.facts == {Claim(("uid",)), ROLE}


# -- what Postgres decides ---------------------------------------------------------------------------------------------


def asking(sql: str) -> Predicate:
    return compile_expression(parse_expression(sql, table="public.t", asking=True), COLUMNS)


def test_alternatives_over_the_same_columns_are_one_question() -> None:
    policies = [
        "may_read(n)",
        "may_write(n)",
        "may_see(n, m)",
        "is_open(m) AND a",
        "owner = auth.uid()",
        "sees(n) IS NOT TRUE",
    ]
    apart = any_of(asking(policy) for policy in policies)
    together = asked_together(apart)
    assert len(together.asked) == len(apart.asked) - 1
    (joined,) = together.asked - apart.asked
    assert sorted(part in joined.sql for part in ("may_read(n)", "may_write(n)", "may_see", "sees")) == [
        False,
        False,
        True,
        True,
    ]
    assert joined.columns == ("n",)
    assert joined.reads.functions == {"pg_catalog.may_read", "pg_catalog.may_write"}
    assert len(together.conjuncts) == len(apart.conjuncts) - 1
    assert asked_together(together) == together
