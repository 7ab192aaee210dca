"""Pages of other hosts: refused everywhere unless their origin is named, and then told so in their browser's words."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import httpx
import pytest
from playwright.async_api import Browser
from websockets.asyncio.client import connect
from websockets.typing import Origin

from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.browser.conftest import browser  # noqa: F401  (a fixture)
from tests.clients import bearer, receive
from tests.services import token

pytestmark = pytest.mark.integration

ADA = str(uuid.UUID(int=1))
APP, EVIL = "https://app.example.com", "https://evil.example"
EXPOSED = {"realtime-position", "link", "retry-after"}


@asynccontextmanager
async def a_bridge(database: str, namespace: str, **settings: str) -> AsyncIterator[BridgeProcess]:
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    settings |= {"BRIDGE_SLOT": namespace.replace("-", "_"), "BRIDGE_NAMESPACE": namespace}
    async with BridgeProcess(database, **settings) as bridge:
        yield bridge


def words(answer: httpx.Response, header: str) -> set[str]:
    return {word.strip().lower() for word in answer.headers.get(header, "").split(",")}


async def test_every_route_tells_an_allowed_page_and_refuses_another(database: str, namespace: str) -> None:
    requests: list[tuple[str, str, dict[str, Any], int]] = [
        ("GET", "/events?wait=0", {}, 200),
        ("GET", "/events", {"headers": {"Accept": "text/event-stream"}}, 200),
        ("GET", "/events?table=public.secrets", {}, 400),
        ("POST", "/ticket", {}, 200),
        ("POST", "/ticket", {"headers": {"Authorization": "Bearer x"}}, 401),
        ("GET", "/posts", {}, 200),
        ("POST", "/posts", {"json": {"title": "hello"}}, 201),
        ("POST", "/posts", {"json": {"title": 1}}, 422),
        ("PATCH", "/posts/1", {"json": {"title": "again"}}, 200),
        ("DELETE", "/posts/1", {}, 204),
        ("GET", "/posts/1", {}, 404),
        ("GET", "/client.js", {}, 200),
    ]
    async with (
        a_bridge(database, namespace, BRIDGE_ALLOWED_ORIGINS=f"https://other.example, {APP}") as bridge,
        httpx.AsyncClient(base_url=bridge.url) as http,
    ):
        for method, path, options, status in requests:
            for origin, expected in [(EVIL, 403), (APP, status)]:
                given = {**options, "headers": {**bearer(token(ADA)), **options.get("headers", {}), "Origin": origin}}
                async with http.stream(method, path, **given) as answer:
                    assert answer.status_code == expected, (method, path, origin)
                    told = answer.headers.get("access-control-allow-origin")
                    assert told == (APP if origin == APP else None), (method, path)
                    assert words(answer, "access-control-expose-headers") == (EXPOSED if origin == APP else {""})
                    assert "origin" in words(answer, "vary")
                    assert "access-control-allow-credentials" not in answer.headers
        asked = await http.get("/posts", headers=bearer(token(ADA)))
        assert asked.headers["realtime-position"]
        assert "access-control-allow-origin" not in asked.headers
        assert "origin" in words(asked, "vary")
        same_host = await http.post("/posts", json={"title": "x"}, headers=bearer(token(ADA)) | {"Origin": bridge.url})
        assert same_host.status_code == 201
        async with connect(bridge.socket_url, origin=Origin(APP), additional_headers=bearer(token(ADA))) as socket:
            assert (await receive(socket))["type"] == "ready"


async def test_what_no_route_answers_is_told_to_an_allowed_page_alone(database: str, namespace: str) -> None:
    async with (
        a_bridge(database, namespace, BRIDGE_ALLOWED_ORIGINS=APP) as bridge,
        httpx.AsyncClient(base_url=bridge.url) as http,
    ):
        for method, path, status in [("GET", "/nowhere", 404), ("PUT", "/posts", 405), ("POST", "/events", 405)]:
            for origin, expected in [(EVIL, 403), (APP, status)]:
                answer = await http.request(method, path, headers={"Origin": origin})
                assert answer.status_code == expected
                assert answer.headers.get("access-control-allow-origin") == (APP if origin == APP else None)
                assert words(answer, "access-control-expose-headers") == (EXPOSED if origin == APP else {""})
                assert "origin" in words(answer, "vary")


async def test_a_browser_may_ask_before_it_sends(database: str, namespace: str) -> None:
    async with (
        a_bridge(database, namespace, BRIDGE_ALLOWED_ORIGINS=APP) as bridge,
        httpx.AsyncClient(base_url=bridge.url) as http,
    ):
        for path, method in [("/events", "GET"), ("/ticket", "POST"), ("/posts", "POST"), ("/posts/7", "DELETE")]:
            asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization"}
            answer = await http.options(path, headers={"Origin": APP, **asked})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, APP), path
            assert method.lower() in words(answer, "access-control-allow-methods")
            assert {"authorization", "content-type"} <= words(answer, "access-control-allow-headers")
            assert int(answer.headers["access-control-max-age"]) > 0
            refused = await http.options(path, headers={"Origin": EVIL, **asked})
            assert refused.status_code == 403
            assert not [name for name in refused.headers if name.startswith("access-control-")]


async def test_every_page_is_let_in_where_the_operator_says_so(database: str, namespace: str) -> None:
    async with (
        a_bridge(database, namespace, BRIDGE_ALLOWED_ORIGINS="*") as bridge,
        httpx.AsyncClient(base_url=bridge.url, headers=bearer(token(ADA))) as http,
    ):
        for origin in (EVIL, "null"):
            answer = await http.get("/posts", headers={"Origin": origin})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)


# -- as a browser does it ----------------------------------------------------------------------------------------------

PAGE = b"""HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<!doctype html><script>
window.titles = []
window.opened = 0
async function follow(bridge, token) {
  const headers = { Authorization: `Bearer ${token}` }
  const posts = await fetch(`${bridge}/posts`, { headers })
  const { ticket } = await (await fetch(`${bridge}/ticket`, { method: "POST", headers })).json()
  const position = posts.headers.get("Realtime-Position")
  window.source = new EventSource(`${bridge}/events?ticket=${ticket}&position=${position}`)
  source.onopen = () => window.opened++
  source.onmessage = ({ data }) => {
    const message = JSON.parse(data)
    if (message.record) titles.push(message.record.title)
  }
  return position
}
</script>"""


@asynccontextmanager
async def another_host() -> AsyncIterator[str]:
    """Serves `PAGE` from an origin that is not the bridge's."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(PAGE)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def write(database: str, title: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("insert into posts (user_id, title) values ($1, $2)", ADA, title)
    await connection.close()


@pytest.mark.browser
async def test_a_page_of_another_host_reads_follows_and_comes_back_with_its_ticket(
    database: str,
    namespace: str,
    redis_url: str,
    browser: Browser,  # noqa: F811
) -> None:
    async with another_host() as host:
        settings = {"REDIS_URL": redis_url, "BRIDGE_ALLOWED_ORIGINS": host, "BRIDGE_TOKEN_IN_QUERY": "false"}
        async with a_bridge(database, namespace, **settings) as bridge:
            page = await browser.new_page()
            await page.goto(host)
            assert await page.evaluate("([url, token]) => follow(url, token)", [bridge.url, token(ADA)])
            await write(database, "one")
            await page.wait_for_function("() => titles.length == 1")
            await asyncio.to_thread(bridge.stop)
            await write(database, "two")
            bridge.start()
            await bridge.ready()
            await page.wait_for_function("() => titles.length == 2")
            assert await page.evaluate("() => [titles, opened, source.readyState]") == [["one", "two"], 2, 1]
            await page.close()
