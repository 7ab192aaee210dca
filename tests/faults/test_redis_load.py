"""A Redis that is asked for much: large rows, over a slow link, by many at once."""

import asyncio
from collections.abc import Iterator

import pytest

from realtime_bridge.broker.base import RowChange
from realtime_bridge.dev.engines import EmbeddedValkey
from tests.contract.brokers import change, changes, open_redis, seen
from tests.proxies import Proxy
from tests.redises import ask
from tests.services import running

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
        entries, texts, fields = await asyncio.gather(
            far.read(0),
            far.rows("public.wide", [str(row.field) for row in rows]),
            far.fields("public.long", most=1000),
        )
        assert seen(entries) == [1]
        assert texts == [row.text for row in rows]
        assert fields is not None
        assert set(fields) == {row.field for row in names}
