"""Bad input: a clear refusal each, one log line at most, and a process that goes on as if nothing had been."""

import asyncio
import base64
import json
import re
import socket
import uuid
from typing import Any

import asyncpg
import httpx
import jwt
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import bearer, http, open_socket, receive, receive_data
from tests.services import eventually, token
from tests.ways import Way

pytestmark = pytest.mark.integration

ADA = str(uuid.UUID(int=1))
AS_ANOTHER = json.dumps({"type": "auth", "token": token(str(uuid.UUID(int=9)))})
RS_HEADER = base64.urlsafe_b64encode(b'{"alg":"RS256","typ":"JWT"}').rstrip(b"=").decode()


async def closed_with(
    url: str, given: str | None, *say: str | bytes, headers: dict[str, str] | None = None, **query: str
) -> tuple[int, str]:
    """Connect, say something, and tell with what code and reason the bridge closes."""
    address = url.replace("http", "ws", 1) + "/ws?" + str(httpx.QueryParams(query))
    sent = {**({} if given is None else bearer(given)), **(headers or {})}
    async with connect(address, additional_headers=sent, compression=None) as client, asyncio.timeout(20):
        for message in say:
            await client.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            await read_on(client)
        assert closed.value.rcvd is not None
        return closed.value.rcvd.code, closed.value.rcvd.reason


async def read_on(client: ClientConnection) -> None:
    while True:
        await client.recv()


async def still_serves(bridge: BridgeProcess, database: str) -> None:
    async with open_socket(bridge.url, token(ADA)) as client:
        assert (await receive(client))["type"] == "ready"
        connection = await asyncpg.connect(database)
        await connection.execute("insert into posts (user_id, title) values ($1, 'alive')", ADA)
        await connection.close()
        assert (await receive_data(client))["record"]["title"] == "alive"


async def a_bridge(database: str, namespace: str, *arguments: str, **settings: str) -> BridgeProcess:
    """One that has what it needs, but is not started: for what is the same on every way."""
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    settings = {"BRIDGE_NAMESPACE": namespace, "BRIDGE_SLOT": namespace.replace("-", "_"), **settings}
    return BridgeProcess(database, *arguments, **settings)


def unsigned(**claims: Any) -> str:
    return jwt.encode({"sub": ADA, "role": "authenticated", "aud": "authenticated", **claims}, "", algorithm="none")


async def test_every_bad_request_gets_a_clear_refusal_and_one_line(way: Way) -> None:
    good = token(ADA)
    foreign = "unknown key" if way.has_public_keys else "algorithm"
    refusals: list[tuple[str, int, str, dict[str, Any]]] = [
        ("garbage token", 4401, "malformed", {"given": "garbage"}),
        ("no signature", 4401, "algorithm", {"given": unsigned()}),
        ("foreign secret", 4401, "signature", {"given": token(ADA, secret="x" * 40)}),
        ("foreign algorithm", 4401, foreign, {"given": RS_HEADER + good[good.index(".") :]}),
        ("expired", 4401, "expired", {"given": token(ADA, ttl=-60)}),
        ("wrong audience", 4401, "audience", {"given": token(ADA, aud="other")}),
        ("no subject", 4401, "sub", {"given": token(None)}),
        ("foreign role", 4403, "role", {"given": token(ADA, role="postgres")}),
        ("service role", 4403, "role", {"given": token(ADA, role="service_role")}),
        ("unknown table", 4400, "public.secrets", {"given": good, "table": "public.secrets"}),
        ("bad table", 4400, "table", {"given": good, "table": "a.b.c"}),
        ("bad filter", 4400, "filter", {"given": good, "table": "posts", "filter": "title"}),
        ("unsupported operator", 4400, "like", {"given": good, "table": "posts", "filter": "title=like.%x"}),
        ("unknown column", 4400, "no column zzz", {"given": good, "table": "posts", "filter": "zzz=eq.1"}),
        ("value of another type", 4400, "not of type", {"given": good, "table": "posts", "filter": "id=eq.abc"}),
        ("bad events", 4400, "events", {"given": good, "events": "TRUNCATE"}),
        ("garbage position", 4400, "position", {"given": good, "position": "yesterday"}),
        ("foreign origin", 4403, "origin", {"given": good, "headers": {"Origin": "https://evil.example"}}),
        ("not JSON", 4400, "JSON", {"given": good, "say": "{"}),
        ("not an object", 4400, "type", {"given": good, "say": "[]"}),
        ("unknown type", 4400, "type", {"given": good, "say": '{"type":"shout"}'}),
        ("binary", 4400, "", {"given": good, "say": b"\0\1"}),
        ("oversized", 4413, "", {"given": good, "say": "x" * 70_000}),
        ("first message is no auth", 4401, "auth", {"given": None, "say": '{"type":"ping"}'}),
        ("auth without a token", 4401, "token", {"given": None, "say": '{"type":"auth"}'}),
        ("auth with garbage", 4401, "malformed", {"given": None, "say": '{"type":"auth","token":"x.y"}'}),
        ("token of another user", 4403, "another", {"given": good, "say": AS_ANOTHER}),
    ]  # fmt: skip
    async with way.bridge() as bridge:
        for name, code, words, request in refusals:
            lines = bridge.lines_of_requests
            say = [request.pop("say")] if "say" in request else []
            closed = await closed_with(bridge.url, request.pop("given"), *say, **request)
            assert (closed[0], words in closed[1]) == (code, True), (name, closed)
            assert bridge.lines_of_requests - lines <= 1, (name, bridge.log)
        await still_serves(bridge, way.database)
        assert not re.search(r"eyJ|garbage|Traceback", bridge.log)


async def test_http_refusals_are_problems(way: Way) -> None:
    async with way.bridge() as bridge, http(bridge.url) as client:
        good = bearer(token(ADA))
        for request, status in [
            ({"url": "/events"}, 401),
            ({"url": "/events", "headers": bearer("x")}, 401),
            ({"url": "/events", "headers": bearer(token(ADA, role="postgres"))}, 403),
            ({"url": "/events?table=public.secrets", "headers": good}, 400),
            ({"url": "/events?position=x", "headers": good}, 400),
            ({"url": "/events?filter=zzz=eq.1", "headers": good}, 400),
            ({"url": "/events?filter=id=eq.abc", "headers": good | {"Accept": "text/event-stream"}}, 400),
            ({"url": "/events?wait=-1", "headers": good}, 400),
            ({"url": "/events?limit=many", "headers": good}, 400),
            ({"url": "/events?wait=0", "headers": good | {"Origin": "https://evil.example"}}, 403),
            ({"url": "/posts"}, 401),
            ({"url": "/posts/999", "headers": good}, 404),
            ({"url": "/"}, 404),
        ]:
            answer = await client.get(**request)  # type: ignore[arg-type]
            assert answer.status_code == status, (request, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert {"type", "title", "status", "detail"} <= set(answer.json())


async def test_a_socket_where_there_is_none_is_refused_with_a_problem(database: str, namespace: str) -> None:
    async with await a_bridge(database, namespace) as bridge:
        for path in ("/wsx", "/", "/healthz", "/ws/x"):
            with pytest.raises(InvalidStatus) as refused:
                await connect(bridge.url.replace("http", "ws", 1) + path)
            answer = refused.value.response
            assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
            assert json.loads(answer.body or b"")["status"] == 404


async def test_a_method_that_a_path_has_not_is_told_all_that_it_has(database: str, namespace: str) -> None:
    async with await a_bridge(database, namespace) as bridge, http(bridge.url, token(ADA)) as client:
        for method, path, allowed in [
            ("PUT", "/posts", "GET, POST, OPTIONS"),
            ("POST", "/posts/1", "GET, PATCH, DELETE, OPTIONS"),
            ("DELETE", "/events", "GET, OPTIONS"),
            ("GET", "/ticket", "POST, OPTIONS"),
        ]:
            answer = await client.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed), path


async def test_health_may_be_asked_for_without_a_body(database: str, namespace: str) -> None:
    async with await a_bridge(database, namespace) as bridge, http(bridge.url) as client:
        for path in ("/healthz", "/readyz"):
            asked, got = await client.head(path), await client.get(path)
            assert (asked.status_code, asked.content) == (got.status_code, b"")
            assert asked.headers["content-type"] == got.headers["content-type"]


async def test_a_position_of_the_future_or_of_another_history_is_answered_by_a_resync(way: Way) -> None:
    async with way.bridge() as bridge, http(bridge.url, token(ADA)) as client:
        position = (await client.get("/events?wait=0")).json()["position"]
        epoch = position.rpartition("-")[0]
        for wrong in (f"{epoch}-999999", "zzzzzzzz-1"):
            async with open_socket(bridge.url, token(ADA), position=wrong) as reader:
                assert (await receive(reader))["position"] != position  # who comes back with it is told again
                message = await receive(reader)
                assert (message["type"], message["reason"]) == ("resync", "history_gone")
                assert message["position"] == position
            body = (await client.get(f"/events?wait=0&position={wrong}")).json()
            assert [m["reason"] for m in body["messages"]] == ["history_gone"]


async def test_invalid_text_on_the_wire_is_refused(way: Way) -> None:
    async with way.bridge() as bridge:
        lines = bridge.lines_of_requests
        async with open_socket(bridge.url, token(ADA)) as client:
            await receive(client)
            await client.send(b"\xff\xfe", text=True)
            with pytest.raises(ConnectionClosed) as caught:
                await receive(client)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1007
        assert bridge.lines_of_requests - lines <= 1
        assert "Traceback" not in bridge.log


async def test_a_client_that_says_too_much_is_cut_off(way: Way) -> None:
    async with way.bridge() as bridge:
        assert (await closed_with(bridge.url, token(ADA), *['{"type":"ping"}'] * 400))[0] == 4429
        await still_serves(bridge, way.database)


async def test_a_user_has_so_many_connections_and_no_more(way: Way) -> None:
    async with way.bridge(BRIDGE_MAX_CONNECTIONS_PER_USER="2") as bridge:
        async with open_socket(bridge.url, token(ADA)) as one, open_socket(bridge.url, token(ADA)) as two:
            await receive(one)
            await receive(two)
            assert (await closed_with(bridge.url, token(ADA)))[0] == 4429
        await eventually(lambda: is_welcome(bridge))


async def is_welcome(bridge: BridgeProcess) -> bool:
    async with open_socket(bridge.url, token(ADA)) as client:
        try:
            return bool((await receive(client))["type"] == "ready")
        except ConnectionClosed:
            return False


async def test_half_open_sockets_and_broken_handshakes_harm_nobody(way: Way) -> None:
    async with way.bridge(BRIDGE_PING_SECONDS="0.5") as bridge:
        silent = [socket.create_connection(("127.0.0.1", bridge.port)) for _ in range(20)]
        for i, link in enumerate(silent):
            link.sendall(
                [b"", b"GET /ws HT", b"\x16\x03\x01garbage\r\n\r\n", b"GET /ws HTTP/1.1\r\nUpgrade: websocket\r\n\r\n"][
                    i % 4
                ]
            )
        await still_serves(bridge, way.database)
        for link in silent:
            link.close()
        assert "Traceback" not in bridge.log


async def test_a_token_ends_where_it_says_and_a_newer_one_goes_on(way: Way) -> None:
    async with way.bridge() as bridge:
        async with (
            open_socket(bridge.url, token(ADA, ttl=6)) as ends,
            open_socket(bridge.url, token(ADA, ttl=6)) as lives,
        ):
            for client in (ends, lives):
                assert (await receive(client))["type"] == "ready"
                assert (await receive(client))["type"] == "auth_expiring"
            await lives.send(json.dumps({"type": "auth", "token": token(ADA)}))
            with pytest.raises(ConnectionClosed) as caught:
                await receive(ends)
            assert caught.value.rcvd is not None
            assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4401, "token expired")
            await lives.send('{"type":"ping"}')
            assert (await receive(lives))["type"] == "pong"


async def test_a_token_may_come_four_ways(way: Way) -> None:
    async with way.bridge() as bridge:
        good = token(ADA)
        async with open_socket(bridge.url, good) as by_header:
            assert (await receive(by_header))["type"] == "ready"
        async with open_socket(bridge.url, None, token=good) as by_query:
            assert (await receive(by_query))["type"] == "ready"
        async with connect(bridge.socket_url, subprotocols=["bearer", good]) as by_subprotocol:  # type: ignore[list-item]
            assert (await receive(by_subprotocol))["type"] == "ready"
            assert by_subprotocol.subprotocol == "bearer"
        async with open_socket(bridge.url, None) as by_message:
            await by_message.send(json.dumps({"type": "auth", "token": good}))
            assert (await receive(by_message))["type"] == "ready"
        assert good not in bridge.log


async def test_several_workers_need_redis(database: str) -> None:
    bridge = BridgeProcess(database, "--workers", "2")
    try:
        assert await asyncio.to_thread(bridge.run) == 2
        assert "REDIS_URL is missing" in bridge.log
        assert "Traceback" not in bridge.log
    finally:
        bridge.forget()


async def test_a_secret_that_is_none_stops_several_workers_before_they_begin(
    database: str, redis_url: str, namespace: str
) -> None:
    settings = {"REDIS_URL": redis_url, "SUPABASE_JWT_SECRET": "ssh-rsa AAAA"}
    bridge = await a_bridge(database, namespace, "--workers", "2", **settings)
    try:
        assert await asyncio.to_thread(bridge.run) == 2
        assert bridge.log.splitlines()[-1].startswith("realtime-bridge: SUPABASE_JWT_SECRET is a public key")
        assert "Traceback" not in bridge.log
    finally:
        bridge.forget()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_port_that_is_taken_ends_it_with_1(workers: str, database: str, redis_url: str, namespace: str) -> None:
    bridge = await a_bridge(database, namespace, "--workers", workers, REDIS_URL=redis_url)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bridge.port = taken.getsockname()[1]
        try:
            assert await asyncio.to_thread(bridge.run) == 1
            assert "already in use" in bridge.log
        finally:
            bridge.forget()
