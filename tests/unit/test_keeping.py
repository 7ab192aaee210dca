"""What lies behind names, as far as it does not need a Postgres to say so."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from realtime_bridge.policy.dependence import dependence
from realtime_bridge.policy.keeping import (
    CatalogFunction,
    CatalogRelation,
    Dependencies,
    Keeping,
    Owner,
    References,
    names_in,
    part_of,
)
from realtime_bridge.policy.nodes import parse_value

NONE: Mapping[str, Any] = MappingProxyType({})
ROOT, ANN = Owner("root", is_exempt=True), Owner("ann", is_exempt=False)
UID = CatalogFunction("sql", "s", body="select 1", reads_claims=True)


def sql(body: str, definer: Owner | None = None, search_path: str | None = None) -> CatalogFunction:
    return CatalogFunction("sql", "i", definer, search_path, body)


def table(*policies: str, owner: Owner = ANN, kind: str = "r", is_forced: bool = False) -> CatalogRelation:
    return CatalogRelation(kind, owner, is_forced=is_forced, policies=policies)


def survey(
    expression: str,
    functions: Mapping[str, CatalogFunction | tuple[CatalogFunction, ...]] = NONE,
    relations: Mapping[str, CatalogRelation] = NONE,
) -> Dependencies:
    known = {"auth.uid": UID, "pg_catalog.now": CatalogFunction("internal", "s"), **functions}
    tuples = {name: found if isinstance(found, tuple) else (found,) for name, found in known.items()}
    references = References(tuples, relations, ("public", "extensions"))
    found = dependence(parse_value(expression), "public.docs", references.claims)
    return references.dependencies(found.reads, frozenset(relations), found.keyed_by)


NOW = "select now() > '2020-01-01'"


def test_of_several_functions_of_a_name_the_worst_counts() -> None:
    assert survey("f()", {"public.f": (sql("select 1"), sql(NOW))}).keeping == Keeping.TIMED
    assert survey("f()", {"public.f": sql("select 1"), "extensions.f": sql(NOW)}).keeping == Keeping.TIMED
    assert survey("public.f()", {"public.f": sql("select 1"), "extensions.f": sql(NOW)}).keeping == Keeping.CLAIMS
    assert survey("f()", {"elsewhere.f": sql("select 1")}).keeping == Keeping.TIMED


def test_names_without_a_schema_are_looked_for_where_the_function_says_or_its_caller() -> None:
    tables = {"public.t": table(), "apart.t": table()}
    inner = sql("select exists (select from t)")
    apart = {"public.f": sql("select g()", search_path='apart, "public"'), "public.g": inner}
    assert survey("f()", apart, tables).tables == {"apart.t"}
    assert survey("g()", apart, tables).tables == {"public.t"}
    assert survey("f() or g()", apart, tables).tables == {"apart.t", "public.t"}
    assert survey("f()", {"public.f": sql("select 1", search_path='"$user"')}).keeping == Keeping.TIMED


def test_policies_count_for_whoever_reads_unless_they_do_not_bind_the_reader() -> None:
    for owner, definer, forced, keeping in (
        (ANN, None, False, Keeping.TIMED),
        (ANN, ANN, False, Keeping.TRACKED),
        (ANN, ANN, True, Keeping.TIMED),
        (ANN, Owner("bob", is_exempt=False), False, Keeping.TIMED),
        (ANN, ROOT, True, Keeping.TRACKED),
    ):
        tables = {"public.t": table("now() > '2020-01-01'", owner=owner, is_forced=forced)}
        found = survey("f()", {"public.f": sql("select exists (select from t)", definer)}, tables)
        assert found.keeping == keeping
        assert found.tables == {"public.t"}


def test_a_view_lends_its_rights_to_what_it_reads_but_not_to_what_it_calls() -> None:
    tables = {"public.t": table("now() > '2020-01-01'")}
    functions = {"public.f": sql("select exists (select from t)")}

    def view(body: str) -> dict[str, CatalogRelation]:
        return {**tables, "public.v": CatalogRelation("v", ANN, definer=ANN, body=body)}

    reading = "EXISTS (SELECT FROM public.v)"
    assert survey(reading, functions, view("SELECT t.a FROM public.t")).keeping == Keeping.TRACKED
    assert survey(reading, functions, view("SELECT public.f()")).keeping == Keeping.TIMED
    assert survey(reading, functions, view("SELECT")).tables == frozenset()


def test_what_cannot_be_read_is_kept_for_a_while() -> None:
    for body in ("this is no SQL", "insert into t values (1)", "select current_setting('app.x')"):
        found = survey("f()", {"public.f": sql(body)}, {"public.t": table()})
        assert (found.keeping, found.reason) == (Keeping.TIMED, "public.f cannot be looked into"), body
    policy = survey("EXISTS (SELECT FROM public.t)", {}, {"public.t": table("t.* IS NOT NULL")})
    assert (policy.keeping, policy.reason) == (Keeping.TIMED, "a policy of public.t cannot be looked into")
    assert ("public.t", "*") in policy.references


def test_a_body_may_have_arguments_and_be_written_in_one_way_or_the_other() -> None:
    tables = {"public.t": table()}
    reads = "select exists (select from t where t.a = {} and t.b = auth.uid())"
    made = "create function f() returns void language sql "
    bodies = [
        reads.format("$1"),
        f"{made} return ({reads.format('x')})",
        f"{made} begin atomic {reads.format('x')}; end",
    ]
    for body in bodies:
        found = survey("f()", {"public.f": sql(body)}, tables)
        assert found.keeping == Keeping.TRACKED
        assert found.keyed_by == {("public.t", "b")}, body


def test_a_column_without_its_table_is_that_of_the_only_one_in_sight() -> None:
    tables = {"public.t": table(), "public.u": table()}
    keyed = [
        "select exists (select from t where user_id = auth.uid())",
        "select a from t x where user_id = auth.uid() union select a from t where user_id = auth.uid()",
        "select (select auth.uid()) = user_id and (select (select a)) from t where (select auth.uid()) = user_id",
    ]
    for body in keyed:
        found = survey("f()", {"public.f": sql(body)}, tables)
        assert found.keyed_by == {("public.t", "user_id")}, body
        assert found.references <= {("public.t", "a"), ("public.t", "user_id")}
    unsure = [
        "select exists (select from t where org_id = auth.uid())",  # an argument, where there is no such column
        "select a from t, u where user_id = auth.uid()",
        "select a from t where exists (select from u where user_id = auth.uid())",
        "with t as (select a, user_id from t) select a from t where user_id = auth.uid()",
        "select a from (select a, user_id from t) x where user_id = auth.uid()",
        "select a from g() where user_id = auth.uid()",
    ]
    for body in unsure:
        function = CatalogFunction("sql", "s", body=body, arguments=frozenset({"org_id"}))
        assert not survey("f()", {"public.f": function, "public.g": sql("select a from t")}, tables).keyed_by, body
    whole = survey("f()", {"public.f": sql("select t from t where user_id = auth.uid()")}, tables)
    assert ("public.t", "*") in whole.references


def test_what_is_declared_is_believed_of_c_alone() -> None:
    for volatility, keeping in (("i", Keeping.CLAIMS), ("s", Keeping.TIMED), ("v", Keeping.VOLATILE)):
        assert survey("f()", {"public.f": CatalogFunction("c", volatility)}).keeping == keeping
        assert survey("f()", {"public.f": CatalogFunction("plpgsql", volatility)}).keeping == Keeping.TIMED
        assert (
            survey("f()", {"public.f": CatalogFunction("sql", volatility, body="select 1")}).keeping == Keeping.CLAIMS
        )
    assert survey("EXISTS (SELECT FROM public.t)").reason == "public.t is not known"


def test_what_goes_round_ends() -> None:
    functions = {"public.f": sql("select g()"), "public.g": sql("select f()")}
    assert survey("f()", functions).keeping == Keeping.CLAIMS
    tables = {"public.t": table("f()"), "public.u": table("EXISTS (SELECT FROM public.t)")}
    functions["public.f"] = sql("select exists (select from u)")
    assert survey("f()", functions, tables).tables == {"public.t", "public.u"}


def test_a_table_is_keyed_only_if_it_is_wherever_it_is_read() -> None:
    tables = {"public.t": table(), "public.u": table("owner = auth.uid() OR is_open")}
    keyed = "EXISTS (SELECT FROM public.t x WHERE x.a = auth.uid() AND x.c)"
    other = "EXISTS (SELECT FROM public.t x WHERE x.b = auth.uid())"
    keyless = {"public.f": sql("select exists (select from t y where y.c)")}
    assert survey(keyed, {}, tables).keyed_by == {("public.t", "a")}
    assert survey(f"g() OR {keyed}", {"public.g": sql(f"select {other}")}, tables).keyed_by == {
        ("public.t", "a"),
        ("public.t", "b"),
    }
    for expression in (f"f() OR {keyed}", f"{keyed} OR f()"):
        assert survey(expression, keyless, tables).keyed_by == frozenset()
    assert survey(keyed, {}, tables).references == {("public.t", "a"), ("public.t", "c")}
    assert survey("EXISTS (SELECT FROM public.u)", {}, tables).references == {
        ("public.u", "owner"),
        ("public.u", "is_open"),
    }


def test_a_digest_is_of_all_that_is_reached_and_of_nothing_else() -> None:
    def digest(f: str = "1", t: str = "1", other: str = "1") -> str:
        functions = {
            "public.f": (CatalogFunction("sql", "s", body="select exists (select from t)", digest=f),),
            "public.other": (CatalogFunction("sql", "s", body="select 1", digest=other),),
        }
        relations = {"public.t": CatalogRelation("r", ANN, digest=t)}
        return References(functions, relations, ("public",)).digest(["f()", "note = current_schema"], "public.docs")

    assert digest() == digest(other="2")
    assert len({digest(), digest(f="2"), digest(t="2")}) == 3


def test_names_are_those_of_all_parts_that_can_be_read() -> None:
    parts = [part_of("f(a) OR EXISTS (SELECT FROM s.t)", "public.docs"), part_of("current_schema = 'a'", "public.docs")]
    assert names_in(parts) == {"f", "t"}
