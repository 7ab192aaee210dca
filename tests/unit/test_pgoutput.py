"""The decoder reads what Postgres documents, and refuses everything else with one error."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.change import ABSENT, Image
from realtime_bridge.pgoutput import (
    POSTGRES_EPOCH,
    Begin,
    Commit,
    Delete,
    Insert,
    LogicalMessage,
    Origin,
    PgoutputError,
    RelationColumn,
    RelationMessage,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
    Truncate,
    TypeMessage,
    Update,
    decode,
    filled,
    relation_id,
    split,
)
from tests.pgoutputs import STREAM_STOP, stream_abort, stream_commit, stream_start, within


def row(image: Image) -> bytes:
    parts = [struct.pack("!H", len(image))]
    for value in image:
        if value is None:
            parts.append(b"n")
        elif value is ABSENT:
            parts.append(b"u")
        else:
            data = value.encode()
            parts.append(b"t" + struct.pack("!I", len(data)) + data)
    return b"".join(parts)


def relation(oid: int = 7, *, schema: str = "public", identity: str = "d") -> bytes:
    columns = b"\1id\0" + struct.pack("!Ii", 20, -1) + b"\0title\0" + struct.pack("!Ii", 25, -1)
    head = b"R" + struct.pack("!I", oid) + schema.encode() + b"\0posts\0" + identity.encode()
    return head + struct.pack("!H", 2) + columns


OID = struct.pack("!I", 7)
IMAGES = st.lists(st.one_of(st.none(), st.just(ABSENT), st.text()), max_size=8).map(tuple)


def test_begin_and_commit_carry_places_and_unix_time() -> None:
    assert decode(b"B" + struct.pack("!QqI", 100, 5, 771)) == Begin(100, POSTGRES_EPOCH + 5, 771)
    assert decode(b"C" + struct.pack("!BQQq", 0, 100, 148, 5)) == Commit(100, 148, POSTGRES_EPOCH + 5)


def test_a_relation_names_its_columns_and_identity() -> None:
    columns = (RelationColumn("id", 20, -1, True), RelationColumn("title", 25, -1, False))
    assert decode(relation(identity="f")) == RelationMessage(7, "public", "posts", "f", columns)


def test_an_empty_schema_is_pg_catalog() -> None:
    message = decode(relation(schema=""))
    assert isinstance(message, RelationMessage)
    assert message.schema == "pg_catalog"
    assert decode(b"Y" + OID + b"\0mood\0") == TypeMessage(7, "pg_catalog", "mood")


@given(IMAGES)
def test_rows_survive_the_wire(image: Image) -> None:
    assert decode(b"I" + OID + b"N" + row(image)) == Insert(7, image)
    assert decode(b"D" + OID + b"O" + row(image)) == Delete(7, image, whole=True)
    assert decode(b"D" + OID + b"K" + row(image)) == Delete(7, image, whole=False)
    assert decode(b"U" + OID + b"N" + row(image)) == Update(7, None, False, image)
    assert decode(b"U" + OID + b"K" + row(image) + b"N" + row(image)) == Update(7, image, False, image)
    assert decode(b"U" + OID + b"O" + row(image) + b"N" + row(image)) == Update(7, image, True, image)


def test_the_table_of_a_row_is_known_without_decoding_it() -> None:
    assert relation_id(b"I" + OID + b"N" + row(("1",))) == 7
    with pytest.raises(PgoutputError):
        relation_id(b"I\0\0")


def test_the_rarer_messages_are_read() -> None:
    assert decode(b"O" + struct.pack("!Q", 9) + b"elsewhere\0") == Origin(9, "elsewhere")
    assert decode(b"T" + struct.pack("!IB", 2, 3) + OID + OID) == Truncate((7, 7), True, True)
    content = b"M" + struct.pack("!BQ", 1, 9) + b"app\0" + struct.pack("!I", 2) + b"hi"
    assert decode(content) == LogicalMessage(True, 9, "app", b"hi")


def test_what_bounds_a_streamed_transaction_is_read() -> None:
    assert decode(stream_start(771)) == StreamStart(771, first=True)
    assert decode(stream_start(771, first=False)) == StreamStart(771, first=False)
    assert decode(STREAM_STOP) == StreamStop()
    assert decode(stream_commit(771, 100)) == StreamCommit(771, 100, 110, POSTGRES_EPOCH)
    assert decode(stream_abort(771, 772)) == StreamAbort(771, 772)


@pytest.mark.parametrize(
    "message", [b"I" + OID + b"N" + row(("1",)), relation(), b"T" + struct.pack("!IB", 1, 0) + OID]
)
def test_a_message_within_a_block_is_one_that_names_its_transaction(message: bytes) -> None:
    assert split(within(771, message)) == (771, message)
    with pytest.raises(PgoutputError):
        split(within(771, message)[:4])


def test_a_message_that_never_names_its_transaction_is_left_as_it_is() -> None:
    for message in (STREAM_STOP, b"O" + bytes(9), b""):
        assert split(message) == (0, message)


def test_an_unchanged_large_value_takes_the_value_of_the_old_row() -> None:
    assert filled(("1", ABSENT, None), ("1", "large", "old")) == ("1", "large", None)
    assert filled(("1", ABSENT), ("1", ABSENT)) == ("1", ABSENT)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"?",
        b"S" + bytes(4),
        b"E\0",
        b"c" + bytes(28),
        b"A" + bytes(16),  # with LSN and time, as in version 4
        b"B",
        b"I" + OID + b"K" + row(("1",)),
        b"I" + OID + b"N" + row(("1",)) + b"more",
        b"I" + OID + b"N" + row(("1",))[:-1],
        b"I" + OID + b"N\0\1b\0\0\0\1x",  # the binary form was not asked for
        b"I" + OID + b"N\0\1t\0\0\0\1\xff",
        b"U" + OID + b"X" + row(("1",)),
        b"U" + OID + b"K" + row(("1",)) + b"N" + row(("1", "2")),
        b"D" + OID + b"N" + row(("1",)),
        b"T" + struct.pack("!IB", 2, 0) + OID,
        b"Y" + OID + b"no end",
    ],
)
def test_what_is_not_a_message_is_refused(data: bytes) -> None:
    with pytest.raises(PgoutputError):
        decode(data)


@given(st.sampled_from(b"BCSEcAORYIUDTM?"), st.binary())
def test_random_bytes_raise_one_error_only(kind: int, rest: bytes) -> None:
    with contextlib.suppress(PgoutputError):
        decode(bytes([kind]) + rest)


@given(IMAGES, st.data())
def test_a_cut_message_is_never_read(image: Image, data: st.DataObject) -> None:
    whole = b"U" + OID + b"O" + row(image) + b"N" + row(image)
    with pytest.raises(PgoutputError):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])
