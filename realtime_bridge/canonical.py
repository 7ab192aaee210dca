"""Reads text the way Postgres' input functions do, and writes it the way its output functions do.

Two values of these types are equal exactly if their canonical texts are equal, so policies and filters compare texts
and nothing else. What Postgres reads differently from version to version (hexadecimal integers, underscores) is
refused here: unknown means no.

Layer: pure. May import: nothing.
Sources: uuid.c, numutils.c, bool.c, numeric.c, datetime.c, varlena.c and arrayfuncs.c of Postgres 15 to 18
(src/backend/utils/adt).
"""

import calendar
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Final

TEXT_TYPES: Final = frozenset({"text", "varchar"})
INTEGER_BITS: Final[Mapping[str, int]] = {"int2": 16, "int4": 32, "int8": 64}

FORMED_TYPES: Final = frozenset({"numeric", "date", "timestamp", "timestamptz", "time", "bytea"})
"""Types of whose values a source may bring a text that is not the canonical one."""

_SIMPLE_TYPES: Final = frozenset({"uuid", "bool"}) | TEXT_TYPES | INTEGER_BITS.keys()

_SPACE: Final = " \t\n\v\f\r"
_UUID: Final = re.compile(r"(\{)?((?:[0-9A-Fa-f]{4}-?){7}[0-9A-Fa-f]{4})(?(1)\})")
_INTEGER: Final = re.compile(r"([+-]?)([0-9]+)")
_TRUE: Final = frozenset({"t", "tr", "tru", "true", "y", "ye", "yes", "on", "1"})
_FALSE: Final = frozenset({"f", "fa", "fal", "fals", "false", "n", "no", "of", "off", "0"})


def canonical(type_name: str, text: str) -> str:
    """The text that Postgres writes for a value of this type that it has read from `text`.

    Args:
        type_name: one of `uuid bool int2 int4 int8 numeric text varchar bytea`, or `date time timestamp timestamptz`,
            of which only what Postgres itself writes is read.
        text: what would be cast; never NULL.

    Raises:
        ValueError: Postgres would refuse the text, or the type is none of these.
    """
    reader = _READERS.get(type_name)
    if reader is None:
        raise ValueError(f"type {type_name} is not compared by its text")
    return reader(text)


def cast(text: str, source: str, target: str) -> str:
    """The canonical text after a cast between two of these types.

    Args:
        text: canonical for `source`.
        source: the type that `text` is of.
        target: the type that it becomes.

    Raises:
        ValueError: Postgres would refuse it, or the cast is none that is known here.
    """
    if not is_castable(source, target):
        raise ValueError(f"{source} is not cast to {target}")
    if source == "bool" and target in TEXT_TYPES:
        return "true" if text == "t" else "false"
    return canonical(target, text)


def is_castable(source: str, target: str) -> bool:
    """Whether `cast` knows the way from one type to the other."""
    if source == target:
        return source in _READERS
    if source in TEXT_TYPES:
        return target in _SIMPLE_TYPES or target == "numeric"
    if target in TEXT_TYPES:
        return source in _SIMPLE_TYPES
    return source in INTEGER_BITS and (target in INTEGER_BITS or target == "numeric")


def keeps_text(source: str, target: str) -> bool:
    """Whether a cast leaves every canonical text as it is, and so can neither fail nor change what is equal."""
    if source in INTEGER_BITS and target in INTEGER_BITS:
        return INTEGER_BITS[source] <= INTEGER_BITS[target]
    if source == target or (source in INTEGER_BITS and target == "numeric"):
        return True
    return target in TEXT_TYPES and source in _SIMPLE_TYPES and source != "bool"


def family(type_name: str) -> str | None:
    """The word for types that compare with each other by their texts; None for all others."""
    if type_name in INTEGER_BITS:
        return "integer"
    if type_name in TEXT_TYPES:
        return "text"
    return type_name if type_name in _READERS else None


def array_elements(text: str) -> list[str | None]:
    """The elements of an array's text, of all its dimensions; None is NULL.

    Raises:
        ValueError: Postgres writes no array so.
    """
    body = _BOUNDS.sub("", text, count=1)
    tokens = list(_ARRAY_TOKEN.finditer(body))
    if not (body.startswith("{") and body.endswith("}")) or sum(len(token[0]) for token in tokens) != len(body):
        raise ValueError("not an array")
    return [_element(token) for token in tokens if token["structure"] is None]


def _element(token: re.Match[str]) -> str | None:
    quoted = token["quoted"]
    if quoted is not None:
        return _ESCAPED.sub(r"\1", quoted)
    return None if token["bare"] == "NULL" else token["bare"]


_BOUNDS: Final = re.compile(r"\A(?:\[-?[0-9]+:-?[0-9]+\])+=")
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_ARRAY_TOKEN: Final = re.compile(
    r'"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>[^{},"\\ \t\n\v\f\r]+)|(?P<structure>[{},])', re.DOTALL
)


def _uuid(text: str) -> str:
    match = _UUID.fullmatch(text)
    if match is None:
        raise ValueError("not a uuid")
    digits = match[2].replace("-", "").lower()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _integer(bits: int) -> Callable[[str], str]:
    def read(text: str) -> str:
        match = _INTEGER.fullmatch(text.strip(_SPACE))
        if match is None:
            raise ValueError("not an integer")
        digits = match[2].lstrip("0") or "0"
        if len(digits) > 19 or not -(1 << bits - 1) <= (value := int(match[1] + digits)) < 1 << bits - 1:
            raise ValueError(f"not an integer of {bits} bits")
        return str(value)

    return read


def _boolean(text: str) -> str:
    word = text.strip(_SPACE).lower()
    if word not in _TRUE | _FALSE:
        raise ValueError("not a boolean")
    return "t" if word in _TRUE else "f"


def _text(text: str) -> str:
    if "\0" in text:
        raise ValueError("text cannot hold a zero byte")
    return text


def _numeric(text: str) -> str:
    word = text.strip(_SPACE)
    special = _SPECIAL_NUMBERS.get(word.lower())
    if special is not None:
        return special
    match = _NUMBER.fullmatch(word)
    if match is None or len(match["exponent"] or "") > 3:
        raise ValueError("not a number")
    digits = format(Decimal(word), "f")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return digits if digits.strip("-0") else "0"


_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?(?P<exponent>[0-9]+))?")
_SPECIAL_NUMBERS: Final = {
    "nan": "NaN",
    **dict.fromkeys(("inf", "infinity", "+inf", "+infinity"), "Infinity"),
    **dict.fromkeys(("-inf", "-infinity"), "-Infinity"),
}


def _moment(pattern: re.Pattern[str]) -> Callable[[str], str]:
    """Reads only what Postgres writes in UTC and ISO style; Postgres reads far more."""

    def read(text: str) -> str:
        match = pattern.fullmatch(text)
        if match is None or (match["year"] is not None and not _is_day(match)):
            raise ValueError("not written as Postgres writes it in UTC")
        return text

    return read


def _is_day(moment: re.Match[str]) -> bool:
    year = int(moment["year"])
    days = calendar.monthrange(1 - year if moment["era"] else year, int(moment["month"]))[1]
    return year > 0 and int(moment["day"]) <= days


def _pattern(after_day: str) -> re.Pattern[str]:
    day = r"(?P<year>[0-9]{4,6})-(?P<month>0[1-9]|1[0-2])-(?P<day>0[1-9]|[12][0-9]|3[01])"
    return re.compile(rf"(?P<end>-?infinity)|{day}{after_day}(?P<era> BC)?")


_CLOCK: Final = (
    r"(?P<hour>[01][0-9]|2[0-3]):(?P<minute>[0-5][0-9]):(?P<second>[0-5][0-9])(?:\.(?P<fraction>[0-9]{0,5}[1-9]))?"
)
MOMENTS: Final[Mapping[str, re.Pattern[str]]] = {
    "date": _pattern(""),
    "timestamp": _pattern(f" {_CLOCK}"),
    "timestamptz": _pattern(rf" {_CLOCK}\+00"),
}
"""How Postgres writes moments."""

_TIME: Final = re.compile(_CLOCK + "|24:00:00")
_HEXADECIMAL: Final = re.compile(r"\\x(?:[0-9a-fA-F]{2})*")


def _time(text: str) -> str:
    if _TIME.fullmatch(text) is None:
        raise ValueError("not written as Postgres writes it")
    return text


def _bytea(text: str) -> str:
    if _HEXADECIMAL.fullmatch(text) is None:
        raise ValueError("not hexadecimal")
    return text.lower()


_READERS: Final[Mapping[str, Callable[[str], str]]] = {
    "uuid": _uuid,
    "bool": _boolean,
    "text": _text,
    "varchar": _text,
    "numeric": _numeric,
    "time": _time,
    "bytea": _bytea,
    **{name: _integer(bits) for name, bits in INTEGER_BITS.items()},
    **{name: _moment(pattern) for name, pattern in MOMENTS.items()},
}
