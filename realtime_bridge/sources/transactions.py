"""From pgoutput messages to transactions, and from transactions to the bodies of the history.

Two steps, since between them lies a wait: a transaction can be decoded before anyone can see it. The assembler gathers
what arrives, with bounded memory; the builder makes bodies of what has become visible, with the catalog as it is then.

Layer: adapters (without I/O). May import: words, pgoutput.
Sources: src/backend/replication/logical/{reorderbuffer,proto}.c; SnapBuildXactNeedsSkip for the meaning of a place.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from realtime_bridge.change import ABSENT, Body, Change, Control, Image, Relation, ResyncReason
from realtime_bridge.pgoutput import (
    Begin,
    Commit,
    Delete,
    Insert,
    PgoutputError,
    RelationMessage,
    Truncate,
    Update,
    decode,
    filled,
    relation_id,
)

TRANSACTION_BYTES: Final = 64 << 20
"""A transaction with more than this in its rows is told as `bulk`, however few they are."""

_ROW_KINDS: Final = frozenset(b"IUD")

RowMessage: TypeAlias = Insert | Update | Delete | Truncate


class Place(NamedTuple):
    """How far a reader has got; it means the same at every reading.

    Attributes:
        lsn: the reader has every transaction whose commit record starts before it,
        ordinal: and of the one that starts there so many row messages, whatever their tables.
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


def watermark_text(incarnation: str, place: Place) -> str:
    """The watermark that `parse_watermark` reads."""
    return f"{incarnation}|{place.lsn:x}|{place.ordinal}"


def parse_watermark(text: str) -> tuple[str, Place] | None:
    """Incarnation and place of a watermark; None if another kind of source wrote it."""
    incarnation, _, place = text.partition("|")
    lsn, _, ordinal = place.partition("|")
    try:
        return incarnation, Place(int(lsn, 16), int(ordinal))
    except ValueError:
        return None


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
        rows: empty once it is `bulk`.
        bulk: it was over the limit; then only its tables are known.
        descriptions: the distinct table descriptions that its rows refer to, by identity.
    """

    xid: int
    commit_lsn: int
    commit_time: int
    end_lsn: int = 0
    bulk: bool = False
    size: int = 0
    rows: list[Row] = field(default_factory=list)
    tables: dict[str, None] = field(default_factory=dict)
    descriptions: dict[int, RelationMessage] = field(default_factory=dict)

    def place(self, ordinal: int) -> str:
        """Where a row stood, for people."""
        return f"{lsn_text(self.commit_lsn)}:{ordinal} xid {self.xid}"


class Assembler:
    """Gathers messages into transactions; only the tables that are wanted cost memory.

    Args:
        tables: `schema.table` each.
        references: further tables that are wanted now; asked for every row, since they change.

    Attributes:
        ready: complete transactions with something to tell, oldest first. Whoever takes them bounds them.
        ready_rows: how many rows they have in all.
        ready_bytes: how many bytes those had on the wire.
        reached: every transaction whose commit record starts before this LSN has been received.
    """

    def __init__(
        self,
        tables: Collection[str],
        *,
        after: Place,
        transaction_rows: int,
        transaction_bytes: int = TRANSACTION_BYTES,
        references: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self.ready: deque[Transaction] = deque()
        self.ready_rows = 0
        self.ready_bytes = 0
        self.reached = after.lsn
        self._tables = frozenset(tables)
        self._after = after
        self._max_rows = transaction_rows
        self._max_bytes = transaction_bytes
        self._references = references
        self._relations: dict[int, tuple[RelationMessage, str]] = {}
        self._open: Transaction | None = None
        self._ordinal = 0

    def keepalive(self, wal_end: int) -> None:
        """The server has sent everything up to here; within a transaction that says nothing new."""
        if self._open is None:
            self.reached = max(self.reached, wal_end)

    def feed(self, data: bytes) -> None:
        """Take in one message.

        Raises:
            PgoutputError: it cannot be read, or does not belong here.
        """
        if data and data[0] in _ROW_KINDS:
            self._row(data)
            return
        match decode(data):
            case Begin() as begin:
                self._begin(begin)
            case Commit() as commit:
                self._commit(commit)
            case RelationMessage() as relation:
                self._relations[relation.id] = relation, f"{relation.schema}.{relation.table}"
            case Truncate() as truncate:
                self._ordinal += 1
                for oid in truncate.relation_ids:
                    self._collect(self._relation(oid), truncate, len(data))
            case _:
                pass  # origins, type names and messages of other programs say nothing about rows

    def take(self) -> Transaction:
        """Remove the oldest ready transaction."""
        transaction = self.ready.popleft()
        self.ready_rows -= len(transaction.rows)
        self.ready_bytes -= transaction.size
        return transaction

    def _begin(self, begin: Begin) -> None:
        if self._open is not None:
            raise PgoutputError("a transaction within a transaction")
        self._open = Transaction(begin.xid, begin.commit_lsn, begin.commit_time)
        self._ordinal = 0

    def _commit(self, commit: Commit) -> None:
        transaction = self._open
        if transaction is None:
            raise PgoutputError("a commit without a transaction")
        self._open = None
        transaction.end_lsn = commit.end_lsn
        self.reached = max(self.reached, commit.end_lsn)
        if transaction.rows or transaction.bulk:
            self.ready.append(transaction)
            self.ready_rows += len(transaction.rows)
            self.ready_bytes += transaction.size

    def _relation(self, oid: int) -> RelationMessage | None:
        """The description of a table that is wanted."""
        try:
            relation, name = self._relations[oid]
        except KeyError:
            raise PgoutputError(f"a row of table {oid}, which was not described") from None
        return relation if name in self._tables or name in self._references() else None

    def _row(self, data: bytes) -> None:
        self._ordinal += 1
        relation = self._relation(relation_id(data))
        if relation is None:
            return
        message = decode(data)
        assert isinstance(message, (Insert, Update, Delete))
        self._collect(relation, message, len(data))

    def _collect(self, relation: RelationMessage | None, message: RowMessage, size: int) -> None:
        transaction = self._open
        if transaction is None:
            raise PgoutputError("a row outside of a transaction")
        if relation is None or (transaction.commit_lsn, self._ordinal) <= self._after:
            return
        transaction.tables[f"{relation.schema}.{relation.table}"] = None
        if transaction.bulk:
            return
        transaction.rows.append(Row(self._ordinal, relation, message, size))
        transaction.descriptions[id(relation)] = relation
        transaction.size += size
        if len(transaction.rows) > self._max_rows or transaction.size > self._max_bytes:
            transaction.bulk = True
            transaction.rows.clear()
            transaction.descriptions.clear()
            transaction.size = 0


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
            elif isinstance(row.message, Insert) or table.identifies:
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
        if before is not None and before.relation != table.relation:
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


def _old_image(relation: Relation, old: Image) -> Image:
    """Under FULL the row; else its key, since pgoutput writes NULL for whatever it does not know."""
    if relation.full:
        return old
    return tuple(value if i in relation.key else ABSENT for i, value in enumerate(old))
