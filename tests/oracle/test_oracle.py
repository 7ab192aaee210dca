"""The oracle, plain: what clients hold and were told is what Postgres shows them.

Plain, there is no fault but that clients go away and come back, so no resync has a reason but a truncated table, a
large transaction, and a change of what is seen.
"""

import asyncio
import random

import pytest

from tests.oracle.copies import TRANSPORTS
from tests.oracle.stage import Stage, stage

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

SECONDS = 18
LEAST_RESUMED = 10
"""How often each transport goes on from a position, at least."""


def check(it: Stage) -> None:
    assert not it.judge.violations, it.report()
    assert all(it.resumed[transport.transport] >= LEAST_RESUMED for transport in TRANSPORTS), it.resumed


async def test_every_copy_is_what_select_shows_and_nothing_is_told_that_may_not_be() -> None:
    async with stage(random.randrange(2**32)) as it:
        until = asyncio.get_running_loop().time() + SECONDS
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(2)
            await it.settle()
        check(it)
