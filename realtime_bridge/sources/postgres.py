"""The `postgres` source: an own logical replication slot, streamed as it is written.

Nothing is lost across restarts: the slot keeps what was not acknowledged, and the watermark says what the history has.
The slot is also the second fence after the lease: only one connection can read it, and a new leader ends the one of a
former leader of its own namespace.

Layer: adapters. May import: words, sources.*.
Sources: PostgreSQL documentation, "Logical Decoding" and "Streaming Replication Protocol".
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import psycopg

from realtime_bridge.errors import ConfigurationError, SourceError
from realtime_bridge.sources.assembler import Assembler
from realtime_bridge.sources.postgres_catalog import (
    Moment,
    Primary,
    SlotState,
    SlotStatus,
    connected,
    slot_status,
    translated,
)
from realtime_bridge.sources.postgres_stream import PostgresStream, Start
from realtime_bridge.sources.publication import ensure_publication, publication_repairs
from realtime_bridge.sources.replication import Replication, System, UnpublishedError, connect, reason_of
from realtime_bridge.sources.transactions import Place, Watermark, lsn_text

__all__ = ["PostgresSource", "SlotStatus", "ensure_publication", "slot_status"]

logger = logging.getLogger(__name__)

_TAKEOVER_SECONDS: Final = 10.0
_FIRST_RETRY_SECONDS: Final = 0.01
_LONGEST_RETRY_SECONDS: Final = 0.5
_NAME_BYTES: Final = 63
"""Postgres cuts an application_name there."""


class PostgresSource:
    """Changes from an own replication slot of a Postgres primary.

    The publication has to exist and to carry all tables (`ensure_publication`); the slot is made if it is missing.

    Args:
        references: further tables whose changes are wanted at the moment, as far as the publication carries them.
    """

    name = "postgres"
    is_lossy = False

    def __init__(
        self,
        dsn: str,
        *,
        slot: str,
        publication: str,
        tables: Sequence[str],
        transaction_rows: int = 10_000,
        references: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        self._dsn = dsn
        self._slot = slot
        self._publication = publication
        self._tables = tuple(tables)
        self._transaction_rows = transaction_rows
        self._references = references
        self._started: Start | None = None

    async def check(self) -> None:
        """Prove that everything is there; makes nothing, not even the slot.

        Raises:
            SourceError: it cannot be read now.
            ConfigurationError: it can never be read like this.
        """
        async with connected(self._dsn) as primary:
            with translated():
                await self._refuse_unpublished(primary)
                state = await primary.slot(self._slot)
            if state is not None:
                self._refuse_foreign_slot(state)
            async with self._replicating(primary, "realtime_bridge check"):
                pass

    @asynccontextmanager
    async def open(self, after: str | None, *, owner: str) -> AsyncIterator[PostgresStream]:
        """Begin to read; see `Source.open`."""
        async with connected(self._dsn) as primary:
            with translated():
                await self._refuse_unpublished(primary)
                created = await self._own_slot(primary)
            async with self._replicating(primary, owner) as (replication, system):
                with translated():
                    start = await self._start(primary, replication, system, after, owner)
                if after is not None and (created or start.gap):
                    start = start._replace(gap=True)
                self._report(start, replication.pid)
                assembler = Assembler(
                    self._tables,
                    after=start.after,
                    transaction_rows=self._transaction_rows,
                    references=self._references,
                )
                ask = partial(self._ask, primary)
                verify = partial(self._refuse_unpublished, primary)
                try:
                    yield PostgresStream(primary, replication, assembler, start, self._tables, ask, verify)
                except UnpublishedError:
                    await self._give_up_unpublished(primary, replication)
                    raise

    def _report(self, start: Start, pid: int) -> None:
        """Log where reading starts, unless it has started there before and got nowhere."""
        if start == self._started:
            return
        self._started = start
        if start.gap:
            logger.warning("replication does not continue the history", extra={"slot": self._slot})
        where = {"slot": self._slot, "lsn": lsn_text(start.after.lsn), "pid": pid}
        logger.info("replication started", extra=where)

    async def _ask(self, primary: Primary) -> Moment:
        followed = {*self._tables, *self._references()}
        return await primary.moment(self._publication, self._tables, sorted(followed))

    async def _refuse_unpublished(self, primary: Primary) -> None:
        repairs = await publication_repairs(primary, self._publication, self._tables)
        if repairs:
            raise ConfigurationError(
                f"BRIDGE_PUBLICATION: publication {self._publication} does not carry every change of every row of "
                f"{', '.join(self._tables)}; run `realtime-bridge check --fix`, or `{'; '.join(repairs)}`"
            )

    def _refuse_foreign_slot(self, state: SlotState) -> None:
        if state.is_foreign:
            raise ConfigurationError(
                f"BRIDGE_SLOT: the replication slot {self._slot} is not the bridge's own (plugin "
                f"{state.plugin or 'none'}, database {state.other_database or 'this one'}); choose another name"
            )

    async def _own_slot(self, primary: Primary) -> bool:
        """See to it that the slot can be read; returns whether it was made anew."""
        state = await primary.slot(self._slot)
        if state is not None:
            self._refuse_foreign_slot(state)
            if not state.lost:
                return False
            logger.warning("replication slot lost: Postgres removed WAL that it needed", extra={"slot": self._slot})
            await primary.drop_slot(self._slot)
        await primary.create_slot(self._slot)
        logger.info("replication slot created", extra={"slot": self._slot})
        return True

    async def _give_up_unpublished(self, primary: Primary, replication: Replication) -> None:
        """Drop the slot, whose next change nobody can read: the next reader begins behind it and tells of the gap."""
        with translated():
            await self._refuse_unpublished(primary)  # without it, a new slot would come to the same
            await primary.terminate(replication.pid)
            await primary.drop_slot(self._slot)
        logger.warning("replication slot given up: the publication was made anew", extra={"slot": self._slot})

    @asynccontextmanager
    async def _replicating(self, primary: Primary, name: str) -> AsyncIterator[tuple[Replication, System]]:
        """A replication connection that has proven to be one, closed when the block is left."""
        try:
            replication = await connect(self._dsn, application_name=name[:_NAME_BYTES])
        except psycopg.Error as error:
            with translated():
                refusal = await primary.refusal_to_replicate()
            if refusal is not None:
                raise ConfigurationError(refusal) from error
            raise SourceError(
                f"Postgres accepts ordinary connections but none for replication ({reason_of(error)}); DATABASE_URL "
                "has to be a direct connection (no pooler), and max_wal_senders has to leave one free"
            ) from error
        try:
            try:
                system = await replication.identify()
            except psycopg.Error as error:
                raise ConfigurationError(
                    "DATABASE_URL: what answers knows no replication, as a pooler does not; use the direct address "
                    "(Supabase: db.<project>.supabase.co:5432, often IPv6 only)"
                ) from error
            with translated():
                await self._refuse_two_servers(primary, replication)
            yield replication, system
        finally:
            await replication.close()

    async def _start(
        self, primary: Primary, replication: Replication, system: System, after: str | None, owner: str
    ) -> Start:
        """Start streaming, once a former leader has let go of the slot."""
        deadline = asyncio.get_running_loop().time() + _TAKEOVER_SECONDS
        pause = _FIRST_RETRY_SECONDS
        while True:
            state = await primary.slot(self._slot)
            if state is None:
                raise SourceError(f"the replication slot {self._slot} was dropped while it was being opened")
            if state.active_pid is None:
                start = self._locate(system, state, after)
                if await self._try_to_start(replication, start):
                    return start
            else:
                await self._evict(primary, state, owner)
            if asyncio.get_running_loop().time() > deadline:
                raise SourceError(
                    f"the replication slot {self._slot} is still read by pid {state.active_pid} ({state.holder!r}), "
                    f"{_TAKEOVER_SECONDS:.0f} s after that was ended"
                )
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_RETRY_SECONDS)

    def _locate(self, system: System, state: SlotState, after: str | None) -> Start:
        """Where to begin, and whether that continues the history."""
        incarnation = f"{system.id}/{system.timeline}/{self._slot}"
        fresh = Place(state.confirmed, 0)
        watermark = None if after is None else Watermark.parse(after)
        if watermark is None or watermark.incarnation != incarnation:
            return Start(incarnation, None, fresh, state.confirmed, gap=after is not None)
        place = watermark.place
        # Somebody else read on behind us, or the server went back to before what it had sent.
        if place.lsn < state.confirmed or place.lsn > system.flushed:
            return Start(incarnation, watermark, fresh, state.confirmed, gap=True)
        return Start(incarnation, watermark, place, state.confirmed, gap=False)

    async def _try_to_start(self, replication: Replication, start: Start) -> bool:
        """Whether the stream runs now; False if somebody was quicker."""
        try:
            await replication.start(self._slot, self._publication, start.after.lsn, confirmed=start.confirmed)
        except psycopg.errors.ObjectInUse:
            return False
        except psycopg.Error as error:
            raise SourceError(
                f"the replication slot {self._slot} cannot be read ({reason_of(error)}); if that stays so, run "
                f"`SELECT pg_drop_replication_slot('{self._slot}')`: the bridge makes a new one and tells its readers"
            ) from error
        return True

    async def _refuse_two_servers(self, primary: Primary, replication: Replication) -> None:
        """A name can move between the two connections, and what one server says proves nothing about another."""
        if not await primary.is_walsender(replication.pid):
            raise SourceError(
                "DATABASE_URL leads to two servers now, or through a pooler; it has to lead to the primary"
            )

    async def _evict(self, primary: Primary, state: SlotState, owner: str) -> None:
        """End a frozen former leader of the same namespace, and nobody else."""
        assert state.active_pid is not None
        namespace = owner[: owner.rfind("/") + 1] or owner
        if state.holder is not None and state.holder.startswith(namespace):
            logger.warning("ending the slot's former reader", extra={"slot": self._slot, "pid": state.active_pid})
            await primary.terminate(state.active_pid)
            return
        if state.holder is None:
            return  # it ended between the two looks at it
        raise SourceError(
            f"the replication slot {self._slot} is read by somebody else: pid {state.active_pid}, application_name "
            f"{state.holder!r}. Stop that program, or give this bridge another BRIDGE_SLOT"
        )
