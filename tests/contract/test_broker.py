"""The contract of `broker.base`, on every broker."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from realtime_bridge.broker.base import SIGHT_SECONDS, SIGHTS_OF_A_TABLE, Broker, Head, Sight, Update
from realtime_bridge.broker.memory import MemoryBroker
from realtime_bridge.change import ABSENT, Body, Change, Column, Control, Entry, Position, Relation, encode_body
from realtime_bridge.errors import BrokerError, HistoryGoneError, LeaseLostError
from tests.contract.brokers import (
    LIMITS,
    POSTS,
    OpenBrokers,
    change,
    changes,
    entries_up_to,
    news,
    open_memory,
    open_redis,
    seen,
    update,
)
from tests.services import eventually

# -- append and read -------------------------------------------------------------------------------------------------


async def test_entries_are_numbered_without_holes_and_each_names_its_predecessor(brokers: OpenBrokers) -> None:
    async with brokers() as [broker]:
        token = await broker.acquire_lease(ttl=5)
        empty = await broker.head()
        await broker.append(token, changes(1, 2))
        head = await broker.append(token, changes(3))
        entries = await broker.read(0)
        assert empty == Head(head.epoch, 0, "", 1, 0.0)
        assert [entry.number for entry in entries] == seen(entries) == [1, 2, 3]
        assert [entry.previous for entry in entries] == ["", entries[0].id, entries[1].id]
        assert len({entry.id for entry in entries}) == 3
        assert (head.number, head.id, head.first) == (3, entries[2].id, 1) == tuple(await broker_end(broker))


async def broker_end(broker: Broker) -> tuple[int, str, int]:
    head = await broker.head()
    return head.number, head.id, head.first


async def test_bodies_come_back_as_they_were(brokers: OpenBrokers) -> None:
    wide = Relation("public", "wide", (Column("a", "int8"), Column("b", "_text"), Column("ü", "bytea")), (0, 2), False)
    bodies: list[Body] = [
        Change("UPDATE", wide, ("1", ABSENT, "\\x00"), ("1", None, "\\x\n"), 1_700_000_000_123_456, "0/16B3748"),
        Change("DELETE", POSTS, ("1", ABSENT), None, 7),
        Control("resync", "public.posts", "truncated", commit_time=8),
        Control("catalog", "public.members"),
    ]
    async with brokers(2) as [writer, reader]:
        token = await writer.acquire_lease(ttl=5)
        async with reader.follow() as updates:
            await writer.append(token, bodies)
            followed = await entries_up_to(updates, 4)
        assert [entry.body for entry in await reader.read(0)] == bodies
        assert [entry.body for entry in followed] == bodies
        assert [entry.size for entry in followed] == [len(encode_body(body)) for body in bodies]


async def test_reading_is_limited_by_entries_and_by_bytes_but_gives_at_least_one(brokers: OpenBrokers) -> None:
    async with brokers() as [broker]:
        token = await broker.acquire_lease(ttl=5)
        await broker.append(token, changes(*range(1, 201), size=100))
        size = (await broker.read(150, limit=1))[0].size
        assert seen(await broker.read(0, limit=3)) == [1, 2, 3]
        assert seen(await broker.read(150, limit=3, max_bytes=1)) == [151]
        assert seen(await broker.read(150, limit=30, max_bytes=2 * size)) == [151, 152]
        assert seen(await broker.read(190)) == list(range(191, 201))
        assert await broker.read(200) == await broker.read(300) == []


async def test_reading_gives_all_that_fits_however_sizes_are_mixed(brokers: OpenBrokers) -> None:
    small, large = dict.fromkeys(range(1, 301), 10), dict.fromkeys((131, 133, 190, 262, 263), 5000)
    async with brokers() as [broker]:
        token = await broker.acquire_lease(ttl=30)
        await broker.append(token, [change(number, size) for number, size in (small | large).items()])
        entries = await broker.read(0)
        assert seen(entries) == list(range(1, 301))
        for after, limit, most in product((0, 66, 130, 235, 290), (1, 65, 150), (1, 1500, 9000, 30_000)):
            expected: list[Entry] = []
            for entry in entries[after : after + limit]:
                if expected and sum(e.size for e in (*expected, entry)) > most:
                    break
                expected.append(entry)
            assert await broker.read(after, limit=limit, max_bytes=most) == expected


async def test_watermark_and_proof_travel_with_an_append_of_nothing(brokers: OpenBrokers) -> None:
    async with brokers(2) as [leader, other]:
        token = await leader.acquire_lease(ttl=5)
        assert await other.watermark() is None
        async with other.follow() as updates:
            await update(updates)
            head = await leader.append(token, [], watermark="a", proven_until=1234.5678)
            assert (await update(updates)).proven_until == head.proven_until == 1234.5678
        assert await other.watermark() == "a"
        await leader.append(token, [], watermark="b")
        assert await other.watermark() == "b"
        assert await other.head() == head


async def test_the_newest_proof_counts_also_where_a_clock_was_set_back(brokers: OpenBrokers) -> None:
    async with brokers(2) as [leader, other]:
        token = await leader.acquire_lease(ttl=5)
        await leader.append(token, [], proven_until=5000.5)
        async with other.follow() as updates:
            assert (await update(updates)).proven_until == 5000.5
            await leader.append(token, [], proven_until=1400.25)
            assert (await update(updates)).proven_until == (await other.head()).proven_until == 1400.25


# -- the lease -------------------------------------------------------------------------------------------------------


async def test_one_leads_and_a_released_lease_is_handed_over_at_once(brokers: OpenBrokers) -> None:
    async with brokers(2) as [first, second]:
        token = await first.acquire_lease(ttl=60)
        waiting = asyncio.create_task(second.acquire_lease(ttl=60))
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
        await first.release_lease(token)
        successor = await asyncio.wait_for(waiting, 10)  # far less than the lease would have held
        assert successor != token
        await first.release_lease(token)
        await second.append(successor, changes(1))


async def test_a_lease_that_nobody_keeps_is_taken_over_and_its_token_is_refused(brokers: OpenBrokers) -> None:
    async with brokers(2) as [first, second]:
        old = await first.acquire_lease(ttl=0.2)
        await first.append(old, changes(1))
        new = await asyncio.wait_for(second.acquire_lease(ttl=5), 10)
        with pytest.raises(LeaseLostError):
            await first.append(old, changes(2))
        with pytest.raises(LeaseLostError):
            await asyncio.wait_for(first.keep_lease(old, ttl=5), 10)
        await second.append(new, changes(3))
        assert seen(await first.read(0)) == [1, 3]


async def test_a_kept_lease_outlives_its_ttl(brokers: OpenBrokers) -> None:
    async with brokers(2) as [first, second]:
        token = await first.acquire_lease(ttl=0.6)
        keeping = asyncio.create_task(first.keep_lease(token, ttl=0.6))
        waiting = asyncio.create_task(second.acquire_lease(ttl=5))
        done, _ = await asyncio.wait([keeping, waiting], timeout=1.5)
        assert not done
        keeping.cancel()
        await asyncio.wait_for(waiting, 10)


async def test_a_released_token_appends_nothing_more(brokers: OpenBrokers) -> None:
    async with brokers() as [broker]:
        token = await broker.acquire_lease(ttl=5)
        await broker.release_lease(token)
        with pytest.raises(LeaseLostError):
            await broker.append(token, changes(1))
        assert (await broker.head()).number == 0


async def test_waiting_for_the_lease_can_be_cancelled(brokers: OpenBrokers) -> None:
    async with brokers(2) as [first, second]:
        token = await first.acquire_lease(ttl=60)
        for delay in (0.0, 0.01, 0.2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(second.acquire_lease(ttl=60), delay)
        await first.append(token, changes(1))
        await first.release_lease(token)
        assert await asyncio.wait_for(second.acquire_lease(ttl=60), 10)


# -- trimming --------------------------------------------------------------------------------------------------------


async def test_the_history_is_trimmed_by_count(brokers: OpenBrokers) -> None:
    async with brokers(history_size=10) as [broker]:
        token = await broker.acquire_lease(ttl=5)
        await broker.append(token, changes(*range(1, 10)))
        assert (await broker.head()).first == 1
        assert (await broker.append(token, changes(10, 11, 12))).first == 3
        assert seen(await broker.read(2)) == list(range(3, 13))
        assert (await broker.append(token, changes(*range(13, 53)))).first == 13  # what is new is never trimmed
        assert (await broker.append(token, [])).first == 43


async def test_the_history_is_trimmed_by_bytes(brokers: OpenBrokers) -> None:
    size = len(encode_body(change(10, 1000)))
    async with brokers(history_bytes=10 * size) as [broker]:
        token = await broker.acquire_lease(ttl=5)
        await broker.append(token, changes(*range(10, 20), size=1000))
        assert (await broker.head()).first == 1
        assert (await broker.append(token, changes(20, size=1000))).first == 2
        assert (await broker.append(token, changes(21, size=3500))).first == 6
        assert (await broker.append(token, changes(22, size=30_000))).first == 13
        assert (await broker.append(token, [])) == Head(
            (await broker.head()).epoch, 13, (await broker.head()).id, 14, 0
        )


async def test_the_history_is_trimmed_by_age(brokers: OpenBrokers) -> None:
    async with brokers(history_seconds=0.3) as [broker]:
        token = await broker.acquire_lease(ttl=5)
        await broker.append(token, changes(1, 2, 3))

        async def all_gone() -> bool:
            return (await broker.append(token, [])).first == 4

        await eventually(all_gone)
        assert (await broker.append(token, changes(4))).first == 4
        assert seen(await broker.read(3)) == [4]


# -- positions -------------------------------------------------------------------------------------------------------


async def test_a_position_is_found_until_what_follows_it_is_trimmed(brokers: OpenBrokers) -> None:
    async with brokers(history_size=5) as [broker]:
        token = await broker.acquire_lease(ttl=5)
        epoch = (await broker.append(token, changes(*range(1, 11)))).epoch
        assert (await broker.append(token, [])).first == 6
        assert [await broker.locate(Position(epoch, number)) for number in (5, 7, 10)] == [5, 7, 10]
        for gone in (Position(epoch, 4), Position(epoch, 11), Position("another", 7), Position("another", 0)):
            with pytest.raises(HistoryGoneError):
                await broker.locate(gone)
        assert seen(await broker.read(5)) == [6, 7, 8, 9, 10]
        with pytest.raises(HistoryGoneError):
            await broker.read(4)


# -- following -------------------------------------------------------------------------------------------------------


async def test_a_follower_begins_at_the_present_and_is_told_where_that_is(brokers: OpenBrokers) -> None:
    async with brokers(2) as [leader, other]:
        token = await leader.acquire_lease(ttl=5)
        await leader.append(token, changes(1, 2))
        async with other.follow() as updates:
            await leader.append(token, changes(3))
            first = await update(updates)
            assert (first.kind, first.number, first.entries) == ("entries", 2, ())
            assert seen((await news(updates)).entries) == [3]
            assert first.epoch == (await other.head()).epoch


async def test_a_follower_hears_at_least_every_two_seconds(brokers: OpenBrokers) -> None:
    async with brokers() as [broker], broker.follow() as updates:
        await update(updates)
        for _ in range(3):
            async with asyncio.timeout(2):
                assert (await anext(updates)).entries == ()


async def test_every_follower_gets_every_entry_in_order(brokers: OpenBrokers) -> None:
    async with brokers(2) as [leader, other]:
        token = await leader.acquire_lease(ttl=30)
        async with leader.follow() as near, other.follow() as far, other.follow() as third:
            for start in range(0, 60, 3):
                await leader.append(token, changes(start + 1, start + 2, start + 3))
            for updates in (near, far, third):
                assert seen(await entries_up_to(updates, 60)) == list(range(1, 61))


async def test_entries_too_large_to_be_notified_of_arrive_too(brokers: OpenBrokers) -> None:
    async with brokers(2) as [leader, other]:
        token = await leader.acquire_lease(ttl=30)
        async with other.follow() as updates:
            await leader.append(token, changes(1))
            await leader.append(token, changes(2, 3, 4, size=700_000))
            await leader.append(token, changes(5))
            assert seen(await entries_up_to(updates, 5)) == [1, 2, 3, 4, 5]


async def test_a_follower_under_which_the_history_is_trimmed_is_told_so(brokers: OpenBrokers) -> None:
    async with brokers(2, history_size=5) as [leader, other]:
        token = await leader.acquire_lease(ttl=30)
        async with other.follow() as updates:
            first = await update(updates)
            await leader.append(token, changes(*range(1, 4), size=300_000))
            await leader.append(token, changes(*range(4, 21)))
            await leader.append(token, [])
            lost = await news(updates)
            assert (lost.kind, lost.epoch, lost.number) == ("lost", first.epoch, 20)
            await leader.append(token, changes(21))
            assert seen((await news(updates)).entries) == [21]


async def test_cancelling_a_follower_harms_nobody(brokers: OpenBrokers) -> None:
    async with brokers(2) as [leader, other]:
        token = await leader.acquire_lease(ttl=30)
        for delay in (0.0, 0.001, 0.01, 0.05):
            async with other.follow() as updates:
                reading = asyncio.create_task(news(updates))
                await asyncio.wait([reading], timeout=delay)
                reading.cancel()
                await asyncio.wait([reading])
        async with other.follow() as updates:
            await update(updates)
            await leader.append(token, changes(1))
            assert seen((await news(updates)).entries) == [1]


async def test_commands_cut_off_at_any_moment_never_answer_the_next_caller(brokers: OpenBrokers) -> None:
    async with brokers() as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(*range(1, 101)), watermark="w")
        epoch = (await broker.head()).epoch
        for turn in range(100):
            read = asyncio.create_task(broker.read(turn, limit=1))
            located = asyncio.create_task(broker.locate(Position(epoch, turn)))
            for _ in range(turn % 12):
                await asyncio.sleep(0)
            read.cancel()
            assert await broker.watermark() == "w"
            assert await located == turn
            assert seen(await broker.read(turn, limit=2)) == [turn + 1, turn + 2][: 100 - turn]
            await asyncio.wait([read])


async def test_an_append_that_is_cut_off_has_happened_whole_or_not_at_all(brokers: OpenBrokers) -> None:
    async with brokers() as [broker]:
        number = 0
        for turn in range(30):
            token = await broker.acquire_lease(ttl=30)
            appending = asyncio.create_task(broker.append(token, changes(1, 2, 3), watermark=str(turn)))
            for _ in range(turn % 15):
                await asyncio.sleep(0)
            appending.cancel()
            await asyncio.wait([appending])
            await broker.release_lease(token)
            token = await broker.acquire_lease(ttl=30)  # after which nothing late can arrive
            head = await broker.head()
            assert head.number in (number, number + 3)
            assert (await broker.watermark() == str(turn)) == (head.number == number + 3)
            number = head.number
            await broker.release_lease(token)


# -- both agree ------------------------------------------------------------------------------------------------------

steps = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 6), st.integers(0, 60)),
    st.tuples(st.just("read"), st.integers(0, 40), st.integers(1, 5)),
    st.tuples(st.just("locate"), st.integers(0, 40), st.just(0)),
    st.tuples(st.just("follow"), st.integers(0, 1), st.just(0)),
)


class Observed:
    """What a run of steps on one broker shows; two brokers must show the same."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.shown: list[Any] = []
        self.appended = 0

    async def run(self, plan: list[tuple[str, int, int]]) -> None:
        token = await self.broker.acquire_lease(ttl=60)
        async with self.broker.follow() as one, self.broker.follow() as two:
            epoch = (await update(one)).epoch
            places = [0, (await update(two)).number]
            for step, a, b in plan:
                if step == "append":
                    bodies = changes(*range(self.appended + 1, self.appended + a + 1), size=b)
                    head = await self.broker.append(token, bodies, watermark=str(self.appended))
                    self.appended += a
                    self.shown.append((head.number, head.first))
                elif step == "follow":
                    places[a] = await self.follow((one, two)[a], places[a])
                else:
                    self.shown.append(await self.ask(step, a, b, epoch))

    async def ask(self, step: str, a: int, b: int, epoch: str) -> Any:
        try:
            if step == "read":
                return seen(await self.broker.read(a, limit=b))
            return await self.broker.locate(Position(epoch, a))
        except HistoryGoneError as error:
            return str(error)

    async def follow(self, updates: AsyncIterator[Update], number: int) -> int:
        """To the end: every number exactly once and in order, or told that some were lost."""
        while number < self.appended:
            found = await update(updates)
            if found.kind == "entries":
                assert seen(found.entries) == list(range(number + 1, found.number + 1))
            number = found.number
        return number


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=30))
async def test_any_interleaving_neither_skips_nor_repeats_and_brokers_agree(
    redis_url: str, plan: list[tuple[str, int, int]]
) -> None:
    limits = {"history_size": 12, "history_bytes": 900}
    namespace = f"test-{uuid.uuid4().hex}"
    async with open_memory(**limits) as [memory], open_redis(redis_url, namespace, **limits) as [redis]:
        first, second = Observed(memory), Observed(redis)
        await first.run(plan)
        await second.run(plan)
        assert first.shown == second.shown


async def test_memory_trims_by_its_clock() -> None:
    now = time.time()
    async with open_memory(history_seconds=10, clock=lambda: now) as [broker]:
        token = await broker.acquire_lease(ttl=5)
        await broker.append(token, changes(1))
        now += 5
        await broker.append(token, changes(2))
        now += 6
        assert (await broker.append(token, [])).first == 2


# -- sights ------------------------------------------------------------------------------------------------------------


def sight(digest: str, *, changed: int | None = None, user: str = "ann", table: str = "t", **more: Any) -> Sight:
    return Sight(user, table, digest, changed, **more)


async def recall(broker: Broker, *sights: Sight, end: int | None = None) -> list[int]:
    """What it answers when its history ends at a number, by default where it does."""
    head = await broker.head()
    if end is not None and head.number < end:
        token = await broker.acquire_lease(ttl=5)
        await broker.append(token, changes(*range(head.number, end)))
        await broker.release_lease(token)
    number = head.number if end is None else end
    return await broker.recall(head.epoch, [sight._replace(number=number) for sight in sights])


async def test_what_a_user_sees_holds_since_it_was_first_told_of(brokers: OpenBrokers) -> None:
    async with brokers(2) as (one, other):
        assert await recall(one, sight("a"), end=5) == [5]
        assert await recall(other, sight("a"), end=50) == [5]


async def test_a_user_of_whom_nothing_is_known_begins_where_the_process_stands(brokers: OpenBrokers) -> None:
    async with brokers() as (broker,):
        await recall(broker, sight("a"), end=5)
        epoch = (await broker.head()).epoch
        assert await broker.recall(epoch, [sight("a", user="bob", number=3)]) == [3]  # it is behind the end


async def test_what_an_entry_has_changed_holds_since_then(brokers: OpenBrokers) -> None:
    async with brokers(2) as (one, other):
        await recall(one, sight("a"), end=5)
        assert await recall(other, sight("b", changed=7, before="a"), end=8) == [7]
        assert await recall(one, sight("b"), end=20) == [7]


async def test_what_has_changed_nobody_knows_when_holds_since_now(brokers: OpenBrokers) -> None:
    async with brokers() as (broker,):
        await recall(broker, sight("r.a.1"), end=5)
        assert await recall(broker, sight("r.a.2"), end=20) == [21]
        assert await recall(broker, sight("r.a.2"), end=30) == [21]
        assert await recall(broker, sight("r.a.1"), end=40) == [41]


async def test_a_sight_is_new_while_another_may_be_in_use(brokers: OpenBrokers) -> None:
    """Whoever was served by the other one meanwhile, up to the end of now, may come here next."""
    async with brokers(2) as (one, other):
        await recall(one, sight("r.a.1"), end=5)
        assert await recall(other, sight("r.b.1", changed=6), end=8) == [9]
        assert await recall(other, sight("r.b.1"), end=20) == [21]
        assert await recall(one, sight("r.a.1"), end=30) == [31]


async def test_other_rights_are_news_once_and_so_are_the_former_if_they_come_back(brokers: OpenBrokers) -> None:
    async with brokers(2) as (one, other):
        await recall(one, sight("r.a.1"), end=5)
        assert await recall(other, sight("s.b.1"), end=8) == [9]
        assert await recall(other, sight("s.b.1"), end=10) == [9]
        assert await recall(one, sight("r.a.1"), end=20) == [21]
        assert await recall(one, sight("r.a.1"), end=30) == [21]


async def test_what_comes_back_by_an_entry_holds_since_then(brokers: OpenBrokers) -> None:
    async with brokers() as (broker,):
        await recall(broker, sight("a"), end=5)
        await recall(broker, sight("b", changed=7, before="a"), end=8)
        assert await recall(broker, sight("a", changed=19, before="b"), end=20) == [19]


async def test_what_an_entry_has_not_changed_is_no_news(brokers: OpenBrokers) -> None:
    async with brokers() as (broker,):
        await recall(broker, sight("a"), end=5)
        assert await recall(broker, sight("a", changed=7, before="a"), end=8) == [5]


async def test_what_was_told_of_late_is_ended_by_the_entry_that_ended_it(brokers: OpenBrokers) -> None:
    async with brokers(2) as (quick, slow):
        await recall(slow, sight("r.a.1"), end=5)
        await recall(quick, sight("r.a.2", changed=7, before="r.a.1"), end=8)
        assert await recall(slow, sight("r.a.1")) == [9]
        assert await recall(slow, sight("r.a.2", changed=7, before="r.a.1"), end=10) == [7]
        assert await recall(quick, sight("r.a.2"), end=20) == [7]


async def test_what_may_have_been_otherwise_holds_at_least_since_then(brokers: OpenBrokers) -> None:
    async with brokers() as (broker,):
        await recall(broker, sight("a"), end=5)
        assert await recall(broker, sight("a", least=9), end=9) == [9]
        assert await recall(broker, sight("a", least=7)) == [9]


async def test_no_sight_holds_since_a_number_beyond_the_next(brokers: OpenBrokers) -> None:
    async with brokers() as (broker,):
        await recall(broker, sight("a"), end=5)
        assert await recall(broker, sight("a", least=9)) == [6]
        assert await recall(broker, sight("b", changed=9, before="a")) == [6]


async def test_numbers_of_another_epoch_are_refused(brokers: OpenBrokers) -> None:
    async with brokers() as (broker,):
        with pytest.raises(BrokerError):
            await broker.recall("another", [sight("a")])
        assert await recall(broker, sight("a"), end=9) == [9]


DIGESTS = st.sampled_from(["r.a.1", "r.a.2", "r.b.1", "s.a.1", "s.b.2"])
NUMBERS = st.integers(0, 6)
SIGHTS = st.builds(sight, DIGESTS, changed=NUMBERS | st.none(), least=NUMBERS, before=DIGESTS | st.just(""))


JUMPS = st.sampled_from([0, 0, 0, 100, 200, -1000])
"""Of a clock, in seconds."""


async def set_clock(redis_url: str, namespace: str, seconds: int) -> None:
    """Nobody can set the clock of Redis: what it has dated is moved the other way."""
    key = f"{{{namespace}}}:sights"
    async with Redis.from_url(redis_url, decode_responses=True) as redis:
        for field, text in (await redis.hgetall(key)).items():
            words = [one.split() for one in str(text).split(";")[:-1]]
            moved = [f"{digest} {since} {int(told) - seconds};" for digest, since, told in words]
            await redis.hset(key, field, "".join(moved))


class Clocked:
    """A memory broker whose time is set by hand."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.broker = MemoryBroker(**LIMITS, clock=lambda: self.now)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.tuples(SIGHTS, st.booleans(), JUMPS), max_size=12))
async def test_brokers_agree_on_what_users_see_whatever_becomes_of_their_clocks(
    redis_url: str, plan: list[tuple[Sight, bool, int]]
) -> None:
    namespace, world = f"test-{uuid.uuid4().hex}", Clocked()
    async with open_redis(redis_url, namespace) as [redis]:
        brokers: list[Broker] = [world.broker, redis]
        for one, grows, jump in plan:
            world.now += jump
            if jump:
                await set_clock(redis_url, namespace, jump)
            ends = [(await broker.head()).number + grows for broker in brokers]
            answers = [await recall(broker, one, end=end) for broker, end in zip(brokers, ends, strict=True)]
            assert answers[0] == answers[1]


async def test_another_token_is_news_no_longer_than_otherwise_if_redis_clock_was_set_back(
    redis_url: str, namespace: str
) -> None:
    async with open_redis(redis_url, namespace) as [broker]:
        await recall(broker, sight("r.a.1"), end=5)
        await set_clock(redis_url, namespace, -3600)
        assert await recall(broker, sight("r.b.1"), end=20) == [21]
        await set_clock(redis_url, namespace, int(SIGHT_SECONDS))
        assert await recall(broker, sight("r.b.1"), end=30) == [31]  # until just now the other may have been in use
        assert await recall(broker, sight("r.b.1"), end=40) == [31]


async def test_another_token_is_news_no_longer_than_otherwise_if_the_clock_of_memory_was_set_back() -> None:
    world = Clocked()
    await recall(world.broker, sight("r.a.1"), end=5)
    world.now -= 3600
    assert await recall(world.broker, sight("r.b.1"), end=20) == [21]
    world.now += SIGHT_SECONDS
    assert await recall(world.broker, sight("r.b.1"), end=30) == [31]
    assert await recall(world.broker, sight("r.b.1"), end=40) == [31]


async def test_sights_of_users_and_tables_are_told_apart(brokers: OpenBrokers) -> None:
    async with brokers() as (broker,):
        await recall(broker, sight("a"), end=3)
        await recall(broker, sight("a", user="bob"), sight("a", table="u"), end=5)
        asked = [sight("b", changed=8, before="a"), sight("a", user="bob"), sight("a", table="u")]
        assert await recall(broker, *asked, end=9) == [8, 5, 5]


async def test_a_user_has_a_bounded_number_of_sights_in_redis(redis_url: str) -> None:
    namespace = f"test-{uuid.uuid4().hex}"
    async with open_redis(redis_url, namespace) as [broker], Redis.from_url(redis_url, decode_responses=True) as redis:
        for i in range(SIGHTS_OF_A_TABLE + 2):
            await recall(broker, sight(f"r.{i}.1"))
        [kept] = await redis.hvals(f"{{{namespace}}}:sights")
        assert [one.split()[0] for one in str(kept).split(";")[:-1]] == [f"r.{i}.1" for i in range(2, 10)]


async def test_no_sights_are_asked_about_at_no_cost(brokers: OpenBrokers) -> None:
    async with brokers() as (broker,):
        assert await recall(broker) == []


async def test_a_sight_that_nobody_tells_of_any_more_goes_out_of_use() -> None:
    world = Clocked()
    await recall(world.broker, sight("r.a.1"), end=5)
    await recall(world.broker, sight("r.b.1"), end=8)
    world.now += SIGHT_SECONDS - 1
    assert await recall(world.broker, sight("r.b.1"), end=30) == [31]
    world.now += 1
    assert await recall(world.broker, sight("r.b.1"), end=40) == [41]  # until just now it may have been in use
    assert await recall(world.broker, sight("r.b.1"), end=50) == [41]


async def test_a_user_has_a_bounded_number_of_sights_in_memory() -> None:
    world = Clocked()
    for i in range(SIGHTS_OF_A_TABLE + 1):
        await recall(world.broker, sight(f"r.{i}.1"), end=5)
    world.now += SIGHT_SECONDS
    assert await recall(world.broker, sight("r.1.1", changed=3)) == [6]  # others may have been in use since
    assert await recall(world.broker, sight("r.0.1", changed=3)) == [6]
    world.now += SIGHT_SECONDS
    assert await recall(world.broker, sight("r.2.1", changed=3)) == [3]  # forgotten, and so it is news


async def test_what_followed_upon_a_sight_out_of_use_is_news_once() -> None:
    world = Clocked()
    await recall(world.broker, sight("r.a.1"), end=5)
    world.now += SIGHT_SECONDS
    assert await recall(world.broker, sight("r.b.1", changed=7), end=8) == [7]
    assert await recall(world.broker, sight("r.b.1"), end=30) == [7]


async def test_a_user_that_nobody_has_told_of_for_as_long_as_the_history_lasts_is_forgotten() -> None:
    world = Clocked()
    await recall(world.broker, sight("a"), sight("a", user="bob"), end=3)
    world.now += 3000
    await recall(world.broker, sight("a", user="bob"), end=4)
    world.now += 601
    assert await recall(world.broker, sight("a"), sight("a", user="bob"), end=8) == [8, 3]
