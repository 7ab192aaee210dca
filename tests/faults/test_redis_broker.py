"""A Redis that is killed, restarted or frozen under the broker."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from realtime_bridge.broker.base import RowChange, Update
from realtime_bridge.broker.redis import RedisBroker
from realtime_bridge.change import Position
from realtime_bridge.dev.engines import EmbeddedValkey
from realtime_bridge.errors import BrokerError, ForkError, HistoryGoneError, LeaseLostError
from tests.contract.brokers import (
    LIMITS,
    POSTS,
    change,
    changes,
    entries_up_to,
    news,
    reachable,
    seen,
    until_broken,
    update,
)
from tests.redises import ask
from tests.services import eventually, running

pytestmark = pytest.mark.fault


@pytest.fixture
def server() -> Iterator[EmbeddedValkey]:
    with running(EmbeddedValkey()) as valkey:
        yield valkey


@pytest.fixture
def durable_server() -> Iterator[EmbeddedValkey]:
    with running(EmbeddedValkey(durable=True)) as valkey:
        yield valkey


def broker_at(url: str) -> RedisBroker:
    return RedisBroker(url, namespace="faults", **LIMITS)


@asynccontextmanager
async def following(broker: RedisBroker) -> AsyncIterator[AsyncIterator[Update]]:
    async with broker.follow() as updates:
        await update(updates)
        yield updates


async def test_a_killed_redis_ends_the_follower_and_a_durable_one_goes_on(durable_server: EmbeddedValkey) -> None:
    async with broker_at(durable_server.url) as broker:
        token = await broker.acquire_lease(ttl=60)
        async with following(broker) as updates:
            before = await broker.append(token, changes(1, 2), watermark="two")
            await entries_up_to(updates, 2)
            durable_server.kill()
            await until_broken(updates)
        with pytest.raises(BrokerError, match="cannot be reached"):
            await broker.append(token, changes(3))
        durable_server.start()
        await eventually(lambda: reachable(broker))
        with pytest.raises(LeaseLostError):
            await broker.append(token, changes(3))  # whether the one before had reached Redis is not known yet
        token = await asyncio.wait_for(broker.acquire_lease(ttl=60), 10)  # its own lease is no obstacle
        assert await broker.watermark() == "two"
        async with broker.follow() as updates:
            again = await update(updates)
            # Whether the server has lost anything nobody can tell who has not been there.
            assert again.epoch != before.epoch
            assert (again.number, await broker.locate(Position(before.epoch, 2))) == (2, 2)
            await broker.append(token, changes(3))
            assert seen((await news(updates)).entries) == [3]
        assert await broker.locate(Position(before.epoch, 1)) == 1


async def test_a_redis_that_comes_back_empty_begins_a_new_history(server: EmbeddedValkey) -> None:
    async with broker_at(server.url) as broker:
        token = await broker.acquire_lease(ttl=60)
        before = await broker.append(token, changes(1, 2))
        server.restart()
        await eventually(lambda: reachable(broker))
        head = await broker.head()
        assert head.epoch != before.epoch
        assert head.number == 0
        for error in (ForkError, LeaseLostError):
            with pytest.raises(error):
                await broker.append(token, changes(3))
        with pytest.raises(HistoryGoneError):
            await broker.locate(Position(before.epoch, 1))
        token = await asyncio.wait_for(broker.acquire_lease(ttl=60), 10)
        await broker.append(token, changes(11))
        assert seen(await broker.read(0)) == [11]


async def test_a_frozen_redis_ends_the_follower_and_all_goes_on_after_it(server: EmbeddedValkey) -> None:
    async with broker_at(server.url) as broker:
        token = await broker.acquire_lease(ttl=60)
        async with following(broker) as updates:
            head = await broker.append(token, changes(1))
            await entries_up_to(updates, 1)
            server.freeze()
            frozen_at = time.monotonic()
            try:
                await until_broken(updates)
                for call in (broker.head(), broker.read(0), broker.watermark()):
                    with pytest.raises(BrokerError, match="does not answer"):
                        await call
                await asyncio.sleep(max(0.0, frozen_at + 4 - time.monotonic()))
            finally:
                server.thaw()
        await eventually(lambda: reachable(broker))
        assert await broker.head() == head
        async with following(broker) as updates:
            await broker.append(token, changes(2))
            assert seen((await news(updates)).entries) == [2]


async def test_an_append_that_redis_executes_late_is_counted_once(server: EmbeddedValkey) -> None:
    async with broker_at(server.url) as broker:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(1), watermark="1")
        server.freeze()
        try:
            with pytest.raises(BrokerError):
                await broker.append(token, changes(2), watermark="2")
        finally:
            server.thaw()
        with pytest.raises(LeaseLostError):
            await broker.append(token, changes(2), watermark="2")
        await eventually(lambda: reachable(broker))
        token = await asyncio.wait_for(broker.acquire_lease(ttl=60), 10)
        if await broker.watermark() == "1":
            await broker.append(token, changes(2), watermark="2")
        assert seen(await broker.read(0)) == [1, 2]


async def test_a_short_outage_does_not_cost_the_lease(durable_server: EmbeddedValkey) -> None:
    async with broker_at(durable_server.url) as broker:
        token = await broker.acquire_lease(ttl=9)
        keeping = asyncio.create_task(broker.keep_lease(token, ttl=9))
        durable_server.kill()
        await asyncio.wait([keeping], timeout=3.5)
        durable_server.start()
        done, _ = await asyncio.wait([keeping], timeout=6.5)
        assert not done
        await broker.append(token, changes(1))
        keeping.cancel()


async def test_an_outage_longer_than_the_lease_costs_it(server: EmbeddedValkey) -> None:
    async with broker_at(server.url) as broker:
        token = await broker.acquire_lease(ttl=1)
        server.freeze()
        try:
            with pytest.raises(LeaseLostError):
                async with asyncio.timeout(10):
                    await broker.keep_lease(token, ttl=1)
        finally:
            server.thaw()


async def test_a_lease_that_a_clock_set_back_makes_last_longer_is_given_up_in_time(server: EmbeddedValkey) -> None:
    async with broker_at(server.url) as broker, broker_at(server.url) as other:
        token = await broker.acquire_lease(ttl=1)
        assert await ask(server, "PEXPIRE", "{faults}:lease", 3_600_000)  # as an hour back makes it
        assert await asyncio.wait_for(other.acquire_lease(ttl=1), 10) != token


@pytest.mark.slow
async def test_nothing_is_lost_or_repeated_while_redis_freezes_and_dies(durable_server: EmbeddedValkey) -> None:
    """A leader that works as ingest does, and a follower that works as a hub does, through every fault."""
    copy: list[int] = []
    done = asyncio.Event()
    async with broker_at(durable_server.url) as leading, broker_at(durable_server.url) as other:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(lead(leading, done))
            follower = tasks.create_task(follow(other, copy))
            for fault in ("freeze", "kill", "freeze", "kill"):
                await asyncio.sleep(0.7)
                getattr(durable_server, fault)()
                await asyncio.sleep(2.5 if fault == "freeze" else 0.1)
                durable_server.thaw() if fault == "freeze" else durable_server.start()
            done.set()
            end = await eventually(lambda: settled(leading))
            await eventually(lambda: len(copy) >= end)
            follower.cancel()
        assert copy == list(range(1, end + 1))
        assert end > 20


async def lead(broker: RedisBroker, done: asyncio.Event) -> None:
    while not done.is_set():
        try:
            token = await broker.acquire_lease(ttl=3)
            number = int(await broker.watermark() or 0)
            while not done.is_set():
                await broker.append(token, changes(number + 1), watermark=str(number + 1))
                number += 1
                await asyncio.sleep(0.005)
        except (BrokerError, LeaseLostError):
            await asyncio.sleep(0.05)


async def follow(broker: RedisBroker, copy: list[int]) -> None:
    while True:
        try:
            async with broker.follow() as updates:
                async for found in updates:
                    begins = found.number - len(found.entries)
                    while len(copy) < begins:  # and no further: what comes after it is still to be told
                        copy.extend(seen(await broker.read(len(copy), limit=min(500, begins - len(copy)))))
                    assert found.kind == "entries"
                    assert len(copy) == begins
                    copy.extend(seen(found.entries))
        except BrokerError:
            await asyncio.sleep(0.05)


async def settled(broker: RedisBroker) -> int:
    try:
        return (await broker.head()).number
    except BrokerError:
        return 0


# -- what nobody has seen being lost -----------------------------------------------------------------------------------


@asynccontextmanager
async def falling_back() -> AsyncIterator[tuple[EmbeddedValkey, Callable[[], Awaitable[None]]]]:
    """A server that keeps what it had at its newest `SAVE`, and what kills and starts it."""
    with running(EmbeddedValkey(durable=True, options={"appendonly": "no", "save": "3600 100000"})) as server:

        async def fall_back() -> None:
            server.kill()
            await asyncio.to_thread(server.start)

        yield server, fall_back


async def test_what_is_lost_while_no_bridge_runs_is_not_taken_for_what_has_its_numbers_later() -> None:
    async with falling_back() as (server, fall_back):
        async with broker_at(server.url) as broker:
            token = await broker.acquire_lease(ttl=0.5)  # else it would be in the way afterwards
            await broker.append(token, changes(1, 2), watermark="two")
            await ask(server, "SAVE")
            told = await broker.append(token, changes(3, 4))
            await broker.release_lease(token)
        await fall_back()
        async with broker_at(server.url) as broker:
            token = await broker.acquire_lease(ttl=60)
            assert await broker.watermark() == "two"
            head = await broker.append(token, changes(13, 14, 15))
            assert [await broker.locate(Position(told.epoch, n)) for n in (1, 2, 3, 4)] == [1, 2, 2, 2]
            assert seen(await broker.read(2)) == [13, 14, 15]
            await broker.release_lease(token)
            assert (await broker.append(await broker.acquire_lease(ttl=60), changes(16))).epoch == head.epoch


async def test_what_is_lost_twice_is_not_taken_for_what_has_its_numbers_later() -> None:
    async with falling_back() as (server, fall_back), broker_at(server.url) as broker:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(1, 2))
        await ask(server, "SAVE")
        told = await broker.append(token, changes(3, 4))
        for number in (13, 23):
            await fall_back()
            with pytest.raises(ForkError):
                await broker.append(token, changes(number))
            await broker.append(token, changes(number, number + 1, number + 2))
            assert await broker.locate(Position(told.epoch, 4)) == 2
            assert seen(await broker.read(2)) == [number, number + 1, number + 2]


async def test_rows_that_are_lost_end_the_term_in_which_they_were_written() -> None:
    async with falling_back() as (server, fall_back), broker_at(server.url) as broker:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(1), rows=[RowChange("public.posts", "", b"note")])
        await ask(server, "SAVE")
        await broker.append(token, (), rows=[RowChange("public.posts", "[1]", b"row", only_new=True)])
        await fall_back()
        with pytest.raises(LeaseLostError, match="lost what was appended last"):
            await broker.append(token, (), rows=[RowChange("public.posts", "", b"all are here")])
        assert await broker.rows("public.posts", ["", "[1]"]) == [b"note", None]
        await broker.release_lease(token)
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, (), rows=[RowChange("public.posts", "[1]", b"row")])
        assert (await broker.append(token, changes(2))).number == 2


# -- the notification connection alone ------------------------------------------------------------------------------


class Proxy:
    """Passes bytes on between brokers and a server, but can lose what the server says to subscribers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.muted = False
        self.url = ""

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Proxy"]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            self.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        subscribed = asyncio.Event()
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)

        async def upstream() -> None:
            while data := await reader.read(65536):
                if b"SUBSCRIBE" in data:
                    subscribed.set()
                server_writer.write(data)
            server_writer.close()

        async def downstream() -> None:
            while data := await server_reader.read(65536):
                if not (self.muted and subscribed.is_set()):
                    writer.write(data)
            writer.close()

        with suppress(ConnectionError):
            await asyncio.gather(upstream(), downstream())


async def test_lost_notifications_lose_nothing(server: EmbeddedValkey) -> None:
    async with (
        Proxy(server.port).listening() as proxy,
        broker_at(server.url) as leader,
        broker_at(proxy.url) as other,
        following(other) as updates,
    ):
        token = await leader.acquire_lease(ttl=60)
        await leader.append(token, changes(1, 2))
        await entries_up_to(updates, 2)
        proxy.muted = True
        await leader.append(token, changes(3, 4))
        assert seen(await entries_up_to(updates, 4)) == [3, 4]  # found by asking
        await leader.append(token, changes(5, 6))
        proxy.muted = False
        await leader.append(token, changes(7))
        assert seen(await entries_up_to(updates, 7)) == [5, 6, 7]  # a hole, or found by asking


async def test_a_dead_notification_connection_is_told_though_redis_is_well(server: EmbeddedValkey) -> None:
    async with (
        Proxy(server.port).listening() as proxy,
        broker_at(proxy.url) as broker,
        following(broker) as updates,
    ):
        proxy.muted = True
        await until_broken(updates)
        await broker.head()


async def test_a_follower_cut_off_by_redis_says_so_and_can_follow_again(server: EmbeddedValkey) -> None:
    async with broker_at(server.url) as broker, Redis.from_url(server.url) as redis:
        token = await broker.acquire_lease(ttl=60)
        async with following(broker) as updates:
            await redis.client_kill_filter(_type="pubsub")
            await until_broken(updates)
        async with following(broker) as updates:
            await broker.append(token, changes(1))
            assert seen((await news(updates)).entries) == [1]


async def test_a_stranger_on_the_channel_does_no_harm(server: EmbeddedValkey) -> None:
    async with (
        broker_at(server.url) as broker,
        Redis.from_url(server.url) as redis,
        following(broker) as updates,
    ):
        token = await broker.acquire_lease(ttl=60)
        for data in (b"\xff", b"", b"another form", b"epoch 1 1 - n 0 3\nabc"):
            await redis.publish("{faults}:history", data)
        await broker.append(token, changes(1))
        assert seen((await news(updates)).entries) == [1]


# -- refusals --------------------------------------------------------------------------------------------------------


async def test_a_wrong_password_is_told_without_it() -> None:
    with running(EmbeddedValkey(options={"requirepass": "hunter2"})) as server:
        for userinfo in ("", ":hunter3@"):
            url = server.url.replace("redis://", f"redis://{userinfo}")
            with pytest.raises(BrokerError, match="refuses the user name and password") as caught:
                async with broker_at(url):
                    pass
            assert "hunter" not in str(caught.value)
        async with broker_at(server.url.replace("redis://", "redis://:hunter2@")) as broker:
            assert (await broker.head()).number == 0


async def test_what_redis_refuses_is_told_in_words(server: EmbeddedValkey) -> None:
    async with broker_at(server.url) as broker, Redis.from_url(server.url) as redis:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(1))
        await redis.config_set("maxmemory", "1")
        with pytest.raises(BrokerError, match="out of memory"):
            await broker.append(token, changes(2))
        await redis.config_set("maxmemory", "0")
        assert (await broker.head()).number == 1
        await redis.acl_setuser("default", enabled=True, nopass=True, commands=["-xadd"])
        token = await asyncio.wait_for(broker.acquire_lease(ttl=60), 10)
        with pytest.raises(BrokerError, match="does not allow"):
            await broker.append(token, changes(2))
        await redis.acl_setuser("default", enabled=True, nopass=True, categories=["+@all"])
        await redis.replicaof("127.0.0.1", "1")
        with pytest.raises(BrokerError, match="read-only replica"):
            await broker.acquire_lease(ttl=60)
        await redis.replicaof("NO", "ONE")
        token = await asyncio.wait_for(broker.acquire_lease(ttl=60), 10)
        await broker.append(token, changes(2))
        assert seen(await broker.read(0)) == [1, 2]


@pytest.mark.parametrize("command", ["xadd", "zadd", "xtrim", "hdel", "publish"])
async def test_what_an_acl_has_refused_half_way_is_done_once_it_allows_it(server: EmbeddedValkey, command: str) -> None:
    async with RedisBroker(server.url, namespace="faults", **LIMITS | {"history_size": 3}) as broker:
        relations = [replace(POSTS, table=f"posts_{i}") for i in range(3)]
        token = await broker.acquire_lease(ttl=60)
        for i in range(3):
            await broker.append(token, [change(i, relation=relations[i])])
        await ask(server, "ACL", "SETUSER", "default", f"-{command}")
        with pytest.raises(BrokerError, match="does not allow"):
            await broker.append(token, changes(3), watermark="three")
        await ask(server, "ACL", "SETUSER", "default", "+@all")
        token = await asyncio.wait_for(broker.acquire_lease(ttl=60), 10)
        if await broker.watermark() != "three":
            await broker.append(token, changes(3), watermark="three")
        head = await broker.append(token, changes(4))
        assert head.number == 5
        assert seen(await broker.read(3)) == [3, 4]


async def test_a_redis_that_cannot_save_is_told_in_words() -> None:
    with running(EmbeddedValkey(options={"save": "3600 1", "dbfilename": "dump"})) as server:
        (server.directory / "dump").mkdir()  # in the way of the snapshot
        async with broker_at(server.url) as broker, Redis.from_url(server.url) as redis:
            token = await broker.acquire_lease(ttl=60)
            await redis.bgsave()

            async def refused() -> bool:
                try:
                    await broker.append(token, [])
                except BrokerError as error:
                    return "to disk" in str(error)
                return False

            await eventually(refused)


async def test_nobody_there_is_told_at_the_start() -> None:
    with pytest.raises(BrokerError, match=r"Redis at 127\.0\.0\.1:1 cannot be reached"):
        async with broker_at("redis://127.0.0.1:1"):
            pass


async def test_a_closed_broker_says_so(server: EmbeddedValkey) -> None:
    async with broker_at(server.url) as broker:
        pass
    with pytest.raises(BrokerError, match="closed"):
        await broker.head()
