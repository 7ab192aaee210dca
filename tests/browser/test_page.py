"""The live page in a real Chromium: of `realtime-bridge dev`, whose writer rests, and of `serve`.

What it looks like is kept in `test-artefacts/`.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, Locator, Page, expect

from tests.bridges import BridgeProcess
from tests.browser.worlds import ADA, BOB
from tests.clients import bearer
from tests.demos import Demo
from tests.services import token

pytestmark = [pytest.mark.integration, pytest.mark.browser, pytest.mark.timeout(90)]

ARTEFACTS = Path(__file__).parents[2] / "test-artefacts"
NOTHING = "\N{EN DASH}"
DESKTOP = {"width": 1240, "height": 900}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def demo(browser: Browser) -> Iterator[Demo]:
    with Demo("--no-writer") as demo:
        yield demo


@pytest.fixture
async def env(demo: Demo) -> Any:
    """What the demo prints of itself; its table is empty."""
    env = await demo.ready()
    for user in env["users"]:
        async with httpx.AsyncClient(base_url=env["url"], headers=bearer(user["token"])) as http:
            for post in (await http.get("/posts")).json():
                if post["user_id"] == user["id"]:
                    assert (await http.delete(f"/posts/{post['id']}")).status_code == 204
    return env


@asynccontextmanager
async def open_page(browser: Browser, url: str, **options: Any) -> AsyncIterator[Page]:
    """The page, which complains of nothing while it is open, and asks for no address that holds a token."""
    context = await browser.new_context(viewport=options.pop("viewport", DESKTOP), **options)
    page = await context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("websocket", lambda socket: addresses.append(socket.url))
    await page.clock.install()
    await page.goto(url)
    yield page
    await context.close()
    assert complaints == []
    assert addresses
    assert not [address for address in addresses if "eyJ" in address]


class Side:
    """One person's side of the page."""

    def __init__(self, page: Page, number: int) -> None:
        self.page = page
        self.element = page.locator(".panel").nth(number)

    @property
    def titles(self) -> Locator:
        """Of the posts that are there to stay."""
        return self.element.locator(".post:not([inert]) h3")

    async def is_live(self) -> None:
        await expect(self.element.locator(".status")).to_have_text("live", timeout=20_000)

    async def post(self, title: str, body: str = "", *, public: bool) -> None:
        form = self.element.get_by_role("form", name="New post")
        await form.get_by_label("Title").fill(title)
        await form.get_by_label("Text").fill(body)
        await form.get_by_label("Public").set_checked(public)
        await form.get_by_role("button", name="Post").click()

    async def press(self, action: str, title: str) -> None:
        await self.element.get_by_role("button", name=f"{action}: {title}").click()

    async def shows(self, *titles: str) -> None:
        """Wait until it has posts of these titles and no others, the newest first."""
        await expect(self.titles).to_have_text(list(titles))

    async def has_let_go(self, title: str, reason: str) -> None:
        await expect(self.element.locator(f".post[data-reason='{reason}']")).to_contain_text(title)


@asynccontextmanager
async def standing_still(page: Page) -> AsyncIterator[None]:
    """Animations do not go on: what leaves stays to be seen."""
    devtools = await page.context.new_cdp_session(page)
    await devtools.send("Animation.enable")
    await devtools.send("Animation.setPlaybackRate", {"playbackRate": 0})
    yield
    await devtools.send("Animation.setPlaybackRate", {"playbackRate": 1})
    await devtools.detach()


async def keep(page: Page, name: str, *, at_rest: bool = True) -> None:
    """Keep what the page looks like, once nothing moves any more."""
    if at_rest:
        await page.wait_for_function("() => document.getAnimations().length === 0")
    ARTEFACTS.mkdir(exist_ok=True)
    await page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)


async def test_each_side_shows_what_its_user_may_see_and_lets_go_of_the_rest(browser: Browser, env: Any) -> None:
    async with open_page(browser, env["url"]) as page:
        ada, bob = Side(page, 0), Side(page, 1)
        await ada.is_live()
        await bob.is_live()
        await ada.post("Lunch on Friday", "Who is in?", public=True)
        await bob.shows("Lunch on Friday")
        await bob.post("Draft of a logo", "Not for others yet.", public=False)
        await bob.post("Bikes for sale", "Two of them.", public=True)
        await ada.shows("Bikes for sale", "Lunch on Friday")
        await bob.shows("Bikes for sale", "Draft of a logo", "Lunch on Friday")
        await keep(page, "page")

        await ada.press("Edit", "Lunch on Friday")
        dialog = page.get_by_role("dialog", name="Edit the post")
        await dialog.get_by_label("Title").fill("Lunch on Monday")
        await keep(page, "page-edit")
        await dialog.get_by_role("button", name="Save").click()
        await ada.shows("Bikes for sale", "Lunch on Monday")
        await bob.shows("Bikes for sale", "Draft of a logo", "Lunch on Monday")
        await expect(dialog).to_be_hidden()

        async with standing_still(page):
            await bob.press("Hide", "Bikes for sale")
            await ada.shows("Lunch on Monday")
            await ada.has_let_go("Bikes for sale", "Not visible any more")
            await keep(page, "page-hidden", at_rest=False)
        await bob.press("Publish", "Bikes for sale")
        await ada.shows("Bikes for sale", "Lunch on Monday")

        async with standing_still(page):
            await ada.press("Delete", "Lunch on Monday")
            await ada.shows("Bikes for sale")
            await bob.shows("Bikes for sale", "Draft of a logo")
            for side in (ada, bob):
                await side.has_let_go("Lunch on Monday", "Deleted")
        await expect(page.locator(".post[inert]")).to_have_count(0)


async def test_a_connection_that_is_cut_comes_back_by_itself_with_nothing_missed(browser: Browser, env: Any) -> None:
    async with open_page(browser, env["url"]) as page:
        ada, bob = Side(page, 0), Side(page, 1)
        await ada.is_live()
        await bob.is_live()
        await bob.post("Before", public=True)
        await ada.shows("Before")
        sockets: list[object] = []
        page.on("websocket", lambda socket: sockets.append(socket))
        await ada.element.get_by_role("button", name="Cut the connection").click()
        await expect(ada.element.locator(".status")).to_have_text("offline")
        await bob.post("Meanwhile", public=True)
        await bob.press("Delete", "Before")
        await bob.shows("Meanwhile")
        await ada.shows("Before")
        await expect(ada.element.locator(".transport")).to_have_text(NOTHING)
        await keep(page, "page-cut")
        while not sockets:
            await page.clock.run_for(500)
        await ada.is_live()
        await ada.shows("Meanwhile")
        await expect(ada.element.locator(".note")).to_have_text("Back, and caught up on 2 changes.")
        await expect(ada.element.locator(".transport")).to_have_text("WebSocket")
        await keep(page, "page-back")


async def test_a_post_that_is_refused_comes_back_into_the_form(browser: Browser, env: Any) -> None:
    context = await browser.new_context()
    page = await context.new_page()
    await page.goto(env["url"])
    ada = Side(page, 0)
    await ada.is_live()
    await page.route("**/posts", lambda route: route.abort())
    await ada.post("Not lost", "Nor this", public=False)
    await expect(ada.element.get_by_role("alert")).to_be_visible()
    form = ada.element.get_by_role("form", name="New post")
    await expect(form.get_by_label("Title")).to_have_value("Not lost")
    await expect(form.get_by_label("Text")).to_have_value("Nor this")
    await page.unroute_all()
    await form.get_by_role("button", name="Post").click()
    await ada.shows("Not lost")
    await expect(form.get_by_label("Title")).to_have_value("")
    await context.close()


async def test_position_and_proof_move(browser: Browser, env: Any) -> None:
    async with open_page(browser, env["url"]) as page:
        ada = Side(page, 0)
        await ada.is_live()
        position, until = ada.element.locator(".position"), ada.element.locator(".until")
        before = [await fact.text_content() for fact in (position, until)]
        assert NOTHING not in before
        await ada.post("News", public=False)
        await ada.shows("News")
        assert await position.text_content() != before[0]
        while await until.text_content() == before[1]:
            await page.clock.run_for(1_000)  # without a proof for a while the client asks for one


async def test_what_people_write_is_text(browser: Browser, env: Any) -> None:
    markup = "<img src=x onerror=document.title='run'><b>bold</b>"
    async with open_page(browser, env["url"]) as page:
        ada, bob = Side(page, 0), Side(page, 1)
        await bob.is_live()
        await ada.post(markup, markup, public=True)
        await bob.shows(markup)
        assert await page.locator(".posts img, .posts b").count() == 0
        assert await page.title() == "realtime_bridge"


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_phone_shows_it_without_scrolling_sideways(scheme: str, browser: Browser, env: Any) -> None:
    options: dict[str, Any] = {"viewport": PHONE, "color_scheme": scheme, "is_mobile": True, "has_touch": True}
    async with open_page(browser, env["url"], **options) as page:
        ada, bob = Side(page, 0), Side(page, 1)
        await ada.post("A title of ordinary length", "And a text that says a little more about it.", public=True)
        await bob.post("W" * 200, "m" * 500, public=True)
        await ada.shows("W" * 200, "A title of ordinary length")
        width = await page.evaluate("() => document.documentElement.scrollWidth")
        assert width == PHONE["width"]
        cut_off = await page.evaluate(
            """() => [...document.querySelectorAll(".panel, .panel *")]
              .filter((it) => it.clientWidth > 0 && it.scrollWidth > it.clientWidth)
              .map((it) => it.outerHTML)"""
        )
        assert cut_off == []
        await keep(page, f"phone-{scheme}")


async def test_everything_that_can_be_used_has_a_name(browser: Browser, env: Any) -> None:
    async with open_page(browser, env["url"]) as page:
        ada = Side(page, 0)
        await ada.post("Something to press", public=True)
        await ada.shows("Something to press")
        nameless = await page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, textarea, dialog, section")]
              .filter((it) => !it.labels?.length && !it.ariaLabel && !(it.matches("button") && it.textContent.trim()))
              .map((it) => it.outerHTML)"""
        )
        assert nameless == []


async def test_the_page_of_a_real_bridge_asks_for_the_admin_token_and_then_for_tokens(
    browser: Browser, bridge: BridgeProcess
) -> None:
    async with httpx.AsyncClient(base_url=bridge.url) as http:
        refused = await http.get("/")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Basic realm="realtime_bridge"')
        assert (await http.get("/", auth=("", "guess"))).status_code == 401
    credentials = {"username": "", "password": "admin"}
    async with open_page(browser, bridge.url, http_credentials=credentials) as page:
        follow = page.get_by_role("button", name="Follow")
        first, second = page.get_by_label("First token"), page.get_by_label("Second token")
        await first.fill("nonsense")
        await follow.click()
        await expect(page.get_by_role("alert")).to_contain_text("not an access token")
        await keep(page, "page-tokens")
        await first.fill(token(ADA, email="ada@example.com"))
        await second.fill(token(BOB, ttl=-60))
        await follow.click()
        ada, bob = Side(page, 0), Side(page, 1)
        await ada.is_live()
        await expect(bob.element.locator(".status")).to_have_text("unauthorized")
        await expect(bob.element.get_by_role("alert")).to_contain_text("expired")
        await page.get_by_role("button", name="Other tokens").click()
        await first.fill(token(ADA, email="ada@example.com"))
        await second.fill(token(BOB, email="bob@example.com"))
        await follow.click()
        await ada.is_live()
        await bob.is_live()
        await ada.post("Seen by both", public=True)
        await bob.shows("Seen by both")
        await ada.press("Delete", "Seen by both")
        await bob.shows()


async def test_the_page_runs_nothing_that_is_not_its_own(browser: Browser, env: Any) -> None:
    context = await browser.new_context()
    page = await context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    await page.goto(env["url"])
    await page.evaluate(
        """() => {
          document.body.insertAdjacentHTML("beforeend", "<p id=mark onclick='document.title = `run`'></p>");
          document.getElementById("mark").click();
          const script = document.createElement("script");
          script.textContent = "document.title = 'run'";
          document.body.append(script);
        }"""
    )
    assert await page.title() == "realtime_bridge"
    assert len(refused) == 2
    assert all("Content Security Policy" in text for text in refused)
    await context.close()
