"""A database, the bridges that serve it, and users who are connected to them.

A row of the table `fence`, which everybody sees, comes after what is tried. History is ordered, so whoever was told of
it has been told all that was ever to be told of what went before.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
from websockets.asyncio.client import ClientConnection

from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import Message, open_socket, receive
from tests.services import token

NOBODY = "00000000-0000-4000-8000-000000000000"
FENCE = """
    create table fence (id int primary key);
    alter table fence replica identity full, enable row level security;
    create policy everybody on fence using (true);
    grant select on fence to anon, authenticated
"""


class World:
    """Bridges over one history, their database, and users who are connected to them."""

    def __init__(
        self, admin: "asyncpg.Connection[Any]", bridges: Sequence[BridgeProcess], sockets: AsyncExitStack
    ) -> None:
        self.admin = admin
        self.bridges = bridges
        self._sockets = sockets
        self._fences = 0

    @property
    def bridge(self) -> BridgeProcess:
        return self.bridges[0]

    async def connect(self, bearer_token: str, bridge: BridgeProcess | None = None, **query: str) -> ClientConnection:
        address = (bridge or self.bridge).url
        socket = await self._sockets.enter_async_context(open_socket(address, bearer_token, **query))
        assert (await receive(socket))["type"] == "ready"
        return socket

    async def met(self) -> None:
        """Every bridge has met what was written; who comes later is in no doubt because of it."""
        await self.told(*[await self.connect(token(NOBODY), bridge) for bridge in self.bridges])

    async def told(self, *sockets: ClientConnection) -> list[list[Message]]:
        """What each of them was told since the last fence, of data and of doubt; nothing can follow that any more."""
        self._fences += 1
        await self.admin.execute("insert into fence values ($1)", self._fences)
        return [await self._up_to_fence(socket) for socket in sockets]

    async def _up_to_fence(self, socket: ClientConnection) -> list[Message]:
        found: list[Message] = []
        while True:
            message = await receive(socket)
            if message["type"] == "INSERT" and message["table"] == "fence":
                if message["record"]["id"] == self._fences:
                    return found
            elif message["type"].isupper() or message["type"] == "resync":
                found.append(message)


@asynccontextmanager
async def world(
    database: str,
    namespace: str,
    schema: str,
    tables: Sequence[str],
    plant: Callable[[], None] | None = None,
    /,
    *,
    followed: Sequence[str] = (),
    redis_url: str | None = None,
    **settings: str,
) -> AsyncIterator[World]:
    """A bridge over a schema; two of them where they can share a Redis.

    Args:
        database: where the schema is installed.
        namespace: a word that no other test has.
        schema: SQL.
        tables: what is served, besides the fence.
        plant: see `BridgeProcess`.
        followed: what is published besides, since policies refer to it.
        redis_url: what two bridges share.
        settings: of the bridges.
    """
    admin = await asyncpg.connect(database)
    try:
        await admin.execute(FENCE)
        await admin.execute(schema)
        served = [*tables, "public.fence"]
        await ensure_publication(database, PUBLICATION, [*served, *followed])
        slot = namespace.replace("-", "_")
        settings = {
            "BRIDGE_SLOT": slot,
            "BRIDGE_NAMESPACE": namespace,
            "BRIDGE_TABLES": ",".join(served),
            "BRIDGE_RESYNC_SECONDS": "0.01",
            **({} if redis_url is None else {"REDIS_URL": redis_url}),
            **settings,
        }
        async with AsyncExitStack() as stack:
            bridges = [BridgeProcess(database, **settings) for _ in range(1 if redis_url is None else 2)]
            for bridge in bridges:
                bridge.plant = plant
                await stack.enter_async_context(bridge)
            yield World(admin, bridges, await stack.enter_async_context(AsyncExitStack()))
    finally:
        await admin.close()


def seen(messages: Sequence[Message]) -> list[tuple[str, Any, Any]]:
    """Messages as operation, new and old row."""
    return [(m["type"], m.get("record"), m.get("old_record")) for m in messages]
