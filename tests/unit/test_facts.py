from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.change import ABSENT, Value
from realtime_bridge.claims import Claims
from realtime_bridge.policy.expression import Claim
from realtime_bridge.policy.facts import PER_TOKEN, claims_read, identity, read_facts

USER = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
UID = Claim(("uid",))


def read(fact: Claim, values: dict[str, Any]) -> Value:
    return read_facts([fact], values, hidden=frozenset())[fact.sql]


def claim(*keys: str, cast: str = "") -> Claim:
    return Claim(("jwt", *keys), (cast,) if cast else ())


@pytest.mark.parametrize(
    ("sub", "expected"),
    [
        (USER, USER),
        (USER.upper(), USER),
        (f"{{{USER}}}", USER),
        (USER.replace("-", ""), USER),
        (None, None),
        ("", ABSENT),
        ("None", ABSENT),
        (7, ABSENT),
        ({}, ABSENT),
    ],
)
def test_uid_is_the_subject_as_a_uuid(sub: object, expected: Value) -> None:
    assert read(UID, {"sub": sub}) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "a"),
        ("", ""),
        ("None", "None"),
        (None, None),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (-12, "-12"),
        (10**15, str(10**15)),
        (1.0, ABSENT),
        (1e30, ABSENT),
        (float("nan"), ABSENT),
        ({}, ABSENT),
        ([], ABSENT),
    ],
)
def test_a_claim_is_read_as_text_or_not_at_all(value: object, expected: Value) -> None:
    assert read(claim("x"), {"x": value}) == expected
    assert read(claim("o", "x"), {"o": {"x": value}}) == expected


def test_a_claim_that_is_not_there_is_null() -> None:
    assert read(UID, {}) is None
    assert read(claim("x"), {}) is None
    assert read(claim("o", "x"), {"o": {}}) is None
    for other in (None, "x", ["x"], 1, True):
        assert read(claim("o", "x"), {"o": other}) is None


def test_casts_follow_one_another() -> None:
    assert read(claim("n", cast="int4"), {"n": " +07 "}) == "7"
    assert read(claim("n", cast="int4"), {"n": 2**31}) is ABSENT
    assert read(claim("b", cast="bool"), {"b": True}) == "t"
    assert read(Claim(("jwt", "b"), ("bool", "text")), {"b": "on"}) == "true"
    assert read(Claim(("uid",), ("text",)), {"sub": USER.upper()}) == USER
    assert read(claim("n", cast="int4"), {}) is None


@pytest.mark.parametrize("spoiled", ["a\0b", "\ud800", 2**70])
def test_claims_that_postgres_could_not_be_told_are_unknown_as_a_whole(spoiled: object) -> None:
    assert read(UID, {"sub": USER, "other": {"deep": [spoiled]}}) is ABSENT
    assert read(claim("missing"), {"other": spoiled}) is ABSENT


def test_a_hidden_claim_is_unknown() -> None:
    facts = [claim("session_id"), UID]
    values = {"sub": USER, "session_id": "s"}
    assert read_facts(facts, values, hidden=PER_TOKEN) == {facts[0].sql: ABSENT, UID.sql: USER}


def test_facts_know_the_claims_they_are_read_from() -> None:
    facts = [UID, Claim(("role",)), Claim(("email",)), claim("app_metadata", "org")]
    assert claims_read(facts) == {"sub", "role", "email", "app_metadata"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(["sub", "exp", "session_id", "x"]), json_values), json_values)
def test_two_tokens_of_one_user_are_one_identity(values: dict[str, Any], other: object) -> None:
    one = identity(Claims(values, "authenticated", None, 1.0), frozenset())
    assert identity(Claims({**values, "exp": other, "jti": other}, "authenticated", None, 2.0), frozenset()) == one
    assert identity(Claims(values, "anon", None, 1.0), frozenset()) != one
    assert identity(Claims({**values, "y": other}, "authenticated", None, 1.0), frozenset()) != one


def test_what_a_policy_reads_is_part_of_the_identity() -> None:
    first = Claims({"session_id": "1"}, "authenticated", None, None)
    second = Claims({"session_id": "2"}, "authenticated", None, None)
    assert identity(first, frozenset()) == identity(second, frozenset())
    kept = frozenset({"session_id"})
    assert identity(first, kept) != identity(second, kept)
    assert identity(Claims({}, "anon", None, None), kept) != identity(Claims({}, "anon", None, None), frozenset())
