"""A bridge that is told to stop: everybody is let go in time, and nobody is taken in any more."""

import asyncio
import os
import re
import signal
import sys
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress

import httpx
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from realtime_bridge.transports.transport_sinks import SocketSink
from tests.bridges import BridgeProcess
from tests.clients import SOCKET, STREAM, Link, Message, http, open_link, open_socket, receive
from tests.services import eventually, token
from tests.steady import ADA, leads, metric
from tests.ways import POSTGRES_WAYS, SHARED_WAYS, Way

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.timeout(120)]

DRAIN_SECONDS = 4.0
ENDED_SECONDS = DRAIN_SECONDS + 2  # for a busy machine; who does not join in a close is waited for much longer
RETRY = re.compile(r"retry in (\d+) ms")
SPREAD_MS = SocketSink.restart_spread_seconds * 1000
MANY = {"BRIDGE_MAX_CONNECTIONS_PER_USER": "1000", "BRIDGE_DRAIN_SECONDS": str(DRAIN_SECONDS)}


def deaf_socket(bridge: BridgeProcess) -> AbstractAsyncContextManager[Link]:
    """A WebSocket of a client that never joins in a close."""
    return open_link(bridge.url, token(ADA), *SOCKET)


async def poll(bridge: BridgeProcess) -> Message:
    async with http(bridge.url, token(ADA)) as client:
        answer = await client.get("/events?wait=60")
    answer.raise_for_status()
    message: Message = answer.json()
    return message


async def farewell(socket: ClientConnection) -> tuple[int | None, int]:
    """With which code it was closed, and the milliseconds after which to come back."""
    with suppress(ConnectionClosed):
        while True:
            await receive(socket)
    found = RETRY.fullmatch(socket.close_reason or "")
    assert found is not None, socket.close_reason
    return socket.close_code, int(found[1])


async def refuses(bridge: BridgeProcess) -> bool:
    """Whether connections are not taken in any more."""
    async with http(bridge.url) as client:
        try:
            await client.get("/healthz", timeout=1)
        except httpx.ConnectError:
            return True
        except httpx.TransportError:  # taken in, and dropped or forgotten
            return False
    return False


async def has_connections(bridge: BridgeProcess, count: int) -> bool:
    return await metric(bridge, "connections") == count


@pytest.mark.parametrize("way", POSTGRES_WAYS, indirect=True)
async def test_everybody_is_let_go_in_time_and_nobody_is_taken_in(way: Way) -> None:
    async with way.bridge(**MANY) as bridge, AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        sockets = [await stack.enter_async_context(open_socket(bridge.url, token(ADA))) for _ in range(100)]
        streams = [await stack.enter_async_context(open_link(bridge.url, token(ADA), *STREAM)) for _ in range(10)]
        polls = [tasks.create_task(poll(bridge)) for _ in range(10)]
        await stack.enter_async_context(deaf_socket(bridge))
        await eventually(lambda: has_connections(bridge, 121))
        bridge.signal(signal.SIGTERM)
        ended = tasks.create_task(asyncio.to_thread(bridge.wait, ENDED_SECONDS))
        farewells = [await farewell(socket) for socket in sockets]
        assert {code for code, _ in farewells} == {1012}
        times = [after_ms for _, after_ms in farewells]
        assert (min(times) < SPREAD_MS / 2 < max(times) <= SPREAD_MS, len(set(times)) > 50) == (True, True)
        for link in streams:
            last = (await link.reader.read()).decode()
            assert re.search(r"(?:^|\n)retry: \d+\n\n$", last), last
        for answer in polls:
            assert (await answer).keys() >= {"messages", "position", "more"}
        assert await refuses(bridge)
        assert not ended.done()  # for the sake of the one that has not joined in
        assert await ended == -signal.SIGTERM


@pytest.mark.parametrize("way", SHARED_WAYS, indirect=True)
async def test_a_leader_hands_over_before_its_clients_have_gone(way: Way) -> None:
    async with way.replicas(2, **MANY, BRIDGE_TAKEOVER_SECONDS="600") as (leader, follower):
        assert await leads(leader)
        async with deaf_socket(leader):
            await eventually(lambda: has_connections(leader, 1))
            leader.signal(signal.SIGTERM)
            ended = asyncio.create_task(asyncio.to_thread(leader.wait, ENDED_SECONDS))
            await eventually(lambda: leads(follower), DRAIN_SECONDS)
            assert not ended.done()
            await ended


def open_standard_input() -> None:
    """Workers inherit it by its number, and what is forked for a test has none."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)


@pytest.mark.parametrize("way", SHARED_WAYS[:1], indirect=True)
async def test_several_workers_let_go_and_take_in_nobody(way: Way) -> None:
    async with way.upstream("public.posts") as settings:
        bridge = BridgeProcess(way.database, "--workers", "2", **settings, **MANY)
        bridge.plant = open_standard_input
        async with bridge:
            async with AsyncExitStack() as stack:
                sockets = [await stack.enter_async_context(open_socket(bridge.url, token(ADA))) for _ in range(20)]
                await stack.enter_async_context(deaf_socket(bridge))
                bridge.signal(signal.SIGTERM)
                ended = asyncio.create_task(asyncio.to_thread(bridge.wait, 2 * DRAIN_SECONDS))
                assert {(await farewell(socket))[0] for socket in sockets} == {1012}
                await eventually(lambda: refuses(bridge), DRAIN_SECONDS)
                assert not ended.done()
                await ended
