"""Server-Sent Events: the same story as a WebSocket and a long poll, resumed by `Last-Event-ID`."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import httpx
import pytest

from tests.bridges import BridgeProcess
from tests.clients import Copy, Message, bearer, http, open_socket, receive_data
from tests.services import eventually, token
from tests.ways import Way

pytestmark = pytest.mark.integration

ADA, BOB = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))


class Stream:
    """An event stream as a browser reads it."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.last_id = ""
        self.retry = 0
        self.comments = 0
        self._lines = response.aiter_lines()

    async def receive(self, timeout: float = 10) -> Message:
        data = ""
        async with asyncio.timeout(timeout):
            async for line in self._lines:
                name, _, value = line.partition(": ")
                if line == "" and data:
                    message: Message = json.loads(data)
                    return message
                match name:
                    case "data":
                        data = value
                    case "id":
                        self.last_id = value
                    case "retry":
                        self.retry = int(value)
                    case ":" | "":
                        self.comments += line.startswith(":")
        raise EOFError

    async def receive_data(self) -> Message:
        while not ((message := await self.receive())["type"].isupper() or message["type"] == "resync"):
            pass
        return message


async def read_on(stream: Stream, messages: list[Message]) -> None:
    """Until it ends."""
    with suppress(EOFError):
        while True:
            messages.append(await stream.receive())


@asynccontextmanager
async def stream_of(url: str, user: str, *, ttl: float = 3600, last: str = "", **query: str) -> AsyncIterator[Stream]:
    given = {**bearer(token(user, ttl=ttl)), "Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
    async with (
        httpx.AsyncClient(timeout=httpx.Timeout(20, read=None), verify=False) as client,
        client.stream("GET", f"{url}/events", params=query, headers=given) as response,
    ):
        assert response.status_code == 200
        yield Stream(response)


async def write(database: str, *titles: str, user: str = ADA) -> None:
    connection = await asyncpg.connect(database)
    for title in titles:
        await connection.execute("insert into posts (user_id, title) values ($1, $2)", user, title)
    await connection.close()


async def test_a_stream_begins_with_ready_and_its_headers_suit_a_proxy(way: Way) -> None:
    async with way.bridge() as bridge, stream_of(bridge.url, ADA) as stream:
        headers = stream.response.headers
        assert headers["content-type"].startswith("text/event-stream")
        assert (headers["x-accel-buffering"], headers["cache-control"]) == ("no", "no-store")
        assert "transfer-encoding" not in headers
        ready = await stream.receive()
        assert (ready["type"], stream.retry > 0, stream.last_id) == ("ready", True, ready["position"])


async def test_three_transports_of_one_user_tell_the_same_story(way: Way) -> None:
    async with way.bridge() as bridge:
        poll = Copy(bridge.url, token(ADA))
        async with (
            stream_of(bridge.url, ADA) as stream,
            stream_of(bridge.url, BOB) as other,
            open_socket(bridge.url, token(ADA)) as socket,
            http(bridge.url) as client,
        ):
            await stream.receive()
            await other.receive()
            await poll.poll(client, wait=0)
            await write(way.database, "one", "zwei €", "three\n\r\n")
            await write(way.database, "bob's", user=BOB)
            told: dict[str, list[Any]] = {
                "stream": [await stream.receive_data() for _ in range(3)],
                "socket": [await receive_data(socket) for _ in range(3)],
            }
            while len(poll.history) < 3:
                await poll.poll(client, wait=5)
            assert told["stream"] == told["socket"] == poll.history
            assert [m["record"]["title"] for m in poll.history] == ["one", "zwei €", "three\n\r\n"]
            assert (await other.receive_data())["record"]["title"] == "bob's"


async def test_a_stream_is_resumed_by_its_last_event_id(way: Way) -> None:
    async with way.bridge() as bridge:
        async with stream_of(bridge.url, ADA) as stream:
            await stream.receive()
            await write(way.database, "one", "two")
            assert (await stream.receive_data())["record"]["title"] == "one"
            last = stream.last_id
        await write(way.database, "three")
        async with stream_of(bridge.url, ADA, last=last) as again:
            assert [(await again.receive_data())["record"]["title"] for _ in range(2)] == ["two", "three"]


async def test_a_stream_pings_and_ends_with_its_token(way: Way) -> None:
    async with way.bridge(BRIDGE_PING_SECONDS="0.5") as bridge:
        async with stream_of(bridge.url, ADA, ttl=6) as stream:
            messages = [await stream.receive()]
            while messages[-1]["type"] != "error":
                messages.append(await stream.receive())
            kinds = [message["type"] for message in messages]
            assert kinds[:2] == ["ready", "auth_expiring"]
            assert "ping" in kinds
            assert (messages[-1]["code"], messages[-1]["detail"]) == (4401, "token expired")
            with pytest.raises(EOFError):
                await stream.receive()
            assert stream.comments > 0


async def test_a_stream_with_a_filter_on_a_column_that_is_dropped_says_so_and_ends(way: Way) -> None:
    async with way.bridge(BRIDGE_RESYNC_SECONDS="0.2") as bridge, http(bridge.url, token(ADA)) as client:
        async with stream_of(bridge.url, ADA, table="posts", filter="body=eq.x") as stream:
            await stream.receive()
            connection = await asyncpg.connect(way.database)
            await connection.execute("alter table posts drop column body")
            await connection.close()
            messages: list[Message] = []
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(read_on(stream, messages))
                while not reading.done():
                    await write(way.database, "another")
                    await asyncio.wait((reading,), timeout=0.2)
            assert (messages[-1]["type"], messages[-1]["code"]) == ("error", 4400)
            assert "body" in messages[-1]["detail"]
            assert {message["type"] for message in messages[:-1]} <= {"resync"}
            answer = await client.get(
                "/events", params={"table": "posts", "filter": "body=eq.x", "position": stream.last_id}
            )
            assert (answer.status_code, "body" in answer.json()["detail"]) == (400, True)


async def test_a_stopping_server_tells_when_to_come_back(way: Way) -> None:
    async with way.bridge() as bridge, stream_of(bridge.url, ADA) as stream:
        await stream.receive()
        before, stream.retry = stream.retry, -1
        assert before > 0
        stopping = asyncio.create_task(asyncio.to_thread(bridge.stop))
        with pytest.raises(EOFError):
            await stream.receive()
        assert stream.retry >= 0
        assert await stopping in (0, -15)


async def test_a_reader_of_nothing_falls_behind_and_one_that_is_gone_is_forgotten(way: Way) -> None:
    async with way.bridge(BRIDGE_TAKEOVER_SECONDS="30") as bridge:  # a burst may keep the leader busy
        async with stream_of(bridge.url, ADA) as stream:
            await stream.receive()
            connection = await asyncpg.connect(way.database)
            rows = [(ADA, str(i), "x" * 30_000) for i in range(600)]
            await connection.executemany("insert into posts (user_id, title, body) values ($1, $2, $3)", rows)
            await connection.close()
            await eventually(lambda: metric(bridge, "subscriptions_behind", 1))
            assert [(await stream.receive_data())["record"]["title"] for _ in range(600)] == [
                str(i) for i in range(600)
            ]
        await eventually(lambda: metric(bridge, "connections", 0))


async def metric(bridge: BridgeProcess, name: str, value: float) -> bool:
    async with http(bridge.url) as client:
        return f"realtime_bridge_{name} {value:.1f}\n" in (await client.get("/metrics")).text
