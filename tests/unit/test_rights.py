"""Changes of rights are told of once, by whoever leads, whoever found them first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from realtime_bridge.broker.base import NOTE
from realtime_bridge.broker.memory import MemoryBroker
from realtime_bridge.change import Control
from realtime_bridge.rights import RIGHTS, RightsState, RightsTeller
from realtime_bridge.rows import IndexState, RowIndex
from tests.rights import Known
from tests.services import eventually

POSTS, NOTES = "public.posts", "public.notes"


@asynccontextmanager
async def leading(broker: MemoryBroker, known: Known) -> AsyncIterator[RightsState]:
    token = await broker.acquire_lease(ttl=60)
    rows, state = RowIndex(broker, [POSTS, NOTES], IndexState()), RightsState()
    rows.begun.set()
    task = asyncio.create_task(RightsTeller(broker, known, rows, state, token).run())
    yield state
    task.cancel()
    await asyncio.wait([task])
    await broker.release_lease(token)


def memory() -> MemoryBroker:
    return MemoryBroker(history_size=100, history_bytes=10_000, history_seconds=60, row_index_bytes=0)


async def told(broker: MemoryBroker) -> list[str]:
    bodies = [entry.body for entry in await broker.read(0)]
    assert all(isinstance(b, Control) and (b.kind, b.reason) == ("catalog", "visibility_changed") for b in bodies)
    return [body.table for body in bodies if isinstance(body, Control)]


async def noted(broker: MemoryBroker) -> bytes | None:
    return (await broker.rows(RIGHTS, [NOTE]))[0]


async def test_what_holds_at_the_beginning_of_a_history_is_noted_and_told_to_nobody() -> None:
    broker = memory()
    async with leading(broker, Known(posts="1", notes="1")):
        await eventually(lambda: RIGHTS in broker._index.indexed())
    assert await noted(broker) == b'{"public.notes":"1","public.posts":"1"}'
    assert await told(broker) == []


async def test_a_change_is_told_of_once_table_by_table() -> None:
    broker, known = memory(), Known(posts="1", notes="1")
    async with leading(broker, known) as state:
        await eventually(lambda: RIGHTS in broker._index.indexed())
        known.rights = {POSTS: "2", NOTES: "1"}
        await eventually(lambda: state.told == 1)
        known.rights = {}  # unknown for a time
        await asyncio.sleep(0)
        known.rights = {POSTS: "2", NOTES: "2"}
        await eventually(lambda: state.told == 2)
    assert await told(broker) == [POSTS, NOTES]


async def test_a_successor_tells_what_was_changed_meanwhile() -> None:
    broker = memory()
    async with leading(broker, Known(posts="1")):
        await eventually(lambda: RIGHTS in broker._index.indexed())
    async with leading(broker, Known(posts="2", notes="1")) as state:
        await eventually(lambda: state.told == 1)
    assert await told(broker) == [POSTS]
    assert await noted(broker) == b'{"public.notes":"1","public.posts":"2"}'


async def test_a_successor_that_has_yet_to_find_a_change_does_not_take_it_back() -> None:
    broker, late = memory(), Known(posts="1")
    late.is_outdated = True
    async with leading(broker, Known(posts="2")):
        await eventually(lambda: RIGHTS in broker._index.indexed())
    async with leading(broker, late):
        await eventually(lambda: late.asked > 1)
        late.rights, late.is_outdated = {POSTS: "2"}, False
    assert await told(broker) == []
