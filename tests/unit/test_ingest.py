"""How long ingest waits before it tries again, and before it acknowledges."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from realtime_bridge import ingest as ingest_module
from realtime_bridge.broker.base import Head, RowChange
from realtime_bridge.broker.memory import MemoryBroker
from realtime_bridge.change import Body, Image, Relation
from realtime_bridge.errors import BridgeError, BrokerError, ForkError, LeaseLostError, SourceError
from realtime_bridge.ingest import ACKNOWLEDGE_AFTER_SECONDS, Ingest, _Trail
from realtime_bridge.repair import RepairLimits
from realtime_bridge.sources.base import Page, SourceBatch, SourceStream
from tests.contract.brokers import LIMITS, changes
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


class Told(FailingSource):
    """A source that tells the same whenever it is opened: where it begins, and then one change."""

    def __init__(self) -> None:
        super().__init__(SourceError("closed"))

    @asynccontextmanager
    async def open(self, after: str | None, *, owner: str) -> AsyncIterator[SourceStream]:
        yield self

    def acknowledge(self, acknowledge: int) -> None: ...

    def __aiter__(self) -> AsyncIterator[SourceBatch]:
        return self._iterate()

    async def _iterate(self) -> AsyncGenerator[SourceBatch, None]:
        yield SourceBatch(watermark="begun")
        yield SourceBatch(tuple(changes(1)), ("told",), "told")
        await asyncio.Event().wait()


class RefusingBroker(MemoryBroker):
    """A broker that refuses appends of at least so many entries."""

    def __init__(self, refused: int) -> None:
        super().__init__(**LIMITS)
        self.refused = refused

    async def append(
        self,
        token: str,
        bodies: Sequence[Body],
        *,
        watermark: str = "",
        proven_until: float | None = None,
        rows: Sequence[RowChange] = (),
    ) -> Head:
        if len(bodies) >= self.refused:
            raise BrokerError("Redis: no permission")
        return await super().append(token, bodies, watermark=watermark, proven_until=proven_until, rows=rows)


@pytest.mark.parametrize("refused", [0, 1], ids=["every append", "appends of changes"])
async def test_what_is_refused_again_and_again_is_logged_once_and_so_is_its_end(
    refused: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "realtime_bridge.ingest")
    monkeypatch.setattr(random, "uniform", lambda *_: 0.01)
    async with RefusingBroker(refused) as broker:
        limits = RepairLimits("updated_at", 0)
        ingest = Ingest(Told(), broker, NoTables(), rights=Known(), tables=(), limits=limits, namespace="test", ttl=TTL)
        running = asyncio.create_task(ingest.run())
        try:
            await eventually(lambda: ingest.state.restarts > 5)
            assert [record.message for record in caplog.records[:9]] == ["leading", "cannot read the source"]
            assert (ingest.problem, ingest.state.reading) == ("Redis: no permission", False)
            broker.refused = 1000
            await eventually(lambda: ingest.state.reading)
            assert [record.message for record in caplog.records[2:9]] == ["reading the source"]
            assert ingest.problem == ""
        finally:
            running.cancel()


async def test_a_problem_is_over_where_another_has_led_for_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "realtime_bridge.ingest")
    monkeypatch.setattr(ingest_module, "_BACKOFF_MOST", 0.0)  # every wait for the lease is long
    monkeypatch.setattr(random, "uniform", lambda *_: 0.01)
    async with MemoryBroker(**LIMITS) as broker:
        source, tables, limits = FailingSource(SourceError("away")), NoTables(), RepairLimits("updated_at", 0)
        ingest = Ingest(source, broker, tables, rights=Known(), tables=(), limits=limits, namespace="test", ttl=TTL)
        running = asyncio.create_task(ingest.run())
        await eventually(lambda: ingest.state.restarts >= 2)
        running.cancel()
    assert [record.message for record in caplog.records[:4]] == ["leading", "cannot read the source"] * 2


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
