"""Values are written as Supabase Realtime writes them; tests/integration compares with Postgres itself."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.change import ABSENT, Column, Relation
from realtime_bridge.values import encode_image, encode_value

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
TYPES = ["bool", "int8", "numeric", "float8", "timestamp", "timestamptz", "date", "bytea", "text", "uuid", "_text"]


@pytest.mark.parametrize(
    ("type_name", "text", "expected"),
    [
        ("int8", "9007199254740993", "9007199254740993"),
        ("int4", "-1", "-1"),
        ("numeric", "1234567890.123456789012345678", "1234567890.123456789012345678"),
        ("numeric", "1.500", "1.500"),
        ("numeric", "NaN", '"NaN"'),
        ("numeric", "-Infinity", '"-Infinity"'),
        ("float8", "1e+20", "1e+20"),
        ("float4", "-0", "-0"),
        ("float8", "Infinity", '"Infinity"'),
        ("bool", "t", "true"),
        ("bool", "f", "false"),
        ("timestamptz", "2026-01-01 00:00:00.123456+00", '"2026-01-01T00:00:00.123456+00:00"'),
        ("timestamptz", "2026-01-01 05:30:00+05:30", '"2026-01-01T05:30:00+05:30"'),
        ("timestamptz", "2026-01-01 05:30:00-05", '"2026-01-01T05:30:00-05:00"'),
        ("timestamptz", "0044-03-15 00:00:00+00 BC", '"0044-03-15T00:00:00+00:00 BC"'),
        ("timestamptz", "12026-01-01 00:00:00+00", '"12026-01-01T00:00:00+00:00"'),
        ("timestamptz", "-infinity", '"-infinity"'),
        ("timestamptz", "soon", '"soon"'),
        ("timestamp", "2026-01-01 00:00:00", '"2026-01-01T00:00:00"'),
        ("timestamp", "infinity", '"infinity"'),
        ("date", "2026-01-01", '"2026-01-01"'),
        ("date", "0044-03-15 BC", '"0044-03-15 BC"'),
        ("jsonb", '{"a": [1, null]}', '{"a": [1, null]}'),
        ("json", '{\r\n "a":\n1}', '{   "a": 1}'),
        ("bytea", "\\x0102ff", '"0102ff"'),
        ("uuid", "00000000-0000-0000-0000-000000000001", '"00000000-0000-0000-0000-000000000001"'),
        ("interval", "1 day 02:03:04", '"1 day 02:03:04"'),
        ("int4range", "[1,2)", '"[1,2)"'),
        ("mood", 'so "so"\n', '"so \\"so\\"\\n"'),
        ("_int4", "{}", "[]"),
        ("_int4", "{1,2,NULL}", "[1,2,null]"),
        ("_int4", "[0:1]={1,2}", "[1,2]"),
        ("_int4", "[1:1][-2:-1]={{1,2}}", "[[1,2]]"),
        ("_text", '{a,"b,c","NULL","","\\"\\\\"}', '["a","b,c","NULL","","\\"\\\\"]'),
        ("_box", "{(1,1),(0,0);(2,2),(1,1)}", '["(1,1),(0,0)","(2,2),(1,1)"]'),
        ("_timestamptz", '{"2026-01-01 00:00:00+00"}', '["2026-01-01T00:00:00+00:00"]'),
        ("_jsonb", '{"{\\"a\\": 1}",NULL}', '[{"a": 1},null]'),
        ("_bytea", '{"\\\\x01"}', '["\\\\x01"]'),
        ("_status", "open", '"open"'),
        ("_int4", "{1}{2}", '"{1}{2}"'),
        ("_int4", "{1", '"{1"'),
        ("_int4", '{"1', '"{\\"1"'),
        ("_", "x", '"x"'),
    ],
)
def test_a_value_is_written_as_supabase_writes_it(type_name: str, text: str, expected: str) -> None:
    assert encode_value(type_name, text).decode() == expected


@given(st.sampled_from(TYPES), TEXT)
def test_whatever_the_text_the_result_is_json_on_one_line(type_name: str, text: str) -> None:
    encoded = encode_value(type_name, text)
    assert b"\n" not in encoded
    assert b"\r" not in encoded
    json.loads(encoded)


@given(TEXT)
def test_text_comes_back_unchanged(text: str) -> None:
    assert orjson.loads(encode_value("text", text)) == text


@given(
    st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | TEXT, st.lists), st.sampled_from([None, 2])
)
def test_json_is_embedded_as_it_is(value: Any, indent: int | None) -> None:
    encoded = encode_value("json", json.dumps(value, indent=indent))
    assert json.loads(encoded) == value
    assert b"\n" not in encoded


def literal(value: str | list[Any] | None) -> str:
    """As array_out writes it, with every element quoted."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "{" + ",".join(map(literal, value)) + "}"
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(st.lists(st.lists(st.none() | TEXT, min_size=1, max_size=3), max_size=4) | st.lists(st.none() | TEXT))
def test_arrays_of_any_text_survive(value: list[Any]) -> None:
    assert orjson.loads(encode_value("_text", literal(value))) == value


RELATION = Relation("public", "t", (Column("id", "int8"), Column('a"b', "text"), Column("c", "jsonb")), (0,), True)


def test_an_image_leaves_out_what_is_absent_and_keeps_null() -> None:
    assert encode_image(RELATION, ("1", None, ABSENT)) == b'{"id":1,"a\\"b":null}'
    assert encode_image(RELATION, (ABSENT, ABSENT, ABSENT)) == b"{}"


def test_an_image_shows_only_the_columns_asked_for() -> None:
    assert encode_image(RELATION, ("1", "x", '{"k":1}'), {"id", "c"}) == b'{"id":1,"c":{"k":1}}'
    assert encode_image(RELATION, ("1", "x", None), frozenset()) == b"{}"


def test_a_relation_that_changed_is_encoded_by_its_new_types() -> None:
    changed = Relation("public", "t", (Column("id", "text"), *RELATION.columns[1:]), (0,), True)
    assert encode_image(RELATION, ("1", None, None), {"id"}) == b'{"id":1}'
    assert encode_image(changed, ("1", None, None), {"id"}) == b'{"id":"1"}'
