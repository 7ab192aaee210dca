"""The order of values that are known as texts: numbers and moments, as Postgres compares them.

Text is not here (its order is a collation's), nor are floating numbers.

Layer: pure. May import: canonical.
Sources: numeric.c (cmp_numerics: NaN is the greatest), timestamp.c and date.c (infinities are the extremes).
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Final, TypeAlias

OrderKey: TypeAlias = tuple[int, Decimal] | tuple[int, ...]


def is_ordered(type_name: str) -> bool:
    """Whether `order_key` knows a type."""
    return type_name in _KEYS


@lru_cache(maxsize=8192)
def order_key(type_name: str, text: str) -> OrderKey:
    """What compares as the values of a type do; keys of one type only.

    Args:
        type_name: one of `integer numeric date timestamp timestamptz`.
        text: as Postgres writes it, in UTC and ISO style.

    Raises:
        ValueError: it is no such text.
    """
    return _KEYS[type_name](text)


def _number(text: str) -> OrderKey:
    rank = {"-Infinity": -1, "Infinity": 1, "NaN": 2}.get(text)
    if rank is not None:
        return rank, Decimal(0)
    if _NUMBER.fullmatch(text) is None:
        raise ValueError("not a number")
    return 0, Decimal(text)


def _moment(pattern: re.Pattern[str]) -> Callable[[str], OrderKey]:
    def key(text: str) -> OrderKey:
        rank = {"-infinity": -1, "infinity": 1}.get(text)
        if rank is not None:
            return (rank,)
        match = pattern.fullmatch(text)
        if match is None:
            raise ValueError("not a moment")
        parts = match.groupdict("0")
        year = int(parts["year"]) if match["bc"] is None else 1 - int(parts["year"])
        rest = (int(parts.get(part, "0")) for part in ("month", "day", "hour", "minute", "second"))
        return (0, year, *rest, int(parts.get("fraction", "0").ljust(6, "0")))

    return key


_NUMBER: Final = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_DAY: Final = r"(?P<year>[0-9]{4,})-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})"
_TIME: Final = r" (?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})(\.(?P<fraction>[0-9]{1,6}))?"
_ERA: Final = r"(?P<bc> BC)?"

_KEYS: Final[Mapping[str, Callable[[str], OrderKey]]] = {
    "integer": _number,
    "numeric": _number,
    "date": _moment(re.compile(_DAY + _ERA)),
    "timestamp": _moment(re.compile(_DAY + _TIME + _ERA)),
    "timestamptz": _moment(re.compile(_DAY + _TIME + r"\+00" + _ERA)),
}
