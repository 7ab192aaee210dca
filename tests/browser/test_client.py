"""`client.js` in a real Chromium, against a real bridge behind a network that the test can spoil."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx
import pytest
from playwright.async_api import Browser, BrowserContext, Page

from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.browser.bad_network import Site
from tests.clients import read_posts
from tests.services import eventually, token

pytestmark = [pytest.mark.integration, pytest.mark.browser, pytest.mark.timeout(90)]

ADA, BOB = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
TRANSPORTS = ["websocket", "sse", "longpoll"]


@dataclass
class User:
    """A page in a browser context of its own."""

    id: str
    site: Site
    context: BrowserContext
    page: Page

    async def start(self, **options: Any) -> None:
        await self.page.evaluate("([user, options]) => page.start(user, options)", [self.id, options])

    async def get(self, expression: str) -> Any:
        return await self.page.evaluate(f"() => page.{expression}")

    async def becomes(self, status: str, timeout: float = 20) -> None:
        async def is_so() -> bool:
            return bool(await self.get("bridge.status") == status)

        try:
            await eventually(is_so, timeout)
        except AssertionError as error:
            raise AssertionError(f"not {status}: {await self.get('statuses')} {await self.get('errors')}") from error

    async def agrees(self, url: str, timeout: float = 15) -> None:
        """Wait until the copy is what `GET /posts` answers this user."""

        async def is_so() -> bool:
            rows, _ = await read_posts(url, token(self.id))
            return bool(await self.get("rows") == [rows[id_] for id_ in sorted(rows)])

        await eventually(is_so, timeout)


@dataclass
class World:
    bridge: BridgeProcess
    site: Site
    database: asyncpg.Connection
    browser: Browser
    stack: AsyncExitStack

    async def user(self, sub: str = ADA) -> User:
        context = await self.browser.new_context()
        self.stack.push_async_callback(context.close)
        page = await context.new_page()
        await page.goto(f"{self.site.url}/page.html")
        await page.wait_for_function("() => window.page")
        return User(sub, self.site, context, page)

    async def post(self, title: str, sub: str = ADA, *, public: bool = False, body: str = "") -> int:
        query = "insert into posts (user_id, title, is_public, body) values ($1, $2, $3, $4) returning id"
        id_: int = await self.database.fetchval(query, sub, title, public, body)
        return id_

    async def restart(self, meanwhile: str | None = None) -> None:
        await asyncio.to_thread(self.bridge.stop)
        if meanwhile is not None:
            await self.database.execute(meanwhile)
        self.bridge.start()
        await self.bridge.ready()


@asynccontextmanager
async def open_world(browser: Browser, database: str, namespace: str, **settings: str) -> AsyncIterator[World]:
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    async with AsyncExitStack() as stack:
        settings |= {"BRIDGE_SLOT": namespace.replace("-", "_"), "BRIDGE_NAMESPACE": namespace}
        bridge = await stack.enter_async_context(BridgeProcess(database, **settings))
        site = await stack.enter_async_context(Site(bridge.port))
        connection = await asyncpg.connect(database)
        stack.push_async_callback(connection.close)
        yield World(bridge, site, connection, browser, stack)


async def change_at_random(world: World, numbers: range) -> None:
    """Inserts, updates, changed keys, large values left alone, rows shown and hidden, deletes: of two users."""
    chance = random.Random(numbers.start)
    ids: list[int] = []
    for number in numbers:
        kind = chance.choice(["post", "post", "title", "show", "move", "delete"])
        if kind == "post" or not ids:
            body = "".join(chance.choices("abcdefghij", k=chance.choice([3, 9000])))
            ids.append(
                await world.post(f"p{number}", chance.choice([ADA, BOB]), public=chance.random() < 0.5, body=body)
            )
            continue
        at = chance.randrange(len(ids))
        if kind == "title":
            await world.database.execute("update posts set title = $2 where id = $1", ids[at], f"t{number}")
        elif kind == "show":
            await world.database.execute("update posts set is_public = not is_public where id = $1", ids[at])
        elif kind == "move":
            await world.database.execute("update posts set id = $2 where id = $1", ids[at], 100_000 + number)
            ids[at] = 100_000 + number
        else:
            await world.database.execute("delete from posts where id = $1", ids.pop(at))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_two_users_each_have_a_copy_of_what_they_may_see(
    transport: str, browser: Browser, database: str, namespace: str
) -> None:
    async with open_world(browser, database, namespace) as world:
        await change_at_random(world, range(40))
        ada, bob = await world.user(ADA), await world.user(BOB)
        await ada.start(transports=[transport])
        await bob.page.evaluate("() => { page.withPosition = true }")
        await bob.start(transports=[transport])  # while it changes
        await change_at_random(world, range(40, 190))
        await asyncio.gather(ada.becomes("live"), bob.becomes("live"))
        await change_at_random(world, range(190, 240))
        for user in (ada, bob):
            assert await user.get("bridge.transport") == transport
            await user.agrees(world.bridge.url)
            seen = [change["record"] for change in await user.get("changes") if "record" in change]
            assert seen
            assert all(row["user_id"] == user.id or row["is_public"] for row in seen)
            assert await user.get("errors") == []
            assert await user.get("asked") == {"tokens": 1, "loads": 1}


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_restart_is_resumed_without_reading_again_where_the_history_survives(
    transport: str, browser: Browser, database: str, namespace: str, redis_url: str
) -> None:
    async with open_world(browser, database, namespace, REDIS_URL=redis_url) as world:
        await world.post("before")
        ada = await world.user()
        await ada.start(transports=[transport])
        await ada.becomes("live")
        await world.restart(f"insert into posts (user_id, title) values ('{ADA}', 'meanwhile')")
        await ada.becomes("live")
        await world.post("after")
        await ada.agrees(world.bridge.url)
        assert [change["record"]["title"] for change in await ada.get("changes")] == ["meanwhile", "after"]
        assert (await ada.get("asked"))["loads"] == 1


async def test_a_restart_that_loses_the_history_is_met_with_reading_again(
    browser: Browser, database: str, namespace: str
) -> None:
    async with open_world(browser, database, namespace) as world:
        await world.post("before")
        ada = await world.user()
        await ada.start()
        await ada.becomes("live")
        await world.restart("delete from posts")
        await world.post("after")
        await ada.agrees(world.bridge.url)
        assert [row["title"] for row in await ada.get("rows")] == ["after"]
        assert (await ada.get("asked"))["loads"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_dead_network_is_noticed_and_its_return_too_though_the_token_has_ended(
    transport: str, browser: Browser, database: str, namespace: str
) -> None:
    """Offline for about six seconds: as long as it takes to notice, and longer than the token lasts."""
    async with open_world(browser, database, namespace) as world:
        ada = await world.user()
        world.site.lifetimes = [4]
        await ada.start(transports=[transport])
        await ada.becomes("live")
        loads = (await ada.get("asked"))["loads"]
        world.site.is_deaf = True
        await ada.context.set_offline(True)
        await ada.becomes("offline", 30)
        await world.post("meanwhile")
        tokens = (await ada.get("asked"))["tokens"]
        world.site.lifetimes = [3600]
        await world.site.cut()
        world.site.is_deaf = False
        await ada.context.set_offline(False)
        await ada.becomes("live")
        await ada.agrees(world.bridge.url)
        after = await ada.get("asked")
        assert after["tokens"] > tokens
        assert after["loads"] == loads


async def test_a_token_that_ends_is_replaced_on_the_same_connection(
    browser: Browser, database: str, namespace: str
) -> None:
    async with open_world(browser, database, namespace) as world:
        ada = await world.user()
        sockets: list[Any] = []
        ada.page.on("websocket", lambda socket: sockets.append(socket))
        world.site.lifetimes = [4, 3600]  # the bridge warns a minute before the end: at once
        await ada.start(transports=["websocket"])
        await ada.becomes("live")
        await asyncio.sleep(6)  # past the first token's end, by the bridge's clock, which cannot be faked
        await world.post("after its end")
        await ada.agrees(world.bridge.url)
        assert len(sockets) == 1
        assert (await ada.get("asked"))["tokens"] == 2
        assert "offline" not in await ada.get("statuses")
        assert all("token" not in socket.url for socket in sockets)


@pytest.mark.parametrize(
    ("refused", "transport"),
    [(("upgrade: websocket",), "sse"), (("upgrade: websocket", "accept: text/event-stream"), "longpoll")],
)
async def test_a_proxy_that_blocks_a_transport_is_met_with_the_next(
    refused: tuple[str, ...], transport: str, browser: Browser, database: str, namespace: str
) -> None:
    async with open_world(browser, database, namespace) as world:
        world.site.refused = lambda head: any(words in head for words in refused)
        ada = await world.user()
        await ada.start()
        await ada.becomes("live", 30)
        assert await ada.get("bridge.transport") == transport
        await world.post("by the way")
        await ada.agrees(world.bridge.url)
        assert (await ada.get("asked"))["loads"] == 1


async def test_a_transport_that_worked_before_is_taken_back_soon(
    browser: Browser, database: str, namespace: str
) -> None:
    async with open_world(browser, database, namespace) as world:
        ada = await world.user()
        await ada.start()
        await ada.becomes("live")
        world.site.refused = lambda head: "upgrade: websocket" in head
        await world.site.cut()

        async def is_on(transport: str) -> bool:
            return bool(await ada.get("bridge.transport") == transport)

        await eventually(lambda: is_on("sse"), 20)
        await world.post("on the way")
        await ada.agrees(world.bridge.url)
        world.site.refused = lambda _: False
        await eventually(lambda: is_on("websocket"), 40)
        await world.post("back")
        await ada.agrees(world.bridge.url)
        assert (await ada.get("asked"))["loads"] == 1


async def test_a_truncated_table_is_read_again(browser: Browser, database: str, namespace: str) -> None:
    async with open_world(browser, database, namespace) as world:
        await world.post("before")
        ada = await world.user()
        await ada.start()
        await ada.becomes("live")
        assert len(await ada.get("rows")) == 1
        await world.database.execute("truncate posts")
        await world.post("after")

        async def is_read_again() -> bool:
            return [row["title"] for row in await ada.get("rows")] == ["after"]

        await eventually(is_read_again, 20)
        assert (await ada.get("asked"))["loads"] == 2


async def test_a_filter_is_the_bridges_work(browser: Browser, database: str, namespace: str) -> None:
    async with open_world(browser, database, namespace) as world:
        ada = await world.user()
        await ada.page.evaluate("(user) => page.start(user, {}, { filter: 'title=in.(a,b)' })", ada.id)
        await ada.becomes("live")
        id_ = await world.post("a")
        await world.post("c")
        await world.database.execute("update posts set title = 'd' where id = $1", id_)
        await world.post("b")

        async def has_b() -> bool:
            return [row["title"] for row in await ada.get("rows")] == ["b"]

        await eventually(has_b)
        kinds = [(change["type"], change.get("left")) for change in await ada.get("changes")]
        assert kinds == [("INSERT", None), ("DELETE", True), ("INSERT", None)]


@pytest.mark.parametrize("transport", ["sse", "longpoll"])
async def test_more_copies_than_a_browser_has_connections_take_turns(
    transport: str, browser: Browser, database: str, namespace: str
) -> None:
    async with open_world(browser, database, namespace) as world:
        ada = await world.user()
        await ada.start(transports=[transport])
        await ada.page.evaluate(
            """() => {
              const load = async () => [];
              const live = (n) => page.bridge.live("posts", { load, filter: `title=eq.t${n}` });
              page.more = Array.from({ length: 9 }, (_, n) => live(n));
            }"""
        )
        await ada.becomes("live", 30)
        for number in range(9):
            await world.post(f"t{number}")
        await ada.agrees(world.bridge.url)

        async def each_has_its_own() -> bool:
            titles = await ada.get("more.map((live) => [...live.rows.values()].map((row) => row.title))")
            return bool(titles == [[f"t{number}"] for number in range(9)])

        await eventually(each_has_its_own, 30)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_refused_role_is_not_tried_again(
    transport: str, browser: Browser, database: str, namespace: str
) -> None:
    async with open_world(browser, database, namespace) as world:
        world.site.token_claims = {"role": "service_role"}
        ada = await world.user()
        asked: list[str] = []
        ada.page.on("websocket", lambda socket: asked.append(socket.url))
        ada.page.on("request", lambda request: asked.append(request.url) if "/events" in request.url else None)
        await ada.start(transports=[transport])
        await ada.becomes("unauthorized")
        assert (await ada.get("bridge.error"))["code"] in (4401, 4403)
        before = len(asked)
        await asyncio.sleep(2)  # four times the longest first wait
        assert len(asked) == before


COUNT_TIMERS = """
  window.timers = new Set();
  for (const [set, clear] of [["setTimeout", "clearTimeout"], ["setInterval", "clearInterval"]]) {
    const [realSet, realClear] = [window[set], window[clear]];
    window[set] = (f, ms) => {
      const id = realSet(() => { if (set === "setTimeout") timers.delete(id); f(); }, ms);
      timers.add(id);
      return id;
    };
    window[clear] = (id) => { timers.delete(id); realClear(id); };
  }
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_closing_leaves_no_timer_and_no_connection(
    transport: str, browser: Browser, database: str, namespace: str
) -> None:
    async with open_world(browser, database, namespace) as world:
        ada = await world.user()
        await ada.page.add_init_script(COUNT_TIMERS)
        await ada.page.reload()
        await ada.page.wait_for_function("() => window.page")
        errors: list[Any] = []
        ada.page.on("pageerror", lambda error: errors.append(error))
        await ada.start(transports=[transport])
        await ada.becomes("live")
        assert await ada.page.evaluate("() => timers.size") > 0
        await ada.page.evaluate("() => page.bridge.close()")
        assert await ada.get("bridge.status") == "offline"
        assert await ada.page.evaluate("() => timers.size") == 0

        async def connections() -> int:
            async with httpx.AsyncClient() as http:
                text = (await http.get(f"{world.bridge.url}/metrics")).text
            counted = [line for line in text.splitlines() if line.startswith("realtime_bridge_connections")]
            assert counted, text
            return int(sum(float(line.rpartition(" ")[2]) for line in counted))

        async def none_left() -> bool:
            return await connections() == 0

        await eventually(none_left)
        assert errors == []


async def test_a_page_that_is_shown_again_asks_whether_the_bridge_is_there(
    browser: Browser, database: str, namespace: str
) -> None:
    async with open_world(browser, database, namespace) as world:
        ada = await world.user()
        said: list[str] = []
        ada.page.on("websocket", lambda socket: socket.on("framesent", lambda text: said.append(str(text))))
        await ada.start()
        await ada.becomes("live")
        before = len(said)
        await ada.page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
        await eventually(lambda: len(said) > before)
        assert '"ping"' in said[-1]
        await ada.becomes("live")
