"""Compares rows as they were told, which the row index holds without long texts, with rows as they stand.

Layer: core. May import: words, canonical, policy.ordering, rows.
"""

import orjson

from realtime_bridge.canonical import family
from realtime_bridge.change import ABSENT, Image, Relation, Value
from realtime_bridge.policy.ordering import OrderKey, is_ordered, order_key
from realtime_bridge.rows import is_left_out


def differs(relation: Relation, column: str, told: Image, row: Image) -> bool:
    """Whether a row as it stands may be another than the one that was told, which the index has without long texts."""
    now = short(row)
    pairs = zip(relation.columns, told, now, strict=True)
    return any(not _is_same(c.type, before, after) for c, before, after in pairs) or (
        ABSENT in now and now[relation.index[column]] in (None, ABSENT)
    )


def is_older(relation: Relation, column: str, one: Image, other: Image) -> bool:
    """Whether a row's repair column says that it is older than another; False if it cannot tell."""
    before, after = (version(relation, column, row) for row in (one, other))
    return bool(before and after) and before < after


def version(relation: Relation, column: str, row: Image) -> OrderKey:
    """What compares as a row's repair column does; empty if that says nothing."""
    text, type_ = row[relation.index[column]], family(relation.columns[relation.index[column]].type)
    if not isinstance(text, str) or type_ is None or not is_ordered(type_):
        return ()
    try:
        return order_key(type_, text)
    except ValueError:
        return ()


def _is_same(type_: str, one: Value, other: Value) -> bool:
    """Whether two texts are of one value: a source that speaks JSON writes some otherwise than Postgres does."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    try:
        if type_ in ("json", "jsonb"):
            return _canonical_json(one) == _canonical_json(other)
        if type_ in ("numeric", "float4", "float8"):
            return float(one) == float(other)
        return is_ordered(type_) and order_key(type_, one) == order_key(type_, other)
    except ValueError:
        return False


def _canonical_json(text: str) -> bytes:
    return orjson.dumps(orjson.loads(text), option=orjson.OPT_SORT_KEYS)


def short(row: Image) -> Image:
    """A row without the texts that the row index leaves out."""
    return tuple(ABSENT if is_left_out(value) else value for value in row)
