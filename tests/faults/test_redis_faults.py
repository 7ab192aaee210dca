"""Everything that can happen to a Redis, under two bridges and a steady writer: nothing missed, nothing silent."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import pytest

from realtime_bridge.dev.engines import EmbeddedValkey
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import Copy
from tests.proxies import Proxy
from tests.redises import ask
from tests.services import eventually, running, token
from tests.steady import ADA, SteadyWriter, checks, grows, leads, metric, titles

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.timeout(120)]

NOTICED_SECONDS = 3.0 + 2  # for a busy machine
TAKEOVER_SECONDS = 8.0
RED_SECONDS = 15.0
"""Eight after the last proof, which was a second old, and a request that itself waits for what is broken."""


@dataclass
class Scene:
    """A Redis, two bridges that reach it each on a way of its own, and a copy of the table at either."""

    server: EmbeddedValkey
    ways: Sequence[Proxy]
    bridges: Sequence[BridgeProcess]
    copies: Sequence[Copy]
    readers: list[asyncio.Task[None]] = field(default_factory=list)

    async def goes_on(self) -> None:
        """All is as before: somebody leads soon, both are ready, and both copies grow."""
        await eventually(self._is_led, TAKEOVER_SECONDS)
        for bridge in self.bridges:
            await bridge.ready()
        for copy in self.copies:
            await grows(copy)

    async def _is_led(self) -> bool:
        return any([await leads(bridge) for bridge in self.bridges])

    async def is_deaf(self) -> bool:
        """Whether neither bridge hears the broker, and both know."""
        return not any([await metric(bridge, "following") for bridge in self.bridges])


@asynccontextmanager
async def scene(
    server: EmbeddedValkey, database: str, namespace: str, *, resyncs: Sequence[str] = ()
) -> AsyncIterator[Scene]:
    """What is done within happens under a steady writer; afterwards each copy must hold all, and all sockets live."""
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    async with AsyncExitStack() as stack:
        ways = [await stack.enter_async_context(Proxy(server.port)) for _ in range(2)]
        settings = {
            "BRIDGE_NAMESPACE": namespace,
            "BRIDGE_SLOT": namespace.replace("-", "_"),
            "BRIDGE_TAKEOVER_SECONDS": str(TAKEOVER_SECONDS),
        }
        bridges = [
            await stack.enter_async_context(
                BridgeProcess(database, REDIS_URL=f"redis://127.0.0.1:{way.port}", **settings)
            )
            for way in ways
        ]
        copies = [Copy(bridge.url, token(ADA)) for bridge in bridges]
        it = Scene(server, ways, bridges, copies)
        writer = SteadyWriter(database)
        async with asyncio.TaskGroup() as tasks:
            for copy in copies:
                await copy.load()
                it.readers.append(tasks.create_task(copy.follow()))
            writing = tasks.create_task(writer.run())
            for copy in copies:
                await grows(copy)
            yield it
            writer.stop()
            await writing
            await eventually(lambda: all(len(copy.rows) == writer.written for copy in copies), 30)
            assert not any(reader.done() for reader in it.readers)
            for reader in it.readers:
                reader.cancel()
        for copy in copies:
            assert titles(copy) == list(range(writer.written))
            assert copy.resyncs == list(resyncs)


# -- faults that end, each for as long as its block ------------------------------------------------------------------

Fault: TypeAlias = Callable[[Scene], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def killed(it: Scene) -> AsyncIterator[None]:
    it.server.kill()
    yield
    await asyncio.to_thread(it.server.start)


@asynccontextmanager
async def frozen(it: Scene) -> AsyncIterator[None]:
    it.server.freeze()
    yield
    await asyncio.sleep(10)  # is what it must outlive
    it.server.thaw()


@asynccontextmanager
async def cut_off(it: Scene) -> AsyncIterator[None]:
    for way in it.ways:
        way.refuses = True
        way.cut()
    yield
    for way in it.ways:
        way.refuses = False


@asynccontextmanager
async def silent(it: Scene) -> AsyncIterator[None]:
    for way in it.ways:
        way.is_deaf = True
    yield
    for way in it.ways:
        way.is_deaf = False


@asynccontextmanager
async def out_of_memory(it: Scene) -> AsyncIterator[None]:
    await ask(it.server, "CONFIG SET", "maxmemory", 1)
    yield
    await ask(it.server, "CONFIG SET", "maxmemory", 0)


@asynccontextmanager
async def unable_to_save(it: Scene) -> AsyncIterator[None]:
    in_the_way = it.server.directory / "dump.rdb"
    in_the_way.mkdir()
    await ask(it.server, "CONFIG SET", "save", "3600 1")
    await save(it.server, "err")
    yield
    in_the_way.rmdir()
    await save(it.server, "ok")


async def save(server: EmbeddedValkey, outcome: str) -> None:
    await ask(server, "BGSAVE")

    async def is_done() -> bool:
        info = await ask(server, "INFO", "persistence")
        return (info["rdb_bgsave_in_progress"], info["rdb_last_bgsave_status"]) == (0, outcome)

    await eventually(is_done)


@asynccontextmanager
async def refused(it: Scene) -> AsyncIterator[None]:
    await ask(it.server, "ACL SETUSER", "default", "-xadd")
    yield
    await ask(it.server, "ACL SETUSER", "default", "+@all")


@asynccontextmanager
async def without_channels(it: Scene) -> AsyncIterator[None]:
    await ask(it.server, "ACL SETUSER", "default", "resetchannels")
    yield
    await ask(it.server, "ACL SETUSER", "default", "allchannels")


@pytest.fixture
def server() -> Iterator[EmbeddedValkey]:
    with running(EmbeddedValkey(durable=True)) as valkey:
        yield valkey


@pytest.mark.parametrize("fault", [killed, frozen, cut_off, silent])
async def test_a_redis_that_is_away_is_noticed_and_what_was_written_meanwhile_arrives(
    fault: Fault, server: EmbeddedValkey, database: str, namespace: str
) -> None:
    async with scene(server, database, namespace) as it:
        async with fault(it):
            await eventually(it.is_deaf, NOTICED_SECONDS)
            for bridge in it.bridges:
                assert {"broker", "following"} <= set(await checks(bridge))
        await it.goes_on()


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (out_of_memory, "out of memory"),
        (unable_to_save, "to disk"),
        (refused, "does not allow"),
        (without_channels, "does not allow"),
    ],
)
async def test_a_redis_that_refuses_to_write_turns_both_red_and_says_why(
    fault: Fault, told: str, server: EmbeddedValkey, database: str, namespace: str
) -> None:
    async with scene(server, database, namespace) as it:
        async with fault(it):
            await eventually(lambda: are_red(it.bridges, told), RED_SECONDS)
        await it.goes_on()


async def are_red(bridges: Sequence[BridgeProcess], reason: str) -> bool:
    return all([reason in (await checks(bridge)).get("upstream", "") for bridge in bridges])


@pytest.mark.parametrize("fault", [refused, without_channels])
async def test_a_refusal_that_goes_on_is_logged_once_and_so_is_its_end(
    fault: Fault, server: EmbeddedValkey, database: str, namespace: str
) -> None:
    async with scene(server, database, namespace) as it:
        begun = [bridge.log.count("\n") for bridge in it.bridges]
        async with fault(it):
            await eventually(lambda: have_tried(it.bridges, 5), 30)
        await it.goes_on()
        for bridge, after in zip(it.bridges, begun, strict=True):
            lines = [json.loads(line) for line in bridge.log.split("\n")[after:-1]]
            told = Counter(line["message"] for line in lines if line["logger"].split(".")[1] in ("ingest", "sources"))
            assert told["cannot read the source"] == 1
            assert max(told.values()) == 1, told


async def have_tried(bridges: Sequence[BridgeProcess], times: int) -> bool:
    """Whether each has begun to read in vain so often."""
    return all([await metric(bridge, "source_restarts_total") >= times for bridge in bridges])


async def test_a_redis_that_is_far_away_serves_as_well(server: EmbeddedValkey, database: str, namespace: str) -> None:
    async with scene(server, database, namespace) as it:
        for way in it.ways:
            way.delay = 0.3
        for copy in it.copies:
            await grows(copy, 100)
        assert [await checks(bridge) for bridge in it.bridges] == [{}, {}]


# -- faults after which the history is gone --------------------------------------------------------------------------


async def flushed(it: Scene) -> None:
    await ask(it.server, "FLUSHALL")


async def emptied(it: Scene) -> None:
    it.server.kill()
    await asyncio.to_thread(it.server.start)


@pytest.mark.parametrize("loss", [flushed, emptied])
async def test_a_redis_that_has_lost_everything_costs_each_reader_one_resync(
    loss: Callable[[Scene], Awaitable[None]], database: str, namespace: str
) -> None:
    with running(EmbeddedValkey()) as server:
        async with scene(server, database, namespace, resyncs=["history_gone"]) as it:
            await loss(it)
            await it.goes_on()
