"""A bridge behind a network that the test can spoil, and people in browsers that follow it through `client.js`."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
from playwright.async_api import Browser, BrowserContext, Page

from tests.bridges import BridgeProcess
from tests.browser.bad_network import Site
from tests.clients import open_socket, read_posts, receive, receive_data
from tests.services import eventually, token

ADA, BOB = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
_NOBODY = str(uuid.UUID(int=99))


@dataclass
class User:
    """A page in a browser context of its own. `run_for` and `fast_forward` of `page.clock` work on it."""

    id: str
    site: Site
    context: BrowserContext
    page: Page

    async def start(self, filter_: str | None = None, **options: Any) -> None:
        given = [self.id, options, filter_]
        await self.page.evaluate("([user, options, filter]) => page.start(user, options, { filter })", given)

    async def get(self, expression: str) -> Any:
        return await self.page.evaluate(f"() => page.{expression}")

    async def becomes(self, status: str, timeout: float = 20) -> None:
        async def is_so() -> bool:
            return bool(await self.get("bridge.status") == status)

        try:
            await eventually(is_so, timeout)
        except AssertionError as error:
            raise AssertionError(f"not {status}: {await self.get('statuses')} {await self.get('errors')}") from error

    async def is_on(self, transport: str, timeout: float = 20) -> None:
        async def is_so() -> bool:
            return bool(await self.get("bridge.transport") == transport)

        await eventually(is_so, timeout)

    async def has(self, *titles: str, timeout: float = 20) -> None:
        """Wait until the copy has the rows of these titles and no others, in the order of their ids."""

        async def is_so() -> bool:
            return bool(await self.get("rows.map(({ title }) => title)") == list(titles))

        await eventually(is_so, timeout)

    async def agrees(self, url: str, timeout: float = 15) -> None:
        """Wait until the copy is what `GET /posts` answers this user."""

        async def is_so() -> bool:
            rows, _ = await read_posts(url, token(self.id))
            return bool(await self.get("rows") == [rows[id_] for id_ in sorted(rows)])

        await eventually(is_so, timeout)


@dataclass
class World:
    """What a test has: see `open_world`."""

    bridge: BridgeProcess
    site: Site
    database: asyncpg.Connection
    browser: Browser
    stack: AsyncExitStack

    async def user(self, sub: str = ADA, *, script: str = "") -> User:
        """Open a page, with a clock that the test may turn forward, after a script of the test's."""
        context = await self.browser.new_context()
        self.stack.push_async_callback(context.close)
        page = await context.new_page()
        await page.clock.install()
        if script:
            await page.add_init_script(script)
        await page.goto(f"{self.site.url}/page.html")
        await page.wait_for_function("() => window.page")
        return User(sub, self.site, context, page)

    async def users(self, transports: list[str], **options: Any) -> list[User]:
        """One and the same person, who has come by each transport."""
        users = [await self.user() for _ in transports]
        for user, transport in zip(users, transports, strict=True):
            await user.start(transports=[transport], **options)
        for user in users:
            await user.becomes("live")
        return users

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
async def open_world(browser: Browser, bridge: BridgeProcess, database: str) -> AsyncIterator[World]:
    """An empty table and a network that works. What was before is behind every position that is told from now on."""
    async with AsyncExitStack() as stack:
        connection = await asyncpg.connect(database)
        stack.push_async_callback(connection.close)
        await _empty(bridge, connection)
        site = await stack.enter_async_context(Site(bridge.port))
        yield World(bridge, site, connection, browser, stack)


async def _empty(bridge: BridgeProcess, database: asyncpg.Connection) -> None:
    async with open_socket(bridge.url, token(_NOBODY)) as socket:
        assert (await receive(socket))["type"] == "ready"
        last = await database.fetchval("insert into posts (user_id, title) values ($1, 'last') returning id", _NOBODY)
        await database.execute("delete from posts")
        while (message := await receive_data(socket))["type"] != "DELETE" or message["old_record"]["id"] != last:
            pass
