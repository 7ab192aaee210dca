"""What runs for ever, and how it ends all the same."""

import asyncio

import pytest

from realtime_bridge import background
from realtime_bridge.background import BackgroundTasks


async def test_a_part_that_forgets_its_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CANCEL_AGAIN_SECONDS", 0.01)
    begun = asyncio.Event()
    cancelled = 0

    async def forgetful() -> None:
        nonlocal cancelled
        while True:
            begun.set()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled += 1
                if cancelled == 2:
                    raise

    async with asyncio.timeout(10):
        async with BackgroundTasks() as tasks:
            tasks.forever("forgetful", forgetful)
            await begun.wait()
    assert cancelled == 2
