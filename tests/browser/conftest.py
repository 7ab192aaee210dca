"""One Chromium and one bridge for all tests here; without Chromium they are skipped, or fail with CI set."""

import shutil
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from playwright.async_api import Browser, Error, async_playwright

from realtime_bridge.dev.engines import EmbeddedPostgres
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.services import fresh_databases, unavailable

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="package")
async def browser() -> AsyncIterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        unavailable("Chromium is not installed: apt-get install chromium")
    async with async_playwright() as playwright:
        try:
            browser = await playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        except Error as error:
            unavailable(f"Chromium does not start: {error.message.splitlines()[0]}")
        yield browser
        await browser.close()


@pytest.fixture(scope="package")
def shared_database(postgres: EmbeddedPostgres, _template: str) -> Iterator[str]:
    """The address of the database of `bridge`."""
    with fresh_databases(postgres, _template) as make:
        yield make()


@pytest.fixture(scope="package")
async def bridge(browser: Browser, shared_database: str) -> AsyncIterator[BridgeProcess]:
    """A bridge with its history in memory, for tests that leave it running. It serves pages of any host."""
    await ensure_publication(shared_database, PUBLICATION, ["public.posts"])
    slot = f"browser_{uuid.uuid4().hex[:12]}"
    settings = {"BRIDGE_SLOT": slot, "BRIDGE_ADMIN_TOKEN": "admin", "BRIDGE_ALLOWED_ORIGINS": "*"}
    async with BridgeProcess(shared_database, BRIDGE_DRAIN_SECONDS="1", **settings) as bridge:
        yield bridge
