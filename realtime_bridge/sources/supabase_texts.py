"""Values as Supabase Realtime sends them, back into Postgres' own texts: the way of `to_jsonb`, backwards.

What cannot be had back: digits of a `numeric` (or of a number inside json) beyond those of a double, since the client
parses them into one.

Layer: adapters (pure). Imports nothing of this package.
Sources: to_jsonb (src/backend/utils/adt/jsonb.c), realtime.cast (supabase/walrus), float8out_internal.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final


def to_text(type_: str, value: Any) -> str | None:
    """The text of a value as Postgres' output function writes it, from its JSON.

    Raises:
        ValueError, TypeError: JSON has no such value for this type.
    """
    if value is None:
        return None
    if type_.startswith("_") and isinstance(value, list):
        return _array_text(type_[1:], value)
    if type_ in ("json", "jsonb"):
        return _json_text(value)
    if isinstance(value, str):
        return _TEXTS.get(type_, str)(value)
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, int | float):
        return _number_text(type_, value)
    return _json_text(value)


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


_MOMENT: Final = re.compile(r"(\d{4,}-\d\d-\d\d)T([\d:.]+)(?:([+-]\d\d):00)?( BC)?")


def _moment_text(value: str) -> str:
    """`2026-01-01T00:00:00+00:00` as `2026-01-01 00:00:00+00`; `infinity` as it is."""
    match = _MOMENT.fullmatch(value)
    return f"{match[1]} {match[2]}{match[3] or ''}{match[4] or ''}" if match else value


_TEXTS: Final[Mapping[str, Callable[[str], str]]] = {
    "timestamp": _moment_text,
    "timestamptz": _moment_text,
    "bytea": lambda value: "\\x" + value,
}


def _number_text(type_: str, value: float) -> str:
    if type_ in ("float4", "float8"):
        return _float_text(float(value))
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError("a number beyond the range of a double")
    return format(Decimal(repr(value)), "f")


def _float_text(value: float) -> str:
    """Shortest digits, with an exponent below 1e-4 and from 1e15 on. Source: float8out_internal, d2s_full.c."""
    if not math.isfinite(value):
        raise ValueError("a number beyond the range of a double")
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    assert isinstance(exponent, int), "finite"
    leading = len(digits) + exponent - 1
    if value and not -4 <= leading < 15:
        figures = "".join(map(str, digits))
        return f"{'-' * sign}{figures[0]}{'.' * (len(figures) > 1)}{figures[1:]}e{leading:+03d}"
    return format(Decimal(repr(value)).normalize(), "f")


_BARE: Final = re.compile(r'(?!null\Z)[^{}",;\\\s]+', re.IGNORECASE)


def _array_text(type_: str, values: list[Any]) -> str:
    delimiter = ";" if type_ == "box" else ","
    return "{" + delimiter.join(_element_text(type_, value) for value in values) + "}"


def _element_text(type_: str, value: Any) -> str:
    if isinstance(value, list) and type_ not in ("json", "jsonb"):
        return _array_text(type_, value)
    # Within an array, bytea keeps its prefix: Supabase takes it off whole values only.
    text = value if type_ == "bytea" else to_text(type_, value)
    if text is None:
        return "NULL"
    if _BARE.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
