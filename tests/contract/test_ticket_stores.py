"""The contract of `tickets.TicketStore`, on every store."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeAlias

import pytest
from redis.asyncio import Redis

from realtime_bridge import tickets
from realtime_bridge.auth import Verifier
from realtime_bridge.broker.redis_link import Link
from realtime_bridge.broker.redis_url import parse_redis_url
from realtime_bridge.dev.engines import EmbeddedValkey
from realtime_bridge.errors import UnauthorizedError, UnavailableError
from realtime_bridge.tickets import MemoryTicketStore, RedisTicketStore, Tickets, TicketStore
from tests.services import SECRET, eventually, running, token

OpenStores: TypeAlias = Callable[[int], AbstractAsyncContextManager[tuple[TicketStore, TicketStore]]]


@asynccontextmanager
async def in_redis(url: str, namespace: str, **options: int) -> AsyncIterator[RedisTicketStore]:
    link = Link(parse_redis_url(url), namespace)
    await link.open()
    try:
        yield RedisTicketStore(link, **options)
    finally:
        await link.close()


@pytest.fixture(params=["memory", "redis"])
def stores(request: pytest.FixtureRequest, namespace: str) -> OpenStores:
    """Opens two stores that share their tickets, as two processes would; takes the most that they hold."""
    if request.param == "memory":

        @asynccontextmanager
        async def opened(most: int) -> AsyncIterator[tuple[TicketStore, TicketStore]]:
            store = MemoryTicketStore(most=most)
            yield store, store

        return opened
    url = request.getfixturevalue("redis_url")

    @asynccontextmanager
    async def opened_in_redis(most: int) -> AsyncIterator[tuple[TicketStore, TicketStore]]:
        async with (
            in_redis(url, namespace, most=most) as one,
            in_redis(url, namespace, most=most) as other,
        ):
            yield one, other

    return opened_in_redis


async def test_a_ticket_is_known_to_every_process(stores: OpenStores) -> None:
    async with stores(10) as (one, other):
        await one.put("id", "key")
        assert await other.take("id", "browser", resuming=False) == "key"
        assert await one.take("id", "browser", resuming=False) is None
        assert await one.take("id", "browser", resuming=True) == "key"
        assert await one.take("id", "another", resuming=True) is None
        assert await other.take("unknown", "browser", resuming=True) is None


async def test_of_many_that_come_at_once_one_gets_it(stores: OpenStores) -> None:
    async with stores(10) as pair:
        await pair[0].put("id", "key")
        takes = [pair[i % 2].take("id", f"browser {i}", resuming=bool(i % 3)) for i in range(20)]
        assert sorted(await asyncio.gather(*takes), key=str) == [None] * 19 + ["key"]


async def test_a_resuming_client_may_be_the_first_to_use_a_ticket(stores: OpenStores) -> None:
    async with stores(10) as (one, _):
        await one.put("id", "key")
        assert await one.take("id", "browser", resuming=True) == "key"
        assert await one.take("id", "browser", resuming=False) is None
        assert await one.take("id", "another", resuming=True) is None
        assert await one.take("id", "browser", resuming=True) == "key"


async def test_a_connection_that_does_not_come_back_uses_its_ticket_up(stores: OpenStores) -> None:
    async with stores(10) as (one, other):
        await one.put("id", "key")
        assert await other.take("id", None, resuming=False) == "key"
        for client in (None, "browser"):
            for resuming in (False, True):
                assert await one.take("id", client, resuming=resuming) is None


async def test_a_ticket_of_a_stream_opens_nothing_else(stores: OpenStores) -> None:
    async with stores(10) as (one, other):
        await one.put("id", "key")
        assert await other.take("id", "browser", resuming=False) == "key"
        for resuming in (False, True):
            assert await one.take("id", None, resuming=resuming) is None
        assert await one.take("id", "browser", resuming=True) == "key"


async def test_a_full_store_forgets_what_was_touched_longest_ago(stores: OpenStores) -> None:
    async with stores(3) as (one, other):
        for name in "abc":
            await one.put(name, name)
        assert await other.take("a", "browser", resuming=False) == "a"
        await one.put("d", "d")
        await other.put("e", "e")
        assert [await one.take(name, "browser", resuming=True) for name in "abcde"] == ["a", None, None, "d", "e"]


async def test_a_ticket_issued_by_one_replica_is_redeemed_by_another(stores: OpenStores) -> None:
    verify = Verifier(secret=SECRET).verify
    async with stores(10) as (one, other):
        ticket, _ = await Tickets(one, verify).issue(token("ada"))
        assert (await Tickets(other, verify).redeem(ticket, "b")).subject == "ada"
        with pytest.raises(UnauthorizedError):
            await Tickets(one, verify).redeem(ticket, "b")
        assert (await Tickets(one, verify).redeem(ticket, "b", resuming=True)).subject == "ada"


# -- Redis alone -------------------------------------------------------------------------------------------------------


async def test_what_redis_keeps_ends_by_itself_and_never_holds_the_token(redis_url: str, namespace: str) -> None:
    text = token("ada")
    async with in_redis(redis_url, namespace) as store, Redis.from_url(redis_url) as redis:
        ticket, _ = await Tickets(store, Verifier(secret=SECRET).verify).issue(text)
        keys = [key async for key in redis.scan_iter(f"{{{namespace}}}:*")]
        assert len(keys) == 2
        for key in keys:
            assert 0 < await redis.ttl(key) <= 86_400
        kept = str(await redis.hgetall(f"{{{namespace}}}:tickets"))
    assert not any(part in kept for part in [*text.split("."), ticket])


async def test_redis_too_lets_a_ticket_wait_only_so_long(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tickets, "FRESH_SECONDS", -1)
    async with in_redis(redis_url, namespace) as store:
        await store.put("id", "key")
        for resuming in (False, True):
            assert await store.take("id", "browser", resuming=resuming) is None


async def test_namespaces_keep_their_tickets_apart(redis_url: str, namespace: str) -> None:
    async with (
        in_redis(redis_url, namespace) as ours,
        in_redis(redis_url, f"{namespace}-other") as theirs,
    ):
        await ours.put("id", "key")
        assert await theirs.take("id", "browser", resuming=False) is None


@pytest.mark.fault
async def test_without_redis_a_ticket_is_neither_issued_nor_refused_and_afterwards_all_is_well() -> None:
    with running(EmbeddedValkey()) as server:
        async with in_redis(server.url, "faults") as store:
            bureau = Tickets(store, Verifier(secret=SECRET).verify)
            ticket, _ = await bureau.issue(token("ada"))
            server.freeze()
            try:
                with pytest.raises(UnavailableError, match="tickets"):
                    await bureau.issue(token("ada"))
            finally:
                server.thaw()

            async def redeemed() -> str | None:
                return (await bureau.redeem(ticket, "b", resuming=True)).subject

            assert await eventually(redeemed) == "ada"
