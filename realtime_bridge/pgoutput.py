"""Decoder of pgoutput, the messages of logical replication, protocol versions 1 and 2.

Version 1 sends whole transactions after their commit. Version 2 also sends large ones in blocks while they are still
running, with several under way at a time, each of which may yet be rolled back, whole or in part. Values stay text; an
unchanged large value is `ABSENT`, not NULL. Every byte must be accounted for: what does not fit is an error, never a
guess, since a misread row could be shown to the wrong user.

Layer: pure. May import: errors, change.
Sources: PostgreSQL documentation, "Logical Replication Message Formats"; src/backend/replication/logical/proto.c.
"""

from collections.abc import Callable
from struct import Struct
from struct import error as StructError  # noqa: N812 - the class is lower case in the standard library
from typing import Final, NamedTuple, TypeAlias

from realtime_bridge.change import ABSENT, Image, Value
from realtime_bridge.errors import SourceError

POSTGRES_EPOCH: Final = 946_684_800_000_000
"""Microseconds from 1970 to 2000, where Postgres' clock begins."""

_U16: Final = Struct("!H")
_U32: Final = Struct("!I")
_U64: Final = Struct("!Q")
_BEGIN: Final = Struct("!QqI")
_COMMIT: Final = Struct("!BQQq")
_COLUMN: Final = Struct("!Ii")
_TRUNCATE: Final = Struct("!IB")
_MESSAGE: Final = Struct("!BQ")
_STREAM_START: Final = Struct("!IB")
_STREAM_COMMIT: Final = Struct("!IBQQq")
_STREAM_ABORT: Final = Struct("!II")

_ABSENT_TAG: Final = ord("u")
_NULL_TAG: Final = ord("n")
_TEXT_TAG: Final = ord("t")

_OLD_KEY: Final = ord("K")
_OLD_ROW: Final = ord("O")
_NEW_ROW: Final = ord("N")

_NAMED_IN_BLOCKS: Final = frozenset(b"RYIUDTM")


class PgoutputError(SourceError):
    """The bytes are not a message of pgoutput. The only error that this module raises."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"Postgres sent a replication message that cannot be read: {reason}")


class Begin(NamedTuple):
    """A committed transaction begins.

    Attributes:
        commit_lsn: where its commit record starts.
        commit_time: microseconds since 1970 in UTC.
        xid: without its epoch.
    """

    commit_lsn: int
    commit_time: int
    xid: int


class Commit(NamedTuple):
    """The transaction is complete; `end_lsn` is where its commit record ends: no later one's starts before."""

    commit_lsn: int
    end_lsn: int
    commit_time: int


class StreamStart(NamedTuple):
    """A block of a transaction that has not ended yet. `first`: nothing of it was sent before."""

    xid: int
    first: bool


class StreamStop(NamedTuple):
    """The block ends, the transaction goes on."""


class StreamCommit(NamedTuple):
    """A transaction that was sent in blocks is complete; the rest as in `Commit`."""

    xid: int
    commit_lsn: int
    end_lsn: int
    commit_time: int


class StreamAbort(NamedTuple):
    """What was sent under one of a transaction's ids was rolled back: all of it, if that is its own."""

    xid: int
    subxid: int


class Origin(NamedTuple):
    """The transaction was replicated from elsewhere."""

    lsn: int
    name: str


class RelationColumn(NamedTuple):
    """A published column. `identity`: part of the replica identity."""

    name: str
    type_id: int
    modifier: int
    identity: bool


class RelationMessage(NamedTuple):
    """A table as it is for the rows that follow; sent again whenever its cached description was dropped.

    Attributes:
        identity: `pg_class.relreplident`: d(efault), n(othing), f(ull), i(ndex).
    """

    id: int
    schema: str
    table: str
    identity: str
    columns: tuple[RelationColumn, ...]


class TypeMessage(NamedTuple):
    """The name of a type that is not built in."""

    id: int
    schema: str
    name: str


class Insert(NamedTuple):
    """A new row."""

    relation_id: int
    new: Image


class Update(NamedTuple):
    """A changed row.

    Attributes:
        old: None if the replica identity's columns did not change.
        whole: `old` was sent as a whole row, not as a key in which other columns are NULL.
    """

    relation_id: int
    old: Image | None
    whole: bool
    new: Image


class Delete(NamedTuple):
    """A removed row. `whole` as in `Update`."""

    relation_id: int
    old: Image
    whole: bool


class Truncate(NamedTuple):
    """Emptied tables."""

    relation_ids: tuple[int, ...]
    cascade: bool
    restart_identity: bool


class LogicalMessage(NamedTuple):
    """Written by `pg_logical_emit_message`."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


Message: TypeAlias = (
    Begin
    | Commit
    | StreamStart
    | StreamStop
    | StreamCommit
    | StreamAbort
    | Origin
    | RelationMessage
    | TypeMessage
    | Insert
    | Update
    | Delete
    | Truncate
    | LogicalMessage
)


def decode(data: bytes) -> Message:
    """Decode one message: the payload of an XLogData frame, or what `split` makes of it.

    Raises:
        PgoutputError: it is of an unknown kind, cut short, too long, or not UTF-8.
    """
    if not data:
        raise PgoutputError("it is empty")
    decoder = _DECODERS.get(data[0])
    if decoder is None:
        raise PgoutputError(f"unknown kind {data[:1]!r}")
    try:
        message, end = decoder(data)
    except (StructError, IndexError, UnicodeDecodeError, ValueError) as error:
        raise PgoutputError(f"kind {data[:1]!r}: {error}") from error
    if end != len(data):
        raise PgoutputError(f"kind {data[:1]!r}: {len(data)} bytes long, {end} expected")
    return message


def split(data: bytes) -> tuple[int, bytes]:
    """Take a message within a block apart: the (sub)transaction that wrote it, and the message as outside of blocks.

    The transaction is 0 for messages that never name theirs.

    Raises:
        PgoutputError: the message is cut short.
    """
    if not data or data[0] not in _NAMED_IN_BLOCKS:
        return 0, data
    if len(data) < 5:
        raise PgoutputError(f"kind {data[:1]!r}: cut short")
    return int.from_bytes(data[1:5], "big"), data[:1] + data[5:]


def relation_id(data: bytes) -> int:
    """The table of an encoded Insert, Update or Delete, without decoding the row.

    Raises:
        PgoutputError: the message is cut short.
    """
    if len(data) < 5:
        raise PgoutputError(f"kind {data[:1]!r}: cut short")
    return int.from_bytes(data[1:5], "big")


def filled(new: Image, old: Image) -> Image:
    """The new row with its unchanged large values taken from the whole old one."""
    if ABSENT not in new:
        return new
    return tuple(before if value is ABSENT else value for value, before in zip(new, old, strict=True))


# -- one decoder a kind: each returns the message and where it ends --------------------------------------------------


def _string(data: bytes, start: int) -> tuple[str, int]:
    end = data.index(0, start)
    return data[start:end].decode(), end + 1


def _row(data: bytes, position: int) -> tuple[Image, int]:
    (count,) = _U16.unpack_from(data, position)
    position += 2
    size = len(data)
    values: list[Value] = []
    for _ in range(count):
        tag = data[position]
        position += 1
        if tag == _TEXT_TAG:
            (length,) = _U32.unpack_from(data, position)
            start = position + 4
            position = start + length
            if position > size:
                raise ValueError("a value is cut short")
            values.append(data[start:position].decode())
        elif tag == _NULL_TAG:
            values.append(None)
        elif tag == _ABSENT_TAG:
            values.append(ABSENT)
        else:
            raise ValueError(f"unknown form of a value {bytes([tag])!r}")
    return tuple(values), position


def _begin(data: bytes) -> tuple[Message, int]:
    commit_lsn, time, xid = _BEGIN.unpack_from(data, 1)
    return Begin(commit_lsn, time + POSTGRES_EPOCH, xid), 1 + _BEGIN.size


def _commit(data: bytes) -> tuple[Message, int]:
    _flags, commit_lsn, end_lsn, time = _COMMIT.unpack_from(data, 1)
    return Commit(commit_lsn, end_lsn, time + POSTGRES_EPOCH), 1 + _COMMIT.size


def _stream_start(data: bytes) -> tuple[Message, int]:
    xid, first = _STREAM_START.unpack_from(data, 1)
    return StreamStart(xid, bool(first)), 1 + _STREAM_START.size


def _stream_stop(_data: bytes) -> tuple[Message, int]:
    return StreamStop(), 1


def _stream_commit(data: bytes) -> tuple[Message, int]:
    xid, _flags, commit_lsn, end_lsn, time = _STREAM_COMMIT.unpack_from(data, 1)
    return StreamCommit(xid, commit_lsn, end_lsn, time + POSTGRES_EPOCH), 1 + _STREAM_COMMIT.size


def _stream_abort(data: bytes) -> tuple[Message, int]:
    return StreamAbort(*_STREAM_ABORT.unpack_from(data, 1)), 1 + _STREAM_ABORT.size


def _origin(data: bytes) -> tuple[Message, int]:
    (lsn,) = _U64.unpack_from(data, 1)
    name, end = _string(data, 9)
    return Origin(lsn, name), end


def _relation(data: bytes) -> tuple[Message, int]:
    (oid,) = _U32.unpack_from(data, 1)
    schema, position = _string(data, 5)
    table, position = _string(data, position)
    identity = chr(data[position])
    (count,) = _U16.unpack_from(data, position + 1)
    position += 3
    columns = []
    for _ in range(count):
        flags = data[position]
        name, position = _string(data, position + 1)
        type_id, modifier = _COLUMN.unpack_from(data, position)
        position += _COLUMN.size
        columns.append(RelationColumn(name, type_id, modifier, bool(flags & 1)))
    return RelationMessage(oid, schema or "pg_catalog", table, identity, tuple(columns)), position


def _type(data: bytes) -> tuple[Message, int]:
    (oid,) = _U32.unpack_from(data, 1)
    schema, position = _string(data, 5)
    name, position = _string(data, position)
    return TypeMessage(oid, schema or "pg_catalog", name), position


def _insert(data: bytes) -> tuple[Message, int]:
    (oid,) = _U32.unpack_from(data, 1)
    if data[5] != _NEW_ROW:
        raise ValueError("no new row")
    new, end = _row(data, 6)
    return Insert(oid, new), end


def _update(data: bytes) -> tuple[Message, int]:
    (oid,) = _U32.unpack_from(data, 1)
    tag = data[5]
    old: Image | None = None
    position = 6
    if tag in (_OLD_KEY, _OLD_ROW):
        old, position = _row(data, position)
        position += 1
    if data[position - 1] != _NEW_ROW:
        raise ValueError("no new row")
    new, end = _row(data, position)
    if old is not None and len(old) != len(new):
        raise ValueError("the old and the new row differ in length")
    return Update(oid, old, tag == _OLD_ROW, new), end


def _delete(data: bytes) -> tuple[Message, int]:
    (oid,) = _U32.unpack_from(data, 1)
    if data[5] not in (_OLD_KEY, _OLD_ROW):
        raise ValueError("no old row")
    old, end = _row(data, 6)
    return Delete(oid, old, data[5] == _OLD_ROW), end


def _truncate(data: bytes) -> tuple[Message, int]:
    count, flags = _TRUNCATE.unpack_from(data, 1)
    start = 1 + _TRUNCATE.size
    end = start + 4 * count
    if end > len(data):
        raise ValueError("the list of tables is cut short")
    oids = tuple(oid for (oid,) in _U32.iter_unpack(data[start:end]))
    return Truncate(oids, bool(flags & 1), bool(flags & 2)), end


def _message(data: bytes) -> tuple[Message, int]:
    flags, lsn = _MESSAGE.unpack_from(data, 1)
    prefix, position = _string(data, 1 + _MESSAGE.size)
    (length,) = _U32.unpack_from(data, position)
    start = position + 4
    return LogicalMessage(bool(flags & 1), lsn, prefix, data[start : start + length]), start + length


_DECODERS: Final[dict[int, Callable[[bytes], tuple[Message, int]]]] = {
    ord("B"): _begin,
    ord("C"): _commit,
    ord("S"): _stream_start,
    ord("E"): _stream_stop,
    ord("c"): _stream_commit,
    ord("A"): _stream_abort,
    ord("O"): _origin,
    ord("R"): _relation,
    ord("Y"): _type,
    ord("I"): _insert,
    ord("U"): _update,
    ord("D"): _delete,
    ord("T"): _truncate,
    ord("M"): _message,
}
