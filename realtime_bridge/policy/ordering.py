"""The order of values that are known as texts: numbers and moments, as Postgres compares them.

Text is not among them (its order is a collation's), nor are floating numbers.

Layer: pure. May import: canonical.
Sources: cmp_numerics in numeric.c (NaN is the greatest); timestamp.c and date.c (infinities are the extremes).
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final, TypeAlias

from realtime_bridge.canonical import MOMENTS, canonical

OrderKey: TypeAlias = tuple[Any, ...]
"""Compares with other keys of the same type."""


def is_ordered(type_name: str) -> bool:
    """Whether `order_key` knows a type."""
    return type_name in _KEYS


@lru_cache(maxsize=8192)
def order_key(type_name: str, text: str) -> OrderKey:
    """What compares as the values of a type do.

    Args:
        type_name: one of `integer numeric date timestamp timestamptz`.
        text: as Postgres writes it, in UTC and ISO style.

    Raises:
        ValueError: it is no such text.
    """
    return _KEYS[type_name](text)


def _number(text: str) -> OrderKey:
    number = canonical("numeric", text)
    rank = _UNCOUNTABLE.get(number, 0)
    return rank, Decimal(0 if rank else number)


def _moment(pattern: re.Pattern[str]) -> Callable[[str], OrderKey]:
    def key(text: str) -> OrderKey:
        match = pattern.fullmatch(text)
        if match is None:
            raise ValueError("not a moment")
        parts = match.groupdict("")
        if parts["end"]:
            return (-1 if parts["end"].startswith("-") else 1,)
        year = int(parts["year"])
        rest = (int(parts.get(part) or 0) for part in ("month", "day", "hour", "minute", "second"))
        return (0, 1 - year if parts["era"] else year, *rest, parts.get("fraction", "").ljust(6, "0"))

    return key


_UNCOUNTABLE: Final = {"-Infinity": -1, "Infinity": 1, "NaN": 2}

_KEYS: Final[Mapping[str, Callable[[str], OrderKey]]] = {
    "integer": _number,
    "numeric": _number,
    **{name: _moment(pattern) for name, pattern in MOMENTS.items()},
}
