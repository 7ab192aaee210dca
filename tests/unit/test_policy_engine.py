"""The engine with rules and without a database."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from realtime_bridge.change import ABSENT, Change, Column, Control, Entry, Image, Operation, Relation, Value
from realtime_bridge.claims import Claims
from realtime_bridge.errors import ConfigurationError
from realtime_bridge.policy.base import Audience, Member, Verdict
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.policy.index import union
from realtime_bridge.policy.members import Members

ANN, BOB = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
COLUMNS = {"id": "int8", "owner": "uuid", "is_public": "bool", "body": "text"}
RULE = "auth.uid() = owner or is_public"


def relation(types: dict[str, str], *, full: bool = True) -> Relation:
    return Relation("public", "posts", tuple(Column(*c) for c in types.items()), (0,), full)


POSTS, KEYED = relation(COLUMNS), relation(COLUMNS, full=False)


def row(identity: str = "1", owner: Value = ANN, is_public: Value = "f", body: Value = "x") -> Image:
    return identity, owner, is_public, body


KEY_ONLY = row(owner=ABSENT, is_public=ABSENT, body=ABSENT)


def entry(operation: Operation, old: Image | None, new: Image | None, of: Relation = POSTS) -> Entry:
    return Entry(1, "b", "a", Change(operation, of, old, new, 0))


def claims(user: str | None, role: str = "authenticated", **more: Any) -> Claims:
    return Claims({"role": role, **({} if user is None else {"sub": user}), **more}, role, user, None)


def engine(rule: str = RULE) -> PolicyEngine:
    return PolicyEngine(["public.posts"], ["anon", "authenticated"], {"public.posts": rule})


async def audience(policy: PolicyEngine, *arguments: Any) -> Audience:
    """The audience of one change; what each member is told must be the same."""
    change = entry(*arguments)
    await policy.prepare()
    await policy.load([member for member in policy._members if member.pending])
    (found,) = await policy.audience([change])
    for member in (known for known in policy._members if known.uses):
        (verdict,) = await policy.verdicts([change], member)
        assert (member in found.unknown) or (verdict.old is True) == (member in found.old)
        assert (verdict.new is True) == (member in found.new)
        assert (member in found.unknown) == (verdict.new is None or (verdict.old is None and verdict.new is False))
    return found


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tables", "rules", "message"),
    [
        (["public.posts"], {}, "BRIDGE_POLICIES has no rule for public.posts, and there is no DATABASE_URL"),
        (
            ["public.posts"],
            {"public.posts": "true", "public.post": "true"},
            "rule for public.post, which is not one of",
        ),
        (
            ["public.posts"],
            {"public.posts": "is_admin()"},
            r"BRIDGE_POLICIES: .* public.posts cannot be decided: is_ad",
        ),
        (["public.posts"], {"public.posts": "a ="}, "BRIDGE_POLICIES: .*syntax error"),
    ],
)
def test_a_configuration_that_cannot_decide_is_refused(
    tables: Sequence[str], rules: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PolicyEngine(tables, ["anon"], rules)


async def test_a_rule_that_does_not_fit_the_columns_shows_nothing_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = engine("price = 1")
    policy.join(claims(ANN))
    for _ in range(3):
        found = await audience(policy, "INSERT", None, ("1",), relation({"price": "float8"}))
        assert found == Audience(frozenset(), frozenset())
    assert [record.__dict__["part"] for record in caplog.records] == ["column price of type float8"]
    assert policy.denied_tables.keys() == {"public.posts"}
    assert policy.refusal("public.posts", claims(ANN))
    assert (await audience(policy, "INSERT", None, ("1",), relation({"price": "int4"}))).new
    assert policy.refusal("public.posts", claims(ANN)) is None


def test_refusals_are_told() -> None:
    policy = engine()
    assert policy.refusal("public.posts", claims(ANN)) is None
    assert policy.refusal("public.other", claims(ANN)) == "public.other is not a table of this bridge"
    assert (
        policy.refusal("public.posts", claims(ANN, "service_role")) == "role service_role is not a role of this bridge"
    )


async def test_without_a_catalog_there_is_nothing_to_load() -> None:
    policy = engine()
    await policy.prepare()
    await policy.reload("*")
    assert policy.denied_tables == {}


# -- audiences ---------------------------------------------------------------------------------------------------------


async def test_a_row_reaches_its_owner_alone_and_a_public_one_everybody() -> None:
    policy = engine()
    ann, bob, nobody = policy.join(claims(ANN)), policy.join(claims(BOB)), policy.join(claims(None, "anon"))
    assert await audience(policy, "INSERT", None, row()) == Audience(frozenset(), {ann})
    assert (await audience(policy, "INSERT", None, row(is_public="t"))).new == {ann, bob, nobody}
    assert await audience(policy, "DELETE", row(owner=BOB), None) == Audience({bob}, frozenset())
    assert await audience(policy, "UPDATE", row(), row(owner=BOB)) == Audience({ann}, {bob})
    assert (await audience(policy, "INSERT", None, row(owner=None))).new == set()


async def test_a_public_change_shares_one_set() -> None:
    policy = engine()
    await policy.prepare()
    await policy.load([policy.join(claims(user)) for user in (ANN, BOB, None)])
    await policy.load([policy.join(claims(None, "anon"))])
    changes = [entry("INSERT", None, row(str(i), is_public="t")) for i in range(2)]
    first, second = await policy.audience(changes)
    assert len(first.new) == 4
    assert first.new is second.new


async def test_no_change_but_the_first_of_a_relation_looks_through_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = engine()
    ann, bob = policy.join(claims(ANN)), policy.join(claims(BOB))
    assert (await audience(policy, "INSERT", None, row())).new == {ann}

    def look_through(_: Members) -> Iterator[Member]:
        raise AssertionError("what a change costs must not grow with the members")

    monkeypatch.setattr(Members, "__iter__", look_through)
    change = entry("INSERT", None, row(owner=BOB))
    (found,) = await policy.audience([change])
    assert found.new == {bob}
    assert await policy.verdicts([change], ann) == [Verdict(old=False, new=False)]


async def test_a_role_that_is_not_served_sees_nothing() -> None:
    policy = engine("true")
    policy.join(claims(ANN, "service_role"))
    assert (await audience(policy, "INSERT", None, row())).new == set()


async def test_a_member_with_a_subject_that_is_no_uuid_sees_nothing() -> None:
    policy = engine()
    policy.join(claims("not-a-uuid"))
    assert await audience(policy, "UPDATE", None, row(is_public="t"), KEYED) == Audience(frozenset(), frozenset())


async def test_several_equalities_are_all_asked() -> None:
    policy = engine("owner = auth.uid() and body = (auth.jwt() ->> 'org') and id = (auth.jwt() ->> 'level')::int")
    ann = policy.join(claims(ANN, org="x", level=1))
    policy.join(claims(ANN, org="y", level=1))
    policy.join(claims(ANN, org="x", level=2))
    policy.join(claims(BOB, org="x", level=1))
    assert (await audience(policy, "INSERT", None, row())).new == {ann}


async def test_controls_reach_nobody() -> None:
    policy = engine()
    ann = policy.join(claims(ANN))
    control = Entry(1, "b", "a", Control("resync", "public.posts", "bulk"))
    assert await policy.audience([control]) == [Audience(frozenset(), frozenset())]
    assert await policy.verdicts([control], ann) == [Verdict(old=False, new=False)]


async def test_a_table_that_is_not_configured_reaches_nobody() -> None:
    policy = engine("true")
    policy.join(claims(ANN))
    other = Relation("public", "other", POSTS.columns, (0,), full=True)
    assert await audience(policy, "INSERT", None, row(), other) == Audience(frozenset(), frozenset())


# -- what is not known -------------------------------------------------------------------------------------------------


async def test_without_an_old_image_a_change_that_is_not_visible_leaves_everyone_else_in_doubt() -> None:
    policy = engine()
    ann, bob = policy.join(claims(ANN)), policy.join(claims(BOB))
    in_doubt = Audience(frozenset(), {ann}, {bob}, unsure={ann})
    assert await audience(policy, "UPDATE", None, row(), KEYED) == in_doubt
    assert await audience(policy, "UPDATE", KEY_ONLY, row(), KEYED) == in_doubt
    assert await audience(policy, "DELETE", KEY_ONLY, None, KEYED) == Audience(frozenset(), frozenset(), {ann, bob})
    assert policy.undecided == 3


async def test_a_policy_on_the_key_alone_is_decided_without_an_old_image() -> None:
    policy = engine("id = (auth.jwt() ->> 'level')::int")
    one, two = policy.join(claims(ANN, level=1)), policy.join(claims(ANN, level=2))
    assert await audience(policy, "UPDATE", None, row(), KEYED) == Audience({one}, {one})
    assert await audience(policy, "UPDATE", row("2", ABSENT, ABSENT, ABSENT), row(), KEYED) == Audience({two}, {one})
    assert await audience(policy, "DELETE", KEY_ONLY, None, KEYED) == Audience({one}, frozenset())
    assert policy.undecided == 0


async def test_an_old_image_that_is_known_as_far_as_policies_read_it_is_decided() -> None:
    policy = engine("owner = auth.uid()")
    ann, bob = policy.join(claims(ANN)), policy.join(claims(BOB))
    before = row(owner=BOB, body=ABSENT)
    assert await audience(policy, "UPDATE", before, row(), KEYED) == Audience({bob}, {ann})
    assert await audience(policy, "DELETE", before, None, KEYED) == Audience({bob}, frozenset())
    assert policy.undecided == 0


async def test_an_unchanged_large_value_is_taken_from_the_old_image() -> None:
    policy = engine("body = 'x' and owner = auth.uid()")
    ann = policy.join(claims(ANN))
    assert await audience(policy, "UPDATE", row(), row(body=ABSENT)) == Audience({ann}, {ann})


async def test_an_unchanged_large_value_without_an_old_image_leaves_its_readers_in_doubt() -> None:
    policy = engine("body = (auth.jwt() ->> 'org') and is_public")
    ann = policy.join(claims(ANN, org="x"))
    policy.join(claims(ANN))
    doubt = await audience(policy, "UPDATE", None, row(is_public="t", body=ABSENT), KEYED)
    assert doubt == Audience(frozenset(), frozenset(), {ann})


async def test_who_saw_the_old_row_for_certain_but_perhaps_not_the_new_one_is_in_doubt() -> None:
    policy = engine("id = 1 or body = 'x'")
    ann = policy.join(claims(ANN))
    doubt = await audience(policy, "UPDATE", row("1", ABSENT, ABSENT, ABSENT), row("2", body=ABSENT), KEYED)
    assert doubt == Audience(frozenset(), frozenset(), {ann})


async def test_relations_of_several_versions_are_decided_side_by_side() -> None:
    policy = engine("owner = auth.uid()")
    ann = policy.join(claims(ANN))
    for i in range(40):
        wider = relation({**COLUMNS, f"more_{i}": "text"})
        assert (await audience(policy, "INSERT", None, (*row(), "m"), wider)).new == {ann}
        assert (await audience(policy, "INSERT", None, row())).new == {ann}
    assert len(policy._tables["public.posts"].deciders) <= 16


# -- members -----------------------------------------------------------------------------------------------------------


def test_tokens_of_one_user_share_a_member_until_the_last_one_leaves() -> None:
    policy = engine()
    first = policy.join(claims(ANN, exp=1, jti="a"))
    second = policy.join(claims(ANN, exp=2, jti="b"))
    assert first is second
    assert policy.join(claims(ANN, org="a")) is not first
    assert policy.join(claims(ANN, "anon")) is not first
    policy.leave(first)
    assert policy.join(claims(ANN)) is first
    policy.leave(first)
    policy.leave(first)
    assert policy.join(claims(ANN)) is not first


async def test_a_claim_of_the_token_tells_members_apart_if_the_rule_reads_it() -> None:
    policy = engine("body = (auth.jwt() ->> 'session_id')")
    await policy.prepare()
    assert policy.join(claims(ANN, session_id="1")) is not policy.join(claims(ANN, session_id="2"))
    assert policy.join(claims(ANN, session_id="1", exp=1)) is policy.join(claims(ANN, session_id="1", exp=2))


async def test_who_has_left_is_in_no_audience() -> None:
    policy = engine()
    ann, bob = policy.join(claims(ANN)), policy.join(claims(BOB))
    assert (await audience(policy, "INSERT", None, row(is_public="t"))).new == {ann, bob}
    policy.leave(ann)
    assert (await audience(policy, "INSERT", None, row(is_public="t"))).new == {bob}
    assert (await audience(policy, "UPDATE", None, row(), KEYED)).unknown == {bob}


def member() -> Member:
    return Member(("", ""), claims(None))


def test_a_union_copies_only_what_it_must() -> None:
    a, b, c = member(), member(), member()
    everybody = {a, b, c}
    assert union([]) == set()
    assert union([{a}, everybody, {b, c}]) is everybody
    assert union([{a}, {b, c}]) == everybody
