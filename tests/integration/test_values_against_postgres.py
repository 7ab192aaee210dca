"""Values are encoded as `to_jsonb(text::type)` does it, which is what Supabase Realtime sends."""

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realtime_bridge.database import PINNED
from realtime_bridge.dev.engines import EmbeddedPostgres
from realtime_bridge.values import encode_value

pytestmark = pytest.mark.integration

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
DAYS = st.dates().map(str)
TIMES = st.times().map(str)
OFFSETS = st.sampled_from(["Z", "+05:30", "-11", "+00"])
SPECIAL_TIMES = st.sampled_from(["infinity", "-infinity", "0044-03-15 BC", "12026-01-01", "epoch"])
SPECIAL_NUMBERS = st.sampled_from(["NaN", "Infinity", "-Infinity"])
MOMENTS = st.tuples(DAYS, TIMES).map(" ".join)

TYPES: dict[str, st.SearchStrategy[str]] = {
    "bool": st.sampled_from(["t", "f"]),
    "int2": st.integers(-(2**15), 2**15 - 1).map(str),
    "int4": st.integers(-(2**31), 2**31 - 1).map(str),
    "int8": st.integers(-(2**63), 2**63 - 1).map(str),
    "numeric": st.decimals(allow_nan=False, allow_infinity=False).map(lambda d: f"{d:e}") | SPECIAL_NUMBERS,
    "float8": st.floats(width=64).map(str),
    "float4": st.floats(width=32).map(str),
    "timestamptz": st.tuples(MOMENTS, OFFSETS).map("".join) | SPECIAL_TIMES,
    "timestamp": MOMENTS | SPECIAL_TIMES,
    "date": DAYS | SPECIAL_TIMES,
    "time": TIMES,
    "timetz": st.tuples(TIMES, OFFSETS).map("".join),
    "interval": st.timedeltas().map(lambda delta: f"{delta.days} days {delta.seconds} seconds"),
    "json": JSON.map(lambda value: json.dumps(value, indent=1)),
    "jsonb": JSON.map(json.dumps),
    "uuid": st.uuids().map(str),
    "text": TEXT,
    "varchar": TEXT,
    "bpchar": TEXT,
    "name": TEXT,
    "inet": st.ip_addresses().map(str),
    "oid": st.integers(0, 2**32 - 1).map(str),
    "xid8": st.integers(0, 2**63).map(str),
    "money": st.integers(-(10**9), 10**9).map(str),
    "int4range": st.tuples(st.integers(-9, 0), st.integers(0, 9)).map(lambda pair: f"[{pair[0]},{pair[1]})"),
    "tstzrange": st.just('["2026-01-01 00:00:00+00",infinity)'),
    "int4multirange": st.just("{[1,2),[5,9)}"),
    "point": st.just("(1,2.5)"),
    "box": st.just("(1,1),(0,0)"),
    "bit": st.just("1"),
    "varbit": st.just("0101"),
    "tsvector": st.just("'a':1 'b''c':2"),
    "pg_lsn": st.just("0/16B3748"),
}


@pytest.fixture(scope="module")
def connection(postgres: EmbeddedPostgres) -> Iterator[psycopg.Connection]:
    options = " ".join(f"-c {name}={value}" for name, value in PINNED.items())
    with psycopg.connect(postgres.dsn(), autocommit=True, options=options) as connection:
        yield connection


def parsed(text: str) -> Any:
    return json.loads(text, parse_int=Decimal, parse_float=Decimal)


def compare(connection: psycopg.Connection, type_name: str, expression: str, argument: Any) -> None:
    query = f"SELECT t, to_jsonb(t::{type_name})::text FROM (SELECT format('%%s', {expression}) AS t) s"
    row = connection.execute(query.encode(), [argument]).fetchone()
    assert row is not None
    text, expected = row
    assert parsed(encode_value(type_name.removesuffix("[]"), text).decode()) == parsed(expected)


@pytest.mark.parametrize("type_name", TYPES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_scalars_agree(connection: psycopg.Connection, type_name: str, data: st.DataObject) -> None:
    compare(connection, type_name, f"%s::text::{type_name}", data.draw(TYPES[type_name]))


@pytest.mark.parametrize("type_name", [name for name in TYPES if name != "json"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_arrays_agree(connection: psycopg.Connection, type_name: str, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.none() | TYPES[type_name], max_size=4))
    compare(connection, f"_{type_name}", f"%s::text[]::{type_name}[]", values)


@pytest.mark.parametrize("literal", ["{{1,2},{3,NULL}}", "[0:1][-1:0]={{1,2},{3,4}}", "{{{1}}}", "{}"])
def test_bounds_and_dimensions_agree(connection: psycopg.Connection, literal: str) -> None:
    compare(connection, "_int4", "%s::int[]", literal)
    compare(connection, "_text", "%s::text[]", literal)


def test_binary_is_hexadecimal_without_a_prefix_and_within_arrays_with_it(connection: psycopg.Connection) -> None:
    row = connection.execute("SELECT format('%s', '\\x0102ff'::bytea)").fetchone()
    assert row is not None
    assert encode_value("bytea", row[0]) == b'"0102ff"'
    compare(connection, "_bytea", "%s::text[]::bytea[]", ["\\x0102ff", None])
