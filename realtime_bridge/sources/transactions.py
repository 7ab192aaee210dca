"""Committed transactions, where they stand, and what they become in the history.

Gathering them from messages is one step (`sources.assembler`), making bodies of them another, since between the two
lies a wait: a transaction can be decoded before anyone can see it. Bodies are made of what has become visible, with the
catalog as it is then.

Layer: adapters (without I/O). May import: words, pgoutput.
Sources: src/backend/replication/logical/proto.c; SnapBuildXactNeedsSkip for the meaning of a place.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

from realtime_bridge.change import ABSENT, Body, Change, Control, Image, Relation, ResyncReason
from realtime_bridge.pgoutput import Delete, Insert, RelationMessage, Truncate, Update, filled

RowMessage: TypeAlias = Insert | Update | Delete | Truncate


class Place(NamedTuple):
    """How far a reader has got; it means the same at every reading.

    Attributes:
        lsn: the reader has every transaction whose commit record starts before it,
        ordinal: and of the one that starts there so many row messages, whatever their tables, of those that were
            not rolled back.
    """

    lsn: int
    ordinal: int


def lsn_text(lsn: int) -> str:
    """An LSN as Postgres writes it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    """An LSN from Postgres' text."""
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


class NamedTable(NamedTuple):
    """A table, as `schema.table`, and which one it was that had the name.

    Attributes:
        file: where its rows are: another one if all were rewritten, or removed. That of a partitioned table is 0.
    """

    name: str
    oid: int
    file: int


class Watermark(NamedTuple):
    """How far the history has got with this source.

    Attributes:
        incarnation: of what was read; places in another one say nothing of this one.
        published: the newest transaction that put any table into the publication as it was when it was read.
        tables: those of which the history has all up to this place, or has been told that it has not.
    """

    incarnation: str
    published: int
    place: Place
    tables: frozenset[NamedTable] = frozenset()

    def __str__(self) -> str:
        place = f"{self.place.lsn:x}|{self.place.ordinal}"
        return f"{self.incarnation}|{self.published:x}|{place}|{_tables_text(self.tables)}"

    @classmethod
    def parse(cls, text: str) -> "Watermark | None":
        """Read a text; None if another kind of source wrote it. Former versions named no tables."""
        try:
            incarnation, published, lsn, ordinal, *rest = text.split("|", 4)
            tables = json.loads(rest[0]) if rest else ()
            named = frozenset(NamedTable(str(name), int(oid), int(file)) for name, oid, file in tables)
            return cls(incarnation, int(published, 16), Place(int(lsn, 16), int(ordinal)), named)
        except (ValueError, TypeError):
            return None


@lru_cache(maxsize=8)
def _tables_text(tables: frozenset[NamedTable]) -> str:
    """One text for the many watermarks of the same tables."""
    return json.dumps(sorted(tables), separators=(",", ":"))


class Row(NamedTuple):
    """One row message, with the table as it was described for it and its size on the wire."""

    ordinal: int
    described_by: RelationMessage
    message: RowMessage
    size: int


@dataclass(slots=True)
class Transaction:
    """A committed transaction, as far as it concerns the configured tables.

    Attributes:
        bulk: it was over a bound; then it has no rows, only tables.
        size: bytes that the rows had on the wire.
        tables: only if it is `bulk`.
        descriptions: the distinct table descriptions that its rows refer to, by identity.
    """

    xid: int
    commit_lsn: int
    commit_time: int
    end_lsn: int
    bulk: bool = False
    size: int = 0
    rows: list[Row] = field(default_factory=list)
    tables: dict[str, None] = field(default_factory=dict)
    descriptions: dict[int, RelationMessage] = field(default_factory=dict)

    def place(self, ordinal: int) -> str:
        """Where a row stood, for people."""
        return f"{lsn_text(self.commit_lsn)}:{ordinal} xid {self.xid}"


@dataclass(frozen=True, slots=True)
class Described:
    """A table's description together with what only the catalog knows.

    Attributes:
        identifies: old images hold the primary key whenever it, or a row, was lost. Not so if the replica identity
            is an index over other columns.
    """

    by: RelationMessage
    relation: Relation
    identifies: bool


class Placed(NamedTuple):
    """A body, with the place of a reader that has it, and its approximate size in bytes."""

    body: Body
    place: Place
    size: int


_CONTROL_BYTES: Final = 128


class BodyBuilder:
    """Makes bodies of visible transactions, and announces each description of a table before its first row.

    pgoutput describes a table anew whenever its policies, grants or columns changed, so a new description means: read
    the catalog again. A control stands at the place before its row: it may come twice, and is never skipped.
    """

    def __init__(self) -> None:
        self._announced: dict[str, Described] = {}

    def build(self, transaction: Transaction, described: Mapping[int, Described]) -> list[Placed]:
        """The bodies of a transaction.

        Args:
            transaction: visible to every snapshot from now on.
            described: for each of its `descriptions`, by the same keys.
        """
        if transaction.bulk:
            return [self._control(transaction, 0, table, "bulk") for table in transaction.tables]
        bodies: list[Placed] = []
        doubtful: set[str] = set()
        for row in transaction.rows:
            table = described[id(row.described_by)]
            bodies += self._announce(transaction, row, table)
            name = table.relation.name
            if isinstance(row.message, Truncate):
                bodies.append(self._control(transaction, row.ordinal - 1, name, "truncated"))
            elif isinstance(row.message, Insert) or (table.identifies and _has_key(row.message.old, table.relation)):
                bodies.append(_change(transaction, row, row.message, table.relation))
            elif name not in doubtful:
                doubtful.add(name)
                bodies.append(self._control(transaction, row.ordinal - 1, name, "upstream_gap"))
        return bodies

    @staticmethod
    def rights_changed(transaction: Transaction) -> Placed:
        """What goes before a transaction if policies, grants or roles have changed by the time it is visible."""
        ordinal = transaction.rows[0].ordinal - 1 if transaction.rows else 0
        where = transaction.place(ordinal)
        body = Control("catalog", "*", commit_time=transaction.commit_time, place=where)
        return Placed(body, Place(transaction.commit_lsn, ordinal), _CONTROL_BYTES)

    def _announce(self, transaction: Transaction, row: Row, table: Described) -> list[Placed]:
        name = table.relation.name
        before = self._announced.get(name)
        if before is not None and before.by is row.described_by:
            return []
        self._announced[name] = table
        catalog = Control(
            "catalog", name, commit_time=transaction.commit_time, place=transaction.place(row.ordinal - 1)
        )
        place = Place(transaction.commit_lsn, row.ordinal - 1)
        announcement = [Placed(catalog, place, _CONTROL_BYTES)]
        is_another = before is not None and before.by.id != table.by.id  # of the same name
        if before is not None and (is_another or before.relation != table.relation):
            announcement.append(self._control(transaction, row.ordinal - 1, name, "schema_changed"))
        return announcement

    @staticmethod
    def _control(transaction: Transaction, ordinal: int, table: str, reason: ResyncReason) -> Placed:
        where = transaction.place(ordinal)
        body = Control("resync", table, reason, commit_time=transaction.commit_time, place=where)
        return Placed(body, Place(transaction.commit_lsn, ordinal), _CONTROL_BYTES)


def _change(transaction: Transaction, row: Row, message: Insert | Update | Delete, relation: Relation) -> Placed:
    time, where = transaction.commit_time, transaction.place(row.ordinal)
    if isinstance(message, Insert):
        change = Change("INSERT", relation, None, message.new, time, where)
    elif isinstance(message, Delete):
        change = Change("DELETE", relation, _old_image(relation, message.old), None, time, where)
    else:
        old = None if message.old is None else _old_image(relation, message.old)
        new = message.new if old is None else filled(message.new, old)
        change = Change("UPDATE", relation, old, new, time, where)
    return Placed(change, Place(transaction.commit_lsn, row.ordinal), row.size)


def _has_key(old: Image | None, relation: Relation) -> bool:
    """Not so in what a partition has sent whose own identity was another one when the row was written."""
    return old is None or all(old[i] is not None for i in relation.key)


def _old_image(relation: Relation, old: Image) -> Image:
    """Under FULL the row; else its key, since pgoutput writes NULL for whatever it does not know."""
    if relation.full:
        return old
    return tuple(value if i in relation.key else ABSENT for i, value in enumerate(old))
