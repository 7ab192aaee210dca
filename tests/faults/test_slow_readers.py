"""Clients that stop reading, read a byte a second, or vanish: no cost to others, no memory beyond their buffer."""

import asyncio
import ctypes
import re
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from realtime_bridge.transports import transport_sinks
from tests.bridges import BridgeProcess
from tests.clients import SOCKET, STREAM, Link, http, open_link, open_socket, receive, receive_data
from tests.proxies import Proxy
from tests.services import eventually, token
from tests.steady import ADA, metric
from tests.ways import Way

pytestmark = [
    pytest.mark.integration,
    pytest.mark.fault,
    pytest.mark.timeout(120),
    pytest.mark.parametrize("way", ["postgres-valkey"], indirect=True),
]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a socket filter drops what arrives")

SLOW = 40
ROWS, BODY = 200, "x" * 40_000
ALL_BYTES = ROWS * len(BODY)
PING_SECONDS = 1.0
NOTICED_SECONDS = 2 * PING_SECONDS + 5 + transport_sinks.CLOSE_SECONDS + 5
"""Without a sign of life, and for the close that the peer may join in; the last five for a busy machine."""


async def write(way: Way, count: int) -> None:
    """Insert posts with the titles 0, 1, 2 …"""
    connection = await asyncpg.connect(way.database)
    rows = [(ADA, str(number), BODY) for number in range(count)]
    await connection.executemany("insert into posts (user_id, title, body) values ($1, $2, $3)", rows)
    await connection.close()


async def titles(link: Link, count: int) -> list[int]:
    """Read until so many titles have come."""
    found: list[int] = []
    rest = b""
    async with asyncio.timeout(60):
        while len(found) < count:
            data = rest + await link.reader.read(1 << 20)
            assert len(data) > len(rest), "the link has ended"
            matches = list(re.finditer(rb'"title":"(\d+)"', data))
            found += [int(match[1]) for match in matches]
            rest = data[matches[-1].end() if matches else 0 :][-40:]
    return found


def patient() -> None:
    """Planted: a test on a busy machine may take its time."""
    transport_sinks.UNACKNOWLEDGED_SECONDS = 300.0  # type: ignore[misc]


def impatient() -> None:
    """Planted: what else waits for half a minute."""
    transport_sinks.UNACKNOWLEDGED_SECONDS = 2.0  # type: ignore[misc]


@asynccontextmanager
async def bridge_of(way: Way, plant: Callable[[], None], *, ping_seconds: float) -> AsyncIterator[BridgeProcess]:
    async with way.upstream("public.posts") as settings:
        limits = {"BRIDGE_MAX_CONNECTIONS_PER_USER": "1000", "BRIDGE_PING_SECONDS": str(ping_seconds)}
        bridge = BridgeProcess(way.database, **settings, **limits)
        bridge.plant = plant
        async with bridge:
            yield bridge


# -- who does not read, or hardly ----------------------------------------------------------------------------------


async def all_of_it(link: Link) -> None:
    while await link.reader.read(1 << 20):
        pass


async def not_at_all(link: Link) -> None:
    await asyncio.Event().wait()


async def a_byte_a_second(link: Link) -> None:
    while True:
        assert await link.reader.read(1)
        await asyncio.sleep(1)


@pytest.mark.parametrize("kind", [SOCKET, STREAM], ids=["socket", "stream"])
@pytest.mark.parametrize("read", [not_at_all, a_byte_a_second])
async def test_slow_readers_cost_nobody_else_and_catch_up(
    read: Callable[[Link], Coroutine[None, None, None]], kind: tuple[str, ...], way: Way
) -> None:
    async with bridge_of(way, patient, ping_seconds=60) as bridge, AsyncExitStack() as stack:
        links = [await stack.enter_async_context(open_link(bridge.url, token(ADA), *kind)) for _ in range(SLOW)]
        quick = await stack.enter_async_context(open_socket(bridge.url, token(ADA)))
        assert (await receive(quick))["type"] == "ready"
        reading = [asyncio.create_task(read(link)) for link in links]
        before = bridge.memory()
        await write(way, ROWS)
        assert [(await receive_data(quick))["record"]["title"] for _ in range(ROWS)] == [str(n) for n in range(ROWS)]
        await eventually(lambda: are_behind(bridge, SLOW))
        assert bridge.memory() - before < SLOW * ALL_BYTES / 3
        read_for_them = await metric(bridge, "delivered_total")
        await write(way, 1)
        assert (await receive_data(quick))["record"]["title"] == "0"
        assert await metric(bridge, "delivered_total") == read_for_them + 1  # they are not tried again and again
        await ended(reading)
        for link in links[:3]:
            assert await titles(link, ROWS + 1) == [*range(ROWS), 0]
        reading = [asyncio.create_task(all_of_it(link)) for link in links[:3]]
        await eventually(lambda: are_behind(bridge, SLOW - 3))
        await ended(reading)


async def ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def are_behind(bridge: BridgeProcess, count: int) -> bool:
    return await metric(bridge, "subscriptions_behind") == count


# -- who vanishes --------------------------------------------------------------------------------------------------


def vanish(link: Link) -> None:
    """Take in nothing that arrives any more, and so acknowledge nothing: the client's machine is gone.

    Source: socket(7), SO_ATTACH_FILTER; the one instruction is "return 0".
    """
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    link.socket.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", 1, ctypes.addressof(program)))


async def test_a_socket_that_went_silent_is_noticed_by_its_pings(way: Way) -> None:
    async with bridge_of(way, impatient, ping_seconds=PING_SECONDS) as bridge, Proxy(bridge.port) as road:
        async with open_socket(f"http://127.0.0.1:{road.port}", token(ADA)) as client:
            await eventually(lambda: has_connections(bridge, 1))
            road.is_deaf = True
            await eventually(lambda: has_connections(bridge, 0), NOTICED_SECONDS)
            client.transport.abort()


@linux_only
async def test_a_stream_whose_client_vanished_is_noticed_by_its_comments(way: Way) -> None:
    async with bridge_of(way, impatient, ping_seconds=PING_SECONDS) as bridge:
        async with open_link(bridge.url, token(ADA), *STREAM) as link:
            await eventually(lambda: has_connections(bridge, 1))
            vanish(link)
            await eventually(lambda: has_connections(bridge, 0), NOTICED_SECONDS)


async def has_connections(bridge: BridgeProcess, count: int) -> bool:
    return await metric(bridge, "connections") == count


@linux_only
async def test_an_answer_that_nobody_takes_is_dropped_in_time(way: Way) -> None:
    """A long poll's: its link is none of the hub's connections, and has no pings."""
    async with bridge_of(way, impatient, ping_seconds=PING_SECONDS) as bridge:
        async with http(bridge.url, token(ADA)) as client:
            start = (await client.get("/events?wait=0")).json()["position"]
        await write(way, 100)
        with socket.socket() as client_socket:
            client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client_socket.connect(("127.0.0.1", bridge.port))
            lines = [f"GET /events?position={start} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {token(ADA)}"]
            client_socket.sendall("\r\n".join([*lines, "", ""]).encode())
            head = await asyncio.to_thread(client_socket.recv, 1024)
            length = re.search(rb"content-length: (\d+)", head, re.I)
            assert length is not None
            assert int(length[1]) > 1_000_000
            assert links_to(bridge.port) == 1
            await eventually(lambda: links_to(bridge.port) == 0, 30)


def links_to(port: int) -> int:
    """Established connections of a server, as its kernel has them."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(local.rpartition(":")[2], 16) == port and state == "01" for _, local, _, state, *_ in lines)
