"""Faults played one after the other, each followed by a quiet moment in which everything is compared and judged."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable

from tests.oracle.faults import Fault
from tests.oracle.stage import Stage
from tests.oracle.times import Times, timed

_BEFORE: tuple[float, float] = (0.5, 2.0)
"""Seconds for which all is well before a fault."""


async def chaos(stage: Stage, faults: Iterable[Fault], seconds: float) -> AsyncIterator[tuple[str, Times]]:
    """Play faults until the time is over or something is wrong; yields each with the times that it took."""
    loop, chance = asyncio.get_running_loop(), random.Random(stage.seed)
    until = loop.time() + seconds
    await stage.settle()
    for fault in faults:
        if stage.judge.violations or loop.time() > until:
            return
        await asyncio.sleep(chance.uniform(*_BEFORE))
        yield fault.name, await suffer(stage, fault, chance)
        stage.judge.violations += stage.tracebacks


async def suffer(stage: Stage, fault: Fault, chance: random.Random) -> Times:
    """One fault, and what it took until all was well again."""
    async with timed(stage) as times:
        await fault.strike(stage, chance)
        over = asyncio.get_running_loop().time()
        stage.judge.grant(fault.excuses)
        await stage.settle()
    times.complete = asyncio.get_running_loop().time() - over
    return times
