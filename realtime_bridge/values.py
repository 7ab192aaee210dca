"""JSON of Postgres' text values, as Supabase Realtime writes them.

Supabase encodes a value as `to_jsonb(text::type)`; this does the same without a database. A result never holds a
carriage return or a line feed, so that it can stand in an SSE `data:` line.

Layer: pure. May import: change.
Sources: json_categorize_type, datum_to_json_internal and JsonEncodeDateTime (src/backend/utils/adt/json*.c); array_out
(arrayfuncs.c); a test compares every type with to_jsonb in a real Postgres.
"""

import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

import orjson

from realtime_bridge.change import ABSENT, Image, Relation

Encoder: TypeAlias = Callable[[str], bytes]

_MAX_PLANS: Final = 1024


def encode_value(type: str, text: str) -> bytes:  # noqa: A002 - the word that Column uses
    """JSON of one value.

    Args:
        type: `pg_type.typname` of the base type, as in `Column.type`.
        text: as the type's output function writes it with TimeZone=UTC, DateStyle=ISO and bytea_output=hex. What is
            not of the type's form becomes a JSON string.
    """
    return encoder_of(type)(text)


def encode_image(relation: Relation, image: Image, columns: Collection[str] | None = None) -> bytes:
    """JSON object of a row, in column order; absent values are left out.

    Args:
        relation: what the image is a row of.
        image: one value a column.
        columns: names of the columns to keep; None keeps all.
    """
    members = [
        key + (b"null" if value is None else encoder(value))
        for (name, key, encoder), value in zip(_plan(relation), image, strict=True)
        if value is not ABSENT and (columns is None or name in columns)
    ]
    return b"{" + b",".join(members) + b"}"


class _PlannedColumn(NamedTuple):
    name: str
    key: bytes
    encoder: Encoder


_plans: dict[str, tuple[_PlannedColumn, ...]] = {}


def _plan(relation: Relation) -> tuple[_PlannedColumn, ...]:
    """What every row of the relation needs, made once a version."""
    plan = _plans.get(relation.version)
    if plan is None:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        plan = tuple(_PlannedColumn(c.name, orjson.dumps(c.name) + b":", encoder_of(c.type)) for c in relation.columns)
        _plans[relation.version] = plan
    return plan


# -- scalars ---------------------------------------------------------------------------------------------------------

_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


def _string(text: str) -> bytes:
    return orjson.dumps(text)


def _number(text: str) -> bytes:
    """All digits as they are; NaN and the infinities are strings."""
    return text.encode() if _NUMBER.fullmatch(text) else _string(text)


def _bool(text: str) -> bytes:
    return {"t": b"true", "f": b"false"}.get(text) or _string(text)


def _timestamp(text: str) -> bytes:
    return _string(text.replace(" ", "T", 1))


_OFFSET: Final = re.compile(r"([+-][0-9]{2})( BC)?")


def _timestamptz(text: str) -> bytes:
    day, space, time = text.partition(" ")
    if not space:  # infinity
        return _string(text)
    if time.endswith("+00"):
        return _string(f"{day}T{time}:00")
    sign = max(time.rfind("+"), time.rfind("-"))
    offset = _OFFSET.fullmatch(time, sign) if sign >= 0 else None
    if offset is None:
        return _string(f"{day}T{time}")
    return _string(f"{day}T{time[:sign]}{offset[1]}:00{offset[2] or ''}")


_LINE_BREAKS: Final = str.maketrans("\r\n", "  ")


def _json(text: str) -> bytes:
    """As it is. A line break can only stand between its tokens: inside a string JSON demands an escape."""
    return text.translate(_LINE_BREAKS).encode() if "\n" in text or "\r" in text else text.encode()


def _bytea(text: str) -> bytes:
    return _string(text.removeprefix("\\x"))


_SCALARS: Final[dict[str, Encoder]] = {
    "bool": _bool,
    "int2": _number,
    "int4": _number,
    "int8": _number,
    "numeric": _number,
    "float4": _number,
    "float8": _number,
    "timestamp": _timestamp,
    "timestamptz": _timestamptz,
    "json": _json,
    "jsonb": _json,
    "bytea": _bytea,
}

# -- arrays ----------------------------------------------------------------------------------------------------------

_BOUNDS: Final = re.compile(r"(?:\[[+-]?[0-9]+:[+-]?[0-9]+\])+=")
_TOKENS: Final = {
    delimiter: re.compile(rf'([{{}}{delimiter}])|"((?:[^"\\]|\\.)*)"|((?:[^{{}}"\\{delimiter}]|\\.)+)', re.DOTALL)
    for delimiter in (",", ";")
}
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)


def _array_encoder(element_type: str) -> Encoder:
    element = _string if element_type == "bytea" else encoder_of(element_type)
    delimiter = ";" if element_type == "box" else ","
    tokens = _TOKENS[delimiter]

    def encode(text: str) -> bytes:
        bounds = _BOUNDS.match(text)
        start = bounds.end() if bounds else 0
        encoded = _array(text, start, tokens, element)
        return _string(text) if encoded is None else encoded

    return encode


def _array(text: str, start: int, tokens: re.Pattern[str], element: Encoder) -> bytes | None:
    """JSON array of an array literal, or None if it is not one."""
    parts: list[bytes] = []
    depth, position, end = 0, start, len(text)
    if not text.startswith("{", start):
        return None
    while position < end:
        token = tokens.match(text, position)
        if token is None or (depth == 0 and position > start):
            return None
        position = token.end()
        mark, quoted, bare = token.groups()
        if mark == "{":
            depth += 1
            parts.append(b"[")
        elif mark == "}":
            depth -= 1
            parts.append(b"]")
        elif mark is not None:
            parts.append(b",")
        elif quoted is not None:
            parts.append(element(_ESCAPE.sub(r"\1", quoted) if "\\" in quoted else quoted))
        else:
            parts.append(b"null" if bare.upper() == "NULL" else element(_ESCAPE.sub(r"\1", bare)))
    return b"".join(parts) if depth == 0 else None


@lru_cache(maxsize=1024)
def encoder_of(type: str) -> Encoder:  # noqa: A002 - the word that Column uses
    """The encoder for a type; for one that is not known: as a string."""
    scalar = _SCALARS.get(type)
    if scalar is not None:
        return scalar
    return _array_encoder(type[1:]) if type.startswith("_") and len(type) > 1 else _string
