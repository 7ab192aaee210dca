import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.canonical import array_elements, canonical, cast, family, is_castable, keeps_text

USER = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"


@pytest.mark.parametrize(
    ("type_name", "text", "expected"),
    [
        ("uuid", USER.upper(), USER),
        ("uuid", f"{{{USER}}}", USER),
        ("uuid", USER.replace("-", ""), USER),
        ("uuid", "a0ee-bc99-9c0b-4ef8-bb6d-6bb9-bd38-0a11", USER),
        ("int4", " +007\n", "7"),
        ("int4", "-0", "0"),
        ("int8", "-9223372036854775808", "-9223372036854775808"),
        ("bool", " ON ", "t"),
        ("bool", "of", "f"),
        ("bool", "Yes", "t"),
        ("text", " a ", " a "),
        ("numeric", "1.50", "1.5"),
        ("numeric", " +0012. ", "12"),
        ("numeric", "-.0", "0"),
        ("numeric", "-12.5e-1", "-1.25"),
        ("numeric", "1E3", "1000"),
        ("numeric", "100", "100"),
        ("numeric", "nAn", "NaN"),
        ("numeric", "+inf", "Infinity"),
        ("numeric", "-INFINITY", "-Infinity"),
        ("date", "2024-02-29", "2024-02-29"),
        ("date", "0001-02-29 BC", "0001-02-29 BC"),
        ("date", "-infinity", "-infinity"),
        ("timestamp", "2024-01-01 00:00:00.5", "2024-01-01 00:00:00.5"),
        ("timestamptz", "12024-01-01 23:59:59.999999+00", "12024-01-01 23:59:59.999999+00"),
        ("time", "24:00:00", "24:00:00"),
        ("bytea", "\\xDEad", "\\xdead"),
    ],
)
def test_a_text_becomes_what_postgres_writes(type_name: str, text: str, expected: str) -> None:
    assert canonical(type_name, text) == expected


@pytest.mark.parametrize(
    ("type_name", "text"),
    [
        ("uuid", ""),
        ("uuid", f" {USER}"),
        ("uuid", f"{{{USER}"),
        ("uuid", f"{USER}}}"),
        ("uuid", USER.replace("-", "--")),
        ("uuid", f"{USER}-"),
        ("uuid", "None"),
        ("int2", "32768"),
        ("int4", "-2147483649"),
        ("int8", "9" * 5000),
        ("int4", "1.0"),
        ("int4", "0x1F"),
        ("int4", "1_000"),
        ("int4", "\u0661"),
        ("int4", "\u00a01"),
        ("bool", "o"),
        ("bool", ""),
        ("text", "a\0"),
        ("numeric", "1_0"),
        ("numeric", "0x1"),
        ("numeric", "."),
        ("numeric", "1e10000"),
        ("numeric", "\u0661"),
        ("numeric", "+nan"),
        ("date", "2023-02-29"),
        ("date", "0000-01-01"),
        ("date", "2024-1-1"),
        ("date", "today"),
        ("date", "infinity BC"),
        ("timestamp", "2024-01-01 00:00:00.50"),
        ("timestamp", "2024-01-01 24:00:00"),
        ("timestamptz", "2024-01-01 00:00:00+02"),
        ("timestamptz", "2024-01-01 00:00:00"),
        ("time", "24:00:01"),
        ("bytea", "\\xabc"),
        ("bytea", "abc"),
        ("jsonb", "1"),
    ],
)
def test_what_postgres_refuses_or_reads_in_its_own_way_is_refused(type_name: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical(type_name, text)


@given(st.uuids(), st.sampled_from([str.upper, str.lower, lambda text: text.replace("-", ""), "{{{}}}".format]))
def test_every_way_to_write_a_uuid_is_one_uuid(value: uuid.UUID, write: object) -> None:
    assert canonical("uuid", write(str(value))) == str(value)  # type: ignore[operator]


@given(st.integers(-(2**63), 2**63 - 1))
def test_an_integer_keeps_its_value_through_casts(value: int) -> None:
    text = canonical("int8", f" {value:+025d}")
    assert text == str(value)
    assert cast(cast(text, "int8", "text"), "text", "int8") == text


def test_a_boolean_as_text_is_a_word() -> None:
    assert cast("t", "bool", "text") == "true"
    assert cast("f", "bool", "varchar") == "false"
    assert cast("yes", "text", "bool") == "t"


def test_a_narrowing_cast_can_fail() -> None:
    assert is_castable("int8", "int2")
    assert not keeps_text("int8", "int2")
    with pytest.raises(ValueError, match="16 bits"):
        cast("70000", "int8", "int2")


def test_casts_that_are_not_known_are_refused() -> None:
    assert not is_castable("uuid", "int4")
    assert not is_castable("bool", "int4")
    assert not is_castable("numeric", "text")
    assert not is_castable("text", "date")
    assert is_castable("text", "numeric")
    assert cast("7", "int4", "numeric") == "7"
    with pytest.raises(ValueError, match="not cast"):
        cast("t", "bool", "int4")


def test_types_compare_within_their_family() -> None:
    assert family("int2") == family("int8") == "integer"
    assert family("varchar") == family("text") == "text"
    assert family("citext") is family("float8") is family("bpchar") is None
    assert keeps_text("int4", "numeric")
    assert not keeps_text("numeric", "text")
    assert not keeps_text("date", "text")
    assert keeps_text("uuid", "text")
    assert keeps_text("int2", "int4")
    assert not keeps_text("bool", "text")
    assert not keeps_text("text", "uuid")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", []),
        ("{a,NULL,null}", ["a", None, "null"]),
        ('{"NULL","","{}",",","\\"","\\\\"}', ["NULL", "", "{}", ",", '"', "\\"]),
        ("{{1,2},{3,NULL}}", ["1", "2", "3", None]),
        ("[0:1][-1:0]={{1,2},{3,4}}", ["1", "2", "3", "4"]),
        ("{a\u00a0b,\u2003}", ["a\u00a0b", "\u2003"]),
        ('{"a\nb"}', ["a\nb"]),
    ],
)
def test_an_array_has_these_elements(text: str, expected: list[str | None]) -> None:
    assert array_elements(text) == expected


@pytest.mark.parametrize("text", ["", "a", "{a", "a}", "{a b}", '{"a}', "{a\\}", "NULL"])
def test_what_is_no_array_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an array"):
        array_elements(text)
