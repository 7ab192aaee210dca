"""Each part of a bridge, made as the settings say: for the bridge itself, and for the commands that look at one part.

Layer: whole. May import: everything but bridge.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from realtime_bridge.auth import Verifier
from realtime_bridge.broker.memory import MemoryBroker
from realtime_bridge.database import Database
from realtime_bridge.guarantee import Flow, Guarantor
from realtime_bridge.hub.hub import Hub
from realtime_bridge.jwks import GetUser, JwksKeySet
from realtime_bridge.policy.asking import Asking
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.settings import Settings
from realtime_bridge.sources.base import Source, TableReader
from realtime_bridge.tickets import MemoryTicketStore, RedisTicketStore, TicketStore

if TYPE_CHECKING:  # sources and the Redis broker take a while to import, and no process needs all of them
    from realtime_bridge.broker.redis import RedisBroker
    from realtime_bridge.sources.slot_watch import SlotWatch
    from realtime_bridge.sources.supabase_canary import Canary


def make_database(settings: Settings) -> Database | None:
    """The primary, where there is one with these settings."""
    return None if settings.database_url is None else Database(_secret(settings.database_url))


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
