"""Tickets in place of tokens, on every way in, on real bridges."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from realtime_bridge.dev.engines import EmbeddedValkey
from tests.bridges import BridgeProcess
from tests.clients import Message, bearer, open_socket, receive, receive_data
from tests.integration.test_streams import Stream
from tests.services import eventually, running, token
from tests.ways import SHARED_WAYS, Way

pytestmark = pytest.mark.integration

ADA = str(uuid.UUID(int=1))
BROWSER = {"User-Agent": "Browser/1"}


async def ticket_of(bridge: BridgeProcess, given: str | None = None) -> str:
    """A ticket for a token, Ada's if none is given."""
    async with httpx.AsyncClient(headers=bearer(given or token(ADA))) as http:
        answer = await http.post(f"{bridge.url}/ticket")
    assert answer.status_code == 200, answer.text
    ticket: str = answer.json()["ticket"]
    return ticket


@asynccontextmanager
async def request(bridge: BridgeProcess, ticket: str, last: str = "", **headers: str) -> AsyncIterator[httpx.Response]:
    """`GET /events?ticket=` as an EventSource asks for it; as its reconnect with the id seen `last`."""
    given = {**BROWSER, "Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {}), **headers}
    async with (
        httpx.AsyncClient(timeout=httpx.Timeout(20, read=None)) as http,
        http.stream("GET", f"{bridge.url}/events", params={"ticket": ticket}, headers=given) as response,
    ):
        yield response


@asynccontextmanager
async def stream_of(bridge: BridgeProcess, ticket: str, last: str = "") -> AsyncIterator[Stream]:
    async with request(bridge, ticket, last) as response:
        assert response.status_code == 200, await response.aread()
        yield Stream(response)


async def refusal(bridge: BridgeProcess, ticket: str, last: str = "", **headers: str) -> tuple[int, str]:
    """Status and detail of what a stream is refused with."""
    async with request(bridge, ticket, last, **headers) as response:
        problem = json.loads(await response.aread())
        assert response.headers["content-type"] == "application/problem+json"
        return response.status_code, problem["detail"]


async def closed_with(bridge: BridgeProcess, query: dict[str, str]) -> tuple[int, str]:
    """Code and reason with which a WebSocket is refused."""
    async with connect(f"{bridge.socket_url}?{httpx.QueryParams(query)}") as socket:
        with pytest.raises(ConnectionClosed) as caught:
            await receive(socket)
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code, caught.value.rcvd.reason


async def write(database: str, *titles: str) -> None:
    connection = await asyncpg.connect(database)
    for title in titles:
        await connection.execute("insert into posts (user_id, title) values ($1, $2)", ADA, title)
    await connection.close()


async def titles(stream: Stream, count: int) -> list[str]:
    return [(await stream.receive_data())["record"]["title"] for _ in range(count)]


async def test_a_ticket_is_given_for_a_token_that_holds(way: Way) -> None:
    async with way.bridge() as bridge, httpx.AsyncClient(base_url=bridge.url) as http:
        answer = await http.post("/ticket", headers=bearer(token(ADA)))
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        assert set(answer.json()) == {"ticket", "expires_in"}
        assert answer.json()["expires_in"] == 30
        assert 0 <= (await http.post("/ticket", headers=bearer(token(ADA, ttl=9)))).json()["expires_in"] <= 9
        refusals: list[tuple[dict[str, str], int, str]] = [
            ({}, 401, "missing"),
            ({"Authorization": "Basic eA=="}, 401, "missing"),
            (bearer("garbage"), 401, "malformed"),
            (bearer(token(ADA, ttl=-1)), 401, "expired"),
            (bearer(token(ADA, role="postgres")), 403, "role"),
            (bearer(token(ADA)) | {"Origin": "https://evil.example"}, 403, "origin"),
        ]
        for headers, status, words in refusals:
            refused = await http.post("/ticket", headers=headers)
            assert refused.status_code == status, (headers, refused.text)
            assert refused.headers["content-type"] == "application/problem+json"
            assert words in refused.json()["detail"]
        assert (await http.post(f"/ticket?token={token(ADA)}")).status_code == 401
        assert (await http.get("/ticket", headers=bearer(token(ADA)))).status_code == 405


async def test_a_ticket_opens_one_websocket_and_nothing_more(way: Way) -> None:
    async with way.bridge(BRIDGE_TOKEN_IN_QUERY="false") as bridge:
        ticket = await ticket_of(bridge)
        async with open_socket(bridge.url, None, ticket=ticket) as socket:
            ready: Message = await receive(socket)
            assert (ready["type"], ready["tables"]) == ("ready", ["public.posts"])
            await write(way.database, "hello")
            assert (await receive_data(socket))["record"]["title"] == "hello"
            await socket.send(json.dumps({"type": "auth", "token": token(ADA, ttl=7200)}))
            await socket.send('{"type":"ping"}')
            assert (await receive(socket))["type"] == "pong"
        assert await closed_with(bridge, {"ticket": ticket}) == (
            4401,
            "token refused: the ticket is unknown, too old or used",
        )
        assert (await refusal(bridge, ticket, last=ready["position"]))[0] == 401
        assert ticket not in bridge.log


async def test_a_stream_comes_back_with_its_ticket_and_misses_nothing(way: Way) -> None:
    async with way.bridge(BRIDGE_TOKEN_IN_QUERY="false") as bridge:
        ticket = await ticket_of(bridge)
        async with stream_of(bridge, ticket) as stream:
            await stream.receive()
            await write(way.database, "one", "two")
            assert await titles(stream, 1) == ["one"]
            last = stream.last_id
        await write(way.database, "three")
        for _ in range(2):
            async with stream_of(bridge, ticket, last) as again:
                assert await titles(again, 2) == ["two", "three"]
        for wrong in (
            await refusal(bridge, ticket),
            await refusal(bridge, ticket, last, **{"User-Agent": "Browser/2"}),
            await refusal(bridge, ticket, last, Origin=bridge.url),
        ):
            assert wrong == (401, "token refused: the ticket is unknown, too old or used")
        assert (await closed_with(bridge, {"ticket": ticket}))[0] == 4401
        async with stream_of(bridge, ticket, last) as again:
            assert await titles(again, 2) == ["two", "three"]
        assert ticket not in bridge.log


async def test_a_stream_does_not_come_back_once_its_token_has_ended(way: Way) -> None:
    async with way.bridge() as bridge:
        ticket = await ticket_of(bridge, token(ADA, ttl=6))
        async with stream_of(bridge, ticket) as stream:
            assert (await stream.receive())["type"] == "ready"
            while (message := await stream.receive())["type"] != "error":
                pass
            assert message["code"] == 4401
        assert await refusal(bridge, ticket, stream.last_id) == (401, "token refused: expired")


async def test_a_ticket_is_good_for_one_poll(way: Way) -> None:
    async with way.bridge() as bridge, httpx.AsyncClient(base_url=bridge.url, timeout=20) as http:
        query = {"ticket": await ticket_of(bridge), "wait": "0"}
        first = await http.get("/events", params=query)
        assert (first.status_code, first.json()["messages"]) == (200, [])
        for headers in ({}, {"Last-Event-ID": first.json()["position"]}):
            assert (await http.get("/events", params=query, headers=headers)).status_code == 401


async def test_bad_tickets_are_refused_with_one_line_each(way: Way) -> None:
    async with way.bridge() as bridge:
        good, secret = await ticket_of(bridge), token(ADA)
        wrong = good[:-4] + "AAAA"
        for query, code in [
            ({"ticket": "garbage"}, 4401),
            ({"ticket": "€" * 40}, 4401),
            ({"ticket": secret}, 4401),
            ({"ticket": wrong}, 4401),
            ({"ticket": good}, 4401),  # used up by the one before: it has the same id
            ({"ticket": good, "token": secret}, 4400),
        ]:
            lines = bridge.lines_of_requests
            assert (await closed_with(bridge, query))[0] == code, query
            assert bridge.lines_of_requests - lines <= 1
        assert (await refusal(bridge, "garbage"))[0] == 401
        assert await refusal(bridge, good, **bearer(secret)) == (400, "token and ticket: give one of them")
        for text in (good, wrong, secret, "garbage", "Traceback"):
            assert text not in bridge.log


async def test_a_parameter_that_is_not_understood_leaves_the_ticket_good(way: Way) -> None:
    async with way.bridge() as bridge:
        ticket = await ticket_of(bridge)
        assert (await closed_with(bridge, {"ticket": ticket, "table": "public.secrets"}))[0] == 4400
        async with open_socket(bridge.url, None, ticket=ticket) as socket:
            assert (await receive(socket))["type"] == "ready"


@pytest.mark.parametrize("way", SHARED_WAYS, indirect=True)
async def test_replicas_know_each_others_tickets(way: Way) -> None:
    async with way.replicas(2) as (one, other):
        for_socket, for_stream = await ticket_of(one), await ticket_of(one)
        async with open_socket(other.url, None, ticket=for_socket) as socket:
            assert (await receive(socket))["type"] == "ready"
        assert (await closed_with(one, {"ticket": for_socket}))[0] == 4401
        async with stream_of(other, for_stream) as stream:
            await stream.receive()
            await write(way.database, "one", "two")
            assert await titles(stream, 1) == ["one"]
        other.stop()
        async with stream_of(one, for_stream, stream.last_id) as again:
            assert await titles(again, 1) == ["two"]
        assert (await refusal(one, for_stream))[0] == 401
        for bridge in (one, other):
            assert for_socket not in bridge.log
            assert for_stream not in bridge.log


@pytest.mark.fault
@pytest.mark.parametrize("way", SHARED_WAYS, indirect=True)
async def test_without_redis_a_ticket_is_unavailable_and_not_wrong(way: Way) -> None:
    with running(EmbeddedValkey()) as valkey:
        async with way.bridge(REDIS_URL=valkey.url) as bridge:
            ticket = await ticket_of(bridge)
            valkey.freeze()
            try:
                async with httpx.AsyncClient(headers=bearer(token(ADA)), timeout=20) as http:
                    answer: Any = await http.post(f"{bridge.url}/ticket")
                    assert (answer.status_code, answer.json()["detail"]) == (503, "tickets cannot be kept now")
                    assert answer.headers["retry-after"]
                assert (await refusal(bridge, ticket))[0] == 503
                assert (await closed_with(bridge, {"ticket": ticket}))[0] == 1013
            finally:
                valkey.thaw()

            async def opens() -> bool:
                async with open_socket(bridge.url, None, ticket=await ticket_of(bridge)) as socket:
                    return bool((await receive(socket))["type"] == "ready")

            async with asyncio.timeout(30):
                await bridge.ready()
            assert await eventually(opens)
