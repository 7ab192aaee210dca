from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.policy.expression import (
    And,
    Claim,
    Column,
    Constant,
    Equal,
    Expression,
    Has,
    Is,
    IsNull,
    Not,
    Or,
    Ordered,
    UnsupportedExpression,
    facts_of,
)
from realtime_bridge.policy.reading import parse_expression

UID = Claim(("uid",))
ONE, NULL = Constant("1", "int4"), Constant(None)


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("(auth.uid() = owner)", Equal(UID, Column("owner"))),
        ("(( SELECT auth.uid() AS uid) = owner)", Equal(UID, Column("owner"))),
        ("(org = (auth.jwt() ->> 'org'::text))", Equal(Column("org"), Claim(("jwt", "org")))),
        ("((( SELECT auth.jwt() AS jwt) ->> 'org'::text) = org)", Equal(Claim(("jwt", "org")), Column("org"))),
        (
            "((name)::text = ((auth.jwt() -> 'app_metadata'::text) ->> 'org'::text))",
            Equal(Column("name", ("text",)), Claim(("jwt", "app_metadata", "org"))),
        ),
        (
            "(owner = ((auth.jwt() ->> 'sub'::text))::uuid)",
            Equal(Column("owner"), Claim(("jwt", "sub"), ("uuid",))),
        ),
        ("is_public", Column("is_public")),
        ("(NOT is_public)", Not(Column("is_public"))),
        ("(is_public IS NOT TRUE)", Not(Is(Column("is_public"), True))),
        ("((a = b) IS UNKNOWN)", Is(Equal(Column("a"), Column("b")), None)),
        ("((a = b) IS NULL)", Is(Equal(Column("a"), Column("b")), None)),
        ("(deleted_at IS NULL)", IsNull(Column("deleted_at"))),
        ("(auth.uid() IS NOT NULL)", Not(IsNull(UID))),
        ("(n <> '-1'::integer)", Not(Equal(Column("n"), Constant("-1", None, ("int4",))))),
        ("n = -5", Equal(Column("n"), Constant("-5", "int4"))),
        ("n = 99999999999", Equal(Column("n"), Constant("99999999999", "int8"))),
        ("n = -99999999999", Equal(Column("n"), Constant("-99999999999", "int8"))),
        ("n = 99999999999999999999", Equal(Column("n"), Constant("99999999999999999999", "numeric"))),
        ("n = 1.50", Equal(Column("n"), Constant("1.50", "numeric"))),
        ("n < 3", Ordered(Column("n"), Constant("3", "int4"), or_equal=False)),
        ("n <= 3", Ordered(Column("n"), Constant("3", "int4"), or_equal=True)),
        ("n > 3", Ordered(Constant("3", "int4"), Column("n"), or_equal=False)),
        ("n >= m", Ordered(Column("m"), Column("n"), or_equal=True)),
        ("n not between 1 and m", Not(And((Ordered(ONE, Column("n"), True), Ordered(Column("n"), Column("m"), True))))),
        (
            "a is not distinct from b",
            Or((And((IsNull(Column("a")), IsNull(Column("b")))), Is(Equal(Column("a"), Column("b")), True))),
        ),
        (
            "(a is distinct from null)",
            Not(Or((And((IsNull(Column("a")), IsNull(NULL))), Is(Equal(Column("a"), NULL), True)))),
        ),
        ("COALESCE(is_public, false)", Is(Column("is_public"), True)),
        ("COALESCE((n = m), true)", Not(Is(Equal(Column("n"), Column("m")), False))),
        ("(auth.uid() = ANY (members))", Has(Column("members"), UID)),
        ("('a'::text <> ALL ((tags)::text[]))", Not(Has(Column("tags", ("text",)), Constant("a", None, ("text",))))),
        ("true", Constant("t", "bool")),
        ("NULL::boolean", Constant(None, None, ("bool",))),
        ("name = 'it''s'", Equal(Column("name"), Constant("it's"))),
        (
            "((s)::text = ANY ((ARRAY['a'::character varying])::text[]))",
            Or((Equal(Column("s", ("text",)), Constant("a", None, ("varchar", "text"))),)),
        ),
        (
            "(n <> ALL (ARRAY[1, 2]))",
            Not(Or((Equal(Column("n"), Constant("1", "int4")), Equal(Column("n"), Constant("2", "int4"))))),
        ),
        ("n not in (1)", Not(Or((Equal(Column("n"), Constant("1", "int4")),)))),
        ("m = 'happy'::public.mood", Equal(Column("m"), Constant("happy", None, ("public.mood",)))),
        ("a and b or c", Or((And((Column("a"), Column("b"))), Column("c")))),
        ("a operator(pg_catalog.=) b", Equal(Column("a"), Column("b"))),
        ("(select auth.role() = 'x')", Equal(Claim(("role",)), Constant("x"))),
        ("auth.email() = e -- and nothing else", Equal(Claim(("email",)), Column("e"))),
    ],
)
def test_what_can_be_decided_becomes_a_tree(sql: str, expected: Expression) -> None:
    assert parse_expression(sql) == expected


@pytest.mark.parametrize(
    ("sql", "part"),
    [
        ("is_admin()", "is_admin()"),
        ("a and public.is_member(org_id)", "public.is_member(org_id)"),
        ("auth.uid(1) = a", "auth.uid(1)"),
        ("auth.uid() over () = a", "auth.uid() OVER ()"),
        ("email OPERATOR(extensions.=) auth.email()", "email OPERATOR(extensions.=) auth.email()"),
        ("a |> 3", "a |> 3"),
        ("name like 'a%'", "name LIKE 'a%'"),
        ("coalesce(a, b)", "COALESCE(a, b)"),
        ("coalesce(a, b, false)", "COALESCE(a, b, false)"),
        ("coalesce(a, 1) is null", "COALESCE(a, 1)"),
        ("a between symmetric 1 and 2", "a BETWEEN SYMMETRIC 1 AND 2"),
        (
            "exists (select 1 from members m where m.id = org_id)",
            "EXISTS (SELECT 1 FROM members m WHERE m.id = org_id)",
        ),
        ("org in (select org from members)", "org IN (SELECT org FROM members)"),
        ("(select true from members)", "(SELECT true FROM members)"),
        ("(select true where false)", "(SELECT true WHERE false)"),
        ("auth.jwt() ->> lower('A') = b", "auth.jwt() ->> lower('A')"),
        ("auth.jwt() -> 'a' = '1'", "auth.jwt() -> 'a'"),
        ("auth.jwt() #>> '{a,b}' = c", "auth.jwt() #>> '{a,b}'"),
        ("(auth.jwt() -> 'roles') ->> 0 = c", "(auth.jwt() -> 'roles') ->> 0"),
        ("data ->> 'owner' = 'x'", "data ->> 'owner'"),
        (
            "current_setting('request.jwt.claims')::json ->> 'a' = b",
            "current_setting('request.jwt.claims')::json ->> 'a'",
        ),
        ("a = 'x' collate \"C\"", "'x' COLLATE \"C\""),
        ("a = 'x'::varchar(3)", "'x'::varchar(3)"),
        ("a = any ('{1,2}')", "'{1,2}'"),
        ("a = all (array[1])", "a = ALL(ARRAY[1])"),
        ("a <> any (array[1])", "a <> ANY(ARRAY[1])"),
        ("posts.a", "posts.a"),
        ("a = $1", "$1"),
        ("current_user = a", "current_user"),
        ("(a, b) = (1, 2)", "(a, b)"),
        ("case when a then b end", "CASE WHEN a THEN b END"),
        ("(a is true) = b", "a IS TRUE"),
    ],
)
def test_anything_else_is_named(sql: str, part: str) -> None:
    with pytest.raises(UnsupportedExpression) as caught:
        parse_expression(sql)
    assert caught.value.part == part


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "a b",
        "true; drop table posts",
        "true) from posts where (true",
        "true), (false",
        "1) union select (1",
        "true /* open",
        "a\0",
        "\ud800",
        "(" * 30_000 + "a" + ")" * 30_000,
        "a or " * 20_000 + "a",
        "not (" * 500 + "a" + ")" * 500,
    ],
)
def test_text_that_is_no_single_expression_is_refused(sql: str) -> None:
    with pytest.raises(UnsupportedExpression):
        parse_expression(sql)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(sql: str) -> None:
    try:
        parse_expression(sql)
    except UnsupportedExpression as error:
        error.part.encode()


@given(
    st.lists(st.text(min_size=1).filter(lambda text: "\0" not in text and text.isprintable()), min_size=1, max_size=3)
)
def test_a_fact_is_read_back_from_its_sql(keys: list[str]) -> None:
    fact = Claim(("jwt", *keys), ("text",))
    assert parse_expression(f"{fact.sql} = a") == Equal(fact, Column("a"))


def test_facts_with_other_casts_are_other_facts() -> None:
    facts = [Claim(("uid",)), Claim(("uid",), ("text",)), Claim(("jwt", "sub")), Claim(("jwt", "sub"), ("uuid",))]
    assert len({fact.sql for fact in facts}) == len(facts)
    assert all(a.sql != b.sql for a, b in pairwise(facts))


def test_all_facts_are_found() -> None:
    expression = parse_expression(
        "not (auth.uid() = a and b) or (auth.role() in ('x', auth.email()) is null) or (auth.jwt() ->> 'a') is null"
    )
    assert facts_of(expression) == {UID, Claim(("role",)), Claim(("email",)), Claim(("jwt", "a"))}
