"""Two replicas, one upstream: when the leader dies, freezes, leaves or is cut off, the other goes on in time."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

import asyncpg
import pytest
from redis.asyncio import Redis

from realtime_bridge.errors import BridgeError
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import Copy, open_socket, receive, receive_data
from tests.clocks import Clock
from tests.contract.brokers import changes, open_redis, seen
from tests.proxies import Proxy
from tests.services import eventually, token
from tests.steady import ADA, SteadyWriter, checks, follow_for_ever, grows, leads, metric, proven

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.timeout(120)]

TAKEOVER_SECONDS = 8.0
RED_SECONDS = 20.0
"""Eight after the last proof, and before that five until a publication that is gone is noticed."""


@dataclass
class Pair:
    """Two bridges, of which one leads.

    Attributes:
        road: leads the leader to Redis.
        clocks: by which either lives.
    """

    leader: BridgeProcess
    follower: BridgeProcess
    road: Proxy
    clocks: Mapping[BridgeProcess, Clock]


@asynccontextmanager
async def pair(
    database: str, redis_url: str, namespace: str, folder: Path, takeover_seconds: float = TAKEOVER_SECONDS
) -> AsyncIterator[Pair]:
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    settings = {
        "BRIDGE_NAMESPACE": namespace,
        "BRIDGE_SLOT": namespace.replace("-", "_"),
        "BRIDGE_TAKEOVER_SECONDS": str(takeover_seconds),
    }
    async with Proxy(int(redis_url.rpartition(":")[2].removesuffix("/0"))) as road, AsyncExitStack() as stack:
        urls = (f"redis://127.0.0.1:{road.port}", redis_url)
        bridges = [BridgeProcess(database, REDIS_URL=url, **settings) for url in urls]
        clocks = {}
        for name, bridge in zip(("leader", "follower"), bridges, strict=True):
            (folder / name).mkdir()
            bridge.plant = clocks[bridge] = Clock(folder / name)
            await stack.enter_async_context(bridge)
        leader, follower = bridges
        assert [await leads(leader), await leads(follower)] == [True, False]
        yield Pair(leader, follower, road, clocks)


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


# -- what befalls a leader, and its end ------------------------------------------------------------------------------

Blow: TypeAlias = Callable[[Pair], None]


def killed(it: Pair) -> None:
    it.leader.signal(signal.SIGKILL)


def frozen(it: Pair) -> None:
    it.leader.signal(signal.SIGSTOP)


def thawed(it: Pair) -> None:
    it.leader.signal(signal.SIGCONT)


def cut_off(it: Pair) -> None:
    it.road.refuses = True
    it.road.cut()


def let_in(it: Pair) -> None:
    it.road.refuses = False


def unheard(it: Pair) -> None:
    it.road.is_deaf = True


def heard(it: Pair) -> None:
    it.road.is_deaf = False


@pytest.mark.parametrize(("blow", "end"), [(killed, None), (frozen, thawed), (cut_off, let_in), (unheard, heard)])
async def test_another_takes_over_in_time_and_nothing_is_lost_or_doubled(
    blow: Blow, end: Blow | None, database: str, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    async with pair(database, redis_url, namespace, tmp_path) as it:
        titles: list[str] = []
        opened = asyncio.Event()
        writer = SteadyWriter(database)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(read_titles(it.follower.url, titles, opened))
            await opened.wait()  # what is written from now on is seen
            writing = tasks.create_task(writer.run())
            await eventually(lambda: len(titles) > 20)
            [before] = await readers(database)
            blow(it)
            written = writer.written
            await eventually(lambda: len(titles) > written, TAKEOVER_SECONDS)
            [after] = await readers(database)
            assert (after != before, await leads(it.follower)) == (True, True)
            if end is not None:
                end(it)
                await it.leader.ready()
                assert not await leads(it.leader)
                assert await readers(database) == [after]
                assert await leads(it.follower)
            writer.stop()
            await writing
            await eventually(lambda: len(titles) >= writer.written, 20)
            reading.cancel()
        assert titles == [str(i) for i in range(writer.written)]


async def test_a_leader_that_stops_hands_over_at_once(
    database: str, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    async with pair(database, redis_url, namespace, tmp_path, takeover_seconds=600) as it:
        it.leader.signal(signal.SIGTERM)
        await eventually(lambda: leads(it.follower))


# -- what keeps a former leader from writing -------------------------------------------------------------------------


def append_until_refused(url: str, namespace: str, told: Connection) -> None:
    """Lead for a second, and never ask whether that is still so: 1, 2, 3 … and at last the refusal's name."""

    async def lead() -> None:
        async with open_redis(url, namespace) as [broker]:
            lease = await broker.acquire_lease(ttl=1)
            number = 0
            while True:
                number += 1
                await broker.append(lease, changes(number))
                told.send(number)

    try:
        asyncio.run(lead())
    except BridgeError as error:
        told.send(type(error).__name__)


async def test_what_a_frozen_leader_still_appends_is_refused_by_its_token(redis_url: str, namespace: str) -> None:
    here, there = get_context("forkserver").Pipe()
    former = get_context("forkserver").Process(target=append_until_refused, args=(redis_url, namespace, there))
    former.start()
    there.close()
    try:
        async with open_redis(redis_url, namespace) as [broker]:
            while await asyncio.to_thread(here.recv) < 5:
                pass
            assert former.pid is not None
            os.kill(former.pid, signal.SIGSTOP)
            lease = await asyncio.wait_for(broker.acquire_lease(ttl=60), 10)
            head = await broker.append(lease, changes(1000))
            os.kill(former.pid, signal.SIGCONT)
            while isinstance(word := await asyncio.to_thread(here.recv), int):  # said before, or by now in the history
                assert await broker.head() == head
            assert word == "LeaseLostError"
            assert seen(await broker.read(head.number - 1)) == [1000]
    finally:
        former.kill()
        former.join()


# -- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_clocks_that_jump_cost_no_lease_and_hide_no_deafness(
    jump: float, database: str, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    async with pair(database, redis_url, namespace, tmp_path) as it:
        valid = token(ADA, ttl=6 * 3600, iat=None)  # by whichever clock
        copy = Copy(it.follower.url, valid)
        await copy.load()
        writer = SteadyWriter(database)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(follow_for_ever(copy))
            writing = tasks.create_task(writer.run())
            await grows(copy)
            [before] = await readers(database)
            for clock in it.clocks.values():
                clock.jump(jump)
            await grows(copy, 300)
            assert await readers(database) == [before]
            assert [await checks(it.leader), await checks(it.follower)] == [{}, {}]
            killed(it)
            written = writer.written
            await eventually(lambda: len(copy.history) > written, TAKEOVER_SECONDS)
            writer.stop()
            await writing
            await eventually(lambda: len(copy.history) == writer.written)
            reading.cancel()
        assert copy.resyncs == []
        await eventually(lambda: checks_pass(it.follower))
        connection = await asyncpg.connect(database)
        await connection.execute(f"drop publication {PUBLICATION}")
        await connection.close()
        await eventually(lambda: is_deaf(it.follower), RED_SECONDS)


async def test_what_a_clock_proved_that_was_ahead_for_a_moment_is_soon_forgotten(
    database: str, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    async with pair(database, redis_url, namespace, tmp_path) as it, Redis.from_url(redis_url) as redis:
        await redis.hset(f"{{{namespace}}}:state", "proven", repr(time.time() + 3600))
        it.follower.stop()
        it.follower.start()
        for bridge in (it.leader, it.follower):
            await bridge.ready()
            await proven(bridge)
            assert await metric(bridge, "complete_until_seconds") <= time.time()
            assert await checks(bridge) == {}


# -- what makes deaf without a sound ---------------------------------------------------------------------------------


async def test_a_frozen_walsender_is_told_and_forgotten_once_it_goes_on(database: str, namespace: str) -> None:
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    connection = await asyncpg.connect(database)
    async with BridgeProcess(database, BRIDGE_SLOT=namespace.replace("-", "_")) as bridge:
        walsender = await connection.fetchval(
            "select active_pid from pg_replication_slots where database = current_database()"
        )
        os.kill(walsender, signal.SIGSTOP)
        try:
            await connection.execute("insert into posts (user_id, title) values ($1, 'unheard')", ADA)
            reason = await eventually(lambda: upstream_problem(bridge), RED_SECONDS)
        finally:
            os.kill(walsender, signal.SIGCONT)
        assert reason.startswith("nothing proven for")
        await eventually(lambda: checks_pass(bridge))
    await connection.close()


async def upstream_problem(bridge: BridgeProcess) -> str:
    return (await checks(bridge)).get("upstream", "")


async def checks_pass(bridge: BridgeProcess) -> bool:
    return not await checks(bridge)


async def is_deaf(bridge: BridgeProcess) -> bool:
    return "nothing proven for" in (await checks(bridge)).get("upstream", "")
