"""What becomes of an expression where there is a database to ask."""

import pytest

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
    Leaf,
    Not,
    Or,
    Ordered,
    Query,
    UnsupportedExpression,
    Within,
    facts_of,
    queries_of,
)
from realtime_bridge.policy.reading import ask_whole, parse_expression

UID = Claim(("uid",))
ALL = frozenset({"uid", "role", "email", "jwt"})


def read(sql: str, claims: frozenset[str] = ALL) -> Expression:
    return parse_expression(sql, table="public.posts", claims=claims, asking=True)


def here(sql: str) -> Expression:
    """What a leaf is decided by if its types allow it; it can be asked as well."""
    leaf = read(sql)
    assert isinstance(leaf, Leaf)
    assert leaf.exact
    return leaf.expression


def many(sql: str) -> Query:
    (query,) = queries_of(read(sql))
    assert query.many
    return query


# -- the user alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "public.is_admin()",
        "NOT public.is_admin()",
        "auth.jwt() @> '{\"a\": 1}'",
        "EXISTS (SELECT 1 FROM public.profiles p WHERE p.id = auth.uid() AND p.is_admin)",
        "public.is_admin() AND auth.role() = 'x'",
        "now() > '2030-01-01'",
        "coalesce((auth.jwt() -> 'app_metadata') ->> 'admin', 'no') = 'yes'",
        "current_user = 'anon'",
    ],
)
def test_a_condition_without_columns_is_one_query(sql: str) -> None:
    query = here(sql)
    assert isinstance(query, Query)
    assert not query.many
    assert read(query.sql) == read(sql)


def test_what_the_claims_alone_say_needs_no_query() -> None:
    assert here("auth.uid() is not null and auth.role() = 'x'") == And(
        (Not(parse_expression("auth.uid() is null")), Equal(Claim(("role",)), Constant("x")))
    )
    assert read("true") == Constant("t", "bool")


def test_a_claim_is_a_query_where_its_function_is_not_known() -> None:
    assert queries_of(read("owner = auth.uid()", frozenset({"role"}))) == {here_query("auth.uid()")}
    assert queries_of(read("owner = (auth.jwt() ->> 'x')::uuid", frozenset({"uid"})))
    assert facts_of(read("owner = auth.uid()", frozenset({"uid"}))) == {UID}


def here_query(sql: str) -> Query:
    query = parse_expression(f"a = ({sql})", table="public.posts", claims=frozenset(), asking=True)
    (found,) = queries_of(query)
    return found


def test_what_is_left_to_chance_is_asked_again_for_every_row() -> None:
    assert isinstance(read("random() < 0.5"), Asked)
    assert isinstance(read("random() < price"), Asked)


# -- the row and the user ----------------------------------------------------------------------------------------------


def test_a_value_of_the_user_becomes_a_query() -> None:
    sql = "org = (select p.org from public.profiles p where p.id = auth.uid())"
    assert here(sql) == Equal(Column("org"), next(iter(queries_of(read(sql)))))
    (query,) = queries_of(read(sql))
    assert query.sql == "(SELECT p.org FROM public.profiles p WHERE p.id = auth.uid())"
    assert query.reads.tables == {"public.profiles"}
    assert query.keyed_by == {("public.profiles", "id")}


def test_a_claim_with_a_cast_that_only_postgres_knows_becomes_a_query() -> None:
    assert here("at < (auth.jwt() ->> 'x')::timestamptz") == Ordered(
        Column("at"), here_query("(auth.jwt() ->> 'x')::timestamptz"), or_equal=False
    )
    assert here("n = (auth.jwt() ->> 'x')::int") == Equal(Column("n"), Claim(("jwt", "x"), ("int4",)))


@pytest.mark.parametrize(
    ("sql", "query"),
    [
        ("org in (select m.org from public.m)", "ARRAY(SELECT m.org FROM public.m)"),
        ("org = any (select public.my_orgs())", "ARRAY(SELECT public.my_orgs())"),
        ("org = any (public.my_org_array())", "public.my_org_array()"),
        ("org = any (array(select m.org from public.m))", "ARRAY(SELECT m.org FROM public.m)"),
        (
            "n = any (string_to_array(auth.jwt() ->> 'n', ',')::int[])",
            "string_to_array(auth.jwt() ->> 'n', ',')::int[]",
        ),
    ],
)
def test_a_set_of_the_user_becomes_a_query_of_many(sql: str, query: str) -> None:
    assert here(sql) == Within(Column(sql.split()[0]), many(sql))
    assert many(sql).sql == query


def test_not_in_is_its_negation() -> None:
    sql = "org not in (select m.org from public.m)"
    assert read(sql) == Not(read("org in (select m.org from public.m)"))
    assert here("org <> all (select m.org from public.m)") == Not(Within(Column("org"), many(sql)))
    assert here("org <> all (public.f())") == Not(Within(Column("org"), many("org = any (public.f())")))


def test_a_constant_that_only_postgres_can_read_is_a_query_too() -> None:
    assert here("name = 'x'::varchar(3)") == Equal(Column("name"), here_query("'x'::varchar(3)"))


def test_an_array_column_is_looked_into() -> None:
    assert here("auth.uid() = any (members)") == Has(Column("members"), UID)
    assert here("public.me() = any (members)") == Has(Column("members"), here_query("public.me()"))
    assert here("owner = any (array[auth.uid(), public.boss()])") == Or(
        (Equal(Column("owner"), UID), Equal(Column("owner"), here_query("public.boss()")))
    )


# -- membership --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "query"),
    [
        (
            "EXISTS (SELECT 1 FROM public.m WHERE m.org = posts.org AND m.u = auth.uid())",
            "ARRAY(SELECT m.org FROM public.m WHERE m.u = auth.uid())",
        ),
        (
            "EXISTS (SELECT m.a, m.b FROM public.m WHERE m.u = auth.uid() AND (posts.org = m.org AND m.ok))",
            "ARRAY(SELECT m.org FROM public.m WHERE m.u = auth.uid() AND m.ok)",
        ),
        ("EXISTS (SELECT FROM public.m WHERE m.org = posts.org)", "ARRAY(SELECT m.org FROM public.m)"),
        (
            "EXISTS (SELECT 1 FROM public.m JOIN public.n ON n.id = m.n WHERE lower(n.x) = posts.org AND m.ok)",
            "ARRAY(SELECT lower(n.x) FROM public.m JOIN public.n ON n.id = m.n WHERE m.ok)",
        ),
        (
            "EXISTS (SELECT FROM public.m WHERE m.org = posts.org AND EXISTS (SELECT FROM public.n WHERE n.a = m.n))",
            "ARRAY(SELECT m.org FROM public.m WHERE EXISTS (SELECT FROM public.n WHERE n.a = m.n))",
        ),
    ],
)
def test_exists_about_one_column_is_a_set(sql: str, query: str) -> None:
    assert here(sql) == Is(Within(Column("org"), many(sql)), True)
    assert many(sql).sql == query


def test_casts_of_the_column_stay_with_it() -> None:
    sql = "exists (select 1 from public.m where m.name = (posts.name)::text)"
    assert here(sql) == Is(Within(Column("name", ("text",)), many(sql)), True)


def test_a_value_of_the_user_in_a_set_about_the_row_is_true_where_the_row_is_in_a_set_of_the_user() -> None:
    sql = "auth.uid() in (select m.u from public.m where m.org = posts.org)"
    leaf = read(sql)
    assert isinstance(leaf, Leaf)
    assert leaf.expression == Is(Within(Column("org"), many(sql)), True)
    assert not leaf.exact
    assert many(sql).sql == "ARRAY(SELECT m.org FROM public.m WHERE auth.uid() = m.u)"


@pytest.mark.parametrize(
    "sql",
    [
        "exists (select 1 from public.m where m.a = posts.a and m.b = posts.b)",
        "exists (select 1 from public.m where m.a = posts.a or m.u = auth.uid())",
        "exists (select 1 from public.m where m.a < posts.a)",
        "exists (select 1 from public.m where m.a operator(extensions.=) posts.a)",
        "exists (select 1 from public.m where m.a = lower(posts.a))",
        'exists (select 1 from public.m where m.a = posts.a collate "C")',
        'exists (select 1 from public.m where m.a collate "C" = posts.a)',
        "exists (select 1 from public.m where a = posts.a)",
        "exists (select 1 from public.m join public.n on n.a = posts.a)",
        "exists (select 1 from public.m posts where posts.a = posts.b)",
        "exists (select 1 from public.m, public.n posts where m.x = posts.b)",
        "exists (select count(*) from public.m where m.a = posts.a)",
        "exists (select unnest(m.l) from public.m where m.a = posts.a)",
        "exists (select 1 from public.m where m.a = posts.a group by m.b)",
        "exists (select 1 from public.m where m.a = posts.a having count(*) > 1)",
        "exists (select 1 from public.m where m.a = posts.a limit 0)",
        "exists (select 1 from public.m where m.a = posts.a offset 1)",
        "exists (select 1 from public.m where m.a = posts.a union select 1)",
        "exists (with w as (select 1) select 1 from public.m where m.a = posts.a)",
        "exists (select 1 where posts.a = 1)",
        "exists (select 1 from public.m where m.a = posts.a and random() < 0.5)",
        "a in (select m.a from public.m where m.b = posts.b)",
        "(a, b) in (select m.a, m.b from public.m)",
        "auth.uid() in (select coalesce(m.u, m.v) from public.m where m.a = posts.a)",
        "auth.uid() <> all (select m.u from public.m where m.a = posts.a)",
        "auth.uid() < any (select m.u from public.m where m.a = posts.a)",
        "a < any (select m.a from public.m)",
        "a = all (public.f())",
        "public.is_member(org)",
        "lower(name) = 'x'",
        "data ->> 'owner' = auth.uid()::text",
        "name like 'a%'",
        "email operator(extensions.=) auth.email()",
        'name = auth.email() collate "C"',
        "expires > now()",
        "expires > (select now())",
        "case when a then b end",
        "(a + 1) is null",
    ],
)
def test_everything_else_is_asked(sql: str) -> None:
    asked = read(sql)
    assert isinstance(asked, Asked)
    assert read(asked.sql) == asked
    assert asked == ask_whole(asked.sql, "public.posts")


def test_connectives_ask_their_parts() -> None:
    one, other = read("public.f(a)"), read("public.g(b)")
    assert read("public.f(a) and not public.g(b)") == And((one, Not(other)))
    assert read("public.f(a) is not true or coalesce(public.g(b), false)") == Or((Not(Is(one, True)), Is(other, True)))
    assert read("(public.f(a) and public.g(b)) is null") == Is(And((one, other)), None)


def test_a_question_knows_what_it_depends_on() -> None:
    row = read("lower(posts.name) = 'x'")
    assert isinstance(row, Asked)
    assert (row.columns, row.of_user, row.table) == (("name",), False, "public.posts")
    user = read("public.f(b, a) and true")
    assert isinstance(user, And)
    asked = user.expressions[0]
    assert isinstance(asked, Asked)
    assert (asked.columns, asked.of_user) == (("a", "b"), True)
    assert asked.reads.functions == {"public.f"}
    assert asked.name == "public.posts: public.f(b, a)"


@pytest.mark.parametrize(
    "sql",
    [
        "public.f(posts.*)",
        "a = 1 and current_setting('app.tenant') = b",
        "current_setting('app.tenant') = 'x'",
        "other.a = 1",
        "a = $1",
        "session_user = 'x'",
    ],
)
def test_what_nobody_can_be_asked_is_refused(sql: str) -> None:
    with pytest.raises(UnsupportedExpression):
        read(sql)
    with pytest.raises(UnsupportedExpression):
        ask_whole(sql, "public.posts")


def test_parentheses_that_would_get_lost_are_kept() -> None:
    asked = read("(at at time zone 'utc')::date = day")
    assert isinstance(asked, Asked)
    assert read(asked.sql) == asked
    with pytest.raises(UnsupportedExpression):  # libpg_query writes `a OR b::text`
        read("(a or b)::text = name")
    assert ask_whole("(a or b)::text = name", "public.posts").columns == ("a", "b", "name")


FORMS = """
a in (values (1), (b))
exists (table public.t)
exists (select 1 from rows from (public.f(1), public.g(2)) as z(x, y) where z.x = posts.a)
exists (select 1 from xmltable('/a' passing x columns y int) as q)
exists (select 1 from public.t, lateral (select t.x) q where q.x = posts.a)
exists (select posts.a from public.t)
a = (select sum(t.x) filter (where t.y) over w from public.t window w as (partition by t.z) limit 1)
a = (select percentile_cont(0.5) within group (order by t.x) from public.t)
exists (select 1 from public.t group by grouping sets ((t.a), (t.b)))
(a, b) = (select t.x, t.y from public.t)
(a, b) < (c, d)
row(a, b) is distinct from row(c, d)
a[1] = 2 or (c).x = 1 or (c).* is null
array[a, b] && d
xmlelement(name foo, a) is null
a is json object
a similar to 'x' or a like any (array['x']) or a ilike 'x' escape '!'
- a = 1 or @ a = 1
null is null or not null or coalesce(null, false)
coalesce(a) or coalesce(a, null)
a = any (null) or a = any (array[null]) or a = any (array[[1, 2], [3, 4]]) or a = any ('{}')
(select posts.a where posts.b) or (select posts.a from (select 1) z)
exists (select) or exists (select 1 where posts.a)
auth.uid() or auth.foo() = a or uid() = a or "auth.uid"() = a
auth.jwt() ->> a = b or auth.jwt() -> 'a' = data or (auth.jwt() -> 'a')::int = n
exists (with recursive r as (select 1 as n union all select r.n + 1 from r) select 1 from r where r.n = posts.a)
exists (select 1 from public.m where posts.a = any (m.list))
f(variadic a) or f(a, b => c)
grouping(a) = 1 or merge_action() = a
a at time zone 'utc' = b or extract(year from a) = 2020
"""


def parts_of(expression: Expression) -> list[Query | Asked]:
    match expression:
        case And(parts) | Or(parts):
            return [found for part in parts for found in parts_of(part)]
        case Not(inner) | Is(inner):
            return parts_of(inner)
        case Leaf(_, asked):
            return [asked, *queries_of(expression)]
        case Asked():
            return [expression]
    return []


@pytest.mark.parametrize("sql", FORMS.strip().splitlines())
def test_every_form_is_asked_in_words_that_mean_the_same(sql: str) -> None:
    try:
        parts = parts_of(read(sql))
    except UnsupportedExpression:
        return
    for part in parts:
        again = ask_whole(part.sql, "public.posts")
        assert again.reads == part.reads
        if isinstance(part, Query):
            assert not again.reads.columns | again.reads.names
