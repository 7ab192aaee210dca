"""A Redis that is asked for much: large rows, over a slow link, by many at once."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest

from realtime_bridge.broker.base import RowChange
from realtime_bridge.broker.redis_history import RedisHistory
from realtime_bridge.change import Position
from realtime_bridge.dev.engines import EmbeddedValkey
from realtime_bridge.errors import BrokerError, UnavailableError
from realtime_bridge.tickets import RedisTicketStore
from tests.contract.brokers import change, changes, entries_up_to, open_redis, seen
from tests.proxies import Proxy
from tests.redises import ask
from tests.services import eventually, running

pytestmark = pytest.mark.fault

MIB = 1 << 20


@pytest.fixture
def server() -> Iterator[EmbeddedValkey]:
    with running(EmbeddedValkey()) as valkey:
        yield valkey


async def spare_memory(server: EmbeddedValkey) -> int:
    """Bytes between what Redis needs now and what it has ever needed: an operation copies what it looks at."""
    memory = await ask(server, "INFO", "memory")
    return int(memory["used_memory_peak"]) - int(memory["used_memory"])


async def test_redis_copies_little_for_a_reader_whatever_the_size_of_the_rows(server: EmbeddedValkey) -> None:
    async with open_redis(server.url, "load", history_bytes=64 * MIB) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(*range(1, 101)))
        for number in range(101, 141):
            await broker.append(token, changes(number, size=MIB))
        before = await spare_memory(server)
        assert len(await broker.read(0)) == 100
        assert seen(await broker.read(100)) == [101]
        assert seen(await broker.read(100, limit=3, max_bytes=5 * MIB)) == [101, 102, 103]
        async with open_redis(server.url, "load") as [newcomer]:
            assert (await newcomer.head()).number == 140
        assert await spare_memory(server) - before < 10 * MIB


@pytest.mark.parametrize("large", [(), range(100, 104), (30, 90, 400, 690), range(695, 701)])
async def test_a_newcomer_learns_the_newest_ids_whatever_the_size_of_the_rows(
    server: EmbeddedValkey, large: tuple[int, ...]
) -> None:
    async with open_redis(server.url, "load", history_bytes=64 * MIB) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        for first in range(1, 701, 50):
            await broker.append(token, [change(n, MIB if n in large else 0) for n in range(first, first + 50)])
        entries = await broker.read(0, limit=700, max_bytes=64 * MIB)
        ids = [entry.id.encode() for entry in reversed(entries)]
        told = (await broker.link.script("head", "", 0, ""))[8]
        assert told == ids[: len(told)]
        assert len(told) == len(ids) or sum(entry.size for entry in entries[-len(told) + 1 :]) > 4 * MIB


async def test_what_a_slow_link_carries_for_long_arrives(server: EmbeddedValkey) -> None:
    rows = [RowChange("public.wide", f"[{number}]", b"x" * 10_000) for number in range(700)]
    names = [RowChange("public.long", f"[{number:010000}]", b"x") for number in range(700)]
    async with (
        Proxy(server.port) as proxy,
        open_redis(server.url, "load", row_index_bytes=64 * MIB) as [leader],
        open_redis(f"redis://127.0.0.1:{proxy.port}", "load") as [far],
    ):
        token = await leader.acquire_lease(ttl=60)
        await leader.append(token, changes(1, size=7 * MIB), rows=[*rows, *names])
        proxy.rate = 2 * MIB  # longer than the same question about little may take
        entries, newest_id, texts, fields = await asyncio.gather(
            far.read(0),
            RedisHistory(far.link).id_of(1),
            far.rows("public.wide", [str(row.field) for row in rows]),
            far.fields("public.long", most=1000),
        )
        assert seen(entries) == [1]
        assert newest_id == entries[0].id
        assert texts == [row.text for row in rows]
        assert fields is not None
        assert set(fields) == {row.field for row in names}


# -- many at once ----------------------------------------------------------------------------------------------------

MANY = 300
MOST_CONNECTIONS = 20


async def connections_made(server: EmbeddedValkey) -> int:
    return int((await ask(server, "INFO", "stats"))["total_connections_received"])


async def test_any_number_of_clients_are_answered_over_few_connections(server: EmbeddedValkey) -> None:
    async with Proxy(server.port) as proxy, open_redis(f"redis://127.0.0.1:{proxy.port}", "load") as [broker]:
        tickets = RedisTicketStore(broker.link)
        position = Position((await broker.head()).epoch, 0)
        proxy.delay = 0.002
        before = await connections_made(server)
        numbers, keys, heads = await asyncio.gather(
            asyncio.gather(*(broker.locate(position) for _ in range(MANY))),
            asyncio.gather(*(tickets.take(str(number), None, resuming=False) for number in range(MANY))),
            asyncio.gather(*(broker.head() for _ in range(MANY))),
        )
        assert numbers == [0] * MANY
        assert keys == [None] * MANY
        assert {head.number for head in heads} == {0}
        assert await connections_made(server) - before < MOST_CONNECTIONS


async def test_a_term_outlasts_any_number_of_made_up_tickets(server: EmbeddedValkey) -> None:
    async with Proxy(server.port) as proxy, open_redis(f"redis://127.0.0.1:{proxy.port}", "load") as [broker]:
        tickets = RedisTicketStore(broker.link)
        token = await broker.acquire_lease(ttl=60)
        proxy.delay = 0.1

        async def flood() -> None:
            for _ in range(10):
                with suppress(UnavailableError):  # so slow a link cannot answer all of them
                    await tickets.take("made up", None, resuming=False)

        flooding = [asyncio.create_task(flood()) for _ in range(MANY)]
        async with broker.follow() as updates:
            for number in range(1, 6):
                await broker.append(token, changes(number))
            assert seen(await entries_up_to(updates, 5)) == [1, 2, 3, 4, 5]
        for task in flooding:
            task.cancel()
        await asyncio.wait(flooding)
        assert not any(task.exception() for task in flooding if not task.cancelled())
        assert await tickets.take("another", None, resuming=False) is None


async def test_a_question_is_not_answered_with_what_was_so_before_it(server: EmbeddedValkey) -> None:
    async with (
        Proxy(server.port) as proxy,
        open_redis(server.url, "load") as [leader],
        open_redis(f"redis://127.0.0.1:{proxy.port}", "load") as [far],
    ):
        token = await leader.acquire_lease(ttl=60)
        await far.head()
        before = await questions(server)
        proxy.delay = 0.3
        early = asyncio.create_task(far.head())

        async def is_on_its_way_back() -> bool:
            return await questions(server) > before

        await eventually(is_on_its_way_back)
        await leader.append(token, changes(1))
        assert (await far.head()).number == 1
        assert (await early).number == 0


async def questions(server: EmbeddedValkey) -> int:
    return int((await ask(server, "INFO", "commandstats"))["cmdstat_evalsha"]["calls"])


async def test_a_question_that_is_cancelled_is_asked_by_the_next_who_waits(server: EmbeddedValkey) -> None:
    async with Proxy(server.port) as proxy, open_redis(f"redis://127.0.0.1:{proxy.port}", "load") as [broker]:
        await broker.append(await broker.acquire_lease(ttl=60), changes(1))
        proxy.delay = 0.1
        early, cancelled, *others = [asyncio.create_task(broker.head()) for _ in range(4)]
        assert (await early).number == 1
        await asyncio.wait([cancelled], timeout=0.05)  # it is being asked
        await ask(server, "FLUSHALL")
        cancelled.cancel()
        assert [head.number for head in await asyncio.gather(*others)] == [0, 0]


async def test_all_who_wait_for_a_frozen_redis_are_told_so_together(server: EmbeddedValkey) -> None:
    async with open_redis(server.url, "load") as [broker]:
        server.freeze()
        try:
            async with asyncio.timeout(8):  # one after the other they would wait for minutes
                told = await asyncio.gather(*(broker.head() for _ in range(MANY)), return_exceptions=True)
        finally:
            server.thaw()
        assert {type(error) for error in told} == {BrokerError}
