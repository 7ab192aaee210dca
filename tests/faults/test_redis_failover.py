"""A Redis that fails over, on real servers: a replica promoted by Sentinels, and one in a cluster."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from realtime_bridge.broker.base import Update
from realtime_bridge.broker.redis import RedisBroker
from realtime_bridge.change import Position
from realtime_bridge.dev.engines import EmbeddedValkey
from realtime_bridge.errors import BrokerError, ForkError
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import Copy
from tests.contract.brokers import changes, entries_up_to, news, open_redis, reachable, seen, until_broken, update
from tests.proxies import Proxy
from tests.redises import (
    Cluster,
    Replicating,
    Sentinel,
    Sentinels,
    ask,
    cluster,
    is_linked,
    is_primary,
    replicated,
    sentinels,
    shut_out_replicas,
)
from tests.services import eventually, running, token
from tests.steady import ADA, SteadyWriter, follow_for_ever, grows, leads, titles

pytestmark = [pytest.mark.fault, pytest.mark.timeout(180)]

TAKEOVER_SECONDS = 8.0


@pytest.fixture
async def watched() -> AsyncIterator[Sentinels]:
    with sentinels() as made:
        await eventually(made.is_ready, 30)
        yield made


@pytest.fixture
async def sharded(namespace: str) -> AsyncIterator[Cluster]:
    with cluster(namespace) as made:
        await made.make()
        yield made


@pytest.fixture(params=["watched", "sharded"])
def group(request: pytest.FixtureRequest) -> Sentinels | Cluster:
    """A primary whose replica takes over when it dies."""
    made: Sentinels | Cluster = request.getfixturevalue(request.param)
    return made


@asynccontextmanager
async def following(broker: RedisBroker) -> AsyncIterator[tuple[Update, AsyncIterator[Update]]]:
    async with broker.follow() as updates:
        yield await update(updates), updates


# -- the replica takes over ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blow", ["kill", "freeze"])
async def test_the_new_primary_is_found_and_what_was_replicated_goes_on(
    group: Sentinels | Cluster, namespace: str, blow: str
) -> None:
    async with open_redis(group.url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        async with following(other) as (before, updates):
            await leader.append(token, changes(1, 2))
            await entries_up_to(updates, 2)
            await replicated(group.primary)
            getattr(group.primary, blow)()
            await until_broken(updates)
        await eventually(lambda: reachable(other), 30)
        async with following(other) as (after, updates):
            assert (after.epoch, after.number) == (before.epoch, 2)
            await eventually(lambda: reachable(leader), 30)
            await leader.append(token, changes(3))
            assert seen((await news(updates)).entries) == [3]
        assert seen(await other.read(0)) == [1, 2, 3]


async def test_appends_lost_by_a_failover_are_found_by_their_ids_though_the_new_end_is_higher(
    group: Sentinels | Cluster, namespace: str
) -> None:
    async with open_redis(group.url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        async with following(other) as (before, updates):
            await leader.append(token, changes(1, 2), watermark="two")
            await replicated(group.primary)
            await shut_out_replicas(group.primary)
            await leader.append(token, changes(3, 4), watermark="four")
            assert seen(await entries_up_to(updates, 4)) == [1, 2, 3, 4]
            group.primary.kill()
            await until_broken(updates)
        await eventually(lambda: is_primary(group.replica), 30)
        await eventually(lambda: reachable(other), 30)  # meets the fork, and makes its epoch
        async with open_redis(group.url, namespace) as [stranger]:  # has seen nothing of what was lost
            assert await stranger.watermark() == "two"
            await stranger.append(token, changes(13, 14, 15, 16))
        async with following(other) as (after, updates):
            assert (after.epoch != before.epoch, after.number) == (True, 6)
            with pytest.raises(ForkError):
                await leader.append(token, changes(5))
            await leader.append(token, changes(17))
            assert seen((await news(updates)).entries) == [17]
        assert [await other.locate(Position(before.epoch, n)) for n in (1, 2, 3, 4)] == [1, 2, 2, 2]
        assert seen(await other.read(0)) == [1, 2, 13, 14, 15, 16, 17]


@pytest.mark.integration
async def test_what_a_failover_loses_is_read_again_and_nobody_is_told_to_resync(
    group: Sentinels | Cluster, database: str, namespace: str
) -> None:
    """The whole way, from an insert to a socket of each replica."""
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    settings = {
        "REDIS_URL": group.url,
        "BRIDGE_NAMESPACE": namespace,
        "BRIDGE_SLOT": namespace.replace("-", "_"),
        "BRIDGE_TAKEOVER_SECONDS": str(TAKEOVER_SECONDS),
    }
    async with BridgeProcess(database, **settings) as one, BridgeProcess(database, **settings) as two:
        bridges = (one, two)
        copies = [Copy(bridge.url, token(ADA)) for bridge in bridges]
        writer = SteadyWriter(database)
        early = Copy(two.url, token(ADA))
        async with asyncio.TaskGroup() as tasks:
            for copy in (*copies, early):
                await copy.load()
            reading = [tasks.create_task(follow_for_ever(copy)) for copy in copies]
            writing = tasks.create_task(writer.run())
            for copy in copies:
                await grows(copy)
            await shut_out_replicas(group.primary)
            for copy in copies:
                await grows(copy)  # by what is about to be lost
            group.primary.kill()
            await eventually(lambda: is_primary(group.replica), 30)
            await eventually(lambda: any_leads(bridges), TAKEOVER_SECONDS)
            for copy in copies:
                await grows(copy)
            writer.stop()
            await writing
            reading.append(tasks.create_task(follow_for_ever(early)))
            await eventually(lambda: all(len(copy.rows) >= writer.written for copy in (*copies, early)), 30)
            for task in reading:
                task.cancel()
    for copy in (*copies, early):
        assert titles(copy) == list(range(writer.written))
        assert copy.resyncs == []
    assert all(len(copy.history) > writer.written for copy in copies)  # something was lost, and told again
    assert len(early.history) == writer.written


async def any_leads(bridges: tuple[BridgeProcess, ...]) -> bool:
    return any([await leads(bridge) for bridge in bridges])


# -- who is asked for the primary ------------------------------------------------------------------------------------


async def test_a_frozen_sentinel_holds_nobody_up(watched: Sentinels, namespace: str) -> None:
    watched.watchers[0].freeze()
    async with open_redis(watched.url, namespace) as [broker]:
        await broker.acquire_lease(ttl=60)
        watched.primary.kill()
        await eventually(lambda: is_primary(watched.replica), 30)
        await eventually(lambda: reachable(broker), 30)


async def test_a_sentinel_that_has_another_opinion_is_outvoted(watched: Sentinels, namespace: str) -> None:
    with running(Replicating()) as former, running(Sentinel(former)) as mistaken:
        url = watched.url.replace("//", f"//127.0.0.1:{mistaken.port},")
        async with open_redis(url, namespace) as [broker]:
            await broker.acquire_lease(ttl=60)
        assert (await ask(watched.primary, "DBSIZE") > 0, await ask(former, "DBSIZE")) == (True, 0)


async def test_the_nodes_that_are_named_may_all_be_gone_once_others_are_known(sharded: Cluster, namespace: str) -> None:
    url = f"redis+cluster://127.0.0.1:{sharded.primary.port}"
    async with open_redis(url, namespace) as [broker]:
        await broker.acquire_lease(ttl=60)
        sharded.primary.kill()
        await eventually(lambda: is_primary(sharded.replica), 30)
        await eventually(lambda: reachable(broker), 30)


async def test_notifications_stay_with_the_node_that_has_the_namespace(sharded: Cluster, namespace: str) -> None:
    async with open_redis(sharded.url, namespace) as [broker], following(broker) as (_, updates):
        channel = f"{{{namespace}}}:history".encode()
        assert await ask(sharded.primary, "PUBSUB SHARDCHANNELS") == [channel]
        for node in sharded.others:
            assert await ask(node, "PUBSUB SHARDCHANNELS") == []
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(1))
        assert seen((await news(updates)).entries) == [1]
        commands = await ask(sharded.primary, "INFO", "commandstats")
        assert ("cmdstat_spublish" in commands, "cmdstat_publish" in commands) == (True, False)


async def test_a_namespace_that_moves_to_another_node_is_followed(sharded: Cluster, namespace: str) -> None:
    async with open_redis(sharded.url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        async with following(other) as (before, updates):
            await leader.append(token, changes(1, 2))
            await entries_up_to(updates, 2)
            await sharded.move_to(sharded.others[0])
            await until_broken(updates)
        await eventually(lambda: reachable(other))
        async with following(other) as (after, updates):
            assert (after.epoch, after.number) == (before.epoch, 2)
            assert await ask(sharded.others[0], "PUBSUB SHARDCHANNELS") != []
            await eventually(lambda: reachable(leader))
            await leader.append(token, changes(3))
            assert seen((await news(updates)).entries) == [3]


async def test_a_primary_that_was_demoted_behind_its_address_is_left() -> None:
    """As where a name leads to the primary, and then to another one."""
    with running(Replicating()) as primary, running(Replicating({"replicaof": f"127.0.0.1 {primary.port}"})) as replica:
        await eventually(lambda: is_linked(replica), 30)
        async with Proxy(primary.port) as name, open_redis(f"redis://127.0.0.1:{name.port}", "named") as [broker]:
            token = await broker.acquire_lease(ttl=60)
            await broker.append(token, changes(1))
            await replicated(primary)
            await ask(replica, "REPLICAOF NO ONE")
            await ask(primary, "REPLICAOF", "127.0.0.1", replica.port)
            with pytest.raises(BrokerError, match="read-only replica"):
                await broker.append(token, changes(2))
            name.upstream = replica.port  # the links that stand lead to the old one still
            token = await asyncio.wait_for(broker.acquire_lease(ttl=60), 10)
            await broker.append(token, changes(2))
            assert seen(await broker.read(0)) == [1, 2]


@pytest.mark.parametrize(
    ("scheme", "path", "told"),
    [
        ("redis+cluster", "", "is no cluster"),
        ("redis+sentinel", "/bridge", "no Sentinel"),
    ],
)
async def test_a_plain_redis_that_is_taken_for_more_says_so(
    valkey: EmbeddedValkey, scheme: str, path: str, told: str
) -> None:
    with pytest.raises(BrokerError, match=told):
        async with open_redis(f"{scheme}://127.0.0.1:{valkey.port}{path}", "none"):
            pass


async def test_sentinels_that_do_not_know_the_service_say_so(watched: Sentinels) -> None:
    with pytest.raises(BrokerError, match=r"Redis at another of .* does not say which server is its primary"):
        async with open_redis(watched.url.replace("/bridge", "/another"), "none"):
            pass


async def test_one_node_of_a_cluster_that_is_taken_for_a_redis_says_so(sharded: Cluster, namespace: str) -> None:
    async with open_redis(f"redis://127.0.0.1:{sharded.others[0].port}", namespace) as [broker]:
        with pytest.raises(BrokerError, match="another node"):
            await broker.head()


@pytest.mark.parametrize("tls", ["", "s"])
@pytest.mark.parametrize("rest", ["sentinel://127.0.0.1:1,127.0.0.1:1/bridge", "cluster://127.0.0.1:1"])
async def test_nobody_there_to_ask_is_told_at_the_start(tls: str, rest: str) -> None:
    with pytest.raises(BrokerError, match=r"Redis at .*127\.0\.0\.1:1 (cannot be reached|does not answer)"):
        async with open_redis(f"redis{tls}+{rest}", "none"):
            pass
