"""Failovers that lost appends, and lost histories: what only a broker outside the process can suffer."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeAlias

import pytest
from redis.asyncio import Redis

from realtime_bridge.broker.base import Durability, Update
from realtime_bridge.broker.redis import RedisBroker
from realtime_bridge.change import Control, Position
from realtime_bridge.dev.engines import EmbeddedValkey
from realtime_bridge.errors import ForkError, HistoryGoneError, LeaseLostError
from tests.contract.brokers import POSTS, change, changes, entries_up_to, news, open_redis, seen, update
from tests.services import running

Restore: TypeAlias = Callable[[], Awaitable[None]]


class Store:
    """The Redis behind the brokers of one namespace, as a failover sees it."""

    def __init__(self, redis: Redis, namespace: str) -> None:
        self.redis = redis
        self.prefix = f"{{{namespace}}}:"

    async def keys(self) -> list[bytes]:
        return [key async for key in self.redis.scan_iter(match=f"{self.prefix}*")]

    async def replicate(self) -> Restore:
        """What a replica has now; calling it makes that replica the primary, with nothing later."""
        dumps = {key: await self.redis.dump(key) for key in await self.keys()}
        copies = {key: dump for key, dump in dumps.items() if dump is not None}

        async def fail_over() -> None:
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.delete(*await self.keys(), *copies)
                for key, copy in copies.items():
                    pipe.restore(key, 0, copy)
                await pipe.execute()

        return fail_over

    async def lose_everything(self) -> None:
        await self.redis.delete(*await self.keys())

    async def epochs(self) -> list[str]:
        items = await self.redis.lrange(f"{self.prefix}epochs", 0, -1)
        return [str(item, "utf-8") for item in items if isinstance(item, bytes)]


@asynccontextmanager
async def store_of(url: str, namespace: str) -> AsyncIterator[Store]:
    async with Redis.from_url(url) as redis:
        yield Store(redis, namespace)


async def relead(broker: RedisBroker, token: str) -> str:
    await broker.release_lease(token)
    return await asyncio.wait_for(broker.acquire_lease(ttl=60), 10)


# -- forks -----------------------------------------------------------------------------------------------------------


async def test_an_append_after_lost_appends_is_refused_and_a_new_epoch_stands(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(1, 2, 3), watermark="three")
        fail_over = await store.replicate()
        old = await broker.append(token, changes(4, 5), watermark="five")
        await fail_over()
        with pytest.raises(ForkError) as caught:
            await broker.append(token, changes(6), watermark="six")
        assert caught.value.number == 3
        head = await broker.head()
        assert (head.number, await broker.watermark()) == (3, "three")
        assert head.epoch != old.epoch
        assert await store.epochs() == [f"{head.epoch} 3", f"{old.epoch} "]
        await broker.append(token, changes(14, 15, 16))
        assert seen(await broker.read(0)) == [1, 2, 3, 14, 15, 16]
        assert [await broker.locate(Position(old.epoch, n)) for n in (2, 3, 4, 5)] == [2, 3, 3, 3]
        assert await broker.locate(Position(head.epoch, 5)) == 5


async def test_a_quiet_follower_finds_the_fork_by_itself(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        async with other.follow() as updates:
            await leader.append(token, changes(1, 2))
            fail_over = await store.replicate()
            await leader.append(token, changes(3))
            await entries_up_to(updates, 3)
            await fail_over()
            forked = await news(updates)
            assert (forked.kind, forked.number, forked.entries) == ("fork", 2, ())
            assert await store.epochs() == [f"{forked.epoch} 2", f"{(await store.epochs())[1]}"]
            with pytest.raises(ForkError):
                await leader.append(token, changes(4))
            await leader.append(token, changes(13))
            assert seen((await news(updates)).entries) == [13]


async def test_a_follower_finds_the_fork_though_others_have_appended_past_the_old_end(
    redis_url: str, namespace: str
) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        async with other.follow() as updates:
            await leader.append(token, changes(1, 2))
            fail_over = await store.replicate()
            await leader.append(token, changes(3, 4))
            await entries_up_to(updates, 4)
            await fail_over()
            async with open_redis(redis_url, namespace) as [stranger]:  # has seen nothing of what was lost
                await stranger.append(token, changes(13, 14, 15, 16))
            forked = await news(updates)
            assert (forked.kind, forked.number) == ("fork", 2)
            assert seen(await entries_up_to(updates, 6)) == [13, 14, 15, 16]
            assert await other.locate(Position((await other.head()).epoch, 5)) == 5


async def test_whoever_finds_a_fork_there_is_one_new_epoch(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace, 4) as brokers:
        token = await brokers[0].acquire_lease(ttl=60)
        await brokers[0].append(token, changes(1, 2))
        fail_over = await store.replicate()
        await brokers[0].append(token, changes(3))
        for broker in brokers:
            await broker.head()
        await fail_over()
        heads = await asyncio.gather(*(broker.head() for broker in brokers for _ in range(3)))
        assert len({head.epoch for head in heads}) == 1
        assert len(await store.epochs()) == 2
        with pytest.raises(ForkError):  # however many have found it before
            await brokers[0].append(token, changes(4))
        token = await relead(brokers[0], token)
        await brokers[0].append(token, changes(13))
        assert seen(await brokers[0].read(0)) == [1, 2, 13]


async def test_what_a_failover_lost_is_missed_by_an_append_though_its_own_process_followed_the_fork(
    redis_url: str, namespace: str
) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace) as [leader]:
        async with leader.follow() as updates:
            token = await leader.acquire_lease(ttl=60)
            await leader.append(token, changes(1, 2), watermark="two")
            fail_over = await store.replicate()
            await leader.append(token, changes(3), watermark="three")
            await fail_over()
            while (await update(updates)).kind != "fork":
                pass
            with pytest.raises(ForkError):
                await leader.append(token, changes(4), watermark="four")
        await relead(leader, token)
        assert await leader.watermark() == "two"


async def test_what_is_lost_between_watermark_and_first_append_of_a_term_is_missed(
    redis_url: str, namespace: str
) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace, 2) as [first, second]:
        token = await first.acquire_lease(ttl=60)
        await first.append(token, changes(1, 2), watermark="two")
        await second.head()
        fail_over = await store.replicate()
        await first.append(token, changes(3), watermark="three")
        await first.release_lease(token)
        token = await second.acquire_lease(ttl=60)
        assert await second.watermark() == "three"
        await fail_over()
        with pytest.raises((ForkError, LeaseLostError)):
            await second.append(token, changes(4), watermark="four")


async def test_a_fork_that_costs_this_process_nothing_is_only_another_epoch(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        await leader.append(token, changes(1, 2))
        fail_over = await store.replicate()
        await other.head()
        await leader.append(token, changes(3))
        await fail_over()
        with pytest.raises(ForkError):
            await leader.append(token, changes(4))
        token = await relead(leader, token)
        await leader.release_lease(token)
        token = await other.acquire_lease(ttl=60)
        await other.append(token, changes(13))
        assert seen(await leader.read(0)) == [1, 2, 13]


async def test_positions_survive_a_fork_of_a_fork(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        epochs = []
        for kept, lost in ((range(10), range(5)), (range(10, 20), range(5))):
            await broker.append(token, changes(*kept))
            fail_over = await store.replicate()
            epochs.append((await broker.append(token, changes(*lost))).epoch)
            await fail_over()
            with pytest.raises(ForkError):
                await broker.append(token, changes(99))
        assert [await broker.locate(Position(epochs[0], n)) for n in (4, 10, 12)] == [4, 10, 10]
        assert [await broker.locate(Position(epochs[1], n)) for n in (4, 20, 23)] == [4, 20, 20]


async def test_a_fork_in_what_is_trimmed_rewinds_to_nothing(redis_url: str, namespace: str) -> None:
    async with (
        store_of(redis_url, namespace) as store,
        open_redis(redis_url, namespace, 2, history_size=3) as [leader, other],
    ):
        token = await leader.acquire_lease(ttl=60)
        async with other.follow() as updates:
            await leader.append(token, changes(1, 2))
            fail_over = await store.replicate()
            await leader.append(token, changes(3, 4))
            await entries_up_to(updates, 4)
            await fail_over()
            async with open_redis(redis_url, namespace, history_size=3) as [stranger]:
                for number in range(13, 23):
                    await stranger.append(token, changes(number))
            lost = await news(updates)
            assert (lost.kind, lost.number) in (("lost", 12), ("fork", 2))
            with pytest.raises(HistoryGoneError):
                await other.locate(Position((await store.epochs())[0].split()[0], 2))


async def test_a_follower_that_comes_back_finds_what_happened_meanwhile(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        async with other.follow() as updates:
            before = await update(updates)
            fail_over = await store.replicate()
            await leader.append(token, changes(1, 2))
            await entries_up_to(updates, 2)
        await fail_over()
        async with open_redis(redis_url, namespace) as [stranger]:
            await stranger.append(token, changes(11, 12, 13))
        async with other.follow() as updates:
            after = await update(updates)
        assert after.epoch != before.epoch
        assert await other.locate(Position(before.epoch, 2)) == 0


@pytest.mark.parametrize("seed", range(8))
async def test_after_any_failovers_a_follower_holds_exactly_the_history(
    redis_url: str, namespace: str, seed: int
) -> None:
    """Fold updates as a hub does: what was seen, cut back at forks, is what Redis holds."""
    chance = random.Random(seed)
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        fail_over: Restore | None = None
        async with other.follow() as updates:
            copy: list[int] = []
            number = 0
            for _ in range(25):
                step = chance.choice(["append", "append", "append", "replicate", "fail over", "follow"])
                if step == "append":
                    bodies = changes(*range(number + 1, number + 1 + chance.randrange(4)))
                    number += 4
                    try:
                        await leader.append(token, bodies)
                    except ForkError:
                        await leader.append(token, bodies)
                    except LeaseLostError:  # what was lost had no entries
                        token = await relead(leader, token)
                        await leader.append(token, bodies)
                elif step == "replicate":
                    await leader.head()  # or else this replica would not know of a fork that somebody has found
                    fail_over = await store.replicate()
                elif step == "fail over" and fail_over is not None:
                    await fail_over()
                    fail_over = None
                elif step == "follow":
                    fold(copy, await update(updates))
            await leader.head()
            end = await other.head()
            while True:
                found = await update(updates)
                fold(copy, found)
                if (found.epoch, found.number) == (end.epoch, end.number):
                    break
            assert copy == seen(await leader.read(0))


def fold(copy: list[int], found: Update) -> None:
    assert found.kind != "lost"
    if found.kind == "fork":
        del copy[found.number :]
    copy.extend(seen(found.entries))
    assert len(copy) == found.number


# -- losses ----------------------------------------------------------------------------------------------------------


async def test_a_lost_history_begins_anew_and_no_old_position_counts(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        async with other.follow() as updates:
            old = await leader.append(token, changes(1, 2, 3), watermark="three")
            await entries_up_to(updates, 3)
            await store.lose_everything()
            with pytest.raises(ForkError) as caught:
                await leader.append(token, changes(4))
            assert caught.value.number == 0
            with pytest.raises(LeaseLostError):
                await leader.append(token, changes(4))
            token = await relead(leader, token)
            assert await leader.watermark() is None
            lost = await news(updates)
            assert (lost.kind, lost.number) == ("lost", 0)
            head = await leader.append(token, changes(11))
            assert seen((await news(updates)).entries) == [11]
            assert head.epoch == lost.epoch != old.epoch
            for number in (0, 1, 3):
                with pytest.raises(HistoryGoneError):
                    await leader.locate(Position(old.epoch, number))


async def test_a_follower_learns_of_a_lost_history_though_the_new_one_is_longer(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        async with other.follow() as updates:
            await leader.append(token, changes(1))
            await entries_up_to(updates, 1)
            await store.lose_everything()
            token = await relead(leader, token)
            assert await leader.watermark() is None
            await leader.append(token, changes(11, 12, 13))
            lost = await news(updates)
            assert lost.kind == "lost"
            if lost.number < 3:
                assert len((await news(updates)).entries) == 3 - lost.number


async def test_an_evicted_stream_is_a_trimmed_one(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        epoch = (await broker.append(token, changes(1, 2))).epoch
        await store.redis.delete(f"{store.prefix}history")
        with pytest.raises(HistoryGoneError):
            await broker.read(0)
        with pytest.raises(HistoryGoneError):
            await broker.locate(Position(epoch, 1))
        assert (await broker.append(token, changes(3))).first == 3
        assert seen(await broker.read(2)) == [3]


async def test_lost_relations_are_sent_again(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(1))
        await store.redis.delete(f"{store.prefix}relations")
        await broker.append(token, changes(2))
        async with open_redis(redis_url, namespace) as [reader]:
            assert seen(await reader.read(0)) == [1, 2]


async def test_an_entry_that_cannot_be_decoded_is_told_as_a_gap(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace, 2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        await leader.append(token, changes(1))
        await store.redis.delete(f"{store.prefix}relations")
        [entry] = await other.read(0)
        assert entry.body == Control("resync", "*", "upstream_gap")
        assert other.undecodable == 1


async def test_relations_are_forgotten_with_the_last_entry_that_needs_them(redis_url: str, namespace: str) -> None:
    async with (
        store_of(redis_url, namespace) as store,
        open_redis(redis_url, namespace, history_size=2) as [broker],
    ):
        token = await broker.acquire_lease(ttl=60)
        relations = [replace(POSTS, table=f"t{number}") for number in range(5)]
        for number, relation in enumerate(relations):
            await broker.append(token, [change(number, relation=relation)])
        kept = await store.redis.hkeys(f"{store.prefix}relations")
        assert {str(key, "utf-8") for key in kept if isinstance(key, bytes)} == {
            relation.version for relation in relations[-2:]
        }
        await broker.append(token, [change(5, relation=relations[0])])
        assert seen(await broker.read(4)) == [4, 5]


# -- for the command line --------------------------------------------------------------------------------------------


async def test_teardown_deletes_the_namespace_and_nothing_else(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(1))
        await store.redis.set(f"{store.prefix}something-of-the-hub", "1")
        await store.redis.set(f"{{{namespace}2}}:state", "kept")
        await broker.teardown()
        assert await store.keys() == []
        assert await store.redis.getdel(f"{{{namespace}2}}:state") == b"kept"


async def test_info_tells_what_an_operator_should_know(redis_url: str, namespace: str) -> None:
    async with open_redis(redis_url, namespace) as [broker]:
        info = await broker.info()
        assert info.version
        assert (info.evicts, info.append_only, info.snapshots, info.replicas) == (False, False, False, 0)
        assert await broker.durability() == Durability("none", replicas=0, evicts=False)


async def test_a_redis_that_syncs_every_append_says_so(namespace: str) -> None:
    with running(EmbeddedValkey(durable=True)) as server:
        async with open_redis(server.url, namespace) as [broker]:
            assert (await broker.durability()).persistence == "always"
            await broker.link.command("CONFIG SET", "appendfsync", "everysec")
            assert (await broker.durability()).persistence == "every second"
            await broker.link.command("ACL SETUSER", "default", "-config|get")
            assert (await broker.durability()).persistence == "every second"
            await broker.link.command("CONFIG SET", "appendonly", "no")
            assert (await broker.durability()).persistence == "unknown"
