"""Reads text the way Postgres' input functions do, and writes it the way its output functions do.

Two values of these types are equal exactly if their canonical texts are equal, so policies and filters compare texts
and nothing else. What Postgres reads differently from version to version (hexadecimal integers, underscores) is
refused here: unknown means no.

Layer: pure. May import: nothing.
Sources: uuid.c, numutils.c, bool.c of Postgres 15 to 18 (src/backend/utils/adt).
"""

import re
from collections.abc import Callable, Mapping
from typing import Final

TEXT_TYPES: Final = frozenset({"text", "varchar"})
INTEGER_BITS: Final[Mapping[str, int]] = {"int2": 16, "int4": 32, "int8": 64}

_SPACE: Final = " \t\n\v\f\r"
_UUID: Final = re.compile(r"(\{)?((?:[0-9A-Fa-f]{4}-?){7}[0-9A-Fa-f]{4})(?(1)\})")
_INTEGER: Final = re.compile(r"([+-]?)([0-9]+)")
_TRUE: Final = frozenset({"t", "tr", "tru", "true", "y", "ye", "yes", "on", "1"})
_FALSE: Final = frozenset({"f", "fa", "fal", "fals", "false", "n", "no", "of", "off", "0"})


def canonical(type_name: str, text: str) -> str:
    """The text that Postgres writes for a value of this type that it has read from `text`.

    Args:
        type_name: one of `uuid bool int2 int4 int8 text varchar`.
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
    if source in TEXT_TYPES:
        return canonical(target, text)
    if not is_castable(source, target):
        raise ValueError(f"{source} is not cast to {target}")
    if source == "bool" and target in TEXT_TYPES:
        return "true" if text == "t" else "false"
    return canonical(target, text)


def is_castable(source: str, target: str) -> bool:
    """Whether `cast` knows the way from one type to the other."""
    if source in TEXT_TYPES:
        return target in _READERS
    if target in TEXT_TYPES or source == target:
        return source in _READERS
    return source in INTEGER_BITS and target in INTEGER_BITS


def keeps_text(source: str, target: str) -> bool:
    """Whether a cast leaves every canonical text as it is, and so can neither fail nor change what is equal."""
    if source in INTEGER_BITS and target in INTEGER_BITS:
        return INTEGER_BITS[source] <= INTEGER_BITS[target]
    if source in TEXT_TYPES:
        return target in TEXT_TYPES
    return source == target or (target in TEXT_TYPES and source in _READERS and source != "bool")


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


_READERS: Final[Mapping[str, Callable[[str], str]]] = {
    "uuid": _uuid,
    "bool": _boolean,
    "text": _text,
    "varchar": _text,
    **{name: _integer(bits) for name, bits in INTEGER_BITS.items()},
}
