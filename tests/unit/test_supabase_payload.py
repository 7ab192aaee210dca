"""Payloads of Supabase Realtime read back into Postgres' texts, and what a reader learns of tables from them."""

from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from realtime import RealtimePostgresChangesListenEvent

from realtime_bridge.change import ABSENT, Body, Change, Column, Control, Relation
from realtime_bridge.sources import supabase_payload as payload_module
from realtime_bridge.sources.supabase_payload import REPEAT_SECONDS, PayloadReader, RowOrder, parse_timestamp
from realtime_bridge.sources.supabase_texts import to_text
from realtime_bridge.values import encode_value

TIME = "2026-01-02T03:04:05.678Z"
COLUMNS = {"id": "int8", "title": "text"}


def data(
    operation: str,
    record: dict[str, Any] | None = None,
    old_record: dict[str, Any] | None = None,
    columns: dict[str, str] = COLUMNS,
    time: str = TIME,
) -> dict[str, Any]:
    rows = {"record": record, "old_record": old_record}
    return {
        "schema": "public",
        "table": "posts",
        "commit_timestamp": time,
        "type": RealtimePostgresChangesListenEvent(operation),
        "errors": None,
        "columns": [{"name": name, "type": type_} for name, type_ in columns.items()],
        **{name: row for name, row in rows.items() if row is not None},
    }


async def only(reader: PayloadReader, payload: dict[str, Any]) -> Change:
    (body,) = await reader.read(payload)
    assert isinstance(body, Change)
    return body


# -- values ----------------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
floats = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**63), 2**63 - 1)
documents = st.recursive(
    st.none() | st.booleans() | integers | floats | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
naive = st.datetimes().map(lambda moment: moment.isoformat())
exact = floats.filter(lambda value: abs(value) < 2**53)  # of a greater one, the shortest digits are another integer
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "int8": integers,
    "int4": st.integers(-(2**31), 2**31 - 1),
    "numeric": integers | exact | st.sampled_from(["NaN", "Infinity", "-Infinity"]),
    "float8": integers.map(float) | floats | st.sampled_from(["NaN", "Infinity"]),
    "bool": st.booleans(),
    "text": words,
    "uuid": st.uuids().map(str),
    "timestamp": naive | st.sampled_from(["infinity", "0044-03-15T12:00:00 BC"]),
    "timestamptz": naive.map(lambda text: text + "+00:00")
    | st.sampled_from(["-infinity", "0044-03-15T12:00:00+00:00 BC"]),
    "date": st.dates().map(str),
    "jsonb": documents.filter(lambda value: value is not None),
    "box": st.just("(1,1),(0,0)"),
}
ARRAYS = {f"_{type_}": st.lists(st.none() | values, max_size=4) for type_, values in SCALARS.items()} | {
    "_int4": st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=3)
}
TYPED = st.one_of(
    *(st.tuples(st.just(type_), values) for type_, values in (SCALARS | ARRAYS).items()),
    st.tuples(st.just("bytea"), st.binary(max_size=8).map(bytes.hex)),
    st.tuples(st.just("_bytea"), st.lists(st.binary(max_size=8).map(lambda value: "\\x" + value.hex()), max_size=3)),
)


@given(TYPED)
def test_a_value_becomes_the_text_that_is_encoded_to_the_same_json(typed: tuple[str, Any]) -> None:
    type_, value = typed
    text = to_text(type_, value)
    assert text is not None
    assert orjson.loads(encode_value(type_, text)) == value


@given(floats)
def test_a_numeric_of_which_the_client_has_a_double_is_encoded_to_that_double(value: float) -> None:
    text = to_text("numeric", value)
    assert text is not None
    assert float(encode_value("numeric", text)) == value


@pytest.mark.parametrize(
    ("type_", "value", "text"),
    [
        ("int8", 9007199254740993, "9007199254740993"),
        ("numeric", 123456789012345678901234567890, "123456789012345678901234567890"),
        ("numeric", 1.5, "1.5"),
        ("numeric", 1e-7, "0.0000001"),
        ("numeric", 1234567890123456789.5, "1234567890123456800"),
        ("float8", 1, "1"),
        ("float8", 100000000000000.0, "100000000000000"),
        ("float8", 1e15, "1e+15"),
        ("float8", -1.25e-05, "-1.25e-05"),
        ("float8", 0.0001, "0.0001"),
        ("float8", 1e300, "1e+300"),
        ("float8", 0.0, "0"),
        ("bool", True, "t"),
        ("bool", False, "f"),
        ("text", None, None),
        ("bytea", "0102ff", "\\x0102ff"),
        ("jsonb", {"a": [1, "é"]}, '{"a":[1,"é"]}'),
        ("jsonb", "word", '"word"'),
        ("timestamptz", "2026-01-01T00:00:00.5+00:00", "2026-01-01 00:00:00.5+00"),
        ("timestamp", "2026-01-01T00:00:00", "2026-01-01 00:00:00"),
        ("_int4", [1, None, 2], "{1,NULL,2}"),
        ("_text", ["a b", "", "null", 'q"\\', "plain"], '{"a b","","null","q\\"\\\\",plain}'),
        ("_int4", [[1, 2], [3, 4]], "{{1,2},{3,4}}"),
        ("_text", [], "{}"),
        ("_jsonb", [{"a": 1}, [1]], '{"{\\"a\\":1}",[1]}'),
        ("_bool", [True, False], "{t,f}"),
        ("mood", "happy", "happy"),
    ],
)
def test_a_value_has_the_text_that_postgres_writes(type_: str, value: Any, text: str | None) -> None:
    assert to_text(type_, value) == text


def test_a_number_beyond_a_double_is_refused() -> None:
    for type_ in ("numeric", "float8"):
        with pytest.raises(ValueError, match="double"):
            to_text(type_, float("inf"))


def test_a_timestamp_is_microseconds_in_utc() -> None:
    assert parse_timestamp("1970-01-01T00:00:01.5Z") == 1_500_000
    assert parse_timestamp("1970-01-01T01:00:00.000001+01:00") == 1
    for text in ("yesterday", "2026-01-01T00:00:00"):
        with pytest.raises(ValueError, match=r"."):
            parse_timestamp(text)


# -- rows ------------------------------------------------------------------------------------------------------------


async def test_each_operation_has_the_images_it_brings() -> None:
    reader = PayloadReader()
    created = await only(reader, data("INSERT", {"id": 1, "title": "a"}))
    updated = await only(reader, data("UPDATE", {"id": 1, "title": "b"}, {"id": 1}))
    unsent = await only(reader, data("UPDATE", {"id": 1}, {}))
    deleted = await only(reader, data("DELETE", None, {"id": 1}))
    assert (created.old, created.new) == (None, ("1", "a"))
    assert (updated.old, updated.new) == (("1", ABSENT), ("1", "b"))
    assert (unsent.old, unsent.new) == (None, ("1", ABSENT))
    assert (deleted.old, deleted.new) == (("1", ABSENT), None)
    assert (created.commit_time, created.place) == (parse_timestamp(TIME), f"supabase {TIME}")
    assert not created.relation.full


@pytest.mark.parametrize(
    "payload",
    [
        data("INSERT", {"title": "a"}),
        data("DELETE", None, {}),
        data("*", {"id": 1}),
        data("INSERT", {"id": 1}, time="never"),
        data("INSERT", {"id": float("inf")}),
    ],
)
async def test_a_row_that_cannot_be_understood_or_found_again_is_refused(payload: dict[str, Any]) -> None:
    with pytest.raises((ArithmeticError, LookupError, TypeError, ValueError)):
        await PayloadReader().read(payload)


async def test_a_key_is_learned_from_an_old_row_that_brings_some_columns_and_kept() -> None:
    reader = PayloadReader()
    await reader.read(data("INSERT", {"id": 1, "title": "a"}))
    columns = {"id": "int8", "title": "text", "slug": "text"}
    control, change = await reader.read(data("UPDATE", {"id": 1, "title": "a", "slug": "s"}, {"slug": "s"}, columns))
    assert control == Control("catalog", "public.posts", commit_time=parse_timestamp(TIME))
    assert isinstance(change, Change)
    assert change.relation.key == (2,)
    again = await only(reader, data("INSERT", {"id": 2, "title": "b", "slug": "t"}, None, columns))
    assert again.relation == change.relation


async def test_a_whole_old_row_says_nothing_of_the_key() -> None:
    change = await only(PayloadReader(), data("UPDATE", {"id": 1, "title": "b"}, {"id": 1, "title": "a"}))
    assert change.relation.key == (0,)


async def test_a_table_of_which_no_key_is_known_has_none() -> None:
    change = await only(PayloadReader(), data("INSERT", {"title": "a"}, None, {"title": "text"}))
    assert change.relation.key == ()


async def test_the_keys_of_a_changed_table_are_asked_again() -> None:
    answers = iter([["id"], ["title"]])

    async def keys(table: str) -> list[str]:
        assert table == "public.posts"
        return next(answers)

    reader = PayloadReader(keys)
    relations = []
    for number, columns in enumerate([COLUMNS, COLUMNS, {**COLUMNS, "slug": "text"}]):
        *_, change = await reader.read(data("INSERT", {"id": number, "title": f"{number}"}, None, columns))
        assert isinstance(change, Change)
        relations.append(change.relation)
    assert [relation.key for relation in relations] == [(0,), (0,), (1,)]


async def test_a_change_told_twice_in_a_row_is_read_once() -> None:
    reader = PayloadReader()
    payload = data("INSERT", {"id": 1, "title": "a"})
    assert [len(await reader.read(payload)) for _ in range(3)] == [1, 0, 0]


async def test_a_row_made_again_within_one_transaction_is_no_repeat() -> None:
    reader = PayloadReader()
    created, deleted = data("INSERT", {"id": 1, "title": "a"}), data("DELETE", None, {"id": 1})
    bodies: list[Body] = []
    for payload in (created, deleted, created):
        bodies += await reader.read(payload)
    assert [body.operation for body in bodies if isinstance(body, Change)] == ["INSERT", "DELETE", "INSERT"]


async def test_an_older_change_that_was_told_is_left_out_and_one_that_was_not_is_refused() -> None:
    reader = PayloadReader()
    times = [TIME.replace("05.678", f"0{second}.000") for second in range(4)]
    versions = [data("UPDATE", {"id": 1, "title": time}, {"id": 1}, time=time) for time in times]
    told = [len(await reader.read(versions[i])) for i in (0, 2, 3, 0, 2, 3)]
    assert told == [1, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="older"):
        await reader.read(versions[1])
    other = data("INSERT", {"id": 2, "title": "another row"}, time=times[1])
    assert len(await reader.read(other)) == 1


async def test_a_row_is_known_by_its_former_key_too() -> None:
    reader = PayloadReader()
    first, second, third = (TIME.replace("05.678", f"0{second}.000") for second in range(3))
    moved = data("UPDATE", {"id": 2, "title": "a"}, {"id": 1}, time=third)
    await reader.read(data("INSERT", {"id": 1, "title": "a"}, time=first))
    await reader.read(moved)
    assert await reader.read(moved) == []
    with pytest.raises(ValueError, match="older"):
        await reader.read(data("DELETE", None, {"id": 1}, time=second))


async def test_a_table_that_has_changed_is_still_told_after_a_row_that_could_not_be_read() -> None:
    reader = PayloadReader()
    await reader.read(data("INSERT", {"id": 1, "title": "a"}))
    columns = {**COLUMNS, "slug": "text"}
    with pytest.raises(ValueError, match="key"):
        await reader.read(data("INSERT", {"title": "b"}, None, columns))
    control, _ = await reader.read(data("INSERT", {"id": 2, "title": "b"}, None, columns))
    assert control == Control("catalog", "public.posts", commit_time=parse_timestamp(TIME))


# -- the order of a row's changes -------------------------------------------------------------------------------------

POSTS = Relation("public", "posts", (Column("id", "int8"), Column("version", "int8")), (0,), full=False)


def version(number: int, row: int = 1) -> Change:
    return Change("UPDATE", POSTS, None, (str(row), str(number)), number)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), max_size=30))
def test_whatever_arrives_the_versions_of_a_row_that_are_told_only_grow(arrivals: list[tuple[int, int]]) -> None:
    order, told = RowOrder(), dict[int, list[int]]()
    for number, row in arrivals:
        versions = told.setdefault(row, [])
        try:
            if order.admit(version(number, row)):
                versions.append(number)
            else:
                assert number in versions
        except ValueError:
            assert number not in versions
            assert number < versions[-1]
    assert all(one < other for versions in told.values() for one, other in pairwise(versions))


def test_what_was_told_is_forgotten_in_time() -> None:
    now = 0.0
    order = RowOrder(clock=lambda: now)
    assert order.admit(version(2))
    now = REPEAT_SECONDS
    assert order.admit(version(1))  # a clock that was set back is believed at last


def test_no_more_is_remembered_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload_module, "REPEAT_CHANGES", 2)
    order = RowOrder()
    assert [order.admit(version(1, row)) for row in (1, 2, 3, 3, 2, 1)] == [True, True, True, False, False, True]
