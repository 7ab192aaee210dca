"""Every kind of literal has the truth value that Postgres gives it: TRUE, FALSE and NULL alike.

So has what is made of them, for every user and row. And were the compiler wrong, it would be noticed here: each fault
of `tests.policy_mutations` is.
"""

from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realtime_bridge.dev.engines import EmbeddedPostgres
from realtime_bridge.policy.expression import UnsupportedExpression
from tests.expression_worlds import World, are_combined_rightly, is_decided_rightly, making_world
from tests.expressions import EXPRESSIONS, some_rows
from tests.policy_mutations import MUTATIONS

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(postgres: EmbeddedPostgres, _template: str) -> Iterator[World]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute(f"create database expressions template {_template}".encode())
        with making_world(postgres.dsn("expressions")) as world:
            world.insert(some_rows(1, 45), seed=1, partial=15)
            yield world
        admin.execute("drop database expressions")


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_literal_has_the_truth_value_that_postgres_gives_it(world: World, text: str) -> None:
    assert is_decided_rightly(world, text)


def together(parts: list[str]) -> st.SearchStrategy[str]:
    joined = st.sampled_from([" and ", " or "]).map(lambda word: word.join(f"({part})" for part in parts))
    test = st.sampled_from(
        ["{}", "not ({})", "({}) is true", "({}) is not false", "({}) is null", "coalesce({}, true)"]
    )
    return st.tuples(joined, test).map(lambda pair: pair[1].format(pair[0]))


compounds = st.recursive(
    st.sampled_from(EXPRESSIONS),
    lambda inner: st.lists(inner, min_size=1, max_size=3).flatmap(together),
    max_leaves=5,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(compounds)
def test_so_has_what_is_made_of_literals(world: World, text: str) -> None:
    try:
        assert is_decided_rightly(world, text)
    except UnsupportedExpression as error:
        if "alternatives" not in error.part:
            raise


CASES = [(EXPRESSIONS[i : i + 2], EXPRESSIONS[-i]) for i in range(1, len(EXPRESSIONS) - 2, 5)]


@pytest.mark.parametrize(("permissive", "restrictive"), CASES)
def test_one_permissive_policy_must_hold_and_every_restrictive_one(
    world: World, permissive: list[str], restrictive: str
) -> None:
    assert are_combined_rightly(world, permissive, restrictive)


def check_everything(world: World) -> None:
    assert all(is_decided_rightly(world, text) for text in EXPRESSIONS)
    assert all(are_combined_rightly(world, *case) for case in CASES)


@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_fault_would_be_noticed(world: World, fault: str) -> None:
    with MUTATIONS[fault](), pytest.raises(AssertionError):  # maybe one on the way: index and predicate disagree
        check_everything(world)
