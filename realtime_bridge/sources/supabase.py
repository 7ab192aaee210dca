"""Changes from Supabase Realtime, through the official client with the service key.

At most once by nature: an event has no number, the slot behind it is temporary, and over the rate limit changes are
dropped in silence. So everything that may have cost a change is a *doubt*, told behind all that was received before
it: whoever reads the table again after it cannot be thrown back by an older change.

A link that is not healthy ends the stream; whoever reads opens it again, with backoff, and a stream begins with a doubt
of every table.

What cannot be had this way: digits of a `numeric` beyond those of a double (see `supabase_texts`); the base type of a
domain; commits that the server's poller silently left out (a canary notices, if one of its own is among them).

Layer: adapters. May import: change, errors, sources.{base,supabase_canary,supabase_link,supabase_payload}.
Sources: https://supabase.com/docs/guides/realtime/postgres-changes.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from realtime_bridge.change import Body
from realtime_bridge.sources.base import SourceBatch
from realtime_bridge.sources.supabase_canary import Canary
from realtime_bridge.sources.supabase_link import ALL, Link, linked
from realtime_bridge.sources.supabase_payload import Keys, PayloadReader

BATCH_SECONDS: Final = 0.5


class SupabaseSource:
    """The tables' changes as Supabase Realtime tells them.

    Args:
        url: the project's address.
        key: its service key; the client is never signed in, and the key is never logged.
        tables: `schema.table` each.
        canary: proves what heartbeats do not; it has to be run beside.
        keys: asks Postgres for primary keys. Without it they are learned from the first old row that brings only some
            of the columns; until then the column `id` is taken for the key, if there is one.
    """

    name = "supabase"
    is_lossy = True

    def __init__(
        self, url: str, key: str, *, tables: Sequence[str], keys: Keys | None = None, canary: Canary | None = None
    ) -> None:
        self._url = url
        self._key = key
        self._tables = tuple(tables)
        self._canary = canary
        self._reader = PayloadReader(keys)
        self._mark = f"supabase|{url.partition('://')[2].partition('/')[0]}|"

    @asynccontextmanager
    async def open(self, after: str | None, *, owner: str) -> AsyncIterator["SupabaseStream"]:
        """Subscribe, and return once changes flow; see `Source.open`.

        `owner` has no use here: upstream, nothing is held that a successor would have to take away.
        """
        async with linked(self._url, self._key, self._tables, self._canary) as link:
            yield SupabaseStream(link, self._reader, self._mark, self._tables)

    async def check(self) -> None:
        """Subscribe and leave again; see `Source.check`."""
        async with linked(self._url, self._key, self._tables, self._canary):
            pass


class SupabaseStream:
    """An open subscription; see `SourceStream`.

    Without a canary `proven_until` is when the newest heartbeat that was answered was sent, less `POLL_SECONDS`: it
    proves the link and all that the server had sent by then, not the server's own poller behind it.
    """

    def __init__(self, link: Link, reader: PayloadReader, mark: str, tables: tuple[str, ...]) -> None:
        self._link = link
        self._reader = reader
        self._mark = mark
        self._watermark = mark
        self._tables = tables

    def __aiter__(self) -> AsyncIterator[SourceBatch]:
        return self._batches()

    def acknowledge(self, acknowledge: int) -> None:
        """Nothing upstream waits for it."""

    async def _batches(self) -> AsyncIterator[SourceBatch]:
        # Also where nobody has read before: readers may have come, and read the tables, before the link was live.
        yield SourceBatch(watermark=self._watermark, doubts=self._tables)
        while True:
            await self._link.wait(BATCH_SECONDS)
            yield await self._next()
            await self._link.supervise()

    async def _next(self) -> SourceBatch:
        payloads, doubts, proven_until = self._link.take()
        bodies: list[Body] = []
        marks: list[str] = []
        for table, data in payloads:
            try:
                read = await self._reader.read(data)
            except (ArithmeticError, LookupError, TypeError, ValueError):
                doubts.add(table)
                continue
            self._watermark = self._mark + data["commit_timestamp"]
            bodies += read
            marks += [self._watermark] * len(read)
        doubted = self._tables if ALL in doubts else tuple(sorted(doubts))
        return SourceBatch(tuple(bodies), tuple(marks), self._watermark, None, proven_until, doubted)
