"""Filters as Supabase writes them: `column=operator.value`, joined with AND by commas.

    user_id=eq.0b9e…,status=in.(draft,"in review"),deleted_at=is.null

A filter narrows what its subscriber is sent; it never widens it. It is parsed without knowing the table and bound to a
relation once it does. Values compare as Postgres compares the column's type; types whose texts do not tell whether
values are equal are refused rather than guessed at. NULL matches none of `eq`, `neq` and `in`.

Layer: pure. May import: words, canonical.
Sources: lib/extensions/postgres_cdc_rls/subscriptions.ex of github:supabase/realtime (the grammar);
array_in in arrayfuncs.c (the items of `in`).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from itertools import islice
from typing import Final, Literal, TypeAlias, get_args

from realtime_bridge.canonical import INTEGER_BITS, canonical
from realtime_bridge.change import ABSENT, Image, Relation
from realtime_bridge.errors import BadRequestError

Operator: TypeAlias = Literal["eq", "neq", "in", "is"]
_Key: TypeAlias = str | Decimal
_ToKey: TypeAlias = Callable[[str], _Key]

OPERATORS: Final[tuple[Operator, ...]] = get_args(Operator)
MAX_VALUES: Final = 100
MAX_CONDITIONS: Final = 20
MAX_LENGTH: Final = 16_384
"""Characters of a filter: what every change may have to be compared with."""

_TRUTHS: Final = {"null": None, "unknown": None, "true": "t", "false": "f"}


@dataclass(frozen=True, slots=True)
class Condition:
    """One segment of a filter.

    Attributes:
        values: one, but any number of them for `in`; None is NULL. Those of `is` are `null true false unknown`.
    """

    column: str
    operator: Operator
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class Filter:
    """Conditions that must all hold."""

    conditions: tuple[Condition, ...]

    @cached_property
    def columns(self) -> frozenset[str]:
        """The columns it looks at."""
        return frozenset(condition.column for condition in self.conditions)

    def bind(self, relation: Relation) -> "BoundFilter":
        """Read the values as those of a relation's columns.

        Raises:
            BadRequestError: a column is unknown, a value is not of its type, or its type cannot be compared.
        """
        return BoundFilter(tuple(_bind(condition, relation) for condition in self.conditions))


_Matches: TypeAlias = Callable[[Image], bool | None]


@dataclass(frozen=True, slots=True)
class BoundFilter:
    """A filter over the images of one relation."""

    conditions: tuple[_Matches, ...]

    def matches(self, image: Image) -> bool | None:
        """Whether a row matches; None if that depends on a value that is absent."""
        unknown = False
        for condition in self.conditions:
            verdict = condition(image)
            if verdict is False:
                return False
            unknown = unknown or verdict is None
        return None if unknown else True


# -- reading -----------------------------------------------------------------------------------------------------------


def parse_filter(text: str) -> Filter:
    """Read a filter; an empty one matches every row.

    Raises:
        BadRequestError: it is not understood, or an operator is not known here.
    """
    if len(text) > MAX_LENGTH:
        raise BadRequestError(f"filter: at most {MAX_LENGTH} characters")
    if not text.strip():
        return Filter(())
    segments = list(islice(_segments(text), MAX_CONDITIONS + 1))
    if len(segments) > MAX_CONDITIONS:
        raise BadRequestError(f"filter: at most {MAX_CONDITIONS} conditions")
    return Filter(tuple(_condition(segment.strip()) for segment in segments))


def _segments(text: str) -> Iterator[str]:
    """The parts between commas that stand outside of parentheses and quotes.

    A quote opens right after `.`, `(` or `,` only; a backslash inside takes the next character as it is.
    """
    depth = start = i = 0
    while i < len(text):
        char = text[i]
        if char == '"' and i and text[i - 1] in ".(,":
            i = _closing_quote(text, i)
        elif char == "(":
            depth += 1
        elif char == ")":
            depth = max(0, depth - 1)
        elif char == "," and depth == 0:
            yield text[start:i]
            start = i + 1
        i += 1
    yield text[start:]


def _closing_quote(text: str, opening: int) -> int:
    """The index of the quote that closes, or the end of the text."""
    match = _QUOTED.match(text, opening)
    return len(text) if match is None else match.end() - 1


_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)


def _condition(segment: str) -> Condition:
    column, equals, rest = segment.partition("=")
    name, dot, value = rest.partition(".")
    if not (column and equals and name and dot):
        raise BadRequestError("filter: each part is column=operator.value")
    operator = next((known for known in OPERATORS if known == name), None)
    if operator is None:
        raise BadRequestError(f"filter: {name[:20]} is not an operator here; these are: {', '.join(OPERATORS)}")
    if operator == "in":
        return Condition(column, operator, _items(value))
    value = _unquoted(value)
    if operator == "is" and value not in _TRUTHS:
        raise BadRequestError("filter: is takes null, true, false or unknown")
    return Condition(column, operator, (value,))


def _unquoted(value: str) -> str:
    """Without its quotes, if the whole value is one quoted text; else as it is."""
    match = _QUOTED.fullmatch(value)
    return value if match is None else _ESCAPED.sub(r"\1", match[1])


# Nothing in it can match in two ways, so that no text takes more than one pass.
_ITEM: Final = re.compile(r'\s*+(?:"((?:[^"\\]|\\.)*+)"|((?:[^"\\{},\s]|\\.|\s++(?=[^\s,]))*+))\s*+(,|\Z)', re.DOTALL)


def _items(value: str) -> tuple[str | None, ...]:
    """The items of `(a,"b c",NULL)`, read as Postgres reads an array."""
    if not (value.startswith("(") and value.endswith(")") and len(value) > 1):
        raise BadRequestError("filter: in takes a list in parentheses")
    inner = value[1:-1]
    items: list[str | None] = []
    position, more = 0, True
    while more:
        match = _ITEM.match(inner, position)
        if match is None or match[2] == "":
            raise BadRequestError("filter: the list of in is not understood")
        items.append(_item(match[1], match[2]))
        position, more = match.end(), match[3] == ","
        if len(items) > MAX_VALUES:
            raise BadRequestError(f"filter: in takes at most {MAX_VALUES} values")
    return tuple(items)


def _item(quoted: str | None, plain: str) -> str | None:
    if quoted is not None:
        return _ESCAPED.sub(r"\1", quoted)
    return None if plain.lower() == "null" else _ESCAPED.sub(r"\1", plain)


# -- binding -----------------------------------------------------------------------------------------------------------


def _bind(condition: Condition, relation: Relation) -> _Matches:
    position = relation.index.get(condition.column)
    if position is None:
        raise BadRequestError(f"filter: {relation.name} has no column {condition.column[:63]}")
    type_name = relation.columns[position].type
    if condition.operator == "is":
        return _is(position, type_name, condition)
    to_key = _to_key(type_name, condition)
    try:
        keys = frozenset(to_key(value) for value in condition.values if value is not None)
    except ValueError:
        raise BadRequestError(f"filter: a value for {condition.column} is not of type {type_name}") from None
    return _among(position, keys, to_key, wanted=condition.operator != "neq")


def _is(position: int, type_name: str, condition: Condition) -> _Matches:
    (word,) = condition.values
    if word != "null" and type_name != "bool":
        raise BadRequestError(f"filter: is.{word} needs a boolean column, {condition.column} is of type {type_name}")
    wanted = _TRUTHS[word or "null"]

    def matches(image: Image) -> bool | None:
        value = image[position]
        return None if value is ABSENT else value == wanted

    return matches


def _among(position: int, keys: frozenset[_Key], to_key: _ToKey, *, wanted: bool) -> _Matches:
    def matches(image: Image) -> bool | None:
        value = image[position]
        if value is None or value is ABSENT:
            return False if value is None else None
        try:
            return (to_key(value) in keys) is wanted
        except ValueError:  # not as Postgres writes the type: whoever brought it, it cannot be compared
            return None

    return matches


def _to_key(type_name: str, condition: Condition) -> _ToKey:
    """What turns a text of the type into something that is equal exactly where the values are."""
    if type_name == "numeric":
        return _number
    if type_name in _COMPARED or (type_name not in _REFUSED and not type_name.startswith("_")):
        read = type_name if type_name in _COMPARED else "text"  # an enum's labels are their own text
        return lambda text: canonical(read, text)
    raise BadRequestError(
        f"filter: {condition.column} is of type {type_name}, on which {condition.operator} does not work yet"
    )


def _number(text: str) -> _Key:
    """Equal numbers are equal whatever their scale; NaN is a text, since it equals itself here."""
    text = text.strip(" \t\n\v\f\r")
    if text.lower() == "nan":
        return "NaN"
    if _NUMBER.fullmatch(text) is None:
        raise ValueError("not a number")
    return Decimal(text)


_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?|[+-]?inf(?:inity)?", re.I)

_COMPARED: Final = frozenset({"bool", "uuid", "text", "varchar", *INTEGER_BITS})
_NAMES: Final = """
    bit box bpchar bytea char cidr circle citext date float4 float8 geography geometry hstore inet interval json jsonb
    jsonpath line lseg macaddr macaddr8 money name oid path pg_lsn point polygon record time timestamp timestamptz
    timetz tsquery tsvector varbit xid xid8 xml
    int4range int8range numrange tsrange tstzrange daterange
    int4multirange int8multirange nummultirange tsmultirange tstzmultirange datemultirange
"""
_REFUSED: Final = frozenset(_NAMES.split())
