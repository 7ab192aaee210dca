"""Source → broker, while this process holds the lease.

Layer: core. May import: words, sources.base, broker.base, rows, seeding, repair, rights.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn

from realtime_bridge.broker.base import Broker
from realtime_bridge.errors import BridgeError, BrokerError, ConfigurationError, ForkError, LeaseLostError
from realtime_bridge.repair import Repairer, RepairLimits, RepairState
from realtime_bridge.rights import Rights, RightsState, RightsTeller
from realtime_bridge.rows import IndexState, RowIndex
from realtime_bridge.seeding import Seeder
from realtime_bridge.sources.base import Source, SourceBatch, SourceStream, TableReader

if TYPE_CHECKING:
    from realtime_bridge.sources.supabase_canary import Canary

logger = logging.getLogger(__name__)

ACKNOWLEDGE_AFTER_SECONDS: Final = 5.0
"""How far the acknowledgement trails the append: what a failover of the broker loses within it can be read again."""
APPEND_MOST: Final = 500
_BACKOFF_FIRST: Final = 0.25
_BACKOFF_MOST: Final = 10.0


@dataclass
class IngestState:
    """What ingest is doing, for `/readyz` and metrics.

    Attributes:
        leading: this process holds the lease.
        reading: the source is open, and what it tells is appended.
        problem: the newest reason why that is not so, for people; empty while all is well.
        appended: entries appended by this process.
    """

    leading: bool = False
    reading: bool = False
    problem: str = ""
    appended: int = 0
    restarts: int = 0
    batch_at: float = field(default=0.0)
    rows: IndexState = field(default_factory=IndexState)
    rights: RightsState = field(default_factory=RightsState)
    repair: RepairState = field(default_factory=RepairState)


class Ingest:
    """Copies changes from the source into the broker whenever this process leads.

    Args:
        reader: of the tables, for rows that have not changed yet, and for changes that may have been missed.
        tables: `schema.table` each.
        limits: of what is read back.
        rights: by which this process decides what is seen.
        canary: written while this process leads, for a source that hears of it.
        ttl: seconds for which the lease holds without being extended.
        namespace: with the fencing token, the name by which a successor recognises this reader.
    """

    def __init__(
        self,
        source: Source,
        broker: Broker,
        reader: TableReader,
        *,
        rights: Rights,
        tables: Sequence[str],
        limits: RepairLimits,
        namespace: str,
        ttl: float,
        canary: "Canary | None" = None,
    ) -> None:
        self.state = IngestState()
        self._source = source
        self._broker = broker
        self._reader = reader
        self._rights = rights
        self._tables = tables
        self._limits = limits
        self._namespace = namespace
        self._ttl = ttl
        self._canary = canary

    @property
    def problem(self) -> str:
        """Why nothing can be proven, as far as it is known here; for people, empty while all is well."""
        of_canary = self._canary.problem if self._canary is not None else ""
        return "; ".join(filter(None, (self.state.problem, of_canary)))

    async def run(self) -> NoReturn:
        """Wait for the lease, copy while it holds, and begin again, until cancelled.

        Every failure is logged once and answered by waiting with backoff and full jitter. Where it was the broker's,
        that is never long: somebody has to lead soon after it has come back.
        """
        backoff = _BACKOFF_FIRST
        while True:
            started = time.monotonic()
            most = _BACKOFF_MOST
            try:
                await self._lead()
            except BridgeError as error:
                self._report(error)
                if isinstance(error, BrokerError | ForkError | LeaseLostError):
                    most = self._ttl / 3
            if time.monotonic() - started > _BACKOFF_MOST:
                backoff = _BACKOFF_FIRST
            await asyncio.sleep(random.uniform(0, min(backoff, most)))
            backoff = min(backoff * 2, _BACKOFF_MOST)

    async def _lead(self) -> None:
        waiting_since = time.monotonic()
        token = await self._broker.acquire_lease(ttl=self._ttl)
        if time.monotonic() - waiting_since > _BACKOFF_MOST:
            self.state.problem = ""  # another has led meanwhile
        rows = RowIndex(self._broker, self._tables, self.state.rows, is_lossy=self._source.is_lossy)
        seeder = Seeder(self._broker, self._reader, rows, self._tables, self.state.rows, token)
        repairer = Repairer(self._broker, self._reader, rows, self._limits, self.state.repair, token)
        teller = RightsTeller(self._broker, self._rights, rows, self.state.rights, token)
        self.state.leading = True
        if not self.state.problem:
            logger.info("leading", extra={"token": token})
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._broker.keep_lease(token, ttl=self._ttl), name="lease")
                tasks.create_task(self._copy(token, rows, repairer), name="copy")
                tasks.create_task(seeder.run(), name="seed")
                tasks.create_task(repairer.run(), name="repair")
                tasks.create_task(teller.run(), name="rights")
                if self._canary is not None:
                    tasks.create_task(self._canary.run(), name="canary")
        except* BridgeError as group:
            raise _first(group) from group
        finally:
            self.state.leading = self.state.reading = False
            self.state.rows = IndexState(unknown=self.state.rows.unknown)
            await self._release(token)

    async def _release(self, token: str) -> None:
        try:
            await self._broker.release_lease(token)
        except BrokerError:
            logger.warning("lease not released, it runs out by itself", extra={"token": token})

    async def _copy(self, token: str, rows: RowIndex, repairer: Repairer) -> None:
        after = await self._broker.watermark()
        owner = f"{self._namespace}/{token}"
        async with self._source.open(after, owner=owner) as stream:
            trail = _Trail(stream)
            async for batch in stream:
                await self._append(token, batch, rows, repairer)
                self._note_success(token, batch)
                rows.begun.set()
                self.state.batch_at = time.time()
                trail.note(batch.acknowledge)

    async def _append(self, token: str, batch: SourceBatch, rows: RowIndex, repairer: Repairer) -> None:
        """Append a batch, and have repaired what is in doubt behind it; until that is done, nothing is proven."""
        count = len(batch.bodies)
        if not (count or batch.watermark or batch.doubts or batch.proven_until is not None):
            return
        end, is_last = 0, False
        while not is_last:
            async with rows.turn:
                run, untold = repairer.sift(batch.bodies[end : end + APPEND_MOST])
                end += len(run)
                watermark, proven_until = (batch.watermarks[end - 1] if end else ""), None
                is_last = end == count
                if is_last:
                    watermark = batch.watermark or watermark
                    proven_until = None if batch.doubts or rows.touched else batch.proven_until
                bodies, changes = await rows.complete(run)
                await self._broker.append(token, bodies, watermark=watermark, proven_until=proven_until, rows=changes)
                if untold is not None:
                    repairer.doubt([untold])
                    end += 1
            self.state.appended += len(bodies)
        repairer.doubt(batch.doubts)
        if batch.proven_until is not None:
            repairer.prove(batch.proven_until)

    def _note_success(self, token: str, batch: SourceBatch) -> None:
        """A batch is appended. All is well with the first that held more than where the source begins."""
        if self.state.reading or (not batch.bodies and batch.proven_until is None):
            return
        self.state.reading, self.state.problem = True, ""
        logger.info("reading the source", extra={"source": self._source.name, "token": token})

    def _report(self, error: BridgeError) -> None:
        """Log a failure, unless it goes on: then neither it nor what each try begins with is logged again."""
        self.state.restarts += 1
        if isinstance(error, LeaseLostError | ForkError):
            logger.warning("stopped leading", extra={"reason": str(error)})
            return
        if str(error) != self.state.problem:
            level = logging.ERROR if isinstance(error, ConfigurationError) else logging.WARNING
            logger.log(level, "cannot read the source", extra={"reason": str(error)})
        self.state.problem = str(error)


class _Trail:
    """Acknowledges the source `ACKNOWLEDGE_AFTER_SECONDS` behind the append."""

    def __init__(self, stream: SourceStream) -> None:
        self._stream = stream
        self._pending: deque[tuple[float, int]] = deque()

    def note(self, acknowledge: int | None) -> None:
        """Called after every append; at least once a second, since a source yields that often."""
        now = time.monotonic()
        # One note in a quarter of a second is enough, and bounds what is kept.
        if acknowledge is not None and (not self._pending or now - self._pending[-1][0] > 0.25):
            self._pending.append((now, acknowledge))
        while self._pending and now - self._pending[0][0] >= ACKNOWLEDGE_AFTER_SECONDS:
            self._stream.acknowledge(self._pending.popleft()[1])


def _first(group: BaseExceptionGroup[BridgeError]) -> BridgeError:
    """The error that says most: a lost lease explains whatever came with it."""
    errors = [_first(error) if isinstance(error, BaseExceptionGroup) else error for error in group.exceptions]
    return next((e for e in errors if isinstance(e, LeaseLostError)), errors[0])
