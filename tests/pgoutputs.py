"""Messages of pgoutput, as Postgres writes them."""

import struct

from realtime_bridge.change import Image

POSTS, NOTES = 7, 8


def begin(lsn: int, xid: int = 1) -> bytes:
    return b"B" + struct.pack("!QqI", lsn, 0, xid)


def commit(lsn: int) -> bytes:
    return b"C" + struct.pack("!BQQq", 0, lsn, lsn + 10, 0)


def relation(oid: int, name: str, identity: str = "d") -> bytes:
    columns = b"\1id\0" + struct.pack("!Ii", 20, -1) + b"\0title\0" + struct.pack("!Ii", 25, -1)
    return b"R" + struct.pack("!I", oid) + b"public\0" + name.encode() + b"\0" + identity.encode() + b"\0\2" + columns


def row(image: Image) -> bytes:
    data = struct.pack("!H", len(image))
    for value in image:
        if isinstance(value, str):
            data += b"t" + struct.pack("!I", len(value)) + value.encode()
        else:
            data += b"n" if value is None else b"u"
    return data


def insert(key: str, oid: int = POSTS) -> bytes:
    return b"I" + struct.pack("!I", oid) + b"N" + row((key, "x"))


def delete(key: str) -> bytes:
    return b"D" + struct.pack("!I", POSTS) + b"K" + row((key, None))


def update(old: Image | None, new: Image, tag: bytes = b"K") -> bytes:
    before = b"" if old is None else tag + row(old)
    return b"U" + struct.pack("!I", POSTS) + before + b"N" + row(new)


def truncate(*oids: int) -> bytes:
    return b"T" + struct.pack("!IB", len(oids), 0) + b"".join(struct.pack("!I", oid) for oid in oids)


def stream_start(xid: int, *, first: bool = True) -> bytes:
    return b"S" + struct.pack("!IB", xid, first)


def stream_commit(xid: int, lsn: int) -> bytes:
    return b"c" + struct.pack("!IBQQq", xid, 0, lsn, lsn + 10, 0)


def stream_abort(xid: int, subxid: int) -> bytes:
    return b"A" + struct.pack("!II", xid, subxid)


def within(xid: int, message: bytes) -> bytes:
    """The message as it is within a block, where it names the (sub)transaction that wrote it."""
    return message[:1] + struct.pack("!I", xid) + message[1:]


STREAM_STOP = b"E"
DESCRIPTIONS = [relation(POSTS, "posts"), relation(NOTES, "notes")]
