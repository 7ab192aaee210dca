"""The whole: settings in, a lifespan and a router out.

    bridge = Bridge(Settings.load())
    app = FastAPI(lifespan=bridge.lifespan)
    app.include_router(bridge.router)

Layer: whole. May import: everything.
"""

import asyncio
import logging
import resource
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from fastapi import APIRouter

from realtime_bridge.auth import Verifier
from realtime_bridge.broker.base import Broker
from realtime_bridge.broker.memory import MemoryBroker
from realtime_bridge.database import Database
from realtime_bridge.errors import BridgeError, UnavailableError
from realtime_bridge.guarantee import Flow, Guarantor
from realtime_bridge.hub.hub import Hub
from realtime_bridge.ingest import Ingest
from realtime_bridge.jwks import GetUser, JwksKeySet
from realtime_bridge.metrics import Metrics, Reading
from realtime_bridge.policy.asking import Asking
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.repair import RepairLimits
from realtime_bridge.routes import make_router
from realtime_bridge.settings import Settings
from realtime_bridge.sources.base import Source, TableReader
from realtime_bridge.tickets import MemoryTicketStore, RedisTicketStore, Tickets, TicketStore
from realtime_bridge.transports.events import EventsEndpoint
from realtime_bridge.transports.requests import Credentials, origin_allowed
from realtime_bridge.transports.uvicorn_protocol import RedactQuery
from realtime_bridge.transports.websocket import WebSocketEndpoint

if TYPE_CHECKING:  # sources and the Redis broker take a while to import, and no process needs all of them
    from realtime_bridge.broker.redis import RedisBroker
    from realtime_bridge.sources.slot_watch import SlotWatch
    from realtime_bridge.sources.supabase_canary import Canary

logger = logging.getLogger(__name__)

DEAF_AFTER_SECONDS: Final = 10.0
"""Without a proof for so long, what stands between the database and here counts as broken."""
_SPARE_FILES: Final = 256
_BEGIN_SECONDS: Final = 10.0
_CANCEL_AGAIN_SECONDS: Final = 3.0
"""Longer than any part takes to end."""


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
            database = (
                await stack.enter_async_context(Database(_secret(settings.database_url)))
                if (settings.database_url is not None)
                else None
            )
            policy = make_policy(settings, database)
            await policy.prepare()
            canary = make_canary(settings, database)
            source = make_source(settings, database, lambda: policy.references, canary)
            broker: RedisBroker | MemoryBroker = await stack.enter_async_context(make_broker(settings))
            for part in (self._keys, self._get_user):
                if part is not None:
                    await stack.enter_async_context(part)
            tasks = await stack.enter_async_context(_BackgroundTasks())
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
        tasks: "_BackgroundTasks",
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
        )
        ingest = Ingest(
            source,
            broker,
            make_table_reader(settings, database),
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
        appended = ingest.state.appended + repair.told + repair.resyncs
        yield "counter", "appended", "Entries appended by this process.", appended
        yield "counter", "entries", "Entries fanned out.", counters.entries
        yield "counter", "delivered", "Messages handed to sinks.", counters.delivered
        yield "counter", "resyncs", "Resync messages sent.", counters.resyncs
        yield "counter", "fell_behind", "Subscriptions whose sink was full.", counters.fell_behind
        yield "counter", "undecided", "Changes not delivered since they could not be decided.", counters.undecided
        yield "counter", "policy_undecided", "Decisions that the policy could not make.", policy.undecided
        yield "counter", "policy_asked", "Questions about rows put to Postgres.", policy.knowledge.asked
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


class _BackgroundTasks:
    """The bridge's own task group: what runs for ever, and short work that connections ask for."""

    async def __aenter__(self) -> "_BackgroundTasks":
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._lasting: list[asyncio.Task[None]] = []
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        # Perhaps more than once: before Python 3.13 a task group that is cancelled while an error ends it forgets that.
        while present := [task for task in self._lasting if not task.done()]:
            for task in present:
                task.cancel()
            await asyncio.wait(present, timeout=_CANCEL_AGAIN_SECONDS)
        await self._group.__aexit__(None, None, None)  # which would wrap an error of the block in a group

    def forever(self, name: str, run: Any) -> asyncio.Task[None]:
        """Run a coroutine function for ever; a fault of ours is logged, and it begins again."""

        async def again() -> None:
            while True:
                try:
                    await run()
                except Exception:
                    logger.exception("a part failed and begins again", extra={"part": name})
                await asyncio.sleep(1)

        self._lasting.append(self._group.create_task(again(), name=name))
        return self._lasting[-1]

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run short work; a fault in it is logged, and ends nothing else."""

        async def guarded() -> None:
            try:
                await work
            except Exception:
                logger.exception("answering a client failed")

        self._group.create_task(guarded())


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


def make_key_set(settings: Settings) -> JwksKeySet | None:
    """The project's public keys, if there is a place to fetch them from."""
    url = settings.supabase_jwks_url
    if url is None and settings.supabase_url is not None:
        url = settings.supabase_url.rstrip("/") + "/auth/v1/.well-known/jwks.json"
    return None if url is None else JwksKeySet(url)


def make_get_user(settings: Settings) -> GetUser | None:
    """The project's own word on HS256 tokens, where its secret is not ours to know."""
    key = _optional(settings.supabase_key)
    if settings.supabase_jwt_secret is not None or settings.supabase_url is None or key is None:
        return None
    return GetUser(settings.supabase_url, key)


def make_verifier(settings: Settings, keys: JwksKeySet | None = None, get_user: GetUser | None = None) -> Verifier:
    """How tokens are verified with these settings."""
    key = _optional(settings.supabase_key)
    return Verifier(
        secret=_optional(settings.supabase_jwt_secret),
        keys=keys,
        confirm=None if get_user is None else get_user.confirm,
        audience=settings.audience,
        issuer=settings.issuer,
        roles=settings.roles,
        configured_keys=() if key is None else (key,),
    )


def make_policy(settings: Settings, database: Database | None) -> PolicyEngine:
    """Who decides what is seen with these settings."""
    return PolicyEngine(
        settings.tables,
        settings.roles,
        settings.policies,
        None if database is None else Catalog(database.transaction),
        None if database is None else Asking(database.transaction, settings.roles),
        publication=settings.publication if settings.source_kind == "postgres" else None,
        fact_seconds=settings.fact_seconds,
    )


def make_broker(settings: Settings) -> "RedisBroker | MemoryBroker":
    """Where the history is kept with these settings."""
    limits: Any = {  # of several types
        "history_size": settings.history_size,
        "history_bytes": settings.history_bytes,
        "history_seconds": settings.history_seconds,
        "row_index_bytes": settings.row_index_bytes,
    }
    if settings.redis_url is None:
        return MemoryBroker(**limits)
    from realtime_bridge.broker.redis import RedisBroker

    return RedisBroker(settings.redis_url.get_secret_value(), namespace=settings.namespace, **limits)


def make_guarantor(settings: Settings, broker: "RedisBroker | MemoryBroker", hub: Hub) -> Guarantor:
    """Who says what is survived with these settings."""
    ask = None if isinstance(broker, MemoryBroker) else broker.durability
    return Guarantor(settings, ask, lambda: Flow(hub.counters.entries, hub.counters.entry_bytes))


def make_ticket_store(broker: "RedisBroker | MemoryBroker") -> TicketStore:
    """Where tickets are kept: beside the history, so that whoever reads that knows them."""
    return MemoryTicketStore() if isinstance(broker, MemoryBroker) else RedisTicketStore(broker.link)


def make_canary(settings: Settings, database: Database | None) -> "Canary | None":
    """What proves the way of a change with these settings, if anything does."""
    table = settings.canary_table
    if table is None or settings.source_kind != "supabase":
        return None
    from realtime_bridge.sources.supabase_canary import Canary, postgres_writer, postgrest_writer

    if database is not None:
        return Canary(table, settings.namespace, postgres_writer(database.transaction, table))
    assert settings.supabase_url is not None, "settings.require has looked"
    writer = postgrest_writer(settings.supabase_url, _secret(settings.supabase_key), table)
    return Canary(table, settings.namespace, writer)


def make_source(
    settings: Settings,
    database: Database | None,
    references: Callable[[], Collection[str]] = frozenset,
    canary: "Canary | None" = None,
) -> Source:
    """Where changes come from with these settings; `references` are tables that are wanted besides."""
    if settings.source_kind == "postgres":
        from realtime_bridge.sources.postgres import PostgresSource

        return PostgresSource(
            _secret(settings.database_url),
            slot=settings.slot,
            publication=settings.publication,
            tables=settings.tables,
            transaction_rows=settings.transaction_rows,
            references=references,
        )
    from realtime_bridge.sources.supabase import SupabaseSource

    assert settings.supabase_url is not None, "settings.require has looked"
    keys = None if database is None else database.primary_key
    key = _secret(settings.supabase_key)
    return SupabaseSource(settings.supabase_url, key, tables=settings.tables, keys=keys, canary=canary)


def make_slot_watch(settings: Settings) -> "SlotWatch | None":
    """What keeps the slot from filling the disk, with these settings."""
    if settings.source_kind != "postgres":
        return None
    from realtime_bridge.sources.slot_watch import SlotWatch

    return SlotWatch(
        _secret(settings.database_url),
        settings.slot,
        most_bytes=settings.slot_bytes,
        namespace=settings.namespace,
    )


def make_table_reader(settings: Settings, database: Database | None) -> TableReader:
    """Who reads the tables themselves with these settings."""
    if database is None:
        from realtime_bridge.sources.supabase_tables import SupabaseTables

        assert settings.supabase_url is not None, "settings.require has looked"
        return SupabaseTables(settings.supabase_url, _secret(settings.supabase_key))
    from realtime_bridge.sources.database_tables import DatabaseTables

    return DatabaseTables(database.transaction, settings.publication if settings.source_kind == "postgres" else None)


def _secret(value: Any) -> str:
    assert value is not None, "settings.require has looked"
    return str(value.get_secret_value())


def _optional(value: Any) -> str | None:
    return None if value is None else str(value.get_secret_value())


def _affordable(wanted: int) -> int:
    """Connections that the limit of open files allows."""
    most = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_FILES)
    if wanted > most:
        logger.warning("fewer connections than wanted: open files are limited", extra={"connections": most})
    return min(wanted, most)
