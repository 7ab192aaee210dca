"""Payloads of Supabase Realtime read into changes, each once and, within a row, never an older one behind a newer.

A payload has neither number nor LSN. What is known of its place is the commit's time: two changes of one row are
committed one after the other, since the second waits for the first one's lock.

Layer: adapters. May import: change, sources.supabase_texts.
Sources: PostgresChangesPayload of realtime 2.34.1; realtime.apply_rls (supabase/walrus).
"""

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, TypeAlias

from realtime_bridge.change import ABSENT, Body, Change, Column, Control, Image, Relation, Value
from realtime_bridge.sources.supabase_texts import to_text

Keys: TypeAlias = Callable[[str], Awaitable[Sequence[str]]]
"""Asks for the names of the primary key's columns of `schema.table`; empty if it has none. A `BridgeError` that it
raises ends the stream."""

REPEAT_SECONDS: Final = 60.0
REPEAT_CHANGES: Final = 10_000
"""For so long, and at most so many changes, it is known what was told."""


class PayloadReader:
    """Makes bodies of payloads, and remembers what it has learned of each table."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys
        self._relations: dict[str, Relation] = {}
        self._identities: dict[str, frozenset[str]] = {}
        self._order = RowOrder()

    async def read(self, data: Mapping[str, Any]) -> list[Body]:
        """Read the `data` of a `postgres_changes` payload: the change, unless it was told before.

        A `catalog` control goes before it where the table has changed, or more is known of it.

        Raises:
            ArithmeticError, LookupError, TypeError, ValueError: it cannot be understood, lacks its key, or is older
                than what was told of its row.
        """
        columns = tuple(Column(c["name"], c["type"]) for c in data["columns"])
        record, old_record = data.get("record"), data.get("old_record")
        known = self._relations.get(f"{data['schema']}.{data['table']}")
        relation = await self._relation(data["schema"], data["table"], columns, old_record)
        operation = data["type"].value
        if operation not in ("INSERT", "UPDATE", "DELETE"):
            raise ValueError("an unknown operation")
        change = Change(
            operation=operation,
            relation=relation,
            old=_image(relation, old_record) if old_record else None,
            new=None if operation == "DELETE" else _image(relation, record or {}),
            commit_time=parse_timestamp(data["commit_timestamp"]),
            place=f"supabase {data['commit_timestamp']}",
        )
        row = change.old if change.new is None else change.new
        if row is None or ABSENT in relation.key_of(row):
            raise ValueError("a row without its key")
        bodies: list[Body] = [change] if not relation.key or self._order.admit(change) else []
        self._relations[relation.name] = relation  # last, so that what fails is no news to have told
        if known not in (None, relation):
            bodies.insert(0, Control("catalog", relation.name, commit_time=change.commit_time))
        return bodies

    async def _relation(
        self, schema: str, table: str, columns: tuple[Column, ...], old_record: Mapping[str, Any] | None
    ) -> Relation:
        name = f"{schema}.{table}"
        known = self._relations.get(name)
        present = {column.name for column in columns}
        if self._keys is not None:
            if known is not None and known.columns == columns:
                return known
            identity = frozenset(await self._keys(name))
        else:
            if old_record and old_record.keys() < present:
                self._identities[name] = frozenset(old_record)
            identity = self._identities.get(name, frozenset({"id"} & present))
        key = tuple(i for i, column in enumerate(columns) if column.name in identity)
        return Relation(schema, table, columns, key, full=False)


class _Told(NamedTuple):
    """The newest change told of a row: its commit time and digest, and when by the monotonic clock it was told."""

    commit_time: int
    digest: int
    at: float


class RowOrder:
    """Knows what was told of each row lately, in bounded memory; rows are kept as digests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._newest: OrderedDict[int, _Told] = OrderedDict()
        self._told: OrderedDict[int, float] = OrderedDict()

    def admit(self, change: Change) -> bool:
        """Whether a change is to be told; False for one that was.

        Of two changes with the same time nobody knows which came first (one transaction can delete a row and make the
        same again): only a repeat right behind its like is left out. A second telling of both ends as the first did.

        Raises:
            ValueError: it is older than what was told of its row, and was never told itself. Told now, it would stand
                as the newest; so there may be a gap, or a clock that was set back.
        """
        now = self._clock()
        rows = {hash((change.relation.name, key)) for key in _keys(change)}
        digest = hash((change.operation, change.commit_time, change.old, change.new))
        known = [told for row in rows if (told := self._newest.get(row)) and now - told.at < REPEAT_SECONDS]
        if any(told.digest == digest for told in known):
            return False
        place = hash((*sorted(rows), digest))
        if any(told.commit_time > change.commit_time for told in known):
            if now - self._told.get(place, -REPEAT_SECONDS) < REPEAT_SECONDS:
                return False
            raise ValueError("older than what was told of its row")
        for row in rows:
            _put(self._newest, row, _Told(change.commit_time, digest, now))
        _put(self._told, place, now)
        return True


def _keys(change: Change) -> set[tuple[Value, ...]]:
    """The row's key, and its former one if that has changed."""
    keys = {change.relation.key_of(image) for image in (change.old, change.new) if image is not None}
    return {key for key in keys if ABSENT not in key}


def _put(known: OrderedDict[int, Any], name: int, value: object) -> None:
    known[name] = value
    known.move_to_end(name)
    if len(known) > REPEAT_CHANGES:
        known.popitem(last=False)


def parse_timestamp(text: str) -> int:
    """An ISO 8601 time with an offset as microseconds since 1970.

    Raises:
        ValueError: it is none.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without an offset")
    return (moment - datetime.fromisoformat("1970-01-01T00:00:00Z")) // timedelta(microseconds=1)


def _image(relation: Relation, record: Mapping[str, Any]) -> Image:
    return tuple(to_text(c.type, record[c.name]) if c.name in record else ABSENT for c in relation.columns)
