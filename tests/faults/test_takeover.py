"""Two replicas, one upstream: when the leader dies, freezes or leaves, the other goes on and nothing is lost."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import open_socket, receive, receive_data
from tests.services import eventually, token
from tests.steady import ADA, SteadyWriter, leads

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.timeout(120)]


@asynccontextmanager
async def two_bridges(
    database: str, redis_url: str, namespace: str
) -> AsyncIterator[tuple[BridgeProcess, BridgeProcess]]:
    """(leader, follower)."""
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    settings = {"REDIS_URL": redis_url, "BRIDGE_NAMESPACE": namespace, "BRIDGE_SLOT": namespace.replace("-", "_")}
    async with BridgeProcess(database, **settings) as one, BridgeProcess(database, **settings) as two:
        assert [await leads(one), await leads(two)] == [True, False]
        yield one, two


async def readers(database: str) -> list[str]:
    """Names of the connections that read a slot of this database."""
    connection = await asyncpg.connect(database)
    try:
        rows = await connection.fetch(
            "select a.application_name as name from pg_replication_slots s "
            "join pg_stat_activity a on a.pid = s.active_pid where s.database = current_database()"
        )
        return [row["name"] for row in rows]
    finally:
        await connection.close()


async def read_titles(url: str, titles: list[str], opened: asyncio.Event) -> None:
    async with open_socket(url, token(ADA)) as socket:
        assert (await receive(socket))["type"] == "ready"
        opened.set()
        while True:
            message = await receive_data(socket, 60)
            assert message["type"] == "INSERT", message
            titles.append(message["record"]["title"])


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
async def test_another_goes_on_and_nothing_is_lost_or_doubled(
    blow: signal.Signals, database: str, redis_url: str, namespace: str
) -> None:
    async with two_bridges(database, redis_url, namespace) as (leader, follower):
        titles: list[str] = []
        opened = asyncio.Event()
        writer = SteadyWriter(database)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(read_titles(follower.url, titles, opened))
            await opened.wait()  # what is written from now on is seen
            writing = tasks.create_task(writer.run())
            await eventually(lambda: len(titles) > 20)
            [before] = await readers(database)
            leader.signal(blow)
            await eventually(lambda: leads(follower), 20)
            at_takeover = writer.written
            await eventually(lambda: len(titles) > at_takeover + 20, 20)
            [after] = await readers(database)
            assert after != before
            if blow is signal.SIGSTOP:
                leader.signal(signal.SIGCONT)
                await leader.ready()
                assert not await leads(leader)
                assert await readers(database) == [after]
                assert await leads(follower)
            writer.stop()
            await writing
            await eventually(lambda: len(titles) >= writer.written, 20)
            reading.cancel()
        assert titles == [str(i) for i in range(writer.written)]
