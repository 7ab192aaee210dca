"""The stream of the `postgres` source: what has arrived, held back until it is visible, in bounded batches.

A decoded commit may not be visible yet: the walsender can be ahead of every snapshot, for minutes where a synchronous
standby is waited for. A transaction is given on only when a snapshot of the primary shows it, so that whatever is read
after an entry is at least as new as the entry.

Layer: adapters. May import: words, sources.*.
Sources: PostgreSQL documentation, "Streaming Replication Protocol"; ProcArrayEndTransaction and SyncRepWaitForLSN.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final, NamedTuple, Self

from realtime_bridge.change import Control
from realtime_bridge.errors import ConfigurationError, SourceError
from realtime_bridge.sources.assembler import Assembler
from realtime_bridge.sources.base import SourceBatch
from realtime_bridge.sources.postgres_catalog import Moment, Primary, translated
from realtime_bridge.sources.replication import Data, Replication
from realtime_bridge.sources.transactions import (
    BodyBuilder,
    Described,
    NamedTable,
    Place,
    Placed,
    Transaction,
    Watermark,
)

logger = logging.getLogger(__name__)

BATCH_BODIES: Final = 1000
BATCH_BYTES: Final = 1 << 20

_FRAMES_A_TURN: Final = 500
_IDLE_SECONDS: Final = 1.0
_FIRST_LOOK_SECONDS: Final = 0.001
_LONGEST_LOOK_SECONDS: Final = 0.25
_STALL_SECONDS: Final = 2.0
_VERIFY_SECONDS: Final = 5.0


class Start(NamedTuple):
    """Where a stream begins.

    Attributes:
        known: the watermark of the history; None where that says nothing of this slot.
        confirmed: what the slot has been told not to need any more.
        gap: it cannot be proven that this continues the history.
    """

    incarnation: str
    known: Watermark | None
    after: Place
    confirmed: int
    gap: bool


class _Proof(NamedTuple):
    """Once the stream has given on everything up to `written`, nothing committed before `time` is missing."""

    time: float
    written: int
    asked_at: float


class _Doubt(NamedTuple):
    """Of these tables changes were not published, or not read; told once everything up to `written` is given on.

    Attributes:
        xmax: transactions before this one may have begun while that was so.
        written: None while any of those goes on.
    """

    tables: frozenset[NamedTable]
    published: int
    xmax: int
    written: int | None = None


class PostgresStream:
    """An open `postgres` source; see `SourceStream`. Cancelling the iteration loses nothing."""

    def __init__(
        self,
        primary: Primary,
        replication: Replication,
        assembler: Assembler,
        start: Start,
        tables: Sequence[str],
        ask: Callable[[], Awaitable[Moment]],
        verify: Callable[[], Awaitable[None]],
    ) -> None:
        self._primary = primary
        self._replication = replication
        self._assembler = assembler
        self._start = start
        self._tables = tables
        self._ask = ask
        self._verify = verify
        self._builder = BodyBuilder()
        self._described: dict[str, Described] = {}
        self._rights: str | None = None
        self._outbox: deque[Placed] = deque()
        self._built = start.after
        self._given = start.after
        self._greeted = False
        self._published = None if start.known is None else start.known.published
        self._covered = frozenset[NamedTable]() if start.known is None else start.known.tables
        self._doubt: _Doubt | None = None
        self._proof: _Proof | None = None
        self._refusal: SourceError | None = None
        now = asyncio.get_running_loop().time()
        self._duties_at = now
        self._verify_at = now + _VERIFY_SECONDS
        self._look_at = now
        self._look_pause = _FIRST_LOOK_SECONDS
        self._hidden_since: float | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SourceBatch:
        if self._refusal is not None:
            raise self._refusal
        with translated():
            return await self._next()

    def acknowledge(self, acknowledge: int) -> None:
        """Let the slot forget everything up to here; sent within a second."""
        assert acknowledge <= self._given.lsn
        self._replication.flushed = max(self._replication.flushed, acknowledge)

    async def _next(self) -> SourceBatch:
        loop = asyncio.get_running_loop()
        if not self._greeted:
            await self._look_around()
            self._greeted = True
            return self._greeting()
        deadline = loop.time() + _IDLE_SECONDS
        while True:
            if self._outbox:
                return self._batch()
            if (doubt := self._doubt) is not None and doubt.written is not None and self._has_given(doubt.written):
                return self._confession(doubt)
            more = self._receive()
            now = loop.time()
            if self._assembler.ready and now >= self._look_at:
                await self._look()
                if self._outbox:
                    continue
            if now >= self._duties_at:
                await self._do_duties(now)
            if now >= deadline or self._refusal is not None or self._is_proven():
                return self._batch()
            if more:
                await asyncio.sleep(0)
            else:
                await self._replication.wait(self._next_time(deadline) - loop.time())

    def _next_time(self, deadline: float) -> float:
        times = (deadline, self._duties_at, self._look_at if self._assembler.ready else deadline)
        return min(times)

    # -- in ----------------------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Take in what has arrived; returns whether to come back at once for more.

        Nothing is read while enough waits to be visible: then the rest waits in the server.
        """
        assembler = self._assembler
        for _ in range(_FRAMES_A_TURN):
            if assembler.ready_rows >= BATCH_BODIES or assembler.ready_bytes >= BATCH_BYTES:
                return False
            frame = self._replication.receive()
            if frame is None:
                return False
            if isinstance(frame, Data):
                assembler.feed(frame.payload)
            else:
                assembler.keepalive(frame.wal_end)
        return True

    # -- until visible -----------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Build what is visible by now; with nothing visible, look again later, and later still."""
        loop = asyncio.get_running_loop()
        moment = await self._look_around()
        shown = await self._build_visible(moment)
        now = loop.time()
        if shown:
            self._look_pause = _FIRST_LOOK_SECONDS
            self._hidden_since = None
            self._look_at = now
            return
        if self._hidden_since is None:
            self._hidden_since = now
        self._look_at = now + self._look_pause
        self._look_pause = min(self._look_pause * 2, _LONGEST_LOOK_SECONDS)

    async def _look_around(self) -> Moment:
        """Ask the primary how it stands. Where tables are not published, or were not for a time, it proves nothing."""
        asked_at = time.time()
        moment = await self._ask()
        published = self._published
        if published is None:
            # Whatever began before the newest of them may have been written while something was not published.
            published = self._published = min(max(moment.published.values(), default=0), moment.snapshot.xmin - 1)
            self._covered = frozenset(moment.published)
        there = {(table.name, table.oid) for table in moment.published}
        self._covered = frozenset(table for table in self._covered if (table.name, table.oid) in there)
        self._assembler.names = {table.oid: table.name for table in moment.published}
        doubtful = frozenset(
            table for table, since in moment.published.items() if since > published or table not in self._covered
        )
        if doubtful:
            self._suspect(doubtful, max(moment.published.values()), moment)
            self._proof = None
            return moment
        self._doubt = None
        if self._proof is None and {table.name for table in moment.published} >= set(self._tables):
            # Where the clocks differ, the earlier time is true by either.
            self._proof = _Proof(min(moment.time, asked_at), moment.written, asyncio.get_running_loop().time())
        return moment

    def _suspect(self, tables: frozenset[NamedTable], published: int, moment: Moment) -> None:
        """Begin to doubt, or go on: a doubt that is the same stays, however often it is met before it is told."""
        doubt = self._doubt
        if doubt is None or (doubt.tables, doubt.published) != (tables, published):
            doubt = _Doubt(tables, published, moment.snapshot.xmax)
        if doubt.written is None and moment.snapshot.xmin >= doubt.xmax:
            doubt = doubt._replace(written=moment.written)
        self._doubt = doubt

    def _excuse(self, told: set[str], moment: Moment) -> None:
        """Tables that are to be read again anyway, as after a TRUNCATE, need not be so because of another file, too."""
        former = {(table.name, table.oid) for table in self._covered}
        excused = {t for t in moment.published if t.name in told and t not in self._covered and t[:2] in former}
        self._cover(excused)
        if self._doubt is not None:
            left = self._doubt.tables - excused
            self._doubt = self._doubt._replace(tables=left) if left else None

    def _cover(self, tables: Collection[NamedTable]) -> None:
        names = {table.name for table in tables}
        self._covered = frozenset(table for table in self._covered if table.name not in names) | frozenset(tables)

    async def _build_visible(self, moment: Moment) -> bool:
        """Build the oldest transactions, as far as the snapshot shows them.

        Before them goes a `catalog` control if rights have changed: pgoutput describes a table anew only before its
        next row, so not for rows that the same transaction wrote earlier, and for some changes never (rights on a
        schema or to a role, policies of a partitioned table).
        """
        ready = self._assembler.ready
        shown = False
        while ready and moment.snapshot.shows(ready[0].xid) and len(self._outbox) < BATCH_BODIES:
            described = await self._describe(ready[0])
            if moment.rights != self._rights:
                if self._rights is not None:  # at first, every table is announced before its first row
                    self._outbox.append(self._builder.rights_changed(ready[0]))
                self._rights = moment.rights
            transaction = self._assembler.take()
            bodies = self._builder.build(transaction, described)
            told = {p.body.table for p in bodies if isinstance(p.body, Control) and p.body.kind == "resync"}
            if told:
                self._excuse(told, moment)
            self._outbox.extend(bodies)
            self._built = Place(transaction.end_lsn, 0)
            shown = True
        return shown

    async def _describe(self, transaction: Transaction) -> dict[int, Described]:
        """The transaction's tables with what the catalog says, now that whatever it did to the catalog is visible."""
        answer: dict[int, Described] = {}
        for key, message in transaction.descriptions.items():
            name = f"{message.schema}.{message.table}"
            known = self._described.get(name)
            if known is None or known.by is not message:
                known = self._described[name] = await self._primary.describe(message)
            answer[key] = known
        return answer

    # -- out ---------------------------------------------------------------------------------------------------------

    def _greeting(self) -> SourceBatch:
        """The first batch: says where this stream begins, and whether before that something is missing."""
        gap = (Control("resync", "*", "upstream_gap"),) if self._start.gap else ()
        watermark = self._watermark(self._given)
        return SourceBatch(gap, (watermark,) * len(gap), watermark, self._given.lsn)

    def _confession(self, doubt: _Doubt) -> SourceBatch:
        """The batch that tells of changes that were not published: whoever reads the tables behind it has them all."""
        self._doubt, self._published = None, doubt.published
        self._cover(doubt.tables)
        tables = sorted(table.name for table in doubt.tables)
        logger.warning("tables are read anew, and what was not is told as a gap", extra={"tables": ",".join(tables)})
        watermark = self._watermark(self._given)
        gaps = tuple(Control("resync", table, "upstream_gap") for table in tables)
        return SourceBatch(gaps, (watermark,) * len(gaps), watermark, self._given.lsn)

    def _batch(self) -> SourceBatch:
        """What is built, as much as one batch holds; perhaps nothing but how far the stream has got."""
        placed: list[Placed] = []
        size = 0
        while self._outbox and len(placed) < BATCH_BODIES and size < BATCH_BYTES:
            placed.append(self._outbox.popleft())
            size += placed[-1].size
        if self._outbox:
            self._given = placed[-1].place
        elif self._assembler.ready:
            self._given = self._built
        else:
            self._given = max(self._built, Place(self._assembler.reached, 0))
        proven = self._proof.time if self._proof is not None and self._is_proven() else None
        if proven is not None:
            self._proof = None
        return SourceBatch(
            tuple(p.body for p in placed),
            tuple(self._watermark(p.place) for p in placed),
            self._watermark(self._given),
            self._given.lsn,
            proven,
        )

    def _watermark(self, place: Place) -> str:
        return str(Watermark(self._start.incarnation, self._published or 0, place, self._covered))

    # -- proof and other duties --------------------------------------------------------------------------------------

    def _is_proven(self) -> bool:
        """Whether all that the proof is about is given on."""
        return self._proof is not None and self._has_given(self._proof.written)

    def _has_given(self, written: int) -> bool:
        """Whether the stream has given on, or has nothing to give on of, everything up to an LSN."""
        if self._outbox:
            return False
        reached = self._built.lsn if self._assembler.ready else self._assembler.reached
        return reached >= written

    async def _do_duties(self, now: float) -> None:
        """Once a second: acknowledge, ask how far the server has got, and see that nothing stands still unnoticed."""
        self._duties_at = now + _IDLE_SECONDS
        if self._proof is None:
            await self._look_around()
        elif now - self._proof.asked_at > _STALL_SECONDS:
            await self._primary.flush(self._proof.written)
        self._replication.send_status(request_reply=True)
        if self._hidden_since is not None and now - self._hidden_since > _STALL_SECONDS:
            await self._refuse_to_be_waited_for()
        if now >= self._verify_at:
            self._verify_at = now + _VERIFY_SECONDS
            await self._verify_publication()

    async def _verify_publication(self) -> None:
        """Refuse to go on if it lacks something, but not before a watermark says so: what is back then is doubted."""
        try:
            await self._verify()
        except ConfigurationError as error:
            self._refusal = SourceError(str(error))
            await self._look_around()

    async def _refuse_to_be_waited_for(self) -> None:
        if await self._primary.is_synchronous_standby(self._replication.pid):
            raise SourceError(
                "synchronous_standby_names makes commits wait for the bridge, which itself waits for them to be "
                "visible; name the standbys there (`*` takes every replication connection)"
            )
