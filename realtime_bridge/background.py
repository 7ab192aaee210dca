"""Work in the background: the parts that run for ever, and short work that connections ask for.

Layer: whole. May import: nothing of the package.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final, Self

logger = logging.getLogger(__name__)

CANCEL_AGAIN_SECONDS: Final = 3.0
"""Longer than any part takes to end."""


class BackgroundTasks:
    """A task group that outlives the faults of its tasks: they are logged."""

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._lasting: list[asyncio.Task[None]] = []
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        # Perhaps more than once: before Python 3.13 a task group that is cancelled while an error ends it forgets that.
        while present := [task for task in self._lasting if not task.done()]:
            for task in present:
                task.cancel()
            await asyncio.wait(present, timeout=CANCEL_AGAIN_SECONDS)
        await self._group.__aexit__(None, None, None)  # which would wrap an error of the block in a group

    def forever(self, name: str, run: Any) -> asyncio.Task[None]:
        """Run a coroutine function for ever; a fault of ours is logged, and it begins again."""

        async def again() -> None:
            while True:
                try:
                    await run()
                except Exception:
                    logger.exception("a part failed and begins again", extra={"part": name})
                await asyncio.sleep(1)

        self._lasting.append(self._group.create_task(again(), name=name))
        return self._lasting[-1]

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run short work; a fault in it is logged, and ends nothing else."""

        async def guarded() -> None:
            try:
                await work
            except Exception:
                logger.exception("answering a client failed")

        self._group.create_task(guarded())
