"""A logical replication connection: the protocol of the walsender, on libpq.

asyncpg cannot speak CopyBoth, so this is psycopg 3 at the level of `PGconn`. A timer keeps the server informed while
the reader is busy elsewhere, so that a slow broker does not end the stream.

Layer: adapters. May import: words, database, pgoutput, sources.transactions.
Sources: PostgreSQL documentation, "Streaming Replication Protocol"; libpq "Functions Associated with the COPY Command".
"""

import asyncio
import logging
import re
import time
from struct import Struct
from typing import Any, Final, NamedTuple, TypeAlias

import psycopg
from psycopg import AsyncClientCursor, AsyncConnection
from psycopg.conninfo import conninfo_to_dict
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus

from realtime_bridge.database import PINNED
from realtime_bridge.errors import SourceError
from realtime_bridge.pgoutput import POSTGRES_EPOCH
from realtime_bridge.sources.transactions import lsn_text, parse_lsn

logger = logging.getLogger(__name__)

CONNECT_SECONDS: Final = 10
_STATUS_SECONDS: Final = 2.0
_SILENCE_SECONDS: Final = 60.0
"""The server answers every request for a keepalive; after so long without a word the link is dead."""

_XLOG_DATA: Final = ord("w")
_KEEPALIVE: Final = ord("k")
_HEADER_BYTES: Final = 25
_KEEPALIVE_FRAME: Final = Struct("!xQqB")
_STATUS_FRAME: Final = Struct("!cQQQqB")

_STREAMED: Final = "proto_version '2', streaming 'on'"
"""Large transactions come while they run, so that the server does not have to keep them on its disk."""
_WHOLE: Final = "proto_version '1'"


class Data(NamedTuple):
    """One message of the output plugin."""

    payload: bytes


class Keepalive(NamedTuple):
    """Everything that ends at or before this LSN has been sent."""

    wal_end: int


Frame: TypeAlias = Data | Keepalive


class System(NamedTuple):
    """Who the server is: `id` is given once by initdb, `timeline` grows with every failover."""

    id: str
    timeline: int
    flushed: int


class UnpublishedError(SourceError):
    """What comes next was written while there was no such publication; until Postgres 17 nobody can read past it."""


class Replication:
    """An open replication connection; streaming once `start` has returned.

    Attributes:
        flushed: the LSN that the server is told not to need any more.
        pid: of the walsender.
    """

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._timer: asyncio.TimerHandle | None = None
        self._heard = time.monotonic()
        self.flushed = 0
        self.pid = self._pgconn.backend_pid

    async def identify(self) -> System:
        """Ask who the server is.

        Raises:
            psycopg.Error: what answers does not know the command: a pooler.
        """
        cursor = await self._connection.execute(b"IDENTIFY_SYSTEM")
        row = await cursor.fetchone()
        assert row is not None
        return System(str(row[0]), int(row[1]), parse_lsn(row[2]))

    async def start(self, slot: str, publication: str, after: int, *, confirmed: int) -> None:
        """Begin to stream what was committed at or after an LSN; `confirmed` is what the slot stands at.

        Large transactions come in blocks while they run, unless the server does not know how (before Postgres 14).

        Raises:
            psycopg.Error: the slot is in use, or cannot be read.
        """
        name = publication.replace('"', '""').replace("'", "''")
        command = f'START_REPLICATION SLOT "{slot}" LOGICAL {lsn_text(after)} (publication_names \'"{name}"\', '
        try:
            await self._connection.execute(f"{command}{_STREAMED})".encode())
        except psycopg.errors.ObjectInUse:
            raise
        except psycopg.Error as error:
            await self._connection.execute(f"{command}{_WHOLE})".encode())
            logger.info("large transactions come only after their commit", extra={"reason": reason_of(error)})
        self._heard = time.monotonic()
        self.flushed = confirmed
        self._tick()

    def receive(self) -> Frame | None:
        """The next frame if it is here already; never waits.

        Raises:
            UnpublishedError: the stream has ended, and from the same place it would end again.
            SourceError: the stream has ended, or has been silent for too long.
        """
        try:
            data = self._read() or self._read_more()
        except psycopg.errors.UndefinedObject as error:
            raise UnpublishedError(f"Postgres cannot decode what comes next: {reason_of(error)}") from error
        except psycopg.Error as error:
            raise SourceError(f"the replication connection was lost: {reason_of(error)}") from error
        if not data:
            if time.monotonic() - self._heard > _SILENCE_SECONDS:
                raise SourceError(f"Postgres has said nothing on the replication connection for {_SILENCE_SECONDS} s")
            return None
        self._heard = time.monotonic()
        return self._frame(data)

    async def wait(self, timeout: float) -> None:
        """Wait until something may have arrived, at most `timeout` seconds. Safe to cancel."""
        loop = asyncio.get_running_loop()
        readable = loop.create_future()
        socket = self._pgconn.socket

        def wake() -> None:
            loop.remove_reader(socket)  # what is not read at once would call again and again
            if not readable.done():
                readable.set_result(None)

        loop.add_reader(socket, wake)
        try:
            await asyncio.wait([readable], timeout=max(timeout, 0))
        finally:
            loop.remove_reader(socket)

    def send_status(self, *, request_reply: bool = False) -> None:
        """Tell the server what it may forget, and prove this end alive.

        Raises:
            SourceError: the connection is lost.
        """
        clock = int(time.time() * 1_000_000) - POSTGRES_EPOCH
        frame = _STATUS_FRAME.pack(b"r", self.flushed, self.flushed, self.flushed, clock, request_reply)
        try:
            self._pgconn.put_copy_data(frame)
            self._pgconn.flush()
        except psycopg.Error as error:
            raise SourceError(f"the replication connection was lost: {reason_of(error)}") from error

    async def close(self) -> None:
        """End the connection; never waits for the server."""
        if self._timer is not None:
            self._timer.cancel()
        await self._connection.close()

    def _tick(self) -> None:
        try:
            self.send_status()
        except SourceError:
            return  # whoever reads will meet the same
        self._timer = asyncio.get_running_loop().call_later(_STATUS_SECONDS, self._tick)

    def _read(self) -> memoryview | None:
        length, data = self._pgconn.get_copy_data(1)
        if length < 0:
            raise self._ending()
        return data if length else None

    def _read_more(self) -> memoryview | None:
        self._pgconn.consume_input()
        if self._pgconn.ssl_in_use:
            # A TLS record has up to 16 KiB, libpq reads at least 8 KiB of it; the rest makes no socket readable.
            self._pgconn.consume_input()
        return self._read()

    def _ending(self) -> psycopg.Error:
        """Why the server ended the stream."""
        if not self._pgconn.is_busy():
            result = self._pgconn.get_result()
            if result is not None and result.status == ExecStatus.FATAL_ERROR:
                return error_from_result(result)
        return psycopg.OperationalError("Postgres ended the stream")

    def _frame(self, data: memoryview) -> Frame:
        if data[0] == _XLOG_DATA and len(data) >= _HEADER_BYTES:
            return Data(bytes(data[_HEADER_BYTES:]))
        if data[0] == _KEEPALIVE and len(data) == _KEEPALIVE_FRAME.size:
            wal_end, _clock, reply = _KEEPALIVE_FRAME.unpack(data)
            if reply:
                self.send_status()
            return Keepalive(wal_end)
        raise SourceError("Postgres sent a replication frame that cannot be read")


async def connect(dsn: str, *, application_name: str) -> Replication:
    """A replication connection to the database; close it.

    Raises:
        psycopg.Error: the server refuses it, or cannot be reached.
    """
    given = conninfo_to_dict(dsn)
    pinned = " ".join(f"-c {name}={value}" for name, value in PINNED.items())
    connection = await AsyncConnection.connect(
        dsn,
        autocommit=True,
        cursor_factory=AsyncClientCursor,
        replication="database",
        application_name=application_name,
        client_encoding="UTF8",
        connect_timeout=int(given.get("connect_timeout") or CONNECT_SECONDS),
        options=f"{given.get('options') or ''} {pinned}".strip(),
    )
    return Replication(connection)


def reason_of(error: Exception) -> str:
    """What the server said, in one line."""
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
