"""What the tests of brokers share: bodies, a way to open several brokers on one history, and a reader of updates."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Protocol, TypeAlias

import pytest

from realtime_bridge.broker.base import Broker, Update
from realtime_bridge.broker.memory import MemoryBroker
from realtime_bridge.broker.redis import RedisBroker
from realtime_bridge.change import Body, Change, Column, Entry, Relation
from realtime_bridge.errors import BrokerError

POSTS = Relation("public", "posts", (Column("id", "int8"), Column("title", "text")), (0,), full=True)
LIMITS: dict[str, Any] = {
    "history_size": 1000,
    "history_bytes": 1 << 24,
    "history_seconds": 3600.0,
    "row_index_bytes": 1 << 20,
}
PATIENCE = 10.0

Opened: TypeAlias = AbstractAsyncContextManager[list[Broker]]


class OpenBrokers(Protocol):
    """Opens brokers that share one history, as so many processes would; limits as the constructors take them."""

    def __call__(self, count: int = 1, **limits: Any) -> Opened: ...


def change(number: int, size: int = 0, relation: Relation = POSTS) -> Change:
    return Change("INSERT", relation, None, (str(number), "x" * size), commit_time=number)


def changes(*numbers: int, size: int = 0) -> list[Body]:
    return [change(number, size) for number in numbers]


def seen(entries: Iterable[Entry]) -> list[int]:
    """Which of `changes` these are."""
    return [entry.body.commit_time for entry in entries]


@asynccontextmanager
async def open_memory(count: int = 1, **limits: Any) -> AsyncIterator[list[Broker]]:
    """A memory broker is of one process: all of them are one."""
    async with MemoryBroker(**{**LIMITS, **limits}) as broker:
        yield [broker] * count


@asynccontextmanager
async def open_redis(url: str, namespace: str, count: int = 1, **limits: Any) -> AsyncIterator[list[RedisBroker]]:
    async with AsyncExitStack() as stack:
        brokers = [RedisBroker(url, namespace=namespace, **{**LIMITS, **limits}) for _ in range(count)]
        yield [await stack.enter_async_context(broker) for broker in brokers]


async def update(updates: AsyncIterator[Update]) -> Update:
    """The next update, whatever it is."""
    async with asyncio.timeout(PATIENCE):
        return await anext(updates)


async def news(updates: AsyncIterator[Update]) -> Update:
    """The next update that is more than a sign of life."""
    async with asyncio.timeout(PATIENCE):
        while True:
            found = await anext(updates)
            if found.kind != "entries" or found.entries:
                return found


async def until_broken(updates: AsyncIterator[Update], timeout: float = 6) -> None:
    """A follower says that it hears nothing, before a reader has to think it deaf."""

    async def read_on() -> None:
        async for _ in updates:
            pass

    with pytest.raises(BrokerError):
        await asyncio.wait_for(read_on(), timeout)


async def reachable(broker: Broker) -> bool:
    try:
        await broker.head()
    except BrokerError:
        return False
    return True


async def entries_up_to(updates: AsyncIterator[Update], number: int) -> list[Entry]:
    """All entries until the follower has seen a number; anything but entries fails."""
    entries: list[Entry] = []
    async with asyncio.timeout(PATIENCE):
        while True:
            found = await anext(updates)
            assert found.kind == "entries", found
            entries.extend(found.entries)
            if found.number >= number:
                return entries
