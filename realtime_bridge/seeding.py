"""Filling the row index with what the tables hold, while the source is read.

Rows that a change has written are never overwritten: they are older than what is read, and the changes that make the
difference are on their way. A row that is deleted while its page is read may be left behind in the index; nothing asks
for it before its key is inserted again.

Layer: core. May import: words, broker.base, sources.base, rights, rows.
"""

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Final, NoReturn

from realtime_bridge.broker.base import NOTE, Broker, RowChange
from realtime_bridge.change import Relation
from realtime_bridge.errors import BridgeError, BrokerError, ForkError, LeaseLostError
from realtime_bridge.rights import RIGHTS
from realtime_bridge.rows import IndexState, Note, RowIndex, encode_row, field_of, is_indexed
from realtime_bridge.sources.base import Page, TableReader

logger = logging.getLogger(__name__)

_PAUSE_FIRST: Final = 1.0
_PAUSE_MOST: Final = 60.0
_ROUND_SECONDS: Final = 10.0


class Seeder:
    """Reads tables into the row index during one term of leading, as often as something may be missing there.

    Args:
        token: of the lease.
    """

    def __init__(
        self, broker: Broker, reader: TableReader, rows: RowIndex, tables: Sequence[str], state: IndexState, token: str
    ) -> None:
        self._broker = broker
        self._reader = reader
        self._rows = rows
        self._tables = tables
        self._state = state
        self._token = token
        self._paces = {table: _Pace() for table in tables}
        self._unread = set(tables)
        self._full: set[str] = set()
        self._problems: dict[str, str] = {}
        state.unread = len(tables)

    async def run(self) -> NoReturn:
        """Seed whatever needs it, for ever.

        Raises:
            BrokerError, LeaseLostError, ForkError: the term is over.
        """
        await self._rows.begun.wait()
        await self._forget_others()
        while True:
            self._rows.doubted.clear()
            for table in self._tables:
                await self._try(table)
            await self._measure()
            await asyncio.sleep(_PAUSE_FIRST)  # however many doubts there are
            with suppress(TimeoutError):
                async with asyncio.timeout(_ROUND_SECONDS):
                    await self._rows.doubted.wait()

    async def _forget_others(self) -> None:
        """Forget tables that are configured no longer: nothing keeps their rows up to date."""
        others = [RowChange(table) for table in await self._broker.indexed() if table not in {*self._tables, RIGHTS}]
        if others:
            await self._append(others)

    async def _try(self, table: str) -> None:
        """Seed a table if that is needed, and it was not tried just now."""
        pace = self._paces[table]
        if time.monotonic() < pace.next_at:
            return
        try:
            relation = await self._needed(table)
            is_read = relation is None or await self._read(relation, pace)
        except (BrokerError, LeaseLostError, ForkError):
            raise
        except Exception as error:  # whatever it is, it does not end the reading of the source
            is_read = False
            self._report(table, str(error) if isinstance(error, BridgeError) else type(error).__name__)
        if is_read:
            self._unread.discard(table)
            self._problems.pop(table, None)
        else:
            self._unread.add(table)
        self._state.unread = len(self._unread)

    def _report(self, table: str, problem: str) -> None:
        if self._problems.get(table) != problem:
            logger.warning("row index cannot be seeded", extra={"table": table, "reason": problem})
        self._problems[table] = problem

    async def _needed(self, table: str) -> Relation | None:
        """How a table is to be read; None if it need not be, or cannot be before its first change."""
        note = await self._note(table)
        if note is not None and note.whole_at:
            return None
        relation = self._rows.told.get(table) or await self._reader.describe(table)
        if relation is None and note is not None:
            relation = note.relation
        return relation if relation is not None and is_indexed(relation) else None

    async def _note(self, table: str) -> Note | None:
        [text] = await self._broker.rows(table, [NOTE])
        return Note.decode(text)

    async def _begin(self, relation: Relation) -> int | None:
        """Note how the rows will be laid out; those that are laid out in another way are forgotten.

        Returns the table's generation; None if the source has told of another relation meanwhile.
        """
        table = relation.name
        async with self._rows.turn:
            if self._rows.told.get(table, relation) != relation:
                return None
            note = await self._note(table)
            if note is None or note.relation != relation:
                await self._append([RowChange(table), Note(relation).change])
            return self._rows.generations[table]

    async def _read(self, relation: Relation, pace: "_Pace") -> bool:
        """Read all rows that find room; returns whether they are all there now."""
        generation = await self._begin(relation)
        if generation is None:
            return False
        pace.step(time.monotonic())
        count = 0
        async with aclosing(self._reader.pages(relation)) as pages:
            async for page in pages:
                if not await self._store(relation, generation, _additions(relation, page)):
                    return False
                count += len(page.rows)
                if await self._is_full(relation.name):
                    break  # the rest would be read for nothing
        if not await self._store(relation, generation, [Note(relation, math.ceil(time.time())).change]):
            return False
        logger.info("row index seeded", extra={"table": relation.name, "rows": count})
        return True

    async def _is_full(self, table: str) -> bool:
        indexed = await self._broker.indexed()
        return table in indexed and indexed[table].left_out > 0

    async def _store(self, relation: Relation, generation: int, changes: Sequence[RowChange]) -> bool:
        """Append, unless the table has lost its rows since what is to be stored began to be read."""
        async with self._rows.turn:
            if self._rows.generations[relation.name] != generation:
                return False
            await self._append(changes)
            return True

    async def _append(self, changes: Sequence[RowChange]) -> None:
        await self._broker.append(self._token, (), rows=changes)

    async def _measure(self) -> None:
        indexed = await self._broker.indexed()
        self._state.size = sum(table.size for table in indexed.values())
        self._state.left_out = sum(table.left_out for table in indexed.values())
        full = {name for name, table in indexed.items() if table.left_out}
        for name in sorted(full - self._full):
            logger.warning("row index has no room for all rows of a table", extra={"table": name})
        self._full = full


class _Pace:
    """How often a table is read: at once after a quiet time, more and more seldom where that does not last.

    Attributes:
        next_at: not before this time of the monotonic clock.
    """

    def __init__(self) -> None:
        self.next_at = 0.0
        self._pause = _PAUSE_FIRST

    def step(self, now: float) -> None:
        """It is being read."""
        was_quiet = now > self.next_at + _PAUSE_MOST
        self._pause = _PAUSE_FIRST if was_quiet else min(self._pause * 2, _PAUSE_MOST)
        self.next_at = now + self._pause


def _additions(relation: Relation, page: Page) -> list[RowChange]:
    fields = ((field_of(relation, row), row) for row in page.rows)
    return [
        RowChange(relation.name, field, encode_row(row, page.read_at), only_new=True)
        for field, row in fields
        if field is not None
    ]
