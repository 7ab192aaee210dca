"""What `realtime-bridge teardown` does: drop what the bridge has made, and nothing else.

Everything is looked at before anything is dropped, so that a bridge that still runs, or an engine that cannot be
reached, leaves all as it was.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import typer

from realtime_bridge.broker.redis import RedisBroker
from realtime_bridge.broker.redis_link import Link
from realtime_bridge.broker.redis_url import parse_redis_url
from realtime_bridge.checks.facts import SUPABASE_PUBLICATION, quote, read_publication, read_slot
from realtime_bridge.database import Connection, Database
from realtime_bridge.errors import ConfigurationError, UnavailableError
from realtime_bridge.parts import make_broker
from realtime_bridge.settings import Settings


@dataclass(frozen=True, slots=True)
class Remains:
    """What there is to drop.

    Attributes:
        slot, publication: their names.
        keys: how many Redis holds for the namespace.
    """

    slot: str | None = None
    publication: str | None = None
    keys: int = 0

    def __bool__(self) -> bool:
        return bool(self.slot or self.publication or self.keys)

    def __str__(self) -> str:
        parts = [
            f"the replication slot {self.slot}" if self.slot else "",
            f"the publication {self.publication}" if self.publication else "",
            f"{self.keys} Redis keys, the history among them" if self.keys else "",
        ]
        return " and ".join(part for part in parts if part)


def remove(*, ask: bool) -> None:
    """Drop the bridge's slot, publication and Redis keys.

    Raises:
        UnavailableError: a bridge still runs, or an engine cannot be asked.
        ConfigurationError: a setting is wrong, or the slot is not the bridge's.
    """
    asyncio.run(_teardown(Settings.load(whole=False), ask=ask))


async def _teardown(settings: Settings, *, ask: bool) -> None:
    async with AsyncExitStack() as stack:
        database = await _database(settings, stack)
        broker = await _broker(settings, stack)
        remains = await look(settings, database)
        if not remains:
            print("There is nothing to drop.")
            return
        if ask:
            typer.confirm(f"Drop {remains}?", abort=True)
        async for dropped in drop(settings, remains, database, broker):
            print(f"Dropped {dropped}.")


async def _database(settings: Settings, stack: AsyncExitStack) -> Database | None:
    if settings.database_url is None:
        return None
    return await stack.enter_async_context(Database(settings.database_url.get_secret_value(), max_size=1))


async def _broker(settings: Settings, stack: AsyncExitStack) -> RedisBroker | None:
    broker = make_broker(settings)
    return await stack.enter_async_context(broker) if isinstance(broker, RedisBroker) else None


# -- looking -----------------------------------------------------------------------------------------------------------


async def look(settings: Settings, database: Database | None) -> Remains:
    """Find what there is to drop.

    Raises:
        UnavailableError: a bridge still runs, or an engine cannot be asked.
        ConfigurationError: the slot is not the bridge's.
    """
    slot = publication = None
    if database is not None:
        async with database.transaction(readonly=True) as connection:
            slot = await _our_slot(connection, settings)
            publication = await _our_publication(connection, settings)
    return Remains(slot, publication, await _count_keys(settings))


async def _our_slot(connection: Connection, settings: Settings) -> str | None:
    slot = await read_slot(connection, settings.slot)
    if slot is None:
        return None
    if not slot.ours:
        raise ConfigurationError(f"BRIDGE_SLOT: the slot {settings.slot} is somebody else's; nothing was dropped.")
    if slot.holder is not None:
        raise UnavailableError(
            f"the slot {settings.slot} is being read by {slot.holder}: stop that bridge first; nothing was dropped."
        )
    return settings.slot


async def _our_publication(connection: Connection, settings: Settings) -> str | None:
    """Supabase's own publication is never ours, even where BRIDGE_PUBLICATION names it."""
    if settings.publication == SUPABASE_PUBLICATION:
        return None
    return settings.publication if await read_publication(connection, settings.publication) else None


async def _count_keys(settings: Settings) -> int:
    async with _link(settings) as link:
        if link is None:
            return 0
        if await link.command("EXISTS", f"{link.prefix}lease"):
            raise UnavailableError(
                f"a bridge of the namespace {settings.namespace} is running: stop it first (the lease of one that was "
                f"killed ends by itself within {settings.takeover_seconds:g} s); nothing was dropped."
            )
        return len({key async for key in link.keys()})  # noqa: SIM118  (no dictionary)


@asynccontextmanager
async def _link(settings: Settings) -> AsyncIterator[Link | None]:
    if settings.redis_url is None:
        yield None
        return
    link = Link(parse_redis_url(settings.redis_url.get_secret_value()), settings.namespace)
    await link.open()
    try:
        yield link
    finally:
        await link.close()


# -- dropping ----------------------------------------------------------------------------------------------------------


async def drop(
    settings: Settings, remains: Remains, database: Database | None, broker: RedisBroker | None
) -> AsyncIterator[str]:
    """Drop it all, and say of each part when it is gone.

    Raises:
        UnavailableError: an engine cannot be reached or refuses; what was told before is gone.
        ForbiddenError: the login role may not.
    """
    if database is not None and remains.slot:
        async with database.transaction() as connection:
            await connection.execute("SELECT pg_drop_replication_slot($1)", remains.slot)
        yield f"the replication slot {remains.slot}"
    if database is not None and remains.publication:
        async with database.transaction() as connection:
            await connection.execute(f"DROP PUBLICATION IF EXISTS {quote(remains.publication)}")
        yield f"the publication {remains.publication}"
    if broker is not None and remains.keys:
        await broker.teardown()
        yield f"the Redis keys of {settings.namespace}"
