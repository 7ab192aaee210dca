"""The bridge inside an application of one's own, under a plain uvicorn and under the one with the fast path."""

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import httpx
import pytest

from realtime_bridge.dev.processes import reserve_port
from tests.bridges import environment
from tests.clients import bearer, http, open_socket, receive, receive_data
from tests.services import eventually, token
from tests.ways import Way

pytestmark = pytest.mark.integration

ADA = str(uuid.UUID(int=1))
ROOT = Path(__file__).parents[2]
CLASSES = "realtime_bridge.transports.uvicorn_protocol:"
FAST = ["--ws", f"{CLASSES}BridgeWebSocketProtocol", "--http", f"{CLASSES}BridgeHttpProtocol"]


@asynccontextmanager
async def own_application(database: str, settings: dict[str, str], *arguments: str) -> AsyncIterator[str]:
    """`uvicorn examples.own_app:app`, with an access log: its address. No credential may be in what it prints."""
    with reserve_port() as held:
        port = held.getsockname()[1]
    given = environment(database, **settings)
    command = [sys.executable, "-m", "uvicorn", "examples.own_app:app", "--port", str(port), *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    url = f"http://127.0.0.1:{port}"

    async def is_ready() -> bool:
        try:
            return (await client.get("/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    try:
        async with http(url) as client:
            await eventually(is_ready, 30)
        yield url
    finally:
        process.terminate()
        printed = await process.stdout.read()
        await process.wait()
    assert b"Traceback" not in printed, printed.decode()
    assert b"GET /readyz" in printed
    for credential in (b"eyJ", b"token=", b"ticket="):
        assert credential not in printed


@pytest.mark.parametrize("arguments", [[], FAST], ids=["plain", "fast"])
async def test_an_application_of_ones_own_carries_the_bridge(arguments: list[str], way: Way) -> None:
    async with way.upstream("public.posts") as settings, own_application(way.database, settings, *arguments) as url:
        async with http(url, token(ADA)) as client:
            assert (await client.get("/whoami")).json() == {"sub": ADA, "role": "authenticated"}
            async with open_socket(url, None, token=token(ADA)) as socket:
                assert (await receive(socket))["type"] == "ready"
                assert (await client.post("/posts", json={"title": "mine"})).status_code == 201
                assert (await receive_data(socket))["record"]["title"] == "mine"
            async with client.stream("GET", "/events", headers={"Accept": "text/event-stream"}) as stream:
                lines = stream.aiter_lines()
                while not (line := await anext(lines)).startswith("data: "):
                    pass
                assert json.loads(line.removeprefix("data: "))["type"] == "ready"
                assert (await client.post("/posts", json={"title": "again"})).status_code == 201
                while not (line := await anext(lines)).startswith('data: {"type":"INSERT"'):
                    pass
            connection = await asyncpg.connect(way.database)
            assert await connection.fetchval("select count(*) from posts") == 2
            await connection.close()


@pytest.mark.parametrize("arguments", [[], FAST], ids=["plain", "fast"])
async def test_a_page_of_another_host_uses_a_ticket_there(arguments: list[str], way: Way) -> None:
    app = "https://app.example.com"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with (
        way.upstream("public.posts") as settings,
        own_application(way.database, {**settings, "BRIDGE_ALLOWED_ORIGINS": app}, *arguments) as url,
        httpx.AsyncClient(base_url=url, headers={"Origin": app}) as page,
    ):
        for path in ("/ticket", "/posts"):
            assert (await page.options(path, headers=asked)).headers["access-control-allow-origin"] == app
        answers = [await page.post("/ticket", headers=bearer(token(ADA))) for _ in range(2)]
        assert {answer.headers["access-control-allow-origin"] for answer in answers} == {app}
        for_socket, for_stream = (answer.json()["ticket"] for answer in answers)
        async with open_socket(url, None, ticket=for_socket) as socket:
            assert (await receive(socket))["type"] == "ready"
        for ticket, status in [(for_socket, 401), (for_stream, 200)]:
            accept = {"Accept": "text/event-stream"}
            async with page.stream("GET", "/events", params={"ticket": ticket}, headers=accept) as stream:
                assert stream.status_code == status
                assert stream.headers["access-control-allow-origin"] == app
