"""The canary: what comes back proves the way, what does not come back in its turn is a gap, and silence is the end."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from realtime_bridge.errors import DatabaseError
from realtime_bridge.sources import supabase_canary
from realtime_bridge.sources.supabase_canary import Canary, Returned, Write
from tests.services import eventually

NAME = "here"


class Table:
    """Where a canary writes, as fast as it can, or is kept from it.

    Attributes:
        beats: those that were written.
        gate: a permit is taken before each write is done.
    """

    def __init__(self) -> None:
        self.beats: list[int] = []
        self.gate = asyncio.Semaphore(0)
        self.problem = ""
        self.canary = Canary("public.canary", NAME, self.opened)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Write]:
        async def write(name: str, beat: int) -> None:
            assert name == NAME
            if self.problem:
                raise DatabaseError(self.problem)
            await self.gate.acquire()
            self.beats.append(beat)

        yield write

    async def write(self) -> int:
        """Let one beat be written."""
        count = len(self.beats)
        self.gate.release()
        await eventually(lambda: len(self.beats) > count)
        await asyncio.sleep(0)
        return self.beats[-1]

    def hear(self, beat: Any, name: str = NAME) -> Returned | None:
        return self.canary.hear({"id": name, "beat": beat})


@asynccontextmanager
async def beating(monkeypatch: pytest.MonkeyPatch, **constants: float) -> AsyncIterator[Table]:
    for name, value in {"BEAT_SECONDS": 0.0, **constants}.items():
        monkeypatch.setattr(supabase_canary, name, value)
    table = Table()
    running = asyncio.create_task(table.canary.run())
    try:
        yield table
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_beat_that_comes_back_proves_all_before_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.time()
    async with beating(monkeypatch) as table:
        beat = await table.write()
        assert started - 0.001 <= beat / 1_000_000 <= time.time()
        assert table.hear(beat) == Returned(beat / 1_000_000, is_gap=False)
        assert table.hear(beat) is None, "told again, it proves nothing new"
        assert not table.canary.is_overdue()


async def test_a_beat_that_is_passed_by_a_later_one_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    async with beating(monkeypatch, RETURN_SECONDS=0.0) as table:
        await table.write()
        second = await table.write()
        assert table.hear(second) == Returned(second / 1_000_000, is_gap=True)
        assert not table.canary.is_overdue(), "the gap was told"
        third = await table.write()
        assert table.hear(third) == Returned(third / 1_000_000, is_gap=False)


async def test_a_beat_that_does_not_come_back_is_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    async with beating(monkeypatch, RETURN_SECONDS=0.05) as table:
        assert not table.canary.is_overdue()
        await table.write()
        await eventually(table.canary.is_overdue)
        table.canary.begin()
        assert not table.canary.is_overdue(), "it was on its way before anybody listened"


@pytest.mark.parametrize("row", [{"id": "elsewhere"}, {"beat": 1}, {"beat": None}, {"beat": "x"}, {}])
async def test_other_rows_and_other_beats_tell_nothing(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    async with beating(monkeypatch) as table:
        beat = await table.write()
        assert table.canary.hear({"id": NAME, "beat": beat, **row} if row else row) is None
        assert table.hear(beat) is not None


async def test_a_beat_may_come_back_before_its_write_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with beating(monkeypatch, RETURN_SECONDS=0.0) as table:
        await eventually(lambda: table.canary._awaited)
        [beat] = table.canary._awaited
        assert not table.canary.is_overdue()
        assert table.hear(beat) == Returned(beat / 1_000_000, is_gap=False)
        await table.write()
        assert not table.canary.is_overdue()


async def test_what_cannot_be_written_is_said_once_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with beating(monkeypatch, RETURN_SECONDS=0.0, WRITE_SECONDS=0.01) as table:
        await eventually(lambda: "longer than" in table.canary.problem)
        table.problem = "Postgres cannot be reached"
        await eventually(lambda: table.canary.problem == table.problem)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not table.canary.is_overdue()
        table.gate, table.problem = asyncio.Semaphore(1_000_000), ""
        await eventually(lambda: table.beats and table.canary.problem == "")
        assert table.hear(table.beats[-1]) is not None
        reasons = [record.__dict__["reason"] for record in caplog.records]
        assert reasons.count("Postgres cannot be reached") == 1


async def test_what_nobody_listens_for_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supabase_canary, "_MOST_AWAITED", 3)
    async with beating(monkeypatch) as table:
        beats = [await table.write() for _ in range(5)]
        assert table.hear(beats[0]) is None
        assert table.hear(beats[-1]) is not None
