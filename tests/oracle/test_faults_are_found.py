"""The oracle finds what it is there to find: each of these faults, planted in both bridges, within seconds.

    every seventh number is skipped
    what was missed while the broker was away is forgotten
    whoever comes back is served from the present
    positions pass what is not written
    everybody is told of everything
    memberships hold for ever
    nobody is told that a row has left
    a row that enters shows what it was before
    everybody is told to read again, all the time
    the last row of a transaction is dropped
    messages are turned round
    a truncated table stays as it was
    a leader that was replaced goes on

How each is planted, and under which fault it shows, is in `planted`. That without any of them nothing is found is what
`test_oracle` shows.
"""

import asyncio
import itertools
import random

import pytest

from tests.oracle.chaos import suffer
from tests.oracle.faults import FAULTS
from tests.oracle.planted import PLANTED
from tests.oracle.stage import stage

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

ROUNDS = 60
"""Quiet moments after each of which all is compared: a fault that has not shown by then is not found."""


def test_the_list_is_in_the_docstring() -> None:
    assert __doc__ is not None
    assert [line.strip() for line in __doc__.splitlines() if line.startswith("    ")] == list(PLANTED)


@pytest.mark.parametrize("what", PLANTED)
async def test_a_planted_fault_is_found(what: str) -> None:
    plant, name = PLANTED[what]
    seed = random.randrange(2**32)
    chosen = [fault for fault in FAULTS if fault.name == name]
    assert len(chosen) == bool(name)
    async with stage(seed, plant=plant, BRIDGE_TAKEOVER_SECONDS="1") as it:
        it.complete_seconds = 3
        for fault in itertools.islice(itertools.cycle(chosen or [None]), ROUNDS):
            await asyncio.sleep(1)
            if fault is None:
                await it.settle()
            else:
                await suffer(it, fault, random.Random(seed))
            if it.judge.violations:
                return
    pytest.fail(f"seed {seed}: not found in {it.truth.newest.number} transactions")
