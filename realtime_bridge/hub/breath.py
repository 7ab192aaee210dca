"""Giving the loop back in the middle of long work, so that a large audience holds up nobody else.

Layer: core. Imports nothing of the package.
"""

import asyncio
from typing import Final

HOLD_SECONDS: Final = 0.005
"""How long the loop may be held before others get a turn."""


class Breath:
    """Knows since when the loop has been held: since it was made, or last taken."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()

    async def take(self) -> None:
        """Give the loop back if it has been held for long. Cheap enough for every recipient."""
        if self._loop.time() - self._since > HOLD_SECONDS:
            await asyncio.sleep(0)
            self._since = self._loop.time()
