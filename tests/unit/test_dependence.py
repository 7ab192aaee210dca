import pytest

from realtime_bridge.policy.dependence import Dependence, dependence
from realtime_bridge.policy.expression import Reads, UnsupportedExpression
from realtime_bridge.policy.nodes import parse_value


def of(sql: str, table: str = "public.posts", claims: frozenset[str] = frozenset({"uid"})) -> Dependence:
    return dependence(parse_value(sql), table, claims)


def reads(sql: str) -> Reads:
    return of(sql).reads


def test_columns_of_the_row_are_called_by_their_names_or_by_their_table() -> None:
    assert reads("a = 1 and posts.b and (select posts.c)").columns == {"a", "b", "c"}
    assert reads("exists (select 1 from public.t x where x.id = posts.a and x.b)").columns == {"a"}
    assert of("lower('x') = 'y' or auth.uid() is null").on_row is False


def test_the_tables_and_columns_of_sub_selects_are_found_wherever_they_stand() -> None:
    sql = """
      a in (with w as (select x.id from public.x where x.ok) select w.id from w join public.y as why on why.id = w.id
            where exists (select from public.z) union select s.id from (select q.id from other.q) as s)
    """
    found = reads(sql)
    assert found.tables == {"public.x", "public.y", "public.z", "other.q"}
    assert found.references == {("public.x", "id"), ("public.x", "ok"), ("public.y", "id"), ("other.q", "id")}
    assert found.columns == {"a"}
    assert found.names == frozenset()


def test_a_function_in_from_is_called_by_its_name() -> None:
    assert reads("a in (select f.f from public.f())").tables == frozenset()
    with pytest.raises(UnsupportedExpression, match=r"g\.f"):
        reads("a in (select g.f from public.f())")


def test_a_name_of_with_hides_a_table_only_where_it_is_visible() -> None:
    assert reads("(with t as (select 1 as id) select t.id from t) = 1").tables == frozenset()
    assert reads("(with t as (select t.id from t) select t.id from t) = 1").tables == {"pg_catalog.t"}
    assert reads("(with recursive t as (select t.id from t) select t.id from t) = 1").tables == frozenset()
    assert reads("(with a as (select b.id from b), b as (select 1 as id) select 1 from a) = 1").tables == {
        "pg_catalog.b"
    }
    assert reads("(with t as (select 1 as id) select t.id from public.t) = 1").tables == {"public.t"}


@pytest.mark.parametrize(
    ("sql", "references"),
    [
        ("exists (select * from public.m where m.a)", {("public.m", "a")}),
        ("a in (select * from public.m where m.a)", {("public.m", "a"), ("public.m", "*")}),
        ("exists (select m.x, m.y from public.m where m.a)", {("public.m", "a")}),
        ("a = (select count(m.*) from public.m)", {("public.m", "*")}),
        (
            "a in (select n.b from public.m natural join public.n)",
            {("public.m", "*"), ("public.n", "*"), ("public.n", "b")},
        ),
        (
            "a in (select n.b from public.m join public.n using (id))",
            {("public.m", "*"), ("public.n", "*"), ("public.n", "b")},
        ),
        ("a in (select m.q from public.m as m(q))", {("public.m", "q"), ("public.m", "*")}),
        (
            "a in (select j.q from (public.m join public.n on m.i = n.i) as j)",
            {("public.m", "i"), ("public.n", "i"), ("public.m", "*"), ("public.n", "*")},
        ),
        ("a in (select b from public.m)", {("public.m", "*")}),
    ],
)
def test_where_it_is_not_certain_which_column_is_read_it_may_be_any(sql: str, references: set[tuple[str, str]]) -> None:
    assert reads(sql).references == references


def test_a_name_that_may_be_of_the_row_counts_as_one() -> None:
    found = of("exists (select 1 from public.m where user_id = auth.uid())")
    assert found.reads.names == {"user_id"}
    assert found.on_row
    shadowed = of("exists (select 1 from public.other posts where posts.a)")
    assert shadowed.reads.columns == {"a"}
    assert shadowed.reads.references == {("public.other", "a")}


def test_everything_that_is_called_is_a_function() -> None:
    found = reads("f(a) and public.g(x => b) and current_user = c and a operator(extensions.=) b and auth.uid() = d")
    called = {"pg_catalog.f", "public.g", "pg_catalog.current_user", "extensions.=", "auth.uid"}
    assert found.functions == called
    assert reads("a = any (select 1 order by 1 using operator(public.<))").functions == {"public.<"}
    assert reads("a operator(public.=) any (select 1)").functions == {"public.="}
    assert reads("a in (select public.h(x) over (order by public.i()) from public.j() as x)").functions == {
        "public.h",
        "public.i",
        "public.j",
    }


@pytest.mark.parametrize(
    "sql", ["a < now()", "a = 'today'", "a < current_date", "age(a) > '1 day'", "a = 'tomorrow noon'"]
)
def test_what_reads_the_clock_is_noticed(sql: str) -> None:
    assert of(sql).on_time
    assert not of(sql).on_user


@pytest.mark.parametrize("sql", ["random() < a", "a = gen_random_uuid()", "nextval('s') = a"])
def test_what_is_left_to_chance_is_noticed(sql: str) -> None:
    assert of(sql).on_chance


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("lower(a) = 'x' and a || b = c", False),
        ("data ->> 'x' = 'y'", False),
        ("is_open(a)", True),
        ("public.lower(a) = 'x'", True),
        ("current_user = a", True),
        ("exists (select 1 from public.t where t.a = posts.a)", True),
        ("a operator(extensions.=) b", True),
        ("current_setting('request.jwt.claims') = a", True),
    ],
)
def test_only_what_certainly_follows_from_the_row_is_the_same_for_all_users(sql: str, expected: bool) -> None:
    assert of(sql).on_user is expected


@pytest.mark.parametrize(
    ("sql", "part"),
    [
        ("f(posts.*)", "posts.*"),
        ("exists (select 1 from public.t where t.x = f(posts))", "posts"),
        ("other.a = 1", "other.a"),
        ("public.posts.a = 1", "public.posts.a"),
        ("exists (select 1 from public.t where u.x)", "u.x"),
        ("current_setting('app.tenant') = a", "current_setting()"),
        ("pg_catalog.current_setting('app.tenant', true) = a", "current_setting()"),
        ("current_setting(a) = b", "current_setting()"),
        ("set_config('role', 'x', true) = a", "set_config()"),
        ("session_user = a", "session_user"),
        ("inet_client_addr() = a", "inet_client_addr()"),
        ("a = $1", "ParamRef"),
        ("exists (select 1 from public.t for update)", "LockingClause"),
        ("exists (select 1 from public.t tablesample system (1))", "RangeTableSample"),
        ("exists (with d as (delete from public.t returning 1) select 1 from d)", "DeleteStmt"),
    ],
)
def test_what_is_not_known_or_not_understood_is_refused(sql: str, part: str) -> None:
    with pytest.raises(UnsupportedExpression) as caught:
        of(sql)
    assert caught.value.part == part


def test_the_claims_may_be_read_from_their_settings() -> None:
    for name in ("request.jwt.claims", "request.jwt.claim.sub", "role"):
        assert of(f"current_setting('{name}'::text, true) = a").reads.columns == {"a"}


@pytest.mark.parametrize(
    ("select", "keys"),
    [
        ("select m.org from public.m where m.user_id = auth.uid()", {("public.m", "user_id")}),
        ("select m.org from public.m where (select auth.uid() as uid) = m.user_id and m.a", {("public.m", "user_id")}),
        ("select m.org from public.m where m.user_id = auth.uid() or m.a", set()),
        ("select m.org from public.m where m.user_id <> auth.uid()", set()),
        ("select m.org from public.m where m.user_id::uuid = auth.uid()", set()),
        ("select m.org from public.m where m.user_id = auth.uid()::text", set()),
        ("select m.org from public.m where not (m.user_id = auth.uid())", set()),
        ("select m.org from public.m where m.user_id operator(public.=) auth.uid()", set()),
        ("select m.org from public.m where user_id = auth.uid()", set()),
        ("select m.org from public.m as m(user_id) where m.user_id = auth.uid()", set()),
        (
            "select m.org from public.m join public.p on p.id = m.user_id and p.a where m.user_id = auth.uid()",
            {("public.m", "user_id"), ("public.p", "id")},
        ),
        ("select m.org from public.m join public.n on n.user_id = auth.uid()", {("public.n", "user_id")}),
        ("select m.org from public.m left join public.n on n.user_id = auth.uid()", set()),
        (
            "select m.org from public.m left join public.n on n.a where n.user_id = auth.uid()",
            {("public.n", "user_id")},
        ),
        (
            "select m.a from public.m where m.u = auth.uid() union select m.b from public.m where m.v = auth.uid()",
            {("public.m", "u"), ("public.m", "v")},
        ),
        ("select m.org from public.m where m.user_id = auth.uid() union select m.org from public.m", set()),
        (
            "select m.org from public.m where m.user_id = auth.uid() and m.org in (select o.id from public.o)",
            {("public.m", "user_id")},
        ),
        (
            "select o.id from public.o where exists (select 1 from public.m where m.o = o.id and m.u = auth.uid())",
            {("public.m", "u")},
        ),
        (
            "with w as (select m.org from public.m where m.user_id = auth.uid()) select w.org from w",
            {("public.m", "user_id")},
        ),
    ],
)
def test_a_change_concerns_only_users_that_every_use_of_its_table_asks_for(
    select: str, keys: set[tuple[str, str]]
) -> None:
    assert of(f"a in ({select})").keyed_by == keys


def test_without_a_known_uid_a_change_concerns_everybody() -> None:
    sql = "a in (select m.org from public.m where m.user_id = auth.uid())"
    assert of(sql, claims=frozenset({"role"})).keyed_by == frozenset()
