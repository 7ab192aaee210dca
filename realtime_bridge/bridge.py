"""The whole: settings in, a lifespan and a router out.

    bridge = Bridge(Settings.load())
    app = FastAPI(lifespan=bridge.lifespan)
    app.include_router(bridge.router)

Layer: whole. May import: everything.
"""

import asyncio
import logging
import resource
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from fastapi import APIRouter

from realtime_bridge.background import BackgroundTasks
from realtime_bridge.broker.base import Broker
from realtime_bridge.broker.memory import MemoryBroker
from realtime_bridge.database import Database
from realtime_bridge.errors import BridgeError, UnavailableError
from realtime_bridge.guarantee import Guarantor
from realtime_bridge.hub.hub import Hub
from realtime_bridge.ingest import Ingest
from realtime_bridge.metrics import Metrics, Reading
from realtime_bridge.parts import (
    make_broker,
    make_canary,
    make_database,
    make_get_user,
    make_guarantor,
    make_key_set,
    make_policy,
    make_slot_watch,
    make_source,
    make_table_reader,
    make_ticket_store,
    make_verifier,
)
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.repair import RepairLimits
from realtime_bridge.routes import make_router
from realtime_bridge.settings import Settings
from realtime_bridge.sources.base import Source
from realtime_bridge.tickets import Tickets
from realtime_bridge.transports.events import EventsEndpoint
from realtime_bridge.transports.requests import Credentials, origin_allowed
from realtime_bridge.transports.uvicorn_protocol import RedactQuery
from realtime_bridge.transports.websocket import WebSocketEndpoint

if TYPE_CHECKING:  # sources and the Redis broker take a while to import, and no process needs all of them
    from realtime_bridge.broker.redis import RedisBroker
    from realtime_bridge.sources.slot_watch import SlotWatch
    from realtime_bridge.sources.supabase_canary import Canary

logger = logging.getLogger(__name__)

DEAF_AFTER_SECONDS: Final = 8.0
"""Without a proof for so long, what stands between the database and here counts as broken. That is promised to show
within 10 s. Proofs come every second, or two, or, with a canary, four; a takeover, by default, is over in five."""
_SPARE_FILES: Final = 256
_BEGIN_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Check:
    """One line of `/readyz`."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Running:
    """The parts of a bridge between start and stop."""

    broker: Broker
    hub: Hub
    ingest: Ingest
    policy: PolicyEngine
    database: Database | None
    slot: "SlotWatch | None"
    guarantor: Guarantor
    tickets: Tickets
    websocket: WebSocketEndpoint
    events: EventsEndpoint
    draining: asyncio.Event


class Bridge:
    """One bridge in one process. Enter `lifespan` once; every route answers 503 outside it."""

    def __init__(self, settings: Settings) -> None:
        settings.require()
        self.settings = settings
        self._keys = make_key_set(settings)
        self._get_user = make_get_user(settings)
        self.verifier = make_verifier(settings, self._keys, self._get_user)
        if self.verifier.weak_secret:
            logger.warning("SUPABASE_JWT_SECRET is shorter than 32 bytes and can be guessed")
        self.metrics = Metrics(self._readings)
        self._running: Running | None = None
        self._ingesting: asyncio.Task[None] | None = None

    @cached_property
    def router(self) -> APIRouter:
        """Every route of the contract."""
        return make_router(self)

    def allows(self, origin: str | None, host: str | None) -> bool:
        """Whether a page of this origin may talk to the bridge, asked for by that Host header."""
        return origin_allowed(origin, host, self.settings.allowed_origins)

    @property
    def database(self) -> Database:
        """The primary, for routes that only exist where there is one."""
        assert self.running.database is not None, "asked for only with DATABASE_URL"
        return self.running.database

    @property
    def running(self) -> Running:
        """The parts.

        Raises:
            UnavailableError: outside the lifespan.
        """
        if self._running is None:
            raise UnavailableError("the bridge is not running: is its lifespan entered?")
        return self._running

    @asynccontextmanager
    async def lifespan(self, _app: object = None) -> AsyncIterator[dict[str, Any]]:
        """Run the bridge. Yields the ASGI lifespan state, by which the server finds the bridge to drain it.

        Raises:
            ConfigurationError: it can never work like this.
            UnavailableError: Postgres or Redis cannot be reached now.
        """
        settings = self.settings
        _keep_tokens_out_of_uvicorns_log()
        async with AsyncExitStack() as stack:
            if (database := make_database(settings)) is not None:
                await stack.enter_async_context(database)
            policy = make_policy(settings, database)
            await policy.prepare()
            canary = make_canary(settings, database)
            source = make_source(settings, database, lambda: policy.references, canary)
            broker: RedisBroker | MemoryBroker = await stack.enter_async_context(make_broker(settings))
            for part in (self._keys, self._get_user):
                if part is not None:
                    await stack.enter_async_context(part)
            tasks = await stack.enter_async_context(BackgroundTasks())
            self._running = running = self._assemble(broker, policy, source, canary, database, tasks)
            stack.callback(self._stop)
            tasks.forever("hub", running.hub.run)
            self._ingesting = tasks.forever("ingest", running.ingest.run)
            tasks.forever("guarantee", running.guarantor.run)
            if running.slot is not None:
                tasks.forever("slot", running.slot.run)
            if policy.shadow is not None:
                tasks.forever("shadow", policy.shadow.run)
            if self._keys is not None:
                tasks.forever("keys", self._keys.run)
            await _begin(running.hub)
            yield {"realtime_bridge": self}
            self.drain()

    def _assemble(
        self,
        broker: "RedisBroker | MemoryBroker",
        policy: PolicyEngine,
        source: Source,
        canary: "Canary | None",
        database: Database | None,
        tasks: BackgroundTasks,
    ) -> Running:
        settings = self.settings
        hub = Hub(
            broker,
            policy,
            tables=settings.tables,
            max_connections=_affordable(settings.max_connections),
            max_connections_per_user=settings.max_connections_per_user,
            send_buffer_bytes=settings.send_buffer_bytes,
            ping_seconds=settings.ping_seconds,
            resync_seconds=settings.resync_seconds,
            replays=not source.is_lossy,
        )
        ingest = Ingest(
            source,
            broker,
            make_table_reader(settings, database),
            rights=policy,
            tables=settings.tables,
            limits=RepairLimits(settings.repair_column, settings.repair_rows),
            namespace=settings.namespace,
            ttl=settings.takeover_seconds * 0.6,
            canary=canary,
        )
        draining = asyncio.Event()
        tickets = Tickets(make_ticket_store(broker), self.verifier.verify)
        credentials = Credentials(self.verifier.verify, tickets, settings.token_in_query)
        websocket = WebSocketEndpoint(hub, credentials, self.allows, tasks.spawn, settings.send_buffer_bytes)
        events = EventsEndpoint(hub, credentials, draining, settings.send_buffer_bytes)
        slot = make_slot_watch(settings)
        guarantor = make_guarantor(settings, broker, hub)
        return Running(broker, hub, ingest, policy, database, slot, guarantor, tickets, websocket, events, draining)

    def drain(self) -> None:
        """Take no new connections, answer every poll that waits, and let another process lead. Idempotent."""
        if self._running is not None and not self._running.draining.is_set():
            self._running.hub.draining = True
            self._running.draining.set()
            if self._ingesting is not None:
                self._ingesting.cancel()

    def _stop(self) -> None:
        self._running = None

    # -- what it says of itself ----------------------------------------------------------------------------------------

    async def checks(self) -> dict[str, Check]:
        """Whether this process can do its job, part by part."""
        running = self.running
        checks = {
            "accepting": Check(not running.draining.is_set(), "being stopped" if running.draining.is_set() else ""),
            "broker": await self._check_broker(running),
            "following": Check(running.hub.following, "" if running.hub.following else "the broker is not heard"),
            "upstream": self._check_upstream(running),
        }
        if running.database is not None:
            checks["database"] = await _check(running.database.check())
        return checks

    async def _check_broker(self, running: Running) -> Check:
        return await _check(running.broker.head())

    def _check_upstream(self, running: Running) -> Check:
        """A live leader proves once a second, through the broker, that it misses nothing."""
        age = running.hub.proof_age
        if age is not None and age <= DEAF_AFTER_SECONDS:
            return Check(True)
        reason = "nothing proven yet" if age is None else f"nothing proven for {age:.0f} s"
        if running.ingest.problem:
            reason += f"; {running.ingest.problem}"
        return Check(False, reason)

    def _readings(self) -> Iterator[Reading]:
        if self._running is None:
            return
        hub, ingest, policy = self._running.hub, self._running.ingest, self._running.policy
        counters = hub.counters
        until = hub.complete_until
        yield "gauge", "connections", "Open connections.", len(hub.connections)
        yield "gauge", "subscriptions_behind", "Subscriptions that are not at the end of the history.", hub.behind()
        yield "gauge", "following", "1 while the broker is followed.", hub.following
        yield "gauge", "leading", "1 while this process reads the source.", ingest.state.leading
        yield "gauge", "complete_until_seconds", "Nothing committed before this time is missing.", until or 0.0
        repair = ingest.state.repair
        appended = ingest.state.appended + ingest.state.rights.told + repair.told + repair.resyncs
        yield "counter", "appended", "Entries appended by this process.", appended
        yield "counter", "entries", "Entries fanned out.", counters.entries
        yield "counter", "delivered", "Messages handed to sinks.", counters.delivered
        yield "counter", "resyncs", "Resync messages sent.", counters.resyncs
        yield "counter", "fell_behind", "Subscriptions whose sink was full.", counters.fell_behind
        yield "counter", "undecided", "Changes not delivered since they could not be decided.", counters.undecided
        yield "counter", "policy_undecided", "Decisions that the policy could not make.", policy.undecided
        yield "counter", "policy_asked", "Questions about rows put to Postgres.", policy.knowledge.asked
        yield "counter", "fact_queries", "Queries for facts of users put to Postgres.", policy.knowledge.fact_queries
        yield (
            "counter",
            "policy_failed",
            "Facts and conditions that Postgres failed to evaluate.",
            policy.knowledge.failed,
        )
        if policy.shadow is not None:
            checked, mismatches = policy.shadow.checked, policy.shadow.mismatches
            yield "counter", "policy_compared", "Decisions compared with Postgres' own, as a sample.", checked
            yield "counter", "policy_mismatches", "Policies that were decided otherwise than by Postgres.", mismatches
        yield "counter", "slices_from_broker", "Slices read from the broker.", counters.caught_up_from_broker
        if self._running.slot is not None:
            kept = self._running.slot.kept_bytes
            yield "gauge", "slot_kept_bytes", "WAL that Postgres keeps because of the replication slot.", kept
        rows = ingest.state.rows
        yield "counter", "old_rows_unknown", "Changes whose old row could not be had.", rows.unknown
        yield "gauge", "row_index_bytes", "Size of the row index.", rows.size
        yield "gauge", "row_index_left_out", "Rows met that found no room in the row index.", rows.left_out
        yield "gauge", "row_index_unread_tables", "Tables not all of whose rows are in the row index yet.", rows.unread
        yield "counter", "repaired", "Changes that were read back after a gap.", repair.told
        yield "counter", "repairs_failed", "Resyncs told in place of a repair.", repair.resyncs
        in_doubt = len(repair.deadlines) if ingest.state.leading else 0
        yield "gauge", "tables_in_doubt", "Tables that are being repaired.", in_doubt
        yield "counter", "source_restarts", "Times the source had to be opened again.", ingest.state.restarts


def _keep_tokens_out_of_uvicorns_log() -> None:
    """Uvicorn's lines hold the address as it came; with its own protocol classes also that of a WebSocket."""
    for name in ("uvicorn.access", "uvicorn.error"):
        target = logging.getLogger(name)
        if not any(isinstance(present, RedactQuery) for present in target.filters):
            target.addFilter(RedactQuery())


async def _begin(hub: Hub) -> None:
    try:
        async with asyncio.timeout(_BEGIN_SECONDS):
            await hub.begun()
    except TimeoutError:
        raise UnavailableError("the broker cannot be followed") from None


async def _check(probe: Coroutine[Any, Any, object]) -> Check:
    try:
        async with asyncio.timeout(2):
            await probe
    except BridgeError as error:
        return Check(False, error.detail)
    except TimeoutError:
        return Check(False, "no answer within 2 s")
    return Check(True)


def _affordable(wanted: int) -> int:
    """Connections that the limit of open files allows."""
    most = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_FILES)
    if wanted > most:
        logger.warning("fewer connections than wanted: open files are limited", extra={"connections": most})
    return min(wanted, most)
