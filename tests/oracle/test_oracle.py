"""The oracle, plain and under faults: what clients hold and were told is what Postgres shows them.

Plain, there is no fault but that clients go away and come back, so no resync has a reason but a truncated table, a
large transaction, and a change of what is seen. `make chaos` plays the faults for longer, and says how long what took.
"""

import asyncio
import random

import pytest

from tests.oracle.chaos import chaos
from tests.oracle.copies import TRANSPORTS
from tests.oracle.faults import FAULTS, schedule
from tests.oracle.stage import Stage, stage

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

SECONDS = 18
LEAST_RESUMED = 10
"""How often each transport goes on from a position, at least."""


def have_resumed(it: Stage) -> bool:
    return all(it.resumed[transport.transport] >= LEAST_RESUMED for transport in TRANSPORTS)


def check(it: Stage) -> None:
    assert not it.judge.violations, it.report()
    assert not it.tracebacks
    assert have_resumed(it), it.resumed


async def test_every_copy_is_what_select_shows_and_nothing_is_told_that_may_not_be() -> None:
    async with stage(random.randrange(2**32)) as it:
        until = asyncio.get_running_loop().time() + SECONDS
        while asyncio.get_running_loop().time() < until or not (have_resumed(it) or it.judge.violations):
            await asyncio.sleep(2)
            await it.settle()
        check(it)


@pytest.mark.fault
async def test_the_same_under_a_minute_of_faults() -> None:
    async with stage(random.randrange(2**32)) as it:
        async for _ in chaos(it, schedule(it.seed, FAULTS), 60):
            pass
        check(it)
