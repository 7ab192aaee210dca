"""`client.js` in a real Chromium, against a real bridge behind a network that the test can spoil."""

import asyncio
import random
import time
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser

from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.browser.worlds import ADA, BOB, World, open_world
from tests.services import eventually

pytestmark = [pytest.mark.integration, pytest.mark.browser, pytest.mark.timeout(90)]

TRANSPORTS = ["websocket", "sse", "longpoll"]


async def change_at_random(world: World, numbers: range) -> None:
    """Inserts, updates, changed keys, large values left alone, rows shown and hidden, deletes: of two users."""
    chance = random.Random(numbers.start)
    ids: list[int] = []
    for number in numbers:
        kind = chance.choice(["post", "post", "title", "show", "move", "delete"])
        if kind == "post" or not ids:
            body = "".join(chance.choices("abcdefghij", k=chance.choice([3, 9000])))
            author, public = chance.choice([ADA, BOB]), chance.random() < 0.5
            ids.append(await world.post(f"p{number}", author, public=public, body=body))
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
    transport: str, browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        await change_at_random(world, range(40))
        ada, bob = await world.user(ADA), await world.user(BOB)
        await ada.start(transports=[transport])
        await bob.start(transports=[transport])  # while it changes
        await change_at_random(world, range(40, 140))
        await asyncio.gather(ada.becomes("live"), bob.becomes("live"))
        await change_at_random(world, range(140, 180))
        for user in (ada, bob):
            assert await user.get("bridge.transport") == transport
            await user.agrees(world.bridge.url)
            seen = [change["record"] for change in await user.get("changes") if "record" in change]
            assert seen
            assert all(row["user_id"] == user.id or row["is_public"] for row in seen)
            assert await user.get("errors") == []
            assert await user.get("asked") == {"tokens": 1, "loads": 1}


async def test_a_restart_is_resumed_without_reading_again_where_the_history_survives(
    browser: Browser, database: str, namespace: str, redis_url: str
) -> None:
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    settings = {"BRIDGE_SLOT": namespace.replace("-", "_"), "BRIDGE_NAMESPACE": namespace, "REDIS_URL": redis_url}
    async with (
        BridgeProcess(database, BRIDGE_DRAIN_SECONDS="1", **settings) as bridge,
        open_world(browser, bridge, database) as world,
    ):
        await world.post("before")
        users = await world.users(TRANSPORTS)
        await world.restart(f"insert into posts (user_id, title) values ('{ADA}', 'meanwhile')")
        await world.post("after")
        for user in users:
            await user.becomes("live")
            await user.has("before", "meanwhile", "after")
            assert [change["record"]["title"] for change in await user.get("changes")] == ["meanwhile", "after"]
            assert (await user.get("asked"))["loads"] == 1


async def test_a_restart_that_loses_the_history_is_met_with_reading_again(
    browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        await world.post("before")
        users = await world.users(TRANSPORTS)
        await world.restart("delete from posts")
        await world.post("after")
        for user in users:
            await user.has("after")
            assert (await user.get("asked"))["loads"] == 2


async def test_a_minute_offline_in_which_the_token_ends_is_noticed_and_made_up_for(
    browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        world.site.lifetimes = [5]
        users = await world.users(TRANSPORTS)
        loads = [(await user.get("asked"))["loads"] for user in users]
        end = time.time() + 5
        world.site.is_deaf = True
        for user in users:
            await user.context.set_offline(True)
            await user.page.clock.fast_forward(60_000)  # nothing has come for a minute: the bridge is asked,
            await user.page.clock.run_for(5_000)  # and does not answer
            await user.becomes("offline")
        await world.post("meanwhile")
        await eventually(lambda: time.time() > end, 6)  # by the bridge's clock, which cannot be turned
        world.site.lifetimes = [3600]
        await world.site.cut()
        world.site.is_deaf = False
        for user in users:
            tokens = (await user.get("asked"))["tokens"]
            await user.context.set_offline(False)
            await user.becomes("live")
            await user.has("meanwhile")
            assert (await user.get("asked"))["tokens"] > tokens
        assert [(await user.get("asked"))["loads"] for user in users] == loads


async def test_a_token_that_ends_is_replaced_on_the_same_connection(
    browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        ada = await world.user()
        sockets: list[Any] = []
        ada.page.on("websocket", lambda socket: sockets.append(socket))
        world.site.lifetimes = [4, 3600]  # the bridge warns a minute before the end: at once
        await ada.start(transports=["websocket"])
        end = time.time() + 4
        await ada.becomes("live")
        await eventually(lambda: time.time() > end + 1)  # by the bridge's clock, which cannot be turned
        await world.post("after its end")
        await ada.has("after its end")
        assert len(sockets) == 1
        assert (await ada.get("asked"))["tokens"] == 2
        assert "offline" not in await ada.get("statuses")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_no_token_is_part_of_an_address(
    transport: str, browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        ada = await world.user()
        addresses: list[str] = []
        ada.page.on("websocket", lambda socket: addresses.append(socket.url))
        ada.page.on("request", lambda request: addresses.append(request.url))
        await ada.start(transports=[transport])
        await ada.becomes("live")
        assert any("/ws?" in address or "/events?" in address for address in addresses)
        assert not [address for address in addresses if "eyJ" in address or "token=" in address]


async def test_a_page_of_another_host_that_is_allowed_has_every_transport(
    browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        users = await world.users(TRANSPORTS, url=bridge.url)
        await world.post("from afar")
        for user, transport in zip(users, TRANSPORTS, strict=True):
            await user.has("from afar")
            assert await user.get("bridge.transport") == transport
        exported = await users[0].page.evaluate(
            "async (url) => Object.keys(await import(url))", f"{bridge.url}/client.js"
        )
        assert exported == ["connect", "fold"]


@pytest.mark.parametrize(
    ("refused", "transport"),
    [(("upgrade: websocket",), "sse"), (("upgrade: websocket", "accept: text/event-stream"), "longpoll")],
)
async def test_a_proxy_that_blocks_a_transport_is_met_with_the_next(
    refused: tuple[str, ...], transport: str, browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        world.site.refused = lambda head: any(words in head for words in refused)
        ada = await world.user()
        await ada.start()
        await ada.is_on(transport)
        await world.post("by the way")
        await ada.has("by the way")
        assert (await ada.get("asked"))["loads"] == 1


async def test_a_transport_that_worked_before_is_taken_back_soon(
    browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        ada = await world.user()
        await ada.start()
        await ada.becomes("live")
        world.site.refused = lambda head: "upgrade: websocket" in head
        await world.site.cut()
        await ada.is_on("sse")
        await world.post("on the way")
        await ada.has("on the way")
        world.site.refused = lambda _: False
        await ada.page.clock.run_for(10_000)  # of the minute after which one that never worked is tried
        await ada.is_on("websocket")
        await world.post("back")
        await ada.has("on the way", "back")
        assert (await ada.get("asked"))["loads"] == 1


async def test_a_truncated_table_is_read_again(browser: Browser, bridge: BridgeProcess, shared_database: str) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        await world.post("before")
        ada = await world.user()
        await ada.start()
        await ada.becomes("live")
        await ada.has("before")
        await world.database.execute("truncate posts")
        await world.post("after")
        await ada.has("after")
        assert (await ada.get("asked"))["loads"] == 2


async def test_a_filter_is_the_bridges_work(browser: Browser, bridge: BridgeProcess, shared_database: str) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        ada = await world.user()
        await ada.start("title=in.(a,b)")
        await ada.becomes("live")
        id_ = await world.post("a")
        await world.post("c")
        await world.database.execute("update posts set title = 'd' where id = $1", id_)
        await world.post("b")
        await ada.has("b")
        kinds = [(change["type"], change.get("left")) for change in await ada.get("changes")]
        assert kinds == [("INSERT", None), ("DELETE", True), ("INSERT", None)]


@pytest.mark.parametrize("transport", ["sse", "longpoll"])
async def test_more_copies_than_a_browser_has_connections_take_turns(
    transport: str, browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
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

        async def each_has_its_own() -> bool:
            titles = await ada.get("more.map((live) => [...live.rows.values()].map((row) => row.title))")
            return bool(titles == [[f"t{number}"] for number in range(9)])

        await eventually(each_has_its_own, 30)
        await ada.has(*(f"t{number}" for number in range(9)))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_refused_role_is_not_tried_again(
    transport: str, browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        world.site.token_claims = {"role": "service_role"}
        ada = await world.user()
        asked: list[str] = []
        ada.page.on("websocket", lambda socket: asked.append(socket.url))
        ada.page.on("request", lambda request: asked.append(request.url) if "/events" in request.url else None)
        await ada.start(transports=[transport])
        await ada.becomes("unauthorized")
        assert (await ada.get("bridge.error"))["code"] in (4401, 4403)
        before = len(asked)
        await ada.page.clock.run_for(120_000)
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
    transport: str, browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
        ada = await world.user(script=COUNT_TIMERS)
        errors: list[Any] = []
        ada.page.on("pageerror", lambda error: errors.append(error))
        await ada.start(transports=[transport])
        await ada.becomes("live")
        assert await ada.page.evaluate("() => timers.size") > 0
        await ada.page.evaluate("() => page.bridge.close()")
        assert await ada.get("bridge.status") == "offline"
        assert await ada.page.evaluate("() => timers.size") == 0

        async def none_is_left() -> bool:
            async with httpx.AsyncClient() as http:
                text = (await http.get(f"{world.bridge.url}/metrics")).text
            [line] = [line for line in text.splitlines() if line.startswith("realtime_bridge_connections")]
            return float(line.rpartition(" ")[2]) == 0

        await eventually(none_is_left)
        assert errors == []


async def test_a_page_that_is_shown_again_asks_whether_the_bridge_is_there(
    browser: Browser, bridge: BridgeProcess, shared_database: str
) -> None:
    async with open_world(browser, bridge, shared_database) as world:
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
