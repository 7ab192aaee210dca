"""How long ingest waits before it tries again, and before it acknowledges."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from realtime_bridge.broker.memory import MemoryBroker
from realtime_bridge.change import Image, Relation
from realtime_bridge.errors import BridgeError, BrokerError, ForkError, LeaseLostError, SourceError
from realtime_bridge.ingest import ACKNOWLEDGE_AFTER_SECONDS, Ingest, _Trail
from realtime_bridge.repair import RepairLimits
from realtime_bridge.sources.base import Page, SourceBatch, SourceStream
from tests.rights import Known
from tests.services import eventually

TTL = 3.0


class FailingSource:
    """A source that cannot be opened."""

    name = "failing"
    is_lossy = False

    def __init__(self, error: BridgeError) -> None:
        self._error = error

    @asynccontextmanager
    async def open(self, after: str | None, *, owner: str) -> AsyncIterator[SourceStream]:
        raise self._error
        yield  # type: ignore[unreachable]  # what makes it a generator

    async def check(self) -> None: ...


class NoTables:
    """A reader of no tables."""

    async def describe(self, table: str) -> Relation | None:
        raise AssertionError(table)

    def pages(self, relation: Relation) -> AsyncGenerator[Page, None]:
        raise AssertionError(relation)

    async def rows(self, relation: Relation, keys: Sequence[Sequence[str]]) -> list[Image]:
        raise AssertionError(relation)


@pytest.mark.parametrize(
    ("error", "longest"),
    [
        (SourceError("away"), 10.0),
        (BrokerError("away"), TTL / 3),
        (ForkError(7), TTL / 3),
        (LeaseLostError("another process leads"), TTL / 3),
    ],
)
async def test_what_is_the_brokers_is_tried_again_soon_and_what_is_the_sources_with_growing_patience(
    error: BridgeError, longest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def impatient(_: float, most: float) -> float:
        waits.append(most)
        return 0.0 if len(waits) < 12 else 3600.0

    monkeypatch.setattr(random, "uniform", impatient)
    async with MemoryBroker(history_size=10, history_bytes=1000, history_seconds=10, row_index_bytes=1000) as broker:
        limits = RepairLimits("updated_at", 0)
        source, tables = FailingSource(error), NoTables()
        ingest = Ingest(source, broker, tables, rights=Known(), tables=(), limits=limits, namespace="test", ttl=TTL)
        running = asyncio.create_task(ingest.run())
        await eventually(lambda: len(waits) == 12)
        running.cancel()
    assert waits[0] == 0.25
    assert max(waits) == longest


class Acknowledged:
    """A stream that keeps what it is told of."""

    def __init__(self) -> None:
        self.places: list[int] = []

    def __aiter__(self) -> AsyncIterator[SourceBatch]:
        raise NotImplementedError

    def acknowledge(self, acknowledge: int) -> None:
        self.places.append(acknowledge)


def test_the_acknowledgement_trails_the_append(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    trail = _Trail(stream := Acknowledged())
    for place in range(12):
        trail.note(place)
        assert all(noted <= place - ACKNOWLEDGE_AFTER_SECONDS for noted in stream.places)
        now += 1.0
    assert stream.places == [*range(12 - int(ACKNOWLEDGE_AFTER_SECONDS))]
