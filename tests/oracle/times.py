"""How long it takes until a fault is noticed, until another leads, and until everybody has everything again."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median
from typing import Final

import httpx

from tests.clients import http
from tests.oracle.stage import Replica, Stage

_LOOK_SECONDS: Final = 0.1
_ANSWER_SECONDS: Final = 1.0
"""Whoever does not answer in that time is not ready."""


@dataclass
class Times:
    """Seconds since a fault began, and, for `complete`, since what was broken works again. None: it never was so.

    Attributes:
        noticed: a link of a client broke, or a bridge was not ready.
        taken_over: another bridge leads.
        complete: every copy is what `SELECT` shows.
    """

    noticed: float | None = None
    taken_over: float | None = None
    complete: float | None = None

    def __str__(self) -> str:
        told = (("noticed", self.noticed), ("taken over", self.taken_over), ("complete again", self.complete))
        return ", ".join(f"{what} after {seconds:.1f} s" for what, seconds in told if seconds is not None)


@asynccontextmanager
async def timed(stage: Stage) -> AsyncIterator[Times]:
    """Look at the bridges and their clients until the block ends."""
    times = Times()
    _, follower = await stage.roles()
    task = asyncio.get_running_loop().create_task(_look(stage, follower, times))
    try:
        yield times
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _look(stage: Stage, follower: Replica, times: Times) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        ready = await asyncio.gather(*map(_is_ready, stage.replicas))
        lost = [copy.lost_at for copy in stage.copies if copy.lost_at > began]
        if times.noticed is None and (lost or not all(ready)):
            times.noticed = min([loop.time(), *lost]) - began
        if times.taken_over is None and await follower.leads():
            times.taken_over = loop.time() - began
        await asyncio.sleep(_LOOK_SECONDS)


async def _is_ready(replica: Replica) -> bool:
    try:
        async with http(replica.bridge.url) as client:
            return (await client.get("/readyz", timeout=_ANSWER_SECONDS)).status_code == 200
    except httpx.TransportError:
        return False


def table(measured: Iterable[tuple[str, Times]]) -> str:
    """Kinds of faults with how often they were, and of each of `Times` the median and the longest."""
    by_name: dict[str, list[Times]] = defaultdict(list)
    for name, times in measured:
        by_name[name].append(times)
    head = ("seconds: median / longest", "count", "noticed", "taken over", "complete again")
    rows = [
        (
            name,
            str(len(all_times)),
            *(_shown([getattr(times, what) for times in all_times]) for what in ("noticed", "taken_over", "complete")),
        )
        for name, all_times in sorted(by_name.items())
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )


def _shown(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.1f} / {max(known):.1f}" if known else "-"
