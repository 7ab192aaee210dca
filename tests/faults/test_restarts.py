"""Each part restarted in turn under a steady writer: a resumed reader has no hole, and no repeat it was not told of."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import asyncpg
import pytest

from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import Copy
from tests.services import eventually, running, token
from tests.steady import ADA, follow_for_ever, grows, titles

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.timeout(180)]


@pytest.fixture
def engines() -> Iterator[tuple[EmbeddedPostgres, EmbeddedValkey]]:
    """Engines of the test's own, which lose nothing that they have said to have."""
    with ExitStack() as stack:
        postgres = stack.enter_context(running(EmbeddedPostgres()))
        yield postgres, stack.enter_context(running(EmbeddedValkey(durable=True)))


class StubbornWriter:
    """Inserts titles 0, 1, 2 … and finds out, after a lost connection, whether the last one was committed."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.written = 0
        self.stopped = False

    async def run(self) -> None:
        while not self.stopped:
            try:
                await self._write()
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
                await asyncio.sleep(0.05)

    async def _write(self) -> None:
        connection = await asyncpg.connect(self._dsn)
        try:
            newest = await connection.fetchval("select max(title::int) from posts")
            self.written = 0 if newest is None else newest + 1
            while not self.stopped:
                await connection.execute("insert into posts (user_id, title) values ($1, $2)", ADA, str(self.written))
                self.written += 1
                await asyncio.sleep(0.01)
        finally:
            connection.terminate()


@pytest.mark.parametrize("part", ["bridge", "valkey", "postgres"])
async def test_a_restart_leaves_no_hole_and_no_repeat(
    part: str, engines: tuple[EmbeddedPostgres, EmbeddedValkey], namespace: str
) -> None:
    postgres, valkey = engines
    await install_schema(postgres.dsn())
    await ensure_publication(postgres.dsn(), PUBLICATION, ["public.posts"])
    async with BridgeProcess(postgres.dsn(), REDIS_URL=valkey.url, BRIDGE_NAMESPACE=namespace) as bridge:

        def restart_bridge() -> None:
            bridge.stop()
            bridge.start()

        restart: dict[str, Callable[[], None]] = {
            "bridge": restart_bridge,
            "valkey": valkey.restart,
            "postgres": postgres.restart,
        }
        copy = Copy(bridge.url, token(ADA))
        await copy.load()
        writer = StubbornWriter(postgres.dsn())
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(follow_for_ever(copy))
            writing = tasks.create_task(writer.run())
            for _ in range(2):
                await grows(copy)
                await asyncio.to_thread(restart[part])
                await bridge.ready()
            await grows(copy)
            writer.stopped = True
            await writing
            await eventually(lambda: len(copy.rows) >= writer.written, 30)
            reading.cancel()
        assert titles(copy) == list(range(writer.written))
        if not copy.resyncs:
            assert [int(m["record"]["title"]) for m in copy.history] == list(range(writer.written))
        assert copy.resyncs == []
