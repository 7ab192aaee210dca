"""Who sees a row: by every kind of key, and by what Postgres has answered."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.change import ABSENT, Column, Image, Relation, Value
from realtime_bridge.claims import Claims
from realtime_bridge.policy.atoms import MAX_ANSWERS, Memo, Values
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.compiler import ColumnType, compile_expression
from realtime_bridge.policy.expression import UnsupportedExpression, queries_of
from realtime_bridge.policy.index import AudienceIndex, Question
from realtime_bridge.policy.predicate import Predicate
from realtime_bridge.policy.reading import parse_expression

TYPES = {"id": "int4", "org": "uuid", "is_open": "bool", "people": "_uuid", "price": "numeric", "name": "text"}
COLUMNS = {name: ColumnType(type_) for name, type_ in TYPES.items()}
POSTS = Relation("public", "posts", tuple(Column(*column) for column in TYPES.items()), (0,), full=True)

ORGS = "ARRAY(SELECT m.org FROM public.members m WHERE m.user_id = auth.uid())"
MEMBERSHIP = "org in (select m.org from public.members m where m.user_id = auth.uid())"
A, B, C = (f"{letter}0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11" for letter in "abc")


def predicate(sql: str, **types: str) -> Predicate:
    expression = parse_expression(sql, table="public.posts", asking=True)
    known = {query.sql: types.get(query.sql, "uuid") for query in queries_of(expression)}
    return compile_expression(expression, COLUMNS, known)


def member(facts: Mapping[str, object] | None = None) -> Member:
    made = Member(("authenticated", ""), Claims({}, "authenticated", None, None))
    made.facts = {"auth.uid()": None, **(facts or {})}
    return made


def of_orgs(*orgs: str | None) -> Member:
    return member({ORGS: Values(frozenset(filter(None, orgs)), None in orgs)})


def index_of(sql: str, *members: Member) -> AudienceIndex:
    index = AudienceIndex({"authenticated": predicate(sql)}, TYPES)
    for one in members:
        index.add(one)
    return index


def row(**values: Value) -> Image:
    return tuple(values.get(name) for name in TYPES)


def sees(index: AudienceIndex, **values: Value) -> set[Member]:
    """Who sees a row for certain; nobody perhaps. The predicate must say the same."""
    seen = index.seen(POSTS, row(**values))
    assert seen.perhaps <= seen.sure
    for one in index.members:
        assert (index.eyes_of(one, POSTS)(row(**values)) is True) == (one in seen.sure)
    return set(seen.sure)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_members_of_an_organisation_are_found_under_each_of_theirs() -> None:
    ann, bob, nobody, null = of_orgs(A, B), of_orgs(B, None), of_orgs(), member({ORGS: None})
    index = index_of(MEMBERSHIP, ann, bob, nobody, null)
    assert sees(index, org=A) == {ann}
    assert sees(index, org=B) == {ann, bob}
    assert sees(index, org=C) == sees(index, org=None) == set()
    index.discard(ann)
    assert sees(index, org=B) == {bob}
    index.discard(bob)
    assert sees(index, org=B) == set()


def test_members_are_found_by_each_element_of_an_array() -> None:
    ann, bob, nobody = member({"auth.uid()": A}), member({"auth.uid()": B}), member()
    index = index_of("auth.uid() = any (people)", ann, bob, nobody)
    assert sees(index, people=f"{{{A},{B},NULL}}") == {ann, bob}
    assert sees(index, people=f"{{{B}}}") == {bob}
    assert sees(index, people="{}") == sees(index, people=None) == set()


def test_a_number_is_found_however_it_is_written() -> None:
    sql = "(select p.level from public.p) = price"
    (query,) = queries_of(parse_expression(sql, table="public.posts", asking=True))
    index = AudienceIndex({"authenticated": predicate(sql, **{query.sql: "numeric"})}, TYPES)
    ann = member({query.sql: "1.50"})
    index.add(ann)
    assert sees(index, price="1.5") == sees(index, price="1.500") == {ann}
    assert sees(index, price="1.51") == set()


def test_a_key_that_is_not_known_leaves_those_it_might_find_in_doubt() -> None:
    ann, nobody = of_orgs(A), of_orgs()
    index = index_of(MEMBERSHIP, ann, nobody)
    assert index.seen(POSTS, row(org=ABSENT)) == (set(), {ann})
    index = index_of("auth.uid() = any (people)", owner := member({"auth.uid()": A}))
    assert index.seen(POSTS, row(people=ABSENT)) == (set(), {owner})
    assert index.seen(POSTS, row(people="no array")) == (set(), {owner})


def test_members_whose_facts_are_not_known_see_nothing() -> None:
    unknown = member({ORGS: ABSENT})
    index = index_of(f"is_open or {MEMBERSHIP}", unknown)
    assert not index.admits(unknown)
    assert sees(index, is_open="t") == set()


# -- answers -----------------------------------------------------------------------------------------------------------

IS_MEMBER = "public.is_member(org)"


def answer(
    index: AudienceIndex, questions: Sequence[Question], truths: Mapping[tuple[Member | None, Value], bool]
) -> None:
    for question in questions:
        index.answer(question, truths[question.member, question.values[0]])


def test_what_postgres_has_not_said_yet_is_unknown_and_asked_once() -> None:
    ann, bob = member(), member()
    index = index_of(IS_MEMBER, ann, bob)
    for _ in range(2):
        assert index.seen(POSTS, row(org=A)) == (set(), {ann, bob})
    questions = index.open_questions()
    assert [(question.asked.sql, question.values) for question in questions] == [(IS_MEMBER, (A,))] * 2
    assert {question.member for question in questions} == {ann, bob}
    assert index.open_questions() == []
    answer(index, questions, {(ann, A): True, (bob, A): False})
    assert sees(index, org=A) == {ann}
    assert index.open_questions() == []


def test_a_question_that_was_not_answered_is_asked_again() -> None:
    index = index_of(IS_MEMBER, member())
    index.seen(POSTS, row(org=A))
    assert index.open_questions()
    index.seen(POSTS, row(org=A))
    assert index.open_questions()


def test_an_answer_that_failed_stays_unknown_and_is_not_asked_again() -> None:
    index = index_of(IS_MEMBER, ann := member())
    index.seen(POSTS, row(org=A))
    (question,) = index.open_questions()
    index.answer(question, ABSENT)
    assert index.seen(POSTS, row(org=A)) == (set(), {ann})
    assert index.open_questions() == []


def test_what_does_not_depend_on_the_user_is_asked_once_for_all() -> None:
    ann, bob = member(), member()
    index = index_of("lower(name) = 'x'", ann, bob)
    assert index.seen(POSTS, row(name="X")) == (set(), {ann, bob})
    (question,) = index.open_questions()
    assert (question.member, question.values) == (None, ("X",))
    index.answer(question, True)
    assert sees(index, name="X") == {ann, bob}
    assert [memo.answers for memo in index.shared.values()] == [{("X",): True}]


def test_nothing_is_asked_of_a_column_that_is_not_known() -> None:
    index = index_of(IS_MEMBER, ann := member())
    assert index.seen(POSTS, row(org=ABSENT)) == (set(), {ann})
    assert index.open_questions() == []


def test_nothing_is_asked_that_other_conditions_decide() -> None:
    ann, bob = of_orgs(A), of_orgs(B)
    index = index_of(f"is_open or ({MEMBERSHIP} and name <> '' and {IS_MEMBER})", ann, bob)
    assert sees(index, is_open="t", org=A, name="a") == {ann, bob}
    assert sees(index, is_open="f", org=A, name="") == set()
    assert sees(index, is_open="f", org=C, name="a") == set()
    assert index.open_questions() == []
    index.seen(POSTS, row(is_open="f", org=A, name="a"))
    assert [question.member for question in index.open_questions()] == [ann]
    index.eyes_of(ann, POSTS)(row(is_open="t", org=A, name="a"))
    assert index.open_questions() == []


def test_all_that_is_missing_is_asked_at_once() -> None:
    index = index_of(f"lower(name) = 'x' and {IS_MEMBER} and public.is_paid(org) and not is_open", member())
    index.seen(POSTS, row(org=A, name="a", is_open="f"))
    assert {question.asked.sql for question in index.open_questions()} == {
        "lower(name) = 'x'",
        IS_MEMBER,
        "public.is_paid(org)",
    }


def test_a_member_that_is_added_again_has_its_answers_unless_they_were_dropped() -> None:
    index = index_of(IS_MEMBER, ann := member())
    index.seen(POSTS, row(org=A))
    (question,) = index.open_questions()
    index.answer(question, True)
    index.discard(ann)
    index.add(ann)
    assert index.seen(POSTS, row(org=A)) == ({ann}, set())
    index.discard(ann)
    ann.facts.clear()
    index.add(ann)
    assert index.seen(POSTS, row(org=A)) == (set(), {ann})


def test_an_answer_for_a_member_that_has_lost_its_memo_is_dropped() -> None:
    index = index_of(IS_MEMBER, ann := member())
    index.seen(POSTS, row(org=A))
    (question,) = index.open_questions()
    index.discard(ann)
    del ann.facts[question.asked.name]
    index.answer(question, True)
    assert question.asked.name not in ann.facts


def test_a_memo_stays_within_its_bound() -> None:
    missed: list[tuple[Value, ...]] = []
    memo = Memo(missed.append)
    for i in range(MAX_ANSWERS + 10):
        memo.store((str(i),), True)
    assert len(memo.answers) == 10
    assert memo.truth(("0",)) is ABSENT
    assert missed == [("0",)]


def test_a_query_without_a_type_is_asked_for_every_user() -> None:
    sql = "public.is_admin() and is_open"
    expression = parse_expression(sql, table="public.posts", asking=True)
    asking = compile_expression(expression, COLUMNS, {"public.is_admin()": None})
    assert {asked.sql for asked in asking.asked} == {"public.is_admin()"}
    assert asking.facts == frozenset()
    index = AudienceIndex({"authenticated": asking}, TYPES)
    ann, bob = member(), member()
    index.add(ann)
    index.add(bob)
    assert index.seen(POSTS, row(is_open="t")) == (set(), {ann, bob})
    for question in index.open_questions():
        assert question.values == ()
        index.answer(question, question.member is ann)
    assert sees(index, is_open="t") == {ann}


@pytest.mark.parametrize(
    ("sql", "part"),
    [
        ("public.f(ctid)", "column ctid, which no change brings"),
        ("public.f(made_up)", "column made_up, which no change brings"),
        ("exists (select 1 from public.t where computed)", "column computed, which no change brings"),
    ],
)
def test_what_an_image_lacks_cannot_be_asked(sql: str, part: str) -> None:
    expression = parse_expression(sql, table="public.posts", asking=True)
    with pytest.raises(UnsupportedExpression) as caught:
        compile_expression(expression, COLUMNS, hidden={"computed"})
    assert caught.value.part == part


def test_a_name_that_may_be_a_column_is_part_of_the_question() -> None:
    (asked,) = predicate("exists (select 1 from public.t where org = name and else_where)").asked
    assert asked.columns == ("name", "org")


# -- the index agrees with the predicate -------------------------------------------------------------------------------

PARTS = ["is_open", "org = auth.uid()", MEMBERSHIP, "auth.uid() = any (people)", "auth.uid() <> org", "name is null"]
rules = st.recursive(
    st.sampled_from(PARTS),
    lambda inner: st.one_of(
        inner.map("not ({})".format),
        st.tuples(inner, inner).map(lambda pair: "({}) and ({})".format(*pair)),
        st.tuples(inner, inner).map(lambda pair: "({}) or ({})".format(*pair)),
    ),
    max_leaves=4,
)
ids = st.sampled_from([A, B, None])
facts = st.fixed_dictionaries({"auth.uid()": ids, ORGS: st.lists(ids, max_size=3)})
values = st.fixed_dictionaries(
    {
        "is_open": st.sampled_from(["t", "f", None, ABSENT]),
        "org": st.sampled_from([A, B, None, ABSENT]),
        "people": st.sampled_from(["{}", f"{{{A}}}", f"{{{A},{B}}}", "{NULL}", None, ABSENT]),
        "name": st.sampled_from(["", None]),
    }
)


@given(rules, st.lists(facts, max_size=4), st.lists(values, max_size=3), st.sets(st.integers(0, 3)))
def test_the_index_finds_whom_the_predicate_shows_the_row(
    rule: str, of_members: list[dict[str, object]], rows: list[dict[str, Value]], leaving: set[int]
) -> None:
    members = []
    for known in of_members:
        orgs = known[ORGS]
        assert isinstance(orgs, list)
        members.append(member({**known, ORGS: Values(frozenset(filter(None, orgs)), None in orgs)}))
    index = index_of(rule, *members)
    for i in leaving & set(range(len(members))):
        index.discard(members[i])
    for image in (row(**some) for some in rows):
        seen = index.seen(POSTS, image)
        for one in index.members:
            verdict = index.eyes_of(one, POSTS)(image)
            assert (one in seen.sure) == (verdict is True)
            assert (one in seen.perhaps - seen.sure) == (verdict is None)
        assert seen.sure | seen.perhaps <= index.members
