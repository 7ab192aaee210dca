"""From pgoutput messages to committed transactions, with bounded memory.

A transaction comes whole after its commit, or in blocks while it runs, with several under way at a time. Either way it
is given on only when its commit is here, in the order of the commits. One that is too large is not held: which tables
it touched is all that is told of it.

What is held says nothing about what the server may forget: that never passes a commit which is still to come, and
after a reconnect the server sends whatever had not ended by then again, from its first row.

Layer: adapters (without I/O). May import: words, pgoutput, sources.transactions.
Sources: src/backend/replication/logical/reorderbuffer.c for what is sent of (sub)transactions, and in which order;
maybe_send_schema and cleanup_rel_sync_cache in src/backend/replication/pgoutput/pgoutput.c for when a table is
described again.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from realtime_bridge.pgoutput import (
    Begin,
    Commit,
    Delete,
    Insert,
    Message,
    PgoutputError,
    RelationMessage,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
    Truncate,
    Update,
    decode,
    relation_id,
    split,
)
from realtime_bridge.sources.transactions import Place, Row, RowMessage, Transaction

TRANSACTION_BYTES: Final = 64 << 20
"""A transaction that holds more than this is told as `bulk`, however few its rows are."""

_ROW_BYTES: Final = 300
"""About what a row costs besides its bytes on the wire."""
_RUN_BYTES: Final = 300
"""About what it costs to know which subtransaction wrote some rows."""

_ROW_KINDS: Final = frozenset(b"IUD")


class _Table(NamedTuple):
    """A table as it was described. `order`: how many descriptions came before this one, of whatever table."""

    described: RelationMessage
    name: str
    order: int


@dataclass(slots=True)
class _Run:
    """Row messages that one (sub)transaction wrote without another one between them.

    Attributes:
        count: how many, whatever their tables; 0 once they are rolled back.
        rows: those that are wanted. Their ordinals count from the beginning of the run.
    """

    subxid: int
    count: int = 0
    rows: list[Row] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(row.size + _ROW_BYTES for row in self.rows)


class _OpenTransaction:
    """A transaction that has not ended, as far as it has been sent.

    An ordinal counts the rows that get committed, since these are the same however often, and in whichever way, a
    transaction is sent. So rows are gathered by who wrote them, and numbered at the end.

    Attributes:
        relations: the tables as they are described to it.
        streamed: it is sent in blocks.
        bulk: it is over a bound, and holds nothing but its tables. One whose rows are rolled back after that stays
            among them: whoever reads it again for nothing is still right afterwards.
        tables: of a `bulk` one, those that are wanted.
        unwanted: further tables that it touched.
        count: rows that it holds.
        size: about how many bytes these cost.
    """

    def __init__(self, xid: int, relations: dict[int, _Table], *, streamed: bool) -> None:
        self.xid = xid
        self.relations = relations
        self.streamed = streamed
        self.bulk = False
        self.tables: dict[str, None] = {}
        self.unwanted: set[str] = set()
        self.count = 0
        self.size = 0
        self._runs: list[_Run] = []
        self._runs_by: dict[int, list[_Run]] = {}

    def advance(self, subxid: int) -> None:
        """The next row message is here; `add` follows for each table of it that is wanted."""
        if self.bulk:
            return
        if not self._runs or self._runs[-1].subxid != subxid:
            self._runs.append(_Run(subxid))
            self._runs_by.setdefault(subxid, []).append(self._runs[-1])
            self.size += _RUN_BYTES
        self._runs[-1].count += 1

    def add(self, table: _Table, message: RowMessage, size: int) -> None:
        """Hold the row message; not for `bulk` ones."""
        run = self._runs[-1]
        run.rows.append(Row(run.count, table.described, message, size))
        self.count += 1
        self.size += size + _ROW_BYTES

    def roll_back(self, subxid: int) -> None:
        """What a subtransaction wrote has not happened.

        Nor, perhaps, has the shape in which tables were described to it: the server describes all anew, each before its
        next row.
        """
        for run in self._runs_by.pop(subxid, ()):
            self.count -= len(run.rows)
            self.size -= run.size
            run.count = 0
            run.rows.clear()
        self.relations.clear()

    def give_up(self) -> None:
        """Hold nothing but the tables from now on."""
        self.bulk = True
        self.tables.update((_name(row.described_by), None) for run in self._runs for row in run.rows)
        self._runs.clear()
        self._runs_by.clear()
        self.count = self.size = 0

    def committed(self, commit: Commit | StreamCommit, after: Place) -> Transaction:
        """The transaction, as far as it lies behind a place."""
        transaction = Transaction(self.xid, commit.commit_lsn, commit.commit_time, commit.end_lsn)
        if self.bulk and commit.commit_lsn >= after.lsn:
            transaction.bulk = True
            transaction.tables = self.tables
        before = 0
        for run in self._runs:
            rows = [row._replace(ordinal=before + row.ordinal) for row in run.rows] if before else run.rows
            transaction.rows += [row for row in rows if (commit.commit_lsn, row.ordinal) > after]
            before += run.count
        for row in transaction.rows:
            transaction.size += row.size
            transaction.descriptions[id(row.described_by)] = row.described_by
        return transaction


class Assembler:
    """Gathers messages into transactions; only the tables that are wanted cost memory.

    Args:
        tables: `schema.table` each.
        transaction_rows: what one transaction may hold.
        transaction_bytes: what one may hold, and all those together that are sent in blocks: if they hold more at the
            end of a block, the largest of them is told as `bulk`.
        references: further tables that are wanted now; asked for every row, since they change. What was not wanted
            when it came and is at the commit cannot be told row by row any more: then the transaction is `bulk`.

    Attributes:
        names: oid → table, of those that are wanted, as they were last seen in the catalog. A row of one that goes by
            another name makes the transaction `bulk`: it may be named back before anyone looks.
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
        self.names: Mapping[int, str] = {}
        self.ready: deque[Transaction] = deque()
        self.ready_rows = 0
        self.ready_bytes = 0
        self.reached = after.lsn
        self._tables = frozenset(tables)
        self._after = after
        self._max_rows = transaction_rows
        self._max_bytes = transaction_bytes
        self._references = references
        self._relations: dict[int, _Table] = {}
        self._described = 0
        self._open: _OpenTransaction | None = None  # the one that messages belong to now
        self._streams: dict[int, _OpenTransaction] = {}

    @property
    def held_bytes(self) -> int:
        """About how much the transactions hold that are sent in blocks and have not ended."""
        return sum(transaction.size for transaction in self._streams.values())

    def keepalive(self, wal_end: int) -> None:
        """The server has sent everything up to here; within a transaction, or a block, that says nothing new."""
        if self._open is None:
            self.reached = max(self.reached, wal_end)

    def feed(self, data: bytes) -> None:
        """Take in one message.

        Raises:
            PgoutputError: it cannot be read, or does not belong here.
        """
        subxid = 0
        if self._open is not None and self._open.streamed:
            subxid, data = split(data)
        if data and data[0] in _ROW_KINDS:
            self._row(subxid, data)
            return
        match decode(data):
            case RelationMessage() as described:
                self._describe(described)
            case Truncate() as truncate:
                self._truncate(subxid, truncate, len(data))
            case message:
                self._delimit(message)

    def take(self) -> Transaction:
        """Remove the oldest ready transaction."""
        transaction = self.ready.popleft()
        self.ready_rows -= len(transaction.rows)
        self.ready_bytes -= transaction.size
        return transaction

    # -- where transactions and blocks begin and end -----------------------------------------------------------------

    def _delimit(self, message: Message) -> None:
        match message:
            case Begin():
                self._enter(_OpenTransaction(message.xid, self._relations, streamed=False))
            case Commit():
                self._complete(self._leave(streamed=False), message)
            case StreamStart():
                self._enter(self._stream(message))
            case StreamStop():
                self._leave(streamed=True)
                self._limit_streams()
            case StreamCommit():
                self._commit_stream(message)
            case StreamAbort():
                self._abort_stream(message)
            case _:
                pass  # origins, type names and messages of other programs say nothing about rows

    def _enter(self, transaction: _OpenTransaction) -> None:
        self._refuse_within()
        self._open = transaction

    def _leave(self, *, streamed: bool) -> _OpenTransaction:
        transaction = self._open
        if transaction is None or transaction.streamed != streamed:
            raise PgoutputError("an end without its beginning")
        self._open = None
        return transaction

    def _refuse_within(self) -> None:
        if self._open is not None:
            raise PgoutputError("a transaction within a transaction")

    def _stream(self, start: StreamStart) -> _OpenTransaction:
        if start.first == (start.xid in self._streams):
            raise PgoutputError("a block that does not continue what came before")
        if start.first:
            self._streams[start.xid] = _OpenTransaction(start.xid, {}, streamed=True)
        return self._streams[start.xid]

    def _limit_streams(self) -> None:
        while self.held_bytes > self._max_bytes:
            max(self._streams.values(), key=lambda transaction: transaction.size).give_up()

    def _commit_stream(self, commit: StreamCommit) -> None:
        self._refuse_within()
        transaction = self._streams.pop(commit.xid, None)
        if transaction is None:
            raise PgoutputError("a commit of a transaction that was not sent")
        # The server takes these descriptions for known from now on, as far as it has given no newer ones.
        for oid, table in transaction.relations.items():
            known = self._relations.get(oid)
            if known is None or known.order < table.order:
                self._relations[oid] = table
        self._complete(transaction, commit)

    def _abort_stream(self, abort: StreamAbort) -> None:
        self._refuse_within()
        if abort.subxid == abort.xid:
            self._streams.pop(abort.xid, None)
        elif abort.xid in self._streams:
            self._streams[abort.xid].roll_back(abort.subxid)

    def _complete(self, transaction: _OpenTransaction, commit: Commit | StreamCommit) -> None:
        missed = [name for name in transaction.unwanted if self._is_wanted(name)]
        if missed:
            transaction.give_up()
            transaction.tables.update(dict.fromkeys(missed))
        self.reached = max(self.reached, commit.end_lsn)
        complete = transaction.committed(commit, self._after)
        if complete.rows or complete.tables:
            self.ready.append(complete)
            self.ready_rows += len(complete.rows)
            self.ready_bytes += complete.size

    # -- what they hold ----------------------------------------------------------------------------------------------

    def _describe(self, described: RelationMessage) -> None:
        self._described += 1
        relations = self._relations if self._open is None else self._open.relations
        relations[described.id] = _Table(described, _name(described), self._described)

    def _row(self, subxid: int, data: bytes) -> None:
        transaction = self._advanced(subxid)
        table = self._wanted(transaction, relation_id(data))
        if table is not None and not transaction.bulk:
            transaction.add(table, _read(data, table), len(data))
        self._limit(transaction)

    def _truncate(self, subxid: int, truncate: Truncate, size: int) -> None:
        transaction = self._advanced(subxid)
        for oid in truncate.relation_ids:
            table = self._wanted(transaction, oid)
            if table is not None and not transaction.bulk:
                transaction.add(table, truncate, size)
        self._limit(transaction)

    def _advanced(self, subxid: int) -> _OpenTransaction:
        """The transaction that messages belong to now, with one more row message."""
        if self._open is None:
            raise PgoutputError("a row outside of a transaction")
        self._open.advance(subxid)
        return self._open

    def _wanted(self, transaction: _OpenTransaction, oid: int) -> _Table | None:
        """The table, if it is wanted; noted, if its rows are not held."""
        table = transaction.relations.get(oid)
        if table is None:
            raise PgoutputError(f"a row of table {oid}, which was not described")
        if not self._is_wanted(table.name):
            transaction.unwanted.add(self.names.get(oid, table.name))
            return None
        if transaction.bulk:
            transaction.tables[table.name] = None
        return table

    def _is_wanted(self, name: str) -> bool:
        return name in self._tables or name in self._references()

    def _limit(self, transaction: _OpenTransaction) -> None:
        if transaction.count > self._max_rows or transaction.size > self._max_bytes:
            transaction.give_up()


def _name(described: RelationMessage) -> str:
    return f"{described.schema}.{described.table}"


def _read(data: bytes, table: _Table) -> Insert | Update | Delete:
    """A row, if it has the columns that its table was described with."""
    message = decode(data)
    assert isinstance(message, (Insert, Update, Delete))
    image = message.old if isinstance(message, Delete) else message.new
    if len(image) != len(table.described.columns):
        raise PgoutputError(f"{len(image)} columns in a row of a table with {len(table.described.columns)}")
    return message
