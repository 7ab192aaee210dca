"""A row that must come back: the leader changes it every few seconds, and Realtime has to tell of that.

It goes the whole way of every other change: committed, read by the server's poller, sent over the same channel in the
order of commits. So what comes back proves that everything committed before it was written has come, too, and silence
proves that something is broken, whatever is said of heartbeats. Each bridge has a row of its own, by its namespace.

Times are those of this machine, not of the commit: what was written later than a commit was committed later.

Layer: adapters. May import: errors, sources.database_tables.
Sources: PostgREST's reference of upserts.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

import httpx

from realtime_bridge.errors import BridgeError, SourceError
from realtime_bridge.sources.database_tables import Connect, quoted

logger = logging.getLogger(__name__)

BEAT_SECONDS: Final = 4.0
RETURN_SECONDS: Final = 8.0
"""What does not come back within this time after it was written does not come back."""
WRITE_SECONDS: Final = 5.0
_MOST_AWAITED: Final = 100

Write: TypeAlias = Callable[[str, int], Awaitable[None]]
"""Writes a row's `id` and `beat`; a `BridgeError` says that it cannot be done now."""
Writer: TypeAlias = Callable[[], AbstractAsyncContextManager[Write]]


class Returned(NamedTuple):
    """What a beat that came back tells.

    Attributes:
        proven_until: seconds since 1970: everything that was committed before has come, but for what is missing.
        is_gap: one that was written before it has not come back: changes were dropped between the two.
    """

    proven_until: float
    is_gap: bool


class Canary:
    """Writes beats, and knows which of them have come back. An instance belongs to one event loop.

    Args:
        table: `schema.table` with the columns `id` (text, the primary key) and `beat` (bigint).
        name: of this bridge's row.
        writer: a way to write, open for as long as it is entered.

    Attributes:
        problem: why the last beat could not be written; empty if it could.
    """

    def __init__(self, table: str, name: str, writer: Writer) -> None:
        self.table = table
        self.problem = ""
        self._name = name
        self._writer = writer
        self._newest = 0
        self._awaited: dict[int, float | None] = {}  # when it was written, by the monotonic clock; None: not yet

    async def run(self) -> NoReturn:
        """Write a beat every `BEAT_SECONDS`, for ever. One that cannot be written proves nothing and is not awaited."""
        async with self._writer() as write:
            while True:
                try:
                    await self._beat(write)
                except (BridgeError, TimeoutError) as error:
                    self._report(str(error) or f"it took longer than {WRITE_SECONDS:.0f} s")
                else:
                    self.problem = ""
                await asyncio.sleep(BEAT_SECONDS)

    async def _beat(self, write: Write) -> None:
        self._newest = beat = max(time.time_ns() // 1000, self._newest + 1)
        while len(self._awaited) >= _MOST_AWAITED:  # nobody listens
            del self._awaited[next(iter(self._awaited))]
        self._awaited[beat] = None
        is_written = False
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await write(self._name, beat)
            is_written = True
        finally:
            if beat in self._awaited:  # it may have come back already
                if is_written:
                    self._awaited[beat] = time.monotonic()
                else:
                    del self._awaited[beat]

    def _report(self, problem: str) -> None:
        if problem != self.problem:
            logger.warning("the canary cannot be written", extra={"table": self.table, "reason": problem})
        self.problem = problem

    def begin(self) -> None:
        """From now on beats are heard; those that are on their way need not come."""
        self._awaited.clear()

    def hear(self, row: Mapping[str, Any]) -> Returned | None:
        """A row of the table has come; None if that tells nothing."""
        beat = row.get("beat")
        if row.get("id") != self._name or beat not in self._awaited:
            return None
        is_gap = any(written is not None for other, written in self._awaited.items() if other < beat)
        self._awaited = {other: written for other, written in self._awaited.items() if other > beat}
        return Returned(beat / 1_000_000, is_gap)

    def is_overdue(self) -> bool:
        """Whether a beat should have come back and has not."""
        now = time.monotonic()
        return any(written is not None and now - written > RETURN_SECONDS for written in self._awaited.values())


def postgres_writer(connect: Connect, table: str) -> Writer:
    """Writes over ordinary connections."""
    schema, _, name = table.partition(".")
    sql = (
        f"INSERT INTO {quoted(schema)}.{quoted(name)} (id, beat) VALUES ($1, $2) "  # noqa: S608 - names are quoted
        "ON CONFLICT (id) DO UPDATE SET beat = EXCLUDED.beat"
    )

    async def write(id_: str, beat: int) -> None:
        async with connect() as connection:
            await connection.execute(sql, id_, beat)

    @asynccontextmanager
    async def opened() -> AsyncIterator[Write]:
        yield write

    return opened


def postgrest_writer(url: str, key: str, table: str) -> Writer:
    """Writes through a project's PostgREST with the service key."""
    schema, _, name = table.partition(".")
    headers = {
        "apikey": key,
        "Authorization": f"Bearer {key}",
        "Content-Profile": schema,
        "Prefer": "resolution=merge-duplicates,return=minimal",
    }

    @asynccontextmanager
    async def opened() -> AsyncIterator[Write]:
        async with httpx.AsyncClient(base_url=url.rstrip("/") + "/rest/v1/", headers=headers) as client:

            async def write(id_: str, beat: int) -> None:
                try:
                    answer = await client.post(name, params={"on_conflict": "id"}, json={"id": id_, "beat": beat})
                    answer.raise_for_status()
                except httpx.HTTPStatusError as error:
                    raise SourceError(f"PostgREST answers {error.response.status_code} for {table}") from None
                except httpx.HTTPError as error:
                    raise SourceError(f"PostgREST cannot be reached: {type(error).__name__}") from None

            yield write

    return opened
